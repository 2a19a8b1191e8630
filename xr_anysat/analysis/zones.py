"""The cells of a grid that places cover, and means of embeddings over them.

A polygon covers a share of each cell, and its mean is weighted by these shares. A point covers the cell that contains
it, whole. Places are in the units of the grid: x counts columns of cells and y counts rows, both from the corner.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from xr_anysat.analysis.cells import observed
from xr_anysat.shared.graph import RECHUNK

if TYPE_CHECKING:
    from geopandas import GeoSeries
    from odc.geo.geobox import GeoBox

BLOCK = 256
"""Cells on the side of a block: sums are made per block of the grid, so they do not depend on chunks."""

COARSE = 16
"""Cells on the side of a square that is tested before its cells are."""


def in_grid_units(geobox: GeoBox, places: GeoSeries) -> list[Any]:
    """Return places, which are in the CRS of a grid, in units of its cells; missing ones are None."""
    import shapely

    a = geobox.affine
    moved = shapely.transform(
        np.asarray(places.values), lambda xy: (xy - [a.c, a.f]) / [a.a, a.e]
    )  # the division by the size of a cell is exact where a multiplication by its inverse is not
    return [None if place is None or place.is_empty else place for place in moved]


def blocks_met(places: Sequence[Any], shape: tuple[int, int]) -> dict[tuple[int, int], list[int]]:
    """Map the blocks of a grid that the bounds of places meet, by first row and column, to the numbers of the places.

    Blocks are in the order of rows.
    """
    met: dict[tuple[int, int], list[int]] = {}
    for number, place in enumerate(places):
        if place is None:
            continue
        left, top, right, bottom = place.bounds
        ranges = []
        for low, high, size in ((top, bottom, shape[0]), (left, right, shape[1])):
            first, last = math.floor(max(low, 0)), min(max(math.ceil(high), math.floor(low) + 1), size)
            ranges.append(range(first // BLOCK * BLOCK, last, BLOCK))
        for i, j in product(*ranges):
            met.setdefault((i, j), []).append(number)
    return dict(sorted(met.items()))


def cell_shares(place: Any, top: int, left: int, shape: tuple[int, int]) -> np.ndarray:
    """Return the share of each cell of a block that a place covers, (rows, columns) float64 from 0 to 1.

    Parameters
    ----------
    place : geometry
        A point, polygon or multipolygon in units of the grid.
    top, left : int
        First row and column of the block.
    shape : (int, int)
        Its rows and columns.

    Examples
    --------
    >>> import shapely
    >>> cell_shares(shapely.box(0.5, 0, 2, 1.25), 0, 0, (2, 3))
    array([[0.5  , 1.   , 0.   ],
           [0.125, 0.25 , 0.   ]])
    >>> cell_shares(shapely.Point(1.0, 0.9), 0, 0, (2, 3))
    array([[0., 1., 0.],
           [0., 0., 0.]])
    """
    import shapely

    shares = np.zeros(shape)
    height, width = shape
    if place.geom_type == "Point":
        i, j = math.floor(place.y) - top, math.floor(place.x) - left
        if 0 <= i < height and 0 <= j < width:
            shares[i, j] = 1
        return shares
    # a border of many points is cut to the block once, not per cell
    place = shapely.intersection(place, shapely.box(left, top, left + width, top + height))
    shapely.prepare(place)
    rows, cols = (a.ravel() for a in np.mgrid[0:height:COARSE, 0:width:COARSE])
    for side in (COARSE, 1):
        squares = shapely.box(cols + left, rows + top, cols + left + side, rows + top + side)
        met = shapely.intersects(place, squares)
        rows, cols, squares = rows[met], cols[met], squares[met]
        whole = shapely.covers(place, squares)
        for i, j in zip(rows[whole], cols[whole], strict=True):
            shares[i : i + side, j : j + side] = 1
        rows, cols, squares = rows[~whole], cols[~whole], squares[~whole]
        if side > 1:
            down, across = (a.ravel() for a in np.mgrid[0:side, 0:side])
            rows, cols = (rows[:, None] + down).ravel(), (cols[:, None] + across).ravel()
            within = (rows < height) & (cols < width)
            rows, cols = rows[within], cols[within]
    shares[rows, cols] = np.minimum(shapely.area(shapely.intersection(place, squares)), 1)
    return shares


def zone_sums(emb: xr.DataArray, places: Sequence[Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sum embeddings over places, each cell times its share.

    Only the blocks of a lazy cube that places meet are computed. All sums are computed in one pass.

    Parameters
    ----------
    emb : DataArray, (D, y, x)
    places : sequence of geometries, or None
        In units of the grid.

    Returns
    -------
    sums : ndarray, (n, D) float64
        Over the cells that were observed.
    cells, valid : ndarray, (n,) float64
        Number of cells of each place, and of those that were observed: sums of shares.
    """
    met = blocks_met(places, (emb.sizes["y"], emb.sizes["x"]))
    within = [[(places[n], i, j) for n in numbers] for (i, j), numbers in met.items()]
    if emb.chunks is None:
        made = [
            block_sums(emb.data[:, i : i + BLOCK, j : j + BLOCK], those)
            for (i, j), those in zip(met, within, strict=True)
        ]
    else:
        import dask

        parts = emb.data.rechunk((-1, BLOCK, BLOCK), method=RECHUNK).to_delayed()
        delayed_sums = dask.delayed(block_sums)  # type: ignore[attr-defined]
        made = dask.compute(  # type: ignore[attr-defined]
            [
                delayed_sums(parts[0, i // BLOCK, j // BLOCK], those)
                for (i, j), those in zip(met, within, strict=True)
            ]
        )[0]
    return merge_sums(len(places), emb.sizes["D"], list(met.values()), made)


BlockSums = list[tuple[np.ndarray, float, float]]
"""For each place in a block: the sum (D,), its number of cells, and of cells that were observed."""


def merge_sums(
    count: int, channels: int, numbers: Sequence[Sequence[int]], sums: Sequence[BlockSums]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Add the sums of blocks, in their order, to those of `count` places; `numbers` are the places of each block.

    Returns
    -------
    tuple
        As :func:`zone_sums`.
    """
    totals = np.zeros((count, channels))
    counts = np.zeros((2, count))
    for those, each in zip(numbers, sums, strict=True):
        for number, (total, cells, valid) in zip(those, each, strict=True):
            totals[number] += total
            counts[:, number] += cells, valid
    return totals, counts[0], counts[1]


def block_sums(values: np.ndarray, places: Sequence[tuple[Any, int, int]]) -> BlockSums:
    """Sum a block (D, h, w) over places, each cell times its share.

    For each place, pass the row and column of the corner of the block in the units of the place.
    """
    there = observed(values)
    made = []
    for place, top, left in places:
        shares = cell_shares(place, top, left, there.shape)
        seen = np.where(there, shares, 0)
        i, j = np.nonzero(seen)
        chosen = np.ascontiguousarray(values[:, i, j], np.float64)
        made.append(((chosen * seen[i, j]).sum(1), float(shares.sum()), float(seen.sum())))
    return made

"""How the blocks of an embedding cube are arranged in a Zarr store."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import xarray as xr

from xr_anysat.errors import CubeError
from xr_anysat.shared.graph import RECHUNK
from xr_anysat.shared.grid import TRANSFORM, grid_of, with_transform
from xr_anysat.shared.serialization import attribute_json
from xr_anysat.store.codecs import CODECS, SCALE, VALUES

INNER_BYTES = 4 << 20
"""Largest size of an inner chunk of a shard before compression, which is what reading one cell costs."""

MIN_INNER_SIDE = 8
"""Smallest side of an inner chunk, in cells."""

BLOCK_CELLS = 256
"""Side of a block, in cells, for a cube without chunks."""

CF = ("_FillValue", "missing_value", "scale_factor", "add_offset")
"""Names of attributes that readers apply to values."""


@dataclass(frozen=True)
class Layout:
    """How a store is divided into blocks; part of every task.

    Attributes
    ----------
    codec : str or None
        Of :mod:`xr_anysat.store.codecs`.
    margin : (int, int)
        Cells of the store before the first cell of the cube, along y and x.
    block : (int, int)
        Size of a block along y and x, in cells.
    """

    codec: str | None
    margin: tuple[int, ...]
    block: tuple[int, ...]

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of the arrays. A finished block has a shard in each of them."""
        return tuple(CODECS[self.codec].dtypes(np.float32))

    def counts(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return the number of blocks along y and x in a store of `shape` cells (y, x)."""
        down, across = (-(-n // b) for n, b in zip(shape, self.block, strict=True))
        return down, across

    def cells(self, place: tuple[int, ...], shape: Sequence[int]) -> tuple[slice, slice]:
        """Return the cells of a block in a cube of `shape` cells (y, x), without the margin.

        Examples
        --------
        >>> Layout(None, (1, 0), (4, 4)).cells((0, 1), (10, 6))
        (slice(0, 3, None), slice(4, 6, None))
        """
        starts = [i * side - m for i, side, m in zip(place, self.block, self.margin, strict=True)]
        ends = [min(n, at + side) for at, side, n in zip(starts, self.block, shape, strict=True)]
        rows, cols = (slice(max(0, a), b) for a, b in zip(starts, ends, strict=True))
        return rows, cols


def prepare_for_store(emb: xr.DataArray) -> xr.DataArray:
    """Return the cube with its coordinates in memory and the correct transform.

    Raises
    ------
    CubeError
        If a store cannot represent the cube.
    """
    if not emb.size:
        raise CubeError(
            f"(D, y, x) is {emb.shape}: expected at least one cell; the area may be outside of the data"
        )
    wrong = [name for name in emb.coords if not isinstance(name, str) or "/" in name]
    if wrong:  # older versions of xarray store them as another path
        raise ValueError(f"a coordinate has the name {wrong[0]!r}")
    taken = [f"coordinate {name!r}" for name in (VALUES, SCALE) if name in emb.coords]
    taken += [f"attribute {name!r}" for name in CF if name in emb.attrs]
    if taken:
        raise CubeError(
            f"{', '.join(taken)}: this name has another meaning in a store. Rename it, or drop it with "
            "emb.drop_vars(name) or emb.attrs.pop(name)"
        )
    for name, value in emb.attrs.items():
        attribute_json(name, value)
    emb = emb.assign_coords({k: c.compute() for k, c in emb.coords.items() if c.chunks is not None})
    geobox = grid_of(emb)
    if geobox is None or "spatial_ref" not in emb.coords:
        return emb
    own = [float(v) for v in str(emb["spatial_ref"].attrs.get(TRANSFORM, "nan")).split()]
    if np.shape(own) == (6,) and np.allclose(own, geobox.affine.to_gdal(), rtol=1e-9, atol=1e-9):
        return emb
    return with_transform(emb, geobox)  # a selection of cells keeps the transform of the whole


def margin_and_block(emb: xr.DataArray) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the margin and the size of a block, along y and x, for a store of a chunked cube.

    Blocks are the chunks of the cube if these are of one size, except for the first and the last.
    """
    # only the coordinates of a grid can be extended over a margin
    along = {k for k, c in emb.coords.items() if {"y", "x"} & set(c.dims)}
    geobox = grid_of(emb)
    extends = (
        geobox is not None and along == {"y", "x"} and (geobox.crs is None or "spatial_ref" in emb.coords)
    )
    margins, sides = [], []
    for dim in ("y", "x"):
        first, *rest = emb.chunksizes[dim]
        side = max(first, *rest, 0)
        even = all(c == side for c in rest[:-1]) and (first == side or extends)
        margins.append(side - first if rest and even else 0)
        sides.append(side)
    return (margins[0], margins[1]), (sides[0], sides[1])


def rechunk_to_blocks(emb: xr.DataArray, layout: Layout) -> xr.DataArray:
    """Return the cube in chunks that are the blocks of a store."""
    sizes = zip((emb.sizes["y"], emb.sizes["x"]), layout.margin, layout.block, strict=True)
    chunks = ((emb.sizes["D"],), *(block_sizes(*each) for each in sizes))
    if chunks == emb.chunks:
        return emb
    return emb.copy(data=emb.data.rechunk(chunks, method=RECHUNK))


def block_sizes(size: int, margin: int, side: int) -> tuple[int, ...]:
    """Return the sizes of the blocks along an axis of `size` cells, whose first block lacks `margin` cells.

    Examples
    --------
    >>> block_sizes(10, 1, 4)
    (3, 4, 3)
    """
    edges = [0, *range(side - margin, size, side), size]
    return tuple(b - a for a, b in pairwise(edges))


def inner_chunk(block: tuple[int, ...], cell_bytes: int) -> tuple[int, int]:
    """Return the size of an inner chunk along y and x, which divides the size of a block.

    Examples
    --------
    >>> inner_chunk((288, 288), 768 * 4), inner_chunk((61, 4), 768 * 4)
    ((36, 36), (61, 4))
    """
    limit = math.isqrt(INNER_BYTES // cell_bytes)
    sides = []
    for side in block:
        parts = [d for d in range(1, side + 1) if side % d == 0 and d >= min(MIN_INNER_SIDE, side)]
        sides.append(max((d for d in parts if d <= limit), default=parts[0]))
    return sides[0], sides[1]


def with_margin(emb: xr.DataArray, margin: tuple[int, ...]) -> xr.DataArray:
    """Return the cube as it is stored, with zeros as values and its coordinates extended over the margin."""
    import dask.array as da

    shape = (emb.sizes["D"], emb.sizes["y"] + margin[0], emb.sizes["x"] + margin[1])
    data = da.zeros(shape, dtype=emb.dtype, chunks=(-1, -1, -1))
    if not any(margin):
        return emb.copy(data=data)
    from odc.geo.xr import xr_coords

    geobox = grid_of(emb)
    assert geobox is not None  # without a grid there is no margin
    wider = geobox.pad(margin[1], margin[0])
    grid = xr_coords(wider, dims=("y", "x"))
    coords = dict(emb.coords)
    for dim, cells in zip(("y", "x"), margin, strict=True):
        own = emb[dim]  # its values are kept exactly
        values = np.concatenate([grid[dim].values[:cells].astype(own.dtype), own.values])
        coords[dim] = xr.Variable(dim, values, own.attrs)
    out = xr.DataArray(data, coords, emb.dims, emb.name, emb.attrs)
    out.encoding = emb.encoding
    return with_transform(out, wider)

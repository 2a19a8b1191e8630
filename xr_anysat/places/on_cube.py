"""Embeddings of places on a cube that is already open: only the windows that hold a place are computed."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import pandas as pd
import xarray as xr

from xr_anysat.analysis.vector import (
    POINTS,
    POLYGONS,
    STATUS,
    as_geodataframe,
    check_new_columns,
    in_crs_of,
    joined,
    zone_means,
)
from xr_anysat.analysis.zones import BLOCK, blocks_met, cell_shares, in_grid_units
from xr_anysat.config import FRAMES
from xr_anysat.embedding.embed import embed, embed_resolved
from xr_anysat.embedding.lattice import Squares
from xr_anysat.embedding.options import EmbedKeywords, EmbedOptions, ResolvedOptions, resolve_options
from xr_anysat.errors import OptionError
from xr_anysat.shared.grid import require_grid

if TYPE_CHECKING:
    from geopandas import GeoDataFrame, GeoSeries

EMBEDDING = "embedding"
"""Column of the vectors."""

CHUNK = 1024
"""Pixels on the side of the chunks of a cube in memory."""


def embed_at(
    cube: xr.DataArray | xr.Dataset,
    places: GeoDataFrame | GeoSeries,
    frames: int | None = FRAMES,
    **options: Unpack[EmbedKeywords],
) -> GeoDataFrame:
    """Embed the points and polygons of a table: as :func:`embed`, but only the windows that hold a place.

    A point has the embedding of the cell that contains it. A polygon has the mean over the cells that it covers,
    weighted by the share of each cell. The result is the same as that of :func:`embed` followed by :func:`sample` or
    :func:`zonal`, and at points it has the same bits. ``norm="per_tile_zscore"``, the default, reads the whole cube
    for its statistics; with other normalizations only the chunks that places need are read.

    Parameters
    ----------
    cube, frames, period, ...
        As for :func:`embed`, with all of its options and defaults except `pool`.
    places : GeoDataFrame or GeoSeries
        Points, polygons and multipolygons, in any CRS.

    Returns
    -------
    GeoDataFrame
        The same rows, order, index, columns and CRS, with these additional columns:

        ``embedding``
            Vectors (D,) float32. NaN unless the status is ok or partial. ``numpy.stack(table["embedding"])`` is
            (n, D).
        ``status``
            ``"ok"``; ``"partial"``: part of the polygon is outside the cube; ``"outside"``: all of it is outside, or
            there is no geometry; ``"invalid"``: nothing was observed there.

        ``attrs["embedding"]`` is the record of the embedding as JSON.

    Raises
    ------
    OptionError
        If `places` are neither points nor polygons, have no CRS, cross themselves, or already have columns with these
        names.
    CubeError, CubeTypeError, WeightsError, DeviceError
        As in :func:`embed`; also CubeError if the coordinates of the cube do not define the positions of its pixels.
    AnySatError
        If geopandas is not installed.

    Examples
    --------
    >>> import geopandas, numpy as np, pandas as pd, xarray as xr
    >>> import odc.geo.xr, xr_anysat
    >>> cube = xr.DataArray(
    ...     np.random.default_rng(0).integers(1, 5000, (6, 10, 48, 48), "uint16"),
    ...     dims=("time", "band", "y", "x"),
    ...     coords={
    ...         "time": pd.date_range("2022-01-15", periods=6, freq="2MS"), "band": list(xr_anysat.BANDS),
    ...         "y": 4_999_995.0 - 10 * np.arange(48), "x": 600_005.0 + 10 * np.arange(48),
    ...     },
    ... ).odc.assign_crs("EPSG:32632")
    >>> points = geopandas.GeoDataFrame(
    ...     {"name": ["a", "b"]}, geometry=geopandas.points_from_xy([600_100, 0], [4_999_900, 0]), crs="EPSG:32632"
    ... )
    >>> table = cube.anysat.embed_at(points, frames=4, patch_size=40, model="tiny", weights="random")
    >>> table[["name", "status"]]
      name   status
    0    a       ok
    1    b  outside
    >>> table["embedding"][0].shape
    (256,)
    """
    if options.get("pool") is not None:
        raise OptionError(
            f"pool={options['pool']!r} has no meaning in embed_at(), which returns one vector per place: leave it out"
        )
    resolved = resolve_options(cube, EmbedOptions(frames, **options))
    frame = as_geodataframe(places, "places", "embed_at()")
    check_new_columns(frame, [EMBEDDING, STATUS], "places")
    grid = require_grid(_empty_output(resolved), "embed_at()")
    shapes = in_grid_units(grid, in_crs_of(grid, frame.geometry, (*POINTS, *POLYGONS), "places"))
    emb = lazy_embedding(cube, resolved, shapes)
    vectors, _, _, status = zone_means(emb, shapes)
    return joined(frame, with_vectors(frame.index, vectors, status), emb.attrs)


_cube, *_options = inspect.signature(embed).parameters.values()

_own = inspect.signature(embed_at)

embed_at.__signature__ = _own.replace(  # type: ignore[attr-defined]
    parameters=[_cube, _own.parameters["places"], *(p for p in _options if p.name not in ("by", "pool"))]
)


def lazy_embedding(
    cube: xr.DataArray | xr.Dataset, resolved: ResolvedOptions, shapes: Sequence[Any]
) -> xr.DataArray:
    """Return the embedding (D, y, x) of a cube, with NaN outside of the windows that `shapes` need. Always lazy.

    `shapes` are in units of the cells of the embedding.
    """
    canonical = resolved.canonical
    if canonical.array.chunks is None:
        chunked = canonical.array.chunk({"y": CHUNK, "x": CHUNK})
        resolved = replace(resolved, canonical=replace(canonical, array=chunked))
    return embed_resolved(cube, resolved, squares_of(resolved, shapes))


def squares_of(resolved: ResolvedOptions, shapes: Sequence[Any]) -> Squares:
    """Return the squares whose cells places cover; places are in units of the cells of the embedding."""
    stride, cell = resolved.settings.stride, resolved.settings.cell
    rows, cols = resolved.rows.grid(stride), resolved.cols.grid(stride)
    needed = np.zeros((rows.size, cols.size), bool)
    first_row, height = resolved.rows.covering_cells(cell)
    first_col, width = resolved.cols.covering_cells(cell)
    for (top, left), numbers in blocks_met(shapes, (height, width)).items():
        for number in numbers:
            block = min(BLOCK, height - top), min(BLOCK, width - left)
            i, j = np.nonzero(cell_shares(shapes[number], top, left, block))
            needed[
                (first_row + top + i) * cell // stride - rows.start,
                (first_col + left + j) * cell // stride - cols.start,
            ] = True
    return Squares(rows, cols, needed)


def with_vectors(index: pd.Index, vectors: np.ndarray, status: np.ndarray) -> pd.DataFrame:
    """Return the additional columns of a table of embeddings, from vectors (n, D)."""
    column = np.empty(len(vectors), object)
    column[:] = list(vectors)
    return pd.DataFrame({EMBEDDING: column, STATUS: status}, index)


def _empty_output(resolved: ResolvedOptions) -> xr.DataArray:
    """Return an array with the coordinates of the embedding, and no data."""
    values = np.broadcast_to(np.float32(np.nan), resolved.shape)
    return xr.DataArray(values, dims=("D", "y", "x"), coords=resolved.coords)

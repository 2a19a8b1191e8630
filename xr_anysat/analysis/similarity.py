"""Cosine similarity to a reference vector, and cosine change between two cubes."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from xr_anysat.analysis.cells import map_cells, padded_matmul, wrap_on_grid
from xr_anysat.analysis.vector import mean_embedding
from xr_anysat.errors import OptionError
from xr_anysat.record import check_comparable, comparability_record
from xr_anysat.series import check_embeddings, is_series, periods_of
from xr_anysat.shared.checks import check_embedding, import_optional
from xr_anysat.shared.grid import check_same_grid
from xr_anysat.shared.serialization import TEXT, read_value


def similarity(emb: xr.DataArray, to: Any) -> xr.DataArray:
    """Cosine similarity of each cell to a place, or to any vector.

    Parameters
    ----------
    emb : DataArray, (D, y, x) or (time, D, y, x)
        Output of :func:`xr_anysat.embed`. In a series, `to` is a vector, such as that of a place in one step.
    to : (x, y), shapely geometry, GeoSeries, GeoDataFrame, or (D,) array
        The reference. One of:

        - a tuple (x, y) in the cube's CRS: the cell that contains this point,
        - a point or polygon of shapely in the cube's CRS, or a GeoSeries or GeoDataFrame in any CRS: the mean of the
          cells that contain the points, each counted once, or over the area of the polygons,
        - a vector (D,), such as ``emb.anysat.pool()``.

    Returns
    -------
    DataArray, (y, x) float32
        From -1 to 1; NaN where nothing was observed. Lazy if `emb` is, but if `to` is a place, the chunks that contain
        it are computed immediately.

    Raises
    ------
    CubeTypeError
        If `emb` is not an embedding cube.
    CubeError
        If its coordinates do not define the positions of its cells.
    OptionError
        If `to` is something else, is outside the cube, or is a place without observations.
    AnySatError
        If geopandas is not installed, and `to` is a place.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> import xr_anysat
    >>> emb = xr.DataArray([[[1.0, 3.0, 0.0]], [[0.0, 4.0, -2.0]]], dims=("D", "y", "x"))
    >>> emb.anysat.similarity(np.array([2.0, 0.0])).values
    array([[1. , 0.6, 0. ]], dtype=float32)
    """
    check_embeddings(emb, "similarity((x, y))")
    vector, description = _reference(emb, to)
    cosines = map_cells(partial(_cosine, vector=vector), emb, rows=1, dtype=np.float32, missing=np.nan)
    attrs = {"long_name": "cosine similarity", "units": "1", "to": description}
    return wrap_on_grid(emb, cosines[0], "similarity", attrs)


def change(emb: xr.DataArray, other: xr.DataArray | None = None) -> xr.DataArray:
    """Cosine change between two periods: 1 minus the cosine similarity of the embeddings of each cell.

    Without `other`, the change of a series from each step to the next.

    The cubes must have the same grid, weights and settings; only the period may differ. Cubes with
    ``norm="per_tile_zscore"`` are refused, because each was normalized by its own statistics. Use
    ``"pastis"``, or one saved :func:`xr_anysat.statistics`, for both.

    Parameters
    ----------
    emb, other : DataArray, (D, y, x)
        Outputs of :func:`xr_anysat.embed` for two periods. Or `emb` is a series (time, D, y, x) of at least two steps,
        without `other`.

    Returns
    -------
    DataArray, (y, x) float32, or (time, y, x) of a series
        From 0 (same direction) to 2; NaN where either cube has no observations. Lazy if either cube is. ``time`` is
        that of the later step.

    Raises
    ------
    CubeTypeError
        If `emb` or `other` is not an embedding cube.
    CubeError
        If their grids, weights, statistics or settings differ. The message names the difference.

    Examples
    --------
    >>> import xarray as xr
    >>> import xr_anysat
    >>> before = xr.DataArray([[[1.0, 3.0]], [[0.0, 4.0]]], dims=("D", "y", "x"))
    >>> after = xr.DataArray([[[2.0, -4.0]], [[0.0, 3.0]]], dims=("D", "y", "x"))
    >>> before.anysat.change(after).values
    array([[0., 1.]], dtype=float32)
    """
    if is_series(emb):
        return _change_of_series(emb, other)
    for each in (emb, other):
        check_embedding(each, "change(other)")
    assert other is not None
    check_same_grid(emb, other, "change()")
    own, others = (
        {**comparability_record(each), "anchor": read_value(each.attrs.get("anchor"), TEXT)}
        for each in (emb, other)
    )
    check_comparable(own, others, "change()", "in the other")
    distance = map_cells(_cosine_change, emb, other, rows=1, dtype=np.float32, missing=np.nan)
    attrs = {
        "long_name": "cosine change",
        "units": "1",
        "periods": [
            str(read_value(each.attrs.get("temporal_window", "not recorded"), TEXT)) for each in (emb, other)
        ],
    }
    return wrap_on_grid(emb, distance[0], "change", attrs)


def _change_of_series(emb: xr.DataArray, other: Any) -> xr.DataArray:
    if other is not None or emb.sizes["time"] < 2:
        raise OptionError(
            f"change() of a series of {emb.sizes['time']} steps{'' if other is None else ' and another cube'}: "
            "expected at least two steps, and no other cube; select steps to compare them with another cube, "
            "emb.isel(time=0).anysat.change(other)"
        )
    periods = periods_of(emb)
    later = emb.isel(time=slice(1, None))
    distance = map_cells(
        _cosine_change, emb.isel(time=slice(None, -1)), later, rows=1, dtype=np.float32, missing=np.nan
    )
    attrs = {"long_name": "cosine change from the step before", "units": "1", "periods": periods}
    return wrap_on_grid(later, distance[0], "change", attrs)


def _reference(emb: xr.DataArray, to: Any) -> tuple[np.ndarray, str]:
    """The vector (D,) float64 that cells are compared with, and its description."""
    if is_series(emb) and (isinstance(to, tuple) or hasattr(to, "geom_type")):
        raise OptionError(
            f"to={str(to)[:60]!r} in a series: expected a vector, such as that of the place in one step, "
            "emb.isel(time=0).sel(x=x, y=y, method='nearest').values"
        )
    if isinstance(to, tuple) and len(to) == 2:
        to = import_optional("shapely", "similarity()").Point(to)
    if hasattr(to, "geom_type"):  # both of shapely and of geopandas
        description = str(to) if isinstance(to.geom_type, str) else f"{len(to)} places"
        return mean_embedding(emb, to, "similarity()"), description
    vector = np.asarray(to, float) if isinstance(to, np.ndarray | xr.DataArray | list) else np.empty(0)
    if vector.shape != (emb.sizes["D"],) or not np.isfinite(vector).all() or not vector.any():
        raise OptionError(
            f"to={str(to)[:60]!r}: expected a vector of {emb.sizes['D']} finite numbers that are not all 0, a point "
            "(x, y), a point or polygon of shapely, or a GeoSeries"
        )
    return vector, "a vector"


def _cosine(batch: np.ndarray, *, vector: np.ndarray) -> np.ndarray:
    length = np.sqrt(np.square(batch).sum(0) * np.square(vector).sum())
    with np.errstate(invalid="ignore"):  # a zero vector has no direction
        return np.clip(padded_matmul(vector[None], batch) / length, -1, 1)


def _cosine_change(batch: np.ndarray, other: np.ndarray) -> np.ndarray:
    length = np.sqrt(np.square(batch).sum(0) * np.square(other).sum(0))
    with np.errstate(invalid="ignore"):
        return 1 - np.clip((batch * other).sum(0) / length, -1, 1)[None]

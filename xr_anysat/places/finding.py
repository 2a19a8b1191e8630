"""`nearest`: the cells or rows most like examples, exact and in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from xr_anysat.analysis.cells import BATCH, in_batches, padded_matmul
from xr_anysat.analysis.sampling import first_cells
from xr_anysat.analysis.vector import OK, POINTS, POLYGONS, STATUS, in_crs_of, zone_means
from xr_anysat.analysis.zones import in_grid_units
from xr_anysat.errors import OptionError
from xr_anysat.places.on_cube import EMBEDDING
from xr_anysat.places.table import ROW, open_parts, stored_table
from xr_anysat.record import check_comparable, comparability_of
from xr_anysat.shared.checks import check_embedding, import_optional
from xr_anysat.shared.grid import require_grid
from xr_anysat.shared.serialization import parse_json
from xr_anysat.shared.values import check_whole_number, is_number
from xr_anysat.store.reading import open as open_store

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

SCORE = "score"

MAX_K = 1_000_000
"""Largest number of results: they are kept in memory."""

MAX_CANDIDATES = 20_000_000
"""Largest number of cells to choose from: 24 bytes each."""


def nearest(
    data: Any,
    to: Any,
    k: int = 100,
    *,
    negative: Any = None,
    apart: float | None = None,
    storage_options: dict[str, Any] | None = None,
) -> GeoDataFrame:
    """Find the cells of a cube or the rows of a table that are most like examples.

    The score is the cosine similarity to the example. With several examples it is the mean of the similarities to all
    of them, less the mean of the similarities to the negative ones. The search is exact. A lazy cube or a stored table
    is read block by block, and memory does not grow with its size.

    Parameters
    ----------
    data : DataArray (D, y, x), GeoDataFrame, path or URL
        An embedding cube; a table with a column ``embedding``, as :func:`embed_places` and :func:`embed_at` return it;
        or the path of a store of :func:`to_zarr` or of a table of :func:`embed_places`.
    to : (x, y), geometry, GeoSeries, GeoDataFrame, or array
        The examples. One of:

        - a vector (D,), or vectors (n, D),
        - a table with a column ``embedding``, such as some rows of `data`,
        - for a cube: a tuple (x, y) or a geometry of shapely in its CRS, or a GeoSeries or GeoDataFrame of points and
          polygons in any CRS. A polygon has the mean of the cells that it covers, as in :func:`zonal`.
    k : int, default 100
        Number of results. There are fewer if there are not as many cells or rows.
    negative : optional
        Examples that results should be unlike, in the same forms.
    apart : float, optional
        Least distance between two results, meters. Results are taken in the order of their scores, and those that are
        closer to an earlier one are left out.
    storage_options : dict, optional
        Options for the file system of a URL.

    Returns
    -------
    GeoDataFrame
        Sorted by ``score``, the largest first; results with equal scores are in the order of rows and columns of the
        cube, or of the rows of the table. For a cube: the centers of the cells, in its CRS. For a table: its rows with
        all columns. The examples themselves are found, too.

    Raises
    ------
    OptionError
        If `to` or `negative` is something else, has other channels, is outside the cube or was not observed there; or
        an option is impossible.
    CubeError
        If the examples have another record than `data`: other weights, statistics or settings.
    CubeTypeError, StoreError
        If `data` is no embedding cube, or is damaged.
    AnySatError
        If geopandas is not installed.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> import odc.geo.xr, xr_anysat
    >>> emb = xr.DataArray(
    ...     np.array([[[1.0, 3.0], [0.0, -1.0]], [[0.0, 4.0], [-2.0, 0.0]]], "float32"), dims=("D", "y", "x"),
    ...     coords={"y": [15.0, 5.0], "x": [5.0, 15.0]},
    ... ).odc.assign_crs("EPSG:32632")
    >>> emb.anysat.nearest(np.array([1.0, 0.0]), k=2)
       score      geometry
    0    1.0   POINT (5 15)
    1    0.6  POINT (15 15)
    """
    import_optional("geopandas", "nearest()")
    k = check_whole_number("k", k, 1, MAX_K)
    if apart is not None and not (is_number(apart) and apart > 0):
        raise OptionError(f"{apart=}: expected meters, more than 0, or None")
    if isinstance(data, xr.DataArray | xr.Dataset):
        return _nearest_cells(data, to, k, negative, apart)
    if isinstance(data, pd.DataFrame):
        if EMBEDDING not in data.columns:
            raise OptionError(
                f"data has columns {list(data.columns)[:8]}: expected a column {EMBEDDING!r}, as "
                "xr_anysat.embed_places(...) and cube.anysat.embed_at(...) return it"
            )
        return _nearest_rows([data], data.attrs, to, k, negative, apart)
    table = stored_table(data, storage_options)
    if table is None:
        return _nearest_cells(open_store(data, storage_options=storage_options), to, k, negative, apart)
    parts, attrs = open_parts(*table)
    return _nearest_rows(parts, attrs, to, k, negative, apart)


# ---------------------------------------------------------------------- cubes


def _nearest_cells(emb: Any, to: Any, k: int, negative: Any, apart: float | None) -> GeoDataFrame:
    import geopandas

    check_embedding(emb, "nearest(to)")
    geobox = require_grid(emb, "nearest()")
    direction = _direction(partial(_examples_on, emb), to, negative, emb.sizes["D"], emb.attrs)
    cells = emb.sizes["y"] * emb.sizes["x"]
    count = min(k, cells)
    if apart is not None:
        # a result leaves out at most the cells of the square around it
        reach = [int(apart // abs(step)) for step in (geobox.affine.a, geobox.affine.e)]
        count = min(cells, k * (2 * reach[0] + 1) * (2 * reach[1] + 1))
        if count > MAX_CANDIDATES:
            raise OptionError(
                f"{apart=} and {k=}: up to {count} cells would have to be compared, expected at most {MAX_CANDIDATES}. "
                "Pass a smaller apart= or k=, or coarser cells"
            )
    keys, rows, cols, _ = first_cells(emb, partial(_keys, direction=direction), count, values=False)
    found = np.isfinite(keys)
    keys, rows, cols = keys[found], rows[found], cols[found]
    a = geobox.affine
    x, y = a.c + a.a * (cols + 0.5), a.f + a.e * (rows + 0.5)
    if apart is not None:
        kept = _apart(x, y, k, apart, None)
        keys, x, y = keys[kept], x[kept], y[kept]
    crs = None if geobox.crs is None else geobox.crs.proj
    return geopandas.GeoDataFrame({SCORE: -keys}, geometry=geopandas.points_from_xy(x, y), crs=crs)


def _keys(block: np.ndarray, rows: np.ndarray, cols: np.ndarray, *, direction: np.ndarray) -> np.ndarray:
    """Return the negative scores (h, w) of a block (D, h, w), infinite where there is none."""
    flat = block.reshape(block.shape[0], -1)
    keys: np.ndarray = -_scores(flat, direction).reshape(block.shape[1:])
    return keys


def _scores(values: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Return the scores (n,) of vectors (D, n); minus infinity without a direction."""
    function = partial(_score, direction=direction)
    return in_batches(function, values, rows=1, dtype=np.float64, missing=-np.inf)[0]


def _score(batch: np.ndarray, *, direction: np.ndarray) -> np.ndarray:
    length = np.sqrt(np.square(batch).sum(0))
    usable = length > 0  # a zero vector has no direction
    return np.where(usable, padded_matmul(direction[None], batch) / np.where(usable, length, 1), -np.inf)


def _examples_on(emb: xr.DataArray, given: Any, name: str) -> np.ndarray | None:
    """Return the vectors (n, D) of places on a cube; None if `given` are no places."""
    geopandas = import_optional("geopandas", "nearest()")
    geobox = require_grid(emb, "nearest()")
    crs = None if geobox.crs is None else geobox.crs.proj
    if isinstance(given, tuple) and len(given) == 2 and all(map(is_number, given)):
        given = geopandas.GeoSeries(geopandas.points_from_xy([given[0]], [given[1]]), crs=crs)
    elif isinstance(getattr(given, "geom_type", None), str):
        given = geopandas.GeoSeries([given], crs=crs)
    if not isinstance(given, geopandas.GeoSeries | geopandas.GeoDataFrame):
        return None
    shapes = in_grid_units(geobox, in_crs_of(geobox, given.geometry, (*POINTS, *POLYGONS), name))
    vectors, _, _, status = zone_means(emb, shapes)
    bad = {state: int((status == state).sum()) for state in ("outside", "invalid")}
    if any(bad.values()):
        extent = ", ".join(f"{v:.9g}" for v in geobox.boundingbox.bbox)
        raise OptionError(
            f"{name}: of {len(status)} places, {bad['outside']} are outside the cube and nothing was observed at "
            f"{bad['invalid']}; expected places within the cube, (left, bottom, right, top) = ({extent}) in its CRS, "
            "that were observed"
        )
    return vectors


# ---------------------------------------------------------------------- tables


def _nearest_rows(
    parts: Any, attrs: Any, to: Any, k: int, negative: Any, apart: float | None
) -> GeoDataFrame:
    """Search tables one after the other; `parts` can be iterated repeatedly."""
    record = attrs.get(EMBEDDING)
    channels = None
    direction = None
    count = k if apart is None else 16 * k
    while True:
        best: GeoDataFrame | None = None
        rows = 0
        for part in parts:
            vectors = np.stack(part[EMBEDDING]) if len(part) else np.empty((0, channels or 0), np.float32)
            if direction is None:
                channels = vectors.shape[1]
                direction = _direction(
                    _no_places, to, negative, channels, {} if record is None else parse_json(record)
                )
            scores = np.concatenate(
                [np.empty(0), *(_scores(batch.T, direction) for batch in _pieces(vectors))]
            )
            kept = np.nonzero(scores > -np.inf)[0]
            rows += len(kept)
            found = part.iloc[kept].assign(**{SCORE: scores[kept]})
            if ROW not in found.columns:
                found = found.assign(**{ROW: kept})
            best = found if best is None else pd.concat([best, found])
            best = best.sort_values([SCORE, ROW], ascending=[False, True], kind="stable").head(count)
        assert best is not None  # a table has at least one part
        if apart is None:
            break
        center = best.geometry.to_crs(4326) if best.crs is not None else best.geometry
        points = center.representative_point()
        chosen = _apart(points.x.to_numpy(), points.y.to_numpy(), k, apart, best.crs)
        if len(chosen) == k or count >= rows:
            best = best.iloc[chosen]
            break
        count *= 4
    best = best.drop(columns=ROW)
    best.attrs = dict(attrs)
    return best


def _pieces(vectors: np.ndarray) -> Iterator[np.ndarray]:
    step = BATCH * 64
    return (vectors[start : start + step] for start in range(0, len(vectors), step))


def _no_places(given: Any, name: str) -> None:
    """Refuse places as examples for a table, which has no map."""
    if isinstance(given, tuple) or hasattr(given, "geom_type"):
        raise OptionError(
            f"{name} is a place, and data is a table: expected rows with a column {EMBEDDING!r}, such as "
            "table.iloc[[0]], or vectors"
        )


# ---------------------------------------------------------------------- both


def _direction(places: Any, to: Any, negative: Any, channels: int, attrs: Any) -> np.ndarray:
    """Return the vector (D,) whose product with a unit vector is its score."""
    direction = _mean_unit(places, to, "to", channels, attrs)
    if negative is not None:
        direction = direction - _mean_unit(places, negative, "negative", channels, attrs)
    return direction


def _mean_unit(places: Any, given: Any, name: str, channels: int, attrs: Any) -> np.ndarray:
    """Return the mean of the unit vectors of examples, (D,) float64."""
    vectors: Any = None
    if isinstance(given, pd.DataFrame) and EMBEDDING in given.columns:
        if given.attrs.get(EMBEDDING):
            own, others = comparability_of(attrs), comparability_of(parse_json(given.attrs[EMBEDDING]))
            if own and others:
                check_comparable(own, others, "nearest()", f"in {name}")
        usable = given[given[STATUS].isin([OK, "partial"])] if STATUS in given.columns else given
        vectors = np.stack(usable[EMBEDDING]) if len(usable) else np.empty((0, channels))
    elif isinstance(given, np.ndarray | xr.DataArray | list):
        vectors = np.atleast_2d(np.asarray(given, float))
    else:
        vectors = places(given, name)
    expected = (
        f"expected a place, a table with a column {EMBEDDING!r}, or vectors of {channels} finite numbers"
    )
    if vectors is None:
        raise OptionError(f"{name}={str(given)[:60]!r}: {expected}")
    vectors = np.asarray(vectors, np.float64)
    if (
        vectors.ndim != 2
        or not len(vectors)
        or vectors.shape[1] != channels
        or not np.isfinite(vectors).all()
    ):
        raise OptionError(f"{name} has the shape {vectors.shape}, or values that are not finite: {expected}")
    length = np.sqrt(np.square(vectors).sum(1, keepdims=True))
    if not length.all():
        raise OptionError(f"{name} contains a vector of zeros, which has no direction: {expected}")
    mean: np.ndarray = (vectors / length).mean(0)
    return mean


def _apart(x: np.ndarray, y: np.ndarray, k: int, apart: float, crs: Any) -> np.ndarray:
    """Return the numbers of up to `k` positions, taken in order, no two of which are closer than `apart` meters.

    With a `crs`, `x` and `y` are degrees; without one they are meters.
    """
    left = np.arange(len(x))
    chosen: list[int] = []
    while len(left) and len(chosen) < k:
        first = int(left[0])
        chosen.append(first)
        if crs is None:
            distance = np.hypot(x[left] - x[first], y[left] - y[first])
        else:
            from pyproj import Geod

            lons, lats = np.full(len(left), x[first]), np.full(len(left), y[first])
            distance = np.asarray(Geod(ellps="WGS84").inv(lons, lats, x[left], y[left])[2])
        distance[0] = 0
        left = left[distance >= apart]
    return np.array(chosen, int)

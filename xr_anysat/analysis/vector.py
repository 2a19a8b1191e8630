"""Points and polygons on an embedding cube: `sample` and `zonal`.

Geometries may be in any CRS. A point selects the cell that contains it, a polygon the cells whose centers it contains.
Means over polygons are summed in blocks at fixed positions of the cube, in a fixed order, so chunks change no bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from xr_anysat.analysis.cells import observed
from xr_anysat.errors import OptionError
from xr_anysat.shared.checks import check_embedding, import_optional
from xr_anysat.shared.graph import RECHUNK
from xr_anysat.shared.grid import require_grid
from xr_anysat.shared.serialization import json_default

if TYPE_CHECKING:
    from geopandas import GeoDataFrame, GeoSeries
    from odc.geo.geobox import GeoBox

BLOCK = 256
"""Cells on the side of the blocks that are summed one after the other."""

STATUS = "status"

OK = "ok"

POINTS, POLYGONS = ("Point",), ("Polygon", "MultiPolygon")


def sample(emb: xr.DataArray, points: GeoDataFrame | GeoSeries) -> GeoDataFrame:
    """Look up the embedding of the cell that contains each point.

    Only the chunks of a lazy cube that contain a point are computed.

    Parameters
    ----------
    emb : DataArray, (D, y, x)
        Output of :func:`xr_anysat.embed`.
    points : GeoDataFrame or GeoSeries
        Points, in any CRS.

    Returns
    -------
    GeoDataFrame
        The same rows, index, columns and CRS, with these additional columns:

        ``emb_000``, ``emb_001``, …
            One column per channel, of the cube's dtype (float32). NaN unless the status is ok.
        ``status``
            ``"ok"``; ``"outside"``: outside the cube, or no geometry; ``"invalid"``: nothing was observed there.

        A point on the edge between two cells belongs to the eastern or southern cell.

    Raises
    ------
    CubeTypeError
        If `emb` is not an embedding cube.
    CubeError
        If the coordinates or the CRS of the cube do not define the positions of its cells.
    OptionError
        If `points` are not points, have no CRS, or already have columns with these names.
    AnySatError
        If geopandas is not installed.

    Examples
    --------
    >>> import geopandas, numpy as np, xarray as xr
    >>> import odc.geo.xr, xr_anysat
    >>> emb = xr.DataArray(
    ...     np.arange(12, dtype="float32").reshape(2, 2, 3), dims=("D", "y", "x"),
    ...     coords={"y": [25.0, 15.0], "x": [5.0, 15.0, 25.0]},
    ... ).odc.assign_crs("EPSG:32632")
    >>> points = geopandas.GeoDataFrame(
    ...     {"name": ["a", "b"]}, geometry=geopandas.points_from_xy([12, 99], [18, 18]), crs="EPSG:32632"
    ... )
    >>> emb.anysat.sample(points)[["name", "emb_000", "emb_001", "status"]]
      name  emb_000  emb_001   status
    0    a      4.0     10.0       ok
    1    b      NaN      NaN  outside
    """
    check_embedding(emb, "sample(points)")
    frame = as_geodataframe(points, "points", "sample()")
    names = _check_new_columns(frame, [*_names(emb), STATUS], "points")
    values, status = values_at(emb, frame.geometry, "sample()")
    added = pd.DataFrame(values, frame.index, names[:-1])
    added[STATUS] = status
    return _joined(frame, added, emb)


def zonal(emb: xr.DataArray, polygons: GeoDataFrame | GeoSeries) -> GeoDataFrame:
    """Average the embeddings of the cells whose centers are in each polygon.

    Only the chunks of a lazy cube that polygons touch are computed, block by block. Polygons may overlap.

    Parameters
    ----------
    emb : DataArray, (D, y, x)
        Output of :func:`xr_anysat.embed`.
    polygons : GeoDataFrame or GeoSeries
        Polygons and multipolygons, in any CRS.

    Returns
    -------
    GeoDataFrame
        The same rows, index, columns and CRS, with these additional columns:

        ``emb_000``, ``emb_001``, …
            One column per channel, float32: the mean over the cells that were observed, or NaN.
        ``cells``
            Number of cells of the cube whose centers are in the polygon or on its border.
        ``valid_share``
            Share of these cells that was observed; NaN if there are no cells.
        ``status``
            ``"ok"``; ``"partial"``: part of the polygon is outside the cube; ``"outside"``: all of it is outside, or
            there is no geometry; ``"empty"``: it contains no cell center; ``"invalid"``: nothing was observed in it.

    Raises
    ------
    CubeTypeError, CubeError, OptionError, AnySatError
        As in :func:`sample`; also OptionError if a polygon crosses itself.

    Examples
    --------
    >>> import geopandas, numpy as np, shapely, xarray as xr
    >>> import odc.geo.xr, xr_anysat
    >>> emb = xr.DataArray(
    ...     np.arange(12, dtype="float32").reshape(2, 2, 3), dims=("D", "y", "x"),
    ...     coords={"y": [25.0, 15.0], "x": [5.0, 15.0, 25.0]},
    ... ).odc.assign_crs("EPSG:32632")
    >>> fields = geopandas.GeoSeries([shapely.box(0, 10, 20, 30), shapely.box(20, 0, 40, 20)], crs="EPSG:32632")
    >>> emb.anysat.zonal(fields)[["emb_000", "emb_001", "cells", "valid_share", "status"]]
       emb_000  emb_001  cells  valid_share   status
    0      2.0      8.0      4          1.0       ok
    1      5.0     11.0      1          1.0  partial
    """
    check_embedding(emb, "zonal(polygons)")
    frame = as_geodataframe(polygons, "polygons", "zonal()")
    names = _check_new_columns(frame, [*_names(emb), "cells", "valid_share", STATUS], "polygons")
    geobox = require_grid(emb, "zonal()")
    shapes = in_crs_of(geobox, frame.geometry, POLYGONS, "polygons")
    sums, cells, valid = zone_sums(emb, geobox, list(shapes))
    with np.errstate(invalid="ignore", divide="ignore"):
        added = pd.DataFrame((sums / valid[:, None]).astype(np.float32), frame.index, names[:-3])
        added["cells"], added["valid_share"] = cells, valid / cells
    import shapely

    extent = shapely.box(*geobox.boundingbox.bbox)
    touching = shapely.intersects(extent, shapes.values)
    beyond = ~shapely.covers(extent, shapes.values)
    added[STATUS] = np.select(
        [~touching, cells == 0, valid == 0, beyond], ["outside", "empty", "invalid", "partial"], OK
    ).astype(object)
    return _joined(frame, added, emb)


def in_crs_of(geobox: GeoBox, given: GeoSeries, kinds: Sequence[str], what: str) -> GeoSeries:
    """Geometries in the CRS of a cube.

    Raises
    ------
    OptionError
        If only one of them has a CRS, or geometries are of other `kinds` or cross themselves.
    """
    given = given.mask(given.is_empty)  # a geometry without points is like a missing one
    valid = given[given.notna()]
    others = sorted(set(valid.geom_type) - set(kinds))
    if others:
        hint = "zonal() takes polygons" if kinds == POINTS else "sample() takes points"
        raise OptionError(f"{what} contain {', '.join(others)}: expected only {' or '.join(kinds)}; {hint}")
    crs = geobox.crs
    if (crs is None) != (given.crs is None):
        if crs is None:
            raise OptionError(
                f"{what} have the CRS {given.crs.name!r}, and the cube has none: assign one, "
                "emb.odc.assign_crs('EPSG:32632')"
            )
        raise OptionError(f"{what} have no CRS: set it, {what}.set_crs('EPSG:4326')")
    if kinds == POLYGONS and not valid.is_valid.all():
        bad = list(valid.index[~valid.is_valid][:3])
        raise OptionError(f"{what} cross themselves at index {bad}: repair them, {what}.make_valid()")
    return given if crs is None else given.to_crs(crs.proj)


def values_at(emb: xr.DataArray, points: GeoSeries, call: str) -> tuple[np.ndarray, np.ndarray]:
    """Return embeddings at points, (n, D), NaN if there is none, and their status (ok, outside, invalid), (n,) str."""
    rows, cols, inside = cells_at(emb, points, call)
    values = np.full((len(points), emb.sizes["D"]), np.nan, emb.dtype)
    values[inside] = vectors(emb, rows[inside], cols[inside])
    seen = observed(values.T)
    values[~seen] = np.nan
    return values, np.select([~inside, ~seen], ["outside", "invalid"], OK).astype(object)


def mean_embedding(emb: xr.DataArray, place: Any, call: str) -> np.ndarray:
    """Return the mean embedding (D,) float64 of the cells that contain points or whose centers are in polygons.

    Each cell counts once.

    Raises
    ------
    OptionError
        If a point is outside the cube, or a point or all polygons together were not observed.
    """
    geopandas = import_optional("geopandas", call)
    geobox = require_grid(emb, call)
    if isinstance(place.geom_type, str):
        crs = None if geobox.crs is None else geobox.crs.proj
        place = geopandas.GeoSeries([place], crs=crs)
    shapes = as_geodataframe(place, "to", call).geometry
    extent = ", ".join(f"{v:.9g}" for v in geobox.boundingbox.bbox)
    remedy = f"expected places within the cube, (left, bottom, right, top) = ({extent}) in its CRS, that were observed"
    if (shapes.geom_type == "Point").any():
        rows, cols, inside = cells_at(emb, shapes, call)
        if not inside.all():
            raise OptionError(
                f"to: {int((~inside).sum())} of {len(shapes)} points are outside the cube; {remedy}"
            )
        found = vectors(emb, *np.unique([rows, cols], axis=1)).astype(np.float64)
        seen = observed(found.T)
        if not seen.all():
            raise OptionError(
                f"to: nothing was observed at {int((~seen).sum())} of {len(shapes)} points; {remedy}"
            )
        return found.sum(0) / len(found)
    shapes = in_crs_of(geobox, shapes, POLYGONS, "to")
    sums, cells, valid = zone_sums(emb, geobox, [shapes.union_all()])
    if not valid[0]:
        reason = (
            f"nothing was observed in its {cells[0]} cells"
            if cells[0]
            else "it contains no cell center of the cube"
        )
        raise OptionError(f"to: {reason}; {remedy}")
    return sums[0] / valid[0]


def cells_at(emb: xr.DataArray, points: GeoSeries, call: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row and column of the cell that contains each point, and whether it is in the cube; all (n,)."""
    geobox = require_grid(emb, call)
    points = in_crs_of(geobox, points, POINTS, "points")
    a = geobox.affine
    place = [(points.y.values - a.f) / a.e, (points.x.values - a.c) / a.a]
    sizes = (emb.sizes["y"], emb.sizes["x"])
    inside = np.logical_and.reduce([(at >= 0) & (at < n) for at, n in zip(place, sizes, strict=True)])
    rows, cols = (np.floor(np.where(inside, at, 0)).astype(int) for at in place)
    return rows, cols, inside


def vectors(emb: xr.DataArray, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """The embeddings (n, D) of cells. For a lazy cube, the chunks that contain them are computed."""
    picked = emb.variable.isel(y=xr.Variable("cell", rows), x=xr.Variable("cell", cols))
    # the rounding of sums depends on the memory layout
    return np.ascontiguousarray(picked.transpose("cell", "D").values)


# ---------------------------------------------------------------------- zones


def zone_sums(
    emb: xr.DataArray, geobox: GeoBox, shapes: Sequence[Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums (n, D) float64 over polygons, how many cells each has, and how many of them were observed, (n,) int."""
    ys, xs = (geobox.coords[name].values for name in geobox.dimensions)
    met = _blocks_met(geobox, shapes)
    blocks = [(slice(i, i + BLOCK), slice(j, j + BLOCK)) for i, j in met]
    within = [[shapes[n] for n in numbers] for numbers in met.values()]
    places = [(ys[y], xs[x]) for y, x in blocks]
    if emb.chunks is None:
        made = [
            _block_sums(emb.data[:, y, x], *place, those)
            for (y, x), place, those in zip(blocks, places, within, strict=True)
        ]
    else:
        import dask

        parts = emb.data.rechunk((-1, BLOCK, BLOCK), method=RECHUNK).to_delayed()
        block_sums = dask.delayed(_block_sums)  # type: ignore[attr-defined]
        made = dask.compute(  # type: ignore[attr-defined]
            [
                block_sums(parts[0, i // BLOCK, j // BLOCK], *place, those)
                for (i, j), place, those in zip(met, places, within, strict=True)
            ]
        )[0]
    sums = np.zeros((len(shapes), emb.sizes["D"]))
    counts = np.zeros((2, len(shapes)), int)
    for numbers, each in zip(met.values(), made, strict=True):  # row by row of blocks
        for number, (total, cells, valid) in zip(numbers, each, strict=True):
            sums[number] += total
            counts[:, number] += cells, valid
    return sums, counts[0], counts[1]


def _blocks_met(geobox: GeoBox, shapes: Sequence[Any]) -> dict[tuple[int, int], list[int]]:
    """Map the blocks that bounding boxes of polygons intersect, by first row and column, to numbers of polygons."""
    a = geobox.affine
    met: dict[tuple[int, int], list[int]] = {}
    for number, shape in enumerate(shapes):
        if shape is None or shape.is_empty:
            continue
        left, bottom, right, top = shape.bounds
        spans = []
        for low, high, size in (
            (*sorted([(bottom - a.f) / a.e, (top - a.f) / a.e]), geobox.shape[0]),
            (*sorted([(left - a.c) / a.a, (right - a.c) / a.a]), geobox.shape[1]),
        ):
            first, last = math.floor(max(low, 0)), math.ceil(min(high, size))
            spans.append(range(first // BLOCK * BLOCK, last, BLOCK))
        for i, j in product(*spans):
            met.setdefault((i, j), []).append(number)
    return dict(sorted(met.items()))


def _block_sums(
    values: np.ndarray, ys: np.ndarray, xs: np.ndarray, shapes: Iterable[Any]
) -> list[tuple[np.ndarray, int, int]]:
    """Sum (D,), cells and observed cells of each polygon in a block (D, h, w) whose centers are at `ys` and `xs`."""
    import shapely

    there = observed(values)
    made = []
    for shape in shapes:
        left, bottom, right, top = shape.bounds
        rows, cols = np.nonzero((bottom <= ys) & (ys <= top))[0], np.nonzero((left <= xs) & (xs <= right))[0]
        shapely.prepare(shape)
        i, j = np.nonzero(shapely.intersects_xy(shape, *np.meshgrid(xs[cols], ys[rows])))
        i, j = rows[i], cols[j]
        seen = there[i, j]
        chosen = np.ascontiguousarray(values[:, i[seen], j[seen]], np.float64)
        made.append((chosen.sum(1), len(i), int(seen.sum())))
    return made


# ---------------------------------------------------------------------- tables


def as_geodataframe(given: Any, what: str, call: str) -> GeoDataFrame:
    """A table with geometries."""
    geopandas = import_optional("geopandas", call)
    if isinstance(given, geopandas.GeoSeries):
        return given.to_frame("geometry" if given.name is None else given.name)
    if not isinstance(given, geopandas.GeoDataFrame) or given.active_geometry_name is None:
        raise OptionError(
            f"{what} is a {type(given).__name__}: expected a GeoDataFrame or GeoSeries. From a table with coordinates: "
            "geopandas.GeoDataFrame(table, geometry=geopandas.points_from_xy(table.lon, table.lat), crs='EPSG:4326')"
        )
    return given


def _names(emb: xr.DataArray) -> list[str]:
    """Names of the columns, one per channel."""
    digits = max(3, len(str(emb.sizes["D"] - 1)))
    return [f"emb_{i:0{digits}d}" for i in range(emb.sizes["D"])]


def _check_new_columns(frame: GeoDataFrame, names: list[str], what: str) -> list[str]:
    """Return `names`, if the table has no columns with these names."""
    taken = [name for name in names if name in frame.columns]
    if taken:
        shown = ", ".join(map(repr, taken[:3])) + (", …" if len(taken) > 3 else "")
        raise OptionError(
            f"{what} have columns {shown} already: rename or drop them, {what}.drop(columns=[{taken[0]!r}])"
        )
    return names


def _joined(frame: GeoDataFrame, added: pd.DataFrame, emb: xr.DataArray) -> GeoDataFrame:
    import geopandas

    joined = geopandas.GeoDataFrame(
        pd.concat([frame, added], axis=1), geometry=frame.active_geometry_name, crs=frame.crs
    )
    joined.attrs = {**frame.attrs, "embedding": json.dumps(emb.attrs, default=json_default)}
    return joined

"""Points and polygons on an embedding cube: `sample` and `zonal`.

Geometries may be in any CRS. A point selects the cell that contains it. A polygon is the mean of the cells that it
covers, weighted by the share of each cell (`zones`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from xr_anysat.analysis.cells import observed
from xr_anysat.analysis.zones import in_grid_units, zone_sums
from xr_anysat.errors import OptionError
from xr_anysat.shared.checks import check_embedding, import_optional
from xr_anysat.shared.grid import require_grid
from xr_anysat.shared.serialization import json_default

if TYPE_CHECKING:
    from geopandas import GeoDataFrame, GeoSeries
    from odc.geo.geobox import GeoBox

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
    names = check_new_columns(frame, [*_names(emb), STATUS], "points")
    values, status = values_at(emb, frame.geometry, "sample()")
    added = pd.DataFrame(values, frame.index, names[:-1])
    added[STATUS] = status
    return joined(frame, added, emb.attrs)


def zonal(emb: xr.DataArray, polygons: GeoDataFrame | GeoSeries) -> GeoDataFrame:
    """Average the embeddings over each polygon, weighted by the share of each cell that the polygon covers.

    The shares are exact, so a polygon that is smaller than a cell has the embedding of its cell. Polygons may overlap,
    and may have holes and several parts. Only the chunks of a lazy cube that polygons meet are computed, block by
    block.

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
            One column per channel, float32: the mean over what was observed, or NaN.
        ``cells``
            Area of the polygon within the cube, in cells (float64).
        ``valid_share``
            Share of this area that was observed; NaN if the area is 0.
        ``status``
            ``"ok"``; ``"partial"``: part of the polygon is outside the cube; ``"outside"``: all of it is outside, or
            there is no geometry; ``"invalid"``: nothing was observed in it.

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
    >>> fields = geopandas.GeoSeries([shapely.box(5, 10, 20, 20), shapely.box(20, 0, 40, 20)], crs="EPSG:32632")
    >>> emb.anysat.zonal(fields)[["emb_000", "emb_001", "cells", "valid_share", "status"]].round(2)
       emb_000  emb_001  cells  valid_share   status
    0     3.67     9.67    1.5          1.0       ok
    1     5.00    11.00    1.0          1.0  partial
    """
    check_embedding(emb, "zonal(polygons)")
    frame = as_geodataframe(polygons, "polygons", "zonal()")
    names = check_new_columns(frame, [*_names(emb), "cells", "valid_share", STATUS], "polygons")
    geobox = require_grid(emb, "zonal()")
    shapes = in_grid_units(geobox, in_crs_of(geobox, frame.geometry, POLYGONS, "polygons"))
    means, cells, share, status = zone_means(emb, shapes)
    added = pd.DataFrame(means, frame.index, names[:-3])
    added["cells"], added["valid_share"], added[STATUS] = cells, share, status
    return joined(frame, added, emb.attrs)


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
        hint = {POINTS: "; zonal() takes polygons", POLYGONS: "; sample() takes points"}.get(tuple(kinds), "")
        raise OptionError(f"{what} contain {', '.join(others)}: expected only {' or '.join(kinds)}{hint}")
    crs = geobox.crs
    if (crs is None) != (given.crs is None):
        if crs is None:
            raise OptionError(
                f"{what} have the CRS {given.crs.name!r}, and the cube has none: assign one, "
                "emb.odc.assign_crs('EPSG:32632')"
            )
        raise OptionError(f"{what} have no CRS: set it, {what}.set_crs('EPSG:4326')")
    crossing = ~valid.is_valid & valid.geom_type.isin(POLYGONS)
    if crossing.any():
        bad = list(valid.index[crossing][:3])
        raise OptionError(f"{what} cross themselves at index {bad}: repair them, {what}.make_valid()")
    return given if crs is None else given.to_crs(crs.proj)


def zone_means(
    emb: xr.DataArray, places: Sequence[Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Average embeddings over places in units of the grid.

    Returns
    -------
    means : ndarray, (n, D) float32
        NaN where nothing was observed. At a point, the embedding of its cell, to the last bit.
    cells, valid_share : ndarray, (n,) float64
    status : ndarray, (n,) object
        As in :func:`zonal`.
    """
    import shapely

    sums, cells, valid = zone_sums(emb, places)
    with np.errstate(invalid="ignore", divide="ignore"):
        means, share = (sums / valid[:, None]).astype(np.float32), valid / cells
    beyond = ~shapely.covers(shapely.box(0, 0, emb.sizes["x"], emb.sizes["y"]), np.array(places, object))
    status = np.select([cells == 0, valid == 0, beyond], ["outside", "invalid", "partial"], OK)
    return means, cells, share, status.astype(object)


def values_at(emb: xr.DataArray, points: GeoSeries, call: str) -> tuple[np.ndarray, np.ndarray]:
    """Return embeddings at points, (n, D), NaN if there is none, and their status (ok, outside, invalid), (n,) str."""
    rows, cols, inside = cells_at(emb, points, call)
    values = np.full((len(points), emb.sizes["D"]), np.nan, emb.dtype)
    values[inside] = vectors(emb, rows[inside], cols[inside])
    seen = observed(values.T)
    values[~seen] = np.nan
    return values, np.select([~inside, ~seen], ["outside", "invalid"], OK).astype(object)


def mean_embedding(emb: xr.DataArray, place: Any, call: str) -> np.ndarray:
    """Return the mean embedding (D,) float64 of the cells that contain points, or over the union of polygons.

    Each cell counts once, at most whole.

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
    union = in_crs_of(geobox, shapes, POLYGONS, "to").union_all()
    sums, cells, valid = zone_sums(emb, in_grid_units(geobox, geopandas.GeoSeries([union])))
    if not valid[0]:
        reason = f"nothing was observed in its {cells[0]:.3g} cells" if cells[0] else "it is outside the cube"
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


def check_new_columns(frame: GeoDataFrame, names: list[str], what: str) -> list[str]:
    """Return `names`, if the table has no columns with these names."""
    taken = [name for name in names if name in frame.columns]
    if taken:
        shown = ", ".join(map(repr, taken[:3])) + (", …" if len(taken) > 3 else "")
        raise OptionError(
            f"columns {shown} of {what} are names of results: rename or drop them, {what}.drop(columns=[{taken[0]!r}])"
        )
    return names


def joined(frame: GeoDataFrame, added: pd.DataFrame, attrs: Mapping[Any, Any]) -> GeoDataFrame:
    """Return a table with additional columns, and the attributes of the embedding as its record."""
    import geopandas

    joined = geopandas.GeoDataFrame(
        pd.concat([frame, added], axis=1), geometry=frame.active_geometry_name, crs=frame.crs
    )
    joined.attrs = {**frame.attrs, "embedding": json.dumps(attrs, default=json_default)}
    return joined

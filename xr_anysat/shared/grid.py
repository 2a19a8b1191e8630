"""Geoboxes, transforms and names of coordinate reference systems."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from xr_anysat.errors import CubeError

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox


def check_same_grid(emb: xr.DataArray, other: xr.DataArray, call: str) -> None:
    """Refuse cubes on different grids.

    Raises
    ------
    CubeError
        With all differences.
    """
    grids = [grid_of(each) for each in (emb, other)]
    crs = [None if geobox is None else geobox.crs for geobox in grids]
    differs = []
    if emb.shape != other.shape:
        differs.append(f"(D, y, x) is {emb.shape} here and {other.shape} in the other")
    else:
        for dim in ("y", "x"):
            here, other_values = (each[dim].values if dim in each.coords else None for each in (emb, other))
            if (here is None) != (other_values is None):
                differs.append(f"only one has {dim!r} coordinates")
            elif here is not None and other_values is not None and not _same_coordinates(here, other_values):
                differs.append(
                    f"{dim!r} is from {here[0]} to {here[-1]} here and from {other_values[0]} to {other_values[-1]} in "
                    "the other"
                )
        if not differs and crs[0] != crs[1]:
            differs.append(f"the CRS is {crs_name(crs[0])} here and {crs_name(crs[1])} in the other")
    if differs:
        raise CubeError(
            f"{call}: the cubes are not on the same grid: {'; '.join(differs)}. Select the area that they share, "
            "emb.sel(y=slice(top, bottom), x=slice(left, right)), or embed cubes on the same grid"
        )


def _same_coordinates(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether coordinates are equal to a thousandth of a cell."""
    if a.dtype.kind not in "iuf" or b.dtype.kind not in "iuf":
        return bool((a == b).all())
    step = abs(float(a[1]) - float(a[0])) if a.size > 1 else 1.0
    return bool(np.abs(a.astype(float) - b.astype(float)).max(initial=0) <= 1e-3 * step)


def grid_of(array: xr.DataArray) -> GeoBox | None:
    """Return the grid of a cube, with or without a CRS; None if its coordinates define no grid."""
    return grid_and_crs(array)[0]


def grid_and_crs(array: xr.DataArray) -> tuple[GeoBox | None, Any]:
    """Return the grid of a cube and its CRS, as odc-geo reads them from coordinates and attributes.

    Raises
    ------
    CubeError
        If odc-geo cannot read them.
    """
    from odc.geo.geobox import GeoBox
    from odc.geo.xr import ODCExtensionDa

    try:
        found = ODCExtensionDa(array)
        geobox = found.geobox
        return geobox if isinstance(geobox, GeoBox) else None, found.crs  # ground control points are no grid
    except Exception as error:  # of odc-geo, pyproj or affine, for attributes of other types than theirs
        raise CubeError(
            f"the grid of the cube cannot be read: {type(error).__name__}: {error}. Its grid mapping (spatial_ref) or "
            "its y and x coordinates are damaged: replace them, as in "
            "cube.drop_vars('spatial_ref').odc.assign_crs('EPSG:32632')"
        ) from error


TRANSFORM = "GeoTransform"
"""attrs key of ``spatial_ref`` where GDAL and rioxarray read the transform."""


def with_transform(emb: xr.DataArray, transform: GeoBox | str | None) -> xr.DataArray:
    """Replace the transform in the ``spatial_ref`` of a cube, if the cube has this coordinate."""
    from odc.geo.xr import xr_coords

    if transform is not None and not isinstance(transform, str):
        reference = xr_coords(transform).get("spatial_ref")
        transform = None if reference is None else reference.attrs[TRANSFORM]
    if transform is None or "spatial_ref" not in emb.coords:
        return emb
    own = emb["spatial_ref"].variable.copy()
    own.attrs[TRANSFORM] = transform
    return emb.assign_coords(spatial_ref=own)


def crs_code(crs: Any) -> str | None:
    """Return the EPSG code of a CRS, such as "EPSG:32631"; None if it has none."""
    code = None if crs is None else crs.to_epsg()
    return None if code is None else f"EPSG:{code}"


def crs_name(crs: Any) -> str | None:
    """Return the identity of a CRS, its EPSG code or its definition, which do not depend on the version of PROJ."""
    return crs_code(crs) or (None if crs is None else str(crs))


def crs_title(crs: Any) -> str:
    """Return a short name of a CRS for people: its EPSG code, or the name in its definition."""
    return crs_code(crs) or str(crs.proj.name)


def require_grid(emb: xr.DataArray, call: str) -> GeoBox:
    """Return the grid of a cube, whose coordinates must define the position of its cells.

    Raises
    ------
    CubeError
        If they do not.
    """
    for dim in ("y", "x"):
        numbers = dim in emb.coords and emb[dim].dtype.kind in "iuf"
        values = emb[dim].values.astype(float) if numbers else np.array([])
        steps = np.diff(values)
        if not values.size or (steps.size and np.abs(steps - steps[0]).max() > 1e-3 * abs(steps[0])):
            what = "are not evenly spaced" if values.size else "are missing or no numbers"
            raise CubeError(
                f"{call}: the {dim!r} coordinates {what}, so the position of the cells is unknown. Crop without gaps, "
                "emb.isel(y=slice(0, 100)), or embed a cube with coordinates"
            )
    geobox = grid_of(emb)
    if geobox is None:
        raise CubeError(
            f"{call}: the coordinates of {emb.sizes['y']} × {emb.sizes['x']} cells do not define the size of a cell, "
            "and 'spatial_ref' has no transform: crop a larger part of the cube, or copy the transform from the "
            "original embedding, emb.assign_coords(spatial_ref=embedding.spatial_ref)"
        )
    return geobox

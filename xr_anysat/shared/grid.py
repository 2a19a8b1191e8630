"""Geoboxes, transforms and names of coordinate reference systems."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from xr_anysat.errors import CubeError

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox


def check_same_grid(emb: xr.DataArray, other: xr.DataArray, call: str) -> None:
    """Refuse cubes whose cells are not the same.

    Raises
    ------
    CubeError
        Naming what differs.
    """
    grids = [grid_of(each) for each in (emb, other)]
    crs = [None if geobox is None else geobox.crs for geobox in grids]
    differs = []
    if emb.shape != other.shape:
        differs.append(f"(D, y, x) {emb.shape} here, {other.shape} in the other")
    else:
        for dim in ("y", "x"):
            here, there = (each[dim].values if dim in each.coords else None for each in (emb, other))
            if (here is None) != (there is None):
                differs.append(f"{dim!r} coordinates of one only")
            elif here is not None and there is not None and not _same_places(here, there):
                differs.append(
                    f"{dim!r} from {here[0]} to {here[-1]} here, {there[0]} to {there[-1]} in the other"
                )
        if not differs and crs[0] != crs[1]:
            differs.append(f"CRS {crs_name(crs[0])} here, {crs_name(crs[1])} in the other")
    if differs:
        raise CubeError(
            f"{call}: the cubes are not on one grid: {'; '.join(differs)}. Select what they share, "
            "emb.sel(y=slice(top, bottom), x=slice(left, right)), or embed cubes of one grid"
        )


def _same_places(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether coordinates are the same but for a thousandth of a cell."""
    if a.dtype.kind not in "iuf" or b.dtype.kind not in "iuf":
        return bool((a == b).all())
    step = abs(float(a[1]) - float(a[0])) if a.size > 1 else 1.0
    return bool(np.abs(a.astype(float) - b.astype(float)).max(initial=0) <= 1e-3 * step)


def grid_of(array: xr.DataArray) -> GeoBox | None:
    """Grid of a cube, with or without a CRS; None where its coordinates are none."""
    import odc.geo.xr  # noqa: F401 (registers .odc)

    geobox: GeoBox | None = array.odc.geobox
    return geobox


TRANSFORM = "GeoTransform"
"""attrs key of ``spatial_ref`` in which GDAL and rioxarray look for the transform."""


def with_transform(emb: xr.DataArray, transform: GeoBox | str | None) -> xr.DataArray:
    """The cube with another transform in its ``spatial_ref``, if there is one to have it."""
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
    """The EPSG code of a CRS, "EPSG:32631"; None if it has none."""
    code = None if crs is None else crs.to_epsg()
    return None if code is None else f"EPSG:{code}"


def crs_name(crs: Any) -> str | None:
    """Identity of a CRS: its EPSG code, or its definition. Independent of how it was given and of PROJ's version."""
    return crs_code(crs) or (None if crs is None else str(crs))


def crs_title(crs: Any) -> str:
    """Short name of a CRS for people: its EPSG code, or the name in its definition."""
    return crs_code(crs) or str(crs.proj.name)


def require_grid(emb: xr.DataArray, call: str) -> GeoBox:
    """The grid of a cube whose coordinates tell where its cells lie.

    Raises
    ------
    CubeError
        If they do not.
    """
    for dim in ("y", "x"):
        values = emb[dim].values.astype(float) if dim in emb.coords else np.array([])
        steps = np.diff(values)
        if not values.size or (steps.size and np.abs(steps - steps[0]).max() > 1e-3 * abs(steps[0])):
            what = "are not evenly spaced" if values.size else "are not there"
            raise CubeError(
                f"{call}: the {dim!r} coordinates {what}, so where its cells lie is not known. Crop without gaps, "
                "emb.isel(y=slice(0, 100)), or embed a cube with coordinates"
            )
    geobox = grid_of(emb)
    if geobox is None:
        raise CubeError(
            f"{call}: coordinates of {emb.sizes['y']} × {emb.sizes['x']} cells, and no transform in 'spatial_ref', do "
            "not tell how large cells are: crop more of the cube, or copy it from the embedding this one was made of, "
            "emb.assign_coords(spatial_ref=embedding.spatial_ref)"
        )
    return geobox

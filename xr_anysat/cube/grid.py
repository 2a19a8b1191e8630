"""The grid of a cube: its CRS, checked coordinates, rows from north to south, and pixels of 10 m."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from xr_anysat.errors import CubeError, warn
from xr_anysat.shared.grid import crs_title, grid_and_crs, grid_of
from xr_anysat.shared.sensor import S2

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox

MAX_STRETCH = 0.05
"""Largest relative difference between a meter of the projection and one on the ground without a warning."""


def check_coordinates(array: xr.DataArray) -> None:
    """Refuse coordinates y and x that are not finite numbers."""
    for dim in ("y", "x"):
        if dim not in array.coords:
            continue
        values = array[dim].values
        remedy = (
            f"assign the centers of the pixels, cube.assign_coords({dim}=...), or drop the coordinates, "
            f"cube.drop_vars({dim!r})"
        )
        if values.dtype.kind not in "iuf":
            raise CubeError(f"{dim!r} coordinates of dtype {values.dtype}: expected numbers; {remedy}")
        wrong = ~np.isfinite(values)
        if wrong.any():
            raise CubeError(
                f"{int(wrong.sum())} of {values.size} {dim!r} coordinates are NaN or infinite: expected finite "
                f"numbers; {remedy}"
            )


def find_crs(obj: xr.DataArray | xr.Dataset, array: xr.DataArray) -> Any:
    """Find the CRS in any of the places where libraries store it; None if there is none."""
    from odc.geo import CRS

    found = grid_and_crs(array)[1]
    if found is not None:
        return found
    places: list[Any] = []
    if isinstance(obj, xr.Dataset):  # openEO: a data variable named by grid_mapping
        for var in obj.data_vars.values():
            mapping = str(var.attrs.get("grid_mapping", var.encoding.get("grid_mapping")))
            if mapping in obj.variables:
                wkt: Mapping[Hashable, Any] = obj[mapping].attrs
                places += [wkt.get("spatial_ref"), wkt.get("crs_wkt")]
    places += [obj.attrs.get("crs"), array.attrs.get("crs")]
    for name in ("proj:epsg", "epsg", "proj:code"):  # stackstac
        if name in obj.coords and obj[name].ndim == 0:
            places.append(obj[name].item())
    for place in places:
        if place is not None and place != "":
            try:
                return CRS(f"EPSG:{place}" if isinstance(place, int) else str(place))
            except Exception as error:
                raise CubeError(
                    f"CRS {place!r} cannot be parsed ({error}): set it with cube.odc.assign_crs('EPSG:32632')"
                ) from error
    return None


_REPROJECT = (
    "AnySat sees pixels of 10 m in a projected CRS: load with odc.stac.load(..., crs='utm', resolution=10), "
    "or reproject with cube.odc.reproject('utm', resolution=10)"
)


def north_up(array: xr.DataArray, crs: Any) -> tuple[xr.DataArray, GeoBox | None]:
    """Sort rows from north to south and columns from west to east, and return the array and its grid."""
    if crs is None:
        if _looks_like_degrees(array):
            y, x = (array[d].values for d in ("y", "x"))
            raise CubeError(
                f"no CRS, and coordinates that look like degrees (y {y[0]:g} to {y[-1]:g}, x {x[0]:g} to {x[-1]:g}). "
                f"{_REPROJECT}"
            )
        return array, None
    name = crs_title(crs)
    if crs.geographic:
        raise CubeError(f"pixels in degrees ({name}). {_REPROJECT}")
    units = {axis.unit_name for axis in crs.proj.axis_info if axis.unit_conversion_factor != 1}
    if units:
        raise CubeError(f"a CRS in {', '.join(sorted(units))} ({name}). {_REPROJECT}")
    for dim in ("y", "x"):
        if dim not in array.coords or array[dim].dtype.kind not in "iuf":
            raise CubeError(
                f"a CRS ({name}) but no {dim!r} coordinates: add them with "
                "cube.assign_coords(y=..., x=...), centers of pixels in meters, or drop the CRS: "
                "cube.drop_vars('spatial_ref')"
            )
    from odc.geo.xr import assign_crs

    known = grid_of(array)  # the only source of a rotation, and of the size of a single pixel
    if known is not None and not known.axis_aligned:
        raise CubeError(f"a rotated grid ({name}): expected rows from west to east. {_REPROJECT}")
    single = S2.pixel_size if known is None else abs(known.resolution.x)
    array = _center_coordinates(assign_crs(array, crs))
    size = []
    for dim, sign in (("y", -1), ("x", 1)):
        steps = np.diff(array[dim].values.astype(float))
        if steps.size and np.ptp(steps) > 1e-3 * S2.pixel_size:
            raise CubeError(f"the {dim!r} coordinates are not evenly spaced. {_REPROJECT}")
        step = float(np.mean(steps)) if steps.size else single * sign
        if step * sign < 0:
            array = array.isel({dim: slice(None, None, -1)})
        size.append(abs(step))
    # at most a tenth of a pixel over the whole cube
    drift = [abs(s - S2.pixel_size) * array.sizes[d] for s, d in zip(size, ("y", "x"), strict=True)]
    if max(drift) > 0.1 * S2.pixel_size:
        raise CubeError(f"pixels of {size[0]:.9g} × {size[1]:.9g} m (y × x). {_REPROJECT}")
    geobox = _exact_geobox(array, crs)
    _check_scale(geobox, name)
    return array, geobox


def _check_scale(geobox: GeoBox, name: Any) -> None:
    """Refuse a place outside of the CRS; warn if a meter of the CRS is not one on the ground, as in Web Mercator."""
    from pyproj import Proj

    assert geobox.crs is not None  # it was created with one
    projection = Proj(geobox.crs.proj)
    left, bottom = geobox.boundingbox.bbox[:2]
    lon, lat = projection(left, bottom, inverse=True)
    if not (np.isfinite(lon) and np.isfinite(lat)):
        raise CubeError(
            f"coordinates near x={left:g}, y={bottom:g} are outside of the CRS ({name}): check the CRS, "
            f"cube.odc.assign_crs('EPSG:...'), and the coordinates. {_REPROJECT}"
        )
    scale = projection.get_factors(lon, lat).areal_scale ** 0.5
    if abs(1 / scale - 1) > MAX_STRETCH:
        warn(
            f"10 m of this CRS ({name}) are {10 / scale:.1f} m on the ground here, but AnySat was trained on pixels "
            f"of 10 m. {_REPROJECT}"
        )


def _center_coordinates(array: xr.DataArray) -> xr.DataArray:
    """Move coordinates to the centers of pixels if stackstac put them at the corners.

    This is its default, ``xy_coords="topleft"``; ``attrs["transform"]`` describes the grid in both cases.
    """
    try:
        a, _, left, _, e, top = (float(v) for v in tuple(array.attrs.get("transform", ()))[:6])
    except (TypeError, ValueError):
        return array
    pixels = [(array["x"].values[0] - left) / S2.pixel_size, (array["y"].values[0] - top) / S2.pixel_size]
    if (abs(a), abs(e)) == (S2.pixel_size, S2.pixel_size) and all(abs(p - round(p)) < 1e-3 for p in pixels):
        return array.assign_coords(x=array["x"] + a / 2, y=array["y"] + e / 2)
    return array


def _exact_geobox(array: xr.DataArray, crs: Any) -> GeoBox:
    """Return the grid of 10 m pixels whose first center is the first coordinate of the array."""
    from affine import Affine
    from odc.geo.geobox import GeoBox

    left = float(array["x"].values[0]) - S2.pixel_size / 2
    top = float(array["y"].values[0]) + S2.pixel_size / 2
    shape = (array.sizes["y"], array.sizes["x"])
    return GeoBox(shape, Affine(S2.pixel_size, 0, left, 0, -S2.pixel_size, top), crs)


def _looks_like_degrees(array: xr.DataArray) -> bool:
    """Return whether a cube without a CRS has coordinates within the range of degrees, less than 0.1 apart."""
    for dim, maximum in (("y", 90.0), ("x", 360.0)):
        if dim not in array.coords or array[dim].dtype.kind != "f" or array.sizes[dim] < 2:
            return False
        values = array[dim].values
        if abs(values).max() > maximum or abs(values[1] - values[0]) >= 0.1:
            return False
    return True

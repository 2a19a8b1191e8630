"""Read Sentinel-2 cubes of odc-stac, stackstac, xee, rioxarray or plain NumPy as one canonical cube.

A canonical cube has the dims ``(time, band, y, x)``, the ten bands in the order of AnySat, sorted times, rows from
north to south, one nodata value, and pixels of 10 m (or no CRS at all).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

import dask.array
import numpy as np
import pandas as pd
import xarray as xr

from xr_anysat.cube.grid import check_coordinates, find_crs, north_up
from xr_anysat.errors import CubeError, CubeTypeError, OptionError, warn
from xr_anysat.shared.sensor import S2
from xr_anysat.shared.values import is_number

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox

MIN_TIME, MAX_TIME = np.datetime64("0001-01-01", "s"), np.datetime64("9999-12-31T23:59:59", "s")
"""First and last time that Python's dates can hold."""

# B2, B02, b02, B02_10m (CDSE), S2-L2A-B02 (openEO): only the number matters
_BAND_NAME = re.compile(r"(?:^|[^A-Z0-9])B0?(\d{1,2}|8A)(?:_\d+M)?$")

DIM_NAMES = {
    "time": ("time", "t"),
    "band": ("band", "bands"),
    "y": ("y", "Y", "latitude", "lat"),
    "x": ("x", "X", "longitude", "lon"),
}

# SCL, SCL_20m (CDSE), S2-L2A-SCL (openEO)
_CLASSIFICATION = re.compile(r"(?:^|[^A-Z0-9])SCL(?:_\d+M)?$")

_NODATA_KEYS = ("nodata", "_FillValue", "missing_value")


@dataclass(frozen=True)
class Cube:
    """A canonical cube.

    Attributes
    ----------
    array : DataArray, (time, band, y, x)
        Digital numbers (reflectance × 10 000) of any integer or float dtype, with the coords ``time``
        and ``band``, and the scalar and spatial coords of the original.
    nodata : float
        Value of missing pixels in addition to NaN; NaN if there is no other.
    geobox : odc.geo.geobox.GeoBox or None
        CRS and pixel grid; None for plain arrays.
    """

    array: xr.DataArray
    nodata: float
    geobox: GeoBox | None


def band_name(name: Hashable) -> str | None:
    """Return AnySat's name of a band for any of its usual names; None for other names.

    Examples
    --------
    >>> [band_name(n) for n in ("B02", "nir08", "B8A_20m", "S2-L2A-B12", "SCL", 1)]
    ['B2', 'B8A', 'B8A', 'B12', None, None]
    """
    text = str(name)
    if text.lower() in S2.common_names:
        return S2.common_names[text.lower()]
    found = _BAND_NAME.search(text.upper())
    canonical = f"B{found[1]}" if found else None
    return canonical if canonical in S2.bands else None


def read_cube(
    obj: xr.DataArray | xr.Dataset, *, bands: Sequence[str] | None = None, nodata: float | None = None
) -> Cube:
    """Read a Sentinel-2 cube of any library as a canonical cube; only metadata are read, never pixels.

    Parameters
    ----------
    obj : DataArray or Dataset
        A DataArray with a band dimension, or a Dataset with one variable per band. A scalar ``time``
        instead of a time dimension means one date.
    bands : sequence of str, optional
        Names of the bands (or of the variables of the Dataset) in their order, if the cube has none.
    nodata : float, optional
        Value of missing pixels. Default: the value in attrs or encoding (``nodata``, ``_FillValue``),
        else 0 for integers and NaN for floats. NaN always means missing.

    Returns
    -------
    Cube

    Raises
    ------
    CubeError
        If bands, dims, times or the grid are missing, ambiguous or impossible.
    CubeTypeError
        If `obj` is not an xarray object.
    """
    if isinstance(obj, xr.Dataset):
        array, nodata = _stack(obj, bands, nodata)
    elif isinstance(obj, xr.DataArray):
        array = _rename_dims(obj)
        array = _select_bands(array, bands)
        nodata = _nodata(array, nodata)
    else:
        raise CubeTypeError(
            f"a {type(obj).__name__}: expected an xarray DataArray (time, band, y, x) or a Dataset with one "
            "variable per band; wrap an array with xarray.DataArray(values, dims=('time', 'band', 'y', 'x'), "
            "coords={'time': dates, 'band': names})"
        )
    if array.dtype.kind not in "iuf":
        raise CubeError(
            f"values of dtype {array.dtype}: expected integers or floats, cast with .astype('float32')"
        )
    array = _sort_times(array)
    check_coordinates(array)
    array, geobox = north_up(array, find_crs(obj, array))
    _warn_unapplied_scale(obj)
    _warn_8bit(array.dtype)
    _warn_unused_classification(obj)
    # coords per band (title, gsd, ...) would be wrong on the result; coords along time alone are kept
    array = array.drop_vars([k for k, c in array.coords.items() if "band" in c.dims and k != "band"])
    return Cube(array, float(nodata), geobox)


def valid_pixels(values: np.ndarray, nodata: float) -> np.ndarray:
    """Return where `values` were observed, per band: neither NaN, nor infinite, nor `nodata`."""
    finite = np.isfinite(values) if values.dtype.kind == "f" else np.ones(values.shape, bool)
    return finite if np.isnan(nodata) else finite & (values != nodata)


def blank_missing(values: np.ndarray, nodata: float) -> np.ndarray:
    """Convert `values` to float32 with NaN where they are missing."""
    return np.where(valid_pixels(values, nodata), values, np.nan).astype(np.float32)


# ---------------------------------------------------------------------- dims, bands, nodata


def _rename_dims(obj: xr.DataArray) -> xr.DataArray:
    """Give dims their canonical names and order; a scalar time becomes a dim."""
    names = {}
    for canonical, known in DIM_NAMES.items():
        found = [d for d in obj.dims if d in known]
        if len(found) > 1:
            raise CubeError(f"dims {found} could all be {canonical!r}: rename them, cube.rename({{...}})")
        if found:
            names[found[0]] = canonical
    missing = [d for d in ("band", "y", "x") if d not in names.values()]
    extra = [d for d in obj.dims if d not in names]
    if missing or extra:
        raise CubeError(
            f"dims {tuple(obj.dims)}: expected (time, band, y, x)"
            + (f"; {', '.join(map(repr, missing))} missing" if missing else "")
            + (f"; {', '.join(map(repr, extra))} not expected" if extra else "")
            + ". Rename or select: cube.rename({'old': 'band'}), cube.isel(extra=0); a Dataset with one variable per "
            "band can be passed as it is"
        )
    array = obj
    for old, new in names.items():
        coordinate = array.coords.get(new)
        if old == new:
            continue
        if coordinate is None:
            array = array.rename({old: new})
        elif coordinate.dims == (old,):  # dim t with dates in the coordinate time
            array = array.swap_dims({old: new})
        else:
            raise CubeError(
                f"both a dim {old!r} and a coordinate {new!r} {coordinate.dims}, so {new!r} is ambiguous: drop the "
                f"coordinate, cube.drop_vars({new!r})"
            )
    if "time" not in array.dims:
        scalar = next((n for n in DIM_NAMES["time"] if n in array.coords), None)
        if scalar is None:
            raise CubeError(
                "no time: AnySat needs the date of every image. Add it with "
                "cube.expand_dims(time=[numpy.datetime64('2022-06-01')])"
            )
        array = array.rename({scalar: "time"} if scalar != "time" else {}).expand_dims("time")
    for dim in ("time", "y", "x"):
        if array.sizes[dim] == 0:
            raise CubeError(f"dims {dict(array.sizes)}: {dim!r} is empty, so nothing can be embedded")
    return array.transpose("time", "band", "y", "x")


def _order_bands(names: Sequence[Hashable], what: str) -> list[int]:
    """Return the positions of the ten bands in `names`."""
    found: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        canonical = band_name(name)
        if canonical is not None:
            found.setdefault(canonical, []).append(i)
    repeated = {b: [str(names[i]) for i in at] for b, at in found.items() if len(at) > 1}
    if repeated:
        raise CubeError(
            f"{what} {repeated} are several of the same band: select one of each, e.g. cube.sel(band=[...])"
        )
    missing = [b for b in S2.bands if b not in found]
    if missing:
        raise CubeError(
            f"{what} {[str(n) for n in names]}: missing {', '.join(missing)}. AnySat needs the ten bands "
            f"{', '.join(S2.bands)} (also as B02, blue, B02_10m, ...): load them, or name them with bands=[...]"
        )
    return [found[b][0] for b in S2.bands]


def _given_names(bands: Sequence[str], count: int, what: str) -> list[str]:
    if isinstance(bands, str):
        raise OptionError(f"{bands=}: expected a list of names, one for each of the {count} {what}")
    names = list(bands)
    if len(names) != count:
        raise OptionError(
            f"bands={names} has {len(names)} names: expected one for each of the {count} {what}"
        )
    return names


def _select_bands(array: xr.DataArray, bands: Sequence[str] | None) -> xr.DataArray:
    count = array.sizes["band"]
    names: list[Any]
    if bands is not None:
        names = _given_names(bands, count, "bands of the cube")
    elif "band" in array.coords:
        names = list(array["band"].values)
    else:
        names = list(range(count))
    if not any(isinstance(n, str) for n in names):
        raise CubeError(
            f"bands without names ({names}): bands are matched by name, never by position. Name them with "
            "bands=['B02', 'B03', ...] in the order of the cube, or with cube.assign_coords(band=[...])"
        )
    order = _order_bands(names, "bands")
    picked = array if order == list(range(count)) else array.isel(band=order)
    return picked.assign_coords(band=list(S2.bands))


def _declared_nodata(var: xr.DataArray) -> float | None:
    # floats with an encoding were decoded: their missing values are NaN already, and the number in the
    # encoding is from before scale and offset
    for store in (var.attrs, {} if var.dtype.kind == "f" else var.encoding):
        for key in _NODATA_KEYS:
            if store.get(key) is not None:
                return _number(key, store[key], "pass the value of missing pixels, e.g. nodata=0")
    return None


def _number(key: str, value: Any, remedy: str) -> float:
    """Return a number of the cube's metadata, which may be a text or an array of one."""
    try:
        return float(np.asarray(value).reshape(-1)[0])
    except (ValueError, TypeError, IndexError, OverflowError) as error:
        raise CubeError(f"{key}={value!r} in the cube's metadata: expected a number; {remedy}") from error


def _nodata(var: xr.DataArray, given: float | str | None) -> float:
    if isinstance(given, str) and given == "nan":  # from a record in JSON
        return float("nan")
    if given is not None:
        if not (is_number(given) or isinstance(given, float | np.floating)):  # NaN and infinity are allowed
            raise OptionError(
                f"nodata={given!r}: expected a number, or None for the value in the cube's metadata"
            )
        return float(given)
    declared = _declared_nodata(var)
    if declared is not None:
        return declared
    return 0.0 if var.dtype.kind in "iu" else float("nan")


def _stack(ds: xr.Dataset, bands: Sequence[str] | None, nodata: float | None) -> tuple[xr.DataArray, float]:
    """Stack the variables of the ten bands, and return the array and its nodata."""
    names: list[Hashable] = list(ds.data_vars)
    cubes = [n for n in names if any(d in DIM_NAMES["band"] for d in ds[n].dims)]
    if bands is None and cubes and not any(map(band_name, names)):
        raise CubeError(
            f"a Dataset of the variables {[str(n) for n in names]}, none of them a band: expected one variable per "
            f"band, or the DataArray itself, dataset[{str(cubes[0])!r}]"
        )
    labels: Sequence[Hashable] = names if bands is None else _given_names(bands, len(names), "variables")
    order = _order_bands(labels, "variables")
    dims = {v for known in DIM_NAMES.values() for v in known}
    picked = []
    for i in order:
        var = ds[names[i]]
        extra = [d for d in var.dims if d not in dims or d in DIM_NAMES["band"]]
        if extra:
            raise CubeError(
                f"variable {names[i]!r} has dims {var.dims}: expected (time, y, x); load all bands on one grid"
            )
        picked.append(var)
    values = [_nodata(v, nodata) for v in picked]
    same = all(v == values[0] or (np.isnan(v) and np.isnan(values[0])) for v in values)
    if not same:  # one array has one nodata: NaN replaces all of them
        picked = [v.where(v != n).astype("float32") for v, n in zip(picked, values, strict=True)]
        values = [float("nan")]
    if len({v.shape for v in picked}) > 1 or len({v.dims for v in picked}) > 1:
        shapes = {str(v.name): dict(v.sizes) for v in picked}
        raise CubeError(
            f"the bands differ in shape: {shapes}. Load them on one 10 m grid, odc.stac.load(..., resolution=10)"
        )
    first = picked[0]
    lazy = any(v.chunks is not None for v in picked)
    stack = dask.array.stack if lazy else np.stack
    array = xr.DataArray(
        stack([v.data for v in picked]), dims=("band", *first.dims), coords={**first.coords, "band": list(S2.bands)},
        name="s2", attrs=ds.attrs,
    )  # fmt: skip
    return _rename_dims(array), values[0]


def _warn_unapplied_scale(obj: xr.DataArray | xr.Dataset) -> None:
    arrays = [obj] if isinstance(obj, xr.DataArray) else [obj[v] for v in obj.data_vars if band_name(v)]
    found = [a.attrs["add_offset"] for a in arrays if a.attrs.get("add_offset") is not None]
    offsets = {_number("add_offset", each, "drop it, cube.attrs.pop('add_offset')") for each in found} - {0.0}
    if offsets:
        warn(
            f"attrs declare add_offset={sorted(offsets)}, which was not applied to the values: if these are "
            f"products of baseline 04.00 or later, subtract {S2.offset} from the digital numbers first"
        )


def _warn_8bit(dtype: np.dtype) -> None:
    if dtype.itemsize == 1:
        warn(
            f"values of dtype {dtype}: expected digital numbers, reflectance × 10 000, which need 16 bits. Values that "
            "were scaled to 8 bits give other embeddings: load the original bands, or undo the scaling. Nothing was "
            "changed"
        )


def _warn_unused_classification(obj: xr.DataArray | xr.Dataset) -> None:
    """Warn about a scene classification beside the bands, because it masks nothing."""
    names: list[Hashable]
    if isinstance(obj, xr.Dataset):
        names = list(obj.data_vars)
    else:
        names = next((list(obj[d].values) for d in DIM_NAMES["band"] if d in obj.coords), [])
    unused = next((n for n in names if _CLASSIFICATION.search(str(n).upper())), None)
    if unused is not None:
        name = repr(str(unused))
        pick, drop = f"cube.sel(band={name})", f"drop_sel(band={name})"
        if isinstance(obj, xr.Dataset):
            pick, drop = f"cube[{name}]", f"drop_vars({name})"
        warn(
            f"the scene classification {name} is not used, so clouds count as observed: mask them first, e.g. "
            f"cube.where(~{pick}.isin([0, 1, 3, 8, 9, 10])).{drop}.anysat.embed(nodata=float('nan')). "
            f"cube.{drop} alone keeps the clouds; xr_anysat.open_s2 masks them"
        )


# ---------------------------------------------------------------------- times


def _sort_times(array: xr.DataArray) -> xr.DataArray:
    if "time" not in array.coords:
        raise CubeError(
            f"the {array.sizes['time']} images have no dates: add them with cube.assign_coords(time=dates)"
        )
    times: np.ndarray = array["time"].values
    if times.dtype.kind in "OUT" and all(isinstance(t, str | date | np.datetime64) for t in times):
        # text that is not a date is left unchanged, and refused below
        with contextlib.suppress(ValueError):
            times = pd.to_datetime(times, format="ISO8601", utc=True).tz_localize(None).to_numpy()
            array = array.assign_coords(time=times)
    if times.dtype.kind != "M":
        raise CubeError(
            f"times of dtype {times.dtype} ({times[:1]}...): expected datetime64 or ISO 8601 text, "
            "cube.assign_coords(time=pandas.to_datetime([...]))"
        )
    if np.isnat(times).any():
        raise CubeError(
            f"{int(np.isnat(times).sum())} of {times.size} times are NaT: drop those images, or assign their dates"
        )
    seconds = times.astype("datetime64[s]")  # nanoseconds cannot be compared with the years 1 and 9999
    if seconds.min() < MIN_TIME or seconds.max() > MAX_TIME:
        raise CubeError(
            f"times from {seconds.min()} to {seconds.max()}: expected dates of Sentinel-2 images, in the years 1 to "
            "9999. The unit may be wrong: cube.assign_coords(time=pandas.to_datetime([...], unit='s'))"
        )
    if (np.diff(times) >= np.timedelta64(0)).all():
        return array
    return array.isel(time=np.argsort(times, kind="stable"))

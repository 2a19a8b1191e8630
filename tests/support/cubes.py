"""One small Sentinel-2 cube in the forms of several libraries, and cubes that must not be read."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, TypeVar

import dask
import dask.array as da
import numpy as np
import pandas as pd
import xarray as xr

import xr_anysat

AnyCube = TypeVar("AnyCube", xr.DataArray, xr.Dataset)

BANDS = ("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12")
PADDED = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
ASSETS = ("blue", "green", "red", "rededge1", "rededge2", "rededge3", "nir", "nir08", "swir16", "swir22")

DATES = ("2022-01-15T10:20:31", "2022-03-01T10:20:29", "2022-07-04T10:30:31")
CRS = "EPSG:32632"
LEFT, TOP = 600_000.0, 5_000_000.0  # m, corner of the first pixel
HEIGHT, WIDTH = 4, 5


def plain(
    dates: Any = DATES, *, height: int = HEIGHT, width: int = WIDTH, dtype: str = "uint16"
) -> xr.DataArray:
    """A NumPy cube without CRS or y, x coordinates; no two of its pixels are alike, and none is zero."""
    shape = (len(dates), 10, height, width)
    numbers = 1 + 7 * np.arange(np.prod(shape)).reshape(shape) % 9973
    return xr.DataArray(
        numbers.astype(dtype),
        dims=("time", "band", "y", "x"),
        coords={"time": pd.to_datetime(list(dates)), "band": list(BANDS)},
    )


def centred(dates: Any = DATES, **options: Any) -> xr.DataArray:
    """The same with the centers of its 10 m pixels."""
    cube = plain(dates, **options)
    height, width = cube.shape[-2:]
    return cube.assign_coords(
        y=TOP - 5 - 10.0 * np.arange(height),
        x=LEFT + 5 + 10.0 * np.arange(width),
    )


def placed(dates: Any = DATES, *, crs: str = CRS, **options: Any) -> xr.DataArray:
    """The same with a CRS."""
    import odc.geo.xr  # noqa: F401

    return centred(dates, **options).odc.assign_crs(crs)


def odc_stac(*, scl: bool = False) -> xr.Dataset:
    """As odc.stac.load has it: a variable an asset, nodata in its attrs, the CRS in spatial_ref."""
    cube = placed()
    ds = xr.Dataset({name: cube.sel(band=b, drop=True) for name, b in zip(ASSETS, BANDS, strict=True)})
    if scl:
        ds["scl"] = xr.full_like(ds["red"], 4, dtype="uint8")
    for name in ds.data_vars:
        ds[name].attrs = {"nodata": 0}
    return ds


def stackstac(*, xy_coords: str = "topleft", where_crs: str = "both") -> xr.DataArray:
    """As stackstac.stack has it: float64 with NaN, many coords, the CRS in attrs and a scalar coord."""
    from affine import Affine

    cube = centred(dtype="float64")
    cube = cube.assign_coords(
        band=list(ASSETS),
        title=("band", [f"{n} - 10m" for n in ASSETS]),
        gsd=("band", [10] * 10),
        common_name=("band", list(ASSETS)),
        id=("time", [f"S2A_{i}" for i in range(cube.sizes["time"])]),
        platform="sentinel-2a",
    )
    if xy_coords == "topleft":
        cube = cube.assign_coords(y=cube["y"] + 5, x=cube["x"] - 5)
    cube.attrs = {"transform": Affine(10, 0, LEFT, 0, -10, TOP), "resolution": 10.0}
    if where_crs in ("both", "attrs"):
        cube.attrs["crs"] = CRS.lower()
    if where_crs in ("both", "coord"):
        cube = cube.assign_coords(epsg=32632)
    if where_crs == "proj:epsg":
        cube = cube.assign_coords({"proj:epsg": 32632})
    return cube


def xee(*, order: tuple[str, str, str] = ("time", "X", "Y")) -> xr.Dataset:
    """As xee's open_dataset has it: variables B2, …, the CRS in attrs; older versions have (time, X, Y)."""
    cube = centred()
    ds = xr.Dataset({b: cube.sel(band=b, drop=True) for b in BANDS}, attrs={"crs": CRS})
    names = {"y": order[-1] if order[-1].lower() == "y" else order[-2]}
    names["x"] = order[-2] if names["y"] == order[-1] else order[-1]
    return ds.rename({k: v for k, v in names.items() if k != v}).transpose(*order)


def openeo() -> xr.Dataset:
    """As openEO's NetCDF has it: dims t, y, x and the CRS in a data variable."""
    cube = centred()
    wkt = placed()["spatial_ref"].attrs["spatial_ref"]
    ds = xr.Dataset({f"S2-L2A-{n}": cube.sel(band=b, drop=True) for n, b in zip(PADDED, BANDS, strict=True)})
    for name in ds.data_vars:
        ds[name].attrs = {"long_name": name, "units": "", "grid_mapping": "crs"}
    ds["S2-L2A-SCL"] = xr.full_like(ds["S2-L2A-B02"], 4)
    ds["crs"] = xr.DataArray(b"", attrs={"crs_wkt": wkt, "spatial_ref": wkt})
    return ds.rename(time="t")


def rioxarray_stack() -> xr.DataArray:
    """Files of rioxarray.open_rasterio, concatenated: bands are numbers, nodata is _FillValue."""
    cube = placed().assign_coords(band=np.arange(1, 11))
    cube.attrs = {"AREA_OR_POINT": "Area", "_FillValue": 0, "scale_factor": 1.0, "add_offset": 0.0}
    return cube


def small_cube(
    *,
    height: int = 30,
    width: int = 26,
    dates: int = 9,
    row: int = 500_003,
    col: int = 60_005,
    gaps: float = 0.2,
    dtype: str = "uint16",
    seed: int = 0,
    crs: str | None = "EPSG:32632",
) -> xr.DataArray:
    """A cube of 2022 at pixel (`row`, `col`) of the CRS lattice, with a share of missing observations."""
    rng = np.random.default_rng(seed)
    values = rng.integers(1, 6000, (dates, 10, height, width))
    hole = rng.random((dates, 1, height, width)) < gaps
    if np.dtype(dtype).kind == "f":
        data = np.where(hole, np.nan, values).astype(dtype)
    else:
        data = np.where(hole, 0, values).astype(dtype)
    days = np.sort(rng.choice(365, dates, replace=False))
    cube = xr.DataArray(
        data,
        dims=("time", "band", "y", "x"),
        coords={
            "time": pd.Timestamp("2022-01-01") + pd.to_timedelta(days, unit="D"),
            "band": list(xr_anysat.BANDS),
        },
    )
    if crs is None:
        return cube
    import odc.geo.xr  # noqa: F401

    cube = cube.assign_coords(y=-10.0 * (row + np.arange(height)) - 5, x=10.0 * (col + np.arange(width)) + 5)
    return cube.odc.assign_crs(crs)


def tile_of_sentinel2(chunks: tuple[int, ...], *, dataset: bool = False) -> xr.DataArray | xr.Dataset:
    """A whole granule, 10 980 × 10 980 pixels and 60 dates, of zeros."""
    import odc.geo.xr  # noqa: F401

    coords = {
        "time": pd.date_range("2022-01-03", periods=60, freq="6D"),
        "y": 5_000_040.0 - 10 * np.arange(10980) - 5,
        "x": 600_000.0 + 10 * np.arange(10980) + 5,
    }
    if dataset:
        band = da.zeros((60, 10980, 10980), chunks=(chunks[0], *chunks[2:]), dtype="uint16")
        bands = dict.fromkeys(xr_anysat.BANDS, (("time", "y", "x"), band))
        return xr.Dataset(bands, coords).odc.assign_crs("EPSG:32632")
    values = da.zeros((60, 10, 10980, 10980), chunks=chunks, dtype="uint16")
    cube = xr.DataArray(values, dims=("time", "band", "y", "x"), coords=coords)
    return cube.assign_coords(band=list(xr_anysat.BANDS)).odc.assign_crs("EPSG:32632")


# ---------------------------------------------------------------------- cubes that must not be read


def _explode(block: np.ndarray) -> np.ndarray:
    raise AssertionError("pixels were read")


def unreadable(cube: AnyCube) -> AnyCube:
    """The same cube as dask arrays whose blocks cannot be computed."""

    def lazy(array: xr.DataArray) -> xr.DataArray:
        if not array.dims:  # a CRS
            return array
        data = array.chunk().data
        return array.copy(data=data.map_blocks(_explode, dtype=data.dtype, meta=data._meta))

    return cube.map(lazy, keep_attrs=True) if isinstance(cube, xr.Dataset) else lazy(cube)


def refuse(*args: Any, **kwargs: Any) -> Any:
    """A scheduler, or a function in place of another, that fails when it is called."""
    raise AssertionError("something was computed while the graph was built")


def no_compute() -> AbstractContextManager[Any]:
    """A context in which dask computes nothing at all."""

    return dask.config.set(scheduler=refuse)

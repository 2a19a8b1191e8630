"""Small Sentinel-2 cubes for tests."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr

import xr_anysat


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

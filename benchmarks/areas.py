"""Synthetic areas of any size, computed chunk by chunk when they are read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
import xarray as xr

import xr_anysat
from xr_anysat.embedding.lattice import PixelRange

DATES = 30
CORNER = (500_004, 60_004)
"""First row and column on the lattice: a multiple of patches of 40 m, but not of windows, which are cut."""

CHUNK = 256
"""Maximum side of a chunk of `clouded`."""

PERIOD = 512


def area(
    side: int, chunks: tuple[int, ...], values: Callable[..., np.ndarray], **options: Any
) -> xr.DataArray:
    """A lazy year of `side` × `side` pixels; `values` computes a chunk from `block_info`."""
    import odc.geo.xr  # noqa: F401

    shape = (DATES, 10, side, side)
    size = [n if c < 0 else min(c, n) for c, n in zip(chunks, shape, strict=True)]
    data = da.map_blocks(
        values, **options, chunks=da.core.normalize_chunks(size, shape), dtype="uint16",
        meta=np.empty((0,) * 4, "uint16"),
    )  # fmt: skip
    rows, cols = axes(side)
    coords = {
        "time": pd.date_range("2022-01-05", periods=DATES, freq="12D"),
        "band": list(xr_anysat.BANDS),
        "y": -10.0 * np.arange(rows.start, rows.stop) - 5,
        "x": 10.0 * np.arange(cols.start, cols.stop) + 5,
    }
    return xr.DataArray(data, coords, ("time", "band", "y", "x")).odc.assign_crs("EPSG:32632")


def axes(side: int) -> tuple[PixelRange, PixelRange]:
    """Rows and columns of an area on the lattice."""
    return PixelRange(CORNER[0], side), PixelRange(CORNER[1], side)


def clouded(block_info: Any) -> np.ndarray:
    """Digital numbers of a chunk: dates differ, a third is missing, and no pixel is missing on two dates in a row.

    All are cropped from the same noise, because computing them must cost almost nothing.
    """
    dates, bands, rows, cols = block_info[None]["array-location"]
    values = np.empty(block_info[None]["chunk-shape"], "uint16")
    down, across = (np.arange(*span) for span in (rows, cols))
    bank = (down[:, None] // 50 + across // 70) % 3
    seen = [(bank != i).astype("uint16") for i in range(3)]
    for into, t in zip(values, range(*dates), strict=True):
        top, left = (rows[0] + 31 * t) % PERIOD, (cols[0] + 17 * t) % PERIOD
        noise = _noise()[slice(*bands), top : top + len(down), left : left + len(across)]
        np.multiply(noise, seen[t % 3], out=into)
    return values


@functools.cache
def _noise() -> np.ndarray:
    """Random numbers that repeat after PERIOD pixels."""
    once = np.random.default_rng(0).integers(200, 4000, (10, PERIOD, PERIOD), "uint16")
    return np.pad(once, ((0, 0), (0, CHUNK), (0, CHUNK)), mode="wrap")

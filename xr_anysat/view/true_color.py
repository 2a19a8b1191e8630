"""True-color pictures of frames."""

from __future__ import annotations

import numpy as np
import xarray as xr

TRUE_COLOR = ["B4", "B3", "B2"]

ROBUST = (1, 99)
"""Percentiles of a frame's digital numbers that are drawn black and white."""

GAMMA = 1.4
"""Of the colours, so that woods are not black beside fields."""


def decimate(array: xr.DataArray, most: int) -> xr.DataArray:
    """Rows and columns at a step, so that at most `most` are left of either."""
    step = max(1, -(-max(array.sizes["y"], array.sizes["x"]) // most))
    return array.isel(y=slice(step // 2, None, step), x=slice(step // 2, None, step))


def true_color(values: np.ndarray) -> tuple[np.ndarray, str]:
    """Frames (n, 3, y, x) of B4, B3, B2 as colours (n, y, x, 4) uint8, transparent where one is missing.

    One stretch for all frames and bands, which is returned in words: the medians of the frames' own percentiles.
    Dates twice as bright as those of the lower quartile, by clouds or snow, have no say, so that ground shows.
    """
    known = np.isfinite(values).all(1)
    limits = np.array([
        np.percentile(frame[:, there], ROBUST)
        for frame, there in zip(values, known, strict=True)
        if there.any()
    ])  # fmt: skip
    low, high, words = 0.0, 1.0, "Nothing was observed"
    if limits.size:
        clear = limits[:, 1] <= 2 * np.quantile(limits[:, 1], 0.25)
        low, high = np.median(limits[clear], axis=0)
        digits = 0 if high >= 10 else 3
        words = f"True colour, DN {low:.{digits}f} to {high:.{digits}f} in every frame"
    share = np.where(known[:, None], values - low, 0) / max(high - low, 1e-9)
    color = np.clip(share, 0, 1) ** (1 / GAMMA)
    rgba = np.concatenate([color, known[:, None]], axis=1)
    return (255 * rgba).round().astype(np.uint8).transpose(0, 2, 3, 1), words

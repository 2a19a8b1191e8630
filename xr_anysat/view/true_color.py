"""True-color pictures of frames."""

from __future__ import annotations

import numpy as np
import xarray as xr

TRUE_COLOR = ["B4", "B3", "B2"]

ROBUST = (1, 99)
"""Percentiles of the digital numbers of a frame that are drawn black and white."""

GAMMA = 1.4
"""Gamma of the colors: brightens woods, which would be black next to fields."""


def decimate(array: xr.DataArray, max_side: int) -> xr.DataArray:
    """Take every n-th row and column, with the smallest n that leaves at most `max_side` of each."""
    step = max(1, -(-max(array.sizes["y"], array.sizes["x"]) // max_side))
    return array.isel(y=slice(step // 2, None, step), x=slice(step // 2, None, step))


def true_color(values: np.ndarray) -> tuple[np.ndarray, str]:
    """Convert frames (n, 3, y, x) of B4, B3, B2 to colors (n, y, x, 4) uint8, transparent where a band is missing.

    All frames and bands have the same stretch, whose description is returned as well: the medians of the percentiles
    of the frames. Frames more than twice as bright as the lower quartile (clouds or snow) are left out of these
    medians, so that the ground is visible.
    """
    known = np.isfinite(values).all(1)
    limits = np.array([
        np.percentile(frame[:, observed], ROBUST)
        for frame, observed in zip(values, known, strict=True)
        if observed.any()
    ])  # fmt: skip
    low, high, description = 0.0, 1.0, "No observations"
    if limits.size:
        clear = limits[:, 1] <= 2 * np.quantile(limits[:, 1], 0.25)
        low, high = np.median(limits[clear], axis=0)
        digits = 0 if high >= 10 else 3
        description = f"True color, DN {low:.{digits}f} to {high:.{digits}f} in every frame"
    share = np.where(known[:, None], values - low, 0) / max(high - low, 1e-9)
    color = np.clip(share, 0, 1) ** (1 / GAMMA)
    rgba = np.concatenate([color, known[:, None]], axis=1)
    return (255 * rgba).round().astype(np.uint8).transpose(0, 2, 3, 1), description

"""The grid and the coordinates of an embedding cube, and resampling to a single window."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from xr_anysat.embedding.lattice import PixelRange
from xr_anysat.errors import CubeError, OptionError
from xr_anysat.shared.graph import RECHUNK
from xr_anysat.shared.sensor import S2

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox


def effective_anchor(anchor: str, geobox: GeoBox | None, shape: tuple[int, ...], tile: int) -> str:
    """Resolve the anchor ``"auto"`` to ``"grid"`` or ``"cube"``."""
    if anchor == "grid" and geobox is None:
        raise OptionError(
            "anchor='grid' needs a CRS: set one with cube.odc.assign_crs('EPSG:32632'), or use anchor='cube'"
        )
    if anchor == "auto":
        return "cube" if geobox is None or max(shape[-2:]) <= tile else "grid"
    return anchor


def lattice_axes(anchor: str, geobox: GeoBox | None, shape: tuple[int, ...]) -> tuple[PixelRange, PixelRange]:
    """Return the rows and columns of the cube on the lattice."""
    row = col = 0
    if anchor == "grid":
        assert geobox is not None  # else `effective_anchor` refused the anchor
        left, top = geobox.affine.c, geobox.affine.f
        # a cube that is off the 10 m lattice keeps its own offset, which is the same for every crop of it
        row, col = (math.floor(round(v / S2.pixel_size, 3)) for v in (-top, left))
    return PixelRange(row, shape[-2]), PixelRange(col, shape[-1])


def resized_grid(
    geobox: GeoBox | None, shape: tuple[int, ...], size: int
) -> tuple[GeoBox | None, tuple[int, ...]]:
    """Return the grid and shape of a square cube after resampling it to size × size pixels."""
    height, width = shape
    if height != width:
        side = min(height, width)
        raise OptionError(
            f"resize={size} needs a square cube, this one has {height} × {width} pixels: crop it, "
            f"cube.isel(y=slice({side}), x=slice({side}))"
        )
    return None if geobox is None else geobox.zoom_to((size, size)), (size, size)


def resize_frames(data: Any, size: int) -> Any:
    """Resample square frames to size × size pixels."""
    weights = bilinear(data.shape[-1], size)
    if isinstance(data, np.ndarray):
        return resample(data, weights)
    data = data.rechunk({2: -1, 3: -1}, method=RECHUNK)
    return data.map_blocks(
        resample, weights, chunks=(*data.chunks[:2], (size,), (size,)), dtype=np.float32,
        meta=np.empty((0,) * 4, np.float32),
    )  # fmt: skip


def bilinear(n: int, size: int) -> np.ndarray:
    """Return weights (size, n) of bilinear resampling between pixel centers, clamped at the ends, no antialiasing.

    They are those of ``torch.nn.functional.interpolate(mode="bilinear", align_corners=False)``, which rs-embed uses.
    """
    at = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
    low = np.floor(at).astype(int)
    weights = np.zeros((size, n))
    weights[np.arange(size), low] = 1 - (at - low)
    weights[np.arange(size), np.minimum(low + 1, n - 1)] += at - low
    return weights


def resample(frames: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Resample frames (T, band, n, n) by `weights` (size, n) on both axes, from observed pixels only.

    A pixel is missing where less than half of its weight was observed.
    """
    finite = np.isfinite(frames)
    value = weights @ np.where(finite, frames, 0).astype(np.float64) @ weights.T
    share = weights @ finite.astype(np.float64) @ weights.T
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(share >= 0.5, value / share, np.nan).astype(np.float32)


def output_coords(
    array: xr.DataArray, geobox: GeoBox | None, rows: PixelRange, cols: PixelRange, cell: int
) -> dict[Hashable, Any]:
    """Return the centers of the cells, the CRS, and the scalar coords of the cube."""
    coords: dict[Hashable, Any] = {
        k: c.variable for k, c in array.coords.items() if c.ndim == 0 and k not in ("spatial_ref", "time")
    }
    cells = {"y": (*rows.covering_cells(cell), rows.start), "x": (*cols.covering_cells(cell), cols.start)}
    if geobox is not None:
        from affine import Affine
        from odc.geo.geobox import GeoBox
        from odc.geo.xr import xr_coords

        (top, height, row), (left, width, col) = cells["y"], cells["x"]
        a = geobox.affine
        west, north = a.c + a.a * (left * cell - col), a.f + a.e * (top * cell - row)
        grid = GeoBox((height, width), Affine(a.a * cell, 0, west, 0, a.e * cell, north), geobox.crs)
        return {**coords, **xr_coords(grid, dims=("y", "x"))}
    for dim, (first, count, start) in cells.items():
        if dim not in array.coords or array[dim].dtype.kind not in "iuf":  # labels have no centers
            continue
        values = array[dim].values.astype(float)
        step = float(values[1] - values[0]) if values.size > 1 else 1.0
        if np.abs(np.diff(values) - step).max(initial=0) > 1e-3 * abs(step):
            raise CubeError(
                f"{dim!r} coordinates are not evenly spaced: give the cube a CRS and a regular grid, or drop "
                f"them with cube.drop_vars({dim!r})"
            )
        # resized cubes have fewer cells for the same extent
        pixels = (np.arange(first, first + count) * cell - start) + (cell - 1) / 2
        scale = values.size / (cols.size if dim == "x" else rows.size)
        coords[dim] = (dim, values[0] + step * ((pixels + 0.5) * scale - 0.5))
    return coords

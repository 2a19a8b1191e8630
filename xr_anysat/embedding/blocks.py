"""Run windows through the model, block by block; this module and `overlap` connect dask to torch.

A block is a whole number of windows (cut only by the ends of the cube). Its task receives the frames of
its pixels, their numbers on the lattice and a small `EncoderSpec`; the model is loaded once per
process. A result depends on nothing but these arguments, so it cannot depend on chunks.

One forward pass runs at a time per device and process, because it fills the device, or all threads of
torch. Torch has as many threads as the user set (`torch.set_num_threads`, `OMP_NUM_THREADS`; else one
thread per core), except in a task of a dask-distributed worker, where it has those of the worker.
Otherwise torch would use every core of the machine in each worker without a nanny, and a single core in
each worker with a nanny, which sets `OMP_NUM_THREADS=1`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from xr_anysat.cube.normalization import check_values, observed
from xr_anysat.embedding.forward import (
    autocast_for,
    call_model,
    crop_to_cube,
    exclusive_encoder,
    observed_windows,
    patches,
    run_in_batches,
    window_tensors,
)
from xr_anysat.embedding.lattice import PixelRange, Squares, block_side, cell_chunks
from xr_anysat.embedding.settings import BlockSpec, WindowPosition
from xr_anysat.errors import warn
from xr_anysat.model.weights import get_encoder
from xr_anysat.shared.graph import RECHUNK, keep_blocks
from xr_anysat.shared.sensor import S2

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = 64 << 20
"""Most bytes of the input and of the output of a block: larger blocks gain nothing and take memory."""

MIN_BLOCKS = 64
"""Least number of blocks of a cube that has that many windows: workers idle while the last blocks finish."""

OVERLAP_BLOCK_FACTOR = 4
"""Blocks of overlapping windows are this much larger, because both blocks compute the windows on their border."""


def frame_bytes(dates: int, pixels: int) -> int:
    """Return the bytes of float32 frames of ten bands."""
    return dates * len(S2.bands) * 4 * pixels


def encode_windows(
    frames: Any,
    stats: Any,
    rows: PixelRange,
    cols: PixelRange,
    settings: BlockSpec,
    squares: Squares | None = None,
    min_blocks: int | None = None,
) -> Any:
    """Embed frames in adjacent windows.

    Parameters
    ----------
    frames : ndarray or dask array, (T, 10, y, x) float32
        Digital numbers, NaN where missing.
    stats : ndarray or dask array, (2, 10) float64, or None
        Mean and standard deviation to normalize by, where `settings.norm` needs them.
    rows, cols : PixelRange
        Position of the pixels on the lattice.
    settings : BlockSpec
    squares : Squares, optional
        The squares that are needed. Cells outside them are NaN.
    min_blocks : int, optional
        Least number of blocks. By default :data:`MIN_BLOCKS`.

    Returns
    -------
    ndarray or dask array, (D, y cells, x cells) float32
        NumPy in, NumPy out.
    """
    import dask.array as da

    eager, dates = isinstance(frames, np.ndarray), frames.shape[0]
    layout = block_layout(rows, cols, settings, dates, min_blocks)
    blocks = ((dates,), (len(S2.bands),), layout.down, layout.across)
    if eager:  # the same graph, computed now; name=False avoids hashing all pixels
        get_encoder(settings.spec)  # report a missing checkpoint or device before hours of work
        frames = da.from_array(frames, chunks=blocks, name=False)
    needed = None
    if squares is not None:
        parts = tuple(
            cell_chunks(*side, settings.stride) for side in ((rows, layout.down), (cols, layout.across))
        )
        needed = da.from_array(squares.needed, chunks=parts)
    out = da.blockwise(
        encode_block, "dyx",
        frames.rechunk(blocks, method=RECHUNK), "tbyx",
        stats if stats is None else da.asarray(stats), stats if stats is None else "sc",
        da.from_array(np.arange(rows.start, rows.stop), chunks=(layout.down,)), "y",
        da.from_array(np.arange(cols.start, cols.stop), chunks=(layout.across,)), "x",
        needed, None if needed is None else "yx",
        settings=settings,
        new_axes={"d": settings.channels},
        adjust_chunks={"y": layout.down_cells, "x": layout.across_cells},
        concatenate=True, align_arrays=False, dtype=np.float32, meta=np.empty((0, 0, 0), np.float32),
    )  # fmt: skip
    if squares is not None:
        kept = [
            [
                squares.meet(y.grid(settings.stride), x.grid(settings.stride))
                for x in cols.parts(layout.across)
            ]
            for y in rows.parts(layout.down)
        ]
        out = keep_blocks(out, np.array(kept))
    return out.compute(scheduler="synchronous") if eager else out


@dataclass(frozen=True)
class BlockLayout:
    """How a cube is cut into blocks; used by both encoders and by :func:`xr_anysat.plan`.

    Attributes
    ----------
    windows : int
        Windows on the side of a block. Overlapping windows belong to the block in which they start.
    down, across : tuple of int
        Pixels of the blocks along y and x.
    down_cells, across_cells : tuple of int
        Cells of the blocks along y and x, which are the chunks of the output.
    """

    windows: int
    down: tuple[int, ...]
    across: tuple[int, ...]
    down_cells: tuple[int, ...]
    across_cells: tuple[int, ...]


def block_layout(
    rows: PixelRange, cols: PixelRange, settings: BlockSpec, dates: int, min_blocks: int | None = None
) -> BlockLayout:
    """Cut a cube of these rows and columns into blocks of whole windows."""
    max_bytes, least = block_limits(settings)
    windows = block_side(
        rows, cols, settings.stride, pixel_bytes=max(pixel_bytes(settings, dates)), max_bytes=max_bytes,
        min_blocks=least if min_blocks is None else min_blocks,
    )  # fmt: skip
    down, across = rows.blocks(settings.stride, windows), cols.blocks(settings.stride, windows)
    cells = cell_chunks(rows, down, settings.cell), cell_chunks(cols, across, settings.cell)
    return BlockLayout(windows, down, across, *cells)


def pixel_bytes(settings: BlockSpec, dates: int) -> tuple[float, float]:
    """Return the bytes per pixel of the frames and of the embedding of a block."""
    return float(frame_bytes(dates, 1)), settings.channels * 4 / settings.cell**2


def block_limits(settings: BlockSpec) -> tuple[int, int]:
    """Return the most bytes per block, and the least number of blocks of a cube with at least that many windows."""
    factor = OVERLAP_BLOCK_FACTOR if settings.overlap else 1
    return BLOCK_BYTES * factor, MIN_BLOCKS // factor


def encode_block(
    frames: np.ndarray,
    stats: np.ndarray | None,
    rows: np.ndarray,
    cols: np.ndarray,
    needed: np.ndarray | None = None,
    *,
    settings: BlockSpec,
) -> np.ndarray:
    """Embed one block of frames (T, 10, h, w) float32: (D, h cells, w cells) float32.

    `rows` (h,) and `cols` (w,) are the numbers of the pixels on the lattice, and `needed` are the squares to compute
    (by default all).
    """
    valid = observed(frames)
    check_values(frames, valid, offset_decided=settings.offset_decided)
    y, x = PixelRange(int(rows[0]), len(rows)), PixelRange(int(cols[0]), len(cols))
    (y_first, height), (x_first, width) = y.covering_cells(settings.cell), x.covering_cells(settings.cell)
    out = np.full((settings.channels, height, width), np.nan, np.float32)
    if not valid.any():
        return out
    squares = None if needed is None else Squares(y.grid(settings.stride), x.grid(settings.stride), needed)
    with exclusive_encoder(settings.spec) as model:

        def run(part: list[WindowPosition], device: torch.device) -> list[torch.Tensor]:
            pixels, doy, mask = window_tensors(frames, valid, stats, y, x, part, device, settings)
            origin = (part[0][0].first_patch, part[0][1].first_patch)
            with autocast_for(device, settings.spec):
                return [call_model(model, pixels, doy, mask, origin, settings).float()]

        windows = observed_windows(valid, y, x, settings, squares)
        for (i, j), (cells,) in run_in_batches(windows, run, model, settings):
            if settings.output == "tile":
                out[:, i.window - y_first, j.window - x_first] = cells
            elif settings.output == "patch":
                down, across = (
                    patches(span, settings).slice_of(axis.grid(settings.side))
                    for span, axis in ((i, y), (j, x))
                )
                out[:, down, across] = np.moveaxis(cells, -1, 0)
            else:
                cells = crop_to_cube(cells, i, j, settings)
                out[:, i.pixels.slice_of(y), j.pixels.slice_of(x)] = np.moveaxis(cells, -1, 0)
    return out


def warn_if_empty(values: Any) -> None:
    """Warn if a computed result is NaN everywhere."""
    if isinstance(values, np.ndarray) and values.size and np.isnan(values).all():
        warn(
            "nothing valid in this cube: every embedding is NaN. Check nodata=, and whether the mask is too large"
        )

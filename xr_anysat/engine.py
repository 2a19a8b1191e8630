"""Windows through the model, block by block: here and in `overlap` dask meets torch.

A block is a whole number of windows (cut only by the ends of the cube). Its task gets the frames of
its pixels, their numbers on the lattice and a small `EncoderSpec`; the model is loaded once a
process. Nothing that is not in those arguments takes part, so results cannot depend on chunks.

What a forward may take is decided here too. One runs at a time on a device of a process, for it fills
the device, or all threads that torch has. Torch has as many as the user set (`torch.set_num_threads`,
`OMP_NUM_THREADS`; else a thread a core), except in a task of a dask-distributed worker: there it has the
worker's. Left alone, torch would take every core of the machine in each worker that has no nanny, and a
single one in each that has, since a nanny sets `OMP_NUM_THREADS=1`.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np

from xr_anysat.cube import BANDS
from xr_anysat.errors import CubeError, DeviceError, warn
from xr_anysat.frames import RECHUNK
from xr_anysat.lattice import Axis, Span, blocks_for, cell_chunks, spans
from xr_anysat.model.cost import HEAP_BYTES, working_bytes
from xr_anysat.model.spec import ACCELERATOR_ROWS, cell_side, channels
from xr_anysat.model.weights import EncoderSpec, get_encoder
from xr_anysat.radiometry import check_values, clip, normalize, observed

if TYPE_CHECKING:
    import torch

Place = tuple[Span, Span]  # of a window, down and across

BLOCK_BYTES = 64 << 20
"""Bytes that the input and the output of a block may each have: larger ones gain nothing, and wait in memory."""

BLOCKS_AT_LEAST = 64
"""Blocks that a cube is cut into, if it has that many windows: workers idle while the last ones are finished."""

OVERLAPPING = 4
"""So many times larger are blocks where windows overlap, for those on a border are computed by both."""

FREE_SHARE = 0.8
"""Of a GPU's free memory, what a forward may be expected to take: fragments, and libraries, need some too."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # as mallopt(3) has them

_turns: dict[str, threading.Lock] = {}  # one a device, for one forward at a time
_fitting: dict[tuple[str, Settings], int] = {}  # windows a forward, for devices that had no memory for more


@dataclass(frozen=True)
class Settings:
    """What a block needs to know beside its pixels; part of every task, so small and plain."""

    spec: EncoderSpec
    doy: tuple[int, ...]
    norm: str
    output: str
    tile: int
    side: int
    batch: int | None
    overlap: int = 0
    offset_decided: bool = False  # whether metadata settled the +1000 offset

    @property
    def cell(self) -> int:
        """Pixels on the side of an output cell."""
        return cell_side(self.output, side=self.side, tile=self.tile)

    @property
    def stride(self) -> int:
        """Pixels from one window to the next."""
        return self.tile - self.overlap

    @property
    def channels(self) -> int:
        """Channels of an output cell, D."""
        return channels(self.spec.size, self.output)


def encode(frames: Any, stats: Any, rows: Axis, cols: Axis, settings: Settings) -> Any:
    """Embed frames in windows that lie side by side.

    Parameters
    ----------
    frames : ndarray or dask array, (T, 10, y, x) float32
        Digital numbers, NaN where missing.
    stats : ndarray or dask array, (2, 10) float64, or None
        Mean and standard deviation to normalize by, where `settings.norm` needs them.
    rows, cols : Axis
        Place of the pixels on the lattice.
    settings : Settings

    Returns
    -------
    ndarray or dask array, (D, y cells, x cells) float32
        NumPy in, NumPy out.
    """
    import dask.array as da

    eager, dates = isinstance(frames, np.ndarray), frames.shape[0]
    windows = block_windows(rows, cols, settings, dates)
    down, across = rows.blocks(settings.tile, windows), cols.blocks(settings.tile, windows)
    blocks = ((dates,), (len(BANDS),), down, across)
    if eager:  # the same graph, computed at once; a name of its own spares hashing all pixels
        get_encoder(settings.spec)  # a missing checkpoint or device is said before hours of work
        frames = da.from_array(frames, chunks=blocks, name=False)
    out = da.blockwise(
        encode_block, "dyx",
        frames.rechunk(blocks, method=RECHUNK), "tbyx",
        stats if stats is None else da.asarray(stats), stats if stats is None else "sc",
        da.from_array(np.arange(rows.start, rows.stop), chunks=(down,)), "y",
        da.from_array(np.arange(cols.start, cols.stop), chunks=(across,)), "x",
        settings=settings,
        new_axes={"d": settings.channels},
        adjust_chunks={
            "y": cell_chunks(rows, down, settings.cell),
            "x": cell_chunks(cols, across, settings.cell),
        },
        concatenate=True, align_arrays=False, dtype=np.float32, meta=np.empty((0, 0, 0), np.float32),
    )  # fmt: skip
    return out.compute(scheduler="synchronous") if eager else out


def pixel_bytes(settings: Settings, dates: int) -> tuple[float, float]:
    """Bytes that a pixel has in a block's frames and in its embedding."""
    return dates * len(BANDS) * 4.0, settings.channels * 4 / settings.cell**2


def block_windows(rows: Axis, cols: Axis, settings: Settings, dates: int) -> int:
    """Windows on the side of a block."""
    limit, at_least = block_limits(settings)
    most = max(pixel_bytes(settings, dates))
    return blocks_for(rows, cols, settings.stride, pixel_bytes=most, limit=limit, at_least=at_least)


def block_limits(settings: Settings) -> tuple[int, int]:
    """Bytes that a block may have, and blocks that a cube is cut into if it has that many windows."""
    larger = OVERLAPPING if settings.overlap else 1
    return BLOCK_BYTES * larger, BLOCKS_AT_LEAST // larger


def encode_block(
    frames: np.ndarray,
    stats: np.ndarray | None,
    rows: np.ndarray,
    cols: np.ndarray,
    *,
    settings: Settings,
) -> np.ndarray:
    """One block, (T, 10, h, w) float32 to (D, h cells, w cells) float32.

    `rows` (h,) and `cols` (w,) are the pixels' numbers on the lattice.
    """
    valid = observed(frames)
    check_values(frames, valid, offset_decided=settings.offset_decided)
    y, x = Axis(int(rows[0]), len(rows)), Axis(int(cols[0]), len(cols))
    (y_first, height), (x_first, width) = y.cells(settings.cell), x.cells(settings.cell)
    out = np.full((settings.channels, height, width), np.nan, np.float32)
    if not valid.any():
        return out
    with the_model(settings.spec) as model:

        def run(part: list[Place], device: torch.device) -> list[torch.Tensor]:
            window, doy, there = tensors(frames, valid, stats, y, x, part, device, settings)
            origin = (part[0][0].first, part[0][1].first)
            with _autocast(device, settings.spec):
                return [_call(model, window, doy, there, origin, settings).float()]

        for (i, j), (cells,) in in_batches(observed_windows(valid, y, x, settings), run, model, settings):
            if settings.output == "tile":
                out[:, i.window - y_first, j.window - x_first] = cells
            elif settings.output == "patch":
                at = (
                    patches(span, settings).within(axis.grid(settings.side))
                    for span, axis in ((i, y), (j, x))
                )
                out[:, *at] = np.moveaxis(cells, -1, 0)
            else:
                out[:, i.pixels.within(y), j.pixels.within(x)] = np.moveaxis(
                    of_pixels(cells, i, j, settings), -1, 0
                )
    return out


@contextmanager
def the_model(spec: EncoderSpec) -> Iterator[Any]:
    """The model, and its device for oneself, to compute a block."""
    import torch

    model = get_encoder(spec)
    turn = _turns.setdefault(str(_device(model)), threading.Lock())
    with turn, _threads_of_the_worker(), _freed_memory_is_kept(), torch.inference_mode():
        yield model


def _device(model: Any) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device


@contextmanager
def _threads_of_the_worker() -> Iterator[None]:
    """Give torch the threads of the dask-distributed worker that this task runs on, else those it has.

    Torch keeps the number a thread, so it is set in the thread of the task, each time. It is set also
    where it stays the same: until that is done once in a process, MKL takes fewer threads for small
    matrices, and other bits come out. It is set back, because threads that start later take the last
    number over, and with ``processes=False`` they may be the user's own.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(_nthreads() or threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _freed_memory_is_kept() -> Iterator[None]:
    """Have glibc keep what the forwards of a block free for one another, where it was told to give it back at once.

    The nanny of a dask-distributed worker tells it so, by ``MALLOC_TRIM_THRESHOLD_=65536``: each tensor then comes
    in pages that the system has to clear, a third of the time (docs/speed.md). Left alone, glibc learns to keep
    them. Between blocks it is as it was, so that what dask frees does go back.
    """
    told = os.environ.get("MALLOC_TRIM_THRESHOLD_", "")
    libc: Any = ctypes.CDLL(None) if told.isdecimal() and sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):  # nothing to set right, or another C library
        yield
        return
    libc.mallopt(_TRIM_THRESHOLD, HEAP_BYTES)
    libc.mallopt(_MMAP_THRESHOLD, 32 << 20)  # no more is possible
    try:
        yield
    finally:
        libc.mallopt(_TRIM_THRESHOLD, int(told))
        libc.mallopt(_MMAP_THRESHOLD, int(os.environ.get("MALLOC_MMAP_THRESHOLD_", 128 << 10)))


def _nthreads() -> int | None:
    """Threads of the worker that this task runs on; None outside a worker."""
    if "distributed" not in sys.modules:  # then this is no worker, and need not wait for its import
        return None
    from distributed import get_worker

    try:
        return get_worker().state.nthreads
    except ValueError:
        return None


def observed_windows(valid: np.ndarray, y: Axis, x: Axis, settings: Settings) -> list[list[Place]]:
    """The windows of a block in which something was observed; those of one shape together."""
    alike: dict[tuple[int, ...], list[Place]] = {}
    for i in spans(y, settings.tile, settings.side):
        for j in spans(x, settings.tile, settings.side):
            if valid[:, i.start - y.start : i.stop - y.start, j.start - x.start : j.stop - x.start].any():
                alike.setdefault((i.first, i.count, j.first, j.count), []).append((i, j))
    return list(alike.values())


def in_batches(
    groups: Iterable[list[Place]],
    run: Callable[[list[Place], torch.device], Sequence[torch.Tensor | None]],
    model: Any,
    settings: Settings,
) -> Iterator[tuple[Place, tuple[Any, ...]]]:
    """Windows and the arrays that `run` makes of each, given as many of one shape at a time as the memory lets.

    Results are waited for one batch later: while an accelerator computes, the next windows are cut and sent.
    """
    import torch

    device, waiting = _device(model), None
    for places in groups:
        done = 0
        while done < len(places):
            batch = _fitting.get((str(device), settings)) or _batch(settings, device)
            part, found = places[done : done + batch], None
            try:
                found = run(part, device)
            except torch.OutOfMemoryError as error:
                reason = str(error).partition("\n")[0]
            if found is None:  # after the except clause, where the error holds no tensors any more
                _halve(device, settings, len(part), reason)
                continue
            done += len(part)
            before, waiting = waiting, (part, _fetched(found))
            if before is not None:
                yield from _one_by_one(*before)
    if waiting is not None:
        yield from _one_by_one(*waiting)


def _fetched(found: Sequence[torch.Tensor | None]) -> Callable[[], list[Any]]:
    """Start to copy tensors (B, ...) to the host; what is returned waits for them, and gives B arrays of each."""
    import torch

    cuda = any(t is not None and t.is_cuda for t in found)
    copies = [None if t is None else t.to("cpu", non_blocking=cuda) for t in found]
    arrived = torch.cuda.Event() if cuda else None
    if arrived is not None:
        arrived.record()

    def wait() -> list[Any]:
        if arrived is not None:
            arrived.synchronize()
        return [repeat(None) if t is None else t.numpy() for t in copies]

    return wait


def _one_by_one(
    part: list[Place], arrays: Callable[[], list[Any]]
) -> Iterator[tuple[Place, tuple[Any, ...]]]:
    yield from zip(part, zip(*arrays(), strict=False), strict=False)


def tensors(
    frames: np.ndarray,
    valid: np.ndarray,
    stats: np.ndarray | None,
    y: Axis,
    x: Axis,
    part: list[Place],
    device: torch.device,
    settings: Settings,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Normalized pixels (B, T, 10, H, W), days (T,) and validity (B, T, H, W) of windows of one shape.

    Validity is None where all was observed, so that the model need not ask the device.
    """
    import torch

    cut = [_cut(frames, valid, stats, y, x, i, j, settings) for i, j in part]
    window, there = (np.stack(arrays) for arrays in zip(*cut, strict=True))
    doy = torch.tensor(settings.doy)
    return sent(window, device), sent(doy, device), None if there.all() else sent(there, device)


def sent(array: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """An array on a device; to a GPU it is on its way, from memory that stays where it is."""
    import torch

    here = torch.as_tensor(array)
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here.to(device)


def _halve(device: torch.device, settings: Settings, windows: int, reason: str) -> None:
    """Have forwards on this device, from now on, take half the windows that it had no memory for."""
    if windows == 1:
        raise DeviceError(
            f"{device} has not the memory for one window of {settings.tile} × {settings.tile} pixels and "
            f"{len(settings.doy)} frames ({reason}). Pass a smaller tile, a larger patch_size, fewer frames or "
            "precision='bfloat16', or see that nothing else fills the device"
        )
    _fitting[str(device), settings] = windows // 2
    warn(
        f"{device} has not the memory for {windows} windows a forward ({reason}): it goes on with {windows // 2}, "
        f"which changes nothing but rounding. batch={windows // 2} starts with that"
    )


def _cut(
    frames: np.ndarray,
    valid: np.ndarray,
    stats: np.ndarray | None,
    y: Axis,
    x: Axis,
    i: Span,
    j: Span,
    settings: Settings,
) -> tuple[np.ndarray, np.ndarray]:
    """Normalized pixels (T, 10, H, W) and validity (T, H, W) of what there is of one window.

    H and W are whole patches: pixels beyond the end of the cube are there as invalid ones.
    """
    at = np.s_[..., i.start - y.start : i.stop - y.start, j.start - x.start : j.stop - x.start]
    there = valid[at]
    pixels = normalize(clip(frames[at], there), there, settings.norm, stats)
    before = [_before(i, settings), _before(j, settings)]
    shape = [s.count * settings.side for s in (i, j)]
    if shape == list(pixels.shape[2:]):
        return pixels, there
    inner = np.s_[..., before[0] : before[0] + there.shape[1], before[1] : before[1] + there.shape[2]]
    whole = np.zeros((*pixels.shape[:2], *shape), np.float32)
    whole_there = np.zeros((there.shape[0], *shape), bool)
    whole[inner], whole_there[inner] = pixels, there
    return whole, whole_there


def patches(span: Span, settings: Settings) -> Axis:
    """The patches of a window that there are, as an axis of patches."""
    return Axis(span.window * (settings.stride // settings.side) + span.first, span.count)


def of_pixels(cells: np.ndarray, i: Span, j: Span, settings: Settings) -> np.ndarray:
    """Of cells (H, W, D) of the pixels of whole patches, those that there are: patches reach over a cube's end."""
    top, left = _before(i, settings), _before(j, settings)
    return cells[top : top + i.stop - i.start, left : left + j.stop - j.start]


def _before(span: Span, settings: Settings) -> int:
    """Pixels of a span's first patch that lie before the cube."""
    return span.start - span.window * settings.stride - span.first * settings.side


def _call(
    model: Any,
    window: torch.Tensor,
    doy: torch.Tensor,
    valid: torch.Tensor | None,
    origin: tuple[int, int],
    settings: Settings,
) -> torch.Tensor:
    """Run a batch of windows through our model, or through a module that is called like upstream's."""
    from xr_anysat.model.anysat import AnySat

    if isinstance(model, AnySat):
        encoded: torch.Tensor = model.encode(
            window, doy, valid, side=settings.side, output=settings.output, origin=origin
        )
        return encoded
    side = settings.tile
    if valid is not None or window.shape[-2:] != (side, side):
        missing = 0 if valid is None else int((~valid).sum())
        raise CubeError(
            f"a window of {window.shape[-2]} × {window.shape[-1]} pixels, {missing} of its observations "
            f"missing: the module handed in as model= takes only complete windows of {side} × {side} pixels. Use "
            "model='base' with weights=PATH, which leaves out what is missing, or crop the cube to whole windows"
        )
    output = "dense" if settings.output == "local" else settings.output
    dates = doy[None].expand(len(window), -1)
    encoded = model({"s2": window, "s2_dates": dates}, patch_size=settings.side * 10, output=output)
    return encoded[..., encoded.shape[-1] // 2 :] if settings.output == "local" else encoded


def _batch(settings: Settings, device: torch.device) -> int:
    """Windows a forward.

    On a CPU it is one: as fast as any, since a window's matrices are already large, and the rows of
    a window then never share a matrix with others, which keeps results bit-identical. On a GPU as many as
    fill it, if its free memory has room for them.
    """
    if device.type == "cpu":
        return 1
    if settings.batch:
        return settings.batch
    most = windows_at_once(settings.tile, device.type)
    if device.type != "cuda":  # others do not tell what is free
        return most
    room = FREE_SHARE * _free_bytes(device)
    return bisect_right(range(2, most + 1), room, key=lambda n: _forward_bytes(settings, n)) + 1


def _forward_bytes(settings: Settings, windows: int) -> int:
    """Memory that a forward of so many windows works in on an accelerator, in float32."""
    return working_bytes(
        settings.spec.size, settings.output, dates=len(settings.doy), side=settings.side, tile=settings.tile,
        windows=windows, rows=ACCELERATOR_ROWS,
    )  # fmt: skip


def _free_bytes(device: torch.device) -> int:
    """Memory of a GPU that nobody uses, or that torch keeps for its next tensors."""
    import torch

    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def windows_at_once(tile: int, device: str) -> int:
    """Windows of `tile` pixels that fill a device of this type."""
    return 1 if device == "cpu" else max(1, (1 << 16) // tile**2)


def _autocast(device: torch.device, spec: EncoderSpec) -> Any:
    """The precision of a module that was handed in; an encoder that we loaded has it from `get_encoder`."""
    import torch

    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(spec.precision)
    enabled = dtype is not None and spec.source.startswith("module:")
    return torch.autocast(device.type, dtype=dtype, enabled=enabled)


def warn_if_empty(values: Any) -> None:
    """Say so if nothing at all came out; for results that are already there."""
    if isinstance(values, np.ndarray) and values.size and np.isnan(values).all():
        warn("nothing valid in this cube: every embedding is NaN (is nodata= right, is the mask too wide?)")


def device_of(spec: EncoderSpec) -> str:
    """The device that a loaded model is on."""
    return str(next(get_encoder(spec).parameters()).device)

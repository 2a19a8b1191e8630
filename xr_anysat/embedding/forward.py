"""Batches of windows through the model, on one device at a time."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np

from xr_anysat.cube.normalization import clip, normalize
from xr_anysat.embedding.lattice import PixelRange, Span, spans
from xr_anysat.embedding.process import retain_freed_memory, worker_torch_threads
from xr_anysat.embedding.settings import BlockSpec, WindowPosition
from xr_anysat.errors import CubeError, DeviceError, warn
from xr_anysat.model.cost import working_bytes
from xr_anysat.model.spec import ACCELERATOR_ROWS
from xr_anysat.model.weights import EncoderSpec, get_encoder

if TYPE_CHECKING:
    import torch

FREE_SHARE = 0.8
"""Of a GPU's free memory, what a forward may be expected to take: fragments, and libraries, need some too."""

_device_locks: dict[str, threading.Lock] = {}  # one a device, for one forward at a time

_batch_limits: dict[
    tuple[str, BlockSpec], int
] = {}  # windows a forward, for devices that had no memory for more


@contextmanager
def exclusive_encoder(spec: EncoderSpec) -> Iterator[Any]:
    """The model, and its device for oneself, to compute a block."""
    import torch

    model = get_encoder(spec)
    turn = _device_locks.setdefault(str(_device(model)), threading.Lock())
    retain_freed_memory()
    with turn, worker_torch_threads(), torch.inference_mode():
        yield model


def _device(model: Any) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device


def observed_windows(
    valid: np.ndarray, y: PixelRange, x: PixelRange, settings: BlockSpec
) -> list[list[WindowPosition]]:
    """The windows of a block in which something was observed; those of one shape together."""
    alike: dict[tuple[int, ...], list[WindowPosition]] = {}
    for i in spans(y, settings.tile, settings.side):
        for j in spans(x, settings.tile, settings.side):
            if valid[:, i.start - y.start : i.stop - y.start, j.start - x.start : j.stop - x.start].any():
                alike.setdefault((i.first_patch, i.n_patches, j.first_patch, j.n_patches), []).append((i, j))
    return list(alike.values())


def run_in_batches(
    groups: Iterable[list[WindowPosition]],
    run: Callable[[list[WindowPosition], torch.device], Sequence[torch.Tensor | None]],
    model: Any,
    settings: BlockSpec,
) -> Iterator[tuple[WindowPosition, tuple[Any, ...]]]:
    """Windows and the arrays that `run` makes of each, given as many of one shape at a time as the memory lets.

    Results are waited for one batch later: while an accelerator computes, the next windows are cut and sent.
    """
    import torch

    device, waiting = _device(model), None
    for places in groups:
        done = 0
        while done < len(places):
            batch = _batch_limits.get((str(device), settings)) or _batch(settings, device)
            part, found = places[done : done + batch], None
            try:
                found = run(part, device)
            except torch.OutOfMemoryError as error:
                reason = str(error).partition("\n")[0]
            if found is None:  # after the except clause, where the error holds no tensors any more
                _shrink_batch(device, settings, len(part), reason)
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
    part: list[WindowPosition], arrays: Callable[[], list[Any]]
) -> Iterator[tuple[WindowPosition, tuple[Any, ...]]]:
    yield from zip(part, zip(*arrays(), strict=False), strict=False)


def window_tensors(
    frames: np.ndarray,
    valid: np.ndarray,
    stats: np.ndarray | None,
    y: PixelRange,
    x: PixelRange,
    part: list[WindowPosition],
    device: torch.device,
    settings: BlockSpec,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Normalized pixels (B, T, 10, H, W), days (T,) and validity (B, T, H, W) of windows of one shape.

    Validity is None where all was observed, so that the model need not ask the device.
    """
    import torch

    cut = [_crop_window(frames, valid, stats, y, x, i, j, settings) for i, j in part]
    window, there = (np.stack(arrays) for arrays in zip(*cut, strict=True))
    doy = torch.tensor(settings.doy)
    return (
        to_device(window, device),
        to_device(doy, device),
        None if there.all() else to_device(there, device),
    )


def to_device(array: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """An array on a device; to a GPU it is on its way, from memory that stays where it is."""
    import torch

    here = torch.as_tensor(array)
    return here.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else here.to(device)


def _shrink_batch(device: torch.device, settings: BlockSpec, windows: int, reason: str) -> None:
    """Have forwards on this device, from now on, take half the windows that it had no memory for."""
    if windows == 1:
        raise DeviceError(
            f"{device} has not the memory for one window of {settings.tile} × {settings.tile} pixels and "
            f"{len(settings.doy)} frames ({reason}). Pass a smaller tile, a larger patch_size, fewer frames or "
            "precision='bfloat16', or see that nothing else fills the device"
        )
    _batch_limits[str(device), settings] = windows // 2
    warn(
        f"{device} has not the memory for {windows} windows a forward ({reason}): it goes on with {windows // 2}, "
        f"which changes nothing but rounding. batch={windows // 2} starts with that"
    )


def _crop_window(
    frames: np.ndarray,
    valid: np.ndarray,
    stats: np.ndarray | None,
    y: PixelRange,
    x: PixelRange,
    i: Span,
    j: Span,
    settings: BlockSpec,
) -> tuple[np.ndarray, np.ndarray]:
    """Normalized pixels (T, 10, H, W) and validity (T, H, W) of what there is of one window.

    H and W are whole patches: pixels beyond the end of the cube are there as invalid ones.
    """
    at = np.s_[..., i.start - y.start : i.stop - y.start, j.start - x.start : j.stop - x.start]
    there = valid[at]
    pixels = normalize(clip(frames[at], there), there, settings.norm, stats)
    before = [_left_padding(i, settings), _left_padding(j, settings)]
    shape = [s.n_patches * settings.side for s in (i, j)]
    if shape == list(pixels.shape[2:]):
        return pixels, there
    inner = np.s_[..., before[0] : before[0] + there.shape[1], before[1] : before[1] + there.shape[2]]
    whole = np.zeros((*pixels.shape[:2], *shape), np.float32)
    whole_there = np.zeros((there.shape[0], *shape), bool)
    whole[inner], whole_there[inner] = pixels, there
    return whole, whole_there


def patches(span: Span, settings: BlockSpec) -> PixelRange:
    """The patches of a window that there are, as an axis of patches."""
    return PixelRange(span.window * (settings.stride // settings.side) + span.first_patch, span.n_patches)


def crop_to_cube(cells: np.ndarray, i: Span, j: Span, settings: BlockSpec) -> np.ndarray:
    """Of cells (H, W, D) of the pixels of whole patches, those that there are: patches reach over a cube's end."""
    top, left = _left_padding(i, settings), _left_padding(j, settings)
    return cells[top : top + i.stop - i.start, left : left + j.stop - j.start]


def _left_padding(span: Span, settings: BlockSpec) -> int:
    """Pixels of a span's first patch that lie before the cube."""
    return span.start - span.window * settings.stride - span.first_patch * settings.side


def call_model(
    model: Any,
    window: torch.Tensor,
    doy: torch.Tensor,
    valid: torch.Tensor | None,
    origin: tuple[int, int],
    settings: BlockSpec,
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


def _batch(settings: BlockSpec, device: torch.device) -> int:
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


def _forward_bytes(settings: BlockSpec, windows: int) -> int:
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


def autocast_for(device: torch.device, spec: EncoderSpec) -> Any:
    """The precision of a module that was handed in; an encoder that we loaded has it from `get_encoder`."""
    import torch

    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(spec.precision)
    enabled = dtype is not None and spec.source.kind == "module"
    return torch.autocast(device.type, dtype=dtype, enabled=enabled)

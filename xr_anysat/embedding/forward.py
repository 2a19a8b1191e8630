"""Run batches of windows through the model, one forward pass at a time per device."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np

from xr_anysat.cube.normalization import clip, normalize
from xr_anysat.embedding.lattice import PixelRange, Span, Squares, spans
from xr_anysat.embedding.process import retain_freed_memory, worker_torch_threads
from xr_anysat.embedding.settings import BlockSpec, WindowPosition
from xr_anysat.errors import CubeError, DeviceError, warn
from xr_anysat.model.cost import working_bytes
from xr_anysat.model.spec import ACCELERATOR_ROWS
from xr_anysat.model.weights import EncoderSpec, get_encoder
from xr_anysat.shared.sensor import S2

if TYPE_CHECKING:
    import torch

FREE_SHARE = 0.8
"""Share of a GPU's free memory that a forward pass may need; fragmentation and libraries take the rest."""

_device_locks: dict[str, threading.Lock] = {}

# Windows per forward pass, for devices that ran out of memory with more
_batch_limits: dict[tuple[str, BlockSpec], int] = {}


@contextmanager
def exclusive_encoder(spec: EncoderSpec) -> Iterator[Any]:
    """Provide the model, and exclusive use of its device, to compute a block."""
    import torch

    model = get_encoder(spec)
    lock = _device_locks.setdefault(str(_device(model)), threading.Lock())
    retain_freed_memory()
    with lock, worker_torch_threads(), torch.inference_mode():
        yield model


def _device(model: Any) -> torch.device:
    device: torch.device = next(model.parameters()).device
    return device


def observed_windows(
    valid: np.ndarray, y: PixelRange, x: PixelRange, settings: BlockSpec, squares: Squares | None
) -> list[list[WindowPosition]]:
    """Return the windows of a block that have any observed pixel, grouped by shape.

    Windows do not overlap. With `squares`, only those that are needed are returned.
    """
    groups: dict[tuple[int, ...], list[WindowPosition]] = {}
    for i in spans(y, settings.tile, settings.side):
        for j in spans(x, settings.tile, settings.side):
            if squares is not None and not squares.meet(PixelRange(i.window, 1), PixelRange(j.window, 1)):
                continue
            if valid[:, i.pixels.slice_of(y), j.pixels.slice_of(x)].any():
                groups.setdefault((i.first_patch, i.n_patches, j.first_patch, j.n_patches), []).append((i, j))
    return list(groups.values())


def run_in_batches(
    groups: Iterable[list[WindowPosition]],
    run: Callable[[list[WindowPosition], torch.device], Sequence[torch.Tensor | None]],
    model: Any,
    settings: BlockSpec,
) -> Iterator[tuple[WindowPosition, tuple[Any, ...]]]:
    """Yield each window with the arrays that `run` computes for it.

    `run` receives windows of one shape, as many as fit into the memory of the device. Results are awaited one batch
    later, so that the next windows are prepared and sent while an accelerator computes.
    """
    import torch

    device, pending = _device(model), None
    for windows in groups:
        done = 0
        while done < len(windows):
            batch = _batch_limits.get((str(device), settings)) or _batch(settings, device)
            part, outputs = windows[done : done + batch], None
            try:
                outputs = run(part, device)
            except torch.OutOfMemoryError as error:
                reason = str(error).partition("\n")[0]
            if outputs is None:  # outside the except clause, where the error no longer holds tensors
                _shrink_batch(device, settings, len(part), reason)
                continue
            done += len(part)
            previous, pending = pending, _copy_to_host(part, outputs)
            if previous is not None:
                yield from previous()
    if pending is not None:
        yield from pending()


def _copy_to_host(
    windows: list[WindowPosition], outputs: Sequence[torch.Tensor | None]
) -> Callable[[], Iterator[tuple[WindowPosition, tuple[Any, ...]]]]:
    """Start to copy tensors (B, ...) to the host; the returned function waits for them and pairs them with windows."""
    import torch

    cuda = any(t is not None and t.is_cuda for t in outputs)
    copies = [None if t is None else t.to("cpu", non_blocking=cuda) for t in outputs]
    copied = torch.cuda.Event() if cuda else None
    if copied is not None:
        copied.record()

    def wait() -> Iterator[tuple[WindowPosition, tuple[Any, ...]]]:
        if copied is not None:
            copied.synchronize()
        arrays = [repeat(None) if t is None else t.numpy() for t in copies]
        return zip(windows, zip(*arrays, strict=False), strict=False)

    return wait


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
    """Return normalized pixels (B, T, 10, H, W), days (T,) and validity (B, T, H, W) of windows of one shape.

    Validity is None where everything was observed, so that the model does not have to query the device.
    """
    import torch

    crops = [_crop_window(frames, valid, stats, y, x, i, j, settings) for i, j in part]
    pixels, observed = (np.stack(arrays) for arrays in zip(*crops, strict=True))
    doy = torch.tensor(settings.doy)
    return (
        to_device(pixels, device),
        to_device(doy, device),
        None if observed.all() else to_device(observed, device),
    )


def to_device(array: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy an array to a device; to a GPU from pinned memory, without waiting."""
    import torch

    tensor = torch.as_tensor(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _shrink_batch(device: torch.device, settings: BlockSpec, windows: int, reason: str) -> None:
    """Halve the number of windows per forward pass on this device, which ran out of memory."""
    if windows == 1:
        raise DeviceError(
            f"{device} does not have enough memory for one window of {settings.tile} × {settings.tile} pixels and "
            f"{len(settings.doy)} frames ({reason}). Pass a smaller tile, a larger patch_size, fewer frames or "
            "precision='bfloat16', or stop other programs that use the device"
        )
    _batch_limits[str(device), settings] = windows // 2
    warn(
        f"{device} does not have enough memory for {windows} windows per forward pass ({reason}). It continues with "
        f"{windows // 2}, which changes nothing but rounding. Pass batch={windows // 2} to start with that number"
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
    """Return normalized pixels (T, 10, H, W) and validity (T, H, W) of one window, or of its part in the cube.

    H and W are whole patches; pixels outside the cube are zero and invalid.
    """
    at = np.s_[..., i.pixels.slice_of(y), j.pixels.slice_of(x)]
    observed = valid[at]
    pixels = normalize(clip(frames[at], observed), observed, settings.norm, stats)
    shape = [s.n_patches * settings.side for s in (i, j)]
    if shape == list(pixels.shape[2:]):
        return pixels, observed
    inside = np.s_[..., _padded_slice(i, settings), _padded_slice(j, settings)]
    padded = np.zeros((*pixels.shape[:2], *shape), np.float32)
    padded_observed = np.zeros((observed.shape[0], *shape), bool)
    padded[inside], padded_observed[inside] = pixels, observed
    return padded, padded_observed


def patches(span: Span, settings: BlockSpec) -> PixelRange:
    """Return the patches of a window that meet the cube, as a range of patches."""
    return PixelRange(span.window * (settings.stride // settings.side) + span.first_patch, span.n_patches)


def crop_to_cube(cells: np.ndarray, i: Span, j: Span, settings: BlockSpec) -> np.ndarray:
    """Return the pixels in the cube of cells (H, W, D), which cover the pixels of whole patches."""
    return cells[_padded_slice(i, settings), _padded_slice(j, settings)]


def _padded_slice(span: Span, settings: BlockSpec) -> slice:
    """Return the position of a span's pixels within its whole patches, which may extend beyond the cube."""
    start = span.start - span.window * settings.stride - span.first_patch * settings.side
    return slice(start, start + span.stop - span.start)


def call_model(
    model: Any,
    window: torch.Tensor,
    doy: torch.Tensor,
    valid: torch.Tensor | None,
    origin: tuple[int, int],
    settings: BlockSpec,
) -> torch.Tensor:
    """Run a batch of windows through our model, or through a module with upstream's signature."""
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
            f"a window has {window.shape[-2]} × {window.shape[-1]} pixels, {missing} of its observations "
            f"missing: the module passed as model= takes only complete windows of {side} × {side} pixels. Use "
            "model='base' with weights=PATH, which leaves missing observations out, or crop the cube to whole windows"
        )
    output = "dense" if settings.output == "local" else settings.output
    dates = doy[None].expand(len(window), -1)
    encoded = model(
        {S2.projector: window, f"{S2.projector}_dates": dates},
        patch_size=settings.side * int(S2.pixel_size),
        output=output,
    )
    return encoded[..., encoded.shape[-1] // 2 :] if settings.output == "local" else encoded


def _batch(settings: BlockSpec, device: torch.device) -> int:
    """Return the number of windows per forward pass.

    On a CPU it is one, which is as fast as more because the matrices of a window are already large, and keeps
    results bit-identical because the rows of a window never share a matrix with those of another. On a GPU it is
    the number that keeps it busy, if they fit into its free memory.
    """
    if device.type == "cpu":
        return 1
    if settings.batch:
        return settings.batch
    maximum = windows_at_once(settings.tile, device.type)
    if device.type != "cuda":  # other devices do not report their free memory
        return maximum
    free = FREE_SHARE * _free_bytes(device)
    return bisect_right(range(2, maximum + 1), free, key=lambda n: _forward_bytes(settings, n)) + 1


def _forward_bytes(settings: BlockSpec, windows: int) -> int:
    """Return the bytes that a forward pass of this many windows needs on an accelerator, in float32."""
    return working_bytes(
        settings.spec.size, settings.output, dates=len(settings.doy), side=settings.side, tile=settings.tile,
        windows=windows, rows=ACCELERATOR_ROWS,
    )  # fmt: skip


def _free_bytes(device: torch.device) -> int:
    """Return the bytes of a GPU that are free, or that torch caches for its next tensors."""
    import torch

    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def windows_at_once(tile: int, device: str) -> int:
    """Return the number of windows of `tile` pixels that keep a device of this type busy."""
    return 1 if device == "cpu" else max(1, (1 << 16) // tile**2)


def autocast_for(device: torch.device, spec: EncoderSpec) -> Any:
    """Return the autocast context of a user's module; an encoder from `get_encoder` already has its precision."""
    import torch

    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(spec.precision)
    enabled = dtype is not None and spec.source.kind == "module"
    return torch.autocast(device.type, dtype=dtype, enabled=enabled)

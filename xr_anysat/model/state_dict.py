"""State dicts: read them without running code, check every tensor, and cache the result."""

from __future__ import annotations

import json
import os
import pickle
import re
import stat
import uuid
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xr_anysat.errors import WeightsError
from xr_anysat.model.checkpoint import SAFE, cache_dir
from xr_anysat.model.spec import SENSORS, SIZES

if TYPE_CHECKING:
    import torch


MODELS = tuple(SIZES)

CONVERTER = "1"
"""Version of what `write_cached` writes. Raise it on a change; files of older versions are then rebuilt."""


def state_shapes(size: str, sensors: Collection[str] | None = None) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the state dict of a size, with the projectors of all or some sensors."""
    import torch

    from xr_anysat.model.anysat import AnySat

    with torch.device("meta"):
        state = AnySat(size, tuple(SENSORS if sensors is None else sensors)).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def read_pickled(path: Path) -> dict[str, torch.Tensor]:
    """Read the state dict in a file of `torch.save` with torch's safe reader, which creates only tensors."""
    import torch

    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # only the newer, zipped format can be mapped
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged file can raise anything
        script = "TorchScript" in str(error)
        if isinstance(error, pickle.UnpicklingError) or script:
            found = re.search(r"GLOBAL (\S+)", str(error))
            what = "a TorchScript program" if script else found.group(1) if found else "objects"
            raise WeightsError(
                f"the weights file {str(path)!r} contains code ({what}), not only tensors. Reading it could "
                "run any program, so it is refused. If you trust it, convert it to a safe file: "
                f"state = torch.load({path.name!r}, weights_only=False), then "
                "safetensors.torch.save_file(state['state_dict'], 'weights.safetensors'), and pass "
                "weights='weights.safetensors'."
            ) from error
        raise WeightsError(
            f"the weights file {str(path)!r} ({path.stat().st_size:,} bytes) is damaged or cut short, or "
            f"is not a file of torch.save ({type(error).__name__}: {error}). Download or copy it again."
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else loaded
    if not isinstance(state, Mapping):
        raise WeightsError(
            f"the weights file {str(path)!r} holds a {type(state).__name__}; expected a state dict, or a "
            "dict with one under 'state_dict', as torch.save({'state_dict': model.state_dict()}, PATH) writes"
        )
    others = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise WeightsError(
            f"the weights file {str(path)!r} holds {_few(others)} besides or instead of tensors; expected a "
            "state dict, or a dict with one under 'state_dict'"
        )
    return {str(name): tensor.detach() for name, tensor in state.items()}


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"the weights file {str(path)!r} ({path.stat().st_size:,} bytes) is damaged or cut short, or "
            f"is not a safetensors file ({error}). Download or copy it again."
        ) from error


def checkpoint_names(names: Iterable[str]) -> dict[str, str]:
    """Map the names of a state dict to the checkpoint's.

    Upstream's hub module holds the model as ``.model`` and its spatial encoder a second time. Its state
    dict has every name as ``model.<name>``, and the spatial encoder also as ``spatial_encoder.<...>``.

    Parameters
    ----------
    names : iterable of str
        Names in the file.

    Returns
    -------
    dict of str to str
        Name in the file to name in the checkpoint. Second copies are left out; names that are not those
        of the hub module are unchanged.

    Examples
    --------
    >>> checkpoint_names(["model.cls_token", "model.spatial_encoder.a", "spatial_encoder.a"])
    {'model.cls_token': 'cls_token', 'model.spatial_encoder.a': 'spatial_encoder.a'}
    >>> checkpoint_names(["cls_token"])
    {'cls_token': 'cls_token'}
    """
    names = list(names)
    within = {name for name in names if name.startswith("model.")}
    return {
        name: name.removeprefix("model.")
        for name in names
        if not (name.startswith("spatial_encoder.") and f"model.{name}" in within)
    }


def checked_state(raw: Mapping[str, torch.Tensor], size: str, path: Path) -> dict[str, torch.Tensor]:
    """Check that a file holds exactly the whole checkpoint, and copy it to float32 tensors."""
    import torch

    new_names = checkpoint_names(raw)
    for name in set(raw) - set(new_names):
        if not torch.equal(raw[name], raw[f"model.{name}"]):
            raise WeightsError(
                f"the weights file {str(path)!r} holds {name!r} and {f'model.{name}'!r} with different "
                "values. Save the state dict of the hub module's .model alone."
            )
    found = {new_names[name]: raw[name] for name in new_names}
    _check_shapes({name: tuple(tensor.shape) for name, tensor in found.items()}, size, path)
    state = {}
    for name, tensor in found.items():
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise WeightsError(
                f"{name!r} in the weights file {str(path)!r} is {tensor.dtype}; expected float32, float16 "
                "or bfloat16. Convert it with .float() and save it again."
            )
        # A copy, because the file may be overwritten in place while it is mapped.
        state[name] = tensor.to(torch.float32, copy=True).contiguous()
        if not torch.isfinite(state[name]).all():
            bad = int((~torch.isfinite(state[name])).sum())
            raise WeightsError(
                f"{name!r} in the weights file {str(path)!r} holds {bad} values that are not finite; every "
                "embedding would be NaN. Download or copy the file again, or use a checkpoint from before "
                "training diverged."
            )
    return state


def _check_shapes(seen: Mapping[str, tuple[int, ...]], size: str, path: Path) -> None:
    """Raise a WeightsError that names the difference, unless names and shapes are exactly those of a size."""
    expected = state_shapes(size)
    if seen == expected:
        return
    for other in MODELS:
        if other != size and seen == state_shapes(other):
            raise WeightsError(
                f"the weights file {str(path)!r} is a {other!r} checkpoint, and model={size!r} was "
                f"requested: pass model={other!r}"
            )
    faults = []
    missing = [name for name in expected if name not in seen]
    if missing:
        faults.append(f"{len(missing)} of {len(expected)} tensors are missing ({_few(missing)})")
    unknown = [name for name in seen if name not in expected]
    if unknown:
        faults.append(f"{len(unknown)} are unknown ({_few(unknown)})")
    differing = [name for name in expected if name in seen and seen[name] != expected[name]]
    if differing:
        shapes = "; ".join(f"{name!r} {seen[name]}, expected {expected[name]}" for name in differing[:3])
        faults.append(f"{len(differing)} have another shape ({shapes}{'; …' if len(differing) > 3 else ''})")
    raise WeightsError(
        f"the weights file {str(path)!r} is not an AnySat {size!r} checkpoint: {', '.join(faults)}. Expected "
        "the whole checkpoint, with the projectors of all sensors, as the state dict of load_model() has it."
    )


def _few(names: Collection[Any]) -> str:
    """Show the first three names."""
    first = ", ".join(repr(name) for name in list(names)[:3])
    return first if len(names) <= 3 else f"{first}, …"


def cached_file(sha256: str) -> Path:
    """Return the path of the cached tensors of a checkpoint, which need not exist."""
    return cache_dir() / f"{sha256}{SAFE}"


def _crc32(tensor: torch.Tensor) -> int:
    import torch

    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)


def read_cached(
    path: Path, sha256: str, expected: Mapping[str, tuple[int, ...]]
) -> dict[str, torch.Tensor] | None:
    """Map the expected tensors of a cached file; None if it is missing, incomplete or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("source_sha256") != sha256 or about.get("converter") != CONVERTER:
                return None
            sums = json.loads(about["crc32"])
            state = {name: file.get_tensor(name) for name in expected}
    except (SafetensorError, OSError, KeyError, ValueError):
        return None
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape or _crc32(state[name]) != sums.get(name):
            return None
    return state


def write_cached(state: Mapping[str, torch.Tensor], path: Path, sha256: str) -> None:
    """Cache checked tensors for later processes; raise OSError if they cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    about = {
        "format": "pt",
        "source_sha256": sha256,
        "converter": CONVERTER,
        "crc32": json.dumps({name: _crc32(tensor) for name, tensor in state.items()}),
    }
    with new_file(path) as draft:
        try:
            save_file(dict(state), draft, about)
        except SafetensorError as error:  # raised, for example, on a full disk
            raise OSError(str(error)) from error


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file, which is renamed to `path` if the block succeeds, else deleted.

    The temporary file is in the same folder, so that renaming is atomic, and has a unique name, so that
    processes do not disturb each other.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.stem}-{uuid.uuid4().hex}.tmp")
    try:
        yield draft
        # some writers make the file private; give it the read and write permissions of the folder
        draft.chmod(stat.S_IMODE(path.parent.stat().st_mode) & 0o666)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)

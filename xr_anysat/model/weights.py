"""Weights: where they come from, how they are checked, and the one encoder that a process holds.

A graph carries an :class:`EncoderSpec`, never a module: a few hundred bytes that name the weights
and pin their sha256. `encoder_spec` makes one without torch, `get_encoder` turns one into a module,
once a process. In between, a checkpoint is read without running any code of it, every name, shape
and value is accounted for, and what was read from a pickle is kept as a safetensors file in the
cache folder, which the processes of a machine map and share. That file is named by the sha256 of the
checkpoint it was made of, and is looked for before the checkpoint itself: so the weights that a spec
pins are found on a machine that has only what `xr_anysat.distributed.prepare` put there.
"""

from __future__ import annotations

import re
import threading
import uuid
import weakref
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xr_anysat.config import DEVICE, MODEL, option
from xr_anysat.errors import DeviceError, OptionError, WeightsError, warn
from xr_anysat.model.checkpoint import (
    OFFICIAL,
    PREPARE_HINT,
    SAFE,
    cache_dir,
    check_file,
    file_sha256,
    official_path,
)
from xr_anysat.model.random_weights import random_sha256, random_state
from xr_anysat.model.source import WeightsSource
from xr_anysat.model.spec import SENSORS, SIZES
from xr_anysat.model.state_dict import (
    MODELS,
    cached_file,
    checked_state,
    read_cached,
    read_pickled,
    read_safetensors,
    state_shapes,
    write_cached,
)
from xr_anysat.shared.values import check_choice

if TYPE_CHECKING:
    import torch

    from xr_anysat.model.anysat import AnySat

PRECISIONS = ("float32", "bfloat16", "float16", "int8")

ENCODED = ("s2",)  # the sensors that `get_encoder` has the projectors of


@dataclass(frozen=True)
class EncoderSpec:
    """Which encoder, on which device: what a dask graph carries in place of a module.

    Attributes
    ----------
    size : {"tiny", "small", "base"}
        The model's size.
    source : WeightsSource
        Where the weights come from.
    sha256 : str or None
        Hash of the weights' file; for random weights, hash of their recipe (version, size, seed).
        None if it is not known yet (the official checkpoint before its download) or does not exist
        (a module object).
    device : str
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:<n>"`` or ``"mps"``, resolved where the encoder runs.
    precision : {"float32", "bfloat16", "float16", "int8"}
        Precision of matrix products; norms, softmaxes and results are float32.
    """

    size: str
    source: WeightsSource
    sha256: str | None
    device: str
    precision: str


def encoder_spec(
    model: Any = "base", weights: Any = None, device: str = "auto", precision: str = "float32"
) -> EncoderSpec:
    """Name an encoder, checking all that can be checked without loading it (and without torch).

    Parameters
    ----------
    model : {"base", "small", "tiny"} or torch.nn.Module
        A size, or a module that is called as upstream's hub module is. A module stays in this
        process, and has to be kept alive by its owner.
    weights : None, path, "random" or ("random", seed)
        None or ``"official"`` is the published checkpoint. A path is a file of `torch.save` or of
        safetensors that holds the whole checkpoint of that size; it is hashed here.
    device : str
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:<n>"`` or ``"mps"``. Whether it is there is known
        where the encoder runs.
    precision : {"float32", "bfloat16", "float16", "int8"}
        What products of matrices are computed in; ``"int8"`` is for CPUs, and not for a module.

    Returns
    -------
    EncoderSpec
        Hashable and picklable.

    Raises
    ------
    OptionError
        If an argument has an impossible value.
    WeightsError
        If the weights' file is missing, too small or not what its name says, or if there is no
        official checkpoint of that size.

    Examples
    --------
    >>> spec = encoder_spec("tiny", weights=("random", 7), device="cpu")
    >>> str(spec.source), spec.sha256[:12]
    ('random:7', 'db38df4b9c15')
    """
    if not isinstance(device, str) or not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        raise OptionError(f"{device=}: wanted 'auto', 'cpu', 'cuda', 'cuda:<n>' or 'mps'")
    check_choice("precision", precision, PRECISIONS)
    # str() makes plain strings of the defaults in xr_anysat.config, which are a subclass
    device, precision = str(device), str(precision)
    if not isinstance(model, str):
        if weights is not None:
            raise OptionError(
                f"{weights=} and a module object as model: a module holds its weights already. Pass "
                "weights with model='base', 'small' or 'tiny', or leave weights out."
            )
        if precision == "int8":
            raise OptionError(
                f"{precision=} and a module object as model: a module's layers are its own, and only ours have "
                "products in 8 bits. Pass model='base' with weights=PATH, or precision='bfloat16'"
            )
        return EncoderSpec(_size_of(model), _register(model), None, device, precision)
    check_choice("model", model, MODELS, ", or an AnySat module")
    source, sha256 = _source(str(model), weights)
    return EncoderSpec(str(model), source, sha256, device, precision)


def _source(size: str, weights: Any) -> tuple[WeightsSource, str | None]:
    """Return the `source` and the `sha256` of a spec."""
    source = WeightsSource.from_option(weights)
    if source.kind == "random":
        return source, random_sha256(size, source.seed)
    if source.kind == "file":
        check_file(source.path)
        return source, file_sha256(source.path)
    if size != OFFICIAL.model:
        raise WeightsError(
            f"there is no official checkpoint of model={size!r}, only of {OFFICIAL.model!r}: pass "
            f"model={OFFICIAL.model!r}, or your own weights=PATH, or weights='random'"
        )
    path = official_path(download=False)
    return source, None if path is None else file_sha256(path)


def weights_file(spec: EncoderSpec) -> Path:
    """Find the file of an official or a path spec on this machine: still the one that the spec pins."""
    if spec.source.kind == "official":
        path = official_path()
        assert path is not None  # it is downloaded, or that raised
    else:
        path = spec.source.path
        kept = f"Nor has its cache folder {str(cache_dir())!r} {spec.sha256}{SAFE}, which is made of it."
        check_file(path, missing=f"{kept} Put the file there. {PREPARE_HINT}")
    seen = file_sha256(path)
    if spec.sha256 not in (None, seen):
        raise WeightsError(
            f"the weights file {str(path)!r} is not the one that this was planned with: its sha256 is "
            f"{seen}, wanted {spec.sha256}. Put the old file back, or make the embeddings anew with "
            f"weights={str(path)!r}. {PREPARE_HINT}"
        )
    return path


def with_known_hash(spec: EncoderSpec) -> EncoderSpec:
    """Give an official spec the sha256 that it lacks where it was made before the checkpoint was there.

    A kept file that has the known ends of the official hash tells it, else the checkpoint itself, which
    is downloaded if need be. Any other spec stays as it is.
    """
    if spec.source.kind != "official" or spec.sha256 is not None:
        return spec
    kept = cache_dir().glob(f"{OFFICIAL.sha256_prefix}*{OFFICIAL.sha256_suffix}{SAFE}")
    names = [path.stem for path in kept if len(path.stem) == 64]
    return replace(spec, sha256=names[0] if names else file_sha256(weights_file(spec)))


def is_available_offline(spec: EncoderSpec) -> bool:
    """Tell whether `get_encoder` finds the weights of a pinned spec without a network."""
    if spec.source.kind == "random" or _key(spec) in _loaded or is_cached(spec):
        return True
    try:
        if spec.source.kind == "official" and official_path(download=False) is None:
            return False
        weights_file(spec)
    except WeightsError:
        return False
    return True


# ---------------------------------------------------------------------------- states


def load_state(spec: EncoderSpec, sensors: Collection[str] | None = None) -> dict[str, torch.Tensor]:
    """Load the float32 tensors that a spec names, all checked, under the checkpoint's names.

    Parameters
    ----------
    spec : EncoderSpec
        Of any source but a module.
    sensors : collection of str, optional
        Sensors whose projectors are wanted; None is all eleven.

    Returns
    -------
    dict of str to Tensor
        On the CPU, read-only in spirit: they may be mapped from a file.

    Raises
    ------
    WeightsError
        If the weights are not on this machine, or the file is changed, damaged, not exactly the
        checkpoint of that size, or holds code or values that are not finite.
    """
    if spec.source.kind == "random":
        return random_state(spec.size, spec.source.seed, sensors)
    spec = with_known_hash(spec)
    assert spec.sha256 is not None  # only a module has none
    wanted = state_shapes(spec.size, sensors)
    kept = read_cached(cached_file(spec.sha256), spec.sha256, wanted)
    if kept is not None:
        return kept
    path = weights_file(spec)
    if path.suffix.lower() == SAFE:
        state = checked_state(read_safetensors(path), spec.size, path)
        return {name: state[name] for name in wanted}
    state = checked_state(read_pickled(path), spec.size, path)
    try:
        write_cached(state, cached_file(spec.sha256), spec.sha256)
    except OSError as error:
        warn(
            f"the converted weights could not be kept at {str(cached_file(spec.sha256))!r} ({error}), so every "
            "process reads and checks the checkpoint anew. Set a folder that can be written: "
            "xr_anysat.config.set(cache_dir=PATH) or XR_ANYSAT_CACHE_DIR=PATH."
        )
    # Read back, so that the first process too maps what the others map.
    kept = read_cached(cached_file(spec.sha256), spec.sha256, wanted)
    return {name: state[name] for name in wanted} if kept is None else kept


def is_cached(spec: EncoderSpec, path: Path | None = None) -> bool:
    """Tell whether a file holds all tensors of a pinned spec's encoder; the kept one if not said."""
    assert spec.sha256 is not None
    path = cached_file(spec.sha256) if path is None else path
    return read_cached(path, spec.sha256, state_shapes(spec.size, ENCODED)) is not None


# ---------------------------------------------------------------------------- encoders


def resolve_device(device: str) -> torch.device:
    """Find the device that a spec's `device` is on this machine.

    Parameters
    ----------
    device : str
        As in `EncoderSpec`; ``"auto"`` is the GPU if PyTorch sees one, else the CPU.

    Returns
    -------
    torch.device
        With its index, where it is a GPU.

    Raises
    ------
    DeviceError
        If it is not there.

    Examples
    --------
    >>> resolve_device("cpu")
    device(type='cpu')
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = ["cpu", *(f"cuda:{i}" for i in range(gpus))]
    if torch.backends.mps.is_available():
        there.append("mps")
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    if device == "cuda" and gpus:
        device = f"cuda:{torch.cuda.current_device()}"
    if device not in there:
        raise DeviceError(
            f"device={device!r} was asked for, but PyTorch {torch.__version__} sees only "
            f"{', '.join(there)} on this machine. Pass device='auto' or device='cpu'."
        )
    return torch.device(device)


_modules: weakref.WeakValueDictionary[WeightsSource, Any] = weakref.WeakValueDictionary()

_registered: set[WeightsSource] = set()  # every source that `_register` gave out in this process


def _size_of(module: Any) -> str:
    """Tell the size of an AnySat module, ours or upstream's, by the width of its cls token."""
    if not (callable(module) and callable(getattr(module, "state_dict", None))):
        check_choice("model", module, MODELS, ", or an AnySat module")  # always raises: it is no string
    widths = {
        int(tensor.shape[-1])
        for name, tensor in module.state_dict().items()
        if name.rpartition(".")[2] == "cls_token"
    }
    for name, size in SIZES.items():
        if widths == {size.dim}:
            return name
    raise OptionError(
        f"model is a {type(module).__name__} with cls tokens of width {sorted(widths) or 'none'}; wanted an "
        f"AnySat module, of width {', '.join(str(size.dim) for size in SIZES.values())}"
    )


def _register(module: Any) -> WeightsSource:
    """Give a module a `source`, a new one each time, for its weights may have changed in between."""
    source = WeightsSource("module", uuid.uuid4().hex)
    _modules[source] = module
    _registered.add(source)
    return source


def _registered_module(spec: EncoderSpec) -> torch.nn.Module:
    module: torch.nn.Module | None = _modules.get(spec.source)
    if module is None:
        what = (
            "the module that was passed as model is gone: keep a variable that holds it until the "
            "embeddings are computed"
            if spec.source in _registered
            else "a module that is passed as model lives in one process only, and this is another one"
        )
        raise WeightsError(
            f"{what}; or save its weights, torch.save(model.state_dict(), PATH), and pass "
            f"model={spec.size!r}, weights=PATH, which works in every process"
        )
    if spec.device != "auto":
        wanted = resolve_device(spec.device)
        tensor = next(iter(module.parameters()), None)
        if tensor is not None and tensor.device != wanted:
            raise DeviceError(
                f"the module that was passed as model is on {str(tensor.device)!r}, and device="
                f"{spec.device!r} was asked for. Call model.to({str(wanted)!r}) or leave device out."
            )
    return module.eval()


@dataclass(frozen=True)
class _Loaded:
    encoder: AnySat
    sha256: str | None


_registry_lock = threading.Lock()  # of the two dicts, held for a moment only

_locks: dict[EncoderSpec, threading.Lock] = {}

_loaded: dict[EncoderSpec, _Loaded] = {}


def get_encoder(spec: EncoderSpec) -> torch.nn.Module:
    """Load the encoder that a spec names, once a process.

    Parameters
    ----------
    spec : EncoderSpec
        Of `encoder_spec`, in this process or another.

    Returns
    -------
    torch.nn.Module
        An `AnySat` of the S2 projector alone, in eval mode, without gradients, on the device, packed
        for the precision (`AnySat.pack`). Or the registered module, put into eval mode: upstream's is
        born in train mode, where dropout would change the results.

    Raises
    ------
    WeightsError
        If the weights are missing or are not those of the spec. It is tried again the next time.
    DeviceError
        If the device is not on this machine.
    """
    if spec.source.kind == "module":
        return _registered_module(spec)
    key = _key(spec)
    with _registry_lock:
        lock = _locks.setdefault(key, threading.Lock())
    with lock:  # one a spec, so that nobody waits for somebody else's weights
        if key not in _loaded:
            known = with_known_hash(spec)
            encoder = _build(known, ENCODED).to(key.device).pack(spec.precision)
            _loaded[key] = _Loaded(encoder, known.sha256)
        return _loaded[key].encoder


def _key(spec: EncoderSpec) -> EncoderSpec:
    """Keep what tells encoders apart: not whether the official hash was known."""
    sha256 = None if spec.source.kind == "official" else spec.sha256
    return replace(spec, sha256=sha256, device=str(resolve_device(spec.device)))


def _build(spec: EncoderSpec, sensors: Collection[str] | None) -> AnySat:
    """Build a model of the spec's weights, on the CPU, in eval mode."""
    import torch

    from xr_anysat.model.anysat import AnySat

    state = load_state(spec, sensors)
    with torch.device("meta"):  # no memory and no initialization: every tensor is assigned
        model = AnySat(spec.size, tuple(SENSORS if sensors is None else sensors))
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def loaded_sha256(spec: EncoderSpec) -> str | None:
    """Tell the full sha256 of the weights that `get_encoder` loaded.

    Parameters
    ----------
    spec : EncoderSpec
        A spec.

    Returns
    -------
    str or None
        The spec's own where it has one. None for a module object, and for an official checkpoint
        that this process has not loaded.
    """
    if spec.sha256 is not None or spec.source.kind == "module":
        return spec.sha256
    loaded = _loaded.get(_key(spec))
    return None if loaded is None else loaded.sha256


def device_of(spec: EncoderSpec) -> str:
    """The device that a loaded model is on."""
    return str(next(get_encoder(spec).parameters()).device)


def load_model(model: str = MODEL, *, weights: Any = None, device: str = DEVICE) -> AnySat:
    """Load the whole model, with the projectors of all sensors: a drop-in for upstream's hub module.

    Parameters
    ----------
    model : {"base", "small", "tiny"}
        Size (option ``model``).
    weights : None, path, "random" or ("random", seed)
        None is the official checkpoint (option ``weights``).
    device : str
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:<n>"`` or ``"mps"`` (option ``device``).

    Returns
    -------
    AnySat
        In eval mode. Its state dict has the checkpoint's own names. A new object at every call.

    Raises
    ------
    OptionError
        If an argument has an impossible value.
    WeightsError
        If the weights are missing, damaged, unsafe, or those of another model.
    DeviceError
        If the device is not on this machine.

    Examples
    --------
    >>> import torch
    >>> m = load_model("tiny", weights="random", device="cpu")
    >>> x = {"s2": torch.zeros(1, 2, 10, 4, 4), "s2_dates": torch.tensor([[10, 200]])}
    >>> m(x, patch_size=20, output="tile").shape
    torch.Size([1, 256])
    """
    size = option("model", model)
    if not isinstance(size, str):
        raise OptionError(f"model={type(size).__name__}: wanted one of {', '.join(map(repr, MODELS))}")
    spec = encoder_spec(size, option("weights", weights), option("device", device))
    where = resolve_device(spec.device)  # before half a gigabyte is read
    return _build(spec, None).to(where)

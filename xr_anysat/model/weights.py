"""Encoders: their specification, how their weights are loaded, and the one instance that a process holds.

A graph carries an :class:`EncoderSpec`, never a module: a few hundred bytes that name the weights
and their sha256. `encoder_spec` makes one without torch; `get_encoder` loads the module, once per
process. A checkpoint is read without running any code in it, and every name, shape and value is
checked. The tensors of a pickled checkpoint are then cached as a safetensors file, which the processes
of a machine map and share. The cached file is named by the sha256 of its checkpoint and is
looked up before the checkpoint itself. A worker that has only the file that
`xr_anysat.distributed.prepare` sent therefore finds its weights.
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
from xr_anysat.shared.sensor import S2
from xr_anysat.shared.values import check_choice

if TYPE_CHECKING:
    import torch

    from xr_anysat.model.anysat import AnySat

PRECISIONS = ("float32", "bfloat16", "float16", "int8")

ENCODED = (S2.projector,)
"""Sensors whose projectors `get_encoder` loads."""


@dataclass(frozen=True)
class EncoderSpec:
    """Which encoder, on which device; a dask graph carries this instead of a module.

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
    """Specify an encoder, and check everything that needs neither torch nor the weights' contents.

    Parameters
    ----------
    model : {"base", "small", "tiny"} or torch.nn.Module
        A size, or a module with the call signature of upstream's hub module. A module stays in this
        process, and the caller must keep it alive.
    weights : None, path, "random" or ("random", seed)
        None or ``"official"`` is the published checkpoint. A path is a file of `torch.save` or
        safetensors with the whole checkpoint of that size; it is hashed here.
    device : str
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:<n>"`` or ``"mps"``. Whether the device exists is
        checked where the encoder runs.
    precision : {"float32", "bfloat16", "float16", "int8"}
        Precision of matrix products; ``"int8"`` is for CPUs, and not for a module.

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
        raise OptionError(f"{device=}: expected 'auto', 'cpu', 'cuda', 'cuda:<n>' or 'mps'")
    check_choice("precision", precision, PRECISIONS)
    # the defaults in xr_anysat.config are a subclass of str; str() makes them plain
    device, precision = str(device), str(precision)
    if not isinstance(model, str):
        if weights is not None:
            raise OptionError(
                f"{weights=} and a module object as model: a module holds its weights already. Pass "
                "weights with model='base', 'small' or 'tiny', or leave weights out."
            )
        if precision == "int8":
            raise OptionError(
                f"{precision=} and a module object as model: only the layers of xr_anysat have products in 8 bits. "
                "Pass model='base' with weights=PATH, or precision='bfloat16'"
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
    """Find the file of an official or a file spec, and check that its hash is still that of the spec."""
    if spec.source.kind == "official":
        path = official_path()
        assert path is not None  # it was downloaded, or an error was raised
    else:
        path = spec.source.path
        cached = f"Its cached copy {spec.sha256}{SAFE} is not in {str(cache_dir())!r} either."
        check_file(path, missing=f"{cached} Put the file there. {PREPARE_HINT}")
    seen = file_sha256(path)
    if spec.sha256 not in (None, seen):
        raise WeightsError(
            f"the weights file {str(path)!r} has changed since the embedding was planned: its sha256 is "
            f"{seen}, expected {spec.sha256}. Put the old file back, or call embed again with "
            f"weights={str(path)!r}. {PREPARE_HINT}"
        )
    return path


def with_known_hash(spec: EncoderSpec) -> EncoderSpec:
    """Add the sha256 to an official spec that was created before the checkpoint was available.

    It comes from the name of a cached file with the known ends of the official hash, or else from the
    checkpoint itself, which is downloaded if necessary. Any other spec is returned unchanged.
    """
    if spec.source.kind != "official" or spec.sha256 is not None:
        return spec
    cached = cache_dir().glob(f"{OFFICIAL.sha256_prefix}*{OFFICIAL.sha256_suffix}{SAFE}")
    names = [path.stem for path in cached if len(path.stem) == 64]
    return replace(spec, sha256=names[0] if names else file_sha256(weights_file(spec)))


def is_available_offline(spec: EncoderSpec) -> bool:
    """Whether `get_encoder` finds the weights of a spec with a known hash without a network."""
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
    """Load and check the float32 tensors that a spec names, under the checkpoint's names.

    Parameters
    ----------
    spec : EncoderSpec
        Of any source except a module.
    sensors : collection of str, optional
        Sensors whose projectors are included; None means all eleven.

    Returns
    -------
    dict of str to Tensor
        On the CPU. Do not write to them: they may be mapped from a file.

    Raises
    ------
    WeightsError
        If the weights are not on this machine, or the file has changed, is damaged, is not exactly the
        checkpoint of that size, or contains code or values that are not finite.
    """
    if spec.source.kind == "random":
        return random_state(spec.size, spec.source.seed, sensors)
    spec = with_known_hash(spec)
    assert spec.sha256 is not None  # only a module has no hash
    expected = state_shapes(spec.size, sensors)
    cached = read_cached(cached_file(spec.sha256), spec.sha256, expected)
    if cached is not None:
        return cached
    path = weights_file(spec)
    if path.suffix.lower() == SAFE:
        state = checked_state(read_safetensors(path), spec.size, path)
        return {name: state[name] for name in expected}
    state = checked_state(read_pickled(path), spec.size, path)
    try:
        write_cached(state, cached_file(spec.sha256), spec.sha256)
    except OSError as error:
        warn(
            f"the converted weights could not be cached at {str(cached_file(spec.sha256))!r} ({error}), so every "
            "process reads and checks the checkpoint again. Set a writable folder: "
            "xr_anysat.config.set(cache_dir=PATH) or XR_ANYSAT_CACHE_DIR=PATH."
        )
    # Read back, so that the first process maps the same file as the others.
    cached = read_cached(cached_file(spec.sha256), spec.sha256, expected)
    return {name: state[name] for name in expected} if cached is None else cached


def is_cached(spec: EncoderSpec, path: Path | None = None) -> bool:
    """Whether a file (default: the cached file) holds all tensors of the encoder of a spec with a known hash."""
    assert spec.sha256 is not None
    path = cached_file(spec.sha256) if path is None else path
    return read_cached(path, spec.sha256, state_shapes(spec.size, ENCODED)) is not None


# ---------------------------------------------------------------------------- encoders


def resolve_device(device: str) -> torch.device:
    """Resolve the `device` of a spec to a device of this machine.

    Parameters
    ----------
    device : str
        As in `EncoderSpec`; ``"auto"`` is the GPU if PyTorch sees one, else the CPU.

    Returns
    -------
    torch.device
        With its index if it is a GPU.

    Raises
    ------
    DeviceError
        If this machine does not have it.

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
            f"device={device!r} was requested, but PyTorch {torch.__version__} sees only "
            f"{', '.join(there)} on this machine. Pass device='auto' or device='cpu'."
        )
    return torch.device(device)


_modules: weakref.WeakValueDictionary[WeightsSource, Any] = weakref.WeakValueDictionary()

_registered: set[WeightsSource] = set()  # every source that `_register` returned in this process


def _size_of(module: Any) -> str:
    """Infer the size of an AnySat module, ours or upstream's, from the width of its cls token."""
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
        f"model is a {type(module).__name__} with cls tokens of width {sorted(widths) or 'none'}; expected an "
        f"AnySat module, of width {', '.join(str(size.dim) for size in SIZES.values())}"
    )


def _register(module: Any) -> WeightsSource:
    """Register a module under a new `source` each time, because its weights may have changed since."""
    source = WeightsSource("module", uuid.uuid4().hex)
    _modules[source] = module
    _registered.add(source)
    return source


def _registered_module(spec: EncoderSpec) -> torch.nn.Module:
    module: torch.nn.Module | None = _modules.get(spec.source)
    if module is None:
        what = (
            "the module that was passed as model no longer exists: keep a reference to it until the "
            "embeddings are computed"
            if spec.source in _registered
            else "a module that is passed as model lives in one process only, and this is another one"
        )
        raise WeightsError(
            f"{what}; or save its weights, torch.save(model.state_dict(), PATH), and pass "
            f"model={spec.size!r}, weights=PATH, which works in every process"
        )
    if spec.device != "auto":
        expected = resolve_device(spec.device)
        tensor = next(iter(module.parameters()), None)
        if tensor is not None and tensor.device != expected:
            raise DeviceError(
                f"the module that was passed as model is on {str(tensor.device)!r}, and device="
                f"{spec.device!r} was requested. Call model.to({str(expected)!r}) or leave device out."
            )
    return module.eval()


@dataclass(frozen=True)
class _Loaded:
    encoder: AnySat
    sha256: str | None


_registry_lock = threading.Lock()  # guards the two dicts, held only briefly

_locks: dict[EncoderSpec, threading.Lock] = {}

_loaded: dict[EncoderSpec, _Loaded] = {}


def get_encoder(spec: EncoderSpec) -> torch.nn.Module:
    """Load the encoder that a spec names, once per process.

    Parameters
    ----------
    spec : EncoderSpec
        Created by `encoder_spec`, in this process or another.

    Returns
    -------
    torch.nn.Module
        An `AnySat` with only the S2 projector, in eval mode, without gradients, on the device, packed
        for the precision (`AnySat.pack`). Or the registered module, set to eval mode: upstream's is
        created in train mode, in which dropout would change the results.

    Raises
    ------
    WeightsError
        If the weights are missing or are not those of the spec. The next call tries again.
    DeviceError
        If the device is not on this machine.
    """
    if spec.source.kind == "module":
        return _registered_module(spec)
    key = _key(spec)
    with _registry_lock:
        lock = _locks.setdefault(key, threading.Lock())
    with lock:  # one per spec, so that no thread waits for the weights of another spec
        if key not in _loaded:
            known = with_known_hash(spec)
            encoder = _build(known, ENCODED).to(key.device).pack(spec.precision)
            _loaded[key] = _Loaded(encoder, known.sha256)
        return _loaded[key].encoder


def _key(spec: EncoderSpec) -> EncoderSpec:
    """Reduce a spec to what distinguishes encoders; whether the official hash was known does not."""
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
    """Return the full sha256 of the weights that `get_encoder` loaded.

    Parameters
    ----------
    spec : EncoderSpec
        A spec.

    Returns
    -------
    str or None
        The spec's own if it has one. None for a module object, and for an official checkpoint
        that this process has not loaded.
    """
    if spec.sha256 is not None or spec.source.kind == "module":
        return spec.sha256
    loaded = _loaded.get(_key(spec))
    return None if loaded is None else loaded.sha256


def device_of(spec: EncoderSpec) -> str:
    """Load an encoder if necessary, and return its device as text."""
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
        In eval mode. Its state dict has the checkpoint's own names. Each call returns a new object.

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
        raise OptionError(f"model={type(size).__name__}: expected one of {', '.join(map(repr, MODELS))}")
    spec = encoder_spec(size, option("weights", weights), option("device", device))
    where = resolve_device(spec.device)  # fail before half a gigabyte is read
    return _build(spec, None).to(where)

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

import hashlib
import json
import os
import pickle
import re
import stat
import threading
import uuid
import weakref
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs

from xr_anysat.config import DEFAULTS, DEVICE, MODEL, option
from xr_anysat.errors import DeviceError, OptionError, WeightsError, warn
from xr_anysat.model.spec import SENSORS, SIZES

# torch, safetensors and huggingface_hub are imported where they are used: a graph is built without them.
if TYPE_CHECKING:
    import torch

    from xr_anysat.model.anysat import AnySat

MODELS = tuple(SIZES)
PRECISIONS = ("float32", "bfloat16", "float16", "int8")
PICKLED = (".pth", ".pt", ".ckpt", ".bin")  # what torch.save writes, by the names in use
SAFE = ".safetensors"

CONVERTER = "1"  # raise it when what `write_kept` writes changes: older files are then rebuilt
RECIPE = 1  # raise it when `random_state` changes
SMALLEST = 100_000  # bytes; no AnySat checkpoint is smaller
ENCODED = ("s2",)  # the sensors that `get_encoder` has the projectors of
TO_WORKERS = (
    "On a dask cluster, xr_anysat.distributed.prepare(client, embedding) sends the weights to every worker."
)


@dataclass(frozen=True)
class Official:
    """The published checkpoint, as far as it is known: its sha256 by both ends."""

    repo: str = "g-astruc/AnySat"
    filename: str = "models/AnySat.pth"
    model: str = "base"
    sha256_prefix: str = "ce124652"
    sha256_suffix: str = "3d4f"
    min_bytes: int = 500_000_000  # it holds 504 MB

    def has(self, sha256: str) -> bool:
        """Whether `sha256` is its hash, as far as that is known."""
        return sha256.startswith(self.sha256_prefix) and sha256.endswith(self.sha256_suffix)


OFFICIAL = Official()


@dataclass(frozen=True)
class EncoderSpec:
    """Which encoder, on which device: what a dask graph carries in place of a module.

    Attributes
    ----------
    size : {"tiny", "small", "base"}
        The model's size.
    source : str
        ``"official"``, ``"random:<seed>"``, the absolute path of a file, or ``"module:<token>"``
        for a module object of this process.
    sha256 : str or None
        Hash of the weights' file; for random weights that of the recipe that makes them. None
        where it is not known yet (the official checkpoint before its download) or does not exist
        (a module object).
    device : str
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:<n>"`` or ``"mps"``, resolved where the encoder runs.
    precision : {"float32", "bfloat16", "float16", "int8"}
        What products of matrices are computed in; norms, softmaxes and results are float32.
    """

    size: str
    source: str
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
    >>> spec.source, spec.sha256[:12]
    ('random:7', 'db38df4b9c15')
    """
    if not isinstance(device, str) or not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        raise OptionError(f"{device=}: wanted 'auto', 'cpu', 'cuda', 'cuda:<n>' or 'mps'")
    if precision not in PRECISIONS:
        raise OptionError(f"{precision=}: wanted one of {', '.join(map(repr, PRECISIONS))}")
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
    if model not in MODELS:
        raise OptionError(f"{model=}: wanted one of {', '.join(map(repr, MODELS))}, or an AnySat module")
    source, sha256 = _source(str(model), weights)
    return EncoderSpec(str(model), source, sha256, device, precision)


def _source(size: str, weights: Any) -> tuple[str, str | None]:
    """Make the `source` and `sha256` of a spec."""
    if weights is None or weights == "official":
        if size != OFFICIAL.model:
            raise WeightsError(
                f"there is no official checkpoint of model={size!r}, only of {OFFICIAL.model!r}: pass "
                f"model={OFFICIAL.model!r}, or your own weights=PATH, or weights='random'"
            )
        path = official_path(download=False)
        return "official", None if path is None else file_sha256(path)
    seed = _seed(weights)
    if seed is not None:
        recipe = f"xr_anysat random weights v{RECIPE} size={size} seed={seed}"
        return f"random:{seed}", hashlib.sha256(recipe.encode()).hexdigest()
    if not isinstance(weights, str | os.PathLike):
        raise OptionError(
            f"{weights=}: wanted None (the official checkpoint), a path, 'random' or ('random', seed)"
        )
    path = Path(weights).expanduser().absolute()
    _check_file(path)
    return str(path), file_sha256(path)


def _seed(weights: Any) -> int | None:
    """Read the seed of ``"random"``, ``"random:7"`` or ``("random", 7)``; None where it is none of them."""
    if isinstance(weights, str) and re.match(r"random(:|$)", weights):
        _, _, text = weights.partition(":")
        seed: Any = int(text) if text.isdecimal() else text or 0
    elif isinstance(weights, tuple | list) and len(weights) == 2 and weights[0] == "random":
        seed = weights[1]
    else:
        return None
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise OptionError(f"{weights=}: wanted a seed from 0 to 2**63 - 1, as in weights=('random', 7)")
    return seed


# ---------------------------------------------------------------------------- files


def cache_dir() -> Path:
    """Return the folder of converted and hand-placed checkpoints, option ``cache_dir``."""
    given = option("cache_dir", DEFAULTS["cache_dir"])
    if given is None:
        return Path(platformdirs.user_cache_dir("xr_anysat"))
    return Path(str(given)).expanduser().absolute()


def offline() -> bool:
    """Tell whether option ``offline`` forbids downloads; huggingface_hub minds its own HF_HUB_OFFLINE."""
    given = option("offline", DEFAULTS["offline"])
    known = {"true": True, "yes": True, "on": True, "1": True}
    known |= {"false": False, "no": False, "off": False, "0": False, "": False}
    value = known.get(str(given).strip().lower())
    if value is None:
        raise OptionError(f"offline={given!r} (XR_ANYSAT_OFFLINE): wanted 1 or 0, true or false")
    return value


def _check_file(
    path: Path,
    smallest: int = SMALLEST,
    missing: str = "weights= takes a path, None (the official checkpoint), 'random' or ('random', seed).",
) -> None:
    """Refuse what cannot be a checkpoint, by its name, size and first bytes."""
    try:
        about = path.stat()
        if stat.S_ISDIR(about.st_mode):
            raise WeightsError(f"weights={str(path)!r} is a folder; wanted the checkpoint file in it")
        with path.open("rb") as file:
            head = file.read(512)
    except (FileNotFoundError, NotADirectoryError):
        raise WeightsError(f"there is no weights file {str(path)!r} on this machine. {missing}") from None
    except OSError as error:
        raise WeightsError(
            f"the weights file {str(path)!r} cannot be read: {error}. Mend that, or pass the path of "
            "another copy as weights=PATH."
        ) from error
    if path.suffix.lower() not in (*PICKLED, SAFE):
        raise WeightsError(
            f"weights={str(path)!r} ends in {path.suffix!r}; wanted {', '.join(PICKLED)} (a file of "
            f"torch.save) or {SAFE}. If it is one of them, rename it."
        )
    text = head.lstrip().lower()
    instead = None
    if text.startswith(b"version https://git-lfs"):
        instead = "a Git LFS pointer that stands in for the file; run 'git lfs pull' where it was cloned"
    elif text.startswith((b"<!doctype html", b"<html", b"<?xml")):
        instead = "a web page saved in place of the file; download the file itself"
    elif about.st_size < smallest:
        instead = (
            f"only {about.st_size:,} bytes, wanted at least {smallest:,}: the download was cut short; "
            "delete it and download it again"
        )
    if instead is not None:
        raise WeightsError(f"the weights file {str(path)!r} is {instead}")


_hashes: dict[tuple[str, int, int], str] = {}


def file_sha256(path: Path) -> str:
    """Hash a file, once a process for each state (size, time of change) of the file."""
    about = path.stat()
    key = (str(path), about.st_size, about.st_mtime_ns)
    if key not in _hashes:
        with path.open("rb") as file:
            _hashes[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _hashes[key]


def find_official() -> Path | None:
    """Find what should be the official checkpoint on this machine: it is neither opened nor hashed.

    It is looked for as ``AnySat.pth`` in the cache folder (placed there by hand), then in the cache of
    huggingface_hub.
    """
    from huggingface_hub import try_to_load_from_cache

    placed = _place_by_hand()
    if placed.exists():
        return placed
    cached = try_to_load_from_cache(OFFICIAL.repo, OFFICIAL.filename)
    # else None, or a mark that says that the repository has no such file
    return Path(cached) if isinstance(cached, str) else None


def _place_by_hand() -> Path:
    """Where the official checkpoint can be put by hand."""
    return cache_dir() / Path(OFFICIAL.filename).name


def official_path(download: bool = True) -> Path | None:
    """Find the official checkpoint on this machine, and check its size and sha256.

    It is looked for by :func:`find_official`, and then, if `download`, on the hub.

    Parameters
    ----------
    download : bool
        Whether to download it where it is missing.

    Returns
    -------
    Path or None
        None if it is not here and `download` is False.

    Raises
    ------
    WeightsError
        If the file is not the official one, or cannot be downloaded: the message says where to put it.
    """
    path = find_official()
    if path is None and download:
        path = _download()
    return None if path is None else _check_official(path)


def _download() -> Path:
    """Download the official checkpoint to the cache of huggingface_hub."""
    from huggingface_hub import hf_hub_download, hf_hub_url

    remedy = (
        f"Download {hf_hub_url(OFFICIAL.repo, OFFICIAL.filename)} where that is possible and put it at "
        f"{str(_place_by_hand())!r}, or pass its path as weights=PATH (or XR_ANYSAT_WEIGHTS=PATH). {TO_WORKERS}"
    )
    if offline():
        raise WeightsError(
            "the official checkpoint is not on this machine, and option offline (XR_ANYSAT_OFFLINE) "
            f"forbids its download. {remedy}"
        )
    try:
        return Path(hf_hub_download(OFFICIAL.repo, OFFICIAL.filename, library_name="xr_anysat"))
    except Exception as error:  # its own, or of whichever HTTP library it uses, or OSError of the disk
        cause = error.__cause__ or error
        raise WeightsError(
            f"the official checkpoint ({OFFICIAL.filename} of {OFFICIAL.repo}) could not be downloaded: "
            f"{type(cause).__name__}: {cause}. {remedy}"
        ) from error


def _check_official(path: Path) -> Path:
    """Return `path` if it holds the official checkpoint."""
    _check_file(path, OFFICIAL.min_bytes)
    seen = file_sha256(path)
    if not OFFICIAL.has(seen):
        # In the hub's cache `path` is a link. What has to go is the file behind it: with the link
        # alone gone, the next download would link the same file again.
        raise WeightsError(
            f"{str(path)!r} is not the official checkpoint: its sha256 is {seen}, wanted "
            f"{OFFICIAL.sha256_prefix}…{OFFICIAL.sha256_suffix}. Delete {str(path.resolve())!r} and "
            f"call again to download it, or pass weights={str(path)!r} to use the file as it is."
        )
    return path


def weights_file(spec: EncoderSpec) -> Path:
    """Find the file of an official or a path spec on this machine: still the one that the spec pins."""
    if spec.source == "official":
        path = official_path()
        assert path is not None  # it is downloaded, or that raised
    else:
        path = Path(spec.source)
        kept = f"Nor has its cache folder {str(cache_dir())!r} {spec.sha256}{SAFE}, which is made of it."
        _check_file(path, missing=f"{kept} Put the file there. {TO_WORKERS}")
    seen = file_sha256(path)
    if spec.sha256 not in (None, seen):
        raise WeightsError(
            f"the weights file {str(path)!r} is not the one that this was planned with: its sha256 is "
            f"{seen}, wanted {spec.sha256}. Put the old file back, or make the embeddings anew with "
            f"weights={str(path)!r}. {TO_WORKERS}"
        )
    return path


def pinned(spec: EncoderSpec) -> EncoderSpec:
    """Give an official spec the sha256 that it lacks where it was made before the checkpoint was there.

    A kept file that has the known ends of the official hash tells it, else the checkpoint itself, which
    is downloaded if need be. Any other spec stays as it is.
    """
    if spec.source != "official" or spec.sha256 is not None:
        return spec
    kept = cache_dir().glob(f"{OFFICIAL.sha256_prefix}*{OFFICIAL.sha256_suffix}{SAFE}")
    names = [path.stem for path in kept if len(path.stem) == 64]
    return replace(spec, sha256=names[0] if names else file_sha256(weights_file(spec)))


def on_this_machine(spec: EncoderSpec) -> bool:
    """Tell whether `get_encoder` finds the weights of a pinned spec without a network."""
    if spec.source.startswith("random:") or _key(spec) in _loaded or is_kept(spec):
        return True
    try:
        if spec.source == "official" and official_path(download=False) is None:
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
    if spec.source.startswith("random:"):
        return random_state(spec.size, int(spec.source.partition(":")[2]), sensors)
    spec = pinned(spec)
    assert spec.sha256 is not None  # only a module has none
    wanted = _shapes(spec.size, sensors)
    kept = read_kept(kept_file(spec.sha256), spec.sha256, wanted)
    if kept is not None:
        return kept
    path = weights_file(spec)
    if path.suffix.lower() == SAFE:
        state = _checked(_read_safetensors(path), spec.size, path)
        return {name: state[name] for name in wanted}
    state = _checked(_read_pickled(path), spec.size, path)
    try:
        write_kept(state, kept_file(spec.sha256), spec.sha256)
    except OSError as error:
        warn(
            f"the converted weights could not be kept at {str(kept_file(spec.sha256))!r} ({error}), so every "
            "process reads and checks the checkpoint anew. Set a folder that can be written: "
            "xr_anysat.config.set(cache_dir=PATH) or XR_ANYSAT_CACHE_DIR=PATH."
        )
    # Read back, so that the first process too maps what the others map.
    kept = read_kept(kept_file(spec.sha256), spec.sha256, wanted)
    return {name: state[name] for name in wanted} if kept is None else kept


def _shapes(size: str, sensors: Collection[str] | None = None) -> dict[str, tuple[int, ...]]:
    """Tell the names and shapes of a size's state, of all sensors or of some."""
    import torch

    from xr_anysat.model.anysat import AnySat

    with torch.device("meta"):
        state = AnySat(size, tuple(SENSORS if sensors is None else sensors)).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _read_pickled(path: Path) -> dict[str, torch.Tensor]:
    """Read the state dict in a file of `torch.save`, with the reader that makes tensors and nothing else."""
    import torch

    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # only the newer format can be mapped
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged file raises whatever its bytes happen to say
        script = "TorchScript" in str(error)
        if isinstance(error, pickle.UnpicklingError) or script:
            found = re.search(r"GLOBAL (\S+)", str(error))
            what = "a TorchScript program" if script else found.group(1) if found else "objects"
            raise WeightsError(
                f"the weights file {str(path)!r} holds code ({what}), not only tensors. Reading it could "
                "run anything, so it is refused. If you trust it, make a safe file of it: "
                f"state = torch.load({path.name!r}, weights_only=False), then "
                "safetensors.torch.save_file(state['state_dict'], 'weights.safetensors'), and pass "
                "weights='weights.safetensors'."
            ) from error
        raise WeightsError(
            f"the weights file {str(path)!r} ({path.stat().st_size:,} bytes) is damaged or cut short, or "
            f"is no file of torch.save ({type(error).__name__}: {error}). Get it again."
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else loaded
    if not isinstance(state, Mapping):
        raise WeightsError(
            f"the weights file {str(path)!r} holds a {type(state).__name__}; wanted a state dict, or a "
            "dict with one under 'state_dict', as torch.save({'state_dict': model.state_dict()}, PATH) writes"
        )
    others = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise WeightsError(
            f"the weights file {str(path)!r} holds {_few(others)} beside or in place of tensors; wanted a "
            "state dict, or a dict with one under 'state_dict'"
        )
    return {str(name): tensor.detach() for name, tensor in state.items()}


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"the weights file {str(path)!r} ({path.stat().st_size:,} bytes) is damaged or cut short, or "
            f"is no safetensors file ({error}). Get it again."
        ) from error


def checkpoint_names(names: Iterable[str]) -> dict[str, str]:
    """Map the names of a state dict to the checkpoint's.

    Upstream's hub module holds the model as ``.model`` and its spatial encoder once more, so that
    its state dict has every name as ``model.<name>`` and ``spatial_encoder.<...>`` twice.

    Parameters
    ----------
    names : iterable of str
        Names in the file.

    Returns
    -------
    dict of str to str
        From name in the file to the checkpoint's name. The second copy of a tensor is left out;
        what is not of the hub module keeps its name.

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


def _checked(raw: Mapping[str, torch.Tensor], size: str, path: Path) -> dict[str, torch.Tensor]:
    """Copy the whole checkpoint to float32 tensors, if the file holds exactly that."""
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
                f"{name!r} in the weights file {str(path)!r} is {tensor.dtype}; wanted float32, float16 "
                "or bfloat16. Convert it with .float() and save it again."
            )
        # A copy: the file may be overwritten in place by its owner while it is mapped.
        state[name] = tensor.to(torch.float32, copy=True).contiguous()
        if not torch.isfinite(state[name]).all():
            bad = int((~torch.isfinite(state[name])).sum())
            raise WeightsError(
                f"{name!r} in the weights file {str(path)!r} holds {bad} values that are not finite; every "
                "embedding would be NaN. Get the file again, or a checkpoint from before training diverged."
            )
    return state


def _check_shapes(seen: Mapping[str, tuple[int, ...]], size: str, path: Path) -> None:
    """Refuse names and shapes that are not exactly those of a size, naming what differs."""
    wanted = _shapes(size)
    if seen == wanted:
        return
    for other in MODELS:
        if other != size and seen == _shapes(other):
            raise WeightsError(
                f"the weights file {str(path)!r} is a {other!r} checkpoint, and model={size!r} was asked "
                f"for: pass model={other!r}"
            )
    faults = []
    missing = [name for name in wanted if name not in seen]
    if missing:
        faults.append(f"{len(missing)} of {len(wanted)} tensors are missing ({_few(missing)})")
    unknown = [name for name in seen if name not in wanted]
    if unknown:
        faults.append(f"{len(unknown)} are unknown ({_few(unknown)})")
    differing = [name for name in wanted if name in seen and seen[name] != wanted[name]]
    if differing:
        shapes = "; ".join(f"{name!r} {seen[name]}, wanted {wanted[name]}" for name in differing[:3])
        faults.append(f"{len(differing)} have another shape ({shapes}{'; …' if len(differing) > 3 else ''})")
    raise WeightsError(
        f"the weights file {str(path)!r} is not an AnySat {size!r} checkpoint: {', '.join(faults)}. Wanted "
        "the whole checkpoint, with the projectors of all sensors, as the state dict of load_model() has it."
    )


def _few(names: Collection[Any]) -> str:
    """Show the first three names."""
    first = ", ".join(repr(name) for name in list(names)[:3])
    return first if len(names) <= 3 else f"{first}, …"


# ---------------------------------------------------------------------------- kept files


def kept_file(sha256: str) -> Path:
    """Return where the checked tensors of a checkpoint are kept on this machine, if they are."""
    return cache_dir() / f"{sha256}{SAFE}"


def is_kept(spec: EncoderSpec, path: Path | None = None) -> bool:
    """Tell whether a file holds all tensors of a pinned spec's encoder; the kept one if not said."""
    assert spec.sha256 is not None
    path = kept_file(spec.sha256) if path is None else path
    return read_kept(path, spec.sha256, _shapes(spec.size, ENCODED)) is not None


def _crc32(tensor: torch.Tensor) -> int:
    import torch

    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)


def read_kept(
    path: Path, sha256: str, wanted: Mapping[str, tuple[int, ...]]
) -> dict[str, torch.Tensor] | None:
    """Map the wanted tensors of a kept file; None if there is none, it lacks some, or it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("source_sha256") != sha256 or about.get("converter") != CONVERTER:
                return None
            sums = json.loads(about["crc32"])
            state = {name: file.get_tensor(name) for name in wanted}
    except (SafetensorError, OSError, KeyError, ValueError):
        return None
    for name, shape in wanted.items():
        if tuple(state[name].shape) != shape or _crc32(state[name]) != sums.get(name):
            return None
    return state


def write_kept(state: Mapping[str, torch.Tensor], path: Path, sha256: str) -> None:
    """Keep checked tensors for the next process; an OSError if they cannot be written."""
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
        except SafetensorError as error:  # what a full disk is to it
            raise OSError(str(error)) from error


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a draft to write: all of it under its final name in the end, or nothing.

    The draft is in the same folder, so that the renaming is atomic, and has a name of its own, so that
    processes do not meet.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.stem}-{uuid.uuid4().hex}.tmp")
    try:
        yield draft
        # some writers make it private; whoever shares the folder may share what is in it
        draft.chmod(stat.S_IMODE(path.parent.stat().st_mode) & 0o666)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


# ---------------------------------------------------------------------------- random weights


def random_state(size: str, seed: int, sensors: Collection[str] | None = None) -> dict[str, torch.Tensor]:
    """Seeded random weights, each tensor a function of seed, name and shape alone.

    So what an S2-only model gets is a part of what the whole model gets, and any machine and
    version makes the same bits: NumPy keeps the raw stream of Philox fixed.

    Parameters
    ----------
    size : {"tiny", "small", "base"}
        The model's size.
    seed : int
        From 0 to 2**63 - 1.
    sensors : collection of str, optional
        Sensors whose projectors are wanted; None is all eleven.

    Returns
    -------
    dict of str to Tensor
        float32, on the CPU. Linear and convolution weights are uniform with variance 1 / fan-in;
        norm weights are near one and biases small, but no two are alike, so that a mistake in any of
        them shows.
    """
    import torch

    return {
        name: torch.from_numpy(_random_tensor(name, shape, seed))
        for name, shape in _shapes(size, sensors).items()
    }


def _random_tensor(name: str, shape: tuple[int, ...], seed: int) -> Any:
    import numpy as np

    if name.endswith("pad_parameter"):
        return np.zeros(shape, np.float32)
    if name.endswith(".bias"):
        middle, spread = 0.0, 0.1
    elif name.endswith(".weight") and len(shape) == 1:  # LayerNorm, GroupNorm
        middle, spread = 1.0, 0.1
    elif name.endswith(".weight"):  # Linear (out, in), convolution (out, in, height, width)
        middle, spread = 0.0, float(np.sqrt(3.0 / np.prod(shape[1:])))
    else:  # cls_token, q_learned, Q, lookup_table_weight
        middle, spread = 0.0, 0.5
    count = int(np.prod(shape))
    key = np.array([seed, zlib.crc32(name.encode())], np.uint64)
    raw = np.random.Philox(key=key).random_raw((count + 1) // 2)
    bits = raw.astype("<u8").view("<u4")[:count].astype(np.uint32)  # the same halves on any machine
    uniform = (bits >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)
    return (np.float32(middle) + np.float32(spread) * uniform).reshape(shape)


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


_modules: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_registered: set[str] = set()  # every source that `_register` gave out in this process


def _size_of(module: Any) -> str:
    """Tell the size of an AnySat module, ours or upstream's, by the width of its cls token."""
    if not (callable(module) and callable(getattr(module, "state_dict", None))):
        raise OptionError(
            f"model={module!r}: wanted one of {', '.join(map(repr, MODELS))}, or an AnySat module"
        )
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


def _register(module: Any) -> str:
    """Give a module a `source`, a new one each time, for its weights may have changed in between."""
    source = f"module:{uuid.uuid4().hex}"
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


_guard = threading.Lock()  # of the two dicts, held for a moment only
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
    if spec.source.startswith("module:"):
        return _registered_module(spec)
    key = _key(spec)
    with _guard:
        lock = _locks.setdefault(key, threading.Lock())
    with lock:  # one a spec, so that nobody waits for somebody else's weights
        if key not in _loaded:
            known = pinned(spec)
            encoder = _build(known, ENCODED).to(key.device).pack(spec.precision)
            _loaded[key] = _Loaded(encoder, known.sha256)
        return _loaded[key].encoder


def _key(spec: EncoderSpec) -> EncoderSpec:
    """Keep what tells encoders apart: not whether the official hash was known."""
    sha256 = None if spec.source == "official" else spec.sha256
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
    if spec.sha256 is not None or spec.source.startswith("module:"):
        return spec.sha256
    loaded = _loaded.get(_key(spec))
    return None if loaded is None else loaded.sha256


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

"""Compare with upstream: run its code and ours with the same weights and inputs."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xr_anysat.config import MODEL, option
from xr_anysat.errors import OptionError
from xr_anysat.model.checkpoint import offline
from xr_anysat.model.weights import EncoderSpec, encoder_spec, get_encoder, load_state, loaded_sha256

if TYPE_CHECKING:
    from torch import nn

TOLERANCE = 1e-4
OUTPUTS = ("tile", "patch", "dense", "all")  # upstream's; "local" is the second half of "dense"
CASES = ((10, 6, 3), (20, 8, 2), (40, 8, 1))  # patch side in meters, window side in pixels, dates
BATCH = 2


@dataclass(frozen=True)
class Comparison:
    """Difference of the two implementations in one output of one case."""

    patch_size: int
    tile: int
    frames: int
    output: str
    max_abs_difference: float


@dataclass(frozen=True, repr=False)
class VerifyReport:
    """Result of `verify`.

    Attributes
    ----------
    repo, model : str
        What was compared.
    sha256 : str or None
        Hash of the weights of both.
    comparisons : tuple of Comparison
        One for each output of each case.
    tolerance : float
        The largest absolute difference that passes.

    Examples
    --------
    >>> report = VerifyReport("gastruc/anysat", "base", None, (Comparison(10, 6, 3, "tile", 2e-6),))
    >>> report.passed
    True
    >>> report
    xr_anysat compared with gastruc/anysat, model 'base': passed, largest difference 2.0e-06, 1e-04 allowed
      patch 10 m  window  6 px  3 dates  tile   2.0e-06
    """

    repo: str
    model: str
    sha256: str | None
    comparisons: tuple[Comparison, ...]
    tolerance: float = TOLERANCE

    @property
    def max_abs_difference(self) -> float:
        """The largest difference; NaN if there is one, infinite if shapes differ."""
        return float(np.max([c.max_abs_difference for c in self.comparisons]))

    @property
    def passed(self) -> bool:
        """Whether every difference is within the tolerance."""
        return self.max_abs_difference <= self.tolerance

    def __str__(self) -> str:
        head = (
            f"xr_anysat compared with {self.repo}, model {self.model!r}: {'passed' if self.passed else 'FAILED'}, "
            f"largest difference {self.max_abs_difference:.1e}, {self.tolerance:.0e} allowed"
        )
        lines = [
            f"  patch {c.patch_size} m  window {c.tile:2d} px  {c.frames} dates  {c.output:5s}  "
            f"{c.max_abs_difference:.1e}"
            for c in self.comparisons
        ]
        weights = [f"  weights sha256 {self.sha256}"] if self.sha256 else []
        return "\n".join([head, *weights, *lines])

    __repr__ = __str__


def verify(
    repo: str | PathLike[str] = "gastruc/anysat",
    *,
    weights: Any = None,
    model: str = MODEL,
    device: str = "cpu",
) -> VerifyReport:
    """Compare with upstream: run its code and ours with the same weights and inputs.

    This runs the code of `repo` in a separate process, on the CPU and without its flash-attention
    branch. Pass only a repository that you trust.

    Parameters
    ----------
    repo : str or path
        A checkout of upstream's repository, or ``owner/name`` (``owner/name:ref``) on GitHub.
    weights : None, path, "random" or ("random", seed)
        Weights of both (option ``weights``); None is the official checkpoint.
    model : {"base", "small", "tiny"}
        Size (option ``model``).
    device : str
        Device of our code.

    Returns
    -------
    VerifyReport
        Its ``passed`` says whether every output agrees to 1e-4.

    Raises
    ------
    OptionError
        If `repo` is not upstream's repository, cannot be downloaded, or does not run.
    WeightsError
        If the weights are missing, damaged, unsafe, or those of another model.
    DeviceError
        If the device is not on this machine.
    """
    repo, source = _repository(repo)
    size = option("model", model)
    if not isinstance(size, str):
        raise OptionError(f"model={type(size).__name__}: verify compares sizes by name, as in model='base'")
    spec = encoder_spec(size, option("weights", weights), device)
    inputs = _inputs()
    encoder = get_encoder(spec)  # before the slow part, because it checks weights and device
    theirs = _run_upstream(repo, source, spec, inputs)
    ours = _run_ours(encoder, inputs)
    comparisons = tuple(
        Comparison(patch_size, tile, frames, output, _difference(ours[key], theirs[key]))
        for i, (patch_size, tile, frames) in enumerate(CASES)
        for output in OUTPUTS
        for key in [f"{i}.{output}"]
    )
    return VerifyReport(repo, size, loaded_sha256(spec), comparisons)


def _repository(repo: str | PathLike[str]) -> tuple[str, str]:
    """Return `repo` as torch.hub expects it: a folder or a name, and its source."""
    folder = Path(repo).expanduser()
    if folder.is_dir():
        if not (folder / "hubconf.py").is_file():
            raise OptionError(
                f"repo={str(folder)!r} has no hubconf.py; expected the root of a checkout of upstream's "
                "repository (gastruc/anysat)"
            )
        return str(folder.absolute()), "local"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w./-]+)?", str(repo)):
        raise OptionError(
            f"repo={str(repo)!r} is neither a folder on this machine nor owner/name on GitHub; expected a "
            "checkout of upstream's repository, or 'gastruc/anysat'"
        )
    if offline():
        raise OptionError(
            f"repo={str(repo)!r} would be downloaded from GitHub, and option offline (XR_ANYSAT_OFFLINE) "
            "forbids it. Pass a local checkout: verify(repo=PATH)."
        )
    return str(repo), "github"


def _inputs() -> dict[str, np.ndarray[Any, Any]]:
    """Draw seeded inputs: z-scores, and dates that differ between samples."""
    random = np.random.default_rng(0)
    inputs: dict[str, np.ndarray[Any, Any]] = {}
    for i, (patch_size, tile, frames) in enumerate(CASES):
        inputs[f"{i}.s2"] = random.standard_normal((BATCH, frames, 10, tile, tile), np.float32)
        inputs[f"{i}.dates"] = np.sort(random.integers(0, 365, (BATCH, frames)), axis=1)
        inputs[f"{i}.patch_size"] = np.array(patch_size)
    return inputs


def _run_ours(encoder: nn.Module, inputs: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """Run our encoder."""
    import torch

    device = next(encoder.parameters()).device
    outputs = {}
    with torch.inference_mode():
        for i in range(len(CASES)):
            x = {
                "s2": torch.from_numpy(inputs[f"{i}.s2"]).to(device),
                "s2_dates": torch.from_numpy(inputs[f"{i}.dates"]).to(device),
            }
            for output in OUTPUTS:
                value = encoder(x, patch_size=int(inputs[f"{i}.patch_size"]), output=output)
                outputs[f"{i}.{output}"] = value.cpu().numpy()
    return outputs


def _run_upstream(
    repo: str, source: str, spec: EncoderSpec, inputs: dict[str, np.ndarray[Any, Any]]
) -> dict[str, np.ndarray[Any, Any]]:
    """Run upstream's hub module in another process, with weights and inputs passed as files."""
    from safetensors.torch import save_file

    script = Path(__file__).with_name("_run_upstream.py")
    with tempfile.TemporaryDirectory(prefix="xr_anysat-") as name:
        folder = Path(name)
        save_file(load_state(spec), folder / "weights.safetensors")
        arrays: dict[str, Any] = dict(inputs)  # numbers only, so nothing is pickled
        np.savez(folder / "cases.npz", **arrays)
        # -P: the names of our modules must not shadow those that upstream imports
        command = [sys.executable, "-P", str(script), repo, source, spec.size, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
        if done.returncode:
            raise _failure(repo, done)
        with np.load(folder / "outputs.npz") as found:
            return {key: found[key] for key in found.files}


def _failure(repo: str, done: subprocess.CompletedProcess[str]) -> OptionError:
    """Return the error that says why upstream did not run."""
    from xr_anysat.model._run_upstream import UNREACHABLE

    last = "\n".join(f"  {line}" for line in done.stderr.strip().splitlines()[-12:])
    if done.returncode == UNREACHABLE:
        return OptionError(
            f"repo={repo!r} could not be downloaded from GitHub:\n{last}\nClone it on a machine with a network, "
            "and pass the local checkout: verify(repo=PATH)."
        )
    return OptionError(
        f"upstream's code in repo={repo!r} did not run (exit status {done.returncode}). Its last lines:\n"
        f"{last}\nIf it misses a package, install it; if it is another repository, pass the right one: "
        "verify(repo='gastruc/anysat') or verify(repo=PATH)."
    )


def _difference(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> float:
    """Return the largest absolute difference; infinite if the shapes differ."""
    if ours.shape != theirs.shape:
        return math.inf
    return float(np.abs(ours - theirs).max())

"""`show_versions`: facts to include in a bug report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Iterator
from typing import TextIO

from xr_anysat.config import DEFAULTS, config
from xr_anysat.errors import OptionError
from xr_anysat.model.checkpoint import SAFE, cache_dir, find_official
from xr_anysat.model.weights import resolve_device
from xr_anysat.shared.text import format_bytes, physical_memory

FOR_DEVELOPERS = ("test", "docs")
"""Extras that only developers need; their packages are not listed."""


def show_versions(file: TextIO | None = None) -> None:
    """Print versions, machine, devices of torch, paths of the weights, and the configuration.

    Nothing is downloaded, and no weights are read.

    Parameters
    ----------
    file : text file, optional
        Where to print. Default: standard output.

    Examples
    --------
    >>> import xr_anysat
    >>> xr_anysat.show_versions()
    xr_anysat: ...
    python: ...
    """
    for line in (*_system(), "", *_packages(), "", *_torch(), "", *_options()):
        print(line, file=file)


def _system() -> Iterator[str]:
    from xr_anysat._version import __version__

    yield f"xr_anysat: {__version__}"
    yield f"python: {sys.version.splitlines()[0]}"
    yield f"OS: {platform.platform()}"
    memory = physical_memory()
    size = format_bytes(memory) if memory else "unknown"
    yield f"machine: {platform.machine()}, {os.cpu_count()} CPUs, {size} of memory"


def _packages() -> Iterator[str]:
    """Yield the required packages and those of the extras, with their versions."""
    try:
        needed = importlib.metadata.requires("xr_anysat") or []
    except importlib.metadata.PackageNotFoundError:
        yield "packages: unknown, since xr_anysat was imported without being installed"
        return
    extra = re.compile(r"extra\s*==\s*['\"](\w+)['\"]")
    names: dict[str, None] = {}
    for requirement in needed:
        found, of = re.match(r"[\w.-]+", requirement), extra.search(requirement)
        if found and found[0] != "xr_anysat" and (of is None or of[1] not in FOR_DEVELOPERS):
            names[found[0]] = None
    for name in names:
        try:
            yield f"{name}: {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{name}: not installed"


def _torch() -> Iterator[str]:
    """Yield what torch computes on."""
    try:
        import torch
    except Exception as error:  # a broken installation may raise anything, and is worth reporting
        yield f"torch cannot be imported: {type(error).__name__}: {error}"
        return
    yield f"torch threads: {torch.get_num_threads()}"
    yield f"torch CPU capability: {torch.backends.cpu.get_cpu_capability()}"
    yield f"torch oneDNN: {'yes' if torch.backends.mkldnn.is_available() else 'no'}"
    yield f"torch CUDA: {torch.version.cuda or 'not built in'}"
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        yield f"cuda:{i}: {about.name}, {format_bytes(about.total_memory)}"
    yield f"device='auto': {resolve_device('auto')}"


def _options() -> Iterator[str]:
    """Yield paths of weights and the options, or the error that an invalid option causes."""
    try:
        yield from _weights()
    except OptionError as error:
        yield f"configuration: {error}"
    for name, default in DEFAULTS.items():
        yield f"{name}: {config.get(name, default)!s}{'' if name in config.config else ' (default)'}"


def _weights() -> Iterator[str]:
    """Yield the path of the official checkpoint, without downloading or hashing it, and of converted weights."""
    folder = cache_dir()
    yield f"official checkpoint: {find_official() or 'not on this machine'}"
    kept = sorted(path.stem[:12] for path in folder.glob(f"*{SAFE}"))
    yield f"converted weights in {folder}: {', '.join(kept) or 'none'}"

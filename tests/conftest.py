"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import dask.threaded
import pytest

import xr_anysat


@pytest.fixture(scope="session")
def formula_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base model under the formula weights of the goldens, as a checkpoint file."""
    from support.weights_files import formula_checkpoint

    return formula_checkpoint(tmp_path_factory.mktemp("formula"), "base")


@pytest.fixture(scope="session")
def formula_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model under the formula weights of the goldens, as a checkpoint file."""
    from support.weights_files import formula_checkpoint

    return formula_checkpoint(tmp_path_factory.mktemp("formula"), "tiny")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's own cache."""
    with xr_anysat.config.set(cache_dir=str(tmp_path_factory.getbasetemp() / "cache")):
        yield


@pytest.fixture(autouse=True, scope="module")
def _own_threads() -> None:
    """Threads of dask's that have torch's number of threads as it is now: each keeps what it was born with."""
    dask.threaded.default_pool = None

"""Fixtures of all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask.threaded
import pytest
from hypothesis import settings

import xr_anysat

# Processes of pytest-xdist share the cores: several torch threads in each wait for one another, and tests take
# almost three times as long. Torch reads this when it is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Random tests try few examples, always the same; --hypothesis-profile long tries many, new ones each time
settings.register_profile("few", max_examples=10, derandomize=True)
settings.register_profile("long", max_examples=3000)
settings.load_profile("few")

# A shell without job control ignores SIGINT in what it starts in the background, and so would every process of a test
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """Run a server that speaks the S3 protocol, with one bucket."""
    from support.s3_server import S3Server

    with S3Server() as server:
        server.bucket("bucket")
        yield server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the cluster first: one process of pytest-xdist then runs them all, and starts one cluster."""
    items.sort(key=lambda item: "two_workers" not in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two worker processes of one thread each, over TCP, for all tests that do them no harm."""
    from distributed import LocalCluster

    folder = tmp_path_factory.mktemp("cluster")
    with LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=True,
        protocol="tcp",
        dashboard_address=None,
        worker_dashboard_address=None,
        local_directory=str(folder),
        env={"XR_ANYSAT_CACHE_DIR": str(folder / "cache")},
    ) as cluster:
        yield cluster


@pytest.fixture
def client(two_workers: Any) -> Iterator[Any]:
    """The client of `two_workers`, which dask then uses by default."""
    from distributed import Client

    with Client(two_workers) as client:
        yield client


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's own cache."""
    with xr_anysat.config.set(cache_dir=str(tmp_path_factory.getbasetemp() / "cache")):
        yield


@pytest.fixture(autouse=True)
def _own_threads() -> None:
    """Restart dask's threads, because each keeps the number of torch threads that was set when it started."""
    dask.threaded.default_pool = None

"""Settings of the process that runs forward passes: threads and memory."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from xr_anysat.model.cost import HEAP_BYTES

if TYPE_CHECKING:
    pass

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # as mallopt(3) has them


@contextmanager
def worker_torch_threads() -> Iterator[None]:
    """Give torch the threads of the dask-distributed worker that this task runs on, else those it has.

    Torch keeps the number a thread, so it is set in the thread of the task, each time. It is set also
    where it stays the same: until that is done once in a process, MKL takes fewer threads for small
    matrices, and other bits come out. It is set back, because threads that start later take the last
    number over, and with ``processes=False`` they may be the user's own.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(_nthreads() or threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def retain_freed_memory() -> Iterator[None]:
    """Have glibc keep what the forwards of a block free for one another, where it was told to give it back at once.

    The nanny of a dask-distributed worker tells it so, by ``MALLOC_TRIM_THRESHOLD_=65536``: each tensor then comes
    in pages that the system has to clear, a third of the time (docs/speed.md). Left alone, glibc learns to keep
    them. Between blocks it is as it was, so that what dask frees does go back.
    """
    told = os.environ.get("MALLOC_TRIM_THRESHOLD_", "")
    libc: Any = ctypes.CDLL(None) if told.isdecimal() and sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):  # nothing to set right, or another C library
        yield
        return
    libc.mallopt(_TRIM_THRESHOLD, HEAP_BYTES)
    libc.mallopt(_MMAP_THRESHOLD, 32 << 20)  # no more is possible
    try:
        yield
    finally:
        libc.mallopt(_TRIM_THRESHOLD, int(told))
        libc.mallopt(_MMAP_THRESHOLD, int(os.environ.get("MALLOC_MMAP_THRESHOLD_", 128 << 10)))


def _nthreads() -> int | None:
    """Threads of the worker that this task runs on; None outside a worker."""
    if "distributed" not in sys.modules:  # then this is no worker, and need not wait for its import
        return None
    from distributed import get_worker

    try:
        return get_worker().state.nthreads
    except ValueError:
        return None

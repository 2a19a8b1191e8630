"""Settings of the process that runs forward passes: threads and memory."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from xr_anysat.model.cost import HEAP_BYTES

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # numbers of mallopt(3)


@contextmanager
def worker_torch_threads() -> Iterator[None]:
    """Give torch as many threads as the dask-distributed worker of this task has; outside a worker, keep its own.

    Torch stores the number per thread, so it is set in the thread of each task. It is set even where it
    does not change: until it is set once in a process, MKL uses fewer threads for small matrices, and
    other bits result. The old number is restored, because threads that start later inherit the last
    number, and with ``processes=False`` they may be the user's own.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(_nthreads() or threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@cache
def retain_freed_memory() -> None:
    """Let glibc keep freed memory for the next forward pass, once per process.

    The nanny of a dask-distributed worker sets ``MALLOC_TRIM_THRESHOLD_=65536``, so that freed memory goes back to the
    system at once. Each tensor then gets pages that the system has to clear, which takes a third of the time
    (docs/speed.md). Without that setting, glibc adapts its thresholds by itself and nothing is changed. What is kept is
    bounded: up to ``HEAP_BYTES`` of the heap, and arrays above 32 MiB still go back at once.
    """
    threshold = os.environ.get("MALLOC_TRIM_THRESHOLD_", "")
    libc: Any = ctypes.CDLL(None) if threshold.isdecimal() and sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # another C library has none
        libc.mallopt(_TRIM_THRESHOLD, HEAP_BYTES)
        libc.mallopt(_MMAP_THRESHOLD, 32 << 20)  # the largest value that glibc takes


def _nthreads() -> int | None:
    """Threads of the worker of this task; None outside a worker."""
    if "distributed" not in sys.modules:  # not a worker; do not import it
        return None
    from distributed import get_worker

    try:
        return get_worker().state.nthreads
    except ValueError:
        return None

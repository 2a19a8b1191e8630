"""What `test_faults` does harm to: cubes that tell when they are read, and processes that work on them.

The processes are forked from one that has imported everything and done nothing, so that each is there
within a tenth of a second. They find each other by TCP addresses alone.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import xarray as xr
from distributed import Client

import xr_anysat  # noqa: F401 (the accessor)
from support.cubes import small_cube

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["torch", "distributed", "dask.array", "zarr.storage", "odc.geo.xr", "xr_anysat.model.anysat", "pytest"]
)

OPERATIONS = ("open", "os.mkdir", "os.rename", "os.link", "os.remove")
"""Audit events of Python that name a file."""

SIDE = 12
"""Pixels on the side of a block of `embedding`."""

# ---------------------------------------------------------------------- cubes


def plain(reads: Path, *, pause: float = 0.0, trouble: str = "") -> xr.DataArray:
    """An embedding cube of 4 × 5 blocks that needs no model."""
    values = np.random.default_rng(7).normal(size=(4, 32, 40)).astype(np.float32)
    cube = xr.DataArray(values, dims=("D", "y", "x"), name="anysat").chunk(y=8, x=8)
    return _watched(cube, reads, pause, trouble)


def embedding(reads: Path, *, pause: float = 0.0, trouble: str = "") -> xr.DataArray:
    """An embedding with statistics of its own, of 4 × 4 blocks, the first of them cut; a chunk of pixels a block."""
    height, width = 4 * SIDE - 4, 4 * SIDE - 6
    cube = small_cube(height=height, width=width, dates=4, row=500_008, col=60_006, dtype="float32")
    chunks = {"time": -1, "band": -1, "y": (SIDE - 4, *3 * [SIDE]), "x": (SIDE - 6, *3 * [SIDE])}
    cube = _watched(cube.chunk(chunks), reads, pause, trouble)
    return cube.anysat.embed(frames=2, model="tiny", weights="random", tile=SIDE, patch_size=20)


def _watched(cube: xr.DataArray, reads: Path, pause: float, trouble: str = "") -> xr.DataArray:
    reads.mkdir(parents=True, exist_ok=True)
    data = da.map_blocks(
        _read, cube.data, reads=str(reads), pause=pause, trouble=trouble,
        dtype=cube.dtype, meta=cube.data._meta,
    )  # fmt: skip
    return cube.copy(data=data)


def _read(
    values: np.ndarray, *, reads: str, pause: float, trouble: str, block_id: tuple[int, ...]
) -> np.ndarray:
    """Leave a marker, named by block and process, and return what was read, or cause a requested fault."""
    row, col = block_id[-2:]
    earlier = len(list(Path(reads).glob(f"{row}-{col}.*")))
    (Path(reads) / f"{row}-{col}.{os.getpid()}.{uuid.uuid4().hex}").touch()
    time.sleep(pause)
    if (row, col) == (2, 2):
        if trouble == "always" or (trouble == "twice" and earlier < 2):
            raise OSError(f"no connection to asset {row}-{col}.tif")
        if trouble == "memory" and not earlier:
            hoard = []
            while True:  # until the nanny ends it
                hoard.append(np.ones(8 << 20, np.uint8))
                time.sleep(0.002)
    return values


CUBES: dict[str, Callable[..., xr.DataArray]] = {"plain": plain, "embedding": embedding}


def readings(folder: Path) -> list[tuple[tuple[int, int], int]]:
    """Block and process of every reading so far."""
    found = []
    for marker in (folder / "reads").glob("*"):
        block, process, _ = marker.name.split(".")
        row, col = block.split("-")
        found.append(((int(row), int(col)), int(process)))
    return sorted(found)


def finished(folder: Path) -> set[tuple[int, int]]:
    """The blocks that the store has."""
    shards = (folder / "out/area.zarr/anysat/c/0").glob("*/*")
    return {(int(p.parent.name), int(p.name)) for p in shards if p.name.isdecimal()}


def files(folder: Path) -> dict[str, bytes]:
    """All files of the store and beside it, by name."""
    out = folder / "out"
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


# ---------------------------------------------------------------------- processes


@dataclass
class Process:
    """A process of its own, and what it has to say."""

    process: Any
    says: Connection

    def hears(self, *words: str, timeout: float = 60) -> Any:
        """The next that it says, or the next that begins with one of `words`."""
        while True:
            if not self.says.poll(timeout):
                raise TimeoutError(f"nothing from {self.process.name} for {timeout} s")
            said = self.says.recv()
            if not words or said[0] in words:
                return said

    def kill(self) -> None:
        """End it as the kernel does when memory runs out."""
        self.process.kill()
        self.process.join()


def start(function: Callable[..., None], *args: Any, **kwargs: Any) -> Process:
    """Run `function(*args, say, **kwargs)` in a process of its own."""
    says, say = FORKS.Pipe(duplex=False)
    process = FORKS.Process(
        target=_run, args=(function, *args, say), kwargs=kwargs, name=function.__name__, daemon=True
    )
    process.start()
    say.close()
    return Process(process, says)


def _run(function: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    function(*args, **kwargs)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def embed_to_store(
    kind: str,
    folder: Path,
    say: Connection,
    *,
    scheduler: str | None = None,
    moment: int | str | None = None,
    close_after: int | None = None,
    stay: bool = False,
    gpu: bool = False,
    **options: Any,
) -> None:
    """The run: a cube into ``folder/out/area.zarr``, by two threads or a cluster.

    Says ("blocks", finished, all) as it goes, and at the end ("operations", what was done to files of
    `folder`) and either ("done",) or ("error", type, message, notes). Is killed when it is about to do the
    operation with the number, or the beginning, `moment`; closes its client after `close_after` blocks;
    with `stay`, it outlives its client; with `gpu`, tasks need one.
    """
    import torch

    torch.set_num_threads(1)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # it is ignored where tests run in the background
    operations = watch(folder, moment)
    with dask.annotate(resources={"GPU": 1}) if gpu else nullcontext():
        emb = CUBES[kind](folder / "reads", **options)
    store = folder / "out" / "area.zarr"
    store.parent.mkdir(exist_ok=True)
    client: Client | None = None

    def progress(done: int, total: int) -> None:
        say.send(("blocks", done, total))
        if client is not None and done == close_after:
            client.close()

    try:
        if scheduler is not None:
            with dask.config.set({"distributed.comm.timeouts.connect": "2s"}):
                client = Client(scheduler, set_as_default=False)
        with dask.config.set(scheduler=client or "threads", num_workers=2):
            emb.anysat.to_zarr(store, progress=progress)
        said: tuple[Any, ...] = ("done",)
    except BaseException as error:
        said = ("error", type(error).__name__, str(error), getattr(error, "__notes__", []))
    say.send(("operations", operations))
    say.send(said)
    if stay:
        signal.pause()
    os._exit(0)  # without the farewells of a client whose scheduler may be gone


def watch(folder: Path, moment: int | str | None) -> list[str]:
    """Note what is done to files of `folder`, and kill this process before the operation `moment`."""
    operations: list[str] = []
    numbers = itertools.count()

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in OPERATIONS and str(args[0]).startswith(str(folder)):
            operation = f"{event} {Path(args[0]).relative_to(folder)}"
            operations.append(operation)
            if next(numbers) == moment or (isinstance(moment, str) and operation.startswith(moment)):
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return operations


def run_scheduler(say: Connection) -> None:
    """A scheduler; says its address."""
    from distributed import Scheduler

    async def serve() -> None:
        async with Scheduler(host="127.0.0.1", port=0, dashboard=False) as scheduler:
            say.send(scheduler.address)
            await scheduler.finished()

    asyncio.run(serve())


def run_worker(scheduler: str, scratch: Path, say: Connection, **options: Any) -> None:
    """A worker of one thread; says its address."""
    from distributed import Worker

    async def serve() -> None:
        options.update(nthreads=1, local_directory=str(scratch), dashboard=False)
        async with Worker(scheduler, **options) as worker:
            say.send(worker.address)
            await worker.finished()

    asyncio.run(serve())


@dataclass
class Cluster:
    """A scheduler and two workers, each a process of its own."""

    scheduler: Process
    address: str
    workers: list[Process]
    scratch: Path

    def add_worker(self, **options: Any) -> None:
        """One worker more."""
        self.workers.append(start(run_worker, self.address, self.scratch, **options))
        self.workers[-1].hears()

    def tasks(self) -> dict[Any, Any]:
        """What the scheduler knows: for the key of each task the resources that it asks for."""
        with Client(self.address, set_as_default=False) as client:
            known: dict[Any, Any] = client.run_on_scheduler(_tasks)
        return known

    def unfinished(self) -> set[tuple[int, int]]:
        """The blocks that the scheduler would have computed again, were their worker lost."""
        return {key[-2:] for key in self.tasks() if key[0].startswith("anysat-write")}


def _tasks(dask_scheduler: Any) -> dict[Any, Any]:
    return {key: task.resource_restrictions for key, task in dask_scheduler.tasks.items()}


@contextmanager
def cluster(scratch: Path, workers: int = 2) -> Iterator[Cluster]:
    """A scheduler and workers, which are killed at the end."""
    scheduler = start(run_scheduler)
    it = Cluster(scheduler, scheduler.hears(), [], scratch)
    try:
        for _ in range(workers):
            it.add_worker()
        yield it
    finally:
        for process in (*it.workers, it.scheduler):
            process.kill()

"""Processes die, connections break, sources fail: nothing is lost, and finished blocks are not computed again."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import dask
import pytest
from distributed import Client, LocalCluster
from support.fault_runs import Cluster, cluster, embed_to_store, files, finished, plain, readings, start

import xr_anysat
from xr_anysat.errors import WriteError

pytestmark = pytest.mark.slow

BLOCKS = {
    "plain": {(i, j) for i in range(4) for j in range(5)},
    "embedding": {(i, j) for i in range(4) for j in range(4)},
}


def until(happened: Callable[[], bool], what: str, timeout: float = 60) -> None:
    """Wait until another process has done something."""
    end = time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < end, f"{what}: not within {timeout} s"
        time.sleep(0.002)


def reads(folder: Path) -> Counter[tuple[int, int]]:
    """How often each block was read so far."""
    return Counter(block for block, _ in readings(folder))


def again(kind: str, folder: Path, scheduler: str | None = None) -> Counter[tuple[int, int]]:
    """Repeat the call in a fresh process; how often it read each block."""
    earlier = reads(folder)
    assert start(embed_to_store, kind, folder, scheduler=scheduler).hears("done", "error") == ("done",)
    return reads(folder) - earlier


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, bytes], list[str]]]:
    """By kind of cube: the files of a run that nothing happens to, and what it does to them."""
    runs = {}
    for kind, blocks in BLOCKS.items():
        folder = tmp_path_factory.mktemp(kind)
        run = start(embed_to_store, kind, folder)
        _, operations = run.hears("operations")
        assert run.hears() == ("done",)
        assert finished(folder) == blocks
        assert reads(folder) == dict.fromkeys(blocks, 1 if kind == "plain" else 2)  # for statistics too
        runs[kind] = files(folder), operations
    return runs


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Cluster]:
    """Two of them, and their scheduler."""
    with cluster(tmp_path / "scratch") as it:
        yield it


# ---------------------------------------------------------------------- killed at 20 random moments

# A moment is defined by the progress of the run, because the clock says little about it on a busy machine.
SEED = 2022
_draw = random.Random(SEED)
PROCESS = [(part, _draw.random()) for part in ("statistics", "head", "blocks", "finish") for _ in range(2)]
CLUSTER = [
    (victim, kind, _draw.random(), _draw.uniform(0, 0.03))
    for victim in ("a worker", "both workers", "the scheduler", "the client")
    for kind in ("plain", "embedding", "embedding")
]
assert len(PROCESS) + len(CLUSTER) == 20


def _parts(operations: list[str]) -> dict[str, range]:
    """When a run does what, in numbers of its operations on files."""
    renames = [n for n, o in enumerate(operations) if o.startswith("os.rename")]
    head = next(n for n, o in enumerate(operations) if o.endswith(".partial"))
    blocks = next(n for n, o in enumerate(operations) if n > head and o.startswith("open reads"))
    rest = 1 + max(n for n in renames if "area.zarr/anysat/c" in operations[n])
    return {
        "statistics": range(head),
        "head": range(head, blocks),
        "blocks": range(blocks, rest),
        "finish": range(rest, 1 + max(renames)),
    }


def _name(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.3f}"


@pytest.mark.parametrize(("part", "moment"), PROCESS, ids=_name)
def test_killed_process(part: str, moment: float, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    whole, operations = undisturbed["embedding"]
    span = _parts(operations)[part]
    number = span[int(moment * len(span))]
    print(f"seed {SEED}, {part}: operation {number} of {len(operations)}, {operations[number]}")
    run = start(embed_to_store, "embedding", tmp_path, moment=number)
    run.process.join()
    assert run.process.exitcode == -signal.SIGKILL
    begun = (tmp_path / "out/area.zarr/zarr.json").exists()
    missing = BLOCKS["embedding"] - finished(tmp_path)
    assert again("embedding", tmp_path) == dict.fromkeys(missing, 1 if begun else 2)
    assert files(tmp_path) == whole


@pytest.mark.parametrize(
    "draft", ["os.link out/area.zarr/zarr.", "os.rename out/anysat", "os.rename out/area.stac"]
)
def test_killed_before_a_file_is_in_place(draft: str, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    run = start(embed_to_store, "embedding", tmp_path, moment=draft)
    run.process.join()
    assert any(name.endswith(".partial") for name in files(tmp_path))
    again("embedding", tmp_path)
    assert files(tmp_path) == undisturbed["embedding"][0]


@pytest.mark.parametrize(("victim", "kind", "moment", "pause"), CLUSTER, ids=_name)
def test_killed_on_a_cluster(
    victim: str, kind: str, moment: float, pause: float,
    workers: Cluster, undisturbed: dict[str, Any], tmp_path: Path,
) -> None:  # fmt: skip
    number = int(moment * len(BLOCKS[kind]) * (1 if kind == "plain" else 2))
    print(f"seed {SEED}: {victim} killed {1000 * pause:.1f} ms after reading {number} of {kind}")
    run = start(embed_to_store, kind, tmp_path, scheduler=workers.address, pause=0.01)
    until(lambda: reads(tmp_path).total() >= number, f"reading {number}")
    time.sleep(pause)
    if victim == "the client":
        run.kill()
        until(lambda: not workers.tasks(), "the cluster stops")
        there = finished(tmp_path)
        assert not there & again(kind, tmp_path, workers.address).keys()
    elif victim == "the scheduler":
        workers.scheduler.kill()
        run.hears("done", "error")
        for worker in workers.workers:  # which close themselves
            worker.process.join(60)
            assert worker.process.exitcode is not None
        there = finished(tmp_path)
        with cluster(tmp_path / "scratch") as others:
            assert not there & again(kind, tmp_path, others.address).keys()
    else:
        there = finished(tmp_path)
        there -= workers.unfinished()  # the scheduler may not know yet
        earlier = reads(tmp_path)
        for worker in workers.workers[: 1 if victim == "a worker" else 2]:
            worker.kill()
        if victim == "both workers":
            workers.add_worker()
        assert run.hears("done", "error") == ("done",)
        assert not there & (reads(tmp_path) - earlier).keys()
        assert again(kind, tmp_path) == {}
    assert files(tmp_path) == undisturbed[kind][0]


# ---------------------------------------------------------------------- faults within one call


def test_worker_dies_in_the_middle(workers: Cluster, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    run = start(embed_to_store, "plain", tmp_path, scheduler=workers.address, pause=0.1)
    forgotten: set[tuple[int, int]] = set()
    while len(forgotten) < 8:  # the scheduler keeps nothing of a finished block, or it would make it again
        assert run.hears()[0] == "blocks"
        forgotten = finished(tmp_path) - workers.unfinished()
    victim = workers.workers[0]
    victim.kill()
    assert run.hears("done", "error") == ("done",)
    twice = {block for block, times in reads(tmp_path).items() if times > 1}
    assert not twice & forgotten
    assert twice <= {block for block, process in readings(tmp_path) if process == victim.process.pid}
    assert len(twice) <= 5  # the one it was at, and what it had done and the client not yet seen
    assert files(tmp_path) == undisturbed["plain"][0]


def test_worker_runs_out_of_memory(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    with LocalCluster(
        n_workers=2, threads_per_worker=1, memory_limit="800MB", dashboard_address=":0",
        local_directory=str(tmp_path / "scratch"),
    ) as workers:  # fmt: skip
        run = start(embed_to_store, "plain", tmp_path, scheduler=workers.scheduler_address, trouble="memory")
        assert run.hears("done", "error") == ("done",)
    killed = next(process for block, process in readings(tmp_path) if block == (2, 2))
    assert reads(tmp_path)[2, 2] == 2
    twice = {block for block, times in reads(tmp_path).items() if times > 1}
    assert twice <= {block for block, process in readings(tmp_path) if process == killed}
    assert len(twice) <= 5
    assert files(tmp_path) == undisturbed["plain"][0]


@pytest.mark.parametrize("kind", ["plain", "embedding"])
def test_read_that_fails_twice(
    kind: str, workers: Cluster, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    run = start(embed_to_store, kind, tmp_path, scheduler=workers.address, trouble="twice")
    assert run.hears("done", "error") == ("done",)
    once = 1 if kind == "plain" else 2
    assert reads(tmp_path) == {block: once + 2 * (block == (2, 2)) for block in BLOCKS[kind]}
    assert files(tmp_path) == undisturbed[kind][0]


@pytest.mark.parametrize("on", ["a cluster", "threads"])
def test_read_that_always_fails(on: str, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    with cluster(tmp_path / "scratch") if on == "a cluster" else nullcontext() as workers:
        address = workers and workers.address
        run = start(embed_to_store, "plain", tmp_path, scheduler=address, pause=0.01, trouble="always")
        _, kind, message, notes = run.hears("done", "error")
        run.process.join()
        assert (kind, message) == ("OSError", "no connection to asset 2-2.tif")
        if workers:
            assert notes.pop(0) == "while block (2, 2) along (y, x) was computed"
            until(lambda: not workers.tasks(), "the cluster stops")
        (note,) = notes
        assert note.endswith("are finished and kept: repeat the call to resume")
        there = finished(tmp_path)
        assert 0 < int(note.split(" of the 20 blocks of ")[0]) <= len(there) < 20
        # a worker finishes its current task, although it is no longer needed
        assert again("plain", tmp_path, address).keys() <= BLOCKS["plain"] - there
    assert files(tmp_path) == undisturbed["plain"][0]


def test_store_that_workers_do_not_see(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    store = tmp_path / "out/area.zarr"

    def progress(done: int, total: int) -> None:
        if done == 3:
            shutil.rmtree(store)

    emb = plain(tmp_path / "reads")
    wanted = r"area.zarr' could not be written: it does not exist on .*\. Expected a folder that client and workers"
    with dask.config.set(scheduler="synchronous"), pytest.raises(WriteError, match=wanted) as seen:
        emb.anysat.to_zarr(store, progress=progress)
    assert seen.value.__notes__[0].startswith("3 of the 20 blocks")
    assert again("plain", tmp_path) == dict.fromkeys(BLOCKS["plain"], 1)
    assert files(tmp_path) == undisturbed["plain"][0]


@pytest.mark.parametrize("lost", ["the client closes", "the scheduler goes"])
def test_connection_is_lost(lost: str, workers: Cluster, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    closes = {"close_after": 5} if lost == "the client closes" else {}
    run = start(embed_to_store, "plain", tmp_path, scheduler=workers.address, pause=0.1, **closes)
    if lost == "the scheduler goes":
        until(lambda: len(finished(tmp_path)) >= 5, "5 blocks")
        workers.scheduler.kill()
    _, kind, message, notes = run.hears("done", "error")
    assert kind == "WriteError"
    assert message.startswith("the cluster stopped: the connection to its scheduler was lost")
    (note,) = notes
    assert f" of the 20 blocks of '{tmp_path}/out/area.zarr' are finished and kept" in note
    if closes:
        until(lambda: not workers.tasks(), "the cluster stops")
    for worker in workers.workers:
        worker.kill()
    there = finished(tmp_path)
    assert 5 <= len(there) < 20
    with cluster(tmp_path / "scratch") as others:
        assert again("plain", tmp_path, others.address) == dict.fromkeys(BLOCKS["plain"] - there, 1)
    assert files(tmp_path) == undisturbed["plain"][0]


@pytest.mark.parametrize("on", ["a cluster", "threads"])
def test_interrupted(on: str, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    with cluster(tmp_path / "scratch") if on == "a cluster" else nullcontext() as workers:
        address = workers and workers.address
        run = start(embed_to_store, "plain", tmp_path, scheduler=address, pause=0.1, stay=True)
        while run.hears()[1] < 5:
            pass
        os.kill(run.process.pid, signal.SIGINT)
        _, kind, _, notes = run.hears("done", "error")
        assert kind == "KeyboardInterrupt"
        assert "of the 20 blocks of" in notes[0]
        if workers:  # though its client is still there
            until(lambda: not workers.tasks(), "the cluster stops")
        run.kill()
        there = finished(tmp_path)
        assert 5 <= len(there) < 20
        assert again("plain", tmp_path, address).keys() <= BLOCKS["plain"] - there
    assert files(tmp_path) == undisturbed["plain"][0]


def test_one_of_two_clients_is_interrupted(
    workers: Cluster, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    one, other = (
        start(embed_to_store, "plain", tmp_path, scheduler=workers.address, pause=0.2) for _ in range(2)
    )
    while other.hears()[1] < 3:  # by then they share what is left
        pass
    os.kill(one.process.pid, signal.SIGINT)
    assert one.hears("done", "error")[1] == "KeyboardInterrupt"
    assert other.hears("done", "error") == ("done",)
    assert files(tmp_path) == undisturbed["plain"][0]


# ---------------------------------------------------------------------- who works


def test_tasks_ask_for_their_gpu(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    with cluster(tmp_path / "scratch", workers=1) as workers:
        run = start(embed_to_store, "embedding", tmp_path, scheduler=workers.address, gpu=True)
        run.hears("blocks")
        until(lambda: "anysat-write" in {key[0][:12] for key in workers.tasks()}, "blocks are known")
        tasks = workers.tasks()
        blocks = {key: asks for key, asks in tasks.items() if key[0].startswith("anysat-write")}
        assert len(blocks) == 16
        assert all(asks == {"GPU": 1} for asks in blocks.values())
        assert not any("encode" in key[0] for key in tasks)  # a block is embedded and written by one task
        workers.add_worker(resources={"GPU": 1})
        assert run.hears("done", "error") == ("done",)
    assert files(tmp_path) == undisturbed["embedding"][0]


def test_the_scheduler_that_is_asked_for_works(workers: Cluster, tmp_path: Path) -> None:
    here = {os.getpid()}
    theirs = {worker.process.pid for worker in workers.workers}

    def readers(name: str) -> set[int]:
        folder = tmp_path / name
        xr_anysat.to_zarr(plain(folder / "reads"), folder / "out/area.zarr")
        return {process for _, process in readings(folder)}

    with Client(workers.address) as client:
        assert readers("active client") <= theirs
        with dask.config.set(scheduler="threads"):
            assert readers("threads beside a client") == here
    with Client(workers.address, set_as_default=False) as client:
        assert readers("a client that is not active") == here
        with dask.config.set(scheduler=client):
            assert readers("a client by name") <= theirs

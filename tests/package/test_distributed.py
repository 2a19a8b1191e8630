"""Scheduler and workers as processes of their own, without internet and without a folder in common."""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cloudpickle
import dask
import numpy as np
import pytest
import torch
import xarray as xr
from distributed import Client
from distributed.protocol import serialize, to_serialize
from safetensors import safe_open
from support.cubes import small_cube, tile_of_sentinel2
from support.paths import ROOT, TESTS

import xr_anysat
import xr_anysat.distributed
from xr_anysat.distributed import prepare
from xr_anysat.embedding import blocks, forward
from xr_anysat.embedding.settings import BlockSpec
from xr_anysat.errors import AnySatWarning, CubeTypeError, DeviceError, WeightsError
from xr_anysat.model import state_dict, weights
from xr_anysat.model.source import WeightsSource
from xr_anysat.model.spec import SIZES, Size
from xr_anysat.model.weights import EncoderSpec, encoder_spec, get_encoder

pytestmark = pytest.mark.slow

TINY = {"model": "tiny", "weights": "random", "device": "cpu"}
OPTIONS = {"frames": 3, "tile": 12, "patch_size": 20, "norm": "pastis", "device": "cpu"}
KEEP_ANNOTATIONS = {
    "DASK_OPTIMIZATION__FUSE__ACTIVE": "False",
    "DASK_OPTIMIZATION__ANNOTATIONS__FUSE": "False",
}
SCHEDULER_OPTIMIZES = hasattr(dask.base, "collections_to_expr")  # the client does before dask 2025.4


@dataclass
class Cluster:
    """What tests need of the cluster: a client, worker addresses by name, and a way to start workers."""

    client: Client
    folder: Path
    start: Callable[..., subprocess.Popen[bytes]]
    addresses: dict[str, str]

    def cache(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A scheduler, worker "two" (two threads, a nanny, a GPU by name), worker "one" (one thread, no nanny)."""
    folder = tmp_path_factory.mktemp("cluster")
    ours = ("XR_ANYSAT_", "DASK_", "HF_")
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS" and not k.startswith(ours)}
    env |= KEEP_ANNOTATIONS
    env |= {"HF_HOME": str(folder / "hf"), "XR_ANYSAT_OFFLINE": "1", "PYTHONPATH": str(TESTS)}
    processes: list[subprocess.Popen[bytes]] = []

    def run(what: str, *arguments: str, cache: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.dask_{what}", "--no-dashboard", *arguments]
        processes.append(
            subprocess.Popen(
                [*command, "--scheduler-file", str(folder / "scheduler.json")],
                env=env | {"XR_ANYSAT_CACHE_DIR": str(folder / cache)},
                cwd=folder,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )
        return processes[-1]

    def start(name: str, *arguments: str) -> subprocess.Popen[bytes]:
        return run("worker", "--name", name, *arguments, cache=name)

    try:
        run("scheduler", "--port", "0", "--no-show", cache="scheduler")
        start("two", "--nthreads", "2", "--nworkers", "1", "--resources", "GPU=1")
        start("one", "--nthreads", "1", "--no-nanny")
        with Client(scheduler_file=str(folder / "scheduler.json"), set_as_default=False) as client:
            yield Cluster(client, folder, start, {name: address_of(name, client) for name in ("two", "one")})
            client.shutdown()
    finally:
        for process in reversed(processes):  # the scheduler last
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture
def checkpoint(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Weights of a seed of their own, so that no test finds what another one sent."""
    seed = sum(map(ord, request.node.name))
    torch.save({"state_dict": weights.random_state("tiny", seed)}, tmp_path / "mine.pth")
    return tmp_path / "mine.pth"


def lazy(path: Path, **options: Any) -> xr.DataArray:
    cube = small_cube().chunk(time=2, y=17)
    return cube.anysat.embed(period="2022", model="tiny", weights=path, **{**OPTIONS, **options})


def close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*")) if folder.exists() else []


# ---------------------------------------------------------------------------- prepare


def vanish(path: Path) -> None:
    path.unlink()


def change(path: Path) -> None:
    torch.save({"state_dict": weights.random_state("tiny", 12345)}, path)


@pytest.mark.parametrize(
    ("happen", "message"),
    [
        (
            vanish,
            r"no weights file '.*mine.pth' on this machine. Its cached copy \w{64}.safetensors is not in .*",
        ),
        (
            change,
            r"mine.pth' has changed since the embedding was planned: its sha256 is \w{64}, expected \w{64}.*",
        ),
    ],
    ids=["vanish", "change"],
)
def test_workers_without_the_weights_are_sent_them(
    cluster: Cluster, checkpoint: Path, happen: Callable[[Path], None], message: str
) -> None:
    emb = lazy(checkpoint)
    want = emb.compute(scheduler="synchronous").values
    happen(checkpoint)  # from here on, workers do not find by its path what the client has read
    with pytest.raises(
        WeightsError, match=rf"{message}xr_anysat.distributed.prepare\(client, embedding\) sends"
    ):
        emb.compute(scheduler=cluster.client)
    addresses = cluster.addresses.values()
    assert prepare(cluster.client, emb) == dict.fromkeys(addresses, "cpu")
    close(emb.compute(scheduler=cluster.client).values, want)
    name = f"{emb.attrs['weights_sha256']}.safetensors"
    for worker in cluster.addresses:
        assert name in files(cluster.cache(worker))
        with safe_open(cluster.cache(worker) / name, framework="pt") as file:
            assert set(file.keys()) == set(state_dict.state_shapes("tiny", ("s2",)))
    assert not any(
        file.endswith(".tmp") for worker in cluster.addresses for file in files(cluster.cache(worker))
    )
    assert files(cluster.cache("scheduler")) == []


def loaded(spec: EncoderSpec) -> bool:
    return weights._key(spec) in weights._loaded


def own_pid() -> int:
    return os.getpid()


def address_of(name: str, client: Client, other_than: str = "") -> str:
    """Wait for a worker of that name."""
    for _ in range(600):
        for address, worker in client.scheduler_info(n_workers=-1)["workers"].items():
            if worker["name"] == name and address != other_than:
                return str(address)
        time.sleep(0.1)
    raise TimeoutError(name)


def plugins(dask_scheduler: Any) -> list[str]:
    return [name for name in dask_scheduler.worker_plugins if name.startswith("xr-anysat")]


def held() -> tuple[int, int]:
    return len(xr_anysat.distributed._held), len(xr_anysat.distributed._arriving)


def test_workers_that_come_later_load_before_their_first_task(cluster: Cluster, checkpoint: Path) -> None:
    emb, client = lazy(checkpoint), cluster.client
    spec = encoder_spec("tiny", checkpoint, "cpu")
    emb.compute(scheduler="synchronous")
    vanish(checkpoint)
    prepare(client, emb)
    before = client.run_on_scheduler(held), client.run_on_scheduler(plugins)
    assert prepare(client, spec).keys() == set(cluster.addresses.values())
    assert (
        client.run_on_scheduler(held),
        client.run_on_scheduler(plugins),
    ) == before  # nothing was sent again
    assert sum(spec.sha256 in name for name in before[1]) == 1
    assert before[0][1] == 0

    late = cluster.start("late", "--nthreads", "1", "--no-nanny")
    assert client.submit(loaded, spec, workers=address_of("late", client), pure=False).result()
    assert f"{spec.sha256}.safetensors" in files(cluster.cache("late"))
    client.retire_workers(names=["late"])
    late.wait(30)

    kept = cluster.cache("two") / f"{spec.sha256}.safetensors"
    sent, old = kept.stat(), client.submit(own_pid, workers="two", pure=False).result()
    address = cluster.addresses["two"]
    os.kill(old, signal.SIGKILL)  # its nanny starts another
    cluster.addresses["two"] = restarted = address_of("two", client, other_than=address)
    assert client.submit(loaded, spec, workers=restarted, pure=False).result()
    assert client.submit(own_pid, workers=restarted, pure=False).result() != old
    assert kept.stat().st_mtime_ns == sent.st_mtime_ns  # what is kept is not fetched again


def test_random_weights_need_not_travel(cluster: Cluster) -> None:
    emb = small_cube().chunk(time=2).anysat.embed(**{**OPTIONS, **TINY, "weights": ("random", 77)})
    before = cluster.client.run_on_scheduler(held)
    assert set(prepare(cluster.client, emb).values()) == {"cpu"}
    assert cluster.client.run_on_scheduler(held) == before
    spec = encoder_spec("tiny", ("random", 77), "cpu")
    assert set(cluster.client.run(loaded, spec).values()) == {True}


def test_the_official_checkpoint_is_known_by_the_ends_of_its_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that was built before it was there finds what another machine's copy was turned into."""
    sha256 = "ce124652" + "0" * 52 + "3d4f"
    spec = EncoderSpec("base", WeightsSource("official"), None, "cpu", "float32")
    monkeypatch.setattr(weights, "_loaded", {})
    monkeypatch.setattr(weights, "official_path", lambda download=True: pytest.fail("it was looked for"))
    monkeypatch.setitem(SIZES, "base", Size(32, 2, 2))  # of the real structure, but small
    with xr_anysat.config.set(cache_dir=str(tmp_path)):
        weights.cached_file("0" * 64).touch()
        state = weights.random_state("base", 0, ("s2",))
        weights.write_cached(state, weights.cached_file(sha256), sha256)
        encoder = get_encoder(spec)
        assert torch.equal(encoder.state_dict()["cls_token"], state["cls_token"])
        assert weights.loaded_sha256(spec) == sha256
        assert weights.is_available_offline(weights.with_known_hash(spec))
        assert get_encoder(replace(spec, sha256=sha256)) is encoder


def test_an_official_checkpoint_that_is_nowhere_is_not_downloaded_by_workers(tmp_path: Path) -> None:
    spec = EncoderSpec("base", WeightsSource("official"), "ce124652" + "0" * 52 + "3d4f", "cpu", "float32")
    with xr_anysat.config.set(cache_dir=str(tmp_path)):
        assert not weights.is_available_offline(spec)
        with (
            xr_anysat.config.set(offline=True),
            pytest.raises(
                WeightsError, match=r"is not on this machine.*xr_anysat.distributed.prepare\(client"
            ),
        ):
            get_encoder(spec)


def test_what_cannot_be_prepared(cluster: Cluster) -> None:
    with pytest.raises(WeightsError, match=r"exists in one process only and cannot be sent.*torch.save\("):
        prepare(cluster.client, encoder_spec(xr_anysat.load_model("tiny", weights="random")))
    with pytest.raises(CubeTypeError, match=r"prepare\(client, str\): expected the embedding"):
        prepare(cluster.client, "base")
    with pytest.raises(CubeTypeError, match=r"its attrs \[\] have no record of an encoder"):
        prepare(cluster.client, small_cube())


def test_a_missing_device_is_said_with_the_worker(cluster: Cluster) -> None:
    before = cluster.client.run_on_scheduler(plugins)
    message = r"2 of 2 workers cannot be prepared. tcp://.*: device='cuda:99' was requested, but PyTorch"
    with pytest.raises(DeviceError, match=message):
        prepare(cluster.client, encoder_spec("tiny", "random", "cuda:99"))
    assert cluster.client.run_on_scheduler(plugins) == before


def use_cache(folder: str) -> None:
    xr_anysat.config.set(cache_dir=folder)


def hold(sha256: str, content: bytes) -> None:
    xr_anysat.distributed._held[sha256] = io.BytesIO(content)


def test_weights_that_do_not_arrive(cluster: Cluster, checkpoint: Path) -> None:
    client, spec = cluster.client, encoder_spec("tiny", checkpoint, "cpu")
    weights.load_state(spec)
    vanish(checkpoint)
    (cluster.folder / "file").touch()
    client.run(use_cache, str(cluster.folder / "file" / "cache"), workers=[cluster.addresses["one"]])
    message = r"1 of 2 workers cannot be prepared. tcp://.*: the weights cannot be written into the cache folder '.*'.*"
    with pytest.raises(WeightsError, match=message + "Set XR_ANYSAT_CACHE_DIR to a folder"):
        prepare(client, spec)
    client.run(use_cache, str(cluster.cache("one")), workers=[cluster.addresses["one"]])
    client.run_on_scheduler(hold, spec.sha256, b"noise" * 100)
    before = files(cluster.cache("one"))
    with pytest.raises(
        WeightsError, match=r"1 of 2 .* arrived damaged, or from another version of xr_anysat"
    ):
        prepare(client, spec)
    assert files(cluster.cache("one")) == before


def test_a_scheduler_that_has_no_room(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Client(processes=False, n_workers=1, dashboard_address=":0", set_as_default=False) as client:
        monkeypatch.setattr(tempfile, "TemporaryFile", full)
        message = r"scheduler cannot store .* temporary folder '.*' \(.*No space left.*Set TMPDIR to a folder"
        with pytest.raises(WeightsError, match=message):
            prepare(client, encoder_spec("tiny", checkpoint, "cpu"))


# ---------------------------------------------------------------------------- threads


def threads_of_a_forward(frames: np.ndarray, settings: BlockSpec) -> list[Any]:
    """Torch's threads before a forward, all numbers seen in it, and after, in the thread that this runs in."""
    before, seen = torch.get_num_threads(), set()
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.add(torch.get_num_threads()))
    try:
        blocks.encode_block(frames, None, np.arange(12), np.arange(12), settings=settings)
    finally:
        hook.remove()
    return [before, seen, torch.get_num_threads()]


@pytest.fixture
def block() -> tuple[np.ndarray, BlockSpec]:
    frames = small_cube(height=12, width=12, dates=2, gaps=0).astype("float32").values
    return frames, BlockSpec(encoder_spec(**TINY), (10, 200), "unit_scale", "patch", 12, 2, None)


def test_a_forward_has_the_threads_of_its_worker(cluster: Cluster, block: Any) -> None:
    with_nanny = cluster.client.submit(threads_of_a_forward, *block, workers="two", pure=False).result()
    assert with_nanny == [1, {2}, 1]  # a nanny sets OMP_NUM_THREADS=1
    without = cluster.client.submit(threads_of_a_forward, *block, workers="one", pure=False).result()
    assert without == [without[0], {1}, without[0]]


def in_a_new_thread(call: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_outside_a_worker_the_users_number_holds(block: Any) -> None:
    assert in_a_new_thread(lambda: threads_of_a_forward(*block)) == [3, {3}, 3]
    with Client(
        processes=False, n_workers=1, threads_per_worker=1, dashboard_address=":0", set_as_default=False
    ) as client:
        assert client.submit(threads_of_a_forward, *block).result() == [3, {1}, 3]
    assert in_a_new_thread(torch.get_num_threads) == 3
    assert threads_of_a_forward(*block) == [3, {3}, 3]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    dask.threaded.default_pool = None  # its threads keep the number that they were born with
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_where_it_runs_changes_no_bit(cluster: Cluster) -> None:
    emb = small_cube().chunk(time=2, y=17).anysat.embed(**{**OPTIONS, **TINY, "norm": "pastis"})
    want = emb.compute(scheduler="threads")
    xr.testing.assert_identical(emb.compute(scheduler="synchronous"), want)
    xr.testing.assert_identical(
        cluster.client.compute(emb, workers="two", allow_other_workers=False).result(), want
    )
    with Client(
        processes=False, n_workers=1, threads_per_worker=2, dashboard_address=":0", set_as_default=False
    ) as client:
        xr.testing.assert_identical(emb.compute(scheduler=client), want)


# ---------------------------------------------------------------------------- GPUs


def restrictions(dask_scheduler: Any) -> dict[str, list[Any]]:
    """The resources that tasks were restricted to, by the name of their layer."""
    found: dict[str, list[Any]] = {}
    for key, task in dask_scheduler.tasks.items():
        name = key[0] if isinstance(key, tuple) else key
        found.setdefault(name, []).append(task.resource_restrictions)
    return found


def count_forwards(spec: EncoderSpec) -> None:
    model = get_encoder(spec)
    model.forwards = 0  # type: ignore[assignment]
    real = model.encode

    def encode(*args: Any, **kwargs: Any) -> Any:
        model.forwards += 1
        return real(*args, **kwargs)

    object.__setattr__(model, "encode", encode)


def forwards(spec: EncoderSpec) -> int:
    model = get_encoder(spec)
    object.__delattr__(model, "encode")
    return model.forwards


def test_forwards_go_to_the_workers_with_a_gpu(cluster: Cluster, tmp_path: Path) -> None:
    client, spec = cluster.client, encoder_spec(**TINY)
    client.run(count_forwards, spec)
    frames = small_cube().chunk(time=2, y=17).anysat.frames(3, period="2022")
    with dask.annotate(resources={"GPU": 1}):
        emb = frames.anysat.embed(frames=None, tile=12, patch_size=20, norm="pastis", **TINY)
    want = emb.compute(scheduler="synchronous")
    with dask.config.set({} if SCHEDULER_OPTIMIZES else dask.config.collect_env(KEEP_ANNOTATIONS)):
        kept = client.persist(emb)
    close(kept.compute(scheduler=client).values, want.values)
    seen = client.run_on_scheduler(restrictions)
    assert seen[emb.data.name] == [{"GPU": 1}] * emb.data.npartitions
    assert set(map(str, seen[frames.data.name])) == {"None"}
    del kept
    with client.as_current():
        close(emb.anysat.to_zarr(tmp_path / "store.zarr").values, want.values)
    counts = {name: client.run(forwards, spec, workers=[a])[a] for name, a in cluster.addresses.items()}
    assert counts["one"] == 0
    assert counts["two"] >= 2 * emb.data.npartitions


class Cramped(torch.nn.Module):
    """Called like upstream's module, on a device that has memory for some windows only."""

    def __init__(self, inner: torch.nn.Module, room: int) -> None:
        super().__init__()
        self.inner, self.room = inner, room
        self.sizes: list[int] = []

    def forward(self, x: dict[str, torch.Tensor], **kwargs: Any) -> torch.Tensor:
        self.sizes.append(len(x["s2"]))
        if self.sizes[-1] > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")
        return self.inner(x, **kwargs)


@pytest.fixture
def embed_cramped(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[xr.DataArray, list[int]]]:
    """An embedding made on a device with room for so many windows, and the windows of each forward."""
    inner = xr_anysat.load_model("tiny", weights="random", device="cpu")

    def run(size: int, room: int, batch: int, least: int) -> tuple[xr.DataArray, list[int]]:
        monkeypatch.setattr(forward, "_batch", lambda settings, device: batch)
        monkeypatch.setattr(blocks, "MIN_BLOCKS", least)
        model, cube = Cramped(inner, room), small_cube(height=size, width=size, gaps=0)
        options = {"frames": 2, "patch_size": 20, "tile": 12, "anchor": "cube", "norm": "pastis"}
        return cube.anysat.embed(**options, model=model), model.sizes

    return run


def test_a_batch_that_does_not_fit_is_halved_and_goes_on(embed_cramped: Any) -> None:
    want, _ = embed_cramped(36, room=2, batch=2, least=1)
    with pytest.warns(AnySatWarning) as said:
        got, sizes = embed_cramped(36, room=3, batch=8, least=1)
    assert sizes == [8, 4, 2, 2, 2, 2, 1]
    np.testing.assert_array_equal(got.values, want.values)
    message = (
        r"cpu does not have enough memory for {} windows per forward pass \(CUDA out of memory. Tried to allocate "
        r"2.00 GiB.\). It continues with {}, which changes nothing but rounding. Pass batch={} to start with that"
    )
    for warning, windows in zip(said, (8, 4), strict=True):
        assert re.match(message.format(windows, windows // 2, windows // 2), str(warning.message))


def test_what_fits_is_remembered(embed_cramped: Any) -> None:
    want, sizes = embed_cramped(48, room=1, batch=1, least=2)
    assert sizes == [1] * 16
    with pytest.warns(AnySatWarning, match="It continues with 1") as said:
        got, sizes = embed_cramped(48, room=1, batch=8, least=2)  # blocks of 1, 3, 3 and 9 windows
    assert sorted(sizes) == [1] * 16 + [max(sizes)]
    assert len(said) == 1
    np.testing.assert_array_equal(got.values, want.values)


def test_a_window_that_does_not_fit_is_an_error_that_says_what_helps() -> None:
    model = Cramped(xr_anysat.load_model("tiny", weights="random", device="cpu"), 0)
    message = (
        r"cpu does not have enough memory for one window of 12 × 12 pixels and 2 frames \(CUDA out of memory. "
        r"Tried to allocate 2.00 GiB.\). Pass a smaller tile, a larger patch_size, fewer frames or precision='bfloat16'"
    )
    cube = small_cube(height=12, width=12, gaps=0)
    with pytest.raises(DeviceError, match=message):
        cube.anysat.embed(frames=2, tile=12, norm="pastis", model=model)


# ---------------------------------------------------------------------------- graphs


@pytest.mark.parametrize(
    ("chunks", "options"),
    [((1, 10, 1024, 1024), {"patch_size": 40, "tile": 64}), ((1, 10, 2048, 2048), {"output": "dense"})],
)
def test_the_graph_of_a_granule_is_small(chunks: tuple[int, ...], options: dict[str, Any]) -> None:
    """As a client sends it: optimized and pickled; and as the scheduler sends each task of it."""
    if not SCHEDULER_OPTIMIZES:
        pytest.skip(
            "dask before 2025.4 sends every task of a graph, which its blockwise layers do not shrink"
        )
    emb = tile_of_sentinel2(chunks).anysat.embed(frames=8, period="2022", weights="random", **options)
    expr = dask.base.collections_to_expr([emb.data], True).optimize()
    header, frames = serialize(to_serialize(expr), on_error="raise")
    assert len(cloudpickle.dumps(header)) + sum(map(len, frames)) < 20_000_000
    tasks = expr.__dask_graph__()
    kinds: dict[str, list[Any]] = {}
    for key, task in tasks.items():
        kinds.setdefault(key[0] if isinstance(key, tuple) else key, []).append(task)
    for kind, alike in kinds.items():
        most = max(alike, key=lambda task: len(task.dependencies))
        assert max(len(cloudpickle.dumps(task)) for task in (*alike[:3], most)) < 50_000, kind


def test_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python of docs/clusters.md, from top to bottom, on a cluster of its own."""
    text = (ROOT / "docs" / "clusters.md").read_text()
    names: dict[str, Any] = {"cube": small_cube(height=12, width=12).chunk(time=3)}
    monkeypatch.chdir(tmp_path)
    try:
        with xr_anysat.config.set(**TINY):
            for code in re.findall(r"```python\n(.*?)```", text, re.S):
                exec(code, names)
    finally:
        names["client"].cluster.close()
        names["client"].close()
    assert np.isfinite(xr_anysat.open("embeddings.zarr").values).any()
    assert names["emb"].data.dask.layers[names["emb"].data.name].annotations == {"resources": {"GPU": 1}}


def test_prepare_is_found_as_the_readme_writes_it() -> None:
    code = (
        "import sys, xr_anysat; print('distributed' in sys.modules, xr_anysat.distributed.prepare.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "prepare"], done.stderr

"""What is held in memory between tasks: chunks and frames, in bytes, on areas of growing size."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from dask.blockwise import fuse_roots, optimize_blockwise
from dask.callbacks import Callback
from dask.core import flatten
from dask.highlevelgraph import HighLevelGraph
from distributed import Client
from distributed.diagnostics.plugin import SchedulerPlugin

import xr_anysat
from xr_anysat.cube import normalization
from xr_anysat.cube.compositing import STRIP_BYTES, compose_frame
from xr_anysat.embedding import blocks, options
from xr_anysat.shared.graph import in_turn, reading_priority, turns

pytestmark = pytest.mark.slow

DATES, FRAMES, TILE, BLOCK = 12, 4, 8, 24
DATE_PIXEL = 10 * 2  # bytes of a pixel of a date
PIXEL = FRAMES * 10 * 4  # and of all frames
SIDES = (128, 256, 512)  # 1, 4 and 16 times the area

# As 512, 1024, 256 pixels and strips of 128 rows are to blocks of 144: none of them fits the lattice
LAYOUTS = {
    "all bands of a date": (1, 10, 85, 85),
    "one band of a date": (1, 1, 170, 170),
    "all dates": (DATES, 10, 43, 43),
    "strips of the whole width": (1, 10, 21, -1),
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of their full size, 24 pixels, on areas of any size."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", BLOCK * BLOCK * 256 * 4)


def unobserved(block_info: Any) -> np.ndarray:
    """A chunk that nothing was observed in: the model is skipped, and all arrays have their size."""
    return np.zeros(block_info[None]["chunk-shape"], "uint16")


def area(side: int, chunks: tuple[int, ...]) -> xr.DataArray:
    """A lazy cube of `side` × `side` pixels whose corner and chunks are not on the lattice."""
    import odc.geo.xr  # noqa: F401

    shape = (DATES, 10, side, side)
    size = da.core.normalize_chunks(
        [n if c < 0 else min(c, n) for c, n in zip(chunks, shape, strict=True)], shape
    )
    coords = {
        "time": pd.date_range("2022-01-10", periods=DATES, freq="30D"),
        "band": list(xr_anysat.BANDS),
        "y": -10.0 * (500_003 + np.arange(side)) - 5,
        "x": 10.0 * (60_005 + np.arange(side)) + 5,
    }
    data = da.map_blocks(unobserved, chunks=size, dtype="uint16", meta=np.empty((0,) * 4, "uint16"))
    return xr.DataArray(data, coords, ("time", "band", "y", "x")).odc.assign_crs("EPSG:32632")


def embedded(side: int, chunks: tuple[int, ...]) -> xr.DataArray:
    cube = area(side, chunks)
    return cube.anysat.embed(FRAMES, period="2022", norm="pastis", tile=TILE, model="tiny", weights="random")


def forget(block: np.ndarray) -> np.ndarray:
    """In place of writing."""
    return np.empty((1, 1, 1), np.float32)


def work(emb: xr.DataArray) -> tuple[HighLevelGraph, list[Any]]:
    """The graph that computes and drops all blocks, and its keys row by row."""
    written = da.blockwise(
        forget, "dyx", emb.data, "dyx", align_arrays=False, dtype="float32",
        adjust_chunks=dict.fromkeys("dyx", 1), meta=np.empty((0, 0, 0), "float32"),
    )  # fmt: skip
    layers = written.dask.layers  # with the same answer about concatenating, dask makes one task of two
    layers[written.name].concatenate = layers[emb.data.name].concatenate
    keys = sorted(flatten(written.__dask_keys__()))
    return fuse_roots(optimize_blockwise(written.dask, keys=keys), keys=keys), keys


class Held(Callback):
    """The most bytes of arrays that a scheduler of this process held at any moment; a view counts as what it keeps."""

    def __init__(self) -> None:
        super().__init__(posttask=self.look)
        self.most = 0

    def look(self, key: Any, result: Any, dsk: Any, state: dict[str, Any], worker: Any) -> None:
        buffers = {}
        for array in state["cache"].values():
            if isinstance(array, np.ndarray):
                while isinstance(array.base, np.ndarray):
                    array = array.base
                buffers[id(array)] = array.nbytes
        self.most = max(self.most, sum(buffers.values()))


def held(graph: HighLevelGraph, keys: list[Any], get: Callable[..., Any] = dask.get) -> int:
    with Held() as bytes_held, in_turn(graph, keys):
        get(graph, keys)
    return bytes_held.most


@pytest.mark.parametrize("chunks", LAYOUTS.values(), ids=LAYOUTS)
def test_no_more_than_a_band_is_held(chunks: tuple[int, ...]) -> None:
    """The frames of a chunk and the dates of a bin they are made of, and the rows of a block across the area."""
    for side in SIDES:
        height, width = (side if n < 0 else n for n in chunks[2:])
        chunk = height * width * (PIXEL + max(chunks[0], DATES // FRAMES) * DATE_PIXEL)
        assert held(*work(embedded(side, chunks))) <= chunk + 1.25 * side * BLOCK * PIXEL


def test_writing_holds_no_more_either(tmp_path: Path) -> None:
    side, chunks = SIDES[1], LAYOUTS["all dates"]
    with Held() as bytes_held, dask.config.set(scheduler="sync"):
        embedded(side, chunks).anysat.to_zarr(tmp_path / "area.zarr")
    assert (
        bytes_held.most <= chunks[2] * chunks[3] * (PIXEL + DATES * DATE_PIXEL) + 1.25 * side * BLOCK * PIXEL
    )


@pytest.mark.parametrize("side", SIDES[:2])
def test_one_chunk_a_date_holds_the_dates_of_a_bin_beside_the_frames(side: int) -> None:
    """Each date has to be read as a whole, but no date waits for those of other bins."""
    dates = DATES // FRAMES
    assert held(*work(embedded(side, (1, 10, -1, -1)))) <= side**2 * (PIXEL + dates * DATE_PIXEL)


@pytest.mark.parametrize("chunks", [*LAYOUTS.values(), (1, 10, -1, -1)], ids=[*LAYOUTS, "one chunk a date"])
def test_statistics_hold_a_frame_at_a_time(chunks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The dates of a bin and their frame, whole and in pieces; of all frames, where chunks are small."""
    monkeypatch.setattr(normalization, "TASK_BYTES", 64 * 64 * PIXEL)
    for side in SIDES[:2]:
        frames = area(side, chunks).anysat.frames(FRAMES, period="2022").data
        with Held() as bytes_held:
            normalization.tile_statistics(frames).compute(scheduler="sync")
        height, width = (side if n < 0 else n for n in chunks[2:])
        dates = max(chunks[0], DATES // FRAMES)
        assert bytes_held.most <= height * width * (dates * DATE_PIXEL + 2 * PIXEL)


def test_statistics_and_embedding_do_not_share_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the statistics of the cube, reading it twice saves the memory of all its frames."""
    side, most = SIDES[1], {}
    for shared in (0, 1 << 40):
        monkeypatch.setattr(options, "MAX_SHARED_FRAME_BYTES", shared)
        emb = area(side, LAYOUTS["all dates"]).anysat.embed(
            FRAMES, period="2022", norm="per_tile_zscore", tile=TILE, model="tiny", weights="random"
        )
        most[shared] = held(*work(emb))
    assert most[1 << 40] >= side**2 * PIXEL
    assert most[0] <= side**2 * PIXEL / 2


def test_composing_takes_little_beside_the_frame() -> None:
    """Observations become float64 and masks on the way, several times their own size."""
    observed = np.ones((8, 10, 256, 256), "uint16")
    tracemalloc.start()
    frame = compose_frame([observed[:3], observed[3:]], "median", 0.0, None)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most - frame.nbytes <= 16 * STRIP_BYTES < 2 * observed.nbytes


def test_what_is_read_is_read_in_the_order_of_the_blocks() -> None:
    graph, keys = work(embedded(96, (DATES, 10, 43, 43)))
    priority = reading_priority(graph, keys)
    by_priority = sorted(priority, key=priority.__getitem__)
    chunks = [key for key in by_priority if key[0].startswith("unobserved")]
    assert [key[3:] for key in chunks[::-1]] == list(np.ndindex(3, 3))
    assert chunks == by_priority[: len(chunks)]  # whatever is not reading comes first


class Managed(SchedulerPlugin):
    """The most bytes that the workers of a cluster held at any moment, each copy counted."""

    most = 0

    async def start(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def transition(self, *args: Any, **kwargs: Any) -> None:
        self.most = max(self.most, sum(worker.nbytes for worker in self.scheduler.workers.values()))


def test_no_more_than_a_band_is_held_on_a_cluster(two_workers: Any, client: Client) -> None:
    """Worker processes over TCP; what they move between them and read ahead is theirs, and does not grow."""
    most = []
    client.register_plugin(Managed(), name="managed")
    managed = two_workers.scheduler.plugins["managed"]
    for side in (SIDES[0], SIDES[-1]):
        emb = embedded(side, LAYOUTS["all dates"])
        assert not any("P2P" in type(layer).__name__ for layer in emb.data.dask.layers.values())
        graph, keys = work(emb)
        managed.most = 0
        with dask.annotate(priority=turns(graph, keys)):
            client.get(graph, keys)
        most.append(managed.most)
    client.unregister_scheduler_plugin("managed")
    assert most[1] - most[0] <= 2 * (SIDES[-1] - SIDES[0]) * BLOCK * PIXEL

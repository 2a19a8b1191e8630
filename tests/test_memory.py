"""What is held in memory between tasks: chunks and frames, in bytes, on areas of growing size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

import xr_anysat
from xr_anysat import engine, radiometry
from xr_anysat.recompute import in_turn

DATES, FRAMES, TILE, BLOCK = 12, 4, 8, 24
FRAME_PIXEL = 10 * 4  # bytes of a pixel of a frame
PIXEL = FRAMES * FRAME_PIXEL
SIDES = (192, 384, 768)  # 1, 4 and 16 times the area

# As 1024, 2048, 512 pixels and strips of 256 rows are to blocks of 288: none of them fits the lattice
LAYOUTS = {
    "all bands of a date": (1, 10, 85, 85),
    "one band of a date": (1, 1, 170, 170),
    "all dates": (DATES, 10, 43, 43),
    "strips of the whole width": (1, 10, 21, -1),
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of their full size, 24 pixels, on areas of any size."""
    monkeypatch.setattr(engine, "BLOCK_BYTES", BLOCK * BLOCK * 256 * 4)


def unobserved(block_info: Any) -> np.ndarray:
    """A chunk that nothing was observed in: the model is skipped, and all arrays have their size."""
    return np.zeros(block_info[None]["chunk-shape"], "uint16")


def area(side: int, chunks: tuple[int, ...]) -> xr.DataArray:
    """A lazy cube of `side` × `side` pixels whose corner and chunks lie beside the lattice."""
    import odc.geo.xr  # noqa: F401

    shape = (DATES, 10, side, side)
    size = da.core.normalize_chunks([n if c < 0 else min(c, n) for c, n in zip(chunks, shape, strict=True)], shape)
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
    chunks = tuple((1,) * n for n in emb.data.numblocks)
    written = emb.data.map_blocks(forget, chunks=chunks, dtype="float32", meta=np.empty((0, 0, 0), "float32"))
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
    """A wider area adds the rows of one block, or of one chunk that reaches over the whole width, and nothing else."""
    most = [held(*work(embedded(side, chunks))) for side in SIDES]
    rows = BLOCK + (chunks[2] if chunks[3] < 0 else 0)
    for (narrow, before), (wide, after) in zip(zip(SIDES, most), zip(SIDES[1:], most[1:]), strict=False):
        assert after - before <= (wide - narrow) * rows * PIXEL
    assert most[-1] < SIDES[-1] ** 2 * PIXEL / 8

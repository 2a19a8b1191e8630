"""What a larger area costs a worker in memory, and what a second worker gains.

    python benchmarks/scaling.py [--model tiny|base] [--quick]

Memory is the peak of resident memory (VmHWM, Linux) of a process that has the model in memory already, while an
area of 1, 4 and 16 times the size goes into a Zarr store: of the larger of two worker processes of one thread
each, and of one process with dask's threads. Each figure has processes of its own. The cube is made up where it is
read, and nearly nothing in it was observed: a window without observations skips the model, but its pixels and its
cells are as large as any. Speed is the ratio of pixels a second with two workers to those with one, on windows
that were all observed; the runs alternate.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pandas as pd
import xarray as xr
from distributed import Client, LocalCluster

import xr_anysat
from xr_anysat.model.weights import encoder_spec, get_encoder

DATES = 30
SIDE = {"base": 1152, "tiny": 2016}  # 16 blocks of full size
LAYOUTS = {"tiles of 1024": (1, 10, 1024, 1024), "strips of 256 rows": (1, 10, 256, -1)}
NORMS = ("pastis", "per_tile_zscore")
WINDOW = 24
WHERE = {"period": "2022", "weights": "random", "device": "cpu"}
MIB = 1 << 20


def observations(block_info: Any, share: int) -> np.ndarray:
    """Digital numbers of a chunk: one window in `share` along each axis was observed."""
    _, _, *place = block_info[None]["array-location"]
    rows, cols = (np.arange(*span) // WINDOW % share == 0 for span in place)
    values = np.zeros(block_info[None]["chunk-shape"], "uint16")
    values += (500 + np.arange(len(cols), dtype="uint16") % 100) * (rows[:, None] & cols)
    return values


def cube(side: int, chunks: tuple[int, ...], share: int) -> xr.DataArray:
    """`side` × `side` pixels, whose chunks and corner lie as they please."""
    import odc.geo.xr  # noqa: F401

    shape = (DATES, 10, side, side)
    size = [n if c < 0 else min(c, n) for c, n in zip(chunks, shape, strict=True)]
    data = da.map_blocks(
        observations, share=share, chunks=da.core.normalize_chunks(size, shape), dtype="uint16",
        meta=np.empty((0,) * 4, "uint16"),
    )  # fmt: skip
    coords = {
        "time": pd.date_range("2022-01-05", periods=DATES, freq="12D"),
        "band": list(xr_anysat.BANDS),
        "y": -10.0 * (500_003 + np.arange(side)) - 5,
        "x": 10.0 * (60_005 + np.arange(side)) + 5,
    }
    return xr.DataArray(data, coords, ("time", "band", "y", "x")).odc.assign_crs("EPSG:32632")


def write(area: xr.DataArray, model: str, norm: str) -> None:
    """Embed an area into a store that goes away again."""
    with tempfile.TemporaryDirectory() as folder:
        area.anysat.embed(8, norm=norm, model=model, **WHERE).anysat.to_zarr(f"{folder}/area.zarr")


def ready(model: str) -> int:
    """Load the model; MiB of this process then. What it took on the way is forgotten."""
    get_encoder(encoder_spec(model, WHERE["weights"], WHERE["device"]))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now, man 5 proc
    return peak()


def peak() -> int:
    """Peak of resident memory of this process, MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


@contextlib.contextmanager
def workers(count: int) -> Iterator[Client]:
    """A cluster of processes of one thread each."""
    with (
        LocalCluster(
            n_workers=count, threads_per_worker=1, processes=True, dashboard_address=None, memory_limit=0,
            silence_logs=logging.ERROR,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):  # fmt: skip
        yield client


def on_workers(side: int, chunks: tuple[int, ...], norm: str, model: str) -> tuple[int, int]:
    """MiB of the larger of two workers, before and at its peak."""
    with workers(2) as client:
        before = client.run(ready, model)
        with client.as_current():
            write(cube(side, chunks, SIDE[model] // WINDOW), model, norm)
        after = client.run(peak)
    return max(before.values()), max(after.values())


def on_threads(side: int, chunks: tuple[int, ...], norm: str, model: str) -> tuple[int, int]:
    """MiB of a process of two threads, before and at its peak."""
    before = ready(model)
    with dask.config.set(scheduler="threads", num_workers=2):
        write(cube(side, chunks, SIDE[model] // WINDOW), model, norm)
    return before, peak()


def memory(model: str, quick: bool) -> None:
    """Print a line for each way of working, layout of chunks and normalization."""
    areas = (1, 2) if quick else (1, 2, 4)
    cases = [(on_workers, name, norm) for name in LAYOUTS for norm in NORMS]
    cases.append((on_threads, next(iter(LAYOUTS)), NORMS[0]))
    heads = "".join(f"{f'{n * n}x':>15}" for n in areas)
    print(f"\npeak of resident memory of a process, MiB (and above the model){heads}   growth", flush=True)
    for run, name, norm in cases[:1] if quick else cases:
        figures = []
        for n in areas:
            # a process of its own, for that of the benchmark has a past
            with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
                figures.append(fresh.submit(run, n * SIDE[model], LAYOUTS[name], norm, model).result())
        text = "".join(f"{f'{top} ({top - before})':>15}" for before, top in figures)
        way = "2 workers" if run is on_workers else "2 threads"
        growth = figures[-1][1] / figures[0][1] - 1
        print(f"{way}, chunks {name}, norm={norm!r:17}".ljust(63) + f"{text} {growth:8.1%}", flush=True)


def speed(model: str, quick: bool) -> None:
    """Print what a second worker gains."""
    side = {"base": 192, "tiny": 480}[model]
    area = cube(side, (DATES, 10, WINDOW, side), 1)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    with workers(1) as one, workers(2) as two:
        for client in (one, two):
            client.run(ready, model)
        for _ in range(2 if quick else 3):
            for count, client in ((1, one), (2, two)):
                with client.as_current():
                    start = time.perf_counter()
                    write(area, model, "pastis")
                    seconds[count].append(time.perf_counter() - start)
    alone, both = (side**2 / statistics.median(s) for s in seconds.values())
    print(
        f"\n{os.cpu_count()} cores: {alone:.0f} pixels a second with one worker of one thread, {both:.0f} with two, "
        f"{both / alone:.2f} times as many"
    )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(SIDE), default="base")
    parser.add_argument("--quick", action="store_true", help="one case, on areas of 1 and 4 times the size")
    options = parser.parse_args()
    memory(options.model, options.quick)
    speed(options.model, options.quick)


if __name__ == "__main__":
    main()

"""Memory of a worker for larger areas, and the gain of a second worker.

    python benchmarks/scaling.py [--quick] [--model tiny|base] [--json FILE]

Memory is the peak of resident memory (VmHWM, Linux) of a process that has loaded the model, while an area of 1, 4 and
16 times the size is written to a Zarr store: of the larger of two worker processes with one thread each, and of one
process with dask's threads. Each figure comes from new processes. The cube is computed when it is read, and has
almost no observations: a window without observations skips the model, but its pixels and cells take the same memory.
Chunks of whole blocks need no full-width strip of the area in memory; other chunks do.

Speed is the ratio of pixels per second with two workers to those with one, on windows that are all observed; the runs
alternate. It is measured in three ways: an area into a store with dask's defaults; the same with dask monitoring its
processes once per second instead of fifty and a hundred times (docs/clusters.md), which matters when, as here, the
workers use all cores and leave none for scheduler, client and nannies; and the model alone in the same processes,
which shows how much the cores share.
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
from itertools import product
from typing import Any

import dask
import numpy as np
import torch
import xarray as xr
from areas import DATES, area
from distributed import Client, LocalCluster
from measure import Row, forget, fresh, main, peak

import xr_anysat  # noqa: F401
from xr_anysat.embedding.forward import exclusive_encoder
from xr_anysat.model.weights import encoder_spec, get_encoder

SIDE = {"base": 1152, "tiny": 2016}  # 64 blocks of full size
LAYOUTS = {
    model: {
        "four blocks per side": (1, 10, side // 2, side // 2),
        "tiles of 1024": (1, 10, 1024, 1024),
        "strips of 256 rows": (1, 10, 256, -1),
    }
    for model, side in SIDE.items()
}
NORMS = ("pastis", "per_tile_zscore")
WINDOW, FRAMES = 24, 8
SECONDS = 10  # of the model alone
UNWATCHED = {
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "10s",
    "distributed.worker.profile.enabled": False,
}
WHERE = {"period": "2022", "weights": "random", "device": "cpu"}


def observations(block_info: Any, share: int) -> np.ndarray:
    """Digital numbers of a chunk: every `share`-th window along each axis is observed."""
    _, _, *place = block_info[None]["array-location"]
    rows, cols = (np.arange(*span) // WINDOW % share == 0 for span in place)
    values = np.zeros(block_info[None]["chunk-shape"], "uint16")
    values += (500 + np.arange(len(cols), dtype="uint16") % 100) * (rows[:, None] & cols)
    return values


def store(cube: xr.DataArray, model: str, norm: str) -> None:
    """Embed an area into a temporary store."""
    with tempfile.TemporaryDirectory() as folder:
        cube.anysat.embed(FRAMES, norm=norm, model=model, **WHERE).anysat.to_zarr(f"{folder}/area.zarr")


def ready(model: str) -> int | None:
    """Load the model and return the memory of this process in MiB, without the peak of loading."""
    get_encoder(encoder_spec(model, WHERE["weights"], WHERE["device"]))
    forget()
    return peak()


@contextlib.contextmanager
def workers(count: int) -> Iterator[Client]:
    """A cluster of processes with one thread each."""
    with (
        LocalCluster(
            n_workers=count, threads_per_worker=1, processes=True, dashboard_address=None, memory_limit=0,
            silence_logs=logging.ERROR,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):  # fmt: skip
        yield client


def on_workers(side: int, chunks: tuple[int, ...], norm: str, model: str) -> tuple[int | None, int | None]:
    """MiB of the larger of two workers, before and at the peak."""
    with workers(2) as client:
        before = client.run(ready, model)
        with client.as_current():
            store(area(side, chunks, observations, share=SIDE[model] // WINDOW), model, norm)
        after = client.run(peak)
    return max(before.values()), max(after.values())


def on_threads(side: int, chunks: tuple[int, ...], norm: str, model: str) -> tuple[int | None, int | None]:
    """MiB of a process with two threads, before and at the peak."""
    before = ready(model)
    with dask.config.set(scheduler="threads", num_workers=2):
        store(area(side, chunks, observations, share=SIDE[model] // WINDOW), model, norm)
    return before, peak()


def alone(model: str) -> float:
    """Pixels per second of the model alone, in this process."""
    window, days, forwards = torch.randn(1, FRAMES, 10, WINDOW, WINDOW), torch.arange(FRAMES) * 40, 0
    with exclusive_encoder(encoder_spec(model, WHERE["weights"], WHERE["device"])) as encoder:
        start = time.perf_counter()
        while (seconds := time.perf_counter() - start) < SECONDS:
            encoder.encode(window, days, side=1)
            forwards += 1
    return forwards * WINDOW**2 / seconds


def memory(options: argparse.Namespace) -> Iterator[Row]:
    """Peak of resident memory of a process in MiB, in total and above the model."""
    if peak() is None:
        print("left out: this system has no /proc")
        return
    layouts = LAYOUTS[options.model]
    cases = [(on_workers, name, norm) for name in layouts for norm in NORMS]
    cases.append((on_threads, next(iter(layouts)), NORMS[0]))
    for run, name, norm in cases[:1] if options.quick else cases:
        row: Row = {"by": run.__name__.replace("on_", "2 "), "chunks": name, "norm": norm}
        side = SIDE[options.model] // (4 if options.quick else 1)
        tops = []
        for n in (1, 2) if options.quick else (1, 2, 4):
            before, top = fresh(run, n * side, layouts[name], norm, options.model)
            row |= {f"{n * n}x": top, f"{n * n}x above": top - before}
            tops.append(top)
        yield row | {"growth": tops[-1] / tops[0] - 1}


def speed(options: argparse.Namespace) -> Iterator[Row]:
    """Gain of a second worker: pixels per second of workers with one thread."""
    model, side = options.model, {"base": 240, "tiny": 480}[options.model] // (2 if options.quick else 1)
    dasks: dict[str, dict[str, Any]] = {"defaults": {}, "unwatched": UNWATCHED}
    rates: dict[tuple[str, int], list[float]] = {key: [] for key in product((*dasks, "model alone"), (1, 2))}
    for _ in range(1 if options.quick else 3):
        for name, count in product(dasks, (1, 2)):
            # one cluster at a time, because an idle one uses the same cores
            with dask.config.set(dasks[name]), workers(count) as client, client.as_current():
                client.run(ready, model)
                store(area(WINDOW * 4, (DATES, 10, WINDOW, WINDOW), observations, share=1), model, "pastis")
                start = time.perf_counter()
                store(area(side, (DATES, 10, WINDOW, side), observations, share=1), model, "pastis")
                rates[name, count].append(side**2 / (time.perf_counter() - start))
                if name == "unwatched":
                    rates["model alone", count].append(sum(client.run(alone, model).values()))
    for (by, count), found in rates.items():
        middle = statistics.median(found)
        yield {
            "by": by, "workers": count, "cores": os.cpu_count(), "pixels/s": middle,
            "times one worker": middle / statistics.median(rates[by, 1]),
        }  # fmt: skip


TABLES = [memory, speed]

if __name__ == "__main__":
    main(__doc__, TABLES)

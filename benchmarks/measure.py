"""Shared by the benchmarks: arguments, medians of alternating runs, memory peaks, tables."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import xr_anysat
from xr_anysat.model.weights import PRECISIONS, resolve_device

Row = dict[str, Any]
"""A row of a table: values by column; None where there is no figure."""

SPECS = {
    "pixels/s": ",.0f", "times float32": ".2f", "times one worker": ".2f", "times no overlap": ".2f",
    "times upstream": ".2f",
    "of the roofline": ".0%", "of the peak": ".0%", "overhead": ".1%", "composite": ".1%", "growth": ".1%",
    "relative L2": ".1e", "cosine error": ".1e", "roofline, G/s": ".0f",
    "output": "<6", "precision": "<9", "chunks": "<18", "norm": "<16", "by": "<9", "note": "<24",
}  # fmt: skip
"""Format of the values of a column; others are printed unchanged."""

PEAKS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}
"""Floating point operations per second of dense bfloat16 products, from NVIDIA's data sheets."""

MEMORY = Path("/proc/self/status")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Parser of the arguments that all benchmarks accept, so that `bench.py` can pass them on."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="fewer cases, smaller areas, two repetitions")
    p.add_argument(
        "--upstream", metavar="PATH", help="a checkout of gastruc/AnySat, to compare with (forward)"
    )
    p.add_argument("--model", choices=("tiny", "base"), default="base", help="size, of random weights")
    p.add_argument("--device", type=resolve_device, default="auto")
    p.add_argument("--precision", choices=PRECISIONS, help="default: float32 on a CPU, else bfloat16")
    p.add_argument("--side", type=int, metavar="PIXELS", help="side of the area (pipeline, overlap)")
    p.add_argument("--repeat", type=int, default=5, help="repetitions per median")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file, too")
    return p


def resolve(options: argparse.Namespace) -> argparse.Namespace:
    """Fill in the options that depend on others."""
    options.precision = options.precision or ("float32" if options.device.type == "cpu" else "bfloat16")
    options.repeat = 2 if options.quick else options.repeat
    return options


def main(doc: str | None, tables: Sequence[Callable[..., Iterator[Row]]]) -> None:
    """Run one benchmark as a script."""
    options = resolve(parser(doc).parse_args())
    write(options, show(tables, options))


def show(tables: Sequence[Callable[..., Iterator[Row]]], options: argparse.Namespace) -> dict[str, list[Row]]:
    """Print tables, each row as soon as it is computed; return them by name."""
    return {table.__name__: _show(table.__doc__, table(options)) for table in tables}


def _show(doc: str | None, rows: Iterable[Row]) -> list[Row]:
    shown: list[Row] = []
    widths: dict[str, int] = {}
    print(f"\n{(doc or '').partition(chr(10))[0]}", flush=True)
    for row in rows:
        cells = {k: "-" if v is None else format(v, SPECS.get(k, "")) for k, v in row.items()}
        if not shown:
            widths = {k: max(len(k), len(c)) for k, c in cells.items()}
            print("  ".join(k.ljust(w) if "<" in SPECS.get(k, "") else k.rjust(w) for k, w in widths.items()))
        print("  ".join(c.rjust(widths[k]) for k, c in cells.items()), flush=True)
        shown.append(row)
    return shown


def write(options: argparse.Namespace, tables: dict[str, list[Row]]) -> None:
    """Write the tables and a description of the machine, if `--json` is given."""
    if options.json is not None:
        given = {k: v if isinstance(v, int | None) else str(v) for k, v in vars(options).items()}
        found = {"machine": machine(options.device), "options": given, "tables": tables}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def machine(device: torch.device) -> dict[str, Any]:
    """The machine and the versions, on which the figures depend."""
    return {
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device_name(device),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "xr_anysat": xr_anysat.__version__,
    }


def cpu() -> str:
    """Model of the processor, as far as the system reports it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (x.partition(":")[2].strip() for x in lines if x.startswith("model name")), platform.processor()
    )


def device_name(device: torch.device) -> str:
    """Name of a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def median(
    runs: Sequence[Callable[[], Any]], repeat: int, device: torch.device, *, warm: bool = True
) -> list[float]:
    """Median seconds of each of `runs`, which alternate; if `warm`, each runs once before without timing."""
    times: list[list[float]] = [[] for _ in runs]
    for run in runs if warm else ():
        run()
    for _ in range(repeat):
        for run, each in zip(runs, times, strict=True):
            wait(device)
            start = time.perf_counter()
            run()
            wait(device)
            each.append(time.perf_counter() - start)
    return [statistics.median(each) for each in times]


def wait(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def fresh(function: Callable[..., Any], *args: Any) -> Any:
    """Call in a new process, whose memory no earlier run has changed."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(function, *args).result()


def forget(device: str = "cpu") -> None:
    """Reset `peak` to the current memory."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    elif MEMORY.exists():
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)  # memory kept for the next allocation is not in use
        MEMORY.with_name("clear_refs").write_text("5")  # man 5 proc


def peak(device: str = "cpu") -> int | None:
    """Peak MiB of the device's tensors, or of this process; None without /proc."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) >> 20
    if device != "cpu" or not MEMORY.exists():
        return None
    return int(MEMORY.read_text().partition("VmHWM:")[2].split()[0]) >> 10

"""What the benchmarks share: their arguments, medians of runs that alternate, peaks of memory, tables."""

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
"""Of a table: values by the heads of its columns; None where there is no figure."""

SPECS = {
    "pixels/s": ",.0f", "times float32": ".2f", "times one worker": ".2f", "times no overlap": ".2f",
    "times upstream": ".2f",
    "of the roofline": ".0%", "of the peak": ".0%", "overhead": ".1%", "composite": ".1%", "growth": ".1%",
    "relative L2": ".1e", "cosine error": ".1e", "roofline, G/s": ".0f",
    "output": "<6", "precision": "<9", "chunks": "<18", "norm": "<16", "by": "<9", "note": "<24",
}  # fmt: skip
"""How the values of a column are written, where it is not as they are."""

PEAKS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}
"""Floating point operations a second of dense bfloat16 products, of NVIDIA's data sheets."""

MEMORY = Path("/proc/self/status")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The arguments that all benchmarks take, so that `bench.py` can hand them on."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="fewer cases, smaller areas, two repetitions")
    p.add_argument("--upstream", metavar="PATH", help="a checkout of gastruc/AnySat, to run beside (forward)")
    p.add_argument("--model", choices=("tiny", "base"), default="base", help="size, of random weights")
    p.add_argument("--device", type=resolve_device, default="auto")
    p.add_argument("--precision", choices=PRECISIONS, help="default: float32 on a CPU, else bfloat16")
    p.add_argument("--side", type=int, metavar="PIXELS", help="side of the area (pipeline, overlap)")
    p.add_argument("--repeat", type=int, default=5, help="repetitions that a median is of")
    p.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    return p


def settled(options: argparse.Namespace) -> argparse.Namespace:
    """The options with what depends on others."""
    options.precision = options.precision or ("float32" if options.device.type == "cpu" else "bfloat16")
    options.repeat = 2 if options.quick else options.repeat
    return options


def main(doc: str | None, tables: Sequence[Callable[..., Iterator[Row]]]) -> None:
    """Run one benchmark as a script."""
    options = settled(parser(doc).parse_args())
    write(options, show(tables, options))


def show(tables: Sequence[Callable[..., Iterator[Row]]], options: argparse.Namespace) -> dict[str, list[Row]]:
    """Print tables, each row as soon as it is there; all of them by name."""
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
    """Write tables and what they were measured on, if that is asked for."""
    if options.json is not None:
        given = {k: v if isinstance(v, int | None) else str(v) for k, v in vars(options).items()}
        found = {"machine": machine(options.device), "options": given, "tables": tables}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
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
    """Model of the processor, as far as the system tells."""
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
    """Median seconds of each of `runs`, which alternate; `warm`: after one of each that is not timed."""
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
    """Until the device has done what it was told."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def fresh(function: Callable[..., Any], *args: Any) -> Any:
    """Call in a process of its own, for this one has a past."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(function, *args).result()


def forget(device: str = "cpu") -> None:
    """Have `peak` begin with what there is now."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    elif MEMORY.exists():
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)  # what it keeps for the next allocation is not in use
        MEMORY.with_name("clear_refs").write_text("5")  # man 5 proc


def peak(device: str = "cpu") -> int | None:
    """Peak MiB of the device's tensors, or of this process; None where there is no /proc to tell."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) >> 20
    if device != "cpu" or not MEMORY.exists():
        return None
    return int(MEMORY.read_text().partition("VmHWM:")[2].split()[0]) >> 10

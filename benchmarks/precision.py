"""Gain and error of the precisions.

    python benchmarks/precision.py [--quick] [--model tiny|base] [--json FILE]

Pixels per second of alternating forward passes, and the difference of the outputs from float32: the relative L2 of all
outputs, and the largest cosine distance of the vector of a cell. Weights and pixels are random.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace

import torch
from forward import Case, ours
from measure import Row, main, median

from xr_anysat.embedding.forward import windows_at_once
from xr_anysat.model.weights import PRECISIONS

LEFT_OUT = {
    ("int8", "cuda"): "left out: for CPUs",
    ("int8", "mps"): "left out: for CPUs",
}


def precision(options: argparse.Namespace) -> Iterator[Row]:
    """Precisions compared with float32."""
    device = options.device
    measured = [name for name in PRECISIONS if (name, device.type) not in LEFT_OUT]
    for case in (Case(10, 24), Case(40, 64)):
        case = replace(case, batch=windows_at_once(case.tile, device.type))
        runs = {name: ours(case, options.model, name, device) for name in measured}
        seconds = dict(zip(measured, median(list(runs.values()), options.repeat, device), strict=True))
        exact = runs["float32"]().double().flatten(0, -2)
        for name in PRECISIONS:
            row: Row = {
                "precision": name,
                "patch, m": case.patch,
                "window, px": case.tile,
                "batch": case.batch,
            }
            if name not in runs:
                row |= dict.fromkeys(("pixels/s", "times float32", "relative L2", "cosine error"))
                yield row | {"note": LEFT_OUT[name, device.type]}
                continue
            values = runs[name]().double().flatten(0, -2)
            yield row | {
                "pixels/s": case.pixels / seconds[name],
                "times float32": seconds["float32"] / seconds[name],
                "relative L2": ((values - exact).norm() / exact.norm()).item(),
                "cosine error": (1 - torch.cosine_similarity(values, exact)).max().item(),
                "note": "",
            }


TABLES = [precision]

if __name__ == "__main__":
    main(__doc__, TABLES)

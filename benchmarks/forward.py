"""The model alone: pixels a second, share of this machine's float32 matrix rate, ratio to upstream.

    python benchmarks/forward.py [--upstream PATH]

PATH is a checkout of gastruc/AnySat, run beside ours in the same process with its own random weights; the
repetitions alternate, and each figure is a ratio of medians of one run, since absolute times drift.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from xr_anysat.model.cost import multiply_adds
from xr_anysat.model.weights import encoder_spec, get_encoder

# patch side (px), window (px), dates, batch of windows, output
CASES = [(1, 24, 8, 1, "patch"), (2, 24, 8, 1, "patch"), (4, 64, 8, 1, "patch"), (1, 24, 8, 1, "local")]


def gemm_rate() -> float:
    """Multiply-adds a second of a float32 product of the model's own shape."""
    x, w = torch.randn(4608, 768), torch.randn(3072, 768)
    run = lambda: torch.nn.functional.linear(x, w)  # noqa: E731
    return 4608 * 768 * 3072 / median([run] * 20)[0]


def median(runs: list[Callable[[], Any]], repeat: int = 1) -> list[float]:
    """Median seconds of each of `runs`, alternating; all the same function: of all of them."""
    times: dict[int, list[float]] = {}
    runs[0]()
    for _ in range(repeat):
        for run in runs:
            start = time.perf_counter()
            run()
            times.setdefault(id(run), []).append(time.perf_counter() - start)
    return [statistics.median(t) for t in times.values()]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upstream", help="checkout of gastruc/AnySat")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    ours = get_encoder(encoder_spec("base", "random", "cpu"))
    theirs = None
    if options.upstream:
        hub: Any = torch.hub.load
        theirs = hub(options.upstream, "anysat", source="local", pretrained=False, flash_attn=False).eval()
    rate = gemm_rate()
    print(f"{torch.get_num_threads()} threads, float32 products at {rate / 1e9:.0f} G multiply-adds a second")
    print("output  patch window  T  B   pixels/s  of the matrix rate  times upstream")
    for side, tile, dates, batch, output in CASES:
        x = torch.randn(batch, dates, 10, tile, tile)
        doy = torch.linspace(10, 350, dates).long().expand(batch, dates)

        def run(x: Any = x, doy: Any = doy, side: int = side, output: str = output) -> None:
            with torch.inference_mode():
                ours.encode(x, doy, side=side, output=output)

        def run_upstream(x: Any = x, doy: Any = doy, side: int = side) -> None:
            with torch.inference_mode():
                theirs({"s2": x, "s2_dates": doy}, patch_size=side * 10, output="patch")

        beside = theirs is not None and output == "patch"
        seconds = median([run, run_upstream] if beside else [run], options.repeat)
        pixels = batch * tile**2
        window = multiply_adds(
            "base", output, dates=dates, side=side, pixels=tile**2, patches=(tile // side) ** 2
        )
        share = batch * window.total / seconds[0] / rate
        ratio = f"{seconds[1] / seconds[0]:14.2f}" if beside else "             -"
        print(
            f"{output:6} {side * 10:4} m {tile:4} px {dates:2} {batch:2} {pixels / seconds[0]:10.0f}"
            f" {share:18.0%}  {ratio}"
        )


if __name__ == "__main__":
    main()

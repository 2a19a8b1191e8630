"""Cost of overlapping windows: `embed` with an overlap of zero, a quarter and half of a window.

    python benchmarks/overlap.py [--side PIXELS] [--quick] [--model tiny|base] [--json FILE]

The area has the dates of pipeline.py. Where windows overlap it is one block, as large as a block of a large area: small
areas are divided into 16 blocks, so that workers finish at the same time, and windows on the border of two blocks are
computed in both. The three alternate.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from measure import Row, main, median
from pipeline import KINDS, QUICK, embedding

from xr_anysat.embedding import blocks

SIDES = {64: 512, 24: 288}  # of areas by windows


def overlap(options: argparse.Namespace) -> Iterator[Row]:
    """Windows that overlap."""
    blocks.MIN_BLOCKS = 1
    for patch, tile in KINDS:
        side = options.side or (QUICK if options.quick else SIDES)[tile]
        pixels = [0, tile // 4, tile // 2]
        embedding(2 * tile, patch, tile, options, overlap=pixels[-1]).compute()
        runs = [
            lambda side=side, kind=(patch, tile), n=n: embedding(side, *kind, options, overlap=n).compute()
            for n in pixels
        ]
        seconds = median(runs, min(options.repeat, 3), options.device, warm=False)
        for n, each in zip(pixels, seconds, strict=True):
            yield {
                "patch, m": patch, "window, px": tile, "overlap, px": n, "area, px": side,
                "pixels/s": side**2 / each, "times no overlap": each / seconds[0],
            }  # fmt: skip


TABLES = [overlap]

if __name__ == "__main__":
    main(__doc__, TABLES)

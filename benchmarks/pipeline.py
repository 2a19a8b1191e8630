"""Cost of xarray, dask, compositing and normalization: `embed` against the bare model on the same windows.

    python benchmarks/pipeline.py [--side 480] [--quick] [--model tiny|base] [--json FILE]

The area has 30 dates, a third of each missing, and is lazy with one chunk per date. It is composed to 8 frames and
embedded with default options. Two times are given as shares of the time of the bare model: `overhead` is what `embed`
takes in addition, and `composite` is `frames` alone. The three alternate.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import xarray as xr
from areas import CHUNK, area, axes, clouded
from measure import Row, main, median

import xr_anysat  # noqa: F401
from xr_anysat.embedding.forward import windows_at_once
from xr_anysat.embedding.lattice import spans
from xr_anysat.model.weights import encoder_spec, get_encoder

KINDS = [(40, 64), (10, 24)]  # patch in metres, window in pixels
QUICK = {64: 192, 24: 72}  # sides of areas by windows
FRAMES = 8
PERIOD = "2022"


def landscape(side: int) -> xr.DataArray:
    """A lazy year of an area."""
    return area(side, (1, 10, CHUNK, CHUNK), clouded)


def embedding(side: int, patch: int, tile: int, options: argparse.Namespace, **more: Any) -> xr.DataArray:
    """The lazy embedding of an area."""
    return landscape(side).anysat.embed(
        FRAMES, period=PERIOD, patch_size=patch, tile=tile, model=options.model, weights="random",
        device=str(options.device), precision=options.precision, **more,
    )  # fmt: skip


def bare(side: int, patch: int, tile: int, options: argparse.Namespace) -> Callable[[], None]:
    """The model alone, on as many windows of the same shapes as the area has."""
    device, cell = options.device, patch // 10
    model: Any = get_encoder(encoder_spec(options.model, "random", str(device), options.precision))
    rows, cols = (list(spans(axis, tile, cell)) for axis in axes(side))
    doy = torch.linspace(10, 350, FRAMES, device=device).long()
    max_windows, batches = windows_at_once(tile, device.type), []
    alike = Counter((i.first_patch, i.n_patches, j.first_patch, j.n_patches) for i in rows for j in cols)
    for (top, down, left, across), count in alike.items():
        x = torch.randn(min(count, max_windows), FRAMES, 10, down * cell, across * cell, device=device)
        batches += [(x[: count - done], (top, left)) for done in range(0, count, max_windows)]

    @torch.inference_mode()
    def run() -> None:
        for x, origin in batches:
            model.encode(x, doy, side=cell, output="patch", origin=origin)

    return run


def pipeline(options: argparse.Namespace) -> Iterator[Row]:
    """`embed` against the bare model on the same windows."""
    for patch, tile in KINDS:
        side = options.side or (QUICK[tile] if options.quick else 480)
        embedding(2 * tile, patch, tile, options).compute()  # imports, and first windows of the model
        runs = [
            bare(side, patch, tile, options),
            lambda side=side, kind=(patch, tile): embedding(side, *kind, options).compute(),
            lambda side=side: landscape(side).anysat.frames(FRAMES, period=PERIOD).compute(),
        ]
        forward, embed, composite = median(runs, min(options.repeat, 3), options.device, warm=False)
        yield {
            "patch, m": patch, "window, px": tile, "area, px": side, "pixels/s": side**2 / embed,
            "overhead": embed / forward - 1, "composite": composite / forward,
        }  # fmt: skip


TABLES = [pipeline]

if __name__ == "__main__":
    main(__doc__, TABLES)

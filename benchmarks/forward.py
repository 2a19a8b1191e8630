"""The model alone: pixels per second, ratio to upstream, share of what the machine can do, memory.

    python benchmarks/forward.py [--upstream PATH] [--quick] [--model tiny|base] [--json FILE]

PATH is a checkout of gastruc/AnySat, which runs in the same process with its own random weights, in eager float32.
`local` is compared with its `dense`, because upstream has the tokens of pixels only together with those of patches.
Our model, upstream's and the matrix product of the roofline alternate, and each figure is a ratio of medians of one
run, because absolute times drift. The roofline is the highest rate of the model's own matrix product, over the shapes
that the model uses; the share of it counts the necessary multiply-adds. Memory is the peak of a separate process,
minus its memory with the model loaded; on a GPU, the peak of its tensors.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from measure import PEAKS, Row, device_name, forget, fresh, main, median, peak

from xr_anysat.embedding.forward import windows_at_once
from xr_anysat.model.cost import multiply_adds
from xr_anysat.model.linear import Linear
from xr_anysat.model.weights import encoder_spec, get_encoder

ROWS = (577, 1152, 2048)
PRODUCTS = ((768, 2304), (768, 768), (768, 3072), (3072, 768))


@dataclass(frozen=True)
class Case:
    """Windows of a forward pass."""

    patch: int  # m
    tile: int  # px
    dates: int = 8
    batch: int = 1
    output: str = "patch"

    @property
    def pixels(self) -> int:
        """Number of pixels of all windows."""
        return self.batch * self.tile**2


CASES = [
    Case(10, 24), Case(10, 24, batch=4), Case(20, 24), Case(40, 64), Case(10, 64, dates=24),
    Case(10, 64, output="local"), Case(40, 64, output="local"),
]  # fmt: skip


def inputs(case: Case, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (B, T, 10, H, W), the same for all models, and days (B, T)."""
    seeded = torch.Generator().manual_seed(0)
    x = torch.randn(case.batch, case.dates, 10, case.tile, case.tile, generator=seeded)
    return x.to(device), torch.linspace(10, 350, case.dates, device=device).long().expand(case.batch, -1)


def ours(case: Case, model: str, precision: str, device: torch.device) -> Callable[[], torch.Tensor]:
    """A forward pass of our model."""
    encoder: Any = get_encoder(encoder_spec(model, "random", str(device), precision))
    x, doy = inputs(case, device)
    return torch.inference_mode()(lambda: encoder.encode(x, doy, side=case.patch // 10, output=case.output))


def theirs(case: Case, model: str, path: str, device: torch.device) -> Callable[[], torch.Tensor]:
    """A forward pass of upstream's model."""
    load: Any = torch.hub.load
    encoder = load(path, "anysat", source="local", pretrained=False, flash_attn=False, model_size=model)
    encoder = encoder.eval().to(device)
    x, doy = inputs(case, device)
    output = {"local": "dense"}.get(case.output, case.output)
    return torch.inference_mode()(
        lambda: encoder({"s2": x, "s2_dates": doy}, patch_size=case.patch, output=output)
    )


def memory(make: Callable[..., Callable[[], Any]], *args: Any) -> int | None:
    """MiB that forward passes need in addition to the model; call it in a fresh process."""
    run, device = make(*args), str(args[-1])
    forget(device)
    before = peak(device)
    run()
    run()  # may need more, if the memory freed by the first is fragmented
    after = peak(device)
    return None if before is None or after is None else after - before


def product(rows: int, inputs: int, outputs: int, precision: str, device: torch.device) -> Callable[[], Any]:
    """The matrix product of the model, ten times so that it can be timed."""
    layer, x = Linear(inputs, outputs).to(device), torch.randn(rows, inputs, device=device)
    with torch.inference_mode():
        layer.pack(precision)
    return torch.inference_mode()(lambda: [layer(x) for _ in range(10)])


def fastest_product(options: argparse.Namespace) -> tuple[Callable[[], Any], int]:
    """The product with the highest rate, and its multiply-adds."""
    shapes = [(rows, *layer) for rows in ROWS for layer in PRODUCTS]
    runs = [product(*shape, options.precision, options.device) for shape in shapes]
    adds = [10 * rows * inputs * outputs for rows, inputs, outputs in shapes]
    seconds = median(runs, options.repeat, options.device)
    best = max(range(len(runs)), key=lambda i: adds[i] / seconds[i])
    return runs[best], adds[best]


def forward(options: argparse.Namespace) -> Iterator[Row]:
    """The model alone."""
    model, precision, device = options.model, options.precision, options.device
    roof, roof_adds = fastest_product(options)
    cases = [CASES[0], CASES[3]] if options.quick else CASES
    if device.type != "cpu":
        cases = list(dict.fromkeys(replace(c, batch=windows_at_once(c.tile, device.type)) for c in cases))
    for case in cases:
        makers: list[tuple[Any, ...]] = [(ours, case, model, precision, device)]
        if options.upstream:
            makers.append((theirs, case, model, options.upstream, device))
        runs = [make(*args) for make, *args in makers]
        mine, *upstreams, product_seconds = median([*runs, roof], options.repeat, device)
        del runs
        memories = [fresh(memory, *maker) for maker in makers]
        needed = case.batch * multiply_adds(
            model, case.output, dates=case.dates, side=case.patch // 10, pixels=case.tile**2,
            patches=(case.tile * 10 // case.patch) ** 2,
        ).total  # fmt: skip
        top = PEAKS.get(device_name(device))
        yield {
            "output": case.output, "patch, m": case.patch, "window, px": case.tile, "dates": case.dates,
            "batch": case.batch, "pixels/s": case.pixels / mine,
            "times upstream": upstreams[0] / mine if upstreams else None,
            "of the roofline": needed / mine / (roof_adds / product_seconds),
            "roofline, G/s": roof_adds / product_seconds / 1e9,
            "of the peak": 2 * needed / mine / top if top else None,
            "memory, MiB": memories[0], "upstream's, MiB": memories[1] if upstreams else None,
        }  # fmt: skip


TABLES = [forward]

if __name__ == "__main__":
    main(__doc__, TABLES)

"""Tables of the published models: sizes, projectors, outputs. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass

DATE_HEADS, KEY_DIM = 16, 8  # heads of the temporal attention and the length of its keys
BUCKETS = 8  # rows of the relative position table
CPU_ROWS = 2048  # rows per pass through the widest layer of a stage on a CPU: bounds the memory of a window
ACCELERATOR_ROWS = 1 << 18  # the same on an accelerator, which needs more rows to be busy


@dataclass(frozen=True)
class Size:
    """Width, depth and heads of one published size."""

    dim: int
    depth: int
    heads: int


@dataclass(frozen=True)
class ProjectorSpec:
    """How a projector is built: number of bands, and the temporal or the image kind."""

    channels: int
    series: bool = True
    date_base: int = 367  # base of the sinusoids of the date code; dates may be larger
    normed_values: bool = False  # a GroupNorm over (channels of a group x dates) before attention
    kernel: int = 10  # image kind: side of the convolution in pixels


SIZES = {"tiny": Size(256, 2, 4), "small": Size(512, 4, 8), "base": Size(768, 6, 12)}

SENSORS = {
    "aerial": ProjectorSpec(4, series=False),
    "aerial-flair": ProjectorSpec(5, series=False),
    "spot": ProjectorSpec(3, series=False),
    "naip": ProjectorSpec(4, series=False, kernel=8),
    "s2": ProjectorSpec(10, normed_values=True),
    "s1-asc": ProjectorSpec(2),
    "s1": ProjectorSpec(3),
    "alos": ProjectorSpec(3),
    "l7": ProjectorSpec(6),
    "l8": ProjectorSpec(11, date_base=366),
    "modis": ProjectorSpec(7),
}

OUTPUTS = ("tile", "patch", "dense", "local", "all")


def cell_side(output: str, *, side: int, tile: int) -> int:
    """Return the side of an output cell in pixels, for patches of `side` and windows of `tile` pixels.

    Examples
    --------
    >>> [cell_side(o, side=4, tile=64) for o in ("patch", "tile", "dense", "local")]
    [4, 64, 1, 1]
    """
    return {"patch": side, "tile": tile}.get(output, 1)


def channels(size: str, output: str) -> int:
    """Return the number of channels of an output: the width of the model, twice that for ``dense``.

    Examples
    --------
    >>> channels("base", "patch"), channels("base", "dense")
    (768, 1536)
    """
    return SIZES[size].dim * (2 if output == "dense" else 1)

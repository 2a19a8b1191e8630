"""Cost of the model: multiply-adds, parameters, and working memory of a forward pass. Does not import torch.

The numbers are those of the Sentinel-2 path of :mod:`xr_anysat.model.anysat`. They are counted from the matrix
products of its layers; norms, activations and softmaxes are small in comparison.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from xr_anysat.model.spec import BUCKETS, CPU_ROWS, DATE_HEADS, KEY_DIM, SENSORS, SIZES, Size

PARAMETERS = {"tiny": 4_289_057, "small": 29_649_217, "base": 94_955_617}
"""Number of float32 parameters of the model with only its Sentinel-2 projector."""

HEAP_BYTES = 128 << 20
"""Freed memory that the C library retains for the next allocation; 85 to 140 MiB were measured with glibc and the
settings of :mod:`xr_anysat.embedding.process`."""


KERNEL_BYTES = 12 << 20
"""Memory of the code that oneDNN generates for matrix products, as measured."""


@dataclass(frozen=True)
class MultiplyAdds:
    """Multiply-adds of the three stages; two floating point operations each."""

    pixels: int
    patches: int
    windows: int

    @property
    def total(self) -> int:
        """Sum of the three stages."""
        return self.pixels + self.patches + self.windows


def multiply_adds(
    size: str,
    output: str,
    *,
    dates: int,
    side: int,
    pixels: int,
    patches: int,
    savings: bool = True,
) -> MultiplyAdds:
    """Count the multiply-adds of one window, or of a part of a window.

    Parameters
    ----------
    size : {"tiny", "small", "base"}
        Size of the model.
    output : {"patch", "dense", "local", "tile", "all"}
        Requested output; ``local`` has no third stage.
    dates : int
        Number of frames, all observed.
    side : int
        Pixels per patch side.
    pixels, patches : int
        Numbers of pixels and patches of the window.
    savings : bool
        Count what :class:`xr_anysat.model.anysat.AnySat` computes, which skips whatever the output does not
        need. False: count the published model, which computes all outputs.

    Returns
    -------
    MultiplyAdds

    Examples
    --------
    A window of 32 × 32 patches of 40 m with eight dates, in millions per pixel:

    >>> whole = multiply_adds("base", "all", dates=8, side=4, pixels=128**2, patches=32**2, savings=False)
    >>> [round(n / 128**2 / 1e6, 1) for n in (whole.pixels, whole.patches, whole.windows)]
    [22.9, 45.3, 3.8]
    """
    model = SIZES[size]
    dim, depth = model.dim, model.depth
    widths = [SENSORS["s2"].channels, dim // 8, dim // 2, dim, 2 * dim, dim]
    mlp = sum(a * b for a, b in pairwise(widths))
    # the query is constant, so keys and query fold into one row per head
    scores = DATE_HEADS * dim if savings else DATE_HEADS * KEY_DIM * (dim + 1)
    temporal = dates * (mlp + scores + dim) + dim * dim

    tokens = side * side + 1  # [cls, pixels]
    queries = {"dense": tokens, "local": tokens - 1}.get(output, 1) if savings else tokens
    lookup = BUCKETS * dim // model.heads  # position bias of one query
    spatial = (depth - 1) * _block(model, tokens, tokens) + _block(model, queries, tokens)
    spatial += ((depth - 1) * tokens + queries) * lookup
    # the cls token of the first block is projected once
    same = 3 * dim * dim * (patches - 1) if savings and depth > 1 else 0

    if output == "local" and savings:
        return MultiplyAdds(pixels * temporal, patches * spatial - same, 0)
    n = patches + 1  # [cls, patches]
    cross = _block(model, n, n) - n * dim * dim + n * lookup  # its queries are not projected
    return MultiplyAdds(pixels * temporal, patches * spatial - same, depth * _block(model, n, n) + cross)


def _block(model: Size, queries: int, keys: int) -> int:
    """Multiply-adds of a transformer block: query, output and MLP per query; key and value per key; attention."""
    dim = model.dim
    return (10 * queries + 2 * keys) * dim * dim + 2 * queries * keys * dim


def working_bytes(
    size: str, output: str, *, dates: int, side: int, tile: int, windows: int = 1, rows: int = CPU_ROWS
) -> int:
    """Estimate the memory in which windows are encoded, without their block and the weights.

    It is counted from the tensors that exist at the same time: the window and its copies, the tokens
    of its pixels, and the maximum of the three stages and of assembling ``dense``.

    Parameters
    ----------
    size, output, dates, side
        As in :func:`multiply_adds`.
    tile : int
        Pixels per window side.
    windows : int
        Windows per forward pass.
    rows : int
        Rows per pass through the widest layer of a stage, which depends on the device.

    Returns
    -------
    int
        Bytes.

    Examples
    --------
    >>> working_bytes("base", "patch", dates=8, side=1, tile=24) >> 20
    172
    """
    dim, pixels, n = SIZES[size].dim, tile * tile, (tile // side) ** 2 + 1
    tokens = pixels * dim
    series = min(rows, windows * pixels * dates)
    spatial = min(rows, windows * (n - 1) * (side * side + 1))
    # vectors of `dim` numbers per row. Stage one: values, their spread, norms and sums. Other stages: tokens,
    # their norm, the four times wider hidden layer, and the output
    stages = [5 * dim * series, 8 * dim * spatial]
    if output != "local":
        # each pair of tokens has a bias, computed in 16 parts from distances as 64-bit integers
        stages.append(n * n + windows * 2 * dim * n + max(windows * 8 * dim * n, n * n // 2))
    if output == "dense":
        stages.append(windows * 4 * tokens)
    kept = tokens * (2 if output in ("dense", "local") else 1) + 3 * pixels * dates * SENSORS["s2"].channels
    return 4 * (windows * kept + max(stages)) + KERNEL_BYTES + HEAP_BYTES

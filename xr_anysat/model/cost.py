"""What the model costs: multiply-adds, parameters, and the memory that a forward works in. No torch.

The numbers are those of the Sentinel-2 path of :mod:`xr_anysat.model.anysat`, counted from its
layers: products of matrices alone, since norms, activations and softmaxes are small beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from xr_anysat.model.spec import BUCKETS, CPU_ROWS, DATE_HEADS, KEY_DIM, SENSORS, SIZES, Size

PARAMETERS = {"tiny": 4_289_057, "small": 29_649_217, "base": 94_955_617}
"""Parameters, float32 each, of the model with its Sentinel-2 projector alone."""

HEAP_BYTES = 128 << 20
"""Freed memory that the C library keeps for the next allocation, as the engine tells it; 85 to 140 MiB were
measured with glibc."""


KERNEL_BYTES = 12 << 20
"""What oneDNN takes for the code that it generates for products of a shape, as measured."""


@dataclass(frozen=True)
class MultiplyAdds:
    """Multiply-adds of the three stages; two floating point operations each."""

    pixels: int
    patches: int
    windows: int

    @property
    def total(self) -> int:
        """Of all three."""
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
    """Multiply-adds of one window, or of the part of one that there is.

    Parameters
    ----------
    size : {"tiny", "small", "base"}
        The model's size.
    output : {"patch", "dense", "local", "tile", "all"}
        Requested output: `local` has no third stage.
    dates : int
        Frames, all of them observed.
    side : int
        Pixels on a patch's side.
    pixels, patches : int
        How many the window has.
    savings : bool
        Count what :class:`xr_anysat.model.anysat.AnySat` computes, which leaves out what nobody
        looks at. False: count the model as it was published, in all outputs at once.

    Returns
    -------
    MultiplyAdds

    Examples
    --------
    A window of 32 × 32 patches of 40 m at eight dates, in millions a pixel:

    >>> whole = multiply_adds("base", "all", dates=8, side=4, pixels=128**2, patches=32**2, savings=False)
    >>> [round(n / 128**2 / 1e6, 1) for n in (whole.pixels, whole.patches, whole.windows)]
    [22.9, 45.3, 3.8]
    """
    model = SIZES[size]
    dim, depth = model.dim, model.depth
    widths = [SENSORS["s2"].channels, dim // 8, dim // 2, dim, 2 * dim, dim]
    mlp = sum(a * b for a, b in pairwise(widths))
    # the query is constant, so that keys and query fold into one row a head
    scores = DATE_HEADS * dim if savings else DATE_HEADS * KEY_DIM * (dim + 1)
    temporal = dates * (mlp + scores + dim) + dim * dim

    tokens = side * side + 1  # [cls, pixels]
    queries = {"dense": tokens, "local": tokens - 1}.get(output, 1) if savings else tokens
    lookup = BUCKETS * dim // model.heads  # the position's bias of one query
    spatial = (depth - 1) * _block(model, tokens, tokens) + _block(model, queries, tokens)
    spatial += ((depth - 1) * tokens + queries) * lookup
    same = (
        3 * dim * dim * (patches - 1) if savings and depth > 1 else 0
    )  # the first block's cls token is projected once

    if output == "local" and savings:
        return MultiplyAdds(pixels * temporal, patches * spatial - same, 0)
    n = patches + 1  # [cls, patches]
    cross = _block(model, n, n) - n * dim * dim + n * lookup  # its queries are no product
    return MultiplyAdds(pixels * temporal, patches * spatial - same, depth * _block(model, n, n) + cross)


def _block(model: Size, queries: int, keys: int) -> int:
    """Multiply-adds of a transformer block: query, output and MLP a query; key and value a key; attention."""
    dim = model.dim
    return (10 * queries + 2 * keys) * dim * dim + 2 * queries * keys * dim


def working_bytes(
    size: str, output: str, *, dates: int, side: int, tile: int, windows: int = 1, rows: int = CPU_ROWS
) -> int:
    """Memory that windows take while they are encoded, beside their block and the weights.

    Counted from the tensors that are alive at the same time: the window and its copies, the tokens
    of its pixels, and the most that one of the three stages, or putting ``dense`` together, holds.

    Parameters
    ----------
    size, output, dates, side
        As in :func:`multiply_adds`.
    tile : int
        Pixels on the side of a window.
    windows : int
        Windows of a forward.
    rows : int
        Rows that go through a stage's widest layer at once, which depends on the device.

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
    # a row's vectors, each of `dim` numbers: in stage one values, their spread, norms and sums; in the
    # others the tokens, their norm, the four times wider hidden layer, and what comes out
    stages = [5 * dim * series, 8 * dim * spatial]
    if output != "local":
        # all pairs of tokens have a bias, which is made in 16 parts, of distances as 64-bit integers
        stages.append(n * n + windows * 2 * dim * n + max(windows * 8 * dim * n, n * n // 2))
    if output == "dense":
        stages.append(windows * 4 * tokens)
    kept = tokens * (2 if output in ("dense", "local") else 1) + 3 * pixels * dates * SENSORS["s2"].channels
    return 4 * (windows * kept + max(stages)) + KERNEL_BYTES + HEAP_BYTES

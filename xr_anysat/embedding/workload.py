"""Blocks, windows, operations and memory of an embedding, computed from its options."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import replace
from itertools import accumulate, pairwise

from xr_anysat.cube.reading import BANDS
from xr_anysat.embedding.blocks import BlockLayout, block_limits, pixel_bytes
from xr_anysat.embedding.lattice import PixelRange, halo, hull, spans
from xr_anysat.embedding.options import ResolvedOptions
from xr_anysat.embedding.settings import BlockSpec
from xr_anysat.model.cost import multiply_adds
from xr_anysat.model.spec import SIZES
from xr_anysat.shared.text import format_bytes


def explain_blocks(resolved: ResolvedOptions, layout: BlockLayout, dates: int) -> str:
    """Why the blocks have the size that they have."""
    s, rows, cols = resolved.settings, resolved.rows, resolved.cols
    read, made = pixel_bytes(s, dates)
    pixel = max(read, made)
    n, stride = layout.windows, s.stride
    limit, at_least = block_limits(s)
    total = rows.covering_cells(stride)[1] * cols.covering_cells(stride)[1]
    what, head = "output" if made >= read else "input", f"{n} × {n} windows a block"
    if total == 1:
        return "one block, for the cube is one window"
    if (stride * (n + 1)) ** 2 * pixel > limit:
        size = (stride * n) ** 2 * pixel
        if size <= limit:
            return f"{head}: the most under {format_bytes(limit)} of {what}"
        return f"{head}, though the {what} of one is {format_bytes(size)}: a window cannot be cut"
    if total < at_least:
        return f"{head}: there are {total} windows, and {at_least} blocks are expected"
    return f"{head}: the most that make at least {at_least} blocks of the cube"


def explain_chunks(resolved: ResolvedOptions, layout: BlockLayout, dates: int, *, lazy: bool) -> str:
    """How the cube's own chunks go into the blocks."""
    if not lazy:
        frames = dates * len(BANDS) * resolved.rows.size * resolved.cols.size * 4
        return (
            f"the cube is not lazy: its blocks are computed now, and all {format_bytes(frames)} of frames and "
            f"{format_bytes(math.prod(resolved.shape) * 4)} of embeddings are in memory beside them"
        )
    own = resolved.canonical.array.chunksizes
    largest = ", ".join(f"{dim} {max(c)}" for dim, c in own.items())
    if resolved.resize is not None:
        return f"the cube's chunks ({largest}) are put together, for it is resampled as a whole"
    # what is read for one block waits for the others
    waiting = f"the frames of one are {format_bytes(dates * len(BANDS) * max(own['y']) * max(own['x']) * 4)}"
    if resolved.settings.overlap:
        reach = halo(resolved.settings.tile, resolved.settings.overlap)
        beside = f"windows reach {reach} pixels into the blocks beside"
        return f"the cube's chunks ({largest}) are re-cut: {beside}; {waiting}"
    blocks = len(layout.down) * len(layout.across)
    whole = (len(layout.down) - _cut(layout.down, own["y"])) * (
        len(layout.across) - _cut(layout.across, own["x"])
    )
    if not _cut(own["y"], layout.down) and not _cut(own["x"], layout.across):
        return f"the cube's chunks ({largest}) fit: each goes into one block"
    if whole == blocks:
        return f"the cube's chunks ({largest}) fit: each block lies in one; {waiting}"
    row = resolved.cols.size * dates * len(BANDS) * 4
    fit = resolved.settings.stride * layout.windows
    held, less = (
        _over(own["y"], layout.down),
        _over(PixelRange(0, resolved.rows.size).blocks(fit, 1), layout.down),
    )
    below = f", and up to {format_bytes(held * row)} wait for the chunks below"
    mend = f" ({format_bytes(less * row)} if chunks were {fit} pixels, or a multiple, on a side)"
    return (
        f"the cube's chunks ({largest}) are re-cut: {blocks - whole:,} blocks take pixels of several; {waiting}"
        f"{below if held else ''}{mend if less < held else ''}"
    )


def _over(pieces: tuple[int, ...], others: tuple[int, ...]) -> int:
    """The most that one of the `pieces` of an axis reaches over the last edge of the `others`.

    Examples
    --------
    >>> _over((512, 512), (276, 288, 288, 172)), _over((288, 288), (276, 288, 12)), _over((576,), (288, 288))
    (236, 12, 0)
    """
    ends = [0, *accumulate(others)]
    return max(end - ends[bisect_right(ends, end) - 1] for end in accumulate(pieces))


def _cut(pieces: tuple[int, ...], others: tuple[int, ...]) -> int:
    """How many pieces of an axis an edge of the `others` cuts.

    Examples
    --------
    >>> _cut((4, 4, 4), (4, 2, 6)), _cut((4, 2, 6), (4, 4, 4))
    (1, 1)
    """
    ends = list(accumulate(others))
    return sum(
        bisect_right(ends, start) < bisect_left(ends, stop)
        for start, stop in pairwise(accumulate(pieces, initial=0))
    )


def total_multiply_adds(
    settings: BlockSpec, down: list[PixelRange], across: list[PixelRange], *, published: bool
) -> int:
    """Multiply-adds of blocks that lie so down and across, all pixels observed.

    Where windows overlap, a pixel and a patch are computed once, and a window in each block that it meets.
    """
    squares = replace(settings, tile=settings.stride, overlap=0)
    pixels, patches, _ = _stages(squares, [hull(down)], [hull(across)], published=published)
    *_, windows = _stages(settings, down, across, published=published)
    return pixels + patches + windows


def _stages(
    settings: BlockSpec, down: list[PixelRange], across: list[PixelRange], *, published: bool
) -> tuple[int, int, int]:
    """Multiply-adds of the model's three stages in all windows that the parts of the two axes meet."""
    pixels = patches = windows = 0
    for (height, p), n in window_shapes(down, settings).items():
        for (width, q), m in window_shapes(across, settings).items():
            one = multiply_adds(
                settings.spec.size, settings.output, dates=len(settings.doy), side=settings.side,
                pixels=height * width, patches=p * q, savings=not published,
            )  # fmt: skip
            pixels += n * m * one.pixels
            patches += n * m * one.patches
            windows += n * m * one.windows
    return pixels, patches, windows


def window_shapes(parts: list[PixelRange], settings: BlockSpec) -> Counter[tuple[int, int]]:
    """Pixels and patches that the windows of parts of an axis have, and how many windows have them."""
    return Counter(
        (s.stop - s.start, s.n_patches)
        for part in parts
        for s in spans(hull(parts), settings.tile, settings.side, stride=settings.stride, over=part)
    )


def count_windows(axis: PixelRange, settings: BlockSpec) -> int:
    """Windows along an axis."""
    return sum(1 for _ in spans(axis, settings.tile, settings.side, stride=settings.stride))


def token_bytes(settings: BlockSpec, layout: BlockLayout) -> int:
    """Bytes of the tokens that a block of overlapping windows waits for, and of its sums."""
    if not settings.overlap:
        return 0
    reach, dim = halo(settings.tile, settings.overlap), SIZES[settings.spec.size].dim
    own, near = (
        math.prod(max(sizes) + more for sizes in (layout.down, layout.across)) for more in (0, 2 * reach)
    )
    return 4 * dim * ((own + near) // settings.side**2 + (near if settings.output == "dense" else 0))

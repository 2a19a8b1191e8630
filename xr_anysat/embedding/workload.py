"""Blocks, windows, operations and memory of an embedding, computed from its options."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import replace
from itertools import accumulate, pairwise

from xr_anysat.embedding.blocks import BlockLayout, block_limits, frame_bytes, pixel_bytes
from xr_anysat.embedding.lattice import PixelRange, halo, hull, spans
from xr_anysat.embedding.options import ResolvedOptions
from xr_anysat.embedding.settings import BlockSpec
from xr_anysat.model.cost import multiply_adds
from xr_anysat.model.spec import SIZES
from xr_anysat.shared.text import format_bytes


def explain_blocks(resolved: ResolvedOptions, layout: BlockLayout, dates: int) -> str:
    """Explain the size of the blocks."""
    s, rows, cols = resolved.settings, resolved.rows, resolved.cols
    input_bytes, output_bytes = pixel_bytes(s, dates)
    larger = max(input_bytes, output_bytes)
    n, stride = layout.windows, s.stride
    max_bytes, min_blocks = block_limits(s)
    total = rows.covering_cells(stride)[1] * cols.covering_cells(stride)[1]
    what, head = "output" if output_bytes >= input_bytes else "input", f"{n} × {n} windows per block"
    if total == 1:
        return "one block, because the cube is one window"
    if (stride * (n + 1)) ** 2 * larger > max_bytes:
        size = (stride * n) ** 2 * larger
        if size <= max_bytes:
            return f"{head}: the most under {format_bytes(max_bytes)} of {what}"
        return f"{head}, although its {what} has {format_bytes(size)}: a window cannot be divided"
    if total < min_blocks:
        return f"{head}: the cube has {total} windows, fewer than the {min_blocks} blocks to aim for"
    return f"{head}: the most that leave at least {min_blocks} blocks"


def explain_chunks(resolved: ResolvedOptions, layout: BlockLayout, dates: int, *, lazy: bool) -> str:
    """Explain how the chunks of the cube fit the blocks."""
    if not lazy:
        frames = frame_bytes(dates, resolved.rows.size * resolved.cols.size)
        return (
            f"the cube is not lazy: embed() computes its blocks immediately, and keeps all {format_bytes(frames)} of "
            f"frames and {format_bytes(math.prod(resolved.shape) * 4)} of embeddings in memory"
        )
    own = resolved.canonical.array.chunksizes
    chunks = f"the cube's chunks ({', '.join(f'{dim} {max(c)}' for dim, c in own.items())})"
    if resolved.resize is not None:
        return f"{chunks} are merged, because the cube is resampled as a whole"
    # the frames of a chunk stay in memory until all blocks that need them are computed
    kept = f"the frames of one chunk have {format_bytes(frame_bytes(dates, max(own['y']) * max(own['x'])))}"
    if resolved.settings.overlap:
        reach = halo(resolved.settings.tile, resolved.settings.overlap)
        return f"{chunks} are rechunked: windows extend {reach} pixels into adjacent blocks; {kept}"
    if not _count_cut(own["y"], layout.down) and not _count_cut(own["x"], layout.across):
        return f"{chunks} fit: each is within one block"
    sides = (layout.down, own["y"]), (layout.across, own["x"])
    cut = math.prod(map(len, (layout.down, layout.across)))
    cut -= math.prod(len(blocks) - _count_cut(blocks, edges) for blocks, edges in sides)
    if not cut:
        return f"{chunks} fit: each block is within one chunk; {kept}"
    fitting = resolved.settings.stride * layout.windows
    fitting_chunks = PixelRange(0, resolved.rows.size).blocks(fitting, 1)
    waiting, fewer = (_max_excess(sizes, layout.down) for sizes in (own["y"], fitting_chunks))
    row = frame_bytes(dates, resolved.cols.size)
    text = f"{chunks} are rechunked: {cut:,} blocks need pixels of several chunks; {kept}"
    if waiting:
        text += f", and up to {format_bytes(waiting * row)} are kept until the chunks below are read"
    if fewer < waiting:
        text += f" ({format_bytes(fewer * row)} with chunks of {fitting} pixels, or a multiple, per side)"
    return text


def _max_excess(pieces: tuple[int, ...], others: tuple[int, ...]) -> int:
    """Return the most by which a piece of an axis extends beyond the last edge of the `others`.

    Examples
    --------
    >>> _max_excess((512, 512), (276, 288, 288, 172)), _max_excess((576,), (288, 288))
    (236, 0)
    """
    ends = [0, *accumulate(others)]
    return max(end - ends[bisect_right(ends, end) - 1] for end in accumulate(pieces))


def _count_cut(pieces: tuple[int, ...], others: tuple[int, ...]) -> int:
    """Count the pieces of an axis that an edge of the `others` cuts.

    Examples
    --------
    >>> _count_cut((4, 4, 4), (4, 2, 6)), _count_cut((4, 2, 6), (4, 4, 4))
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
    """Count the multiply-adds of the blocks `down` × `across` if every pixel was observed.

    Where windows overlap, each pixel and patch is computed once, and each window once per block that it meets.
    """
    squares = replace(settings, tile=settings.stride, overlap=0)
    pixels, patches, _ = _stages(squares, [hull(down)], [hull(across)], published=published)
    *_, windows = _stages(settings, down, across, published=published)
    return pixels + patches + windows


def _stages(
    settings: BlockSpec, down: list[PixelRange], across: list[PixelRange], *, published: bool
) -> tuple[int, int, int]:
    """Count the multiply-adds of the three stages in all windows that the parts of the two axes meet."""
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
    """Count the windows of parts of an axis by their numbers of pixels and patches."""
    return Counter(
        (s.stop - s.start, s.n_patches)
        for part in parts
        for s in spans(hull(parts), settings.tile, settings.side, stride=settings.stride, over=part)
    )


def count_windows(axis: PixelRange, settings: BlockSpec) -> int:
    """Count the windows along an axis."""
    return sum(1 for _ in spans(axis, settings.tile, settings.side, stride=settings.stride))


def token_bytes(settings: BlockSpec, layout: BlockLayout) -> int:
    """Return the bytes of the tokens that a block of overlapping windows gathers, and of its sums."""
    if not settings.overlap:
        return 0
    reach, dim = halo(settings.tile, settings.overlap), SIZES[settings.spec.size].dim
    own, near = (
        math.prod(max(sizes) + margin for sizes in (layout.down, layout.across)) for margin in (0, 2 * reach)
    )
    return 4 * dim * ((own + near) // settings.side**2 + (near if settings.output == "dense" else 0))

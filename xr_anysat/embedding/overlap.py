"""Embed overlapping windows and blend them; each pixel and each patch is computed only once.

Stages one and two of the model look at one patch at a time. Their tokens are therefore computed piece by piece:
the interior of each block, and the bands along the borders of blocks, into which the windows of both sides
extend. Then each block gathers the pieces around it and runs the windows that meet it. Sums follow the order of
the lattice, so that no bit depends on where a block ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby, pairwise, product
from typing import TYPE_CHECKING, Any

import numpy as np

from xr_anysat.cube.normalization import check_values, observed
from xr_anysat.embedding.blocks import block_layout
from xr_anysat.embedding.forward import (
    crop_to_cube,
    exclusive_encoder,
    observed_windows,
    patches,
    run_in_batches,
    to_device,
    window_tensors,
)
from xr_anysat.embedding.lattice import PixelRange, Span, Squares, blend_weights, halo, hull, spans
from xr_anysat.embedding.settings import BlockSpec, WindowPosition
from xr_anysat.model.weights import get_encoder
from xr_anysat.shared.graph import RECHUNK
from xr_anysat.shared.sensor import S2

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Tokens:
    """Tokens of a piece of the cube.

    Attributes
    ----------
    y, x : PixelRange
        Rows and columns of its pixels.
    patch : ndarray, (h patches, w patches, D) float32
        Tokens of the patches; zero where nothing was observed.
    covered : ndarray, (h patches, w patches) bool
        Whether anything in a patch was observed.
    local : ndarray, (h pixels, w pixels, D) float32, or None
        Tokens of the pixels, for ``dense``; NaN where nothing was observed.
    """

    y: PixelRange
    x: PixelRange
    patch: np.ndarray
    covered: np.ndarray
    local: np.ndarray | None


def encode_overlapping(
    frames: Any,
    stats: Any,
    rows: PixelRange,
    cols: PixelRange,
    settings: BlockSpec,
    squares: Squares | None = None,
    min_blocks: int | None = None,
) -> Any:
    """Embed frames in overlapping windows; see :func:`xr_anysat.embedding.blocks.encode_windows`."""
    import dask.array as da
    from dask.base import tokenize
    from dask.highlevelgraph import HighLevelGraph

    eager, dates = isinstance(frames, np.ndarray), frames.shape[0]
    layout = block_layout(rows, cols, settings, dates, min_blocks)
    reach = halo(settings.tile, settings.overlap)
    blocks = layout.down, layout.across
    pieces = [
        split_at_block_edges(axis, sizes, reach) for axis, sizes in zip((rows, cols), blocks, strict=True)
    ]
    chunks = ((dates,), (len(S2.bands),), *(tuple(piece.size for piece in each) for each in pieces))
    if eager:
        get_encoder(settings.spec)
        frames = da.from_array(frames, chunks=chunks, name=False)
    frames = frames.rechunk(chunks, method=RECHUNK)
    stats = None if stats is None else da.asarray(stats)
    sources = frames.name, None if stats is None else stats.name
    name = f"overlap-{tokenize(sources, rows, cols, settings, squares, layout)}"
    tokens = f"tokens-{name}"
    statistics = None if stats is None else (stats.name, 0, 0)
    stride = settings.stride
    grown = None if squares is None else squares.grown(reach // stride)
    graph: dict[Any, Any] = {}
    near_squares = {}
    for i, y in enumerate(pieces[0]):
        for j, x in enumerate(pieces[1]):
            part = None if grown is None else grown.part(y, x, stride)
            near_squares[i, j] = part
            graph[tokens, i, j] = (
                encode_tokens, (frames.name, 0, 0, i, j), statistics, y, x, settings, part,
            )  # fmt: skip
    down, across = (
        list(neighborhoods(*each, reach))
        for each in ((rows, blocks[0], pieces[0]), (cols, blocks[1], pieces[1]))
    )
    for i, (y, near_rows, all_y) in enumerate(down):
        for j, (x, near_cols, all_x) in enumerate(across):
            own = None if squares is None else squares.part(y, x, stride)
            needed = product(near_rows, near_cols) if own is None or own.needed.any() else ()
            near = [(tokens, *at) for at in needed if (part := near_squares[at]) is None or part.needed.any()]
            graph[name, 0, i, j] = (blend_block, near, (all_y, all_x), y, x, settings, own)
    layers = HighLevelGraph.from_collections(
        name, graph, dependencies=[frames] if stats is None else [frames, stats]
    )
    chunks_out = ((settings.channels,), layout.down_cells, layout.across_cells)
    out = da.Array(layers, name, chunks_out, dtype=np.float32, meta=np.empty((0, 0, 0), np.float32))
    return out.compute(scheduler="synchronous") if eager else out


def split_at_block_edges(axis: PixelRange, blocks: tuple[int, ...], reach: int) -> list[PixelRange]:
    """Split an axis into pieces, each of which is completely within the reach of a block or completely outside.

    Examples
    --------
    >>> [(p.start, p.stop) for p in split_at_block_edges(PixelRange(0, 120), (48, 48, 24), 12)]
    [(0, 36), (36, 60), (60, 84), (84, 108), (108, 120)]
    """
    borders = [part.stop for part in axis.parts(blocks)][:-1]
    near = {border + side for border in borders for side in (-reach, reach)}
    edges = sorted({axis.start, axis.stop} | {edge for edge in near if axis.start < edge < axis.stop})
    return [PixelRange(a, b - a) for a, b in pairwise(edges)]


def neighborhoods(
    axis: PixelRange, blocks: tuple[int, ...], pieces: list[PixelRange], reach: int
) -> Iterator[tuple[PixelRange, list[int], PixelRange]]:
    """Yield each block of an axis, the numbers of the pieces within its reach, and the range that they cover."""
    for part in axis.parts(blocks):
        first, stop = part.start - reach, part.stop + reach
        near = [n for n, piece in enumerate(pieces) if piece.stop > first and piece.start < stop]
        yield part, near, hull([pieces[n] for n in near])


def encode_tokens(
    frames: np.ndarray,
    stats: np.ndarray | None,
    y: PixelRange,
    x: PixelRange,
    settings: BlockSpec,
    near_squares: Squares | None = None,
) -> Tokens | None:
    """Compute the tokens of a piece (T, 10, h, w) float32 at rows `y` and columns `x`; None if it was not observed.

    With `near_squares`, only their patches are computed.

    Patches go through the model in squares with the side of a stride, which start where windows start. A patch is
    therefore always batched with the same neighbors, whichever piece it is in.
    """
    valid = observed(frames)
    check_values(frames, valid, offset_decided=settings.offset_decided)
    if not valid.any():
        return None
    squares, side = replace(settings, tile=settings.stride, overlap=0), settings.side
    rows, cols, dense = y.grid(side), x.grid(side), settings.output == "dense"
    with exclusive_encoder(settings.spec) as model:
        patch = np.zeros((rows.size, cols.size, model.dim), np.float32)
        covered = np.zeros((rows.size, cols.size), bool)
        local = np.full((y.size, x.size, model.dim), np.nan, np.float32) if dense else None

        def run(part: list[WindowPosition], device: torch.device) -> Any:
            pixels, doy, mask = window_tensors(frames, valid, stats, y, x, part, device, squares)
            return model.tokens(pixels, doy, mask, side=side, local=dense)

        groups = observed_windows(valid, y, x, squares, near_squares)
        for (i, j), (token, own, is_covered) in run_in_batches(groups, run, model, squares):
            at = patches(i, squares).slice_of(rows), patches(j, squares).slice_of(cols)
            patch[at], covered[at] = token, True if is_covered is None else is_covered
            if local is not None:
                local[i.pixels.slice_of(y), j.pixels.slice_of(x)] = crop_to_cube(own, i, j, squares)
    return Tokens(y, x, patch, covered, local)


def blend_block(
    near: list[Tokens | None],
    near_pixels: tuple[PixelRange, PixelRange],
    y: PixelRange,
    x: PixelRange,
    settings: BlockSpec,
    own: Squares | None = None,
) -> np.ndarray:
    """Compute one block (D, h cells, w cells) float32 at rows `y` and columns `x`.

    `near` are the tokens of the pieces around it, which cover the rows and columns `near_pixels`. With `own`, only
    the windows that meet these squares of the block are computed, and cells outside them are NaN.
    """
    side, stride = settings.side, settings.stride
    known = [tokens for tokens in near if tokens is not None]
    out = np.full(
        (settings.channels, *(axis.grid(settings.cell).size for axis in (y, x))), np.nan, np.float32
    )
    if not known:
        return out
    dim, rows, cols = known[0].patch.shape[-1], y.grid(side), x.grid(side)

    def gather(i: PixelRange, j: PixelRange) -> np.ndarray:
        """Return the tokens (i, j, D) of these patches from all pieces."""
        patch = np.zeros((i.size, j.size, dim), np.float32)
        for tokens in known:
            down, across = tokens.y.grid(side), tokens.x.grid(side)
            patch[down.slice_of(i), across.slice_of(j)] = tokens.patch[i.slice_of(down), j.slice_of(across)]
        return patch

    all_rows, all_cols = (axis.grid(side) for axis in near_pixels)
    covered = np.zeros((all_rows.size, all_cols.size), bool)
    for tokens in known:
        at = tokens.y.grid(side).slice_of(all_rows), tokens.x.grid(side).slice_of(all_cols)
        covered[at] = tokens.covered

    def covered_patches(i: Span, j: Span) -> np.ndarray:
        """Whether each patch of a window was observed."""
        return covered[patches(i, settings).slice_of(all_rows), patches(j, settings).slice_of(all_cols)]

    def run(part: list[WindowPosition], device: torch.device) -> Any:
        patch = np.stack([gather(patches(i, settings), patches(j, settings)) for i, j in part])
        keys = np.stack([covered_patches(i, j) for i, j in part])
        origin = part[0][0].first_patch, part[0][1].first_patch
        valid = None if keys.all() else to_device(keys, device)
        return [model.windows(to_device(patch, device), side, valid, origin)[1]]

    blended = np.zeros((rows.size, cols.size, dim), np.float32)
    weights = np.array(blend_weights(settings.tile // side, settings.overlap // side), np.float32)
    windows = (
        (i, j)
        for i in spans(near_pixels[0], settings.tile, side, stride=stride, over=y)
        for j in spans(near_pixels[1], settings.tile, side, stride=stride, over=x)
        if (own is None or own.meet(_squares_of(i, settings), _squares_of(j, settings)))
        and covered_patches(i, j).any()
    )
    # row by row, to keep the order of the sums
    groups = groupby(windows, key=lambda window: [(span.first_patch, span.n_patches) for span in window])
    with exclusive_encoder(settings.spec) as model:
        for (i, j), (token,) in run_in_batches((list(group) for _, group in groups), run, model, settings):
            down, across = patches(i, settings), patches(j, settings)
            inside = rows.slice_of(down), cols.slice_of(across)
            weight = weights[i.first_patch :][inside[0], None] * weights[j.first_patch :][None, inside[1]]
            blended[down.slice_of(rows), across.slice_of(cols)] += token[inside] * weight[..., None]
    blended[~covered[rows.slice_of(all_rows), cols.slice_of(all_cols)]] = np.nan
    unneeded = np.s_[:0] if own is None else ~own.cells(y, x, settings.cell, stride)
    if settings.output == "patch":
        out[:] = np.moveaxis(blended, -1, 0)
        out[:, unneeded] = np.nan
        return out
    for tokens in known:
        assert tokens.local is not None  # output is "dense"
        source = y.slice_of(tokens.y), x.slice_of(tokens.x)
        out[dim:, tokens.y.slice_of(y), tokens.x.slice_of(x)] = np.moveaxis(tokens.local[source], -1, 0)
    patch_y, patch_x = (np.arange(axis.start, axis.stop) // side - axis.grid(side).start for axis in (y, x))
    spread = np.moveaxis(blended[patch_y[:, None], patch_x], -1, 0)
    out[:dim] = np.where(np.isnan(out[dim]), np.nan, spread)
    out[:, unneeded] = np.nan
    return out


def _squares_of(span: Span, settings: BlockSpec) -> PixelRange:
    """Return the squares that a window meets."""
    return PixelRange(span.window * settings.stride, settings.tile).grid(settings.stride)

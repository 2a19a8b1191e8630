"""Windows and patches on the pixel grid: integer arithmetic only, one axis at a time.

Pixels are numbered from the anchor: the CRS origin (rows increase southward, columns eastward) or the
corner of the cube. Patches and windows start at multiples of their side in that numbering, so the same
ground is in the same patch and window for every requested area.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np


@dataclass(frozen=True)
class PixelRange:
    """One axis of a cube on the lattice.

    Attributes
    ----------
    start : int
        Number of the cube's first pixel, counted from the anchor.
    size : int
        Pixels.

    Examples
    --------
    >>> axis = PixelRange(start=-5, size=60)
    >>> axis.covering_cells(24)
    (-1, 4)
    >>> axis.blocks(24, 1)
    (5, 24, 24, 7)
    """

    start: int
    size: int

    @property
    def stop(self) -> int:
        """Number of the pixel after the last one."""
        return self.start + self.size

    def covering_cells(self, side: int) -> tuple[int, int]:
        """Return the number of the first cell of `side` pixels that the range meets, and the count of such cells."""
        first = self.start // side
        return first, -(-self.stop // side) - first

    def grid(self, side: int) -> PixelRange:
        """Return the cells of `side` pixels that the range meets, as a range of cells."""
        return PixelRange(*self.covering_cells(side))

    def slice_of(self, other: PixelRange) -> slice:
        """Return the position within another range of what the two have in common.

        Examples
        --------
        >>> PixelRange(10, 5).slice_of(PixelRange(8, 4)), PixelRange(10, 5).slice_of(PixelRange(0, 4))
        (slice(2, 4, None), slice(4, 4, None))
        """
        start = min(max(self.start - other.start, 0), other.size)
        return slice(start, max(start, min(self.stop - other.start, other.size)))

    def blocks(self, tile: int, windows: int) -> tuple[int, ...]:
        """Return the pixels per block, for blocks of `windows` windows of `tile` pixels.

        Windows are whole, except where the ends of the range cut them.
        """
        first, count = self.covering_cells(tile)
        edges = [first * tile + tile * i for i in range(0, count, windows)][1:]
        edges = [self.start, *edges, self.stop]
        return tuple(b - a for a, b in pairwise(edges))

    def parts(self, sizes: tuple[int, ...]) -> list[PixelRange]:
        """Split the range into parts of these sizes, such as its blocks."""
        return [PixelRange(self.start + end - n, n) for end, n in zip(accumulate(sizes), sizes, strict=True)]


def hull(parts: list[PixelRange]) -> PixelRange:
    """Return the range that adjacent parts of an axis cover together."""
    return PixelRange(parts[0].start, parts[-1].stop - parts[0].start)


def cell_chunks(axis: PixelRange, blocks: tuple[int, ...], side: int) -> tuple[int, ...]:
    """Return the cells of `side` pixels per block, which are the chunks of the output along `axis`.

    Examples
    --------
    >>> cell_chunks(PixelRange(-5, 60), (5, 24, 24, 7), 4)
    (2, 6, 6, 2)
    """
    return tuple(part.covering_cells(side)[1] for part in axis.parts(blocks))


@dataclass(frozen=True)
class Span:
    """The part of one window that is within an axis.

    Attributes
    ----------
    window : int
        Number of the window.
    start, stop : int
        Its pixels that exist, numbered from the anchor.
    first_patch, n_patches : int
        Position within the window of the first patch that they are in, and the number of such patches.
    """

    window: int
    start: int
    stop: int
    first_patch: int
    n_patches: int

    @property
    def pixels(self) -> PixelRange:
        """The pixels that exist."""
        return PixelRange(self.start, self.stop - self.start)


def spans(
    axis: PixelRange, tile: int, side: int, *, stride: int | None = None, over: PixelRange | None = None
) -> Iterator[Span]:
    """Yield the windows of `tile` pixels along `axis`, each with its patches of `side` pixels.

    Parameters
    ----------
    axis : PixelRange
        The pixels that exist.
    tile, side : int
        Pixels on the side of a window and of a patch.
    stride : int, optional
        Pixels from one window to the next. By default, windows are adjacent.
    over : PixelRange, optional
        Yield only the windows that meet this part of the axis.

    Examples
    --------
    >>> next(spans(PixelRange(-5, 60), 24, 4))
    Span(window=-1, start=-5, stop=0, first_patch=4, n_patches=2)
    >>> [(s.start, s.stop) for s in spans(PixelRange(0, 60), 24, 4, stride=12, over=PixelRange(24, 12))]
    [(12, 36), (24, 48)]
    """
    stride, over = stride or tile, over or axis
    for window in range((over.start - tile) // stride + 1, (over.stop - 1) // stride + 1):
        start, stop = max(axis.start, window * stride), min(axis.stop, window * stride + tile)
        patch, patches = PixelRange(start, stop - start).covering_cells(side)
        yield Span(window, start, stop, patch - window * (stride // side), patches)


@dataclass(frozen=True)
class Squares:
    """The squares of a cube for which embeddings are needed; windows that meet none of them are not computed.

    A square has the side of a stride. It is a window if windows do not overlap.

    Attributes
    ----------
    rows, cols : PixelRange
        The squares that a cube meets, as ranges of squares.
    needed : ndarray, (rows, cols) bool
        Which of them are needed.
    """

    rows: PixelRange
    cols: PixelRange
    needed: np.ndarray

    def part(self, y: PixelRange, x: PixelRange, stride: int) -> Squares:
        """Return the squares that a part of the cube meets, at pixel rows `y` and columns `x`."""
        rows, cols = y.grid(stride), x.grid(stride)
        return Squares(rows, cols, self.needed[rows.slice_of(self.rows), cols.slice_of(self.cols)])

    def meet(self, rows: PixelRange, cols: PixelRange) -> bool:
        """Whether any square in these rows and columns of squares is needed."""
        return bool(self.needed[rows.slice_of(self.rows), cols.slice_of(self.cols)].any())

    def cells(self, y: PixelRange, x: PixelRange, cell: int, stride: int) -> np.ndarray:
        """Return which cells of `cell` pixels at pixel rows `y` and columns `x` are in a needed square, (y, x) bool."""
        down, across = (
            np.arange(cells.start, cells.stop) * cell // stride - squares.start
            for cells, squares in ((y.grid(cell), self.rows), (x.grid(cell), self.cols))
        )
        return self.needed[down[:, None], across]

    def grown(self, reach: int) -> Squares:
        """Return these squares and those up to `reach` squares away from them."""
        needed = np.zeros_like(self.needed)
        for row, col in zip(*np.nonzero(self.needed), strict=True):
            needed[max(row - reach, 0) : row + reach + 1, max(col - reach, 0) : col + reach + 1] = True
        return Squares(self.rows, self.cols, needed)


def halo(tile: int, overlap: int) -> int:
    """Return how many pixels the windows of a block may extend beyond it: a multiple of the stride.

    Examples
    --------
    >>> halo(24, 0), halo(24, 6), halo(24, 12), halo(24, 18)
    (0, 18, 12, 18)
    """
    stride = tile - overlap
    return -(-overlap // stride) * stride


def blend_weights(cells: int, overlap: int) -> list[float]:
    """Return the weight of each cell of a window; the weights of all windows sum to one at each place.

    Weights rise and fall as squared sines over the overlap, and are one between. Where more than two windows
    meet, they are divided by their sum.

    Parameters
    ----------
    cells, overlap : int
        Cells on the side of a window, and the number of them that it shares with the next window.

    Examples
    --------
    >>> [round(w, 2) for w in blend_weights(6, 2)]
    [0.15, 0.85, 1.0, 1.0, 0.85, 0.15]
    """
    ramp, stride = min(overlap, cells // 2), cells - overlap
    rise = [math.sin(math.pi / 2 * (i + 0.5) / ramp) ** 2 for i in range(ramp)]
    raw = [*rise, *[1.0] * (cells - 2 * ramp), *reversed(rise)]
    return [w / sum(raw[i % stride :: stride]) for i, w in enumerate(raw)]


def block_side(
    rows: PixelRange, cols: PixelRange, tile: int, *, pixel_bytes: float, max_bytes: int, min_blocks: int
) -> int:
    """Choose the number of windows on the side of a block.

    It is the largest that keeps a block within `max_bytes` (but at least one window) and that leaves
    `min_blocks` blocks, if the cube has that many windows. Even a small cube can then be spread over workers
    and shows progress.

    Parameters
    ----------
    rows, cols : PixelRange
        The cube.
    tile : int
        Pixels on the side of a window.
    pixel_bytes : float
        Bytes per pixel, the larger of input and output.
    max_bytes : int
        Most bytes per block.
    min_blocks : int
        Least number of blocks.

    Examples
    --------
    >>> rows = cols = PixelRange(0, 10980)
    >>> block_side(rows, cols, 24, pixel_bytes=3072, max_bytes=64 << 20, min_blocks=64)
    6
    >>> rows = cols = PixelRange(0, 240)
    >>> block_side(rows, cols, 24, pixel_bytes=3072, max_bytes=64 << 20, min_blocks=16)
    3
    """
    down, across = rows.covering_cells(tile)[1], cols.covering_cells(tile)[1]
    side = 1
    while side < max(down, across):
        wider = side + 1
        blocks = -(-down // wider) * -(-across // wider)
        if (wider * tile) ** 2 * pixel_bytes > max_bytes or blocks < min_blocks:
            break
        side = wider
    return side

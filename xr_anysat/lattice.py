"""Windows and patches on the pixel grid: pure integer arithmetic, one axis at a time.

Pixels are numbered from the anchor: the CRS origin (rows grow southward, columns eastward) or the
cube's own corner. Patches and windows start at multiples of their side in that numbering, so the
same ground lies in the same patch and window whichever area was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Axis:
    """One axis of a cube on the lattice.

    Attributes
    ----------
    start : int
        Number of the cube's first pixel, counted from the anchor.
    size : int
        Pixels.

    Examples
    --------
    >>> axis = Axis(start=-5, size=60)
    >>> axis.cells(24)
    (-1, 4)
    >>> axis.blocks(24, 1)
    (5, 24, 24, 7)
    """

    start: int
    size: int

    @property
    def stop(self) -> int:
        """Number of the pixel behind the last."""
        return self.start + self.size

    def cells(self, side: int) -> tuple[int, int]:
        """Number of the first cell of `side` pixels that the axis meets, and how many it meets."""
        first = self.start // side
        return first, -(-self.stop // side) - first

    def blocks(self, tile: int, windows: int) -> tuple[int, ...]:
        """Pixels a block, for blocks of `windows` whole windows of `tile` pixels.

        Windows are whole but for those that the ends of the axis cut.
        """
        first, count = self.cells(tile)
        edges = [first * tile + tile * i for i in range(0, count, windows)][1:]
        edges = [self.start, *edges, self.stop]
        return tuple(b - a for a, b in pairwise(edges))


def cell_chunks(axis: Axis, blocks: tuple[int, ...], side: int) -> tuple[int, ...]:
    """Cells of `side` pixels a block: the chunks of the output along `axis`.

    Examples
    --------
    >>> cell_chunks(Axis(-5, 60), (5, 24, 24, 7), 4)
    (2, 6, 6, 2)
    """
    out, start = [], axis.start
    for size in blocks:
        out.append(Axis(start, size).cells(side)[1])
        start += size
    return tuple(out)


@dataclass(frozen=True)
class Span:
    """What an axis has of one window.

    Attributes
    ----------
    window : int
        Number of the window.
    start, stop : int
        The pixels that there are, numbered from the anchor.
    first, count : int
        The patches they lie in: the first one's place within the window, and how many.
    """

    window: int
    start: int
    stop: int
    first: int
    count: int


def spans(axis: Axis, tile: int, side: int) -> Iterator[Span]:
    """The windows of `tile` pixels along `axis`, each with the patches of `side` pixels it has.

    Examples
    --------
    >>> next(spans(Axis(-5, 60), 24, 4))
    Span(window=-1, start=-5, stop=0, first=4, count=2)
    """
    first, count = axis.cells(tile)
    for window in range(first, first + count):
        start, stop = max(axis.start, window * tile), min(axis.stop, (window + 1) * tile)
        patch, patches = Axis(start, stop - start).cells(side)
        yield Span(window, start, stop, patch - window * (tile // side), patches)


def blocks_for(rows: Axis, cols: Axis, tile: int, *, pixel_bytes: float, limit: int, at_least: int) -> int:
    """Windows on the side of a block.

    The most that keep a block's bytes under `limit`, but at least one window; and no more than
    leave `at_least` blocks where the cube has that many windows, so that even a small cube can be
    spread over workers and shows progress.

    Parameters
    ----------
    rows, cols : Axis
        The cube.
    tile : int
        Pixels on the side of a window.
    pixel_bytes : float
        Bytes that a pixel needs: the larger of input and output.
    limit : int
        Bytes a block may have.
    at_least : int
        Blocks wanted.

    Examples
    --------
    >>> blocks_for(Axis(0, 10980), Axis(0, 10980), 24, pixel_bytes=3072, limit=256 << 20, at_least=16)
    12
    >>> blocks_for(Axis(0, 240), Axis(0, 240), 24, pixel_bytes=3072, limit=256 << 20, at_least=16)
    3
    """
    down, across = rows.cells(tile)[1], cols.cells(tile)[1]
    side = 1
    while side < max(down, across):
        wider = side + 1
        blocks = -(-down // wider) * -(-across // wider)
        if (wider * tile) ** 2 * pixel_bytes > limit or blocks < at_least:
            break
        side = wider
    return side

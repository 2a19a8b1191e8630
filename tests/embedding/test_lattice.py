"""Windows, patches and blocks along an axis: they cover it exactly, at every position."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xr_anysat.embedding.lattice import PixelRange, block_side, cell_chunks, spans

QUICK = settings(max_examples=200, deadline=None, derandomize=True)

axes = st.builds(PixelRange, st.integers(-2000, 2000), st.integers(1, 500))
sides = st.integers(1, 40)


@given(axis=axes, side=sides)
@QUICK
def test_cells_cover_the_axis_and_no_more(axis: PixelRange, side: int) -> None:
    first, count = axis.covering_cells(side)
    assert first * side <= axis.start < (first + 1) * side
    assert (first + count - 1) * side < axis.stop <= (first + count) * side
    assert {p // side for p in range(axis.start, axis.stop)} == set(range(first, first + count))


@given(axis=axes, tile=sides, windows=st.integers(1, 12))
@QUICK
def test_blocks_are_whole_windows(axis: PixelRange, tile: int, windows: int) -> None:
    blocks = axis.blocks(tile, windows)
    assert sum(blocks) == axis.size
    assert all(0 < b <= tile * windows for b in blocks)
    edges = [axis.start + e for e in accumulate(blocks)][:-1]
    assert all(e % tile == 0 for e in edges)
    assert all(b == tile * windows for b in blocks[1:-1])
    assert len(blocks) == -(-axis.covering_cells(tile)[1] // windows)


@given(axis=axes, side=st.integers(1, 8), patches=st.integers(1, 6), windows=st.integers(1, 5))
@QUICK
def test_chunks_of_cells_add_up(axis: PixelRange, side: int, patches: int, windows: int) -> None:
    tile = side * patches
    blocks = axis.blocks(tile, windows)
    for cell in (1, side, tile):  # cells never straddle blocks
        chunks = cell_chunks(axis, blocks, cell)
        assert len(chunks) == len(blocks)
        assert sum(chunks) == axis.covering_cells(cell)[1]
        assert all(c > 0 for c in chunks)


@given(axis=axes, side=st.integers(1, 8), patches=st.integers(1, 6))
@QUICK
def test_spans_tile_the_axis(axis: PixelRange, side: int, patches: int) -> None:
    tile = side * patches
    found = list(spans(axis, tile, side))
    pixels = [p for s in found for p in range(s.start, s.stop)]
    assert pixels == list(range(axis.start, axis.stop))
    assert [s.window for s in found] == list(range(found[0].window, found[0].window + len(found)))
    for s in found:
        assert s.window * tile <= s.start < s.stop <= (s.window + 1) * tile
        assert 0 <= s.first_patch < s.first_patch + s.n_patches <= patches
        origin = s.window * tile
        assert origin + s.first_patch * side <= s.start < origin + (s.first_patch + 1) * side
        assert (
            origin + (s.first_patch + s.n_patches - 1) * side
            < s.stop
            <= origin + (s.first_patch + s.n_patches) * side
        )
    whole = [s for s in found if s.stop - s.start == tile]
    assert all((s.first_patch, s.n_patches) == (0, patches) for s in whole)
    assert len(whole) >= len(found) - 2


@given(axis=axes, side=st.integers(1, 8), patches=st.integers(1, 6), data=st.data())
@QUICK
def test_a_crop_has_the_same_windows_and_patches(
    axis: PixelRange, side: int, patches: int, data: st.DataObject
) -> None:
    tile = side * patches
    cut = data.draw(st.integers(0, axis.size - 1))
    crop = PixelRange(axis.start + cut, data.draw(st.integers(1, axis.size - cut)))
    whole = {s.window: s for s in spans(axis, tile, side)}
    for s in spans(crop, tile, side):
        if s.stop - s.start == tile:
            assert whole[s.window] == s
        else:
            assert whole[s.window].start <= s.start < s.stop <= whole[s.window].stop
            assert whole[s.window].first_patch <= s.first_patch


@given(
    rows=axes,
    cols=axes,
    tile=sides,
    pixel_bytes=st.sampled_from([0.5, 40.0, 3072.0]),
    max_bytes=st.integers(1, 10_000_000),
    min_blocks=st.integers(1, 40),
)
@QUICK
def test_blocks_keep_to_their_limits_and_are_no_smaller_than_they_need(
    rows: PixelRange, cols: PixelRange, tile: int, pixel_bytes: float, max_bytes: int, min_blocks: int
) -> None:
    down, across = rows.covering_cells(tile)[1], cols.covering_cells(tile)[1]

    def allowed(side: int) -> bool:
        small_enough = (side * tile) ** 2 * pixel_bytes <= max_bytes
        return small_enough and -(-down // side) * -(-across // side) >= min_blocks

    side = block_side(rows, cols, tile, pixel_bytes=pixel_bytes, max_bytes=max_bytes, min_blocks=min_blocks)
    assert 1 <= side <= max(down, across)
    assert side == 1 or allowed(side)
    assert side == max(down, across) or not allowed(side + 1)


@pytest.mark.parametrize(
    ("max_bytes", "min_blocks", "want"), [(40 * 48**2, 1, 2), (40 * 48**2 - 1, 1, 1), (10**9, 4, 9)]
)
def test_limits_may_be_reached(max_bytes: int, min_blocks: int, want: int) -> None:
    axis = PixelRange(0, 240)  # 10 × 10 windows
    assert block_side(axis, axis, 24, pixel_bytes=40, max_bytes=max_bytes, min_blocks=min_blocks) == want


@pytest.mark.parametrize(
    ("axis", "tile", "windows", "want"),
    [
        (PixelRange(0, 24), 24, 1, (24,)),
        (PixelRange(1, 24), 24, 1, (23, 1)),
        (PixelRange(-1, 24), 24, 1, (1, 23)),
        (PixelRange(0, 100), 24, 2, (48, 48, 4)),
        (PixelRange(47, 2), 24, 1, (1, 1)),
        (PixelRange(5, 3), 24, 9, (3,)),
    ],
)
def test_blocks_by_hand(axis: PixelRange, tile: int, windows: int, want: tuple[int, ...]) -> None:
    assert axis.blocks(tile, windows) == want

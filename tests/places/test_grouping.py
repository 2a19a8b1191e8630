"""Which places are read together, and which rectangles of pixels they need."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import geopandas as gpd
import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from xr_anysat.cube.periods import parse_period
from xr_anysat.embedding.options import EmbedOptions
from xr_anysat.places import grouping
from xr_anysat.places.computing import one_window
from xr_anysat.places.grouping import (
    MAX_RECTANGLE,
    MAX_STRIP_PIXELS,
    Rectangle,
    group_places,
    place_on_lattice,
    rectangles,
    strips,
)

ONE = one_window(EmbedOptions(model="tiny", weights="random", norm="pastis", anchor="cube")).settings
PERIOD = parse_period("2022")

squares = st.sets(st.tuples(st.integers(-30, 10), st.integers(-5, 30)), max_size=120)


def covered(parts: list[Rectangle], stride: int) -> list[tuple[int, int]]:
    return [
        (row, col)
        for part in parts
        for row in range(part.rows.start // stride, part.rows.stop // stride)
        for col in range(part.cols.start // stride, part.cols.stop // stride)
    ]


@given(squares, st.sampled_from([(24, 0), (64, 32), (12, 9), (512, 0)]))
def test_rectangles_cover_the_squares_exactly_once(
    needed: set[tuple[int, int]], windows: tuple[int, int]
) -> None:
    tile, overlap = windows
    chosen = replace(ONE, tile=tile, overlap=overlap)
    parts = rectangles(needed, chosen)
    found = covered(parts, chosen.stride)
    assert sorted(found) == sorted(needed)
    for part in parts:
        assert max(part.rows.size, part.cols.size) <= max(MAX_RECTANGLE, chosen.stride)
        assert part.halo >= (overlap and tile - chosen.stride)


def test_a_block_of_squares_is_one_rectangle() -> None:
    needed = {(row, col) for row in range(-4, 0) for col in range(3, 8)}
    (part,) = rectangles(needed, ONE)
    assert (part.rows.start, part.rows.size, part.cols.start, part.cols.size) == (-96, 96, 72, 120)
    whole = {(row, col) for row in range(-40, 40) for col in range(40)}
    assert len(rectangles(whole, ONE)) <= 9 * 5  # of up to 10 × 10 windows


@given(squares)
def test_strips_hold_every_rectangle_once(needed: set[tuple[int, int]]) -> None:
    parts = rectangles(needed, ONE)
    found = strips(parts)
    assert sorted(n for strip in found for n in strip) == list(range(len(parts)))
    for strip in found:
        height = max(parts[n].shape[0] for n in strip)
        width = sum(parts[n].shape[1] for n in strip)
        assert len(strip) == 1 or height * width <= MAX_STRIP_PIXELS


@settings(max_examples=30, deadline=None)
@given(
    st.floats(-2_000, 2_000), st.floats(-3_000, 1_000), st.sampled_from([3.0, 90.0, 700.0]),
    st.sampled_from([(10, 24, 0), (40, 64, 32)]),
)  # fmt: skip
def test_a_polygon_needs_the_squares_that_it_covers(
    x: float, y: float, size: float, windows: tuple[int, int, int]
) -> None:
    patch_size, tile, overlap = windows
    chosen = replace(ONE, tile=tile, side=patch_size // 10, overlap=overlap)
    shape = shapely.Point(x, y).buffer(size)
    place = place_on_lattice(0, shape, chosen)
    side = chosen.stride * 10
    rows, cols = np.mgrid[-6_000 // side : 6_000 // side, -6_000 // side : 6_000 // side]
    boxes = shapely.box(cols * side, -rows * side, (cols + 1) * side, -(rows + 1) * side)
    share = shapely.area(shapely.intersection(shape, boxes)) / side**2
    want = set(zip(rows[share > 1e-9].tolist(), cols[share > 1e-9].tolist(), strict=True))
    assert (
        want
        <= set(place.squares)
        <= want | set(zip(rows[share > 0].tolist(), cols[share > 0].tolist(), strict=True))
    )


def groups_of(points: Any, crs: Any = "utm", when: Any = None) -> Any:
    series = gpd.GeoSeries(points, crs=4326)
    frame = gpd.GeoDataFrame(geometry=series)
    return group_places(frame, when or [PERIOD] * len(series), crs, ONE)


@pytest.mark.slow
def test_groups_are_zones_periods_and_squares() -> None:
    """The group of a place does not depend on other places."""
    rng = np.random.default_rng(0)
    points = [
        shapely.Point(x, y) for x, y in zip(rng.uniform(-20, 20, 12), rng.uniform(-50, 60, 12), strict=True)
    ]
    points += [shapely.Point(p.x + 1e-4, p.y) for p in points]
    when = [PERIOD, parse_period("2021"), None] * 14
    when = when[: len(points)]
    groups, refused = groups_of(points, when=when)
    assert not refused
    assert sorted(place.row for group in groups for place in group.places) == list(range(24))
    for group in groups:
        alone, _ = groups_of([points[p.row] for p in group.places], when=[when[p.row] for p in group.places])
        assert [(g.crs, g.period) for g in alone] == [(group.crs, group.period)]
        assert [replace(p, row=0) for p in alone[0].places] == [replace(p, row=0) for p in group.places]
    assert [str(g.crs) for g in groups] == sorted(str(g.crs) for g in groups)


def test_zones() -> None:
    """North and south, the antimeridian, and one CRS for all."""
    groups, refused = groups_of(
        [(shapely.Point(lon, lat)) for lon, lat in ((11, 46), (13, -46), (180, 0.5), (-180, 0.5))]
    )
    assert not refused
    assert [str(group.crs) for group in groups] == ["EPSG:32601", "EPSG:32632", "EPSG:32733"]
    groups, refused = groups_of([shapely.Point(11, 46), shapely.Point(13, 46)], crs=3035)
    assert [str(group.crs) for group in groups] == ["EPSG:3035"] * 2
    groups, refused = groups_of([shapely.Point(0, 89)], crs=3995)
    assert not refused
    assert len(groups) == 1


def test_a_group_has_a_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense groups are cut between windows, and lose no place."""
    rng = np.random.default_rng(0)
    points = [
        shapely.Point(x, y)
        for x, y in zip(*rng.uniform((11.45, 46.05), (11.5, 46.1), (70, 2)).T, strict=True)
    ]
    (whole,), _ = groups_of(points)
    monkeypatch.setattr(grouping, "MAX_PLACES", 20)
    parts, _ = groups_of(points)
    assert [len(part.places) for part in parts] == [20, 20, 20, 10]
    assert sorted((p for part in parts for p in part.places), key=lambda p: p.row) == list(whole.places)
    lasts = [max(p.squares for p in part.places) for part in parts]
    firsts = [min(p.squares for p in part.places) for part in parts]
    assert all(last <= first for last, first in zip(lasts[:-1], firsts[1:], strict=True))
    for part in parts:
        assert [p.row for p in part.places] == sorted(p.row for p in part.places)

"""Statistics, normalization, and what the values themselves give away."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cubes import placed, plain, unreadable

import xr_anysat
from xr_anysat import AnySatWarning, CubeError, OptionError, Statistics
from xr_anysat.cube.normalization import (
    PASTIS,
    TREESATAI,
    check_values,
    clip,
    lazy_moments,
    mean_and_std,
    merge_moments,
    moments,
    normalize,
    observed,
    parse_norm,
    tile_statistics,
)


def split_valid(values):
    """What a block does first: what was observed, and its clipped numbers."""
    valid = observed(values)
    return clip(values, valid), valid


QUICK = settings(max_examples=40, deadline=None, derandomize=True)
TINY = {"model": "tiny", "weights": "random"}

numbers = st.lists(st.floats(-1e308, 1e308), min_size=10, max_size=10)
positive = st.lists(st.floats(0, 1e308), min_size=10, max_size=10)


def some_frames(seed: int = 0, shape: tuple[int, ...] = (3, 10, 6, 7), gaps: float = 0.2) -> np.ndarray:
    """Frames (T, 10, y, x) float32 between -500 and 12 000, with gaps of one band and of all."""
    rng = np.random.default_rng(seed)
    values = rng.uniform(-500, 12_000, shape).astype("float32")
    values[rng.random(shape) < gaps / 10] = np.nan
    values[np.broadcast_to(rng.random((shape[0], 1, *shape[2:])) < gaps, shape)] = np.nan
    return values


def numpy_statistics(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Mean, standard deviation and count where all ten bands are there, float64."""
    clipped = np.clip(values.astype("float64"), 0, 10_000)
    whole = np.isfinite(values).all(axis=1)
    rows = np.moveaxis(clipped, 1, -1)[whole]  # (n, 10)
    return rows.mean(0), rows.std(0), len(rows)


# ---------------------------------------------------------------------- Statistics


@given(mean=numbers, std=positive, count=st.integers(0, 2**62))
@QUICK
def test_statistics_survive_json_to_the_last_digit(mean: list[float], std: list[float], count: int) -> None:
    stats = Statistics(mean, std, count)
    again = Statistics.from_json(stats.to_json())
    assert again == stats
    assert (again.mean, again.std, again.count) == (tuple(mean), tuple(std), count)
    assert hash(again) == hash(stats)
    np.testing.assert_array_equal(again.array(), np.array([mean, std]))


def test_statistics_take_any_sequence() -> None:
    want = Statistics(range(10), range(10, 20))
    assert Statistics(np.arange(10), np.arange(10, 20, dtype="float32")) == want
    assert all(type(v) is float for v in (*want.mean, *want.std))
    json.loads(want.to_json())


@pytest.mark.parametrize(
    ("mean", "std", "says"),
    [
        ([1] * 9, [1] * 10, "9 values of mean: expected one for each of B2, B3"),
        ([1] * 10, [1] * 11, "11 values of std"),
        ([1] * 10, [1] * 9 + [-1], "std=.*expected standard deviations of 0 or more"),
        ([1] * 9 + [np.nan], [1] * 10, "mean=.*expected finite"),
        ([1] * 10, [np.inf] * 10, "std=.*expected finite"),
        (["a"] * 10, [1] * 10, "mean=.*expected a number for each of B2"),
        (5, [1] * 10, "mean=5: expected a number for each of B2"),
        (None, [1] * 10, "mean=None"),
    ],
)
def test_impossible_statistics(mean: Any, std: Any, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        Statistics(mean, std)
    with pytest.raises(OptionError, match=says if mean is not None else "mean"):
        parse_norm({"mean": mean, "std": std})


@pytest.mark.parametrize(
    "text",
    ["", "garbage", "[]", "5", "null", "{}", '{"mean": [1]}', '{"mean": 1, "std": 2, "x": 3}', None, b"\xff"],
)
def test_statistics_from_garbage(text: Any) -> None:
    with pytest.raises(OptionError, match=r"contains no Statistics .*: expected what to_json\(\) returned"):
        Statistics.from_json(text)


# ---------------------------------------------------------------------- moments


def test_moments_are_numpys() -> None:
    values = some_frames()
    mean, std, count = numpy_statistics(values)
    got = moments(values)
    assert got.shape == (3, 10)
    assert (got[0] == count).all()
    np.testing.assert_allclose(got[1], mean, rtol=1e-12)
    np.testing.assert_allclose(got[2], std**2 * count, rtol=1e-12)
    np.testing.assert_allclose(mean_and_std(got[None]), [mean, std], rtol=1e-12)


@given(
    seed=st.integers(0, 999),
    cuts=st.sets(st.integers(1, 41), max_size=6),
    gaps=st.sampled_from([0, 0.2, 0.95]),
)
@QUICK
def test_moments_of_parts_are_those_of_the_whole(seed: int, cuts: set[int], gaps: float) -> None:
    values = some_frames(seed, (2, 10, 1, 42), gaps)
    parts = np.array([moments(p) for p in np.split(values, sorted(cuts), axis=3)])
    whole = moments(values)
    np.testing.assert_allclose(merge_moments(parts), whole, rtol=1e-9, atol=1e-6)
    nested = np.array([merge_moments(parts[:1]), merge_moments(parts[1:])])
    np.testing.assert_allclose(merge_moments(nested), whole, rtol=1e-9, atol=1e-6)


def test_moments_do_not_cancel() -> None:
    values = np.full((1, 10, 40, 40), 9_999, "float32")
    values[..., ::2] += 0.5
    mean, std = mean_and_std(moments(values)[None])
    np.testing.assert_allclose(mean, 9_999.25, rtol=1e-15)
    np.testing.assert_allclose(std, 0.25, rtol=1e-12)


def test_statistics_of_nothing_are_unknown() -> None:
    nothing = np.full((2, 10, 3, 3), np.nan, "float32")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (moments(nothing) == 0).all()
        assert np.isnan(mean_and_std(moments(nothing)[None])).all()
        assert np.isnan(tile_statistics(nothing)).all()


# ---------------------------------------------------------------------- clipping and normalization


def test_values_are_clipped_and_taken_whole_or_not_at_all() -> None:
    values = np.array([-5, 0, 5, 10_000, 10_001, 65_535], "float32")
    frames = np.broadcast_to(values, (1, 10, 1, 6)).copy()
    frames[0, 3, 0, 2] = np.nan
    clipped, valid = split_valid(frames)
    assert valid.tolist() == [[[True, True, False, True, True, True]]]
    assert (clipped[0, :, 0] == np.array([0, 0, 0, 10_000, 10_000, 10_000])).all()
    assert clipped.dtype == np.float32
    assert np.isnan(frames[0, 3, 0, 2])  # the caller's own are left alone


@pytest.mark.parametrize("gaps", [0.0, 0.3])
@pytest.mark.parametrize(
    "norm", ["raw", "unit_scale", "per_window_zscore", "per_tile_zscore", "pastis", "statistics"]
)
def test_normalization(norm: str, gaps: float) -> None:
    raw = some_frames(gaps=gaps)
    values, valid = split_valid(raw)
    mean, std, _ = numpy_statistics(raw)
    stats = {
        "per_tile_zscore": np.array([mean, std]),
        "pastis": PASTIS.array(),
        "statistics": np.array([np.arange(10) * 100.0, np.arange(1, 11) * 50.0]),
    }.get(norm)
    got = normalize(values, valid, norm, stats)
    assert got.dtype == np.float32
    clipped = np.clip(raw.astype("float64"), 0, 10_000)
    if norm == "raw":
        want = clipped
    elif norm == "unit_scale":
        want = clipped / 10_000
    else:
        m, s = (mean, std) if stats is None else stats
        want = (clipped - m[:, None, None]) / s[:, None, None]
    want = np.where(valid[:, None], want, 0)
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)
    assert (got[np.broadcast_to(~valid[:, None], got.shape)] == 0).all()


def test_a_constant_band_becomes_zero() -> None:
    values = np.full((2, 10, 3, 3), 1234, "float32")
    valid = np.ones((2, 3, 3), bool)
    assert (normalize(values, valid, "per_window_zscore", None) == 0).all()
    stats = np.array([[1234.0] * 10, [0.0] * 10])
    assert (normalize(values, valid, "per_tile_zscore", stats) == 0).all()
    stats[0] = 1233
    np.testing.assert_allclose(normalize(values, valid, "per_tile_zscore", stats), 1e6)  # by the floor, 1e-6


def test_a_window_of_nothing_stays_zero() -> None:
    values, valid = split_valid(np.full((2, 10, 3, 3), np.nan, "float32"))
    assert (normalize(values, valid, "per_window_zscore", None) == 0).all()


@pytest.mark.parametrize(
    ("norm", "name", "fixed"),
    [
        ("per_tile_zscore", "per_tile_zscore", None),
        ("per_window_zscore", "per_window_zscore", None),
        ("unit_scale", "unit_scale", None),
        ("reflectance", "unit_scale", None),
        ("raw", "raw", None),
        ("none", "raw", None),
        ("pastis", "pastis", PASTIS),
        ("treesatai", "treesatai", TREESATAI),
        (PASTIS, "statistics", PASTIS),
        (json.loads(PASTIS.to_json()), "statistics", PASTIS),
        ({"mean": np.array(PASTIS.mean), "std": PASTIS.std}, "statistics", PASTIS),
    ],
)
def test_norms(norm: Any, name: str, fixed: Statistics | None) -> None:
    assert parse_norm(norm) == (name, fixed)


@pytest.mark.parametrize("norm", ["zscore", "", None, 3, True, ["raw"], np.zeros(3), {"mean": [1] * 10}, {}])
def test_unknown_norms(norm: Any) -> None:
    says = "'mean' and 'std', ten numbers each" if isinstance(norm, dict) else "one of 'per_tile_zscore'"
    with pytest.raises(OptionError, match=f"norm=.*: expected {says}"):
        parse_norm(norm)


def test_the_constants_are_those_of_upstream() -> None:
    # of gastruc/AnySat's demo and of PASTIS, in the order of the bands
    assert (TREESATAI.mean[0], TREESATAI.mean[-1]) == (4304.3, 2320.0)
    assert (TREESATAI.std[0], TREESATAI.std[-1]) == (3538.0, 1549.3)
    assert (PASTIS.mean[0], PASTIS.mean[-1]) == (1165.94, 1639.37)
    assert (PASTIS.std[0], PASTIS.std[-1]) == (1942.62, 1299.28)


# ---------------------------------------------------------------------- what values give away


def ordinary(low: int = 1, high: int = 6000, dtype: str = "uint16", side: int = 33) -> xr.DataArray:
    """A cube of digital numbers, large enough for its darkest to mean something."""
    cube = plain(["2022-03-01", "2022-08-01"], height=side, width=side)
    values = np.random.default_rng(1).integers(low, high, cube.shape)
    return cube.copy(data=values.astype(dtype))


REFLECTANCE = (
    r"values up to 0\.\d+ look like reflectance: expected digital numbers.*\(cube \* 10000\)\.anysat\.embed"
)


def test_reflectance_is_refused() -> None:
    cube = ordinary(side=6) / 10_000
    with pytest.raises(CubeError, match=REFLECTANCE):
        xr_anysat.embed(cube, 2, **TINY)
    with pytest.raises(CubeError, match=REFLECTANCE):
        xr_anysat.statistics(cube, 2)


def test_bright_clouds_do_not_hide_reflectance() -> None:
    cube = ordinary(side=6) / 10_000
    cube[:, :, 0, 0] = 1.8
    with pytest.raises(CubeError, match=r"values up to 1\.8 look like reflectance"):
        xr_anysat.statistics(cube, None)


def test_lazy_reflectance_is_refused_when_it_is_computed() -> None:
    cube = (ordinary(side=6) / 10_000).chunk(x=3)
    emb = xr_anysat.embed(cube, 2, norm="pastis", **TINY)
    with pytest.raises(CubeError, match=REFLECTANCE):
        emb.compute(scheduler="synchronous")
    with pytest.raises(CubeError, match=REFLECTANCE):
        xr_anysat.statistics(cube, 2)


def test_the_remedy_for_reflectance_works() -> None:
    cube = ordinary(side=6).astype("float64")
    want = xr_anysat.embed(cube, 2, norm="pastis", **TINY)
    got = xr_anysat.embed((cube / 10_000) * 10_000, 2, norm="pastis", **TINY)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("high", [1, 2])
def test_dark_whole_numbers_are_no_reflectance(high: int) -> None:
    values = np.random.default_rng(0).integers(0, high + 1, (1, 10, 30, 30)).astype("float32")
    check_values(*split_valid(values))


def test_nothing_is_no_reflectance() -> None:
    check_values(*split_valid(np.zeros((1, 10, 3, 3), "float32")))
    check_values(*split_valid(np.full((1, 10, 3, 3), np.nan, "float32")))


def test_what_lies_under_gaps_gives_nothing_away() -> None:
    values = np.full((1, 10, 2, 2), 0.3, "float32")
    valid = np.zeros((1, 2, 2), bool)
    values[..., 1, 1], valid[..., 1, 1] = 3000, True
    check_values(values, valid)
    with pytest.raises(CubeError, match="look like reflectance"):
        check_values(values, ~valid)


OFFSET = (
    r"no digital number is below 1\d\d\d: the cube seems to contain the \+1000 offset.*Nothing was changed"
)


def test_the_offset_of_baseline_4_is_warned_of_and_left() -> None:
    cube = ordinary()
    shifted = cube + 1000
    with pytest.warns(AnySatWarning, match=OFFSET):
        got = xr_anysat.statistics(shifted, 2)
    want = xr_anysat.statistics(cube, 2)
    np.testing.assert_allclose(got.mean, np.array(want.mean) + 1000, rtol=1e-12)
    with pytest.warns(AnySatWarning, match=OFFSET):
        xr_anysat.embed(shifted, 2, norm="raw", patch_size=80, **TINY)
    values, valid = split_valid(shifted.values.astype("float32"))
    before = values.copy()
    with pytest.warns(AnySatWarning, match=OFFSET):
        check_values(values, valid)
    np.testing.assert_array_equal(values, before)


def test_the_remedy_for_the_offset_works() -> None:
    cube = ordinary(0, 6000)  # 0 is a digital number here
    shifted = (cube + 1000).assign_attrs(nodata=0)
    shifted[:, :, 0, 0] = 0
    mended = shifted.where(shifted != 0) - 1000
    got = xr_anysat.statistics(mended, 2, nodata=float("nan"))
    want = xr_anysat.statistics(cube.astype("float32").where(shifted != 0), 2)
    assert got == want
    assert got.count == 2 * (33 * 33 - 1)


SCALED = r"no value is above 255: the cube seems to hold percent or 8-bit numbers.*Nothing was changed"


@pytest.mark.parametrize("scale", [100, 255])
def test_values_scaled_to_percent_or_8_bits_cause_a_warning_and_stay(scale: int) -> None:
    cube = ordinary(0, 10_000).astype("float32") * np.float32(scale / 10_000)
    with pytest.warns(AnySatWarning, match=SCALED):
        got = xr_anysat.statistics(cube, 2)
    np.testing.assert_allclose(got.mean, scale / 2, rtol=0.1)
    values, valid = split_valid(cube.values)
    before = values.copy()
    with pytest.warns(AnySatWarning, match=SCALED):
        check_values(values, valid)
    np.testing.assert_array_equal(values, before)


def test_scale_is_not_checked_where_it_was_decided_or_values_are_few() -> None:
    values = np.random.default_rng(0).integers(0, 256, (1, 10, 40, 40)).astype("float32")
    check_values(*split_valid(values), offset_decided=True)
    check_values(*split_valid(values[..., :5, :5]))


@pytest.mark.parametrize(("low", "high"), [(1, 6000), (999, 6000), (1401, 9000)])
def test_ordinary_values_are_not_warned_of(low: int, high: int) -> None:
    cube = ordinary(low, high)
    cube[0, :, 0, 0] = low
    xr_anysat.statistics(cube, 2)


@pytest.mark.parametrize(
    ("marker", "dtype", "says"),
    [
        (65_535, "uint16", "values of 65535 count as observed.*nodata=65535"),
        (-9_999, "int16", "values of -9999 count as observed.*nodata=-9999"),
        (-32_768, "float32", "values of -32768 count as observed"),
    ],
)
def test_markers_that_nobody_declared_are_warned_of(marker: int, dtype: str, says: str) -> None:
    cube = ordinary(dtype=dtype)
    cube[0, :, 5:9] = marker
    with pytest.warns(AnySatWarning, match=says):
        xr_anysat.statistics(cube, None)
    stats = xr_anysat.statistics(cube, None, nodata=marker)
    assert stats.count == 33 * (2 * 33 - 4)


def test_unsigned_numbers_that_ran_below_zero_are_warned_of() -> None:
    cube = ordinary()
    with pytest.warns(
        AnySatWarning, match=r"values of 65\d\d\d count as observed.*wrapped below zero, cast to float"
    ):
        xr_anysat.embed(cube - np.uint16(1000), None, patch_size=80, norm="pastis", **TINY)


def test_few_values_say_nothing() -> None:
    xr_anysat.statistics(ordinary(1100, 6000, side=6), 2)


# ---------------------------------------------------------------------- statistics()


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("n", [2, None])
def test_statistics_are_numpys_of_what_is_there_jointly(lazy: bool, n: int | None) -> None:
    values = some_frames(5, (4, 10, 9, 8))
    dates = ["2022-01-10", "2022-02-10", "2022-09-10", "2022-10-10"]
    cube = plain(dates, height=9, width=8, dtype="float32").copy(data=values)
    made = xr_anysat.frames(cube, n, period="2022").values
    mean, std, count = numpy_statistics(made)
    got = xr_anysat.statistics(cube.chunk(time=1, y=4, x=3) if lazy else cube, n, period="2022")
    np.testing.assert_allclose(got.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(got.std, std, rtol=1e-12)
    assert got.count == count > 0


def test_statistics_do_not_depend_on_chunks() -> None:
    values = some_frames(6, (3, 10, 12, 11))
    cube = plain(height=12, width=11, dtype="float32").copy(data=values)
    want = xr_anysat.statistics(cube, None)
    for chunks in ({"x": 1}, {"y": 5, "x": 4}, {"band": 1, "time": 1}, {"time": 2, "y": 12}):
        got = xr_anysat.statistics(cube.chunk(chunks), None)
        np.testing.assert_allclose(got.array(), want.array(), rtol=1e-12)
        assert got.count == want.count


def test_statistics_of_a_cube_are_those_that_embed_takes() -> None:
    cube = placed()
    emb = xr_anysat.embed(cube, 2, **TINY)
    stats = xr_anysat.statistics(cube, 2)
    assert (tuple(emb.attrs["norm_mean"]), tuple(emb.attrs["norm_std"])) == (stats.mean, stats.std)
    again = xr_anysat.embed(cube, 2, norm=stats, **TINY)
    np.testing.assert_array_equal(again, emb)


@pytest.mark.parametrize(
    "derive",
    [
        lambda cube: cube,
        lambda cube: cube.to_dataset("band"),
        lambda cube: cube.isel(y=slice(1, None), x=slice(1, 4)),
        lambda cube: cube.isel(y=slice(None, None, -1), time=[2, 0, 1]),
        lambda cube: cube.chunk(time=2, x=3),
        lambda cube: cube.where(cube > 7),
        lambda cube: xr.concat(
            [cube, cube.assign_coords(time=cube["time"] + np.timedelta64(3, "D"))], "time"
        ),
    ],
    ids=["as it is", "Dataset", "crop", "flip", "rechunk", "mask", "concat"],
)
def test_a_large_cube_is_read_twice_and_gives_the_same(
    derive: Callable[[xr.DataArray], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cube = derive(placed().chunk(time=1, x=2))
    want = xr_anysat.embed(cube, 2, **TINY)
    monkeypatch.setattr("xr_anysat.embedding.options.MAX_SHARED_FRAME_BYTES", 0)
    got = xr_anysat.embed(cube, 2, **TINY)
    assert got.data.name == xr_anysat.embed(cube, 2, **TINY).data.name != want.data.name
    np.testing.assert_array_equal(got, want)


def test_statistics_of_nothing_are_refused() -> None:
    cube = plain()
    with pytest.raises(CubeError, match=r"nothing valid in this cube, so it has no statistics.*nodata="):
        xr_anysat.statistics(cube * 0, 2)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"frames": 0}, "frames=0"), ({"reduce": "max"}, "reduce='max'"), ({"period": "x"}, "period='x'")],
)
def test_statistics_refuse_what_frames_refuses(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        xr_anysat.statistics(unreadable(plain()), **options)


def test_lazy_moments_are_one_small_block_a_chunk() -> None:
    data = plain(height=10, width=9).astype("float32").chunk(time=1, y=4, x=5).data
    parts = lazy_moments(data)
    assert parts.shape == (3 * 2, 3, 10)
    assert parts.dtype == np.float64
    assert np.asarray(parts)[:, 0, 0].sum() == 3 * 10 * 9


@pytest.mark.parametrize("merged", [3, 64])
def test_no_task_merges_many_parts(merged: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the area: a task of a cluster names all that it needs."""
    monkeypatch.setattr("xr_anysat.cube.normalization.MAX_MERGED_PARTS", merged)
    data = plain(height=20, width=18).astype("float32").chunk(time=1, y=4, x=3).data
    lazy = tile_statistics(data)
    np.testing.assert_allclose(lazy.compute(), tile_statistics(data.compute()), rtol=1e-12)
    needs = lazy.dask.get_all_dependencies()
    assert max(map(len, needs.values())) == min(merged, 5 * 6)

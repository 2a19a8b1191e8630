"""Frames: bins and their days, composites against NumPy, the same for any chunks, and nothing computed early."""

from __future__ import annotations

import json
from datetime import date, datetime
from itertools import pairwise
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.cubes import BANDS, centred, no_compute, odc_stac, placed, plain, stackstac, unreadable, xee

import xr_anysat
from xr_anysat import CubeError, OptionError
from xr_anysat.cube import compositing
from xr_anysat.cube.compositing import CompositeOptions
from xr_anysat.cube.frames_record import FRAMES_ATTR
from xr_anysat.cube.periods import PERIOD_ATTR, PERIOD_TIMES_ATTR, parse_period, span_of
from xr_anysat.shared.graph import TASK_BYTES

QUICK = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


def days(*names: str) -> pd.DatetimeIndex:
    return pd.to_datetime(list(names))


def cube_of(values: Any, dates: Any, dtype: str = "float32") -> xr.DataArray:
    """A cube of one pixel whose bands all hold `values`, one a date."""
    data = np.broadcast_to(np.asarray(values, dtype)[:, None, None, None], (len(values), 10, 1, 1)).copy()
    return xr.DataArray(
        data,
        dims=("time", "band", "y", "x"),
        coords={"time": pd.to_datetime(list(dates)), "band": list(BANDS)},
    )


def record(made: xr.DataArray) -> dict[str, Any]:
    return json.loads(made.attrs[FRAMES_ATTR])


# ---------------------------------------------------------------------- bins and days


def daily(year: int, until: int | None = None) -> xr.DataArray:
    dates = pd.date_range(f"{year}-01-01", f"{until or year}-12-31")
    return plain(dates, height=1, width=1)


def test_the_days_of_2022_in_eight_frames() -> None:
    made = xr_anysat.frames(daily(2022), 8, period="2022")
    assert made["doy"].values.tolist() == [22, 68, 113, 159, 205, 250, 296, 342]
    bounds = [0, 45, 91, 136, 182, 228, 273, 319, 365]
    start = np.datetime64("2022-01-01")
    assert (made["bin_start"].values == start + np.array(bounds[:-1])).all()
    assert (made["bin_end"].values == start + np.array(bounds[1:])).all()
    assert (made["time"].values == start + made["doy"].values).all()
    assert made["n_obs"].values.tolist() == np.diff(bounds).tolist()
    assert xr_anysat.frames(daily(2022), 8, period="2022", doy_base=1)["doy"].values.tolist() == [
        23, 69, 114, 160, 206, 251, 297, 343,
    ]  # fmt: skip


def test_the_own_extent_is_the_default_period() -> None:
    made = xr_anysat.frames(daily(2022), 8)
    assert made["doy"].values.tolist() == [22, 68, 113, 159, 205, 250, 296, 342]
    assert record(made)["period"] == "2022-01-01/2023-01-01"
    cube = plain(["2022-03-01T23:59", "2022-03-02T00:01", "2022-03-06T12:00"])
    made = xr_anysat.frames(cube, 2)
    assert record(made)["period"] == "2022-03-01/2022-03-07"
    assert made["n_obs"].values.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("base", "last_of_leap_year", "last_of_other_year", "first"), [(0, 364, 364, 0), (1, 366, 365, 1)]
)
def test_days_of_leap_years(base: int, last_of_leap_year: int, last_of_other_year: int, first: int) -> None:
    dates = ["2023-12-31", "2024-01-01", "2024-02-29", "2024-12-30", "2024-12-31"]
    got = xr_anysat.frames(plain(dates), None, doy_base=base)["doy"].values.tolist()
    assert got == [last_of_other_year, first, 59 + base, 364 + base, last_of_leap_year]


@given(
    start=st.dates(date(2015, 6, 23), date(2030, 1, 1)),
    length=st.integers(1, 800),
    n=st.integers(1, 40),
    base=st.sampled_from([0, 1]),
)
@QUICK
def test_bins_cut_any_period(start: date, length: int, n: int, base: int) -> None:
    first = pd.Timestamp(start)
    end = first + pd.Timedelta(days=length)
    cube = plain(pd.date_range(first, periods=length), height=1, width=1)
    if n > length:
        with pytest.raises(OptionError, match=f"a period of {length} days .* cannot be cut into {n} frames"):
            xr_anysat.frames(cube, n, period=(first, end))
        return
    made = xr_anysat.frames(cube, n, period=(first, end), doy_base=base)
    starts, ends = made["bin_start"].to_index(), made["bin_end"].to_index()
    assert (starts[0], ends[-1]) == (first, end)
    assert (starts[1:] == ends[:-1]).all()
    lengths = (ends - starts).days
    assert lengths.max() - lengths.min() <= 1
    assert made["n_obs"].values.tolist() == lengths.tolist()
    assert (made["time"].to_index() == starts + pd.to_timedelta(lengths // 2, unit="D")).all()
    tm_yday = np.array([t.timetuple().tm_yday for t in made["time"].to_index()])
    want = tm_yday if base else np.minimum(tm_yday - 1, 364)
    assert made["doy"].values.tolist() == want.tolist()


@pytest.mark.parametrize(
    ("period", "start", "end"),
    [
        ("2022", "2022-01-01", "2023-01-01"),
        ("2022-06", "2022-06-01", "2022-07-01"),
        ("2022-02-28", "2022-02-28", "2022-03-01"),
        ("2022Q3", "2022-07-01", "2022-10-01"),
        ("2022-04-01/2022-10-01", "2022-04-01", "2022-10-01"),
        (("2022-04-01", "2022-10-01"), "2022-04-01", "2022-10-01"),
        (["2022-04", "2023"], "2022-04-01", "2023-01-01"),
        ((date(2022, 4, 1), date(2022, 10, 1)), "2022-04-01", "2022-10-01"),
        ((datetime(2022, 4, 1), pd.Timestamp("2022-10-01")), "2022-04-01", "2022-10-01"),
        (np.array(["2022-04-01", "2022-10-01"], "datetime64[D]"), "2022-04-01", "2022-10-01"),
    ],
)
def test_periods(period: Any, start: str, end: str) -> None:
    assert parse_period(period) == (pd.Timestamp(start), pd.Timestamp(end))
    made = xr_anysat.frames(daily(2022), 1, period=period)
    assert record(made)["period"] == f"{start}/{end}"
    inside = (days(end)[0] - days(start)[0]).days
    assert made["n_obs"].item() == inside
    assert (record(made)["acquisitions"], record(made)["outside_period"]) == (inside, 365 - inside)


@pytest.mark.parametrize(
    ("period", "says"),
    [
        ("2022-10-01/2022-04-01", "is empty: its end is exclusive"),
        (("2022-04-01", "2022-04-01"), "is empty: its end is exclusive"),
        ("whenever", r"period='whenever': expected '2022', '2022-06'"),
        ("", "period='': expected '2022'"),
        ("April", "expected '2022'"),
        ("01/02/2022", "expected '2022'"),
        (("01.02.2022", "01.03.2022"), "expected '2022'"),
        ("2022-13", "expected '2022'"),
        ("2022/", "expected '2022'"),
        ("2022-01-01/2022-06-01/2023-01-01", "expected '2022'"),
        (("2022-01-01",), "expected '2022'"),
        (("2022-01-01", None), "expected '2022'"),
        ((np.datetime64("NaT"), "2022-01-01"), "expected '2022'"),
        (2022, "expected '2022'"),
        ((2022, 2023), "whole days"),
        ("2022-06-15T10:00", "whole days"),
        (("2022-04-01T12:00", "2022-10-01"), "whole days without a time zone"),
        ((pd.Timestamp("2022-04-01", tz="UTC"), pd.Timestamp("2022-10-01", tz="UTC")), "time zone"),
    ],
)
def test_impossible_periods(period: Any, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        xr_anysat.frames(unreadable(plain()), 2, period=period)


def test_a_period_that_meets_no_acquisition() -> None:
    says = r"no acquisition between 2021-01-01 and 2022-01-01.*run from 2022-01-15 to 2022-07-04.*period="
    for n in (1, None):
        with pytest.raises(CubeError, match=says):
            xr_anysat.frames(unreadable(plain()), n, period="2021")


def test_the_period_that_a_cube_was_loaded_for() -> None:
    cube = plain().assign_attrs({PERIOD_ATTR: "2022-01-01/2023-01-01"})
    assert record(xr_anysat.frames(cube, 2))["period"] == "2022-01-01/2023-01-01"
    assert record(xr_anysat.frames(cube, 2, period="2022-03"))["period"] == "2022-03-01/2022-04-01"
    ds = odc_stac().assign_attrs({PERIOD_ATTR: "2022-01-01/2023-01-01"})
    assert record(xr_anysat.frames(ds, 2))["period"] == "2022-01-01/2023-01-01"


def test_the_end_of_a_period_is_exclusive() -> None:
    cube = cube_of(
        [1, 2, 3, 4],
        ["2022-03-31T23:59:59", "2022-04-01T00:00:00", "2022-09-30T23:59:59", "2022-10-01T00:00:00"],
    )
    made = xr_anysat.frames(cube, 1, period="2022-04-01/2022-10-01")
    assert made.values.ravel()[0] == 2.5
    assert (record(made)["acquisitions"], record(made)["outside_period"]) == (2, 2)


# ---------------------------------------------------------------------- composites


def numpy_composite(values: np.ndarray, reduce: str) -> np.ndarray:
    """One frame (band, y, x) of observations (n, band, y, x) float64 with NaN: the plainest way."""
    out = np.full(values.shape[1:], np.nan)
    for b, y, x in np.ndindex(values.shape[1:]):
        seen = values[:, b, y, x][~np.isnan(values[:, b, y, x])]
        if reduce == "clearest":
            whole = [v for v in values[:, :, y, x] if not np.isnan(v).any()]
            if whole:
                out[b, y, x] = min(whole, key=lambda v: v[0])[b]
        elif len(seen):
            out[b, y, x] = np.median(seen) if reduce == "median" else np.mean(seen)
    return out


@pytest.mark.parametrize("reduce", ["median", "mean", "clearest"])
@pytest.mark.parametrize(
    ("dtype", "nodata"), [("uint16", 0), ("int16", -9999), ("float32", np.nan), ("float64", 7)]
)
def test_composites_against_numpy(reduce: str, dtype: str, nodata: float) -> None:
    rng = np.random.default_rng(3)
    truth = rng.integers(10, 9000, (23, 10, 4, 3)).astype(float)
    truth[:, :, 1] = rng.integers(10, 13, (23, 10, 3))  # ties
    truth[rng.random(truth.shape) < 0.1] = np.nan  # a band alone
    truth[np.broadcast_to(rng.random((23, 1, 4, 3)) < 0.3, truth.shape)] = np.nan
    truth[:, :, 2, 2] = np.nan  # never observed
    dates = np.sort(rng.choice(365, 23, replace=False))
    cube = xr.DataArray(
        np.where(np.isnan(truth), nodata, truth).astype(dtype),
        dims=("time", "band", "y", "x"),
        coords={"time": pd.Timestamp("2022-01-01") + pd.to_timedelta(dates, unit="D"), "band": list(BANDS)},
    )
    made = xr_anysat.frames(cube, 5, period="2022", reduce=reduce, nodata=nodata)
    assert made.dtype == np.float32
    bounds = [0, 73, 146, 219, 292, 365]
    for frame, (a, b) in zip(made.values, pairwise(bounds), strict=True):
        want = numpy_composite(truth[(dates >= a) & (dates < b)], reduce)
        np.testing.assert_array_equal(frame, want.astype(np.float32))
    assert np.isnan(made.values[:, :, 2, 2]).all()


def test_the_clearest_is_an_observation_that_was_made() -> None:
    values = np.zeros((3, 10, 1, 1))
    values[:, 0, 0, 0] = [900, 200, 200]  # the first of two with the least blue
    values[:, 1:, 0, 0] = np.array([1, 2, 3])[:, None]
    cube = plain(["2022-01-01", "2022-01-02", "2022-01-03"], height=1, width=1).copy(data=values)
    got = xr_anysat.frames(cube, 1, reduce="clearest", nodata=-1).values.ravel()
    assert got.tolist() == [200] + [2] * 9


@pytest.mark.parametrize("dates", [1, 2])
def test_the_clearest_takes_an_observation_whole_or_not_at_all(dates: int) -> None:
    cube = plain(["2022-01-01", "2022-01-02"][:dates], height=1, width=1, dtype="float32")
    cube[:, 4] = np.nan
    assert np.isnan(xr_anysat.frames(cube, 1, reduce="clearest")).all()
    assert (xr_anysat.frames(cube, 1, reduce="clearest", fill_value=5) == 5).all()


def test_several_observations_a_day_and_the_same_moment() -> None:
    moment = "2022-05-01T10:00:00"
    cube = cube_of([1, 5, 6], [moment, moment, "2022-05-01T10:00:20"])
    made = xr_anysat.frames(cube, 1)
    assert (made.values.ravel()[0], made["n_obs"].item()) == (5, 3)
    apart = xr_anysat.frames(cube, None)
    assert apart.values[:, 0, 0, 0].tolist() == [1, 5, 6]
    assert apart["doy"].values.tolist() == [120, 120, 120]


def test_one_date_only() -> None:
    one = plain(["2022-05-01T10:30"])
    for n in (1, None):
        made = xr_anysat.frames(one, n)
        np.testing.assert_array_equal(made.values, one.values)
        assert (made["doy"].item(), made["n_obs"].item()) == (120, 1)
        assert made["bin_start"].values == np.datetime64("2022-05-01")
        assert made["bin_end"].values == np.datetime64("2022-05-02")
    with pytest.raises(OptionError, match=r"a period of 1 days .* cannot be cut into 8 frames.*frames=None"):
        xr_anysat.frames(one)
    made = xr_anysat.frames(one, 8, period="2022")
    assert (made.sizes["time"], made["doy"].item(), record(made)["empty_bins"]) == (1, 113, 7)


@pytest.mark.parametrize("n", [2, None])
def test_fill_value_stands_for_what_is_missing(n: int | None) -> None:
    cube = cube_of([np.nan, 3, 5], ["2022-01-01", "2022-01-02", "2022-01-03"])
    made = xr_anysat.frames(cube, n, fill_value=0)
    assert (made.values[0] == 0).all()
    assert np.isfinite(made.values).all()
    assert record(made)["fill_value"] == 0
    assert np.isnan(xr_anysat.frames(cube, n).values[0]).all()


def test_each_acquisition_by_itself() -> None:
    dates = ["2022-01-15T10:20:31", "2022-03-01T10:20:29", "2023-07-04T10:30:31"]
    cube = plain(dates)
    made = xr_anysat.frames(cube, None, period="2022")
    np.testing.assert_array_equal(made.values, cube.values[:2].astype("float32"))
    assert (made["time"].values == cube["time"].values[:2]).all()
    assert made["n_obs"].values.tolist() == [1, 1]
    assert made["doy"].values.tolist() == [14, 59]
    assert (record(made)["frames"], record(made)["outside_period"]) == (None, 1)


# ---------------------------------------------------------------------- empty bins


def with_holes() -> xr.DataArray:
    """Observations in the first, fourth and fifth of five bins of 73 days."""
    return cube_of([10, 30, 40, 50], ["2022-01-10", "2022-08-20", "2022-08-21", "2022-12-01"])


def test_empty_bins_are_dropped() -> None:
    made = xr_anysat.frames(with_holes(), 5, period="2022")
    assert made.values[:, 0, 0, 0].tolist() == [10, 35, 50]
    assert made["doy"].values.tolist() == [36, 255, 328]
    assert made["n_obs"].values.tolist() == [1, 2, 1]
    assert record(made)["empty_bins"] == 2


def test_empty_bins_may_borrow_from_the_nearest() -> None:
    made = xr_anysat.frames(with_holes(), 5, period="2022", empty="nearest")
    # bin 1 is next to 0, bin 2 is next to 3
    assert made.values[:, 0, 0, 0].tolist() == [10, 10, 35, 35, 50]
    assert made["doy"].values.tolist() == [36, 109, 182, 255, 328]
    assert made["n_obs"].values.tolist() == [1, 0, 0, 2, 1]
    assert record(made)["empty"] == "nearest"
    assert record(made)["empty_bins"] == 2


def test_of_two_bins_as_near_the_earlier_lends() -> None:
    cube = cube_of([1, 2], ["2022-01-05", "2022-01-25"])
    made = xr_anysat.frames(cube, 3, period="2022-01-01/2022-01-31", empty="nearest")
    assert made["doy"].values.tolist() == [5, 15, 25]
    assert made.values[:, 0, 0, 0].tolist() == [1, 1, 2]
    assert made["n_obs"].values.tolist() == [1, 0, 1]


def test_days_may_be_those_observed() -> None:
    cube = cube_of(
        [1, 2, 3, 4, 5],
        ["2022-01-03T10:00", "2022-01-04T10:00", "2022-01-09T10:00", "2022-08-01T22:00", "2022-08-04T23:00"],
    )
    made = xr_anysat.frames(cube, 2, period="2022", doy="observed")
    assert made["doy"].values.tolist() == [3, 214]  # the middle of three; between two, rounded down
    assert (made["time"].values == days("2022-01-04", "2022-08-03").values).all()
    assert made["bin_start"].values[1] == np.datetime64("2022-07-02")
    borrowed = xr_anysat.frames(cube, 4, period="2022", doy="observed", empty="nearest")
    assert borrowed["n_obs"].values.tolist() == [3, 0, 2, 0]
    assert borrowed["doy"].values.tolist() == [3, 136, 214, 319]  # holes have their bin's middle


# ---------------------------------------------------------------------- what comes out


def test_frames_are_a_cube_with_its_place_and_record() -> None:
    cube = placed().assign_coords(platform="sentinel-2a", id=("time", list("abc")))
    cube.attrs["nodata"] = 0
    made = xr_anysat.frames(cube, 2, period="2022")
    assert made.dims == ("time", "band", "y", "x")
    assert list(made["band"].values) == list(BANDS)
    assert made.odc.geobox == cube.odc.geobox
    assert made.encoding["grid_mapping"] == "spatial_ref"
    assert made["platform"].item() == "sentinel-2a"
    assert "id" not in made.coords
    assert np.isnan(made.attrs["nodata"])
    assert made.attrs["units"] == "DN"
    assert record(made) == {
        "frames": 2, "period": "2022-01-01/2023-01-01", "reduce": "median", "empty": "drop",
        "doy": "midpoint", "doy_base": 0, "fill_value": None, "acquisitions": 3, "outside_period": 0,
        "empty_bins": 0, "dates": [str(d)[:10] for d in cube["time"].values], "dates_outside": [],
    }  # fmt: skip


def test_options_of_numpy_and_of_the_record() -> None:
    made = xr_anysat.frames(
        plain(), np.int64(2), period="2022", doy_base=np.int64(1), fill_value=np.float32(3)
    )
    assert (record(made)["frames"], record(made)["doy_base"], record(made)["fill_value"]) == (2, 1, 3.0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n": 0}, r"frames=0: expected a positive whole number, up to 10000, or None"),
        ({"n": -3}, "frames=-3"),
        ({"n": 2.5}, "frames=2.5"),
        ({"n": True}, "frames=True"),
        ({"n": "8"}, "frames='8'"),
        ({"reduce": "max"}, "reduce='max': expected one of 'median', 'mean', 'clearest'"),
        ({"empty": "fill"}, "empty='fill': expected one of 'drop', 'nearest'"),
        ({"doy": "start"}, "doy='start': expected one of 'midpoint', 'observed'"),
        ({"doy_base": 2}, "doy_base=2: expected 0 .* or 1"),
        ({"doy_base": True}, "doy_base=True"),
        ({"fill_value": np.nan}, "fill_value=nan: expected a finite digital number"),
        ({"fill_value": "0"}, "fill_value='0'"),
        ({"fill_value": True}, "fill_value=True"),
        ({"n": None, "reduce": "mean"}, "reduce='mean' has no meaning with frames=None"),
        ({"n": None, "empty": "nearest"}, "empty='nearest' has no meaning with frames=None"),
        ({"n": None, "doy": "observed"}, "doy='observed' has no meaning with frames=None"),
        ({"n": 400, "period": "2022"}, "a period of 365 days .* cannot be cut into 400 frames"),
    ],
)
def test_impossible_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        xr_anysat.frames(unreadable(plain()), **options)


# ---------------------------------------------------------------------- frames of frames


def test_composed_frames_are_taken_as_they_are() -> None:
    made = xr_anysat.frames(plain(), 2, period="2022")
    assert xr_anysat.frames(made, None) is made
    assert xr_anysat.frames(made, 2) is made
    part = made.isel(time=[1])
    assert xr_anysat.frames(part, 2) is part
    based = xr_anysat.frames(plain(), 2, period="2022", doy_base=1)
    assert xr_anysat.frames(based, None) is based
    assert xr_anysat.frames(based, None, doy_base=1) is based


@pytest.mark.parametrize(
    "options",
    [
        {"n": 3}, {}, {"n": None, "period": "2022"}, {"n": 2, "reduce": "mean"}, {"n": 2, "empty": "nearest"},
        {"n": 2, "doy": "observed"}, {"n": 2, "fill_value": 0}, {"n": None, "nodata": 0},
        {"n": None, "bands": BANDS},
    ],
)  # fmt: skip
def test_composed_frames_are_not_composed_again(options: dict[str, Any]) -> None:
    made = xr_anysat.frames(unreadable(plain()), 2, period="2022")
    with pytest.raises(OptionError, match=r"already composed \(frames=2, 2 of them observed\).*frames=None"):
        xr_anysat.frames(made, **options)


def test_composed_frames_keep_their_base_and_their_parts() -> None:
    made = xr_anysat.frames(plain(), 2, period="2022")
    with pytest.raises(OptionError, match="composed with doy_base=0, not 1"):
        xr_anysat.frames(made, None, doy_base=1)
    with pytest.raises(
        CubeError, match=r"composed frames as a DataArray with dims .*frames\(\) returned them"
    ):
        xr_anysat.frames(made.transpose("y", "x", "time", "band"), None)
    with pytest.raises(CubeError, match=r"composed frames as .* or with other bands than B2"):
        xr_anysat.frames(made.isel(band=slice(None, None, -1)), None)
    with pytest.raises(CubeError, match=r"composed frames without their 'doy'.*assign_coords\(doy="):
        xr_anysat.frames(made.drop_vars("doy"), None)


def test_composed_frames_as_a_dataset_or_joined_are_not_theirs_any_more() -> None:
    made = xr_anysat.frames(plain(), 2, period="2022", doy_base=1)
    with pytest.raises(CubeError, match="composed frames as a Dataset with dims"):
        xr_anysat.frames(made.to_dataset("band"), None)
    later = made.assign_coords(time=made["time"] + np.timedelta64(365, "D"))
    joined = xr.concat([made, later], "time")
    with pytest.raises(
        CubeError, match=r"4 composed frames, but a record of 2: .*Drop attrs\['anysat_frames'\]"
    ):
        xr_anysat.frames(joined, None)
    joined.attrs = {}
    got = xr_anysat.frames(joined, None)
    assert got["doy"].values.tolist() == [91, 273, 91, 273]


def test_frames_survive_a_file(tmp_path: Any) -> None:
    made = xr_anysat.frames(placed(), 2, period="2022").rename("s2")
    made.to_netcdf(tmp_path / "frames.nc")
    with xr.open_dataarray(tmp_path / "frames.nc", decode_coords="all") as again:
        back = xr_anysat.frames(again, None)
        np.testing.assert_array_equal(back.values, made.values)
        assert back["doy"].values.tolist() == made["doy"].values.tolist()
        assert back.odc.geobox == made.odc.geobox


# ---------------------------------------------------------------------- dask


@st.composite
def chunked(draw: st.DrawFn) -> tuple[xr.DataArray, xr.DataArray]:
    """A cube with gaps, and the same in random chunks."""
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    shape = (draw(st.integers(1, 14)), 10, draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    values = rng.integers(0, 4, shape) * 1000
    cube = xr.DataArray(
        values.astype(draw(st.sampled_from(["uint16", "float32"]))),
        dims=("time", "band", "y", "x"),
        coords={
            "time": pd.Timestamp("2022-01-01") + pd.to_timedelta(rng.integers(0, 365, shape[0]), unit="D"),
            "band": list(BANDS),
        },
    )

    def cut(n: int) -> tuple[int, ...]:
        edges = sorted(draw(st.sets(st.integers(1, n - 1), max_size=3)) if n > 1 else ())
        return tuple(b - a for a, b in pairwise([0, *edges, n]))

    return cube, cube.chunk({d: cut(n) for d, n in cube.sizes.items()})


@given(
    cubes=chunked(),
    n=st.one_of(st.none(), st.integers(1, 9)),
    reduce=st.sampled_from(["median", "mean", "clearest"]),
    empty=st.sampled_from(["drop", "nearest"]),
    task_bytes=st.sampled_from([64, 1000, TASK_BYTES]),
)
@QUICK
def test_dask_is_numpy_in_any_chunks(
    cubes: tuple[xr.DataArray, xr.DataArray], n: int | None, reduce: str, empty: str, task_bytes: int
) -> None:
    eager, lazy = cubes
    options = {} if n is None else {"reduce": reduce, "empty": empty}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compositing, "TASK_BYTES", task_bytes)
        want = xr_anysat.frames(eager, n, period="2022", nodata=0, **options)
        with no_compute():
            made = xr_anysat.frames(lazy, n, period="2022", nodata=0, **options)
    assert made.chunks is not None
    assert made.data.chunks[0] == (1,) * made.sizes["time"]
    got = made.data.compute(scheduler="synchronous")
    assert (got.dtype, got.shape) == (made.dtype, made.shape)
    assert made.data._meta.dtype == np.float32
    np.testing.assert_array_equal(got, want.values)
    xr.testing.assert_identical(made.coords.to_dataset(), want.coords.to_dataset())
    assert record(made) == record(want)


@pytest.mark.parametrize("reduce", ["median", "mean", "clearest"])
@pytest.mark.parametrize("chunks", [(5, 4, 3), (1,) * 12, (12,), (2, 7, 3), (11, 1)])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 12])
def test_chunks_of_time_that_straddle_bins(chunks: tuple[int, ...], n: int, reduce: str) -> None:
    rng = np.random.default_rng(0)
    cube = plain(pd.date_range("2022-01-03", periods=12, freq="30D"), height=3, width=2)
    cube = cube.copy(data=rng.permuted(cube.values, axis=0))
    made = xr_anysat.frames(cube.chunk(time=chunks, y=2), n, period="2022", reduce=reduce)
    np.testing.assert_array_equal(made, xr_anysat.frames(cube, n, period="2022", reduce=reduce))


def test_frames_of_datasets_are_those_of_arrays() -> None:
    want = xr_anysat.frames(placed(), 2, period="2022")
    for make in (odc_stac, stackstac, xee):
        made = xr_anysat.frames(make().chunk(), 2, period="2022")
        np.testing.assert_array_equal(made.values, want.values)
        assert made.odc.geobox == want.odc.geobox


@pytest.mark.parametrize("n", [1, 2, None])
@pytest.mark.parametrize("reduce", ["median", "mean", "clearest"])
def test_nothing_is_computed_before_it_is_asked_for(n: int | None, reduce: str) -> None:
    with no_compute():
        made = xr_anysat.frames(unreadable(centred()), n, reduce=reduce if n else "median", fill_value=3)
        assert made.dtype == np.float32
    with pytest.raises(AssertionError, match="pixels were read"):
        made.compute()


def test_names_of_graphs_follow_what_is_in_them() -> None:
    cube = plain().chunk(time=2)
    base = xr_anysat.frames(cube, 2).data.name
    assert xr_anysat.frames(cube, 2).data.name == base
    others = [{"period": "2022-01"}, {"reduce": "mean"}, {"fill_value": 1.0}, {"nodata": 3}, {"n": None}]
    names = [xr_anysat.frames(cube, **{"n": 2, **o}).data.name for o in others]
    assert len({base, *names}) == 1 + len(names)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chunks", "size"),
    [
        ((60, 1, 10980, 10980), (10980, 10980)),
        ((1, 10, 10980, 10980), (10980, 10980)),
        ((5, 10, 2048, 2048), (10980, 10980)),
        ((7, 3, 4000, 500), (10980, 10980)),
        ((60, 10, 10980, 1), (10980, 9)),
        ((60, 10, 100, 100), (1000, 1000)),
    ],
)
@pytest.mark.parametrize("n", [1, 8, None])
@pytest.mark.parametrize("reduce", ["median", "clearest"])
def test_what_a_composing_task_reads_is_bounded(
    chunks: tuple[int, ...], size: tuple[int, int], n: int | None, reduce: str
) -> None:
    cube = xr.DataArray(
        da.zeros((60, 10, *size), chunks=chunks, dtype="uint16"),
        dims=("time", "band", "y", "x"),
        coords={"time": pd.date_range("2022-01-03", periods=60, freq="6D"), "band": list(BANDS)},
    )
    with no_compute():
        made = xr_anysat.frames(cube, n, period="2022", reduce=reduce if n else "median")
    dates, (bands, height, width) = cube.chunks[0], (max(c) for c in made.data.chunks[1:])
    met = {
        place[1]: sum(dates[key[1]] for key in task[1])
        for place, task in made.data.dask.layers[made.data.name].items()
    }
    assert sorted(met) == list(range(made.sizes["time"]))
    assert max(met.values()) * bands * height * width * 2 <= TASK_BYTES
    assert bands * height * width * 4 <= TASK_BYTES


def test_recipes_compare_by_what_they_ask_for() -> None:
    assert CompositeOptions(8) == CompositeOptions(np.int64(8))
    assert CompositeOptions(8) != CompositeOptions(8, reduce="mean")


def test_a_cube_cut_in_time_is_loaded_for_its_period_no_more() -> None:
    """``open_s2`` records the period it loaded; bins of a part of the cube are those of the part."""
    cube = plain()
    cube.attrs = {PERIOD_ATTR: "2022-01-01/2023-01-01", PERIOD_TIMES_ATTR: span_of(cube["time"].values)}
    assert cube.anysat.frames(2)["bin_end"].values[-1] == np.datetime64("2023-01-01")
    part = cube.isel(time=slice(0, -1))
    last = part["time"].values[-1].astype("datetime64[D]") + 1
    assert part.anysat.frames(2)["bin_end"].values[-1] == last

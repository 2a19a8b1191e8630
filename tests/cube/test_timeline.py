"""What became of each acquisition, read off the record of composed frames."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import xarray as xr
from support.cubes import no_compute, placed, unreadable

import xr_anysat
from xr_anysat.cube.timeline import OUTSIDE, USED, describe, has_timeline, timeline

DATES = ("2021-11-05", "2022-01-10", "2022-01-20", "2022-05-01", "2022-12-31", "2023-01-01", "2023-06-01")


def days(dates: list[pd.Timestamp]) -> list[str]:
    return [str(d.date()) for d in dates]


def test_every_acquisition_is_somewhere() -> None:
    made = placed(DATES).anysat.frames(4, period="2022")
    calendar = timeline(made)
    assert (str(calendar.start.date()), str(calendar.end.date())) == ("2022-01-01", "2023-01-01")
    assert days(calendar.lanes[USED]) == list(DATES[1:5])
    assert days(calendar.lanes[OUTSIDE]) == [DATES[0], *DATES[5:]]
    assert [slot.fate for slot in calendar.slots] == ["", "", "empty, left out", ""]
    assert [str(slot.start.date()) for slot in calendar.slots] == [
        "2022-01-01", "2022-04-02", "2022-07-02", "2022-10-01",
    ]  # fmt: skip
    assert calendar.slots[-1].end == calendar.end
    seen = [slot.date for slot in calendar.slots if slot.date is not None]
    assert seen == list(pd.DatetimeIndex(made["time"].values))
    assert describe(calendar) == "2022-01-01 to 2022-12-31 in 4 bins; 1 empty, left out"


def test_an_empty_bin_with_a_copy_and_frames_that_were_selected_away() -> None:
    made = placed(DATES).anysat.frames(4, period="2022", empty="nearest").isel(time=[0, 2])
    assert [slot.fate for slot in timeline(made).slots] == [
        "", "not in this cube", "empty, the nearest repeated", "not in this cube",
    ]  # fmt: skip
    assert describe(timeline(made)).endswith("in 4 bins; 2 not in this cube; 1 empty, the nearest repeated")


def test_every_acquisition_a_frame_has_no_bins() -> None:
    calendar = timeline(placed(DATES).anysat.frames(None, period="2022"))
    assert calendar.slots == []
    assert list(calendar.lanes) == [USED, OUTSIDE]
    assert describe(calendar) == "2022-01-01 to 2022-12-31, every acquisition a frame"


def test_items_that_were_left_out_by_reason() -> None:
    def item(day: str, used: bool | str) -> dict[str, object]:
        return {"id": day, "datetime": f"{day}T10:20:31Z", "used": used}

    cube = placed(DATES)
    cube.attrs["items"] = json.dumps([
        item("2022-01-10", True), item("2022-02-01", "clouds: 80.0 % > 30 %"),
        item("2022-03-01", "older processing: of X"), item("2022-02-11", "clouds: 31.0 % > 30 %"),
    ])  # fmt: skip
    lanes = timeline(cube.anysat.frames(4, period="2022")).lanes
    assert list(lanes) == [USED, OUTSIDE, "left out: clouds", "left out: older processing"]
    assert days(lanes["left out: clouds"]) == ["2022-02-01", "2022-02-11"]


def test_no_pixel_is_looked_at() -> None:
    with no_compute():
        made = unreadable(placed(DATES)).anysat.frames(4, period="2022")
        assert len(timeline(made).lanes[USED]) == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f.mean("time", keep_attrs=True),
        lambda f: f.isel(time=0),
        lambda f: f.drop_vars("n_obs"),
        lambda f: f.drop_attrs(),
    ],
)
def test_what_is_no_longer_composed_frames_has_none(change) -> None:  # type: ignore[no-untyped-def]
    made: xr.DataArray = xr_anysat.frames(placed(DATES), 4, period="2022")
    assert has_timeline(made)
    assert has_timeline(made.sel(band=["B4"]))
    assert not has_timeline(change(made))

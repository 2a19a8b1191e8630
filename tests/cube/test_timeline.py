"""The outcome of each acquisition, as the record of composed frames has it."""

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


def test_every_acquisition_is_in_a_group() -> None:
    composed = placed(DATES).anysat.frames(4, period="2022")
    calendar = timeline(composed)
    assert (str(calendar.start.date()), str(calendar.end.date())) == ("2022-01-01", "2023-01-01")
    assert days(calendar.groups[USED]) == list(DATES[1:5])
    assert days(calendar.groups[OUTSIDE]) == [DATES[0], *DATES[5:]]
    assert [slot.outcome for slot in calendar.slots] == ["", "", "empty, left out", ""]
    assert [str(slot.start.date()) for slot in calendar.slots] == [
        "2022-01-01", "2022-04-02", "2022-07-02", "2022-10-01",
    ]  # fmt: skip
    assert calendar.slots[-1].end == calendar.end
    seen = [slot.date for slot in calendar.slots if slot.date is not None]
    assert seen == list(pd.DatetimeIndex(composed["time"].values))
    assert describe(calendar) == "2022-01-01 to 2022-12-31 in 4 bins; 1 empty, left out"


def test_an_empty_bin_with_a_copy_and_frames_that_are_not_selected() -> None:
    composed = placed(DATES).anysat.frames(4, period="2022", empty="nearest").isel(time=[0, 2])
    assert [slot.outcome for slot in timeline(composed).slots] == [
        "", "not in this cube", "empty, the nearest repeated", "not in this cube",
    ]  # fmt: skip
    assert describe(timeline(composed)).endswith(
        "in 4 bins; 2 not in this cube; 1 empty, the nearest repeated"
    )


def test_one_frame_per_acquisition_has_no_bins() -> None:
    calendar = timeline(placed(DATES).anysat.frames(None, period="2022"))
    assert calendar.slots == []
    assert list(calendar.groups) == [USED, OUTSIDE]
    assert describe(calendar) == "2022-01-01 to 2022-12-31, one frame per acquisition"


def test_items_that_were_left_out_are_grouped_by_reason() -> None:
    def item(day: str, used: bool | str) -> dict[str, object]:
        return {"id": day, "datetime": f"{day}T10:20:31Z", "used": used}

    cube = placed(DATES)
    cube.attrs["items"] = json.dumps([
        item("2022-01-10", True), item("2022-02-01", "clouds: 80.0 % > 30 %"),
        item("2022-03-01", "older processing: of X"), item("2022-02-11", "clouds: 31.0 % > 30 %"),
    ])  # fmt: skip
    groups = timeline(cube.anysat.frames(4, period="2022")).groups
    assert list(groups) == [USED, OUTSIDE, "left out: clouds", "left out: older processing"]
    assert days(groups["left out: clouds"]) == ["2022-02-01", "2022-02-11"]


def test_no_pixel_is_read() -> None:
    with no_compute():
        composed = unreadable(placed(DATES)).anysat.frames(4, period="2022")
        assert len(timeline(composed).groups[USED]) == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f.mean("time", keep_attrs=True),
        lambda f: f.isel(time=0),
        lambda f: f.drop_vars("n_obs"),
        lambda f: f.drop_attrs(),
    ],
)
def test_an_array_without_the_record_or_its_coords_has_no_timeline(change) -> None:  # type: ignore[no-untyped-def]
    composed: xr.DataArray = xr_anysat.frames(placed(DATES), 4, period="2022")
    assert has_timeline(composed)
    assert has_timeline(composed.sel(band=["B4"]))
    assert not has_timeline(change(composed))

"""The outcome of each acquisition: the bin it is in, or why it was not used.

Everything comes from the record that :func:`xr_anysat.frames` writes; no pixel is read.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import pandas as pd
import xarray as xr

from xr_anysat.cube.frames_record import (
    FRAMES_ATTR,
    ITEMS_ATTR,
    check_frame_times,
    frames_record,
    items_record,
)
from xr_anysat.cube.periods import bin_bounds, parse_period

ALONG_TIME = ("time", "doy", "n_obs", "bin_start", "bin_end")
"""Coords that composed frames have along time."""

USED = "in a frame"

OUTSIDE = "outside the period"


@dataclass(frozen=True)
class Slot:
    """A bin of the period.

    Attributes
    ----------
    start, end : Timestamp
        Its days, the end exclusive.
    date : Timestamp or None
        Date of its frame; None if the cube has no frame of it.
    outcome : str
        What happened to it, if it was empty or its frame is not in the cube; else "".
    """

    start: pd.Timestamp
    end: pd.Timestamp
    date: pd.Timestamp | None
    outcome: str


@dataclass(frozen=True)
class Timeline:
    """The calendar of composed frames.

    Attributes
    ----------
    start, end : Timestamp
        The period, the end exclusive.
    slots : list of Slot
        Its bins; empty if every acquisition is a frame.
    groups : dict of str to list of Timestamp
        Acquisitions by outcome, the used ones first. Those left out when the cube was opened are
        counted by item, the others by date.
    """

    start: pd.Timestamp
    end: pd.Timestamp
    slots: list[Slot]
    groups: dict[str, list[pd.Timestamp]]


def has_timeline(array: xr.DataArray) -> bool:
    """Return whether an array has the record of composed frames and the coords that belong to it."""
    along = all(n in array.coords and array[n].dims == ("time",) for n in ALONG_TIME)
    return FRAMES_ATTR in array.attrs and along


def timeline(frames: xr.DataArray) -> Timeline:
    """Read the calendar of composed frames.

    Parameters
    ----------
    frames : DataArray, (time, ...)
        The result of :func:`xr_anysat.frames`, or a selection of it.

    Returns
    -------
    Timeline

    Raises
    ------
    CubeError
        If the record or the times are damaged.

    Examples
    --------
    >>> import numpy as np, pandas as pd, xarray as xr
    >>> import xr_anysat
    >>> days = pd.to_datetime(["2021-12-31", "2022-01-15", "2022-02-20", "2022-11-05"])
    >>> cube = xr.DataArray(
    ...     np.full((4, 10, 2, 2), 1000, "uint16"), dims=("time", "band", "y", "x"),
    ...     coords={"time": days, "band": list(xr_anysat.BANDS)},
    ... )
    >>> calendar = timeline(cube.anysat.frames(3, period="2022"))
    >>> [slot.outcome for slot in calendar.slots]
    ['', 'empty, left out', '']
    >>> {label: len(dates) for label, dates in calendar.groups.items()}
    {'in a frame': 3, 'outside the period': 1}
    """
    record = frames_record(frames)
    check_frame_times(frames)
    span = parse_period(record["period"])
    assert span is not None  # the record has the period that was used
    groups = {USED: [pd.Timestamp(d) for d in record["dates"]]}
    if record["dates_outside"]:
        groups[OUTSIDE] = [pd.Timestamp(d) for d in record["dates_outside"]]
    for item in items_record(frames.attrs.get(ITEMS_ATTR, "[]")):
        if item["used"] is not True:
            label = f"left out: {item['used'].split(':')[0]}"
            groups.setdefault(label, []).append(pd.Timestamp(item["datetime"]).tz_localize(None))
    return Timeline(*span, _slots(frames, record["frames"], span, groups[USED]), groups)


def _slots(
    frames: xr.DataArray, n: int | None, span: tuple[pd.Timestamp, pd.Timestamp], used: list[pd.Timestamp]
) -> list[Slot]:
    if n is None:
        return []
    bounds = bin_bounds(*span, n)
    place = {pd.Timestamp(start): i for i, start in enumerate(frames["bin_start"].values)}
    slots, dates = [], sorted(used)
    for start, end in pairwise(bounds):
        at = place.get(start)
        observed = bisect_left(dates, start) < bisect_left(dates, end)
        if at is None:
            outcome = "not in this cube" if observed else "empty, left out"
        else:
            outcome = "" if observed else "empty, the nearest repeated"
        slots.append(
            Slot(start, end, None if at is None else pd.Timestamp(frames["time"].values[at]), outcome)
        )
    return slots


def describe(calendar: Timeline) -> str:
    """Describe the period, its bins, and the outcome of bins without a frame of their own."""
    period = f"{calendar.start:%Y-%m-%d} to {calendar.end - pd.Timedelta(days=1):%Y-%m-%d}"
    if not calendar.slots:
        return f"{period}, one frame per acquisition"
    outcomes = Counter(slot.outcome for slot in calendar.slots if slot.outcome)
    bins = f"{len(calendar.slots)} bin{'s' if len(calendar.slots) > 1 else ''}"
    return f"{period} in {bins}" + "".join(f"; {n} {outcome}" for outcome, n in outcomes.items())

"""What became of each acquisition: which bin it fell into, or why it takes no part.

Read off the record that :func:`xr_anysat.frames` writes; no pixel is looked at.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import pandas as pd
import xarray as xr

from xr_anysat.cube.compositing import FRAMES_ATTR, bin_bounds, parse_period

ALONG_TIME = ("time", "doy", "n_obs", "bin_start", "bin_end")
"""Coords that composed frames have along time."""

LABELLED = 26
"""Bins that have the days of their frames written into them, at most: more have no room."""

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
        That of its frame; None if it has none in the cube.
    fate : str
        What became of it, if it was empty or its frame is not in the cube; else "".
    """

    start: pd.Timestamp
    end: pd.Timestamp
    date: pd.Timestamp | None
    fate: str


@dataclass(frozen=True)
class Timeline:
    """The calendar of composed frames.

    Attributes
    ----------
    start, end : Timestamp
        The period, the end exclusive.
    slots : list of Slot
        Its bins; none where every acquisition is a frame.
    lanes : dict of str to list of Timestamp
        Acquisitions by what became of them, the used ones first. What was left out when the cube was
        opened counts by item, the rest by date.
    """

    start: pd.Timestamp
    end: pd.Timestamp
    slots: list[Slot]
    lanes: dict[str, list[pd.Timestamp]]


def has_timeline(array: xr.DataArray) -> bool:
    """Whether an array has the record of composed frames, and the coords that go with it."""
    along = all(n in array.coords and array[n].dims == ("time",) for n in ALONG_TIME)
    return FRAMES_ATTR in array.attrs and along


def timeline(frames: xr.DataArray) -> Timeline:
    """Read the calendar of composed frames.

    Parameters
    ----------
    frames : DataArray, (time, ...)
        What :func:`xr_anysat.frames` made, or some of it.

    Returns
    -------
    Timeline

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
    >>> [slot.fate for slot in calendar.slots]
    ['', 'empty, left out', '']
    >>> {label: len(dates) for label, dates in calendar.lanes.items()}
    {'in a frame': 3, 'outside the period': 1}
    """
    record = json.loads(frames.attrs[FRAMES_ATTR])
    span = parse_period(record["period"])
    assert span is not None  # it was effective
    lanes = {USED: [pd.Timestamp(d) for d in record["dates"]]}
    if record["dates_outside"]:
        lanes[OUTSIDE] = [pd.Timestamp(d) for d in record["dates_outside"]]
    for item in json.loads(frames.attrs.get("items", "[]")):
        if item["used"] is not True:
            label = f"left out: {item['used'].split(':')[0]}"
            lanes.setdefault(label, []).append(pd.Timestamp(item["datetime"]).tz_localize(None))
    return Timeline(*span, _slots(frames, record["frames"], span, lanes[USED]), lanes)


def _slots(
    frames: xr.DataArray, n: int | None, span: tuple[pd.Timestamp, pd.Timestamp], used: list[pd.Timestamp]
) -> list[Slot]:
    if n is None:
        return []
    bounds = bin_bounds(*span, n)
    place = {pd.Timestamp(start): i for i, start in enumerate(frames["bin_start"].values)}
    slots = []
    for start, end in pairwise(bounds):
        at = place.get(start)
        observed = any(start <= d < end for d in used)
        if at is None:
            fate = "not in this cube" if observed else "empty, left out"
        else:
            fate = "" if observed else "empty, the nearest repeated"
        slots.append(Slot(start, end, None if at is None else pd.Timestamp(frames["time"].values[at]), fate))
    return slots


def describe(calendar: Timeline) -> str:
    """The period, its bins, and what became of those without a frame of their own."""
    period = f"{calendar.start:%Y-%m-%d} to {calendar.end - pd.Timedelta(days=1):%Y-%m-%d}"
    if not calendar.slots:
        return f"{period}, every acquisition a frame"
    fates = Counter(slot.fate for slot in calendar.slots if slot.fate)
    bins = f"{len(calendar.slots)} bin{'s' if len(calendar.slots) > 1 else ''}"
    return f"{period} in {bins}" + "".join(f"; {n} {fate}" for fate, n in fates.items())

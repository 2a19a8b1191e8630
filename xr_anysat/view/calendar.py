"""Layout of the calendar of acquisitions, which `preview` and Jupyter draw."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import xarray as xr

from xr_anysat.cube.timeline import OUTSIDE, USED, Timeline, describe

# Blue, orange and vermilion as in Okabe and Ito's palette, which color-blind readers can distinguish. Blue and
# orange are slightly shifted, to be readable on light and dark backgrounds.
COLORS = {USED: "#2f8fce", OUTSIDE: "#d98e00"}
"""Colors of the rows."""

VERMILION = "#d55e00"
"""Color of all other rows: acquisitions that `open_s2` left out."""

MARGIN = 0.04
"""Width before and after the period, as a share of the period."""

MAX_LABELED_BINS = 26
"""Bins up to this number show the days of the year of their frames; more have no room for them."""

MAX_TICKS = 13
"""Labelled ticks of the time axis: enough for every month of a year, and for the first of the next."""


@dataclass(frozen=True)
class Bin:
    """A bin of the period: its first and last position, its description and its `Slot.outcome`."""

    left: float
    right: float
    text: str
    outcome: str


@dataclass(frozen=True)
class Row:
    """Acquisitions with the same outcome.

    Attributes
    ----------
    label : str
        The outcome, and the number of acquisitions.
    color : str
    ticks : list of float
        Positions of the acquisitions that are in the drawn range.
    before, after : bool
        Whether there are acquisitions before or after the drawn range.
    """

    label: str
    color: str
    ticks: list[float]
    before: bool
    after: bool


@dataclass(frozen=True)
class Calendar:
    """Everything that is drawn. Positions are days since 1970-01-01, which is matplotlib's default.

    Attributes
    ----------
    title : str
    left, right : float
        The drawn range: the period and a margin.
    start, end : float
        The period, the end exclusive.
    bins : list of Bin
        None where every acquisition is a frame.
    days : list of (float, str)
        Dates of the frames, and their days of the year; empty where there is no room for them.
    rows : list of Row
        From top to bottom, below a row for the bins, if there are any.
    ticks : list of (float, str)
        Labelled ticks of the time axis.
    """

    title: str
    left: float
    right: float
    start: float
    end: float
    bins: list[Bin]
    days: list[tuple[float, str]]
    rows: list[Row]
    ticks: list[tuple[float, str]]

    @property
    def labels(self) -> list[str]:
        """Labels of all rows, from top to bottom."""
        return [*(["DOY of the frames"] if self.bins else []), *(row.label for row in self.rows)]


def lay_out(frames: xr.DataArray, line: Timeline) -> Calendar:
    """Lay out the calendar of composed frames."""
    start, end = position(line.start), position(line.end)
    margin = MARGIN * (end - start)
    left, right = start - margin, end + margin
    bins = [
        Bin(
            position(slot.start),
            position(slot.end),
            f"{slot.start:%Y-%m-%d} – {slot.end - pd.Timedelta(days=1):%Y-%m-%d} {slot.outcome}".rstrip(),
            slot.outcome,
        )
        for slot in line.slots
    ]
    dates = zip(pd.DatetimeIndex(frames["time"].values), frames["doy"].values, strict=True)
    rows = []
    for label, acquired in line.groups.items():
        places = sorted(position(date) for date in acquired)
        drawn = [place for place in places if left <= place <= right]
        before, after = any(place < left for place in places), any(place > right for place in places)
        rows.append(Row(f"{label} ({len(places)})", COLORS.get(label, VERMILION), drawn, before, after))
    return Calendar(
        title=describe(line),
        left=left,
        right=right,
        start=start,
        end=end,
        bins=bins,
        days=[(position(date), str(doy)) for date, doy in dates] if 0 < len(bins) <= MAX_LABELED_BINS else [],
        rows=rows,
        ticks=[(position(date), label) for date, label in ticks(line.start, line.end)],
    )


def position(date: pd.Timestamp) -> float:
    """Days since 1970-01-01."""
    return float((date - pd.Timestamp(0)) / pd.Timedelta(days=1))


def ticks(start: pd.Timestamp, end: pd.Timestamp) -> list[tuple[pd.Timestamp, str]]:
    """Choose evenly spaced days, months or years, and label those that begin a month or a year by its name.

    Examples
    --------
    >>> [label for _, label in ticks(pd.Timestamp("2022-01-01"), pd.Timestamp("2023-01-01"))][:3]
    ['2022', 'Feb', 'Mar']
    >>> [label for _, label in ticks(pd.Timestamp("2022-04-20"), pd.Timestamp("2022-05-11"))]
    ['22', '25', '28', 'May', '04', '07', '10']
    >>> [label for _, label in ticks(pd.Timestamp("2017-07-01"), pd.Timestamp("2053-01-01"))]
    ['2020', '2025', '2030', '2035', '2040', '2045', '2050']
    """
    days = pd.date_range(start.ceil("D"), end, freq="D")
    month = days.is_month_start
    choices = [
        # A step that would reach into the next month is skipped, since that begins with a tick
        *(((days.day - 1) % n == 0) & (days.day + n <= days.days_in_month + 1) for n in (1, 3, 7)),
        *(month & ((days.month - 1) % n == 0) for n in (1, 2, 3, 6)),
        *(days.is_year_start & (days.year % n == 0) for n in (1, 2, 5, 10, 20, 50, 100)),
    ]
    chosen = next((c for c in choices if c.sum() <= MAX_TICKS), choices[-1])
    return [(d, f"{d:%d}" if d.day > 1 else f"{d:%b}" if d.month > 1 else f"{d:%Y}") for d in days[chosen]]

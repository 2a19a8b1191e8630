"""Periods, their bins, and days of the year."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from xr_anysat.errors import OptionError

Period = str | Sequence[Any] | None

PERIOD_ATTR = "anysat_period"
"""attrs key of the period that a cube was loaded for, ``"2022-01-01/2023-01-01"``."""

PERIOD_TIMES_ATTR = "anysat_period_times"
"""attrs key of the first and last time of that cube. If they differ, the cube was cut and the period is void."""


YEARS = range(1900, 2201)
"""Years of a period, which all versions of pandas can represent in nanoseconds."""


def parse_period(period: Period, name: str = "period") -> tuple[pd.Timestamp, pd.Timestamp] | None:
    """Parse a period into its first day and the day after its last; None gives None. `name` is that of the option.

    Examples
    --------
    >>> [str(t.date()) for t in parse_period("2022")]
    ['2022-01-01', '2023-01-01']
    >>> [str(t.date()) for t in parse_period(("2022-04-01", "2022-10-01"))]
    ['2022-04-01', '2022-10-01']
    """
    if period is None:
        return None
    expected = (
        "expected '2022', '2022-06', '2022-04-01/2022-10-01' or a pair of dates (start, end), end exclusive"
    )
    years = f"{name}={period!r}: expected years from {YEARS[0]} to {YEARS[-1]}"
    try:
        parts = period.split("/") if isinstance(period, str) else list(period)
        if not all(re.match(r"\d{4}(\d{4}|Q\d)?\b", p) for p in parts if isinstance(p, str)):
            raise ValueError(
                "a date begins with its year"
            )  # pandas accepts 'April', and 1/2/2022 is ambiguous
        if isinstance(period, str) and len(parts) == 1:
            span = pd.Period(period)
            start, end = span.start_time, (span + 1).start_time
        else:
            start, end = (pd.Timestamp(p) for p in parts)
    except pd.errors.OutOfBoundsDatetime as error:  # the year 9999 with pandas 2.2
        raise OptionError(years) from error
    except (ValueError, TypeError) as error:
        raise OptionError(f"{name}={period!r}: {expected}") from error
    if any(pd.isna(t) or t != t.normalize() or t.tz for t in (start, end)):
        raise OptionError(f"{name}={period!r}: {expected}, of whole days without a time zone")
    if start.year not in YEARS or end.year not in YEARS:
        raise OptionError(years)
    if end <= start:
        raise OptionError(f"{name}={period!r} is empty: its end is exclusive and must be after its start")
    return start, end


def recorded_period(cube: xr.DataArray) -> str | None:
    """Return the period that a cube was loaded for; None if it is not recorded, or the cube was cut in time."""
    times = cube["time"].values
    whole = cube.attrs.get(PERIOD_TIMES_ATTR, span_of(times)) == span_of(times)
    return cube.attrs.get(PERIOD_ATTR) if whole else None


def span_of(times: np.ndarray) -> str:
    """Format the first and last of `times` for :data:`PERIOD_TIMES_ATTR`."""
    return f"{pd.Timestamp(times.min()).isoformat()}/{pd.Timestamp(times.max()).isoformat()}"


def bin_bounds(start: pd.Timestamp, end: pd.Timestamp, n: int) -> list[pd.Timestamp]:
    """Return the n + 1 bounds of n equal bins, ``start + days·i // n``."""
    days = (end - start).days
    if days < n:
        raise OptionError(
            f"a period of {days} days ({start.date()} to {end.date()}) cannot be cut into {n} frames of whole "
            "days: request fewer frames, pass a longer period=, or frames=None for every acquisition"
        )
    return [start + pd.Timedelta(days=days * i // n) for i in range(n + 1)]


def day_of_year(dates: Sequence[pd.Timestamp], base: int) -> np.ndarray:
    """Return days of the year (n,) int64. With base 0 the last day of a leap year is 364, as in upstream."""
    days = np.array([d.day_of_year - 1 for d in dates], np.int64)
    return days + 1 if base else np.minimum(days, 364)


CALENDAR = {"year": "YS", "season": "QS-DEC", "quarter": "QS", "month": "MS"}
"""Units of the calendar that `split_period` knows, with the offset of pandas to their next first day.

Seasons are those of meteorology: December to February, March to May, and so on.
"""


def split_period(by: Any, cube: xr.DataArray, period: Period) -> list[str]:
    """Return the periods of the steps of a series, as ``"2022-01-01/2023-01-01"``.

    Parameters
    ----------
    by : str or sequence
        A key of :data:`CALENDAR`, or a list of periods in the order of their first days.
    cube : DataArray, (time, …)
        Its times and its recorded period.
    period : Period
        What to split into units of the calendar; None: the recorded period, else the units that have acquisitions.

    Raises
    ------
    OptionError
        If `by` is something else, units of the calendar are cut by the ends of the period, or a list is combined with
        `period`.
    """
    known = ", ".join(map(repr, CALENDAR))
    if isinstance(by, str):
        if by not in CALENDAR:
            raise OptionError(
                f"by={by!r}: expected one of {known}, or a list of periods, by=['2021', '2022']"
            )
        return _calendar_units(by, cube, period)
    if period is not None:
        raise OptionError(f"{period=} with a list of periods, by={by!r}: pass one of them")
    if not isinstance(by, Sequence) or not by:
        raise OptionError(f"by={by!r}: expected one of {known}, or a list of periods, by=['2021', '2022']")
    spans = [parse_period(each, "by") for each in by]
    if None in spans:
        raise OptionError(f"by={by!r}: expected periods, not None")
    starts = [span[0] for span in spans if span is not None]
    if any(b <= a for a, b in pairwise(starts)):
        raise OptionError(f"by={by!r}: expected periods in the order of their first days, each once")
    return [_text(*span) for span in spans if span is not None]


def _calendar_units(by: str, cube: xr.DataArray, period: Period) -> list[str]:
    times = pd.DatetimeIndex(cube["time"].values)
    given = parse_period(period) or parse_period(recorded_period(cube))
    first, end = given or (times.min().normalize(), times.max().normalize() + pd.Timedelta(days=1))
    offset = pd.tseries.frequencies.to_offset(CALENDAR[by])
    starts = [offset.rollback(first)]
    while starts[-1] < end:
        starts.append(starts[-1] + offset)
    units = list(pairwise(starts))
    cut = [_text(*unit) for unit in units if unit[0] < first or unit[1] > end]
    if given is not None and cut:
        clipped = [_text(max(a, first), min(b, end)) for a, b in units]
        raise OptionError(
            f"by={by!r}: the period {_text(first, end)} contains only a part of {' and '.join(cut)}. Load whole units, "
            f"pass a period= of whole units, or the periods themselves, by={clipped}"
        )
    return [_text(*unit) for unit in units]


def _text(start: pd.Timestamp, end: pd.Timestamp) -> str:
    return f"{start.date()}/{end.date()}"

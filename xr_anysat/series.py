"""Series: the embeddings of several periods in one array (time, D, y, x), each a step with a record of its own.

The attributes of a series are what its steps have in common. What differs is kept per step, as JSON in the attribute
:data:`STEPS`, so that :func:`step` gives each step the record that it has alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from xr_anysat.cube.normalization import STATISTICS
from xr_anysat.cube.periods import parse_period
from xr_anysat.errors import CubeError
from xr_anysat.record import merge_records
from xr_anysat.shared.checks import check_embedding
from xr_anysat.shared.serialization import Rule, parse_json

STEPS = "anysat_steps"
"""Attribute of a series: a JSON object with the attributes of each step that differ between steps, by its period."""

PERIOD = "period"
"""Coordinate of a series: the period of each step, as ``"2022-01-01/2023-01-01"``."""

DIMS = ("time", "D", "y", "x")

_RECORDS = Rule(
    "an object of objects",
    lambda v: isinstance(v, dict) and all(isinstance(each, dict) for each in v.values()),
)


def is_series(emb: Any) -> bool:
    """Return whether `emb` has the dims of a series."""
    return isinstance(emb, xr.DataArray) and emb.dims == DIMS


def check_embeddings(emb: Any, call: str) -> None:
    """Refuse an object that is neither an embedding cube nor a series; see `check_embedding`."""
    if not is_series(emb):
        check_embedding(emb, call)


def join(steps: Sequence[xr.DataArray], periods: Sequence[str]) -> xr.DataArray:
    """Join the embeddings of several periods to a series.

    Parameters
    ----------
    steps : sequence of DataArray, (D, y, x) or (D,)
        All on the same grid.
    periods : sequence of str
        The period of each, in the order of their first days.

    Returns
    -------
    DataArray, (time, D, y, x) or (time, D)
        With the coordinates ``time``, the first day of each period, and ``period``.
    """
    import dask.array as da

    first = steps[0]
    starts = [pd.Timestamp(period.partition("/")[0]) for period in periods]
    coords = {name: c for name, c in first.coords.items() if name not in ("time", PERIOD)}
    coords |= {
        "time": ("time", np.array(starts, "datetime64[ns]")),
        PERIOD: ("time", np.array(periods, str)),
    }
    stack: Any = np.stack if first.chunks is None else da.stack
    series = xr.DataArray(stack([s.data for s in steps]), coords, ("time", *first.dims), first.name)
    series.attrs = merge_records([s.attrs for s in steps])
    if "config" in series.attrs:
        config = {**parse_json(series.attrs["config"]), "period": None, "by": list(periods)}
        series.attrs["config"] = json.dumps(config)
    own = [{k: v for k, v in s.attrs.items() if k == "config" or series.attrs.get(k) != v} for s in steps]
    series.attrs[STEPS] = json.dumps(dict(zip(periods, own, strict=True)))
    series.encoding = {k: v for k, v in first.encoding.items() if k in ("grid_mapping", STATISTICS)}
    return series


def steps(series: xr.DataArray) -> list[xr.DataArray]:
    """Return the steps of a series, each (D, y, x) with its own record."""
    return [step(series.isel(time=i)) for i in range(series.sizes["time"])]


def step(selected: xr.DataArray) -> xr.DataArray:
    """Return a cube (D, y, x) that was selected from a series with the record that it has alone.

    Anything else is returned as it is.

    Raises
    ------
    CubeError
        If the record of the steps is damaged, or does not have this step.
    """
    if STEPS not in getattr(selected, "attrs", {}) or is_series(selected):
        return selected
    (period,) = periods_of(selected)
    attrs = {k: v for k, v in selected.attrs.items() if k != STEPS} | _records(selected)[period]
    out = selected.drop_vars([name for name in ("time", PERIOD) if name in selected.coords])
    out.attrs, out.encoding = attrs, dict(selected.encoding)
    return out


def periods_of(series: xr.DataArray) -> list[str]:
    """Return the period of each step, from the record of the steps and their first days.

    Raises
    ------
    CubeError
        If the record is missing or damaged, or does not have a step.
    """
    known = {period.partition("/")[0]: period for period in _records(series)}
    days = (
        [str(day)[:10] for day in np.atleast_1d(series["time"].values)] if "time" in series.coords else [""]
    )
    unknown = [day for day in days if day not in known]
    if unknown:
        raise CubeError(
            f"attrs[{STEPS!r}] has no record of the step that begins on {unknown[0] or 'an unknown day'}, only of "
            f"{', '.join(known) or 'none'}: restore the attributes and the coordinate 'time' of the series"
        )
    return [known[day] for day in days]


def _records(series: xr.DataArray) -> dict[str, dict[str, Any]]:
    """Return the attributes of each step that are not those of all, by its period."""
    try:
        records = parse_json(series.attrs[STEPS])
        problem = None if _RECORDS.holds(records) else f"expected {_RECORDS.expected}"
        for period in records if problem is None else ():
            parse_period(period)
    except (KeyError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        raise CubeError(
            f"attrs[{STEPS!r}] is not the record of the steps ({problem}): expected that of "
            "cube.anysat.embed(by='year'); restore the attributes of the series"
        )
    found: dict[str, dict[str, Any]] = records
    return found

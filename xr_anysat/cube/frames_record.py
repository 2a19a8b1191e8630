"""The record of composed frames and of the items of a catalog, in attributes that may have been read from any file."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from xr_anysat.cube.periods import parse_period
from xr_anysat.errors import CubeError, OptionError
from xr_anysat.shared.serialization import (
    DATE,
    NUMBER,
    TEXT,
    Rule,
    first_violation,
    list_of,
    one_of,
    optional,
    or_none,
    parse_json,
    plain,
    whole,
)

FRAMES_ATTR = "anysat_frames"
"""attrs key of composed frames: JSON of the options and acquisitions they were composed with."""

ITEMS_ATTR = "items"
"""attrs key of cubes of ``open_s2``: JSON of the decision about each item of the search."""

SOURCE_ATTRS = (
    "catalog", "items", "items_left_out", "harmonize", "mask", "scl_invalid", "dilate_m", "max_cloud", "on_error",
)  # fmt: skip
"""attrs of ``open_s2`` that say where pixels come from; ``items`` also shows that the +1000 offset was decided."""

MAX_FRAMES = 10_000
"""Largest number of frames: 27 years of one frame per day."""


def check_frame_times(frames: xr.DataArray | xr.Dataset) -> None:
    """Refuse composed frames whose coordinates of time are not times.

    Raises
    ------
    CubeError
        Naming the coordinate.
    """
    for name in {"time", "bin_start", "bin_end"} & set(frames.coords):
        values = frames[name].values
        if values.dtype.kind != "M" or np.isnat(values).any():
            raise CubeError(
                f"the coordinate {name!r} of composed frames has the dtype {values.dtype}, or no value in places: "
                "expected a time for each frame. Compose the acquisitions again with frames()"
            )


def _is_period(text: Any) -> bool:
    try:
        span = parse_period(text) if isinstance(text, str) and "/" in text else None
    except OptionError:
        return False
    return span is not None


PERIOD_RULE = Rule("two dates such as '2022-01-01/2023-01-01'", _is_period)

FRAMES_RULES = {
    "frames": or_none(whole(1, MAX_FRAMES)),
    "period": PERIOD_RULE,
    "reduce": optional(TEXT),
    "empty": TEXT,
    "doy": optional(TEXT),
    "doy_base": one_of(0, 1),
    "fill_value": optional(or_none(NUMBER)),
    "acquisitions": whole(1),
    "outside_period": optional(whole(0)),
    "dates": list_of(DATE),
    "dates_outside": list_of(DATE),
    "empty_bins": optional(whole(0)),
}
"""The rules of the record of frames, which `plan_bins` returns."""


def _is_time(text: Any) -> bool:
    try:
        return isinstance(text, str) and bool(re.match(r"\d{4}-", text)) and not pd.isna(pd.Timestamp(text))
    except (ValueError, OverflowError):
        return False


ITEM_RULES = {
    "id": TEXT,
    "datetime": Rule("a time such as '2022-12-31T10:20:30Z'", _is_time),
    "used": Rule("true or text", lambda v: v is True or TEXT.holds(v)),
}
"""The rules of the record of an item, which `open_s2` writes."""


def frames_record(frames: xr.DataArray | xr.Dataset) -> dict[str, Any]:
    """Return the record of composed frames, checked; it may have been read from any file.

    Raises
    ------
    CubeError
        If it is damaged. The message names the entry, what was seen and what was expected.
    """
    try:
        record = parse_json(plain(frames.attrs[FRAMES_ATTR]))
        problem = first_violation(record, FRAMES_RULES)
    except ValueError as error:
        problem = str(error)
    if problem is not None:
        raise CubeError(
            f"attrs[{FRAMES_ATTR!r}] is damaged: {problem}. Compose the acquisitions again with frames(), or drop the "
            "attribute to read the frames as a cube of acquisitions"
        )
    found: dict[str, Any] = record
    return found


def items_record(text: Any) -> list[dict[str, Any]]:
    """Return the records of the items that a cube was opened from, checked; `text` may have been read from any file.

    Raises
    ------
    CubeError
        If it is damaged.
    """
    try:
        items = parse_json(plain(text))
        problem = None if isinstance(items, list) else "expected a JSON list"
        for item in items if problem is None else ():
            problem = problem or first_violation(item, ITEM_RULES)
    except ValueError as error:
        problem = str(error)
    if problem is not None:
        raise CubeError(
            f"attrs[{ITEMS_ATTR!r}] is damaged: {problem}. Open the cube again, or drop the attribute"
        )
    found: list[dict[str, Any]] = items
    return found

"""How a series is stored: a Zarr group that contains one store per step, named after its period."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xr_anysat.cube.periods import parse_period
from xr_anysat.errors import OptionError, StoreError
from xr_anysat.shared.serialization import TEXT, first_violation, list_of, parse_json
from xr_anysat.store.location import DRAFT, StoreLocation, names, read, write

SERIES_ATTR = "anysat_series"
"""Key in the attributes of the group of a series; its value is a JSON object."""

_STEP = re.compile(r"\d{4}-\d\d-\d\d_\d{4}-\d\d-\d\d")


def read_series(root: Any, target: StoreLocation) -> list[str] | None:
    """Return the periods that a stored series was begun with; None if there is no series.

    Raises
    ------
    StoreError
        If its metadata are damaged.
    """
    if target.is_folder and Path(target.address).is_file():
        return None
    text = read(root, "zarr.json")
    if text is None or SERIES_ATTR.encode() not in text:
        return None
    try:
        attributes = parse_json(text)["attributes"]
        if SERIES_ATTR not in attributes:
            return None
        found = parse_json(attributes[SERIES_ATTR])
        problem = first_violation(found, {"periods": list_of(TEXT, minimum=1)})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        raise StoreError(
            f"{target} is damaged: {problem}. Restore its zarr.json from a copy, or write the series to another path"
        )
    return list(found["periods"])


def write_series(root: Any, target: StoreLocation, periods: Sequence[str]) -> None:
    """Write the metadata of the group of a series, if they are not there yet."""
    group = {
        "zarr_format": 3, "node_type": "group",
        "attributes": {SERIES_ATTR: json.dumps({"periods": list(periods)})},
    }  # fmt: skip
    write(root, "zarr.json", json.dumps(group, indent=2).encode(), target, replace=False)


def step_location(target: StoreLocation, period: str) -> StoreLocation:
    """Return the location of the store of a step.

    Raises
    ------
    OptionError
        If `target` is a store object, which has no locations inside.
    """
    if not isinstance(target.address, str):
        raise OptionError(
            f"a series in {target}: expected a path or a URL, such as 's3://bucket/series.zarr', because each step is "
            "a store of its own"
        )
    return StoreLocation(f"{target.address}/{period.replace('/', '_')}", target.storage_options)


def stored_periods(root: Any, target: StoreLocation) -> list[str]:
    """Return the periods of the steps in a stored series, in the order of their first days.

    Raises
    ------
    StoreError
        If the folder has other entries.
    """
    entries = [name for name in names(root) if not name.endswith((".json", DRAFT))]
    others = [name for name in entries if not _STEP.fullmatch(name) or not _is_period(name)]
    if others:
        raise StoreError(
            f"{target} contains {sorted(others)[0]!r}, which is no step of a series: expected folders such as "
            "'2022-01-01_2023-01-01'. Move it elsewhere"
        )
    return sorted(name.replace("_", "/") for name in entries)


def _is_period(name: str) -> bool:
    try:
        return parse_period(name.replace("_", "/")) is not None
    except OptionError:
        return False

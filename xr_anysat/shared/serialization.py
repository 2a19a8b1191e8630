"""Numbers that are found once and used everywhere: kept as JSON, to the last digit."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from xr_anysat.errors import OptionError


@dataclass(frozen=True)
class Stored:
    """A dataclass of plain numbers, text, tuples and dicts that JSON gives back equal."""

    def to_json(self) -> str:
        """As JSON; `from_json` reads it back to the last digit."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote.

        Raises
        ------
        OptionError
            If `text` is something else.
        """
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise OptionError(
                f"{str(text)[:80]!r} holds no {cls.__name__} ({error}): wanted what to_json() wrote"
            ) from error


def json_default(value: Any) -> Any:
    """NumPy's numbers and arrays, and whatever else attrs hold, for JSON."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)

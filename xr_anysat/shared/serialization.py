"""Results that are computed once and used in later calls, as JSON without loss of precision."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from xr_anysat.errors import OptionError


@dataclass(frozen=True)
class Stored:
    """A dataclass of plain numbers, text, tuples and dicts, which JSON restores without a difference."""

    def to_json(self) -> str:
        """Convert to JSON, which `from_json` reads without loss of precision."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` returned.

        Raises
        ------
        OptionError
            If `text` is something else.
        """
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise OptionError(
                f"{str(text)[:80]!r} contains no {cls.__name__} ({error}): expected what to_json() returned"
            ) from error


def json_default(value: Any) -> Any:
    """Convert NumPy numbers and arrays for JSON, and other values of attrs to text."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)

"""Checks of option values that several modules share: numbers and choices."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

from xr_anysat.errors import OptionError


def is_number(value: Any) -> bool:
    """Return whether `value` is a finite real number; a bool is not.

    Examples
    --------
    >>> is_number(1.5), is_number(float("nan")), is_number(True), is_number("1"), is_number(10**400)
    (True, False, False, False, False)
    """
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return real and (abs(value) <= sys.float_info.max if isinstance(value, int) else math.isfinite(value))


def is_whole_number(value: Any, minimum: int = 1, maximum: float = math.inf) -> bool:
    """Return whether `value` is an integer of Python or NumPy in the bounds, both included; 24.0 and bools are not."""
    integer = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return integer and minimum <= value <= maximum


def check_whole_number(
    name: str,
    value: Any,
    minimum: int = 1,
    maximum: int | None = None,
    *,
    of: str = "",
    hint: str = "",
    float_allowed: bool = False,
) -> int:
    """Check that `value` is a whole number from `minimum` to `maximum`, and return it as an int.

    Parameters
    ----------
    name : str
        Name of the option.
    value : object
        Its value.
    minimum, maximum : int
        Bounds, both included; None is no upper bound.
    of : str
        Unit for the message, such as "pixels".
    hint : str
        End of the message, such as what else is allowed.
    float_allowed : bool
        Whether 24.0 counts as a whole number.

    Raises
    ------
    OptionError
        If it is not.

    Examples
    --------
    >>> check_whole_number("k", 3)
    3
    """
    whole = float_allowed and is_number(value) and value == int(value)
    number = int(value) if whole else value
    if not is_whole_number(number, minimum, math.inf if maximum is None else maximum):
        what = "a positive whole number" if minimum == 1 else "a whole number"
        what += f" of {of}" if of else ""
        what += f", {minimum} or more" if minimum != 1 else ""
        what += "" if maximum is None else f", up to {maximum}"
        raise OptionError(f"{name}={value!r}: expected {what}{hint}")
    return int(number)


def check_choice(name: str, value: Any, choices: Iterable[str], hint: str = "") -> None:
    """Refuse a `value` that is not one of `choices`.

    Raises
    ------
    OptionError
        With the choices and `hint`, such as what else is allowed.

    Examples
    --------
    >>> check_choice("how", "mean", ("mean", "max"))
    """
    if not isinstance(value, str) or value not in choices:
        raise OptionError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}{hint}")

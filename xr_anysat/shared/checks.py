"""Checks that several modules share: numbers, choices, kinds of cube and optional packages."""

from __future__ import annotations

import importlib.util
import math
from importlib import import_module
from typing import Any

import numpy as np
import xarray as xr

from xr_anysat.errors import AnySatError, CubeTypeError, OptionError


def import_optional(module: str, call: str) -> Any:
    """The module of an extra, imported.

    Raises
    ------
    AnySatError
        If it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise AnySatError(f"{call} needs {module}: pip install 'xr_anysat[analysis]'") from error


def check_whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """`value` as an int, if it is one from `least` to `most`.

    Examples
    --------
    >>> whole_number("k", 3, 1)
    3
    """
    number = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not number or value < least or (most is not None and value > most):
        raise OptionError(
            f"{name}={value!r}: wanted a whole number, {least} or more{f', up to {most}' if most else ''}"
        )
    return int(value)


def check_embedding(emb: Any, call: str) -> None:
    """Refuse what is no embedding cube (D, y, x), where `call` is to be made on one.

    Raises
    ------
    CubeTypeError
        Naming what it is, and what to call.
    """
    dims = tuple(getattr(emb, "dims", ()))
    if isinstance(emb, xr.DataArray) and dims == ("D", "y", "x"):
        return
    if isinstance(emb, xr.DataArray) and set(dims) == {"D", "y", "x"}:
        raise CubeTypeError(f"dims {dims}: wanted (D, y, x), as emb.transpose('D', 'y', 'x') has them")
    if isinstance(emb, xr.DataArray) and dims == ("D",):
        raise CubeTypeError(
            "one vector (D,), as pool= makes it: wanted an embedding cube (D, y, x); embed without pool=, and "
            f"then .anysat.{call}"
        )
    if isinstance(emb, xr.Dataset) and "D" in dims:
        raise CubeTypeError(
            f"a Dataset of {[str(n) for n in emb.data_vars]}: wanted the DataArray (D, y, x) in it, "
            f"dataset['anysat'].anysat.{call}"
        )
    raise CubeTypeError(
        f"a {type(emb).__name__} with dims {dims}, not those of an embedding cube, (D, y, x): call embed() first, "
        f"cube.anysat.embed(frames=8).anysat.{call}"
    )


def is_positive_int(value: Any) -> bool:
    """Whether `value` is a positive whole number; 24.0 is."""
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0 and value == int(value)


def require_packages(*packages: str) -> None:
    """Refuse to draw without what drawing takes."""
    modules = {"scikit-learn": "sklearn"}
    missing = [p for p in packages if importlib.util.find_spec(modules.get(p, p)) is None]
    if missing:
        raise AnySatError(f"preview needs {', '.join(missing)}: pip install 'xr_anysat[analysis]'")

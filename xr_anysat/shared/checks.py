"""Checks that several modules share: kinds of cube and optional packages."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import xarray as xr

from xr_anysat.errors import AnySatError, CubeError, CubeTypeError

ANALYSIS = "'xr_anysat[analysis]'"

_DISTRIBUTIONS = {
    "sklearn": "scikit-learn",
    "odc.stac": "odc-stac",
    "pystac_client": "pystac-client",
    "planetary_computer": "planetary-computer",
}
"""Names of packages for pip, if they differ from the name of the module."""


def import_optional(module: str, call: str, install: str = ANALYSIS) -> Any:
    """Import a module of an optional package.

    Parameters
    ----------
    module : str
        Name of the module.
    call : str
        The call that needs it, for the message.
    install : str
        What to install with pip, for the message.

    Raises
    ------
    AnySatError
        If it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        top = module.partition(".")[0]
        name = _DISTRIBUTIONS.get(module, _DISTRIBUTIONS.get(top, top))
        raise AnySatError(f"{call} needs {name}: pip install {install}") from error


def require_packages(call: str, *modules: str, install: str = ANALYSIS, missing: Iterable[str] = ()) -> None:
    """Refuse `call` if `modules` are not installed, without importing them.

    `missing` contains packages that are known to be missing.

    Raises
    ------
    AnySatError
        With the names of all missing packages.
    """
    absent = [_DISTRIBUTIONS.get(m, m) for m in modules if importlib.util.find_spec(m) is None]
    if absent := [*absent, *missing]:
        raise AnySatError(f"{call} needs {', '.join(absent)}: pip install {install}")


def check_embedding(emb: Any, call: str) -> None:
    """Refuse an object that is not an embedding cube (D, y, x).

    Parameters
    ----------
    emb : object
        The supposed embedding cube.
    call : str
        The method that was called on it, for the message.

    Raises
    ------
    CubeTypeError
        With the kind of object, and the call that fixes it.
    CubeError
        If a coordinate of a dim has several dims.
    """
    dims = tuple(getattr(emb, "dims", ()))
    if isinstance(emb, xr.DataArray) and dims == ("D", "y", "x"):
        for dim in dims:
            if dim in emb.coords and emb[dim].ndim != 1:
                raise CubeError(
                    f"the coordinate {dim!r} has dims {emb[dim].dims}: expected ({dim!r},); rename it, "
                    f"emb.reset_coords({dim!r}, drop=True)"
                )
        return
    if isinstance(emb, xr.DataArray) and dims == ("time", "D", "y", "x"):
        raise CubeTypeError(
            f"a series (time, D, y, x): expected one step of it, emb.isel(time=0).anysat.{call}"
        )
    if isinstance(emb, xr.DataArray) and set(dims) == {"D", "y", "x"}:
        raise CubeTypeError(f"dims {dims}: expected (D, y, x), use emb.transpose('D', 'y', 'x')")
    if isinstance(emb, xr.DataArray) and dims == ("D",):
        raise CubeTypeError(
            "one vector (D,), the result of pool=: expected an embedding cube (D, y, x); embed without pool=, then "
            f"call .anysat.{call}"
        )
    if isinstance(emb, xr.Dataset) and "D" in dims:
        raise CubeTypeError(
            f"a Dataset of {[str(n) for n in emb.data_vars]}: expected its DataArray (D, y, x), "
            f"dataset['anysat'].anysat.{call}"
        )
    raise CubeTypeError(
        f"a {type(emb).__name__} with dims {dims}: expected an embedding cube (D, y, x), call embed() first, "
        f"cube.anysat.embed(frames=8).anysat.{call}"
    )

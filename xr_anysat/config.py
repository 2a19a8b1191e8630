"""Defaults of options, in order of precedence: argument, ``config.set``, environment, built-in default.

The options live in :data:`config`, a :class:`donfig.Config`: ``xr_anysat.config.set(tile=64)``
works as a statement and as a context manager. ``XR_ANYSAT_TILE=64`` in the environment is read on
import, and again by ``xr_anysat.config.refresh()``.
"""

from __future__ import annotations

import difflib
from typing import Any

from donfig import Config

from xr_anysat.errors import OptionError


class _DefaultInt(int):
    """An ``int`` whose identity shows that the caller did not pass a value."""


class _DefaultStr(str):
    """A ``str`` whose identity shows that the caller did not pass a value."""


# Defaults of public functions that the configuration may override. They print and compare like
# plain values, so that signatures and ``help()`` are readable; `option` recognizes them by identity.
FRAMES: int = _DefaultInt(8)
TILE: int = _DefaultInt(24)
NORM: str = _DefaultStr("per_tile_zscore")
MODEL: str = _DefaultStr("base")
DEVICE: str = _DefaultStr("auto")
PRECISION: str = _DefaultStr("float32")
FETCH_WORKERS: int = _DefaultInt(8)

DEFAULTS: dict[str, Any] = {
    "frames": FRAMES,
    "tile": TILE,
    "norm": NORM,
    "model": MODEL,
    "weights": None,
    "device": DEVICE,
    "precision": PRECISION,
    "fetch_workers": FETCH_WORKERS,
    "cache_dir": None,
    "offline": False,
}

# variables of donfig itself, which name configuration files
_DONFIG_KEYS = {"config", "root_config"}

config = Config("xr_anysat")


def option(name: str, given: Any) -> Any:
    """Return the effective value of option `name`.

    Parameters
    ----------
    name : str
        A key of :data:`DEFAULTS`.
    given : object
        What the caller passed, or the object in :data:`DEFAULTS` if they passed nothing.

    Returns
    -------
    object
        `given` if the caller passed it, else the configured value, else the default.

    Raises
    ------
    OptionError
        If the configuration or the environment has an unknown key.
    """
    check_known(config.config)
    default = DEFAULTS[name]
    if given is not default:
        return given
    value = config.get(name, default)
    if isinstance(value, _DefaultInt):
        return int(value)
    if isinstance(value, _DefaultStr):
        return str(value)
    return value


def check_known(keys: Any) -> None:
    """Refuse unknown configuration keys, so that a misspelled option is not ignored."""
    for key in keys:
        if key in DEFAULTS or key in _DONFIG_KEYS:
            continue
        near = difflib.get_close_matches(str(key), DEFAULTS, n=1)
        hint = f" Did you mean {near[0]!r} (XR_ANYSAT_{near[0].upper()})?" if near else ""
        raise OptionError(
            f"unknown option {key!r} in the xr_anysat configuration or the environment variable "
            f"XR_ANYSAT_{str(key).upper()}.{hint} Known options: {', '.join(DEFAULTS)}. "
            "Remove it, then call xr_anysat.config.refresh()."
        )

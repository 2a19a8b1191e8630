"""The exceptions and the warning of xr_anysat.

Every refusal is an :class:`AnySatError`. Each subclass is also the built-in exception that
Python users expect (``ValueError`` or ``TypeError``), so ``except ValueError`` goes on
working. A message names what was seen, what was wanted, and the call that mends it.
"""

from __future__ import annotations

import sys
import warnings
from types import FrameType


class AnySatError(Exception):
    """Base of everything that xr_anysat refuses."""


class CubeError(AnySatError, ValueError):
    """The cube cannot be read as Sentinel-2: bands, dims, times, grid or values."""


class CubeTypeError(AnySatError, TypeError):
    """Not a cube at all, or the method belongs to the other kind of cube."""


class OptionError(AnySatError, ValueError):
    """An option, configuration key or environment variable has an impossible value."""


class WeightsError(AnySatError, ValueError):
    """The weights are missing, damaged, unsafe, or those of another model."""


class DeviceError(AnySatError, ValueError):
    """The device that was asked for is not there, or has too little memory."""


class CatalogError(AnySatError, ValueError):
    """A catalog cannot be searched, or holds nothing that was asked for."""


class ReadError(AnySatError, OSError):
    """An asset of a catalog's item cannot be read."""


class StoreError(AnySatError, ValueError):
    """A store holds something else than what was asked for, or cannot be opened."""


class WriteError(AnySatError, OSError):
    """A store cannot be written; what is finished stays."""


class AnySatWarning(UserWarning):
    """Something looks wrong, but may be right: nothing was changed."""


def warn(message: str) -> None:
    """Issue an :class:`AnySatWarning` at the line that called this package, by whichever way."""
    level = 1
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, AnySatWarning, stacklevel=level)

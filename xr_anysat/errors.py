"""The exceptions and the warning of xr_anysat.

Every error that xr_anysat raises on purpose is an :class:`AnySatError`. Each subclass is also the built-in
exception that Python users expect (``ValueError``, ``TypeError`` or ``OSError``), so ``except ValueError``
works. A message says what was seen, what was expected, and which call fixes it.
"""

from __future__ import annotations

import sys
import warnings
from types import FrameType


class AnySatError(Exception):
    """Base class of the errors of xr_anysat."""


class CubeError(AnySatError, ValueError):
    """The cube cannot be read as Sentinel-2: bands, dims, times, grid or values."""


class CubeTypeError(AnySatError, TypeError):
    """The object is not a cube, or the method applies to the other kind of cube."""


class OptionError(AnySatError, ValueError):
    """An option, configuration key or environment variable has an invalid value."""


class WeightsError(AnySatError, ValueError):
    """The weights are missing, damaged, unsafe, or those of another model."""


class DeviceError(AnySatError, ValueError):
    """The requested device does not exist, or has too little memory."""


class CatalogError(AnySatError, ValueError):
    """A catalog cannot be searched, or has no item that matches."""


class ReadError(AnySatError, OSError):
    """An asset of a catalog's item cannot be read.

    Attributes
    ----------
    item : str or None
        Name of the item.
    """

    item: str | None = None


class StoreError(AnySatError, ValueError):
    """A store cannot be opened, or its contents are not those expected."""


class WriteError(AnySatError, OSError):
    """A store cannot be written. Finished blocks are kept."""


class AnySatWarning(UserWarning):
    """Something looks wrong but may be intended. The data are not changed."""


def warn(message: str) -> None:
    """Issue an :class:`AnySatWarning` that points to the line outside of this package that called it."""
    level = 1
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, AnySatWarning, stacklevel=level)

"""The exceptions and the warning of xr_anysat.

Every refusal is an :class:`AnySatError`. Each subclass is also the built-in exception that
Python users expect (``ValueError`` or ``TypeError``), so ``except ValueError`` goes on
working. A message names what was seen, what was wanted, and the call that mends it.
"""


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
    """The device that was asked for is not there."""


class AnySatWarning(UserWarning):
    """Something looks wrong, but may be right: nothing was changed."""

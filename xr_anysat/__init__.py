"""AnySat embeddings of any Sentinel-2 cube.

Importing xr_anysat registers the ``.anysat`` accessor on xarray's DataArray and Dataset, and imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xr_anysat.accessor import register
from xr_anysat.config import config
from xr_anysat.cube import BANDS
from xr_anysat.embedding import embed, pool
from xr_anysat.errors import (
    AnySatError,
    AnySatWarning,
    CubeError,
    CubeTypeError,
    DeviceError,
    OptionError,
    WeightsError,
)
from xr_anysat.frames import frames
from xr_anysat.model.weights import load_model
from xr_anysat.radiometry import Statistics, statistics

if TYPE_CHECKING:
    from xr_anysat.model.verify import verify

__version__ = "0.1.0"

__all__ = [
    "BANDS",
    "AnySatError",
    "AnySatWarning",
    "CubeError",
    "CubeTypeError",
    "DeviceError",
    "OptionError",
    "Statistics",
    "WeightsError",
    "config",
    "embed",
    "frames",
    "load_model",
    "pool",
    "statistics",
    "verify",
]

register()


def __getattr__(name: str) -> Any:
    if name == "verify":  # rarely needed
        from xr_anysat.model.verify import verify

        return verify
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

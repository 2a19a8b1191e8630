"""The sensor that cubes come from, as one value: every other module reads its bands and numbers here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Sensor:
    """Facts about the images of one sensor.

    Attributes
    ----------
    bands : tuple of str
        Names of the bands, in the order of the checkpoint.
    common_names : mapping of str to str
        Band for each STAC common name (https://github.com/stac-extensions/eo), as Earth Search uses them.
    pixel_size : float
        Side of a pixel in meters: the resolution that the projector was trained on.
    max_dn : float
        Largest digital number that the model sees, that of reflectance 1. Digital numbers are clipped to 0..max_dn.
    offset : int
        Digital numbers that some products have added to all valid pixels.
    projector : str
        Name of the projector in the model, and of the images in the mapping that the model takes.
    """

    bands: tuple[str, ...]
    common_names: Mapping[str, str]
    pixel_size: float
    max_dn: float
    offset: int
    projector: str


S2 = Sensor(
    bands=("B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B11", "B12"),
    common_names={
        "blue": "B2", "green": "B3", "red": "B4", "rededge1": "B5", "rededge2": "B6", "rededge3": "B7",
        "nir": "B8", "nir08": "B8A", "swir16": "B11", "swir22": "B12",
    },
    pixel_size=10.0,
    max_dn=10_000.0,
    # processing baseline 04.00 and later (ESA, in force since 25 January 2022: BOA_ADD_OFFSET = -1000)
    offset=1000,
    projector="s2",
)  # fmt: skip
"""Sentinel-2 surface reflectance (Level-2A), the only sensor that cubes are read from today."""

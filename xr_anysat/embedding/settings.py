"""The settings of a block."""

from __future__ import annotations

from dataclasses import dataclass

from xr_anysat.embedding.lattice import Span
from xr_anysat.model.spec import cell_side, channels
from xr_anysat.model.weights import EncoderSpec

WindowPosition = tuple[Span, Span]
"""A window: its rows and its columns."""


@dataclass(frozen=True)
class BlockSpec:
    """Everything that a block needs besides its pixels. It is part of every task, so it is small and hashable.

    Attributes
    ----------
    spec : EncoderSpec
        The encoder.
    doy : tuple of int
        Day of the year of each frame.
    norm : str
        The normalization, see :func:`xr_anysat.cube.normalization.normalize`.
    output : {"patch", "dense", "local", "tile"}
        Kind of the output.
    tile, side, overlap : int
        Pixels on the side of a window and of a patch, and shared by adjacent windows.
    batch : int or None
        Windows per forward pass on an accelerator; None: by device.
    offset_decided : bool
        Whether metadata determined the +1000 offset, so that values are not checked for it.
    """

    spec: EncoderSpec
    doy: tuple[int, ...]
    norm: str
    output: str
    tile: int
    side: int
    batch: int | None
    overlap: int = 0
    offset_decided: bool = False

    @property
    def cell(self) -> int:
        """Pixels on the side of an output cell."""
        return cell_side(self.output, side=self.side, tile=self.tile)

    @property
    def stride(self) -> int:
        """Pixels from one window to the next."""
        return self.tile - self.overlap

    @property
    def channels(self) -> int:
        """Channels of an output cell, D."""
        return channels(self.spec.size, self.output)

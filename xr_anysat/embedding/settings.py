"""What a block needs to know besides its pixels."""

from __future__ import annotations

from dataclasses import dataclass

from xr_anysat.embedding.lattice import Span
from xr_anysat.model.spec import cell_side, channels
from xr_anysat.model.weights import EncoderSpec

WindowPosition = tuple[Span, Span]  # of a window, down and across


@dataclass(frozen=True)
class BlockSpec:
    """What a block needs to know beside its pixels; part of every task, so small and plain."""

    spec: EncoderSpec
    doy: tuple[int, ...]
    norm: str
    output: str
    tile: int
    side: int
    batch: int | None
    overlap: int = 0
    offset_decided: bool = False  # whether metadata settled the +1000 offset

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

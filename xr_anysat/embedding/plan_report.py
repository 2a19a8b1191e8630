"""The result of `plan`, as text and as a table."""

from __future__ import annotations

import html
import math
import textwrap
from dataclasses import dataclass

from xr_anysat.shared.sensor import S2
from xr_anysat.shared.text import format_bytes, format_counts, format_duration, format_si
from xr_anysat.store.codecs import CODECS

WIDTH = 100
"""Columns of the text."""


@dataclass(frozen=True)
class Plan:
    """The result of :func:`plan`. Prints as text, and as a table in a notebook. Each figure is described below it."""

    acquisitions: int
    """Dates of the cube that are used; of a composed cube, its frames."""
    period: str
    """The period that is divided into frames; its end is exclusive."""
    frame_dates: tuple[str, ...]
    """Date of each frame."""
    doy: tuple[int, ...]
    """Day of the year of each frame."""
    n_obs: tuple[int, ...]
    """Acquisitions of each frame."""
    empty_bins: tuple[str, ...]
    """Bins of the period without any acquisition."""
    empty: str
    """How empty bins are treated: ``"drop"`` or ``"nearest"``."""
    pixels: tuple[int, int]
    """Rows and columns that are embedded."""
    tile: int
    """Side of a window in pixels."""
    overlap: int
    """Pixels that a window shares with the next."""
    patch_size: int
    """Side of a patch in meters."""
    windows: tuple[int, int]
    """Number of windows down and across; those at the ends of the cube may be cut."""
    patches: tuple[int, int]
    """Number of patches down and across; those at the ends of the cube may be cut."""
    blocks: tuple[int, int]
    """Number of blocks down and across. A block is a task, and a chunk of the output."""
    block_windows: int
    """Windows on the side of a block. Overlapping windows belong to the block in which they start."""
    chunks: tuple[tuple[int, ...], ...]
    """Chunks of the output, as in dask."""
    why: tuple[str, ...]
    """Explanation of the blocks and chunks."""
    output: str
    """Kind of the output."""
    dims: tuple[str, ...]
    """Dimensions of the output."""
    shape: tuple[int, ...]
    """Shape of the output."""
    dtype: str
    """Data type of the output."""
    cell: float
    """Side of an output cell in meters."""
    crs: str | None
    """Coordinate reference system of the output."""
    model: str
    """Size of the model."""
    weights: str
    """Source of its weights."""
    device: str
    """Device that it runs on."""
    flop: int
    """Floating point operations of the model, two per multiply-add, if every pixel was observed; fewer otherwise."""
    lazy: bool
    """Whether the cube is lazy; otherwise `embed` computes immediately."""
    bytes_read: int
    """Bytes of the acquisitions that are used, uncompressed."""
    reads: int
    """How many times they are read."""
    codec: str | None
    """How the embedding is stored."""
    bytes_written: int
    """Bytes of the store before compression."""
    memory_input: int
    """Bytes of the frames of a task."""
    memory_output: int
    """Bytes of the embeddings of a task."""
    memory_working: int
    """Bytes that the model needs for intermediate results, per task on a CPU."""
    memory_weights: int
    """Bytes of the weights, once per process."""
    seconds: float | None = None
    """Time of the model on this machine in seconds, with ``calibrate=True``."""
    pixels_per_second: float | None = None
    """Pixels per second of the model on this machine, with ``calibrate=True``."""
    timed: str = ""
    """Description of the measurement."""
    warnings: tuple[str, ...] = ()
    """Problems found."""

    @property
    def memory(self) -> int:
        """Bytes that a worker with one thread needs, in addition to Python and its libraries.

        The frames of a block are in memory twice: as parts of the chunks that they come from, which dask
        keeps until the block is done, and concatenated. Frames of later blocks are in memory too, because a
        chunk is read for all of them.
        """
        return self.memory_weights + 2 * self.memory_input + self.memory_output + self.memory_working

    def __repr__(self) -> str:
        lines = ["Plan of an AnySat embedding"]
        indent = " " * 12
        for name, values in self._rows():
            for i, value in enumerate(values):
                first = f"  {name if i == 0 else '':<10}"
                lines += textwrap.wrap(value, WIDTH, initial_indent=first, subsequent_indent=indent)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        style = 'style="text-align: left; vertical-align: top"'
        rows = "".join(
            f"<tr><th {style}>{html.escape(name)}</th>"
            f"<td {style}>{'<br/>'.join(html.escape(v) for v in values)}</td></tr>"
            for name, values in self._rows()
        )
        return f"<table><caption {style}>Plan of an AnySat embedding</caption><tbody>{rows}</tbody></table>"

    def _rows(self) -> list[tuple[str, list[str]]]:
        """Return the names and lines of the rows of text and table."""
        days = " ".join(map(str, self.doy))
        frames = [
            f"{len(self.doy)} of {self.period}, made of {self.acquisitions} acquisitions",
            f"days of the year {days}",
        ]
        if self.empty_bins:
            outcome = {"drop": "dropped", "nearest": "copies of their neighbors"}[self.empty]
            frames.append(f"without acquisitions, {outcome}: {', '.join(self.empty_bins)}")
        side = self.patch_size // int(S2.pixel_size)
        sizes = ", ".join(f"{dim}: {n:,}" for dim, n in zip(self.dims, self.shape, strict=True))
        chunk = " × ".join(f"{max(c):,}" for c in self.chunks)
        store = CODECS[self.codec].description
        how_often = "once" if self.lazy else "immediately, because the cube is not lazy"
        if self.reads == 2:
            how_often = "twice: for the statistics of per_tile_zscore, and for the embeddings"
        shared = f"{self.overlap} of them shared with the next, " if self.overlap else ""
        windows = f"{format_counts(self.windows)} of {self.tile} × {self.tile} pixels, {shared}"
        rows = [
            ("model", [f"{self.model}, {self.weights} weights, device {self.device}"]),
            ("frames", frames),
            ("windows", [f"{windows}for {format_counts(self.pixels)} pixels"]),
            ("patches", [f"{format_counts(self.patches)} of {self.patch_size} m, {side} × {side} pixels"]),
            ("blocks", [f"{format_counts(self.blocks)} = {math.prod(self.blocks):,}", *self.why]),
            (
                "output",
                [
                    f"{self.output}, ({sizes}) {self.dtype}",
                    f"chunks of {chunk}, cells of {self.cell:g} m, {self.crs or 'no CRS'}",
                ],
            ),
            ("compute", [f"{format_si(self.flop, 'FLOP')}, less where pixels are missing"]),
            ("read", [f"{format_bytes(self.bytes_read)} {how_often}"]),
            ("written", [f"{format_bytes(self.bytes_written)} at most: {store}, before compression"]),
            (
                "memory",
                [
                    f"{format_bytes(self.memory)} per worker: frames 2 × {format_bytes(self.memory_input)}, embeddings "
                    f"{format_bytes(self.memory_output)} and intermediate results {format_bytes(self.memory_working)} "
                    f"per task; weights {format_bytes(self.memory_weights)} per process"
                ],
            ),
        ]
        if self.seconds is not None:
            time = f"{format_duration(self.seconds)} on this machine, {self.pixels_per_second:,.0f} pixels/s"
            rows.append(("time", [f"{time}, the model alone", self.timed]))
        return rows + ([("warnings", list(self.warnings))] if self.warnings else [])

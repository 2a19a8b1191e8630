"""The result of `plan`, as text and as a table."""

from __future__ import annotations

import html
import math
import textwrap
from dataclasses import dataclass

from xr_anysat.cube.reading import PIXEL
from xr_anysat.shared.text import format_bytes, format_counts, format_duration, format_si

WIDTH = 100
"""Columns of the text."""


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` found out. Prints as text, and as a table in a notebook.

    Attributes
    ----------
    acquisitions : int
        Dates of the cube that take part (of a composed cube: its frames).
    period : str
        What was cut into frames, its end exclusive.
    frame_dates, doy, n_obs : tuple
        Of each frame: the date, the day of the year, and the acquisitions it is made of.
    empty_bins : tuple of str
        Bins of the period without any acquisition.
    empty : str
        What becomes of them: ``"drop"`` or ``"nearest"``.
    pixels : (int, int)
        Rows and columns that are embedded.
    tile, overlap, patch_size : int
        Side of a window in pixels, pixels that it shares with the next, and side of a patch in metres.
    windows, patches, blocks : (int, int)
        How many there are down and across; those at the cube's ends may be cut.
    block_windows : int
        Windows on the side of a block: of overlapping ones, those that start in it. A block is a task, and a chunk
        of the output.
    chunks : tuple of tuple of int
        Chunks of the output, as dask has them.
    why : tuple of str
        Why these chunks, in words.
    output : str
        Its kind.
    dims, shape, dtype
        Of the output.
    cell : float
        Side of an output cell in metres.
    crs : str or None
        Its coordinate reference system.
    model, weights, device : str
        What runs, and where.
    flop : int
        Floating point operations of the model, two a multiply-add, if every pixel was observed: what
        was not is left out, and then it is less.
    lazy : bool
        Whether the cube is: one that is not is embedded at once.
    bytes_read, reads : int
        Bytes of the acquisitions that take part, uncompressed, and how many times they are read.
    codec : str or None
        How it is stored.
    bytes_written : int
        Bytes of the store before compression, which makes it less.
    memory_input, memory_output, memory_working : int
        Bytes of a task: its frames, its embeddings, and what the model works in on a CPU.
    memory_weights : int
        Bytes of the weights, once a process.
    seconds, pixels_per_second : float or None
        Of the model on this machine, with ``calibrate=True``.
    timed : str
        What was run to know.
    warnings : tuple of str
        What is absurd or impossible about it.
    """

    acquisitions: int
    period: str
    frame_dates: tuple[str, ...]
    doy: tuple[int, ...]
    n_obs: tuple[int, ...]
    empty_bins: tuple[str, ...]
    empty: str
    pixels: tuple[int, int]
    tile: int
    overlap: int
    patch_size: int
    windows: tuple[int, int]
    patches: tuple[int, int]
    blocks: tuple[int, int]
    block_windows: int
    chunks: tuple[tuple[int, ...], ...]
    why: tuple[str, ...]
    output: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    cell: float
    crs: str | None
    model: str
    weights: str
    device: str
    flop: int
    lazy: bool
    bytes_read: int
    reads: int
    codec: str | None
    bytes_written: int
    memory_input: int
    memory_output: int
    memory_working: int
    memory_weights: int
    seconds: float | None = None
    pixels_per_second: float | None = None
    timed: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def memory(self) -> int:
        """Bytes that a worker with one thread needs, beside Python and its libraries.

        The frames of a block are there twice: in the pieces of the chunks that they come from, which
        dask keeps until the block is done, and put together. Frames of blocks to come are there too,
        for a chunk is read for all of them.
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
        """Names and lines of what is told, for text and table alike."""
        days = " ".join(map(str, self.doy))
        frames = [
            f"{len(self.doy)} of {self.period}, made of {self.acquisitions} acquisitions",
            f"days of the year {days}",
        ]
        if self.empty_bins:
            fate = {"drop": "dropped", "nearest": "copies of their neighbours"}[self.empty]
            frames.append(f"without acquisitions, {fate}: {', '.join(self.empty_bins)}")
        side = self.patch_size // int(PIXEL)
        sizes = ", ".join(f"{dim}: {n:,}" for dim, n in zip(self.dims, self.shape, strict=True))
        chunk = " × ".join(f"{max(c):,}" for c in self.chunks)
        store = {None: "float32", "float16": "float16", "int8": "int8 and a float32 scale a cell"}[self.codec]
        read = f"{format_bytes(self.bytes_read)} " + (
            "once" if self.lazy else "at once, for the cube is not lazy"
        )
        if self.reads == 2:
            read = f"{format_bytes(self.bytes_read)} twice: for the statistics of per_tile_zscore, and to be embedded"
        rows = [
            ("model", [f"{self.model}, {self.weights} weights, device {self.device}"]),
            ("frames", frames),
            (
                "windows",
                [
                    f"{format_counts(self.windows)} of {self.tile} × {self.tile} pixels, "
                    + (f"{self.overlap} of them shared with the next, " if self.overlap else "")
                    + f"for {format_counts(self.pixels)} pixels"
                ],
            ),
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
            ("read", [read]),
            ("written", [f"{format_bytes(self.bytes_written)} at most: {store}, before compression"]),
            (
                "memory",
                [
                    f"{format_bytes(self.memory)} a worker: frames 2 × {format_bytes(self.memory_input)}, embeddings "
                    f"{format_bytes(self.memory_output)} and work {format_bytes(self.memory_working)} a task; weights "
                    f"{format_bytes(self.memory_weights)} a process"
                ],
            ),
        ]
        if self.seconds is not None:
            rate = f"{self.pixels_per_second:,.0f} pixels a second"
            rows.append(
                (
                    "time",
                    [f"{format_duration(self.seconds)} on this machine, {rate}, the model alone", self.timed],
                )
            )
        return rows + ([("warnings", list(self.warnings))] if self.warnings else [])

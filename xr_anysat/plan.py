"""`plan`: what an embedding will take, told before any pixel is read."""

from __future__ import annotations

import html
import inspect
import json
import math
import statistics
import textwrap
import time
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from xr_anysat.codecs import SCALE, check_codec, dtypes
from xr_anysat.config import option
from xr_anysat.cube import BANDS, PIXEL, Cube
from xr_anysat.embedding import Request, binary, embed, physical_memory, request, scaled, smaller, too_large
from xr_anysat.engine import (
    Settings,
    block_limits,
    block_windows,
    device_of,
    encode_block,
    pixel_bytes,
)
from xr_anysat.frames import FRAMES_ATTR, bin_bounds, parse_period
from xr_anysat.lattice import Axis, cell_chunks, halo, spans, together
from xr_anysat.model.cost import PARAMETERS, multiply_adds, working_bytes
from xr_anysat.model.spec import SIZES
from xr_anysat.model.weights import encoder_spec
from xr_anysat.radiometry import PASTIS

CALIBRATION_SECONDS = 2.0
"""How long windows are timed at least, beside loading the model."""

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
        read = f"{binary(self.bytes_read)} " + ("once" if self.lazy else "at once, for the cube is not lazy")
        if self.reads == 2:
            read = (
                f"{binary(self.bytes_read)} twice: for the statistics of per_tile_zscore, and to be embedded"
            )
        rows = [
            ("model", [f"{self.model}, {self.weights} weights, device {self.device}"]),
            ("frames", frames),
            (
                "windows",
                [
                    f"{_by(self.windows)} of {self.tile} × {self.tile} pixels, "
                    + (f"{self.overlap} of them shared with the next, " if self.overlap else "")
                    + f"for {_by(self.pixels)} pixels"
                ],
            ),
            ("patches", [f"{_by(self.patches)} of {self.patch_size} m, {side} × {side} pixels"]),
            ("blocks", [f"{_by(self.blocks)} = {math.prod(self.blocks):,}", *self.why]),
            (
                "output",
                [
                    f"{self.output}, ({sizes}) {self.dtype}",
                    f"chunks of {chunk}, cells of {self.cell:g} m, {self.crs or 'no CRS'}",
                ],
            ),
            ("compute", [f"{scaled(self.flop, 'FLOP')}, less where pixels are missing"]),
            ("read", [read]),
            ("written", [f"{binary(self.bytes_written)} at most: {store}, before compression"]),
            (
                "memory",
                [
                    f"{binary(self.memory)} a worker: frames 2 × {binary(self.memory_input)}, embeddings "
                    f"{binary(self.memory_output)} and work {binary(self.memory_working)} a task; weights "
                    f"{binary(self.memory_weights)} a process"
                ],
            ),
        ]
        if self.seconds is not None:
            rate = f"{self.pixels_per_second:,.0f} pixels a second"
            rows.append(
                ("time", [f"{_duration(self.seconds)} on this machine, {rate}, the model alone", self.timed])
            )
        return rows + ([("warnings", list(self.warnings))] if self.warnings else [])


def plan(
    cube: xr.DataArray | xr.Dataset,
    /,
    *args: Any,
    calibrate: bool = False,
    codec: str | None = None,
    **options: Any,
) -> Plan:
    """Say what embedding a cube will take, without reading a pixel of it.

    Parameters
    ----------
    cube, frames, period, ...
        As for :func:`embed`, with all of its options and defaults.
    calibrate : bool
        Run the model on windows of made-up pixels for some seconds, and tell the time that the whole
        takes on this machine. With the weights that were asked for, or random ones of the same size
        where these are not here yet: time does not depend on them.
    codec : {None, "int8", "float16"}
        How it is to be stored, see :func:`xr_anysat.to_zarr`.

    Returns
    -------
    Plan
        Frames, windows, patches, blocks and chunks; operations, bytes, memory and time; and warnings
        of what is absurd. Print it.

    Raises
    ------
    CubeError, CubeTypeError, OptionError, WeightsError
        As :func:`embed` does before it reads pixels.
    DeviceError
        With `calibrate`: the device is not there.

    Examples
    --------
    >>> import dask.array as da, pandas as pd, xarray as xr
    >>> import xr_anysat
    >>> cube = xr.DataArray(
    ...     da.zeros((12, 10, 2000, 3000), chunks=(1, 10, 1000, 1000), dtype="uint16"),
    ...     dims=("time", "band", "y", "x"),
    ...     coords={"time": pd.date_range("2022-01-15", periods=12, freq="MS"), "band": list(xr_anysat.BANDS)},
    ... )
    >>> p = cube.anysat.plan(frames=8, patch_size=40, tile=64, weights="random", codec="int8")
    >>> p.windows, p.blocks, p.shape, round(p.flop / 1e12)
    ((32, 47), (7, 10), (768, 500, 750), 777)
    >>> p.why[0]
    '5 × 5 windows a block: the most that make at least 64 blocks of the cube'
    """
    given = inspect.signature(embed).bind(cube, *args, **options)
    given.apply_defaults()
    check_codec(codec, np.float32)
    given.arguments["cube"] = _without_pixels(cube)
    asked, lazy = request(**given.arguments), _is_lazy(cube)

    made = asked.made(_one_pixel(asked.canonical))
    record = json.loads(made.attrs[FRAMES_ATTR])
    settings = asked.settings_for(made)
    dates = len(settings.doy)
    layout = _layout(asked, dates)
    frames_bytes = dates * len(BANDS) * asked.rows.size * asked.cols.size * 4
    own = asked.canonical.array
    acquisitions = own.sizes["time"] if asked.composed else record["acquisitions"]

    d, height, width = asked.shape
    cells = height * width if asked.pool is None else 1
    shape = asked.shape if asked.pool is None else (d,)
    chunks = (
        (d,),
        cell_chunks(asked.rows, layout.down, settings.cell),
        cell_chunks(asked.cols, layout.across, settings.cell),
    )
    stored = sum(t.itemsize * (1 if name == SCALE else d) for name, t in dtypes(codec, np.float32).items())
    published = _is_upstreams(option("model", given.arguments["model"]))
    found = Plan(
        acquisitions=acquisitions,
        period=record["period"],
        frame_dates=tuple(str(t)[:10] for t in made["time"].values),
        doy=settings.doy,
        n_obs=tuple(int(n) for n in made["n_obs"].values) if "n_obs" in made.coords else (),
        empty_bins=_empty_bins(made, record),
        empty=record["empty"],
        pixels=(asked.rows.size, asked.cols.size),
        tile=settings.tile,
        patch_size=settings.side * int(PIXEL),
        overlap=settings.overlap,
        windows=(_windows(asked.rows, settings), _windows(asked.cols, settings)),
        patches=(asked.rows.cells(settings.side)[1], asked.cols.cells(settings.side)[1]),
        blocks=(len(layout.down), len(layout.across)),
        block_windows=layout.windows,
        chunks=chunks[: len(shape)],
        why=(layout.why, _why_chunks(asked, layout, dates, lazy=lazy)),
        output=settings.output,
        dims=("D", "y", "x")[: len(shape)],
        shape=shape,
        dtype="float32",
        cell=settings.cell * PIXEL * own.sizes["x"] / asked.cols.size,
        crs=None if asked.geobox is None else _crs_title(asked.geobox.crs),
        model=settings.spec.size,
        weights=settings.spec.source,
        device=settings.spec.device,
        flop=2
        * _multiply_adds(
            settings, asked.rows.parts(layout.down), asked.cols.parts(layout.across), published=published
        ),
        lazy=lazy,
        bytes_read=acquisitions * len(BANDS) * own.sizes["y"] * own.sizes["x"] * own.dtype.itemsize,
        reads=2 if lazy and asked.reads_twice(frames_bytes) else 1,
        codec=codec,
        bytes_written=stored * cells,
        memory_input=dates * len(BANDS) * max(layout.down) * max(layout.across) * 4,
        memory_output=d * max(chunks[1]) * max(chunks[2]) * 4,
        memory_working=working_bytes(
            settings.spec.size, settings.output, dates=dates, side=settings.side, tile=settings.tile
        )
        + _tokens_bytes(settings, layout),
        memory_weights=PARAMETERS[settings.spec.size] * 4,
    )
    found = replace(found, warnings=tuple(_warnings(found, asked, published=published)))
    if not calibrate:
        return found
    each, timed = _time(asked, settings, layout, published=published)
    seconds = each * found.flop / 2
    return replace(found, seconds=seconds, pixels_per_second=math.prod(found.pixels) / seconds, timed=timed)


_cube, *_options = inspect.signature(embed).parameters.values()
_own = inspect.signature(plan)
plan.__signature__ = _own.replace(  # type: ignore[attr-defined]
    parameters=[
        _cube.replace(kind=inspect.Parameter.POSITIONAL_ONLY),
        *_options,
        _own.parameters["calibrate"],
        _own.parameters["codec"],
    ]
)


# ---------------------------------------------------------------------- metadata without pixels


def _is_lazy(cube: xr.DataArray | xr.Dataset) -> bool:
    """Whether any of the cube is dask's, as :func:`embed` sees it."""
    arrays = cube.data_vars.values() if isinstance(cube, xr.Dataset) else [cube]
    return any(a.chunks is not None for a in arrays)


def _without_pixels(cube: Any) -> Any:
    """The cube with zeros of dask's for all pixels that are in memory, or would be read to be looked at."""
    if isinstance(cube, xr.Dataset):
        return cube.assign({name: _without_pixels(a) for name, a in cube.data_vars.items() if a.ndim})
    if not isinstance(cube, xr.DataArray) or cube.chunks is not None:
        return cube
    import dask.array as da

    return cube.copy(deep=False, data=da.zeros(cube.shape, dtype=cube.dtype, chunks=-1))


def _crs_title(crs: Any) -> str:
    code = crs.to_epsg()
    return crs.proj.name if code is None else f"EPSG:{code}"


def _one_pixel(cube: Cube) -> Cube:
    """A cube of one pixel, which makes frames of the same dates."""
    import dask.array as da

    corner = cube.array.isel(y=slice(1), x=slice(1))
    zeros = da.zeros(corner.shape, dtype=corner.dtype, chunks=-1)
    return replace(cube, array=corner.copy(deep=False, data=zeros))


def _empty_bins(made: xr.DataArray, record: dict[str, Any]) -> tuple[str, ...]:
    """The bins of the period that hold no acquisition of their own."""
    if record["frames"] is None or not {"bin_start", "n_obs"} <= set(made.coords):
        return ()
    period = parse_period(record["period"])
    assert period is not None  # a record names its period
    observed = {
        pd.Timestamp(start)
        for start, n in zip(made["bin_start"].values, made["n_obs"].values, strict=True)
        if n
    }
    bounds = pairwise(bin_bounds(*period, record["frames"]))
    return tuple(f"{a.date()}/{b.date()}" for a, b in bounds if a not in observed)


# ---------------------------------------------------------------------- blocks


@dataclass(frozen=True)
class _Layout:
    """Windows on the side of a block, pixels of the blocks down and across, and why."""

    windows: int
    down: tuple[int, ...]
    across: tuple[int, ...]
    why: str


def _layout(asked: Request, dates: int) -> _Layout:
    """The blocks that :func:`xr_anysat.engine.encode` and `encode_overlapping` make."""
    s, rows, cols = asked.settings, asked.rows, asked.cols
    read, made = pixel_bytes(s, dates)
    pixel = max(read, made)
    n, stride = block_windows(rows, cols, s, dates), s.stride
    limit, at_least = block_limits(s)
    total = rows.cells(stride)[1] * cols.cells(stride)[1]
    what, head = "output" if made >= read else "input", f"{n} × {n} windows a block"
    if total == 1:
        why = "one block, for the cube is one window"
    elif (stride * (n + 1)) ** 2 * pixel > limit:
        size = (stride * n) ** 2 * pixel
        why = f"{head}: the most under {binary(limit)} of {what}"
        if size > limit:
            why = f"{head}, though the {what} of one is {binary(size)}: a window cannot be cut"
    elif total < at_least:
        why = f"{head}: there are {total} windows, and {at_least} blocks are wanted"
    else:
        why = f"{head}: the most that make at least {at_least} blocks of the cube"
    return _Layout(n, rows.blocks(stride, n), cols.blocks(stride, n), why)


def _why_chunks(asked: Request, layout: _Layout, dates: int, *, lazy: bool) -> str:
    """How the cube's own chunks go into the blocks."""
    if not lazy:
        frames = dates * len(BANDS) * asked.rows.size * asked.cols.size * 4
        return (
            f"the cube is not lazy: its blocks are made at once, and all {binary(frames)} of frames and "
            f"{binary(math.prod(asked.shape) * 4)} of embeddings are in memory beside them"
        )
    own = asked.canonical.array.chunksizes
    largest = ", ".join(f"{dim} {max(c)}" for dim, c in own.items())
    if asked.resize is not None:
        return f"the cube's chunks ({largest}) are put together, for it is resampled as a whole"
    # what is read for one block waits for the others
    waiting = f"the frames of one are {binary(dates * len(BANDS) * max(own['y']) * max(own['x']) * 4)}"
    if asked.settings.overlap:
        reach = halo(asked.settings.tile, asked.settings.overlap)
        beside = f"windows reach {reach} pixels into the blocks beside"
        return f"the cube's chunks ({largest}) are re-cut: {beside}; {waiting}"
    blocks = len(layout.down) * len(layout.across)
    whole = (len(layout.down) - _cut(layout.down, own["y"])) * (
        len(layout.across) - _cut(layout.across, own["x"])
    )
    if not _cut(own["y"], layout.down) and not _cut(own["x"], layout.across):
        return f"the cube's chunks ({largest}) fit: each goes into one block"
    if whole == blocks:
        return f"the cube's chunks ({largest}) fit: each block lies in one; {waiting}"
    row = asked.cols.size * dates * len(BANDS) * 4
    fit = asked.settings.stride * layout.windows
    held, less = _over(own["y"], layout.down), _over(Axis(0, asked.rows.size).blocks(fit, 1), layout.down)
    below = f", and up to {binary(held * row)} wait for the chunks below"
    mend = f" ({binary(less * row)} if chunks were {fit} pixels, or a multiple, on a side)"
    return (
        f"the cube's chunks ({largest}) are re-cut: {blocks - whole:,} blocks take pixels of several; {waiting}"
        f"{below if held else ''}{mend if less < held else ''}"
    )


def _over(pieces: tuple[int, ...], others: tuple[int, ...]) -> int:
    """The most that one of the `pieces` of an axis reaches over the last edge of the `others`.

    Examples
    --------
    >>> _over((512, 512), (276, 288, 288, 172)), _over((288, 288), (276, 288, 12)), _over((576,), (288, 288))
    (236, 12, 0)
    """
    ends = [0, *accumulate(others)]
    return max(end - ends[bisect_right(ends, end) - 1] for end in accumulate(pieces))


def _cut(pieces: tuple[int, ...], others: tuple[int, ...]) -> int:
    """How many pieces of an axis an edge of the `others` cuts.

    Examples
    --------
    >>> _cut((4, 4, 4), (4, 2, 6)), _cut((4, 2, 6), (4, 4, 4))
    (1, 1)
    """
    ends = list(accumulate(others))
    return sum(
        bisect_right(ends, start) < bisect_left(ends, stop)
        for start, stop in pairwise(accumulate(pieces, initial=0))
    )


# ---------------------------------------------------------------------- work


def _multiply_adds(settings: Settings, down: list[Axis], across: list[Axis], *, published: bool) -> int:
    """Multiply-adds of blocks that lie so down and across, all pixels observed.

    Where windows overlap, a pixel and a patch are computed once, and a window in each block that it meets.
    """
    squares = replace(settings, tile=settings.stride, overlap=0)
    pixels, patches, _ = _stages(squares, [together(down)], [together(across)], published=published)
    *_, windows = _stages(settings, down, across, published=published)
    return pixels + patches + windows


def _stages(
    settings: Settings, down: list[Axis], across: list[Axis], *, published: bool
) -> tuple[int, int, int]:
    """Multiply-adds of the model's three stages in all windows that the parts of the two axes meet."""
    pixels = patches = windows = 0
    for (height, p), n in _shapes(down, settings).items():
        for (width, q), m in _shapes(across, settings).items():
            one = multiply_adds(
                settings.spec.size, settings.output, dates=len(settings.doy), side=settings.side,
                pixels=height * width, patches=p * q, savings=not published,
            )  # fmt: skip
            pixels += n * m * one.pixels
            patches += n * m * one.patches
            windows += n * m * one.windows
    return pixels, patches, windows


def _shapes(parts: list[Axis], settings: Settings) -> Counter[tuple[int, int]]:
    """Pixels and patches that the windows of parts of an axis have, and how many windows have them."""
    return Counter(
        (s.stop - s.start, s.count)
        for part in parts
        for s in spans(together(parts), settings.tile, settings.side, stride=settings.stride, over=part)
    )


def _windows(axis: Axis, settings: Settings) -> int:
    """Windows along an axis."""
    return sum(1 for _ in spans(axis, settings.tile, settings.side, stride=settings.stride))


def _tokens_bytes(settings: Settings, layout: _Layout) -> int:
    """Bytes of the tokens that a block of overlapping windows waits for, and of its sums."""
    if not settings.overlap:
        return 0
    reach, dim = halo(settings.tile, settings.overlap), SIZES[settings.spec.size].dim
    own, near = (
        math.prod(max(sizes) + more for sizes in (layout.down, layout.across)) for more in (0, 2 * reach)
    )
    return 4 * dim * ((own + near) // settings.side**2 + (near if settings.output == "dense" else 0))


def _is_upstreams(model: Any) -> bool:
    """Whether a model computes all that was published, and takes complete windows only."""
    if isinstance(model, str):
        return False
    from xr_anysat.model.anysat import AnySat  # there is a module, so torch is imported already

    return not isinstance(model, AnySat)


def _warnings(found: Plan, asked: Request, *, published: bool) -> Iterator[str]:
    """What is absurd or impossible about a plan."""
    absurd, memory = too_large(asked, lazy=found.lazy), physical_memory()
    size = math.prod(found.shape) * 4
    if absurd is not None:
        yield absurd
    elif memory is not None and size > memory:
        yield (
            f"{binary(size)} of float32 do not fit into the {binary(memory)} of memory here: in place of .compute(), "
            f"write the embedding block by block {smaller(asked)}"
        )
    if memory is not None and found.memory > memory:
        yield (
            f"a worker needs {binary(found.memory)}, and there are {binary(memory)} of memory here: a smaller tile= or "
            "fewer frames= need less"
        )
    cut = sum(
        n
        for axis in (asked.rows, asked.cols)
        for (size, _), n in _shapes([axis], asked.settings).items()
        if size < asked.settings.tile
    )
    if published and cut:
        yield (
            "the module handed in as model= takes complete windows only, and the cube's ends cut some: crop the cube "
            f"to whole windows of {found.tile} pixels, with anchor='cube'"
        )


def _time(asked: Request, settings: Settings, layout: _Layout, *, published: bool) -> tuple[float, str]:
    """Seconds a multiply-add of the model on this machine, and what was timed."""
    spec, words = settings.spec, ""
    if spec.source == "official" and spec.sha256 is None:  # not on this machine
        spec = encoder_spec(spec.size, "random", spec.device, spec.precision)
        words = "; with random weights, for the official ones are not here yet, which takes as long"
    # overlapping windows do the same work, each stage as often as it is counted
    settings, device = replace(settings, spec=spec, overlap=0), device_of(spec)

    def run(rows: Axis, cols: Axis) -> float:
        pixels = rng.integers(1, 6000, (len(settings.doy), len(BANDS), rows.size, cols.size)).astype(
            np.float32
        )
        places = np.arange(rows.start, rows.stop), np.arange(cols.start, cols.stop)
        start = time.perf_counter()
        encode_block(pixels, PASTIS.array(), *places, settings=settings)
        return time.perf_counter() - start

    rng = np.random.default_rng(0)
    # a window on a CPU, where they go one by one; else a block of them, for forwards of full size
    windows = 1 if device == "cpu" else layout.windows
    rows, cols = (_largest(axis, settings, windows) for axis in (asked.rows, asked.cols))
    # the first forward is slow, so it is a small one; what is called like upstream's takes whole windows only
    small = settings.tile if published else settings.side
    run(*(Axis(axis.start, min(axis.size, small)) for axis in (rows, cols)))
    seconds: list[float] = []
    while sum(seconds) < CALIBRATION_SECONDS:
        seconds.append(run(rows, cols))
    work = _multiply_adds(settings, [rows], [cols], published=published)
    what = f"{rows.size} × {cols.size} pixels and {len(settings.doy)} frames, timed {len(seconds)} × on {device}{words}"
    return statistics.median(seconds) / work, what


def _largest(axis: Axis, settings: Settings, windows: int) -> Axis:
    """The first of an axis' largest windows, and the windows after it up to so many."""
    first = max(spans(axis, settings.tile, settings.side), key=lambda s: s.stop - s.start)
    return Axis(first.start, min(axis.stop, first.start + windows * settings.tile) - first.start)


# ---------------------------------------------------------------------- words


def _by(counts: tuple[int, int]) -> str:
    return " × ".join(f"{n:,}" for n in counts)


def _duration(seconds: float) -> str:
    """Seconds in words, to two units.

    Examples
    --------
    >>> _duration(0.4), _duration(75), _duration(19_300), _duration(400_000)
    ('0.4 s', '1 min 15 s', '5 h 22 min', '4 d 15 h')
    """
    if seconds < 60:
        return f"{seconds:.2g} s"
    units = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    (big, unit), (small, part) = next(pair for pair in pairwise(units) if seconds >= pair[0][0])
    count, rest = divmod(round(seconds / small), big // small)
    return f"{count} {unit} {rest} {part}"

"""`plan`: the size, work and memory of an embedding, computed before any pixel is read."""

from __future__ import annotations

import inspect
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, Unpack

import numpy as np
import pandas as pd
import xarray as xr

from xr_anysat.config import FRAMES
from xr_anysat.cube.frames_record import frames_record
from xr_anysat.cube.normalization import PASTIS
from xr_anysat.cube.periods import bin_bounds, parse_period
from xr_anysat.cube.reading import Cube
from xr_anysat.embedding.blocks import BlockLayout, block_layout, encode_block, frame_bytes
from xr_anysat.embedding.embed import embed
from xr_anysat.embedding.lattice import PixelRange, spans
from xr_anysat.embedding.options import (
    EmbedKeywords,
    EmbedOptions,
    ResolvedOptions,
    resolve_options,
    size_warning,
    storage_hint,
)
from xr_anysat.embedding.plan_report import Plan
from xr_anysat.embedding.settings import BlockSpec
from xr_anysat.embedding.workload import (
    count_windows,
    explain_blocks,
    explain_chunks,
    token_bytes,
    total_multiply_adds,
    window_shapes,
)
from xr_anysat.errors import OptionError
from xr_anysat.model.cost import PARAMETERS, working_bytes
from xr_anysat.model.weights import device_of, encoder_spec
from xr_anysat.shared.grid import crs_title
from xr_anysat.shared.sensor import S2
from xr_anysat.shared.text import format_bytes, physical_memory
from xr_anysat.store.codecs import CODECS, check_codec

CALIBRATION_SECONDS = 2.0
"""Least time that windows are timed for, without loading the model."""


def plan(
    cube: xr.DataArray | xr.Dataset,
    /,
    frames: int | None = FRAMES,
    *,
    calibrate: bool = False,
    codec: str | None = None,
    **options: Unpack[EmbedKeywords],
) -> Plan:
    """Report what embedding a cube takes, without reading any of its pixels.

    Parameters
    ----------
    cube, frames, period, ...
        As for :func:`embed`, with all of its options and defaults.
    calibrate : bool
        Run the model on windows of random pixels for some seconds, and report the time that the cube
        takes on this machine. It uses the requested weights, or random ones of the same size if they
        are not on this machine yet: time does not depend on them.
    codec : {None, "int8", "float16"}
        Codec of the store, see :func:`xr_anysat.to_zarr`.

    Returns
    -------
    Plan
        Frames, windows, patches, blocks and chunks; operations, bytes, memory and time; and warnings
        about problems. Print it.

    Raises
    ------
    CubeError, CubeTypeError, OptionError, WeightsError
        As :func:`embed` does before it reads pixels.
    DeviceError
        With `calibrate`, if the device is not available.

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
    '5 × 5 windows per block: the most that leave at least 64 blocks'
    """
    if "by" in options:
        raise OptionError(
            "plan() of a series: expected one period, cube.anysat.plan(period='2022'); a series takes as much per step"
        )
    requested = EmbedOptions(frames, **options)
    check_codec(codec, np.float32)
    resolved, lazy = resolve_options(_without_pixels(cube), requested), _is_lazy(cube)

    composed = resolved.compose(_one_pixel(resolved.canonical))
    record = frames_record(composed)
    settings = resolved.with_days(composed)
    dates = len(settings.doy)
    layout = block_layout(resolved.rows, resolved.cols, settings, dates)
    own = resolved.canonical.array
    acquisitions = own.sizes["time"] if resolved.composed else record["acquisitions"]

    d, height, width = resolved.shape
    cells = height * width if resolved.pool is None else 1
    shape = resolved.shape if resolved.pool is None else (d,)
    chunks = ((d,), layout.down_cells, layout.across_cells)
    published = is_upstream(requested.configured().model)
    result = Plan(
        acquisitions=acquisitions,
        period=record["period"],
        frame_dates=tuple(str(t)[:10] for t in composed["time"].values),
        doy=settings.doy,
        n_obs=tuple(int(n) for n in composed["n_obs"].values) if "n_obs" in composed.coords else (),
        empty_bins=_empty_bins(composed, record),
        empty=record["empty"],
        pixels=(resolved.rows.size, resolved.cols.size),
        tile=settings.tile,
        patch_size=settings.side * int(S2.pixel_size),
        overlap=settings.overlap,
        windows=(count_windows(resolved.rows, settings), count_windows(resolved.cols, settings)),
        patches=(
            resolved.rows.covering_cells(settings.side)[1],
            resolved.cols.covering_cells(settings.side)[1],
        ),
        blocks=(len(layout.down), len(layout.across)),
        block_windows=layout.windows,
        chunks=chunks[: len(shape)],
        why=(explain_blocks(resolved, layout, dates), explain_chunks(resolved, layout, dates, lazy=lazy)),
        output=settings.output,
        dims=("D", "y", "x")[: len(shape)],
        shape=shape,
        dtype="float32",
        cell=settings.cell * S2.pixel_size * own.sizes["x"] / resolved.cols.size,
        crs=None if resolved.geobox is None else crs_title(resolved.geobox.crs),
        model=settings.spec.size,
        weights=str(settings.spec.source),
        device=settings.spec.device,
        flop=2
        * total_multiply_adds(
            settings,
            resolved.rows.parts(layout.down),
            resolved.cols.parts(layout.across),
            published=published,
        ),
        lazy=lazy,
        bytes_read=acquisitions * len(S2.bands) * own.sizes["y"] * own.sizes["x"] * own.dtype.itemsize,
        reads=2
        if lazy and resolved.needs_second_pass(frame_bytes(dates, resolved.rows.size * resolved.cols.size))
        else 1,
        codec=codec,
        bytes_written=CODECS[codec].cell_bytes(d) * cells,
        memory_input=frame_bytes(dates, max(layout.down) * max(layout.across)),
        memory_output=d * max(chunks[1]) * max(chunks[2]) * 4,
        memory_working=working_bytes(
            settings.spec.size, settings.output, dates=dates, side=settings.side, tile=settings.tile
        )
        + token_bytes(settings, layout),
        memory_weights=PARAMETERS[settings.spec.size] * 4,
    )
    result = replace(result, warnings=tuple(_problems(result, resolved, published=published)))
    if not calibrate:
        return result
    seconds_each, timed = _time_model(resolved, settings, layout, published=published)
    seconds = seconds_each * result.flop / 2
    return replace(result, seconds=seconds, pixels_per_second=math.prod(result.pixels) / seconds, timed=timed)


_cube, *_options = inspect.signature(embed).parameters.values()

_own = inspect.signature(plan)

plan.__signature__ = _own.replace(  # type: ignore[attr-defined]
    parameters=[
        _cube.replace(kind=inspect.Parameter.POSITIONAL_ONLY),
        *(p for p in _options if p.name != "by"),
        _own.parameters["calibrate"],
        _own.parameters["codec"],
    ]
)


# ---------------------------------------------------------------------- metadata without pixels


def _is_lazy(cube: xr.DataArray | xr.Dataset) -> bool:
    """Whether any array of the cube is a dask array, so that :func:`embed` treats it as lazy."""
    arrays = cube.data_vars.values() if isinstance(cube, xr.Dataset) else [cube]
    return any(a.chunks is not None for a in arrays)


def _without_pixels(cube: Any) -> Any:
    """Replace all arrays that are not lazy by dask arrays of zeros, so that nothing is read."""
    if isinstance(cube, xr.Dataset):
        return cube.assign({name: _without_pixels(a) for name, a in cube.data_vars.items() if a.ndim})
    if not isinstance(cube, xr.DataArray) or cube.chunks is not None:
        return cube
    import dask.array as da

    return cube.copy(deep=False, data=da.zeros(cube.shape, dtype=cube.dtype, chunks=-1))


def _one_pixel(cube: Cube) -> Cube:
    """Reduce the cube to one pixel, whose frames have the same dates."""
    import dask.array as da

    corner = cube.array.isel(y=slice(1), x=slice(1))
    zeros = da.zeros(corner.shape, dtype=corner.dtype, chunks=-1)
    return replace(cube, array=corner.copy(deep=False, data=zeros))


def _empty_bins(composed: xr.DataArray, record: dict[str, Any]) -> tuple[str, ...]:
    """Return the bins of the period that contain no acquisition."""
    if record["frames"] is None or not {"bin_start", "n_obs"} <= set(composed.coords):
        return ()
    period = parse_period(record["period"])
    assert period is not None  # every record has a period
    starts, counts = composed["bin_start"].values, composed["n_obs"].values
    observed = {pd.Timestamp(start) for start, n in zip(starts, counts, strict=True) if n}
    bounds = pairwise(bin_bounds(*period, record["frames"]))
    return tuple(f"{a.date()}/{b.date()}" for a, b in bounds if a not in observed)


def is_upstream(model: Any) -> bool:
    """Whether a model is a module like upstream's: without our savings, and for complete windows only."""
    if isinstance(model, str):
        return False
    from xr_anysat.model.anysat import AnySat

    return not isinstance(model, AnySat)


def _problems(result: Plan, resolved: ResolvedOptions, *, published: bool) -> Iterator[str]:
    """Yield the problems of a plan."""
    warning, memory = size_warning(resolved, lazy=result.lazy), physical_memory()
    size = math.prod(result.shape) * 4
    if warning is not None:
        yield warning
    elif memory is not None and size > memory:
        yield (
            f"{format_bytes(size)} of float32 do not fit into the {format_bytes(memory)} of memory here: instead of "
            f".compute(), write the embedding block by block {storage_hint(resolved)}"
        )
    if memory is not None and result.memory > memory:
        yield (
            f"a worker needs {format_bytes(result.memory)}, and this machine has {format_bytes(memory)} of memory: "
            "use a smaller tile= or fewer frames="
        )
    cut = sum(
        n
        for axis in (resolved.rows, resolved.cols)
        for (size, _), n in window_shapes([axis], resolved.settings).items()
        if size < resolved.settings.tile
    )
    if published and cut:
        yield (
            "the module passed as model= takes complete windows only, and the ends of the cube cut some: crop the "
            f"cube to whole windows of {result.tile} pixels, with anchor='cube'"
        )


def _time_model(
    resolved: ResolvedOptions, settings: BlockSpec, layout: BlockLayout, *, published: bool
) -> tuple[float, str]:
    """Return the seconds per multiply-add of the model on this machine, and a description of the measurement."""
    spec, note = settings.spec, ""
    if spec.source.kind == "official" and spec.sha256 is None:  # not on this machine
        spec = encoder_spec(spec.size, "random", spec.device, spec.precision)
        note = "; with random weights, which take as long, because the official ones are not on this machine"
    # the stages of overlapping windows do the same work, and the plan counts how often each runs
    settings, device = replace(settings, spec=spec, overlap=0), device_of(spec)

    def run(rows: PixelRange, cols: PixelRange) -> float:
        shape = len(settings.doy), len(S2.bands), rows.size, cols.size
        pixels = rng.integers(1, 6000, shape).astype(np.float32)
        positions = np.arange(rows.start, rows.stop), np.arange(cols.start, cols.stop)
        start = time.perf_counter()
        encode_block(pixels, PASTIS.array(), *positions, settings=settings)
        return time.perf_counter() - start

    rng = np.random.default_rng(0)
    # one window on a CPU, which computes them one by one; else a block of them, for full batches
    windows = 1 if device == "cpu" else layout.windows
    rows, cols = (_largest_windows(axis, settings, windows) for axis in (resolved.rows, resolved.cols))
    # the first pass is slow, so it is small; a module like upstream's takes complete windows only
    small = settings.tile if published else settings.side
    run(*(PixelRange(axis.start, min(axis.size, small)) for axis in (rows, cols)))
    seconds: list[float] = []
    while sum(seconds) < CALIBRATION_SECONDS:
        seconds.append(run(rows, cols))
    work = total_multiply_adds(settings, [rows], [cols], published=published)
    timed = f"{rows.size} × {cols.size} pixels and {len(settings.doy)} frames, timed {len(seconds)} × on {device}{note}"
    return statistics.median(seconds) / work, timed


def _largest_windows(axis: PixelRange, settings: BlockSpec, windows: int) -> PixelRange:
    """Return the range of up to this many adjacent windows, starting with the first of the largest."""
    first = max(spans(axis, settings.tile, settings.side), key=lambda s: s.stop - s.start)
    return PixelRange(first.start, min(axis.stop, first.start + windows * settings.tile) - first.start)

"""Compose the frames of a cube: the period is cut into equal bins, and each bin gives one frame.

The result is again a cube ``(time, band, y, x)``, float32 with NaN for missing values, with the coords ``doy``,
``n_obs``, ``bin_start`` and ``bin_end`` along time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, product
from typing import Any, TypeGuard

import bottleneck
import numpy as np
import pandas as pd
import xarray as xr

from xr_anysat.config import FRAMES, option
from xr_anysat.cube.frames_record import (
    FRAMES_ATTR,
    MAX_FRAMES,
    SOURCE_ATTRS,
    check_frame_times,
    frames_record,
)
from xr_anysat.cube.periods import Period, bin_bounds, day_of_year, parse_period, recorded_period
from xr_anysat.cube.reading import Cube, blank_missing, read_cube
from xr_anysat.errors import CubeError, CubeTypeError, OptionError
from xr_anysat.shared.graph import RECHUNK, TASK_BYTES, even_chunks
from xr_anysat.shared.sensor import S2
from xr_anysat.shared.values import check_choice, check_whole_number, is_number

EMPTY = ("drop", "nearest")

DOY = ("midpoint", "observed")

STRIP_BYTES = 1 << 20
"""Bytes of observations composed at a time, few enough to fit with all temporary arrays into a processor's cache."""


def frames(
    cube: xr.DataArray | xr.Dataset,
    n: int | None = FRAMES,
    *,
    period: Period = None,
    reduce: str = "median",
    empty: str = "drop",
    doy: str = "midpoint",
    doy_base: int = 0,
    bands: Sequence[str] | None = None,
    nodata: float | None = None,
    fill_value: float | None = None,
) -> xr.DataArray:
    """Compose a cube into `n` frames with days of the year.

    The period ``[start, end)`` of ``days`` days is cut at ``start + days·i // n``. A frame is composed per band and
    pixel from the valid observations of its bin.

    Parameters
    ----------
    cube : DataArray or Dataset
        Sentinel-2 digital numbers, see :func:`xr_anysat.embed`.
    n : int or None
        Number of bins. None: every acquisition is a frame, with its own date.
    period : str or (start, end), optional
        ``"2022"``, ``"2022-06"``, ``"2022-04-01/2022-10-01"`` or a pair of dates; the end is
        exclusive. Default: the period that the cube was loaded for, else from its first to its
        last day. Acquisitions outside of it are not used.
    reduce : {"median", "mean", "clearest"}
        How observations are combined. ``clearest`` takes all bands of the observation with the lowest
        blue (B2), the band most sensitive to haze and cloud, so that the spectrum is one that was
        observed. Mask cloud shadows first.
    empty : {"drop", "nearest"}
        A bin without any acquisition is dropped, or gets a copy of the frame nearest in time (the
        earlier of two), dated at the midpoint of the bin.
    doy : {"midpoint", "observed"}
        Date of a frame: the middle day of its bin (``bin_start + days_of_bin // 2``), or the median
        day of its acquisitions.
    doy_base : {0, 1}
        Day of the year of 1 January. With 0, days run from 0 to 364 as in upstream's documentation (31
        December of a leap year is also 364). With 1 they are ``tm_yday``, 1 to 366, as in most of
        upstream's training loaders.
    bands, nodata
        See :func:`xr_anysat.cube.reading.read_cube`.
    fill_value : float, optional
        Digital number for pixels without an observation, which then count as observed. Default:
        missing values stay missing.

    Returns
    -------
    DataArray, (time, band, y, x) float32
        Lazy if `cube` is. Coords along time: ``doy`` (days), ``n_obs`` (acquisitions in the bin),
        ``bin_start``, ``bin_end``. ``attrs["anysat_frames"]`` is JSON with the options and acquisitions.

    Raises
    ------
    OptionError
        If an option is impossible, or the period is empty.
    CubeError
        If the cube cannot be read, or has no acquisition in the period.

    Examples
    --------
    >>> import numpy as np, pandas as pd, xarray as xr
    >>> import xr_anysat
    >>> cube = xr.DataArray(
    ...     np.full((12, 10, 4, 4), 1000, "uint16"), dims=("time", "band", "y", "x"),
    ...     coords={"time": pd.date_range("2022-01-15", periods=12, freq="MS"), "band": list(xr_anysat.BANDS)},
    ... )
    >>> f = xr_anysat.frames(cube, 8, period="2022")
    >>> f.doy.values
    array([ 22,  68, 113, 159, 205, 250, 296, 342])
    >>> f.n_obs.values
    array([1, 2, 1, 2, 1, 1, 2, 1])
    """
    check_not_embedding(cube)
    options = CompositeOptions(option("frames", n), period, reduce, empty, doy, doy_base, fill_value)
    if check_composed(cube, options, bands=bands, nodata=nodata):
        return cube
    return compose(read_cube(cube, bands=bands, nodata=nodata), options)


@dataclass(frozen=True)
class CompositeOptions:
    """The options of :func:`frames`, checked before the cube is read."""

    frames: int | None
    period: Period = None
    reduce: str = "median"
    empty: str = "drop"
    doy: str = "midpoint"
    doy_base: int = 0
    fill_value: float | None = None

    def __post_init__(self) -> None:
        n, fill = self.frames, self.fill_value
        if n is not None:
            n = check_whole_number("frames", n, 1, MAX_FRAMES, hint=", or None for every acquisition")
            object.__setattr__(self, "frames", n)  # NumPy's integers have no JSON
        for name, known in (("reduce", tuple(REDUCE_MODES)), ("empty", EMPTY), ("doy", DOY)):
            value = getattr(self, name)
            check_choice(name, value, known)
            if n is None and value != known[0]:
                raise OptionError(
                    f"{name}={value!r} has no meaning with frames=None: pass a number of frames, or leave {name}= out"
                )
        if isinstance(self.doy_base, bool) or self.doy_base not in (0, 1):
            raise OptionError(
                f"doy_base={self.doy_base!r}: expected 0 (1 January is day 0) or 1 (it is day 1)"
            )
        object.__setattr__(self, "doy_base", int(self.doy_base))
        if fill is not None:
            if not is_number(fill):
                raise OptionError(
                    f"fill_value={fill!r}: expected a finite digital number, or None to leave gaps out"
                )
            object.__setattr__(self, "fill_value", float(fill))
        parse_period(self.period)


def check_not_embedding(cube: Any) -> None:
    """Refuse an embedding cube where a Sentinel-2 cube is expected."""
    if isinstance(cube, xr.DataArray | xr.Dataset) and "D" in cube.dims:
        raise CubeTypeError(
            f"dims {tuple(cube.dims)} are those of an embedding cube: expected a Sentinel-2 cube (time, band, y, x); "
            "call this on the cube that was embedded"
        )


def check_composed(
    cube: xr.DataArray | xr.Dataset,
    options: CompositeOptions,
    *,
    bands: Sequence[str] | None = None,
    nodata: float | None = None,
) -> TypeGuard[xr.DataArray]:
    """Return whether `cube` is a result of :func:`frames`, and check that it can be used as it is.

    Raises
    ------
    OptionError
        If it is, and `options` request another composition, or `bands` or `nodata` another reading.
    CubeError
        If it is, but its bands or days were lost or changed.
    """
    if FRAMES_ATTR not in getattr(cube, "attrs", {}):
        return False
    record = frames_record(cube)
    recorded, base = record["frames"], record["doy_base"]
    defaults = CompositeOptions(options.frames, doy_base=options.doy_base)
    differs = options != defaults or options.frames not in (None, recorded)
    if differs or bands is not None or nodata is not None:
        raise OptionError(
            f"this cube is already composed (frames={recorded}, {cube.sizes.get('time', 1)} of them observed): pass "
            "frames=None without bands=, nodata= and options of composing, or start from the acquisitions"
        )
    if options.doy_base not in (0, base):
        raise OptionError(
            f"this cube was composed with doy_base={base}, not {options.doy_base}: pass doy_base={base}, or compose "
            "the acquisitions again"
        )
    original = isinstance(cube, xr.DataArray) and cube.dims == ("time", "band", "y", "x")
    if not original or list(cube["band"].values) != list(S2.bands):
        raise CubeError(
            f"composed frames as a {type(cube).__name__} with dims {tuple(cube.dims)}, or with other bands than "
            f"{', '.join(S2.bands)}: pass them as frames() returned them, or drop attrs['anysat_frames'] to read them "
            "as a cube of acquisitions"
        )
    if cube.sizes["time"] > (recorded or record["acquisitions"]):
        raise CubeError(
            f"{cube.sizes['time']} composed frames, but a record of {recorded or record['acquisitions']}: it "
            "seems that several results of frames() were joined. Drop attrs['anysat_frames'] and pass frames=None to "
            "read them as a cube of acquisitions"
        )
    check_frame_times(cube)
    if "n_obs" in cube.coords and cube["n_obs"].dtype.kind not in "iu":
        raise CubeError(
            f"composed frames with an 'n_obs' coordinate of dtype {cube['n_obs'].dtype}: expected whole numbers; drop "
            "it with cube.drop_vars('n_obs')"
        )
    doy = cube.coords.get("doy")
    if doy is None or doy.dims != ("time",) or not set(doy.values.tolist()) <= set(range(367)):
        raise CubeError(
            f"composed frames {'without their' if doy is None else 'with an invalid'} 'doy' coordinate: restore it "
            "with cube.assign_coords(doy=('time', days)), days from 0 to 366, or drop attrs['anysat_frames'] to read "
            "them as a cube of acquisitions"
        )
    return True


# ---------------------------------------------------------------------- dates


@dataclass(frozen=True)
class Bin:
    """A bin of the period: its days [start, end), the date of its frame, and its acquisitions [first, stop)."""

    start: pd.Timestamp
    end: pd.Timestamp
    date: pd.Timestamp
    first: int
    stop: int


def plan_bins(
    times: np.ndarray, options: CompositeOptions, recorded: str | None
) -> tuple[list[Bin], dict[str, Any]]:
    """Assign acquisitions (sorted `times`) to bins; return the bins that give frames, and a record of them."""
    n = options.frames
    days = pd.DatetimeIndex(times)
    whole = (days[0].normalize(), days[-1].normalize() + pd.Timedelta(days=1))
    start, end = parse_period(options.period) or parse_period(recorded) or whole
    inside = (days >= start) & (days < end)
    if not inside.any():
        raise CubeError(
            f"no acquisition between {start.date()} and {end.date()} (exclusive): those of the cube run from "
            f"{days[0].date()} to {days[-1].date()}. Pass a period= that contains some of them, or load that period"
        )
    record = {
        **asdict(options),
        "period": f"{start.date()}/{end.date()}",
        "acquisitions": int(inside.sum()),
        "outside_period": int((~inside).sum()),
        "dates": [str(d.date()) for d in days[inside]],
        "dates_outside": [str(d.date()) for d in days[~inside]],
    }
    if n is None:
        day = pd.Timedelta(days=1)
        chosen = map(int, np.flatnonzero(inside))
        return [
            Bin(days[i].normalize(), days[i].normalize() + day, days[i], i, i + 1) for i in chosen
        ], record
    bounds = bin_bounds(start, end, n)
    edges = [int(e) for e in np.searchsorted(days, pd.DatetimeIndex(bounds))]
    bins = []
    for (a, b), (i, j) in zip(pairwise(bounds), pairwise(edges), strict=True):
        date = a + pd.Timedelta(days=(b - a).days // 2)
        if options.doy == "observed" and j > i:
            date = pd.Timestamp(days[i:j].to_series().median()).normalize()
        bins.append(Bin(a, b, date, i, j))
    observed = [x for x in bins if x.stop > x.first]
    record["empty_bins"] = n - len(observed)
    if options.empty == "drop":
        return observed, record
    return [x if x.stop > x.first else _nearest_observed(x, observed) for x in bins], record


def _nearest_observed(empty: Bin, observed: list[Bin]) -> Bin:
    """Return the bin `empty` with the acquisitions of the nearest observed bin (the earlier of two)."""
    nearest = min(observed, key=lambda x: (abs(x.date - empty.date), x.start))
    return replace(empty, first=nearest.first, stop=nearest.stop)


# ---------------------------------------------------------------------- ways to reduce


def _median(values: np.ndarray) -> np.ndarray:
    return bottleneck.nanmedian(values, axis=0)[None] if len(values) > 1 else values


def _mean(values: np.ndarray) -> np.ndarray:
    if len(values) == 1:
        return values
    observed = np.isfinite(values)
    count = observed.sum(0, keepdims=True)
    # in float64 the sum of whole numbers is exact in any order
    total = np.where(observed, values, 0).sum(0, keepdims=True, dtype=np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)


def _clearest(values: np.ndarray) -> np.ndarray:
    complete = np.isfinite(values).all(1, keepdims=True)
    blue = np.where(complete, values[:, S2.bands.index("B2")][:, None], np.inf)
    best = np.broadcast_to(blue.argmin(0, keepdims=True), (1, *values.shape[1:]))
    return np.take_along_axis(np.where(complete, values, np.nan), best, 0)


@dataclass(frozen=True)
class ReduceMode:
    """A way to combine the observations of a bin.

    Attributes
    ----------
    combine : callable
        Combines observations (n, band, y, x), float32 with NaN where missing, into one frame (1, band, y, x).
        n is at least 1. It is called with some of the pixels at a time.
    all_bands : bool
        Whether it needs all bands of a pixel at once.
    """

    combine: Callable[[np.ndarray], np.ndarray]
    all_bands: bool = False


REDUCE_MODES = {
    "median": ReduceMode(_median),
    "mean": ReduceMode(_mean),
    "clearest": ReduceMode(_clearest, all_bands=True),
}
"""The values of ``reduce=``; the first is the default."""


# ---------------------------------------------------------------------- pixels


def compose(cube: Cube, options: CompositeOptions) -> xr.DataArray:
    """Compose the frames of a canonical cube; see :func:`frames`."""
    array = cube.array
    bins, record = plan_bins(array["time"].values, options, recorded_period(array))
    own = [x.stop > x.first and x.start <= pd.Timestamp(array["time"].values[x.first]) < x.end for x in bins]
    dates = [x.date for x in bins]
    along_time = {
        "doy": day_of_year(dates, options.doy_base),
        "n_obs": np.array(
            [x.stop - x.first if observed else 0 for x, observed in zip(bins, own, strict=True)]
        ),
        "bin_start": pd.DatetimeIndex([x.start for x in bins]),
        "bin_end": pd.DatetimeIndex([x.end for x in bins]),
    }
    out = xr.DataArray(
        _compose_frames(array.data, bins, options.reduce, cube.nodata, options.fill_value),
        dims=("time", "band", "y", "x"),
        coords={
            **{k: c for k, c in array.coords.items() if "time" not in c.dims},
            "time": pd.DatetimeIndex(dates),
            **{k: ("time", v) for k, v in along_time.items()},
        },
        name=array.name,
    )
    out.attrs = {FRAMES_ATTR: json.dumps(record), "units": "DN", "nodata": float("nan")}
    out.attrs |= {k: array.attrs[k] for k in SOURCE_ATTRS if k in array.attrs}
    if "spatial_ref" in out.coords:
        out.encoding["grid_mapping"] = "spatial_ref"
    return out


def _compose_frames(data: Any, bins: list[Bin], reduce: str, nodata: float, fill_value: float | None) -> Any:
    """Compose the frames (T, band, y, x) of a NumPy or dask array (time, band, y, x)."""
    if isinstance(data, np.ndarray):
        composed = np.empty((len(bins), *data.shape[1:]), np.float32)
        for frame, x in zip(composed, bins, strict=True):
            frame[None] = compose_frame([data[x.first : x.stop]], reduce, nodata, fill_value)
        return composed
    import dask.array as da
    from dask.base import tokenize
    from dask.highlevelgraph import HighLevelGraph

    data = _fit_task(data, bins, all_bands=REDUCE_MODES[reduce].all_bands)
    spans = [(x.first, x.stop) for x in bins]
    name = f"anysat-frames-{tokenize(data.name, spans, reduce, nodata, fill_value)}"
    graph: dict[Any, Any] = {}
    for i, x in enumerate(bins):
        first, stop, start, _ = _chunks_met(x, data.chunks[0])
        span = slice(x.first - start, x.stop - start)
        for place in product(*(range(len(c)) for c in data.chunks[1:])):
            keys = [(data.name, t, *place) for t in range(first, stop)]
            graph[(name, i, *place)] = (_compose_chunks, keys, span, reduce, nodata, fill_value)
    layers = HighLevelGraph.from_collections(name, graph, dependencies=[data])
    chunks = ((1,) * len(bins), *data.chunks[1:])
    return da.Array(layers, name, chunks=chunks, meta=np.empty((0,) * 4, np.float32))


def _compose_chunks(
    chunks: list[np.ndarray], span: slice, reduce: str, nodata: float, fill_value: float | None
) -> np.ndarray:
    """Compose one frame of the dates `span` of chunks that follow each other in time."""
    parts, start = [], 0
    for chunk in chunks:
        parts.append(chunk[max(0, span.start - start) : max(0, span.stop - start)])
        start += len(chunk)
    return compose_frame(parts, reduce, nodata, fill_value)


def compose_frame(
    parts: Sequence[np.ndarray], reduce: str, nodata: float, fill_value: float | None
) -> np.ndarray:
    """Compose one frame (1, band, y, x) float32 of observations (n, band, y, x) that follow each other in time.

    It takes a few rows at a time, because temporary arrays are several times the size of the observations.
    """
    _, bands, height, width = parts[0].shape
    frame = np.empty((1, bands, height, width), np.float32)
    step = max(1, STRIP_BYTES * height // max(1, sum(p.nbytes for p in parts)))
    for top in range(0, height, step):
        rows = np.s_[:, :, top : top + step]
        values = parts[0][rows] if len(parts) == 1 else np.concatenate([p[rows] for p in parts])
        strip = REDUCE_MODES[reduce].combine(blank_missing(values, nodata))
        frame[rows] = (
            strip if fill_value is None else np.where(np.isfinite(strip), strip, np.float32(fill_value))
        )
    return frame


def _chunks_met(x: Bin, sizes: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Find the chunks [first, stop) along time with the acquisitions of a bin, and their dates [start, end)."""
    starts = np.cumsum([0, *sizes])
    first = int(np.searchsorted(starts, x.first, side="right")) - 1
    stop = int(np.searchsorted(starts, x.stop, side="left"))
    return first, stop, int(starts[first]), int(starts[stop])


def _fit_task(data: Any, bins: list[Bin], *, all_bands: bool) -> Any:
    """Rechunk a dask array so that neither the observations of a frame nor the frame exceed the limit of a task."""
    if all_bands:
        data = data.rechunk({1: -1}, method=RECHUNK)
    # a chunk of several dates is read whole, even if a bin needs only some of them
    met = [_chunks_met(x, data.chunks[0]) for x in bins]
    dates = max(end - start for _, _, start, end in met)
    bands, height, width = (max(c) for c in data.chunks[1:])
    pixel_bytes = bands * max(dates * data.dtype.itemsize, 4)
    if pixel_bytes * height * width <= TASK_BYTES:
        return data
    side = max(1, math.isqrt(TASK_BYTES // pixel_bytes))
    sides = {2: even_chunks(data.chunks[2], side), 3: even_chunks(data.chunks[3], side)}
    return data.rechunk(sides, method=RECHUNK)

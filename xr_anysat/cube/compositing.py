"""T frames of a cube: equal bins of a period, each composed of what was observed in it.

The result is itself a cube ``(time, band, y, x)``, float32 with NaN for what is missing, with the
coords ``doy``, ``n_obs``, ``bin_start`` and ``bin_end`` along time.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from typing import Any, TypeGuard

import bottleneck
import numpy as np
import pandas as pd
import xarray as xr

from xr_anysat.config import FRAMES, option
from xr_anysat.cube.reading import Cube, blank_missing, read_cube
from xr_anysat.errors import CubeError, CubeTypeError, OptionError
from xr_anysat.shared.graph import FRAMES_LAYER, RECHUNK, TASK_BYTES, even_chunks
from xr_anysat.shared.sensor import S2
from xr_anysat.shared.values import check_choice, check_whole_number, is_number

Period = str | Sequence[Any] | None

REDUCERS = ("median", "mean", "clearest")

EMPTY = ("drop", "nearest")

DOY = ("midpoint", "observed")

FRAMES_ATTR = "anysat_frames"
"""attrs key that makes a cube known as composed: JSON of how."""

PERIOD_ATTR = "anysat_period"
"""attrs key of the period a cube was loaded for, ``"2022-01-01/2023-01-01"``."""

PERIOD_TIMES_ATTR = "anysat_period_times"
"""attrs key of the first and the last time of that cube: cut in time, it is loaded for that period no more."""

SOURCE_ATTRS = (
    "catalog", "items", "items_left_out", "harmonize", "mask", "scl_invalid", "dilate_m", "max_cloud", "on_error",
)  # fmt: skip
"""attrs of ``open_s2`` that tell where pixels come from; ``items`` also that the +1000 offset was decided."""

STRIP_BYTES = 1 << 20
"""Bytes of observations composed at a time: as much as a processor's cache holds with all that is made of it."""


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

    The period ``[start, end)`` of ``days`` days is cut at ``start + days·i // n``. A frame is made,
    band by band and pixel by pixel, of the valid observations of its bin.

    Parameters
    ----------
    cube : DataArray or Dataset
        Sentinel-2 digital numbers, see :func:`xr_anysat.embed`.
    n : int or None
        Number of bins. None: every acquisition is a frame, with its own date.
    period : str or (start, end), optional
        ``"2022"``, ``"2022-06"``, ``"2022-04-01/2022-10-01"`` or a pair of dates; the end is
        exclusive. Default: the period that the cube was loaded for, else from its first to its
        last day. Acquisitions outside of it take no part.
    reduce : {"median", "mean", "clearest"}
        ``clearest`` takes all bands of the observation with the least blue (B2), where haze and
        cloud show first: a spectrum that was really observed. Mask cloud shadows before.
    empty : {"drop", "nearest"}
        A bin without any acquisition is left out, or is a copy of the frame nearest in time (the
        earlier of two) at its own bin's midpoint.
    doy : {"midpoint", "observed"}
        Date of a frame: the middle day of its bin (``bin_start + days_of_bin // 2``), or the median
        day of its acquisitions.
    doy_base : {0, 1}
        Day of the year of 1 January. With 0, days run 0..364 as upstream's documentation says (31
        December of a leap year is 364 too); with 1 they are ``tm_yday``, 1..366, as most of
        upstream's training loaders have it.
    bands, nodata
        See :func:`xr_anysat.cube.reading.read_cube`.
    fill_value : float, optional
        Digital number to put where nothing was observed, which then counts as observed. Default:
        what is missing stays missing.

    Returns
    -------
    DataArray, (time, band, y, x) float32
        Lazy if `cube` is. Coords along time: ``doy`` (days), ``n_obs`` (acquisitions in the bin),
        ``bin_start``, ``bin_end``. ``attrs["anysat_frames"]`` is JSON of how it was made.

    Raises
    ------
    OptionError
        An option is impossible, or the period is empty.
    CubeError
        The cube cannot be read, or has no acquisition in the period.

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
    recipe = CompositeOptions(option("frames", n), period, reduce, empty, doy, doy_base, fill_value)
    if check_composed(cube, recipe, bands=bands, nodata=nodata):
        return cube
    return compose(read_cube(cube, bands=bands, nodata=nodata), recipe)


@dataclass(frozen=True)
class CompositeOptions:
    """How to compose: the options of :func:`frames`, refused where impossible before anything is looked at."""

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
            n = check_whole_number("frames", n, hint=", or None for every acquisition")
            object.__setattr__(self, "frames", n)  # NumPy's own have no JSON
        for name, known in (("reduce", REDUCERS), ("empty", EMPTY), ("doy", DOY)):
            value = getattr(self, name)
            check_choice(name, value, known)
            if n is None and value != known[0]:
                raise OptionError(
                    f"{name}={value!r} has no meaning with frames=None: give a number of frames"
                )
        if isinstance(self.doy_base, bool) or self.doy_base not in (0, 1):
            raise OptionError(f"doy_base={self.doy_base!r}: wanted 0 (1 January is day 0) or 1 (it is day 1)")
        object.__setattr__(self, "doy_base", int(self.doy_base))
        if fill is not None:
            if not is_number(fill):
                raise OptionError(
                    f"fill_value={fill!r}: wanted a finite digital number, or None to leave gaps out"
                )
            object.__setattr__(self, "fill_value", float(fill))
        parse_period(self.period)


def check_not_embedding(cube: Any) -> None:
    """Refuse an embedding cube where a Sentinel-2 cube is wanted."""
    if isinstance(cube, xr.DataArray | xr.Dataset) and "D" in cube.dims:
        raise CubeTypeError(
            f"dims {tuple(cube.dims)} are those of an embedding cube: wanted a Sentinel-2 cube (time, band, y, x); "
            "call this on the cube that was embedded"
        )


def check_composed(
    cube: xr.DataArray | xr.Dataset,
    recipe: CompositeOptions,
    *,
    bands: Sequence[str] | None = None,
    nodata: float | None = None,
) -> TypeGuard[xr.DataArray]:
    """Whether `cube` is what :func:`frames` made.

    Raises
    ------
    OptionError
        If it is, and `recipe` asks for composing it anew, or `bands` or `nodata` for reading it otherwise.
    CubeError
        If it was, but has lost its bands or days since.
    """
    if FRAMES_ATTR not in getattr(cube, "attrs", {}):
        return False
    record = json.loads(cube.attrs[FRAMES_ATTR])
    asked, base = record["frames"], record["doy_base"]
    anew = recipe != CompositeOptions(recipe.frames, doy_base=recipe.doy_base) or recipe.frames not in (
        None,
        asked,
    )
    if anew or bands is not None or nodata is not None:
        raise OptionError(
            f"this cube is already composed (frames={asked}, {cube.sizes['time']} of them observed): pass "
            "frames=None and no option of composing, bands= or nodata=, or start from the acquisitions"
        )
    if recipe.doy_base not in (0, base):
        raise OptionError(
            f"this cube was composed with doy_base={base}, not {recipe.doy_base}: compose it anew"
        )
    as_made = isinstance(cube, xr.DataArray) and cube.dims == ("time", "band", "y", "x")
    if not as_made or list(cube["band"].values) != list(S2.bands):
        raise CubeError(
            f"composed frames as a {type(cube).__name__} with dims {tuple(cube.dims)}, or with other bands than "
            f"{', '.join(S2.bands)}: hand them in as frames() made them, or drop attrs['anysat_frames'] to have them "
            "read as a cube of acquisitions"
        )
    if cube.sizes["time"] > (asked or record["acquisitions"]):
        raise CubeError(
            f"{cube.sizes['time']} composed frames, but a record of {asked or record['acquisitions']}: were several "
            "joined? Drop attrs['anysat_frames'] to have them read as a cube of acquisitions, with frames=None"
        )
    if "doy" not in cube.coords:
        raise CubeError(
            "composed frames without their 'doy' coordinate: put it back, cube.assign_coords(doy=('time', days)), or "
            "drop attrs['anysat_frames'] to have them read as a cube of acquisitions"
        )
    return True


# ---------------------------------------------------------------------- dates


@dataclass(frozen=True)
class Bin:
    """One frame: its days [start, end), its date, and the acquisitions [first, stop) it is made of."""

    start: pd.Timestamp
    end: pd.Timestamp
    date: pd.Timestamp
    first: int
    stop: int


def parse_period(period: Period) -> tuple[pd.Timestamp, pd.Timestamp] | None:
    """The half-open period of whole days, or None for None.

    Examples
    --------
    >>> [str(t.date()) for t in parse_period("2022")]
    ['2022-01-01', '2023-01-01']
    >>> [str(t.date()) for t in parse_period(("2022-04-01", "2022-10-01"))]
    ['2022-04-01', '2022-10-01']
    """
    if period is None:
        return None
    wanted = (
        "wanted '2022', '2022-06', '2022-04-01/2022-10-01' or a pair of dates (start, end), end exclusive"
    )
    try:
        parts = period.split("/") if isinstance(period, str) else list(period)
        if not all(re.match(r"\d{4}(\d{4}|Q\d)?\b", p) for p in parts if isinstance(p, str)):
            raise ValueError("a date begins with its year")  # pandas takes 'April', and 1/2/2022 either way
        if isinstance(period, str) and len(parts) == 1:
            span = pd.Period(period)
            start, end = span.start_time, (span + 1).start_time
        else:
            start, end = (pd.Timestamp(p) for p in parts)
    except (ValueError, TypeError) as error:
        raise OptionError(f"{period=}: {wanted}") from error
    if (
        pd.isna(start)
        or pd.isna(end)
        or start != start.normalize()
        or end != end.normalize()
        or start.tz
        or end.tz
    ):
        raise OptionError(f"{period=}: {wanted}, of whole days without a time zone")
    if end <= start:
        raise OptionError(f"{period=} is empty: its end is exclusive and must lie after its start")
    return start, end


def recorded_period(cube: xr.DataArray) -> str | None:
    """The period that a cube was loaded for, if it was not cut in time since."""
    times = cube["time"].values
    whole = cube.attrs.get(PERIOD_TIMES_ATTR, span_of(times)) == span_of(times)
    return cube.attrs.get(PERIOD_ATTR) if whole else None


def span_of(times: np.ndarray) -> str:
    """First and last of `times`, for :data:`PERIOD_TIMES_ATTR`."""
    return f"{pd.Timestamp(times.min()).isoformat()}/{pd.Timestamp(times.max()).isoformat()}"


def bin_bounds(start: pd.Timestamp, end: pd.Timestamp, n: int) -> list[pd.Timestamp]:
    """The n + 1 bounds of n equal bins: ``start + days·i // n``."""
    days = (end - start).days
    if days < n:
        raise OptionError(
            f"a period of {days} days ({start.date()} to {end.date()}) cannot be cut into {n} frames of whole "
            "days: ask for fewer frames, give a longer period=, or frames=None for every acquisition"
        )
    return [start + pd.Timedelta(days=days * i // n) for i in range(n + 1)]


def day_of_year(dates: Sequence[pd.Timestamp], base: int) -> np.ndarray:
    """Days of the year (n,) int64; with base 0 the last day of a leap year is 364, as upstream has it."""
    days = np.array([d.day_of_year - 1 for d in dates], np.int64)
    return days + 1 if base else np.minimum(days, 364)


def plan_bins(
    times: np.ndarray, recipe: CompositeOptions, recorded: str | None
) -> tuple[list[Bin], dict[str, Any]]:
    """Which acquisitions (sorted `times`) go into which frame, and a record of it."""
    n = recipe.frames
    days = pd.DatetimeIndex(times)
    whole = (days[0].normalize(), days[-1].normalize() + pd.Timedelta(days=1))
    start, end = parse_period(recipe.period) or parse_period(recorded) or whole
    meets = (days >= start) & (days < end)
    inside = [int(i) for i in np.flatnonzero(meets)]
    if not inside:
        raise CubeError(
            f"no acquisition between {start.date()} and {end.date()} (exclusive): the cube's run from "
            f"{days[0].date()} to {days[-1].date()}. Give a period= that meets them, or load that period"
        )
    record = {
        **asdict(recipe),
        "period": f"{start.date()}/{end.date()}",
        "acquisitions": len(inside),
        "outside_period": len(days) - len(inside),
        "dates": [str(d.date()) for d in days[meets]],
        "dates_outside": [str(d.date()) for d in days[~meets]],
    }
    if n is None:
        day = pd.Timedelta(days=1)
        return [
            Bin(days[i].normalize(), days[i].normalize() + day, days[i], i, i + 1) for i in inside
        ], record
    bounds = bin_bounds(start, end, n)
    edges = [int(e) for e in np.searchsorted(days, pd.DatetimeIndex(bounds))]
    bins = []
    for (a, b), (i, j) in zip(pairwise(bounds), pairwise(edges), strict=True):
        date = a + pd.Timedelta(days=(b - a).days // 2)
        if recipe.doy == "observed" and j > i:
            date = pd.Timestamp(days[i:j].to_series().median()).normalize()
        bins.append(Bin(a, b, date, i, j))
    observed = [x for x in bins if x.stop > x.first]
    record["empty_bins"] = n - len(observed)
    if recipe.empty == "drop":
        return observed, record
    return [x if x.stop > x.first else _nearest_observed(x, observed) for x in bins], record


def _nearest_observed(hole: Bin, observed: list[Bin]) -> Bin:
    """The bin `hole` at its own date with the acquisitions of the nearest observed bin (the earlier of two)."""
    near = min(observed, key=lambda x: (abs(x.date - hole.date), x.start))
    return Bin(hole.start, hole.end, hole.date, near.first, near.stop)


# ---------------------------------------------------------------------- pixels


def compose(cube: Cube, recipe: CompositeOptions) -> xr.DataArray:
    """The frames of a canonical cube; see :func:`frames`."""
    array = cube.array
    bins, record = plan_bins(array["time"].values, recipe, recorded_period(array))
    own = [x.stop > x.first and x.start <= pd.Timestamp(array["time"].values[x.first]) < x.end for x in bins]
    data = _reduce(array.data, bins, recipe.reduce, cube.nodata, recipe.fill_value)
    dates = [x.date for x in bins]
    along_time = {
        "doy": day_of_year(dates, recipe.doy_base),
        "n_obs": np.array([x.stop - x.first if mine else 0 for x, mine in zip(bins, own, strict=True)]),
        "bin_start": pd.DatetimeIndex([x.start for x in bins]),
        "bin_end": pd.DatetimeIndex([x.end for x in bins]),
    }
    out = xr.DataArray(
        data,
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


def composite(
    parts: Sequence[np.ndarray], reduce: str, nodata: float, fill_value: float | None
) -> np.ndarray:
    """One frame (1, band, y, x) float32 of the observations of its bin, arrays (n, band, y, x) that follow in time.

    A few rows at a time: what is made on the way, several times the size of the observations, stays small.
    """
    _, bands, height, width = parts[0].shape
    frame = np.empty((1, bands, height, width), np.float32)
    step = max(1, STRIP_BYTES * height // max(1, sum(p.nbytes for p in parts)))
    for top in range(0, height, step):
        rows = np.s_[:, :, top : top + step]
        values = parts[0][rows] if len(parts) == 1 else np.concatenate([p[rows] for p in parts])
        frame[rows] = _composite_rows(values, reduce, nodata, fill_value)
    return frame


def _composite_rows(values: np.ndarray, reduce: str, nodata: float, fill_value: float | None) -> np.ndarray:
    x = blank_missing(values, nodata)
    if reduce == "median" and len(x) > 1:
        x = bottleneck.nanmedian(x, axis=0)[None]
    elif reduce == "mean" and len(x) > 1:  # float64: the sum of whole numbers is then exact in any order
        there = np.isfinite(x)
        count = there.sum(0, keepdims=True)
        total = np.where(there, x, 0).sum(0, keepdims=True, dtype=np.float64)
        x = np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)
    elif reduce == "clearest":
        whole = np.isfinite(x).all(1, keepdims=True)
        blue = np.where(whole, x[:, S2.bands.index("B2")][:, None], np.inf)
        best = blue.argmin(0, keepdims=True)
        x = np.take_along_axis(np.where(whole, x, np.nan), np.broadcast_to(best, (1, *x.shape[1:])), 0)
    return x if fill_value is None else np.where(np.isfinite(x), x, np.float32(fill_value))


def _composite_chunks(
    chunks: list[np.ndarray], span: slice, reduce: str, nodata: float, fill_value: float | None
) -> np.ndarray:
    """`composite` of the dates `span` of chunks that follow each other in time."""
    parts, start = [], 0
    for chunk in chunks:
        parts.append(chunk[max(0, span.start - start) : max(0, span.stop - start)])
        start += len(chunk)
    return composite(parts, reduce, nodata, fill_value)


def _reduce(data: Any, bins: list[Bin], reduce: str, nodata: float, fill_value: float | None) -> Any:
    """The frames (T, band, y, x) of a NumPy or dask array (time, band, y, x)."""
    if isinstance(data, np.ndarray):
        made = np.empty((len(bins), *data.shape[1:]), np.float32)
        for frame, x in zip(made, bins, strict=True):
            frame[None] = composite([data[x.first : x.stop]], reduce, nodata, fill_value)
        return made
    import dask.array as da
    from dask.base import tokenize
    from dask.highlevelgraph import HighLevelGraph

    data = _fit_task(data, bins, whole_bands=reduce == "clearest")
    spans = [(x.first, x.stop) for x in bins]
    name = FRAMES_LAYER + tokenize(data.name, spans, reduce, nodata, fill_value)
    graph: dict[Any, Any] = {}
    for i, x in enumerate(bins):
        first, stop, start, _ = _chunks_met(x, data.chunks[0])
        span = slice(x.first - start, x.stop - start)
        for place in product(*(range(len(c)) for c in data.chunks[1:])):
            keys = [(data.name, t, *place) for t in range(first, stop)]
            graph[(name, i, *place)] = (_composite_chunks, keys, span, reduce, nodata, fill_value)
    layers = HighLevelGraph.from_collections(name, graph, dependencies=[data])
    chunks = ((1,) * len(bins), *data.chunks[1:])
    return da.Array(layers, name, chunks=chunks, meta=np.empty((0,) * 4, np.float32))


def _chunks_met(x: Bin, sizes: tuple[int, ...]) -> tuple[int, int, int, int]:
    """The chunks [first, stop) along time that a bin's acquisitions lie in, and the dates [start, end) of these."""
    starts = np.cumsum([0, *sizes])
    first = int(np.searchsorted(starts, x.first, side="right")) - 1
    stop = int(np.searchsorted(starts, x.stop, side="left"))
    return first, stop, int(starts[first]), int(starts[stop])


def _fit_task(data: Any, bins: list[Bin], *, whole_bands: bool) -> Any:
    """Cut a dask array so that neither the observations of a frame nor the frame pass a task's limit."""
    if whole_bands:
        data = data.rechunk({1: -1}, method=RECHUNK)
    # a bin meets chunks of several dates that it needs only a part of
    met = [_chunks_met(x, data.chunks[0]) for x in bins]
    dates = max(end - start for _, _, start, end in met)
    bands, height, width = (max(c) for c in data.chunks[1:])
    pixel_bytes = bands * max(dates * data.dtype.itemsize, 4)
    if pixel_bytes * height * width <= TASK_BYTES:
        return data
    side = max(1, math.isqrt(TASK_BYTES // pixel_bytes))
    sides = {2: even_chunks(data.chunks[2], side), 3: even_chunks(data.chunks[3], side)}
    return data.rechunk(sides, method=RECHUNK)

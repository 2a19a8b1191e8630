"""Convert digital numbers to the values that the model was trained on: clipping, normalization, statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import xarray as xr

from xr_anysat.config import FRAMES, option
from xr_anysat.cube.compositing import frames as make_frames
from xr_anysat.cube.periods import Period
from xr_anysat.errors import CubeError, OptionError, warn
from xr_anysat.shared.graph import RECHUNK, TASK_BYTES, even_chunks, settle
from xr_anysat.shared.sensor import S2
from xr_anysat.shared.serialization import NUMBER, Rule, Stored, list_of, optional, whole
from xr_anysat.shared.values import check_choice, check_whole_number

MIN_STD = 1e-6
"""Lower bound of the standard deviation in divisions, as in rs-embed: a constant band becomes zero."""

MAX_REFLECTANCE = 10.0
"""Values up to this can be reflectance, which exceeds 1 for clouds and glint; 16-bit products end at 6.55."""

MIN_PLAUSIBLE_DN, MAX_PLAUSIBLE_DN = -5_000, 32_767
"""Range of the digital numbers of any surface. Values outside mark missing pixels, or are unsigned numbers that
wrapped below zero."""

MAX_OFFSET_MINIMUM = 1400
"""Products with the +1000 offset have no digital number below the offset. If the minimum is above this, the scene is
only bright."""

MAX_8BIT = 255
"""Values up to this can be percent or 8-bit numbers; land has brighter pixels, 255 DN is a reflectance of 0.0255."""

MIN_CHECKED_VALUES = 10_000
"""With fewer values than this, their minimum and maximum say nothing about the offset or the scale."""

NORMS = (
    "per_tile_zscore",
    "per_window_zscore",
    "unit_scale",
    "reflectance",
    "raw",
    "none",
    "pastis",
    "treesatai",
)

STATISTICS = "anysat_statistics"
"""Key in the ``encoding`` of a lazy embedding whose value is the `Companion` of its statistics."""

MAX_MERGED_PARTS = 64
"""Parts of lazy statistics per merging task. A task lists its parts, so that fewer keep it small."""

_SAME = {"reflectance": "unit_scale", "none": "raw"}


@dataclass(frozen=True)
class Statistics(Stored):
    """Mean and standard deviation of each band, in digital numbers.

    Attributes
    ----------
    mean, std : tuple of 10 float
        In the order of :data:`xr_anysat.BANDS`, DN.
    count : int
        Number of observations (frames × valid pixels) behind them; 0 if unknown.

    Examples
    --------
    >>> import xr_anysat
    >>> s = xr_anysat.Statistics.from_json(xr_anysat.cube.normalization.PASTIS.to_json())
    >>> s == xr_anysat.cube.normalization.PASTIS
    True
    """

    RULES: ClassVar[Mapping[str, Rule]] = {
        "mean": list_of(NUMBER, len(S2.bands)), "std": list_of(NUMBER, len(S2.bands)), "count": optional(whole(0)),
    }  # fmt: skip

    mean: tuple[float, ...]
    std: tuple[float, ...]
    count: int = 0

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            given = getattr(self, name)
            try:
                if any(isinstance(v, str) for v in given):
                    raise TypeError("text")
                values = tuple(float(v) for v in given)
            except (TypeError, ValueError, OverflowError) as error:
                raise OptionError(
                    f"{name}={given!r}: expected a number for each of {', '.join(S2.bands)}"
                ) from error
            if len(values) != len(S2.bands):
                raise OptionError(
                    f"{len(values)} values of {name}: expected one for each of {', '.join(S2.bands)}"
                )
            if not all(map(math.isfinite, values)):
                raise OptionError(f"{name}={values}: expected finite digital numbers")
            object.__setattr__(self, name, values)
        if any(s < 0 for s in self.std):
            raise OptionError(f"std={self.std}: expected standard deviations of 0 or more")
        object.__setattr__(self, "count", check_whole_number("count", self.count, 0))

    @classmethod
    def of(cls, emb: xr.DataArray) -> Statistics:
        """Return the statistics that an embedding records, to embed another area or year with them.

        Parameters
        ----------
        emb : DataArray
            Embedding with ``norm_mean`` and ``norm_std`` in its attributes: that of a cube that was not lazy, one with
            known statistics such as ``norm="pastis"``, or any that was stored.

        Raises
        ------
        CubeError
            If it records none.
        """
        missing = [name for name in ("norm_mean", "norm_std") if name not in emb.attrs]
        if missing:
            raise CubeError(
                f"an embedding without {missing[0]!r} in its attributes records no statistics: store it first, "
                "emb.anysat.to_zarr('area.zarr'), or compute them, cube.anysat.statistics(8)"
            )
        return cls(tuple(emb.attrs["norm_mean"]), tuple(emb.attrs["norm_std"]))

    def array(self) -> np.ndarray:
        """Return the means and the standard deviations, (2, 10) float64."""
        return np.array([self.mean, self.std])


# gastruc/AnySat: statistics of TreeSatAI-TS in its demo (clouds included).
TREESATAI = Statistics(
    mean=(4304.3, 4159.3, 4057.8, 4329.0, 4571.2, 4644.9, 4837.2, 4700.3, 2823.3, 2320.0),
    std=(3538.0, 3324.2, 3270.1, 3250.5, 2897.4, 2754.5, 2821.5, 2626.0, 1731.6, 1549.3),
)

# PASTIS, Fold_1 (https://github.com/VSainteuf/pastis-benchmark).
PASTIS = Statistics(
    mean=(1165.94, 1375.65, 1429.22, 1764.80, 2719.27, 3063.61, 3205.90, 3319.11, 2422.90, 1639.37),
    std=(1942.62, 1881.92, 1959.38, 1867.22, 1754.59, 1769.40, 1784.86, 1767.71, 1458.96, 1299.28),
)

_FIXED = {"pastis": PASTIS, "treesatai": TREESATAI}


def parse_norm(norm: Any) -> tuple[str, Statistics | None]:
    """Return the name of a normalization, and its statistics if they are known without a cube.

    Examples
    --------
    >>> parse_norm("reflectance")
    ('unit_scale', None)
    >>> parse_norm("pastis")[1].mean[0]
    1165.94
    """
    if isinstance(norm, Statistics):
        return "statistics", norm
    if isinstance(norm, Mapping):
        if not {"mean", "std"} <= set(norm) <= {"mean", "std", "count"}:
            raise OptionError(f"{norm=}: expected 'mean' and 'std', ten numbers each")
        return "statistics", Statistics(**norm)
    check_choice("norm", norm, NORMS, ", or the Statistics that cube.anysat.statistics() gives")
    name = _SAME.get(norm, norm)
    return name, _FIXED.get(name)


def observed(values: np.ndarray) -> np.ndarray:
    """Return where all ten bands of frames (T, 10, y, x) were observed, (T, y, x) bool.

    The model takes only observations of all bands.
    """
    complete: np.ndarray = np.isfinite(values).all(1)
    return complete


def clip(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Clip digital numbers (T, 10, y, x) to 0..10 000, float32, with zero where not `valid` (T, y, x)."""
    clipped: np.ndarray = np.clip(values, 0.0, S2.max_dn).astype(np.float32, copy=False)
    return clipped if valid.all() else np.where(valid[:, None], clipped, np.float32(0))


def check_values(values: np.ndarray, valid: np.ndarray, *, offset_decided: bool = False) -> None:
    """Check that `values` (T, 10, y, x), before clipping, are digital numbers; nothing is changed.

    `offset_decided` means that metadata decided about scale and offset, as in ``open_s2``.

    Raises
    ------
    CubeError
        If they look like reflectance, 0..1.

    Warns
    -----
    AnySatWarning
        If they seem to contain the +1000 offset of baseline 04.00 or a marker of missing pixels, or to be scaled to
        percent or 8 bits.
    """
    if not valid.any():
        return
    where: Any = True if valid.all() else valid[:, None]
    maximum = float(values.max(where=where, initial=-np.inf))
    minimum = float(values.min(where=where, initial=np.inf))
    # whole numbers are dark ground, not reflectance
    if 0 < maximum <= MAX_REFLECTANCE and (values % 1 > 0).any(where=where):
        raise CubeError(
            f"values up to {maximum:g} look like reflectance: expected digital numbers, reflectance × 10 000. "
            "Multiply first: (cube * 10000).anysat.embed(...)"
        )
    # Python shows each text once: texts that differ per block would flood the screen
    if maximum > MAX_PLAUSIBLE_DN or minimum < MIN_PLAUSIBLE_DN:
        seen = maximum if maximum > MAX_PLAUSIBLE_DN else minimum
        warn(
            f"values of {seen:g} count as observed, but are outside the range of reflectance × 10 000. If they mark "
            f"missing pixels, pass nodata={seen:g}. If unsigned numbers wrapped below zero, cast to float before "
            "subtracting. They were only clipped to 0..10 000"
        )
    if offset_decided or valid.sum() * len(S2.bands) < MIN_CHECKED_VALUES:
        return
    if 0 < maximum <= MAX_8BIT:
        warn(
            f"no value is above {MAX_8BIT}: the cube seems to hold percent or 8-bit numbers. Expected digital numbers, "
            "reflectance × 10 000. If so, convert them first, for percent (cube * 100).anysat.embed(...). Nothing was "
            "changed"
        )
    if S2.offset <= minimum <= MAX_OFFSET_MINIMUM:
        warn(
            f"no digital number is below {minimum // 100 * 100:.0f}: the cube seems to contain the +{S2.offset} offset "
            "of processing baseline 04.00 and later. If so, subtract it from the observed values: "
            f"(cube.where(cube != nodata) - {S2.offset}).anysat.embed(nodata=float('nan')). Nothing was changed"
        )


def moments(values: np.ndarray) -> np.ndarray:
    """Return count, mean and sum of squared deviations (3, 10) float64 of frames (T, 10, y, x)."""
    parts = []
    for frame in values:  # one at a time, because float64 takes twice the memory
        valid = observed(frame[None])
        rows = clip(frame[None], valid)[0][:, valid[0]].astype(np.float64)  # (10, n)
        if rows.shape[1]:
            mean = rows.mean(1)
            count = np.full(len(S2.bands), float(rows.shape[1]))
            parts.append([count, mean, np.square(rows - mean[:, None]).sum(1)])
    return merge_moments(np.array(parts).reshape(-1, 3, len(S2.bands)))


def merge_moments(parts: np.ndarray) -> np.ndarray:
    """Merge the moments (n, 3, 10) of n parts into the moments (3, 10) of all of them.

    This is the formula of Chan, Golub and LeVeque (1983), in float64.
    """
    count, mean, spread = parts[:, 0], parts[:, 1], parts[:, 2]
    total = count.sum(0)
    whole = (count * mean).sum(0) / np.maximum(total, 1)
    return np.stack([total, whole, (spread + count * np.square(mean - whole)).sum(0)])


def _merge_block(parts: np.ndarray) -> np.ndarray:
    return merge_moments(parts)[None]


def mean_and_std(parts: np.ndarray) -> np.ndarray:
    """Return mean and standard deviation (2, 10) from the moments (n, 3, 10) of n parts; NaN without observations."""
    count, mean, spread = merge_moments(parts)
    unknown = np.where(count > 0, 0.0, np.nan)
    return np.stack([mean, np.sqrt(spread / np.maximum(count, 1))]) + unknown


def normalize(values: np.ndarray, valid: np.ndarray, norm: str, stats: np.ndarray | None) -> np.ndarray:
    """Normalize clipped digital numbers for the model.

    Parameters
    ----------
    values : ndarray, (T, 10, y, x) float32
        Clipped digital numbers, zero where missing.
    valid : ndarray, (T, y, x) bool
        Where all bands were observed.
    norm : str
        ``unit_scale``: divide by 10 000. ``raw``: leave unchanged. ``per_window_zscore``: use the mean
        and standard deviation of `values` themselves. Others: use `stats`.
    stats : ndarray, (2, 10) float64, or None
        Mean and standard deviation.

    Returns
    -------
    ndarray, (T, 10, y, x) float32
        Zero where missing.
    """
    if norm == "raw":
        return values
    if norm == "unit_scale":
        return values / np.float32(S2.max_dn)
    if norm == "per_window_zscore":
        if not valid.any():
            return values
        stats = mean_and_std(moments(np.where(valid[:, None], values, np.nan))[None])
    assert stats is not None  # every other normalization has statistics
    mean, std = stats.astype(np.float32)[:, :, None, None]
    scaled: np.ndarray = (values - mean) / np.maximum(std, np.float32(MIN_STD))
    return scaled if valid.all() else np.where(valid[:, None], scaled, np.float32(0))


def statistics(
    cube: xr.DataArray | xr.Dataset,
    frames: int | None = FRAMES,
    *,
    period: Period = None,
    reduce: str = "median",
    empty: str = "drop",
    doy: str = "midpoint",
    doy_base: int = 0,
    bands: Sequence[str] | None = None,
    nodata: float | None = None,
    fill_value: float | None = None,
) -> Statistics:
    """Compute the mean and standard deviation of each band over all frames and valid pixels, immediately.

    Save them and pass them to later calls as ``norm=``. Embeddings are then comparable between areas and
    years, and do not depend on the rest of the cube.

    Parameters
    ----------
    cube, frames, period, reduce, empty, doy, doy_base, bands, nodata, fill_value
        As in :func:`xr_anysat.frames`.

    Returns
    -------
    Statistics

    Raises
    ------
    CubeError
        If the cube cannot be read, holds reflectance, or nothing in it was observed.
    OptionError
        If an option is impossible.

    Examples
    --------
    >>> import numpy as np, pandas as pd, xarray as xr
    >>> import xr_anysat
    >>> cube = xr.DataArray(
    ...     np.full((2, 10, 4, 4), 1000, "uint16"), dims=("time", "band", "y", "x"),
    ...     coords={"time": pd.to_datetime(["2022-03-01", "2022-08-01"]), "band": list(xr_anysat.BANDS)},
    ... )
    >>> stats = xr_anysat.statistics(cube, frames=None)
    >>> stats.mean[0], stats.std[0], stats.count
    (1000.0, 0.0, 32)
    """
    composed = make_frames(
        cube, option("frames", frames), period=period, reduce=reduce, empty=empty, doy=doy, doy_base=doy_base,
        bands=bands, nodata=nodata, fill_value=fill_value,
    )  # fmt: skip
    parts = np.asarray(lazy_moments(composed.data, check=True, offset_decided="items" in composed.attrs))
    mean, std = mean_and_std(parts)
    count = int(parts[:, 0, 0].sum())
    if not count:
        raise CubeError("nothing valid in this cube, so it has no statistics: check nodata= and the mask")
    return Statistics(tuple(mean), tuple(std), count)


def lazy_moments(data: Any, *, check: bool = False, offset_decided: bool = False) -> Any:
    """Return the moments (n, 3, 10) of the n chunks of frames (T, 10, y, x), NumPy or dask; see `check_values`.

    Large chunks are split into single frames, so that no frame is kept until the others are read. With `check`, they
    are not, because a check needs all frames.
    """
    if isinstance(data, np.ndarray):
        return _block_moments(data, check, offset_decided)[0, 0, 0][None]
    import dask.array as da

    side = math.isqrt(TASK_BYTES // (data.shape[0] * data.shape[1] * data.dtype.itemsize))
    small = max(map(max, data.chunks[2:])) <= side
    frames = data.shape[0] if check or small else 1
    data = data.rechunk((frames, -1, *(even_chunks(c, side) for c in data.chunks[2:])), method=RECHUNK)
    parts = da.blockwise(
        _block_moments, "tyxmb", data, "tbyx", check=check, offset_decided=offset_decided,
        new_axes={"m": 3}, concatenate=True, align_arrays=False, adjust_chunks={"t": 1, "y": 1, "x": 1},
        dtype=np.float64, meta=np.empty((0,) * 5),
    )  # fmt: skip
    return parts.reshape(-1, 3, len(S2.bands))


def _block_moments(values: np.ndarray, check: bool, offset_decided: bool) -> np.ndarray:
    if check:
        check_values(values, observed(values), offset_decided=offset_decided)
    return moments(values)[None, None, None]


def tile_statistics(*data: Any) -> Any:
    """Return mean and standard deviation (2, 10) of all frames in arrays (T, 10, y, x); lazy if they are."""
    moments_of_each = [lazy_moments(each) for each in data]
    if isinstance(moments_of_each[0], np.ndarray):
        return mean_and_std(np.concatenate(moments_of_each))
    import dask.array as da
    from dask.base import tokenize

    parts = moments_of_each[0] if len(data) == 1 else da.concatenate(moments_of_each)
    while len(parts) > MAX_MERGED_PARTS:
        parts = da.map_blocks(
            _merge_block, parts.rechunk({0: MAX_MERGED_PARTS}), chunks=(1, *parts.shape[1:]),
            dtype=np.float64, meta=np.empty((0, 0, 0)),
        )  # fmt: skip
    name = f"anysat-statistics-{tokenize(parts.name)}"
    return da.blockwise(  # unlike `map_blocks`, it keeps `name` in all versions of dask
        _settled_mean_and_std, "sb", parts.rechunk(-1), "nmb", task=name,
        new_axes={"s": 2}, concatenate=True, dtype=np.float64, meta=np.empty((0, 0)), name=name,
    )  # fmt: skip


def _settled_mean_and_std(parts: np.ndarray, task: str) -> np.ndarray:
    """Compute statistics, and keep them for the embedding that they accompany."""
    return settle(task, mean_and_std(parts))

"""`embed`: from a Sentinel-2 cube to a georeferenced embedding cube with its record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from xr_anysat.config import DEVICE, FRAMES, MODEL, NORM, PRECISION, TILE
from xr_anysat.cube.frames_record import frames_record
from xr_anysat.cube.normalization import STATISTICS, Statistics, tile_statistics
from xr_anysat.cube.periods import Period, split_period
from xr_anysat.cube.reading import read_cube
from xr_anysat.embedding.blocks import encode_windows, warn_if_empty
from xr_anysat.embedding.lattice import Squares
from xr_anysat.embedding.options import EmbedOptions, ResolvedOptions, resolve_options, size_warning
from xr_anysat.embedding.output_grid import resize_frames
from xr_anysat.embedding.overlap import encode_overlapping
from xr_anysat.embedding.pooling import pool_cells
from xr_anysat.errors import CubeError, OptionError, warn
from xr_anysat.record import embedding_attrs
from xr_anysat.series import join
from xr_anysat.shared.graph import Companion, read_again


def embed(
    cube: xr.DataArray | xr.Dataset,
    frames: int | None = FRAMES,
    *,
    by: str | Sequence[Any] | None = None,
    period: Period = None,
    reduce: str = "median",
    empty: str = "drop",
    doy: str = "midpoint",
    doy_base: int = 0,
    bands: Sequence[str] | None = None,
    nodata: float | None = None,
    fill_value: float | None = None,
    norm: str | Statistics | dict[str, Any] = NORM,
    patch_size: int = 10,
    tile: int = TILE,
    overlap: int = 0,
    anchor: str = "auto",
    resize: int | None = None,
    output: str = "patch",
    pool: str | None = None,
    model: Any = MODEL,
    weights: Any = None,
    device: str = DEVICE,
    precision: str = PRECISION,
    batch: int | None = None,
) -> xr.DataArray:
    """Embed a Sentinel-2 cube with AnySat.

    Missing pixels, dates and patches are left out of statistics and of attention, as if the cube did not
    contain them. Cells without any observation are NaN.

    Parameters
    ----------
    cube : DataArray or Dataset
        Sentinel-2 surface reflectance as digital numbers (reflectance × 10 000, without the +1000
        offset), any integer or float dtype: a DataArray ``(time, band, y, x)`` with band names in any
        of the usual spellings, or a Dataset with one variable per band; from odc-stac, stackstac, xee,
        rioxarray or your own code. Pixels of 10 m in a projected CRS, or without a CRS.
    frames : int or None, default 8
        Number of bins of the period, each composed to one frame. None: every acquisition, or every
        frame of :func:`xr_anysat.frames`, is a frame with its own date.
    by : {"year", "season", "quarter", "month"} or list of periods, optional
        Embed each unit of the calendar in `period`, or each period of the list, for itself. Each step equals the
        embedding of its period alone, and has `frames` frames. All steps have the same statistics: with
        ``"per_tile_zscore"``, those of the frames of all steps.
    period, reduce, empty, doy, doy_base, fill_value
        See :func:`xr_anysat.frames`.
    bands, nodata
        See :func:`xr_anysat.cube.reading.read_cube`.
    norm : str or Statistics, default "per_tile_zscore"
        Normalization of digital numbers, which are first clipped to 0..10 000.
        ``"per_tile_zscore"``: by the statistics of this cube. ``"per_window_zscore"``: by those of each
        window. ``"unit_scale"`` (or ``"reflectance"``): divided by 10 000. ``"raw"`` (or ``"none"``):
        unchanged. ``"pastis"``, ``"treesatai"``: by constants of the training sets. Or the result of
        :func:`xr_anysat.statistics`.
    patch_size : int, default 10
        Side of a patch in meters, a positive multiple of 10.
    tile : int, default 24
        Side of a window in pixels, a multiple of the side of a patch. A window is what the model sees
        at once. For maps, ``patch_size=40, tile=64`` is closer to the training of AnySat.
    overlap : int, default 0
        Pixels that adjacent windows share, a multiple of the side of a patch and less than `tile`.
        Windows then start every ``tile - overlap`` pixels, and the token of a patch is the weighted mean
        over all its windows; weights fall towards the border of a window as a squared sine and sum to one.
        Seams fade. With half a `tile`, each patch is in four windows (docs/speed.md). For ``patch`` and
        ``dense``.
    anchor : {"auto", "grid", "cube"}
        Where windows start: at the CRS origin, so that the same ground is in the same window whatever
        area is requested; or at the corner of the cube. ``"auto"`` is ``"cube"`` for a cube that fits
        in one window or has no CRS, else ``"grid"``.
    resize : int, optional
        Resample the whole (square) cube bilinearly to this many pixels per side, and embed it as one
        window.
    output : {"patch", "dense", "local", "tile"}
        ``patch``: one cell per patch. ``dense``: one cell per pixel, with the token of its patch followed
        by its own. ``local``: one cell per pixel, with its own token only, which is free of seams between
        windows. ``tile``: one cell per window.
    pool : {"mean", "max"}, optional
        Reduce over y and x, see :func:`xr_anysat.pool`.
    model : {"base", "small", "tiny"} or torch.nn.Module, default "base"
        Size, or a module with the call signature of upstream's (complete windows only).
    weights : None, path, "random" or ("random", seed)
        None (or ``"official"``): the published checkpoint, which exists for ``"base"``. Random weights
        have no learned meaning and are never used unless requested.
    device : str, default "auto"
        ``"auto"`` (a GPU if available), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``.
    precision : {"float32", "bfloat16", "float16", "int8"}
        Precision of matrix products.
    batch : int, optional
        Windows per forward pass on an accelerator. A CPU computes windows one by one, which is as fast
        and keeps results bit-identical.

    Returns
    -------
    DataArray, (D, y, x) float32, or (D,) with `pool`; (time, D, y, x) or (time, D) with `by`
        Lazy if `cube` is. D is 768 for ``base`` (twice that for ``dense``). ``y`` and ``x`` are the
        centers of the cells; the CRS and the scalar coords of the cube are kept. ``attrs`` contain
        everything that is needed to compute it again:
        ``embed(cube, **json.loads(emb.attrs["config"]))``. With `by`, ``time`` has the first day of each step, and
        ``period`` its period.

    Raises
    ------
    CubeError, CubeTypeError
        If the cube cannot be read as Sentinel-2. Pixel values of a lazy cube are checked when it is
        computed.
    OptionError
        If an option has an impossible value.
    WeightsError, DeviceError
        If the weights or the device are not available.

    Examples
    --------
    >>> import numpy as np, pandas as pd, xarray as xr
    >>> import xr_anysat
    >>> cube = xr.DataArray(
    ...     np.random.default_rng(0).integers(1, 5000, (6, 10, 12, 12), "uint16"),
    ...     dims=("time", "band", "y", "x"),
    ...     coords={"time": pd.date_range("2022-01-15", periods=6, freq="2MS"), "band": list(xr_anysat.BANDS)},
    ... )
    >>> emb = cube.anysat.embed(frames=4, patch_size=20, model="tiny", weights="random")
    >>> emb.dims, emb.shape, emb.attrs["doy0_values"]
    (('D', 'y', 'x'), (256, 6, 6), [69, 145, 221, 297])
    """
    options = EmbedOptions(
        frames=frames, period=period, reduce=reduce, empty=empty, doy=doy,
        doy_base=doy_base, bands=bands, nodata=nodata, fill_value=fill_value, norm=norm,
        patch_size=patch_size, tile=tile, overlap=overlap, anchor=anchor, resize=resize,
        output=output, pool=pool, model=model, weights=weights, device=device,
        precision=precision, batch=batch,
    )  # fmt: skip
    resolved = resolve_options(cube, options)
    periods = None if by is None else _periods(resolved, by)
    steps = 1 if periods is None else len(periods)
    warning = size_warning(resolved, lazy=resolved.canonical.array.chunks is not None, steps=steps)
    if warning is not None:
        warn(f"{warning}. cube.anysat.plan(...) reports time and memory")

    # Everything above used only metadata; NumPy cubes are read from here on
    emb = embed_resolved(cube, resolved) if periods is None else _embed_series(cube, resolved, periods)
    warn_if_empty(emb.data)
    return emb if pool is None else pool_cells(emb, pool)


def embed_resolved(
    cube: xr.DataArray | xr.Dataset,
    resolved: ResolvedOptions,
    squares: Squares | None = None,
    min_blocks: int | None = None,
) -> xr.DataArray:
    """Embed a cube with resolved options, (D, y, x) float32; with `squares`, only these, and NaN elsewhere."""
    composed = resolved.compose(resolved.canonical)
    stats = None if resolved.statistics is None else resolved.statistics.array()
    if resolved.settings.norm == "per_tile_zscore":
        stats = _statistics(cube, [resolved], [_pixels(composed, resolved)])
    return _embed_composed(composed, resolved, stats, squares, min_blocks)


def _periods(resolved: ResolvedOptions, by: str | Sequence[Any]) -> list[str]:
    """Return the periods of a series, each with acquisitions."""
    if resolved.composed:
        raise OptionError(
            f"{by=} of composed frames: expected the acquisitions; call embed(by=...) on the cube, without frames()"
        )
    periods = split_period(by, resolved.canonical.array, resolved.compositing.period)
    days = pd.DatetimeIndex(resolved.canonical.array["time"].values)
    observed = [p for p in periods if ((days >= p[:10]) & (days < p[11:])).any()]
    if observed != periods:
        raise CubeError(
            f"no acquisition in {', '.join(p for p in periods if p not in observed)}: load them, or pass the other "
            f"periods, by={observed}"
        )
    return periods


def _embed_series(
    cube: xr.DataArray | xr.Dataset, resolved: ResolvedOptions, periods: list[str]
) -> xr.DataArray:
    """Embed each period of a series with the same statistics, (time, D, y, x) float32."""
    each = [replace(resolved, compositing=replace(resolved.compositing, period=p)) for p in periods]
    composed = [one.compose(one.canonical) for one in each]
    stats = None if resolved.statistics is None else resolved.statistics.array()
    if resolved.settings.norm == "per_tile_zscore":
        stats = _statistics(cube, each, [_pixels(c, resolved) for c in composed])
        if isinstance(stats, np.ndarray) and np.isfinite(stats).all():
            known = Statistics(tuple(stats[0]), tuple(stats[1]))
            each = [one.with_statistics(known) for one in each]
    series = join([_embed_composed(c, one, stats) for c, one in zip(composed, each, strict=True)], periods)
    if "norm_statistics" in series.attrs:
        series.attrs["norm_statistics"] = (
            "of the frames of all steps, computed with them; to_zarr records them"
        )
    return series


def _pixels(composed: xr.DataArray, resolved: ResolvedOptions) -> Any:
    """Return the values of frames on the grid of windows."""
    return composed.data if resolved.resize is None else resize_frames(composed.data, resolved.resize)


def _statistics(
    cube: xr.DataArray | xr.Dataset, each: Sequence[ResolvedOptions], pixels: Sequence[Any]
) -> Any:
    """Return mean and standard deviation (2, 10) of the frames of all periods; lazy if they are."""
    if not isinstance(pixels[0], np.ndarray) and each[0].needs_second_pass(sum(p.nbytes for p in pixels)):
        options = each[0].config
        again = read_cube(read_again(cube), bands=options["bands"], nodata=options["nodata"])
        pixels = [one.compose(again).data for one in each]
    return tile_statistics(*pixels)


def _embed_composed(
    composed: xr.DataArray,
    resolved: ResolvedOptions,
    stats: Any,
    squares: Squares | None = None,
    min_blocks: int | None = None,
) -> xr.DataArray:
    """Embed frames with resolved options and statistics, (D, y, x) float32."""
    record = frames_record(composed)
    settings = resolved.with_days(composed)
    data = _pixels(composed, resolved)
    lazy = not isinstance(data, np.ndarray)
    encode = encode_overlapping if settings.overlap else encode_windows
    encoded = encode(data, stats, resolved.rows, resolved.cols, settings, squares, min_blocks)

    emb = xr.DataArray(encoded, dims=("D", "y", "x"), name="anysat", coords=resolved.coords)
    if resolved.geobox is not None:
        emb.encoding["grid_mapping"] = "spatial_ref"
    if lazy and settings.norm == "per_tile_zscore":
        emb.encoding[STATISTICS] = Companion.of(stats)
    config = resolved.config if resolved.composed else {**resolved.config, "period": record["period"]}
    emb.attrs = embedding_attrs(composed, record, config, settings.spec, stats, emb, lazy)
    return emb

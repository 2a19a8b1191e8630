"""`embed`: a Sentinel-2 cube in, a georeferenced embedding cube out, with a record of how."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from xr_anysat.config import DEVICE, FRAMES, MODEL, NORM, PRECISION, TILE
from xr_anysat.cube.compositing import FRAMES_ATTR, Period
from xr_anysat.cube.normalization import Statistics, tile_statistics
from xr_anysat.cube.reading import read_cube
from xr_anysat.embedding.blocks import encode_windows, warn_if_empty
from xr_anysat.embedding.options import EmbedOptions, resolve_options, size_warning
from xr_anysat.embedding.output_grid import resize_frames
from xr_anysat.embedding.overlap import encode_overlapping
from xr_anysat.embedding.pooling import pool_cells
from xr_anysat.errors import warn
from xr_anysat.record import embedding_attrs
from xr_anysat.shared.graph import read_again


def embed(
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

    What was not observed takes no part: a missing pixel, date or patch is left out of statistics and
    of attention, as if the cube had never held it. A place with nothing observed comes out NaN.

    Parameters
    ----------
    cube : DataArray or Dataset
        Sentinel-2 surface reflectance as digital numbers (reflectance × 10 000, without the +1000
        offset), any integer or float dtype: a DataArray ``(time, band, y, x)`` with band names in any
        of the usual spellings, or a Dataset with one variable per band; from odc-stac, stackstac, xee,
        rioxarray or by hand. Pixels of 10 m in a projected CRS, or no CRS at all.
    frames : int or None, default 8
        Bins that the period is cut into, each composed to one frame. None: every acquisition is a
        frame with its own date, and so are the frames that :func:`xr_anysat.frames` made.
    period, reduce, empty, doy, doy_base, fill_value
        See :func:`xr_anysat.frames`.
    bands, nodata
        See :func:`xr_anysat.cube.reading.read_cube`.
    norm : str or Statistics, default "per_tile_zscore"
        ``"per_tile_zscore"``: by the statistics of this cube. ``"per_window_zscore"``: of each
        window. ``"unit_scale"`` (or ``"reflectance"``): divided by 10 000. ``"raw"`` (or ``"none"``):
        as they are. ``"pastis"``, ``"treesatai"``: constants of the training sets. Or what
        :func:`xr_anysat.statistics` gave. Digital numbers are clipped to 0..10 000 before.
    patch_size : int, default 10
        Side of a patch in metres, a positive multiple of 10.
    tile : int, default 24
        Side of a window in pixels, a multiple of the patch's. A window is what the model sees at
        once. For maps, ``patch_size=40, tile=64`` is nearer to what AnySat was trained on.
    overlap : int, default 0
        Pixels that a window shares with the next, a multiple of the patch's side and less than `tile`:
        windows then start every ``tile - overlap`` pixels, and a patch's token is the mean of those it
        has in all its windows, by weights that fall to a window's border as a squared sine and sum to
        one. Seams fade; half a `tile` takes each patch through four windows (docs/speed.md). For
        ``patch`` and ``dense``.
    anchor : {"auto", "grid", "cube"}
        Where windows start: at the CRS origin, so that the same ground lies in the same window
        whatever area is requested; or at the cube's own corner. ``"auto"`` is ``"cube"`` for a cube
        that fits in one window or has no CRS.
    resize : int, optional
        Resample the whole (square) cube to this many pixels a side, bilinearly, and embed it as one
        window.
    output : {"patch", "dense", "local", "tile"}
        ``patch``: a cell a patch. ``dense``: a cell a pixel, the patch's token and then the pixel's
        own. ``local``: the pixel's own token only, which no window border can show in. ``tile``: a
        cell a window.
    pool : {"mean", "max"}, optional
        Reduce over y and x, see :func:`xr_anysat.pool`.
    model : {"base", "small", "tiny"} or torch.nn.Module, default "base"
        Size, or a module that is called like upstream's (complete windows only).
    weights : None, path, "random" or ("random", seed)
        None (or ``"official"``): the published checkpoint, of ``"base"``. Random weights carry no
        learned meaning and are never fallen back to.
    device : str, default "auto"
        ``"auto"`` (a GPU where there is one), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``.
    precision : {"float32", "bfloat16", "float16", "int8"}
        What matrices are multiplied in.
    batch : int, optional
        Windows per forward pass on an accelerator. A CPU takes windows one by one, which is as fast and
        keeps results bit-identical.

    Returns
    -------
    DataArray, (D, y, x) float32, or (D,) with `pool`
        Lazy if `cube` is. D is 768 for ``base`` (twice that for ``dense``). ``y`` and ``x`` are the
        cells' centres; the CRS and the cube's scalar coords carry over. ``attrs`` hold all that is
        needed to make it again; ``embed(cube, **json.loads(emb.attrs["config"]))`` does.

    Raises
    ------
    CubeError, CubeTypeError
        The cube cannot be read as Sentinel-2 (what only pixel values can tell, a lazy cube tells
        when it is computed).
    OptionError
        An option is impossible.
    WeightsError, DeviceError
        The weights or the device are not there.

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
    warning = size_warning(resolved, lazy=resolved.canonical.array.chunks is not None)
    if warning is not None:
        warn(f"{warning}. cube.anysat.plan(...) tells what it takes")

    # Everything above used only metadata; NumPy cubes are read from here on
    made = resolved.compose(resolved.canonical)
    record = json.loads(made.attrs[FRAMES_ATTR])
    settings = resolved.with_days(made)
    data = made.data if resolved.resize is None else resize_frames(made.data, resolved.resize)
    lazy = not isinstance(data, np.ndarray)
    stats = None if resolved.statistics is None else resolved.statistics.array()
    if settings.norm == "per_tile_zscore":
        if lazy and resolved.needs_second_pass(data.nbytes):
            again = resolved.compose(read_cube(read_again(cube), bands=bands, nodata=nodata))
            stats = tile_statistics(again.data)
        else:
            stats = tile_statistics(data)
    encoded = (encode_overlapping if settings.overlap else encode_windows)(
        data, stats, resolved.rows, resolved.cols, settings
    )
    warn_if_empty(encoded)

    emb = xr.DataArray(encoded, dims=("D", "y", "x"), name="anysat", coords=resolved.coords)
    if resolved.geobox is not None:
        emb.encoding["grid_mapping"] = "spatial_ref"
    config = resolved.config if resolved.composed else {**resolved.config, "period": record["period"]}
    emb.attrs = embedding_attrs(made, record, config, settings.spec, stats, emb, lazy)
    return emb if pool is None else pool_cells(emb, pool)

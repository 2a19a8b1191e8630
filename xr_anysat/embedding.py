"""`embed`: a Sentinel-2 cube in, a georeferenced embedding cube out, with a record of how."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from xr_anysat.config import DEVICE, FRAMES, MODEL, NORM, PRECISION, TILE, option
from xr_anysat.cube import BANDS, PIXEL, Cube, check_embedding, read_cube
from xr_anysat.engine import Settings, device_of, encode, warn_if_empty
from xr_anysat.errors import CubeError, OptionError, warn
from xr_anysat.frames import (
    FRAMES_ATTR,
    RECHUNK,
    SOURCE_ATTRS,
    Period,
    Recipe,
    check_not_embedding,
    compose,
    is_composed,
)
from xr_anysat.lattice import Axis
from xr_anysat.model.weights import EncoderSpec, encoder_spec, loaded_sha256
from xr_anysat.overlap import encode_overlapping
from xr_anysat.radiometry import Statistics, parse_norm, tile_statistics
from xr_anysat.recompute import read_again

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox

OUTPUTS = ("patch", "dense", "local", "tile")
ANCHORS = ("auto", "grid", "cube")
POOLS = ("mean", "max")

SHARED_BYTES = 1 << 30
"""Lazy frames up to this size are kept between the pass for ``per_tile_zscore``'s statistics and that
for the embeddings; larger ones are composed twice, so that memory does not grow with the area."""

LAZY_BYTES = 1 << 40
"""Size of a lazy output from which on it is asked whether so much is meant."""

NOT_LOADED = "not loaded yet"
"""In the record, in place of the hash of an official checkpoint that was not here when a lazy graph was built."""

PATCHES_MAX = 1024
"""Patches a window that upstream advises at most (README of gastruc/AnySat)."""


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
        of the usual spellings, or a Dataset with a variable a band; from odc-stac, stackstac, xee,
        rioxarray or by hand. Pixels of 10 m in a projected CRS, or no CRS at all.
    frames : int or None, default 8
        Bins that the period is cut into, each composed to one frame. None: every acquisition is a
        frame with its own date, and so are the frames that :func:`xr_anysat.frames` made.
    period, reduce, empty, doy, doy_base, fill_value
        See :func:`xr_anysat.frames`.
    bands, nodata
        See :func:`xr_anysat.cube.read_cube`.
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
        whatever area is asked for; or at the cube's own corner. ``"auto"`` is ``"cube"`` for a cube
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
        Windows a forward on an accelerator. On a CPU windows go one by one, which is as fast and
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
    asked = request(**locals())
    absurd = too_large(asked, lazy=asked.canonical.array.chunks is not None)
    if absurd is not None:
        warn(f"{absurd}. cube.anysat.plan(...) tells what it takes")

    # all that metadata can tell has been told: here NumPy cubes are read
    made = asked.made(asked.canonical)
    record = json.loads(made.attrs[FRAMES_ATTR])
    settings = asked.settings_for(made)
    data = made.data if asked.resize is None else _resized(made.data, asked.resize)
    lazy = not isinstance(data, np.ndarray)
    stats = None if asked.statistics is None else asked.statistics.array()
    if settings.norm == "per_tile_zscore":
        if lazy and asked.reads_twice(data.nbytes):
            again = asked.made(read_cube(read_again(cube), bands=bands, nodata=nodata))
            stats = tile_statistics(again.data)
        else:
            stats = tile_statistics(data)
    encoded = (encode_overlapping if settings.overlap else encode)(
        data, stats, asked.rows, asked.cols, settings
    )
    warn_if_empty(encoded)

    emb = xr.DataArray(encoded, dims=("D", "y", "x"), name="anysat", coords=asked.coords)
    if asked.geobox is not None:
        emb.encoding["grid_mapping"] = "spatial_ref"
    config = asked.config if asked.composed else {**asked.config, "period": record["period"]}
    emb.attrs = _attrs(made, record, config, settings.spec, stats, emb, lazy)
    return emb if pool is None else _pooled(emb, pool)


# ---------------------------------------------------------------------- what is asked for


@dataclass(frozen=True)
class Request:
    """What a call of :func:`embed` asks for: all that metadata decide, before any pixel is looked at.

    Attributes
    ----------
    canonical : Cube
        The cube, read.
    composed : bool
        Whether its dates are frames already.
    recipe : Recipe
        How to compose, otherwise.
    statistics : Statistics or None
        What to normalize by, where that is known.
    settings : Settings
        All but the frames' days.
    rows, cols : Axis
        Place of the pixels on the lattice.
    geobox : GeoBox or None
        Grid of the pixels.
    coords : dict
        Coordinates of the output.
    resize : int or None
        Pixels a side to resample to.
    pool : str or None
        Reduction over y and x.
    config : dict
        What makes the same again, as far as it is known.
    """

    canonical: Cube
    composed: bool
    recipe: Recipe
    statistics: Statistics | None
    settings: Settings
    rows: Axis
    cols: Axis
    geobox: GeoBox | None
    coords: dict[Hashable, Any]
    resize: int | None
    pool: str | None
    config: dict[str, Any]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of the output, before it is pooled."""
        cell = self.settings.cell
        return self.settings.channels, self.rows.cells(cell)[1], self.cols.cells(cell)[1]

    def made(self, cube: Cube) -> xr.DataArray:
        """The frames of `cube`, which is the canonical one, or it read again."""
        return cube.array if self.composed else compose(cube, self.recipe)

    def settings_for(self, made: xr.DataArray) -> Settings:
        """The settings with the days of the frames `made`."""
        doy = tuple(int(d) for d in made["doy"].values)
        return replace(self.settings, doy=doy, offset_decided="items" in made.attrs)

    def reads_twice(self, frames_bytes: int) -> bool:
        """Whether lazy frames of so many bytes are made once for the statistics and once to be embedded."""
        return self.settings.norm == "per_tile_zscore" and frames_bytes > SHARED_BYTES


def request(cube: xr.DataArray | xr.Dataset, **options: Any) -> Request:
    """Check the options of :func:`embed`, all of them given, against each other and the cube's metadata.

    Raises
    ------
    CubeError, CubeTypeError, OptionError, WeightsError
        As :func:`embed` does.
    """
    o = SimpleNamespace(**options)
    check_not_embedding(cube)
    frames, tile, norm = option("frames", o.frames), option("tile", o.tile), option("norm", o.norm)
    recipe = Recipe(frames, o.period, o.reduce, o.empty, o.doy, o.doy_base, o.fill_value)
    norm_name, statistics = parse_norm(norm)
    side = _check_geometry(o.patch_size, tile, o.resize, o.batch)
    overlap = _check_overlap(o, side, tile, norm_name)
    resize = None if o.resize is None else int(o.resize)
    tile = int(tile) if resize is None else resize
    batch = None if o.batch is None else int(o.batch)
    for name, known in (("output", OUTPUTS), ("anchor", ANCHORS)):
        if options[name] not in known:
            raise OptionError(f"{name}={options[name]!r}: wanted one of {', '.join(map(repr, known))}")
    if o.pool is not None and o.pool not in POOLS:
        raise OptionError(
            f"pool={o.pool!r}: wanted one of {', '.join(map(repr, POOLS))}, or None for the whole grid"
        )

    composed = is_composed(cube, recipe, bands=o.bands, nodata=o.nodata)
    canonical = read_cube(cube, bands=o.bands, nodata=o.nodata)
    spec = encoder_spec(
        option("model", o.model),
        option("weights", o.weights),
        option("device", o.device),
        option("precision", o.precision),
    )

    geobox, shape = canonical.geobox, canonical.array.shape[-2:]
    if resize is not None:
        geobox, shape = _resized_grid(geobox, shape, resize)
    anchor = _effective_anchor(o.anchor, geobox, shape, tile)
    rows, cols = place(anchor, geobox, shape)
    settings = Settings(
        spec=spec, doy=(), norm=norm_name, output=o.output, tile=tile, side=side, batch=batch, overlap=overlap
    )
    config = {
        "frames": None if composed else recipe.frames, "period": None,
        "reduce": o.reduce, "empty": o.empty, "doy": o.doy, "doy_base": recipe.doy_base,
        "bands": None if o.bands is None else list(o.bands), "nodata": _jsonable(o.nodata),
        "fill_value": recipe.fill_value,
        "norm": asdict(statistics) if statistics is not None and norm_name == "statistics" else norm_name,
        "patch_size": int(o.patch_size), "tile": tile, "overlap": overlap, "anchor": anchor, "resize": resize,
        "output": o.output, "pool": o.pool, "model": spec.size, "weights": spec.source,
        "device": spec.device, "precision": spec.precision, "batch": batch,
    }  # fmt: skip
    return Request(
        canonical=canonical,
        composed=composed,
        recipe=recipe,
        statistics=statistics,
        settings=settings,
        rows=rows,
        cols=cols,
        geobox=geobox,
        coords=_coords(canonical.array, geobox, rows, cols, settings.cell),
        resize=resize,
        pool=o.pool,
        config=config,
    )


def too_large(asked: Request, *, lazy: bool) -> str | None:
    """What is absurd about so large an embedding, if anything is."""
    size, memory = math.prod(asked.shape) * 4, physical_memory()
    if not lazy and memory is not None and size > memory:
        return (
            f"this cube is not lazy, so its embedding is made at once, and {binary(size)} of float32 do not fit into "
            f"the {binary(memory)} of memory here: make it lazy, cube.chunk(y=2048, x=2048), and write the embedding "
            f"block by block {smaller(asked)}"
        )
    if lazy and asked.pool is None and size > LAZY_BYTES:
        return f"an embedding of {binary(size)} of float32: write it block by block {smaller(asked)}"
    return None


def smaller(asked: Request) -> str:
    """How to write a large embedding, and what makes it smaller, in words."""
    words = "with emb.anysat.to_zarr(store, codec='int8'), which takes a quarter of that"
    if asked.settings.output in ("dense", "local"):
        return f"{words}, or ask for less: output='patch' and patch_size=40 make one cell of 16 pixels"
    if asked.settings.output == "patch" and asked.settings.side < 4:
        return f"{words}, or ask for less: patch_size=40 makes one cell of 16 pixels"
    return words


def physical_memory() -> int | None:
    """Bytes of this machine's memory; None where the system does not tell (Windows)."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def binary(size: float) -> str:
    """Bytes in words.

    Examples
    --------
    >>> binary(3 << 30), binary(370_293_350_400)
    ('3 GiB', '345 GiB')
    """
    return scaled(size, "B", 1024)


def scaled(value: float, unit: str, step: int = 1000) -> str:
    """Three digits of `value`, and its `unit` with a prefix for thousands, or for 1024s.

    Examples
    --------
    >>> scaled(12_345_678_901, "FLOP"), scaled(999.6, "FLOP")
    ('12.3 GFLOP', '1 kFLOP')
    """
    prefixes = iter(
        ["", "k", "M", "G", "T", "P", "E"] if step == 1000 else ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"]
    )
    prefix = next(prefixes)
    while value >= 999.5:
        value, prefix = value / step, next(prefixes)
    return f"{value:.3g} {prefix}{unit}"


def pool(emb: xr.DataArray, how: str = "mean") -> xr.DataArray:
    """Reduce an embedding cube over y and x, leaving NaN cells out.

    Parameters
    ----------
    emb : DataArray, (D, y, x)
        What :func:`embed` made.
    how : {"mean", "max"}
        The reduction.

    Returns
    -------
    DataArray, (D,) float32
        NaN where there is no valid cell at all. Lazy if `emb` is.

    Raises
    ------
    CubeTypeError
        If `emb` is not an embedding cube.
    OptionError
        If `how` is unknown.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> import xr_anysat
    >>> emb = xr.DataArray([[[1.0, np.nan, 3.0]]], dims=("D", "y", "x"))
    >>> xr_anysat.pool(emb, "mean").values
    array([2.])
    """
    if how not in POOLS:
        raise OptionError(f"{how=}: wanted one of {', '.join(map(repr, POOLS))}")
    if not isinstance(emb, xr.DataArray) or not {"D", "y", "x"} <= set(emb.dims):
        check_embedding(emb, "pool()")
    return _pooled(emb, how)


def _pooled(emb: xr.DataArray, how: str) -> xr.DataArray:
    out = getattr(emb, how)(("y", "x"), skipna=True, keep_attrs=True)
    out.attrs = {**emb.attrs, "pool": how}
    if "config" in out.attrs:
        out.attrs["config"] = json.dumps({**json.loads(out.attrs["config"]), "pool": how})
    pooled: xr.DataArray = out
    return pooled


# ---------------------------------------------------------------------- options


def _check_geometry(patch_size: Any, tile: Any, resize: Any, batch: Any) -> int:
    """Pixels on the side of a patch, if patch and window fit each other."""
    if not _whole(patch_size) or patch_size % PIXEL:
        raise OptionError(
            f"{patch_size=}: wanted a positive multiple of {PIXEL:g} (metres; a pixel has {PIXEL:g} m)"
        )
    if not _whole(tile):
        raise OptionError(f"{tile=}: wanted a positive whole number of pixels")
    for name, value in (("resize", resize), ("batch", batch)):
        if value is not None and not _whole(value):
            raise OptionError(f"{name}={value!r}: wanted a positive whole number, or None")
    side = int(patch_size) // int(PIXEL)
    what, tile = ("tile", tile) if resize is None else ("resize", resize)
    if tile % side:
        near = sorted({max(side, int(tile) // side * side), (int(tile) // side + 1) * side})
        raise OptionError(
            f"{what}={tile} pixels is no multiple of the patch side, {side} pixels (patch_size={patch_size} m): "
            f"use {what}={' or '.join(map(str, near))}"
        )
    patches = (int(tile) // side) ** 2
    if patches > PATCHES_MAX:
        warn(
            f"{patches} patches a window ({what}={tile} px of {patch_size} m patches): the model was made for "
            f"at most {PATCHES_MAX}. Use a larger patch_size or a smaller {what}"
        )
    return side


def _check_overlap(o: Any, side: int, tile: Any, norm: str) -> int:
    """Pixels that windows share, if they can."""
    overlap = o.overlap
    if (not _whole(overlap) and overlap != 0) or isinstance(overlap, bool):
        raise OptionError(f"{overlap=}: wanted a whole number of pixels, 0 or more")
    if not overlap:
        return 0
    most = int(tile) - side
    if overlap % side or overlap > most:
        raise OptionError(
            f"overlap={overlap} pixels: wanted a multiple of the patch side, {side} pixels, up to {most} (tile={tile} "
            f"less a patch); half a window is overlap={int(tile) // 2 // side * side}"
        )
    why = None
    if o.output in ("tile", "local"):
        why = (
            f"output={o.output!r}",
            "only the patches of windows are blended, with output='patch' or 'dense'",
        )
    elif o.resize is not None:
        why = f"resize={o.resize}", "the whole cube is one window"
    elif norm == "per_window_zscore":
        why = (
            "norm='per_window_zscore'",
            "a pixel would be another one in each of its windows; norm='pastis' has none",
        )
    elif not isinstance(option("model", o.model), str):
        why = "a module object as model", "its stages cannot be run apart; model='base' with weights=PATH can"
    if why is not None:
        raise OptionError(
            f"overlap={overlap} with {why[0]}: {why[1]}. Leave overlap= out, or change the other"
        )
    return int(overlap)


def _whole(value: Any) -> bool:
    """Whether `value` is a positive whole number; 24.0 is."""
    number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0 and value == int(value)


def _jsonable(number: float | str | None) -> float | str | None:
    """A number, or None, as JSON has it; it has no NaN, and no type of NumPy's."""
    if number is None or isinstance(number, str):
        return number
    if math.isnan(number):
        return "nan"
    return int(number) if number == int(number) else float(number)


# ---------------------------------------------------------------------- grid


def _effective_anchor(anchor: str, geobox: GeoBox | None, shape: tuple[int, ...], tile: int) -> str:
    if anchor == "grid" and geobox is None:
        raise OptionError(
            "anchor='grid' needs a CRS: set one with cube.odc.assign_crs('EPSG:32632'), or use anchor='cube'"
        )
    if anchor == "auto":
        return "cube" if geobox is None or max(shape[-2:]) <= tile else "grid"
    return anchor


def place(anchor: str, geobox: GeoBox | None, shape: tuple[int, ...]) -> tuple[Axis, Axis]:
    """Rows and columns of the cube on the lattice."""
    row = col = 0
    if anchor == "grid":
        assert geobox is not None  # or the anchor had been refused
        left, top = geobox.affine.c, geobox.affine.f
        # a cube off the 10 m lattice keeps its own offset: the same for every crop of it
        row, col = (math.floor(round(v / PIXEL, 3)) for v in (-top, left))
    return Axis(row, shape[-2]), Axis(col, shape[-1])


def _resized_grid(
    geobox: GeoBox | None, shape: tuple[int, ...], size: int
) -> tuple[GeoBox | None, tuple[int, ...]]:
    """Grid and shape of a square cube of size × size pixels in place of its own."""
    height, width = shape
    if height != width:
        raise OptionError(
            f"resize={size} needs a square cube, this one has {height} × {width} pixels: crop it, "
            f"cube.isel(y=slice({min(height, width)}), x=slice({min(height, width)}))"
        )
    return None if geobox is None else geobox.zoom_to((size, size)), (size, size)


def _resized(data: Any, size: int) -> Any:
    """Square frames resampled to size × size pixels."""
    weights = bilinear(data.shape[-1], size)
    if isinstance(data, np.ndarray):
        return resample(data, weights)
    data = data.rechunk({2: -1, 3: -1}, method=RECHUNK)
    return data.map_blocks(
        resample, weights, chunks=(*data.chunks[:2], (size,), (size,)), dtype=np.float32,
        meta=np.empty((0,) * 4, np.float32),
    )  # fmt: skip


def bilinear(n: int, size: int) -> np.ndarray:
    """Weights (size, n) of bilinear resampling between pixel centres, clamped at the ends, no antialiasing.

    As ``torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`` has it, which rs-embed uses.
    """
    at = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
    low = np.floor(at).astype(int)
    weights = np.zeros((size, n))
    weights[np.arange(size), low] = 1 - (at - low)
    weights[np.arange(size), np.minimum(low + 1, n - 1)] += at - low
    return weights


def resample(frames: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Frames (T, band, n, n) times `weights` (size, n) on both axes, by what was observed only.

    A pixel is missing where less than half of its weight was observed.
    """
    there = np.isfinite(frames)
    value = weights @ np.where(there, frames, 0).astype(np.float64) @ weights.T
    share = weights @ there.astype(np.float64) @ weights.T
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(share >= 0.5, value / share, np.nan).astype(np.float32)


def _coords(
    made: xr.DataArray, geobox: GeoBox | None, rows: Axis, cols: Axis, cell: int
) -> dict[Hashable, Any]:
    """Centres of the cells, the CRS, and the scalar coords of the cube."""
    coords: dict[Hashable, Any] = {
        k: c.variable for k, c in made.coords.items() if c.ndim == 0 and k not in ("spatial_ref", "time")
    }
    cells = {"y": (*rows.cells(cell), rows.start), "x": (*cols.cells(cell), cols.start)}
    if geobox is not None:
        from affine import Affine
        from odc.geo.geobox import GeoBox
        from odc.geo.xr import xr_coords

        (top, height, row), (left, width, col) = cells["y"], cells["x"]
        a = geobox.affine
        west, north = a.c + a.a * (left * cell - col), a.f + a.e * (top * cell - row)
        grid = GeoBox((height, width), Affine(a.a * cell, 0, west, 0, a.e * cell, north), geobox.crs)
        return {**coords, **xr_coords(grid, dims=("y", "x"))}
    for dim, (first, count, start) in cells.items():
        if dim not in made.coords:
            continue
        if made[dim].dtype.kind not in "iuf":
            continue  # labels have no centres
        values = made[dim].values.astype(float)
        step = float(values[1] - values[0]) if values.size > 1 else 1.0
        if np.abs(np.diff(values) - step).max(initial=0) > 1e-3 * abs(step):
            raise CubeError(
                f"{dim!r} coordinates are not evenly spaced: give the cube a CRS and a regular grid, or drop "
                f"them with cube.drop_vars({dim!r})"
            )
        # resized cubes have fewer cells for the same extent
        pixels = (np.arange(first, first + count) * cell - start) + (cell - 1) / 2
        scale = values.size / (cols.size if dim == "x" else rows.size)
        coords[dim] = (dim, values[0] + step * ((pixels + 0.5) * scale - 0.5))
    return coords


# ---------------------------------------------------------------------- record


def _attrs(
    made: xr.DataArray,
    record: dict[str, Any],
    config: dict[str, Any],
    spec: EncoderSpec,
    stats: Any,
    emb: xr.DataArray,
    lazy: bool,
) -> dict[str, Any]:
    """All that is needed to make the embedding again, in types that Zarr and NetCDF 4 take."""
    doy0 = made["doy"].values - record["doy_base"]
    attrs: dict[str, Any] = {
        "long_name": f"AnySat {config['output']} embedding",
        "model": spec.size,
        "weights": spec.source,
        "weights_sha256": (spec.sha256 if lazy else loaded_sha256(spec)) or NOT_LOADED,
        "output": config["output"],
        "patch_size_m": config["patch_size"],
        "tile": config["tile"],
        "overlap": config["overlap"],
        "anchor": config["anchor"],
        "norm": config["norm"] if isinstance(config["norm"], str) else "statistics",
        "n_frames": int(made.sizes["time"]),
        "doy0_values": [int(d) for d in doy0],
        "doy_base": record["doy_base"],
        "frame_dates": [str(t)[:10] for t in made["time"].values.astype("datetime64[D]")],
        "temporal_window": record["period"],
        "grid_hw": [int(emb.sizes["y"]), int(emb.sizes["x"])],
        "grid_shape": [int(n) for n in emb.shape],
        "precision": spec.precision,
        "device": spec.device if lazy else device_of(spec),
        "versions": json.dumps(versions()),
        "frames": json.dumps(record),
        "config": json.dumps(config),
    }
    source = {k: made.attrs[k] for k in SOURCE_ATTRS if k in made.attrs}
    if source:
        attrs["source"] = json.dumps(source)
    if isinstance(stats, np.ndarray):
        attrs["norm_bands"] = list(BANDS)
        attrs["norm_mean"], attrs["norm_std"] = ([float(v) for v in row] for row in stats)
    elif config["norm"] == "per_tile_zscore":
        attrs["norm_statistics"] = (
            "of the frames of this cube, made when it is computed; cube.anysat.statistics() gives them, "
            "and as norm= they are recorded here"
        )
    return attrs


def versions() -> dict[str, str]:
    """Versions of the libraries that take part in a result."""
    from xr_anysat import __version__

    found = {"xr_anysat": __version__}
    for name in ("torch", "xarray", "dask", "numpy", "odc-geo", "bottleneck"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found

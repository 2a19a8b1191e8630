"""The options of `embed`, checked against each other and against the metadata of the cube."""

# ruff: noqa: RUF009  (`_declare` returns a dataclass field)

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypedDict

import xarray as xr

from xr_anysat.config import DEFAULTS, DEVICE, FRAMES, MODEL, NORM, PRECISION, TILE, option
from xr_anysat.cube.compositing import CompositeOptions, check_composed, check_not_embedding, compose
from xr_anysat.cube.normalization import Statistics, parse_norm
from xr_anysat.cube.periods import Period
from xr_anysat.cube.reading import Cube, read_cube
from xr_anysat.embedding.lattice import PixelRange
from xr_anysat.embedding.output_grid import effective_anchor, lattice_axes, output_coords, resized_grid
from xr_anysat.embedding.settings import BlockSpec
from xr_anysat.errors import OptionError, warn
from xr_anysat.model.weights import EncoderSpec, encoder_spec
from xr_anysat.shared.sensor import S2
from xr_anysat.shared.text import format_bytes, physical_memory
from xr_anysat.shared.values import check_choice, check_whole_number, is_number

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox

OUTPUTS = ("patch", "dense", "local", "tile")

ANCHORS = ("auto", "grid", "cube")

POOLS = ("mean", "max")

MAX_SHARED_FRAME_BYTES = 1 << 30
"""Lazy frames up to this size are kept in memory between the statistics of ``per_tile_zscore`` and the embeddings.

Larger frames are composed twice, so that memory does not grow with the area.
"""

LAZY_SIZE_WARNING = 1 << 40
"""Lazy outputs above this size trigger a warning."""

MAX_PATCHES = 1024
"""Most patches per window that upstream recommends (README of gastruc/AnySat)."""


def _declare(default: Any, description: str, *, choices: tuple[str, ...] = ()) -> Any:
    """Declare an option: its default and the facts that the checks and the documentation read."""
    return field(default=default, metadata={"description": description, "choices": choices})


@dataclass(frozen=True)
class EmbedOptions:
    """The options of :func:`xr_anysat.embed`, each declared once.

    The order and the defaults are those of the signature, and the fields are the keys of the recorded ``config``.
    An option whose name is a key of :data:`xr_anysat.config.DEFAULTS` can be set by the configuration.
    The metadata of a field contain its one-line ``description`` (docs/options.md) and its ``choices`` (empty if
    its check is elsewhere). :data:`xr_anysat.record.FIELDS` declares whether it changes results.
    """

    frames: int | None = _declare(
        FRAMES, "bins of the period, each composed to one frame; None: every acquisition"
    )
    period: Period = _declare(
        None, '`"2022"`, `"2022-06"`, `("2022-04-01", "2022-10-01")`, end exclusive; None: the cube\'s own'
    )
    reduce: str = _declare("median", 'or `"mean"`, `"clearest"`')
    empty: str = _declare("drop", 'a bin without acquisitions is dropped; `"nearest"` repeats its neighbor')
    doy: str = _declare("midpoint", 'date of a frame; or `"observed"`')
    doy_base: int = _declare(0, "1: 1 January is day 1")
    bands: Sequence[str] | None = _declare(None, "names of unnamed bands; None: from the cube")
    nodata: float | None = _declare(None, "value that marks a gap; None: from the cube")
    fill_value: float | None = _declare(None, "a digital number to put into gaps")
    norm: str | Statistics | dict[str, Any] = _declare(
        NORM, '`"per_window_zscore"`, `"unit_scale"`, `"raw"`, `"pastis"`, `"treesatai"`, `Statistics`'
    )
    patch_size: int = _declare(10, "side of a patch in meters, a multiple of 10")
    tile: int = _declare(TILE, "side of a window in pixels")
    overlap: int = _declare(0, "pixels that a window shares with the next; their embeddings are blended")
    anchor: str = _declare(
        "auto",
        '`"grid"`: windows start at the CRS origin; `"cube"`: at the corner of the cube',
        choices=ANCHORS,
    )
    resize: int | None = _declare(None, "pixels per side; resample the cube to one window")
    output: str = _declare("patch", 'or `"dense"`, `"local"`, `"tile"`', choices=OUTPUTS)
    pool: str | None = _declare(None, '`"mean"`, `"max"`: reduce over y and x', choices=POOLS)
    model: Any = _declare(MODEL, '`"small"`, `"tiny"`, or a module called like upstream\'s')
    weights: Any = _declare(None, 'a path, `"random"`, `("random", seed)`; None: the official checkpoint')
    device: str = _declare(DEVICE, '`"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"`')
    precision: str = _declare(PRECISION, '`"bfloat16"`, `"float16"`, `"int8"` ([speed](speed.md))')
    batch: int | None = _declare(None, "windows per forward pass on an accelerator; None: by device")

    def configured(self) -> EmbedOptions:
        """Return these options, with the configured value of every option that the caller did not pass."""
        names = [f.name for f in fields(self) if f.name in DEFAULTS]
        return replace(self, **{name: option(name, getattr(self, name)) for name in names})

    def encoder(self) -> EncoderSpec:
        """Specify the encoder; this checks everything that needs neither torch nor the contents of the weights."""
        return encoder_spec(self.model, self.weights, self.device, self.precision)

    def check_choices(self) -> None:
        """Refuse a value outside the declared choices of its option."""
        for f in fields(self):
            value, known = getattr(self, f.name), f.metadata["choices"]
            if known and not (value is None and f.default is None):
                check_choice(
                    f.name, value, known, ", or None for the whole grid" if f.default is None else ""
                )


class EmbedKeywords(TypedDict, total=False):
    """The keyword arguments of :func:`xr_anysat.embed`, for functions that pass them on.

    Type checkers need them written out; a test compares them with `EmbedOptions`.
    """

    period: Period
    reduce: str
    empty: str
    doy: str
    doy_base: int
    bands: Sequence[str] | None
    nodata: float | None
    fill_value: float | None
    norm: str | Statistics | dict[str, Any]
    patch_size: int
    tile: int
    overlap: int
    anchor: str
    resize: int | None
    output: str
    pool: str | None
    model: Any
    weights: Any
    device: str
    precision: str
    batch: int | None


@dataclass(frozen=True)
class ResolvedOptions:
    """A checked call of :func:`embed`: everything that follows from options and metadata, without reading pixels.

    Attributes
    ----------
    canonical : Cube
        The cube in canonical form.
    composed : bool
        Whether its dates are already frames.
    compositing : CompositeOptions
        How to compose frames, if they are not.
    statistics : Statistics or None
        Statistics to normalize by, if they are known.
    settings : BlockSpec
        Settings of the blocks, without the days of the frames.
    rows, cols : PixelRange
        Position of the pixels on the lattice.
    geobox : GeoBox or None
        Grid of the pixels.
    coords : dict
        Coordinates of the output.
    resize : int or None
        Pixels per side after resampling.
    pool : str or None
        Reduction over y and x.
    config : dict
        Options that reproduce the result, as far as they are known.
    """

    canonical: Cube
    composed: bool
    compositing: CompositeOptions
    statistics: Statistics | None
    settings: BlockSpec
    rows: PixelRange
    cols: PixelRange
    geobox: GeoBox | None
    coords: dict[Hashable, Any]
    resize: int | None
    pool: str | None
    config: dict[str, Any]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of the output before pooling."""
        cell = self.settings.cell
        return self.settings.channels, self.rows.covering_cells(cell)[1], self.cols.covering_cells(cell)[1]

    def compose(self, cube: Cube) -> xr.DataArray:
        """Return the frames of `cube`, which is `canonical` or a second reading of it."""
        return cube.array if self.composed else compose(cube, self.compositing)

    def with_days(self, composed: xr.DataArray) -> BlockSpec:
        """Return the settings with the days of the composed frames."""
        doy = tuple(int(d) for d in composed["doy"].values)
        return replace(self.settings, doy=doy, offset_decided="items" in composed.attrs)

    def with_statistics(self, statistics: Statistics) -> ResolvedOptions:
        """Return these options with statistics that are known now."""
        settings = replace(self.settings, norm="statistics")
        config = {**self.config, "norm": asdict(statistics)}
        return replace(self, statistics=statistics, settings=settings, config=config)

    def needs_second_pass(self, frames_bytes: int) -> bool:
        """Whether lazy frames of this size are composed twice: for the statistics, and for the embeddings."""
        return self.settings.norm == "per_tile_zscore" and frames_bytes > MAX_SHARED_FRAME_BYTES


def check_options(o: EmbedOptions) -> tuple[CompositeOptions, str, Statistics | None, int, int]:
    """Check configured options against each other, without a cube.

    Returns
    -------
    tuple
        How frames are composed; the name of the normalization, and its statistics if they are known; the pixels on the
        side of a patch; and the pixels that windows share.

    Raises
    ------
    OptionError
        If an option is impossible.
    """
    compositing = CompositeOptions(o.frames, o.period, o.reduce, o.empty, o.doy, o.doy_base, o.fill_value)
    norm, statistics = parse_norm(o.norm)
    side = _check_geometry(o)
    overlap = _check_overlap(o, side, norm)
    o.check_choices()
    return compositing, norm, statistics, side, overlap


def checked_encoder(options: EmbedOptions) -> EncoderSpec:
    """Check options before any work, as far as that needs no cube, and specify the encoder."""
    configured = options.configured()
    check_options(configured)
    return configured.encoder()


def resolve_options(cube: xr.DataArray | xr.Dataset, options: EmbedOptions) -> ResolvedOptions:
    """Check the options of :func:`embed` against each other and against the metadata of the cube.

    Raises
    ------
    CubeError, CubeTypeError, OptionError, WeightsError
        As :func:`embed` does.
    """
    check_not_embedding(cube)
    o = options.configured()
    compositing, norm, statistics, side, overlap = check_options(o)
    resize = None if o.resize is None else int(o.resize)
    tile = int(o.tile) if resize is None else resize
    batch = None if o.batch is None else int(o.batch)
    patches = (tile // side) ** 2
    if patches > MAX_PATCHES:
        what = "tile" if resize is None else "resize"
        warn(
            f"{patches} patches per window ({what}={tile} px, patches of {o.patch_size} m): upstream recommends at "
            f"most {MAX_PATCHES}. Use a larger patch_size or a smaller {what}"
        )

    composed = check_composed(cube, compositing, bands=o.bands, nodata=o.nodata)
    canonical = read_cube(cube, bands=o.bands, nodata=o.nodata)
    spec = o.encoder()

    geobox, shape = canonical.geobox, canonical.array.shape[-2:]
    if resize is not None:
        geobox, shape = resized_grid(geobox, shape, resize)
    anchor = effective_anchor(o.anchor, geobox, shape, tile)
    rows, cols = lattice_axes(anchor, geobox, shape)
    settings = BlockSpec(
        spec=spec, doy=(), norm=norm, output=o.output, tile=tile, side=side, batch=batch, overlap=overlap
    )
    # in the order of the fields; an option without an entry here is recorded as passed
    config = {f.name: getattr(o, f.name) for f in fields(o)} | {
        "frames": None if composed else compositing.frames, "period": None, "doy_base": compositing.doy_base,
        "bands": None if o.bands is None else list(o.bands), "nodata": to_json_number(o.nodata),
        "fill_value": compositing.fill_value,
        "norm": asdict(statistics) if statistics is not None and norm == "statistics" else norm,
        "patch_size": int(o.patch_size), "tile": tile, "overlap": overlap, "anchor": anchor, "resize": resize,
        "model": spec.size, "weights": str(spec.source), "device": spec.device, "precision": spec.precision,
        "batch": batch,
    }  # fmt: skip
    return ResolvedOptions(
        canonical=canonical,
        composed=composed,
        compositing=compositing,
        statistics=statistics,
        settings=settings,
        rows=rows,
        cols=cols,
        geobox=geobox,
        coords=output_coords(canonical.array, geobox, rows, cols, settings.cell),
        resize=resize,
        pool=o.pool,
        config=config,
    )


def size_warning(resolved: ResolvedOptions, *, lazy: bool, steps: int = 1) -> str | None:
    """Describe the problem with an embedding of this size, or a series of several; None if there is none."""
    size, memory = steps * math.prod(resolved.shape) * 4, physical_memory()
    if not lazy and memory is not None and size > memory:
        return (
            f"this cube is not lazy, so its embedding is computed now, and {format_bytes(size)} of float32 do not fit "
            f"into the {format_bytes(memory)} of memory here: make it lazy, cube.chunk(y=2048, x=2048), and write the "
            f"embedding block by block {storage_hint(resolved)}"
        )
    if lazy and resolved.pool is None and size > LAZY_SIZE_WARNING:
        return f"an embedding of {format_bytes(size)} of float32: write it block by block {storage_hint(resolved)}"
    return None


def storage_hint(resolved: ResolvedOptions) -> str:
    """Describe how to store a large embedding, and how to make it smaller."""
    hint = "with emb.anysat.to_zarr(store, codec='int8'), which takes a quarter of that"
    if resolved.settings.output in ("dense", "local"):
        return f"{hint}, or request fewer cells: output='patch' with patch_size=40 has one cell per 16 pixels"
    if resolved.settings.output == "patch" and resolved.settings.side < 4:
        return f"{hint}, or request fewer cells: patch_size=40 has one cell per 16 pixels"
    return hint


def _check_geometry(options: EmbedOptions) -> int:
    """Check that patches fit into windows, and return the pixels on the side of a patch."""
    patch_size, tile, resize = options.patch_size, options.tile, options.resize
    if not is_number(patch_size) or patch_size <= 0 or patch_size % S2.pixel_size:
        raise OptionError(
            f"{patch_size=}: expected a positive multiple of {S2.pixel_size:g} (meters, the side of a pixel)"
        )
    check_whole_number("tile", tile, of="pixels", float_allowed=True)
    for name, value in (("resize", resize), ("batch", options.batch)):
        if value is not None:
            check_whole_number(name, value, hint=", or None", float_allowed=True)
    side = int(patch_size) // int(S2.pixel_size)
    what, tile = ("tile", tile) if resize is None else ("resize", resize)
    if tile % side:
        near = sorted({max(side, int(tile) // side * side), (int(tile) // side + 1) * side})
        raise OptionError(
            f"{what}={tile} pixels is not a multiple of the patch side, {side} pixels (patch_size={patch_size} m): "
            f"use {what}={' or '.join(map(str, near))}"
        )
    return side


def _check_overlap(o: EmbedOptions, side: int, norm: str) -> int:
    """Check that windows can overlap with these options, and return the pixels that they share."""
    overlap = check_whole_number("overlap", o.overlap, 0, of="pixels", float_allowed=True)
    tile = int(o.tile)
    if not overlap:
        return 0
    maximum = tile - side
    if overlap % side or overlap > maximum:
        raise OptionError(
            f"overlap={overlap} pixels: expected a multiple of the patch side, {side} pixels, up to {maximum} "
            f"(tile={tile} less a patch); half a window is overlap={tile // 2 // side * side}"
        )
    conflict = None
    if o.output in ("tile", "local"):
        conflict = f"output={o.output!r}", "only patches are blended, with output='patch' or 'dense'"
    elif o.resize is not None:
        conflict = f"resize={o.resize}", "the whole cube is one window"
    elif norm == "per_window_zscore":
        conflict = (
            "norm='per_window_zscore'",
            "a pixel would have another value in each of its windows; norm='pastis' has the same in all",
        )
    elif not isinstance(o.model, str):
        conflict = (
            "a module object as model",
            "its stages cannot be run separately; those of model='base' with weights=PATH can",
        )
    if conflict is not None:
        other, reason = conflict
        raise OptionError(
            f"overlap={overlap} with {other}: {reason}. Leave overlap= out, or change the other option"
        )
    return overlap


def to_json_number(number: float | str | None) -> float | str | None:
    """Convert a number, or None, to what JSON can store, which excludes NaN and NumPy types."""
    if number is None or isinstance(number, str):
        return number
    if math.isnan(number):
        return "nan"
    return int(number) if number == int(number) else float(number)

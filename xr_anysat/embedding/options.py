"""The options of `embed`, checked against each other and against the metadata of the cube."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import xarray as xr

from xr_anysat.config import option
from xr_anysat.cube.compositing import CompositeOptions, check_composed, check_not_embedding, compose
from xr_anysat.cube.normalization import Statistics, parse_norm
from xr_anysat.cube.reading import PIXEL, Cube, read_cube
from xr_anysat.embedding.lattice import PixelRange
from xr_anysat.embedding.output_grid import _coords, _effective_anchor, _resized_grid, lattice_axes
from xr_anysat.embedding.settings import BlockSpec
from xr_anysat.errors import OptionError, warn
from xr_anysat.model.weights import encoder_spec
from xr_anysat.shared.text import format_bytes, physical_memory
from xr_anysat.shared.values import check_choice, check_whole_number, is_number

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox

OUTPUTS = ("patch", "dense", "local", "tile")

ANCHORS = ("auto", "grid", "cube")

POOLS = ("mean", "max")

MAX_SHARED_FRAME_BYTES = 1 << 30
"""Lazy frames up to this size are kept between the pass for ``per_tile_zscore``'s statistics and that
for the embeddings; larger ones are composed twice, so that memory does not grow with the area."""

LAZY_SIZE_WARNING = 1 << 40
"""Size of a lazy output from which on it is asked whether so much is meant."""

MAX_PATCHES = 1024
"""Patches a window that upstream advises at most (README of gastruc/AnySat)."""


@dataclass(frozen=True)
class ResolvedOptions:
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
    recipe: CompositeOptions
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
        """Channels, rows and columns of the output, before it is pooled."""
        cell = self.settings.cell
        return self.settings.channels, self.rows.cells(cell)[1], self.cols.cells(cell)[1]

    def made(self, cube: Cube) -> xr.DataArray:
        """The frames of `cube`, which is the canonical one, or it read again."""
        return cube.array if self.composed else compose(cube, self.recipe)

    def settings_for(self, made: xr.DataArray) -> BlockSpec:
        """The settings with the days of the frames `made`."""
        doy = tuple(int(d) for d in made["doy"].values)
        return replace(self.settings, doy=doy, offset_decided="items" in made.attrs)

    def reads_twice(self, frames_bytes: int) -> bool:
        """Whether lazy frames of so many bytes are made once for the statistics and once to be embedded."""
        return self.settings.norm == "per_tile_zscore" and frames_bytes > MAX_SHARED_FRAME_BYTES


def resolve_options(cube: xr.DataArray | xr.Dataset, **options: Any) -> ResolvedOptions:
    """Check the options of :func:`embed`, all of them given, against each other and the cube's metadata.

    Raises
    ------
    CubeError, CubeTypeError, OptionError, WeightsError
        As :func:`embed` does.
    """
    o = SimpleNamespace(**options)
    check_not_embedding(cube)
    frames, tile, norm = option("frames", o.frames), option("tile", o.tile), option("norm", o.norm)
    recipe = CompositeOptions(frames, o.period, o.reduce, o.empty, o.doy, o.doy_base, o.fill_value)
    norm_name, statistics = parse_norm(norm)
    side = _check_geometry(o.patch_size, tile, o.resize, o.batch)
    overlap = _check_overlap(o, side, tile, norm_name)
    resize = None if o.resize is None else int(o.resize)
    tile = int(tile) if resize is None else resize
    batch = None if o.batch is None else int(o.batch)
    for name, known in (("output", OUTPUTS), ("anchor", ANCHORS)):
        check_choice(name, options[name], known)
    if o.pool is not None:
        check_choice("pool", o.pool, POOLS, ", or None for the whole grid")

    composed = check_composed(cube, recipe, bands=o.bands, nodata=o.nodata)
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
    rows, cols = lattice_axes(anchor, geobox, shape)
    settings = BlockSpec(
        spec=spec, doy=(), norm=norm_name, output=o.output, tile=tile, side=side, batch=batch, overlap=overlap
    )
    config = {
        "frames": None if composed else recipe.frames, "period": None,
        "reduce": o.reduce, "empty": o.empty, "doy": o.doy, "doy_base": recipe.doy_base,
        "bands": None if o.bands is None else list(o.bands), "nodata": to_json_number(o.nodata),
        "fill_value": recipe.fill_value,
        "norm": asdict(statistics) if statistics is not None and norm_name == "statistics" else norm_name,
        "patch_size": int(o.patch_size), "tile": tile, "overlap": overlap, "anchor": anchor, "resize": resize,
        "output": o.output, "pool": o.pool, "model": spec.size, "weights": str(spec.source),
        "device": spec.device, "precision": spec.precision, "batch": batch,
    }  # fmt: skip
    return ResolvedOptions(
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


def size_warning(asked: ResolvedOptions, *, lazy: bool) -> str | None:
    """What is absurd about so large an embedding, if anything is."""
    size, memory = math.prod(asked.shape) * 4, physical_memory()
    if not lazy and memory is not None and size > memory:
        return (
            f"this cube is not lazy, so its embedding is made at once, and {format_bytes(size)} of float32 do not fit "
            f"into the {format_bytes(memory)} of memory here: make it lazy, cube.chunk(y=2048, x=2048), and write the "
            f"embedding block by block {storage_hint(asked)}"
        )
    if lazy and asked.pool is None and size > LAZY_SIZE_WARNING:
        return (
            f"an embedding of {format_bytes(size)} of float32: write it block by block {storage_hint(asked)}"
        )
    return None


def storage_hint(asked: ResolvedOptions) -> str:
    """How to write a large embedding, and what makes it smaller, in words."""
    words = "with emb.anysat.to_zarr(store, codec='int8'), which takes a quarter of that"
    if asked.settings.output in ("dense", "local"):
        return f"{words}, or ask for less: output='patch' and patch_size=40 make one cell of 16 pixels"
    if asked.settings.output == "patch" and asked.settings.side < 4:
        return f"{words}, or ask for less: patch_size=40 makes one cell of 16 pixels"
    return words


def _check_geometry(patch_size: Any, tile: Any, resize: Any, batch: Any) -> int:
    """Pixels on the side of a patch, if patch and window fit each other."""
    if not is_number(patch_size) or patch_size <= 0 or patch_size % PIXEL:
        raise OptionError(
            f"{patch_size=}: expected a positive multiple of {PIXEL:g} (metres; a pixel has {PIXEL:g} m)"
        )
    check_whole_number("tile", tile, of="pixels", float_allowed=True)
    for name, value in (("resize", resize), ("batch", batch)):
        if value is not None:
            check_whole_number(name, value, hint=", or None", float_allowed=True)
    side = int(patch_size) // int(PIXEL)
    what, tile = ("tile", tile) if resize is None else ("resize", resize)
    if tile % side:
        near = sorted({max(side, int(tile) // side * side), (int(tile) // side + 1) * side})
        raise OptionError(
            f"{what}={tile} pixels is no multiple of the patch side, {side} pixels (patch_size={patch_size} m): "
            f"use {what}={' or '.join(map(str, near))}"
        )
    patches = (int(tile) // side) ** 2
    if patches > MAX_PATCHES:
        warn(
            f"{patches} patches a window ({what}={tile} px of {patch_size} m patches): the model was made for "
            f"at most {MAX_PATCHES}. Use a larger patch_size or a smaller {what}"
        )
    return side


def _check_overlap(o: Any, side: int, tile: Any, norm: str) -> int:
    """Pixels that windows share, if they can."""
    overlap = check_whole_number("overlap", o.overlap, 0, of="pixels", float_allowed=True)
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


def to_json_number(number: float | str | None) -> float | str | None:
    """A number, or None, as JSON has it; it has no NaN, and no type of NumPy's."""
    if number is None or isinstance(number, str):
        return number
    if math.isnan(number):
        return "nan"
    return int(number) if number == int(number) else float(number)

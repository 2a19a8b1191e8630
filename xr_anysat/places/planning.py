"""`plan_places`: what a table of places takes, before any pixel is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from xr_anysat.embedding.lattice import PixelRange
from xr_anysat.embedding.plan import is_upstream, plan
from xr_anysat.embedding.workload import total_multiply_adds
from xr_anysat.places.batch import prepare, with_options
from xr_anysat.places.computing import empty_window, find_scenes
from xr_anysat.places.grouping import strips
from xr_anysat.places.table import TABLE_CODECS
from xr_anysat.shared.sensor import S2
from xr_anysat.shared.text import format_bytes, format_duration, format_si
from xr_anysat.shared.values import check_choice
from xr_anysat.store.codecs import CODECS

if TYPE_CHECKING:
    from geopandas import GeoDataFrame, GeoSeries

PIXEL_BYTES = 4 * 2 + 6 * 2 / 4 + 1 / 4
"""Bytes per pixel of 10 m in the files: four bands of 10 m and six of 20 m with 2 bytes, and the SCL of 20 m with 1."""


@dataclass(frozen=True)
class PlacesPlan:
    """The size and work of :func:`embed_places`, computed from metadata.

    Attributes
    ----------
    places : int
        Rows that are embedded.
    refused : int
        Rows whose geometry or period cannot be used.
    not_found : int
        Rows without a usable scene.
    groups : int
        Groups of places, each with one search.
    scenes : int
        Scenes that are read, added up over all groups.
    windows : int
        Squares of one stride that hold a place; windows, if windows do not overlap.
    pixels : int
        Pixels of 10 m that are read per scene, added up over all groups.
    files_opened : int
        Files, each opened once for all places of a strip (:data:`xr_anysat.places.grouping.MAX_STRIP_PIXELS`).
    bytes_read : int
        Bytes of these pixels in all scenes before compression. Files are read in blocks, so more is transferred.
    bytes_written : int
        Bytes of the vectors before compression.
    flop : int
        Floating-point operations of the model; an upper bound if windows overlap.
    seconds : float or None
        Time of the model on this machine, with ``calibrate=True``. Reading takes time, too.
    """

    places: int
    refused: int
    not_found: int
    groups: int
    scenes: int
    windows: int
    pixels: int
    files_opened: int
    bytes_read: int
    bytes_written: int
    flop: int
    seconds: float | None = None

    def __str__(self) -> str:
        """Describe the plan, one line per figure."""
        lines = [
            f"places     {self.places:,} in {self.groups:,} groups; refused: {self.refused:,}, nothing found: "
            f"{self.not_found:,}",
            f"reads      {self.scenes:,} scenes, {self.files_opened:,} files, {format_bytes(self.bytes_read)} "
            "before compression",
            f"windows    {self.windows:,}, {format_si(self.flop, 'FLOP')}",
            f"writes     {format_bytes(self.bytes_written)}",
        ]
        if self.seconds is not None:
            lines.append(
                f"time       {format_duration(self.seconds)} for the model on this machine, and reading"
            )
        return "\n".join(lines)


def plan_places(
    places: GeoDataFrame | GeoSeries,
    datetime: Any,
    *,
    window: int | None = None,
    codec: str | None = None,
    calibrate: bool = False,
    **options: Any,
) -> PlacesPlan:
    """Report what embedding a table of places takes. Catalogs are searched, one search per group; no pixel is read.

    Parameters
    ----------
    places, datetime, window, codec, catalog, ..., frames, ...
        As for :func:`embed_places`.
    calibrate : bool
        Run the model on windows of random pixels for some seconds, and report the time that it takes on this machine.

    Returns
    -------
    PlacesPlan
        Print it.

    Raises
    ------
    OptionError, WeightsError
        As :func:`embed_places` does before it reads pixels.
    """
    if codec is not None:
        check_choice("codec", codec, [c for c in TABLE_CODECS if c is not None], ", or None")
    work = prepare("plan_places()", places, datetime, window, "status", options)
    settings = work.one.settings
    flop = scenes = windows = pixels = files = read = found = missing = 0
    for group in work.groups:
        parts = group.rectangles(settings)
        decided, problem, _ = find_scenes(group, parts, work.query, raises=False)
        if problem is not None:
            missing += len(group.places)
            continue
        used = [scene for scene in decided if scene.unused is None]
        dates = len({scene.time.date() for scene in used})
        frames = dates if work.options.frames is None else work.options.frames
        timed = replace(settings, doy=(0,) * frames)
        size = sum(part.shape[0] * part.shape[1] for part in parts)
        found += len(group.places)
        scenes += len(used)
        windows += len({square for place in group.places for square in place.squares})
        pixels += size
        files += len(used) * (len(S2.bands) + (work.query.masking.mask is not None)) * len(strips(parts))
        read += round(size * len(used) * PIXEL_BYTES)
        for part in parts:
            axes = ([PixelRange(0, n)] for n in part.shape)
            flop += 2 * total_multiply_adds(timed, *axes, published=is_upstream(work.options.model))
    seconds = None
    if calibrate and flop:
        one = plan(empty_window(int(work.options.tile)), calibrate=True, **_of_the_model(work.options))
        assert one.seconds is not None  # with calibrate=True
        seconds = one.seconds * flop / one.flop
    return PlacesPlan(
        found, len(work.refused), missing, len(work.groups), scenes, windows, pixels, files, read,
        found * CODECS[codec].cell_bytes(settings.channels), flop, seconds,
    )  # fmt: skip


def _of_the_model(options: Any) -> dict[str, Any]:
    """Return the options that decide about the time of a window."""
    names = (
        "frames",
        "norm",
        "patch_size",
        "tile",
        "output",
        "model",
        "weights",
        "device",
        "precision",
        "batch",
    )
    return {name: getattr(options, name) for name in names}


with_options(plan_places, ())

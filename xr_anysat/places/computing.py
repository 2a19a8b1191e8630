"""The embeddings of one group of places: search, read only their windows, embed, and average.

The rectangles of a group are placed side by side in strips. Windows of a strip are embedded like those of any cube, and
a strip is read date by date with each file opened once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from xr_anysat.analysis.vector import OK, STATUS
from xr_anysat.analysis.zones import block_sums, merge_sums
from xr_anysat.embedding.embed import embed_resolved
from xr_anysat.embedding.lattice import PixelRange, Squares
from xr_anysat.embedding.options import EmbedOptions, ResolvedOptions, check_options, resolve_options
from xr_anysat.errors import CatalogError, ReadError
from xr_anysat.model.weights import resolve_device
from xr_anysat.places.grouping import Group, Rectangle, strips
from xr_anysat.places.table import MESSAGE, Results
from xr_anysat.shared.sensor import S2
from xr_anysat.stac.items import ItemDecision, footprint_of, lonlat
from xr_anysat.stac.loading import FOOTPRINT_MARGIN, load_parts
from xr_anysat.stac.reader import gdal_environment, leave_out_unreadable
from xr_anysat.stac.search import SceneQuery

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox

NOT_FOUND, UNREADABLE, INVALID, REFUSED = "not found", "unreadable", "invalid", "refused"
"""Status of rows without an embedding, besides ``ok``."""

FAILED = (NOT_FOUND, UNREADABLE, INVALID)
"""Status of rows that another try may change."""


@dataclass(frozen=True)
class Strip:
    """Rectangles side by side, as a cube.

    Attributes
    ----------
    rectangles : list of Rectangle
    columns : list of int
        First pixel column of each rectangle in the strip.
    cube : DataArray, (time, band, y, x)
        Lazy.
    """

    rectangles: list[Rectangle]
    columns: list[int]
    cube: xr.DataArray

    def squares(self, stride: int) -> Squares:
        """Return the squares of the strip that places need."""
        rows, cols = (PixelRange(0, self.cube.sizes[dim]).grid(stride) for dim in ("y", "x"))
        needed = np.zeros((rows.size, cols.size), bool)
        for part, column in zip(self.rectangles, self.columns, strict=True):
            top, left = part.halo // stride, (column + part.halo) // stride
            needed[top : top + part.rows.size // stride, left : left + part.cols.size // stride] = True
        return Squares(rows, cols, needed)

    def pieces(
        self, number: int, chunks: Any, cell: int
    ) -> Iterator[tuple[tuple[int, int], slice, slice, int, int]]:
        """Yield the blocks of the embedding that a rectangle meets, without its halo.

        For each: the numbers of the block, rows and columns within it, and the first row and column of this piece
        within the rectangle, all in cells.
        """
        part = self.rectangles[number]
        axes = []
        for start, size, sizes in (
            (part.halo, part.rows.size, chunks[1]),
            (self.columns[number] + part.halo, part.cols.size, chunks[2]),
        ):
            own = PixelRange(start // cell, size // cell)
            blocks = PixelRange(0, sum(sizes)).parts(sizes)
            axes.append(
                [
                    (n, own.slice_of(block), block.slice_of(own).start)
                    for n, block in enumerate(blocks)
                    if block.start < own.stop and own.start < block.stop
                ]
            )
        for (i, y, down), (j, x, across) in product(*axes):
            yield (i, j), y, x, down, across


def empty_window(tile: int) -> xr.DataArray:
    """Return a cube of one window and a year of dates, of which no pixel exists."""
    import dask.array as da

    dates = pd.date_range("2022-01-01", periods=365)
    values = da.zeros((365, len(S2.bands), tile, tile), chunks=-1, dtype=np.float32)
    return xr.DataArray(values, {"time": dates, "band": list(S2.bands)}, ("time", "band", "y", "x"))


def one_window(options: EmbedOptions) -> ResolvedOptions:
    """Check options, and resolve them for one window.

    Raises
    ------
    OptionError, WeightsError
        As in :func:`xr_anysat.embed`.
    """
    check_options(options)  # before the size of the window is used
    return resolve_options(empty_window(int(options.tile)), replace(options, anchor="cube"))


def area_of(group: Group, parts: Sequence[Rectangle]) -> GeoBox:
    """Return the grid that covers all rectangles."""
    rows = min(p.rows.start - p.halo for p in parts), max(p.rows.stop + p.halo for p in parts)
    cols = min(p.cols.start - p.halo for p in parts), max(p.cols.stop + p.halo for p in parts)
    whole = Rectangle(PixelRange(rows[0], rows[1] - rows[0]), PixelRange(cols[0], cols[1] - cols[0]), 0)
    return whole.geobox(group.crs)


def find_scenes(
    group: Group, parts: Sequence[Rectangle], query: SceneQuery, *, raises: bool
) -> tuple[list[ItemDecision], str | None, str | None]:
    """Search for the scenes of a group.

    Returns
    -------
    scenes : list of ItemDecision
        With the decisions about them.
    status, message : str or None
        If the group cannot be embedded.

    Raises
    ------
    CatalogError
        If it cannot be embedded, with `raises`.
    """
    area = area_of(group, parts)
    try:
        scenes = query.find(area, group.period)
    except CatalogError as error:
        if raises:
            raise
        return [], UNREADABLE, str(error)
    if query.on_error == "invalid":
        gdal = gdal_environment(s for s in scenes if s.unused is None)
        scenes = leave_out_unreadable(scenes, query.masking, gdal, query.workers)
    if any(scene.unused is None for scene in scenes):
        return scenes, None, None
    message = query.nothing_found(scenes, area, group.period)
    if raises:
        raise CatalogError(message)
    return scenes, NOT_FOUND, message


def load_strips(
    group: Group, parts: Sequence[Rectangle], scenes: Sequence[ItemDecision], query: SceneQuery
) -> Iterator[Strip]:
    """Load the rectangles of a group, lazily."""
    used = [scene for scene in scenes if scene.unused is None]
    gdal = gdal_environment(used)
    area = lonlat(area_of(group, parts))
    for numbers in strips(parts):
        chosen = [parts[n] for n in numbers]
        ends = np.cumsum([part.shape[1] for part in chosen])
        columns = [int(end) - part.shape[1] for end, part in zip(ends, chosen, strict=True)]
        geoboxes = [part.geobox(group.crs) for part in chosen]
        cube = load_parts(used, geoboxes, area, query.masking, query.on_error, gdal, query.workers)
        cube.attrs = query.record(scenes, cube["time"].values, group.period)
        yield Strip(chosen, columns, cube)


def embed_group(
    group: Group, query: SceneQuery, options: EmbedOptions, one: ResolvedOptions, *, raises: bool
) -> tuple[Results, dict[str, Any] | None]:
    """Embed the places of a group.

    Parameters
    ----------
    group : Group
    query : SceneQuery
    options : EmbedOptions
    one : ResolvedOptions
        Result of :func:`one_window`.
    raises : bool
        Whether an error is raised; otherwise it becomes the status of the rows that it affects.

    Returns
    -------
    results : dict
        In the order of the places.
    record : dict or None
        Attributes of the embedding; None if there is none.
    """
    settings = one.settings
    count = len(group.places)
    vectors = np.full((count, settings.channels), np.nan, np.float32)
    status, message = np.full(count, INVALID, object), np.full(count, "", object)
    rows = np.array([place.row for place in group.places])
    results = {"rows": rows, "vectors": vectors, STATUS: status, MESSAGE: message}
    scenes, problem, text = find_scenes(group, group.rectangles(settings), query, raises=raises)
    if problem is not None:
        status[:], message[:] = problem, text
        return results, None
    left = list(range(count))
    record = None
    while left:
        part = replace(group, places=tuple(group.places[n] for n in left))
        try:
            found, _, valid, record = _embed_places(part, scenes, query, options, one)
        except ReadError as error:
            if raises:
                raise
            hit = _affected(part, scenes, error, one)
            for n in hit:
                status[left[n]], message[left[n]] = UNREADABLE, str(error)
            left = [left[n] for n in range(len(left)) if n not in hit]
            continue
        with np.errstate(invalid="ignore", divide="ignore"):
            vectors[left] = (found / valid[:, None]).astype(np.float32)
        used = sum(scene.unused is None for scene in scenes)
        status[left] = np.where(valid > 0, OK, INVALID)
        message[left] = np.where(
            valid > 0, "", f"nothing was observed there in {used} scenes: masked or not covered"
        )
        left = []
    return results, record


def _affected(
    group: Group, scenes: Sequence[ItemDecision], error: ReadError, one: ResolvedOptions
) -> set[int]:
    """Return the numbers of the places that an unreadable item may cover."""
    shapes = [footprint_of(s.item) for s in scenes if s.item.id == error.item]
    if not shapes or any(shape is None for shape in shapes):
        return set(range(len(group.places)))
    near = [shape.buffer(FOOTPRINT_MARGIN) for shape in shapes if shape is not None]
    hit = set()
    for n, place in enumerate(group.places):
        alone = replace(group, places=(place,))
        extent = lonlat(area_of(alone, alone.rectangles(one.settings)))
        if any(extent.intersects(shape) for shape in near):
            hit.add(n)
    return hit or set(range(len(group.places)))


def _embed_places(
    group: Group,
    scenes: Sequence[ItemDecision],
    query: SceneQuery,
    options: EmbedOptions,
    one: ResolvedOptions,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
    """Sum the embeddings of the places of a group: sums (n, D), cells and observed cells (n,), and the record."""
    import dask

    settings = one.settings
    stride, cell = settings.stride, settings.cell
    parts = group.rectangles(settings)
    of_square: dict[tuple[int, int], list[int]] = {}
    for n, place in enumerate(group.places):
        for square in place.squares:
            of_square.setdefault(square, []).append(n)
    sums: list[
        tuple[tuple[int, ...], list[int]]
    ] = []  # position and places of each sum, in the order of the tasks
    tasks = []
    record: dict[str, Any] = {}
    delayed_sums = dask.delayed(_sums_of_block)  # type: ignore[attr-defined]
    for strip in load_strips(group, parts, scenes, query):
        resolved = resolve_options(strip.cube, replace(options, anchor="cube"))
        # a GPU computes the windows of many places at once; the cores of a CPU need several blocks
        blocks = None if resolve_device(settings.spec.device).type == "cpu" else 1
        emb = embed_resolved(strip.cube, resolved, strip.squares(stride), blocks)
        record = record or _record_of(emb)
        within: dict[tuple[int, int], list[Any]] = {}
        for k, part in enumerate(strip.rectangles):
            for at, y, x, down, across in strip.pieces(k, emb.chunks, cell):
                top, left = part.rows.start // cell + down, part.cols.start // cell + across
                rows, cols = (
                    PixelRange(first * cell, (cut.stop - cut.start) * cell).grid(stride)
                    for first, cut in ((top, y), (left, x))
                )
                squares = product(range(rows.start, rows.stop), range(cols.start, cols.stop))
                numbers = sorted({n for square in squares for n in of_square[square]})
                those = [group.places[n] for n in numbers]
                shapes = [(place.shape, top - place.top, left - place.left) for place in those]
                within.setdefault(at, []).append((y, x, shapes, (top, left), numbers))
        delayed_blocks = emb.data.to_delayed(optimize_graph=False)[
            0
        ]  # optimized one by one, they would not share reads
        for at, found in within.items():
            tasks.append(delayed_sums(delayed_blocks[at], [each[:3] for each in found]))
            sums += [each[3:] for each in found]
    made = [each for block in dask.compute(tasks)[0] for each in block]  # type: ignore[attr-defined]
    order = sorted(range(len(sums)), key=lambda k: sums[k][0])
    merged = merge_sums(
        len(group.places), settings.channels, [sums[k][1] for k in order], [made[k] for k in order]
    )
    return *merged, record


def _sums_of_block(values: np.ndarray, parts: Sequence[tuple[slice, slice, Any]]) -> list[Any]:
    """Sum parts of a block (D, h, w) over places; see :func:`xr_anysat.analysis.zones.block_sums`."""
    return [block_sums(values[:, y, x], places) for y, x, places in parts]


def _record_of(emb: xr.DataArray) -> dict[str, Any]:
    """Return the attributes of an embedding that describe places instead of a grid."""
    record = {str(k): v for k, v in emb.attrs.items() if k not in ("grid_hw", "grid_shape")}
    config = {**json.loads(record["config"]), "anchor": "grid"}
    return {**record, "anchor": "grid", "config": json.dumps(config)}


def refused_results(refused: dict[int, str], channels: int) -> Results:
    """Return the results of rows that cannot be embedded."""
    rows = np.array(sorted(refused), int)
    texts = np.array([refused[int(row)] for row in rows], object)
    vectors = np.full((len(rows), channels), np.nan, np.float32)
    return {"rows": rows, "vectors": vectors, STATUS: np.full(len(rows), REFUSED, object), MESSAGE: texts}

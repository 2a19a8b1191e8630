"""Labeled samples: the embeddings at points, in polygons, or in a table, and what is known there.

A point is one sample. A polygon gives its whole cells, at most a number that the caller chooses. A row of a table of
`embed_at` or `embed_places` has its own vector. Samples of one row of labels stay together in all folds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from xr_anysat.analysis.cells import observed
from xr_anysat.analysis.evaluation import Folds, block_folds, block_side, group_folds
from xr_anysat.analysis.sampling import sampling_keys
from xr_anysat.analysis.vector import (
    POINTS,
    POLYGONS,
    as_geodataframe,
    cells_at,
    in_crs_of,
    vectors,
)
from xr_anysat.analysis.zones import BLOCK, blocks_met, cell_shares, in_grid_units
from xr_anysat.cube.periods import parse_period
from xr_anysat.errors import CubeError, OptionError, warn
from xr_anysat.record import check_comparable, comparability_of, comparability_record, read_record
from xr_anysat.series import check_embeddings, is_series, periods_of
from xr_anysat.shared.grid import require_grid
from xr_anysat.shared.sensor import S2
from xr_anysat.shared.serialization import parse_json
from xr_anysat.shared.values import check_whole_number, is_number

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

EMBEDDING = "embedding"
"""Column of vectors, and key of the record in the attributes of a table."""

CELLS_PER_POLYGON = 25

GLOBAL_CRS = 6933
"""EASE-Grid 2.0, in meters and of equal area: the CRS in which the rows of tables are divided into blocks."""


@dataclass(frozen=True)
class Samples:
    """Labeled samples, in an order that does not depend on the order of the labels.

    Attributes
    ----------
    values : ndarray, (n, D) float64
        Embeddings, rounded to float32, which is how models store them.
    targets : ndarray, (n, columns)
        The columns of the labels, as they are.
    row : ndarray, (n,) int
        Row of the labels that each sample belongs to.
    x, y : ndarray, (n,) float64
        Center of the row, in the CRS of the cube, or in :data:`GLOBAL_CRS`.
    left_out : int
        Number of rows without a sample.
    """

    values: np.ndarray
    targets: np.ndarray
    row: np.ndarray
    x: np.ndarray
    y: np.ndarray
    left_out: int


def is_table(emb: Any) -> bool:
    """Return whether `emb` is a table rather than a cube."""
    return hasattr(emb, "geom_type") or hasattr(emb, "geometry")


def check_input(emb: Any, call: str) -> None:
    """Refuse what is neither an embedding cube nor a table of embeddings.

    Raises
    ------
    CubeTypeError, CubeError
        If `emb` is a wrong kind of cube.
    OptionError
        If it is a table without vectors.
    """
    if not is_table(emb):
        check_embeddings(emb, call)
        return
    table = as_geodataframe(emb, "the table", call)
    if EMBEDDING not in table.columns:
        raise OptionError(
            f"a table without the column {EMBEDDING!r}: expected the result of xr_anysat.embed_places or "
            "cube.anysat.embed_at"
        )


def record_of(emb: Any) -> dict[str, Any]:
    """Return the comparability record of a cube or a table; empty if there is none."""
    if isinstance(emb, xr.DataArray):
        return comparability_record(emb)
    text = emb.attrs.get(EMBEDDING)
    return {} if text is None else comparability_of(_parsed(text))


def _parsed(text: Any) -> Mapping[str, Any]:
    try:
        record = parse_json(text)
    except ValueError as error:
        raise CubeError(
            f"attrs[{EMBEDDING!r}] of the table is no record ({error}): restore it, or remove it with "
            f"table.attrs.pop({EMBEDDING!r})"
        ) from error
    if not isinstance(record, dict):
        raise CubeError(
            f"attrs[{EMBEDDING!r}] of the table is {json.dumps(record)[:60]}, expected the record of an embedding: "
            f"restore it, or remove it with table.attrs.pop({EMBEDDING!r})"
        )
    return record


def check_columns(frame: GeoDataFrame, columns: Sequence[Any], name: str) -> None:
    """Refuse columns that labels do not have.

    Raises
    ------
    OptionError
        With the columns that exist.
    """
    for column in columns:
        found = list(frame.columns).count(column)
        if not found or column == frame.active_geometry_name:
            others = [str(c) for c in frame.columns if c not in (frame.active_geometry_name, EMBEDDING)]
            raise OptionError(
                f"{name}={column!r}: expected a column of the labels, one of {', '.join(others) or 'none'}"
            )
        if found > 1:
            raise OptionError(
                f"{name}={column!r}: expected one column of this name, the labels have {found}; rename or drop them"
            )


def labeled_samples(
    emb: Any,
    labels: Any,
    columns: Sequence[str],
    call: str,
    *,
    cells_per_polygon: int,
    seed: int,
    time: str | None = None,
) -> Samples:
    """Return the samples of all rows of labels that have one.

    Parameters
    ----------
    emb : DataArray or GeoDataFrame
        A cube (D, y, x), a series (time, D, y, x), or a table of embeddings.
    labels : GeoDataFrame
        Points and polygons in any CRS; or a table of embeddings, whose vectors are used.
    columns : sequence of str
        The columns to learn. Rows with a missing value in any of them are left out.
    call : str
        For messages.
    cells_per_polygon : int
        Maximum number of cells of a polygon.
    seed : int
        Selects them.
    time : str, optional
        Column with the time of each label, for a series.

    Raises
    ------
    OptionError
        If `labels` or `columns` are invalid.
    CubeError
        If `labels` are a table of embeddings with other weights or settings.
    """
    frame = as_geodataframe(labels, "labels", call)
    check_columns(frame, columns, "column")
    cells_per_polygon = check_whole_number("cells_per_polygon", cells_per_polygon)
    known = frame[list(columns)].notna().all(axis=1).values
    if time is not None and (not is_series(emb) or EMBEDDING in frame.columns):
        raise OptionError(
            f"{time=} with {'labels that have vectors' if is_series(emb) else 'one period'}: expected it only for "
            "points or polygons in a series (time, D, y, x); leave it out"
        )
    if EMBEDDING in frame.columns:
        check_comparable(record_of(emb), record_of(frame), call, "in the table of labels")
        values, row = _of_table(frame, emb, known)
    elif is_table(emb):
        raise OptionError(
            f"{call} of a table with labels that have no column {EMBEDDING!r}: expected labels with vectors, the "
            "result of xr_anysat.embed_places or cube.anysat.embed_at with the same options"
        )
    elif is_series(emb):
        values, row = _of_series(emb, frame, known, call, time, cells_per_polygon, seed)
    else:
        values, row = _of_cube(emb, frame, known, call, cells_per_polygon, seed)
    values = values.astype(np.float32).astype(np.float64)
    x, y = _centers(emb, frame, call)
    placed = np.isfinite(x[row])
    values, row = values[placed], row[placed]
    x, y = x[row], y[row]
    targets = frame[list(columns)].values[row]
    # rounding and ties in fits and folds depend on the order
    ranks = [np.unique(column.astype(str), return_inverse=True)[1] for column in targets.T]
    order = np.lexsort((*ranks, *values.T[:2], x, y))
    left_out = len(frame) - len(np.unique(row))
    return Samples(values[order], targets[order], row[order], x[order], y[order], left_out)


def warn_of_left_out(samples: Samples, count: int) -> None:
    """Say how many rows have no sample."""
    if samples.left_out:
        warn(
            f"{samples.left_out} of {count} labels are left out: they have no value or no geometry, are outside the "
            "cube, on unobserved cells, or contain no whole cell. emb.anysat.sample(points) and "
            "emb.anysat.zonal(polygons) give the status of each"
        )


def table_vectors(table: GeoDataFrame, channels: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the vectors (n, D) float32 of a table, NaN where there is none, and which rows have one, (n,) bool.

    Raises
    ------
    OptionError
        If vectors have different lengths.
    """
    given = [None if v is None else np.asarray(v, np.float32) for v in table[EMBEDDING]]
    shapes = {v.shape for v in given if v is not None and v.ndim}
    if channels is not None:
        shapes |= {(channels,)}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        raise OptionError(
            f"column {EMBEDDING!r} has vectors of shapes {sorted(map(str, shapes)) or 'none'}: expected vectors (D,) "
            f"of one length{'' if channels is None else f', {channels}'}"
        )
    (depth,) = next(iter(shapes))
    values = np.full((len(given), depth), np.nan, np.float32)
    for number, vector in enumerate(given):
        if vector is not None and vector.ndim:
            values[number] = vector
    finite = np.asarray(np.isfinite(values).all(axis=-1))
    return values, finite


def _of_table(frame: GeoDataFrame, emb: Any, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    depth = table_vectors(emb)[0].shape[1] if is_table(emb) else emb.sizes["D"]
    values, finite = table_vectors(frame, depth)
    row = np.flatnonzero(known & finite)
    return values[row], row


def _of_cube(
    emb: xr.DataArray, frame: GeoDataFrame, known: np.ndarray, call: str, most: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Samples at points, and the whole cells of polygons."""
    geobox = require_grid(emb, call)
    places = in_crs_of(geobox, frame.geometry, (*POINTS, *POLYGONS), "labels")
    is_point = (places.geom_type == "Point").values & known
    rows, cols, inside = cells_at(emb, places.where(is_point), call)
    owner = np.flatnonzero(inside)
    found = [(owner, rows[inside], cols[inside])]
    polygons = places.where(places.geom_type.isin(POLYGONS).values & known)
    found += _whole_cells(in_grid_units(geobox, polygons), emb, most, seed)
    owner, rows, cols = (np.concatenate(each) for each in zip(*found, strict=True))
    values = vectors(emb, rows, cols)
    seen = observed(values.T) if len(values) else np.zeros(0, bool)
    return values[seen], owner[seen]


def _of_series(
    emb: xr.DataArray,
    frame: GeoDataFrame,
    known: np.ndarray,
    call: str,
    time: str | None,
    most: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Samples of each step: the labels whose time is in its period."""
    if time is None:
        raise OptionError(
            f"{call} of a series with labels: expected the column with their time, a year, a date or a period, as in "
            "time='year'"
        )
    check_columns(frame, [time], "time")
    spans = [_span(value, time) for value in frame[time]]
    found = []
    for i, period in enumerate(periods_of(emb)):
        limits = parse_period(period)
        assert limits is not None
        within = [span is not None and limits[0] <= span[0] and span[1] <= limits[1] for span in spans]
        found.append(_of_cube(emb.isel(time=i), frame, known & within, call, most, seed))
    values, row = (np.concatenate(each) for each in zip(*found, strict=True))
    return values, row


def _span(value: Any, column: str) -> tuple[pd.Timestamp, pd.Timestamp] | None:
    """Return the first day of a label's time and the day after its last; None if it has none."""
    if pd.isna(value):
        return None
    if isinstance(value, date | np.datetime64):
        day = pd.Timestamp(value).normalize()
        return day, day + pd.Timedelta(days=1)
    whole = is_number(value) and value == int(value)
    return parse_period(str(int(value)) if whole else value, f"{column} of a label")


def _whole_cells(
    places: Sequence[Any], emb: xr.DataArray, most: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return for each polygon its number and the rows and columns of cells that it covers whole, at most `most`."""
    height, width = emb.sizes["y"], emb.sizes["x"]
    cells: dict[int, list[np.ndarray]] = {}
    for (top, left), numbers in blocks_met(places, (height, width)).items():
        shape = (min(BLOCK, height - top), min(BLOCK, width - left))
        for number in numbers:
            i, j = np.nonzero(cell_shares(places[number], top, left, shape) >= 1)
            cells.setdefault(number, []).append(np.stack([i + top, j + left]))
    found = []
    for number, parts in cells.items():
        rows, cols = np.concatenate(parts, axis=1)
        keys = sampling_keys(rows.astype(np.uint64), cols.astype(np.uint64), seed=seed)
        chosen = np.sort(np.lexsort((cols, rows, keys))[:most])
        found.append((np.full(len(chosen), number), rows[chosen], cols[chosen]))
    return found


def _centers(emb: Any, frame: GeoDataFrame, call: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the coordinates of the center of each row; NaN if it has no geometry."""
    import shapely

    places = frame.geometry
    if is_table(emb):
        if places.crs is None:
            raise OptionError("labels have no CRS: set it, labels.set_crs('EPSG:4326')")
        places = places.to_crs(GLOBAL_CRS)
    else:
        geobox = require_grid(emb.isel(time=0) if is_series(emb) else emb, call)
        places = in_crs_of(geobox, places, (*POINTS, *POLYGONS), "labels")
    centers = shapely.centroid(np.asarray(places.values))
    return shapely.get_x(centers), shapely.get_y(centers)


def check_groups(frame: GeoDataFrame, groups: str, block_m: float | None, row: np.ndarray) -> np.ndarray:
    """Return the group of each sample, from its row of the labels.

    Raises
    ------
    OptionError
        If `groups` is no column of the labels or has gaps, or `block_m` is passed, too.
    """
    if block_m is not None:
        raise OptionError(f"{groups=} with {block_m=}: folds are groups or blocks; leave one of them out")
    check_columns(frame, [groups], "groups")
    values = frame[groups].iloc[row]
    if values.isna().any():
        raise OptionError(
            f"groups={groups!r}: expected a group for each label that is used, {int(values.isna().sum())} have "
            f"none; fill the gaps, or drop these labels, labels.dropna(subset=[{groups!r}])"
        )
    found: np.ndarray = values.to_numpy()
    return found


def folds_of(
    emb: Any, samples: Samples, labels: Any, groups: str | None, block_m: float | None, call: str
) -> Folds:
    """Return the folds of a cross-validation.

    Rows of labels are never divided. Warns if there are no folds.

    Raises
    ------
    OptionError
        If `groups` is no column of the labels or has gaps, or `block_m` is invalid.
    """
    if groups is not None:
        frame = as_geodataframe(labels, "labels", call)
        folds = group_folds(check_groups(frame, groups, block_m, samples.row))
        if not folds:
            warn(
                f"all labels are in one group of {groups!r}, so there is no cross-validation: pass labels of several "
                "groups, or leave groups= out"
            )
        return folds
    if is_table(emb):
        record = emb.attrs.get(EMBEDDING)
        tile = read_record(_parsed(record)).get("tile", 1) if record is not None else 1
    else:
        tile = emb.attrs.get("tile", 1)
    side = block_side(samples.x, samples.y, tile * S2.pixel_size, block_m)
    folds = block_folds(samples.x, samples.y, side)
    if not folds:
        warn(
            f"all labels are in one square of {side:g} m, so there is no cross-validation: pass a smaller block_m= "
            "(but cells of one window share their context), or labels that are farther apart"
        )
    return folds

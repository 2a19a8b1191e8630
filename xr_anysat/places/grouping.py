"""Which places are embedded together, and which rectangles of pixels they need.

Places of one grid (UTM zone), one period and one square of :data:`NEIGHBORHOOD_M` form a group: one search, and one
reading of each file. A group needs whole windows only; adjacent windows are read as one rectangle.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from xr_anysat.analysis.zones import BLOCK, blocks_met, cell_shares
from xr_anysat.cube.periods import parse_period
from xr_anysat.embedding.lattice import PixelRange, halo
from xr_anysat.embedding.settings import BlockSpec
from xr_anysat.errors import AnySatError, OptionError
from xr_anysat.shared.sensor import S2
from xr_anysat.shared.values import check_whole_number, is_whole_number
from xr_anysat.stac.items import DateRange
from xr_anysat.stac.search import grid_crs

if TYPE_CHECKING:
    from geopandas import GeoDataFrame, GeoSeries
    from odc.geo.geobox import GeoBox

NEIGHBORHOOD_M = 20_000
"""Meters on the side of the square of a group, about a fifth of a Sentinel-2 granule. The squares are fixed, so the
group of a place does not depend on other places, unless it has more than :data:`MAX_PLACES`."""

MAX_PLACES = 10_000
"""Places of a group, so that the memory does not depend on the number of places: 60 MB of sums with 768 channels."""

MAX_RECTANGLE = 256
"""Pixels on the side of a rectangle, or one window if that is larger."""

MAX_STRIP_PIXELS = 1 << 17
"""Pixels of a strip, unless one rectangle has more: 5 MB per date."""

WINDOW_DAYS = 366
"""Most days before and after a date."""


@dataclass(frozen=True)
class Place:
    """A point or polygon on the lattice of cells of a CRS.

    Attributes
    ----------
    row : int
        Position in the table.
    shape : geometry
        In units of cells, from the corner of cell (`top`, `left`); y counts rows.
    top, left : int
        Number of a cell on the lattice, counted from the CRS origin.
    squares : tuple of (int, int)
        The squares of a stride that it needs, by row and column on the lattice.
    """

    row: int
    shape: Any
    top: int
    left: int
    squares: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Rectangle:
    """Adjacent squares that places need, with what overlapping windows need around them.

    Attributes
    ----------
    rows, cols : PixelRange
        Pixels on the lattice of the CRS.
    halo : int
        Pixels around them that windows extend to.
    """

    rows: PixelRange
    cols: PixelRange
    halo: int

    def geobox(self, crs: Any) -> GeoBox:
        """Return the grid of the pixels to read."""
        from affine import Affine
        from odc.geo.geobox import GeoBox

        pixel = S2.pixel_size
        left, top = self.cols.start - self.halo, self.rows.start - self.halo
        return GeoBox(self.shape, Affine(pixel, 0, left * pixel, 0, -pixel, -top * pixel), crs)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the pixels to read."""
        return self.rows.size + 2 * self.halo, self.cols.size + 2 * self.halo


@dataclass(frozen=True)
class Group:
    """Places that are searched for and read together.

    Attributes
    ----------
    crs : CRS
    period : (Timestamp, Timestamp) or None
    places : tuple of Place
    """

    crs: Any
    period: DateRange
    places: tuple[Place, ...] = field(repr=False)

    def rectangles(self, settings: BlockSpec) -> list[Rectangle]:
        """Return the rectangles that cover all squares of the places, row by row."""
        return rectangles({square for place in self.places for square in place.squares}, settings)


def rectangles(squares: Iterable[tuple[int, int]], settings: BlockSpec) -> list[Rectangle]:
    """Cover squares of a stride exactly by rectangles: runs of a row, merged with equal runs below."""
    stride = settings.stride
    most = max(1, MAX_RECTANGLE // stride)
    margin = halo(settings.tile, settings.overlap) if settings.overlap else 0
    columns = defaultdict(list)
    for row, col in sorted(squares):
        columns[row].append(col)
    done: list[tuple[int, int, int, int]] = []
    above: dict[tuple[int, int], tuple[int, int]] = {}  # runs of the row above: first row, rows
    for row in sorted(columns):
        runs: list[list[int]] = []
        for col in columns[row]:
            if runs and col == runs[-1][1] and col % most:
                runs[-1][1] = col + 1
            else:
                runs.append([col, col + 1])
        here = {}
        for first, stop in runs:
            top, count = above.pop((first, stop), (row, 0))
            if top + count != row or (count and row % most == 0):
                if count:
                    done.append((top, first, count, stop - first))
                top, count = row, 0
            here[first, stop] = top, count + 1
        done += [(top, first, count, stop - first) for (first, stop), (top, count) in above.items()]
        above = here
    done += [(top, first, count, stop - first) for (first, stop), (top, count) in above.items()]
    return [
        Rectangle(PixelRange(top * stride, rows * stride), PixelRange(left * stride, cols * stride), margin)
        for top, left, rows, cols in sorted(done)
    ]


def strips(parts: Sequence[Rectangle]) -> list[list[int]]:
    """Distribute rectangles, by number, to strips in which they are side by side, the tallest first."""
    order = sorted(range(len(parts)), key=lambda n: (-parts[n].shape[0], n))
    found: list[list[int]] = []
    width = 0
    for n in order:
        width += parts[n].shape[1]
        if not found or width * parts[found[-1][0]].shape[0] > MAX_STRIP_PIXELS:
            found.append([])
            width = parts[n].shape[1]
        found[-1].append(n)
    return found


def place_on_lattice(row: int, geometry: Any, settings: BlockSpec) -> Place:
    """Find the cells and squares of a geometry, which is in the CRS of the lattice."""
    import shapely

    cell, stride = settings.cell, settings.stride
    size = cell * S2.pixel_size
    west, south, east, north = geometry.bounds
    top, left = int(np.floor(-north / size)), int(np.floor(west / size))
    if geometry.geom_type == "Point":
        squares = {(top * cell // stride, left * cell // stride)}
        return Place(row, shapely.Point(0.5, 0.5), top, left, tuple(squares))
    shape = shapely.transform(geometry, lambda xy: (xy * [1, -1] - [left * size, top * size]) / size)
    extent = int(np.ceil(-south / size)) - top + 1, int(np.ceil(east / size)) - left + 1
    squares = set()
    for i, j in blocks_met([shape], extent):
        block = min(BLOCK, extent[0] - i), min(BLOCK, extent[1] - j)
        down, across = np.nonzero(cell_shares(shape, i, j, block))
        rows, cols = (top + i + down) * cell // stride, (left + j + across) * cell // stride
        squares |= set(zip(rows.tolist(), cols.tolist(), strict=True))
    return Place(row, shape, top, left, tuple(sorted(squares)))


# ---------------------------------------------------------------------- rows


def group_places(
    frame: GeoDataFrame, periods: Sequence[DateRange | str], crs: str | int, settings: BlockSpec
) -> tuple[list[Group], dict[int, str]]:
    """Group the rows of a table.

    Parameters
    ----------
    frame : GeoDataFrame
        With a CRS.
    periods : sequence of DateRange or str
        Period of each row, or why it has none.
    crs : "utm" or EPSG code
    settings : BlockSpec

    Returns
    -------
    groups : list of Group
        In a fixed order.
    refused : dict of int to str
        Rows that cannot be embedded, and why.
    """
    geometries = frame.geometry
    degrees = geometries.to_crs(4326)
    refused = {row: period for row, period in enumerate(periods) if isinstance(period, str)}
    grids: dict[tuple[int, int], Any] = {}
    rows: dict[str, list[int]] = defaultdict(list)
    by_name = {}
    for row, (geometry, lonlat) in enumerate(zip(geometries, degrees, strict=True)):
        problem = _problem(geometry, lonlat)
        if problem is None:
            west, south, east, north = lonlat.bounds
            lon, lat = (west + east) / 2, (south + north) / 2
            # the zone of a cell of 3° × 4°: the borders of all zones are multiples of these
            at = int(((lon + 180) % 360) // 3), int((lat + 92) // 4)
            try:
                if at not in grids:
                    grids[at] = grid_crs(crs, at[0] * 3 - 178.5, at[1] * 4 - 90)
                by_name[str(grids[at])] = grids[at]
                if row not in refused:
                    rows[str(grids[at])].append(row)
            except AnySatError as error:
                if crs != "utm":
                    raise
                problem = str(error)
        if problem is not None:
            refused[row] = problem
    groups: dict[tuple[Any, ...], list[Place]] = defaultdict(list)
    for name in sorted(rows):
        moved = geometries.iloc[rows[name]].to_crs(by_name[name].proj)
        for row, geometry in zip(rows[name], moved, strict=True):
            bounds = np.array(geometry.bounds)
            if not np.isfinite(bounds).all():
                refused[row] = (
                    f"{name} has no coordinates for this place: expected a place in its area of use"
                )
                continue
            x, y = (bounds[:2] + bounds[2:]) / 2
            square = int(y // NEIGHBORHOOD_M), int(x // NEIGHBORHOOD_M)
            period = periods[row]
            when = () if period is None else tuple(str(t.date()) for t in period)  # type: ignore[union-attr]
            groups[name, when, square].append(place_on_lattice(row, geometry, settings))
    return [
        Group(by_name[key[0]], periods[part[0].row], part)  # type: ignore[arg-type]
        for key in sorted(groups)
        for part in _of_bounded_size(groups[key])
    ], refused


def _of_bounded_size(places: list[Place]) -> Iterator[tuple[Place, ...]]:
    """Cut a group between its windows, into parts of up to :data:`MAX_PLACES`, each in the order of the rows."""
    if len(places) > MAX_PLACES:
        places = sorted(places, key=lambda place: (place.squares, place.row))
    for start in range(0, len(places), MAX_PLACES):
        yield tuple(sorted(places[start : start + MAX_PLACES], key=lambda place: place.row))


def _problem(geometry: Any, degrees: Any) -> str | None:
    """Return why a geometry cannot be embedded; None if it can."""
    if geometry is None or geometry.is_empty:
        return "no geometry: expected a point or a polygon"
    if not geometry.is_valid:
        return "the polygon crosses itself: repair it, places.make_valid()"
    bounds = degrees.bounds
    if not np.isfinite(bounds).all() or not (bounds[1] >= -90 and bounds[3] <= 90):
        return f"no coordinates in degrees: {bounds}. Is the CRS of the table the right one?"
    if bounds[2] - bounds[0] > 180:
        return "the polygon crosses the antimeridian: cut it there, and embed the two sides on their own"
    return None


def check_kinds(geometries: GeoSeries, kinds: Sequence[str]) -> None:
    """Refuse a table without a CRS, or with other kinds of geometries."""
    if geometries.crs is None:
        raise OptionError("places have no CRS: set it, places.set_crs('EPSG:4326')")
    known = {g.geom_type for g in geometries if g is not None and not g.is_empty}
    others = sorted(known - set(kinds))
    if others:
        raise OptionError(f"places contain {', '.join(others)}: expected only {' or '.join(kinds)}")


def periods_of(frame: GeoDataFrame, datetime: Any, window: int | None) -> list[DateRange | str]:
    """Return the period of each row, or why it has none.

    Raises
    ------
    OptionError
        If `datetime` is neither a period nor the name of a column, or `window` does not fit.
    """
    if window is not None:
        check_whole_number("window", window, 0, WINDOW_DAYS, of="days")
    if not (isinstance(datetime, str) and datetime in frame.columns):
        try:
            period = parse_period(datetime, "datetime")
        except OptionError as error:
            names = [str(name) for name in frame.columns if name != frame.active_geometry_name]
            raise OptionError(f"{error}; or the name of a column, one of {names}") from error
        if window is not None:
            raise OptionError(
                f"{window=} has no meaning with one period for all: it is for a column of dates"
            )
        return [period] * len(frame)
    known: dict[Any, DateRange | str] = {}
    values = frame[datetime].tolist()
    for value in values:
        key = (type(value), str(value))
        if key not in known:
            known[key] = _period_of(value, datetime, window)
    return [known[type(value), str(value)] for value in values]


def _period_of(value: Any, name: str, window: int | None) -> DateRange | str:
    """Return the period that a value of a column stands for, or why there is none."""
    seen = f"column {name!r} is {str(value)[:60]!r}: "
    if value is None or value is pd.NaT or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return f"column {name!r} is empty: expected a year, a period or a date"
    try:
        if isinstance(value, float) and value == int(value):  # years of a column with holes are floats
            value = int(value)
        if is_whole_number(value):
            value = f"{value:04d}"
        elif isinstance(value, pd.Period):
            value = str(value)
        day = _date(value)
        if day is None and window is not None:
            return f"{seen}expected a date such as '2022-06-15', because window={window} is given"
        if day is not None:
            if window is None:
                return f"{seen}a date needs the days around it, such as window=90"
            days = pd.Timedelta(days=window)
            return parse_period((day - days, day + days + pd.Timedelta(days=1)), name)
        return parse_period(value, name)
    except (OptionError, ValueError, OverflowError) as error:
        return f"{seen}{error}"


def _date(value: Any) -> pd.Timestamp | None:
    """Return the day of a value that is a date; None if it is not."""
    if isinstance(value, str):
        if len(value) != len("2022-06-15") or value.count("-") != 2:
            return None
        return pd.Timestamp(value)
    if hasattr(value, "year"):
        day = pd.Timestamp(value)
        return (day.tz_convert(None) if day.tz else day).normalize()
    return None

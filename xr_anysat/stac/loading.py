"""Load scenes as lazy cubes: one date per solar day, a mosaic of the valid observations of its items.

odc-stac builds the graph of an area. The graph of many small parts, such as the windows of places, is built here,
because each file is opened once for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from xr_anysat.errors import ReadError, warn
from xr_anysat.shared.sensor import S2
from xr_anysat.stac.items import ItemDecision, footprint_of, lonlat
from xr_anysat.stac.reader import ItemReader, Masking, Source, source_of

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox
    from odc.geo.geom import Geometry

FOOTPRINT_MARGIN = 0.01
"""Degrees around a footprint that are read, too: footprints are approximate."""


class _Driver:
    """Makes odc.stac.load read with `ItemReader` (implements ReaderDriver and MDParser of odc.loader)."""

    dask_reader = None
    aux_reader = None

    def __init__(self, gdal: Mapping[str, Any], sources: Mapping[str, Source]) -> None:
        self.gdal, self.sources = gdal, sources

    def __getstate__(self) -> dict[str, Any]:
        return {"gdal": {}, "sources": {}}  # workers do not need them: each task has its own source

    @property
    def md_parser(self) -> _Driver:
        return self

    def extract(self, md: Any) -> Any:
        from odc.loader import FixedCoord, RasterBandMetadata, RasterGroupMetadata

        raster = RasterBandMetadata("float32", math.nan, dims=("band", "y", "x"))
        return RasterGroupMetadata({("s2", 1): raster}, extra_coords=[FixedCoord("band", list(S2.bands))])

    def driver_data(self, md: Any, band_key: Any) -> Source:
        return self.sources[getattr(md, "owner", md).id]  # odc-stac 0.4 passes the asset, later ones the item

    def new_load(self, geobox: Any, *, chunks: Any = None) -> None:
        return None

    def finalise_load(self, load_state: Any) -> Any:
        return load_state

    def capture_env(self) -> dict[str, Any]:
        return dict(self.gdal)

    @contextmanager
    def restore_env(self, env: dict[str, Any], load_state: Any) -> Iterator[dict[str, Any]]:
        yield env

    def open(self, src: Any, ctx: Any) -> ItemReader:
        return ItemReader(src.driver_data, ctx)


def load_scenes(
    scenes: list[ItemDecision],
    geobox: GeoBox,
    masking: Masking,
    on_error: str,
    gdal: Mapping[str, Any],
    workers: int,
    chunks: Mapping[str, int],
) -> xr.DataArray:
    """Load the cube of the scenes: one date per solar day, a mosaic of its valid observations.

    If two items have a valid observation of a pixel, those that need no reprojection come first, then the order
    of their names decides, so that the order of the catalog has no effect.
    """
    import odc.stac
    import pystac
    from dask.base import tokenize

    area = lonlat(geobox)
    scenes, days = in_reading_order(scenes, geobox.crs, area)
    sources, items = {}, []
    for i, scene in enumerate(scenes):
        footprint = footprint_of(scene.item)
        covers = area if footprint is None else footprint.buffer(FOOTPRINT_MARGIN)
        source = sources[str(i)] = source_of(scene, masking, on_error, workers)
        item = pystac.Item(str(i), covers.json, list(covers.boundingbox.bbox), scene.time.to_pydatetime(), {})
        # odc names tasks by the href alone, so it must contain everything that changes the result
        item.add_asset("s2", pystac.Asset(f"anysat://{tokenize(source)}", media_type="image/tiff"))
        items.append(item)
    cube = odc.stac.load(
        items,
        bands=["s2"],
        geobox=geobox,
        groupby=lambda item, parsed, i: days[i],
        preserve_original_order=True,
        chunks={"time": 1, **chunks},
        driver=_Driver(gdal, sources),
    )["s2"]
    cube = cube.assign_coords(time=pd.DatetimeIndex(_first_times(scenes, days).values()))
    cube.encoding["grid_mapping"] = "spatial_ref"
    return cube.transpose("time", "band", "y", "x")


def in_reading_order(
    scenes: Iterable[ItemDecision], crs: Any, area: Geometry
) -> tuple[list[ItemDecision], list[pd.Timestamp]]:
    """Sort scenes in the order in which they fill pixels, and return their solar days in `area` (degrees)."""
    epsg = "" if crs is None else str(crs.to_epsg())

    def order(scene: ItemDecision) -> tuple[Any, ...]:
        p = scene.item.properties
        own = str(p.get("proj:epsg") or p.get("proj:code") or "").removeprefix("EPSG:")
        return own != epsg, scene.item.id, scene.item.collection_id or ""

    scenes = sorted(scenes, key=order)
    shift = pd.Timedelta(hours=area.centroid.coords[0][0] / 15)
    return scenes, [(s.time + shift).normalize() for s in scenes]


def _first_times(
    scenes: Sequence[ItemDecision], days: Sequence[pd.Timestamp]
) -> dict[pd.Timestamp, pd.Timestamp]:
    """Return the time of the first scene of each day, by day, in order."""
    first: dict[pd.Timestamp, pd.Timestamp] = {}
    for scene, day in zip(scenes, days, strict=True):
        first[day] = min(scene.time, first.get(day, scene.time))
    return dict(sorted(first.items()))


def load_parts(
    scenes: Iterable[ItemDecision],
    geoboxes: Sequence[GeoBox],
    area: Geometry,
    masking: Masking,
    on_error: str,
    gdal: Mapping[str, Any],
    workers: int,
) -> xr.DataArray:
    """Load several parts of one grid, side by side: (time, band, y, x) float32, lazy, one chunk per date.

    The parts are in the order of `geoboxes`, with their tops in the first row. Pixels below a part are NaN. A pixel has
    the value that :func:`load_scenes` gives it.

    Parameters
    ----------
    scenes : iterable of ItemDecision
    geoboxes : sequence of GeoBox
        Grids in one CRS.
    area : Geometry
        In degrees; its center decides about solar days.
    masking, on_error, gdal, workers
        As for :func:`load_scenes`.
    """
    import dask
    import dask.array as da
    import shapely

    scenes, days = in_reading_order(scenes, geoboxes[0].crs, area)
    extents = np.array([lonlat(geobox).geom for geobox in geoboxes])
    todo: dict[pd.Timestamp, list[tuple[Source, list[int]]]] = {day: [] for day in sorted(set(days))}
    for scene, day in zip(scenes, days, strict=True):
        footprint = footprint_of(scene.item)
        if footprint is None:
            met = list(range(len(geoboxes)))
        else:
            met = np.nonzero(shapely.intersects(footprint.buffer(FOOTPRINT_MARGIN).geom, extents))[0].tolist()
        todo[day].append((source_of(scene, masking, on_error, workers), met))
    shape = (len(S2.bands), max(g.shape[0] for g in geoboxes), sum(g.shape[1] for g in geoboxes))
    read = dask.delayed(_read_parts)  # type: ignore[attr-defined]
    dates = [
        da.from_delayed(
            read(sources, list(geoboxes), dict(gdal), shape),
            shape,
            np.float32,
            meta=np.empty((0, 0, 0), np.float32),
        )
        for sources in todo.values()
    ]
    times = pd.DatetimeIndex(_first_times(scenes, days).values())
    return xr.DataArray(
        da.stack(dates), {"time": times, "band": list(S2.bands)}, ("time", "band", "y", "x"), "s2"
    )


def _read_parts(
    sources: Sequence[tuple[Source, list[int]]],
    geoboxes: Sequence[GeoBox],
    gdal: Mapping[str, Any],
    shape: tuple[int, int, int],
) -> np.ndarray:
    """Read the parts of one date, each from the sources that meet it."""
    out = np.full(shape, np.nan, np.float32)
    ends = np.cumsum([geobox.shape[1] for geobox in geoboxes])
    parts = [
        out[:, : geobox.shape[0], end - geobox.shape[1] : end]
        for geobox, end in zip(geoboxes, ends, strict=True)
    ]
    for source, met in sources:
        wanted = [n for n in met if np.isnan(parts[n][0]).any()]
        try:
            found = ItemReader(source, gdal).read_parts([geoboxes[n] for n in wanted]) if wanted else []
        except ReadError as error:
            if source.on_error == "raise":
                raise
            warn(f"{error} The item is missing here")
            continue
        for n, pixels in zip(wanted, found, strict=True):
            np.copyto(parts[n], pixels, where=np.isnan(parts[n]))
    return out

"""Read the pixels of STAC items: each item is masked and harmonized on its own, then items are merged per day.

odc-stac builds the graph. This module reads the items, because missing values, masks and offsets must be
resolved before two items are merged in a pixel.
"""

from __future__ import annotations

import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from xr_anysat.errors import OptionError, ReadError, warn
from xr_anysat.shared.sensor import S2
from xr_anysat.stac import catalogs
from xr_anysat.stac.addresses import driver_of
from xr_anysat.stac.catalogs import CATALOGS, check_installed, check_secrets
from xr_anysat.stac.items import ItemDecision, footprint_of, lonlat

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox

Mask = str | Callable[[xr.Dataset], xr.DataArray] | None


@dataclass(frozen=True)
class Masking:
    """The pixels of an item that are left out."""

    mask: Mask
    classes: tuple[int, ...]
    meters: float
    extra: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the mask, for the record."""
        if callable(self.mask):
            return f"{getattr(self.mask, '__module__', '')}.{getattr(self.mask, '__qualname__', repr(self.mask))}"
        return self.mask or "none"

    @property
    def reach(self) -> int:
        """Pixels by which the mask grows."""
        return int(self.meters // S2.pixel_size)

    def grow(self, left_out: np.ndarray) -> np.ndarray:
        """Grow a mask (y, x) by `meters`, and crop the margin of `reach` pixels."""
        if self.reach == 0:
            return left_out
        inside = (slice(self.reach, -self.reach),) * 2
        if not left_out.any():
            return left_out[inside]
        from scipy.ndimage import distance_transform_edt

        grown: np.ndarray = distance_transform_edt(~left_out)[inside] * S2.pixel_size <= self.meters + 1e-6
        return grown


@dataclass(frozen=True)
class Source:
    """Everything needed to read an item. It is sent to the workers in place of the item.

    Attributes
    ----------
    item : str
        Name of the item.
    time : Timestamp
        Time of the acquisition.
    assets : mapping of str to (str, str)
        Key and href of each band, of ``SCL`` and of each extra asset that is read.
    offset : float
        Digital numbers to subtract.
    masking : Masking
        Pixels to leave out.
    on_error : str
        ``"raise"`` or ``"invalid"``.
    workers : int
        Assets to read at the same time.
    trusted : bool
        Whether assets may have any format that GDAL reads.
    """

    item: str
    time: pd.Timestamp
    assets: Mapping[str, tuple[str, str]]
    offset: float
    masking: Masking
    on_error: str
    workers: int
    trusted: bool = True


class ItemReader:
    """Reads an item as one masked raster of ten bands (implements RasterReader of odc.loader)."""

    def __init__(self, source: Source, gdal: Mapping[str, Any]) -> None:
        self.source, self.gdal = source, gdal

    def read(self, cfg: Any, dst_geobox: GeoBox, *, dst: Any = None, selection: Any = None) -> Any:
        """Read the item on a grid, (10, y, x) float32; a pixel has all bands, or NaN in all."""
        try:
            pixels = self.read_observed(dst_geobox)
        except ReadError as error:
            if self.source.on_error == "raise":
                raise
            warn(f"{error} The item is missing here")
            pixels = np.full((len(S2.bands), *dst_geobox.shape), np.nan, np.float32)
        if dst is not None:  # odc-loader 0.5 keeps what the first item has written there
            np.copyto(dst, pixels)
        return (slice(0, dst_geobox.shape[0]), slice(0, dst_geobox.shape[1])), pixels

    def read_observed(self, geobox: GeoBox) -> np.ndarray:
        """Read the pixels with all bands that are not masked, (10, y, x) float32 with NaN elsewhere."""
        masking = self.source.masking
        wide = geobox.pad(masking.reach) if masking.reach else geobox
        inside = tuple(slice(masking.reach, masking.reach + n) for n in geobox.shape)
        if masking.mask == "scl":  # read first: where all is cloudy, no band needs to be read
            classes = self._assets(["SCL"], wide)["SCL"]
            scl = classes[inside]
            # no data (0) outside the swath does not grow
            cloudy = np.isin(classes, [c for c in masking.classes if c != 0])
            left_out = masking.grow(cloudy) | (scl == 0)
            if left_out.all():
                return np.full((len(S2.bands), *geobox.shape), np.nan, np.float32)
            bands = self._bands(self._assets(S2.bands, geobox), scl)
        elif callable(masking.mask):
            found = self._assets(self.source.assets, wide)
            padded = self._bands(found, found.get("SCL"))
            left_out = masking.grow(self._call_mask(masking.mask, padded, found, wide))
            bands = padded[(slice(None), *inside)]
        else:
            bands = self._bands(self._assets(S2.bands, geobox), None)
            left_out = np.zeros(geobox.shape, bool)
        observed = np.isfinite(bands).all(0) & ~left_out
        np.copyto(bands, np.float32(np.nan), where=~observed)
        return bands

    def _bands(self, found: Mapping[str, np.ndarray], scl: np.ndarray | None) -> np.ndarray:
        """Stack the ten bands (10, y, x) with the offset removed, NaN where missing."""
        bands = np.stack([found[b] for b in S2.bands])
        offset = np.float32(self.source.offset)
        if offset:
            np.maximum(bands - offset, np.float32(0), out=bands)
        elif scl is not None:
            # If the offset was removed before, zero can be dark ground; the scene classification distinguishes it from
            # no data. If the offset is still present, zero always means no data.
            np.copyto(bands, np.float32(0), where=np.isnan(bands) & (scl != 0))
        return bands

    def _call_mask(
        self,
        mask: Callable[[xr.Dataset], xr.DataArray],
        bands: np.ndarray,
        found: Mapping[str, np.ndarray],
        geobox: GeoBox,
    ) -> np.ndarray:
        """Call the mask of the user, and return the pixels that it leaves out, (y, x) bool."""
        from odc.geo.xr import xr_coords

        values = {**found, **dict(zip(S2.bands, bands, strict=True))}
        coords = {**xr_coords(geobox), "time": [self.source.time]}
        dataset = xr.Dataset(
            {n: (("time", "y", "x"), v[None]) for n, v in values.items()}, coords, {"item": self.source.item}
        )
        left_out = mask(dataset)
        dims = tuple(getattr(left_out, "dims", ()))
        if (
            not isinstance(left_out, xr.DataArray)
            or left_out.dtype != bool
            or not {"y", "x"} <= set(dims) <= {"time", "y", "x"}
        ):
            raise OptionError(
                f"mask={self.source.masking.name} returned {type(left_out).__name__} {dims} of "
                f"{getattr(left_out, 'dtype', None)}: expected a DataArray (time, y, x) of bool, True where a pixel "
                "is left out"
            )
        result: np.ndarray = left_out.transpose(..., "y", "x").values.reshape(geobox.shape)
        return result

    def _assets(self, names: Iterable[str], geobox: GeoBox) -> dict[str, np.ndarray]:
        """Read assets on a grid (y, x) at the same time; return them by name."""
        pool = _pool(self.source.workers)
        jobs = {name: pool.submit(self._asset, name, geobox) for name in names}
        try:
            return {name: job.result() for name, job in jobs.items()}
        finally:
            for job in jobs.values():
                job.cancel()

    def _asset(self, name: str, geobox: GeoBox | None) -> np.ndarray:
        """Read an asset on a grid (y, x): SCL as uint8, others as float32; missing pixels are 0 or NaN.

        Without a grid, the asset is only opened.
        """
        key, href = self.source.assets[name]
        reason = ""
        # GDAL itself retries when a server is busy, but may cache a broken answer. It drops that on request,
        # for S3 only on the second request
        for wait in (0, catalogs.WAIT, 2 * catalogs.WAIT):
            time.sleep(wait)
            try:
                return self._read(name, _signed(href), geobox, retry=wait > 0)
            except Exception as error:
                reason = f"{type(error).__name__}: {error.__cause__ or error}"
        # raised outside of `except`: exceptions of GDAL cannot be sent between processes
        raise ReadError(
            f"asset {key!r} of item {self.source.item!r} cannot be read: {_without_token(reason)[:300]} "
            f"({_without_token(href)}). Try again; or on_error='invalid' leaves the item out where that happens."
        )

    def _read(self, name: str, uri: str, geobox: GeoBox | None, *, retry: bool) -> np.ndarray:
        import rasterio
        from odc.loader import reader_driver
        from rasterio.enums import Resampling
        from rasterio.vrt import WarpedVRT

        gdal = dict(self.gdal)
        if retry:
            # GDAL caches failures like successes, and incomplete bodies as complete
            path = re.sub("^s3://", "/vsis3/", re.sub("^(?=https?://)", "/vsicurl/", uri))
            gdal["CPL_VSIL_CURL_NON_CACHED"] = path
        driver: Any = reader_driver("rio")
        with (
            driver.restore_env(gdal, driver.new_load(geobox)),
            rasterio.open(uri, driver=None if self.source.trusted else driver_of(uri)) as file,
        ):
            if geobox is None:
                return np.empty((0, 0))
            onto: dict[str, Any] = {
                "crs": str(geobox.crs),
                "transform": geobox.transform,
                "height": geobox.shape[0],
                "width": geobox.shape[1],
                "dtype": "uint8" if name == "SCL" else "float32",
                "nodata": 0 if name == "SCL" else np.nan,
                "src_nodata": 0 if file.nodata is None and name in (*S2.bands, "SCL") else file.nodata,
                "resampling": Resampling.bilinear if name in S2.bands else Resampling.nearest,
                # GDAL would estimate the scale from the corners of the block that is read, and interpolate
                # positions across it, so that the value of a pixel would depend on the block
                "XSCALE": 1,
                "YSCALE": 1,
                "tolerance": 1e-5,
            }
            with WarpedVRT(file, **onto) as warped:
                pixels: np.ndarray = warped.read(1)
                return pixels


_POOLS: dict[tuple[int, int], ThreadPoolExecutor] = {}

_POOLS_LOCK = threading.Lock()


def _pool(workers: int) -> ThreadPoolExecutor:
    """Return the reading threads of this process, which can outnumber its cores because they wait for servers."""
    key = (os.getpid(), workers)  # a forked process does not have the threads of its parent
    with _POOLS_LOCK:
        if key not in _POOLS:
            _POOLS[key] = ThreadPoolExecutor(workers, "anysat-read")
        return _POOLS[key]


def _without_token(text: str) -> str:
    return re.sub(r"\?[^\s'\"]+", "", text)


def _signed(href: str) -> str:
    """Sign the href if its server requires that, just before the read, because signatures expire."""
    if not re.match(CATALOGS["planetary-computer"].hrefs, href):
        return href
    import planetary_computer

    signed: str = planetary_computer.sign(href.split("?")[0])
    return signed


def gdal_environment(scenes: Iterable[ItemDecision]) -> dict[str, Any]:
    """Return the GDAL options for reading the scenes: timeouts, retries, and what their hrefs need."""
    from odc.loader import reader_driver

    options = {
        **reader_driver("rio").capture_env(),
        "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
        "GDAL_HTTP_TIMEOUT": str(catalogs.TIMEOUT),
        "GDAL_HTTP_CONNECTTIMEOUT": str(catalogs.TIMEOUT),
        "GDAL_HTTP_MAX_RETRY": str(catalogs.TRIES),
        "GDAL_HTTP_RETRY_DELAY": str(catalogs.WAIT),
        "GDAL_HTTP_RETRY_CODES": ",".join(map(str, catalogs.RETRY_STATUS_CODES)),
    }
    hrefs = [scene.href("B2") for scene in scenes]
    for name, catalog in CATALOGS.items():
        if any(re.match(catalog.hrefs, href) for href in hrefs):
            check_secrets(catalog)
            if name == "planetary-computer":
                check_installed("planetary_computer")
            options.update(catalog.gdal)
    return options


def source_of(scene: ItemDecision, masking: Masking, on_error: str, workers: int) -> Source:
    """Return what is sent to the workers to read a scene."""
    names = [*S2.bands]
    if "SCL" in scene.assets and masking.mask is not None:
        names.append("SCL")
    assets = {n: (scene.assets[n], scene.href(n)) for n in (*names, *masking.extra)}
    return Source(scene.item.id, scene.time, assets, scene.offset, masking, on_error, workers, scene.trusted)


def leave_out_unreadable(
    scenes: list[ItemDecision], masking: Masking, gdal: Mapping[str, Any], workers: int
) -> list[ItemDecision]:
    """Open every asset once; items with an asset that cannot be opened are not used."""
    pool, checked = _pool(workers), []
    for scene in scenes:
        if scene.unused is None:
            reader = ItemReader(source_of(scene, masking, "raise", workers), gdal)
            checked.append([pool.submit(reader._asset, name, None) for name in reader.source.assets])
        else:
            checked.append([])
    out = []
    for scene, jobs in zip(scenes, checked, strict=True):
        errors = [str(e) for e in (job.exception() for job in jobs) if e is not None]
        out.append(replace(scene, unused=f"unreadable: {errors[0]}") if errors else scene)
    return out


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

    epsg = "" if geobox.crs is None else str(geobox.crs.to_epsg())

    def order(scene: ItemDecision) -> tuple[Any, ...]:
        p = scene.item.properties
        own = str(p.get("proj:epsg") or p.get("proj:code") or "").removeprefix("EPSG:")
        return own != epsg, scene.item.id, scene.item.collection_id or ""

    scenes = sorted(scenes, key=order)
    area = lonlat(geobox)
    shift = pd.Timedelta(hours=area.centroid.coords[0][0] / 15)
    days = [(s.time + shift).normalize() for s in scenes]
    sources, items = {}, []
    for i, scene in enumerate(scenes):
        # footprints are approximate, so pixels just outside are read, too
        footprint = footprint_of(scene.item)
        covers = area if footprint is None else footprint.buffer(0.01)
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
    first: dict[pd.Timestamp, pd.Timestamp] = {}
    for scene, day in zip(scenes, days, strict=True):
        first[day] = min(scene.time, first.get(day, scene.time))
    cube = cube.assign_coords(time=pd.DatetimeIndex([first[d] for d in sorted(first)]))
    cube.encoding["grid_mapping"] = "spatial_ref"
    return cube.transpose("time", "band", "y", "x")

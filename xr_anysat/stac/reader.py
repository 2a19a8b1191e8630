"""Read the pixels of STAC items: each item is masked and harmonized on its own, then items are merged per day.

odc-stac builds the graph. This module reads the items, because missing values, masks and offsets must be
resolved before two items are merged in a pixel.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from xr_anysat.stac.items import ItemDecision

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
        return self.read_parts([geobox])[0]

    def read_parts(self, geoboxes: Sequence[GeoBox]) -> list[np.ndarray]:
        """Read several grids as `read_observed` does; each asset is opened once for all of them."""
        masking = self.source.masking
        reach = masking.reach
        wide = [geobox.pad(reach) if reach else geobox for geobox in geoboxes]
        inside = [tuple(slice(reach, reach + n) for n in geobox.shape) for geobox in geoboxes]
        out = [np.full((len(S2.bands), *geobox.shape), np.nan, np.float32) for geobox in geoboxes]
        bands: Iterable[np.ndarray]
        if masking.mask == "scl":  # read first: where all is cloudy, no band needs to be read
            classes = self._assets(["SCL"], wide)["SCL"]
            scl = [values[at] for values, at in zip(classes, inside, strict=True)]
            # no data (0) outside the swath does not grow
            cloudy = (np.isin(values, [c for c in masking.classes if c != 0]) for values in classes)
            left_out = [masking.grow(c) | (values == 0) for c, values in zip(cloudy, scl, strict=True)]
            clear = [i for i, mask in enumerate(left_out) if not mask.all()]
            found = self._assets(S2.bands if clear else (), [geoboxes[i] for i in clear])
            bands = (self._bands(_one(found, k), scl[i]) for k, i in enumerate(clear))
        elif callable(masking.mask):
            clear, left_out, kept = list(range(len(geoboxes))), [], []
            found = self._assets(self.source.assets, wide)
            for i, geobox in enumerate(wide):
                values = _one(found, i)
                padded = self._bands(values, values.get("SCL"))
                left_out.append(masking.grow(self._call_mask(masking.mask, padded, values, geobox)))
                kept.append(padded[(slice(None), *inside[i])])
            bands = kept
        else:
            clear = list(range(len(geoboxes)))
            found = self._assets(S2.bands, geoboxes)
            bands = (self._bands(_one(found, i), None) for i in clear)
            left_out = [np.zeros(geobox.shape, bool) for geobox in geoboxes]
        for i, pixels in zip(clear, bands, strict=True):
            observed = np.isfinite(pixels).all(0) & ~left_out[i]
            np.copyto(out[i], pixels, where=observed)
        return out

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

    def _assets(self, names: Iterable[str], geoboxes: Sequence[GeoBox]) -> dict[str, list[np.ndarray]]:
        """Read assets on grids (y, x) at the same time; return them by name."""
        pool = _pool(self.source.workers)
        jobs = {name: pool.submit(self._asset, name, geoboxes) for name in names}
        try:
            return {name: job.result() for name, job in jobs.items()}
        finally:
            for job in jobs.values():
                job.cancel()

    def _asset(self, name: str, geoboxes: Sequence[GeoBox]) -> list[np.ndarray]:
        """Read an asset on grids (y, x): SCL as uint8, others as float32; missing pixels are 0 or NaN.

        Without grids, the asset is only opened.
        """
        key, href = self.source.assets[name]
        reason = ""
        # GDAL itself retries when a server is busy, but may cache a broken answer. It drops that on request,
        # for S3 only on the second request
        for wait in (0, catalogs.WAIT, 2 * catalogs.WAIT):
            time.sleep(wait)
            try:
                return self._read(name, _signed(href), geoboxes, retry=wait > 0)
            except Exception as error:
                reason = f"{type(error).__name__}: {error.__cause__ or error}"
        # raised outside of `except`: exceptions of GDAL cannot be sent between processes
        failure = ReadError(
            f"asset {key!r} of item {self.source.item!r} cannot be read: {_without_token(reason)[:300]} "
            f"({_without_token(href)}). Try again; or on_error='invalid' leaves the item out where that happens."
        )
        failure.item = self.source.item
        raise failure

    def _read(self, name: str, uri: str, geoboxes: Sequence[GeoBox], *, retry: bool) -> list[np.ndarray]:
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
        pixels: list[np.ndarray] = []
        with (
            driver.restore_env(gdal, driver.new_load(geoboxes[0] if geoboxes else None)),
            rasterio.open(uri, driver=None if self.source.trusted else driver_of(uri)) as file,
        ):
            options: dict[str, Any] = {
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
            for geobox in geoboxes:
                height, width = geobox.shape
                grid = {
                    "crs": str(geobox.crs),
                    "transform": geobox.transform,
                    "height": height,
                    "width": width,
                }
                with WarpedVRT(file, **grid, **options) as warped:
                    pixels.append(warped.read(1))
        return pixels


def _one(found: Mapping[str, list[np.ndarray]], number: int) -> dict[str, np.ndarray]:
    """Return the values of all assets on one of several grids."""
    return {name: values[number] for name, values in found.items()}


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
            checked.append([pool.submit(reader._asset, name, ()) for name in reader.source.assets])
        else:
            checked.append([])
    out = []
    for scene, jobs in zip(scenes, checked, strict=True):
        errors = [str(e) for e in (job.exception() for job in jobs) if e is not None]
        out.append(replace(scene, unused=f"unreadable: {errors[0]}") if errors else scene)
    return out

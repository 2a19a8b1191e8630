"""From a place and a time to a clean cube: Sentinel-2 L2A of STAC catalogs, loaded as `embed` wants it.

Search, choose (one processing of each acquisition, clouds), decide the +1000 offset item by item;
then, lazily, read each item onto one 10 m grid, mask it, and only then put the granules of a day
together. odc-stac builds the graph; how an item is read is this module's own, because what is missing,
masked or offset has to be settled item by item.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import re
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from xr_anysat.config import FETCH_WORKERS, option
from xr_anysat.cube import BANDS, PIXEL, band_name
from xr_anysat.errors import AnySatError, AnySatWarning, CatalogError, OptionError, ReadError
from xr_anysat.frames import PERIOD_ATTR, PERIOD_TIMES_ATTR, Period, parse_period, span_of

if TYPE_CHECKING:
    import pystac
    from odc.geo.geobox import GeoBox
    from odc.geo.geom import Geometry

log = logging.getLogger(__name__)

Area = tuple[float, float, float, float]
Mask = str | Callable[[xr.Dataset], xr.DataArray] | None
Span = tuple[pd.Timestamp, pd.Timestamp] | None

SCL_INVALID = (0, 1, 3, 8, 9, 10)
"""Classes of the scene classification that are no view of the ground: no data, saturated or defective,
cloud shadow, cloud of medium and of high probability, thin cirrus. Snow (11) is ground here."""

OFFSET = 1000
"""Digital numbers that products of processing baseline 04.00 and later have added to reflectance ×
10 000 (ESA, in force since 25 January 2022: BOA_ADD_OFFSET = -1000)."""
OFFSET_BASELINE = 4.0

OFFSET_COLLECTIONS = ("sentinel-2-c1-l2a",)
"""Collections of ESA's Collection 1 only, all of it processed with baseline 05.00 or later."""

SAME_ACQUISITION = pd.Timedelta(minutes=30)
"""Items of one platform and granule no further apart show one acquisition: catalogs date it by the granule
or by the start of its data take, minutes before; the next orbit comes 100 minutes later."""

CHUNK = 1024
"""Pixels on the side of a chunk."""

# Of a server: seconds to answer, tries, and seconds before the second try, then doubled.
TIMEOUT, TRIES, WAIT = 60.0, 6, 0.5
LONGEST_WAIT = 60.0  # seconds, whatever a server's Retry-After says
PASSING = (429, 500, 502, 503, 504)  # HTTP answers that may be better the next time


@dataclass(frozen=True)
class Catalog:
    """Where a catalog is, and what its assets need to be read.

    Attributes
    ----------
    url : str
        The STAC API.
    collections : tuple of str
        Its Sentinel-2 L2A collections.
    hrefs : str
        Regular expression of hrefs of its own, whichever catalog lists them.
    gdal : mapping of str to str
        GDAL options for reading these.
    secrets : tuple of str
        Environment variables that reading these needs.
    """

    url: str
    collections: tuple[str, ...] = ()
    hrefs: str = r"(?!)"
    gdal: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()


CATALOGS = {
    # two collections: the second is the archive in ESA's reprocessing, as far as it has come
    "earth-search": Catalog(
        "https://earth-search.aws.element84.com/v1", ("sentinel-2-l2a", "sentinel-2-c1-l2a")
    ),
    # its hrefs are signed, just before each reading
    "planetary-computer": Catalog(
        "https://planetarycomputer.microsoft.com/api/stac/v1",
        ("sentinel-2-l2a",),
        hrefs=r"https://\w+\.blob\.core\.windows\.net/",
    ),
    "cdse": Catalog(
        "https://stac.dataspace.copernicus.eu/v1",
        ("sentinel-2-l2a",),
        hrefs="s3://eodata/",
        gdal={"AWS_S3_ENDPOINT": "eodata.dataspace.copernicus.eu", "AWS_VIRTUAL_HOSTING": "FALSE"},
        secrets=("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
    ),
}


def open_s2(
    *,
    bbox: Area | None = None,
    intersects: Any = None,
    point: tuple[float, float] | None = None,
    buffer_m: float | None = None,
    datetime: Period = None,
    catalog: Any = "earth-search",
    collections: Sequence[str] | None = None,
    max_cloud: float | None = 30,
    mask: Mask = "scl",
    scl_invalid: Sequence[int] = SCL_INVALID,
    dilate_m: float = 0,
    mask_assets: Sequence[str] = (),
    harmonize: str | bool | float = "auto",
    on_error: str = "raise",
    crs: str | int = "utm",
    chunks: int | Mapping[str, int] = CHUNK,
    workers: int = FETCH_WORKERS,
) -> xr.DataArray:
    """Open Sentinel-2 L2A of a place and a time as a lazy cube that `embed` takes as it is.

    The search happens now; pixels are read when the cube is computed.

    Parameters
    ----------
    bbox : (west, south, east, north), optional
        Degrees. Give one of `bbox`, `intersects` and `point`.
    intersects : GeoJSON-like or geometry, optional
        In degrees, unless it has a ``crs`` of its own; the cube covers its bounding box.
    point, buffer_m : (lon, lat) and float, optional
        Degrees and metres: the square of ``2·buffer_m`` around the point.
    datetime : str or (start, end), optional
        ``"2022"``, ``"2022-06"``, ``"2022-04-01/2022-10-01"`` or a pair; the end is exclusive. None: all
        that there is. It is recorded on the cube, and `frames` takes it as its period.
    catalog : str or items, default "earth-search"
        ``"earth-search"``, ``"planetary-computer"``, ``"cdse"``, the URL of a STAC API, a pystac
        ItemCollection or a list of Items.
    collections : sequence of str, optional
        Collections of the catalog. Default: its Sentinel-2 L2A ones; for a URL, all.
    max_cloud : float or None, default 30
        Percent of clouds (``eo:cloud_cover``) that a scene may have. Scenes that do not tell are used.
    mask : "scl", None or callable, default "scl"
        What is not a view of the ground. ``"scl"``: the scene classification. None: missing pixels
        only. A callable is handed a block of an item when that is read: a Dataset ``(time: 1, y, x)``
        in memory with the variables ``B2`` … ``B12`` (DN, the offset removed, NaN where missing), ``SCL``
        where the item has one, those of `mask_assets`, and ``attrs["item"]``. It returns
        True where a pixel is to be left out, and looks at one pixel at a time: a block ends anywhere.
    scl_invalid : sequence of int
        Classes that ``"scl"`` leaves out; 0 is always one of them.
    dilate_m : float, default 0
        Metres by which what the mask leaves out grows, across blocks and from beyond the area's edge.
    mask_assets : sequence of str
        Further assets that a callable needs, such as ``"cloud"``: float32 with NaN, nearest neighbour.
    harmonize : "auto", bool or number
        The +1000 offset. ``"auto"`` decides by the metadata of each item; False subtracts nothing,
        True 1000 from every item, a number that many DN.
    on_error : {"raise", "invalid"}
        What an asset that cannot be read does: it stops the computation; or its item is missing there,
        with a warning that names both. With ``"invalid"`` every asset is looked at now, and an item
        of which one cannot be opened is not used, as recorded in ``attrs["items"]``.
    crs : "utm" or EPSG code
        CRS of the cube: the UTM zone of the area's middle, or any projected one in metres.
    chunks : int or mapping, default 1024
        Pixels on the side of a chunk, or ``{"y": …, "x": …}``. Along time a chunk is one date.
    workers : int, default 8
        Assets that a process reads at the same time, at most (option ``fetch_workers``), however
        few threads the scheduler has.

    Returns
    -------
    DataArray, (time, band, y, x) float32
        Digital numbers (reflectance × 10 000, the offset removed); one date for each solar day. A pixel
        of a date is one item's observation with all its ten bands, or NaN. ``attrs["items"]`` is
        JSON: an entry an item the search returned with ``id``, ``datetime``, ``baseline``, ``offset`` (DN
        subtracted), ``decided_by`` and ``used`` (true, or why not).

    Raises
    ------
    OptionError
        An argument is impossible.
    CatalogError
        The catalog does not answer, or holds nothing that was asked for: the message says which
        condition left nothing over.
    ReadError
        When computed: an asset cannot be read; the message names item and asset.

    Warns
    -----
    AnySatWarning
        Where metadata of items contradict each other, or leave the offset open.
    """
    _check_options(mask, scl_invalid, dilate_m, mask_assets, harmonize, on_error, max_cloud)
    size = _chunk_sizes(chunks)
    workers = option("fetch_workers", workers)
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise OptionError(f"{workers=}: wanted a positive whole number")
    period = parse_period(datetime)
    geobox = _geobox(bbox, intersects, point, buffer_m, crs)
    _check_installed("odc.stac", "pystac_client", "scipy")
    chosen = _catalog(catalog, collections)

    found = _search(chosen, geobox, period) if isinstance(catalog, str) else list(catalog)
    scenes = [_scene(item, harmonize, needs_scl=mask == "scl", extra=mask_assets) for item in found]
    scenes = _choose(scenes, geobox, period, max_cloud)
    masking = _Masking(mask, tuple(int(c) for c in scl_invalid), float(dilate_m), tuple(mask_assets))
    gdal = _access(s for s in scenes if s.unused is None)
    if on_error == "invalid":
        scenes = _leave_out_unreadable(scenes, masking, gdal, workers)
    used = [s for s in scenes if s.unused is None]
    if not used:
        raise CatalogError(_nothing_found(scenes, chosen, geobox, period, max_cloud))
    _tell(scenes)

    cube = _load(used, geobox, masking, on_error, gdal, workers, size)
    times = [s.time for s in used]
    start, end = period or (min(times).normalize(), max(times).normalize() + pd.Timedelta(days=1))
    cube.attrs = {
        PERIOD_ATTR: f"{start.date()}/{end.date()}",
        PERIOD_TIMES_ATTR: span_of(cube["time"].values),
        "units": "DN",
        "nodata": float("nan"),
        "catalog": chosen.url,
        "items": json.dumps([s.record() for s in scenes]),
        "items_used": len(used),
        "items_left_out": json.dumps(Counter(s.unused.split(":")[0] for s in scenes if s.unused)),
        "harmonize": str(harmonize),
        "mask": masking.name,
        "scl_invalid": " ".join(map(str, masking.classes)) if mask == "scl" else "",
        "dilate_m": masking.metres,
        "max_cloud": "any" if max_cloud is None else float(max_cloud),
        "on_error": on_error,
    }
    return cube


# ---------------------------------------------------------------------- options


def _check_options(
    mask: Mask,
    scl_invalid: Sequence[int],
    dilate_m: float,
    mask_assets: Sequence[str],
    harmonize: str | bool | float,
    on_error: str,
    max_cloud: float | None,
) -> None:
    def number(value: object) -> bool:
        real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
        return real and math.isfinite(value)  # type: ignore[arg-type]

    if not (mask is None or callable(mask) or (isinstance(mask, str) and mask == "scl")):
        raise OptionError(f"{mask=}: wanted 'scl', None, or a callable that takes a Dataset")
    if isinstance(mask_assets, str) or (mask_assets and not callable(mask)):
        raise OptionError(f"{mask_assets=}: wanted a list of assets' keys, for a callable mask= to look at")
    classes = None if isinstance(scl_invalid, str) else list(scl_invalid)
    if classes is None or not all(number(c) and 0 <= c <= 11 and c == int(c) for c in classes):
        raise OptionError(f"{scl_invalid=}: wanted a list of classes, 0 to 11")
    if mask != "scl" and tuple(scl_invalid) != SCL_INVALID:
        raise OptionError(f"{scl_invalid=} has no meaning with {mask=}: it is for mask='scl'")
    if not number(dilate_m) or dilate_m < 0:
        raise OptionError(f"{dilate_m=}: wanted metres, 0 or more")
    if dilate_m and mask is None:
        raise OptionError(f"{dilate_m=} has no meaning with {mask=}: there is nothing to grow")
    if not (isinstance(harmonize, bool | np.bool_) or number(harmonize)) and harmonize != "auto":
        raise OptionError(f"{harmonize=}: wanted 'auto', True, False or digital numbers to subtract")
    if on_error not in ("raise", "invalid"):
        raise OptionError(f"{on_error=}: wanted 'raise' or 'invalid'")
    if max_cloud is not None and not (number(max_cloud) and 0 <= max_cloud <= 100):
        raise OptionError(f"{max_cloud=}: wanted percent, 0 to 100, or None for any")


def _chunk_sizes(chunks: int | Mapping[str, int]) -> dict[str, int]:
    sizes = dict(chunks) if isinstance(chunks, Mapping) else {"y": chunks, "x": chunks}
    whole = all(isinstance(n, int) and not isinstance(n, bool) and (n > 0 or n == -1) for n in sizes.values())
    if not whole or not set(sizes) <= {"y", "x"}:
        raise OptionError(
            f"{chunks=}: wanted pixels, or {{'y': pixels, 'x': pixels}}; along time a chunk is a date"
        )
    return {"y": CHUNK, "x": CHUNK, **sizes}


def _check_installed(*modules: str) -> None:
    names = {
        "odc.stac": "odc-stac",
        "pystac_client": "pystac-client",
        "planetary_computer": "planetary-computer",
    }
    missing = [names.get(m, m) for m in modules if importlib.util.find_spec(m.split(".")[0]) is None]
    if missing:
        raise AnySatError(f"open_s2 needs {', '.join(missing)}: pip install 'xr_anysat[stac]'")


# ---------------------------------------------------------------------- where and when


def _catalog(catalog: Any, collections: Sequence[str] | None) -> Catalog:
    """The catalog by name, or by URL, or that of the items at hand."""
    if not isinstance(catalog, str):
        import pystac

        items = None if isinstance(catalog, Mapping | pystac.Item) else list(catalog)
        if items is None or not all(isinstance(i, pystac.Item) for i in items):
            raise OptionError(
                f"catalog={str(catalog)[:80]!r}: wanted a name, a URL, a pystac ItemCollection or a list of Items"
            )
        if collections is not None:
            raise OptionError(
                f"{collections=} are for a catalog that is searched: choose among the items before"
            )
        return Catalog(f"{len(items)} items given")
    if catalog in CATALOGS:
        chosen = CATALOGS[catalog]
        _check_secrets(chosen)
    elif re.match("https?://", catalog):
        known = [c.collections for c in CATALOGS.values() if catalog.rstrip("/").startswith(c.url)]
        chosen = Catalog(catalog, known[0] if known else ())
    else:
        raise OptionError(
            f"{catalog=}: wanted one of {', '.join(map(repr, CATALOGS))}, the URL of a STAC API, or items"
        )
    if isinstance(collections, str):
        raise OptionError(f"{collections=}: wanted a list of collections")
    return chosen if collections is None else replace(chosen, collections=tuple(collections))


def _check_secrets(catalog: Catalog) -> None:
    missing = [name for name in catalog.secrets if not os.environ.get(name)]
    if missing:
        raise CatalogError(
            f"reading from {catalog.hrefs} needs S3 credentials: set the environment variables "
            f"{' and '.join(missing)} here and on every worker (keys are made at "
            "https://eodata-s3keysmanager.dataspace.copernicus.eu)"
        )


def _geobox(
    bbox: Area | None,
    intersects: Any,
    point: tuple[float, float] | None,
    buffer_m: float | None,
    crs: str | int,
) -> GeoBox:
    """The grid of 10 m pixels, at multiples of 10 m, that covers the area."""
    from affine import Affine
    from odc.geo.geobox import GeoBox
    from odc.geo.geom import box
    from odc.geo.geom import point as point_at

    given = [n for n, v in (("bbox", bbox), ("intersects", intersects), ("point", point)) if v is not None]
    if len(given) != 1:
        raise OptionError(
            f"{' and '.join(given) or 'no area'} given: wanted one of bbox=, intersects= and point= with buffer_m="
        )
    if (buffer_m is None) != (point is None) or (buffer_m is not None and not 0 < buffer_m < math.inf):
        raise OptionError(f"{point=} and {buffer_m=}: wanted a (lon, lat) and the metres around it")
    if bbox is not None:
        west, south, east, north = _degrees(bbox, 4, f"{bbox=}: wanted (west, south, east, north) in degrees")
        if west > east:
            raise OptionError(
                f"{bbox=} crosses the antimeridian (west > east): a cube has one grid, open the two sides on their own"
            )
        area = box(west, south, east, north, "EPSG:4326")
    elif point is not None:
        lon, lat = _degrees(point, 2, f"{point=}: wanted (lon, lat) in degrees")
        area = point_at(lon, lat, "EPSG:4326")
    else:
        area = _geometry(intersects)
    middle = area.boundingbox
    grid = _grid_crs(crs, (middle.left + middle.right) / 2, (middle.bottom + middle.top) / 2)

    if buffer_m is None:
        # a rectangle in degrees is none in metres: its edges bend, so they are projected in pieces
        extent = area.to_crs(grid, resolution=0.01).boundingbox
        near = 1e-6  # of a pixel: whoever asks for pixels that are there gets these
        left, bottom = (math.floor(v / PIXEL + near) for v in (extent.left, extent.bottom))
        right, top = (math.ceil(v / PIXEL - near) for v in (extent.right, extent.top))
    else:
        ((x, y),) = area.to_crs(grid).points
        side = math.ceil(2 * buffer_m / PIXEL)
        left, top = round((x - buffer_m) / PIXEL), round((y + buffer_m) / PIXEL)
        right, bottom = left + side, top - side
    if not right > left or not top > bottom:
        raise OptionError(
            f"{given[0]}={str(bbox or intersects)[:80]} has no extent: wanted an area, or point= with buffer_m="
        )
    geobox = GeoBox(
        (top - bottom, right - left), Affine(PIXEL, 0, left * PIXEL, 0, -PIXEL, top * PIXEL), grid
    )
    around = _lonlat(geobox).boundingbox
    if around.right - around.left > 180:
        raise OptionError(
            f"{given[0]}= crosses the antimeridian: a cube has one grid, open the two sides on their own"
        )
    return geobox


def _degrees(values: Sequence[float], n: int, wanted: str) -> tuple[float, ...]:
    """Longitudes and latitudes in turn."""
    try:
        numbers = tuple(float(v) for v in values)
    except (TypeError, ValueError) as error:
        raise OptionError(wanted) from error
    lons, lats = numbers[::2], numbers[1::2]
    if len(numbers) != n or not all(abs(v) <= 180 for v in lons) or not all(abs(v) <= 90 for v in lats):
        raise OptionError(wanted)
    if n == 4 and not (numbers[1] < numbers[3] and numbers[0] != numbers[2]):
        raise OptionError(wanted)
    return numbers


def _geometry(intersects: Any) -> Geometry:
    """A geometry in degrees of GeoJSON, or of whatever has a ``__geo_interface__``."""
    from odc.geo.geom import Geometry, unary_union

    shape = getattr(intersects, "__geo_interface__", intersects)
    wanted = f"intersects={str(intersects)[:80]!r}: wanted a GeoJSON geometry in degrees"
    try:
        features = shape["features"] if shape["type"] == "FeatureCollection" else [shape]
        shapes = [f["geometry"] if f["type"] == "Feature" else f for f in features]
        crs = getattr(intersects, "crs", None) or "EPSG:4326"
        area = unary_union([Geometry(s, crs).to_crs("EPSG:4326") for s in shapes])
        assert area is not None  # no feature at all
        box = area.boundingbox
    except Exception as error:
        raise OptionError(wanted) from error
    _degrees(box.bbox, 4, wanted)
    return area


def _grid_crs(crs: str | int, lon: float, lat: float) -> Any:
    """The CRS asked for, or the UTM zone of a place."""
    from odc.geo import CRS

    try:
        grid = CRS.utm(lon, lat) if crs == "utm" else CRS(f"EPSG:{crs}" if isinstance(crs, int) else crs)
    except Exception as error:
        raise OptionError(f"{crs=}: wanted 'utm' or an EPSG code ({str(error)[:80]})") from error
    if grid.geographic or not all(u in ("metre", "meter", "m") for u in grid.units):
        raise OptionError(f"{crs=}: wanted 'utm' or a projected CRS in metres")
    return grid


def _lonlat(geobox: GeoBox) -> Geometry:
    """What a grid covers, in degrees."""
    return geobox.extent.to_crs("EPSG:4326", resolution=1000)


def _search(chosen: Catalog, geobox: GeoBox, period: Span) -> list[pystac.Item]:
    """Items of the area and the period, all pages of them.

    Clouds are not asked about: some servers ignore the question without a word, so that what comes
    back is looked through in any case.
    """
    import pystac_client
    from pystac_client.stac_api_io import StacApiIO
    from urllib3 import Retry

    class PatientRetry(Retry):
        def get_retry_after(self, response: Any) -> float | None:
            asked = super().get_retry_after(response)
            return None if asked is None else min(asked, LONGEST_WAIT)

    retry = PatientRetry(
        total=TRIES,
        backoff_factor=WAIT,
        status_forcelist=PASSING,
        allowed_methods=None,
        raise_on_status=False,
    )
    when = None
    if period is not None:  # servers' ranges are closed; the last moment is cut off again afterwards
        when = "/".join(f"{t.isoformat()}Z" for t in period)
    try:
        client = pystac_client.Client.open(
            chosen.url, stac_io=StacApiIO(max_retries=retry, timeout=TIMEOUT), timeout=TIMEOUT
        )
        search = client.search(
            collections=list(chosen.collections) or None,
            bbox=_lonlat(geobox).boundingbox.bbox,
            datetime=when,
            limit=100,
        )
        return list(search.items())
    except Exception as error:
        raise CatalogError(
            f"the catalog {chosen.url} could not be searched ({1 + TRIES} tries where that may help, {TIMEOUT:g} s "
            f"each): {type(error).__name__}: {str(error)[:300]}. Try again later, or another catalog="
        ) from error


# ---------------------------------------------------------------------- items


@dataclass(frozen=True)
class Scene:
    """An item, with what was decided about it.

    Attributes
    ----------
    item : pystac.Item
        As the catalog has it.
    time : Timestamp
        Of the acquisition, UTC without a time zone.
    assets : mapping of str to str
        Key of the asset for each band (``B2`` …), ``SCL`` and extra asset.
    baseline : float or None
        Processing baseline, 5.11 for 05.11.
    offset : float
        Digital numbers to subtract.
    decided_by : str
        The metadata field that decided the offset.
    doubt : str or None
        What speaks against that decision.
    unused : str or None
        Why the item is not used: a word or two, a colon, details.
    """

    item: pystac.Item
    time: pd.Timestamp
    assets: Mapping[str, str]
    baseline: float | None
    offset: float
    decided_by: str
    doubt: str | None = None
    unused: str | None = None

    def record(self) -> dict[str, Any]:
        """The entry of ``attrs["items"]``."""
        return {
            "id": self.item.id,
            "datetime": self.time.isoformat() + "Z",
            "baseline": None if self.baseline is None else f"{self.baseline:05.2f}",
            "offset": self.offset,
            "decided_by": self.decided_by,
            "used": self.unused or True,
        }

    def href(self, name: str) -> str:
        """Where the asset of a band is."""
        asset = self.item.assets[self.assets[name]]
        return asset.get_absolute_href() or asset.href


def _scene(
    item: pystac.Item, harmonize: str | bool | float, *, needs_scl: bool, extra: Iterable[str]
) -> Scene:
    stamp = item.datetime or item.common_metadata.start_datetime
    if stamp is None:
        raise CatalogError(f"item {item.id!r} has no datetime: take it out of the items given")
    when = pd.Timestamp(stamp)
    when = when.tz_convert(None) if when.tz else when
    assets = _band_assets(item)
    lacking = [b for b in BANDS if b not in assets]
    if needs_scl and "SCL" not in assets:
        lacking.append("SCL (mask=None does without)")
    for name in extra:
        if name in item.assets:
            assets[name] = name
        else:
            lacking.append(name)
    baseline = _baseline(item)
    if harmonize == "auto":
        offset, decided_by, doubt = _offset(item, baseline, assets)
    else:
        asked = harmonize if isinstance(harmonize, bool | np.bool_) else None
        offset = float(harmonize) if asked is None else float(OFFSET * asked)
        decided_by, doubt = "harmonize=", None
    unused = f"lacks assets: {', '.join(lacking)}" if lacking else None
    return Scene(item, when, assets, baseline, offset, decided_by, doubt, unused)


def _band_assets(item: pystac.Item) -> dict[str, str]:
    """Key of the asset of each band and of SCL, the finest resolution of each.

    Earth Search has ``red``, the Planetary Computer ``B04``, CDSE ``B04_10m`` and coarser copies; JPEG
    2000 copies beside GeoTIFFs (``red-jp2``) are passed over.
    """
    found: dict[str, tuple[float, str]] = {}
    for key in item.assets:
        name = "SCL" if re.fullmatch(r"scl(_\d+m)?", key, re.IGNORECASE) else band_name(key)
        if name is None:
            continue
        size = re.search(r"_(\d+)m$", key, re.IGNORECASE)
        entry = (float(size[1]) if size else 0.0, key)
        found[name] = min(found.get(name, entry), entry)
    return {name: key for name, (_, key) in found.items()}


_BASELINE_KEYS = ("s2:processing_baseline", "processing:version")


def _baseline(item: pystac.Item) -> float | None:
    """Processing baseline of an item, from its properties or from the name of its product."""
    for key in _BASELINE_KEYS:
        text = str(item.properties.get(key) or "")
        if re.fullmatch(r"\d{1,2}\.\d{1,2}", text):
            return float(text)
    for text in (str(item.properties.get("s2:product_uri") or ""), item.id):
        named = re.search(r"_N(\d{2})(\d{2})_", text)
        if named:
            return float(f"{named[1]}.{named[2]}")
    return None


def _declared_offsets(item: pystac.Item, assets: Mapping[str, str]) -> set[float]:
    """Digital numbers that the bands' assets declare to have been added."""
    found: set[float] = set()
    for name in BANDS:
        fields = item.assets[assets[name]].extra_fields if name in assets else {}
        for entry in (fields, *fields.get("raster:bands", []), *fields.get("bands", [])):
            offset = entry.get("raster:offset", entry.get("offset"))
            scale = entry.get("raster:scale", entry.get("scale")) or 1e-4
            if offset is not None:
                found.add(round(-float(offset) / float(scale), 3) + 0.0)
    return found


def _offset(
    item: pystac.Item, baseline: float | None, assets: Mapping[str, str]
) -> tuple[float, str, str | None]:
    """Digital numbers to subtract from an item's pixels, the field that says so, and what speaks against it.

    Never by a date: baseline 05.00 exists for scenes of 2015 on. In this order: Earth Search v1 says in
    a flag of its own that it has removed the offset (its ``raster:bands`` go on saying -0.1, which is no
    contradiction there); the processing baseline; what the assets declare; the collection.
    """
    properties = item.properties
    declared = _declared_offsets(item, assets)
    flag = properties.get("earthsearch:boa_offset_applied")
    if flag is True:
        return 0.0, "earthsearch:boa_offset_applied", None
    if baseline is not None:
        offset = float(OFFSET if baseline >= OFFSET_BASELINE else 0)
        key = next((k for k in _BASELINE_KEYS if properties.get(k)), "product name")
        if flag is False:
            return offset, "earthsearch:boa_offset_applied", None
        doubt = None
        if declared and declared != {offset}:
            doubt = (
                f"{key} is {baseline:05.2f}, but the assets declare {_listed(declared)} DN; the former counts"
            )
        return offset, key, doubt
    if len(declared) == 1:
        return declared.pop(), "raster:bands offset", None
    if item.collection_id in OFFSET_COLLECTIONS:
        return float(OFFSET), "collection", None
    doubt = f"neither a processing baseline nor one offset of the bands is told ({_listed(declared)})"
    return 0.0, "nothing", doubt


def _listed(values: Iterable[float]) -> str:
    return ", ".join(f"{v:g}" for v in sorted(values)) or "none"


def _footprint(item: pystac.Item) -> Geometry | None:
    """What an item covers, in degrees; None where it does not tell, or crosses the antimeridian."""
    from odc.geo.geom import Geometry, box

    shape = Geometry(item.geometry, "EPSG:4326") if item.geometry else None
    if shape is None and item.bbox:
        half = len(item.bbox) // 2  # of two or three dimensions
        west, south, east, north = *item.bbox[:2], *item.bbox[half : half + 2]
        shape = box(west, south, east, north, "EPSG:4326")
    if shape is None:
        return None
    around = shape.boundingbox
    return shape if 0 <= around.right - around.left <= 180 else None


def _choose(scenes: list[Scene], geobox: GeoBox, period: Span, max_cloud: float | None) -> list[Scene]:
    """The scenes with a reason at each that is not used: place, time, another processing, clouds."""
    area = _lonlat(geobox)

    def here_and_now(scene: Scene) -> str | None:
        footprint = _footprint(scene.item)
        if footprint is not None and not footprint.intersects(area):
            return "outside the area"
        if period is not None and not period[0] <= scene.time < period[1]:
            return "outside the period"
        return scene.unused

    def clouds(scene: Scene) -> str | None:
        share = scene.item.properties.get("eo:cloud_cover")
        if scene.unused is None and max_cloud is not None and share is not None and share > max_cloud:
            return f"clouds: {share:.1f} % > {max_cloud:g} %"
        return scene.unused

    scenes = _newest([replace(s, unused=here_and_now(s)) for s in scenes])
    return [replace(s, unused=clouds(s)) for s in scenes]


def _newest(scenes: list[Scene]) -> list[Scene]:
    """Of the processings of one acquisition only the newest goes on."""
    granules: dict[tuple[str, str], list[int]] = {}
    for i, scene in enumerate(scenes):
        platform, tile = _granule(scene)
        if scene.unused is None and tile:
            granules.setdefault((platform, tile), []).append(i)
    out = list(scenes)
    for own in granules.values():
        kept: list[int] = []
        for i in sorted(own, key=lambda j: _processed(scenes[j]), reverse=True):
            newer = next((j for j in kept if _same_acquisition(scenes[j], scenes[i])), None)
            if newer is None:
                kept.append(i)
            else:
                out[i] = replace(scenes[i], unused=f"older processing: of {scenes[newer].item.id}")
    return out


def _same_acquisition(new: Scene, old: Scene) -> bool:
    """Whether two items of one granule show one acquisition, and the newer all that the older shows.

    A data take that two ground stations received makes two products of one granule, each with its part.
    """
    if abs(new.time - old.time) > SAME_ACQUISITION:
        return False
    shapes = _footprint(new.item), _footprint(old.item)
    if shapes[0] is None or shapes[1] is None or shapes[1].area == 0:
        return True
    return bool((shapes[0] & shapes[1]).area > 0.5 * shapes[1].area)


def _granule(scene: Scene) -> tuple[str, str]:
    """Platform and MGRS granule, each "" if not told."""
    p, name = scene.item.properties, f"{scene.item.properties.get('s2:product_uri', '')} {scene.item.id}"
    parts = [p.get(k) for k in ("mgrs:utm_zone", "mgrs:latitude_band", "mgrs:grid_square")]
    tile = p.get("s2:mgrs_tile") or p.get("grid:code") or "".join(str(v) for v in parts if v is not None)
    named = re.search(r"_T(\d{2}[A-Z]{3})_", name)
    tile = re.sub(r"^(MGRS-|T)", "", str(tile or (named[1] if named else ""))).lstrip("0").upper()
    craft = re.match(r".*\bS(2[A-D])_", name)
    platform = str(p.get("platform") or (f"sentinel-{craft[1]}" if craft else ""))
    return re.sub(r"[^a-z0-9]", "", platform.lower()), tile


def _processed(scene: Scene) -> tuple[Any, ...]:
    """What tells a newer processing from an older one."""
    p = scene.item.properties
    keys = ("s2:generation_time", "processing:datetime", "updated", "created")
    stamps = (pd.to_datetime(p.get(k), utc=True, errors="coerce") for k in keys)
    made = next((t.value for t in stamps if t is not None and not pd.isna(t)), 0)
    return (scene.baseline or 0.0, made, scene.item.id, scene.item.collection_id or "")


def _nothing_found(
    scenes: list[Scene], chosen: Catalog, geobox: GeoBox, period: Span, max_cloud: float | None
) -> str:
    where = ", ".join(f"{v:.4f}" for v in _lonlat(geobox).boundingbox.bbox)
    when = "any time" if period is None else f"{period[0].date()} to {period[1].date()} (exclusive)"
    collections = list(chosen.collections) or "all"
    query = f"catalog {chosen.url}, collections {collections}, bbox ({where}), {when}, {max_cloud=}"
    if not scenes:
        return f"nothing found: the catalog has no item for {query}. Check the place, the time and the collections"
    why = Counter((s.unused or "").split(":")[0] for s in scenes)
    worst = why.most_common(1)[0][0]
    mend = {
        "clouds": "raise max_cloud=",
        "outside the area": "move the area",
        "outside the period": "widen datetime=",
        "lacks assets": "give other collections=",
        "unreadable": "try again",
    }
    example = next(s for s in scenes if s.unused and s.unused.startswith(worst))
    return (
        f"nothing left over of the {len(scenes)} items found for {query}: "
        f"{', '.join(f'{n} {reason}' for reason, n in why.items())} (e.g. {example.item.id}: {example.unused}). "
        f"To mend it, {mend[worst]}"
    )


def _tell(scenes: list[Scene]) -> None:
    """Log what was decided, and warn of what is open to doubt."""
    used = [s for s in scenes if s.unused is None]
    log.info("%d of %d items used", len(used), len(scenes))
    for scene in scenes:
        if scene.unused is not None:
            log.info("item %s not used: %s", scene.item.id, scene.unused)
    for (offset, decided_by), n in Counter((s.offset, s.decided_by) for s in used).items():
        log.info("%d items: %g DN subtracted, by %s", n, offset, decided_by)
    for (offset, doubt), n in Counter((s.offset, s.doubt) for s in used if s.doubt).items():
        ids = [s.item.id for s in used if s.doubt == doubt]
        warnings.warn(
            f"{n} items ({', '.join(ids[:3])}{', …' if n > 3 else ''}): {doubt}, and {offset:g} DN are subtracted. If "
            f"that is wrong, say so: harmonize=True ({OFFSET}), False, or a number",
            AnySatWarning, stacklevel=3,
        )  # fmt: skip


# ---------------------------------------------------------------------- pixels


@dataclass(frozen=True)
class _Masking:
    """What is left out of an item."""

    mask: Mask
    classes: tuple[int, ...]
    metres: float
    extra: tuple[str, ...]

    @property
    def name(self) -> str:
        if callable(self.mask):
            return f"{getattr(self.mask, '__module__', '')}.{getattr(self.mask, '__qualname__', repr(self.mask))}"
        return self.mask or "none"

    @property
    def reach(self) -> int:
        """Pixels that the mask grows by."""
        return int(self.metres // PIXEL)

    def grow(self, left_out: np.ndarray) -> np.ndarray:
        """All that lies within `metres` of what is left out, less a margin of `reach` pixels, (y, x)."""
        if self.reach == 0:
            return left_out
        inside = (slice(self.reach, -self.reach),) * 2
        if not left_out.any():
            return left_out[inside]
        from scipy.ndimage import distance_transform_edt

        grown: np.ndarray = distance_transform_edt(~left_out)[inside] * PIXEL <= self.metres + 1e-6
        return grown


@dataclass(frozen=True)
class _Source:
    """All that reading an item takes: it travels to the workers, the item itself does not.

    Attributes
    ----------
    item : str
        Its name.
    time : Timestamp
        Of the acquisition.
    assets : mapping of str to (str, str)
        Key and href of each band, ``SCL`` and extra asset that is read.
    offset : float
        Digital numbers to subtract.
    masking : _Masking
        What is left out.
    on_error : str
        ``"raise"`` or ``"invalid"``.
    workers : int
        Assets to read at a time.
    """

    item: str
    time: pd.Timestamp
    assets: Mapping[str, tuple[str, str]]
    offset: float
    masking: _Masking
    on_error: str
    workers: int


class _ItemReader:
    """Reads an item as one raster of ten bands, masked (implements odc.loader's RasterReader)."""

    def __init__(self, source: _Source, gdal: Mapping[str, Any]) -> None:
        self.source, self.gdal = source, gdal

    def read(self, cfg: Any, dst_geobox: GeoBox, *, dst: Any = None, selection: Any = None) -> Any:
        """The item on a grid, (10, y, x) float32: an observation of all bands, or NaN."""
        try:
            pixels = self.observed(dst_geobox)
        except ReadError as error:
            if self.source.on_error == "raise":
                raise
            warnings.warn(f"{error} It is missing here", AnySatWarning, stacklevel=2)
            pixels = np.full((len(BANDS), *dst_geobox.shape), np.nan, np.float32)
        return (slice(0, dst_geobox.shape[0]), slice(0, dst_geobox.shape[1])), pixels

    def observed(self, geobox: GeoBox) -> np.ndarray:
        """The pixels of all bands that are there whole and are not masked, (10, y, x) float32."""
        masking = self.source.masking
        wide = geobox.pad(masking.reach) if masking.reach else geobox
        inside = tuple(slice(masking.reach, masking.reach + n) for n in geobox.shape)
        if masking.mask == "scl":  # first and alone: under clouds nothing else needs to be read
            classes = self._assets(["SCL"], wide)["SCL"]
            scl = classes[inside]
            # beyond the swath there is nothing to grow
            cloudy = np.isin(classes, [c for c in masking.classes if c != 0])
            left_out = masking.grow(cloudy) | (scl == 0)
            if left_out.all():
                return np.full((len(BANDS), *geobox.shape), np.nan, np.float32)
            bands = self._bands(self._assets(BANDS, geobox), scl)
        elif callable(masking.mask):
            found = self._assets(self.source.assets, wide)
            whole = self._bands(found, found.get("SCL"))
            left_out = masking.grow(self._called(masking.mask, whole, found, wide))
            bands = whole[(slice(None), *inside)]
        else:
            bands = self._bands(self._assets(BANDS, geobox), None)
            left_out = np.zeros(geobox.shape, bool)
        there = np.isfinite(bands).all(0) & ~left_out
        np.copyto(bands, np.float32(np.nan), where=~there)
        return bands

    def _bands(self, found: Mapping[str, np.ndarray], scl: np.ndarray | None) -> np.ndarray:
        """The ten bands (10, y, x), NaN where missing, with the offset removed."""
        bands = np.stack([found[b] for b in BANDS])
        offset = np.float32(self.source.offset)
        if offset:
            np.maximum(bands - offset, np.float32(0), out=bands)
        elif scl is not None:
            # Where somebody else has removed the offset, zero is dark ground too: the scene
            # classification knows. With the offset still in, zero is no data and nothing else.
            np.copyto(bands, np.float32(0), where=np.isnan(bands) & (scl != 0))
        return bands

    def _called(
        self,
        mask: Callable[[xr.Dataset], xr.DataArray],
        bands: np.ndarray,
        found: Mapping[str, np.ndarray],
        geobox: GeoBox,
    ) -> np.ndarray:
        """What the user's mask leaves out, (y, x) bool."""
        from odc.geo.xr import xr_coords

        values = {**found, **dict(zip(BANDS, bands, strict=True))}
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
                f"{getattr(left_out, 'dtype', None)}: wanted a DataArray (time, y, x) of bool, True where a pixel "
                "is to be left out"
            )
        result: np.ndarray = left_out.transpose(..., "y", "x").values.reshape(geobox.shape)
        return result

    def _assets(self, names: Iterable[str], geobox: GeoBox) -> dict[str, np.ndarray]:
        """Assets on a grid by name, (y, x) each, read side by side."""
        pool = _pool(self.source.workers)
        jobs = {name: pool.submit(self._asset, name, geobox) for name in names}
        try:
            return {name: job.result() for name, job in jobs.items()}
        finally:
            for job in jobs.values():
                job.cancel()

    def _asset(self, name: str, geobox: GeoBox | None) -> np.ndarray:
        """An asset on a grid (y, x): SCL uint8 with 0, others float32 with NaN for what is missing.

        None for the grid only opens it.
        """
        key, href = self.source.assets[name]
        said = ""
        # GDAL itself tries again where a server is busy, but what it keeps of a failure may be broken; it
        # forgets that when asked to, over S3 only once it was asked twice
        for wait in (0, WAIT, 2 * WAIT):
            time.sleep(wait)
            try:
                return self._read(name, _signed(href), geobox, again=wait > 0)
            except Exception as error:
                said = f"{type(error).__name__}: {error.__cause__ or error}"
        # not from within: GDAL's exceptions do not travel between processes
        raise ReadError(
            f"asset {key!r} of item {self.source.item!r} cannot be read: {_without_token(said)[:300]} "
            f"({_without_token(href)}). Try again; or on_error='invalid' leaves the item out where that happens."
        )

    def _read(self, name: str, uri: str, geobox: GeoBox | None, *, again: bool) -> np.ndarray:
        import rasterio
        from odc.loader import RioDriver
        from rasterio.enums import Resampling
        from rasterio.vrt import WarpedVRT

        gdal = dict(self.gdal)
        if again:
            # GDAL remembers a failure as it does a success, and a body that broke off as all there is
            path = re.sub("^s3://", "/vsis3/", re.sub("^(?=https?://)", "/vsicurl/", uri))
            gdal["CPL_VSIL_CURL_NON_CACHED"] = path
        driver: Any = RioDriver()
        with driver.restore_env(gdal, driver.new_load(geobox)), rasterio.open(uri) as file:
            if geobox is None:
                return np.empty((0, 0))
            onto: dict[str, Any] = {
                "crs": str(geobox.crs),
                "transform": geobox.transform,
                "height": geobox.shape[0],
                "width": geobox.shape[1],
                "dtype": "uint8" if name == "SCL" else "float32",
                "nodata": 0 if name == "SCL" else np.nan,
                "src_nodata": 0 if file.nodata is None and name in (*BANDS, "SCL") else file.nodata,
                "resampling": Resampling.bilinear if name in BANDS else Resampling.nearest,
                # GDAL would guess the scale from the corners of the block that is read, and interpolate
                # positions across it: what a pixel gets would depend on the block
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
    """The threads of this process that read: they wait for servers, so there may be more than cores."""
    key = (os.getpid(), workers)  # a fork has none of its parent's threads
    with _POOLS_LOCK:
        if key not in _POOLS:
            _POOLS[key] = ThreadPoolExecutor(workers, "anysat-read")
        return _POOLS[key]


def _without_token(text: str) -> str:
    return re.sub(r"\?[^\s'\"]+", "", text)


def _signed(href: str) -> str:
    """The href as its server wants it now: signatures do not outlive a long job."""
    if not re.match(CATALOGS["planetary-computer"].hrefs, href):
        return href
    import planetary_computer

    signed: str = planetary_computer.sign(href.split("?")[0])
    return signed


def _access(scenes: Iterable[Scene]) -> dict[str, Any]:
    """GDAL's options for reading the scenes: patience, and what their hrefs need."""
    from odc.loader import RioDriver

    options = {
        **RioDriver().capture_env(),
        "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
        "GDAL_HTTP_TIMEOUT": str(TIMEOUT),
        "GDAL_HTTP_CONNECTTIMEOUT": str(TIMEOUT),
        "GDAL_HTTP_MAX_RETRY": str(TRIES),
        "GDAL_HTTP_RETRY_DELAY": str(WAIT),
        "GDAL_HTTP_RETRY_CODES": ",".join(map(str, PASSING)),
    }
    hrefs = [scene.href("B2") for scene in scenes]
    for name, catalog in CATALOGS.items():
        if any(re.match(catalog.hrefs, href) for href in hrefs):
            _check_secrets(catalog)
            if name == "planetary-computer":
                _check_installed("planetary_computer")
            options.update(catalog.gdal)
    return options


def _source(scene: Scene, masking: _Masking, on_error: str, workers: int) -> _Source:
    names = [*BANDS]
    if "SCL" in scene.assets and masking.mask is not None:
        names.append("SCL")
    assets = {n: (scene.assets[n], scene.href(n)) for n in (*names, *masking.extra)}
    return _Source(scene.item.id, scene.time, assets, scene.offset, masking, on_error, workers)


def _leave_out_unreadable(
    scenes: list[Scene], masking: _Masking, gdal: Mapping[str, Any], workers: int
) -> list[Scene]:
    """Open every asset once; items with one that cannot be opened are not used."""
    pool, checked = _pool(workers), []
    for scene in scenes:
        if scene.unused is None:
            reader = _ItemReader(_source(scene, masking, "raise", workers), gdal)
            checked.append([pool.submit(reader._asset, name, None) for name in reader.source.assets])
        else:
            checked.append([])
    out = []
    for scene, jobs in zip(scenes, checked, strict=True):
        faults = [str(e) for e in (job.exception() for job in jobs) if e is not None]
        out.append(replace(scene, unused=f"unreadable: {faults[0]}") if faults else scene)
    return out


class _Driver:
    """Makes odc.stac.load read our items (implements odc.loader's ReaderDriver and MDParser)."""

    dask_reader = None
    aux_reader = None

    def __init__(self, gdal: Mapping[str, Any], sources: Mapping[str, _Source]) -> None:
        self.gdal, self.sources = gdal, sources

    def __getstate__(self) -> dict[str, Any]:
        return {"gdal": {}, "sources": {}}  # of no use to a worker: every source has its part of it

    @property
    def md_parser(self) -> _Driver:
        return self

    def extract(self, md: Any) -> Any:
        from odc.loader import FixedCoord, RasterBandMetadata, RasterGroupMetadata

        raster = RasterBandMetadata("float32", math.nan, dims=("band", "y", "x"))
        return RasterGroupMetadata({("s2", 1): raster}, extra_coords=[FixedCoord("band", list(BANDS))])

    def driver_data(self, md: Any, band_key: Any) -> _Source:
        return self.sources[md.id]

    def new_load(self, geobox: Any, *, chunks: Any = None) -> None:
        return None

    def finalise_load(self, load_state: Any) -> Any:
        return load_state

    def capture_env(self) -> dict[str, Any]:
        return dict(self.gdal)

    @contextmanager
    def restore_env(self, env: dict[str, Any], load_state: Any) -> Iterator[dict[str, Any]]:
        yield env

    def open(self, src: Any, ctx: Any) -> _ItemReader:
        return _ItemReader(src.driver_data, ctx)


def _load(
    scenes: list[Scene],
    geobox: GeoBox,
    masking: _Masking,
    on_error: str,
    gdal: Mapping[str, Any],
    workers: int,
    chunks: Mapping[str, int],
) -> xr.DataArray:
    """The cube of the scenes: a date for each solar day, mosaicked by what is valid.

    Which of two valid observations is taken goes by the items' CRS and names, so that the order in which
    a catalog lists them changes nothing: first those that need no reprojection.
    """
    import odc.stac
    import pystac
    from dask.base import tokenize

    epsg = "" if geobox.crs is None else str(geobox.crs.to_epsg())

    def order(scene: Scene) -> tuple[Any, ...]:
        p = scene.item.properties
        own = str(p.get("proj:epsg") or p.get("proj:code") or "").removeprefix("EPSG:")
        return own != epsg, scene.item.id, scene.item.collection_id or ""

    scenes = sorted(scenes, key=order)
    around = _lonlat(geobox)
    shift = pd.Timedelta(hours=around.centroid.coords[0][0] / 15)
    days = [(s.time + shift).normalize() for s in scenes]
    sources, items = {}, []
    for i, scene in enumerate(scenes):
        # footprints are drawn roughly: what lies just beyond is looked at too
        footprint = _footprint(scene.item)
        covers = around if footprint is None else footprint.buffer(0.01)
        source = sources[str(i)] = _source(scene, masking, on_error, workers)
        item = pystac.Item(str(i), covers.json, list(covers.boundingbox.bbox), scene.time.to_pydatetime(), {})
        # odc names tasks by the href alone: it has to tell all that makes a difference
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

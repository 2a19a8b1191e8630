"""Open Sentinel-2 L2A of a place and a time from STAC catalogs as a cube for `embed`.

Search the catalog, decide about each item (`items`), and read lazily (`reader`).
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from xr_anysat.config import FETCH_WORKERS, option
from xr_anysat.cube.periods import PERIOD_ATTR, PERIOD_TIMES_ATTR, Period, parse_period, span_of
from xr_anysat.errors import CatalogError, OptionError, warn
from xr_anysat.shared.sensor import S2
from xr_anysat.shared.values import check_whole_number, is_number, is_whole_number
from xr_anysat.stac import catalogs
from xr_anysat.stac.catalogs import CATALOGS, Catalog, check_installed, check_secrets
from xr_anysat.stac.items import DateRange, ItemDecision, judge_item, lonlat, select_scenes
from xr_anysat.stac.loading import load_scenes
from xr_anysat.stac.reader import Mask, Masking, gdal_environment, leave_out_unreadable

if TYPE_CHECKING:
    import pystac
    from odc.geo.geobox import GeoBox
    from odc.geo.geom import Geometry

log = logging.getLogger(__name__)

Area = tuple[float, float, float, float]

SCL_INVALID = (0, 1, 3, 8, 9, 10)
"""Classes of the scene classification that do not show the ground: no data, saturated or defective, cloud
shadow, cloud of medium and of high probability, thin cirrus. Snow (11) counts as ground."""

MAX_BUFFER_M = 10_000_000
"""Meters from a pole to the equator."""

CHUNK = 1024
"""Pixels on the side of a chunk."""


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
    """Open Sentinel-2 L2A of a place and a time as a lazy cube for `embed`.

    The catalog is searched immediately; pixels are read when the cube is computed.

    Parameters
    ----------
    bbox : (west, south, east, north), optional
        Degrees. Pass one of `bbox`, `intersects` and `point`.
    intersects : GeoJSON-like or geometry, optional
        In degrees, unless it has its own ``crs``. The cube covers its bounding box.
    point, buffer_m : (lon, lat) and float, optional
        Degrees and meters: the square with sides of ``2·buffer_m`` around the point.
    datetime : str or (start, end), optional
        ``"2022"``, ``"2022-06"``, ``"2022-04-01/2022-10-01"`` or a pair; the end is exclusive. None: all
        dates. It is recorded on the cube, where `frames` finds its period.
    catalog : str or items, default "earth-search"
        ``"earth-search"``, ``"planetary-computer"``, ``"cdse"``, the URL of a STAC API, a pystac
        ItemCollection or a list of Items.
    collections : sequence of str, optional
        Collections of the catalog. Default: its Sentinel-2 L2A ones; for a URL, all.
    max_cloud : float or None, default 30
        Largest cloud cover (``eo:cloud_cover``) of a scene, percent. Scenes without cloud cover are kept.
    mask : "scl", None or callable, default "scl"
        Pixels that do not show the ground. ``"scl"``: by the scene classification. None: only missing
        pixels. A callable is called for each block of an item when it is read, with a Dataset ``(time: 1,
        y, x)`` in memory that has the variables ``B2`` … ``B12`` (DN, the offset removed, NaN where
        missing), ``SCL`` if the item has one, those of `mask_assets`, and ``attrs["item"]``. It returns
        True where a pixel is left out. It must decide about each pixel on its own, because blocks can end
        anywhere.
    scl_invalid : sequence of int
        Classes that ``"scl"`` leaves out; 0 is always left out.
    dilate_m : float, default 0
        Meters by which the mask grows, across blocks and into the area from outside.
    mask_assets : sequence of str
        Further assets for a callable, such as ``"cloud"``: float32 with NaN, nearest neighbor.
    harmonize : "auto", bool or number
        The +1000 offset. ``"auto"``: the metadata of each item decide. False: nothing is subtracted.
        True: 1000 is subtracted from every item. A number: digital numbers to subtract.
    on_error : {"raise", "invalid"}
        What happens if an asset cannot be read. ``"raise"``: the computation stops. ``"invalid"``: its
        item is missing there, with a warning that names both; every asset is also opened immediately,
        and items with an asset that cannot be opened are not used, as ``attrs["items"]`` records.
    crs : "utm" or EPSG code
        CRS of the cube: the UTM zone of the center of the area, or any projected CRS in meters.
    chunks : int or mapping, default 1024
        Pixels per side of a chunk, or ``{"y": …, "x": …}``. Along time, a chunk is one date.
    workers : int, default 8
        Largest number of assets that a process reads at the same time (option ``fetch_workers``), even
        if the scheduler has fewer threads.

    Returns
    -------
    DataArray, (time, band, y, x) float32
        Digital numbers (reflectance × 10 000, the offset removed); one date per solar day. All ten bands of a
        pixel are from the observation of one item, or NaN. ``attrs["items"]`` is JSON with one entry per
        item of the search: ``id``, ``datetime``, ``baseline``, ``offset`` (DN subtracted), ``decided_by`` and
        ``used`` (true, or why not).

    Raises
    ------
    OptionError
        If an argument is impossible.
    CatalogError
        If the catalog does not answer, or no item meets all conditions; the message says which condition
        left none.
    ReadError
        When the cube is computed: if an asset cannot be read; the message names item and asset.

    Warns
    -----
    AnySatWarning
        If the metadata of an item contradict each other, or do not decide about the offset.
    """
    size = _chunk_sizes(chunks)
    period = parse_period(datetime, "datetime")
    query = scene_query(
        catalog,
        collections,
        max_cloud,
        mask,
        scl_invalid,
        dilate_m,
        mask_assets,
        harmonize,
        on_error,
        workers,
    )
    geobox = _geobox(bbox, intersects, point, buffer_m, crs)
    check_installed("odc.stac", "pystac_client", "scipy")
    scenes = query.find(geobox, period)
    gdal = gdal_environment(s for s in scenes if s.unused is None)
    if on_error == "invalid":
        scenes = leave_out_unreadable(scenes, query.masking, gdal, query.workers)
    used = [s for s in scenes if s.unused is None]
    if not used:
        raise CatalogError(query.nothing_found(scenes, geobox, period))
    report_decisions(scenes)
    cube = load_scenes(used, geobox, query.masking, on_error, gdal, query.workers, size)
    cube.attrs = query.record(scenes, cube["time"].values, period)
    return cube


# ---------------------------------------------------------------------- scenes


@dataclass(frozen=True)
class SceneQuery:
    """Checked options of :func:`open_s2` except place and time: which scenes are used, and how they are read.

    Attributes
    ----------
    catalog : Catalog
        The catalog to search, or one that stands for the items.
    items : tuple of Item or None
        Items that the user passed.
    max_cloud, harmonize, on_error, workers
        As for :func:`open_s2`.
    masking : Masking
    """

    catalog: Catalog
    items: tuple[Any, ...] | None
    max_cloud: float | None
    masking: Masking
    harmonize: str | bool | float
    on_error: str
    workers: int

    def find(self, geobox: GeoBox, period: DateRange) -> list[ItemDecision]:
        """Search, and return all scenes with the decisions about them."""
        found = _search(self.catalog, geobox, period) if self.items is None else self.items
        scenes = [
            judge_item(
                item, self.harmonize, needs_scl=self.masking.mask == "scl", extra=self.masking.extra,
                catalog=self.catalog.url if self.items is None else None,
            )
            for item in found
        ]  # fmt: skip
        return select_scenes(scenes, geobox, period, self.max_cloud)

    def record(self, scenes: Sequence[ItemDecision], times: np.ndarray, period: DateRange) -> dict[str, Any]:
        """Return the attributes of a cube that was loaded from the used ones of `scenes`."""
        used = [s.time for s in scenes if s.unused is None]
        start, end = period or (min(used).normalize(), max(used).normalize() + pd.Timedelta(days=1))
        return {
            PERIOD_ATTR: f"{start.date()}/{end.date()}",
            PERIOD_TIMES_ATTR: span_of(times),
            "units": "DN",
            "nodata": float("nan"),
            "catalog": self.catalog.url,
            "items": json.dumps([s.record() for s in scenes]),
            "items_used": len(used),
            "items_left_out": json.dumps(Counter(s.unused.split(":")[0] for s in scenes if s.unused)),
            **self.settings(),
        }

    def settings(self) -> dict[str, Any]:
        """Return the options that decide about scenes and pixels, for the record."""
        return {
            "harmonize": str(self.harmonize),
            "mask": self.masking.name,
            "scl_invalid": " ".join(map(str, self.masking.classes)) if self.masking.mask == "scl" else "",
            "dilate_m": self.masking.meters,
            "max_cloud": "any" if self.max_cloud is None else float(self.max_cloud),
            "on_error": self.on_error,
        }

    def nothing_found(self, scenes: list[ItemDecision], geobox: GeoBox, period: DateRange) -> str:
        """Return the message for a place and period without usable scenes."""
        return _nothing_found(scenes, self.catalog, geobox, period, self.max_cloud)


def scene_query(
    catalog: Any,
    collections: Sequence[str] | None,
    max_cloud: float | None,
    mask: Mask,
    scl_invalid: Sequence[int],
    dilate_m: float,
    mask_assets: Sequence[str],
    harmonize: str | bool | float,
    on_error: str,
    workers: int,
) -> SceneQuery:
    """Check the options of :func:`open_s2` about scenes.

    Raises
    ------
    OptionError
        If an option is impossible.
    """
    _check_options(mask, scl_invalid, dilate_m, mask_assets, harmonize, on_error, max_cloud)
    workers = check_whole_number("workers", option("fetch_workers", workers))
    masking = Masking(mask, tuple(int(c) for c in scl_invalid), float(dilate_m), tuple(mask_assets))
    chosen = _catalog(catalog, collections)
    items = None if isinstance(catalog, str) else tuple(catalog)
    return SceneQuery(chosen, items, max_cloud, masking, harmonize, on_error, workers)


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
    if not (mask is None or callable(mask) or (isinstance(mask, str) and mask == "scl")):
        raise OptionError(f"{mask=}: expected 'scl', None, or a callable that takes a Dataset")
    if isinstance(mask_assets, str) or (mask_assets and not callable(mask)):
        raise OptionError(f"{mask_assets=}: expected a list of asset keys, together with a callable mask=")
    classes = None if isinstance(scl_invalid, str) else list(scl_invalid)
    if classes is None or not all(is_number(c) and 0 <= c <= 11 and c == int(c) for c in classes):
        raise OptionError(f"{scl_invalid=}: expected a list of classes, 0 to 11")
    if mask != "scl" and tuple(scl_invalid) != SCL_INVALID:
        raise OptionError(f"{scl_invalid=} has no meaning with {mask=}: pass it with mask='scl'")
    if not is_number(dilate_m) or dilate_m < 0:
        raise OptionError(f"{dilate_m=}: expected meters, 0 or more")
    if dilate_m and mask is None:
        raise OptionError(
            f"{dilate_m=} has no meaning with {mask=}, which leaves out nothing that could grow: pass mask='scl'"
        )
    if not (isinstance(harmonize, bool | np.bool_) or is_number(harmonize)) and harmonize != "auto":
        raise OptionError(f"{harmonize=}: expected 'auto', True, False or digital numbers to subtract")
    if on_error not in ("raise", "invalid"):
        raise OptionError(f"{on_error=}: expected 'raise' or 'invalid'")
    if max_cloud is not None and not (is_number(max_cloud) and 0 <= max_cloud <= 100):
        raise OptionError(f"{max_cloud=}: expected percent, 0 to 100, or None for any")


def _chunk_sizes(chunks: int | Mapping[str, int]) -> dict[str, int]:
    sizes = dict(chunks) if isinstance(chunks, Mapping) else {"y": chunks, "x": chunks}
    whole = all(is_whole_number(n, -1, 2**31 - 1) and n != 0 for n in sizes.values())
    if not whole or not set(sizes) <= {"y", "x"}:
        raise OptionError(
            f"{chunks=}: expected pixels, or {{'y': pixels, 'x': pixels}}; along time, a chunk is one date"
        )
    return {"y": CHUNK, "x": CHUNK, **sizes}


# ---------------------------------------------------------------------- where and when


def _catalog(catalog: Any, collections: Sequence[str] | None) -> Catalog:
    """Return the catalog with this name or URL, or one that stands for the items passed."""
    if not isinstance(catalog, str):
        import pystac

        items = None if isinstance(catalog, Mapping | pystac.Item) else list(catalog)
        if items is None or not all(isinstance(i, pystac.Item) for i in items):
            raise OptionError(
                f"catalog={str(catalog)[:80]!r}: expected a name, a URL, a pystac ItemCollection or a list of Items"
            )
        if collections is not None:
            raise OptionError(
                f"{collections=} can only be passed with a catalog to search: select from the items before"
            )
        return Catalog(f"{len(items)} items given")
    if catalog in CATALOGS:
        chosen = CATALOGS[catalog]
        check_secrets(chosen)
    elif re.match("https?://", catalog):
        known = [c.collections for c in CATALOGS.values() if catalog.rstrip("/").startswith(c.url)]
        chosen = Catalog(catalog, known[0] if known else ())
    else:
        raise OptionError(
            f"{catalog=}: expected one of {', '.join(map(repr, CATALOGS))}, the URL of a STAC API, or items"
        )
    if isinstance(collections, str):
        raise OptionError(f"{collections=}: expected a list of collections")
    return chosen if collections is None else replace(chosen, collections=tuple(collections))


def _geobox(
    bbox: Area | None,
    intersects: Any,
    point: tuple[float, float] | None,
    buffer_m: float | None,
    crs: str | int,
) -> GeoBox:
    """Return the grid of 10 m pixels, at multiples of 10 m, that covers the area."""
    from affine import Affine
    from odc.geo.geobox import GeoBox
    from odc.geo.geom import box
    from odc.geo.geom import point as point_at

    given = [n for n, v in (("bbox", bbox), ("intersects", intersects), ("point", point)) if v is not None]
    if len(given) != 1:
        raise OptionError(
            f"{' and '.join(given) or 'no area'} given: expected one of bbox=, intersects= and point= with buffer_m="
        )
    if (buffer_m is None) != (point is None) or (buffer_m is not None and not 0 < buffer_m <= MAX_BUFFER_M):
        raise OptionError(
            f"{point=} and {buffer_m=}: expected (lon, lat) and the meters around it, up to {MAX_BUFFER_M}"
        )
    if bbox is not None:
        west, south, east, north = _degrees(
            bbox, 4, f"{bbox=}: expected (west, south, east, north) in degrees"
        )
        if west > east:
            raise OptionError(
                f"{bbox=} crosses the antimeridian (west > east): a cube has one grid, open the two sides on their own"
            )
        if east - west > 180:
            raise OptionError(
                f"{bbox=} is {east - west:g}° wide: a cube has one grid, expected a few degrees"
            )
        area = box(west, south, east, north, "EPSG:4326")
    elif point is not None:
        lon, lat = _degrees(point, 2, f"{point=}: expected (lon, lat) in degrees")
        area = point_at(lon, lat, "EPSG:4326")
    else:
        area = _geometry(intersects)
    middle = area.boundingbox
    grid = grid_crs(crs, (middle.left + middle.right) / 2, (middle.bottom + middle.top) / 2)

    pixel = S2.pixel_size
    if buffer_m is None:
        # a rectangle in degrees has curved edges in meters, so they are projected in pieces
        extent = area.to_crs(grid, resolution=0.01).boundingbox
        near = 1e-6  # of a pixel, so that bounds on the grid give exactly these pixels
        left, bottom = (math.floor(v / pixel + near) for v in (extent.left, extent.bottom))
        right, top = (math.ceil(v / pixel - near) for v in (extent.right, extent.top))
    else:
        ((x, y),) = area.to_crs(grid).points
        side = math.ceil(2 * buffer_m / pixel)
        left, top = round((x - buffer_m) / pixel), round((y + buffer_m) / pixel)
        right, bottom = left + side, top - side
    if not right > left or not top > bottom:
        raise OptionError(
            f"{given[0]}={str(bbox or intersects)[:80]} has no extent: expected an area, or point= with buffer_m="
        )
    geobox = GeoBox(
        (top - bottom, right - left),
        Affine(pixel, 0, left * pixel, 0, -pixel, top * pixel),
        grid,
    )
    covered = lonlat(geobox).boundingbox
    if covered.right - covered.left > 180:
        raise OptionError(
            f"{given[0]}= crosses the antimeridian or is too large: a cube has one grid, open the parts on their own"
        )
    return geobox


def _degrees(values: Sequence[float], n: int, expected: str) -> tuple[float, ...]:
    """Check `n` alternating longitudes and latitudes, and return them as floats."""
    try:
        numbers = tuple(float(v) for v in values)
    except (TypeError, ValueError) as error:
        raise OptionError(expected) from error
    lons, lats = numbers[::2], numbers[1::2]
    if len(numbers) != n or not all(abs(v) <= 180 for v in lons) or not all(abs(v) <= 90 for v in lats):
        raise OptionError(expected)
    if n == 4 and not (numbers[1] < numbers[3] and numbers[0] != numbers[2]):
        raise OptionError(expected)
    return numbers


def _geometry(intersects: Any) -> Geometry:
    """Read a geometry in degrees from GeoJSON, or from an object with ``__geo_interface__``."""
    from odc.geo.geom import Geometry, unary_union

    shape = getattr(intersects, "__geo_interface__", intersects)
    expected = f"intersects={str(intersects)[:80]!r}: expected a GeoJSON geometry in degrees"
    try:
        features = shape["features"] if shape["type"] == "FeatureCollection" else [shape]
        shapes = [f["geometry"] if f["type"] == "Feature" else f for f in features]
        crs = getattr(intersects, "crs", None) or "EPSG:4326"
        area = unary_union([Geometry(s, crs).to_crs("EPSG:4326") for s in shapes])
        assert area is not None  # there was no feature
        box = area.boundingbox
    except Exception as error:
        raise OptionError(expected) from error
    _degrees(box.bbox, 4, expected)
    return area


def grid_crs(crs: str | int, lon: float, lat: float) -> Any:
    """Return the requested CRS, or the UTM zone of a place."""
    from odc.geo import CRS

    try:
        grid = CRS.utm(lon, lat) if crs == "utm" else CRS(f"EPSG:{crs}" if isinstance(crs, int) else crs)
    except Exception as error:
        if crs == "utm":
            polar = "EPSG:3995" if lat > 0 else "EPSG:3031"
            raise OptionError(
                f"no UTM zone contains ({lon:g}, {lat:g}), because UTM ends at 80°S and 84°N: pass crs={polar!r}"
            ) from error
        raise OptionError(f"{crs=}: expected 'utm' or an EPSG code ({str(error)[:80]})") from error
    units = [
        u for u in grid.units if u
    ]  # polar axes are not named y and x, and odc-geo then leaves one unit empty
    if grid.geographic or not units or not all(u in ("metre", "meter", "m") for u in units):
        raise OptionError(f"{crs=}: expected 'utm' or a projected CRS in meters")
    return grid


def _search(chosen: Catalog, geobox: GeoBox, period: DateRange) -> list[pystac.Item]:
    """Search for all items of the area and the period, on all pages.

    Clouds are not part of the query, because some servers ignore them silently; `select_scenes` checks them.
    """
    import pystac_client
    from pystac_client.stac_api_io import StacApiIO
    from urllib3 import Retry

    class PatientRetry(Retry):
        def get_retry_after(self, response: Any) -> float | None:
            seconds = super().get_retry_after(response)
            return None if seconds is None else min(seconds, catalogs.MAX_WAIT)

    retry = PatientRetry(
        total=catalogs.TRIES,
        backoff_factor=catalogs.WAIT,
        status_forcelist=catalogs.RETRY_STATUS_CODES,
        allowed_methods=None,
        raise_on_status=False,
    )
    when = None
    if period is not None:  # ranges of servers include their end; `select_scenes` removes it
        when = "/".join(f"{t.isoformat()}Z" for t in period)
    try:
        client = pystac_client.Client.open(
            chosen.url,
            stac_io=StacApiIO(max_retries=retry, timeout=catalogs.TIMEOUT),
            timeout=catalogs.TIMEOUT,
        )
        search = client.search(
            collections=list(chosen.collections) or None,
            bbox=lonlat(geobox).boundingbox.bbox,
            datetime=when,
            limit=100,
        )
        return list(search.items())
    except Exception as error:
        raise CatalogError(
            f"the catalog {chosen.url} could not be searched (up to {1 + catalogs.TRIES} attempts, "
            f"{catalogs.TIMEOUT:g} s each): {type(error).__name__}: {str(error)[:300]}. Try again later, or pass "
            "another catalog="
        ) from error


def _nothing_found(
    scenes: list[ItemDecision], chosen: Catalog, geobox: GeoBox, period: DateRange, max_cloud: float | None
) -> str:
    where = ", ".join(f"{v:.4f}" for v in lonlat(geobox).boundingbox.bbox)
    when = "any time" if period is None else f"{period[0].date()} to {period[1].date()} (exclusive)"
    collections = list(chosen.collections) or "all"
    query = f"catalog {chosen.url}, collections {collections}, bbox ({where}), {when}, {max_cloud=}"
    if not scenes:
        return f"nothing found: the catalog has no item for {query}. Check the place, the time and the collections"
    reasons = Counter((s.unused or "").split(":")[0] for s in scenes)
    main = reasons.most_common(1)[0][0]
    remedies = {
        "clouds": "raise max_cloud=",
        "outside the area": "move the area",
        "outside the period": "widen datetime=",
        "lacks assets": "pass other collections=",
        "unreadable": "try again",
        "unsafe address": "pass the items themselves as catalog=, if you trust them",
    }
    example = next(s for s in scenes if s.unused and s.unused.startswith(main))
    return (
        f"none of the {len(scenes)} items found for {query} can be used: "
        f"{', '.join(f'{n} {reason}' for reason, n in reasons.items())} (e.g. {example.item.id}: {example.unused}). "
        f"To fix it, {remedies[main]}"
    )


def report_decisions(scenes: list[ItemDecision]) -> None:
    """Log the decisions, and warn of doubtful ones."""
    used = [s for s in scenes if s.unused is None]
    log.info("%d of %d items used", len(used), len(scenes))
    for scene in scenes:
        if scene.unused is not None:
            log.info("item %s not used: %s", scene.item.id, scene.unused)
    for (offset, decided_by), n in Counter((s.offset, s.decided_by) for s in used).items():
        log.info("%d items: %g DN subtracted, by %s", n, offset, decided_by)
    for (offset, doubt), n in Counter((s.offset, s.doubt) for s in used if s.doubt).items():
        ids = [s.item.id for s in used if s.doubt == doubt]
        warn(
            f"{n} items ({', '.join(ids[:3])}{', …' if n > 3 else ''}): {doubt}, and {offset:g} DN are subtracted. If "
            f"that is wrong, pass harmonize=True ({S2.offset}), False, or a number"
        )

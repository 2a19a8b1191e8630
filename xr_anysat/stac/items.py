"""Decide about each STAC item of Sentinel-2 from its own metadata.

The decisions are its bands, its baseline, the +1000 offset, and whether it is used, by place, time, clouds and one
processing per acquisition. Only metadata are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from xr_anysat.cube.reading import band_name
from xr_anysat.errors import CatalogError
from xr_anysat.shared.sensor import S2
from xr_anysat.stac.addresses import is_loopback, is_remote

if TYPE_CHECKING:
    import pystac
    from odc.geo.geobox import GeoBox
    from odc.geo.geom import Geometry

DateRange = tuple[pd.Timestamp, pd.Timestamp] | None

OFFSET_BASELINE = 4.0
"""Products of this processing baseline and later have the offset of the sensor added."""

OFFSET_COLLECTIONS = ("sentinel-2-c1-l2a",)
"""Collections with products of ESA's Collection 1 only, all of baseline 05.00 or later."""

SAME_ACQUISITION = pd.Timedelta(minutes=30)
"""Items of one platform and granule that are no further apart show the same acquisition. Some catalogs give the time of
the granule, others the start of its data take, minutes before; the next orbit is 100 minutes later."""


@dataclass(frozen=True)
class ItemDecision:
    """An item and the decisions about it.

    Attributes
    ----------
    item : pystac.Item
        The item as returned by the catalog.
    time : Timestamp
        Time of the acquisition, UTC without a time zone.
    assets : mapping of str to str
        Key of the asset for each band (``B2`` …), for ``SCL`` and for each extra asset.
    baseline : float or None
        Processing baseline, 5.11 for 05.11.
    offset : float
        Digital numbers to subtract.
    decided_by : str
        The metadata field that decided the offset.
    doubt : str or None
        Contradiction in the metadata about that decision.
    unused : str or None
        Why the item is not used: one or two words, a colon, details.
    trusted : bool
        Whether its assets may be local files, in any format that GDAL reads.
    """

    item: pystac.Item
    time: pd.Timestamp
    assets: Mapping[str, str]
    baseline: float | None
    offset: float
    decided_by: str
    doubt: str | None = None
    unused: str | None = None
    trusted: bool = True

    def record(self) -> dict[str, Any]:
        """Return the entry of ``attrs["items"]``."""
        return {
            "id": self.item.id,
            "datetime": self.time.isoformat() + "Z",
            "baseline": None if self.baseline is None else f"{self.baseline:05.2f}",
            "offset": self.offset,
            "decided_by": self.decided_by,
            "used": self.unused or True,
        }

    def href(self, name: str) -> str:
        """Return the address of the asset of a band."""
        asset = self.item.assets[self.assets[name]]
        try:
            return asset.get_absolute_href() or asset.href
        except ValueError:  # not a URL
            return asset.href


def judge_item(
    item: pystac.Item,
    harmonize: str | bool | float,
    *,
    needs_scl: bool,
    extra: Iterable[str],
    catalog: str | None = None,
) -> ItemDecision:
    """Decide about an item from its metadata; `select_scenes` decides about its place, time and clouds.

    `catalog` is the URL of the API that listed the item; None for items that the user passed.
    """
    stamp = item.datetime or item.common_metadata.start_datetime
    if stamp is None:
        raise CatalogError(f"item {item.id!r} has no datetime: remove it from the items that you pass")
    when = pd.Timestamp(stamp)
    when = when.tz_convert(None) if when.tz else when
    assets = _band_assets(item)
    missing = [b for b in S2.bands if b not in assets]
    if needs_scl and "SCL" not in assets:
        missing.append("SCL (mask=None does without)")
    for name in extra:
        if name in item.assets:
            assets[name] = name
        else:
            missing.append(name)
    baseline = _baseline(item)
    if harmonize == "auto":
        offset, decided_by, doubt = _offset(item, baseline, assets)
    else:
        switch = isinstance(harmonize, bool | np.bool_)
        offset = float(S2.offset * harmonize) if switch else float(harmonize)
        decided_by, doubt = "harmonize=", None
    unused = f"lacks assets: {', '.join(missing)}" if missing else None
    trusted = catalog is None or is_loopback(catalog)
    decision = ItemDecision(item, when, assets, baseline, offset, decided_by, doubt, unused, trusted)
    if not trusted and unused is None:
        assert catalog is not None
        for name, key in assets.items():
            href = decision.href(name)
            if not is_remote(href, catalog):
                return replace(decision, unused=f"unsafe address: asset {key!r} is {href[:80]!r}")
    return decision


def _band_assets(item: pystac.Item) -> dict[str, str]:
    """Return the key of the asset of each band and of SCL, in the finest resolution.

    Earth Search has ``red``, the Planetary Computer ``B04``, CDSE ``B04_10m`` and coarser copies. JPEG
    2000 copies of GeoTIFFs (``red-jp2``) are ignored.
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
    """Return the processing baseline of an item, from its properties or from the name of its product."""
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
    """Return the offsets, in digital numbers, that the assets of the bands declare."""
    found: set[float] = set()
    for name in S2.bands:
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
    """Return the digital numbers to subtract from the pixels of an item, the field that decides, and any doubt.

    The date never decides: baseline 05.00 exists for scenes since 2015. These fields decide, in this order: the flag
    by which Earth Search v1 declares that it has removed the offset (its ``raster:bands`` still contain -0.1, which is
    no contradiction there); the processing baseline; the offset that the assets declare; the collection.
    """
    properties = item.properties
    declared = _declared_offsets(item, assets)
    flag = properties.get("earthsearch:boa_offset_applied")
    if flag is True:
        return 0.0, "earthsearch:boa_offset_applied", None
    if baseline is not None:
        offset = float(S2.offset if baseline >= OFFSET_BASELINE else 0)
        key = next((k for k in _BASELINE_KEYS if properties.get(k)), "product name")
        if flag is False:
            return offset, "earthsearch:boa_offset_applied", None
        doubt = None
        if declared and declared != {offset}:
            doubt = f"{key} is {baseline:05.2f}, but the assets declare {_listed(declared)} DN; the baseline decides"
        return offset, key, doubt
    if len(declared) == 1:
        return declared.pop(), "raster:bands offset", None
    if item.collection_id in OFFSET_COLLECTIONS:
        return float(S2.offset), "collection", None
    doubt = f"neither a processing baseline nor one offset of all bands is given ({_listed(declared)})"
    return 0.0, "nothing", doubt


def _listed(values: Iterable[float]) -> str:
    return ", ".join(f"{v:g}" for v in sorted(values)) or "none"


def footprint_of(item: pystac.Item) -> Geometry | None:
    """Return the area of an item, in degrees; None if unknown, or if it crosses the antimeridian."""
    from odc.geo.geom import Geometry, box

    shape = Geometry(item.geometry, "EPSG:4326") if item.geometry else None
    if shape is None and item.bbox:
        half = len(item.bbox) // 2  # with two or three dimensions
        west, south, east, north = *item.bbox[:2], *item.bbox[half : half + 2]
        shape = box(west, south, east, north, "EPSG:4326")
    if shape is None:
        return None
    bounds = shape.boundingbox
    return shape if 0 <= bounds.right - bounds.left <= 180 else None


def select_scenes(
    scenes: list[ItemDecision], geobox: GeoBox, period: DateRange, max_cloud: float | None
) -> list[ItemDecision]:
    """Return the scenes, with a reason for each that is not used: place, time, older processing, clouds."""
    area = lonlat(geobox)

    def check_place_and_time(scene: ItemDecision) -> str | None:
        footprint = footprint_of(scene.item)
        if footprint is not None and not footprint.intersects(area):
            return "outside the area"
        if period is not None and not period[0] <= scene.time < period[1]:
            return "outside the period"
        return scene.unused

    def check_clouds(scene: ItemDecision) -> str | None:
        share = scene.item.properties.get("eo:cloud_cover")
        if scene.unused is None and max_cloud is not None and share is not None and share > max_cloud:
            return f"clouds: {share:.1f} % > {max_cloud:g} %"
        return scene.unused

    scenes = _keep_newest([replace(s, unused=check_place_and_time(s)) for s in scenes])
    return [replace(s, unused=check_clouds(s)) for s in scenes]


def _keep_newest(scenes: list[ItemDecision]) -> list[ItemDecision]:
    """Keep only the newest processing of each acquisition."""
    granules: dict[tuple[str, str], list[int]] = {}
    for i, scene in enumerate(scenes):
        platform, tile = _granule(scene)
        if scene.unused is None and tile:
            granules.setdefault((platform, tile), []).append(i)
    out = list(scenes)
    for same in granules.values():
        kept: list[int] = []
        for i in sorted(same, key=lambda j: _processing_order(scenes[j]), reverse=True):
            newer = next((j for j in kept if _same_acquisition(scenes[j], scenes[i])), None)
            if newer is None:
                kept.append(i)
            else:
                out[i] = replace(scenes[i], unused=f"older processing: of {scenes[newer].item.id}")
    return out


def _same_acquisition(new: ItemDecision, old: ItemDecision) -> bool:
    """Return whether two items of one granule show the same acquisition, and the newer covers the older.

    A data take received by two ground stations gives two products of one granule, each with a part of it.
    """
    if abs(new.time - old.time) > SAME_ACQUISITION:
        return False
    shapes = footprint_of(new.item), footprint_of(old.item)
    if shapes[0] is None or shapes[1] is None or shapes[1].area == 0:
        return True
    return bool((shapes[0] & shapes[1]).area > 0.5 * shapes[1].area)


def _granule(scene: ItemDecision) -> tuple[str, str]:
    """Return platform and MGRS granule, each "" if unknown."""
    p, name = scene.item.properties, f"{scene.item.properties.get('s2:product_uri', '')} {scene.item.id}"
    parts = [p.get(k) for k in ("mgrs:utm_zone", "mgrs:latitude_band", "mgrs:grid_square")]
    tile = p.get("s2:mgrs_tile") or p.get("grid:code") or "".join(str(v) for v in parts if v is not None)
    named = re.search(r"_T(\d{2}[A-Z]{3})_", name)
    tile = re.sub(r"^(MGRS-|T)", "", str(tile or (named[1] if named else ""))).lstrip("0").upper()
    satellite = re.match(r".*\bS(2[A-D])_", name)
    platform = str(p.get("platform") or (f"sentinel-{satellite[1]}" if satellite else ""))
    return re.sub(r"[^a-z0-9]", "", platform.lower()), tile


def _processing_order(scene: ItemDecision) -> tuple[Any, ...]:
    """Return a sort key by which newer processings come after older ones."""
    p = scene.item.properties
    keys = ("s2:generation_time", "processing:datetime", "updated", "created")
    stamps = (pd.to_datetime(p.get(k), utc=True, errors="coerce") for k in keys)
    processed = next((t.value for t in stamps if t is not None and not pd.isna(t)), 0)
    return (scene.baseline or 0.0, processed, scene.item.id, scene.item.collection_id or "")


def lonlat(geobox: GeoBox) -> Geometry:
    """Return the area of a grid, in degrees."""
    return geobox.extent.to_crs("EPSG:4326", resolution=1000)

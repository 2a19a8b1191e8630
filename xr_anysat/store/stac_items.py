"""STAC Items that describe stored embeddings and their model to catalogs.

The Item of an embedding cube links to an Item of the Machine Learning Model extension, which describes the model. Both
are derived only from the cube and the record in its attrs, so equal cubes have equal Items. Without a CRS an Item has
no geometry, and random weights are declared as such.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd
import xarray as xr

from xr_anysat.model.checkpoint import OFFICIAL
from xr_anysat.model.source import WeightsSource
from xr_anysat.model.spec import cell_side, channels
from xr_anysat.record import has_record, read_record
from xr_anysat.shared.grid import crs_code, grid_of
from xr_anysat.shared.sensor import S2
from xr_anysat.shared.text import safe_name
from xr_anysat.stac.catalogs import CATALOGS
from xr_anysat.store.codecs import CODECS, VALUES

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox

STAC_VERSION = "1.1.0"

PROJECTION = "https://stac-extensions.github.io/projection/v2.0.0/schema.json"

PROCESSING = "https://stac-extensions.github.io/processing/v1.2.0/schema.json"

FILE = "https://stac-extensions.github.io/file/v2.1.0/schema.json"

# the newest version that pystac reads
MLM = "https://stac-extensions.github.io/mlm/v1.4.0/schema.json"

PAPER = "https://arxiv.org/abs/2412.14123"

CODE = "https://github.com/gastruc/AnySat"

HUB = f"https://huggingface.co/{OFFICIAL.repo}"

SENTINEL_2 = "https://sentiwiki.copernicus.eu/web/sentinel-2"

FOOTPRINT_STEP = 5000.0
"""Distance between the vertices of a footprint, in meters. Its edges, which are straight in degrees, then deviate from
the true ones by less than a pixel."""


def stac_item(
    emb: xr.DataArray, *, item_id: str, href: str, media_type: str, codec: str | None
) -> dict[str, Any] | None:
    """Return the STAC Item of a stored embedding cube.

    Parameters
    ----------
    emb : DataArray, (D, y, x)
        The result of :func:`xr_anysat.embed`.
    item_id : str
        ``id`` of the Item.
    href : str
        Location of the embeddings, absolute or relative to the Item.
    media_type : str
        Media type of that location, ``"application/vnd.zarr; version=3"``.
    codec : {None, "float16", "int8"}
        Codec of the store.

    Returns
    -------
    dict or None
        JSON. Its link ``derived_from`` points to the Item of :func:`model_item`, which must be in the same
        folder as ``<id>.json``. Without a CRS the geometry is null. None for a cube without the record of
        :func:`xr_anysat.embed` in its attrs, because an Item must have a time.

    Examples
    --------
    >>> import numpy as np, pandas as pd, xarray as xr
    >>> import xr_anysat
    >>> cube = xr.DataArray(
    ...     np.full((2, 10, 4, 4), 1000, "uint16"), dims=("time", "band", "y", "x"),
    ...     coords={"time": pd.to_datetime(["2022-03-01", "2022-08-01"]), "band": list(xr_anysat.BANDS)},
    ... )
    >>> emb = cube.anysat.embed(2, period="2022", model="tiny", weights="random")
    >>> item = stac_item(emb, item_id="a", href="./a.zarr", media_type="application/vnd.zarr; version=3", codec=None)
    >>> item["properties"]["end_datetime"], item["links"][0]["href"]
    ('2022-12-31T23:59:59Z', './anysat-tiny-random-0.json')
    """
    if not has_record(emb):
        return None
    attrs, geobox = read_record(emb.attrs), grid_of(emb)
    weights = weights_facts(attrs)
    model = f"./{weights.id}.json"
    start, end = (pd.Timestamp(day) for day in attrs["temporal_window"].split("/"))
    decoding = CODECS[codec].formula
    properties = {
        "title": title_of(attrs),
        "description": (
            f"Sentinel-2 from {start.date()} to {end.date()} (exclusive), embedded by AnySat {attrs['model']} with "
            f"{weights.description}. {emb.sizes['D']} channels per cell; {decoding} no observation."
        ),
        "datetime": None,
        "start_datetime": f"{start.isoformat()}Z",
        "end_datetime": f"{(end - pd.Timedelta(seconds=1)).isoformat()}Z",  # STAC includes the end
        # best-practices.md of the extension mlm: a derived product names its model
        "processing:level": "L4",
        "processing:expression": {"format": "stac-mlm", "expression": model},
        "processing:software": attrs["versions"],
        "anysat:config": attrs["config"],
        "anysat:frame_dates": attrs["frame_dates"],
        "anysat:weights_sha256": attrs["weights_sha256"],
    }
    items = attrs.get("source", {}).get("items")
    if items is not None:
        properties["anysat:source_items"] = [entry["id"] for entry in items if entry["used"] is True]
    place: dict[str, Any] = {"geometry": None}
    extensions = [PROCESSING]
    if geobox is not None and geobox.crs is not None:
        geometry, bbox = _footprint(geobox)
        place = {"geometry": geometry, "bbox": bbox}
        extensions.append(PROJECTION)
        properties |= {"gsd": pixel_meters(attrs, geobox), "proj:code": None, **crs_members(geobox)}
        properties |= {f"proj:{key}": value for key, value in grid_members(geobox).items()}
    derived = {"rel": "derived_from", "href": model, "type": "application/geo+json", "title": weights.name}
    return {
        "type": "Feature",
        "stac_version": STAC_VERSION,
        "stac_extensions": extensions,  # not mlm, whose schema wants Items that are models
        "id": item_id,
        **place,
        "properties": properties,
        "links": [
            {**derived, "mlm:name": weights.name},
            {"rel": "store", "href": href, "type": media_type},
        ],
        "assets": {
            "embeddings": {
                "href": href,
                "type": media_type,
                "title": title_of(attrs),
                "roles": ["data"],
                "data_type": str(CODECS[codec].dtypes(emb.dtype)[VALUES]),
            }
        },
    }


def model_item(emb: xr.DataArray) -> dict[str, Any] | None:
    """Return the STAC Item, with the Machine Learning Model extension, of the model of an embedding cube.

    Parameters
    ----------
    emb : DataArray, (D, y, x)
        The result of :func:`xr_anysat.embed`.

    Returns
    -------
    dict or None
        JSON, the same for all cubes of the same weights. ``mlm:pretrained`` is true for the published
        weights, false for random ones, and absent for the user's own. None for a cube without a record.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> model_item(xr.DataArray(np.ones((4, 2, 3)), dims=("D", "y", "x"))) is None
    True
    """
    if not has_record(emb):
        return None
    attrs = read_record(emb.attrs)
    size, weights = attrs["model"], weights_facts(attrs)
    bands = [{"name": band} for band in S2.bands]
    model = {**weights.assets["model"], "bands": bands}  # STAC expects the bands here, mlm in the properties
    # what vectors can be used for without a further model
    tasks = [] if weights.random else ["similarity-search"]
    frames = _tensor(batch=-1, time=-1, bands=len(S2.bands), height=-1, width=-1)
    grid = {"height": -1, "width": -1}
    outputs = {
        kind: _tensor(batch=-1, **({} if kind == "tile" else grid), embedding=channels(size, kind))
        for kind in ("patch", "dense", "local", "tile")
    }
    return {
        "type": "Feature",
        "stac_version": STAC_VERSION,
        "stac_extensions": [MLM, FILE] if "file:checksum" in model else [MLM],
        "id": weights.id,
        "geometry": None,
        "properties": {
            "title": weights.name,
            "description": f"AnySat (Astruc, Gonthier, Mallet, Landrieu; CVPR 2025), with {weights.description}.",
            # best-practices.md of the extension: a model that applies at any time
            "datetime": None,
            "start_datetime": "1900-01-01T00:00:00Z",
            "end_datetime": "9999-12-31T23:59:59Z",
            "bands": bands,
            "mlm:name": weights.name,
            "mlm:architecture": "Vision Transformer",
            "mlm:tasks": tasks,
            "mlm:framework": "PyTorch",
            **weights.properties,
            "mlm:input": [
                {"name": S2.projector, "bands": list(S2.bands), "input": frames},
                {
                    "name": f"{S2.projector}_dates",
                    "bands": [],
                    "input": {**_tensor(batch=-1, time=-1), "data_type": "int64"},
                },
            ],
            "mlm:output": [{"name": k, "tasks": tasks, "result": v} for k, v in outputs.items()],
        },
        "links": [{"rel": "cite-as", "href": PAPER, "type": "text/html"}],
        "assets": {**weights.assets, "model": model},
    }


# ---------------------------------------------------------------------- the record


@dataclass(frozen=True)
class _Weights:
    """Facts about weights for the Item that describes them.

    Attributes
    ----------
    id, name : str
        Id and name of the Item. The extension mlm allows letters, digits, dots, hyphens and spaces in the name.
    description : str
        What the weights are, in words.
    url : str
        Reference for the weights.
    assets, properties : dict
        Assets and properties of the Item.
    random : bool
        Whether the weights are random, without learned meaning.
    """

    id: str
    name: str
    description: str
    url: str = PAPER
    # without published weights, the architecture is the model
    assets: dict[str, Any] = field(
        default_factory=lambda: {
            "model": {
                "href": CODE, "type": "text/html", "title": "The architecture",
                "roles": ["mlm:model", "mlm:source_code", "code"], "mlm:artifact_type": "torch.nn.Module",
            }
        }
    )  # fmt: skip
    properties: dict[str, Any] = field(default_factory=dict)
    random: bool = False


def weights_facts(attrs: dict[Any, Any]) -> _Weights:
    """Return the facts about the weights of a record."""
    size, source, sha256 = attrs["model"], attrs["weights"], attrs["weights_sha256"]

    def item_id(kind: str) -> str:
        return safe_name(f"anysat-{size}-{kind}")  # names a file, and the record may come from anybody

    parsed = WeightsSource.parse(source)
    hashed = OFFICIAL.has(sha256)
    if hashed or parsed.kind == "official":
        asset = {
            "href": f"{HUB}/resolve/main/{OFFICIAL.filename}",
            "type": "application/octet-stream; framework=pytorch",
            "title": "The published weights", "roles": ["mlm:model", "mlm:weights"],
            "mlm:artifact_type": "torch.save",
        }  # fmt: skip
        if hashed:
            asset["file:checksum"] = f"1220{sha256}"  # a multihash: sha2-256, 32 bytes
        return _Weights(
            item_id(OFFICIAL.sha256_prefix), f"AnySat {size}", "the published weights", HUB,
            {"model": asset, "source_code": {"href": CODE, "type": "text/html", "roles": ["mlm:source_code", "code"]}},
            {"license": "MIT", "mlm:pretrained": True, "mlm:pretrained_source": "GeoPlex"},
        )  # fmt: skip
    if parsed.kind == "random":
        description = f"random weights (seed {parsed.value}), which carry no learned meaning"
        training = {"mlm:pretrained": False, "mlm:pretrained_source": None}
        name = f"AnySat {size} with random weights of seed {parsed.value}"
        return _Weights(
            item_id(f"random-{parsed.value}"), name, description, properties=training, random=True
        )
    if parsed.kind == "module":
        description = "the weights of a module of the user, which are not recorded"
        return _Weights(
            item_id(f"module-{parsed.value[:8]}"), f"AnySat {size} with the weights of a module", description
        )
    description = f"the user's own weights, sha256 {sha256}"
    return _Weights(item_id(sha256[:8]), f"AnySat {size} with own weights {sha256[:8]}", description)


def title_of(attrs: dict[Any, Any]) -> str:
    """Return the title of an embedding for catalogs."""
    return f"AnySat {attrs['output']} embeddings"


def cell_pixels(attrs: dict[Any, Any]) -> int:
    """Return the side of a cell in pixels."""
    return cell_side(
        attrs["output"], side=int(attrs["patch_size_m"] // S2.pixel_size), tile=int(attrs["tile"])
    )


def pixel_meters(attrs: dict[Any, Any], geobox: GeoBox) -> float:
    """Return the side in meters of a pixel that the model saw: 10, unless ``resize=`` changed it."""
    return abs(float(geobox.resolution.x)) / cell_pixels(attrs)


def source_uris(attrs: dict[Any, Any]) -> list[str]:
    """Return URIs of the data that were embedded: the collections of the catalog, or the mission."""
    url = attrs.get("source", {}).get("catalog", "")
    if "://" not in url:
        return [SENTINEL_2]
    collections = [name for known in CATALOGS.values() if known.url == url for name in known.collections]
    return [f"{url}/collections/{name}" for name in collections] or [url]


def crs_members(geobox: GeoBox) -> dict[str, str]:
    """Return the CRS as WKT2, and its code if it has one."""
    assert geobox.crs is not None  # the callers check it
    code = crs_code(geobox.crs)
    named = {} if code is None else {"proj:code": code}
    return {**named, "proj:wkt2": geobox.crs.to_wkt()}


def grid_members(geobox: GeoBox) -> dict[str, list[float]]:
    """Return the members that ``spatial:`` of Zarr and ``proj:`` of STAC share."""
    return {
        "transform": [float(v) for v in geobox.transform[:6]],
        "shape": [int(n) for n in geobox.shape],
        "bbox": [float(v) for v in geobox.boundingbox.bbox],
    }


def _footprint(geobox: GeoBox) -> tuple[dict[str, Any], list[float]]:
    """Return geometry and bbox in longitude and latitude, cut at the antimeridian as RFC 7946 demands."""
    outline = geobox.extent.to_crs("EPSG:4326", resolution=FOOTPRINT_STEP, wrapdateline=True).geom
    edges = [part.exterior for part in getattr(outline, "geoms", [outline])]
    # counterclockwise; rounded to 1 cm, because further digits depend on the version of PROJ
    rings = [
        [[round(x, 7), round(y, 7)] for x, y in edge.coords[:: 1 if edge.is_ccw else -1]] for edge in edges
    ]
    lons = [[x for x, _ in ring] for ring in rings]
    lats = [y for ring in rings for _, y in ring]
    if len(rings) == 1:
        west, east = min(lons[0]), max(lons[0])
        return {"type": "Polygon", "coordinates": rings}, [west, min(lats), east, max(lats)]
    west, east = min(min(x) for x in lons if min(x) > 0), max(max(x) for x in lons if max(x) < 0)
    polygons = {"type": "MultiPolygon", "coordinates": [[ring] for ring in rings]}
    return polygons, [west, min(lats), east, max(lats)]


def _tensor(**sides: int) -> dict[str, Any]:
    """Return the description of a tensor: its sides by name, in order; -1 is any size."""
    return {"shape": list(sides.values()), "dim_order": list(sides), "data_type": "float32"}

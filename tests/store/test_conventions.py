"""What stands beside embeddings: Zarr conventions by their schemas, STAC Items as pystac reads them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pystac
import pytest
import xarray as xr
import zarr
from affine import Affine
from odc.geo.crs import CRS
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords
from pystac.extensions.file import FileExtension
from pystac.extensions.mlm import MLMExtension
from pystac.extensions.projection import ProjectionExtension
from shapely.geometry import Point, shape
from support.cubes import small_cube

import xr_anysat
from xr_anysat.store import stac_items as conventions
from xr_anysat.store.codecs import CODECS
from xr_anysat.store.stac_items import model_item, stac_item
from xr_anysat.store.zarr_conventions import group_attributes

TINY = {"model": "tiny", "weights": "random"}
ZARR = {"item_id": "area", "href": "./area.zarr", "media_type": "application/vnd.zarr; version=3"}
OFFICIAL_SHA256 = f"ce124652{'0' * 52}3d4f"


def embedding(**options: Any) -> xr.DataArray:
    crs = options.pop("crs", "EPSG:32632")
    cube = small_cube(height=26, width=26, crs=crs).chunk(time=3)
    made: xr.DataArray = cube.anysat.embed(**{"frames": 3, "tile": 8, "period": "2022", **TINY, **options})
    return made


def placed(crs: str, left: float, top: float, height: int, width: int, cell: float = 10) -> xr.DataArray:
    """An embedding, as far as its attrs go, on another grid."""
    grid = GeoBox((height, width), Affine(cell, 0, left, 0, -cell, top), crs)
    emb = xr.DataArray(
        np.zeros((1, height, width), "float32"), dims=("D", "y", "x"), coords=xr_coords(grid, dims=("y", "x"))
    )
    return emb.assign_attrs(embedding().attrs)


# ---------------------------------------------------------------------- checks, as the schemas have them


def is_uri(text: Any) -> bool:
    return isinstance(text, str) and urlsplit(text).scheme == "https" and bool(urlsplit(text).netloc)


def check_declared(attributes: dict[str, Any], namespaces: set[str]) -> None:
    """zarr-conventions-schema.json: what is declared, and nothing else has the members it names."""
    declared = attributes["zarr_conventions"]
    assert {entry["name"].rstrip(":") for entry in declared} == namespaces
    for entry in declared:
        assert entry.keys() == {"uuid", "schema_url", "spec_url", "name", "description"}
        assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", entry["uuid"])
        assert re.search(r"/refs/tags/v[0-9.]+/schema\.json$", entry["schema_url"])
        assert is_uri(entry["schema_url"])
        assert is_uri(entry["spec_url"])
    assert {key.partition(":")[0] for key in attributes if ":" in key} == namespaces


def check_geoemb(attributes: dict[str, Any]) -> None:
    """schema.json of geo-embeddings/embeddings-zarr-convention, tag v1."""
    members = {k.removeprefix("geoemb:"): v for k, v in attributes.items() if k.startswith("geoemb:")}
    assert members.keys() >= {"type", "dimensions", "model", "source_data", "data_type"}
    assert members.keys() <= {
        "type", "dimensions", "model", "source_data", "data_type", "gsd", "chip_layout", "quantization",
        "spatial_layout", "build_version", "benchmark",
    }  # fmt: skip
    assert members["type"] in ("pixel", "chip")
    assert isinstance(members["dimensions"], int)
    assert members["dimensions"] >= 1
    assert is_uri(members["model"])
    assert isinstance(members["source_data"], list)
    assert members["source_data"]
    assert all(map(is_uri, members["source_data"]))
    assert isinstance(members["data_type"], str)
    assert members.get("gsd", 1) > 0
    assert isinstance(members["build_version"], str)
    assert ("chip_layout" in members) == (members["type"] == "chip")
    if "chip_layout" in members:
        layout = members["chip_layout"]
        assert layout.keys() == {"layout_type", "chip_size", "stride"}
        assert layout["layout_type"] in ("regular_grid", "irregular")
        assert all(isinstance(n, int) and n >= 1 for n in layout["chip_size"] + layout["stride"])
        assert len(layout["chip_size"]) == len(layout["stride"]) == 2
    if "quantization" in members:
        how = members["quantization"]
        assert (
            {"method", "original_dtype"}
            <= how.keys()
            <= {"method", "original_dtype", "quantized_dtype", "scale"}
        )
        assert all(isinstance(how[k], str) for k in how.keys() - {"scale"})
        if "scale" in how:
            assert how["scale"].keys() == {"type", "array_name", "nodata"}
            assert how["scale"]["type"] == "array"
            assert isinstance(how["scale"]["nodata"], str | float)


def check_grid(attributes: dict[str, Any], emb: xr.DataArray) -> None:
    """schema.json of zarr-conventions/spatial and /proj, tags v0.1, and what they say is true."""
    geobox = emb.odc.geobox
    assert attributes["spatial:dimensions"] == ["y", "x"]
    assert attributes["spatial:shape"] == list(emb.shape[1:])
    assert attributes["spatial:registration"] == "pixel"
    assert attributes["spatial:bbox"] == list(geobox.boundingbox.bbox)
    a, b, c, d, e, f = attributes["spatial:transform"]
    assert (b, d) == (0, 0)
    np.testing.assert_allclose(c + a * (np.arange(emb.sizes["x"]) + 0.5), emb["x"], rtol=1e-12)
    np.testing.assert_allclose(f + e * (np.arange(emb.sizes["y"]) + 0.5), emb["y"], rtol=1e-12)
    if geobox.crs is None:
        assert not any(key.startswith("proj:") for key in attributes)
        return
    assert CRS(attributes["proj:wkt2"]) == geobox.crs
    assert attributes["proj:wkt2"].startswith("PROJCRS[")  # version 2
    if "proj:code" in attributes:
        assert re.fullmatch("[^:]+:[^:]+", attributes["proj:code"])
        assert CRS(attributes["proj:code"]) == geobox.crs


def check_stac(item: dict[str, Any]) -> pystac.Item:
    """The core schema, which pystac brings along, and reading and writing by pystac."""
    text = json.dumps(item, allow_nan=False)
    read = pystac.Item.from_dict(json.loads(text))
    assert read.to_dict(include_self_link=False, transform_hrefs=False) == item
    # extensions have their schemas on servers: they are left out
    pystac.Item.from_dict({**json.loads(text), "stac_extensions": []}).validate()
    return read


# ---------------------------------------------------------------------- Zarr


@pytest.mark.parametrize(
    ("options", "chip", "gsd"),
    [
        ({"patch_size": 20}, 2, 10),
        ({"patch_size": 10}, None, 10),
        ({"output": "tile"}, 8, 10),
        ({"output": "local", "patch_size": 20}, None, 10),
        ({"output": "dense", "patch_size": 20, "anchor": "grid"}, None, 10),
        ({"resize": 13, "patch_size": 10}, None, 20),
        ({"resize": 12, "patch_size": 20}, 2, 10 * 26 / 12),
    ],
)
@pytest.mark.parametrize(("codec", "dtype"), [(None, "float32"), ("float16", "float16"), ("int8", "int8")])
def test_group_attributes(
    options: dict[str, Any], chip: int | None, gsd: float, codec: str | None, dtype: str
) -> None:
    emb = embedding(**options)
    attributes = group_attributes(emb, data_type=dtype, quantization=CODECS[codec].quantization)
    assert json.loads(json.dumps(attributes, allow_nan=False)) == attributes
    check_declared(attributes, {"geoemb", "proj", "spatial"})
    check_geoemb(attributes)
    check_grid(attributes, emb)
    assert attributes["geoemb:dimensions"] == emb.sizes["D"]
    assert attributes["geoemb:data_type"] == dtype
    assert attributes["geoemb:gsd"] == pytest.approx(gsd)
    assert attributes.get("geoemb:chip_layout", {}).get("chip_size") == (chip and [chip, chip])
    assert ("geoemb:quantization" in attributes) == (codec is not None)
    assert attributes["geoemb:build_version"] == xr_anysat.__version__


def test_a_store_is_read_by_what_its_group_says(tmp_path: Path) -> None:
    emb = embedding(patch_size=20, anchor="grid")
    back = emb.anysat.to_zarr(tmp_path / "area.zarr", "int8")
    group = zarr.open_group(tmp_path / "area.zarr", mode="r")
    attributes = dict(group.attrs)
    check_declared(attributes, {"geoemb", "proj", "spatial"})
    check_geoemb(attributes)
    stored = xr.open_dataset(tmp_path / "area.zarr", engine="zarr", decode_coords="all")
    check_grid(attributes, stored["anysat"])
    assert attributes["spatial:shape"] == list(group["anysat"].shape[1:])
    assert str(group["anysat"].dtype) == attributes["geoemb:data_type"]
    scale = group[attributes["geoemb:quantization"]["scale"]["array_name"]][:]
    values = group["anysat"][:] * np.where(np.isfinite(scale), scale, np.nan)
    inside = [np.isin(stored[dim], back[dim]) for dim in ("y", "x")]
    np.testing.assert_array_equal(values[:, inside[0]][:, :, inside[1]], back.values)


def test_without_a_crs_no_place_is_made_up() -> None:
    bare = embedding(crs=None)
    attributes = group_attributes(bare, data_type="float32", quantization=None)
    check_declared(attributes, {"geoemb"})
    check_geoemb(attributes)
    assert "geoemb:gsd" not in attributes
    numbered = bare.assign_coords(y=[0.5 + i for i in range(26)], x=[7.0 + 2 * i for i in range(26)])
    attributes = group_attributes(numbered, data_type="float32", quantization=None)
    check_declared(attributes, {"geoemb", "spatial"})
    check_grid(attributes, numbered)
    for emb in (bare, numbered):
        item = stac_item(emb, codec=None, **ZARR)
        assert item is not None
        read = check_stac(item)
        assert read.geometry is None
        assert "bbox" not in item
        assert not any(key.startswith("proj:") for key in item["properties"])
        assert not ProjectionExtension.has_extension(read)


def test_a_crs_without_a_code_is_told_in_words() -> None:
    emb = placed("+proj=laea +lat_0=10 +lon_0=20 +datum=WGS84 +units=m", 1000, 2000, 5, 6)
    attributes = group_attributes(emb, data_type="float32", quantization=None)
    assert "proj:code" not in attributes
    check_grid(attributes, emb)
    item = stac_item(emb, codec=None, **ZARR)
    assert item is not None
    projection = ProjectionExtension.ext(check_stac(item))
    assert projection.code is None
    assert projection.wkt2 == attributes["proj:wkt2"]


def test_what_embed_did_not_make_is_not_told_of() -> None:
    emb = embedding()
    for missing in ("weights", "temporal_window"):
        other = emb.copy()
        other.attrs = {k: v for k, v in emb.attrs.items() if k != missing}
        attributes = group_attributes(other, data_type="float32", quantization=None)
        check_declared(attributes, {"proj", "spatial"})
        assert stac_item(other, codec=None, **ZARR) is None
        assert model_item(other) is None


@pytest.mark.parametrize(
    ("catalog", "wanted"),
    [
        (None, ["https://sentiwiki.copernicus.eu/web/sentinel-2"]),
        ("3 items given", ["https://sentiwiki.copernicus.eu/web/sentinel-2"]),
        ("https://stac.example.org/v1", ["https://stac.example.org/v1"]),
        (
            "https://stac.dataspace.copernicus.eu/v1",
            ["https://stac.dataspace.copernicus.eu/v1/collections/sentinel-2-l2a"],
        ),
        (
            "https://earth-search.aws.element84.com/v1",
            [
                "https://earth-search.aws.element84.com/v1/collections/sentinel-2-l2a",
                "https://earth-search.aws.element84.com/v1/collections/sentinel-2-c1-l2a",
            ],
        ),
    ],
)
def test_sources(catalog: str | None, wanted: list[str]) -> None:
    emb = embedding()
    if catalog is not None:
        used = {"A": True, "B": "cloudy: 90 %", "C": True}
        entries = [{"id": k, "datetime": "2022-03-01T10:20:30Z", "used": v} for k, v in used.items()]
        emb.attrs["source"] = json.dumps({"catalog": catalog, "items": json.dumps(entries)})
    attributes = group_attributes(emb, data_type="float32", quantization=None)
    check_geoemb(attributes)
    assert attributes["geoemb:source_data"] == wanted
    item = stac_item(emb, codec=None, **ZARR)
    assert item is not None
    check_stac(item)
    assert item["properties"].get("anysat:source_items") == (None if catalog is None else ["A", "C"])


# ---------------------------------------------------------------------- STAC


@pytest.mark.parametrize("codec", [None, "float16", "int8"])
def test_stac_item(codec: str | None) -> None:
    emb = embedding(patch_size=20, anchor="grid")
    item = stac_item(emb, codec=codec, **ZARR)
    assert item == stac_item(emb, codec=codec, **ZARR)
    assert item is not None
    read = check_stac(item)
    assert read.id == "area"
    assert read.datetime is None
    assert item["properties"]["start_datetime"] == "2022-01-01T00:00:00Z"
    assert item["properties"]["end_datetime"] == "2022-12-31T23:59:59Z"  # inclusive
    projection = ProjectionExtension.ext(read)
    assert projection.code == "EPSG:32632"
    assert projection.shape == list(emb.shape[1:])
    assert projection.transform == list(emb.odc.geobox.transform)[:6]
    assert projection.bbox == list(emb.odc.geobox.boundingbox.bbox)
    assert read.properties["gsd"] == 10
    assert read.properties["anysat:config"] == json.loads(emb.attrs["config"])
    assert read.properties["anysat:frame_dates"] == emb.attrs["frame_dates"]
    assert read.properties["anysat:weights_sha256"] == emb.attrs["weights_sha256"]
    assert read.properties["processing:software"]["xr_anysat"] == xr_anysat.__version__
    asset = read.assets["embeddings"]
    assert (asset.href, asset.media_type, asset.roles) == ("./area.zarr", ZARR["media_type"], ["data"])
    assert asset.extra_fields["data_type"] == (codec or "float32")
    assert ("anysat × scale" in read.properties["description"]) == (codec == "int8")
    store = read.get_single_link("store")
    assert store is not None
    assert (store.href, store.media_type) == (asset.href, asset.media_type)


@pytest.mark.parametrize("output", ["patch", "dense", "local", "tile"])
def test_the_item_leads_to_its_model(output: str, tmp_path: Path) -> None:
    """By pystac alone, from files: the way that `derived_from` is followed."""
    emb = embedding(output=output, patch_size=20)
    item, model = stac_item(emb, codec=None, **ZARR), model_item(emb)
    assert item is not None
    assert model is not None
    check_stac(model)
    (tmp_path / "area.stac.json").write_text(json.dumps(item))
    (tmp_path / f"{model['id']}.json").write_text(json.dumps(model))
    read = pystac.Item.from_file(tmp_path / "area.stac.json")
    (found,) = read.get_derived_from()
    assert found.id == model["id"]
    extension = MLMExtension.ext(found)
    (link,) = read.get_links("derived_from")
    assert link.extra_fields["mlm:name"] == extension.mlm_name
    assert re.fullmatch(r"[a-zA-Z][a-zA-Z0-9_.\-\s]+[a-zA-Z0-9]", extension.mlm_name)  # its schema's pattern
    expression = read.properties["processing:expression"]
    assert expression == {"format": "stac-mlm", "expression": item["links"][0]["href"]}
    names = [band["name"] for band in found.properties["bands"]]
    frames, dates = extension.input
    assert frames.bands == names == list(xr_anysat.BANDS)
    assert frames.input.shape[frames.input.dim_order.index("bands")] == 10
    assert dates.input.dim_order == ["batch", "time"]
    (made,) = [o for o in extension.output if o.name == output]
    assert made.result.shape[made.result.dim_order.index("embedding")] == emb.sizes["D"]
    assert len(made.result.shape) == len(made.result.dim_order)
    models = [a for a in found.assets.values() if "mlm:model" in a.roles]
    assert len(models) == 1
    assert models[0].extra_fields["mlm:artifact_type"]


WEIGHTS = {
    "official": {"model": "base", "weights": "official", "weights_sha256": OFFICIAL_SHA256},
    "not loaded": {"model": "base", "weights": "official", "weights_sha256": "not loaded yet"},
    "a copy": {"model": "base", "weights": "/data/copy.pth", "weights_sha256": OFFICIAL_SHA256},
    "random": {"model": "tiny", "weights": "random:7", "weights_sha256": "ab" * 32},
    "own": {"model": "small", "weights": "/data/mine.pth", "weights_sha256": "cd" * 32},
    "module": {"model": "tiny", "weights": "module:0123456789abcdef", "weights_sha256": "not loaded yet"},
}


@pytest.mark.parametrize(
    ("weights", "ident", "reference", "said", "pretrained"),
    [
        ("official", "anysat-base-ce124652", "https://huggingface.co/g-astruc/AnySat", "the published weights", True),
        ("not loaded", "anysat-base-ce124652", "https://huggingface.co/g-astruc/AnySat", "the published weights", True),
        ("a copy", "anysat-base-ce124652", "https://huggingface.co/g-astruc/AnySat", "the published weights", True),
        ("random", "anysat-tiny-random-7", conventions.PAPER, r"random weights \(seed 7\).*no learned meaning", False),
        ("own", "anysat-small-cdcdcdcd", conventions.PAPER, f"own weights, sha256 {'cd' * 32}", None),
        ("module", "anysat-tiny-module-01234567", conventions.PAPER, "a module .* not recorded", None),
    ],
)  # fmt: skip
def test_what_is_said_of_weights(
    weights: str, ident: str, reference: str, said: str, pretrained: bool | None
) -> None:
    emb = embedding().assign_attrs(WEIGHTS[weights])
    attributes = group_attributes(emb, data_type="float32", quantization=None)
    check_geoemb(attributes)
    assert attributes["geoemb:model"] == reference
    assert re.search(said, attributes["comment"])
    item, model = stac_item(emb, codec=None, **ZARR), model_item(emb)
    assert item is not None
    assert model is not None
    assert re.search(said, item["properties"]["description"])
    assert item["links"][0]["href"] == f"./{ident}.json"
    read = check_stac(model)
    assert read.id == ident
    assert re.search(said, read.properties["description"])
    extension = MLMExtension.ext(read)
    assert extension.pretrained == pretrained
    asset = read.assets["model"]
    published = pretrained is True
    assert ("huggingface.co" in json.dumps(model)) == published
    assert (read.properties.get("license") == "MIT") == published
    assert ("mlm:weights" in asset.roles) == published
    assert bool(extension.tasks) == (weights != "random")
    if published and weights != "not loaded":
        assert FileExtension.ext(asset).checksum == f"1220{OFFICIAL_SHA256}"
    else:
        assert not FileExtension.has_extension(read)


@pytest.mark.parametrize(
    ("crs", "left", "top", "height", "width", "cell"),
    [
        ("EPSG:32632", 600_000, 5_200_000, 40, 30, 20),
        ("EPSG:32632", 300_000, 9_300_000, 300, 300, 1000),  # far north, where parallels are bent most
        ("EPSG:32719", 600_000, 8_000_000, 20, 20, 640),
        ("EPSG:3035", 4_000_000, 3_600_000, 200, 300, 1000),
        ("EPSG:32660", 830_000, 1_000_000, 50, 50, 1000),  # over the antimeridian
        ("EPSG:32701", 166_000, 8_000_000, 60, 50, 1000),
    ],
)
def test_the_footprint_is_true(
    crs: str, left: float, top: float, height: int, width: int, cell: float
) -> None:
    emb = placed(crs, left, top, height, width, cell)
    item = stac_item(emb, codec=None, **ZARR)
    assert item is not None
    check_stac(item)
    outline, (west, south, east, north) = shape(item["geometry"]), item["bbox"]
    assert outline.is_valid
    parts = list(getattr(outline, "geoms", [outline]))
    assert all(part.exterior.is_ccw for part in parts)  # RFC 7946
    assert all(-180 <= part.bounds[0] <= part.bounds[2] <= 180 for part in parts)
    assert (west > east) == (len(parts) == 2)
    to_lonlat = emb.odc.geobox.crs.transformer_to_crs(CRS("EPSG:4326"))
    for inside, offset in ((True, 10), (False, -10)):  # meters
        xs = np.array([left + offset, left + width * cell / 2, left + width * cell - offset])
        ys = np.array([top - offset, top - height * cell / 2, top - height * cell + offset])
        rim = [(x, y) for x in xs for y in ys if x != xs[1] or y != ys[1]]
        for x, y in rim:
            lon, lat = to_lonlat(x, y)
            assert outline.covers(Point(lon, lat)) == inside, (x, y)
            if inside:
                assert south <= lat <= north
                assert (west <= lon <= east) if west < east else (lon >= west or lon <= east)


@pytest.mark.parametrize("frames", [1, 3])
def test_items_are_the_same_after_a_file(frames: int, tmp_path: Path) -> None:
    """NetCDF gives lists back as arrays, and a list of one as its item."""
    emb = embedding(frames=frames)
    emb.to_netcdf(tmp_path / "area.nc")
    with xr.open_dataarray(tmp_path / "area.nc", decode_coords="all") as back:
        assert stac_item(back, codec=None, **ZARR) == stac_item(emb, codec=None, **ZARR)
        assert json.dumps(model_item(back)) == json.dumps(model_item(emb))
        of_file = group_attributes(back, data_type="float32", quantization=None)
    assert json.dumps(of_file) == json.dumps(group_attributes(emb, data_type="float32", quantization=None))

"""`open_s2` against a real STAC API, a server that fails on purpose, and files whose every pixel is known."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import pickle
import warnings
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dask
import numpy as np
import pandas as pd
import pystac
import pytest
import rasterio
import xarray as xr
from odc.geo.geom import box
from rasterio.transform import from_origin
from rasterio.warp import transform_bounds
from support.cubes import BANDS
from support.paths import SHARED
from support.stac_servers import Fault, FaultyServer, stac_api

import xr_anysat
from xr_anysat.demo.scene import make_scene
from xr_anysat.errors import AnySatError, AnySatWarning, CatalogError, OptionError, ReadError
from xr_anysat.stac import catalogs
from xr_anysat.stac import items as stac_items
from xr_anysat.stac import loading as item_loading
from xr_anysat.stac import reader as item_reader
from xr_anysat.stac import search as stac
from xr_anysat.stac.search import open_s2

needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not here")

EARTH_SEARCH = "blue green red rededge1 rededge2 rededge3 nir nir08 swir16 swir22 scl"
PLANETARY = "B02 B03 B04 B05 B06 B07 B08 B8A B11 B12 SCL"
CDSE = "B02_10m B03_10m B04_10m B05_20m B06_20m B07_20m B08_10m B8A_20m B11_20m B12_20m SCL_20m"

ORIGIN = (600_000, 4_900_020)
DAY = datetime(2022, 6, 1, 10, 50, tzinfo=UTC)


def write(path, values, *, origin=ORIGIN, epsg=32631, pixel=10, **profile):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.asarray(values)
    profile = {
        "driver": "GTiff", "height": values.shape[0], "width": values.shape[1], "count": 1, "dtype": values.dtype,
        "crs": f"EPSG:{epsg}", "transform": from_origin(*origin, pixel, pixel), "nodata": 0,
        "tiled": True, "blockxsize": 64, "blockysize": 64, **profile,
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as file:
        file.write(values, 1)


def make_item(
    folder, name, *, n=24, time=DAY, dn=1000, scl=4, origin=ORIGIN, epsg=32631, keys=EARTH_SEARCH, base=None,
    extra=None, **properties,
):  # fmt: skip
    """An item of one granule whose band b has `dn` + b at 10 m, and its files; `base` is the URL of the folder."""
    dn, scl = np.broadcast_to(dn, (n, n)), np.broadcast_to(scl, (n // 2, n // 2)).astype("uint8")
    west, south, east, north = transform_bounds(
        epsg, 4326, origin[0], origin[1] - 10 * n, origin[0] + 10 * n, origin[1]
    )
    item = pystac.Item(
        name, box(west, south, east, north, "EPSG:4326").json, [west, south, east, north], time,
        {"platform": "sentinel-2a", "s2:processing_baseline": "03.01", "eo:cloud_cover": 5, "proj:epsg": epsg,
         "grid:code": "MGRS-31TFK", **properties},
    )  # fmt: skip
    images = {
        key: (np.where(dn > 0, dn + i, 0).astype("uint16"), 10) for i, key in enumerate(keys.split()[:10])
    }
    images[keys.split()[10]] = (scl, 20)
    for key, values in (extra or {}).items():
        images[key] = (np.broadcast_to(values, (n, n)).astype("uint8"), 10)
    for key, (values, pixel) in images.items():
        path = folder / name / f"{key}.tif"
        write(path, values, origin=origin, epsg=epsg, pixel=pixel)
        item.add_asset(key, pystac.Asset(f"{base}/{name}/{key}.tif" if base else path.as_uri()))
    return item


def bare_item(name="x", *, keys=EARTH_SEARCH, time=DAY, collection=None, offset=None, **properties):
    """An item without files, of the granule of `make_item`."""
    item = pystac.Item(name, None, None, time, {"eo:cloud_cover": 5, **properties}, collection=collection)
    for key in keys.split():
        fields = {} if offset is None else {"raster:bands": [{"scale": 1e-4, "offset": offset}]}
        item.add_asset(key, pystac.Asset(f"/nowhere/{name}/{key}.tif", extra_fields=fields))
    return item


AREA = {"point": (4.2538, 44.2455), "buffer_m": 120}  # the middle of the granule above, nearly


def area_of(n=24, origin=ORIGIN, epsg=32631):
    """The granule of n pixels itself, pixel by pixel."""
    middle = rasterio.warp.transform(f"EPSG:{epsg}", "EPSG:4326", [origin[0] + 5 * n], [origin[1] - 5 * n])
    return {"point": (middle[0][0], middle[1][0]), "buffer_m": 5 * n, "crs": epsg}


def said(cube):
    return {entry["id"]: entry for entry in json.loads(cube.attrs["items"])}


def no_compute(*_args, **_kwargs):
    raise AssertionError("something was computed")


@pytest.fixture
def hasty(monkeypatch):
    """Little patience, so that a test of it is short."""
    monkeypatch.setattr(catalogs, "TIMEOUT", 1.0)
    monkeypatch.setattr(catalogs, "TRIES", 2)
    monkeypatch.setattr(catalogs, "WAIT", 0.02)
    monkeypatch.setattr(catalogs, "MAX_WAIT", 0.1)


def shared_items(*patterns):
    files = sorted(f for p in patterns for f in SHARED.glob(p))
    return [pystac.Item.from_file(f) for f in files]


def absolute(item):
    """The item with ``file://`` hrefs, which are the only ones that rustac leaves alone."""
    folder = Path(item.get_self_href()).parent
    for asset in item.assets.values():
        if "://" not in asset.href:
            asset.href = (folder / asset.href).resolve().as_uri()
    item.clear_links()
    return item


# --- a real STAC API ----------------------------------------------------------------------------


@needs_shared
@pytest.mark.parametrize("name", ["pc", "es_c1", "cdse"])
def test_synth_from_search_to_embedding(tmp_path, name):
    """The same ground behind three catalogs' items, half of it with the offset in the pixels."""
    items = list(pystac.ItemCollection.from_file(SHARED / "synth" / f"{name}.json"))
    for item in items:
        item.set_self_href(str(SHARED / "synth" / "item.json"))
    with stac_api(tmp_path, [absolute(i) for i in items]) as url:
        query = {"catalog": url, "bbox": tuple(items[0].bbox), "max_cloud": None, "crs": 32631}
        if name == "pc":  # declares nothing in its assets
            cube = open_s2(datetime=("2021-12-01", "2022-03-01"), **query)
        else:
            with pytest.warns(AnySatWarning, match=r"2 items .* 03\.01, but the assets declare 1000 DN"):
                cube = open_s2(datetime=("2021-12-01", "2022-03-01"), **query)
        later = open_s2(datetime="2022-02", **query)
    assert later.sizes["time"] == 1
    assert list(later.time.dt.strftime("%Y-%m-%d").values) == ["2022-02-19"]
    assert [e["offset"] for e in said(cube).values()] == [0, 0, 1000, 1000]
    field = "processing:version" if name == "cdse" else "s2:processing_baseline"
    assert {e["decided_by"] for e in said(cube).values()} == {field}
    loaded = cube.compute()
    assert loaded.min(["y", "x"]).sel(band="B2").values.tolist() == [300, 310, 320, 330]
    assert loaded.min(["y", "x"]).sel(band="B5").values.tolist() == [1200, 1210, 1220, 1230]
    assert np.isnan(loaded).any(["time", "band", "y", "x"])
    frames = cube.anysat.frames(3)
    assert json.loads(frames.attrs["anysat_frames"])["period"] == "2021-12-01/2022-03-01"
    assert frames.n_obs.values.tolist() == [2, 2]
    embedding = frames.anysat.embed(frames=None, model="tiny", weights="random", norm="pastis")
    assert np.isfinite(embedding).mean() > 0.9


def completed(item):
    """An item of mapchete's crops with all ten bands, the lacking ones copies of those that are there."""
    for name, of in zip(
        EARTH_SEARCH.split(),
        ["blue", "green", "red", "red", "nir", "nir", "nir", "nir", "nir", "nir", "scl"],
        strict=True,
    ):
        if name not in item.assets:
            item.add_asset(name, item.assets[of].clone())
    return item


@pytest.mark.slow
@needs_shared
def test_real_granules_of_three_passes(tmp_path):
    items = [completed(absolute(i)) for i in shared_items("scenes/mapchete_33TW/*/item.json")]
    assert len(items) == 6
    with stac_api(tmp_path, items) as url:
        # where the two granules overlap, and beyond it on either side
        query = {
            "bbox": (15.84, 46.02, 15.87, 46.08),
            "datetime": "2023-08",
            "max_cloud": None,
            "catalog": url,
        }
        cube = open_s2(**query)
        clear = open_s2(**{**query, "max_cloud": 30})
    assert cube.sizes["time"] == 3
    assert cube.odc.crs.to_epsg() == 32633
    assert {(e["offset"], e["decided_by"]) for e in said(cube).values()} == {
        (0, "earthsearch:boa_offset_applied")
    }
    assert clear.sizes["time"] < 3
    assert all(e["used"] is True or e["used"].startswith("clouds: ") for e in said(clear).values())
    loaded = cube.compute()
    xr.testing.assert_identical(
        loaded.isel(time=[0]).drop_attrs(), cube.isel(time=[0]).drop_attrs().compute()
    )
    for i, day in enumerate(["20230810", "20230815", "20230820"]):
        each = [
            open_s2(catalog=[item], bbox=query["bbox"], max_cloud=None).compute()[0]
            for item in items
            if day in item.id
        ]
        first, second = sorted(each, key=lambda c: json.loads(c.attrs["items"])[0]["id"])
        np.testing.assert_array_equal(loaded[i], first.where(first.notnull(), second))
    # what rasterio alone finds where a pixel of the file (120 m) has its middle
    own = next(i for i in items if "33TWL_20230815" in i.id)
    alone = open_s2(catalog=[own], bbox=query["bbox"], max_cloud=None).sel(band="B4").compute()[0]
    with rasterio.open(own.assets["red"].href) as red:
        inside = box(*alone.odc.geobox.boundingbox.bbox, "EPSG:32633").boundingbox
        middles = [red.xy(i, j) for i in range(red.height) for j in range(red.width)]
        middles = [
            m for m in middles if inside.left < m[0] < inside.right and inside.bottom < m[1] < inside.top
        ]
        raw = np.array([v[0] for v in red.sample(middles)], float)
    x, y = (xr.DataArray(v, dims="point") for v in np.array(middles).T)
    got = alone.sel(x=x, y=y, method="nearest")
    assert got.notnull().sum() > 50
    assert float(abs(got / raw - 1).median()) < 0.03  # 5 m off the middle, on real ground
    assert np.corrcoef(got[got.notnull()], raw[got.notnull()])[0, 1] > 0.99
    embedding = clear.isel(y=slice(0, 24), x=slice(0, 24)).anysat.embed(
        model="tiny", weights="random", norm="pastis"
    )
    assert embedding.odc.crs.to_epsg() == 32633


# what is to be subtracted, and the field that says so
REAL = {
    "S2A_12RWT_20240106_0_L2A": (0, "earthsearch:boa_offset_applied", "05.10"),
    "S2A_32TMT_20200302_1_L2A": (0, "earthsearch:boa_offset_applied", "05.00"),
    "S2A_32TMT_20200302_0_L2A": (0, "earthsearch:boa_offset_applied", "02.14"),
    "S2A_29RKH_20200219_0_L2A": (0, "earthsearch:boa_offset_applied", "02.14"),
    "S2A_T13TDE_20240415T180048_L2A": (1000, "s2:processing_baseline", "05.10"),
    "S2A_MSIL2A_20230216T150721_R082_T19PHS_20230217T082924": (1000, "s2:processing_baseline", "04.00"),
    "S2A_MSIL2A_20240823T174901_R141_T13TDE_20240824T013055": (1000, "s2:processing_baseline", "05.11"),
    "S2A_MSIL2A_20200601T080611_R078_T35MNM_20201027T072253": (0, "s2:processing_baseline", "02.12"),
    "S2A_MSIL2A_20241107T113311_N0511_R080_T32VKR_20241107T123948": (1000, "processing:version", "05.11"),
    "S2A_MSIL2A_20200703T103031_N0500_R108_T32TMT_20230613T212700": (1000, "processing:version", "05.00"),
}


@pytest.mark.slow
@needs_shared
def test_real_items_of_four_catalogs(tmp_path, monkeypatch):
    """Every item there is through a search, and what was decided of it: metadata only, nothing is read."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    items = shared_items("stac/*/*.json", "stac/*/*/*.json")
    with stac_api(tmp_path, items) as url:
        found = {}
        for item in items:
            day = item.datetime.date()
            cube = open_s2(
                catalog=url, collections=[item.collection_id], bbox=tuple(item.bbox), max_cloud=None,
                datetime=(str(day), str(day + timedelta(days=1))),
            )  # fmt: skip
            found |= said(cube)
    assert set(found) == {i.id for i in items}
    for name, (offset, decided_by, baseline) in REAL.items():
        entry = found[name]
        assert (entry["offset"], entry["decided_by"], entry["baseline"]) == (offset, decided_by, baseline)
    for entry in found.values():
        assert entry["offset"] == (
            0 if entry["decided_by"].startswith("earthsearch") else 1000 * (entry["baseline"] > "04")
        )
        assert set(entry) == {"id", "datetime", "baseline", "offset", "decided_by", "used"}
    for day in ("20200302", "20200305"):
        assert found[f"S2A_32TMT_{day}_1_L2A"]["used"] is True
        assert found[f"S2A_32TMT_{day}_0_L2A"]["used"] == f"older processing: of S2A_32TMT_{day}_1_L2A"


@needs_shared
@pytest.mark.parametrize(
    ("pattern", "keys"),
    [
        ("earthsearch_v1", EARTH_SEARCH),
        ("earthsearch_c1", EARTH_SEARCH),
        ("planetary_computer", PLANETARY),
        ("cdse", CDSE),
    ],
)
def test_keys_of_real_items(pattern, keys):
    wanted = dict(zip((*BANDS, "SCL"), keys.split(), strict=True))
    for item in shared_items(f"stac/{pattern}/*.json"):
        assert stac_items._band_assets(item) == wanted


def test_a_search_of_many_pages(tmp_path):
    """More items than a page has: all of them, and those of the place and the time only."""
    items = [
        make_item(
            tmp_path, f"i{i:03}", n=8, time=DAY + timedelta(hours=6 * i), **{"grid:code": f"MGRS-31T{i}"}
        )
        for i in range(5)
    ]
    items += [
        bare_item(f"far{i:03}", time=DAY + timedelta(hours=i), **{"processing:version": "05.11"})
        for i in range(120)
    ]
    for item in items[5:]:
        item.geometry, item.bbox = items[0].geometry, items[0].bbox
    with stac_api(tmp_path, items) as url:
        cube = open_s2(**area_of(8), catalog=url, datetime=("2022-06-01", "2022-06-03"))
    assert len(said(cube)) == 5 + 38
    assert cube.sizes["time"] == 3  # of the sun: the last is past midnight there
    assert cube.attrs["catalog"] == url


# --- faults ------------------------------------------------------------------------------------


@pytest.fixture
def server():
    with FaultyServer() as running:
        yield running


def served(server, tmp_path, dates=3, **kw):
    """Items of as many days whose assets the server has."""
    items = []
    for i in range(dates):
        items.append(
            make_item(
                tmp_path, f"day{i}", base=server.url, time=DAY + timedelta(days=i), dn=1000 + 100 * i, **kw
            )
        )
    server.add(tmp_path)
    server.items = [i.to_dict(include_self_link=False) for i in items]
    return items


FIRST_HEAD = r"day1/red\.tif"


@pytest.mark.parametrize(
    "faults",
    [
        [Fault(429, retry_after=0), Fault(503)],
        [Fault(500)] * 2,
        [Fault(wait=1.3)],
        [Fault(), Fault(break_after=100)],  # the header's body breaks off
        [Fault(404)],
        [Fault(500)] * 4,  # more than GDAL tries by itself
    ],
    ids=["busy", "broken", "slow", "cut", "gone", "broken for long"],
)
def test_a_passing_fault_of_an_asset(server, tmp_path, hasty, faults):
    items = served(server, tmp_path)
    server.faults[FIRST_HEAD] = list(faults)
    cube = open_s2(**area_of(), catalog=items).compute()
    assert not server.faults[FIRST_HEAD]
    np.testing.assert_array_equal(cube.sel(band="B4").mean(["y", "x"]), [1002, 1102, 1202])
    assert cube.notnull().all()


LASTING = {
    "busy": lambda path, requested: Fault(429, retry_after=0),
    "broken": lambda path, requested: Fault(500),
    "gone": lambda path, requested: Fault(404),
    "gone after the header": lambda path, requested: (
        Fault(404) if requested and not requested.startswith("bytes=0-") else None
    ),
    "slow": lambda path, requested: Fault(wait=1.3),
    "cut": lambda path, requested: Fault(break_after=20),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LASTING)
def test_a_lasting_fault_of_an_asset(server, tmp_path, hasty, monkeypatch, name):
    """The error names item and asset, of one date among several; and the process is not marred by it."""
    monkeypatch.setattr(catalogs, "TIMEOUT", 0.4 if name == "slow" else 1.0)
    items = served(server, tmp_path, n=160)
    server.faults[FIRST_HEAD] = LASTING[name]
    cube = open_s2(**area_of(160), catalog=items)
    with pytest.raises(
        ReadError, match=r"asset 'red' of item 'day1' cannot be read: .*day1/red\.tif\)"
    ) as caught:
        cube.compute()
    assert "on_error='invalid'" in str(caught.value)
    assert cube.isel(time=[0, 2]).compute().notnull().all()
    server.faults.clear()
    assert cube.compute().notnull().all()


def test_a_truncated_asset(server, tmp_path, hasty):
    items = served(server, tmp_path, n=160)
    for name in ("/day1/red.tif", "/day2/scl.tif"):
        server.files[name] = server.files[name][: len(server.files[name]) * 2 // 3]
    cube = open_s2(**area_of(160), catalog=items)
    with pytest.raises(ReadError, match="asset 'red' of item 'day1'"):
        cube.isel(time=1).compute()
    with pytest.raises(ReadError, match="asset 'scl' of item 'day2'"):
        cube.isel(time=2).compute()
    # the part that is there is read all the same
    assert cube.isel(time=1, y=slice(0, 8), x=slice(0, 8)).chunk().sizes["y"] == 8


def test_unreadable_pixels_are_invalid_if_asked(server, tmp_path, hasty):
    """A fault that opening does not show: the item is missing, never zero, and a warning names it."""
    items = served(server, tmp_path, n=160)
    server.files["/day1/red.tif"] = server.files["/day1/red.tif"][:-20_000]
    cube = open_s2(**area_of(160), catalog=items, on_error="invalid")
    assert cube.attrs["on_error"] == "invalid"
    with pytest.warns(AnySatWarning, match="asset 'red' of item 'day1' cannot be read") as caught:
        loaded = cube.compute()
    assert sum(w.category is AnySatWarning for w in caught) == 1
    assert loaded.isel(time=1).isnull().all()
    assert loaded.isel(time=[0, 2]).notnull().all()


def test_items_that_cannot_be_opened_are_left_out_if_asked(server, tmp_path, hasty):
    items = served(server, tmp_path)
    server.faults[r"day0/scl"] = LASTING["gone"]
    server.faults[r"day2/swir22"] = LASTING["broken"]
    cube = open_s2(**area_of(), catalog=items, on_error="invalid")
    entries = said(cube)
    assert entries["day1"]["used"] is True
    assert entries["day0"]["used"].startswith("unreadable: asset 'scl' of item 'day0'")
    assert entries["day2"]["used"].startswith("unreadable: asset 'swir22' of item 'day2'")
    assert json.loads(cube.attrs["items_left_out"]) == {"unreadable": 2}
    assert cube.attrs["items_used"] == 1
    assert cube.compute().notnull().all()


def test_nothing_can_be_opened(server, tmp_path, hasty):
    items = served(server, tmp_path)
    server.files.clear()
    with pytest.raises(CatalogError, match=r"3 unreadable .*To fix it, try again"):
        open_s2(**area_of(), catalog=items, on_error="invalid")


def test_a_missing_mask_asset_is_not_a_clear_sky(server, tmp_path, hasty):
    items = served(server, tmp_path, dates=1, n=160, extra={"cloud": 10})
    server.files["/day0/cloud.tif"] = server.files["/day0/cloud.tif"][:-10_000]
    cube = open_s2(**area_of(160), catalog=items, mask=cloudy, mask_assets=["cloud"], on_error="invalid")
    with pytest.warns(AnySatWarning, match="asset 'cloud' of item 'day0'"):
        assert cube.compute().isnull().all()


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "threads"), [(1, 4), (3, 4), (6, 1)])
def test_workers_bound_the_reading(server, tmp_path, workers, threads):
    """However many threads the scheduler has: reading waits for servers, not for cores."""
    items = served(server, tmp_path, dates=2)
    server.faults[""] = lambda path, requested: Fault(wait=0.02)
    with xr_anysat.config.set(fetch_workers=workers):
        cube = open_s2(**area_of(), catalog=items, mask=None)
    cube.compute(scheduler="threads", num_workers=threads)
    assert server.busiest == workers


@pytest.mark.parametrize(
    "faults",
    [[Fault(429, retry_after=3600)], [Fault(502)] * 2, [Fault(wait=1.3)]],
    ids=["busy", "broken", "slow"],
)
@pytest.mark.parametrize("path", ["^/$", "^/search"])
def test_a_passing_fault_of_a_catalog(server, tmp_path, hasty, path, faults):
    """Each page is requested again, and sooner than a server demands that asks to wait an hour."""
    served(server, tmp_path, dates=5)
    server.page = 2
    server.faults[path] = list(faults)
    cube = open_s2(**area_of(), catalog=server.url)
    assert cube.sizes["time"] == 5
    assert not server.faults[path]


@pytest.mark.slow
@pytest.mark.parametrize("fault", [Fault(503), Fault(404), Fault(wait=1.3)], ids=["broken", "gone", "slow"])
def test_a_lasting_fault_of_a_catalog(server, tmp_path, hasty, fault):
    """Also on the second page: half a search is none."""
    served(server, tmp_path, dates=4)
    server.page = 2
    requested = []
    server.faults["^/search"] = lambda path, _: (
        requested.append(path) or (fault if len(requested) > 1 else None)
    )
    with pytest.raises(
        CatalogError, match=f"the catalog {server.url} could not be searched .* Try again later"
    ):
        open_s2(**area_of(), catalog=server.url)


def test_no_catalog_at_all(hasty):
    with pytest.raises(CatalogError, match=r"http://127\.0\.0\.1:9 could not be searched"):
        open_s2(**AREA, catalog="http://127.0.0.1:9")


# --- the offset --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "offset", "field"),
    [
        # Earth Search's own flag, whatever raster:bands say
        (bare_item(offset=-0.1, **{"earthsearch:boa_offset_applied": True, "s2:processing_baseline": "05.09"}),
         0, "earthsearch:boa_offset_applied"),
        (bare_item(**{"earthsearch:boa_offset_applied": False, "s2:processing_baseline": "05.09"}),
         1000, "earthsearch:boa_offset_applied"),
        (bare_item(**{"earthsearch:boa_offset_applied": False, "s2:processing_baseline": "02.14"}),
         0, "earthsearch:boa_offset_applied"),
        # not removed says nothing of whether there was one
        (bare_item(offset=-0.1, **{"earthsearch:boa_offset_applied": False}), 1000, "raster:bands offset"),
        # the baseline, never the date: 05.00 exists for 2020
        (bare_item(time=datetime(2020, 3, 2, tzinfo=UTC), **{"s2:processing_baseline": "05.00"}),
         1000, "s2:processing_baseline"),
        (bare_item(time=datetime(2022, 6, 2, tzinfo=UTC), **{"s2:processing_baseline": "03.01"}),
         0, "s2:processing_baseline"),
        (bare_item(**{"processing:version": "05.11"}), 1000, "processing:version"),
        (bare_item(**{"processing:version": "02.14"}), 0, "processing:version"),
        (bare_item(**{"s2:product_uri": "S2A_MSIL2A_20220601T105031_N0400_R051_T31TFK_20220601T170000.SAFE"}),
         1000, "product name"),
        (bare_item("S2B_MSIL2A_20200705T101559_N0214_R065_T32TMT_20200705T175912"), 0, "product name"),
        # what the assets declare, in STAC 1.0's and 1.1's words
        (bare_item(offset=-0.1), 1000, "raster:bands offset"),
        (bare_item(offset=0), 0, "raster:bands offset"),
        (bare_item(collection="sentinel-2-c1-l2a"), 1000, "collection"),
    ],
)  # fmt: skip
def test_what_decides_the_offset(item, offset, field):
    found = stac_items._offset(item, stac_items._baseline(item), stac_items._band_assets(item))
    assert found == (offset, field, None)


@pytest.mark.parametrize(
    "fields",
    [
        {"raster:offset": -0.1, "raster:scale": 0.0001},
        {"bands": [{"name": "B02", "raster:offset": -0.1}]},
        {"bands": [{"name": "B02", "offset": -1000, "scale": 1}]},
    ],
)
def test_offsets_in_other_words(fields):
    item = bare_item()
    for asset in item.assets.values():
        asset.extra_fields = fields
    assert stac_items._offset(item, None, stac_items._band_assets(item))[:2] == (1000, "raster:bands offset")


def test_contradictions_are_told_once_and_may_be_overridden(tmp_path):
    def item(i, baseline):
        made = make_item(
            tmp_path, f"i{i}", time=DAY + timedelta(days=i), dn=2000, **{"s2:processing_baseline": baseline}
        )
        for asset in made.assets.values():
            asset.extra_fields["raster:bands"] = [{"scale": 1e-4, "offset": -0.1}]
        return made

    items = [item(i, "03.01") for i in range(4)] + [item(4, "05.00")]
    with pytest.warns(AnySatWarning) as caught:
        cube = open_s2(**area_of(), catalog=items)
    (only,) = [w for w in caught if w.category is AnySatWarning]
    assert only.filename == __file__
    for part in ("4 items (i0, i1, i2, …)", "s2:processing_baseline is 03.01", "declare 1000 DN", "0 DN are subtracted",
                 "harmonize=True (1000)"):  # fmt: skip
        assert part in str(only.message)
    means = {h: open_s2(**area_of(), catalog=items, harmonize=h).sel(band="B2").mean(["y", "x"]).values.tolist()
             for h in (True, False, 300, np.True_)}  # fmt: skip
    assert cube.sel(band="B2").mean(["y", "x"]).values.tolist() == [2000] * 4 + [1000]
    assert means == {True: [1000] * 5, False: [2000] * 5, 300: [1700] * 5}
    again = open_s2(**area_of(), catalog=items, harmonize=300)
    assert {e["decided_by"] for e in said(again).values()} == {"harmonize="}
    assert {e["offset"] for e in said(again).values()} == {300}
    assert again.attrs["harmonize"] == "300"


def test_an_offset_that_nothing_tells(tmp_path):
    item = make_item(tmp_path, "x")
    del item.properties["s2:processing_baseline"]
    with pytest.warns(
        AnySatWarning, match=r"1 items \(x\): neither a processing baseline nor .* 0 DN are subtracted"
    ):
        cube = open_s2(**area_of(), catalog=[item])
    assert said(cube)["x"] == {
        "id": "x", "datetime": "2022-06-01T10:50:00Z", "baseline": None, "offset": 0.0,
        "decided_by": "nothing", "used": True,
    }  # fmt: skip


def test_doubts_about_items_that_are_not_used_are_not_told(tmp_path):
    cloudy_one = make_item(tmp_path, "b", time=DAY + timedelta(days=1), **{"eo:cloud_cover": 90})
    del cloudy_one.properties["s2:processing_baseline"]
    assert open_s2(**area_of(), catalog=[make_item(tmp_path, "a"), cloudy_one]).sizes["time"] == 1


def test_clipped_to_zero_is_data(tmp_path):
    """Darker than the offset is zero and valid; a zero with the offset still in is no data."""
    dn = np.full((24, 24), 1500)
    dn[0, :4], dn[1, :4] = 700, 0
    cube = open_s2(
        **area_of(), catalog=[make_item(tmp_path, "x", dn=dn, **{"s2:processing_baseline": "04.00"})]
    )
    blue = cube.sel(band="B2").compute()[0]
    assert (blue[0, :4] == 0).all()
    assert blue[1, :4].isnull().all()
    assert (blue[2:] == 500).all()
    frame = cube.anysat.frames(1)
    assert (frame.sel(band="B2")[0, 0, :4] == 0).all()


def test_zeros_of_a_removed_offset_are_data_where_scl_says_so(tmp_path):
    dn, scl = np.full((24, 24), 900), np.full((12, 12), 6)
    dn[:4, :8] = 0
    scl[:2, 2:4] = 0  # of the zeros, the right half
    item = make_item(tmp_path, "x", dn=dn, scl=scl, **{"earthsearch:boa_offset_applied": True})
    by_mask = {m: open_s2(**area_of(), catalog=[item], mask=m).compute()[0] for m in ("scl", None, nothing)}
    for mask in ("scl", nothing):
        assert (by_mask[mask][:, :4, :4] == 0).all()
    assert by_mask["scl"][:, :4, 4:8].isnull().all()
    assert by_mask[nothing][:, :4, 4:8].isnull().all()
    assert by_mask[None][:, :4, :8].isnull().all()
    for mask in by_mask:
        assert by_mask[mask][:, 4:].notnull().all()


# --- overlap, days, processings --------------------------------------------------------------------


def overlapping(tmp_path):
    """Three granules of a pass: two have holes and are cut, one is in the next zone."""
    a, b = np.full((24, 24), 2000), np.full((24, 24), 3000)
    a[:, 16:], b[:, :8], a[:4, :4], b[12:14, 10:12] = 0, 0, 0, 0
    scl_a = np.full((12, 12), 4)
    scl_a[6:8] = 9

    def granule(name, tile, seconds, **kw):
        when = DAY + timedelta(seconds=seconds)
        return make_item(
            tmp_path, name, time=when, **kw, **{"grid:code": tile, "s2:processing_baseline": "04.00"}
        )

    (x,), (y,) = rasterio.warp.transform("EPSG:32631", "EPSG:32632", [ORIGIN[0]], [ORIGIN[1]])
    beside = (round(x / 10) * 10 + 40, round(y / 10) * 10 + 100)
    return [
        granule("a", "MGRS-31TFK", 0, dn=a, scl=scl_a),
        granule("b", "MGRS-31TFL", 15, dn=b),
        granule("0", "MGRS-32TKQ", -15, dn=4000, n=48, epsg=32632, origin=beside),
    ]


def test_granules_are_mosaicked_by_what_is_valid(tmp_path):
    items = overlapping(tmp_path)
    cube = open_s2(**area_of(), catalog=items)
    assert cube.sizes["time"] == 1
    assert pd.Timestamp(cube.time.values[0]) == pd.Timestamp("2022-06-01T10:49:45")  # the first of them
    loaded = cube.compute()[0]
    alone = {i.id: open_s2(**area_of(), catalog=[i]).compute()[0] for i in items}
    assert alone["0"].notnull().any()  # first by name, last because it is interpolated
    expected = alone["a"].where(alone["a"].notnull(), alone["b"].where(alone["b"].notnull(), alone["0"]))
    np.testing.assert_array_equal(loaded, expected)
    # whole observations: all bands of a pixel are one item's
    missing = loaded.isnull()
    assert (missing.any("band") == missing.all("band")).all()
    spread = loaded.sel(band="B12") - loaded.sel(band="B2")
    assert np.nanmax(abs(spread - 9)) < 1e-2
    for order in ((2, 1, 0), (1, 0, 2), (0, 2, 1)):
        again = open_s2(**area_of(), catalog=[items[i] for i in order])
        np.testing.assert_array_equal(again.compute()[0], loaded)
        assert again.chunks == cube.chunks


def test_one_band_missing_is_an_observation_missing(tmp_path):
    first, second = (
        make_item(tmp_path, n, dn=d, **{"grid:code": f"MGRS-31T{n}", "s2:processing_baseline": "05.00"})
        for n, d in (("a", 2000), ("b", 3000))
    )
    path = Path(first.assets["nir"].href.removeprefix("file://"))
    values = np.full((24, 24), 2006, "uint16")
    values[:, :12] = 0
    write(path, values)
    loaded = open_s2(**area_of(), catalog=[first, second]).compute()[0]
    assert set(np.unique(loaded.sel(band="B2")[:, :12])) == {2000}
    assert set(np.unique(loaded.sel(band="B2")[:, 12:])) == {1000}
    assert open_s2(**area_of(), catalog=[first]).compute()[0][:, :, :12].isnull().all()


def test_days_are_solar(tmp_path):
    """A pass over 157° E at half past ten in the morning is one across midnight of UTC."""
    origin = (500_000, 6_000_000)
    near_midnight = datetime(2022, 6, 1, 0, 0, 5, tzinfo=UTC)
    items = [
        make_item(tmp_path, "a", time=near_midnight - timedelta(seconds=12), epsg=32657, origin=origin),
        make_item(
            tmp_path, "b", time=near_midnight, epsg=32657, origin=origin, **{"grid:code": "MGRS-57UXX"}
        ),
        make_item(tmp_path, "c", time=near_midnight + timedelta(days=1), epsg=32657, origin=origin),
    ]
    cube = open_s2(**area_of(origin=origin, epsg=32657), catalog=items, datetime="2022")
    assert [str(t)[:19] for t in cube.time.values] == ["2022-05-31T23:59:53", "2022-06-02T00:00:05"]
    # and the period is one of UTC, half open
    cube = open_s2(**area_of(origin=origin, epsg=32657), catalog=items, datetime="2022-06")
    assert said(cube)["a"]["used"] == "outside the period"
    assert cube.sizes["time"] == 2


def acquisition(
    name, minutes=0.0, *, made="2022-06-01T17:00:00Z", baseline="04.00", tile="31TFK", cloud=5, **kw
):
    item = bare_item(
        name, time=DAY + timedelta(minutes=minutes), collection=kw.pop("collection", None),
        **{"platform": "Sentinel-2A", "s2:mgrs_tile": tile, "s2:processing_baseline": baseline, "eo:cloud_cover": cloud,
           "s2:generation_time": made, **kw},
    )  # fmt: skip
    item.geometry = box(4.0, 44.0, 5.0, 45.0, "EPSG:4326").json
    return item


def used(items, **kw):
    return {k: e["used"] for k, e in said(open_s2(**AREA, catalog=items, **kw)).items()}


def test_an_acquisition_is_taken_once():
    old, new = acquisition("old", baseline="03.01"), acquisition("new", 0.0001, baseline="05.00")
    for items in ([old, new], [new, old]):
        assert used(items) == {"new": True, "old": "older processing: of new"}
    # among those of one baseline the last one made, whatever its name
    first, last = (
        acquisition("z", made="2022-06-01T17:00:00Z"),
        acquisition("a", made="2022-06-01T17:00:00.5Z"),
    )
    assert used([last, first]) == {"a": True, "z": "older processing: of a"}
    # two collections, one dated by the granule and one by the data take
    other = acquisition(
        "S2A_T31TFK", 8, baseline="05.00", collection="sentinel-2-c1-l2a", platform="sentinel-2a"
    )
    assert used([other, new, old])["old"].startswith("older processing: of ")
    assert sum(v is True for v in used([other, new, old]).values()) == 1


def test_what_is_not_one_acquisition():
    one = acquisition("one")
    assert set(used([one, acquisition("next orbit", 100)]).values()) == {True}
    assert set(used([one, acquisition("neighbor", 0.2, tile="31TFL")]).values()) == {True}
    assert set(used([one, acquisition("other", 1, platform="Sentinel-2B")]).values()) == {True}
    assert set(used([one, acquisition("tomorrow", 24 * 60)]).values()) == {True}
    # granules that do not tell where they are may be two
    assert set(used([acquisition("a", tile=None), acquisition("b", 0.2, tile=None)]).values()) == {True}
    # a data take in two parts, received by two ground stations
    north, south = acquisition("north"), acquisition("south", 0.3)
    north.geometry = box(4.0, 44.24, 5.0, 45.0, "EPSG:4326").json
    south.geometry = box(4.0, 44.0, 5.0, 44.25, "EPSG:4326").json
    assert set(used([north, south]).values()) == {True}


def test_clouds_of_the_newest_processing_count():
    items = [
        acquisition("old", baseline="03.01", cloud=10),
        acquisition("new", baseline="05.00", cloud=80),
        acquisition("x", 1500),
    ]
    assert used(items) == {"old": "older processing: of new", "new": "clouds: 80.0 % > 30 %", "x": True}


def test_granules_without_fields_are_known_by_their_names():
    scene = stac_items.judge_item(
        bare_item("S2B_MSIL2A_20200705T101559_N0500_R065_T32TMT_20230530T175912"),
        "auto",
        needs_scl=True,
        extra=(),
    )
    assert stac_items._granule(scene) == ("sentinel2b", "32TMT")


def test_ids_shared_by_collections(tmp_path):
    """Two collections may call different items the same: each is read as itself."""
    a, b = (
        make_item(tmp_path / "a", "same", dn=1000),
        make_item(tmp_path / "b", "same", dn=3000, time=DAY + timedelta(days=3)),
    )
    a.collection_id, b.collection_id = "one", "two"
    b.properties["s2:processing_baseline"] = "05.00"
    cube = open_s2(**area_of(), catalog=[a, b]).compute()
    assert cube.sel(band="B2").mean(["y", "x"]).values.tolist() == [1000, 2000]


# --- the grid ----------------------------------------------------------------------------------


def grid(**kw):
    given = {k: kw.get(k) for k in ("bbox", "intersects", "point", "buffer_m")}
    return stac._geobox(**given, crs=kw.get("crs", "utm"))


@pytest.mark.parametrize(
    ("lon", "lat", "epsg"),
    [
        (11.3, 46.5, 32632),
        (-58.4, -34.6, 32721),
        (179.5, -17.0, 32760),
        (-179.5, 65.0, 32601),
        (5.99, 0.01, 32631),
        (36.8, -1.3, 32737),
    ],
)
def test_the_zone_is_that_of_the_middle(lon, lat, epsg):
    for area in (
        {"point": (lon, lat), "buffer_m": 200},
        {"bbox": (lon - 0.005, lat - 0.005, lon + 0.005, lat + 0.005)},
    ):
        assert grid(**area).crs.to_epsg() == epsg


def test_a_wide_area_takes_the_zone_of_its_middle():
    assert grid(bbox=(5.0, 46.0, 6.4, 46.1)).crs.to_epsg() == 32631
    assert grid(bbox=(5.6, 46.0, 7.0, 46.1)).crs.to_epsg() == 32632


@pytest.mark.parametrize("crs", ["utm", 3035, "EPSG:32633", "epsg:2056"])
@pytest.mark.parametrize("bbox", [(11.2, 46.4, 11.3, 46.5), (8.47, 60.1, 8.6, 60.2)])
def test_the_grid_covers_the_area_on_multiples_of_10(bbox, crs):
    found = grid(bbox=bbox, crs=crs)
    assert found.resolution.xy == (10, -10)
    left, bottom, right, top = found.boundingbox.bbox
    assert all(v % 10 == 0 for v in (left, bottom, right, top))
    lon, lat = np.meshgrid(np.linspace(bbox[0], bbox[2], 50), np.linspace(bbox[1], bbox[3], 50))
    x, y = (
        np.array(v) for v in rasterio.warp.transform("EPSG:4326", str(found.crs), lon.ravel(), lat.ravel())
    )
    assert ((left <= x) & (x <= right) & (bottom <= y) & (y <= top)).all()
    for side, extreme in ((left, x.min()), (bottom, y.min()), (right, x.max()), (top, y.max())):
        assert abs(side - extreme) < 11  # and no more than that


@pytest.mark.parametrize(("buffer_m", "side"), [(120, 24), (1280, 256), (5, 1), (64, 13)])
def test_a_point_and_its_buffer_are_a_square(buffer_m, side):
    found = grid(point=(11.3, 46.5), buffer_m=buffer_m)
    assert found.shape == (side, side)
    (x,), (y,) = rasterio.warp.transform("EPSG:4326", str(found.crs), [11.3], [46.5])
    middle = found.boundingbox
    assert abs((middle.left + middle.right) / 2 - x) <= 10
    assert abs((middle.bottom + middle.top) / 2 - y) <= 10


class Shape:
    """What shapely's geometries are to others."""

    def __init__(self, geometry, crs=None):
        self.__geo_interface__ = geometry
        if crs:
            self.crs = crs


@pytest.mark.slow
def test_a_geometry_gives_its_bounding_box():
    bbox = (11.2, 46.4, 11.3, 46.5)
    plain = box(*bbox, "EPSG:4326")
    polygon = plain.json
    meters = plain.to_crs("EPSG:32632", resolution=0.001)
    for given in (
        polygon,
        {"type": "Feature", "geometry": polygon, "properties": {}},
        {
            "type": "FeatureCollection",
            "features": [{"type": "Feature", "geometry": polygon, "properties": {}}],
        },
        Shape(polygon),
        plain,
    ):
        assert grid(intersects=given) == grid(bbox=bbox)
    own_crs = grid(intersects=Shape(meters.json, "EPSG:32632"))
    assert own_crs.crs == grid(bbox=bbox).crs
    assert abs(own_crs.shape[0] - grid(bbox=bbox).shape[0]) <= 2


def test_pixels_that_are_there_are_got_back(tmp_path):
    """An area that is a raster's own extent gives its pixels, not one more on each side."""
    cube = open_s2(**area_of(), catalog=[make_item(tmp_path, "x")])
    assert cube.shape == (1, 10, 24, 24)
    assert (float(cube.x[0]), float(cube.y[0])) == (ORIGIN[0] + 5, ORIGIN[1] - 5)
    extent = box(ORIGIN[0], ORIGIN[1] - 240, ORIGIN[0] + 240, ORIGIN[1], "EPSG:32631")
    assert open_s2(intersects=extent, crs=32631, catalog=[make_item(tmp_path, "x")]).sizes["x"] <= 26


def test_20_m_bands_are_resampled(tmp_path):
    """Bilinear for reflectance, nearest for classes; missing pixels are left out."""
    item = make_item(tmp_path, "x", dn=3000, **{"s2:processing_baseline": "04.00"})
    ramp = np.tile(2000 + 100 * np.arange(12), (12, 1)).astype("uint16")
    ramp[:, 11] = 0
    write(Path(item.assets["swir16"].href.removeprefix("file://")), ramp, pixel=20)
    swir = open_s2(**area_of(), catalog=[item]).sel(band="B11").compute()[0, 0]
    np.testing.assert_allclose(swir[:22], [1000, *np.arange(1025, 2000, 50), 2000], atol=1e-2)
    assert swir[22:].isnull().all()


# --- masks -------------------------------------------------------------------------------------


def cloudy(dataset):
    return dataset["cloud"] > 40


def nothing(dataset):
    return xr.zeros_like(dataset["B2"], dtype=bool)


def bright(dataset):
    return dataset["B2"] > 1500


def classes(n=24):
    """SCL whose rows are the classes 0 to 11, at 20 m."""
    return np.repeat(np.arange(12)[:, None], n // 2, 1)


def test_scl_classes_are_left_out(tmp_path):
    item = make_item(tmp_path, "x", scl=classes())

    def rows(**kw):
        loaded = open_s2(**area_of(), catalog=[item], **kw).compute()[0]
        assert not (loaded == 0).any()
        missing = loaded.isnull().all(["band", "x"]).values
        assert (missing == loaded.isnull().any(["band", "x"]).values).all()
        return set(np.flatnonzero(missing[::2]))

    assert rows() == {0, 1, 3, 8, 9, 10}
    assert rows(scl_invalid=(0, 1, 3, 8, 9, 10, 11)) == {0, 1, 3, 8, 9, 10, 11}
    assert rows(scl_invalid=[9]) == {0, 9}
    assert rows(mask=None) == set()
    cube = open_s2(**area_of(), catalog=[item])
    assert cube.attrs["scl_invalid"] == "0 1 3 8 9 10"


def test_masked_stays_missing_to_the_end(tmp_path):
    scl = np.full((12, 12), 4)
    scl[:6] = 9
    items = [
        make_item(tmp_path, f"i{i}", scl=scl, time=DAY + timedelta(days=i), dn=500 + i) for i in range(2)
    ]
    cube = open_s2(**area_of(), catalog=items)
    frames = cube.anysat.frames(2)
    assert frames[:, :, :12].isnull().all()
    assert frames[:, :, 12:].notnull().all()
    embedding = cube.anysat.embed(frames=None, model="tiny", weights="random", norm="pastis").compute()
    missing = embedding.isnull().all("D").values
    assert missing[:12].all()
    assert not missing[12:].any()


@pytest.mark.slow
@pytest.mark.parametrize("meters", [10, 15, 20, 55])
def test_dilation_is_by_distance_and_sees_beyond_blocks_and_edges(tmp_path, meters):
    rng = np.random.default_rng(0)
    scl = np.where(rng.random((60, 60)) < 0.01, 9, 4)
    scl[:6, :6] = 0  # beyond the swath nothing grows
    item = make_item(tmp_path, "x", n=120, scl=scl)
    whole = open_s2(**area_of(120), catalog=[item], dilate_m=meters).compute()
    cloud = np.kron(scl == 9, np.ones((2, 2), bool))
    y, x = np.nonzero(cloud)
    rows, columns = np.mgrid[:120, :120]
    near = np.zeros((120, 120), bool)
    for i, j in zip(y, x, strict=True):
        near |= np.hypot(rows - i, columns - j) * 10 <= meters + 1e-9
    np.testing.assert_array_equal(whole[0, 0].isnull(), near | np.kron(scl == 0, np.ones((2, 2), bool)))
    pieces = open_s2(**area_of(120), catalog=[item], dilate_m=meters, chunks={"y": 17, "x": 50})
    assert pieces.chunks[2][0] == 17
    np.testing.assert_array_equal(pieces.compute(), whole)
    # a cloud just outside the area reaches in
    origin = (ORIGIN[0] + 300, ORIGIN[1] - 300)
    part = open_s2(**area_of(40, origin=origin), catalog=[item], dilate_m=meters).compute()
    np.testing.assert_array_equal(part, whole[:, :, 30:70, 30:70])


def test_a_mask_of_ones_own(tmp_path):
    cloud = np.zeros((24, 24))
    cloud[:5] = 80
    item = make_item(tmp_path, "x", scl=9, extra={"cloud": cloud})
    cube = open_s2(**area_of(), catalog=[item], mask=cloudy, mask_assets=["cloud"])
    assert cube.attrs["mask"] == f"{__name__}.cloudy"
    loaded = cube.compute()[0]
    assert loaded[:, :5].isnull().all()
    assert loaded[:, 5:].notnull().all()
    grown = open_s2(
        **area_of(), catalog=[item], mask=cloudy, mask_assets=["cloud"], dilate_m=30, chunks=7
    ).compute()[0]
    assert grown[:, :8].isnull().all()
    assert grown[:, 8:].notnull().all()
    assert said(cube)["x"]["used"] is True


def test_what_a_mask_of_ones_own_is_given(tmp_path):
    seen = []

    def look(dataset):
        seen.append(dataset)
        return xr.zeros_like(dataset.B2, dtype=bool)

    dn = np.full((24, 24), 1400)
    dn[0] = 0
    item = make_item(tmp_path, "x", dn=dn, **{"s2:processing_baseline": "05.00"})
    cube = open_s2(**area_of(), catalog=[item], mask=look)
    assert not seen
    cube.compute()
    (dataset,) = seen
    assert list(dataset.data_vars) == [*BANDS, "SCL"]
    assert dict(dataset.sizes) == {"time": 1, "y": 24, "x": 24}
    assert dataset.attrs["item"] == "x"
    assert pd.Timestamp(dataset.time.values[0]) == pd.Timestamp("2022-06-01T10:50")
    assert dataset.B2.dtype == "float32"
    assert float(dataset.B2[0, 1, 0]) == 400
    assert dataset.B2[0, 0].isnull().all()
    assert dataset.odc.crs.to_epsg() == 32631
    np.testing.assert_array_equal(dataset.x, cube.x)


@pytest.mark.parametrize(
    "answer", [lambda ds: ds.B2, lambda ds: ds.B2.values > 0, lambda ds: ds.B2.mean("x") > 0]
)
def test_a_mask_of_ones_own_that_is_none(tmp_path, answer):
    cube = open_s2(**area_of(), catalog=[make_item(tmp_path, "x")], mask=answer)
    with pytest.raises(OptionError, match=r"expected a DataArray \(time, y, x\) of bool"):
        cube.compute()


def test_items_without_scl(tmp_path):
    item = make_item(tmp_path, "x")
    del item.assets["scl"]
    with pytest.raises(
        CatalogError, match=r"1 lacks assets \(e\.g\. x: lacks assets: SCL \(mask=None does without\)"
    ):
        open_s2(**area_of(), catalog=[item])
    for mask in (None, bright):
        assert open_s2(**area_of(), catalog=[item], mask=mask).compute().notnull().all()
    with pytest.raises(CatalogError, match="lacks assets: cloud"):
        open_s2(**area_of(), catalog=[item], mask=cloudy, mask_assets=["cloud"])


# --- lazy, the same whatever the chunks, on any scheduler -----------------------------------------------


def test_nothing_is_read_before_it_is_computed(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(item_reader.ItemReader, "_read", lambda *a, **k: read.append(a) or no_compute())
    items = [make_item(tmp_path, f"i{i}", time=DAY + timedelta(days=i)) for i in range(3)]
    with dask.config.set(scheduler=no_compute):
        cube = open_s2(**area_of(), catalog=items, chunks=12)
        assert cube.chunks == ((1, 1, 1), (10,), (12, 12), (12, 12))
        assert cube.dtype == "float32"
        assert cube.data._meta.dtype == "float32"
        frames = cube.anysat.frames(2)
        embedding = frames.anysat.embed(frames=None, model="tiny", weights="random", norm="pastis")
        assert embedding.chunks is not None
    assert not read


def test_clouds_spare_reading(server, tmp_path):
    scl = np.full((12, 12), 9)
    items = served(server, tmp_path, dates=1, scl=scl)
    assert open_s2(**area_of(), catalog=items).compute().isnull().all()
    assert set(server.counts()) == {"/day0/scl.tif"}


@pytest.mark.slow
def test_chunks_change_nothing(tmp_path):
    """Also where an item is in another zone and every pixel of it is interpolated."""
    rng = np.random.default_rng(1)
    item = make_item(tmp_path, "x", n=160, dn=rng.integers(1, 9000, (160, 160)))
    area = {**area_of(64, origin=(ORIGIN[0] + 400, ORIGIN[1] - 400)), "crs": 32632}
    whole = open_s2(**area, catalog=[item]).compute()
    assert whole.notnull().mean() > 0.95
    for chunks in (16, {"y": 7, "x": 64}):
        pieces = open_s2(**area, catalog=[item], chunks=chunks).compute()
        np.testing.assert_allclose(pieces, whole, rtol=1e-5, atol=0.05)
    # in its own zone, to the bit
    own = {**area, "crs": 32631}
    np.testing.assert_array_equal(
        open_s2(**own, catalog=[item], chunks=9).compute(), open_s2(**own, catalog=[item]).compute()
    )


def test_whatever_makes_a_difference_makes_other_names(tmp_path):
    """Dask computes what has one name once."""
    item = make_item(tmp_path, "x", dn=2000, extra={"cloud": 0})
    options = [
        {}, {"harmonize": 300}, {"harmonize": 400}, {"mask": None}, {"mask": bright}, {"mask": nothing},
        {"dilate_m": 20}, {"scl_invalid": [4]}, {"on_error": "invalid"}, {"chunks": 8}, {"crs": 32632},
    ]  # fmt: skip
    cubes = [open_s2(**{**area_of(), **o}, catalog=[item]) for o in options]
    assert len({c.data.name for c in cubes}) == len(cubes)
    plain, less = dask.compute(cubes[0], cubes[1])
    assert float((plain - less).min()) == 300
    assert open_s2(**area_of(), catalog=[item]).data.name == cubes[0].data.name


def test_errors_and_readers_travel(tmp_path):
    error = pickle.loads(pickle.dumps(ReadError("asset 'red' of item 'x'")))
    assert isinstance(error, OSError)
    assert str(error) == "asset 'red' of item 'x'"
    item = make_item(tmp_path, "x")
    scene = stac_items.judge_item(item, "auto", needs_scl=True, extra=())
    source = item_reader.source_of(scene, item_reader.Masking("scl", (9,), 0.0, ()), "raise", 8)
    reader = pickle.loads(pickle.dumps(item_reader.ItemReader(source, {"GDAL_HTTP_TIMEOUT": "1"})))
    assert reader.source == source
    driver = item_loading._Driver({"a": "b"}, {"0": source} | {str(i): source for i in range(1000)})
    assert len(pickle.dumps(driver)) < 200


def test_tasks_are_few_and_small(tmp_path):
    """A year over a whole granule: one task a date and block, each of which knows its own items only."""
    items = [
        bare_item(f"i{i}", time=DAY + timedelta(days=i // 3), **{"s2:processing_baseline": "05.00"})
        for i in range(60)
    ]
    cube = open_s2(point=(9.0, 46.0), buffer_m=20_000, catalog=items, chunks=1024)
    blocks = len(cube.data.__dask_keys__()[0][0]) ** 2 * cube.sizes["time"]
    graph = dict(cube.__dask_graph__())
    assert len(graph) <= blocks + len(items) + 10
    sizes = [len(pickle.dumps(task)) for task in graph.values()]
    assert max(sizes) < 6000


@pytest.mark.slow
def test_on_a_cluster(client, server, tmp_path, hasty):
    """Errors keep their class and name the asset; and once the server is well again, so are the workers."""
    items = served(server, tmp_path)
    server.faults[r"day1/red"] = LASTING["broken"]
    with pytest.raises(ReadError, match="asset 'red' of item 'day1'"):
        client.compute(open_s2(**area_of(), catalog=items)).result(timeout=60)
    server.faults.clear()
    cube = open_s2(**area_of(), catalog=items, mask=bright, chunks=12)
    there = client.compute(cube).result(timeout=60)
    np.testing.assert_array_equal(there, cube.compute(scheduler="threads"))
    assert there.notnull().all()


@pytest.mark.slow
def test_in_processes(tmp_path):
    cube = open_s2(**area_of(), catalog=[make_item(tmp_path, "x")], mask=bright)
    with dask.config.set(scheduler="processes", num_workers=1):
        assert float(cube.sel(band="B2").mean()) == 1000


# --- what is found -----------------------------------------------------------------------------


def test_clouds_are_looked_at_here(server, tmp_path):
    """The server of this test filters by nothing, as some do."""
    items = served(server, tmp_path, dates=4)
    for item, share in zip(server.items, (10, 30, 30.5, None), strict=True):
        item["properties"]["eo:cloud_cover"] = share
    del server.items[3]["properties"]["eo:cloud_cover"]
    cube = open_s2(**area_of(), catalog=server.url)
    assert {k: e["used"] for k, e in said(cube).items()} == {
        "day0": True, "day1": True, "day2": "clouds: 30.5 % > 30 %", "day3": True,
    }  # fmt: skip
    assert cube.attrs["max_cloud"] == 30
    assert open_s2(**area_of(), catalog=server.url, max_cloud=None).sizes["time"] == len(items)


def test_the_query_that_is_sent(server, tmp_path):
    sent = []
    served(server, tmp_path, dates=1)
    server.faults["^/search"] = lambda path, _: None
    original = stac._search

    def note(chosen, geobox, period):
        sent.append((chosen, period))
        return original(chosen, geobox, period)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stac, "_search", note)
        open_s2(**area_of(), catalog=server.url, collections=["sentinel-2-l2a"], datetime="2022-06")
    ((chosen, period),) = sent
    assert chosen.collections == ("sentinel-2-l2a",)
    assert [str(t.date()) for t in period] == ["2022-06-01", "2022-07-01"]


@pytest.mark.parametrize(
    ("datetime_", "period"),
    [("2022", "2022-01-01/2023-01-01"), ("2022-06", "2022-06-01/2022-07-01"), (None, "2022-06-01/2022-06-02"),
     (("2022-04-01", "2022-10-01"), "2022-04-01/2022-10-01"), ("2022-04-01/2022-10-01", "2022-04-01/2022-10-01")],
)  # fmt: skip
def test_the_period_is_recorded_and_used(tmp_path, datetime_, period):
    cube = open_s2(**area_of(), catalog=[make_item(tmp_path, "x")], datetime=datetime_)
    assert cube.attrs["anysat_period"] == period
    frames = cube.anysat.frames(1)
    assert json.loads(frames.attrs["anysat_frames"])["period"] == period
    assert str(frames.bin_start.values[0])[:10] == period[:10]


def test_the_end_of_a_period_is_not_in_it(tmp_path):
    items = [
        make_item(tmp_path, str(i), time=datetime(2022, 6, 30, 23, 59, tzinfo=UTC) + timedelta(minutes=i))
        for i in range(2)
    ]
    items[1].properties["grid:code"] = "MGRS-31TFL"
    cube = open_s2(**area_of(), catalog=items, datetime="2022-06")
    assert {k: e["used"] for k, e in said(cube).items()} == {"0": True, "1": "outside the period"}


@pytest.mark.parametrize(
    ("change", "arguments", "says"),
    [
        ({}, {"datetime": "2021"}, r"1 outside the period .*widen datetime="),
        (
            {"eo:cloud_cover": 77.7},
            {},
            r"1 clouds \(e\.g\. x: clouds: 77\.7 % > 30 %\)\. To fix it, raise max_cloud=",
        ),
        ({}, {"point": (4.5, 44.2455)}, "1 outside the area .*move the area"),
        ({"lacks": "nir"}, {}, r"1 lacks assets \(e\.g\. x: lacks assets: B8\).*pass other collections="),
    ],
)
def test_nothing_left_over(tmp_path, change, arguments, says):
    lacks = change.pop("lacks", None)
    item = make_item(tmp_path, "x", **change)
    if lacks:
        del item.assets[lacks]
    with pytest.raises(CatalogError, match=says) as caught:
        open_s2(**{**area_of(), **arguments}, catalog=[item])
    for part in ("none of the 1 items found", "can be used", "1 items given", "bbox (4.", "max_cloud=30"):
        assert part in str(caught.value)


def test_nothing_found(server):
    with pytest.raises(
        CatalogError,
        match=r"nothing found: the catalog has no item for catalog http.*2022-01-01 to 2023-01-01",
    ):
        open_s2(**AREA, catalog=server.url, datetime="2022", collections=["a"])


def test_the_log_tells_what_was_done(tmp_path, caplog):
    caplog.set_level(logging.INFO, "xr_anysat.stac.search")
    items = [make_item(tmp_path, "a"), make_item(tmp_path, "b", **{"s2:processing_baseline": "02.14"})]
    open_s2(**area_of(), catalog=items)
    assert "1 of 2 items used" in caplog.text
    assert "item b not used: older processing: of a" in caplog.text
    assert "1 items: 0 DN subtracted, by s2:processing_baseline" in caplog.text


def test_attrs(tmp_path):
    cube = open_s2(
        **area_of(), catalog=[make_item(tmp_path, "x")], datetime="2022", dilate_m=20, max_cloud=None
    )
    assert json.loads(cube.attrs.pop("items")) == [
        {"id": "x", "datetime": "2022-06-01T10:50:00Z", "baseline": "03.01", "offset": 0.0,
         "decided_by": "s2:processing_baseline", "used": True},
    ]  # fmt: skip
    assert np.isnan(cube.attrs.pop("nodata"))
    assert cube.attrs == {
        "anysat_period": "2022-01-01/2023-01-01", "units": "DN", "catalog": "1 items given", "items_used": 1,
        "items_left_out": "{}", "harmonize": "auto", "mask": "scl", "scl_invalid": "0 1 3 8 9 10", "dilate_m": 20.0,
        "max_cloud": "any", "on_error": "raise",
        "anysat_period_times": "2022-06-01T10:50:00/2022-06-01T10:50:00",
    }  # fmt: skip
    assert list(cube.band.values) == list(BANDS)
    assert set(cube.coords) == {"time", "band", "y", "x", "spatial_ref"}
    assert cube.odc.geobox.crs.to_epsg() == 32631
    assert cube.name == "s2"


def test_it_survives_a_store(tmp_path):
    cube = open_s2(**area_of(), catalog=[make_item(tmp_path, "x")], datetime="2022")
    cube.to_dataset(name="s2").to_zarr(tmp_path / "s2.zarr", consolidated=False)
    back = xr.open_zarr(tmp_path / "s2.zarr", consolidated=False, decode_coords="all")["s2"]
    assert back.anysat.frames(8).attrs["anysat_frames"] == cube.anysat.frames(8).attrs["anysat_frames"]
    np.testing.assert_array_equal(back.anysat.frames(8), cube.anysat.frames(8))


def test_far_blocks_of_a_granule(tmp_path):
    """The area is wider than the granule, and the footprint is unknown: pixels outside of it are missing."""
    item = make_item(tmp_path, "x")
    item.geometry, item.bbox = None, None
    origin = (ORIGIN[0] - 240, ORIGIN[1] + 240)
    cube = open_s2(**area_of(72, origin=origin), catalog=[item], chunks=12, dilate_m=20).compute()[0]
    there = np.zeros((72, 72), bool)
    there[24:48, 24:48] = True
    np.testing.assert_array_equal(cube.notnull().all("band"), there)


def test_footprints_are_drawn_roughly(tmp_path):
    """Some are of four corners, a few hundred meters off: pixels outside of them are read, too."""
    item = make_item(tmp_path, "x", n=120)
    west, south, east, north = item.bbox
    item.geometry = box(west + 0.005, south + 0.005, east - 0.005, north - 0.005, "EPSG:4326").json
    assert open_s2(**area_of(120), catalog=[item], chunks=24).compute().notnull().all()


def test_odd_items(tmp_path):
    """No footprint, a footprint around the globe, a time range instead of a time, a file without nodata."""
    plain = make_item(tmp_path, "plain")
    boxed = make_item(tmp_path, "boxed", time=DAY + timedelta(days=1))
    boxed.geometry, boxed.bbox = None, [boxed.bbox[0], boxed.bbox[1], 0, boxed.bbox[2], boxed.bbox[3], 9]
    nowhere = make_item(tmp_path, "nowhere", time=DAY + timedelta(days=2))
    nowhere.geometry, nowhere.bbox = None, None
    globe = make_item(tmp_path, "globe", time=DAY + timedelta(days=3))
    globe.geometry = box(-179.9, 40, 179.9, 50, "EPSG:4326").json
    ranged = make_item(tmp_path, "ranged", time=DAY + timedelta(days=4))
    ranged.properties |= {"start_datetime": "2022-06-05T10:50:00Z", "end_datetime": "2022-06-05T10:51:00Z"}
    ranged.datetime = None
    bare = make_item(
        tmp_path, "bare", time=DAY + timedelta(days=5), dn=2000, **{"s2:processing_baseline": "04.00"}
    )
    dn = np.full((24, 24), 2000, "uint16")
    dn[0] = 0
    write(Path(bare.assets["blue"].href.removeprefix("file://")), dn, nodata=None)
    cube = open_s2(**area_of(), catalog=[plain, boxed, nowhere, globe, ranged, bare]).compute()
    assert cube.sizes["time"] == 6
    assert cube[:5].notnull().all()
    assert cube[5, :, 0].isnull().all()
    assert cube[5, :, 1:].notnull().all()


# --- catalogs ----------------------------------------------------------------------------------


def test_cdse_needs_credentials(monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with pytest.raises(
        CatalogError, match=r"needs S3 credentials: set the environment variables AWS_ACCESS_KEY_ID here"
    ):
        open_s2(**AREA, catalog="cdse")
    item = bare_item(keys=CDSE, **{"processing:version": "05.11"})
    for asset in item.assets.values():
        asset.href = "s3://eodata/Sentinel-2/x.jp2"
    with pytest.raises(CatalogError, match="needs S3 credentials"):
        open_s2(**AREA, catalog=[item])


@pytest.mark.slow
def test_cdse_is_read_over_s3(server, tmp_path, monkeypatch):
    """Whichever catalog lists its hrefs; and without boto3."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_HTTPS", "NO")
    endpoint = {"AWS_S3_ENDPOINT": server.url.removeprefix("http://"), "AWS_VIRTUAL_HOSTING": "FALSE"}
    monkeypatch.setitem(catalogs.CATALOGS, "cdse", replace(catalogs.CATALOGS["cdse"], gdal=endpoint))
    item = make_item(tmp_path, "x", keys=CDSE, **{"processing:version": "05.11"})
    del item.properties["s2:processing_baseline"]
    server.add(tmp_path)
    server.files = {f"/eodata{path}": content for path, content in server.files.items()}
    for key, asset in item.assets.items():
        asset.href = f"s3://eodata/x/{key}.tif"
    server.faults["B04_10m"] = [Fault(404)]
    cube = open_s2(**area_of(), catalog=[item]).compute()
    assert float(cube.sel(band="B4").mean()) == 2
    assert set(server.counts("tif")) == {f"/eodata/x/{key}.tif" for key in CDSE.split()}


def test_the_planetary_computer_signs_when_it_reads(tmp_path, monkeypatch):
    """Hrefs are signed at each read, not when the cube is opened, because a signature expires during a long job."""
    import planetary_computer

    item = make_item(tmp_path, "x", keys=PLANETARY)
    folder = "https://sentinel2l2a01.blob.core.windows.net/x/"
    for key, asset in item.assets.items():
        asset.href = f"{folder}{key}.tif?sig=long-expired"
    requested = []

    def sign(href):
        requested.append(href)
        return (tmp_path / "x" / href.rsplit("/", 1)[1]).as_uri()

    monkeypatch.setattr(planetary_computer, "sign", sign)
    cube = open_s2(**area_of(), catalog=[item])
    assert not requested
    assert cube.compute().notnull().all()
    assert sorted(requested) == sorted(f"{folder}{key}.tif" for key in PLANETARY.split())
    cube.compute()
    assert len(requested) == 22


def test_tokens_are_not_told(tmp_path, monkeypatch, hasty):
    import planetary_computer

    item = make_item(tmp_path, "x", keys=PLANETARY)
    item.assets["SCL"].href = "https://sentinel2l2a01.blob.core.windows.net/SCL.tif"
    monkeypatch.setattr(planetary_computer, "sign", lambda href: "http://127.0.0.1:9/SCL.tif?sig=secret")
    with pytest.raises(ReadError, match="asset 'SCL' of item 'x'") as caught:
        open_s2(**area_of(), catalog=[item]).compute()
    assert "secret" not in str(caught.value)


def test_named_catalogs():
    assert stac._catalog("earth-search", None).collections == ("sentinel-2-l2a", "sentinel-2-c1-l2a")
    assert stac._catalog("earth-search", ["sentinel-2-l2a"]).collections == ("sentinel-2-l2a",)
    assert stac._catalog(catalogs.CATALOGS["planetary-computer"].url + "/", None).collections == (
        "sentinel-2-l2a",
    )
    assert stac._catalog("http://127.0.0.1:1", None).collections == ()


@pytest.mark.parametrize(
    ("module", "package"), [("pystac_client", "pystac-client"), ("odc.stac", "odc-stac"), ("scipy", "scipy")]
)
def test_what_is_missing_is_named(monkeypatch, module, package):
    """Also odc.stac, of whose namespace odc-geo always is."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == module else real(n))
    with pytest.raises(AnySatError, match=rf"open_s2 needs {package}: pip install 'xr_anysat\[stac\]'"):
        open_s2(**AREA)


# --- arguments ---------------------------------------------------------------------------------

NO_POINT = {"point": None, "buffer_m": None}
IN_DEGREES = "expected .west, south, east, north. in degrees"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (NO_POINT, "no area given: expected one of bbox=, intersects= and point="),
        ({"bbox": (1, 2, 3, 4)}, "bbox and point given: expected one of"),
        ({"buffer_m": None}, r"point=\(4\.2538, 44\.2455\) and buffer_m=None: expected"),
        ({"buffer_m": 0}, "buffer_m=0: expected"),
        ({"point": (200, 0)}, r"point=\(200, 0\): expected \(lon, lat\) in degrees"),
        ({"point": (1, 2, 3)}, r"expected \(lon, lat\) in degrees"),
        ({**NO_POINT, "bbox": (600000, 4899780, 600240, 4900020)}, IN_DEGREES),
        ({**NO_POINT, "bbox": (1, 2, 3)}, IN_DEGREES),
        ({**NO_POINT, "bbox": (1, 3, 2, 2)}, IN_DEGREES),
        ({**NO_POINT, "bbox": (179, 2, -179, 3)}, r"crosses the antimeridian \(west > east\): .* two sides"),
        ({"point": (179.999, -17.0), "buffer_m": 2000}, "point= crosses the antimeridian"),
        ({**NO_POINT, "intersects": "POINT (1 2)"}, "expected a GeoJSON geometry in degrees"),
        ({**NO_POINT, "intersects": {"type": "Point", "coordinates": [1, 2]}}, "expected a GeoJSON geometry"),
        ({"crs": 4326}, "crs=4326: expected 'utm' or a projected CRS in meters"),
        ({"crs": 2263}, "crs=2263: expected 'utm' or a projected CRS in meters"),
        ({"crs": "nonsense"}, "crs='nonsense': expected 'utm' or an EPSG code"),
        ({"datetime": "summer"}, "datetime='summer': expected '2022'"),
        ({"datetime": ("2022-06-01", "2022-06-01")}, "is empty"),
        ({"catalog": "earthsearch"}, "expected one of 'earth-search', 'planetary-computer', 'cdse', the URL"),
        ({"catalog": [1]}, r"catalog='\[1\]': expected a name, a URL, a pystac ItemCollection or a list of Items"),
        ({"catalog": [], "collections": ["a"]}, r"collections=\['a'\] can only be passed with a catalog to search"),
        ({"catalog": "http://127.0.0.1:9", "collections": "a"}, "collections='a': expected a list"),
        ({"mask": "cloud"}, "mask='cloud': expected 'scl', None, or a callable"),
        ({"mask": xr.DataArray([True])}, "expected 'scl', None, or a callable"),
        ({"mask_assets": ["cloud"]}, r"mask_assets=\['cloud'\]: expected a list of asset keys, together with"),
        ({"mask": nothing, "mask_assets": "cloud"}, "mask_assets='cloud': expected a list"),
        ({"scl_invalid": [12]}, r"scl_invalid=\[12\]: expected a list of classes, 0 to 11"),
        ({"scl_invalid": "scl"}, "expected a list of classes"),
        ({"mask": None, "scl_invalid": [9]}, "has no meaning with mask=None"),
        ({"dilate_m": -1}, "dilate_m=-1: expected meters, 0 or more"),
        ({"mask": None, "dilate_m": 20}, "dilate_m=20 has no meaning with mask=None"),
        ({"harmonize": "yes"}, "harmonize='yes': expected 'auto', True, False or digital numbers"),
        ({"harmonize": float("nan")}, "harmonize=nan: expected"),
        ({"on_error": "ignore"}, "on_error='ignore': expected 'raise' or 'invalid'"),
        ({"max_cloud": 300}, "max_cloud=300: expected percent, 0 to 100"),
        ({"max_cloud": True}, "max_cloud=True: expected percent"),
        ({"chunks": 0}, "chunks=0: expected pixels"),
        ({"chunks": {"time": 4}}, r"chunks=\{'time': 4\}: expected pixels, .* along time, a chunk is one date"),
        ({"workers": 0}, "workers=0: expected a positive whole number"),
    ],
)  # fmt: skip
def test_impossible_arguments(arguments, says):
    """Refused before any request."""
    with pytest.raises(OptionError, match=says):
        open_s2(**{**AREA, "catalog": "http://127.0.0.1:9", **arguments})


def test_items_of_no_time():
    item = bare_item()
    item.datetime = None
    with pytest.raises(CatalogError, match="item 'x' has no datetime"):
        open_s2(**AREA, catalog=[item])


def test_the_pool_is_one_a_process():
    assert item_reader._pool(3) is item_reader._pool(3)
    assert item_reader._pool(3) is not item_reader._pool(4)
    assert (os.getpid(), 3) in item_reader._POOLS


def test_what_was_loaded_is_recorded_on_frames_and_embedding(tmp_path: Path) -> None:
    """The items and their offsets go with the result, and a decided offset is not suspected again."""
    scene = make_scene(tmp_path, size=(24, 24), dates=6)
    cube = open_s2(
        catalog=pystac.ItemCollection.from_file(str(scene.items)),
        point=scene.center,
        buffer_m=120,
        max_cloud=None,
    )
    frames = cube.anysat.frames(2)
    assert frames.attrs["items"] == cube.attrs["items"]
    emb = cube.anysat.embed(2, patch_size=40, model="tiny", weights="random")
    source = json.loads(emb.attrs["source"])
    assert [i["id"] for i in json.loads(source["items"])] == [
        i["id"] for i in json.loads(cube.attrs["items"])
    ]
    bright = cube.copy(data=cube.data * 0 + 1200)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AnySatWarning)
        bright.anysat.statistics(2)
    bright.attrs = {}
    with pytest.warns(AnySatWarning, match="offset"):
        bright.anysat.embed(
            2, patch_size=40, tile=24, norm="pastis", model="tiny", weights="random"
        ).compute()
    part = cube.isel(time=slice(0, 1))
    assert json.loads(part.anysat.frames(1).attrs["anysat_frames"])["period"] != cube.attrs["anysat_period"]


# --- addresses that a catalog may not name -------------------------------------------------------

UNSAFE = [
    "file:///etc/passwd", "/etc/passwd", "/vsicurl/http://example.org/a.tif", "/vsizip//etc/a.zip/b.tif",
    "http://127.0.0.1:9/a.tif", "http://2130706433/a.tif", "http://[::1]/a.tif", "http://10.1.2.3/a.tif",
    "http://169.254.169.254/latest", "http://localhost/a.tif", "http://metadata.google.internal/a", "ftp://a.b/c.tif",
    "<VRTDataset rasterXSize='1'/>", "GTIFF_DIR:1:/etc/passwd", "https://[bad/a.tif", "../../../etc/passwd", "",
]  # fmt: skip


@pytest.mark.parametrize("href", UNSAFE)
def test_an_address_on_this_machine_or_in_its_network_is_not_read(tmp_path, href):
    item = make_item(tmp_path, "one", base="https://example.org")
    item.assets["green"].href = href
    item.set_self_href(None)
    judged = stac_items.judge_item(item, "auto", needs_scl=True, extra=(), catalog="https://example.org/v1")
    assert judged.unused == f"unsafe address: asset 'green' is {href[:80]!r}"
    assert stac_items.judge_item(item, "auto", needs_scl=True, extra=()).unused is None  # passed by the user


@pytest.mark.parametrize(
    ("href", "catalog"),
    [
        ("https://e84.s3.amazonaws.com/B02.tif?token=a", "https://example.org/v1"),
        ("s3://eodata/a/B02.jp2", "https://example.org/v1"),
        ("http://10.1.2.3/a.tif", "http://10.9.9.9/stac"),
        ("file:///data/B02.tif", "http://localhost:8080"),
    ],
)
def test_other_addresses_are_read(tmp_path, href, catalog):
    item = make_item(tmp_path, "one", base="https://example.org")
    item.assets["green"].href = href
    assert stac_items.judge_item(item, "auto", needs_scl=True, extra=(), catalog=catalog).unused is None


def test_a_catalog_elsewhere_gives_no_local_files(server, tmp_path):
    """0.0.0.0 reaches this machine, but is not its loopback address."""
    for item in served(server, tmp_path):
        item.assets["red"].href = (tmp_path / item.id / "red.tif").as_uri()
        server.items[[i["id"] for i in server.items].index(item.id)] = item.to_dict(include_self_link=False)
    own, elsewhere = server.url, server.url.replace("127.0.0.1", "0.0.0.0")
    assert open_s2(**area_of(40), datetime="2022", max_cloud=None, catalog=own).sizes["time"] == 3
    with pytest.raises(
        CatalogError, match=r"3 unsafe address \(e\.g\. .*'red' is 'file:.*pass the items themselves"
    ):
        open_s2(**area_of(40), datetime="2022", max_cloud=None, catalog=elsewhere)


def test_a_catalog_elsewhere_gives_no_format_that_names_files(server, tmp_path):
    """A file that is called red.tif may be a VRT, which names other files."""
    (item, *_) = served(server, tmp_path)
    path = f"/{item.id}/red.tif"
    secret = tmp_path / item.id / "green.tif"
    server.files[
        path
    ] = f"""<VRTDataset rasterXSize="60" rasterYSize="60"><VRTRasterBand dataType="UInt16" band="1">
      <SimpleSource><SourceFilename>{secret}</SourceFilename><SourceBand>1</SourceBand></SimpleSource>
      </VRTRasterBand></VRTDataset>""".encode()
    catalog = server.url.replace("127.0.0.1", "0.0.0.0")
    for each in server.items:
        for asset in each["assets"].values():
            asset["href"] = asset["href"].replace("127.0.0.1", "0.0.0.0")
    cube = open_s2(**area_of(40), datetime="2022", max_cloud=None, catalog=catalog)
    with pytest.raises(ReadError, match=r"asset 'red' of item .* cannot be read"):
        cube.isel(time=0).compute()
    assert np.isfinite(cube.isel(time=1).compute()).any()

"""Real files, if they are next to the repository: from a file to frames and embeddings."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from support.cubes import ASSETS, BANDS, PADDED
from support.paths import SHARED
from support.precision import ERRORS, near

import xr_anysat
from xr_anysat import AnySatWarning, CubeError
from xr_anysat.cube.reading import read_cube

TINY = {"model": "tiny", "weights": "random"}
CLOUDY = [0, 1, 3, 8, 9, 10]  # classes of SCL that are no view of the ground


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"shared/data/{name} is not here")
    return path


def doy0(dates: Any) -> list[int]:
    """Days of the year, the first being 0 and the last of a leap year 364."""
    return [min(t.timetuple().tm_yday - 1, 364) for t in pd.to_datetime(dates)]


# ---------------------------------------------------------------------- TreeSatAI-TS: 146 dates of 6 × 6 pixels


@pytest.fixture(scope="module")
def treesat() -> xr.DataArray:
    h5py = pytest.importorskip("h5py")
    with h5py.File(shared("treesat_abies_alba.h5")) as file:
        values = file["sen-2-data"][:]
        products = [p.decode() for p in file["sen-2-products"][:]]
        cloud = file["sen-2-masks"][:].max(axis=1)
    cube = xr.DataArray(
        values,
        dims=("time", "band", "y", "x"),
        coords={"time": [p.split("_")[2] for p in products], "band": list(BANDS)},
    )
    return cube.where(xr.DataArray(cloud < 50, dims=("time", "y", "x")))


@pytest.mark.parametrize("form", ["DataArray", "Dataset", "lazy"])
def test_treesat_in_eight_frames(treesat: xr.DataArray, form: str) -> None:
    cube: Any = {"DataArray": treesat, "Dataset": treesat.to_dataset("band"), "lazy": treesat.chunk(time=50)}[
        form
    ]
    made = xr_anysat.frames(cube, 8, period="2020")
    assert made["doy"].values.tolist() == [22, 68, 114, 160, 205, 251, 297, 343]
    assert made["n_obs"].sum() == 146
    days = np.array(doy0(treesat["time"].values))
    bounds = [366 * i // 8 for i in range(9)]
    moments = [datetime.strptime(t, "%Y%m%dT%H%M%S") for t in treesat["time"].values]
    yday = np.array([t.timetuple().tm_yday - 1 for t in moments])
    assert (days == np.minimum(yday, 364)).all()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice")
        want = [np.nanmedian(treesat.values[(yday >= a) & (yday < b)], axis=0) for a, b in pairwise(bounds)]
    np.testing.assert_array_equal(made.values, want)
    emb = xr_anysat.embed(cube, 8, period="2020", **TINY).compute()
    assert emb.shape == (256, 6, 6)
    assert np.isfinite(emb).all()
    assert emb.attrs["doy0_values"] == made["doy"].values.tolist()
    assert emb.std(("y", "x")).max() > 1e-3  # its pixels differ


def test_treesat_as_it_is(treesat: xr.DataArray) -> None:
    emb = xr_anysat.embed(treesat, None, norm="treesatai", **TINY)
    assert emb.attrs["n_frames"] == 146
    assert emb.attrs["doy0_values"] == doy0(treesat["time"].values)
    assert emb.attrs["frame_dates"][0] == "2020-01-02"
    assert np.isfinite(emb).all()
    lazy = xr_anysat.embed(treesat.chunk(time=30, y=4), None, norm="treesatai", **TINY).compute()
    np.testing.assert_array_equal(lazy, emb)


def test_a_date_that_is_all_cloud_changes_nothing(treesat: xr.DataArray) -> None:
    clouded = treesat.isnull().all(("band", "y", "x"))
    assert 0 < clouded.sum() < 146
    want = xr_anysat.embed(treesat, None, **TINY)
    got = xr_anysat.embed(treesat.isel(time=~clouded.values), None, **TINY)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ERRORS)
@pytest.mark.parametrize("source", ["treesat", "worldcereal", "synth"])
def test_precision_on_real_cubes(source: str, precision: str, request: pytest.FixtureRequest) -> None:
    cube, options = request.getfixturevalue(source), {}
    if source == "worldcereal":
        cube = cube.assign({"S2-L2A-B8A": cube["S2-L2A-B08"]}).isel(y=slice(30, 45), x=slice(20, 41))
        options = {"nodata": 65535, "frames": None}
    elif source == "synth":
        options = {"frames": None, "norm": "pastis"}
    short, exact = (
        xr_anysat.embed(cube, output="dense", precision=p, **{"period": None, **options}, **TINY).compute()
        for p in (precision, "float32")
    )
    assert short.attrs["precision"] == precision
    near(short.values, exact.values, precision, axis=0)


# ---------------------------------------------------------------------- openEO


def test_openeo_without_the_red_edge_is_refused() -> None:
    pytest.importorskip("netCDF4")  # a file of NetCDF's classic format
    with xr.open_dataset(shared("gfmap_optical_cube.nc"), engine="netcdf4") as ds:
        with pytest.raises(
            CubeError, match=r"missing B5, B6, B7, B8A, B11, B12\. AnySat needs the ten bands"
        ):
            xr_anysat.embed(ds, **TINY)
        found = ds[["S2-L2A-B02", "S2-L2A-B03", "S2-L2A-B04", "S2-L2A-B08", "crs"]]
        ds = found.assign(
            {f"S2-L2A-{n}": ds["S2-L2A-B08"] for n in ("B05", "B06", "B07", "B8A", "B11", "B12")}
        )
        cube = read_cube(ds)
        assert cube.geobox == GeoBox((52, 46), Affine(10, 0, 587_880, 0, -10, 5_685_430), "EPSG:32631")
        np.testing.assert_array_equal(cube.array.sel(band="B3"), ds["S2-L2A-B03"])
        np.testing.assert_array_equal(cube.array.sel(band="B4"), ds["S2-L2A-B04"])
        made = xr_anysat.frames(ds, 3, period="2023-10/2024-01")
        assert made["n_obs"].values.tolist() == [6, 6, 7]
        assert made["doy"].values.tolist() == [288, 318, 349]


@pytest.fixture(scope="module")
def worldcereal() -> Iterator[xr.Dataset]:
    pytest.importorskip("netCDF4")
    with xr.open_dataset(shared("worldcereal_preprocessed_inputs.nc"), engine="netcdf4", chunks={}) as ds:
        yield ds


def test_worldcereal_lacks_one_band(worldcereal: xr.Dataset) -> None:
    with pytest.raises(CubeError, match=r"S2-L2A-B08.*missing B8A\. AnySat needs"):
        xr_anysat.embed(worldcereal, **TINY)


def test_worldcereal_with_a_stand_in(worldcereal: xr.Dataset) -> None:
    ds = worldcereal.assign({"S2-L2A-B8A": worldcereal["S2-L2A-B08"]})
    cube = read_cube(ds)
    assert cube.geobox == GeoBox((100, 100), Affine(10, 0, 664_000, 0, -10, 5_612_120), "EPSG:32631")
    assert cube.array.chunks is not None
    part = ds.isel(y=slice(30, 45), x=slice(20, 41))
    made = xr_anysat.frames(part, 4, period="2020-11/2021-11", nodata=65535)
    assert made["n_obs"].values.tolist() == [3, 4, 2, 3]
    assert made["doy"].values.tolist() == [350, 75, 166, 258]
    made = xr_anysat.frames(part, None, nodata=65535)
    with pytest.warns(AnySatWarning, match=r"values of 65535 count as observed.*nodata=65535"):
        xr_anysat.statistics(part, None)
    gone = np.isnan(made).all(("band", "y", "x")).compute()
    assert gone.sum() == 2
    emb = xr_anysat.embed(part, None, nodata=65535, patch_size=30, tile=12, **TINY)
    assert emb.attrs["doy0_values"] == doy0(ds["t"].values)
    assert emb.attrs["anchor"] == "grid"
    values = emb.compute()
    assert np.isfinite(values).all()
    # 3 × 3 pixels a patch, counted from the CRS origin
    left, top = 664_000 + 200, 5_612_120 - 300
    grid = emb.odc.geobox
    assert (grid.crs.to_epsg(), grid.resolution.x, grid.resolution.y) == (32631, 30, -30)
    assert (grid.affine.c % 30, grid.affine.f % 30) == (0, 0)
    assert grid.affine.c <= left < grid.affine.c + 30
    assert grid.affine.f - 30 < top <= grid.affine.f
    present = ~gone.values
    without = part.isel(t=present)
    again = xr_anysat.embed(without, None, nodata=65535, patch_size=30, tile=12, **TINY).compute()
    np.testing.assert_allclose(again, values, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------- GeoTIFFs by rioxarray


def open_scene(folder: Path) -> tuple[xr.DataArray, xr.DataArray]:
    """Ten bands and SCL of a date on the grid of B02, as a user of rioxarray would."""
    rioxarray = pytest.importorskip("rioxarray")
    one = rioxarray.open_rasterio(folder / "B02.tif").squeeze("band", drop=True)

    def read(name: str) -> xr.DataArray:
        band = rioxarray.open_rasterio(folder / f"{name}.tif").squeeze("band", drop=True)
        return band if band.shape == one.shape else band.rio.reproject_match(one)

    return xr.concat([read(n) for n in PADDED], pd.Index(PADDED, name="band")), read("SCL")


def test_a_cropped_scene_of_100_m_pixels() -> None:
    cube, scl = open_scene(shared("scenes/rkh_20200219"))
    cube = cube.assign_coords(time=np.datetime64("2020-02-19T11:03:09"))
    with pytest.raises(CubeError, match=r"pixels of 100 × 100 m.*odc\.reproject\('utm', resolution=10\)"):
        xr_anysat.embed(cube, None, **TINY)
    clear = cube.where(~scl.isin(CLOUDY))[:, 40:64, 100:124]
    plain = clear.drop_vars(["x", "y", "spatial_ref"])
    emb = xr_anysat.embed(plain, None, patch_size=20, **TINY)
    assert emb.shape == (256, 12, 12)
    assert emb.attrs["doy0_values"] == [49]
    assert np.isfinite(emb).all()
    steps = 10 * np.arange(24)
    moved = clear.assign_coords(x=clear["x"].values[0] + steps, y=clear["y"].values[0] - steps)
    placed = xr_anysat.embed(moved, None, patch_size=20, anchor="cube", **TINY)
    np.testing.assert_array_equal(placed, emb)
    assert placed.odc.geobox.crs.to_epsg() == 32629
    assert placed.odc.geobox.resolution.x == 20
    assert (placed["x"][0], placed["y"][0]) == (clear["x"][0] + 5, clear["y"][0] - 5)


def open_dates(folder: Path, *, masked: bool) -> xr.DataArray:
    """Four dates of 24 × 24 pixels, the last two with the +1000 offset of baseline 04.00."""
    scenes = []
    for day in sorted(p for p in folder.iterdir() if p.is_dir()):
        cube, scl = open_scene(day)
        cube = cube.where(~scl.isin(CLOUDY)) if masked else cube
        scenes.append(cube.expand_dims(time=[pd.Timestamp(day.name)]))
    return xr.concat(scenes, "time")


@pytest.fixture(scope="module")
def synth() -> xr.DataArray:
    return open_dates(shared("synth"), masked=True)


def test_geotiffs_of_several_dates(synth: xr.DataArray) -> None:
    made = xr_anysat.frames(synth, None)
    assert made["doy"].values.tolist() == [364, 19, 29, 49]
    np.testing.assert_array_equal(made.values, synth.where(synth != 0).values)
    assert made.odc.geobox == GeoBox((24, 24), Affine(10, 0, 600_000, 0, -10, 4_900_020), "EPSG:32631")
    emb = xr_anysat.embed(synth, 2, period="2021-12-15/2022-03-01", patch_size=40, **TINY)
    assert emb.attrs["doy0_values"] == [2, 40]
    assert emb.attrs["anchor"] == "cube"
    assert emb.odc.geobox == GeoBox((6, 6), Affine(40, 0, 600_000, 0, -40, 4_900_020), "EPSG:32631")
    seen = np.isfinite(made).all("band").any("time").values.reshape(6, 4, 6, 4).any((1, 3))
    np.testing.assert_array_equal(np.isfinite(emb).all("D"), seen)
    assert seen.mean() > 0.9


def test_the_offset_is_noticed_and_the_remedy_works() -> None:
    cube = open_dates(shared("synth"), masked=False)
    before, later = cube.sel(time=slice(None, "2022-01-25")), cube.sel(time=slice("2022-01-25", None))
    with pytest.warns(AnySatWarning, match=r"is below 13\d\d: the cube seems to contain the \+1000 offset"):
        xr_anysat.statistics(later, None)
    mended = later.where(later != 0) - 1000
    stats = xr_anysat.statistics(mended, None, nodata=np.nan)
    np.testing.assert_allclose(stats.mean, xr_anysat.statistics(before, None).mean, atol=30)


@pytest.mark.parametrize(("catalog", "names"), [("es_c1", ASSETS), ("pc", PADDED)])
def test_what_odc_stac_loads(synth: xr.DataArray, catalog: str, names: tuple[str, ...]) -> None:
    stac = pytest.importorskip("odc.stac")
    pystac = pytest.importorskip("pystac")
    folder = shared("synth")
    items = []
    for item in json.loads((folder / f"{catalog}.json").read_text())["features"]:
        for asset in item["assets"].values():
            asset["href"] = str(folder / asset["href"])
        items.append(pystac.Item.from_dict(item))
    ds = stac.load(items, bands=list(names), geobox=synth.odc.geobox, chunks={}, dtype="uint16", nodata=0)
    emb = xr_anysat.embed(ds, None, patch_size=40, **TINY)
    assert emb.attrs["doy0_values"] == [364, 19, 29, 49]
    assert emb.odc.geobox == GeoBox((6, 6), Affine(40, 0, 600_000, 0, -40, 4_900_020), "EPSG:32631")
    made = xr_anysat.frames(ds, None)
    there = np.isfinite(synth.values)
    np.testing.assert_array_equal(
        made.values[there & (synth.values != 0)], synth.values[there & (synth.values != 0)]
    )
    assert np.isfinite(emb).all()

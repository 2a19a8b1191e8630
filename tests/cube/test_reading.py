"""Cubes of any maker are read as the same canonical cube, by metadata alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import date, datetime
from typing import Any

import dask
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from support.cubes import (
    ASSETS,
    BANDS,
    CRS,
    DATES,
    HEIGHT,
    LEFT,
    PADDED,
    TOP,
    WIDTH,
    centred,
    no_compute,
    odc_stac,
    openeo,
    placed,
    plain,
    rioxarray_stack,
    stackstac,
    unreadable,
    xee,
)

import xr_anysat
from xr_anysat import AnySatWarning, CubeError, OptionError
from xr_anysat.cube.reading import Cube, band_name, blank_missing, read_cube, valid_pixels
from xr_anysat.model.spec import SENSORS
from xr_anysat.shared.sensor import S2

GRID = GeoBox((HEIGHT, WIDTH), Affine(10, 0, LEFT, 0, -10, TOP), CRS)

MAKERS: dict[str, tuple[Callable[[], xr.DataArray | xr.Dataset], float]] = {
    "odc-stac": (odc_stac, 0),
    "odc-stac with SCL": (lambda: odc_stac(scl=True), 0),
    "odc-stac to_array": (lambda: odc_stac().to_array("band"), 0),
    "stackstac": (stackstac, np.nan),
    "stackstac, centers": (lambda: stackstac(xy_coords="center"), np.nan),
    "stackstac, CRS in attrs": (lambda: stackstac(where_crs="attrs"), np.nan),
    "stackstac, CRS in epsg": (lambda: stackstac(where_crs="coord"), np.nan),
    "stackstac, CRS in proj:epsg": (lambda: stackstac(where_crs="proj:epsg"), np.nan),
    "stackstac to_dataset": (lambda: stackstac().to_dataset("band"), np.nan),
    "xee, (time, X, Y)": (xee, 0),
    "xee, (time, y, x)": (lambda: xee(order=("time", "y", "x")), 0),
    "openEO": (openeo, 0),
    "openEO without SCL": (lambda: openeo().drop_vars("S2-L2A-SCL"), 0),
    "by hand": (placed, 0),
}


def same(got: float, want: float) -> bool:
    return got == want or (np.isnan(got) and np.isnan(want))


def assert_is_the_cube(cube: Cube, want: xr.DataArray) -> None:
    assert cube.array.dims == ("time", "band", "y", "x")
    assert list(cube.array["band"].values) == list(BANDS)
    np.testing.assert_array_equal(cube.array.values, want.values)
    np.testing.assert_array_equal(cube.array["time"].values, want["time"].values)


# Makers that load the scene classification too; test_an_unused_classification_causes_a_warning is about it
ignore_scl = pytest.mark.filterwarnings("ignore:the scene classification")


@ignore_scl
@pytest.mark.parametrize("lazy", [False, True], ids=["numpy", "dask"])
@pytest.mark.parametrize("maker", MAKERS)
def test_every_makers_cube_is_the_same_cube(maker: str, lazy: bool) -> None:
    make, nodata = MAKERS[maker]
    made = make()
    cube = read_cube(made.chunk() if lazy else made)
    assert_is_the_cube(cube, placed())
    assert cube.geobox == GRID
    assert same(cube.nodata, nodata)
    np.testing.assert_array_equal(cube.array["y"], TOP - 5 - 10 * np.arange(HEIGHT))
    np.testing.assert_array_equal(cube.array["x"], LEFT + 5 + 10 * np.arange(WIDTH))
    assert isinstance(cube.array.data, np.ndarray) is not lazy


@ignore_scl
@pytest.mark.parametrize("maker", MAKERS)
def test_reading_reads_no_pixel(maker: str) -> None:
    with no_compute():
        cube = read_cube(unreadable(MAKERS[maker][0]()))
        assert dask.is_dask_collection(cube.array.data)
    with pytest.raises(AssertionError, match="pixels were read"):
        cube.array.compute()


@ignore_scl
def test_reading_changes_nothing_of_the_callers() -> None:
    for make, _ in MAKERS.values():
        made = make()
        before = made.copy(deep=True)
        read_cube(made)
        xr.testing.assert_identical(made, before)


# ---------------------------------------------------------------------- bands


@pytest.mark.parametrize(
    ("name", "want"),
    [
        *zip(BANDS, BANDS, strict=True),
        *zip(PADDED, BANDS, strict=True),
        *zip(ASSETS, BANDS, strict=True),
        ("b02", "B2"),
        ("NIR08", "B8A"),
        ("B8A_20m", "B8A"),
        ("B04_10m", "B4"),
        ("S2-L2A-B12", "B12"),
        ("SCL", None),
        ("B1", None),
        ("B01", None),
        ("B09_60m", None),
        ("B10", None),
        ("nir09", None),
        ("coastal", None),
        ("AOT_B2x", None),
        ("NDB2", None),
        (2, None),
        (8.0, None),
        (None, None),
    ],
)
def test_band_names(name: Any, want: str | None) -> None:
    assert band_name(name) == want


def test_shuffled_bands_are_put_in_order() -> None:
    order = [3, 0, 9, 1, 8, 2, 7, 4, 6, 5]
    assert_is_the_cube(read_cube(placed().isel(band=order)), placed())


@ignore_scl
def test_other_bands_are_left_out() -> None:
    cube = placed()
    extra = xr.concat([cube, cube.isel(band=[0, 1]).assign_coords(band=["SCL", "B09"])], "band")
    assert_is_the_cube(read_cube(extra.roll(band=1, roll_coords=True)), cube)


def test_numbered_bands_need_names() -> None:
    cube = rioxarray_stack()
    with pytest.raises(CubeError, match=r"bands without names.*never by position.*bands=\['B02'"):
        read_cube(cube)
    assert_is_the_cube(read_cube(cube, bands=list(PADDED)), placed())
    order = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert_is_the_cube(read_cube(cube.isel(band=order), bands=[ASSETS[i] for i in order]), placed())


def test_bands_without_coordinate_need_names() -> None:
    cube = placed().drop_vars("band")
    with pytest.raises(CubeError, match="bands without names"):
        read_cube(cube)
    assert_is_the_cube(read_cube(cube, bands=BANDS), placed())


def test_variables_of_other_names_can_be_named() -> None:
    ds = openeo().drop_vars("S2-L2A-SCL")
    crs = ds[["crs"]]
    ds = ds.drop_vars("crs").rename({f"S2-L2A-{n}": f"layer{i}" for i, n in enumerate(PADDED)})
    with pytest.raises(CubeError, match=r"missing B2, B3.*bands=\[\.\.\.\]"):
        read_cube(ds)
    cube = read_cube(ds, bands=PADDED)
    assert_is_the_cube(cube, placed())
    assert cube.geobox is None  # its CRS was a variable
    cube = read_cube(ds.merge(crs), bands=[*PADDED, "crs"])
    assert_is_the_cube(cube, placed())
    assert cube.geobox == GRID


@pytest.mark.parametrize(
    ("bands", "error", "says"),
    [
        (PADDED[:-1], OptionError, "has 9 names: expected one for each of the 10"),
        ("B02", OptionError, "expected a list of names"),
        ([*PADDED[:-1], "B11"], CubeError, r"\{'B11': \['B11', 'B11'\]\} are several of the same band"),
        ([*PADDED[:-1], "SCL"], CubeError, "missing B12"),
        (list(range(10)), CubeError, "bands without names"),
    ],
)
def test_impossible_names_are_refused(bands: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        read_cube(placed(), bands=bands)


def test_one_band_twice_is_refused() -> None:
    ds = odc_stac()
    with pytest.raises(
        CubeError, match=r"\{'B8A': \['nir08', 'B8A'\]\} are several of the same band.*select"
    ):
        read_cube(ds.assign(B8A=ds["nir08"]))


def test_a_dataset_that_holds_a_cube_is_told_apart() -> None:
    with pytest.raises(CubeError, match=r"variables \['s2'\], none of them a band.*dataset\['s2'\]"):
        read_cube(placed().to_dataset(name="s2"))


def test_bands_of_different_shapes_are_refused() -> None:
    ds = odc_stac()
    with pytest.raises(CubeError, match=r"differ in shape.*'swir22': \{'y': 4, 'x': 5\}.*one 10 m grid"):
        read_cube(ds.assign(swir22=ds["swir22"].isel(time=0, drop=True)))
    with pytest.raises(
        CubeError, match=r"'swir22' has dims \('time', 'y', 'x_20m'\): expected \(time, y, x\)"
    ):
        read_cube(ds.assign(swir22=ds["swir22"].rename(x="x_20m")))


# ---------------------------------------------------------------------- dims and times


@pytest.mark.parametrize(
    "names",
    [
        {"time": "t"},
        {"band": "bands"},
        {"y": "Y", "x": "X"},
        {"y": "latitude", "x": "longitude"},
        {"y": "lat", "x": "lon"},
    ],
)
def test_dims_are_found_by_name_in_any_order(names: dict[str, str]) -> None:
    cube = plain().rename(names)
    assert_is_the_cube(read_cube(cube), plain())
    assert_is_the_cube(read_cube(cube.transpose(*cube.dims[::-1])), plain())


def test_dates_beside_a_dim_of_another_name() -> None:
    dates = plain()["time"].values
    cube = plain().drop_vars("time").rename(time="t")
    assert_is_the_cube(read_cube(cube.assign_coords(time=("t", dates))), plain())
    numbered = cube.assign_coords(t=range(len(dates)), time=("t", dates))
    assert_is_the_cube(read_cube(numbered), plain())
    with pytest.raises(CubeError, match=r"both a dim 't' and a coordinate 'time' \(\).*drop_vars\('time'\)"):
        read_cube(cube.assign_coords(t=dates, time=dates[0]))


def test_two_names_of_one_dim_are_refused() -> None:
    with pytest.raises(CubeError, match=r"dims \['t', 'time'\] could all be 'time'"):
        read_cube(plain().expand_dims("t"))


@pytest.mark.parametrize("name", ["time", "t"])
def test_one_date_needs_no_time_dim(name: str) -> None:
    one = placed().isel(time=1).rename({} if name == "time" else {"time": name})
    assert_is_the_cube(read_cube(one), placed().isel(time=[1]))
    ds = odc_stac().isel(time=1).rename({} if name == "time" else {"time": name})
    assert_is_the_cube(read_cube(ds), placed().isel(time=[1]))


def test_a_cube_needs_dates() -> None:
    with pytest.raises(CubeError, match=r"no time.*expand_dims\(time=\[numpy"):
        read_cube(plain().isel(time=0, drop=True))
    with pytest.raises(CubeError, match="the 3 images have no dates"):
        read_cube(plain().drop_vars("time"))


@pytest.mark.parametrize("dim", ["time", "y", "x"])
def test_an_empty_dim_is_refused(dim: str) -> None:
    with pytest.raises(CubeError, match=rf"'{dim}': 0.*'{dim}' is empty"):
        read_cube(plain().isel({dim: slice(0)}))


def test_times_are_sorted_and_ties_keep_their_order() -> None:
    dates = ["2022-07-04", "2022-01-15", "2022-07-04", "2022-03-01"]
    cube = plain(dates).assign_coords(id=("time", ["c", "a", "d", "b"]))
    got = read_cube(cube).array
    assert list(got["id"].values) == ["a", "b", "c", "d"]
    np.testing.assert_array_equal(got.values, cube.values[[1, 3, 0, 2]])


@pytest.mark.parametrize(
    "times",
    [
        ["2022-01-15", "2022-03-01", "2022-07-04"],
        ["20220115", "20220301", "20220704"],
        ["2022-01-15T01:00:00+01:00", "2022-03-01T00:00:00Z", "2022-07-03T20:00:00-04:00"],
        np.array(["2022-01-15", "2022-03-01", "2022-07-04"], dtype=object),
        np.array([datetime(2022, 1, 15), datetime(2022, 3, 1), datetime(2022, 7, 4)], dtype=object),
        np.array([date(2022, 1, 15), date(2022, 3, 1), date(2022, 7, 4)], dtype=object),
        np.array([pd.Timestamp(d, tz="UTC") for d in ("2022-01-15", "2022-03-01", "2022-07-04")]),
        np.array(["2022-01-15", "2022-03-01", "2022-07-04"], "datetime64[D]"),
        np.array(["2022-01-15", "2022-03-01", "2022-07-04"], "datetime64[ns]"),
    ],
    ids=["ISO", "digits", "zones", "objects", "datetime", "date", "Timestamp", "days", "nanoseconds"],
)
def test_times_in_other_types(times: Any) -> None:
    got = read_cube(plain().assign_coords(time=("time", times))).array
    want = np.array(["2022-01-15", "2022-03-01", "2022-07-04"], "datetime64[s]")
    np.testing.assert_array_equal(got["time"].values.astype("datetime64[s]"), want)


def cftime_dates() -> np.ndarray:
    cftime = pytest.importorskip("cftime")
    return np.array([cftime.DatetimeNoLeap(2022, m, 1) for m in (1, 2, 3)], dtype=object)


@pytest.mark.parametrize(
    ("times", "says"),
    [
        ([19_000, 19_100, 19_200], "times of dtype int64"),
        ([2022.1, 2022.2, 2022.3], "times of dtype float64"),
        (["15/01/2022", "01/03/2022", "04/07/2022"], r"times of dtype <U10 \(\['15/01/2022'\]"),
        (np.array([2022, 2023, 2024], dtype=object), "times of dtype object"),
        (cftime_dates, "times of dtype object"),
        ([np.timedelta64(i, "D") for i in range(3)], "times of dtype timedelta64"),
        (np.array(["2022-01-15", "NaT", "2022-07-04"], "datetime64[ns]"), "1 of 3 times are NaT"),
    ],
    ids=["ints", "floats", "day first", "int objects", "cftime", "timedelta", "NaT"],
)
def test_what_is_no_date_is_refused(times: Any, says: str) -> None:
    times = times() if callable(times) else times
    with pytest.raises(CubeError, match=says):
        read_cube(plain().assign_coords(time=("time", times)))


# ---------------------------------------------------------------------- nodata


@pytest.mark.parametrize(
    ("dtype", "attrs", "encoding", "given", "want"),
    [
        ("uint16", {}, {}, None, 0),
        ("int16", {}, {}, None, 0),
        ("float32", {}, {}, None, np.nan),
        ("float64", {}, {}, None, np.nan),
        ("uint16", {"nodata": 65535}, {}, None, 65535),
        ("uint16", {"nodata": np.uint16(65535)}, {}, None, 65535),
        ("uint16", {"_FillValue": 65535}, {}, None, 65535),
        ("uint16", {"missing_value": [1]}, {}, None, 1),
        ("uint16", {"nodata": 0, "_FillValue": 65535}, {}, None, 0),
        ("uint16", {"nodata": None}, {}, None, 0),
        ("uint16", {}, {"_FillValue": 65535}, None, 65535),
        ("float32", {"nodata": -9999}, {}, None, -9999),
        ("float32", {"nodata": "nan"}, {}, None, np.nan),
        ("float32", {"nodata": np.nan}, {}, None, np.nan),
        # decoded by xarray: missing values are NaN, and the encoding's number is one of before
        ("float32", {}, {"_FillValue": 0, "scale_factor": 1.0, "add_offset": -1000.0}, None, np.nan),
        ("uint16", {"nodata": 0}, {}, 65535, 65535),
        ("float32", {"nodata": 0}, {}, np.nan, np.nan),
        ("float32", {"nodata": 0}, {}, "nan", np.nan),
        ("float32", {}, {}, -9999, -9999),
        ("uint16", {}, {}, np.uint16(7), 7),
        ("uint16", {}, {}, np.float32(7), 7),
    ],
)
@pytest.mark.parametrize("dataset", [False, True], ids=["DataArray", "Dataset"])
def test_nodata(
    dtype: str, attrs: dict[str, Any], encoding: dict[str, Any], given: Any, want: float, dataset: bool
) -> None:
    cube: Any = plain(dtype=dtype)
    if dataset:
        cube = cube.to_dataset("band")
    for var in cube.data_vars.values() if dataset else [cube]:
        var.attrs, var.encoding = dict(attrs), dict(encoding)
    assert same(read_cube(cube, nodata=given).nodata, want)


@pytest.mark.parametrize("given", ["0", True, [0], np.array([0]), 1j])
def test_nodata_is_a_number(given: Any) -> None:
    with pytest.raises(OptionError, match=r"nodata=.*: expected a number, or None"):
        read_cube(plain(), nodata=given)


@pytest.mark.parametrize("declared", ["none", [], {}])
def test_declared_nodata_is_a_number(declared: Any) -> None:
    with pytest.raises(CubeError, match=r"nodata=.* in the cube's metadata: expected a number.*nodata=0"):
        read_cube(plain().assign_attrs(nodata=declared))


def test_bands_may_differ_in_nodata() -> None:
    ds = odc_stac()
    ds["nir"] = ds["nir"].copy(data=np.where(ds["nir"] == ds["nir"][0, 0, 0], 65535, ds["nir"]))
    ds["nir"].attrs = {"nodata": 65535}
    ds["red"] = ds["red"].copy(data=np.where(ds["red"] == ds["red"][1, 1, 1], 0, ds["red"]))
    ds["red"].attrs = {"nodata": 0}
    ds["blue"] = ds["blue"].astype("float64").where(ds["blue"] != ds["blue"][2, 2, 2])
    ds["blue"].attrs = {}
    cube = read_cube(ds)
    want = placed().astype("float32").values
    want[0, 6, 0, 0] = want[1, 2, 1, 1] = want[2, 0, 2, 2] = np.nan
    np.testing.assert_array_equal(cube.array.values, want)
    assert np.isnan(cube.nodata)
    with no_compute():
        assert np.isnan(read_cube(unreadable(ds)).nodata)


def test_bands_may_differ_in_dtype() -> None:
    ds = odc_stac()
    ds["swir22"] = ds["swir22"].astype("int16").assign_attrs(nodata=0)
    cube = read_cube(ds)
    np.testing.assert_array_equal(cube.array.values, placed().values)
    assert cube.nodata == 0


@pytest.mark.parametrize(
    ("values", "nodata", "there"),
    [
        (np.array([0, 1, 65535], "uint16"), 0.0, [False, True, True]),
        (np.array([0, 1, 65535], "uint16"), 65535.0, [True, True, False]),
        (np.array([0, 1, 65535], "uint16"), np.nan, [True, True, True]),
        (np.array([0, 1, 7], "uint8"), -9999.0, [True, True, True]),
        (np.array([-9999, np.nan, 3], "float32"), -9999.0, [False, False, True]),
        (np.array([0, np.inf, -np.inf], "float64"), np.nan, [True, False, False]),
    ],
)
def test_what_is_missing(values: np.ndarray, nodata: float, there: list[bool]) -> None:
    assert valid_pixels(values, nodata).tolist() == there
    blank = blank_missing(values, nodata)
    assert blank.dtype == np.float32
    np.testing.assert_array_equal(blank, np.where(there, values, np.nan).astype("float32"))


@pytest.mark.parametrize("dtype", ["complex64", "bool", "datetime64[s]", "object", "<U4"])
def test_values_are_numbers(dtype: str) -> None:
    with pytest.raises(CubeError, match=r"values of dtype .*: expected integers or floats, cast"):
        read_cube(plain().astype(dtype))


# ---------------------------------------------------------------------- grid and coords


@pytest.mark.parametrize("flip", [{"y": -1}, {"x": -1}, {"y": -1, "x": -1}])
@pytest.mark.parametrize("dtype", ["float64", "int32", "uint32"])
def test_north_is_up_and_west_is_left(flip: dict[str, int], dtype: str) -> None:
    cube = placed().isel({d: slice(None, None, s) for d, s in flip.items()})
    cube = cube.assign_coords(y=cube["y"].astype(dtype), x=cube["x"].astype(dtype))
    got = read_cube(cube)
    assert_is_the_cube(got, placed())
    assert got.geobox == GRID


def test_a_flipped_cube_does_not_keep_its_old_transform() -> None:
    import rioxarray  # noqa: F401

    cube = placed().isel(y=slice(None, None, -1)).rio.write_transform()
    got = read_cube(cube).array
    assert tuple(got.rio.transform())[:6] == (10, 0, LEFT, 0, -10, TOP)


def test_plain_arrays_have_no_grid() -> None:
    got = read_cube(plain())
    assert_is_the_cube(got, plain())
    assert got.geobox is None
    meters = plain().assign_coords(y=np.arange(HEIGHT) * 10.0, x=np.arange(WIDTH) * 10.0)
    assert read_cube(meters).geobox is None


@pytest.mark.parametrize("corner", [(0.0, 0.0), (12.5, -3.0), (600_004.99, 4_999_995.01)])
def test_geobox_is_that_of_the_coordinates(corner: tuple[float, float]) -> None:
    left, top = corner
    cube = placed()
    cube = cube.assign_coords(x=cube["x"] - LEFT + left, y=cube["y"] - TOP + top)
    box = read_cube(cube).geobox
    assert box is not None
    assert (box.shape, box.crs) == ((HEIGHT, WIDTH), GRID.crs)
    assert tuple(box.affine)[:6] == pytest.approx((10, 0, left, 0, -10, top), abs=1e-9)


@pytest.mark.parametrize("shape", [(1, 1), (1, WIDTH), (HEIGHT, 1)])
@pytest.mark.parametrize("hint", ["nothing", "GeoTransform"])
def test_single_rows_columns_and_pixels(shape: tuple[int, int], hint: str) -> None:
    import rioxarray  # noqa: F401

    cube = placed()
    if hint == "GeoTransform":
        cube = cube.rio.write_transform()
    got = read_cube(cube.isel(y=slice(shape[0]), x=slice(shape[1])))
    assert got.geobox == GeoBox(shape, GRID.affine, CRS)


def test_a_single_pixel_of_another_size_is_refused() -> None:
    import rioxarray  # noqa: F401

    cube = placed().isel(y=[0], x=[0]).rio.write_transform(Affine(60, 0, LEFT, 0, -60, TOP))
    with pytest.raises(CubeError, match="pixels of 60 × 60 m"):
        read_cube(cube)


@pytest.mark.parametrize("part", [{}, {"y": slice(1, None), "x": slice(2, 4)}, {"y": [2], "x": [3]}])
@pytest.mark.parametrize("xy_coords", ["topleft", "center"])
def test_stackstac_labels_corners_or_centres(part: dict[str, Any], xy_coords: str) -> None:
    got = read_cube(stackstac(xy_coords=xy_coords).isel(part)).geobox
    assert got == read_cube(placed().isel(part)).geobox


@pytest.mark.parametrize("transform", [None, "10 0 600000", (1, 2), (20.0, 0.0, LEFT, 0.0, -20.0, TOP)])
def test_other_transforms_in_attrs_move_nothing(transform: Any) -> None:
    assert read_cube(placed().assign_attrs(transform=transform)).geobox == GRID


@pytest.mark.parametrize(
    "crs",
    [
        CRS,
        "epsg:32632",
        32632,
        np.int64(32632),
        pytest.param(lambda: GRID.crs.to_wkt(), id="WKT"),
        pytest.param(lambda: GRID.crs.proj, id="pyproj"),
        pytest.param(lambda: GRID.crs, id="odc"),
    ],
)
@pytest.mark.filterwarnings("ignore:Ignoring crs attribute of type")
def test_crs_in_attrs(crs: Any) -> None:
    cube = centred().assign_attrs(crs=crs() if callable(crs) else crs)
    assert read_cube(cube).geobox == GRID
    assert read_cube(cube.to_dataset("band").assign_attrs(cube.attrs)).geobox == GRID


def test_crs_of_rioxarray() -> None:
    import rioxarray  # noqa: F401

    cube = centred().rio.write_crs(CRS)
    assert read_cube(cube).geobox == GRID
    named = centred().rio.write_crs(CRS, grid_mapping_name="crs")
    assert read_cube(named).geobox == GRID


def test_a_crs_that_cannot_be_understood_is_refused() -> None:
    cube = centred().assign_attrs(crs="EPSG:0")
    with pytest.raises(CubeError, match=r"CRS 'EPSG:0' cannot be parsed.*odc\.assign_crs\('EPSG:32632'\)"):
        read_cube(cube)


REPROJECT = r"pixels of 10 m in a projected CRS.*odc\.reproject\('utm', resolution=10\)"


def with_steps(y: float, x: float) -> xr.DataArray:
    return placed().assign_coords(y=TOP - y * np.arange(HEIGHT), x=LEFT + x * np.arange(WIDTH))


def rotated() -> xr.DataArray:
    from odc.geo.xr import xr_coords

    return plain().assign_coords(xr_coords(GRID.rotate(30)))


@pytest.mark.parametrize(
    ("cube", "says"),
    [
        (lambda: with_steps(20, 20), "pixels of 20 × 20 m"),
        (lambda: with_steps(10, 20), r"pixels of 10 × 20 m \(y × x\)"),
        (lambda: with_steps(10, 10.5), "pixels of 10 × 10.5 m"),
        (lambda: with_steps(10, 10.3), "pixels of 10 × 10.3 m"),
        (lambda: placed(crs="EPSG:4326"), r"pixels in degrees \(EPSG:4326\)"),
        (lambda: placed(crs="EPSG:2263"), r"a CRS in US survey foot \(EPSG:2263\)"),
        (lambda: placed().assign_coords(x=[0, 10, 20, 30, 50]), "'x' coordinates are not evenly spaced"),
        (lambda: placed().assign_coords(y=[30, 20, 20, 10]), "'y' coordinates are not evenly spaced"),
        (rotated, "a rotated grid"),
        (
            lambda: plain().assign_coords(
                y=46 - 1e-4 * np.arange(HEIGHT), x=11 + 1e-4 * np.arange(WIDTH)
            ),
            r"no CRS, and coordinates that look like degrees \(y 46 to 45.9997, x 11 to 11.0004\)",
        ),
        (
            lambda: plain()
            .rename(y="lat", x="lon")
            .assign_coords(lat=-33 + 9e-5 * np.arange(HEIGHT), lon=-70 + 9e-5 * np.arange(WIDTH)),
            r"look like degrees \(y -33 to",
        ),
    ],
)  # fmt: skip
def test_other_grids_are_refused(cube: Callable[[], xr.DataArray], says: str) -> None:
    with pytest.raises(CubeError, match=says + ".*" + REPROJECT):
        read_cube(cube())


def test_pixels_that_are_nearly_10_m_may_not_drift_away() -> None:
    wide = placed(dates=DATES[:1], height=1, width=1000)
    drifting = wide.assign_coords(x=LEFT + 5 + 10.005 * np.arange(1000))
    with pytest.raises(CubeError, match=r"pixels of 10 × 10\.005 m"):
        read_cube(drifting)
    rounded = wide.assign_coords(x=LEFT + 5 + 10.0000001 * np.arange(1000))
    assert read_cube(rounded).geobox == GeoBox((1, 1000), GRID.affine, CRS)


def test_a_crs_needs_coordinates() -> None:
    for lost in ("y", "x"):
        with pytest.raises(CubeError, match=rf"a CRS \(EPSG:32632\) but no '{lost}' coordinates.*drop_vars"):
            read_cube(placed().drop_vars(lost))


def test_coords_of_bands_go_and_others_stay() -> None:
    cube = stackstac().assign_coords(orbit=7, lat=(("y", "x"), np.zeros((HEIGHT, WIDTH))))
    got = read_cube(cube).array.coords
    assert {"title", "gsd", "common_name"}.isdisjoint(got)
    assert got["platform"].item() == "sentinel-2a"
    assert got["epsg"].item() == 32632
    assert got["orbit"].item() == 7
    assert got["lat"].dims == ("y", "x")
    assert list(got["id"].values) == ["S2A_0", "S2A_1", "S2A_2"]


# ---------------------------------------------------------------------- offsets


@pytest.mark.parametrize("dataset", [False, True])
def test_an_offset_that_nobody_applied_is_warned_of(dataset: bool) -> None:
    cube: Any = placed().assign_attrs(add_offset=-1000.0)
    if dataset:
        cube = odc_stac()
        cube["red"].attrs["add_offset"] = -1000.0
    with pytest.warns(AnySatWarning, match=r"add_offset=\[-1000.0\], which was not applied.*subtract 1000"):
        got = read_cube(cube)
    assert_is_the_cube(got, placed())


def test_no_offset_no_warning() -> None:
    read_cube(placed().assign_attrs(add_offset=0.0, scale_factor=1.0))


def test_the_bands_are_public_and_are_those_of_the_sensor() -> None:
    assert xr_anysat.BANDS == S2.bands == BANDS
    assert sorted(S2.common_names.values()) == sorted(BANDS)
    assert SENSORS[S2.projector].channels == len(BANDS)


def test_web_mercator_is_taken_with_a_warning() -> None:
    """Its meters are those of the equator: 10 m are 6.4 m at 50 degrees north."""
    y = 6_446_275.0 - 10 * np.arange(6)
    x = 1_113_195.0 + 10 * np.arange(6)
    import odc.geo.xr  # noqa: F401

    cube = xr.DataArray(
        np.full((2, 10, 6, 6), 1000, "uint16"),
        dims=("time", "band", "y", "x"),
        coords={
            "time": np.array(["2022-03-01", "2022-07-01"], "datetime64[ns]"),
            "band": list(xr_anysat.BANDS), "y": y, "x": x,
        },
    ).odc.assign_crs("EPSG:3857")  # fmt: skip
    with pytest.warns(
        xr_anysat.AnySatWarning, match=r"10 m of this CRS \(EPSG:3857\) are 6\.4 m on the ground"
    ):
        read_cube(cube)


# ---------------------------------------------------------------------- what cannot be a time, place or band


FAR = np.array(["100000-01-01", "100000-02-01", "100000-03-01"], "datetime64[s]")


@pytest.mark.parametrize(
    ("times", "says"),
    [
        (
            FAR,
            r"times from 100000-01-01T00:00:00 to 100000-03-01T00:00:00: expected .* years 1 to 9999.*unit='s'",
        ),
        (FAR - np.timedelta64(105_000 * 365, "D"), r"times from -\d+-.*expected .* years 1 to 9999"),
    ],
)
def test_times_that_are_no_dates_are_refused(times: np.ndarray, says: str) -> None:
    cube = placed().isel(time=[0, 0, 0]).assign_coords(time=times)
    with pytest.raises(CubeError, match=says):
        cube.anysat.frames(2)


@pytest.mark.parametrize("make", [placed, plain], ids=["CRS", "no CRS"])
@pytest.mark.parametrize("dim", ["x", "y"])
@pytest.mark.parametrize("count", [1, None], ids=["one", "all"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_coordinates_that_are_not_finite_are_refused(
    make: Callable[[], xr.DataArray], dim: str, count: int | None, wrong: float
) -> None:
    cube = make()
    values = np.arange(cube.sizes[dim], dtype=float) * 10
    values[:count] = wrong
    with pytest.raises(
        CubeError,
        match=rf"\d of {values.size} '{dim}' coordinates are NaN or infinite.*assign_coords\({dim}=",
    ):
        cube.assign_coords({dim: values}).anysat.frames(2)


@pytest.mark.parametrize("make", [placed, plain], ids=["CRS", "no CRS"])
@pytest.mark.parametrize("dtype", [str, complex, "datetime64[D]", bool])
def test_coordinates_that_are_not_numbers_are_refused(make: Callable[[], xr.DataArray], dtype: Any) -> None:
    cube = make()
    values = np.arange(cube.sizes["x"]).astype(dtype)
    with pytest.raises(CubeError, match=r"'x' coordinates of dtype .*: expected numbers.*drop_vars\('x'\)"):
        cube.assign_coords(x=values).anysat.frames(2)


def test_a_place_that_the_crs_does_not_cover_is_refused() -> None:
    cube = placed()
    with pytest.raises(CubeError, match=r"x=1e\+09, .* are outside of the CRS \(EPSG:32632\): check the CRS"):
        cube.assign_coords(x=1e9 + 10.0 * np.arange(cube.sizes["x"])).anysat.frames(2)


# ---------------------------------------------------------------------- what scaled or classified values mean


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_8_bit_values_cause_a_warning(dtype: str) -> None:
    cube = (placed() % 100).astype(dtype)
    with pytest.warns(
        AnySatWarning, match=rf"values of dtype {dtype}: expected digital numbers.*load the original"
    ):
        read = read_cube(cube)
    np.testing.assert_array_equal(read.array.values, cube.values)


def classified(name: str) -> xr.DataArray:
    cube = placed()
    return xr.concat([cube, xr.full_like(cube.isel(band=0), 4).assign_coords(band=name)], "band")


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: odc_stac(scl=True), "scl"),
        (openeo, "S2-L2A-SCL"),
        (lambda: odc_stac(scl=True).rename(scl="SCL_20m"), "SCL_20m"),
        (lambda: classified("SCL"), "SCL"),
    ],
    ids=["odc-stac", "openEO", "CDSE", "bands"],
)
def test_an_unused_classification_causes_a_warning_whose_remedy_works(
    make: Callable[[], xr.DataArray | xr.Dataset], name: str
) -> None:
    cube = make()
    with pytest.warns(AnySatWarning, match=rf"the scene classification '{name}' is not used") as caught:
        read_cube(cube)
    assert len(caught) == 1
    remedy = re.search(r"e\.g\. (cube\..*)\.anysat", str(caught[0].message))
    assert remedy is not None
    masked = eval(remedy[1], {"cube": cube})  # 4, vegetation, stays
    assert_is_the_cube(read_cube(masked, nodata=float("nan")), placed().astype("float64"))

"""`embed_at`: the same as the map, from only the windows that hold a place."""

from __future__ import annotations

import json
from typing import Any

import dask
import geopandas as gpd
import numpy as np
import odc.geo.xr  # noqa: F401
import pandas as pd
import pytest
import shapely
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cubes import CRS, small_cube

import xr_anysat
from xr_anysat.errors import CubeError, CubeTypeError, OptionError
from xr_anysat.model.anysat import AnySat

LEFT, TOP = 600_050, -5_000_030  # of small_cube

OPTIONS: dict[str, Any] = {
    "frames": 2,
    "period": "2022",
    "norm": "pastis",
    "model": "tiny",
    "weights": "random",
}


def points_of(*xy: tuple[float, float]) -> gpd.GeoSeries:
    """Points, in meters from the corner of the cube."""
    return gpd.GeoSeries([shapely.Point(LEFT + x, TOP - y) for x, y in xy], crs=CRS)


def vectors(table: gpd.GeoDataFrame) -> np.ndarray:
    return np.stack(table["embedding"])


geometries = st.one_of(
    st.builds(lambda x, y: shapely.Point(LEFT + x, TOP - y), st.floats(-30, 630), st.floats(-30, 530)),
    st.builds(
        lambda x, y, size, hole: (
            shapely.Point(LEFT + x, TOP - y)
            .buffer(size)
            .difference(shapely.Point(LEFT + x, TOP - y).buffer(hole * size))
        ),
        st.floats(-30, 630),
        st.floats(-30, 530),
        st.sampled_from([2.0, 35.0, 120.0]),
        st.sampled_from([0.0, 0.6]),
    ),
)
shapes_of_windows = st.sampled_from(
    [
        {"output": "patch", "tile": 12}, {"output": "patch", "tile": 16, "patch_size": 40, "overlap": 8},
        {"output": "dense", "tile": 12, "patch_size": 20}, {"output": "dense", "tile": 12, "overlap": 6},
        {"output": "local", "tile": 12}, {"output": "tile", "tile": 12, "patch_size": 40},
    ]
)  # fmt: skip


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    st.lists(geometries, min_size=1, max_size=5),
    shapes_of_windows,
    st.sampled_from(["grid", "cube"]),
    st.sampled_from([None, {"time": 1, "y": 20, "x": 60}, {"time": -1, "y": 17, "x": 13}]),
    st.sampled_from(["pastis", "per_tile_zscore", "unit_scale"]),
)
def test_the_same_as_the_map(
    shapes: list[Any], windows: dict[str, Any], anchor: str, chunks: dict[str, int] | None, norm: str
) -> None:
    cube = small_cube(height=50, width=60)
    emb = cube.anysat.embed(**{**OPTIONS, **windows, "anchor": anchor, "norm": norm})
    series = gpd.GeoSeries(shapes, crs=CRS)
    lazy = cube if chunks is None else cube.chunk(chunks)
    got = lazy.anysat.embed_at(series, **{**OPTIONS, **windows, "anchor": anchor, "norm": norm})
    is_point = (series.geom_type == "Point").values
    for which, want in ((is_point, emb.anysat.sample), (~is_point, emb.anysat.zonal)):
        if which.any():
            table = want(series[which])
            np.testing.assert_array_equal(vectors(got[which]), table.filter(like="emb_").values)
            assert got[which]["status"].tolist() == table["status"].tolist()


def test_the_table_is_kept() -> None:
    """Rows, order, index, duplicates, columns, CRS and the name of the geometry."""
    cube = small_cube(height=50, width=60, gaps=0)
    cube = cube.astype("float32")
    cube[..., :12, :12] = np.nan
    shapes = [
        *points_of((305, 205), (-5, 5), (15, 15), (305, 205)),
        None,
        shapely.Point(),
        shapely.box(0, 0, 1, 1),
    ]
    table = gpd.GeoDataFrame(
        {"kind": list("abcdefg"), "where": gpd.GeoSeries(shapes, crs=CRS).to_crs(4326).values},
        geometry="where",
        index=pd.Index([5, 5, 1, 0, 9, 3, 2], name="id"),
    )
    table.attrs = {"of": "the user"}
    before = table.copy()
    got = cube.anysat.embed_at(table, **OPTIONS, tile=12, anchor="cube")
    pd.testing.assert_frame_equal(pd.DataFrame(table), pd.DataFrame(before))
    pd.testing.assert_frame_equal(pd.DataFrame(got[["kind", "where"]]), pd.DataFrame(table))
    assert got.crs == table.crs
    assert got.geometry.name == "where"
    assert got["status"].tolist() == ["ok", "outside", "invalid", "ok", "outside", "outside", "outside"]
    assert vectors(got).dtype == np.float32
    np.testing.assert_array_equal(vectors(got)[0], vectors(got)[3])
    assert np.isnan(vectors(got)[[1, 2, 4, 5, 6]]).all()
    assert got.attrs["of"] == "the user"
    record = json.loads(got.attrs["embedding"])
    again = cube.anysat.embed(**json.loads(record["config"]))
    np.testing.assert_array_equal(vectors(got)[0], again.values[:, 20, 30])
    whole = cube.anysat.embed(**OPTIONS, tile=12, anchor="cube")
    assert {k: v for k, v in record.items() if k != "device"} == {
        k: v for k, v in json.loads(json.dumps(whole.attrs)).items() if k != "device"
    }


def test_forms_of_cubes() -> None:
    cube = small_cube(height=50, width=60)
    series = points_of((305, 205), (15, 15))
    want = vectors(cube.anysat.embed_at(series, **OPTIONS))
    dataset = cube.to_dataset("band")
    np.testing.assert_array_equal(vectors(dataset.anysat.embed_at(series, **OPTIONS)), want)
    composed = cube.anysat.frames(2, period="2022")
    options = {**OPTIONS, "frames": None, "period": None}
    np.testing.assert_array_equal(vectors(composed.anysat.embed_at(series, **options)), want)
    assert cube.anysat.embed_at(series.iloc[:0], **OPTIONS).empty


@pytest.mark.parametrize("overlap", [0, 6])
def test_only_the_windows_of_places_are_computed(overlap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cube = small_cube(height=96, width=96, gaps=0)
    calls = []

    def count(name: str) -> None:
        real = getattr(AnySat, name)

        def counted(self: AnySat, x: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return real(self, x, *args, **kwargs)

        monkeypatch.setattr(AnySat, name, counted)

    count("windows" if overlap else "encode")
    # two points in one window, one in another, and a polygon over two others; windows start every 12 or 6 pixels
    places = [
        *points_of((5, 5), (115, 115), (605, 605)),
        shapely.box(LEFT + 210, TOP - 400, LEFT + 270, TOP - 390),
    ]
    cube.chunk(y=50, x=50).anysat.embed_at(
        gpd.GeoSeries(places[2:] if overlap else places, crs=CRS),
        **OPTIONS,
        tile=12,
        anchor="cube",
        overlap=overlap,
    )
    # a square of 6 pixels is in 2 × 2 windows; the polygon is in one row and two columns of squares
    assert len(calls) == (4 + 2 * 3 if overlap else 4)


def test_only_the_chunks_of_places_are_read() -> None:
    cube = small_cube(height=96, width=96, gaps=0)
    read = set()

    def block(values: np.ndarray, block_info: Any = None) -> np.ndarray:
        read.add(tuple(block_info[0]["chunk-location"][2:]))
        return values

    lazy = cube.chunk(y=24, x=24)
    lazy = lazy.copy(data=lazy.data.map_blocks(block, dtype=cube.dtype, meta=np.empty((0,) * 4, cube.dtype)))
    with dask.config.set(scheduler="synchronous"):
        read.clear()
        lazy.anysat.embed_at(points_of((5, 5), (605, 605)), **OPTIONS, tile=12, anchor="cube")
        assert read == {(0, 0), (2, 2)}
        read.clear()
        lazy.anysat.embed_at(points_of((-5, 5)), **OPTIONS, tile=12, anchor="cube")
        assert read == set()


@pytest.mark.parametrize(
    ("places", "options", "error", "words"),
    [
        ([1], {}, OptionError, r"places is a list: expected a GeoDataFrame"),
        (gpd.GeoSeries([shapely.LineString([(0, 0), (1, 1)])], crs=CRS), {}, OptionError,
         "places contain LineString: expected only Point or Polygon or MultiPolygon"),
        (gpd.GeoSeries([shapely.Point(0, 0)]), {}, OptionError, r"places have no CRS: set it, places\.set_crs"),
        (gpd.GeoSeries([shapely.Polygon([(0, 0), (9, 9), (9, 0), (0, 9)])], crs=CRS), {}, OptionError,
         r"places cross themselves at index \[0\]"),
        (points_of((5, 5)).to_frame("geometry").assign(status=1), {}, OptionError, "columns 'status' of places"),
        (points_of((5, 5)), {"pool": "mean"}, OptionError, "pool='mean' has no meaning in embed_at"),
        (points_of((5, 5)), {"patch_size": 7}, OptionError, "patch_size=7"),
    ],
)  # fmt: skip
def test_refusals(places: Any, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        small_cube(height=24, width=24).anysat.embed_at(places, **{**OPTIONS, **options})


def test_cubes_that_cannot_be_used() -> None:
    cube = small_cube(height=24, width=24)
    bare = xr.DataArray(cube.values, cube.coords["time"].coords, cube.dims).assign_coords(
        band=cube.band.values
    )
    with pytest.raises(CubeError, match="no 'y' coordinates"):
        bare.anysat.embed_at(points_of((5, 5)), **OPTIONS)
    with pytest.raises(CubeTypeError, match="expected a Sentinel-2 cube"):
        cube.anysat.embed(**OPTIONS).anysat.embed_at(points_of((5, 5)))
    with pytest.raises(TypeError, match="unexpected keyword argument 'tiles'"):
        xr_anysat.embed_at(cube, points_of((5, 5)), tiles=4)  # type: ignore[call-arg]

"""`nearest`: exact, in any chunks, over cubes, stores and tables."""

from __future__ import annotations

import json
from pathlib import Path
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
from support.cubes import small_cube

import xr_anysat
from xr_anysat.errors import CubeError, CubeTypeError, OptionError, StoreError

LEFT, TOP, CRS = 600_000, 5_000_000, "EPSG:32632"


def cube_of(values: np.ndarray) -> xr.DataArray:
    """Cells of 10 m."""
    y, x = (10.0 * np.arange(n) + 5 for n in values.shape[1:])
    coords = {"y": TOP - y, "x": LEFT + x}
    return xr.DataArray(values.astype("float32"), coords, ("D", "y", "x"), "anysat").odc.assign_crs(CRS)


@pytest.fixture(scope="module")
def emb() -> xr.DataArray:
    rng = np.random.default_rng(0)
    values = rng.integers(-3, 4, (6, 20, 30)).astype(float)  # few values, so that scores are equal
    values[:, 3:6, 4:9] = np.nan
    values[:, 10, 10] = 0
    return cube_of(values)


def brute(emb: xr.DataArray, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All cells by score, then by row and column: their numbers and scores."""
    flat = emb.values.reshape(emb.sizes["D"], -1).astype(float)
    with np.errstate(invalid="ignore", divide="ignore"):
        score = direction @ flat / np.sqrt((flat**2).sum(0))
    cells = np.nonzero(np.isfinite(score))[0]
    order = np.lexsort((cells, -np.round(score[cells], 12)))
    return cells[order], score[cells[order]]


def unit(vectors: Any) -> np.ndarray:
    vectors = np.atleast_2d(vectors).astype(float)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).mean(0)


def cells_of(found: gpd.GeoDataFrame, emb: xr.DataArray) -> np.ndarray:
    rows, cols = (TOP - found.geometry.y.values) // 10, (found.geometry.x.values - LEFT) // 10
    return (rows * emb.sizes["x"] + cols).astype(int)


@pytest.mark.parametrize("chunks", [None, {"y": 7, "x": 11}, {"D": 2, "y": 20, "x": 3}])
@pytest.mark.parametrize("k", [1, 17, 10_000])
def test_it_is_exact(emb: xr.DataArray, chunks: Any, k: int) -> None:
    to, other = np.arange(6) - 2.0, np.ones(6)
    data = emb if chunks is None else emb.chunk(chunks)
    found = data.anysat.nearest(to, k, negative=other)
    cells, scores = brute(emb, unit(to) - unit(other))
    np.testing.assert_allclose(found["score"], scores[:k], rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(np.sort(found["score"])[::-1], found["score"])
    whole = emb.anysat.nearest(to, k, negative=other)
    pd.testing.assert_frame_equal(pd.DataFrame(found), pd.DataFrame(whole))
    if k == 10_000:
        assert sorted(cells_of(found, emb)) == sorted(cells)
    assert found.crs == CRS


def test_ties_are_in_the_order_of_rows_and_columns() -> None:
    emb = cube_of(np.ones((3, 9, 11)))
    for data in (emb, emb.chunk(y=2, x=4)):
        assert cells_of(data.anysat.nearest(np.ones(3), 25), emb).tolist() == list(range(25))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([15.0, 40.0, 100.0, 1e6]), st.integers(1, 40))
def test_results_that_are_apart(seed: int, apart: float, k: int) -> None:
    """Taken in order of score, each at least so far from all before it."""
    emb = cube_of(np.random.default_rng(seed).normal(size=(4, 20, 30)))
    found = emb.chunk(y=6, x=9).anysat.nearest(np.ones(4), k, apart=apart)
    every = emb.anysat.nearest(np.ones(4), 600)
    chosen: list[int] = []
    x, y = every.geometry.x.values, every.geometry.y.values
    for n in range(600):
        if len(chosen) < k and all(np.hypot(x[n] - x[m], y[n] - y[m]) >= apart for m in chosen):
            chosen.append(n)
    np.testing.assert_array_equal(found["score"], every["score"].values[chosen])
    np.testing.assert_array_equal(found.geometry.x, x[chosen])


def test_examples_on_a_cube(emb: xr.DataArray) -> None:
    """Points and polygons in any CRS; a place finds itself first."""
    at = (LEFT + 155.0, TOP - 155.0)
    vector = emb.values[:, 15, 15]
    want = emb.anysat.nearest(vector, 5)
    assert want["score"].iloc[0] == pytest.approx(1)
    point = shapely.Point(at)
    for to in (
        at,
        point,
        gpd.GeoSeries([point], crs=CRS).to_crs(4326),
        gpd.GeoDataFrame(geometry=[point], crs=CRS),
    ):
        pd.testing.assert_frame_equal(pd.DataFrame(emb.anysat.nearest(to, 5)), pd.DataFrame(want))
    two = gpd.GeoSeries([point, shapely.box(LEFT, TOP - 20, LEFT + 20, TOP)], crs=CRS)
    mean = emb.values[:, :2, :2].reshape(6, -1).mean(1)
    np.testing.assert_allclose(
        emb.anysat.nearest(two, 5)["score"], brute(emb, unit([vector, mean]))[1][:5], rtol=1e-6
    )
    table = emb.anysat.nearest([vector.tolist(), mean.tolist()], 5)
    np.testing.assert_allclose(table["score"], emb.anysat.nearest(two, 5)["score"], rtol=1e-6)


def test_stores_and_tables(tmp_path: Path) -> None:
    """A path of a store or a table, or a table in memory; rows keep their columns."""
    cube = small_cube(height=48, width=48, dtype="float32")
    options = {
        "frames": 2,
        "period": "2022",
        "norm": "pastis",
        "model": "tiny",
        "weights": "random",
        "anchor": "grid",
    }
    emb = cube.anysat.embed(patch_size=40, tile=24, **options)
    emb.anysat.to_zarr(tmp_path / "area.zarr")
    want = emb.anysat.nearest(emb.values[:, 3, 4], 7)
    got = xr_anysat.nearest(tmp_path / "area.zarr", emb.values[:, 3, 4], 7)
    pd.testing.assert_frame_equal(pd.DataFrame(got), pd.DataFrame(want))

    rng = np.random.default_rng(0)
    at = gpd.points_from_xy(600_050 + rng.uniform(-50, 480, 40), -5_000_030 - rng.uniform(0, 480, 40))
    points = gpd.GeoDataFrame(
        {"name": [f"p{i}" for i in range(40)]}, geometry=at, crs=CRS, index=range(100, 140)
    )
    table = cube.anysat.embed_at(points, patch_size=40, tile=24, **options)
    found = xr_anysat.nearest(table, table.iloc[[5]], 6)
    assert found["name"].iloc[0] == table.loc[found.index[0], "name"]
    assert found["score"].iloc[0] == pytest.approx(1)
    assert list(found.columns) == [*table.columns, "score"]
    assert (found["status"] == "ok").all()
    ok = np.stack(table["embedding"][table["status"] == "ok"]).astype(float)
    scores = ok @ unit(table["embedding"].iloc[5]) / np.linalg.norm(ok, axis=1)
    np.testing.assert_allclose(found["score"], np.sort(scores)[::-1][:6], rtol=1e-12)
    away = xr_anysat.nearest(table.to_crs(4326), table.iloc[[5]], 6, apart=150)
    shapes = away.geometry.to_crs(CRS)
    assert min(a.distance(b) for i, a in enumerate(shapes) for b in shapes.iloc[:i]) > 149
    other = cube.anysat.embed_at(points, patch_size=20, tile=24, **options)
    with pytest.raises(CubeError, match=r"nearest\(\) of embeddings with different settings: .*patch_size"):
        xr_anysat.nearest(table, other.iloc[[5]])
    with pytest.raises(
        OptionError, match=r"to is a place, and data is a table: expected rows .*table\.iloc\[\[0\]\]"
    ):
        xr_anysat.nearest(table, shapely.Point(0, 0))
    assert json.loads(found.attrs["embedding"])["model"] == "tiny"


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda e: e.anysat.nearest(np.ones(6), 0), OptionError, "k=0: expected a positive whole number"),
        (lambda e: e.anysat.nearest(np.ones(6), apart=-1), OptionError, "apart=-1: expected meters"),
        (lambda e: e.anysat.nearest(np.ones(6), 1000, apart=10_000), OptionError, None),
        (lambda e: e.anysat.nearest(np.ones(5)), OptionError, r"to has the shape \(1, 5\).*vectors of 6 finite"),
        (lambda e: e.anysat.nearest(np.full(6, np.nan)), OptionError, "values that are not finite"),
        (lambda e: e.anysat.nearest(np.zeros(6)), OptionError, "to contains a vector of zeros"),
        (lambda e: e.anysat.nearest(np.ones(6), negative=np.zeros(6)), OptionError, "negative contains a vector"),
        (lambda e: e.anysat.nearest("here"), OptionError, "to='here': expected a place"),
        (lambda e: e.anysat.nearest((0, 0)), OptionError, "to: of 1 places, 1 are outside the cube.*600000, 4999800"),
        (lambda e: e.anysat.nearest((LEFT + 55, TOP - 45)), OptionError, "nothing was observed at 1"),
        (lambda e: e.anysat.nearest(gpd.GeoSeries([shapely.Point(0, 0)])), OptionError, "to have no CRS"),
        (lambda e: xr_anysat.nearest(gpd.GeoDataFrame(), np.ones(6)), OptionError, "expected a column 'embedding'"),
        (lambda e: xr_anysat.nearest(small_cube(), np.ones(6)), CubeTypeError, "nearest"),
        (lambda e: xr_anysat.nearest("/nowhere/x.zarr", np.ones(6)), StoreError, "nowhere"),
    ],
)  # fmt: skip
def test_refusals(emb: xr.DataArray, call: Any, error: type[Exception], words: str | None) -> None:
    if words is None:  # a small cube limits the candidates
        assert len(call(emb)) == 1
        return
    with pytest.raises(error, match=words):
        call(emb)


def test_too_many_candidates_are_refused() -> None:
    import dask.array as da

    data = da.zeros((4, 100_000, 100_000), chunks=(4, 1000, 1000), dtype="float32")
    coords = {"y": TOP - 5 - 10.0 * np.arange(100_000), "x": LEFT + 5 + 10.0 * np.arange(100_000)}
    emb = xr.DataArray(data, coords, ("D", "y", "x")).odc.assign_crs(CRS)
    with (
        dask.config.set(scheduler=lambda *a, **k: pytest.fail("computed")),
        pytest.raises(OptionError, match=r"apart=10000 and k=100: up to .* cells would have to be compared"),
    ):
        emb.anysat.nearest(np.ones(4), apart=10_000)

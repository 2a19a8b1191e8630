"""Comparing embeddings on the same labels, folds and learner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pytest
import xarray as xr
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from support.cubes import CRS, LEFT, TOP

import xr_anysat
from xr_anysat import AnySatWarning, CubeError, CubeTypeError, OptionError


def cube_of(values: np.ndarray, side: float = 10.0, crs: str = CRS, **attrs: Any) -> xr.DataArray:
    import odc.geo.xr  # noqa: F401

    y, x = (side * (np.arange(n) + 0.5) for n in values.shape[-2:])
    dims = ("time", "band", "y", "x") if values.ndim == 4 else ("D", "y", "x")
    return xr.DataArray(values, {"y": TOP - y, "x": LEFT + x}, dims, attrs=attrs).odc.assign_crs(crs)


@pytest.fixture(scope="module")
def emb() -> xr.DataArray:
    return cube_of(np.random.default_rng(0).normal(size=(6, 40, 40)).astype("float32"))


@pytest.fixture(scope="module")
def other() -> xr.DataArray:
    """On another grid, without what `emb` has in its first channel."""
    return cube_of(np.random.default_rng(1).normal(size=(4, 20, 20)).astype("float32"), 20.0)


@pytest.fixture(scope="module")
def points(emb: xr.DataArray) -> gpd.GeoDataFrame:
    rng = np.random.default_rng(2)
    rows, cols = np.unravel_index(rng.choice(1600, 120, replace=False), (40, 40))
    at = gpd.points_from_xy(emb.x.values[cols], emb.y.values[rows], crs=CRS)
    found = emb.values[:, rows, cols]
    table = {
        "kind": np.where(found[0] + found[1] > 0, "a", "b"), "v": found[0] * 2 + rng.normal(size=120) * 0.1,
        "region": np.where(cols < 20, "west", "east"), "row": rows, "col": cols,
    }  # fmt: skip
    return gpd.GeoDataFrame(table, geometry=at).to_crs("EPSG:4326")


def test_it_is_scikit_learn_by_hand(
    emb: xr.DataArray, other: xr.DataArray, points: gpd.GeoDataFrame, tmp_path: Path
) -> None:
    found = xr_anysat.compare({"emb": emb, "other": other}, points, "kind", groups="region")
    right = points["kind"].to_numpy()
    for name, cube, side in (("emb", emb, 1), ("other", other, 2)):
        values = cube.values[:, points["row"] // side, points["col"] // side].T
        accuracy = []
        for region in ("east", "west"):
            test = (points["region"] == region).to_numpy()
            model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
            accuracy.append(
                (model.fit(values[~test], right[~test]).predict(values[test]) == right[test]).mean()
            )
        scores = found.evaluations[name].fold_scores()
        assert scores["accuracy"].tolist() == pytest.approx(accuracy)
        if name == "emb":
            first = np.array(accuracy)
    table = found.to_frame()
    assert table.loc["other", "difference"] == pytest.approx((np.array(accuracy) - first).mean())
    assert table.loc["other", "spread"] == pytest.approx((np.array(accuracy) - first).std())
    assert table["better"].tolist() == [0, 0]
    for text in (repr(found), found._repr_html_()):
        assert "120 samples in 2 folds, the same for all" in text
        assert "Few folds are no test of significance" in text
    found.plot().savefig(tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").stat().st_size > 8_000


@pytest.mark.parametrize("task", ["classify", "regress"])
def test_order_and_chunks_change_no_bit(
    emb: xr.DataArray, other: xr.DataArray, points: gpd.GeoDataFrame, task: str
) -> None:
    column = {"classify": "kind", "regress": "v"}[task]
    found = xr_anysat.compare({"a": emb, "b": other}, points, column, task=task, block_m=100)
    shuffled = points.sample(frac=1, random_state=0)
    cubes = {"b": other.chunk(y=7), "a": emb.chunk(y=9, x=11)}
    again = xr_anysat.compare(cubes, shuffled, column, task=task, block_m=100)
    assert again.evaluations == found.evaluations
    assert list(again.evaluations) == ["b", "a"]
    same = xr_anysat.compare({"a": emb, "again": emb}, points, column, task=task, block_m=100)
    assert (same.differences() == 0).all(axis=None)
    better = found.to_frame().loc["b", "better"]
    assert better < len(found.differences())
    assert found.score == {"classify": "accuracy", "regress": "rmse"}[task]


def test_what_one_cube_lacks_is_left_out_of_all(emb: xr.DataArray, points: gpd.GeoDataFrame) -> None:
    """A label needs a feature in each cube; a frame that it lacks has the mean of its features."""
    frames = cube_of(np.random.default_rng(3).normal(size=(3, 2, 40, 40)).astype("float32"))
    frames[:, :, :10] = np.nan
    gone = int((points["row"] < 10).sum())
    with pytest.warns(
        AnySatWarning, match=rf"{gone} of 120 labels are left out of all cubes: .*{gone} in 'frames'"
    ):
        found = xr_anysat.compare({"emb": emb, "frames": frames.chunk(y=8)}, points, "kind", block_m=100)
    left = xr_anysat.compare({"emb": emb, "same": emb}, points[points["row"] >= 10], "kind", block_m=100)
    assert found.evaluations["emb"] == left.evaluations["emb"]
    assert len(found.evaluations["frames"].fold) == 120 - gone
    frames = frames.isel(y=slice(10, None)).copy()
    frames[1, :, :10] = np.nan
    filled = frames.copy()
    rows, cols = (points[name].to_numpy()[points["row"] >= 10] for name in ("row", "col"))
    means = np.nanmean(frames.values[1][:, rows - 10, cols].astype(float), axis=1)
    filled[1, :, :10] = means[:, None, None]
    cubes = [{"emb": emb, "frames": each} for each in (frames, filled)]
    inside = points[points["row"] >= 10]
    with pytest.warns(
        AnySatWarning, match=r"\d+\.\d% of the features in cubes\['frames'\] were not observed"
    ):
        found = xr_anysat.compare(cubes[0], inside, "kind", block_m=100)
    by_hand = xr_anysat.compare(cubes[1], inside, "kind", block_m=100)
    assert found.differences()["frames"].tolist() == by_hand.differences()["frames"].tolist()


def test_polygons_are_one_sample_each(
    emb: xr.DataArray, other: xr.DataArray, points: gpd.GeoDataFrame
) -> None:
    fields = points.to_crs(CRS)
    fields["geometry"] = fields.geometry.buffer(25)
    found = xr_anysat.compare({"emb": emb, "other": other}, fields, "v", task="regress", block_m=100)
    assert {len(e.fold) for e in found.evaluations.values()} == {120}


def test_random_weights_are_named(emb: xr.DataArray, points: gpd.GeoDataFrame) -> None:
    made = emb.assign_attrs(weights="random:0")
    found = xr_anysat.compare({"anysat": made, "<b>": emb}, points, "kind", block_m=100)
    assert found.random == ("anysat",)
    assert "carry no learned meaning: anysat" in repr(found)
    assert "<b>" not in found._repr_html_().replace("<b>anysat", "")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"cubes": {}}, OptionError, r"compare\(\) of 0: expected two or more cubes by name"),
        ({"cubes": [1, 2]}, OptionError, r"compare\(\) of list: expected two or more"),
        ({"cubes": {"a": 1, "b": 2}}, CubeTypeError, r"cubes\['a'\] is a int .*y, x and at least one other dim"),
        ({"column": "nothing"}, OptionError, "column='nothing': expected a column of the labels"),
        ({"task": "rank"}, OptionError, "task='rank': expected one of 'classify', 'regress'"),
        ({"method": "ridge"}, OptionError, "method='ridge': expected one of 'linear', 'knn'"),
        ({"task": "regress"}, OptionError, "column 'kind' is .*pandas.to_numeric"),
        ({"groups": "region", "block_m": 5}, OptionError, "folds are groups or blocks"),
        ({"block_m": 1e9}, OptionError, "120 labels that can be used are all in one fold: expected a smaller block_m="),
        ({"column": "row"}, OptionError, "too few samples"),
    ],
)  # fmt: skip
def test_refusals(
    emb: xr.DataArray, points: gpd.GeoDataFrame, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    given = {"cubes": {"a": emb, "b": emb}, "labels": points, "column": "kind", **change}
    with pytest.raises(error, match=words):
        xr_anysat.compare(**given)


def test_a_cube_without_a_place_is_refused(emb: xr.DataArray, points: gpd.GeoDataFrame) -> None:
    with pytest.raises(CubeError, match=r"cubes\['b'\]"):
        xr_anysat.compare({"a": emb, "b": emb.drop_vars(["y", "x"])}, points, "kind")

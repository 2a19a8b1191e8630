"""Classes and values from labels: what is learned, how good it is, and where it applies."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    precision_recall_fscore_support,
    r2_score,
)
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from support.cubes import no_compute, small_cube

import xr_anysat
from xr_anysat import Classifier, CubeError, Evaluation, OptionError, Regressor
from xr_anysat.analysis.applicability import dissimilarity_of_samples, feature_space, threshold_of
from xr_anysat.analysis.learners import ALPHAS
from xr_anysat.errors import AnySatWarning

CRS, LEFT, TOP = "EPSG:32632", 600_000.0, 5_000_000.0
DEPTH, HEIGHT, WIDTH = 12, 40, 48


def cube_of(values: np.ndarray, **attrs: Any) -> xr.DataArray:
    """An embedding cube of `values` (D, y, x), of cells of 10 m."""
    import odc.geo.xr  # noqa: F401

    y, x = (10.0 * np.arange(n) + 5 for n in values.shape[1:])
    emb = xr.DataArray(
        values.astype("float32"), {"y": TOP - y, "x": LEFT + x}, ("D", "y", "x"), "anysat", attrs
    )
    return emb.odc.assign_crs(CRS)


@pytest.fixture(scope="module")
def emb() -> xr.DataArray:
    rng = np.random.default_rng(0)
    kinds = rng.normal(size=(3, DEPTH)) * 2
    values = np.moveaxis(kinds[cover()], -1, 0) + rng.normal(size=(DEPTH, HEIGHT, WIDTH))
    values[:, 3:6, 30:40] = np.nan
    return cube_of(values)


def cover() -> np.ndarray:
    return np.add.outer(np.arange(HEIGHT) // 8, np.arange(WIDTH) // 8) % 3


@pytest.fixture(scope="module")
def plots(emb: xr.DataArray) -> gpd.GeoDataFrame:
    """Points with a class, values, a region and a weight."""
    rng = np.random.default_rng(1)
    flat = rng.choice(np.flatnonzero(np.isfinite(emb.values).all(0)), 150, replace=False)
    rows, cols = np.unravel_index(flat, (HEIGHT, WIDTH))
    at = gpd.points_from_xy(LEFT + 10 * cols + 5, TOP - 10 * rows - 5, crs=CRS)
    found = emb.values[:, rows, cols]
    table = {
        "kind": np.array(["oak", "pine", "ash"])[cover()[rows, cols]],
        "height": found[0] * 3 - found[1] + 20 + rng.normal(size=150),
        "age": found[2] * 10 + rng.normal(size=150),
        "region": np.where(cols < 16, "west", np.where(cols < 32, "middle", "east")),
        "area": rng.uniform(0.5, 2, 150),
        "row": rows, "col": cols,
    }  # fmt: skip
    return gpd.GeoDataFrame(table, geometry=at)


def vectors_of(emb: xr.DataArray, plots: gpd.GeoDataFrame) -> np.ndarray:
    return emb.values[:, plots["row"], plots["col"]].T.astype(float)


# ---------------------------------------------------------------------- models


@pytest.mark.parametrize("kind", ["classify", "regress"])
@pytest.mark.parametrize("method", [None, "knn"])
def test_a_model_is_stored_as_json_and_applied(
    emb: xr.DataArray, plots: gpd.GeoDataFrame, kind: str, method: str | None
) -> None:
    """No bit differs, for any chunks; nothing is computed when it is applied."""
    column = {"classify": "kind", "regress": ["height", "age"]}[kind]
    options = {} if method is None else {"method": method}
    made, model = getattr(emb.anysat, kind)(plots, column, block_m=80, **options)
    again = type(model).from_json(model.to_json())
    assert again == model
    assert isinstance(again.evaluation, Evaluation)
    with no_compute():
        lazy, same = getattr(emb.chunk(y=7, x=19).anysat, kind)(model=again)
    assert same is again
    assert all(v.chunks is not None for v in lazy.data_vars.values())
    xr.testing.assert_identical(lazy.compute(), made)
    gone = np.isnan(emb.values).any(0)
    assert not made["applicable"].values[gone].any()
    assert np.isnan(made["dissimilarity"].values[gone]).all()


@pytest.mark.parametrize("field", ["samples", "codes", "matrix", "evaluation"])
def test_a_damaged_model_is_refused(emb: xr.DataArray, plots: gpd.GeoDataFrame, field: str) -> None:
    import json

    _, model = emb.anysat.classify(plots, "kind", block_m=80)
    values = json.loads(model.to_json())
    values[field] = {
        "samples": values["samples"][:-8], "codes": [9, *values["codes"][1:]], "matrix": [[1.0]],
        "evaluation": values["evaluation"] | {"fold": [0]},
    }[field]  # fmt: skip
    with pytest.raises(OptionError, match=r"contains no Classifier .*expected what to_json\(\) returned"):
        Classifier.from_json(json.dumps(values))


def test_regress_is_scikit_learns_ridge(emb: xr.DataArray, plots: gpd.GeoDataFrame) -> None:
    made, model = emb.anysat.regress(plots, ["height", "age"], weights="area", block_m=80)
    scaler = StandardScaler().fit(vectors_of(emb, plots), sample_weight=plots["area"])
    ridge = RidgeCV(ALPHAS, alpha_per_target=True).fit(
        scaler.transform(vectors_of(emb, plots)), plots[["height", "age"]], plots["area"]
    )
    there = np.isfinite(emb.values).all(0)
    want = ridge.predict(scaler.transform(emb.values[:, there].T))
    for i, column in enumerate(("height", "age")):
        np.testing.assert_allclose(made[column].values[there], want[:, i], rtol=1e-4, atol=1e-4)
        assert np.isnan(made[column].values[~there]).all()
    assert made.attrs["columns"] == ["height", "age"]
    assert model.evaluation is not None
    assert model.evaluation.scores()["r2"] > 0.8


def test_blocked_cross_validation_is_that_of_scikit_learn(emb: xr.DataArray, plots: gpd.GeoDataFrame) -> None:
    """With groups, each fold by hand."""
    _, model = emb.anysat.classify(plots, "kind", groups="region")
    evaluation = model.evaluation
    assert evaluation is not None
    assert evaluation.folds == ("east", "middle", "west")
    values, right, predicted = vectors_of(emb, plots), plots["kind"].values, plots["kind"].values.copy()
    for region in evaluation.folds:
        test = (plots["region"] == region).values
        by_hand = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        predicted[test] = by_hand.fit(values[~test], right[~test]).predict(values[test])
        assert evaluation.fold_scores().loc[region, "accuracy"] == pytest.approx(
            (predicted == right)[test].mean()
        )
    np.testing.assert_array_equal(evaluation.confusion(), confusion_matrix(right, predicted))
    precision, recall, f1, count = precision_recall_fscore_support(right, predicted, zero_division=0)
    table = evaluation.to_frame()
    np.testing.assert_allclose(table[["precision", "recall", "f1"]].values.T, [precision, recall, f1])
    assert table["samples"].tolist() == count.tolist()
    scores = evaluation.scores()
    assert scores["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(right, predicted))
    assert scores["f1_macro"] == pytest.approx(f1.mean())


def test_weights_count_in_the_scores(emb: xr.DataArray, plots: gpd.GeoDataFrame) -> None:
    _, model = emb.anysat.regress(plots, "height", weights="area", block_m=80)
    evaluation = model.evaluation
    assert evaluation is not None
    observed, predicted = np.array(evaluation.observed[0]), np.array(evaluation.predicted[0])
    want = r2_score(observed, predicted, sample_weight=evaluation.weights)
    assert evaluation.to_frame().loc["height", "r2"] == pytest.approx(want)
    assert evaluation.to_frame().loc["height", "bias"] == pytest.approx(
        np.average(predicted - observed, weights=evaluation.weights)
    )


def test_intervals_cover_what_they_say() -> None:
    """Of independent noise, the measured and the true coverage are near the level."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(4, 60, 60))
    truth = values[0] * 2 + rng.normal(size=(60, 60))
    emb, (rows, cols) = cube_of(values), rng.integers(0, 60, (2, 400))
    at = gpd.points_from_xy(emb.x.values[cols], emb.y.values[rows], crs=CRS)
    table = gpd.GeoDataFrame({"v": truth[rows, cols]}, geometry=at)
    for level in (0.5, 0.9):
        made, model = emb.anysat.regress(table, "v", level=level, block_m=50)
        assert model.evaluation is not None
        inside = (made["v_lower"].values <= truth) & (truth <= made["v_upper"].values)
        assert inside.mean() == pytest.approx(level, abs=0.05)
        assert model.evaluation.coverage[0] == pytest.approx(level, abs=0.05)
        assert made["v_upper"].attrs["level"] == level
    with pytest.warns(AnySatWarning, match=r"8 samples are too few .* at least 9; pass a smaller level="):
        made, model = emb.anysat.regress(table.iloc[:8], "v", block_m=50)
    assert "v_lower" not in made
    assert model.level is None


def test_a_learning_curve_rises(emb: xr.DataArray, plots: gpd.GeoDataFrame) -> None:
    _, model = emb.anysat.regress(plots, "height", block_m=80)
    assert model.evaluation is not None
    curve = model.evaluation.learning_curve()
    assert curve.index.tolist() == sorted(curve.index)
    assert len(curve) == 4
    assert curve["score"].iloc[-1] > curve["score"].iloc[0]
    assert curve.index[-1] == pytest.approx(150 * 4 / 5, abs=10)


# ---------------------------------------------------------------------- applicability


def test_the_area_of_applicability_by_hand() -> None:
    """Meyer and Pebesma (2021), sections 2.2 and 2.3, on four samples of two channels."""
    samples = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [2.0, 4.0]])
    space = feature_space(samples)
    # standard deviations are 2/√3 and 4/√3, so samples are the corners of a square of side √3
    side = math.sqrt(3)
    distance = (4 * side + 2 * side * math.sqrt(2)) / 6
    assert space.distance == pytest.approx(distance)
    # a point at (2, 8) is √3 beyond the last corner; one at (1, 2) is in the middle
    batch = np.array([[2.0, 1.0, 0.0], [8.0, 2.0, 0.0]])
    np.testing.assert_allclose(
        space.nearest(batch), [side / distance, side / math.sqrt(2) / distance, 0], atol=1e-7
    )
    # folds of the two lower and the two upper corners: the nearest in the other fold is a side away
    lower, upper = np.array([0, 1]), np.array([2, 3])
    found = dissimilarity_of_samples(space, [(lower, upper), (upper, lower)])
    np.testing.assert_allclose(found, side / distance)
    assert threshold_of(np.array([0.1, 0.2, 0.3, 0.4, 9.0])) == 0.4
    assert threshold_of(found) == pytest.approx(side / distance)


def test_ground_of_another_kind_is_outside(emb: xr.DataArray, plots: gpd.GeoDataFrame) -> None:
    strange = emb.copy(deep=True)
    strange[:, 20:30, 20:30] += 30
    made, model = strange.anysat.classify(plots, "kind", block_m=80)
    made, _ = strange.anysat.classify(model=emb.anysat.classify(plots, "kind", block_m=80)[1])
    assert not made["applicable"].values[20:30, 20:30].any()
    there = np.isfinite(emb.values).all(0)
    there[20:30, 20:30] = False
    assert made["applicable"].values[there].mean() > 0.9
    assert model.evaluation is not None
    table = model.evaluation.by_applicability()
    assert table["samples"].sum() == len(plots)
    assert table.index.tolist() == ["inside", "outside"]


def test_a_low_confidence_gets_no_class(emb: xr.DataArray, plots: gpd.GeoDataFrame) -> None:
    whole, model = emb.anysat.classify(plots, "kind", method="knn", block_m=80)
    made, _ = emb.anysat.classify(model=model, min_confidence=0.9)
    sure = whole["confidence"].values >= np.float32(0.9)
    assert 0 < sure.mean() < 1
    np.testing.assert_array_equal(made["class"].values, np.where(sure, whole["class"].values, 0))
    np.testing.assert_array_equal(made["confidence"], whole["confidence"])
    assert made.attrs["min_confidence"] == 0.9
    assert model.evaluation is not None
    table = model.evaluation.by_confidence()
    assert table["share"].is_monotonic_decreasing
    assert table.loc[0, "accuracy"] == model.evaluation.scores()["accuracy"]


# ---------------------------------------------------------------------- labels


def fields(count: int = 12, seed: int = 3) -> gpd.GeoDataFrame:
    """Squares of 50 m within the kinds of ground, in degrees."""
    rng = np.random.default_rng(seed)
    i, j = rng.permutation(30)[:count] // 6, rng.permutation(30)[:count] % 6
    shapes = [
        shapely.box(LEFT + 80 * c + 11, TOP - 80 * r - 62, LEFT + 80 * c + 61, TOP - 80 * r - 12)
        for r, c in zip(i, j, strict=True)
    ]
    kinds = np.array(["oak", "pine", "ash"])[(i + j) % 3]
    return gpd.GeoDataFrame({"kind": kinds}, geometry=shapes, crs=CRS)


@pytest.mark.parametrize("most", [4, 100])
def test_polygons_give_their_whole_cells(emb: xr.DataArray, most: int) -> None:
    """Chunks and the order of rows change nothing, and no fold divides a polygon."""
    table = fields()
    table = table[table["kind"].groupby(table["kind"]).transform("size") > 1]
    made, model = emb.anysat.classify(table, "kind", cells_per_polygon=most, block_m=80)
    gone = np.isnan(emb.values).any(0)
    count = 0
    for shape in table.geometry:
        rows, cols = np.nonzero(
            shapely.covers(
                shape,
                shapely.box(*np.meshgrid(emb.x - 5, emb.y - 5), *np.meshgrid(emb.x + 5, emb.y + 5)),
            )
        )
        assert len(rows) == 16
        chosen = min(most, len(rows))
        count += chosen if not gone[rows, cols].any() else 0
    assert len(model.codes) >= count
    shuffled = table.sample(frac=1, random_state=1).to_crs(CRS)
    other, same = emb.chunk(y=11, x=9).anysat.classify(shuffled, "kind", cells_per_polygon=most, block_m=80)
    assert same == model
    xr.testing.assert_identical(other.compute(), made)
    assert model.evaluation is not None
    vectors, fold = model.vectors, np.array(model.evaluation.fold)
    for shape in table.geometry:
        box = [round(v) for v in shape.bounds]
        part = emb.sel(x=slice(box[0], box[2]), y=slice(box[3], box[1])).values.reshape(DEPTH, -1).T
        own = [f for v, f in zip(vectors, fold, strict=True) if (part == v).all(1).any()]
        assert len(set(own)) <= 1


def test_tables_are_labels_and_are_predicted() -> None:
    """A table of `embed_at` teaches the same as its points on the cube, and another table is predicted."""
    cube = small_cube(height=60, width=60, gaps=0)
    options = {
        "frames": 2,
        "norm": "pastis",
        "model": "tiny",
        "weights": "random",
        "tile": 12,
        "anchor": "grid",
    }
    emb = cube.anysat.embed(**options)
    rng = np.random.default_rng(0)
    cols, rows = rng.integers(0, 60, (2, 40))
    at = gpd.points_from_xy(emb.x.values[cols], emb.y.values[rows], crs=emb.odc.crs)
    points = gpd.GeoDataFrame({"kind": np.where(cols < 30, "a", "b"), "v": cols * 1.0}, geometry=at)
    points = points.drop_duplicates("geometry").reset_index(drop=True)
    table = cube.anysat.embed_at(points, **options)
    for kind, column in (("classify", "kind"), ("regress", "v")):
        made, model = getattr(emb.anysat, kind)(points, column, block_m=100)
        other, of_table = getattr(emb.anysat, kind)(table, column, block_m=100)
        assert of_table == model
        xr.testing.assert_identical(other, made)
        with (
            pytest.raises(OptionError, match="columns 'v' of table are names of results")
            if kind == "regress"
            else nullcontext()
        ):
            getattr(xr_anysat, kind)(table, model=model)
        predicted, _ = getattr(xr_anysat, kind)(table.drop(columns="v"), model=model)
        assert predicted.index.tolist() == table.index.tolist()
        name = "confidence" if kind == "classify" else column
        if kind == "classify":
            want = made["confidence"].sel(x=points.geometry.x.to_xarray(), y=points.geometry.y.to_xarray())
            np.testing.assert_array_equal(predicted[name], want)
            assert set(predicted["class"]) == {"a", "b"}
        assert {"dissimilarity", "applicable"} <= set(predicted.columns)
        alone, _ = getattr(xr_anysat, kind)(table.drop(columns="v"), table, column, block_m=100)
        assert len(alone) == len(table)
    foreign = cube.anysat.embed_at(points, **{**options, "frames": 3})
    with pytest.raises(CubeError, match=r"classify\(\) of embeddings with different settings: frames"):
        emb.anysat.classify(foreign, "kind")


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_order_of_labels_changes_no_bit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    emb = cube_of(rng.normal(size=(3, 12, 12)))
    rows, cols = rng.integers(0, 12, (2, 30))
    at = gpd.points_from_xy(emb.x.values[cols], emb.y.values[rows], crs=CRS)
    table = gpd.GeoDataFrame({"v": rng.normal(size=30)}, geometry=at)
    made, model = emb.anysat.regress(table, "v", block_m=30)
    other, same = emb.chunk(y=5, x=7).anysat.regress(table.sample(frac=1, random_state=seed), "v", block_m=30)
    assert same == model
    xr.testing.assert_identical(other.compute(), made)


# ---------------------------------------------------------------------- other years


def test_one_year_is_scored_by_the_model_of_another(emb: xr.DataArray, plots: gpd.GeoDataFrame) -> None:
    rng = np.random.default_rng(5)
    later = emb + rng.normal(size=emb.shape).astype("float32") * 0.1
    for kind, column in (("classify", "kind"), ("regress", "height")):
        made, model = getattr(emb.anysat, kind)(plots, column, block_m=80)
        found = later.anysat.evaluate(plots, model=model)
        assert found.folds == ("all",)
        assert found.columns == (column,)
        made, _ = getattr(later.anysat, kind)(model=model)
        if kind == "classify":
            codes = made["class"].values[plots["row"], plots["col"]] - 1
            right = np.array(model.classes)[codes] == plots["kind"].values
            assert found.scores()["accuracy"] == pytest.approx(right.mean())
        else:
            error = made["height"].values[plots["row"], plots["col"]] - plots["height"].values
            assert found.scores()["rmse"] == pytest.approx(np.sqrt(np.square(error).mean()), rel=1e-5)
    with pytest.raises(OptionError, match="labels have the classes elm, which the model does not know"):
        later.anysat.evaluate(
            plots.assign(kind="elm"), model=emb.anysat.classify(plots, "kind", block_m=80)[1]
        )


# ---------------------------------------------------------------------- display


@pytest.mark.parametrize("kind", ["classify", "regress"])
def test_an_evaluation_is_printed_and_drawn(
    emb: xr.DataArray, plots: gpd.GeoDataFrame, kind: str, tmp_path: Path
) -> None:
    table = plots.assign(kind=plots["kind"].replace("ash", "<b>ash</b>"))
    column = {"classify": "kind", "regress": ["height", "age"]}[kind]
    _, model = getattr(emb.anysat, kind)(table, column, block_m=80)
    evaluation = model.evaluation
    text, html = repr(evaluation), evaluation._repr_html_()
    for word in ("150 samples in 5 folds", "Learning curve", "Area of applicability", "outside"):
        assert word in text
        assert word in html
    assert "<b>ash</b>" not in html
    figure = evaluation.plot()
    figure.savefig(tmp_path / "evaluation.png")
    assert [axes.get_title() for axes in figure.axes][-1].startswith("Learning curve")
    assert (tmp_path / "evaluation.png").stat().st_size > 10_000
    assert isinstance(evaluation.fold_scores(), pd.DataFrame)


# ---------------------------------------------------------------------- refusals

REFUSALS: list[tuple[Any, type[Exception], str]] = [
    (lambda e, p: e.anysat.classify(), OptionError, r"neither labels and column nor model="),
    (lambda e, p: e.anysat.regress(p), OptionError, r"neither labels and columns nor model="),
    (lambda e, p: e.anysat.regress(p, "kind"), OptionError, r"column 'kind' is .*pandas.to_numeric"),
    (lambda e, p: e.anysat.regress(p, "nothing"), OptionError, r"column='nothing': expected a column of the labels"),
    (lambda e, p: e.anysat.regress(p, []), OptionError, "expected one or more columns"),
    (lambda e, p: e.anysat.regress(p.rename(columns={"age": "x"}), "x"), OptionError, "another meaning in the result"),
    (lambda e, p: e.anysat.regress(p, "age", level=1), OptionError, "level=1: expected a number between 0 and 1"),
    (lambda e, p: e.anysat.regress(p, "age", method="forest"), OptionError, "expected one of 'ridge', 'knn'"),
    (lambda e, p: e.anysat.regress(p, "age", method="knn", weights="area"), OptionError, "only 'ridge' takes weights"),
    (lambda e, p: e.anysat.regress(p, "age", weights="kind"), OptionError, "expected a column of positive numbers"),
    (lambda e, p: e.anysat.regress(p.assign(area=0.0), "age", weights="area"), OptionError, "positive numbers"),
    (lambda e, p: e.anysat.regress(p.iloc[:2], "age"), OptionError, "2 labels with a value of age"),
    (lambda e, p: e.anysat.regress(fields(1).assign(v=1.0), "v"), OptionError, "1 labels with a value of v"),
    (lambda e, p: e.anysat.classify(p, "kind", groups="region", block_m=9), OptionError, "folds are groups or blocks"),
    (lambda e, p: e.anysat.classify(p, "kind", groups="no"), OptionError, "groups='no': expected a column"),
    (lambda e, p: e.anysat.classify(p.assign(region=None), "kind", groups="region"), OptionError, "150 have none"),
    (lambda e, p: e.anysat.classify(p, "kind", min_confidence=2), OptionError, "expected a number from 0 to 1"),
    (lambda e, p: e.anysat.classify(p, "kind", cells_per_polygon=0), OptionError, "cells_per_polygon=0: expected"),
    (lambda e, p: e.anysat.classify(model="m"), OptionError, r"expected the Classifier .*Classifier.from_json"),
    (lambda e, p: e.anysat.regress(model=e.anysat.classify(p, "kind", block_m=80)[1]), OptionError,
     "expected the Regressor"),
    (lambda e, p: e.anysat.classify(p, "kind", model=e.anysat.classify(p, "kind", block_m=80)[1]), OptionError,
     r"labels with model=.*evaluate\(labels, model\)"),
    (lambda e, p: e[:5].anysat.classify(model=e.anysat.classify(p, "kind", block_m=80)[1]), CubeError,
     "embeddings have 5 channels and the model 12"),
    (lambda e, p: e.assign_attrs(config="{}", model="tiny").anysat.classify(
        model=e.anysat.classify(p, "kind", block_m=80)[1]), CubeError, "different settings"),
    (lambda e, p: xr_anysat.classify(p, p, "kind"), OptionError, "a table without the column 'embedding'"),
    (lambda e, p: e.anysat.evaluate(p.iloc[:0], model=e.anysat.classify(p, "kind", block_m=80)[1]), OptionError,
     "none of 0 labels can be used"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), REFUSALS)
def test_refusals(
    emb: xr.DataArray, plots: gpd.GeoDataFrame, call: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        call(emb, plots)


def test_one_group_has_no_score(emb: xr.DataArray, plots: gpd.GeoDataFrame) -> None:
    with pytest.warns(AnySatWarning, match=r"one group of 'region'.*several groups"):
        _, model = emb.anysat.regress(plots.assign(region="all"), "age", groups="region")
    assert model.evaluation is None
    assert isinstance(model, Regressor)
    assert model.threshold > 0

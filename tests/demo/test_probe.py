"""The probe: the same cells, classes and folds for embeddings and frames, on synthetic and on real data."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import shapely

import xr_anysat
from xr_anysat import AnySatError, CubeError, OptionError
from xr_anysat.__main__ import main
from xr_anysat.demo import probe
from xr_anysat.demo.run import read_landcover
from xr_anysat.demo.scene import SyntheticScene, make_scene, open_scene

pytestmark = pytest.mark.slow

QUICK = ["--model", "tiny", "--weights", "random", "--frames", "3", "--tile", "8", "--cells", "40"]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> SyntheticScene:
    return make_scene(tmp_path_factory.mktemp("scene"), size=(64, 64), dates=8)


@pytest.fixture(scope="module")
def store(scene: SyntheticScene, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "cube.zarr"
    cube = open_scene(scene.folder).drop_encoding().chunk(time=-1)
    cube.to_dataset(name="s2").to_zarr(path, consolidated=True, zarr_format=2)
    return path


@pytest.fixture(scope="module")
def points(scene: SyntheticScene) -> gpd.GeoDataFrame:
    cover = read_landcover(scene.landcover)
    rows, cols = np.random.default_rng(0).integers(0, 64, (2, 500))
    at = gpd.points_from_xy(cover.x.values[cols], cover.y.values[rows], crs=cover.rio.crs)
    names = [scene.classes[code] for code in cover.values[rows, cols]]
    table = gpd.GeoDataFrame({"cover": names}, geometry=at)
    return table[table.groupby("cover")["cover"].transform("size") > 5]


def test_a_synthetic_scene_from_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "probe", *QUICK, "--size", "64", "--json", str(tmp_path / "probe.json")]) == 0
    said = capsys.readouterr().out
    assert "random weights: this shows that the pipeline works" in said
    report = json.loads((tmp_path / "probe.json").read_text())
    assert [row["channels"] for row in report["rows"]] == [256, 30, 60]
    for row in report["rows"]:
        assert f"{row['accuracy']:.1%} ± {row['spread']:.1%}" in said
    # spectra separate the classes by construction; chance is about one ninth
    assert report["rows"][1]["accuracy"] > 0.6
    settings = report["settings"]
    assert (settings["model"], settings["weights"], settings["learned"]) == ("tiny", "random:0", False)
    assert (settings["block_m"], settings["folds"], settings["patch_size_m"]) == (80, 5, 20)


@pytest.mark.parametrize("kind", ["points", "polygons"])
def test_data_of_a_user(
    store: Path, points: gpd.GeoDataFrame, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = points if kind == "points" else points.set_geometry(points.buffer(12, cap_style="square"))
    labels.to_crs(4326).to_file(tmp_path / "labels.gpkg")
    own = ["--cube", str(store), "--labels", str(tmp_path / "labels.gpkg"), "--column", "cover"]
    assert main(["bench", "probe", *QUICK, *own]) == 0
    assert f"cells of {points['cover'].nunique()} classes" in capsys.readouterr().out


def test_cells_have_the_class_of_most_of_their_pixels(scene: SyntheticScene) -> None:
    frames = open_scene(scene.folder).load().anysat.frames(2)
    emb = frames.anysat.embed(None, norm="pastis", patch_size=40, tile=8, model="tiny", weights="random")
    cover = read_landcover(scene.landcover)
    table = probe._majority(emb, cover)
    assert len(table) == emb.sizes["y"] * emb.sizes["x"]
    for row, col, label in table.sample(20, random_state=0).values:
        y, x = emb.y.values[row], emb.x.values[col]
        here = cover.values[np.ix_(abs(cover.y.values - y) < 20, abs(cover.x.values - x) < 20)]
        counts = np.bincount(here.ravel())
        assert counts[label] == counts.max()


def test_features_are_means_and_deviations_of_the_pixels_in_a_cell(scene: SyntheticScene) -> None:
    frames = open_scene(scene.folder).load().anysat.frames(2)
    frames[0, :, :3, :3] = np.nan
    x, y = frames.x.values[[0, 12]] + [5, 5], frames.y.values[[0, 20]] - [5, 5]
    mean, deviation = probe._moments(frames, x, y, 20.0)
    block = frames.values[:, :, 20:22, 12:14].reshape(20, 4)
    np.testing.assert_allclose(mean[1], np.nanmean(block, 1), rtol=1e-6)
    np.testing.assert_allclose(deviation[1], np.nanstd(block, 1), rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(mean[0, :10], mean[1, :10])  # nothing was observed: the mean of the others
    border, _ = probe._moments(frames, x - 10, y + 10, 20.0)
    np.testing.assert_allclose(border[0, 10:], frames.values[1, :, 0, 0], rtol=1e-6)


def test_refusals(store: Path, points: gpd.GeoDataFrame, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cube, labels and column go together"):
        probe.run("cube.zarr")
    with pytest.raises(OptionError, match=r"labels='nowhere\.gpkg' cannot be read"):
        probe.run(str(store), "nowhere.gpkg", "cover")
    points.to_file(tmp_path / "labels.gpkg")
    quick = {"model": "tiny", "weights": "random", "frames": 2, "tile": 8}
    with pytest.raises(OptionError, match=r"column='kind': expected one of \['cover'\]"):
        probe.run(str(store), str(tmp_path / "labels.gpkg"), "kind", **quick)
    away = gpd.GeoDataFrame({"cover": ["a"]}, geometry=[shapely.Point(0, 0)], crs=points.crs)
    away.to_file(tmp_path / "away.gpkg")
    with pytest.raises(CubeError, match=r"0 observed cells of 0 classes.*are the labels inside the cube"):
        probe.run(str(store), str(tmp_path / "away.gpkg"), "cover", **quick)
    few = points.iloc[[0]].assign(cover="rare")
    few.to_file(tmp_path / "few.gpkg")
    with pytest.raises(CubeError, match=r"1 observed cells of 1 classes, too few of rare \(1\): expected"):
        probe.run(str(store), str(tmp_path / "few.gpkg"), "cover", **quick)
    with pytest.raises(CubeError, match=r"one square of 640 m: take a larger area"):
        probe.run(model="tiny", weights="random", frames=2, tile=64, size=24)
    assert main(["bench", "probe", "--cube", "a.zarr"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nonsense"], "model='nonsense': expected one of"),
        (["--seed", "-1"], "seed=-1: expected a whole number, 0 or more"),
        (["--seed", str(2**32)], f"seed={2**32}: expected a whole number, 0 or more, up to"),
        (["--cells", "-5"], "cells=-5: expected a whole number of cells per class, 2 or more"),
        (["--cells", "0"], "cells=0: expected"),
        (["--json", "/proc/x"], "'/proc/x' cannot be written: No such file"),
        (["--json", "."], "'.' cannot be written: Is a directory"),
    ],
)
def test_invalid_options_are_refused_first(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_make_data", None)
    with xr_anysat.config.set(model="tiny", weights="random"):
        assert main(["bench", "probe", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("sklearn", r"needs scikit-learn: pip install 'xr_anysat\[demo\]'"),
        ("rasterio", r"needs rasterio: pip install 'xr_anysat\[demo\]'"),
        ("rioxarray", r"needs rioxarray: pip install 'xr_anysat\[demo\]'"),
    ],
)
def test_missing_packages(missing: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(AnySatError, match=message):
        probe.run()

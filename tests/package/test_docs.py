"""The documentation builds without a warning, names what there is, and its Python runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import xarray
from support.paths import ROOT

import xr_anysat
from xr_anysat.accessor import AnySatAccessor
from xr_anysat.config import DEFAULTS
from xr_anysat.demo.scene import SyntheticScene, make_scene, open_scene

DOCS = ROOT / "docs"

PAGES = {page.stem: page.read_text() for page in DOCS.glob("*.md")}


def run(page: str, names: dict[str, Any]) -> dict[str, Any]:
    """The Python of a page, from top to bottom."""
    for code in re.findall(r"^```python\n(.*?)^```", PAGES[page], re.S | re.M):
        exec(code, names)
    return names


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    mpl.use("agg")
    return tmp_path


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> SyntheticScene:
    return make_scene(tmp_path_factory.mktemp("scene"), size=(96, 96), dates=16)


@pytest.fixture
def landscape(here: Path, scene: SyntheticScene) -> dict[str, Any]:
    cube = open_scene(scene.folder)
    return {"scene": scene, "cube": cube, "xarray": xarray, "xr_anysat": xr_anysat}


@pytest.mark.slow
def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    """Without running the notebooks, which have tests of their own."""
    command = ["-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-D", "nb_execution_mode=off"]
    done = subprocess.run(
        [sys.executable, *command, str(DOCS), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    method = (tmp_path / "api" / "xarray.DataArray.anysat.classify.html").read_text()
    assert "Map classes from a few labels" in method
    assert "block_m" in method
    assert all((tmp_path / f"{page}.html").is_file() for page in PAGES)


@pytest.mark.slow
def test_getting_started_word_for_word(here: Path) -> None:
    names = run("getting_started", {})
    assert names["emb"].shape == (256, 96, 96)
    assert names["image"].dtype == np.uint8
    assert {"frames.png", "embedding.png"} <= {p.name for p in here.iterdir()}
    assert float(names["like"].max()) == pytest.approx(1)


@pytest.mark.slow
def test_the_recipes(landscape: dict[str, Any], here: Path) -> None:
    names = run("recipes", landscape)
    assert (here / "colors.tif").is_file()
    np.testing.assert_array_equal(names["later"], names["image"])
    assert set(names["table"]["status"]) <= {"ok", "outside", "invalid"}
    assert names["classifier"].evaluation.scores()["accuracy"] > 0
    xarray.testing.assert_identical(names["again"], names["classes"])
    assert names["vector"].shape == (256,)


@pytest.mark.slow
def test_the_years(landscape: dict[str, Any], here: Path) -> None:
    names = run("years", landscape)
    assert names["years"].dims == ("time", "D", "y", "x")
    assert names["moved"].sizes["time"] == 1
    assert names["image"].dims == ("time", "band", "y", "x")


@pytest.mark.slow
def test_what_is_said_of_reproducibility(landscape: dict[str, Any]) -> None:
    made = landscape["cube"].anysat.embed(8, period="2022", output="local", model="tiny", weights="random")
    names = run("reproducibility", {**landscape, "emb": made})
    np.testing.assert_array_equal(names["again"], made)


@pytest.mark.slow
def test_what_is_said_of_torch_hub() -> None:
    assert run("from_torch_hub", {"xr_anysat": xr_anysat})["tokens"].shape == (1, 24, 24, 256)


def test_the_reference_has_every_public_name() -> None:
    reference = (DOCS / "api.rst").read_text().split()
    missing = set(xr_anysat.__all__) - {"BANDS", "config"} - set(reference)
    assert not missing
    methods = {f"DataArray.anysat.{name}" for name in vars(AnySatAccessor) if not name.startswith("_")}
    assert methods == {word for word in reference if word.startswith("DataArray.anysat.")}


@pytest.mark.parametrize("page", PAGES)
def test_variables_and_methods_that_a_page_names_exist(page: str) -> None:
    variables = set(re.findall(r"XR_ANYSAT_([A-Z_]+[A-Z])", PAGES[page]))
    assert variables <= {name.upper() for name in DEFAULTS}
    methods = set(re.findall(r"\.anysat\.([a-z_]+)", PAGES[page]))
    assert methods <= set(vars(AnySatAccessor))

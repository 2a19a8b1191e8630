"""Options: an argument beats config.set, which beats the environment, which beats the default."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
from support.cubes import plain, unreadable

import xr_anysat
from xr_anysat import OptionError, Statistics, config
from xr_anysat.config import DEFAULTS, FRAMES, MODEL, option

TINY = {"model": "tiny", "weights": "random"}


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """What a test sets as a statement does not outlive it."""
    before = dict(config.config)
    yield
    config.config.clear()
    config.config.update(before)


def run(code: str, **environment: str) -> str:
    """What `code` prints in a process of its own."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("XR_ANYSAT_")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def effective(**options: Any) -> dict[str, Any]:
    """The configuration that is recorded on an embedding, computed from a cube whose pixels are not read."""
    emb = xr_anysat.embed(unreadable(plain()), period="2022", **{**TINY, **options})
    return json.loads(emb.attrs["config"])


def test_defaults() -> None:
    got = effective(model=MODEL, weights="random")
    assert (got["frames"], got["tile"], got["norm"]) == (8, 24, "per_tile_zscore")
    assert (got["model"], got["device"], got["precision"]) == ("base", "auto", "float32")
    for name, default in DEFAULTS.items():
        assert option(name, default) == (config.get(name) if name == "cache_dir" else default)


def test_set_beats_the_default_within_its_context() -> None:
    with config.set(
        frames=3, tile=12, norm="pastis", model="small", weights="random:5", precision="bfloat16"
    ):
        got = effective(model=MODEL, weights=None)
        assert (got["frames"], got["tile"], got["norm"]) == (3, 12, "pastis")
        assert (got["model"], got["weights"], got["precision"]) == ("small", "random:5", "bfloat16")
        assert xr_anysat.frames(unreadable(plain()), period="2022", empty="nearest").sizes["time"] == 3
        with config.set(frames=2):
            assert effective()["frames"] == 2
        assert effective()["frames"] == 3
    assert effective()["frames"] == 8


def test_set_as_a_statement_stays() -> None:
    config.set(frames=5)
    config.set({"tile": 30})
    assert (effective()["frames"], effective()["tile"]) == (5, 30)


def test_an_argument_beats_set() -> None:
    with config.set(frames=3, tile=12, norm="pastis", model="small"):
        got = effective(frames=8, tile=24, norm="per_tile_zscore", model="tiny")
        assert (got["frames"], got["tile"], got["norm"]) == (8, 24, "per_tile_zscore")
        assert got["model"] == "tiny"
        assert effective(frames=None)["frames"] is None


def test_none_and_statistics_can_be_set() -> None:
    with config.set(frames=None):
        assert effective()["frames"] is None
    stats = Statistics(range(10), range(1, 11))
    with config.set(norm=stats):
        assert effective()["norm"]["mean"] == list(stats.mean)
    with config.set(norm=json.loads(stats.to_json())):
        assert effective()["norm"]["mean"] == list(stats.mean)


def test_statistics_and_frames_follow_the_configuration() -> None:
    cube = plain(["2022-01-15", "2022-02-15", "2022-11-15"])
    with config.set(frames=1):
        assert xr_anysat.frames(cube).sizes["time"] == 1
        assert xr_anysat.statistics(cube).count == 4 * 5
        assert cube.anysat.frames().sizes["time"] == 1


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("frames", 0, "frames=0"),
        ("frames", "many", "frames='many'"),
        ("tile", "wide", "tile='wide'"),
        ("norm", "zscore", "norm='zscore'"),
        ("model", "huge", "model='huge'"),
        ("device", "tpu", "device='tpu'"),
        ("precision", "int4", "precision='int4'"),
    ],
)
def test_impossible_values_are_refused_wherever_they_come_from(name: str, value: Any, says: str) -> None:
    with config.set({name: value}), pytest.raises(OptionError, match=says):
        effective(**({"model": MODEL} if name == "model" else {}))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("fames", r"Did you mean 'frames' \(XR_ANYSAT_FRAMES\)\?"),
        ("wieghts", r"Did you mean 'weights' \(XR_ANYSAT_WEIGHTS\)\?"),
        ("zzz", "Known options: frames, tile, norm, model, weights"),
    ],
)
def test_unknown_options_are_refused_with_a_suggestion(name: str, hint: str) -> None:
    with config.set({name: 3}):
        for call in (effective, lambda: xr_anysat.frames(plain()), lambda: xr_anysat.statistics(plain())):
            with pytest.raises(OptionError, match=f"unknown option '{name}'.*{hint}"):
                call()


@pytest.mark.slow
def test_the_environment_beats_the_default_and_loses_to_set() -> None:
    out = run(
        """
        import json, numpy as np, pandas as pd, xarray as xr
        import xr_anysat

        cube = xr.DataArray(
            np.ones((3, 10, 4, 4), "uint16"), dims=("time", "band", "y", "x"),
            coords={"time": pd.date_range("2022-01-15", periods=3), "band": list(xr_anysat.BANDS)},
        ).chunk()

        def effective(**options):
            got = json.loads(cube.anysat.embed(period="2022", **options).attrs["config"])
            return [got[k] for k in ("frames", "tile", "norm", "model", "weights", "device", "precision")]

        print(effective())
        with xr_anysat.config.set(frames=3, norm="none"):
            print(effective())
        print(effective(frames=8, tile=24, model="base"))
        """,
        XR_ANYSAT_FRAMES="None",
        XR_ANYSAT_TILE="12",
        XR_ANYSAT_NORM="treesatai",
        XR_ANYSAT_MODEL="tiny",
        XR_ANYSAT_WEIGHTS="random:2",
        XR_ANYSAT_DEVICE="cpu",
        XR_ANYSAT_PRECISION="bfloat16",
    )
    first, in_set, given = (line.strip() for line in out.splitlines())
    assert first == "[None, 12, 'treesatai', 'tiny', 'random:2', 'cpu', 'bfloat16']"
    assert in_set == "[3, 12, 'raw', 'tiny', 'random:2', 'cpu', 'bfloat16']"
    assert given == "[8, 24, 'treesatai', 'base', 'random:2', 'cpu', 'bfloat16']"


@pytest.mark.slow
def test_an_unknown_environment_variable_is_refused_until_it_is_gone() -> None:
    out = run(
        """
        import os, numpy as np, pandas as pd, xarray as xr
        import xr_anysat

        cube = xr.DataArray(
            np.ones((1, 10, 4, 4), "uint16"), dims=("time", "band", "y", "x"),
            coords={"time": pd.to_datetime(["2022-01-15"]), "band": list(xr_anysat.BANDS)},
        )
        try:
            cube.anysat.frames(None)
        except xr_anysat.OptionError as error:
            print(error)
        del os.environ["XR_ANYSAT_TILES"]
        xr_anysat.config.refresh()
        print(cube.anysat.frames(1).sizes["time"])
        """,
        XR_ANYSAT_TILES="12",
    )
    assert "environment variable XR_ANYSAT_TILES" in out
    assert "Did you mean 'tile' (XR_ANYSAT_TILE)?" in out
    assert out.splitlines()[-1] == "1"


def test_importing_is_light() -> None:
    heavy = [
        "torch",
        "odc.geo",
        "huggingface_hub",
        "safetensors",
        "matplotlib",
        "rasterio",
        "sklearn",
        "zarr",
    ]
    out = run(f"import sys, xr_anysat; print([m for m in {heavy} if m in sys.modules])")
    assert out.strip() == "[]"


def test_defaults_print_as_plain_values() -> None:
    assert (str(FRAMES), repr(FRAMES), f"{MODEL!r}") == ("8", "8", "'base'")

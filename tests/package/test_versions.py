"""What a report of a bug should have with it."""

from __future__ import annotations

import importlib.metadata
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import xr_anysat
from xr_anysat.config import DEFAULTS
from xr_anysat.model import checkpoint, weights


def report() -> dict[str, str]:
    out = io.StringIO()
    xr_anysat.show_versions(out)
    return dict(line.split(": ", 1) for line in out.getvalue().splitlines() if line)


def test_versions_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    lines = report()
    assert lines["xr_anysat"] == xr_anysat.__version__
    assert lines["python"].startswith(sys.version.split()[0])
    for name in ("torch", "xarray", "dask", "odc-geo", "odc-stac", "scikit-learn", "matplotlib"):
        assert lines[name] == importlib.metadata.version(name)
    assert "hypothesis" not in lines  # of the extra test only
    assert lines["torch threads"] == str(torch.get_num_threads())
    assert lines["torch CPU capability"] == torch.backends.cpu.get_cpu_capability()
    assert lines["device='auto'"] == str(weights.resolve_device("auto"))
    xr_anysat.show_versions()
    assert capsys.readouterr().out.startswith("xr_anysat: ")


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def without(name: str) -> str:
        if name in ("rustac", "geopandas"):
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without)
    assert report()["rustac"] == report()["geopandas"] == "not installed"
    monkeypatch.setitem(sys.modules, "torch", None)
    assert report()["torch cannot be imported"].startswith("ModuleNotFoundError: ")

    def unknown(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", unknown)
    assert report()["packages"] == "unknown, since xr_anysat was imported without being installed"


def test_where_the_weights_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **options: object) -> None:
        raise AssertionError("weights were hashed or fetched")

    monkeypatch.setattr(checkpoint, "file_sha256", never)
    monkeypatch.setattr(checkpoint, "_download", never)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *names: None)
    with xr_anysat.config.set(cache_dir=str(tmp_path)):
        assert report()["official checkpoint"] == "not on this machine"
        assert report()[f"converted weights in {tmp_path}"] == "none"
        monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *names: "/hub/AnySat.pth")
        assert report()["official checkpoint"] == "/hub/AnySat.pth"
        (tmp_path / "AnySat.pth").touch()
        (tmp_path / f"{'ab' * 32}.safetensors").touch()
        assert report()["official checkpoint"] == str(tmp_path / "AnySat.pth")
        assert report()[f"converted weights in {tmp_path}"] == "abababababab"


def test_the_configuration_in_force() -> None:
    lines = report()
    assert lines["norm"] == "per_tile_zscore (default)"
    assert set(DEFAULTS) <= set(lines)
    with xr_anysat.config.set(tile=64):
        assert report()["tile"] == "64"
    with xr_anysat.config.set(tiel=64):
        assert "unknown option 'tiel'" in report()["configuration"]


@pytest.mark.slow
def test_from_the_environment_without_importing_torch_before() -> None:
    code = "import sys, xr_anysat; print('torch' in sys.modules); xr_anysat.show_versions()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "XR_ANYSAT_TILE": "40"},
    )
    assert done.stdout.startswith("False\nxr_anysat: ")
    assert "\ntile: 40\n" in done.stdout

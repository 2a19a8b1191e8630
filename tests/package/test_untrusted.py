"""Stores, tables, models and cubes from anybody: they raise an AnySatError at most, and write nowhere else."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import xarray as xr
from support.cubes import small_cube

import xr_anysat
from xr_anysat import AnySatError
from xr_anysat.shared.text import safe_name

OUTSIDE = "/../../../victim_home/.config/important"


def embedding(**options: Any) -> xr.DataArray:
    cube = small_cube(height=8, width=8, crs="EPSG:32632")
    made: xr.DataArray = cube.anysat.embed(
        2, period="2022", tile=8, model="tiny", weights="random", **options
    )
    return made


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---------------------------------------------------------------------- names of files


@pytest.mark.parametrize(
    "attrs",
    [
        {"weights": f"random:{OUTSIDE}"},
        {"weights": f"module:{OUTSIDE}"},
        {"weights": "/somewhere/own.pth", "weights_sha256": "/../../x"},
    ],
    ids=["seed", "module", "hash"],
)
def test_a_record_names_no_file_outside_of_the_target(attrs: dict[str, str], tmp_path: Path) -> None:
    """The Item of the model is named by the record, which may come from a stranger's store."""
    (tmp_path / "victim_home" / ".config").mkdir(parents=True)
    important = tmp_path / "victim_home" / ".config" / "important.json"
    important.write_text("mine")
    emb = embedding()
    emb.attrs |= attrs
    target = tmp_path / "a" / "b"
    target.mkdir(parents=True)
    with suppress(AnySatError):
        xr_anysat.to_zarr(emb, target / "area.zarr")
    others = {name: text for name, text in files(tmp_path).items() if not name.startswith("a/b/")}
    assert others == {"victim_home/.config/important.json": b"mine"}
    assert all(p.parent == target for p in target.glob("**/*.json") if "area.zarr" not in p.parts)


@pytest.mark.parametrize(
    "text",
    ["", ".", "..", "../../x", "/etc/passwd", "a\\b", "C:\\x", "a\0b", "é" * 300, "-rf", "~", "a\nb", " "],
)
def test_a_safe_name_is_one_part_of_a_path(text: str, tmp_path: Path) -> None:
    name = safe_name(text)
    assert name
    assert len(name) <= 120
    assert not set(name) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    assert name[0] not in ".-"
    assert (tmp_path / name).resolve().parent == tmp_path.resolve()
    assert safe_name(name) == name


def test_names_that_are_safe_are_kept_and_others_stay_different() -> None:
    assert safe_name("anysat-tiny-random-0") == "anysat-tiny-random-0"
    assert safe_name("a/b") != safe_name("a?b")

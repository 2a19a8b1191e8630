"""Stores, tables, models and cubes from anybody: they raise an AnySatError at most, and write nowhere else."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from support.cubes import small_cube

import xr_anysat
from xr_anysat import AnySatError, Clusters, OptionError, PCAModel, Statistics
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


# ---------------------------------------------------------------------- JSON of results

NAN, HUGE, TEN = float("nan"), 10**400, [1.0] * 10

RESULTS: dict[type[Statistics | PCAModel | Clusters], dict[str, Any]] = {
    Statistics: {"mean": TEN, "std": TEN, "count": 3},
    PCAModel: {
        "mean": [0.0, 1.0], "components": [[1.0, 0.0]], "explained": [0.5], "low": [-1], "high": [1.0], "cells": 9,
        "seed": 0, "made_with": {},
    },
    Clusters: {"centers": [[0.0, 1.0], [1.0, 2.0]], "shares": [0.5, 0.5], "cells": 9, "seed": 0, "made_with": {}},
}  # fmt: skip


@pytest.mark.parametrize("kind", RESULTS)
def test_valid_json_of_results_is_read(kind: type[Statistics]) -> None:
    text = json.dumps(RESULTS[kind])
    assert kind.from_json(text) == kind.from_json(kind.from_json(text).to_json())


@pytest.mark.parametrize(
    ("kind", "values", "says"),
    [
        (
            Statistics,
            {"mean": ["1"] * 10},
            r"'mean' is \['1',.*expected a list of 10, each a finite number",
        ),
        (Statistics, {"mean": [NAN] * 10}, "'mean' is .*nan"),
        (Statistics, {"mean": [HUGE] * 10}, "'mean' is "),
        (Statistics, {"std": [1.0] * 9}, "'std' is .*expected a list of 10"),
        (Statistics, {"std": [-1.0] * 10}, "expected standard deviations of 0 or more"),
        (Statistics, {"count": "3"}, "'count' is '3': expected a whole number from 0"),
        (Statistics, {"count": -1}, "'count' is -1"),
        (Statistics, {"mean": {"a": 1}}, "'mean' is {'a': 1}"),
        (Statistics, {"std": ...}, "'std' is missing: expected a list"),
        (Statistics, {"other": 1}, "unknown 'other'"),
        (
            PCAModel,
            {"mean": ["0", "1"]},
            "'mean' is .*expected a list of 1 or more, each a finite number",
        ),
        (PCAModel, {"components": [[NAN, 0]]}, "'components' is"),
        (PCAModel, {"components": [1.0]}, "'components' is"),
        (PCAModel, {"components": []}, "'components' is"),
        (PCAModel, {"components": [[1.0]]}, "expected vectors and numbers of matching lengths"),
        (PCAModel, {"explained": [True]}, "'explained' is"),
        (PCAModel, {"low": 0.5}, "'low' is 0.5"),
        (PCAModel, {"made_with": None}, "'made_with' is None: expected a JSON object"),
        (PCAModel, {"made_with": ...}, "'made_with' is missing"),
        (PCAModel, {"cells": 1.5}, "'cells' is 1.5: expected a whole number from 1"),
        (PCAModel, {"seed": HUGE}, "'seed' is 1000"),
        (Clusters, {"centers": [[0.0, "1"], [1.0, 2.0]]}, "'centers' is"),
        (Clusters, {"centers": [[0.0], [1.0, 2.0]]}, "all of one length"),
        (Clusters, {"centers": []}, "'centers' is"),
        (Clusters, {"centers": [[], []]}, "'centers' is"),
        (Clusters, {"shares": [NAN, 1]}, "'shares' is"),
        (Clusters, {"made_with": [1]}, r"'made_with' is \[1\]"),
    ],
)
def test_malformed_json_of_results_is_refused(
    kind: type[Statistics], values: dict[str, Any], says: str
) -> None:
    changed = {k: v for k, v in (RESULTS[kind] | values).items() if v is not ...}
    with pytest.raises(OptionError, match=rf"contains no {kind.__name__} \(.*{says}.*expected what to_json"):
        kind.from_json(json.dumps(changed))


@pytest.mark.parametrize("kind", RESULTS)
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 100_000, "more than 32 levels"),
        ('{"mean": ' + "[" * 40 + "]" * 40 + "}", "more than 32 levels"),
        ('{"made_with": ' + '{"a":' * 900 + "1" + "}" * 901, "more than 32 levels"),
        ('{"mean": [1], "mean": [2]}', "repeats a name"),
        ("[1, 2]", "expected a JSON object"),
        ("null", "expected a JSON object"),
        ("", "Expecting value"),
        ('{"mean": [1', "Expecting"),
        ("1" * 10_000, "limit"),
        (b"\xff\xfe\x00", "decode"),
        (None, "NoneType instead of JSON"),
        (3.5, "float instead of JSON"),
    ],
)  # fmt: skip
def test_text_that_is_no_json_of_a_result_is_refused(kind: type[Statistics], text: Any, says: str) -> None:
    with pytest.raises(OptionError, match=rf"contains no {kind.__name__} \(.*{says}"):
        kind.from_json(text)


def test_statistics_take_no_text_and_no_huge_numbers() -> None:
    for values in (["1"] * 10, "1234567890", [HUGE] * 10, [np.array([1, 2])] * 10):
        with pytest.raises(OptionError, match="expected a number for each"):
            Statistics(values, TEN)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="count='3': expected a whole number"):
        Statistics(TEN, TEN, "3")  # type: ignore[arg-type]

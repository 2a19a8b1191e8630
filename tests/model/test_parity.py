"""The native model equals upstream in every output and every stage, to 1e-4."""

from __future__ import annotations

import json
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from support.formula import s2_input
from support.paths import PARITY
from support.precision import ERRORS, near
from support.weights_files import formula_model

from xr_anysat.model.anysat import AnySat

pytestmark = pytest.mark.slow

GOLDEN = np.load(PARITY / "golden.npz")
CASES = {c["name"]: c for c in json.loads((PARITY / "golden.json").read_text()) if set(c["inputs"]) == {"s2"}}
TOLERANCE = 1e-4
STAGES = ("pixels", "patches", "subpatches")


def inputs(case: dict) -> tuple[torch.Tensor, torch.Tensor]:
    shape, dates = case["inputs"]["s2"]
    return torch.from_numpy(s2_input(f"{case['name']}:s2", tuple(shape))), torch.tensor(dates)


def thinned(value: np.ndarray, steps: list[int] | None) -> np.ndarray:
    if steps is None:
        return value
    a, b, c = steps
    return value[:, ::a, ::c] if value.ndim == 3 else value[:, ::a, ::b, ::c]


def golden_keys() -> list[tuple[str, str]]:
    return [(n, k.split("/")[1]) for n in CASES for k in GOLDEN.files if k.split("/")[0] == n]


@cache
def stages(name: str) -> dict[str, torch.Tensor]:
    """The outputs of stages one and two, computed stage by stage."""
    case = CASES[name]
    model = formula_model(case["size"])
    x, doy = inputs(case)
    b, t, c, h, w = x.shape
    s = case["patch_size"] // 10
    p, q = h // s, w // s
    x = x.reshape(b, t, c, p, s, q, s).permute(0, 3, 5, 4, 6, 1, 2).reshape(-1, t, c)
    with torch.inference_mode():
        pixels = model.pixels(x, doy.repeat_interleave(h * w, 0)).view(b * p * q, s * s, -1)
        patches, subpatches = model.patches(pixels, local=True)
        alone, nothing = model.patches(pixels)
        none, only_local = model.patches(pixels, local=True, cls=False)
    assert nothing is None
    assert none is None
    torch.testing.assert_close(alone, patches, rtol=0, atol=1e-5)
    torch.testing.assert_close(only_local, subpatches, rtol=0, atol=1e-5)
    return {"pixels": pixels, "patches": patches, "subpatches": subpatches}


@cache
def forward(name: str, output: str, precision: str | None) -> dict[str, torch.Tensor]:
    """The results of one forward pass: that of `output`, and the windows' tokens that it was computed from."""
    case = CASES[name]
    model = formula_model(case["size"], precision)
    x, doy = inputs(case)
    tokens = {}

    def windows(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tokens["tile"], tokens["patch"] = AnySat.windows(model, *args)
        return tokens["tile"], tokens["patch"]

    with torch.inference_mode(), mock.patch.object(model, "windows", windows):
        found = model({"s2": x, "s2_dates": doy}, patch_size=case["patch_size"], output=output)
    return {**tokens, output: found}


def result(name: str, key: str, precision: str | None = None) -> np.ndarray:
    """What is compared with a golden.

    Each output of a small model is computed on its own. One forward pass of ``base``, for its largest output,
    is compared with the goldens of all of them.
    """
    case = CASES[name]
    output = "dense" if case["size"] == "base" else key
    got = forward(name, output, precision)[key]
    return thinned(got.float().numpy(), case.get("keep", {}).get(key))


@pytest.mark.parametrize(("name", "key"), golden_keys())
def test_golden(name: str, key: str) -> None:
    steps = CASES[name].get("keep", {}).get(key)
    got = thinned(stages(name)[key].numpy(), steps) if key in STAGES else result(name, key)
    want = GOLDEN[f"{name}/{key}"]
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "precision"),
    # a window of base with 256 patches is slow, and the half precisions are shown on its smaller windows
    [(n, p) for n in CASES for p in ("float32", *ERRORS) if n != "base-40m-64px" or p in ("float32", "int8")],
)
def test_precision_on_goldens(name: str, precision: str) -> None:
    """Packed, as `embed` runs it; the figures in docs/speed.md are those of this test."""
    key = "dense" if "dense" in CASES[name]["outputs"] else "patch"
    got, want = result(name, key, precision), GOLDEN[f"{name}/{key}"]
    if precision == "float32":
        assert np.abs(got - want).max() <= TOLERANCE
    else:
        near(got, want, precision, axis=-1)


def test_every_golden_of_sentinel2_is_tested() -> None:
    outputs = {(n, o) for n, c in CASES.items() for o in c["outputs"]}
    assert outputs <= set(golden_keys())
    assert len(CASES) == 7


def test_state_dict_is_the_checkpoints() -> None:
    want = json.loads((PARITY / "state_dict_base.json").read_text())
    with torch.device("meta"):
        got = {k: list(v.shape) for k, v in AnySat("base").state_dict().items()}
    assert got == want
    assert len(got) == 418
    assert sum(int(np.prod(s)) for s in got.values()) == 125_905_447

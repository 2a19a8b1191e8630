"""Promise 1: the native model equals upstream, every output and every stage, to 1e-4."""

from __future__ import annotations

import json
from functools import cache

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


def kept(value: np.ndarray, steps: list[int] | None) -> np.ndarray:
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


def output(name: str, key: str, precision: str | None = None) -> np.ndarray:
    """What a golden is compared with."""
    case = CASES[name]
    x, doy = inputs(case)
    with torch.inference_mode():
        got = formula_model(case["size"], precision)(
            {"s2": x, "s2_dates": doy}, patch_size=case["patch_size"], output=key
        )
    return kept(got.float().numpy(), case.get("keep", {}).get(key))


@pytest.mark.parametrize(("name", "key"), golden_keys())
def test_golden(name: str, key: str) -> None:
    steps = CASES[name].get("keep", {}).get(key)
    got = kept(stages(name)[key].numpy(), steps) if key in STAGES else output(name, key)
    want = GOLDEN[f"{name}/{key}"]
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= TOLERANCE


@pytest.mark.parametrize("precision", ["float32", *ERRORS])
@pytest.mark.parametrize("name", CASES)
def test_precision_on_goldens(name: str, precision: str) -> None:
    """Packed, as the engine runs it; figures of the docs are those of this test."""
    key = "dense" if "dense" in CASES[name]["outputs"] else "patch"
    got, want = output(name, key, precision), GOLDEN[f"{name}/{key}"]
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

"""The seed: on the same array, window and settings, rs-embed's AnySat adapter gives the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from support.formula import uniform
from support.paths import PARITY

import xr_anysat

pytestmark = pytest.mark.slow

GOLDEN = np.load(PARITY / "rs_embed.npz")
DOY = [22, 68, 113, 159, 205, 250, 296, 342]
TOLERANCE = 1e-4


def seed_cube(key: str = "raw:rs-embed", side: int = 24, frames: int = 8) -> xr.DataArray:
    """The raw array that the goldens were made from, one image in each bin of 2022."""
    raw = np.clip(3000 + 2500 * uniform(key, (8, 10, side, side)), 0, 10000).astype(np.float32)
    return xr.DataArray(
        raw[:frames],
        dims=("time", "band", "y", "x"),
        coords={
            "time": (pd.Timestamp("2022-01-01") + pd.to_timedelta(DOY, unit="D"))[:frames],
            "band": list(xr_anysat.BANDS),
        },
    )


def close(got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= TOLERANCE


@pytest.mark.parametrize(
    ("key", "options", "keep"),
    [
        ("dense", {"output": "dense"}, np.s_[::6, ::3, ::5]),
        ("patch", {"output": "patch"}, np.s_[::3, ::5, ::3]),
        ("patch_40m", {"output": "patch", "patch_size": 40}, np.s_[::2]),
        ("patch_unit_scale", {"output": "patch", "norm": "unit_scale"}, np.s_[::3, ::5, ::3]),
        ("pooled_mean", {"output": "patch", "pool": "mean"}, np.s_[:]),
        ("pooled_max", {"output": "patch", "pool": "max"}, np.s_[:]),
        ("pooled_tile", {"output": "tile"}, np.s_[:, 0, 0]),
    ],
)
def test_equals_rs_embed(formula_base: Path, key: str, options: dict, keep: object) -> None:
    """As dask arrays where the result is pooled, else as NumPy arrays; other tests show that chunks change nothing."""
    cube = seed_cube().chunk(time=3, band=4, y=7, x=24) if "pool" in key else seed_cube()
    emb = cube.anysat.embed(frames=8, period="2022", weights=formula_base, **options)
    assert emb.attrs["doy0_values"] == DOY == GOLDEN["doy0"].tolist()
    close(emb.values[keep], GOLDEN[key])


def test_resize_equals_rs_embed(formula_base: Path) -> None:
    cube = seed_cube("raw:rs-embed-60px", 60)
    emb = cube.anysat.embed(frames=8, period="2022", weights=formula_base, resize=24, pool="mean")
    close(emb.values, GOLDEN["resize_60_to_24_pooled_mean"])
    assert json.loads(emb.attrs["config"])["resize"] == 24


def test_one_image_repeated_on_purpose(formula_tiny: Path) -> None:
    """``empty="nearest"`` makes of one image what the seed does: T copies, each at its bin's midpoint."""
    one = seed_cube().isel(time=3)
    emb = one.anysat.embed(frames=8, period="2022", empty="nearest", model="tiny", weights=formula_tiny)
    repeated = seed_cube().copy(data=np.repeat(one.values[None], 8, axis=0))
    want = repeated.anysat.embed(frames=8, period="2022", model="tiny", weights=formula_tiny)
    assert emb.attrs["n_frames"] == 8
    assert emb.attrs["doy0_values"] == DOY
    np.testing.assert_array_equal(emb.values, want.values)
    frames = one.anysat.frames(8, period="2022", empty="nearest")
    assert frames["n_obs"].values.tolist() == [0, 0, 0, 1, 0, 0, 0, 0]


def test_one_image_is_one_frame(formula_tiny: Path) -> None:
    one = seed_cube().isel(time=3)
    emb = one.anysat.embed(frames=8, period="2022", model="tiny", weights=formula_tiny)
    alone = seed_cube().isel(time=[3]).anysat.embed(frames=None, model="tiny", weights=formula_tiny)
    assert emb.attrs["n_frames"] == 1
    assert emb.attrs["doy0_values"] == [159]
    np.testing.assert_array_equal(emb.values, alone.values)


@pytest.mark.parametrize("count", [3, 8])
def test_series_are_embedded_as_they_are(formula_tiny: Path, count: int) -> None:
    """Fewer acquisitions than frames, or more, are neither repeated nor cut."""
    cube = seed_cube(frames=count)
    as_is = cube.anysat.embed(frames=None, model="tiny", weights=formula_tiny)
    assert as_is.attrs["n_frames"] == count
    assert as_is.attrs["doy0_values"] == DOY[:count]
    binned = cube.anysat.embed(frames=8, period="2022", model="tiny", weights=formula_tiny)
    np.testing.assert_array_equal(binned.values, as_is.values)
    fewer = cube.anysat.embed(frames=2, period="2022", model="tiny", weights=formula_tiny)
    assert fewer.attrs["n_frames"] == len({d * 2 // 365 for d in DOY[:count]})

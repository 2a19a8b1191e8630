"""Promises 2, 3 and 4 on random cubes: chunks, schedulers, order, place and values under gaps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.cubes import small_cube

import xr_anysat

pytestmark = pytest.mark.slow

QUICK = settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)

geometry = st.sampled_from(
    # patch_size in meters, tile in pixels
    [(10, 4), (10, 6), (20, 8), (20, 10), (30, 9), (40, 12), (40, 16)]
)
outputs = st.sampled_from(["patch", "dense", "local", "tile"])


@st.composite
def cubes(draw: st.DrawFn) -> xr.DataArray:
    return small_cube(
        height=draw(st.integers(3, 26)),
        width=draw(st.integers(3, 26)),
        dates=draw(st.integers(1, 7)),
        row=500_000 + draw(st.integers(0, 40)),
        col=60_000 + draw(st.integers(0, 40)),
        gaps=draw(st.sampled_from([0.0, 0.1, 0.6])),
        dtype=draw(st.sampled_from(["uint16", "int16", "float32", "float64"])),
        seed=draw(st.integers(0, 1000)),
    )


@st.composite
def chunked(draw: st.DrawFn, cube: xr.DataArray) -> xr.DataArray:
    return cube.chunk({d: draw(st.integers(1, n)) for d, n in cube.sizes.items()})


@pytest.fixture(scope="module")
def embed(request: pytest.FixtureRequest) -> Any:
    weights: Path = request.getfixturevalue("formula_tiny")

    def run(cube: xr.DataArray, **options: Any) -> xr.DataArray:
        defaults = {"frames": 3, "period": "2022", "norm": "pastis", "model": "tiny", "weights": weights}
        with np.errstate(all="ignore"), pytest.MonkeyPatch.context() as patch:
            patch.setattr("xr_anysat.embedding.blocks.warn_if_empty", lambda values: None)
            patch.setattr("xr_anysat.embedding.embed.warn_if_empty", lambda values: None)
            return xr_anysat.embed(cube, **{**defaults, **options}).compute()

    return run


def same(got: xr.DataArray, want: xr.DataArray) -> None:
    """Bit-identical, on the same grid."""
    xr.testing.assert_equal(got, want)


def close(got: xr.DataArray, want: xr.DataArray, tolerance: float = 1e-5) -> None:
    xr.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


@QUICK
@given(data=st.data(), shape=geometry, output=outputs)
def test_chunks_change_no_bit(embed: Any, data: st.DataObject, shape: tuple[int, int], output: str) -> None:
    cube = data.draw(cubes())
    options = {"patch_size": shape[0], "tile": shape[1], "output": output}
    want = embed(cube, **options)
    assert isinstance(want.data, np.ndarray)
    same(embed(data.draw(chunked(cube)), **options), want)


@QUICK
@given(data=st.data(), norm=st.sampled_from(["per_tile_zscore", "per_window_zscore", "unit_scale", "raw"]))
def test_chunks_change_only_rounding_under_any_normalization(
    embed: Any, data: st.DataObject, norm: str
) -> None:
    cube = data.draw(cubes())
    options = {"patch_size": 20, "tile": 8, "norm": norm, "frames": None}
    close(embed(data.draw(chunked(cube)), **options), embed(cube, **options))


@pytest.mark.parametrize("shape", [(10, 6), (20, 8), (40, 12)])
def test_the_number_of_threads_changes_no_bit(embed: Any, shape: tuple[int, int]) -> None:
    """Torch's: a worker of a cluster has another number of them than a notebook."""
    import torch

    cube, threads = small_cube(height=14, width=12), torch.get_num_threads()
    got = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            got.append(embed(cube, patch_size=shape[0], tile=shape[1], output="dense"))
    finally:
        torch.set_num_threads(threads)
    same(got[1], got[0])
    same(got[2], got[0])


@pytest.mark.parametrize("scheduler", ["threads", "synchronous", "processes"])
def test_schedulers_change_no_bit(embed: Any, scheduler: str) -> None:
    cube = small_cube(height=20, width=20)
    want = embed(cube, patch_size=20, tile=8)
    workers = 1 if scheduler == "processes" else 2  # each process imports torch
    with dask.config.set(scheduler=scheduler, num_workers=workers):
        same(embed(cube.chunk(time=2, y=7, x=20), patch_size=20, tile=8), want)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_batch_changes_no_bit(embed: Any, batch: int) -> None:
    cube = small_cube(height=20, width=20)
    same(embed(cube, patch_size=20, tile=8, batch=batch), embed(cube, patch_size=20, tile=8))


@QUICK
@given(data=st.data(), frames=st.sampled_from([None, 3]))
def test_order_of_bands_and_times_changes_no_bit(embed: Any, data: st.DataObject, frames: int | None) -> None:
    cube = data.draw(cubes())
    times = data.draw(st.permutations(range(cube.sizes["time"])))
    bands = data.draw(st.permutations(range(10)))
    shuffled = cube.isel(time=list(times), band=list(bands))
    same(embed(shuffled, frames=frames, tile=8), embed(cube, frames=frames, tile=8))


@QUICK
@given(data=st.data(), output=outputs, reduce=st.sampled_from(["median", "mean", "clearest"]))
def test_what_lies_under_gaps_changes_no_bit(
    embed: Any, data: st.DataObject, output: str, reduce: str
) -> None:
    """Values in the nine bands of an observation whose tenth is missing take no part in a single date."""
    cube = data.draw(cubes()).astype("float32").isel(time=[0])
    cube = cube.where(cube != 0)
    hole = cube.isnull().any("band")
    filled = xr.where(hole & (cube.band != "B8"), 5432.0, cube).transpose(*cube.dims).astype("float32")
    filled = filled.assign_coords(cube.coords)
    options = {"tile": 8, "output": output, "reduce": reduce}
    same(embed(filled, **options), embed(cube, **options))


@QUICK
@given(data=st.data())
def test_missing_dates_are_as_if_never_taken(embed: Any, data: st.DataObject) -> None:
    cube = data.draw(cubes())
    blank = xr.zeros_like(cube.isel(time=[0])).assign_coords(time=[np.datetime64("2022-06-15T11:00")])
    if cube.dtype.kind == "f":
        blank = blank * np.nan
    with_blank = xr.concat([cube, blank.astype(cube.dtype)], "time", coords="minimal", compat="override")
    close(embed(with_blank, frames=None, tile=8), embed(cube, frames=None, tile=8), 2e-5)


@QUICK
@given(data=st.data(), shape=geometry, output=outputs)
def test_crop_whose_windows_are_whole_is_the_same(
    embed: Any, data: st.DataObject, shape: tuple[int, int], output: str
) -> None:
    """Promise 3: the same ground pixel has the same embedding in every requested area."""
    patch_size, tile = shape
    row, col = (data.draw(st.integers(0, 2 * tile)) for _ in range(2))
    cube = small_cube(height=3 * tile + 1, width=3 * tile + 1, dates=3, row=row, col=col, seed=row)
    top, left = (-(-v // tile) * tile - v for v in (row, col))  # the first whole window
    down, across = ((3 * tile + 1 - v) // tile for v in (top, left))
    crop = cube.isel(y=slice(top, top + down * tile), x=slice(left, left + across * tile))
    options = {"patch_size": patch_size, "tile": tile, "output": output, "anchor": "grid"}
    whole, part = embed(cube, **options), embed(crop, **options)
    same(whole.sel(y=part.y, x=part.x), part)


@QUICK
@given(data=st.data(), shape=geometry, output=outputs)
def test_invalid_margin_equals_a_smaller_cube(
    embed: Any, data: st.DataObject, shape: tuple[int, int], output: str
) -> None:
    """Beyond the border nothing is invented: a margin of missing pixels changes nothing inside."""
    cube = data.draw(cubes())
    margin = data.draw(st.tuples(*[st.integers(0, 5)] * 4))
    y, x = cube.y.values, cube.x.values
    y = np.concatenate(
        [y[0] + 10.0 * np.arange(margin[0], 0, -1), y, y[-1] - 10.0 * np.arange(1, margin[1] + 1)]
    )
    x = np.concatenate(
        [x[0] - 10.0 * np.arange(margin[2], 0, -1), x, x[-1] + 10.0 * np.arange(1, margin[3] + 1)]
    )
    wider = cube.reindex(y=y, x=x, fill_value=np.nan if cube.dtype.kind == "f" else 0)
    options = {"patch_size": shape[0], "tile": shape[1], "output": output, "anchor": "grid", "frames": None}
    got, want = embed(wider, **options), embed(cube, **options)
    inside = got.sel(y=want.y, x=want.x)
    # masked tokens are added up in another order than absent ones
    close(inside, want, 2e-5)
    assert int(np.isfinite(got).any("D").sum()) == int(np.isfinite(want).any("D").sum())


def on_a_cluster(client: Any, embed: Any, **options: Any) -> tuple[xr.DataArray, xr.DataArray]:
    """What worker processes over TCP make of a cube, one thread each, and what this process does."""
    cube = small_cube(height=30, width=26)
    options = {"patch_size": 20, "tile": 12, **options}
    want = embed(cube, **options)
    weights = {"model": "tiny", "weights": want.attrs["weights"]}
    lazy = cube.chunk(time=2, y=17).anysat.embed(3, period="2022", **options, **weights)
    return client.compute(lazy).result(), want


@pytest.mark.parametrize("read_twice", [False, True])
def test_a_cluster_changes_only_rounding(
    client: Any, embed: Any, read_twice: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the pass for statistics may read on its own."""
    if read_twice:
        monkeypatch.setattr("xr_anysat.embedding.options.MAX_SHARED_FRAME_BYTES", 0)
    close(*on_a_cluster(client, embed, norm="per_tile_zscore"))


@pytest.mark.parametrize("overlap", [0, 6])
def test_a_cluster_changes_no_bit_under_given_statistics(client: Any, embed: Any, overlap: int) -> None:
    """Though its workers have one thread each, and this process more."""
    same(*on_a_cluster(client, embed, norm="pastis", overlap=overlap))

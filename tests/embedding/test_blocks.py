"""Laziness, blocks and what travels in a task."""

from __future__ import annotations

import os
import pickle
import platform
import subprocess
import sys
import textwrap
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import torch
import xarray as xr
from support.cubes import refuse, small_cube, tile_of_sentinel2
from support.hub_module import Hub
from support.processes import without_torch

import xr_anysat
from xr_anysat.embedding import blocks, forward
from xr_anysat.embedding.settings import BlockSpec
from xr_anysat.model.anysat import AnySat
from xr_anysat.model.weights import encoder_spec

TINY = {"model": "tiny", "weights": "random"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "per_window_zscore", "output": "dense"},
        {"frames": None, "norm": "pastis", "output": "local", "pool": "max"},
        {"resize": 24, "pool": "mean"},
        {"reduce": "clearest", "output": "tile"},
    ],
)
def test_building_computes_nothing(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "get_encoder", refuse)
    cube = small_cube(height=26).chunk(time=2, y=11, x=11)
    with dask.config.set(scheduler=refuse):
        emb = cube.anysat.embed(period="2022", **{**TINY, **options})
    assert isinstance(emb.data, da.Array)


@pytest.mark.slow
@pytest.mark.parametrize("output", ["patch", "dense", "local", "tile"])
@pytest.mark.parametrize("anchor", ["grid", "cube"])
def test_graph_promises_what_is_computed(output: str, anchor: str) -> None:
    cube = small_cube(height=50, width=61, dates=3).chunk(time=1, y=20, x=61)
    emb = cube.anysat.embed(frames=2, tile=12, patch_size=20, output=output, anchor=anchor, **TINY)
    assert emb.dtype == emb.data._meta.dtype == np.float32
    blocks = dask.compute(emb.data.to_delayed().ravel().tolist(), scheduler="threads")[0]
    shapes = [tuple(int(n) for n in s) for s in np.ndindex(*emb.data.numblocks)]
    for index, block in zip(shapes, blocks, strict=True):
        assert block.shape == tuple(c[i] for c, i in zip(emb.data.chunks, index, strict=True))
        assert block.dtype == np.float32


@pytest.mark.slow
def test_building_a_whole_granule_imports_no_torch() -> None:
    code = """
        emb = tile_of_sentinel2((1, 1, 2048, 2048)).anysat.embed(frames=8, period="2022", weights="random")
        print(emb.shape)
    """
    assert without_torch(code) == "(768, 10980, 10980)"


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [(1, 1, 2048, 2048), (1, 10, 1024, 1024), (60, 10, 256, 256)])
@pytest.mark.parametrize(
    "options", [{}, {"output": "dense"}, {"patch_size": 40, "tile": 64, "norm": "pastis"}]
)
def test_blocks_of_a_whole_granule_are_bounded(chunks: tuple[int, ...], options: dict[str, Any]) -> None:
    emb = tile_of_sentinel2(chunks).anysat.embed(frames=8, period="2022", weights="random", **options)
    cells = 1 if options.get("output") == "dense" else options.get("patch_size", 10) // 10
    d, *sides = (max(c) for c in emb.data.chunks)
    assert d * sides[0] * sides[1] * 4 <= blocks.BLOCK_BYTES
    assert 8 * 10 * (sides[0] * cells) * (sides[1] * cells) * 4 <= blocks.BLOCK_BYTES
    graph = emb.__dask_graph__()
    assert len(graph) < 500_000
    whole_bands = emb.data.numblocks
    assert whole_bands[0] == 1


def test_tasks_carry_specs_not_weights() -> None:
    cube = small_cube(height=50).chunk(time=1, y=20, x=26)
    emb = cube.anysat.embed(frames=3, tile=12, patch_size=20, norm="pastis", **TINY)
    spec = xr_anysat.model.weights.encoder_spec("tiny", "random")
    assert len(pickle.dumps(spec)) < 1000
    layers = [layer for name, layer in emb.__dask_graph__().layers.items() if "encode_block" in name]
    assert len(layers) == 1
    assert len(pickle.dumps(BlockSpec(spec, (1, 2), "pastis", "patch", 24, 1, None))) < 1500
    assert len(pickle.dumps(dict(layers[0]))) < 50_000


def test_names_are_the_same_for_the_same_and_differ_otherwise() -> None:
    cube = small_cube().chunk(time=1, y=20, x=26)
    names = {
        cube.anysat.embed(frames=f, period="2022", norm=n, weights=w, model="tiny").data.name
        for f, n, w in [
            (3, "raw", "random"),
            (4, "raw", "random"),
            (3, "pastis", "random"),
            (3, "raw", ("random", 1)),
        ]
    }
    assert len(names) == 4
    again = cube.anysat.embed(frames=3, period="2022", norm="raw", **TINY)
    assert again.data.name in names


def test_large_cubes_are_read_twice_rather_than_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics of the whole cube come first; nothing of that pass is held for the second one."""
    cube = small_cube().chunk(time=1, y=20, x=26)
    kept = cube.anysat.embed(frames=3, **TINY)
    monkeypatch.setattr("xr_anysat.embedding.options.MAX_SHARED_FRAME_BYTES", 0)
    apart = cube.anysat.embed(frames=3, **TINY)
    np.testing.assert_array_equal(apart.values, kept.values)

    def readers(emb: xr.DataArray) -> list[int]:
        graph = emb.__dask_graph__()
        deps = graph.get_all_dependencies()
        source = cube.data.name
        frames = {k for k, d in deps.items() if any(isinstance(x, tuple) and x[0] == source for x in d)}
        return [len(frames)]

    assert readers(apart) == readers(kept)  # the statistics' own frames read a source of their own
    assert len(apart.__dask_graph__().get_all_dependencies()) > len(
        kept.__dask_graph__().get_all_dependencies()
    )
    dataset = small_cube().to_dataset("band").chunk(time=1)
    np.testing.assert_array_equal(dataset.anysat.embed(frames=3, **TINY).values, kept.values)


def test_windows_that_nothing_was_seen_in_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    cube = small_cube(height=24, width=24, gaps=0).astype("float32")
    cube[..., :12, :] = np.nan
    calls = []
    real = AnySat.encode

    def count(self: AnySat, x: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(tuple(x.shape))
        return real(self, x, *args, **kwargs)

    monkeypatch.setattr(AnySat, "encode", count)
    emb = cube.anysat.embed(frames=2, tile=12, anchor="cube", **TINY)
    assert calls == [(1, 2, 10, 12, 12)] * 2
    assert np.isnan(emb.values[:, :12]).all()
    assert np.isfinite(emb.values[:, 12:]).all()


def test_windows_go_in_batches_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, where a forward takes several windows of one shape."""
    cube = small_cube(height=40, width=30, gaps=0.1)
    want = cube.anysat.embed(frames=2, tile=12, **TINY)
    monkeypatch.setattr(forward, "_batch", lambda settings, device: 4)
    got = cube.anysat.embed(frames=2, tile=12, **TINY)
    np.testing.assert_allclose(got.values, want.values, rtol=1e-5, atol=1e-5)


def settings_of(tile: int, batch: int | None = None) -> BlockSpec:
    spec = encoder_spec("base", "random", "cpu")
    return BlockSpec(spec, (22, 68), "pastis", "patch", tile, 1, batch)


def test_a_gpu_gets_the_windows_that_its_free_memory_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, free = torch.device("cuda:1"), 80 << 30
    monkeypatch.setattr(forward, "_free_bytes", lambda device: {gpu: free}[device])
    assert forward._batch(settings_of(24), gpu) == forward.windows_at_once(24, "cuda") == 113
    free = 3 << 30
    some = forward._batch(settings_of(24), gpu)
    assert 1 < some < 113
    fits = [forward._forward_bytes(settings_of(24), n) <= forward.FREE_SHARE * free for n in (some, some + 1)]
    assert fits == [True, False]
    free = 0  # it is tried all the same: what is kept for other shapes may be freed
    assert forward._batch(settings_of(24), gpu) == 1
    assert forward._batch(settings_of(24, batch=7), gpu) == 7
    assert forward._batch(settings_of(24, batch=7), torch.device("cpu")) == 1
    assert forward._batch(settings_of(64), torch.device("mps")) == 16


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_short_precision_stays_near(precision: str) -> None:
    cube = small_cube(height=12, width=12)
    want = cube.anysat.embed(frames=4, tile=12, output="dense", **TINY).values.reshape(512, -1)
    short = cube.anysat.embed(frames=4, tile=12, output="dense", precision=precision, **TINY)
    assert short.dtype == np.float32
    assert short.attrs["precision"] == precision
    got = short.values.reshape(512, -1)
    cosine = (got * want).sum(0) / np.linalg.norm(got, axis=0) / np.linalg.norm(want, axis=0)
    assert not np.array_equal(got, want)
    assert cosine.min() > 0.999


def test_a_module_as_model_runs_itself() -> None:
    module = xr_anysat.load_model("tiny", weights=("random", 3), device="cpu").pack("float32")
    cube = small_cube(height=24, width=24, gaps=0)
    want = cube.anysat.embed(frames=3, tile=12, anchor="cube", model="tiny", weights=("random", 3))
    got = cube.chunk(time=1).anysat.embed(frames=3, tile=12, anchor="cube", model=module)
    np.testing.assert_array_equal(got.values, want.values)
    assert got.attrs["weights"].startswith("module:")


def test_a_module_computes_in_the_precision_that_is_asked_for() -> None:
    module = xr_anysat.load_model("tiny", weights=("random", 3), device="cpu")
    cube = small_cube(height=12, width=12, gaps=0)
    options = {"frames": 3, "tile": 12, "anchor": "cube", "model": module}
    whole, short = (cube.anysat.embed(precision=p, **options).values for p in ("float32", "bfloat16"))
    assert not np.array_equal(whole, short)
    assert np.linalg.norm(whole - short) < 0.05 * np.linalg.norm(whole)


@pytest.mark.parametrize("output", ["patch", "tile", "dense", "local"])
def test_a_module_called_like_upstreams(output: str) -> None:
    module = Hub(xr_anysat.load_model("tiny", weights="random", device="cpu"))
    options = {"frames": 3, "tile": 12, "anchor": "cube", "patch_size": 20, "output": output}
    cube = small_cube(height=24, width=24, gaps=0)
    want = cube.anysat.embed(**options, **TINY)
    got = cube.anysat.embed(**options, model=module)
    np.testing.assert_allclose(got.values, want.values, rtol=1e-5, atol=1e-5)
    with pytest.raises(xr_anysat.CubeError, match="takes only complete windows of 12 × 12 pixels"):
        small_cube(height=24, width=24).anysat.embed(**{**options, "frames": None}, model=module)
    with pytest.raises(xr_anysat.CubeError, match="a window has 10 × 12 pixels"):
        cube.isel(y=slice(22)).anysat.embed(**options, model=module)


@pytest.mark.slow
@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="what another C library keeps is its own affair"
)
def test_freed_memory_is_kept_from_the_first_block_on() -> None:
    """Pages that the system had to clear for 40 arrays of 1 MiB, under the setting of a dask-distributed nanny."""
    code = """
    import resource
    import numpy as np
    from xr_anysat.embedding.process import retain_freed_memory

    def pages():
        np.ones(1 << 20, np.uint8)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(40):
            np.ones(1 << 20, np.uint8)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    before = pages()
    retain_freed_memory()
    print(before, pages(), pages())
    """
    env = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "65536"}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, check=True
    )
    before, first, later = map(int, run.stdout.split())
    assert before > 8000
    assert first < 100
    assert later < 100


def test_nothing_valid_is_nan_with_a_warning() -> None:
    cube = xr.zeros_like(small_cube(height=6, width=6))
    with pytest.warns(xr_anysat.AnySatWarning, match="nothing valid in this cube"):
        emb = cube.anysat.embed(frames=2, **TINY)
    assert np.isnan(emb.values).all()
    assert np.isnan(cube.chunk(time=1).anysat.embed(frames=2, **TINY).values).all()

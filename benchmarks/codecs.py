"""Costs of the codecs of `to_zarr`: bytes, error and time, for synthetic landscapes and random numbers.

python benchmarks/codecs.py [base]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

import xr_anysat
from xr_anysat.demo.scene import make_scene, open_scene
from xr_anysat.store.codecs import CODECS

SIZE = 192


def errors(values: np.ndarray, codec: str | None) -> str:
    """Errors of cells: mean relative L2, largest cosine distance, share of the 10 nearest neighbors that are kept."""
    decoded = np.asarray(CODECS[codec].decode(CODECS[codec].encode(values)))
    a, b = (v.reshape(len(v), -1).T.astype(float) for v in (values, decoded))
    observed = np.isfinite(a).all(1)
    a, b = a[observed], b[observed]
    relative = np.linalg.norm(a - b, axis=1) / np.linalg.norm(a, axis=1)
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b))
    nearest = []
    for cells in (a, b):
        alike = cells @ cells.T
        np.fill_diagonal(alike, -2)
        nearest.append(np.argsort(-alike, axis=1)[:, :10])
    kept = np.mean([len(set(p) & set(q)) / 10 for p, q in zip(*nearest, strict=True)])
    return f"relative L2 {relative.mean():.1e}, cosine {(1 - (a * b).sum(1)).max():.0e}, neighbors {kept:.1%}"


def stored(emb: xr.DataArray, codec: str | None) -> tuple[int, float, float]:
    """Bytes of a store, and CPU seconds to write and to read it; the best of three runs."""
    writing, reading = [], []
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            back = emb.anysat.to_zarr(f"{folder}/area.zarr", codec)
            writing.append(time.process_time() - start)
            start = time.process_time()
            back.compute()
            reading.append(time.process_time() - start)
            files = [p.stat().st_size for p in Path(folder, "area.zarr", "anysat").rglob("*") if p.is_file()]
            files += [p.stat().st_size for p in Path(folder, "area.zarr").glob("scale/c/*/*")]
    return sum(files), min(writing), min(reading)


def main() -> None:
    """Print one line per kind of embedding and codec."""
    models: Any = sys.argv[1:] or ["tiny"]
    cubes = {}
    with tempfile.TemporaryDirectory() as folder:
        make_scene(folder, size=(SIZE, SIZE), dates=18, seed=3)
        cube = open_scene(folder, chunks=64).compute()
    for model in models:
        for options in ({"patch_size": 40, "tile": 64}, {"output": "local"}):
            name = f"{model}, {', '.join(f'{k}={v}' for k, v in options.items())}"
            part = cube if "patch_size" in options else cube.isel(y=slice(48), x=slice(48))
            cubes[name] = xr_anysat.embed(part, norm="pastis", model=model, weights="random", **options)
    noise = np.random.default_rng(0).normal(size=(768, 48, 48)).astype(np.float32)
    cubes["Gaussian"] = xr.DataArray(noise, dims=("D", "y", "x"))
    loud = np.where(np.arange(768) < 8, 20, 1)[:, None, None].astype(np.float32)
    cubes["Gaussian, 8 of 768 channels 20 times as large"] = cubes["Gaussian"] * loud
    for name, emb in cubes.items():
        print(f"{name}: {emb.shape}")
        emb = emb.compute()
        # several copies, so that costs per store do not matter
        wide = xr.DataArray(np.tile(emb.values, 9), dims=emb.dims).chunk(x=emb.sizes["x"])
        whole = None
        for codec in CODECS:
            size, writing, reading = stored(wide, codec)
            whole = whole or (writing, reading)
            print(
                f"  {codec!s:8} {size / wide.nbytes:5.1%} of the bytes, {writing / whole[0]:.2f} and "
                f"{reading / whole[1]:.2f} of the CPU time to write and read; {errors(emb.values, codec)}"
            )


if __name__ == "__main__":
    main()

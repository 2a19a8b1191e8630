"""Time before the first pixel: importing xr_anysat, and building the graph of a whole granule.

python benchmarks/laziness.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import dask.array as da
import numpy as np
import pandas as pd
import xarray as xr

import xr_anysat

IMPORTS = {
    "xarray, dask.array": "import xarray, dask.array",
    "and xr_anysat": "import xarray, dask.array, xr_anysat",
}
CHUNKS = [(1, 1, 2048, 2048), (1, 10, 1024, 1024), (1, 1, 1024, 1024), (60, 10, 256, 256)]


def import_seconds(code: str) -> float:
    """Seconds that a fresh interpreter needs for imports."""
    timed = f"import time; t = time.perf_counter(); {code}; print(time.perf_counter() - t)"
    return float(
        subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=True).stdout
    )


def granule(chunks: tuple[int, ...]) -> xr.DataArray:
    """A lazy cube of 10 980 × 10 980 pixels, 60 dates and ten bands."""
    import odc.geo.xr  # noqa: F401

    cube = xr.DataArray(
        da.zeros((60, 10, 10980, 10980), chunks=chunks, dtype="uint16"),
        dims=("time", "band", "y", "x"),
        coords={
            "time": pd.date_range("2022-01-03", periods=60, freq="6D"),
            "band": list(xr_anysat.BANDS),
            "y": 5_000_040.0 - 10 * np.arange(10980) - 5,
            "x": 600_000.0 + 10 * np.arange(10980) + 5,
        },
    )
    return cube.odc.assign_crs("EPSG:32632")


def main() -> None:
    """Print import times and their ratio, then the graphs."""
    seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in range(7):
        for name, code in IMPORTS.items():
            seconds[name].append(import_seconds(code))
    base, ours = (statistics.median(s) for s in seconds.values())
    print(
        f"import xarray, dask.array {base:.3f} s; with xr_anysat {ours:.3f} s, {ours / base:.2f} times as long"
    )
    granule(CHUNKS[0]).anysat.embed(weights="random")  # imports of the first call
    for chunks in CHUNKS:
        for options in ({}, {"norm": "pastis", "patch_size": 40, "tile": 64}):
            cube = granule(chunks)
            start = time.perf_counter()
            emb = cube.anysat.embed(frames=8, period="2022", weights="random", **options)
            built = time.perf_counter() - start
            tasks = len(emb.__dask_graph__())
            print(f"chunks {chunks!s:22} {options or 'defaults'!s:52} {built:.2f} s, {tasks:,} tasks")
    print("torch imported:", "torch" in sys.modules)


if __name__ == "__main__":
    main()

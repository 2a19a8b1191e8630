"""What the checksums of a store cost: CPU time to write and to read blocks, with them relative to without.

python benchmarks/checksums.py
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec

from xr_anysat.store.layout import inner_chunk

BLOCK = (288, 288)
RUNS = 9


def measure(values: np.ndarray, compressors: tuple[Any, ...]) -> tuple[float, float]:
    """CPU seconds to write and to read four blocks."""
    inner = inner_chunk(BLOCK, values.shape[0] * values.itemsize)
    with tempfile.TemporaryDirectory() as folder:
        array = zarr.create_array(
            folder, shape=values.shape, dtype=values.dtype, chunks=(values.shape[0], *inner),
            shards=(values.shape[0], *BLOCK), compressors=compressors,
        )  # fmt: skip
        start = time.process_time()
        array[:] = values
        written = time.process_time()
        array[:]
        return written - start, time.process_time() - written


def main() -> None:
    """Print one line per codec."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(768, BLOCK[0], 4 * BLOCK[1])).astype(np.float32)
    blosc = BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle")
    for name, values in {"None": noise, "int8": (noise * 30).astype(np.int8)}.items():
        runs = [(measure(values, (blosc,)), measure(values, (blosc, Crc32cCodec()))) for _ in range(RUNS)]
        ratios = [statistics.median(b[i] / a[i] for a, b in runs) for i in (0, 1)]
        print(f"codec={name}: {ratios[0]:.2f} times the CPU time to write, {ratios[1]:.2f} times to read")


if __name__ == "__main__":
    main()

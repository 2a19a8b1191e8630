"""Arithmetic on the cells of embedding cubes, with results on the grid of the cubes.

The results are the same to the last bit for any chunks and any number of threads. BLAS rounds differently for matrices
of different shapes, so cells are computed in batches of one size, and the last batch is padded with zeros. BLAS divides
large matrices among its threads, which changes the shapes, so products are computed in pieces too small for that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import xarray as xr

from xr_anysat.series import is_series
from xr_anysat.shared.graph import RECHUNK
from xr_anysat.shared.grid import grid_of, with_transform
from xr_anysat.shared.serialization import json_default

BATCH = 256
"""Cells per matrix product."""

ROWS = 8
"""Rows of the matrix per product. The last rows are padded with zeros: BLAS rounds differently for fewer rows."""

DEPTH = 128
"""Channels per product: OpenBLAS uses one thread for up to 2¹⁸ multiplications, which is ROWS × DEPTH × BATCH."""


def one_thread() -> Any:
    """Context in which a fit runs on one thread: the number of threads changes the rounding."""
    limits = import_module("threadpoolctl").threadpool_limits  # a dependency of scikit-learn
    return limits(1)


def observed(values: np.ndarray) -> np.ndarray:
    """Where all channels of (D, …) are finite, bool (…)."""
    finite: np.ndarray = np.isfinite(values[0])
    for channel in values[1:]:  # one at a time: no temporary array of all channels
        finite &= np.isfinite(channel)
    return finite


# ---------------------------------------------------------------------- arithmetic


def map_cells(
    function: Callable[..., np.ndarray], *cubes: xr.DataArray, rows: int, dtype: Any, missing: Any
) -> Any:
    """Apply `function` to each cell: data (rows, y, x), a NumPy array, or a dask array if a cube is lazy.

    Of series (time, D, y, x), the data are (rows, time, y, x).

    Parameters
    ----------
    function : callable
        Takes a batch (D, n) float64 of each cube and returns (rows, n), one column per cell.
    *cubes : DataArray, (D, y, x) or (time, D, y, x)
        On one grid.
    rows : int
        Number of results per cell.
    dtype : dtype
        Of the result.
    missing : scalar
        Result of cells with a missing channel in any cube.
    """
    if is_series(cubes[0]):
        steps = range(cubes[0].sizes["time"])
        made = [
            map_cells(
                function, *(cube.isel(time=i) for cube in cubes), rows=rows, dtype=dtype, missing=missing
            )
            for i in steps
        ]
        if all(isinstance(part, np.ndarray) for part in made):
            return np.stack(made, axis=1)
        import dask.array as da

        return da.stack(made, axis=1)
    block = partial(_over_block, rows=rows, dtype=np.dtype(dtype), missing=missing)
    lazy = [cube.data.chunks[1:] for cube in cubes if cube.chunks is not None]
    if not lazy:
        return block(*(cube.data for cube in cubes), function=function)
    import dask.array as da
    from dask.base import tokenize
    from dask.delayed import delayed

    # one key of the graph, because the function may contain a large model
    function = delayed(function, name=f"anysat-cells-{tokenize(function)}", traverse=False)

    data = [da.asarray(cube.data).rechunk((-1, *lazy[0]), method=RECHUNK) for cube in cubes]
    return da.map_blocks(
        block,
        *data,
        function=function,
        dtype=dtype,
        chunks=((rows,), *lazy[0]),
        meta=np.empty((0, 0, 0), dtype),
    )


def _over_block(
    *blocks: np.ndarray, function: Callable[..., np.ndarray], rows: int, dtype: Any, missing: Any
) -> np.ndarray:
    _, height, width = blocks[0].shape
    out = np.empty((rows, height, width), dtype)
    step = max(1, BATCH * 64 // max(width, 1))  # do not copy a whole crop of a cube in memory
    for top in range(0, height, step):
        strip = [block[:, top : top + step].reshape(block.shape[0], -1) for block in blocks]
        made = in_batches(function, *strip, rows=rows, dtype=dtype, missing=missing)
        out[:, top : top + step] = made.reshape(rows, -1, width)
    return out


def in_batches(
    function: Callable[..., np.ndarray], *values: np.ndarray, rows: int, dtype: Any, missing: Any
) -> np.ndarray:
    """Apply `function` to cells (D, n), :data:`BATCH` at a time: (rows, n) of `dtype`.

    All batches have one shape, so the result of a cell does not depend on the cells around it.
    """
    count = values[0].shape[1]
    out = np.empty((rows, count), dtype)
    for start in range(0, count, BATCH):
        parts = [part[:, start : start + BATCH] for part in values]
        finite = np.logical_and.reduce([np.isfinite(part).all(0) for part in parts])
        n = finite.size
        batch = []
        for part in parts:
            full = np.zeros((part.shape[0], BATCH))
            np.copyto(full[:, :n], part, where=finite)
            batch.append(full)
        out[:, start : start + n] = np.where(finite, function(*batch)[:, :n], missing)
    return out


def padded_matmul(matrix: np.ndarray, batch: np.ndarray) -> np.ndarray:
    """Product (k, n) of `matrix` (k, D) and a batch (D, n), computed in pieces of :data:`ROWS` and :data:`DEPTH`."""
    k, depth = matrix.shape
    full = np.zeros((-(-k // ROWS) * ROWS, depth))
    full[:k] = matrix
    pieces = full.reshape(-1, ROWS, depth)
    made = np.zeros((len(pieces), ROWS, batch.shape[1]))
    for start in range(0, depth, DEPTH):
        part = slice(start, start + DEPTH)
        made += pieces[:, :, part] @ batch[part]
    return made.reshape(-1, batch.shape[1])[:k]


# ---------------------------------------------------------------------- results


def wrap_on_grid(
    emb: xr.DataArray,
    data: Any,
    name: str,
    attrs: Mapping[str, Any],
    *,
    dim: str | None = None,
    labels: Any = None,
) -> xr.DataArray:
    """Put `data` (y, x) or (`dim`, y, x) on the grid of an embedding cube, with its CRS and its record.

    Of a series, `data` are (time, y, x) or (`dim`, time, y, x), and the result is (time, y, x) or (time, `dim`, y, x).

    The record, all attrs of the embedding, is stored as JSON in the attribute ``embedding``.
    """
    coords = {k: c for k, c in emb.coords.items() if "D" not in c.dims}
    dims = ("time", "y", "x") if is_series(emb) else ("y", "x")
    if labels is not None:
        coords[dim] = (dim, labels)
    out = xr.DataArray(data, coords, dims if dim is None else (dim, *dims), name)
    if dim is not None and "time" in dims:
        out = out.transpose("time", dim, "y", "x")
    out = with_transform(
        out, grid_of(out)
    )  # after a selection, spatial_ref still has the transform of the whole cube
    out.attrs = {**attrs, "embedding": json.dumps(emb.attrs, default=json_default)}
    out.encoding = {k: v for k, v in emb.encoding.items() if k == "grid_mapping"}
    return out

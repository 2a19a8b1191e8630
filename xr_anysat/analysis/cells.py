"""Cells of embedding cubes: a sample of them, arithmetic over them, results on their grid, what made them.

Whatever is done here gives the same bits however a cube is cut into chunks. A sample is told by the places of cells,
not by the order in which chunks come. Arithmetic takes cells in batches of one size, the last one filled up with
zeros: BLAS rounds by the shape of matrices, and a batch always has the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import xarray as xr

from xr_anysat.shared.graph import RECHUNK
from xr_anysat.shared.grid import grid_of, with_transform
from xr_anysat.shared.serialization import json_default

BATCH = 1024
"""Cells a product of matrices."""

ROWS = 64
"""The rows of a matrix are filled up to a multiple of this: kernels of BLAS for what is left over round otherwise."""


def one_thread() -> Any:
    """Have a fit computed by one thread, as long as the context lasts: more of them round otherwise."""
    limits = import_module("threadpoolctl").threadpool_limits  # which scikit-learn brings along
    return limits(1)


def observed(values: np.ndarray) -> np.ndarray:
    """Where all channels of (D, …) are there, bool (…)."""
    there: np.ndarray = np.isfinite(values[0])
    for channel in values[1:]:  # no array of the size of them all
        there &= np.isfinite(channel)
    return there


# ---------------------------------------------------------------------- arithmetic


def map_cells(
    function: Callable[..., np.ndarray], *cubes: xr.DataArray, rows: int, dtype: Any, missing: Any
) -> Any:
    """What `function` makes of each cell: data (rows, y, x), NumPy or dask as the cubes are.

    Parameters
    ----------
    function : callable
        Takes a batch (D, n) float64 of each cube and returns (rows, n), a column for each.
    *cubes : DataArray, (D, y, x)
        On one grid.
    rows : int
        How many numbers a cell gets.
    dtype : dtype
        Of the result.
    missing : scalar
        For cells of which a cube lacks a channel.
    """
    block = partial(_over_block, function=function, rows=rows, dtype=np.dtype(dtype), missing=missing)
    lazy = [cube.data.chunks[1:] for cube in cubes if cube.chunks is not None]
    if not lazy:
        return block(*(cube.data for cube in cubes))
    import dask.array as da

    data = [da.asarray(cube.data).rechunk((-1, *lazy[0]), method=RECHUNK) for cube in cubes]
    return da.map_blocks(
        block, *data, dtype=dtype, chunks=((rows,), *lazy[0]), meta=np.empty((0, 0, 0), dtype)
    )


def _over_block(
    *blocks: np.ndarray, function: Callable[..., np.ndarray], rows: int, dtype: Any, missing: Any
) -> np.ndarray:
    _, height, width = blocks[0].shape
    out = np.empty((rows, height, width), dtype)
    step = max(1, BATCH * 16 // max(width, 1))  # a crop of a cube in memory is not copied as a whole
    for top in range(0, height, step):
        strip = [block[:, top : top + step].reshape(block.shape[0], -1) for block in blocks]
        made = in_batches(function, *strip, rows=rows, dtype=dtype, missing=missing)
        out[:, top : top + step] = made.reshape(rows, -1, width)
    return out


def in_batches(
    function: Callable[..., np.ndarray], *values: np.ndarray, rows: int, dtype: Any, missing: Any
) -> np.ndarray:
    """What `function` makes of cells (D, n), :data:`BATCH` of them at a time: (rows, n) of `dtype`.

    Batches are always of one shape, so that the numbers of a cell do not depend on which others are beside it.
    """
    count = values[0].shape[1]
    out = np.empty((rows, count), dtype)
    for start in range(0, count, BATCH):
        parts = [part[:, start : start + BATCH] for part in values]
        there = np.logical_and.reduce([np.isfinite(part).all(0) for part in parts])
        n = there.size
        batch = []
        for part in parts:
            full = np.zeros((part.shape[0], BATCH))
            np.copyto(full[:, :n], part, where=there)
            batch.append(full)
        out[:, start : start + n] = np.where(there, function(*batch)[:, :n], missing)
    return out


def padded_matmul(matrix: np.ndarray, batch: np.ndarray) -> np.ndarray:
    """`matrix` (k, D) times a batch (D, n), (k, n), with its rows filled up to a multiple of :data:`ROWS`."""
    k = matrix.shape[0]
    full = np.zeros((-(-k // ROWS) * ROWS, matrix.shape[1]))
    full[:k] = matrix
    made: np.ndarray = (full @ batch)[:k]
    return made


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
    """`data` (y, x), or (`dim`, y, x), on the grid of an embedding cube, with its CRS and its record.

    The record, all attrs of the embedding, is the attribute ``embedding``, as JSON.
    """
    coords = {k: c for k, c in emb.coords.items() if "D" not in c.dims}
    dims = ("y", "x") if dim is None else (dim, "y", "x")
    if labels is not None:
        coords[dim] = (dim, labels)
    out = xr.DataArray(data, coords, dims, name)
    out = with_transform(out, grid_of(out))  # selecting cells leaves the transform of the whole behind
    out.attrs = {**attrs, "embedding": json.dumps(emb.attrs, default=json_default)}
    out.encoding = {k: v for k, v in emb.encoding.items() if k == "grid_mapping"}
    return out

"""A reproducible sample of the cells of an embedding cube.

A pseudo-random key of its row, its column and the seed selects each cell, so the sample does not depend on chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from xr_anysat.analysis.cells import observed
from xr_anysat.series import is_series
from xr_anysat.shared.graph import RECHUNK

CELLS = 10_000
"""Maximum number of cells in a fit: 60 MB of 768 channels in float64."""

MAX_SEED = 2**32 - 1
"""Largest seed that scikit-learn accepts."""

Cells = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Chosen cells: keys, rows and columns (n,), and values (n, D), or (n, 0) if they were not requested."""


def sample_cells(emb: xr.DataArray, cells: int, seed: int) -> np.ndarray:
    """Sample the observed cells, (n, D) float64. A lazy cube is computed block by block.

    Each cell has a pseudo-random key, computed from its row, its column and the seed. The cells with the smallest
    keys are the sample, so it does not depend on chunks, on the scheduler or on gaps elsewhere.

    Parameters
    ----------
    emb : DataArray, (D, y, x) or (time, D, y, x)
        The rows of the steps of a series are numbered one after the other.
    cells : int
        Maximum number of cells.
    seed : int

    Returns
    -------
    ndarray
        In the order of the keys: `cells` cells, or all observed cells if there are fewer.
    """
    if is_series(emb):
        emb = xr.concat([emb.isel(time=i, drop=True) for i in range(emb.sizes["time"])], "y")
    chosen = first_cells(emb, partial(_keys_of_block, seed=seed), cells, values=True)
    values: np.ndarray = chosen[3].astype(np.float64)
    return values


def first_cells(
    emb: xr.DataArray,
    keys: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    count: int,
    *,
    values: bool,
) -> Cells:
    """Return the observed cells with the smallest keys. A lazy cube is computed block by block.

    Parameters
    ----------
    emb : DataArray, (D, y, x)
    keys : callable
        Takes a block (D, h, w) and the numbers of its rows (h,) and columns (w,), and returns the keys (h, w).
    count : int
        Maximum number of cells.
    values : bool
        Whether to return the values of the cells, too.

    Returns
    -------
    tuple
        In the order of the keys; cells with equal keys are in the order of rows and columns.
    """
    rows, cols = (np.arange(emb.sizes[dim], dtype=np.uint64) for dim in ("y", "x"))
    options: dict[str, Any] = {"keys": keys, "count": count, "values": values}
    if emb.chunks is None:
        box = _pick(emb.data, rows, cols, **options)
    else:
        import dask.array as da

        data = emb.data.rechunk({0: -1}, method=RECHUNK)
        numbers = (da.from_array(n, chunks=(c,)) for n, c in zip((rows, cols), data.chunks[1:], strict=True))
        y, x = numbers
        picked = da.blockwise(
            _pick, "yx", data, "dyx", y, "y", x, "x", **options, adjust_chunks={"y": 1, "x": 1},
            concatenate=True, align_arrays=False, dtype=object, meta=np.empty((0, 0), object),
        )  # fmt: skip
        merge = partial(_merge, count=count)
        box = da.reduction(
            picked, chunk=_unchanged, combine=merge, aggregate=merge, axis=(0, 1), dtype=object,
            meta=np.empty((), object),
        ).compute()  # fmt: skip
    found: Cells = box.item()
    return found


def _unchanged(box: np.ndarray, axis: Any, keepdims: bool) -> np.ndarray:
    return box


def _merge(boxes: np.ndarray, axis: Any, keepdims: bool, count: int) -> np.ndarray:
    """The cells with the smallest keys in several boxes."""
    parts = zip(*boxes.ravel(), strict=True)
    return _boxed(_smallest(tuple(np.concatenate(part) for part in parts), count), 2 if keepdims else 0)


def _pick(
    block: np.ndarray,
    rows: np.ndarray,
    cols: np.ndarray,
    *,
    keys: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    count: int,
    values: bool,
) -> np.ndarray:
    """The observed cells with the smallest keys in a block (D, h, w), in a box."""
    y, x = np.nonzero(observed(block))
    found = keys(block, rows, cols)[y, x]
    if found.size > count:
        last = np.partition(found, count - 1)[count - 1]
        kept = found <= last  # of equal keys, the order of rows and columns decides below
        y, x, found = y[kept], x[kept], found[kept]
    depth = block.shape[0] if values else 0
    return _boxed(_smallest((found, rows[y], cols[x], block[:depth, y, x].T), count), 2)


def _smallest(cells: tuple[np.ndarray, ...], count: int) -> tuple[np.ndarray, ...]:
    keys, rows, cols, _ = cells
    order = np.lexsort((cols, rows, keys))[:count]  # keys are rarely equal, positions never
    return tuple(part[order] for part in cells)


def _boxed(cells: tuple[np.ndarray, ...], ndim: int) -> np.ndarray:
    """An array with one object in it, as dask needs it."""
    box = np.empty((1,) * ndim, object)
    box[(0,) * ndim] = cells
    return box


def _keys_of_block(block: np.ndarray, rows: np.ndarray, cols: np.ndarray, *, seed: int) -> np.ndarray:
    return sampling_keys(rows[:, None], cols, seed=seed)


def sampling_keys(rows: np.ndarray, cols: np.ndarray, *, seed: int) -> np.ndarray:
    """Return pseudo-random keys uint64 of cells, from row, column (uint64, which broadcast) and seed."""
    return _mixed(_mixed(rows + _mixed(np.array([seed], np.uint64))) + _mixed(cols))


def _mixed(x: np.ndarray) -> np.ndarray:
    """SplitMix64's step from one uint64 to another (Steele, Lea and Flood, 2014); wraps around."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

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

from xr_anysat.cube import grid_of
from xr_anysat.errors import AnySatError, CubeError, OptionError
from xr_anysat.export import plain, weights_identity, with_transform
from xr_anysat.frames import RECHUNK

CELLS = 10_000
"""Cells that a fit looks at, at most: 60 MB of 768 channels in float64."""

BATCH = 1024
"""Cells a product of matrices."""

ROWS = 64
"""The rows of a matrix are filled up to a multiple of this: kernels of BLAS for what is left over round otherwise."""

SEED_MOST = 2**32 - 1
"""Largest seed, as scikit-learn has it."""

UNKNOWN = "of the cube's own frames, and not recorded"
"""In the record of how embeddings were made, in place of statistics that nobody wrote down."""

Cells = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Of sampled cells: keys, rows, columns (n,), values (n, D)."""


def extra(module: str, call: str) -> Any:
    """The module of an extra, imported.

    Raises
    ------
    AnySatError
        If it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise AnySatError(f"{call} needs {module}: pip install 'xr_anysat[analysis]'") from error


def one_thread() -> Any:
    """Have a fit computed by one thread, as long as the context lasts: more of them round otherwise."""
    limits = import_module("threadpoolctl").threadpool_limits  # which scikit-learn brings along
    return limits(1)


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """`value` as an int, if it is one from `least` to `most`.

    Examples
    --------
    >>> whole_number("k", 3, 1)
    3
    """
    number = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not number or value < least or (most is not None and value > most):
        raise OptionError(
            f"{name}={value!r}: wanted a whole number, {least} or more{f', up to {most}' if most else ''}"
        )
    return int(value)


# ---------------------------------------------------------------------- a sample


def draw(emb: xr.DataArray, cells: int, seed: int) -> np.ndarray:
    """A sample of the cells that were observed, (n, D) float64; computes a lazy cube, block by block.

    Each cell has a pseudo-random key of its row, its column and the seed, and those of the smallest keys are
    taken. So chunks, schedulers and what is missing elsewhere have no say in it.

    Parameters
    ----------
    emb : DataArray, (D, y, x)
    cells : int
        How many, at most.
    seed : int

    Returns
    -------
    ndarray
        In the order of the keys: `cells` of them, or as many as were observed.
    """
    rows, cols = (np.arange(emb.sizes[dim], dtype=np.uint64) for dim in ("y", "x"))
    options = {"count": cells, "seed": seed}
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
        merge = partial(_merge, count=cells)
        box = da.reduction(
            picked, chunk=_same, combine=merge, aggregate=merge, axis=(0, 1), dtype=object,
            meta=np.empty((), object),
        ).compute()  # fmt: skip
    chosen: Cells = box.item()
    values: np.ndarray = chosen[3].astype(np.float64)
    return values


def _same(box: np.ndarray, axis: Any, keepdims: bool) -> np.ndarray:
    return box


def _merge(boxes: np.ndarray, axis: Any, keepdims: bool, count: int) -> np.ndarray:
    """The cells of the smallest keys of several boxes."""
    parts = zip(*boxes.ravel(), strict=True)
    return _boxed(_smallest(tuple(np.concatenate(part) for part in parts), count), 2 if keepdims else 0)


def _pick(values: np.ndarray, rows: np.ndarray, cols: np.ndarray, *, count: int, seed: int) -> np.ndarray:
    """The cells of the smallest keys of a block (D, h, w) that were observed, in a box."""
    keys = _keys(rows, cols, seed)
    y, x = np.nonzero(observed(values))
    keys = keys[y, x]
    if keys.size > count:
        least = np.argpartition(keys, count - 1)[:count]
        y, x, keys = y[least], x[least], keys[least]
    return _boxed(_smallest((keys, rows[y], cols[x], values[:, y, x].T), count), 2)


def _smallest(cells: tuple[np.ndarray, ...], count: int) -> tuple[np.ndarray, ...]:
    keys, rows, cols, _ = cells
    order = np.lexsort((cols, rows, keys))[:count]  # keys are seldom equal, places never
    return tuple(part[order] for part in cells)


def _boxed(cells: tuple[np.ndarray, ...], ndim: int) -> np.ndarray:
    """An array that holds one object."""
    box = np.empty((1,) * ndim, object)
    box[(0,) * ndim] = cells
    return box


def _keys(rows: np.ndarray, cols: np.ndarray, seed: int) -> np.ndarray:
    """Pseudo-random keys (h, w) uint64 of cells, by row, column and seed."""
    row = _mixed(rows + _mixed(np.array([seed], np.uint64)))
    return _mixed(row[:, None] + _mixed(cols))


def _mixed(x: np.ndarray) -> np.ndarray:
    """SplitMix64's step from one uint64 to another (Steele, Lea and Flood, 2014); wraps around."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def observed(values: np.ndarray) -> np.ndarray:
    """Where all channels of (D, …) are there, bool (…)."""
    there: np.ndarray = np.isfinite(values[0])
    for channel in values[1:]:  # no array of the size of them all
        there &= np.isfinite(channel)
    return there


# ---------------------------------------------------------------------- arithmetic


def over_cells(
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


def product(matrix: np.ndarray, batch: np.ndarray) -> np.ndarray:
    """`matrix` (k, D) times a batch (D, n), (k, n), with its rows filled up to a multiple of :data:`ROWS`."""
    k = matrix.shape[0]
    full = np.zeros((-(-k // ROWS) * ROWS, matrix.shape[1]))
    full[:k] = matrix
    made: np.ndarray = (full @ batch)[:k]
    return made


# ---------------------------------------------------------------------- results


def result(
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
    out.attrs = {**attrs, "embedding": json.dumps(emb.attrs, default=plain)}
    out.encoding = {k: v for k, v in emb.encoding.items() if k == "grid_mapping"}
    return out


# ---------------------------------------------------------------------- what made them


def made_with(emb: xr.DataArray) -> dict[str, Any]:
    """What embeddings must have in common for their vectors to mean the same, as far as attrs tell.

    Weights, statistics and settings, but neither place nor time. Empty if there is no record of :func:`embed`.
    """
    if "config" not in emb.attrs:
        return {}
    attrs = emb.attrs
    config, frames = (json.loads(attrs.get(name, "{}")) for name in ("config", "frames"))
    record = {"model": attrs.get("model"), "weights": weights_identity(attrs)}
    if "norm_mean" in attrs:
        record["statistics"] = [[float(v) for v in attrs[k]] for k in ("norm_mean", "norm_std")]
    else:
        norm = attrs.get("norm")
        record["statistics"] = UNKNOWN if norm == "per_tile_zscore" else norm
    record |= {k: config.get(k) for k in ("output", "patch_size", "tile", "overlap", "resize", "precision")}
    record |= {k: frames.get(k) for k in ("frames", "reduce", "empty", "doy", "doy_base", "fill_value")}
    return record


def check_made_alike(own: Mapping[str, Any], other: Mapping[str, Any], call: str, whose: str) -> None:
    """Refuse embeddings whose vectors mean something else.

    Parameters
    ----------
    own, other : Mapping
        What :func:`made_with` gave.
    call, whose : str
        For the message: what was called, and what `other` is.

    Raises
    ------
    CubeError
        Naming each difference.
    """
    names = [k for k in {**own, **other} if own.get(k) != other.get(k) or own.get(k) == UNKNOWN]
    if not names:
        return
    said = "; ".join(f"{k} {_short(own.get(k))} here, {_short(other.get(k))} {whose}" for k in names)
    if names == ["statistics"]:
        mend = (
            "embed all with the same, norm='pastis' or one saved norm=cube.anysat.statistics(8): 'per_tile_zscore' "
            "normalizes each cube by its own"
        )
    else:
        mend = "embed all with the same, as cube.anysat.embed(**json.loads(emb.attrs['config'])) does"
    raise CubeError(
        f"{call} of embeddings that were not made alike: {said}. Their vectors do not compare; {mend}"
    )


def _short(value: Any) -> str:
    text = "not recorded" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def check_same_grid(emb: xr.DataArray, other: xr.DataArray, call: str) -> None:
    """Refuse cubes whose cells are not the same.

    Raises
    ------
    CubeError
        Naming what differs.
    """
    grids = [grid_of(each) for each in (emb, other)]
    crs = [None if geobox is None else geobox.crs for geobox in grids]
    differs = []
    if emb.shape != other.shape:
        differs.append(f"(D, y, x) {emb.shape} here, {other.shape} in the other")
    else:
        for dim in ("y", "x"):
            here, there = (each[dim].values if dim in each.coords else None for each in (emb, other))
            if (here is None) != (there is None):
                differs.append(f"{dim!r} coordinates of one only")
            elif here is not None and there is not None and not _same_places(here, there):
                differs.append(
                    f"{dim!r} from {here[0]} to {here[-1]} here, {there[0]} to {there[-1]} in the other"
                )
        if not differs and crs[0] != crs[1]:
            differs.append(f"CRS {_crs_name(crs[0])} here, {_crs_name(crs[1])} in the other")
    if differs:
        raise CubeError(
            f"{call}: the cubes are not on one grid: {'; '.join(differs)}. Select what they share, "
            "emb.sel(y=slice(top, bottom), x=slice(left, right)), or embed cubes of one grid"
        )


def _same_places(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether coordinates are the same but for a thousandth of a cell."""
    if a.dtype.kind not in "iuf" or b.dtype.kind not in "iuf":
        return bool((a == b).all())
    step = abs(float(a[1]) - float(a[0])) if a.size > 1 else 1.0
    return bool(np.abs(a.astype(float) - b.astype(float)).max(initial=0) <= 1e-3 * step)


def _crs_name(crs: Any) -> str:
    return "none" if crs is None else f"EPSG:{crs.epsg}" if crs.epsg else str(crs)[:60]

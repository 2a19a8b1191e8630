"""Open a store as a lazy embedding cube, and check its blocks for damage."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from xr_anysat.errors import AnySatError, CubeTypeError, StoreError, warn
from xr_anysat.series import PERIOD, STEPS, is_series, join, periods_of
from xr_anysat.shared.checks import check_embedding
from xr_anysat.shared.grid import with_transform
from xr_anysat.store.codecs import CODECS, VALUES
from xr_anysat.store.identity import (
    count_unfinished,
    finished_blocks,
    layout_of,
    read_identity,
    shard_key,
)
from xr_anysat.store.layout import Layout, block_sizes
from xr_anysat.store.location import StoreLocation, delete, exists, parse_location
from xr_anysat.store.series_layout import read_series, step_location, stored_periods

if TYPE_CHECKING:
    from zarr.abc.store import Store

LOCATION = "anysat_location"
"""Key in the ``encoding`` of an opened cube whose value is the `StoreLocation` of its store."""


def open(
    store: str | os.PathLike[str] | Store, *, storage_options: dict[str, Any] | None = None
) -> xr.DataArray:
    """Open a store that :func:`to_zarr` wrote as a lazy cube, decoded and without its margin.

    Parameters
    ----------
    store, storage_options
        As in :func:`to_zarr`.

    Returns
    -------
    DataArray, (D, y, x), or (time, D, y, x) of a series
        float32 for the codecs ``"int8"`` and ``"float16"``, else the dtype that was stored; its dask
        chunks are the blocks. ``attrs`` are those of the embedding, and ``codec`` if one was used.
        Reading a damaged block raises StoreError, which names the block.

    Raises
    ------
    StoreError
        If there is no store, it was not written by :func:`to_zarr`, or its metadata are damaged.

    Warns
    -----
    AnySatWarning
        If some blocks are not finished: their cells are NaN.

    Examples
    --------
    >>> import numpy as np, tempfile, xarray as xr
    >>> import xr_anysat
    >>> emb = xr.DataArray(np.ones((4, 2, 3), "float32"), dims=("D", "y", "x"))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     xr_anysat.to_zarr(emb, f"{folder}/area.zarr").load().equals(emb)
    True
    """
    target = parse_location(store, storage_options)
    root = target.root(read_only=True)
    if read_series(root, target) is None:
        return open_cube(target)
    found = [(p, step_location(target, p)) for p in stored_periods(root, target)]
    opened = [(p, open_cube(at)) for p, at in found if read_identity(at.root(read_only=True), at) is not None]
    if not opened:
        raise StoreError(f"{target} has no step yet: repeat the to_zarr call that began it")
    first = opened[0][1]
    for period, emb in opened[1:]:
        if emb.shape != first.shape or not emb["y"].equals(first["y"]) or not emb["x"].equals(first["x"]):
            raise StoreError(
                f"the steps {opened[0][0]} and {period} of {target} are on different grids: restore the step from a "
                "copy, or delete its folder"
            )
    series = join([emb for _, emb in opened], [period for period, _ in opened])
    series.encoding[LOCATION] = target
    return series


def open_cube(target: StoreLocation) -> xr.DataArray:
    """Open the store of one embedding, (D, y, x); see :func:`open`."""
    root = target.root(read_only=True)
    identity = _existing_identity(root, target)
    layout = layout_of(identity)
    dataset = _open_dataset(root, identity, target)
    sizes = (dataset.sizes["y"] + layout.margin[0], dataset.sizes["x"] + layout.margin[1])
    unfinished, total = count_unfinished(root, layout, sizes)
    if unfinished:
        warn(
            f"{unfinished} of {total} blocks of {target} are not finished, and NaN here: repeat the to_zarr call that "
            "wrote it to resume"
        )
    stored = dataset[VALUES]
    data = _lazy_values(dataset, identity, target)
    if unfinished and len(layout.arrays) > 1:
        data = _without_partial_blocks(data, layout, target)
    emb = xr.DataArray(
        data, _lazy_coords(dataset, data.chunks, target), stored.dims, stored.name, stored.attrs
    )
    if any(layout.margin):
        emb = with_transform(emb, identity["grid"].get("geotransform"))
    if layout.codec is not None:
        emb.attrs["codec"] = layout.codec
    texts = {k: c for k, c in emb.coords.items() if c.dtype.kind in "OT"}
    emb = emb.assign_coords({k: c.astype(object).astype(str) for k, c in texts.items()})
    emb = emb.drop_encoding()  # how values are stored here does not matter elsewhere
    emb.encoding = {k: v for k, v in stored.encoding.items() if k == "grid_mapping"} | {LOCATION: target}
    return emb


def check(emb: xr.DataArray, *, remove_damaged: bool = False) -> pd.DataFrame:
    """Read every block of the store that a cube was opened from, and report damaged and missing blocks.

    Every chunk has a checksum (CRC-32C), so each flipped byte is found. Stores of earlier versions have
    none: there, only blocks that cannot be decoded are found, and a warning says so. With an active
    :class:`distributed.Client`, the cluster reads.

    Parameters
    ----------
    emb : DataArray, (D, y, x) or (time, D, y, x)
        A cube that :func:`open` returned, or a selection of it; the whole store is checked, or the stores of the
        steps.
    remove_damaged : bool
        Delete the files of damaged blocks. The :func:`to_zarr` call that wrote the store computes
        them again.

    Returns
    -------
    DataFrame
        One row per damaged or missing block, empty if there are none: ``block_y`` and ``block_x``;
        ``y_start``, ``y_stop``, ``x_start`` and ``x_stop``, its cells in the opened cube; and
        ``problem``. Of a series, ``period`` is the first column.

    Raises
    ------
    CubeTypeError
        If `emb` was not opened from a store.
    StoreError
        If the store cannot be read or its metadata are damaged.
    WriteError
        If a damaged block cannot be removed.

    Examples
    --------
    >>> import numpy as np, tempfile, xarray as xr
    >>> import xr_anysat
    >>> emb = xr.DataArray(np.ones((4, 2, 3), "float32"), dims=("D", "y", "x"))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     len(xr_anysat.to_zarr(emb, f"{folder}/area.zarr").anysat.check())
    0
    """
    if not is_series(emb):
        check_embedding(emb, "check()")
    target = emb.encoding.get(LOCATION)
    if not isinstance(target, StoreLocation):
        raise CubeTypeError(
            "check() of a cube that was not opened from a store: expected the result of xr_anysat.open, as in "
            "xr_anysat.open('area.zarr').anysat.check()"
        )
    if STEPS not in emb.attrs:
        return _check_store(target, remove_damaged)
    tables = []
    for period in periods_of(emb):
        tables.append(_check_store(step_location(target, period), remove_damaged))
        tables[-1].insert(0, PERIOD, period)
    return pd.concat(tables, ignore_index=True)


def _check_store(target: StoreLocation, remove_damaged: bool) -> pd.DataFrame:
    """Check the store of one embedding; see :func:`check`."""
    root = target.root(read_only=not remove_damaged)
    identity = _existing_identity(root, target)
    layout = layout_of(identity)
    dataset = _open_dataset(root, identity, target)
    if not _has_checksums(dataset):
        warn(
            f"{target} was written by an earlier version, without checksums: only blocks that cannot be decoded are "
            "found. Write it to a new path to add checksums: emb.anysat.to_zarr('new.zarr')"
        )
    found = _problems(dataset, identity, target)
    rows = []
    for place, problem in found.items():
        y, x = layout.cells(place, identity["grid"]["shape"][1:])
        rows.append((*place, y.start, y.stop, x.start, x.stop, problem))
        if remove_damaged and problem != MISSING:
            for name in layout.arrays:
                delete(root, shard_key(name, place), target)
    columns = ["block_y", "block_x", "y_start", "y_stop", "x_start", "x_stop", "problem"]
    return pd.DataFrame(rows, columns=columns)


MISSING = "missing"
"""The problem of a block that is not finished."""


def _existing_identity(root: Any, target: StoreLocation) -> dict[str, Any]:
    identity = read_identity(root, target)
    if identity is None:
        raise StoreError(f"there is no store at {target}: expected what emb.anysat.to_zarr(...) wrote")
    return identity


def _open_dataset(root: Any, identity: dict[str, Any], target: StoreLocation) -> xr.Dataset:
    """Open a store with all its arrays, without its margin, lazily and without dask."""
    try:
        dataset = xr.open_zarr(root, chunks=None, decode_coords="all")
        for coord in dataset.coords.values():
            if not coord.ndim:
                coord.variable.load()
    except Exception as error:  # of xarray, zarr, or a codec, for metadata that are not theirs
        raise StoreError(
            f"{target} cannot be opened: {type(error).__name__}: {error}. Its metadata or coordinates are damaged: "
            "restore them from a copy, or write the embeddings to another path"
        ) from error
    return dataset.isel({d: slice(m, None) for d, m in zip(("y", "x"), identity["margin"], strict=True)})


def _lazy_coords(
    dataset: xr.Dataset, chunks: tuple[Any, ...], target: StoreLocation
) -> dict[Any, xr.DataArray]:
    """Return the coordinates; those that are no index in chunks like the blocks."""
    import dask.array as da

    sizes = dict(zip(("D", "y", "x"), chunks, strict=True))
    coords = {}
    for name, coord in dataset.coords.items():
        if name not in dataset.indexes and coord.ndim:
            values = _StoredCoordinate(coord.variable, str(name), target)
            meta = np.empty((0,) * values.ndim, values.dtype)
            own = tuple(sizes[str(d)] for d in coord.dims)
            coord = coord.copy(data=da.from_array(values, own, name=False, fancy=False, meta=meta))
        coords[name] = coord
    return coords


class _StoredCoordinate:
    """A stored coordinate: an array for dask, which names the coordinate if it cannot be read."""

    def __init__(self, variable: xr.Variable, name: str, target: StoreLocation) -> None:
        self.variable, self.name, self.target = variable, name, target
        self.shape, self.ndim, self.dtype = variable.shape, variable.ndim, variable.dtype

    def __getitem__(self, index: tuple[Any, ...]) -> np.ndarray:
        try:
            values: np.ndarray = self.variable[index].values
        except MemoryError:
            raise
        except Exception as error:  # of a checksum, a codec, the file system, or a server
            raise StoreError(
                f"the coordinate {self.name!r} of {self.target} cannot be read: {type(error).__name__}: {error}. "
                f"Restore its files from a copy, or drop it, emb.drop_vars({self.name!r})"
            ) from error
        return values


def _has_checksums(dataset: xr.Dataset) -> bool:
    return any(type(codec).__name__ == "Crc32cCodec" for codec in dataset[VALUES].encoding["compressors"])


def _lazy_values(dataset: xr.Dataset, identity: dict[str, Any], target: StoreLocation) -> Any:
    """Return the decoded values of a store as a dask array whose chunks are the blocks."""
    import dask.array as da

    values = _StoredValues(dataset, identity, target)
    axes = zip(values.shape[1:], values.layout.margin, values.layout.block, strict=True)
    chunks = (values.shape[:1], *(block_sizes(*each) for each in axes))
    return da.from_array(values, chunks=chunks, name=False, fancy=False, meta=values.meta)


class _StoredValues:
    """The decoded values of a store: an array for dask, which reads only the inner chunks that an index needs."""

    def __init__(self, dataset: xr.Dataset, identity: dict[str, Any], target: StoreLocation) -> None:
        self.layout, self.target = layout_of(identity), target
        self.arrays = {name: dataset[name].variable for name in self.layout.arrays}
        self.shape = self.arrays[VALUES].shape
        self.ndim = len(self.shape)
        self.dtype = np.dtype(identity["dtype"])
        self.meta = np.empty((0,) * self.ndim, self.dtype)

    def __getitem__(self, index: tuple[Any, ...]) -> np.ndarray:
        try:
            read = {k: a[index if k == VALUES else index[1:]].values for k, a in self.arrays.items()}
        except MemoryError:
            raise
        except Exception as error:  # of a checksum, a codec, the file system, or a server
            place = tuple(self._block(index[axis], axis) for axis in (1, 2))
            y, x = (f"{each.start}:{each.stop}" for each in self.layout.cells(place, self.shape[1:]))
            raise StoreError(
                f"block {place} of {self.target}, cells y={y}, x={x}, cannot be read: {type(error).__name__}: {error}. "
                f"If its file is damaged, remove it with xr_anysat.open({self.target}).anysat.check(remove_damaged="
                "True), and repeat the to_zarr call, which computes the block again"
            ) from error
        decoded: np.ndarray = CODECS[self.layout.codec].decode(read)
        return decoded

    def _block(self, index: Any, axis: int) -> int:
        """Return the block that an index along an axis begins in; no index exceeds a block."""
        first = range(self.shape[axis])[index]
        cell = first if isinstance(first, int) else min(first, default=0)
        return (cell + self.layout.margin[axis - 1]) // self.layout.block[axis - 1]


def _without_partial_blocks(data: Any, layout: Layout, target: StoreLocation) -> Any:
    """Replace blocks that lack a shard in one of several arrays by NaN: their writer was interrupted."""
    import dask.array as da
    from dask.layers import ArrayBlockIdDep

    return da.blockwise(
        _nan_if_partial, "dyx", data, "dyx", ArrayBlockIdDep(data.chunks), "dyx", layout=layout, target=target,
        align_arrays=False, dtype=data.dtype, meta=data._meta,
    )  # fmt: skip


def _nan_if_partial(
    values: np.ndarray, block: tuple[int, int, int], *, layout: Layout, target: StoreLocation
) -> np.ndarray:
    root = target.root(read_only=True)
    row, col = block[1:]
    complete = all(exists(root, shard_key(name, (row, col))) for name in layout.arrays)
    return values if complete else np.full_like(values, np.nan)


def _problems(
    dataset: xr.Dataset, identity: dict[str, Any], target: StoreLocation
) -> dict[tuple[int, int], str]:
    """Return the problem of each block that is missing or cannot be read, in the order of the blocks."""
    from dask.base import compute
    from dask.delayed import delayed

    values = _StoredValues(dataset, identity, target)
    finished = finished_blocks(target.root(read_only=True), values.layout)
    down, across = values.layout.counts(
        [n + m for n, m in zip(values.shape[1:], values.layout.margin, strict=True)]
    )
    places = [(i, j) for i in range(down) for j in range(across)]
    found: dict[tuple[int, int], str | None] = dict.fromkeys(places, MISSING)
    read, shared = delayed(_problem_of_block, pure=False), delayed(values)
    here = [place for place in places if place in finished]
    found |= zip(here, compute(*(read(shared, place) for place in here)), strict=True)
    return {place: problem for place, problem in found.items() if problem is not None}


def _problem_of_block(values: _StoredValues, place: tuple[int, int]) -> str | None:
    """Read a block, and return why that failed; None if it did not."""
    try:
        values[slice(None), *values.layout.cells(place, values.shape[1:])]
    except AnySatError as error:
        return f"damaged: {error.__cause__}"
    return None

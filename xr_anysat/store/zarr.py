"""`to_zarr` and `open`: an embedding cube into a Zarr store, block by block, and back.

A store is laid out when it is begun: all metadata and coordinates, and for every block one shard
of its own, which is put in place as a whole or not at all. What is finished is therefore told by
the shards that are there, and a run that was killed at any moment goes on with those that are not.

Blocks lie on the lattice of windows, which the cube's own corner seldom does, and the chunks of Zarr
are of one size: where the first block is cut, the store has a margin of NaN cells before it, which
`open` takes off again.
"""

from __future__ import annotations

import glob
import json
import os
import platform
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from xr_anysat.cube.normalization import STATISTICS
from xr_anysat.errors import StoreError, WriteError, warn
from xr_anysat.record import differences, parse_nested, shorten, upgrade_hint, weights_identity
from xr_anysat.shared.checks import check_embedding
from xr_anysat.shared.graph import Companion, in_turn, turns, with_value
from xr_anysat.shared.grid import TRANSFORM, crs_name, grid_of, with_transform
from xr_anysat.shared.sensor import S2
from xr_anysat.shared.serialization import json_default
from xr_anysat.store.codecs import CODECS, VALUES, check_codec, decode, dtypes, encode
from xr_anysat.store.layout import (
    BLOCK_CELLS,
    Layout,
    inner_chunk,
    margin_and_block,
    prepare_for_store,
    rechunk_to_blocks,
    with_margin,
)
from xr_anysat.store.location import (
    DRAFT,
    StoreLocation,
    is_empty,
    keys,
    parse_location,
    read,
    write,
    write_error,
)

if TYPE_CHECKING:
    from zarr.abc.store import Store

STORE_ATTR = "anysat_store"
"""attrs key of a store's group: JSON of what it is, see `_identity`."""

RETRIES = 2
"""Times that a cluster tries a failed task again."""


def to_zarr(
    emb: xr.DataArray,
    store: str | os.PathLike[str] | Store,
    codec: str | None = None,
    *,
    resume: bool = True,
    storage_options: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.DataArray:
    """Compute an embedding cube into a Zarr store; what an earlier, interrupted run finished is kept.

    Each block is computed, encoded and put in place as one shard by the worker that made it: nothing
    of it comes back to this process. With an active :class:`distributed.Client` the cluster works,
    else dask's scheduler of this process. A run may be killed at any moment, and the same call then
    goes on where it stopped; the result is bit-identical with that of an undisturbed run. Two runs
    of the same call at once are harmless: they write the same bytes.

    Under ``norm="per_tile_zscore"`` the statistics of a lazy cube are computed first and recorded in
    the store; a resumed run takes them from there.

    Parameters
    ----------
    emb : DataArray, (D, y, x) float
        What :func:`xr_anysat.embed` made.
    store : str, path or zarr Store
        A folder; a URL that fsspec knows, as ``"s3://bucket/area.zarr"``; or a store object of zarr,
        as ``zarr.storage.ObjectStore``, for obstore. Zarr format 3, with consolidated metadata.
        Beside a folder or URL ``area.zarr`` a STAC Item ``area.stac.json`` is written; a store object
        gets it inside, as ``stac.json``.
    codec : {None, "float16", "int8"}
        None: as they are. ``"float16"``: half the bytes, relative error below 5e-4. ``"int8"``: a
        quarter of the bytes, a float32 scale a cell, relative error about 1 % (docs/storage.md).
    resume : bool
        Whether to go on with a store that is there. False refuses it. A store is never overwritten.
    storage_options : dict, optional
        For the file system of a URL, as in ``fsspec.filesystem``.
    progress : callable, optional
        Called with the number of finished blocks and the number of all, in this process, at the
        start and after each block.

    Returns
    -------
    DataArray
        The store, :func:`open`-ed.

    Raises
    ------
    StoreError
        If the store holds something else: another configuration, other weights, another grid or
        other dates (the difference is named), or no embeddings at all; or, with ``resume=False``,
        anything.
    WriteError
        If the store cannot be written. Finished blocks stay, and the call can be repeated.
    OptionError, CubeError, CubeTypeError
        If `codec` is unknown, a value cannot be kept by it, or `emb` is no embedding cube.

    Examples
    --------
    >>> import numpy as np, tempfile, xarray as xr
    >>> import xr_anysat
    >>> emb = xr.DataArray(np.ones((4, 2, 3), "float32"), dims=("D", "y", "x"))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     back = xr_anysat.to_zarr(emb, f"{folder}/area.zarr", "int8").load()
    >>> back.sizes, float(back.max())
    (Frozen({'D': 4, 'y': 2, 'x': 3}), 1.0)
    """
    check_embedding(emb, "to_zarr('area.zarr')")
    check_codec(codec, emb.dtype)
    target = parse_location(store, storage_options)
    emb = prepare_for_store(emb)
    if emb.chunks is None:
        emb = emb.chunk({"D": -1, "y": BLOCK_CELLS, "x": BLOCK_CELLS})
    layout = Layout(codec, *margin_and_block(emb))
    root = target.root()
    found = _read_identity(root, target)
    if found is not None and not resume:
        raise StoreError(
            f"there is a store at {target} already, and resume=False: pass resume=True to go on with it, or give "
            "another path. If it is not wanted any more, delete it first"
        )
    if found is not None:  # before statistics are computed, which may take hours
        layout = Layout(codec, tuple(found["margin"]), tuple(found["block"]))
        _check_same(found, _identity(emb, layout), target)
    emb = _with_statistics(rechunk_to_blocks(emb, layout), found)
    stored = with_margin(emb, layout.margin)
    mine = _identity(emb, layout)
    _initialize(root, target, stored, layout, mine)
    blocks = layout.blocks(stored.shape[1:])
    missing = sorted(blocks - _finished(root, layout))
    _compute(emb, target, layout, missing, len(blocks), progress)
    _finalize(root, target, emb, layout, blocks, mine)
    return open(store, storage_options=storage_options)


def open(
    store: str | os.PathLike[str] | Store, *, storage_options: dict[str, Any] | None = None
) -> xr.DataArray:
    """Open what :func:`to_zarr` wrote, decoded and without its margin; lazy.

    Parameters
    ----------
    store, storage_options
        As in :func:`to_zarr`.

    Returns
    -------
    DataArray, (D, y, x)
        float32 for the codecs ``"int8"`` and ``"float16"``, else the dtype that was stored; dask
        chunks are the blocks. ``attrs`` are those of the embedding, and ``codec``, if one was used.

    Raises
    ------
    StoreError
        If there is no store, or not one of :func:`to_zarr`.

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
    found = _read_identity(root, target)
    if found is None:
        raise StoreError(f"there is no store at {target}: wanted what emb.anysat.to_zarr(...) wrote")
    codec, margin, block = found["codec"], found["margin"], found["block"]
    layout = Layout(codec, tuple(margin), tuple(block))
    dataset = xr.open_zarr(root, chunks={"D": -1, "y": block[0], "x": block[1]}, decode_coords="all")
    wanted = layout.blocks((dataset.sizes["y"], dataset.sizes["x"]))
    unfinished = len(wanted - _finished(root, layout))
    if unfinished:
        warn(
            f"{unfinished} of {len(wanted)} blocks at {target} are not finished, and NaN here: run the to_zarr that "
            "wrote it again, it goes on where it stopped"
        )
    stored = dataset[VALUES]
    emb = stored.copy(data=decode({k: dataset[k].data for k in layout.arrays}, codec))
    emb = emb.drop_encoding()  # how it lies in this store is of no use elsewhere
    emb.encoding = {k: v for k, v in stored.encoding.items() if k == "grid_mapping"}
    emb = emb.isel(y=slice(margin[0], None), x=slice(margin[1], None))
    if any(margin):
        emb = with_transform(emb, found["grid"].get("geotransform"))
    if codec is not None:
        emb.attrs["codec"] = codec
    texts = {k: c for k, c in emb.coords.items() if c.dtype.kind in "OT"}
    return emb.assign_coords({k: c.astype(object).astype(str) for k, c in texts.items()})


# ---------------------------------------------------------------------- identity


def _identity(emb: xr.DataArray, layout: Layout) -> dict[str, Any]:
    """All that a resumed run must have in common with the store, as JSON has it."""
    geobox = grid_of(emb)
    grid: dict[str, Any] = {"shape": list(emb.shape)}
    if geobox is not None:
        grid |= {"crs": crs_name(geobox.crs), "transform": list(geobox.affine)[:6]}
        if "spatial_ref" in emb.coords:
            grid["geotransform"] = emb["spatial_ref"].attrs.get(TRANSFORM)
    else:
        grid |= {str(d): [str(emb[d].values[0]), str(emb[d].values[-1])] for d in emb.dims if d in emb.coords}
    others = {str(k): c for k, c in emb.coords.items() if k != "spatial_ref"}
    coords = {k: list(c.dims) if c.dims else str(c.values) for k, c in others.items()}
    identity = {
        **asdict(layout), "dtype": str(emb.dtype),
        "grid": grid, "coords": coords, "weights": weights_identity(emb.attrs), "attrs": parse_nested(emb.attrs),
    }  # fmt: skip
    out: dict[str, Any] = json.loads(json.dumps(identity, default=json_default))
    return out


def _read_identity(root: Any, target: StoreLocation) -> dict[str, Any] | None:
    """What the store at `root` says it is; None if there is nothing."""
    if target.is_folder and Path(target.address).is_file():
        raise StoreError(f"{target} is a file: wanted a folder, or a path where nothing is yet")
    text = read(root, "zarr.json")
    if text is None and is_empty(root):
        return None
    text = text or read(root, "zarr.json")  # another run may have begun in between
    try:
        identity: dict[str, Any] = json.loads(json.loads(text or b"{}")["attributes"][STORE_ATTR])
    except (ValueError, KeyError, TypeError):
        what = "other files" if text is None else "a Zarr store"
        raise StoreError(
            f"{target} holds {what}, but not what emb.anysat.to_zarr(...) writes: give another path. Plain Zarr is "
            "opened by xarray.open_zarr"
        ) from None
    return identity


def _check_same(found: dict[str, Any], mine: dict[str, Any], target: StoreLocation) -> None:
    """Refuse to go on with a store of something else."""
    known = (
        {} if "norm_mean" in mine["attrs"] else {"norm_bands", "norm_mean", "norm_std"}
    )  # not computed yet
    found_differences = [
        f"{name} is {shorten(a, b)} in the store and {shorten(b, a)} here"
        for name, a, b in differences(found, mine)
        if name.rpartition(".")[2] not in known
    ]
    if found_differences:
        shown = "; ".join(found_differences[:5])
        more = len(found_differences) - 5
        shown += f"; and {more} more" if more > 0 else ""
        raise StoreError(
            f"{target} was started with different settings and cannot be resumed: {shown}. Make the "
            "embedding as it was (the config attribute of the store holds its options), or give another path"
            f"{upgrade_hint(found['attrs'])}"
        )
    before, now = found["attrs"].get("versions"), mine["attrs"].get("versions")
    if before != now:
        changed = [f"{name} {a} and now {b}" for name, a, b in differences(before or {}, now or {})]
        warn(
            f"{target} was started with {', '.join(changed)}: blocks written from here on may differ by "
            "rounding. Use the versions that started it for a bit-identical result"
        )


# ---------------------------------------------------------------------- statistics


def _with_statistics(emb: xr.DataArray, stored_identity: dict[str, Any] | None) -> xr.DataArray:
    """Return the cube with the statistics of ``per_tile_zscore`` as numbers, in its graph and in its attrs.

    A store that exists has them already, so that a resumed run normalizes by the same numbers and reads the cube
    only once. For a new store they are computed before the first block, so that no frame is kept for them.
    """
    from dask.base import annotate

    statistics = emb.encoding.get(STATISTICS)
    if not isinstance(statistics, Companion):
        return emb
    if any(n > whole for n, whole in zip(emb.shape, emb.attrs.get("grid_shape", emb.shape), strict=True)):
        return emb  # several embeddings joined: these are the attrs of the first one
    recorded = {} if stored_identity is None else stored_identity["attrs"]
    if "norm_mean" in recorded:
        values: Any = np.array(
            [recorded["norm_mean"], recorded["norm_std"]], float
        )  # zarr 3.0 writes NaN as a text
    else:
        with annotate(retries=RETRIES):  # for a cluster; schedulers of one process ignore it
            values = statistics.compute(emb.data)
    if values is None:
        return emb
    mean, std = values.tolist()
    attrs = {k: v for k, v in emb.attrs.items() if k != "norm_statistics"}
    emb = emb.copy(data=with_value(emb.data, statistics.key, values))
    emb.attrs = {**attrs, "norm_bands": list(S2.bands), "norm_mean": mean, "norm_std": std}
    return emb


# ---------------------------------------------------------------------- writing


def _initialize(
    root: Any, target: StoreLocation, stored: xr.DataArray, layout: Layout, mine: dict[str, Any]
) -> None:
    """Put all metadata and coordinates in place, or find that they are."""
    head = _metadata_files(stored, layout, mine)
    write(root, "zarr.json", head.pop("zarr.json"), target, replace=False)
    found = _read_identity(root, target)  # another run may have been first
    assert found is not None
    _check_same(found, mine, target)
    for key, value in head.items():
        write(root, key, value, target, replace=False)


def _metadata_files(stored: xr.DataArray, layout: Layout, mine: dict[str, Any]) -> dict[str, bytes]:
    """Files of the store but for the blocks, made by xarray and zarr in memory."""
    from zarr.codecs import BloscCodec
    from zarr.storage import MemoryStore

    from xr_anysat.store import zarr_conventions as conventions

    cell_bytes = stored.sizes["D"] * stored.dtype.itemsize
    inner = inner_chunk(layout.block, cell_bytes)
    arrays: dict[str, xr.DataArray] = {}
    encoding: dict[str, dict[str, Any]] = {}
    for name, dtype in dtypes(layout.codec, stored.dtype).items():
        array = stored if name == VALUES else stored.isel(D=0, drop=True)
        depth = (stored.sizes["D"],) if name == VALUES else ()
        arrays[name] = array.astype(dtype)
        if name != VALUES:
            arrays[name].attrs = {}
        encoding[name] = {
            "chunks": (*depth, *inner), "shards": (*depth, *layout.block),
            "compressors": (BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle"),),
        }  # fmt: skip
        if dtype.kind == "f":
            encoding[name]["_FillValue"] = np.nan
    # of any length, which others read too, unlike NumPy's of one length
    texts = {k: c.astype(object) for k, c in stored.coords.items() if c.dtype.kind == "U"}
    group = conventions.group_attributes(
        stored,
        data_type=str(dtypes(layout.codec, stored.dtype)[VALUES]),
        quantization=CODECS[layout.codec].quantization,
    )
    sides = dict(zip(("y", "x"), layout.block, strict=True))
    for key, coord in stored.coords.items():
        if coord.ndim and key not in coord.dims:  # in chunks that blocks lie in, too
            encoding[str(key)] = {"chunks": tuple(sides.get(str(d), n) for d, n in coord.sizes.items())}
    dataset = xr.Dataset(arrays, attrs={**group, STORE_ATTR: json.dumps(mine)}).assign_coords(texts)
    memory = MemoryStore()
    with warnings.catch_warnings():
        # readers that do not know consolidated metadata may leave them aside
        warnings.filterwarnings("ignore", "Consolidated metadata", UserWarning)
        dataset.to_zarr(
            memory, compute=False, zarr_format=3, consolidated=True, encoding=encoding, safe_chunks=False
        )
    files = {key: read(memory, key) or b"" for key in keys(memory, "")}
    return _filled_with_nan(files, [name for name in arrays if arrays[name].dtype.kind == "f"])


def _filled_with_nan(files: dict[str, bytes], names: list[str]) -> dict[str, bytes]:
    """Set the fill value of float arrays to NaN, as xarray does since 2025.3; before, Zarr's is 0 and cannot be set."""
    found = {key: json.loads(files[key]) for key in ("zarr.json", *(f"{name}/zarr.json" for name in names))}
    listed = found["zarr.json"]["consolidated_metadata"]["metadata"]
    metadata = [doc for name in names for doc in (found[f"{name}/zarr.json"], listed[name])]
    if all(doc["fill_value"] == "NaN" for doc in metadata):
        return files
    for doc in metadata:
        doc["fill_value"] = "NaN"
    return files | {key: json.dumps(doc, indent=2).encode() for key, doc in found.items()}


def _finished(root: Any, layout: Layout) -> set[tuple[int, int]]:
    """The blocks of which every array has its shard."""
    done: set[tuple[int, int]] | None = None
    for name in layout.arrays:
        here = set()
        for key in keys(root, f"{name}/c/"):
            *_, row, col = key.split("/")
            if row.isdecimal() and col.isdecimal():  # else the draft of a writer that was killed
                here.add((int(row), int(col)))
        done = here if done is None else done & here
    return done or set()


def _compute(
    emb: xr.DataArray,
    target: StoreLocation,
    layout: Layout,
    missing: list[tuple[int, int]],
    total: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Compute and write the blocks `missing`: on the active client's cluster, or in this process."""
    import dask.array as da
    from dask.base import get_scheduler, tokenize
    from dask.blockwise import fuse_roots, optimize_blockwise
    from dask.layers import ArrayBlockIdDep
    from dask.threaded import get as threaded

    finished = total - len(missing)

    def count(blocks: int = 1) -> None:
        nonlocal finished
        finished += blocks
        if progress is not None:
            progress(finished, total)

    count(0)
    if not missing:
        return
    name = f"anysat-write-{tokenize(emb.data.name, str(target), layout)}"
    written = da.blockwise(
        _write_block, "dyx", emb.data, "dyx", ArrayBlockIdDep(emb.data.chunks), "dyx", target=target, layout=layout,
        name=name, align_arrays=False, dtype=object, meta=np.empty((0, 0, 0), object),
    )  # fmt: skip
    layers = written.__dask_graph__().layers
    # Nothing is concatenated here, but dask makes one task of two only if they agree about it.
    layers[name].concatenate = getattr(layers.get(emb.data.name), "concatenate", None)
    wanted = [(name, 0, *place) for place in missing]
    # Not `dask.array.optimize`: it would rename the tasks, and drop annotations such as the GPU that they need.
    graph = fuse_roots(optimize_blockwise(written.__dask_graph__(), keys=wanted), keys=wanted)
    graph = graph.cull(set(wanted))  # only what the missing blocks need is left
    get = get_scheduler(collections=[emb.data]) or threaded
    client = getattr(get, "__self__", None)
    try:
        if hasattr(client, "scheduler_info"):
            _on_cluster(client, graph, wanted, count)
        else:
            _in_process(get, graph, wanted, count)
    except BaseException as error:
        error.add_note(
            f"{finished} of the {total} blocks of {target} are finished and stay: the same call goes on from there"
        )
        raise


def _in_process(get: Any, graph: Any, keys: list[Any], count: Callable[[], None]) -> None:
    """Run `keys` by a scheduler of this process."""
    from dask.callbacks import Callback

    wanted = set(keys)
    done = Callback(posttask=lambda key, *_: count() if key in wanted else None)
    with done, in_turn(graph, keys):  # the cube is read as it lies, so that little of it is held
        get(graph, keys)


def _on_cluster(client: Any, graph: Any, keys: list[Any], count: Callable[[], None]) -> None:
    """Run `keys` on a cluster.

    A block is forgotten as soon as it is finished: were the cluster still to know it when its worker dies,
    it would be computed again.
    """
    from dask.base import annotate
    from distributed import as_completed

    with annotate(priority=turns(graph, keys)):  # no longer: annotations are those of every thread
        futures = client.get(graph, keys, sync=False, retries=RETRIES)
    running = dict.fromkeys(futures)
    try:
        for future in as_completed(futures, loop=client.loop):
            if future.status == "cancelled":
                raise WriteError(
                    "the cluster does not go on: the connection to its scheduler was lost, the client was closed, or "
                    "the work was cancelled. Connect a client to a running cluster and repeat the call"
                )
            if future.status == "error":
                _raise(future)
            # not future.result(), which would ask the worker for what it returned: nothing, and late
            future.release()
            del running[future]
            count()
    finally:  # what is left is not wanted any more; what another client wants too goes on
        for future in running:
            future.release()


def _raise(future: Any) -> None:
    """Raise what a task raised, with the block that needed it."""
    try:
        future.result()
    except Exception as error:
        row, col = future.key[-2:]
        error.add_note(f"this was in the making of block {row} along y, {col} along x")
        raise


def _write_block(
    values: np.ndarray, block: tuple[int, int, int], *, target: StoreLocation, layout: Layout
) -> None:
    """Encode a block (D, y, x) and put it in place; what it holds is then told by the store alone."""
    import zarr

    place = block[1:]
    before = [m if at == 0 else 0 for m, at in zip(layout.margin, place, strict=True)]
    if any(before):
        values = np.pad(values, [(0, 0), *((n, 0) for n in before)], constant_values=np.nan)
    at: Any = tuple(
        slice(i * side, i * side + n)
        for i, side, n in zip(place, layout.block, values.shape[1:], strict=True)
    )
    for name, part in encode(values, layout.codec).items():
        try:
            stored: Any = zarr.open_array(target.root(), path=name, mode="r+", zarr_format=3)
            # a block of nothing but NaN has a shard too, or it would never count as finished
            config: Any = {"write_empty_chunks": True}  # Array.with_config, which zarr 3.0 does not have
            array: Any = zarr.Array(zarr.AsyncArray(stored.metadata, stored.store_path, config))
            array[(..., *at)] = part
        except Exception as error:  # of the file system, or of whichever library speaks to the server
            if isinstance(error, FileNotFoundError) and place in _finished(target.root(), layout):
                return  # another run of the same wrote it, finished, and cleared this draft away
            if target.is_folder and not Path(target.address, "zarr.json").exists():
                raise WriteError(
                    f"{target} could not be written: it is not there on {platform.node()}. Wanted a folder that client "
                    "and workers have in common, or a URL, as 's3://bucket/area.zarr'; or, if it was deleted, the same "
                    "call again"
                ) from error
            raise write_error(target, error) from error


def _finalize(
    root: Any,
    target: StoreLocation,
    emb: xr.DataArray,
    layout: Layout,
    blocks: set[tuple[int, int]],
    mine: dict[str, Any],
) -> None:
    """Look whether all is there, clear what killed writers left, and write the STAC Items."""
    found = _read_identity(root, target)
    left = len(blocks - _finished(root, layout))
    if found is None or left:
        raise StoreError(
            f"{left} blocks of {target} have vanished while others were written: was it deleted? Repeat the call"
        )
    _check_same(found, mine, target)
    if target.is_folder:
        for draft in Path(target.address).rglob(f"*{DRAFT}"):
            draft.unlink(missing_ok=True)
    from xr_anysat.store import stac_items as conventions

    beside, stem = target.beside()
    item = conventions.stac_item(
        emb,
        item_id=stem.rstrip(".") or "anysat",
        href=f"./{target.name if stem else ''}",
        media_type="application/vnd.zarr; version=3",
        codec=layout.codec,
    )
    model = conventions.model_item(emb)
    if item is not None and model is not None:  # what was not made by embed() has no record to tell
        for name, content in {str(model["id"]): model, f"{stem}stac": item}.items():
            if target.is_folder:
                for draft in Path(target.address).parent.glob(f"{glob.escape(name)}.*{DRAFT}"):
                    draft.unlink(missing_ok=True)
            write(beside, f"{name}.json", json.dumps(content, indent=2).encode(), target)

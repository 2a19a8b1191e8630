"""Compute an embedding cube into a Zarr store, block by block.

`write_cube` first writes all metadata and coordinates. Then each block is written as one shard per array, which appears
as a whole or not at all. A block with a shard in every array is finished, so a run that was killed at any moment
resumes with the blocks that have none.

Blocks are on the lattice of windows, while the corner of the cube usually is not, and all chunks of a Zarr array have
one size. If the first block is cut, the store has a margin of NaN cells before it, which `open` removes.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from xr_anysat.cube.normalization import STATISTICS
from xr_anysat.errors import AnySatError, CubeError, StoreError, WriteError
from xr_anysat.record import ATTRIBUTES, read_record
from xr_anysat.shared.graph import Companion, in_turn, turns, with_value
from xr_anysat.shared.sensor import S2
from xr_anysat.shared.serialization import first_violation
from xr_anysat.store.codecs import CODECS, VALUES, check_codec
from xr_anysat.store.identity import (
    STORE_ATTR,
    check_same,
    count_unfinished,
    finished_blocks,
    identity_of,
    layout_of,
    parse_identity,
    read_identity,
)
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
    delete_drafts,
    keys,
    read,
    write,
    write_error,
)

RETRIES = 2
"""Number of times that a cluster repeats a failed task."""


def write_cube(
    emb: xr.DataArray,
    target: StoreLocation,
    codec: str | None,
    *,
    resume: bool = True,
    progress: Callable[[int, int], None] | None = None,
    like: Layout | None = None,
) -> None:
    """Compute an embedding cube (D, y, x) into a store; a new store has the blocks of `like`, if it is passed."""
    check_codec(codec, emb.dtype)
    with storable():
        emb = prepare_for_store(emb)
        if emb.chunks is None:
            emb = emb.chunk({"D": -1, "y": BLOCK_CELLS, "x": BLOCK_CELLS})
        layout = like or Layout(codec, *margin_and_block(emb))
        identity_of(emb, layout)  # before statistics are computed, which may take hours
    root = target.root()
    stored_identity = read_identity(root, target)
    if stored_identity is not None and not resume:
        raise StoreError(
            f"a store exists at {target}, and resume=False: pass resume=True to resume it, give another path, or "
            "delete the store first"
        )
    if stored_identity is not None:  # before statistics are computed, which may take hours
        layout = dataclasses.replace(layout_of(stored_identity), codec=codec)
        check_same(stored_identity, identity_of(emb, layout), target)
    emb = _with_statistics(rechunk_to_blocks(emb, layout), stored_identity)
    stored = with_margin(emb, layout.margin)
    own_identity = identity_of(emb, layout)
    _initialize(root, target, stored, layout, own_identity)
    down, across = layout.counts(stored.shape[1:])
    finished = finished_blocks(root, layout)
    missing = [(i, j) for i in range(down) for j in range(across) if (i, j) not in finished]
    _compute(emb, target, layout, missing, down * across, progress)
    _finalize(root, target, emb, layout, own_identity)


@contextmanager
def storable() -> Iterator[None]:
    """Raise a CubeError for what xarray, zarr or JSON cannot represent."""
    try:
        yield
    except (AnySatError, MemoryError):
        raise
    except Exception as error:
        raise CubeError(
            f"the cube cannot be stored: {type(error).__name__}: {error}. Coordinates of a store are numbers, text or "
            "times, and their names are text without '/'. Convert or rename the others, or drop them with "
            "emb.drop_vars(name)"
        ) from error


# ---------------------------------------------------------------------- statistics


def _with_statistics(emb: xr.DataArray, stored_identity: dict[str, Any] | None) -> xr.DataArray:
    """Return the cube with the statistics of ``per_tile_zscore`` as numbers, in its graph and in its attrs.

    A store that exists has them already, so that a resumed run normalizes by the same numbers and reads the cube
    only once. For a new store they are computed before the first block, so that no frame is kept for them.
    """
    if not isinstance(emb.encoding.get(STATISTICS), Companion):
        return emb
    record = read_record(emb.attrs)
    if any(n > whole for n, whole in zip(emb.shape, record.get("grid_shape", emb.shape), strict=True)):
        return emb  # several embeddings joined: these are the attrs of the first one
    values = statistics_of(emb, stored_identity)
    return emb if values is None else with_values(emb, values)


def statistics_of(emb: xr.DataArray, stored_identity: dict[str, Any] | None) -> np.ndarray | None:
    """Return the statistics of a store, or compute those of a lazy cube; None if that is impossible."""
    from dask.base import annotate

    recorded = {} if stored_identity is None else stored_identity["attrs"]
    if "norm_mean" in recorded:
        problem = first_violation(recorded, {name: ATTRIBUTES[name] for name in ("norm_mean", "norm_std")})
        if problem is not None:
            raise StoreError(f"the statistics in the store are damaged: {problem}. Give another path")
        # zarr 3.0 writes NaN as a text
        return np.array([recorded["norm_mean"], recorded["norm_std"]], float)
    with annotate(retries=RETRIES):  # for a cluster; schedulers of one process ignore it
        computed: np.ndarray | None = emb.encoding[STATISTICS].compute(emb.data)
    return computed


def with_values(emb: xr.DataArray, values: np.ndarray) -> xr.DataArray:
    """Return a lazy cube with statistics as numbers, in its graph and in its attrs."""
    mean, std = values.tolist()
    attrs = {k: v for k, v in emb.attrs.items() if k != "norm_statistics"}
    emb = emb.copy(data=with_value(emb.data, emb.encoding[STATISTICS].key, values))
    emb.attrs = {**attrs, "norm_bands": list(S2.bands), "norm_mean": mean, "norm_std": std}
    return emb


# ---------------------------------------------------------------------- writing


def _initialize(
    root: Any, target: StoreLocation, stored: xr.DataArray, layout: Layout, own_identity: dict[str, Any]
) -> None:
    """Write all metadata and coordinates that are not there yet."""
    with storable():
        files = _metadata_files(stored, layout, own_identity)
        parse_identity(files["zarr.json"])  # what is written can be read
    write(root, "zarr.json", files.pop("zarr.json"), target, replace=False)
    stored_identity = read_identity(root, target)  # another run may have been first
    assert stored_identity is not None
    check_same(stored_identity, own_identity, target)
    for key, value in files.items():
        write(root, key, value, target, replace=False)


def _metadata_files(stored: xr.DataArray, layout: Layout, own_identity: dict[str, Any]) -> dict[str, bytes]:
    """Return all files of the store except the blocks, created in memory by xarray and zarr."""
    from zarr.codecs import BloscCodec, Crc32cCodec
    from zarr.storage import MemoryStore

    from xr_anysat.store import zarr_conventions as conventions

    cell_bytes = stored.sizes["D"] * stored.dtype.itemsize
    inner = inner_chunk(layout.block, cell_bytes)
    arrays: dict[str, xr.DataArray] = {}
    encoding: dict[str, dict[str, Any]] = {}
    dtypes = CODECS[layout.codec].dtypes(stored.dtype)
    compressors = (BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle"), Crc32cCodec())
    for name, dtype in dtypes.items():
        array = stored if name == VALUES else stored.isel(D=0, drop=True)
        depth = (stored.sizes["D"],) if name == VALUES else ()
        arrays[name] = array.astype(dtype)
        if name != VALUES:
            arrays[name].attrs = {}
        encoding[name] = {
            "chunks": (*depth, *inner), "shards": (*depth, *layout.block), "compressors": compressors,
        }  # fmt: skip
        if dtype.kind == "f":
            encoding[name]["_FillValue"] = np.nan
    # text of variable length, which other readers support, unlike NumPy's text of fixed length
    texts = {k: c.astype(object) for k, c in stored.coords.items() if c.dtype.kind == "U"}
    group = conventions.group_attributes(
        stored,
        data_type=str(dtypes[VALUES]),
        quantization=CODECS[layout.codec].quantization,
    )
    sides = dict(zip(("y", "x"), layout.block, strict=True))
    for key, coord in stored.coords.items():
        if coord.ndim:
            encoding[str(key)] = {"compressors": compressors}
            if key not in coord.dims:  # chunked like the blocks
                encoding[str(key)]["chunks"] = tuple(sides.get(str(d), n) for d, n in coord.sizes.items())
    dataset = xr.Dataset(arrays, attrs={**group, STORE_ATTR: json.dumps(own_identity)}).assign_coords(texts)
    memory = MemoryStore()
    with warnings.catch_warnings():
        # other readers may ignore consolidated metadata
        warnings.filterwarnings("ignore", "Consolidated metadata", UserWarning)
        dataset.to_zarr(
            memory, compute=False, zarr_format=3, consolidated=True, encoding=encoding, safe_chunks=False
        )
    files = {key: read(memory, key) or b"" for key in keys(memory, "")}
    return _as_newer_versions_write(files, [name for name in arrays if arrays[name].dtype.kind == "f"])


def _as_newer_versions_write(files: dict[str, bytes], floats: list[str]) -> dict[str, bytes]:
    """Change the metadata of older versions of xarray and zarr in two places.

    The fill value of the arrays `floats` is NaN: xarray before 2025.3 always writes 0. The group lists its arrays in
    alphabetical order: zarr before 3.1.2 lists them in a random order.
    """
    found = {key: json.loads(files[key]) for key in ("zarr.json", *(f"{name}/zarr.json" for name in floats))}
    consolidated = found["zarr.json"]["consolidated_metadata"]
    listed = dict(sorted(consolidated["metadata"].items(), key=lambda item: item[0].casefold()))
    consolidated["metadata"] = listed
    for name in floats:
        for doc in (found[f"{name}/zarr.json"], listed[name]):
            doc["fill_value"] = "NaN"
    return files | {key: json.dumps(doc, indent=2).encode() for key, doc in found.items()}


def _compute(
    emb: xr.DataArray,
    target: StoreLocation,
    layout: Layout,
    missing: list[tuple[int, int]],
    total: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Compute and write the blocks `missing`, on the cluster of the active client or in this process."""
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
    # Nothing is concatenated here, but dask fuses two tasks only if they agree about it
    layers[name].concatenate = getattr(layers.get(emb.data.name), "concatenate", None)
    outputs = [(name, 0, *place) for place in missing]
    # `dask.array.optimize` would rename the tasks, and drop annotations such as the GPU that they need
    graph = fuse_roots(optimize_blockwise(written.__dask_graph__(), keys=outputs), keys=outputs)
    graph = graph.cull(set(outputs))  # keeps only the tasks that the missing blocks need
    get = get_scheduler(collections=[emb.data]) or threaded
    client = getattr(get, "__self__", None)
    try:
        if hasattr(client, "scheduler_info"):
            _on_cluster(client, graph, outputs, count)
        else:
            _in_process(get, graph, outputs, count)
    except BaseException as error:
        error.add_note(
            f"{finished} of the {total} blocks of {target} are finished and kept: repeat the call to resume"
        )
        raise


def _in_process(get: Any, graph: Any, keys: list[Any], count: Callable[[], None]) -> None:
    """Run `keys` by a scheduler of this process."""
    from dask.callbacks import Callback

    outputs = set(keys)
    done = Callback(posttask=lambda key, *_: count() if key in outputs else None)
    with (
        done,
        in_turn(graph, keys),
    ):  # reads the cube in its own order, so that little of it is kept in memory
        get(graph, keys)


def _on_cluster(client: Any, graph: Any, keys: list[Any], count: Callable[[], None]) -> None:
    """Run `keys` on a cluster.

    A finished block is released at once. Otherwise the cluster would compute it again when its worker dies.
    """
    from dask.base import annotate
    from distributed import as_completed

    with annotate(priority=turns(graph, keys)):  # only here, because other threads see annotations, too
        futures = client.get(graph, keys, sync=False, retries=RETRIES)
    running = dict.fromkeys(futures)
    try:
        for future in as_completed(futures, loop=client.loop):
            if future.status == "cancelled":
                raise WriteError(
                    "the cluster stopped: the connection to its scheduler was lost, the client was closed, or the work "
                    "was cancelled. Connect a client to a running cluster and repeat the call to resume"
                )
            if future.status == "error":
                _raise(future)
            # future.result() would fetch the result, which is nothing, from the worker
            future.release()
            del running[future]
            count()
    finally:  # cancels the remaining blocks, except those that another client needs, too
        for future in running:
            future.release()


def _raise(future: Any) -> None:
    """Raise the exception of a failed task, with a note that names its block."""
    try:
        future.result()
    except Exception as error:
        row, col = future.key[-2:]
        error.add_note(f"while block ({row}, {col}) along (y, x) was computed")
        raise


def _write_block(
    values: np.ndarray, block: tuple[int, int, int], *, target: StoreLocation, layout: Layout
) -> None:
    """Encode a block (D, y, x) and write its shards."""
    import zarr

    place = block[1:]
    margin = [m if at == 0 else 0 for m, at in zip(layout.margin, place, strict=True)]
    if any(margin):
        values = np.pad(values, [(0, 0), *((n, 0) for n in margin)], constant_values=np.nan)
    cells: Any = tuple(
        slice(i * side, i * side + n)
        for i, side, n in zip(place, layout.block, values.shape[1:], strict=True)
    )
    for name, part in CODECS[layout.codec].encode(values).items():
        try:
            stored: Any = zarr.open_array(target.root(), path=name, mode="r+", zarr_format=3)
            # a block of NaN alone has a shard, too; otherwise it would never count as finished
            config: Any = {"write_empty_chunks": True}  # zarr 3.0 has no Array.with_config
            array: Any = zarr.Array(zarr.AsyncArray(stored.metadata, stored.store_path, config))
            array[(..., *cells)] = part
        except Exception as error:  # of the file system, or of the library that speaks to the server
            if isinstance(error, FileNotFoundError) and place in finished_blocks(target.root(), layout):
                return  # another run of the same call wrote the block, finished, and deleted this draft
            if target.is_folder and not Path(target.address, "zarr.json").exists():
                raise WriteError(
                    f"{target} could not be written: it does not exist on {platform.node()}. Expected a folder that "
                    "client and workers share, or a URL such as 's3://bucket/area.zarr'. If it was deleted, repeat the "
                    "call"
                ) from error
            raise write_error(target, error) from error


def _finalize(
    root: Any,
    target: StoreLocation,
    emb: xr.DataArray,
    layout: Layout,
    own_identity: dict[str, Any],
) -> None:
    """Check that the store is complete, delete drafts of killed writers, and write the STAC Items."""
    stored_identity = read_identity(root, target)
    sizes = [n + m for n, m in zip(emb.shape[1:], layout.margin, strict=True)]
    unfinished, _ = count_unfinished(root, layout, sizes)
    if stored_identity is None or unfinished:
        raise StoreError(
            f"{unfinished} blocks of {target} disappeared while others were written: was the store deleted? Repeat "
            "the call to write them again"
        )
    check_same(stored_identity, own_identity, target)
    delete_drafts(target)
    from xr_anysat.store import stac_items

    folder, stem = target.sibling()
    item = stac_items.stac_item(
        emb,
        item_id=stem.rstrip(".") or "anysat",
        href=f"./{target.name if stem else ''}",
        media_type="application/vnd.zarr; version=3",
        codec=layout.codec,
    )
    model = stac_items.model_item(emb)
    if item is not None and model is not None:  # a cube that embed() did not compute has no record
        for name, content in {str(model["id"]): model, f"{stem}stac": item}.items():
            if target.is_folder:
                for draft in Path(target.address).parent.glob(f"{glob.escape(name)}.*{DRAFT}"):
                    draft.unlink(missing_ok=True)
            write(folder, f"{name}.json", json.dumps(content, indent=2).encode(), target)

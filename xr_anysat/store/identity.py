"""What a store holds: its identity, which a run that resumes it must share, and its finished blocks.

Everything here that was read from a store is checked before use: a store may come from anybody.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xarray as xr

from xr_anysat.errors import StoreError, warn
from xr_anysat.record import differences, parse_nested, shorten, upgrade_hint, weights_identity
from xr_anysat.shared.grid import TRANSFORM, crs_name, grid_of
from xr_anysat.shared.serialization import (
    NUMBER,
    OBJECT,
    TEXT,
    Rule,
    first_violation,
    json_default,
    list_of,
    one_of,
    optional,
    or_none,
    parse_json,
    whole,
)
from xr_anysat.store.codecs import CODECS, VALUES
from xr_anysat.store.layout import Layout
from xr_anysat.store.location import StoreLocation, is_empty, keys, read

MAX_BLOCKS = 2**24
"""Largest number of blocks of a store, which is more than dask can compute."""

STORE_ATTR = "anysat_store"
"""Key of the identity in the attributes of a store's group; the value is JSON."""

MAX_SIDE = 2**23
"""Largest number of cells along y or x. At 10 m this is twice the circumference of the Earth."""

MAX_COORDINATE_CHUNKS = 1024
"""Largest number of chunks of a coordinate such as y, all of which are read when a store is opened."""

CHUNK_CODECS = {
    "sharding_indexed", "bytes", "blosc", "zstd", "gzip", "crc32c", "transpose", "vlen-utf8", "vlen-bytes",
}  # fmt: skip
"""Codecs of chunks that a store may name. Others, of Zarr 2 or of other packages, may execute code: pickle does."""

MAX_CHANNELS = 2**16
"""Largest number of channels; a model of AnySat has at most 1536."""


def identity_of(emb: xr.DataArray, layout: Layout) -> dict[str, Any]:
    """Return everything that a resumed run must share with the store, as JSON represents it."""
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


def layout_of(identity: Mapping[str, Any]) -> Layout:
    """Return the layout of a store from its identity."""
    return Layout(identity["codec"], tuple(identity["margin"]), tuple(identity["block"]))


def read_identity(root: Any, target: StoreLocation) -> dict[str, Any] | None:
    """Read and check the identity of the store at `root`; None if nothing is there.

    Raises
    ------
    StoreError
        If there is something else, or the identity is damaged.
    """
    if target.is_folder and Path(target.address).is_file():
        raise StoreError(f"{target} is a file: expected a folder, or a path where nothing exists yet")
    text = read(root, "zarr.json")
    if text is None and is_empty(root):
        return None
    text = text or read(root, "zarr.json")  # another run may have started in between
    try:
        return parse_identity(text or b"{}")
    except (KeyError, TypeError):
        what = "other files" if text is None else "a Zarr store"
        raise StoreError(
            f"{target} contains {what}, but not what emb.anysat.to_zarr(...) writes: give another path. "
            "xarray.open_zarr opens any Zarr store"
        ) from None
    except ValueError as error:
        raise StoreError(
            f"{target} is damaged or was not written by to_zarr: {error}. Restore its zarr.json from a copy, or write "
            "the embeddings to another path"
        ) from error


def parse_identity(text: bytes) -> dict[str, Any]:
    """Parse and check the metadata of a store's group, and return the identity in it.

    Raises
    ------
    KeyError, TypeError
        If there is no identity.
    ValueError
        If anything is not as `to_zarr` writes it.
    """
    group = parse_json(text)
    identity = parse_json(group["attributes"][STORE_ATTR])
    problem = (
        _problem_of_identity(identity)
        or _problem_of_arrays(group, identity)
        or _problem_of_coordinates(group, identity)
    )
    if problem is not None:
        raise ValueError(problem)
    checked: dict[str, Any] = identity
    return checked


_SIZES = (whole(1, MAX_CHANNELS), whole(1, MAX_SIDE), whole(1, MAX_SIDE))

_IDENTITY: dict[str, Rule] = {
    "codec": one_of(*CODECS),
    "dtype": one_of("float16", "float32", "float64"),
    "block": list_of(whole(1, MAX_SIDE), 2),
    "margin": list_of(whole(0, MAX_SIDE), 2),
    "grid": OBJECT,
    "coords": OBJECT,
    "weights": optional(or_none(TEXT)),
    "attrs": OBJECT,
}
"""The rule of each entry of an identity."""

_GRID: dict[str, Rule] = {
    "shape": Rule(
        f"a shape up to ({MAX_CHANNELS}, {MAX_SIDE}, {MAX_SIDE})",
        lambda v: (
            isinstance(v, list) and len(v) == 3 and all(r.holds(n) for r, n in zip(_SIZES, v, strict=True))
        ),
    ),
    "transform": optional(list_of(NUMBER, 6)),
    "geotransform": optional(or_none(TEXT)),
}
"""The rule of each entry of the grid in an identity."""


def _problem_of_identity(identity: Any) -> str | None:
    """Return what is wrong with an identity that was read; None if nothing is."""
    problem = first_violation(identity, _IDENTITY) or first_violation(identity["grid"], _GRID)
    if problem is not None:
        return f"in its attribute {STORE_ATTR!r}, {problem}"
    if any(m >= b for m, b in zip(identity["margin"], identity["block"], strict=True)):
        return f"the margin {identity['margin']} is not smaller than the block {identity['block']}"
    down, across = layout_of(identity).counts(
        [n + m for n, m in zip(identity["grid"]["shape"][1:], identity["margin"], strict=True)]
    )
    if down * across > MAX_BLOCKS:
        return (
            f"the grid has {down * across} blocks of {identity['block']} cells: expected at most {MAX_BLOCKS}"
        )
    if identity["codec"] is not None and identity["dtype"] != "float32":
        return f"the codec {identity['codec']!r} does not store {identity['dtype']}: expected float32"
    return None


def _problem_of_coordinates(group: Any, identity: Mapping[str, Any]) -> str | None:
    """Return which array is not on the grid of the identity, or in so many chunks that opening it takes long."""
    layout = layout_of(identity)
    depth, *cells = identity["grid"]["shape"]
    sizes = {"D": depth} | {d: n + m for d, n, m in zip(("y", "x"), cells, layout.margin, strict=True)}
    try:
        arrays = dict(group["consolidated_metadata"]["metadata"])
    except (KeyError, TypeError, ValueError):
        return "the consolidated metadata are missing"
    for name, array in arrays.items():
        try:
            dims, shape = array.get("dimension_names") or [], array["shape"]
            chunks = array["chunk_grid"]["configuration"]["chunk_shape"]
        except (AttributeError, KeyError, TypeError):
            return f"the metadata of {name!r} are not those of an array"
        if (array.get("zarr_format"), array.get("node_type")) != (3, "array"):
            return f"the array {name!r} has another format: expected an array of Zarr 3"
        unknown = codecs_of(array.get("codecs")) - CHUNK_CODECS
        if unknown:
            return f"the array {name!r} has codecs {sorted(unknown)}: expected some of {sorted(CHUNK_CODECS)}"
        if not list_of(one_of(*sizes)).holds(dims) or shape != [sizes[d] for d in dims]:
            return (
                f"the array {name!r} has the dimensions {shorten(dims, None)} and the shape {shorten(shape, None)}: "
                f"expected dimensions of the grid, {sizes}"
            )
        if name in sizes and dims != [name]:
            return f"the array {name!r} has the dimensions {shorten(dims, None)}: expected [{name!r}]"
        if not list_of(whole(1, MAX_SIDE), len(dims)).holds(chunks):
            return f"the array {name!r} has chunks of {shorten(chunks, None)}: expected whole numbers from 1"
        count = math.prod(-(-n // c) for n, c in zip(shape, chunks, strict=True))
        limit = (
            MAX_COORDINATE_CHUNKS if dims == [name] else MAX_BLOCKS
        )  # the former are read when a store is opened
        if count > limit:
            return f"the array {name!r} has {count} chunks of {chunks}: expected at most {limit}"
    return None


def codecs_of(chain: Any) -> set[str]:
    """Return the names of all codecs in a chain, also of those within others."""
    names: set[str] = set()
    for codec in chain if isinstance(chain, list) else [chain]:
        named = isinstance(codec, dict) and isinstance(codec.get("name"), str)
        names.add(codec["name"] if named else str(codec)[:40])
        inner: Any = codec.get("configuration") if named else None
        for key in {"codecs", "index_codecs"} & (inner.keys() if isinstance(inner, dict) else set()):
            names |= codecs_of(inner[key])
    return names


def _problem_of_arrays(group: Any, identity: Mapping[str, Any]) -> str | None:
    """Return which array does not agree with the identity, by the metadata of the group; None if all do."""
    layout = layout_of(identity)
    depth, *cells = identity["grid"]["shape"]
    sizes = [n + m for n, m in zip(cells, layout.margin, strict=True)]
    for name, dtype in CODECS[layout.codec].dtypes(identity["dtype"]).items():
        dims = ["D", "y", "x"] if name == VALUES else ["y", "x"]
        channels = [depth] if name == VALUES else []
        expected = (dims, [*channels, *sizes], str(dtype), [*channels, *layout.block])
        try:
            array = group["consolidated_metadata"]["metadata"][name]
            shards = array["chunk_grid"]["configuration"]["chunk_shape"]
            seen = (array["dimension_names"], array["shape"], array["data_type"], shards)
        except (KeyError, TypeError):
            return f"the metadata of the array {name!r} are missing"
        if seen != expected:
            return f"the array {name!r} is {shorten(seen, expected)}: expected {shorten(expected, seen)}"
    return None


def check_same(
    stored_identity: Mapping[str, Any], own_identity: Mapping[str, Any], target: StoreLocation
) -> None:
    """Refuse to resume a store that was started with different settings; warn if versions differ.

    Raises
    ------
    StoreError
        Naming the differences.
    """
    attrs = own_identity["attrs"]
    not_computed = set() if "norm_mean" in attrs else {"norm_bands", "norm_mean", "norm_std"}
    differing = [
        f"{name} is {shorten(a, b)} in the store and {shorten(b, a)} here"
        for name, a, b in differences(stored_identity, own_identity)
        if name.rpartition(".")[2] not in not_computed
    ]
    if differing:
        shown = "; ".join(differing[:5])
        more = len(differing) - 5
        shown += f"; and {more} more" if more > 0 else ""
        raise StoreError(
            f"{target} was started with different settings and cannot be resumed: {shown}. Embed with the same "
            "settings (the store has its options in the attribute config), or give another path"
            f"{upgrade_hint(stored_identity['attrs'])}"
        )
    before, now = (each["attrs"].get("versions") for each in (stored_identity, own_identity))
    if before != now:
        changed = [f"{name} {a} and now {b}" for name, a, b in differences(before or {}, now or {})]
        warn(
            f"{target} was started with {', '.join(changed)}: new blocks may differ by rounding. Use the versions that "
            "started it for a bit-identical result"
        )


def shard_key(name: str, place: tuple[int, int]) -> str:
    """Return the name of the file of a block in an array of a store."""
    row, col = place
    return f"{name}/c/0/{row}/{col}" if name == VALUES else f"{name}/c/{row}/{col}"


def finished_blocks(root: Any, layout: Layout) -> set[tuple[int, int]]:
    """Return the blocks that have a shard in every array."""
    found = []
    for name in layout.arrays:
        places = set()
        for key in keys(root, f"{name}/c/"):
            *_, row, col = key.split("/")
            if row.isdecimal() and col.isdecimal():  # others are drafts of writers that were killed
                places.add((int(row), int(col)))
        found.append(places)
    return set.intersection(*found)


def count_unfinished(root: Any, layout: Layout, shape: Sequence[int]) -> tuple[int, int]:
    """Return the number of unfinished blocks and of all blocks in a store of `shape` cells (y, x).

    Only stored blocks are listed, so the cost does not depend on `shape`.
    """
    down, across = layout.counts(shape)
    finished = sum(row < down and col < across for row, col in finished_blocks(root, layout))
    return down * across - finished, down * across

"""Random damage to JSON and files, as an attacker or a broken disk does it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st


def nested(depth: int, kind: str) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind == "list" else {"a": value}
    return value


VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 0.5, -0.0, 2**31, 2**63, 10**30, -(10**30), 10**400, 1e308, -1e308,
    5e-324, float("nan"), float("inf"), "", " ", "NaN", "0", "1", "null", "[]", "{}", "[" * 5000, "{", "a" *
    10_000, "\0", "\ud800", "../../evil", "/evil", "..", "a/b", "<img src=x onerror=alert(1)>", "é",
    "2022-01-01", "0001-01-01/9999-12-31", "nan", "float32", "int8", "float64", "uint16", "<U5", "object",
    "random:1", "random:../../x", "module:x", "official", "patch", "dense", "tile", "grid", "cube", "tiny",
    "EPSG:4326", "EPSG:999999", "y", "x", "D", "anysat", "scale", "bytes", [], {}, [[]], [None], [1], [0, 0],
    [1, 1], [8, 8], [16, 16], [10**9, 10**9], [-1, -1], [1.5, 1.5], ["a", "b"], [1, 2, 3], [10**7] * 3, ["D",
    "y", "x"], ["y", "x"], {"a": 1}, {"name": "blosc"}, nested(40, "list"), nested(200, "dict"),
]  # fmt: skip
"""Values that replace others."""


@st.composite
def mutated(draw: st.DrawFn, document: Any, *, times: int = 3) -> Any:
    """Return a copy of a JSON document with up to `times` entries removed, replaced, renamed or swapped.

    Text that is a JSON object or list is entered, too.
    """
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, times))):
        document = draw(_mutation(document))
    return document


@st.composite
def _mutation(draw: st.DrawFn, value: Any) -> Any:
    inner = _parsed(value)
    if inner is not None and draw(st.integers(0, 9)) > 0:
        return json.dumps(draw(_mutation(inner)))
    if isinstance(value, dict) and value and draw(st.integers(0, 19)) > 0:
        key = draw(st.sampled_from(sorted(value)))
        action = draw(st.integers(0, 11))
        if action == 0:
            return {k: v for k, v in value.items() if k != key}
        if action == 1:
            new = draw(st.sampled_from(["", "..", "../../evil", "a/b", "anysat", "y", "\0", "time"]))
            return {new if k == key else k: v for k, v in value.items()}
        if action == 2:
            other = draw(st.sampled_from(sorted(value)))
            return {**value, key: value[other], other: value[key]}
        if action == 3:
            return {**value, draw(st.sampled_from(["../../evil", "a/b", "new", "y"])): value[key]}
        return {**value, key: draw(_mutation(value[key]))}
    if isinstance(value, list) and value and draw(st.integers(0, 3)) > 0:
        at = draw(st.integers(0, len(value) - 1))
        action = draw(st.integers(0, 5))
        if action == 0:
            return value[:at] + value[at + 1 :]
        if action == 1:
            return [*value, value[at]]
        return [*value[:at], draw(_mutation(value[at])), *value[at + 1 :]]
    if isinstance(value, int | float) and draw(st.booleans()):
        return draw(
            st.sampled_from([value + 1, value - 1, -value, value * 2, value * 10**6, str(value), [value]])
        )
    return draw(st.sampled_from(VALUES))


def _parsed(value: Any) -> Any:
    if not isinstance(value, str) or value[:1] not in ("{", "["):
        return None
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict | list) else None


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Return bytes with some flipped, cut off, removed, repeated or replaced."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        end = min(len(content), at + draw(st.sampled_from([1, 1, 2, 8, 100])))
        action = draw(st.integers(0, 4))
        if action == 0:
            content = content[:at]
        elif action == 1:
            content = content[:at] + content[end:]
        elif action == 2:
            content = content[:end] + content[at:]
        else:
            new = draw(st.binary(min_size=end - at, max_size=end - at))
            content = content[:at] + new + content[end:]
    return content


def damage_store(draw: st.DrawFn, folder: Path) -> None:
    """Damage one or two files of a Zarr store: its metadata as JSON or as bytes, or its chunks."""
    for _ in range(draw(st.integers(1, 2))):
        metadata = sorted(folder.rglob("zarr.json"))
        chunks = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "zarr.json")
        kind = draw(st.integers(0, 9))
        if kind == 0 and chunks:
            path = draw(st.sampled_from(chunks))
            path.write_bytes(draw(damaged(path.read_bytes())))
            continue
        path = folder / "zarr.json" if kind > 3 else draw(st.sampled_from(metadata))
        try:
            document = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            document = None
        if kind in (1, 2) or document is None:
            path.write_bytes(draw(damaged(path.read_bytes())))
            continue
        inner = draw(st.sampled_from([(), *PLACES]))
        path.write_text(json.dumps(draw(_inside(document, inner))), "utf-8", "surrogatepass")


PLACES = [
    ("attributes",), ("attributes", "anysat_store"),
    *[("consolidated_metadata", "metadata", name) for name in ("anysat", "scale", "x", "spatial_ref")],
    *[("consolidated_metadata", "metadata", name, "attributes") for name in ("anysat", "y", "spatial_ref")],
]  # fmt: skip
"""Parts of the metadata of a store that are damaged more often than they would be by chance."""


@st.composite
def _inside(draw: st.DrawFn, document: Any, place: tuple[str, ...]) -> Any:
    """Return a copy of a document that is damaged at `place`, or anywhere if it has no such place."""
    if place and isinstance(document, dict) and place[0] in document:
        return {**document, place[0]: draw(_inside(document[place[0]], place[1:]))}
    return draw(mutated(document))

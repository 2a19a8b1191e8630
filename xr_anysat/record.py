"""The provenance record: how an embedding was computed, and which records are comparable."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import xarray as xr

from xr_anysat.cube.frames_record import FRAMES_RULES, PERIOD_RULE, SOURCE_ATTRS, items_record
from xr_anysat.errors import CubeError, CubeTypeError
from xr_anysat.model.checkpoint import OFFICIAL
from xr_anysat.model.source import MAX_SEED, WeightsSource
from xr_anysat.model.spec import OUTPUTS, SIZES
from xr_anysat.model.weights import PRECISIONS, EncoderSpec, device_of, loaded_sha256
from xr_anysat.shared.sensor import S2
from xr_anysat.shared.serialization import (
    DATE,
    OBJECT,
    TEXT,
    Rule,
    first_violation,
    list_of,
    one_of,
    optional,
    or_none,
    parse_json,
    read_value,
    whole,
)
from xr_anysat.shared.values import is_number, is_whole_number

RECORD_VERSION = 1
"""Version of the schema below. Records without a version are of version 0, which had the same fields.

A record of a newer version may have fields that this version does not know. They count as different from a record
that lacks them or has another value, because only the newer version knows their defaults.
"""


ANY = Rule("any value", lambda v: True)

MAX_PIXELS = 1 << 20
"""Largest side of a window or patch in a record, in pixels or meters."""


def _is_source(text: Any) -> bool:
    """Return whether `text` is the text of a `WeightsSource`."""
    if not TEXT.holds(text) or not text or "\0" in text:
        return False
    source = WeightsSource.parse(text)
    if source.kind == "random":
        return source.value.isascii() and source.value.isdecimal() and int(source.value) <= MAX_SEED
    return source.kind != "module" or (source.value.isascii() and source.value.isalnum())


@dataclass(frozen=True)
class Field:
    """One option of `embed` in the record.

    Attributes
    ----------
    default : object
        The value of records that were written before the field existed.
    since : int
        The version of the schema that introduced the field.
    results : bool
        Whether it changes results: a store is resumed only by a run with the same value.
    vectors : bool
        Whether it changes what vectors mean: embeddings compare only if they have the same value.
    attribute : str or None
        The attribute that repeats the option beside ``config``.
    of_frames : bool
        Whether the record of frames, attribute ``frames``, holds it, too. That one is then compared, since frames
        may have been composed before `embed`.
    rule : Rule
        What its value in a record that was read must be.
    """

    default: Any
    since: int = 0
    results: bool = True
    vectors: bool = True
    attribute: str | None = None
    of_frames: bool = False
    rule: Rule = ANY


_WEIGHTS = Rule("'official', 'random:<seed>', 'module:<token>' or a path", _is_source)

_NORM = Rule("the name of a normalization, or its statistics", lambda v: TEXT.holds(v) or isinstance(v, dict))

_METERS = Rule(
    f"a multiple of {S2.pixel_size:g}", lambda v: is_whole_number(v, 1, MAX_PIXELS) and v % S2.pixel_size == 0
)

_OUTPUT = one_of(*(name for name in OUTPUTS if name != "all"))

FIELDS: dict[str, Field] = {
    "frames": Field(8, of_frames=True, rule=FRAMES_RULES["frames"]),
    "period": Field(None, vectors=False),
    "reduce": Field("median", of_frames=True, rule=FRAMES_RULES["reduce"]),
    "empty": Field("drop", of_frames=True, rule=FRAMES_RULES["empty"]),
    "doy": Field("midpoint", of_frames=True, rule=FRAMES_RULES["doy"]),
    "doy_base": Field(0, attribute="doy_base", of_frames=True, rule=FRAMES_RULES["doy_base"]),
    "bands": Field(None, vectors=False),
    "nodata": Field(None, vectors=False),
    "fill_value": Field(None, of_frames=True, rule=FRAMES_RULES["fill_value"]),
    "norm": Field(
        "per_tile_zscore", vectors=False, attribute="norm", rule=_NORM
    ),  # its statistics are compared
    "patch_size": Field(10, attribute="patch_size_m", rule=_METERS),
    "tile": Field(24, attribute="tile", rule=whole(1, MAX_PIXELS)),
    "overlap": Field(0, attribute="overlap", rule=whole(0, MAX_PIXELS)),
    "anchor": Field("auto", vectors=False, attribute="anchor", rule=TEXT),
    "resize": Field(None, rule=or_none(whole(1, MAX_PIXELS))),
    "output": Field("patch", attribute="output", rule=_OUTPUT),
    "pool": Field(None, vectors=False, attribute="pool", rule=or_none(TEXT)),
    "model": Field(
        "base", vectors=False, attribute="model", rule=one_of(*SIZES)
    ),  # compared from the attribute
    "weights": Field(
        None, results=False, vectors=False, attribute="weights", rule=_WEIGHTS
    ),  # identified by their hash
    "device": Field("auto", results=False, vectors=False, attribute="device", rule=TEXT),
    "precision": Field("float32", attribute="precision", rule=one_of(*PRECISIONS)),
    "batch": Field(None, results=False, vectors=False, rule=or_none(whole(1))),
}
"""Every option of `embed`, in the order of its signature. A new option is a new entry, with its version."""

_FLOAT = Rule(
    "a number", lambda v: is_number(v) or (isinstance(v, float) and v != v) or v == "NaN"
)  # zarr 3.0: "NaN"

_TEXTS = Rule("a JSON object of texts", lambda v: isinstance(v, dict) and all(map(TEXT.holds, v.values())))

_SHA256 = Rule(
    "a sha256 of 64 hexadecimal digits",
    lambda v: v == NOT_LOADED or (isinstance(v, str) and re.fullmatch("[0-9a-f]{64}", v) is not None),
)

ATTRIBUTES: dict[str, Rule] = {
    **{each.attribute: each.rule for each in FIELDS.values() if each.attribute is not None},
    "weights_sha256": _SHA256,
    "n_frames": whole(1),
    "doy0_values": list_of(whole(0, 366)),
    "frame_dates": list_of(DATE),
    "temporal_window": PERIOD_RULE,
    "grid_hw": list_of(whole(1), 2),
    "grid_shape": list_of(whole(1), 3),
    "norm_bands": list_of(TEXT),
    "norm_mean": list_of(_FLOAT, len(S2.bands)),
    "norm_std": list_of(_FLOAT, len(S2.bands)),
    "versions": _TEXTS,
    "frames": OBJECT,
    "config": OBJECT,
    "source": OBJECT,
}
"""The rules of the attributes that `embed` writes."""

_JSON_TEXT = Rule("JSON text", lambda v: isinstance(v, str))

_JSON: dict[str, dict[str, Rule]] = {
    "versions": {},
    "frames": {name: optional(rule) for name, rule in FRAMES_RULES.items()},
    "config": {name: optional(each.rule) for name, each in FIELDS.items()},
    "source": {"catalog": optional(TEXT), "items": optional(ANY)},
}
"""The attributes whose text is JSON, and the rules of its entries."""


def read_record(attrs: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the record of :func:`xr_anysat.embed` in the attributes of a cube, checked and in plain types.

    The attributes may have been read from any file: JSON is parsed, and what Zarr and NetCDF make of lists and numbers
    is undone. Attributes that are not part of the record are left out.

    Parameters
    ----------
    attrs : Mapping
        Attributes of an embedding.

    Returns
    -------
    dict
        Values by name. Entries that `attrs` lack are missing.

    Raises
    ------
    CubeError
        If a value is not one that `embed` writes. The message names the attribute, what was seen and what was expected.
    """
    record: dict[str, Any] = {}
    problem = None
    for name, rule in ATTRIBUTES.items():
        if name not in attrs or problem is not None:
            continue
        try:
            value = parse_json(read_value(attrs[name], _JSON_TEXT)) if name in _JSON else attrs[name]
        except ValueError as error:
            problem = f"{name!r}: {error}"
            continue
        record[name] = read_value(value, rule)
        problem = first_violation({name: record[name]}, {name: rule})
        if problem is None and name in _JSON:
            inner = first_violation(record[name], _JSON[name])
            problem = None if inner is None else f"{inner}, in the JSON of {name!r}"
    if problem is not None:
        raise CubeError(
            f"the record of the embedding is damaged: {problem}. Restore the attributes of the original, "
            f"emb.assign_attrs(original.attrs), or drop them, emb.attrs.clear(){upgrade_hint(attrs)}"
        )
    if "items" in record.get("source", {}):
        record["source"]["items"] = items_record(record["source"]["items"])
    return record


FRAMES_DESCRIPTION = {"acquisitions", "outside_period", "dates", "dates_outside", "empty_bins"}
"""Entries of the record of frames that are not options: the acquisitions that were used."""

NOT_COMPARED = {
    "weights_sha256",
    "versions",
    "record_version",
    "norm_statistics",
    "grid_hw",
    "grid_shape",
    "history",
}
"""Other attributes that may differ between an embedding and its store."""

UNRECORDED = "of the cube's own frames, and not recorded"
"""Value in a comparability record for statistics that were not computed yet."""


def comparability_record(emb: xr.DataArray) -> dict[str, Any]:
    """Return what embeddings must have in common for their vectors to be comparable, according to attrs.

    This is the weights, the statistics and the fields with `Field.vectors`, but not place and time. Empty without a
    record of :func:`xr_anysat.embed`.
    """
    return comparability_of(emb.attrs)


def comparability_of(given: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the comparability record of embeddings with these attributes; see :func:`comparability_record`."""
    if "config" not in given:
        return {}
    attrs = read_record(given)
    record = {"model": attrs.get("model"), "weights": weights_identity(attrs)}
    if {"norm_mean", "norm_std"} <= attrs.keys():
        record["statistics"] = [[float(v) for v in attrs[k]] for k in ("norm_mean", "norm_std")]
    else:
        norm = attrs.get("norm")
        record["statistics"] = UNRECORDED if norm == "per_tile_zscore" else norm
    for name, each in FIELDS.items():
        if each.vectors:
            place = "frames" if each.of_frames else "config"
            record[name] = _value(attrs.get(place, {}), f"attrs.{place}", name)
    if _is_newer(given):
        unknown = {**attrs["config"], **attrs.get("frames", {})}
        record |= {k: v for k, v in unknown.items() if k not in FIELDS and k not in FRAMES_DESCRIPTION}
    return record


def merge_records(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what several records have in common; JSON entry by entry.

    Examples
    --------
    >>> merge_records([{"tile": 24, "config": '{"a": 1, "b": 1}'}, {"tile": 24, "config": '{"a": 1, "b": 2}'}])
    {'tile': 24, 'config': '{"a": 1}'}
    """
    if not records:
        return {}
    common = {}
    for name, value in records[0].items():
        others = [record.get(name) for record in records[1:]]
        if name in ("config", "frames", "source"):
            parsed = [parse_json(text) for text in (value, *(text for text in others if text is not None))]
            shared = {k: v for k, v in parsed[0].items() if all(k in p and p[k] == v for p in parsed[1:])}
            common[name] = json.dumps(shared)
        elif all(other == value for other in others):
            common[name] = value
    return common


def _is_newer(attrs: Mapping[Any, Any]) -> bool:
    newer = whole(RECORD_VERSION + 1)
    return newer.holds(read_value(attrs.get("record_version"), newer))


def upgrade_hint(attrs: Mapping[Any, Any]) -> str:
    """Return the remedy for a record of a newer version, to end a message; empty if `attrs` hold no such record."""
    return UPGRADE_HINT if _is_newer(attrs) else ""


UPGRADE_HINT = (
    ". It was written by a newer version of xr_anysat, which knows more options: upgrade, "
    "pip install -U xr_anysat"
)
"""End of a message about a record with options that this version does not know."""


NOT_RECORDED = "not recorded"
"""Value of an option that a record lacks and this version does not know."""


def _described(value: Any) -> str:
    text = NOT_RECORDED if value in (None, NOT_RECORDED) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def check_comparable(own: Mapping[str, Any], other: Mapping[str, Any], call: str, whose: str) -> None:
    """Refuse embeddings whose vectors are not comparable.

    Parameters
    ----------
    own, other : Mapping
        Results of :func:`comparability_record`; a field missing in a record of an older version has its default.
    call, whose : str
        For the message: the call, and the owner of `other`.

    Raises
    ------
    CubeError
        Naming each difference.
    """
    known = {*FIELDS, "statistics"}

    def value(record: Mapping[str, Any], name: str) -> Any:
        if name not in known:
            return record.get(name, NOT_RECORDED)
        older = record and name in FIELDS
        return record.get(name, FIELDS[name].default if older else None)

    names = [k for k in {**own, **other} if value(own, k) != value(other, k) or value(own, k) == UNRECORDED]
    if not names:
        return
    differing = "; ".join(
        f"{k} {_described(value(own, k))} here, {_described(value(other, k))} {whose}" for k in names
    )
    if names == ["statistics"]:
        remedy = (
            "embed all with the same statistics, norm='pastis' or one saved norm=cube.anysat.statistics(8), because "
            "'per_tile_zscore' normalizes each cube by its own statistics"
        )
    else:
        remedy = "embed all with the same options, cube.anysat.embed(**json.loads(emb.attrs['config']))"
    if not known.issuperset(names):
        remedy += UPGRADE_HINT
    raise CubeError(
        f"{call} of embeddings with different settings: {differing}. Their vectors are not comparable; {remedy}"
    )


_RECORD = (
    "model", "weights", "weights_sha256", "output", "patch_size_m", "tile", "temporal_window",
    "frame_dates", "versions", "config",
)  # fmt: skip


def has_record(emb: xr.DataArray) -> bool:
    """Whether a cube has the record of `embed`."""
    return all(key in emb.attrs for key in _RECORD)


def encoder_spec_of(emb: xr.DataArray) -> EncoderSpec:
    """Read the encoder spec of an embedding from its record."""
    if "config" not in emb.attrs:
        raise CubeTypeError(
            f"prepare(client, DataArray): its attrs {sorted(map(str, emb.attrs))} have no record of an encoder. "
            "Expected the embedding to compute, as embed() returns it"
        )
    record = read_record(emb.attrs)
    config, sha256 = record["config"], record.get("weights_sha256")
    missing = {"model", "weights", "device", "precision"} - config.keys()
    if missing or sha256 is None:
        raise CubeError(
            f"the record of the embedding lacks {', '.join(sorted(missing) or ['weights_sha256'])}: expected the "
            "attributes that embed() writes, emb.assign_attrs(original.attrs)"
        )
    return EncoderSpec(
        config["model"],
        WeightsSource.parse(config["weights"]),
        None if sha256 == NOT_LOADED else sha256,
        config["device"],
        config["precision"],
    )


NOT_LOADED = "not loaded yet"
"""Value in the record for the hash of an official checkpoint that was not available when the graph was built."""


def embedding_attrs(
    made: xr.DataArray,
    record: dict[str, Any],
    config: dict[str, Any],
    spec: EncoderSpec,
    stats: Any,
    emb: xr.DataArray,
    lazy: bool,
) -> dict[str, Any]:
    """Return all that is needed to compute the embedding again, in types that Zarr and NetCDF 4 support."""
    doy0 = made["doy"].values - record["doy_base"]
    attrs: dict[str, Any] = {
        "long_name": f"AnySat {config['output']} embedding",
        "model": spec.size,
        "weights": str(spec.source),
        "weights_sha256": (spec.sha256 if lazy else loaded_sha256(spec)) or NOT_LOADED,
        "output": config["output"],
        "patch_size_m": config["patch_size"],
        "tile": config["tile"],
        "overlap": config["overlap"],
        "anchor": config["anchor"],
        "norm": config["norm"] if isinstance(config["norm"], str) else "statistics",
        "n_frames": int(made.sizes["time"]),
        "doy0_values": [int(d) for d in doy0],
        "doy_base": record["doy_base"],
        "frame_dates": [str(t)[:10] for t in made["time"].values.astype("datetime64[D]")],
        "temporal_window": record["period"],
        "grid_hw": [int(emb.sizes["y"]), int(emb.sizes["x"])],
        "grid_shape": [int(n) for n in emb.shape],
        "precision": spec.precision,
        "device": spec.device if lazy else device_of(spec),
        "versions": json.dumps(versions()),
        "record_version": RECORD_VERSION,
        "frames": json.dumps(record),
        "config": json.dumps(config),
    }
    source = {k: made.attrs[k] for k in SOURCE_ATTRS if k in made.attrs}
    if source:
        attrs["source"] = json.dumps(source)
    if isinstance(stats, np.ndarray):
        attrs["norm_bands"] = list(S2.bands)
        attrs["norm_mean"], attrs["norm_std"] = ([float(v) for v in row] for row in stats)
    elif config["norm"] == "per_tile_zscore":
        attrs["norm_statistics"] = (
            "of the frames of this cube, computed with it; cube.anysat.statistics() returns them, "
            "and passed as norm= they are recorded here"
        )
    return attrs


def versions() -> dict[str, str]:
    """Return the versions of the libraries that affect results."""
    from xr_anysat._version import __version__

    found = {"xr_anysat": __version__}
    for name in ("torch", "xarray", "dask", "numpy", "odc-geo", "bottleneck"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


MESSAGE_CHARS = 120
"""Characters of a value that a message shows."""


def weights_identity(attrs: dict[Any, Any]) -> str | None:
    """Return the location-independent identity of the weights: their hash, or their source if they have no hash yet."""
    source, sha256 = WeightsSource.parse(str(attrs.get("weights"))), attrs.get("weights_sha256")
    if source.kind == "official" or OFFICIAL.has(str(sha256)):
        return "official"
    return str(source) if source.kind == "module" else None if sha256 is None else str(sha256)


def parse_nested(attrs: dict[Any, Any]) -> dict[str, Any]:
    """Return attributes with JSON parsed, so that a message can name the entries that differ."""
    nested = {}
    for key, value in attrs.items():
        try:
            parsed = parse_json(value) if isinstance(value, str) and value.startswith("{") else value
        except ValueError:
            parsed = value
        nested[str(key)] = parsed
    return nested


def _compared(place: str, name: str) -> bool:
    """Whether a run that resumes a store must have the same value of `name` in the dict `place`."""
    if place == "grid":
        return name != "geotransform"  # the transform as text
    if place in ("attrs.config", "attrs.frames"):
        return name not in FIELDS or FIELDS[name].results
    if place == "attrs":
        repeated = [each.results for each in FIELDS.values() if each.attribute == name]
        return name not in NOT_COMPARED and all(repeated)
    return True


def _value(record: dict[str, Any], place: str, name: str) -> Any:
    """Return a value of a record, or the default of a missing field; an empty record has no values."""
    if name in record or not record:
        return record.get(name)
    if place in ("attrs.config", "attrs.frames"):
        return FIELDS[name].default if name in FIELDS else NOT_RECORDED
    if place == "attrs":
        return next((each.default for each in FIELDS.values() if each.attribute == name), None)
    return None


def differences(a: Any, b: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield name and both values of each entry in which two identities of stores differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in dict.fromkeys([*a, *b]):
            if _compared(place, name):
                values = _value(a, place, name), _value(b, place, name)
                yield from differences(*values, f"{place}.{name}" if place else name)
    elif json.dumps(a) != json.dumps(b):  # NaN equals NaN there
        yield place.removeprefix("attrs."), a, b


def shorten(value: Any, other: Any) -> str:
    """Return the JSON of a value; of a long value, only the part where it begins to differ from `other`.

    Examples
    --------
    >>> shorten(8, 4), shorten("a" * 300 + "b", "a" * 300 + "c")[-20:]
    ('8', 'aaaaaaaaaaaaaaaaaab"')
    """
    text = json.dumps(value)
    if len(text) <= MESSAGE_CHARS:
        return text
    same = next((i for i, (a, b) in enumerate(zip(text, json.dumps(other), strict=False)) if a != b), 0)
    at = max(0, same - MESSAGE_CHARS // 2)
    return (
        ("… " if at else "")
        + text[at : at + MESSAGE_CHARS]
        + (" …" if at + MESSAGE_CHARS < len(text) else "")
    )

"""The provenance record: what made an embedding, and which records are comparable."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import xarray as xr

from xr_anysat.cube.compositing import SOURCE_ATTRS
from xr_anysat.cube.reading import BANDS
from xr_anysat.errors import CubeError, CubeTypeError
from xr_anysat.model.checkpoint import OFFICIAL
from xr_anysat.model.source import WeightsSource
from xr_anysat.model.weights import EncoderSpec, device_of, loaded_sha256

UNRECORDED = "of the cube's own frames, and not recorded"
"""In the record of how embeddings were made, in place of statistics that nobody wrote down."""


def comparability_record(emb: xr.DataArray) -> dict[str, Any]:
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
        record["statistics"] = UNRECORDED if norm == "per_tile_zscore" else norm
    record |= {k: config.get(k) for k in ("output", "patch_size", "tile", "overlap", "resize", "precision")}
    record |= {k: frames.get(k) for k in ("frames", "reduce", "empty", "doy", "doy_base", "fill_value")}
    return record


def _described(value: Any) -> str:
    text = "not recorded" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def check_comparable(own: Mapping[str, Any], other: Mapping[str, Any], call: str, whose: str) -> None:
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
    names = [k for k in {**own, **other} if own.get(k) != other.get(k) or own.get(k) == UNRECORDED]
    if not names:
        return
    said = "; ".join(f"{k} {_described(own.get(k))} here, {_described(other.get(k))} {whose}" for k in names)
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


_RECORD = (
    "model", "weights", "weights_sha256", "output", "patch_size_m", "tile", "temporal_window",
    "frame_dates", "versions", "config",
)  # fmt: skip


def _recorded(emb: xr.DataArray) -> bool:
    """Whether a cube has the record of `embed`."""
    return all(key in emb.attrs for key in _RECORD)


def _spec_of(emb: xr.DataArray) -> EncoderSpec:
    """Read the spec that an embedding was made with from its record."""
    if "config" not in emb.attrs:
        raise CubeTypeError(
            f"prepare(client, DataArray): its attrs {sorted(map(str, emb.attrs))} have no record of an encoder. "
            "Wanted the embedding that is to be computed, as embed() gave it"
        )
    config, sha256 = json.loads(emb.attrs["config"]), emb.attrs["weights_sha256"]
    return EncoderSpec(
        config["model"],
        WeightsSource.parse(config["weights"]),
        None if sha256 == NOT_LOADED else sha256,
        config["device"],
        config["precision"],
    )


NOT_LOADED = "not loaded yet"
"""In the record, in place of the hash of an official checkpoint that was not here when a lazy graph was built."""


def _attrs(
    made: xr.DataArray,
    record: dict[str, Any],
    config: dict[str, Any],
    spec: EncoderSpec,
    stats: Any,
    emb: xr.DataArray,
    lazy: bool,
) -> dict[str, Any]:
    """All that is needed to make the embedding again, in types that Zarr and NetCDF 4 take."""
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
        "frames": json.dumps(record),
        "config": json.dumps(config),
    }
    source = {k: made.attrs[k] for k in SOURCE_ATTRS if k in made.attrs}
    if source:
        attrs["source"] = json.dumps(source)
    if isinstance(stats, np.ndarray):
        attrs["norm_bands"] = list(BANDS)
        attrs["norm_mean"], attrs["norm_std"] = ([float(v) for v in row] for row in stats)
    elif config["norm"] == "per_tile_zscore":
        attrs["norm_statistics"] = (
            "of the frames of this cube, made when it is computed; cube.anysat.statistics() gives them, "
            "and as norm= they are recorded here"
        )
    return attrs


def versions() -> dict[str, str]:
    """Versions of the libraries that take part in a result."""
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

# What an embedding may differ in from its store and yet be the same: where the weights lay and the
# device, since weights are told by their hash, and what depends on either.
_FREE = {
    "attrs": {
        "weights",
        "weights_sha256",
        "device",
        "versions",
        "norm_statistics",
        "grid_hw",
        "grid_shape",
        "history",
    },
    "attrs.config": {"weights", "device", "batch"},
    "grid": {"geotransform"},  # the transform as text
}


def weights_identity(attrs: dict[Any, Any]) -> str | None:
    """What tells weights apart, wherever they lie: their hash, but for those that have none, or none yet."""
    source, sha256 = WeightsSource.parse(str(attrs.get("weights"))), attrs.get("weights_sha256")
    if source.kind == "official" or OFFICIAL.has(str(sha256)):
        return "official"
    return str(source) if source.kind == "module" else sha256


def _nested(attrs: dict[Any, Any]) -> dict[str, Any]:
    """Attributes with those that are JSON parsed, so that a difference can be named."""
    nested = {}
    for key, value in attrs.items():
        try:
            parsed = json.loads(value) if isinstance(value, str) and value.startswith("{") else value
        except ValueError:
            parsed = value
        nested[str(key)] = parsed
    return nested


def _differences(a: Any, b: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Names and values of the leaves in which two identities differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys([*a, *b]):
            if key not in _FREE.get(name, ()):
                yield from _differences(a.get(key), b.get(key), f"{name}.{key}" if name else key)
    elif json.dumps(a) != json.dumps(b):  # NaN is NaN there
        yield name.removeprefix("attrs."), a, b


def _short(value: Any, other: Any) -> str:
    """JSON of a value; of a long one the part where it begins to differ from `other`.

    Examples
    --------
    >>> _short(8, 4), _short("a" * 300 + "b", "a" * 300 + "c")[-20:]
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

"""Embeddings of other models, opened as cubes (D, y, x), to compare them with those of AnySat.

AlphaEarth Foundations: annual GeoTIFF files of 64 int8 channels, as in
https://developers.google.com/earth-engine/guides/aef_on_gcs_readme (2025). TESSERA and others: Zarr 3 stores with the
convention ``geoemb:``, v1, https://github.com/geo-embeddings/embeddings-zarr-convention.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from xr_anysat.errors import StoreError
from xr_anysat.shared.checks import import_optional
from xr_anysat.shared.grid import grid_of, with_transform
from xr_anysat.shared.serialization import (
    NUMBER,
    OBJECT,
    TEXT,
    Rule,
    first_violation,
    list_of,
    optional,
    parse_json,
    whole,
)
from xr_anysat.store.identity import CHUNK_CODECS, MAX_CHANNELS, codecs_of
from xr_anysat.store.location import StoreLocation, names, parse_location, read

if TYPE_CHECKING:
    from zarr.abc.store import Store

ALPHAEARTH_CHANNELS = 64

ALPHAEARTH_NODATA = -128

ALPHAEARTH_SCALE = 127.5
"""A code v stands for sign(v) · (v / 127.5)²."""

CHUNK = 1024
"""Side of the chunks of a lazy GeoTIFF, in pixels."""


def open_alphaearth(path: str | os.PathLike[str]) -> xr.DataArray:
    """Open a file of the annual embeddings of AlphaEarth Foundations as a lazy cube, decoded.

    Parameters
    ----------
    path : str or path
        A GeoTIFF of 64 int8 channels, or a VRT of it, on this machine or at any address that GDAL reads. Files whose
        rows run from south to north are turned over.

    Returns
    -------
    DataArray, (D, y, x) float32
        D is 64: A00 to A63. A code v is ``sign(v) · (v / 127.5)²``, and NaN for -128. ``attrs`` has the attribution
        that the licence (CC-BY 4.0) requires.

    Raises
    ------
    StoreError
        If the file cannot be opened, or has other channels, another dtype or nodata, or no CRS.
    AnySatError
        If rioxarray is not installed.
    """
    rioxarray = import_optional("rioxarray", "open_alphaearth()", "rioxarray")
    try:
        codes: Any = rioxarray.open_rasterio(os.fspath(path), chunks={"band": -1, "y": CHUNK, "x": CHUNK})
    except Exception as error:  # of GDAL: the file may have any content
        raise StoreError(
            f"{os.fspath(path)!r} cannot be opened: {type(error).__name__}: {error}. Expected a GeoTIFF of AlphaEarth"
        ) from error
    seen = {"channels": codes.sizes["band"], "dtype": str(codes.dtype), "nodata": codes.rio.nodata}
    expected = {"channels": ALPHAEARTH_CHANNELS, "dtype": "int8", "nodata": ALPHAEARTH_NODATA}
    wrong = [
        f"{name} {seen[name]}, expected {value}" for name, value in expected.items() if seen[name] != value
    ]
    if codes.rio.crs is None:
        wrong.append("no CRS")
    if wrong:
        raise StoreError(
            f"{os.fspath(path)!r} is not a file of AlphaEarth embeddings: {'; '.join(wrong)}. rioxarray.open_rasterio "
            "opens any GeoTIFF, and xr_anysat.compare takes any cube"
        )
    if codes["y"][0] < codes["y"][-1]:
        codes = codes.isel(y=slice(None, None, -1))
    values = codes.data.map_blocks(_decode_alphaearth, dtype=np.float32, meta=np.empty((0, 0, 0), np.float32))
    coords = {name: codes.coords[name] for name in ("y", "x", "spatial_ref")}
    emb = xr.DataArray(values, coords, ("D", "y", "x"), "alphaearth")
    emb.attrs = {
        "long_name": "AlphaEarth Foundations Satellite Embedding",
        "attribution": (
            "The AlphaEarth Foundations Satellite Embedding dataset is produced by Google and Google DeepMind."
        ),
        "formula": "sign(v) * (v / 127.5) ** 2",
    }
    return with_transform(emb, grid_of(emb))


def _decode_alphaearth(codes: np.ndarray) -> np.ndarray:
    shares = codes.astype(np.float32) / np.float32(ALPHAEARTH_SCALE)
    return np.where(codes == ALPHAEARTH_NODATA, np.float32(np.nan), np.sign(shares) * np.square(shares))


# ---------------------------------------------------------------------- geoemb:

_GROUP: dict[str, Rule] = {
    "geoemb:dimensions": whole(1, MAX_CHANNELS),
    "geoemb:data_type": TEXT,
    "geoemb:model": TEXT,
    "geoemb:quantization": optional(OBJECT),
    "proj:code": optional(TEXT),
    "spatial:transform": optional(list_of(NUMBER, 6)),
}
"""The rules of the attributes that are read."""


def open_geoemb(
    store: str | os.PathLike[str] | Store, *, group: str = "", storage_options: dict[str, Any] | None = None
) -> xr.DataArray:
    """Open embeddings of any model in a Zarr 3 store with the convention ``geoemb:`` as a lazy cube, decoded.

    TESSERA is published so. For a store that :func:`to_zarr` wrote, use :func:`open`.

    Parameters
    ----------
    store, storage_options
        As in :func:`to_zarr`.
    group : str
        Group inside the store, such as ``"utm32"`` of a store with one group per UTM zone. Attributes that it lacks are
        those of the root.

    Returns
    -------
    DataArray, (D, y, x), or (time, D, y, x) float32
        Codes times the scale of their pixel (NaN where it is not finite), or times one scale plus an offset. On the
        grid of ``spatial:transform`` and ``proj:code``.

    Raises
    ------
    StoreError
        If there is no such store, its attributes are not those of the convention, or it has another quantization.
    """
    target = parse_location(store, storage_options)
    root = target.root(read_only=True)
    attrs = _attributes(root, target, group)
    problem = first_violation(attrs, _GROUP)
    if problem is not None:
        raise StoreError(
            f"{target} is no store of the convention geoemb: in its attributes, {problem}. xarray.open_zarr opens any "
            "store, and xr_anysat.compare takes any cube"
        )
    _check_codecs(root, target, group)
    try:
        dataset = xr.open_zarr(
            root,
            group=group or None,
            chunks={},
            mask_and_scale=False,
            decode_coords=False,
            consolidated=False,
        )
    except Exception as error:  # of xarray or zarr, for metadata that are not theirs
        raise StoreError(f"{target} cannot be opened: {type(error).__name__}: {error}") from error
    name = _embedding_array(dataset, attrs, target)
    codes = dataset[name]
    feature = next(d for d in codes.dims if d not in ("time", "y", "x"))
    dims = [d for d in ("time", feature, "y", "x") if d in codes.dims]
    values = _dequantized(codes.transpose(*dims), dataset, attrs, target)
    emb = values.rename({feature: "D"}).drop_vars([n for n in values.coords if n not in ("time", "y", "x")])
    emb.name = "embedding"
    emb.attrs = {
        name: value for name, value in attrs.items() if name.startswith(("geoemb:", "title", "license"))
    }
    emb.encoding = {}
    return _georeferenced(emb, attrs, target)


def _attributes(root: Any, target: StoreLocation, group: str) -> dict[str, Any]:
    """Return the attributes of a group, over those of the root."""
    found: dict[str, Any] = {}
    for key in dict.fromkeys(("zarr.json", f"{group}/zarr.json".lstrip("/"))):
        text = read(root, key)
        try:
            found |= parse_json(text or b"{}")["attributes"]
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{target} has no Zarr 3 group at {key!r} ({type(error).__name__}: {error}): expected a store with the "
                "convention geoemb:"
            ) from error
    return found


def _embedding_array(dataset: xr.Dataset, attrs: Mapping[str, Any], target: StoreLocation) -> str:
    depth = attrs["geoemb:dimensions"]
    found = [
        str(name)
        for name, array in dataset.data_vars.items()
        if {"y", "x"} < set(array.dims)
        and [array.sizes[d] for d in array.dims if d not in ("time", "y", "x")] == [depth]
    ]
    if len(found) != 1:
        shapes = {str(name): dict(array.sizes) for name, array in dataset.data_vars.items()}
        raise StoreError(
            f"{target} has the arrays {shapes}: expected one with y, x and a dimension of {depth} (geoemb:dimensions)"
        )
    return found[0]


def _check_codecs(root: Any, target: StoreLocation, group: str) -> None:
    """Refuse arrays with codecs that may execute code."""
    for name in names(root, group):
        text = read(root, f"{group}/{name}/zarr.json".lstrip("/"))
        try:
            metadata = {} if text is None else parse_json(text)
        except ValueError as error:
            raise StoreError(f"{target}: the metadata of {name!r} are damaged: {error}") from error
        unknown = codecs_of(metadata.get("codecs", [])) - CHUNK_CODECS
        if unknown:
            raise StoreError(
                f"{target}: the array {name!r} has codecs {sorted(unknown)}: expected some of {sorted(CHUNK_CODECS)}"
            )


def _dequantized(
    codes: xr.DataArray, dataset: xr.Dataset, attrs: Mapping[str, Any], target: StoreLocation
) -> xr.DataArray:
    quantization = attrs.get("geoemb:quantization")
    values = codes.astype(np.float32)
    if quantization is None:
        if codes.dtype.kind != "f":
            raise StoreError(
                f"{target} has {codes.dtype} without geoemb:quantization: expected how to decode them"
            )
        return values
    scale = quantization.get("scale")
    kind = scale.get("type") if isinstance(scale, dict) else None
    if kind == "array" and scale.get("array_name") in dataset.data_vars:
        scales = dataset[scale["array_name"]].astype(np.float32)
        if not set(scales.dims) <= set(codes.dims):
            raise StoreError(f"{target}: the scales have dims {scales.dims}: expected some of {codes.dims}")
        return (values * scales.where(np.isfinite(scales))).transpose(*codes.dims)
    if kind == "scalar" and NUMBER.holds(scale.get("scale")) and NUMBER.holds(scale.get("offset", 0)):
        return values * np.float32(scale["scale"]) + np.float32(scale.get("offset", 0))
    raise StoreError(
        f"{target} has the quantization {str(quantization)[:120]}: expected a scale of the type 'array' (with the name "
        "of an array of the store) or 'scalar'"
    )


def _georeferenced(emb: xr.DataArray, attrs: Mapping[str, Any], target: StoreLocation) -> xr.DataArray:
    from affine import Affine
    from odc.geo.geobox import GeoBox
    from odc.geo.xr import xr_coords

    transform, code = attrs.get("spatial:transform"), attrs.get("proj:code")
    if transform is None or code is None:
        raise StoreError(
            f"{target} has no {'spatial:transform' if transform is None else 'proj:code'}: expected both, the grid of "
            "the embeddings"
        )
    try:
        grid = GeoBox((emb.sizes["y"], emb.sizes["x"]), Affine(*transform), code)
    except Exception as error:  # of pyproj
        raise StoreError(f"{target}: proj:code {code!r} is no CRS: {error}") from error
    out = emb.drop_vars([n for n in ("y", "x") if n in emb.coords]).assign_coords(
        xr_coords(grid, dims=("y", "x"))
    )
    out.encoding["grid_mapping"] = "spatial_ref"
    return out

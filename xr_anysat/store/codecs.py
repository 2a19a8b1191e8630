"""How embeddings are stored: as they are, in half precision, or as bytes with a scale per cell.

A :class:`Codec` turns a block (D, y, x) into the arrays of a store, and back. Encoding and decoding look at one cell
at a time, so blocks, margins and chunks make no difference. A new codec is a new entry of :data:`CODECS`; what one has
written must stay readable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from xr_anysat.errors import CubeError, OptionError

VALUES, SCALE = "anysat", "scale"
"""Names of the arrays in a store: (D, y, x), and for ``int8`` also (y, x)."""

INT8_MAX = 127
"""Largest code of ``int8``: codes are symmetric, -127..127, so that the sign costs nothing."""

MAX_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(INT8_MAX), np.float32(0))
"""Largest scale: 127 times it is still finite."""

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Codec:
    """One way to store values.

    Attributes
    ----------
    encode : callable
        Block (D, y, x) float to the arrays of the store, by name. Raises CubeError where a value would be lost.
    decode : callable
        Arrays of the store, NumPy, dask or xarray, to values (D, y, x).
    values : dtype or None
        Of the array `VALUES`; None for the dtype of the values themselves.
    scale : dtype or None
        Of the array `SCALE` (y, x), if there is one.
    description : str
        What is stored, for people.
    size : str
        How large it is, for people.
    formula : str
        How to decode it, for the metadata of a store.
    quantization : dict or None
        ``geoemb:quantization`` of the Zarr convention; None where values are stored as they are.
    """

    encode: Callable[[np.ndarray], Arrays]
    decode: Callable[[dict[str, Any]], Any]
    description: str
    size: str
    values: np.dtype[Any] | None = None
    scale: np.dtype[Any] | None = None
    formula: str = "a NaN cell has"
    quantization: dict[str, Any] | None = None

    def dtypes(self, dtype: Any) -> dict[str, np.dtype[Any]]:
        """Arrays of a store of values of `dtype`, by name."""
        own = {} if self.scale is None else {SCALE: self.scale}
        return {**own, VALUES: np.dtype(dtype) if self.values is None else self.values}

    def cell_bytes(self, channels: int) -> int:
        """Bytes of a cell of float32 values before compression."""
        arrays = self.dtypes(np.float32).items()
        return sum(dtype.itemsize * (1 if name == SCALE else channels) for name, dtype in arrays)


def _encode_float16(values: np.ndarray) -> Arrays:
    """Values rounded to half precision."""
    with np.errstate(over="ignore"):  # reported below, with the remedy
        half = values.astype(np.float16)
    lost = int((np.isinf(half) & np.isfinite(values)).any(0).sum())
    if lost:
        raise CubeError(
            f"{lost} cells hold values up to {np.nanmax(np.abs(values)):g}, and float16 ends at 65504: use "
            "codec='int8', which scales each cell, or codec=None"
        )
    return {VALUES: half}


def _encode_int8(values: np.ndarray) -> Arrays:
    """Codes and scales, per cell: ``scale = max |value| / 127``, ``code = round(value / scale)``."""
    most = np.abs(values).max(0)  # NaN where any channel is
    gaps = np.isnan(most) & ~np.isnan(values).all(0)
    if gaps.any() or np.isinf(most).any():
        raise CubeError(
            f"{int((gaps | np.isinf(most)).sum())} cells are NaN in some channels, or infinite: codec='int8' keeps a "
            "cell whole or not at all. Use codec=None"
        )
    scale = np.minimum(most / np.float32(INT8_MAX), MAX_SCALE)
    usable = scale > 0  # neither NaN nor a cell of zeros
    with np.errstate(invalid="ignore"):
        codes = np.rint(values / np.where(usable, scale, np.float32(1)))
    codes = np.where(usable, codes, 0).clip(-INT8_MAX, INT8_MAX).astype(np.int8)
    return {SCALE: scale, VALUES: codes}


def _decode_int8(arrays: dict[str, Any]) -> Any:
    return arrays[VALUES].astype(np.float32) * arrays[SCALE]


CODECS: dict[str | None, Codec] = {
    None: Codec(
        encode=lambda values: {VALUES: values},
        decode=lambda arrays: arrays[VALUES],
        description="float32",
        size="as it is",
    ),
    "float16": Codec(
        encode=_encode_float16,
        decode=lambda arrays: arrays[VALUES].astype(np.float32),
        description="float16",
        size="half the size",
        values=np.dtype(np.float16),
        quantization={"method": "cast", "original_dtype": "float32", "quantized_dtype": "float16"},
    ),
    "int8": Codec(
        encode=_encode_int8,
        decode=_decode_int8,
        description="int8 and a float32 scale per cell",
        size="a quarter of it",
        values=np.dtype(np.int8),
        scale=np.dtype(np.float32),
        formula=f"value = {VALUES} × {SCALE}, and a cell of scale NaN has",
        quantization={
            "method": "per_pixel_scale",
            "original_dtype": "float32",
            "quantized_dtype": "int8",
            "scale": {"type": "array", "array_name": SCALE, "nodata": "NaN"},
        },
    ),
}
"""The codecs of :func:`xr_anysat.to_zarr`, by the value of its argument `codec`."""


def check_codec(codec: str | None, dtype: Any) -> None:
    """Refuse an unknown codec, and values that it cannot encode.

    Raises
    ------
    OptionError
        If `codec` is unknown.
    CubeError
        If values of `dtype` cannot be encoded.
    """
    if codec not in CODECS:
        known = [f"{name!r} ({each.size})" for name, each in CODECS.items()]
        raise OptionError(f"{codec=}: expected {', '.join(known[:-1])} or {known[-1]}")
    dtype = np.dtype(dtype)
    if dtype.kind != "f" or (codec is not None and dtype != np.float32):
        raise CubeError(
            f"values of {dtype} and {codec=}: expected float32 embeddings, as embed() returns them; "
            "cast them with emb.astype('float32')"
        )


def dtypes(codec: str | None, dtype: Any) -> dict[str, np.dtype[Any]]:
    """Arrays of a store of values of `dtype`, by name.

    Examples
    --------
    >>> dtypes("int8", "float32")
    {'scale': dtype('float32'), 'anysat': dtype('int8')}
    """
    return CODECS[codec].dtypes(dtype)


def encode(values: np.ndarray, codec: str | None) -> dict[str, np.ndarray]:
    """The arrays to store of a block (D, y, x).

    ``int8``: each cell has ``scale = max |value| / 127``, and ``code = round(value / scale)``. A cell
    with nothing observed has the scale NaN. ``float16``: rounded to the nearest.

    Parameters
    ----------
    values : ndarray, (D, y, x) float
        NaN in all channels of a cell, or in none.
    codec : {None, "int8", "float16"}
        See :func:`check_codec`.

    Returns
    -------
    dict of str to ndarray
        As :func:`dtypes` names them.

    Raises
    ------
    CubeError
        If a value would be lost: an infinite one, one beyond half precision's 65 504, or the
        channels that a cell with some NaN still has.

    Examples
    --------
    >>> encode(np.array([[[1.0]], [[-2.54]]], np.float32), "int8")
    {'scale': array([[0.02]], dtype=float32), 'anysat': array([[[  50]], [[-127]]], dtype=int8)}
    """
    return CODECS[codec].encode(values)


def decode(arrays: dict[str, Any], codec: str | None) -> Any:
    """The values (D, y, x) of stored arrays, NumPy, dask or xarray; float32 for ``int8`` and ``float16``.

    Examples
    --------
    >>> stored = encode(np.array([[[1.0]], [[-2.54]]], np.float32), "int8")
    >>> decode(stored, "int8").ravel()
    array([ 1.  , -2.54], dtype=float32)
    """
    return CODECS[codec].decode(arrays)

"""How embeddings are stored: unchanged, in half precision, or as bytes with one scale per cell.

A :class:`Codec` converts a block (D, y, x) into the arrays of a store, and back. It treats each cell alone, so blocks,
margins and chunks do not matter. A new codec is a new entry of :data:`CODECS`; stores of an existing one must stay
readable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from xr_anysat.errors import CubeError, OptionError

VALUES, SCALE = "anysat", "scale"
"""Names of the arrays of a store: values (D, y, x) and, for ``int8``, scales (y, x)."""

INT8_MAX = 127
"""Largest code of ``int8``. Codes are symmetric, -127 to 127."""

MAX_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(INT8_MAX), np.float32(0))
"""Largest scale whose product with `INT8_MAX` is finite."""

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Codec:
    """One way to store values.

    Attributes
    ----------
    encode : callable
        Converts a block (D, y, x) float to the arrays of the store, by name. Raises CubeError for a value that it
        cannot represent.
    decode : callable
        Converts the arrays of the store, NumPy, dask or xarray, to values (D, y, x).
    description : str
        What is stored, for messages.
    size : str
        Its size relative to the values, for messages.
    values : dtype or None
        Data type of the array `VALUES`; None for that of the values.
    scale : dtype or None
        Data type of the array `SCALE` (y, x); None if the codec has no such array.
    formula : str
        How to decode the arrays, for the metadata of a store.
    quantization : dict or None
        ``geoemb:quantization`` of the Zarr convention; None if values are stored unchanged.

    Examples
    --------
    >>> int8 = CODECS["int8"]
    >>> stored = int8.encode(np.array([[[1.0]], [[-2.54]]], np.float32))
    >>> stored
    {'anysat': array([[[  50]], [[-127]]], dtype=int8), 'scale': array([[0.02]], dtype=float32)}
    >>> int8.decode(stored).ravel()
    array([ 1.  , -2.54], dtype=float32)
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
        """Return the data type of each array of a store of values of `dtype`.

        The scale is last, so a block whose writer was interrupted has no scale, and other readers see NaN there.

        Examples
        --------
        >>> CODECS["int8"].dtypes("float32")
        {'anysat': dtype('int8'), 'scale': dtype('float32')}
        """
        values = np.dtype(dtype) if self.values is None else self.values
        return {VALUES: values} | ({} if self.scale is None else {SCALE: self.scale})

    def cell_bytes(self, channels: int) -> int:
        """Return the bytes of a cell of float32 values before compression."""
        arrays = self.dtypes(np.float32).items()
        return sum(dtype.itemsize * (1 if name == SCALE else channels) for name, dtype in arrays)


def _encode_float16(values: np.ndarray) -> Arrays:
    """Round values to half precision."""
    with np.errstate(over="ignore"):  # reported below, with the remedy
        half = values.astype(np.float16)
    lost = int((np.isinf(half) & np.isfinite(values)).any(0).sum())
    if lost:
        raise CubeError(
            f"{lost} cells have values up to {np.nanmax(np.abs(values)):g}: codec='float16' stores values up to 65504. "
            "Use codec='int8', which scales each cell, or codec=None"
        )
    return {VALUES: half}


def _encode_int8(values: np.ndarray) -> Arrays:
    """Compute codes and scales: ``scale = max |value| / 127`` per cell, ``code = round(value / scale)``.

    A cell without observations has the scale NaN.
    """
    maximum = np.abs(values).max(0)  # NaN where any channel is
    gaps = np.isnan(maximum) & ~np.isnan(values).all(0)
    if gaps.any() or np.isinf(maximum).any():
        raise CubeError(
            f"{int((gaps | np.isinf(maximum)).sum())} cells are infinite or NaN in some channels: codec='int8' stores "
            "cells that are finite or NaN in all channels. Use codec=None"
        )
    scale = np.minimum(maximum / np.float32(INT8_MAX), MAX_SCALE)
    usable = scale > 0  # neither NaN nor a cell of zeros
    with np.errstate(invalid="ignore"):
        codes = np.rint(values / np.where(usable, scale, np.float32(1)))
    codes = np.where(usable, codes, 0).clip(-INT8_MAX, INT8_MAX).astype(np.int8)
    return {VALUES: codes, SCALE: scale}


def _decode_int8(arrays: dict[str, Any]) -> Any:
    return arrays[VALUES].astype(np.float32) * arrays[SCALE]


CODECS: dict[str | None, Codec] = {
    None: Codec(
        encode=lambda values: {VALUES: values},
        decode=lambda arrays: arrays[VALUES],
        description="float32",
        size="unchanged",
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

"""How embeddings are stored: as they are, in half precision, or as bytes with a scale a cell.

A codec turns a block (D, y, x) into the arrays that a store holds, and back. Encoding and decoding
look at one cell at a time, so blocks, margins and chunks make no difference.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from xr_anysat.errors import CubeError, OptionError

VALUES, SCALE = "anysat", "scale"
"""Names of the arrays in a store: (D, y, x), and for ``int8`` also (y, x)."""

INT8_MAX = 127
"""Largest code of ``int8``: codes are symmetric, -127..127, so that the sign costs nothing."""

MAX_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(INT8_MAX), np.float32(0))
"""Largest scale, which times 127 is still no infinity."""


def check_codec(codec: str | None, dtype: Any) -> None:
    """Refuse an unknown codec, and one that takes other values than float32.

    Raises
    ------
    OptionError
        If `codec` is unknown.
    CubeError
        If values of `dtype` cannot be encoded.
    """
    if codec not in (None, "int8", "float16"):
        raise OptionError(
            f"{codec=}: wanted None (as it is), 'float16' (half the size) or 'int8' (a quarter of it)"
        )
    dtype = np.dtype(dtype)
    if dtype.kind != "f" or (codec is not None and dtype != np.float32):
        raise CubeError(
            f"values of {dtype} and {codec=}: wanted float32 embeddings, as embed() makes them; "
            "cast them with emb.astype('float32')"
        )


def dtypes(codec: str | None, dtype: Any) -> dict[str, np.dtype[Any]]:
    """The arrays that a store of values of `dtype` holds, by name.

    Examples
    --------
    >>> dtypes("int8", "float32")
    {'scale': dtype('float32'), 'anysat': dtype('int8')}
    """
    if codec == "int8":
        return {SCALE: np.dtype(np.float32), VALUES: np.dtype(np.int8)}
    return {VALUES: np.dtype(np.float16 if codec == "float16" else dtype)}


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
    if codec is None:
        return {VALUES: values}
    most = np.abs(values).max(0)  # NaN where any channel is
    if codec == "float16":
        half = _half(values)
        lost = int((np.isinf(half) & np.isfinite(values)).any(0).sum())
        if lost:
            raise CubeError(
                f"{lost} cells hold values up to {np.nanmax(np.abs(values)):g}, and float16 ends at 65504: use "
                "codec='int8', which scales each cell, or codec=None"
            )
        return {VALUES: half}
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


def _half(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # said by the caller, who knows the remedy
        return values.astype(np.float16)


def decode(arrays: dict[str, Any], codec: str | None) -> Any:
    """The values (D, y, x) of stored arrays, NumPy, dask or xarray; float32 for ``int8`` and ``float16``.

    Examples
    --------
    >>> stored = encode(np.array([[[1.0]], [[-2.54]]], np.float32), "int8")
    >>> decode(stored, "int8").ravel()
    array([ 1.  , -2.54], dtype=float32)
    """
    values = arrays[VALUES]
    if codec == "int8":
        return values.astype(np.float32) * arrays[SCALE]
    return values.astype(np.float32) if codec == "float16" else values

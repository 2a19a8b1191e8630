"""Reduce an embedding cube over y and x."""

from __future__ import annotations

import json

import xarray as xr

from xr_anysat.embedding.options import POOLS
from xr_anysat.record import read_record
from xr_anysat.shared.checks import check_embedding
from xr_anysat.shared.values import check_choice


def pool(emb: xr.DataArray, how: str = "mean") -> xr.DataArray:
    """Reduce an embedding cube over y and x, leaving NaN cells out.

    Parameters
    ----------
    emb : DataArray, (D, y, x)
        Output of :func:`embed`.
    how : {"mean", "max"}
        The reduction.

    Returns
    -------
    DataArray, (D,) float32
        NaN if there is no valid cell. Lazy if `emb` is.

    Raises
    ------
    CubeTypeError
        If `emb` is not an embedding cube.
    OptionError
        If `how` is unknown.
    CubeError
        If the record in the attributes is damaged.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> import xr_anysat
    >>> emb = xr.DataArray([[[1.0, np.nan, 3.0]]], dims=("D", "y", "x"))
    >>> xr_anysat.pool(emb, "mean").values
    array([2.])
    """
    check_choice("how", how, POOLS)
    if not isinstance(emb, xr.DataArray) or not {"D", "y", "x"} <= set(emb.dims):
        check_embedding(emb, "pool()")
    return pool_cells(emb, how)


def pool_cells(emb: xr.DataArray, how: str) -> xr.DataArray:
    """Reduce over y and x, and record the reduction; `how` is already checked."""
    out = getattr(emb, how)(("y", "x"), skipna=True, keep_attrs=True)
    out.attrs = {**emb.attrs, "pool": how}
    if "config" in emb.attrs:
        out.attrs["config"] = json.dumps({**read_record(emb.attrs)["config"], "pool": how})
    pooled: xr.DataArray = out
    return pooled

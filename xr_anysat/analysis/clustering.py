"""Mini-batch k-means over the cells of an embedding cube."""

from __future__ import annotations

from functools import partial

import numpy as np
import xarray as xr

from xr_anysat.analysis.cells import map_cells, one_thread, padded_matmul, wrap_on_grid
from xr_anysat.analysis.fitted import Clusters, check_model, sample_for_fit
from xr_anysat.analysis.sampling import CELLS
from xr_anysat.errors import OptionError
from xr_anysat.record import comparability_record
from xr_anysat.series import check_embeddings
from xr_anysat.shared.checks import import_optional
from xr_anysat.shared.values import check_whole_number

MISSING = -1
"""Label of cells that were not observed."""


def cluster(
    emb: xr.DataArray,
    k: int | None = None,
    *,
    model: Clusters | None = None,
    cells: int = CELLS,
    seed: int = 0,
) -> tuple[xr.DataArray, Clusters]:
    """Assign cells to `k` clusters of similar embeddings, by mini-batch k-means.

    The centers are fitted on a sample of the observed cells. For a lazy cube this computes every block; see
    :func:`reduce`.

    Parameters
    ----------
    emb : DataArray, (D, y, x)
        Output of :func:`xr_anysat.embed`.
    k : int, optional
        Number of clusters; not needed with a `model`.
    model : Clusters, optional
        Result of an earlier call, on embeddings with the same weights and settings. The clusters then have the same
        meaning.
    cells, seed : int
        As in :func:`reduce`.

    Returns
    -------
    labels : DataArray, (y, x) int16
        Number of the cluster with the nearest center, or -1 (``nodata``) where nothing was observed. Clusters are
        numbered from 0 by decreasing size in the sample. Lazy if `emb` is.
    model : Clusters
        Save it (`to_json`) to use it on another year or area.

    Raises
    ------
    CubeTypeError, CubeError, OptionError, AnySatError
        As :func:`reduce`.

    Examples
    --------
    >>> import xarray as xr
    >>> import xr_anysat
    >>> emb = xr.DataArray([[[0.0, 9.0, 0.1, 0.2, float("nan")]], [[5.0, 0.0, 5.1, 5.0, 1.0]]], dims=("D", "y", "x"))
    >>> labels, model = emb.anysat.cluster(2)
    >>> labels.values, model.shares
    (array([[ 0,  1,  0,  0, -1]], dtype=int16), (0.75, 0.25))
    """
    check_embeddings(emb, "cluster(8)")
    if model is None:
        if k is None:
            raise OptionError("neither k= nor model=: expected a number of clusters, emb.anysat.cluster(8)")
        model = _fit_clusters(emb, k, cells, seed)
    else:
        check_model(model, Clusters, emb, len(getattr(model, "centers", ((),))[0]), "cluster()")
        if k is not None and k != len(model.centers):
            raise OptionError(f"k={k!r} and a model of {len(model.centers)} clusters: leave k= out")
    labels = map_cells(
        partial(_nearest, centers=np.array(model.centers)), emb, rows=1, dtype=np.int16, missing=MISSING
    )
    attrs = {
        "long_name": "cluster of the embedding",
        "nodata": MISSING,
        "flag_values": list(range(len(model.centers))),
        "shares": list(model.shares),
        "fitted_on_cells": model.cells,
        "seed": model.seed,
    }
    return wrap_on_grid(emb, labels[0], "cluster", attrs), model


def _fit_clusters(emb: xr.DataArray, k: int, cells: int, seed: int) -> Clusters:
    kmeans = import_optional("sklearn.cluster", "cluster()").MiniBatchKMeans
    k = check_whole_number("k", k, 1, np.iinfo(np.int16).max)
    sample, seed = sample_for_fit(emb, k, cells, seed, "cluster()")
    with one_thread():
        centers = kmeans(k, batch_size=1024, n_init=3, random_state=seed).fit(sample).cluster_centers_
        counts = np.bincount(_nearest(sample.T, centers=centers)[0], minlength=k)
    order = sorted(range(k), key=lambda i: (-counts[i], *centers[i]))
    return Clusters(
        centers=tuple(centers[order]), shares=tuple(counts[order] / len(sample)), cells=len(sample), seed=seed,
        made_with=comparability_record(emb),
    )  # fmt: skip


def _nearest(batch: np.ndarray, *, centers: np.ndarray) -> np.ndarray:
    """Number of the nearest center of each cell, (1, n)."""
    nearer = padded_matmul(centers, batch) - np.square(centers).sum(1)[:, None] / 2  # half of |x|² - |x - c|²
    return nearer.argmax(0)[None]

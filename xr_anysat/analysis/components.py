"""Principal components of an embedding cube: `reduce` and `rgb`.

scikit-learn fits them on a sample of cells. The small model can be saved and used on other cubes. Its results are
lazy if the cube is.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from xr_anysat.analysis.cells import map_cells, one_thread, padded_matmul, wrap_on_grid
from xr_anysat.analysis.fitted import PCAModel, check_model, sample_for_fit
from xr_anysat.analysis.sampling import CELLS
from xr_anysat.errors import OptionError
from xr_anysat.record import comparability_record
from xr_anysat.series import check_embeddings
from xr_anysat.shared.checks import import_optional
from xr_anysat.shared.values import check_whole_number

PERCENTILES = (2.0, 98.0)
"""Percentiles of the scores of a component in the sample: the ends of the color range."""

CHANNELS = ("red", "green", "blue", "alpha")


# ---------------------------------------------------------------------- fewer channels


def reduce(
    emb: xr.DataArray,
    k: int | None = None,
    *,
    model: PCAModel | None = None,
    cells: int = CELLS,
    seed: int = 0,
) -> tuple[xr.DataArray, PCAModel]:
    """Reduce an embedding cube to its first `k` principal components.

    The components are fitted on a sample of the observed cells. For a lazy cube this computes every block, which runs
    AnySat. If you use the cube more than once, store it first (:func:`xr_anysat.to_zarr`, :func:`xr_anysat.open`). With
    `model`, nothing is fitted or computed.

    Parameters
    ----------
    emb : DataArray, (D, y, x)
        Output of :func:`xr_anysat.embed`.
    k : int, optional
        Number of components. Default: all of `model`.
    model : PCAModel, optional
        Result of an earlier call, on embeddings with the same weights and settings. The components then have the same
        meaning.
    cells : int
        Maximum number of cells in the fit.
    seed : int
        Selects the cells of the fit, together with their position in the cube; chunks have no effect.

    Returns
    -------
    reduced : DataArray, (component, y, x) float32
        Lazy if `emb` is; NaN where nothing was observed.
    model : PCAModel
        Save it (`to_json`) to use it on another year or area.

    Raises
    ------
    CubeTypeError
        If `emb` is not an embedding cube.
    CubeError
        If fewer than `k` cells were observed, or `model` was fitted on embeddings with other weights or settings.
    OptionError
        If `k`, `cells`, `seed` or `model` is invalid.
    AnySatError
        If scikit-learn is not installed.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> import xr_anysat
    >>> emb = xr.DataArray(np.random.default_rng(0).normal(size=(8, 4, 5)), dims=("D", "y", "x"))
    >>> reduced, model = emb.anysat.reduce(2)
    >>> reduced.dims, reduced.shape, reduced.dtype
    (('component', 'y', 'x'), (2, 4, 5), dtype('float32'))
    >>> again, _ = emb.anysat.reduce(model=model)
    >>> again.equals(reduced)
    True
    """
    check_embeddings(emb, "reduce(3)")
    if model is None:
        if k is None:
            raise OptionError("neither k= nor model=: expected a number of components, emb.anysat.reduce(3)")
        model = _fit_pca(emb, k, cells, seed, "reduce()")
    else:
        check_model(model, PCAModel, emb, len(getattr(model, "mean", ())), "reduce()")
    k = check_whole_number("k", k or len(model.components), 1, len(model.components))
    scores = map_cells(partial(_scores, model=model, k=k), emb, rows=k, dtype=np.float32, missing=np.nan)
    attrs = {"long_name": "principal components of the embedding", **_fit_attrs(model, k)}
    return wrap_on_grid(emb, scores, "reduced", attrs, dim="component", labels=np.arange(k)), model


def rgb(
    emb: xr.DataArray, *, model: PCAModel | None = None, cells: int = CELLS, seed: int = 0
) -> tuple[xr.DataArray, PCAModel]:
    """Color an embedding cube by its first three principal components.

    Each component is stretched from the 2nd to the 98th percentile of the sample it was fitted on. The model contains
    these limits, so the same model gives comparable colors for another year or area.

    Parameters
    ----------
    emb, model, cells, seed
        As in :func:`reduce`, which describes the cost of a lazy cube. `model` needs at least three components.

    Returns
    -------
    image : DataArray, (band: red, green, blue, alpha; y, x) uint8
        Lazy if `emb` is. `alpha` is 255, or 0 where nothing was observed. Such cells are transparent in
        ``image.plot.imshow()``, and in QGIS after ``image.rio.to_raster("image.tif")``.
    model : PCAModel
        Save it (`to_json`) to use it on another year or area.

    Raises
    ------
    CubeTypeError, CubeError, OptionError, AnySatError
        As :func:`reduce`.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> import xr_anysat
    >>> emb = xr.DataArray(np.random.default_rng(0).normal(size=(8, 4, 5)), dims=("D", "y", "x"))
    >>> emb[:, 0, 0] = np.nan
    >>> image, model = emb.anysat.rgb()
    >>> image.dims, image.dtype, image[:, 0, 0].values, image[3, 0, 1].item()
    (('band', 'y', 'x'), dtype('uint8'), array([0, 0, 0, 0], dtype=uint8), 255)
    """
    check_embeddings(emb, "rgb()")
    if model is None:
        model = _fit_pca(emb, 3, cells, seed, "rgb()")
    else:
        check_model(model, PCAModel, emb, len(getattr(model, "mean", ())), "rgb()")
        if len(model.components) < 3:
            raise OptionError(
                f"a model of {len(model.components)} components: expected three, emb.anysat.reduce(3)"
            )
    image = map_cells(partial(_colors, model=model), emb, rows=4, dtype=np.uint8, missing=0)
    percentiles = [float(p) for p in PERCENTILES]
    attrs = {
        "long_name": "principal components as colors",
        "stretch_percentiles": percentiles,
        **_fit_attrs(model, 3),
    }
    return wrap_on_grid(emb, image, "rgb", attrs, dim="band", labels=list(CHANNELS)), model


def _fit_pca(emb: xr.DataArray, k: int, cells: int, seed: int, call: str) -> PCAModel:
    decomposition = import_optional("sklearn.decomposition", call)
    k = check_whole_number("k", k, 1, emb.sizes["D"])
    sample, seed = sample_for_fit(emb, k, cells, seed, call)
    mean = sample.mean(0)
    spread = float(np.square(sample - mean).sum())
    with one_thread(), np.errstate(invalid="ignore", divide="ignore"):  # if all cells are equal
        found = decomposition.PCA(k, svd_solver="covariance_eigh" if len(sample) > 1 else "full").fit(sample)
        components = found.components_
        # the sign is arbitrary: make the largest weight positive
        components = components * np.sign(components[np.arange(k), np.abs(components).argmax(1)])[:, None]
        scores = (sample - mean) @ components.T
    low, high = np.percentile(scores, PERCENTILES, axis=0)
    explained = np.square(scores).sum(0) / (spread or np.inf)
    return PCAModel(
        mean=tuple(mean), components=tuple(components), explained=tuple(explained), low=tuple(low), high=tuple(high),
        cells=len(sample), seed=seed, made_with=comparability_record(emb),
    )  # fmt: skip


def _fit_attrs(model: PCAModel, k: int) -> dict[str, Any]:
    return {
        "explained_variance_ratio": list(model.explained[:k]),
        "fitted_on_cells": model.cells,
        "seed": model.seed,
    }


def _scores(batch: np.ndarray, *, model: PCAModel, k: int) -> np.ndarray:
    return padded_matmul(np.array(model.components[:k]), batch - np.array(model.mean)[:, None])


def _colors(batch: np.ndarray, *, model: PCAModel) -> np.ndarray:
    low, high = (np.array(each[:3])[:, None] for each in (model.low, model.high))
    span = np.where(high > low, high - low, np.inf)  # constant components become 0
    share = np.clip((_scores(batch, model=model, k=3) - low) / span, 0, 1)
    return np.concatenate([np.rint(255 * share), np.full((1, batch.shape[1]), 255.0)])

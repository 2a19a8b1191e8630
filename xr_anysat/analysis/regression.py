"""`regress`: maps of values from a few labels, with prediction intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from xr_anysat.analysis.applicability import FeatureSpace, applicability_of_samples, threshold_of
from xr_anysat.analysis.cells import one_thread
from xr_anysat.analysis.evaluation import (
    Evaluation,
    Folds,
    Predict,
    cross_validate,
    fold_numbers,
    learning_curve,
)
from xr_anysat.analysis.learned import (
    APPLICABLE,
    DISSIMILARITY,
    Regressor,
    applicability,
    as_base64,
    check_learned,
    joined_to,
    over_all,
)
from xr_anysat.analysis.learners import REGRESSORS
from xr_anysat.analysis.sampling import MAX_SEED
from xr_anysat.analysis.training import (
    CELLS_PER_POLYGON,
    check_columns,
    check_input,
    folds_of,
    labeled_samples,
    record_of,
    warn_of_left_out,
)
from xr_anysat.analysis.vector import as_geodataframe
from xr_anysat.errors import OptionError, warn
from xr_anysat.shared.checks import import_optional
from xr_anysat.shared.values import check_choice, check_whole_number, is_number

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

MIN_LABELS = 3
"""Minimum number of labels that have a sample."""

TAKEN = ("x", "y", "D", "time", "spatial_ref", DISSIMILARITY, APPLICABLE)
"""Names of variables that a column of values cannot have."""


def regress(
    emb: Any,
    labels: GeoDataFrame | None = None,
    columns: str | Sequence[str] | None = None,
    *,
    model: Regressor | None = None,
    method: str = "ridge",
    weights: str | None = None,
    level: float = 0.9,
    time: str | None = None,
    groups: str | None = None,
    block_m: float | None = None,
    cells_per_polygon: int = CELLS_PER_POLYGON,
    seed: int = 0,
) -> tuple[Any, Regressor]:
    """Map values, such as biomass or yield, from a few labels.

    A regression is fitted on the embeddings at the labels and predicts the values of each cell. Its errors are
    measured on labels that it was not fitted on, as in :func:`classify`.

    Parameters
    ----------
    emb : DataArray, (D, y, x), or GeoDataFrame
        As in :func:`classify`.
    labels : GeoDataFrame
        Points, polygons or a table of embeddings, as in :func:`classify`, at least three.
    columns : str or sequence of str
        One or more columns of `labels` with numbers. Labels with a gap in any of them are left out.
    model : Regressor, optional
        Result of an earlier call, on embeddings with the same weights and settings: nothing is fitted.
    method : {"ridge", "knn"}
        ``"ridge"``: ridge regression on standardized channels, its penalty chosen per column by generalized
        cross-validation. ``"knn"``: the mean of the five nearest samples by cosine similarity, each with the weight
        1 + cosine.
    weights : str, optional
        Column of `labels` with the weight of each label in the fit and in the scores, for ``"ridge"``.
    level : float
        Share of values that prediction intervals are to cover.
    time, groups, block_m, cells_per_polygon, seed
        As in :func:`classify`.

    Returns
    -------
    values : Dataset, or GeoDataFrame
        Variables (y, x) float32 on the grid of the cube, lazy if `emb` is; or columns of the table. For each column:

        ``{column}``
            The predicted value; NaN where nothing was observed.
        ``{column}_lower``, ``{column}_upper``
            Prediction interval: the value minus and plus a quantile of the absolute residuals of the cross-validation
            (cross-conformal prediction; Vovk 2015, doi 10.1007/s10472-013-9368-4). Not without cross-validation.

        And ``dissimilarity`` and ``applicable``, as in :func:`classify`.
    model : Regressor
        Its ``evaluation`` (:class:`Evaluation`) has the scores, and the share of labels that the intervals covered,
        each measured with the residuals of other folds. Save it (`to_json`) to use it on another year or area.

    Raises
    ------
    CubeTypeError, CubeError, AnySatError
        As in :func:`classify`.
    OptionError
        If an argument is invalid, a column has no numbers, or there are too few samples.

    Examples
    --------
    >>> import geopandas, numpy as np, xarray as xr
    >>> import odc.geo.xr, xr_anysat
    >>> values = np.random.default_rng(0).normal(size=(3, 8, 8))
    >>> emb = xr.DataArray(
    ...     values, dims=("D", "y", "x"),
    ...     coords={"y": 75.0 - 10 * np.arange(8), "x": 5.0 + 10 * np.arange(8)},
    ... ).odc.assign_crs("EPSG:32632")
    >>> x, y = np.meshgrid(emb.x, emb.y)
    >>> at = geopandas.points_from_xy(x.ravel(), y.ravel())
    >>> plots = geopandas.GeoDataFrame({"height": values[0].ravel() * 2 + 7}, geometry=at, crs="EPSG:32632")
    >>> heights, regressor = emb.anysat.regress(plots.iloc[::3], "height", block_m=20)
    >>> sorted(heights), bool(abs(heights.height - (emb[0] * 2 + 7)).max() < 0.01)
    (['applicable', 'dissimilarity', 'height', 'height_lower', 'height_upper'], True)
    """
    check_input(emb, "regress(points, 'value')")
    check_choice("method", method, tuple(REGRESSORS))
    if not is_number(level) or not 0 < level < 1:
        raise OptionError(f"{level=}: expected a number between 0 and 1")
    if model is None:
        if labels is None or columns is None:
            raise OptionError(
                "neither labels and columns nor model=: expected emb.anysat.regress(points, 'value')"
            )
        names = [columns] if isinstance(columns, str) else list(columns)
        model = _fit(
            emb, labels, names, method, weights, float(level), time, groups, block_m, cells_per_polygon, seed
        )
    else:
        if labels is not None or columns is not None:
            raise OptionError(
                "labels with model=: expected one of them; emb.anysat.evaluate(labels, model) scores a model"
            )
        check_learned(model, Regressor, emb, "regress()")
    return _map(emb, model), model


def _fit(
    emb: Any,
    labels: Any,
    columns: list[str],
    method: str,
    weights: str | None,
    level: float,
    time: str | None,
    groups: str | None,
    block_m: float | None,
    most: int,
    seed: int,
) -> Regressor:
    import_optional("sklearn", "regress()")
    seed = check_whole_number("seed", seed, 0, MAX_SEED)
    check_value_columns(labels, columns, "regress()")
    samples = labeled_samples(emb, labels, columns, "regress()", cells_per_polygon=most, seed=seed, time=time)
    targets = samples.targets.astype(float)
    used = len(np.unique(samples.row))
    if used < MIN_LABELS:
        raise OptionError(
            f"{used} labels with a value of {', '.join(columns)} on observed cells ({samples.left_out} are "
            f"not): expected at least {MIN_LABELS}; add labels"
        )
    warn_of_left_out(samples, len(labels))
    weight = _weights(labels, weights, method, samples.row)
    folds = folds_of(emb, samples, labels, groups, block_m, "regress()")
    space, threshold, evaluation, half_widths = assess_values(
        samples.values, targets, columns, method=method, weight=weight, level=level, row=samples.row, folds=folds,
        seed=seed,
    )  # fmt: skip
    with one_thread():
        found = REGRESSORS[method](samples.values, targets, weight)
    return Regressor.from_arrays(
        method=method, channels=found.matrix.shape[1], samples=as_base64(samples.values),
        matrix=found.matrix, offset=found.offset,
        distance=space.distance, threshold=threshold, left_out=samples.left_out, seed=seed, evaluation=evaluation,
        made_with=record_of(emb), columns=tuple(columns), targets=targets.T,
        level=level if len(half_widths) else None, half_widths=half_widths,
    )  # fmt: skip


def assess_values(
    values: np.ndarray,
    targets: np.ndarray,
    columns: Sequence[str],
    *,
    method: str,
    weight: np.ndarray | None,
    level: float,
    row: np.ndarray,
    folds: Folds,
    seed: int,
) -> tuple[FeatureSpace, float, Evaluation | None, np.ndarray]:
    """Cross-validate a regression.

    Parameters
    ----------
    values : ndarray, (n, D) float64
    targets : ndarray, (n, columns) float64
    columns, method, level, seed
        As in :func:`regress`.
    weight : ndarray, (n,) float64, or None
    row : ndarray, (n,) int
        Row of the labels that each sample belongs to.
    folds : Folds

    Returns
    -------
    space : FeatureSpace
    threshold : float
        Of the area of applicability.
    evaluation : Evaluation or None
        None without folds.
    half_widths : ndarray, (columns,)
        Half of the width of the intervals; empty if there are none.
    """

    def fit(numbers: np.ndarray) -> Predict:
        own = None if weight is None else weight[numbers]
        return REGRESSORS[method](values[numbers], targets[numbers], own).scores

    space, indices = applicability_of_samples(values, row, folds)
    threshold = threshold_of(indices)
    if not folds:
        return space, threshold, None, np.empty(0)
    predicted = cross_validate(fit, values, len(columns), folds)
    fold = fold_numbers(folds, len(targets))
    half_widths, coverage = _intervals(np.abs(predicted - targets.T), fold, level)
    score = partial(_r2, targets=targets)
    sizes, scores = learning_curve(fit, values, folds, predicted, score, MIN_LABELS, seed)
    evaluation = evaluation_of_values(
        columns, targets, predicted, fold, [name for name, _, _ in folds], weight, indices, threshold,
        level=level if len(half_widths) else None, coverage=coverage, curve_labels=sizes, curve_scores=scores,
    )  # fmt: skip
    return space, threshold, evaluation, half_widths


def check_value_columns(labels: Any, columns: Sequence[str], call: str) -> None:
    """Refuse columns that are missing, have no numbers, or whose names are taken.

    Raises
    ------
    OptionError
    """
    frame = as_geodataframe(labels, "labels", call)
    if not columns or len(set(columns)) < len(columns):
        raise OptionError(f"columns={list(columns)!r}: expected one or more columns, each once")
    check_columns(frame, columns, "column")
    taken = [c for c in columns if c in TAKEN or not isinstance(c, str)]
    if taken:
        raise OptionError(
            f"column {taken[0]!r}: this name has another meaning in the result; rename it, "
            f"labels.rename(columns={{{taken[0]!r}: 'value'}})"
        )
    for column in columns:
        known = frame[column].dropna()
        if not pd.api.types.is_numeric_dtype(frame[column]) or not np.isfinite(known.astype(float)).all():
            raise OptionError(
                f"column {column!r} is {frame[column].dtype}, or has infinite values: expected finite numbers; convert "
                f"it, pandas.to_numeric(labels[{column!r}]); classify() takes classes"
            )


def _weights(labels: Any, column: str | None, method: str, row: np.ndarray) -> np.ndarray | None:
    """Return the weight of each sample."""
    if column is None:
        return None
    if method != "ridge":
        raise OptionError(
            f"weights={column!r} with {method=}: only 'ridge' takes weights; leave one of them out"
        )
    frame = as_geodataframe(labels, "labels", "regress()")
    check_columns(frame, [column], "weights")
    try:
        found = frame[column].iloc[row].to_numpy(float)
    except (TypeError, ValueError) as error:
        raise OptionError(f"weights={column!r}: {error}; expected a column of positive numbers") from error
    if not (np.isfinite(found) & (found > 0)).all():
        raise OptionError(
            f"weights={column!r} has gaps, or weights of 0 or less: expected positive numbers; drop these labels, "
            f"labels[labels[{column!r}] > 0]"
        )
    return found


def _intervals(residuals: np.ndarray, fold: np.ndarray, level: float) -> tuple[np.ndarray, list[float]]:
    """Return half of the width of the intervals per column, and the share of samples that they cover.

    The half width is the quantile of the absolute residuals (columns, n) of the cross-validation with the correction
    for n samples. For the coverage, each fold is tested with the quantile of the residuals of the other folds.
    """
    half_widths = [_quantile(each, level) for each in residuals]
    if not np.isfinite(half_widths).all():
        needed = math.ceil(round(level / (1 - level), 9))
        warn(
            f"{residuals.shape[1]} samples are too few for intervals that cover {level:.0%}, so there are none: "
            f"expected at least {needed}; pass a smaller level=, or more labels"
        )
        return np.empty(0), []
    coverage = []
    for each in residuals:
        limits = [_quantile(each[fold != i], level) for i in range(fold.max() + 1)]
        coverage.append(float((each <= np.array(limits)[fold]).mean()))
    return np.array(half_widths), coverage


def _quantile(residuals: np.ndarray, level: float) -> float:
    """Return the ⌈level · (n + 1)⌉-th smallest residual; infinite if there are fewer.

    Examples
    --------
    >>> _quantile(np.arange(1.0, 10), 0.9), _quantile(np.arange(1.0, 9), 0.9)
    (9.0, inf)
    """
    rank = math.ceil(round(level * (len(residuals) + 1), 9))
    return float(np.sort(residuals)[rank - 1]) if rank <= len(residuals) else math.inf


def _r2(predicted: np.ndarray, test: np.ndarray, *, targets: np.ndarray) -> float:
    """Mean R² of the columns; relative to the mean of the test samples."""
    observed = targets[test].T
    squares = np.square(predicted - observed).sum(1)
    spread = np.square(observed - observed.mean(1, keepdims=True)).sum(1)
    return float(np.mean(1 - squares / np.where(spread > 0, spread, 1)))


def evaluation_of_values(
    columns: Sequence[str],
    targets: np.ndarray,
    predicted: np.ndarray,
    fold: np.ndarray,
    folds: Sequence[str],
    weights: np.ndarray | None,
    dissimilarity: np.ndarray,
    threshold: float,
    **others: Any,
) -> Evaluation:
    """Return the evaluation of predictions (columns, n) for samples of known values (n, columns)."""
    return Evaluation.from_arrays(
        columns=tuple(columns), classes=(), folds=tuple(folds), fold=fold, observed=targets.T, predicted=predicted,
        confidence=(), weights=() if weights is None else weights, dissimilarity=dissimilarity, threshold=threshold,
        **others,
    )  # fmt: skip


def _map(emb: Any, model: Regressor) -> Any:
    """Return the values of all cells or rows."""
    values = over_all(emb, model.fit(np.array(model.targets).T).scores, rows=len(model.columns))
    found: dict[str, tuple[Any, dict[str, Any]]] = {}
    for i, column in enumerate(model.columns):
        found[column] = (values[i], {"long_name": column})
        if model.half_widths:
            half = np.float32(model.half_widths[i])
            share: dict[str, Any] = {"level": model.level}
            for name, bound in (("lower", values[i] - half), ("upper", values[i] + half)):
                found[f"{column}_{name}"] = (bound, {"long_name": f"{name} bound of {column}", **share})
    found |= applicability(model, emb)
    attrs: dict[str, Any] = {
        "method": model.method, "columns": list(model.columns), "samples": len(model.targets[0]),
        "labels_left_out": model.left_out,
    }  # fmt: skip
    if model.evaluation is not None:
        attrs |= {f"cv_{name}": value for name, value in model.evaluation.scores().items()}
    return joined_to(emb, found, attrs)

"""`classify`: a map of classes from a few labeled points, and its accuracy.

The accuracy comes from spatially separate folds. Nearby points are similar, especially because cells of one window
share their context, so a random split would overestimate the accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from xr_anysat.analysis.cells import map_cells, one_thread, padded_matmul, wrap_on_grid
from xr_anysat.analysis.vector import OK, as_geodataframe, in_crs_of, values_at
from xr_anysat.errors import OptionError, warn
from xr_anysat.shared.checks import check_embedding, import_optional
from xr_anysat.shared.grid import require_grid
from xr_anysat.shared.sensor import S2
from xr_anysat.shared.values import check_choice

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

METHODS = ("linear", "knn")

NEIGHBORS = 5
"""Number of labeled points that vote on a cell, with ``method="knn"``."""

FOLDS = 5

BLOCKS_ACROSS = 10
"""Maximum number of blocks along the longer side of the extent of the points."""

EPS = 1e-12
"""Smallest length and smallest vote, to avoid a division by zero."""

MIN_POINTS_PER_CLASS = 2
"""Minimum number of points per class."""

MISSING = 0
"""Code of cells that were not observed."""


def classify(
    emb: xr.DataArray,
    points: GeoDataFrame,
    column: str,
    *,
    method: str = "linear",
    block_m: float | None = None,
) -> xr.Dataset:
    """Map classes from a few labeled points.

    A classifier is fitted on the embeddings at the points and predicts the class of each cell. Its accuracy is
    measured by spatially blocked cross-validation: the area is divided into squares, each square is
    left out once, and its points are predicted from the others. The map itself is fitted on all points.

    Parameters
    ----------
    emb : DataArray, (D, y, x)
        Output of :func:`xr_anysat.embed`.
    points : GeoDataFrame
        Labeled points, in any CRS, at least two per class. Points outside the cube, on unobserved cells or without
        a label are left out, and a warning says so.
    column : str
        Column of `points` with the class of each point, text or numbers.
    method : {"linear", "knn"}
        ``"linear"``: logistic regression on standardized channels. ``"knn"``: the five nearest points by cosine
        similarity vote, each with the weight 1 + cosine.
    block_m : float, optional
        Side of the squares in units of the CRS, usually meters; the squares start at its origin. Default: a tenth of
        the longer side of the points' extent, but at least a window of the model, because the cells of one window
        share their context.

    Returns
    -------
    Dataset
        Lazy if `emb` is, but the chunks that contain points are computed immediately.

        ``class`` (y, x) uint8, or uint16 from 256 classes
            Codes from 1, in the order of the sorted labels; 0 (``nodata``) where nothing was observed. The
            attributes ``flag_values`` and ``flag_meanings`` (CF) name them; ``class_names`` has the labels unchanged.
        ``confidence`` (y, x) float32
            Probability of that class (linear) or its share of the votes (knn), from 0 to 1; NaN where nothing was
            observed.

        Its attributes are ``method``, ``column``, ``points`` and ``points_left_out`` (numbers of points);
        ``cv_accuracy``, the share of points that were predicted correctly; ``cv_f1_macro``, the mean of the classes' F1
        scores; ``cv_accuracy_folds``, the accuracy of each fold; and ``cv_block_m``, the side of the squares. If all
        points are in one square, there are no scores, and a warning says so.

    Raises
    ------
    CubeTypeError, CubeError
        If `emb` is not an embedding cube, or its coordinates do not define the positions of its cells.
    OptionError
        If `points`, `column`, `method` or `block_m` is invalid, or a class has too few points.
    AnySatError
        If scikit-learn or geopandas is not installed.

    Examples
    --------
    >>> import geopandas, numpy as np, xarray as xr
    >>> import odc.geo.xr, xr_anysat
    >>> emb = xr.DataArray(
    ...     np.stack([np.eye(6) - 0.5, np.eye(6) * 2]), dims=("D", "y", "x"),
    ...     coords={"y": 55.0 - 10 * np.arange(6), "x": 5.0 + 10 * np.arange(6)},
    ... ).odc.assign_crs("EPSG:32632")
    >>> at = geopandas.points_from_xy([5, 15, 45, 55, 5, 25], [55, 45, 15, 5, 5, 5])
    >>> points = geopandas.GeoDataFrame({"cover": list("ddddoo")}, geometry=at, crs="EPSG:32632")
    >>> made = emb.anysat.classify(points, "cover", block_m=20)
    >>> made["class"].values[0], made["class"].attrs["flag_meanings"], made.attrs["cv_accuracy"]
    (array([1, 2, 2, 2, 2, 2], dtype=uint8), 'd o', 1.0)
    """
    check_embedding(emb, "classify(points, 'class')")
    check_choice("method", method, METHODS)
    import_optional("sklearn", "classify()")
    training, left_out = _training_points(emb, points, column)
    counts = np.bincount(training.codes)
    few = [
        f"{name!r} ({n})" for name, n in zip(training.names, counts, strict=True) if n < MIN_POINTS_PER_CLASS
    ]
    if len(counts) < 2 or few:
        seen = f"too few points of {', '.join(few)}" if few else f"points of {len(counts)} class"
        raise OptionError(
            f"{seen} in column {column!r}: expected at least two classes, and {MIN_POINTS_PER_CLASS} points of each "
            f"on observed cells{f' ({left_out} points are not)' if left_out else ''}; add points, or merge classes"
        )
    if left_out:
        warn(
            f"{left_out} of {len(points)} points are left out: they are outside the cube, on unobserved cells, or "
            "without a label. emb.anysat.sample(points) gives the status of each"
        )
    side = _block_side(emb, training, block_m)
    score = cross_validate(
        partial(fit_classifier, method=method),
        training.values,
        training.codes,
        blocks_of(training.x, training.y, side),
    )
    if score is None:
        warn(
            f"all points are in one square of {side:g} m, so there is no cross-validation: pass a smaller block_m= "
            "(but cells of one window share their context), or points that are farther apart"
        )
    with one_thread():
        predict = fit_classifier(training.values, training.codes, method=method)
    pair = map_cells(partial(_predict_class, predict=predict), emb, rows=2, dtype=np.float32, missing=np.nan)
    kind = np.uint8 if len(counts) < 256 else np.uint16
    codes = _codes(pair[0], kind)
    names = [str(name) for name in training.names]
    flags = {
        "long_name": f"class, from {column}",
        "nodata": MISSING,
        "flag_values": list(range(1, len(names) + 1)),
        "flag_meanings": " ".join("_".join(name.split()) for name in names),
        "class_names": names,
    }
    out = xr.Dataset(
        {
            "class": wrap_on_grid(emb, codes, "class", flags),
            "confidence": wrap_on_grid(
                emb, pair[1], "confidence", {"long_name": "confidence in the class", "units": "1"}
            ),
        }
    )
    out.attrs = {
        "method": method,
        "column": column,
        "points": len(training.codes),
        "points_left_out": left_out,
        "cv_block_m": side,
    }
    if score is not None:
        out.attrs |= {
            "cv_accuracy": score.accuracy,
            "cv_f1_macro": score.f1_macro,
            "cv_accuracy_folds": list(score.folds),
        }
    return out


def _codes(decided: Any, kind: type[np.unsignedinteger[Any]]) -> Any:
    """Turn class numbers from 0 into codes from 1, and NaN into 0."""
    if isinstance(decided, np.ndarray):
        return (np.nan_to_num(decided, nan=-1) + 1).astype(kind)
    return decided.map_blocks(_codes, kind, dtype=kind, meta=np.empty((0, 0), kind))


def _predict_class(batch: np.ndarray, *, predict: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Number of the most likely class of each cell, and its probability, (2, n)."""
    likely = predict(batch)
    return np.stack([likely.argmax(0), likely.max(0)])


# ---------------------------------------------------------------------- labeled points


@dataclass(frozen=True)
class Training:
    """Labeled points, in an order that does not depend on the order of the table.

    Attributes
    ----------
    values : ndarray, (n, D) float64
        Embeddings.
    codes : ndarray, (n,) int
        Classes, from 0.
    names : list
        Names of the classes, sorted.
    x, y : ndarray, (n,)
        Coordinates in the CRS of the cube.
    """

    values: np.ndarray
    codes: np.ndarray
    names: list[Any]
    x: np.ndarray
    y: np.ndarray


def _training_points(emb: xr.DataArray, points: GeoDataFrame, column: str) -> tuple[Training, int]:
    """The usable points, and the number of points that are left out."""
    frame = as_geodataframe(points, "points", "classify()")
    if column not in frame.columns or column == frame.active_geometry_name:
        others = [name for name in frame.columns if name != frame.active_geometry_name]
        raise OptionError(f"{column=}: expected the column of points that holds the labels, one of {others}")
    if list(frame.columns).count(column) > 1:
        raise OptionError(
            f"{column=}: expected one column of this name, points have several; rename or drop them"
        )
    values, status = values_at(emb, frame.geometry, "classify()")
    usable = (status == OK) & frame[column].notna().values
    labels = frame[column].values[usable]
    try:
        names = sorted(set(labels.tolist()))
    except TypeError as error:
        raise OptionError(
            f"column {column!r} mixes types of labels ({error}): expected only text or only numbers; convert them, "
            f"points[{column!r}].astype(str)"
        ) from error
    numbers = {name: i for i, name in enumerate(names)}
    codes = np.array([numbers[label] for label in labels.tolist()], int)
    at = in_crs_of(require_grid(emb, "classify()"), frame.geometry, ("Point",), "points")
    x, y = at.x.values[usable], at.y.values[usable]
    order = np.lexsort((codes, x, y))  # rounding and ties in fits and folds depend on the order
    chosen = values[usable].astype(np.float64)[order]
    return Training(chosen, codes[order], names, x[order], y[order]), int((~usable).sum())


def _block_side(emb: xr.DataArray, training: Training, block_m: float | None) -> float:
    """Side of the blocks that are left out together, in units of the CRS."""
    if block_m is None:
        extent = max(np.ptp(training.x), np.ptp(training.y))
        return float(max(extent / BLOCKS_ACROSS, emb.attrs.get("tile", 1) * S2.pixel_size))
    if not block_m > 0 or not np.isfinite(block_m):
        raise OptionError(f"{block_m=}: expected a positive number of meters, or None")
    return float(block_m)


def blocks_of(x: np.ndarray, y: np.ndarray, side: float) -> np.ndarray:
    """Number of the square block of ground that contains each point, (n,) int."""
    at = np.floor(np.stack([y, x]) / side).astype(int)
    return np.unique(at, axis=1, return_inverse=True)[1].ravel()


# ---------------------------------------------------------------------- classifiers


def fit_classifier(
    values: np.ndarray, codes: np.ndarray, *, method: str
) -> Callable[[np.ndarray], np.ndarray]:
    """A classifier of embeddings (n, D): its function from a batch (D, m) to probabilities (classes, m).

    Classes that are missing in `codes`, as can happen when a block is left out, get zeros.
    """
    if method == "knn":
        units = values / np.maximum(np.sqrt(np.square(values).sum(1)), EPS)[:, None]
        return partial(_votes, units=units, codes=codes)
    known = np.unique(codes)
    if known.size == 1:
        return partial(_softmax, matrix=np.zeros((1, values.shape[1])), offset=np.zeros(1), known=known)
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(values)
    model = LogisticRegression(max_iter=1000).fit(scaler.transform(values), codes)
    matrix, offset = model.coef_ / scaler.scale_, model.intercept_
    offset = offset - matrix @ scaler.mean_
    if known.size == 2:  # scikit-learn stores only the difference
        matrix, offset = (np.concatenate([np.zeros_like(part), part]) for part in (matrix, offset))
    return partial(_softmax, matrix=matrix, offset=offset, known=known)


def _softmax(batch: np.ndarray, *, matrix: np.ndarray, offset: np.ndarray, known: np.ndarray) -> np.ndarray:
    scores = padded_matmul(matrix, batch) + offset[:, None]
    raised = np.exp(scores - scores.max(0))
    out = np.zeros((known[-1] + 1, batch.shape[1]))
    out[known] = raised / raised.sum(0)
    return out


def _votes(batch: np.ndarray, *, units: np.ndarray, codes: np.ndarray) -> np.ndarray:
    cosines = padded_matmul(units, batch) / np.maximum(np.sqrt(np.square(batch).sum(0)), EPS)
    count = min(NEIGHBORS, len(codes))
    nearest = np.argpartition(-cosines, count - 1, axis=0)[:count]
    votes = np.maximum(1 + np.take_along_axis(cosines, nearest, 0), EPS)
    out = np.zeros((codes.max() + 1, batch.shape[1]))
    for one, vote in zip(codes[nearest], votes, strict=True):
        out[one, np.arange(batch.shape[1])] += vote
    return out / out.sum(0)


# ---------------------------------------------------------------------- the score


@dataclass(frozen=True)
class Score:
    """Result of a cross-validation.

    Attributes
    ----------
    accuracy : float
        Share of all samples that were predicted correctly.
    f1_macro : float
        Mean of the classes' F1 scores, over all samples.
    folds : tuple of float
        Accuracy of each fold.
    """

    accuracy: float
    f1_macro: float
    folds: tuple[float, ...]


def cross_validate(
    fit: Callable[[np.ndarray, np.ndarray], Callable[[np.ndarray], np.ndarray]],
    values: np.ndarray,
    codes: np.ndarray,
    blocks: np.ndarray,
) -> Score | None:
    """Predict each sample from those of other blocks; None if there is only one block.

    Parameters
    ----------
    fit : callable
        Like :func:`fit_classifier` with its method.
    values : ndarray, (n, D)
    codes : ndarray, (n,) int
        Classes, from 0.
    blocks : ndarray, (n,) int
        Block of each sample; a block is left out as a whole.
    """
    from sklearn.metrics import f1_score

    predicted = np.empty_like(codes)
    folds = []
    with one_thread():
        for train, test in _folds(values, blocks):
            predicted[test] = fit(values[train], codes[train])(values[test].T).argmax(0)
            folds.append(float((predicted[test] == codes[test]).mean()))
    if not folds:
        return None
    f1 = f1_score(codes, predicted, average="macro", zero_division=0)
    return Score(float((predicted == codes).mean()), float(f1), tuple(folds))


def _folds(values: np.ndarray, blocks: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    from sklearn.model_selection import GroupKFold

    n = min(FOLDS, len(np.unique(blocks)))
    if n > 1:
        yield from GroupKFold(n).split(values, groups=blocks)

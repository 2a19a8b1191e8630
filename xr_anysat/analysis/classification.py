"""`classify`: a map of classes from a few labels, where to trust it, and how good it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from xr_anysat.analysis.applicability import FeatureSpace, applicability_of_samples, threshold_of
from xr_anysat.analysis.cells import one_thread
from xr_anysat.analysis.evaluation import (
    NAME,
    Evaluation,
    Folds,
    Predict,
    cross_validate,
    fold_numbers,
    learning_curve,
)
from xr_anysat.analysis.learned import (
    Classifier,
    applicability,
    as_base64,
    check_learned,
    joined_to,
    over_all,
)
from xr_anysat.analysis.learners import CLASSIFIERS, probabilities
from xr_anysat.analysis.sampling import MAX_SEED
from xr_anysat.analysis.training import (
    CELLS_PER_POLYGON,
    check_input,
    folds_of,
    is_table,
    labeled_samples,
    record_of,
    warn_of_left_out,
)
from xr_anysat.errors import OptionError
from xr_anysat.shared.checks import import_optional
from xr_anysat.shared.values import check_choice, check_whole_number, is_number

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

MIN_SAMPLES_PER_CLASS = 2
"""Minimum number of samples per class."""

MISSING = 0
"""Code of cells that were not observed, or whose confidence is too low."""


def classify(
    emb: Any,
    labels: GeoDataFrame | None = None,
    column: str | None = None,
    *,
    model: Classifier | None = None,
    method: str = "linear",
    time: str | None = None,
    groups: str | None = None,
    block_m: float | None = None,
    cells_per_polygon: int = CELLS_PER_POLYGON,
    min_confidence: float = 0.0,
    seed: int = 0,
) -> tuple[Any, Classifier]:
    """Map classes from a few labels.

    A classifier is fitted on the embeddings at the labels and predicts the class of each cell. Its accuracy is
    measured on labels that it was not fitted on: each fold of the labels is left out once, and predicted from the
    others. The classifier of the map itself is fitted on all labels.

    Parameters
    ----------
    emb : DataArray, (D, y, x), or GeoDataFrame
        Output of :func:`xr_anysat.embed`; or a table, the output of :func:`xr_anysat.embed_places` or
        :func:`xr_anysat.embed_at`.
    labels : GeoDataFrame
        Labeled points and polygons, in any CRS, with at least two samples per class. A point is one sample, and a
        polygon gives its whole cells. If `labels` are a table of embeddings themselves, their vectors are used,
        wherever they are. Labels without a sample are left out, and a warning says so. Not needed with `model`.
    column : str
        Column of `labels` with the classes, text or numbers.
    model : Classifier, optional
        Result of an earlier call, on embeddings with the same weights and settings: nothing is fitted.
    method : {"linear", "knn"}
        ``"linear"``: logistic regression on standardized channels. ``"knn"``: the five nearest samples by cosine
        similarity vote, each with the weight 1 + cosine.
    time : str, optional
        For a series (time, D, y, x): column of `labels` with a year, a date or a period. Each label belongs to the step
        whose period contains it.
    groups : str, optional
        Column of `labels`, such as a region or a year: each group is a fold. Default: folds are squares on the ground.
    block_m : float, optional
        Side of the squares in units of the CRS, usually meters; the squares start at its origin. Default: a tenth of
        the longer side of the labels' extent, but at least a window of the model, because the cells of one window
        share their context.
    cells_per_polygon : int
        Maximum number of cells of a polygon. All cells of a polygon are in one fold.
    min_confidence : float
        Cells with a lower confidence get no class.
    seed : int
        Selects cells of polygons, and samples of the learning curve.

    Returns
    -------
    classes : Dataset, or GeoDataFrame
        Variables on the grid of the cube, lazy if `emb` is (but the chunks that contain labels are computed
        immediately); or columns of the table.

        ``class`` (y, x) uint8, or uint16 from 256 classes
            Codes from 1, in the order of the sorted classes; 0 (``nodata``) where nothing was observed, or the
            confidence is less than `min_confidence`. The attributes ``flag_values`` and ``flag_meanings`` (CF) name
            them; ``class_names`` has the labels unchanged. In a table: the classes themselves, or None.
        ``confidence`` (y, x) float32
            Probability of the class (linear) or its share of the votes (knn), from 0 to 1; NaN where nothing was
            observed.
        ``dissimilarity`` (y, x) float32
            Dissimilarity index of Meyer and Pebesma (2021, doi 10.1111/2041-210X.13650): the distance to the nearest
            training sample in standardized channels, divided by the mean distance between training samples.
        ``applicable`` (y, x) bool
            Whether the index is at most that of the training samples in relation to other folds (without outliers).
            Where it is False, the scores of the evaluation say nothing.
    model : Classifier
        Its ``evaluation`` (:class:`Evaluation`) has the scores. Save it (`to_json`) to use it on another year or area.

    Raises
    ------
    CubeTypeError, CubeError
        If `emb` is not an embedding cube, its coordinates do not define the positions of its cells, or `model` or
        `labels` have embeddings with other weights or settings.
    OptionError
        If an argument is invalid, or a class has too few samples.
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
    >>> classes, classifier = emb.anysat.classify(points, "cover", block_m=20)
    >>> classes["class"].values[0], classifier.classes, classifier.evaluation.scores()["accuracy"]
    (array([1, 2, 2, 2, 2, 2], dtype=uint8), ('d', 'o'), 1.0)
    >>> again, _ = emb.anysat.classify(model=classifier)
    >>> again.equals(classes)
    True
    """
    check_input(emb, "classify(points, 'class')")
    check_choice("method", method, tuple(CLASSIFIERS))
    if not is_number(min_confidence) or not 0 <= min_confidence <= 1:
        raise OptionError(f"{min_confidence=}: expected a number from 0 to 1")
    if model is None:
        if labels is None or column is None:
            raise OptionError(
                "neither labels and column nor model=: expected emb.anysat.classify(points, 'class')"
            )
        model = _fit(emb, labels, column, method, time, groups, block_m, cells_per_polygon, seed)
    else:
        if labels is not None or column is not None:
            raise OptionError(
                "labels with model=: expected one of them; emb.anysat.evaluate(labels, model) scores a model"
            )
        check_learned(model, Classifier, emb, "classify()")
    return _map(emb, model, float(min_confidence)), model


def _fit(
    emb: Any,
    labels: Any,
    column: str,
    method: str,
    time: str | None,
    groups: str | None,
    block_m: float | None,
    most: int,
    seed: int,
) -> Classifier:
    import_optional("sklearn", "classify()")
    seed = check_whole_number("seed", seed, 0, MAX_SEED)
    samples = labeled_samples(
        emb, labels, [column], "classify()", cells_per_polygon=most, seed=seed, time=time
    )
    names, codes = classes_of(samples.targets[:, 0], column)
    check_enough(names, codes, column, samples.left_out)
    warn_of_left_out(samples, len(labels))
    folds = folds_of(emb, samples, labels, groups, block_m, "classify()")
    space, threshold, evaluation = assess_classes(
        samples.values, codes, names, column, method=method, row=samples.row, folds=folds, seed=seed
    )
    with one_thread():
        found = CLASSIFIERS[method](samples.values, np.eye(len(names))[codes], None)
    return Classifier.from_arrays(
        method=method, channels=found.matrix.shape[1], samples=as_base64(samples.values),
        matrix=found.matrix, offset=found.offset,
        distance=space.distance, threshold=threshold, left_out=samples.left_out, seed=seed, evaluation=evaluation,
        made_with=record_of(emb), column=column, classes=tuple(names), codes=codes,
    )  # fmt: skip


def assess_classes(
    values: np.ndarray,
    codes: np.ndarray,
    names: Sequence[Any],
    column: str,
    *,
    method: str,
    row: np.ndarray,
    folds: Folds,
    seed: int,
) -> tuple[FeatureSpace, float, Evaluation | None]:
    """Cross-validate a classifier.

    Parameters
    ----------
    values : ndarray, (n, D) float64
    codes : ndarray, (n,) int
        Class of each sample.
    names : sequence
        Names of the classes.
    column, method, seed
        As in :func:`classify`.
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
    """
    indicators = np.eye(len(names))[codes]

    def fit(numbers: np.ndarray) -> Predict:
        found = CLASSIFIERS[method](values[numbers], indicators[numbers], None)
        return partial(probabilities, found)

    space, indices = applicability_of_samples(values, row, folds)
    threshold = threshold_of(indices)
    if not folds:
        return space, threshold, None
    predicted = cross_validate(fit, values, len(names), folds)
    score = partial(_accuracy, codes=codes)
    sizes, scores = learning_curve(fit, values, folds, predicted, score, MIN_SAMPLES_PER_CLASS, seed)
    evaluation = evaluation_of_classes(
        column, names, codes, predicted, fold_numbers(folds, len(codes)), [name for name, _, _ in folds],
        indices, threshold, curve_labels=sizes, curve_scores=scores,
    )  # fmt: skip
    return space, threshold, evaluation


def _accuracy(predicted: np.ndarray, test: np.ndarray, *, codes: np.ndarray) -> float:
    return float((predicted.argmax(0) == codes[test]).mean())


def classes_of(targets: np.ndarray, column: str) -> tuple[list[Any], np.ndarray]:
    """Return the sorted classes, and the number of the class of each sample."""
    given = targets.tolist()
    try:
        names = sorted(set(given))
    except TypeError as error:
        raise OptionError(
            f"column {column!r} mixes types of labels ({error}): expected only text or only numbers; convert them, "
            f"labels[{column!r}].astype(str)"
        ) from error
    wrong = [name for name in names if not NAME.holds(name)]
    if wrong:
        raise OptionError(
            f"column {column!r} has labels such as {wrong[0]!r}, a {type(wrong[0]).__name__}: expected text or "
            f"numbers; convert them, labels[{column!r}].astype(str)"
        )
    numbers = {name: i for i, name in enumerate(names)}
    return names, np.array([numbers[label] for label in given], int)


def check_enough(names: list[Any], codes: np.ndarray, column: str, left_out: int) -> None:
    """Refuse classes with too few samples."""
    counts = np.bincount(codes, minlength=len(names))
    few = [f"{name!r} ({n})" for name, n in zip(names, counts, strict=True) if n < MIN_SAMPLES_PER_CLASS]
    if len(names) < 2 or few:
        seen = f"too few samples of {', '.join(few)}" if few else f"samples of {len(names)} class"
        raise OptionError(
            f"{seen} in column {column!r}: expected at least two classes, and {MIN_SAMPLES_PER_CLASS} samples of each "
            f"on observed cells{f' ({left_out} labels are not)' if left_out else ''}; add labels, or merge classes"
        )


def evaluation_of_classes(
    column: str,
    names: Sequence[Any],
    codes: np.ndarray,
    predicted: np.ndarray,
    fold: np.ndarray,
    folds: Sequence[str],
    dissimilarity: np.ndarray,
    threshold: float,
    **curve: Any,
) -> Evaluation:
    """Return the evaluation of probabilities (classes, n) for samples of known classes."""
    return Evaluation.from_arrays(
        columns=(column,), classes=tuple(names), folds=tuple(folds), fold=fold, observed=(codes,),
        predicted=(predicted.argmax(0),), confidence=predicted.max(0), weights=(), dissimilarity=dissimilarity,
        threshold=threshold, **curve,
    )  # fmt: skip


def _map(emb: Any, model: Classifier, minimum: float) -> Any:
    """Return the classes of all cells or rows."""
    predict = probabilities_of(model)
    pair = over_all(emb, partial(_predict_class, predict=predict), rows=2)
    kind = np.uint8 if len(model.classes) < 256 else np.uint16
    codes = _codes(pair, minimum, kind)
    names = [str(name) for name in model.classes]
    flags: dict[str, Any] = {
        "long_name": f"class, from {model.column}",
        "nodata": MISSING,
        "flag_values": list(range(1, len(names) + 1)),
        "flag_meanings": " ".join("_".join(name.split()) for name in names),
        "class_names": names,
    }
    if is_table(emb):
        codes = np.array([None, *model.classes], object)[codes]
    found = {
        "class": (codes, flags),
        "confidence": (pair[1], {"long_name": "confidence in the class", "units": "1"}),
        **applicability(model, emb),
    }
    attrs: dict[str, Any] = {
        "method": model.method, "column": model.column, "samples": len(model.codes), "labels_left_out": model.left_out,
        "min_confidence": minimum,
    }  # fmt: skip
    if model.evaluation is not None:
        attrs |= {f"cv_{name}": value for name, value in model.evaluation.scores().items()}
    return joined_to(emb, found, attrs)


def probabilities_of(model: Classifier) -> Predict:
    """Return the function of a classifier from a batch (D, m) to probabilities (classes, m)."""
    targets = np.eye(len(model.classes))[np.array(model.codes)]
    return partial(probabilities, model.fit(targets))


def _codes(pair: Any, minimum: float, kind: type[np.unsignedinteger[Any]]) -> Any:
    """Turn numbers of classes and confidences (2, …) into codes from 1, and 0 where there is no class."""
    if isinstance(pair, np.ndarray):
        return np.where(pair[1] >= np.float32(minimum), np.nan_to_num(pair[0], nan=-1) + 1, MISSING).astype(
            kind
        )
    meta = np.empty((0,) * (pair.ndim - 1), kind)
    return pair.map_blocks(_codes, minimum, kind, dtype=kind, drop_axis=0, meta=meta)


def _predict_class(batch: np.ndarray, *, predict: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Number of the most likely class of each cell, and its probability, (2, n)."""
    likely = predict(batch)
    return np.stack([likely.argmax(0), likely.max(0)])

"""How good a model is on samples that it was not fitted on: folds, cross-validation and `Evaluation`.

Nearby samples are similar, especially because cells of one window share their context, so a random split would
overestimate the accuracy. Folds are therefore squares on the ground, or groups that the labels name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from xr_anysat.analysis.cells import one_thread
from xr_anysat.analysis.fitted import Fitted
from xr_anysat.errors import OptionError
from xr_anysat.shared.checks import import_optional
from xr_anysat.shared.serialization import NUMBER, TEXT, Rule, list_of, or_none, whole

FOLDS = 5

BLOCKS_ACROSS = 10
"""Maximum number of blocks along the longer side of the extent of the labels."""

SHARES = (1 / 8, 1 / 4, 1 / 2)
"""Shares of the training samples of a fold, for the learning curve before its last point, which has all of them."""

NAME = Rule("text or a finite number", lambda v: TEXT.holds(v) or NUMBER.holds(v) or isinstance(v, bool))

_NUMBERS = list_of(NUMBER)

_PER_COLUMN = list_of(_NUMBERS, minimum=1)


@dataclass(frozen=True, repr=False)
class Evaluation(Fitted):
    """Predictions for samples that the model was not fitted on, and their scores.

    Print it for the scores; in Jupyter, it is a table. It holds numbers only, and is stored with its model.

    Attributes
    ----------
    columns : tuple of str
        Columns that were predicted: one for classes.
    classes : tuple
        Names of the classes; empty if values were predicted.
    folds : tuple of str
        Names of the folds, such as groups of the labels.
    fold : tuple of n int
        Fold of each sample.
    observed, predicted : tuple of tuples of n numbers
        Per column, values, or numbers of classes from 0.
    confidence : tuple of n float
        Probability of the predicted class; empty if values were predicted.
    weights : tuple of n float
        Weight of each sample in the scores; empty if all are equal.
    dissimilarity : tuple of n float
        Dissimilarity index in relation to the samples that the model of the fold was fitted on.
    threshold : float
        Samples with a larger index are outside of the area of applicability.
    curve_labels : tuple of k int
        Mean number of samples in the fits of the learning curve.
    curve_scores : tuple of k tuples of float
        Accuracy, or R² (mean of the columns), of each fold in these fits.
    level : float or None
        Share of values that prediction intervals are to cover.
    coverage : tuple of float
        Per column, the share of samples that the intervals covered, measured with residuals of other folds.
    """

    RULES: ClassVar[Mapping[str, Rule]] = {
        "columns": list_of(TEXT, minimum=1), "classes": list_of(NAME), "folds": list_of(TEXT, minimum=1),
        "fold": list_of(whole(0)), "observed": _PER_COLUMN, "predicted": _PER_COLUMN, "confidence": _NUMBERS,
        "weights": _NUMBERS, "dissimilarity": _NUMBERS, "threshold": NUMBER, "curve_labels": _NUMBERS,
        "curve_scores": list_of(_NUMBERS), "level": or_none(NUMBER), "coverage": _NUMBERS,
    }  # fmt: skip

    columns: tuple[str, ...]
    classes: tuple[Any, ...]
    folds: tuple[str, ...]
    fold: tuple[int, ...]
    observed: tuple[tuple[float, ...], ...]
    predicted: tuple[tuple[float, ...], ...]
    confidence: tuple[float, ...]
    weights: tuple[float, ...]
    dissimilarity: tuple[float, ...]
    threshold: float
    curve_labels: tuple[float, ...] = ()
    curve_scores: tuple[tuple[float, ...], ...] = ()
    level: float | None = None
    coverage: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        n = len(self.fold)
        each = (*self.observed, *self.predicted, self.dissimilarity)
        optional = (self.confidence, self.weights)
        numbers = range(len(self.classes))
        if (
            any(len(values) != n for values in each)
            or any(values and len(values) != n for values in optional)
            or not n
            or {len(self.observed), len(self.predicted)} != {len(self.columns)}
            or not set(self.fold) <= set(range(len(self.folds)))
            or (self.classes and not {*self.observed[0], *self.predicted[0]} <= set(numbers))
        ):
            raise OptionError(
                f"an evaluation of {n} samples whose numbers do not match: load the text that to_json() wrote, "
                "Evaluation.from_json(text)"
            )

    # ------------------------------------------------------------------ scores

    def scores(self, samples: Any = slice(None)) -> dict[str, float]:
        """Return the scores of some samples, by default all.

        Parameters
        ----------
        samples : array of bool, (n,), optional

        Returns
        -------
        dict
            For classes ``accuracy``, ``balanced_accuracy`` (mean recall of the classes that were observed) and
            ``f1_macro`` (mean F1 of the classes that were observed or predicted). For values, the means of the columns
            of ``rmse``, ``mae``, ``r2`` and ``bias`` (predicted minus observed). NaN without samples.
        """
        table = self.to_frame(samples)
        if not self.classes:
            return {name: float(table[name].mean()) for name in ("rmse", "mae", "r2", "bias")}
        observed, predicted, weights = self._of(0, samples)
        right = _mean(observed == predicted, weights)
        met = (table["samples"] > 0) | table["precision"].notna()
        return {
            "accuracy": right,
            "balanced_accuracy": float(table["recall"][table["samples"] > 0].mean()),
            "f1_macro": float(table["f1"][met].mean()),
        }

    def to_frame(self, samples: Any = slice(None)) -> pd.DataFrame:
        """Return the scores per class or per column.

        Parameters
        ----------
        samples : array of bool, (n,), optional

        Returns
        -------
        DataFrame
            For classes: ``samples``, ``precision`` (NaN if it was never predicted), ``recall`` (NaN if it was never
            observed) and ``f1``. For columns: ``samples``, ``rmse``, ``mae``, ``r2``, ``bias``, and ``coverage`` of the
            intervals.
        """
        if not self.classes:
            rows = [_value_scores(*self._of(i, samples)) for i in range(len(self.columns))]
            table = pd.DataFrame(rows, pd.Index(self.columns, name="column"))
            if self.coverage:
                table["coverage"] = self.coverage
            return table
        matrix = self.confusion(samples).values
        hits = np.diag(matrix).astype(float)
        with np.errstate(invalid="ignore"):
            precision, recall = hits / matrix.sum(0), hits / matrix.sum(1)
            f1 = 2 * hits / (matrix.sum(0) + matrix.sum(1))
        values = {"samples": matrix.sum(1), "precision": precision, "recall": recall, "f1": f1}
        return pd.DataFrame(values, pd.Index(self.classes, name="class"))

    def confusion(self, samples: Any = slice(None)) -> pd.DataFrame:
        """Return the confusion matrix: a row per observed class, a column per predicted class.

        Raises
        ------
        OptionError
            If values were predicted.
        """
        if not self.classes:
            raise OptionError(
                "confusion() of values: expected an evaluation of classes; to_frame() has the scores per column"
            )
        observed, predicted, weights = self._of(0, samples)
        k = len(self.classes)
        counts = np.zeros((k, k), int if weights is None else float)
        np.add.at(counts, (observed.astype(int), predicted.astype(int)), 1 if weights is None else weights)
        names = [pd.Index(self.classes, name=name) for name in ("observed", "predicted")]
        return pd.DataFrame(counts, *names)

    def fold_scores(self) -> pd.DataFrame:
        """Return the scores of each fold, one row per fold."""
        numbers = np.array(self.fold)
        rows = [
            {"samples": int((numbers == i).sum()), **self.scores(numbers == i)}
            for i in range(len(self.folds))
        ]
        return pd.DataFrame(rows, pd.Index(self.folds, name="fold"))

    def by_applicability(self) -> pd.DataFrame:
        """Return the scores inside and outside of the area of applicability."""
        inside = np.array(self.dissimilarity) <= self.threshold
        rows = [{"samples": int(part.sum()), **self.scores(part)} for part in (inside, ~inside)]
        return pd.DataFrame(rows, pd.Index(["inside", "outside"], name="area of applicability"))

    def by_confidence(self, minimum: Sequence[float] = (0, 0.5, 0.6, 0.7, 0.8, 0.9)) -> pd.DataFrame:
        """Return the share of samples that keep their class with `min_confidence`, and the scores of these.

        Raises
        ------
        OptionError
            If values were predicted.
        """
        if not self.classes:
            raise OptionError("by_confidence() of values: expected an evaluation of classes")
        confidence = np.array(self.confidence)
        rows = [{"share": (confidence >= m).mean(), **self.scores(confidence >= m)} for m in minimum]
        return pd.DataFrame(rows, pd.Index(minimum, name="min_confidence"))

    def learning_curve(self) -> pd.DataFrame:
        """Return the score by the number of samples in the fit: mean of the folds, and deviation (``spread``)."""
        values = [np.array(scores) for scores in self.curve_scores]
        index = pd.Index(np.rint(self.curve_labels).astype(int), name="samples")
        return pd.DataFrame({"score": [v.mean() for v in values], "spread": [v.std() for v in values]}, index)

    def _of(self, column: int, samples: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Observed and predicted values of samples, and their weights."""
        observed, predicted = (np.array(v[column])[samples] for v in (self.observed, self.predicted))
        return observed, predicted, np.array(self.weights)[samples] if self.weights else None

    # ------------------------------------------------------------------ display

    def __repr__(self) -> str:
        title, tables = self._tables()
        parts = [f"{name}\n{table.to_string(float_format='{:.3f}'.format)}" for name, table in tables.items()]
        return "\n\n".join([title, *parts])

    def _repr_html_(self) -> str:
        title, tables = self._tables()
        parts = [
            f"<p>{escape(name)}</p>{table.to_html(float_format='{:.3f}'.format, escape=True)}"
            for name, table in tables.items()
        ]
        return f"<p><b>{escape(title)}</b></p>{''.join(parts)}"

    def _tables(self) -> tuple[str, dict[str, pd.DataFrame]]:
        """Return what is shown: a title, and tables by their titles."""
        folds = self.fold_scores().drop(columns="samples")
        spread = folds.std(ddof=0)
        shown = ", ".join(f"{name} {value:.3f} ± {spread[name]:.3f}" for name, value in self.scores().items())
        count = f"{len(self.fold)} samples in {len(self.folds)} fold{'s' if len(self.folds) > 1 else ''}"
        tables = {"Per class" if self.classes else "Per column": self.to_frame()}
        if self.classes:
            tables["Confusion matrix"] = self.confusion()
        tables["Area of applicability"] = self.by_applicability()
        if self.curve_labels:
            tables["Learning curve"] = self.learning_curve()
        return f"{', '.join(self.columns)}: {shown} ({count}; ± is the deviation of the folds)", tables

    def plot(self) -> Any:
        """Draw the confusion matrix, or observed and predicted values, beside the learning curve.

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        AnySatError
            If matplotlib is not installed.
        """
        pyplot = import_optional("matplotlib.pyplot", "plot()")
        panels = len(self.columns) + bool(self.curve_labels)
        figure, axes = pyplot.subplots(
            1, panels, figsize=(4.5 * panels, 4), layout="constrained", squeeze=False
        )
        if self.classes:
            _draw_confusion(axes[0, 0], self.confusion())
        else:
            for i, column in enumerate(self.columns):
                _draw_values(axes[0, i], *self._of(i, slice(None))[:2], column)
        if self.curve_labels:
            curve, last = self.learning_curve(), axes[0, -1]
            last.errorbar(curve.index, curve["score"], curve["spread"], marker="o", capsize=3)
            last.set(xlabel="samples in the fit", ylabel="accuracy" if self.classes else "R²", xscale="log")
            last.set_xticks(curve.index, [str(n) for n in curve.index], minor=False)
            last.minorticks_off()
            last.set_title("Learning curve, mean and deviation of the folds")
        return figure


def _draw_confusion(axes: Any, matrix: pd.DataFrame) -> None:
    shares = matrix.values / np.maximum(matrix.values.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (i, j), count in np.ndenumerate(matrix.values):
        axes.text(
            j, i, f"{count:g}", ha="center", va="center", color="white" if shares[i, j] > 0.6 else "black"
        )
    names = [str(name) for name in matrix.index]
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="observed", title="Confusion matrix")


def _draw_values(axes: Any, observed: np.ndarray, predicted: np.ndarray, column: str) -> None:
    ends = [min(observed.min(), predicted.min()), max(observed.max(), predicted.max())]
    axes.plot(ends, ends, color="gray", linewidth=1)
    axes.scatter(observed, predicted, s=10, alpha=0.6)
    axes.set(xlabel="observed", ylabel="predicted", title=column)


def _mean(values: np.ndarray, weights: np.ndarray | None) -> float:
    return float(np.average(values, weights=weights)) if len(values) else float("nan")


def _value_scores(
    observed: np.ndarray, predicted: np.ndarray, weights: np.ndarray | None
) -> dict[str, float]:
    error = predicted - observed
    square = _mean(np.square(error), weights)
    spread = _mean(np.square(observed - _mean(observed, weights)), weights)
    return {
        "samples": len(observed),
        "rmse": float(np.sqrt(square)),
        "mae": _mean(np.abs(error), weights),
        "r2": 1 - square / spread if spread > 0 else float("nan"),
        "bias": _mean(error, weights),
    }


# ---------------------------------------------------------------------- folds

Folds = list[tuple[str, np.ndarray, np.ndarray]]
"""Name of each fold, and the numbers of the samples to train on and to test."""


def block_side(x: np.ndarray, y: np.ndarray, window: float, block_m: float | None) -> float:
    """Return the side of the blocks that are left out together, in units of the coordinates.

    Raises
    ------
    OptionError
        If `block_m` is not a positive number.
    """
    if block_m is None:
        extent = max(np.ptp(x), np.ptp(y))
        return float(max(extent / BLOCKS_ACROSS, window))
    if not block_m > 0 or not np.isfinite(block_m):
        raise OptionError(f"{block_m=}: expected a positive number of meters, or None")
    return float(block_m)


def blocks_of(x: np.ndarray, y: np.ndarray, side: float) -> np.ndarray:
    """Return the number of the square block of ground that contains each point, (n,) int."""
    at = np.floor(np.stack([y, x]) / side).astype(int)
    return np.unique(at, axis=1, return_inverse=True)[1].ravel()


def block_folds(x: np.ndarray, y: np.ndarray, side: float) -> Folds:
    """Return at most :data:`FOLDS` folds of whole blocks; none if there is only one block."""
    from sklearn.model_selection import GroupKFold

    blocks = blocks_of(x, y, side)
    n = min(FOLDS, len(np.unique(blocks)))
    if n < 2:
        return []
    split = GroupKFold(n).split(blocks, groups=blocks)
    return [(f"{i + 1} of squares of {side:g} m", train, test) for i, (train, test) in enumerate(split)]


def group_folds(groups: np.ndarray) -> Folds:
    """Return one fold per group, which is left out; none if there is only one group."""
    names = sorted({str(group) for group in groups})
    of = np.array([str(group) for group in groups])
    if len(names) < 2:
        return []
    return [(name, np.flatnonzero(of != name), np.flatnonzero(of == name)) for name in names]


def fold_numbers(folds: Folds, count: int) -> np.ndarray:
    """Return the number of the fold that tests each of `count` samples."""
    numbers = np.zeros(count, int)
    for i, (_, _, test) in enumerate(folds):
        numbers[test] = i
    return numbers


Predict = Callable[[np.ndarray], np.ndarray]
"""From samples (D, m) to probabilities of classes or values of columns (rows, m)."""


def cross_validate(
    fit: Callable[[np.ndarray], Predict], values: np.ndarray, rows: int, folds: Folds
) -> np.ndarray:
    """Predict each sample by a fit on the others, (rows, n).

    Parameters
    ----------
    fit : callable
        From the numbers of the samples to fit on to the prediction.
    values : ndarray, (n, D)
    rows : int
        Number of classes or columns.
    folds : Folds
    """
    predicted = np.full((rows, len(values)), np.nan)
    with one_thread():
        for _, train, test in folds:
            predicted[:, test] = fit(train)(values[test].T)
    return predicted


def learning_curve(
    fit: Callable[[np.ndarray], Predict],
    values: np.ndarray,
    folds: Folds,
    predicted: np.ndarray,
    score: Callable[[np.ndarray, np.ndarray], float],
    least: int,
    seed: int,
) -> tuple[list[float], list[list[float]]]:
    """Score fits on shares of the training samples of each fold, and on all of them.

    Parameters
    ----------
    fit, values, folds
        As for :func:`cross_validate`.
    predicted : ndarray, (rows, n)
        Its result, which is the last point of the curve.
    score : callable
        From predictions (rows, m) and the numbers of the samples to a score.
    least : int
        Smallest number of samples in a fit.
    seed : int
        Selects the samples.

    Returns
    -------
    labels : list of float
        Mean number of samples per share; shares with fewer samples than `least` are left out.
    scores : list of lists of float
        Score of each fold, per share.
    """
    labels, scores = [], []
    for share in SHARES:
        sizes, found = [], []
        for _, train, test in folds:
            count = int(len(train) * share)
            if count < least:
                break
            chosen = np.sort(np.random.default_rng(seed).permutation(train)[:count])
            with one_thread():
                found.append(score(fit(chosen)(values[test].T), test))
            sizes.append(count)
        if len(found) == len(folds):
            labels.append(float(np.mean(sizes)))
            scores.append(found)
    labels.append(float(np.mean([len(train) for _, train, _ in folds])))
    scores.append([score(predicted[:, test], test) for _, _, test in folds])
    return labels, scores

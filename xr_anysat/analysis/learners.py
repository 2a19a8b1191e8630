"""How classes and values are learned: scikit-learn fits, and predictions are arithmetic on numbers.

A learner is a function from samples (n, D) and their targets to a :class:`Fit`, which is only numbers, so that it can
be stored as JSON and gives the same bits for any chunks. A new method is a new entry of :data:`CLASSIFIERS` or
:data:`REGRESSORS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from xr_anysat.analysis.cells import padded_matmul

NEIGHBORS = 5
"""Number of labeled samples that vote on a cell, with ``method="knn"``."""

EPS = 1e-12
"""Smallest length and smallest vote, to avoid a division by zero."""

ALPHAS = tuple(10.0**e for e in range(-2, 7))
"""Penalties of ridge regression, of which the best is chosen by generalized cross-validation, per column."""


@dataclass(frozen=True)
class Fit:
    """What a learner found.

    Attributes
    ----------
    matrix : ndarray, (rows, D)
        Weights of the channels; (0, D) for nearest neighbors.
    offset : ndarray, (rows,)
    samples : ndarray, (n, D)
        Training samples of nearest neighbors; (0, D) for other methods.
    targets : ndarray, (n, rows)
        What the neighbors vote for: one column per class, 1 or 0, or the values.
    """

    matrix: np.ndarray
    offset: np.ndarray
    samples: np.ndarray
    targets: np.ndarray

    def scores(self, batch: np.ndarray) -> np.ndarray:
        """Return the linear function or the vote of neighbors of a batch (D, m): (rows, m)."""
        if len(self.samples):
            return _vote(batch, self.samples, self.targets)
        return padded_matmul(self.matrix, batch) + self.offset[:, None]


def softmax(scores: np.ndarray) -> np.ndarray:
    """Convert scores (classes, m) to probabilities."""
    raised = np.exp(scores - scores.max(0))
    return raised / raised.sum(0)


def _vote(batch: np.ndarray, samples: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Mean of the targets of the nearest samples by cosine similarity, each with the weight 1 + cosine."""
    units = samples / np.maximum(np.sqrt(np.square(samples).sum(1)), EPS)[:, None]
    cosines = padded_matmul(units, batch) / np.maximum(np.sqrt(np.square(batch).sum(0)), EPS)
    count = min(NEIGHBORS, len(samples))
    nearest = np.argpartition(-cosines, count - 1, axis=0)[:count]
    votes = np.maximum(1 + np.take_along_axis(cosines, nearest, 0), EPS)
    return np.einsum("km,kmr->rm", votes, targets[nearest]) / votes.sum(0)


Learner = Callable[[np.ndarray, np.ndarray, np.ndarray | None], Fit]
"""From samples (n, D), targets (n, rows) and weights (n,), or None, to a fit."""


def _neighbors(values: np.ndarray, targets: np.ndarray, weights: np.ndarray | None) -> Fit:
    rows = targets.shape[1]
    return Fit(np.empty((0, values.shape[1])), np.zeros(rows), values, targets)


def _logistic(values: np.ndarray, targets: np.ndarray, weights: np.ndarray | None) -> Fit:
    """Logistic regression on standardized channels. Classes without a sample get the score -inf."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    codes = targets.argmax(1)
    known = np.unique(codes)
    rows, depth = targets.shape[1], values.shape[1]
    matrix, offset = np.zeros((rows, depth)), np.full(rows, -np.inf)
    none = np.empty((0, depth))
    if known.size == 1:
        offset[known] = 0
        return Fit(matrix, offset, none, np.empty((0, rows)))
    scaler = StandardScaler().fit(values)
    model = LogisticRegression(max_iter=1000).fit(scaler.transform(values), codes, weights)
    found = model.coef_ / scaler.scale_
    constant = model.intercept_ - found @ scaler.mean_
    if known.size == 2:  # scikit-learn stores only the difference
        found, constant = (np.concatenate([np.zeros_like(part), part]) for part in (found, constant))
    matrix[known], offset[known] = found, constant
    return Fit(matrix, offset, none, np.empty((0, rows)))


def _ridge(values: np.ndarray, targets: np.ndarray, weights: np.ndarray | None) -> Fit:
    """Ridge regression on standardized channels, with the best of :data:`ALPHAS` per column."""
    from sklearn.linear_model import RidgeCV
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(values, sample_weight=weights)
    model = RidgeCV(ALPHAS, alpha_per_target=True).fit(scaler.transform(values), targets, weights)
    matrix = np.atleast_2d(model.coef_) / scaler.scale_
    offset = np.atleast_1d(model.intercept_) - matrix @ scaler.mean_
    return Fit(matrix, offset, np.empty((0, values.shape[1])), np.empty((0, targets.shape[1])))


CLASSIFIERS: dict[str, Learner] = {"linear": _logistic, "knn": _neighbors}

REGRESSORS: dict[str, Learner] = {"ridge": _ridge, "knn": _neighbors}


def probabilities(fit: Fit, batch: np.ndarray) -> np.ndarray:
    """Return the probability of each class for a batch (D, m): (classes, m)."""
    scores = fit.scores(batch)
    return scores if len(fit.samples) else softmax(scores)

"""Where a model has seen nothing like it: the dissimilarity index and the area of applicability.

The definitions are those of Meyer and Pebesma (2021), https://doi.org/10.1111/2041-210X.13650, with equal weights of
all channels. Channels are standardized by the mean and the standard deviation of the training samples. The
dissimilarity index of a cell is its distance to the nearest training sample, divided by the mean distance between all
training samples. Its threshold comes from the training samples: for each, the distance to the nearest sample of other
folds is taken, and the threshold is the largest index that is no outlier, which is at most the third quartile plus 1.5
times the interquartile range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from xr_anysat.analysis.cells import BATCH, one_thread, padded_matmul

WHISKER = 1.5
"""Interquartile ranges above the third quartile from which on an index is an outlier."""


@dataclass(frozen=True)
class FeatureSpace:
    """Training samples in standardized channels.

    Attributes
    ----------
    mean, scale : ndarray, (D,)
        Of the training samples; the scale of a constant channel is infinite, so that the channel has no effect.
    samples : ndarray, (n, D)
        The standardized training samples.
    distance : float
        Mean distance between two of them; at least the smallest positive number.
    """

    mean: np.ndarray
    scale: np.ndarray
    samples: np.ndarray
    distance: float

    def nearest(self, batch: np.ndarray, among: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Return the index (n,) of a batch (D, n) in relation to some of the samples."""
        found = (batch - self.mean[:, None]) / self.scale[:, None]
        nearest = _squares(self.samples[among], found).min(0)
        with np.errstate(over="ignore"):  # if all samples are equal, anything else is infinitely far
            return np.sqrt(nearest) / self.distance


def feature_space(values: np.ndarray, distance: float | None = None) -> FeatureSpace:
    """Return the feature space of training samples (n, D), at least two; `distance` is its distance, if known."""
    mean, scale = values.mean(0), values.std(0, ddof=1)
    scale = np.where(scale > 0, scale, np.inf)
    samples = (values - mean) / scale
    if distance is not None:
        return FeatureSpace(mean, scale, samples, distance)
    total = 0.0
    for start in range(0, len(samples), BATCH):
        total += float(np.sqrt(_squares(samples, samples[start : start + BATCH].T)).sum())
    pairs = len(samples) * (len(samples) - 1)
    return FeatureSpace(mean, scale, samples, max(total / pairs, float(np.finfo(float).tiny)))


def _squares(samples: np.ndarray, batch: np.ndarray) -> np.ndarray:
    """Squared distances (n, m) between samples (n, D) and a batch (D, m)."""
    lengths = np.square(samples).sum(1)[:, None] + np.square(batch).sum(0)
    squares = lengths - 2 * padded_matmul(samples, batch)
    # what is left of equal vectors is rounding
    return np.where(squares > 1e-12 * lengths, squares, 0)


def dissimilarity_of_samples(
    space: FeatureSpace, folds: Sequence[tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """Return the index of each training sample in relation to the samples of other folds, (n,).

    Parameters
    ----------
    space : FeatureSpace
    folds : sequence of (ndarray, ndarray)
        Samples to train on and samples to test, as numbers. Samples in no test have the index NaN.
    """
    found = np.full(len(space.samples), np.nan)
    for train, test in folds:
        for start in range(0, len(test), BATCH):
            part = test[start : start + BATCH]
            squares = _squares(space.samples[train], space.samples[part].T)
            found[part] = np.sqrt(squares.min(0)) / space.distance
    return found


def applicability_of_samples(
    values: np.ndarray, row: np.ndarray, folds: Sequence[tuple[str, np.ndarray, np.ndarray]]
) -> tuple[FeatureSpace, np.ndarray]:
    """Return the feature space of training samples (n, D), and their indices (n,).

    The indices are in relation to the samples of other folds; without folds, to those of other rows of the labels.
    """
    apart = [(train, test) for _, train, test in folds] or [
        (np.flatnonzero(row != r), np.flatnonzero(row == r)) for r in np.unique(row)
    ]
    with one_thread():
        space = feature_space(values)
        return space, dissimilarity_of_samples(space, apart)


def threshold_of(dissimilarity: np.ndarray) -> float:
    """Return the largest index that is no outlier.

    Examples
    --------
    >>> threshold_of(np.array([1.0, 2.0, 3.0, 4.0, 100.0]))
    4.0
    """
    first, third = np.quantile(dissimilarity, (0.25, 0.75))
    return float(dissimilarity[dissimilarity <= third + WHISKER * (third - first)].max())

"""Fitted models of numbers only: principal components and cluster centers. `learned` has the supervised ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

import numpy as np
import xarray as xr

from xr_anysat.analysis.sampling import MAX_SEED, sample_cells
from xr_anysat.errors import CubeError, OptionError
from xr_anysat.record import check_comparable, comparability_record
from xr_anysat.shared.serialization import NUMBER, OBJECT, Rule, Stored, list_of, whole
from xr_anysat.shared.values import check_whole_number

_NUMBERS = list_of(NUMBER, minimum=1)

_VECTORS = list_of(_NUMBERS, minimum=1)


@dataclass(frozen=True)
class Fitted(Stored):
    """A model that holds only plain numbers, so models can be compared with ``==``."""

    def __post_init__(self) -> None:
        for each in fields(self):
            object.__setattr__(self, each.name, _as_tuples(getattr(self, each.name)))

    @classmethod
    def from_arrays(cls, **values: Any) -> Self:
        """Return a model of these values, in which arrays become tuples."""
        return cls(**values)


def _as_tuples(value: Any) -> Any:
    """Arrays and lists as tuples of Python numbers."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class PCAModel(Fitted):
    """Principal components of embeddings, fitted by :func:`reduce` and :func:`rgb`.

    Attributes
    ----------
    mean : tuple of D float
        Mean of the sample, which is subtracted.
    components : tuple of k tuples of D float
        Unit vectors, in the order of decreasing variance. The largest weight of each is positive.
    explained : tuple of k float
        Share of the variance of the sample, per component.
    low, high : tuple of k float
        The 2nd and the 98th percentile of each component in the sample: the range of colors.
    cells : int
        Number of cells in the sample.
    seed : int
        Seed of the sample.
    made_with : dict
        Weights, statistics and settings of the embeddings that it was fitted on.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> import xr_anysat
    >>> emb = xr.DataArray(np.random.default_rng(0).normal(size=(8, 4, 5)), dims=("D", "y", "x"))
    >>> _, reducer = xr_anysat.reduce(emb, 2)
    >>> xr_anysat.Reducer.from_json(reducer.to_json()) == reducer
    True
    """

    RULES: ClassVar[Mapping[str, Rule]] = {
        "mean": _NUMBERS, "components": _VECTORS, "explained": _NUMBERS, "low": _NUMBERS, "high": _NUMBERS,
        "cells": whole(1), "seed": whole(0, MAX_SEED), "made_with": OBJECT,
    }  # fmt: skip

    mean: tuple[float, ...] = field(repr=False)
    components: tuple[tuple[float, ...], ...] = field(repr=False)
    explained: tuple[float, ...]
    low: tuple[float, ...] = field(repr=False)
    high: tuple[float, ...] = field(repr=False)
    cells: int
    seed: int
    made_with: dict[str, Any] = field(repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        k, depth = len(self.components), len(self.mean)
        per_component = (self.explained, self.low, self.high)
        if any(len(c) != depth for c in self.components) or any(len(p) != k for p in per_component):
            raise OptionError(
                f"{k} components of {depth} channels: expected vectors and numbers of matching lengths; load the "
                "text that to_json() wrote, PCAModel.from_json(text)"
            )


@dataclass(frozen=True)
class Clusters(Fitted):
    """Centers of clusters of embeddings, fitted by :func:`cluster`.

    Attributes
    ----------
    centers : tuple of k tuples of D float
        In the order of decreasing size of the clusters in the sample.
    shares : tuple of k float
        Share of the sample in each cluster.
    cells : int
        Number of cells in the sample.
    seed : int
        Seed of the sample and of the fit.
    made_with : dict
        Weights, statistics and settings of the embeddings that it was fitted on.
    """

    RULES: ClassVar[Mapping[str, Rule]] = {
        "centers": _VECTORS, "shares": _NUMBERS, "cells": whole(1), "seed": whole(0, MAX_SEED), "made_with": OBJECT,
    }  # fmt: skip

    centers: tuple[tuple[float, ...], ...] = field(repr=False)
    shares: tuple[float, ...]
    cells: int
    seed: int
    made_with: dict[str, Any] = field(repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len({len(c) for c in self.centers}) != 1 or len(self.shares) != len(self.centers):
            raise OptionError(
                f"{len(self.centers)} centers and {len(self.shares)} shares: expected as many centers as shares, "
                "all of one length; load the text that to_json() wrote, Clusters.from_json(text)"
            )


def sample_for_fit(emb: xr.DataArray, k: int, cells: int, seed: int, call: str) -> tuple[np.ndarray, int]:
    """Sample at least `k` cells; return the sample and the checked seed."""
    cells = check_whole_number("cells", cells, k)
    seed = check_whole_number("seed", seed, 0, MAX_SEED)
    sample = sample_cells(emb, cells, seed)
    if len(sample) < k:
        raise CubeError(
            f"{call}: {len(sample)} of {emb.sizes['y'] * emb.sizes['x']} cells were observed, expected at "
            f"least {k}: use a larger area or a longer period, or pass a model= of another cube"
        )
    return sample, seed


def check_model(
    model: Any, kind: type[PCAModel] | type[Clusters], emb: xr.DataArray, depth: int, call: str
) -> None:
    """Refuse a model of another type or number of channels, or fitted on embeddings that are not comparable."""
    if not isinstance(model, kind):
        raise OptionError(
            f"model={str(model)[:60]!r}: expected the {kind.__name__} from an earlier call, or "
            f"xr_anysat.{kind.__name__}.from_json(text)"
        )
    check_comparable(comparability_record(emb), model.made_with, call, "of the model")
    if depth != emb.sizes["D"]:
        raise CubeError(
            f"{call}: the cube has {emb.sizes['D']} channels and the model {depth}: expected the channels that it was "
            "fitted on; leave model= out to fit a new one"
        )

"""Models that were fitted on labels: what they hold, and how they are applied to cubes and tables.

A model holds numbers and text only, so it is stored as JSON, and can be compared with ``==``.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import xarray as xr

from xr_anysat.analysis.applicability import FeatureSpace, feature_space
from xr_anysat.analysis.cells import in_batches, map_cells, wrap_on_grid
from xr_anysat.analysis.evaluation import NAME, Evaluation
from xr_anysat.analysis.fitted import Fitted
from xr_anysat.analysis.learners import Fit
from xr_anysat.analysis.sampling import MAX_SEED
from xr_anysat.analysis.training import is_table, record_of, table_vectors
from xr_anysat.analysis.vector import as_geodataframe, check_new_columns
from xr_anysat.errors import CubeError, OptionError
from xr_anysat.record import check_comparable
from xr_anysat.shared.serialization import NUMBER, OBJECT, TEXT, Rule, list_of, or_none, whole

DISSIMILARITY, APPLICABLE = "dissimilarity", "applicable"
"""Names of the variables and columns that say where a model applies."""

_BASE64 = Rule(
    "text in base64", lambda v: isinstance(v, str) and re.fullmatch(r"[A-Za-z0-9+/=]*", v) is not None
)

_NUMBERS = list_of(NUMBER)

COMMON_RULES: Mapping[str, Rule] = {
    "method": TEXT, "channels": whole(1), "samples": _BASE64, "matrix": list_of(_NUMBERS), "offset": _NUMBERS,
    "distance": NUMBER, "threshold": NUMBER, "left_out": whole(0), "seed": whole(0, MAX_SEED),
    "evaluation": or_none(OBJECT), "made_with": OBJECT,
}  # fmt: skip


@dataclass(frozen=True)
class Learned(Fitted):
    """What both kinds of models hold.

    Attributes
    ----------
    method : str
    channels : int
        Number of channels D.
    samples : str
        The training samples, (n, D) float32 in little-endian order, as base64; `vectors` has them as an array.
    matrix : tuple of tuples of D float
        Weights of the channels per class or column; empty for nearest neighbors.
    offset : tuple of float
    distance : float
        Mean distance between two training samples in standardized channels.
    threshold : float
        Largest dissimilarity index within the area of applicability.
    left_out : int
        Number of labels that were not used.
    seed : int
    evaluation : Evaluation or None
        Scores of the cross-validation; None if there was only one fold.
    made_with : dict
        Weights, statistics and settings of the embeddings that the model was fitted on.
    """

    method: str
    channels: int
    samples: str = field(repr=False)
    matrix: tuple[tuple[float, ...], ...] = field(repr=False)
    offset: tuple[float, ...] = field(repr=False)
    distance: float = field(repr=False)
    threshold: float
    left_out: int
    seed: int
    evaluation: Evaluation | None = field(repr=False)
    made_with: dict[str, Any] = field(repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.evaluation, dict):
            object.__setattr__(self, "evaluation", Evaluation.from_values(self.evaluation))
        try:
            vectors = self.vectors
        except (binascii.Error, ValueError) as error:
            raise OptionError(f"samples are damaged ({error}): {self._reload()}") from error
        rows = self._rows()
        if (
            not np.isfinite(vectors).all()
            or len(vectors) < 2
            or len(self.offset) != rows
            or any(len(row) != self.channels for row in self.matrix)
            or len(self.matrix) not in (0, rows)
            or any(len(each) != len(vectors) for each in self._targets())
        ):
            raise OptionError(
                f"{len(vectors)} samples of {self.channels} channels and {rows} rows of weights: expected matching "
                f"lengths; {self._reload()}"
            )

    def _reload(self) -> str:
        name = type(self).__name__
        return f"load the text that to_json() wrote, {name}.from_json(text)"

    def _rows(self) -> int:
        """Return the number of classes or columns."""
        raise NotImplementedError

    def _targets(self) -> Sequence[Sequence[float]]:
        """Return the targets of the samples, per column."""
        raise NotImplementedError

    @property
    def vectors(self) -> np.ndarray:
        """The training samples, (n, D) float32."""
        found = np.frombuffer(base64.b64decode(self.samples, validate=True), "<f4")
        return found.reshape(-1, self.channels).astype(np.float32)

    def space(self) -> FeatureSpace:
        """Return the feature space of the training samples, for the dissimilarity index."""
        return feature_space(self.vectors.astype(np.float64), self.distance)

    def fit(self, targets: np.ndarray) -> Fit:
        """Return the fit; `targets` (n, rows) are what neighbors vote for."""
        neighbors = not self.matrix
        values = self.vectors.astype(np.float64)
        none = values[:0]
        return Fit(
            np.array(self.matrix, float).reshape(-1, self.channels), np.array(self.offset),
            values if neighbors else none, targets if neighbors else targets[:0],
        )  # fmt: skip


@dataclass(frozen=True)
class Classifier(Learned):
    """A model of classes, fitted by :func:`classify`.

    Attributes
    ----------
    column : str
        Column of the labels.
    classes : tuple
        Names of the classes, sorted.
    codes : tuple of n int
        Class of each training sample, from 0.
    method, channels, samples, matrix, offset, distance, threshold, left_out, seed, evaluation, made_with
        As in :class:`Learned`.
    """

    RULES: ClassVar[Mapping[str, Rule]] = {
        **COMMON_RULES, "column": TEXT, "classes": list_of(NAME, minimum=2), "codes": list_of(whole(0)),
    }  # fmt: skip

    column: str
    classes: tuple[Any, ...]
    codes: tuple[int, ...] = field(repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not set(self.codes) <= set(range(len(self.classes))):
            raise OptionError(
                f"codes up to {max(self.codes)} of {len(self.classes)} classes; {self._reload()}"
            )

    def _rows(self) -> int:
        return len(self.classes)

    def _targets(self) -> Sequence[Sequence[float]]:
        return (self.codes,)


@dataclass(frozen=True)
class Regressor(Learned):
    """A model of values, fitted by :func:`regress`.

    Attributes
    ----------
    columns : tuple of str
        Columns of the labels.
    targets : tuple of tuples of n float
        Values of the training samples, per column.
    level : float or None
        Share of values that prediction intervals are to cover; None without cross-validation.
    half_widths : tuple of float
        Half of the width of the prediction intervals, per column; empty without cross-validation.
    method, channels, samples, matrix, offset, distance, threshold, left_out, seed, evaluation, made_with
        As in :class:`Learned`.
    """

    RULES: ClassVar[Mapping[str, Rule]] = {
        **COMMON_RULES, "columns": list_of(TEXT, minimum=1), "targets": list_of(_NUMBERS, minimum=1),
        "level": or_none(NUMBER), "half_widths": _NUMBERS,
    }  # fmt: skip

    columns: tuple[str, ...]
    targets: tuple[tuple[float, ...], ...] = field(repr=False)
    level: float | None
    half_widths: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.targets) != len(self.columns) or len(self.half_widths) not in (0, len(self.columns)):
            raise OptionError(f"{len(self.targets)} targets of {len(self.columns)} columns; {self._reload()}")

    def _rows(self) -> int:
        return len(self.columns)

    def _targets(self) -> Sequence[Sequence[float]]:
        return self.targets


def as_base64(values: np.ndarray) -> str:
    """Return samples (n, D) as the text that models hold."""
    return base64.b64encode(np.ascontiguousarray(values, "<f4").tobytes()).decode()


# ---------------------------------------------------------------------- applying


def check_learned(model: Any, kind: type[Learned], emb: Any, call: str) -> None:
    """Refuse a model of another kind, or fitted on embeddings that are not comparable.

    Raises
    ------
    OptionError, CubeError
    """
    if not isinstance(model, kind):
        raise OptionError(
            f"model={str(model)[:60]!r}: expected the {kind.__name__} from an earlier call, or "
            f"xr_anysat.{kind.__name__}.from_json(text)"
        )
    check_comparable(record_of(emb), model.made_with, call, "of the model")
    depth = table_vectors(emb)[0].shape[1] if is_table(emb) else emb.sizes["D"]
    if depth != model.channels:
        raise CubeError(
            f"{call}: the embeddings have {depth} channels and the model {model.channels}: expected the channels that "
            "it was fitted on; leave model= out to fit a new one"
        )


def over_all(emb: Any, function: Callable[..., np.ndarray], *, rows: int) -> Any:
    """Apply `function`, from a batch (D, m) to (rows, m), to all cells (rows, y, x) or rows (rows, n), as float32."""
    if not is_table(emb):
        return map_cells(function, emb, rows=rows, dtype=np.float32, missing=np.nan)
    values = table_vectors(emb)[0].T
    return in_batches(function, values, rows=rows, dtype=np.float32, missing=np.nan)


def applicability(model: Learned, emb: Any) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return the dissimilarity index, and where the model applies: data and attributes by name."""
    found = over_all(emb, partial(_dissimilarity, space=model.space()), rows=1)[0]
    reference = "Meyer and Pebesma (2021), https://doi.org/10.1111/2041-210X.13650"
    return {
        DISSIMILARITY: (
            found,
            {
                "long_name": "dissimilarity index",
                "units": "1",
                "threshold": model.threshold,
                "reference": reference,
            },
        ),
        APPLICABLE: (
            found <= np.float32(model.threshold),
            {"long_name": "within the area of applicability", "reference": reference},
        ),
    }


def _dissimilarity(batch: np.ndarray, *, space: FeatureSpace) -> np.ndarray:
    return space.nearest(batch)[None]


def joined_to(emb: Any, found: Mapping[str, tuple[Any, Mapping[str, Any]]], attrs: dict[str, Any]) -> Any:
    """Return results, data and attributes by name, as variables on the grid of a cube or as columns of a table."""
    if not is_table(emb):
        out = xr.Dataset({name: wrap_on_grid(emb, data, name, own) for name, (data, own) in found.items()})
        out.attrs = attrs
        return out
    table = as_geodataframe(emb, "the table", "it")
    check_new_columns(table, list(found), "table")
    out = table.assign(**{name: data for name, (data, _) in found.items()})
    out.attrs = {**table.attrs, **attrs}
    return out

"""`evaluate`: the scores of a fitted model on labels of another area or year."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from xr_anysat.analysis.cells import BATCH, one_thread
from xr_anysat.analysis.classification import evaluation_of_classes, probabilities_of
from xr_anysat.analysis.evaluation import Evaluation
from xr_anysat.analysis.learned import Classifier, Regressor, check_learned
from xr_anysat.analysis.regression import check_value_columns, evaluation_of_values
from xr_anysat.analysis.training import (
    CELLS_PER_POLYGON,
    Samples,
    check_input,
    labeled_samples,
    warn_of_left_out,
)
from xr_anysat.errors import OptionError

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

CALL = "evaluate()"

FOLD = "all"
"""Name of the only fold."""


def evaluate(
    emb: Any,
    labels: GeoDataFrame,
    model: Classifier | Regressor,
    *,
    time: str | None = None,
    cells_per_polygon: int = CELLS_PER_POLYGON,
    seed: int = 0,
) -> Evaluation:
    """Score a fitted model on other labels, such as those of another year.

    Nothing is fitted. The labels must not be those that the model was fitted on: ``model.evaluation`` has the scores
    of their cross-validation.

    Parameters
    ----------
    emb : DataArray, (D, y, x), or GeoDataFrame
        Embeddings of the other area or year, with the weights and settings of those that the model was fitted on.
    labels : GeoDataFrame
        Points, polygons or a table of embeddings, with the columns of the model; see :func:`classify`.
    model : Classifier or Regressor
        Result of :func:`classify` or :func:`regress`.
    time, cells_per_polygon, seed
        As in :func:`classify`.

    Returns
    -------
    Evaluation
        With one fold.

    Raises
    ------
    CubeTypeError, CubeError, OptionError, AnySatError
        As in :func:`classify`; also OptionError if labels have classes that the model does not know.

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
    >>> _, classifier = emb.anysat.classify(points, "cover", block_m=20)
    >>> others = geopandas.GeoDataFrame({"cover": ["d", "o"]}, geometry=at[[2, 5]], crs="EPSG:32632")
    >>> emb.anysat.evaluate(others, classifier).scores()["accuracy"]
    1.0
    """
    check_input(emb, "evaluate(labels, model)")
    check_learned(model, Regressor if isinstance(model, Regressor) else Classifier, emb, CALL)
    columns = list(model.columns) if isinstance(model, Regressor) else [model.column]
    if isinstance(model, Regressor):
        check_value_columns(labels, columns, CALL)
    samples = labeled_samples(
        emb, labels, columns, CALL, cells_per_polygon=cells_per_polygon, seed=seed, time=time
    )
    if not len(samples.values):
        raise OptionError(
            f"{CALL}: none of {len(labels)} labels can be used: expected labels with a value, on observed cells of the "
            "cube; emb.anysat.sample(points) gives the status of each"
        )
    warn_of_left_out(samples, len(labels))
    indices = _in_batches(model.space().nearest, samples)
    fold = np.zeros(len(samples.values), int)
    if isinstance(model, Regressor):
        predicted = _in_batches(model.fit(np.array(model.targets).T).scores, samples)
        return evaluation_of_values(
            columns, samples.targets.astype(float), predicted, fold, [FOLD], None, indices, model.threshold
        )
    unknown = sorted({str(name) for name in samples.targets[:, 0] if name not in model.classes})
    if unknown:
        raise OptionError(
            f"labels have the classes {', '.join(unknown[:5])}, which the model does not know: expected some of "
            f"{', '.join(map(str, model.classes))}; merge or drop the others"
        )
    codes = np.array([model.classes.index(name) for name in samples.targets[:, 0]])
    predicted = _in_batches(probabilities_of(model), samples)
    return evaluation_of_classes(
        columns[0], model.classes, codes, predicted, fold, [FOLD], indices, model.threshold
    )


def _in_batches(function: Any, samples: Samples) -> np.ndarray:
    with one_thread():
        parts = [
            function(samples.values[start : start + BATCH].T)
            for start in range(0, len(samples.values), BATCH)
        ]
    return np.concatenate(parts, axis=-1)

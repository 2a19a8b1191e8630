"""`compare`: several embeddings of the same labels, with the same folds and the same learner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from xr_anysat.analysis.classification import assess_classes, check_enough, classes_of
from xr_anysat.analysis.evaluation import Evaluation, Folds, block_folds, block_side, group_folds
from xr_anysat.analysis.learners import CLASSIFIERS, REGRESSORS
from xr_anysat.analysis.regression import assess_values, check_value_columns
from xr_anysat.analysis.sampling import MAX_SEED
from xr_anysat.analysis.training import GLOBAL_CRS, check_columns, check_groups
from xr_anysat.analysis.vector import POINTS, POLYGONS, as_geodataframe, in_crs_of, zone_means
from xr_anysat.analysis.zones import in_grid_units
from xr_anysat.errors import CubeTypeError, OptionError, warn
from xr_anysat.model.source import WeightsSource
from xr_anysat.shared.checks import import_optional
from xr_anysat.shared.grid import require_grid
from xr_anysat.shared.sensor import S2
from xr_anysat.shared.values import check_choice, check_whole_number

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

CALL = "compare()"

TASKS = {"classify": ("linear", "accuracy"), "regress": ("ridge", "rmse")}
"""Default method of each task, and the score whose differences are shown."""

LEVEL = 0.9
"""Share of values that the intervals in the evaluations of values are to cover."""


@dataclass(frozen=True)
class Comparison:
    """Evaluations of several embeddings on the same samples and folds.

    Print it for the scores; in Jupyter, it is a table.

    Attributes
    ----------
    evaluations : dict of str to Evaluation
        In the order in which the cubes were passed.
    score : str
        The score whose differences are shown: ``"accuracy"``, or ``"rmse"`` (less is better).
    random : tuple of str
        Names of the embeddings from random weights, whose scores carry no learned meaning.
    """

    evaluations: Mapping[str, Evaluation]
    score: str
    random: tuple[str, ...]

    def to_frame(self) -> pd.DataFrame:
        """Return the scores of each embedding, one row per name.

        Returns
        -------
        DataFrame
            The scores of :meth:`Evaluation.scores`; and for :attr:`score`, ``difference``: the mean over the folds of
            the difference to the first embedding, ``spread``: its standard deviation, and ``better``: the number of
            folds in which it is better than the first one.
        """
        rows = [evaluation.scores() for evaluation in self.evaluations.values()]
        table = pd.DataFrame(rows, pd.Index(list(self.evaluations), name="embedding"))
        paired = self.differences()
        sign = -1 if self.score == "rmse" else 1
        table["difference"], table["spread"] = paired.mean(), paired.std(ddof=0)
        table["better"] = (sign * paired > 0).sum()
        return table

    def differences(self) -> pd.DataFrame:
        """Return the difference of :attr:`score` to the first embedding: a row per fold, a column per name."""
        scores = pd.DataFrame({name: e.fold_scores()[self.score] for name, e in self.evaluations.items()})
        return scores.sub(scores.iloc[:, 0], axis=0)

    def __repr__(self) -> str:
        return f"{self._title()}\n{self.to_frame().to_string(float_format='{:.3f}'.format)}"

    def _repr_html_(self) -> str:
        table = self.to_frame().to_html(float_format="{:.3f}".format, escape=True)
        return f"<p>{escape(self._title())}</p>{table}"

    def _title(self) -> str:
        first = next(iter(self.evaluations.values()))
        text = (
            f"{', '.join(first.columns)}: {len(first.fold)} samples in {len(first.folds)} folds, the same for all. "
            f"difference and spread: {self.score} less that of the first, mean and deviation of the folds. Few folds "
            "are no test of significance."
        )
        if self.random:
            text += f" Random weights, so the scores carry no learned meaning: {', '.join(self.random)}."
        return text

    def plot(self) -> Any:
        """Draw the score of each fold, with a line per fold.

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        AnySatError
            If matplotlib is not installed.
        """
        pyplot = import_optional("matplotlib.pyplot", "plot()")
        figure, axes = pyplot.subplots(figsize=(1.5 + 1.5 * len(self.evaluations), 4), layout="constrained")
        names = [f"{name}\n(random weights)" if name in self.random else name for name in self.evaluations]
        scores = np.array([e.fold_scores()[self.score] for e in self.evaluations.values()])
        axes.plot(names, scores, color="gray", linewidth=1, marker="o", markersize=4)
        axes.plot(names, scores.mean(1), "_", color="black", markersize=30, markeredgewidth=2)
        axes.set(ylabel=self.score, title="Each line is a fold, bars are means")
        axes.margins(x=0.2)
        return figure


def compare(
    cubes: Mapping[str, xr.DataArray],
    labels: GeoDataFrame,
    column: str,
    *,
    task: str = "classify",
    method: str | None = None,
    groups: str | None = None,
    block_m: float | None = None,
    seed: int = 0,
) -> Comparison:
    """Compare embeddings on the same labels, with the same folds and the same learner.

    Parameters
    ----------
    cubes : dict of str to DataArray
        Two or more cubes with the dims y and x and at least one other, on any grid: embeddings (D, y, x), composed
        frames (time, band, y, x), or embeddings of other models. All values of a cell along the other dims are its
        features. The last of them, such as band, is observed as a whole or not. If only some frames of a cell were
        observed, the features of the others have their mean over the labels, and a warning says how many these are.
    labels : GeoDataFrame
        Points and polygons, in any CRS. A point has the features of its cell. A polygon has the mean of its cells,
        weighted by the share of each that it covers, so it is one sample in cubes of any cell size. A label that has
        no feature in one of the cubes is left out of all, and a warning says so.
    column : str
        Column of `labels` with classes or numbers.
    task : {"classify", "regress"}
        What to learn.
    method : str, optional
        As in :func:`classify` (default ``"linear"``) or :func:`regress` (default ``"ridge"``).
    groups, block_m, seed
        As in :func:`classify`. Squares are on an equal-area grid (EPSG:6933), in meters, and at least as large as the
        largest window of an embedding.

    Returns
    -------
    Comparison

    Raises
    ------
    CubeTypeError, CubeError
        If a cube has no dims y and x, no features, or no grid.
    OptionError
        If an argument is invalid, there are too few labels, or all of them are in one fold.
    AnySatError
        If scikit-learn or geopandas is not installed.

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
    >>> points = geopandas.GeoDataFrame({"high": (values[0] > 0).ravel()}, geometry=at, crs="EPSG:32632")
    >>> found = xr_anysat.compare({"all": emb, "without the first": emb[1:]}, points, "high", block_m=20)
    >>> found.to_frame()["accuracy"].round(1).tolist()
    [1.0, 0.5]
    """
    import_optional("sklearn", CALL)
    check_choice("task", task, tuple(TASKS))
    learners: Mapping[str, Any] = CLASSIFIERS if task == "classify" else REGRESSORS
    method = TASKS[task][0] if method is None else method
    check_choice("method", method, tuple(learners))
    seed = check_whole_number("seed", seed, 0, MAX_SEED)
    if not isinstance(cubes, Mapping) or len(cubes) < 2:
        raise OptionError(
            f"compare() of {len(cubes) if isinstance(cubes, Mapping) else type(cubes).__name__}: expected two or more "
            "cubes by name, xr_anysat.compare({'anysat': emb, 'frames': frames}, labels, 'crop')"
        )
    frame = as_geodataframe(labels, "labels", CALL)
    check_columns(frame, [column], "column")
    if task == "regress":
        check_value_columns(frame, [column], CALL)
    named = {str(name): cube for name, cube in cubes.items()}
    values = {name: _features(cube, frame, name) for name, cube in named.items()}
    used = _common_rows(frame, column, values)
    x, y = _centers(frame)
    # rounding and ties in fits and folds depend on the order
    text = frame[column].astype(str).to_numpy()
    order = used[np.lexsort((text[used], x[used], y[used]))]
    folds = _folds(frame, order, x[order], y[order], named, groups, block_m)
    targets = frame[column].to_numpy()[order]
    common: dict[str, Any] = {"method": method, "row": order, "folds": folds, "seed": seed}
    found: dict[str, Evaluation] = {}
    for name, each in values.items():
        samples = _filled(each[order], name)
        if task == "classify":
            names, codes = classes_of(targets, column)
            check_enough(names, codes, column, len(frame) - len(order))
            evaluation = assess_classes(samples, codes, names, column, **common)[2]
        else:
            numbers = targets.astype(float)[:, None]
            evaluation = assess_values(samples, numbers, [column], weight=None, level=LEVEL, **common)[2]
        assert evaluation is not None  # there are folds
        found[name] = evaluation
    random = tuple(name for name, cube in named.items() if _is_random(cube))
    return Comparison(found, TASKS[task][1], random)


def _is_random(cube: xr.DataArray) -> bool:
    return WeightsSource.parse(str(cube.attrs.get("weights"))).kind == "random"


def _features(cube: Any, frame: GeoDataFrame, name: str) -> np.ndarray:
    """Return the features of each label, (n, D) float32, NaN where a cube has none."""
    if not isinstance(cube, xr.DataArray) or not {"y", "x"} < set(cube.dims):
        raise CubeTypeError(
            f"cubes[{name!r}] is a {type(cube).__name__} with dims {tuple(getattr(cube, 'dims', ()))}: expected a "
            "DataArray with y, x and at least one other dim"
        )
    others = [dim for dim in cube.dims if dim not in ("y", "x")]
    cube = cube.transpose(*others, "y", "x")
    geobox = require_grid(cube.isel(dict.fromkeys(others, 0), drop=True), f"{CALL} of cubes[{name!r}]")
    coords = {k: c for k, c in cube.coords.items() if not set(c.dims) & set(others)}
    places = in_grid_units(geobox, in_crs_of(geobox, frame.geometry, (*POINTS, *POLYGONS), "labels"))
    images = cube.data.reshape(-1, *cube.shape[-3:])
    parts = [zone_means(xr.DataArray(each, coords, ("D", "y", "x")), places)[0] for each in images]
    return np.concatenate(parts, axis=1)


def _common_rows(frame: GeoDataFrame, column: str, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the numbers of the labels with a value and with features in all cubes."""
    known = frame[column].notna().to_numpy()
    finite = {name: np.isfinite(each).any(1) for name, each in values.items()}
    used = np.logical_and.reduce([known, *finite.values()])
    if not used.all():
        lacking = ", ".join(f"{int((~each).sum())} in {name!r}" for name, each in finite.items())
        warn(
            f"{int((~used).sum())} of {len(frame)} labels are left out of all cubes: {int((~known).sum())} have no "
            f"value, and without any feature are {lacking}"
        )
    return np.flatnonzero(used)


def _filled(features: np.ndarray, name: str) -> np.ndarray:
    """Return features (n, D) as float64, in which missing ones have the mean of their feature."""
    known = np.isfinite(features)
    values = np.where(known, features, 0).astype(np.float64)
    means = values.sum(0) / np.maximum(known.sum(0), 1)
    if not known.all():
        warn(
            f"{1 - known.mean():.1%} of the features in cubes[{name!r}] were not observed, and have the mean of their "
            "feature: frames of longer bins, cube.anysat.frames(4), have fewer gaps"
        )
    return np.where(known, values, means)


def _centers(frame: GeoDataFrame) -> tuple[np.ndarray, np.ndarray]:
    import shapely

    places = frame.geometry if frame.crs is None else frame.geometry.to_crs(GLOBAL_CRS)
    centers = shapely.centroid(np.asarray(places.values))
    return shapely.get_x(centers), shapely.get_y(centers)


def _folds(
    frame: GeoDataFrame,
    rows: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    cubes: Mapping[str, xr.DataArray],
    groups: str | None,
    block_m: float | None,
) -> Folds:
    if groups is not None:
        folds = group_folds(check_groups(frame, groups, block_m, rows))
        remedy = f"labels of several groups of {groups!r}"
    else:
        windows = [int(cube.attrs.get("tile", 1)) for cube in cubes.values()]
        folds = block_folds(x, y, block_side(x, y, max(windows) * S2.pixel_size, block_m))
        remedy = "a smaller block_m=, or labels that are farther apart"
    if not folds:
        raise OptionError(f"{len(rows)} labels that can be used are all in one fold: expected {remedy}")
    return folds

"""A linear probe on embeddings and on the frames that they were computed from: what embeddings add.

Both get the same cells, classes and folds. Folds are separate areas on the ground (:func:`xr_anysat.classify` explains
why). Run it with ``python -m xr_anysat bench probe``. With random weights it only shows that the pipeline works.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from xr_anysat.analysis.cells import observed
from xr_anysat.analysis.classification import MIN_SAMPLES_PER_CLASS
from xr_anysat.analysis.evaluation import BLOCKS_ACROSS, Folds, block_folds, cross_validate
from xr_anysat.analysis.learners import CLASSIFIERS, probabilities
from xr_anysat.analysis.sampling import MAX_SEED
from xr_anysat.analysis.vector import POINTS, POLYGONS, as_geodataframe, cells_at, in_crs_of, vectors
from xr_anysat.config import MODEL
from xr_anysat.demo.run import read_landcover
from xr_anysat.embedding.options import EmbedOptions, checked_encoder
from xr_anysat.errors import CubeError, OptionError
from xr_anysat.model.source import WeightsSource
from xr_anysat.model.weights import resolve_device
from xr_anysat.shared.checks import import_optional, require_packages
from xr_anysat.shared.grid import require_grid
from xr_anysat.shared.sensor import S2
from xr_anysat.shared.values import check_whole_number

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

NORM = "pastis"
"""Fixed constants: the result does not depend on the extent of the area."""

YEAR = 2022
"""Year of the synthetic scene."""

DEMO = "'xr_anysat[demo]'"

RANDOM = "random weights: this shows that the pipeline works, but nothing that AnySat has learned"


@dataclass(frozen=True)
class Row:
    """Scores of a linear probe on one set of features.

    Attributes
    ----------
    features : str
        Name of the features.
    channels : int
        Number of features per cell.
    accuracy : float
        Share of cells whose class was predicted correctly from cells of other blocks.
    spread : float
        Standard deviation of the folds' accuracies.
    f1_macro : float
        Mean of the classes' F1 scores.
    """

    features: str
    channels: int
    accuracy: float
    spread: float
    f1_macro: float


@dataclass(frozen=True)
class Report:
    """Result of a probe.

    Attributes
    ----------
    rows : tuple of Row
    settings : dict
        Data, model, weights, and numbers of cells, classes and folds.
    """

    rows: tuple[Row, ...]
    settings: dict[str, Any]

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        s = self.settings
        lines = [
            f"{s['cells']} cells of {s['classes']} classes, {s['folds']} folds of squares of {s['block_m']:g} m",
            f"{'features':34}{'channels':>8}{'accuracy':>18}{'macro F1':>10}",
        ]
        for row in self.rows:
            accuracy = f"{row.accuracy:.1%} ± {row.spread:.1%}"
            lines.append(f"{row.features:34}{row.channels:8}{accuracy:>18}{row.f1_macro:10.3f}")
        if not s["learned"]:
            lines.append(RANDOM)
        return "\n".join(lines)


def run(
    cube: str | None = None,
    labels: str | None = None,
    column: str | None = None,
    *,
    model: str = MODEL,
    weights: str | None = None,
    patch_size: int = 20,
    tile: int = 24,
    frames: int = 8,
    cells: int = 200,
    size: int = 240,
    seed: int = 0,
) -> Report:
    """Compare a linear probe on embeddings with one on plain frames.

    Parameters
    ----------
    cube : str, optional
        A Zarr store of a Sentinel-2 cube; its frames must fit into memory. Default: a synthetic scene with known land
        cover.
    labels, column : str, optional
        Labels of `cube`: a file of points or polygons, and its column of classes.
    model, weights, patch_size, tile, frames
        As in :func:`xr_anysat.embed`.
    cells : int
        Maximum number of cells per class.
    size : int
        Side of the synthetic scene in pixels.
    seed : int
        Seed of the scene and of the choice of cells.

    Returns
    -------
    Report

    Raises
    ------
    OptionError, CubeError
        If the data cannot be read, do not match, or have too few labeled cells.
    """
    if (cube is None) != (labels is None) or (labels is None) != (column is None):
        raise OptionError(
            "cube, labels and column go together: expected all three, or none for the synthetic scene"
        )
    if cube is None:
        require_packages("the probe of a synthetic scene", "sklearn", "rasterio", "rioxarray", install=DEMO)
    else:
        require_packages("the probe", "sklearn", "geopandas")
    how: dict[str, Any] = {
        "norm": NORM, "patch_size": patch_size, "tile": tile, "model": model, "weights": weights,
    }  # fmt: skip
    resolve_device(checked_encoder(EmbedOptions(frames=frames, **how)).device)
    cells = check_whole_number("cells", cells, MIN_SAMPLES_PER_CLASS, of="cells per class")
    seed = check_whole_number("seed", seed, 0, MAX_SEED)
    with tempfile.TemporaryDirectory() as folder:
        data, truth = _make_data(Path(folder), size, seed) if cube is None else _read_data(cube, labels)
        composed = data.anysat.frames(frames).persist()
        emb = composed.anysat.embed(frames=None, **how)
        known = (
            _majority(emb, truth) if isinstance(truth, xr.DataArray) else _cells_of(emb, truth, str(column))
        )
        rows, settings = compare(emb, composed, _choose_per_class(known, cells, seed))
    source = emb.attrs["weights"]
    return Report(
        rows,
        {
            "data": "synthetic scene of xr_anysat.demo" if cube is None else f"{cube}, {labels}, {column}",
            "model": emb.attrs["model"],
            "weights": source,
            "learned": WeightsSource.parse(source).kind != "random",
            "patch_size_m": patch_size,
            "tile": tile,
            "frames": int(composed.sizes["time"]),
            "seed": seed,
            **settings,
        },
    )


def compare(
    emb: xr.DataArray, frames: xr.DataArray, labeled: pd.DataFrame
) -> tuple[tuple[Row, ...], dict[str, Any]]:
    """Probe embeddings and frames at labeled cells.

    Parameters
    ----------
    emb : DataArray, (D, y, x)
    frames : DataArray, (time, band, y, x)
        The frames that `emb` was computed from.
    labeled : DataFrame
        ``row``, ``col`` and ``label`` of cells.

    Returns
    -------
    rows : tuple of Row
    settings : dict
        Numbers of cells, classes and folds, and the side of the blocks in meters.
    """
    values = vectors(emb, labeled["row"].values, labeled["col"].values)
    there = observed(values.T)
    values, labeled = values[there], labeled[there]
    names, codes, counts = np.unique(labeled["label"].values, return_inverse=True, return_counts=True)
    small = [f"{name} ({n})" for name, n in zip(names, counts, strict=True) if n < MIN_SAMPLES_PER_CLASS]
    if len(names) < 2 or small:
        which = f", too few of {', '.join(small)}" if small else ""
        raise CubeError(
            f"{len(labeled)} observed cells of {len(names)} classes{which}: expected at least two classes, and "
            f"{MIN_SAMPLES_PER_CLASS} cells of each. Take a larger area or smaller cells (patch_size), or leave such "
            "classes out; are the labels inside the cube?"
        )
    x, y = emb["x"].values[labeled["col"]], emb["y"].values[labeled["row"]]
    side = float(max(np.ptp(x) / BLOCKS_ACROSS, np.ptp(y) / BLOCKS_ACROSS, emb.attrs["tile"] * S2.pixel_size))
    folds = block_folds(x, y, side)
    if not folds:
        raise CubeError(f"all cells are in one square of {side:g} m: take a larger area")
    mean, deviation = _moments(frames, x, y, float(emb.attrs["patch_size_m"]))
    rows = []
    for name, features in (
        ("embedding", values.astype(np.float64)),
        ("frames, mean of the cell", mean),
        ("frames, mean and deviation", np.concatenate([mean, deviation], 1)),
    ):
        rows.append(_score(name, features, codes, folds))
    return tuple(rows), {
        "cells": len(codes), "classes": len(names), "folds": len(folds), "block_m": side,
    }  # fmt: skip


def _score(name: str, features: np.ndarray, codes: np.ndarray, folds: Folds) -> Row:
    """Return the scores of a linear classifier of features (n, channels)."""
    from sklearn.metrics import f1_score

    indicators = np.eye(codes.max() + 1)[codes]

    def fit(numbers: np.ndarray) -> Any:
        found = CLASSIFIERS["linear"](features[numbers], indicators[numbers], None)
        return partial(probabilities, found)

    predicted = cross_validate(fit, features, indicators.shape[1], folds).argmax(0)
    accuracies = [(predicted[test] == codes[test]).mean() for _, _, test in folds]
    f1 = f1_score(codes, predicted, average="macro", zero_division=0)
    return Row(
        name, features.shape[1], float((predicted == codes).mean()), float(np.std(accuracies)), float(f1)
    )


def _moments(
    frames: xr.DataArray, x: np.ndarray, y: np.ndarray, cell: float
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (n, T × 10) of the pixels per cell; gaps have the mean of all cells."""
    side = round(cell / S2.pixel_size)
    shift = (np.arange(side) - (side - 1) / 2) * S2.pixel_size
    place = []
    for dim, center, sign in (("y", y, -1.0), ("x", x, 1.0)):
        first = float(frames[dim].values[0])
        place.append(np.rint((center[:, None] + shift - first) * sign / S2.pixel_size).astype(int))
    rows, cols = (
        np.broadcast_to(p, (len(x), side, side)) for p in (place[0][:, :, None], place[1][:, None, :])
    )
    inside = (rows >= 0) & (rows < frames.sizes["y"]) & (cols >= 0) & (cols < frames.sizes["x"])
    at = [xr.Variable("pixel", np.where(inside, p, 0).ravel()) for p in (rows, cols)]
    picked = frames.variable.isel(y=at[0], x=at[1]).transpose("pixel", "time", "band").values
    picked = np.where(inside.ravel()[:, None, None], picked, np.nan).reshape(len(x), side * side, -1)
    known = np.isfinite(picked)
    count = known.sum(1)
    with np.errstate(invalid="ignore"):
        mean = np.where(known, picked, 0).sum(1, dtype=float) / count
        spread = np.where(known, np.square(picked - mean[:, None]), 0).sum(1, dtype=float)
        deviation = np.sqrt(spread / count)
    return _fill_gaps(mean), _fill_gaps(deviation)


def _fill_gaps(features: np.ndarray) -> np.ndarray:
    """Replace NaN by the mean of its column, or by 0 in a column that has nothing else."""
    known = np.isfinite(features)
    mean = np.where(known, features, 0).sum(0) / np.maximum(known.sum(0), 1)
    filled: np.ndarray = np.where(known, features, mean)
    return filled


# ---------------------------------------------------------------------- data


def _make_data(folder: Path, size: int, seed: int) -> tuple[xr.DataArray, xr.DataArray]:
    """Make a scene and its true land cover."""
    from xr_anysat.demo.scene import make_scene, open_scene

    scene = make_scene(folder / "scene", size=(size, size), year=YEAR, seed=seed)
    return open_scene(scene.folder).load(), read_landcover(scene.landcover)


def _read_data(cube: str, labels: str | None) -> tuple[xr.DataArray | xr.Dataset, GeoDataFrame]:
    """Read the cube of a store and a table of labels."""
    geopandas = import_optional("geopandas", "the probe")
    try:
        stored = xr.open_zarr(cube, decode_coords="all")
        truth = geopandas.read_file(labels)
    except Exception as error:  # of any library that reads files
        raise OptionError(f"cube={cube!r} or labels={labels!r} cannot be read: {error}") from error
    arrays = [v for v in stored.data_vars.values() if v.ndim == 4]
    return (arrays[0] if len(arrays) == 1 else stored), truth


def _majority(emb: xr.DataArray, truth: xr.DataArray) -> pd.DataFrame:
    """Most frequent class in each cell, from pixels (y, x) of 10 m; 0 is unknown."""
    a = require_grid(emb, "the probe").affine
    rows = np.floor((truth["y"].values - a.f) / a.e).astype(int)
    cols = np.floor((truth["x"].values - a.c) / a.a).astype(int)
    row, col = (p.ravel() for p in np.meshgrid(rows, cols, indexing="ij"))
    pixels = pd.DataFrame({"row": row, "col": col, "label": truth.values.ravel()})
    counts = pixels[pixels["label"] != 0].value_counts().rename("count").reset_index()
    counts = counts.sort_values(["row", "col", "count", "label"], ascending=[True, True, False, True])
    return counts.drop_duplicates(["row", "col"])[["row", "col", "label"]]


def _cells_of(emb: xr.DataArray, truth: GeoDataFrame, column: str) -> pd.DataFrame:
    """Cells that contain labeled points, or whose centers are inside labeled polygons."""
    frame = as_geodataframe(truth, "labels", "the probe")
    if column not in frame.columns:
        raise OptionError(f"{column=}: expected one of {[c for c in frame.columns if c != 'geometry']}")
    frame = frame[frame[column].notna()]
    if set(frame.geom_type) <= set(POINTS):
        rows, cols, inside = cells_at(emb, frame.geometry, "the probe")
        found = pd.DataFrame({"row": rows, "col": cols, "label": frame[column].values})[inside]
    else:
        import shapely

        shapes = in_crs_of(require_grid(emb, "the probe"), frame.geometry, POLYGONS, "labels")
        x, y = np.meshgrid(emb["x"].values, emb["y"].values)
        shape, cell = shapely.STRtree(shapely.points(x.ravel(), y.ravel())).query(shapes.values, "intersects")
        rows, cols = np.unravel_index(cell, x.shape)
        found = pd.DataFrame({"row": rows, "col": cols, "label": frame[column].values[shape]})
    return found.drop_duplicates(["row", "col"])


def _choose_per_class(labeled: pd.DataFrame, max_cells: int, seed: int) -> pd.DataFrame:
    """Choose at most `max_cells` cells of each class at random, ordered by row and column."""
    shuffled = labeled.sort_values(["row", "col"]).sample(frac=1, random_state=seed)
    return shuffled.groupby("label").head(max_cells).sort_values(["row", "col"])

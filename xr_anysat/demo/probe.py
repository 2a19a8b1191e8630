"""A linear probe on embeddings, and on the frames they were made of: what the pipeline is worth.

Both get the same cells, the same classes and the same folds, which are apart on the ground
(:func:`xr_anysat.classify` tells why). Run it by ``python -m xr_anysat bench probe``. With random weights it shows
that the machinery works, and nothing learned.
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
from xr_anysat.analysis.classification import (
    BLOCKS_ACROSS,
    MIN_POINTS_PER_CLASS,
    blocks_of,
    cross_validate,
    fit_classifier,
)
from xr_anysat.analysis.vector import POINTS, POLYGONS, as_geodataframe, cells_at, in_crs_of, vectors
from xr_anysat.cube.reading import PIXEL
from xr_anysat.errors import CubeError, OptionError
from xr_anysat.model.source import WeightsSource
from xr_anysat.shared.checks import import_optional
from xr_anysat.shared.grid import require_grid

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

NORM = "pastis"
"""Fixed constants, so that the area's extent changes nothing."""

YEAR = 2022
"""Of the made-up scene."""

RANDOM = "random weights: nothing learned is shown, only that the machinery works"


@dataclass(frozen=True)
class Row:
    """How well a linear probe does on some features.

    Attributes
    ----------
    features : str
        What they are.
    channels : int
        How many.
    accuracy : float
        Share of cells that were predicted right from cells of other blocks.
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
    """What a probe found.

    Attributes
    ----------
    rows : tuple of Row
    settings : dict
        Data, model, weights, cells, classes and blocks.
    """

    rows: tuple[Row, ...]
    settings: dict[str, Any]

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        s = self.settings
        lines = [
            f"{s['cells']} cells of {s['classes']} classes, {s['folds']} folds of whole squares of {s['block_m']:g} m",
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
    model: str = "base",
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
        A Zarr store of a Sentinel-2 cube, whose frames fit into memory. Default: a made-up scene, whose land cover is
        known.
    labels, column : str, optional
        Of one's own cube: a file of points or polygons, and its column of classes.
    model, weights, patch_size, tile, frames
        As in :func:`xr_anysat.embed`.
    cells : int
        Of each class, at most.
    size : int
        Side of the made-up scene in pixels.
    seed : int
        Of the scene, and of which cells are taken.

    Returns
    -------
    Report

    Raises
    ------
    OptionError, CubeError
        If the data do not go together, or hold too little.
    """
    if (cube is None) != (labels is None) or (labels is None) != (column is None):
        raise OptionError(
            "cube, labels and column go together: expected all three, or none for the made-up scene"
        )
    import_optional("sklearn", "the probe")
    with tempfile.TemporaryDirectory() as folder:
        data, truth = _made_up(Path(folder), size, seed) if cube is None else _own(cube, labels)
        composed = data.anysat.frames(frames).persist()
        emb = composed.anysat.embed(
            frames=None, norm=NORM, patch_size=patch_size, tile=tile, model=model, weights=weights
        )
        known = (
            _majority(emb, truth) if isinstance(truth, xr.DataArray) else _cells_of(emb, truth, str(column))
        )
        rows, settings = compare(emb, composed, _some(known, cells, seed))
    source = emb.attrs["weights"]
    return Report(
        rows,
        {
            "data": "made up by xr_anysat.demo.scene" if cube is None else f"{cube}, {labels}, {column}",
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
    emb: xr.DataArray, frames: xr.DataArray, labelled: pd.DataFrame
) -> tuple[tuple[Row, ...], dict[str, Any]]:
    """Probe embeddings and frames at labelled cells.

    Parameters
    ----------
    emb : DataArray, (D, y, x)
    frames : DataArray, (time, band, y, x)
        What it was made of.
    labelled : DataFrame
        ``row`` and ``col`` of cells, and their ``label``.

    Returns
    -------
    rows : tuple of Row
    settings : dict
        How many cells, classes and folds, and the side of the blocks.
    """
    values = vectors(emb, labelled["row"].values, labelled["col"].values)
    there = observed(values.T)
    values, labelled = values[there], labelled[there]
    names, codes = np.unique(labelled["label"].values, return_inverse=True)
    if len(names) < 2 or np.bincount(codes).min() < MIN_POINTS_PER_CLASS:
        raise CubeError(
            f"{len(labelled)} observed cells of {len(names)} classes: expected two classes at least, and "
            f"{MIN_POINTS_PER_CLASS} cells of each; are the labels where the cube is?"
        )
    x, y = emb["x"].values[labelled["col"]], emb["y"].values[labelled["row"]]
    side = float(max(np.ptp(x) / BLOCKS_ACROSS, np.ptp(y) / BLOCKS_ACROSS, emb.attrs["tile"] * PIXEL))
    blocks = blocks_of(x, y, side)
    if len(np.unique(blocks)) < 2:
        raise CubeError(f"all cells lie in one square of {side:g} m: take a larger area")
    mean, deviation = _moments(frames, x, y, float(emb.attrs["patch_size_m"]))
    rows, folds = [], 0
    for name, features in (
        ("embedding", values.astype(np.float64)),
        ("frames, mean of the cell", mean),
        ("frames, mean and deviation", np.concatenate([mean, deviation], 1)),
    ):
        score = cross_validate(partial(fit_classifier, method="linear"), features, codes, blocks)
        assert score is not None  # there are two blocks
        folds, spread = len(score.folds), float(np.std(score.folds))
        rows.append(Row(name, features.shape[1], score.accuracy, spread, score.f1_macro))
    return tuple(rows), {
        "cells": len(codes), "classes": len(names), "folds": folds, "block_m": side,
    }  # fmt: skip


def _moments(
    frames: xr.DataArray, x: np.ndarray, y: np.ndarray, cell: float
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (n, T × 10) of the pixels in each cell; what no pixel shows is the mean of all."""
    side = round(cell / PIXEL)
    shift = (np.arange(side) - (side - 1) / 2) * PIXEL
    place = []
    for dim, centre, sign in (("y", y, -1.0), ("x", x, 1.0)):
        first = float(frames[dim].values[0])
        place.append(np.rint((centre[:, None] + shift - first) * sign / PIXEL).astype(int))
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
    return _filled(mean), _filled(deviation)


def _filled(features: np.ndarray) -> np.ndarray:
    """Features without NaN: a column's mean stands in, and 0 in a column of nothing else."""
    known = np.isfinite(features)
    mean = np.where(known, features, 0).sum(0) / np.maximum(known.sum(0), 1)
    filled: np.ndarray = np.where(known, features, mean)
    return filled


# ---------------------------------------------------------------------- data


def _made_up(folder: Path, size: int, seed: int) -> tuple[xr.DataArray, xr.DataArray]:
    """A scene, and its true land cover."""
    import_optional("rioxarray", "the made-up scene")
    from xr_anysat.demo.run import read_landcover
    from xr_anysat.demo.scene import make_scene, open_scene

    scene = make_scene(folder / "scene", size=(size, size), year=YEAR, seed=seed)
    return open_scene(scene.folder).load(), read_landcover(scene.landcover)


def _own(cube: str, labels: str | None) -> tuple[xr.DataArray | xr.Dataset, GeoDataFrame]:
    """A cube of a store, and a table of labels."""
    geopandas = import_optional("geopandas", "the probe")
    try:
        stored = xr.open_zarr(cube, decode_coords="all")
        truth = geopandas.read_file(labels)
    except Exception as error:  # of whichever library speaks to the file system
        raise OptionError(f"cube={cube!r} or labels={labels!r} cannot be read: {error}") from error
    arrays = [v for v in stored.data_vars.values() if v.ndim == 4]
    return (arrays[0] if len(arrays) == 1 else stored), truth


def _majority(emb: xr.DataArray, truth: xr.DataArray) -> pd.DataFrame:
    """The class that most pixels of each cell have, of pixels (y, x) of 10 m; 0 is unknown."""
    a = require_grid(emb, "the probe").affine
    rows = np.floor((truth["y"].values - a.f) / a.e).astype(int)
    cols = np.floor((truth["x"].values - a.c) / a.a).astype(int)
    row, col = (p.ravel() for p in np.meshgrid(rows, cols, indexing="ij"))
    pixels = pd.DataFrame({"row": row, "col": col, "label": truth.values.ravel()})
    counts = pixels[pixels["label"] != 0].value_counts().rename("count").reset_index()
    counts = counts.sort_values(["row", "col", "count", "label"], ascending=[True, True, False, True])
    return counts.drop_duplicates(["row", "col"])[["row", "col", "label"]]


def _cells_of(emb: xr.DataArray, truth: GeoDataFrame, column: str) -> pd.DataFrame:
    """The cells that labelled points lie in, or whose centres lie in labelled polygons."""
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


def _some(labelled: pd.DataFrame, most: int, seed: int) -> pd.DataFrame:
    """At most so many cells of each class, in the order of their places."""
    shuffled = labelled.sort_values(["row", "col"]).sample(frac=1, random_state=seed)
    return shuffled.groupby("label").head(most).sort_values(["row", "col"])

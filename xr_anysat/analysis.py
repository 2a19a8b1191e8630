"""What all cells of an embedding cube tell: `reduce` and `rgb`, `similarity` and `change`, `cluster`.

A fit looks at a sample of cells, by scikit-learn, and gives a small model that can be stored and used on other cubes.
What is then said of each cell is lazy where the cube is.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from xr_anysat.cells import (
    CELLS,
    SEED_MOST,
    check_made_alike,
    check_same_grid,
    draw,
    extra,
    made_with,
    one_thread,
    over_cells,
    product,
    result,
    whole_number,
)
from xr_anysat.cube import check_embedding
from xr_anysat.errors import CubeError, OptionError
from xr_anysat.places import mean_at
from xr_anysat.stored import Stored

PERCENTILES = (2.0, 98.0)
"""Of a component's scores in the sample: what becomes the least and the most of a colour."""

MISSING = -1
"""Label of cells where nothing was observed."""

CHANNELS = ("red", "green", "blue", "alpha")


@dataclass(frozen=True)
class _Fitted(Stored):
    """A model of numbers alone: it compares."""

    def __post_init__(self) -> None:
        for each in fields(self):
            object.__setattr__(self, each.name, _plain(getattr(self, each.name)))


def _plain(value: Any) -> Any:
    """Arrays and lists as tuples of Python's own numbers."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class Reducer(_Fitted):
    """Principal components of embeddings, as :func:`reduce` and :func:`rgb` fit them.

    Attributes
    ----------
    mean : tuple of D float
        Of the sample; what is subtracted.
    components : tuple of k tuples of D float
        Unit vectors, that of the largest variance first. The largest weight of each is positive.
    explained : tuple of k float
        Share of the sample's variance.
    low, high : tuple of k float
        The 2nd and the 98th percentile of each component in the sample: colours are stretched between them.
    cells : int
        How many cells the sample had.
    seed : int
        Of the sample.
    made_with : dict
        Weights, statistics and settings of the embeddings it was fitted on.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> import xr_anysat
    >>> emb = xr.DataArray(np.random.default_rng(0).normal(size=(8, 4, 5)), dims=("D", "y", "x"))
    >>> _, reducer = xr_anysat.reduce(emb, 2)
    >>> xr_anysat.Reducer.from_json(reducer.to_json()) == reducer
    True
    """

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
                f"{k} components of {depth} channels: wanted vectors and numbers of these lengths"
            )


@dataclass(frozen=True)
class Clusters(_Fitted):
    """Centres of clusters of embeddings, as :func:`cluster` fits them.

    Attributes
    ----------
    centers : tuple of k tuples of D float
        That of the most cells of the sample first.
    shares : tuple of k float
        Of the sample's cells.
    cells : int
        How many cells the sample had.
    seed : int
        Of the sample and the fit.
    made_with : dict
        Weights, statistics and settings of the embeddings it was fitted on.
    """

    centers: tuple[tuple[float, ...], ...] = field(repr=False)
    shares: tuple[float, ...]
    cells: int
    seed: int
    made_with: dict[str, Any] = field(repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len({len(c) for c in self.centers}) != 1 or len(self.shares) != len(self.centers):
            raise OptionError(
                f"{len(self.centers)} centers and {len(self.shares)} shares: wanted as many of each"
            )


# ---------------------------------------------------------------------- fewer channels


def reduce(
    emb: xr.DataArray,
    k: int | None = None,
    *,
    model: Reducer | None = None,
    cells: int = CELLS,
    seed: int = 0,
) -> tuple[xr.DataArray, Reducer]:
    """Reduce an embedding cube to its first `k` principal components.

    They are fitted on a sample of the cells that were observed. This computes a lazy cube, the model included, block by
    block; store it first (:func:`xr_anysat.to_zarr`, :func:`xr_anysat.open`) if it is to be used more than once. With a
    `model` nothing is fitted or computed.

    Parameters
    ----------
    emb : DataArray, (D, y, x)
        What :func:`xr_anysat.embed` made.
    k : int, optional
        How many components. Default: all of `model`.
    model : Reducer, optional
        What an earlier call gave, on embeddings that were made alike: components then mean the same.
    cells : int
        How many cells to fit on, at most.
    seed : int
        Which ones: told by it and by their place in the cube, so that chunks make no difference.

    Returns
    -------
    reduced : DataArray, (component, y, x) float32
        Lazy if `emb` is; NaN where nothing was observed.
    model : Reducer
        To store (`to_json`) and to use on another year or area.

    Raises
    ------
    CubeTypeError
        If `emb` is not an embedding cube.
    CubeError
        If fewer than `k` cells were observed, or `model` was fitted on embeddings made otherwise.
    OptionError
        If `k`, `cells`, `seed` or `model` is impossible.
    AnySatError
        If scikit-learn is not installed.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> import xr_anysat
    >>> emb = xr.DataArray(np.random.default_rng(0).normal(size=(8, 4, 5)), dims=("D", "y", "x"))
    >>> reduced, model = emb.anysat.reduce(2)
    >>> reduced.dims, reduced.shape, reduced.dtype
    (('component', 'y', 'x'), (2, 4, 5), dtype('float32'))
    >>> again, _ = emb.anysat.reduce(model=model)
    >>> again.equals(reduced)
    True
    """
    check_embedding(emb, "reduce(3)")
    if model is None:
        if k is None:
            raise OptionError("neither k= nor model=: wanted how many components, emb.anysat.reduce(3)")
        model = _fit_reducer(emb, k, cells, seed, "reduce()")
    else:
        _check_model(model, Reducer, emb, len(getattr(model, "mean", ())), "reduce()")
    k = whole_number("k", k or len(model.components), 1, len(model.components))
    scores = over_cells(partial(_scores, model=model, k=k), emb, rows=k, dtype=np.float32, missing=np.nan)
    attrs = {"long_name": "principal components of the embedding", **_told(model, k)}
    return result(emb, scores, "reduced", attrs, dim="component", labels=np.arange(k)), model


def rgb(
    emb: xr.DataArray, *, model: Reducer | None = None, cells: int = CELLS, seed: int = 0
) -> tuple[xr.DataArray, Reducer]:
    """Colour an embedding cube by its first three principal components.

    Each component is stretched from the 2nd to the 98th percentile of the sample it was fitted on. They are kept in the
    model, so with it colours mean the same on another year or area.

    Parameters
    ----------
    emb, model, cells, seed
        As in :func:`reduce`, which says what a lazy cube costs. `model` has three components or more.

    Returns
    -------
    image : DataArray, (band: red, green, blue, alpha; y, x) uint8
        Lazy if `emb` is. `alpha` is 255, or 0 where nothing was observed: so ``image.plot.imshow()`` shows
        nothing there, and so does QGIS in what ``image.rio.to_raster("image.tif")`` writes.
    model : Reducer
        To store (`to_json`) and to use on another year or area.

    Raises
    ------
    CubeTypeError, CubeError, OptionError, AnySatError
        As :func:`reduce`.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> import xr_anysat
    >>> emb = xr.DataArray(np.random.default_rng(0).normal(size=(8, 4, 5)), dims=("D", "y", "x"))
    >>> emb[:, 0, 0] = np.nan
    >>> image, model = emb.anysat.rgb()
    >>> image.dims, image.dtype, image[:, 0, 0].values, image[3, 0, 1].item()
    (('band', 'y', 'x'), dtype('uint8'), array([0, 0, 0, 0], dtype=uint8), 255)
    """
    check_embedding(emb, "rgb()")
    if model is None:
        model = _fit_reducer(emb, 3, cells, seed, "rgb()")
    else:
        _check_model(model, Reducer, emb, len(getattr(model, "mean", ())), "rgb()")
        if len(model.components) < 3:
            raise OptionError(
                f"a model of {len(model.components)} components: wanted three, emb.anysat.reduce(3)"
            )
    image = over_cells(partial(_colors, model=model), emb, rows=4, dtype=np.uint8, missing=0)
    percentiles = [float(p) for p in PERCENTILES]
    attrs = {
        "long_name": "principal components as colours",
        "stretch_percentiles": percentiles,
        **_told(model, 3),
    }
    return result(emb, image, "rgb", attrs, dim="band", labels=list(CHANNELS)), model


def _fit_reducer(emb: xr.DataArray, k: int, cells: int, seed: int, call: str) -> Reducer:
    decomposition = extra("sklearn.decomposition", call)
    k = whole_number("k", k, 1, emb.sizes["D"])
    sample, seed = _sample(emb, k, cells, seed, call)
    mean = sample.mean(0)
    spread = float(np.square(sample - mean).sum())
    with one_thread(), np.errstate(invalid="ignore", divide="ignore"):  # of cells that are all the same
        found = decomposition.PCA(k, svd_solver="covariance_eigh" if len(sample) > 1 else "full").fit(sample)
        components = found.components_
        # the sign is free: let the largest weight be positive
        components = components * np.sign(components[np.arange(k), np.abs(components).argmax(1)])[:, None]
        scores = (sample - mean) @ components.T
    low, high = np.percentile(scores, PERCENTILES, axis=0)
    explained = np.square(scores).sum(0) / (spread or np.inf)
    return Reducer(
        mean=tuple(mean), components=tuple(components), explained=tuple(explained), low=tuple(low), high=tuple(high),
        cells=len(sample), seed=seed, made_with=made_with(emb),
    )  # fmt: skip


def _sample(emb: xr.DataArray, k: int, cells: int, seed: int, call: str) -> tuple[np.ndarray, int]:
    """A sample of at least `k` cells, and the seed."""
    cells = whole_number("cells", cells, k)
    seed = whole_number("seed", seed, 0, SEED_MOST)
    sample = draw(emb, cells, seed)
    if len(sample) < k:
        raise CubeError(
            f"{call}: {len(sample)} of {emb.sizes['y'] * emb.sizes['x']} cells were observed, and {k} are wanted at "
            "least: take a larger area or a longer period, or hand in a model= of another cube"
        )
    return sample, seed


def _check_model(
    model: Any, kind: type[Reducer] | type[Clusters], emb: xr.DataArray, depth: int, call: str
) -> None:
    if not isinstance(model, kind):
        raise OptionError(
            f"model={str(model)[:60]!r}: wanted the {kind.__name__} that an earlier call gave, or "
            f"xr_anysat.{kind.__name__}.from_json(text)"
        )
    check_made_alike(made_with(emb), model.made_with, call, "of the model")
    if depth != emb.sizes["D"]:
        raise CubeError(
            f"{call}: {emb.sizes['D']} channels, and a model of {depth}: wanted the channels that it was fitted on"
        )


def _told(model: Reducer, k: int) -> dict[str, Any]:
    return {
        "explained_variance_ratio": list(model.explained[:k]),
        "fitted_on_cells": model.cells,
        "seed": model.seed,
    }


def _scores(batch: np.ndarray, *, model: Reducer, k: int) -> np.ndarray:
    return product(np.array(model.components[:k]), batch - np.array(model.mean)[:, None])


def _colors(batch: np.ndarray, *, model: Reducer) -> np.ndarray:
    low, high = (np.array(each[:3])[:, None] for each in (model.low, model.high))
    span = np.where(high > low, high - low, np.inf)  # a component that is constant says nothing
    share = np.clip((_scores(batch, model=model, k=3) - low) / span, 0, 1)
    return np.concatenate([np.rint(255 * share), np.full((1, batch.shape[1]), 255.0)])


# ---------------------------------------------------------------------- cosines


def similarity(emb: xr.DataArray, to: Any) -> xr.DataArray:
    """Cosine of the angle between each cell's embedding and that of a place, or any vector.

    Parameters
    ----------
    emb : DataArray, (D, y, x)
        What :func:`xr_anysat.embed` made.
    to : (x, y), shapely geometry, GeoSeries, GeoDataFrame, or (D,) array
        A point, as a tuple of two numbers in the cube's CRS: the cell it lies in. A point or polygon of shapely, in the
        cube's CRS, or several with any CRS: the mean of the cells that the points lie in, or of those whose centres
        lie in the polygons, each once. Or a vector, as ``emb.anysat.pool()`` makes it.

    Returns
    -------
    DataArray, (y, x) float32
        In -1..1. Lazy if `emb` is; of a place, the chunks that hold it are computed at once. NaN where nothing was
        observed.

    Raises
    ------
    CubeTypeError
        If `emb` is not an embedding cube.
    CubeError
        If its coordinates do not tell where cells lie.
    OptionError
        If `to` is something else, lies beside the cube, or nothing was observed there.
    AnySatError
        If geopandas is not installed, and `to` is a place.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> import xr_anysat
    >>> emb = xr.DataArray([[[1.0, 3.0, 0.0]], [[0.0, 4.0, -2.0]]], dims=("D", "y", "x"))
    >>> emb.anysat.similarity(np.array([2.0, 0.0])).values
    array([[1. , 0.6, 0. ]], dtype=float32)
    """
    check_embedding(emb, "similarity((x, y))")
    vector, said = _reference(emb, to)
    cosines = over_cells(partial(_cosine, vector=vector), emb, rows=1, dtype=np.float32, missing=np.nan)
    attrs = {"long_name": "cosine similarity", "units": "1", "to": said}
    return result(emb, cosines[0], "similarity", attrs)


def change(emb: xr.DataArray, other: xr.DataArray) -> xr.DataArray:
    """How far embeddings of one place differ: 1 minus the cosine of the angle between them.

    The cubes have one grid, and were made alike but for their time. Those of ``norm="per_tile_zscore"`` were not: each
    was normalized by its own statistics. Use ``"pastis"``, or one saved :func:`xr_anysat.statistics`, for both.

    Parameters
    ----------
    emb, other : DataArray, (D, y, x)
        What :func:`xr_anysat.embed` made of two periods.

    Returns
    -------
    DataArray, (y, x) float32
        0 (the same direction) to 2. Lazy if one of them is; NaN where either lacks observations.

    Raises
    ------
    CubeTypeError
        If one is not an embedding cube.
    CubeError
        If their grids differ, or they were made with other weights, statistics or settings. The difference is named.

    Examples
    --------
    >>> import xarray as xr
    >>> import xr_anysat
    >>> before = xr.DataArray([[[1.0, 3.0]], [[0.0, 4.0]]], dims=("D", "y", "x"))
    >>> after = xr.DataArray([[[2.0, -4.0]], [[0.0, 3.0]]], dims=("D", "y", "x"))
    >>> before.anysat.change(after).values
    array([[0., 1.]], dtype=float32)
    """
    for each in (emb, other):
        check_embedding(each, "change(other)")
    check_same_grid(emb, other, "change()")
    own, others = ({**made_with(each), "anchor": each.attrs.get("anchor")} for each in (emb, other))
    check_made_alike(own, others, "change()", "in the other")
    far = over_cells(_cosine_change, emb, other, rows=1, dtype=np.float32, missing=np.nan)
    attrs = {
        "long_name": "cosine change",
        "units": "1",
        "periods": [str(each.attrs.get("temporal_window", "not recorded")) for each in (emb, other)],
    }
    return result(emb, far[0], "change", attrs)


def _reference(emb: xr.DataArray, to: Any) -> tuple[np.ndarray, str]:
    """The vector (D,) float64 that cells are compared with, and what it is, in words."""
    if isinstance(to, tuple) and len(to) == 2:
        to = extra("shapely", "similarity()").Point(to)
    if hasattr(to, "geom_type"):  # of shapely and of geopandas alike
        said = str(to) if isinstance(to.geom_type, str) else f"{len(to)} places"
        return mean_at(emb, to, "similarity()"), said
    vector = np.asarray(to, float) if isinstance(to, np.ndarray | xr.DataArray | list) else np.empty(0)
    if vector.shape != (emb.sizes["D"],) or not np.isfinite(vector).all() or not vector.any():
        raise OptionError(
            f"to={str(to)[:60]!r}: wanted a vector of {emb.sizes['D']} finite numbers that are not all 0, a point "
            "(x, y), a point or polygon of shapely, or a GeoSeries"
        )
    return vector, "a vector"


def _cosine(batch: np.ndarray, *, vector: np.ndarray) -> np.ndarray:
    length = np.sqrt(np.square(batch).sum(0) * np.square(vector).sum())
    with np.errstate(invalid="ignore"):  # a vector of zeros has no direction
        return np.clip(product(vector[None], batch) / length, -1, 1)


def _cosine_change(batch: np.ndarray, other: np.ndarray) -> np.ndarray:
    length = np.sqrt(np.square(batch).sum(0) * np.square(other).sum(0))
    with np.errstate(invalid="ignore"):
        return 1 - np.clip((batch * other).sum(0) / length, -1, 1)[None]


# ---------------------------------------------------------------------- clusters


def cluster(
    emb: xr.DataArray,
    k: int | None = None,
    *,
    model: Clusters | None = None,
    cells: int = CELLS,
    seed: int = 0,
) -> tuple[xr.DataArray, Clusters]:
    """Sort cells into `k` clusters of similar embeddings, by mini-batch k-means.

    Centres are fitted on a sample of the cells that were observed. This computes a lazy cube, as :func:`reduce` says.

    Parameters
    ----------
    emb : DataArray, (D, y, x)
        What :func:`xr_anysat.embed` made.
    k : int, optional
        How many clusters; not needed with a `model`.
    model : Clusters, optional
        What an earlier call gave, on embeddings that were made alike: clusters then mean the same.
    cells, seed : int
        As in :func:`reduce`.

    Returns
    -------
    labels : DataArray, (y, x) int16
        The cluster whose centre is nearest, from 0, that of the most cells of the sample first; -1 (``nodata``) where
        nothing was observed. Lazy if `emb` is.
    model : Clusters
        To store (`to_json`) and to use on another year or area.

    Raises
    ------
    CubeTypeError, CubeError, OptionError, AnySatError
        As :func:`reduce`.

    Examples
    --------
    >>> import xarray as xr
    >>> import xr_anysat
    >>> emb = xr.DataArray([[[0.0, 9.0, 0.1, 0.2, float("nan")]], [[5.0, 0.0, 5.1, 5.0, 1.0]]], dims=("D", "y", "x"))
    >>> labels, model = emb.anysat.cluster(2)
    >>> labels.values, model.shares
    (array([[ 0,  1,  0,  0, -1]], dtype=int16), (0.75, 0.25))
    """
    check_embedding(emb, "cluster(8)")
    if model is None:
        if k is None:
            raise OptionError("neither k= nor model=: wanted how many clusters, emb.anysat.cluster(8)")
        model = _fit_clusters(emb, k, cells, seed)
    else:
        _check_model(model, Clusters, emb, len(getattr(model, "centers", ((),))[0]), "cluster()")
        if k is not None and k != len(model.centers):
            raise OptionError(f"k={k!r} and a model of {len(model.centers)} clusters: leave k= out")
    labels = over_cells(
        partial(_nearest, centers=np.array(model.centers)), emb, rows=1, dtype=np.int16, missing=MISSING
    )
    attrs = {
        "long_name": "cluster of the embedding",
        "nodata": MISSING,
        "flag_values": list(range(len(model.centers))),
        "shares": list(model.shares),
        "fitted_on_cells": model.cells,
        "seed": model.seed,
    }
    return result(emb, labels[0], "cluster", attrs), model


def _fit_clusters(emb: xr.DataArray, k: int, cells: int, seed: int) -> Clusters:
    kmeans = extra("sklearn.cluster", "cluster()").MiniBatchKMeans
    k = whole_number("k", k, 1, np.iinfo(np.int16).max)
    sample, seed = _sample(emb, k, cells, seed, "cluster()")
    with one_thread():
        centers = kmeans(k, batch_size=1024, n_init=3, random_state=seed).fit(sample).cluster_centers_
        counts = np.bincount(_nearest(sample.T, centers=centers)[0], minlength=k)
    order = sorted(range(k), key=lambda i: (-counts[i], *centers[i]))
    return Clusters(
        centers=tuple(centers[order]), shares=tuple(counts[order] / len(sample)), cells=len(sample), seed=seed,
        made_with=made_with(emb),
    )  # fmt: skip


def _nearest(batch: np.ndarray, *, centers: np.ndarray) -> np.ndarray:
    """Number of the nearest centre of each cell, (1, n)."""
    nearer = product(centers, batch) - np.square(centers).sum(1)[:, None] / 2  # half of |x|² - |x - c|²
    return nearer.argmax(0)[None]

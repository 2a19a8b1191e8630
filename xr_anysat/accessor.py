"""The ``.anysat`` accessor: each method calls the public function of the same name.

It has no state, because xarray pickles accessors together with their array.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import xarray as xr

from xr_anysat.analysis.classification import classify
from xr_anysat.analysis.clustering import cluster
from xr_anysat.analysis.components import reduce, rgb
from xr_anysat.analysis.regression import regress
from xr_anysat.analysis.scoring import evaluate
from xr_anysat.analysis.seams import seam_score
from xr_anysat.analysis.similarity import change, similarity
from xr_anysat.analysis.vector import sample, zonal
from xr_anysat.cube.compositing import frames
from xr_anysat.cube.normalization import statistics
from xr_anysat.cube.reading import DIM_NAMES, band_name
from xr_anysat.embedding.embed import embed
from xr_anysat.embedding.plan import plan
from xr_anysat.embedding.pooling import pool
from xr_anysat.places.finding import nearest
from xr_anysat.places.on_cube import embed_at
from xr_anysat.series import is_series
from xr_anysat.store.cog import to_cog
from xr_anysat.store.reading import check
from xr_anysat.store.saving import append, to_zarr
from xr_anysat.view.preview import preview

CUBE_METHODS = ("frames", "statistics", "plan", "embed", "embed_at", "preview")
"""Methods that apply to a Sentinel-2 cube."""

EMBEDDING_METHODS = (
    "pool", "to_zarr", "append", "to_cog", "check", "seam_score", "preview", "reduce", "rgb", "similarity", "change",
    "nearest", "cluster", "sample", "zonal", "classify", "regress", "evaluate",
)  # fmt: skip
"""Methods that apply to an embedding cube."""

SERIES_METHODS = (
    "pool", "to_zarr", "append", "check", "reduce", "rgb", "similarity", "change", "cluster", "classify", "regress",
    "evaluate",
)  # fmt: skip
"""Methods that apply to a series of embeddings; the others apply to a step, ``emb.isel(time=0)``."""

P = ParamSpec("P")
R = TypeVar("R")


def _method(function: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[AnySatAccessor, P], R]:
    """Return `function` as a method, with the array of the accessor as first argument."""

    def method(self: AnySatAccessor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return function(self._obj, *args, **kwargs)

    functools.update_wrapper(method, function)
    signature = inspect.signature(function)
    first, *rest = signature.parameters.values()
    method.__signature__ = signature.replace(parameters=[first.replace(name="self"), *rest])  # type: ignore[attr-defined]
    return method


class AnySatAccessor:
    """AnySat embeddings of Sentinel-2 cubes, and analysis of embedding cubes.

    As the last line of a notebook's cell, ``frames.anysat`` shows composed frames with their calendar; for any other
    cube, ``.anysat`` shows which kind it is and which methods apply. Nothing lazy is computed.

    On a Sentinel-2 cube: `frames`, `statistics`, `plan`, `embed`, `embed_at`. On an embedding cube: `pool`, `to_zarr`,
    `append`, `to_cog`, `check`, `seam_score`, `reduce`, `rgb`, `similarity`, `change`, `nearest`, `cluster`, `sample`,
    `zonal`, `classify`, `regress`, `evaluate`. On both: `preview`.
    """

    def __init__(self, obj: xr.DataArray | xr.Dataset) -> None:
        self._obj = obj

    def __repr__(self) -> str:
        sizes = ", ".join(f"{dim}: {size:,}" for dim, size in self._obj.sizes.items())
        if self._obj.dims == ("D", "y", "x"):
            return f"Embedding cube ({sizes})\nMethods: {', '.join(EMBEDDING_METHODS)}"
        if is_series(self._obj):
            return f"Series of embeddings ({sizes})\nMethods: {', '.join(SERIES_METHODS)}"
        if _is_sentinel2(self._obj):
            return f"Sentinel-2 cube ({sizes})\nMethods: {', '.join(CUBE_METHODS)}"
        return (
            f"Neither a Sentinel-2 cube nor an embedding cube ({sizes})\n"
            "Expected: a DataArray (time, band, y, x), a Dataset with one variable (time, y, x) per band, or an "
            "embedding cube (D, y, x)"
        )

    def _repr_html_(self) -> str:
        from xr_anysat.view.jupyter import html

        return html(self._obj, repr(self))

    frames = _method(frames)
    statistics = _method(statistics)
    plan = _method(plan)
    embed = _method(embed)
    embed_at = _method(embed_at)
    pool = _method(pool)
    to_zarr = _method(to_zarr)
    append = _method(append)
    to_cog = _method(to_cog)
    check = _method(check)
    seam_score = _method(seam_score)
    preview = _method(preview)
    reduce = _method(reduce)
    rgb = _method(rgb)
    similarity = _method(similarity)
    change = _method(change)
    nearest = _method(nearest)
    cluster = _method(cluster)
    sample = _method(sample)
    zonal = _method(zonal)
    classify = _method(classify)
    regress = _method(regress)
    evaluate = _method(evaluate)


def _is_sentinel2(obj: xr.DataArray | xr.Dataset) -> bool:
    """Whether `obj` has the dims of a Sentinel-2 cube, with ``time`` as a dim or a scalar coordinate."""
    named = {dim for dim, names in DIM_NAMES.items() if any(name in obj.dims for name in names)}
    if any(name in obj.coords for name in DIM_NAMES["time"]):
        named.add("time")
    if isinstance(obj, xr.Dataset):
        return named == {"time", "y", "x"} and any(map(band_name, obj.data_vars))
    known = {name for names in DIM_NAMES.values() for name in names}
    return named == set(DIM_NAMES) and set(obj.dims) <= known


def register() -> None:
    """Register ``.anysat`` on DataArray and Dataset."""
    for extend in (xr.register_dataarray_accessor, xr.register_dataset_accessor):
        extend("anysat")(AnySatAccessor)

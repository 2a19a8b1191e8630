"""AnySat embeddings of Sentinel-2 cubes.

Importing xr_anysat registers the ``.anysat`` accessor on xarray's DataArray and Dataset, but does not
import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from xr_anysat._version import __version__ as __version__
from xr_anysat.accessor import register
from xr_anysat.analysis.classification import classify
from xr_anysat.analysis.clustering import cluster
from xr_anysat.analysis.comparison import Comparison, compare
from xr_anysat.analysis.components import reduce, rgb
from xr_anysat.analysis.evaluation import Evaluation
from xr_anysat.analysis.fitted import Clusters, PCAModel
from xr_anysat.analysis.fitted import PCAModel as Reducer
from xr_anysat.analysis.learned import Classifier, Regressor
from xr_anysat.analysis.regression import regress
from xr_anysat.analysis.scoring import evaluate
from xr_anysat.analysis.seams import seam_score
from xr_anysat.analysis.similarity import change, similarity
from xr_anysat.analysis.vector import sample, zonal
from xr_anysat.config import config
from xr_anysat.cube.compositing import frames
from xr_anysat.cube.normalization import Statistics, statistics
from xr_anysat.embedding.embed import embed
from xr_anysat.embedding.plan import plan
from xr_anysat.embedding.plan_report import Plan
from xr_anysat.embedding.pooling import pool
from xr_anysat.errors import (
    AnySatError,
    AnySatWarning,
    CatalogError,
    CubeError,
    CubeTypeError,
    DeviceError,
    OptionError,
    ReadError,
    StoreError,
    WeightsError,
    WriteError,
)
from xr_anysat.model.weights import load_model
from xr_anysat.places.finding import nearest
from xr_anysat.places.on_cube import embed_at
from xr_anysat.places.table import open_table
from xr_anysat.shared.sensor import S2
from xr_anysat.store.cog import to_cog
from xr_anysat.store.foreign import open_alphaearth, open_geoemb
from xr_anysat.store.reading import check, open
from xr_anysat.store.saving import append, to_zarr
from xr_anysat.view.preview import preview

if TYPE_CHECKING:
    from xr_anysat.model.verify import verify
    from xr_anysat.places.batch import embed_places, statistics_at
    from xr_anysat.places.planning import PlacesPlan, plan_places
    from xr_anysat.stac.search import open_s2
    from xr_anysat.versions import show_versions


BANDS = S2.bands
"""The ten bands, in the order of the checkpoint."""

__all__ = [
    "BANDS",
    "AnySatError",
    "AnySatWarning",
    "CatalogError",
    "Classifier",
    "Clusters",
    "Comparison",
    "CubeError",
    "CubeTypeError",
    "DeviceError",
    "Evaluation",
    "OptionError",
    "PCAModel",
    "PlacesPlan",
    "Plan",
    "ReadError",
    "Reducer",
    "Regressor",
    "Statistics",
    "StoreError",
    "WeightsError",
    "WriteError",
    "append",
    "change",
    "check",
    "classify",
    "cluster",
    "compare",
    "config",
    "embed",
    "embed_at",
    "embed_places",
    "evaluate",
    "frames",
    "load_model",
    "nearest",
    "open",
    "open_alphaearth",
    "open_geoemb",
    "open_s2",
    "open_table",
    "plan",
    "plan_places",
    "pool",
    "preview",
    "reduce",
    "regress",
    "rgb",
    "sample",
    "seam_score",
    "show_versions",
    "similarity",
    "statistics",
    "statistics_at",
    "to_cog",
    "to_zarr",
    "verify",
    "zonal",
]

register()


def __getattr__(name: str) -> Any:
    # these need an extra or are rarely used, so they are imported on first access
    modules = {
        "open_s2": "stac.search", "embed_places": "places.batch", "statistics_at": "places.batch",
        "plan_places": "places.planning", "PlacesPlan": "places.planning",
        "verify": "model.verify", "show_versions": "versions",
    }  # fmt: skip
    if name in modules:
        return getattr(import_module(f"xr_anysat.{modules[name]}"), name)
    if name == "distributed":
        return import_module("xr_anysat.distributed")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""What is done with embeddings: the same bits in any chunks, nothing invented, refusals that say what to do."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import geopandas as gpd
import numpy as np
import pytest
import rioxarray  # noqa: F401 (registers .rio)
import shapely
import xarray as xr
from geopandas.testing import assert_geodataframe_equal
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cubes import no_compute, small_cube
from threadpoolctl import threadpool_limits

import xr_anysat
from xr_anysat import AnySatError, Clusters, CubeError, CubeTypeError, OptionError, PCAModel
from xr_anysat.analysis.cells import BATCH, in_batches, padded_matmul
from xr_anysat.analysis.sampling import sample_cells
from xr_anysat.errors import AnySatWarning

CRS = "EPSG:32632"
TOP, LEFT = 5_000_000.0, 600_000.0
TINY = {"model": "tiny", "weights": "random", "norm": "pastis"}


def cube_of(values: Any, **attrs: Any) -> xr.DataArray:
    """An embedding cube of `values` (D, y, x), of cells of 10 m."""
    import odc.geo.xr  # noqa: F401

    values = np.asarray(values, "float32")
    y, x = (10.0 * np.arange(n) + 5 for n in values.shape[1:])
    emb = xr.DataArray(values, {"y": TOP - y, "x": LEFT + x}, ("D", "y", "x"), "anysat", attrs)
    emb = emb.odc.assign_crs(CRS)
    emb["spatial_ref"].attrs["GeoTransform"] = f"{LEFT} 10 0 {TOP} 0 -10"
    return emb


def landscape(depth: int = 24, height: int = 33, width: int = 41, seed: int = 0) -> xr.DataArray:
    """Four kinds of ground in stripes of 8 cells, with noise and gaps."""
    rng = np.random.default_rng(seed)
    kinds = rng.normal(size=(4, depth)) * 3
    cover = np.add.outer(np.arange(height) // 8, np.arange(width) // 8) % 4
    values = np.moveaxis(kinds[cover], -1, 0) + rng.normal(size=(depth, height, width))
    values[:, 4:9, 20:31] = np.nan
    values[3, 12, 12] = np.nan  # one channel is enough
    return cube_of(values)


def cover_of(emb: xr.DataArray) -> np.ndarray:
    return np.add.outer(np.arange(emb.sizes["y"]) // 8, np.arange(emb.sizes["x"]) // 8) % 4


def labelled(emb: xr.DataArray, n: int = 80, seed: int = 1) -> gpd.GeoDataFrame:
    """Points on the cells of `landscape`, with what they are, in degrees."""
    rng = np.random.default_rng(seed)
    rows, cols = rng.integers(0, emb.sizes["y"], n), rng.integers(0, emb.sizes["x"], n)
    names = np.array(["wheat", "maize", "broadleaf forest", "town"])
    here = gpd.points_from_xy(
        LEFT + 10 * cols + rng.uniform(1, 9, n), TOP - 10 * rows - rng.uniform(1, 9, n), crs=CRS
    )
    table = gpd.GeoDataFrame(
        {"cover": names[cover_of(emb)[rows, cols]], "row": rows, "col": cols}, geometry=here
    )
    return table[~np.isnan(emb.values).any(0)[rows, cols]].to_crs("EPSG:4326")


FIELDS = gpd.GeoDataFrame(
    {"name": ["a", "b", "c", "d", "e"]},
    geometry=[
        shapely.Point(LEFT + 150, TOP - 150).buffer(90),
        shapely.box(LEFT + 100, TOP - 200, LEFT + 300, TOP - 20),
        shapely.box(LEFT - 50, TOP - 45, LEFT + 45, TOP + 50),
        shapely.box(LEFT + 210, TOP - 80, LEFT + 300, TOP - 50),
        shapely.box(LEFT + 900, TOP - 80, LEFT + 950, TOP - 50),
    ],
    index=[7, 7, 3, 1, 0],
    crs=CRS,
)


def everything(emb: xr.DataArray, points: gpd.GeoDataFrame) -> dict[str, Any]:
    """All that analysis says of a cube, computed."""
    reduced, reducer = emb.anysat.reduce(4, cells=300)
    image, _ = emb.anysat.rgb(model=reducer)
    labels, clusters = emb.anysat.cluster(4, cells=300)
    made: dict[str, Any] = {
        "reduce": reduced, "rgb": image, "cluster": labels,
        "near": emb.anysat.similarity((LEFT + 55, TOP - 155)), "like": emb.anysat.similarity(FIELDS.iloc[:2]),
        "change": emb.anysat.change(emb.roll(x=3, roll_coords=False)),
    }  # fmt: skip
    for method in ("linear", "knn"):
        made[method], made[f"{method} model"] = emb.anysat.classify(
            points, "cover", method=method, block_m=80
        )
    made = {k: v.compute() if hasattr(v, "compute") else v for k, v in made.items()}
    return {
        **made, "reducer": reducer, "clusters": clusters,
        "sample": emb.anysat.sample(points), "zonal": emb.anysat.zonal(FIELDS),
    }  # fmt: skip


def same(got: dict[str, Any], want: dict[str, Any]) -> None:
    """To the last bit, coordinates and attributes included."""
    for name, value in want.items():
        if isinstance(value, xr.DataArray | xr.Dataset):
            xr.testing.assert_identical(got[name], value)
        elif isinstance(value, gpd.GeoDataFrame):
            assert_geodataframe_equal(got[name], value, check_less_precise=False)
            numbers = [c for c in value.columns if c.startswith("emb_")]
            np.testing.assert_array_equal(got[name][numbers], value[numbers])
        else:
            assert got[name] == value


@pytest.fixture(scope="module")
def emb() -> xr.DataArray:
    return landscape()


@pytest.fixture(scope="module")
def points(emb: xr.DataArray) -> gpd.GeoDataFrame:
    return labelled(emb)


@pytest.fixture(scope="module")
def all_of_it(emb: xr.DataArray, points: gpd.GeoDataFrame) -> dict[str, Any]:
    return everything(emb, points)


@pytest.fixture(scope="module")
def real() -> dict[str, xr.DataArray]:
    """What embed makes, of every kind."""
    cube = small_cube(gaps=0.1)
    cube[:, :, :8, :8] = 0
    options = {"patch_size": 20, "tile": 8, **TINY}
    return {
        output: cube.anysat.embed(2, output=output, **options)
        for output in ("patch", "dense", "local", "tile")
    }


# ---------------------------------------------------------------------- chunks


@pytest.mark.slow
@settings(max_examples=4, deadline=None, derandomize=True)
@given(chunks=st.tuples(st.integers(3, 24), st.integers(9, 33), st.integers(9, 41)))
def test_chunks_change_no_bit(
    emb: xr.DataArray, points: gpd.GeoDataFrame, all_of_it: dict[str, Any], chunks: tuple[int, int, int]
) -> None:
    same(everything(emb.chunk(dict(zip(emb.dims, chunks, strict=True))), points), all_of_it)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_schedulers_change_no_bit(
    emb: xr.DataArray, points: gpd.GeoDataFrame, all_of_it: dict[str, Any], threads: int
) -> None:
    with threadpool_limits(threads), dask.config.set(scheduler="synchronous"):
        same(everything(emb.chunk(y=16, x=9), points), all_of_it)


@pytest.mark.slow
@pytest.mark.usefixtures("client")
def test_a_cluster_changes_no_bit(
    emb: xr.DataArray, points: gpd.GeoDataFrame, all_of_it: dict[str, Any]
) -> None:
    same(everything(emb.chunk(y=20, x=15), points), all_of_it)


def test_memory_layout_changes_no_bit(
    emb: xr.DataArray, points: gpd.GeoDataFrame, all_of_it: dict[str, Any]
) -> None:
    other = emb.copy(data=np.asfortranarray(emb.values))
    same(everything(other, points), all_of_it)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    depth=st.sampled_from([2, 5, 64, 256, 768]),
    k=st.sampled_from([1, 2, 3, 5, 9, 50, 65, 130]),
    order=st.randoms(use_true_random=False),
    threads=st.integers(1, 3),
)
def test_a_product_of_a_cell_is_that_cells_own(depth: int, k: int, order: Any, threads: int) -> None:
    """For any neighboring cells, any position in the batch, and any number of threads of BLAS."""
    rng = np.random.default_rng(depth + k)
    matrix, values = rng.normal(size=(k, depth)), rng.normal(size=(depth, BATCH + 300)).astype("float32")
    options = {"rows": k, "dtype": float, "missing": np.nan}
    want = in_batches(lambda batch: padded_matmul(matrix, batch), values, **options)
    shuffled = list(range(values.shape[1]))
    order.shuffle(shuffled)
    some = shuffled[: order.randint(1, len(shuffled))]
    with threadpool_limits(threads):
        got = in_batches(lambda batch: padded_matmul(matrix, batch), values[:, some], **options)
    np.testing.assert_array_equal(got, want[:, some])
    np.testing.assert_allclose(want, matrix @ values, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kernels", ["this CPU", "Nehalem"])
def test_threads_of_blas_change_no_product(kernels: str) -> None:
    """For any CPU: each kind has its own kernels, and OpenBLAS divides a large product among its threads."""
    code = """if True:
        import numpy as np
        from threadpoolctl import threadpool_limits
        from xr_anysat.analysis.cells import BATCH, padded_matmul
        rng = np.random.default_rng(0)
        for k, depth in [(1, 256), (65, 64), (130, 768)]:
            matrix, cell = rng.normal(size=(k, depth)), rng.normal(size=(depth, 1))
            batch = np.repeat(cell, BATCH, axis=1)
            for threads in [1, 2, 3, 5, 8, 16]:
                with threadpool_limits(threads):
                    made = padded_matmul(matrix, batch)
                want = made[:, :1] if threads == 1 else want
                np.testing.assert_array_equal(made, np.repeat(want, BATCH, axis=1))
    """
    chosen = {} if kernels == "this CPU" else {"OPENBLAS_CORETYPE": kernels}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | chosen, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------- laziness


def test_what_is_lazy_computes_nothing(emb: xr.DataArray) -> None:
    _, reducer = emb.anysat.reduce(3)
    _, clusters = emb.anysat.cluster(3)
    vector = emb.anysat.pool()
    lazy = emb.chunk(y=10, x=10)
    with no_compute():
        made = [
            lazy.anysat.reduce(model=reducer)[0], lazy.anysat.rgb(model=reducer)[0],
            lazy.anysat.cluster(model=clusters)[0], lazy.anysat.similarity(vector), lazy.anysat.change(emb),
            emb.anysat.change(lazy),
        ]  # fmt: skip
    for each in made:
        assert each.chunks is not None
        assert (each.dtype, each.shape) == (each.compute().dtype, each.compute().shape)
        assert each.data._meta.dtype == each.dtype


def test_lazy_names_are_the_same_every_time(emb: xr.DataArray, points: gpd.GeoDataFrame) -> None:
    lazy = emb.chunk(y=10, x=10)
    for make in (
        lambda: lazy.anysat.reduce(3)[0], lambda: lazy.anysat.cluster(3)[0],
        lambda: lazy.anysat.classify(points, "cover", method="knn", block_m=80)[0]["class"],
    ):  # fmt: skip
        assert make().data.name == make().data.name


def counted(emb: xr.DataArray, chunk: int) -> tuple[xr.DataArray, list[tuple[int, ...]]]:
    """A lazy cube that records which of its chunks were computed."""
    made: list[tuple[int, ...]] = []

    def block(values: np.ndarray, block_info: Any) -> np.ndarray:
        made.append(block_info[None]["chunk-location"][1:])
        return values

    data = da.from_array(emb.values, chunks=(-1, chunk, chunk))
    return emb.copy(data=data.map_blocks(block, dtype=data.dtype, meta=data._meta)), made


@pytest.mark.parametrize(
    ("call", "chunks"),
    [
        (lambda e: e.anysat.sample(gpd.GeoSeries.from_xy([LEFT + 5, LEFT + 255], [TOP - 5] * 2, crs=CRS)),
         {(0, 0), (0, 2)}),
        (lambda e: e.anysat.zonal(gpd.GeoSeries([shapely.box(LEFT + 5, TOP - 95, LEFT + 95, TOP - 5)], crs=CRS)), None),
        (lambda e: e.anysat.similarity((LEFT + 155, TOP - 155)), {(1, 1)}),
        (lambda e: e.anysat.similarity(shapely.Point(LEFT + 155, TOP - 155)), {(1, 1)}),
    ],
)  # fmt: skip
def test_places_read_only_the_chunks_they_meet(
    emb: xr.DataArray, call: Callable[..., Any], chunks: Any
) -> None:
    lazy, made = counted(emb, 10)
    call(lazy)
    assert len(made) == len(set(made))
    if chunks is not None:
        assert set(made) == chunks


def test_a_fit_reads_each_chunk_once_and_keeps_little(emb: xr.DataArray) -> None:
    lazy, made = counted(emb, 10)
    lazy.anysat.rgb(cells=50)
    assert len(made) == len(set(made)) == 20


# ---------------------------------------------------------------------- samples


def test_a_sample_is_of_observed_cells_each_once(emb: xr.DataArray) -> None:
    flat = emb.values.reshape(24, -1).T
    valid = {tuple(v) for v in flat[np.isfinite(flat).all(1)].astype(float)}
    some, others, all_ = sample_cells(emb, 100, 0), sample_cells(emb, 100, 1), sample_cells(emb, 10_000, 0)
    assert len({tuple(v) for v in some} & valid) == 100
    assert {tuple(v) for v in all_} == valid
    np.testing.assert_array_equal(some, all_[:100])  # the smallest keys come first
    assert len({tuple(v) for v in some} & {tuple(v) for v in others}) < 40


def test_samples_are_spread_evenly() -> None:
    place = np.stack(np.broadcast_arrays(np.arange(64)[:, None], np.arange(64)[None])).astype("float32")
    drawn = sample_cells(cube_of(place), 1024, 3)
    counts = np.histogram2d(*drawn.T, bins=4, range=[[0, 64], [0, 64]])[0]
    assert counts.sum() == 1024
    assert 35 < counts.min() <= counts.max() < 95  # 64 each, ± 4 standard deviations


# ---------------------------------------------------------------------- what the numbers are


def test_components_are_scikit_learns(emb: xr.DataArray) -> None:
    from sklearn.decomposition import PCA

    flat = emb.values.reshape(24, -1).T.astype(float)
    valid = np.isfinite(flat).all(1)
    pca = PCA(5, svd_solver="full").fit(flat[valid])
    reduced, model = emb.anysat.reduce(5)
    got = reduced.values.reshape(5, -1).T
    np.testing.assert_allclose(np.abs(got[valid]), np.abs(pca.transform(flat[valid])), rtol=1e-3, atol=1e-4)
    assert np.isnan(got[~valid]).all()
    np.testing.assert_allclose(model.explained, pca.explained_variance_ratio_, rtol=1e-6)
    assert all(max(c, key=abs) > 0 for c in model.components)
    assert model.cells == valid.sum()
    np.testing.assert_allclose(reduced.attrs["explained_variance_ratio"], model.explained)
    xr.testing.assert_equal(emb.anysat.reduce(2, model=model)[0], reduced[:2])


def test_colors_stretch_from_percentile_to_percentile(emb: xr.DataArray) -> None:
    image, model = emb.anysat.rgb()
    reduced = emb.anysat.reduce(model=model)[0].values
    there = np.isfinite(reduced[0])
    assert (image.values[3] == np.where(there, 255, 0)).all()
    assert (image.values[:, ~there] == 0).all()
    for channel, low, high, scores in zip(image.values[:3], model.low, model.high, reduced, strict=True):
        assert 0.01 < (scores[there] < low).mean() < 0.03
        assert (channel[scores <= low] == 0).all()
        assert (channel[scores >= high] == 255).all()
    darker = emb.anysat.rgb(model=model)[0]
    xr.testing.assert_identical(darker, image)


def test_colors_of_a_constant_cube() -> None:
    image, model = cube_of(np.ones((4, 3, 3))).anysat.rgb()
    assert (image.values[:3] == 0).all()
    assert model.explained == (0.0, 0.0, 0.0)


def test_a_picture_is_drawn_with_nothing_where_nothing_is(emb: xr.DataArray, tmp_path: Path) -> None:
    import matplotlib as mpl
    import rasterio

    mpl.use("Agg")
    image, _ = emb.anysat.rgb()
    drawn = image.plot.imshow(add_labels=False).get_array()
    assert drawn.shape == (33, 41, 4)
    np.testing.assert_array_equal(drawn[..., 3] == 0, np.isnan(emb.values).any(0))
    image[:, 5:, 3:].rio.to_raster(tmp_path / "image.tif")
    with rasterio.open(tmp_path / "image.tif") as file:
        assert [c.name for c in file.colorinterp] == ["red", "green", "blue", "alpha"]
        assert (file.transform.c, file.transform.f) == (LEFT + 30, TOP - 50)
        np.testing.assert_array_equal(file.read(), image[:, 5:, 3:])


def test_similarity_is_the_cosine(emb: xr.DataArray) -> None:
    values = emb.values.astype(float)
    vector = values[:, 20, 3]
    cosines = np.einsum("dyx,d->yx", values, vector) / np.linalg.norm(values, axis=0) / np.linalg.norm(vector)
    at = LEFT + 35, TOP - 205
    ways = [vector, xr.DataArray(vector, dims="D"), list(vector), at, shapely.Point(at)]
    ways += [gpd.GeoSeries([shapely.Point(at)] * 2, crs=CRS).to_crs(4326), shapely.Point(at).buffer(3)]
    for to in ways:
        got = emb.anysat.similarity(to)
        assert (got.dims, got.dtype) == (("y", "x"), np.dtype("float32"))
        np.testing.assert_allclose(got, cosines, rtol=1e-5, atol=1e-6)
        assert got[20, 3].item() == 1
        assert np.nanmin(got) >= -1


def test_similarity_to_polygons_is_that_to_the_mean_of_their_cells(emb: xr.DataArray) -> None:
    two = gpd.GeoSeries(
        [shapely.box(LEFT, TOP - 40, LEFT + 30, TOP), shapely.box(LEFT, TOP - 60, LEFT + 20, TOP)], crs=CRS
    )
    mask = np.zeros((33, 41), bool)
    mask[:4, :3] = mask[:6, :2] = True
    mean = emb.values[:, mask].astype(float).mean(1)
    np.testing.assert_allclose(emb.anysat.similarity(two), emb.anysat.similarity(mean), atol=1e-6)


def test_vectors_of_zeros_have_no_direction() -> None:
    emb = cube_of([[[0, 1]], [[0, 2]]])
    assert np.isnan(emb.anysat.similarity([1.0, 2.0]).values).tolist() == [[True, False]]
    assert np.isnan(emb.anysat.change(emb).values).tolist() == [[True, False]]


def test_change(emb: xr.DataArray) -> None:
    other = landscape(seed=5)
    got = emb.anysat.change(other)
    a, b = emb.values.astype(float), other.values.astype(float)
    want = 1 - (a * b).sum(0) / np.linalg.norm(a, axis=0) / np.linalg.norm(b, axis=0)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    xr.testing.assert_equal(other.anysat.change(emb), got)
    still = emb.anysat.change(emb).values
    assert (still[np.isfinite(still)] == 0).all()


def test_clusters_find_the_ground(emb: xr.DataArray) -> None:
    labels, model = emb.anysat.cluster(4, seed=2)
    there = labels.values >= 0
    np.testing.assert_array_equal(there, np.isfinite(emb.values).all(0))
    pairs = set(zip(labels.values[there], cover_of(emb)[there], strict=True))
    assert len(pairs) == 4
    assert list(model.shares) == sorted(model.shares, reverse=True)
    assert np.bincount(labels.values[there]).tolist() == [round(s * there.sum()) for s in model.shares]
    assert labels.rio.nodata == -1
    xr.testing.assert_equal(emb[:, 3:, 7:].anysat.cluster(model=model)[0], labels[3:, 7:])


# ---------------------------------------------------------------------- models


@pytest.mark.parametrize("kind", ["reduce", "cluster"])
def test_models_are_stored_to_the_last_digit(emb: xr.DataArray, kind: str) -> None:
    made, model = getattr(emb.anysat, kind)(3)
    again = type(model).from_json(model.to_json())
    assert again == model
    assert json.loads(again.to_json()) == json.loads(model.to_json())
    xr.testing.assert_identical(getattr(emb.anysat, kind)(model=again)[0], made)
    assert getattr(emb.anysat, kind)(3, seed=1)[1] != model
    assert len(repr(model)) < 200


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (PCAModel, "{}"), (PCAModel, "nothing"), (Clusters, '{"mean": [1]}'), (Clusters, "[1]"),
        (PCAModel, json.dumps({
            "mean": [0.0], "components": [[1.0, 2.0]], "explained": [1.0], "low": [0.0], "high": [1.0], "cells": 1,
            "seed": 0, "made_with": {},
        })),
        (Clusters, json.dumps({"centers": [[1.0]], "shares": [], "cells": 1, "seed": 0, "made_with": {}})),
    ],
)  # fmt: skip
def test_models_of_something_else_are_refused(kind: Any, text: str) -> None:
    with pytest.raises(
        OptionError, match=r"contains no (PCAModel|Clusters) .*to_json\(\)|expected (vectors|as many centers)"
    ):
        kind.from_json(text)


# ---------------------------------------------------------------------- made alike


@pytest.fixture(scope="module")
def years() -> list[xr.DataArray]:
    return [small_cube(seed=seed, height=12, width=12) for seed in (0, 1)]


def test_years_made_alike_compare(years: list[xr.DataArray]) -> None:
    for norm in ("pastis", "raw", years[0].anysat.statistics(2)):
        a, b = (cube.anysat.embed(2, **{**TINY, "norm": norm}) for cube in years)
        far = a.anysat.change(b.chunk(x=5))
        assert np.isfinite(far.values).all()
        _, model = a.anysat.rgb()
        b.anysat.rgb(model=PCAModel.from_json(model.to_json()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": ("random", 1)}, r"weights '[0-9a-f]{56}.* here, '.*json\.loads\(emb\.attrs\['config'\]\)"),
        ({"norm": "treesatai"}, r"statistics \[\[.* here, .*norm='pastis' or one saved"),
        ({"norm": "per_tile_zscore"}, r"statistics \[\[.*normalizes each cube by its own"),
        ({"patch_size": 20}, r"on the same grid: \(D, y, x\) is \(256, 6, 6\) here and \(256, 12, 12\) in the other"),
        ({"tile": 12}, "tile 12 here, 24 in the other"),
        ({"output": "local"}, "output 'local' here, 'patch' in the other"),
        ({"precision": "bfloat16"}, "precision 'bfloat16' here, 'float32' in the other"),
        ({"frames": 3}, "frames 3 here, 2 in the other"),
        ({"reduce": "mean", "doy_base": 1}, "reduce 'mean' here, 'median' in the other; doy_base 1 here, 0 in"),
        ({"anchor": "grid"}, "anchor 'grid' here, 'cube' in the other"),
    ],
)  # fmt: skip
def test_change_names_what_was_made_otherwise(years: list[xr.DataArray], options: Any, words: str) -> None:
    want = years[0].anysat.embed(2, **TINY)
    got = years[1].anysat.embed(**{"frames": 2, **TINY, **options})
    with pytest.raises(CubeError, match=words):
        got.anysat.change(want)


def test_statistics_of_each_cubes_own_do_not_compare(years: list[xr.DataArray]) -> None:
    a, b = (cube.chunk().anysat.embed(2, **{**TINY, "norm": "per_tile_zscore"}) for cube in years)
    with pytest.raises(
        CubeError, match=r"statistics \"of the cube's own frames, and not recorded\".*norm='pastis'"
    ):
        a.anysat.change(b)
    loaded = years[0].anysat.embed(2, **{**TINY, "norm": "per_tile_zscore"})
    _, model = loaded.anysat.rgb()
    loaded.anysat.rgb(model=model)  # recorded, and the same
    with pytest.raises(CubeError, match=r"statistics .* here, .* of the model"):
        a.anysat.rgb(model=model)


def test_other_grids_are_named(emb: xr.DataArray) -> None:
    for other, words in (
        (emb[:, 1:], r"\(24, 33, 41\) here and \(24, 32, 41\)"),
        (
            emb.assign_coords(x=emb.x + 10),
            "'x' is from 600005.0 to 600405.0 here and from 600015.0 to 600415.0",
        ),
        (emb.drop_vars(["x"]), "only one has 'x' coordinates"),
        (emb.odc.assign_crs("EPSG:32633"), "CRS is EPSG:32632 here and EPSG:32633"),
    ):
        with pytest.raises(
            CubeError, match=f"not on the same grid: .*{words}.*Select the area that they share"
        ):
            emb.anysat.change(other)
    emb.anysat.change(emb.assign_coords(x=emb.x + 1e-6))


# ---------------------------------------------------------------------- points


def test_sample_keeps_the_table_and_adds_to_it(emb: xr.DataArray) -> None:
    at = [(5, 5), (255, 65), (-3, 5), (405, 325), (0, 330), (410, 0), (10, 10), (405, 5)]
    table = gpd.GeoDataFrame(
        {"name": list("abcdefgh"), "n": range(8)},
        geometry=[shapely.Point(LEFT + x, TOP - y) for x, y in at[:-1]] + [None],
        index=[3, 1, 1, "x", 0, 5, 6, 9],
        crs=CRS,
    ).rename_geometry("where")
    before = table.copy()
    out = emb.anysat.sample(table)
    assert_geodataframe_equal(out[table.columns], before)
    assert_geodataframe_equal(table, before)
    assert out.crs == table.crs
    assert out.geometry.name == "where"
    assert out["status"].tolist() == ["ok", "invalid", "outside", "ok", "outside", "outside", "ok", "outside"]
    names = [f"emb_{i:03d}" for i in range(24)]
    assert list(out.columns) == ["name", "n", "where", *names, "status"]
    assert (out[names].dtypes == "float32").all()
    ok = out["status"].values == "ok"
    np.testing.assert_array_equal(out[names].values[ok], emb.values[:, [0, 32, 1], [0, 40, 1]].T)
    assert out[names][~ok].isna().all(axis=None)
    degrees = emb.anysat.sample(table.to_crs(4326).iloc[[0, 1, 3]])
    assert degrees.crs.to_epsg() == 4326
    np.testing.assert_array_equal(degrees[names], out[names].iloc[[0, 1, 3]])
    assert emb.anysat.sample(table.iloc[:0]).shape == (0, 28)


def test_sample_of_crops_and_cubes_that_grow_upward(emb: xr.DataArray, points: gpd.GeoDataFrame) -> None:
    want = emb.anysat.sample(points)
    for other in (emb[:, ::-1], emb[:, :, ::-1].chunk(x=7)):
        assert_geodataframe_equal(other.anysat.sample(points), want)
    crop = emb[:, 3:4, 5:6].anysat.sample(points)
    inside = ((points["row"] == 3) & (points["col"] == 5)).values
    assert ((crop["status"] == "ok").values == inside).all()
    coarse = emb[:, ::2, ::2].anysat.sample(points)
    even = ((points["row"] % 2 == 0) & (points["col"] % 2 == 0) & (coarse["status"] == "ok")).values
    names = ["emb_000", "emb_023"]
    np.testing.assert_array_equal(coarse[names][even], want[names][even])


def test_sample_without_a_crs(emb: xr.DataArray) -> None:
    plain = xr.DataArray(emb.values, {"y": emb.y.values, "x": emb.x.values}, ("D", "y", "x"))
    out = plain.anysat.sample(gpd.GeoSeries([shapely.Point(LEFT + 15, TOP - 25)]))
    assert out["emb_000"].item() == emb[0, 2, 1].item()


# ---------------------------------------------------------------------- polygons


def test_zonal_is_the_mean_of_what_was_observed(emb: xr.DataArray) -> None:
    out = emb.anysat.zonal(FIELDS)
    assert list(out.index) == list(FIELDS.index)
    assert out["status"].tolist() == ["ok", "ok", "partial", "invalid", "outside"]
    x, y = (v.ravel() for v in np.meshgrid(emb.x, emb.y))
    cells = shapely.box(x - 5, y - 5, x + 5, y + 5)
    values = emb.values.reshape(24, -1).astype(float)
    there = np.isfinite(values).all(0)
    names = [f"emb_{i:03d}" for i in range(24)]
    for shape, row in zip(FIELDS.geometry, out.itertuples(), strict=True):
        share = shapely.area(shapely.intersection(shape, cells)) / 100
        assert row.cells == pytest.approx(share.sum())
        if (share[there] > 0).any():
            mean = (values[:, there] * share[there]).sum(1) / share[there].sum()
            np.testing.assert_allclose([getattr(row, n) for n in names], mean, rtol=1e-5, atol=1e-6)
            assert row.valid_share == pytest.approx(share[there].sum() / share.sum())
    assert out[names].iloc[3:].isna().all(axis=None)
    assert out["valid_share"].tolist()[3] == 0
    degrees = emb.anysat.zonal(FIELDS.to_crs(4326))
    np.testing.assert_allclose(degrees[names].iloc[:2], out[names].iloc[:2], rtol=1e-6)
    assert degrees.crs.to_epsg() == 4326


# ---------------------------------------------------------------------- maps from points


@pytest.mark.parametrize("method", ["linear", "knn"])
def test_a_map_of_what_the_points_say(emb: xr.DataArray, points: gpd.GeoDataFrame, method: str) -> None:
    made, model = emb.anysat.classify(points, "cover", method=method, block_m=80)
    names = ["broadleaf forest", "maize", "town", "wheat"]
    flags = made["class"].attrs
    assert flags["class_names"] == names
    assert flags["flag_values"] == [1, 2, 3, 4]
    assert flags["flag_meanings"] == "broadleaf_forest maize town wheat"
    truth = np.array([4, 2, 1, 3])[cover_of(emb)]
    there = np.isfinite(emb.values).all(0)
    assert (made["class"].values == np.where(there, truth, 0)).mean() > 0.99
    assert ((made["class"].values == 0) == ~there).all()
    assert (np.isnan(made["confidence"].values) == ~there).all()
    sure = made["confidence"].values[there]
    assert ((sure > 0.2) & (sure <= 1)).all()
    assert made["class"].dtype == np.uint8
    assert made["class"].rio.nodata == 0
    assert made.attrs["cv_accuracy"] > 0.95
    assert made.attrs["cv_f1_macro"] > 0.9
    assert model.evaluation is not None
    assert model.evaluation.folds == tuple(f"{i} of squares of 80 m" for i in range(1, 6))
    assert made.attrs["labels_left_out"] == 0
    shuffled = points.sample(frac=1, random_state=0)
    xr.testing.assert_identical(emb.anysat.classify(shuffled, "cover", method=method, block_m=80)[0], made)


def test_a_map_is_stored_with_its_classes_and_score(
    emb: xr.DataArray, points: gpd.GeoDataFrame, tmp_path: Path
) -> None:
    made, _ = emb.anysat.classify(points, "cover", block_m=80)
    made.to_zarr(tmp_path / "map.zarr", consolidated=False)
    made.to_netcdf(tmp_path / "map.nc")
    for again in (
        xr.open_zarr(tmp_path / "map.zarr", consolidated=False, decode_coords="all"),
        xr.open_dataset(tmp_path / "map.nc", decode_coords="all"),
    ):
        xr.testing.assert_equal(again, made)
        assert again.attrs["cv_accuracy"] == made.attrs["cv_accuracy"]
        assert list(again["class"].attrs["class_names"]) == made["class"].attrs["class_names"]
        again.close()


def test_linear_is_scikit_learns(emb: xr.DataArray, points: gpd.GeoDataFrame) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    for classes in (["wheat", "maize"], ["wheat", "maize", "town"]):
        some = points[points["cover"].isin(classes)]
        made, model = emb.anysat.classify(some, "cover", block_m=80)
        names = [f"emb_{i:03d}" for i in range(24)]
        table = emb.anysat.sample(some)
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(
            table[names].values, table["cover"]
        )
        flat = emb.values.reshape(24, -1).T
        there = np.isfinite(flat).all(1)
        sure = model.predict_proba(flat[there]).max(1)
        np.testing.assert_allclose(made["confidence"].values.ravel()[there], sure, rtol=1e-2, atol=1e-3)


def test_blocks_keep_neighbours_apart() -> None:
    """Of noise with labels by place a random split would make 100 %."""
    rng = np.random.default_rng(0)
    patches = rng.normal(size=(16, 8, 8)).repeat(8, 1).repeat(8, 2)
    emb = cube_of(patches)
    rows, cols = rng.integers(0, 64, (2, 400))
    labels = rng.integers(0, 2, (8, 8))[rows // 8, cols // 8]
    at = gpd.points_from_xy(emb.x.values[cols], emb.y.values[rows], crs=CRS)
    table = gpd.GeoDataFrame({"kind": labels}, geometry=at)
    near, far = (emb.anysat.classify(table, "kind", method="knn", block_m=side)[0] for side in (10, 160))
    assert near.attrs["cv_accuracy"] > 0.9
    assert far.attrs["cv_accuracy"] < 0.75
    assert near["class"].attrs["class_names"] == ["0", "1"]


def test_the_side_of_a_block_is_a_window_at_least(points: gpd.GeoDataFrame) -> None:
    emb = landscape().assign_attrs(tile=12)
    for tile, low, high in ((12, 120, 120), (2, 35, 41)):
        _, model = emb.assign_attrs(tile=tile).anysat.classify(points, "cover")
        assert model.evaluation is not None
        found = re.fullmatch(r"1 of squares of ([\d.]+) m", model.evaluation.folds[0])
        assert found is not None
        assert low <= float(found[1]) <= high


def test_points_that_cannot_teach_are_counted(emb: xr.DataArray, points: gpd.GeoDataFrame) -> None:
    want, _ = emb.anysat.classify(points, "cover", block_m=80)
    more = points.to_crs(CRS)[["cover", "geometry"]]
    far, gap = shapely.Point(LEFT - 5, TOP), shapely.Point(LEFT + 255, TOP - 65)
    more = gpd.pd.concat(
        [
            more,
            gpd.GeoDataFrame(
                {"cover": ["town", "town", None]}, geometry=[far, gap, more.geometry.iloc[0]], crs=CRS
            ),
        ]
    )
    with pytest.warns(AnySatWarning, match=rf"3 of {len(more)} labels are left out.*emb\.anysat\.sample"):
        got, _ = emb.anysat.classify(more, "cover", block_m=80)
    assert got.attrs["labels_left_out"] == 3
    np.testing.assert_array_equal(got["class"], want["class"])


def test_one_block_has_no_score(emb: xr.DataArray, points: gpd.GeoDataFrame) -> None:
    with pytest.warns(AnySatWarning, match=r"one square of 1e\+09 m.*smaller block_m="):
        made, _ = emb.anysat.classify(points, "cover", block_m=1e9)
    assert "cv_accuracy" not in made.attrs
    assert made["class"].max() == 4


def test_a_class_that_a_fold_lacks_is_no_error(emb: xr.DataArray) -> None:
    at = gpd.GeoSeries.from_xy(
        LEFT + np.array([5.0, 15, 305, 315]), TOP - np.array([5.0, 5, 205, 205]), crs=CRS
    )
    made, model = emb.anysat.classify(
        gpd.GeoDataFrame({"kind": [1, 1, 2, 2]}, geometry=at), "kind", block_m=100
    )
    assert made.attrs["cv_accuracy"] == 0
    assert model.evaluation is not None
    assert model.evaluation.fold_scores()["accuracy"].tolist() == [0, 0]


# ---------------------------------------------------------------------- on what embed makes


@pytest.mark.slow
@pytest.mark.parametrize("output", ["patch", "dense", "local", "tile"])
def test_every_kind_of_output(real: dict[str, xr.DataArray], output: str, tmp_path: Path) -> None:
    emb = real[output][:, :24, :24]
    emb.chunk(y=8, x=9).anysat.to_zarr(tmp_path / "area.zarr", "int8")
    stored = xr_anysat.open(tmp_path / "area.zarr")
    middle = [float(emb[d][emb.sizes[d] // 2]) for d in ("x", "y")]
    table = gpd.GeoDataFrame(
        {"kind": [1, 1, 2, 2]}, geometry=gpd.points_from_xy([middle[0]] * 4, [middle[1]] * 4), crs=CRS
    )
    for cube in (emb, stored, stored[:, 1:, 1:]):
        image, _ = cube.anysat.rgb()
        labels, _ = cube.anysat.cluster(2)
        with pytest.warns(AnySatWarning, match="one square"):
            made, _ = cube.anysat.classify(table, "kind")
        results = {
            "rgb": image, "labels": labels, "reduced": cube.anysat.reduce(2)[0],
            "similarity": cube.anysat.similarity(tuple(middle)), "change": cube.anysat.change(cube),
            "class": made["class"], "confidence": made["confidence"],
        }  # fmt: skip
        for each in results.values():
            assert each.odc.geobox == cube.odc.geobox
            assert each.rio.crs == cube.rio.crs
            assert each.rio.transform() == cube.odc.geobox.affine
            assert (each.chunks is None) == (cube.chunks is None)
            np.testing.assert_array_equal(each["y"], cube["y"])
        gone = np.isnan(cube.values).any(0)
        assert (labels.values == -1).tolist() == gone.tolist()
        assert np.isnan(results["similarity"].values).tolist() == gone.tolist()
        assert (cube.anysat.sample(table)["status"] == "ok").all()
    for name, each in results.items():  # stored as anybody would, and back
        each.chunk(-1).to_dataset(name=name).to_zarr(tmp_path / "out.zarr", mode="w", consolidated=False)
        each.to_dataset(name=name).to_netcdf(tmp_path / "out.nc")
        for again in (
            xr.open_zarr(tmp_path / "out.zarr", consolidated=False, decode_coords="all"),
            xr.open_dataset(tmp_path / "out.nc", decode_coords="all"),
        ):
            np.testing.assert_array_equal(again[name], each)
            assert again[name].dtype == each.dtype
            assert again[name].rio.crs == cube.rio.crs
            assert json.loads(again[name].attrs["embedding"])["model"] == "tiny"
            again.close()


def test_xarray_goes_on_working(real: dict[str, xr.DataArray]) -> None:
    emb = real["patch"].chunk(y=4)
    reduced, _ = emb.anysat.reduce(3)
    assert reduced.sel(x=float(emb.x[2]), method="nearest").shape == (3, 16)
    assert (reduced * 2 - reduced).mean(("y", "x")).shape == (3,)
    unit = emb / np.sqrt((emb**2).sum("D"))
    far = unit.anysat.similarity(emb.anysat.pool())
    np.testing.assert_allclose(far, emb.anysat.similarity(emb.anysat.pool()), atol=1e-5)
    labels, _ = emb.anysat.cluster(3)
    means = emb.groupby(labels.compute().rename("cluster")).mean()
    assert means.sizes["cluster"] == 4
    assert emb.sel(y=emb.y[:4]).anysat.pool("max").shape == (256,)
    assert emb.where(labels == 0).anysat.rgb()[0].sel(band="alpha").max() == 255


# ---------------------------------------------------------------------- refusals


METHODS: dict[str, tuple[Any, ...]] = {
    "reduce": (3,), "rgb": (), "cluster": (2,), "similarity": ((1, 2),), "change": (None,), "sample": (None,),
    "zonal": (None,), "classify": (None, "kind"),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_what_is_no_embedding_is_refused(emb: xr.DataArray, name: str) -> None:
    for other, words in (
        (small_cube(), rf"expected an embedding cube.*embed\(\) first.*{name}\("),
        (emb.to_dataset(), rf"dataset\['anysat'\]\.anysat\.{name}\("),
        (emb.anysat.pool(), rf"one vector \(D,\).*{name}\("),
    ):
        with pytest.raises(CubeTypeError, match=words):
            getattr(other.anysat, name)(*METHODS[name])


def nothing(emb: xr.DataArray) -> xr.DataArray:
    return emb.copy(data=np.full(emb.shape, np.nan, "float32"))


POINT = gpd.GeoDataFrame({"kind": ["a"]}, geometry=[shapely.Point(LEFT + 5, TOP - 5)], crs=CRS)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda e: e.anysat.reduce(), OptionError, r"neither k= nor model=.*reduce\(3\)"),
        (lambda e: e.anysat.cluster(), OptionError, r"neither k= nor model=.*cluster\(8\)"),
        (lambda e: e.anysat.reduce(25), OptionError, "k=25: expected a positive whole number, up to 24"),
        (lambda e: e.anysat.reduce(True), OptionError, "k=True"),
        (lambda e: e.anysat.cluster(0), OptionError, "k=0"),
        (lambda e: e.anysat.rgb(seed=-1), OptionError, "seed=-1"),
        (lambda e: e.anysat.rgb(cells=2), OptionError, "cells=2: expected a whole number, 3 or more"),
        (lambda e: nothing(e).anysat.rgb(), CubeError, "0 of 1353 cells were observed, expected at least 3.*model="),
        (lambda e: e.anysat.rgb(model="x"), OptionError, r"model='x': expected the PCAModel.*PCAModel\.from_json"),
        (lambda e: e.anysat.cluster(model=e.anysat.reduce(2)[1]), OptionError, "expected the Clusters"),
        (lambda e: e.anysat.rgb(model=e.anysat.reduce(2)[1]), OptionError, r"expected three.*reduce\(3\)"),
        (lambda e: e.anysat.reduce(3, model=e.anysat.reduce(2)[1]), OptionError, "k=3: .*up to 2"),
        (lambda e: e.anysat.cluster(3, model=e.anysat.cluster(2)[1]), OptionError, "k=3 and a model of 2.*leave k="),
        (lambda e: e[:20].anysat.rgb(model=e.anysat.rgb()[1]), CubeError, "20 channels and the model 24"),
        (lambda e: e.anysat.similarity(np.ones(3)), OptionError, r"vector of 24 finite numbers.*GeoSeries"),
        (lambda e: e.anysat.similarity(np.zeros(24)), OptionError, "not all 0"),
        (lambda e: e.anysat.similarity("here"), OptionError, "to='here'"),
        (lambda e: e.anysat.similarity((0, 0)), OptionError, r"1 of 1 points are outside.*\(600000, 4999670, 600410, "),
        (lambda e: e.anysat.similarity((LEFT + 255, TOP - 65)), OptionError, "nothing was observed at 1 of 1"),
        (lambda e: e.anysat.similarity(FIELDS.geometry.iloc[3]), OptionError, "nothing was observed in its 27 cells"),
        (lambda e: e.anysat.similarity(FIELDS.geometry.iloc[4]), OptionError, "it is outside the cube"),
        (lambda e: e.anysat.similarity(shapely.LineString([(0, 0), (1, 1)])), OptionError, "contain LineString"),
        (lambda e: e.anysat.sample([1]), OptionError, r"is a list: expected a GeoDataFrame.*points_from_xy"),
        (lambda e: e.anysat.sample(FIELDS), OptionError, r"contain Polygon: expected only Point; zonal\(\)"),
        (lambda e: e.anysat.zonal(POINT), OptionError, r"expected only Polygon or MultiPolygon; sample\(\)"),
        (lambda e: e.anysat.sample(POINT.set_crs(None, allow_override=True)), OptionError, r"set_crs\('EPSG:4326'\)"),
        (lambda e: e.drop_vars("spatial_ref").assign_coords(y=e.y.values, x=e.x.values).anysat.sample(POINT),
         OptionError, r"and the cube has none.*emb\.odc\.assign_crs"),
        (lambda e: e.anysat.sample(POINT.assign(emb_001=1, status=2)), OptionError, "'emb_001', 'status' of points"),
        (lambda e: e.anysat.zonal(FIELDS.assign(cells=1)), OptionError, "columns 'cells' of polygons are names of"),
        (lambda e: e.anysat.zonal(gpd.GeoSeries([shapely.Polygon([(0, 0), (9, 9), (9, 0), (0, 9)])], crs=CRS)),
         OptionError, r"cross themselves at index \[0\].*make_valid\(\)"),
        (lambda e: e.drop_vars(["y"]).anysat.sample(POINT), CubeError, "'y' coordinates are missing"),
        (lambda e: e[:, :, [0, 1, 5]].anysat.zonal(FIELDS), CubeError, "'x' coordinates are not evenly spaced.*isel"),
        (lambda e: e.anysat.classify(POINT, "kind"), OptionError, r"too few samples of 'a' \(1\) in column 'kind'"),
        (lambda e: e.anysat.classify(POINT.iloc[[0, 0]], "kind"), OptionError, "samples of 1 class"),
        (lambda e: nothing(e).anysat.classify(POINT, "kind"), OptionError, r"samples of 0 class.*\(1 labels are not\)"),
        (lambda e: e.anysat.classify(POINT, "name"), OptionError, r"column='name'.*one of kind"),
        (lambda e: e.anysat.classify(POINT, "kind", method="forest"), OptionError, "expected one of 'linear', 'knn'"),
        (lambda e: e.anysat.classify(POINT.iloc[[0] * 4].assign(kind=[1, 1, "a", "a"]), "kind"), OptionError, "mixes"),
        (lambda e: e.anysat.classify(POINT.iloc[[0] * 4].assign(kind=[1, 1, 2, 2]), "kind", block_m=0), OptionError,
         "block_m=0: expected a positive number"),
    ],
)  # fmt: skip
def test_refusals_say_what_to_do(
    emb: xr.DataArray, call: Callable[..., Any], error: type[AnySatError], words: str
) -> None:
    with pytest.raises(error, match=words):
        call(emb)


def test_one_cell_without_a_grid_mapping() -> None:
    lone = xr.DataArray(np.ones((2, 1, 1)), {"y": [5.0], "x": [5.0]}, ("D", "y", "x"))
    with pytest.raises(CubeError, match=r"1 × 1 cells do not define.*no transform.*assign_coords"):
        lone.anysat.sample(gpd.GeoSeries([shapely.Point(5, 5)]))


@pytest.mark.slow
def test_importing_imports_no_optional_library_and_a_missing_one_is_named() -> None:
    calls = [
        ("sklearn", "rgb()"), ("sklearn", "cluster(2)"), ("geopandas", "sample(1)"), ("geopandas", "zonal(1)"),
        ("shapely", "similarity((1, 2))"), ("sklearn", "classify(1, 'kind')"),
    ]  # fmt: skip
    packages = {"sklearn": "scikit-learn"}
    code = f"""if True:
        import sys, numpy as np, xarray as xr, xr_anysat
        print({{"sklearn", "geopandas", "shapely", "matplotlib", "torch", "distributed"}} & set(sys.modules))
        emb = xr.DataArray(np.random.default_rng(0).normal(size=(4, 3, 3)), dims=("D", "y", "x"))
        for module, call in {calls}:
            sys.modules[module] = None
            try:
                eval(f"emb.anysat.{{call}}")
            except xr_anysat.AnySatError as error:
                print(str(error).replace("\\n", " "))
            del sys.modules[module]
    """
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    first, *messages = said.splitlines()
    assert first == "set()"
    for (module, _), message in zip(calls, messages, strict=True):
        assert f"needs {packages.get(module, module)}:" in message
        assert "pip install 'xr_anysat[analysis]'" in message

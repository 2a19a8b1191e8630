"""`to_zarr` and `open`: what comes back, what is resumed and what is refused; on disk and on S3."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import pickle
import re
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packaging.version import Version
from support.cubes import small_cube
from support.s3_server import Gate, S3Server, object_store, storage_options
from zarr.storage import LocalStore, MemoryStore, WrapperStore

import xr_anysat
from xr_anysat import (
    AnySatError,
    AnySatWarning,
    CubeError,
    CubeTypeError,
    OptionError,
    StoreError,
    WriteError,
)
from xr_anysat.cube.normalization import STATISTICS
from xr_anysat.demo.scene import make_scene, open_scene
from xr_anysat.store import codecs
from xr_anysat.store.layout import INNER_BYTES
from xr_anysat.store.location import folder_problem

TINY = {"model": "tiny", "weights": "random"}
CODECS = list(codecs.CODECS)
INT8 = codecs.CODECS["int8"]


def through(codec: str | None, values: np.ndarray) -> Any:
    """Encode and decode values."""
    return codecs.CODECS[codec].decode(codecs.CODECS[codec].encode(values))


def embeddings(
    shape: tuple[int, int, int] = (3, 20, 17),
    chunks: Any = ((3,), (5, 8, 7), (8, 8, 1)),
    *,
    crs: str | None = "EPSG:32632",
    step: float = 10.0,
    corner: tuple[float, float] = (600_000.0, 5_000_000.0),
    gaps: float = 0.1,
    dtype: str = "float32",
    seed: int = 0,
) -> xr.DataArray:
    """A made-up embedding cube; lazy, if it has chunks."""
    from affine import Affine
    from odc.geo.geobox import GeoBox
    from odc.geo.xr import xr_coords

    rng = np.random.default_rng(seed)
    values = rng.normal(size=shape).astype(dtype)
    values[:, rng.random(shape[1:]) < gaps] = np.nan
    coords = {}
    if crs is not None:
        grid = GeoBox(shape[1:], Affine(step, 0, corner[0], 0, -step, corner[1]), crs)
        coords = xr_coords(grid, dims=("y", "x"))
    data = values if chunks is None else da.from_array(values, chunks=chunks)
    return xr.DataArray(data, dims=("D", "y", "x"), coords=coords, name="anysat")


def counted(emb: xr.DataArray) -> tuple[xr.DataArray, list[Any]]:
    """The same cube, and a list that each computation of a block is put down in."""
    computed: list[Any] = []

    def count(block: np.ndarray, block_id: Any = None) -> np.ndarray:
        computed.append(block_id)
        return block

    return emb.copy(data=emb.data.map_blocks(count, meta=emb.data._meta)), computed


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def shards(store: Path, name: str = "anysat") -> set[str]:
    return {str(p.relative_to(store / name / "c")) for p in (store / name / "c").rglob("*") if p.is_file()}


def types(value: Any) -> Any:
    """The types within nested attrs."""
    if isinstance(value, dict):
        return {k: types(v) for k, v in value.items()}
    return [types(v) for v in value] if isinstance(value, list) else type(value)


def same(got: xr.DataArray, want: xr.DataArray) -> None:
    xr.testing.assert_identical(got.compute(), want.compute())


# ---------------------------------------------------------------------- what comes back


@pytest.mark.slow
@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"patch_size": 20, "tile": 4},
        {"output": "dense", "patch_size": 20, "tile": 8},
        {"output": "local", "tile": 6},
        {"output": "tile", "tile": 5},
        {"patch_size": 30, "tile": 6, "anchor": "cube"},
    ],
)
def test_embeddings_come_back_identical(options: dict[str, Any], lazy: bool, tmp_path: Path) -> None:
    cube = small_cube(height=15, width=13).assign_coords(tile_id="32UQD")
    cube = cube.chunk(time=4, y=9) if lazy else cube
    emb = cube.anysat.embed(2, norm="pastis", **options, **TINY)
    emb = emb.persist()
    back = emb.anysat.to_zarr(tmp_path / "area.zarr")
    same(back, emb)
    assert types(back.attrs) == types(emb.attrs)
    assert back.chunks == emb.chunks or not lazy
    assert back.odc.geobox == emb.odc.geobox
    assert back.dtype == np.float32
    assert {k: v.dtype for k, v in back.coords.items()} == {k: v.dtype for k, v in emb.coords.items()}


ODD = {
    "no coordinates": lambda: embeddings(crs=None),
    "no CRS": lambda: embeddings(crs=None).assign_coords(y=np.arange(20) * -10.0, x=np.arange(17) * 10),
    "labels": lambda: embeddings(crs=None).assign_coords(y=[f"row {i}" for i in range(20)]),
    "uneven": lambda: embeddings(crs=None).assign_coords(y=np.arange(20.0) ** 2, x=np.arange(17)),
    "a CRS that got lost": lambda: embeddings().drop_attrs(),
    "a cell": lambda: embeddings((3, 1, 1), 1),
    "a cell without CRS": lambda: embeddings((3, 1, 1), 1, crs=None).assign_coords(y=[5.0], x=[3.0]),
    "a row": lambda: embeddings((3, 1, 9), ((3,), (1,), (3, 4, 2))),
    "a margin of all but a cell": lambda: embeddings((3, 9, 9), ((3,), (1, 8), (1, 7, 1))),
    "a last block of a cell": lambda: embeddings((3, 17, 9), ((3,), (8, 8, 1), (8, 1))),
    "one block": lambda: embeddings(chunks=-1),
    "NumPy": lambda: embeddings(chunks=None),
    "chunks along D": lambda: embeddings(chunks=(1, 8, 8)),
    "uneven chunks": lambda: embeddings(chunks=((1, 2), (3, 8, 2, 7), (17,))),
    "nothing but gaps": lambda: embeddings(gaps=2.0),
    "float64": lambda: embeddings(dtype="float64"),
    "float16": lambda: embeddings(dtype="float16"),
    "degrees": lambda: embeddings(crs="EPSG:4326", step=1e-4, corner=(11.3, 46.7)),
    "no round numbers": lambda: embeddings(step=10 / 3, corner=(1 / 3, 5 / 7)),
    "coordinates of their own": lambda: embeddings().assign_coords(
        y=("y", embeddings().y.values, {"long_name": "northing", "units": "m"})
    ),
    "scalars": lambda: embeddings().assign_coords(
        tile_id="32UQD", made=np.datetime64("2022-01-01T10:11:12", "ns"), n=3, share=np.float32(0.5), ok=True
    ),
    "along D": lambda: embeddings().assign_coords(D=["a", "b", "c"], weight=("D", [1.0, 2.0, np.nan])),
    "two dims": lambda: embeddings().assign_coords(
        lon=(("y", "x"), np.random.default_rng(0).random((20, 17)))
    ),
    "lazy coordinates": lambda: embeddings().assign_coords(
        lon=(("y", "x"), da.random.default_rng(0).random((20, 17), chunks=5)), row=("y", da.arange(20))
    ),
    "attributes": lambda: embeddings().assign_attrs(
        whole=1, real=2.5, nan=np.nan, yes=True, text="x", json='{"a": [1]}', no_json="{", many=[1.5, 2.5],
        names=["a", "b"], none=None, empty=[], nested={"a": [1, "b"]}, array=np.arange(3), single=np.float32(2.5),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ODD)
def test_odd_cubes_come_back_identical(kind: str, tmp_path: Path) -> None:
    emb = ODD[kind]()
    if Version(zarr.__version__) < Version("3.1"):  # which writes NaN as a text
        emb.attrs.pop("nan", None)
    back = emb.anysat.to_zarr(tmp_path / "area.zarr")
    same(back, emb)
    geobox = emb.odc.geobox
    plain = xr.open_zarr(tmp_path / "area.zarr", decode_coords="all")["anysat"]
    assert back.odc.geobox == geobox
    assert plain.odc.crs == emb.odc.crs
    own = plain.isel(y=slice(-emb.sizes["y"], None), x=slice(-emb.sizes["x"], None))
    np.testing.assert_array_equal(own, emb)
    assert plain.size == emb.size or np.isnan(plain).sum() >= plain.size - emb.size


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data(), codec=st.sampled_from(CODECS), crs=st.sampled_from([None, "EPSG:32632", "EPSG:3035"]))
def test_any_cube_comes_back(
    data: st.DataObject, codec: str | None, crs: str | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Blocks, margins and gaps change nothing: what comes back is what the codec makes of the whole."""
    depth = data.draw(st.integers(1, 5))
    sides, chunks = [], []
    for _ in "yx":
        block, first, more = (data.draw(st.integers(1, n)) for n in (9, 9, 3))
        last = data.draw(st.integers(1, block))
        parts = data.draw(
            st.sampled_from([(block,), (min(first, block), *([block] * more), last), (first, more, last)])
        )
        sides.append(sum(parts))
        chunks.append(parts)
    emb = embeddings(
        (depth, *sides), (depth, *chunks), crs=crs, step=data.draw(st.sampled_from([10, 40, 0.3])),
        gaps=data.draw(st.sampled_from([0.0, 0.3, 1.0])), seed=data.draw(st.integers(0, 99)),
    )  # fmt: skip
    store = tmp_path_factory.mktemp("any") / "area.zarr"
    back = emb.anysat.to_zarr(store, codec)
    want = emb.copy(data=through(codec, emb.values))
    same(back, want if codec is None else want.assign_attrs(codec=codec))
    array = zarr.open_array(store, path="anysat", mode="r")
    assert len(shards(store)) == np.prod([-(-n // s) for n, s in zip(array.shape, array.shards, strict=True)])


def test_a_part_of_an_embedding_has_its_own_place(tmp_path: Path) -> None:
    """xarray leaves the transform of the whole on a part; GDAL and rioxarray would believe it."""
    import rioxarray  # noqa: F401

    part = embeddings(chunks=-1).isel(y=slice(3, None), x=slice(5, 12))
    back = part.anysat.to_zarr(tmp_path / "area.zarr")
    xr.testing.assert_equal(back.compute(), part.compute())
    plain = xr.open_zarr(tmp_path / "area.zarr", decode_coords="all")["anysat"]
    for cube in (back, plain):
        assert cube.rio.crs.to_epsg() == 32632
        assert cube.rio.transform() == cube.odc.geobox.affine == part.odc.geobox.affine
        said = [float(v) for v in cube.spatial_ref.attrs["GeoTransform"].split()]
        assert said == list(part.odc.geobox.affine.to_gdal())


def test_the_layout_of_a_store(tmp_path: Path) -> None:
    """One file a block, whole inner chunks in it; a margin before a first block that is cut."""
    import rioxarray  # noqa: F401

    emb = embeddings((7, 40, 33), ((7,), (11, 16, 13), (16, 16, 1)))
    path = tmp_path / "area.zarr"
    back = emb.anysat.to_zarr(path, "int8")
    assert back.chunks == emb.chunks
    assert shards(path) == {f"0/{i}/{j}" for i in range(3) for j in range(3)}
    assert shards(path, "scale") == {f"{i}/{j}" for i in range(3) for j in range(3)}
    group = zarr.open_group(path, mode="r")
    assert group.metadata.zarr_format == 3
    arrays = json.loads((path / "zarr.json").read_bytes())["consolidated_metadata"]["metadata"]
    # the order is the same for all versions of zarr
    assert list(arrays) == ["anysat", "scale", "spatial_ref", "x", "y"]
    values = group["anysat"]
    assert values.shape == (7, 45, 33)
    assert values.shards == (7, 16, 16)
    assert all(s % c == 0 for s, c in zip(values.shards, values.chunks, strict=True))
    assert np.prod(values.chunks) * 4 <= INNER_BYTES
    assert group["scale"].chunks == values.chunks[1:]
    # plain xarray: the margin has coordinates, and nothing in it
    plain = xr.open_zarr(path, decode_coords="all")
    decoded = (plain["anysat"].astype("float32") * plain["scale"]).compute()
    assert np.isnan(decoded[:, :5]).all()
    np.testing.assert_array_equal(decoded[:, 5:], back)
    np.testing.assert_array_equal(np.diff(plain.y), -10)
    np.testing.assert_array_equal(plain.y[5:], emb.y)
    for cube in (plain["anysat"], back):
        assert cube.rio.crs.to_epsg() == cube.odc.crs.to_epsg() == 32632
        assert cube.rio.transform() == cube.odc.geobox.affine
    assert plain["anysat"].odc.geobox.affine.f == emb.odc.geobox.affine.f + 50


def test_inner_chunks_of_large_blocks(tmp_path: Path) -> None:
    emb = xr.DataArray(da.zeros((768, 288, 300), chunks=-1, dtype="float32"), dims=("D", "y", "x"))
    with pytest.raises(RuntimeError, match="far enough"):
        emb.anysat.to_zarr(tmp_path / "area.zarr", progress=stop_after(0))
    array = zarr.open_array(tmp_path / "area.zarr", path="anysat", mode="r")
    assert array.shards == (768, 288, 300)
    assert array.chunks == (768, 36, 30)
    assert np.prod(array.chunks) * 4 <= INNER_BYTES


def test_what_was_opened_can_go_on(tmp_path: Path) -> None:
    """Into another store, with another codec, or to a file of another format."""
    emb = embeddings().assign_attrs(config="{}")
    back = emb.anysat.to_zarr(tmp_path / "area.zarr")
    same(back.anysat.to_zarr(tmp_path / "again.zarr"), emb)
    same(back.anysat.to_zarr(tmp_path / "small.zarr", "int8").anysat.to_zarr(tmp_path / "s.zarr"),
         xr_anysat.open(tmp_path / "small.zarr"))  # fmt: skip
    back.to_netcdf(tmp_path / "area.nc")
    back.chunk(y=8, x=8).to_dataset().to_zarr(tmp_path / "plain.zarr", zarr_format=2)
    for again in (
        xr.open_dataarray(tmp_path / "area.nc", decode_coords="all"),
        xr.open_zarr(tmp_path / "plain.zarr", decode_coords="all")["anysat"],
    ):
        xr.testing.assert_equal(again.compute(), emb.compute())
        assert again.odc.geobox == emb.odc.geobox
    with pytest.raises(ValueError, match="chunk"):  # which is what to_zarr of the accessor is for
        back.to_zarr(tmp_path / "uneven.zarr")


def test_statistics_are_recorded_and_not_made_again(tmp_path: Path) -> None:
    cube = small_cube(height=26, width=22)
    read: list[Any] = []

    def count(block: np.ndarray, block_id: Any = None) -> np.ndarray:
        read.append(block_id)
        return block

    data = da.from_array(cube.values, chunks=(9, 10, 13, 11)).map_blocks(count, dtype=cube.dtype)
    emb = cube.copy(data=data).anysat.embed(2, patch_size=20, tile=8, **TINY)
    back = emb.anysat.to_zarr(tmp_path / "a" / "area.zarr")
    xr.testing.assert_equal(back.compute(), emb.compute())
    stats = cube.copy(data=data).anysat.statistics(2)
    assert back.attrs["norm_mean"] == list(stats.mean)
    assert back.attrs["norm_std"] == list(stats.std)
    assert back.attrs["norm_bands"] == list(xr_anysat.BANDS)
    assert {**emb.attrs, **back.attrs} == {**back.attrs, "norm_statistics": emb.attrs["norm_statistics"]}

    path = tmp_path / "b" / "area.zarr"
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (path / "anysat/c/0/0/0").unlink()  # within the first chunk of the cube
    read.clear()
    again = emb.anysat.to_zarr(path)
    assert set(read) == {(0, 0, 0, 0)}
    assert len(read) == 1
    same(again, back)
    assert files(tmp_path / "b") == files(tmp_path / "a")


def lazy_embedding(norm: str = "per_tile_zscore") -> xr.DataArray:
    cube = small_cube(height=13, width=11).chunk(time=2, y=7)
    return cube.anysat.embed(2, norm=norm, patch_size=20, tile=4, **TINY)


def joined(emb: xr.DataArray) -> xr.DataArray:
    return xr.concat([emb.isel(y=slice(0, 3)), emb.isel(y=slice(3, None))], "y", combine_attrs="override")


SAME_WAY: dict[str, Callable[[xr.DataArray], xr.DataArray]] = {
    "persisted": lambda emb: emb.persist(),
    "optimized": lambda emb: dask.optimize(emb)[0],
    "optimized, then persisted": lambda emb: dask.optimize(emb)[0].persist(),
    "pickled": lambda emb: pickle.loads(pickle.dumps(emb)),
    "pickled, then persisted": lambda emb: pickle.loads(pickle.dumps(emb)).persist(),
    "computed": lambda emb: emb.compute().chunk(emb.chunksizes),
    "joined of parts": joined,
}


@pytest.mark.parametrize("norm", ["per_tile_zscore", "unit_scale"])
@pytest.mark.parametrize("change", SAME_WAY.values(), ids=SAME_WAY)
def test_the_graph_of_a_cube_makes_no_difference(change: Any, norm: str, tmp_path: Path) -> None:
    """Its tasks may have other names or be gone; chunks and metadata are the same to the byte."""
    lazy_embedding(norm).anysat.to_zarr(tmp_path / "plain" / "area.zarr")
    changed = change(lazy_embedding(norm))
    changed.anysat.to_zarr(tmp_path / "changed" / "area.zarr")
    assert files(tmp_path / "changed") == files(tmp_path / "plain")
    assert ("norm_mean" in xr_anysat.open(tmp_path / "changed" / "area.zarr").attrs) == (norm != "unit_scale")


@pytest.mark.parametrize("change", ["persisted", "computed"])
def test_a_computed_cube_is_not_read_for_its_statistics(change: str, tmp_path: Path) -> None:
    """Nor does it keep the graph."""
    cube, read = counted(small_cube(height=13, width=11).chunk(time=2, y=7))
    emb = cube.anysat.embed(2, patch_size=20, tile=4, **TINY)
    done = SAME_WAY[change](emb)
    read.clear()
    assert done.encoding[STATISTICS].array is None
    assert "norm_mean" in done.anysat.to_zarr(tmp_path / "area.zarr").attrs
    assert not read


def test_joined_embeddings_have_no_common_statistics(tmp_path: Path) -> None:
    one, other = (lazy_embedding() for _ in range(2))
    both = xr.concat([one, other.assign_coords(y=other["y"] - 140)], "y", combine_attrs="override")
    assert "norm_mean" not in both.anysat.to_zarr(tmp_path / "area.zarr").attrs


@pytest.mark.slow
def test_statistics_that_nobody_has_anymore_are_not_recorded(client: Any, tmp_path: Path) -> None:
    """The workers of a cluster computed them, and neither the graph nor the pickled cube has them."""
    emb = lazy_embedding().persist()
    pickled, want, _blocks = pickle.dumps(emb), emb.attrs["norm_statistics"], emb.data
    del emb
    assert pickle.loads(pickled).anysat.to_zarr(tmp_path / "area.zarr").attrs["norm_statistics"] == want


def test_a_cube_without_anything_valid_is_resumed(tmp_path: Path) -> None:
    cube = (small_cube(height=12, width=12) * 0).chunk(time=3)
    emb = cube.anysat.embed(2, tile=4, **TINY)
    back = emb.anysat.to_zarr(tmp_path / "area.zarr", "int8")
    assert np.isnan(back).all()
    assert np.isnan(np.array(back.attrs["norm_mean"], float)).all()
    (tmp_path / "area.zarr/anysat/c/0/0/0").unlink()
    same(emb.anysat.to_zarr(tmp_path / "area.zarr", "int8"), back)


# ---------------------------------------------------------------------- codecs


def error_of(values: np.ndarray, codec: str) -> dict[str, float]:
    """Of a block (D, y, x): largest relative L2 and cosine distance of a cell, share of the 10 nearest kept."""
    decoded = through(codec, values)
    a, b = (v.reshape(len(v), -1).T.astype(float) for v in (values, decoded))
    a, b = a[np.isfinite(a).all(1)], b[np.isfinite(b).all(1)]
    norms = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)

    def nearest(cells: np.ndarray, norm: np.ndarray) -> np.ndarray:
        alike = (cells @ cells.T) / norm / norm[:, None]
        np.fill_diagonal(alike, -2)
        return np.argsort(-alike, axis=1)[:, :10]

    pairs = zip(nearest(a, norms[0]), nearest(b, norms[1]), strict=True)
    return {
        "relative": (np.linalg.norm(a - b, axis=1) / norms[0]).max(),
        "cosine": (1 - (a * b).sum(1) / norms[0] / norms[1]).max(),
        "kept": np.mean([len(set(p) & set(q)) / 10 for p, q in pairs]),
    }


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """Embeddings (256, 25, 25) of the made-up landscape, by random weights."""
    folder = tmp_path_factory.mktemp("scene")
    make_scene(folder, size=(96, 96), dates=6, seed=3)
    cube = open_scene(folder).isel(y=slice(48), x=slice(48)).compute()
    return cube.anysat.embed(3, patch_size=20, tile=48, norm="pastis", **TINY).values


@pytest.mark.slow
def test_errors_of_the_codecs(scene: np.ndarray) -> None:
    """docs/storage.md has these figures. The weights are random, so they describe the codec."""
    gaussian = np.random.default_rng(0).normal(size=(768, 25, 25)).astype(np.float32)
    outliers = gaussian * np.where(np.arange(768) < 8, 20, 1)[:, None, None].astype(np.float32)
    for values in (scene, gaussian, outliers):
        half = error_of(values, "float16")
        assert half["relative"] < 5e-4
        assert half["cosine"] < 1e-7
        assert half["kept"] > 0.99
    for values, relative, cosine, kept in [
        (scene, 0.01, 5e-5, 0.8),
        (gaussian, 0.015, 1e-4, 0.97),
        (outliers, 0.08, 4e-3, 0.97),
    ]:
        byte = error_of(values, "int8")
        assert byte["relative"] < relative
        assert byte["cosine"] < cosine
        assert byte["kept"] > kept


def test_int8_rounds_to_half_a_step(scene: np.ndarray) -> None:
    arrays = INT8.encode(scene)
    assert {k: (v.dtype.name, v.shape) for k, v in arrays.items()} == {
        "scale": ("float32", scene.shape[1:]),
        "anysat": ("int8", scene.shape),
    }
    there = np.isfinite(scene).all(0)
    np.testing.assert_array_equal(np.isnan(arrays["scale"]), ~there)
    np.testing.assert_array_equal(np.abs(arrays["anysat"].astype(int)).max(0), np.where(there, 127, 0))
    off = np.abs(INT8.decode(arrays) - scene)[:, there]
    assert (off <= arrays["scale"][there] * 0.501).all()
    # codes stay what they are when they are encoded again
    again = INT8.encode(INT8.decode(arrays))
    np.testing.assert_array_equal(again["anysat"], arrays["anysat"])


def test_int8_at_the_ends_of_float32() -> None:
    tiny, least, most = np.finfo(np.float32).tiny, np.float32(1e-45), np.finfo(np.float32).max
    cells = np.array(
        [[0, -0.0], [tiny, -tiny / 2], [least, 0], [most, -most], [1, -np.nextafter(1, 0)], [np.nan] * 2]
    )
    values = cells.T.astype(np.float32)[:, None]
    arrays = INT8.encode(values)
    back = INT8.decode(arrays)[:, 0].T
    assert np.isnan(back[-1]).all()
    assert np.isfinite(back[:-1]).all()
    assert np.signbit(arrays["scale"]).sum() == 0
    np.testing.assert_array_equal(back[0], 0)
    np.testing.assert_allclose(back[1], cells[1], atol=tiny / 100)
    np.testing.assert_allclose(back[2], 0, atol=2e-45)
    np.testing.assert_allclose(back[3:5], cells[3:5], rtol=1e-6)


def test_float16_ends_at_65504() -> None:
    values = np.array([65504, 6.1e-5, 1e-9, -65519, np.nan, 0], np.float32)[:, None, None]
    back = through("float16", values)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back.ravel(), [65504, 6.1e-5, 0, -65504, np.nan, 0], rtol=5e-4)


@pytest.mark.parametrize(
    ("codec", "bad", "says"),
    [
        ("int8", np.nan, "2 cells are infinite or NaN in some channels.*Use codec=None"),
        ("int8", np.inf, "2 cells are infinite or NaN in some channels"),
        (
            "float16",
            65520.0,
            "2 cells have values up to 65520: codec='float16' stores values up to 65504. Use codec='int8'",
        ),
        ("float16", -1e30, r"values up to 1e\+30: codec='float16' stores"),
    ],
)
def test_values_that_would_be_lost(codec: str, bad: float, says: str, tmp_path: Path) -> None:
    emb = embeddings(gaps=0)
    emb[1, 7, 2:4] = bad
    with pytest.raises(CubeError, match=says) as caught:
        emb.anysat.to_zarr(tmp_path / "area.zarr", codec)
    assert "blocks of" in caught.value.__notes__[0]
    same(emb.anysat.to_zarr(tmp_path / "plain.zarr"), emb)
    with pytest.warns(AnySatWarning, match=r"of 9 blocks of .* are not finished, and NaN here"):
        begun = xr_anysat.open(tmp_path / "area.zarr")
    assert np.isnan(begun[:, 5:13, :8]).all()


def test_infinity_is_a_value_of_half_precision(tmp_path: Path) -> None:
    emb = embeddings(gaps=0)
    emb[1, 7, 2:4] = -np.inf
    assert np.isneginf(emb.anysat.to_zarr(tmp_path / "area.zarr", "float16")[1, 7, 2:4]).all()


# ---------------------------------------------------------------------- resumed


def stop_after(blocks: int) -> Callable[[int, int], None]:
    def progress(finished: int, total: int) -> None:
        if finished >= blocks:
            raise RuntimeError("far enough")

    return progress


@pytest.mark.parametrize("codec", CODECS)
def test_only_what_is_missing_is_computed(codec: str | None, tmp_path: Path) -> None:
    emb, computed = counted(embeddings())
    whole, path = tmp_path / "whole" / "area.zarr", tmp_path / "resumed" / "area.zarr"
    seen: list[tuple[int, int]] = []
    want = emb.anysat.to_zarr(whole, codec, progress=lambda *n: seen.append(n)).compute()
    assert seen == [(n, 9) for n in range(10)]
    assert len(computed) == 9

    with pytest.raises(RuntimeError, match="far enough") as caught, dask.config.set(scheduler="synchronous"):
        emb.anysat.to_zarr(path, codec, progress=stop_after(4))
    assert "4 of the 9 blocks of" in caught.value.__notes__[0]
    (path / "anysat/c/0/2/2").unlink(missing_ok=True)
    for draft in ("anysat/c/0/0/1.f00.partial", "zarr.f00.partial", "x/c/0.f00.partial"):
        (path / draft).parent.mkdir(parents=True, exist_ok=True)
        (path / draft).write_bytes(b"cut sho")  # what a killed writer leaves
    finished = shards(path) - {"0/0/1.f00.partial"}
    computed.clear()
    same(emb.anysat.to_zarr(path, codec), want)
    assert {f"0/{i}/{j}" for _, i, j in computed} == {
        f"0/{i}/{j}" for i in range(3) for j in range(3)
    } - finished
    assert 0 < len(computed) < 9
    assert files(tmp_path / "resumed") == files(tmp_path / "whole")

    computed.clear()
    seen.clear()
    same(emb.anysat.to_zarr(path, codec, progress=lambda *n: seen.append(n)), want)
    assert not computed
    assert seen == [(9, 9)]
    assert files(tmp_path / "resumed") == files(tmp_path / "whole")


@pytest.mark.parametrize("kept", [1, 3, 6])
def test_a_head_that_was_cut_short(kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the first, or some, of the metadata and coordinates."""
    emb = embeddings()
    emb.anysat.to_zarr(tmp_path / "a" / "area.zarr", "int8")
    written: list[str] = []
    real = xr_anysat.store.writing.write

    def write(root: Any, key: str, *args: Any, **options: Any) -> None:
        if len(written) == kept:
            raise KeyboardInterrupt
        written.append(key)
        real(root, key, *args, **options)

    monkeypatch.setattr("xr_anysat.store.writing.write", write)
    with pytest.raises(KeyboardInterrupt):
        emb.anysat.to_zarr(tmp_path / "b" / "area.zarr", "int8")
    monkeypatch.undo()
    assert written[0] == "zarr.json"
    emb.anysat.to_zarr(tmp_path / "b" / "area.zarr", "int8")
    assert files(tmp_path / "b") == files(tmp_path / "a")


def test_a_draft_of_the_first_file_is_no_foreign_file(tmp_path: Path) -> None:
    (tmp_path / "area.zarr").mkdir()
    (tmp_path / "area.zarr" / "zarr.f00.partial").write_bytes(b"{")
    emb = embeddings()
    same(emb.anysat.to_zarr(tmp_path / "area.zarr"), emb)
    assert not list(tmp_path.rglob("*.partial"))


def test_an_int8_block_is_finished_when_codes_and_scales_are_there(tmp_path: Path) -> None:
    emb, computed = counted(embeddings())
    emb.anysat.to_zarr(tmp_path / "area.zarr", "int8")
    before = files(tmp_path)
    (tmp_path / "area.zarr/scale/c/1/1").unlink()
    (tmp_path / "area.zarr/anysat/c/0/2/0").unlink()
    computed.clear()
    emb.anysat.to_zarr(tmp_path / "area.zarr", "int8")
    assert sorted(computed) == [(0, 1, 1), (0, 2, 0)]
    assert files(tmp_path) == before


def test_other_chunks_go_on_in_the_blocks_of_the_store(tmp_path: Path) -> None:
    emb = embeddings()
    emb.anysat.to_zarr(tmp_path / "area.zarr")
    before = files(tmp_path)
    for chunks in ({"y": 20, "x": 17}, {"y": 3, "x": 5}, {"D": 1, "y": 8, "x": 8}):
        (tmp_path / "area.zarr/anysat/c/0/1/1").unlink()
        same(emb.chunk(chunks).anysat.to_zarr(tmp_path / "area.zarr"), emb)
        assert files(tmp_path) == before
    (tmp_path / "area.zarr/anysat/c/0/1/1").unlink()
    same(emb.compute().anysat.to_zarr(tmp_path / "area.zarr"), emb)
    assert files(tmp_path) == before


def test_the_scheduler_that_is_set_writes_the_same(tmp_path: Path) -> None:
    emb, seen = embeddings(), []
    emb.anysat.to_zarr(tmp_path / "a" / "area.zarr", "int8")
    with dask.config.set(scheduler="synchronous"):
        emb.anysat.to_zarr(tmp_path / "b" / "area.zarr", "int8", progress=lambda *n: seen.append(n))
    assert files(tmp_path / "b") == files(tmp_path / "a")
    assert seen == [(n, 9) for n in range(10)]


def test_no_resume(tmp_path: Path) -> None:
    emb = embeddings()
    emb.anysat.to_zarr(tmp_path / "area.zarr", resume=False)
    before = files(tmp_path)
    with pytest.raises(
        StoreError, match=r"a store exists at .*area\.zarr', and resume=False: pass resume=True"
    ):
        emb.anysat.to_zarr(tmp_path / "area.zarr", resume=False)
    assert files(tmp_path) == before


def test_where_the_file_system_has_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAT and many a FUSE: zarr's way to write a file only where there is none does not work there."""

    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    emb = embeddings()
    same(emb.anysat.to_zarr(tmp_path / "area.zarr"), emb)
    same(emb.anysat.to_zarr(tmp_path / "area.zarr"), emb)


# ---------------------------------------------------------------------- refused


def embedded(cube: xr.DataArray | None = None, **options: Any) -> xr.DataArray:
    cube = small_cube(height=12, width=12) if cube is None else cube
    options = {
        "frames": 3,
        "period": "2022",
        "norm": "pastis",
        "patch_size": 20,
        "tile": 6,
        **TINY,
        **options,
    }
    return cube.chunk(time=3).anysat.embed(**options)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, formula_tiny: Path) -> Path:
    """A store of `embedded`, with weights from a file; nothing may change it."""
    path = tmp_path_factory.mktemp("begun") / "area.zarr"
    embedded(weights=formula_tiny).anysat.to_zarr(path)
    return path


def moved(**place: Any) -> xr.DataArray:
    return small_cube(height=12, width=12, **place)


def other_day() -> xr.DataArray:
    """As many acquisitions in each bin of the same period, one of them a day later."""
    cube = small_cube(height=12, width=12)
    days = cube["time"].values.copy()
    days[4] += np.timedelta64(1, "D")
    return cube.assign_coords(time=days)


def listed(name: str) -> xr.DataArray:
    """A cube as of a catalog, one of whose many items is called `name`."""
    cube = small_cube(height=12, width=12)
    when = {"datetime": "2022-03-04T10:20:30Z", "used": True}
    items = [{"id": f"S2A_{i:04}" if i != 40 else name} | when for i in range(80)]
    return cube.assign_attrs(catalog="https://example.com", items=json.dumps(items))


OTHERS: dict[str, tuple[Callable[..., Any], str]] = {
    "frames": (lambda **o: embedded(frames=4, **o), "doy0_values is .*frames.frames is 3 in the store and 4 here"),
    "period": (lambda **o: embedded(period="2022-04", frames=1, **o), "temporal_window is .*2022-04-01/2022-05-01"),
    "reduce": (lambda **o: embedded(reduce="mean", **o), 'frames.reduce is "median" in the store and "mean" here'),
    "doy": (lambda **o: embedded(doy_base=1, **o), "doy_base is 0 in the store and 1 here"),
    "fill": (lambda **o: embedded(fill_value=0, **o), "frames.fill_value is null in the store and 0.0 here"),
    "norm": (lambda **o: embedded(norm="raw", **o), 'norm is "pastis" in the store and "raw" here'),
    "statistics": (
        lambda **o: embedded(norm=xr_anysat.Statistics(range(10), range(1, 11)), **o),
        'norm is "pastis" in the store and "statistics" here',
    ),
    "patch": (lambda **o: embedded(patch_size=30, **o), r"grid\.shape is \[256, 7, 7\] .*\[256, 5, 5\] here"),
    "tile": (lambda **o: embedded(tile=8, **o), "tile is 6 in the store and 8 here"),
    "output": (lambda **o: embedded(output="dense", **o), 'output is "patch" in the store and "dense" here'),
    "precision": (lambda **o: embedded(precision="bfloat16", **o), 'precision is "float32" in the store and "bf'),
    "model": (lambda **o: embedded(model="small", weights="random"), 'model is "tiny" in the store and "small"'),
    "weights": (lambda **o: embedded(weights=("random", 1)), r'weights is "\w{64}" in the store and "\w{64}" here'),
    "grid": (lambda **o: embedded(moved(col=60_007), **o), r"grid\.transform is \[20.*600040.*\] in the store and"),
    "CRS": (lambda **o: embedded(moved(crs="EPSG:32633"), **o), 'grid.crs is "EPSG:32632" in the .* "EPSG:32633" here'),
    "no CRS": (lambda **o: embedded(moved(crs=None), **o), 'grid.crs is "EPSG:32632" in the store and null here'),
    "area": (lambda **o: embedded(moved().isel(y=slice(11)), **o), r"grid\.shape is \[256, 7, 7\] in the store"),
    "dates": (lambda **o: embedded(frames=None, **o), "n_frames is 3 in the store and 9 here"),
    "acquisitions": (lambda **o: embedded(other_day(), **o), r"frames\.dates is .* in the store and .* here"),
    "items": (lambda **o: embedded(listed("S2A_0040"), **o), "source is null in the store and {"),
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_another_embedding_is_refused(other: str, begun: Path, formula_tiny: Path) -> None:
    make, says = OTHERS[other]
    before = files(begun.parent)
    started = "was started with different settings and cannot be resumed"
    with pytest.raises(StoreError, match=f"area.zarr' {started}: .*{says}"):
        make(weights=formula_tiny).anysat.to_zarr(begun)
    assert files(begun.parent) == before


@pytest.mark.parametrize(
    ("codec", "dtype", "says"),
    [
        ("int8", "float32", 'codec is null in the store and "int8" here'),
        (None, "float64", 'dtype is "float32" in'),
    ],
)
def test_another_codec_is_refused(codec: str | None, dtype: str, says: str, tmp_path: Path) -> None:
    embeddings().anysat.to_zarr(tmp_path / "area.zarr")
    with pytest.raises(StoreError, match=says):
        embeddings().astype(dtype).anysat.to_zarr(tmp_path / "area.zarr", codec)


def test_other_coordinates_are_refused(tmp_path: Path) -> None:
    emb = embeddings().assign_coords(tile_id="32UQD")
    emb.anysat.to_zarr(tmp_path / "area.zarr")
    other = emb.assign_coords(tile_id="33UUU")
    with pytest.raises(StoreError, match=r'coords.tile_id is "32UQD" in the store and "33UUU" here'):
        other.anysat.to_zarr(tmp_path / "area.zarr")
    more = emb.assign_coords(lon=(("y", "x"), np.zeros((20, 17))))
    with pytest.raises(StoreError, match=r'coords.lon is null in the store and \["y", "x"\] here'):
        more.anysat.to_zarr(tmp_path / "area.zarr")


def test_other_items_are_shown_where_they_differ(tmp_path: Path) -> None:
    embedded(listed("S2B_first")).anysat.to_zarr(tmp_path / "area.zarr")
    with pytest.raises(
        StoreError, match=r"source.items is .*S2B_first.* in the store and .*S2B_other.* here"
    ) as caught:
        embedded(listed("S2B_other")).anysat.to_zarr(tmp_path / "area.zarr")
    assert len(str(caught.value)) < 800


def test_a_module_cannot_be_told_from_another(tmp_path: Path) -> None:
    """A module has no hash, so only the same object resumes its embeddings."""
    first, second = (xr_anysat.load_model("tiny", weights=("random", i), device="cpu") for i in range(2))
    cube = small_cube(height=12, width=12).chunk(time=3)
    emb = cube.anysat.embed(2, norm="pastis", tile=6, model=first)
    back = emb.anysat.to_zarr(tmp_path / "area.zarr")
    same(emb.anysat.to_zarr(tmp_path / "area.zarr"), back)
    with pytest.raises(StoreError, match=r'weights is "module:.*" in the store and "module:.*" here'):
        cube.anysat.embed(2, norm="pastis", tile=6, model=second).anysat.to_zarr(tmp_path / "area.zarr")


def test_official_weights_are_the_same_before_and_after_their_download(tmp_path: Path) -> None:
    emb = embeddings().assign_attrs(weights="official", weights_sha256="not loaded yet")
    emb.anysat.to_zarr(tmp_path / "area.zarr")
    known = "ce124652" + "0" * 52 + "3d4f"
    emb.assign_attrs(weights_sha256=known).anysat.to_zarr(tmp_path / "area.zarr")
    emb.assign_attrs(weights="/data/AnySat.pth", weights_sha256=known).anysat.to_zarr(tmp_path / "area.zarr")
    with pytest.raises(StoreError, match='weights is "official" in the store and "aaaa'):
        emb.assign_attrs(weights="/data/mine.pth", weights_sha256="a" * 64).anysat.to_zarr(
            tmp_path / "area.zarr"
        )


@pytest.mark.slow
def test_what_changes_nothing_is_allowed(begun: Path, formula_tiny: Path, tmp_path: Path) -> None:
    """Weights of the same hash elsewhere, another device or batch, a cube in memory."""
    copied = shutil.copy(formula_tiny, tmp_path / f"copy{formula_tiny.suffix}")
    path = shutil.copytree(begun.parent, tmp_path / "store") / "area.zarr"
    want = xr_anysat.open(begun).compute()
    for emb in (
        embedded(weights=copied),
        embedded(weights=formula_tiny, device="cpu", batch=3),
        small_cube(height=12, width=12).anysat.embed(3, period="2022", norm="pastis", patch_size=20, tile=6,
                                                     model="tiny", weights=formula_tiny),
    ):  # fmt: skip
        for shard in (path / "anysat/c/0").rglob("*"):
            if shard.is_file():
                shard.unlink()
        same(emb.anysat.to_zarr(path), want)


def test_a_crs_written_another_way_is_the_same(tmp_path: Path) -> None:
    emb = embeddings()
    emb.anysat.to_zarr(tmp_path / "area.zarr")
    wkt = emb.odc.crs.to_wkt("WKT1_GDAL")
    assert wkt != emb.spatial_ref.attrs["spatial_ref"]
    older = emb.assign_coords(spatial_ref=emb.spatial_ref.assign_attrs(spatial_ref=wkt, crs_wkt=wkt))
    same(older.anysat.to_zarr(tmp_path / "area.zarr"), emb)


def test_another_version_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emb = embedded()
    emb.anysat.to_zarr(tmp_path / "area.zarr")
    real = xr_anysat.record.versions()
    monkeypatch.setattr("xr_anysat.record.versions", lambda: {**real, "torch": "9.9"})
    with pytest.warns(
        AnySatWarning, match=rf"was started with torch {real['torch'].partition('+')[0]}.* and now 9\.9"
    ):
        embedded().anysat.to_zarr(tmp_path / "area.zarr")


def folder_of_others(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("mine")


NO_STORES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "other files": (
        folder_of_others,
        r"contains other files, but not what emb\.anysat\.to_zarr\(\.\.\.\) writes",
    ),
    "plain Zarr": (
        lambda path: embeddings(chunks=None).to_dataset().to_zarr(path, zarr_format=3),
        r"contains a Zarr store, but not .*xarray\.open_zarr opens any",
    ),
    "Zarr 2": (
        lambda path: embeddings(chunks=None).to_dataset().to_zarr(path, zarr_format=2),
        "contains other files",
    ),
    "a file": (
        lambda path: path.write_text("mine"),
        "is a file: expected a folder, or a path where nothing exists",
    ),
    "no JSON": (
        lambda path: (path.mkdir(), (path / "zarr.json").write_text("{")),
        "is damaged or was not written by to_zarr: Expecting property name",
    ),
}


@pytest.mark.parametrize("kind", NO_STORES)
def test_what_is_no_store(kind: str, tmp_path: Path) -> None:
    make, says = NO_STORES[kind]
    make(tmp_path / "area.zarr")
    before = files(tmp_path)
    for call in (embeddings().anysat.to_zarr, xr_anysat.open):
        with pytest.raises(StoreError, match=says):
            call(tmp_path / "area.zarr")
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("store", "options", "error", "says"),
    [
        ("", {}, OptionError, "store='': expected a path, a URL or a store of zarr"),
        (None, {}, OptionError, "store=None: expected a path"),
        (3, {}, OptionError, "store=3: expected a path"),
        (b"area.zarr", {}, OptionError, "store=b'area.zarr': expected a path"),
        (
            "area.zarr",
            {"storage_options": {"key": "k"}},
            OptionError,
            r"storage_options=\['key'\] and .*for URLs",
        ),
        (MemoryStore(), {"storage_options": {"key": "k"}}, OptionError, "these options are only for URLs"),
        (
            "what://bucket/area",
            {},
            StoreError,
            "'what://bucket/area' cannot be opened: Protocol not known: what",
        ),
        ("gs://bucket/area", {}, StoreError, r"cannot be opened: .*gcsfs.*ObjectStore\(obstore"),
    ],
)
def test_what_is_no_place(store: Any, options: Any, error: type[AnySatError], says: str) -> None:
    for call in (embeddings().anysat.to_zarr, xr_anysat.open):
        with pytest.raises(error, match=says):
            call(store, **options)


def test_nothing_to_open(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "area.zarr"):
        with pytest.raises(StoreError, match=r"there is no store at .*: expected what emb\.anysat\.to_zarr"):
            xr_anysat.open(path)
    assert not (tmp_path / "area.zarr").exists()


@pytest.mark.parametrize(
    ("make", "codec", "error", "says"),
    [
        (embeddings, "int4", OptionError, r"codec='int4': expected None \(unchanged\), 'float16'.*or 'int8'"),
        (embeddings, 8, OptionError, "codec=8: expected None"),
        (lambda: embeddings(gaps=0).astype("int16"), None, CubeError, r"int16 and codec=None.*astype\('float32'\)"),
        (lambda: embeddings(dtype="float64"), "int8", CubeError, "float64 and codec='int8': expected float32"),
        (lambda: embeddings().isel(y=slice(0)), None, CubeError, r"\(3, 0, 17\): expected at least one cell"),
        (lambda: embeddings().assign_coords(scale=2), None, CubeError, "coordinate 'scale': this name"),
        (lambda: embeddings().assign_coords(anysat=2), None, CubeError, "coordinate 'anysat'"),
        (lambda: embeddings().assign_attrs(_FillValue=0, add_offset=1), None, CubeError,
         r"attribute '_FillValue', attribute 'add_offset': .*emb\.attrs\.pop"),
        (small_cube, None, CubeTypeError, r"dims \('time', 'band', 'y', 'x'\): .*embed\(frames=8\)\.anysat\.to_zarr"),
        (lambda: small_cube().anysat.frames(2), None, CubeTypeError, "call embed"),
        (lambda: embeddings().transpose("y", "x", "D"), None, CubeTypeError, r"emb\.transpose\('D', 'y', 'x'\)"),
        (lambda: embeddings().anysat.pool(), None, CubeTypeError, r"one vector \(D,\), the result of pool="),
        (lambda: embeddings().to_dataset(), None, CubeTypeError, r"dataset\['anysat'\]\.anysat\.to_zarr"),
        (lambda: embeddings().isel(x=0), None, CubeTypeError, r"dims \('D', 'y'\)"),
    ],
)  # fmt: skip
def test_what_is_no_embedding(
    make: Callable[[], Any], codec: Any, error: type[AnySatError], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        make().anysat.to_zarr(tmp_path / "area.zarr", codec)
    assert not list(tmp_path.iterdir())


def test_what_is_no_array_at_all(tmp_path: Path) -> None:
    with pytest.raises(CubeTypeError, match=r"a ndarray with dims \(\)"):
        xr_anysat.to_zarr(np.zeros((3, 4, 5), "float32"), tmp_path / "area.zarr")


# ---------------------------------------------------------------------- laziness


class Watched(WrapperStore):
    """A store that puts down what is got from it."""

    def __init__(self, store: Any, got: list[tuple[str, Any]]) -> None:
        super().__init__(store)
        self.got = got

    def with_read_only(self, read_only: bool = False) -> Watched:
        return Watched(self._store.with_read_only(read_only), self.got)

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        value = await super().get(key, prototype, byte_range)
        self.got.append((key, 0 if value is None else len(value)))
        return value


def test_open_reads_no_blocks(tmp_path: Path) -> None:
    emb = embeddings((64, 80, 80), (64, 40, 40), gaps=0)
    emb.anysat.to_zarr(tmp_path / "area.zarr")
    got: list[tuple[str, int]] = []
    back = xr_anysat.open(Watched(LocalStore(tmp_path / "area.zarr"), got))
    assert got
    assert not [key for key, _ in got if key.startswith("anysat/c")]
    got.clear()
    np.testing.assert_array_equal(back.isel(y=[50], x=[3]), emb.isel(y=[50], x=[3]))
    assert {key for key, size in got if size} == {"anysat/c/0/1/0"}


def test_building_a_store_reads_no_blocks_back(tmp_path: Path) -> None:
    """The names of files alone show which blocks are finished."""
    emb = embeddings()
    got: list[tuple[str, int]] = []
    emb.anysat.to_zarr(Watched(LocalStore(tmp_path / "area.zarr"), got))
    assert not [key for key, size in got if key.startswith("anysat/c") and size]
    got.clear()
    emb.anysat.to_zarr(Watched(LocalStore(tmp_path / "area.zarr"), got))
    assert not [key for key, _ in got if key.startswith("anysat/c")]


@pytest.mark.slow
def test_a_fresh_interpreter_stores_and_opens(tmp_path: Path) -> None:
    """Nothing but xr_anysat imported; and that alone imports nothing that is only needed to store."""
    code = f"""
import sys, numpy as np, xarray as xr, xr_anysat
heavy = {{"zarr", "obstore", "s3fs", "fsspec.asyn", "numcodecs", "torch", "distributed", "rasterio", "pyproj"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
emb = xr.DataArray(np.ones((4, 2, 3), "float32"), dims=("D", "y", "x"), coords={{"y": [2.0, 1.0], "x": [0.0, 1, 2]}})
emb.anysat.to_zarr({str(tmp_path / "area.zarr")!r}, "int8")
assert xr_anysat.open({str(tmp_path / "area.zarr")!r}).equals(emb)
assert not {{"obstore", "s3fs", "torch"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------- writes that fail


def test_a_full_disk(tmp_path: Path) -> None:
    """The operating system refuses files beyond a size; what was finished before stays."""
    emb = embeddings((64, 200, 200), (64, 100, 100), gaps=0)
    emb[:, :100, :100] = 0  # a block that takes no room
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with (
            dask.config.set(scheduler="synchronous"),
            pytest.raises(
                WriteError, match=r"area\.zarr' could not be written: OSError: .*File too large.*repeat"
            ),
        ):
            emb.anysat.to_zarr(tmp_path / "a" / "area.zarr", progress=None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.rglob("*.partial"))
    left = shards(tmp_path / "a" / "area.zarr")
    assert left <= {"0/0/0"}
    emb, computed = counted(emb)
    emb.anysat.to_zarr(tmp_path / "a" / "area.zarr")
    assert len(computed) == 4 - len(left)
    emb.anysat.to_zarr(tmp_path / "b" / "area.zarr")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(WriteError, match=r"notes\.txt' is a file, expected a folder\. .*give another path"):
        embeddings().anysat.to_zarr(tmp_path / "notes.txt" / "area.zarr")
    with pytest.raises(WriteError, match=r"'/proc/areas' cannot be created in the folder '/proc' \(\w+Error"):
        embeddings().anysat.to_zarr("/proc/areas/area.zarr")
    if os.geteuid():  # root writes everywhere
        with pytest.raises(
            WriteError, match=r"no permission to write into the folder '/', or its file system"
        ):
            embeddings().anysat.to_zarr("/areas/area.zarr")


def test_a_disk_that_is_full_is_named(tmp_path: Path) -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    problem = folder_problem(tmp_path, error)
    assert re.fullmatch(
        rf"the disk or the quota of the folder '{tmp_path}' is full \(.*B free.*\)", str(problem)
    )
    assert folder_problem(tmp_path, OSError(errno.EIO, "Input/output error")) is None


def test_a_store_that_is_read_only(tmp_path: Path) -> None:
    (tmp_path / "area.zarr").mkdir()
    with pytest.raises(
        WriteError, match="could not be written: ValueError: store was opened in read-only mode"
    ):
        embeddings().anysat.to_zarr(LocalStore(tmp_path / "area.zarr", read_only=True))


def test_a_store_that_is_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "area.zarr"

    def delete(finished: int, total: int) -> None:
        if finished == 3:
            shutil.rmtree(path)

    with (
        dask.config.set(scheduler="synchronous"),
        pytest.raises((WriteError, StoreError), match=r"could not be written|disappeared"),
    ):
        embeddings().anysat.to_zarr(path, progress=delete)
    shutil.rmtree(path, ignore_errors=True)
    same(embeddings().anysat.to_zarr(path), embeddings())


# ---------------------------------------------------------------------- two at once

TWICE = """
import sys, time
from pathlib import Path
import dask.array as da, numpy as np, xarray as xr, xr_anysat

me, folder = sys.argv[1], Path(sys.argv[2])

def slow(block):
    time.sleep(0.01)
    return block

def meet(name):
    (folder / f"{name}.{me}").touch()
    while len(list(folder.glob(f"{name}.*"))) < 2:
        time.sleep(0.001)

def store(path, **attrs):
    values = np.random.default_rng(0).normal(size=(4, 40, 40)).astype("float32")
    data = da.from_array(values, chunks=(4, 8, 8)).map_blocks(slow, dtype="float32")
    emb = xr.DataArray(data, dims=("D", "y", "x"), attrs=attrs)
    try:
        emb.anysat.to_zarr(path, "int8")
        return "written"
    except xr_anysat.StoreError as error:
        assert "was started with different settings" in str(error), error
        return "refused"

for turn in range(2):
    for kind, attrs in (("same", {}), ("other", {"norm": me})):
        meet(f"{kind}{turn}")
        print(kind, turn, store(folder / kind / f"area{turn}.zarr", **attrs), flush=True)
"""


@pytest.mark.slow
def test_two_processes_at_once(tmp_path: Path) -> None:
    """Of the same embedding: both succeed. Of two: one is refused, and the store is all of the other."""
    running = [
        subprocess.Popen([sys.executable, "-c", TWICE, me, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for me in ("first", "second")
    ]
    said = [process.communicate(timeout=120)[0].split("\n")[:-1] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    for turn in range(2):
        assert {f"same {turn} written"} == {
            line for lines in said for line in lines if f"same {turn}" in line
        }
        ends = [line for lines in said for line in lines if f"other {turn}" in line]
        assert sorted(ends) == [f"other {turn} refused", f"other {turn} written"]
        winner = "first" if f"other {turn} written" in said[0] else "second"
        assert xr_anysat.open(tmp_path / "other" / f"area{turn}.zarr").attrs["norm"] == winner
        same, other = (files(tmp_path / kind / f"area{turn}.zarr") for kind in ("same", "other"))
        for stored in (same, other):
            assert not [name for name in stored if name.endswith(".partial")]
        assert {k: v for k, v in same.items() if "/c/" in k} == {k: v for k, v in other.items() if "/c/" in k}


def test_a_run_that_begins_while_another_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    emb, path = embeddings(), tmp_path / "area.zarr"
    real = xr_anysat.store.identity.is_empty

    def look(root: Any) -> bool:
        monkeypatch.undo()
        emb.anysat.to_zarr(path)
        return real(root)

    monkeypatch.setattr("xr_anysat.store.identity.is_empty", look)
    same(emb.anysat.to_zarr(path), emb)


def test_a_run_that_finishes_clears_away_the_draft_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emb, path = embeddings(), tmp_path / "area.zarr"
    real, held = pathlib.Path.replace, threading.Event()

    def replace(draft: Path, final: Path) -> Path:
        if not held.is_set():  # a draft exists: let another run start, finish and clean up
            held.set()
            emb.anysat.to_zarr(path)
        return real(draft, final)

    monkeypatch.setattr(pathlib.Path, "replace", replace)
    with dask.config.set(scheduler="synchronous"):
        same(emb.anysat.to_zarr(path), emb)
    assert held.is_set()


# ---------------------------------------------------------------------- S3


def place_of(kind: str, url: str, name: str) -> tuple[Any, dict[str, Any]]:
    """Store and options for `to_zarr` and `open`, by s3fs or by obstore."""
    if kind == "s3fs":
        return f"s3://bucket/{name}", {"storage_options": storage_options(url)}
    return object_store(url, "bucket", name), {}


def objects(s3: S3Server, name: str) -> dict[str, bytes]:
    store = object_store(s3.url, "bucket", name).store
    return {o["path"]: bytes(store.get(o["path"]).bytes()) for page in store.list() for o in page}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["s3fs", "obstore"])
def test_s3(kind: str, s3: S3Server, tmp_path: Path) -> None:
    emb, computed = counted(embedded())
    store, options = place_of(kind, s3.url, f"{kind}/area.zarr")
    emb.anysat.to_zarr(tmp_path / "area.zarr", "int8")
    wanted = files(tmp_path / "area.zarr")
    want = xr_anysat.open(tmp_path / "area.zarr").compute()
    same(emb.anysat.to_zarr(store, "int8", **options), want)
    same(xr_anysat.open(store, **options), want)
    stored = objects(s3, f"{kind}/area.zarr")
    assert {k: stored[k] for k in wanted} == wanted
    item = objects(s3, "s3fs")["area.stac.json"] if kind == "s3fs" else stored["stac.json"]
    if kind == "s3fs":
        assert item == (tmp_path / "area.stac.json").read_bytes()
    assert json.loads(item)["stac_version"]

    shard = min(k for k in wanted if k.startswith("anysat/c"))
    object_store(s3.url, "bucket", f"{kind}/area.zarr").store.delete(shard)
    with pytest.warns(AnySatWarning, match="1 of .* blocks of .* are not finished"):
        xr_anysat.open(store, **options)
    computed.clear()
    same(emb.anysat.to_zarr(store, "int8", **options), want)
    assert len(computed) == 1
    assert objects(s3, f"{kind}/area.zarr") == stored
    with pytest.raises(StoreError, match='norm is "pastis" in the store and "raw" here'):
        embedded(norm="raw").anysat.to_zarr(store, "int8", **options)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "status"), [("s3fs", 403), ("obstore", 507)])
def test_s3_refuses_writes(kind: str, status: int, s3: S3Server) -> None:
    """Once, in the middle; then the same call finishes."""
    emb, computed = counted(embeddings())
    name = f"{kind}-{status}.zarr"
    with Gate(s3.url, lambda method, path: status if method == "PUT" and "c/0/1/1" in path else None) as gate:
        store, options = place_of(kind, gate.url, name)
        with (
            dask.config.set(scheduler="synchronous"),
            pytest.raises(
                WriteError, match=r"could not be written: .*(Forbidden|Insufficient Storage).* repeat"
            ) as caught,
        ):
            emb.anysat.to_zarr(store, **options)
        assert "\n" not in str(caught.value)
        left = objects(s3, name)
        computed.clear()
        gate.answer = lambda method, path: None
        gate.requests.clear()
        same(emb.anysat.to_zarr(store, **options), embeddings())
    missing = 9 - sum(key.startswith("anysat/c") for key in left)
    assert len(computed) == missing
    put = [path for method, path in gate.requests if method == "PUT" and "/anysat/c/" in path]
    assert len(put) == missing  # each shard by one request
    whole, options = place_of(kind, s3.url, f"whole-{name}")
    emb.anysat.to_zarr(whole, **options)
    assert objects(s3, name) == objects(s3, f"whole-{name}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["s3fs", "obstore"])
def test_what_others_have_written_since_is_seen(kind: str, s3: S3Server) -> None:
    """File systems of fsspec remember listings, a thread each: a block missing then must not be missing now."""
    store, options = place_of(kind, s3.url, f"{kind}-since.zarr")
    with dask.config.set(scheduler="synchronous"), pytest.raises(RuntimeError, match="far enough"):
        embeddings().anysat.to_zarr(store, progress=stop_after(4), **options)
    with pytest.warns(AnySatWarning, match="5 of 9 blocks"):
        begun = xr_anysat.open(store, **options)
    assert np.isnan(begun).any()
    with dask.config.set(scheduler="threads"):
        back = embeddings().anysat.to_zarr(store, **options)
    with dask.config.set(scheduler="synchronous"):  # by the thread that has listed it
        same(back, embeddings())
        same(begun, embeddings())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["s3fs", "obstore"])
def test_s3_cannot_be_read(kind: str, s3: S3Server) -> None:
    with Gate(s3.url, lambda method, path: 403) as gate:
        store, options = place_of(kind, gate.url, "area.zarr")
        for call in (embeddings().anysat.to_zarr, xr_anysat.open):
            with pytest.raises(StoreError, match=r"cannot be read: Permission.*Check the address, rights"):
                call(store, **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["s3fs", "obstore"])
def test_two_at_once_on_s3(kind: str, s3: S3Server) -> None:
    """Both have seen an empty location; the second to write is refused, although the first has continued since."""
    name = f"{kind}-twice.zarr"
    both, gone_on = threading.Barrier(2, timeout=60), threading.Event()

    def hold(method: str, path: str) -> None:
        if method == "PUT" and path.split("?")[0].endswith(f"/{name}/zarr.json"):
            if both.wait() == 1:
                assert gone_on.wait(60)
        elif "/x/zarr.json" in path:
            gone_on.set()

    embs = {norm: embeddings(seed=len(norm)).assign_attrs(norm=norm) for norm in ("raw", "pastis")}
    ends: dict[str, Any] = {}

    def store(norm: str) -> None:
        place, options = place_of(kind, gate.url, name)
        try:
            ends[norm] = embs[norm].anysat.to_zarr(place, **options)
        except StoreError as error:
            ends[norm] = error

    with Gate(s3.url, hold) as gate:
        writers = [threading.Thread(target=store, args=(norm,)) for norm in embs]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        written = [path for method, path in gate.requests if method == "PUT" and "/anysat/c/" in path]
    (winner,) = (norm for norm, end in ends.items() if isinstance(end, xr.DataArray))
    (refused,) = (end for end in ends.values() if isinstance(end, StoreError))
    assert "was started with different settings" in str(refused)
    assert len(written) == 9  # none of them by the other
    place, options = place_of(kind, s3.url, name)
    same(xr_anysat.open(place, **options), embs[winner])


@pytest.mark.slow
def test_the_root_of_a_bucket(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    s3.bucket("whole")
    options = {"storage_options": storage_options(s3.url)}
    emb = embedded()
    same(emb.anysat.to_zarr("s3://whole", **options), emb)
    assert "stac.json" in [o["path"] for page in object_store(s3.url, "whole", "").store.list() for o in page]
    emb.anysat.to_zarr("memory://area.zarr")
    assert not list(tmp_path.iterdir())  # nothing falls beside
    s3.bucket("taken")
    object_store(s3.url, "taken", "").store.put("letter.txt", b"dear")
    with pytest.raises(StoreError, match="'s3://taken' contains other files"):
        emb.anysat.to_zarr("s3://taken", **options)


def test_secrets_stay_out_of_messages_and_logs(s3: S3Server) -> None:
    target = xr_anysat.store.location.parse_location(
        "s3://bucket/area.zarr", storage_options(s3.url) | {"secret": "hush"}
    )
    assert "hush" not in repr(target)
    with pytest.raises(OptionError) as caught:
        xr_anysat.open("area.zarr", storage_options={"secret": "hush"})
    assert "hush" not in str(caught.value)


# ---------------------------------------------------------------------- a cluster


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["s3fs", "obstore", "folder"])
def test_from_a_cluster(kind: str, client: Any, s3: S3Server, tmp_path: Path) -> None:
    """Workers get the store, not its data; it is resumed and opened there."""
    emb = embeddings()
    emb.anysat.to_zarr(tmp_path / "area.zarr", "int8")
    want = files(tmp_path / "area.zarr")
    name = f"cluster-{kind}.zarr"
    store, options = (tmp_path / "c.zarr", {}) if kind == "folder" else place_of(kind, s3.url, name)
    seen: list[tuple[int, int]] = []
    back = emb.anysat.to_zarr(store, "int8", progress=lambda *n: seen.append(n), **options)
    total = seen[0][1]
    assert seen == [(n, total) for n in range(total + 1)]
    stored = files(tmp_path / "c.zarr") if kind == "folder" else objects(s3, name)
    assert {k: stored[k] for k in want} == want
    same(back, xr_anysat.open(tmp_path / "area.zarr"))

    seen.clear()
    emb.anysat.to_zarr(store, "int8", progress=lambda *n: seen.append(n), **options)
    assert seen == [(total, total)]


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["per_tile_zscore", "unit_scale"])
def test_the_graph_of_a_cube_makes_no_difference_on_a_cluster(norm: str, client: Any, tmp_path: Path) -> None:
    emb = lazy_embedding(norm)
    emb.anysat.to_zarr(tmp_path / "plain" / "area.zarr")
    for change in ("persisted", "optimized"):
        SAME_WAY[change](emb).anysat.to_zarr(tmp_path / change / "area.zarr")
        assert files(tmp_path / change) == files(tmp_path / "plain")


@pytest.mark.slow
def test_a_refused_write_on_a_cluster(client: Any, s3: S3Server) -> None:
    with Gate(s3.url, lambda method, path: 403 if method == "PUT" and "c/0/1/1" in path else None) as gate:
        store, options = place_of("obstore", gate.url, "cluster-refused.zarr")
        with pytest.raises(WriteError, match="could not be written: PermissionDeniedError") as caught:
            embeddings().anysat.to_zarr(store, **options)
    assert "of the 9 blocks" in caught.value.__notes__[-1]
    store, options = place_of("obstore", s3.url, "cluster-refused.zarr")
    same(embeddings().anysat.to_zarr(store, **options), embeddings())

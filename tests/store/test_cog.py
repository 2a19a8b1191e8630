"""Embeddings in the files of others: Cloud Optimized GeoTIFF, NetCDF, plain Zarr."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import rasterio
import xarray as xr
from odc.geo.crs import CRS
from support.cubes import small_cube

import xr_anysat
from xr_anysat.store import cog

TINY = {"model": "tiny", "weights": "random"}


def embedding(**options: Any) -> xr.DataArray:
    """A lazy embedding on the grid's lattice, whose first blocks are cut, with a hole."""
    cube = small_cube(height=26, width=28).astype("float32")
    cube[:, :, 8:15, :9] = np.nan
    made: xr.DataArray = cube.chunk(time=3, y=13, x=14).anysat.embed(
        3, tile=8, anchor="grid", norm="pastis", **TINY, **options
    )
    return made


def wide(height: int = 700, width: int = 1100, channels: int = 2) -> xr.DataArray:
    """Values on a grid larger than a tile of the file, with holes of one cell and of many."""
    import odc.geo.xr  # noqa: F401

    rng = np.random.default_rng(0)
    values = rng.standard_normal((channels, height, width)).astype("float32")
    values[:, rng.random((height, width)) < 0.2] = np.nan
    values[:, 100:200, 300:500] = np.nan
    coords = {"y": 5e6 - 10.0 * np.arange(height) - 5, "x": 6e5 + 10.0 * np.arange(width) + 5}
    return xr.DataArray(values, dims=("D", "y", "x"), coords=coords).odc.assign_crs("EPSG:32632")


def wide_without_crs() -> xr.DataArray:
    emb = wide()
    return xr.DataArray(emb.values, dims=emb.dims, coords={k: emb[k].values for k in ("y", "x")})


@pytest.mark.slow
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("bands", [None, [7, 0, 255], np.array([3])])
def test_cog_holds_the_embedding(bands: Any, lazy: bool, tmp_path: Path) -> None:
    emb = embedding(patch_size=20)
    assert len(set(emb.chunks[1])) > 1
    assert np.isnan(emb.values).any()
    path = (emb if lazy else emb.compute()).anysat.to_cog(tmp_path / "area.tif", bands=bands)
    assert path == tmp_path / "area.tif"
    assert "channels" not in emb.attrs
    channels = range(256) if bands is None else [int(b) for b in bands]
    with rasterio.open(path) as file:
        np.testing.assert_array_equal(file.read(), emb.values[list(channels)])
        assert set(file.dtypes) == {"float32"}
        assert np.isnan(file.nodata)
        assert file.transform == emb.odc.geobox.transform
        assert CRS(file.crs) == emb.odc.crs
        assert file.crs.to_epsg() == 32632
        assert file.descriptions == tuple(str(c) for c in channels)
        assert file.tags()["config"] == emb.attrs["config"]
        assert json.loads(file.tags()["frame_dates"]) == emb.attrs["frame_dates"]
        assert json.loads(file.tags()["channels"]) == list(channels)
    assert [p.name for p in tmp_path.iterdir()] == ["area.tif"]


def test_cog_is_tiled_with_overviews_of_what_is_valid(tmp_path: Path) -> None:
    emb = wide()
    path = emb.anysat.to_cog(str(tmp_path / "area.TIFF"))
    with rasterio.open(path) as file:
        np.testing.assert_array_equal(file.read(), emb.values)
        assert file.block_shapes == [(512, 512)] * 2
        assert file.profile["interleave"] == "band"
        assert file.overviews(1) == [2, 4]
    for level, factor in enumerate((2, 4)):
        cells = emb.values[:, : 700 // factor * factor, : 1100 // factor * factor]
        cells = cells.reshape(2, 700 // factor, factor, 1100 // factor, factor)
        empty = np.isnan(cells).all((2, 4))
        with rasterio.open(path, overview_level=level) as file:
            seen = file.read()
        np.testing.assert_array_equal(np.isnan(seen), empty)
        if factor == 2:  # further ones are means of means
            counts = np.maximum(np.isfinite(cells).sum((2, 4)), 1)
            mean = np.where(empty, np.nan, np.nansum(cells, (2, 4)) / counts)
            np.testing.assert_allclose(seen, mean, atol=1e-6)


def test_cog_has_its_parts_in_the_order_of_a_cog(tmp_path: Path) -> None:
    """All directories come before all pixels, and the overviews' pixels before the full ones."""
    path = wide().anysat.to_cog(tmp_path / "area.tif")
    with rasterio.open(path) as file:
        directories = [int(file.get_tag_item("IFD_OFFSET", "TIFF", bidx=1))]
        pixels = [int(file.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", bidx=1))]
        for overview in (0, 1):
            directories.append(int(file.get_tag_item("IFD_OFFSET", "TIFF", bidx=1, ovr=overview)))
            pixels.append(int(file.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", bidx=1, ovr=overview)))
    assert directories[0] < 300
    assert directories == sorted(directories)
    assert directories[-1] < min(pixels)
    assert pixels == sorted(pixels, reverse=True)


@pytest.mark.parametrize(
    ("change", "path", "bands", "kind", "message"),
    [
        (lambda e: e, "area.tif", [256], xr_anysat.OptionError, r"256 among bands=: expected channels from 0 to 255"),
        (lambda e: e, "area.tif", [-1], xr_anysat.OptionError, r"-1 among bands=: .*bands=\[0, 1, 2\]"),
        (lambda e: e, "area.tif", [True], xr_anysat.OptionError, "True among bands="),
        (lambda e: e, "area.tif", [1.0], xr_anysat.OptionError, r"1\.0 among bands="),
        (lambda e: e, "area.tif", [4, 2, 4], xr_anysat.OptionError, r"\[4\] twice among bands=.*each once"),
        (lambda e: e, "area.tif", [], xr_anysat.OptionError, r"bands=\[\]: expected channels .* or None for all"),
        (lambda e: e, "area.tif", 3, xr_anysat.OptionError, "bands=3: expected channels"),
        (lambda e: e, "area.tif", "012", xr_anysat.OptionError, "bands='012': expected channels"),
        (lambda e: e, "area.png", None, xr_anysat.OptionError, r"area\.png'.* ends in \.tif or \.tiff"),
        (lambda e: e, "s3://bucket/area.tif", None, xr_anysat.OptionError, "a file of this machine"),
        (lambda e: e, "no/area.tif", None, xr_anysat.WriteError, r"'.*no' .*does not exist.*mkdir"),
        (lambda e: wide().drop_vars(["spatial_ref", "y"]), "area.tif", None, xr_anysat.CubeError, "without y and x"),
        (lambda e: wide_without_crs(), "area.tif", None, xr_anysat.CubeError, r"without a CRS.*assign_crs"),
        (lambda e: e.mean(("y", "x")), "area.tif", None, xr_anysat.CubeTypeError, r"one vector \(D,\).*to_cog\('area"),
        (lambda e: e.to_dataset(), "area.tif", None, xr_anysat.CubeTypeError, r"dataset\['anysat'\]\.anysat\.to_cog"),
        (lambda e: small_cube(), "area.tif", None, xr_anysat.CubeTypeError, r"call embed\(\) first"),
    ],
)  # fmt: skip
def test_what_is_refused(
    change: Callable[[Any], Any], path: str, bands: Any, kind: type[Exception], message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    emb = embedding()
    with pytest.raises(kind, match=message):
        change(emb).anysat.to_cog(path, bands=bands)
    assert not any(tmp_path.iterdir())


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "area.tif"
    path.write_bytes(b"mine")
    with pytest.raises(xr_anysat.WriteError, match=r"exists and is not overwritten.*unlink\(\)"):
        embedding().anysat.to_cog(path)
    assert path.read_bytes() == b"mine"


def test_rasterio_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(xr_anysat.AnySatError, match="pip install 'rasterio"):
        embedding().anysat.to_cog(tmp_path / "area.tif")


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """The system refuses to write a file beyond `size` bytes, as a full disk does."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))


@pytest.mark.parametrize("when", ["_write", "_optimize"])
@pytest.mark.parametrize("size", [5000, 1_000_000])
def test_a_full_disk_leaves_no_file(
    when: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = getattr(cog, when)

    def on_a_full_disk(*args: Any) -> None:
        with files_end_at(size):
            step(*args)

    monkeypatch.setattr(cog, when, on_a_full_disk)
    with pytest.raises(xr_anysat.WriteError, match=r"area\.tif' could not be written: .*give another path"):
        wide().anysat.to_cog(tmp_path / "area.tif")
    assert not any(tmp_path.iterdir())


def test_values_that_cannot_be_read_again_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = cog._optimize

    def swapped(plain: Path, path: Path) -> None:
        step(plain, path)
        with rasterio.open(path, "r+", IGNORE_COG_LAYOUT_BREAK="YES") as file:
            file.write(np.zeros((1, 1), "float32"), 2, window=((600, 601), (1000, 1001)))

    monkeypatch.setattr(cog, "_optimize", swapped)
    with pytest.raises(xr_anysat.WriteError, match="band 2 reads differently from what was written"):
        wide().anysat.to_cog(tmp_path / "area.tif")
    assert not any(tmp_path.iterdir())


def test_what_was_computed_outlives_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = embedding()
    runs = []

    def counted(block: np.ndarray) -> np.ndarray:
        runs.append(block.shape)
        return block

    data = da.map_blocks(counted, whole.data, dtype=np.float32, meta=np.empty((0, 0, 0), np.float32))
    emb = whole.copy(data=data)
    with monkeypatch.context() as patch:
        patch.setattr(cog, "_write", lambda *_: (_ for _ in ()).throw(OSError("no space")))
        with pytest.raises(xr_anysat.WriteError, match="OSError: no space"):
            emb.anysat.to_cog(tmp_path / "area.tif", bands=[1, 2])
    assert len(runs) == data.npartitions
    assert not (tmp_path / "area.tif").exists()
    with pytest.raises(xr_anysat.StoreError, match="channels"):  # it is not taken for that of other bands
        emb.anysat.to_cog(tmp_path / "area.tif", bands=[2, 1])
    path = emb.anysat.to_cog(tmp_path / "area.tif", bands=[1, 2])
    assert len(runs) == data.npartitions
    with rasterio.open(path) as file:
        np.testing.assert_array_equal(file.read(), whole.values[[1, 2]])
    assert [p.name for p in tmp_path.iterdir()] == ["area.tif"]


# ---------------------------------------------------------------------- NetCDF and plain Zarr


@pytest.mark.parametrize("engine", ["netcdf4", "h5netcdf", "zarr"])
@pytest.mark.parametrize("frames", [1, 3])
def test_attrs_survive_other_files(engine: str, frames: int, tmp_path: Path) -> None:
    cube = small_cube(height=12, width=12)
    emb = cube.anysat.embed(frames, norm=cube.anysat.statistics(frames), **TINY)
    if engine == "zarr":
        emb.to_zarr(tmp_path / "area")
    else:
        emb.to_netcdf(tmp_path / "area", engine=engine)
    with xr.open_dataarray(tmp_path / "area", engine=engine, decode_coords="all") as back:
        np.testing.assert_array_equal(back.values, emb.values)
        assert back.odc.geobox == emb.odc.geobox
        assert back.name == emb.name
        assert back.attrs.keys() >= emb.attrs.keys()
        for key, value in emb.attrs.items():  # NetCDF has no lists of one
            np.testing.assert_array_equal(np.atleast_1d(back.attrs[key]), np.atleast_1d(value), err_msg=key)
        assert (
            xr_anysat.embed(cube, **json.loads(back.attrs["config"])).attrs["config"] == emb.attrs["config"]
        )


def test_plain_zarr_wants_chunks_of_one_size(tmp_path: Path) -> None:
    emb = embedding()
    with pytest.raises(ValueError, match="uniform chunk sizes"):
        emb.to_zarr(tmp_path / "refused")
    emb.chunk(y=8, x=8).to_zarr(tmp_path / "area")
    with xr.open_dataarray(tmp_path / "area", engine="zarr", decode_coords="all") as back:
        np.testing.assert_array_equal(back.values, emb.values)
        assert back.attrs == emb.attrs

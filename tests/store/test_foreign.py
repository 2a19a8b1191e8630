"""Embeddings of other models, in small files written to their specifications."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import xarray as xr
import zarr
from rasterio.transform import Affine
from support.cubes import no_compute

import xr_anysat
from xr_anysat import StoreError

CODES = np.random.default_rng(0).integers(-127, 128, (64, 20, 30)).astype("int8")
CODES[:, 3, 4] = -128


def geotiff(path: Path, codes: np.ndarray = CODES, *, bottom_up: bool = False, **profile: Any) -> Path:
    """Of AlphaEarth, with the first row in the north, or in the south as on Source Cooperative."""
    count, height, width = codes.shape
    grid = Affine(10, 0, 500_000, 0, -10, 5_000_000)
    if bottom_up:
        codes, grid = codes[:, ::-1], Affine(10, 0, 500_000, 0, 10, 5_000_000 - 10 * height)
    given = {
        "driver": "GTiff", "count": count, "height": height, "width": width, "dtype": codes.dtype, "crs": "EPSG:32633",
        "transform": grid, "nodata": -128, **profile,
    }  # fmt: skip
    with rasterio.open(path, "w", **given) as file:
        file.write(codes)
    return path


@pytest.mark.parametrize("bottom_up", [False, True])
def test_alphaearth(tmp_path: Path, bottom_up: bool) -> None:
    path = geotiff(tmp_path / "a.tif", bottom_up=bottom_up)
    with no_compute():
        emb = xr_anysat.open_alphaearth(path)
    assert emb.dims == ("D", "y", "x")
    assert emb.dtype == "float32"
    expected = np.sign(CODES) * (np.abs(CODES.astype(float)) / 127.5) ** 2
    expected[:, 3, 4] = np.nan
    np.testing.assert_allclose(emb, expected, rtol=1e-6)
    assert emb.odc.geobox.affine == Affine(10, 0, 500_000, 0, -10, 5_000_000)
    assert emb.odc.crs.epsg == 32633
    assert "Google" in emb.attrs["attribution"]


@pytest.mark.parametrize(
    ("codes", "profile", "words"),
    [
        (CODES[:10], {}, "channels 10, expected 64"),
        (CODES.astype("int16"), {}, "dtype int16, expected int8"),
        (CODES, {"nodata": 0}, r"nodata 0(\.0)?, expected -128"),
        (CODES, {"crs": None}, "no CRS"),
    ],
)
def test_what_is_not_alphaearth(
    tmp_path: Path, codes: np.ndarray, profile: dict[str, Any], words: str
) -> None:
    with pytest.raises(
        StoreError, match=f"is not a file of AlphaEarth embeddings: .*{words}.*compare takes any cube"
    ):
        xr_anysat.open_alphaearth(geotiff(tmp_path / "a.tif", codes, **profile))
    (tmp_path / "b.tif").write_bytes(b"nothing")
    with pytest.raises(StoreError, match="cannot be opened: RasterioIOError"):
        xr_anysat.open_alphaearth(tmp_path / "b.tif")


ATTRS: dict[str, Any] = {
    "geoemb:type": "pixel", "geoemb:dimensions": 16, "geoemb:model": "https://geotessera.org/model/1.1",
    "geoemb:source_data": ["s3://sentinel-cogs"], "geoemb:data_type": "int8",
    "geoemb:quantization": {
        "method": "per_pixel_scale", "original_dtype": "float32", "quantized_dtype": "int8",
        "scale": {"type": "array", "array_name": "scales", "nodata": "NaN"},
    },
}  # fmt: skip

GRID = {"proj:code": "EPSG:32631", "spatial:transform": [10.0, 0.0, 300_000.0, 0.0, -10.0, 5_700_000.0]}


def tessera(
    path: Path, root: dict[str, Any], zone: dict[str, Any] | None = None, *, time: bool = True
) -> Path:
    """Codes (time, y, x, band) with a scale per pixel; in a group per zone, the provenance is at the root."""
    rng = np.random.default_rng(1)
    group = zarr.open_group(path, mode="w", zarr_format=3, attributes=root)
    if zone is not None:
        group = group.create_group("utm31", attributes=zone)
    years = (2,) if time else ()
    dims = ("time",) if time else ()
    codes = rng.integers(-127, 128, (*years, 12, 9, 16)).astype("int8")
    scales = rng.uniform(0.01, 0.1, (*years, 12, 9)).astype("float32")
    scales[..., 2, 3], scales[..., 5, 5] = np.nan, np.inf
    arrays = [("embeddings", codes, (*dims, "y", "x", "band")), ("scales", scales, (*dims, "y", "x"))]
    if time:
        arrays.append(("time", np.array([2021, 2022]), ("time",)))
    for name, values, own in arrays:
        chunks = tuple(min(n, 6) for n in values.shape)
        array = group.create_array(
            name, shape=values.shape, dtype=values.dtype, chunks=chunks, dimension_names=own
        )
        array[:] = values
    return path


@pytest.mark.parametrize("zoned", [False, True])
@pytest.mark.parametrize("time", [False, True])
def test_tessera(tmp_path: Path, zoned: bool, time: bool) -> None:
    path = tessera(tmp_path / "t.zarr", ATTRS if zoned else ATTRS | GRID, GRID if zoned else None, time=time)
    emb = xr_anysat.open_geoemb(path, group="utm31" if zoned else "")
    where = zarr.open_group(path, mode="r")
    where = where["utm31"] if zoned else where
    codes, scales = where["embeddings"][:], where["scales"][:]
    expected = codes * np.where(np.isfinite(scales), scales, np.nan)[..., None]
    assert emb.dims == (("time",) if time else ()) + ("D", "y", "x")
    assert emb.chunks is not None
    np.testing.assert_allclose(emb, np.moveaxis(expected, -1, -3), rtol=1e-6)
    assert emb.odc.crs.epsg == 32631
    assert float(emb.y[0]) == 5_699_995
    assert emb.attrs["geoemb:model"] == ATTRS["geoemb:model"]
    if time:
        assert emb.sel(time=2022).dims == ("D", "y", "x")


def test_one_scale(tmp_path: Path) -> None:
    scale = {"type": "scalar", "scale": 0.5, "offset": 1.0}
    attrs = (
        ATTRS
        | GRID
        | {"geoemb:quantization": {"method": "linear", "original_dtype": "float32", "scale": scale}}
    )
    path = tessera(tmp_path / "t.zarr", attrs, time=False)
    codes = zarr.open_group(path, mode="r")["embeddings"][:]
    np.testing.assert_array_equal(xr_anysat.open_geoemb(path), np.moveaxis(codes * 0.5 + 1, -1, 0))


def without(attrs: dict[str, Any], name: str) -> dict[str, Any]:
    return {k: v for k, v in attrs.items() if k != name}


@pytest.mark.parametrize(
    ("attrs", "words"),
    [
        (
            without(ATTRS | GRID, "geoemb:dimensions"),
            "no store of the convention geoemb: .*'geoemb:dimensions'",
        ),
        (ATTRS | GRID | {"geoemb:dimensions": 17}, "expected one with y, x and a dimension of 17"),
        (ATTRS, "has no spatial:transform: expected both"),
        (without(ATTRS | GRID, "proj:code"), "has no proj:code: expected both"),
        (ATTRS | GRID | {"proj:code": "EPSG:1"}, "proj:code 'EPSG:1' is no CRS"),
        (without(ATTRS | GRID, "geoemb:quantization"), "has int8 without geoemb:quantization"),
        (
            ATTRS | GRID | {"geoemb:quantization": {"method": "binary"}},
            "expected a scale of the type 'array'",
        ),
    ],
)
def test_other_stores_are_refused(tmp_path: Path, attrs: dict[str, Any], words: str) -> None:
    path = tessera(tmp_path / "t.zarr", attrs)
    with pytest.raises(StoreError, match=words):
        xr_anysat.open_geoemb(path)


def test_other_codecs_are_refused(tmp_path: Path) -> None:
    """They may execute code."""
    path = tessera(tmp_path / "t.zarr", ATTRS | GRID)
    metadata = path / "scales" / "zarr.json"
    changed = json.loads(metadata.read_text())
    changed["codecs"].append({"name": "numcodecs.pickle"})
    metadata.write_text(json.dumps(changed))
    with pytest.raises(StoreError, match=r"the array 'scales' has codecs \['numcodecs.pickle'\]"):
        xr_anysat.open_geoemb(path)
    metadata.write_text("{")
    with pytest.raises(StoreError, match="the metadata of 'scales' are damaged"):
        xr_anysat.open_geoemb(path)
    with pytest.raises(StoreError, match=r"has no Zarr 3 group at 'zarr\.json'"):
        xr_anysat.open_geoemb(tmp_path / "nothing.zarr")


def test_they_are_compared(tmp_path: Path) -> None:
    import geopandas as gpd

    first = xr_anysat.open_alphaearth(geotiff(tmp_path / "a.tif"))
    second = xr.DataArray(
        np.random.default_rng(3).normal(size=(4, 20, 30)).astype("float32"),
        {"y": first.y, "x": first.x},
        ("D", "y", "x"),
    ).odc.assign_crs("EPSG:32633")
    x, y = np.meshgrid(first.x, first.y)
    table = {"kind": np.where(first[0].values.ravel() > 0, "a", "b")}
    points = gpd.GeoDataFrame(table, geometry=gpd.points_from_xy(x.ravel(), y.ravel(), crs="EPSG:32633"))
    with pytest.warns(xr_anysat.AnySatWarning, match="1 of 600 labels are left out of all cubes"):
        found = xr_anysat.compare({"alphaearth": first, "other": second}, points, "kind", block_m=50)
    assert found.to_frame().loc["other", "difference"] < 0

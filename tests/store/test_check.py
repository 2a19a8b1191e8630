"""Damaged, partial and malformed stores: what `open`, `check` and `to_zarr` find and refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords
from support.cubes import no_compute
from support.s3_server import S3Server, object_store

import xr_anysat
from xr_anysat import AnySatError, AnySatWarning, CubeTypeError, StoreError
from xr_anysat.store.identity import MAX_BLOCKS, STORE_ATTR

CODECS = [None, "float16", "int8"]
COLUMNS = ["block_y", "block_x", "y_start", "y_stop", "x_start", "x_stop", "problem"]


def embeddings(shape: tuple[int, int, int] = (3, 20, 17)) -> xr.DataArray:
    """Return a lazy embedding in 3 × 3 blocks, whose first row of blocks is cut: the store has a margin."""
    values = np.random.default_rng(0).normal(size=shape).astype("float32")
    grid = xr_coords(GeoBox.from_bbox((0, 0, 10 * shape[2], 10 * shape[1]), "EPSG:32632", resolution=10))
    data = da.from_array(values, chunks=((3,), (5, 8, 7), (8, 8, 1)))
    return xr.DataArray(data, grid, ("D", "y", "x"), name="anysat")


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def flip(path: Path, at: int) -> None:
    """Change one byte of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


# ---------------------------------------------------------------------- damaged blocks


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS)
def test_every_flipped_byte_of_a_shard_is_found(codec: str | None, tmp_path: Path) -> None:
    path = tmp_path / "area.zarr"
    emb = embeddings().anysat.to_zarr(path, codec)
    values = emb.values
    shards = [path / "anysat/c/0/1/2", *([path / "scale/c/1/2"] if codec == "int8" else [])]
    for shard in shards:
        whole = shard.read_bytes()
        for at in range(0, len(whole), max(1, len(whole) // 40)):
            flip(shard, at)
            back = xr_anysat.open(path)
            with pytest.raises(
                StoreError, match=r"block \(1, 2\) of .*area.zarr', cells y=5:13, x=16:17, cannot be read"
            ):
                back.compute()
            np.testing.assert_array_equal(back[:, :, :16], values[:, :, :16])  # other blocks are intact
            shard.write_bytes(whole)
    np.testing.assert_array_equal(xr_anysat.open(path), values)


@pytest.mark.parametrize("codec", CODECS)
def test_a_damaged_block_is_reported_removed_and_computed_again(codec: str | None, tmp_path: Path) -> None:
    path = tmp_path / "area.zarr"
    emb = embeddings()
    emb.anysat.to_zarr(path, codec)
    before = files(tmp_path)
    flip(path / "anysat/c/0/0/1", 20)
    flip(path / "anysat/c/0/2/2", -30)
    back = xr_anysat.open(path)
    with pytest.raises(StoreError) as caught:
        back.compute()
    assert f"xr_anysat.open('{path}').anysat.check(remove_damaged=True), and repeat the to_zarr call" in str(
        caught.value
    )
    damaged = files(tmp_path)
    report = back.anysat.check()
    assert files(tmp_path) == damaged
    assert list(report.columns) == COLUMNS
    assert report[COLUMNS[:-1]].to_numpy().tolist() == [[0, 1, 0, 5, 8, 16], [2, 2, 13, 20, 16, 17]]
    assert report["problem"].str.contains("damaged: .*checksum").all()
    pd.testing.assert_frame_equal(back.anysat.check(remove_damaged=True), report)
    with pytest.warns(AnySatWarning, match="2 of 9 blocks of .* are not finished"):
        assert np.isnan(xr_anysat.open(path)[:, :5, 8:16]).all()
    np.testing.assert_array_equal(emb.anysat.to_zarr(path, codec), xr_anysat.open(path))
    assert files(tmp_path) == before
    assert xr_anysat.open(path).anysat.check().empty


def test_missing_blocks_are_reported_and_nothing_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "area.zarr"
    embeddings().anysat.to_zarr(path)
    (path / "anysat/c/0/1/0").unlink()
    before = files(tmp_path)
    with pytest.warns(AnySatWarning, match="1 of 9 blocks"):
        back = xr_anysat.open(path)
    report = back.anysat.check(remove_damaged=True)
    assert report.to_numpy().tolist() == [[1, 0, 5, 13, 0, 8, "missing"]]
    assert files(tmp_path) == before


def test_a_selection_is_checked_by_its_whole_store(tmp_path: Path) -> None:
    embeddings().anysat.to_zarr(tmp_path / "area.zarr")
    flip(tmp_path / "area.zarr/anysat/c/0/2/2", 20)
    back = xr_anysat.open(tmp_path / "area.zarr")
    assert len(back.isel(y=slice(2), x=slice(3)).anysat.check()) == 1


def test_only_what_was_opened_can_be_checked() -> None:
    with pytest.raises(
        CubeTypeError, match=r"not opened from a store.*xr_anysat\.open\('area\.zarr'\)\.anysat\.check"
    ):
        embeddings().anysat.check()


def test_opening_reads_no_block_and_single_cells_read_one_chunk(tmp_path: Path) -> None:
    path = tmp_path / "area.zarr"
    want = embeddings().anysat.to_zarr(path).values
    for shard in (path / "anysat/c/0").rglob("*"):
        if shard.is_file() and shard.name != "1":
            shard.write_bytes(b"nothing")
    with no_compute():
        back = xr_anysat.open(path)
    np.testing.assert_array_equal(back[:, 7, 9], want[:, 7, 9])
    np.testing.assert_array_equal(back[::-1, 4::-1, 8:16:3], want[::-1, 4::-1, 8:16:3])
    np.testing.assert_array_equal(back[1, [3, 1], 15], want[1, [3, 1], 15])


def test_a_damaged_block_in_a_bucket_is_named(s3: S3Server) -> None:
    store = object_store(s3.url, "bucket", "damaged/area.zarr")
    embeddings().anysat.to_zarr(store, "int8")
    from xr_anysat.store.location import parse_location, read, write

    target = parse_location(store)
    shard = bytearray(read(target.root(), "anysat/c/0/1/1") or b"")
    shard[7] ^= 1
    write(target.root(), "anysat/c/0/1/1", bytes(shard), target)
    back = xr_anysat.open(store)
    report = back.anysat.check(remove_damaged=True)
    assert report[["block_y", "block_x"]].to_numpy().tolist() == [[1, 1]]
    assert xr_anysat.to_zarr(embeddings(), store, "int8").anysat.check().empty


@pytest.mark.slow
def test_a_cluster_checks_too(client: Any, tmp_path: Path) -> None:
    embeddings().anysat.to_zarr(tmp_path / "area.zarr")
    flip(tmp_path / "area.zarr/anysat/c/0/2/0", 20)
    report = xr_anysat.open(tmp_path / "area.zarr").anysat.check()
    assert report[["block_y", "block_x"]].to_numpy().tolist() == [[2, 0]]


# ---------------------------------------------------------------------- stores of earlier versions


def without_checksums(path: Path) -> None:
    """Make a store one of an earlier version, without blocks."""
    for name in ("anysat", "scale"):
        if (path / name).exists():
            metadata = json.loads((path / name / "zarr.json").read_bytes())
            chain = metadata["codecs"][0]["configuration"]["codecs"]
            metadata["codecs"][0]["configuration"]["codecs"] = [c for c in chain if c["name"] != "crc32c"]
            shutil.rmtree(path / name / "c")
            (path / name / "zarr.json").write_text(json.dumps(metadata))
            group = json.loads((path / "zarr.json").read_bytes())
            group["consolidated_metadata"]["metadata"][name] = metadata
            (path / "zarr.json").write_text(json.dumps(group))


@pytest.mark.parametrize("codec", CODECS)
def test_a_store_without_checksums_is_read_resumed_and_checked(codec: str | None, tmp_path: Path) -> None:
    path = tmp_path / "area.zarr"
    emb = embeddings()
    want = emb.anysat.to_zarr(path, codec).values
    without_checksums(path)
    back = emb.anysat.to_zarr(path, codec)
    np.testing.assert_array_equal(back, want)
    with pytest.warns(AnySatWarning, match=r"earlier version, without checksums.*to_zarr\('new\.zarr'\)"):
        assert back.anysat.check().empty
    before = files(tmp_path)
    (path / "anysat/c/0/1/1").unlink()
    np.testing.assert_array_equal(emb.anysat.to_zarr(path, codec), want)
    assert files(tmp_path) == before
    (path / "anysat/c/0/1/1").write_bytes(b"nothing that Blosc wrote")
    with pytest.warns(AnySatWarning, match="without checksums"):
        assert len(back.anysat.check()) == 1


# ---------------------------------------------------------------------- partial blocks


@pytest.mark.parametrize("left", ["anysat/c/0/1/1", "scale/c/1/1"])
def test_a_block_without_one_of_its_arrays_is_nan(left: str, tmp_path: Path) -> None:
    path = tmp_path / "area.zarr"
    want = embeddings().anysat.to_zarr(path, "int8").values.copy()
    (path / left).unlink()
    want[:, 5:13, 8:16] = np.nan
    with pytest.warns(AnySatWarning, match="1 of 9 blocks of .* are not finished"):
        back = xr_anysat.open(path)
    np.testing.assert_array_equal(back, want)
    np.testing.assert_array_equal(back[:, 4:9, 7:10], want[:, 4:9, 7:10])


def test_the_scale_of_a_block_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that knows nothing of blocks sees NaN in a block whose writer was interrupted."""
    import zarr

    written: list[str] = []
    real = zarr.Array.__setitem__
    monkeypatch.setattr(
        zarr.Array,
        "__setitem__",
        lambda self, at, value: (written.append(self.basename), real(self, at, value))[1],
    )
    with dask.config.set(scheduler="synchronous"):
        embeddings().anysat.to_zarr(tmp_path / "area.zarr", "int8")
    assert [n for n in written if n in ("anysat", "scale")] == ["anysat", "scale"] * 9


# ---------------------------------------------------------------------- malformed stores


def change_identity(path: Path, **values: Any) -> None:
    """Change entries of the identity of a store; ... deletes one."""
    group = json.loads((path / "zarr.json").read_bytes())
    identity = json.loads(group["attributes"][STORE_ATTR]) | values
    group["attributes"][STORE_ATTR] = json.dumps({k: v for k, v in identity.items() if v is not ...})
    (path / "zarr.json").write_text(json.dumps(group))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"block": [0, 8]}, r"'block' is \[0, 8\]: expected a list of 2, each a whole number from 1 to"),
        ({"block": [8]}, r"'block' is \[8\]: expected a list of 2"),
        ({"block": "88"}, "'block' is '88'"),
        ({"block": [8.0, 8]}, r"'block' is \[8\.0, 8\]"),
        ({"block": ...}, "'block' is missing: expected a list"),
        ({"margin": ...}, "'margin' is missing"),
        ({"margin": [-1, 0]}, r"'margin' is \[-1, 0\]: expected a list of 2, each a whole number from 0"),
        ({"margin": [8, 0]}, r"the margin \[8, 0\] is not smaller than the block \[8, 8\]"),
        ({"margin": [True, 0]}, r"'margin' is \[True, 0\]"),
        ({"margin": [10**30, 0]}, r"'margin' is \[1000"),
        ({"codec": "../int8"}, r"'codec' is '\.\./int8': expected one of None, 'float16', 'int8'"),
        ({"codec": ["int8"]}, r"'codec' is \['int8'\]"),
        ({"codec": ...}, "'codec' is missing"),
        ({"dtype": "int8"}, "'dtype' is 'int8': expected one of 'float16'"),
        ({"codec": "int8", "dtype": "float64"}, "the codec 'int8' does not store float64"),
        ({"grid": None}, "'grid' is None: expected a JSON object"),
        ({"grid": {"shape": [3, 20]}}, r"'shape' is \[3, 20\]: expected a shape"),
        ({"grid": {"shape": [3, -20, 17]}}, r"'shape' is \[3, -20, 17\]: expected a shape"),
        ({"grid": {"shape": [3, 20, 17], "transform": "x"}}, "'transform' is 'x': expected a list of 6"),
        ({"grid": {"shape": [3, 20, 17], "geotransform": 3}}, "'geotransform' is 3: expected text"),
        (
            {"grid": {"shape": [3, 3_000_000, 3_000_000]}, "block": [8, 8]},
            r"140625\d+ blocks .*expected at most",
        ),
        ({"coords": 3}, "'coords' is 3: expected a JSON object"),
        ({"weights": {}}, r"'weights' is \{\}: expected text, or null"),
        ({"attrs": "x"}, "'attrs' is 'x': expected a JSON object"),
        ({"block": [4, 8], "margin": [0, 0]}, r"the array 'anysat' is .*3, 23, 17.*expected .*3, 20, 17"),
        ({"margin": [2, 0]}, "the array 'anysat' is"),
        ({"codec": "int8"}, "the array 'anysat' is .*float32.*expected .*int8"),
        ({"dtype": "float64"}, "the array 'anysat' is"),
    ],
)
def test_a_malformed_identity_is_refused(values: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = tmp_path / "area.zarr"
    emb = embeddings()
    emb.anysat.to_zarr(path)
    change_identity(path, **values)
    before = files(tmp_path)
    with pytest.raises(StoreError, match=rf"area\.zarr' is damaged.*{says}"):
        xr_anysat.open(path)
    with pytest.raises(StoreError):
        emb.anysat.to_zarr(path)
    assert files(tmp_path) == before


@pytest.mark.parametrize("text", ["null", "[]", "3", '"x"', "[" * 100_000, "{" * 3, "NaN", "1e999"])
def test_an_identity_that_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "area.zarr"
    embeddings().anysat.to_zarr(path)
    group = json.loads((path / "zarr.json").read_bytes())
    group["attributes"][STORE_ATTR] = text
    (path / "zarr.json").write_text(json.dumps(group))
    with pytest.raises(StoreError, match=r"is damaged|but not what emb\.anysat\.to_zarr"):
        xr_anysat.open(path)


@pytest.mark.parametrize("name", ["anysat/zarr.json", "scale/zarr.json", "y/zarr.json", "zarr.json"])
def test_metadata_that_are_cut_off_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "area.zarr"
    embeddings().anysat.to_zarr(path, "int8")
    whole = (path / name).read_bytes()
    for end in range(0, len(whole), max(1, len(whole) // 12)):
        (path / name).write_bytes(whole[:end])
        try:
            xr_anysat.open(path).load()
        except AnySatError:
            pass
        else:
            assert name != "zarr.json"  # the others are in the consolidated metadata, too


def test_a_missing_array_is_named(tmp_path: Path) -> None:
    path = tmp_path / "area.zarr"
    embeddings().anysat.to_zarr(path, "int8")
    group = json.loads((path / "zarr.json").read_bytes())
    del group["consolidated_metadata"]["metadata"]["scale"]
    (path / "zarr.json").write_text(json.dumps(group))
    with pytest.raises(StoreError, match="the metadata of the array 'scale' are missing"):
        xr_anysat.open(path)


def test_opening_a_huge_empty_store_costs_little(tmp_path: Path) -> None:
    """Its shape alone would be 35 million blocks; nothing of that size is created."""
    path = tmp_path / "area.zarr"
    embeddings().anysat.to_zarr(path)
    shape = [3, 8 * (MAX_BLOCKS // 3), 17]
    change_identity(path, grid={"shape": [3, shape[1] - 3, 17]})
    group = json.loads((path / "zarr.json").read_bytes())
    metadata = group["consolidated_metadata"]["metadata"]
    metadata["anysat"]["shape"] = shape
    del metadata["y"], metadata["x"], metadata["spatial_ref"]
    (path / "zarr.json").write_text(json.dumps(group))
    with no_compute(), pytest.raises(StoreError, match=r"expected a shape up to \(65536, 8388608, 8388608\)"):
        xr_anysat.open(path)
    shape[1] = 8 * 1_000_000
    change_identity(path, grid={"shape": [3, shape[1] - 3, 17]})
    group = json.loads((path / "zarr.json").read_bytes())
    group["consolidated_metadata"]["metadata"]["anysat"]["shape"] = shape
    (path / "zarr.json").write_text(json.dumps(group))
    with no_compute(), pytest.warns(AnySatWarning, match="2999991 of 3000000 blocks"):
        back = xr_anysat.open(path)
    assert back.shape == (3, 7_999_997, 17)

"""Stores, tables, models and cubes from anybody: they raise an AnySatError at most, and write nowhere else."""

from __future__ import annotations

import json
import pickle
import shutil
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.cubes import no_compute, odc_stac, openeo, placed, rioxarray_stack, small_cube, stackstac, xee
from support.mutations import VALUES, damage_store, damaged, mutated

import xr_anysat
from xr_anysat import (
    AnySatError,
    AnySatWarning,
    Clusters,
    CubeError,
    OptionError,
    PCAModel,
    Statistics,
    StoreError,
)
from xr_anysat.cube.timeline import has_timeline, timeline
from xr_anysat.record import encoder_spec_of
from xr_anysat.shared.serialization import plain
from xr_anysat.shared.text import safe_name
from xr_anysat.store.identity import STORE_ATTR

RANDOM = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

OUTSIDE = "/../../../victim_home/.config/important"


def embedding(**options: Any) -> xr.DataArray:
    cube = small_cube(height=8, width=8, crs="EPSG:32632")
    made: xr.DataArray = cube.anysat.embed(
        2, period="2022", tile=8, model="tiny", weights="random", **options
    )
    return made


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def attempt(*calls: Any) -> None:
    """Make calls, each of which may raise an AnySatError and nothing else."""
    for call in calls:
        with suppress(AnySatError), warnings.catch_warnings():
            warnings.simplefilter("ignore", AnySatWarning)
            warnings.simplefilter("ignore", RuntimeWarning)  # of huge numbers
            call()


# ---------------------------------------------------------------------- names of files


@pytest.mark.parametrize(
    "attrs",
    [
        {"weights": f"random:{OUTSIDE}"},
        {"weights": f"module:{OUTSIDE}"},
        {"weights": "/somewhere/own.pth", "weights_sha256": "/../../x"},
        {"model": f"tiny{OUTSIDE}"},
    ],
    ids=["seed", "module", "hash", "size"],
)
def test_a_record_names_no_file_outside_of_the_target(attrs: dict[str, str], tmp_path: Path) -> None:
    """The Item of the model is named by the record, which may come from a stranger's store."""
    (tmp_path / "victim_home" / ".config").mkdir(parents=True)
    important = tmp_path / "victim_home" / ".config" / "important.json"
    important.write_text("mine")
    emb = embedding()
    emb.attrs |= attrs
    target = tmp_path / "a" / "b"
    target.mkdir(parents=True)
    with suppress(AnySatError):
        xr_anysat.to_zarr(emb, target / "area.zarr")
    others = {name: text for name, text in files(tmp_path).items() if not name.startswith("a/b/")}
    assert others == {"victim_home/.config/important.json": b"mine"}
    assert all(p.parent == target for p in target.glob("**/*.json") if "area.zarr" not in p.parts)


@pytest.mark.parametrize(
    "text",
    ["", ".", "..", "../../x", "/etc/passwd", "a\\b", "C:\\x", "a\0b", "é" * 300, "-rf", "~", "a\nb", " "],
)
def test_a_safe_name_is_one_part_of_a_path(text: str, tmp_path: Path) -> None:
    name = safe_name(text)
    assert name
    assert len(name) <= 120
    assert not set(name) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
    assert name[0] not in ".-"
    assert (tmp_path / name).resolve().parent == tmp_path.resolve()
    assert safe_name(name) == name


def test_names_that_are_safe_are_kept_and_others_stay_different() -> None:
    assert safe_name("anysat-tiny-random-0") == "anysat-tiny-random-0"
    assert safe_name("a/b") != safe_name("a?b")


# ---------------------------------------------------------------------- JSON of results

NAN, HUGE, TEN = float("nan"), 10**400, [1.0] * 10

RESULTS: dict[type[Statistics | PCAModel | Clusters], dict[str, Any]] = {
    Statistics: {"mean": TEN, "std": TEN, "count": 3},
    PCAModel: {
        "mean": [0.0, 1.0], "components": [[1.0, 0.0]], "explained": [0.5], "low": [-1], "high": [1.0], "cells": 9,
        "seed": 0, "made_with": {},
    },
    Clusters: {"centers": [[0.0, 1.0], [1.0, 2.0]], "shares": [0.5, 0.5], "cells": 9, "seed": 0, "made_with": {}},
}  # fmt: skip


@pytest.mark.parametrize("kind", RESULTS)
def test_valid_json_of_results_is_read(kind: type[Statistics]) -> None:
    text = json.dumps(RESULTS[kind])
    assert kind.from_json(text) == kind.from_json(kind.from_json(text).to_json())


@pytest.mark.parametrize(
    ("kind", "values", "says"),
    [
        (
            Statistics,
            {"mean": ["1"] * 10},
            r"'mean' is \['1',.*expected a list of 10, each a finite number",
        ),
        (Statistics, {"mean": [NAN] * 10}, "'mean' is .*nan"),
        (Statistics, {"mean": [HUGE] * 10}, "'mean' is "),
        (Statistics, {"std": [1.0] * 9}, "'std' is .*expected a list of 10"),
        (Statistics, {"std": [-1.0] * 10}, "expected standard deviations of 0 or more"),
        (Statistics, {"count": "3"}, "'count' is '3': expected a whole number from 0"),
        (Statistics, {"count": -1}, "'count' is -1"),
        (Statistics, {"mean": {"a": 1}}, "'mean' is {'a': 1}"),
        (Statistics, {"std": ...}, "'std' is missing: expected a list"),
        (Statistics, {"other": 1}, "unknown 'other'"),
        (
            PCAModel,
            {"mean": ["0", "1"]},
            "'mean' is .*expected a list of 1 or more, each a finite number",
        ),
        (PCAModel, {"components": [[NAN, 0]]}, "'components' is"),
        (PCAModel, {"components": [1.0]}, "'components' is"),
        (PCAModel, {"components": []}, "'components' is"),
        (PCAModel, {"components": [[1.0]]}, "expected vectors and numbers of matching lengths"),
        (PCAModel, {"explained": [True]}, "'explained' is"),
        (PCAModel, {"low": 0.5}, "'low' is 0.5"),
        (PCAModel, {"made_with": None}, "'made_with' is None: expected a JSON object"),
        (PCAModel, {"made_with": ...}, "'made_with' is missing"),
        (PCAModel, {"cells": 1.5}, "'cells' is 1.5: expected a whole number from 1"),
        (PCAModel, {"seed": HUGE}, "'seed' is 1000"),
        (Clusters, {"centers": [[0.0, "1"], [1.0, 2.0]]}, "'centers' is"),
        (Clusters, {"centers": [[0.0], [1.0, 2.0]]}, "all of one length"),
        (Clusters, {"centers": []}, "'centers' is"),
        (Clusters, {"centers": [[], []]}, "'centers' is"),
        (Clusters, {"shares": [NAN, 1]}, "'shares' is"),
        (Clusters, {"made_with": [1]}, r"'made_with' is \[1\]"),
    ],
)
def test_malformed_json_of_results_is_refused(
    kind: type[Statistics], values: dict[str, Any], says: str
) -> None:
    changed = {k: v for k, v in (RESULTS[kind] | values).items() if v is not ...}
    with pytest.raises(OptionError, match=rf"contains no {kind.__name__} \(.*{says}.*expected what to_json"):
        kind.from_json(json.dumps(changed))


@pytest.mark.parametrize("kind", RESULTS)
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 100_000, "more than 32 levels"),
        ('{"mean": ' + "[" * 40 + "]" * 40 + "}", "more than 32 levels"),
        ('{"made_with": ' + '{"a":' * 900 + "1" + "}" * 901, "more than 32 levels"),
        ('{"mean": [1], "mean": [2]}', "repeats a name"),
        ("[1, 2]", "expected a JSON object"),
        ("null", "expected a JSON object"),
        ("", "Expecting value"),
        ('{"mean": [1', "Expecting"),
        ("1" * 10_000, "limit"),
        (b"\xff\xfe\x00", "decode"),
        (None, "NoneType instead of JSON"),
        (3.5, "float instead of JSON"),
    ],
)  # fmt: skip
def test_text_that_is_no_json_of_a_result_is_refused(kind: type[Statistics], text: Any, says: str) -> None:
    with pytest.raises(OptionError, match=rf"contains no {kind.__name__} \(.*{says}"):
        kind.from_json(text)


def test_statistics_take_no_text_and_no_huge_numbers() -> None:
    for values in (["1"] * 10, "1234567890", [HUGE] * 10, [np.array([1, 2])] * 10):
        with pytest.raises(OptionError, match="expected a number for each"):
            Statistics(values, TEN)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="count='3': expected a whole number"):
        Statistics(TEN, TEN, "3")  # type: ignore[arg-type]


# ---------------------------------------------------------------------- records in attributes


def exported(emb: xr.DataArray, folder: Path) -> None:
    xr_anysat.to_zarr(emb, folder / "area.zarr")


def compared(emb: xr.DataArray, folder: Path) -> None:
    xr_anysat.change(emb, emb)


@pytest.mark.parametrize("call", [exported, compared])
@pytest.mark.parametrize(
    ("attrs", "says"),
    [
        ({"model": "huge"}, "'model' is 'huge': expected one of 'tiny', 'small', 'base'"),
        ({"model": 3}, "'model' is 3"),
        ({"weights": f"random:{OUTSIDE}"}, "'weights' is 'random:/.*expected 'official', 'random:<seed>'"),
        ({"weights": "random:" + "9" * 30}, "'weights' is"),
        ({"weights": "module:../../x"}, "'weights' is"),
        ({"weights": ""}, "'weights' is ''"),
        ({"weights": "a\0b"}, "'weights' is"),
        ({"weights": ["a", "b"]}, "'weights' is"),
        ({"weights_sha256": "/../../x"}, "'weights_sha256' is .*expected a sha256"),
        ({"output": "all"}, "'output' is 'all': expected one of"),
        ({"patch_size_m": 0}, "'patch_size_m' is 0: expected a multiple of 10"),
        ({"patch_size_m": 15}, "'patch_size_m' is 15"),
        ({"tile": -24}, "'tile' is -24: expected a whole number from 1"),
        ({"tile": "T32TNS"}, "'tile' is"),
        ({"overlap": 1.5}, "'overlap' is 1.5"),
        ({"temporal_window": "2022-01-01"}, "'temporal_window' is .*expected two dates"),
        ({"temporal_window": "2023-01-01/2022-01-01"}, "'temporal_window' is"),
        ({"temporal_window": "0001-01-01/9999-01-01"}, "'temporal_window' is"),
        ({"frame_dates": ["2022-13-01"]}, "'frame_dates' is .*expected a list, each a date"),
        ({"frame_dates": 2022}, "'frame_dates' is"),
        ({"versions": "[1"}, "'versions': Expecting"),
        ({"versions": '{"torch": 2}'}, "'versions' is .*expected a JSON object of texts"),
        ({"config": "null"}, "'config' is None: expected a JSON object"),
        ({"config": "[" * 100_000}, "'config': JSON of more than 32 levels"),
        ({"config": 7}, "'config': a int instead of JSON"),
        ({"config": '{"tile": "x"}'}, "'tile' is 'x': expected a whole number .* in the JSON of 'config'"),
        ({"frames": '{"doy_base": 2}'}, "'doy_base' is 2: expected one of 0, 1, in the JSON of 'frames'"),
        ({"frames": "{}{}"}, "'frames': Extra data"),
        ({"source": "Sentinel-2"}, "'source': Expecting value"),
        ({"source": '{"items": "[{}]"}'}, "'items'.* is damaged: 'id' is missing"),
        ({"source": '{"catalog": 3}'}, "'catalog' is 3: expected text"),
        ({"norm_mean": ["1"] * 10}, "'norm_mean' is .*expected a list of 10, each a number"),
        ({"norm_std": [1.0] * 3}, "'norm_std' is"),
        ({"grid_shape": [1, 2]}, "'grid_shape' is"),
        ({"n_frames": 0}, "'n_frames' is 0"),
    ],
)  # fmt: skip
def test_a_damaged_record_is_named(attrs: dict[str, Any], says: str, call: Any, tmp_path: Path) -> None:
    emb = embedding()
    emb.attrs |= attrs
    with pytest.raises(CubeError, match=rf"(?s){says}"):
        call(emb, tmp_path)
    assert not files(tmp_path)


def test_a_damaged_record_of_a_newer_version_names_the_upgrade(tmp_path: Path) -> None:
    emb = embedding().assign_attrs(record_version=99, output="cls")
    with pytest.raises(CubeError, match=r"'output' is 'cls'.*newer version.*pip install -U xr_anysat"):
        exported(emb, tmp_path)


def as_numpy(attrs: dict[str, Any]) -> dict[str, Any]:
    def numpy(value: Any) -> Any:
        try:
            return np.array(value) if isinstance(value, list | int) else value
        except ValueError:  # of lists of different lengths, which only random damage has
            return value

    return {k: numpy(v) for k, v in attrs.items()}


def as_lists(attrs: dict[str, Any]) -> dict[str, Any]:
    return {k: v if isinstance(v, list) else [v] for k, v in attrs.items()}


def as_netcdf(attrs: dict[str, Any]) -> dict[str, Any]:
    numbers = {k: np.int32(v) for k, v in attrs.items() if isinstance(v, int) and abs(v) < 2**31}
    return attrs | numbers | {k: v[0] for k, v in attrs.items() if isinstance(v, list) and len(v) == 1}


@pytest.mark.parametrize("form", [as_numpy, as_lists, as_netcdf])
def test_a_record_in_the_forms_of_other_formats_is_the_same(form: Any, tmp_path: Path) -> None:
    emb = small_cube(height=8, width=8).anysat.embed(
        1, period="2022", tile=8, model="tiny", weights="random", norm="pastis"
    )
    other = emb.copy()
    other.attrs = form(emb.attrs)
    assert float(emb.anysat.change(other).max()) < 1e-6
    np.testing.assert_array_equal(other.anysat.seam_score()["step"], emb.anysat.seam_score()["step"])
    exported(emb, tmp_path / "a")
    exported(other, tmp_path / "b")
    items = [(tmp_path / name / "area.stac.json").read_text() for name in "ab"]
    assert items[0] == items[1]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"frames": 0}, "'frames' is 0: expected a whole number from 1 to 10000, or null"),
        ({"frames": 10**9}, "'frames' is 1000000000"),
        ({"frames": "2"}, "'frames' is '2'"),
        ({"period": "2022"}, "'period' is '2022': expected two dates"),
        ({"period": None}, "'period' is None"),
        ({"doy_base": True}, "'doy_base' is True"),
        ({"dates": None}, "'dates' is None: expected a list, each a date"),
        ({"dates": ["today"]}, "'dates' is"),
        ({"dates_outside": ...}, "'dates_outside' is missing"),
        ({"acquisitions": NAN}, "'acquisitions' is nan"),
    ],
)
def test_a_damaged_record_of_frames_is_named(changed: dict[str, Any], says: str) -> None:
    frames = small_cube(height=8, width=8).anysat.frames(2)
    record = json.loads(frames.attrs["anysat_frames"]) | changed
    frames.attrs["anysat_frames"] = json.dumps({k: v for k, v in record.items() if v is not ...})
    for call in (
        lambda: frames.anysat.embed(None, model="tiny", weights="random"),
        lambda: frames.anysat.plan(None),
        lambda: frames.anysat.frames(None),
        lambda: timeline(frames),
    ):
        with pytest.raises(CubeError, match=rf"attrs\['anysat_frames'\] is damaged: {says}"):
            call()
    assert "is damaged" in frames.anysat._repr_html_()


@pytest.mark.parametrize("text", ["", "null", "[" * 10_000, 3, "{", np.array(["{}"])])
def test_a_record_of_frames_that_is_no_json_is_refused(text: Any) -> None:
    frames = small_cube(height=8, width=8).anysat.frames(2)
    frames.attrs["anysat_frames"] = text
    with pytest.raises(CubeError, match="is damaged"):
        frames.anysat.embed(None, model="tiny", weights="random")
    assert "is damaged" in frames.anysat._repr_html_()


@pytest.mark.parametrize("days", [["a", "b"], [400, 1], [-1, 3], [NAN, 1.0]])
def test_days_of_frames_that_are_no_days_are_refused(days: list[Any]) -> None:
    frames = small_cube(height=8, width=8).anysat.frames(2).assign_coords(doy=("time", days))
    with pytest.raises(CubeError, match="composed frames with an invalid 'doy' coordinate"):
        frames.anysat.embed(None, model="tiny", weights="random")


@pytest.mark.parametrize(
    "items", ["[1]", '[{"id": "A"}]', "{}", 3, '[{"id": "A", "datetime": "x", "used": true}]']
)
def test_a_damaged_record_of_items_is_named(items: Any) -> None:
    frames = small_cube(height=8, width=8).anysat.frames(2).assign_attrs(items=items)
    with pytest.raises(CubeError, match=r"attrs\['items'\] is damaged"):
        timeline(frames)


@pytest.mark.parametrize("name", ["bin_start", "bin_end", "time"])
def test_frames_without_times_are_refused(name: str) -> None:
    frames = small_cube(height=8, width=8).anysat.frames(2).assign_coords({name: ("time", ["a", "b"])})
    with pytest.raises(CubeError, match=f"the coordinate '{name}' of composed frames"):
        timeline(frames)
    assert "expected a time" in frames.anysat._repr_html_()


# ---------------------------------------------------------------------- stores


def written(path: Path, codec: str | None = None) -> dict[str, Any]:
    """Write a small store, and return the metadata of its group."""
    emb = embedding()
    row = xr.DataArray(np.arange(8.0), dims="y")
    emb.isel(D=slice(3)).assign_coords(row=row, note="a").chunk(D=-1, y=4, x=4).anysat.to_zarr(path, codec)
    group: dict[str, Any] = json.loads((path / "zarr.json").read_bytes())
    return group


def enlarged(group: dict[str, Any], rows: int, cols: int, block: int, chunk: int) -> dict[str, Any]:
    """Declare another shape, and no more data."""
    identity = json.loads(group["attributes"][STORE_ATTR])
    identity["grid"]["shape"], identity["block"] = [3, rows, cols], [block, block]
    arrays = group["consolidated_metadata"]["metadata"]
    del arrays["row"]
    arrays["anysat"] |= {
        "shape": [3, rows, cols],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [3, block, block]}},
    }  # fmt: skip
    arrays["anysat"]["codecs"][0]["configuration"]["chunk_shape"] = [3, block, block]
    for name, size in (("y", rows), ("x", cols)):
        arrays[name]["shape"] = [size]
        arrays[name]["chunk_grid"]["configuration"]["chunk_shape"] = [chunk]
    group["attributes"][STORE_ATTR] = json.dumps(identity)
    return group


@pytest.mark.parametrize(
    ("rows", "cols", "block", "chunk", "says"),
    [
        (3_000_000, 3_000, 16, 10**6, "the grid has 35250000 blocks .*expected at most 16777216"),
        (2**23 + 1, 16, 16, 10**6, "'shape' is .*expected a shape up to"),
        (2**23, 16, 16, 8, "the array 'y' has 1048576 chunks .*expected at most 1024"),
    ],
)
def test_an_absurd_shape_is_refused(
    rows: int, cols: int, block: int, chunk: int, says: str, tmp_path: Path
) -> None:
    group = enlarged(written(tmp_path / "area.zarr"), rows, cols, block, chunk)
    (tmp_path / "area.zarr" / "zarr.json").write_text(json.dumps(group))
    with no_compute(), pytest.raises(StoreError, match=says):
        xr_anysat.open(tmp_path / "area.zarr")


def test_a_large_shape_without_data_has_no_task_for_each_block(tmp_path: Path) -> None:
    group = enlarged(written(tmp_path / "area.zarr"), 32_000, 32_000, 8, 32_000)
    shutil.rmtree(tmp_path / "area.zarr" / "y" / "c")
    shutil.rmtree(tmp_path / "area.zarr" / "x" / "c")
    (tmp_path / "area.zarr" / "zarr.json").write_text(json.dumps(group))
    with no_compute(), pytest.warns(AnySatWarning, match="15999996 of 16000000 blocks .* are not finished"):
        emb = xr_anysat.open(tmp_path / "area.zarr")
    assert emb.shape == (3, 32_000, 32_000)
    layers = emb.__dask_graph__().layers.values()
    assert all(len(layer) == 1 or not layer.is_materialized() for layer in layers)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {"shape": [9]},
            r"the array 'row' has the dimensions \[\"y\"\] and the shape \[9\]: expected dimensions",
        ),
        ({"shape": [[8]]}, "the array 'row' has the dimensions"),
        ({"dimension_names": ["row"]}, r"the array 'row' has the dimensions \[\"row\"\]"),
        ({"dimension_names": "y"}, "the array 'row' has the dimensions"),
        ({"dimension_names": ["y", "y"], "shape": [8, 8]}, "the array 'row' has chunks of"),
        ({"shape": ...}, "the metadata of 'row' are not those of an array"),
        ({"chunk_grid": {"configuration": {"chunk_shape": [0]}}}, r"the array 'row' has chunks of \[0\]"),
        ({"data_type": "nothing"}, "cannot be opened"),
        ({"codecs": [{"name": "nothing"}]}, r"the array 'row' has codecs \['nothing'\]"),
        ({"codecs": [{"name": "bytes"}, {"name": "blosc"}]}, "cannot be opened"),
    ],
)
def test_a_malformed_coordinate_is_refused(changed: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = tmp_path / "area.zarr"
    group = written(path)
    arrays = group["consolidated_metadata"]["metadata"]
    arrays["row"] = {k: v for k, v in (arrays["row"] | changed).items() if v is not ...}
    (path / "zarr.json").write_text(json.dumps(group))
    with pytest.raises(StoreError, match=rf"area\.zarr' .*{says}"):
        xr_anysat.open(path)


class Harmful:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("where", ["filters", "compressor"])
@pytest.mark.parametrize("dtype", ["|O", "<f8"])
def test_a_store_with_pickles_executes_nothing(where: str, dtype: str, tmp_path: Path) -> None:
    """Zarr 2 has a codec that unpickles, and the metadata of a group of Zarr 3 may name arrays of Zarr 2."""
    path = tmp_path / "area.zarr"
    group = written(path)
    pickled = {"id": "pickle", "protocol": 5}
    metadata = {
        "zarr_format": 2, "node_type": "array", "shape": [], "chunks": [], "dtype": dtype, "fill_value": 0,
        "order": "C",
        "filters": [pickled] if where == "filters" else None, "compressor": None if where == "filters" else pickled,
        "dimension_names": [], "attributes": {"_ARRAY_DIMENSIONS": []},
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": []}},
    }  # fmt: skip
    group["consolidated_metadata"]["metadata"]["note"] = metadata
    shutil.rmtree(path / "note")
    (path / "note").mkdir()
    (path / "note" / "0").write_bytes(pickle.dumps([Harmful(tmp_path / "harm")]))
    (path / "note" / ".zarray").write_text(json.dumps(metadata))
    (path / "zarr.json").write_text(json.dumps(group))
    with pytest.raises(StoreError, match="the array 'note' has another format: expected an array of Zarr 3"):
        xr_anysat.open(path)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", ["pickle", "numcodecs.pickle", "numcodecs.zlib", 3, None])
@pytest.mark.parametrize("inside", [True, False])
def test_a_codec_of_another_package_is_refused(name: Any, inside: bool, tmp_path: Path) -> None:
    path = tmp_path / "area.zarr"
    group = written(path)
    array = group["consolidated_metadata"]["metadata"]["anysat" if inside else "row"]
    chain = array["codecs"][0]["configuration"]["codecs"] if inside else array["codecs"]
    chain.append({"name": name})
    (path / "zarr.json").write_text(json.dumps(group))
    with pytest.raises(
        StoreError, match=r"the array '.*' has codecs \[.*\]: expected some of \['blosc', 'bytes'"
    ):
        xr_anysat.open(path)


def test_a_damaged_coordinate_is_named(tmp_path: Path) -> None:
    path = tmp_path / "area.zarr"
    written(path)
    (path / "row" / "c" / "0").write_bytes(b"damaged")
    emb = xr_anysat.open(path)
    with pytest.raises(
        StoreError, match=r"the coordinate 'row' of .*area\.zarr' cannot be read: .*drop_vars\('row'\)"
    ):
        emb["row"].compute()
    np.testing.assert_array_equal(emb.drop_vars("row"), embedding()[:3])
    (path / "note" / "c").write_bytes(b"damaged")
    with pytest.raises(StoreError, match=r"cannot be opened: .*Its metadata or coordinates are damaged"):
        xr_anysat.open(path)


@pytest.mark.parametrize("value", [b"x", object(), {1, 2}, 1j, {(1, 2): 3}, np.datetime64("2022-01-01")])
def test_an_attribute_that_json_cannot_represent_is_named(value: Any, tmp_path: Path) -> None:
    emb = embedding().assign_attrs(note=value)
    for call in (lambda: exported(emb, tmp_path), lambda: emb.anysat.to_cog(tmp_path / "area.tif")):
        with pytest.raises(
            CubeError, match=r"attribute 'note' is .*which JSON cannot represent.*attrs\.pop\('note'\)"
        ):
            call()
    assert not files(tmp_path)


@pytest.mark.parametrize("name", ["ns", "bidx", "a\0", "\ud800"])
def test_an_attribute_that_is_no_tag_is_named(name: str, tmp_path: Path) -> None:
    emb = embedding().assign_attrs({name: "a"}).chunk(x=4)
    with pytest.raises(CubeError, match="cannot be a tag of a GeoTIFF"):
        emb.anysat.to_cog(tmp_path / "area.tif")
    assert not files(tmp_path)


@pytest.mark.parametrize("name", ["../../evil", "..", "", "a/b", "anysat/c", 3])
def test_a_coordinate_whose_name_is_a_path_is_refused(name: Any, tmp_path: Path) -> None:
    emb = embedding().assign_coords({name: ("x", np.arange(8))})
    with pytest.raises(CubeError, match=r"the cube cannot be stored: .*their names are text without '/'"):
        exported(emb, tmp_path / "deep" / "er")
    assert not files(tmp_path)


@pytest.mark.parametrize("values", [[object()] * 8, [{}] * 8, [1, "a"] * 4, ["\ud800", 1] * 4, [10**30] * 8])
def test_a_coordinate_of_other_values_is_refused(values: list[Any], tmp_path: Path) -> None:
    emb = embedding().assign_coords(row=("x", np.array(values, object)))
    with pytest.raises(
        CubeError, match=r"the cube cannot be stored: .*Coordinates of a store are numbers, text or times"
    ):
        exported(emb, tmp_path)
    assert not files(tmp_path)


@pytest.mark.parametrize("name", ["D", "y", "x"])
def test_a_coordinate_of_a_dim_that_has_two_dims_is_refused(name: str, tmp_path: Path) -> None:
    emb = xr.DataArray(np.ones((2, 2, 2), "float32"), dims=("D", "y", "x"))
    emb = emb.assign_coords(xr.Coordinates({name: (("y", "x"), np.ones((2, 2)))}, indexes={}))
    for call in (exported, compared, lambda emb, _: emb.anysat.sample(points())):
        with pytest.raises(
            CubeError, match=rf"the coordinate '{name}' has dims \('y', 'x'\): expected \('{name}',\)"
        ):
            call(emb, tmp_path)
    assert not files(tmp_path)


@pytest.mark.parametrize("name", ["y", "x"])
def test_coordinates_that_are_no_numbers_are_no_places(name: str) -> None:
    emb = embedding()
    text = emb.assign_coords({name: list("abcdefgh")})
    for call in (
        lambda: text.anysat.sample(points()),
        lambda: text.assign_attrs(anchor="grid").anysat.seam_score(),
    ):
        with pytest.raises(CubeError, match=f"'{name}' coordinates are missing"):
            call()


# ---------------------------------------------------------------------- tables


def points(*others: Any, **columns: Any) -> Any:
    """Return a table of points in the cube of `embedding`, the first of which are replaced by `others`."""
    import geopandas
    from shapely.geometry import Point

    emb = embedding()
    x, y = float(emb["x"][0]), float(emb["y"][0])
    places = [*others, *(Point(x + 10 * i, y - 10 * i) for i in range(len(others), 8))]
    table = {"label": ["a", "b"] * 4, **columns}
    return geopandas.GeoDataFrame(table, geometry=places, crs="EPSG:32632")


@pytest.mark.parametrize(
    "wkt", ["POINT EMPTY", "LINESTRING EMPTY", "POLYGON EMPTY", "POINT (nan nan)", "POINT (1e300 0)"]
)
def test_points_that_are_nowhere_are_outside(wkt: str) -> None:
    from shapely import from_wkt

    emb, table = embedding(), points(from_wkt(wkt), None)
    assert list(emb.anysat.sample(table)["status"]) == ["outside"] * 2 + ["ok"] * 6
    with pytest.warns(AnySatWarning, match="2 of 8 labels are left out"):
        assert emb.anysat.classify(table, "label")[0].attrs["samples"] == 6


def test_a_column_of_labels_that_exists_twice_is_refused() -> None:
    table = points(other=0).rename(columns={"other": "label"})
    with pytest.raises(
        OptionError, match="column='label': expected one column of this name, the labels have 2"
    ):
        embedding().anysat.classify(table, "label")


# ---------------------------------------------------------------------- cubes


@pytest.mark.parametrize("value", [3.5, [1], "x", "1 2", "a b c d e f"])
def test_a_damaged_transform_is_refused(value: Any) -> None:
    cube = placed()
    cube["spatial_ref"].attrs["GeoTransform"] = value
    emb = embedding()
    emb["spatial_ref"].attrs["GeoTransform"] = value
    attempt(lambda: cube.anysat.plan(2, model="tiny", weights="random"), lambda: emb.anysat.zonal(points()))
    if not isinstance(value, str):
        with pytest.raises(CubeError, match="the grid of the cube cannot be read: AttributeError"):
            cube.anysat.plan(2, model="tiny", weights="random")


@pytest.mark.parametrize("value", [["a"], [], HUGE, {"a": 1}])
@pytest.mark.parametrize("key", ["add_offset", "nodata", "_FillValue"])
def test_a_number_that_is_none_is_refused(key: str, value: Any) -> None:
    with pytest.raises(CubeError, match=f"{key}=.* in the cube's metadata: expected a number"):
        placed().assign_attrs({key: value}).anysat.plan(2, model="tiny", weights="random")


def test_a_grid_mapping_that_is_no_name_is_ignored() -> None:
    cube = odc_stac()
    for var in cube.data_vars.values():
        var.encoding["grid_mapping"] = var.attrs["grid_mapping"] = ["a"]
    attempt(lambda: cube.anysat.plan(2, model="tiny", weights="random"))


# ---------------------------------------------------------------------- random damage
# Few examples each; `pytest --hypothesis-profile long tests/package/test_untrusted.py` tries thousands.

MAX_EXPORTED_BYTES = 1 << 24


def exercise(emb: xr.DataArray, folder: Path) -> None:
    """Show, analyse and export an embedding that may be anything."""
    attempt(
        lambda: (repr(emb), emb._repr_html_(), repr(emb.anysat), emb.anysat._repr_html_()),
        emb.anysat.pool,
        lambda: emb.anysat.change(emb),
        lambda: encoder_spec_of(emb),
    )
    if emb.nbytes > MAX_EXPORTED_BYTES:
        return
    attempt(
        lambda: emb.anysat.to_zarr(folder / "out" / "copy.zarr"),
        lambda: emb.anysat.to_zarr(folder / "out" / "small.zarr", "int8"),
        lambda: emb.anysat.to_cog(folder / "out" / "copy.tif"),
        lambda: emb.anysat.seam_score(),
        lambda: emb.anysat.similarity((float(emb["x"][0]), float(emb["y"][0]))).load(),
        lambda: emb.load(),
        lambda: emb.anysat.preview(),
    )
    plt.close("all")
    back = through_netcdf(emb, folder / "out" / "copy.nc")
    attempt(lambda: emb.anysat.change(back), lambda: back.anysat.to_zarr(folder / "out" / "netcdf.zarr"))


def through_netcdf(emb: xr.DataArray, path: Path) -> xr.DataArray:
    """Write and read a NetCDF file, if the format can represent the cube."""
    try:
        emb.to_netcdf(path)
        with xr.open_dataarray(path) as back:
            return back.load()
    except Exception:  # of xarray or netCDF4
        return emb


def outside(folder: Path) -> set[Path]:
    return {p for p in folder.rglob("*") if p.is_file() and "out" not in p.relative_to(folder).parts}


@pytest.fixture(scope="module")
def original() -> xr.DataArray:
    """An embedding whose store has a margin, and 2 × 2 blocks."""
    cube = small_cube(height=13, width=13).chunk(time=3, y=5, x=5)
    with xr_anysat.config.set(tile=4):
        emb: xr.DataArray = cube.anysat.embed(2, period="2022", model="tiny", weights="random", norm="pastis")
    emb = emb.isel(D=slice(3)).load().chunk(D=-1, y=(5, 8), x=(5, 8))
    return emb.assign_coords(row=("y", np.arange(13)), note="a", time=np.datetime64("2022-01-01", "ns"))


@pytest.fixture(scope="module")
def unfinished() -> xr.DataArray:
    """An embedding whose statistics are computed with the first block that is stored."""
    cube = small_cube(height=8, width=8).chunk(time=3, y=4, x=4)
    emb: xr.DataArray = cube.anysat.embed(2, period="2022", model="tiny", weights="random", tile=4)
    return emb.isel(D=slice(3))


@pytest.fixture(scope="module", params=[None, "int8"])
def store(request: pytest.FixtureRequest, original: xr.DataArray, tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("valid") / "area.zarr"
    original.anysat.to_zarr(folder, request.param)
    return folder


@pytest.mark.slow
@given(data=st.data())
@RANDOM
def test_a_damaged_store(data: st.DataObject, store: Path, original: xr.DataArray) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "deep" / "er" / "area.zarr"
        shutil.copytree(store, path)
        damage_store(data.draw, path)
        (folder / "deep" / "er" / "out").mkdir()
        before = outside(folder)
        attempt(
            lambda: exercise(xr_anysat.open(path), folder / "deep" / "er"),
            lambda: xr_anysat.open(path).anysat.check(),
        )
        assert outside(folder) == before
        attempt(lambda: original.anysat.to_zarr(path))
        assert {p for p in outside(folder) if path not in p.parents} <= before | {
            path.with_name("area.stac.json"),
            path.with_name("anysat-tiny-random-0.json"),
        }


@pytest.mark.slow
@given(data=st.data())
@RANDOM
def test_a_damaged_store_that_is_resumed(
    data: st.DataObject, unfinished: xr.DataArray, tmp_path_factory: Any
) -> None:
    valid = tmp_path_factory.getbasetemp() / "unfinished.zarr"
    if not valid.exists():
        unfinished.anysat.to_zarr(valid)
        (valid / "anysat" / "c" / "0" / "0" / "1").unlink()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "area.zarr"
        shutil.copytree(valid, path)
        damage_store(data.draw, path)
        attempt(lambda: unfinished.anysat.to_zarr(path))


@pytest.mark.slow
@given(data=st.data())
@RANDOM
def test_damaged_attributes(data: st.DataObject, original: xr.DataArray) -> None:
    form = data.draw(st.sampled_from([dict, as_numpy, as_netcdf]))
    emb = original.copy()
    attrs = data.draw(mutated(original.attrs))
    emb.attrs = form(attrs) if isinstance(attrs, dict) else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "deep" / "er"
        (folder / "out").mkdir(parents=True)
        exercise(emb, folder)
        assert not outside(Path(name))


ATTRIBUTES = (
    "nodata", "_FillValue", "missing_value", "crs", "transform", "grid_mapping", "add_offset", "scale_factor", "items",
    "anysat_frames", "anysat_period", "anysat_period_times", "spatial_ref", "crs_wkt", "GeoTransform", "units",
    "source",
)  # fmt: skip
"""Attributes of cubes that are read."""

MAKERS = (placed, odc_stac, stackstac, xee, openeo, rioxarray_stack)


@pytest.mark.slow
@given(data=st.data())
@RANDOM
def test_damaged_cubes(data: st.DataObject) -> None:
    cube: Any = data.draw(st.sampled_from(MAKERS))().copy(deep=True)
    for part in (
        (cube, *cube.variables.values()) if isinstance(cube, xr.Dataset) else (cube, *cube.coords.values())
    ):
        extra = data.draw(st.dictionaries(st.sampled_from(ATTRIBUTES), st.sampled_from(VALUES), max_size=2))
        if data.draw(st.booleans()):
            attrs = data.draw(mutated({str(k): plain(v) for k, v in part.attrs.items()} | extra))
            part.attrs = attrs if isinstance(attrs, dict) else {}
    name = data.draw(st.sampled_from([None] * len(cube.coords) + [*cube.coords]))
    if name is not None:
        old = cube[name]
        values = data.draw(
            st.sampled_from([["a"], [NAN], [10**18], [0], [None], [True], [1 + 2j], ["2022-01-01"]])
        )
        new = np.array(values * max(1, old.size)).reshape(old.shape or (-1,))[: None if old.ndim else 1]
        cube = cube.assign_coords({name: (old.dims, new if old.ndim else new[0])})
    options: Any = {"model": "tiny", "weights": "random", "tile": 4}
    attempt(
        lambda: (repr(cube.anysat), cube.anysat._repr_html_()),
        lambda: cube.anysat.plan(2, **options),
        lambda: cube.anysat.frames(2).load(),
        lambda: cube.anysat.embed(None, **options),
        lambda: cube.anysat.preview(),
    )
    plt.close("all")


@pytest.mark.slow
@given(data=st.data())
@RANDOM
def test_damaged_frames(data: st.DataObject) -> None:
    frames = small_cube(height=6, width=6).anysat.frames(2, period="2022")
    items = [{"id": "A", "datetime": "2022-03-01T10:20:30Z", "used": "cloudy: 90 %"}]
    frames = frames.assign_attrs(items=json.dumps(items), catalog="https://stac.example.org")
    attrs = data.draw(mutated(frames.attrs))
    frames.attrs = attrs if isinstance(attrs, dict) else {}
    names = ["time", "doy", "n_obs", "bin_start", "bin_end", "band", "y", "x"]
    name = data.draw(st.sampled_from([None, None, *names]))
    if name in frames.coords:
        dim, size = frames[name].dims[0], frames[name].size
        values = data.draw(
            st.sampled_from([["a"] * size, [NAN] * size, [10**18] * size, [0] * size, [None] * size])
        )
        frames = frames.assign_coords({name: (dim, np.array(values))})
    attempt(
        lambda: (repr(frames), frames._repr_html_(), repr(frames.anysat), frames.anysat._repr_html_()),
        lambda: has_timeline(frames) and timeline(frames),
        lambda: frames.anysat.plan(None, model="tiny", weights="random", tile=4),
        lambda: frames.anysat.frames(None),
        lambda: frames.chunk(x=3).anysat.embed(None, model="tiny", weights="random", tile=4),
    )


@pytest.mark.parametrize("kind", RESULTS)
@pytest.mark.slow
@given(data=st.data())
@RANDOM
def test_damaged_json_of_results(kind: type[Statistics], data: st.DataObject) -> None:
    emb = xr.DataArray(np.ones((2, 2, 3), "float32"), dims=("D", "y", "x"))
    cube = small_cube(height=4, width=4).chunk(x=2)
    text = json.dumps(data.draw(mutated(RESULTS[kind])))
    if data.draw(st.integers(0, 4)) == 0:
        text = data.draw(damaged(text.encode("utf-8", "surrogatepass"))).decode("latin-1")

    def use() -> None:
        model: Any = kind.from_json(text)
        assert kind.from_json(model.to_json()) == model
        repr(model)
        if kind is Statistics:
            cube.anysat.embed(2, norm=model, model="tiny", weights="random", tile=4)
        elif kind is PCAModel:
            emb.anysat.reduce(model=model)[0].load()
            emb.anysat.rgb(model=model)[0].load()
        else:
            emb.anysat.cluster(model=model)[0].load()

    attempt(use)

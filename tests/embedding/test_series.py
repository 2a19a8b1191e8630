"""Series: `embed(by=...)`, their record, their stores, and their analysis."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import dask
import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cubes import BANDS, CRS, LEFT, TOP, no_compute

import xr_anysat
from xr_anysat import CubeError, CubeTypeError, OptionError, Statistics, StoreError
from xr_anysat.cube.periods import split_period
from xr_anysat.series import STEPS, step, steps

MODEL: dict[str, Any] = {"frames": 3, "model": "tiny", "weights": "random", "tile": 12}


def cube_of(
    start: str = "2021-01-05", end: str = "2022-12-28", *, days: int = 25, side: int = 24
) -> xr.DataArray:
    """A cube of several years, with gaps."""
    import odc.geo.xr  # noqa: F401

    rng = np.random.default_rng(0)
    times = pd.date_range(start, end, freq=f"{days}D")
    values = rng.integers(1, 5000, (len(times), 10, side, side)).astype("uint16")
    values[:, :, :2, :3] = 0
    coords = {
        "time": times, "band": list(BANDS),
        "y": TOP - 5 - 10.0 * np.arange(side), "x": LEFT + 5 + 10.0 * np.arange(side),
    }  # fmt: skip
    return xr.DataArray(values, coords, ("time", "band", "y", "x")).odc.assign_crs(CRS)


@pytest.fixture(scope="module")
def cube() -> xr.DataArray:
    return cube_of()


@pytest.fixture(scope="module")
def series(cube: xr.DataArray) -> xr.DataArray:
    return cube.anysat.embed(by="year", **MODEL)


# ---------------------------------------------------------------------- periods


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("year", ["2021-01-01/2022-01-01", "2022-01-01/2023-01-01"]),
        ("season", ["2020-12-01/2021-03-01", "2021-03-01/2021-06-01", "2021-06-01/2021-09-01"]),
        ("quarter", ["2021-01-01/2021-04-01", "2021-04-01/2021-07-01"]),
        ("month", ["2021-01-01/2021-02-01", "2021-02-01/2021-03-01"]),
        (["2021", ("2021-04-01", "2021-10-01"), "2022-06"],
         ["2021-01-01/2022-01-01", "2021-04-01/2021-10-01", "2022-06-01/2022-07-01"]),
    ],
)  # fmt: skip
def test_periods(cube: xr.DataArray, by: Any, expected: list[str]) -> None:
    assert split_period(by, cube, None)[: len(expected)] == expected


def test_a_unit_that_the_period_cuts_is_refused(cube: xr.DataArray) -> None:
    """Each step has the frames of its whole unit, so that years compare."""
    assert split_period("season", cube, ("2021-03-01", "2021-09-01")) == [
        "2021-03-01/2021-06-01", "2021-06-01/2021-09-01",
    ]  # fmt: skip
    with pytest.raises(
        OptionError,
        match=r"only a part of 2020-12-01/2021-03-01 and 2021-12-01/2022-03-01\. .*by=\['2021-01-01/2021-03-01'",
    ):
        cube.anysat.embed(by="season", period="2021", **MODEL)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"by": "decade"}, OptionError, "by='decade': expected one of 'year', 'season', 'quarter', 'month', or a list"),
        ({"by": []}, OptionError, r"by=\[\]: expected one of"),
        ({"by": 2021}, OptionError, "by=2021: expected one of"),
        ({"by": ["2022", "2021"]}, OptionError, "in the order of their first days"),
        ({"by": ["2021", "2021-01"]}, OptionError, "in the order of their first days, each once"),
        ({"by": ["2021", None]}, OptionError, "expected periods, not None"),
        ({"by": ["last year"]}, OptionError, "by='last year': expected '2022'"),
        ({"by": ["2021"], "period": "2021"}, OptionError, "with a list of periods"),
        ({"by": ["2021", "2024"]}, CubeError, r"no acquisition in 2024-.*by=\['2021-01-01/2022-01-01'\]"),
    ],
)  # fmt: skip
def test_refusals(cube: xr.DataArray, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        cube.anysat.embed(**options, **MODEL)


def test_frames_are_no_acquisitions(cube: xr.DataArray) -> None:
    with pytest.raises(OptionError, match=r"by='year' of composed frames: expected the acquisitions"):
        cube.anysat.frames(3).anysat.embed(None, by="year", model="tiny", weights="random")


# ---------------------------------------------------------------------- steps


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "pastis"}, {}, {"norm": "per_window_zscore", "output": "dense"}, {"overlap": 6}, {"output": "tile"},
        {"resize": 12}, {"fill_value": 0, "reduce": "mean"},
    ],
    ids=str,
)  # fmt: skip
def test_each_step_is_the_embedding_of_its_period(cube: xr.DataArray, options: dict[str, Any]) -> None:
    """With its record: the config of a step computes it again, that of the series computes the series."""
    made = cube.anysat.embed(by="year", **MODEL, **options)
    assert made.dims == ("time", "D", "y", "x")
    assert made["time"].dt.year.values.tolist() == [2021, 2022]
    stats = "per_window_zscore" if "norm" in options else Statistics.of(made)
    if not options:
        frames = [cube.anysat.frames(3, period=p) for p in ("2021", "2022")]
        both = np.concatenate([f.values for f in frames])
        np.testing.assert_allclose(stats.mean, np.nanmean(both, axis=(0, 2, 3)), rtol=1e-6)
    for one, year in zip(steps(made), ("2021", "2022"), strict=True):
        alone = cube.anysat.embed(period=year, **MODEL, **{"norm": stats, **options})
        assert one.attrs["temporal_window"] == alone.attrs["temporal_window"]
        np.testing.assert_array_equal(one, alone)
        xr.testing.assert_identical(cube.anysat.embed(**json.loads(one.attrs["config"])), one)
    xr.testing.assert_identical(cube.anysat.embed(**json.loads(made.attrs["config"])), made)


@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 40))
@settings(max_examples=8, deadline=None)
def test_chunks_change_no_bit(y: int, x: int, time: int) -> None:
    cube = cube_of()
    stats = Statistics.of(cube.anysat.embed(by="year", **MODEL))
    whole = cube.anysat.embed(by="year", norm=stats, **MODEL)
    with no_compute():
        lazy = cube.chunk(time=time, y=y, x=x).anysat.embed(by="year", norm=stats, **MODEL)
    np.testing.assert_array_equal(lazy.values, whole.values)


def test_large_frames_are_read_twice(
    cube: xr.DataArray, series: xr.DataArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xr_anysat.embedding.options.MAX_SHARED_FRAME_BYTES", 0)
    lazy = cube.chunk(y=12).anysat.embed(by="year", **MODEL)
    np.testing.assert_allclose(lazy, series, rtol=1e-4, atol=1e-5)


def test_all_steps_count_in_the_warning_of_the_size(
    cube: xr.DataArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xr_anysat.embedding.options.physical_memory", lambda: 600 << 10)
    cube.anysat.embed(period="2022", **MODEL)  # 576 KiB
    with pytest.warns(xr_anysat.AnySatWarning, match="and 1.12 MiB of float32 do not fit into the 600 KiB"):
        cube.anysat.embed(by="year", **MODEL)


def test_pooled(cube: xr.DataArray, series: xr.DataArray) -> None:
    made = cube.anysat.embed(by="year", pool="mean", **MODEL)
    assert made.dims == ("time", "D")
    np.testing.assert_allclose(made, series.mean(("y", "x")), rtol=1e-5, atol=1e-6)


def test_a_selected_step_has_its_own_record(series: xr.DataArray) -> None:
    own = step(series.sel(time="2022-01-01"))
    assert own.dims == ("D", "y", "x")
    assert own.attrs["temporal_window"] == "2022-01-01/2023-01-01"
    assert "by" not in json.loads(own.attrs["config"])
    for damaged, words in (
        (series.isel(time=0).assign_attrs({STEPS: "{}"}), "the step that begins on 2021-01-01, only of none"),
        (series.isel(time=0, drop=True), "no record of the step that begins on an unknown day"),
        (series.assign_attrs({STEPS: "{"}), "is not the record of the steps .*restore the attributes"),
        (series.assign_attrs({STEPS: '{"2021": 3}'}), "expected an object of objects"),
        (series.drop_attrs(), "is not the record of the steps .*KeyError"),
    ):
        with pytest.raises(CubeError, match=words):
            damaged.anysat.to_zarr("never.zarr")


@pytest.mark.parametrize("name", ["to_cog", "seam_score", "preview", "sample", "zonal", "nearest"])
def test_other_methods_take_a_step(series: xr.DataArray, name: str) -> None:
    needed = {"to_cog": ["a.tif"], "sample": [None], "zonal": [None], "nearest": [None]}
    with pytest.raises(
        CubeTypeError, match=r"a series \(time, D, y, x\): expected one step of it, emb.isel\(time=0\)"
    ):
        getattr(series.anysat, name)(*needed.get(name, []))


def test_it_is_shown(series: xr.DataArray) -> None:
    assert repr(series.anysat).startswith(
        "Series of embeddings (time: 2, D: 256, y: 24, x: 24)\nMethods: pool, to_zarr, append"
    )


# ---------------------------------------------------------------------- stores


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("codec", [None, "int8"])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_store_comes_back(
    cube: xr.DataArray, series: xr.DataArray, codec: str | None, lazy: bool, tmp_path: Path
) -> None:
    given = cube.chunk(y=12, x=24).anysat.embed(by="year", **MODEL) if lazy else series
    seen: list[tuple[int, int]] = []
    back = given.anysat.to_zarr(
        tmp_path / "s.zarr", codec, progress=lambda done, total: seen.append((done, total))
    )
    assert back.dims == ("time", "D", "y", "x")
    assert back.chunks is not None
    assert seen[-1][0] == seen[-1][1]
    assert back["period"].values.tolist() == series["period"].values.tolist()
    if codec is None:
        np.testing.assert_allclose(
            back, series, rtol=1e-4, atol=1e-5
        )  # merging statistics rounds differently
    else:
        np.testing.assert_allclose(back, series, atol=float(np.abs(series).max()) / 127)
    assert back.attrs.pop("codec", None) == codec
    for own, stored in zip(steps(series), steps(back), strict=True):
        recorded, expected = (json.loads(each.attrs["config"]) for each in (stored, own))
        for name in ("mean", "std"):
            np.testing.assert_allclose(recorded["norm"].pop(name), expected["norm"].pop(name), rtol=1e-12)
            np.testing.assert_allclose(stored.attrs[f"norm_{name}"], own.attrs[f"norm_{name}"], rtol=1e-12)
        assert recorded == expected
    # each step is a store of its own
    alone = xr_anysat.open(tmp_path / "s.zarr" / "2022-01-01_2023-01-01")
    np.testing.assert_array_equal(alone, back[1])
    assert len(back.anysat.check()) == 0


def test_it_is_resumed_at_any_moment(cube: xr.DataArray, tmp_path: Path) -> None:
    """With statistics that are computed first, and read from the store afterwards."""

    def embed() -> xr.DataArray:
        return cube.chunk(y=12, x=12).anysat.embed(by="year", **MODEL)

    whole = tmp_path / "whole.zarr"
    counts: list[int] = []
    embed().anysat.to_zarr(whole, progress=lambda done, total: counts.append(total))
    for moment in range(0, counts[0], 2):
        shutil.rmtree(tmp_path / "cut.zarr", ignore_errors=True)

        def stop(done: int, total: int, moment: int = moment) -> None:
            if done >= moment:
                raise RuntimeError("killed")

        with pytest.raises(RuntimeError, match="killed"):
            embed().anysat.to_zarr(tmp_path / "cut.zarr", progress=stop)
        embed().anysat.to_zarr(tmp_path / "cut.zarr")
        found, expected = files_of(tmp_path / "cut.zarr"), files_of(whole)
        assert found.keys() == expected.keys()
        assert [k for k in found if found[k] != expected[k] and not k.endswith("stac.json")] == []


def test_a_year_is_appended(cube: xr.DataArray, series: xr.DataArray, tmp_path: Path) -> None:
    target = tmp_path / "s.zarr"
    stored = series.anysat.to_zarr(target, "float16")
    later = cube_of("2023-01-05", "2024-12-28").chunk(y=9, x=9)
    stats = Statistics.of(stored)
    coming = later.anysat.embed(by="year", norm=stats, **MODEL)

    def stop(done: int, total: int) -> None:
        if done == total // 2 + 1:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        coming.anysat.append(target, progress=stop)
    whole = coming.anysat.append(target)
    assert whole["time"].dt.year.values.tolist() == [2021, 2022, 2023, 2024]
    np.testing.assert_array_equal(whole[2:], coming.values.astype("float16"))
    np.testing.assert_array_equal(whole[:2], stored)
    # a single embedding is appended, too, and once more nothing is written
    one = cube_of("2025-01-05", "2025-12-28").anysat.embed(period="2025", norm=stats, **MODEL)
    assert one.anysat.append(target).sizes["time"] == 5
    before = files_of(target)
    one.anysat.append(target)
    assert files_of(target) == before


def test_what_cannot_be_appended(cube: xr.DataArray, series: xr.DataArray, tmp_path: Path) -> None:
    target = tmp_path / "s.zarr"
    with pytest.raises(StoreError, match=r"there is no series at .*embed\(by='year'\).anysat.to_zarr"):
        series.anysat.append(target)
    assert not target.exists()
    stored = series.anysat.to_zarr(target)
    stats = Statistics.of(stored)
    later = cube_of("2023-01-05", "2023-12-28")
    for emb, error, words in (
        (later.anysat.embed(by="year", norm="pastis", **MODEL), CubeError, "different settings: statistics"),
        (
            later.anysat.embed(by="year", norm=stats, **{**MODEL, "frames": 2}),
            CubeError,
            "frames 2 here, 3 in",
        ),
        (
            later[..., :12].anysat.embed(by="year", norm=stats, **MODEL),
            StoreError,
            "has the grid .*the same area",
        ),
        (
            cube.anysat.embed(by=["2022-01"], norm=stats, **{**MODEL, "frames": 3}),
            StoreError,
            "begins on the same day",
        ),
        (
            later.anysat.embed(by="year", norm=stats, **MODEL)[0].drop_attrs(),
            CubeError,
            "different settings|no period",
        ),
    ):
        with pytest.raises(error, match=words):
            emb.anysat.append(target)
    assert xr_anysat.open(target).sizes["time"] == 2


def test_another_series_is_refused(cube: xr.DataArray, series: xr.DataArray, tmp_path: Path) -> None:
    target = tmp_path / "s.zarr"
    series.anysat.to_zarr(target)
    with pytest.raises(StoreError, match=r"was begun with the steps .*add steps with series.anysat.append"):
        series[:1].anysat.to_zarr(target)
    with pytest.raises(StoreError, match="different settings and cannot be resumed: norm is"):
        cube.anysat.embed(by="year", norm="pastis", **MODEL).anysat.to_zarr(target)
    with pytest.raises(StoreError, match=r"a series exists at .*resume=False"):
        series.anysat.to_zarr(target, resume=False)
    with pytest.raises(StoreError, match=r"not what emb\.anysat\.to_zarr"):
        series[0].anysat.to_zarr(target)
    series[0].anysat.to_zarr(tmp_path / "one.zarr")
    with pytest.raises(StoreError, match="is a store of one embedding, not of a series"):
        series.anysat.to_zarr(tmp_path / "one.zarr")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: (p / "notes").mkdir(), "contains 'notes', which is no step of a series"),
        (lambda p: (p / "2022-13-01_2023-01-01").mkdir(), "which is no step of a series"),
        (lambda p: (p / "zarr.json").write_text('{"attributes": {"anysat_series": "[]"}}'), "is damaged: "),
        (lambda p: (p / "zarr.json").write_text('{"attributes": {"anysat_series": "{"}}'), "is damaged: "),
        (lambda p: [shutil.rmtree(d) for d in p.iterdir() if d.is_dir()], "has no step yet"),
    ],
)
def test_damaged_series_are_refused(series: xr.DataArray, change: Any, words: str, tmp_path: Path) -> None:
    target = tmp_path / "s.zarr"
    series.anysat.to_zarr(target)
    change(target)
    with pytest.raises(StoreError, match=words):
        xr_anysat.open(target)


def test_a_store_object_has_no_place_for_steps(series: xr.DataArray) -> None:
    from zarr.storage import MemoryStore

    with pytest.raises(OptionError, match=r"a series in .*: expected a path or a URL"):
        series.anysat.to_zarr(MemoryStore())


def test_a_damaged_block_of_a_step_is_found(series: xr.DataArray, tmp_path: Path) -> None:
    target = tmp_path / "s.zarr"
    back = series.anysat.to_zarr(target)
    block = target / "2022-01-01_2023-01-01" / "anysat" / "c" / "0" / "0" / "0"
    data = bytearray(block.read_bytes())
    data[len(data) // 2] ^= 1
    block.write_bytes(data)
    table = back.anysat.check(remove_damaged=True)
    assert table["period"].tolist() == ["2022-01-01/2023-01-01"]
    assert "damaged" in table["problem"].iloc[0]
    np.testing.assert_array_equal(series.anysat.to_zarr(target), series)


def test_a_url(series: xr.DataArray) -> None:
    back = series.anysat.to_zarr("memory://years/s.zarr")
    np.testing.assert_array_equal(back, series)


def test_on_a_cluster(cube: xr.DataArray, client: Any, tmp_path: Path) -> None:
    """The cluster computes the statistics of all steps once, and every block; a persisted series is the same."""
    made = cube.chunk(y=12, x=12).anysat.embed(by="year", **MODEL)
    with dask.config.set(scheduler="threads"):
        here = made.anysat.to_zarr(tmp_path / "here.zarr")
    for name, each in (("there", made), ("persisted", made.persist())):
        there = each.anysat.to_zarr(tmp_path / f"{name}.zarr")
        np.testing.assert_array_equal(there, here)
        assert there.attrs["config"] == here.attrs["config"]


# ---------------------------------------------------------------------- analysis


def test_analysis_over_time(series: xr.DataArray) -> None:
    """Fits see all steps; each step of the result is that of the step alone with the same model."""
    lazy = series.chunk(time=1, y=7, x=10)
    for name, argument in (("cluster", 3), ("reduce", 4), ("rgb", None)):
        call = getattr(series.anysat, name)
        made, model = call() if argument is None else call(argument)
        assert made.sizes["time"] == 2
        assert model.cells == int(np.isfinite(series.values).all(1).sum())
        for i in range(2):
            alone, _ = getattr(step(series[i]).anysat, name)(model=model)
            np.testing.assert_array_equal(made[i], alone)
        again, same = getattr(lazy.anysat, name)(*([] if argument is None else [argument]))
        assert same == model
        assert again.chunks is not None
        np.testing.assert_array_equal(again, made)
        assert again.dims[0] == "time"
    vector = series.values[0, :, 5, 5]
    alike = lazy.anysat.similarity(vector)
    assert alike.dims == ("time", "y", "x")
    np.testing.assert_array_equal(alike[1], step(series[1]).anysat.similarity(vector))
    with pytest.raises(OptionError, match="in a series: expected a vector"):
        series.anysat.similarity((LEFT + 5, TOP - 5))


def test_change_from_step_to_step(series: xr.DataArray) -> None:
    with no_compute():
        moved = series.chunk(y=5).anysat.change()
    assert moved["time"].dt.year.values.tolist() == [2022]
    assert moved.attrs["periods"] == ["2021-01-01/2022-01-01", "2022-01-01/2023-01-01"]
    np.testing.assert_array_equal(moved[0], step(series[0]).anysat.change(step(series[1])))
    for call in (lambda: series[:1].anysat.change(), lambda: series.anysat.change(series[0])):
        with pytest.raises(OptionError, match="expected at least two steps, and no other cube"):
            call()
    with pytest.raises(CubeTypeError, match="NoneType"):
        step(series[0]).anysat.change()


def test_labels_with_a_year(series: xr.DataArray) -> None:
    """Each label is a sample of its own year."""
    rng = np.random.default_rng(0)
    rows, cols = rng.integers(4, 24, (2, 60))
    year = np.where(np.arange(60) % 2, 2021, 2022)
    at = gpd.points_from_xy(series.x.values[cols], series.y.values[rows], crs=CRS)
    found = series.values[year - 2021, :, rows, cols]
    table = gpd.GeoDataFrame(
        {
            "kind": np.where(found[:, 0] > np.median(found[:, 0]), "a", "b"),
            "v": found[:, 1] * 3,
            "year": year,
        },
        geometry=at,
    )
    table["day"] = pd.to_datetime(table["year"].astype(str) + "-07-01")
    table["span"] = table["year"].astype(str) + "-06"
    for kind, column in (("classify", "kind"), ("regress", "v")):
        made, model = getattr(series.anysat, kind)(table, column, time="year", groups="year")
        assert model.evaluation.folds == ("2021", "2022")
        name = "class" if kind == "classify" else column
        assert made[name].dims == ("time", "y", "x")
        np.testing.assert_array_equal(np.sort(model.vectors, 0), np.sort(found, 0))
        for other in ("day", "span"):
            again, same = getattr(series.chunk(y=8).anysat, kind)(table, column, time=other, groups="year")
            assert same == model
            xr.testing.assert_identical(again.compute(), made)
        alone, _ = getattr(step(series[1]).anysat, kind)(model=model)
        np.testing.assert_array_equal(made[name][1], alone[name])
        scores = series.anysat.evaluate(table, model, time="year")
        assert len(scores.fold) == len(model.vectors)
    with pytest.raises(OptionError, match="of a series with labels: expected the column with their time"):
        series.anysat.classify(table, "kind")
    with pytest.raises(OptionError, match="time='year' with one period"):
        step(series[0]).anysat.classify(table, "kind", time="year")
    with pytest.raises(OptionError, match="time='when': expected a column of the labels"):
        series.anysat.classify(table, "kind", time="when")
    with pytest.raises(OptionError, match="kind of a label='a': expected '2022'"):
        series.anysat.classify(table, "v", time="kind")
    with pytest.warns(xr_anysat.AnySatWarning, match="30 of 60 labels are left out"):
        series.anysat.regress(table.assign(year=table["year"] + 1), "v", time="year", block_m=50)

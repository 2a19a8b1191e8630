"""Promise 5: every output carries all that is needed to make it again."""

from __future__ import annotations

import hashlib
import inspect
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from support.cubes import small_cube

import xr_anysat
from xr_anysat import CubeError, StoreError
from xr_anysat.record import FIELDS, RECORD_VERSION, Field

TINY = {"model": "tiny", "weights": "random"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"frames": None},
        {"frames": 3, "period": ("2022-02-01", "2022-11-01"), "reduce": "mean", "empty": "nearest"},
        {"frames": 4, "doy_base": 1, "doy": "observed", "fill_value": 0.0},
        {"output": "dense", "patch_size": 20, "tile": 8, "anchor": "cube"},
        {"norm": "pastis", "output": "tile", "tile": 12},
        {"norm": xr_anysat.Statistics(range(1, 11), range(11, 21)), "precision": "bfloat16"},
        {"resize": 12, "pool": "max", "nodata": 5},
        {"weights": ("random", 9), "batch": 2},
    ],
)
@pytest.mark.parametrize("lazy", [False, True])
def test_config_makes_it_again(options: dict[str, Any], lazy: bool) -> None:
    cube = small_cube(height=26, width=26)
    cube = cube.chunk(time=3, y=13) if lazy else cube
    first = cube.anysat.embed(**{**TINY, **options})
    config = json.loads(first.attrs["config"])
    again = xr_anysat.embed(cube, **config)
    xr.testing.assert_identical(again.compute(), first.compute())


def test_attrs_of_an_embedding(formula_tiny: Path) -> None:
    cube = small_cube(height=26, width=26)
    emb = cube.anysat.embed(4, period="2022", patch_size=20, tile=8, model="tiny", weights=formula_tiny)
    a = emb.attrs
    assert a["model"] == "tiny"
    assert a["weights"] == str(formula_tiny)
    assert a["weights_sha256"] == hashlib.sha256(formula_tiny.read_bytes()).hexdigest()
    assert (a["patch_size_m"], a["tile"], a["output"], a["anchor"]) == (20, 8, "patch", "grid")
    assert a["norm"] == "per_tile_zscore"
    stats = cube.anysat.statistics(4, period="2022")
    np.testing.assert_allclose(a["norm_mean"], stats.mean, rtol=1e-12)
    np.testing.assert_allclose(a["norm_std"], stats.std, rtol=1e-12)
    frames = cube.anysat.frames(4, period="2022")
    assert a["n_frames"] == frames.sizes["time"]
    assert a["doy0_values"] == frames["doy"].values.tolist()
    assert a["frame_dates"] == [str(t)[:10] for t in frames["time"].values]
    assert a["temporal_window"] == "2022-01-01/2023-01-01"
    assert a["grid_hw"] == list(emb.shape[1:])
    assert a["grid_shape"] == list(emb.shape)
    assert a["precision"] == "float32"
    assert a["device"] == "cpu"
    assert json.loads(a["versions"])["xr_anysat"] == xr_anysat.__version__
    assert json.loads(a["frames"])["acquisitions"] == cube.sizes["time"]


def test_base_zero_days_are_recorded_whatever_the_model_saw() -> None:
    cube = small_cube(height=4, width=4)
    zero = cube.anysat.embed(3, period="2022", **TINY)
    one = cube.anysat.embed(3, period="2022", doy_base=1, **TINY)
    assert zero.attrs["doy0_values"] == one.attrs["doy0_values"]
    assert (zero.attrs["doy_base"], one.attrs["doy_base"]) == (0, 1)
    assert not np.allclose(zero.values, one.values)


def test_lazy_output_says_where_its_statistics_come_from() -> None:
    cube = small_cube(height=8, width=8).chunk(time=1)
    attrs = cube.anysat.embed(3, **TINY).attrs
    assert "cube.anysat.statistics()" in attrs["norm_statistics"]
    assert attrs["device"] == "auto"
    saved = cube.anysat.statistics(3)
    fixed = cube.anysat.embed(3, norm=saved, **TINY)
    assert fixed.attrs["norm_mean"] == list(saved.mean)
    xr.testing.assert_allclose(fixed.compute(), cube.anysat.embed(3, **TINY).compute(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", ["zarr", "h5netcdf"])
def test_embeddings_survive_files(engine: str, tmp_path: Path) -> None:
    import odc.geo.xr  # noqa: F401

    cube = small_cube(height=12, width=12).assign_coords(tile_id="32UQD")
    emb = cube.chunk(time=1).anysat.embed(3, tile=4, **TINY)
    path = tmp_path / "embedding"
    if engine == "zarr":
        emb.chunk(y=8, x=8).to_dataset().to_zarr(path)  # Zarr wants chunks of one size
    else:
        emb.to_netcdf(path, engine=engine)
    back = xr.open_dataset(path, engine=engine, decode_coords="all")["anysat"]
    xr.testing.assert_equal(back.drop_vars("spatial_ref"), emb.compute().drop_vars("spatial_ref"))
    assert back.odc.geobox == emb.odc.geobox
    assert json.loads(back.attrs["config"]) == json.loads(emb.attrs["config"])
    assert back["tile_id"].item() == "32UQD"


@pytest.mark.parametrize(("output", "cell"), [("patch", 2), ("dense", 1), ("local", 1), ("tile", 6)])
@pytest.mark.parametrize("lazy", [False, True])
def test_cells_lie_where_they_are(output: str, cell: int, lazy: bool) -> None:
    """Cell centers are exact: each cell covers its pixels; the first cells extend beyond the corner of the cube."""
    import odc.geo.xr  # noqa: F401

    cube = small_cube(height=17, width=15, row=500_003, col=60_005)
    cube = cube.chunk(time=2, y=5, x=4) if lazy else cube
    emb = cube.anysat.embed(3, patch_size=20, tile=6, output=output, anchor="grid", **TINY)
    assert emb.odc.crs.to_epsg() == 32632
    geobox = emb.odc.geobox
    assert geobox.resolution.x == 10 * cell
    left = 60_005 // cell * cell * 10
    top = -(500_003 // cell * cell) * 10
    assert (geobox.affine.c, geobox.affine.f) == (left, top)
    inside = cube.odc.geobox.extent
    assert geobox.extent.contains(inside)
    np.testing.assert_allclose(emb.x.values, left + 10 * cell * (np.arange(emb.sizes["x"]) + 0.5))
    np.testing.assert_allclose(emb.y.values, top - 10 * cell * (np.arange(emb.sizes["y"]) + 0.5))


def test_plain_arrays_keep_their_coordinates() -> None:
    cube = small_cube(height=8, width=8, crs=None).assign_coords(
        y=np.arange(8) * 10.0, x=np.arange(8) * 10.0 + 100
    )
    emb = cube.anysat.embed(3, patch_size=20, tile=8, **TINY)
    assert emb.y.values.tolist() == [5, 25, 45, 65]
    assert emb.x.values.tolist() == [105, 125, 145, 165]
    resized = cube.anysat.embed(3, resize=4, **TINY)
    assert resized.y.values.tolist() == [5, 25, 45, 65]
    bare = small_cube(height=8, width=8, crs=None).anysat.embed(3, patch_size=20, tile=8, **TINY)
    assert not bare.coords


def test_anchor_is_what_was_effective() -> None:
    small, large = small_cube(height=20, width=20), small_cube(height=20, width=25)
    assert small.anysat.embed(2, **TINY).attrs["anchor"] == "cube"
    assert large.anysat.embed(2, **TINY).attrs["anchor"] == "grid"
    plain = small_cube(height=8, width=30, crs=None)
    assert plain.anysat.embed(2, **TINY).attrs["anchor"] == "cube"


def test_pool() -> None:
    cube = small_cube(height=12, width=12, dates=2, gaps=0.4)
    emb = cube.anysat.embed(None, **TINY)
    assert np.isnan(emb.values).any()
    for how in ("mean", "max"):
        want = getattr(np, f"nan{how}")(emb.values, axis=(1, 2))
        for pooled in (emb.anysat.pool(how), cube.anysat.embed(None, pool=how, **TINY)):
            assert pooled.dims == ("D",)
            assert pooled.attrs["pool"] == how
            np.testing.assert_allclose(pooled.values, want, rtol=1e-5)
        lazy = cube.chunk(time=1, y=5).anysat.embed(None, pool=how, **TINY)
        assert lazy.chunks is not None
        np.testing.assert_allclose(lazy.values, want, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- the schema


def maps(**config: Any) -> xr.DataArray:
    """An embedding whose record says `config` too, as a version with more options would write it."""
    cube = small_cube(height=12, width=12).chunk(time=9, y=4, x=4)
    emb = cube.anysat.embed(3, period="2022", tile=4, norm="pastis", **TINY)
    return emb.assign_attrs(config=json.dumps({**json.loads(emb.attrs["config"]), **config}))


def without(record: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k not in names}


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_option_of_embed_is_in_the_schema() -> None:
    _, *options = inspect.signature(xr_anysat.embed).parameters.values()
    options = [option for option in options if option.name != "by"]  # it repeats an embedding
    assert list(FIELDS) == [option.name for option in options]
    assert {o.name: o.default for o in options} == {name: field.default for name, field in FIELDS.items()}
    config = json.loads(maps().attrs["config"])
    assert list(config) == list(FIELDS)
    assert all(field.since <= RECORD_VERSION for field in FIELDS.values())


GOLDENS = Path(__file__).parent / "goldens"
"""Files of record version 0, written by commit a168b43, the last one whose records have no version.

That commit ran::

    cube = small_cube(height=12, width=12).chunk(time=9, y=4, x=4)
    options = dict(frames=3, period="2022", tile=4, patch_size=20, output="tile", model="tiny", weights="random")
    # KeyboardInterrupt once 4 of 16 blocks are finished; the folder is version_0.zarr.zip
    cube.anysat.embed(**options).anysat.to_zarr("area.zarr", progress=stop)
    emb = cube.anysat.embed(**options, norm="pastis").isel(D=slice(0, 3))
    # the models, as objects of one JSON file, are version_0_models.json
    emb.anysat.reduce(2)[1], emb.anysat.cluster(2)[1], cube.anysat.statistics(3, period="2022")
"""


def version_0_embedding(**options: Any) -> xr.DataArray:
    """The embedding of the goldens, by today's code."""
    cube = small_cube(height=12, width=12).chunk(time=9, y=4, x=4)
    return cube.anysat.embed(3, period="2022", tile=4, patch_size=20, output="tile", **options, **TINY)


def version_0_models() -> dict[str, str]:
    """JSON of each model of the goldens."""
    models = json.loads((GOLDENS / "version_0_models.json").read_text())
    return {name: json.dumps(model) for name, model in models.items()}


@pytest.mark.filterwarnings("ignore:.*was started with:xr_anysat.errors.AnySatWarning")  # other versions
def test_a_store_begun_by_the_schema_before_is_resumed(tmp_path: Path) -> None:
    path = tmp_path / "area.zarr"
    zipfile.ZipFile(GOLDENS / "version_0.zarr.zip").extractall(path)
    before, emb = files(path), version_0_embedding()
    finished = {name for name in before if name.startswith("anysat/c/")}
    assert len(finished) == 4
    done: list[tuple[int, int]] = []
    resumed = emb.anysat.to_zarr(path, progress=lambda *counts: done.append(counts)).compute()
    assert (done[0], done[-1]) == ((4, 16), (16, 16))
    after = files(path)
    assert {name: after[name] for name in before if name != "zarr.json"} == without(before, "zarr.json")
    for key in ("attributes", "consolidated_metadata"):  # what the old version says is kept
        assert json.loads(after["zarr.json"])[key] == json.loads(before["zarr.json"])[key]
    # the CPU that wrote the golden may have rounded otherwise
    xr.testing.assert_allclose(resumed, emb.compute(), rtol=1e-4, atol=1e-4)
    whole = emb.anysat.to_zarr(tmp_path / "whole" / "area.zarr")
    np.testing.assert_allclose(whole.attrs["norm_mean"], resumed.attrs["norm_mean"], rtol=1e-9)
    assert json.loads(whole.attrs["config"]) == json.loads(resumed.attrs["config"])


def test_a_store_begun_by_the_schema_before_is_resumed_only_by_the_same_options(tmp_path: Path) -> None:
    zipfile.ZipFile(GOLDENS / "version_0.zarr.zip").extractall(tmp_path / "area.zarr")
    with pytest.raises(StoreError, match=r'precision is "float32" in the store and "bfloat16" here'):
        version_0_embedding(precision="bfloat16").anysat.to_zarr(tmp_path / "area.zarr")


def test_models_fitted_by_the_schema_before_are_applied() -> None:
    models = version_0_models()
    emb = version_0_embedding(norm="pastis").isel(D=slice(0, 3)).compute()
    reducer = xr_anysat.Reducer.from_json(models["reduce"])
    assert isinstance(reducer, xr_anysat.PCAModel)
    assert json.loads(reducer.to_json()) == json.loads(models["reduce"])
    reduced, _ = emb.anysat.reduce(model=reducer)
    again, own = emb.anysat.reduce(2)
    np.testing.assert_allclose(reduced.values, again.values, rtol=1e-3, atol=1e-3)
    assert own.made_with == reducer.made_with
    clusters = xr_anysat.Clusters.from_json(models["cluster"])
    np.testing.assert_array_equal(emb.anysat.cluster(model=clusters)[0], emb.anysat.cluster(2)[0])
    statistics = xr_anysat.Statistics.from_json(models["statistics"])
    assert version_0_embedding(norm=statistics).attrs["norm_mean"] == list(statistics.mean)
    with pytest.raises(CubeError, match="statistics"):
        version_0_embedding(norm=statistics).isel(D=slice(0, 3)).anysat.reduce(model=reducer)


def test_an_embedding_that_lost_the_record_of_its_frames_compares_with_none() -> None:
    emb = maps()
    lost = emb.copy()
    lost.attrs = without(emb.attrs, "frames")
    with pytest.raises(CubeError, match="reduce not recorded here, 'median' in the other"):
        lost.anysat.change(emb)


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that a later version adds."""
    monkeypatch.setitem(FIELDS, "attention", Field("tokens", since=RECORD_VERSION + 1))


@pytest.mark.slow
@pytest.mark.usefixtures("attention")
def test_an_option_that_is_new_and_differs_is_refused_by_all(tmp_path: Path) -> None:
    old, new = maps(), maps(attention="heads")
    old.anysat.to_zarr(tmp_path / "area.zarr")
    with pytest.raises(StoreError, match=r'config\.attention is "tokens" in the store and "heads" here'):
        new.anysat.to_zarr(tmp_path / "area.zarr")
    says = "attention 'heads' here, 'tokens' (in the other|of the model)"
    with pytest.raises(CubeError, match=says):
        new.anysat.change(old)
    with pytest.raises(CubeError, match=says):
        new.anysat.reduce(model=old.anysat.reduce(2)[1])
    with pytest.raises(CubeError, match=says):
        new.anysat.rgb(model=old.anysat.rgb()[1])
    with pytest.raises(CubeError, match=says):
        new.anysat.cluster(model=old.anysat.cluster(2)[1])


@pytest.mark.slow
def test_an_option_that_is_new_and_at_its_default_is_refused_by_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = maps()
    old.anysat.to_zarr(tmp_path / "area.zarr")
    models = old.anysat.reduce(2)[1], old.anysat.cluster(2)[1]  # of the version without the option
    assert "attention" not in models[0].made_with
    monkeypatch.setitem(FIELDS, "attention", Field("tokens", since=RECORD_VERSION + 1))
    new = maps(attention="tokens")
    new.anysat.to_zarr(tmp_path / "area.zarr")
    assert float(new.anysat.change(old).max()) < 1e-6
    new.anysat.reduce(model=models[0])
    new.anysat.cluster(model=models[1])


@pytest.mark.usefixtures("attention")
def test_an_option_that_changes_no_result_is_refused_by_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FIELDS, "attention", Field(None, results=False, vectors=False))
    maps(attention="heads").anysat.to_zarr(tmp_path / "area.zarr")
    maps().anysat.to_zarr(tmp_path / "area.zarr")
    assert float(maps().anysat.change(maps(attention="heads")).max()) < 1e-6


def newer(version: int = RECORD_VERSION + 1, **config: Any) -> xr.DataArray:
    """An embedding whose record a later version wrote, with options that this version does not know."""
    return maps(**config).assign_attrs(record_version=version)


UPGRADE = "written by a newer version of xr_anysat.*pip install -U xr_anysat"


def test_a_newer_record_that_cannot_be_judged_is_refused_by_all(tmp_path: Path) -> None:
    old, new = maps(), newer(attention="heads")
    with pytest.raises(CubeError, match=f"attention 'heads' here, not recorded in the other.*{UPGRADE}"):
        new.anysat.change(old)
    with pytest.raises(CubeError, match=f"attention not recorded here, 'heads' in the other.*{UPGRADE}"):
        old.anysat.change(new)
    for emb, fitted in ((old, new), (new, old)):
        with pytest.raises(CubeError, match=UPGRADE):
            emb.anysat.reduce(model=xr_anysat.PCAModel.from_json(fitted.anysat.reduce(2)[1].to_json()))
        with pytest.raises(CubeError, match=UPGRADE):
            emb.anysat.cluster(model=fitted.anysat.cluster(2)[1])
    new.anysat.to_zarr(tmp_path / "area.zarr")
    with pytest.raises(StoreError, match=rf"config\.attention is \"heads\" in the store.*{UPGRADE}"):
        old.anysat.to_zarr(tmp_path / "area.zarr")


def test_an_option_of_newer_frames_is_refused() -> None:
    old, new = maps(), newer()
    record = json.loads(new.attrs["frames"])
    new.attrs["frames"] = json.dumps({**record, "weighting": "cloud"})
    with pytest.raises(CubeError, match=f"weighting 'cloud' here, not recorded in the other.*{UPGRADE}"):
        new.anysat.change(old)


def test_newer_records_that_agree_are_comparable(tmp_path: Path) -> None:
    one, other = newer(attention="heads"), newer(RECORD_VERSION + 2, attention="heads")
    assert float(one.anysat.change(other).max()) < 1e-6
    one.anysat.reduce(model=other.anysat.reduce(2)[1])
    assert float(newer().anysat.change(maps()).max()) < 1e-6  # newer, with no option that is unknown
    newer().anysat.to_zarr(tmp_path / "area.zarr")
    maps().anysat.to_zarr(tmp_path / "area.zarr")


def test_attributes_of_users_are_ignored() -> None:
    own = newer().assign_attrs(mission="S2A", record_version="mine")
    assert float(own.anysat.change(maps()).max()) < 1e-6
    assert float(maps(note="mine").anysat.change(maps()).max()) < 1e-6


def test_a_newer_option_that_is_null_cannot_be_judged_either(tmp_path: Path) -> None:
    new = newer(attention=None)
    with pytest.raises(CubeError, match=UPGRADE):
        new.anysat.change(maps())
    new.anysat.to_zarr(tmp_path / "area.zarr")
    with pytest.raises(StoreError, match=UPGRADE):
        maps().anysat.to_zarr(tmp_path / "area.zarr")

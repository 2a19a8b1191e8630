"""Promise 5: every output carries all that is needed to make it again."""

from __future__ import annotations

import hashlib
import inspect
import json
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
    """Cell centres are true: each cell covers its pixels, the first ones reaching over the cube's corner."""
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
    assert list(FIELDS) == [option.name for option in options]
    assert {o.name: o.default for o in options} == {name: field.default for name, field in FIELDS.items()}
    config = json.loads(maps().attrs["config"])
    assert list(config) == list(FIELDS)
    assert all(field.since <= RECORD_VERSION for field in FIELDS.values())


def test_a_store_begun_by_the_schema_before_is_resumed(tmp_path: Path) -> None:
    """Records of version 0 had no version, and those before them no ``overlap``."""
    emb, path = maps(), tmp_path / "old" / "area.zarr"

    def stop(finished: int, total: int) -> None:
        if finished >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        emb.anysat.to_zarr(path, progress=stop)
    metadata = json.loads((path / "zarr.json").read_text())
    identity = json.loads(metadata["attributes"]["anysat_store"])
    attrs = without(identity["attrs"], "record_version", "overlap")
    identity["attrs"] = attrs | {"config": without(attrs["config"], "overlap")}
    metadata["attributes"]["anysat_store"] = json.dumps(identity)
    (path / "zarr.json").write_text(json.dumps(metadata))

    resumed = emb.anysat.to_zarr(path)
    whole = emb.anysat.to_zarr(tmp_path / "new" / "area.zarr")
    xr.testing.assert_identical(resumed.compute(), whole.compute())
    old, new = (without(files(tmp_path / name / "area.zarr"), "zarr.json") for name in ("old", "new"))
    assert old == new


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

"""The synthetic scene is realistic and consistent; the demo runs end to end and does not mislead."""

import hashlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import dask
import matplotlib.image
import numpy as np
import pystac
import pytest
import rasterio
import xarray as xr

import xr_anysat
from xr_anysat.__main__ import main
from xr_anysat.demo import run as demo
from xr_anysat.demo.scene import BANDS, BANDS_20M, CLASSES, make_scene, open_scene
from xr_anysat.errors import AnySatError, CubeError, OptionError, WeightsError
from xr_anysat.stac.search import SCL_INVALID, open_s2

pytestmark = pytest.mark.slow

SIZE = (96, 128)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    return make_scene(tmp_path_factory.mktemp("scene"), size=SIZE, dates=18, seed=3)


@pytest.fixture(scope="module")
def cube(scene):
    return open_scene(scene.folder, chunks=64).compute()


@pytest.fixture(scope="module")
def landcover(scene):
    return read(scene.landcover)


def read(path):
    with rasterio.open(path) as file:
        return file.read(1)


def no_compute(*_args, **_kwargs):
    raise AssertionError("something was computed")


# --- the scene ----------------------------------------------------------------------------------


def digest(folder):
    files = sorted(folder.rglob("*.tif"))
    return {f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_same_seed_same_scene(tmp_path):
    a, b, c = (
        make_scene(tmp_path / name, size=(32, 48), dates=3, seed=seed)
        for name, seed in [("a", 1), ("b", 1), ("c", 2)]
    )
    assert digest(a.folder) == digest(b.folder)
    assert len(digest(a.folder)) == 3 * 11 + 1
    assert digest(a.folder)["landcover.tif"] != digest(c.folder)["landcover.tif"]


def test_files_are_those_of_a_product(scene):
    assert len(scene.observations) == 18
    days = [day for day, _ in scene.observations]
    assert days == sorted(set(days))
    assert {(d - days[0]).days % 5 for d in days} == {0}
    for day, paths in scene.observations[::6]:
        assert list(paths) == [*BANDS, "SCL"]
        for name, path in paths.items():
            step = 20 if name in BANDS_20M or name == "SCL" else 10
            assert path == scene.folder / f"{day:%Y%m%d}" / f"{name}.tif"
            with rasterio.open(path) as file:
                assert file.shape == (SIZE[0] * 10 // step, SIZE[1] * 10 // step)
                assert file.dtypes == ("uint8" if name == "SCL" else "uint16",)
                assert file.crs.to_epsg() == 32632
                assert tuple(file.transform)[:6] == (step, 0, 688_140, 0, -step, 5_104_580)
                assert file.nodata == 0
                assert file.descriptions == (name,)
                assert file.block_shapes == [(128, 128)]
                assert file.compression.name == "deflate"


def test_nodata_and_scl_agree(scene):
    """DN 0 marks pixels outside the swath, in every band, and nothing else."""
    cut = 0
    for _, paths in scene.observations:
        scl = read(paths["SCL"])
        assert set(np.unique(scl)) <= {0, 3, 4, 5, 6, 8, 9}
        cut += (scl == 0).any()
        for name in ("B02", "B11"):
            gone = scl == 0 if name in BANDS_20M else (scl == 0).repeat(2, 0).repeat(2, 1)
            values = read(paths[name])
            # the 20 m grid marks a block as soon as one of its pixels is gone
            assert (values[~gone] > 0).all()
            assert ((values == 0).any()) == gone.any()
    assert cut == 1


def test_clouds_are_bright_and_marked(scene):
    shares, bright = [], []
    for _, paths in scene.observations:
        scl, blue = read(paths["SCL"]), read(paths["B02"])
        blue = blue.reshape(SIZE[0] // 2, 2, SIZE[1] // 2, 2).mean((1, 3))
        shares.append(np.isin(scl, SCL_INVALID).mean())
        assert (blue[scl == 9] > 2500).all()
        bright.append((blue[np.isin(scl, (4, 5, 6))] > 2500).mean() if np.isin(scl, (4, 5, 6)).any() else 0)
    assert 0.25 < np.mean(shares) < 0.5
    assert min(shares) == 0
    assert max(shares) == 1
    assert max(bright) < 0.01


def test_land_cover_looks_like_what_it_is(cube, landcover, scene):
    """Seasons and spectra: high NDVI in summer woods, none on water, yellow rapeseed in spring."""
    assert set(np.unique(landcover)) <= set(CLASSES)
    assert len(np.unique(landcover)) >= 8
    assert scene.classes == CLASSES

    def mean(code, months, *bands):
        here = cube.where(cube.time.dt.month.isin(months), drop=True).where(
            xr.DataArray(landcover == code, dims=("y", "x"))
        )
        return [float(here.sel(band=b).median()) for b in bands]

    def ndvi(code, months):
        red, nir = mean(code, months, "B04", "B08")
        return (nir - red) / (nir + red)

    winter, spring, summer = [1, 2, 12], [4], [6, 7]
    assert ndvi(5, summer) > 0.75 > 0.6 > ndvi(5, winter)
    assert abs(ndvi(6, summer) - ndvi(6, winter)) < 0.1
    assert ndvi(7, summer) < 0
    assert ndvi(9, summer) < 0.4 < 0.55 < ndvi(4, summer)
    green, blue = mean(3, spring, "B03", "B02")
    assert green > 1.7 * blue
    (water,), (conifer,), (broadleaf,) = (mean(code, summer, "B08") for code in (7, 6, 5))
    assert water < conifer < broadleaf < 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": (31, 32)}, "even"),
        ({"size": (0, 0)}, "positive"),
        ({"origin": (5, 0)}, "multiples of 10 m"),
        ({"dates": 0}, "1 to 73"),
        ({"dates": 74}, "1 to 73"),
        ({"seed": -1}, "seed=-1: expected a whole number, 0 or more"),
    ],
)
def test_impossible_scenes(tmp_path, arguments, message):
    with pytest.raises(OptionError, match=message):
        make_scene(tmp_path, **arguments)


def test_open_scene_is_lazy_and_georeferenced(scene):
    with dask.config.set(scheduler=no_compute):
        cube = open_scene(scene.folder, chunks=64)
    assert cube.dims == ("time", "band", "y", "x")
    assert cube.shape == (18, 10, *SIZE)
    assert cube.chunks[2:] == ((64, 32), (64, 64))
    assert cube.dtype == "float32"
    assert list(cube.band.values) == list(BANDS)
    assert cube.name == "s2"
    assert cube.rio.crs.to_epsg() == 32632
    assert tuple(cube.rio.transform())[:6] == (10, 0, 688_140, 0, -10, 5_104_580)
    assert [str(t)[:10] for t in cube.time.values] == [str(day) for day, _ in scene.observations]


def test_open_scene_masks_and_resamples(scene, cube):
    for i, (_, paths) in enumerate(scene.observations):
        hidden = np.isin(read(paths["SCL"]), SCL_INVALID).repeat(2, 0).repeat(2, 1)
        blue, swir = read(paths["B02"]), read(paths["B11"])
        np.testing.assert_array_equal(cube[i].sel(band="B02"), np.where(hidden, np.nan, blue))
        got = cube[i].sel(band="B11").values
        np.testing.assert_array_equal(np.isnan(got), hidden)
        # an average of neighbors: with DN 0 among them, there would be values below the minimum
        if not hidden.all():
            assert np.nanmin(got) >= swir[swir > 0].min() - 1
            assert np.nanmax(got) <= swir.max() + 1


def test_open_scene_of_an_empty_folder(tmp_path):
    with pytest.raises(CubeError, match=r"no YYYYMMDD/B02\.tif .* make_scene\(folder\)"):
        open_scene(tmp_path)


def test_items_tell_what_the_files_are(scene):
    items = list(pystac.ItemCollection.from_file(scene.items))
    assert [i.datetime.date() for i in items] == [day for day, _ in scene.observations]
    for item, (_, paths) in zip(items, scene.observations, strict=True):
        assert "Synthetic" in item.properties["description"]
        scl = read(paths["SCL"])
        cloudy = np.isin(scl, (8, 9, 10)).sum() / (scl != 0).sum()
        assert item.properties["eo:cloud_cover"] == pytest.approx(100 * cloudy, abs=1e-3)
        assert [a.href for a in item.assets.values()] == [p.as_uri() for p in paths.values()]
        for asset, path in zip(item.assets.values(), paths.values(), strict=True):
            with rasterio.open(path) as file:
                assert tuple(asset.extra_fields["proj:transform"]) == tuple(file.transform)[:6]
                assert tuple(asset.extra_fields["proj:shape"]) == file.shape


def test_a_catalog_of_it_gives_the_same_cube(scene, cube):
    """`open_s2` and rioxarray read the same scene alike, but for pixels of which a band is missing."""
    items = pystac.ItemCollection.from_file(scene.items)
    left, _, right, _ = cube.rio.bounds()
    found = open_s2(
        point=scene.center, buffer_m=(right - left) / 2, datetime="2022", catalog=items, max_cloud=None
    )
    assert json.loads(found.attrs["items"])[0]["decided_by"] == "raster:bands offset"
    both = found.compute().sel(x=cube.x, y=cube.y)
    np.testing.assert_array_equal(both.x, cube.x)
    np.testing.assert_array_equal(both.time.dt.strftime("%Y%m%d"), cube.time.dt.strftime("%Y%m%d"))
    whole = cube.notnull().all("band").values[:, None]
    # rioxarray rounds what it resamples to the files' whole numbers
    np.testing.assert_allclose(both, np.where(whole, cube, np.nan), rtol=0, atol=0.501)


# --- the catalog --------------------------------------------------------------------------------


def test_items_are_served_and_the_server_ends(scene):
    with demo.serve_items(scene.items) as url:
        assert url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(f"{url}/collections/synthetic/items?limit=100") as answer:
            assert len(json.load(answer)["features"]) == 18
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url)
    with pytest.raises(ZeroDivisionError), demo.serve_items(scene.items) as url:
        _ = 1 / 0
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url)


def test_a_server_that_does_not_start(tmp_path, monkeypatch):
    with (
        pytest.raises(AnySatError, match="rustac serve does not answer"),
        demo.serve_items(tmp_path / "none.json"),
    ):
        pass
    monkeypatch.setattr(demo, "START_SECONDS", 0.0)
    with (
        pytest.raises(AnySatError, match="within 0 s: it printed no error"),
        demo.serve_items(tmp_path / "none.json"),
    ):
        pass


def test_without_rustac(tmp_path, monkeypatch):
    monkeypatch.setattr(demo.shutil, "which", lambda *_, **__: None)
    with pytest.raises(AnySatError, match=r"needs rustac: pip install 'xr_anysat\[demo\]'"):
        demo.check_dependencies()
    with (
        pytest.raises(AnySatError, match=r"needs rustac: pip install"),
        demo.serve_items(tmp_path / "x.json"),
    ):
        pass


# --- the demo -----------------------------------------------------------------------------------


def check_results(out: Path, said: str, size: int):
    assert said.count("SUCH EMBEDDINGS CARRY NO LEARNED MEANING") >= 2
    for each in ("EPSG:32632", "pixels/s", "embedding.png"):
        assert each in said
    embedding = xr_anysat.open(out / "embedding.zarr")
    assert embedding.rio.crs.to_epsg() == 32632
    assert embedding.sizes["D"] == 256
    assert embedding.attrs["warning"] == demo.MEANINGLESS
    left, bottom, right, top = embedding.rio.bounds()
    assert left <= 688_140
    assert top >= 5_104_580
    assert right >= 688_140 + 10 * size
    assert bottom <= 5_104_580 - 10 * size
    assert np.isfinite(embedding.values).mean() > 0.9
    picture = matplotlib.image.imread(out / "embedding.png")
    assert picture.shape[0] > 1000
    assert picture.shape[1] > 1500
    assert len(np.unique(picture[..., :3].round(2).reshape(-1, 3), axis=0)) > 500


def silent_server():
    """Accepts connections and never answers, as a firewall may do."""
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    return server


def alone(tmp_path, **variables):
    """An environment without weights or options of its user."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XR_ANYSAT", "HF_"))}
    places = {"HF_HOME": str(tmp_path / "hub"), "XR_ANYSAT_CACHE_DIR": str(tmp_path / "cache")}
    return kept | places | variables


def test_a_silent_hub_does_not_hang(tmp_path):
    """A hub that never answers costs seconds, and the fallback is announced in capital letters."""
    with silent_server() as server:
        env = alone(tmp_path, HF_ENDPOINT=f"http://127.0.0.1:{server.getsockname()[1]}")
        code = "import sys; from xr_anysat.demo import run; print(run.find_weights(None, 'base'))"
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60
        )
        assert time.monotonic() - began < 30
    assert done.returncode == 0, done.stderr
    assert "cannot be reached" in done.stdout
    assert "learned=False" in done.stdout


def test_demo(tmp_path, capsys):
    """As a command, then with another scene in this process: it overwrites the first results."""
    arguments = ["demo", "--out", str(tmp_path / "made"), "--size", "64", "--model", "tiny"]
    command = [sys.executable, "-m", "xr_anysat", *arguments]
    done = subprocess.run(command, env=alone(tmp_path), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "There are no official weights for model 'tiny'" in done.stdout
    assert "Searching a STAC catalog on this machine" in done.stdout
    check_results(tmp_path / "made", done.stdout, 64)
    with xr_anysat.config.set(model="tiny", weights="random"):
        assert main([*arguments[:-2], "--seed", "1"]) == 0
    check_results(tmp_path / "made", capsys.readouterr().out, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "63"], "size=(63, 63): expected even"),
        (["--seed", "-1"], "seed=-1: expected a whole number, 0 or more"),
        (["--model", "nonsense"], "model='nonsense': expected one of"),
        (["--model", "tiny", "--weights", "official"], "there is no official checkpoint of model='tiny'"),
    ],
)
def test_invalid_options_are_refused_first(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(demo, "find_weights", no_compute)
    out = tmp_path / "made"
    assert main(["demo", "--out", str(out), *arguments]) in (1, 2)
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}")
    assert "Traceback" not in said
    assert not out.exists()


def test_a_device_that_is_missing_is_refused_first(tmp_path, capsys):
    out = tmp_path / "made"
    with xr_anysat.config.set(device="cuda:99"):
        assert main(["demo", "--out", str(out), "--model", "tiny"]) == 1
    assert "device='cuda:99' was requested" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("out", ["{file}", "{file}/made", "/proc/made"])
def test_a_folder_that_cannot_be_written(tmp_path, capsys, out):
    file = tmp_path / "file"
    file.touch()
    out = out.format(file=file)
    assert main(["demo", "--out", out, "--size", "24"]) == 1
    assert capsys.readouterr().err.startswith(f"error: out={out!r} cannot be written: ")


def test_only_results_of_a_demo_are_overwritten(tmp_path, capsys):
    (tmp_path / "embedding.zarr").mkdir()
    assert main(["demo", "--out", str(tmp_path), "--size", "24"]) == 2
    assert "is not of a demo, which would overwrite it" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["embedding.zarr"]
    assert main(["demo", "--out", ""]) == 2
    assert "out='': expected a folder" in capsys.readouterr().err


def test_missing_dependencies(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rasterio" else name)
    with pytest.raises(AnySatError, match=r"needs rasterio: pip install 'xr_anysat\[demo\]'"):
        demo.check_dependencies()


# --- which weights ------------------------------------------------------------------------------


@pytest.fixture
def nothing_here(monkeypatch, tmp_path):
    """No official weights on this machine."""
    monkeypatch.setattr(demo.checkpoint, "official_path", lambda download=True: None)


def test_requested_weights(nothing_here, tmp_path):
    mine = tmp_path / "random.pth"
    mine.write_bytes(bytes(200_000))
    assert demo.find_weights(str(mine), "base") == demo.Weights(str(mine), "weights of random.pth", True)
    assert demo.find_weights("random", "base") == demo.Weights("random", "random weights", False)
    assert demo.find_weights("random:7", "tiny").learned is False
    assert demo.find_weights("official", "base") == demo.Weights("official", "official weights", True)
    with pytest.raises(WeightsError, match="no weights file"):
        demo.find_weights(str(tmp_path / "none.pth"), "base")


def test_official_weights_on_this_machine(monkeypatch, nothing_here, tmp_path):
    monkeypatch.setattr(demo.checkpoint, "official_path", lambda download=True: tmp_path)
    monkeypatch.setattr(demo, "reachable", no_compute)
    assert demo.find_weights(None, "base") == demo.Weights("official", "official weights", True)


def test_offline_connects_to_nothing(monkeypatch, nothing_here, capsys):
    monkeypatch.setattr(demo.checkpoint, "offline", lambda: True)
    monkeypatch.setattr(demo, "reachable", no_compute)
    assert not demo.find_weights(None, "base").learned
    assert "cannot be reached" in capsys.readouterr().out


def test_a_slow_download_is_given_up(monkeypatch, nothing_here, capsys):
    monkeypatch.setattr(demo, "reachable", lambda: True)
    monkeypatch.setattr(demo, "DOWNLOAD_SECONDS", 0.05)
    monkeypatch.setattr(demo.checkpoint, "offline", lambda: False)
    assert not demo.find_weights(None, "base").learned
    assert "did not finish" in capsys.readouterr().out


def test_a_download_that_succeeds(monkeypatch, nothing_here):
    monkeypatch.setattr(demo, "reachable", lambda: True)
    monkeypatch.setattr(demo.checkpoint, "offline", lambda: False)
    monkeypatch.setattr(demo.subprocess, "run", lambda *_, **__: None)
    assert demo.find_weights(None, "base").argument == "official"


@pytest.mark.parametrize("answers", [True, False])
def test_reachable(monkeypatch, answers):
    import huggingface_hub

    def ask(url, timeout):
        assert "AnySat" in url
        if not answers:
            raise OSError("no network")
        return "metadata"

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask)
    assert demo.reachable() is answers


def test_a_stuck_name_lookup_is_not_waited_for(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(demo, "PROBE_SECONDS", -0.9)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: time.sleep(2))
    began = time.monotonic()
    assert demo.reachable() is False
    assert time.monotonic() - began < 1


def test_peak_memory():
    assert 10e6 < demo.peak_memory() < 1e12

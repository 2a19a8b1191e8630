"""The command line with real processes, servers, signals and a cluster."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import dask
import numpy as np
import pytest
import torch
from distributed import Client
from s3fs import S3FileSystem
from support.paths import ROOT
from support.s3_server import KEY, SECRET, S3Server
from support.stac_servers import Fault, FaultyServer

import xr_anysat
from xr_anysat import cli
from xr_anysat.__main__ import main
from xr_anysat.demo.scene import make_scene
from xr_anysat.errors import AnySatWarning
from xr_anysat.model import checkpoint, verify
from xr_anysat.shared.text import format_bytes

pytestmark = pytest.mark.slow

PATIENCE = 120  # seconds until a test gives up
STALLED = 300.0  # seconds that a stalled read takes: longer than anyone waits here
NOWHERE = ("--point=9,45", "--buffer=500", "--datetime=2022")


@dataclass(frozen=True)
class Area:
    """A catalog with an area of 16 blocks, the options that embed it, and the finished store."""

    server: FaultyServer
    options: tuple[str, ...]
    store: Path


@pytest.fixture(scope="module")
def area(tmp_path_factory):
    folder = tmp_path_factory.mktemp("area")
    scene = make_scene(folder / "scene", size=(96, 96), dates=4, seed=3)
    with FaultyServer() as server:
        server.add(scene.folder)
        items = scene.items.read_text().replace(scene.folder.resolve().as_uri(), server.url)
        server.items = json.loads(items)["features"]
        options = (
            "--point", *map(str, scene.center), "--buffer", "320", "--datetime", "2022", "--catalog", server.url,
            "--max-cloud", "100", "--frames", "2", "--patch-size", "20", "--model", "tiny", "--weights", "random",
        )  # fmt: skip
        store = folder / "undisturbed.zarr"
        with one_thread():
            assert main(["embed", *options, "--out", str(store)]) == 0
        yield Area(server, options, store)


@pytest.fixture(autouse=True)
def _no_faults(area):
    yield
    area.server.faults = {}


@contextmanager
def one_thread():
    """The setting of all runs that are compared bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def alone(tmp_path):
    """The environment of a process without options and weights of its user."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("XR_ANYSAT", "HF_", "DASK_"))}
    return kept | {
        "HF_HOME": str(tmp_path / "hub"), "XR_ANYSAT_CACHE_DIR": str(tmp_path / "cache"), "COLUMNS": "80",
        "OMP_NUM_THREADS": "1", "DASK_NUM_WORKERS": "1",
    }  # fmt: skip


def begin(env, *arguments):
    command = [sys.executable, "-m", "xr_anysat", *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process):
    """Exit status, standard output and standard error."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    return process.returncode, out, err


def wait_for(condition, process):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def shards(store):
    return [f for f in store.glob("anysat/c/**/*") if f.is_file() and f.name.isdecimal()]


def contents(store):
    return {f.relative_to(store): f.read_bytes() for f in store.rglob("*") if f.is_file()}


# --- help ---------------------------------------------------------------------------------------


def test_help_is_quick_and_fits_a_terminal(alone):
    """Quick: torch, distributed and the readers of catalogs and stores are not imported."""
    code = """if True:
        import sys
        from xr_anysat.__main__ import main
        assert main(["embed", "--help"]) == 0
        slow = {"torch", "distributed", "odc.stac", "pystac_client", "rasterio", "zarr", "matplotlib"}
        print(sorted(slow & set(sys.modules)), file=sys.stderr)
    """
    done = subprocess.run([sys.executable, "-c", code], env=alone, capture_output=True, text=True)
    assert done.stderr == "[]\n"
    assert max(map(len, done.stdout.splitlines())) <= 80
    plain = re.sub(r"[\s│]+", " ", done.stdout)
    for said in (
        "--bbox W S E N", "Default: earth-search.", "Default: 1024.", "Default: 8.", "Default: per_tile_zscore.",
        "--out STORE", "130 interrupted (Ctrl-C); 143 terminated",
    ):  # fmt: skip
        assert said in plain


def test_every_command_has_help(capsys):
    for command in ([], ["plan"], ["demo"], ["verify"], ["weights"], ["weights", "info"]):
        assert main([*command, "--help"]) == 0
        assert "Usage:" in capsys.readouterr().out
    assert main([]) == 0
    assert "Exit status" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"xr_anysat {xr_anysat.__version__}\n"


@pytest.mark.parametrize(("missing", "start"), [("typer", "module"), ("rich", "script")])
def test_without_the_extra(tmp_path, alone, missing, start):
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules[{missing!r}] = None")
    # the second is how pip writes an entry point
    by = {
        "module": ["-m", "xr_anysat"],
        "script": ["-c", "from xr_anysat.__main__ import main; exit(main())"],
    }
    done = subprocess.run(
        [sys.executable, *by[start], "--help"], capture_output=True, text=True,
        env=alone | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "the command line needs typer and rich: pip install 'xr_anysat[cli]'\n"


def test_the_script_is_this_main():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"]["xr-anysat"].partition(":")
    assert getattr(import_module(module), name) is main
    assert any(
        re.match(r"xr_anysat\[.*\bcli\b", needed) for needed in project["optional-dependencies"]["demo"]
    )


# --- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        ("--bbox", "-3.8", "40.5", "-3.6", "40.3"),
        ("--bbox", "-3.8,40.5,-3.6,40.3"),
        ("--bbox=-3.8,40.5,-3.6,40.3",),
    ],
)
def test_forms_of_a_bbox(capsys, form):
    """Negative longitudes too; the refusal of an upside-down bbox shows how it was read."""
    assert main(["plan", *form, "--datetime", "2022"]) == 2
    assert (
        "error: bbox=(-3.8, 40.5, -3.6, 40.3): expected (west, south, east, north)" in capsys.readouterr().err
    )


@pytest.mark.parametrize("form", [("--point", "-3.7", "-95"), ("--point", "-3.7,-95"), ("--point=-3.7,-95",)])
def test_forms_of_a_point(capsys, form):
    assert main(["plan", *form, "--buffer", "100"]) == 2
    assert "error: point=(-3.7, -95.0): expected (lon, lat)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["embed", *NOWHERE], "Missing option '--out'"),
        (["embed", *NOWHERE, "--out", "x", "--fames", "8"], "--fames"),
        (["plan", "--bbox", "1", "2", "3"], "requires 4 arguments"),
        (["plan", "--bbox=1,2,3,x"], "Invalid value for '--bbox'"),
        (["plan", "--frames", "many"], "'--frames': 'many': expected a positive whole number, or all"),
        (["plan", "--frames", "-1"], "Invalid value for '--frames': '-1': expected a positive whole number, or all"),
        (["plan", *NOWHERE, "--chunks", "9" * 23], "expected pixels, or"),
        (["plan", "--point=0,89.9", "--buffer", "9"], "no UTM zone contains (0, 89.9)"),
        (["plan", "--point=0,0", "--buffer", "1e9"], "the meters around it, up to 10000000"),
        (["plan", "--bbox=-180,-90,180,90"], "is 360° wide"),
        (["plan"], "no area given: expected one of bbox="),
        (["plan", *NOWHERE, "--bbox=1,2,3,4"], "bbox and point given"),
        (["plan", *NOWHERE, "--max-cloud", "300"], "max_cloud=300.0: expected percent"),
        (["embed", *NOWHERE, "--out", ""], "store='': expected a path"),
        (["embed", *NOWHERE, "--out", "x", "--codec", "int9"], "codec='int9': expected"),
        (["embed", *NOWHERE, "--out", "x", "--norm", "none.json"], "norm='none.json' cannot be read"),
        (["verify", "not a repository"], "neither a folder on this machine nor owner/name"),
        (["demo", "--size", "63"], "size=(63, 63): expected even"),
        (["demo", "--size", "1000000"], "expected even, positive numbers of pixels up to 4096"),
        (["bench", "probe", "--size", "1000000"], "expected even, positive numbers of pixels up to 4096"),
        (["bench", "probe", "--tile", "-3"], "tile=-3: expected a positive whole number"),
        (["plan", *NOWHERE, "--datetime", "9999"], "datetime='9999': expected years from 1900 to 2200"),
        (["plan", *NOWHERE, "--tile", "-3"], "tile=-3: expected a positive whole number"),
    ],
)  # fmt: skip
def test_invalid_arguments(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    with xr_anysat.config.set(weights="random"):
        assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_the_documentation_names_the_options(capsys):
    """Every command and option of docs/command_line.md exists, and the page names every command."""
    page = (ROOT / "docs" / "command_line.md").read_text()
    commands = [("embed",), ("places",), ("plan",), ("check",), ("demo",), ("bench", "probe"), ("verify",)]
    commands += [("weights", name) for name in ("fetch", "path", "info")]
    known = {"--nworkers", "--nthreads"}  # of the `dask worker` that the page starts
    for command in [(), *commands]:
        assert f"`{' '.join(command)}" in page
        assert main([*command, "--help"]) == 0
        known |= set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    assert set(re.findall(r"--[a-z][a-z-]*", page)) <= known


def test_options_that_do_not_fit_the_area(area, tmp_path, capsys):
    """Found when the cube is open, and still an error of the command line."""
    out = ("--out", str(tmp_path / "x.zarr"))
    for command in (["embed", *out], ["plan"]):
        assert main([*command, *area.options, "--period", "2019"]) == 2
        assert "error: no acquisition between 2019-01-01 and 2020-01-01" in capsys.readouterr().err
    assert main(["embed", *area.options, "--patch-size", "70", *out]) == 2
    assert "tile=24 pixels is not a multiple of the patch side" in capsys.readouterr().err
    assert main(["embed", *area.options, "--device", "cuda:99", *out]) == 1
    assert "device='cuda:99' was requested" in capsys.readouterr().err
    assert not (tmp_path / "x.zarr").exists()


@pytest.mark.filterwarnings("always::xr_anysat.errors.AnySatWarning")
def test_a_warning_about_options_is_shown_once(area, tmp_path, capsys):
    """Options are checked before the search, and again with the cube."""
    for command in (["plan"], ["embed", "--out", str(tmp_path / "x.zarr")]):
        assert main([*command, *area.options, "--patch-size", "10", "--tile", "40"]) == 0
        assert capsys.readouterr().err.count("1600 patches per window") == 1


def test_bad_usage_of_a_process(alone):
    code, out, err = end(begin(alone, "embed", "--bbox", "1", "2"))
    assert (code, out) == (2, "")
    assert "requires 4 arguments" in err


# --- failures ----------------------------------------------------------------------------------


def test_missing_weights(tmp_path, capsys):
    assert main(["embed", *NOWHERE, "--out", str(tmp_path / "x.zarr"), "--weights", "/none.pth"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: there is no weights file '/none.pth' on this machine")
    assert said.err.count("\n") == 1


def test_a_catalog_without_the_year(area, capsys):
    assert main(["plan", *area.options, "--datetime", "2019"]) == 1
    assert "error: none of the 4 items found" in capsys.readouterr().err


def test_a_failed_read_leaves_a_store_to_resume(area, tmp_path, alone):
    area.server.faults = {"tif": lambda *_: Fault(status=404)}
    store = tmp_path / "x.zarr"
    code, out, err = end(begin(alone, "embed", *area.options, "--norm", "pastis", "--out", str(store)))
    assert (code, out) == (1, "")
    assert "\nerror: asset 'scl' of item" in err
    assert f"0 of the 16 blocks of {str(store)!r} are finished and kept" in err
    assert "Traceback" not in err


def test_existing_stores(area, capsys):
    assert main(["embed", *area.options, "--no-resume", "--out", str(area.store)]) == 1
    assert "resume=False: pass resume=True" in capsys.readouterr().err
    assert main(["embed", *area.options, "--output", "tile", "--out", str(area.store)]) == 1
    said = capsys.readouterr().err
    assert "error: " in said
    assert 'output is "patch" in the store and "tile" here' in said


def test_a_damaged_store_is_checked_and_mended(area, tmp_path, capsys):
    store = tmp_path / "area.zarr"
    shutil.copytree(area.store, store)
    before = contents(store)
    assert main(["check", str(store)]) == 0
    assert capsys.readouterr().out == f"{store}: no problems found\n"
    shard = store / "anysat/c/0/1/2"
    shard.write_bytes(shard.read_bytes()[:-9] + b"x" + shard.read_bytes()[-8:])
    (store / "anysat/c/0/3/0").unlink()
    for remedy, *options in (("with --remove-damaged",), ("these blocks", "--remove-damaged")):
        assert main(["check", str(store), *options]) == 1
        said = capsys.readouterr()
        assert re.search(r"\n +1 +2 .*damaged: .*\n +3 +0 .*missing", said.out)
        assert remedy in said.err
        assert "are not finished" not in said.err
    with one_thread():
        assert main(["embed", *area.options, "--out", str(store)]) == 0
    assert contents(store) == before
    assert main(["check", str(tmp_path / "none.zarr")]) == 1
    assert "there is no store at" in capsys.readouterr().err


def test_debug_shows_the_traceback(monkeypatch, capsys):
    def fail(**_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(verify, "verify", fail)
    assert main(["verify"]) == 1
    assert capsys.readouterr().err == "error: RuntimeError: a bug\n"
    assert main(["--debug", "verify"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "in fail" in said


@pytest.mark.filterwarnings("default")
def test_warnings_are_one_line(monkeypatch, capsys):
    def doubt(**_):
        warnings.warn("that looks odd", AnySatWarning, stacklevel=1)
        warnings.warn("not ours", UserWarning, stacklevel=1)
        return verify.VerifyReport("here", "tiny", None, (verify.Comparison(10, 6, 3, "tile", 0.0),))

    monkeypatch.setattr(verify, "verify", doubt)
    assert main(["verify"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "warning: that looks odd"
    assert "UserWarning: not ours" in said[1]


# --- embed --------------------------------------------------------------------------------------


def test_the_store(area, capsys):
    emb = xr_anysat.open(area.store)
    assert emb.sizes == {"D": 256, "y": 32, "x": 32}
    assert emb.rio.crs.to_epsg() == 32632
    assert emb.attrs["n_frames"] == 2
    assert emb.attrs["frame_dates"][0].startswith("2022-")
    assert np.isfinite(emb.values).mean() > 0.9
    assert len(shards(area.store)) == 16


def test_omitted_options_are_not_passed_on(area, capsys):
    """The configuration holds: without --model and --weights it is the same embedding, and all blocks exist."""
    options = area.options[: area.options.index("--model")]
    with xr_anysat.config.set(model="tiny", weights="random"):
        assert main(["embed", *options, "--out", str(area.store)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{area.store}\n"
    assert "64 × 64 pixels, 4 dates in 2 frames; AnySat tiny gives (256, 32, 32) float32" in said.err
    assert "16 of 16 blocks are finished from an earlier run" in said.err
    assert f"in {str(area.store)!r}. To open it in Python:" in said.err
    assert f"emb = xr_anysat.open({str(area.store)!r})" in said.err
    size = sum(len(b) for b in contents(area.store).values())
    assert format_bytes(size) in said.err


def test_every_date_a_frame_and_saved_statistics(area, tmp_path, capsys):
    saved = tmp_path / "mine.json"
    saved.write_text(xr_anysat.Statistics((1000.0,) * 10, (500.0,) * 10).to_json())
    options = [
        *area.options,
        "--frames",
        "all",
        "--norm",
        str(saved),
        "--output",
        "tile",
        "--patch-size",
        "60",
    ]
    store = tmp_path / "x.zarr"
    assert main(["embed", *options, "--codec", "int8", "--out", str(store)]) == 0
    emb = xr_anysat.open(store)
    assert emb.attrs["n_frames"] == 4
    assert emb.attrs["norm_mean"] == [1000.0] * 10
    assert emb.attrs["codec"] == "int8"


def test_a_bar_on_a_terminal(area, monkeypatch):
    terminal, ours = os.openpty()
    monkeypatch.setenv("COLUMNS", "80")
    with os.fdopen(terminal, "rb", buffering=0) as screen, os.fdopen(ours, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        seen = []
        reader = threading.Thread(target=lambda: seen.extend(iter(lambda: read_all(screen), b"")))
        reader.start()
        assert main(["embed", *area.options, "--out", str(area.store)]) == 0
        stderr.close()
        reader.join()
    said = b"".join(seen).decode()
    assert "━" * 20 in said
    assert "16 of 16 blocks" in said


def read_all(screen):
    try:
        return screen.read(4096)
    except OSError:  # the other end is closed
        return b""


def test_into_a_bucket(area, monkeypatch, capsys):
    """The environment has the endpoint and the credentials."""
    with S3Server() as server:
        for name, value in (
            ("AWS_ENDPOINT_URL", server.url), ("AWS_ACCESS_KEY_ID", KEY), ("AWS_SECRET_ACCESS_KEY", SECRET),
        ):  # fmt: skip
            monkeypatch.setenv(name, value)
        server.bucket("mine")
        assert main(["embed", *area.options, "--output", "tile", "--out", "s3://mine/a/b.zarr"]) == 0
    S3FileSystem.clear_instance_cache()  # cached by URL, whatever endpoint the environment has
    said = capsys.readouterr()
    assert said.out == "s3://mine/a/b.zarr\n"
    assert re.search(r"[\d.]+ KiB in 's3://mine/a/b.zarr'", said.err)


# --- interruptions ------------------------------------------------------------------------------


def test_interrupted_and_resumed(area, tmp_path, alone):
    """Ctrl-C in the middle, then the same command: the store is that of an undisturbed run."""
    store = tmp_path / "my area.zarr"
    command = ["embed", *area.options, "--no-resume", "--out", str(store)]
    process = begin(alone, *command)
    wait_for(lambda: shards(store), process)
    process.send_signal(signal.SIGINT)
    code, out, err = end(process)
    assert (code, out) == (130, "")
    assert "Traceback" not in err
    assert "Interrupted by SIGINT" in err
    finished = len(shards(store))
    assert 1 <= finished < 16
    counted = re.search(rf"(\d+) of the 16 blocks of {str(store)!r} are finished and kept", err)
    assert int(counted[1]) in (finished - 1, finished)  # one may be written but not counted yet
    # --no-resume would refuse the store
    again = ["embed", *area.options, "--out", str(store)]
    assert err.endswith(
        f"To resume, repeat the command:\n  python -m xr_anysat {' '.join(again[:-1])} '{store}'\n"
    )

    code, out, err = end(begin(alone, *again))
    assert (code, out) == (0, f"{store}\n")
    assert f"{finished} of 16 blocks are finished from an earlier run\n16 of 16 blocks, " in err
    assert contents(store) == contents(area.store)


def test_terminated_while_nothing_answers(area, tmp_path, alone):
    """A stalled read cannot be stopped, and the process does not wait for it."""
    area.server.faults = {"tif": lambda *_: Fault(wait=STALLED)}
    store = tmp_path / "x.zarr"
    process = begin(alone, "embed", *area.options, "--norm", "pastis", "--out", str(store))
    wait_for(lambda: area.server.busy and (store / "zarr.json").exists(), process)
    process.terminate()
    code, out, err = end(process)
    assert (code, out) == (143, "")
    assert f"Interrupted by SIGTERM\n0 of the 16 blocks of {str(store)!r} are finished and kept" in err
    assert "Traceback" not in err


def test_a_second_signal_waits_for_nothing(alone):
    code = """if True:
        import os, signal
        from xr_anysat import cli
        with cli._signals():
            try:
                os.kill(os.getpid(), signal.SIGINT)
                signal.pause()
            except cli.Interrupted:
                os.kill(os.getpid(), signal.SIGTERM)
                signal.pause()
    """
    done = subprocess.run([sys.executable, "-c", code], env=alone, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (143, "\nStopped immediately; finished blocks are kept.\n")


# --- on a cluster -------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path, alone):
    """The address of a scheduler with one worker of one thread; each is a separate process."""
    file = tmp_path / "scheduler.json"
    own = [sys.executable, "-m", "dask"]
    quiet = {"env": alone, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    scheduler = subprocess.Popen(
        [*own, "scheduler", "--host=127.0.0.1", "--port=0", "--no-dashboard", f"--scheduler-file={file}"],
        **quiet,
    )
    worker = subprocess.Popen(
        [*own, "worker", f"--scheduler-file={file}", "--nthreads=1", "--no-nanny", "--no-dashboard",
         f"--local-directory={tmp_path}"], **quiet,
    )  # fmt: skip
    try:
        wait_for(lambda: file.exists() and file.read_text().endswith("}"), scheduler)
        yield json.loads(file.read_text())["address"]
    finally:
        for process in (worker, scheduler):
            process.kill()
            process.wait()


def test_on_a_cluster(area, tmp_path, alone, cluster):
    """Interrupted and resumed; the encoder is sent to the workers."""
    store = tmp_path / "x.zarr"
    command = ["embed", *area.options, "--scheduler", cluster, "--out", str(store)]
    process = begin(alone, *command)
    wait_for(lambda: shards(store), process)
    process.send_signal(signal.SIGINT)
    code, out, err = end(process)
    assert (code, out) == (130, "")
    assert "Interrupted by SIGINT" in err
    assert f"--scheduler {cluster} --out {store}\n" in err
    assert "Traceback" not in err

    assert main(command) == 0
    assert contents(store) == contents(area.store)
    with Client(cluster, set_as_default=False) as client:
        sent = client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.worker_plugins))
    assert any(name.startswith("xr-anysat-tiny") for name in sent)


def test_invalid_schedulers(area, tmp_path, capsys):
    command = ["embed", *area.options, "--out", str(tmp_path / "x.zarr"), "--scheduler"]
    assert main([*command, "nonsense"]) == 2
    assert "error: scheduler='nonsense': " in capsys.readouterr().err
    with dask.config.set({"distributed.comm.timeouts.connect": "0.2s"}):
        assert main([*command, "tcp://127.0.0.1:9"]) == 1
    assert "error: the scheduler tcp://127.0.0.1:9 does not answer" in capsys.readouterr().err


def test_without_distributed(area, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "distributed", None)
    command = ["embed", *area.options, "--out", str(tmp_path / "x.zarr"), "--scheduler", "tcp://127.0.0.1:9"]
    assert main(command) == 1
    assert "pip install 'xr_anysat[distributed]'" in capsys.readouterr().err


# --- plan, verify, weights ----------------------------------------------------------------------


def test_plan(area, capsys):
    assert main(["plan", *area.options, "--codec", "int8"]) == 0
    said = capsys.readouterr().out
    assert "blocks    4 × 4 = 16\n" in said
    assert "int8 and a float32 scale per cell" in said
    assert "this machine" not in said
    assert main(["plan", *area.options, "--calibrate"]) == 0
    said = capsys.readouterr().out
    assert "int8" not in said
    assert "this machine" in said


@pytest.mark.parametrize(("difference", "code"), [(1e-6, 0), (1e-2, 1)])
def test_verify(monkeypatch, capsys, difference, code):
    passed = {}

    def run(repo="gastruc/anysat", **given):
        passed.update(given, repo=repo)
        return verify.VerifyReport(repo, "base", None, (verify.Comparison(10, 6, 3, "tile", difference),))

    monkeypatch.setattr(verify, "verify", run)
    assert main(["verify"]) == code
    assert passed == {"repo": "gastruc/anysat"}
    assert main(["verify", "mine", "--weights", "w.pth"]) == code
    assert passed == {"repo": "mine", "weights": "w.pth"}
    assert ("passed" in capsys.readouterr().out) is (code == 0)


def test_official_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with xr_anysat.config.set(cache_dir=str(tmp_path), offline=True):
        assert main(["weights", "path"]) == 1
        assert "download it with xr-anysat weights fetch, or copy it to" in capsys.readouterr().err
        assert main(["weights", "fetch"]) == 1
        assert "option offline (XR_ANYSAT_OFFLINE) forbids its download" in capsys.readouterr().err
        assert main(["embed", *NOWHERE, "--out", str(tmp_path / "x.zarr")]) == 1
        assert "forbids its download" in capsys.readouterr().err
        assert main(["weights", "info"]) == 0
        said = capsys.readouterr().out
        for each in ("ce124652…3d4f", "not on this machine", "forbidden", str(tmp_path)):
            assert each in said

        placed = tmp_path / "AnySat.pth"
        placed.write_bytes(b"PK" + bytes(checkpoint.MIN_FILE_BYTES))
        found = checkpoint.file_sha256(placed)
        mine = replace(checkpoint.OFFICIAL, sha256_prefix=found[:8], sha256_suffix=found[-4:], min_bytes=1)
        monkeypatch.setattr(checkpoint, "OFFICIAL", mine)
        for command in ("path", "fetch"):
            assert main(["weights", command]) == 0
            assert capsys.readouterr().out == f"{placed}\n"
        assert main(["weights", "info"]) == 0
        said = capsys.readouterr().out
        for each in (found, f"{placed}, 97.7 KiB", "official, models/AnySat.pth of g-astruc/AnySat"):
            assert each in said


def test_other_weights(formula_tiny, capsys):
    assert main(["weights", "info", "--model", "tiny", "--weights", str(formula_tiny)]) == 0
    said = capsys.readouterr().out
    assert str(formula_tiny) in said
    assert checkpoint.file_sha256(formula_tiny) in said
    assert main(["weights", "info", "--weights", "random:7"]) == 0
    assert "made from the seed" in capsys.readouterr().out


# --- parts --------------------------------------------------------------------------------------


def test_lines_now_and_then(monkeypatch, capsys):
    """Without a terminal: a line now and then, and one at the end."""
    monkeypatch.setattr(cli, "QUIET_SECONDS", 0.0)
    with cli._progress(400) as show:
        for done in (1, 2, 4):
            show(done, 4)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "1 of 4 blocks are finished from an earlier run"
    assert [line.split(",")[0] for line in said[1:]] == ["1 of 4 blocks", "2 of 4 blocks", "4 of 4 blocks"]
    monkeypatch.setattr(cli, "QUIET_SECONDS", 1e9)
    with cli._progress(400) as show:
        for done in (0, 1, 2, 4):
            show(done, 4)
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == ["4 of 4 blocks"]


def test_signals_that_are_ignored_stay_so():
    """A shell sets this for processes in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with cli._signals():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is cli._interrupt
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_signals_belong_to_the_main_thread():
    """Called from another thread, it works and does not change signal handlers."""
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(["--version"])))
    thread.start()
    thread.join()
    assert codes == [0]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

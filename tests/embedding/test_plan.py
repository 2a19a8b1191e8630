"""`plan`: reads nothing, and says what `embed` then does."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import dask
import dask.array as da
import numpy as np
import odc.geo.xr  # noqa: F401
import pandas as pd
import pytest
import torch
import xarray as xr
from support.cubes import refuse, small_cube, tile_of_sentinel2
from support.hub_module import Hub
from support.processes import without_torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from xarray.backends import BackendArray
from xarray.core.indexing import LazilyIndexedArray

import xr_anysat
from xr_anysat import AnySatWarning, OptionError, Plan
from xr_anysat.cube import compositing
from xr_anysat.embedding import blocks, embed, plan
from xr_anysat.embedding import options as embed_options
from xr_anysat.model import anysat, cost, transformer
from xr_anysat.model.anysat import AnySat
from xr_anysat.model.cost import multiply_adds, working_bytes
from xr_anysat.shared.text import physical_memory
from xr_anysat.store import codecs

TINY = {"model": "tiny", "weights": "random"}
GIB = 1 << 30


def granules(side: int, chunk: int = 2048, dates: int = 8, **coords: Any) -> xr.DataArray:
    """A lazy cube of zeros at pixel 0 of the lattice, too large for memory."""
    values = da.zeros((dates, 10, side, side), chunks=(1, 10, chunk, chunk), dtype="uint16")
    days = pd.date_range("2022-01-15", periods=dates, freq="40D")
    return xr.DataArray(
        values,
        dims=("time", "band", "y", "x"),
        coords={"time": days, "band": list(xr_anysat.BANDS), **coords},
    )


# ---------------------------------------------------------------------- cost of the model


@pytest.mark.parametrize(
    ("patch_size", "pixels", "patches", "windows"),
    # measured on upstream's model: millions of multiply-adds a pixel, base, 8 dates, 32 × 32 patches
    [(10, 22.9, 85.0, 60.0), (20, 22.9, 53.1, 15.0), (40, 22.9, 45.3, 3.8)],
)
def test_the_published_model_costs_what_was_measured(
    patch_size: int, pixels: float, patches: float, windows: float
) -> None:
    side = patch_size // 10
    area = (32 * side) ** 2
    found = multiply_adds("base", "all", dates=8, side=side, pixels=area, patches=1024, savings=False)
    million = area * 1e6
    assert found.pixels / million == pytest.approx(pixels, rel=0.01)
    assert found.patches / million == pytest.approx(patches, rel=0.01)
    assert found.windows / million == pytest.approx(windows, rel=0.015)  # 3.75 is shown as 3.8
    assert found.total / million == pytest.approx(pixels + patches + windows, rel=0.01)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], int]:
    """Floating point operations of a call, by torch."""
    # neither inference mode nor fused attention nor oneDNN shows its products to the counter
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)
    monkeypatch.setattr(AnySat, "pack", lambda self, precision: self)
    monkeypatch.setattr(transformer, "_by_sums", lambda queries, keys: False)

    def count(call: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            call()
        return counter.get_total_flops()

    return count


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tiny", "small"])
@pytest.mark.parametrize("output", anysat.OUTPUTS)
@pytest.mark.parametrize(("side", "tile"), [(1, 5), (2, 8), (4, 12)])
def test_torch_counts_the_same(counted: Any, size: str, output: str, side: int, tile: int) -> None:
    """To the last operation; but for the average over dates, which torch makes without a product."""
    with torch.device("meta"):
        model = AnySat(size, ("s2",)).eval()
        x, doy = torch.zeros(1, 3, 10, tile, tile), torch.arange(3)
    found = multiply_adds(size, output, dates=3, side=side, pixels=tile**2, patches=(tile // side) ** 2)
    averages = 3 * model.dim * tile**2
    assert counted(lambda: model.encode(x, doy, side=side, output=output)) == 2 * (found.total - averages)


def test_an_upstream_module_costs_what_was_published() -> None:
    given = {"dates": 3, "side": 2, "pixels": 64, "patches": 16}
    published = {
        o: multiply_adds("base", o, **given, savings=False).total for o in ("patch", "dense", "local")
    }
    assert len(set(published.values())) == 1  # such a module computes every output
    assert all(multiply_adds("base", o, **given).total < n for o, n in published.items())


@pytest.mark.parametrize("size", cost.PARAMETERS)
def test_parameters_are_those_of_the_model(size: str) -> None:
    with torch.device("meta"):
        model = AnySat(size, ("s2",))
    assert sum(p.numel() for p in model.parameters()) == cost.PARAMETERS[size]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to tell peaks of memory")
def test_working_memory_is_what_a_window_takes() -> None:
    """Measured in a process of its own that gives freed memory back at once."""
    cases = [("patch", 1, 44), ("dense", 4, 96), ("local", 2, 64)]
    code = f"""
        import re, torch
        from xr_anysat.model.weights import encoder_spec, get_encoder

        def status(name):
            with open("/proc/self/status") as file:
                return int(re.search(name + r":\\s+(\\d+)", file.read())[1]) * 1024

        torch.set_num_threads(1)
        model, doy = get_encoder(encoder_spec("tiny", "random", "cpu")), torch.arange(4)
        for output, side, tile in {cases}:
            x = torch.zeros(1, 4, 10, tile, tile)
            with torch.inference_mode():
                model.encode(x[..., :8, :8], doy, side=side, output=output)  # the libraries take memory too
                before = status("VmRSS")
                with open("/proc/self/clear_refs", "w") as file:
                    file.write("5")  # resets the peak
                model.encode(x, doy, side=side, output=output)
            print(status("VmHWM") - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, check=True, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"},
    )  # fmt: skip
    for (output, side, tile), measured in zip(cases, done.stdout.split(), strict=True):
        said = working_bytes("tiny", output, dates=4, side=side, tile=tile) - cost.HEAP_BYTES
        assert 0.75 < int(measured) / said < 1.25, (output, side, tile, measured, said)


# ---------------------------------------------------------------------- what embed then does

CASES: list[dict[str, Any]] = [
    {},
    {"frames": 3, "output": "dense", "patch_size": 20, "tile": 8},
    {"frames": None, "output": "local", "norm": "pastis", "tile": 6},
    {"frames": 5, "period": "2022", "output": "tile", "tile": 12, "anchor": "cube"},
    {"frames": 12, "period": "2022", "empty": "nearest", "patch_size": 30, "tile": 9, "reduce": "clearest"},
    {"frames": 4, "period": ("2022-03-01", "2022-09-01"), "tile": 8, "pool": "mean"},
    {"frames": 2, "resize": 12, "patch_size": 20},
]


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("crs", ["EPSG:32632", None])
def test_figures_are_those_of_the_embedding(options: dict[str, Any], crs: str | None) -> None:
    cube = small_cube(height=40, width=40, crs=crs).chunk(time=2, y=11, x=17)
    p, emb = cube.anysat.plan(**options, **TINY), cube.anysat.embed(**options, **TINY)
    assert (p.dims, p.shape, p.dtype, p.chunks) == (emb.dims, emb.shape, str(emb.dtype), emb.chunks)
    assert p.bytes_written == emb.nbytes
    layers = [layer for name, layer in emb.__dask_graph__().layers.items() if name.startswith("encode_block")]
    assert math.prod(p.blocks) == len(dict(layers[0]))
    assert p.output == emb.attrs["output"]
    assert (p.tile, p.patch_size) == (emb.attrs["tile"], emb.attrs["patch_size_m"])
    assert p.doy == tuple(d + emb.attrs["doy_base"] for d in emb.attrs["doy0_values"])
    assert p.frame_dates == tuple(emb.attrs["frame_dates"])
    assert p.period == emb.attrs["temporal_window"]
    if crs is not None and "pool" not in options:
        assert p.crs == f"EPSG:{emb.odc.crs.to_epsg()}"
        assert p.cell == pytest.approx(emb.odc.geobox.resolution.x)
    if options.get("output") == "tile":
        assert p.windows == emb.shape[1:]
    if p.output == "patch" and "pool" not in options:
        assert p.patches == emb.shape[1:]
    made = cube.anysat.frames(
        options.get("frames", 8), **{k: v for k, v in options.items() if k in ("period", "empty", "reduce")}
    )
    assert p.n_obs == tuple(made["n_obs"].values)
    taken = (
        cube
        if "period" not in options
        else cube.sel(time=slice(*[pd.Timestamp(t) for t in p.period.split("/")]))
    )
    assert p.acquisitions == taken.sizes["time"]
    assert p.bytes_read == taken.nbytes


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"output": "dense"}, {"patch_size": 40, "tile": 64, "norm": "pastis"}, {"pool": "max"}]
)
def test_a_whole_granule(options: dict[str, Any]) -> None:
    cube = tile_of_sentinel2((1, 1, 2048, 2048))
    p = cube.anysat.plan(period="2022", weights="random", **options)
    emb = cube.anysat.embed(period="2022", weights="random", **options)
    assert (p.shape, p.chunks) == (emb.shape, emb.chunks)
    assert p.reads == (1 if "norm" in options else 2)
    assert p.bytes_read == cube.nbytes


@pytest.mark.slow
def test_operations_are_those_that_are_done(counted: Any) -> None:
    """Windows and patches that the cube's ends cut included, whatever block they are in."""
    cube = small_cube(height=11, width=10, gaps=0)
    for options in (
        {"patch_size": 20, "tile": 6},
        {"output": "dense", "patch_size": 30, "tile": 9, "anchor": "cube"},
        {"patch_size": 20, "tile": 6, "overlap": 2},
        {"output": "dense", "patch_size": 10, "tile": 6, "overlap": 2},
    ):
        p = cube.anysat.plan(3, **options, **TINY)
        averages = 3 * 256 * 11 * 10
        own = {**TINY, "weights": ("random", 11)}  # weights that no other test has packed
        assert counted(lambda o=options, w=own: cube.anysat.embed(3, **o, **w)) == p.flop - 2 * averages


def test_windows_that_overlap() -> None:
    cube, options = granules(9600, 1000), {"period": "2022", "weights": "random"}
    apart, half = (cube.anysat.plan(**options, overlap=n) for n in (0, 12))
    emb = cube.anysat.embed(**options, overlap=12)
    assert (half.shape, half.chunks, half.overlap) == (emb.shape, emb.chunks, 12)
    assert [c[0] for c in apart.chunks] == [768, 144, 144]
    assert [c[0] for c in half.chunks] == [768, 288, 288]
    assert half.windows == (2 * apart.windows[0] + 1, 2 * apart.windows[1] + 1)
    assert 2 < half.flop / apart.flop < 2.25  # each patch in four windows, but itself once
    tokens = 4 * 768 * ((288 + 24) ** 2 + 288**2)  # around a block, and its sums
    assert half.memory_working - apart.memory_working == tokens
    assert "801 × 801 of 24 × 24 pixels, 12 of them shared with the next, for 9,600 × 9,600" in repr(half)
    assert (
        "are rechunked: windows extend 12 pixels into adjacent blocks; the frames of one chunk have"
        in half.why[1]
    )
    assert half.why[0] == "24 × 24 windows per block: the most under 256 MiB of output"
    assert "overlap" not in repr(apart)


def test_memory_is_that_of_the_largest_block(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = blocks.encode_block

    def look(frames: np.ndarray, *args: Any, **kwargs: Any) -> np.ndarray:
        out = real(frames, *args, **kwargs)
        seen.append((frames.nbytes, out.nbytes))
        return out

    monkeypatch.setattr(blocks, "encode_block", look)
    cube = small_cube(height=16, width=20)
    cube.anysat.embed(3, patch_size=20, tile=6, **TINY)
    p = cube.anysat.plan(3, patch_size=20, tile=6, **TINY)
    assert len(seen) == math.prod(p.blocks)
    assert (p.memory_input, p.memory_output) == tuple(map(max, zip(*seen, strict=True)))
    assert p.memory_weights == 4 * cost.PARAMETERS["tiny"]
    assert p.memory_working == working_bytes("tiny", "patch", dates=3, side=2, tile=6)
    assert p.memory == p.memory_weights + 2 * p.memory_input + p.memory_output + p.memory_working


def test_large_lazy_cubes_are_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    again = []
    monkeypatch.setattr(embed, "read_again", lambda cube: again.append(cube) or cube)
    monkeypatch.setattr(embed_options, "MAX_SHARED_FRAME_BYTES", 0)
    lazy, numpy = small_cube().chunk(time=1), small_cube()
    for cube, options in (
        (lazy, {}),
        (lazy, {"norm": "pastis"}),
        (lazy, {"norm": "per_window_zscore"}),
        (numpy, {}),
    ):
        again.clear()
        cube.anysat.embed(2, **options, **TINY)
        assert cube.anysat.plan(2, **options, **TINY).reads == 1 + len(again)


@pytest.mark.parametrize("codec", [None, "int8", "float16"])
def test_codecs_are_as_large_as_they_are(codec: str | None) -> None:
    cube = small_cube()
    emb = cube.anysat.embed(2, patch_size=20, **TINY)
    stored = codecs.CODECS[codec].encode(emb.values)
    assert cube.anysat.plan(2, patch_size=20, codec=codec, **TINY).bytes_written == sum(
        a.nbytes for a in stored.values()
    )


@pytest.mark.parametrize("empty", ["drop", "nearest"])
def test_bins_without_acquisitions_are_named(empty: str) -> None:
    cube = small_cube(dates=3).assign_coords(time=pd.to_datetime(["2022-01-20", "2022-06-20", "2022-06-25"]))
    want = ("2022-04-02/2022-07-02", ("2022-04-02/2022-07-02",))
    p = cube.anysat.plan(4, period="2022", empty=empty, **TINY)
    assert p.empty_bins == ("2022-07-02/2022-10-01", "2022-10-01/2023-01-01")
    assert want[0] not in p.empty_bins
    assert p.n_obs == ((1, 2) if empty == "drop" else (1, 2, 0, 0))
    assert ("dropped: 2022-07-02" if empty == "drop" else "copies of their neighbors: 2022-07-02") in repr(p)
    made = cube.anysat.frames(4, period="2022", empty=empty).anysat.plan(None, **TINY)
    assert (made.empty_bins, made.n_obs, made.doy) == (p.empty_bins, p.n_obs, p.doy)
    assert made.acquisitions == len(p.doy)
    assert made.bytes_read == made.acquisitions * 10 * 30 * 26 * 4
    bare = cube.anysat.frames(4, period="2022").drop_vars(["n_obs", "bin_start"]).anysat.plan(None, **TINY)
    assert (bare.empty_bins, bare.n_obs) == ((), ())


def test_datasets_and_arrays_and_chunks_give_the_same_plan() -> None:
    cube = small_cube(height=30, width=26)
    p = cube.anysat.plan(3, **TINY)
    assert cube.to_dataset("band").anysat.plan(3, **TINY) == p
    lazy = cube.chunk(time=1, y=7).anysat.plan(3, **TINY)
    assert dataclasses.replace(lazy, lazy=False, why=p.why) == p
    mixed = cube.to_dataset("band")
    mixed["B2"] = mixed["B2"].chunk(time=1)
    assert mixed.anysat.plan(3, **TINY).lazy


# ---------------------------------------------------------------------- why these chunks


@pytest.mark.parametrize(
    ("cube", "options", "why"),
    [
        (granules(9600), {}, "6 × 6 windows per block: the most under 64 MiB of output"),
        (granules(9600), {"patch_size": 40, "tile": 64}, "7 × 7 windows per block: the most under 64 MiB of input"),
        (granules(480), {}, "2 × 2 windows per block: the most that leave at least 64 blocks"),
        (granules(480), {"overlap": 12}, "13 × 13 windows per block: the most that leave at least 16 blocks"),
        (granules(72), {}, "1 × 1 windows per block: the cube has 9 windows, fewer than the 64 blocks to aim for"),
        (granules(24), {}, "one block, because the cube is one window"),
        (
            granules(4096),
            {"patch_size": 160, "tile": 512, "output": "dense"},
            "1 × 1 windows per block, although its output has 1.5 GiB: a window cannot be divided",
        ),
    ],
)  # fmt: skip
def test_blocks_say_why(cube: xr.DataArray, options: dict[str, Any], why: str) -> None:
    assert cube.anysat.plan(weights="random", norm="pastis", **options).why[0] == why


@pytest.mark.parametrize(
    ("cube", "options", "why"),
    [
        (
            granules(9600, 288),
            {},
            "the cube's chunks (time 1, band 10, y 288, x 288) fit: each block is within one chunk; the frames of "
            "one chunk have 25.3 MiB",
        ),
        (granules(9600, 144), {}, "the cube's chunks (time 1, band 10, y 144, x 144) fit: each is within one block"),
        (
            granules(9600, 2880),
            {},
            "the cube's chunks (time 1, band 10, y 2880, x 2880) fit: each block is within one chunk; the frames of "
            "one chunk have 2.47 GiB",
        ),
        (
            granules(9600, 1000),
            {},
            "the cube's chunks (time 1, band 10, y 1000, x 1000) are rechunked: 1,125 blocks need pixels of several "
            "chunks; the frames of one chunk have 305 MiB, and up to 398 MiB are kept until the chunks below are read "
            "(0 B with chunks of 144 pixels, or a multiple, per side)",
        ),
        (
            granules(
                9600, 1000, y=-10.0 * np.arange(500_004, 509_604) - 5, x=10.0 * np.arange(60_004, 69_604) + 5
            ).odc.assign_crs(32632),
            {},
            "the cube's chunks (time 1, band 10, y 1000, x 1000) are rechunked: 1,125 blocks need pixels of several "
            "chunks; the frames of one chunk have 305 MiB, and up to 410 MiB are kept until the chunks below are read "
            "(35.2 MiB with chunks of 144 pixels, or a multiple, per side)",
        ),
        (
            granules(9600, 1000),
            {"resize": 24},
            "the cube's chunks (time 1, band 10, y 1000, x 1000) are merged, because the cube is resampled as a whole",
        ),
        (
            small_cube(),
            {},
            "the cube is not lazy: embed() computes its blocks immediately, and keeps all 213 KiB of frames and "
            "2.29 MiB of embeddings in memory",
        ),
    ],
)  # fmt: skip
def test_chunks_say_whether_they_fit(cube: xr.DataArray, options: dict[str, Any], why: str) -> None:
    p = cube.anysat.plan(weights="random", norm="pastis", **options)
    assert p.why[1] == why
    assert all(line in " ".join(repr(p).split()) for line in p.why)


# ---------------------------------------------------------------------- nothing is read


class Unread(BackendArray):
    """A variable of a file that is never to be read."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.dtype = shape, np.dtype("uint16")

    def __getitem__(self, key: Any) -> Any:
        raise AssertionError("a file was read")


@pytest.mark.parametrize("form", ["DataArray", "Dataset"])
@pytest.mark.parametrize(
    "options", [{}, {"resize": 12, "pool": "mean"}, {"frames": None, "output": "local", "norm": "raw"}]
)
def test_nothing_is_read(form: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    numpy = small_cube(height=26, width=26)
    unread = numpy.copy(data=np.zeros(numpy.shape, "uint16"))
    unread.variable._data = LazilyIndexedArray(Unread(numpy.shape))
    lazy = numpy.chunk(time=2, y=11)
    for cube in (numpy, lazy, unread):
        if form == "Dataset":
            if cube is unread:
                bands = {b: numpy.sel(band=b, drop=True) for b in xr_anysat.BANDS}
                for b in bands.values():
                    b.variable._data = LazilyIndexedArray(Unread(b.shape))
                cube = xr.Dataset(bands)
            else:
                cube = cube.to_dataset("band")
        with monkeypatch.context() as patch, dask.config.set(scheduler=refuse):
            patch.setattr(compositing, "compose_frame", refuse)
            patch.setattr("xr_anysat.embedding.blocks.get_encoder", refuse)
            p = cube.anysat.plan(**options, **TINY)
        assert p.pixels == ((12, 12) if "resize" in options else (26, 26))


@pytest.mark.slow
def test_no_torch_is_imported() -> None:
    code = """
        p = tile_of_sentinel2((1, 1, 2048, 2048), dataset=True).anysat.plan(frames=8, period="2022", weights="random")
        print(p.shape, len(p._repr_html_()) > 100)
    """
    assert without_torch(code) == "(768, 10980, 10980) True"


# ---------------------------------------------------------------------- options


def test_options_are_those_of_embed() -> None:
    cube, *parameters = inspect.signature(xr_anysat.plan).parameters.values()
    of_embed = list(inspect.signature(xr_anysat.embed).parameters.values())
    assert cube == of_embed[0].replace(kind=inspect.Parameter.POSITIONAL_ONLY)
    assert parameters[:-2] == [p for p in of_embed[1:] if p.name != "by"]
    with pytest.raises(OptionError, match=r"plan\(\) of a series: expected one period"):
        small_cube().anysat.plan(by="year")
    assert {p.name: p.default for p in parameters[-2:]} == {"calibrate": False, "codec": None}
    cube = small_cube()
    with pytest.raises(TypeError, match="unexpected keyword argument 'peroid'"):
        cube.anysat.plan(2, peroid="2022")
    with pytest.raises(TypeError, match="positional arguments but 3 were given"):
        cube.anysat.plan(2, "2022")
    with pytest.raises(OptionError, match="codec='int4': expected None"):
        cube.anysat.plan(2, codec="int4", **TINY)
    with pytest.raises(OptionError, match=r"tile=24 pixels is not a multiple of the patch side"):
        cube.anysat.plan(2, patch_size=50, **TINY)
    with pytest.raises(xr_anysat.CubeError, match="missing B12"):
        cube.isel(band=slice(9)).anysat.plan(2, **TINY)
    with pytest.raises(xr_anysat.CubeTypeError, match="a ndarray: expected an xarray DataArray"):
        xr_anysat.plan(cube.values, 2, **TINY)
    with pytest.warns(AnySatWarning, match="4096 patches per window"):
        cube.anysat.plan(2, tile=64, **TINY)


def test_configuration_counts() -> None:
    with xr_anysat.config.set(tile=12, frames=3, model="tiny", weights="random"):
        p = small_cube().anysat.plan()
    assert (p.tile, len(p.doy), p.model, p.weights) == (12, 3, "tiny", "random:0")


# ---------------------------------------------------------------------- text and table


class Texts(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str | None] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {f"{k}={v}" for k, v in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def test_text_and_table_tell_the_same() -> None:
    p = tile_of_sentinel2((1, 10, 1024, 1024)).anysat.plan(period="2022", weights="random", codec="int8")
    p = dataclasses.replace(
        p, seconds=19_300.0, pixels_per_second=6247.4, timed='<b> & "c"', crs="a <CRS> & more"
    )
    lines = repr(p).splitlines()
    assert lines[0] == "Plan of an AnySat embedding"
    assert all(line[:2] == "  " and (line[2:12].strip() == "" or line[11] == " ") for line in lines[1:])
    assert max(map(len, lines)) <= 100
    words = " ".join(repr(p).split())
    for says in (
        "base, random:0 weights, device auto",
        "8 of 2022-01-01/2023-01-01, made of 60 acquisitions days of the year 22 68 113 159 205 250 296 342",
        "458 × 458 of 24 × 24 pixels, for 10,980 × 10,980 pixels",
        "77 × 77 = 5,929 6 × 6 windows per block: the most under 64 MiB of output",
        "patch, (D: 768, y: 10,980, x: 10,980) float32 chunks of 768 × 144 × 144, cells of 10 m, a <CRS> & more",
        "37.3 PFLOP, less where pixels are missing",
        "135 GiB twice: for the statistics of per_tile_zscore",
        "86.7 GiB at most: int8 and a float32 scale per cell, before compression",
        '5 h 22 min on this machine, 6,247 pixels/s, the model alone <b> & "c"',
    ):
        assert says in words
    page = p._repr_html_()
    table = ElementTree.fromstring(page)  # well-formed
    shown = Texts()
    shown.feed(page)
    assert " ".join(shown.text.split()) == words
    assert shown.tags == {"table", "caption", "tbody", "tr", "th", "td", "br"}
    assert shown.attributes == {
        "style=text-align: left; vertical-align: top"
    }  # no colours, nothing from elsewhere
    assert [r.find("th").text for r in table.iter("tr")][:3] == ["model", "frames", "windows"]


def test_plans_are_plain_and_fixed() -> None:
    p = small_cube().anysat.plan(2, **TINY)
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.tile = 3

    def plain(value: Any) -> bool:
        return (
            all(map(plain, value))
            if type(value) is tuple
            else type(value) in (int, float, str, bool, type(None))
        )

    assert all(plain(getattr(p, field.name)) for field in dataclasses.fields(Plan))


# ---------------------------------------------------------------------- warnings


def test_what_does_not_fit_into_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cube = small_cube(height=16, width=16)
    assert cube.anysat.plan(2, **TINY).warnings == ()
    for module in (embed_options, plan):
        monkeypatch.setattr(module, "physical_memory", lambda: 1 << 17)
    says = (
        r"this cube is not lazy, so its embedding is computed now, and 256 KiB of float32 do not fit into the 128 KiB "
        r"of memory here: make it lazy, cube\.chunk\(y=2048, x=2048\), and write the embedding block by block with "
        r"emb\.anysat\.to_zarr\(store, codec='int8'\), which takes a quarter of that, or request fewer cells: "
        r"patch_size=40 has one cell per 16 pixels"
    )
    p = cube.anysat.plan(2, **TINY)
    with pytest.warns(AnySatWarning, match=says + r"\. cube\.anysat\.plan\(\.\.\.\) reports"):
        cube.anysat.embed(2, **TINY)
    with pytest.warns(AnySatWarning, match=says):  # the grid exists before it is pooled
        cube.anysat.embed(2, pool="mean", **TINY)
    with pytest.warns(AnySatWarning) as seen:
        warnings.warn(p.warnings[0], AnySatWarning, stacklevel=1)
    assert str(seen[0].message) == p.warnings[0]
    lazy = cube.chunk(time=1).anysat.plan(2, output="dense", **TINY)
    assert lazy.warnings[0] == (
        "512 KiB of float32 do not fit into the 128 KiB of memory here: instead of .compute(), write the embedding "
        "block by block with emb.anysat.to_zarr(store, codec='int8'), which takes a quarter of that, or request fewer "
        "cells: output='patch' with patch_size=40 has one cell per 16 pixels"
    )
    assert lazy.warnings[1].startswith("a worker needs ")
    assert "warnings" in repr(lazy)
    assert len(cube.chunk(time=1).anysat.plan(2, pool="max", **TINY).warnings) == 1
    cube.chunk(time=1).anysat.embed(2, output="dense", **TINY)  # lazy: no warning


@pytest.mark.slow
def test_a_lazy_country_is_warned_about() -> None:
    cube = granules(14_400)
    says = (
        r"an embedding of 1\.16 TiB of float32: write it block by block with emb\.anysat\.to_zarr\(store, "
        r"codec='int8'\), which takes a quarter of that, or request fewer cells: output='patch' with patch_size=40"
    )
    with pytest.warns(AnySatWarning, match=says):
        cube.anysat.embed(output="dense", weights="random")
    p = cube.anysat.plan(output="dense", weights="random")
    assert len(p.warnings) == 1
    assert p.warnings[0].startswith("an embedding of 1.16 TiB of float32: write it")
    cube.anysat.embed(patch_size=40, tile=64, weights="random")
    cube.anysat.embed(output="dense", pool="mean", weights="random")
    assert "fewer cells" not in cube.anysat.plan(patch_size=40, weights="random").warnings[0]


def test_machines_that_do_not_tell_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert physical_memory() > GIB // 4
    monkeypatch.delattr("os.sysconf_names")
    assert physical_memory() is None
    assert granules(9600).anysat.plan(weights="random").warnings == ()
    assert small_cube().anysat.plan(2, **TINY).warnings == ()


# ---------------------------------------------------------------------- time


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "CALIBRATION_SECONDS", 0.01)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "options", [{}, {"norm": "per_window_zscore", "output": "dense"}, {"resize": 8, "patch_size": 40}]
)
def test_calibration_reads_no_pixel(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compositing, "compose_frame", refuse)
    cube = small_cube(height=16, width=16).chunk(time=1)
    with dask.config.set(scheduler=refuse):
        p = cube.anysat.plan(2, calibrate=True, tile=8, device="cpu", **options, **TINY)
    assert p.seconds is not None
    assert p.pixels_per_second is not None
    assert 0 < p.seconds < math.inf
    assert p.seconds * p.pixels_per_second == pytest.approx(math.prod(p.pixels))
    assert p.timed.startswith("8 × 8 pixels and 2 frames, timed ")
    assert p.timed.endswith(" on cpu")
    bare = dataclasses.replace(p, seconds=None, pixels_per_second=None, timed="")
    assert bare == cube.anysat.plan(2, tile=8, device="cpu", **options, **TINY)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_weights_that_are_not_here_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "xr_anysat.model.checkpoint.official_path", lambda download=True: None if not download else refuse()
    )
    p = small_cube(height=4, width=4).anysat.plan(2, calibrate=True, device="cpu")
    assert p.timed.endswith(
        "; with random weights, which take as long, because the official ones are not on this machine"
    )
    assert p.weights == "official"
    with pytest.raises(xr_anysat.DeviceError, match="cuda:99"):
        small_cube(height=4, width=4).anysat.plan(2, calibrate=True, device="cuda:99", **TINY)


@pytest.mark.usefixtures("quick")
def test_modules_called_like_upstreams() -> None:
    module = Hub(xr_anysat.load_model("tiny", weights="random", device="cpu"))
    cube = small_cube(height=24, width=24, gaps=0)
    options = {"frames": 2, "tile": 12, "output": "local"}
    p = cube.anysat.plan(**options, anchor="cube", model=module, calibrate=True)
    one = multiply_adds("tiny", "local", dates=2, side=1, pixels=144, patches=144, savings=False)
    assert p.flop == 2 * 4 * one.total
    assert p.warnings == ()
    assert p.timed.startswith("12 × 12 pixels")
    cut = cube.isel(x=slice(20)).anysat.plan(**options, anchor="cube", model=module)
    assert cut.warnings == (
        "the module passed as model= takes complete windows only, and the ends of the cube cut some: crop the cube "
        "to whole windows of 12 pixels, with anchor='cube'",
    )
    ours = xr_anysat.load_model("tiny", weights="random", device="cpu")
    assert cube.anysat.plan(**options, model=ours).flop == cube.anysat.plan(**options, **TINY).flop

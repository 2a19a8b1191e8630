"""Bad input is refused before anything is read or loaded, and the message says what was seen and what mends it."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from support.cubes import (
    BANDS,
    CRS,
    LEFT,
    PADDED,
    TOP,
    centred,
    odc_stac,
    placed,
    plain,
    rioxarray_stack,
    unreadable,
)

import xr_anysat
from xr_anysat import (
    AnySatError,
    AnySatWarning,
    CubeError,
    CubeTypeError,
    DeviceError,
    OptionError,
    WeightsError,
)
from xr_anysat.cube import compositing

TINY = {"model": "tiny", "weights": "random"}
Cube = Callable[[], Any]


@dataclass(frozen=True)
class Bad:
    """A kind of bad input: a cube, options for `embed`, and the refusal."""

    name: str
    error: type[AnySatError]
    says: str
    cube: Cube = placed
    options: dict[str, Any] = field(default_factory=dict)


def stepped(y: float, x: float) -> xr.DataArray:
    return placed().assign_coords(y=TOP - y * np.arange(4), x=LEFT + x * np.arange(5))


def in_degrees(y: str, x: str) -> xr.DataArray:
    cube = plain().rename(y=y, x=x)
    return cube.assign_coords({y: 46 - 9e-5 * np.arange(4), x: 11 + 1e-4 * np.arange(5)})


def rotated() -> xr.DataArray:
    from odc.geo.xr import xr_coords

    return plain().assign_coords(xr_coords(placed().odc.geobox.rotate(20)))


def with_nat() -> xr.DataArray:
    times = placed()["time"].values.copy()
    times[1] = np.datetime64("NaT")
    return placed().assign_coords(time=times)


def embedding() -> xr.DataArray:
    return xr.DataArray(np.zeros((256, 4, 5), "float32"), dims=("D", "y", "x"), name="anysat")


def option(name: str, value: Any, says: str, error: type[AnySatError] = OptionError, **others: Any) -> Bad:
    return Bad(f"{name}={value!r}", error, says, options={name: value, **others})


ROWS = [
    # not a cube
    Bad(
        "NumPy",
        CubeTypeError,
        r"a ndarray: expected an xarray DataArray.*xarray\.DataArray\(values",
        lambda: plain().values,
    ),
    Bad("None", CubeTypeError, "a NoneType: expected an xarray", lambda: None),
    Bad("a path", CubeTypeError, "a str: expected an xarray", lambda: "cube.nc"),
    Bad("an embedding", CubeTypeError, "those of an embedding cube: expected a Sentinel-2 cube", embedding),
    Bad("embeddings", CubeTypeError, "those of an embedding cube", lambda: embedding().to_dataset()),
    Bad(
        "a Dataset of a cube",
        CubeError,
        r"none of them a band.*dataset\['s2'\]",
        lambda: placed().to_dataset(name="s2"),
    ),
    # bands
    Bad(
        "no B8A",
        CubeError,
        "missing B8A. AnySat needs the ten bands B2, B3.*load them",
        lambda: placed().drop_sel(band="B8A"),
    ),
    Bad(
        "no B2, B3",
        CubeError,
        r"variables \['red'.*missing B2, B3",
        lambda: odc_stac().drop_vars(["blue", "green"]),
    ),
    Bad(
        "other names",
        CubeError,
        r"bands \['x', 'y'\].*missing B2, B3, B4",
        lambda: placed()[:, :2].assign_coords(band=["x", "y"]),
    ),
    Bad(
        "B11 twice",
        CubeError,
        r"\{'B11': \['B11', 'swir16'\]\} are several of the same band.*cube\.sel",
        lambda: placed().assign_coords(band=[*BANDS[:8], "B11", "swir16"]),
    ),
    Bad(
        "numbers for bands",
        CubeError,
        r"bands without names \(\[.*1.*never by position.*assign_coords\(band",
        rioxarray_stack,
    ),
    Bad("no names for bands", CubeError, "bands without names", lambda: placed().drop_vars("band")),
    option("bands", PADDED[:7], "has 7 names: expected one for each of the 10"),
    option("bands", "B02", "bands='B02': expected a list"),
    option("bands", [*PADDED[:9], "B11"], "'B11'.*are several of the same band", CubeError),
    Bad(
        "20 m bands apart",
        CubeError,
        r"'swir22' has dims \('time', 'y', 'x20'\): expected \(time, y, x\)",
        lambda: odc_stac().assign(swir22=odc_stac()["swir22"].rename(x="x20")),
    ),
    # dims and times
    Bad(
        "no band dim",
        CubeError,
        r"dims \('time', 'y', 'x'\): expected \(time, band, y, x\); 'band' missing.*rename",
        lambda: placed().isel(band=0),
    ),
    Bad(
        "one dim more",
        CubeError,
        r"'tile' not expected.*isel\(extra=0\)",
        lambda: placed().expand_dims("tile"),
    ),
    Bad("no y", CubeError, "'y' missing", lambda: plain().isel(y=0)),
    Bad(
        "two dims of time",
        CubeError,
        r"\['t', 'time'\] could all be 'time': rename",
        lambda: placed().expand_dims("t"),
    ),
    Bad(
        "no time",
        CubeError,
        r"no time: AnySat needs the date of every image.*expand_dims\(time=",
        lambda: placed().isel(time=0, drop=True),
    ),
    Bad(
        "no dates",
        CubeError,
        r"the 3 images have no dates.*assign_coords\(time=dates\)",
        lambda: placed().drop_vars("time"),
    ),
    Bad("a date is NaT", CubeError, "1 of 3 times are NaT: drop those images", with_nat),
    Bad(
        "numbers for dates",
        CubeError,
        r"times of dtype int64 .*expected datetime64.*to_datetime",
        lambda: placed().assign_coords(time=[1, 2, 3]),
    ),
    Bad(
        "dates day first",
        CubeError,
        r"'31/01/2022'.*expected datetime64 or ISO 8601",
        lambda: placed().assign_coords(time=["31/01/2022"] * 3),
    ),
    *(
        Bad(f"empty {d}", CubeError, f"'{d}': 0.*'{d}' is empty", lambda d=d: plain().isel({d: slice(0)}))
        for d in ("time", "y", "x")
    ),
    Bad(
        "complex",
        CubeError,
        r"dtype complex64: expected integers or floats.*astype",
        lambda: placed().astype("complex64"),
    ),
    Bad("bool", CubeError, "dtype bool: expected integers", lambda: placed().astype(bool)),
    # grid
    Bad(
        "degrees",
        CubeError,
        r"pixels in degrees \(EPSG:4326\).*10 m in a projected CRS.*reproject",
        lambda: centred().odc.assign_crs("EPSG:4326"),
    ),
    Bad(
        "degrees by names",
        CubeError,
        r"look like degrees \(y 46 to 45.99.*reproject",
        lambda: in_degrees("lat", "lon"),
    ),
    Bad(
        "degrees by values", CubeError, r"look like degrees .*x 11 to 11\.0004", lambda: in_degrees("y", "x")
    ),
    Bad(
        "feet",
        CubeError,
        r"a CRS in US survey foot \(EPSG:2263\).*reproject",
        lambda: centred().odc.assign_crs("EPSG:2263"),
    ),
    Bad("20 m pixels", CubeError, r"pixels of 20 × 20 m \(y × x\).*resolution=10", lambda: stepped(20, 20)),
    Bad("oblong pixels", CubeError, "pixels of 10 × 60 m", lambda: stepped(10, 60)),
    Bad(
        "uneven pixels",
        CubeError,
        "'x' coordinates are not evenly spaced.*reproject",
        lambda: placed().assign_coords(x=[5, 15, 25, 36, 45]),
    ),
    Bad(
        "uneven pixels without CRS",
        CubeError,
        "'x' coordinates are not evenly spaced.*drop_vars",
        lambda: centred().assign_coords(x=[5, 15, 25, 36, 45]),
    ),
    Bad("rotated", CubeError, "a rotated grid .*reproject", rotated),
    Bad(
        "no coordinates",
        CubeError,
        r"a CRS \(EPSG:32632\) but no 'x' coordinates.*drop the CRS",
        lambda: placed().drop_vars("x"),
    ),
    Bad(
        "a CRS of nowhere",
        CubeError,
        "CRS 'mars' cannot be parsed.*assign_crs",
        lambda: centred().assign_attrs(crs="mars"),
    ),
    # nodata
    option("nodata", "0", "nodata='0': expected a number, or None"),
    option("nodata", [0], r"nodata=\[0\]: expected a number"),
    Bad(
        "nodata in words",
        CubeError,
        "nodata='none' in the cube's metadata: expected a number",
        lambda: placed().assign_attrs(nodata="none"),
    ),
    # patch and window
    *(
        option("patch_size", v, r"patch_size=.*: expected a positive multiple of 10 \(meters")
        for v in (0, 15, -10, 25.0, True, "10", np.nan, np.inf, None)
    ),
    *(
        option("tile", v, r"tile=.*: expected a positive whole number of pixels")
        for v in (0, -24, 2.5, True, "24", np.nan, np.inf, None)
    ),
    option(
        "tile",
        25,
        r"tile=25 pixels is not a multiple of the patch side, 2 pixels \(patch_size=20 m\): use tile=24 or 26",
        patch_size=20,
    ),
    option("tile", 1, "use tile=3$", patch_size=30),
    *(
        option("resize", v, "resize=.*: expected a positive whole number, or None")
        for v in (0, -24, 2.5, True, "24")
    ),
    option("resize", 24, r"resize=24 needs a square cube, this one has 4 × 5 pixels: crop it.*slice\(4\)"),
    option(
        "resize",
        5,
        "resize=5 pixels is not a multiple of the patch side, 2 pixels.*use resize=4 or 6",
        patch_size=20,
    ),
    *(option("batch", v, "batch=.*: expected a positive whole number, or None") for v in (0, -1, 1.5, True)),
    Bad(
        "anchor without CRS",
        OptionError,
        "anchor='grid' needs a CRS: .*assign_crs.*anchor='cube'",
        plain,
        {"anchor": "grid"},
    ),
    # frames and period
    *(
        option("frames", v, "frames=.*: expected a positive whole number, up to 10000, or None")
        for v in (0, -8, 2.5, True, "8")
    ),
    option("frames", 9999, "a period of 365 days .*cannot be cut into 9999 frames.*fewer frames"),
    option("reduce", "max", "reduce='max': expected one of 'median', 'mean', 'clearest'"),
    option("reduce", "mean", "reduce='mean' has no meaning with frames=None: pass", frames=None),
    option("empty", "zero", "empty='zero': expected one of 'drop', 'nearest'"),
    option("doy", "first", "doy='first': expected one of 'midpoint', 'observed'"),
    option("doy_base", 2, "doy_base=2: expected 0 .* or 1"),
    option("fill_value", np.inf, "fill_value=inf: expected a finite digital number, or None"),
    option("period", "2022-06-01/2022-06-01", "is empty: its end is exclusive"),
    option("period", ("2022-10-01", "2022-04-01"), "is empty: its end is exclusive"),
    option("period", "soon", "period='soon': expected '2022', '2022-06'"),
    option("period", 2022, "period=2022: expected '2022'"),
    option(
        "period", "2019", "no acquisition between 2019-01-01 and 2020-01-01.*run from 2022-01-15", CubeError
    ),
    Bad(
        "frames of frames",
        OptionError,
        r"already composed \(frames=2.*frames=None",
        lambda: unreadable(placed()).anysat.frames(2),
    ),
    # what comes out, and of which model
    option("norm", "minmax", "norm='minmax': expected one of 'per_tile_zscore', .*Statistics"),
    option("norm", {"mean": [1]}, "norm=.*: expected 'mean' and 'std'"),
    option("output", "all", "output='all': expected one of 'patch', 'dense', 'local', 'tile'"),
    option("anchor", "north", "anchor='north': expected one of 'auto', 'grid', 'cube'"),
    option("pool", "median", "pool='median': expected one of 'mean', 'max', or None"),
    option("model", "large", "model='large': expected one of 'tiny', 'small', 'base'"),
    option("model", 7, "model=7: expected one of .*or an AnySat module", weights=None),
    option("weights", "/no/such/file.pth", "no weights file .*file.pth.*weights= takes", WeightsError),
    option(
        "weights",
        "official",
        "no official checkpoint of model='tiny', only of 'base'.*weights=PATH",
        WeightsError,
    ),
    option("weights", None, "no official checkpoint of model='tiny'", WeightsError),
    option("weights", 3, "weights=3: expected None"),
    option("weights", ("random", -1), "expected a seed from 0"),
    option("device", "tpu", "device='tpu': expected 'auto', 'cpu', 'cuda'"),
    option(
        "precision",
        "float64",
        "precision='float64': expected one of 'float32', 'bfloat16', 'float16', 'int8'",
    ),
]


@pytest.fixture
def _nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither weights are loaded nor NumPy cubes composed."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("weights were loaded, or pixels read")

    monkeypatch.setattr("xr_anysat.embedding.blocks.get_encoder", refuse)
    monkeypatch.setattr("xr_anysat.model.weights.get_encoder", refuse)
    monkeypatch.setattr(compositing, "compose_frame", refuse)


def refused(cube: Any, row: Bad) -> None:
    with pytest.raises(row.error, match=re.compile(row.says, re.DOTALL)) as caught:
        xr_anysat.embed(cube, **{"period": "2022", **TINY, **row.options})
    assert isinstance(caught.value, AnySatError)
    assert isinstance(caught.value, TypeError if row.error is CubeTypeError else ValueError)
    message = str(caught.value)
    assert "\n" not in message
    assert "  " not in message
    assert len(message) > 40


@pytest.mark.usefixtures("_nothing_is_read")
@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_it_is_refused_before_anything_is_read(row: Bad) -> None:
    cube = row.cube()
    if isinstance(cube, xr.DataArray | xr.Dataset):
        cube = unreadable(cube)
    refused(cube, row)


@pytest.mark.usefixtures("_nothing_is_read")
@pytest.mark.parametrize("row", [r for r in ROWS if r.name != "frames of frames"], ids=lambda r: r.name)
def test_so_it_is_of_numpy_cubes(row: Bad) -> None:
    refused(row.cube(), row)


def test_the_table_is_long() -> None:
    assert len(ROWS) >= 30
    assert len({r.name for r in ROWS}) == len(ROWS)


COMPOSING = {"reduce", "empty", "doy_base", "fill_value", "period", "nodata", "bands"}


@pytest.mark.usefixtures("_nothing_is_read")
@pytest.mark.parametrize("function", [xr_anysat.frames, xr_anysat.statistics])
@pytest.mark.parametrize(
    "row",
    [
        r
        for r in ROWS
        if set(r.options) <= COMPOSING
        and r.name not in ("anchor without CRS", "uneven pixels without CRS", "None")
    ],
    ids=lambda r: r.name,
)
def test_frames_and_statistics_refuse_the_same(row: Bad, function: Callable[..., Any]) -> None:
    cube = row.cube()
    if isinstance(cube, xr.DataArray | xr.Dataset):
        cube = unreadable(cube)
    with pytest.raises(row.error, match=row.says):
        function(cube, **{"period": "2022", **row.options})


@pytest.mark.parametrize(
    ("emb", "how", "error", "says"),
    [
        (embedding, "median", OptionError, "how='median': expected one of 'mean', 'max'"),
        (embedding, None, OptionError, "how=None"),
        (placed, "mean", CubeTypeError, "expected an embedding cube"),
        (
            lambda: embedding().values,
            "mean",
            CubeTypeError,
            r"a ndarray with dims \(\): expected an embedding",
        ),
        (lambda: embedding().isel(y=0), "mean", CubeTypeError, r"dims \('D', 'x'\): expected an embedding"),
        (lambda: embedding().to_dataset(), "mean", CubeTypeError, r"a Dataset of \['anysat'\]"),
    ],
)
def test_pool_refuses(emb: Callable[[], Any], how: Any, error: type[AnySatError], says: str) -> None:
    with pytest.raises(error, match=says):
        xr_anysat.pool(emb(), how)


@pytest.mark.usefixtures("_nothing_is_read")
def test_an_unknown_option_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XR_ANYSAT_PATCHSIZE", "20")
    xr_anysat.config.refresh()
    try:
        with pytest.raises(
            OptionError, match=r"unknown option 'patchsize'.*environment variable XR_ANYSAT_PATCHSIZE"
        ):
            xr_anysat.embed(unreadable(placed()), 2, **TINY)
    finally:
        monkeypatch.undo()
        xr_anysat.config.refresh()
    xr_anysat.embed(unreadable(placed()), 2, **TINY)


def test_a_misspelt_argument() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'patchsize'"):
        xr_anysat.embed(placed(), patchsize=20)


def test_no_gpu() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(DeviceError, match="device='cuda'"):
        xr_anysat.embed(placed(), 2, device="cuda", **TINY)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"x" * 200_000])
def test_a_file_that_holds_no_weights(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=re.escape(str(path))):
        xr_anysat.embed(placed(), 2, model="tiny", weights=path)


# ---------------------------------------------------------------------- what is odd, but may be right


def test_many_patches_a_window_are_warned_of() -> None:
    with pytest.warns(
        AnySatWarning, match=r"1600 patches per window \(tile=40 px, patches of 10 m\).*at most 1024"
    ):
        xr_anysat.embed(unreadable(placed()), 2, tile=40, **TINY)
    xr_anysat.embed(unreadable(placed()), 2, tile=32, **TINY)


@pytest.mark.parametrize(
    "call",
    [
        lambda cube: xr_anysat.embed(unreadable(cube), 2, tile=40, **TINY),
        lambda cube: unreadable(cube).anysat.embed(2, tile=40, **TINY),
        lambda cube: xr_anysat.embed(cube * 0, 2, **TINY),
        lambda cube: xr_anysat.frames(cube.assign_attrs(add_offset=-1000), 2),
        lambda cube: xr_anysat.statistics(cube - np.uint16(9000)),
    ],
)
def test_warnings_point_at_the_callers_line(call: Callable[[xr.DataArray], Any]) -> None:
    with pytest.warns(AnySatWarning) as caught:
        call(placed())
    assert [w.filename for w in caught if w.category is AnySatWarning] == [__file__]


@pytest.mark.parametrize("output", ["patch", "dense", "local", "tile"])
def test_nothing_valid_is_nan_with_a_warning(output: str) -> None:
    cube = placed() * 0
    with pytest.warns(AnySatWarning, match=r"nothing valid in this cube: every embedding is NaN.*nodata="):
        emb = xr_anysat.embed(cube, 2, output=output, **TINY)
    assert emb.sizes["D"] == (512 if output == "dense" else 256)
    assert np.isnan(emb).all()
    assert emb.odc.crs == CRS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lazy = xr_anysat.embed(cube.chunk(), 2, output=output, pool="mean", **TINY).compute()
    assert np.isnan(lazy).all()
    assert lazy.shape == (emb.sizes["D"],)


def test_whole_floats_and_numpys_numbers_are_taken_for_what_they_are() -> None:
    cube = unreadable(placed())
    want = xr_anysat.embed(cube, 2, patch_size=20, tile=12, nodata=7, fill_value=3, batch=2, **TINY)
    got = xr_anysat.embed(
        cube,
        np.int64(2),
        patch_size=np.float64(20),
        tile=12.0,
        nodata=np.uint16(7),
        fill_value=np.float32(3),
        batch=np.int32(2),
        doy_base=np.int8(0),
        **TINY,
    )
    assert got.attrs["config"] == want.attrs["config"]
    assert got.data.name == want.data.name


def test_nodata_of_nan_is_recorded_and_taken_back() -> None:
    cube = placed().assign_attrs(nodata=1)
    emb = xr_anysat.embed(cube, 2, nodata=np.nan, **TINY)
    config = json.loads(emb.attrs["config"])
    assert config["nodata"] == "nan"
    np.testing.assert_array_equal(xr_anysat.embed(cube, **config), emb)

"""The grid imprint of windows: by hand, on the lattice, and on a realistic scene."""

from __future__ import annotations

import weakref
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cubes import small_cube

from xr_anysat import AnySatError, CubeError, CubeTypeError
from xr_anysat.demo.scene import make_scene, open_scene

TINY = {"model": "tiny", "weights": "random"}
RECORD = {"output": "local", "patch_size_m": 10, "tile": 4, "overlap": 0, "anchor": "cube"}


def cube_of(values: Any, **record: Any) -> xr.DataArray:
    """An embedding cube of `values` (D, y, x), counted from its own corner."""
    return xr.DataArray(np.asarray(values, "float32"), dims=("D", "y", "x"), attrs={**RECORD, **record})


def on_grid(values: Any, row: int, col: int, **record: Any) -> xr.DataArray:
    """An embedding cube whose first pixel is (`row`, `col`) of the CRS lattice."""
    import odc.geo.xr  # noqa: F401

    emb = cube_of(values, anchor="grid", **record)
    size = emb.attrs["patch_size_m"] if emb.attrs["output"] == "patch" else 10
    y, x = (np.arange(n) * size + size / 2 for n in emb.shape[1:])
    return emb.assign_coords(y=-10.0 * row - y, x=10.0 * col + x).odc.assign_crs("EPSG:32632")


def plane(down: Any, across: Any, channels: int = 4) -> np.ndarray:
    """A cube whose step is |difference of `down`| along y, and of `across` along x."""
    flat = np.add.outer(np.asarray(down, float), np.asarray(across, float))
    return np.repeat(flat[None], channels, 0) / np.sqrt(channels)


def steep(edges: np.ndarray, tile: int, high: float) -> np.ndarray:
    """Heights of cells, with a step of `high` over the `edges` at multiples of `tile` and of 1 over the others."""
    return np.cumsum([0.0, *np.where(edges[1:] % tile == 0, high, 1.0)])


# ---------------------------------------------------------------------- by hand


def test_a_ramp_has_no_seams() -> None:
    seams = cube_of(plane(np.arange(13), 3 * np.arange(9))).anysat.seam_score()
    assert seams["score"].item() == pytest.approx(1)
    np.testing.assert_allclose(seams["step"], 1, rtol=1e-6)


def test_steps_are_distances_and_the_score_is_their_ratio() -> None:
    tall, wide = steep(np.arange(12), 4, 5), steep(np.arange(10), 4, 2)
    seams = cube_of(plane(tall, wide, channels=9)).anysat.seam_score()
    # 2 borders down of 10 steps each, 2 across of 12; steps inside are 1
    assert seams["score"].item() == pytest.approx((2 * 10 * 5 + 2 * 12 * 2) / (2 * 10 + 2 * 12))
    np.testing.assert_allclose(seams["step"].sel(axis="y"), [5, 1, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(seams["step"].sel(axis="x"), [2, 1, 1, 1], rtol=1e-6)
    assert dict(seams.sizes) == {"axis": 2, "phase": 4}
    assert {v.dtype for v in seams.data_vars.values()} == {np.dtype("float64")}
    assert seams["phase"].values.tolist() == [0, 1, 2, 3]
    assert seams["border"].values.tolist() == [True, False, False, False]
    assert seams.attrs == RECORD


def test_windows_that_are_constant_have_an_infinite_score() -> None:
    flat = np.arange(12) // 4
    seams = cube_of(plane(flat, flat)).anysat.seam_score()
    assert seams["score"].item() == np.inf
    assert np.isposinf(seams["step"].sel(phase=0)).all()


def test_phases_of_patches_are_in_pixels() -> None:
    cells = steep(np.arange(9) * 3, 12, 7)
    seams = cube_of(plane(cells, cells), output="patch", patch_size_m=30, tile=12).anysat.seam_score()
    assert seams["phase"].values.tolist() == [0, 3, 6, 9]
    assert seams["border"].values.tolist() == [True, False, False, False]
    assert seams["score"].item() == pytest.approx(7)


@pytest.mark.parametrize(
    ("overlap", "phases", "borders"),
    [(2, 6, [0, 2]), (4, 4, [0]), (5, 3, [0, 2])],
    ids=["a quarter", "half", "more"],
)
def test_overlapping_windows_start_and_end_at_borders(overlap: int, phases: int, borders: list[int]) -> None:
    line = np.cumsum(np.where(np.isin(np.arange(25) % phases, borders), 3.0, 1.0))
    seams = cube_of(plane(line, line), tile=8, overlap=overlap).anysat.seam_score()
    assert seams.sizes["phase"] == phases
    assert seams["phase"].values[seams["border"]].tolist() == borders
    assert seams["score"].item() == pytest.approx(3)


def test_without_overlap_in_the_record_there_is_none() -> None:
    emb = cube_of(plane(np.arange(9), np.arange(9)))
    old = emb.copy()
    del old.attrs["overlap"]
    xr.testing.assert_identical(old.anysat.seam_score(), emb.anysat.seam_score())


def test_borders_are_compared_with_edges_of_the_same_20_m_pixels() -> None:
    line = np.cumsum(np.where(np.arange(24) % 2 == 0, 2.0, 1.0))  # steps at the edges of 20 m pixels only
    seams = cube_of(plane(line, line), tile=6).anysat.seam_score()
    assert seams["score"].item() == pytest.approx(1)
    assert seams["inside"].values.tolist() == [False, False, True, False, True, False]
    np.testing.assert_allclose(seams["step"].sel(axis="x"), [1, 0.5, 1, 0.5, 1, 0.5], rtol=1e-6)
    # borders of odd windows meet both kinds of edges, and so does what is inside
    odd = cube_of(plane(line, line), tile=5).anysat.seam_score()
    assert odd["inside"].values.tolist() == [False, True, True, True, True]


@pytest.mark.parametrize("side", [3, 4])
def test_borders_of_dense_are_compared_with_those_of_patches(side: int) -> None:
    at = np.arange(36)
    line = np.cumsum(np.select([at % 12 == 0, at % side == 0], [6.0, 3.0], 1.0))
    record = {"output": "dense", "patch_size_m": side * 10, "tile": 12}
    seams = cube_of(plane(line, line), **record).anysat.seam_score()
    assert seams["phase"].values[seams["inside"]].tolist() == {3: [6], 4: [4, 8]}[side]
    assert seams["score"].item() == pytest.approx(2)


# ---------------------------------------------------------------------- what is missing


def test_nan_cells_take_no_part() -> None:
    line = steep(np.arange(12), 4, 5)
    values = plane(line, line)
    values[:, 4, 6] = np.inf  # under a gap: it would be seen
    there = np.ones((12, 12), bool)
    there[4, 6] = there[0, :5] = there[7:9, 3] = False
    seams = cube_of(np.where(there, values, np.nan)).anysat.seam_score()
    assert seams["score"].item() == pytest.approx(5)
    np.testing.assert_allclose(seams["step"], [[5, 1, 1, 1]] * 2, rtol=1e-6)


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((2, 3, 3)) + np.arange(3),  # within one window
        np.full((2, 9, 9), np.nan),
        np.ones((2, 9, 9)),  # nothing ever steps
        np.zeros((2, 1, 1)),
    ],
    ids=["one window", "nothing valid", "constant", "one cell"],
)
def test_nothing_to_compare_is_nan(values: np.ndarray) -> None:
    seams = cube_of(values).anysat.seam_score()
    assert np.isnan(seams["score"])
    assert seams["step"].shape == (2, 4)


# ---------------------------------------------------------------------- on the lattice


@pytest.mark.parametrize(("row", "col"), [(-500_003, 60_005), (0, 0), (7, -9)])
def test_phases_are_counted_from_the_origin_of_the_crs(row: int, col: int) -> None:
    down, across = steep(row + np.arange(20), 4, 6), steep(col + np.arange(30), 4, 3)
    emb = on_grid(plane(down, across), row, col)
    for crop in (emb, emb[:, 3:, 2:], emb[:, 5:18, 7:29], emb.sel(x=slice(emb.x[1], emb.x[-1]))):
        seams = crop.anysat.seam_score()
        np.testing.assert_allclose(seams["step"], [[6, 1, 1, 1], [3, 1, 1, 1]], rtol=1e-6)
    row_only = emb[:, 6:7, 1:].drop_vars("spatial_ref").anysat.seam_score()
    np.testing.assert_allclose(row_only["step"].sel(axis="x"), [3, 1, 1, 1], rtol=1e-6)
    assert row_only["step"].sel(axis="y").isnull().all()
    assert row_only["score"].item() == pytest.approx(3)


def test_patches_on_the_grid_and_off_it() -> None:
    row, col = -24, 36  # the first patch starts at one, as embed() has it
    lines = [steep(start + 4 * np.arange(20), 16, 8) for start in (row, col)]
    emb = on_grid(plane(*lines), row, col, output="patch", patch_size_m=40, tile=16)
    off = emb.assign_coords(y=emb.y - 3, x=emb.x + 3)  # a grid that starts between pixels, by less than one
    for each in (emb, emb[:, 1:, 3:], off, off[:, 1:, 3:]):
        np.testing.assert_allclose(each.anysat.seam_score()["step"], [[8, 1, 1, 1]] * 2, rtol=1e-6)


@pytest.mark.parametrize("output", ["patch", "dense", "local"])
@pytest.mark.parametrize("anchor", ["grid", "cube"])
def test_windows_of_embed_are_found_where_they_are(output: str, anchor: str) -> None:
    cube = small_cube(gaps=0)
    emb = cube.anysat.embed(2, tile=8, patch_size=20, output=output, anchor=anchor, norm="pastis", **TINY)
    if anchor == "grid":
        rows, cols = -emb["y"].values // 10, emb["x"].values // 10  # pixels at the centers of cells
    else:
        rows, cols = (np.arange(n) * (2 if output == "patch" else 1) for n in emb.shape[1:])
    window = np.add.outer(rows // 8, 1000 * (cols // 8))
    seams = emb.copy(data=np.broadcast_to(window, emb.shape)).anysat.seam_score()
    assert seams["score"].item() == np.inf
    assert np.isposinf(seams["step"].sel(phase=0)).all()


# ---------------------------------------------------------------------- chunks


@pytest.mark.slow
@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    chunks=st.tuples(*[st.integers(2, n) for n in (6, 17, 14)]),
    tile=st.integers(3, 9),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_chunks_change_only_the_last_digits(chunks: tuple[int, int, int], tile: int, dtype: str) -> None:
    values = np.random.default_rng(tile).standard_normal((6, 17, 14))
    values[:, 3:5, 2:9] = np.nan
    emb = on_grid(values, 5, 7, tile=tile).astype(dtype)
    lazy = emb.chunk(dict(zip(emb.dims, chunks, strict=True)))
    want, got = emb.anysat.seam_score(), lazy.anysat.seam_score()
    xr.testing.assert_allclose(got, want, rtol=1e-12)
    assert not any(v.chunks for v in got.variables.values())


def test_a_lazy_cube_is_computed_once_and_never_held_as_a_whole() -> None:
    held, most, made = set(), 0, []

    def block(block_info: Any = None) -> np.ndarray:
        nonlocal most
        place = block_info[None]["chunk-location"]
        out = np.random.default_rng(place).standard_normal((8, 24, 24)).astype("float32")
        made.append(place)
        held.add(place)
        most = max(most, len(held))
        weakref.finalize(out, held.discard, place)
        return out

    shape = ((8,), (24,) * 6, (24,) * 6)
    data = da.map_blocks(block, chunks=shape, dtype="float32", meta=np.empty((0, 0, 0), "float32"))
    emb = xr.DataArray(data, dims=("D", "y", "x"), attrs={**RECORD, "tile": 24})
    with dask.config.set(scheduler="synchronous"):
        score = emb.anysat.seam_score()["score"].item()
    assert score == pytest.approx(1, abs=0.01)
    assert len(made) == len(set(made)) == 36
    assert most <= 6


def test_small_types_neither_wrap_nor_overflow() -> None:
    values = np.array([[[250, 0, 250, 0, 250, 0]]], "uint8")
    emb = xr.DataArray(values, dims=("D", "y", "x"), attrs={**RECORD, "tile": 3})
    assert emb.anysat.seam_score()["score"].item() == pytest.approx(1)
    halves = xr.DataArray(np.float16(values) * 200, dims=("D", "y", "x"), attrs=emb.attrs)
    assert halves.anysat.seam_score()["score"].item() == pytest.approx(1)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("emb", "error", "words"),
    [
        (small_cube(), CubeTypeError, r"expected an embedding cube.*embed\(\) first.*seam_score\(\)"),
        (cube_of(np.ones((2, 3, 3))).max(("y", "x")), CubeTypeError, r"one vector \(D,\).*seam_score\(\)"),
        (cube_of(np.ones((2, 3, 3))).drop_attrs(), CubeError, r"'output', .* 'anchor'.*emb\.assign_attrs"),
        (cube_of(np.ones((2, 3, 3)), output="tile"), CubeError, r"one cell per window.*output='patch'"),
        (
            cube_of(np.ones((2, 3, 3)), output="patch", patch_size_m=40),
            CubeError,
            r"windows of 4 pixels, one every 4, and cells of 4.*larger tile=",
        ),
        (
            cube_of(np.ones((2, 9, 9)), tile=8, overlap=7),
            CubeError,
            r"windows of 8 pixels, one every 1, and cells of 1 .*smaller patch_size= or overlap=",
        ),
        (
            cube_of(np.ones((2, 9, 9)), output="dense", patch_size_m=40),
            CubeError,
            r"each edge between cells that can be compared is a border",
        ),
        (cube_of(np.ones((2, 3, 3)), anchor="grid"), CubeError, r"'y' coordinates are missing.*assign_coords"),
        (on_grid(np.ones((2, 9, 9)), 0, 0)[:, :, ::2], CubeError, r"'x' coordinates 5, 25, 45, ….*\+10 m.*isel"),
        (on_grid(np.ones((2, 9, 9)), 0, 0)[:, ::-1], CubeError, r"'y' coordinates -85, -75, -65, ….*-10 m"),
        (on_grid(np.ones((2, 9, 9)), 0, 0)[:, [0, 1, 4]], CubeError, r"'y' coordinates -5, -15, -45: expected"),
    ],
)  # fmt: skip
def test_refusals_say_what_to_do(emb: xr.DataArray, error: type[AnySatError], words: str) -> None:
    with pytest.raises(error, match=words):
        emb.anysat.seam_score()


# ---------------------------------------------------------------------- a realistic scene


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> xr.DataArray:
    folder = tmp_path_factory.mktemp("scene")
    make_scene(folder, size=(96, 96), dates=6, seed=0)
    made: xr.DataArray = open_scene(folder).load().anysat.frames(2)
    return made


def measured(frames: xr.DataArray, **options: Any) -> xr.Dataset:
    options = {"frames": None, "norm": "pastis", "patch_size": 20, "anchor": "grid", **TINY, **options}
    seams: xr.Dataset = frames.anysat.embed(**options).anysat.seam_score()
    return seams


@pytest.mark.slow
@pytest.mark.parametrize(("patch_size", "tile"), [(10, 8), (20, 16), (40, 32)])
def test_local_has_no_seams(frames: xr.DataArray, patch_size: int, tile: int) -> None:
    """Pixels' tokens step where patches meet, and no more where windows do."""
    seams = measured(frames, output="local", patch_size=patch_size, tile=tile)
    assert seams["score"].item() == pytest.approx(1, abs=0.1)


@pytest.mark.slow
def test_patch_has_seams(frames: xr.DataArray) -> None:
    assert measured(frames, output="patch")["score"] > 2


@pytest.mark.slow
def test_overlap_lowers_the_score(frames: xr.DataArray) -> None:
    hard, smooth = (measured(frames, output="patch", overlap=overlap) for overlap in (0, 12))
    assert smooth["score"] < 0.5 * hard["score"]
    assert smooth["step"].max() < 0.5 * hard["step"].max()  # nor is there a seam at any other phase

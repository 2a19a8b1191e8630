"""Windows that overlap: the blend, what it may depend on, and what is computed how often."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cubes import small_cube

import xr_anysat
from xr_anysat.embedding import blocks
from xr_anysat.embedding.lattice import blend_weights
from xr_anysat.model.anysat import AnySat

pytestmark = pytest.mark.slow

OPTIONS = {
    "frames": 3, "period": "2022", "norm": "pastis", "anchor": "grid", "model": "tiny", "weights": "random",
}  # fmt: skip
GEOMETRY = [  # patch_size in meters; tile and overlap in pixels
    (10, 8, 4),
    (10, 8, 2),
    (10, 12, 9),
    (20, 8, 2),
    (20, 12, 6),
    (40, 16, 8),
]
geometry = st.sampled_from(GEOMETRY)
some = pytest.mark.parametrize(
    ("shape", "output"), [((10, 8, 4), "patch"), ((20, 8, 2), "patch"), ((20, 12, 6), "dense")]
)


def embed(cube: xr.DataArray, shape: tuple[int, int, int], **options: Any) -> xr.DataArray:
    patch_size, tile, overlap = shape
    return cube.anysat.embed(**OPTIONS, patch_size=patch_size, tile=tile, overlap=overlap, **options)


@pytest.mark.parametrize("shape", GEOMETRY)
def test_it_is_the_mean_of_windows_by_their_weights(shape: tuple[int, int, int]) -> None:
    """Each window embedded by itself, and summed here."""
    patch_size, tile, overlap = shape
    side, stride = patch_size // 10, tile - overlap
    height = min(2 * tile + 8, 2 * (tile - stride) + 5 * side + stride)
    width = height + 4
    cube = small_cube(height=height, width=width)
    got = embed(cube, shape)
    rows, cols = (-int(cube.y[0] + 5) // 10, int(cube.x[0] - 5) // 10)
    first_row, first_col = (-n // stride * -stride for n in (rows, cols))  # of the first whole windows
    total, weights = np.zeros(got.shape), np.zeros(got.shape[1:])
    one = np.array(blend_weights(tile // side, overlap // side))
    for top, left in product(
        range(first_row - rows, height - tile + 1, stride), range(first_col - cols, width - tile + 1, stride)
    ):
        window = cube.isel(y=slice(top, top + tile), x=slice(left, left + tile))
        alone = window.anysat.embed(**{**OPTIONS, "anchor": "cube"}, patch_size=patch_size, tile=tile)
        at = np.s_[
            (top + rows) // side - rows // side : (top + rows + tile) // side - rows // side,
            (left + cols) // side - cols // side : (left + cols + tile) // side - cols // side,
        ]
        total[:, *at] += alone.values * one[:, None] * one
        weights[at] += one[:, None] * one
    whole = np.isclose(weights, 1)  # where no window is cut by the end of the cube
    assert whole.sum() > 20
    assert not np.isnan(total[:, whole]).all()
    np.testing.assert_allclose(got.values[:, whole], total[:, whole], rtol=0, atol=2e-5)


@settings(max_examples=5, deadline=None)
@given(data=st.data(), shape=geometry, output=st.sampled_from(["patch", "dense"]))
def test_chunks_and_blocks_change_no_bit(
    data: st.DataObject, shape: tuple[int, int, int], output: str
) -> None:
    cube = small_cube(height=data.draw(st.integers(5, 24)), width=data.draw(st.integers(5, 24)))
    want = embed(cube, shape, output=output)
    chunks = {dim: data.draw(st.integers(1, n)) for dim, n in cube.sizes.items() if dim != "band"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            blocks,
            "MIN_BLOCKS",
            blocks.OVERLAP_BLOCK_FACTOR * data.draw(st.sampled_from([1, 3, 16, 1000])),
        )
        lazy = embed(cube.chunk(chunks), shape, output=output)
        assert lazy.chunks is not None
        xr.testing.assert_equal(lazy.compute(), want)


@some
def test_place_changes_no_bit(shape: tuple[int, int, int], output: str) -> None:
    """Cells that are further from the edge of a crop than a window reaches."""
    cube, reach = small_cube(height=40, width=34), shape[1] * 10
    whole, crop = (embed(c, shape, output=output) for c in (cube, cube.isel(y=slice(7, 37), x=slice(3, 34))))
    inner = crop.sel(
        y=slice(crop.y.values[0] - reach, crop.y.values[-1] + reach),
        x=slice(crop.x.values[0] + reach, crop.x.values[-1] - reach),
    )
    assert min(inner.shape) > 1
    xr.testing.assert_equal(inner, whole.sel(y=inner.y, x=inner.x))


@some
def test_what_was_not_observed_takes_no_part(shape: tuple[int, int, int], output: str) -> None:
    cube = small_cube(height=40, width=44)
    missing = xr.where((cube.x < cube.x[21]), 0, cube).astype(cube.dtype).transpose(*cube.dims)
    missing = missing.odc.assign_crs(cube.odc.crs)
    got = embed(missing, shape, output=output)
    plain = embed(missing, (*shape[:2], 0), output=output)
    assert np.isnan(got.values).any()
    np.testing.assert_array_equal(np.isnan(got.values), np.isnan(plain.values))
    crop = embed(cube.isel(x=slice(21, None)), shape, output=output)
    np.testing.assert_allclose(
        got.sel(x=crop.x[1:]).values, crop.isel(x=slice(1, None)).values, rtol=0, atol=1e-5
    )


def test_dense_is_the_blend_and_the_pixels_own() -> None:
    cube, shape = small_cube(height=30, width=26), (20, 12, 6)
    dense, patch = (embed(cube, shape, output=output) for output in ("dense", "patch"))
    local = cube.anysat.embed(**OPTIONS, patch_size=20, tile=12, output="local")
    d = local.sizes["D"]
    np.testing.assert_allclose(dense.values[d:], local.values, rtol=0, atol=1e-5)
    spread = patch.sel(y=dense.y, x=dense.x, method="nearest").values
    there = ~np.isnan(local.values[0])
    np.testing.assert_array_equal(dense.values[:d, there], spread[:, there])
    assert np.isnan(dense.values[:, ~there]).all()


def test_pixels_and_patches_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In all blocks together; a window once in each block that it meets."""
    cube = small_cube(height=96, width=96, gaps=0).chunk(time=2, y=33, x=50)
    seen = {"pixels": 0, "windows": 0}
    tokens, windows = AnySat.tokens, AnySat.windows

    def count_tokens(self: AnySat, x: Any, *args: Any, **options: Any) -> Any:
        seen["pixels"] += len(x) * x.shape[-2] * x.shape[-1]
        return tokens(self, x, *args, **options)

    def count_windows(self: AnySat, x: Any, *args: Any, **options: Any) -> Any:
        seen["windows"] += len(x)
        return windows(self, x, *args, **options)

    monkeypatch.setattr(AnySat, "tokens", count_tokens)
    monkeypatch.setattr(AnySat, "windows", count_windows)
    emb = cube.anysat.embed(**{**OPTIONS, "anchor": "cube"}, tile=8, overlap=4)
    assert [len(c) for c in emb.chunks] == [1, 4, 4]
    emb.compute()
    assert seen == {"pixels": 96 * 96, "windows": (4 * 7) ** 2}  # 25 strides of 4 pixels, and 3 more


def test_nothing_is_computed_before_it_is_asked_for() -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("something was computed while the graph was built")

    cube = small_cube(height=40, width=40).chunk(time=1, y=20)
    with dask.config.set(scheduler=refuse):
        emb = embed(cube, (10, 8, 4))
        cube.anysat.plan(**OPTIONS, tile=8, overlap=4)
    assert emb.chunks is not None


def test_it_is_recorded_and_made_again() -> None:
    cube = small_cube(height=20, width=20)
    emb = embed(cube, (10, 8, 4))
    assert emb.attrs["overlap"] == 4
    again = xr_anysat.embed(cube, **json.loads(emb.attrs["config"]))
    xr.testing.assert_identical(again, emb)
    assert cube.anysat.embed(**OPTIONS).attrs["overlap"] == 0


def test_a_store_of_it_is_written_and_gone_on_with(tmp_path: Path) -> None:
    cube = small_cube(height=40, width=44)
    want, store = embed(cube, (20, 8, 4)), tmp_path / "area.zarr"
    lazy = embed(cube.chunk(time=2, y=17, x=44), (20, 8, 4))
    lazy.anysat.to_zarr(store)
    chunk = next(p for p in sorted(store.glob("*/c/**/*")) if p.is_file())
    chunk.unlink()
    embed(cube.chunk(time=2, y=17, x=44), (20, 8, 4)).anysat.to_zarr(store, resume=True)
    np.testing.assert_array_equal(xr_anysat.open(store).values, want.values)


def test_lazy_statistics_go_with_it() -> None:
    cube = small_cube(height=40, width=44)
    options = {**OPTIONS, "norm": "per_tile_zscore", "tile": 8, "overlap": 4}
    want = cube.anysat.embed(**options)
    got = cube.chunk(time=1, y=15).anysat.embed(**options)
    np.testing.assert_allclose(got.values, want.values, rtol=0, atol=1e-5)


def test_nothing_observed_is_nan() -> None:
    cube = xr.zeros_like(small_cube(height=20, width=20))
    with pytest.warns(xr_anysat.AnySatWarning, match="nothing valid in this cube"):
        assert np.isnan(embed(cube, (10, 8, 4)).values).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"overlap": -4}, r"overlap=-4: expected a whole number of pixels, 0 or more"),
        ({"overlap": True}, r"overlap=True: expected a whole number of pixels"),
        ({"overlap": 2.5}, r"overlap=2.5: expected a whole number of pixels"),
        ({"overlap": "half"}, r"overlap='half': expected a whole number of pixels"),
        (
            {"overlap": 3, "patch_size": 20},
            r"overlap=3 pixels: expected a multiple of the patch side, 2 pixels, up to 6 \(tile=8 less a patch\); "
            r"half a window is overlap=4",
        ),
        ({"overlap": 8}, r"overlap=8 pixels: expected a multiple of the patch side, 1 pixels, up to 7"),
        ({"overlap": 4, "output": "tile"}, r"overlap=4 with output='tile': only patches are blended"),
        ({"overlap": 4, "output": "local"}, r"overlap=4 with output='local': only patches are blended"),
        ({"overlap": 4, "resize": 16}, r"overlap=4 with resize=16: the whole cube is one window"),
        (
            {"overlap": 4, "norm": "per_window_zscore"},
            r"overlap=4 with norm='per_window_zscore': a pixel would",
        ),
    ],
)
def test_what_cannot_overlap(options: dict[str, Any], match: str) -> None:
    with pytest.raises(xr_anysat.OptionError, match=match):
        small_cube(height=20, width=20).anysat.embed(**{**OPTIONS, "anchor": "auto", "tile": 8, **options})


def test_a_module_object_cannot_overlap() -> None:
    module = xr_anysat.load_model("tiny", weights="random", device="cpu")
    with pytest.raises(xr_anysat.OptionError, match="overlap=4 with a module object as model: its stages"):
        small_cube(height=20, width=20).anysat.embed(3, tile=8, overlap=4, model=module)

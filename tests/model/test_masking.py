"""Promise 4 at the model: what is invalid is left out exactly, whatever it holds."""

from __future__ import annotations

import math

import pytest
import torch
from support.weights_files import formula_model

from xr_anysat.model.anysat import AnySat
from xr_anysat.model.transformer import distance_buckets, position_code

T, SIDE = 6, 12
DOY = torch.tensor([10, 60, 130, 200, 270, 340])
CLOSE = {"rtol": 0, "atol": 2e-5}


@pytest.fixture(scope="module")
def model() -> AnySat:
    return formula_model("tiny")


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def normal(rng: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=rng)


def chance(rng: torch.Generator, share: float, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=rng) < share


def spoil(x: torch.Tensor, invalid: torch.Tensor, kind: str, rng: torch.Generator) -> torch.Tensor:
    """`x` with something else where it is invalid."""
    other = {"nan": torch.full_like(x, math.nan), "inf": torch.full_like(x, math.inf)}.get(kind)
    return torch.where(invalid, 1e6 * normal(rng, *x.shape) if other is None else other, x)


@pytest.mark.parametrize("kind", ["nan", "inf", "huge"])
def test_pixel_with_invalid_dates_equals_its_valid_dates_alone(
    model: AnySat, rng: torch.Generator, kind: str
) -> None:
    x, valid = normal(rng, 40, T, 10), chance(rng, 0.6, 40, T)
    valid[0], valid[1] = True, False
    spoilt = spoil(x, ~valid[..., None].expand_as(x), kind, rng)
    with torch.inference_mode():
        got = model.pixels(spoilt, DOY, valid)
        for n in range(40):
            there = valid[n]
            if not there.any():
                assert (got[n] == 0).all()
                continue
            alone = model.pixels(x[n : n + 1, there], DOY[there])
            torch.testing.assert_close(got[n : n + 1], alone, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["tiny", "small"])
def test_dates_of_each_pixel_may_differ(size: str, rng: torch.Generator) -> None:
    m = formula_model(size)
    x, valid = normal(rng, 8, T, 10), chance(rng, 0.7, 8, T)
    doy = torch.randint(0, 365, (8, T), generator=rng)
    with torch.inference_mode():
        got = m.pixels(x, doy, valid)
        for n in range(8):
            there = valid[n]
            if there.any():
                alone = m.pixels(x[n : n + 1, there], doy[n, there])
                torch.testing.assert_close(got[n : n + 1], alone, **CLOSE)


@pytest.mark.parametrize("kind", ["nan", "huge"])
def test_patch_leaves_invalid_pixels_out(model: AnySat, rng: torch.Generator, kind: str) -> None:
    x, valid = normal(rng, 30, 9, model.dim), chance(rng, 0.5, 30, 9)
    valid[0], valid[1] = True, False
    with torch.inference_mode():
        clean = model.patches(torch.where(valid[..., None], x, 0), valid, local=True)
        spoilt = spoil(x, ~valid[..., None].expand_as(x), kind, rng)
        patch, local = model.patches(spoilt, valid, local=True)
        torch.testing.assert_close(patch, clean[0], **CLOSE)
        torch.testing.assert_close(local[valid], clean[1][valid], **CLOSE)
        assert (patch[1] == 0).all()
        # removing the tokens by hand, at the places they have, is what leaving out means
        n, there = 2, valid[2]
        block_in = torch.cat([model.spatial_encoder.cls_token[0], x[n] + code_of_pixels(3, model.dim)])
        keep = torch.cat([torch.tensor([True]), there])
        h, buckets = block_in[keep][None], distance_buckets(3, 3, x.device)[keep][:, keep]
        for block in model.spatial_encoder.predictor_blocks:
            h = block(h, slice(None), buckets)
        h = model.spatial_encoder.predictor_norm(h)[0]
        torch.testing.assert_close(patch[n], h[0], **CLOSE)
        torch.testing.assert_close(local[n][there], h[1:], **CLOSE)


def code_of_pixels(side: int, dim: int) -> torch.Tensor:
    return position_code(torch.arange(side) * 10.0, torch.arange(side) * 10.0, dim)


@pytest.mark.parametrize("kind", ["nan", "huge"])
def test_window_leaves_invalid_patches_out(model: AnySat, rng: torch.Generator, kind: str) -> None:
    x, valid = normal(rng, 3, 5, 5, model.dim), chance(rng, 0.6, 3, 5, 5)
    valid[0] = True
    with torch.inference_mode():
        want_tile, want = model.windows(torch.where(valid[..., None], x, 0), 2, valid)
        spoilt = spoil(x, ~valid[..., None].expand_as(x), kind, rng)
        tile, patch = model.windows(spoilt, 2, valid)
        torch.testing.assert_close(tile, want_tile, **CLOSE)
        torch.testing.assert_close(patch[valid], want[valid], **CLOSE)
        full_tile, full = model.windows(x[:1], 2)
        torch.testing.assert_close(tile[:1], full_tile, **CLOSE)
        torch.testing.assert_close(patch[:1], full, **CLOSE)


@pytest.mark.parametrize("shape", [(1, 2), (2, 2), (1, 4)])
def test_a_tiny_window_leaves_invalid_patches_out(
    model: AnySat, rng: torch.Generator, shape: tuple[int, int]
) -> None:
    """Of so few tokens that sums of products would be an attention of their own, which once took a mask for a bias."""
    x, valid = normal(rng, 1, *shape, model.dim), torch.ones(1, *shape, dtype=torch.bool)
    valid[:, -1, -1] = False
    with torch.inference_mode():
        tile, patch = model.windows(x, 1, valid)
        if shape[0] == 1:
            part_tile, part = model.windows(x[:, :, :-1], 1)
            torch.testing.assert_close(patch[:, :, :-1], part, **CLOSE)
            torch.testing.assert_close(tile, part_tile, **CLOSE)
        other, _ = model.windows(torch.where(valid[..., None], x, 100.0), 1, valid)
        torch.testing.assert_close(tile, other, rtol=0, atol=0)


def test_part_of_a_window_equals_the_window_with_the_rest_invalid(
    model: AnySat, rng: torch.Generator
) -> None:
    x = normal(rng, 2, 6, 6, model.dim)
    valid = torch.zeros(2, 6, 6, dtype=torch.bool)
    valid[:, 2:5, 1:] = True
    with torch.inference_mode():
        tile, patch = model.windows(x, 4, valid)
        part_tile, part = model.windows(x[:, 2:5, 1:], 4, None, origin=(2, 1))
    torch.testing.assert_close(part_tile, tile, **CLOSE)
    torch.testing.assert_close(part, patch[:, 2:5, 1:], **CLOSE)


@pytest.mark.parametrize("output", ["patch", "tile", "dense", "local", "all"])
def test_nan_never_leaks_and_marks_what_was_not_seen(
    model: AnySat, rng: torch.Generator, output: str
) -> None:
    side = 3
    x, valid = normal(rng, 2, T, 10, SIDE, SIDE), chance(rng, 0.5, 2, T, SIDE, SIDE)
    valid[:, :, 3:6, 6:9] = False  # a patch
    valid[:, :, 0, 0] = False  # a pixel of a patch
    spoilt = spoil(x, ~valid[:, :, None].expand_as(x), "nan", rng)
    with torch.inference_mode():
        got = model.encode(spoilt, DOY, valid, side=side, output=output)
        want = model.encode(torch.where(valid[:, :, None], x, 0), DOY, valid, side=side, output=output)
    torch.testing.assert_close(got, want, equal_nan=True, **CLOSE)
    seen = valid.any(1)
    patches = seen.unfold(1, side, side).unfold(2, side, side).flatten(3).any(-1)
    expected = {
        "patch": ~patches,
        "tile": torch.zeros(2, dtype=torch.bool),
        "dense": ~seen,
        "local": ~seen,
        "all": torch.cat([torch.zeros(2, 1, dtype=torch.bool), ~patches.flatten(1)], 1),
    }[output]
    assert torch.equal(got.isnan().all(-1), expected)
    assert torch.equal(got.isnan().any(-1), expected)


def test_nothing_seen_at_all_is_nan(model: AnySat) -> None:
    x = torch.full((1, T, 10, 4, 4), math.nan)
    for output in ("patch", "tile", "dense", "local", "all"):
        with torch.inference_mode():
            got = model.encode(x, DOY, torch.zeros(1, T, 4, 4, dtype=torch.bool), side=2, output=output)
        assert got.isnan().all()


def test_order_of_dates_and_a_doubled_series_change_nothing(model: AnySat, rng: torch.Generator) -> None:
    x = normal(rng, 1, T, 10, 4, 4)
    order = torch.randperm(T, generator=rng)
    with torch.inference_mode():
        want = model.encode(x, DOY, side=2)
        torch.testing.assert_close(model.encode(x[:, order], DOY[order], side=2), want, **CLOSE)
        doubled = model.encode(torch.cat([x, x], 1), torch.cat([DOY, DOY]), side=2)
        torch.testing.assert_close(doubled, want, **CLOSE)
        off_by_one = model.encode(x, DOY + 1, side=2)
    assert (off_by_one - want).abs().max() > 0.05


def test_memory_is_bounded_by_parts_that_change_nothing(
    model: AnySat, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, valid = normal(rng, 1, T, 10, 8, 8), chance(rng, 0.7, 1, T, 8, 8)
    with torch.inference_mode():
        want = model.encode(x, DOY, valid, side=2, output="dense")
        monkeypatch.setitem(__import__("xr_anysat.model.anysat", fromlist=["ROWS"]).ROWS, "cpu", 50)
        got = model.encode(x, DOY, valid, side=2, output="dense")
    torch.testing.assert_close(got, want, equal_nan=True, **CLOSE)


def test_threads_share_a_model(model: AnySat, rng: torch.Generator) -> None:
    from concurrent.futures import ThreadPoolExecutor

    xs = [normal(rng, 1, T, 10, 4, 4) for _ in range(8)]

    def run(x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return model.encode(x, DOY, side=2)

    want = [run(x) for x in xs]
    with ThreadPoolExecutor(4) as pool:
        for got, expected in zip(pool.map(run, xs), want, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ({"s2": (1, 2, 10, 4, 4)}, {}, r"inputs \['s2'\]: expected only 's2' .* and 's2_dates'"),
        (
            {"s2": (1, 2, 10, 4, 4), "s2_dates": (1, 2), "s1": (1, 2, 3, 4, 4)},
            {},
            "other sensors cannot be embedded",
        ),
        ({"s2": (2, 10, 4, 4), "s2_dates": (1, 2)}, {}, r"'s2' of shape \(2, 10, 4, 4\)"),
        ({"s2": (1, 2, 9, 4, 4), "s2_dates": (1, 2)}, {}, r"expected \(B, T, 10, H, W\)"),
        ({"s2": (1, 2, 10, 5, 4), "s2_dates": (1, 2)}, {"patch_size": 20}, "multiples of 2"),
        ({"s2": (1, 2, 10, 4, 4), "s2_dates": (1, 3)}, {}, r"'s2_dates' of shape \(1, 3\)"),
        ({"s2": (1, 2, 10, 4, 4), "s2_dates": (1, 2)}, {"patch_size": 25}, "multiple of 10"),
        ({"s2": (1, 2, 10, 4, 4), "s2_dates": (1, 2)}, {"output": "grid"}, "expected one of tile, patch"),
    ],
)
def test_bad_inputs_of_the_module(model: AnySat, inputs: dict, options: dict, message: str) -> None:
    tensors = {k: torch.zeros(s) for k, s in inputs.items()}
    with pytest.raises(ValueError, match=message):
        model(tensors, **{"patch_size": 10, **options})


def test_unknown_size() -> None:
    with pytest.raises(ValueError, match="no AnySat of size 'huge'; expected one of tiny, small, base"):
        AnySat("huge")

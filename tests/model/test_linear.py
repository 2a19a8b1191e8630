"""Matrix products in half precision on CPUs without instructions for it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from xr_anysat.model import linear

EPS = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


@pytest.fixture
def without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_onednn_packs", lambda dtype: dtype == torch.float32)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is built without oneDNN")
@pytest.mark.usefixtures("without_instructions")
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("precision", EPS)
def test_half_precision_without_instructions(precision: str, gelu: bool) -> None:
    """As near float32 as the precision allows, and each row the same bits with any others."""
    generator = torch.Generator().manual_seed(0)
    layer = linear.Linear(96, 40, 24).requires_grad_(False)
    for tensor in (layer.weight, layer.bias):
        tensor.copy_(torch.randn(tensor.shape, generator=generator) / 96**0.5)
    x = torch.randn(50, 7, 96, generator=generator)
    expected = layer(x, 1, gelu=gelu)
    # inputs, weights, biases and outputs are each rounded by at most half of EPS
    magnitude = F.linear(x.abs(), layer.weight.abs(), layer.bias.abs()).split(layer.parts, -1)[1]

    layer.pack(precision)
    got = layer(x, 1, gelu=gelu)
    assert got.dtype == linear.HALVES[precision]
    assert got.shape == (50, 7, 24)
    error = (got.float() - expected).abs()
    assert (error <= 2 * EPS[precision] * magnitude + 1e-6).all()
    assert error.max() > 0
    for rows in (slice(0, 1), slice(3, 20), slice(49, 50)):
        assert torch.equal(layer(x[rows], 1, gelu=gelu), got[rows])

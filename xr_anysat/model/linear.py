"""Matrix products, which take nearly all of the time, by the fastest implementation for the device.

A `Linear` works as torch's own until `pack` is called. Then it holds its weights in the layout of the product, for
one precision on one device, and no longer has parameters. On a CPU the product is oneDNN's, which torch includes
and torch's compiler calls in the same way; `torch.nn.functional.linear` uses MKL for float32, which leaves half of
the vector unit of an AMD processor idle (docs/speed.md). A row has the same bits whatever other rows are computed
with it and however many threads run, which MKL does not promise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xr_anysat.errors import DeviceError

MatMul = Callable[[Tensor, bool], Tensor]
"""Called with rows (..., inputs) and whether a GELU follows; returns (..., outputs)."""

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

MIN_INT8_INPUTS = 64
"""Layers with fewer inputs are not computed in 8 bits: the first has 10, the bands, and takes hardly any time."""

PACKED_ROWS = 1024
"""The number of rows that oneDNN packs weights for; results are right for any number."""


class Linear(nn.Linear):
    """A linear layer whose outputs can be computed in parts, such as queries without keys and values.

    Parameters
    ----------
    inputs : int
        Length of a row.
    parts : int
        Number of outputs of each part, in the order of the checkpoint's rows.
    """

    def __init__(self, inputs: int, *parts: int) -> None:
        super().__init__(inputs, sum(parts))
        self.parts = parts
        self._products: list[MatMul] | None = None

    def forward(self, x: Tensor, part: int = 0, *, gelu: bool = False) -> Tensor:
        """Compute one part (..., outputs) of rows (..., inputs), followed by an exact GELU if `gelu`."""
        if self._products is not None:
            return self._products[part](x, gelu)
        weight, bias = self.weight.split(self.parts)[part], self.bias.split(self.parts)[part]
        return _torch(weight, bias, x, gelu)

    def pack(self, precision: str) -> None:
        """Keep the weights only in the layout of the fastest product in `precision` on their device."""
        make = _product(precision, self.weight.device)
        parts = zip(self.weight.split(self.parts), self.bias.split(self.parts), strict=True)
        self._products = [make(weight, bias) for weight, bias in parts]
        self.weight = self.bias = None  # type: ignore[assignment]


def packed_matmul(weight: Tensor, bias: Tensor) -> MatMul:
    """Make the float32 product with a weight (outputs, inputs) and a bias (outputs,) that are now constant."""
    return _product("float32", weight.device)(weight, bias)


def _product(precision: str, device: torch.device) -> Callable[[Tensor, Tensor], MatMul]:
    """Choose the function that makes a product from a weight (outputs, inputs) and a bias (outputs,)."""
    if precision == "int8":
        if device.type != "cpu":
            raise DeviceError(
                f"precision='int8' on {device}: 8-bit products are for CPUs. Pass precision='bfloat16', or "
                "device='cpu'"
            )
        return _int8
    dtype = HALVES.get(precision, torch.float32)
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        return partial(_onednn if _onednn_packs(dtype) else _rounded, dtype)
    return lambda weight, bias: partial(_torch, weight.to(dtype), bias.to(dtype))


def _onednn_packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs weights of this dtype on this CPU; bfloat16 needs AVX-512 or the equivalent."""
    bfloat16 = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bfloat16 or dtype == torch.float32


def _torch(weight: Tensor, bias: Tensor, x: Tensor, gelu: bool) -> Tensor:
    y = F.linear(x.to(weight.dtype), weight, bias)
    return F.gelu(y) if gelu else y


def _onednn(dtype: torch.dtype, weight: Tensor, bias: Tensor) -> MatMul:
    ops: Any = torch.ops.mkldnn
    packed, bias = ops._reorder_linear_weight(weight.to(dtype).contiguous(), PACKED_ROWS), bias.to(dtype)

    def product(x: Tensor, gelu: bool) -> Tensor:
        # the last "none" is the algorithm of the GELU: the exact one
        y: Tensor = ops._linear_pointwise(x.to(dtype), packed, bias, "gelu" if gelu else "none", [], "none")
        return y

    return product


def _rounded(dtype: torch.dtype, weight: Tensor, bias: Tensor) -> MatMul:
    """Round inputs, weights and outputs to `dtype`, and compute the product itself in float32.

    For CPUs without instructions for `dtype`, on which torch's own product in `dtype` is a hundred times slower.
    """
    inner = _onednn(torch.float32, weight.to(dtype).float(), bias.to(dtype).float())
    return lambda x, gelu: inner(x.to(dtype).float(), gelu).to(dtype)


def _int8(weight: Tensor, bias: Tensor) -> MatMul:
    """Compute in 8 bits: one scale per output for weights, one per row for inputs; sums are exact."""
    if weight.shape[1] < MIN_INT8_INPUTS:
        return _onednn(torch.float32, weight, bias)
    ops: Any = torch.ops.onednn
    # without VNNI, pairs of products are summed in 16 bits, which holds codes up to 63 without overflow
    max_code = 127 if torch.cpu._is_vnni_supported() else 63
    steps = weight.abs().amax(1).clamp_min(torch.finfo().tiny) / max_code
    packed = ops.qlinear_prepack(
        (weight / steps[:, None]).round_().to(torch.int8), [PACKED_ROWS, weight.shape[1]]
    )
    zeros = torch.zeros(len(steps), dtype=torch.int32)

    def product(x: Tensor, gelu: bool) -> Tensor:
        rows = x.flatten(0, -2)
        step = rows.abs().amax(1, keepdim=True).clamp_min_(torch.finfo().tiny).div_(127)
        codes = (rows / step).add_(128.5).to(torch.uint8)  # truncation after adding a half rounds
        y = ops.qlinear_pointwise(
            codes, 1.0, 128, packed, steps, zeros, None, 1.0, 0, torch.float32, "none", [], "none"
        )
        y = torch.addcmul(bias, y, step, out=y).view(*x.shape[:-1], -1)
        return F.gelu(y) if gelu else y

    return product

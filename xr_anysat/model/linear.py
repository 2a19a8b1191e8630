"""The products of matrices that nearly all of the time goes into, by what is fastest here.

A `Linear` is torch's own until `pack` is called: then it holds its weights as the product wants them, for one
precision on one device, and has no parameters any more. On a CPU that is oneDNN, which torch has on board and
its own compiler calls the same way; `torch.nn.functional.linear` takes MKL for float32, which leaves half of the
vector unit of an AMD processor idle (docs/speed.md). The sums of a row are the same bits whatever rows go with it
and however many threads there are, which MKL does not promise.
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
"""Rows (..., inputs) to (..., outputs); whether a GELU follows."""

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

INT8_LEAST = (
    64  # inputs from which on a layer is computed in 8 bits: the first has 10, the bands, and no time in it
)
PACKED_ROWS = 1024  # rows that oneDNN is told to expect; more or fewer are right, too


class Linear(nn.Linear):
    """A linear layer whose outputs may be asked for in parts, as queries apart from keys and values.

    Parameters
    ----------
    inputs : int
        Length of a row.
    parts : int
        Outputs of each part, in the order of the checkpoint's rows.
    """

    def __init__(self, inputs: int, *parts: int) -> None:
        super().__init__(inputs, sum(parts))
        self.parts = parts
        self._products: list[MatMul] | None = None

    def forward(self, x: Tensor, part: int = 0, *, gelu: bool = False) -> Tensor:
        """Outputs (..., outputs of the part) of rows (..., inputs), with an exact GELU behind them if asked."""
        if self._products is not None:
            return self._products[part](x, gelu)
        weight, bias = self.weight.split(self.parts)[part], self.bias.split(self.parts)[part]
        return _torch(weight, bias, x, gelu)

    def pack(self, precision: str) -> None:
        """Hold the weights as the fastest product of `precision` on their device wants them, and only so."""
        make = _product(precision, self.weight.device)
        parts = zip(self.weight.split(self.parts), self.bias.split(self.parts), strict=True)
        self._products = [make(weight, bias) for weight, bias in parts]
        self.weight = self.bias = None  # type: ignore[assignment]


def packed_matmul(weight: Tensor, bias: Tensor) -> MatMul:
    """The product in float32 with a weight (outputs, inputs) and a bias (outputs,) that change no more."""
    return _product("float32", weight.device)(weight, bias)


def _product(precision: str, device: torch.device) -> Callable[[Tensor, Tensor], MatMul]:
    """Maker of the product from a weight (outputs, inputs) and a bias (outputs,)."""
    if precision == "int8":
        if device.type != "cpu":
            raise DeviceError(
                f"precision='int8' on {device}: its products are made for CPUs. Pass precision='bfloat16', or "
                "device='cpu'"
            )
        return _int8
    dtype = HALVES.get(precision, torch.float32)
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        return partial(_onednn if _onednn_packs(dtype) else _rounded, dtype)
    return lambda weight, bias: partial(_torch, weight.to(dtype), bias.to(dtype))


def _onednn_packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs weights of this type on this CPU: for bfloat16 it needs AVX-512 or its like."""
    bfloat16 = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bfloat16 or dtype == torch.float32


def _torch(weight: Tensor, bias: Tensor, x: Tensor, gelu: bool) -> Tensor:
    y = F.linear(x.to(weight.dtype), weight, bias)
    return F.gelu(y) if gelu else y


def _onednn(dtype: torch.dtype, weight: Tensor, bias: Tensor) -> MatMul:
    ops: Any = torch.ops.mkldnn
    packed, bias = ops._reorder_linear_weight(weight.to(dtype).contiguous(), PACKED_ROWS), bias.to(dtype)

    def product(x: Tensor, gelu: bool) -> Tensor:
        # "none" is the name of the exact GELU among its kinds, too
        y: Tensor = ops._linear_pointwise(x.to(dtype), packed, bias, "gelu" if gelu else "none", [], "none")
        return y

    return product


def _rounded(dtype: torch.dtype, weight: Tensor, bias: Tensor) -> MatMul:
    """The product of numbers rounded to `dtype`, summed in float32 as oneDNN sums them.

    For CPUs without instructions for `dtype`, on which torch's own product of it is a hundred times slower.
    """
    inner = _onednn(torch.float32, weight.to(dtype).float(), bias.to(dtype).float())
    return lambda x, gelu: inner(x.to(dtype).float(), gelu).to(dtype)


def _int8(weight: Tensor, bias: Tensor) -> MatMul:
    """Weights in 8 bits with a scale an output, rows with one each, found as they come; sums are exact."""
    if weight.shape[1] < INT8_LEAST:
        return _onednn(torch.float32, weight, bias)
    ops: Any = torch.ops.onednn
    # without VNNI pairs of products are summed in 16 bits, which these just fit
    most = 127 if torch.cpu._is_vnni_supported() else 63
    steps = weight.abs().amax(1).clamp_min(torch.finfo().tiny) / most
    packed = ops.qlinear_prepack(
        (weight / steps[:, None]).round_().to(torch.int8), [PACKED_ROWS, weight.shape[1]]
    )
    zeros = torch.zeros(len(steps), dtype=torch.int32)

    def product(x: Tensor, gelu: bool) -> Tensor:
        rows = x.flatten(0, -2)
        step = rows.abs().amax(1, keepdim=True).clamp_min_(torch.finfo().tiny).div_(127)
        codes = (rows / step).add_(128.5).to(torch.uint8)  # cut off, and so rounded
        y = ops.qlinear_pointwise(
            codes, 1.0, 128, packed, steps, zeros, None, 1.0, 0, torch.float32, "none", [], "none"
        )
        y = torch.addcmul(bias, y, step, out=y).view(*x.shape[:-1], -1)
        return F.gelu(y) if gelu else y

    return product

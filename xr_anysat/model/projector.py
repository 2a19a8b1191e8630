"""Projectors of the sensors: the temporal encoder of series of pixels, and the weights of the image kind."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xr_anysat.model.linear import Linear, MatMul, packed_matmul
from xr_anysat.model.spec import DATE_HEADS, KEY_DIM, ProjectorSpec
from xr_anysat.model.transformer import softmax


def date_code(doy: Tensor, dim: int, base: int) -> Tensor:
    """Sinusoidal code of the dates (..., T) in days: (..., T, dim), the code of one head, repeated for each head."""
    d = dim // DATE_HEADS
    i = torch.arange(d, device=doy.device)
    angle = doy[..., None].float() / torch.pow(float(base), 2 * (i // 2) / d)
    code = torch.where(i % 2 == 0, angle.sin(), angle.cos())
    return code.repeat(*(1,) * (code.ndim - 1), DATE_HEADS)


def group_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Normalize rows (N, C) in float32, also if they have half precision.

    Sums over contiguous channels take a quarter of the time of torch's ``group_norm``.
    """
    groups = x.float().unflatten(1, (norm.num_groups, -1))
    spread = groups - groups.mean(-1, keepdim=True)
    var = torch.linalg.vector_norm(spread, dim=-1, keepdim=True).square_() / groups.shape[-1]
    y = spread.mul_(torch.rsqrt_(var + norm.eps)).flatten(1)
    return torch.addcmul(norm.bias, y, norm.weight, out=y)


class TemporalAttention(nn.Module):
    """Attention of the temporal encoder: a constant query `Q`, and a projection of the keys."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.Q = nn.Parameter(torch.zeros(DATE_HEADS, KEY_DIM))
        self.fc1_k = nn.Linear(dim, DATE_HEADS * KEY_DIM)
        self._product: MatMul | None = None

    def pack(self) -> None:
        """Fold the query into the projection once, for the same matrix product as the packed layers."""
        self._product = packed_matmul(*self._folded())

    def _folded(self) -> tuple[Tensor, Tensor]:
        """Return Query · (W x + b) as one row of weights and a bias per head: D -> 16 instead of D -> 16·8."""
        w = self.fc1_k.weight.unflatten(0, (DATE_HEADS, KEY_DIM))  # (H, k, D)
        b = self.fc1_k.bias.unflatten(0, (DATE_HEADS, KEY_DIM))
        scale = KEY_DIM**-0.5
        return (self.Q[:, :, None] * w).sum(1) * scale, (self.Q * b).sum(1) * scale

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Average x (N, T, D) over its valid dates (N, T), each of the 16 heads with its own weights: (N, D)."""
        score = self._product(x, False) if self._product else F.linear(x, *self._folded())
        if valid is not None:
            score = score.masked_fill(~valid[..., None], -math.inf)
        weight = softmax(score.float(), 1)  # (N, T, H)
        return (weight[..., None] * x.unflatten(-1, (DATE_HEADS, -1))).sum(1).flatten(1)


class TemporalEncoder(nn.Module):
    """The lightweight temporal attention encoder (L-TAE): series of pixels (N, T, C) to tokens (N, D)."""

    def __init__(self, sensor: ProjectorSpec, dim: int) -> None:
        super().__init__()
        self.date_base = sensor.date_base
        widths = [sensor.channels, dim // 8, dim // 2, dim, 2 * dim, dim]
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            # The identity takes the place of upstream's dropout, so that layers have the numbers of the checkpoint.
            layers += [Linear(a, b), nn.GroupNorm(4, b), nn.ReLU(), nn.Identity()]
        self.inconv = nn.Sequential(*layers)
        self.attention_heads = TemporalAttention(dim)
        self.in_norm = nn.GroupNorm(DATE_HEADS, dim) if sensor.normed_values else None
        self.out_norm = nn.GroupNorm(DATE_HEADS, dim)
        self.mlp = nn.Sequential(Linear(dim, dim), nn.GroupNorm(4, dim), nn.ReLU())

    def forward(self, x: Tensor, doy: Tensor, valid: Tensor | None) -> Tensor:
        """Return tokens (N, D) of the series x (N, T, C) at doy (N or 1, T), each with at least one valid date."""
        n, t, _ = x.shape
        rows = x.flatten(0, 1) if valid is None else x[valid]  # each date independently: (R, C)
        rows = self._rows(rows, self.inconv)
        if valid is None:
            h = rows.view(n, t, -1)
        else:  # invalid dates are not computed, and are zeros here
            h = rows.new_zeros(n, t, rows.shape[-1])
            h[valid] = rows
        h = self._norm_dates(h, valid, date_code(doy, h.shape[-1], self.date_base))
        h = self.attention_heads(h, valid)
        return group_norm(self._rows(h, self.mlp), self.out_norm)

    @staticmethod
    def _rows(x: Tensor, layers: nn.Sequential) -> Tensor:
        for layer in layers:
            if isinstance(layer, nn.GroupNorm):
                x = group_norm(x, layer)
            else:
                x = x.relu_() if isinstance(layer, nn.ReLU) else layer(x)
        return x

    def _norm_dates(self, x: Tensor, valid: Tensor | None, code: Tensor) -> Tensor:
        """Normalize x (N, T, D) over the channels of a group and the valid dates, and add the code of the dates."""
        norm = self.in_norm
        if norm is None:
            return x + code
        groups = x.unflatten(-1, (norm.num_groups, -1))  # (N, T, G, D/G)
        there = x.shape[1] if valid is None else valid.sum(1)[:, None]
        count = there * groups.shape[-1]
        mean = groups.sum(-1).sum(1) / count  # invalid dates are zero: (N, G)
        spread = groups - mean[:, None, :, None]
        if valid is not None:
            spread.masked_fill_(~valid[:, :, None, None], 0.0)
        var = spread.square().sum(-1).sum(1) / count
        y = spread.mul_(torch.rsqrt(var + norm.eps)[:, None, :, None]).flatten(2)
        return torch.addcmul(norm.bias + code, y, norm.weight, out=y)


class SeriesProjector(nn.Module):
    """Projector of a sensor with dates."""

    def __init__(self, sensor: ProjectorSpec, dim: int) -> None:
        super().__init__()
        self.patch_embed = TemporalEncoder(sensor, dim)
        # Upstream fills masked dates with it. Here they are left out; the parameter is only in the checkpoint.
        self.pad_parameter = nn.Parameter(torch.zeros(()))


class ImageProjector(nn.Module):
    """Projector of a sensor with one image."""

    def __init__(self, sensor: ProjectorSpec, dim: int) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(sensor.channels, dim, sensor.kernel, sensor.kernel, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.LayerNorm(2 * dim), nn.ReLU(),
            nn.Linear(2 * dim, dim), nn.LayerNorm(dim), nn.ReLU(),
        )  # fmt: skip

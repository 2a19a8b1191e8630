"""Transformer blocks of the spatial encoder and of the windows, with masks for invalid tokens.

Attention leaves out invalid keys, so that the result is that of the valid tokens alone.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xr_anysat.model.linear import Linear, MatMul, packed_matmul
from xr_anysat.model.spec import BUCKETS, Size
from xr_anysat.shared.sensor import S2

MAX_KEYS_ELEMENTWISE = 5  # most keys for which attention is computed by elementwise products and sums


def sincos(positions: Tensor, dim: int) -> Tensor:
    """Sine half, then cosine half, of `positions` (M,) at dim/2 frequencies 10000^(-2i/dim): (M, dim)."""
    omega = 10000.0 ** -(torch.arange(dim // 2, device=positions.device) / (dim / 2))
    angle = positions[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def position_code(rows: Tensor, cols: Tensor, dim: int) -> Tensor:
    """2-D position code (R·K, dim), row-major: the first half of the channels encodes x, the second y."""
    y, x = torch.meshgrid(rows, cols, indexing="ij")
    return torch.cat([sincos(x.reshape(-1), dim // 2), sincos(y.reshape(-1), dim // 2)], dim=1)


def distance_buckets(height: int, width: int, device: torch.device, rows: slice = slice(None)) -> Tensor:
    """Bucket of the pairs of tokens [cls, height·width cells], for the relative bias: (len(rows), 1+N) int64.

    Euclidean distances in cells are rounded to whole cells and binned by the piecewise index of
    iRPE (arXiv 2107.14222, eq. 18, with alpha 1.9, beta 3.8, gamma 15.2): 0 -> 3, 1 -> 4, 2 and
    3 -> 5, 4 and more -> 6. A pair with the cls token is 7.
    """
    n = height * width
    start, stop, _ = rows.indices(1 + n)
    here = torch.arange(start, stop, device=device)[:, None] - 1  # -1: cls
    there = torch.arange(n, device=device)
    squared = (here // width - there // width).square() + (here % width - there % width).square()
    # rounded distances are 0 below 1, 1 up to 2, and 2 or 3 up to 12, whose roots are 1.41 and 3.46
    buckets = torch.full_like(squared, 6)
    for most, bucket in ((12, 5), (2, 4), (0, 3)):
        buckets.masked_fill_(squared <= most, bucket)
    return F.pad(buckets.masked_fill_(here < 0, 7), (1, 0), value=7)


class RelativePosition(nn.Module):
    """The table of the contextual relative position bias.

    Upstream gathers the bias with an index that has only one head, so the query of head 0 defines one
    bias that all heads share. The weights were trained with this function, so it is kept.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.lookup_table_weight = nn.Parameter(torch.zeros(1, head_dim, BUCKETS))
        self._product: MatMul | None = None

    def pack(self) -> None:
        """Use the same matrix product for the table as the packed layers."""
        table = self.lookup_table_weight[0].T
        self._product = packed_matmul(table, table.new_zeros(BUCKETS))

    def forward(self, query: Tensor, buckets: Tensor) -> Tensor:
        """Bias (..., M, N) of the queries (..., M, d) of head 0, for buckets (M, N)."""
        found = self._product
        lookup = found(query, False) if found else query @ self.lookup_table_weight[0]  # (..., M, 8)
        return lookup.gather(-1, buckets.expand(*query.shape[:-2], *buckets.shape))


class Mlp(nn.Module):
    """Two layers with a GELU, D -> 4 D -> D."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, 4 * dim)
        self.fc2 = Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map each token (..., D) to (..., D)."""
        return self.fc2(self.fc1(x, gelu=True))


def softmax(x: Tensor, dim: int) -> Tensor:
    """Softmax along a dimension that is not the last; the rounding of torch's own depends on the number of threads."""
    e = (x - x.amax(dim, keepdim=True)).exp()
    return e / e.sum(dim, keepdim=True)


def _by_sums(queries: int, keys: int) -> bool:
    """Whether attention is computed by elementwise products and sums instead of products of tiny matrices.

    For few keys this is faster. For a single query it is as fast, and torch would divide the keys between threads, so
    that the result would depend on the number of threads in the last bits.
    """
    return queries == 1 or keys <= MAX_KEYS_ELEMENTWISE


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None) -> Tensor:
    """Multi-head attention of (B, M, D) queries over (B, N, D) keys.

    `bias` is added before the softmax. A boolean `bias` says which keys are valid.
    """
    q, k, v = (t.unflatten(-1, (heads, -1)) for t in (q, k, v))  # (B, ·, H, d)
    if _by_sums(q.shape[1], k.shape[1]):
        q, k, v = q.float(), k.float(), v.float()
        score = (q[:, :, None] * k[:, None]).sum(-1) * q.shape[-1] ** -0.5  # (B, M, N, H)
        if bias is not None:
            bias = bias.permute(0, 2, 3, 1)
            score = score.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else score + bias
        weight = softmax(score, 2)
        return (weight[..., None] * v[:, None]).sum(2).flatten(2)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, ·, d)
    bias = bias if bias is None or bias.dtype == torch.bool else bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Attention of a block. `relative` adds the contextual bias of the spatial encoder."""

    def __init__(self, dim: int, heads: int, *, relative: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(dim, dim, 2 * dim)  # queries; keys and values
        self.proj = Linear(dim, dim)
        if relative:
            self.rpe_k = RelativePosition(dim // heads)

    def forward(
        self, x: Tensor, rows: slice, buckets: Tensor | None, keys: Tensor | None, *, same_cls: bool = False
    ) -> Tensor:
        """Attend from the tokens `rows` of x (B, N, D) to its valid tokens: (B, len(rows), D).

        `keys` (B, N) bool is the validity of the tokens; None: all are valid. With `same_cls`, the first token is
        the same in all B, and is projected once.
        """
        dim = x.shape[-1]
        q = self._project(x[:, rows], 0, same_cls)  # other queries are not needed
        k, v = self._project(x, 1, same_cls).chunk(2, dim=-1)
        bias = None if keys is None else keys[:, None, None]  # (B, 1, 1, N)
        if buckets is not None:
            head0 = q[..., : dim // self.heads].float() * (dim // self.heads) ** -0.5
            bias = self.rpe_k(head0, buckets[rows])[:, None]  # (B, 1, M, N)
            if keys is not None:
                bias = bias.masked_fill(~keys[:, None, None], -math.inf)
        return self.proj(attend(q, k, v, self.heads, bias))

    def _project(self, x: Tensor, part: int, same_cls: bool) -> Tensor:
        if not same_cls:
            return self.qkv(x, part)
        cls = self.qkv(x[:1, :1], part).expand(len(x), -1, -1)
        return torch.cat([cls, self.qkv(x[:, 1:], part)], dim=1)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, *, eps: float, relative: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = SelfAttention(dim, heads, relative=relative)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim)

    def forward(
        self,
        x: Tensor,
        rows: slice = slice(None),
        buckets: Tensor | None = None,
        keys: Tensor | None = None,
        *,
        same_cls: bool = False,
    ) -> Tensor:
        """Return the tokens `rows` of x (B, N, D) after the block."""
        x = x[:, rows] + self.attn(self.norm1(x), rows, buckets, keys, same_cls=same_cls)
        return x + self.mlp(self.norm2(x))


class CrossAttention(nn.Module):
    """Attention of learned queries to the tokens: one query for the window and one per patch."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wk = Linear(dim, dim)
        self.wv = Linear(dim, dim)
        self.q_learned = nn.Parameter(torch.zeros(1, 1, dim))
        self.rpe_k = RelativePosition(dim // heads)
        self.proj = Linear(dim, dim)

    def queries(self, code: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Return the queries (1, N, D) and their bias (1, 1, N, N) for windows of height × width patches.

        They depend on the position codes (N, D) but not on the tokens, so all windows of one shape share them.
        """
        q = self.q_learned + code
        # Unlike in the spatial encoder, upstream's query is not scaled here.
        head0, bias = q[0, :, : q.shape[-1] // self.heads], q.new_empty(len(code), len(code))
        for part in parts_of(
            len(code), len(code) // 16 or 1
        ):  # the buckets of all pairs would need much memory
            buckets = distance_buckets(height, width, code.device, part)
            bias[part] = self.rpe_k(head0[part], buckets)
        return q, bias[None, None]

    def forward(self, x: Tensor, q: Tensor, bias: Tensor, keys: Tensor | None) -> Tensor:
        """Attend from the `queries` to the valid tokens of x (B, N, D): (B, N, D)."""
        if keys is not None:
            bias = bias.masked_fill(~keys[:, None, None], -math.inf)
        k = self.wk(x)
        return self.proj(attend(q.to(k.dtype).expand_as(k), k, self.wv(x), self.heads, bias))


class CrossBlock(nn.Module):
    """The last block: cross-attention, then an MLP."""

    def __init__(self, dim: int, heads: int, *, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = CrossAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor, q: Tensor, bias: Tensor, keys: Tensor | None) -> Tensor:
        """Return x (B, N, D) after the block. The attention has no residual connection."""
        x = self.attn(self.norm1(x), q, bias, keys).to(x.dtype)
        return x + self.mlp(self.norm2(x))


class SpatialEncoder(nn.Module):
    """Transformer over the pixels of one patch and a cls token."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.dim))
        self.predictor_blocks = nn.ModuleList(
            Block(size.dim, size.heads, eps=1e-5, relative=True) for _ in range(size.depth)
        )
        self.predictor_norm = nn.LayerNorm(size.dim, eps=1e-5)

    def forward(self, x: Tensor, valid: Tensor | None, rows: slice) -> Tensor:
        """Return the tokens `rows` of [cls, pixels] of patches x (N, s·s, D) with valid pixels (N, s·s)."""
        n, cells, dim = x.shape
        side = math.isqrt(cells)
        steps = torch.arange(side, device=x.device) * S2.pixel_size  # meters
        if valid is not None:
            x = x.masked_fill(~valid[..., None], 0.0)
        x = torch.cat([self.cls_token.expand(n, -1, -1), x + position_code(steps, steps, dim)], dim=1)
        buckets = distance_buckets(side, side, x.device)
        keys = None if valid is None else F.pad(valid, (1, 0), value=True)
        *blocks, last = self.predictor_blocks
        for i, block in enumerate(blocks):  # in the first block, the cls token is the same for all patches
            x = block(x, slice(None), buckets, keys, same_cls=i == 0)
        return self.predictor_norm(last(x, rows, buckets, keys))


def parts_of(n: int, step: int) -> list[slice]:
    """Divide n items into slices of `step` items."""
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]

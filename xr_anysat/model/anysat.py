"""AnySat, natively: one readable file, with the checkpoint's own parameter names.

The architecture and its constants follow the paper (arXiv 2412.14123) and the public code of
gastruc/AnySat at e03e72e (MIT), in eval mode and without its flash-attention branch. The parity
tests hold every output and every stage to 1e-4 of that code.

Three stages, because only the last one looks beyond a patch::

    pixels   (N, T, C)        -> (N, D)        temporal encoder, each pixel by itself
    patches  (N, s*s, D)      -> (N, D)        spatial encoder, each patch by itself
    windows  (B, P, Q, D)     -> (B, P, Q, D)  transformer over the patches of a window

Each stage takes a validity mask and *leaves out* what is invalid, from statistics and from
attention alike: the result is that of the same model run on the valid entries alone, whatever
values (NaN included) the invalid ones hold.

Shapes: B windows, N pixels or patches, T dates, C bands, D channels, s patch side in pixels,
P and Q patches down and across a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xr_anysat.errors import CubeError, OptionError
from xr_anysat.model.linear import Linear, MatMul, packed_matmul
from xr_anysat.model.spec import (
    ACCELERATOR_ROWS,
    BUCKETS,
    CPU_ROWS,
    DATE_HEADS,
    KEY_DIM,
    OUTPUTS,
    SENSORS,
    SIZES,
    ProjectorSpec,
    Size,
)
from xr_anysat.shared.sensor import S2

__all__ = ["OUTPUTS", "SENSORS", "SIZES", "AnySat"]


# Rows that go through a stage's widest layer at once, elsewhere ACCELERATOR_ROWS: bounds the memory of a window
ROWS = {"cpu": CPU_ROWS}
# Shapes of windows whose position codes and biases are kept: most are whole, those at a cube's ends are not
MAX_CACHED_SHAPES = 4
MAX_KEYS_ELEMENTWISE = 5  # up to which attention goes by sums


def sincos(positions: Tensor, dim: int) -> Tensor:
    """Sine half, then cosine half, of `positions` (M,) at dim/2 frequencies 10000^(-2i/dim): (M, dim)."""
    omega = 10000.0 ** -(torch.arange(dim // 2, device=positions.device) / (dim / 2))
    angle = positions[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def position_code(rows: Tensor, cols: Tensor, dim: int) -> Tensor:
    """2-D position code (R·K, dim), row-major: the first half of the channels encodes x, the second y."""
    y, x = torch.meshgrid(rows, cols, indexing="ij")
    return torch.cat([sincos(x.reshape(-1), dim // 2), sincos(y.reshape(-1), dim // 2)], dim=1)


def date_code(doy: Tensor, dim: int, base: int) -> Tensor:
    """Sinusoidal code of the dates (..., T) in days: (..., T, dim), one head's code for every head."""
    d = dim // DATE_HEADS
    i = torch.arange(d, device=doy.device)
    angle = doy[..., None].float() / torch.pow(float(base), 2 * (i // 2) / d)
    code = torch.where(i % 2 == 0, angle.sin(), angle.cos())
    return code.repeat(*(1,) * (code.ndim - 1), DATE_HEADS)


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

    Upstream gathers the bias with an index that has one head only, so the query of head 0 alone
    makes one bias that all heads share. That is the trained function, and it is kept.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.lookup_table_weight = nn.Parameter(torch.zeros(1, head_dim, BUCKETS))
        self._product: MatMul | None = None

    def pack(self) -> None:
        """Look up by the same product as the packed layers."""
        table = self.lookup_table_weight[0].T
        self._product = packed_matmul(table, table.new_zeros(BUCKETS))

    def forward(self, query: Tensor, buckets: Tensor) -> Tensor:
        """Bias (..., M, N) of the queries (..., M, d) of head 0, for buckets (M, N)."""
        found = self._product
        lookup = found(query, False) if found else query @ self.lookup_table_weight[0]  # (..., M, 8)
        return lookup.gather(-1, buckets.expand(*query.shape[:-2], *buckets.shape))


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, 4 * dim)
        self.fc2 = Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x, gelu=True))


def softmax(x: Tensor, dim: int) -> Tensor:
    """Softmax along a dimension that is not the last: torch's own rounds otherwise with another number of threads."""
    e = (x - x.amax(dim, keepdim=True)).exp()
    return e / e.sum(dim, keepdim=True)


def _by_sums(queries: int, keys: int) -> bool:
    """Whether attention is quicker as sums of products than as products of tiny matrices.

    A single query's is as quick, and torch would share its keys among threads: other bits would come out of another
    number of them.
    """
    return queries == 1 or keys <= MAX_KEYS_ELEMENTWISE


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None) -> Tensor:
    """Multi-head attention of (B, M, D) queries over (B, N, D) keys.

    `bias` is added before the softmax, or tells which keys take part if it is of booleans.
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
    """Attention of a block; with `relative`, with the contextual bias of the spatial encoder."""

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

        `keys` (B, N) bool is the validity of the tokens as keys; None: all are valid. `same_cls`: the first token is
        the same in all of them, and projected once.
        """
        dim = x.shape[-1]
        q = self._project(x[:, rows], 0, same_cls)  # other queries would be thrown away
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
        """The tokens `rows` of x (B, N, D) after the block."""
        x = x[:, rows] + self.attn(self.norm1(x), rows, buckets, keys, same_cls=same_cls)
        return x + self.mlp(self.norm2(x))


class CrossAttention(nn.Module):
    """Learned queries over the tokens: one query for the window and one for every patch."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wk = Linear(dim, dim)
        self.wv = Linear(dim, dim)
        self.q_learned = nn.Parameter(torch.zeros(1, 1, dim))
        self.rpe_k = RelativePosition(dim // heads)
        self.proj = Linear(dim, dim)

    def queries(self, code: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        """What is the same for every window of height × width patches with the position codes (N, D).

        The queries (1, N, D), which are no projection of the tokens, and their bias (1, 1, N, N).
        """
        q = self.q_learned + code
        # Unlike in the spatial encoder, upstream's query is not scaled here.
        head0, bias = q[0, :, : q.shape[-1] // self.heads], q.new_empty(len(code), len(code))
        for part in parts_of(len(code), len(code) // 16 or 1):  # the buckets of all pairs are large
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
    def __init__(self, dim: int, heads: int, *, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = CrossAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor, q: Tensor, bias: Tensor, keys: Tensor | None) -> Tensor:
        """X (B, N, D) after the block; there is no residual around the attention."""
        x = self.attn(self.norm1(x), q, bias, keys).to(x.dtype)
        return x + self.mlp(self.norm2(x))


def group_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Normalize rows (N, C), in float32 also where the rows are shorter.

    By sums over contiguous channels, which take a quarter of the time of torch's ``group_norm``.
    """
    groups = x.float().unflatten(1, (norm.num_groups, -1))
    spread = groups - groups.mean(-1, keepdim=True)
    var = torch.linalg.vector_norm(spread, dim=-1, keepdim=True).square_() / groups.shape[-1]
    y = spread.mul_(torch.rsqrt_(var + norm.eps)).flatten(1)
    return torch.addcmul(norm.bias, y, norm.weight, out=y)


class TemporalAttention(nn.Module):
    """The constant query `Q` and the keys' projection of the temporal encoder."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.Q = nn.Parameter(torch.zeros(DATE_HEADS, KEY_DIM))
        self.fc1_k = nn.Linear(dim, DATE_HEADS * KEY_DIM)
        self._product: MatMul | None = None

    def pack(self) -> None:
        """Fold the query into the keys once, for the same product as the packed layers."""
        self._product = packed_matmul(*self._folded())

    def _folded(self) -> tuple[Tensor, Tensor]:
        """Query · (W x + b) of a constant query as one row a head: only D -> 16, not D -> 16·8."""
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
    """The L-TAE: (N, T, C) series of pixels to (N, D) tokens."""

    def __init__(self, sensor: ProjectorSpec, dim: int) -> None:
        super().__init__()
        self.date_base = sensor.date_base
        widths = [sensor.channels, dim // 8, dim // 2, dim, 2 * dim, dim]
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            # The fourth stands where upstream's dropout does, for the checkpoint's layer numbers.
            layers += [Linear(a, b), nn.GroupNorm(4, b), nn.ReLU(), nn.Identity()]
        self.inconv = nn.Sequential(*layers)
        self.attention_heads = TemporalAttention(dim)
        self.in_norm = nn.GroupNorm(DATE_HEADS, dim) if sensor.normed_values else None
        self.out_norm = nn.GroupNorm(DATE_HEADS, dim)
        self.mlp = nn.Sequential(Linear(dim, dim), nn.GroupNorm(4, dim), nn.ReLU())

    def forward(self, x: Tensor, doy: Tensor, valid: Tensor | None) -> Tensor:
        """Tokens (N, D) of the series x (N, T, C) at doy (N or 1, T), each with a valid date."""
        n, t, _ = x.shape
        rows = x.flatten(0, 1) if valid is None else x[valid]  # each date by itself: (R, C)
        rows = self._rows(rows, self.inconv)
        if valid is None:
            h = rows.view(n, t, -1)
        else:  # invalid dates are never computed; zeros keep their places
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
        """GroupNorm of x (N, T, D) over the channels of a group and the valid dates, plus the dates' code."""
        norm = self.in_norm
        if norm is None:
            return x + code
        groups = x.unflatten(-1, (norm.num_groups, -1))  # (N, T, G, D/G)
        there = x.shape[1] if valid is None else valid.sum(1)[:, None]
        count = there * groups.shape[-1]
        mean = groups.sum(-1).sum(1) / count  # what is invalid is zero: (N, G)
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
        # Upstream fills masked dates with it. Here they are left out, so only the checkpoint needs it.
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


class SpatialEncoder(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.dim))
        self.predictor_blocks = nn.ModuleList(
            Block(size.dim, size.heads, eps=1e-5, relative=True) for _ in range(size.depth)
        )
        self.predictor_norm = nn.LayerNorm(size.dim, eps=1e-5)

    def forward(self, x: Tensor, valid: Tensor | None, rows: slice) -> Tensor:
        """The tokens `rows` of [cls, pixels] of patches x (N, s·s, D) with valid pixels (N, s·s)."""
        n, cells, dim = x.shape
        side = math.isqrt(cells)
        steps = torch.arange(side, device=x.device) * S2.pixel_size  # meters
        if valid is not None:
            x = x.masked_fill(~valid[..., None], 0.0)
        x = torch.cat([self.cls_token.expand(n, -1, -1), x + position_code(steps, steps, dim)], dim=1)
        buckets = distance_buckets(side, side, x.device)
        keys = None if valid is None else F.pad(valid, (1, 0), value=True)
        *blocks, last = self.predictor_blocks
        for i, block in enumerate(blocks):  # before the first, nothing has gone into the cls token
            x = block(x, slice(None), buckets, keys, same_cls=i == 0)
        return self.predictor_norm(last(x, rows, buckets, keys))


class AnySat(nn.Module):
    """AnySat with the parameter names of the published checkpoint; inference only.

    Called like upstream's hub module: ``m({"s2": x, "s2_dates": doy}, patch_size=10, output="patch")``.

    Parameters
    ----------
    size : {"base", "small", "tiny"}
        The model's size. Weights are published for ``"base"``.
    sensors : iterable of str
        The projectors to build, of :data:`SENSORS`. All eleven make the 418 tensors of the
        checkpoint; ``("s2",)`` is what Sentinel-2 needs.

    Examples
    --------
    >>> import torch
    >>> m = AnySat("tiny").eval()
    >>> len(m.state_dict())
    318
    >>> with torch.inference_mode():
    ...     x = {"s2": torch.zeros(1, 3, 10, 4, 4), "s2_dates": torch.tensor([[10, 100, 200]])}
    ...     m(x, patch_size=20, output="patch").shape
    torch.Size([1, 2, 2, 256])
    """

    def __init__(self, size: str = "base", sensors: Iterable[str] = tuple(SENSORS)) -> None:
        super().__init__()
        if size not in SIZES:
            raise OptionError(f"no AnySat of size {size!r}; expected one of {', '.join(SIZES)}")
        self.size = SIZES[size]
        dim, depth, heads = self.size.dim, self.size.depth, self.size.heads
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        for name in sensors:
            sensor = SENSORS[name]
            projector = SeriesProjector if sensor.series else ImageProjector
            self.add_module(f"projector_{name}", projector(sensor, dim))
        self.spatial_encoder = SpatialEncoder(self.size)
        self.blocks = nn.ModuleList(Block(dim, heads, eps=1e-6, relative=False) for _ in range(depth))
        self.blocks.append(CrossBlock(dim, heads, eps=1e-6))
        self.requires_grad_(False)
        self._shared: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]] | None = None

    @property
    def dim(self) -> int:
        """Channels of a token, D."""
        return self.size.dim

    def pack(self, precision: str) -> AnySat:
        """Make ready for a lot of windows: the weights change no more, and leave `state_dict`.

        Parameters
        ----------
        precision : {"float32", "bfloat16", "float16", "int8"}
            Of the products of matrices. Norms, softmaxes, residuals and results are float32 in any case.

        Returns
        -------
        AnySat
            This model, whose products are now those of :mod:`xr_anysat.model.linear` for the device it is on.

        Raises
        ------
        DeviceError
            If there is no such product on the device.
        """
        with torch.inference_mode():
            for layer in self.modules():
                if isinstance(layer, Linear):
                    layer.pack(precision)
                elif isinstance(layer, RelativePosition | TemporalAttention):
                    layer.pack()
        self._shared = {}
        return self

    # ------------------------------------------------------------------ the three stages

    def pixels(self, x: Tensor, doy: Tensor, valid: Tensor | None = None, sensor: str = "s2") -> Tensor:
        """Stage one, the temporal encoder: the token of every pixel.

        Parameters
        ----------
        x : Tensor, (N, T, C) float32
            Normalized series, bands in the checkpoint's order.
        doy : Tensor, (T,) or (N, T)
            Days of the year.
        valid : Tensor, (N, T) bool, optional
            Dates that were observed, pixel by pixel. The others are left out of the statistics
            and of the attention; their values are never read. None: all are valid.
        sensor : str
            A sensor with dates.

        Returns
        -------
        Tensor, (N, D) float32
            Zero where a pixel has no valid date.
        """
        encoder: TemporalEncoder = getattr(self, f"projector_{sensor}").patch_embed
        n, t, _ = x.shape
        doy = doy.expand(n, t) if doy.ndim == 2 else doy[None]
        if valid is not None:
            some = valid.any(1)
            if not some.all():
                doy = doy[some] if doy.shape[0] == n else doy
                return scatter(self.pixels(x[some], doy, valid[some], sensor), some)

        def run(part: slice) -> Tensor:
            mask = None if valid is None or valid[part].all() else valid[part]
            return encoder(x[part], doy[part] if doy.shape[0] == n else doy, mask)

        return run_chunked(run, n, t, x, self.dim)

    def patches(
        self, x: Tensor, valid: Tensor | None = None, *, local: bool = False, cls: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """Stage two, the spatial encoder: the token of every patch, and those of its pixels.

        Parameters
        ----------
        x : Tensor, (N, s·s, D)
            The pixels' tokens of each patch, row-major.
        valid : Tensor, (N, s·s) bool, optional
            Pixels that have a token; the others are left out. None: all are valid.
        local, cls : bool
            Which of the two results to compute.

        Returns
        -------
        patch : Tensor, (N, D), or None
            The patches' tokens; zero where a patch has no valid pixel.
        local : Tensor, (N, s·s, D), or None
            The pixels' own tokens within their patch; meaningless where invalid.
        """
        n, cells, dim = x.shape
        if valid is not None:
            some = valid.any(1)
            if not some.all():
                found = self.patches(x[some], valid[some], local=local, cls=cls)
                return tuple(None if part is None else scatter(part, some) for part in found)  # type: ignore[return-value]
        rows = slice(0 if cls else 1, None if local else 1)

        def run(part: slice) -> Tensor:
            mask = None if valid is None or valid[part].all() else valid[part]
            return self.spatial_encoder(x[part], mask, rows)

        tokens = run_chunked(run, n, cells + 1, x, (cls + cells * local, dim))
        return (tokens[:, 0] if cls else None), (tokens[:, int(cls) :] if local else None)

    def windows(
        self, x: Tensor, side: int, valid: Tensor | None = None, origin: tuple[int, int] = (0, 0)
    ) -> tuple[Tensor, Tensor]:
        """Stage three: the patches of each window see each other.

        Parameters
        ----------
        x : Tensor, (B, P, Q, D)
            The patches' tokens.
        side : int
            Pixels on a patch's side, s.
        valid : Tensor, (B, P, Q) bool, optional
            Patches that have a token; the others are left out. None: all are valid.
        origin : (int, int)
            Row and column, in patches, of the first patch within its window, where only a part of
            the window is handed in. Its other patches are then left out as if they were invalid.

        Returns
        -------
        tile : Tensor, (B, D)
            The windows' own tokens.
        patch : Tensor, (B, P, Q, D)
            The patches' tokens; meaningless where invalid.
        """
        b, p, q, dim = x.shape
        code, queries, bias = self._window_constants(p, q, side, origin)
        *blocks, cross = self.blocks

        def run(part: slice) -> Tensor:
            tokens, keys = x[part].flatten(1, 2), None
            if valid is not None and not valid[part].all():
                there = valid[part].flatten(1)
                tokens = tokens.masked_fill(~there[..., None], 0.0)
                keys = F.pad(there, (1, 0), value=True)
            tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1) + code
            for block in blocks:
                tokens = block(tokens, keys=keys)
            out: Tensor = cross(tokens, queries, bias, keys)
            return out

        out = run_chunked(run, b, 1 + p * q, x, (1 + p * q, dim))
        return out[:, 0], out[:, 1:].unflatten(1, (p, q))

    def _window_constants(
        self, p: int, q: int, side: int, origin: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute what all windows of one shape share: position codes, and queries and bias of the last block."""
        key = (p, q, side, *origin)
        if self._shared is not None and key in self._shared:
            return self._shared[key]
        device = self.cls_token.device
        rows = (torch.arange(p, device=device) + origin[0]) * float(side)
        cols = (torch.arange(q, device=device) + origin[1]) * float(side)
        code = F.pad(position_code(rows, cols, self.dim), (0, 0, 1, 0))  # zero for cls: (1+PQ, D)
        attention: Any = self.blocks[-1].attn
        found = (code, *attention.queries(code, p, q))
        if self._shared is not None:
            if len(self._shared) >= MAX_CACHED_SHAPES:
                self._shared.clear()
            self._shared[key] = found
        return found

    # ------------------------------------------------------------------ all of it

    def encode(
        self,
        x: Tensor,
        doy: Tensor,
        valid: Tensor | None = None,
        *,
        side: int,
        output: str = "patch",
        origin: tuple[int, int] = (0, 0),
    ) -> Tensor:
        """Embed windows (or the parts of windows that there are).

        Parameters
        ----------
        x : Tensor, (B, T, 10, H, W) float32
            Normalized Sentinel-2 windows; H and W are multiples of `side`.
        doy : Tensor, (T,) or (B, T)
            Days of the year.
        valid : Tensor, (B, T, H, W) bool, optional
            What was observed. None: everything.
        side : int
            Pixels on a patch's side.
        output : {"patch", "tile", "dense", "local", "all"}
            What to return.
        origin : (int, int)
            Place of the first patch within the window, see `windows`.

        Returns
        -------
        Tensor, float32, channels last
            ``patch`` (B, H/side, W/side, D); ``tile`` (B, D); ``dense`` (B, H, W, 2 D), the patch's
            token and then the pixel's own; ``local`` (B, H, W, D), the pixel's own alone; ``all``
            (B, 1 + patches, D), the window's token and then the patches'. NaN where nothing was
            observed.
        """
        patch, local, covered = self.tokens(
            x, doy, valid, side=side, local=output in ("dense", "local"), cls=output != "local"
        )
        if patch is None:
            assert local is not None  # output is "local"
            return local
        tile, patch = self.windows(patch, side, covered, origin)
        if covered is not None:
            tile = tile.masked_fill(~covered.flatten(1).any(1)[:, None], math.nan)
            patch = patch.masked_fill(~covered[..., None], math.nan)
        if output == "tile":
            return tile
        if output == "patch":
            return patch
        if output == "all":
            return torch.cat([tile[:, None], patch.flatten(1, 2)], dim=1)
        assert local is not None  # output is "dense"
        spread = patch.repeat_interleave(side, 1).repeat_interleave(side, 2)
        # a pixel that was never seen has no place in the map, though its patch has a token
        return torch.cat([spread.masked_fill(local[..., :1].isnan(), math.nan), local], dim=-1)

    def tokens(
        self,
        x: Tensor,
        doy: Tensor,
        valid: Tensor | None = None,
        *,
        side: int,
        local: bool = False,
        cls: bool = True,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Stages one and two, which look no further than a patch.

        Parameters
        ----------
        x, doy, valid, side
            As `encode` takes them.
        local, cls : bool
            Which of the two kinds of tokens to compute.

        Returns
        -------
        patch : Tensor, (B, H/side, W/side, D), or None
            The patches' tokens; zero where nothing was observed.
        local : Tensor, (B, H, W, D), or None
            The pixels' own tokens; NaN where nothing was observed.
        covered : Tensor, (B, H/side, W/side) bool, or None
            Patches of which something was observed. None: all of everything was.
        """
        b, t, c, height, width = x.shape
        p, q, cells = height // side, width // side, side * side
        # pixels in the order of their patches: (B, P, Q, s, s, T, C)
        x = x.reshape(b, t, c, p, side, q, side).permute(0, 3, 5, 4, 6, 1, 2).reshape(-1, t, c)
        seen = None  # pixels with a valid date, (B·P·Q, s·s)
        if valid is not None and not valid.all():
            valid = valid.reshape(b, t, p, side, q, side).permute(0, 2, 4, 3, 5, 1).reshape(-1, t)
            seen = valid.any(1).view(-1, cells)
        else:
            valid = None
        if doy.ndim == 2:
            doy = doy[:, None].expand(b, p * q * cells, t).reshape(-1, t)
        found = self.pixels(x, doy, valid).view(-1, cells, self.dim)
        patch, own = self.patches(found, seen, local=local, cls=cls)
        if own is not None:
            if seen is not None:
                own = own.masked_fill(~seen[..., None], math.nan)
            own = unpatch(own, b, p, q, side)
        covered = None if seen is None else seen.any(1).view(b, p, q)
        return (None if patch is None else patch.view(b, p, q, -1)), own, covered

    def forward(
        self,
        x: Mapping[str, Tensor],
        patch_size: int,
        output: str = "patch",
        *,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Embed as upstream's hub module does.

        Parameters
        ----------
        x : mapping
            ``"s2"``: (B, T, 10, H, W) float32, normalized; ``"s2_dates"``: (B, T) days of the year.
        patch_size : int
            Metres, a positive multiple of 10.
        output : {"patch", "tile", "dense", "local", "all"}
            What to return; see `encode`.
        valid : Tensor, (B, T, H, W) bool, optional
            What was observed (an addition to upstream's call).

        Returns
        -------
        Tensor
            See `encode`.

        Raises
        ------
        OptionError
            If `patch_size` or `output` is impossible.
        CubeError
            If a tensor is missing, of another sensor, or of the wrong shape.
        """
        if patch_size != int(patch_size) or patch_size <= 0 or patch_size % S2.pixel_size:
            raise OptionError(f"{patch_size=}: expected a positive multiple of {S2.pixel_size:g} (meters)")
        if output not in OUTPUTS:
            raise OptionError(f"{output=}: expected one of {', '.join(OUTPUTS)}")
        others = sorted(set(x) - {"s2", "s2_dates"})
        if others or not {"s2", "s2_dates"} <= set(x):
            raise CubeError(
                f"inputs {sorted(x)}: expected 's2' (B, T, 10, H, W) and 's2_dates' (B, T) and no other; "
                "only the Sentinel-2 path runs here, though the weights of all sensors are loaded"
            )
        s2, doy, side = x["s2"], x["s2_dates"], int(patch_size) // int(S2.pixel_size)
        if s2.ndim != 5 or s2.shape[2] != SENSORS["s2"].channels or s2.shape[3] % side or s2.shape[4] % side:
            raise CubeError(
                f"'s2' of shape {tuple(s2.shape)}: expected (B, T, 10, H, W) with H and W multiples of {side} "
                f"(patch_size={patch_size} m is {side} pixels)"
            )
        if doy.shape not in ((s2.shape[1],), (s2.shape[0], s2.shape[1])):
            raise CubeError(
                f"'s2_dates' of shape {tuple(doy.shape)}: expected (B, T) = {tuple(s2.shape[:2])}"
            )
        return self.encode(s2, doy, valid, side=side, output=output)


def scatter(rows: Tensor, where: Tensor) -> Tensor:
    """Rows back to the places where `where` is true, zeros elsewhere."""
    out = rows.new_zeros(where.shape[0], *rows.shape[1:])
    out[where] = rows
    return out


def unpatch(x: Tensor, b: int, p: int, q: int, side: int) -> Tensor:
    """(B·P·Q, s·s, D) tokens of pixels, patch by patch, to the image (B, P·s, Q·s, D)."""
    x = x.view(b, p, q, side, side, -1).transpose(2, 3)
    return x.reshape(b, p * side, q * side, -1)


def run_chunked(
    run: Callable[[slice], Tensor], n: int, rows_each: int, like: Tensor, shape: int | tuple[int, ...]
) -> Tensor:
    """Run a stage over `n` items, a bounded number of rows at a time."""
    limit = ROWS.get(like.device.type, ACCELERATOR_ROWS)
    step = max(1, limit // rows_each)
    if n <= step:
        return run(slice(0, n)).float() if n else like.new_zeros(0, *_tuple(shape))
    return torch.cat([run(part).float() for part in parts_of(n, step)])


def parts_of(n: int, step: int) -> list[slice]:
    """The first n items, `step` at a time."""
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


def _tuple(shape: Any) -> tuple[int, ...]:
    return shape if isinstance(shape, tuple) else (shape,)

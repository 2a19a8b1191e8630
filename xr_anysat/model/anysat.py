"""AnySat in PyTorch, with the parameter names of the published checkpoint.

The architecture and its constants follow the paper (arXiv 2412.14123) and the public code of
gastruc/AnySat at e03e72e (MIT), in eval mode and without its flash-attention branch. The parity
tests compare every output and every stage with that code, to 1e-4.

The model has three stages. Only the last one uses more than one patch::

    pixels   (N, T, C)        -> (N, D)        temporal encoder, each pixel independently (projector.py)
    patches  (N, s*s, D)      -> (N, D)        spatial encoder, each patch independently (transformer.py)
    windows  (B, P, Q, D)     -> (B, P, Q, D)  transformer over the patches of a window (transformer.py)

Each stage takes a validity mask and *leaves out* invalid entries, from statistics and from
attention. The result is that of the same model on the valid entries alone, for any
values (NaN included) of the invalid entries.

Shapes: B windows, N pixels or patches, T dates, C bands, D channels, s pixels per patch side,
P and Q patches down and across a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xr_anysat.errors import CubeError, OptionError
from xr_anysat.model.linear import Linear
from xr_anysat.model.projector import ImageProjector, SeriesProjector, TemporalAttention, TemporalEncoder
from xr_anysat.model.spec import ACCELERATOR_ROWS, CPU_ROWS, OUTPUTS, SENSORS, SIZES
from xr_anysat.model.transformer import (
    Block,
    CrossBlock,
    RelativePosition,
    SpatialEncoder,
    parts_of,
    position_code,
)
from xr_anysat.shared.sensor import S2

__all__ = ["OUTPUTS", "SENSORS", "SIZES", "AnySat"]


ROWS = {"cpu": CPU_ROWS}
"""Rows per pass of a stage, by type of device, else ACCELERATOR_ROWS: this bounds the memory of its widest layer."""

MAX_CACHED_SHAPES = 4
"""Shapes of windows whose position codes and biases are kept. Most windows are whole; those at the edges differ."""


class AnySat(nn.Module):
    """AnySat with the parameter names of the published checkpoint; inference only.

    Called like upstream's hub module: ``m({"s2": x, "s2_dates": doy}, patch_size=10, output="patch")``.

    Parameters
    ----------
    size : {"base", "small", "tiny"}
        Size of the model. Weights are published for ``"base"``.
    sensors : iterable of str
        Projectors to build, of :data:`SENSORS`. All eleven are needed for the 418 tensors of the
        checkpoint; Sentinel-2 needs only ``("s2",)``.

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
        """Number of channels of a token, D."""
        return self.size.dim

    def pack(self, precision: str) -> AnySat:
        """Prepare the weights for many windows. They no longer change, and are no longer in `state_dict`.

        Parameters
        ----------
        precision : {"float32", "bfloat16", "float16", "int8"}
            Precision of matrix products. Norms, softmaxes, residuals and results are always float32.

        Returns
        -------
        AnySat
            This model; its products are now those of :mod:`xr_anysat.model.linear` for its device.

        Raises
        ------
        DeviceError
            If the device does not support the precision.
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
        """Stage one, the temporal encoder: the token of each pixel.

        Parameters
        ----------
        x : Tensor, (N, T, C) float32
            Normalized series, bands in the checkpoint's order.
        doy : Tensor, (T,) or (N, T)
            Days of the year.
        valid : Tensor, (N, T) bool, optional
            Observed dates of each pixel. Other dates are left out of the statistics
            and of the attention, and their values are never read. None: all are valid.
        sensor : str
            A sensor with dates (``series`` in its :class:`~xr_anysat.model.spec.Sensor`).

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
        """Stage two, the spatial encoder: the token of each patch, and of its pixels within it.

        Parameters
        ----------
        x : Tensor, (N, s·s, D)
            Tokens of the pixels of each patch, row-major.
        valid : Tensor, (N, s·s) bool, optional
            Pixels with a token; others are left out. None: all are valid.
        local, cls : bool
            Whether to compute this result.

        Returns
        -------
        patch : Tensor, (N, D), or None
            Tokens of the patches; zero where a patch has no valid pixel.
        local : Tensor, (N, s·s, D), or None
            Tokens of the pixels within their patch; undefined where invalid.
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
        """Stage three: attention between the patches of each window.

        Parameters
        ----------
        x : Tensor, (B, P, Q, D)
            Tokens of the patches.
        side : int
            Pixels per patch side, s.
        valid : Tensor, (B, P, Q) bool, optional
            Patches with a token; others are left out. None: all are valid.
        origin : (int, int)
            Row and column, in patches, of the first patch within its window, if `x` is only a part of
            the window. The other patches of the window are then left out, as if they were invalid.

        Returns
        -------
        tile : Tensor, (B, D)
            Tokens of the windows.
        patch : Tensor, (B, P, Q, D)
            Tokens of the patches; undefined where invalid.
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
        """Return what all windows of one shape share: position codes, and queries and bias of the last block."""
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

    # ------------------------------------------------------------------ all stages

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
        """Embed windows, or parts of windows.

        Parameters
        ----------
        x : Tensor, (B, T, 10, H, W) float32
            Normalized Sentinel-2 windows; H and W are multiples of `side`.
        doy : Tensor, (T,) or (B, T)
            Days of the year.
        valid : Tensor, (B, T, H, W) bool, optional
            What was observed. None: all pixels on all dates.
        side : int
            Pixels per patch side.
        output : {"patch", "tile", "dense", "local", "all"}
            What to return.
        origin : (int, int)
            Position of the first patch within the window; see `windows`.

        Returns
        -------
        Tensor, float32, channels last
            ``patch`` (B, H/side, W/side, D); ``tile`` (B, D); ``dense`` (B, H, W, 2 D), the token of the
            patch followed by that of the pixel; ``local`` (B, H, W, D), only that of the pixel; ``all``
            (B, 1 + patches, D), the token of the window followed by those of the patches. NaN where nothing
            was observed.
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
        # a pixel that was never observed is NaN, although its patch has a token
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
        """Stages one and two, which use only one patch at a time.

        Parameters
        ----------
        x, doy, valid, side
            As in `encode`.
        local, cls : bool
            Whether to compute these tokens.

        Returns
        -------
        patch : Tensor, (B, H/side, W/side, D), or None
            Tokens of the patches; zero where nothing was observed.
        local : Tensor, (B, H, W, D), or None
            Tokens of the pixels; NaN where nothing was observed.
        covered : Tensor, (B, H/side, W/side) bool, or None
            Patches with any observation. None: every pixel was observed on every date.
        """
        b, t, c, height, width = x.shape
        p, q, cells = height // side, width // side, side * side
        # pixels in patch order: (B, P, Q, s, s, T, C)
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
        """Embed with the signature of upstream's hub module.

        Parameters
        ----------
        x : mapping
            ``"s2"``: (B, T, 10, H, W) float32, normalized; ``"s2_dates"``: (B, T) days of the year.
        patch_size : int
            Side of a patch in meters, a positive multiple of 10.
        output : {"patch", "tile", "dense", "local", "all"}
            What to return; see `encode`.
        valid : Tensor, (B, T, H, W) bool, optional
            What was observed. Upstream's module does not have this parameter.

        Returns
        -------
        Tensor
            See `encode`.

        Raises
        ------
        OptionError
            If `patch_size` or `output` is invalid.
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
                f"inputs {sorted(x)}: expected only 's2' (B, T, 10, H, W) and 's2_dates' (B, T); "
                "other sensors cannot be embedded, although their weights are loaded"
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
    """Place `rows` where `where` is true, and zeros elsewhere."""
    out = rows.new_zeros(where.shape[0], *rows.shape[1:])
    out[where] = rows
    return out


def unpatch(x: Tensor, b: int, p: int, q: int, side: int) -> Tensor:
    """Arrange tokens of pixels (B·P·Q, s·s, D), patch by patch, as images (B, P·s, Q·s, D)."""
    x = x.view(b, p, q, side, side, -1).transpose(2, 3)
    return x.reshape(b, p * side, q * side, -1)


def run_chunked(
    run: Callable[[slice], Tensor], n: int, rows_each: int, like: Tensor, shape: int | tuple[int, ...]
) -> Tensor:
    """Run a stage on `n` items, with a bounded number of rows per pass."""
    limit = ROWS.get(like.device.type, ACCELERATOR_ROWS)
    step = max(1, limit // rows_each)
    if n <= step:
        return run(slice(0, n)).float() if n else like.new_zeros(0, *_tuple(shape))
    return torch.cat([run(part).float() for part in parts_of(n, step)])


def _tuple(shape: Any) -> tuple[int, ...]:
    return shape if isinstance(shape, tuple) else (shape,)

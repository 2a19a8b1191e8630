"""How the blocks of an embedding cube are arranged in a Zarr store."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import xarray as xr

from xr_anysat.errors import CubeError
from xr_anysat.shared.graph import RECHUNK
from xr_anysat.shared.grid import TRANSFORM, grid_of, with_transform
from xr_anysat.store.codecs import SCALE, VALUES, dtypes

INNER_BYTES = 4 << 20
"""Bytes that an inner chunk of a shard has at most, before compression: what reading one cell costs."""

MIN_INNER_SIDE = 8
"""Cells that the side of an inner chunk has at least, so that a shard is not cut to dust."""

BLOCK_CELLS = 256
"""Cells on the side of a block, where the cube has no blocks of its own."""

CF = ("_FillValue", "missing_value", "scale_factor", "add_offset")
"""attrs that readers apply to values."""


@dataclass(frozen=True)
class Layout:
    """How blocks lie in a store; part of every task.

    Attributes
    ----------
    codec : str or None
        Of :mod:`xr_anysat.store.codecs`.
    margin : (int, int)
        Cells of the store before the cube's first, along y and x.
    block : (int, int)
        Cells of a block along y and x.
    """

    codec: str | None
    margin: tuple[int, ...]
    block: tuple[int, ...]

    @property
    def arrays(self) -> tuple[str, ...]:
        """The arrays that every block has a shard in."""
        return tuple(dtypes(self.codec, np.float32))

    def blocks(self, shape: tuple[int, ...]) -> set[tuple[int, int]]:
        """All blocks of a store of `shape` cells."""
        down, across = (-(-n // b) for n, b in zip(shape, self.block, strict=True))
        return {(i, j) for i in range(down) for j in range(across)}


def prepare_for_store(emb: xr.DataArray) -> xr.DataArray:
    """The cube with its coordinates in memory and its transform right, if a store can hold it."""
    if not emb.size:
        raise CubeError(
            f"no cells: (D, y, x) is {emb.shape}, wanted at least one; does the area lie beside the data?"
        )
    taken = [f"coordinate {name!r}" for name in (VALUES, SCALE) if name in emb.coords]
    taken += [f"attribute {name!r}" for name in CF if name in emb.attrs]
    if taken:
        raise CubeError(
            f"{', '.join(taken)}: of a meaning of its own in a store. Drop it, emb.drop_vars(name) or "
            "emb.attrs.pop(name), or rename it"
        )
    emb = emb.assign_coords({k: c.compute() for k, c in emb.coords.items() if c.chunks is not None})
    geobox = grid_of(emb)
    if geobox is None or "spatial_ref" not in emb.coords:
        return emb
    own = [float(v) for v in str(emb["spatial_ref"].attrs.get(TRANSFORM, "nan")).split()]
    if np.shape(own) == (6,) and np.allclose(own, geobox.affine.to_gdal(), rtol=1e-9, atol=1e-9):
        return emb
    return with_transform(emb, geobox)  # selecting cells leaves the transform of the whole behind


def margin_and_block(emb: xr.DataArray) -> tuple[tuple[int, int], tuple[int, int]]:
    """Margin and cells of a block, along y and x, for a store of a chunked cube: its chunks, if they will do."""
    # a margin has coordinates only where there is a grid, and nothing but the grid goes along it
    along = {k for k, c in emb.coords.items() if {"y", "x"} & set(c.dims)}
    geobox = grid_of(emb)
    extends = (
        geobox is not None and along == {"y", "x"} and (geobox.crs is None or "spatial_ref" in emb.coords)
    )
    margins, sides = [], []
    for dim in ("y", "x"):
        first, *rest = emb.chunksizes[dim]
        side = max(first, *rest, 0)
        even = all(c == side for c in rest[:-1]) and (first == side or extends)
        margins.append(side - first if rest and even else 0)
        sides.append(side)
    return (margins[0], margins[1]), (sides[0], sides[1])


def rechunk_to_blocks(emb: xr.DataArray, layout: Layout) -> xr.DataArray:
    """The cube in chunks that are the blocks of a store."""
    sizes = zip((emb.sizes["y"], emb.sizes["x"]), layout.margin, layout.block, strict=True)
    chunks = [(emb.sizes["D"],), *(_cut(*each) for each in sizes)]
    if chunks == list(emb.chunks or ()):
        return emb
    return emb.copy(data=emb.data.rechunk(tuple(chunks), method=RECHUNK))


def _cut(size: int, margin: int, side: int) -> tuple[int, ...]:
    """Cells a block of an axis of `size` cells, the first of which lies `margin` cells within a block.

    Examples
    --------
    >>> _cut(10, 1, 4)
    (3, 4, 3)
    """
    edges = [0, *range(side - margin, size, side), size]
    return tuple(b - a for a, b in pairwise(edges))


def inner_chunk(block: tuple[int, ...], cell_bytes: int) -> tuple[int, int]:
    """Cells of an inner chunk along y and x: whole parts of a block.

    Examples
    --------
    >>> inner_chunk((288, 288), 768 * 4), inner_chunk((61, 4), 768 * 4)
    ((36, 36), (61, 4))
    """
    most = math.isqrt(INNER_BYTES // cell_bytes)
    sides = []
    for side in block:
        parts = [d for d in range(1, side + 1) if side % d == 0 and d >= min(MIN_INNER_SIDE, side)]
        sides.append(max((d for d in parts if d <= most), default=parts[0]))
    return sides[0], sides[1]


def with_margin(emb: xr.DataArray, margin: tuple[int, ...]) -> xr.DataArray:
    """The cube as it is stored, with nothing in it: its margin is there, its coordinates go on."""
    import dask.array as da

    shape = (emb.sizes["D"], emb.sizes["y"] + margin[0], emb.sizes["x"] + margin[1])
    data = da.zeros(shape, dtype=emb.dtype, chunks=(-1, -1, -1))
    if not any(margin):
        return emb.copy(data=data)
    from odc.geo.xr import xr_coords

    geobox = grid_of(emb)
    assert geobox is not None  # or there were no margin
    wider = geobox.pad(margin[1], margin[0])
    grid = xr_coords(wider, dims=("y", "x"))
    coords = dict(emb.coords)
    for dim, cells in zip(("y", "x"), margin, strict=True):
        own = emb[dim]  # its values stay to the last bit
        values = np.concatenate([grid[dim].values[:cells].astype(own.dtype), own.values])
        coords[dim] = xr.Variable(dim, values, own.attrs)
    out = xr.DataArray(data, coords, emb.dims, emb.name, emb.attrs)
    out.encoding = emb.encoding
    return with_transform(out, wider)

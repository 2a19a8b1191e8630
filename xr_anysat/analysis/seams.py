"""`seam_score`: how visible the windows of the model are on an embedding cube."""

from __future__ import annotations

import math

import numpy as np
import xarray as xr
from dask.base import compute

from xr_anysat.embedding.lattice import PixelRange
from xr_anysat.embedding.options import ANCHORS
from xr_anysat.embedding.output_grid import lattice_axes
from xr_anysat.errors import CubeError
from xr_anysat.record import read_record
from xr_anysat.shared.checks import check_embedding
from xr_anysat.shared.sensor import S2

RECORD = ("output", "patch_size_m", "tile", "anchor")
"""Attributes that define where windows are; without the attribute ``overlap`` there is no overlap."""

COARSE = 2
"""Side in pixels of 10 m of a pixel of 20 m (B5, B6, B7, B8A, B11 and B12). Both grids start at the CRS origin."""


def seam_score(emb: xr.DataArray) -> xr.Dataset:
    r"""Measure the grid imprint of windows: the mean step across their borders over that inside.

    The step between neighboring cells :math:`a` and :math:`b` is the distance of their vectors,
    :math:`\sqrt{\sum_D (a_D - b_D)^2}`. Its phase is the number of the pixel edge between them on the lattice
    modulo the stride, ``tile - overlap`` pixels. It crosses a border if windows start or end at that phase: at 0,
    or at ``tile`` modulo the stride. The score is

    .. math:: \frac{\text{mean step across borders}}{\text{mean step inside windows}}

    with rows and columns together: 1 if windows are invisible, larger if they are visible. NaN cells are ignored.

    Only edges of the same kind are compared. Six of the ten bands have pixels of 20 m, so values step more at every
    other edge, and the tokens of pixels in ``dense`` and ``local`` step at the edges of patches. If all borders are
    such edges, as with an even `tile`, only such edges count as inside.

    With `overlap`, the change from window to window is spread over the cells that they share, which count as inside. A
    score below 1 is a result of this and does not mean fewer seams. Use ``step`` in this case: it is 1 in all phases if
    windows are invisible.

    A lazy cube is computed once, block by block; it is never in memory as a whole. If you need the embedding later,
    store it first and measure the store: ``xr_anysat.open(store).anysat.seam_score()``.

    Parameters
    ----------
    emb : DataArray, (D, y, x)
        The result of :func:`xr_anysat.embed` with ``output="patch"``, ``"dense"`` or ``"local"``, or a crop of it.
        With the anchor ``"grid"``, its coordinates define its position on the lattice. With ``"cube"``, edges are
        counted from its first cell: crop by whole strides only, or not at all.

    Returns
    -------
    Dataset
        In memory, float64, without units:

        ``score`` ()
            As above. NaN if the cube has no step across a border or none inside, infinite if
            all windows are constant.
        ``step`` (axis: "y", "x"; phase)
            Mean step over the edges of each phase, relative to the mean step inside windows along the same
            axis. NaN for phases that the cube lacks.
        ``phase``, ``border``, ``inside`` (phase)
            Coordinates: the phase in pixels, whether windows start or end there, and whether it counts as inside.

    Raises
    ------
    CubeTypeError
        If `emb` is not an embedding cube.
    CubeError
        If its attrs do not define where windows are, its cells are not those of the lattice, or its windows
        have no edges inside.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> import xr_anysat
    >>> record = {"output": "local", "patch_size_m": 10, "tile": 3, "anchor": "cube"}
    >>> emb = xr.DataArray([[[0.0, 1, 2, 4, 5, 6, 8]]], dims=("D", "y", "x"), attrs=record)
    >>> seams = emb.anysat.seam_score()
    >>> seams["score"].item(), seams["step"].sel(axis="x").values, seams["border"].values
    (2.0, array([2., 1., 1.]), array([ True, False, False]))
    """
    check_embedding(emb, "seam_score()")
    missing = [name for name in RECORD if name not in emb.attrs]
    if missing:
        raise CubeError(
            f"attrs without {', '.join(map(repr, missing))}, so windows cannot be located: expected the record "
            "that embed() writes; copy it from the embedding it was made of, emb.assign_attrs(embedding.attrs)"
        )
    record = read_record(emb.attrs)
    output, tile, overlap = record["output"], record["tile"], record.get("overlap", 0)
    if overlap >= tile or record["anchor"] not in ANCHORS:
        raise CubeError(
            f"attrs tile={tile}, overlap={overlap} and anchor={record['anchor']!r} are not those of embed(): expected "
            f"an overlap smaller than the tile, and an anchor of {', '.join(map(repr, ANCHORS))}; copy them from the "
            "original embedding, emb.assign_attrs(embedding.attrs)"
        )
    if output == "tile":
        raise CubeError(
            "output 'tile' has one cell per window, so windows have no edges inside: embed with "
            "output='patch', 'dense' or 'local'"
        )
    patch, stride = int(record["patch_size_m"] / S2.pixel_size), tile - overlap
    cell = patch if output == "patch" else 1
    phases = np.arange(0, stride, cell)
    border = np.isin(phases, (0, tile % stride))
    units = [n for n in (COARSE, 1 if output == "patch" else patch) if tile % n == stride % n == 0]
    inside = (phases % math.lcm(*units) == 0) & ~border
    if not inside.any():
        raise CubeError(
            f"windows of {tile} pixels, one every {stride}, and cells of {cell} ({output=}): each edge between cells "
            "that can be compared is a border of a window, so no edge inside remains: embed with a larger tile=, or a "
            "smaller patch_size= or overlap="
        )

    axes = _axes(emb, record["anchor"], cell)
    plain = xr.DataArray(emb.data, dims=emb.dims)
    lines = []
    for dim, other in (("y", "x"), ("x", "y")):
        step = _steps(plain, dim)
        lines += [step.sum(other), step.count(other)]
    lines = [line.values for line in compute(*lines)]

    sums, counts = np.zeros((2, 2, phases.size))
    for i, axis in enumerate(axes):
        at = (axis.start + cell * np.arange(1, axis.size)) % stride // cell
        sums[i] = np.bincount(at, lines[2 * i], phases.size)
        counts[i] = np.bincount(at, lines[2 * i + 1], phases.size)

    with np.errstate(invalid="ignore", divide="ignore"):
        typical = sums[:, inside].sum(1) / counts[:, inside].sum(1)
        step = sums / counts / typical[:, None]
        across, within = (sums[:, which].sum() / counts[:, which].sum() for which in (border, inside))
        score = across / within
    return xr.Dataset(
        {
            "score": ((), score, {"long_name": "mean step across window borders over mean step inside"}),
            "step": (("axis", "phase"), step, {"long_name": "mean step, relative to that inside windows"}),
        },
        coords={
            "axis": ["y", "x"],
            "phase": ("phase", phases, {"long_name": "pixel edge on the lattice, modulo the stride", "units": "pixel"}),
            "border": ("phase", border, {"long_name": "whether windows start or end there"}),
            "inside": ("phase", inside, {"long_name": "whether borders are compared with it"}),
        },
        attrs={**{name: record[name] for name in RECORD}, "overlap": overlap},
    )  # fmt: skip


def _steps(emb: xr.DataArray, dim: str) -> xr.DataArray:
    """Distances (y, x) of neighbors along `dim`, float64; NaN beside NaN."""
    change = emb.astype(np.result_type(emb.dtype, np.float32), copy=False).diff(dim)
    # no array of squares, and sums of float64: they are the same however D is chunked
    return np.sqrt(xr.dot(change, change, dim="D", dtype=np.float64))


def _axes(emb: xr.DataArray, anchor: str, cell: int) -> tuple[PixelRange, PixelRange]:
    """Return rows and columns of `emb`: the position of the first pixel on the lattice, and the number of cells."""
    if anchor == "cube":
        return lattice_axes(anchor, None, emb.shape)
    first, size = {}, cell * S2.pixel_size
    for dim, step in (("y", -size), ("x", size)):
        numbers = dim in emb.coords and emb[dim].dtype.kind in "iuf"
        values = emb[dim].values.astype(float) if numbers else np.array([])
        if not values.size or np.abs(np.diff(values) - step).max(initial=0) > 1e-3 * size:
            raise CubeError(
                f"{dim!r} coordinates {_few(values)}: expected those of embed(), with steps of {step:+g} m, because "
                "they define the position of windows for anchor='grid'. Crop without gaps, emb.isel(y=slice(0, 100)), "
                "and in the original CRS; or copy the coordinates from the original embedding, "
                "emb.assign_coords(embedding.coords)"
            )
        first[dim] = values[0] - step / 2
    from affine import Affine
    from odc.geo.geobox import GeoBox

    grid = GeoBox((emb.sizes["y"], emb.sizes["x"]), Affine(size, 0, first["x"], 0, -size, first["y"]), None)
    return lattice_axes(anchor, grid, emb.shape)


def _few(values: np.ndarray) -> str:
    """Return the first `values` as text."""
    return (", ".join(f"{v:.9g}" for v in values[:3]) + (", …" if values.size > 3 else "")) or "are missing"

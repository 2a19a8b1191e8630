"""`preview`: a picture of the frames that the model gets, or of an embedding."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr
from dask.base import compute

from xr_anysat.cube.compositing import CompositeOptions, check_composed, compose
from xr_anysat.cube.reading import read_cube
from xr_anysat.cube.timeline import ALONG_TIME, timeline
from xr_anysat.errors import CubeError, OptionError
from xr_anysat.model.source import WeightsSource
from xr_anysat.shared.checks import check_embedding, require_packages
from xr_anysat.shared.grid import crs_title, grid_of
from xr_anysat.shared.values import check_whole_number
from xr_anysat.view.calendar import Calendar, lay_out
from xr_anysat.view.true_color import TRUE_COLOR, decimate, true_color

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

Extent = tuple[float, float, float, float]
"""Left, right, bottom and top."""

SIZE = 1024
"""Default side of the drawn center in pixels or cells: a chunk of `open_s2`."""

MAX_THUMBNAILS = 96
"""Maximum number of thumbnails: more would be too small to see."""

MAX_THUMBNAIL_SIDE = 400
"""Maximum side of a thumbnail in pixels."""

MAX_MAP_SIDE = 2000
"""Maximum side of a map in cells."""

MAX_KEPT_BYTES = 1 << 30
"""A lazy embedding up to this size is computed once and kept in memory; a larger one is computed twice."""

WIDTH = 7.2
"""Width of a figure in inches: a full page width of a journal."""

GREY, HATCH, INK = "#e4e4e4", "#a6a6a6", "#333333"

SHADES = ("#f4f4f4", "#e8e8e8")


def preview(cube: xr.DataArray | xr.Dataset, *, size: int | None = SIZE, model: Any = None) -> Figure:
    """Draw frames in true color with their calendar, or an embedding as PCA colors on a map.

    **Frames**, or a cube of acquisitions (each acquisition is then a frame): one thumbnail per frame of B4, B3 and B2,
    all with the same stretch, so that they can be compared. Pixels without observations are hatched. The title of a
    thumbnail has its date, its day of the year, the number of acquisitions it was composed from, and the share of
    pixels that were observed in all ten bands. The calendar below shows the period with its bins and one tick per
    acquisition: in a frame, outside the period, or left out by ``open_s2``, with the reason. Bins without acquisitions
    are hatched, and the title says how they were handled.

    **An embedding**: three principal components as red, green and blue (:func:`xr_anysat.rgb`), with the
    coordinates of its CRS and a scale bar. Cells without embedding are hatched.

    Parameters
    ----------
    cube : DataArray or Dataset
        Frames of :func:`xr_anysat.frames`, a Sentinel-2 cube as :func:`xr_anysat.embed` takes it, with band names,
        or an embedding cube ``(D, y, x)``.
    size : int or None, default 1024
        Side of the drawn part in pixels (of an embedding: in cells), at the center of the cube; None draws everything.
        Of a lazy cube, only the chunks of this part are read, with all bands, which the valid share needs. A lazy
        embedding is computed there, twice if it is larger than 1 GiB. To see another place, select it:
        ``cube.isel(y=slice(0, 500), x=slice(0, 500)).anysat.preview()``.
    model : PCAModel, optional
        For an embedding: the model that :func:`xr_anysat.rgb` returned for another year or area, so that colors have
        the same meaning.

    Returns
    -------
    matplotlib.figure.Figure
        Shown by Jupyter; ``figure.savefig("frames.pdf")`` saves it. ``figure.axes`` are the axes of the thumbnails,
        then those of the calendar. pyplot does not know it, so it need not be closed.

    Raises
    ------
    CubeError, CubeTypeError
        `cube` is neither kind of cube, or cannot be read.
    OptionError
        `size` or `model` is invalid, or there are too many acquisitions for one picture.
    AnySatError
        matplotlib, or for an embedding scikit-learn, is not installed.

    Examples
    --------
    >>> import numpy as np, pandas as pd, xarray as xr
    >>> import xr_anysat
    >>> cube = xr.DataArray(
    ...     np.random.default_rng(0).integers(1, 5000, (6, 10, 12, 12), "uint16"),
    ...     dims=("time", "band", "y", "x"),
    ...     coords={"time": pd.date_range("2022-01-15", periods=6, freq="2MS"), "band": list(xr_anysat.BANDS)},
    ... )
    >>> figure = cube.anysat.frames(4).anysat.preview()
    >>> [axes.get_label() for axes in figure.axes]
    ['frame 0', 'frame 1', 'frame 2', 'frame 3', 'calendar']
    """
    if size is not None:
        size = check_whole_number("size", size, of="pixels", hint=", or None for the whole cube")
    if isinstance(cube, xr.DataArray | xr.Dataset) and "D" in cube.dims:
        check_embedding(cube, "preview()")
        assert isinstance(cube, xr.DataArray)  # checked above
        require_packages("preview", "matplotlib", "sklearn")
        return _draw_embedding(cube, size, model)
    if model is not None:
        raise OptionError("model= sets the colors of an embedding: leave it out for a cube of bands")
    require_packages("preview", "matplotlib")
    return _draw_frames(*_central_frames(cube, size))


# ---------------------------------------------------------------------- the drawn part


def _central_frames(cube: xr.DataArray | xr.Dataset, size: int | None) -> tuple[xr.DataArray, str]:
    """Frames of the center of a cube, and the description of this part."""
    if check_composed(cube, CompositeOptions(None)):
        missing = [name for name in ALONG_TIME if name not in cube.coords]
        if missing:
            raise CubeError(
                f"the composed frames lack the coordinates {', '.join(missing)}, which the calendar needs: pass frames "
                "with all coordinates, as in cube.anysat.frames(8).anysat.preview()"
            )
        _check_count(cube.sizes["time"], "frames")
        return _center(cube, size, "pixels")
    canonical = read_cube(cube)
    array, part = _center(canonical.array, size, "pixels")
    _check_count(array.sizes["time"], "acquisitions")
    return compose(replace(canonical, array=array), CompositeOptions(None)), part


def _check_count(n: int, kind: str) -> None:
    if n > MAX_THUMBNAILS:
        raise OptionError(
            f"{n} {kind} are too many for one picture, expected at most {MAX_THUMBNAILS}: compose them with "
            "cube.anysat.frames(8).anysat.preview(), or select some with cube.sel(time='2022-06').anysat.preview()"
        )


def _center(array: xr.DataArray, size: int | None, unit: str) -> tuple[xr.DataArray, str]:
    """Select `size` × `size` pixels at the center, and describe this part; "" if it is everything."""
    whole = {d: array.sizes[d] for d in ("y", "x")}
    if size is None or max(whole.values()) <= size:
        return array, ""
    starts = {d: max(0, (n - size) // 2) for d, n in whole.items()}
    part = array.isel({d: slice(start, start + size) for d, start in starts.items()})
    return part, f"the central {part.sizes['y']} × {part.sizes['x']} of {whole['y']} × {whole['x']} {unit}"


# ---------------------------------------------------------------------- frames


def _draw_frames(frames: xr.DataArray, part: str) -> Figure:
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    from xr_anysat.view.figure import PreviewFigure

    n, calendar = frames.sizes["time"], lay_out(frames, timeline(frames))
    columns = min(n, 4 if n <= 8 else 6 if n <= 24 else 8)
    rows = -(-n // columns)
    side = min(WIDTH / columns, 2.6)
    height = side * min(2.0, max(0.3, frames.sizes["y"] / frames.sizes["x"]))
    tall = (rows * (height + 0.45), 0.65 + 0.17 * len(calendar.rows))
    layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03)
    figure = PreviewFigure(figsize=(WIDTH, sum(tall) + 0.3), layout=layout, facecolor="white")
    above, below = figure.subfigures(2, 1, height_ratios=tall, squeeze=False)[:, 0]
    stretch, hatched = draw_thumbnails(above, frames, columns, binned=bool(calendar.bins))
    words = "; ".join(w for w in (stretch, part, hatched) if w)
    figure.suptitle(words, x=0.01, ha="left", fontsize=7.5, color=INK)
    _draw_calendar(below.add_subplot(label="calendar"), calendar)
    return figure


def draw_thumbnails(
    figure: FigureBase, frames: xr.DataArray, columns: int, *, binned: bool = True
) -> tuple[str, str]:
    """Draw frames in true color, `columns` per row, each with its date, day, acquisitions and valid share.

    Returns
    -------
    tuple of str
        The description of the stretch, and the meaning of hatches, if there are any.
    """
    valid = frames.notnull().all("band").mean(("y", "x"))
    rgb, valid = compute(
        decimate(frames.sel(band=TRUE_COLOR), MAX_THUMBNAIL_SIDE), valid
    )  # each chunk is read once
    colors, stretch = true_color(rgb.values)
    grid = figure.add_gridspec(-(-len(colors) // columns), columns)
    for i, image in enumerate(colors):
        axes = figure.add_subplot(grid[i // columns, i % columns], label=f"frame {i}")
        _show(axes, image)
        frame = frames.isel(time=i)
        axes.set(xticks=[], yticks=[])
        count = f", {frame['n_obs'].item()} obs." if binned else ""
        lines = [f"{pd.Timestamp(frame['time'].item()):%Y-%m-%d}", f"DOY {frame['doy'].item()}{count}"]
        lines.append(f"{percent(valid[i].item())} valid")
        axes.set_title("\n".join(lines), fontsize=6.5, linespacing=1.25, color=INK, pad=3)
    return stretch, "" if colors[..., 3].all() else "hatched: not observed"


def percent(share: float) -> str:
    """Format a share in percent; only exactly 0 and 1 are shown as 0 and 100 percent.

    Examples
    --------
    >>> percent(1.0), percent(0.999), percent(0.5), percent(0.001)
    ('100 %', '> 99 %', '50 %', '< 1 %')
    """
    if 0 < share < 0.01:
        return "< 1 %"
    if 0.99 < share < 1:
        return "> 99 %"
    return f"{share:.0%}".replace("%", " %")


def _show(axes: Axes, image: np.ndarray, extent: Extent | None = None) -> None:
    """Draw an image (y, x, 4) over hatches, which are visible where it is transparent."""
    axes.patch.set(facecolor=GREY, edgecolor=HATCH, hatch="//////", linewidth=0)
    axes.imshow(image, extent=extent)
    for spine in axes.spines.values():
        spine.set(linewidth=0.5, color=INK)


def _draw_calendar(axes: Axes, calendar: Calendar) -> None:
    """Draw the period with its bins, and below them a row of ticks per outcome of the acquisitions."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    bottom = len(calendar.labels)
    first = bottom - len(calendar.rows)
    for i, each in enumerate(calendar.bins):
        corner, width = (each.left, 0), each.right - each.left
        axes.add_patch(Rectangle(corner, width, bottom, facecolor=SHADES[i % 2], edgecolor="none", zorder=0))
        if each.outcome:
            axes.add_patch(Rectangle(corner, width, 1, facecolor=GREY, edgecolor=HATCH, hatch="//////", lw=0))
    halo = [withStroke(linewidth=2, foreground=SHADES[0])]
    for position, doy in calendar.days:
        axes.text(position, 0.5, doy, ha="center", va="center", fontsize=5.5, color=INK, path_effects=halo)
    for i, row in enumerate(calendar.rows, first):
        axes.vlines(row.ticks, i + 0.2, i + 0.8, color=row.color, lw=1)
        for marker, edge, shown in (("<", calendar.left, row.before), (">", calendar.right, row.after)):
            if shown:
                axes.plot(edge, i + 0.5, marker, color=row.color, ms=3, clip_on=False)
    axes.vlines([calendar.start, calendar.end], 0, bottom, color=INK, lw=0.8)

    axes.set(xlim=(calendar.left, calendar.right), ylim=(bottom, 0))
    axes.set_xticks([position for position, _ in calendar.ticks], [label for _, label in calendar.ticks])
    axes.set_yticks([i + 0.5 for i in range(bottom)], calendar.labels)
    axes.tick_params(labelsize=6.5, length=2, width=0.5, colors=INK)
    axes.tick_params(axis="y", length=0)
    axes.set_title(calendar.title, loc="left", fontsize=6.5, color=INK, pad=3)
    for side, spine in axes.spines.items():
        spine.set(visible=side == "bottom", linewidth=0.5, color=INK)


# ---------------------------------------------------------------------- embeddings


def _draw_embedding(emb: xr.DataArray, size: int | None, model: Any) -> Figure:
    from xr_anysat.view.figure import PreviewFigure

    emb, part = _center(emb, size, "cells")
    if emb.chunks is not None and emb.nbytes <= MAX_KEPT_BYTES:
        emb = emb.compute()
    image, caption = map_colors(emb, model)

    extent, *_ = _extent(emb)
    ratio = abs((extent[3] - extent[2]) / (extent[1] - extent[0]))
    side = min(5.0, 6.0 / ratio)
    figure = PreviewFigure(
        figsize=(max(side, 3.8) + 0.6, side * ratio + 1.3), layout="constrained", facecolor="white"
    )
    draw_map(figure.add_subplot(label="embedding"), image, emb)
    lines = [
        f"{emb.attrs.get('long_name', 'Embedding')}, {emb.sizes['D']} channels{part and ', ' + part}",
        caption,
    ]
    if WeightsSource.parse(str(emb.attrs.get("weights", ""))).kind == "random":
        lines.append("Random weights: these colors have no learned meaning")
    figure.suptitle("\n".join(line for line in lines if line), x=0.01, ha="left", fontsize=7.5, color=INK)
    return figure


def draw_map(axes: Axes, image: np.ndarray, where: xr.DataArray) -> None:
    """Draw an image (y, x, 4) in the coordinates of a cube, with a scale bar."""
    extent, labels, metric = _extent(where)
    _show(axes, image, extent=extent)
    axes.set_xlabel(labels[0], fontsize=7.5, color=INK)
    axes.set_ylabel(labels[1], fontsize=7.5, color=INK)
    axes.ticklabel_format(useOffset=False, style="plain")
    axes.locator_params(nbins=4)
    axes.tick_params(labelsize=7, length=2, width=0.5, colors=INK)
    axes.tick_params(axis="y", labelrotation=90)
    for text in axes.get_yticklabels():
        text.set_verticalalignment("center")
    if metric:
        _scale_bar(axes, extent)


def map_colors(emb: xr.DataArray, model: Any = None) -> tuple[np.ndarray, str]:
    """Colors (y, x, 4) uint8 of the cells, transparent where there is no embedding, and their description."""
    from xr_anysat.analysis.components import rgb

    image, fitted = rgb(emb, model=model)
    colors = decimate(image, MAX_MAP_SIDE).transpose("y", "x", "band").values
    description = "Three principal components as red, green and blue"
    if model is None:
        description += f", {sum(fitted.explained[:3]):.0%} of the variance".replace("%", " %")
    return colors, description if colors[..., 3].all() else f"{description}\nHatched: no embedding"


def _extent(emb: xr.DataArray) -> tuple[Extent, tuple[str, str], bool]:
    """Edges (left, right, bottom, top) of the cells, names of the axes, and whether the unit is meters."""
    grid = grid_of(emb)
    if grid is None:
        return (0, emb.sizes["x"], emb.sizes["y"], 0), ("column", "row"), False
    left, bottom, right, top = grid.boundingbox.bbox
    if grid.crs is None:
        return (left, right, bottom, top), ("x", "y"), False
    name = crs_title(grid.crs)
    return (left, right, bottom, top), (f"Easting in m ({name})", "Northing in m"), True


def _scale_bar(axes: Axes, extent: Extent) -> None:
    """Draw a bar of a round number of meters, about a fifth of the width, in the lower left corner."""
    from matplotlib.patheffects import withStroke

    left, right, bottom, top = extent
    length = nice_length((right - left) / 4)
    x, y = left + 0.04 * (right - left), bottom + 0.04 * (top - bottom)
    label = f"{length / 1000:g} km" if length >= 1000 else f"{length:g} m"
    axes.plot(
        [x, x + length], [y, y], color="black", lw=2, solid_capstyle="butt",
        path_effects=[withStroke(linewidth=4, foreground="white")],
    )  # fmt: skip
    axes.annotate(
        label, (x + length / 2, y), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=7,
        path_effects=[withStroke(linewidth=2, foreground="white")],
    )  # fmt: skip
    axes.set(xlim=(left, right), ylim=(bottom, top))


def nice_length(value: float) -> float:
    """Return the largest number not above `value` that is 1, 2 or 5 times a power of ten.

    Examples
    --------
    >>> nice_length(730), nice_length(4.9)
    (500.0, 2.0)
    """
    power = 10.0 ** math.floor(math.log10(value))
    return max(f * power for f in (1, 2, 5) if f * power <= value)

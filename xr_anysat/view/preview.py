"""`preview`: a picture of what the model gets, or of what it made."""

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
"""Pixels or cells on the side of the middle that is drawn by default: a chunk of `open_s2`."""

MAX_THUMBNAILS = 96
"""Thumbnails that a picture may have: more are too small, or too many, to be looked at."""

THUMBNAIL = 400
"""Pixels that a thumbnail has on its longer side, at most."""

MAP = 2000
"""Cells that a map has on its longer side, at most."""

KEPT_BYTES = 1 << 30
"""A lazy embedding up to this size is computed once for its colours and its picture, a larger one twice."""

WIDTH = 7.2
"""Inches: the full width of a page of two columns."""

GREY, HATCH, INK = "#e4e4e4", "#a6a6a6", "#333333"

SHADES = ("#f4f4f4", "#e8e8e8")


def preview(cube: xr.DataArray | xr.Dataset, *, size: int | None = SIZE, model: Any = None) -> Figure:
    """Draw frames in true colour with their calendar, or an embedding as PCA colours on a map.

    **Frames**, or a cube of acquisitions (each is then a frame): a thumbnail a frame of B4, B3 and B2, all with one
    stretch, so that they compare. What was not observed is hatched. Above each: its date, its day of the year, the
    number of acquisitions it was made of, and the share of pixels that were observed in all ten bands. Below, the
    calendar: the period with its bins, a tick for each acquisition, those outside of the period, and those that
    ``open_s2`` left out, by the reason. A bin without acquisitions is hatched, and says what became of it.

    **An embedding**: three principal components as red, green and blue (:func:`xr_anysat.rgb`), with the
    coordinates of its CRS and a scale bar. Cells without embedding are hatched.

    Parameters
    ----------
    cube : DataArray or Dataset
        What :func:`xr_anysat.frames` made; a Sentinel-2 cube as :func:`xr_anysat.embed` takes it, with band names;
        or an embedding cube ``(D, y, x)``.
    size : int or None, default 1024
        Pixels (of an embedding: cells) on the side of what is drawn, around the middle of the cube; None draws all.
        Of a lazy cube just the chunks that this meets are read, all bands of them, since the valid share
        needs them; a lazy embedding is computed there, twice if that is more than 1 GiB. To see
        another place, select it:
        ``cube.isel(y=slice(0, 500), x=slice(0, 500)).anysat.preview()``.
    model : fitted reducer, optional
        For an embedding: what :func:`xr_anysat.rgb` returned for another year or area, so that colours mean the same.

    Returns
    -------
    matplotlib.figure.Figure
        Jupyter shows it; ``figure.savefig("frames.pdf")`` keeps it; ``figure.axes`` are those of the thumbnails, then
        that of the calendar. It is not known to pyplot, so there is nothing to close.

    Raises
    ------
    CubeError, CubeTypeError
        The cube is neither, or cannot be read.
    OptionError
        `size` or `model` is impossible, or there are too many acquisitions for one picture.
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
        assert isinstance(cube, xr.DataArray)  # or it had been refused
        require_packages("preview", "matplotlib", "sklearn")
        return _draw_embedding(cube, size, model)
    if model is not None:
        raise OptionError("model= is for the colours of an embedding: leave it out for a cube of bands")
    require_packages("preview", "matplotlib")
    return _draw_frames(*_middle_frames(cube, size))


# ---------------------------------------------------------------------- what is drawn


def _middle_frames(cube: xr.DataArray | xr.Dataset, size: int | None) -> tuple[xr.DataArray, str]:
    """The frames of the middle of a cube, and what of it that is."""
    if check_composed(cube, CompositeOptions(None)):
        missing = [name for name in ALONG_TIME if name not in cube.coords]
        if missing:
            raise CubeError(
                f"composed frames without the coords {', '.join(missing)}, so where they come from is not known: hand "
                "them in as frames() made them, cube.anysat.frames(8).anysat.preview()"
            )
        _check_count(cube.sizes["time"], "frames")
        return _middle(cube, size, "pixels")
    canonical = read_cube(cube)
    array, part = _middle(canonical.array, size, "pixels")
    _check_count(array.sizes["time"], "acquisitions")
    return compose(replace(canonical, array=array), CompositeOptions(None)), part


def _check_count(n: int, what: str) -> None:
    if n > MAX_THUMBNAILS:
        raise OptionError(
            f"{n} {what} are too many for one picture, at most {MAX_THUMBNAILS}: compose them, "
            "cube.anysat.frames(8).anysat.preview(), or look at a part, cube.sel(time='2022-06').anysat.preview()"
        )


def _middle(array: xr.DataArray, size: int | None, unit: str) -> tuple[xr.DataArray, str]:
    """`size` pixels a side around the middle, and what that is in words, if it is not all."""
    whole = {d: array.sizes[d] for d in ("y", "x")}
    if size is None or max(whole.values()) <= size:
        return array, ""
    starts = {d: max(0, (n - size) // 2) for d, n in whole.items()}
    part = array.isel({d: slice(start, start + size) for d, start in starts.items()})
    return part, f"the middle {part.sizes['y']} × {part.sizes['x']} of {whole['y']} × {whole['x']} {unit}"


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
    """Draw frames in true colour, so many in a row, each with its date, day, acquisitions and valid share.

    Returns
    -------
    tuple of str
        The stretch in words, and what hatches mean, if there are any.
    """
    valid = frames.notnull().all("band").mean(("y", "x"))
    rgb, valid = compute(decimate(frames.sel(band=TRUE_COLOR), THUMBNAIL), valid)  # each chunk is read once
    colors, stretch = true_color(rgb.values)
    grid = figure.add_gridspec(-(-len(colors) // columns), columns)
    for i, image in enumerate(colors):
        axes = figure.add_subplot(grid[i // columns, i % columns], label=f"frame {i}")
        _show(axes, image)
        frame = frames.isel(time=i)
        axes.set(xticks=[], yticks=[])
        of = f", {frame['n_obs'].item()} obs." if binned else ""
        words = [f"{pd.Timestamp(frame['time'].item()):%Y-%m-%d}", f"DOY {frame['doy'].item()}{of}"]
        words.append(f"{percent(valid[i].item())} valid")
        axes.set_title("\n".join(words), fontsize=6.5, linespacing=1.25, color=INK, pad=3)
    return stretch, "" if colors[..., 3].all() else "hatched: not observed"


def percent(share: float) -> str:
    """A share in percent, 0 and 100 only where it is none or all.

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
    """An image (y, x, 4) over hatches, which show where it is transparent."""
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
        if each.fate:
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

    emb, part = _middle(emb, size, "cells")
    if emb.chunks is not None and emb.nbytes <= KEPT_BYTES:
        emb = emb.compute()
    image, caption = map_colors(emb, model)

    extent, *_ = _extent(emb)
    ratio = abs((extent[3] - extent[2]) / (extent[1] - extent[0]))
    side = min(5.0, 6.0 / ratio)
    figure = PreviewFigure(
        figsize=(max(side, 3.8) + 0.6, side * ratio + 1.3), layout="constrained", facecolor="white"
    )
    draw_map(figure.add_subplot(label="embedding"), image, emb)
    words = [
        f"{emb.attrs.get('long_name', 'Embedding')}, {emb.sizes['D']} channels{part and ', ' + part}",
        caption,
    ]
    if WeightsSource.parse(str(emb.attrs.get("weights", ""))).kind == "random":
        words.append("Random weights: these colours mean nothing learned")
    figure.suptitle("\n".join(w for w in words if w), x=0.01, ha="left", fontsize=7.5, color=INK)
    return figure


def draw_map(axes: Axes, image: np.ndarray, where: xr.DataArray) -> None:
    """Draw an image (y, x, 4) at the place of a cube, with its coordinates and a scale bar."""
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
    """The cells as colours (y, x, 4) uint8, transparent where there is no embedding, and what they are, in words."""
    from xr_anysat.analysis.components import rgb

    image, fitted = rgb(emb, model=model)
    colors = decimate(image, MAP).transpose("y", "x", "band").values
    words = "Three principal components as red, green and blue"
    if model is None:
        words += f", {sum(fitted.explained[:3]):.0%} of the variance".replace("%", " %")
    return colors, words if colors[..., 3].all() else f"{words}\nHatched: no embedding"


def _extent(emb: xr.DataArray) -> tuple[Extent, tuple[str, str], bool]:
    """Edges (left, right, bottom, top) of the cells, what their axes are called, and whether these are metres."""
    grid = grid_of(emb)
    if grid is None:
        return (0, emb.sizes["x"], emb.sizes["y"], 0), ("column", "row"), False
    left, bottom, right, top = grid.boundingbox.bbox
    if grid.crs is None:
        return (left, right, bottom, top), ("x", "y"), False
    name = crs_title(grid.crs)
    return (left, right, bottom, top), (f"Easting in m ({name})", "Northing in m"), True


def _scale_bar(axes: Axes, extent: Extent) -> None:
    """A bar of a round number of metres, about a fifth of the width, in the lower left corner."""
    from matplotlib.patheffects import withStroke

    left, right, bottom, top = extent
    length = nice_length((right - left) / 4)
    x, y = left + 0.04 * (right - left), bottom + 0.04 * (top - bottom)
    words = f"{length / 1000:g} km" if length >= 1000 else f"{length:g} m"
    axes.plot(
        [x, x + length], [y, y], color="black", lw=2, solid_capstyle="butt",
        path_effects=[withStroke(linewidth=4, foreground="white")],
    )  # fmt: skip
    axes.annotate(
        words, (x + length / 2, y), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=7,
        path_effects=[withStroke(linewidth=2, foreground="white")],
    )  # fmt: skip
    axes.set(xlim=(left, right), ylim=(bottom, top))


def nice_length(value: float) -> float:
    """1, 2 or 5 times a power of ten, the largest that is not above `value`.

    Examples
    --------
    >>> nice_length(730), nice_length(4.9)
    (500.0, 2.0)
    """
    power = 10.0 ** math.floor(math.log10(value))
    return max(f * power for f in (1, 2, 5) if f * power <= value)

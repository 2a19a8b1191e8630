"""Display of ``cube.anysat`` in Jupyter: a table and a calendar for composed frames, a text for any other cube.

No lazy data are computed. Colors are inherited, or readable on both light and dark themes.
"""

from __future__ import annotations

import base64
import struct
import zlib
from html import escape

import numpy as np
import pandas as pd
import xarray as xr

from xr_anysat.cube.timeline import has_timeline, timeline
from xr_anysat.errors import AnySatError
from xr_anysat.view.calendar import Calendar, lay_out
from xr_anysat.view.true_color import TRUE_COLOR, decimate, true_color

MAX_THUMBNAIL_SIDE = 96
"""Maximum side of a thumbnail in pixels."""

MAX_THUMBNAILS = 24
"""Maximum number of frames with thumbnails, which are stored in the notebook file."""

LABELS, RIGHT, ROW = 190, 712, 18
"""Ends of the time axis of the calendar, and the height of a row, in units of the SVG, which is 720 wide."""

HATCHED = "repeating-linear-gradient(45deg,rgba(128,128,128,.5) 0 2px,transparent 2px 5px)"


class Markup(str):
    """HTML or SVG in which all values are escaped. Only `element` creates it."""

    __slots__ = ()


def element(tag: str, *children: object, **attributes: object) -> Markup:
    """Create an element of HTML or SVG, with all values escaped.

    Parameters
    ----------
    tag : str
    *children : object
        Markup is inserted unchanged, anything else as escaped text.
    **attributes : object
        Values by name: ``class_`` is ``class``, and ``stroke_width`` is ``stroke-width``.

    Returns
    -------
    Markup

    Examples
    --------
    >>> element("td", element("b", 1), " < 2", class_="a", font_size='"')
    '<td class="a" font-size="&quot;"><b>1</b> &lt; 2</td>'
    """
    named = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for name, value in attributes.items()
    )
    if not children:
        return Markup(f"<{tag}{named}/>")
    inner = "".join(child if isinstance(child, Markup) else escape(str(child)) for child in children)
    return Markup(f"<{tag}{named}>{inner}</{tag}>")


def html(cube: xr.DataArray | xr.Dataset, summary: str) -> str:
    """HTML of ``cube.anysat``: a table and a calendar for composed frames, the summary for anything else.

    Frames in memory have thumbnails. No pixels are computed or read.

    Parameters
    ----------
    cube : DataArray or Dataset
        Any cube. ``xarray.set_options(display_style="text")`` selects the summary for composed frames, too.
    summary : str
        Its description in plain text.

    Returns
    -------
    str
        HTML with inline SVG and PNG, without JavaScript, for light and dark themes.
    """
    styled = xr.get_options()["display_style"] == "html"
    if not styled or not isinstance(cube, xr.DataArray) or not has_timeline(cube):
        return element("pre", summary)
    try:
        calendar = lay_out(cube, timeline(cube))
    except AnySatError as error:  # of a damaged record: Jupyter should show the cube nevertheless
        return element("pre", f"{summary}\n{error}")
    return element("div", *table(cube, bool(calendar.bins)), strip(calendar), class_="anysat-frames")


def table(frames: xr.DataArray, binned: bool) -> list[Markup]:
    """Table of frames, one per column: thumbnail, date, day of the year and, if binned, bin and acquisitions."""
    times, starts, ends = (pd.DatetimeIndex(frames[n].values) for n in ("time", "bin_start", "bin_end"))
    images = thumbnails(frames)
    rows: dict[str, list[object]] = {"": [*images]} if images else {}
    rows["date"] = [f"{t:%Y-%m-%d}" for t in times]
    rows["DOY"] = [*frames["doy"].values]
    if binned:
        day = pd.Timedelta(days=1)
        rows["bin"] = [f"{a:%m-%d} – {b - day:%m-%d}" for a, b in zip(starts, ends, strict=True)]
        rows["obs."] = [*frames["n_obs"].values]
    cell = "padding:1px 6px;text-align:center;white-space:nowrap"
    lines = [
        element(
            "tr",
            element("th", label, style=f"{cell};text-align:left"),
            *(element("td", value, style=cell) for value in values),
        )
        for label, values in rows.items()
    ]
    shown = [
        element("div", element("table", *lines, style="font-size:11px;margin:0"), style="overflow-x:auto")
    ]
    if not images:
        call = element("code", ".anysat.preview()")
        shown.append(element("div", "To draw the frames: ", call, style="font-size:11px;opacity:.7"))
    return shown


def thumbnails(frames: xr.DataArray) -> list[Markup]:
    """One image per frame in true color, hatched where nothing was observed; none if this would read pixels."""
    in_memory = frames.variable._in_memory  # xarray checks the same before it shows values
    complete = set(frames.dims) == {"time", "band", "y", "x"}
    if not in_memory or not complete or frames.sizes["time"] > MAX_THUMBNAILS:
        return []
    if not set(TRUE_COLOR) <= set(frames["band"].values.tolist()):
        return []
    small = decimate(frames.sel(band=TRUE_COLOR).transpose("time", "band", "y", "x"), MAX_THUMBNAIL_SIDE)
    colors, _ = true_color(small.values)
    return [
        element(
            "img",
            alt="",
            width=max(32, image.shape[1]),
            style=f"image-rendering:pixelated;background:{HATCHED}",
            src=f"data:image/png;base64,{base64.b64encode(png(image)).decode()}",
        )
        for image in colors
    ]


def png(image: np.ndarray) -> bytes:
    """Encode an image (y, x, 4) uint8 as PNG (https://www.w3.org/TR/png-3/)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = image.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    rows = np.concatenate([np.zeros((height, 1), np.uint8), image.reshape(height, -1)], axis=1)
    data = zlib.compress(rows.tobytes())
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def strip(calendar: Calendar) -> Markup:
    """Draw the calendar as SVG: the bins, and a row of ticks per outcome of the acquisitions."""

    def at(position: float) -> float:
        share = (position - calendar.left) / (calendar.right - calendar.left)
        return round(LABELS + share * (RIGHT - LABELS), 1)

    def text(x: float, row: float, words: object, anchor: str = "middle") -> Markup:
        return element("text", words, x=x, y=row * ROW + 13, text_anchor=anchor)

    rows = len(calendar.labels)
    bottom = (1 + rows) * ROW
    parts = [element("title", calendar.title), text(LABELS, 0, calendar.title, "start")]
    for i, each in enumerate(calendar.bins):
        box = {"x": at(each.left), "y": ROW, "width": round(at(each.right) - at(each.left), 1)}
        shade = {"height": rows * ROW, "fill_opacity": f"{0.06 + 0.08 * (i % 2):.2f}"}
        parts.append(element("rect", element("title", each.text), **box, **shade))
        if each.outcome:
            dashed = {"fill": "none", "stroke": "currentColor", "stroke_dasharray": "3 3"}
            parts.append(element("rect", **box, height=ROW, **dashed))
    for number, label in enumerate(calendar.labels, 1):
        parts.append(text(LABELS - 6, number, label, "end"))
    days = [text(at(position), 1, doy) for position, doy in calendar.days]
    parts.append(element("g", *days, font_size=11 if len(calendar.bins) <= 14 else 8))
    for number, row in enumerate(calendar.rows, 1 + rows - len(calendar.rows)):
        top = number * ROW + 4
        path = "".join(f"M{at(position)} {top}v{ROW - 8}" for position in row.ticks)
        parts.append(element("path", d=path, stroke=row.color, stroke_width=1.5))
        arrows = (f"M{LABELS} {top + 5}l5 -4v8z", row.before), (f"M{RIGHT} {top + 5}l-5 -4v8z", row.after)
        parts += [element("path", d=arrow, fill=row.color) for arrow, shown in arrows if shown]
    for position, label in calendar.ticks:
        parts.append(element("path", d=f"M{at(position)} {bottom}v4", stroke="currentColor"))
        parts.append(text(at(position), 1 + rows, label))
    parts.append(element("path", d=f"M{LABELS} {bottom}H{RIGHT}", stroke="currentColor"))
    return element(
        "svg",
        *parts,
        viewBox=f"0 0 720 {bottom + ROW}",
        style="width:100%;max-width:720px;font-size:11px;display:block",
        fill="currentColor",
        role="img",
    )

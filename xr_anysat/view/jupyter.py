"""What Jupyter shows for ``cube.anysat``: composed frames as a table with their calendar, any other cube in words.

Nothing lazy is computed. Colors are inherited or readable on both light and dark themes.
"""

from __future__ import annotations

import base64
import struct
import zlib
from html import escape

import numpy as np
import pandas as pd
import xarray as xr

from xr_anysat.cube.timeline import LABELLED, OUTSIDE, USED, Timeline, describe, has_timeline, timeline
from xr_anysat.view.true_color import TRUE_COLOR, decimate, true_color

SIDE = 96
"""Pixels on the longer side of a thumbnail, at most."""

MAX_THUMBNAILS = 24
"""Frames that are shown with thumbnails, at most: thumbnails are stored in the notebook's file."""

# The colors of the picture, light enough for a dark theme
COLORS = {USED: "#2f8fce", OUTSIDE: "#d98e00"}

LEFT_OUT = "#d55e00"

LABELS, RIGHT, ROW = 190, 712, 18  # of the calendar, in units of its width of 720

HATCHED = "repeating-linear-gradient(45deg,rgba(128,128,128,.5) 0 2px,transparent 2px 5px)"


class Markup(str):
    """HTML or SVG in which every value is escaped. Only `element` creates it."""

    __slots__ = ()


def element(tag: str, *children: object, **attributes: object) -> Markup:
    """Write an element of HTML or SVG; every value in it is escaped here.

    Parameters
    ----------
    tag : str
    *children : object
        Markup is inserted as it is, anything else as escaped text.
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
    """HTML of ``cube.anysat``: composed frames as a table with their calendar, anything else as its summary.

    Frames in memory have thumbnails. No pixel is computed or read.

    Parameters
    ----------
    cube : DataArray or Dataset
        Any. ``xarray.set_options(display_style="text")`` selects the summary.
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
    calendar = timeline(cube)
    return element("div", *table(cube, calendar), strip(cube, calendar), class_="anysat-frames")


def table(frames: xr.DataArray, calendar: Timeline) -> list[Markup]:
    """The frames side by side: thumbnail, date, day of the year, bin and number of acquisitions."""
    times, starts, ends = (pd.DatetimeIndex(frames[n].values) for n in ("time", "bin_start", "bin_end"))
    images = thumbnails(frames)
    rows: dict[str, list[object]] = {"": [*images]} if images else {}
    rows["date"] = [f"{t:%Y-%m-%d}" for t in times]
    rows["DOY"] = [*frames["doy"].values]
    if calendar.slots:
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
        shown.append(element("div", "draw them: ", call, style="font-size:11px;opacity:.7"))
    return shown


def thumbnails(frames: xr.DataArray) -> list[Markup]:
    """An image per frame in true color, hatched where nothing was observed; none where this would read pixels."""
    in_memory = frames.variable._in_memory  # what xarray itself asks before it shows values
    complete = set(frames.dims) == {"time", "band", "y", "x"}
    if not in_memory or not complete or frames.sizes["time"] > MAX_THUMBNAILS:
        return []
    if not set(TRUE_COLOR) <= set(frames["band"].values.tolist()):
        return []
    small = decimate(frames.sel(band=TRUE_COLOR).transpose("time", "band", "y", "x"), SIDE)
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
    """An image (y, x, 4) uint8 as PNG (https://www.w3.org/TR/png-3/)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = image.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    rows = np.concatenate([np.zeros((height, 1), np.uint8), image.reshape(height, -1)], axis=1)
    data = zlib.compress(rows.tobytes())
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def strip(frames: xr.DataArray, calendar: Timeline) -> Markup:
    """The calendar as SVG: the bins, and a row of ticks for each outcome of the acquisitions."""
    start, days = calendar.start, (calendar.end - calendar.start) / pd.Timedelta(days=1)
    margin = 0.04 * (RIGHT - LABELS)

    def at(when: pd.Timestamp) -> float:
        share = (when - start) / pd.Timedelta(days=1) / days
        x = LABELS + margin + share * (RIGHT - LABELS - 2 * margin)
        return round(min(max(x, LABELS), RIGHT), 1)  # what is far outside, at the edge

    def text(x: float, row: float, words: object, anchor: str = "middle") -> Markup:
        return element("text", words, x=x, y=row * ROW + 13, text_anchor=anchor)

    bins = 1 if calendar.slots else 0
    rows = bins + len(calendar.lanes)
    parts = [element("title", describe(calendar)), text(LABELS, 0, describe(calendar), "start")]
    for i, slot in enumerate(calendar.slots):
        x, width = at(slot.start), round(at(slot.end) - at(slot.start), 1)
        days_in = f"{slot.start:%Y-%m-%d} – {slot.end - pd.Timedelta(days=1):%Y-%m-%d} {slot.fate}"
        parts.append(
            element(
                "rect",
                element("title", days_in),
                x=x,
                y=ROW,
                width=width,
                height=rows * ROW,
                fill_opacity=f"{0.06 + 0.08 * (i % 2):.2f}",
            )
        )
        if slot.fate:
            dashed = {"fill": "none", "stroke": "currentColor", "stroke_dasharray": "3 3"}
            parts.append(element("rect", x=x, y=ROW, width=width, height=ROW, **dashed))
    if bins:
        parts.append(text(LABELS - 6, 1, "DOY of the frames", "end"))
        days_of = zip(pd.DatetimeIndex(frames["time"].values), frames["doy"].values, strict=True)
        labels = [text(at(date), 1, doy) for date, doy in days_of if len(calendar.slots) <= LABELLED]
        parts.append(element("g", *labels, font_size=11 if len(calendar.slots) <= 14 else 8))
    for row, (label, dates) in enumerate(calendar.lanes.items(), 1 + bins):
        parts.append(text(LABELS - 6, row, f"{label} ({len(dates)})", "end"))
        path = "".join(f"M{at(d)} {row * ROW + 4}v{ROW - 8}" for d in sorted(dates))
        parts.append(element("path", d=path, stroke=COLORS.get(label, LEFT_OUT), stroke_width=1.5))
    bottom = (1 + rows) * ROW
    for month in months(calendar):
        parts.append(element("path", d=f"M{at(month)} {bottom}v4", stroke="currentColor"))
        parts.append(text(at(month), 1 + rows, f"{month:%Y-%m}"))
    parts.append(element("path", d=f"M{LABELS} {bottom}H{RIGHT}", stroke="currentColor"))
    return element(
        "svg",
        *parts,
        viewBox=f"0 0 720 {bottom + ROW}",
        style="width:100%;max-width:720px;font-size:11px;display:block",
        fill="currentColor",
        role="img",
    )


def months(calendar: Timeline) -> pd.DatetimeIndex:
    """First days of months in the period, about seven of them."""
    firsts = pd.date_range(calendar.start, calendar.end, freq="MS")
    return firsts[:: max(1, -(-len(firsts) // 7))]

"""How composed frames show in Jupyter: a table and their calendar above xarray's own view.

xarray has no hook for that, so IPython is told, where this process is the inside of one. Nothing lazy is computed.
"""

from __future__ import annotations

import base64
import struct
import sys
import zlib
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from xr_anysat.cube.timeline import LABELLED, OUTSIDE, USED, Timeline, describe, has_timeline, timeline
from xr_anysat.view.true_color import TRUE_COLOR, decimate, true_color

if TYPE_CHECKING:
    pass

SIDE = 96
"""Pixels that a thumbnail has on its longer side, at most."""

THUMBNAILS = 24
"""Frames that are shown with thumbnails, at most: these go into the notebook's file."""

# Of the picture's palette, lighter where a dark theme asks for it
COLORS = {USED: "#2f8fce", OUTSIDE: "#d98e00"}

LEFT_OUT = "#d55e00"

LABELS, RIGHT, ROW = 190, 712, 18  # of the calendar, in units of its width of 720

HATCHED = "repeating-linear-gradient(45deg,rgba(128,128,128,.5) 0 2px,transparent 2px 5px)"


def shell() -> Any:
    """The IPython that this process is the inside of, or None; imports nothing."""
    ipython = sys.modules.get("IPython")
    return None if ipython is None else ipython.get_ipython()


def register() -> None:
    """Have the IPython around this process, if there is one, show composed frames by :func:`html`."""
    running = shell()
    if running is not None:
        running.display_formatter.formatters["text/html"].for_type(xr.DataArray, html)


def html(array: xr.DataArray) -> str:
    """HTML of a DataArray for Jupyter; xarray's own, and for composed frames their table and calendar above it.

    Thumbnails are shown of frames that are in memory, and no pixel is computed or read.

    Parameters
    ----------
    array : DataArray
        Any. ``xarray.set_options(display_style="text")`` is minded.

    Returns
    -------
    str
        HTML with inline SVG and PNG, without JavaScript, for light and dark themes.
    """
    own: str = array._repr_html_()
    if not has_timeline(array) or xr.get_options()["display_style"] != "html":
        return own
    calendar = timeline(array)
    above = table(array, calendar) + strip(array, calendar)
    return f'<div class="anysat-frames" style="margin-bottom:1em">{above}</div>{own}'


def table(frames: xr.DataArray, calendar: Timeline) -> str:
    """The frames side by side: thumbnail, date, day of the year, bin and number of acquisitions."""
    times, starts, ends = (pd.DatetimeIndex(frames[n].values) for n in ("time", "bin_start", "bin_end"))
    rows = {"": thumbnails(frames)}
    rows["date"] = [f"{t:%Y-%m-%d}" for t in times]
    rows["DOY"] = [str(d) for d in frames["doy"].values]
    if calendar.slots:
        day = pd.Timedelta(days=1)
        rows["bin"] = [f"{a:%m-%d} – {b - day:%m-%d}" for a, b in zip(starts, ends, strict=True)]
        rows["obs."] = [str(n) for n in frames["n_obs"].values]
    cell = "padding:1px 6px;text-align:center;white-space:nowrap"
    lines = "".join(
        f'<tr><th style="{cell};text-align:left">{label}</th>'
        + "".join(f'<td style="{cell}">{text}</td>' for text in texts)
        + "</tr>"
        for label, texts in rows.items()
        if texts
    )
    hint = (
        ""
        if rows[""]
        else '<div style="font-size:11px;opacity:.7">draw them: <code>.anysat.preview()</code></div>'
    )
    return f'<div style="overflow-x:auto"><table style="font-size:11px;margin:0">{lines}</table></div>{hint}'


def thumbnails(frames: xr.DataArray) -> list[str]:
    """An image a frame in true colour, hatched where nothing was observed; none where this took any reading."""
    few = frames.sizes["time"] <= THUMBNAILS and set(TRUE_COLOR) <= set(frames["band"].values.tolist())
    if not few or not frames.variable._in_memory:  # what xarray itself asks before it shows values
        return []
    small = decimate(frames.sel(band=TRUE_COLOR).transpose("time", "band", "y", "x"), SIDE)
    colors, _ = true_color(small.values)
    return [
        f'<img alt="" width="{max(32, c.shape[1])}" style="image-rendering:pixelated;background:{HATCHED}" '
        f'src="data:image/png;base64,{base64.b64encode(png(c)).decode()}"/>'
        for c in colors
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


def strip(frames: xr.DataArray, calendar: Timeline) -> str:
    """The calendar as SVG: bins, and a row of ticks for what became of the acquisitions."""
    start, days = calendar.start, (calendar.end - calendar.start) / pd.Timedelta(days=1)
    margin = 0.04 * (RIGHT - LABELS)

    def at(when: pd.Timestamp) -> float:
        share = (when - start) / pd.Timedelta(days=1) / days
        x = LABELS + margin + share * (RIGHT - LABELS - 2 * margin)
        return round(min(max(x, LABELS), RIGHT), 1)  # what is far outside, at the edge

    def text(x: float, row: float, words: str, anchor: str = "middle") -> str:
        return f'<text x="{x}" y="{row * ROW + 13}" text-anchor="{anchor}">{escape(words)}</text>'

    bins = 1 if calendar.slots else 0
    rows = bins + len(calendar.lanes)
    parts = [text(LABELS, 0, describe(calendar), "start")]
    for i, slot in enumerate(calendar.slots):
        x, width = at(slot.start), round(at(slot.end) - at(slot.start), 1)
        days_in = f"{slot.start:%Y-%m-%d} – {slot.end - pd.Timedelta(days=1):%Y-%m-%d} {slot.fate}"
        parts.append(
            f'<rect x="{x}" y="{ROW}" width="{width}" height="{rows * ROW}" '
            f'fill-opacity="{0.06 + 0.08 * (i % 2):.2f}"><title>{escape(days_in)}</title></rect>'
        )
        if slot.fate:
            parts.append(
                f'<rect x="{x}" y="{ROW}" width="{width}" height="{ROW}" fill="none" stroke="currentColor" '
                f'stroke-dasharray="3 3"/>'
            )
    if bins:
        parts.append(text(LABELS - 6, 1, "DOY of the frames", "end"))
        days_of = zip(pd.DatetimeIndex(frames["time"].values), frames["doy"].values, strict=True)
        labels = [text(at(date), 1, str(doy)) for date, doy in days_of if len(calendar.slots) <= LABELLED]
        parts.append(f'<g font-size="{11 if len(calendar.slots) <= 14 else 8}">{"".join(labels)}</g>')
    for row, (label, dates) in enumerate(calendar.lanes.items(), 1 + bins):
        parts.append(text(LABELS - 6, row, f"{label} ({len(dates)})", "end"))
        path = "".join(f"M{at(d)} {row * ROW + 4}v{ROW - 8}" for d in sorted(dates))
        parts.append(f'<path d="{path}" stroke="{COLORS.get(label, LEFT_OUT)}" stroke-width="1.5"/>')
    bottom = (1 + rows) * ROW
    for month in months(calendar):
        parts.append(f'<path d="M{at(month)} {bottom}v4" stroke="currentColor"/>')
        parts.append(text(at(month), 1 + rows, f"{month:%Y-%m}"))
    return (
        f'<svg viewBox="0 0 720 {bottom + ROW}" style="width:100%;max-width:720px;font-size:11px;display:block" '
        f'fill="currentColor" role="img"><title>{escape(describe(calendar))}</title>{"".join(parts)}'
        f'<path d="M{LABELS} {bottom}H{RIGHT}" stroke="currentColor"/></svg>'
    )


def months(calendar: Timeline) -> pd.DatetimeIndex:
    """First days of months in the period, about seven of them."""
    firsts = pd.date_range(calendar.start, calendar.end, freq="MS")
    return firsts[:: max(1, -(-len(firsts) // 7))]


def _have_jupyter_show_figures() -> None:
    """Have a Figure that is a cell's value shown as a picture, as Jupyter does once pyplot was used."""
    from matplotlib.figure import Figure

    from xr_anysat.view.jupyter import shell

    running = shell()
    if running is None:
        return
    from IPython.core.pylabtools import select_figure_formats

    try:
        running.display_formatter.formatters["image/png"].lookup_by_type(Figure)
    except KeyError:
        select_figure_formats(running, {"png"})

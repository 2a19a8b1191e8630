"""How composed frames show in Jupyter: without computing, without breaking what others show, in a real kernel."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import numpy as np
import pytest
import xarray as xr
from matplotlib.image import imread
from nbclient import NotebookClient
from support.cubes import no_compute, placed, unreadable
from support.paths import TESTS

from xr_anysat.view.jupyter import THUMBNAILS, html, register
from xr_anysat.view.true_color import TRUE_COLOR, true_color

DATES = ("2021-11-05", "2022-01-10", "2022-01-20", "2022-05-01", "2022-12-31", "2023-01-01", "2023-06-01")
UUID = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"


def frames(n: int | None = 4, **options: object) -> xr.DataArray:
    return placed(DATES).anysat.frames(n, period="2022", **options)


def above(shown: str) -> ElementTree.Element:
    """What is shown above xarray's own view, which must be well-formed."""
    found = re.match(r'<div class="anysat-frames".*?</svg></div>', shown, re.DOTALL)
    assert found
    return ElementTree.fromstring(found[0])


def table(shown: str) -> dict[str, list[str]]:
    rows = [[("".join(cell.itertext())) for cell in row] for row in above(shown).iter("tr")]
    return {label: cells for label, *cells in rows}


def thumbnails(shown: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', shown)
    return [imread(io.BytesIO(base64.b64decode(data))) for data in found]


def test_a_table_of_frames_above_xarrays_own_view() -> None:
    made = frames()
    shown = html(made)
    own, seen = (re.sub(UUID, "", text) for text in (made._repr_html_(), shown))
    assert seen.endswith(own)
    rows = table(shown)
    assert rows["date"] == ["2022-02-15", "2022-05-17", "2022-11-16"]
    assert rows["DOY"] == ["45", "136", "319"]
    assert rows["bin"] == ["01-01 – 04-01", "04-02 – 07-01", "10-01 – 12-31"]
    assert rows["obs."] == ["2", "1", "1"]
    assert "<script" not in shown.lower()


def test_the_calendar() -> None:
    svg = next(e for e in above(html(frames())).iter() if e.tag.endswith("svg"))
    words = [t.text for t in svg.iter() if t.tag.endswith("text")]
    assert words[:3] == ["2022-01-01 to 2022-12-31 in 4 bins; 1 empty, left out", "DOY of the frames", "45"]
    assert {"in a frame (4)", "outside the period (3)"} <= set(words)
    paths = [p.attrib["d"] for p in svg.iter() if p.tag.endswith("path")]
    assert [p.count("M") for p in paths[:2]] == [4, 3]
    left, right = 190.0, 712.0
    at = [float(x) for p in paths[:2] for x in re.findall(r"M([\d.]+) ", p)]
    assert all(left <= x <= right for x in at)
    assert (at[4], at[-1]) == (left, right)  # far outside, at the edges
    assert len([r for r in svg.iter() if r.tag.endswith("rect") and "stroke-dasharray" in r.attrib]) == 1


def test_thumbnails_of_what_is_in_memory() -> None:
    made = frames()
    made[1, :, 0, 0] = np.nan
    images = thumbnails(html(made))
    want, _ = true_color(made.sel(band=TRUE_COLOR).values)
    np.testing.assert_array_equal(np.round(255 * np.stack(images)), want)
    assert images[1][0, 0, 3] == 0
    assert thumbnails(html(made.drop_sel(band="B4"))) == []
    many = placed(np.arange("2022-01-01", "2022-02-01", dtype="datetime64[D]")).anysat.frames(None)
    assert thumbnails(html(many)) == []
    assert len(thumbnails(html(many[:THUMBNAILS]))) == THUMBNAILS


def test_nothing_lazy_is_computed_or_read(tmp_path: Path) -> None:
    with no_compute():
        made = unreadable(placed(DATES)).anysat.frames(4, period="2022")
        shown = html(made)
    assert table(shown)["DOY"] == ["45", "136", "319"]
    assert thumbnails(shown) == []
    assert ".anysat.preview()" in shown
    frames().to_netcdf(tmp_path / "frames.nc")
    with xr.open_dataarray(tmp_path / "frames.nc", decode_coords="all") as stored:
        assert thumbnails(html(stored)) == []
        assert not stored.variable._in_memory


def test_text_of_others_is_escaped() -> None:
    cube = placed(DATES)
    item = {"id": "a", "datetime": "2022-03-01T00:00:00Z", "used": "<script>alert(1)</script>: x"}
    cube.attrs["items"] = json.dumps([item])
    made = cube.anysat.frames(4, period="2022")
    shown = html(made)
    assert "<script" not in shown
    assert "left out: &lt;script&gt;alert(1)&lt;/script&gt; (1)" in shown


@pytest.mark.parametrize("n", [1, 24, 60])
def test_bins_of_any_number(n: int) -> None:
    days = np.arange("2022-01-03", "2023-01-01", 5, dtype="datetime64[D]")
    made = placed(days).anysat.frames(n, period="2022")
    root = above(html(made))
    labels = [t.text for g in root.iter() if g.tag.endswith("}g") or g.tag == "g" for t in g]
    assert labels == ([str(d) for d in made["doy"].values] if n <= 26 else [])


def test_other_arrays_show_as_they_did() -> None:
    plain = xr.DataArray([1, 2], dims="x")
    with xr.set_options(display_style="text"):
        assert html(frames()) == frames()._repr_html_()
        assert html(plain) == plain._repr_html_()
    for array in (plain, frames().mean("time", keep_attrs=True), frames().isel(time=0)):
        assert "anysat-frames" not in html(array)
        assert "xr-wrap" in html(array)


@pytest.mark.slow
def test_outside_ipython_nothing_is_registered_or_imported() -> None:
    heavy = "IPython", "matplotlib", "torch", "sklearn"
    code = f"import sys, xr_anysat; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
    register()


@pytest.mark.slow
def test_in_a_real_kernel(tmp_path: Path) -> None:
    cells = [
        f"import sys; sys.path.insert(0, {str(TESTS)!r})",
        "from support.cubes import placed, unreadable\nimport xarray as xr\nimport xr_anysat",
        "frames = placed().anysat.frames(2)\nframes",
        "unreadable(placed()).anysat.frames(2)",
        "xr.DataArray([1, 2], dims='x')",
        "with xr.set_options(display_style='text'):\n    display(frames)",
        "'matplotlib' in sys.modules",
        "frames.anysat.preview()",
        "figure = frames.anysat.preview()",
        "import matplotlib.pyplot as plt\nplt.get_fignums()",
        "frames.anysat.preview()",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [[o["data"] for o in cell.outputs if "data" in o] for cell in notebook.cells]
    for at, pictures in ((2, 2), (3, 0)):
        (shown,) = outputs[at]
        assert shown["text/html"].startswith('<div class="anysat-frames"')
        assert len(thumbnails(shown["text/html"])) == pictures
        assert "xarray.DataArray" in shown["text/plain"]
    assert outputs[4][0]["text/html"].count("anysat-frames") == 0
    assert outputs[5][0]["text/html"].startswith("<pre>")
    assert outputs[6][0]["text/plain"] == "False"
    assert outputs[8] == []
    assert outputs[9][0]["text/plain"] == "[]"
    for at in (7, 10):  # before pyplot was imported, and after
        (shown,) = outputs[at]
        assert imread(io.BytesIO(base64.b64decode(shown["image/png"]))).shape[1] > 500

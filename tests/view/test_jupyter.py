"""Display of `cube.anysat` in Jupyter: nothing is computed, no other display changes, in a real kernel."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html import escape
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import numpy as np
import pytest
import xarray as xr
from matplotlib.image import imread
from nbclient import NotebookClient
from support.cubes import no_compute, odc_stac, placed, unreadable
from support.paths import TESTS

from xr_anysat.view.jupyter import MAX_THUMBNAILS
from xr_anysat.view.true_color import TRUE_COLOR, true_color

DATES = ("2021-11-05", "2022-01-10", "2022-01-20", "2022-05-01", "2022-12-31", "2023-01-01", "2023-06-01")


def frames(n: int | None = 4, **options: object) -> xr.DataArray:
    return placed(DATES).anysat.frames(n, period="2022", **options)


def html(cube: xr.DataArray | xr.Dataset) -> str:
    shown: str = cube.anysat._repr_html_()
    return shown


def parsed(shown: str) -> ElementTree.Element:
    """Parse the HTML of composed frames, which must be well-formed."""
    assert shown.startswith('<div class="anysat-frames">')
    return ElementTree.fromstring(shown)


def table(shown: str) -> dict[str, list[str]]:
    rows = [[("".join(cell.itertext())) for cell in row] for row in parsed(shown).iter("tr")]
    return {label: cells for label, *cells in rows}


def thumbnails(shown: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', shown)
    return [imread(io.BytesIO(base64.b64decode(data))) for data in found]


def test_a_table_of_frames() -> None:
    shown = html(frames())
    rows = table(shown)
    assert rows["date"] == ["2022-02-15", "2022-05-17", "2022-11-16"]
    assert rows["DOY"] == ["45", "136", "319"]
    assert rows["bin"] == ["01-01 – 04-01", "04-02 – 07-01", "10-01 – 12-31"]
    assert rows["obs."] == ["2", "1", "1"]
    assert "<script" not in shown.lower()


def test_the_calendar() -> None:
    svg = next(e for e in parsed(html(frames())).iter() if e.tag == "svg")
    words = [t.text for t in svg.iter() if t.tag == "text"]
    assert words[:2] == ["2022-01-01 to 2022-12-31 in 4 bins; 1 empty, left out", "DOY of the frames"]
    assert words[2:7] == ["in a frame (4)", "outside the period (3)", "45", "136", "319"]
    paths = [p.attrib["d"] for p in svg.iter() if p.tag == "path"]
    assert [p.count("M") for p in paths[:4]] == [4, 1, 1, 1]
    at = [float(x) for p in paths[:2] for x in re.findall(r"M([\d.]+) ", p)]
    assert all(190 <= x <= 712 for x in at)
    assert [p[:5] for p in paths[2:4]] == ["M190 ", "M712 "]  # arrows for what is far outside
    assert len([r for r in svg.iter() if r.tag == "rect" and "stroke-dasharray" in r.attrib]) == 1


@pytest.mark.parametrize("period", ["2022", "2022-01", ("2021-12-20", "2022-01-12"), ("2017", "2051")])
def test_picture_and_html_show_the_same_calendar(period: str | tuple[str, str]) -> None:
    made = placed(DATES).anysat.frames(2, period=period)
    calendar = made.anysat.preview().axes[-1]
    svg = next(e for e in parsed(html(made)).iter() if e.tag == "svg")
    words = [t.text for t in svg.iter() if t.tag == "text"]
    axis = [t.get_text() for t in calendar.get_xticklabels()]
    assert 3 <= len(axis) <= 13
    assert words == [
        calendar.get_title("left"),
        *(t.get_text() for t in calendar.get_yticklabels()),
        *(t.get_text() for t in calendar.texts),
        *axis,
    ]
    (ends,) = (c for c in calendar.collections if c.get_linewidths()[0] == 0.8)  # of the period
    assert all(
        ends.get_segments()[0][0, 0] <= x <= ends.get_segments()[1][0, 0] for x in calendar.get_xticks()
    )


def test_thumbnails_of_frames_in_memory() -> None:
    made = frames()
    made[1, :, 0, 0] = np.nan
    images = thumbnails(html(made))
    want, _ = true_color(made.sel(band=TRUE_COLOR).values)
    np.testing.assert_array_equal(np.round(255 * np.stack(images)), want)
    assert images[1][0, 0, 3] == 0
    for partial in (
        made.drop_sel(band="B4"),
        made.isel(band=0),
        made.isel(band=0, drop=True),
        made.mean("x", keep_attrs=True),
    ):
        assert table(html(partial))["DOY"] == ["45", "136", "319"]
        assert thumbnails(html(partial)) == []
    many = placed(np.arange("2022-01-01", "2022-02-01", dtype="datetime64[D]")).anysat.frames(None)
    assert thumbnails(html(many)) == []
    assert len(thumbnails(html(many[:MAX_THUMBNAILS]))) == MAX_THUMBNAILS


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


def test_text_of_attributes_is_escaped() -> None:
    cube = placed(DATES)
    item = {"id": "a", "datetime": "2022-03-01T00:00:00Z", "used": "<script>alert(1)</script>: x"}
    cube.attrs["items"] = json.dumps([item])
    made = cube.anysat.frames(4, period="2022")
    shown = html(made)
    assert "<script" not in shown
    assert "left out: &lt;script&gt;alert(1)&lt;/script&gt; (1)" in shown


@pytest.mark.parametrize("name", ["doy", "n_obs"])
def test_coordinates_are_escaped(name: str) -> None:
    markup = "<script>alert('1')</script>&\""
    made = frames()
    shown = html(made.assign_coords({name: ("time", [markup] * made.sizes["time"])}))
    assert "<script" not in shown
    assert [markup] * 3 == table(shown)[{"doy": "DOY", "n_obs": "obs."}[name]]


MARKUP = "<img src=x onerror=alert(1)>"


def places_of_markup() -> dict[str, Callable[[xr.DataArray], xr.DataArray]]:
    """Everything of a cube that can be text, each with a function that puts markup there."""
    cube = placed(DATES)
    cube.attrs["items"] = json.dumps(
        [{"id": "a", "datetime": "2022-03-01T00:00:00Z", "used": "clouds: 40 %"}]
    )
    made = cube.anysat.frames(4, period="2022")
    places: dict[str, Callable[[xr.DataArray], xr.DataArray]] = {
        "the name": lambda c: c.rename(MARKUP),
        "a new attribute": lambda c: c.assign_attrs({MARKUP: MARKUP}),
        "a new coordinate": lambda c: c.assign_coords({MARKUP: MARKUP}),
        "the name of the CRS": lambda c: c.assign_coords(
            spatial_ref=c["spatial_ref"].assign_attrs(
                {
                    key: re.sub(r'^(PROJCRS|PROJCS)\["[^"]*"', rf'\1["{MARKUP}"', str(value))
                    for key, value in c["spatial_ref"].attrs.items()
                }
            )
        ),
        "a band": lambda c: c.assign_coords(band=[MARKUP, *c["band"].values[1:]]),
    }
    for key in made.attrs:
        places[f"attribute {key}"] = lambda c, key=key: c.assign_attrs({key: MARKUP})
    for key in ("id", "datetime", "used"):
        places[f"{key} of an item"] = lambda c, key=key: c.assign_attrs(
            items=json.dumps([json.loads(c.attrs["items"])[0] | {key: MARKUP}])
        )
    for name in made.coords:
        places[f"coordinate {name}"] = lambda c, name=name: c.assign_coords(
            {name: (c[name].dims, np.full(c[name].shape, MARKUP, object))}
        )
    for dim in made.dims:
        places[f"dim {dim}"] = lambda c, dim=dim: c.rename({dim: MARKUP})
    return places


@pytest.mark.parametrize("place", places_of_markup())
def test_markup_anywhere_is_escaped(place: str) -> None:
    """In composed frames, in the cube that they are made of, and in an embedding."""
    cube = placed(DATES)
    cube.attrs["items"] = json.dumps(
        [{"id": "a", "datetime": "2022-03-01T00:00:00Z", "used": "clouds: 40 %"}]
    )
    made = cube.anysat.frames(4, period="2022")
    emb = made.isel(time=0, drop=True).rename(band="D").transpose("D", "y", "x")
    put = places_of_markup()[place]
    shown = [html(put(made))]
    for other in (cube, emb):
        try:
            shown.append(html(put(other)))
        except (KeyError, ValueError):  # the cube has no such coordinate, dim or attribute
            continue
    assert all("<img src=x" not in text for text in shown)


def test_dims_are_escaped() -> None:
    assert html(xr.DataArray([1, 2], dims="<b>")).startswith("<pre>Neither")
    assert "<b>" not in html(xr.DataArray([1, 2], dims="<b>"))


@pytest.mark.parametrize("n", [1, 24, 60])
def test_any_number_of_bins(n: int) -> None:
    days = np.arange("2022-01-03", "2023-01-01", 5, dtype="datetime64[D]")
    made = placed(days).anysat.frames(n, period="2022")
    root = parsed(html(made))
    labels = [t.text for g in root.iter() if g.tag == "g" for t in g]
    assert labels == ([str(d) for d in made["doy"].values] if n <= 26 else [])


SENTINEL2 = "Methods: frames, statistics, plan, embed, embed_at, preview"


@pytest.mark.parametrize(
    ("make", "first", "second"),
    [
        (placed, r"Sentinel-2 cube \(time: \d+, band: 10, y: 4, x: 5\)", SENTINEL2),
        (lambda: placed().rename(time="t", y="lat", x="lon"), r"Sentinel-2 cube \(t: ", SENTINEL2),
        (lambda: placed().isel(time=0), r"Sentinel-2 cube \(band: 10, y: 4, x: 5\)", SENTINEL2),
        (odc_stac, r"Sentinel-2 cube \(", SENTINEL2),
        (frames, r"Sentinel-2 cube \(time: 3, band: 10, ", SENTINEL2),
        (lambda: xr.DataArray(np.zeros((8, 1200, 3)), dims=("D", "y", "x")),
         r"Embedding cube \(D: 8, y: 1,200, x: 3\)", "Methods: pool, to_zarr, append, "),
        (lambda: xr.DataArray(np.zeros(8), dims="D"), r"Neither .* \(D: 8\)", "Expected: a DataArray "),
        (lambda: placed().isel(band=0), r"Neither .* \(time: ", "Expected: a DataArray "),
        (lambda: xr.Dataset({"a": ("x", [1])}), r"Neither .* \(x: 1\)", "Expected: a DataArray "),
    ],
)  # fmt: skip
def test_the_text_of_any_cube(make: Callable[[], xr.DataArray | xr.Dataset], first: str, second: str) -> None:
    with no_compute():
        cube = make().chunk()
        lines = repr(cube.anysat).splitlines()
        assert re.match(first, lines[0])
        assert lines[1].startswith(second)
        if make is not frames:
            assert html(cube) == f"<pre>{escape(repr(cube.anysat))}</pre>"


def test_no_table_without_the_coordinates_of_frames_or_as_text() -> None:
    with xr.set_options(display_style="text"):
        assert html(frames()).startswith("<pre>Sentinel-2 cube")
    for array in (frames().mean("time", keep_attrs=True), frames().isel(time=0)):
        assert html(array).startswith("<pre>")


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.mark.slow
def test_no_formatter_of_ipython_is_changed() -> None:
    code = f"""
import sys; sys.path.insert(0, {str(TESTS)!r})
from IPython.core.interactiveshell import InteractiveShell
formatters = InteractiveShell.instance().display_formatter.formatters
def state():
    tables = "type_printers", "deferred_printers", "singleton_printers"
    return {{k: [dict(getattr(f, t)) for t in tables] for k, f in formatters.items()}}
before = state()
import xr_anysat
print(state() == before, "text/html" in before)
from support.cubes import placed
figure = placed().anysat.preview()
print(state() == before, formatters["image/png"](figure)[:4])
"""
    assert python(code).splitlines() == ["True True", "True b'\\x89PNG'"]


@pytest.mark.slow
def test_importing_imports_nothing_heavy() -> None:
    heavy = "IPython", "matplotlib", "torch", "sklearn", "xr_anysat.view.jupyter"
    assert python(f"import sys, xr_anysat; print([m for m in {heavy} if m in sys.modules])") == "[]"


@pytest.mark.slow
def test_in_a_real_kernel(tmp_path: Path) -> None:
    cells = [
        f"import sys; sys.path.insert(0, {str(TESTS)!r})",
        "from support.cubes import placed, unreadable\nimport xarray as xr\nimport xr_anysat",
        "frames = placed().anysat.frames(2)\nframes.anysat",
        "unreadable(placed()).anysat.frames(2).anysat",
        "frames",
        "placed().anysat",
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
        assert len(thumbnails(shown["text/html"])) == pictures
        assert len(table(shown["text/html"])["date"]) == 2
        assert any(e.tag == "svg" for e in parsed(shown["text/html"]))
        assert shown["text/plain"].startswith("Sentinel-2 cube (time: 2, ")
    (alone,) = outputs[4]
    assert "xr-wrap" in alone["text/html"]
    assert "anysat-frames" not in alone["text/html"]
    assert outputs[5][0]["text/html"].startswith("<pre>Sentinel-2 cube")
    assert outputs[6][0]["text/plain"] == "False"
    assert outputs[8] == []
    assert outputs[9][0]["text/plain"] == "[]"
    for at in (7, 10):  # before pyplot was imported, and after
        (shown,) = outputs[at]
        assert imread(io.BytesIO(base64.b64decode(shown["image/png"]))).shape[1] > 500

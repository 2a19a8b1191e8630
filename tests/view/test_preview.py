"""Pictures of frames and embeddings: their contents, and how little is read for them."""

from __future__ import annotations

import importlib.util
import io
import pickle
from collections import Counter
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.dates import date2num
from matplotlib.figure import Figure
from matplotlib.image import imread
from support.cubes import odc_stac, placed, small_cube

import xr_anysat
from xr_anysat import AnySatError, CubeError, CubeTypeError, OptionError
from xr_anysat.cube.timeline import OUTSIDE, USED
from xr_anysat.view.calendar import COLORS
from xr_anysat.view.preview import percent
from xr_anysat.view.true_color import true_color

DATES = ("2021-11-05", "2022-01-10", "2022-01-20", "2022-05-01", "2022-12-31", "2023-01-01", "2023-06-01")


def axes_of(figure: Figure) -> dict[str, Axes]:
    return {axes.get_label(): axes for axes in figure.axes}


def caption(figure: Figure) -> str:
    return figure.get_suptitle()


def ticks(axes: Axes, color: str) -> list[float]:
    """Days of the ticks of one color on a calendar."""
    lines = [c for c in axes.collections if c.get_colors()[0][:3] == pytest.approx(rgb(color))]
    return [float(segment[0][0]) for line in lines for segment in line.get_segments()]


def rgb(color: str) -> tuple[float, ...]:
    return tuple(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))


def test_one_thumbnail_per_frame_and_the_calendar() -> None:
    cube = placed(DATES)
    cube[3, :, :, 0] = 0  # the only date of the second bin
    made = cube.anysat.frames(4, period="2022")
    figure = made.anysat.preview()
    axes = axes_of(figure)
    assert list(axes) == ["frame 0", "frame 1", "frame 2", "calendar"]
    assert axes["frame 0"].get_title() == "2022-02-15\nDOY 45, 2 obs.\n100 % valid"
    assert axes["frame 1"].get_title() == "2022-05-17\nDOY 136, 1 obs.\n80 % valid"
    image = axes["frame 1"].images[0].get_array()
    assert image.shape == (4, 5, 4)
    np.testing.assert_array_equal(image[..., 3] == 0, np.arange(5)[None] < np.ones((4, 1)))
    assert axes["frame 1"].patch.get_hatch()
    assert caption(figure).endswith("in every frame; hatched: not observed")

    calendar = axes["calendar"]
    assert calendar.get_title("left") == "2022-01-01 to 2022-12-31 in 4 bins; 1 empty, left out"
    labels = [t.get_text() for t in calendar.get_yticklabels()]
    assert labels == ["DOY of the frames", "in a frame (4)", "outside the period (3)"]
    assert ticks(calendar, COLORS[USED]) == [date2num(pd.Timestamp(d)) for d in DATES[1:5]]
    assert ticks(calendar, COLORS[OUTSIDE]) == [
        date2num(pd.Timestamp("2023-01-01"))
    ]  # the others are arrows at the edges
    assert [line.get_marker() for line in calendar.lines] == ["<", ">"]
    assert [t.get_text() for t in calendar.texts] == ["45", "136", "319"]
    assert [p.get_hatch() for p in calendar.patches if p.get_hatch()] == ["//////"]


def test_each_acquisition_is_a_frame() -> None:
    for cube in (placed(), odc_stac()):
        axes = axes_of(cube.anysat.preview())
        assert list(axes) == ["frame 0", "frame 1", "frame 2", "calendar"]
        assert axes["frame 1"].get_title() == "2022-03-01\nDOY 59\n100 % valid"
        assert axes["calendar"].get_title("left").endswith("one frame per acquisition")


@pytest.mark.slow
def test_one_stretch_for_all_frames() -> None:
    rng = np.random.default_rng(0)
    values = rng.uniform(200, 1800, (5, 3, 20, 20))
    values[2:] = 12_000  # dates of clouds
    values[:, :, 7, 7] = 1000
    values[1, 1, 3, 3] = np.nan
    colors, words = true_color(values)
    assert colors.shape == (5, 20, 20, 4)
    assert colors.dtype == np.uint8
    assert len({tuple(c) for c in colors[:, 7, 7]}) == 1
    assert tuple(colors[1, 3, 3])[3] == 0
    assert (colors[4, 0, 0] == 255).all()
    own = [np.percentile(v[:, np.isfinite(v).all(0)], (1, 99)) for v in values]
    low, high = np.median(own[:2], axis=0)
    assert words == f"True color, DN {low:.0f} to {high:.0f} in every frame"
    assert high < 1900
    want = 255 * ((1000 - low) / (high - low)) ** (1 / 1.4)
    assert colors[0, 7, 7, 0] == round(want)


def test_no_observations() -> None:
    cube = placed().astype("float32") * np.nan
    figure = cube.anysat.frames(2).anysat.preview()
    assert caption(figure) == "No observations; hatched: not observed"
    assert all("0 % valid" in a.get_title() for a in figure.axes[:-1])


def test_percent_is_0_or_100_only_if_exact() -> None:
    assert [percent(v) for v in (0, 0.004, 0.5, 0.9999, 1)] == ["0 %", "< 1 %", "50 %", "> 99 %", "100 %"]


def counted(shape: tuple[int, ...], chunk: int, read: Counter[tuple[int, ...]]) -> xr.DataArray:
    """A lazy cube that counts how often each of its chunks is read."""

    def block(values: np.ndarray, block_info: Any = None) -> np.ndarray:
        read[tuple(block_info[0]["chunk-location"])] += 1
        return values

    whole = da.full(shape, 1000, chunks=(1, -1, chunk, chunk), dtype="uint16")
    data = whole.map_blocks(block, dtype="uint16", meta=np.empty((0,) * 4, "uint16"))
    days = pd.date_range("2022-01-15", periods=shape[0], freq="MS")
    return xr.DataArray(
        data, dims=("time", "band", "y", "x"), coords={"time": days, "band": list(xr_anysat.BANDS)}
    )


@pytest.mark.parametrize("composed", [False, True])
def test_only_the_center_of_a_large_lazy_cube_is_read_once(composed: bool) -> None:
    read: Counter[tuple[int, ...]] = Counter()
    cube = counted((3, 10, 160, 160), 32, read)
    figure = (cube.anysat.frames(3) if composed else cube).anysat.preview(size=40)
    assert set(read.values()) == {1}
    assert {(y, x) for _, _, y, x in read} == {(y, x) for y in (1, 2, 3) for x in (1, 2, 3)}
    assert "the central 40 × 40 of 160 × 160 pixels" in caption(figure)
    read.clear()
    figure = cube.anysat.preview(size=None)
    assert len(read) == 3 * 25
    assert set(read.values()) == {1}
    assert "central" not in caption(figure)


def test_large_thumbnails_are_decimated_but_the_valid_share_is_not() -> None:
    cube = placed(height=900, width=500)
    cube[:, :, 1::2] = 0
    figure = cube.anysat.frames(1).anysat.preview()
    assert figure.axes[0].images[0].get_array().shape == (300, 167, 4)
    assert "50 % valid" in figure.axes[0].get_title()


def test_many_dates_fill_rows_and_too_many_are_refused() -> None:
    dates = pd.date_range("2022-01-01", periods=97, freq="3D")
    figure = placed(dates[:96]).anysat.preview()
    assert len(figure.axes) == 97
    places = {a.get_subplotspec().get_gridspec().get_geometry() for a in figure.axes[:-1]}
    assert places == {(12, 8)}
    with pytest.raises(
        OptionError, match=r"97 acquisitions are too many .* at most 96: compose them with .*frames\(8\)"
    ):
        placed(dates).anysat.preview()


def test_a_figure_that_jupyter_shows_is_a_figure_of_matplotlib() -> None:
    figure = placed().anysat.preview()
    assert isinstance(figure, Figure)
    again = pickle.loads(pickle.dumps(figure))
    shown, shown_again = (imread(io.BytesIO(f._repr_png_())) for f in (figure, again))
    assert shown.shape[1] > 500
    np.testing.assert_array_equal(shown, shown_again)


def test_no_state_is_left_in_pyplot() -> None:
    others, mine = plt.get_fignums(), plt.figure()
    figure = placed().anysat.preview()
    assert plt.get_fignums() == [*others, mine.number]
    assert plt.gcf() is mine
    plt.close(mine)
    figure.draw_without_rendering()


def test_invalid_arguments_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (0, -3, 1.5, True, "all"):
        with pytest.raises(
            OptionError, match=r"size=.*: expected a positive whole number of pixels, or None"
        ):
            placed().anysat.preview(size=size)
    with pytest.raises(OptionError, match="model= sets the colors of an embedding"):
        placed().anysat.preview(model="base")
    with pytest.raises(CubeError, match="missing B8A"):
        placed().drop_sel(band="B8A").anysat.preview()
    with pytest.raises(CubeError, match=r"lack the coordinates n_obs, bin_end, .*cube\.anysat\.frames\(8\)"):
        placed().anysat.frames(2).drop_vars(["n_obs", "bin_end"]).anysat.preview()
    with pytest.raises(CubeTypeError, match=r"one vector \(D,\).*\.anysat\.preview\(\)"):
        xr.DataArray(np.zeros(4), dims="D").anysat.preview()
    with pytest.raises(CubeTypeError, match="a list"):
        xr_anysat.preview([])  # type: ignore[arg-type]
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "matplotlib" else found(n))
    with pytest.raises(AnySatError, match=r"preview needs matplotlib: pip install 'xr_anysat\[analysis\]'"):
        placed().anysat.preview()


# ---------------------------------------------------------------------- embeddings


@pytest.fixture(scope="module")
def emb() -> xr.DataArray:
    cube = small_cube(height=40, width=40, dtype="float32", dates=3, gaps=0)
    cube[..., :4, :6] = np.nan
    return cube.anysat.embed(2, norm="pastis", patch_size=20, model="tiny", weights="random")


def test_an_embedding_on_its_map(emb: xr.DataArray) -> None:
    figure = emb.anysat.preview()
    (axes,) = figure.axes
    image = axes.images[0].get_array()
    assert image.shape == (*emb.shape[1:], 4)
    np.testing.assert_array_equal(image[..., 3] > 0, emb.notnull().all("D"))
    assert (image[..., 3] == 0).any()
    box = emb.odc.geobox.boundingbox
    assert axes.images[0].get_extent() == [box.left, box.right, box.bottom, box.top]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Easting in m (EPSG:32632)", "Northing in m")
    assert [t.get_text() for t in axes.texts] == ["100 m"]
    np.testing.assert_allclose(np.ptp(axes.lines[0].get_xdata()), 100)
    words = caption(figure).split("\n")
    assert words[0] == "AnySat patch embedding, 256 channels"
    assert words[1].startswith("Three principal components as red, green and blue, ")
    assert words[2:] == ["Hatched: no embedding", "Random weights: these colors have no learned meaning"]


def test_colors_of_another_embedding(emb: xr.DataArray) -> None:
    from xr_anysat.analysis.components import rgb

    want, model = rgb(emb)
    half = emb.isel(x=slice(10, None))
    image = half.anysat.preview(model=model).axes[0].images[0].get_array()
    np.testing.assert_array_equal(image, want.isel(x=slice(10, None)).transpose("y", "x", "band"))


def test_only_the_drawn_part_of_a_lazy_embedding_is_computed_once(emb: xr.DataArray) -> None:
    read: Counter[tuple[int, ...]] = Counter()

    def block(values: np.ndarray, block_info: Any = None) -> np.ndarray:
        read[tuple(block_info[0]["chunk-location"])] += 1
        return values

    chunked = emb.chunk(y=4, x=4)
    lazy = chunked.copy(
        data=chunked.data.map_blocks(block, dtype="float32", meta=np.empty((0,) * 3, "float32"))
    )
    figure = lazy.anysat.preview(size=8)
    assert "the central 8 × 8 of" in caption(figure)
    assert set(read.values()) == {1}
    assert len(read) <= 9


def test_an_embedding_without_a_crs(emb: xr.DataArray) -> None:
    axes = emb.drop_vars(["spatial_ref", "y", "x"]).drop_encoding().anysat.preview().axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("column", "row")
    assert not axes.texts
    assert axes.images[0].get_extent() == [0, emb.sizes["x"], emb.sizes["y"], 0]

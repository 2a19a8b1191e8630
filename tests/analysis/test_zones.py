"""Means over polygons: exact shares of cells, against exactextract and shapely."""

from __future__ import annotations

import geopandas as gpd
import numpy as np
import odc.geo.xr  # noqa: F401
import pytest
import shapely
import shapely.affinity
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from xr_anysat.analysis.zones import cell_shares

LEFT, TOP, CRS = 600_000, 5_000_000, "EPSG:32632"


def cube_of(values: np.ndarray) -> xr.DataArray:
    """Cells of 10 m."""
    y, x = (10.0 * np.arange(n) + 5 for n in values.shape[1:])
    coords = {"y": TOP - y, "x": LEFT + x}
    return xr.DataArray(values.astype("float32"), coords, ("D", "y", "x"), "anysat").odc.assign_crs(CRS)


def field(kind: str, x: float, y: float, size: float, angle: float) -> shapely.Geometry:
    """A polygon of about `size` m at (x, y) m from the corner of the cube."""
    square = shapely.box(-0.5, -0.5, 0.5, 0.5)
    shape = {
        "square": square,
        "disk": shapely.Point(0, 0).buffer(0.5),
        "hole": square.difference(shapely.Point(0.1, 0).buffer(0.3)),
        "parts": shapely.MultiPolygon([shapely.box(-0.5, -0.5, -0.1, 0), shapely.box(0.2, 0.1, 0.5, 0.5)]),
        "sliver": shapely.box(-0.5, 0, 0.5, 0.001),
    }[kind]
    turned = shapely.affinity.scale(shapely.affinity.rotate(shape, angle, (0, 0)), size, size, origin=(0, 0))
    return shapely.affinity.translate(turned, LEFT + x, TOP - y)


fields = st.builds(
    field,
    st.sampled_from(["square", "disk", "hole", "parts", "sliver"]),
    st.floats(-50, 500),
    st.floats(-50, 400),
    st.sampled_from([0.5, 3.0, 10.0, 47.0, 160.0, 900.0]),
    st.sampled_from([0.0, 45.0, 13.7]),
)


@settings(max_examples=60)
@given(st.lists(fields, min_size=1, max_size=4))
def test_zonal_is_what_exactextract_computes(shapes: list[shapely.Geometry]) -> None:
    exactextract = pytest.importorskip("exactextract")
    from exactextract.raster import NumPyRasterSource

    rng = np.random.default_rng(0)
    emb = cube_of(rng.normal(size=(2, 35, 41)) + 5)
    emb[:, 4:9, 10:20] = np.nan
    series = gpd.GeoSeries(shapes, crs=CRS)
    got = emb.anysat.zonal(series)
    bounds = {"xmin": LEFT, "xmax": LEFT + 410, "ymin": TOP - 350, "ymax": TOP}
    for channel in range(2):
        raster = NumPyRasterSource(emb.values[channel].astype(float), **bounds, srs_wkt=series.crs.to_wkt())
        oracle = exactextract.exact_extract(
            raster, series.to_frame("geometry"), ["mean", "count"], output="pandas"
        )
        # exactextract computes shares in float32
        np.testing.assert_allclose(
            got["cells"] * got["valid_share"].fillna(0), oracle["count"], rtol=1e-4, atol=1e-5
        )
        ok = got["cells"] * got["valid_share"].fillna(0) > 1e-3
        np.testing.assert_allclose(got[f"emb_00{channel}"][ok], oracle["mean"][ok], rtol=1e-5)


@settings(max_examples=40)
@given(fields, st.integers(1, 40), st.integers(1, 40))
def test_the_shares_of_a_place_add_up_to_its_area(shape: shapely.Geometry, height: int, width: int) -> None:
    place = shapely.transform(shape, lambda xy: (xy - [LEFT, TOP]) / [10, -10])
    shares = cell_shares(place, 2, -1, (height, width))
    assert ((shares >= 0) & (shares <= 1)).all()
    inside = shapely.intersection(place, shapely.box(-1, 2, width - 1, height + 2))
    assert shares.sum() == pytest.approx(inside.area, abs=1e-9)


def test_zonal_over_several_blocks_is_one_sum() -> None:
    """Chunks change no bit; a polygon smaller than a cell has the embedding of its cell."""
    rng = np.random.default_rng(0)
    emb = cube_of(rng.normal(size=(3, 300, 520)))
    disk, small = field("disk", 2600, 1500, 2800, 0), field("disk", 33, 33, 2, 0)
    series = gpd.GeoSeries([disk, None, small], crs=CRS)
    got = emb.anysat.zonal(series)
    names = ["emb_000", "emb_001", "emb_002"]
    x, y = np.meshgrid(np.arange(520), np.arange(300))
    cells = shapely.box(LEFT + 10 * x, TOP - 10 * y, LEFT + 10 * x + 10, TOP - 10 * y - 10)
    share = shapely.area(shapely.intersection(disk, cells)) / 100
    np.testing.assert_allclose(got[names].iloc[0], (emb.values * share).sum((1, 2)) / share.sum(), rtol=1e-5)
    np.testing.assert_allclose(got[names].iloc[2], emb.values[:, 3, 3], rtol=1e-6)
    assert got["status"].tolist() == ["ok", "outside", "ok"]
    assert got["cells"].tolist() == pytest.approx([disk.area / 100, 0, small.area / 100])
    for chunks in ((100, 520), (300, 33), (256, 256)):
        other = emb.chunk(y=chunks[0], x=chunks[1]).anysat.zonal(series)
        np.testing.assert_array_equal(other[names], got[names])


@pytest.mark.slow
def test_a_border_of_many_points_is_quick_to_cut() -> None:
    """A polygon of 50 000 points over 350 000 cells takes seconds, not minutes."""
    angle = np.linspace(0, 2 * np.pi, 50_000, endpoint=False)
    radius = 300 + 20 * np.sin(100 * angle)
    place = shapely.Polygon(np.c_[300 + radius * np.cos(angle), 300 + radius * np.sin(angle)])
    shares = sum(
        cell_shares(place, i, j, (256, 256)).sum()
        for i in range(-256, 768, 256)
        for j in range(-256, 768, 256)
    )
    assert shares == pytest.approx(place.area)

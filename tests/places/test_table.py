"""The files of a table: any table comes back, and what is damaged is refused."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import files_of

import xr_anysat
from xr_anysat.errors import OptionError, StoreError
from xr_anysat.places import table as tables
from xr_anysat.store.location import parse_location, write


def results_of(rows: list[int], channels: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(len(rows), channels)).astype(np.float32)
    bad = rng.random(len(rows)) < 0.3
    vectors[bad] = np.nan
    return {
        "rows": np.array(rows, int), "vectors": vectors,
        "status": np.where(bad, "invalid", "ok").astype(object), "message": np.where(bad, "clouds", "").astype(object),
    }  # fmt: skip


def write_table(
    frame: gpd.GeoDataFrame, folder: Path, groups: list[list[int]], codec: str | None = None
) -> None:
    target = parse_location(folder)
    root, schema = target.root(), tables.table_schema(frame, 5, codec)
    manifest = {
        "anysat_table": 1, "rows": len(frame), "groups": len(groups), "channels": 5, "codec": codec,
        "columns": list(frame.columns), "identity": {},
    }  # fmt: skip
    write(root, tables.MANIFEST, json.dumps(manifest).encode(), target)
    for number, rows in enumerate(groups):
        part = tables.part_table(frame, results_of(rows, 5, number), schema, None)
        tables.write_part(root, tables.part_name(number), part, target)


columns = {
    "whole": st.integers(-(2**62), 2**62),
    "real": st.floats(width=64),
    "text": st.one_of(st.none(), st.text(st.characters(codec="utf-8"), max_size=5)),
    "flag": st.booleans(),
    "day": st.datetimes(min_value=datetime(1900, 1, 1), max_value=datetime(2200, 1, 1)),
}
shapes = st.one_of(
    st.none(),
    st.just(shapely.Point()),
    st.builds(shapely.Point, st.floats(-180, 180), st.floats(-90, 90)),
    st.builds(lambda x, y: shapely.box(x, y, x + 1, y + 1), st.floats(-170, 170), st.floats(-80, 80)),
)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_table_comes_back(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    n = data.draw(st.integers(1, 9))
    chosen = data.draw(st.lists(st.sampled_from(sorted(columns)), unique=True))
    frame = gpd.GeoDataFrame(
        {name: data.draw(st.lists(columns[name], min_size=n, max_size=n)) for name in chosen},
        geometry=gpd.GeoSeries(data.draw(st.lists(shapes, min_size=n, max_size=n)), crs="EPSG:4326"),
    )
    if data.draw(st.booleans()):
        frame = frame.rename_geometry("where")
    index = data.draw(st.sampled_from(["range", "text", "repeated"]))
    if index != "range":
        frame.index = pd.Index(["a"] * n if index == "repeated" else [f"r{i}" for i in range(n)], name="id")
    order = data.draw(st.permutations(range(n)))
    cut = data.draw(st.integers(0, n - 1))
    groups = [g for g in (list(order[:cut]), list(order[cut:])) if g]
    folder = tmp_path_factory.mktemp("tables") / "x"
    write_table(frame, folder, groups)
    back = xr_anysat.open_table(folder)
    pd.testing.assert_frame_equal(
        pd.DataFrame(back[list(frame.columns)]), pd.DataFrame(frame), check_dtype=False, check_index_type=False,
        check_names=index != "range",
    )  # fmt: skip
    assert back.crs == frame.crs
    assert back.geometry.name == frame.geometry.name
    want = np.full((n, 5), np.nan, np.float32)
    for number, rows in enumerate(groups):
        want[rows] = results_of(rows, 5, number)["vectors"]
    np.testing.assert_array_equal(np.stack(back["embedding"]), want)
    plain = gpd.read_parquet(folder)
    assert len(plain) == n


def frame_of(n: int = 6) -> gpd.GeoDataFrame:
    return gpd.GeoDataFrame(
        {"name": list("abcdef")[:n]}, geometry=gpd.points_from_xy(range(n), range(n)), crs=4326
    )


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (
            frame_of().assign(bbox=1, anysat_row=2),
            r"places have columns 'bbox', 'anysat_row' already: .*drop",
        ),
        (frame_of().rename(columns={"name": 3}), r"columns \[3\] whose names are not texts"),
        (frame_of().assign(odd=[1, "a", {}, [], None, 2.0]), "a column that Parquet cannot represent"),
    ],
)
def test_tables_that_cannot_be_stored(frame: gpd.GeoDataFrame, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        tables.table_schema(frame, 5, None)


def test_the_metadata_are_geoparquet(tmp_path: Path) -> None:
    """Version, primary column, types, CRS and covering, as https://geoparquet.org/releases/v1.1.0/ requires."""
    import pyarrow.parquet as pq

    write_table(frame_of(), tmp_path / "x", [[0, 1, 2], [3, 4, 5]], "int8")
    for file in sorted((tmp_path / "x").glob("*.parquet")):
        schema = pq.read_schema(file)
        geo = json.loads(schema.metadata[b"geo"])
        assert geo["version"] == "1.1.0"
        about = geo["columns"][geo["primary_column"]]
        assert about["encoding"] == "WKB"
        assert about["geometry_types"] == ["Point"]
        assert about["crs"]["id"] == {"authority": "EPSG", "code": 4326}
        assert about["covering"]["bbox"]["xmax"] == ["bbox", "xmax"]
        assert str(schema.field("embedding").type) == "fixed_size_list<item: int8>[5]" or "int8" in str(
            schema.field("embedding").type
        )
        assert str(schema.field("embedding_scale").type) == "float"


@pytest.mark.parametrize("codec", [None, "int8"])
def test_damaged_files_are_refused(codec: str | None, tmp_path: Path) -> None:
    """Every cut, and flipped bytes: a StoreError that names the file, or the same values."""
    folder = tmp_path / "x"
    write_table(frame_of(), folder, [[0, 1, 2], [3, 4, 5]], codec)
    want = xr_anysat.open_table(folder)
    file = folder / "group-000001.parquet"
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    for content in (
        b"", b"PAR1", whole[:-1], whole[: len(whole) // 2], b"x" * 100,
        *(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :] for at in rng.integers(0, len(whole), 60)),
    ):  # fmt: skip
        file.write_bytes(content)
        try:
            got = xr_anysat.open_table(folder)
        except StoreError as error:
            assert "damaged" in str(error)  # noqa: PT017
        else:
            assert len(got) == len(want)
    file.write_bytes(b"")
    with pytest.raises(
        StoreError, match=r"x' is damaged: group-000001\.parquet: .*Delete this file and repeat"
    ):
        xr_anysat.open_table(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rows": -1}, "'rows' is -1"),
        ({"rows": 5}, "its rows are not those of one table of 5 rows"),
        ({"channels": 2**40}, "'channels' is"),
        ({"channels": 6}, "column 'embedding' is .*expected"),
        ({"codec": "pickle"}, "'codec' is 'pickle'"),
        ({"columns": "name"}, "'columns' is 'name'"),
        ({"anysat_table": 2}, "needs a newer xr_anysat"),
        ({"identity": None}, "'identity' is"),
    ],
)
def test_damaged_manifests_are_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    write_table(frame_of(), tmp_path / "x", [[0, 1, 2], [3, 4, 5]])
    file = tmp_path / "x" / tables.MANIFEST
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(StoreError, match=words):
        xr_anysat.open_table(tmp_path / "x")


def test_what_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"contains no table: expected a folder that embed_places"):
        xr_anysat.open_table(tmp_path / "nothing")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / tables.MANIFEST).write_text("{")
    with pytest.raises(StoreError, match=r"_anysat\.json: .*Delete the folder, or give another path"):
        xr_anysat.open_table(tmp_path / "x")
    write_table(frame_of(), tmp_path / "y", [])
    with pytest.raises(StoreError, match="no finished group yet: repeat the call"):
        xr_anysat.open_table(tmp_path / "y")
    assert list(files_of(tmp_path / "y")) == [tables.MANIFEST]

"""`embed_places`: from a table and a catalog to a table of embeddings."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import geopandas as gpd
import numpy as np
import pandas as pd
import pystac
import pytest
import s3fs
import shapely
from support.fault_runs import start, watch
from support.paths import files_of
from support.s3_server import S3Server, storage_options
from support.stac_servers import Fault, FaultyServer

import xr_anysat
from xr_anysat.demo.scene import make_scene
from xr_anysat.errors import CatalogError, OptionError, ReadError, StoreError
from xr_anysat.stac import loading, search

pytestmark = pytest.mark.slow

ORIGINS = {"EPSG:32632": (688_140, 5_104_580), "EPSG:32633": (288_140, 5_104_580)}
MODEL: dict[str, Any] = {"frames": 3, "model": "tiny", "weights": "random", "max_cloud": None}


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> list[pystac.Item]:
    """Scenes of 1.2 km in two UTM zones and two years."""
    found = []
    for crs, origin in ORIGINS.items():
        for year in (2021, 2022):
            folder = tmp_path_factory.mktemp("scenes")
            scene = make_scene(folder, size=(120, 120), dates=5, year=year, crs=crs, origin=origin, seed=year)
            for item in pystac.ItemCollection.from_file(str(scene.items)):
                item.id = f"{crs[-5:]}-{item.id}"
                found.append(item)
    return found


def points_in(crs: str, count: int, seed: int = 0) -> gpd.GeoSeries:
    rng = np.random.default_rng(seed)
    left, top = ORIGINS[crs]
    at = gpd.points_from_xy(left + rng.uniform(300, 900, count), top - rng.uniform(300, 900, count))
    return gpd.GeoSeries(at, crs=crs)


@pytest.fixture(scope="module")
def plots() -> gpd.GeoDataFrame:
    """Points and fields in two zones, with a year per row."""
    shapes = [points_in(crs, 6, seed).to_crs(4326) for seed, crs in enumerate(ORIGINS)]
    fields = points_in("EPSG:32633", 2, 7).buffer(70).to_crs(4326)
    geometry = gpd.GeoSeries(pd.concat([*shapes, fields], ignore_index=True), crs=4326)
    table = gpd.GeoDataFrame({"name": [f"p{i}" for i in range(14)]}, geometry=geometry)
    table["year"] = [2021, 2022] * 7
    table["label"] = np.where(np.arange(14) % 3, "wheat", None)
    return table.sample(frac=1, random_state=0)[["year", "geometry", "name", "label"]]


@pytest.fixture(scope="module")
def few(plots: gpd.GeoDataFrame) -> gpd.GeoDataFrame:
    """One plot per zone and year, and a field: a table of four groups that is quick to compute."""
    zone = plots.geometry.bounds["minx"] > 12
    kind = plots.geometry.geom_type
    return plots.groupby([zone, plots["year"], kind], sort=False).head(1)


@pytest.fixture(scope="module")
def in_memory(items: list[pystac.Item], plots: gpd.GeoDataFrame) -> gpd.GeoDataFrame:
    """The result for all plots."""
    return xr_anysat.embed_places(plots, "year", catalog=items, **MODEL)


def vectors(table: gpd.GeoDataFrame) -> np.ndarray:
    return np.stack(table["embedding"])


def same_tables(a: gpd.GeoDataFrame, b: gpd.GeoDataFrame) -> None:
    np.testing.assert_array_equal(vectors(a), vectors(b))
    pd.testing.assert_frame_equal(
        pd.DataFrame(a.drop(columns="embedding")),
        pd.DataFrame(b.drop(columns="embedding")),
        check_dtype=False,
    )


# ---------------------------------------------------------------------- results


@pytest.mark.parametrize(
    "options",
    [{}, {"tile": 16, "overlap": 8, "patch_size": 40, "reduce": "mean"}, {"output": "dense", "dilate_m": 40}],
    ids=["patch", "overlap", "dense"],
)
def test_it_is_what_a_loop_gives(
    items: list[pystac.Item], plots: gpd.GeoDataFrame, options: dict[str, Any]
) -> None:
    """open_s2 around each place, and embed_at there: the same bits at points."""
    plots = plots.iloc[1::2]
    assert set(plots.geom_type) == {"Point", "Polygon"}
    table = xr_anysat.embed_places(plots, "year", catalog=items, **MODEL, **options)
    assert table["status"].tolist() == ["ok"] * len(plots)
    opening = {k: v for k, v in options.items() if k == "dilate_m"}
    embedding = {k: v for k, v in {**MODEL, **options}.items() if k not in ("dilate_m", "max_cloud")}
    for row in range(len(plots)):
        crs = "EPSG:32632" if plots.geometry.iloc[row].centroid.x < 12 else "EPSG:32633"
        bounds = plots.geometry.iloc[[row]].to_crs(crs).buffer(500).to_crs(4326).total_bounds
        cube = xr_anysat.open_s2(
            bbox=bounds,
            datetime=str(plots["year"].iloc[row]),
            catalog=items,
            max_cloud=None,
            crs=crs,
            **opening,
        )
        alone = cube.anysat.embed_at(plots.iloc[[row]], anchor="grid", norm="pastis", **embedding)
        is_point = plots.geometry.iloc[row].geom_type == "Point"
        np.testing.assert_allclose(
            table["embedding"].iloc[row], alone["embedding"].iloc[0], rtol=0, atol=0 if is_point else 1e-6
        )


def test_the_table_is_kept(items: list[pystac.Item], plots: gpd.GeoDataFrame) -> None:
    before = plots.copy()
    table = xr_anysat.embed_places(plots, "year", catalog=items, **MODEL)
    pd.testing.assert_frame_equal(pd.DataFrame(plots), pd.DataFrame(before))
    pd.testing.assert_frame_equal(pd.DataFrame(table[list(plots.columns)]), pd.DataFrame(plots))
    assert table.columns.tolist() == [*plots.columns, "embedding", "status", "message"]
    assert table.crs == plots.crs
    record = json.loads(table.attrs["embedding"])
    config = json.loads(record["config"])
    assert (config["anchor"], config["norm"], config["model"]) == ("grid", "pastis", "tiny")
    assert "temporal_window" not in record  # it differs between rows
    some = xr_anysat.embed_places(plots.iloc[[3, 8]], "year", catalog=items, **MODEL)
    np.testing.assert_array_equal(vectors(some), vectors(table)[[3, 8]])


def test_periods(items: list[pystac.Item], plots: gpd.GeoDataFrame) -> None:
    """One period for all; years, periods and dates with days around them, as numbers, texts and dates."""
    few = plots.iloc[:4]
    want = vectors(xr_anysat.embed_places(few, "2022", catalog=items, **MODEL))
    columns: dict[str, Any] = {
        "year": [2022, 2022.0, "2022", np.int64(2022)],
        "period": ["2022-01-01/2023-01-01", ("2022-01-01", "2023-01-01"), pd.Period("2022"), "2022"],
        "all": [pd.Timestamp("2022-07-02")] * 4,
    }
    for name, values in columns.items():
        table = few.assign(**{name: pd.Series(values, few.index, dtype=object)})
        window = 182 if name == "all" else None
        got = xr_anysat.embed_places(table, name, window=window, catalog=items, **MODEL)
        assert got["status"].tolist() == ["ok"] * 4, got["message"].tolist()
        np.testing.assert_array_equal(vectors(got), want)


def test_rows_that_cannot_be_embedded(items: list[pystac.Item]) -> None:
    """Each row is answered on its own; the others are embedded."""
    left, top = ORIGINS["EPSG:32632"]
    good = gpd.GeoSeries([shapely.Point(left + 500, top - 500)], crs=32632).to_crs(4326).iloc[0]
    bow = shapely.Polygon([(11, 46), (11.1, 46.1), (11.1, 46), (11, 46.1)])
    rows: list[tuple[Any, Any, str, str]] = [
        (good, 2022, "ok", ""),
        (None, 2022, "refused", "no geometry: expected a point or a polygon"),
        (shapely.Point(), 2022, "refused", "no geometry"),
        (bow, 2022, "refused", r"crosses itself: repair it, places\.make_valid\(\)"),
        (shapely.Point(11, 89), 2022, "refused", r"no UTM zone contains .*crs='EPSG:3995'"),
        (shapely.Point(11, -85), 2022, "refused", r"no UTM zone contains .*crs='EPSG:3031'"),
        (shapely.box(-179.9, 10, 179.9, 10.1), 2022, "refused", "crosses the antimeridian"),
        (shapely.Point(180, 10), 2022, "not found", "none of the .* outside the area"),
        (good, None, "refused", "column 'when' is empty: expected a year, a period or a date"),
        (good, float("nan"), "refused", "column 'when' is empty"),
        (good, "last year", "refused", r"column 'when' is 'last year': .*expected '2022'"),
        (good, pd.Timestamp("2022-06-01"), "refused", "a date needs the days around it, such as window=90"),
        (good, "2022-06-01/2022-06-02", "refused", "cannot be cut into 3 frames"),
        (good, 2150, "not found", "none of the .* outside the period"),
        (good, 3000, "refused", "expected years from 1900 to 2200"),
        (shapely.box(11.43, 46.05, 11.44, 46.06), 2022, "ok", ""),
    ]
    table = gpd.GeoDataFrame(
        {"when": pd.Series([row[1] for row in rows], dtype=object)},
        geometry=[row[0] for row in rows],
        crs=4326,
    )
    got = xr_anysat.embed_places(table, "when", catalog=items, **MODEL)
    for (_, _, status, words), row in zip(rows, got.itertuples(), strict=True):
        assert row.status == status, (row, words)
        assert pd.Series([row.message]).str.contains(words).all(), (row.message, words)
        assert np.isfinite(row.embedding).all() == (status == "ok")
    with pytest.raises(OptionError, match=r"places, row 1 \(index 1\): no geometry"):
        xr_anysat.embed_places(table, "when", catalog=items, on_error="raise", **MODEL)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"places": lambda t: t.set_crs(None, allow_override=True)}, r"places have no CRS: set it, places\.set_crs"),
        ({"places": lambda t: t.set_geometry(t.geometry.boundary)}, "places contain .*LineString: expected only"),
        ({"places": lambda t: t.assign(status=1)}, "columns 'status' of places"),
        ({"places": lambda t: pd.DataFrame(t)}, "places is a DataFrame: expected a GeoDataFrame"),
        ({"datetime": "yaer"}, r"datetime='yaer': expected .* or the name of a column, one of \['year', 'name'"),
        ({"window": 3}, "window=3 has no meaning with one period for all"),
        ({"norm": "per_tile_zscore"}, r"norm=xr_anysat\.statistics_at\(places"),
        ({"on_error": "ignore"}, "on_error='ignore': expected one of 'status', 'raise', 'invalid'"),
        ({"retry": "all"}, "retry='all': expected one of 'failed', or None"),
        ({"codec": "int8"}, "are about a stored table: pass out= with them"),
        ({"mask": "cloud"}, "mask='cloud': expected 'scl', None"),
        ({"tile": 25, "patch_size": 20}, "tile=25 pixels is not a multiple"),
        ({"crs": "EPSG:4326"}, "expected 'utm' or a projected CRS in meters"),
    ],
)  # fmt: skip
def test_refusals(
    items: list[pystac.Item], plots: gpd.GeoDataFrame, change: dict[str, Any], words: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(search, "_search", None)
    call: dict[str, Any] = {"places": plots, "datetime": "2022", **MODEL, "catalog": items, **change}
    if callable(call["places"]):
        call["places"] = call["places"](plots)
    with pytest.raises(OptionError, match=words):
        xr_anysat.embed_places(**call)


def test_options_that_do_not_exist(items: list[pystac.Item], plots: gpd.GeoDataFrame) -> None:
    for name in ("period", "anchor", "resize", "pool", "bands", "nodata", "bbox", "chunks", "tiles"):
        with pytest.raises(TypeError, match=f"embed_places.. got an unexpected keyword argument '{name}'"):
            xr_anysat.embed_places(plots, "2022", catalog=items, **{name: None})


# ---------------------------------------------------------------------- searches and reads


@pytest.fixture
def server(items: list[pystac.Item]) -> Iterator[FaultyServer]:
    with FaultyServer() as served:
        moved = []
        for item in items:
            copy = item.clone()
            for asset in copy.assets.values():
                path = Path(asset.href.removeprefix("file://"))
                served.files[f"/{copy.id}/{path.name}"] = path.read_bytes()
                asset.href = f"{served.url}/{copy.id}/{path.name}"
            moved.append(copy.to_dict())
        served.items = moved
        yield served


@pytest.fixture(scope="module")
def clusters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FaultyServer, gpd.GeoSeries]]:
    """A server with 20 scenes of 720 m, 20 km apart, and 100 points in each."""
    left, top = ORIGINS["EPSG:32632"]
    rng = np.random.default_rng(0)
    points = []
    with FaultyServer() as served:
        folder = tmp_path_factory.mktemp("clusters")
        for k in range(20):
            x, y = left - k % 5 * 20_000, top - k // 5 * 20_000
            scene = make_scene(folder / str(k), size=(72, 72), dates=3, origin=(x, y), seed=k)
            for item in pystac.ItemCollection.from_file(str(scene.items)):
                item.id = f"{k}-{item.id}"
                for asset in item.assets.values():
                    path = Path(asset.href.removeprefix("file://"))
                    served.files[f"/{item.id}/{path.name}"] = path.read_bytes()
                    asset.href = f"{served.url}/{item.id}/{path.name}"
                served.items.append(item.to_dict())
            at = gpd.points_from_xy(x + rng.uniform(60, 660, 100), y - rng.uniform(60, 660, 100))
            points.append(gpd.GeoSeries(at, crs=32632))
        yield served, pd.concat(points, ignore_index=True)


def test_searches_and_reads(
    clusters: tuple[FaultyServer, gpd.GeoSeries], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most one search per group; each file is opened once per group; only windows of places are read."""
    server, points = clusters
    read = []
    real = loading._read_parts

    def counted(sources: Any, geoboxes: Any, *args: Any) -> Any:
        read.append((len(sources), sum(g.shape[0] * g.shape[1] for g in geoboxes)))
        return real(sources, geoboxes, *args)

    monkeypatch.setattr(loading, "_read_parts", counted)
    options = {"patch_size": 40, "tile": 24, **MODEL}
    table = xr_anysat.embed_places(points.to_crs(4326), "2022", catalog=f"{server.url}/", **options)
    assert (table["status"] == "ok").mean() > 0.9  # a place may be under clouds on all three dates
    searches = server.counts("search")["/search"]
    assert searches <= xr_anysat.plan_places(points, "2022", catalog=server_items(server), **options).groups
    windows = {(int(y // -240), int(x // 240)) for x, y in zip(points.x, -points.y, strict=True)}
    assert len(read) == searches * 3  # dates
    assert all(scenes == 1 for scenes, _ in read)
    assert sum(pixels for _, pixels in read) <= 1.2 * 3 * len(windows) * 24 * 24


def server_items(server: FaultyServer) -> list[pystac.Item]:
    return [pystac.Item.from_dict(item) for item in server.items]


def test_unreadable_assets(
    server: FaultyServer, plots: gpd.GeoDataFrame, in_memory: gpd.GeoDataFrame, monkeypatch: Any
) -> None:
    """Rows that need an unreadable file have a status; retry tries them again, and nothing else."""
    from xr_anysat.stac import catalogs

    monkeypatch.setattr(catalogs, "WAIT", 0.01)
    monkeypatch.setattr(catalogs, "TRIES", 0)
    catalog = f"{server.url}/"
    broken = next(item["id"] for item in server.items if item["id"].startswith("32633-synthetic-2022"))
    server.faults[f"/{broken}/B03"] = lambda path, requested: Fault(status=404)
    got = xr_anysat.embed_places(plots, "year", catalog=catalog, **MODEL)
    hit = (plots.geometry.bounds["minx"] > 12) & (plots["year"] == 2022)
    assert (got["status"] == np.where(hit, "unreadable", "ok")).all()
    assert got["message"][hit].str.contains(f"asset 'green' of item '{broken}' cannot be read").all()
    np.testing.assert_array_equal(vectors(got[~hit]), vectors(in_memory[~hit]))
    with pytest.raises(ReadError, match="asset 'green'"):
        xr_anysat.embed_places(plots, "year", catalog=catalog, on_error="raise", **MODEL)
    without = xr_anysat.embed_places(plots[hit], "year", catalog=catalog, on_error="invalid", **MODEL)
    assert (without["status"] == "ok").all()


def test_a_catalog_that_does_not_answer(plots: gpd.GeoDataFrame, monkeypatch: Any) -> None:
    from xr_anysat.stac import catalogs

    monkeypatch.setattr(catalogs, "WAIT", 0.01)
    monkeypatch.setattr(catalogs, "TRIES", 0)
    options = {**MODEL, "catalog": "http://127.0.0.1:9/"}
    got = xr_anysat.embed_places(plots.iloc[:3], "2022", **options)
    assert got["status"].tolist() == ["unreadable"] * 3
    assert got["message"].str.contains("could not be searched").all()
    with pytest.raises(CatalogError, match="could not be searched"):
        xr_anysat.embed_places(plots.iloc[:3], "2022", on_error="raise", **options)


# ---------------------------------------------------------------------- stored tables


@pytest.mark.parametrize("codec", [None, "int8"])
def test_a_stored_table(
    items: list[pystac.Item], plots: gpd.GeoDataFrame, codec: str | None, tmp_path: Path
) -> None:
    """The same as in memory; other programs read it as it is."""
    import duckdb
    import pyarrow.dataset

    shapes = plots.assign(other=plots.geometry.centroid.to_crs(3857))
    shapes.loc[shapes.index[2], "geometry"] = None
    memory = xr_anysat.embed_places(shapes, "year", catalog=items, **MODEL)
    out = tmp_path / "plots.parquet"
    assert xr_anysat.embed_places(shapes, "year", out=out, codec=codec, catalog=items, **MODEL) == out
    table = xr_anysat.open_table(out)
    assert table.crs == plots.crs
    assert table["other"].crs.to_epsg() == 3857
    if codec is None:
        same_tables(table, memory)
    else:
        step = np.abs(vectors(memory)).max(1, keepdims=True) / 127
        assert (
            np.abs(vectors(table) - vectors(memory))[memory["status"] == "ok"]
            <= 0.51 * step[memory["status"] == "ok"]
        ).all()
    assert json.loads(table.attrs["embedding"]) == json.loads(memory.attrs["embedding"])

    plain = gpd.read_parquet(out).sort_values("anysat_row")
    assert plain.crs == plots.crs
    assert plain["name"].tolist() == plots["name"].tolist()
    if codec is None:
        missing = plain["embedding"].map(lambda vector: bool(np.isnan(vector).all()))
    else:
        missing = plain["embedding_scale"].isna()
    assert missing.tolist() == (memory["status"] != "ok").tolist()
    within = gpd.read_parquet(out, bbox=tuple(plots.geometry.iloc[0].bounds))
    assert plots["name"].iloc[0] in within["name"].tolist()
    arrow = pyarrow.dataset.dataset(out)
    assert arrow.count_rows() == len(plots)
    assert str(arrow.schema.field("embedding").type).startswith("fixed_size_list")
    found = duckdb.sql(
        f"select name, embedding[1], len(embedding) from read_parquet('{out}/*.parquet') order by anysat_row"
    )
    rows = found.fetchall()
    assert [row[0] for row in rows] == plots["name"].tolist()
    assert {row[2] for row in rows} == {256}


def test_resumed_and_refused(
    items: list[pystac.Item], plots: gpd.GeoDataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "plots.parquet"
    call = {"out": out, "catalog": items, **MODEL}
    xr_anysat.embed_places(plots, "year", **call)
    whole = files_of(out)
    (out / "group-000001.parquet").unlink()
    with pytest.warns(xr_anysat.AnySatWarning, match=r"not finished: \d of 14 rows are missing"):
        assert len(xr_anysat.open_table(out)) < 14
    seen: list[tuple[int, int]] = []
    xr_anysat.embed_places(plots, "year", progress=lambda done, total: seen.append((done, total)), **call)
    assert files_of(out) == whole
    assert seen[-1] == (4, 4)
    monkeypatch.setattr(search, "select_scenes", None)  # nothing is missing, so nothing is searched
    xr_anysat.embed_places(plots, "year", **call)
    for change, words in (
        ({"patch_size": 20}, "config.patch_size: 10 there, 20 here"),
        ({"weights": ("random", 1)}, "weights: "),
        ({"codec": "int8"}, 'codec: null there, "int8" here'),
        ({"max_cloud": 20}, "scenes.max_cloud"),
    ):
        with pytest.raises(
            StoreError, match=f"different places or settings and cannot be resumed: .*{words}"
        ):
            xr_anysat.embed_places(plots, "year", **{**call, **change})
    for other, words in (
        (plots.assign(name="x"), "places.name"),
        (plots.iloc[::-1], "places.index"),
        (plots.set_geometry(plots.geometry.translate(1e-6)), "places.geometry"),
    ):
        with pytest.raises(StoreError, match=f"cannot be resumed: .*{words}"):
            xr_anysat.embed_places(other, "year", **call)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="contains other files"):
        xr_anysat.embed_places(plots, "year", **{**call, "out": tmp_path / "else"})


def test_failed_rows_are_tried_again(
    server: FaultyServer, items: list[pystac.Item], few: gpd.GeoDataFrame, tmp_path: Path, monkeypatch: Any
) -> None:
    from xr_anysat.stac import catalogs

    monkeypatch.setattr(catalogs, "WAIT", 0.01)
    monkeypatch.setattr(catalogs, "TRIES", 0)
    good = xr_anysat.embed_places(few, "year", catalog=items, **MODEL)
    broken = next(item["id"] for item in server.items if item["id"].startswith("32633-synthetic-2022"))
    server.faults[f"/{broken}/B03"] = lambda path, requested: Fault(status=404)
    call = {"catalog": f"{server.url}/", "out": tmp_path / "plots", **MODEL}
    xr_anysat.embed_places(few, "year", **call)
    before = files_of(tmp_path)
    assert (xr_anysat.open_table(tmp_path / "plots")["status"] == "unreadable").any()
    server.faults.clear()
    server.wait_until_idle()  # other reads of the group that failed may still be running
    server.requests.clear()
    xr_anysat.embed_places(few, "year", **call)
    assert not server.requests
    xr_anysat.embed_places(few, "year", retry="failed", **call)
    assert server.counts("search")["/search"] == 1
    after = files_of(tmp_path)
    assert sum(before[name] != after[name] for name in after) == 1
    same_tables(xr_anysat.open_table(tmp_path / "plots"), good)


def _run(plots: gpd.GeoDataFrame, items: list[dict[str, Any]], out: Path, moment: int, say: Any) -> None:
    """Embed, and kill this process before operation number `moment` on files; otherwise say how many there were."""
    operations = watch(out.parent, moment)
    found = [pystac.Item.from_dict(item) for item in items]
    with dask.config.set(scheduler="threads", num_workers=2):
        xr_anysat.embed_places(plots, "year", out=out, catalog=found, **MODEL)
    say.send(len(operations))


@pytest.fixture(scope="module")
def undisturbed(
    items: list[pystac.Item], few: gpd.GeoDataFrame, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, bytes], int]:
    """Return the files of a table that was never interrupted, and the number of operations on files."""
    folder = tmp_path_factory.mktemp("whole")
    run = start(_run, few, [item.to_dict() for item in items], folder / "table", -1)
    operations = run.hears(timeout=100)
    run.process.join()
    return files_of(folder / "table"), operations


@pytest.mark.parametrize("seed", range(20))
def test_killed_at_a_random_moment(
    seed: int, undisturbed: tuple[dict[str, bytes], int], items: list[pystac.Item], few: gpd.GeoDataFrame,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Killed at any moment, the same call computes only what is missing, and ends bit-identical."""
    whole, operations = undisturbed
    out = tmp_path / "table"
    run = start(_run, few, [i.to_dict() for i in items], out, int(random.Random(seed).random() * operations))
    run.process.join()
    assert run.process.exitcode == -signal.SIGKILL
    left = sum(name.startswith("group") for name in whole) - len(list(out.glob("group-*.parquet")))
    seen: list[tuple[int, int]] = []
    xr_anysat.embed_places(few, "year", out=out, catalog=items, progress=lambda *at: seen.append(at), **MODEL)
    assert len(seen) == left + 1
    assert files_of(out) == whole


def test_in_a_bucket(
    items: list[pystac.Item], plots: gpd.GeoDataFrame, in_memory: gpd.GeoDataFrame, s3: S3Server
) -> None:
    """A table in a bucket is written, resumed and read like one in a folder."""
    options = storage_options(s3.url)
    call = {"out": "s3://bucket/tables/plots", "storage_options": options, "catalog": items, **MODEL}
    xr_anysat.embed_places(plots, "year", **call)
    files = s3fs.S3FileSystem(**options)
    files.rm("bucket/tables/plots/group-000002.parquet")
    seen: list[tuple[int, int]] = []
    xr_anysat.embed_places(plots, "year", progress=lambda *at: seen.append(at), **call)
    assert len(seen) == 2
    same_tables(xr_anysat.open_table(call["out"], storage_options=options), in_memory)
    nearest = xr_anysat.nearest(call["out"], in_memory.iloc[[0]], k=3, storage_options=options)
    assert nearest["name"].iloc[0] == plots["name"].iloc[0]
    files.pipe("bucket/tables/plots/group-000002.parquet", b"PAR1")
    with pytest.raises(StoreError, match=r"is damaged: group-000002.parquet"):
        xr_anysat.open_table(call["out"], storage_options=options)


# ---------------------------------------------------------------------- statistics


def test_statistics_of_places(items: list[pystac.Item], plots: gpd.GeoDataFrame) -> None:
    stats = xr_anysat.statistics_at(plots, "year", catalog=items, frames=3, max_cloud=None)
    assert stats == xr_anysat.statistics_at(plots, "year", catalog=items, frames=3, max_cloud=None)
    assert all(100 < mean < 6000 for mean in stats.mean)
    one = plots.iloc[[0]]
    alone = xr_anysat.statistics_at(one, "year", catalog=items, frames=3, max_cloud=None)
    crs = "EPSG:32632" if one.geometry.centroid.x.iloc[0] < 12 else "EPSG:32633"
    x, y = (
        float(v.iloc[0]) for v in (one.to_crs(crs).geometry.centroid.x, one.to_crs(crs).geometry.centroid.y)
    )
    left, top = x // 240 * 240, -(-y // 240) * 240
    cube = xr_anysat.open_s2(
        point=(one.geometry.centroid.x.iloc[0], one.geometry.centroid.y.iloc[0]), buffer_m=400,
        datetime=str(one["year"].iloc[0]), catalog=items, max_cloud=None, crs=crs,
    )  # fmt: skip
    window = cube.sel(x=slice(left, left + 240), y=slice(top, top - 240))
    want = window.anysat.statistics(3)
    np.testing.assert_allclose(alone.array(), want.array(), rtol=1e-9)
    assert alone.count == want.count
    few = xr_anysat.statistics_at(plots, "year", sample=3, seed=1, catalog=items, frames=3, max_cloud=None)
    assert few.count < stats.count
    table = xr_anysat.embed_places(plots, "year", norm=stats, catalog=items, **MODEL)
    assert (table["status"] == "ok").all()
    with pytest.raises(OptionError, match="norm= has no meaning in statistics_at"):
        xr_anysat.statistics_at(plots, "year", norm="pastis", catalog=items)


# ---------------------------------------------------------------------- plan, cluster, shell


def test_plan(items: list[pystac.Item], plots: gpd.GeoDataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is planned is what is read; no pixel is read for the plan."""
    read = []
    real = loading._read_parts

    def counted(sources: Any, geoboxes: Any, *args: Any) -> Any:
        read.append((len(sources), len(sources) * sum(g.shape[0] * g.shape[1] for g in geoboxes)))
        return real(sources, geoboxes, *args)

    monkeypatch.setattr(loading, "_read_parts", counted)
    table = plots.copy()
    table.loc[table.index[:2], "year"] = [2150, 3000]
    options = {"catalog": items, **MODEL}
    found = xr_anysat.plan_places(table, "year", codec="int8", calibrate=True, **options)
    assert not read
    done = xr_anysat.embed_places(table, "year", **options)
    assert (found.refused, found.not_found, found.places) == (1, 1, 12)
    assert (done["status"] == "ok").sum() == 12
    assert found.scenes == sum(n for n, _ in read)
    assert found.files_opened == 11 * found.scenes
    assert found.bytes_read == pytest.approx(sum(pixels for _, pixels in read) * 11.25)
    assert found.bytes_written == 12 * (256 + 4)
    assert found.groups == 5
    assert found.windows >= 4
    assert found.seconds is not None
    lines = str(found).splitlines()
    assert lines[0] == "places     12 in 5 groups; refused: 1, nothing found: 1"
    assert lines[-1].startswith("time ")
    left, top = ORIGINS["EPSG:32632"]
    place = gpd.GeoSeries([shapely.Point(left + 600, top - 600)], crs=32632)
    one = xr_anysat.plan_places(place, "2022", tile=24, **options)
    lon, lat = place.to_crs(4326).iloc[0].coords[0]
    cube = xr_anysat.open_s2(
        point=(lon, lat), buffer_m=200, datetime="2022", catalog=items, max_cloud=None
    ).isel(y=slice(0, 24), x=slice(0, 24))
    alone = cube.anysat.plan(3, tile=24, anchor="cube", model="tiny", weights="random")
    assert (one.windows, one.flop) == (1, alone.flop)


def test_on_a_cluster(items: list[pystac.Item], plots: gpd.GeoDataFrame, client: Any) -> None:
    with dask.config.set(scheduler="threads"):
        want = xr_anysat.embed_places(plots, "year", catalog=items, **MODEL)
    got = xr_anysat.embed_places(plots, "year", catalog=items, **MODEL)
    np.testing.assert_allclose(vectors(got), vectors(want), rtol=0, atol=1e-5)
    assert got["status"].tolist() == want["status"].tolist()


def test_from_a_shell(
    server: FaultyServer, plots: gpd.GeoDataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from xr_anysat.cli import main

    file, out = tmp_path / "plots.gpkg", str(tmp_path / "plots-anysat.parquet")
    plots.reset_index(drop=True).to_file(file)
    options = [
        "--catalog",
        f"{server.url}/",
        "--max-cloud",
        "100",
        "--model",
        "tiny",
        "--weights",
        "random",
        "--frames",
        "3",
    ]
    assert main(["places", str(file), "--datetime", "year", *options]) == 0
    assert capsys.readouterr().out.startswith("places     14 in 4 groups")
    assert main(["places", str(file), "--datetime", "year", "--out", out, *options]) == 0
    said = capsys.readouterr()
    assert said.out == f"{out}\n"
    assert "4 of 4 groups" in said.err
    assert "14 ok. To open the table in Python:" in said.err
    assert len(xr_anysat.open_table(out)) == 14
    assert main(["places", str(file), "--datetime", "year", "--out", out, *options, "--retry-failed"]) == 0
    assert "4 of 4 groups are finished from an earlier run" not in capsys.readouterr().err
    assert (
        main(["places", str(file), "--datetime", "year", "--out", out, *options, "--patch-size", "20"]) == 1
    )
    assert "cannot be resumed: config.patch_size: 10 there, 20 here" in capsys.readouterr().err
    assert main(["places", str(tmp_path / "none.gpkg"), "--datetime", "year"]) == 2
    assert "cannot be read as a table of places" in capsys.readouterr().err
    assert main(["places", str(file), "--datetime", "yaer", "--out", out, *options]) == 2
    assert "or the name of a column" in capsys.readouterr().err

"""From nothing but a table of places to a table of embeddings: `embed_places`, `statistics_at`, `plan_places`."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from xr_anysat.analysis.vector import POINTS, POLYGONS, STATUS, as_geodataframe, check_new_columns, joined
from xr_anysat.cube.compositing import frames
from xr_anysat.cube.normalization import Statistics, mean_and_std, moments
from xr_anysat.cube.periods import bin_bounds
from xr_anysat.embedding.embed import embed
from xr_anysat.embedding.options import EmbedOptions, ResolvedOptions
from xr_anysat.errors import OptionError, StoreError
from xr_anysat.places.computing import (
    FAILED,
    embed_group,
    find_scenes,
    load_strips,
    one_window,
    refused_results,
)
from xr_anysat.places.grouping import Group, check_kinds, group_places, periods_of
from xr_anysat.places.on_cube import EMBEDDING, with_vectors
from xr_anysat.places.table import (
    MANIFEST,
    MESSAGE,
    PLACES,
    ROW,
    TABLE_VERSION,
    Results,
    part_name,
    part_table,
    read_manifest,
    read_stored,
    replace_rows,
    table_schema,
    write_part,
)
from xr_anysat.record import differences, merge_records, shorten, weights_identity
from xr_anysat.shared.checks import import_optional
from xr_anysat.shared.serialization import json_default
from xr_anysat.shared.values import check_choice, check_whole_number
from xr_anysat.stac.catalogs import check_installed
from xr_anysat.stac.search import SceneQuery, grid_crs, open_s2, scene_query
from xr_anysat.store.location import StoreLocation, delete_drafts, is_empty, keys, parse_location, write

if TYPE_CHECKING:
    from geopandas import GeoDataFrame, GeoSeries

log = logging.getLogger(__name__)

NO_MEANING = ("period", "anchor", "resize", "pool", "bands", "nodata")
"""Options of `embed` that places do not have: they are about one cube and its grid."""

ON_ERROR = ("status", "raise", "invalid")

SAMPLE = 200
"""Places that `statistics_at` reads."""


@dataclass(frozen=True)
class Work:
    """A checked call: everything that follows from the table and the options, before any search.

    Attributes
    ----------
    frame : GeoDataFrame
    options : EmbedOptions
    query : SceneQuery
    one : ResolvedOptions
        The options for one window.
    groups : list of Group
    refused : dict of int to str
        Rows that cannot be embedded, and why.
    raises : bool
        Whether the first error stops the call.
    """

    frame: GeoDataFrame
    options: EmbedOptions
    query: SceneQuery
    one: ResolvedOptions
    groups: list[Group]
    refused: dict[int, str]
    raises: bool


def embed_places(
    places: GeoDataFrame | GeoSeries,
    datetime: Any,
    *,
    out: Any = None,
    window: int | None = None,
    codec: str | None = None,
    on_error: str = "status",
    retry: str | None = None,
    storage_options: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Any:
    """Embed a table of points and polygons: search, read and embed only the windows that hold a place.

    Places of one UTM zone, one period and one square of 20 km form a group. A group costs one search, and opens each
    file once. If a dask-distributed client is active, its workers read and compute.

    Parameters
    ----------
    places : GeoDataFrame or GeoSeries
        Points, polygons and multipolygons, in any CRS. A point has the embedding of the cell that contains it, a
        polygon the mean over the cells that it covers, weighted by the share of each cell.
    datetime : str, (start, end) or name of a column
        One period for all, as for :func:`open_s2`; or the name of a column with a year, a period or a date per row.
    out : path or URL, optional
        Write the table there, as a folder of GeoParquet 1.1 with one file per group. Repeat the call to resume. None:
        return it.
    window : int, optional
        Days before and after the dates of a column.
    codec : {None, "int8"}
        ``"int8"`` stores vectors in a quarter of the size, with one float32 scale per row.
    on_error : {"status", "raise", "invalid"}
        What happens if nothing is found, a catalog does not answer, or an asset cannot be read. ``"status"``: the rows
        concerned have a status and a message. ``"raise"``: the call stops at the first. ``"invalid"``: an item is not
        used where its asset cannot be read, as in :func:`open_s2`.
    retry : {None, "failed"}
        ``"failed"``: also try the rows of an existing table again that are not found, unreadable or invalid.
    storage_options : dict, optional
        Options for the file system of a URL.
    progress : callable, optional
        Called with the numbers of finished groups and of all groups.
    catalog, collections, max_cloud, mask, scl_invalid, dilate_m, mask_assets, harmonize, crs, workers
        As for :func:`open_s2`.
    frames, reduce, empty, doy, doy_base, fill_value, norm, patch_size, tile, overlap, output, model, weights, device, \
precision, batch
        As for :func:`embed`, but `norm` is ``"pastis"`` by default. Windows start at the origin of the CRS, so a place
        has the same embedding in every table.

    Returns
    -------
    GeoDataFrame or path
        `out`, if it is given; :func:`open_table` reads it. Otherwise the same rows, order, index, columns and CRS, with
        these additional columns:

        ``embedding``
            Vectors (D,) float32; NaN unless the status is ok.
        ``status``
            ``"ok"``; ``"invalid"``: nothing was observed there; ``"not found"``: the catalog has no usable scene;
            ``"unreadable"``: the catalog or an asset cannot be read; ``"refused"``: the geometry or the period of the
            row cannot be used.
        ``message``
            What went wrong, and what helps; empty if the status is ok.

    Raises
    ------
    OptionError
        If an option is impossible, `places` have no CRS or contain lines, or have columns with these names.
    StoreError
        If `out` contains something else, or a table of other places, options or weights. The message names the
        difference.
    WriteError
        If `out` cannot be written. Finished groups are kept.
    CatalogError, ReadError
        With ``on_error="raise"``.
    CubeError, WeightsError, DeviceError
        As in :func:`embed`.
    AnySatError
        If a package is not installed.

    Examples
    --------
    >>> import geopandas, xr_anysat
    >>> plots = geopandas.read_file("plots.gpkg")  # doctest: +SKIP
    >>> table = xr_anysat.embed_places(plots, "year", model="base")  # doctest: +SKIP
    >>> xr_anysat.embed_places(plots, "year", out="plots-anysat.parquet")  # doctest: +SKIP
    'plots-anysat.parquet'
    """
    for name, value, known in (("codec", codec, "int8"), ("retry", retry, "failed")):
        if value is not None:
            check_choice(name, value, (known,), ", or None")
    work = prepare("embed_places()", places, datetime, window, on_error, options)
    if out is None:
        if retry is not None or codec is not None or storage_options is not None:
            raise OptionError(
                "retry=, codec= and storage_options= are about a stored table: pass out= with them"
            )
        check_new_columns(work.frame, [EMBEDDING, STATUS, MESSAGE], "places")
        return _table_in_memory(work, progress)
    target = parse_location(out, storage_options)
    _write_table(work, target, codec, retry == "failed", progress)
    return out


def prepare(
    call: str, places: Any, datetime: Any, window: int | None, on_error: str, options: dict[str, Any]
) -> Work:
    """Check a call of :func:`embed_places`, and group its places. Nothing is searched or read.

    Raises
    ------
    TypeError
        If an option does not exist.
    OptionError, WeightsError, AnySatError
        As :func:`embed_places` does.
    """
    unknown = [name for name in options if name not in _OPEN and name not in _EMBED]
    if unknown:
        raise TypeError(f"{call.removesuffix('()')}() got an unexpected keyword argument {unknown[0]!r}")
    check_choice("on_error", on_error, ON_ERROR)
    norm = options.get("norm", "pastis")
    if norm == "per_tile_zscore":
        raise OptionError(
            "norm='per_tile_zscore' normalizes by the statistics of one cube, which places do not share. Pass "
            "norm=xr_anysat.statistics_at(places, ...), measured on a sample of the places, or norm='pastis'"
        )
    chosen = EmbedOptions(**{k: v for k, v in options.items() if k in _EMBED} | {"norm": norm}).configured()
    chosen = replace(chosen, anchor="cube", norm=norm)
    frame = as_geodataframe(places, "places", call)
    check_kinds(frame.geometry, (*POINTS, *POLYGONS))
    opening = {**_OPEN_DEFAULTS, **{k: v for k, v in options.items() if k in _OPEN}}
    crs = opening.pop("crs")
    query = scene_query(**opening, on_error="raise" if on_error == "status" else on_error)
    if crs != "utm":
        grid_crs(crs, 0, 0)
    check_installed("odc.stac", "pystac_client", "scipy")
    one = one_window(chosen)
    periods = periods_of(frame, datetime, window)
    for row, period in enumerate(periods):
        if chosen.frames is not None and isinstance(period, tuple):
            try:
                bin_bounds(*period, chosen.frames)
            except OptionError as error:
                periods[row] = str(error)
    groups, refused = group_places(frame, periods, crs, one.settings)
    if refused and on_error == "raise":
        row = min(refused)
        raise OptionError(f"places, row {row} (index {frame.index[row]!r}): {refused[row]}")
    return Work(frame, chosen, query, one, groups, refused, on_error == "raise")


def _table_in_memory(work: Work, progress: Callable[[int, int], None] | None) -> GeoDataFrame:
    channels = work.one.settings.channels
    done: list[Results] = [refused_results(work.refused, channels)]
    records = []
    _report(0, len(work.groups), progress)
    for number, group in enumerate(work.groups):
        results, record = embed_group(group, work.query, work.options, work.one, raises=work.raises)
        done.append(results)
        records += [] if record is None else [record]
        _report(number + 1, len(work.groups), progress)
    rows = np.concatenate([each["rows"] for each in done])
    order = np.argsort(rows)
    vectors, status, message = (
        np.concatenate([each[name] for each in done])[order] for name in ("vectors", STATUS, MESSAGE)
    )
    added = with_vectors(work.frame.index, vectors, status).assign(**{MESSAGE: message})
    return joined(work.frame, added, merge_records(records))


def _report(done: int, total: int, progress: Callable[[int, int], None] | None) -> None:
    log.info("%d of %d groups of places", done, total)
    if progress is not None:
        progress(done, total)


# ---------------------------------------------------------------------- stored tables


def _write_table(
    work: Work,
    target: StoreLocation,
    codec: str | None,
    again: bool,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Write the groups that a table lacks; with `again`, also the failed rows of its groups."""
    import_optional("pyarrow", "embed_places(out=...)", PLACES)
    channels = work.one.settings.channels
    schema = table_schema(work.frame, channels, codec)
    root = target.root()
    manifest = {
        "anysat_table": TABLE_VERSION, "rows": len(work.frame), "groups": len(work.groups), "channels": channels,
        "codec": codec, "columns": list(work.frame.columns), "identity": identity_of(work, codec),
    }  # fmt: skip
    existing = read_manifest(root, target)
    if existing is None:
        if not is_empty(root):
            raise StoreError(
                f"{target} contains other files, but no table of embed_places: give another path"
            )
        write(root, MANIFEST, json.dumps(manifest, sort_keys=True).encode(), target)
    else:
        _check_same(existing, manifest, target)
    finished = set(keys(root, ""))
    if work.refused and part_name(len(work.groups)) not in finished:
        results = refused_results(work.refused, channels)
        write_part(root, part_name(len(work.groups)), part_table(work.frame, results, schema, None), target)
    left = [n for n in range(len(work.groups)) if again or part_name(n) not in finished]
    done = len(work.groups) - len(left)
    _report(done, len(work.groups), progress)
    for number in left:
        group, name = work.groups[number], part_name(number)
        if name not in finished:
            results, record = embed_group(group, work.query, work.options, work.one, raises=work.raises)
            write_part(root, name, part_table(work.frame, results, schema, record), target)
        else:
            old = read_stored(root, name, target)
            status = dict(zip(old.column(ROW).to_pylist(), old.column(STATUS).to_pylist(), strict=True))
            rest = replace(group, places=tuple(p for p in group.places if status[p.row] in FAILED))
            if rest.places:
                results, record = embed_group(rest, work.query, work.options, work.one, raises=work.raises)
                new = part_table(work.frame, results, schema, record)
                write_part(root, name, replace_rows(old, new), target)
        done += 1
        _report(done, len(work.groups), progress)
    delete_drafts(target)


def identity_of(work: Work, codec: str | None) -> dict[str, Any]:
    """Return everything that a resumed call must share with a table, as JSON represents it."""
    spec = work.one.settings.spec
    frame = work.frame
    columns = {
        str(name): _digest(frame[name].to_wkb() if str(kind) == "geometry" else frame[name])
        for name, kind in frame.dtypes.items()
    }
    identity = {
        "codec": codec,
        "places": {"rows": len(frame), "crs": str(frame.crs), "index": _digest(frame.index), **columns},
        "groups": [
            [
                str(group.crs),
                None if group.period is None else [str(t.date()) for t in group.period],
                len(group.places),
            ]
            for group in work.groups
        ],
        "refused": len(work.refused),
        "catalog": {
            "url": work.query.catalog.url,
            "collections": list(work.query.catalog.collections),
            "items": None if work.query.items is None else sorted(item.id for item in work.query.items),
        },
        "scenes": {k: v for k, v in work.query.settings().items() if k != "on_error"},
        "weights": weights_identity({"weights": str(spec.source), "weights_sha256": spec.sha256}),
        "attrs": {"config": {**work.one.config, "anchor": "grid"}},
    }
    out: dict[str, Any] = json.loads(json.dumps(identity, default=json_default))
    return out


def _digest(values: Any) -> str:
    """Return a hash of a column or an index."""
    return hashlib.sha256(repr(values.tolist()).encode()).hexdigest()[:16]


def _check_same(existing: dict[str, Any], manifest: dict[str, Any], target: StoreLocation) -> None:
    """Refuse to resume a table of other places, options or weights."""
    differing = list(differences(existing["identity"], manifest["identity"]))
    if differing:
        shown = "; ".join(
            f"{name}: {shorten(a, b)} there, {shorten(b, a)} here" for name, a, b in differing[:5]
        )
        raise StoreError(
            f"{target} was started with different places or settings and cannot be resumed: {shown}. Repeat the first "
            "call, or give another path"
        )


# ---------------------------------------------------------------------- statistics


def statistics_at(
    places: GeoDataFrame | GeoSeries,
    datetime: Any,
    *,
    sample: int = SAMPLE,
    seed: int = 0,
    window: int | None = None,
    **options: Any,
) -> Statistics:
    """Measure the statistics of a normalization on the windows of a sample of places.

    Pass the result as ``norm=`` to :func:`embed_places`, and keep it: embeddings are comparable only if they were
    normalized by the same statistics.

    Parameters
    ----------
    places, datetime, window
        As for :func:`embed_places`.
    sample : int, default 200
        Places to read; all places if there are fewer.
    seed : int
        Seed of the choice.
    catalog, …, frames, …, tile, …
        The options of :func:`embed_places` that decide about frames and windows.

    Returns
    -------
    Statistics
        Mean and standard deviation of each band over all observed pixels of the windows, digital numbers.

    Raises
    ------
    OptionError
        If an option is impossible, or nothing was observed.
    CatalogError, ReadError
        If a place of the sample cannot be read.
    """
    sample, seed = check_whole_number("sample", sample), check_whole_number("seed", seed, 0)
    if "norm" in options:
        raise OptionError("norm= has no meaning in statistics_at(), which measures it: leave it out")
    work = prepare("statistics_at()", places, datetime, window, "status", options)
    rows = np.array(sorted(place.row for group in work.groups for place in group.places), int)
    chosen = set(np.random.default_rng(seed).permutation(rows)[:sample].tolist())
    parts = []
    names = ("reduce", "empty", "doy", "doy_base", "fill_value")
    composing = {name: getattr(work.options, name) for name in names}
    for group in work.groups:
        kept = replace(group, places=tuple(place for place in group.places if place.row in chosen))
        if not kept.places:
            continue
        rectangles = [replace(part, halo=0) for part in kept.rectangles(work.one.settings)]
        scenes, _, _ = find_scenes(kept, rectangles, work.query, raises=True)
        for strip in load_strips(kept, rectangles, scenes, work.query):
            composed = frames(strip.cube, work.options.frames, **composing).compute()
            for part, left in zip(strip.rectangles, strip.columns, strict=True):
                parts.append(moments(composed.values[:, :, : part.rows.size, left : left + part.cols.size]))
    if not parts or not (np.array(parts)[:, 0].sum(0) > 0).all():
        raise OptionError(
            f"nothing was observed at {len(chosen)} places of the sample: expected places and periods with scenes that "
            "are not masked. embed_places(...) reports a status per place"
        )
    mean, std = mean_and_std(np.array(parts))
    return Statistics(mean, std, int(np.array(parts)[:, 0, 0].sum()))


# ---------------------------------------------------------------------- signatures

_EMBED = [f.name for f in fields(EmbedOptions) if f.name not in NO_MEANING]

_OPEN = (
    "catalog", "collections", "max_cloud", "mask", "scl_invalid", "dilate_m", "mask_assets", "harmonize", "crs",
    "workers",
)  # fmt: skip

_OPEN_DEFAULTS = {name: inspect.signature(open_s2).parameters[name].default for name in _OPEN}


def with_options(function: Any, own: Sequence[str]) -> None:
    """Give a function the signature with its `own` parameters and all options that it passes on."""
    signature = inspect.signature(function)
    given = list(signature.parameters.values())[:-1]
    keyword = inspect.Parameter.KEYWORD_ONLY
    passed = [inspect.signature(open_s2).parameters[name] for name in _OPEN]
    passed += [inspect.signature(embed).parameters[name].replace(kind=keyword) for name in _EMBED]
    passed = [p.replace(default="pastis") if p.name == "norm" else p for p in passed]
    function.__signature__ = signature.replace(parameters=[*given, *(p for p in passed if p.name not in own)])


with_options(embed_places, ())
with_options(statistics_at, ("norm",))

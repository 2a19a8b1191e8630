"""Tables of embeddings as GeoParquet 1.1: a folder with one file per group of places, and a manifest.

Each file is complete on its own, and all files together are one dataset. The specification is
https://geoparquet.org/releases/v1.1.0/. A table may come from anybody, so what is read is checked before use.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from xr_anysat.analysis.vector import STATUS
from xr_anysat.errors import OptionError, StoreError, warn
from xr_anysat.places.on_cube import EMBEDDING
from xr_anysat.record import merge_records, read_record
from xr_anysat.shared.checks import import_optional
from xr_anysat.shared.serialization import (
    OBJECT,
    TEXT,
    Rule,
    first_violation,
    json_default,
    list_of,
    one_of,
    parse_json,
    whole,
)
from xr_anysat.store.codecs import CODECS, VALUES
from xr_anysat.store.codecs import SCALE as SCALE_ARRAY
from xr_anysat.store.location import StoreLocation, keys, parse_location, read, write

if TYPE_CHECKING:
    import pyarrow as pa
    from geopandas import GeoDataFrame

PLACES = "'xr_anysat[places]'"
"""What to install with pip."""

SCALE, MESSAGE, ROW, BBOX = "embedding_scale", "message", "anysat_row", "bbox"
"""Columns besides ``embedding`` and ``status``: scale of ``int8``, what went wrong, position in the table, bounds."""

ADDED = (EMBEDDING, SCALE, STATUS, MESSAGE, ROW, BBOX)
"""All columns that are added to the columns of the user."""

MANIFEST = "_anysat.json"
"""File that describes the whole table. Readers of datasets ignore names that begin with an underscore."""

RECORD = b"anysat"
"""Key of the record of the embedding in the metadata of a file; the value is JSON."""

TABLE_VERSION = 1

TABLE_CODECS = (None, "int8")

MAX_ROWS = 2**31

MANIFEST_RULES: dict[str, Rule] = {
    "anysat_table": whole(1),
    "rows": whole(0, MAX_ROWS),
    "groups": whole(0, MAX_ROWS),
    "channels": whole(1, 2**16),
    "codec": one_of(*TABLE_CODECS),
    "columns": list_of(TEXT),
    "identity": OBJECT,
}

Results = dict[str, Any]
"""Results of some rows: ``rows`` (n,) int, ``vectors`` (n, D) float32, ``status`` and ``message`` (n,) object."""


def part_name(number: int) -> str:
    """Return the name of the file of a group."""
    return f"group-{number:06d}.parquet"


def table_schema(frame: GeoDataFrame, channels: int, codec: str | None) -> pa.Schema:
    """Return the schema of all files of a table: the columns of the user, then those of the results.

    Raises
    ------
    OptionError
        If Parquet cannot represent a column, or a column has a name that is needed.
    """
    pa = import_optional("pyarrow", "embed_places()", PLACES)
    others = [name for name in frame.columns if not isinstance(name, str)]
    if others:
        raise OptionError(
            f"places have columns {others[:3]} whose names are not texts: places.rename(columns=str)"
        )
    taken = [name for name in frame.columns if name in ADDED]
    if taken:
        raise OptionError(
            f"places have columns {', '.join(map(repr, taken))} already: rename or drop them, "
            f"places.drop(columns={taken!r})"
        )
    plain = _without_geometries(frame)
    try:
        schema = pa.Table.from_pandas(plain, preserve_index=True).schema
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise OptionError(
            f"places have a column that Parquet cannot represent: {error}. Convert or drop it, such as places.assign("
            "name=places['name'].astype(str))"
        ) from error
    for name in _geometry_columns(frame):
        schema = schema.append(pa.field(name, pa.binary()))
    double = pa.float64()
    schema = schema.append(pa.field(BBOX, pa.struct([(n, double) for n in ("xmin", "ymin", "xmax", "ymax")])))
    values = pa.float32() if codec is None else pa.int8()
    schema = schema.append(pa.field(EMBEDDING, pa.list_(values, channels)))
    if codec is not None:
        schema = schema.append(pa.field(SCALE, pa.float32()))
    for name, kind in ((STATUS, pa.string()), (MESSAGE, pa.string()), (ROW, pa.int64())):
        schema = schema.append(pa.field(name, kind))
    return schema.with_metadata({**(schema.metadata or {}), b"geo": json.dumps(_geo(frame)).encode()})


def part_table(
    frame: GeoDataFrame, results: Results, schema: pa.Schema, record: Mapping[str, Any] | None
) -> pa.Table:
    """Return the rows of a group as a file stores them.

    Parameters
    ----------
    frame : GeoDataFrame
        The whole table.
    results : dict
        Results of the rows of the group.
    schema : Schema
        Of :func:`table_schema`.
    record : dict or None
        Attributes of the embedding; None if no place was embedded.
    """
    import pyarrow as pa
    import shapely

    part = frame.iloc[results["rows"]]
    columns = {}
    plain = _without_geometries(part)
    user = pa.Table.from_pandas(plain, preserve_index=True, schema=_user_schema(schema, frame))
    for name in user.column_names:
        columns[name] = user.column(name)
    for name in _geometry_columns(frame):
        columns[name] = pa.array(shapely.to_wkb(np.asarray(part[name].values)), pa.binary())
    bounds = part.geometry.bounds
    columns[BBOX] = pa.StructArray.from_arrays(
        [pa.array(bounds[n].values) for n in ("minx", "miny", "maxx", "maxy")],
        fields=list(schema.field(BBOX).type),
        mask=pa.array(bounds["minx"].isna().values),
    )
    vectors = np.ascontiguousarray(results["vectors"], np.float32)
    missing = np.isnan(vectors).any(1)
    kind = schema.field(EMBEDDING).type
    if SCALE in schema.names:
        arrays = CODECS["int8"].encode(vectors.T[:, :, None])
        vectors = np.ascontiguousarray(arrays[VALUES][:, :, 0].T)
        columns[SCALE] = pa.array(arrays[SCALE_ARRAY][:, 0], mask=missing)
    # a missing vector is NaN, not null: pyarrow before 26 cannot read lists of fixed size that are null
    columns[EMBEDDING] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), kind.list_size)
    columns[STATUS] = pa.array(results[STATUS], pa.string())
    columns[MESSAGE] = pa.array(results[MESSAGE], pa.string())
    columns[ROW] = pa.array(results["rows"], pa.int64())
    if record is not None:
        text = json.dumps(record, default=json_default, sort_keys=True)
        schema = schema.with_metadata({**schema.metadata, RECORD: text.encode()})
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def write_part(root: Any, name: str, table: pa.Table, target: StoreLocation) -> None:
    """Write the file of a group, completely or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", use_dictionary=False)
    write(root, name, sink.getvalue().to_pybytes(), target)


def read_stored(root: Any, name: str, target: StoreLocation) -> pa.Table:
    """Read the file of a group as it is.

    Raises
    ------
    StoreError
        If it is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = read(root, name)
    try:
        return pq.read_table(pa.BufferReader(data))
    except Exception as error:  # of pyarrow: the file may have any content
        raise _damaged(target, name, error) from error


def replace_rows(old: pa.Table, new: pa.Table) -> pa.Table:
    """Return the rows of a group with the new ones in place of old ones, in the order of the old table."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kept = old.filter(pc.invert(pc.is_in(old.column(ROW), value_set=new.column(ROW).combine_chunks())))
    metadata = old.schema.metadata if RECORD in old.schema.metadata else new.schema.metadata
    merged = pa.concat_tables([kept, new.cast(old.schema)])
    order = pc.index_in(old.column(ROW), value_set=merged.column(ROW).combine_chunks())
    return merged.take(order).combine_chunks().replace_schema_metadata(metadata)


def _damaged(target: StoreLocation, name: str, error: Exception) -> StoreError:
    return StoreError(
        f"{target} is damaged: {name}: {type(error).__name__}: {str(error)[:200]}. Delete this file and repeat the "
        "call of embed_places to compute it again"
    )


def _user_schema(schema: pa.Schema, frame: GeoDataFrame) -> pa.Schema:
    """Return the part of a schema that describes the columns of the user without geometries."""
    import pyarrow as pa

    others = {*ADDED, *_geometry_columns(frame)}
    return pa.schema([field for field in schema if field.name not in others], metadata=schema.metadata)


def _geometry_columns(frame: GeoDataFrame) -> list[str]:
    return [str(name) for name, kind in frame.dtypes.items() if str(kind) == "geometry"]


def _without_geometries(frame: GeoDataFrame) -> pd.DataFrame:
    return pd.DataFrame(frame.drop(columns=_geometry_columns(frame)))


def _geo(frame: GeoDataFrame) -> dict[str, Any]:
    """Return the metadata of GeoParquet 1.1."""
    columns: dict[str, Any] = {}
    for name in _geometry_columns(frame):
        series = frame[name]
        known = {g.geom_type for g in series if g is not None and not g.is_empty}
        columns[name] = {
            "encoding": "WKB",
            "geometry_types": sorted(known),
            "crs": None if series.crs is None else series.crs.to_json_dict(),
        }
    primary = frame.active_geometry_name
    columns[primary]["covering"] = {BBOX: {n: [BBOX, n] for n in ("xmin", "ymin", "xmax", "ymax")}}
    return {"version": "1.1.0", "primary_column": primary, "columns": columns}


# ---------------------------------------------------------------------- reading


def open_table(path: Any, *, storage_options: dict[str, Any] | None = None) -> GeoDataFrame:
    """Open a table that :func:`xr_anysat.embed_places` wrote.

    Other programs read the folder as it is: ``geopandas.read_parquet(path)``, ``pyarrow.dataset.dataset(path)``, or
    ``read_parquet('path/*.parquet')`` in DuckDB.

    Parameters
    ----------
    path : path or URL
        The folder.
    storage_options : dict, optional
        Options for the file system of a URL.

    Returns
    -------
    GeoDataFrame
        The rows, order, index and columns of the table of places, and the results as :func:`xr_anysat.embed_places`
        returns them: ``embedding`` (vectors (D,) float32, NaN where there is none), ``status`` and ``message``.
        ``attrs["embedding"]`` is the record of the embedding as JSON, without what differs between periods.

    Raises
    ------
    StoreError
        If there is no table, or it is damaged.

    Warns
    -----
    AnySatWarning
        If rows are missing, because the table is not finished.
    """
    table = stored_table(path, storage_options)
    if table is None:
        raise StoreError(
            f"{parse_location(path, storage_options)} contains no table: expected a folder that "
            "embed_places(..., out=...) wrote"
        )
    parts, attrs = open_parts(*table)
    frame = pd.concat(list(parts))
    frame = frame.iloc[np.argsort(frame.pop(ROW).to_numpy())]
    frame.attrs = attrs
    return frame


def stored_table(
    path: Any, storage_options: dict[str, Any] | None
) -> tuple[Any, StoreLocation, dict[str, Any]] | None:
    """Return the store, the location and the manifest of a table; None if there is no table.

    Raises
    ------
    StoreError
        If its manifest is damaged.
    """
    import_optional("geopandas", "open_table()", PLACES)
    import_optional("pyarrow", "open_table()", PLACES)
    target = parse_location(path, storage_options)
    root = target.root(read_only=True)
    manifest = read_manifest(root, target)
    return None if manifest is None else (root, target, manifest)


@dataclass(frozen=True)
class Parts:
    """The files of a table, each read when the iteration comes to it."""

    root: Any
    target: StoreLocation
    manifest: Mapping[str, Any]
    names: Sequence[str]

    def __iter__(self) -> Iterator[GeoDataFrame]:
        for name in self.names:
            yield read_part(self.root, name, self.target, self.manifest)


def open_parts(root: Any, target: StoreLocation, manifest: Mapping[str, Any]) -> tuple[Parts, dict[str, Any]]:
    """Return the files of a table, and the attributes of the table. Only metadata and row numbers are read.

    Raises
    ------
    StoreError
        If the table has no finished group, or its rows are not those of one table.

    Warns
    -----
    AnySatWarning
        If rows are missing.
    """
    names = sorted(key for key in keys(root, "") if re.fullmatch(r"group-\d{6,}\.parquet", key))
    if not names:
        raise StoreError(f"{target} has no finished group yet: repeat the call of embed_places to resume")
    found, records = [], []
    for name in names:
        numbers, record = _read_rows(root, name, target)
        found.append(numbers)
        records += [] if record is None else [record]
    rows = np.concatenate(found)
    if len(np.unique(rows)) < len(rows) or not ((rows >= 0) & (rows < manifest["rows"])).all():
        raise StoreError(
            f"{target} is damaged: its rows are not those of one table of {manifest['rows']} rows"
        )
    missing = manifest["rows"] - len(rows)
    if missing:
        warn(
            f"{target} is not finished: {missing} of {manifest['rows']} rows are missing. Repeat the call to resume"
        )
    return Parts(root, target, manifest, names), {EMBEDDING: json.dumps(merge_records(records))}


def _read_rows(root: Any, name: str, target: StoreLocation) -> tuple[np.ndarray, dict[str, Any] | None]:
    """Read the row numbers and the record of the file of a group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(pa.BufferReader(read(root, name)))
        rows = file.read(columns=[ROW]).column(ROW).to_numpy()
        if rows.dtype.kind != "i":
            raise ValueError(f"column {ROW!r} is {rows.dtype}, expected int64")
        text = (file.schema_arrow.metadata or {}).get(RECORD)
        record = None if text is None else parse_json(text)
        if record is not None:
            read_record(record)
    except Exception as error:  # of pyarrow: the file may have any content
        raise _damaged(target, name, error) from error
    return rows, record


def read_manifest(root: Any, target: StoreLocation) -> dict[str, Any] | None:
    """Read and check the manifest of a table; None if there is none.

    Raises
    ------
    StoreError
        If it is damaged, or of a newer version.
    """
    text = read(root, MANIFEST)
    if text is None:
        return None
    try:
        manifest = parse_json(text)
        problem = first_violation(manifest, MANIFEST_RULES)
    except ValueError as error:
        manifest, problem = {}, str(error)
    if problem is None and manifest["anysat_table"] > TABLE_VERSION:
        problem = (
            f"version {manifest['anysat_table']}, which needs a newer xr_anysat: pip install -U xr_anysat"
        )
    if problem is not None:
        raise StoreError(
            f"{target} is damaged: {MANIFEST}: {problem}. Delete the folder, or give another path"
        )
    return dict(manifest)


def read_part(root: Any, name: str, target: StoreLocation, manifest: Mapping[str, Any]) -> GeoDataFrame:
    """Read and check the file of a group: its rows with decoded vectors.

    Raises
    ------
    StoreError
        If it is damaged.
    """
    table = read_stored(root, name, target)
    try:
        frame = _frame_of(table, manifest["columns"])
        objects = np.empty(len(frame), object)
        objects[:] = list(_vectors_of(table, manifest["channels"], manifest["codec"]))
        frame[EMBEDDING] = objects
        for column in (STATUS, MESSAGE, ROW):
            frame[column] = table.column(column).to_pandas().to_numpy()
    except Exception as error:  # of pyarrow, shapely, pyproj or pandas: the file may have any content
        raise _damaged(target, name, error) from error
    return frame


def _frame_of(table: pa.Table, columns: Sequence[str]) -> GeoDataFrame:
    """Return the columns of the user, in their order."""
    import geopandas

    geo = parse_json(table.schema.metadata[b"geo"])
    primary = geo["primary_column"]
    plain = table.drop_columns([n for n in (*ADDED, *geo["columns"]) if n in table.column_names]).to_pandas()
    shapes = {
        name: geopandas.GeoSeries.from_wkb(
            table.column(name).to_pylist(), index=plain.index, crs=about["crs"]
        )
        for name, about in geo["columns"].items()
    }
    frame = geopandas.GeoDataFrame(plain.assign(**shapes), geometry=primary)
    return frame[[name for name in columns if name in frame.columns]]


def _vectors_of(table: pa.Table, channels: int, codec: str | None) -> np.ndarray:
    """Return the vectors (n, D) float32, NaN where there is none."""
    import pyarrow as pa

    column = table.column(EMBEDDING).combine_chunks()
    expected = pa.list_(pa.float32() if codec is None else pa.int8(), channels)
    if column.type != expected:
        raise ValueError(f"column {EMBEDDING!r} is {column.type}, expected {expected}")
    values: np.ndarray = column.flatten().to_numpy().reshape(len(column), channels)
    if codec is None:
        return values.copy()
    scale = table.column(SCALE).to_numpy().astype(np.float32)  # NaN where it is null
    decoded = CODECS[codec].decode({VALUES: values.T[:, :, None], SCALE_ARRAY: scale[:, None]})
    vectors: np.ndarray = decoded[:, :, 0].T
    return vectors

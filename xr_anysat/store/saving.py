"""`to_zarr` and `append`: store an embedding cube, or a series step by step."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from xr_anysat.cube.normalization import STATISTICS, Statistics
from xr_anysat.errors import CubeError, StoreError
from xr_anysat.record import check_comparable, comparability_record, read_record, shorten
from xr_anysat.series import check_embeddings, is_series, periods_of, step, steps
from xr_anysat.shared.checks import check_embedding
from xr_anysat.shared.graph import Companion
from xr_anysat.shared.serialization import parse_json
from xr_anysat.store.identity import identity_of, layout_of, read_identity
from xr_anysat.store.layout import prepare_for_store
from xr_anysat.store.location import StoreLocation, parse_location
from xr_anysat.store.reading import open, open_cube
from xr_anysat.store.series_layout import read_series, step_location, stored_periods, write_series
from xr_anysat.store.writing import statistics_of, storable, with_values, write_cube

if TYPE_CHECKING:
    from zarr.abc.store import Store


def to_zarr(
    emb: xr.DataArray,
    store: str | os.PathLike[str] | Store,
    codec: str | None = None,
    *,
    resume: bool = True,
    storage_options: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.DataArray:
    """Compute an embedding cube into a Zarr store; an interrupted run is resumed.

    The worker that computes a block also encodes and writes it, so no values return to this process.
    With an active :class:`distributed.Client` the cluster computes, else dask's scheduler of this
    process. A run may be killed at any moment: repeat the call to resume. The result is bit-identical
    to that of an uninterrupted run. Two runs of the same call at the same time are harmless, because
    they write the same bytes. Every chunk has a checksum (CRC-32C), see :func:`xr_anysat.check`.

    With ``norm="per_tile_zscore"``, the statistics of a lazy cube are computed first and recorded in
    the store; a resumed run reads them there.

    Parameters
    ----------
    emb : DataArray, (D, y, x) or (time, D, y, x) float
        The result of :func:`xr_anysat.embed`. Of a series, each step becomes a store of its own in one group;
        :func:`append` adds steps.
    store : str, path or zarr Store
        A folder; a URL that fsspec supports, such as ``"s3://bucket/area.zarr"``; or a store object of
        zarr, such as ``zarr.storage.ObjectStore`` for obstore. Zarr format 3, with consolidated
        metadata. Next to a folder or URL ``area.zarr``, a STAC Item ``area.stac.json`` is written; a
        store object contains it, as ``stac.json``.
    codec : {None, "float16", "int8"}
        None: values are stored unchanged. ``"float16"``: half the bytes, relative error below 5e-4.
        ``"int8"``: a quarter of the bytes, one float32 scale per cell, relative error about 1 %
        (docs/storage.md).
    resume : bool
        Whether an existing store is resumed; False refuses it. A store is never overwritten.
    storage_options : dict, optional
        For the file system of a URL, as in ``fsspec.filesystem``.
    progress : callable, optional
        Called in this process with the number of finished blocks and of all blocks, at the start and
        after each block.

    Returns
    -------
    DataArray
        The store, opened with :func:`open`.

    Raises
    ------
    StoreError
        If the store contains something else: another configuration, other weights, another grid or
        other dates (the message names the difference), or no embeddings; or, with ``resume=False``,
        anything.
    WriteError
        If the store cannot be written. Finished blocks are kept; repeat the call to resume.
    OptionError, CubeError, CubeTypeError
        If `codec` is unknown or cannot represent a value, or `emb` is no embedding cube.

    Examples
    --------
    >>> import numpy as np, tempfile, xarray as xr
    >>> import xr_anysat
    >>> emb = xr.DataArray(np.ones((4, 2, 3), "float32"), dims=("D", "y", "x"))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     back = xr_anysat.to_zarr(emb, f"{folder}/area.zarr", "int8").load()
    >>> back.sizes, float(back.max())
    (Frozen({'D': 4, 'y': 2, 'x': 3}), 1.0)
    """
    target = parse_location(store, storage_options)
    if is_series(emb):
        _write_series(emb, target, codec, resume, progress)
    else:
        emb = step(emb)
        check_embedding(emb, "to_zarr('area.zarr')")
        write_cube(emb, target, codec, resume=resume, progress=progress)
    return open(store, storage_options=storage_options)


# ---------------------------------------------------------------------- series


def _write_series(
    series: xr.DataArray,
    target: StoreLocation,
    codec: str | None,
    resume: bool,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Compute a series (time, D, y, x) into a group with one store per step."""
    periods, root = periods_of(series), target.root()
    locations = [step_location(target, period) for period in periods]
    begun_with = read_series(root, target)
    if begun_with is None and read_identity(root, target) is not None:
        raise StoreError(f"{target} is a store of one embedding, not of a series: give another path")
    if begun_with is not None and not resume:
        raise StoreError(
            f"a series exists at {target}, and resume=False: pass resume=True to resume it, give another path, or "
            "delete it first"
        )
    if begun_with not in (None, periods):
        raise StoreError(
            f"{target} was begun with the steps {begun_with}, and these are {periods}: add steps with "
            f"series.anysat.append({target}), or give another path"
        )
    parts = steps(series)
    found = (read_identity(location.root(), location) for location in locations)
    stored_identity = next((identity for identity in found if identity is not None), None)
    if begun_with is None:
        with storable():
            for part in parts:
                prepare_for_store(part)
        write_series(root, target, periods)
    parts = _with_common_statistics(parts, stored_identity)
    for i, (part, location) in enumerate(zip(parts, locations, strict=True)):
        write_cube(part, location, codec, progress=_of_several(progress, i, len(parts)))


def append(
    emb: xr.DataArray,
    store: str | os.PathLike[str],
    *,
    storage_options: dict[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.DataArray:
    """Add later periods, or others, to a stored series; an interrupted run is resumed.

    Parameters
    ----------
    emb : DataArray, (time, D, y, x), or (D, y, x)
        A series, or the embedding of one period, on the grid of the stored one, with the same weights, statistics
        and settings: ``cube.anysat.embed(by="year", norm=xr_anysat.Statistics.of(stored))``.
    store, storage_options
        A series that :func:`to_zarr` wrote; its codec and blocks are used.
    progress : callable, optional
        As in :func:`to_zarr`.

    Returns
    -------
    DataArray, (time, D, y, x)
        The store, opened with :func:`open`.

    Raises
    ------
    StoreError
        If there is no series, it has another grid, or it has a step that begins on the same day and differs.
    CubeError
        If the embeddings are not comparable.
    WriteError
        As in :func:`to_zarr`.

    Examples
    --------
    >>> import numpy as np, pandas as pd, tempfile, xarray as xr
    >>> import xr_anysat
    >>> cube = xr.DataArray(
    ...     np.random.default_rng(0).integers(1, 5000, (30, 10, 4, 4), "uint16"),
    ...     dims=("time", "band", "y", "x"),
    ...     coords={"time": pd.date_range("2021-01-15", periods=30, freq="MS"), "band": list(xr_anysat.BANDS)},
    ... )
    >>> options = {"frames": 2, "norm": "pastis", "model": "tiny", "weights": "random"}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     years = cube.anysat.embed(by=["2021", "2022"], **options).anysat.to_zarr(f"{folder}/years.zarr")
    ...     years = cube.anysat.embed(by=["2023"], **options).anysat.append(f"{folder}/years.zarr")
    ...     years.time.dt.year.values
    array([2021, 2022, 2023])
    """
    check_embeddings(emb, "append('series.zarr')")
    target = parse_location(store, storage_options)
    root = target.root(read_only=True)
    if read_series(root, target) is None:
        raise StoreError(
            f"there is no series at {target}: expected what to_zarr wrote of a series, "
            "cube.anysat.embed(by='year').anysat.to_zarr(...)"
        )
    parts = steps(emb) if is_series(emb) else [step(emb)]
    periods = [read_record(part.attrs).get("temporal_window") for part in parts]
    if None in periods:
        raise CubeError(
            "append() of an embedding whose record has no period: expected the result of embed(), with its attributes"
        )
    stored = stored_periods(root, target)
    locations = {p: step_location(target, p) for p in stored}
    identities = {p: read_identity(at.root(read_only=True), at) for p, at in locations.items()}
    written = [p for p in stored if identities[p] is not None]
    clash = [(p, s) for p in periods for s in written if str(p)[:10] == s[:10] and p != s]
    if clash:
        raise StoreError(
            f"{target} has the step {clash[0][1]}, which begins on the same day as {clash[0][0]}: give another path"
        )
    if not written:
        raise StoreError(f"{target} has no step yet: repeat the call of to_zarr that began it")
    first = written[0]
    identity = identities[first]
    assert identity is not None
    layout = layout_of(identity)
    reference = open_cube(step_location(target, first))
    for part in parts:
        check_comparable(
            comparability_record(part), comparability_record(reference), "append()", f"in {target}"
        )
        grid = identity_of(part, layout)["grid"]
        if any(grid.get(k) != identity["grid"].get(k) for k in ("shape", "crs", "transform")):
            raise StoreError(
                f"{target} has the grid {shorten(identity['grid'], grid)}, and the embedding has "
                f"{shorten(grid, identity['grid'])}: embed the same area"
            )
    for i, (part, period) in enumerate(zip(parts, periods, strict=True)):
        location = step_location(target, str(period))
        write_cube(part, location, layout.codec, progress=_of_several(progress, i, len(parts)), like=layout)
    return open(store, storage_options=storage_options)


def _of_several(
    progress: Callable[[int, int], None] | None, number: int, count: int
) -> Callable[[int, int], None] | None:
    """Return the progress of one of several stores with equal numbers of blocks."""
    if progress is None:
        return None
    return lambda done, total: progress(number * total + done, count * total)


def _with_common_statistics(
    parts: list[xr.DataArray], stored_identity: dict[str, Any] | None
) -> list[xr.DataArray]:
    """Return the steps of a series with the statistics of ``per_tile_zscore`` as numbers.

    Each step is then recorded as what it is: the embedding of its period with these statistics.
    """
    if not isinstance(parts[0].encoding.get(STATISTICS), Companion):
        return parts
    values = statistics_of(parts[0], stored_identity)
    if values is None or not np.isfinite(values).all():
        return parts
    mean, std = values.tolist()
    out = []
    for part in parts:
        fixed = with_values(part, values)
        config = {**parse_json(part.attrs["config"]), "norm": asdict(Statistics(tuple(mean), tuple(std)))}
        fixed.attrs |= {"norm": "statistics", "config": json.dumps(config)}
        fixed.encoding = {k: v for k, v in part.encoding.items() if k != STATISTICS}
        out.append(fixed)
    return out

"""`to_cog`: an embedding cube as a Cloud Optimized GeoTIFF, for QGIS and all that reads rasters.

odc-geo's own writers do not fit embeddings: `write_cog` holds the values five times over in memory and
interleaves the bands, so that a viewer of three reads all 768, and `save_cog_with_dask` pads the raster
to whole tiles. Here values pass window by window from a plain file on disk to the final one, both of which
GDAL writes; the grid is odc-geo's.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from xr_anysat.errors import CubeError, OptionError, WriteError
from xr_anysat.shared.checks import check_embedding, import_optional
from xr_anysat.shared.grid import grid_of
from xr_anysat.shared.values import is_whole_number
from xr_anysat.store.location import folder_problem
from xr_anysat.store.writing import to_zarr

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox

TILE = 512
"""Pixels on the side of a tile of the file."""

WINDOW = 256
"""Cells on the side of what is held at once, in all bands: 200 MB for 768 of them."""

CACHE_MB = 256
"""Of GDAL, whose default is a share of the machine's memory."""


def to_cog(emb: xr.DataArray, path: str | os.PathLike[str], bands: Sequence[int] | None = None) -> Path:
    """Write an embedding cube as a Cloud Optimized GeoTIFF.

    Memory does not grow with the area. A lazy cube is computed into a store first, by
    :func:`xr_anysat.to_zarr` (on a cluster, too): ``area.tif.blocks`` beside ``area.tif``, which is deleted when
    the file is there. A run that was interrupted is so gone on with by the same call.

    Parameters
    ----------
    emb : DataArray, (D, y, x)
        What :func:`xr_anysat.embed` made, with a CRS.
    path : str or path
        A file ``.tif`` or ``.tiff`` that is not there yet. It appears when it is whole.
    bands : sequence of int, optional
        Channels to write, in this order, from 0; default all of them.

    Returns
    -------
    Path
        `path`. float32, nodata NaN; each band is described by the number of its channel, and the
        attrs are tags of the file. Overviews are means of the valid cells, as ``pool="mean"`` has them.

    Raises
    ------
    CubeError, CubeTypeError
        If `emb` has no CRS, or is no embedding cube.
    OptionError
        If `bands` or `path` is impossible.
    WriteError
        If the file is there already or cannot be written.
    AnySatError
        If rasterio is not installed.

    Examples
    --------
    >>> import tempfile, numpy as np, rasterio, xarray as xr
    >>> import odc.geo.xr, xr_anysat
    >>> emb = xr.DataArray(
    ...     np.ones((4, 2, 3), "float32"), dims=("D", "y", "x"), coords={"y": [25.0, 15.0], "x": [5.0, 15.0, 25.0]}
    ... ).odc.assign_crs("EPSG:32632")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with rasterio.open(xr_anysat.to_cog(emb, f"{folder}/area.tif", bands=[2, 0])) as file:
    ...         file.descriptions, file.shape
    (('2', '0'), (2, 3))
    """
    check_embedding(emb, "to_cog('area.tif')")
    channels = _channels(bands, emb.sizes["D"])
    geobox = _geobox(emb)
    target = _target(path)
    rasterio = import_optional("rasterio", "to_cog", "'rasterio>=1.4'")
    chosen = emb if bands is None else emb.isel(D=channels)
    # recorded, or a store of other channels would be taken for this one's
    cube = chosen.astype(np.float32, copy=False).assign_attrs(channels=channels)
    cube.encoding = chosen.encoding
    blocks = target.with_name(f"{target.name}.blocks")
    lazy = cube.chunks is not None
    if lazy:
        cube = to_zarr(cube, blocks / "anysat.zarr")
    try:
        with (
            tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder,
            rasterio.Env(GDAL_CACHEMAX=CACHE_MB, GDAL_TIFF_OVR_BLOCKSIZE=str(TILE)),
        ):
            plain, whole = Path(folder, "plain.tif"), Path(folder, "whole.tif")
            _write(cube, geobox, channels, plain)
            _optimize(plain, whole)
            _compare(plain, whole)
            whole.replace(target)
    except Exception as error:  # of the file system, or of GDAL, which has classes of its own
        reason = folder_problem(target.parent, error) or f"{type(error).__name__}: {error}"
        raise WriteError(
            f"{str(target)!r} could not be written: {reason}. Make its folder writable (space, rights), or give "
            "another path"
        ) from error
    if lazy:
        shutil.rmtree(blocks)
    return target


def _write(cube: xr.DataArray, geobox: GeoBox, channels: list[int], path: Path) -> None:
    """A plain GeoTIFF of a cube in memory or in a store, with overviews."""
    import rasterio
    from rasterio.enums import Resampling
    from rasterio.windows import Window

    height, width = geobox.shape
    with rasterio.open(
        path, "w", driver="GTiff", dtype="float32", nodata=np.nan, count=len(channels),
        height=height, width=width, crs=str(geobox.crs), transform=geobox.transform,
        **_tiles(WINDOW, height, width),
    ) as file:  # fmt: skip
        file.update_tags(**{str(k): _text(v) for k, v in cube.attrs.items()})
        for band, channel in enumerate(channels, 1):
            file.set_band_description(band, str(channel))
        for row, col in product(range(0, height, WINDOW), range(0, width, WINDOW)):
            values = np.asarray(cube.data[:, row : row + WINDOW, col : col + WINDOW])
            file.write(values, window=Window(col, row, values.shape[2], values.shape[1]))
    # until all of it fits in a tile
    levels = [2**k for k in range(1, ((max(height, width) - 1) // TILE).bit_length() + 1)]
    if levels:
        with rasterio.open(path, "r+") as file:
            file.build_overviews(levels, Resampling.average)


def _optimize(plain: Path, path: Path) -> None:
    """The same file with its parts in the order, and tiles of the size, that readers over a network want."""
    import rasterio
    from rasterio.shutil import copy

    with rasterio.open(plain) as file:
        tiles = _tiles(TILE, file.height, file.width)
        copy(
            file, path, driver="GTiff", copy_src_overviews=True, compress="deflate", predictor=3,
            num_threads="all_cpus", **tiles,
        )  # fmt: skip


def _compare(plain: Path, path: Path) -> None:
    """Raise an OSError unless both files hold the same values: of a full disk GDAL says nothing at times."""
    import rasterio
    from rasterio.windows import Window

    with rasterio.open(plain) as file:
        overviews = len(file.overviews(1))
    for level in ({}, *({"overview_level": k} for k in range(overviews))):
        with rasterio.open(plain, **level) as a, rasterio.open(path, **level) as b:
            for band, row in product(a.indexes, range(0, a.height, TILE)):
                window = Window(0, row, a.width, min(TILE, a.height - row))
                if not np.array_equal(
                    a.read(band, window=window), b.read(band, window=window), equal_nan=True
                ):
                    raise OSError(f"what was written of band {band} is not what can be read")


def _tiles(side: int, height: int, width: int) -> dict[str, Any]:
    """Options of GDAL for tiles of `side` pixels, or of a small raster's size; a band on its own."""
    high, wide = (min(side, -(-n // 16) * 16) for n in (height, width))  # multiples of 16 in a TIFF
    return {
        "tiled": True, "blockysize": high, "blockxsize": wide, "interleave": "band", "bigtiff": "if_safer",
    }  # fmt: skip


def _text(value: Any) -> str:
    """An attribute as a tag: text as it is, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(np.asarray(value).tolist())


def _channels(bands: Sequence[int] | None, depth: int) -> list[int]:
    if bands is None:
        return list(range(depth))
    wanted = f"wanted channels from 0 to {depth - 1}, each once, as in bands=[0, 1, 2], or None for all"
    if isinstance(bands, str) or not isinstance(bands, Sequence | np.ndarray) or len(bands) == 0:
        raise OptionError(f"{bands=}: {wanted}")
    for band in bands:
        if not is_whole_number(band, 0, depth - 1):
            raise OptionError(f"{band!r} among bands=: {wanted}")
    channels = [int(band) for band in bands]
    if len(set(channels)) < len(channels):
        twice = sorted({band for band in channels if channels.count(band) > 1})
        raise OptionError(f"{twice} twice among bands=: {wanted}")
    return channels


def _geobox(emb: xr.DataArray) -> GeoBox:
    geobox = grid_of(emb)
    if geobox is None or geobox.crs is None:
        raise CubeError(
            "an embedding cube without a CRS, or without y and x: a GeoTIFF needs both. Give the cube coordinates and "
            "cube.odc.assign_crs('EPSG:32632') before embed()"
        )
    return geobox


def _target(path: str | os.PathLike[str]) -> Path:
    text = os.fspath(path)
    if "://" in text or Path(text).suffix.lower() not in (".tif", ".tiff"):
        raise OptionError(f"path={text!r}: wanted a file of this machine that ends in .tif or .tiff")
    target = Path(text).expanduser()
    if target.exists():
        raise WriteError(
            f"{text!r} is there already, and is not overwritten: give another path, or delete it first, "
            f"pathlib.Path({text!r}).unlink()"
        )
    if not target.parent.is_dir():
        raise WriteError(
            f"there is no folder {str(target.parent)!r} to put {target.name!r} in: make it first, "
            f"pathlib.Path({str(target.parent)!r}).mkdir(parents=True)"
        )
    return target

"""`to_cog`: write an embedding cube as a Cloud Optimized GeoTIFF, for QGIS and other readers of rasters.

The writers of odc-geo do not suit embeddings: `write_cog` needs memory for five copies of the values and interleaves
the bands, so that a viewer of three bands reads all 768, and `save_cog_with_dask` pads the raster to whole tiles. Here,
GDAL copies values window by window from a plain file on disk to the final file; odc-geo provides the grid.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from xr_anysat.errors import CubeError, OptionError, WriteError
from xr_anysat.series import step
from xr_anysat.shared.checks import check_embedding, import_optional
from xr_anysat.shared.grid import grid_of
from xr_anysat.shared.serialization import attribute_json
from xr_anysat.shared.values import is_whole_number
from xr_anysat.store.location import folder_problem
from xr_anysat.store.saving import to_zarr

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox

TILE = 512
"""Side of a tile of the file, in pixels."""

WINDOW = 256
"""Side of the window that is in memory at a time, in cells; 200 MB for 768 bands."""

CACHE_MB = 256
"""Cache of GDAL, whose default is a share of the machine's memory."""


def to_cog(emb: xr.DataArray, path: str | os.PathLike[str], bands: Sequence[int] | None = None) -> Path:
    """Write an embedding cube as a Cloud Optimized GeoTIFF.

    Memory does not grow with the area. A lazy cube is first computed into a store with
    :func:`xr_anysat.to_zarr` (also on a cluster): ``area.tif.blocks`` next to ``area.tif``. The store is
    deleted when the file is complete. Repeat the call to resume an interrupted run.

    Parameters
    ----------
    emb : DataArray, (D, y, x)
        The result of :func:`xr_anysat.embed`, with a CRS.
    path : str or path
        A new file ``.tif`` or ``.tiff``. It appears when it is complete.
    bands : sequence of int, optional
        Channels to write, in this order, from 0; all by default.

    Returns
    -------
    Path
        `path`. The file has float32 values and nodata NaN. The description of a band is the number of its
        channel, and the attrs are tags of the file. Overviews are means of the valid cells, as with
        ``pool="mean"``.

    Raises
    ------
    CubeError, CubeTypeError
        If `emb` has no CRS, or is no embedding cube.
    OptionError
        If `bands` or `path` is impossible.
    WriteError
        If the file exists or cannot be written.
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
    emb = step(emb)
    check_embedding(emb, "to_cog('area.tif')")
    channels = _channels(bands, emb.sizes["D"])
    geobox = _geobox(emb)
    target = _target(path)
    rasterio = import_optional("rasterio", "to_cog", "'rasterio>=1.4'")
    chosen = emb if bands is None else emb.isel(D=channels)
    # recorded, so that a store of other channels is not resumed
    cube = chosen.astype(np.float32, copy=False).assign_attrs(channels=channels)
    cube.encoding = chosen.encoding
    tags = _tags(cube.attrs)
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
            _write(cube, geobox, channels, tags, plain)
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


def _write(cube: xr.DataArray, geobox: GeoBox, channels: list[int], tags: dict[str, str], path: Path) -> None:
    """Write a plain GeoTIFF of a cube in memory or in a store, with overviews."""
    import rasterio
    from rasterio.enums import Resampling
    from rasterio.windows import Window

    height, width = geobox.shape
    with rasterio.open(
        path, "w", driver="GTiff", dtype="float32", nodata=np.nan, count=len(channels),
        height=height, width=width, crs=str(geobox.crs), transform=geobox.transform,
        **_tiles(WINDOW, height, width),
    ) as file:  # fmt: skip
        file.update_tags(**tags)
        for band, channel in enumerate(channels, 1):
            file.set_band_description(band, str(channel))
        for row, col in product(range(0, height, WINDOW), range(0, width, WINDOW)):
            values = np.asarray(cube.data[:, row : row + WINDOW, col : col + WINDOW])
            file.write(values, window=Window(col, row, values.shape[2], values.shape[1]))
    # until the raster fits into one tile
    levels = [2**k for k in range(1, ((max(height, width) - 1) // TILE).bit_length() + 1)]
    if levels:
        with rasterio.open(path, "r+") as file:
            file.build_overviews(levels, Resampling.average)


def _optimize(plain: Path, path: Path) -> None:
    """Write the same file with the order of parts and the size of tiles that suit readers over a network."""
    import rasterio
    from rasterio.shutil import copy

    with rasterio.open(plain) as file:
        tiles = _tiles(TILE, file.height, file.width)
        copy(
            file, path, driver="GTiff", copy_src_overviews=True, compress="deflate", predictor=3,
            num_threads="all_cpus", **tiles,
        )  # fmt: skip


def _compare(plain: Path, path: Path) -> None:
    """Raise an OSError unless both files have the same values, because GDAL does not always report a full disk."""
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
                    raise OSError(f"band {band} reads differently from what was written")


def _tiles(side: int, height: int, width: int) -> dict[str, Any]:
    """Return the options of GDAL for tiles of `side` pixels, at most the size of the raster, band by band."""
    high, wide = (min(side, -(-n // 16) * 16) for n in (height, width))  # multiples of 16 in a TIFF
    return {
        "tiled": True, "blockysize": high, "blockxsize": wide, "interleave": "band", "bigtiff": "if_safer",
    }  # fmt: skip


def _tags(attrs: Mapping[Any, Any]) -> dict[str, str]:
    """Return attributes as tags: text unchanged, other values as JSON."""
    tags = {}
    for name, value in attrs.items():
        text = attribute_json(name, value)
        tags[name] = value if isinstance(value, str) else text
        both = f"{name}{tags[name]}"
        complete = "\0" not in both and both == both.encode(errors="ignore").decode()  # GDAL stops at a zero
        if name in ("ns", "bidx") or not complete:  # these names are arguments of rasterio
            raise CubeError(
                f"attribute {name!r} cannot be a tag of a GeoTIFF: rename it, or drop it, emb.attrs.pop({name!r})"
            )
    return tags


def _channels(bands: Sequence[int] | None, depth: int) -> list[int]:
    if bands is None:
        return list(range(depth))
    expected = f"expected channels from 0 to {depth - 1}, each once, as in bands=[0, 1, 2], or None for all"
    if isinstance(bands, str) or not isinstance(bands, Sequence | np.ndarray) or len(bands) == 0:
        raise OptionError(f"{bands=}: {expected}")
    for band in bands:
        if not is_whole_number(band, 0, depth - 1):
            raise OptionError(f"{band!r} among bands=: {expected}")
    channels = [int(band) for band in bands]
    if len(set(channels)) < len(channels):
        twice = sorted({band for band in channels if channels.count(band) > 1})
        raise OptionError(f"{twice} twice among bands=: {expected}")
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
        raise OptionError(f"path={text!r}: expected a file of this machine that ends in .tif or .tiff")
    target = Path(text).expanduser()
    if target.exists():
        raise WriteError(
            f"{text!r} exists and is not overwritten: give another path, or delete it first, "
            f"pathlib.Path({text!r}).unlink()"
        )
    if not target.parent.is_dir():
        raise WriteError(
            f"the folder {str(target.parent)!r} of {target.name!r} does not exist: create it first, "
            f"pathlib.Path({str(target.parent)!r}).mkdir(parents=True)"
        )
    return target

"""A small synthetic Sentinel-2 year on disk: realistic, with known land cover.

:func:`make_scene` writes files like those of a downloaded Sentinel-2 L2A time series: one GeoTIFF per band and date, DN
(reflectance × 10 000) as uint16, six of the ten bands at 20 m, a scene classification (SCL), clouds with shadows, and a
swath edge. It also writes STAC items, which a catalog can serve to :func:`xr_anysat.open_s2`. :func:`open_scene` reads
the files as a user of rioxarray would. The demo, the notebooks and the tests use both.

Spectra are mixtures of a few endmembers that change with the season. The endmembers are typical surface reflectances
of temperate Europe, read off by eye and rounded: plausible, and no more than that.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import rasterio
import rioxarray
import xarray as xr
from rasterio.enums import Resampling
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform as transform_points
from rasterio.warp import transform_geom

from xr_anysat.errors import CubeError, OptionError
from xr_anysat.shared.sensor import S2
from xr_anysat.shared.values import check_whole_number
from xr_anysat.stac.search import SCL_INVALID

Floats = npt.NDArray[np.float32]

Ints = npt.NDArray[np.int64]


def _in_files(band: str) -> str:
    """Name of a band in the files of a product: B2 is B02."""
    return f"B{band[1:]:0>2}"


BANDS = tuple(_in_files(band) for band in S2.bands)
"""The ten bands, as products name their files."""

BANDS_20M = ("B05", "B06", "B07", "B8A", "B11", "B12")

# Keys of the assets in Earth Search
_ASSETS = {_in_files(band): name for name, band in S2.common_names.items()} | {"SCL": "scl"}

# Central wavelength of each band in µm, for haze
_WAVELENGTH = np.array([0.490, 0.560, 0.665, 0.705, 0.740, 0.783, 0.842, 0.865, 1.610, 2.190], "float32")

CLASSES: Mapping[int, str] = {
    1: "winter cereal",
    2: "maize",
    3: "rapeseed",
    4: "grassland",
    5: "broadleaf forest",
    6: "conifer forest",
    7: "water",
    8: "town",
    9: "bare soil",
}

CLASS_COLORS: Mapping[int, str] = {
    1: "#e3c567",
    2: "#d98032",
    3: "#f2ea3d",
    4: "#a6d96a",
    5: "#4d9c3f",
    6: "#1b5e3b",
    7: "#3b7dc4",
    8: "#c44e52",
    9: "#a58b78",
}

# Surface reflectance in the ten bands
_ENDMEMBERS: dict[str, list[float]] = {
    "soil": [0.065, 0.090, 0.125, 0.145, 0.160, 0.175, 0.190, 0.205, 0.275, 0.235],
    "quarry": [0.110, 0.150, 0.190, 0.210, 0.225, 0.240, 0.255, 0.270, 0.350, 0.320],
    "crop": [0.025, 0.055, 0.028, 0.090, 0.320, 0.420, 0.440, 0.460, 0.190, 0.085],
    "straw": [0.075, 0.115, 0.155, 0.185, 0.215, 0.235, 0.255, 0.270, 0.320, 0.230],
    "flower": [0.050, 0.160, 0.145, 0.200, 0.360, 0.430, 0.450, 0.470, 0.220, 0.110],
    "grass": [0.035, 0.070, 0.045, 0.115, 0.290, 0.360, 0.380, 0.400, 0.220, 0.115],
    "leaves": [0.020, 0.045, 0.022, 0.085, 0.280, 0.360, 0.380, 0.395, 0.165, 0.070],
    "autumn": [0.032, 0.065, 0.085, 0.140, 0.240, 0.270, 0.290, 0.305, 0.205, 0.110],
    "twigs": [0.038, 0.052, 0.062, 0.080, 0.115, 0.135, 0.150, 0.165, 0.190, 0.125],
    "needles": [0.017, 0.032, 0.020, 0.048, 0.140, 0.170, 0.182, 0.190, 0.090, 0.040],
    "lake": [0.032, 0.036, 0.018, 0.015, 0.011, 0.010, 0.009, 0.008, 0.005, 0.004],
    "river": [0.050, 0.068, 0.052, 0.048, 0.035, 0.030, 0.027, 0.024, 0.010, 0.007],
    "asphalt": [0.100, 0.106, 0.112, 0.116, 0.120, 0.124, 0.128, 0.130, 0.150, 0.145],
    "tiles": [0.065, 0.085, 0.135, 0.160, 0.180, 0.195, 0.210, 0.220, 0.260, 0.235],
    "metal": [0.250, 0.260, 0.270, 0.275, 0.280, 0.285, 0.290, 0.290, 0.280, 0.250],
}

_SPECTRA = {name: np.array(values, "float32") for name, values in _ENDMEMBERS.items()}

_CLOUD = np.array([0.62, 0.62, 0.62, 0.62, 0.63, 0.64, 0.65, 0.65, 0.46, 0.34], "float32")


MAX_SIZE = 4096
"""Largest side of a scene in pixels: the ten bands of a date then have 185 MB."""


@dataclass(frozen=True)
class SyntheticScene:
    """The files that :func:`make_scene` wrote.

    Attributes
    ----------
    folder : Path
        The folder of all files.
    observations : tuple of (date, dict of str to Path)
        One entry per date, in order: the files of ``B02`` … ``B12`` and ``SCL``.
    landcover : Path
        The true land cover at 10 m, uint8, with the codes of `classes`.
    classes : Mapping of int to str
        The name of each land-cover code.
    items : Path
        STAC items of the observations: a GeoJSON FeatureCollection.
    center : (float, float)
        Longitude and latitude of the center.
    """

    folder: Path
    observations: tuple[tuple[date, dict[str, Path]], ...]
    landcover: Path
    classes: Mapping[int, str]
    items: Path
    center: tuple[float, float]


@dataclass(frozen=True)
class _Ground:
    """Everything that is constant during the year; each array is (y, x) at 10 m."""

    cover: npt.NDArray[np.uint8]
    shift: Floats  # delay of the parcel's season in days
    brightness: Floats  # factor of the parcel and of the texture of the canopy
    material: Ints  # index into _MATERIALS, where the cover is water or town
    track: npt.NDArray[np.bool_]  # dirt tracks between fields


_MATERIALS = ("lake", "river", "asphalt", "tiles", "metal", "grass")

_LAKE, _RIVER, _ASPHALT, _TILES, _METAL, _GARDEN = range(6)


def make_scene(
    folder: str | Path,
    *,
    size: tuple[int, int] = (240, 240),
    year: int = 2022,
    dates: int = 24,
    seed: int = 0,
    crs: str = "EPSG:32632",
    origin: tuple[int, int] = (688_140, 5_104_580),
) -> SyntheticScene:
    """Write a synthetic Sentinel-2 year as GeoTIFFs.

    Parameters
    ----------
    folder : str or Path
        Created if it does not exist. Contains ``YYYYMMDD/B02.tif`` …, ``YYYYMMDD/SCL.tif``, ``landcover.tif`` and
        ``items.json``. Existing files with these names are overwritten; folders of other dates are kept.
    size : tuple of int
        Rows and columns at 10 m; even, so that 20 m pixels fit.
    year : int
        Year of the observations.
    dates : int
        Number of dates, 1 to 73, spread over the year in multiples of the five-day revisit time.
    seed : int
        0 or more; the same seed gives the same scene.
    crs : str
        A projected CRS in meters.
    origin : tuple of int
        Upper left corner (x, y) in meters, multiples of 10. The default is not a multiple of 40 or 240, so the border
        cuts patches and windows of the grid, as in real areas.

    Returns
    -------
    SyntheticScene
        The files and the class names.

    Raises
    ------
    OptionError
        If `size` is odd, not positive or above :data:`MAX_SIZE`, `origin` is not on the 10 m lattice, or `dates` or
        `seed` is out of range.
    """
    if min(size) < 2 or size[0] % 2 or size[1] % 2 or max(size) > MAX_SIZE:
        raise OptionError(
            f"{size=}: expected even, positive numbers of pixels up to {MAX_SIZE}, so that 20 m pixels fit "
            "and the scene fits into memory"
        )
    if origin[0] % 10 or origin[1] % 10:
        raise OptionError(f"{origin=}: expected multiples of 10 m")
    if not 1 <= dates <= 73:
        raise OptionError(f"{dates=}: expected 1 to 73, one per five-day revisit of a year")
    seed = check_whole_number("seed", seed, 0)

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    ground = _ground(rng, size)
    clouds = _cloud_shares(rng, dates)
    # The swath ends within the scene on the clear date nearest to midsummer
    cut = int(np.argmin(clouds * dates + np.abs(np.arange(dates) - dates / 2) / dates))
    passes = np.linspace(0, 72, dates).round().astype(int)

    def transform(pixel: int) -> Affine:
        """Transform of an image whose pixels are so many meters wide."""
        return Affine(pixel, 0, origin[0], 0, -pixel, origin[1])

    observations = []
    for i, n in enumerate(passes):
        day = date(year, 1, 3) + timedelta(days=5 * int(n))
        dn, scl = _observe(np.random.default_rng([seed, i]), ground, day, float(clouds[i]), swath=i == cut)
        paths = {}
        (folder / f"{day:%Y%m%d}").mkdir(exist_ok=True)
        images: dict[str, npt.NDArray[Any]] = {**dn, "SCL": scl}
        for name, values in images.items():
            paths[name] = folder / f"{day:%Y%m%d}" / f"{name}.tif"
            step = size[0] // values.shape[0]
            _write(paths[name], values, crs, transform(10 * step), name)
        observations.append((day, paths))

    landcover = folder / "landcover.tif"
    _write(landcover, ground.cover, crs, transform(10), "land cover", CLASSES)
    items = folder / "items.json"
    features = [_item(day, paths, crs) for day, paths in observations]
    items.write_text(json.dumps({"type": "FeatureCollection", "features": features}, indent=1))
    (lon,), (lat,) = transform_points(crs, "EPSG:4326", [origin[0] + 5 * size[1]], [origin[1] - 5 * size[0]])
    return SyntheticScene(folder, tuple(observations), landcover, CLASSES, items, (lon, lat))


def open_scene(folder: str | Path, *, chunks: int = 128) -> xr.DataArray:
    """Open a folder of :func:`make_scene` as a lazy cube.

    The 20 m bands are resampled to 10 m bilinearly (no-data pixels have no weight), the SCL by nearest neighbor.
    Pixels that the SCL classifies as no data, cloud or shadow become NaN.

    Parameters
    ----------
    folder : str or Path
        Contains ``YYYYMMDD/B02.tif`` and so on.
    chunks : int
        Side of the dask chunks in pixels.

    Returns
    -------
    DataArray, (time, band, y, x)
        ``s2``: DN as float32 with NaN, lazy, with CRS.

    Raises
    ------
    CubeError
        If the folder contains no dates.
    """
    folders = sorted(p.parent for p in Path(folder).glob("[0-9]" * 8 + "/B02.tif"))
    if not folders:
        raise CubeError(
            f"no YYYYMMDD/B02.tif in {str(folder)!r}: write a scene there with make_scene(folder)"
        )

    with rasterio.open(folders[0] / "B02.tif") as file:
        grid = {"crs": file.crs, "transform": file.transform, "width": file.width, "height": file.height}

    def read(path: Path, resampling: Resampling) -> xr.DataArray:
        with rasterio.open(path) as file, WarpedVRT(file, resampling=resampling, **grid) as on_grid:
            image = cast(xr.DataArray, rioxarray.open_rasterio(on_grid, chunks={"y": chunks, "x": chunks}))
        return image.squeeze("band", drop=True)

    times = []
    for each in folders:
        clear = ~read(each / "SCL.tif", Resampling.nearest).isin(SCL_INVALID)
        bands = [read(each / f"{band}.tif", Resampling.bilinear) for band in BANDS]
        cube = xr.concat(bands, "band", join="exact", combine_attrs="drop")
        times.append(cube.where((cube != 0) & clear).astype("float32"))
    cube = xr.concat(times, "time", join="exact", combine_attrs="drop")
    dates = [np.datetime64(datetime.strptime(each.name, "%Y%m%d"), "ns") for each in folders]
    cube = cube.assign_coords(time=dates, band=list(BANDS)).rename("s2")
    cube.attrs = {"long_name": "Sentinel-2 surface reflectance × 10 000", "units": "1e-4"}
    referenced: xr.DataArray = cube.rio.write_crs(grid["crs"])
    return referenced


def _item(day: date, paths: Mapping[str, Path], crs: str) -> dict[str, Any]:
    """STAC item of an observation, with the layout of Earth Search; it says that it is synthetic."""
    with rasterio.open(paths["SCL"]) as file:
        scl, bounds = file.read(1), file.bounds
    left, bottom, right, top = bounds
    ring = [(left, bottom), (right, bottom), (right, top), (left, top), (left, bottom)]
    footprint = transform_geom(crs, "EPSG:4326", {"type": "Polygon", "coordinates": [ring]})
    lons, lats = zip(*footprint["coordinates"][0], strict=True)
    observed = max(1, int((scl != 0).sum()))
    assets = {}
    for name, path in paths.items():
        with rasterio.open(path) as file:
            grid = {"proj:shape": list(file.shape), "proj:transform": list(file.transform)[:6]}
            raster: dict[str, Any] = {"nodata": 0, "data_type": file.dtypes[0]}
        if name != "SCL":
            raster |= {"scale": 1e-4, "offset": 0.0}
        assets[_ASSETS[name]] = {
            "href": path.resolve().as_uri(),
            "type": "image/tiff; application=geotiff",
            "title": name,
            "raster:bands": [raster],
            **grid,
        }
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": f"synthetic-{day:%Y%m%d}",
        "collection": "synthetic",
        "geometry": footprint,
        "bbox": [min(lons), min(lats), max(lons), max(lats)],
        "properties": {
            "datetime": f"{day.isoformat()}T10:20:00Z",
            "description": "Synthetic, made by xr_anysat.demo.scene: not observed by a satellite",
            "eo:cloud_cover": round(100 * float(np.isin(scl, (8, 9, 10)).sum()) / observed, 3),
            "proj:epsg": rasterio.crs.CRS.from_string(crs).to_epsg(),
        },
        "links": [],
        "assets": assets,
    }


def _write(
    path: Path,
    values: npt.NDArray[Any],
    crs: str,
    transform: Affine,
    name: str,
    classes: Mapping[int, str] | None = None,
) -> None:
    profile = {
        "driver": "GTiff",
        "width": values.shape[1],
        "height": values.shape[0],
        "count": 1,
        "dtype": values.dtype.name,
        "crs": crs,
        "transform": transform,
        "nodata": 0,
        "tiled": True,
        "blockxsize": 128,
        "blockysize": 128,
        "compress": "deflate",
        "predictor": 2,
    }
    with rasterio.open(path, "w", **profile) as file:
        file.write(values, 1)
        file.set_band_description(1, name)
        if classes:
            file.update_tags(1, **{f"class_{code}": label for code, label in classes.items()})


# --- the ground ---------------------------------------------------------------------------------


def _floats(values: npt.ArrayLike) -> Floats:
    return np.asarray(values, "float32")


def _noise(rng: np.random.Generator, shape: tuple[int, int], scale: float, slope: float = 1.6) -> Floats:
    """Fractal noise of zero mean and unit variance, smooth below `scale` pixels."""
    # The Fourier transform is periodic: make a larger field and crop it
    h, w = (n + math.ceil(2 * scale) for n in shape)
    frequency = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None])
    spectrum = np.fft.rfft2(rng.standard_normal((h, w))) / (1 + (frequency * 3 * scale) ** 2) ** (slope / 2)
    field = np.fft.irfft2(spectrum, (h, w))[: shape[0], : shape[1]]
    return _floats((field - field.mean()) / field.std())


def _parcels(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Parcel numbers, and tracks between blocks. A block is a Voronoi cell that is cut into parallel strips."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype("float32")
    # Real hedges and ditches are not straight
    y, x = y + _noise(rng, shape, 25), x + _noise(rng, shape, 25)
    n = max(6, shape[0] * shape[1] // 45**2)
    first, second = np.full((2, *shape), np.inf, "float32")
    block = np.zeros(shape, int)
    for i, (cy, cx) in enumerate(rng.uniform(0, shape, (n, 2))):
        distance = _floats(np.hypot(y - cy, x - cx))
        block[distance < first] = i
        second = np.minimum(second, np.maximum(first, distance))
        first = np.minimum(first, distance)
    angle, width = rng.uniform(0, np.pi, n)[block], rng.uniform(9, 22, n)[block]
    strip = np.floor((x * np.cos(angle) + y * np.sin(angle)) / width).astype(int)
    parcel = np.unique(block * 10_000 + strip, return_inverse=True)[1].reshape(shape)
    return parcel, second - first < 1.4


def _ground(rng: np.random.Generator, shape: tuple[int, int]) -> _Ground:
    v, u = np.mgrid[: shape[0], : shape[1]] / np.reshape(shape, (2, 1, 1))
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    coarse, fine = _noise(rng, shape, 0.15 * min(shape)), _noise(rng, shape, 5)

    parcel, track = _parcels(rng, shape)
    n = parcel.max() + 1
    crops = rng.choice([1, 2, 3, 4, 9], n, p=[0.30, 0.24, 0.16, 0.22, 0.08])
    cover = crops[parcel].astype("uint8")

    # Wooded hills in the north-west and a few small woods; conifers at greater height
    height = 0.42 - u * 0.45 - v * 0.65 + 0.10 * coarse
    copse = _noise(rng, shape, 14) + 0.3 * fine > 2.1
    forest = (height + 0.02 * fine > 0) | copse
    cover[forest] = np.where(height + 0.06 * _noise(rng, shape, 10) > 0.20, 6, 5)[forest]

    # A river flows from the north through a lake
    meander = 0.60 - 0.16 * v + 0.06 * np.sin(7.5 * v + rng.uniform(0, 6)) + 0.01 * coarse
    river = np.abs(u - meander) * shape[1] < 2.2 + 0.3 * fine
    lake = np.hypot((u - meander - 0.03) / 0.13, (v - 0.36) / 0.10) + 0.10 * coarse + 0.04 * fine < 1
    material = np.zeros(shape, int)
    material[river & ~lake] = _RIVER
    cover[river | lake] = 7

    # A town of square blocks, and a road to the east and to the west
    turn = rng.uniform(0.2, 0.5)
    across = columns * math.cos(turn) + rows * math.sin(turn)
    along = rows * math.cos(turn) - columns * math.sin(turn)
    town = np.hypot((u - 0.76) / 0.19, (v - 0.75) / 0.16) + 0.12 * coarse + 0.05 * fine < 1
    road = np.abs(along - along[int(0.75 * shape[0]), int(0.76 * shape[1])]) < 0.8
    street = (across % 9 < 1.3) | (along % 7 < 1.3)
    plot = ((across // 4.5).astype(int) * 7919 + (along // 3.5).astype(int) * 104_729) % 1013
    roofs = rng.choice([_ASPHALT, _TILES, _METAL, _GARDEN], 1013, p=[0.20, 0.42, 0.03, 0.35])[plot]
    built = (town | road) & (cover != 7)
    material[built] = np.where(street | road, _ASPHALT, roofs)[built]
    cover[built] = 8

    wooded = np.isin(cover, (5, 6))
    texture = np.where(wooded, 0.13, np.where(cover == 7, 0.03, 0.05)) * _noise(rng, shape, 1.0, 1.0)
    fields = ~wooded & (cover < 7)
    vigour = np.where(fields, rng.uniform(0.88, 1.10, n)[parcel], 1) + 0.03 * _noise(rng, shape, 8)
    shift = np.where(fields, rng.normal(0, 5, n)[parcel], 2 * coarse)
    return _Ground(
        cover=cover,
        shift=_floats(shift),
        brightness=_floats(np.clip(vigour + texture, 0.5, 1.5)),
        material=material,
        track=track & fields,
    )


# --- the seasons --------------------------------------------------------------------------------

Mixture = dict[str, Any]  # endmember: its share, scalar or (n,)


def _rise(day: Floats, at: float, width: float) -> Floats:
    return _floats(1 / (1 + np.exp(-np.clip((day - at) / width, -40, 40))))


def _annual(
    day: Floats, up: float, ripe: float, harvest: float, winter: float, flower: float | None, catch: float
) -> Mixture:
    """Annual crop: it greens up, may flower, ripens to straw and is harvested; a catch crop may follow."""
    ripening = _rise(day, ripe, 6)
    green = (winter + (1 - winter) * _rise(day, up, 9)) * (1 - ripening)
    straw = ripening * (0.25 + 0.75 * (1 - _rise(day, harvest, 2))) * (1 - 0.6 * _rise(day, harvest + 40, 8))
    green = green + catch * _rise(day, harvest + 45, 9)
    bloom = 0.0 if flower is None else 0.95 * np.exp(-(((day - flower) / 12) ** 2))
    return {"crop": green * (1 - bloom), "flower": green * bloom, "straw": straw, "soil": 1 - green - straw}


def _grassland(day: Floats) -> Mixture:
    green = 0.55 + 0.40 * _rise(day, 90, 9) * (1 - _rise(day, 305, 12))
    for cut in (148, 205, 258):
        green = green - 0.38 * (day >= cut) * np.exp(-np.maximum(day - cut, 0) / 16)
    return {"grass": green, "straw": 0.6 * (1 - green), "soil": 0.4 * (1 - green)}


def _broadleaf(day: Floats) -> Mixture:
    leaves = _rise(day, 112, 6) * (1 - _rise(day, 300, 6))
    autumn = leaves * _rise(day, 278, 6)
    return {"leaves": leaves - autumn, "autumn": autumn, "twigs": 1 - leaves}


_PHENOLOGY: dict[int, Callable[[Floats], Mixture]] = {
    1: lambda day: _annual(day, up=88, ripe=184, harvest=203, winter=0.25, flower=None, catch=0.35),
    2: lambda day: _annual(day, up=162, ripe=262, harvest=276, winter=0.0, flower=None, catch=0.0),
    3: lambda day: _annual(day, up=80, ripe=178, harvest=196, winter=0.45, flower=117, catch=0.15),
    4: _grassland,
    5: _broadleaf,
    6: lambda day: {"needles": 1.0},
    9: lambda day: {"quarry": 0.55, "soil": 0.45},
}


def _reflectance(ground: _Ground, doy: int) -> Floats:
    """Reflectance (10, y, x) of the ground on a day of the year, without atmosphere."""
    result = np.zeros((*ground.cover.shape, len(BANDS)), "float32")
    for code, mixture in _PHENOLOGY.items():
        here = ground.cover == code
        for name, share in mixture(doy - ground.shift[here]).items():
            result[here] += np.multiply.outer(np.broadcast_to(share, here.sum()), _SPECTRA[name])
    for i, name in enumerate(_MATERIALS):
        here = np.isin(ground.cover, (7, 8)) & (ground.material == i)
        # Gardens between houses follow the seasons
        green = 0.20 if name in ("tiles", "asphalt") else 1.0 if name == "grass" else 0.0
        garden = sum(
            share[:, None] * _SPECTRA[n] for n, share in _grassland(doy - ground.shift[here]).items()
        )
        result[here] = (1 - green) * _SPECTRA[name] + green * garden
    result[ground.track] = 0.5 * result[ground.track] + 0.5 * _SPECTRA["straw"]
    return np.moveaxis(result * ground.brightness[..., None], -1, 0)


# --- observations --------------------------------------------------------------------


def _cloud_shares(rng: np.random.Generator, dates: int) -> Floats:
    """Cloud share of each date: a third is clear, a sixth overcast, the rest has broken clouds."""
    clear, overcast = round(dates / 3), round(dates / 6)
    broken = np.linspace(0.06, 0.42, dates - clear - overcast)
    return rng.permutation(np.concatenate([np.zeros(clear), broken, np.ones(overcast)])).astype("float32")


def _blur(image: Floats) -> Floats:
    """Apply the sensor's point spread function, about one pixel wide: [1 2 1] / 4 along y and x."""
    for axis in (-2, -1):
        pad = [(1, 1) if a == axis % image.ndim else (0, 0) for a in range(image.ndim)]
        p = np.moveaxis(np.pad(image, pad, "edge"), axis, 0)
        image = np.moveaxis(_floats((p[:-2] + 2 * p[1:-1] + p[2:]) / 4), 0, axis)
    return image


def _halve(image: npt.NDArray[Any], how: Callable[..., Any]) -> npt.NDArray[Any]:
    """Reduce blocks of 2 × 2 pixels: from 10 m to 20 m."""
    *rest, h, w = image.shape
    blocks: npt.NDArray[Any] = how(image.reshape(*rest, h // 2, 2, w // 2, 2), axis=(-3, -1))
    return blocks


def _observe(
    rng: np.random.Generator, ground: _Ground, day: date, cloudiness: float, *, swath: bool
) -> tuple[dict[str, npt.NDArray[np.uint16]], npt.NDArray[np.uint8]]:
    """DN of each band on its own grid, and the SCL at 20 m."""
    shape = ground.cover.shape
    surface = _reflectance(ground, day.timetuple().tm_yday - 1)

    # Optical thickness from 0 (clear) to 1 (opaque) with thin edges; the shadow is to the north-west
    veil = _noise(rng, shape, 0.15 * min(shape), 1.8)
    edge = np.quantile(veil, 1 - cloudiness) if cloudiness < 1 else -6.0
    thick = np.clip((veil - edge) / 0.35, 0, 1) * (cloudiness > 0)
    dy, dx = (max(2, round(f * min(shape))) for f in (0.06, 0.045))
    shadow = np.pad(thick, ((0, dy), (0, dx)), "edge")[dy:, dx:] * (1 - thick)

    image = _blur(surface * (1 - 0.65 * shadow))
    bright = _CLOUD[:, None, None] * (1 + 0.12 * _noise(rng, shape, 6))
    image = image * (1 - thick) + bright * thick
    haze = rng.uniform(0.0, 0.012) * (0.49 / _WAVELENGTH) ** 1.5
    image = image * rng.uniform(0.98, 1.02) + haze[:, None, None]

    y, x = np.mgrid[: shape[0], : shape[1]]
    missing = (x / shape[1] + 0.25 * y / shape[0] > 0.85) & swath

    bands: dict[str, npt.NDArray[np.uint16]] = {}
    gone20 = _halve(missing, np.any)
    for name, values in zip(BANDS, image, strict=True):
        band, gone = (_halve(values, np.mean), gone20) if name in BANDS_20M else (values, missing)
        band = band + rng.standard_normal(band.shape) * (0.0012 + 0.008 * band)
        # DN 0 means no data, so the darkest pixel is 1
        bands[name] = np.where(gone, 0, np.clip(np.rint(band * 10_000), 1, 12_000)).astype("uint16")

    red, nir = _halve(surface[BANDS.index("B04")], np.mean), _halve(surface[BANDS.index("B08")], np.mean)
    scl = np.where((nir - red) / (nir + red) > 0.4, 4, 5)
    scl[_halve(ground.cover == 7, np.mean) > 0.5] = 6
    scl[_halve(shadow, np.max) > 0.15] = 3
    scl[_halve(thick, np.max) > 0.02] = 8
    scl[_halve(thick, np.mean) > 0.6] = 9
    scl[gone20] = 0
    return bands, scl.astype("uint8")

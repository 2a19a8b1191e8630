"""Attributes of the Zarr conventions ``geoemb:``, ``proj:`` and ``spatial:``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import xarray as xr

from xr_anysat.record import has_record, read_record
from xr_anysat.shared.grid import grid_of
from xr_anysat.store.stac_items import (
    cell_pixels,
    crs_members,
    grid_members,
    pixel_meters,
    source_uris,
    title_of,
    weights_facts,
)

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox

# Entries of `zarr_conventions`, literally as the JSON schema of each convention demands: geoemb: at its tag v1
# (geo-embeddings/embeddings-zarr-convention), the others at their tags v0.1 (zarr-conventions).
GEOEMB = {
    "uuid": "61c12cc5-0e28-4056-999a-480cf3fb7e4c",
    "schema_url": (
        "https://raw.githubusercontent.com/geo-embeddings/embeddings-zarr-convention/refs/tags/v1/schema.json"
    ),
    "spec_url": "https://github.com/geo-embeddings/embeddings-zarr-convention/blob/v1/README.md",
    "name": "geoemb:",
    "description": "Geoembeddings convention for geospatial embedding arrays with model provenance",
}

PROJ = {
    "uuid": "f17cb550-5864-4468-aeb7-f3180cfb622f",
    "schema_url": "https://raw.githubusercontent.com/zarr-conventions/proj/refs/tags/v0.1/schema.json",
    "spec_url": "https://github.com/zarr-conventions/proj/blob/v0.1/README.md",
    "name": "proj",
    "description": "Coordinate reference system information for geospatial data",
}

SPATIAL = {
    "uuid": "689b58e2-cf7b-45e0-9fff-9cfc0883d6b4",
    "schema_url": "https://raw.githubusercontent.com/zarr-conventions/spatial/refs/tags/v0.1/schema.json",
    "spec_url": "https://github.com/zarr-conventions/spatial/blob/v0.1/README.md",
    "name": "spatial",
    "description": "Spatial coordinate information",
}


def group_attributes(
    emb: xr.DataArray, *, data_type: str, quantization: dict[str, Any] | None
) -> dict[str, Any]:
    """Return the attributes of the Zarr group of an embedding cube.

    Parameters
    ----------
    emb : DataArray, (D, y, x)
        The cube on the grid of the arrays in the store.
    data_type : str
        Data type of the stored values: ``"float32"``, ``"float16"`` or ``"int8"``.
    quantization : dict, optional
        As in :class:`xr_anysat.store.codecs.Codec`; None if values are stored unchanged.

    Returns
    -------
    dict
        JSON. ``zarr_conventions`` declares the conventions used: ``geoemb:`` (with a title and a comment) for
        a cube with the record of :func:`xr_anysat.embed` in its attrs, ``proj:`` for a cube with a CRS,
        ``spatial:`` for a cube with coordinates.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> emb = xr.DataArray(np.ones((4, 2, 3)), dims=("D", "y", "x"), coords={"y": [25, 15], "x": [0, 10, 20]})
    >>> attributes = group_attributes(emb, data_type="float64", quantization=None)
    >>> attributes["spatial:transform"], attributes["spatial:bbox"]
    ([10.0, 0.0, -5.0, 0.0, -10.0, 30.0], [-5.0, 10.0, 25.0, 30.0])
    """
    geobox = grid_of(emb)
    declared: list[dict[str, str]] = []
    attributes: dict[str, Any] = {}
    if has_record(emb):
        record = read_record(emb.attrs)
        declared.append(GEOEMB)
        attributes |= {
            "title": title_of(record),
            "comment": f"AnySat with {weights_facts(record).description}.",
        }
        attributes |= _geoemb(emb, record, geobox, data_type, quantization)
    if geobox is not None and geobox.crs is not None:
        declared.append(PROJ)
        attributes |= crs_members(geobox)
    if geobox is not None:
        declared.append(SPATIAL)
        attributes |= {f"spatial:{key}": value for key, value in grid_members(geobox).items()}
        attributes |= {"spatial:dimensions": ["y", "x"], "spatial:registration": "pixel"}
    return {"zarr_conventions": [dict(entry) for entry in declared], **attributes}


def _geoemb(
    emb: xr.DataArray,
    record: dict[str, Any],
    geobox: GeoBox | None,
    data_type: str,
    quantization: dict[str, Any] | None,
) -> dict[str, Any]:
    from xr_anysat._version import __version__

    cell = cell_pixels(record)
    members: dict[str, Any] = {
        "type": "pixel" if cell == 1 else "chip",
        "dimensions": emb.sizes["D"],
        "model": weights_facts(record).url,
        "source_data": source_uris(record),
        "data_type": data_type,
        "build_version": __version__,
    }
    if geobox is not None and geobox.crs is not None:
        members["gsd"] = pixel_meters(record, geobox)
    if cell > 1:
        members["chip_layout"] = {
            "layout_type": "regular_grid", "chip_size": [cell, cell], "stride": [cell, cell],
        }  # fmt: skip
    if quantization is not None:
        members["quantization"] = quantization
    return {f"geoemb:{key}": value for key, value in members.items()}

"""The STAC catalogs that are known by name, and how patient to be with their servers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from xr_anysat.errors import CatalogError
from xr_anysat.shared.checks import require_packages

# Of a server: seconds to answer, tries, and seconds before the second try, then doubled.
TIMEOUT, TRIES, WAIT = 60.0, 6, 0.5

LONGEST_WAIT = 60.0  # seconds, whatever a server's Retry-After says

RETRY_STATUS_CODES = (429, 500, 502, 503, 504)  # HTTP answers that may be better the next time


@dataclass(frozen=True)
class Catalog:
    """Where a catalog is, and what its assets need to be read.

    Attributes
    ----------
    url : str
        The STAC API.
    collections : tuple of str
        Its Sentinel-2 L2A collections.
    hrefs : str
        Regular expression of hrefs of its own, whichever catalog lists them.
    gdal : mapping of str to str
        GDAL options for reading these.
    secrets : tuple of str
        Environment variables that reading these needs.
    """

    url: str
    collections: tuple[str, ...] = ()
    hrefs: str = r"(?!)"
    gdal: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()


CATALOGS = {
    # two collections: the second is the archive in ESA's reprocessing, as far as it has come
    "earth-search": Catalog(
        "https://earth-search.aws.element84.com/v1", ("sentinel-2-l2a", "sentinel-2-c1-l2a")
    ),
    # its hrefs are signed, just before each reading
    "planetary-computer": Catalog(
        "https://planetarycomputer.microsoft.com/api/stac/v1",
        ("sentinel-2-l2a",),
        hrefs=r"https://\w+\.blob\.core\.windows\.net/",
    ),
    "cdse": Catalog(
        "https://stac.dataspace.copernicus.eu/v1",
        ("sentinel-2-l2a",),
        hrefs="s3://eodata/",
        gdal={"AWS_S3_ENDPOINT": "eodata.dataspace.copernicus.eu", "AWS_VIRTUAL_HOSTING": "FALSE"},
        secrets=("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
    ),
}


def check_installed(*modules: str) -> None:
    """Raise an AnySatError that names the pip command, if a module of the stac extra is missing."""
    require_packages("open_s2", *modules, install="'xr_anysat[stac]'")


def check_secrets(catalog: Catalog) -> None:
    """Raise a CatalogError that names what to set, if credentials that reading needs are missing."""
    missing = [name for name in catalog.secrets if not os.environ.get(name)]
    if missing:
        raise CatalogError(
            f"reading from {catalog.hrefs} needs S3 credentials: set the environment variables "
            f"{' and '.join(missing)} here and on every worker (keys are made at "
            "https://eodata-s3keysmanager.dataspace.copernicus.eu)"
        )

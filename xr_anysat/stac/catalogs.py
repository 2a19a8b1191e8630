"""The STAC catalogs with a name, and how long to wait for their servers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from xr_anysat.errors import CatalogError
from xr_anysat.shared.checks import require_packages

# Per request: seconds until a server must answer, retries, and seconds before the first retry, doubled for each next
TIMEOUT, TRIES, WAIT = 60.0, 6, 0.5

MAX_WAIT = 60.0  # seconds before a retry, even if the Retry-After of a server is longer

RETRY_STATUS_CODES = (429, 500, 502, 503, 504)  # HTTP answers after which a retry may succeed


@dataclass(frozen=True)
class Catalog:
    """Address of a catalog, and what is needed to read its assets.

    Attributes
    ----------
    url : str
        URL of the STAC API.
    collections : tuple of str
        Its Sentinel-2 L2A collections.
    hrefs : str
        Regular expression that matches the hrefs of its storage, also when another catalog lists them.
    gdal : mapping of str to str
        GDAL options for reading these hrefs.
    secrets : tuple of str
        Environment variables required for reading them.
    """

    url: str
    collections: tuple[str, ...] = ()
    hrefs: str = r"(?!)"
    gdal: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()


CATALOGS = {
    # the second collection is the archive as reprocessed by ESA, which is not complete yet
    "earth-search": Catalog(
        "https://earth-search.aws.element84.com/v1", ("sentinel-2-l2a", "sentinel-2-c1-l2a")
    ),
    # its hrefs are signed just before each read
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
    """Raise an AnySatError with the pip command if a module of the stac extra is missing."""
    require_packages("open_s2", *modules, install="'xr_anysat[stac]'")


def check_secrets(catalog: Catalog) -> None:
    """Raise a CatalogError with the variables to set if credentials for reading are missing."""
    missing = [name for name in catalog.secrets if not os.environ.get(name)]
    if missing:
        raise CatalogError(
            f"reading from {catalog.hrefs} needs S3 credentials: set the environment variables "
            f"{' and '.join(missing)} here and on every worker (create keys at "
            "https://eodata-s3keysmanager.dataspace.copernicus.eu)"
        )

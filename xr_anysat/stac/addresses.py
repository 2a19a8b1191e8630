"""Which addresses of assets are read when a catalog lists them.

A catalog may come from anybody. Its items may name files of other servers, but no local files, and no addresses that
only this machine or its network can reach.
"""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

SCHEMES = ("https", "http", "s3", "gs", "az", "abfs", "abfss", "oss")
"""Schemes of assets that are read from a catalog: servers and object stores."""


def is_remote(href: str, catalog: str) -> bool:
    """Return whether `href`, listed by the API at the URL `catalog`, is on a server that this API may name.

    Addresses of a private network are only for catalogs on such an address. Names of servers are not resolved.

    Examples
    --------
    >>> is_remote("https://example.org/B02.tif", "https://example.org/v1"), is_remote("s3://eodata/B02.jp2", "https://a.b")
    (True, True)
    >>> [is_remote(href, "https://a.b") for href in ("file:///etc/passwd", "/vsicurl/https://a.b/c", "http://10.0.0.1/a")]
    [False, False, False]
    """
    try:
        address = urlsplit(href)
        host = address.hostname
    except ValueError:
        return False
    if address.scheme not in SCHEMES or not host:
        return False
    return (
        address.scheme not in ("http", "https")
        or not _is_private(host)
        or _is_private(urlsplit(catalog).hostname or "")
    )


def driver_of(href: str) -> str:
    """Return the GDAL driver for an asset that a catalog lists: GeoTIFF or JPEG 2000.

    GDAL would detect the format by the content, and files of other formats, such as VRT, may name further files.

    Examples
    --------
    >>> driver_of("https://example.org/B02.tif?token=a"), driver_of("s3://eodata/B02.jp2")
    ('GTiff', 'JP2OpenJPEG')
    """
    return "JP2OpenJPEG" if urlsplit(href).path.lower().endswith(".jp2") else "GTiff"


def is_loopback(url: str) -> bool:
    """Return whether a URL is on this machine.

    Examples
    --------
    >>> is_loopback("http://127.0.0.1:8080/stac"), is_loopback("https://example.org")
    (True, False)
    """
    host = urlsplit(url).hostname or ""
    address = _ip_address(host)
    return host == "localhost" if address is None else address.is_loopback


def _is_private(host: str) -> bool:
    """Return whether a host is an address outside of the public internet, or a name of this machine."""
    address = _ip_address(host)
    return (
        host.rpartition(".")[2] in ("localhost", "internal", "local")
        if address is None
        else not address.is_global
    )


def _ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))  # 2130706433 and 0x7f.1 are addresses, too
    except OSError:
        return None

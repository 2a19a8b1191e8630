"""Fixtures of the tests of stores."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.s3_server import S3Server


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    """Run a server that speaks the S3 protocol, with one bucket."""
    with S3Server() as server:
        server.bucket("bucket")
        yield server

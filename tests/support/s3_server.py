"""An S3 server of this machine (moto's, in a process of its own), and a gate before it that can refuse."""

from __future__ import annotations

import http.client
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any, Self
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from support.local_server import LocalServer

KEY, SECRET, REGION = "test", "test", "us-east-1"


class S3Server:
    """Starts on a free port of loopback; all that it holds is gone when the context ends."""

    def __enter__(self) -> Self:
        self._log = tempfile.TemporaryFile("w+")
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)
        self.url = self._address()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._log.close()

    def _address(self) -> str:
        until = time.monotonic() + 60
        while time.monotonic() < until and self._process.poll() is None:
            self._log.seek(0)
            found = re.search(r"Running on (http://127\.0\.0\.1:\d+)", self._log.read())
            if found:
                return found[1]
            time.sleep(0.05)
        self._log.seek(0)
        raise RuntimeError(f"moto's server did not start: {self._log.read()}")

    def bucket(self, name: str) -> str:
        """Make a bucket."""
        urlopen(Request(f"{self.url}/{name}", b"", method="PUT")).close()
        return name


def storage_options(url: str) -> dict[str, Any]:
    """What s3fs needs for a server at `url`."""
    return {"key": KEY, "secret": SECRET, "endpoint_url": url}


def object_store(url: str, bucket: str, prefix: str) -> Any:
    """The store of zarr that speaks to a server at `url` by obstore."""
    from obstore.store import S3Store
    from zarr.storage import ObjectStore

    return ObjectStore(
        S3Store(
            bucket,
            prefix=prefix,
            endpoint=url,
            access_key_id=KEY,
            secret_access_key=SECRET,
            region=REGION,
            virtual_hosted_style_request=False,
            client_options={"allow_http": True},
            retry_config={"max_retries": 0},
        )
    )


@dataclass
class Gate(LocalServer):
    """Hands requests on to a server; `answer` may answer one itself, with a status, instead.

    It may also take its time, which holds the request up.
    """

    behind: str
    answer: Callable[[str, str], int | None] = lambda method, path: None
    requests: list[tuple[str, str]] = field(default_factory=list)  # (method, path with its query)

    def handler(self) -> type[BaseHTTPRequestHandler]:
        return _handler(self)


def _handler(gate: Gate) -> type[BaseHTTPRequestHandler]:
    address = urlsplit(gate.behind).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            gate.requests.append((self.command, self.path))
            status = gate.answer(self.command, self.path)
            if status is not None:
                self._send(status, {}, b"")
                return
            connection = http.client.HTTPConnection(address)
            headers = {k: v for k, v in self.headers.items() if k.lower() != "expect"}
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            content = response.read()
            self._send(response.status, dict(response.getheaders()), content)
            connection.close()

        def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                    self.send_header(name, value)
            # the length of what a HEAD asks about is not that of its answer
            length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _answer

        def log_message(self, *_: object) -> None:
            pass

    return Handler

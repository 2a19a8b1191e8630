"""Servers of one machine for the tests of `open_s2`: a real STAC API, and one that fails on purpose."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pystac

from support.local_server import LocalServer
from xr_anysat.demo.run import serve_items


@contextmanager
def stac_api(folder: Path, items: Sequence[pystac.Item]) -> Iterator[str]:
    """`rustac serve` over the items, as long as the context lasts; its URL."""
    file = folder / "items.json"
    file.write_text(json.dumps(pystac.ItemCollection(items, clone_items=False).to_dict()))
    with serve_items(file) as url:
        yield url


@dataclass(frozen=True)
class Fault:
    """One way for an answer to go wrong.

    A status without a body, perhaps with Retry-After; a wait before the answer; a body that breaks off after
    some bytes.
    """

    status: int | None = None
    retry_after: int | None = None
    wait: float = 0
    break_after: int | None = None


@dataclass
class FaultyServer(LocalServer):
    """Files by path over HTTP with ranges, and a STAC API of items, with faults where wanted.

    Attributes
    ----------
    files : dict
        ``"/a/B02.tif"`` to bytes.
    items : list of dict
        What ``/search`` answers, a page of `page` each.
    faults : dict
        For a path (a regular expression), the faults of its next requests, one each; a callable is called
        at every request instead.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    items: list[dict[str, Any]] = field(default_factory=list)
    page: int = 100
    faults: dict[str, list[Fault] | Callable[[str, str | None], Fault | None]] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range
    busy: int = 0
    busiest: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def handler(self) -> type[BaseHTTPRequestHandler]:
        return _handler(self)

    def wait_until_idle(self, seconds: float = 0.5) -> None:
        """Wait until there was no request for this time."""
        before = -1
        while self.busy or len(self.requests) != before:
            before = len(self.requests)
            time.sleep(seconds)

    def add(self, folder: Path) -> None:
        """Serve the files of a folder under their names in it."""
        for file in sorted(folder.rglob("*.tif")):
            self.files["/" + file.relative_to(folder).as_posix()] = file.read_bytes()

    def counts(self, part: str = "") -> Counter[str]:
        """Requests a path, of those paths that contain `part`."""
        return Counter(path for _, path, _ in self.requests if part in path)

    def next_fault(self, path: str, requested: str | None) -> Fault | None:
        for pattern, faults in self.faults.items():
            if re.search(pattern, path):
                if callable(faults):
                    return faults(path, requested)
                return faults.pop(0) if faults else None
        return None


def _handler(server: FaultyServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.split("?")[0]
            with server._lock:
                requested = self.headers.get("Range")
                server.requests.append((self.command, path, requested))
                fault = server.next_fault(path, requested) or Fault()
                server.busy += 1
                server.busiest = max(server.busiest, server.busy)
            try:
                time.sleep(fault.wait)
                if fault.status is not None:
                    extra = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
                    self._send(fault.status, b"", extra)
                elif path in server.files:
                    self._file(server.files[path], fault)
                elif path in ("/", "/search"):
                    self._json(_landing(server) if path == "/" else _page(server, json.loads(body)))
                else:
                    self._send(404, b"", {})
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                with server._lock:
                    server.busy -= 1

        def _file(self, content: bytes, fault: Fault) -> None:
            requested = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            start, stop = 0, len(content)
            extra = {"Accept-Ranges": "bytes"}
            if requested:
                start = int(requested[1])
                stop = min(stop, int(requested[2]) + 1) if requested[2] else stop
                if start >= len(content):
                    self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                    return
                extra["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            self._send(206 if requested else 200, content[start:stop], extra, fault.break_after)

        def _json(self, content: dict[str, Any]) -> None:
            self._send(200, json.dumps(content).encode(), {"Content-Type": "application/geo+json"})

        def _send(
            self, status: int, body: bytes, headers: dict[str, str], break_after: int | None = None
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if break_after is not None:
                body = body[:break_after]
                self.close_connection = True
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def _landing(server: FaultyServer) -> dict[str, Any]:
    return {
        "type": "Catalog",
        "stac_version": "1.0.0",
        "id": "faulty",
        "description": "Fails on purpose",
        "conformsTo": [
            "https://api.stacspec.org/v1.0.0/core",
            "https://api.stacspec.org/v1.0.0/item-search",
        ],
        "links": [
            {"rel": "self", "href": server.url, "type": "application/json"},
            {"rel": "root", "href": server.url, "type": "application/json"},
            {
                "rel": "search",
                "href": f"{server.url}/search",
                "type": "application/geo+json",
                "method": "POST",
            },
        ],
    }


def _page(server: FaultyServer, query: dict[str, Any]) -> dict[str, Any]:
    """A page of all items: this server filters by nothing at all."""
    first = int(query.get("token", 0))
    links = []
    if first + server.page < len(server.items):
        links = [
            {
                "rel": "next",
                "href": f"{server.url}/search",
                "method": "POST",
                "body": {**query, "token": str(first + server.page)},
            }
        ]
    return {
        "type": "FeatureCollection",
        "features": server.items[first : first + server.page],
        "links": links,
    }

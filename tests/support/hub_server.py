"""A server of one machine that speaks as much of the hub's protocol as a download needs."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

from support.local_server import LocalServer

COMMIT = "a" * 40


@dataclass
class Hub(LocalServer):
    """Files by ``repo/filename``, what happened, and what shall go wrong.

    Use it as a context manager and point HF_ENDPOINT at ``url``.
    """

    files: dict[str, bytes]
    break_after: int | None = None  # bytes after which the next GET loses its connection, once
    status: int | None = None  # answer everything with it
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # (method, Range header)

    def handler(self) -> type[BaseHTTPRequestHandler]:
        return _handler(self)

    def count(self, method: str) -> int:
        return sum(seen == method for seen, _ in self.requests)

    @property
    def ranges(self) -> list[str]:
        """Range headers of the GET requests that had one."""
        return [requested for method, requested in self.requests if method == "GET" and requested]


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            requested = self.headers.get("Range")
            hub.requests.append((self.command, requested))
            match = re.fullmatch(r"/(.+)/resolve/main/(.+)", self.path)
            content = hub.files.get("/".join(match.groups())) if match else None
            if hub.status is not None or content is None:
                self.send_response(hub.status or 404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start = int(re.fullmatch(r"bytes=(\d+)-", requested).group(1)) if requested else 0
            etag = hashlib.sha256(content).hexdigest()
            self.send_response(206 if requested else 200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{etag}"')
            self.send_header("X-Linked-ETag", f'"{etag}"')
            self.send_header("X-Linked-Size", str(len(content)))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(content) - start))
            if requested:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if not with_body:
                return
            body = content[start:]
            if hub.break_after is not None:
                body, hub.break_after = body[: hub.break_after], None
                self.close_connection = True
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler

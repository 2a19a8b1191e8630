"""An HTTP server of this machine, as long as a context lasts."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

_PORTS_USED: set[int] = set()


class LocalServer:
    """Starts on a free port of loopback that no other of this process had; `handler` says how it answers.

    A port had twice would serve other files under URLs whose content GDAL remembers while the process lives.
    """

    def handler(self) -> type[BaseHTTPRequestHandler]:
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        while self._server.server_address[1] in _PORTS_USED:
            self._server.server_close()
            self._server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        _PORTS_USED.add(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

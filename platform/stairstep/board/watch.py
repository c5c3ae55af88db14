"""A board that is looked at while its runs go on: a server for this machine alone, which reads the folders again when they change.

It listens on 127.0.0.1, answers two addresses (the page and its news), and only to requests that were meant for it: a page of another
site whose name was bent to this machine is refused by the name that it asks for.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from stairstep.settings import InputError, StairstepError

from .page import Content, html_page
from .read import Folders

REST = 4.0
_NAMES = ("127.0.0.1", "localhost")


class Live:
    """What is served: made anew when the folders have changed, for whoever asks first; the others wait. After that it rests `rest` times
    as long as the making took, for the cores are the runs' own."""

    def __init__(self, folders: Folders, made: Callable[[], Content], rest: float = REST) -> None:
        self._folders, self._made, self._rest = folders, made, rest
        self._lock, self._not_before = threading.Lock(), 0.0
        self._version, self._content = "", Content("", "", {})

    def now(self) -> tuple[str, Content]:
        """The present version and content."""
        with self._lock:
            version = f'"{self._folders.stamp()}"'
            if version != self._version and time.monotonic() >= self._not_before:
                began = time.monotonic()
                self._version, self._content = version, self._made()
                self._not_before = time.monotonic() + self._rest * (time.monotonic() - began)
            return self._version, self._content


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no news; a defect of ours shows its traceback here, and there that it is one."""
        if isinstance(sys.exception(), ConnectionError):
            return
        super().handle_error(request, client_address)
        said = b"the board could not be made; the terminal that serves it says why\n"
        head = f"HTTP/1.0 500 Internal Server Error\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {len(said)}\r\n\r\n"
        with suppress(ConnectionError):
            request.sendall(head.encode() + said)


class BoardServer:
    """Serves a board on 127.0.0.1 until it is closed."""

    def __init__(self, live: Live, port: int = 0) -> None:
        try:
            self._http = _Http(("127.0.0.1", port), _handler(live))
        except OverflowError:
            raise InputError(f"--port {port}: expected a port from 1 to 65535, or 0 for any that is free") from None
        except OSError as error:
            raise InputError(
                f"--port {port}: this port cannot be had ({error.strerror}); choose another, or 0 for any that is free"
            ) from None
        self.address = f"http://127.0.0.1:{self._http.server_port}/"

    def serve(self) -> None:
        """Serve until Ctrl-C, or until `stop` is called from another thread."""
        try:
            self._http.serve_forever(poll_interval=0.2)
        finally:
            self._http.server_close()

    def stop(self) -> None:
        """End `serve`, from another thread."""
        self._http.shutdown()

    def close(self) -> None:
        """Give the port back without ever having served."""
        self._http.server_close()


def _handler(live: Live) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Host", "").rpartition(":")[0] not in _NAMES:
                self._answer(403, "text/plain", "this board is for this machine alone")
            elif self.path not in ("/", "/board.json"):
                self._answer(404, "text/plain", "there is nothing here; the board is at /")
            else:
                self._board()

        def _board(self) -> None:
            try:
                version, content = live.now()
            except StairstepError as error:
                self._answer(503, "text/plain", str(error))
                return
            if self.path == "/":
                self._answer(200, "text/html", html_page(content, version), version)
            elif self.headers.get("If-None-Match") == version:
                self._answer(304, "application/json", "", version)
            else:
                self._answer(200, "application/json", json.dumps({"main": content.main, "data": content.data}), version)

        def _answer(self, code: int, kind: str, text: str, version: str = "") -> None:
            data = text.encode()
            self.send_response(code)
            for name, value in {
                "Content-Type": f"{kind}; charset=utf-8",
                "Content-Length": str(len(data)),
                "ETag": version,
                "Cache-Control": "no-store",
                "X-Content-Type-Options": "nosniff",
            }.items():
                if value:
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Requests are no news."""

    return Handler

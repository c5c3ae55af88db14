"""What stands before either engine: the key, the bound on the queue, the bound on the body. One per replica; safe within its event loop.

Without a key only this machine is served, whatever address the proxy was told to listen on: both ends of the connection are looked at. A
place in the queue is taken before a body is read, so that bodies in memory are bounded as well.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import os
import threading
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse

from stairstep.settings import InputError

from .protocol import RequestError
from .settings import ReaderAppSettings, is_loopback

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
log = logging.getLogger(__name__)


def read_key(variable: str | None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The key in the environment variable `variable`, or in the file that its `_FILE` twin names; None where none is wanted."""
    if variable is None:
        return None
    path = environment.get(f"{variable}_FILE")
    if path and not environment.get(variable):
        try:
            key = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{variable}_FILE: the file with the API key cannot be read ({getattr(error, 'strerror', error)})") from None
    else:
        key = environment.get(variable, "").strip()
    if not key:
        raise InputError(
            f"key_env: neither {variable} nor {variable}_FILE holds a key where the reader runs; set one in the environment that Ray "
            "was started in, or say key_env=null to serve this machine alone"
        )
    return key


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


class Place:
    """A place in the queue; given back once, from whichever thread."""

    def __init__(self, front: Front) -> None:
        self._front, self._held, self._lock = front, True, threading.Lock()

    def give_back(self) -> None:
        """Let the next one in."""
        with self._lock:
            held, self._held = self._held, False
        if held:
            self._front.left()


class Front:
    """The door of one replica."""

    def __init__(self, settings: ReaderAppSettings, environment: Mapping[str, str] = os.environ) -> None:
        self.limits = settings.limits
        key = read_key(settings.key_env, environment)
        self._key = None if key is None else _digest(key.encode())
        self._inside = 0
        self._lock = threading.Lock()
        self.seconds_an_answer = 1.0

    @property
    def inside(self) -> int:
        """How many requests are waiting or being answered."""
        return self._inside

    def authorise(self, scope: Scope) -> None:
        """The right key, compared in constant time; without a key, both ends of the connection on this machine."""
        if self._key is None:
            ends = [end[0] if end else None for end in (scope.get("client"), scope.get("server"))]
            if not all(is_loopback(end) for end in ends):
                raise RequestError(
                    403,
                    "this reader has no API key and serves its own machine alone; whoever runs it has to set key_env",
                    kind="permission_error",
                    code="no_key_configured",
                )
            return
        given = [value for name, value in scope.get("headers", ()) if name.lower() == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        if not hmac.compare_digest(_digest(key.strip()), self._key) or scheme.lower() != b"bearer":
            refusal = RequestError(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY", code="invalid_api_key")
            refusal.headers["WWW-Authenticate"] = "Bearer"
            raise refusal

    def enter(self) -> Place:
        """A place in the queue; 429 where there is none."""
        with self._lock:
            if self._inside >= self.limits.queue:
                refusal = RequestError(
                    429,
                    f"{self._inside} requests are waiting here, as many as limits.queue allows; try again later",
                    kind="rate_limit_error",
                    code="queue_full",
                )
                refusal.headers["Retry-After"] = str(min(60, max(1, math.ceil(self.seconds_an_answer))))
                raise refusal
            self._inside += 1
        return Place(self)

    def left(self) -> None:
        """Somebody gave a place back."""
        with self._lock:
            self._inside -= 1

    async def body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body, or 413 as soon as it is known to be too large."""
        most = int(self.limits.max_body_mb * 1e6)
        announced = next((value for name, value in scope.get("headers", ()) if name.lower() == b"content-length"), b"0")
        if announced.isdigit() and int(announced[:20]) > most:
            raise self._too_large()
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise RequestError(400, "the connection was closed before the body was complete")
            part = message.get("body", b"")
            parts.append(part)
            size += len(part)
            if size > most:
                raise self._too_large()
            if not message.get("more_body"):
                return b"".join(parts)

    def _too_large(self) -> RequestError:
        return RequestError(413, f"the body has more MB than limits.max_body_mb = {self.limits.max_body_mb:g}", code="body_too_large")


def refusal(error: RequestError) -> JSONResponse:
    """An error as a response."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


def timed_out(limit_s: float) -> RequestError:
    """A request that was given up."""
    return RequestError(504, f"no answer within limits.timeout_s = {limit_s:g} seconds; try again", kind="timeout_error", code="timeout")


def broken() -> RequestError:
    """A defect of ours, without its details: they are in the replica's log."""
    return RequestError(500, "the reader failed at this request; its log says why", kind="server_error", code="internal_error")

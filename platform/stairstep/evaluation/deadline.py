"""A time by which a whole request must be over, kept by the connection itself.

An HTTP library's timeouts hold for one read or write each: a server that sends a byte of a header now and then is waited for without end.
Here every read and write of a connection gets only what is left of its request's time, from the first byte sent to the last one read. The
library tells of new connections through its `trace` extension; a connection that is used again keeps to the request that uses it now,
which is that of the thread.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

_MADE = (".connect_tcp.complete", ".start_tls.complete")
_PIECE = 65_536  # bytes written at once: one write's timeout starts again with every piece that the system takes


class Deadline(threading.local):
    """When the request of this thread must be over."""

    until = math.inf

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Whatever this thread reads and writes in here fails once so many seconds are over."""
        self.until = time.monotonic() + seconds
        try:
            yield
        finally:
            self.until = math.inf

    def watch(self, request: Any) -> None:
        """A hook for an HTTP client's requests: the connections that are made for them keep the deadline."""
        request.extensions["trace"] = self._bind

    def _bind(self, event: str, told: Mapping[str, Any]) -> None:
        if not event.endswith(_MADE):
            return
        stream = told["return_value"]
        read, write = stream.read, stream.write

        def bounded_read(most: int, timeout: float | None = None) -> bytes:
            return bytes(read(most, self._left(timeout)))

        def bounded_write(data: bytes, timeout: float | None = None) -> None:
            for start in range(0, len(data), _PIECE):
                write(data[start : start + _PIECE], self._left(timeout))

        stream.read, stream.write = bounded_read, bounded_write

    def _left(self, timeout: float | None) -> float | None:
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError("the time of the whole request is over")
        return min(left, timeout or left) if left < math.inf else timeout

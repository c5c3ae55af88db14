"""A real server of OpenAI's chat protocol that answers as it is told, and misbehaves on command.

    with EvaluationServer(lambda request: "Paris") as server:      # an honest one
        server.next(region(), cut(), text("NOT_ATTEMPTED"))         # what the next requests meet instead, one each
        server.chance = lambda request: hang(5) if ... else None    # what any request may meet

As a program it answers every request at once with the same words, without looking at it: `python evaluation_server.py` prints its address.
"""

from __future__ import annotations

import argparse
import json
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REGION = "Attempted to access resource with incorrect regional hostname. Please make your request to us.api.openai.com"


@dataclass(frozen=True)
class Request:
    """A request as it came: the path, the headers in lower case, and the body read as JSON."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    at: float

    @property
    def prompt(self) -> str:
        """The first text of the first user message."""
        content = next(one["content"] for one in self.body["messages"] if one["role"] == "user")
        return content if isinstance(content, str) else next(part["text"] for part in content if part["type"] == "text")


Fault = Callable[["Handler"], None]


def completion(content: Any, finish: str = "stop", **message: Any) -> dict[str, Any]:
    """A chat completion as OpenAI sends it."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "some-model",
        "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}],
        "usage": {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14},
    }


def text(content: Any, finish: str = "stop", **message: Any) -> Fault:
    """Some other words than the honest ones."""
    return lambda handler: handler.send(200, json.dumps(completion(content, finish, **message)).encode())


def body(data: bytes, status: int = 200, kind: str = "application/json") -> Fault:
    """Any bytes."""
    return lambda handler: handler.send(status, data, {"Content-Type": kind})


def status(code: int, message: str = "something is wrong", name: str | None = None, **headers: str) -> Fault:
    """An error as OpenAI sends it; headers as keywords, with _ for -."""
    told = {"error": {"message": message, "type": name, "param": None, "code": name}}
    return lambda handler: handler.send(code, json.dumps(told).encode(), {key.replace("_", "-"): one for key, one in headers.items()})


def region() -> Fault:
    """The 401 of a key that belongs to another region."""
    return status(401, REGION, "incorrect_hostname")


def hang(seconds: float) -> Fault:
    """No reply for so long, and then none either."""

    def act(handler: Handler) -> None:
        handler.owner.closing.wait(seconds)
        handler.drop()

    return act


def drip(seconds: float) -> Fault:
    """White space for so long, a byte at a time: alive for a socket's clock, and no reply."""

    def act(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        until = time.monotonic() + seconds
        while time.monotonic() < until and not handler.owner.closing.wait(0.02):
            handler.wfile.write(b" ")
        handler.drop()

    return act


def drip_header(seconds: float) -> Fault:
    """A header for so long, a byte at a time, and then a whole reply: alive for a socket's clock, and too late."""

    def act(handler: Handler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        until = time.monotonic() + seconds
        while time.monotonic() < until and not handler.owner.closing.wait(0.02):
            handler.wfile.write(b"x")
        data = json.dumps(completion("too late")).encode()
        handler.wfile.write(b"\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data) + data)

    return act


def lost() -> Fault:
    """The connection closed without a word."""
    return lambda handler: handler.drop()


def reset() -> Fault:
    """The connection reset."""
    return lambda handler: handler.drop(linger=False)


def cut() -> Fault:
    """Half a reply, and the connection closed."""

    def act(handler: Handler) -> None:
        data = json.dumps(completion("CORRECT")).encode()
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2])
        handler.wfile.flush()
        handler.drop()

    return act


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    @property
    def owner(self) -> EvaluationServer:
        return self.server.owner

    def log_message(self, *_: Any) -> None:
        """Tests read requests, not logs."""

    def do_GET(self) -> None:
        self.owner.received.append(Request(self.path, self._lower(), {}, time.monotonic()))
        if self.path.endswith("/models"):
            self.send(200, json.dumps({"object": "list", "data": [{"id": "some-model", "object": "model"}]}).encode())
        else:
            status(404, "no such page")(self)

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.owner.blind is not None:
            self.send(200, self.owner.blind)
            return
        request = Request(self.path, self._lower(), json.loads(data), time.monotonic())
        act = self.owner.take(request)
        try:
            act(self)
        except OSError:  # whoever asked has gone
            self.close_connection = True
        finally:
            self.owner.done()

    def send(self, code: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        """A whole reply."""
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", **(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def drop(self, linger: bool = True) -> None:
        """Close the connection as it is."""
        if not linger:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
        self.close_connection = True

    def _lower(self) -> dict[str, str]:
        return {name.lower(): value for name, value in self.headers.items()}

    def finish(self) -> None:
        """A dropped connection has nothing left to flush."""
        try:
            super().finish()
        except (OSError, ValueError):
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    owner: EvaluationServer


class EvaluationServer:
    """The server; `answer` gives the honest reply to a request."""

    def __init__(self, answer: Callable[[Request], str] = lambda request: "an answer", blind: bytes | None = None, port: int = 0) -> None:
        self.answer, self.blind = answer, blind
        self.chance: Callable[[Request], Fault | None] = lambda request: None
        self.received: list[Request] = []
        self.misbehaved = self.at_once = self.most_at_once = 0
        self.closing = threading.Event()
        self._next: deque[Fault] = deque()
        self._lock = threading.Lock()
        self._http = _Server(("127.0.0.1", port), Handler)
        self._http.owner = self
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def port(self) -> int:
        return int(self._http.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def next(self, *faults: Fault) -> None:
        """What the next requests meet, one each, before any chance."""
        with self._lock:
            self._next.extend(faults)

    def take(self, request: Request) -> Fault:
        """What this request meets."""
        with self._lock:
            self.received.append(request)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            fault = self._next.popleft() if self._next else self.chance(request)
            self.misbehaved += fault is not None
        return fault or text(self.answer(request))

    def done(self) -> None:
        """A request is over."""
        with self._lock:
            self.at_once -= 1

    def __enter__(self) -> EvaluationServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def main() -> None:
    """Serve until killed."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--port", type=int, default=0)
    with EvaluationServer(blind=json.dumps(completion("an answer")).encode(), port=options.parse_args().port) as server:
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()

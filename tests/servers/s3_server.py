"""A small server that speaks S3 as far as Arrow's client uses it, over a real socket, and misbehaves at will.

    with S3Server(buckets=("stairs",)) as server:
        server.url("stairs/runs")                        # s3://stairs/runs with this server as its endpoint
        server.misbehave("PUT", "COMPLETE", status(503), times=2)    # what the next such requests meet; times=None: all of them
        server.misbehave("GET", ".arrow", cut(1000))
        server.objects["stairs/runs/a"]                  # the bytes of an object

Verbs: objects (PUT, also in parts; GET, also of a range; HEAD; DELETE), `POST ?delete`, ListObjectsV2, HEAD of a bucket. A request must be
signed with the key that `environment` holds, whose signature is not computed again. Every request is in `received`.
"""

from __future__ import annotations

import hashlib
import io
import re
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

KEY_ID = "test-key-id"
_XML = '<?xml version="1.0" encoding="UTF-8"?>'


@dataclass(frozen=True)
class Asked:
    """A request as it came: the method, the bucket and key, and the query."""

    method: str
    object: str
    query: dict[str, str]
    headers: dict[str, str]


Fault = Callable[["Handler", bytes], None]


def status(code: int, name: str = "SlowDown") -> Fault:
    """An answer that refuses."""
    return lambda handler, data: handler.error(code, name)


def cut(after: int) -> Fault:
    """A GET's answer that ends too early, and the connection with it."""

    def act(handler: Handler, data: bytes) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[:after])
        handler.close_connection = True

    return act


def changed(place: int) -> Fault:
    """A GET's answer with a flipped bit in it."""

    def act(handler: Handler, data: bytes) -> None:
        handler.part_of(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])

    return act


class _Server(ThreadingHTTPServer):
    """Ends its threads too: a client keeps its connections open, and each has one."""

    daemon_threads = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._open: set[Any] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        for request in list(self._open):
            with suppress(OSError):  # its client was faster
                request.shutdown(socket.SHUT_RDWR)


class S3Server:
    """The server, in threads of this process, from the beginning to the end of a `with` block."""

    def __init__(self, buckets: tuple[str, ...] = ("stairs",)) -> None:
        self.buckets = set(buckets)
        self.objects: dict[str, bytes] = {}
        self.modified: dict[str, str] = {}
        self.listed: dict[str, str] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.received: list[Asked] = []
        self.guard = threading.Lock()
        self._left: int | None = None
        self._faults: list[tuple[str, str, Fault, list[int | None]]] = []
        self._server = _Server(("127.0.0.1", 0), type("Bound", (Handler,), {"owner": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> S3Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._server.hang_up()

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    @property
    def environment(self) -> dict[str, str]:
        """The variables that a client of this server needs, and that keep it from looking for credentials elsewhere."""
        return {"AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": "test-secret", "AWS_EC2_METADATA_DISABLED": "true"}

    def url(self, place: str) -> str:
        """The URL of a bucket or a prefix here."""
        return f"s3://{place}?endpoint_override=http://127.0.0.1:{self.port}&region=us-east-1"

    def misbehave(self, method: str, ending: str, fault: Fault, times: int | None = 1) -> None:
        """What the next requests of a method for an object with such an ending meet."""
        with self.guard:
            self._faults.append((method, ending, fault, [times]))

    def die_after(self, changes: int) -> None:
        """Refuse everything after so many changes, as if whoever asks for them was killed then."""
        with self.guard:
            self._left = changes

    def behave(self) -> None:
        """Forget what was to go wrong."""
        with self.guard:
            self._faults.clear()
            self._left = None

    def fault(self, method: str, name: str) -> Fault | None:
        with self.guard:
            if self._left is not None:
                self._left -= method in ("PUT", "DELETE", "POST")
                if self._left < 0:
                    return status(403, "AccessDenied")
            for kind, ending, fault, left in self._faults:
                if kind == method and name.endswith(ending) and left[0] != 0:
                    left[0] = left[0] and left[0] - 1
                    return fault
        return None

    def put(self, name: str, data: bytes) -> None:
        with self.guard:
            self.objects[name] = data
            self.modified[name] = formatdate(usegmt=True)
            self.listed[name] = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

    def dated(self, part: str, when: str) -> None:
        """Let all objects with this in their names have been put at a moment."""
        with self.guard:
            self.listed |= {name: when for name in self.listed if part in name}

    def names(self, prefix: str = "") -> list[str]:
        """The objects below a prefix, those that stand for a folder left out."""
        with self.guard:
            return sorted(name for name in self.objects if name.startswith(prefix) and not name.endswith("/"))

    def asked(self, method: str, ending: str) -> int:
        """How many requests there were of a method for objects with such an ending."""
        with self.guard:
            return sum(one.method == method and one.object.endswith(ending) for one in self.received)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: S3Server

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""

    def do_GET(self) -> None:
        self._handle(self._get)

    def do_HEAD(self) -> None:
        self._handle(self._head)

    def do_PUT(self) -> None:
        self._handle(self._put)

    def do_DELETE(self) -> None:
        self._handle(self._delete)

    def do_POST(self) -> None:
        self._handle(self._post)

    def _handle(self, act: Callable[[], None]) -> None:
        parts = urlsplit(self.path)
        self.name = unquote(parts.path).lstrip("/")
        self.query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        self.body = self._body()
        headers = {name.lower(): value for name, value in self.headers.items()}
        with self.owner.guard:
            self.owner.received.append(Asked(self.command, self.name, self.query, headers))
        if f"Credential={KEY_ID}/" not in headers.get("authorization", ""):
            return self.error(403, "AccessDenied")
        if self.name.split("/")[0] not in self.owner.buckets:
            return self.error(404, "NoSuchBucket")
        fault = self.owner.fault(self.command, self.name)
        return act() if fault is None else fault(self, self.owner.objects.get(self.name, b""))

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            data = b"".join(pieces)
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return _plain(data) if "aws-chunked" in self.headers.get("Content-Encoding", "") else data

    def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if code != 204:
            self.send_header("Content-Length", headers.pop("content_length", str(len(body))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def error(self, code: int, name: str) -> None:
        body = f"{_XML}<Error><Code>{name}</Code><Message>{name} (this test's server)</Message></Error>"
        self.answer(code, b"" if self.command == "HEAD" else body.encode(), Content_Type="application/xml")

    def xml(self, text: str) -> None:
        self.answer(200, f"{_XML}{text}".encode(), Content_Type="application/xml")

    def part_of(self, data: bytes) -> None:
        """The range that was asked for, or everything."""
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = {"ETag": _tag(data), "Last_Modified": self.owner.modified.get(self.name, formatdate(usegmt=True))}
        if not found:
            return self.answer(200, data, **headers)
        start, end = int(found[1]), int(found[2] or len(data) - 1)
        if start >= len(data):
            return self.error(416, "InvalidRange")
        piece = data[start : end + 1]
        return self.answer(206, piece, Content_Range=f"bytes {start}-{start + len(piece) - 1}/{len(data)}", **headers)

    def _get(self) -> None:
        if "list-type" in self.query:
            return self._list()
        data = self.owner.objects.get(self.name)
        return self.error(404, "NoSuchKey") if data is None else self.part_of(data)

    def _head(self) -> None:
        if "/" not in self.name.rstrip("/"):
            return self.answer(200)
        data = self.owner.objects.get(self.name)
        if data is None:
            return self.error(404, "NoSuchKey")
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", _tag(data))
        self.send_header("Last-Modified", self.owner.modified[self.name])
        return self.end_headers()

    def _put(self) -> None:
        if "uploadId" in self.query:
            self.owner.parts[self.query["uploadId"]][int(self.query["partNumber"])] = self.body
        else:
            self.owner.put(self.name, self.body)
        self.answer(200, ETag=_tag(self.body))

    def _delete(self) -> None:
        with self.owner.guard:
            if "uploadId" in self.query:
                self.owner.parts.pop(self.query["uploadId"], None)
            else:
                self.owner.objects.pop(self.name, None)
        self.answer(204)

    def _post(self) -> None:
        bucket, _, key = self.name.partition("/")
        told = f"<Bucket>{bucket}</Bucket><Key>{escape(key)}</Key>"
        if "uploads" in self.query:
            upload = f"upload-{len(self.owner.received)}"
            self.owner.parts[upload] = {}
            return self.xml(f"<InitiateMultipartUploadResult>{told}<UploadId>{upload}</UploadId></InitiateMultipartUploadResult>")
        if "uploadId" in self.query:
            parts = self.owner.parts.pop(self.query["uploadId"])
            data = b"".join(parts[number] for number in sorted(parts))
            self.owner.put(self.name, data)
            return self.xml(f"<CompleteMultipartUploadResult>{told}<ETag>{_tag(data)}</ETag></CompleteMultipartUploadResult>")
        gone = [_unescaped(one) for one in re.findall(r"<Key>(.*?)</Key>", self.body.decode())]
        with self.owner.guard:
            for one in gone:
                self.owner.objects.pop(f"{bucket}/{one}", None)
        return self.xml("<DeleteResult>" + "".join(f"<Deleted><Key>{escape(one)}</Key></Deleted>" for one in gone) + "</DeleteResult>")

    def _list(self) -> None:
        bucket, prefix, between = self.name.strip("/"), self.query.get("prefix", ""), self.query.get("delimiter", "")
        most, after = int(self.query.get("max-keys", 1000)), self.query.get("continuation-token", "")
        contents, folders, shown, last, more = [], [], 0, "", False
        with self.owner.guard:
            names = sorted(name.partition("/")[2] for name in self.owner.objects if name.startswith(f"{bucket}/"))
            for key in (one for one in names if one.startswith(prefix) and one > after):
                if shown == most:
                    more = True
                    break
                head, found, _ = key[len(prefix) :].partition(between) if between else (key, "", "")
                if found and f"{prefix}{head}{between}" in folders:
                    last = key
                    continue
                shown, last = shown + 1, key
                if found:
                    folders.append(f"{prefix}{head}{between}")
                else:
                    data = self.owner.objects[f"{bucket}/{key}"]
                    contents.append(
                        f"<Contents><Key>{escape(key)}</Key><Size>{len(data)}</Size><ETag>{_tag(data)}</ETag>"
                        f"<LastModified>{self.owner.listed[f'{bucket}/{key}']}</LastModified></Contents>"
                    )
        told = f"<Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{shown}</KeyCount><IsTruncated>{str(more).lower()}"
        told += f"</IsTruncated>{f'<NextContinuationToken>{escape(last)}</NextContinuationToken>' if more else ''}"
        told += "".join(contents) + "".join(f"<CommonPrefixes><Prefix>{escape(one)}</Prefix></CommonPrefixes>" for one in folders)
        self.xml(f"<ListBucketResult>{told}</ListBucketResult>")


def _tag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


def _unescaped(text: str) -> str:
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace("&apos;", "'").replace("&amp;", "&")


def _plain(data: bytes) -> bytes:
    """What the SDK has packed in chunks of its own, each with its size before it, and a checksum behind the last."""
    pieces, packed = [], io.BytesIO(data)
    while size := int(packed.readline().split(b";")[0] or b"0", 16):
        pieces.append(packed.read(size))
        packed.readline()
    return b"".join(pieces)

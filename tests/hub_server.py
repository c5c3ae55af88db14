"""A real server that speaks the hub's protocol as far as huggingface_hub 2.4 uses it: repositories are folders, and it misbehaves at will.

    with HubServer(datasets={"someone/pairs": folder}, models={"someone/base": other}) as server:
        server.misbehave("train.jsonl", cut(1000), times=2)     # what the next requests for this file's bytes meet; times=None: all of them
        server.misbehave("api", status(503))                    # the same for listings
        server.token, server.gated = "hf_…", {"someone/base"}   # private repositories, and one whose terms were not accepted

HF_ENDPOINT is `server.url`. Large files (`lfs_from` bytes and more) are redirected to a "cdn" on another port, which refuses a request that
still carries the token, as the real ones do. Every request is in `received`, the bytes that went out for each file in `sent`.
As a program: `python tests/hub_server.py --dataset someone/pairs=FOLDER` prints its address and serves until it is killed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit


@dataclass(frozen=True)
class Asked:
    """A request as it came: method, path with query, headers in lower case, and the file whose bytes it is for (None: a listing)."""

    method: str
    path: str
    headers: dict[str, str]
    file: str | None

    @property
    def start(self) -> int:
        """The first byte that was asked for."""
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range", ""))
        return int(found[1]) if found else 0


Fault = Callable[["Handler", bytes, int], None]
"""What a request meets: the handler, the whole bytes of the file (none for a listing), and the first byte that was asked for."""


def cut(after: int, linger: bool = True) -> Fault:
    """So many bytes, and the connection closed; or reset, without `linger`."""

    def act(handler: Handler, data: bytes, start: int) -> None:
        handler.head_of_file(data, start)
        handler.write(data[start : start + after])
        handler.drop(linger)

    return act


def short(size: int) -> Fault:
    """A reply in good order that is not all of the file."""
    return lambda handler, data, start: handler.send_file(data[:size], min(start, size))


def wrong() -> Fault:
    """As many bytes, and none of them right."""
    return lambda handler, data, start: handler.send_file(bytes(255 - one for one in data), start)


def longer(more: int) -> Fault:
    """The file, and more bytes after it."""
    return lambda handler, data, start: handler.send_file(data + b"x" * more, start)


def slow(bytes_before: int, seconds: float = 60.0) -> Fault:
    """Some bytes, then a long pause."""

    def act(handler: Handler, data: bytes, start: int) -> None:
        handler.head_of_file(data, start)
        handler.write(data[start : start + bytes_before])
        handler.wfile.flush()
        handler.owner.closing.wait(seconds)
        handler.drop()

    return act


def whole() -> Fault:
    """All of the file, whatever part of it was asked for."""
    return lambda handler, data, start: handler.send_file(data, 0)


def status(code: int, error_code: str = "", **headers: str) -> Fault:
    """An error as the hub sends it; headers as keywords, with _ for -."""

    def act(handler: Handler, data: bytes, start: int) -> None:
        told = {"X-Error-Code": error_code} if error_code else {}
        handler.reply(code, b'{"error":"no"}', {**told, **{name.replace("_", "-"): value for name, value in headers.items()}})

    return act


def body(data: bytes) -> Fault:
    """Any bytes."""
    return lambda handler, _data, _start: handler.reply(200, data, {"Content-Type": "text/html"})


@dataclass(frozen=True)
class Entry:
    """A file of a repository."""

    path: str
    data: bytes
    blob: str
    sha256: str | None

    @property
    def etag(self) -> str:
        return self.sha256 or self.blob


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Http

    @property
    def owner(self) -> HubServer:
        return self.server.owner

    def log_message(self, *_: Any) -> None:
        """Tests read requests, not logs."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.file: str | None = None
        try:
            self._route()
        except OSError:  # whoever asked has gone
            self.close_connection = True

    def _route(self) -> None:
        split = urlsplit(self.path)
        path = unquote(split.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        if found := re.fullmatch(r"/cdn/(\w+)/(.+)", path):
            entry = self.owner.by_sha256[found[1]]
            self.owner.note(Asked(self.command, self.path, headers, entry.path))
            if "authorization" in headers:
                self.reply(400, b"only one auth mechanism allowed")
            else:
                self._content(entry)
        elif found := re.fullmatch(r"/api/(dataset|model)s/([\w.-]+/[\w.-]+)(?:/(revision|tree)/([^/]+))?", path):
            self.owner.note(Asked(self.command, self.path, headers, None))
            if fault := self.owner.take("api"):
                fault(self, b"", 0)
            elif self._may(f"{found[1]}/{found[2]}", found[4] or "main"):
                self._listing(found[1], found[2], found[3] == "tree", parse_qs(split.query))
        elif found := re.fullmatch(r"/(datasets/|)([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            repo = f"{'dataset' if found[1] else 'model'}/{found[2]}"
            self.owner.note(Asked(self.command, self.path, headers, found[4]))
            if self._may(repo, found[3]):
                self._resolve(repo, found[4])
        else:
            self.reply(404, b"no such page")

    def _may(self, repo: str, revision: str) -> bool:
        """Whether the repository and its revision are there for whoever asks; says so if not."""
        owner = self.owner
        if repo not in owner.repos:
            self.reply(401 if "authorization" not in self.headers else 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif owner.token is not None and self.headers.get("Authorization") != f"Bearer {owner.token}":
            self.reply(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif repo.partition("/")[2] in owner.gated:
            self.reply(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif revision not in ("main", owner.commit(repo), *owner.tags):
            self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            return True
        return False

    def _listing(self, repo_type: str, name: str, tree: bool, query: Mapping[str, list[str]]) -> None:
        repo = f"{repo_type}/{name}"
        if not tree:
            told = {"id": name, "sha": self.owner.commit(repo), "private": False, "tags": [], "siblings": []}
            self.reply(200, json.dumps(told).encode(), {"Content-Type": "application/json"})
            return
        entries = [*self.owner.tree(repo), *self.owner.further_entries]
        first = int(query.get("cursor", ["0"])[0])
        after = first + self.owner.page
        link = {}
        if after < len(entries):
            address = f"{self.owner.url}{urlsplit(self.path).path}?recursive=True&expand=False&cursor={after}"
            link = {"Link": f'<{address}>; rel="next"'}
        self.reply(200, json.dumps(entries[first:after]).encode(), {"Content-Type": "application/json", **link})

    def _resolve(self, repo: str, path: str) -> None:
        entry = self.owner.entries(repo).get(path)
        if entry is None:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"X-Repo-Commit": self.owner.commit(repo), "ETag": f'"{entry.etag}"'}
        if entry.sha256 is None:
            self._content(entry, headers)
            return
        linked = {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(len(entry.data))}
        place = f"{self.owner.cdn_url}/cdn/{entry.sha256}/{quote(entry.path)}"
        self.reply(302, b"", {**headers, **linked, "Location": place})

    def _content(self, entry: Entry, headers: Mapping[str, str] | None = None) -> None:
        self.file, self.further = entry.path, headers or {"ETag": f'"{entry.etag}"'}
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(found[1]) if found else 0
        fault = self.owner.take(entry.path) if self.command == "GET" else None
        if fault is not None:
            fault(self, entry.data, start)
        elif start > len(entry.data):
            self.reply(416, b"")
        else:
            self.send_file(entry.data, start)

    def head_of_file(self, data: bytes, start: int) -> None:
        """The head of a reply with the file's bytes from `start` on."""
        self.send_response(206 if start else 200)
        for name, value in self.further.items():
            self.send_header(name, value)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def send_file(self, data: bytes, start: int) -> None:
        """A whole reply with the file's bytes from `start` on."""
        self.head_of_file(data, start)
        if self.command != "HEAD":
            self.write(data[start:])

    def write(self, data: bytes) -> None:
        """Bytes of the file, counted as they go."""
        for place in range(0, len(data), 1 << 14):
            piece = data[place : place + (1 << 14)]
            self.wfile.write(piece)
            self.owner.count(self.file or "", len(piece))

    def reply(self, code: int, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        """A whole reply."""
        self.send_response(code)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def drop(self, linger: bool = True) -> None:
        """Close the connection as it is."""
        if not linger:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
        self.close_connection = True

    def finish(self) -> None:
        """A dropped connection has nothing left to flush."""
        try:
            super().finish()
        except (OSError, ValueError):
            self.close_connection = True


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    owner: HubServer


class HubServer:
    """The hub and its cdn, on two ports of 127.0.0.1; repositories are read from their folders at each request."""

    def __init__(
        self,
        datasets: Mapping[str, Path] | None = None,
        models: Mapping[str, Path] | None = None,
        lfs_from: int = 1000,
        page: int = 1000,
        tags: tuple[str, ...] = (),
    ) -> None:
        self.repos = {f"dataset/{name}": Path(folder) for name, folder in (datasets or {}).items()}
        self.repos |= {f"model/{name}": Path(folder) for name, folder in (models or {}).items()}
        self.lfs_from, self.page, self.tags = lfs_from, page, tags
        self.token: str | None = None
        self.gated: set[str] = set()
        self.further_entries: list[dict[str, Any]] = []
        """Entries of every listing that no folder has, for what a hostile hub may say."""
        self.received: list[Asked] = []
        self.sent: Counter[str] = Counter()
        self.by_sha256: dict[str, Entry] = {}
        self.closing = threading.Event()
        self._faults: dict[str, tuple[Fault, int | None]] = {}
        self._known: dict[tuple[str, int, int], Entry] = {}
        self._lock = threading.Lock()
        self._servers = [_Http(("127.0.0.1", 0), Handler) for _ in range(2)]
        for one in self._servers:
            one.owner = self
        self._threads = [threading.Thread(target=one.serve_forever, args=(0.02,), daemon=True) for one in self._servers]

    @property
    def url(self) -> str:
        """What HF_ENDPOINT has to be."""
        return f"http://127.0.0.1:{self._servers[0].server_address[1]}"

    @property
    def cdn_url(self) -> str:
        """Where large files are redirected to."""
        return f"http://127.0.0.1:{self._servers[1].server_address[1]}"

    def misbehave(self, file: str, fault: Fault, times: int | None = 1) -> None:
        """What the next `times` requests for the bytes of a file meet; `api`: those for listings; None: all of them."""
        with self._lock:
            self._faults[file] = (fault, times)

    def behave(self) -> None:
        """No fault any more, and nothing received."""
        with self._lock:
            self._faults.clear()
            self.received.clear()
            self.sent.clear()

    def contents(self, file: str | None = None) -> list[Asked]:
        """The requests for bytes (of one file), redirects left out."""
        with self._lock:
            large = {entry.path for entry in self.by_sha256.values()}
            asked = [one for one in self.received if one.method == "GET" and one.file is not None and file in (None, one.file)]
        return [one for one in asked if one.path.startswith("/cdn/") or one.file not in large]

    def commit(self, repo: str) -> str:
        """The commit that a repository is at: a function of its files."""
        told = "".join(f"{entry.path}\0{entry.blob}\0" for entry in self.entries(repo).values())
        return hashlib.sha1(told.encode()).hexdigest()

    def entries(self, repo: str) -> dict[str, Entry]:
        """The files of a repository by path."""
        folder = self.repos[repo]
        return {name: self._entry(folder / name, name) for name in _names(folder)}

    def tree(self, repo: str) -> list[dict[str, Any]]:
        """The files of a repository, and a folder to be passed over, as the hub lists them."""
        listed: list[dict[str, Any]] = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": "a-folder"}]
        for entry in self.entries(repo).values():
            told: dict[str, Any] = {"type": "file", "oid": entry.blob, "size": len(entry.data), "path": entry.path}
            if entry.sha256 is not None:
                told["lfs"] = {"oid": entry.sha256, "size": len(entry.data), "pointerSize": 134}
            listed.append(told)
        return listed

    def _entry(self, path: Path, name: str) -> Entry:
        state = path.stat()
        key = (str(path), state.st_size, state.st_mtime_ns)
        with self._lock:
            if key not in self._known:
                data = path.read_bytes()
                sha256 = hashlib.sha256(data).hexdigest() if len(data) >= self.lfs_from else None
                kept = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode() if sha256 else data
                blob = hashlib.sha1(b"blob %d\0" % len(kept) + kept).hexdigest()
                self._known[key] = Entry(name, data, blob, sha256)
            entry = self._known[key]
            if entry.sha256 is not None:
                self.by_sha256[entry.sha256] = entry
        return entry

    def note(self, asked: Asked) -> None:
        """Remember a request."""
        with self._lock:
            self.received.append(asked)

    def count(self, file: str, size: int) -> None:
        """Remember bytes that went out."""
        with self._lock:
            self.sent[file] += size

    def take(self, file: str) -> Fault | None:
        """What a request for this file meets."""
        with self._lock:
            fault, times = self._faults.get(file, (None, 0))
            if fault is None or times == 0:
                return None
            self._faults[file] = (fault, None if times is None else times - 1)
            return fault

    def __enter__(self) -> HubServer:
        for one in self._threads:
            one.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()


def _names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]


def main() -> None:
    """Serve until killed."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--dataset", action="append", default=[], metavar="NAME=FOLDER")
    options.add_argument("--model", action="append", default=[], metavar="NAME=FOLDER")
    given = options.parse_args()
    pairs = [{name: Path(folder) for name, _, folder in (one.partition("=") for one in every)} for every in (given.dataset, given.model)]
    with HubServer(*pairs) as server:
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()

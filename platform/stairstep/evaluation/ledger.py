"""The answer ledger: what a reader or a grader has once said to a request is never asked again, by any evaluation of any run.

Layout: `<folder>/<kind>/<2 hex>/<64 hex>.json`, one immutable entry per key, named by the SHA-256 of the canonical JSON of kind and key. An
entry holds its key, so that a person can read what was asked, and a digest of all its bytes: a torn, edited or misplaced one counts as
absent, is told once and replaced. Entries are written under another name in `<folder>/.in_flight` and linked to their own, which only the
first of two can do; the second takes the first one's value. There, too, lie the leases (see leases.py) by which a request that is in
flight is asked once, also among machines.

The file system may be shared. Assumed of it: exclusive creation and rename are atomic, opening a file or a folder asks the server again
(NFS: the default `cto`), modification times come from one clock. Hard links are used where it has them; without, a rename after a look must
do. Never used: file locks, appending, the clock of a machine. A cache that is stale in spite of all can cost a second call, not an entry.
Entries are not synced one by one: a power cut, unlike a kill, may cost those of the last seconds.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stairstep.records.files import temporary_name
from stairstep.records.folders import sweep
from stairstep.settings import InputError

from .leases import NO_LINKS, Attempt, Leases, write_new

_log = logging.getLogger(__name__)
_KIND = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_IN_FLIGHT = ".in_flight"
_LEASE_S = 30.0
_FIRST_PAUSE_S = 0.005
_LONGEST_PAUSE_S = 0.25
_SUM = b',\n"sha256": "'
_END = b'"\n}\n'
_SUM_BYTES = len(_SUM) + 64 + len(_END)

Identity = tuple[int, ...]
Stale = Callable[[Mapping[str, Any]], bool]


@dataclass(frozen=True)
class Entry:
    """A value, and whether it was found (also: asked by somebody else meanwhile) instead of asked for by this call."""

    value: dict[str, Any]
    hit: bool


class Damaged(Exception):
    """An entry's bytes are not what was written."""


class Request:
    """A kind and a key, and what follows from them: the entry's place and how its bytes begin; and which kept values will not do."""

    def __init__(self, folder: Path, kind: str, key: Mapping[str, Any], stale: Stale | None = None) -> None:
        if not _KIND.fullmatch(kind):
            raise ValueError(f"kind {kind!r}: expected a short name of small letters, digits, - and _")
        self.kind = kind
        self.stale: Stale = stale or (lambda value: False)
        canonical = _json(_plain(key, f"key of kind {kind!r}"), sort_keys=True)
        self.digest = hashlib.sha256(b'{"key":' + canonical + b',"kind":"' + kind.encode() + b'"}').hexdigest()
        self.path = folder / kind / self.digest[:2] / f"{self.digest}.json"
        self._head = b'{\n"kind": "' + kind.encode() + b'",\n"key": ' + canonical + b',\n"value": '

    def text(self, value: Mapping[str, Any]) -> bytes:
        """The bytes of an entry with this value."""
        if not isinstance(value, Mapping):
            raise ValueError(f"value of kind {self.kind!r}: expected an object, found {type(value).__name__}")
        body = self._head + _json(_plain(value, f"value of kind {self.kind!r}"))
        return body + _SUM + hashlib.sha256(body).hexdigest().encode() + _END

    def value(self, text: bytes) -> dict[str, Any]:
        """The value in an entry's bytes."""
        body = text[:-_SUM_BYTES]
        if text[len(body) :] != _SUM + hashlib.sha256(body).hexdigest().encode() + _END:
            raise Damaged("it is torn, or was changed after it was written")
        if not body.startswith(self._head):
            raise Damaged("it belongs to another key or format")
        return dict(json.loads(body[len(self._head) :]))


class Ledger:
    """A folder of entries. Threads may share one; a process makes its own. `fresh`: what was there before is asked again, once per key."""

    def __init__(self, folder: Path, fresh: bool = False, lease_s: float = _LEASE_S) -> None:
        if not lease_s > 0:
            raise ValueError(f"lease_s {lease_s}: expected more than 0 seconds")
        self.folder = Path(folder)
        self.fresh = fresh
        self.hits: Counter[str] = Counter()  # by kind: calls of `once` that had their value without asking
        self.asked: Counter[str] = Counter()  # calls of `ask`, those that failed too
        self.waited: Counter[str] = Counter()  # calls of `once` that waited for somebody who was asking the same
        self._in_flight = self.folder / _IN_FLIGHT
        self._process = os.getpid()
        self._guard = threading.Lock()
        self._asking: dict[str, tuple[threading.Event, int]] = {}
        self._ignored: dict[str, Identity | None] = {}
        self._told: set[str] = set()
        self._open(lease_s)

    def _open(self, lease_s: float) -> None:
        """Make the folder ready, or refuse one that entries cannot be kept in."""
        try:
            self._leases = Leases(self._in_flight, lease_s)
            self._leases.sweep()
            sweep(self._in_flight)
        except (FileExistsError, NotADirectoryError):
            message = f"{self.folder}: a file stands where the answer ledger needs a folder; move it, or choose another folder"
            raise InputError(message) from None
        except OSError as error:
            advice = "give this user the right to write there, or choose another folder for the answer ledger"
            raise InputError(f"{self.folder}: the answer ledger cannot be written ({error.strerror or error}); {advice}") from None

    def once(self, kind: str, key: Mapping[str, Any], ask: Callable[[], dict[str, Any]], stale: Stale | None = None) -> Entry:
        """The kept value of a key, or that of `ask`, which one of all those who want it now calls; its exception passes through. A kept
        value that `stale` is true of is asked for again, once per key, and replaced."""
        if os.getpid() != self._process:
            raise RuntimeError("a Ledger belongs to the process that made it; make another one here")
        request = Request(self.folder, kind, key, stale)
        waited = False
        while True:
            value = self._accepted(request)
            if value is not None:
                return self._hit(kind, value, waited)
            with self._guard:
                other = self._asking.get(request.digest)
                if other is None:
                    done = threading.Event()
                    self._asking[request.digest] = (done, threading.get_ident())
                    break
            if other[1] == threading.get_ident():
                raise RuntimeError(f"asking for a {kind!r} asks for the very same one again")
            waited = True
            other[0].wait()
        try:
            return self._ask_alone(request, ask, waited)
        finally:
            with self._guard:
                del self._asking[request.digest]
            done.set()

    def find(self, kind: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The kept value of a key, or None; nobody is asked and nothing is counted."""
        return self._accepted(Request(self.folder, kind, key))

    def counts(self, kind: str) -> dict[str, int]:
        """How many calls of a kind were hits, were asked and waited, for a summary."""
        return {"hits": self.hits[kind], "asked": self.asked[kind], "waited": self.waited[kind]}

    def _hit(self, kind: str, value: dict[str, Any], waited: bool) -> Entry:
        with self._guard:
            self.hits[kind] += 1
            self.waited[kind] += waited
        return Entry(value, hit=True)

    def _ask_alone(self, request: Request, ask: Callable[[], dict[str, Any]], waited: bool) -> Entry:
        """`once` for the one thread of this process that may go on with this request."""
        attempt = self._leases.attempt(request.digest)
        pause = _FIRST_PAUSE_S
        while True:
            lease = self._lease(attempt)
            if lease is not None:
                break
            waited = True
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(1.5 * pause, _LONGEST_PAUSE_S, self._leases.lease_s / 4)
            value = self._accepted(request)
            if value is not None:
                return self._hit(request.kind, value, waited)
        with lease:
            _ask_server_again(request.path.parent)
            value = self._accepted(request)  # somebody may have written it between the look and the lease
            if value is not None:
                return self._hit(request.kind, value, waited)
            with self._guard:
                self.asked[request.kind] += 1
                self.waited[request.kind] += waited
            text = request.text(ask())
            return Entry(self._commit(request, text), hit=False)

    def _lease(self, attempt: Attempt) -> contextlib.AbstractContextManager[Any] | None:
        try:
            return attempt.take()
        except OSError as error:
            self._tell("lease", "%s: no lease can be had (%s); the same may be asked more than once", self._in_flight, error)
            return contextlib.nullcontext()

    # --- the file of one entry

    def _accepted(self, request: Request) -> dict[str, Any] | None:
        """The value in a sound entry; not one that was there when its key was first met, under `fresh` or if it is stale."""
        value, identity = self._read(request)
        old = self.fresh or value is None or request.stale(value)
        if old and self._ignored.setdefault(request.digest, identity) == identity:
            return None
        return value

    def _read(self, request: Request) -> tuple[dict[str, Any] | None, Identity | None]:
        """The value of an entry (None: absent or damaged), and what tells its file from one that replaces it (None: absent)."""
        try:
            with open(request.path, "rb", buffering=0) as file:
                text = file.readall()
                stat = os.fstat(file.fileno())
        except FileNotFoundError:
            return None, None
        except OSError as error:
            if error.errno != errno.ESTALE:  # on NFS: replaced while it was being read
                self._tell(request.digest, "%s: this entry cannot be read (%s); it is asked for again", request.path, error)
            return None, None
        identity = (stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size)
        try:
            return request.value(text), identity
        except Damaged as why:
            self._tell(request.digest, "%s: this entry counts as absent and is asked for again: %s", request.path, why)
            return None, identity

    def _commit(self, request: Request, text: bytes) -> dict[str, Any]:
        """Keep a new entry; the value that is kept, which is another's where that one was first."""
        try:
            for _ in range(3):  # a folder may be missing, or be cleared away just now
                with contextlib.suppress(FileNotFoundError):
                    return self._place(request, text)
                request.path.parent.mkdir(parents=True, exist_ok=True)
                self._in_flight.mkdir(parents=True, exist_ok=True)
            return self._place(request, text)
        except OSError as error:
            # What was just paid for is worth more than the next evaluation's time.
            self._tell("commit", "%s: entries cannot be kept (%s); they will be asked for again", request.path, error)
            return request.value(text)

    def _place(self, request: Request, text: bytes) -> dict[str, Any]:
        temporary = temporary_name(self._in_flight / request.path.name)
        try:
            write_new(temporary, text)
            try:
                os.link(temporary, request.path)
            except FileExistsError:
                pass
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
            else:
                return request.value(text)
            # Somebody was first, or what lies there is damaged or to be asked afresh, or there are no links here.
            there = self._accepted(request)
            if there is not None and not request.stale(there):
                return there
            os.replace(temporary, request.path)
            return request.value(text)
        finally:
            temporary.unlink(missing_ok=True)

    def _tell(self, what: str, message: str, *arguments: object) -> None:
        """Warn of a thing once."""
        with self._guard:
            news = what not in self._told
            self._told.add(what)
        if news:
            _log.warning(message, *arguments)


def _ask_server_again(folder: Path) -> None:
    """Opening a folder makes an NFS client forget which names were not there a while ago."""
    with contextlib.suppress(OSError):
        os.close(os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))


def _json(value: Any, sort_keys: bool = False) -> bytes:
    """One line of JSON: the canonical one with sorted keys. Text stays legible, but for lone surrogates, which UTF-8 does not have."""
    try:
        return json.dumps(value, sort_keys=sort_keys, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, sort_keys=sort_keys, separators=(",", ":")).encode("ascii")


def _plain(value: Any, where: str) -> Any:
    """A copy of plain JSON; anything else is refused by its place."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where}: {value} is not a number that JSON has")
        return value
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise ValueError(f"{where}: the name {name!r} is no text, as JSON wants it")
        return {name: _plain(one, f"{where}, {name}") for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one, f"{where}[{place}]") for place, one in enumerate(value)]
    raise ValueError(f"{where}: expected plain JSON, found {type(value).__name__}")

"""Leases: the right to ask for one thing, held by one asker at a time on any number of machines, and lost by whoever dies.

A lease is a small file that only one can make; it names its holder, for how long it is good, and a token that is never used twice. While it
is held, a thread renews its modification time. It has died when its process is gone (seen on the same machine), when its time is longer ago
than it is good for, by the file system's own clock (read off a file touched there: clocks of machines may differ), or when somebody has
watched it for longer than that and nothing moved. A dead lease is never removed by those who wait, since a slow one would then remove its
successor: they create the file that is named by the dead one's token, which one of them can do, and that file is the next lease. Whoever
gives up a lease removes the first file of such a chain before the others; a successor counts only while the first file is still the one
that was judged.

Losing a lease to a stall longer than `lease_s` costs a second asking and nothing else: whoever uses leases commits what was asked in a
way that lets only the first through.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import re
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from stairstep.records.files import host_name, process_is_alive, temporary_name

_log = logging.getLogger(__name__)
_SUFFIX = ".lease"
_RENEWALS = 4  # in each lease_s: three may come late before the lease is lost
_CLOCK_S = 30.0
_LEASE = re.compile(r"(?P<host>\w+) (?P<pid>\d{1,9}) (?P<space>\S+) (?P<token>[0-9a-z]+) (?P<lease_s>\d+\.\d+)\n", re.ASCII)
_LITTER_S = 3600.0
NO_LINKS = {errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # what says that there are no hard links
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # a laptop's sleep counts, where the system can tell


def _elapsed() -> float:
    return time.clock_gettime(_CLOCK)


def _elapsed_ns() -> int:
    return time.clock_gettime_ns(_CLOCK)


@functools.cache
def _process_space() -> str:
    """Where this machine's process numbers mean what they mean here: the boot and the process namespace; `-` where nothing tells."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"
    except (OSError, ValueError):
        return "-"


@dataclass(frozen=True)
class _Seen:
    """What a lease's file says: its holder (unknown while it is being written), and when it was last renewed."""

    host: str
    pid: int
    space: str
    token: str
    lease_s: float  # without renewal it is dead after this
    time_ns: int

    @property
    def holder_is_gone(self) -> bool:
        """Whether the holder was a process of this very machine and is no more."""
        here = self.host == host_name() and self.space == _process_space() != "-"
        return here and not process_is_alive(self.pid)


def _look(path: Path) -> _Seen | None:
    """What is in a lease's file, or None without one. Opening it makes a network file system ask its server."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        text = os.read(descriptor, 1000).decode("ascii", "replace")
        time_ns = os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)
    found = _LEASE.fullmatch(text)
    if found is None:
        return _Seen("", 0, "-", "", 0.0, time_ns)
    return _Seen(found["host"], int(found["pid"]), found["space"], found["token"], float(found["lease_s"]), time_ns)


def write_new(path: Path, text: bytes) -> None:
    """Make a file that must not be there yet; closing it sends it to the server."""
    with open(path, "xb", buffering=0) as file:
        if file.write(text) != len(text):
            raise OSError(errno.ENOSPC, "only a part could be written; is the disk full?")


class FolderClock:
    """The time of the file system that a folder lies on, which all machines that share it agree upon."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._offset_ns = self._read() - _elapsed_ns()
        self._measured = _elapsed()

    def now_ns(self) -> int:
        """Nanoseconds, comparable with modification times in the folder; never ahead of them by more than a clock's drift."""
        if _elapsed() - self._measured > _CLOCK_S:
            self._offset_ns = self._read() - _elapsed_ns()
            self._measured = _elapsed()
        return _elapsed_ns() + self._offset_ns

    def _read(self) -> int:
        path = temporary_name(self._folder / "clock")
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            os.utime(descriptor)
            return os.fstat(descriptor).st_mtime_ns
        finally:
            os.close(descriptor)
            path.unlink(missing_ok=True)


class Lease:
    """A lease that is held until the end of a `with` block."""

    def __init__(self, owner: Leases, chain: list[tuple[Path, str]]) -> None:
        self._owner = owner
        self._chain = chain  # the dead ones that it succeeds, the first of all first, and itself: file and token
        self.path, self.token = chain[-1]
        self._renewed = _elapsed()
        self._lost = False

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._owner.forget(self)
        # What was asked is worth more than this file; one that cannot be removed is dead in a while.
        with contextlib.suppress(OSError):
            if self._is_still_held():
                for path, _ in self._chain:
                    path.unlink(missing_ok=True)

    def renew(self) -> None:
        """Show that the holder lives."""
        try:
            if self._is_still_held():
                before = _elapsed()
                os.utime(self.path)
                self._renewed = before
        except OSError as error:
            _log.debug("%s: this lease could not be renewed (%s)", self.path, error)

    def _is_still_held(self) -> bool:
        """Whether nobody else has taken it over: they may once it was not renewed in time."""
        if not self._lost and _elapsed() - self._renewed > 0.9 * self._owner.lease_s:
            seen = _look(self.path)
            taken = _look(self._owner.successor(self._chain[0][0], self.token))
            self._lost = seen is None or seen.token != self.token or taken is not None
        return not self._lost


class Leases:
    """The leases of one folder, as this process takes them. Made and used in one process, by any number of threads."""

    def __init__(self, folder: Path, lease_s: float) -> None:
        self.folder = folder
        self.lease_s = lease_s
        folder.mkdir(parents=True, exist_ok=True)
        self.clock = FolderClock(folder)
        self._held: set[Lease] = set()
        self._changed = threading.Condition()
        self._renewer: threading.Thread | None = None

    def attempt(self, name: str) -> Attempt:
        """Begin to want a lease by name."""
        return Attempt(self, self.folder / f"{name}{_SUFFIX}")

    def create(self, path: Path) -> str | None:
        """Make a lease's file; its token, or None where there is such a file already."""
        token = secrets.token_hex(8)
        text = f"{host_name()} {os.getpid()} {_process_space()} {token} {self.lease_s:.6f}\n".encode("ascii")
        try:
            self._write(path, text)
        except FileNotFoundError:  # somebody has cleared the folder away
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write(path, text)
        except FileExistsError:
            # A network file system may repeat a call whose answer was lost, and then say that there is one: ours.
            seen = _look(path)
            return token if seen is not None and seen.token == token else None
        return token

    def _write(self, path: Path, text: bytes) -> None:
        """Make a file that was not there, with its content in one instant where there are hard links."""
        temporary = temporary_name(path)
        try:
            write_new(temporary, text)
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            write_new(path, text)
        finally:
            temporary.unlink(missing_ok=True)

    def successor(self, first: Path, token: str) -> Path:
        """The file of the lease that follows a dead one in the chain that starts at `first`."""
        return first.with_name(f"{first.name.removesuffix(_SUFFIX)}.{token or 'unwritten'}{_SUFFIX}")

    def keep(self, lease: Lease) -> Lease:
        """Renew a lease from now on."""
        with self._changed:
            self._held.add(lease)
            if self._renewer is None or not self._renewer.is_alive():
                self._renewer = threading.Thread(target=self._renew, name="lease-renewer", daemon=True)
                # Python starts no thread any more while it shuts down: then the lease is good for its first lease_s.
                with contextlib.suppress(RuntimeError):
                    self._renewer.start()
        return lease

    def forget(self, lease: Lease) -> None:
        """Renew a lease no more."""
        with self._changed:
            self._held.discard(lease)

    def _renew(self) -> None:
        while True:
            with self._changed:
                self._changed.wait(self.lease_s / _RENEWALS)
                if not self._held:
                    self._renewer = None
                    return
                held = list(self._held)
            for lease in held:
                lease.renew()

    def sweep(self) -> None:
        """Remove leases that are dead and that nobody came to take over."""
        now = self.clock.now_ns()
        for path in sorted(self.folder.glob(f"*{_SUFFIX}")):
            name = path.name.removesuffix(_SUFFIX)
            with contextlib.suppress(OSError):  # another user's file, or one that another process removes now
                if "." not in name:
                    lease = self.attempt(name).take()
                    if lease is not None:
                        with lease:
                            pass
                elif now - path.stat().st_mtime_ns > 1e9 * max(_LITTER_S, _RENEWALS * self.lease_s):
                    path.unlink()


class Attempt:
    """The wish for one lease, with what was seen of its holders so far."""

    def __init__(self, leases: Leases, first: Path) -> None:
        self._leases = leases
        self._first = first
        self._watched: dict[Path, tuple[str, int, float]] = {}

    def take(self) -> Lease | None:
        """The lease, or None while somebody who lives holds it."""
        chain: list[tuple[Path, str]] = []
        path = self._first
        while True:
            seen = _look(path)
            if seen is None:
                token = self._leases.create(path)
                if token is None:
                    return None
                break
            if self._lives(path, seen):
                return None
            chain.append((path, seen.token))
            path = self._leases.successor(self._first, seen.token)
        if chain and not self._still_dead(*chain[0]):
            path.unlink(missing_ok=True)
            return None
        if chain:
            _log.info("%s: the lease of a holder that is gone was taken over", self._first)
        return self._leases.keep(Lease(self._leases, [*chain, (path, token)]))

    def _still_dead(self, first: Path, token: str) -> bool:
        """Whether a chain still begins with the lease that was found dead: it is gone once any of its successors was given up."""
        seen = _look(first)
        return seen is not None and seen.token == token and not self._lives(first, seen)

    def _lives(self, path: Path, seen: _Seen) -> bool:
        if seen.holder_is_gone:
            return False
        # One without a holder is being written just now (no hard links), and its time may not be set yet: it is only watched.
        if seen.token and self._leases.clock.now_ns() - seen.time_ns > 1e9 * seen.lease_s:
            return False
        now = _elapsed()
        token, time_ns, since = self._watched.get(path, ("", 0, now))
        if (token, time_ns) != (seen.token, seen.time_ns):
            since = now
        self._watched[path] = (seen.token, seen.time_ns, since)
        return now - since <= 1.25 * (seen.lease_s or self._leases.lease_s)

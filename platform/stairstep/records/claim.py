"""One process at a time on a run folder: two trainers in one folder would mix their metrics and checkpoints.

The claim is a POSIX record lock on `.lock`: the kernel lets go of it when the process dies, however it dies, and a forked data worker
that outlives its parent does not hold it. Record locks do not exclude a second claim within one process, so claims are also listed here.
The file names its holder and is emptied by a proper release. Where it still names a process of another host, that process died, or locks
do not reach this far; then the heartbeat of status.json is watched, and one that still moves belongs to a living run.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import threading
import time
from pathlib import Path
from types import TracebackType

from stairstep.settings import InputError

from .files import host_name
from .status import HEARTBEAT_S, LOST_S, read_status

_LOG = logging.getLogger(__name__)
_HELD: set[Path] = set()
_GUARD = threading.Lock()
_TAKEN = {errno.EACCES, errno.EAGAIN}
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
WATCH_S = 4 * HEARTBEAT_S


class Claim:
    """The right to write a run folder, held from construction to `release` (or the end of a `with` block)."""

    def __init__(self, folder: Path, watch_s: float = WATCH_S) -> None:
        self.folder = folder.resolve()
        with _GUARD:
            if self.folder in _HELD:
                raise _refusal(self.folder, "this very process")
            self._descriptor: int | None = _take(self.folder / ".lock", self.folder)
            _HELD.add(self.folder)
        try:
            _watch(self.folder, _holder(self._descriptor), watch_s)
        except BaseException:
            self._let_go()
            raise
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps({"host": host_name(), "pid": os.getpid()}).encode(), 0)

    def release(self) -> None:
        """Let another process have the folder; a second call does nothing."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            self._let_go()

    def _let_go(self) -> None:
        with _GUARD:
            if self._descriptor is not None:
                os.close(self._descriptor)
            self._descriptor = None
            _HELD.discard(self.folder)

    @property
    def held(self) -> bool:
        """Whether this claim has not been released."""
        return self._descriptor is not None

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


def _take(path: Path, folder: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return descriptor
        holder = _holder(descriptor)
        os.close(descriptor)
        if error.errno not in _TAKEN:
            raise
        raise _refusal(folder, f"process {holder[1]} on {holder[0]}" if holder else "another process") from None
    return descriptor


def _holder(descriptor: int) -> tuple[str, int] | None:
    """The host and process that hold a lock or died with it, or None after a proper release."""
    try:
        plain = json.loads(os.pread(descriptor, 1000, 0))
        return str(plain["host"]), int(plain["pid"])
    except (ValueError, KeyError, TypeError):
        return None


def _refusal(folder: Path, holder: str) -> InputError:
    return InputError(f"{folder}: {holder} is at work on this run; wait for it or stop it, or choose another run.name")


def _watch(folder: Path, holder: tuple[str, int] | None, watch_s: float) -> None:
    """Refuse if the run of a holder on another host still moves its heartbeat; one that stands still for `watch_s` is taken over."""
    if holder is None or holder[0] == host_name():
        return
    path = folder / "status.json"
    first = read_status(path)
    if first is None or not first.active() or abs(time.time() - first.heartbeat) > LOST_S:
        return
    _LOG.info("%s was at work on %s a moment ago; watching its heartbeat for up to %.0f s", holder[0], folder, watch_s)
    end = time.monotonic() + watch_s
    while time.monotonic() < end:
        time.sleep(min(0.5, max(0.01, watch_s / 10)))
        now = read_status(path)
        if now is None or not now.active():
            return
        if now.heartbeat != first.heartbeat:
            raise _refusal(folder, f"process {now.pid} on {now.host}")
    _LOG.warning("%s: the run's last process, %d on %s, has gone silent; taking over", folder, holder[1], holder[0])

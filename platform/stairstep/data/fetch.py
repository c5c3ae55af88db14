"""Repositories of the hub onto this machine: listed, measured against the free space, fetched side by side, verified, committed last.

A file is in place only when its checksum was that of the listing. Until then it is a hidden part beside its place, which a killed fetch
leaves behind and the next one goes on with. What was verified is noted in `.stairstep-fetch.jsonl` with size and time of change: a file
that is as it was is not hashed again. One process at a time writes a folder.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stairstep.records.files import append_line, read_json_lines, sync_file, temporary_name, write_atomically
from stairstep.settings import DataError, FetchError

from . import hub
from .fetch_report import Count, CountTar, bytes_text, count_expected, seconds_text
from .hub import Listing, RemoteFile
from .roots import AnyPath, Roots, resolve_inside
from .settings import FetchSource

_LOG = logging.getLogger(__name__)
WORKERS = 8
MARGIN = 1 << 30
"""Bytes that stay free on the disk that is fetched to."""
EVERY_S = 10.0
_RECORD = f"{hub.OWN}fetch.jsonl"
_LOCK = f"{hub.OWN}fetch.lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


@dataclass(frozen=True)
class Fetched:
    """One source after the fetch: what there is of it, what was fetched now, and which files could not be had with the right bytes."""

    source: FetchSource
    commit: str
    folder: Path
    files: int
    size: int
    fetched: int
    fetched_size: int
    seconds: float
    wrong: tuple[str, ...]
    counts: tuple[Count, ...]

    @property
    def whole(self) -> bool:
        """Whether every file is there and every count as expected."""
        return not self.wrong and all(one.right for one in self.counts)


def fetch(
    sources: Sequence[FetchSource], base: AnyPath, count_tar: CountTar, roots: Sequence[AnyPath] = (), verify: bool = False
) -> list[Fetched]:
    """Bring every source to its folder below `base`; links in it must stay in `roots`. `count_tar` counts the files of a tar, `verify`
    hashes again what is there."""
    if not os.path.isdir(base):
        raise DataError(f"data.roots[0]: there is no folder '{base}'; make it (mkdir -p), or correct the path")
    targets = []
    for source in sources:
        listing = hub.list_files(source)
        targets.append(_Target(listing, Path(base), roots))
        size = bytes_text(sum(one.size for one in listing.files))
        _LOG.info("%s: commit %s, %d files, %s", source.repo, listing.commit, len(listing.files), size)
    with ExitStack() as held:
        for folder in dict.fromkeys(target.folder for target in targets):
            held.enter_context(_alone(folder))
        for target in targets:
            target.look(verify)
        _check_space(targets)
        return [target.bring(count_tar) for target in targets]


@dataclass
class _Meter:
    """Bytes done of those to do, told to the log now and then."""

    what: str
    total: int
    files: int
    done: int = 0
    finished: int = 0
    began: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, size: int) -> None:
        """So many bytes more, or fewer."""
        with self.lock:
            self.done += size

    def line(self) -> str:
        """How far it is, how fast, and how long it will take."""
        rate = self.done / max(time.monotonic() - self.began, 1e-3)
        left = f", about {seconds_text((self.total - self.done) / rate)} left" if rate > 0 else ""
        said = f"{bytes_text(self.done)} of {bytes_text(self.total)}, {self.finished} of {self.files} files, {bytes_text(rate)}/s"
        return f"{self.what}: {said}{left}"


class _Target:
    """A source on its way to its folder, or into the hub's own cache: there a file is a blob, and the commit's folder links to it."""

    def __init__(self, listing: Listing, base: Path, roots: Sequence[AnyPath]) -> None:
        self.listing, self.source = listing, listing.source
        self.in_cache = self.source.place is None
        self.folder = hub.cache_folder(self.source) if self.in_cache else base / str(self.source.place)
        self.root = self.folder / "snapshots" / listing.commit if self.in_cache else self.folder
        self.missing: list[RemoteFile] = []
        self._allowed = Roots([*roots, base])
        self._record = self.folder / _RECORD
        self._wrong: list[str] = []
        self._stop = threading.Event()

    def place(self, file: RemoteFile) -> Path:
        """Where a file's bytes go."""
        return self.folder / "blobs" / file.checksum if self.in_cache else self.folder / file.path

    def part(self, file: RemoteFile) -> Path:
        """Where a file is gathered: in its own folder, so that it is put in place by one rename."""
        name = hashlib.sha256(file.path.encode()).hexdigest()[:12]
        return self.place(file).with_name(f"{hub.OWN}{name}-{file.checksum[:16]}.part")

    def look(self, verify: bool) -> None:
        """Find out what is missing: what is not there, or is not what the hub has."""
        known = self._known() if not verify else {}
        unsure = []
        for file in self.listing.files:
            size, changed = self._stat(file)
            if size != file.size:
                self.missing.append(file)
                if size is not None:
                    _LOG.warning("%s has %d bytes and the hub's file %d: it is fetched anew", self.place(file), size, file.size)
            elif known.get(self._named(file)) != (size, changed, file.checksum):
                unsure.append(file)
        meter = _Meter(f"{self.source.repo}: checking", sum(one.size for one in unsure), len(unsure))

        def check(file: RemoteFile) -> None:
            if file.checksum_of(self.place(file)) == file.checksum:
                self._note(file)
            else:
                _LOG.warning("%s differs from the hub's file: it is fetched anew", self.place(file))
                self.missing.append(file)
            meter.add(file.size)

        self._each(check, unsure, meter)
        self.missing.sort(key=lambda one: one.path)

    def still_needed(self) -> int:
        """The bytes that are to come."""
        return sum(max(file.size - _size(self.part(file)), 0) for file in self.missing)

    def bring(self, count_tar: CountTar) -> Fetched:
        """Fetch what is missing, and count what must be in it."""
        began, needed = time.monotonic(), self.still_needed()
        meter = _Meter(self.source.repo, needed, len(self.missing))
        self._each(lambda file: self._bring_file(file, meter), self.missing, meter)
        if not self._wrong:
            self._sweep()
            if self.in_cache:
                self._link()
        files = self.listing.files
        return Fetched(
            source=self.source,
            commit=self.listing.commit,
            folder=self.root,
            files=len(files),
            size=sum(one.size for one in files),
            fetched=len(self.missing) - len(self._wrong),
            fetched_size=needed,
            seconds=time.monotonic() - began,
            wrong=tuple(sorted(self._wrong)),
            counts=count_expected(self.source, self.root, [one.path for one in files], count_tar),
        )

    def _bring_file(self, file: RemoteFile, meter: _Meter) -> None:
        """One file, fetched once more if its bytes are wrong."""
        part = self.part(file)
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise DataError(f"{part.parent}: a file lies where '{self.source.repo}' has a folder; move it away") from None
        found = ""
        for attempt in (1, 2):
            try:
                hub.download(self.listing, file, part, meter.add, self._stop)
                found = file.checksum_of(part)
            except hub.TooLong:
                found = "more bytes"
            except hub.CutShort:
                found = "fewer bytes"
            if found == file.checksum:
                sync_file(part)
                os.replace(part, self.place(file))
                self._note(file)
                return
            meter.add(-_size(part))
            part.unlink()
            if attempt == 1:
                _LOG.warning("%s, %s: what came is not what the hub lists; once more from the beginning", self.source.repo, file.path)
        self._wrong.append(
            f"{self.source.repo}, {file.path}: expected {file.size} bytes with the checksum {file.checksum}, twice came {found}"
        )

    def _link(self) -> None:
        """What the hub's client looks for: the commit's folder with links to the blobs, and last the commit of the branch or tag."""
        for file in self.listing.files:
            link = self.root / file.path
            if not link.exists():
                link.parent.mkdir(parents=True, exist_ok=True)
                drafted = temporary_name(link)
                drafted.symlink_to(os.path.relpath(self.place(file), link.parent))
                os.replace(drafted, link)
        named = self.source.revision or "main"
        if named != self.listing.commit:
            reference = self.folder / "refs" / named
            reference.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(reference, self.listing.commit)

    def _each(self, work: Callable[[RemoteFile], None], files: Sequence[RemoteFile], meter: _Meter) -> None:
        """Do the work for all files side by side; the first failure ends all of it."""
        with ThreadPoolExecutor(WORKERS) as pool:
            waiting = {pool.submit(work, file) for file in files}
            try:
                while waiting:
                    done, waiting = wait(waiting, EVERY_S, FIRST_EXCEPTION)
                    failed = [one.exception() for one in done if one.exception() is not None]
                    first = next((one for one in failed if not isinstance(one, hub.Stopped)), None)
                    if first is not None:
                        raise _of_the_disk(first, self.folder)
                    meter.finished += len(done)
                    if waiting:
                        _LOG.info("%s", meter.line())
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _stat(self, file: RemoteFile) -> tuple[int | None, int]:
        """Size and time of change of the file in its place; no size if there is none."""
        path = self.place(file)
        if not self.in_cache:
            resolve_inside(path, self._allowed)
        try:
            found = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None, 0
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{path}: expected a file, found a folder; move it away")
        return found.st_size, found.st_mtime_ns

    def _note(self, file: RemoteFile) -> None:
        size, changed = self._stat(file)
        append_line(self._record, {"path": self._named(file), "size": size, "mtime_ns": changed, "checksum": file.checksum})

    def _named(self, file: RemoteFile) -> str:
        """A file's name in the record."""
        return self.place(file).relative_to(self.folder).as_posix()

    def _known(self) -> dict[str, tuple[Any, ...]]:
        """What was verified: size, time of change and checksum by name, the last line of a name holds."""
        if not self._record.exists():
            return {}
        lines = [one for one in read_json_lines(self._record) if isinstance(one, dict)]
        return {str(one.get("path")): (one.get("size"), one.get("mtime_ns"), one.get("checksum")) for one in lines}

    def _sweep(self) -> None:
        """Remove parts of files that the hub no longer has."""
        for folder in {self.place(file).parent for file in self.listing.files}:
            for left in folder.glob(f"{hub.OWN}*.part"):
                left.unlink()


def _check_space(targets: Sequence[_Target]) -> None:
    """Refuse before the first byte what would not fit."""
    needed: dict[int, int] = {}
    places: dict[int, Path] = {}
    for target in targets:
        if size := target.still_needed():
            device = os.stat(target.folder).st_dev
            needed[device] = needed.get(device, 0) + size
            places.setdefault(device, target.folder)
    for device, size in needed.items():
        free = shutil.disk_usage(places[device]).free
        if free < size + MARGIN:
            raise FetchError(
                f"{places[device]}: {bytes_text(size)} are still to be fetched and {bytes_text(MARGIN)} stay free,"
                f" but only {bytes_text(free)} are free on this disk; make room, or choose another place (data.roots;"
                " HF_HOME for models). Nothing was fetched"
            )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """This process alone in a folder; the kernel lets go of it when the process dies."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise DataError(f"{folder}: expected a folder to fetch to, found a file; move it away, or name another `folder`") from None
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise FetchError(f"{folder}: another fetch is at work here; wait for its end") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(descriptor)
            raise
    try:
        yield
    finally:
        os.close(descriptor)


def _of_the_disk(error: BaseException, folder: Path) -> BaseException:
    """A disk that filled up all the same, in words."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return FetchError(f"{folder}: {error.strerror}; make room and start again, what has come is kept")
    return error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return 0

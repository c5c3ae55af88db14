"""Files that survive a kill at any instruction: whole or absent when replaced, whole lines when appended.

A file is written under a hidden temporary name in its own folder, synced and renamed. A line is appended by one write under a file lock,
so that writers of several processes never mix; a fragment that a killed writer left at the end is cut off by the next append and
passed over by readers. Whoever replaces an append-only file holds the same lock, and a waiting writer notices the replacement.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import socket
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from stairstep.settings import DataError

COMPLETE = "COMPLETE"

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
_BLOCK = 1 << 16
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<purpose>tmp|old|trash)-(?P<host>\w+)-(?P<pid>\d+)-[0-9a-f]{8}")


def host_name() -> str:
    """This machine's name, as it stands in temporary names, locks and status files."""
    return re.sub(r"\W", "_", socket.gethostname(), flags=re.ASCII)[:40] or "unknown"


@cache
def machine_name() -> str:
    """What tells this machine, as it is running now, from all others that may have its host name: where process ids mean the same."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{host_name()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return host_name()


def process_is_alive(pid: int) -> bool:
    """Whether a process of this machine with that id exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@dataclass(frozen=True)
class Temporary:
    """What the name of a temporary file or folder says: what it was to become, why, and who wrote it."""

    name: str
    purpose: str
    host: str
    pid: int


def temporary_name(path: Path, purpose: str = "tmp") -> Path:
    """A fresh hidden name beside `path`: `tmp` becomes `path`, `old` was `path`, `trash` is being deleted."""
    return path.with_name(f".{path.name}.{purpose}-{host_name()}-{os.getpid()}-{secrets.token_hex(4)}")


def parse_temporary(name: str) -> Temporary | None:
    """What a name made by `temporary_name` says, or None for any other name."""
    found = _TEMPORARY.fullmatch(name)
    return Temporary(found["name"], found["purpose"], found["host"], int(found["pid"])) if found else None


def write_atomically(path: Path, data: bytes | str, durable: bool = True) -> None:
    """Replace a file in one instant. Not `durable`: a power cut (not a kill) may still lose it, in return for not waiting for the disk."""
    path = Path(path)
    temporary = temporary_name(path)
    try:
        with open(temporary, "xb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def write_json(path: Path, value: Any, durable: bool = True) -> None:
    """Replace a JSON file in one instant; numbers that JSON does not have (NaN, infinities) are an error."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", durable)


def read_json(path: Path) -> Any:
    """The value of a JSON file."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: this is not valid JSON: {error}") from None


def sync_folder(folder: Path) -> None:
    """Make renames and new names in a folder survive a power cut, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make a file's content survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, create: bool = True) -> Iterator[int]:
    """The descriptor of an append-only file, held against every other writer; never that of a file which has been replaced."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o666)
        try:
            _lock(descriptor)
            if _is_current(descriptor, path):
                yield descriptor
                return
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        # A file system without locks still has whole appends by O_APPEND; only mending and replacing are then unguarded.
        if error.errno not in _NO_LOCKS:
            raise


def _is_current(descriptor: int, path: Path) -> bool:
    held = os.fstat(descriptor)
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return (held.st_dev, held.st_ino) == (there.st_dev, there.st_ino)


def append_line(path: Path, line: str | Mapping[str, Any]) -> None:
    """Append one line (a mapping as JSON) by a single write; a fragment left at the end by a killed writer goes first."""
    text = line if isinstance(line, str) else json.dumps(line, ensure_ascii=False, allow_nan=False)
    if "\n" in text:
        raise ValueError("a line cannot contain a line break")
    with locked(Path(path)) as descriptor:
        append_to(descriptor, text)


def append_to(descriptor: int, text: str) -> None:
    """Append one line to a file held by `locked`."""
    mend_tail(descriptor)
    size = os.fstat(descriptor).st_size
    data = text.encode("utf-8") + b"\n"
    if os.write(descriptor, data) != len(data):
        os.ftruncate(descriptor, size)
        raise OSError(errno.ENOSPC, "only a part of a line could be written; is the disk full?")


def mend_tail(descriptor: int) -> None:
    """End an append-only file with a whole line: a last line that lacks only its line break gets it, a fragment is cut off."""
    size = os.fstat(descriptor).st_size
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return
    start, tail = size, b""
    while start > 0 and b"\n" not in tail:
        step = min(_BLOCK, start)
        start -= step
        tail = os.pread(descriptor, step, start) + tail
    fragment = tail[tail.rfind(b"\n") + 1 :]
    if _is_whole(fragment):
        os.write(descriptor, b"\n")
    else:
        os.ftruncate(descriptor, size - len(fragment))


def _is_whole(line: bytes) -> bool:
    """Whether a line without a line break is a finished one: only an object or a list shows by itself that nothing is missing."""
    if line[:1] not in (b"{", b"["):
        return False
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def read_json_lines(path: Path) -> list[Any]:
    """The values of a JSON-lines file; a torn last line is passed over, any other line that is not JSON is an error."""
    return [value for _, value in read_raw_lines(path)]


def read_raw_lines(path: Path) -> list[tuple[bytes, Any]]:
    """The lines of a JSON-lines file, each with its value; a torn last line is passed over."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    return raw_lines_in(data, path)


def raw_lines_in(data: bytes, path: Path | str) -> list[tuple[bytes, Any]]:
    """The lines of JSON lines, each with its value; `path` is what they are called in messages."""
    lines = data.split(b"\n")
    tail = lines.pop()
    if _is_whole(tail):
        lines.append(tail)
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append((line, json.loads(line)))
        except ValueError as error:
            message = (
                f"{path}:{number}: this line is not valid JSON ({error}); only a file's last line may be incomplete; mend or remove it"
            )
            raise DataError(message) from None
    return found


def digest_of_json(value: Any) -> str:
    """SHA-256 of a plain value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_folder(folder: Path, suffixes: Collection[str] | None = None) -> str:
    """SHA-256 over the names and contents of the files below a folder (of these suffixes), less caches, hidden files and markers."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder")
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*"), key=lambda one: one.relative_to(folder).as_posix()):
        parts = path.relative_to(folder).parts
        if path.name == COMPLETE or any(part.startswith(".") or part == "__pycache__" for part in parts) or not path.is_file():
            continue
        if suffixes is None or path.suffix in suffixes:
            whole.update(f"{digest_of_file(path)} {path.relative_to(folder).as_posix()}\0".encode())
    return whole.hexdigest()

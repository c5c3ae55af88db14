"""What lies where in a tar archive, found once: name, offset, size and tile id of each member, kept as an Arrow IPC file.

An index is trusted only whole: its own digest must agree, the archive must have the size and time that it was built from, and every
member must lie inside of it. Anything else is built anew. Of two members of one name the last counts, as when the archive is unpacked.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from stairstep.records.files import write_atomically
from stairstep.settings import DataError

from .identity import Stamp
from .tar_members import tar_members

_LOG = logging.getLogger(__name__)
_FORMAT = "1"
_SCHEMA = pa.schema([("name", pa.string()), ("offset", pa.int64()), ("size", pa.int64()), ("id", pa.binary(32))])
_BLOCK = 1 << 20
_WORKERS = 16
_LOG_EVERY_S = 10.0
_LOOK_EVERY_S = 0.5


@dataclass(frozen=True)
class ArchiveIndex:
    """The members of one archive in one state; `archive` is its resolved path, `members` has the columns name, offset, size and id."""

    archive: str
    stamp: Stamp
    members: pa.Table


def build_index(archive: Path | str, read: Callable[[int], None] = lambda size: None) -> ArchiveIndex:
    """The index of an archive, from one sequential read of it; `read` is told of every few bytes, and may raise to stop."""
    path = os.path.realpath(archive)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            return _built(descriptor, path, read)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DataError(f"{path}: this archive cannot be read: {error.strerror or error}") from error


def kept_index(archive: Path | str, folder: Path) -> ArchiveIndex | None:
    """The index that `folder` keeps of an archive; None where there is none of its present state, or none that is whole."""
    path = os.path.realpath(archive)
    file = index_file(path, folder)
    try:
        stamp = Stamp.of(os.stat(path))
    except OSError as error:
        raise DataError(f"{path}: this archive cannot be read: {error.strerror or error}") from error
    try:
        index = _parsed(file.read_bytes())
    except FileNotFoundError:
        return None
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        _LOG.warning("%s: this index of %s is damaged (%s); it is built anew", file, path, str(error).split("\n", 1)[0])
        return None
    if (index.archive, index.stamp) != (path, stamp):
        _LOG.info("%s changed since its index was built; it is built anew", path)
        return None
    return index


def index_archive(archive: Path | str, folder: Path, read: Callable[[int], None] = lambda size: None) -> ArchiveIndex:
    """The index of an archive: the one that `folder` keeps or, where that does not hold, a new one, which is kept there."""
    index = kept_index(archive, folder)
    if index is None:
        index = build_index(archive, read)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(index_file(index.archive, folder), _written(index))
    return index


def index_archives(archives: Sequence[Path], folder: Path, alive: Callable[[], None] = lambda: None) -> list[ArchiveIndex]:
    """The indices of many archives, in their order, built in threads where `folder` does not keep them; `alive` is called now and then."""
    with ThreadPoolExecutor(min(_WORKERS, max(1, len(archives)))) as pool:
        found = list(pool.map(lambda one: kept_index(one, folder), archives))
    missing = [place for place, index in enumerate(found) if index is None]
    if missing:
        built = _build_all([archives[place] for place in missing], folder, alive)
        for place, index in zip(missing, built, strict=True):
            found[place] = index
    return [index for index in found if index is not None]


def index_file(archive: str, folder: Path) -> Path:
    """Where the index of an archive is kept, by its resolved path."""
    return folder / f"{hashlib.sha256(os.fsencode(archive)).hexdigest()[:32]}.arrow"


class _Abandoned(Exception):
    """Ends the reading of an archive whose index nobody waits for any more."""


def _build_all(archives: Sequence[Path], folder: Path, alive: Callable[[], None]) -> list[ArchiveIndex]:
    """Build them in parallel, for hashing leaves Python's lock free; the first error ends it all."""
    total = sum(os.path.getsize(one) for one in archives)
    _LOG.info("indexing %d archives, %.2f GB, once; the indices are kept in %s", len(archives), total / 1e9, folder)
    done = 0
    abandoned = threading.Event()
    lock = threading.Lock()

    def read(size: int) -> None:
        nonlocal done
        if abandoned.is_set():
            raise _Abandoned
        with lock:
            done += size

    started = told = time.monotonic()
    with ThreadPoolExecutor(min(len(archives), os.cpu_count() or 1, _WORKERS)) as pool:
        futures: list[Future[ArchiveIndex]] = [pool.submit(index_archive, one, folder, read) for one in archives]
        waiting = set(futures)
        try:
            while waiting:
                ended, waiting = wait(waiting, timeout=_LOOK_EVERY_S, return_when=FIRST_EXCEPTION)
                for one in ended:
                    one.result()
                alive()
                if time.monotonic() - told >= _LOG_EVERY_S:
                    told = time.monotonic()
                    left = (total - done) * (told - started) / done if done else 0.0
                    _LOG.info("indexed %.2f of %.2f GB, %d archives left; about %.0f s to go", done / 1e9, total / 1e9, len(waiting), left)
        finally:
            abandoned.set()
            pool.shutdown(wait=False, cancel_futures=True)
    indices = [one.result() for one in futures]
    count = sum(len(index.members) for index in indices)
    _LOG.info("Indexed %d archives with %d members in %.1f s", len(indices), count, time.monotonic() - started)
    return indices


def _built(descriptor: int, path: str, read: Callable[[int], None]) -> ArchiveIndex:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise DataError(f"{path}: expected a tar archive, found {kind}; correct data.archives")
    found: dict[str, tuple[int, int, bytes]] = {}
    for member in tar_members(descriptor, path):
        found[member.name] = (member.offset, member.size, _digest(descriptor, member.offset, member.size, read))
    if Stamp.of(os.fstat(descriptor)) != Stamp.of(status):
        raise DataError(f"{path}: this archive changed while it was read; start again when it is written")
    columns = [list(found), *(list(column) for column in zip(*found.values(), strict=True))] if found else [[], [], [], []]
    members = pa.table([pa.array(values, field.type) for values, field in zip(columns, _SCHEMA, strict=True)], schema=_SCHEMA)
    return ArchiveIndex(path, Stamp.of(status), members)


def _digest(descriptor: int, offset: int, size: int, read: Callable[[int], None]) -> bytes:
    """SHA-256 of a part of a file; where that ends too soon, the file's stamp tells."""
    digest = hashlib.sha256()
    end = offset + size
    while offset < end:
        data = os.pread(descriptor, min(_BLOCK, end - offset), offset)
        if not data:
            break
        digest.update(data)
        offset += len(data)
        read(len(data))
    return digest.digest()


def _written(index: ArchiveIndex) -> bytes:
    facts = {"format": _FORMAT, "archive": index.archive, "size": str(index.stamp.size), "mtime_ns": str(index.stamp.mtime_ns)}
    table = index.members.replace_schema_metadata({**facts, "digest": _seal(index)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _parsed(data: bytes) -> ArchiveIndex:
    """The index in a file's bytes; ValueError and its kin for anything that is not one, to the last bit."""
    with pa.ipc.open_file(pa.BufferReader(data)) as reader:
        table = reader.read_all()
    table.validate(full=True)
    facts = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    members = table.replace_schema_metadata(None).combine_chunks()
    if facts["format"] != _FORMAT or not members.schema.equals(_SCHEMA) or any(column.null_count for column in members.columns):
        raise ValueError("it has another format")
    index = ArchiveIndex(facts["archive"], Stamp(int(facts["size"]), int(facts["mtime_ns"])), members)
    if facts["digest"] != _seal(index):
        raise ValueError("its digest does not agree")
    for offset, size in zip(members["offset"].to_pylist(), members["size"].to_pylist(), strict=True):
        if not 0 <= offset <= offset + size <= index.stamp.size:
            raise ValueError("a member lies outside of the archive")
    return index


def _seal(index: ArchiveIndex) -> str:
    """SHA-256 over all that an index says."""
    offsets, sizes = index.members["offset"].to_pylist(), index.members["size"].to_pylist()
    ids = [one.hex() for one in index.members["id"].to_pylist()]
    said = [_FORMAT, index.archive, list(index.stamp), index.members["name"].to_pylist(), offsets, sizes, ids]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()

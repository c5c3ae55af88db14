"""Tar archives read in place: a member is found under the path that it would have if its archive were unpacked, and read by one pread.

What is read is compared with the index: bytes with another SHA-256 than the member's id are an error, never a tile. `Archives` never
changes once made, is safe from many threads, and a pickled copy carries the indices and opens its own files, a bounded number at a time.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from stairstep.settings import DataError, TileError

from .archive_index import ArchiveIndex
from .identity import Stamp

_MOST_OPEN = 64


@dataclass(frozen=True, slots=True)
class Member:
    """A file in an archive: the path that it is found under, where its bytes lie, and its id, the SHA-256 of them."""

    path: str
    archive: str
    offset: int
    size: int
    id: str
    mtime_ns: int  # the archive's

    @property
    def stamp(self) -> Stamp:
        """What tells its state, as that of a file."""
        return Stamp(self.size, self.mtime_ns)


class Archives:
    """The members of archives, each with the folder that it would be unpacked in. `unmatched`: patterns that no archive was found for."""

    def __init__(self, packed: Sequence[tuple[ArchiveIndex, Path | str]] = (), unmatched: Sequence[str] = ()) -> None:
        self.unmatched = tuple(unmatched)
        self._packed = tuple((index, os.fspath(folder)) for index, folder in packed)
        self._rows = pa.concat_tables([index.members for index, _ in packed]).combine_chunks() if packed else None
        self._archive_of: list[int] = []
        self._folders: dict[str, dict[str, int]] = {}
        for number in range(len(self._packed)):
            self._add(number)
        self._open: OrderedDict[str, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy in another process, with files of its own."""
        return Archives, (self._packed, self.unmatched)

    def __len__(self) -> int:
        """How many members are found."""
        return sum(map(len, self._folders.values()))

    def find(self, path: Path | str) -> Member | None:
        """The member under a path whose links are resolved, as rows and question sets have it; None where no archive has one."""
        folder, name = os.path.split(os.fspath(path))
        row = self._folders.get(folder, {}).get(name)
        if row is None or self._rows is None:
            return None
        index = self._packed[self._archive_of[row]][0]
        offset, size, id = (self._rows[column][row].as_py() for column in ("offset", "size", "id"))
        return Member(os.fspath(path), index.archive, offset, size, id.hex(), index.stamp.mtime_ns)

    def below(self, folder: Path | str) -> list[str]:
        """The paths of all members in a folder, whose links are resolved, and in those below it; sorted."""
        top = os.fspath(folder)
        inside = top.rstrip("/") + "/"
        return sorted(
            os.path.join(one, name) for one, names in self._folders.items() if one == top or one.startswith(inside) for name in names
        )

    def read(self, what: Member | Path | str, most_bytes: int) -> bytes:
        """The bytes of a member, if they are those of its id; TileError otherwise, and for one of more than so many bytes."""
        member = what if isinstance(what, Member) else self.find(what)
        if member is None:
            raise TileError(f"{what}: no archive holds this tile; correct the path in its row, or name its archive in data.archives")
        where = f"{member.path} in {member.archive}"
        if member.size > most_bytes:
            raise TileError(f"{where}: this member has {member.size} bytes, and at most {most_bytes} are read")
        try:
            data = _read_at(self._descriptor(member.archive), member.offset, member.size)
        except OSError as error:
            raise TileError(f"{where}: this archive cannot be read ({error.strerror or error}); bring it back, and start again") from error
        if hashlib.sha256(data).hexdigest() != member.id:
            raise TileError(
                f"{where}: its bytes are not those that were indexed: the archive is damaged, or was changed after the start; bring it"
                " back, or start again, which indexes a changed archive anew"
            )
        return data

    def _add(self, number: int) -> None:
        """Take in the members of an archive. A folder that is a link leads them elsewhere, as it would in unpacking."""
        index, top = self._packed[number]
        real: dict[str, str] = {}
        for name in index.members["name"].to_pylist():
            head, _, last = name.rpartition("/")
            folder = real.get(head)
            if folder is None:
                folder = real[head] = os.path.realpath(os.path.join(top, head))
            row = len(self._archive_of)
            self._archive_of.append(number)
            other = self._folders.setdefault(folder, {}).setdefault(last, row)
            if other != row:
                first = self._packed[self._archive_of[other]][0].archive
                raise DataError(
                    f"data.archives: {first} and {index.archive} both hold {os.path.join(folder, last)}; name only one of them, or give one"
                    " another unpacked_at"
                )

    def _descriptor(self, archive: str) -> _Descriptor:
        """The open file of an archive. The one unused for the longest time makes room, and is closed once no thread reads from it."""
        with self._lock:
            found = self._open.get(archive)
            if found is not None:
                self._open.move_to_end(archive)
                return found
        made = _Descriptor(os.open(archive, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        with self._lock:
            found = self._open.setdefault(archive, made)
            self._open.move_to_end(archive)
            while len(self._open) > _MOST_OPEN:
                self._open.popitem(last=False)
        return found


class _Descriptor:
    """An open file that is closed when nobody holds it any more."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self, close: Any = os.close) -> None:
        close(self.number)


def _read_at(file: _Descriptor, offset: int, size: int) -> bytes:
    """One positioned read; more only where a file system gives less than it was asked for. Shorter than asked at the end of the file."""
    data = os.pread(file.number, size, offset)
    while len(data) < size:
        more = os.pread(file.number, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data

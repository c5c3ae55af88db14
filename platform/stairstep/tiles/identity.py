"""Tile ids: SHA-256 of a tile's source bytes, the name of a tile in masks, stores, ledgers and quarantines.

`TileIds` remembers the id of each (path, size, modification time), so that an unchanged file is hashed once, also across runs and
processes where it has an index file. The index is only ever appended to, a line at a time; what cannot be read in it is hashed again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from stairstep.records.files import append_to, locked

_ID = re.compile(r"[0-9a-f]{64}")
_log = logging.getLogger(__name__)


class Stamp(NamedTuple):
    """What tells one state of a file from another without reading it."""

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """The stamp in a file's status."""
        return cls(status.st_size, status.st_mtime_ns)


def tile_id(data: bytes) -> str:
    """The id of the tile with these source bytes."""
    return hashlib.sha256(data).hexdigest()


class TileIds:
    """Known ids by (path, size, modification time), shared by threads, and by processes through `index_file`."""

    def __init__(self, index_file: Path | None = None) -> None:
        self.index_file = Path(index_file) if index_file is not None else None
        self._known: dict[str, tuple[Stamp, str]] = {}
        self._lock = threading.Lock()
        self._read_to = 0
        self._shared = self.index_file is not None
        self._read_news()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy in another process starts from the index file."""
        return TileIds, (self.index_file,)

    def __len__(self) -> int:
        """How many files are known."""
        return len(self._known)

    def get(self, path: Path, stamp: Stamp) -> str | None:
        """The id of a file in this state, if it is known; looks for what other processes have added before it says no."""
        name = os.path.abspath(path)
        found = self._known.get(name)
        if self._shared and (found is None or found[0] != stamp):
            with self._lock:
                self._read_news()
            found = self._known.get(name)
        return found[1] if found is not None and found[0] == stamp else None

    def put(self, path: Path, stamp: Stamp, id: str) -> None:
        """Remember the id of a file in this state."""
        self.put_all([(path, stamp, id)])

    def put_all(self, files: Iterable[tuple[Path, Stamp, str]]) -> None:
        """Remember the ids of files in these states, the index file opened once."""
        named = [(os.path.abspath(path), stamp, id) for path, stamp, id in files]
        with self._lock:
            self._known.update((name, (stamp, id)) for name, stamp, id in named)
            if self.index_file is None or not self._shared or not named:
                return
            try:
                self.index_file.parent.mkdir(parents=True, exist_ok=True)
                with locked(self.index_file) as descriptor:
                    for name, stamp, id in named:
                        append_to(descriptor, json.dumps({"path": name, "size": stamp.size, "mtime_ns": stamp.mtime_ns, "id": id}))
            except OSError as error:
                self._give_up(error)

    def _read_news(self) -> None:
        """Take in the whole lines that were appended since the last look; a torn one is left for when it is whole, or mended away."""
        if self.index_file is None or not self._shared:
            return
        try:
            size = self.index_file.stat().st_size
            if size < self._read_to:
                self._read_to = 0
            if size == self._read_to:
                return
            with open(self.index_file, "rb") as file:
                file.seek(self._read_to)
                data = file.read()
        except FileNotFoundError:
            return
        except OSError as error:
            self._give_up(error)
            return
        end = data.rfind(b"\n") + 1
        self._read_to += end
        for line in data[:end].splitlines():
            entry = _parse(line)
            if entry is not None:
                self._known[entry[0]] = entry[1:]

    def _give_up(self, error: OSError) -> None:
        """Go on without the index file: it only saves work, and ids are no less right without it."""
        self._shared = False
        _log.warning("%s: tile ids cannot be kept there (%s); files will be hashed again by the next run", self.index_file, error)


def _parse(line: bytes) -> tuple[str, Stamp, str] | None:
    """The entry on a line of an index, or None where it is damaged: the file is then hashed again."""
    try:
        entry = json.loads(line)
        path, size, mtime_ns, id = entry["path"], entry["size"], entry["mtime_ns"], entry["id"]
    except (ValueError, KeyError, TypeError):
        return None
    sound = type(path) is str and type(size) is int and type(mtime_ns) is int and type(id) is str and _ID.fullmatch(id)
    return (path, Stamp(size, mtime_ns), id) if sound else None

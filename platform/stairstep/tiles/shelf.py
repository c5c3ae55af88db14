"""A tile store where it lies: a folder, or an object store, which is written by its verbs and read through a copy on this machine.

Objects cannot be renamed or mapped. A shard is put whole under its own name, which is a digest of its ids, and counts only once a manifest
names it, which is put last; nothing that is there is ever replaced by something else. A reader copies the shards that the manifests name
into the cache of its machine, compares every tile's checksum once, and maps the copies.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from stairstep.records.cache import cache_folder, cache_limit, copy_folder, make_room
from stairstep.records.files import locked, write_atomically
from stairstep.records.folders import sweep
from stairstep.records.places import ObjectFolder
from stairstep.settings import DataError, InputError, StairstepError

from . import store as files
from .store import Shard, TileStore, TornError

_log = logging.getLogger(__name__)
_PATIENCE = 20  # how often manifests are read again because one of them was replaced meanwhile


class Shelf(Protocol):
    """The pixels of one `tile_key`, for whoever fills a store."""

    @property
    def where(self) -> Path | ObjectFolder:
        """The folder."""

    def prepare(self) -> None:
        """Make it ready, or refuse a place that cannot be one; put away what dead writers left."""

    def names(self) -> list[str]:
        """The files of shards, named by a manifest or not."""

    def whole(self) -> list[Shard]:
        """Every whole shard, named by a manifest or not; torn ones are removed."""

    def ids(self, shards: Iterable[Shard]) -> set[str]:
        """The tiles in some shards."""

    def write(self, tiles: Iterable[tuple[str, torch.Tensor]]) -> Shard | None:
        """Write tiles as one shard, whole or not at all; None if there are none."""

    def commit(self, shards: Sequence[Shard]) -> None:
        """Name shards as whole, for readers to see; the last write of a job."""

    def get(self, name: str) -> bytes | None:
        """A small file beside the shards."""

    def put(self, name: str, data: bytes | str) -> None:
        """Replace a small file beside the shards."""


def shelf_at(place: Path | ObjectFolder, key: str) -> Shelf:
    """The shelf of a key in a store."""
    return ObjectShelf(place, key) if isinstance(place, ObjectFolder) else FolderShelf(place, key)


def open_store_at(place: Path | ObjectFolder, key: str) -> TileStore | None:
    """The store's pixels of this key, by a copy of them where it is remote; None where there are none."""
    return CopiedStore.of(place, key) if isinstance(place, ObjectFolder) else files.open_store(place, key)


class FolderShelf:
    """A shelf on a file system, which store.py writes."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder / key, key

    @property
    def where(self) -> Path:
        return self.folder

    def prepare(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"tiles.store: {error.filename}: expected a folder for the store, found a file; name another") from None
        for line in sweep(self.folder):
            _log.info("%s: %s", self.folder, line)

    def names(self) -> list[str]:
        return [path.name for path in self.folder.glob("shard-*.arrow")]

    def whole(self) -> list[Shard]:
        return files.whole_shards(self.folder, self.key)

    def ids(self, shards: Iterable[Shard]) -> set[str]:
        return files.ids_of(self.folder, self.key, shards)

    def write(self, tiles: Iterable[tuple[str, torch.Tensor]]) -> Shard | None:
        return files.write_shard(self.folder, self.key, tiles)

    def commit(self, shards: Sequence[Shard]) -> None:
        if shards or any(self.folder.glob("manifest-*.json")):
            files.write_manifest(self.folder, self.key, shards)
        sweep(self.folder)

    def get(self, name: str) -> bytes | None:
        path = self.folder / name
        return path.read_bytes() if path.exists() else None

    def put(self, name: str, data: bytes | str) -> None:
        write_atomically(self.folder / name, data)


class ObjectShelf:
    """A shelf in an object store; a plain value, which any machine may be sent."""

    def __init__(self, store: ObjectFolder, key: str) -> None:
        self.store, self.key = store / key, key

    @property
    def where(self) -> ObjectFolder:
        return self.store

    def prepare(self) -> None:
        self.store.folders()

    def names(self) -> list[str]:
        return [name for name in self.store.files(deep=False) if files.NAME.fullmatch(name)]

    def whole(self) -> list[Shard]:
        found = []
        for name, stored in self.store.files(deep=False).items():
            if not files.NAME.fullmatch(name):
                continue
            try:
                ids = self._ids(name)
                if files.shard_name(ids) != name:
                    raise TornError(f"{self.store.where(name)}: this shard does not hold the tiles that its name says")
                found.append(Shard(name, len(ids), stored.size))
            except TornError as error:
                _log.warning("%s. It is removed now, and its tiles are made again", error)
                self.store.remove([name])
            except FileNotFoundError:
                continue  # another job removed it
        return found

    def ids(self, shards: Iterable[Shard]) -> set[str]:
        return {one for shard in shards for one in self._ids(shard.file)}

    def _ids(self, name: str) -> list[str]:
        """The ids in a shard; of a large one little more than these is read."""
        with self.store.opened(name) as file:
            return [one.hex() for one in files.ids_in(file, self.key, self.store.where(name))]

    def write(self, tiles: Iterable[tuple[str, torch.Tensor]]) -> Shard | None:
        place = cache_folder() / "being-written"
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place) as folder:
            shard = files.write_shard(Path(folder), self.key, tiles)
            if shard is not None and not self.store.exists(shard.file):
                self.store.put_file(shard.file, Path(folder, shard.file))
        return shard

    def commit(self, shards: Sequence[Shard]) -> None:
        manifests = self._manifests()
        if not shards and not manifests:
            return
        name, value = files.manifest_of(self.key, shards)
        self.store.put(name, json.dumps(value, indent=2) + "\n")
        there = set(self.names())
        old = [one for one, named in manifests.items() if one != name and not any(more.file in there for more in named - set(shards))]
        self.store.remove(old)

    def named(self) -> set[Shard]:
        """The shards that the manifests name."""
        return set().union(*self._manifests().values())

    def _manifests(self) -> dict[str, set[Shard]]:
        for _ in range(_PATIENCE):
            names = [name for name in self.store.files(deep=False) if name.startswith("manifest-") and name.endswith(".json")]
            texts = {name: self.store.get(name) for name in names}
            if all(text is not None for text in texts.values()):
                return {name: files.named_in(self.store.where(name), text or b"") for name, text in texts.items()}
            _log.info("%s: a manifest was replaced while it was read; reading again", self.store)
        raise DataError(f"{self.store}: its manifests cannot be read")

    def get(self, name: str) -> bytes | None:
        return self.store.get(name)

    def put(self, name: str, data: bytes | str) -> None:
        self.store.put(name, data)


class CopiedStore(TileStore):
    """The copy of a remote store on this machine; in another process, on whatever machine, it is that one's copy."""

    def __init__(self, store: ObjectFolder, key: str, copy: Path) -> None:
        self._store = store
        super().__init__(copy, key)

    @classmethod
    def of(cls, store: ObjectFolder, key: str) -> CopiedStore | None:
        """The copy, brought up to date with the manifests; None where there are no pixels of this key."""
        shelf = ObjectShelf(store, key)
        named = shelf.named()
        if not named:
            others = [one for one in store.folders() if one != key]
            if others:
                told = "%s: this tile store has no pixels of the kind %s, only of %s; tiles are decoded from files until it is filled"
                _log.warning(told, store, key, ", ".join(others))
            return None
        copy = copy_folder("tiles", store / key)
        with locked(copy / ".lock"):  # the workers of a machine share one copy
            _bring(shelf, sorted(named, key=lambda one: one.file), copy / key)
        return cls(store, key, copy)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy in another process asks the store itself."""
        return CopiedStore.of, (self._store, self.key)


def _bring(shelf: ObjectShelf, named: Sequence[Shard], folder: Path) -> None:
    """Copy the shards that are not here yet, as many as the cache may hold, and name them; others go."""
    folder.mkdir(exist_ok=True)
    sweep(folder)
    limit, held = cache_limit(), 0
    make_room(folder.parent, min(limit, sum(one.bytes for one in named)), limit)
    kept: list[Shard] = []
    for shard in named:
        path = folder / shard.file
        if held + shard.bytes > limit:
            continue
        if not (path.exists() and path.stat().st_size == shard.bytes) and not _fetched(shelf, shard, path):
            continue
        held += shard.bytes
        kept.append(shard)
    left = len(named) - len(kept)
    if left:
        room = "STAIRSTEP_CACHE_GB says how much room there is for them"
        _log.warning(
            "%s: %d of %d shards are not copied here (%s); tiles in them are decoded from files", shelf.store, left, len(named), room
        )
    for path in folder.glob("shard-*.arrow"):
        if path.name not in {one.file for one in kept}:
            path.unlink(missing_ok=True)
    files.write_manifest(folder, shelf.key, kept)


def _fetched(shelf: ObjectShelf, shard: Shard, path: Path) -> bool:
    """Copy a shard and compare all of its checksums; one that does not come right twice is told and left."""
    for _ in range(2):
        try:
            shelf.store.get_file(shard.file, path)
            files.check_shard(path, shelf.key)
            return True
        except FileNotFoundError as error:
            _log.warning("%s: this shard is gone, though a manifest names it (%s)", shelf.store.where(shard.file), error)
            return False
        except TornError as error:
            path.unlink(missing_ok=True)
            _log.warning("%s, in the copy of %s", error, shelf.store.where(shard.file))
        except StairstepError as error:
            _log.warning("%s", error)
            return False
    return False

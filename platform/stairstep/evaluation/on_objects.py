"""The answer ledger and the kept embeddings in an object store: the same entries and shards, by the same names, as objects.

Both are immutable and named by their content, so that nothing has to be locked to read or to write them. What a file system gives the
ledger besides is missing here: Arrow has no conditional put, so no lease can be held, and two processes that want the same key in the
same moment may both ask for it. Threads of one process ask once as ever; who comes to keep a value takes one that was kept meanwhile.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from stairstep.records.places import ObjectFolder
from stairstep.settings import StairstepError

from .embeddings import MARK, NAME_LENGTH, SUFFIX, EmbeddingStore
from .ledger import Damaged, Entry, Identity, Ledger, Request

_log = logging.getLogger(__name__)
_ITS_OWN: Identity = (-1,)  # what an entry that this process has put is never compared equal to


def open_ledger(folder: Path | ObjectFolder, fresh: bool = False) -> Ledger:
    """The ledger of a place."""
    return ObjectLedger(folder, fresh) if isinstance(folder, ObjectFolder) else Ledger(folder, fresh)


def open_embeddings(folder: Path | ObjectFolder, keep_states: int) -> EmbeddingStore:
    """The kept embeddings of a place."""
    if not isinstance(folder, ObjectFolder):
        return EmbeddingStore(folder, keep_states)
    folder.folders()  # a store that refuses is told now, and not after the first evaluation
    return ObjectEmbeddings(folder, keep_states)


class ObjectLedger(Ledger):
    """A ledger whose entries are objects."""

    def __init__(self, store: ObjectFolder, fresh: bool = False) -> None:
        self.store = store
        super().__init__(Path(), fresh)  # an entry's path is its object's name

    def _open(self, lease_s: float) -> None:
        self.store.folders()  # a store that refuses is told now, and not after a thousand questions

    def _ask_alone(self, request: Request, ask: Callable[[], dict[str, Any]], waited: bool) -> Entry:
        with self._guard:
            self.asked[request.kind] += 1
            self.waited[request.kind] += waited
        return Entry(self._commit(request, request.text(ask())), hit=False)

    def _read(self, request: Request) -> tuple[dict[str, Any] | None, Identity | None]:
        name = request.path.as_posix()
        try:
            text = self.store.get(name)
        except (StairstepError, OSError) as error:
            self._tell("read", "%s; an entry that cannot be read is asked for again", error)
            return None, None
        if text is None:
            return None, None
        identity = tuple(hashlib.sha256(text).digest())
        try:
            return request.value(text), identity
        except Damaged as why:
            message = "%s: this entry counts as absent and is asked for again: %s"
            self._tell(request.digest, message, self.store.where(name), why)
            return None, identity

    def _commit(self, request: Request, text: bytes) -> dict[str, Any]:
        there = self._accepted(request)
        if there is not None and not request.stale(there):
            return there
        try:
            self.store.put(request.path.as_posix(), text)
        except (StairstepError, OSError) as error:
            self._tell("commit", "%s; entries cannot be kept, and will be asked for again", error)
        else:
            with self._guard:
                self._ignored[request.digest] = _ITS_OWN
        return request.value(text)


class ObjectEmbeddings(EmbeddingStore):
    """Kept embeddings whose shards are objects. Losing the store costs time and nothing else."""

    def __init__(self, store: ObjectFolder, keep_states: int) -> None:
        super().__init__(Path(), keep_states)  # a shard's path is its object's name
        self.store = store

    def prune(self) -> None:
        """Remove the states unused for longest, down to `keep_states`."""
        with self._told("the states unused for longest stay"):
            states: dict[str, list[str]] = {}
            used: dict[str, int] = {}
            for name, stored in self.store.files().items():
                state, _, file = name.partition("/")
                if len(state) == NAME_LENGTH:
                    states.setdefault(state, []).append(name)
                    used[state] = stored.time_ns if file == MARK else used.get(state, stored.time_ns)
            for state in sorted(states, key=lambda one: used[one])[: -self.keep_states]:
                self.store.remove(states[state])

    def _keep(self, path: Path, state: str, data: bytes) -> None:
        with self._told("the next evaluation computes these embeddings again"):
            self._touch(state)
            self.store.put(path.as_posix(), data)

    def _touch(self, state: str) -> None:
        with self._told("when this state was last used is not kept"):
            self.store.put((self._state_folder(state) / MARK).as_posix(), b"")

    def _shards(self, state: str) -> list[Path]:
        folder = self._state_folder(state)
        with self._told("kept embeddings are computed again"):
            return [folder / name for name in (self.store / folder.as_posix()).files(deep=False) if name.endswith(SUFFIX)]
        return []

    def _data(self, path: Path, places: Mapping[bytes, list[int]]) -> bytes | None:
        with self._told("kept embeddings are computed again"):
            return self.store.get(path.as_posix())
        return None

    def _reject(self, path: Path, why: str) -> None:
        where = self.store.where(path.as_posix())
        _log.warning("%s: kept embeddings are damaged (%s); the object is removed and they are computed again", where, why)
        with self._told("it stays, and is told again"):
            self.store.remove([path.as_posix()])

    @contextlib.contextmanager
    def _told(self, cost: str) -> Iterator[None]:
        """A store that fails makes an evaluation slower; it is no reason to lose it."""
        try:
            yield
        except (StairstepError, OSError) as error:
            _log.warning("%s; %s", error, cost)

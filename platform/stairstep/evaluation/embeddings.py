"""Embeddings that an encoder state has made, kept by content, so that no evaluation of the same state computes them again.

Layout: `<folder>/<digest of the state>/<digest of the shard>.safetensors`, each shard holding `keys` uint8 [n, 32]
and `vectors` float32 [n, d]. A key is the digest of everything about the input (tile id and geometry, or role and text); the state
stands for everything about the encoder. A shard is immutable, named and checked by its own content, and appears by rename: any number
of processes may read and write one folder, none sees half a shard, and two that write the same thing write the same file.

A shard whose content does not match its name is told, removed and computed again; it never gives a vector. Disk is bounded by
`keep_states`: past it the states that were unused for longest are removed (one state of 7,426 tiles in 2,048 dimensions is 61 MB).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from stairstep.records.files import write_atomically
from stairstep.records.folders import sweep

_log = logging.getLogger(__name__)
_FORMAT = b"stairstep-embeddings-1"
_KEY_BYTES = 32
SUFFIX = ".safetensors"
NAME_LENGTH = 32  # characters of a state folder's name
MARK = "last_used"  # its time says when the state was last used

Vectors = npt.NDArray[np.float32]


def tile_embedding_key(tile_id: str, pixels: str) -> bytes:
    """The key of a tile; `pixels` names all that its pixels depend on besides its bytes (the reader's key)."""
    return _digest(b"tile", tile_id.encode(), pixels.encode())


def text_embedding_key(text: str, role: str) -> bytes:
    """The key of a text in the role of a query or a document."""
    return _digest(b"text", role.encode(), text.encode("utf-8", "surrogatepass"))


class EmbeddingStore:
    """A folder of embeddings by encoder state. Losing the folder, or any file in it, costs time and nothing else."""

    def __init__(self, folder: Path, keep_states: int) -> None:
        if keep_states < 1:
            raise ValueError(f"keep_states {keep_states}: expected at least 1")
        self.folder = folder
        self.keep_states = keep_states

    def find(self, state: str, keys: Sequence[bytes], dimension: int) -> tuple[Vectors, npt.NDArray[np.bool_]]:
        """Vectors [n, d] for the keys and which of them [n] were found; the others are zero."""
        vectors = np.zeros((len(keys), dimension), dtype=np.float32)
        found = np.zeros(len(keys), dtype=np.bool_)
        places: dict[bytes, list[int]] = {}
        for place, key in enumerate(keys):
            places.setdefault(key, []).append(place)
        self._touch(state)
        for path in self._shards(state):
            if not places:
                break
            for key, vector in self._wanted(path, state, places, dimension):
                where = places.pop(key)
                vectors[where] = vector
                found[where] = True
        return vectors, found

    def add(self, state: str, keys: Sequence[bytes], vectors: Vectors) -> None:
        """Keep new vectors [n, d] of a state as one shard; it is there for every process once this returns."""
        if len(keys) != len(vectors) or vectors.dtype != np.float32 or any(len(key) != _KEY_BYTES for key in keys):
            raise ValueError(f"{len(keys)} keys for {vectors.shape} {vectors.dtype} vectors: expected one 32-byte key each, float32")
        if not len(keys):
            return
        table = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(len(keys), _KEY_BYTES)
        values = np.ascontiguousarray(vectors)
        path = self._state_folder(state) / f"{_shard_name(state, table, values)}{SUFFIX}"
        self._keep(path, state, save_tensors({"keys": table, "vectors": values}))
        self.prune()

    def _keep(self, path: Path, state: str, data: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._touch(state)
            sweep(path.parent)
            # A power cut may spoil the file: its content is checked when read, so nobody has to wait for the disk here.
            write_atomically(path, data, durable=False)
        except OSError as error:
            # A full or read-only disk makes the next evaluation slower; it is no reason to lose this one.
            _log.warning("%s: embeddings could not be kept (%s); the next evaluation computes them again", path, error)

    def prune(self) -> None:
        """Remove the states unused for longest, down to `keep_states`. A process that still writes to one merely starts it anew."""
        used = []
        for folder in (self.folder / name for name in _names(self.folder) if len(name) == NAME_LENGTH):
            with contextlib.suppress(FileNotFoundError):  # another process removes it now
                mark = folder / MARK
                used.append(((mark if mark.exists() else folder).stat().st_mtime_ns, folder))
        for _, folder in sorted(used)[: -self.keep_states]:
            shutil.rmtree(folder, ignore_errors=True)

    def _state_folder(self, state: str) -> Path:
        # The digest of the digest: a state's name may be of any length and alphabet, a folder's may not.
        return self.folder / hashlib.sha256(state.encode()).hexdigest()[:NAME_LENGTH]

    def _touch(self, state: str) -> None:
        folder = self._state_folder(state)
        with contextlib.suppress(OSError):  # nothing kept yet, pruned just now, or read-only: then there is nothing to mark
            (folder / MARK).touch()

    def _shards(self, state: str) -> list[Path]:
        folder = self._state_folder(state)
        return [folder / name for name in _names(folder) if name.endswith(SUFFIX)]

    def _wanted(
        self, path: Path, state: str, places: dict[bytes, list[int]], dimension: int
    ) -> Iterator[tuple[bytes, npt.NDArray[np.float32]]]:
        """The vectors of one shard that are wanted; the whole shard is read and checked only when it holds one."""
        try:
            data = self._data(path, places)
            if data is None:
                return
            tensors = load_tensors(data)
            keys, vectors = tensors["keys"], tensors["vectors"]
            sound = _shard_name(state, keys, vectors) == path.stem
        except FileNotFoundError:
            return  # pruned by another process: computed again
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            self._reject(path, str(error))
            return
        except OSError as error:
            _log.warning("%s: kept embeddings could not be read (%s); they are computed again", path, error)
            return
        if not sound or keys.shape != (len(vectors), _KEY_BYTES) or vectors.shape[1:] != (dimension,):
            self._reject(path, "its content is not what was written")
            return
        for key, vector in zip(keys, vectors, strict=True):
            if key.tobytes() in places:
                yield key.tobytes(), vector

    def _data(self, path: Path, places: Mapping[bytes, list[int]]) -> bytes | None:
        """The bytes of a shard that holds any of the keys."""
        with safe_open(path, framework="numpy") as shard:
            keys = shard.get_tensor("keys")
        return path.read_bytes() if any(key.tobytes() in places for key in keys) else None

    def _reject(self, path: Path, why: str) -> None:
        _log.warning("%s: kept embeddings are damaged (%s); the file is removed and they are computed again", path, why)
        path.unlink(missing_ok=True)


def _names(folder: Path) -> list[str]:
    """What a folder holds, sorted; nothing where it is not there, or not any more."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _shard_name(state: str, keys: npt.NDArray[np.uint8], vectors: Vectors) -> str:
    shape = repr((keys.shape, str(keys.dtype), vectors.shape, str(vectors.dtype)))
    return _digest(_FORMAT, state.encode(), shape.encode(), keys.tobytes(), vectors.tobytes()).hex()


def _digest(*parts: bytes) -> bytes:
    """SHA-256 of the parts and their lengths, so that no two lists of parts read alike."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.digest()

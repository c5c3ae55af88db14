"""The tile store: resized pixels kept by tile id, so that a tile is decoded once for all runs, all epochs and all evaluations.

A store is a folder with one subfolder for each `tile_key` (geometry, resampler, versions of what decodes): pixels of another kind are
never found by mistake. In it lie shards, Arrow IPC files of a few hundred tiles each, and manifests that name them. A shard is written
under a hidden name, synced and renamed, and its name is a digest of the ids in it: two writers of the same tiles write the same file.
A manifest is written last, each job its own, so that no writer ever replaces what another one said. Readers see only shards that a
manifest names; whatever else lies there is a killed writer's, and the next job takes in what of it is whole.

Pixels are channel-first uint8, red and blue less green (grey text then differs in one plane alone), under LZ4 where that takes a fifth
of the bytes or less, else under zstd, which takes longer to unpack: `bench/tiles.py` has the choice in figures.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from stairstep.records.files import digest_of_json, parse_temporary, process_is_alive, sync_folder, temporary_name, write_json
from stairstep.records.files import host_name as this_host
from stairstep.settings import DataError, StairstepError, TileError

FORMAT = 1
CODECS = ("lz4_raw", "zstd:3")  # a row has the place of its own
_ENOUGH = 5  # LZ4 is small enough where it takes at most this part of the bytes: a fortieth of the processor's float32 values
_ROWS_PER_BATCH = 32  # what a writer holds in memory before it writes
_SCHEMA = pa.schema(
    [("id", pa.binary(32)), ("height", pa.int32()), ("width", pa.int32()), ("codec", pa.int8()), ("pixels", pa.large_binary())]
)
_NAME = re.compile(r"shard-[0-9a-f]{32}\.arrow")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """A whole shard: its file name, how many tiles it holds, and its size."""

    file: str
    tiles: int
    bytes: int


class TileStore:
    """The pixels of one `tile_key` in a store folder, as its manifests name them. Safe from many threads; a copy in another process
    opens the files anew."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = Path(folder), key
        self._tables: list[pa.RecordBatch] = []
        self._place: dict[bytes, tuple[int, int]] = {}
        for shard in sorted(named_shards(self.folder / key), key=lambda one: one.file):
            for batch in _open(self.folder / key / shard.file, key):
                for row, one in enumerate(batch.column("id").to_pylist()):
                    self._place.setdefault(one, (len(self._tables), row))
                self._tables.append(batch)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy in another process maps the files itself."""
        return TileStore, (self.folder, self.key)

    def __len__(self) -> int:
        """How many tiles there are."""
        return len(self._place)

    def __contains__(self, id: object) -> bool:
        """Whether a tile is there."""
        return isinstance(id, str) and bytes.fromhex(id) in self._place

    def size(self, id: str) -> tuple[int, int]:
        """Height and width of a tile's resized pixels."""
        batch, row = self._row(id)
        return batch.column("height")[row].as_py(), batch.column("width")[row].as_py()

    def stored_bytes(self, id: str) -> int:
        """How many bytes a tile takes in its shard."""
        batch, row = self._row(id)
        return len(batch.column("pixels")[row].as_buffer())

    def pixels(self, id: str, pinned: bool = False) -> torch.Tensor:
        """A tile's resized pixels, contiguous uint8 [3, h, w]; `pinned`: in memory from which a GPU fetches them by itself."""
        height, width = self.size(id)
        batch, row = self._row(id)
        try:
            codec = _codec(CODECS[batch.column("codec")[row].as_py()])
            plain = codec.decompress(batch.column("pixels")[row].as_buffer(), 3 * height * width)
        except (OSError, IndexError) as error:
            raise TileError(
                f"{self.folder / self.key}: the pixels of tile {id} are damaged ({error}); delete this folder and run jobs.preprocess again"
            ) from error
        planes = np.frombuffer(plain, dtype=np.uint8).reshape(3, height, width)
        planes[0] += planes[1]
        planes[2] += planes[1]
        found = torch.from_numpy(planes)
        return found.pin_memory() if pinned else found

    def _row(self, id: str) -> tuple[pa.RecordBatch, int]:
        table, row = self._place[bytes.fromhex(id)]
        return self._tables[table], row


def open_store(folder: Path, key: str) -> TileStore | None:
    """The store's pixels of this key; None where there are none. Pixels of other keys alone are told: they were made for other settings."""
    folder = Path(folder)
    if any((folder / key).glob("manifest-*.json")):
        return TileStore(folder, key)
    others = sorted(one.parent.name for one in folder.glob("*/manifest-*.json"))
    if others:
        _log.warning(
            "%s: this tile store has no pixels of the kind %s, only of %s; tiles are decoded from files until jobs.preprocess fills it",
            folder,
            key,
            ", ".join(dict.fromkeys(others)),
        )
    return None


def named_shards(folder: Path) -> set[Shard]:
    """The shards that the manifests of a key's folder name."""
    while True:
        manifests = list(folder.glob("manifest-*.json"))
        try:
            return set().union(*(_named_by(path) for path in manifests))
        except FileNotFoundError:
            _log.info("%s: a manifest was replaced while it was read; reading again", folder)


def _named_by(path: Path) -> set[Shard]:
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["format"] != FORMAT:
            raise DataError(f"{path}: this manifest has format {manifest['format']}, and this version reads {FORMAT}")
        shards = {Shard(**one) for one in manifest["shards"]}
        if not all(_NAME.fullmatch(one.file) for one in shards):
            raise KeyError("the name of a shard")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: this is no manifest of a tile store ({error}); delete it and run jobs.preprocess again") from None
    return shards


def whole_shards(folder: Path, key: str) -> list[Shard]:
    """Every whole shard of a key's folder, named by a manifest or not: what a job need not make again. Damaged files are removed."""
    found = []
    for path in sorted(folder.glob("shard-*.arrow")):
        try:
            found.append(Shard(path.name, sum(batch.num_rows for batch in _open(path, key)), path.stat().st_size))
        except StairstepError as error:
            _log.warning("%s. It is removed now, and its tiles are made again", error)
            path.unlink(missing_ok=True)
    return found


def ids_of(folder: Path, key: str, shards: Iterable[Shard]) -> set[str]:
    """The ids of the tiles in some shards."""
    return {one.hex() for shard in shards for batch in _open(folder / shard.file, key) for one in batch.column("id").to_pylist()}


def shard_name(ids: Collection[str]) -> str:
    """The name of the shard that holds exactly these tiles."""
    return f"shard-{hashlib.sha256(''.join(sorted(ids)).encode()).hexdigest()[:32]}.arrow"


def write_shard(folder: Path, key: str, tiles: Iterable[tuple[str, torch.Tensor]]) -> Shard | None:
    """Write tiles (id, uint8 [3, h, w]) as one shard, whole or not at all; None if there are none."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(folder / "shard")
    ids: list[str] = []
    try:
        schema = _SCHEMA.with_metadata({"key": key, "format": str(FORMAT), "codecs": ",".join(CODECS)})
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for rows in _grouped(tiles, _ROWS_PER_BATCH):
                ids += [one for one, _ in rows]
                writer.write_batch(_batch(rows, schema))
        if not ids:
            return None
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
        path = folder / shard_name(ids)
        os.replace(temporary, path)
        sync_folder(folder)
    finally:
        temporary.unlink(missing_ok=True)
    return Shard(path.name, len(ids), size)


def write_manifest(folder: Path, key: str, shards: Sequence[Shard]) -> Path:
    """Name shards as whole, for readers to see; the last write of a job. The same shards are the same manifest.

    Manifests that say nothing more than this one, or name a shard that is gone, are removed afterwards.
    """
    named = [asdict(one) for one in sorted(shards, key=lambda one: one.file)]
    value = {"format": FORMAT, "key": key, "codecs": CODECS, "tiles": sum(one.tiles for one in shards), "shards": named}
    path = folder / f"manifest-{digest_of_json(named)[:16]}.json"
    write_json(path, value)
    for other in folder.glob("manifest-*.json"):
        try:
            more = _named_by(other) - set(shards)
            if other != path and all(not (folder / one.file).exists() for one in more):
                other.unlink(missing_ok=True)
        except FileNotFoundError:
            continue  # another job removed it
    return path


def sweep(folder: Path) -> int:
    """Remove what writers of this machine that are no longer alive left half-written; how many files that were."""
    gone = 0
    for path in folder.glob(".shard.tmp-*"):
        found = parse_temporary(path.name)
        if found is not None and found.host == this_host() and not process_is_alive(found.pid):
            path.unlink(missing_ok=True)
            gone += 1
    return gone


def _batch(rows: Sequence[tuple[str, torch.Tensor]], schema: pa.Schema) -> pa.RecordBatch:
    packed = [_packed(pixels.numpy()) for _, pixels in rows]
    columns = [
        pa.array([bytes.fromhex(one) for one, _ in rows], pa.binary(32)),
        pa.array(np.array([pixels.shape[1] for _, pixels in rows], dtype=np.int32)),
        pa.array(np.array([pixels.shape[2] for _, pixels in rows], dtype=np.int32)),
        pa.array(np.array([codec for codec, _ in packed], dtype=np.int8)),
        pa.array([data for _, data in packed], pa.large_binary()),
    ]
    return pa.record_batch(columns, schema=schema)


def _open(path: Path, key: str) -> list[pa.RecordBatch]:
    """The batches of a shard, mapped and not read; a DataError says why a file is none."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        named = (reader.schema.metadata or {}).get(b"key", b"").decode()
        if not reader.schema.equals(_SCHEMA) or named != key:
            raise DataError(f"{path}: this is no shard of the tiles {key}; delete it and run jobs.preprocess again")
        return [reader.get_batch(number) for number in range(reader.num_record_batches)]
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: this shard of the tile store cannot be read ({error}); delete it and run jobs.preprocess again") from None


def _packed(pixels: np.ndarray) -> tuple[int, bytes]:
    """The place of the codec, and the compressed pixels."""
    planes = pixels.copy()
    planes[0] -= planes[1]
    planes[2] -= planes[1]
    quick: bytes = _codec(CODECS[0]).compress(planes, asbytes=True)
    if len(quick) * _ENOUGH <= planes.nbytes:
        return 0, quick
    return 1, _codec(CODECS[1]).compress(planes, asbytes=True)


def _codec(name: str) -> pa.Codec:
    kind, _, level = name.partition(":")
    return pa.Codec(kind, compression_level=int(level) if level else None)


def _grouped(tiles: Iterable[tuple[str, torch.Tensor]], size: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
    group: list[tuple[str, torch.Tensor]] = []
    for tile in tiles:
        group.append(tile)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group

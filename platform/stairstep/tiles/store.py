"""The tile store: resized pixels kept by tile id, so that a tile is decoded once for all runs, all epochs and all evaluations.

A store is a folder with one subfolder for each `tile_key` (geometry, resampler, versions of what decodes): pixels of another kind are
never found by mistake. In it lie shards, Arrow IPC files of a few hundred tiles each, and manifests that name them. A shard is written
under a hidden name, synced and renamed, and its name is a digest of the ids in it: two writers of the same tiles write the same file.
A manifest is written last, each job its own, so that no writer ever replaces what another one said. Readers see only shards that a
manifest names; whatever else lies there is a killed writer's, and the next job takes in what of it is whole. A tile's packed pixels have a
checksum, which every reading compares.

Pixels are channel-first uint8, red and blue less green (grey text then differs in one plane alone), under LZ4 where that takes a fifth
of the bytes or less, else under zstd, which takes longer to unpack: `bench/tiles.py` has the choice in figures.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from stairstep.records.files import digest_of_json, sync_folder, temporary_name, write_json
from stairstep.settings import DataError, StairstepError, TileError

FORMAT = 1
CODECS = ("lz4_raw", "zstd:3")  # a row has the place of its own
_ENOUGH = 5  # LZ4 is small enough where it takes at most this part of the bytes: a fortieth of the processor's float32 values
_ROWS_PER_BATCH = 32  # compressed tiles that a writer holds in memory before it writes
_PATIENCE = 20  # how often manifests are read again because one of them was replaced meanwhile
_SCHEMA = pa.schema(
    [
        ("id", pa.binary(32)),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("codec", pa.int8()),
        ("check", pa.uint64()),
        ("pixels", pa.large_binary()),
    ]
)
NAME = re.compile(r"shard-[0-9a-f]{32}\.arrow")
_log = logging.getLogger(__name__)


class TornError(DataError):
    """A shard that is not whole: a disk's fault, since it was written under another name and renamed."""


@dataclass(frozen=True)
class Shard:
    """A whole shard: its file name, how many tiles it holds, and its size."""

    file: str
    tiles: int
    bytes: int


class TileStore:
    """The pixels of one `tile_key` in a store folder, as its manifests name them. Safe from many threads; a copy in another process
    opens the files anew.

    A shard that is gone or cannot be read is told and passed over: what it held is decoded again, with equal pixels.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = Path(folder), key
        self._tables: list[tuple[pa.RecordBatch, str]] = []
        self._place: dict[bytes, tuple[int, int]] = {}
        for shard in sorted(named_shards(self.folder / key), key=lambda one: one.file):
            try:
                batches = _open(self.folder / key / shard.file, key)
            except StairstepError as error:
                _log.warning("%s; its tiles are decoded from their files", error)
                continue
            for batch in batches:
                for row, one in enumerate(batch.column("id").to_pylist()):
                    self._place.setdefault(one, (len(self._tables), row))
                self._tables.append((batch, shard.file))

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
        batch, row, _ = self._row(id)
        return batch.column("height")[row].as_py(), batch.column("width")[row].as_py()

    def stored_bytes(self, id: str) -> int:
        """How many bytes a tile takes in its shard."""
        batch, row, _ = self._row(id)
        return len(batch.column("pixels")[row].as_buffer())

    def pixels(self, id: str, pinned: bool = False) -> torch.Tensor:
        """A tile's resized pixels, contiguous uint8 [3, h, w]; `pinned`: in memory from which a GPU fetches them by itself."""
        batch, row, file = self._row(id)
        height, width = self.size(id)
        packed = batch.column("pixels")[row].as_buffer()
        try:
            if checksum(packed) != batch.column("check")[row].as_py():
                raise OSError("they are not what was written")
            plain = _codec(CODECS[batch.column("codec")[row].as_py()]).decompress(packed, 3 * height * width)
        except (OSError, IndexError) as error:
            raise TileError(
                f"{self.folder / self.key / file}: the pixels of tile {id} are damaged ({error}); delete this file, and jobs.preprocess"
                " makes its tiles again"
            ) from error
        planes = np.frombuffer(plain, dtype=np.uint8).reshape(3, height, width)
        found = torch.empty(3, height, width, dtype=torch.uint8, pin_memory=True) if pinned else torch.from_numpy(planes)
        out = found.numpy()
        np.add(planes[0], planes[1], out=out[0])
        np.add(planes[2], planes[1], out=out[2])
        if pinned:
            out[1] = planes[1]
        return found

    def _row(self, id: str) -> tuple[pa.RecordBatch, int, str]:
        table, row = self._place[bytes.fromhex(id)]
        batch, file = self._tables[table]
        return batch, row, file


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
    for _ in range(_PATIENCE):
        manifests = list(folder.glob("manifest-*.json"))
        try:
            return set().union(*(_named_by(path) for path in manifests))
        except FileNotFoundError:
            _log.info("%s: a manifest was replaced while it was read; reading again", folder)
    raise DataError(f"{folder}: its manifests cannot be read; if one of them is a link that leads nowhere, delete it")


def _named_by(path: Path) -> set[Shard]:
    return named_in(path, path.read_bytes())


def named_in(path: Path | str, text: bytes) -> set[Shard]:
    """The shards that a manifest names; `path` is what it is called in messages."""
    try:
        manifest = json.loads(text)
        if manifest["format"] != FORMAT:
            _log.warning("%s: this manifest has format %s, and this version reads %d: passed over", path, manifest["format"], FORMAT)
            return set()
        shards = {Shard(**one) for one in manifest["shards"]}
        if not all(NAME.fullmatch(one.file) for one in shards):
            raise KeyError("the name of a shard")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: this is no manifest of a tile store ({error}); delete it and run jobs.preprocess again") from None
    return shards


def whole_shards(folder: Path, key: str) -> list[Shard]:
    """Every whole shard of a key's folder, named by a manifest or not: what a job need not make again. Torn ones are removed, and no other
    file is: one that cannot be read now may be read by the next job, and one of another kind is somebody's."""
    found = []
    for path in sorted(folder.glob("shard-*.arrow")):
        if not NAME.fullmatch(path.name):
            continue
        try:
            ids = [one.hex() for batch in _open(path, key) for one in batch.column("id").to_pylist()]
            if shard_name(ids) != path.name:
                raise TornError(f"{path}: this shard does not hold the tiles that its name says")
            found.append(Shard(path.name, len(ids), path.stat().st_size))
        except TornError as error:
            _log.warning("%s. It is removed now, and its tiles are made again", error)
            path.unlink(missing_ok=True)
        except StairstepError as error:
            _log.warning("%s; it is left as it is, and its tiles are made again", error)
    return found


def ids_of(folder: Path, key: str, shards: Iterable[Shard]) -> set[str]:
    """The ids of the tiles in some shards."""
    return {one.hex() for shard in shards for batch in _open(folder / shard.file, key) for one in batch.column("id").to_pylist()}


def shard_name(ids: Collection[str]) -> str:
    """The name of the shard that holds exactly these tiles, in this format."""
    told = f"{FORMAT}:" + "".join(sorted(ids))
    return f"shard-{hashlib.sha256(told.encode()).hexdigest()[:32]}.arrow"


def write_shard(folder: Path, key: str, tiles: Iterable[tuple[str, torch.Tensor]]) -> Shard | None:
    """Write tiles (id, uint8 [3, h, w]) as one shard, whole or not at all; None if there are none. One that is there stays as it is, since
    readers map it."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(folder / "shard")
    ids: list[str] = []
    try:
        schema = _SCHEMA.with_metadata({"key": key, "format": str(FORMAT), "codecs": ",".join(CODECS)})
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for rows in _grouped(map(_packed, tiles), _ROWS_PER_BATCH):
                ids += [row.id for row in rows]
                writer.write_batch(_batch(rows, schema))
        if not ids:
            return None
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        path = folder / shard_name(ids)
        if not path.exists():
            os.replace(temporary, path)
            sync_folder(folder)
        return Shard(path.name, len(ids), path.stat().st_size)
    except OSError as error:
        if error.filename is None:  # Arrow does not say which file
            raise OSError(error.errno or errno.EIO, os.strerror(error.errno) if error.errno else str(error), str(folder)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_manifest(folder: Path, key: str, shards: Sequence[Shard]) -> Path:
    """Name shards as whole, for readers to see; the last write of a job. The same shards are the same manifest.

    Manifests that say nothing more than this one, or name a shard that is gone, are removed afterwards.
    """
    name, value = manifest_of(key, shards)
    path = folder / name
    write_json(path, value)
    for other in folder.glob("manifest-*.json"):
        try:
            more = _named_by(other) - set(shards)
            if other != path and all(not (folder / one.file).exists() for one in more):
                other.unlink(missing_ok=True)
        except FileNotFoundError:
            continue  # another job removed it
    return path


def manifest_of(key: str, shards: Sequence[Shard]) -> tuple[str, dict[str, Any]]:
    """The name of the manifest of some shards, and what it says."""
    named = [asdict(one) for one in sorted(shards, key=lambda one: one.file)]
    value = {"format": FORMAT, "key": key, "codecs": CODECS, "tiles": sum(one.tiles for one in shards), "shards": named}
    return f"manifest-{digest_of_json(named)[:16]}.json", value


class _Row(NamedTuple):
    id: str
    height: int
    width: int
    codec: int
    check: int
    pixels: bytes


def _packed(tile: tuple[str, torch.Tensor]) -> _Row:
    """A tile as its row: compressed at once, so that a writer holds no pixels of many tiles."""
    id, pixels = tile
    planes = pixels.numpy().copy()
    planes[0] -= planes[1]
    planes[2] -= planes[1]
    codec, data = 0, _codec(CODECS[0]).compress(planes, asbytes=True)
    if len(data) * _ENOUGH > planes.nbytes:
        codec, data = 1, _codec(CODECS[1]).compress(planes, asbytes=True)
    return _Row(id, planes.shape[1], planes.shape[2], codec, checksum(data), data)


def _batch(rows: Sequence[_Row], schema: pa.Schema) -> pa.RecordBatch:
    columns = [
        pa.array([bytes.fromhex(row.id) for row in rows], pa.binary(32)),
        *(pa.array([getattr(row, name) for row in rows], schema.field(name).type) for name in schema.names[1:]),
    ]
    return pa.record_batch(columns, schema=schema)


def checksum(data: bytes | pa.Buffer) -> int:
    """The sum of the 64-bit words of some bytes, and of their number: much quicker than a CRC, and no flipped bit leaves it as it was."""
    words = len(data) // 8
    total = int(np.frombuffer(data, dtype=np.uint64, count=words).sum(dtype=np.uint64)) if words else 0
    rest = int.from_bytes(memoryview(data)[8 * words :], "little")
    return (total + rest + len(data)) % 2**64


def _open(path: Path, key: str) -> list[pa.RecordBatch]:
    """The batches of a shard, mapped and not read; a TornError where it is no whole shard, a DataError where it cannot be read now."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        named = {name.decode(): value.decode() for name, value in (reader.schema.metadata or {}).items()}
        if not reader.schema.equals(_SCHEMA) or named.get("key") != key or named.get("format") != str(FORMAT):
            raise TornError(f"{path}: this is no shard of the tiles {key} in format {FORMAT}")
        return [reader.get_batch(number) for number in range(reader.num_record_batches)]
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{path}: this shard of the tile store cannot be read ({os.strerror(error.errno)})") from None
        raise TornError(f"{path}: this shard of the tile store is torn ({error})") from None


def ids_in(file: pa.NativeFile, key: str, where: str) -> list[bytes]:
    """The ids in an open shard, of which little else is read; a TornError where it is no whole shard. `where`: what it is called."""
    try:
        reader = pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=[0]))
        named = {name.decode(): value.decode() for name, value in (reader.schema.metadata or {}).items()}
        if named.get("key") != key or named.get("format") != str(FORMAT):
            raise TornError(f"{where}: this is no shard of the tiles {key} in format {FORMAT}")
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        return [one for batch in batches for one in batch.column(0).to_pylist()]
    except pa.ArrowInvalid as error:
        raise TornError(f"{where}: this shard of the tile store is torn ({error})") from None


def check_shard(path: Path, key: str) -> None:
    """A TornError if anything in a shard is not what was written."""
    ids = []
    for batch in _open(path, key):
        ids += [one.hex() for one in batch.column("id").to_pylist()]
        for row in range(batch.num_rows):
            if checksum(batch.column("pixels")[row].as_buffer()) != batch.column("check")[row].as_py():
                raise TornError(f"{path}: the pixels of tile {batch.column('id')[row].as_py().hex()} are damaged")
    if shard_name(ids) != path.name:
        raise TornError(f"{path}: this shard does not hold the tiles that its name says")


def _codec(name: str) -> pa.Codec:
    kind, _, level = name.partition(":")
    return pa.Codec(kind, compression_level=int(level) if level else None)


def _grouped(rows: Iterable[_Row], size: int) -> Iterator[list[_Row]]:
    group: list[_Row] = []
    for row in rows:
        group.append(row)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group

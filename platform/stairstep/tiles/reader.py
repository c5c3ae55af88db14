"""From tile files to tiles: one read of a file gives its id and its resized pixels; many are decoded ahead of their use.

Where there is no file at a path, what an archive holds under it is the tile; a file at the path wins. Where a tile store has the pixels of
a tile whose id is known, nothing is even opened; the pixels are the same in every bit.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from stairstep.settings import TileError

from .archives import Archives, Member
from .decode import decode_image
from .identity import Stamp, TileIds, tile_id
from .pixels import resize, tile_key
from .prefetch import Ahead
from .settings import TileSettings
from .store import TileStore

_log = logging.getLogger(__name__)

# A file may be no larger than 16-bit RGBA pixels of the largest image, uncompressed, plus room for headers and metadata.
_BYTES_PER_PIXEL = 8
_METADATA_BYTES = 1 << 24


@dataclass(frozen=True, eq=False)
class Tile:
    """A tile ready for the device: its id, where it came from, and its resized pixels, contiguous uint8 [3, h, w]."""

    id: str
    path: Path
    pixels: torch.Tensor


class TileReader:
    """Reads tiles from files and archives; safe from many threads.

    `allowed` says which paths may be read; `ids` remembers the ids of files; `store` has the pixels of some tiles already; `pinned` puts
    pixels where a GPU fetches them by itself.
    """

    def __init__(
        self,
        settings: TileSettings,
        allowed: Callable[[Path], bool] | None = None,
        ids: TileIds | None = None,
        archives: Archives | None = None,
        store: TileStore | None = None,
        pinned: bool = False,
    ) -> None:
        self.settings = settings
        self.geometry = settings.geometry()
        self.key = tile_key(self.geometry)
        self.ids = ids if ids is not None else TileIds()
        self.archives = archives if archives is not None else Archives()
        self.store = store
        self.pinned = pinned
        self._allowed = allowed

    def load(self, path: Path | str) -> Tile:
        """The tile in a file; a TileError says what is wrong with one that cannot be had."""
        path = Path(path)
        stored = self._stored(self.known_id(path)) if self.store is not None else None
        if stored is not None:
            return Tile(stored[0], path, stored[1])
        data, origin = self._read(path)
        id = self._identify(path, data, origin)
        stored = self._stored(id)
        if stored is not None:
            return Tile(id, path, stored[1])
        image = decode_image(data, str(path), self.settings.max_image_pixels)
        pixels = resize(image, self.geometry, str(path))
        return Tile(id, path, pixels.pin_memory() if self.pinned else pixels)

    def source(self, path: Path | str) -> bytes:
        """The tile's own bytes, as its file has them."""
        return self._read(Path(path))[0]

    def id(self, path: Path | str) -> str:
        """The id of the tile in a file, without decoding it, and without reading it if its id is known."""
        path = Path(path)
        known = self.known_id(path)
        return known if known is not None else self._identify(path, *self._read(path))

    def stamp(self, path: Path | str) -> Stamp:
        """What tells the tile's present state without reading it: of a member, its size and the archive's time."""
        try:
            return Stamp.of(os.stat(path))
        except OSError as error:
            return self._packed(Path(path), error).stamp

    def ahead(self, paths: Iterable[Path | str]) -> Ahead[Path | str, Tile]:
        """The tiles in these files, in order, decoded by background threads ahead of their use; close it to stop early."""
        reserve = self.geometry.max_pixels * 3
        workers = self.settings.decode_workers or _cores()
        most = self.settings.prefetch_mb * 1_000_000
        return Ahead(self.load, paths, workers=workers, most_bytes=most, reserve=reserve, cost=lambda tile: tile.pixels.nbytes)

    def read_id(self, path: Path | str) -> tuple[str, Stamp | None]:
        """The id of the tile in a file, read anew, with the stamp of what was read."""
        data, origin = self._read(Path(path))
        return tile_id(data), origin if isinstance(origin, Stamp) else None

    def known_id(self, path: Path) -> str | None:
        """The id of the tile under a path as it now is, if it is known without reading it."""
        self._admit(path)
        try:
            return self.ids.get(path, Stamp.of(os.stat(path)))
        except OSError as error:
            return self._packed(path, error).id

    def has_stored(self, path: Path) -> bool:
        """Whether the store has the pixels of the tile under a path, as far as that is known without reading it."""
        if self.store is None:
            return False
        try:
            known = self.known_id(path)
        except TileError:
            return False
        return known is not None and known in self.store

    def without_index(self) -> TileReader:
        """The same reader for another process, which keeps no ids in a file of its own."""
        return TileReader(self.settings, self._allowed, TileIds(), self.archives)

    def _stored(self, id: str | None) -> tuple[str, torch.Tensor] | None:
        """A tile's id and its pixels in the store, if it has them."""
        if self.store is None or id is None or id not in self.store:
            return None
        try:
            return id, self.store.pixels(id, self.pinned)
        except TileError as error:
            _log.warning("%s; it is decoded from its file", error)
            return None

    def _identify(self, path: Path, data: bytes, origin: Stamp | Member | None) -> str:
        if isinstance(origin, Member):
            return origin.id
        known = self.ids.get(path, origin) if origin is not None else None
        if known is not None:
            return known
        found = tile_id(data)
        if origin is not None:
            self.ids.put(path, origin, found)
        return found

    def _packed(self, path: Path, error: OSError) -> Member:
        """What an archive has under a path at which `error` found no file; a TileError where none has."""
        member = self.archives.find(path) if isinstance(error, FileNotFoundError | NotADirectoryError) else None
        if member is None:
            raise _unreadable(path, error) from error
        return member

    def _admit(self, path: Path) -> None:
        if self._allowed is not None and not self._allowed(path):
            raise TileError(
                f"{path}: this tile lies outside the folders that may be read; add its folder to data.roots, or correct its row"
            )

    def _read(self, path: Path) -> tuple[bytes, Stamp | Member | None]:
        """A file's bytes with its stamp, or a member's with the member; with neither if the file changed meanwhile, since the two then do
        not belong together."""
        self._admit(path)
        most = self.settings.max_image_pixels * _BYTES_PER_PIXEL + _METADATA_BYTES
        try:
            with open(path, "rb", opener=_open_at_once) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise TileError(f"{path}: expected an image file, found a pipe or a device; correct the path in its row")
                self._bound(path, status.st_size, most)
                data = file.read()
                after = os.fstat(file.fileno())
        except OSError as error:
            member = self._packed(path, error)
            self._bound(path, member.size, most)
            return self.archives.read(member, most), member
        stamp = Stamp.of(after)
        return data, stamp if stamp == Stamp.of(status) and stamp.size == len(data) else None

    def _bound(self, path: Path, size: int, most: int) -> None:
        if size > most:
            raise TileError(
                f"{path}: the file has {size} bytes, more than an image of tiles.max_image_pixels ="
                f" {self.settings.max_image_pixels} can need; raise that limit if it is meant to be so large"
            )


def _open_at_once(path: str, flags: int) -> int:
    """A named pipe is opened too, to be told from a file, instead of waited for."""
    return os.open(path, flags | os.O_NONBLOCK)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _unreadable(path: Path, error: OSError) -> TileError:
    if isinstance(error, FileNotFoundError):
        return TileError(f"{path}: there is no such tile; correct the path in its row, or fetch the file")
    return TileError(f"{path}: this tile cannot be read ({error.strerror or error}); check the path and its permissions")

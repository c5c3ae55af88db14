"""From tile files to tiles: one read of a file gives its id and its resized pixels; many are decoded ahead of their use.

Where a tile store has the pixels of a tile whose id is known, the file is not even opened; the pixels are the same in every bit.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from stairstep.settings import TileError

from .decode import decode_image
from .identity import Stamp, TileIds, tile_id
from .pixels import resize, tile_key
from .prefetch import Ahead
from .settings import TileSettings
from .store import TileStore

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
    """Reads tiles from files. `allowed` says which paths may be read; `ids` remembers the ids of files; `store` has the pixels of some
    tiles already; `pinned` puts pixels where a GPU fetches them by itself. Safe from many threads."""

    def __init__(
        self,
        settings: TileSettings,
        allowed: Callable[[Path], bool] | None = None,
        ids: TileIds | None = None,
        store: TileStore | None = None,
        pinned: bool = False,
    ) -> None:
        self.settings = settings
        self.geometry = settings.geometry()
        self.key = tile_key(self.geometry)
        self.ids = ids if ids is not None else TileIds()
        self.store = store
        self.pinned = pinned
        self._allowed = allowed

    def load(self, path: Path | str) -> Tile:
        """The tile in a file; a TileError says what is wrong with one that cannot be had."""
        path = Path(path)
        stored = self._stored(self.known_id(path)) if self.store is not None else None
        if stored is not None:
            return Tile(stored[0], path, stored[1])
        data, stamp = self._read(path)
        id = self._identify(path, data, stamp)
        stored = self._stored(id)
        if stored is not None:
            return Tile(id, path, stored[1])
        image = decode_image(data, str(path), self.settings.max_image_pixels)
        pixels = resize(image, self.geometry, str(path))
        return Tile(id, path, pixels.pin_memory() if self.pinned else pixels)

    def id(self, path: Path | str) -> str:
        """The id of the tile in a file, without decoding it, and without reading it if its id is known."""
        path = Path(path)
        known = self.known_id(path)
        return known if known is not None else self._identify(path, *self._read(path))

    def ahead(self, paths: Iterable[Path | str]) -> Ahead[Path | str, Tile]:
        """The tiles in these files, in order, decoded by background threads ahead of their use; close it to stop early."""
        reserve = self.geometry.max_pixels * 3
        workers = self.settings.decode_workers or _cores()
        most = self.settings.prefetch_mb * 1_000_000
        return Ahead(self.load, paths, workers=workers, most_bytes=most, reserve=reserve, cost=lambda tile: tile.pixels.nbytes)

    def read_id(self, path: Path | str) -> tuple[str, Stamp | None]:
        """The id of the tile in a file, read anew, with the stamp of what was read."""
        data, stamp = self._read(Path(path))
        return tile_id(data), stamp

    def known_id(self, path: Path) -> str | None:
        """The id of the tile in a file as it now is, if it is known without reading it."""
        self._admit(path)
        try:
            return self.ids.get(path, Stamp.of(os.stat(path)))
        except OSError as error:
            raise _unreadable(path, error) from error

    def has_stored(self, path: Path) -> bool:
        """Whether the store has the pixels of the tile in a file, as far as that is known without reading it."""
        if self.store is None:
            return False
        try:
            known = self.known_id(path)
        except TileError:
            return False
        return known is not None and known in self.store

    def without_index(self) -> TileReader:
        """The same reader for another process, which keeps no ids in a file of its own."""
        return TileReader(self.settings, self._allowed, TileIds())

    def _stored(self, id: str | None) -> tuple[str, torch.Tensor] | None:
        """A tile's id and its pixels in the store, if it has them."""
        if self.store is None or id is None or id not in self.store:
            return None
        return id, self.store.pixels(id, self.pinned)

    def _identify(self, path: Path, data: bytes, stamp: Stamp | None) -> str:
        known = self.ids.get(path, stamp) if stamp is not None else None
        if known is not None:
            return known
        found = tile_id(data)
        if stamp is not None:
            self.ids.put(path, stamp, found)
        return found

    def _admit(self, path: Path) -> None:
        if self._allowed is not None and not self._allowed(path):
            raise TileError(
                f"{path}: this tile lies outside the folders that may be read; add its folder to data.roots, or correct its row"
            )

    def _read(self, path: Path) -> tuple[bytes, Stamp | None]:
        """A file's bytes with its stamp; without one if the file changed meanwhile, since the two then do not belong together."""
        self._admit(path)
        most = self.settings.max_image_pixels * _BYTES_PER_PIXEL + _METADATA_BYTES
        try:
            with open(path, "rb", opener=_open_at_once) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise TileError(f"{path}: expected an image file, found a pipe or a device; correct the path in its row")
                if status.st_size > most:
                    raise TileError(
                        f"{path}: the file has {status.st_size} bytes, more than an image of tiles.max_image_pixels ="
                        f" {self.settings.max_image_pixels} can need; raise that limit if it is meant to be so large"
                    )
                data = file.read()
                after = os.fstat(file.fileno())
        except OSError as error:
            raise _unreadable(path, error) from error
        stamp = Stamp.of(after)
        return data, stamp if stamp == Stamp.of(status) and stamp.size == len(data) else None


def _open_at_once(path: str, flags: int) -> int:
    """A named pipe is opened too, to be told from a file, instead of waited for."""
    return os.open(path, flags | os.O_NONBLOCK)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _unreadable(path: Path, error: OSError) -> TileError:
    if isinstance(error, FileNotFoundError):
        return TileError(f"{path}: there is no such tile; correct the path in its row, or fetch the file")
    return TileError(f"{path}: this tile cannot be read ({error.strerror or error}); check the path and its permissions")

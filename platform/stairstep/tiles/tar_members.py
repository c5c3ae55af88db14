"""The members of a tar archive: where the bytes of each of its files lie, from headers that nobody needs to trust.

A member given here is a plain file whose bytes lie wholly inside the archive, under a relative UTF-8 name without `..`. Anything else
(links, devices, sparse files, absolute names, a torn header, a member that is cut off) is a DataError that names archive and member;
folders are skipped. The end mark (blocks of zeros) may be missing behind a last member that is whole, with a warning: some writers leave
it out, and a tile that was lost with it is told as missing.

How many members an archive may have is not bounded, for its own size is the bound: a member costs 512 bytes of it at least, a long name
its own length once more. Nothing of a member stays in memory here, and an index, which keeps names and places, takes about three times the
bytes of their headers while it is built: little beside the tiles of an honest archive, and never more than three times any archive.
"""

from __future__ import annotations

import logging
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from stairstep.settings import DataError

# All that may be read for the headers of one member: room for a name of 4,096 bytes in any format and for attributes. tarfile's own time
# and memory grow with the square of a hostile extended header, so that the bound is what protects both.
_HEADER_BYTES = 1 << 14
_GLOBAL_HEADERS = 100  # extended headers that hold for all members behind them; they stay in memory
_SHOWN = 200  # letters of a name in a message
_LOG = logging.getLogger(__name__)
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a named pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
_COMPRESSED = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\xfd7zXZ\0", "xz"),
    (b"BZh", "bzip2"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"PK\x03\x04", "zip"),
)


class TarMember(NamedTuple):
    """A file in an archive: its name without `.` and double slashes, and where its bytes begin and how many they are."""

    name: str
    offset: int
    size: int


def tar_members(descriptor: int, archive: str) -> Iterator[TarMember]:
    """The files of an open archive in its order; a name may come twice. `archive` is what errors call it."""
    end = os.fstat(descriptor).st_size
    headers = _Headers(descriptor, archive)
    tar = _opened(headers, archive)
    at = 0
    while True:
        headers.allow(at)
        info = _next(tar, archive, at)
        if info is None:
            _check_end(headers, archive, tar.offset)
            return
        tar.members = []  # type: ignore[attr-defined]  # or it would keep them all
        member = _checked(info, tar, archive, at, end)
        if member is not None:
            yield member
        at = tar.offset
        if at >= end:
            _LOG.warning("%s: this archive has no end mark; its last member is whole, but there may have been more behind it", archive)
            return


def count_members(path: Path) -> int:
    """How many files an archive holds, under all that is refused above; one whose name comes twice counts twice."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return sum(1 for _ in tar_members(descriptor, str(path)))
    finally:
        os.close(descriptor)


class _Headers:
    """The archive as tarfile reads it: at its own position, and of one member's headers no more than a bound."""

    def __init__(self, descriptor: int, archive: str) -> None:
        self._descriptor, self._archive = descriptor, archive
        self._position = self._begin = 0
        self._left = _HEADER_BYTES

    def allow(self, begin: int) -> None:
        """Let the headers of another member be read, which begin at a byte."""
        self._begin, self._left = begin, _HEADER_BYTES

    def read(self, size: int) -> bytes:
        """So many bytes, fewer at the end of the archive."""
        if not 0 <= size <= self._left:
            raise DataError(
                f"{self._archive}: the headers of the member at byte {self._begin} ask for more than {_HEADER_BYTES} bytes; the archive is "
                "damaged, or carries large attributes: pack it again, without them"
            )
        self._left -= size
        data = os.pread(self._descriptor, size, self._position)
        self._position += len(data)
        return data

    def seek(self, position: int) -> int:
        """Read there next."""
        self._position = position
        return position

    def tell(self) -> int:
        """Where is read next."""
        return self._position


def _opened(headers: _Headers, archive: str) -> tarfile.TarFile:
    try:
        return tarfile.TarFile(fileobj=headers, encoding="utf-8")  # type: ignore[arg-type]  # tarfile needs no more of a file than this
    except (tarfile.TarError, ValueError, IndexError, OverflowError, RecursionError) as error:
        headers.allow(0)
        headers.seek(0)
        begin = headers.read(8)
        packer = next((name for magic, name in _COMPRESSED if begin.startswith(magic)), None)
        if packer is not None:
            raise DataError(
                f"{archive}: this archive is compressed ({packer}), and nothing can be read from its middle; decompress it to a plain .tar"
            ) from None
        raise DataError(
            f"{archive}: this is no tar archive ({error}); correct the pattern in data.archives, or fetch the file again"
        ) from None


def _next(tar: tarfile.TarFile, archive: str, at: int) -> tarfile.TarInfo | None:
    try:
        return tar.next()
    except (tarfile.TarError, ValueError, IndexError, OverflowError, RecursionError) as error:
        _damaged(archive, at, str(error))


def _check_end(headers: _Headers, archive: str, at: int) -> None:
    """tarfile takes a header that it cannot read for the end of the archive; only zeros are one."""
    headers.allow(at)
    headers.seek(at)
    if headers.read(tarfile.BLOCKSIZE).strip(b"\0"):
        _damaged(archive, at, "neither a header nor the end mark")


def _damaged(archive: str, at: int, why: str) -> NoReturn:
    raise DataError(f"{archive}: the header at byte {at} is damaged or cut off ({why}); fetch or pack the archive again")


def _checked(info: tarfile.TarInfo, tar: tarfile.TarFile, archive: str, at: int, end: int) -> TarMember | None:
    """The member that a header describes, None for a folder."""
    where = f"{archive}: member {_shown(info.name)}"
    if len(tar.pax_headers) > _GLOBAL_HEADERS:
        raise DataError(f"{where}: {len(tar.pax_headers)} global headers stand before it; pack the archive again")
    name = _plain_name(info.name, where)
    if info.isdir():
        if tar.offset <= at:
            _damaged(archive, at, "it leads back")
        return None
    sparse = info.issparse() or any(key.startswith("GNU.sparse") for key in info.pax_headers)
    if sparse or info.type not in _PLAIN:
        kind = _KINDS[tarfile.GNUTYPE_SPARSE] if sparse else _KINDS.get(info.type, f"of the unknown type {info.type!r}")
        raise DataError(f"{where}: this is {kind}; only plain files and folders are read: pack the archive anew without it")
    if not name:
        raise DataError(f"{where}: this file has no name; pack the archive again")
    if info.size < 0:
        _damaged(archive, at, f"a size of {info.size}")
    if info.offset_data + info.size > end:
        raise DataError(
            f"{where}: it ends at byte {info.offset_data + info.size}, behind the end of the archive at byte {end}: the archive is cut off;"
            " fetch or pack it again"
        )
    behind = -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE + info.offset_data
    if info.offset_data < at + tarfile.BLOCKSIZE or tar.offset != behind:
        _damaged(archive, at, "two headers give it different sizes")
    return TarMember(name, info.offset_data, info.size)


def _plain_name(name: str, where: str) -> str:
    """The name without what means nothing in it; empty for the folder itself."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: its name is not UTF-8; rename the file and pack the archive again") from None
    if "\0" in name:
        raise DataError(f"{where}: its name holds a zero character; pack the archive again")
    if name.startswith("/"):
        raise DataError(f"{where}: its name is absolute and would lead out of the folder; pack the archive from within its folder")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise DataError(f"{where}: '..' in its name could lead out of the folder; pack the archive from within its folder")
    return "/".join(parts)


def _shown(name: str) -> str:
    """A name of any bytes, in a message."""
    return ascii(name if len(name) <= _SHOWN else f"{name[:_SHOWN]}…") if not name.isprintable() or len(name) > _SHOWN else f"'{name}'"

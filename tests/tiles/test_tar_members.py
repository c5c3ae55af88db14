"""Members of tar archives: found where Python's and GNU's own tar find them, and hostile or damaged archives each refused by name."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import shutil
import subprocess
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from stairstep.settings import DataError
from stairstep.tiles.tar_members import TarMember, count_members, tar_members

NAMES = {
    "images/shard_000/a.png": b"first",
    "./images/shard_000/b.png": b"x" * 512,
    "images//./shard_001/c.png": b"",
    "images/" + "long/" * 60 + "d.png": b"y" * 1500,
    "images/" + "e" * 250 + ".png": b"z",
    "images/Größe 𝕏.png": b"w" * 511,
    "images/back\\slash.png": b"v",
}
PLAIN = {"/".join(part for part in name.split("/") if part not in ("", ".")): data for name, data in NAMES.items()}


def members(path: Path) -> list[TarMember]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return list(tar_members(descriptor, str(path)))
    finally:
        os.close(descriptor)


def found(path: Path) -> dict[str, bytes]:
    data = path.read_bytes()
    return {one.name: data[one.offset : one.offset + one.size] for one in members(path)}


def info(name: str, size: int = 0, type: bytes = tarfile.REGTYPE, **further: object) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.size, made.type = size, type
    for key, value in further.items():
        setattr(made, key, value)
    return made


def pack(path: Path, *entries: tuple[tarfile.TarInfo, bytes], format: int = tarfile.GNU_FORMAT, **options: object) -> Path:
    with tarfile.open(path, "w", format=format, **options) as tar:  # type: ignore[call-overload]
        for one, data in entries:
            tar.addfile(one, io.BytesIO(data))
    return path


def files(path: Path, contents: dict[str, bytes], format: int = tarfile.GNU_FORMAT) -> Path:
    return pack(path, *((info(name, len(data)), data) for name, data in contents.items()), format=format)


# --- sound archives


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_pythons_own_archives(tmp_path: Path, format: int) -> None:
    path = files(tmp_path / "a.tar", NAMES, format)
    assert found(path) == PLAIN
    with tarfile.open(path) as tar:
        assert [one.offset for one in members(path)] == [one.offset_data for one in tar.getmembers()]


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs tar")
@pytest.mark.parametrize("format", ["gnu", "pax", "ustar", "v7"])
def test_members_of_the_commands_archives(tmp_path: Path, format: str) -> None:
    short = {name: data for name, data in PLAIN.items() if len(name) < 95 and name.isascii()}
    contents = PLAIN if format in ("gnu", "pax") else short
    for name, data in contents.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(data)
    subprocess.run(["tar", f"--format={format}", "-cf", "../a.tar", "."], cwd=tmp_path / "tree", check=True)
    assert found(tmp_path / "a.tar") == contents


def test_folders_are_passed_over_and_the_last_of_a_name_comes_last(tmp_path: Path) -> None:
    folder = info("./", type=tarfile.DIRTYPE), b""
    path = pack(tmp_path / "a.tar", folder, (info("x/", type=tarfile.DIRTYPE), b""), (info("x/a", 3), b"old"), (info("./x/a", 3), b"new"))
    assert [one.name for one in members(path)] == ["x/a", "x/a"]
    assert found(path) == {"x/a": b"new"}
    assert members(pack(tmp_path / "empty.tar")) == []


def test_a_global_header_and_attributes_are_passed_over(tmp_path: Path) -> None:
    one = info("a", 2, pax_headers={"SCHILY.xattr.user.note": "n" * 3000, "mtime": "12.5"})
    path = pack(tmp_path / "a.tar", (one, b"hi"), format=tarfile.PAX_FORMAT, pax_headers={"comment": "by hand"})
    assert found(path) == {"a": b"hi"}


# --- an end that is missing


def test_a_missing_end_mark_is_told_where_the_last_member_is_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = files(tmp_path / "a.tar", {"a": b"1" * 700, "b": b"2" * 700}).read_bytes()
    end = members(tmp_path / "a.tar")[1].offset + 700
    padded = -(-end // 512) * 512
    assert not whole[padded:].strip(b"\0")
    for length, told in [(len(whole), False), (padded + 512, False), (padded + 7, False), (padded, True), (padded - 1, True), (end, True)]:
        caplog.clear()
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        assert found(tmp_path / "cut.tar") == {"a": b"1" * 700, "b": b"2" * 700}
        assert ("no end mark" in caplog.text) is told, length


def test_every_other_cut_is_an_error_that_names_archive_and_place(tmp_path: Path) -> None:
    whole = files(tmp_path / "a.tar", {"a": b"1" * 700, "n" * 150: b"2" * 700}).read_bytes()
    first, second = members(tmp_path / "a.tar")
    assert second.offset == 512 + 1024 + 512 + 512 + 512
    cut = tmp_path / "cut.tar"
    for length in [*range(1, 512, 37), *range(first.offset, first.offset + 700, 50), *range(1537, second.offset, 61), second.offset + 699]:
        cut.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.tar: ") as told:
            members(cut)
        assert any(word in str(told.value) for word in ("cut off", "no tar archive")), (length, told.value)
        if first.offset <= length < first.offset + 700:
            assert "member 'a': it ends at byte 1212, behind the end of the archive" in str(told.value)


@pytest.mark.parametrize("byte", [0, 100, 130, 148, 156, 300])
def test_a_damaged_header_is_not_the_end(tmp_path: Path, byte: int) -> None:
    path = files(tmp_path / "a.tar", {"a": b"1" * 700, "b": b"2"})
    data = bytearray(path.read_bytes())
    data[512 + 1024 + byte] ^= 0x5A
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.tar: the header at byte 1536 is damaged"):
        members(path)


def test_what_is_no_archive(tmp_path: Path) -> None:
    for name, data in [("empty.tar", b""), ("text.tar", b"<html>404 Not Found</html>" * 40), ("short.tar", b"x")]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=rf"{name}: this is no tar archive .*data\.archives"):
            members(tmp_path / name)


def test_compressed_archives_are_told(tmp_path: Path) -> None:
    data = files(tmp_path / "a.tar", {"BZh.png": b"a plain archive may begin like that"}).read_bytes()
    assert found(tmp_path / "a.tar")
    packed = {"gzip": gzip.compress(data), "xz": lzma.compress(data), "bzip2": bz2.compress(data), "zstd": b"\x28\xb5\x2f\xfd" + b"x" * 700}
    for name, content in packed.items():
        (tmp_path / "b.tar").write_bytes(content)
        with pytest.raises(DataError, match=rf"b\.tar: this archive is compressed \({name}\).*decompress it to a plain \.tar"):
            members(tmp_path / "b.tar")


# --- hostile archives

REFUSED = {
    "absolute": (info("/etc/passwd", 1), r"member '/etc/passwd': its name is absolute"),
    "upwards": (info("../a.png", 1), r"member '\.\./a\.png': '\.\.' in its name"),
    "upwards within": (info("a/b/../../../c", 1), r"'\.\.' in its name"),
    "upwards at the end": (info("a/..", 1), r"'\.\.' in its name"),
    "folder upwards": (info("../x", type=tarfile.DIRTYPE), r"'\.\.' in its name"),
    "symbolic link": (info("a", type=tarfile.SYMTYPE, linkname="b"), "member 'a': this is a symbolic link"),
    "hard link": (info("a", type=tarfile.LNKTYPE, linkname="/etc/passwd"), "member 'a': this is a hard link"),
    "device": (info("a", type=tarfile.CHRTYPE), "this is a device"),
    "block device": (info("a", type=tarfile.BLKTYPE), "this is a device"),
    "pipe": (info("a", type=tarfile.FIFOTYPE), "this is a named pipe"),
    "unknown type": (info("a", type=b"Q"), "of the unknown type b'Q'"),
    "no name": (info(".", 1), "this file has no name"),
    "not UTF-8": (info("caf\udce9.png", 1), r"member 'caf\\udce9\.png': its name is not UTF-8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_lead_elsewhere_is_refused(tmp_path: Path, case: str) -> None:
    bad, message = REFUSED[case]
    path = pack(tmp_path / "bad.tar", (info("good", 1), b"1"), (bad, b"1" * bad.size), (info("after", 1), b"1"))
    with pytest.raises(DataError, match=rf"bad\.tar: .*{message}"):
        members(path)


def test_a_zero_character_and_a_sparse_file_by_an_extended_header_are_refused(tmp_path: Path) -> None:
    for headers, message in [
        ({"path": "a\0b"}, "a zero character"),
        ({"GNU.sparse.map": "0,1", "GNU.sparse.size": "90000000000"}, "a sparse file"),
        ({"GNU.sparse.size": "90000000000", "GNU.sparse.numblocks": "0"}, "a sparse file"),
        ({"GNU.sparse.realsize": "9", "GNU.sparse.name": "../x"}, r"'\.\.' in its name"),
        ({"path": "../x"}, r"'\.\.' in its name"),
        ({"path": "/x"}, "absolute"),
    ]:
        path = pack(tmp_path / "bad.tar", (info("a", 1, pax_headers=headers), b"1"), format=tarfile.PAX_FORMAT)
        with pytest.raises(DataError, match=rf"bad\.tar: .*{message}"):
            members(path)


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs tar")
@pytest.mark.parametrize("options", [["--format=gnu"], ["--format=pax", "--sparse-version=0.1"], ["--format=pax", "--sparse-version=1.0"]])
def test_real_sparse_files_are_refused(tmp_path: Path, options: list[str]) -> None:
    with open(tmp_path / "holes", "wb") as file:
        for block in range(40):
            file.seek(block * 1_000_000)
            file.write(b"x")
    subprocess.run(["tar", *options, "--sparse", "-cf", "a.tar", "holes"], cwd=tmp_path, check=True)
    assert (tmp_path / "a.tar").stat().st_size < 1_000_000, "the archive is a sparse one"
    with pytest.raises(DataError, match=r"a\.tar: member '.*holes': this is a sparse file"):
        members(tmp_path / "a.tar")


def sealed(header: bytearray) -> bytes:
    """A header with its checksum."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def header(name: str, type: bytes = tarfile.REGTYPE, size: bytes = b"00000000001\0") -> bytes:
    made = bytearray(info(name, 1, type).tobuf(tarfile.GNU_FORMAT)[:512])
    made[124:136] = size
    return sealed(made)


def number(value: int) -> bytes:
    """A size in the format for large and for negative numbers."""
    return (b"\xff" if value < 0 else b"\x80") + value.to_bytes(11, "big", signed=True)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header("a", size=number(1 << 60)) + b"1" * 512, "behind the end of the archive"),
        (header("a", size=number(-1024)) + b"1" * 512, "damaged or cut off"),
        (header("a", size=number(-512)) + b"1" * 512, "damaged or cut off"),
        (header("././@LongLink", tarfile.GNUTYPE_LONGNAME, number(1 << 40)) + b"n" * 512, "ask for more than 16384 bytes"),
        (header("././@LongLink", tarfile.GNUTYPE_LONGNAME, number(-700)) + b"n" * 512, "ask for more than 16384 bytes"),
        (header("p", tarfile.XHDTYPE, number(1 << 33)) + b"n" * 512, "ask for more than 16384 bytes"),
        (header("p", tarfile.XGLTYPE, number(1 << 33)) + b"n" * 512, "ask for more than 16384 bytes"),
        (header("././@LongLink", tarfile.GNUTYPE_LONGNAME) + b"n" * 512 + b"\0" * 1024, "damaged or cut off"),
        (
            (header("././@LongLink", tarfile.GNUTYPE_LONGNAME) + b"n" * 512) * 5000 + header("a") + b"1" * 512,
            "ask for more than 16384 bytes",
        ),
        (header("x/", tarfile.DIRTYPE, number(-4096)), ""),
    ],
    ids=["far behind the end", "back", "back to itself", "long name", "negative name", "extended", "global", "torn", "endless", "folder"],
)
def test_a_hostile_header_takes_neither_memory_nor_time(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "bad.tar"
    path.write_bytes(header("good") + b"1" * 512 + data)
    tracemalloc.start()
    try:
        if message:
            with pytest.raises(DataError, match=rf"bad\.tar: .*{message}"):
                members(path)
        else:
            assert [one.name for one in members(path)] == ["good"], "a folder has no bytes, whatever its header says"
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_members_are_counted_and_none_stays_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "many.tar"
    path.write_bytes(header("a", size=b"00000000000\0") * 20_000 + b"\0" * 1024)
    tracemalloc.start()
    try:
        assert count_members(path) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_count_is_that_of_the_files_and_refuses_what_readers_refuse(tmp_path: Path) -> None:
    folder = info("x/", type=tarfile.DIRTYPE), b""
    assert count_members(pack(tmp_path / "a.tar", folder, (info("x/a", 3), b"old"), (info("x/b", 3), b"new"))) == 2
    with pytest.raises(DataError, match=r"bad\.tar: member '\.\./a\.png': '\.\.' in its name"):
        count_members(pack(tmp_path / "bad.tar", (info("../a.png", 1), b"1")))
    bomb = tmp_path / "bomb.tar"
    bomb.write_bytes(header("p", tarfile.XHDTYPE, b"%011o\0" % 30_000_000) + b"n" * 30_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"bomb\.tar: the headers of the member at byte 0 ask for more than 16384 bytes"):
            count_members(bomb)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def extended(type: bytes, body: bytes) -> bytes:
    return header("p", type, b"%011o\0" % len(body)) + body + b"\0" * (-len(body) % 512)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"12 size=-99\n", "damaged"),
        (b"15 size=600000\n", "behind the end"),
        (b"9" * 6000 + b" path=x\n", "damaged"),
        (b"0 path=x\n", "damaged"),
        (b"22 hdrcharset=\xff\xff\xff\xff\xff\xff\n", "damaged"),
    ],
    ids=["negative size", "another size", "endless length", "no length", "no charset"],
)
def test_a_hostile_extended_header_is_told(tmp_path: Path, body: bytes, message: str) -> None:
    (tmp_path / "bad.tar").write_bytes(extended(tarfile.XHDTYPE, body) + header("a") + b"1" * 512 + b"\0" * 1024)
    with pytest.raises(DataError, match=rf"bad\.tar: .*({message})|no tar archive"):
        members(tmp_path / "bad.tar")


def test_a_size_for_all_members_behind_it_does_not_shift_them(tmp_path: Path) -> None:
    (tmp_path / "bad.tar").write_bytes(
        extended(tarfile.XGLTYPE, b"13 size=2000\n") + header("a") + b"1" * 512 + header("b") + b"1" * 512 + b"\0" * 2048
    )
    with pytest.raises(DataError, match=r"bad\.tar: .*two headers give it different sizes"):
        members(tmp_path / "bad.tar")


def test_global_headers_do_not_pile_up(tmp_path: Path) -> None:
    one = b"".join(extended(tarfile.XGLTYPE, b"%d k%06d=v\n" % (13, place)) + header("a") + b"1" * 512 for place in range(300))
    (tmp_path / "bad.tar").write_bytes(one)
    with pytest.raises(DataError, match=r"bad\.tar: member 'a': 101 global headers"):
        members(tmp_path / "bad.tar")


def test_any_damage_at_all_ends_in_members_or_in_one_clear_error(tmp_path: Path) -> None:
    """Three thousand archives, each with a few wrong bytes in its headers and a checksum that agrees."""
    mixed = pack(
        tmp_path / "a.tar",
        (info("n" * 150, 3), b"abc"),
        (info("x/", type=tarfile.DIRTYPE), b""),
        (info("b", 700, pax_headers={"SCHILY.xattr.user.a": "1", "path": "ü" * 60}), b"1" * 700),
        (info("c", 10), b"0123456789"),
        format=tarfile.PAX_FORMAT,
    ).read_bytes()
    rng = random.Random(0)
    outcomes = {"members": 0, "error": 0}
    headers = [place for place in range(0, len(mixed), 512) if mixed[place + 257 : place + 262] == b"ustar"]
    assert len(headers) == 6
    for _ in range(3000):
        data = bytearray(mixed)
        for _ in range(rng.randint(1, 3)):
            place = rng.choice(headers)
            field = rng.choice([(0, 100), (124, 136), (156, 157), (157, 257), (345, 500), (512, 600), (257, 265)])
            data[place + rng.randrange(*field)] = rng.choice(
                [0, 0x20, 0x2F, 0x2E, 0x37, 0x39, 0x4C, 0x53, 0x78, 0x80, 0xFF, rng.randrange(256)]
            )
            data[place : place + 512] = sealed(bytearray(data[place : place + 512]))
        (tmp_path / "b.tar").write_bytes(data)
        try:
            got = members(tmp_path / "b.tar")
        except DataError as error:
            assert str(error).startswith(f"{tmp_path}/b.tar: ")
            str(error).encode()
            outcomes["error"] += 1
        else:
            assert all(512 <= one.offset <= one.offset + one.size <= len(data) for one in got)
            assert all(".." not in one.name.split("/") and not one.name.startswith("/") and one.name for one in got)
            outcomes["members"] += 1
    assert min(outcomes.values()) > 300, outcomes


def test_an_endless_extended_header_stays_within_the_bound(tmp_path: Path) -> None:
    """Digits that tarfile's own search goes over again and again: only so many of them are read."""
    (tmp_path / "bad.tar").write_bytes(extended(tarfile.XHDTYPE, b"1" * 10_000_000) + header("a") + b"1" * 512)
    with pytest.raises(DataError, match=r"bad\.tar: .*ask for more than 16384 bytes"):
        members(tmp_path / "bad.tar")

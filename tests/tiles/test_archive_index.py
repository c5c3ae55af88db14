"""The index of an archive: right, built once, built anew when the archive changes, and never believed when anything in it is damaged."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import tarfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from stairstep.settings import DataError
from stairstep.tiles import ArchiveIndex, archive_index, build_index, index_archive, index_archives
from stairstep.tiles.archive_index import index_file, kept_index

Pack = Callable[[Path, dict[str, bytes]], Path]
CONTENTS = {"images/a.png": b"one" * 400, "images/b.png": b"", "c.png": b"three"}


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the archives that were read whole."""
    names: list[str] = []
    real = archive_index._built

    def counting(descriptor: int, path: str, *further: object) -> ArchiveIndex:
        names.append(Path(path).name)
        return real(descriptor, path, *further)  # type: ignore[arg-type]

    monkeypatch.setattr(archive_index, "_built", counting)
    return names


def contents(index: ArchiveIndex) -> dict[str, tuple[bytes, str]]:
    data = Path(index.archive).read_bytes()
    return {one["name"]: (data[one["offset"] : one["offset"] + one["size"]], one["id"].hex()) for one in index.members.to_pylist()}


def expected(files: dict[str, bytes]) -> dict[str, tuple[bytes, str]]:
    return {name: (data, hashlib.sha256(data).hexdigest()) for name, data in files.items()}


def test_an_index_says_where_each_member_lies_and_what_its_id_is(pack: Pack, tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", CONTENTS)
    index = build_index(path)
    assert contents(index) == expected(CONTENTS)
    assert index.archive == str(path.resolve()) and index.stamp == (path.stat().st_size, path.stat().st_mtime_ns)
    assert len(build_index(pack(tmp_path / "none.tar", {})).members) == 0


def test_the_last_of_two_members_of_a_name_counts(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in [("a", b"old"), ("b", b"other"), ("./a", b"newer")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert contents(build_index(tmp_path / "a.tar")) == expected({"a": b"newer", "b": b"other"})


def test_large_members_are_hashed_whole_and_the_bytes_are_told(pack: Pack, tmp_path: Path) -> None:
    data = bytes(range(256)) * 10_000
    read: list[int] = []
    assert contents(build_index(pack(tmp_path / "a.tar", {"a": data, "b": b"1"}), read.append)) == expected({"a": data, "b": b"1"})
    assert len(read) > 3 and sum(read) == len(data) + 1


def test_an_index_is_built_once_and_found_again(pack: Pack, tmp_path: Path, built: list[str]) -> None:
    path = pack(tmp_path / "a.tar", CONTENTS)
    first = index_archive(path, tmp_path / "kept")
    assert [one.name for one in (tmp_path / "kept").iterdir()] == [index_file(str(path), tmp_path / "kept").name]
    again = index_archive(path, tmp_path / "kept")
    assert built == ["a.tar"] and again == first
    (tmp_path / "link.tar").symlink_to(path)
    assert index_archive(tmp_path / "link.tar", tmp_path / "kept") == first and built == ["a.tar"]


def test_an_archive_that_changed_is_indexed_anew(pack: Pack, tmp_path: Path, built: list[str]) -> None:
    path, kept = pack(tmp_path / "a.tar", CONTENTS), tmp_path / "kept"
    before = index_archive(path, kept)
    changed = {**CONTENTS, "c.png": b"THREE"}
    pack(path, changed)
    assert path.stat().st_size == before.stamp.size
    os.utime(path, ns=(1, before.stamp.mtime_ns + 1))
    assert contents(index_archive(path, kept)) == expected(changed)
    os.utime(path, ns=(1, 5))
    assert index_archive(path, kept).stamp.mtime_ns == 5
    pack(path, {**changed, "d.png": b"four" * 5000})
    os.utime(path, ns=(1, 5))
    assert "d.png" in contents(index_archive(path, kept))
    assert len(built) == 4 and len(list(kept.iterdir())) == 1


def test_no_bit_of_an_index_can_be_wrong_unseen(pack: Pack, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every byte flipped in turn and every length cut: the index is either what it was, or not taken."""
    path, kept = pack(tmp_path / "a.tar", CONTENTS), tmp_path / "kept"
    whole = index_archive(path, kept)
    file = index_file(str(path), kept)
    data = file.read_bytes()
    refused = 0
    caplog.set_level(logging.CRITICAL)
    for place in range(len(data)):
        for flip in (0xFF, 0x01):
            file.write_bytes(data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :])
            found = kept_index(path, kept)
            assert found is None or found == whole, (place, flip)
            refused += found is None
    assert refused > len(data) * 0.4, "most bytes mean something"
    for length in range(0, len(data), 7):
        file.write_bytes(data[:length])
        assert kept_index(path, kept) is None, length


def test_a_damaged_index_is_told_and_built_anew(pack: Pack, tmp_path: Path, built: list[str], caplog: pytest.LogCaptureFixture) -> None:
    path, kept = pack(tmp_path / "a.tar", CONTENTS), tmp_path / "kept"
    index_archive(path, kept)
    index_file(str(path), kept).write_bytes(b"not arrow")
    assert contents(index_archive(path, kept)) == expected(CONTENTS)
    assert len(built) == 2 and "this index of" in caplog.text and "damaged" in caplog.text
    caplog.clear()
    index_archive(path, kept)
    assert len(built) == 2 and not caplog.text


@pytest.mark.parametrize(
    ("column", "value"), [("offset", -1), ("offset", 1 << 40), ("size", 1 << 40), ("size", -5), ("offset", (1 << 63) - 1)]
)
def test_an_index_that_leads_out_of_its_archive_is_not_taken(pack: Pack, tmp_path: Path, column: str, value: int) -> None:
    """Even one whose own digest agrees."""
    path, kept = pack(tmp_path / "a.tar", CONTENTS), tmp_path / "kept"
    index = index_archive(path, kept)
    values = index.members.to_pylist()
    values[1][column] = value
    forged = ArchiveIndex(index.archive, index.stamp, pa.Table.from_pylist(values, schema=index.members.schema))
    index_file(str(path), kept).write_bytes(archive_index._written(forged))
    assert kept_index(path, kept) is None
    assert contents(index_archive(path, kept)) == expected(CONTENTS)


def test_what_is_no_file_or_not_there_is_told(tmp_path: Path) -> None:
    (tmp_path / "folder.tar").mkdir()
    os.mkfifo(tmp_path / "pipe.tar")
    for name, message in [("folder.tar", "found a folder"), ("pipe.tar", "found a pipe"), ("none.tar", "cannot be read: No such file")]:
        with pytest.raises(DataError, match=rf"{name}: .*{message}"):
            build_index(tmp_path / name)


def test_an_archive_that_grows_meanwhile_is_refused(pack: Pack, tmp_path: Path) -> None:
    path = pack(tmp_path / "a.tar", CONTENTS)

    def read(size: int) -> None:
        with open(path, "ab") as file:
            file.write(b"\0" * 512)

    with pytest.raises(DataError, match=r"a\.tar: this archive changed while it was read"):
        build_index(path, read)


def test_many_are_built_at_once_and_kept_in_order(pack: Pack, tmp_path: Path, built: list[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    paths = [pack(tmp_path / f"{number}.tar", {f"{number}.png": bytes([number]) * 1000}) for number in range(20)]
    kept = tmp_path / "kept"
    index_archive(paths[3], kept)
    beats: list[int] = []
    indices = index_archives(paths, kept, lambda: beats.append(1))
    assert [index.archive for index in indices] == [str(path) for path in paths]
    assert [index.members["name"].to_pylist() for index in indices] == [[f"{number}.png"] for number in range(20)]
    assert sorted(built) == sorted(path.name for path in paths) and beats
    assert "indexing 19 archives" in caplog.text and "Indexed 19 archives with 19 members" in caplog.text
    assert index_archives(paths, kept) == indices and len(built) == 20
    assert index_archives([], kept) == []


def test_progress_is_told_with_what_is_left(
    pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    paths = [pack(tmp_path / f"{number}.tar", {f"{number}.png": b"1" * 3_000_000}) for number in range(3)]
    monkeypatch.setattr(archive_index, "_LOG_EVERY_S", 0.0)
    monkeypatch.setattr(archive_index, "_LOOK_EVERY_S", 0.001)
    index_archives(paths, tmp_path / "kept")
    assert "of 0.01 GB" in caplog.text and "archives left; about" in caplog.text


def test_the_first_bad_archive_ends_it_without_reading_the_others(pack: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [pack(tmp_path / f"{number}.tar", {"a": b"1" * 5_000_000}) for number in range(6)]
    paths[1].write_bytes(b"no archive")
    stopped = threading.Event()
    told: list[type[BaseException]] = []
    real = archive_index.build_index

    def watched(archive: Path, read: object) -> ArchiveIndex:
        def waiting(size: int) -> None:
            stopped.wait(10)
            read(size)  # type: ignore[operator]

        try:
            return real(archive, waiting)
        except DataError:
            raise
        except BaseException as error:
            told.append(type(error))
            raise

    class Released(threading.Event):
        def set(self) -> None:
            super().set()
            stopped.set()

    monkeypatch.setattr(archive_index, "build_index", watched)
    monkeypatch.setattr(archive_index.threading, "Event", Released)
    with pytest.raises(DataError, match=r"1\.tar: this is no tar archive"):
        index_archives(paths, tmp_path / "kept")
    assert told and set(told) == {archive_index._Abandoned}
    assert not (tmp_path / "kept").exists()


def test_several_at_once_over_one_folder_leave_whole_indices(pack: Pack, tmp_path: Path) -> None:
    paths = [pack(tmp_path / f"{number}.tar", {f"{number}.png": bytes([number]) * 50_000}) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: index_archives(paths, tmp_path / "kept"), range(4)))
    assert all(one == results[0] for one in results)
    assert len(list((tmp_path / "kept").iterdir())) == 4
    assert all(kept_index(path, tmp_path / "kept") == index for path, index in zip(paths, results[0], strict=True))

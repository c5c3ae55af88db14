"""Tiles in archives: found under the paths of the unpacked layout, read by one pread, the same to the last bit, never a wrong byte."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

from stairstep.settings import DataError, TileError
from stairstep.tiles import Archives, TileIds, TileReader, TileSettings, archives, build_index

SETTINGS = TileSettings(max_visual_tokens=16, decode_workers=2, prefetch_mb=1)
MOST = 10_000_000
Pack = Callable[[Path, dict[str, bytes]], Path]


@pytest.fixture
def images(scene: Callable, saved: Callable) -> dict[str, bytes]:
    return {
        f"images/shard_{number // 4:03d}/{number}.png": saved(Image.fromarray(scene(60 + number, 50, number)), "PNG") for number in range(8)
    }


@pytest.fixture
def packed(pack: Pack, tmp_path: Path, images: dict[str, bytes]) -> Archives:
    """Two archives with four tiles each, as if unpacked in `data`."""
    data = tmp_path / "data"
    names = list(images)
    for number in range(2):
        pack(data / "shards" / f"{number}.tar", {name: images[name] for name in names[number * 4 : number * 4 + 4]})
    return Archives([(build_index(data / "shards" / f"{number}.tar"), data) for number in range(2)])


# --- found and read


def test_members_are_found_under_the_paths_of_the_unpacked_layout(tmp_path: Path, packed: Archives, images: dict[str, bytes]) -> None:
    data = tmp_path / "data"
    assert len(packed) == 8
    for name, content in images.items():
        member = packed.find(data / name)
        assert member is not None and member == packed.find(str(data / name))
        assert member.id == hashlib.sha256(content).hexdigest() and member.size == len(content)
        with open(member.archive, "rb") as file:
            file.seek(member.offset)
            assert file.read(member.size) == content
        assert packed.read(member, MOST) == packed.read(data / name, MOST) == content
    for absent in ("images/shard_000/9.png", "images/shard_000", "images", "0.png", "images/shard_001/0.png", ""):
        assert packed.find(data / absent) is None
    with pytest.raises(TileError, match=r"9\.png: no archive holds this tile.*data\.archives"):
        packed.read(data / "9.png", MOST)
    assert Archives().find(data / "images/shard_000/0.png") is None and Archives().below(tmp_path) == [] and len(Archives()) == 0


def test_below_lists_all_members_of_a_folder_sorted(tmp_path: Path, packed: Archives, images: dict[str, bytes]) -> None:
    data = tmp_path / "data"
    assert packed.below(data) == packed.below(str(data)) == sorted(str(data / name) for name in images)
    assert packed.below("/") == packed.below(data)
    assert packed.below(data / "images" / "shard_001") == sorted(str(data / name) for name in images if "shard_001" in name)
    assert packed.below(data / "images" / "shard_00") == [] == packed.below(data / "images" / "shard_000" / "0.png")


def test_one_positioned_read_and_one_open_file(
    packed: Archives, images: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, opens = [], []
    pread, open_ = os.pread, os.open
    monkeypatch.setattr(archives.os, "pread", lambda *call: reads.append(call[1:]) or pread(*call))
    monkeypatch.setattr(archives.os, "open", lambda *call: opens.append(call[0]) or open_(*call))
    for name in list(images) * 3:
        packed.read(tmp_path / "data" / name, MOST)
    assert len(opens) == 2
    members = [packed.find(tmp_path / "data" / name) for name in images] * 3
    assert reads == [(member.size, member.offset) for member in members if member is not None]


def test_a_short_read_is_gone_on_with(packed: Archives, images: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    monkeypatch.setattr(archives.os, "pread", lambda file, size, offset: pread(file, min(size, 100), offset))
    for name, content in images.items():
        assert packed.read(tmp_path / "data" / name, MOST) == content


def test_open_files_are_bounded_and_none_is_closed_under_a_reader(
    pack: Pack, tmp_path: Path, images: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "_MOST_OPEN", 3)
    contents = {f"{number}/x.png": os.urandom(20_000) for number in range(12)}
    made = [pack(tmp_path / f"{number}.tar", {name: data}) for number, (name, data) in enumerate(contents.items())]
    packed = Archives([(build_index(path), tmp_path) for path in made])

    def opened() -> int:
        return sum(os.path.realpath(f"/proc/self/fd/{one}").endswith(".tar") for one in os.listdir("/proc/self/fd"))

    with ThreadPoolExecutor(8) as pool:
        names = list(contents) * 60
        assert list(pool.map(lambda name: packed.read(tmp_path / name, MOST), names)) == [contents[name] for name in names]
    assert opened() == 3
    packed._open.clear()
    assert opened() == 0


def test_bytes_are_bounded_before_they_are_read(packed: Archives, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    member = packed.find(tmp_path / "data" / "images/shard_000/0.png")
    assert member is not None and packed.read(member, member.size)
    monkeypatch.setattr(archives, "_read_at", lambda *call: pytest.fail("read"))
    with pytest.raises(TileError, match=rf"0\.png in .*0\.tar: this member has {member.size} bytes, and at most {member.size - 1}"):
        packed.read(member, member.size - 1)


def test_changed_cut_and_lost_archives_are_told(packed: Archives, tmp_path: Path, images: dict[str, bytes]) -> None:
    data, name = tmp_path / "data", "images/shard_000/1.png"
    path = data / "shards" / "0.tar"
    member, whole = packed.find(data / name), path.read_bytes()
    assert member is not None
    place = member.offset + member.size // 2
    for changed in (whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :], whole[:place], b"", whole[512:]):
        path.write_bytes(changed)
        with pytest.raises(TileError, match=r"1\.png in .*0\.tar: its bytes are not those that were indexed.*start again"):
            packed.read(member, MOST)
    path.write_bytes(whole)
    assert packed.read(member, MOST) == images[name]
    path.unlink()
    assert packed.read(member, MOST) == images[name], "it is open"
    with pytest.raises(TileError, match=r"1\.png in .*0\.tar: this archive cannot be read \(No such file"):
        pickle.loads(pickle.dumps(packed)).read(member, MOST)


# --- copies in other processes and threads


def test_a_pickled_copy_needs_neither_index_files_nor_open_ones(packed: Archives, images: dict[str, bytes], tmp_path: Path) -> None:
    packed.read(tmp_path / "data" / next(iter(images)), MOST)
    program = (
        "import pickle, sys\n"
        "packed = pickle.load(sys.stdin.buffer)\n"
        "assert not packed._open\n"
        "for path in packed.below(sys.argv[1]): sys.stdout.buffer.write(packed.read(path, 10**7))\n"
        "assert packed.unmatched == ('a*.tar',)\n"
    )
    packed = Archives(packed._packed, ["a*.tar"])
    copy = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        input=pickle.dumps(packed),
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert copy.returncode == 0, copy.stderr.decode()
    assert copy.stdout == b"".join(images[name] for name in sorted(images))


# --- names


def test_the_same_path_from_two_archives_is_an_error_that_names_both(pack: Pack, tmp_path: Path) -> None:
    one, two = pack(tmp_path / "one.tar", {"x/a": b"1", "x/b": b"2"}), pack(tmp_path / "two.tar", {"./x//b": b"2"})
    first, second = build_index(one), build_index(two)
    with pytest.raises(DataError, match=r"data\.archives: .*one\.tar and .*two\.tar both hold .*/x/b;"):
        Archives([(first, tmp_path), (second, tmp_path)])
    assert len(Archives([(first, tmp_path), (second, tmp_path / "elsewhere")])) == 3
    with pytest.raises(DataError, match=r"one\.tar and .*two\.tar both hold"):
        Archives([(first, tmp_path / "x" / ".."), (second, tmp_path)])


def test_links_in_the_folder_are_followed_as_unpacking_would(pack: Pack, tmp_path: Path) -> None:
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "at").mkdir()
    (tmp_path / "at" / "images").symlink_to(tmp_path / "real" / "deep")
    (tmp_path / "link").symlink_to(tmp_path / "at")
    packed = Archives([(build_index(pack(tmp_path / "a.tar", {"images/s/a.png": b"1", "b.png": b"2"})), tmp_path / "link")])
    assert packed.below(tmp_path) == [str(tmp_path / "at" / "b.png"), str(tmp_path / "real" / "deep" / "s" / "a.png")]


# --- the reader of tiles


def same(first: TileReader, second: TileReader, path: Path) -> None:
    one, two = first.load(path), second.load(path)
    assert (one.id, one.path) == (two.id, two.path) and torch.equal(one.pixels, two.pixels)
    assert first.id(path) == second.id(path) == one.id
    assert first.source(path) == second.source(path)


def test_a_packed_tile_is_the_unpacked_one(packed: Archives, images: dict[str, bytes], tmp_path: Path) -> None:
    data = tmp_path / "data"
    paths = [data / name for name in images]
    from_archives = TileReader(SETTINGS, archives=packed)
    seen = [(tile.id, tile.path, tile.pixels) for tile in from_archives.ahead(paths)]
    with pytest.raises(TileError, match="there is no such tile"):
        TileReader(SETTINGS).load(paths[0])
    for path in sorted((data / "shards").iterdir()):
        with tarfile.open(path) as tar:
            tar.extractall(data, filter="data")
    unpacked = TileReader(SETTINGS)
    for path, (id, where, pixels) in zip(paths, seen, strict=True):
        tile = unpacked.load(path)
        assert (tile.id, tile.path) == (id, where) and torch.equal(tile.pixels, pixels)
        assert unpacked.source(path) == images[str(path.relative_to(data))]
    shutil.rmtree(data / "images" / "shard_001")
    mixed = TileReader(SETTINGS, archives=packed)
    for path in paths:
        same(mixed, from_archives, path)


def test_a_file_wins_over_a_member(packed: Archives, images: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "data" / "images/shard_000/0.png"
    other = images["images/shard_001/5.png"]
    path.parent.mkdir(parents=True)
    path.write_bytes(other)
    reader = TileReader(SETTINGS, archives=packed)
    assert reader.load(path).id == reader.id(path) == hashlib.sha256(other).hexdigest() and reader.source(path) == other
    assert reader.stamp(path) == (len(other), path.stat().st_mtime_ns)


def test_the_id_and_the_stamp_of_a_member_cost_no_read(
    packed: Archives, images: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, name = tmp_path / "data", "images/shard_001/4.png"
    ids = TileIds(tmp_path / "ids.jsonl")
    reader = TileReader(SETTINGS, ids=ids, archives=packed)
    monkeypatch.setattr(archives.os, "pread", lambda *call: pytest.fail("read"))
    assert reader.id(data / name) == hashlib.sha256(images[name]).hexdigest()
    assert reader.stamp(data / name) == (len(images[name]), (data / "shards" / "1.tar").stat().st_mtime_ns)
    assert len(ids) == 0 and not (tmp_path / "ids.jsonl").exists()
    for absent in (data / "gone.png", data / "shards" / "0.tar" / "x.png"):
        for use in (reader.stamp, reader.id, reader.load, reader.source):
            with pytest.raises(TileError, match=str(absent.name)):
                use(absent)


def test_bad_members_are_told_by_their_paths(pack: Pack, tmp_path: Path, raw_png: Callable) -> None:
    contents = {
        "text.png": b"not an image",
        "empty.png": b"",
        "huge.png": raw_png(31_250, 32_000, 8, 2, b"\0"),
        "long.png": b"x" * 17_000_000,
    }
    packed = Archives([(build_index(pack(tmp_path / "a.tar", contents)), tmp_path)])
    reader = TileReader(TileSettings(max_image_pixels=1000), archives=packed)
    for name, message in [
        ("text.png", "this is not an image"),
        ("empty.png", "empty"),
        ("huge.png", r"1000000000 pixels, more than tiles\.max_image_pixels"),
        ("long.png", r"17000000 bytes, more than an image of tiles\.max_image_pixels = 1000"),
    ]:
        with pytest.raises(TileError, match=message) as told:
            reader.load(tmp_path / name)
        assert str(told.value).startswith(f"{tmp_path / name}: ")
    assert reader.id(tmp_path / "text.png") == hashlib.sha256(b"not an image").hexdigest()


def test_a_member_outside_the_allowed_folders_is_never_read(packed: Archives, images: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "data" / next(iter(images))
    guarded = TileReader(SETTINGS, allowed=lambda one: one != path, archives=packed)
    for use in (guarded.load, guarded.id, guarded.source):
        with pytest.raises(TileError, match=r"outside the folders that may be read.*data\.roots"):
            use(path)

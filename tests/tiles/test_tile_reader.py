"""Tiles from files: one read and one hash each, the order kept, and a clear TileError for whatever is not a readable tile."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stairstep.settings import TileError
from stairstep.tiles import Tile, TileIds, TileReader, TileSettings, decode_image, reader, resize

SETTINGS = TileSettings(max_visual_tokens=16, decode_workers=2, prefetch_mb=1)


@pytest.fixture
def tiles(tmp_path: Path, scene, saved) -> list[Path]:
    paths = []
    for number in range(12):
        paths.append(tmp_path / f"tile {number}.png")
        paths[-1].write_bytes(saved(Image.fromarray(scene(90 + number, 70, number)), "PNG"))
    return paths


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    found = {"opened": 0, "hashed": 0, "decoded": 0}

    def counting(name: str, function):
        def wrapped(*arguments):
            found[name] += 1
            return function(*arguments)

        return wrapped

    monkeypatch.setattr(reader, "_open_at_once", counting("opened", reader._open_at_once))
    monkeypatch.setattr(reader, "tile_id", counting("hashed", reader.tile_id))
    monkeypatch.setattr(reader, "decode_image", counting("decoded", reader.decode_image))
    return found


def _same(tile: Tile, path: Path) -> bool:
    data = path.read_bytes()
    expected = resize(decode_image(data, "", 10**6), SETTINGS.geometry())
    return tile.id == hashlib.sha256(data).hexdigest() and tile.path == path and torch.equal(tile.pixels, expected)


def test_a_tile_is_its_id_and_its_pixels_from_one_read(tiles: list[Path], counts: dict[str, int]) -> None:
    tile = TileReader(SETTINGS).load(str(tiles[0]))
    assert counts == {"opened": 1, "hashed": 1, "decoded": 1}
    assert _same(tile, tiles[0])
    assert tile.pixels.dtype == torch.uint8 and tile.pixels.is_contiguous() and tile.pixels.shape[1] % 32 == 0


def test_ahead_gives_the_same_tiles_in_order(tiles: list[Path]) -> None:
    order = [*tiles, *tiles[::-1]]
    stream = TileReader(SETTINGS).ahead(order)
    assert all(_same(tile, path) for tile, path in zip(stream, order, strict=True))
    assert stream.loaded == len(order) and stream.waited_s >= 0


def test_a_file_is_hashed_once_across_readers(tiles: list[Path], counts: dict[str, int], tmp_path: Path) -> None:
    index = tmp_path / "ids.jsonl"
    first = TileReader(SETTINGS, ids=TileIds(index))
    ids = [tile.id for tile in first.ahead(tiles)]
    assert counts["hashed"] == len(tiles)
    second = TileReader(SETTINGS, ids=TileIds(index))
    assert [second.id(path) for path in tiles] == ids
    assert counts == {"opened": 12, "hashed": 12, "decoded": 12}, "a known id costs no read"
    assert second.load(tiles[3]).id == ids[3] and counts["hashed"] == 12
    changed = tiles[4].read_bytes() + b"more"
    tiles[4].write_bytes(changed)
    assert second.id(tiles[4]) == hashlib.sha256(changed).hexdigest() != ids[4]
    assert counts == {"opened": 14, "hashed": 13, "decoded": 13}


def test_an_id_needs_no_decoding(tmp_path: Path, counts: dict[str, int]) -> None:
    (tmp_path / "x.png").write_bytes(b"not an image")
    assert TileReader(SETTINGS).id(tmp_path / "x.png") == hashlib.sha256(b"not an image").hexdigest()
    assert counts["decoded"] == 0


def test_a_file_that_changes_while_it_is_read_is_not_remembered(tiles: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.fstat
    calls = []

    def touched_meanwhile(descriptor: int) -> os.stat_result:
        calls.append(descriptor)
        os.utime(descriptor, ns=(len(calls), len(calls)))
        return before(descriptor)

    ids = TileIds()
    monkeypatch.setattr(reader.os, "fstat", touched_meanwhile)
    assert TileReader(SETTINGS, ids=ids).load(tiles[0]).id == hashlib.sha256(tiles[0].read_bytes()).hexdigest()
    assert len(calls) >= 2 and len(ids) == 0


def test_bad_tiles_among_good_ones_come_at_their_place(tiles: list[Path]) -> None:
    tiles[2].write_bytes(tiles[2].read_bytes()[:300])
    tiles[5].write_bytes(b"")
    tiles[7].unlink()
    stream = TileReader(SETTINGS).ahead(tiles)
    good, bad = [], []
    while True:
        try:
            good.append(next(stream).path)
        except TileError as error:
            bad.append(str(error))
        except StopIteration:
            break
    assert good == [path for number, path in enumerate(tiles) if number not in (2, 5, 7)]
    assert [message.split(": ")[0] for message in bad] == [str(tiles[number]) for number in (2, 5, 7)]


def test_what_is_no_readable_file_is_told(tmp_path: Path, raw_png) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "huge.png").write_bytes(raw_png(31_250, 32_000, 8, 2, b"\0"))
    with open(tmp_path / "long.png", "wb") as file:
        file.truncate(5_000_000_000)
    for name, message in [
        ("none.png", "there is no such tile"),
        ("folder", "cannot be read .*directory"),
        ("pipe", "expected an image file, found a pipe"),
        ("loop", "cannot be read"),
        ("x" * 300, "cannot be read .*too long"),
        ("huge.png", r"1000000000 pixels, more than tiles\.max_image_pixels"),
        ("long.png", r"5000000000 bytes, more than an image of tiles\.max_image_pixels"),
    ]:
        with pytest.raises(TileError, match=message) as caught:
            TileReader(SETTINGS).load(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: ")
        if name != "huge.png":
            with pytest.raises(TileError, match=message):
                TileReader(SETTINGS).id(tmp_path / name)


def test_a_path_that_is_not_allowed_is_never_opened(tiles: list[Path], counts: dict[str, int]) -> None:
    guarded = TileReader(SETTINGS, allowed=lambda path: path != tiles[1])
    assert guarded.load(tiles[0]).path == tiles[0]
    for use in (guarded.load, guarded.id):
        with pytest.raises(TileError, match=r"tile 1\.png: .*data\.roots"):
            use(tiles[1])
    with pytest.raises(TileError, match=r"tile 1\.png"):
        list(guarded.ahead(tiles))
    assert counts["opened"] <= 1 + len(tiles) - 1


def test_settings_reach_the_reader(tiles: list[Path]) -> None:
    small = TileReader(TileSettings(max_visual_tokens=4, min_visual_tokens=4))
    assert small.load(tiles[0]).pixels.shape[1:].numel() <= 4 * 1024
    assert small.key != TileReader(SETTINGS).key and "4096-4096" in small.key
    with pytest.raises(TileError, match=r"tiles\.max_image_pixels = 6299"):
        TileReader(TileSettings(max_image_pixels=90 * 70 - 1)).load(tiles[0])
    assert np.array_equal(TileReader(TileSettings(max_image_pixels=90 * 70)).load(tiles[0]).pixels.shape, (3, 96, 64))

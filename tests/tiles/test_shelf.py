"""A tile store in an object store: what is named is whole, a reader maps a checked copy, and a copy takes no more room than it may."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from s3_server import changed, cut, status

from stairstep.records import cache
from stairstep.records.places import place
from stairstep.settings import InputError, UnreachableError
from stairstep.tiles import TileSettings, tile_id, tile_key
from stairstep.tiles.shelf import CopiedStore, FolderShelf, ObjectShelf, open_store_at, shelf_at

KEY = tile_key(TileSettings(max_visual_tokens=16).geometry())


@pytest.fixture(autouse=True)
def its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STAIRSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("STAIRSTEP_CACHE_GB", raising=False)
    return tmp_path / "cache"


def tile(seed: int) -> tuple[str, torch.Tensor]:
    """A made-up tile: its id and its pixels."""
    pixels = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, 64, 96), dtype=np.uint8))
    return tile_id(pixels.numpy().tobytes()), pixels


TILES = [tile(seed) for seed in range(12)]


def fill(url: str) -> ObjectShelf:
    """A store of three shards and their manifest."""
    shelf = shelf_at(place(url), KEY)
    assert isinstance(shelf, ObjectShelf)
    shelf.prepare()
    for start in (0, 4, 8):
        assert shelf.write(TILES[start : start + 4])
    shelf.commit(shelf.whole())
    return shelf


def test_pixels_come_back_bit_for_bit_as_from_a_folder(object_root, tmp_path, its_cache):
    shelf = fill(object_root)
    store = open_store_at(place(object_root), KEY)
    assert isinstance(store, CopiedStore)
    assert len(store) == 12
    assert all(torch.equal(store.pixels(id), pixels) for id, pixels in TILES)
    assert store.folder.is_relative_to(its_cache)

    folder = FolderShelf(tmp_path / "folder", KEY)
    folder.prepare()
    for start in (0, 4, 8):
        folder.write(TILES[start : start + 4])
    folder.commit(folder.whole())
    ours = {path.name: path.read_bytes() for path in folder.where.iterdir()}
    assert {name: shelf.store.get(name) for name in shelf.store.files()} == ours, "a folder can be copied to a store"
    assert shelf.ids(shelf.whole()) == {id for id, _ in TILES}

    copy = pickle.loads(pickle.dumps(store))
    assert isinstance(copy, CopiedStore)
    assert torch.equal(copy.pixels(TILES[5][0]), TILES[5][1])


def test_a_place_chooses_the_shelf(tmp_path, s3):
    assert isinstance(shelf_at(tmp_path, KEY), FolderShelf)
    assert open_store_at(tmp_path, KEY) is None
    assert open_store_at(place(s3.url("stairs/none")), KEY) is None
    with pytest.raises(InputError, match="no bucket"):
        shelf_at(place(s3.url("nobody/x")), KEY).prepare()
    with pytest.raises(InputError, match="no bucket"):
        open_store_at(place(s3.url("nobody/x")), KEY)


def test_what_no_manifest_names_is_not_read(s3, caplog):
    root = place(s3.url("stairs/tiles"))
    shelf = ObjectShelf(root, KEY)
    shelf.write(TILES[:4])
    assert open_store_at(root, KEY) is None, "a job that died before its manifest"
    shelf.commit(shelf.whole())
    shelf.write(TILES[4:8])
    assert len(open_store_at(root, KEY) or ()) == 4
    shelf.commit(shelf.whole())
    assert len(open_store_at(root, KEY) or ()) == 8
    assert len([name for name in s3.names() if "manifest" in name]) == 1, "the first says nothing more"
    with caplog.at_level(logging.WARNING):
        assert open_store_at(root, "another-key") is None
    assert f"only of {KEY}" in caplog.text


def test_a_copy_is_made_once_and_follows_the_store(s3):
    url = s3.url("stairs/tiles")
    shelf = fill(url)
    open_store_at(place(url), KEY)
    got = s3.asked("GET", ".arrow")
    assert len(open_store_at(place(url), KEY) or ()) == 12
    assert s3.asked("GET", ".arrow") == got, "nothing is fetched twice"
    first = min(name for name in shelf.names())
    shelf.store.remove([first])
    shelf.commit(shelf.whole())
    store = open_store_at(place(url), KEY)
    assert store is not None
    assert len(store) == 8
    assert not (store.folder / KEY / first).exists()


def test_a_shard_that_arrives_damaged_is_fetched_again_or_passed_over(s3, caplog):
    url = s3.url("stairs/tiles")
    names = fill(url).names()
    s3.misbehave("GET", names[0], changed(5000), times=1)
    s3.misbehave("GET", names[1], changed(5000), times=None)
    s3.misbehave("GET", names[2], cut(3000), times=None)
    with caplog.at_level(logging.WARNING):
        store = open_store_at(place(url), KEY)
    assert store is not None
    assert len(store) == 4, "the tiles of the others are decoded from their files"
    assert "are damaged" in caplog.text
    assert "2 of 3 shards are not copied here" in caplog.text
    s3.behave()
    assert len(open_store_at(place(url), KEY) or ()) == 12


def test_a_torn_shard_is_removed_by_who_fills_the_store(s3, caplog):
    shelf = fill(s3.url("stairs/tiles"))
    name = shelf.names()[0]
    object_name = f"stairs/tiles/{KEY}/{name}"
    s3.put(object_name, s3.objects[object_name][:-100])
    with caplog.at_level(logging.WARNING):
        assert len(shelf.whole()) == 2
    assert "torn" in caplog.text
    assert object_name not in s3.names()


def test_a_write_that_fails_names_nothing(s3):
    shelf = ObjectShelf(place(s3.url("stairs/tiles")), KEY)
    s3.misbehave("PUT", ".arrow", status(503), times=None)
    with pytest.raises(UnreachableError, match=r"shard-\w+\.arrow"):
        shelf.write(TILES)
    assert s3.names() == []
    assert shelf.write([]) is None


def test_copies_take_no_more_room_than_they_may(s3, its_cache, monkeypatch, caplog):
    one, two = s3.url("stairs/one"), s3.url("stairs/two")
    sizes = [shard.bytes for shard in fill(one).whole()]
    fill(two)
    monkeypatch.setenv("STAIRSTEP_CACHE_GB", str(2.5 * max(sizes) / 1e9))
    with caplog.at_level(logging.WARNING):
        first = open_store_at(place(one), KEY)
    assert first is not None
    assert len(first) == 8
    assert "STAIRSTEP_CACHE_GB" in caplog.text
    second = open_store_at(place(two), KEY)
    assert second is not None
    assert len(second) == 8
    assert not first.folder.exists(), "what was unused for longest went"
    assert torch.equal(first.pixels(next(id for id, _ in TILES if id in first)), dict(TILES)[next(id for id, _ in TILES if id in first)])
    monkeypatch.setenv("STAIRSTEP_CACHE_GB", "much")
    with pytest.raises(InputError, match="STAIRSTEP_CACHE_GB: expected a number of GB, found 'much'"):
        cache.cache_limit()


def test_a_cache_that_cannot_be_written_is_told(s3, tmp_path, monkeypatch):
    fill(s3.url("stairs/tiles"))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STAIRSTEP_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="STAIRSTEP_CACHE"):
        open_store_at(place(s3.url("stairs/tiles")), KEY)


def test_a_manifest_that_is_none_is_told(s3):
    url = s3.url("stairs/tiles")
    shelf = fill(url)
    shelf.put("manifest-0.json", json.dumps({"format": 1, "shards": [{"file": "../../x", "tiles": 1, "bytes": 1}]}))
    with pytest.raises(InputError, match="no manifest of a tile store"):
        open_store_at(place(url), KEY)

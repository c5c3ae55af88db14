"""The tile store: pixels come back bit for bit, a shard is whole or not there, and a reader sees what manifests name."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from stairstep.records.folders import sweep
from stairstep.settings import DataError, TileError
from stairstep.tiles import TileReader, TileSettings, TileStore, open_store, tile_id, tile_key
from stairstep.tiles.store import (
    ids_of,
    named_shards,
    shard_name,
    whole_shards,
    write_manifest,
    write_shard,
)

KEY = tile_key(TileSettings(max_visual_tokens=16).geometry())


def tile(seed: int, height: int = 64, width: int = 96) -> tuple[str, torch.Tensor]:
    """A made-up tile: its id and its pixels."""
    pixels = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8))
    return tile_id(pixels.numpy().tobytes()), pixels


def filled(folder: Path, tiles: list[tuple[str, torch.Tensor]]) -> TileStore:
    """A store with one shard of these tiles."""
    shard = write_shard(folder / KEY, KEY, tiles)
    assert shard is not None
    write_manifest(folder / KEY, KEY, [shard])
    return TileStore(folder, KEY)


def test_pixels_come_back_bit_for_bit(tmp_path: Path) -> None:
    tiles = [tile(seed, 32 * (1 + seed % 4), 32 * (1 + seed % 3)) for seed in range(70)]  # more than one batch of rows
    store = filled(tmp_path, tiles)
    assert len(store) == 70
    for one, pixels in tiles:
        assert one in store
        assert store.size(one) == tuple(pixels.shape[1:])
        assert torch.equal(store.pixels(one), pixels)
        assert 0 < store.stored_bytes(one) < pixels.numel() + 200
    assert tile(1000)[0] not in store


def test_pages_are_quick_to_unpack_and_pictures_small(tmp_path: Path) -> None:
    """Grey marks on white go under LZ4, what would stay large under zstd; both come back bit for bit."""
    page = torch.full((3, 64, 96), 255, dtype=torch.uint8)
    page[:, 20:22, 10:80] = 32
    ramp = torch.arange(96, dtype=torch.uint8).repeat(64, 1)
    smooth = torch.stack([ramp * 2 + torch.arange(64, dtype=torch.uint8)[:, None], ramp, 255 - ramp])
    smooth = smooth + torch.from_numpy(np.random.default_rng(0).integers(0, 4, (3, 64, 96), dtype=np.uint8))
    tiles = [(tile_id(one.numpy().tobytes()), one) for one in (page, smooth)]
    store = filled(tmp_path, tiles)
    assert [batch.column("codec").to_pylist() for batch, _ in store._tables] == [[0, 1]]
    assert all(torch.equal(store.pixels(one), pixels) for one, pixels in tiles)
    assert store.stored_bytes(tiles[0][0]) * 5 <= page.numel()
    assert store.stored_bytes(tiles[1][0]) < smooth.numel()


def test_pixels_are_writable_memory_of_their_own(tmp_path: Path) -> None:
    (one, pixels), *_ = tiles = [tile(0), tile(1)]
    store = filled(tmp_path, tiles)
    store.pixels(one).zero_()
    assert torch.equal(store.pixels(one), pixels)


def test_a_shard_without_a_manifest_is_not_seen_by_readers_and_not_lost(tmp_path: Path) -> None:
    tiles = [tile(seed) for seed in range(3)]
    filled(tmp_path, tiles[:1])
    later = write_shard(tmp_path / KEY, KEY, tiles[1:])
    assert later is not None
    assert tiles[1][0] not in TileStore(tmp_path, KEY)
    shards = whole_shards(tmp_path / KEY, KEY)
    assert later in shards
    assert ids_of(tmp_path / KEY, KEY, shards) == {one for one, _ in tiles}
    write_manifest(tmp_path / KEY, KEY, shards)
    store = TileStore(tmp_path, KEY)
    assert len(store) == 3
    assert named_shards(tmp_path / KEY) == set(shards)


def test_manifests_of_two_jobs_add_up(tmp_path: Path) -> None:
    first, second = (write_shard(tmp_path / KEY, KEY, [tile(seed)]) for seed in range(2))
    assert first is not None
    assert second is not None
    write_manifest(tmp_path / KEY, KEY, [first])
    write_manifest(tmp_path / KEY, KEY, [second])
    assert len(TileStore(tmp_path, KEY)) == 2


def test_a_manifest_that_says_nothing_more_is_removed(tmp_path: Path) -> None:
    shards = [write_shard(tmp_path / KEY, KEY, [tile(seed)]) for seed in range(3)]
    for count in (1, 2, 3):
        write_manifest(tmp_path / KEY, KEY, [one for one in shards[:count] if one is not None])
    assert len(list((tmp_path / KEY).glob("manifest-*.json"))) == 1
    assert len(TileStore(tmp_path, KEY)) == 3


def test_the_same_tiles_are_the_same_file(tmp_path: Path) -> None:
    tiles = [tile(seed) for seed in range(3)]
    first = write_shard(tmp_path / KEY, KEY, tiles)
    again = write_shard(tmp_path / KEY, KEY, tiles)
    assert first == again
    assert [path.name for path in (tmp_path / KEY).iterdir()] == [shard_name([one for one, _ in tiles])]


def test_no_tiles_are_no_shard(tmp_path: Path) -> None:
    assert write_shard(tmp_path / KEY, KEY, []) is None
    assert not list((tmp_path / KEY).iterdir())


def test_a_failing_source_leaves_nothing(tmp_path: Path) -> None:
    def tiles():
        for seed in range(40):
            yield tile(seed)
        raise RuntimeError("the source ends")

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / KEY, KEY, tiles())
    assert not list((tmp_path / KEY).iterdir())


def _write_for_ever(folder: Path) -> None:
    def tiles():
        seed = 0
        while True:
            yield tile(seed)
            seed += 1

    write_shard(folder / KEY, KEY, tiles())


def test_a_killed_writer_leaves_only_what_is_swept(tmp_path: Path) -> None:
    writer = multiprocessing.get_context("spawn").Process(target=_write_for_ever, args=(tmp_path,))
    writer.start()
    deadline = time.monotonic() + 60
    while not [one for one in (tmp_path / KEY).glob(".shard.tmp-*") if one.stat().st_size > 100_000]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert sweep(tmp_path / KEY) == [], "its writer lives"
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    assert whole_shards(tmp_path / KEY, KEY) == []
    assert open_store(tmp_path, KEY) is None
    assert len(sweep(tmp_path / KEY)) == 1
    assert not list((tmp_path / KEY).iterdir())


def test_a_torn_shard_is_passed_over_and_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled(tmp_path, [tile(seed) for seed in range(40)])
    (path,) = (tmp_path / KEY).glob("shard-*.arrow")
    path.write_bytes(path.read_bytes()[:-1000])
    assert len(TileStore(tmp_path, KEY)) == 0
    assert "torn" in caplog.text
    assert whole_shards(tmp_path / KEY, KEY) == []
    assert not path.exists()
    assert len(TileStore(tmp_path, KEY)) == 0, "a manifest that names what is gone stops nobody"
    again = write_shard(tmp_path / KEY, KEY, [tile(0)])
    assert again is not None
    write_manifest(tmp_path / KEY, KEY, [again])
    assert len(list((tmp_path / KEY).glob("manifest-*.json"))) == 1, "the manifest that named the torn one goes"
    assert len(TileStore(tmp_path, KEY)) == 1


def test_a_shard_that_cannot_be_read_now_is_never_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No more open files, no permission, a network that is away: whatever says so, the shard is good."""
    one, pixels = tile(5)
    filled(tmp_path, [(one, pixels)])
    most = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, most[1]))  # one for the listing, none for a shard beside it
    held = os.dup(0)
    try:
        found = _safely(lambda: whole_shards(tmp_path / KEY, KEY))
    finally:
        os.close(held)
        resource.setrlimit(resource.RLIMIT_NOFILE, most)
    assert not found
    assert len(list((tmp_path / KEY).glob("shard-*.arrow"))) == 1
    assert len(whole_shards(tmp_path / KEY, KEY)) == 1
    assert torch.equal(TileStore(tmp_path, KEY).pixels(one), pixels)


def _safely(call):
    try:
        return call()
    except OSError:
        return []


def test_a_shard_under_anothers_name_and_a_stray_copy(tmp_path: Path) -> None:
    filled(tmp_path, [tile(0)])
    (path,) = (tmp_path / KEY).glob("shard-*.arrow")
    (tmp_path / KEY / "shard-copy.arrow").write_bytes(path.read_bytes())
    other = tmp_path / KEY / shard_name([tile(1)[0]])
    other.write_bytes(path.read_bytes())
    shards = whole_shards(tmp_path / KEY, KEY)
    assert [one.file for one in shards] == [path.name]
    assert not other.exists()
    write_manifest(tmp_path / KEY, KEY, shards)
    assert len(TileStore(tmp_path, KEY)) == 1


@pytest.mark.parametrize("smooth", [True, False])
def test_every_flipped_bit_is_seen(tmp_path: Path, smooth: bool) -> None:
    """Under either codec; and a reader that has the file decodes it instead."""
    plain = torch.full((3, 64, 96), 200, dtype=torch.uint8)
    plain[:, 5:9, 10:60] = 17
    one, pixels = (tile_id(b"page"), plain) if smooth else tile(3)
    filled(tmp_path, [(one, pixels)])
    (path,) = (tmp_path / KEY).glob("shard-*.arrow")
    store = TileStore(tmp_path, KEY)
    batch, row, _ = store._row(one)
    packed = batch.column("pixels")[row].as_buffer().to_pybytes()
    assert batch.column("codec")[row].as_py() == (0 if smooth else 1)
    data = path.read_bytes()
    start = data.index(packed)
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(packed), 60):
        flipped = bytearray(data)
        flipped[start + place] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        with pytest.raises(TileError, match=rf"{path.name}.*{one}.*damaged"):
            TileStore(tmp_path, KEY).pixels(one)


def test_a_reader_decodes_what_is_damaged_in_the_store(tmp_path: Path, tile_file, caplog: pytest.LogCaptureFixture) -> None:
    settings = TileSettings(max_visual_tokens=16)
    path = tile_file("a.png", 90, 70)
    plain = TileReader(settings).load(path)
    store = filled(tmp_path / "store", [(plain.id, plain.pixels)])
    store.pixels = lambda id, pinned=False: (_ for _ in ()).throw(TileError("damaged"))  # type: ignore[method-assign]
    assert torch.equal(TileReader(settings, store=store).load(path).pixels, plain.pixels)
    assert "decoded from its file" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pixels_in_pinned_memory_are_the_same(tmp_path: Path) -> None:
    one, pixels = tile(4)
    found = filled(tmp_path, [(one, pixels)]).pixels(one, pinned=True)
    assert found.is_pinned()
    assert torch.equal(found, pixels)


def test_a_foreign_shard_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = write_shard(tmp_path / KEY, "another key", [tile(0)])
    assert shard is not None
    write_manifest(tmp_path / KEY, KEY, [shard])
    assert len(TileStore(tmp_path, KEY)) == 0
    with pa.OSFile(str(tmp_path / KEY / shard.file), "wb") as file, pa.ipc.new_file(file, pa.schema([("x", pa.int8())])):
        pass
    assert len(TileStore(tmp_path, KEY)) == 0
    assert caplog.text.count("no shard of the tiles") == 2


def test_a_shard_that_is_there_is_not_replaced_under_its_readers(tmp_path: Path) -> None:
    filled(tmp_path, [tile(0)])
    (path,) = (tmp_path / KEY).glob("shard-*.arrow")
    before = path.stat().st_ino
    assert write_shard(tmp_path / KEY, KEY, [tile(0)]) is not None
    assert path.stat().st_ino == before
    assert [one.name for one in (tmp_path / KEY).glob("*shard*")] == [path.name]


def test_a_manifest_of_another_format_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / KEY).mkdir(parents=True)
    (tmp_path / KEY / "manifest-1.json").write_text('{"format": 2, "shards": []}')
    assert len(TileStore(tmp_path, KEY)) == 0
    assert "format 2" in caplog.text


@pytest.mark.parametrize("text", ["{}", '{"format": 1, "shards": [{"file": "x"}]}', "[]"])
def test_a_manifest_that_is_none_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / KEY).mkdir(parents=True)
    (tmp_path / KEY / "manifest-1.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest-1\.json"):
        TileStore(tmp_path, KEY)


@pytest.mark.parametrize("name", ["../outside.arrow", "/etc/passwd", "a/b.arrow", ".hidden.arrow"])
def test_a_manifest_names_no_file_outside(tmp_path: Path, name: str) -> None:
    (tmp_path / KEY).mkdir(parents=True)
    manifest = {"format": 1, "shards": [{"file": name, "tiles": 1, "bytes": 1}]}
    (tmp_path / KEY / "manifest-1.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="no manifest"):
        TileStore(tmp_path, KEY)


def test_pixels_of_another_kind_are_told_and_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    filled(tmp_path, [tile(0)])
    assert open_store(tmp_path, tile_key(TileSettings(max_visual_tokens=8).geometry())) is None
    assert "jobs.preprocess" in caplog.text
    assert open_store(tmp_path / "nowhere", KEY) is None


def test_a_copy_for_another_process_maps_the_files_itself(tmp_path: Path) -> None:
    one, pixels = tile(7)
    store = pickle.loads(pickle.dumps(filled(tmp_path, [tile(7)])))
    assert torch.equal(store.pixels(one), pixels)


@pytest.fixture
def tile_file(tmp_path: Path, scene, saved):
    """tile_file(name, height, width, seed=0): a PNG in the test's folder."""

    def make(name: str, height: int, width: int, seed: int = 0) -> Path:
        path = tmp_path / name
        path.write_bytes(saved(Image.fromarray(scene(height, width, seed)), "PNG"))
        return path

    return make


def test_a_reader_takes_a_known_tile_from_the_store_without_opening_its_file(tmp_path: Path, tile_file) -> None:
    settings = TileSettings(max_visual_tokens=16)
    path = tile_file("a.png", 90, 70)
    plain = TileReader(settings).load(path)
    reader = TileReader(settings, store=filled(tmp_path / "store", [(plain.id, plain.pixels)]))
    first = reader.load(path)  # reads the file for its id, decodes nothing
    assert (first.id, first.path) == (plain.id, path)
    assert torch.equal(first.pixels, plain.pixels)
    os.chmod(path, 0)
    opened: list[Path] = []
    reader._read = lambda path: opened.append(path)  # type: ignore[method-assign,assignment]
    assert torch.equal(reader.load(path).pixels, plain.pixels)
    assert not opened


def test_a_changed_file_is_not_taken_from_the_store(tmp_path: Path, tile_file) -> None:
    settings = TileSettings(max_visual_tokens=16)
    path = tile_file("a.png", 90, 70)
    plain = TileReader(settings).load(path)
    reader = TileReader(settings, store=filled(tmp_path / "store", [(plain.id, plain.pixels)]))
    reader.load(path)
    other = tile_file("b.png", 90, 70, seed=1)
    os.replace(other, path)
    changed = reader.load(path)
    assert changed.id != plain.id
    assert torch.equal(changed.pixels, TileReader(settings).load(path).pixels)

"""Filling the tile store: every tile of a recipe once, bad ones named, killed and full-disk jobs gone on with."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stairstep.data import ArchiveSource, DataSettings, PairSource, QuestionSetSource
from stairstep.evaluation.settings import EvaluationSettings
from stairstep.records import RunSettings
from stairstep.settings import DataError, InputError, RecipeError
from stairstep.tasks import Recipe, preprocessing
from stairstep.tasks.loading import load_tiles, tile_reader
from stairstep.tasks.preprocessing import Filling, judge, preprocess
from stairstep.tasks.resolve import resolve
from stairstep.tasks.tile_check import find_bad_tiles, good_tiles, read_quarantine
from stairstep.tiles import Archives, TileReader, TileSettings, TileStore, tile_id


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tiles a shard, so that a handful of tiles are several blocks."""
    monkeypatch.setattr(preprocessing, "SHARD_TILES", 5)
    monkeypatch.setattr(preprocessing, "_HASHED_TOGETHER", 3)


@pytest.fixture
def world(tmp_path: Path) -> SimpleNamespace:
    """Twelve rows over 24 tiles of several shapes, two of them the same bytes, and a question set of six tiles."""
    data = tmp_path / "data"
    (data / "tiles").mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [f"p{index}.png" for index in range(12)] + [f"n{index}.png" for index in range(12)]
    for index, name in enumerate([*names, *(f"tiles/A{index}_chunk_0.png" for index in range(6))]):
        shape = (33 + 7 * (index % 5), 40 + 11 * (index % 3), 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(data / name)
    shutil.copy(data / "p0.png", data / "n11.png")
    lines = [{"query": f"q{index}", "chunk_path": f"p{index}.png", "neg_chunk_paths": [f"n{index}.png"]} for index in range(12)]
    (data / "train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    questions = [{"id": "a", "problem": "a?", "answer": "a"}]
    (data / "set.json").write_text(json.dumps({"questions": questions, "golden_mapping": {"a": ["A0"]}, "tiles_dir": "tiles"}))
    recipe = Recipe(
        run=RunSettings(name="run", root=str(tmp_path / "runs")),
        data=DataSettings(roots=(str(data),), train=(PairSource("train.jsonl"),), hard_negatives=1),
        tiles=TileSettings(max_visual_tokens=16),
        evaluation=EvaluationSettings(sets=(QuestionSetSource("set.json"),)),
    )
    return SimpleNamespace(data=data, recipe=recipe, store=tmp_path / "runs" / "tiles")


def store_of(world: SimpleNamespace) -> TileStore:
    """The store that readers see."""
    return TileStore(world.store, tile_reader(world.recipe, stored=False).key)


def assert_whole(world: SimpleNamespace, but: tuple[str, ...] = ()) -> None:
    """Every tile of the recipe is in the store with the pixels that decoding its file gives."""
    store, direct = store_of(world), TileReader(world.recipe.tiles)
    paths = [path for path in load_tiles(world.recipe, Archives()) if path.name not in but]
    assert len(paths) == 30 - len(but)
    for path in paths:
        one = tile_id(path.read_bytes())
        assert torch.equal(store.pixels(one), direct.load(path).pixels), path
    assert len(store) == len({tile_id(path.read_bytes()) for path in paths})


def test_every_tile_of_rows_and_question_sets_is_made_once(world: SimpleNamespace) -> None:
    summary = preprocess(world.recipe)
    assert (summary.files, summary.tiles, summary.there_before, summary.made, summary.bad) == (30, 29, 0, 29, ())
    assert_whole(world)
    shards = list((world.store / store_of(world).key).glob("shard-*.arrow"))
    assert summary.stored_bytes == sum(one.stat().st_size for one in shards)
    distinct = {tile_id(path.read_bytes()) for path in load_tiles(world.recipe, Archives())}
    pixels = sum(height * width for height, width in map(store_of(world).size, distinct))
    assert summary.float32_bytes == pixels * 3 * 2 * 4  # three channels, two frames, four bytes
    assert "29 were made" in "\n".join(summary.lines())


def test_a_second_job_makes_nothing(world: SimpleNamespace) -> None:
    preprocess(world.recipe)
    before = sorted(world.store.rglob("*"))
    summary = preprocess(world.recipe)
    assert (summary.there_before, summary.made) == (29, 0)
    assert sorted(world.store.rglob("*")) == before


def test_new_tiles_alone_are_made(world: SimpleNamespace) -> None:
    preprocess(world.recipe)
    Image.fromarray(np.zeros((50, 60, 3), dtype=np.uint8)).save(world.data / "p3.png")
    summary = preprocess(world.recipe)
    assert (summary.there_before, summary.made) == (28, 1)
    one = tile_id((world.data / "p3.png").read_bytes())
    assert torch.equal(store_of(world).pixels(one), TileReader(world.recipe.tiles).load(world.data / "p3.png").pixels)


def test_every_bad_tile_is_named_and_the_rest_is_there(world: SimpleNamespace) -> None:
    (world.data / "p4.png").write_bytes((world.data / "p4.png").read_bytes()[:200])
    (world.data / "n7.png").write_bytes(b"")
    (world.data / "tiles" / "A2_chunk_0.png").write_bytes(b"no image at all")
    summary = preprocess(world.recipe)
    bad = ("p4.png", "n7.png", "A2_chunk_0.png")
    assert {Path(one.tile).name for one in summary.bad} == set(bad)
    listed = read_quarantine(summary.folder / "quarantine.jsonl")
    files = [path for path in load_tiles(world.recipe, Archives()) if path.name in bad]
    assert {(one.tile, one.id) for one in listed} == {(str(path), tile_id(path.read_bytes())) for path in files}
    assert all(one.where for one in listed)
    assert_whole(world, bad)
    with pytest.raises(DataError, match=r"3 tiles cannot be used.*max_quarantined accepts none.*quarantine\.jsonl"):
        judge(summary, world.recipe)
    mended = preprocess(world.recipe)
    assert {Path(one.tile).name for one in mended.bad} == set(bad), "told again for as long as they are bad"


def test_a_file_that_cannot_be_opened_is_named_too(world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    real = TileReader._read

    def refuse(self: TileReader, path: Path):
        if path.name == "p1.png":
            from stairstep.settings import TileError

            raise TileError(f"{path}: this tile cannot be read (Permission denied)")
        return real(self, path)

    monkeypatch.setattr(TileReader, "_read", refuse)
    summary = preprocess(world.recipe)
    assert [Path(one.tile).name for one in summary.bad] == ["p1.png"]
    assert summary.bad[0].where.endswith("train.jsonl:2")


def test_a_file_that_changes_meanwhile_is_not_kept_under_its_old_id(world: SimpleNamespace) -> None:
    def change_first(work, items):
        if isinstance(work, Filling):
            Image.fromarray(np.full((40, 40, 3), 7, dtype=np.uint8)).save(world.data / "p5.png")
        return map(work, items)

    summary = preprocess(world.recipe, change_first)
    assert [Path(one.tile).name for one in summary.bad] == ["p5.png"]
    assert "changed" in summary.bad[0].reason
    assert tile_id((world.data / "p5.png").read_bytes()) not in store_of(world)
    again = preprocess(world.recipe)
    assert (again.made, again.bad) == (1, ()), "as the message says, the next job has it"
    assert_whole(world)


def test_a_change_that_keeps_size_and_time_is_found_when_the_file_is_read(world: SimpleNamespace) -> None:
    path = world.data / "p5.png"
    stat = path.stat()
    preprocess(world.recipe, stop=lambda: True)  # ids alone
    plain = bytearray(path.read_bytes())
    preprocess(replace(world.recipe, tiles=replace(world.recipe.tiles, store=str(world.data.parent / "elsewhere"))))
    plain[-5] ^= 1  # in the checksum of the last chunk, which nobody needs for the pixels
    path.write_bytes(plain)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    first = preprocess(world.recipe)
    assert [Path(one.tile).name for one in first.bad] == ["p5.png"]
    second = preprocess(world.recipe)
    assert second.bad == ()
    assert tile_id(bytes(plain)) in store_of(world)


def test_an_error_that_nobody_thought_of_names_its_tile(world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    real = TileReader.load

    def odd(self: TileReader, path: Path | str):
        if Path(path).name == "n2.png":
            raise RuntimeError("one odd tile")
        return real(self, path)

    monkeypatch.setattr(TileReader, "load", odd)
    summary = preprocess(world.recipe)
    assert [Path(one.tile).name for one in summary.bad] == ["n2.png"]
    assert "RuntimeError: one odd tile" in summary.bad[0].reason
    assert_whole(world, ("n2.png",))


def test_two_recipes_over_one_store_keep_each_others_quarantine(world: SimpleNamespace) -> None:
    (world.data / "p4.png").write_bytes(b"")
    whole = preprocess(world.recipe)
    alone = replace(world.recipe, data=replace(world.recipe.data, train=()))
    (world.data / "tiles" / "A2_chunk_0.png").write_bytes(b"")
    other = preprocess(alone)
    assert other.folder == whole.folder
    listed = read_quarantine(whole.folder / "quarantine.jsonl")
    assert {Path(one.tile).name for one in listed} == {"p4.png", "A2_chunk_0.png"}
    Image.fromarray(np.zeros((50, 60, 3), dtype=np.uint8)).save(world.data / "p4.png")
    preprocess(world.recipe)
    assert [Path(one.tile).name for one in read_quarantine(whole.folder / "quarantine.jsonl")] == ["A2_chunk_0.png"]


def test_what_another_job_makes_meanwhile_is_not_made_again(world: SimpleNamespace) -> None:
    (world.data / "p4.png").write_bytes(b"")  # its block has another name than planned
    before: list[str] = []

    def behind_another(work, items):
        if isinstance(work, Filling):
            preprocess(world.recipe)
            before.extend(str(path.stat().st_ino) for path in world.store.rglob("shard-*.arrow"))
        return map(work, items)

    summary = preprocess(world.recipe, behind_another)
    assert summary.made == 0
    assert [str(path.stat().st_ino) for path in world.store.rglob("shard-*.arrow")] == before
    assert sum(batch.num_rows for batch, _ in store_of(world)._tables) == len(store_of(world)) == 28


def test_a_place_that_is_no_folder_is_told(world: SimpleNamespace) -> None:
    (world.data.parent / "file").write_text("")
    for place in ("file", "file/below"):
        recipe = replace(world.recipe, tiles=replace(world.recipe.tiles, store=str(world.data.parent / place)))
        with pytest.raises(InputError, match=r"tiles\.store.*found a file"):
            preprocess(recipe)


def test_the_place_of_a_store_is_resolved(world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAST", str(world.data))
    named = resolve(replace(world.recipe, tiles=replace(world.recipe.tiles, store="$FAST/tiles")))
    assert named.tiles.store == f"{world.data}/tiles"
    remote = resolve(replace(world.recipe, tiles=replace(world.recipe.tiles, store="s3://bucket/tiles")))
    assert remote.tiles.store == "s3://bucket/tiles"
    monkeypatch.setenv("FAST", "s3://id:secret@bucket")
    with pytest.raises(InputError, match="holds credentials"):
        resolve(replace(world.recipe, tiles=replace(world.recipe.tiles, store="$FAST/tiles")))


def test_a_store_in_an_object_store_is_filled_and_read(world: SimpleNamespace, s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped and gone on with, a bad tile listed; the pixels are those of the files."""
    monkeypatch.setenv("STAIRSTEP_CACHE", str(world.data.parent / "cache"))
    (world.data / "p3.png").write_bytes(b"no image")
    recipe = replace(world.recipe, tiles=replace(world.recipe.tiles, store=s3.url("stairs/tiles")))
    stopped = preprocess(recipe, stop=lambda: any(name.endswith(".arrow") for name in s3.names()))
    assert stopped.stopped
    whole = preprocess(recipe)
    assert len(whole.bad) == 1
    assert 0 < stopped.made < whole.made + stopped.made == 28
    assert "s3://stairs/tiles/" in whole.lines()[1]
    quarantine = next(name for name in s3.names() if name.endswith("quarantine.jsonl"))
    assert b"p3.png" in s3.objects[quarantine]
    assert preprocess(recipe).made == 0
    reader, direct = tile_reader(recipe), TileReader(recipe.tiles)
    paths = [path for path in load_tiles(recipe, Archives()) if path.name != "p3.png"]
    assert all(reader.has_stored(path) and torch.equal(reader.load(path).pixels, direct.load(path).pixels) for path in paths)


def _with_little_room(recipe: Recipe, most: int, told: Any) -> None:
    """A job on a file system that takes no file of more than so many bytes."""
    preprocessing.SHARD_TILES = 5
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    try:
        preprocess(recipe)
    except OSError as error:
        told.put((error.errno, error.filename))


@pytest.mark.parametrize("most", [20_000, 1_500])
def test_a_file_system_that_is_full_leaves_nothing_torn(world: SimpleNamespace, most: int) -> None:
    """Full at the first or at some later write of a shard: a real one, by the limit on the size of files."""
    context = multiprocessing.get_context("spawn")
    told = context.SimpleQueue()
    job = context.Process(target=_with_little_room, args=(world.recipe, most, told))
    job.start()
    job.join()
    assert not told.empty(), "it ran out of room"
    number, where = told.get()
    assert number == errno.EFBIG
    assert str(world.store) in str(where) or str(world.store.parent) in str(where)
    assert not list(world.store.rglob(".*"))
    summary = preprocess(world.recipe)
    assert summary.made + summary.there_before == 29
    assert_whole(world)


def test_a_stopped_job_keeps_what_it_made_and_the_next_goes_on(world: SimpleNamespace) -> None:
    calls: list[int] = []

    def stop_after_two_blocks() -> bool:
        calls.append(1)
        return len(calls) >= 12  # ten groups of files are hashed first

    summary = preprocess(world.recipe, stop=stop_after_two_blocks)
    assert summary.stopped
    assert summary.made in (9, 10), "two shards, one of which may be the last and short"
    assert len(store_of(world)) == summary.made
    again = preprocess(world.recipe)
    assert (again.there_before, again.made, again.stopped) == (summary.made, 29 - summary.made, False)
    assert_whole(world)


def test_a_job_stopped_while_hashing_makes_nothing_and_forgets_nothing(world: SimpleNamespace) -> None:
    summary = preprocess(world.recipe, stop=lambda: True)
    assert summary.stopped
    assert summary.made == 0
    assert not list(world.store.rglob("*.arrow"))
    assert len(tile_reader(world.recipe).ids) == 3


def test_what_a_killed_job_left_is_taken_in(world: SimpleNamespace) -> None:
    def dies(work, items):
        for number, item in enumerate(items):
            if isinstance(work, Filling) and number == 3:
                raise KeyboardInterrupt
            yield work(item)

    with pytest.raises(KeyboardInterrupt):
        preprocess(world.recipe, dies)
    assert not list(world.store.rglob("manifest-*.json")), "readers see nothing of it yet"
    summary = preprocess(world.recipe)
    assert summary.there_before in (14, 15), "three shards, one of which may be the last and short"
    assert summary.made == 29 - summary.there_before
    assert_whole(world)


def test_a_full_disk_leaves_whole_shards_only_and_the_next_job_goes_on(world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    real = os.fsync

    def full(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        preprocess(world.recipe)
    monkeypatch.undo()
    monkeypatch.setattr(preprocessing, "SHARD_TILES", 5)
    assert not list(world.store.rglob(".shard*"))
    summary = preprocess(world.recipe)
    assert summary.there_before in (9, 10), "two shards, one of which may be the last and short"
    assert 0 < summary.there_before < 29
    assert_whole(world)


def test_training_and_evaluation_take_from_the_store(world: SimpleNamespace) -> None:
    preprocess(world.recipe)
    reader = tile_reader(world.recipe)
    assert reader.store is not None
    reader._read = lambda path: pytest.fail(f"{path} was read")  # type: ignore[method-assign]
    paths = list(load_tiles(world.recipe, Archives()))
    with reader.ahead(paths) as tiles:
        found = [(tile.path, tile.id) for tile in tiles]
    assert found == [(path, tile_id(path.read_bytes())) for path in paths]
    assert find_bad_tiles(load_tiles(world.recipe, Archives()), reader, good_tiles(world.recipe)) == []


def test_a_recipe_without_tiles_is_told(world: SimpleNamespace) -> None:
    with pytest.raises(RecipeError, match="names a tile"):
        preprocess(replace(world.recipe, data=DataSettings(), evaluation=EvaluationSettings()))


def test_tiles_in_archives_are_made_as_those_in_files(world: SimpleNamespace) -> None:
    """The same store from tar archives, each indexed once by the spread work and then only opened."""
    plain = preprocess(world.recipe)
    expected = {one: store_of(world).pixels(one) for one in {tile_id(path.read_bytes()) for path in load_tiles(world.recipe, Archives())}}
    for number in range(3):
        with tarfile.open(world.data / f"part{number}.tar", "w") as tar:
            for path in sorted(world.data.glob("[pn]*.png"))[number::3]:
                tar.add(path, path.name)
    for path in world.data.glob("[pn]*.png"):
        path.unlink()
    recipe = replace(
        world.recipe,
        run=RunSettings(name="run", root=str(world.data.parent / "packed")),
        data=replace(world.recipe.data, archives=(ArchiveSource("*.tar"),)),
    )
    spread: list[tuple[str, int]] = []

    def counted(work, items):
        spread.append((type(work).__name__, len(items)))
        return map(work, items)

    summary = preprocess(recipe, counted)
    assert (summary.tiles, summary.made) == (plain.tiles, plain.made)
    assert ("Indexing", 3) in spread
    assert ("Hashing", 2) in spread, "of the six candidates alone: members' ids are in the indices"
    store = TileStore(world.data.parent / "packed" / "tiles", tile_reader(recipe, stored=False).key)
    assert len(store) == len(expected)
    assert all(torch.equal(store.pixels(one), pixels) for one, pixels in expected.items())
    spread.clear()
    preprocess(recipe, counted)
    assert dict(spread)["Indexing"] == 0


def test_a_damaged_archive_is_told(world: SimpleNamespace) -> None:
    (world.data / "part.tar").write_bytes(b"no archive" * 100)
    recipe = replace(world.recipe, data=replace(world.recipe.data, archives=(ArchiveSource("part.tar"),)))
    with pytest.raises(DataError, match=r"part\.tar"):
        preprocess(recipe)

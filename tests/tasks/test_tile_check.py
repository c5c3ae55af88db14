"""The check before the first step: bad tiles are all found, listed and refused or left out, good ones are opened once and never again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tarfile
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from stairstep.data import ArchiveSource, DataSettings, PairSource, QuestionSetSource
from stairstep.evaluation.settings import EvaluationSettings
from stairstep.objectives import Alone
from stairstep.records import RunSettings
from stairstep.settings import DataError
from stairstep.tasks import Recipe, tile_check
from stairstep.tasks.loading import RetrievalRows, load_rows, tile_reader
from stairstep.tasks.tile_check import QUARANTINE, check_tiles, tiles_of
from stairstep.tiles import Tile, TileReader, TileSettings

TILES = 9


class CountingReader(TileReader):
    """A reader that remembers which files it opened."""

    opened: list[str]

    def load(self, path: Path | str) -> Tile:
        self.opened.append(Path(path).name)
        return super().load(path)


@pytest.fixture
def world(tmp_path: Path) -> SimpleNamespace:
    """Four rows over tiles 0–5 (tile 1 is positive of row 0 and negative of row 1), one validation row, candidates of three articles."""
    data = tmp_path / "data"
    tiles = data / "tiles"
    tiles.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ["p0", "p1", "p2", "p3", "n0", "n1", "Ada_chunk_0", "Ada_chunk_1", "Bob_chunk_0"]:
        Image.fromarray(rng.integers(0, 256, (40, 33, 3), dtype=np.uint8)).save(
            data / f"{name}.png" if name[0] in "pn" else tiles / f"{name}.png"
        )
    rows = [("p0", ["n0", "n1"]), ("p1", ["p0", "n1"]), ("p2", ["n0"]), ("p3", [])]
    lines = [
        json.dumps({"query": f"q{index}", "chunk_path": f"{one}.png", "neg_chunk_paths": [f"{name}.png" for name in negatives]})
        for index, (one, negatives) in enumerate(rows)
    ]
    (data / "train.jsonl").write_text("\n".join(lines) + "\n")
    (data / "eval.jsonl").write_text(lines[3] + "\n")
    questions = [{"id": name, "problem": f"{name}?", "answer": name} for name in ("Ada", "Bob")]
    golden = {"Ada": ["Ada"], "Bob": ["Bob"]}
    (data / "set.json").write_text(json.dumps({"description": "", "tiles_dir": "tiles", "questions": questions, "golden_mapping": golden}))
    recipe = Recipe(
        run=RunSettings(name="r", root=str(tmp_path / "runs")),
        data=DataSettings(roots=(str(data),), train=(PairSource("train.jsonl"),), validation=(PairSource("eval.jsonl"),)),
        tiles=TileSettings(decode_workers=2),
        evaluation=EvaluationSettings(sets=(QuestionSetSource("set.json"),)),
    )
    return SimpleNamespace(folder=data, recipe=recipe, list=tmp_path / "runs" / "r" / QUARANTINE)


def checked(world: SimpleNamespace, begun: bool = False, accept: int = 0, **changes: object) -> tuple[RetrievalRows, list[str]]:
    """The rows after the check, and the names of the files that it opened."""
    recipe = replace(world.recipe, data=replace(world.recipe.data, max_quarantined=accept, **changes))
    plain = tile_reader(recipe)
    reader = CountingReader(plain.settings, plain._allowed, plain.ids, plain.archives)
    reader.opened = []
    return check_tiles(load_rows(recipe), recipe, reader, world.list, Alone(), begun), reader.opened


def spoil(path: Path, data: bytes = b"this is text") -> Path:
    assert path.exists()
    path.write_bytes(data)
    return path


def names(rows: RetrievalRows) -> list[tuple[str, list[str]]]:
    return [(row.positive.stem, [path.stem for path in row.negatives]) for source in rows.train for row in source]


def test_good_tiles_are_each_opened_once_and_then_never_again(world: SimpleNamespace) -> None:
    rows, opened = checked(world)
    assert rows == load_rows(world.recipe)
    assert len(opened) == len(set(opened)) == len(tiles_of(rows)) == TILES
    assert not world.list.exists()
    again, opened = checked(world)
    assert again == rows
    assert opened == []
    os.utime(world.folder / "p2.png", ns=(1, 1))
    assert checked(world)[1] == ["p2.png"]


def test_good_members_of_archives_are_not_read_again_until_their_archive_changes(world: SimpleNamespace) -> None:
    with tarfile.open(world.folder / "a.tar", "w") as tar:
        for name in ("p0.png", "p1.png", "n0.png", "tiles"):
            tar.add(world.folder / name, name)
    sources = (ArchiveSource("a.tar"),)
    rows, opened = checked(world, archives=sources)
    assert len(opened) == TILES
    for name in ("p0.png", "p1.png", "n0.png"):
        (world.folder / name).unlink()
    shutil.rmtree(world.folder / "tiles")
    again, opened = checked(world, archives=sources)
    assert again == rows and sorted(opened) == ["Ada_chunk_0.png", "Ada_chunk_1.png", "Bob_chunk_0.png", "n0.png", "p0.png", "p1.png"]
    assert checked(world, archives=sources) == (rows, [])
    os.utime(world.folder / "a.tar", ns=(1, 1))
    assert len(checked(world, archives=sources)[1]) == 6


def test_bad_tiles_are_all_listed_and_refused_with_the_rows_that_name_them(world: SimpleNamespace) -> None:
    whole = (world.folder / "p1.png").read_bytes()
    cut = spoil(world.folder / "p1.png", whole[: len(whole) // 2])
    text = spoil(world.folder / "n1.png")
    candidate = spoil(world.folder / "tiles" / "Bob_chunk_0.png", b"")
    with pytest.raises(DataError) as told:
        checked(world, accept=2)
    message = str(told.value)
    assert "3 tiles cannot be used" in message
    assert "data.max_quarantined accepts 2" in message
    assert "data.max_quarantined=3" in message
    assert str(world.list) in message
    for path, where in [(cut, "train.jsonl:2"), (text, "train.jsonl:1"), (candidate, "set.json")]:
        assert any(str(path) in line and where in line for line in message.splitlines()), path
    listed = {Path(one["tile"]): one for one in map(json.loads, world.list.read_text().splitlines())}
    assert set(listed) == {cut, text, candidate}
    for path, one in listed.items():
        assert one["id"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert str(path) in one["reason"]
    assert listed[cut]["where"].endswith("train.jsonl:2")

    # Mended, nothing of the refusal is left; the tiles that were good are not opened again.
    cut.write_bytes(whole)
    text.write_bytes(whole)
    candidate.write_bytes(whole)
    rows, opened = checked(world)
    assert sorted(opened) == ["Bob_chunk_0.png", "n1.png", "p1.png"]
    assert rows == load_rows(world.recipe)
    assert not world.list.exists()


def test_accepted_bad_tiles_take_rows_negatives_and_candidates_with_them(world: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    spoil(world.folder / "p0.png")
    spoil(world.folder / "n0.png")
    spoil(world.folder / "p3.png")
    spoil(world.folder / "tiles" / "Bob_chunk_0.png")
    caplog.set_level(logging.WARNING, "stairstep")
    rows, _ = checked(world, accept=4)
    assert names(rows) == [("p1", ["n1"]), ("p2", [])]
    assert rows.validation == ([],)
    [questions] = rows.question_sets
    assert [tile.path.name for tile in questions.tiles] == ["Ada_chunk_0.png", "Ada_chunk_1.png"]
    assert questions.unreachable == ("Bob",)
    assert questions.unreachable_questions() == ("Bob",)
    assert "4 bad tiles are left out: 3 rows whose positive is one, 2 hard negatives, 1 candidates" in caplog.text


def test_one_more_than_accepted_is_refused_and_the_default_is_none(world: SimpleNamespace) -> None:
    assert DataSettings().max_quarantined == 0
    spoil(world.folder / "p0.png")
    with pytest.raises(DataError, match=r"1 tile cannot be used, and data\.max_quarantined accepts none"):
        checked(world)
    spoil(world.folder / "p1.png")
    assert len(names(checked(world, accept=2)[0])) == 2
    with pytest.raises(DataError, match="2 tiles"):
        checked(world, accept=1)


def test_a_question_set_without_a_usable_tile_is_refused_whatever_is_accepted(world: SimpleNamespace) -> None:
    for path in (world.folder / "tiles").iterdir():
        spoil(path)
    with pytest.raises(DataError, match=r"set\.json: none of its 3 candidate tiles"):
        checked(world, accept=3)


def test_without_the_check_no_tile_is_opened(world: SimpleNamespace) -> None:
    spoil(world.folder / "p0.png")
    rows, opened = checked(world, check_tiles=False)
    assert opened == []
    assert rows == load_rows(world.recipe)
    assert not world.list.exists()


def test_a_tile_is_known_to_be_good_under_its_limit_alone(world: SimpleNamespace) -> None:
    checked(world)
    world.recipe = replace(world.recipe, tiles=replace(world.recipe.tiles, max_image_pixels=40 * 33 - 1))
    with pytest.raises(DataError, match=f"{TILES} tiles cannot be used"):
        checked(world)


def test_a_run_goes_on_with_the_quarantine_that_it_began_with(world: SimpleNamespace) -> None:
    good = (world.folder / "p1.png").read_bytes()
    mended, lost = spoil(world.folder / "p0.png"), world.folder / "p2.png"
    before, _ = checked(world, accept=2)
    listed = world.list.read_bytes()
    mended.write_bytes(good)
    after, _ = checked(world, begun=True, accept=2)
    assert names(after) == names(before)
    assert world.list.read_bytes() == listed
    spoil(lost)
    with pytest.raises(DataError, match=r"1 tile could be used when this run began") as told:
        checked(world, begun=True, accept=2)
    assert str(lost) in str(told.value)
    assert world.list.read_bytes() == listed
    assert len(names(checked(world, begun=False, accept=2)[0])) == 3, "a run that has no checkpoint yet looks anew"


class Pair:
    """Two workers in two threads."""

    size = 2

    def __init__(self, rank: int, barrier: threading.Barrier) -> None:
        self.rank, self._barrier = rank, barrier

    def barrier(self) -> None:
        self._barrier.wait(30)


def test_all_workers_have_the_same_rows_and_one_of_them_looks(world: SimpleNamespace) -> None:
    spoil(world.folder / "p0.png")
    recipe = replace(world.recipe, data=replace(world.recipe.data, max_quarantined=1))
    barrier = threading.Barrier(2)
    found: dict[int, RetrievalRows] = {}
    opened: dict[int, list[str]] = {}

    def work(rank: int) -> None:
        reader = CountingReader(recipe.tiles)
        reader.opened = opened[rank] = []
        found[rank] = check_tiles(load_rows(recipe), recipe, reader, world.list, Pair(rank, barrier))  # type: ignore[arg-type]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (1, 0)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    assert found[0] == found[1]
    assert len(names(found[0])) == 3
    assert len(opened[0]) == TILES
    assert opened[1] == []


def test_a_long_check_says_how_far_it_is_and_that_it_is_alive(
    world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tile_check, "_LOG_EVERY_S", 0.0)
    caplog.set_level(logging.INFO, "stairstep")
    beats: list[int] = []
    check_tiles(load_rows(world.recipe), world.recipe, tile_reader(world.recipe), world.list, Alone(), alive=lambda: beats.append(1))
    assert len(beats) == TILES
    assert f"checked 5 of {TILES} tiles, 0 bad" in caplog.text
    assert f"Checked {TILES} tiles" in caplog.text

"""What a fetch says of the question sets' tiles is what a training would find: files, archives that the recipe names, and nothing else."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from stairstep.data import ArchiveSource, DataSettings, QuestionSetSource
from stairstep.evaluation.settings import EvaluationSettings
from stairstep.records import RunSettings
from stairstep.settings import DataError
from stairstep.tasks import Recipe
from stairstep.tasks.fetching import find_sets
from stairstep.tasks.loading import load_question_sets

TILES = [f"article-{number}_chunk_0.png" for number in range(3)]


def pack(path: Path, *names: str) -> None:
    with tarfile.open(path, "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A question set without tiles."""
    folder = tmp_path / "data"
    folder.mkdir()
    questions = [{"id": "q", "problem": "p", "answer": "a"}]
    tree = {"tiles_dir": "tiles", "questions": questions, "golden_mapping": {"q": ["article-0"]}}
    (folder / "set.json").write_text(json.dumps(tree))
    return folder


def recipe(data: Path, *archives: str) -> Recipe:
    settings = DataSettings(roots=(str(data),), archives=tuple(ArchiveSource(one) for one in archives))
    run = RunSettings(name="r", root=str(data.parent / "runs"))
    return Recipe(run=run, data=settings, evaluation=EvaluationSettings(sets=(QuestionSetSource("set.json", limit=1),)))


def told(data: Path, *archives: str) -> str:
    """The line of the set; where it is right, a training reads the very same tiles, and otherwise it refuses."""
    ours = recipe(data, *archives)
    [found] = find_sets(ours)
    if found.right:
        [read] = load_question_sets(ours)
        assert f": {len(read.tiles):,} tiles in {read.note}" in found.line()
    else:
        with pytest.raises(DataError) as refused:
            load_question_sets(ours)
        assert str(refused.value) in found.line()
    return found.line()


def test_an_archive_counts_where_the_recipe_names_it_whatever_its_name(data: Path) -> None:
    pack(data / "tiles.tar", *(f"tiles/{name}" for name in TILES))
    assert told(data).startswith(f"✗ question set set: {data}/set.json: tiles_dir: there is no folder 'tiles'")
    note = f"{data}/tiles (the file's tiles_dir 'tiles', found beside the file)"
    assert told(data, "tiles.tar") == f"✓ question set set: 3 tiles in {note}, 3 of them packed in data.archives"
    (data / "tiles.tar").rename(data / "other name.tar")
    assert told(data, "other*.tar") == f"✓ question set set: 3 tiles in {note}, 3 of them packed in data.archives"
    assert "no archive was found for 'tiles.tar' of data.archives" in told(data, "tiles.tar")

    (data / "tiles").mkdir()
    for name in TILES[:2]:
        (data / "tiles" / name).write_bytes(b"x")
    assert told(data, "other*.tar") == f"✓ question set set: 3 tiles in {note}, 1 of them packed in data.archives"
    assert told(data) == f"✓ question set set: 2 tiles in {note}"


def test_an_archive_without_the_sets_tiles_is_no_find(data: Path) -> None:
    pack(data / "tiles.tar", "somewhere/else.txt")
    for archives in ((), ("tiles.tar",)):
        assert told(data, *archives).startswith(f"✗ question set set: {data}/set.json: tiles_dir: there is no folder 'tiles'")


def test_an_archive_that_cannot_be_read_is_told_once(data: Path) -> None:
    pack(data / "tiles.tar", "../tiles/a.png")
    member = f"{data}/tiles.tar: member '../tiles/a.png'"
    assert told(data, "tiles.tar").startswith(f"✗ question sets: their tiles cannot be looked for: {member}: '..' in its name")


def test_without_question_sets_nothing_is_indexed(data: Path) -> None:
    pack(data / "tiles.tar", "tiles/a.png")
    ours = recipe(data, "tiles.tar")
    assert find_sets(Recipe(run=ours.run, data=ours.data)) == []
    assert not (data.parent / "runs").exists()

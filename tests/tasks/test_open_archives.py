"""The recipe's archives: patterns, folders and roots, each index built once, and what is named when nothing is found."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from stairstep.data import ArchiveSource, DataSettings, WorldSettings
from stairstep.records import RunSettings
from stairstep.settings import DataError, RecipeError
from stairstep.tasks import Recipe
from stairstep.tasks.loading import tile_reader
from stairstep.tasks.packed import INDICES, open_archives
from stairstep.tasks.resolve import resolve


def pack(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    pack(tmp_path / "data" / "shards" / "0.tar", "images/0.png")
    pack(tmp_path / "data" / "shards" / "1.tar", "images/1.png")
    pack(tmp_path / "data" / "deep" / "er" / "2.tar", "2.png")
    return tmp_path / "data"


def recipe(data: Path, *sources: ArchiveSource, **further: object) -> Recipe:
    settings = DataSettings(roots=(str(data),), archives=sources)
    return Recipe(run=RunSettings(name="r", root=str(data.parent / "runs")), data=replace(settings, **further))


def found(data: Path, *sources: ArchiveSource) -> list[str]:
    return [str(Path(path).relative_to(data)) for path in open_archives(recipe(data, *sources)).below(data)]


def test_patterns_and_folders_count_from_the_first_root(data: Path) -> None:
    shards = ArchiveSource("shards/*.tar", ".")
    assert found(data, shards) == ["images/0.png", "images/1.png"]
    assert found(data, ArchiveSource("shards/*.tar")) == ["shards/images/0.png", "shards/images/1.png"]
    assert found(data, ArchiveSource("deep/er/2.tar", "deep/tiles")) == ["deep/tiles/2.png"]
    assert found(data, ArchiveSource("**/2.tar", str(data / "x"))) == ["x/2.png"]
    assert found(data, shards, ArchiveSource(str(data / "shards" / "1.tar"), ".")) == ["images/0.png", "images/1.png"], "named twice"
    assert found(data, shards, ArchiveSource("shards/1.tar", "copy")) == ["copy/images/1.png", "images/0.png", "images/1.png"]
    assert len(list((data.parent / "runs" / INDICES).iterdir())) == 3
    assert found(data) == []


def test_a_file_whose_name_looks_like_a_pattern_is_itself(data: Path) -> None:
    pack(data / "odd[1]*.tar", "odd.png")
    assert found(data, ArchiveSource("odd[1]*.tar")) == ["odd.png"]


def test_a_pattern_that_matches_nothing_is_remembered(data: Path) -> None:
    archives = open_archives(recipe(data, ArchiveSource("none/*.tar"), ArchiveSource("shards/*.tar", "."), ArchiveSource("gone.tar")))
    assert archives.unmatched == ("none/*.tar", "gone.tar") and len(archives) == 2


def test_archives_and_folders_lie_inside_the_roots(data: Path) -> None:
    outside = pack(data.parent / "out" / "x.tar", "x.png")
    (data / "link.tar").symlink_to(outside)
    (data / "folder").symlink_to(outside.parent)
    for source, key in [
        (ArchiveSource("../out/*.tar", "."), "path"),
        (ArchiveSource(str(outside), "."), "path"),
        (ArchiveSource("link.tar", "."), "path"),
        (ArchiveSource("shards/0.tar", ".."), "unpacked_at"),
        (ArchiveSource("shards/0.tar", "folder"), "unpacked_at"),
        (ArchiveSource("shards/0.tar", "/"), "unpacked_at"),
    ]:
        with pytest.raises(DataError, match=rf"data\.archives\[1\]\.{key}: .*outside data\.roots"):
            open_archives(recipe(data, ArchiveSource("shards/1.tar"), source))
    both = recipe(data, ArchiveSource("link.tar", "."), roots=(str(data), str(outside.parent)))
    assert open_archives(both).below(data) == [str(data / "x.png")]
    assert not (data.parent / "runs").exists() or len(list((data.parent / "runs" / INDICES).iterdir())) == 1


def test_without_roots_paths_count_from_the_working_folder(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data)
    archives = open_archives(recipe(data, ArchiveSource("shards/*.tar", "."), roots=()))
    assert archives.below(data) == [str(data / "images/0.png"), str(data / "images/1.png")]


def test_a_folder_where_an_archive_should_be_is_told(data: Path) -> None:
    with pytest.raises(DataError, match=r"shards: expected a tar archive, found a folder"):
        open_archives(recipe(data, ArchiveSource("shards")))


def test_two_archives_with_one_path_are_an_error(data: Path) -> None:
    pack(data / "shards" / "copy.tar", "images/0.png")
    with pytest.raises(DataError, match=r"0\.tar and .*copy\.tar both hold .*images/0\.png"):
        open_archives(recipe(data, ArchiveSource("shards/*.tar", ".")))


def test_variables_and_the_world_are_filled_in(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDS", "shards")
    source = ArchiveSource("$SHARDS/*.tar", "${SHARDS}/here")
    assert resolve(recipe(data, source)).data.archives == (ArchiveSource("shards/*.tar", "shards/here"),)
    with pytest.raises(RecipeError, match=r"data\.archives: the environment variable \$NOWHERE is not set"):
        resolve(recipe(data, ArchiveSource("a.tar", "$NOWHERE")))
    with pytest.raises(RecipeError, match=r"data\.archives: .*names \{world\}, but the recipe has no data\.world"):
        resolve(recipe(data, ArchiveSource("{world}/*.tar")))
    world = WorldSettings(articles=4, questions=4, pairs=4, text_pairs=0, folder=str(data / "worlds"))
    made = resolve(recipe(data, ArchiveSource("{world}/*.tar"), world=world))
    assert Path(made.data.archives[0].path).parent.parent == data / "worlds"


def test_the_recipes_reader_reads_members_inside_its_roots(data: Path) -> None:
    source = ArchiveSource("shards/*.tar", ".")
    assert tile_reader(recipe(data, source)).source(data / "images" / "0.png") == b"images/0.png"
    archives = open_archives(recipe(data, source))
    assert tile_reader(recipe(data, source), archives).archives is archives

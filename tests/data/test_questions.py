"""Question sets in: formats, where the tile folder is looked for, and each fault by its name."""

import json
from pathlib import Path
from typing import Any

import pytest

from stairstep.data import Question, QuestionSet, QuestionSetSource, article_of, is_selection, list_tiles, read_question_set
from stairstep.settings import DataError

TILES = ["Ada_chunk_0.png", "Ada_chunk_1.png", "dist_Bob_chunk_0.jpg", "sub/Cat_chunk_12.webp"]
GOLDEN_SELECTION = [False, False, True, False, False, True, False, False]


def tree(**changes: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "description": "two questions",
        "tiles_dir": "tiles",
        "questions": [
            {"id": 7, "problem": "Who wrote it?", "answer": "Ada", "extra": 1},
            {"id": "b", "problem": "Where?", "answer": "Rome"},
        ],
        "golden_mapping": {"7": ["Ada"], "b": ["Bob", "Cat", "Bob"], "unasked": ["Dan"]},
    }
    return {key: value for key, value in {**whole, **changes}.items() if value is not ...}


def tiles(folder: Path, names: list[str] = TILES) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"tile")
    return folder


def put(path: Path, content: dict[str, Any] | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def read(folder: Path, content: dict[str, Any] | bytes, **options: Any) -> QuestionSet:
    put(folder / "mini.json", content)
    return read_question_set(QuestionSetSource(path="mini.json", **options), (), folder)


def test_a_set_is_read_with_its_tiles_in_order(tmp_path: Path) -> None:
    tiles(tmp_path / "tiles")
    result = read(tmp_path, tree())
    assert result.questions == (
        Question("7", "Who wrote it?", "Ada", ("Ada",)),
        Question("b", "Where?", "Rome", ("Bob", "Cat")),
    )
    real = tmp_path.resolve() / "tiles"
    assert [tile.path for tile in result.tiles] == [real / name for name in TILES]
    assert [tile.article for tile in result.tiles] == ["Ada", "Ada", "Bob", "Cat"]
    assert (result.name, result.description, result.where) == ("mini", "two questions", f"{tmp_path}/mini.json")
    assert result.tiles_dir == real
    assert result.unreachable == ()


def test_name_and_limit_come_from_the_recipe(tmp_path: Path) -> None:
    tiles(tmp_path / "tiles")
    result = read(tmp_path, tree(), name="miniv8", limit=1)
    assert result.name == "miniv8"
    assert [question.id for question in result.questions] == ["7"]
    assert len(result.tiles) == 4


def test_golden_articles_without_a_tile_are_counted_and_their_questions_known(tmp_path: Path) -> None:
    tiles(tmp_path / "tiles")
    mapping = {"7": ["Zoe"], "b": ["Eve", "Bob"]}
    result = read(tmp_path, tree(golden_mapping=mapping))
    assert result.unreachable == ("Zoe", "Eve")
    assert result.unreachable_questions() == ("7",)
    assert read(tmp_path, tree(golden_mapping={**mapping, "7": ["Ada"]}), limit=1).unreachable == ()


@pytest.mark.parametrize(
    ("name", "article"),
    [
        ("Ada_Lovelace_chunk_3.png", "Ada_Lovelace"),
        ("dist_Ada_chunk_0.png", "Ada"),
        ("Ada.png", "Ada"),
        ("dist_Ada.png", "Ada"),
        ("St._Ives_chunk_1.v2.png", "St._Ives"),
        ("a_chunk_b_chunk_2.png", "a"),
        ("my_dist_x_chunk_0.png", "my_dist_x"),
        ("folder_chunk_9/Ada_chunk_0.png", "Ada"),
        ("_chunk_0.png", "_chunk_0"),
    ],
)
def test_the_article_of_a_tile(name: str, article: str) -> None:
    assert article_of(name) == article


FAULTS = {
    "broken JSON": (b'{"questions": [\n{"id": 1,,}]}', r"mini\.json:2: this is not valid JSON"),
    "not UTF-8": (b'{"description": "caf\xe9"}', "byte 21 of this file is not UTF-8"),
    "a list": (b"[]", "expected a JSON object with questions and golden_mapping, found a list"),
    "no questions key": (tree(questions=...), "questions: expected a list of questions, found nothing"),
    "zero questions": (tree(questions=[]), "questions: there are no questions"),
    "no mapping": (tree(golden_mapping=...), "golden_mapping: expected question ids with their articles, found nothing"),
    "question not an object": (tree(questions=["who?"]), r"questions\[0\]: expected an object"),
    "no id": (tree(questions=[{"problem": "a", "answer": "b"}]), r"questions\[0\]\.id: expected text or a whole number, found nothing"),
    "truth as id": (tree(questions=[{"id": True, "problem": "a", "answer": "b"}]), r"questions\[0\]\.id: expected text or a whole number"),
    "no problem": (tree(questions=[{"id": 7, "answer": "b"}]), r"questions\[0\] \(id '7'\): problem: this key is missing"),
    "empty answer": (tree(questions=[{"id": 7, "problem": "a", "answer": " "}]), r"\(id '7'\): answer: expected text that is not empty"),
    "number as answer": (tree(questions=[{"id": 7, "problem": "a", "answer": 3}]), r"answer: expected text, found the number 3"),
    "same id": (tree(questions=[*tree()["questions"], *tree()["questions"]]), r"questions\[2\]\.id: the id '7' is given twice"),
    "not mapped": (tree(golden_mapping={"7": ["Ada"]}), r"golden_mapping: the question 'b' is missing"),
    "empty mapping": (tree(golden_mapping={"7": ["Ada"], "b": []}), r"golden_mapping\['b'\]: expected a list .*, found an empty list"),
    "text as mapping": (tree(golden_mapping={"7": "Ada", "b": ["Bob"]}), r"golden_mapping\['7'\]: expected a list .* found the text 'Ada'"),
    "empty article": (tree(golden_mapping={"7": ["Ada", ""]}), r"golden_mapping\['7'\]\[1\]: expected text .* that is not empty"),
    "number as description": (tree(description=3), "description: expected text, found the number 3"),
    "no tiles_dir": (tree(tiles_dir=...), "tiles_dir: this key is missing"),
    "absent tiles_dir": (tree(tiles_dir="nowhere"), r"tiles_dir: there is no folder 'nowhere' \(looked for .*set tiles_dir in the recipe"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_told(tmp_path: Path, fault: str) -> None:
    tiles(tmp_path / "tiles")
    assert len(read(tmp_path, tree()).questions) == 2
    content, message = FAULTS[fault]
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, content)
    assert str(caught.value).startswith(f"{tmp_path}/mini.json")


def test_a_missing_file_and_a_folder_in_its_place_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such question set"):
        read_question_set(QuestionSetSource(path="absent.json"), (), tmp_path)
    with pytest.raises(DataError, match="this question set cannot be read"):
        read_question_set(QuestionSetSource(path="."), (), tmp_path)


@pytest.mark.parametrize("names", [[], ["readme.txt", ".hidden.png", ".cache/x.png", "x.png.part"]])
def test_a_tile_folder_without_tiles_is_an_error(tmp_path: Path, names: list[str]) -> None:
    (tmp_path / "tiles").mkdir()
    tiles(tmp_path / "tiles", names)
    with pytest.raises(DataError, match=r"mini\.json: there is no tile \(\.png.*tiles"):
        read(tmp_path, tree())


def test_the_tile_folder_is_looked_for_beside_above_and_at_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped file says test_miniv8/tiles and lies in test_miniv8/: relative to its parent folder, if to anything."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    file = put(tmp_path / "data" / "test_miniv8" / "mini.json", tree(tiles_dir="test_miniv8/tiles"))
    source = QuestionSetSource(path=str(file))
    for place, note in (
        (work, "found at the working directory"),
        (file.parent.parent, "found above the file"),
        (file.parent, "found beside the file"),
    ):
        made = tiles(place / "test_miniv8" / "tiles")
        result = read_question_set(source, [tmp_path], tmp_path)
        assert result.tiles_dir == made.resolve()
        assert note in result.note
        assert str(made.resolve()) in result.note
        assert read_question_set(source, (), tmp_path).tiles_dir == made.resolve()  # without roots, the place looked at is the root


def test_the_recipe_may_name_the_tile_folder(tmp_path: Path) -> None:
    tiles(tmp_path / "tiles", ["Old_chunk_0.png"])
    tiles(tmp_path / "fast" / "tiles")
    result = read(tmp_path, tree(), tiles_dir="fast/tiles")
    assert result.tiles_dir == tmp_path.resolve() / "fast/tiles"
    assert "the recipe's tiles_dir" in result.note
    with pytest.raises(DataError, match=r"the recipe's tiles_dir '.*slow' is not a folder"):
        read(tmp_path, tree(), tiles_dir="slow")


def test_file_and_tile_folder_must_lie_in_the_roots(tmp_path: Path) -> None:
    tiles(tmp_path / "out")
    (tmp_path / "in").mkdir()
    put(tmp_path / "in" / "mini.json", tree(tiles_dir="../out"))
    source = QuestionSetSource(path="in/mini.json")
    for roots in (["in"], ()):
        with pytest.raises(DataError, match=r"out, which lies outside data\.roots"):
            read_question_set(source, roots, tmp_path)
    assert len(read_question_set(source, ["in", "out"], tmp_path).tiles) == 4
    with pytest.raises(DataError, match=r"mini\.json, which lies outside data\.roots"):
        read_question_set(source, ["out"], tmp_path)
    put(tmp_path / "in" / "mini.json", tree(tiles_dir=str(tmp_path / "out")))
    with pytest.raises(DataError, match=r"outside data\.roots"):
        read_question_set(source, (), tmp_path)
    assert "an absolute path" in read_question_set(source, ["."], tmp_path).note


def test_tiles_are_listed_by_path_with_every_ending_in_any_case(tmp_path: Path) -> None:
    names = ["b.PNG", "a/z.jpeg", "a/b/c.JPG", "a.webp", "Z.png"]
    tiles(tmp_path, [*names, "x.gif", "notes.json", "a/.b.png"])
    (tmp_path / "folder.png").mkdir()
    assert [str(tile.path.relative_to(tmp_path.resolve())) for tile in list_tiles(tmp_path, [tmp_path])] == sorted(names)


def test_links_inside_are_followed_once_and_keep_their_names(tmp_path: Path) -> None:
    tiles(tmp_path / "root" / "listed", ["Ada_chunk_0.png"])
    tiles(tmp_path / "root" / "blobs", ["3f9a.png", "more/Cat_chunk_0.png"])
    listed = tmp_path / "root" / "listed"
    (listed / "Bob_chunk_0.png").symlink_to("../blobs/3f9a.png")
    (listed / "again").symlink_to(".")
    (listed / "more").symlink_to("../blobs/more")
    (listed / "more_again").symlink_to("../blobs/more")
    found = list_tiles(listed, [tmp_path / "root"])
    assert sorted(tile.article for tile in found) == ["Ada", "Bob", "Cat"]


@pytest.mark.parametrize("target", ["../out", "../out/secret.png"])
def test_a_link_out_of_the_roots_is_an_error(tmp_path: Path, target: str) -> None:
    tiles(tmp_path / "out", ["secret.png"])
    tiles(tmp_path / "in")
    (tmp_path / "in" / "link.png").symlink_to(target)
    with pytest.raises(DataError, match=r"link\.png: this leads to .*out.*outside data\.roots"):
        list_tiles(tmp_path / "in", [tmp_path / "in"])
    assert "secret" in [tile.path.stem for tile in list_tiles(tmp_path / "in", [tmp_path])] or target == "../out/secret.png"


def test_a_link_that_leads_nowhere_or_to_itself_is_an_error(tmp_path: Path) -> None:
    tiles(tmp_path / "in")
    for target in ("gone.png", "link.png"):
        (tmp_path / "in" / "link.png").unlink(missing_ok=True)
        (tmp_path / "in" / "link.png").symlink_to(target)
        with pytest.raises(DataError, match=r"link\.png: this link leads nowhere"):
            list_tiles(tmp_path / "in", [tmp_path])


def test_a_folder_that_cannot_be_listed_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent: this tile folder cannot be listed"):
        list_tiles(tmp_path / "absent", [tmp_path])


def test_the_selection_part_is_fixed_by_the_id_and_about_as_large_as_asked() -> None:
    ids = [str(number) for number in range(4000)]
    quarter = {one for one in ids if is_selection(one, 0.25)}
    assert 850 < len(quarter) < 1150  # 1000 ± 5 standard deviations
    assert quarter < {one for one in ids if is_selection(one, 0.5)}
    assert not any(is_selection(one, 0.0) for one in ids)
    assert all(is_selection(one, 1.0) for one in ids)
    assert [is_selection(one, 0.5) for one in ("0", "1", "2", "3", "4", "5", "6", "7")] == GOLDEN_SELECTION
    for fraction in (-0.1, 1.1):
        with pytest.raises(ValueError, match="from 0 to 1"):
            is_selection("a", fraction)


# --- tiles in archives


class Packed:
    """Files in archives, by their paths."""

    def __init__(self, folder: Path, names: list[str], unmatched: tuple[str, ...] = ()) -> None:
        self.paths = sorted(str(folder.resolve() / name) for name in names)
        self.unmatched = unmatched

    def find(self, path: Path | str) -> str | None:
        return str(path) if str(path) in self.paths else None

    def below(self, folder: Path | str) -> list[str]:
        return [path for path in self.paths if path.startswith(f"{folder}/")]


def test_a_tile_folder_may_exist_in_archives_alone(tmp_path: Path) -> None:
    put(tmp_path / "mini.json", tree())
    source = QuestionSetSource(path="mini.json")
    packed = Packed(tmp_path / "tiles", [*TILES, "notes.txt", ".hidden.png", "sub/.cache/x.png", "._Ada_chunk_0.png", "UPPER.PNG"])
    found = read_question_set(source, (), tmp_path, packed)
    tiles(tmp_path / "tiles", [*TILES, "notes.txt", ".hidden.png", "sub/.cache/x.png", "._Ada_chunk_0.png", "UPPER.PNG"])
    unpacked = read_question_set(source, (), tmp_path)
    assert found == unpacked and len(found.tiles) == len(TILES) + 1


def test_files_and_packed_tiles_are_one_list_each_once(tmp_path: Path) -> None:
    put(tmp_path / "mini.json", tree())
    tiles(tmp_path / "tiles", TILES[:2])
    packed = Packed(tmp_path / "tiles", TILES[1:])
    for options in ({}, {"tiles_dir": "tiles"}):
        found = read_question_set(QuestionSetSource(path="mini.json", **options), (), tmp_path, packed)
        assert [str(tile.path) for tile in found.tiles] == [str(tmp_path.resolve() / "tiles" / name) for name in TILES]
        assert [tile.article for tile in found.tiles] == ["Ada", "Ada", "Bob", "Cat"]
    assert [tile.path for tile in list_tiles(tmp_path / "tiles" / "sub", [tmp_path], packed)] == [tmp_path.resolve() / "tiles" / TILES[3]]


def test_a_packed_folder_is_looked_for_where_a_real_one_is(tmp_path: Path) -> None:
    put(tmp_path / "data" / "test" / "mini.json", tree(tiles_dir="test/tiles"))
    source = QuestionSetSource(path="data/test/mini.json")
    above = Packed(tmp_path / "data" / "test" / "tiles", TILES)
    found = read_question_set(source, [tmp_path], tmp_path, above)
    assert found.tiles_dir == tmp_path.resolve() / "data" / "test" / "tiles" and "found above the file" in found.note
    beside = Packed(tmp_path / "data" / "test" / "test" / "tiles", TILES)
    tiles(tmp_path / "data" / "test" / "tiles", ["Zoe_chunk_0.png"])
    assert "found beside the file" in read_question_set(source, [tmp_path], tmp_path, beside).note
    outside = Packed(tmp_path / "out", TILES)
    put(tmp_path / "data" / "mini.json", tree(tiles_dir="../out"))
    with pytest.raises(DataError, match=r"outside data\.roots"):
        read_question_set(QuestionSetSource(path="data/mini.json"), [tmp_path / "data"], tmp_path, outside)


def test_a_pattern_without_an_archive_is_named_where_tiles_are_missing(tmp_path: Path) -> None:
    put(tmp_path / "mini.json", tree())
    packed = Packed(tmp_path, [], unmatched=("tiles.tar", "more/*.tar"))
    named = r"no archive was found for 'tiles\.tar', 'more/\*\.tar' of data\.archives"
    with pytest.raises(DataError, match=rf"there is no folder 'tiles'.*{named}"):
        read_question_set(QuestionSetSource(path="mini.json"), (), tmp_path, packed)
    with pytest.raises(DataError, match=rf"is not a folder.*{named}"):
        read_question_set(QuestionSetSource(path="mini.json", tiles_dir="a\0b"), (), tmp_path, packed)
    (tmp_path / "tiles").mkdir()
    with pytest.raises(DataError, match=rf"there is no tile .*{named}"):
        read_question_set(QuestionSetSource(path="mini.json"), (), tmp_path, packed)
    tiles(tmp_path / "tiles")
    assert len(read_question_set(QuestionSetSource(path="mini.json"), (), tmp_path, packed).tiles) == 4

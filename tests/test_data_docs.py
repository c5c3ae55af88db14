"""docs/data.md does not rot: the platform's own readers read its examples, its tables name the keys that there are, its output is real."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stairstep.data import (
    ArchiveSource,
    PairSource,
    QuestionSetSource,
    TextSource,
    article_of,
    is_selection,
    missing_tiles,
    read_pairs,
    read_question_set,
    read_texts,
)
from stairstep.evaluation.peaks import peak
from stairstep.evaluation.questions_answered import STATES, qa_score
from stairstep.evaluation.retrieval import ARTICLE_METRICS, scores_of
from stairstep.records import read_json, read_json_lines
from stairstep.tasks import load_recipe
from stairstep.tasks.import_pages import Failure, Imported, TileSize, import_pages, summary
from stairstep.tasks.tile_check import BadTile, find_bad_tiles, read_quarantine
from stairstep.tiles import Archives, TileIds, TileReader, TileSettings, index_archive
from stairstep.tiles.store import CODECS, FORMAT, named_shards, write_manifest, write_shard

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "docs" / "examples"
TEXT = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part.partition("\n")[2] for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]}


def first_column(section: str, table: int = 0) -> list[str]:
    """The coded words in the first cells of a section's table."""
    tables = re.findall(r"(?:^\|.*\n?)+", SECTIONS[section], flags=re.MULTILINE)
    return [word for row in tables[table].splitlines()[2:] for word in re.findall(r"`([^`]+)`", row.split("|")[1])]


def keys_of(values: list[dict[str, Any]]) -> set[str]:
    return {key for one in values for key in one}


def blocks(section: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", SECTIONS[section], flags=re.MULTILINE | re.DOTALL)


def test_every_example_is_linked_and_quoted_as_it_is():
    linked = set(re.findall(r"\]\(examples/([^)]+)\)", TEXT))
    files = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*") if path.is_file() and not path.name.startswith(".")}
    assert linked == files
    quoted = re.findall(r"\]\(examples/([^)]+)\)\n\n```json\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
    assert [name for name, _ in quoted] == [
        "pairs.jsonl",
        "text-pairs/chunk_000/filtered_hn.jsonl",
        "questions.json",
        "store-manifest.json",
    ]
    for name, text in quoted:
        assert text == (EXAMPLES / name).read_text(encoding="utf-8"), name


def test_pairs():
    rows = read_pairs(PairSource("pairs.jsonl"), (), EXAMPLES)
    assert [len(row.negatives) for row in rows] == [1, 0]
    assert missing_tiles(rows, (), EXAMPLES) == []
    assert set(first_column("Pairs")) == keys_of(read_json_lines(EXAMPLES / "pairs.jsonl"))


def test_tar_archives_in_place(tmp_path: Path):
    index = index_archive(EXAMPLES / "tiles.tar", tmp_path)
    archives = Archives([(index, EXAMPLES / "packed")])
    names = sorted(path.name for path in (EXAMPLES / "tiles").iterdir())
    assert [Path(one).name for one in archives.below(EXAMPLES / "packed")] == names
    for name in names:
        assert archives.read(EXAMPLES / "packed" / name, 1 << 20) == (EXAMPLES / "tiles" / name).read_bytes()
    path = tmp_path / "recipe.yaml"
    path.write_text(blocks("Tar archives in place", "yaml")[0], encoding="utf-8")
    assert load_recipe(path).data.archives == (ArchiveSource("tiles.tar", "tiles"),)


def test_the_tile_store(tmp_path: Path):
    text = (EXAMPLES / "store-manifest.json").read_text(encoding="utf-8")
    (tmp_path / "manifest-0.json").write_text(text, encoding="utf-8")
    (shard,) = named_shards(tmp_path)
    example = read_json(EXAMPLES / "store-manifest.json")
    assert (shard.tiles, example["tiles"], example["format"], example["codecs"]) == (2, 2, FORMAT, list(CODECS))
    direct = TileReader(TileSettings(max_visual_tokens=64))
    tiles = [direct.load(path) for path in sorted((EXAMPLES / "tiles").iterdir())]
    made = write_shard(tmp_path / direct.key, direct.key, ((one.id, one.pixels) for one in tiles))
    assert made is not None
    written = read_json(write_manifest(tmp_path / direct.key, direct.key, [made]))
    assert written.keys() == example.keys()
    assert written["shards"][0].keys() == example["shards"][0].keys()


def test_text_pairs():
    rows = read_texts(TextSource("text-pairs"), (), EXAMPLES)
    assert [len(row.negatives) for row in rows] == [1, 0]


def test_question_set():
    found = read_question_set(QuestionSetSource("questions.json"), (), EXAMPLES)
    assert (len(found.questions), len(found.tiles), found.unreachable, found.tiles_dir) == (2, 3, (), EXAMPLES / "tiles")
    assert set(first_column("Question set")) == set(read_json(EXAMPLES / "questions.json"))


def test_tiles_and_their_names():
    rows = re.findall(r"^\| \[`examples/(tiles/[^`]+)`\]\([^)]+\) \| `([^`]+)` \|$", SECTIONS["Tiles and their names"], flags=re.MULTILINE)
    assert {name for name, _ in rows} == {f"tiles/{path.name}" for path in (EXAMPLES / "tiles").iterdir()}
    assert [article_of(name) for name, _ in rows] == [article for _, article in rows]
    reader = TileReader(TileSettings())
    for name, _ in rows:
        tile = reader.load(EXAMPLES / name)
        assert tile.id == hashlib.sha256((EXAMPLES / name).read_bytes()).hexdigest()
        assert tile.pixels.ndim == 3


def test_result_rows():
    rows = read_json_lines(EXAMPLES / "eval_step0.jsonl")
    assert set(first_column("Result rows")) == keys_of(rows) | {"reason"}
    assert set(re.findall(r"`(\w+)`", re.search(r"^\| `state` \|(.*)$", SECTIONS["Result rows"], re.MULTILINE)[1])) == set(STATES)
    questions = {one.id: one for one in read_question_set(QuestionSetSource("questions.json"), (), EXAMPLES).questions}
    for row in rows:
        question = questions[row["id"]]
        assert (row["problem"], row["answer"], tuple(row["golden_ids"])) == (question.problem, question.answer, question.golden)
        assert row["split"] == ("selection" if is_selection(row["id"], 0.5) else "report")
        for one in row["retrieved"]:
            assert one["tile"] == hashlib.sha256((EXAMPLES / "tiles" / one["path"]).read_bytes()).hexdigest()
            assert one["article"] == article_of(one["path"])
    assert {row["split"] for row in rows} == {"selection", "report"}


def test_summary():
    plain = read_json(EXAMPLES / "eval_step0.summary.json")
    rows = read_json_lines(EXAMPLES / "eval_step0.jsonl")
    assert set(first_column("Summary")) == set(plain)
    again = scores_of(rows, ARTICLE_METRICS)
    assert {name: one["value"] for name, one in plain["metrics"].items()} == {name: one.value for name, one in again.items()}
    assert plain["qa"]["all"] == qa_score(rows, 0.5).plain()
    assert peak({0: plain}, "hit@1") is not None


def test_quarantine(tmp_path: Path):
    [listed] = read_quarantine(EXAMPLES / "quarantine.jsonl")
    assert first_column("Quarantine") == [one.name for one in fields(BadTile)]
    torn = tmp_path / Path(listed.tile).name
    torn.write_bytes((EXAMPLES / "tiles" / torn.name).read_bytes()[:600])
    [bad] = find_bad_tiles({torn: listed.where}, TileReader(TileSettings()), TileIds())
    assert (bad.id, bad.where, bad.reason.replace(str(torn), listed.tile)) == (listed.id, listed.where, listed.reason)


# --- bringing your own pages


@pytest.fixture
def imported(tmp_path: Path) -> Path:
    source = tmp_path / "pages"
    (source / "manual").mkdir(parents=True)
    Image.new("RGB", (40, 40), "white").save(source / "manual" / "Pump P-4.png")
    (source / "broken.png").write_bytes(b"x")
    import_pages([source], None, tmp_path / "mine", TileSize())
    return tmp_path / "mine"


def test_the_table_of_an_import_is_what_an_import_leaves(imported: Path):
    section = SECTIONS["Bringing your own pages"]
    told = {re.findall(r"`([^`]+)`", row)[0]: row for row in section.splitlines() if row.startswith("| `")}
    assert set(told) == {path.name + "/" * path.is_dir() for path in imported.iterdir() if not path.name.startswith(".")}
    [page] = read_json_lines(imported / "pages.jsonl")
    assert keys_of([page, *page["tiles"]]) | {"note"} <= set(re.findall(r"`(\w+)`", told["pages.jsonl"]))
    [failed] = read_json_lines(imported / "failed.jsonl")
    assert set(failed) <= set(re.findall(r"`(\w+)`", told["failed.jsonl"]))
    assert page["article"] == "manual-Pump_P-4" and "`manual-Pump_P-4`" in section
    [row] = (imported / "pairs.jsonl").read_text().splitlines()
    [pattern] = re.findall(r"grep -v '(.*?)'", section)
    assert pattern in row and pattern not in row.replace('""', '"a query"')


def test_the_output_in_the_document_is_what_is_printed():
    [said] = [block for block in blocks("Bringing your own pages", "") if block.startswith("imported")]
    name = "/data/pages/broken.png"
    reason = "this PNG file is damaged and cannot be decoded (image file is truncated; 2000 bytes). Fetch or render it again"
    done = Imported(4, 7, 0, (), (Failure(name, None, f"{name}: {reason}"),), 1, 4, 7)
    assert summary(done, Path("mine")) + "\n" == said


def test_the_recipe_in_the_document_is_one(tmp_path: Path):
    [text] = blocks("Bringing your own pages", "yaml")
    (tmp_path / "mine.yaml").write_text(text.replace("recipes/", f"{ROOT}/recipes/"))
    recipe = load_recipe(tmp_path / "mine.yaml", [])
    assert json.dumps([one.path for one in recipe.data.train]) == '["train.jsonl"]'
    assert (recipe.data.world, recipe.data.roots) == (None, ("mine",))

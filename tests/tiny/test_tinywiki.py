"""Tinywiki on disk: the seed's formats as the data room reads them, one tile an answer, knobs that act, and a folder complete or absent."""

import hashlib
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from stairstep.data import PairSource, QuestionSetSource, TextSource, WorldSettings, read_pairs, read_question_set, read_texts
from stairstep.data.questions import article_of
from stairstep.settings import DataError, SettingError
from stairstep.tiny import tinywiki
from stairstep.tiny.tinywiki import QUESTION_SET, build_world, ensure_world

SETTINGS = WorldSettings(seed=3, articles=30, questions=30, pairs=90, text_pairs=60)


@pytest.fixture(scope="module")
def world():
    return build_world(SETTINGS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return ensure_world(SETTINGS, tmp_path_factory.mktemp("worlds"))


def every_page(world):
    """{tile name less `dist_`: lines} over all splits."""
    splits = [*world.pairs.values(), world.text, world.questions]
    return {one.tile_name(chunk): page.lines for split in splits for one in split.articles for chunk, page in enumerate(one.pages)}


def words(lines):
    return [word.strip(".,()") for line in lines for word in line.split()]


def test_the_data_room_reads_every_file(folder):
    for name, rows in (("train", 90), ("eval", 9), ("test", 9)):
        pairs = read_pairs(PairSource(f"{name}_hn.jsonl"), [folder], folder)
        assert len(pairs) == rows
        for row in pairs:
            for path in (row.positive, *row.negatives):
                assert path.parent.parent == folder / "images"
                assert Image.open(path).convert("RGB").size == (192, 128)
            assert article_of(row.positive.name) not in {article_of(one.name) for one in row.negatives}
            assert len(set(row.negatives)) == len(row.negatives) <= 4
    texts = read_texts(TextSource("text"), [folder], folder)
    assert len(texts) == 60
    assert all(row.passage not in row.negatives for row in texts)
    questions = read_question_set(QuestionSetSource(QUESTION_SET), [folder], folder)
    assert len(questions.questions) == 30
    assert len(questions.tiles) == 90
    assert not questions.unreachable
    assert questions.tiles_dir == folder / "test" / "tiles"
    assert len({question.id for question in questions.questions}) == 30


def test_raw_rows_have_the_seeds_keys(folder):
    row = json.loads((folder / "train_hn.jsonl").read_text().splitlines()[0])
    assert set(row) == {"query", "chunk_path", "neg_chunk_paths"}
    assert row["chunk_path"].startswith("images/shard_00")
    row = json.loads((folder / "text" / "chunk_000" / "filtered_hn.jsonl").read_text().splitlines()[0])
    assert set(row) == {"query", "passage", "neg_passages"}
    tree = json.loads((folder / QUESTION_SET).read_text())
    assert set(tree) == {"description", "tiles_dir", "questions", "golden_mapping"}
    assert tree["tiles_dir"] == "test/tiles"
    assert set(tree["questions"][0]) == {"id", "problem", "answer"}
    assert all(isinstance(golden, list) for golden in tree["golden_mapping"].values())


def test_an_answer_stands_on_exactly_one_tile_of_its_article(folder, world):
    pages = every_page(world)
    questions = read_question_set(QuestionSetSource(QUESTION_SET), [folder], folder)
    assert {tile.path.name.removeprefix("dist_") for tile in questions.tiles} <= set(pages)
    for question in questions.questions:
        (golden,) = question.golden
        tiles = [tile for tile in questions.tiles if tile.article == golden]
        assert len(tiles) == 3
        assert sum(question.answer in words(pages[tile.path.name]) for tile in tiles) == 1
        assert question.answer not in words([question.problem])
        assert question.answer.isdigit() or question.answer.istitle()


def test_a_pair_names_the_tile_that_answers_it(world):
    for name in ("train", "eval", "test"):
        for asked in world.pairs[name].asked:
            shown = [asked.answer in words(page.lines) for page in asked.article.pages]
            assert shown == [chunk == asked.fact.chunk for chunk in range(3)]


def test_distractors_have_near_equal_titles_and_no_questions(folder, world):
    named = {path.name for path in (folder / "test" / "tiles").iterdir()}
    distractors = {article_of(name) for name in named if name.startswith("dist_")}
    asked = {asked.article.id for asked in world.questions.asked}
    assert len(distractors) == 15
    assert not distractors & asked
    families = {article.id: article.family for article in world.questions.articles}
    near = {families[one] for one in distractors} & {families[one] for one in asked}
    assert len(near) >= 5


def test_the_first_negative_is_the_same_fact_of_a_near_equal_title(world):
    split = world.pairs["train"]
    rng = tinywiki._rng(SETTINGS, "a test")
    families = [one.family for one in split.articles]
    hard = 0
    for asked in split.asked:
        negatives = split.neighbours.of(rng, asked)
        assert all(article.id != asked.article.id for article, _ in negatives)
        if not negatives or families.count(asked.article.family) == 1:
            continue
        article, chunk = negatives[0]
        hard += 1
        assert article.family == asked.article.family
        assert [fact.kind for fact in article.facts if fact.chunk == chunk].count(asked.fact.kind) == 1
    assert hard > 20


def test_no_article_is_in_two_splits(monkeypatch):
    monkeypatch.setattr(tinywiki, "_rng", lambda settings, part: random.Random("the same for all parts"))
    world = build_world(SETTINGS)
    splits = [*world.pairs.values(), world.text, world.questions]
    titles = [article.title.text for split in splits for article in split.articles]
    assert len(titles) > 80
    assert len(set(titles)) == len(titles)


def test_paraphrases_are_for_the_text_pairs_and_the_question_set():
    def share(split):
        paraphrased = [any(asked.text.startswith(one.split("{it}")[0]) for one in asked.fact.kind.paraphrases) for asked in split.asked]
        plain = [any(asked.text.startswith(one.split("{it}")[0]) for one in asked.fact.kind.plain) for asked in split.asked]
        return sum(now and not before for now, before in zip(paraphrased, plain, strict=True)) / len(split.asked)

    always, never = build_world(replace(SETTINGS, paraphrases=1.0)), build_world(replace(SETTINGS, paraphrases=0.0))
    assert share(always.text) > 0.8
    assert share(always.questions) > 0.8
    for split in (always.pairs["train"], never.text, never.questions):
        assert share(split) == 0


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_knobs_of_a_world_act(share):
    world = build_world(replace(SETTINGS, near_duplicates=share, layout_shift=share))
    articles = world.pairs["train"].articles
    assert {page.layout for one in articles for page in one.pages} == ({"night", "poster"} if share else {"article", "infobox"})
    families = {one.family for one in articles}
    assert len(families) <= len(articles) / 2 if share else len(families) == len(articles)


def test_more_training_pairs_leave_the_question_set_alone(world):
    more = build_world(replace(SETTINGS, pairs=120, text_pairs=0))
    assert [asked.text for asked in more.questions.asked] == [asked.text for asked in world.questions.asked]
    other = build_world(replace(SETTINGS, seed=4))
    assert not {one.title.text for one in other.questions.articles} & {one.title.text for one in world.questions.articles}


def test_too_many_questions_for_the_articles_is_an_error_of_the_recipe():
    with pytest.raises(SettingError, match="at most 45 questions for 30 articles"):
        replace(SETTINGS, questions=46).check()
    build_world(replace(SETTINGS, questions=45))
    build_world(WorldSettings(articles=2, questions=3, pairs=1, text_pairs=0))


def content(world):
    """Everything that a world says, as one digest: titles, pages, questions, negatives."""
    digest = hashlib.sha256()
    for name, split in [*sorted(world.pairs.items()), ("text", world.text), ("questions", world.questions)]:
        rng = tinywiki._rng(world.settings, f"{name}/negatives")
        for article in split.articles:
            digest.update(
                repr((article.id, article.family, [(page.lines, page.layout, page.font, page.size) for page in article.pages])).encode()
            )
        for asked in split.asked:
            negatives = [article.tile_name(chunk) for article, chunk in split.neighbours.of(rng, asked)]
            digest.update(repr((asked.text, asked.answer, asked.article.tile_name(asked.fact.chunk), negatives)).encode())
    return digest.hexdigest()[:16]


def test_golden_digest_of_a_world(world):
    """A change here is a change of every world: raise GENERATOR with it, and take the new digest."""
    assert (tinywiki.GENERATOR, content(world)) == (2, "ca85fa9b5b0e9548")


def test_a_world_does_not_depend_on_the_hash_seed(world):
    program = (
        "import importlib.util, sys; spec = importlib.util.spec_from_file_location('t', sys.argv[1]);"
        "t = importlib.util.module_from_spec(spec); spec.loader.exec_module(t); print(t.content(t.build_world(t.SETTINGS)))"
    )
    env = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", program, __file__], env=env, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [content(world)]


def test_a_world_is_found_again_and_another_one_lies_beside_it(folder, monkeypatch):
    monkeypatch.setattr(tinywiki, "build_world", lambda settings: pytest.fail("generated again"))
    assert ensure_world(SETTINGS, folder.parent) == folder
    assert ensure_world(replace(SETTINGS, folder="elsewhere"), folder.parent) == folder
    monkeypatch.undo()
    other = ensure_world(replace(SETTINGS, pairs=3, text_pairs=0), folder.parent)
    assert other != folder
    assert len((other / "train_hn.jsonl").read_text().splitlines()) == 3


def test_callers_at_the_same_time_get_one_whole_world(tmp_path):
    small = replace(SETTINGS, articles=6, questions=5, pairs=10)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: ensure_world(small, tmp_path), range(4)))
    assert len(set(found)) == 1
    assert [path.name for path in tmp_path.iterdir()] == [found[0].name]
    assert len(list((found[0] / "test" / "tiles").iterdir())) == 18


def test_a_break_leaves_nothing_behind(tmp_path, monkeypatch):
    def broken(path, pixels):
        raise KeyboardInterrupt

    monkeypatch.setattr(tinywiki, "write_png", broken)
    with pytest.raises(KeyboardInterrupt):
        ensure_world(SETTINGS, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_its_mark_is_an_error_that_says_what_to_do(tmp_path):
    small = replace(SETTINGS, articles=4, questions=2, pairs=2, text_pairs=0)
    found = ensure_world(small, tmp_path)
    mark = found / "world.json"
    mark.write_text(mark.read_text().replace('"seed": 3', '"seed": 4'))
    with pytest.raises(DataError, match=r"mark of another world.*delete the folder"):
        ensure_world(small, tmp_path)
    mark.unlink()
    with pytest.raises(DataError, match=r"no readable world\.json.*delete the folder"):
        ensure_world(small, tmp_path)


def test_a_place_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file.*cannot be written.*data\.world\.folder"):
        ensure_world(SETTINGS, Path(tmp_path / "file"))

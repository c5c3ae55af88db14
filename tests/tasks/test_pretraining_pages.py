"""What the pretraining tasks are made of: pages whose words and looks no world has, labels by place, and drills with true answers."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from stairstep.models.inputs import load_tokenizer
from stairstep.models.prompts import Prompts
from stairstep.models.sources import shipped_bases
from stairstep.models.weights import read_config
from stairstep.tasks.pretraining.comparing import NONE, QUALIFIERS, named_qualifier
from stairstep.tasks.pretraining.exam import PARTS, open_exam
from stairstep.tasks.pretraining.glyphs import CELL, FIRST, glyph_pages, labels
from stairstep.tasks.pretraining.matching import matches
from stairstep.tasks.pretraining.pages import _WORLDLY, generic_page, share_at, unworldly_name, varied
from stairstep.tasks.pretraining.reading import answer_batch, value_labels
from stairstep.tasks.pretraining.samples import BLANK, drill, questions, transcriptions
from stairstep.tasks.pretraining.settings import ReadingTaskSettings
from stairstep.tiny.articles import Title
from stairstep.tiny.fonts import PRETRAINING_FONTS, WORLD_FONTS
from stairstep.tiny.kinds import KINDS
from stairstep.tiny.layouts import PRETRAINING_LAYOUTS, SHIFTED_LAYOUTS, WORLD_LAYOUTS
from stairstep.tiny.phrases import TRANSCRIBE, UNKNOWN
from stairstep.tiny.words import respelled, world_name


def test_no_name_of_a_world_is_practised():
    rng = random.Random(0)
    names = [world_name(rng) for _ in range(3000)]
    names += [respelled(rng, name) for name in names]
    assert all(_WORLDLY.fullmatch(name) for name in names), "every name of a world must be told as one"
    practised = [unworldly_name(rng) for _ in range(3000)]
    assert not [name for name in practised if _WORLDLY.fullmatch(name)]
    assert not set(practised) & set(names)
    assert {letter for name in practised for letter in name.lower()} == set("abcdefghijklmnopqrstuvwxyz")


@pytest.mark.parametrize(
    ("look", "fonts", "layouts"),
    [
        ("one", set(PRETRAINING_FONTS[:1]), set(PRETRAINING_LAYOUTS[:1])),
        ("generic", set(PRETRAINING_FONTS), set(PRETRAINING_LAYOUTS)),
        ("world", set(WORLD_FONTS), {*WORLD_LAYOUTS, *SHIFTED_LAYOUTS}),
    ],
)
def test_a_look_has_its_fonts_and_layouts(look, fonts, layouts):
    pages = glyph_pages(random.Random(1), 300, look)
    assert {page.font for page in pages} == fonts
    assert {page.layout for page in pages} == layouts


def test_the_embedder_sees_nothing_of_a_worlds_look():
    found = matches(random.Random(2), 300)
    assert {one.page.font for one in found} == set(PRETRAINING_FONTS)
    assert {one.page.layout for one in found} == set(PRETRAINING_LAYOUTS)
    shared = [sum(word.strip("()?.") in one.passage.split() for word in one.query.split()) for one in found]
    assert sum(count >= 1 for count in shared) > 0.9 * len(found)


def test_pages_of_one_article_are_told_apart_by_their_facts_alone():
    found = matches(random.Random(2), 300)
    together = [(one, other) for one, other in pairwise(found) if _title(one) == _title(other)]
    assert len(together) > 40
    told = [bool(_words_of(one.query) & (_words_of(one.passage) - _words_of(other.passage))) for one, other in together]
    assert sum(told) > 0.7 * len(told), "most queries have a word that the article's other page has not"


def test_a_varied_page_is_the_page_in_other_shades():
    """Each hand differs from the next, and the letters stay: a varied page correlates with its own page more than with another."""
    rng = random.Random(9)
    pages = [one.page.render() for one in matches(rng, 12)]
    hands = [varied(rng, page) for page in pages]
    assert all(hand.shape == page.shape and hand.dtype == np.uint8 for hand, page in zip(hands, pages, strict=True))
    assert len({hand.tobytes() for hand in hands}) == len(hands)
    alike = np.corrcoef([_ink(one) for one in (*pages, *hands)])[: len(pages), len(pages) :]
    assert (alike.argmax(axis=0) == np.arange(len(pages))).mean() > 0.6
    assert any(hand[-1].mean() < 90 for hand in (varied(rng, pages[0]) for _ in range(40))), "now and then light on dark"


def test_labels_tell_the_character_at_each_place():
    characters = [("A", 0, 0, 9, 14), ("b", 34, 20, 42, 30), ("i", 68, 70, 69, 80), ("é", 100, 100, 110, 110)]
    found = labels(characters)
    assert found.shape == (24, 8)
    # (cell, place): row 2 × 6 + column 2 = 14; the narrow i covers no centre
    expected = {(0, 0): "A", (0, 1): "A", (1, 0): "b", (1, 1): "b", (14, 1): "i"}
    for (cell, place), character in expected.items():
        assert found[cell, place] == ord(character) - FIRST + 1
    assert np.count_nonzero(found) == len(expected)


def test_labels_agree_with_the_ink():
    """Where a page is blank no character is told, and most places with a character have ink."""
    drawing = generic_page(random.Random(3), "one").drawing()
    found = labels(drawing.characters).reshape(4, 48) > 0
    dark = (drawing.pixels.min(axis=2) < 200).reshape(4, 32, 48, 4).any(axis=(1, 3))
    assert found.any()
    assert dark[found].mean() > 0.95
    assert drawing.pixels.shape[:2] == (4 * CELL, 6 * CELL)


def test_shares_go_over_equal_parts():
    assert [share_at((0.1, 0.2, 0.3), step, 9) for step in range(1, 10)] == [0.1] * 3 + [0.2] * 3 + [0.3] * 3


def test_a_drill_tells_the_truth():
    practice = questions(random.Random(4), "world", 200, 3, 0.3)
    unknown = [one for one in practice.samples if one.answer == UNKNOWN]
    assert 0.15 < len(unknown) / 200 < 0.45
    assert {len(one.tiles) for one in practice.samples} == {3}
    shown = {tile for one in practice.samples for tile in one.tiles}
    assert shown - {BLANK} == set(range(len(practice.pages))), "pages that nobody sees are not drawn"
    for one in practice.samples:
        holding = [tile for tile in one.tiles if tile != BLANK and one.answer in _words(practice.pages[tile])]
        assert len(holding) == (one.answer != UNKNOWN), one
        assert len(set(one.tiles)) == 3 or BLANK in one.tiles
    places = [
        one.tiles.index(next(tile for tile in one.tiles if tile != BLANK and one.answer in _words(practice.pages[tile])))
        for one in practice.samples
        if one.answer != UNKNOWN
    ]
    assert set(places) == {0, 1, 2}, "the right tile stands anywhere"


def _ink(page: np.ndarray) -> np.ndarray:
    """How much there is to read in each 8×16 piece of a page, whatever its shades."""
    edges = np.abs(np.diff(page.astype(np.float32).mean(axis=2), axis=0, append=0))[:-8]
    return edges.reshape(15, 8, 12, 16).mean(axis=(1, 3)).ravel()


def _title(match) -> list[str]:
    """The words of a title in whichever form: `Ofennas Ofaz` and `Ofaz (ofennas)` are one."""
    return sorted(word.strip("()").lower() for row in match.page.rows if row.role == "title" for word in row.text.split())


def _words_of(text: str) -> set[str]:
    return {word.strip(".,()?").lower() for word in text.split()}


def _words(page) -> set[str]:
    return {word.strip(".,()") for line in page.lines for word in line.split()}


def test_every_value_is_labelled_where_it_stands_with_its_own_fact():
    practice = questions(random.Random(8), "world", 60, 1, 0.3)
    assert len(practice.facts) == len(practice.pages)
    numbers: dict[str, int] = {}
    for page, facts in zip(practice.pages, practice.facts, strict=True):
        found = value_labels(page.drawing(), facts).reshape(4, 6)
        assert len(set(found.ravel()) - {0}) == len(facts) > 0, "each fact has a number of its own"
        for fact in facts:
            (line,) = [index for index, text in enumerate(page.lines) if fact.value in {word.strip(".") for word in text.split()}]
            under = set(found[line]) - {0}
            assert numbers.setdefault(fact.kind.label + fact.kind.sentence, max(under)) in under, "one kind of fact, one number everywhere"
            cells = np.flatnonzero(found == numbers[fact.kind.label + fact.kind.sentence])
            assert set(cells // 6) == {line}
            assert list(cells) == list(range(cells[0], cells[-1] + 1)), "a value lies under neighbouring tokens"
    blank = value_labels(practice.pages[0].drawing(), [])
    assert not blank.any()


def test_a_question_is_compared_with_its_page_by_what_both_say():
    tokenizer = load_tokenizer(shipped_bases()["tiny-reader"])
    prompts = Prompts(tokenizer, read_config(shipped_bases()["tiny-reader"]))
    practice = questions(random.Random(9), "world", 200, 1, 0.6, same_fact=0.5)
    batch = answer_batch(prompts, practice)
    ids, width = batch["ids"].flatten().tolist(), batch["ids"].shape[1]
    words = list(QUALIFIERS)
    blank = 0
    for row, one in enumerate(practice.samples):
        (tile,), (asked, fact) = one.tiles, one.about
        said = tokenizer.decode(ids[row * width : batch["named"][row] + 1])
        assert said.endswith((asked.title.word, asked.title.word.lower(), asked.title.synonym)), said
        assert one.question.startswith(said.partition("user\n")[2])
        assert words[batch["qualifiers"][row]] == asked.title.word
        following = int(batch["ends"][row]) + 1
        assert tokenizer.decode(ids[following : following + len(one.answer)]) == one.answer, "the answer begins from there"
        if tile == BLANK:
            blank += 1
            assert batch["shown"][row] == NONE and not batch["cells"][row].any()
            continue
        page, shown = practice.pages[tile], practice.articles[tile]
        assert words[batch["shown"][row]] == shown.title.word
        cells = batch["cells"][row].reshape(4, 6)
        lines = [index for index, text in enumerate(page.lines) for other in shown.facts if other.kind == fact.kind and other.value in text]
        assert sorted(set(cells.nonzero()[:, 0].tolist())) == lines
        if one.answer != UNKNOWN:
            assert lines and shown.title == asked.title
    assert 0 < blank < 40


def test_a_qualifier_is_found_where_the_article_is_named():
    lake = next(kind for kind in KINDS if ("Lake", "water") in kind.qualifiers)
    asked = "When did high water strike the water Torv?"
    place, number = named_qualifier(asked, Title(lake, "Torv", "Lake", "water"))
    assert asked[: place + 1] == "When did high water strike the water"
    assert list(QUALIFIERS)[number] == "Lake"


def test_the_same_fact_of_others_is_shown_as_often_as_asked_for():
    def share(same_fact: float) -> float:
        practice = questions(random.Random(10), "world", 300, 1, 1.0, same_fact=same_fact)
        return (
            sum(
                any(other.kind == one.about[1].kind for tile in one.tiles if tile != BLANK for other in practice.facts[tile])
                for one in practice.samples
            )
            / 300
        )

    assert share(0.0) < 0.45
    assert share(0.9) > 0.8


def test_transcriptions_are_the_pages_lines():
    practice = transcriptions(random.Random(5), 40, "world")
    for index, one in enumerate(practice.samples):
        assert one.question == TRANSCRIBE
        assert one.tiles == (index,)
        assert one.answer == "\n".join(practice.pages[index].lines)


def test_a_drill_is_a_function_of_seed_and_step():
    settings = ReadingTaskSettings()
    assert drill(settings, 0, 7, 100, 12) == drill(settings, 0, 7, 100, 12)
    assert drill(settings, 0, 7, 100, 12) != drill(settings, 0, 8, 100, 12)
    assert drill(settings, 0, 7, 100, 12) != drill(settings, 1, 7, 100, 12)


def test_an_exam_asks_what_its_tiles_say():
    exam = open_exam(6, 30)
    assert len(exam.asked) == 30
    by_pixels = {tile.numpy().tobytes(): page for tile, page in zip(exam.pixels, exam.shelf.pages, strict=True)}
    for name in ("single", "three", "wrong_tile", "wrong_tiles"):
        known = not name.startswith("wrong")
        asking, expected = PARTS[name](exam)
        for one, (question, tiles), wanted in zip(exam.asked, asking, expected, strict=True):
            assert question == one.text
            shown = [by_pixels[tile.numpy().tobytes()] for tile in tiles]
            said = [one.answer in _words(page) and " ".join(page.lines).startswith(one.article.title.text) for page in shown]
            assert sum(said) == known
            assert wanted == (one.answer if known else UNKNOWN)
    asking, expected = PARTS["blank"](exam)
    assert all(bool((tiles[0] == 255).all()) for _, tiles in asking)
    asking, expected = PARTS["swapped"](exam)
    assert len(asking) > 20
    answers = {one.text: one.answer for one in exam.asked}
    originals = {tile.numpy().tobytes() for tile in exam.pixels}
    for (question, tiles), wanted in zip(asking, expected, strict=True):
        assert wanted != answers[question]
        assert tiles[0].numpy().tobytes() not in originals

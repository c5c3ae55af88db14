"""Thousands of articles: every page fits, every fact stands once, titles are near-equal where they should be; and a sane table of kinds."""

import random
import re
import string

import pytest

from stairstep.tiny.articles import WORLD, Library, Manner, article_id
from stairstep.tiny.asking import ask_about, mention
from stairstep.tiny.fonts import PRETRAINING_FONTS
from stairstep.tiny.kinds import KINDS
from stairstep.tiny.layouts import PRETRAINING_LAYOUTS
from stairstep.tiny.render import fits
from stairstep.tiny.words import pretraining_name, pretraining_word, respelled, world_name

PRETRAINING = Manner(pretraining_name, PRETRAINING_FONTS, PRETRAINING_LAYOUTS, PRETRAINING_LAYOUTS)


@pytest.fixture(scope="module", params=[WORLD, PRETRAINING], ids=["world", "pretraining"])
def families(request):
    library = Library(random.Random("test"), 0.6, 0.5, request.param)
    return [library.family(3) for _ in range(600)]


def test_every_page_fits_and_every_fact_stands_once(families):
    articles = [article for family in families for article in family]
    assert len(articles) > 900
    for article in articles:
        assert len(article.pages) == 3
        assert len(article.facts) >= 4
        assert {fact.chunk for fact in article.facts} == {0, 1, 2}
        for page in article.pages:
            assert fits(page.rows, page.layout, page.font, page.size)
            assert " ".join(page.lines).startswith(article.title.text)
        for fact in article.facts:
            shown = [len(re.findall(rf"\b{fact.value}\b", "\n".join(page.lines))) for page in article.pages]
            assert shown == [int(chunk == fact.chunk) for chunk in range(3)]
    assert {page.size for article in articles for page in article.pages} >= {18, 20}


def test_a_family_has_near_equal_titles_and_other_values(families):
    larger = [family for family in families if len(family) > 1]
    assert 0.5 < len(larger) / len(families) < 0.7
    respellings = 0
    for family in larger:
        first = family[0]
        assert len({article.id for article in family}) == len(family)
        values = [fact.value for article in family for fact in article.facts]
        assert len(set(values)) == len(values)
        assert not set(values) & {word.strip("()") for article in family for word in article.title.text.split()}
        for article in family[1:]:
            same_name, same_word = article.title.name == first.title.name, article.title.word == first.title.word
            assert same_name != same_word, "one of name and qualifier is another"
            respellings += same_word
    assert respellings > 50
    titles = [article.title.text for family in families for article in family]
    assert len(set(titles)) == len(titles)


def test_article_ids_are_file_names_that_keep_the_article():
    assert article_id("Mara Velin (painter)") == "mara_velin_painter"
    library = Library(random.Random(0), 1.0, 0.0)
    for article in library.family(3):
        assert set(article.id) <= set(string.ascii_lowercase + "_")
        assert article.tile_name(2) == f"{article.id}_chunk_2.png"
        assert article.tile_name(0, distractor=True) == f"dist_{article.id}_chunk_0.png"


def test_the_table_of_kinds_keeps_its_promises():
    labels = 0
    for kind in KINDS:
        names = [word.lower() for pair in kind.qualifiers for word in pair]
        assert len(set(names)) == len(names) >= 14
        assert len({fact.label for fact in kind.facts}) == len(kind.facts) == 7
        templates = [template for fact in kind.facts for template in (*fact.plain, *fact.paraphrases)]
        assert len(set(templates)) == len(templates), "a question asks for one fact"
        for fact in kind.facts:
            labels += 1
            assert len(fact.label) <= 8
            assert fact.sentence.count("{}") == 1
            assert all(template.count("{it}") == 1 and template.endswith("?") for template in (*fact.plain, *fact.paraphrases))
            content = {word for word in re.findall(r"[a-z]{4,}", f"{fact.label} {fact.sentence}".lower()) if word not in {"since", "first"}}
            for template in fact.paraphrases:
                assert not content & set(re.findall(r"[a-z]+", template.lower())), (fact.label, template)
            stems = {word[:3] for word in re.findall(r"[a-z]{3,}", f"{fact.label} {fact.sentence}".lower())} - {"the", "had"}
            for template in fact.plain:
                assert stems & {word[:3] for word in re.findall(r"[a-z]{3,}", template.lower())}, (fact.label, template)
    assert labels == 42


def test_paraphrases_mostly_name_the_synonym():
    rng = random.Random(2)
    article = Library(rng, 0.0, 0.0).family(1)[0]
    title = article.title
    forms = {title.text, f"the {title.word.lower()} {title.name}", f"the {title.synonym} {title.name}"}
    plain = [mention(rng, article, False) for _ in range(300)]
    free = [mention(rng, article, True) for _ in range(300)]
    assert set(plain) == forms - {f"the {title.synonym} {title.name}"}
    assert set(free) == forms
    assert 140 < free.count(f"the {title.synonym} {title.name}") < 220


def test_questions_about_an_article_spread_over_its_tiles():
    rng = random.Random(3)
    for _ in range(50):
        article = Library(rng, 0.0, 0.5).family(1)[0]
        asked = ask_about(rng, article, 3, 0.5)
        assert {one.fact.chunk for one in asked} == {0, 1, 2}
        assert all(one.text.endswith("?") and "{" not in one.text for one in asked)


def test_words_are_of_two_sorts():
    rng = random.Random(4)
    names = [world_name(rng) for _ in range(2000)]
    assert len(set(names)) > 1900
    assert all(4 <= len(name) <= 7 and name.istitle() for name in names)
    for name in names[:300]:
        other = respelled(rng, name)
        assert other != name
        changed = sum(a != b for a, b in zip(name, other, strict=False)) + abs(len(name) - len(other))
        assert changed == 1
    words = [pretraining_word(rng) for _ in range(2000)]
    assert set("".join(words)) >= set(string.ascii_lowercase + string.digits)
    assert len(set(words) & set(names)) < 5

"""Candidates against naive loops over rows and documents, and the original's faults: own negatives, repeated tiles, same article."""

import random

import pytest
import torch

from stairstep.objectives import MaskSettings, candidates, distinct


def _naive(queries, positives, documents, articles, same_article):
    allowed = []
    for row, text in enumerate(queries):
        answers = {positives[other] for other in range(len(queries)) if queries[other] == text}
        known = {articles[documents.index(one)] for one in answers} - {None}
        allowed.append([])
        for place, document in enumerate(documents):
            hit = document in answers or (same_article and articles[place] is not None and articles[place] in known)
            allowed[row].append(document == positives[row] or not hit)
    return allowed


@pytest.mark.parametrize("same_article", [False, True])
def test_random_batches_equal_the_naive_masks(same_article):
    draw = random.Random(3)
    masked = 0
    for _ in range(60):
        rows = draw.randint(1, 12)
        tiles = [f"tile {number}" for number in range(draw.randint(1, 15))]
        queries = [f"question {draw.randint(0, 6)}" for _ in range(rows)]
        positives = [draw.choice(tiles) for _ in range(rows)]
        documents = list(dict.fromkeys(positives + draw.sample(tiles, draw.randint(0, len(tiles)))))
        articles = [draw.choice([None, "a", "b", "c"]) for _ in documents]
        found = candidates(queries, positives, documents, articles, MaskSettings(same_article=same_article))
        true = _naive(queries, positives, documents, articles, same_article)
        assert found.allowed.tolist() == true
        assert [documents[column] for column in found.positive.tolist()] == positives
        assert found.masked_pairs == sum(not one for row in true for one in row)
        assert found.negative_pairs == int(found.negatives.sum()) == sum(map(sum, true)) - rows
        masked += found.masked_pairs
    assert masked > 100


def test_a_tile_is_no_negative_of_a_query_for_which_it_is_positive():
    found = candidates(["a", "b", "a"], ["x", "x", "y"], ["x", "y", "z"], None, MaskSettings())
    assert found.allowed.tolist() == [[True, False, True], [True, True, True], [False, True, True]]
    assert found.negatives.tolist() == [[False, False, True], [False, True, True], [False, False, True]]
    assert found.masked_pairs == 2


def test_a_named_hard_negative_of_the_same_article_is_masked_too():
    given = (["a"], ["x"], ["x", "x2", "z"], ["article", "article", None])
    assert candidates(*given, MaskSettings()).allowed.tolist() == [[True, False, True]]
    assert candidates(*given, MaskSettings(same_article=False)).allowed.tolist() == [[True, True, True]]


def test_unknown_articles_are_not_one_article():
    found = candidates(["a", "b"], ["x", "y"], ["x", "y"], [None, None], MaskSettings())
    assert found.masked_pairs == 0


def test_distinct_keeps_the_order_of_first_appearance():
    assert distinct(["b", "a", "b", "c", "a"]) == (["b", "a", "c"], [0, 1, 0, 2, 1])


def test_inconsistent_batches_are_refused():
    settings = MaskSettings()
    with pytest.raises(ValueError, match="2 queries but 1 positives"):
        candidates(["a", "b"], ["x"], ["x"], None, settings)
    with pytest.raises(ValueError, match="each document is given once"):
        candidates(["a"], ["x"], ["x", "x"], None, settings)
    with pytest.raises(ValueError, match="positive 'y' is not among"):
        candidates(["a"], ["y"], ["x"], None, settings)
    with pytest.raises(ValueError, match="2 documents but 1 articles"):
        candidates(["a"], ["x"], ["x", "z"], [None], settings)


def test_it_moves_between_devices():
    found = candidates(["a"], ["x"], ["x"], None, MaskSettings()).to("meta")
    assert found.allowed.device == found.positive.device == torch.device("meta")
    assert found.masked_pairs == 0

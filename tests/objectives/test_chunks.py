"""The cut of a batch and its dealing: limits, padding, order, balance; the number of workers changes the dealing alone."""

import itertools
import random

import pytest

from stairstep.objectives import GradCacheSettings, Side, cut, cut_batch, deal


def _random_costs(count, seed):
    draw = random.Random(seed)
    return [draw.randint(1, 30) for _ in range(count)]


@pytest.mark.parametrize("tokens", [None, 1, 25, 60, 10_000])
@pytest.mark.parametrize("items", [None, 1, 3])
def test_each_item_once_within_the_limits(tokens, items):
    costs = _random_costs(23, 1)
    chunks = cut(costs, GradCacheSettings(chunk_tokens=tokens, chunk_items=items))
    assert sorted(position for chunk in chunks for position in chunk) == list(range(23))
    for chunk in chunks:
        padded = len(chunk) * max(costs[position] for position in chunk)
        assert tokens is None or padded <= tokens or len(chunk) == 1
        assert items is None or len(chunk) <= items
        assert list(chunk) == sorted(chunk)
    if tokens is None and items is None:
        assert len(chunks) == 1


def test_no_chunk_could_have_taken_the_next_item():
    costs = _random_costs(40, 2)
    chunks = cut(costs, GradCacheSettings(chunk_tokens=60))
    for chunk, following in itertools.pairwise(chunks):
        heaviest = max(costs[position] for position in chunk)
        assert heaviest >= max(costs[position] for position in following)
        assert (len(chunk) + 1) * heaviest > 60


def test_equal_shapes_lie_together():
    shapes = [(2, 8), (4, 4)] * 4
    chunks = cut([16] * 8, GradCacheSettings(chunk_tokens=None, chunk_items=4), shapes)
    assert chunks == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert cut([16] * 8, GradCacheSettings(chunk_tokens=None, chunk_items=4)) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    with pytest.raises(ValueError, match="8 items but 2 shapes"):
        cut([16] * 8, GradCacheSettings(), shapes[:2])


def test_a_batch_is_numbered_through_with_queries_first():
    work: dict[Side, float] = {"query": 4.0, "document": 2.5}
    chunks = cut_batch([5, 9, 5], [50, 60, 70, 80], GradCacheSettings(chunk_tokens=150), frozen=("document",), token_work=work)
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert [(chunk.side, chunk.positions, chunk.cost, chunk.frozen) for chunk in chunks] == [
        ("query", (0, 1, 2), 27, False),
        ("document", (3,), 80, True),
        ("document", (1, 2), 140, True),
        ("document", (0,), 50, True),
    ]
    assert chunks[0].work == 4 * 27
    assert chunks[1].work == 2.5 * 80


@pytest.mark.parametrize("workers", [1, 2, 3, 7, 50])
def test_dealing_is_complete_ordered_and_balanced(workers):
    chunks = cut_batch(_random_costs(16, 3), _random_costs(48, 4), GradCacheSettings(chunk_tokens=40))
    dealt = deal(chunks, workers)
    assert len(dealt) == workers
    assert sorted((chunk for share in dealt for chunk in share), key=lambda one: one.index) == chunks
    for share in dealt:
        assert [chunk.index for chunk in share] == sorted(chunk.index for chunk in share)
    loads = [sum(chunk.work for chunk in share) for share in dealt]
    assert max(loads) - min(loads) <= max(chunk.work for chunk in chunks)
    assert deal(list(chunks), workers) == dealt
    assert deal([], workers) == [[] for _ in range(workers)]

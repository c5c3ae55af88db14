"""Metrics against a second definition that writes every ranking out, sorts it, and counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stairstep.evaluation.ranking import Candidates
from stairstep.evaluation.retrieval import ARTICLE_METRICS, article_metrics, pair_metrics, retrieve, scores_of
from stairstep.evaluation.statistics import wilson


def naive_metrics(scores: list[int], ids: list[str], articles: list[str], golden: list[str]) -> dict[str, float]:
    order = sorted(range(len(ids)), key=lambda index: (-scores[index], ids[index]))
    tile_articles = [articles[index] for index in order]
    article_ranking: list[str] = []
    for article in tile_articles:
        if article not in article_ranking:
            article_ranking.append(article)
    found = {f"hit@{k}": float(any(article in golden for article in tile_articles[:k])) for k in (1, 3, 5, 10)}
    found["mrr"] = 0.0
    for place, article in enumerate(article_ranking):
        if article in golden:
            found["mrr"] = 1 / (place + 1)
            break
    for k in (5, 10):
        gains = [1 / math.log2(place + 2) if article in golden else 0 for place, article in enumerate(article_ranking[:k])]
        ideal = sum(1 / math.log2(place + 2) for place in range(min(k, len(set(golden)))))
        found[f"ndcg@{k}"] = sum(gains) / ideal
    return found


@pytest.mark.parametrize("seed", range(12))
def test_equals_the_written_out_definition_on_random_rankings_with_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n_articles = int(rng.integers(1, 40))
    tiles = int(rng.integers(n_articles, 150))
    articles = [f"a{one}" for one in [*range(n_articles), *rng.integers(0, n_articles, tiles - n_articles)]]
    ids = [f"{one:04d}" for one in rng.permutation(tiles)]
    documents = rng.integers(-2, 3, (tiles, 3))
    queries = rng.integers(-2, 3, (25, 3))
    # up to eight golden articles, some of which have no tile, one now and then twice
    golden = [[f"a{one}" for one in rng.integers(0, n_articles + 5, int(rng.integers(1, 9)))] for _ in queries]
    key_bytes = int(rng.choice([8, 2_000, 10**9]))

    found = retrieve(torch.tensor(queries).float(), Candidates.of(torch.tensor(documents).float(), ids), articles, golden, 10, key_bytes)
    lost = 0
    for query, own, one in zip(queries, golden, found, strict=True):
        row = article_metrics([articles[index] for index in one.top], own, one.golden_ranks)
        expected = naive_metrics((documents @ query).tolist(), ids, articles, own)
        assert {metric: row[key] for metric, key in ARTICLE_METRICS.items()} == pytest.approx(expected, abs=1e-12)
        assert len(one.golden_ranks) == len(set(own))
        lost += one.golden_ranks.count(None)
    assert lost, "no golden article was without a tile"


def test_seed_000_counts_tiles_and_the_rest_counts_articles() -> None:
    # Three tiles of article x stand before the only tile of y: y is fourth among tiles and second among articles.
    candidates = Candidates.of(torch.tensor([[4.0], [3.0], [2.0], [1.0], [0.0]]), list("abcde"))
    (found,) = retrieve(torch.tensor([[1.0]]), candidates, ["x", "x", "x", "y", "z"], [["y"]], 10)
    row = article_metrics([["x", "x", "x", "y", "z"][index] for index in found.top], ["y"], found.golden_ranks)
    assert (row["hit@1"], row["hit@3"], row["hit@5"]) == (False, False, True)
    assert row["reciprocal_rank"] == 0.5
    assert row["ndcg@5"] == pytest.approx(1 / math.log2(3))


def test_a_golden_article_without_a_tile_is_a_miss_and_stays_in_the_ideal() -> None:
    candidates = Candidates.of(torch.tensor([[2.0], [1.0]]), ["a", "b"])
    (found,) = retrieve(torch.tensor([[1.0]]), candidates, ["x", "y"], [["x", "nowhere"]], 10)
    row = article_metrics(["x", "y"], ["x", "nowhere"], found.golden_ranks)
    assert found.golden_ranks == (1, None)
    assert row["ndcg@5"] == pytest.approx(1 / (1 + 1 / math.log2(3)))
    (found,) = retrieve(torch.tensor([[1.0]]), candidates, ["x", "y"], [["nowhere"]], 10)
    row = article_metrics(["x", "y"], ["nowhere"], found.golden_ranks)
    assert not any(row.values())


def test_scores_are_means_with_the_interval_of_their_kind() -> None:
    rows = [article_metrics(["x"], ["x"], [1])] * 30 + [article_metrics(["y"], ["x"], [4])] * 10
    scores = scores_of(rows, ARTICLE_METRICS)
    assert list(scores) == list(ARTICLE_METRICS)
    assert scores["hit@1"] == wilson(30, 40)
    assert scores["mrr"].value == pytest.approx((30 + 10 / 4) / 40)
    assert scores["mrr"].low < scores["mrr"].value < scores["mrr"].high
    assert scores["mrr"].n == 40


def test_pair_metrics_follow_from_the_rank() -> None:
    assert pair_metrics(1) == {"hit@1": True, "hit@3": True, "hit@5": True, "hit@10": True, "reciprocal_rank": 1.0}
    assert pair_metrics(4) == {"hit@1": False, "hit@3": False, "hit@5": True, "hit@10": True, "reciprocal_rank": 0.25}
    assert not any(pair_metrics(11)[key] for key in ("hit@1", "hit@3", "hit@5", "hit@10"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_retrieves_as_the_cpu_does() -> None:
    generator = torch.Generator().manual_seed(2)
    queries, documents = (torch.randint(-2, 3, (count, 8), generator=generator).float() for count in (40, 3000))
    ties, articles = [f"{one * 7919 % 3000:05d}" for one in range(3000)], [f"a{one % 700}" for one in range(3000)]
    golden = [[f"a{one}", f"a{one + 680}"] for one in range(40)]
    here = retrieve(queries, Candidates.of(documents, ties), articles, golden, 10)
    there = retrieve(queries.cuda(), Candidates.of(documents.cuda(), ties), articles, golden, 10)
    assert here == there

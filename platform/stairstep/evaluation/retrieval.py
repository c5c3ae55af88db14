"""Retrieval metrics of one question set or of one held-out split, each question by itself and then as scores with intervals.

hit@k is seed 000's R@k: one of the first k *tiles* belongs to a golden article. MRR and NDCG are over *articles*, each standing where
its first tile stands; MRR looks at the whole ranking and has no cut. An article's place is one plus the number of articles whose best
tile is better than its own best tile, so no ranking is ever written out and nothing is cut off. A golden article that has no tile in
the set cannot be found: it counts as a miss and stays in NDCG's ideal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .ranking import KEY_BYTES, Candidates, best_of_keys, key_blocks
from .statistics import Interval, bootstraps, wilson

HITS = (1, 3, 5, 10)
NDCGS = (5, 10)
# The name of each metric, and the key of a row that it is the mean of.
ARTICLE_METRICS = {
    **{f"hit@{k}": f"hit@{k}" for k in HITS},
    "mrr": "reciprocal_rank",
    **{f"ndcg@{k}": f"ndcg@{k}" for k in NDCGS},
}
PAIR_METRICS = {**{f"hit@{k}": f"hit@{k}" for k in HITS}, "mrr": "reciprocal_rank"}


@dataclass(frozen=True)
class Retrieved:
    """What one query found: its first candidates with their scores, and the rank of each golden article (None: not in the set)."""

    top: tuple[int, ...]
    scores: tuple[float, ...]
    golden_ranks: tuple[int | None, ...]


def retrieve(
    queries: Tensor,
    candidates: Candidates,
    articles: Sequence[str],
    golden: Sequence[Sequence[str]],
    k: int,
    key_bytes: int = KEY_BYTES,
) -> list[Retrieved]:
    """Rank all candidates for each query; `articles` names the article of each candidate, `golden` those of each query."""
    if len(articles) != len(candidates) or len(golden) != len(queries):
        raise ValueError(f"{len(candidates)} candidates of {len(articles)} articles, {len(queries)} queries of {len(golden)}")
    names = {name: index for index, name in enumerate(dict.fromkeys(articles))}
    device = candidates.vectors.device
    article_of = torch.tensor([names[name] for name in articles], device=device)
    # The best tile of every article takes another 8 bytes an article and query: counted into the block.
    found: list[Retrieved] = []
    for rows, keys in key_blocks(queries, candidates, key_bytes * len(candidates) // (len(candidates) + len(names))):
        best = torch.full((len(keys), len(names)), torch.iinfo(torch.int64).min, dtype=torch.int64, device=device)
        best.scatter_reduce_(1, article_of.expand(len(keys), -1), keys, "amax")
        ranks = _ranks_of(best, [[names.get(name, -1) for name in dict.fromkeys(one)] for one in golden[rows]])
        top = best_of_keys(keys, k)
        for indexes, scores, own in zip(top.indexes.tolist(), top.scores.tolist(), ranks, strict=True):
            found.append(Retrieved(tuple(indexes), tuple(scores), own))
    return found


def article_metrics(top_articles: Sequence[str], golden: Sequence[str], golden_ranks: Sequence[int | None]) -> dict[str, float | bool]:
    """The metrics of one question from the articles of its first tiles and the ranks of its golden articles."""
    wanted = set(golden)
    hits = [article in wanted for article in top_articles]
    found = sorted(rank for rank in golden_ranks if rank is not None)
    row: dict[str, float | bool] = {f"hit@{k}": any(hits[:k]) for k in HITS}
    row["reciprocal_rank"] = 1 / found[0] if found else 0.0
    for k in NDCGS:
        ideal = sum(_gain(place) for place in range(1, min(k, len(wanted)) + 1))
        row[f"ndcg@{k}"] = sum(_gain(rank) for rank in found if rank <= k) / ideal if ideal else 0.0
    return row


def pair_metrics(rank: int) -> dict[str, float | bool]:
    """The metrics of one held-out pair from the rank of its positive tile."""
    return {**{f"hit@{k}": rank <= k for k in HITS}, "reciprocal_rank": 1 / rank}


def scores_of(rows: Sequence[Mapping[str, object]], metrics: Mapping[str, str]) -> dict[str, Interval]:
    """Each metric over the rows with its interval: Wilson where the rows say true or false, bootstrap otherwise."""
    columns = {name: [row[key] for row in rows] for name, key in metrics.items()}
    rates = {name: values for name, values in columns.items() if all(isinstance(value, bool) for value in values)}
    means = {name: np.asarray(values, dtype=np.float64) for name, values in columns.items() if name not in rates}
    found = {name: wilson(sum(map(bool, values)), len(values)) for name, values in rates.items()}
    found.update(zip(means, bootstraps(list(means.values())), strict=True))
    return {name: found[name] for name in metrics}


def _gain(place: int) -> float:
    return 1 / math.log2(place + 1)


def _ranks_of(best: Tensor, wanted: Sequence[Sequence[int]]) -> list[tuple[int | None, ...]]:
    """Ranks (from 1) of the wanted columns of each row of `best` [Q, A]; -1 stands for an article that is not there."""
    width = max((len(one) for one in wanted), default=0)
    columns = torch.tensor([[*one, *([-1] * (width - len(one)))] for one in wanted], dtype=torch.int64, device=best.device)
    ranks = torch.empty_like(columns)
    for place in range(width):  # one golden column at a time: [Q, golden, A] would be many times the keys themselves
        own = best.gather(1, columns[:, place : place + 1].clamp_min(0))
        ranks[:, place] = 1 + (best > own).sum(dim=1)
    table = ranks.cpu().tolist()
    return [
        tuple(rank if column >= 0 else None for rank, column in zip(line, one, strict=False))
        for line, one in zip(table, wanted, strict=True)
    ]

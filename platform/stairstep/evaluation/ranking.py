"""The order of candidates for each query: by score, then by a tie order that the caller gives, exact everywhere and without a sort.

A score and its candidate's place in the tie order are packed into one 64-bit key. Keys of one query are all different, so the best k,
the best of a group and the rank of one candidate each have one answer: no tie is left to an algorithm, not even at the k-th place.
Scores are products in float64 rounded to float32. So they are the same whether the device would use TF32, under autocast, and in
blocks of any shape; equal vectors score equally.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KEY_BYTES = 64 * 2**20  # memory for the keys of one block of queries against all candidates; about three times that in all
_BLOCK = 4096  # documents widened to float64 at a time


@dataclass(frozen=True)
class TopK:
    """The first k candidates of each query, best first: indexes int64 [Q, k] and scores float32 [Q, k], on the CPU."""

    indexes: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Candidates:
    """What is ranked: document vectors [D, d], the vector of each candidate [C] and its place in the tie order [C].

    Candidates that share one vector (one tile under two names) share one score by construction.
    """

    vectors: Tensor
    rows: Tensor
    order: Tensor

    @staticmethod
    def of(vectors: Tensor, ties: Sequence[str | tuple[str, ...]], rows: Sequence[int] | None = None) -> Candidates:
        """Candidates on the vectors' device; `ties` (one per candidate) decide between equal scores, the smaller comes first."""
        count = len(vectors) if rows is None else len(rows)
        if len(ties) != count or count == 0:
            raise ValueError(f"{count} candidates with {len(ties)} tie keys: expected one key each, and at least one candidate")
        places = torch.empty(count, dtype=torch.int64)
        places[torch.tensor(sorted(range(count), key=ties.__getitem__))] = torch.arange(count)
        mapping = torch.arange(count) if rows is None else torch.tensor(rows, dtype=torch.int64)
        return Candidates(vectors, mapping.to(vectors.device), places.to(vectors.device))

    def __len__(self) -> int:
        return len(self.rows)


def top_k(queries: Tensor, candidates: Candidates, k: int, key_bytes: int = KEY_BYTES) -> TopK:
    """The best k candidates (or all, where there are fewer) of each query [Q, d]."""
    indexes, scores = [], []
    for _, keys in key_blocks(queries, candidates, key_bytes):
        best = best_of_keys(keys, k)
        indexes.append(best.indexes)
        scores.append(best.scores)
    return TopK(torch.cat(indexes), torch.cat(scores))


def ranks(queries: Tensor, candidates: Candidates, targets: Tensor, key_bytes: int = KEY_BYTES) -> Tensor:
    """The rank (from 1) of one target candidate [Q] of each query among all candidates: int64 [Q] on the CPU."""
    found = []
    for rows, keys in key_blocks(queries, candidates, key_bytes):
        own = keys.gather(1, targets[rows].to(keys.device)[:, None])
        found.append(1 + (keys > own).sum(dim=1).cpu())
    return torch.cat(found)


def best_of_keys(keys: Tensor, k: int) -> TopK:
    """The largest k keys of each row."""
    best = torch.topk(keys, min(k, keys.shape[1]), dim=1, largest=True, sorted=True)
    return TopK(best.indices.cpu(), score_of(best.values).cpu())


def key_blocks(queries: Tensor, candidates: Candidates, key_bytes: int = KEY_BYTES) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of queries with the keys int64 [block, C] of all their candidates: a larger key is a better candidate."""
    if queries.ndim != 2 or len(queries) == 0 or queries.shape[1] != candidates.vectors.shape[1]:
        raise ValueError(f"queries {tuple(queries.shape)} do not fit documents {tuple(candidates.vectors.shape)}")
    block = max(1, key_bytes // (8 * len(candidates)))
    for start in range(0, len(queries), block):
        rows = slice(start, min(start + block, len(queries)))
        scores = _scores(queries[rows], candidates.vectors)
        yield rows, _keys(scores[:, candidates.rows], candidates.order)


def score_of(keys: Tensor) -> Tensor:
    """The float32 scores that keys were made of."""
    ordered = (keys >> 32).to(torch.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _scores(queries: Tensor, documents: Tensor) -> Tensor:
    wide = queries.detach().double()
    scores = torch.empty((len(queries), len(documents)), dtype=torch.float32, device=documents.device)
    for start in range(0, len(documents), _BLOCK):
        block = slice(start, start + _BLOCK)
        scores[:, block] = wide @ documents[block].detach().double().T
    if not torch.isfinite(scores).all():
        raise ValueError("a score is not finite: an embedding is broken")
    return scores.add_(0.0)  # adding zero turns -0.0 into 0.0, which must not order before it


def _keys(scores: Tensor, order: Tensor) -> Tensor:
    # The bits of a float32 order like a signed integer once those of negative numbers are turned round.
    bits = scores.view(torch.int32)
    ordered = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)
    return ordered.to(torch.int64).mul_(2**32).add_(len(order) - 1 - order)

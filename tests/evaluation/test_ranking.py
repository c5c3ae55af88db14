"""Top-k and ranks against plain sorting in Python, on scores full of exact ties."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stairstep.evaluation.ranking import Candidates, ranks, top_k


def naive_order(query: list[int], documents: list[list[int]], rows: list[int], ties: list) -> list[int]:
    """Candidates sorted by falling score, then by rising tie key, with whole numbers."""
    scores = [sum(a * b for a, b in zip(query, documents[row], strict=True)) for row in rows]
    return sorted(range(len(rows)), key=lambda index: (-scores[index], ties[index]))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("key_bytes", [8, 5_000, 10**9])  # one query at a time, a few, all
def test_equals_a_full_sort_with_ties_by_id(seed: int, key_bytes: int) -> None:
    rng = np.random.default_rng(seed)
    queries = rng.integers(-2, 3, (17, 3)).tolist()
    documents = rng.integers(-2, 3, (90, 3)).tolist()
    rows = rng.permutation([*range(90), *rng.integers(0, 90, 30)]).tolist()  # some vectors stand for several candidates
    ties = [f"{one:03d}" for one in rng.permutation(120)]
    candidates = Candidates.of(torch.tensor(documents).float(), ties, rows)
    expected = [naive_order(query, documents, rows, ties) for query in queries]

    boundary_ties = 0
    for k in (1, 3, 10, 119, 120, 500):
        best = top_k(torch.tensor(queries).float(), candidates, k, key_bytes)
        assert best.indexes.tolist() == [order[:k] for order in expected]
        exact = [
            [sum(a * b for a, b in zip(q, documents[rows[i]], strict=True)) for i in order[:k]]
            for q, order in zip(queries, expected, strict=True)
        ]
        assert best.scores.tolist() == exact
        if k < 120:
            boundary_ties += sum(
                sum(a * b for a, b in zip(q, documents[rows[order[k]]], strict=True)) == line[-1]
                for q, order, line in zip(queries, expected, exact, strict=True)
            )
    assert boundary_ties > 10, "the fixture has no ties at the k-th place"

    targets = rng.integers(0, 120, 17).tolist()
    found = ranks(torch.tensor(queries).float(), candidates, torch.tensor(targets), key_bytes)
    assert found.tolist() == [order.index(target) + 1 for order, target in zip(expected, targets, strict=True)]


def test_tie_keys_may_be_tuples_and_negative_zero_ties_with_zero() -> None:
    documents = torch.tensor([[0.0], [-1e-30], [0.0], [-1.0]])
    ties = [("b", "2"), ("a", "9"), ("b", "1"), ("a", "0")]
    best = top_k(torch.tensor([[1e-30]]), Candidates.of(documents, ties), 4)  # the second product is -1e-60: -0.0 in float32
    assert best.indexes.tolist() == [[1, 2, 0, 3]]
    assert best.scores[0, :3].tolist() == [0.0, 0.0, 0.0]


def test_scores_do_not_depend_on_block_shapes_or_float32_precision_settings() -> None:
    generator = torch.Generator().manual_seed(1)
    queries = torch.randn(33, 256, generator=generator)
    documents = torch.randn(300, 256, generator=generator)
    documents[250] = documents[3]
    ties = [f"{one:04d}" for one in range(300)]
    whole = top_k(queries, Candidates.of(documents, ties), 300)
    for k_bytes, part in ((8, slice(0, 33)), (30_000, slice(5, 6))):
        again = top_k(queries[part], Candidates.of(documents, ties), 300, k_bytes)
        assert torch.equal(again.indexes, whole.indexes[part])
        assert torch.equal(again.scores, whole.scores[part])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = top_k(queries, Candidates.of(documents, ties), 300)
    assert torch.equal(cast.scores, whole.scores)
    for line in whole.indexes.tolist():  # equal vectors stand side by side, the smaller id first
        assert line.index(250) == line.index(3) + 1


def test_refuses_what_it_cannot_rank() -> None:
    documents = torch.eye(3)
    with pytest.raises(ValueError, match="not finite"):
        top_k(torch.tensor([[float("nan"), 0, 0]]), Candidates.of(documents, ["a", "b", "c"]), 1)
    with pytest.raises(ValueError, match="do not fit"):
        top_k(torch.ones(2, 4), Candidates.of(documents, ["a", "b", "c"]), 1)
    with pytest.raises(ValueError, match="one key each"):
        Candidates.of(documents, ["a", "b"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_ranks_as_the_cpu_does() -> None:
    generator = torch.Generator().manual_seed(1)
    queries, documents = torch.randn(50, 64, generator=generator), torch.randn(5000, 64, generator=generator)
    queries, documents = queries.sign(), documents.sign()  # whole numbers: ties everywhere, and exact on both
    ties = [f"{one * 7919 % 5000:05d}" for one in range(5000)]
    here = top_k(queries, Candidates.of(documents, ties), 20)
    there = top_k(queries.cuda(), Candidates.of(documents.cuda(), ties), 20)
    assert torch.equal(here.indexes, there.indexes)
    assert torch.equal(here.scores, there.scores)

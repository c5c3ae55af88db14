"""The toy world of these tests: an encoder with LoRA and dropout, a batch with every difficulty, the full-batch truth, simulated ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stairstep.objectives import (
    Candidates,
    Chunk,
    GradCacheSettings,
    LossOutput,
    MaskSettings,
    Objective,
    chunk_randomness,
    cut_batch,
    distinct,
)
from stairstep.objectives import candidates as candidates_of

SEED, STEP = 7, 3


class ToyEncoder(nn.Module):
    """A frozen layer with LoRA (B randomised) and dropout for both sides, and a trained layer of its own for tiles."""

    def __init__(self, dropout: float = 0.3, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        width, dimension, rank = 12, 8, 3
        draw = torch.Generator().manual_seed(11)

        def matrix(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype) / shape[-1] ** 0.5)

        self.base = matrix(width, width).requires_grad_(False)
        self.lora_a, self.lora_b = matrix(rank, width), matrix(width, rank)
        self.vit = matrix(width, width)
        self.head = matrix(dimension, width)
        self.dropout = nn.Dropout(dropout)
        self.forwards = 0

    def trained(self) -> list[nn.Parameter]:
        return [one for one in self.parameters() if one.requires_grad]

    def forward(self, inputs: Tensor, tiles: bool) -> Tensor:
        self.forwards += 1
        linear = nn.functional.linear
        if tiles:
            inputs = torch.tanh(linear(inputs, self.vit))
        low = linear(linear(self.dropout(inputs), self.lora_a), self.lora_b)
        hidden = torch.tanh(linear(inputs, self.base) + low)
        return nn.functional.normalize(linear(self.dropout(hidden), self.head), dim=-1)


@dataclass
class Case:
    """A global batch: inputs of both sides, who is whose candidate, and what each item costs."""

    queries: Tensor
    documents: Tensor
    candidates: Candidates
    query_costs: list[int] = field(default_factory=list)
    document_costs: list[int] = field(default_factory=list)
    tiles: bool = True
    device: str = "cpu"

    def chunks(self, **limits: Any) -> list[Chunk]:
        frozen = limits.pop("frozen", ())
        settings = GradCacheSettings(**{"chunk_tokens": None, **limits})
        return cut_batch(self.query_costs, self.document_costs, settings, frozen=frozen)

    def encode(self, encoder: ToyEncoder) -> Callable[[Chunk], Tensor]:
        def run(chunk: Chunk) -> Tensor:
            inputs = self.queries if chunk.side == "query" else self.documents
            return encoder(inputs[list(chunk.positions)], tiles=self.tiles and chunk.side == "document")

        return run

    def loss(self, objective: Objective) -> Callable[[Tensor, Tensor], LossOutput]:
        return lambda queries, documents: objective(queries, documents, self.candidates)


def make_case(
    rows: int = 6,
    hard: int = 2,
    duplicates: bool = True,
    same_article: bool = True,
    dtype: torch.dtype = torch.float64,
    tiles: bool = True,
    seed: int = 5,
    device: str = "cpu",
) -> Case:
    """`rows` rows with up to `hard` negatives each (every third row one fewer); with duplicates, texts and tiles return among them."""
    draw = torch.Generator().manual_seed(seed)
    texts = [f"question {row}" for row in range(rows)]
    positives = [f"tile {row}" for row in range(rows)]
    if duplicates and rows >= 4:
        texts[1] = texts[0]  # the same text with another positive
        positives[3] = positives[2]  # the same tile for another text
    given = []
    for row in range(rows):
        given.append(positives[row])
        given += [f"negative {row}.{number}" for number in range(hard - (row % 3 == 2 and hard > 0))]
        if duplicates and hard and row >= 2:
            given.append(positives[row - 2])  # a positive of another row as hard negative
    documents, _ = distinct(given)
    articles = [f"article {int(one.split()[1].split('.')[0]) // 2}" if "tile" in one else None for one in documents]
    width = 12
    costs = torch.randint(3, 9, (rows + len(documents),), generator=draw).tolist()
    return Case(
        torch.randn(rows, width, generator=draw, dtype=torch.float64).to(dtype).to(device),
        torch.randn(len(documents), width, generator=draw, dtype=torch.float64).to(dtype).to(device),
        candidates_of(texts, positives, documents, articles, MaskSettings(same_article=same_article)).to(device),
        costs[:rows],
        costs[rows:],
        tiles,
        device,
    )


def full_backward(case: Case, chunks: Sequence[Chunk], encoder: ToyEncoder, objective: Objective) -> LossOutput:
    """The truth: every chunk's forward with its graph, one loss, one backward by autograd through all of it."""
    encode = case.encode(encoder)
    rows: dict[str, dict[int, Tensor]] = {"query": {}, "document": {}}
    for chunk in chunks:
        with chunk_randomness(SEED, STEP, chunk.index, torch.device(case.device)):
            embeddings = encode(chunk)
        if chunk.frozen:
            embeddings = embeddings.detach()
        rows[chunk.side].update(zip(chunk.positions, embeddings, strict=True))
    queries, documents = (torch.stack([side[place] for place in range(len(side))]) for side in rows.values())
    output = case.loss(objective)(queries, documents)
    output.loss.backward()
    return output


def gradients(*modules: nn.Module) -> dict[str, Tensor]:
    """Gradients by name, of what has one."""
    return {
        f"{place}.{name}": one.grad.clone()
        for place, module in enumerate(modules)
        for name, one in module.named_parameters()
        if one.grad is not None
    }


def worst_error(found: dict[str, Tensor], true: dict[str, Tensor]) -> float:
    """The greatest relative error in norm; every true gradient must be more than nothing."""
    assert found.keys() == true.keys()
    assert true
    worst = 0.0
    for name, gradient in true.items():
        assert gradient.norm() > 1e-12, f"{name}: the gradient is nothing, so the comparison says nothing"
        worst = max(worst, float((found[name] - gradient).norm() / gradient.norm()))
    return worst


class SimulatedRank:
    """One of several ranks in one process: threads that hand a baton on, so that only one computes (and draws random numbers) at a time."""

    def __init__(self, rank: int, size: int, shared: _Shared) -> None:
        self.rank, self.size, self._shared, self._operation = rank, size, shared, 0

    def gather_rows(self, local: Tensor, counts: Sequence[int]) -> Tensor:
        assert len(local) == counts[self.rank]
        return torch.cat(self._exchange("gather", local.detach().clone()))

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        for one, *everyone in zip(tensors, *self._exchange("sum", [one.clone() for one in tensors]), strict=True):
            one.copy_(sum(everyone[1:], everyone[0]))

    def any(self, flag: bool) -> bool:
        return any(self._exchange("any", flag))

    def barrier(self) -> None:
        self._exchange("barrier", None)

    def _exchange(self, kind: str, value: Any) -> list[Any]:
        slot = self._shared.slots.setdefault(self._operation, {})
        self._operation += 1
        slot[self.rank] = (kind, value)
        self._shared.baton.release()
        try:
            self._shared.barrier.wait(timeout=30)
        finally:
            self._shared.baton.acquire()
        assert {one[0] for one in slot.values()} == {kind}, "ranks called different operations"
        return [slot[rank][1] for rank in range(self.size)]


class _Shared:
    def __init__(self, size: int) -> None:
        self.baton, self.barrier = threading.Lock(), threading.Barrier(size)
        self.slots: dict[int, dict[int, tuple[str, Any]]] = {}


def run_ranks(size: int, work: Callable[[SimulatedRank], Any]) -> list[Any]:
    """`work` on each simulated rank; the results in rank order, or the first exception."""
    shared, results, failures = _Shared(size), {}, []

    def run(rank: int) -> None:
        with shared.baton:
            try:
                results[rank] = work(SimulatedRank(rank, size, shared))
            except BaseException as error:  # noqa: BLE001 - carried to the main thread
                failures.append(error)
                shared.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise next((one for one in failures if not isinstance(one, threading.BrokenBarrierError)), failures[0])
    return [results[rank] for rank in range(size)]

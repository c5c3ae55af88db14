"""GradCache: the gradient of a loss over the whole global batch, with the activations of one chunk in memory at a time.

First pass: every worker encodes its chunks without graph, and the embeddings are gathered, detached, in the order of the global batch.
Every worker then computes the full loss and its gradient at the embeddings. Second pass: each chunk again, with the same random state, and
its slice of that gradient through it. Encoder gradients are summed over the workers once; the loss's own parameters have all of theirs.

A chunk that keeps its graph from the first pass is not computed again; as chunks still go backward in their order, no bit changes. There
is no DDP wrapper: a parameter that no worker used in this step has no gradient on any of them, one that some used has zeros on the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from .chunks import Chunk, Side, deal
from .collective import Alone, Collective
from .graphs import GraphBudget
from .loss import LossOutput, full_precision
from .randomness import chunk_randomness

Encode = Callable[[Chunk], Tensor]  # a chunk's embeddings [n, d], in the order of its positions
Loss = Callable[[Tensor, Tensor], LossOutput]  # of all queries [Q, d] and all documents [D, d]

_SIDES: tuple[Side, Side] = ("query", "document")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class StepOutput:
    """One step's loss over the global batch: the same on every worker, but for what says `own`."""

    loss: float
    metrics: dict[str, float]
    per_query: Tensor  # [Q]
    not_finite: dict[Side, list[int]]  # rows whose embedding is not finite; looked for only where the loss is not
    own_chunks: int = 0
    own_kept_chunks: int = 0
    own_kept_mb: float = 0.0


@dataclass
class _Encoded:
    """A chunk of this worker after the first pass."""

    chunk: Chunk
    embeddings: Tensor  # detached; empty once taken
    graph: Tensor | None = None  # the embeddings with their graph, where it is kept

    def take(self) -> Tensor:
        """The embeddings, which are then no longer kept here."""
        taken, self.embeddings = self.embeddings, torch.empty(0)
        return taken


@dataclass(frozen=True)
class _Chance:
    """What a chunk's random state depends on beside its index, and where it is set."""

    seed: int
    step: int
    device: torch.device

    def run(self, encode: Encode, chunk: Chunk) -> Tensor:
        # Autocast may cache a parameter's low-precision copy; one made without a graph would cut the gradient of the next chunk.
        torch.clear_autocast_cache()
        with chunk_randomness(self.seed, self.step, chunk.index, self.device):
            embeddings = encode(chunk)
        if embeddings.ndim != 2 or len(embeddings) != len(chunk.positions):
            shape, side = tuple(embeddings.shape), chunk.side
            raise ValueError(f"chunk {chunk.index} ({side}) has {len(chunk.positions)} items, but its embeddings are {shape}")
        return embeddings


@dataclass
class _Gradients:
    """Gradients of one step, kept apart from what earlier steps left in `.grad` so that those are not summed over the workers again."""

    parameters: Sequence[nn.Parameter]
    earlier: list[Tensor | None] = field(default_factory=list)

    def start(self) -> None:
        self.earlier = [one.grad for one in self.parameters]
        for one in self.parameters:
            one.grad = None

    def finish(self) -> None:
        for one, earlier in zip(self.parameters, self.earlier, strict=True):
            if earlier is not None:
                one.grad = earlier if one.grad is None else earlier.add_(one.grad)


def cached_step(
    chunks: Sequence[Chunk],
    encode: Encode,
    loss: Loss,
    *,
    parameters: Sequence[nn.Parameter],
    loss_parameters: Sequence[nn.Parameter] = (),
    collective: Collective | None = None,
    seed: int,
    step: int,
    keep_graphs_mb: int | Literal["auto"] = 0,
    device: torch.device | str = "cpu",
) -> StepOutput:
    """The loss of the global batch; its gradient is added to `.grad` of the encoder's `parameters` and of the `loss_parameters`.

    `parameters` are all that is trained in the encoder, in the same order on every worker. A loss that is not finite comes back without
    any gradient.
    """
    workers = collective or Alone()
    chance = _Chance(seed, step, torch.device(device))
    budget = GraphBudget(keep_graphs_mb, chance.device, workers.size)
    dealt = deal(chunks, workers.size)
    mine = [_first_pass(chunk, encode, chance, budget) for chunk in dealt[workers.rank]]
    sides = {chunk.side for chunk in chunks if not chunk.frozen}
    result, at_rows = _at_embeddings(dealt, mine, loss, sides, loss_parameters, workers, chance.device, budget)
    if at_rows is None:
        return result

    slopes = _by_chunk(mine, at_rows)
    gradients = _Gradients(parameters)
    gradients.start()
    while mine:
        _second_pass(mine.pop(0), encode, chance, slopes)
    _sum_over_workers(parameters, workers)
    gradients.finish()
    return result


def cached_loss(
    chunks: Sequence[Chunk],
    encode: Encode,
    loss: Loss,
    *,
    collective: Collective | None = None,
    seed: int = 0,
    step: int = 0,
    device: torch.device | str = "cpu",
) -> StepOutput:
    """The loss of the global batch alone, by the same chunks and workers; for validation."""
    workers = collective or Alone()
    chance = _Chance(seed, step, torch.device(device))
    dealt = deal(chunks, workers.size)
    with torch.no_grad():
        mine = [chance.run(encode, chunk).detach() for chunk in dealt[workers.rank]]
        queries, documents = _gather(dealt, mine, workers, chance.device)
        return _result(loss(queries, documents), queries, documents, (len(mine), 0, 0.0))


def _at_embeddings(
    dealt: Sequence[Sequence[Chunk]],
    mine: Sequence[_Encoded],
    loss: Loss,
    sides: set[Side],
    loss_parameters: Sequence[nn.Parameter],
    workers: Collective,
    device: torch.device,
    budget: GraphBudget,
) -> tuple[StepOutput, dict[Side, Tensor] | None]:
    """The loss over the global batch and its gradient at the rows of each side, none where it is not finite.

    Loss parameters get theirs at once. Nothing of the loss but these gradients is in memory afterwards."""
    queries, documents = _gather(dealt, [one.take() for one in mine], workers, device)
    leaves = {side: rows.requires_grad_() for side, rows in zip(_SIDES, (queries, documents), strict=True) if side in sides}
    learned = [one for one in loss_parameters if one.requires_grad]
    with torch.enable_grad():
        output = loss(queries, documents)
    result = _result(output, queries, documents, (len(mine), budget.kept_chunks, budget.kept_bytes / 2**20))
    if not math.isfinite(result.loss):
        return result, None
    with full_precision(device):
        slopes = torch.autograd.grad(output.loss, [*leaves.values(), *learned], allow_unused=True)
    for parameter, slope in zip(learned, slopes[len(leaves) :], strict=True):
        if slope is not None:
            parameter.grad = slope if parameter.grad is None else parameter.grad.add_(slope)
    return result, {side: _or_zeros(slope, rows) for slope, (side, rows) in zip(slopes, leaves.items(), strict=False)}


def _first_pass(chunk: Chunk, encode: Encode, chance: _Chance, budget: GraphBudget) -> _Encoded:
    if not budget.attempts(chunk):
        with torch.no_grad():
            return _Encoded(chunk, chance.run(encode, chunk).detach())
    with torch.enable_grad(), budget.measuring():
        graph = chance.run(encode, chunk)
    return _Encoded(chunk, graph.detach(), graph if budget.accepts(chunk) else None)


def _by_chunk(mine: Sequence[_Encoded], at_rows: dict[Side, Tensor]) -> dict[int, Tensor]:
    """The gradient at each chunk's rows, by the chunk's index. All at once: a list of rows on its way to a GPU waits for the GPU's work."""
    found: dict[int, Tensor] = {}
    for side, rows in at_rows.items():
        chunks = [one.chunk for one in mine if one.chunk.side == side and not one.chunk.frozen]
        if not chunks:
            continue
        ordered = rows[[place for chunk in chunks for place in chunk.positions]]
        found.update(zip((chunk.index for chunk in chunks), ordered.split([len(chunk.positions) for chunk in chunks]), strict=True))
    return found


def _second_pass(one: _Encoded, encode: Encode, chance: _Chance, slopes: dict[int, Tensor]) -> None:
    """Sends the chunk's slice of the gradient through its graph, which is built again unless it was kept."""
    chunk, graph = one.chunk, one.graph
    if chunk.frozen:
        return
    if graph is None:
        with torch.enable_grad():
            graph = chance.run(encode, chunk)
    if not graph.requires_grad:
        raise ValueError(f"chunk {chunk.index} ({chunk.side}) has embeddings without a graph: mark it frozen, or train something in it")
    with torch.autocast(chance.device.type, enabled=False):  # each operation goes back in the type that it went forward in
        graph.backward(slopes[chunk.index].to(graph.dtype))


def _gather(dealt: Sequence[Sequence[Chunk]], mine: Sequence[Tensor], workers: Collective, device: torch.device) -> tuple[Tensor, Tensor]:
    """All queries and all documents, in the order of the global batch, from every worker's chunks."""
    counts = [sum(len(chunk.positions) for chunk in share) for share in dealt]
    local = torch.cat(list(mine)) if mine else None
    if not all(counts):
        local = _agreed(local, workers, device)
    if local is None:
        raise ValueError("a batch without chunks has no loss: give cached_step at least one query and one document")
    gathered = workers.gather_rows(local, counts)
    queries, documents = (gathered[_order(dealt, side).to(gathered.device)] for side in _SIDES)
    return queries, documents


def _order(dealt: Sequence[Sequence[Chunk]], side: Side) -> Tensor:
    """For each row of a side, its place among the rows as the workers give them."""
    places: dict[int, int] = {}
    place = 0
    for chunk in (chunk for share in dealt for chunk in share):
        if chunk.side == side:
            places.update(zip(chunk.positions, range(place, place + len(chunk.positions)), strict=True))
        place += len(chunk.positions)
    given = sum(len(chunk.positions) for share in dealt for chunk in share if chunk.side == side)
    if given != len(places) or sorted(places) != list(range(given)):
        raise ValueError(f"the chunks' {side} positions must be 0 to {given - 1}, each once; found {sorted(places)[:20]}")
    return torch.tensor([places[row] for row in range(given)], dtype=torch.long)


def _agreed(local: Tensor | None, workers: Collective, device: torch.device) -> Tensor | None:
    """Rows for a worker that has none: it learns their width and type from the others, who all call this too."""
    mine = [0, 0] if local is None else [local.shape[1], _DTYPES.index(local.dtype) + 1]
    told = workers.gather_rows(torch.tensor([mine], device=device), [1] * workers.size)
    width, kind = told.amax(0).tolist()
    if local is not None or not kind:
        return local
    return torch.empty(0, width, dtype=_DTYPES[kind - 1], device=device)


def _sum_over_workers(parameters: Sequence[nn.Parameter], workers: Collective) -> None:
    """Sums gradients; which parameters have one is agreed first, so that all workers sum the same tensors."""
    if workers.size == 1:
        return
    device = parameters[0].device if parameters else torch.device("cpu")
    used = torch.tensor([float(one.grad is not None) for one in parameters], device=device)
    workers.sum_([used])
    summed = []
    for parameter, count in zip(parameters, used.tolist(), strict=True):
        if count:
            parameter.grad = _or_zeros(parameter.grad, parameter)
            summed.append(parameter.grad)
    workers.sum_(summed)


def _or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def _result(output: LossOutput, queries: Tensor, documents: Tensor, stats: tuple[int, int, float]) -> StepOutput:
    """The output as numbers, in one transfer from the device."""
    on_device = {name: one.double() for name, one in output.metrics.items() if isinstance(one, Tensor)}
    loss, *values = torch.stack([output.loss.detach().double(), *on_device.values()]).tolist()
    metrics = {name: one for name, one in output.metrics.items() if not isinstance(one, Tensor)}
    metrics.update(zip(on_device, values, strict=True))
    bad: dict[Side, list[int]] = {}
    if not math.isfinite(loss):
        rows = zip(_SIDES, (queries, documents), strict=True)
        bad = {side: (~one.detach().isfinite()).any(1).nonzero().flatten().tolist() for side, one in rows}
    return StepOutput(loss, metrics, output.per_query, bad, *stats)

"""The chunk is the unit of work and of chance: the global batch is cut into chunks, and chunks are dealt to the workers.

The cut is a function of the global batch alone. Whatever depends on a chunk (its batch mates, its dropout, its place in the order of
accumulation) is therefore the same for any number of workers; only the dealing knows how many there are, and all of them compute it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from .settings import GradCacheSettings

Side = Literal["query", "document"]


@dataclass(frozen=True)
class Chunk:
    """Items of one side that are encoded together."""

    index: int  # place among all chunks of the global batch
    side: Side
    positions: tuple[int, ...]  # rows of that side, ascending
    cost: int  # tokens, padding counted
    frozen: bool = False  # encoded once, without gradient
    token_work: float = 1.0

    @property
    def work(self) -> float:
        """What the chunk costs a worker, for dealing."""
        return self.cost * self.token_work


def cut_batch(
    queries: Sequence[int],
    documents: Sequence[int],
    settings: GradCacheSettings,
    *,
    document_shapes: Sequence[tuple[int, ...]] | None = None,
    frozen: Collection[Side] = (),
    token_work: Mapping[Side, float] | None = None,
) -> list[Chunk]:
    """The chunks of a global batch, queries first, from the tokens of each query and of each distinct document.

    `token_work` is what a token of each side costs, in any unit; it decides only which worker encodes what."""
    chunks: list[Chunk] = []
    sides: tuple[tuple[Side, Sequence[int], Sequence[tuple[int, ...]] | None], ...] = (
        ("query", queries, None),
        ("document", documents, document_shapes),
    )
    for side, costs, shapes in sides:
        for positions in cut(costs, settings, shapes):
            cost = len(positions) * max(costs[position] for position in positions)
            chunks.append(Chunk(len(chunks), side, positions, cost, side in frozen, (token_work or {}).get(side, 1.0)))
    return chunks


def cut(costs: Sequence[int], settings: GradCacheSettings, shapes: Sequence[tuple[int, ...]] | None = None) -> list[tuple[int, ...]]:
    """Positions by chunk. The costliest items come first, equal shapes together: little padding, and memory's peak is met at once."""
    if shapes is not None and len(shapes) != len(costs):
        raise ValueError(f"{len(costs)} items but {len(shapes)} shapes")
    order = sorted(range(len(costs)), key=lambda item: (-costs[item], shapes[item] if shapes else (), item))
    chunks: list[list[int]] = []
    for item in order:
        last = chunks[-1] if chunks else None
        if last is None or _full(last, costs, settings):
            chunks.append([item])
        else:
            last.append(item)
    return [tuple(sorted(positions)) for positions in chunks]


def _full(positions: list[int], costs: Sequence[int], settings: GradCacheSettings) -> bool:
    """Whether one more item of no greater cost would not go in; the first item is the costliest, and the others are padded to it."""
    items = len(positions) + 1
    if settings.chunk_items is not None and items > settings.chunk_items:
        return True
    return settings.chunk_tokens is not None and items * costs[positions[0]] > settings.chunk_tokens


def deal(chunks: Sequence[Chunk], workers: int) -> list[list[Chunk]]:
    """The chunks of each worker, in order of index: the next heaviest chunk always goes to the worker with the least work."""
    dealt: list[list[Chunk]] = [[] for _ in range(workers)]
    loads = [0.0] * workers
    for chunk in sorted(chunks, key=lambda one: (-one.work, one.index)):
        worker = min(range(workers), key=lambda one: (loads[one], one))
        loads[worker] += chunk.work
        dealt[worker].append(chunk)
    return [sorted(share, key=lambda one: one.index) for share in dealt]

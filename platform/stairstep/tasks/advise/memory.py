"""What memory decides: with GradCache not the batch but the chunk. The largest budget of tokens whose estimated peak fits.

A budget is a whole number of the costliest item (the largest tile of a sample, as the doctor's estimate has it). Memory grows with the
budget, so the largest that fits is found by halving. Where a trial step was taken, a chunk counts as much as it really took.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from stairstep.objectives.graphs import machine_memory
from stairstep.settings import InputError

from ..doctor.estimate import CHARACTERS_PER_TOKEN, TEMPLATE_TOKENS, MemoryEstimate, memory_estimate
from ..recipe import Recipe, ray_address
from ..run import device_of

MARGIN = 0.9  # of the memory that a plan may use


@dataclass(frozen=True)
class Memory:
    """The memory of one worker's device in bytes; `device`: where it is, None for one that is not here."""

    kind: Literal["cuda", "cpu"]
    total: int
    said: str
    device: torch.device | None = None


@dataclass(frozen=True)
class Budget:
    """The most items of the largest kind in a chunk, the tokens that they are, and the estimate with them and with one more."""

    items: int
    tokens: int
    estimate: MemoryEstimate
    further: MemoryEstimate | None  # None: the whole batch is one chunk


def memory_of(recipe: Recipe, planned_gb: float | None = None) -> Memory:
    """The memory of the device that the recipe would use here, or of one with so many GiB that is not here."""
    if planned_gb is not None:
        if not math.isfinite(planned_gb) or planned_gb <= 0:
            raise InputError(f"--memory-gb: expected the device's memory in GiB, for example 80; found {planned_gb:g}")
        kind: Literal["cuda", "cpu"] = "cpu" if recipe.cluster.device == "cpu" else "cuda"
        return Memory(kind, int(planned_gb * 2**30), f"{planned_gb:g} GiB, as --memory-gb says; estimated alone, nothing is measured")
    try:
        device = device_of(recipe)
    except InputError as error:
        raise InputError(f"{error}, or plan for a GPU that is not here with --memory-gb 80") from None
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return Memory("cuda", found.total_memory, f"{found.name}, {found.total_memory / 2**30:.1f} GiB", device)
    workers = max(1, recipe.cluster.workers) if ray_address(recipe.cluster.address) == "local" else 1
    total = machine_memory() // workers
    shared = f" for each of {workers} workers" if workers > 1 else ""
    return Memory("cpu", total, f"cpu, {total / 2**30:.1f} GiB of memory{shared}", device)


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest count from 0 to `most` that fits, where less never needs more; 0 is taken to fit."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def with_budget(recipe: Recipe, tokens: int) -> Recipe:
    """The recipe with chunks of at most so many tokens, however many items that is."""
    cached = replace(recipe.objective.gradcache, chunk_tokens=tokens, chunk_items=None)
    return replace(recipe, objective=replace(recipe.objective, gradcache=cached))


def costliest(recipe: Recipe, tile: tuple[int, int] | None, texts: Sequence[str]) -> int:
    """Tokens of the costliest document, template included, as the estimate counts them."""
    found = []
    if recipe.data.train:
        found.append(recipe.tiles.geometry().visual_tokens(*tile) if tile is not None else recipe.tiles.max_visual_tokens)
    if recipe.phases.any_text and texts:
        found.append(min(max(map(len, texts)) // CHARACTERS_PER_TOKEN, recipe.model.max_text_tokens - TEMPLATE_TOKENS))
    return max(found, default=recipe.tiles.max_visual_tokens) + TEMPLATE_TOKENS


def largest_budget(
    recipe: Recipe, model: nn.Module, tile: tuple[int, int] | None, texts: Sequence[str], memory: Memory, ratio: float = 1.0
) -> Budget | None:
    """The largest budget whose estimate leaves the margin free, up to the whole batch in one chunk; None where not one item fits."""
    cost, documents = costliest(recipe, tile, texts), recipe.optim.batch * (1 + recipe.data.hard_negatives)

    def estimate(items: int) -> MemoryEstimate:
        return memory_estimate(with_budget(recipe, items * cost), model, tile, texts, memory.kind, ratio)

    items = largest(lambda count: estimate(count).total <= MARGIN * memory.total, documents)
    if not items:
        return None
    return Budget(items, items * cost, estimate(items), estimate(items + 1) if items < documents else None)

"""A recipe's advice: the facts, then each rule in its turn, the token budget last, for it follows from all the others."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from stairstep.models.flops import forward_and_backward
from stairstep.models.load import load_encoder
from stairstep.models.sources import locate_here
from stairstep.settings import InputError, build, from_plain, merge, to_plain
from stairstep.tiles.geometry import FACTOR

from ..doctor import Patient
from ..doctor.estimate import TEMPLATE_TOKENS, MemoryEstimate, chunk_bytes, memory_estimate, trained_count
from ..doctor.machine import size
from ..doctor.models import hub_folder
from ..recipe import Recipe, RetrievalTaskSettings
from .facts import Facts, read_facts
from .memory import MARGIN, Budget, Memory, costliest, largest_budget, with_budget
from .rules import Basis, Proposal, propose_batch, propose_rank, propose_rate, propose_warmup
from .trial import Trial, items_of, trial_step

_LOG = logging.getLogger(__name__)
WORK_ON_CPU = 2e12  # operations of a trial step there; what a chunk takes grows with its tiles, so that a small one will do
CHECKPOINTING = "model.gradient_checkpointing"


@dataclass(frozen=True)
class Advice:
    """What is proposed, what the recipe has now, and what both rest on; `advised` is the recipe with all proposals."""

    recipe: Recipe
    advised: Recipe
    proposals: tuple[Proposal, ...]
    facts: tuple[tuple[str, str], ...]  # heading and sentence
    budget: Budget
    trial: Trial | None

    def now(self, key: str) -> Any:
        """The recipe's own value of a key."""
        return value_at(to_plain(self.recipe), key)

    @property
    def changes(self) -> tuple[Proposal, ...]:
        """The proposals that differ from the recipe."""
        return tuple(one for one in self.proposals if one.value != self.now(one.key))


def advise(recipe: Recipe, memory: Memory) -> Advice:
    """The advice for a recipe on a device; where the device is here, a trial step is taken on it."""
    if not isinstance(recipe.task, RetrievalTaskSettings):
        raise InputError(f"task.kind: {recipe.task.kind} is a stage of the tiny models' own making; there is advice for retrieval alone")
    if recipe.model.adapter is None:
        raise InputError("model.adapter: it is null, so nothing is trained and there is nothing to advise; leave the key out")
    facts = read_facts(recipe)
    base, _ = Patient(replace(recipe, model=replace(recipe.model, adapter=None))).meta
    parameters = sum(one.numel() for one in base.parameters())
    documents = 1 + recipe.data.hard_negatives
    proposals = [
        propose_batch(facts.counts, recipe.optim.batch, facts.fits(recipe), facts.articles, documents),
        propose_rate(parameters, recipe.optim.rates.llm),
        propose_warmup(recipe.optim.steps),
        *propose_rank(parameters, recipe.model.adapter.rank, recipe.model.adapter.alpha),
    ]
    advised = with_proposals(recipe, proposals)
    model, _ = Patient(advised).meta
    planned = _plan(advised, model, facts, memory, 1.0)
    trial, said = _try(planned[0], model, facts, memory)
    if trial is not None and trial.measured is not None:
        ratio = trial.measured / _estimated(planned[0], model, facts, memory, trial)
        planned = _plan(advised, model, facts, memory, ratio)
        said = _compared(trial, ratio)
    advised, budget, checkpointing = planned
    alone = memory_estimate(advised, model, None, facts.texts, memory.kind)
    proposals += _of_memory(recipe, budget, alone, checkpointing, memory, trial)
    written = (
        ("model", f"{recipe.model.base}: {parameters:,} parameters, {trained_count(model):,} trained at the proposed rank"),
        ("data", facts.said),
        ("device", memory.said),
        ("trial", said),
        ("length", _length(advised, facts)),
    )
    return Advice(recipe, with_proposals(recipe, proposals), tuple(proposals), written, budget, trial)


def with_proposals(recipe: Recipe, proposals: Sequence[Proposal]) -> Recipe:
    """The recipe with some proposals, checked as any other is."""
    above = from_plain(tree_of(proposals), "jobs.advise")
    return build(Recipe, merge(from_plain(to_plain(recipe), "the recipe"), above))


def tree_of(proposals: Sequence[Proposal]) -> dict[str, Any]:
    """Proposals as a recipe's nested mapping."""
    tree: dict[str, Any] = {}
    for one in proposals:
        *parents, last = one.key.split(".")
        place = tree
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = one.value
    return tree


def value_at(plain: Any, key: str) -> Any:
    """A plain recipe's value of a dotted key."""
    for name in key.split("."):
        plain = plain[name]
    return plain


def _plan(recipe: Recipe, model: nn.Module, facts: Facts, memory: Memory, ratio: float) -> tuple[Recipe, Budget, bool]:
    """The recipe with the largest budget that fits; with gradient checkpointing where nothing fits without."""
    for checkpointing in dict.fromkeys((recipe.model.gradient_checkpointing, True)):
        tried = replace(recipe, model=replace(recipe.model, gradient_checkpointing=checkpointing))
        budget = largest_budget(tried, model, facts.tile, facts.texts, memory, ratio)
        if budget is not None:
            return with_budget(tried, budget.tokens), budget, checkpointing
    cost = costliest(tried, facts.tile, facts.texts)
    estimate = memory_estimate(with_budget(tried, cost), model, facts.tile, facts.texts, memory.kind, ratio)
    listed = ", ".join(f"{name} {size(part)}" for name, part in estimate.parts.items())
    raise InputError(
        f"this recipe does not fit into the device ({memory.said}): one document at a time, with gradient checkpointing, it needs about "
        f"{size(estimate.total)} ({listed}; chunk: {estimate.chunk}) and {MARGIN:.0%} of the memory are {size(MARGIN * memory.total)}; "
        "lower tiles.max_visual_tokens or evaluation.batch_tokens, or take a larger device"
    )


def _of_memory(
    recipe: Recipe, budget: Budget, alone: MemoryEstimate, checkpointing: bool, memory: Memory, trial: Trial | None
) -> list[Proposal]:
    """The proposals that memory decides; `alone`: the estimate with tiles as large as the recipe lets one be."""
    basis: Basis
    basis, corrected = ("measured", ", a chunk as large as the trial measured it") if trial and trial.measured else ("estimated", "")
    numbers = {"memory": float(memory.total), "estimate": float(budget.estimate.total), "items": float(budget.items)}
    further = (
        f"one document more needs {size(budget.further.total)}"
        if budget.further is not None
        else "that is the whole batch in one chunk, more would change nothing"
    )
    rule = (
        f"the largest that leaves {1 - MARGIN:.0%} of {size(memory.total)} free{corrected}: {budget.estimate.chunk} at once, about "
        f"{size(budget.estimate.total)} in all; {further}"
    )
    if alone.total > MARGIN * memory.total:
        rule += f". Not so for tiles as large as the recipe lets one be, {alone.chunk}: they would need {size(alone.total)}"
    value, now = budget.tokens, recipe.objective.gradcache
    if budget.further is None and now.chunk_items is None and now.chunk_tokens is not None and now.chunk_tokens > value:
        value, rule = now.chunk_tokens, f"{rule}; the recipe's own holds it as well"
    found = [
        Proposal("objective.gradcache.chunk_tokens", value, basis, rule, numbers),
        Proposal("objective.gradcache.chunk_items", None, "our rule", "the tokens bound a chunk, whatever the sizes of its tiles"),
    ]
    if checkpointing:
        found.append(
            Proposal(CHECKPOINTING, True, basis, "not one document fits without it, or the recipe has it: the same result, slower")
        )
    return found


def _try(recipe: Recipe, model: nn.Module, facts: Facts, memory: Memory) -> tuple[Trial | None, str]:
    """A trial step where the device and the base are here, and what a person should read of it."""
    if memory.device is None:
        return None, "none: the device is not here, the memory is estimated"
    if not recipe.data.train:
        return None, "none: the recipe trains on texts alone, the memory is estimated"
    settings = recipe.model
    if locate_here(settings.base, settings.revision, "model.base") is None and hub_folder(settings.base, settings.revision) is None:
        return None, f"none: {settings.base} is not in the hub's cache (python -m jobs.fetch brings it), the memory is estimated"
    tile = facts.tile or _square(recipe.tiles.max_visual_tokens)
    visual = recipe.tiles.geometry().visual_tokens(*tile)
    work = sum(one.of(visual + TEMPLATE_TOKENS, visual) for one in forward_and_backward(model))
    if memory.kind == "cpu" and work > WORK_ON_CPU:
        return None, "none: a CPU would need minutes for one tile of this model, the memory is estimated"
    _LOG.info("a trial step on %s", memory.said)
    documents = recipe.optim.batch * (1 + recipe.data.hard_negatives)
    try:
        encoder = load_encoder(settings, memory.device, trainable=True, seed=recipe.run.seed)
        items = items_of(recipe, encoder, tile, documents)
        trial = trial_step(recipe, encoder, tile, min(items, int(WORK_ON_CPU // work)) if memory.kind == "cpu" else items)
    except torch.cuda.OutOfMemoryError:
        raise InputError(
            f"the estimate says that this recipe fits into {memory.said}, but the trial step found no room for one tile of {visual} visual "
            "tokens; see what else is on the device, or lower tiles.max_visual_tokens"
        ) from None
    return trial, f"{trial.how}: the memory is estimated (a chunk of {trial.items} tiles took {trial.seconds:.2f} s)"


def _estimated(recipe: Recipe, model: nn.Module, facts: Facts, memory: Memory, trial: Trial) -> float:
    """The estimate of the very chunk that was tried."""
    tile = facts.tile or _square(recipe.tiles.max_visual_tokens)
    alone = replace(recipe, phases=replace(recipe.phases, text_warmup_steps=0, text_mix=0.0, text_curriculum=()))
    cost = costliest(alone, tile, ())
    return chunk_bytes(with_budget(alone, trial.items * cost), model, tile, (), memory.kind)[0]


def _compared(trial: Trial, ratio: float) -> str:
    assert trial.measured is not None
    return (
        f"a chunk of {trial.items} tiles took {size(trial.measured)} ({trial.how}) and {trial.seconds:.2f} s; estimated were "
        f"{size(trial.measured / ratio)}, so that a chunk counts {ratio:.2f} times its estimate"
    )


def _square(tokens: int) -> tuple[int, int]:
    """A tile of about so many visual tokens, no more."""
    rows = int(tokens**0.5)
    return rows * FACTOR, tokens // rows * FACTOR


def _length(recipe: Recipe, facts: Facts) -> str:
    """How long the run is, which is not proposed: the seeds are too far apart."""
    if not facts.sizes or not sum(facts.sizes):
        return f"{recipe.optim.steps} steps"
    epochs = recipe.optim.steps * recipe.optim.batch / sum(facts.sizes)
    return (
        f"{recipe.optim.steps} steps of {recipe.optim.batch} rows are {epochs:.2g} epochs, and that is left as it is: "
        "seed 001 asks for 5 epochs, seed 000 trained 0.2 of one"
    )

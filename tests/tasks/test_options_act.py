"""No option is announced and then ignored: changing it changes the training, on text steps and on tile steps, wherever it can act on both.

`OPTIONS` holds every leaf key of the settings that shape a training; a new key without an entry fails the test. Each entry is tried by
training a micro encoder for a few steps with and without it and comparing losses and weights. Options that save memory or time alone are
held to change nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from stairstep.models.encoder import Encoder
from stairstep.models.load import load_encoder
from stairstep.models.settings import AdapterSettings, ModelSettings
from stairstep.objectives import Alone, ObjectiveSettings
from stairstep.tasks.loading import load_rows, tile_reader
from stairstep.tasks.recipe import Recipe, RetrievalTaskSettings
from stairstep.tasks.retrieval import RetrievalTask
from stairstep.training import Cadence, EvaluationReport, OptimSettings, PhaseSettings, Trainer

LEAST = 1e-6  # a difference below this would be rounding
Phase = Literal["text", "tile", "run"]

# Dropout would make every change of the model one of the random numbers too, and with it every test pass; it has its own entry.
BASELINE = (
    "optim.batch=4",
    "tiles.max_visual_tokens=4",
    "model.query_instruction=q",
    "model.document_instruction=d",
    "model.adapter.dropout=0",
    "optim.clip_norm=null",
    "optim.schedule={shape: constant, warmup_steps: 0}",
)
PHASES: Mapping[Phase, tuple[str, ...]] = {
    "text": ("optim.steps=2", "phases.text_warmup_steps=2"),
    "tile": ("optim.steps=2", "phases.text_warmup_steps=0"),
    "run": ("optim.steps=4", "phases.text_warmup_steps=2"),
}


@dataclass(frozen=True)
class Option:
    """How an option is tried: the `change`, what must be set `on` both sides for it to mean anything, and where it can act."""

    change: str
    on: tuple[str, ...] = ()
    phases: tuple[Phase, ...] = ("text", "tile")
    effect: Literal["acts", "same bits", "same loss"] = "acts"


def one(key: str, value: str, *on: str, phases: tuple[Phase, ...] = ("text", "tile"), effect: Any = "acts") -> tuple[str, Option]:
    return key, Option(f"{key.replace('{infonce}', '').replace('{siglip}', '')}={value}", on, phases, effect)


COSINE = "optim.schedule={shape: cosine, warmup_steps: 0, cycles: 1}"
RESTARTS = "optim.schedule={shape: cosine_restarts, warmup_steps: 0, cycles: 1}"
SIGLIP = "objective.loss={kind: siglip}"
DROPOUT = "model.adapter.dropout=0.2"
TILE: tuple[Phase, ...] = ("tile",)
RUN: tuple[Phase, ...] = ("run",)

OPTIONS: dict[str, Option] = dict(
    [
        one("objective.loss.kind", "siglip"),
        one("objective.loss{infonce}.label_smoothing", "0.2"),
        one("objective.loss{infonce}.hardness", "2.0"),
        one("objective.loss{siglip}.initial_bias", "-3.0", SIGLIP),
        one("objective.temperature.initial", "0.2"),
        one("objective.temperature.learnable", "false", "optim.rates.objective=0.1"),
        one("objective.temperature.min_scale", "49.99", "objective.temperature.initial=0.02", "optim.rates.objective=0.1"),
        one("objective.temperature.max_scale", "2.01", SIGLIP, "objective.temperature.initial=0.5", "optim.rates.objective=0.1"),
        # a text has no article, so this one acts on tiles alone
        one("objective.masks.same_article", "false", phases=TILE),
        one("objective.gradcache.chunk_tokens", "64", effect="same loss"),
        one("objective.gradcache.chunk_items", "2", effect="same loss"),
        one("objective.gradcache.keep_graphs_mb", "1000", DROPOUT, "objective.gradcache.chunk_items=2", effect="same bits"),
        one("optim.batch", "3"),
        one("optim.steps", "3", phases=RUN),
        one("optim.rates.llm", "0.02"),
        one("optim.rates.vit", "0.002", phases=TILE),
        one("optim.rates.merger", "0.002", "model.adapter.targets.merger=true", phases=TILE),
        one("optim.rates.objective", "0.1"),
        one("optim.schedule.shape", "cosine"),
        one("optim.schedule.warmup_steps", "2"),
        one("optim.schedule.minimum", "0.5", COSINE),
        one("optim.schedule.cycles", "2", RESTARTS),
        one("optim.schedule.fresh_after_text_warmup", "true", COSINE, phases=RUN),
        one("optim.weight_decay", "0.5"),
        one("optim.beta1", "0.5"),
        one("optim.beta2", "0.5"),
        one("optim.epsilon", "0.01"),
        one("optim.clip_norm", "0.01", "optim.epsilon=0.01"),
        one("optim.ema_decay", "0.5"),
        one("optim.stop_after", "1", phases=RUN),
        one("phases.text_warmup_steps", "1", phases=RUN),
        one("phases.text_mix", "0.5", phases=("tile", "run")),
        one("phases.text_curriculum", "[1.0, 0]", phases=("tile", "run")),
        one("model.adapter.rank", "3"),
        one("model.adapter.alpha", "8"),
        one("model.adapter.dropout", "0.2"),
        one("model.adapter.vit_rank", "3", "model.adapter.vit_alpha=4", phases=TILE),
        one("model.adapter.vit_alpha", "12", phases=TILE),
        one("model.adapter.dora", "true"),
        one("model.adapter.rslora", "true"),
        one("model.adapter.targets.llm_attention", "[q_proj]"),
        one("model.adapter.targets.llm_mlp", "true"),
        one("model.adapter.targets.vit_attention", "false", phases=TILE),
        one("model.adapter.targets.vit_mlp", "true", phases=TILE),
        one("model.adapter.targets.merger", "true", phases=TILE),
        one("model.adapter.target_regex", r'"language_model\\.layers\\.0\\.mlp\\..*_proj"'),
        one("model.adapter.modules_to_save", "[language_model.norm]"),
        one("model.adapter.vit_unfrozen", "true", "model.adapter.targets.vit_attention=false", phases=TILE),
        # neighbours of these settings that the same fault has hit before
        one("model.bidirectional", "true"),
        one("model.query_instruction", "find it"),
        one("model.document_instruction", "read it"),
        one("model.max_text_tokens", "64"),
        one("model.gradient_checkpointing", "true", DROPOUT, effect="same bits"),
        one("data.order", "reversed"),
        one("data.hard_negatives", "0"),
        one("task.query_side", "true"),
    ]
)


@dataclass
class Trained:
    """One short training: its events, and the weights that it would save."""

    events: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def losses(self) -> list[float]:
        return [values["train/loss"] for _, values in self.events if "train/loss" in values]


class Notes:
    """A journal in memory."""

    def __init__(self, trained: Trained) -> None:
        self.trained = trained

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.trained.events.append((step, {name: value for name, value in values.items() if not name.startswith("time/")}))

    def checkpoint(self, step: int) -> None: ...
    def evaluating(self, step: int) -> None: ...
    def evaluated(self, step: int, best_step: int | None) -> None: ...
    def stop_requested(self) -> bool:
        return False


class FallingTask(RetrievalTask):
    """Its selection score falls, so that early stopping has something to stop at."""

    def evaluate(self, step: int) -> EvaluationReport:
        return EvaluationReport({}, -float(step))


@functools.lru_cache(maxsize=4)
def loaded(model: ModelSettings) -> tuple[Encoder, dict[str, Tensor]]:
    """An encoder, and what is trained in it as it was at first."""
    encoder = load_encoder(model, trainable=True, seed=0)
    return encoder, {name: one.detach().clone() for members in encoder.groups().values() for name, one in members}


def fresh(model: ModelSettings) -> Encoder:
    """The encoder as it is when it is loaded; loading it each time would take longer than training it."""
    encoder, first = loaded(model)
    with torch.no_grad():
        for name, one in (one for members in encoder.groups().values() for one in members):
            one.copy_(first[name])
            one.grad = None
    return encoder


def train(recipe: Recipe) -> Trained:
    encoder = fresh(recipe.model)
    task = FallingTask(recipe, encoder, load_rows(recipe), tile_reader(recipe))
    trained = Trained()
    trainer = Trainer(task, recipe.optim, recipe.phases, Cadence(evaluation=1), Notes(trained), Alone())
    try:
        trainer.run()
    finally:
        task.close()
    with trainer.averaged.in_place():
        trained.weights = {name: value.detach().clone() for members in task.groups().values() for name, value in members}
    return trained


@pytest.fixture(scope="module")
def trainings(micro: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, ...]], Trained]:
    """Trains by overrides, each set of them once."""
    from tasks_world import make_recipe, recipe_tree

    tree = recipe_tree(tmp_path_factory.mktemp("options"), micro.world, micro.base)
    tree["evaluation"] |= {"sets": []}
    return functools.cache(lambda overrides: train(make_recipe(tree, *overrides)))


def difference(one: Trained, other: Trained) -> float:
    """The greatest difference in a loss or in a weight that both have; infinite where one took more steps."""
    if len(one.losses) != len(other.losses):
        return float("inf")
    found = [abs(mine - theirs) for mine, theirs in zip(one.losses, other.losses, strict=True)]
    shared = [name for name in one.weights.keys() & other.weights.keys() if one.weights[name].shape == other.weights[name].shape]
    return max(found + [float((one.weights[name] - other.weights[name]).abs().max()) for name in shared])


CASES = [(key, phase) for key, option in OPTIONS.items() for phase in option.phases]


@pytest.mark.parametrize(("key", "phase"), CASES, ids=[f"{key}-{phase}" for key, phase in CASES])
def test_an_option_acts(key: str, phase: Phase, trainings: Callable[[tuple[str, ...]], Trained]) -> None:
    option = OPTIONS[key]
    common = (*BASELINE, *PHASES[phase], *option.on)
    base, changed = trainings(common), trainings((*common, option.change))
    assert base.losses and all(torch.isfinite(value).all() for value in changed.weights.values())
    if option.effect == "acts":
        assert difference(base, changed) > LEAST, f"{option.change} changed nothing in a {phase} phase"
    elif option.effect == "same loss":
        assert changed.losses == pytest.approx(base.losses, rel=1e-4)
        assert difference(base, changed) > 0, "other chunks add up in another order; these were the same chunks"
    else:
        assert difference(base, changed) == 0
        assert changed.weights.keys() == base.weights.keys()
        assert changed.events == base.events


def test_a_step_moves_what_is_trained(trainings: Callable[[tuple[str, ...]], Trained]) -> None:
    """Guards the comparisons above: the baseline learns in every phase, and two trainings of one recipe are the same in every bit."""
    for phase, overrides in PHASES.items():
        trained, again = trainings((*BASELINE, *overrides)), trainings((*overrides, *BASELINE))
        assert trained is not again
        assert difference(trained, again) == 0
        kinds = [values["train/text"] for _, values in trained.events if "train/text" in values]
        assert kinds == {"text": [1.0] * 2, "tile": [0.0] * 2, "run": [1.0, 1.0, 0.0, 0.0]}[phase]
        moved = {name for name, value in trained.weights.items() if name.endswith("lora_B.weight") and value.abs().max() > 0}
        assert any(name.startswith("language_model.") for name in moved)
        assert any(name.startswith("visual.") for name in moved) == (phase != "text")


def test_every_option_is_tried() -> None:
    rooms = {"objective": ObjectiveSettings, "optim": OptimSettings, "phases": PhaseSettings, "model.adapter": AdapterSettings}
    keys = {f"{prefix}.{leaf}" for prefix, cls in rooms.items() for leaf in leaves(cls)}
    keys |= {f"task.{leaf}" for leaf in leaves(RetrievalTaskSettings) if leaf != "kind"}
    # the kind of loss is one key, however many kinds there are
    keys = {"objective.loss.kind" if key.startswith("objective.loss{") and key.endswith(".kind") else key for key in keys}
    assert len(keys) > 40, "the walk over the settings finds too little"
    assert keys - OPTIONS.keys() == set(), "options without a test that they act"
    others = {"data.order", "data.hard_negatives"}
    assert {key for key in OPTIONS if key not in keys | others and not key.startswith("model.")} == set(), "options that are gone"


def leaves(cls: type) -> Iterator[str]:
    """Dotted names of all fields of a settings class, down to those that are no settings themselves; `name{kind}` in a union of them."""
    hints = typing.get_type_hints(cls)
    for one in dataclasses.fields(cls):
        inner = [part for part in _parts(hints[one.name]) if dataclasses.is_dataclass(part)]
        if not inner:
            yield one.name
        for part in inner:
            kind = f"{{{_kind(part)}}}" if len(inner) > 1 else ""
            yield from (f"{one.name}{kind}.{leaf}" for leaf in leaves(part))


def _parts(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _kind(cls: Any) -> str:
    return typing.get_args(typing.get_type_hints(cls)["kind"])[0]

"""From a recipe and a space to the trials of a sweep, all of them checked before one of them starts.

A trial is a recipe: the recipe's file with the sweep's overrides and the trial's own laid over it, loaded by the same `load_recipe` as the
recipe alone, resolved, and kept as a file in the sweep's folder. So a trial and that file run alone are one and the same.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from stairstep.records import write_atomically
from stairstep.records.places import below, is_url
from stairstep.records.resume import ABSENT
from stairstep.settings import InputError, RecipeError, to_plain, to_yaml
from stairstep.tasks import Recipe, load_recipe
from stairstep.tasks.resolve import resolve

from .folder import SweepFolder, TrialRecord, Value
from .scores import LOSS
from .space import (
    TAKEN,
    GridSettings,
    LogUniformSettings,
    Metric,
    OptionsSettings,
    OptunaSearchSettings,
    Parameter,
    RandintSettings,
    RandomSearchSettings,
    Space,
    UniformSettings,
    keys_of,
    listed_values,
)

Point = dict[str, Value]
_DIGITS = 6  # of a number drawn from a range: as a person would write it, and the same again when it is read back


@dataclass(frozen=True)
class Planned:
    """A trial and the recipe that it trains; its record names the recipe's file by the trial's name."""

    record: TrialRecord
    recipe: Recipe


@dataclass(frozen=True)
class Sketch:
    """What a sweep is about to do: its trials (none yet where Optuna suggests them), and what a condition took out."""

    base: Recipe
    trials: tuple[Planned, ...]
    skipped: tuple[Mapping[str, Any], ...]
    total: int  # trials in all, suggested ones included


def sketch(recipe_file: Path, overrides: Sequence[str], space: Space, space_file: Path) -> Sketch:
    """Every trial of a space over a recipe, each loaded and checked; RecipeError where one of them could not run."""
    base = load_recipe(recipe_file, overrides)
    _check_keys(overrides, space, space_file)
    maker = TrialMaker(recipe_file, overrides, space)
    if isinstance(space.search, OptunaSearchSettings):
        for edge in _edges(space):
            check_metric(maker.recipe(edge, 0), space, space_file)
        return Sketch(resolve(base), (), (), space.search.samples)
    points, skipped = _points(base, space, space_file)
    if not points:
        raise RecipeError(f"{space_file}: skip: every combination is left out; nothing would be trained")
    made = [maker.planned(number, point, seed) for number, (point, seed) in enumerate(itertools.product(points, space.seeds), start=1)]
    for one in made:
        check_metric(one.recipe, space, space_file)
    return Sketch(resolve(base), tuple(made), tuple(skipped), len(made))


class TrialMaker:
    """Makes trials of points: of all of them before the start, or of one after the other as they are suggested."""

    def __init__(self, recipe_file: Path, overrides: Sequence[str], space: Space) -> None:
        self.recipe_file, self.overrides, self.space = recipe_file, tuple(overrides), space

    def planned(self, number: int, point: Point, seed: int) -> Planned:
        """The trial of a point with a seed."""
        recipe = self.recipe(point, seed)
        name = self._name(number, point, seed)
        record = TrialRecord(number, name, point, self.own(point, seed), seed, workers=max(1, recipe.cluster.workers))
        return Planned(record, resolve(recipe))

    def refused(self, number: int, point: Point, seed: int) -> TrialRecord:
        """The record of a point whose recipe is refused."""
        return TrialRecord(number, self._name(number, point, seed), point, self.own(point, seed), seed)

    def recipe(self, point: Point, seed: int) -> Recipe:
        """The recipe of a point as loaded: everything that its settings refuse is refused here."""
        try:
            return load_recipe(self.recipe_file, [*self.overrides, *self.own(point, seed)])
        except RecipeError as error:
            raise RecipeError(f"{_shown(point)}: {error}") from None

    def own(self, point: Point, seed: int) -> tuple[str, ...]:
        """The overrides that make the recipe this point's."""
        keys: dict[str, Value] = dict(self.space.set)
        if self.space.steps:
            keys |= _keys_of_step(self.space, str(point["step"]))
        for name, value in point.items():
            one = self.space.parameters.get(name)
            keys |= one.options[str(value)] if isinstance(one, OptionsSettings) else {name: value} if one is not None else {}
        return (*(f"{key}={as_override(value)}" for key, value in keys.items()), f"run.seed={seed}")

    def _name(self, number: int, point: Point, seed: int) -> str:
        if self.space.steps:
            return f"{point['step']}-seed{seed}"
        told = "-".join(f"{key.rpartition('.')[2]}_{_plain_value(value)}" for key, value in point.items())
        return f"{number:03d}-{re.sub(r'[^A-Za-z0-9_.+-]', '-', told)[:70]}-seed{seed}"


def as_override(value: Value) -> str:
    """A value as it stands in `key=value`, where YAML reads it back as the same value."""
    return json.dumps(value, ensure_ascii=False)


def in_sweep(recipe: Recipe, runs: str, trial: str) -> Recipe:
    """A trial's recipe at its place below the sweep's `runs`; answers, embeddings and tiles are shared with all runs of the recipe's own
    root.

    Its paths are those that `write_trial` wrote: a trial's process may stand in any folder."""
    root = recipe.run.root
    evaluation = replace(
        recipe.evaluation,
        ledger_folder=str(below(root, recipe.evaluation.ledger_folder or "ledger")),
        cache_folder=str(below(root, recipe.evaluation.cache_folder or "embeddings")),
    )
    return replace(
        recipe,
        run=replace(recipe.run, root=runs, name=trial, resume="auto"),
        evaluation=evaluation,
        tiles=replace(recipe.tiles, store=recipe.tiles.store or str(below(root, "tiles"))),
        cluster=replace(recipe.cluster, workers=max(1, recipe.cluster.workers)),
    )


def write_trial(sweep: SweepFolder, planned: Planned) -> None:
    """Keep a trial: its recipe as a file that runs alone too, under a name of its own, and then its record."""
    path = sweep.recipe_path(planned.record.name)
    recipe, stored = planned.recipe, planned.recipe.tiles.store
    run = replace(recipe.run, name=f"{sweep.path.name}-{planned.record.name}"[:100], root=_absolute(recipe.run.root))
    tiles = recipe.tiles if stored is None else replace(recipe.tiles, store=_absolute(stored))
    alone = replace(recipe, run=run, tiles=tiles)
    write_atomically(path, f"# Trial {planned.record.name}, written by stairstep.\n{to_yaml(alone)}")
    sweep.write_trial(planned.record)


def _absolute(text: str) -> str:
    return text if is_url(text) else os.path.abspath(text)


# --- points


def _points(base: Recipe, space: Space, file: Path) -> tuple[list[Point], list[dict[str, Any]]]:
    if space.steps:
        _check_stairs(base, space, file)
        return [{"step": one.name} for one in space.steps], []
    kept: list[Point] = []
    skipped: list[dict[str, Any]] = []
    for point in _combinations(space):
        reason = skip_reason(space, point)
        if reason is None:
            kept.append(point)
        else:
            skipped.append({"point": point, "reason": reason})
    return kept, skipped


def _combinations(space: Space) -> Iterator[Point]:
    if isinstance(space.search, RandomSearchSettings):
        for index in range(space.search.samples):
            stream = np.random.default_rng([space.search.seed, index])
            yield {key: _drawn(one, stream) for key, one in space.parameters.items()}
        return
    for values in itertools.product(*(listed_values(one) for one in space.parameters.values())):
        yield dict(zip(space.parameters, values, strict=True))


def skip_reason(space: Space, point: Mapping[str, Value]) -> str | None:
    """Why a combination is left out; None where it is not."""
    for one in space.skip:
        if all(point[key] == value for key, value in one.when.items()):
            return one.reason
    return None


def as_written(value: float) -> float:
    """A drawn number with the digits that a person would write."""
    return float(f"{value:.{_DIGITS}g}")


def _drawn(parameter: Parameter, stream: np.random.Generator) -> Value:
    if isinstance(parameter, UniformSettings):
        return as_written(stream.uniform(parameter.low, parameter.high))
    if isinstance(parameter, LogUniformSettings):
        return as_written(math.exp(stream.uniform(math.log(parameter.low), math.log(parameter.high))))
    if isinstance(parameter, RandintSettings):
        return int(stream.integers(parameter.low, parameter.high, endpoint=True))
    values = listed_values(parameter)
    return values[int(stream.integers(len(values)))]


def _edges(space: Space) -> Iterator[Point]:
    """Points that together have every listed value and both ends of every range: what a suggestion may hold, its recipe must take."""
    ends = {
        key: (one.low, one.high) if isinstance(one, UniformSettings | LogUniformSettings | RandintSettings) else listed_values(one)
        for key, one in space.parameters.items()
    }
    for place in range(max(map(len, ends.values()))):
        yield {key: values[min(place, len(values) - 1)] for key, values in ends.items()}


def in_numbers(space: Space, recipe_file: Path, overrides: Sequence[str], file: Path) -> Space:
    """The space with every multiple of a recipe's number worked out."""
    plain = to_plain(load_recipe(recipe_file, overrides))
    found: dict[str, Parameter] = {}
    for key, one in space.parameters.items():
        found[key] = one
        if isinstance(one, GridSettings) and one.times:
            own = _at(plain, key)
            if isinstance(own, bool) or not isinstance(own, int | float) or not own:
                raise RecipeError(
                    f"{file}: parameters.{key}.times: the recipe's own value has to be a number other than 0; say `values` instead"
                )
            products = [as_written(own * factor) for factor in one.times]
            found[key] = replace(one, values=tuple(round(value) if isinstance(own, int) else value for value in products), times=())
    return replace(space, parameters=found)


# --- stairs


def _keys_of_step(space: Space, name: str) -> dict[str, Value]:
    """What a step has instead of the recipe's values, with all that the steps below it leave standing."""
    keys: dict[str, Value] = {}
    for step in space.steps:
        keys |= step.set
        for key in step.restore:
            keys.pop(key, None)
        if step.name == name:
            return keys
    raise KeyError(name)


def _check_stairs(base: Recipe, space: Space, file: Path) -> None:
    """Each step must change something, and give back only what was taken."""
    plain, taken, below = to_plain(base), dict[str, Value](), None
    for place, step in enumerate(space.steps):
        where = f"{file}: steps[{place}]"
        for key in step.restore:
            if key not in taken:
                raise RecipeError(f"{where}.restore: no step below '{step.name}' has set {key}; there is nothing to give back")
            if _at(plain, key) == taken[key]:
                raise RecipeError(
                    f"{where}.restore: the recipe itself has {key}: {json.dumps(taken[key])}, so step '{step.name}' would add nothing; "
                    f"give the recipe the value that the step is about, for example {key}=..."
                )
        taken = _keys_of_step(space, step.name)
        now = {**{key: _at(plain, key) for key in keys_of(space)}, **space.set, **taken}
        if below is not None and now == below:
            raise RecipeError(f"{where}: step '{step.name}' changes nothing over the step below it")
        below = now


def _at(plain: Any, key: str) -> Any:
    for part in key.split("."):
        plain = plain.get(part, ABSENT) if isinstance(plain, Mapping) else ABSENT
    return plain


# --- what a space and a recipe must agree on


def _check_keys(overrides: Sequence[str], space: Space, file: Path) -> None:
    """Keys exist, are not the sweep's own, and are said once."""
    given = {one.partition("=")[0].strip() for one in overrides}
    restored = {key for step in space.steps for key in step.restore}  # the recipe's own value counts again, whoever gave it
    for key, place in keys_of(space).items():
        if key in TAKEN:
            instead = "give them as `seeds`" if key == "run.seed" else "a sweep names its runs itself"
            raise RecipeError(f"{file}: {place}: a space cannot set {key}; {instead}")
        if key in given - restored:
            raise InputError(f"{key} is set by the space ({file}: {place}) and on the command line; leave one of them out")
    if "run.seed" in given or "run.name" in given:
        raise InputError("run.seed and run.name of a sweep's trials are its own: give seeds in the space or by --seeds, a name by --name")


def check_metric(recipe: Recipe, space: Space, file: Path) -> None:
    """Every metric that the space looks at comes, and comes while the scheduler can still act on it."""
    evaluation, optim = recipe.evaluation, recipe.optim
    asked = {space.metric: "metric", **{one.metric: "also" for one in space.also}, **{one.metric: "stop" for one in space.stop}}
    for metric, place in asked.items():
        reason = _never_comes(recipe, metric)
        if reason:
            raise RecipeError(f"{file}: {place}: {metric} never comes: {reason}")
    looks: list[tuple[str, Metric, int]] = []
    if space.scheduler is not None:
        looks.append((space.scheduler.kind, space.metric, space.scheduler.grace_steps))
    looks += [(f"stop[{place}]", one.metric, one.from_step) for place, one in enumerate(space.stop)]
    for who, metric, first in looks:
        if metric != LOSS and evaluation.mode == "after":
            raise RecipeError(
                f"{file}: {who}: with evaluation.mode=after scores come when training has ended; there is nothing left to stop"
            )
        every, key = (evaluation.loss_every, "loss_every") if metric == LOSS else (evaluation.every, "every")
        earliest = -(-first // every) * every
        if earliest >= optim.steps:
            raise RecipeError(
                f"{file}: {who}: {metric} comes every {every} steps, so from step {first} on it comes before the last step ({optim.steps}) "
                f"not even once; nothing could be stopped. Lower evaluation.{key}, or look from an earlier step on"
            )


def _never_comes(recipe: Recipe, metric: str) -> str | None:
    evaluation = recipe.evaluation
    if metric == LOSS:
        missing = not evaluation.loss_every or not evaluation.loss_batches or not recipe.data.validation
        return "the recipe has no validation loss (evaluation.loss_every, evaluation.loss_batches, data.validation)" if missing else None
    if not evaluation.sets:
        return "the recipe names no question set (evaluation.sets)"
    if evaluation.selection_fraction == 0:
        return "the selection split is empty (evaluation.selection_fraction is 0)"
    if metric == "qa" and evaluation.reader is None:
        return "nobody answers (evaluation.reader is null)"
    return None


def _shown(point: Mapping[str, Value]) -> str:
    return "trial " + ", ".join(f"{key}={_plain_value(value)}" for key, value in point.items())


def _plain_value(value: Value) -> str:
    return value if isinstance(value, str) else json.dumps(value)

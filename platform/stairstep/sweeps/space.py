"""A space: which recipes an ablation compares, as a small typed file of its own.

Either a staircase (`steps`, each of which changes the recipe of the one below) or `parameters`, searched by grid, at random or by Optuna.
A space names recipe keys and knows nothing of what they mean: whether they exist and may have these values is asked of the recipe itself,
trial by trial, before anything starts (plan.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stairstep.settings import SettingError, build, from_plain, load_tree, setting

Value = str | int | float | bool | None
Mode = Literal["max", "min"]
Metric = Literal["hit@1", "hit@3", "hit@5", "hit@10", "mrr", "ndcg@5", "ndcg@10", "qa", "validation/loss"]
TAKEN = ("run.name", "run.root", "run.seed", "run.resume", "extends")
"""Keys that a sweep sets itself."""


@dataclass(frozen=True, kw_only=True)
class GridSettings:
    """Every one of these values, or of these multiples of the recipe's own value."""

    kind: Literal["grid"] = setting("grid", doc="The kind of parameter.")
    values: tuple[Value, ...] = setting((), doc="The values, tried in this order.")
    times: tuple[float, ...] = setting((), doc="Instead of values: factors by which the recipe's own number is multiplied.", above=0)

    def check(self) -> None:
        """Values or factors."""
        if self.values and self.times:
            raise SettingError("times", "give either values or times, not both")
        _check_list("times" if self.times else "values", self.times or self.values)


@dataclass(frozen=True, kw_only=True)
class OptionsSettings:
    """Named options that set several keys together; a grid tries all, a search picks."""

    kind: Literal["options"] = setting("options", doc="The kind of parameter.")
    options: dict[str, dict[str, Value]] = setting(doc="Name of each option: the recipe keys that it sets, with their values.")

    def check(self) -> None:
        """An option sets something."""
        if not self.options or not all(self.options.values()):
            raise SettingError("options", "expected at least one option, each with at least one recipe key")


@dataclass(frozen=True, kw_only=True)
class ChoiceSettings:
    """One of these values, picked by the search."""

    kind: Literal["choice"] = setting("choice", doc="The kind of parameter.")
    values: tuple[Value, ...] = setting(doc="The values to pick from.")

    def check(self) -> None:
        """There is something to pick."""
        _check_list("values", self.values)


@dataclass(frozen=True, kw_only=True)
class UniformSettings:
    """A number between two others."""

    kind: Literal["uniform"] = setting("uniform", doc="The kind of parameter.")
    low: float = setting(doc="Smallest value.")
    high: float = setting(doc="Largest value.")

    def check(self) -> None:
        """A range has room."""
        _check_range(self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class LogUniformSettings:
    """A positive number between two others, any factor as likely as another."""

    kind: Literal["loguniform"] = setting("loguniform", doc="The kind of parameter.")
    low: float = setting(doc="Smallest value.", above=0)
    high: float = setting(doc="Largest value.", above=0)

    def check(self) -> None:
        """A range has room."""
        _check_range(self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class RandintSettings:
    """A whole number between two others, both included."""

    kind: Literal["randint"] = setting("randint", doc="The kind of parameter.")
    low: int = setting(doc="Smallest value.")
    high: int = setting(doc="Largest value.")

    def check(self) -> None:
        """A range has room."""
        _check_range(self.low, self.high)


def _check_list(key: str, values: tuple[Value, ...]) -> None:
    if not values:
        raise SettingError(key, "the list is empty; give at least one value")
    if len({(type(value), value) for value in values}) < len(values):
        raise SettingError(key, "a value stands there twice")


def _check_range(low: float, high: float) -> None:
    if low >= high:
        raise SettingError("", f"low ({low:g}) is not below high ({high:g})")


Parameter = GridSettings | OptionsSettings | ChoiceSettings | UniformSettings | LogUniformSettings | RandintSettings


def listed_values(parameter: Parameter) -> tuple[Value, ...]:
    """The values that a parameter lists; none for a range, or where they are multiples of the recipe's own."""
    if isinstance(parameter, OptionsSettings):
        return tuple(parameter.options)
    return parameter.values if isinstance(parameter, GridSettings | ChoiceSettings) else ()


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """One step of a staircase, over the one below it."""

    name: str = setting(doc="Name of the step; its trials are called after it.")
    adds: str = setting(doc="What it adds to the step below, for the board.")
    set: dict[str, Value] = setting(doc="Recipe keys that this step and those above it have instead of the recipe's.", factory=dict)
    restore: tuple[str, ...] = setting((), doc="Keys that a step below has set and that from here on have the recipe's own value again.")


@dataclass(frozen=True, kw_only=True)
class SkipSettings:
    """Combinations that are no use."""

    when: dict[str, Value] = setting(doc="Parameters and the values that they have together in such a combination.")
    reason: str = setting(doc="Why it is left out, for the board.")


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """A further metric that Optuna optimises beside the first."""

    metric: Metric = setting(doc="A metric of the selection split of the primary question set, or validation/loss.")
    mode: Mode = setting("max", doc="Whether more or less of it is better.")


@dataclass(frozen=True, kw_only=True)
class GridSearchSettings:
    """All combinations."""

    kind: Literal["grid"] = setting("grid", doc="The kind of search.")


@dataclass(frozen=True, kw_only=True)
class RandomSearchSettings:
    """Combinations drawn before the start, the same ones whenever the seed is the same."""

    kind: Literal["random"] = setting("random", doc="The kind of search.")
    samples: int = setting(doc="Combinations drawn.", minimum=1)
    seed: int = setting(0, doc="Seed of the drawing.", minimum=0)


@dataclass(frozen=True, kw_only=True)
class OptunaSearchSettings:
    """Combinations suggested one after the other by Optuna's TPE, from what the earlier ones scored."""

    kind: Literal["optuna"] = setting("optuna", doc="The kind of search.")
    samples: int = setting(doc="Combinations suggested in all.", minimum=1)
    startup: int = setting(8, doc="First combinations, drawn at random.", minimum=1)
    seed: int = setting(0, doc="Seed of the sampler.", minimum=0)


@dataclass(frozen=True, kw_only=True)
class AshaSettings:
    """Asynchronous successive halving: at grace_steps, and every `reduction` times as far, only the best 1/reduction go on."""

    kind: Literal["asha"] = setting("asha", doc="The kind of scheduler.")
    grace_steps: int = setting(doc="Steps before which nothing is stopped.", minimum=1)
    reduction: int = setting(2, doc="One in so many trials goes on at each rung.", minimum=2)


@dataclass(frozen=True, kw_only=True)
class MedianSettings:
    """A trial stops whose best score so far is worse than the median of the others' running means."""

    kind: Literal["median"] = setting("median", doc="The kind of scheduler.")
    grace_steps: int = setting(doc="Steps before which nothing is stopped.", minimum=1)
    min_trials: int = setting(3, doc="Trials that must have a score before any is stopped.", minimum=2)


@dataclass(frozen=True, kw_only=True)
class StopSettings:
    """A trial stops for good once a metric is beyond a bound."""

    metric: Metric = setting(doc="A metric of the selection split, or validation/loss.")
    from_step: int = setting(1, doc="First step at which it is looked at.", minimum=1)
    below: float | None = setting(None, doc="Stop where the metric is below this.")
    above: float | None = setting(None, doc="Stop where the metric is above this.")

    def check(self) -> None:
        """A rule has a bound."""
        if self.below is None and self.above is None:
            raise SettingError("", "a stop rule needs `below` or `above`")


@dataclass(frozen=True, kw_only=True)
class Space:
    """One ablation, as a file in tune_spaces/ holds it."""

    about: str = setting("", doc="What the ablation asks, in a sentence; the board shows it.")
    set: dict[str, Value] = setting(doc="Recipe keys that every trial has instead of the recipe's.", factory=dict)
    steps: tuple[StepSettings, ...] = setting((), doc="A staircase, lowest step first; a space has either steps or parameters.")
    parameters: dict[str, Parameter] = setting(
        doc="What is tried: dotted recipe keys (for kind options any name), each with its values or range.", factory=dict
    )
    skip: tuple[SkipSettings, ...] = setting((), doc="Combinations of parameters that are left out.")
    seeds: tuple[int, ...] = setting((0,), doc="Seeds (run.seed) that every point is trained with.", minimum=0)
    search: GridSearchSettings | RandomSearchSettings | OptunaSearchSettings = setting(
        GridSearchSettings(), doc="How combinations are found."
    )
    metric: Metric = setting("hit@1", doc="What is optimised: a metric of the primary question set's selection split, or validation/loss.")
    mode: Mode = setting("max", doc="Whether more or less of it is better.")
    also: tuple[ObjectiveSettings, ...] = setting((), doc="Further objectives; for Optuna without a scheduler.")
    scheduler: AshaSettings | MedianSettings | None = setting(None, doc="Who stops bad trials early; null: nobody.")
    stop: tuple[StopSettings, ...] = setting((), doc="Bounds beyond which a trial stops.")

    def check(self) -> None:
        """What can be wrong with a space whatever the recipe is."""
        if bool(self.steps) == bool(self.parameters):
            both = "both steps and parameters" if self.steps else "neither steps nor parameters"
            raise SettingError("", f"{both}; a space is either a staircase (steps) or has parameters")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise SettingError("seeds", "expected one or more seeds, each once; the same run twice is no second seed")
        if self.steps:
            self._check_steps()
        for key, one in self.parameters.items():
            self._check_parameter(key, one)
        self._check_search()
        self._check_once()
        for place, skip in enumerate(self.skip):
            unknown = [key for key in skip.when if key not in self.parameters]
            if unknown or not skip.when:
                known = ", ".join(self.parameters) or "none"
                found = ", ".join(unknown) or "none"
                raise SettingError(f"skip[{place}].when", f"expected parameters of this space ({known}), found {found}")
            for key, value in skip.when.items():
                listed = listed_values(self.parameters[key])
                if listed and not any(value == one and type(value) is type(one) for one in listed):
                    raise SettingError(f"skip[{place}].when", f"{key} never has the value {value!r}; it has {', '.join(map(repr, listed))}")

    def _check_steps(self) -> None:
        names = [one.name for one in self.steps]
        for place, name in enumerate(names):
            if not re.fullmatch(r"[A-Za-z0-9][\w.+-]{0,59}", name, flags=re.ASCII):
                raise SettingError(f"steps[{place}].name", "expected at most 60 letters, digits, '.', '_', '+', '-'; runs are named by it")
            if name in names[:place]:
                raise SettingError(f"steps[{place}].name", f"'{name}' stands there twice")
        if self.scheduler is not None:
            raise SettingError("scheduler", "a staircase compares whole runs; leave the scheduler out")
        if self.search != GridSearchSettings():
            raise SettingError("search", "a staircase is not searched; leave search out")

    def _check_parameter(self, key: str, one: Parameter) -> None:
        where = f"parameters.{key}"
        listed = isinstance(self.search, GridSearchSettings)
        if isinstance(one, GridSettings) and not listed:
            raise SettingError(where, f"a grid cannot be searched by {self.search.kind}: say kind choice, or leave search out")
        if not isinstance(one, GridSettings | OptionsSettings) and listed:
            raise SettingError(
                where, f"{one.kind} needs a search that picks: say search: {{kind: random, samples: N}} (or optuna), or kind grid"
            )

    def _check_once(self) -> None:
        """A key is set in one place; the steps of a staircase may take turns."""
        seen = dict.fromkeys(self.set, "set")
        for name, one in self.parameters.items():
            keys = {key for option in one.options.values() for key in option} if isinstance(one, OptionsSettings) else {name}
            for key in sorted(keys):
                if key in seen:
                    raise SettingError(f"parameters.{name}", f"{key} is set by {seen[key]} as well; leave one of them out")
                seen[key] = f"parameters.{name}"
        for step in self.steps:
            twice = [key for key in step.set if key in self.set]
            if twice:
                raise SettingError("set", f"{twice[0]} is set by the step '{step.name}' as well; leave one of them out")

    def _check_search(self) -> None:
        for metric, mode in ((self.metric, self.mode), *((one.metric, one.mode) for one in self.also)):
            if metric == "validation/loss" and mode == "max":
                raise SettingError("mode", "less of validation/loss is better; say mode: min")
        if isinstance(self.search, OptunaSearchSettings) and len(self.seeds) > 1:
            raise SettingError(
                "seeds", "Optuna learns from one score a suggestion: give one seed here, and train the best points with more"
            )
        if self.also and (not isinstance(self.search, OptunaSearchSettings) or self.scheduler is not None):
            raise SettingError("also", "several objectives are for search kind optuna without a scheduler")
        if len({self.metric, *(one.metric for one in self.also)}) < 1 + len(self.also):
            raise SettingError("also", "an objective stands there twice")


def keys_of(space: Space) -> dict[str, str]:
    """The recipe keys that a space sets, each with the place in the space that does."""
    found = {key: f"set.{key}" for key in space.set}
    for place, step in enumerate(space.steps):
        found |= {key: f"steps[{place}].set.{key}" for key in step.set}
    for name, one in space.parameters.items():
        if isinstance(one, OptionsSettings):
            found |= {key: f"parameters.{name}" for option in one.options.values() for key in option}
        else:
            found[name] = f"parameters.{name}"
    return found


def load_space(path: str | Path) -> Space:
    """The space in a file."""
    return build(Space, load_tree(path))


def space_of(plain: Mapping[str, Any], source: str = "sweep.json: space") -> Space:
    """The space that a sweep's plan keeps."""
    return build(Space, from_plain(plain, source))

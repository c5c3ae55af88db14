"""Whether a run's files hold what the board counts on: checked once, where they are read, so that no view meets a surprise.

A person, a disk or another program may have changed them. The first thing that is not as expected is a DataError that names file and key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from stairstep.evaluation.questions_answered import GRADED, STATES
from stairstep.evaluation.retrieval import ARTICLE_METRICS
from stairstep.records import Status
from stairstep.settings import DataError
from stairstep.settings.tree import describe
from stairstep.sweeps import StepOfStairs, SweepPlan, TrialRecord
from stairstep.sweeps.folder import TrialState

Row = Mapping[str, Any]
DRAWN = ("train/loss", "validation/loss", "train/temperature", "rate/llm", "rate/vit", "time/step_seconds", "time/wait_seconds")
_MOST = 2**53  # what a float counts exactly, and a page's script too
_LEAVES: Mapping[str, type] = {"run.seed": int, "optim.batch": int, "evaluation.selection_metric": str, "cluster.workers": int}


def is_number(value: Any) -> bool:
    """Whether it is a finite number that is no wonder of size."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MOST


def check_summary(summary: Any, path: Path) -> Row:
    """A summary of an evaluation, as it was if it is one."""
    that = _That(path, "evaluate that step again, or delete the file")
    that.mapping(summary, "")
    that.mapping(summary.get("metrics"), "metrics")
    for part in ("metrics", "selection", "report"):
        for name, one in that.mapping(summary.get(part, {}), part).items():
            key = f"{part}.{name}"
            that.whole(that.mapping(one, key).get("n"), f"{key}.n")
            for end in ("value", "low", "high") if one["n"] else ():
                that.number(one.get(end), f"{key}.{end}")
    if "qa" in summary:
        _check_answers(that, that.mapping(summary["qa"], "qa"))
    for kind, made in that.mapping(summary.get("calls", {}), "calls").items():
        that.mapping(made, f"calls.{kind}")
        for name in ("asked", "hits", "waited", "prompt_tokens", "completion_tokens", "cost"):
            if made.get(name) is not None or name in made.keys() & {"asked", "hits", "waited"}:
                that.number(made[name], f"calls.{kind}.{name}")
    for name, seconds in that.mapping(summary.get("timings", {}), "timings").items():
        that.number(seconds, f"timings.{name}")
    for name in ("questions", "tiles", "pairs", "top_k_read"):
        if summary.get(name) is not None:
            that.whole(summary[name], name)
    for name in ("name", "tiles_dir"):
        that.true(summary.get(name) is None or isinstance(summary[name], str), name, "text", summary.get(name))
    return dict(summary)


def _check_answers(that: _That, qa: Row) -> None:
    for part in ("all", *(one for one in ("selection", "report") if one in qa)):
        found = that.mapping(qa.get(part), f"qa.{part}")
        that.whole(found.get("graded"), f"qa.{part}.graded")
        that.true("score" in found, f"qa.{part}.score", "a number or null", None)
        for end in ("score", "low", "high") if found["score"] is not None else ():
            that.number(found.get(end), f"qa.{part}.{end}")
        that.number(found.get("coverage"), f"qa.{part}.coverage")
        that.number(found.get("floor", 0.0), f"qa.{part}.floor")
        bounds = found.get("bounds")
        both = isinstance(bounds, list) and len(bounds) == 2 and all(map(is_number, bounds))
        that.true(both, f"qa.{part}.bounds", "two numbers", bounds)
        for state, count in that.mapping(found.get("states"), f"qa.{part}.states").items():
            that.whole(count, f"qa.{part}.states.{state}")


def check_rows(rows: Sequence[Any], path: Path) -> list[Row]:
    """The rows of a question set."""
    for number, row in enumerate(rows, start=1):
        if not (isinstance(row, dict) and all(key in row and holds(row[key]) for key, holds in _ROW.items()) and _answered(row)):
            raise DataError(f"{path}: row {number}: these rows are not those of a question set; evaluate that step again")
    return list(rows)


def _tile(one: Any) -> bool:
    named = isinstance(one, dict) and all(isinstance(one.get(key, ""), str) for key in ("path", "tile"))
    return named and isinstance(one.get("article"), str) and is_number(one.get("score", 0.0))


def _answered(row: Row) -> bool:
    state = row.get("state")
    ranks = row.get("golden_ranks", [])
    known = state is None or (state in STATES and ((state in GRADED) == isinstance(row.get("correct"), bool)))
    said = all(row.get(key) is None or isinstance(row[key], str) for key in ("answer", "predicted", "reason"))
    return known and said and isinstance(ranks, list) and all(rank is None or is_number(rank) for rank in ranks)


_ROW: Mapping[str, Callable[[Any], bool]] = {
    "id": lambda value: isinstance(value, str | int),
    "problem": lambda value: isinstance(value, str),
    "golden_ids": lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
    "split": lambda value: isinstance(value, str),
    "retrieved": lambda value: isinstance(value, list) and all(map(_tile, value)),
    **dict.fromkeys(ARTICLE_METRICS.values(), lambda value: isinstance(value, bool) or is_number(value)),
}


def check_log(rows: Sequence[Any], path: Path) -> Sequence[Row]:
    """The rows of a metric log; what the board draws is a number wherever it stands."""
    for number, row in enumerate(rows, start=1):
        that = _That(path, "mend that line, or remove it")
        that.true(isinstance(row, dict), f"row {number}", "an object", row)
        that.true(isinstance(row.get("step"), int), f"row {number}: a line without a step: step", "a whole number", row.get("step"))
        for name in DRAWN:
            value = row.get(name)
            known = value is None or is_number(value) or (isinstance(value, float) and not math.isfinite(value))
            that.true(known, f"row {number}: {name}", "a number", value)
    return rows


def check_recipe(recipe: Any, path: Path) -> Row:
    """A run's resolved recipe, as far as the board reads it."""
    that = _That(path, "put back what the run wrote there")
    for key, kind in _LEAVES.items():
        section, _, name = key.partition(".")
        value = that.mapping(recipe.get(section, {}), section).get(name)
        known = value is None or (isinstance(value, kind) and not isinstance(value, bool))
        that.true(known, key, "a whole number" if kind is int else "text", value)
    data, sets = that.mapping(recipe.get("data", {}), "data"), recipe.get("evaluation", {}).get("sets") or []
    roots = data.get("roots") or []
    that.true(isinstance(roots, list) and all(isinstance(one, str) for one in roots), "data.roots", "a list of folders", roots)
    that.true(isinstance(sets, list), "evaluation.sets", "a list", sets)
    for number, one in enumerate(sets):
        for name in ("path", "tiles_dir"):
            value = that.mapping(one, f"evaluation.sets[{number}]").get(name)
            that.true(value is None or isinstance(value, str), f"evaluation.sets[{number}].{name}", "text", value)
    return dict(recipe)


def check_status(status: Status | None, path: Path) -> Status | None:
    """A run's status, whose values have their types."""
    that = _That(path, "delete the file to go on without it")
    if status is not None:
        for name in ("step", "of", "pid"):
            that.whole(getattr(status, name), name)
        that.number(status.heartbeat, "heartbeat")
        for name in ("message", "host"):
            that.true(isinstance(getattr(status, name), str), name, "text", getattr(status, name))
    return status


def check_trial(trial: TrialRecord, path: Path) -> TrialRecord:
    """A trial's record: it is of the trial that its file is named after, and its values have their types."""
    that = _That(path, "put back what the sweep wrote there, or delete it with its run")
    that.true(trial.name == path.stem, "name", f"'{path.stem}', as the file is named", trial.name)
    that.true(trial.state in get_args(TrialState), "state", f"one of {', '.join(get_args(TrialState))}", trial.state)
    that.true(isinstance(trial.reason, str), "reason", "text", trial.reason)
    for name in ("number", "seed", "workers"):
        that.whole(getattr(trial, name), name)
    that.number(trial.seconds, "seconds")
    for key, value in that.mapping(trial.point, "point").items():
        that.true(value is None or isinstance(value, str | bool) or is_number(value), f"point.{key}", "a plain value", value)
    return trial


def check_plan(plan: SweepPlan, path: Path) -> SweepPlan:
    """A sweep's plan, as far as the board reads it."""
    that = _That(path, "put back what the sweep wrote there")
    that.true(isinstance(plan.name, str) and isinstance(plan.command, str), "name, command", "text", plan.name)
    for name in ("metrics", "modes", "steps", "skipped"):
        that.true(isinstance(getattr(plan, name), tuple), name, "a list", getattr(plan, name))
    that.true(plan.metrics != () and all(isinstance(one, str) for one in plan.metrics), "metrics", "names of metrics", plan.metrics)
    fit = len(plan.modes) == len(plan.metrics) and set(plan.modes) <= {"max", "min"}
    that.true(fit, "modes", "max or min for each metric", plan.modes)
    named = all(isinstance(one, StepOfStairs) and isinstance(one.name, str) and isinstance(one.adds, str) for one in plan.steps)
    that.true(named, "steps", "a name and what it adds for each", plan.steps)
    for one in plan.skipped:
        that.mapping(that.mapping(one, "skipped").get("point", {}), "skipped.point")
    return plan


class _That:
    """What is expected of one file, with what to do where it is otherwise."""

    def __init__(self, path: Path, advice: str) -> None:
        self._path, self._advice = path, advice

    def true(self, holds: bool, key: str, expected: str, found: Any) -> None:
        if not holds:
            raise DataError(f"{self._path}: {key + ': ' if key else ''}expected {expected}, found {describe(found)}; {self._advice}")

    def mapping(self, value: Any, key: str) -> Mapping[str, Any]:
        self.true(isinstance(value, Mapping), key, "keys with values", value)
        found: Mapping[str, Any] = value
        return found

    def number(self, value: Any, key: str) -> None:
        self.true(is_number(value), key, "a number", value)

    def whole(self, value: Any, key: str) -> None:
        self.true(isinstance(value, int) and is_number(value), key, "a whole number", value)

"""Which evaluations a person means by RUN or RUN:STEP, and which of their questions may be compared.

Without a step it is the run's best on the selection split. A step that was picked among several looks too good on the questions that it was
picked by, so then everything is compared over the other questions alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from stairstep.evaluation.comparison import Compared, check_same_questions, compare
from stairstep.evaluation.evaluated import Evaluated, Side, read_evaluated, steps_evaluated
from stairstep.evaluation.peaks import peak_of_run
from stairstep.records import RunFolder
from stairstep.records.copies import copy_to_read, told_as
from stairstep.records.places import ObjectFolder, is_url, place
from stairstep.records.resume import differences
from stairstep.settings import InputError

_TRAINED = ("task", "data", "tiles", "model", "objective", "optim", "phases")
_PLACES = re.compile(r"data\.roots.*|.*[._](path|folder)|tiles\.(store|decode_workers|prefetch_mb)")  # may differ by machine


@dataclass(frozen=True)
class Named:
    """A run's evaluation as a person named it; `metric` is what its step was picked by, or None; `where` is what its folder is, or is
    the copy of."""

    folder: Path
    step: int
    metric: str | None
    where: str

    @property
    def line(self) -> str:
        """Which it is, and why that step."""
        return f"{self.where} step {self.step}" + (f" (best {self.metric} on the selection split)" if self.metric else "")


def named(text: str) -> list[Named]:
    """The evaluations that `RUN[:STEP]`, or several seeds' `RUN[:STEP],RUN[:STEP]`, names."""
    found = [_named(one) for one in text.split(",")]
    for one, other in combinations(found, 2):
        _check_seeds(one, other)
    return found


def compare_named(first: Sequence[Named], second: Sequence[Named], set_name: str | None) -> tuple[Compared, int | None]:
    """The comparison; and over how many questions, where these are the ones that no step was picked by, else None."""
    both = [*first, *second]
    runs = [_read(one, set_name) for one in both]
    check_same_questions(runs)
    held = None
    if any(one.metric for one in both):
        picked = [{row["id"] for row in run.rows if row["split"] == "report"} for one, run in zip(both, runs, strict=True) if one.metric]
        held = set.intersection(*picked)
        if not held:
            raise InputError("no question is left that no step was picked by; name the steps, as RUN:STEP")
        runs = [run.among(held) for run in runs]
    sides = (_side(first, runs[: len(first)]), _side(second, runs[len(first) :]))
    if sides[0].name == sides[1].name:
        sides = (replace(sides[0], name="first"), replace(sides[1], name="second"))
    return compare(*sides), None if held is None else len(held)


def _named(text: str) -> Named:
    bare, _, options = text.partition("?") if is_url(text) else (text, "", "")
    parts = re.fullmatch(r"(.+?)(?::(\d+))?", bare)
    if parts is None:
        raise InputError(f"'{text}': expected RUN or RUN:STEP, such as runs/tinywiki:50")
    there = place(f"{parts[1]}?{options}" if options else parts[1])
    folder, where = (copy_to_read(there), there.where()) if isinstance(there, ObjectFolder) else (there, str(there))
    if not folder.is_dir():
        raise InputError(
            f"{folder}: there is no such folder; expected a run folder, such as runs/tinywiki, or runs/tinywiki:50 for its step 50"
        )
    if parts[2] is not None:
        return Named(folder, int(parts[2]), None, where)
    return _best(folder, where)


def _best(folder: Path, where: str) -> Named:
    """The run's best step; where one evaluation is all there is after step 0, that one, and nothing was picked."""
    steps = steps_evaluated(folder)
    trained = [step for step in steps if step] or steps
    if len(trained) == 1:
        return Named(folder, trained[0], None, where)
    if not trained:
        raise InputError(f"{where}: there is no evaluation here; expected eval_step<step>.summary.json, as a run folder has them")
    metric = RunFolder.open(folder).recipe()["evaluation"]["selection_metric"]
    best = peak_of_run(folder, metric)
    if best is None:
        shown = ", ".join(map(str, steps))
        raise InputError(f"{where}: no step has {metric} on the selection split and on the rest; name a step, as RUN:STEP ({shown})")
    return Named(folder, best.step, metric, where)


def _read(one: Named, set_name: str | None) -> Evaluated:
    with told_as(one.folder, one.where):
        return read_evaluated(one.folder, one.step, set_name)


def _side(several: Sequence[Named], runs: Sequence[Evaluated]) -> Side:
    name = f"{several[0].folder.resolve().name} step {several[0].step}"
    return Side(name if len(several) == 1 else f"{name} and {len(several) - 1} more", runs)


def _check_seeds(one: Named, other: Named) -> None:
    """Refuse what is no second seed of a run: the run itself, its seed again, or a run of another recipe."""
    if one.folder.resolve() == other.folder.resolve():
        raise InputError(f"{one.where}: named twice on one side; a list is of one recipe's runs with other seeds")
    if not (RunFolder(one.folder).holds_run() and RunFolder(other.folder).holds_run()):
        return  # evaluations outside a run say nothing of their recipe
    recipes = [RunFolder(each.folder).recipe() for each in (one, other)]
    trained, otherwise = ({key: recipe.get(key) for key in _TRAINED} for recipe in recipes)
    found = [differ for differ in differences(trained, otherwise) if not _PLACES.fullmatch(differ[0])]
    if found:
        key, here, there = found[0]
        raise InputError(
            f"{one.where} and {other.where} are not one recipe with two seeds ({key}: {here!r} and {there!r}); "
            "a list is of one recipe's runs"
        )
    if recipes[0]["run"]["seed"] == recipes[1]["run"]["seed"]:
        raise InputError(f"{other.where}: has the seed of {one.where} ({recipes[0]['run']['seed']}); a list is of runs with other seeds")

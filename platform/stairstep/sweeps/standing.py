"""How a run or a sweep stands, read from its folder alone: what `python -m jobs.status` prints.

Nothing is asked of a process, so it may be on another machine or gone; a run that says it is at work and has been silent is named as
such, and why it is silent is for its stacks to tell. The time left is taken from the wall time of the steps since the run, or its last
resume, began, with the evaluations between them; those that still wait for the end of training are not in it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stairstep.evaluation.evaluated import steps_evaluated
from stairstep.records import RunFolder, Status, read_json, result_paths, series
from stairstep.records.pace import SECONDS, WINDOW, Pace, pace_of
from stairstep.records.reading import Reading
from stairstep.records.stalls import STALLED, of_evaluation
from stairstep.settings import DataError, InputError
from stairstep.tasks import load_recipe
from stairstep.tasks.beside import Beside
from stairstep.training import PhasePlan

from .folder import SweepFolder

Trouble = Literal["", "dead", "stalled", "silent"]
"""What is wrong with a run that says it is at work: its process is gone; it wrote its stacks and nothing since; it says nothing."""
_PATIENCE = 3  # steps that a run may be silent for, where steps are slow

_SHOWN = ("hit@1", "hit@3", "mrr")  # of the last evaluation, where it has them


@dataclass(frozen=True)
class Standing:
    """One run as its folder has it."""

    path: Path
    status: Status
    silent_s: float  # since the last heartbeat
    trouble: Trouble
    phase: str
    pace: Pace | None  # over the last WINDOW steps
    batch: int
    left_s: float | None
    losses: Mapping[str, tuple[int, float]]  # the last training and validation loss, with their steps
    evaluated: Sequence[int]
    due: Sequence[int]  # steps whose evaluation is to come, one that is going on among them
    scores: Mapping[str, float]  # of the last evaluation
    stacks: Sequence[Path]  # written since the last heartbeat
    open: Sequence[int] = ()  # steps handed to evaluators beside training and not found yet
    reading: Reading | None = None  # how far the questions of the evaluation at hand, or of the last one, are answered

    @property
    def evaluating(self) -> bool:
        """Whether an evaluation is going on."""
        return self.status.state == "evaluating"


def standing_of(path: Path, now: float | None = None) -> Standing:
    """How the run in a folder stands."""
    now = time.time() if now is None else now
    folder = RunFolder.open(path)
    status, recipe, rows = folder.status, load_recipe(path / "recipe.yaml"), folder.metrics.rows()
    if status is None:
        raise DataError(f"{path}: this run has no status.json yet; it is being opened, or was never started")
    trained = [row for row in rows if row.get(SECONDS) is not None]
    evaluated = steps_evaluated(path)
    steps, every = recipe.optim.steps, recipe.evaluation.every
    due = sorted({*range(0, steps + 1, every), steps} - set(evaluated)) if recipe.evaluation.sets else []
    pace = pace_of(trained[-WINDOW:])
    waits = status.state == "evaluating"  # otherwise the run gets on, whatever holds up an evaluator beside it
    stacks = sorted(one for one in path.glob(STALLED) if one.stat().st_mtime >= status.heartbeat and (waits or not of_evaluation(one)))
    losses = {name: series(rows, f"{name}/loss")[-1:] for name in ("train", "validation")}
    return Standing(
        path=path,
        status=status,
        silent_s=max(0.0, now - status.heartbeat),
        trouble=_trouble(status, now, pace, bool(stacks)),
        phase=PhasePlan(recipe.phases, steps).name(min(status.step + 1, steps)),
        pace=pace,
        batch=recipe.optim.batch,
        left_s=_left(trained, _resumed_from(path), steps) if status.active() else None,
        losses={name: one[0] for name, one in losses.items() if one},
        evaluated=evaluated,
        due=due if status.active() else (),
        scores=_scores(path, evaluated[-1]) if evaluated else {},
        stacks=stacks,
        open=Beside(folder).open() if status.active() else (),
        reading=folder.reading,
    )


def _trouble(status: Status, now: float, pace: Pace | None, stacks: bool) -> Trouble:
    if not status.active():
        return ""
    if status.lost(status.heartbeat):  # with no silence at all: its process is gone
        return "dead"
    if stacks:
        return "stalled"
    slow = pace is not None and now - status.heartbeat < _PATIENCE / pace.steps_s
    return "silent" if status.lost(now) and not slow else ""


def _resumed_from(path: Path) -> int:
    environment = path / "environment.json"
    return int(read_json(environment).get("from_step", 0)) if environment.exists() else 0


def _left(trained: Sequence[Mapping[str, Any]], since: int, steps: int) -> float | None:
    """Seconds to the last step at the pace of this session; None before its second step."""
    own = [row for row in trained if row["step"] > since]
    if len(own) < 2 or own[-1]["step"] <= own[0]["step"]:
        return None
    return max(0.0, (own[-1]["time"] - own[0]["time"]) / (own[-1]["step"] - own[0]["step"]) * (steps - own[-1]["step"]))


def _scores(path: Path, step: int) -> dict[str, float]:
    """What an evaluation of the primary question set gave; a score below the coverage floor is none."""
    summary = read_json(result_paths(path, step)[1])
    found = {name: summary["metrics"][name]["value"] for name in _SHOWN if name in summary.get("metrics", {})}
    answered = summary.get("qa", {}).get("all", {})
    found["qa"] = answered.get("score")
    return {name: value for name, value in found.items() if value is not None}


# --- where to look


def runs_below(root: Path) -> tuple[list[SweepFolder], list[Path]]:
    """The sweeps and the runs in a folder, those of the sweeps apart; by when they last said something, the oldest first."""
    if not root.is_dir():
        raise InputError(f"{root}: there is no such folder; expected a run, a sweep, or the folder in which runs lie")
    sweeps = [SweepFolder(one) for one in sorted(root.iterdir()) if SweepFolder.is_one(one)]
    runs = [one for one in root.iterdir() if RunFolder(one).holds_run() and not SweepFolder.is_one(one)]
    if not sweeps and not runs:
        raise InputError(
            f"{root}: no run and no sweep is here; expected a run folder (recipe.yaml), a sweep (sweep.json), or a folder of them"
        )
    return sweeps, sorted(runs, key=_last_word)


def _last_word(run: Path) -> float:
    status = run / "status.json"
    return status.stat().st_mtime if status.exists() else 0.0

"""One trial of a sweep, as Ray Tune runs it: a Ray Train run of the trial's own recipe file, watched from the trial's process.

Its scores are read from the run folder as they appear and told to Tune with the step that they belong to, whenever they come; the trial
does not end before the last of them is told. Whatever becomes of the run stands in the trial's record; Tune is told of no failure but the
death of this process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune

from stairstep.records import logging_setup
from stairstep.records.copies import follow
from stairstep.records.places import ObjectFolder
from stairstep.settings import StairstepError, UnreachableError
from stairstep.sweeps.folder import ALL, SweepFolder, TrialRecord
from stairstep.sweeps.plan import in_sweep
from stairstep.sweeps.scores import scores
from stairstep.sweeps.serving import ServedReader, asked_where_served
from stairstep.sweeps.space import Space, space_of
from stairstep.tasks import Recipe, load_recipe
from stairstep.tasks.placing import run_place

from .stopping import LAST, RECORDED, SCORE, STEP, TRIAL
from .train import train_on_ray

_LOG = logging.getLogger(__name__)
_LOOK_S = 2.0
_RECORD_S = 5.0
_AGAIN_S = 10.0  # until a store that was away is asked again
_SHOWN = 600  # characters of an error that a row of the table holds; the whole stands in the run folder


def run_trial(config: Mapping[str, Any]) -> None:
    """Train a trial, or go on with it, its earlier scores told first."""
    logging_setup()
    sweep, name = SweepFolder(config["sweep"]), config[TRIAL]
    watched = _Watched(sweep, name, space_of(sweep.plan.space))
    if sweep.asked_to_stop(ALL):
        watched.write(state="waiting")
        return
    served = ServedReader(**config["reader"]) if config["reader"] else None
    try:
        recipe = in_sweep(asked_where_served(load_recipe(sweep.recipe_path(name)), served), config["runs"], name)
        if recipe.evaluation.mode == "auto":  # decided once for the whole sweep
            recipe = replace(recipe, evaluation=replace(recipe.evaluation, mode=config["mode"]))
        if not watched.bring(run_place(recipe)):
            watched.write(state="waiting")
            return
        watched.train(recipe)
    except Exception as error:  # noqa: BLE001 - one row of the table, not the end of the sweep
        watched.write(state="failed", reason=_told(error))


class _Watched:
    """A trial's run seen from outside: what it has scored, how long it has taken, whether it is to stop."""

    def __init__(self, sweep: SweepFolder, name: str, space: Space) -> None:
        self.sweep, self.space = sweep, space
        self.record: TrialRecord = sweep.trial(name)
        self._told: set[int] = set()
        self._last = 0  # step of the run
        self._looked = self._written = 0.0
        self._began = time.monotonic()
        self._before = self.record.seconds

    def bring(self, run: Path | ObjectFolder) -> bool:
        """Read what the store has of the run; while it is away no trial begins, or ends. False where the sweep was stopped meanwhile."""
        if isinstance(run, Path):
            return True
        told = False
        while not self.sweep.asked_to_stop(ALL):
            try:
                follow(run, self.sweep.run_path(self.record.name))
                self._began = self._began if self.record.state == "running" else time.monotonic()  # no worker was held till now
                return True
            except UnreachableError as error:
                if not told:
                    _LOG.warning("%s; trial %s waits for the store", error, self.record.name)
                told = True
            time.sleep(_AGAIN_S)
        return False

    def train(self, recipe: Recipe) -> None:
        """Train, and write down how it ended."""
        self._last = recipe.optim.steps
        self.write(state="running", reason="", stopped_at=None)
        self.look()
        status = self.sweep.run(self.record.name).status
        if status is not None and status.state == "finished":  # its process died between the run's end and the record
            self.write(state="finished")
            return
        try:
            outcome = train_on_ray(recipe, self.attend, view=self.sweep.run_path(self.record.name), patient=True).outcome
            self.bring(run_place(recipe))  # its last scores, which nobody asks for again
        finally:
            self.look()
        alone = self.sweep.asked_to_stop(self.record.name)
        if outcome.reason != "stopped":
            self.write(state="finished")
        elif alone:
            self.write(state="stopped", reason=alone, stopped_at=outcome.step)
        else:
            self.write(state="waiting")

    def attend(self) -> str:
        """Tell Tune what is new; says why the run is to stop, if it is."""
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return ""
        self._looked = now
        self.look()
        if now - self._written > _RECORD_S:
            self.write()
        return self.sweep.asked_to_stop(self.record.name) or self.sweep.asked_to_stop(ALL)

    def look(self) -> None:
        """Tell Tune every score that it has not been told, and which of them were judged in an earlier life."""
        run = self.sweep.run_path(self.record.name)
        for step, value in scores(run, self.space.metric).items():
            if step not in self._told:
                self._told.add(step)
                tune.report({STEP: step, SCORE: value, RECORDED: step <= self.record.judged, LAST: step >= self._last})
                self.write(judged=max(step, self.record.judged))
        self._obey_rules(run)

    def _obey_rules(self, run: Path) -> None:
        for rule in self.space.stop:
            for step, value in scores(run, rule.metric).items():
                low, high = rule.below is not None and value < rule.below, rule.above is not None and value > rule.above
                if rule.from_step <= step < self._last and (low or high):
                    bound = f"below {rule.below:g}" if low else f"above {rule.above:g}"
                    self.sweep.ask_to_stop(self.record.name, f"stop rule: {rule.metric} {value:.3f} at step {step} is {bound}")

    def write(self, **changes: Any) -> None:
        """Write the record with what has changed, and the seconds until now."""
        self._written = time.monotonic()
        self.record = replace(self.record, seconds=self._before + self._written - self._began, **changes)
        self.sweep.write_trial(self.record)


def _told(error: Exception) -> str:
    """An error as a row holds it: the message of one of ours, else the last line of the traceback that is its message."""
    text = str(error).strip() or type(error).__name__
    said = text if isinstance(error, StairstepError) else text.splitlines()[-1]
    return said if len(said) <= _SHOWN else f"{said[: _SHOWN - 1]}…"

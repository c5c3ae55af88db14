"""Evaluation beside training: what the run and its evaluators tell each other, through the run folder alone.

    beside/wanted-<step>               the step's checkpoint is there to be evaluated
    beside/found-<step>.json           what was found; the step's rows and summaries were written before
    stalled-evaluation-<step>.txt      the stacks of an evaluator that has not got on with it; else it touches its wish again and again

A run wants a step once its checkpoint is complete, and takes in what was found in the order of the steps. What was found stays: a run that
goes on from an earlier checkpoint finds it again instead of evaluating once more. An evaluation that died leaves its wish behind. A run
that ends takes its wishes back: nothing is written into it afterwards, so what it has scored does not depend on how fast evaluators are.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from stairstep.records import RunFolder, read_json, write_json
from stairstep.records.reading import READING
from stairstep.records.stalls import evaluation_stall_path

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """One evaluation as the run takes it in: its metrics, its score on the selection split, and what a person reads of it."""

    metrics: Mapping[str, float]
    selection: float | None
    notes: tuple[str, ...]


class Beside:
    """The wishes and findings of one run."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._place = folder.path / "beside"

    def want(self, step: int) -> bool:
        """Ask for a step's evaluation unless it is known; false where there is no checkpoint to evaluate."""
        if self._found(step).exists():
            self._wanted(step).unlink(missing_ok=True)  # of an evaluator that died between the two
            return True
        if not self.folder.checkpoint_path(step).is_dir():
            _LOG.warning("step %d: its checkpoint was deleted before it was evaluated; it is not evaluated", step)
            return False
        self._place.mkdir(exist_ok=True)
        self._wanted(step).touch()
        return True

    def wanted(self) -> list[int]:
        """The steps that are to be evaluated, ascending."""
        return sorted(int(path.name.removeprefix("wanted-")) for path in self._place.glob("wanted-*"))

    def wants(self, step: int) -> bool:
        """Whether a step is to be evaluated: its wish may have been taken back, or fulfilled by another."""
        return self._wanted(step).exists() and not self._found(step).exists()

    def open(self) -> list[int]:
        """The steps that are wanted and not found, ascending."""
        return [step for step in self.wanted() if not self._found(step).exists()]

    def withdraw(self) -> None:
        """The run has ended: nothing of it is wanted any more."""
        for step in self.wanted():
            self._wanted(step).unlink(missing_ok=True)

    def alive(self, step: int) -> bool:
        """An evaluator gets on with a step: stacks that were left of it are of the past. False where it is not wanted any more."""
        try:
            os.utime(self._wanted(step))
        except FileNotFoundError:
            return False
        return True

    def stacks(self, step: int) -> Path:
        """Where an evaluator leaves its stacks when it does not get on with a step."""
        return evaluation_stall_path(self.folder.path, step)

    def hangs(self, step: int) -> bool:
        """Whether a step's evaluator has left its stacks and has not got on since."""
        left = _changed(self.stacks(step))
        signs = (self._wanted(step), self._sign(step), self.folder.path / READING)
        return left is not None and all(left >= (_changed(one) or 0.0) for one in signs)

    def renew(self) -> None:
        """Have the newest wishes and findings, where this is a copy of them."""

    def write(self, step: int, found: Found) -> None:
        """Tell what was found; last of all the wish is taken back."""
        write_json(self._found(step), asdict(found))
        self._wanted(step).unlink(missing_ok=True)

    def found(self, step: int) -> Found | None:
        """What was found of a step, or None."""
        if not self._found(step).exists():
            return None
        plain = read_json(self._found(step))
        return Found(plain["metrics"], plain["selection"], tuple(plain["notes"]))

    def _wanted(self, step: int) -> Path:
        return self._place / f"wanted-{step}"

    def _sign(self, step: int) -> Path:
        """The sign of life of an evaluator that cannot touch the wish itself (besides.py)."""
        return self._place / f"alive-{step}"

    def _found(self, step: int) -> Path:
        return self._place / f"found-{step}.json"


def _changed(path: Path) -> float | None:
    """When a file was last written; None where there is none."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None

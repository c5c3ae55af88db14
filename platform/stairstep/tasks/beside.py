"""Evaluation beside training: what the run and its evaluators tell each other, through the run folder alone.

    beside/wanted-<step>        the step's checkpoint is there to be evaluated
    beside/found-<step>.json    what was found; the step's rows and summaries were written before

A run wants a step once its checkpoint is complete, and takes in what was found in the order of the steps. What was found stays: a run that
goes on from an earlier checkpoint finds it again instead of evaluating once more. An evaluation that died leaves its wish behind.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from stairstep.records import RunFolder, read_json, write_json

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

    def open(self) -> list[int]:
        """The steps that are wanted and not found, ascending."""
        return [step for step in self.wanted() if not self._found(step).exists()]

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

    def _found(self, step: int) -> Path:
        return self._place / f"found-{step}.json"

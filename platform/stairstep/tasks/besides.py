"""Evaluation beside training where the run lies in an object store: the same files by the same names, each side with its own copy.

The run writes its wishes into its working copy, whose mirror puts them once their checkpoint is there, and asks the store for what was
found. The driver sees wishes in its reading copy. An evaluator asks for a wish and puts what it found; it has no copy of either. Touching
an object is putting it anew, which would bring back a wish that is taken back at that moment: a sign of life is an object of its own.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict

from stairstep.records import RunFolder, write_atomically
from stairstep.records.copies import WANTED
from stairstep.records.followed import FollowedRunFolder, ReadRunFolder
from stairstep.records.mirror import MirroredRunFolder
from stairstep.records.places import Stored, patiently
from stairstep.records.reading import READING
from stairstep.settings import StairstepError

from .beside import Beside, Found

_LOG = logging.getLogger(__name__)
_LOOK_S = 2.0
_ALIVE = "beside/alive-"


def beside_of(folder: RunFolder) -> Beside:
    """The wishes and findings of a run, for whoever has this folder of it."""
    if isinstance(folder, MirroredRunFolder):
        return OfTheRun(folder)
    if isinstance(folder, FollowedRunFolder):
        return OfAnEvaluator(folder)
    return OfTheDriver(folder) if isinstance(folder, ReadRunFolder) else Beside(folder)


class OfTheRun(Beside):
    """Of the working copy: what was found is asked of the store every few seconds."""

    folder: MirroredRunFolder

    def __init__(self, folder: MirroredRunFolder) -> None:
        super().__init__(folder)
        self._asked: dict[int, float] = {}
        self._hanging: set[int] = set()
        self._failing = False

    def want(self, step: int) -> bool:
        """Ask for a step's evaluation unless it is known; false where there is no checkpoint to evaluate."""
        there = super().want(step)
        self.folder.mirror.push()
        return there

    def found(self, step: int) -> Found | None:
        """What was found of a step, or None."""
        if not self._found(step).exists() and time.monotonic() - self._asked.get(step, float("-inf")) >= _LOOK_S:
            self._asked[step] = time.monotonic()
            self._ask(step)
        return super().found(step)

    def hangs(self, step: int) -> bool:
        """Whether a step's evaluator has left its stacks and has not got on since, as the store had it at the last look."""
        return step in self._hanging

    def _ask(self, step: int) -> None:
        remote, name = self.folder.remote, f"beside/{self._found(step).name}"
        try:
            there = remote.files()
            told = remote.get(name) if name in there else None
        except (StairstepError, OSError) as error:
            if not self._failing:
                _LOG.warning("%s; what evaluators have found is asked for again and again", error)
            self._failing = True
            return
        self._failing = False
        self._hanging.discard(step)
        if told is not None:
            write_atomically(self._found(step), told)
            self._wanted(step).unlink(missing_ok=True)
        elif self._wanted(step).exists():
            if f"{WANTED}{step}" not in there:  # it was not put yet, or taken back by one who is no part of this run any more
                self._wanted(step).touch()
            if _hangs(there, self.stacks(step).name, step):
                self._hanging.add(step)


def _hangs(there: Mapping[str, Stored], stacks: str, step: int) -> bool:
    """Whether the stacks of a step's evaluator are newer than every sign that it gets on."""
    signs = [there[one].time_ns for one in (f"{WANTED}{step}", f"{_ALIVE}{step}", READING) if one in there]
    return stacks in there and all(there[stacks].time_ns >= one for one in signs)


class OfTheDriver(Beside):
    """Of the reading copy."""

    folder: ReadRunFolder

    def renew(self) -> None:
        """Have the newest wishes and findings."""
        self.folder.refresh(at_once=True)

    def withdraw(self) -> None:
        """The run has ended: nothing of it is wanted any more."""
        remote = self.folder.remote
        try:
            remote.remove([name for name in remote.files() if name.startswith((WANTED, _ALIVE))])
        except (StairstepError, OSError) as error:
            _LOG.warning("%s; an evaluation that is still under way may be put after the run's end", error)
        super().withdraw()


class OfAnEvaluator(Beside):
    """Without a copy: each look is one at the store."""

    folder: FollowedRunFolder

    def wants(self, step: int) -> bool:
        """Whether a step is to be evaluated: its wish may have been taken back, or fulfilled by another."""
        remote = self.folder.remote
        return patiently(lambda: remote.exists(f"{WANTED}{step}") and not remote.exists(f"beside/{self._found(step).name}"))

    def alive(self, step: int) -> bool:
        """An evaluator gets on with a step: stacks that were left of it are of the past. False where it is not wanted any more."""
        remote = self.folder.remote

        def said() -> bool:
            there = remote.exists(f"{WANTED}{step}")
            if there:
                remote.put(f"{_ALIVE}{step}", b"")
            return there

        return patiently(said)

    def write(self, step: int, found: Found) -> None:
        """Tell what was found; last of all the wish is taken back."""
        remote = self.folder.remote
        patiently(lambda: remote.put(f"beside/{self._found(step).name}", json.dumps(asdict(found))))
        patiently(lambda: remote.remove([f"{WANTED}{step}", f"{_ALIVE}{step}"]))

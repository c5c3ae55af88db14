"""A run as its driver sees it, who trains nothing: it opens the run, follows it, and says how it ended where no worker can.

A folder that all nodes see is one folder for all of this. Of a run in an object store the driver has two copies: the working copy, which
it claims between two groups of workers as the first worker does while it trains, and one to read, which is made anew every few seconds.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from pathlib import Path

from stairstep.records import RunFolder
from stairstep.records.cache import copy_folder
from stairstep.records.followed import REFRESH_S, ReadRunFolder, checkpoint_steps
from stairstep.records.places import ObjectFolder
from stairstep.settings import InputError, StairstepError, UnreachableError
from stairstep.tasks import Recipe
from stairstep.tasks.opening import open_run
from stairstep.tasks.placing import open_placed, run_place

from .work import wait_for_claim

_LOG = logging.getLogger(__name__)
_SHORTLY_S = 5.0  # processes that were killed need a moment to die
_STOP = "stop"


class SeenRun:
    """The run of a recipe; `view` is where it is read, and `folder` where it is opened under a claim."""

    def __init__(self, recipe: Recipe, view: Path | None = None) -> None:
        """`view`: where the copy to read of a run in an object store is kept; by default in this machine's cache."""
        self.recipe, self.place = recipe, run_place(recipe)
        self.folder = open_placed(recipe)
        self.view: RunFolder = self.folder
        if isinstance(self.place, ObjectFolder):
            self.view = ReadRunFolder(view or copy_folder("followed", self.place) / self.place.name, self.place)
        self._steps: tuple[float, list[int]] = float("-inf"), []

    def open(self, recipe: Recipe, patience_s: float) -> None:
        """Make the folder ready for workers, once those who are about to die there have died."""
        with wait_for_claim(self.folder, patience_s):
            open_run(self.folder, recipe)
        self.look(at_once=True)

    def look(self, at_once: bool = False) -> None:
        """Have the newest view, every few seconds or `at_once`."""
        if isinstance(self.view, ReadRunFolder):
            self.view.refresh(at_once)

    def last_step(self) -> int:
        """The step of the last complete checkpoint, 0 where there is none."""
        if not isinstance(self.place, ObjectFolder):
            checkpoints = self.folder.checkpoints()
            return checkpoints[-1].step if checkpoints else 0
        if time.monotonic() - self._steps[0] >= REFRESH_S:
            with suppress(UnreachableError):  # then it is the last that was seen
                self._steps = time.monotonic(), checkpoint_steps(self.place.files())
        return self._steps[1][-1] if self._steps[1] else 0

    def stop_asked(self) -> bool:
        """Whether a person has left word, in the run's folder, that it is to stop."""
        return (self.view.path / _STOP).exists()

    def forget_stop(self) -> None:
        """The run has ended: who asked for that has what was asked for."""
        (self.view.path / _STOP).unlink(missing_ok=True)
        if isinstance(self.place, ObjectFolder):
            with suppress(StairstepError):  # the next start removes it as well
                self.place.remove([_STOP])

    def stopped(self) -> int:
        """Say that the run was stopped where no worker could save anything: its last checkpoint stands. Returns its step."""
        step, of = self.last_step(), self.recipe.optim.steps
        if isinstance(self.place, ObjectFolder):
            with wait_for_claim(self.folder, _SHORTLY_S):
                self.folder.set_status("stopped", step, of, message="stopped")
        else:
            self.folder.set_status("stopped", step, of, message="stopped")
        return step

    def failed(self, error: Exception) -> None:
        """Say in the status why the run failed, unless another process is at work on it, or the store is what has failed."""
        with suppress(InputError, UnreachableError), wait_for_claim(self.folder, _SHORTLY_S):
            self.folder.set_status("failed", message=str(error) or type(error).__name__)

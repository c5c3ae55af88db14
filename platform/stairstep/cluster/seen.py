"""A run as its driver sees it, who trains nothing: it opens the run, follows it, and says how it ended where no worker can.

A folder that all nodes see is one folder for all of this. Of a run in an object store the driver has two copies: the working copy, which
it claims between two groups of workers as the first worker does while it trains, and one to read, which is made anew every few seconds.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stairstep.records import RunFolder
from stairstep.records.cache import copy_folder
from stairstep.records.followed import ReadRunFolder
from stairstep.records.mirror import MirroredRunFolder
from stairstep.records.places import PATIENCE_S, ObjectFolder
from stairstep.settings import StairstepError
from stairstep.tasks import Recipe
from stairstep.tasks.opening import open_run
from stairstep.tasks.placing import folder_to_mend, open_placed, run_place

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
        self._looking: threading.Thread | None = None

    def open(self, recipe: Recipe, patience_s: float, anew: bool = False, patient: bool = False) -> None:
        """Make the folder ready for workers, once those who are about to die there have died. `anew`: as a person has asked just now, whom
        a store that cannot be reached is told at once unless `patient`; a later time a stop that was asked for meanwhile stays."""
        if isinstance(self.folder, MirroredRunFolder):
            self.folder.patience_s = 0.0 if anew and not patient else PATIENCE_S
        with wait_for_claim(self.folder, patience_s):
            open_run(self.folder, recipe, anew)
        self.look(at_once=True)

    def look(self, at_once: bool = False) -> None:
        """Have a new view `at_once`, or begin to make one every few seconds: a store that is away keeps nobody waiting."""
        if not isinstance(self.view, ReadRunFolder):
            return
        if at_once:
            if self._looking is not None:
                self._looking.join()
            self.view.refresh(at_once=True)
        elif self.view.due and not (self._looking is not None and self._looking.is_alive()):
            self._looking = threading.Thread(target=self.view.refresh, name="view-of-run", daemon=True)
            self._looking.start()

    def last_step(self) -> int:
        """The step of the last complete checkpoint, 0 where there is none; in an object store the last that was seen."""
        if isinstance(self.view, ReadRunFolder):
            return self.view.steps[-1] if self.view.steps else 0
        checkpoints = self.folder.checkpoints()
        return checkpoints[-1].step if checkpoints else 0

    def stop_asked(self) -> bool:
        """Whether a person has left word, in the run's folder, that it is to stop; for between two groups of workers."""
        self.look(at_once=True)
        return (self.view.path / _STOP).exists()

    def forget_stop(self) -> None:
        """The run has ended: who asked for that has what was asked for."""
        (self.view.path / _STOP).unlink(missing_ok=True)
        if isinstance(self.place, ObjectFolder):
            with suppress(StairstepError, OSError):  # the next start removes it as well
                self.place.remove([_STOP])

    def stopped(self) -> int:
        """Say that the run was stopped where no worker could save anything: its last checkpoint stands. Returns its step."""
        step, of = self.last_step(), self.recipe.optim.steps
        if not isinstance(self.place, ObjectFolder):
            self.folder.set_status("stopped", step, of, message="stopped")
            return step
        try:
            with self._to_say() as folder:
                folder.set_status("stopped", step, of, message="stopped")
        except (StairstepError, OSError) as error:
            _LOG.warning("%s could not be told that the run was stopped at step %d: %s", self.place, step, error)
        return step

    def failed(self, error: Exception) -> None:
        """Say in the status why the run failed, unless another process is at work on it, or the place is what has failed."""
        with suppress(StairstepError, OSError), self._to_say() as folder:
            folder.set_status("failed", message=str(error) or type(error).__name__)

    @contextmanager
    def _to_say(self) -> Iterator[RunFolder]:
        """The claimed folder, to write the status alone: nobody has to wait for checkpoints."""
        folder = folder_to_mend(str(self.place)) if isinstance(self.place, ObjectFolder) else self.folder
        with wait_for_claim(folder, _SHORTLY_S):
            yield folder

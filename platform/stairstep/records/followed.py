"""A run folder in an object store as those have it who work on the run and do not write it: what they need of it is brought here.

The first worker of a run writes it (mirror.py). The others, on whatever machine, need the checkpoint that the run goes on from, and now
and then a file; an evaluator needs the checkpoint of its step, and puts rows and summaries. Each has a folder of its own for that. A store
that cannot be reached is asked again for a while: an hour's evaluation is worth ten minutes of waiting.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from stairstep.settings import StairstepError

from .copies import LOCK, fetch, follow, offer
from .files import COMPLETE
from .folders import remove_folder
from .places import ObjectFolder, patiently
from .run_folder import RunFolder, step_of_checkpoint

_LOG = logging.getLogger(__name__)
REFRESH_S = 5.0


class FollowedRunFolder(RunFolder):
    """What was brought of a run folder in an object store, for a worker that does not write it, or for an evaluator."""

    def __init__(self, path: str | Path, remote: ObjectFolder) -> None:
        super().__init__(path)
        self.remote = remote

    @property
    def where(self) -> str:
        """Its URL."""
        return str(self.remote)

    def holds_run(self) -> bool:
        """Whether a run was begun there."""
        return patiently(lambda: self.remote.exists("recipe.yaml"))

    def empty(self) -> None:
        """Nothing of an earlier process is here."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)

    def catch_up(self) -> None:
        """Have the newest checkpoint here, and nothing else."""
        self.empty()
        steps = checkpoint_steps(patiently(self.remote.files))
        if steps:
            self.bring(self.checkpoint_path(steps[-1]).name)

    def bring(self, name: str) -> bool:
        """Have a file or a complete checkpoint of the run here, as the store has it now; false where there is none."""
        return patiently(lambda: self._bring(name))

    def _bring(self, name: str) -> bool:
        if step_of_checkpoint(name) is None:
            (self.path / name).unlink(missing_ok=True)
            if not self.remote.exists(name):
                return False
            fetch(self.remote, [name], self.path)
            return True
        if (self.path / name / COMPLETE).exists():
            return True
        for left in self.checkpoints():  # one at a time, so that looking back at all of them needs no more room than one
            remove_folder(left.path)
        below = self.remote / name
        if not below.exists(COMPLETE):
            return False
        try:
            fetch(self.remote, [f"{name}/{one}" for one in below.files()], self.path)
        except FileNotFoundError:  # it is being deleted
            return False
        return True

    def offer(self, name: str) -> None:
        """Put a file, for people; one that cannot be put is told and let be."""
        offer(self.remote, self.path, name)

    @contextmanager
    def results(self, step: int) -> Iterator[Path]:
        """A folder to write an evaluation to, with the summaries that an earlier one has left, whose calls count on; its rows are put when
        the block ends, and its summaries after them."""
        place = self.path / ".results"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        earlier = [one for one in patiently(self.remote.files) if one.split("/")[-1] == f"eval_step{step}.summary.json"]
        patiently(lambda: fetch(self.remote, earlier, place))
        yield place
        patiently(lambda: put_results(place, self.remote))
        shutil.rmtree(place)


class ReadRunFolder(RunFolder):
    """The reading copy of a run in an object store: all but its checkpoints, for who follows the run and has no part in it."""

    def __init__(self, path: str | Path, remote: ObjectFolder) -> None:
        super().__init__(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self.remote = remote
        self._refreshed = float("-inf")
        self._failing = False
        self.steps: list[int] = []
        """The steps whose checkpoints were complete when the copy was made."""

    @property
    def where(self) -> str:
        """Its URL."""
        return str(self.remote)

    @property
    def due(self) -> bool:
        """Whether the copy is some seconds old."""
        return time.monotonic() - self._refreshed >= REFRESH_S

    def refresh(self, at_once: bool = False) -> None:
        """Make the copy what the store has, every few seconds or `at_once`; a store that cannot be reached is told and asked later."""
        if not at_once and not self.due:
            return
        try:
            self.steps = checkpoint_steps(follow(self.remote, self.path))
        except (StairstepError, OSError) as error:  # a refusal too may be of a moment, such as while credentials are renewed
            if not self._failing:
                _LOG.warning("%s; what is told of the run meanwhile is what was read of it before", error)
            self._failing = True
        else:
            self._failing = False
        self._refreshed = time.monotonic()


def checkpoint_steps(names: Iterable[str]) -> list[int]:
    """The steps, ascending, whose checkpoints have their marker among these objects of a run."""
    folders = [name.removesuffix(f"/{COMPLETE}") for name in names if name.endswith(f"/{COMPLETE}")]
    return sorted(step for one in folders if (step := step_of_checkpoint(one)) is not None)


def put_results(folder: Path, remote: ObjectFolder) -> None:
    """Put an evaluation's rows, and its summaries after them."""
    names = sorted(one.relative_to(folder).as_posix() for one in folder.rglob("*") if one.is_file() and one.name != LOCK)
    for name in sorted(names, key=lambda one: (one.endswith(".summary.json"), one)):
        remote.put_file(name, folder / name)

"""The run folder: all that resume, report, sweep and a person read about one run, and the one truth about its checkpoints.

Everything in it is whole or absent (folders.py) or append-only (metrics.jsonl). Whoever writes holds the claim; evaluators of the same
run may add their own results beside it. A folder without recipe.yaml is not a run folder, and nothing in it is ever deleted.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stairstep.settings import DataError, InputError, to_yaml

from .claim import WATCH_S, Claim
from .environment import describe_environment, same_software
from .files import parse_temporary, read_json, write_atomically, write_json
from .folders import is_complete, new_folder, remove_folder, sweep
from .metrics import MetricLog
from .reading import READING, Reading, ReadingFile, read_reading
from .resume import check_same_recipe, read_recipe
from .stalls import STALLED
from .status import State, Status, StatusFile, read_status

_LOG = logging.getLogger(__name__)
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_SET_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*", flags=re.ASCII)
_OWN_FILES = (
    "status.json",
    READING,
    "metrics.jsonl",
    "trackers.jsonl",
    "environment.json",
    "quarantine.jsonl",
    "report.html",
    "not_finite.json",
    "stop",
)
_OWN_FOLDERS = ("tensorboard", "wandb", "beside")
_HEADER = "# The resolved recipe of this run, written by stairstep.\n"
_RESULTS = ("eval_step*.jsonl", "eval_step*.summary.json")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    step: int
    path: Path


@dataclass(frozen=True)
class Opening:
    """How a run begins: new, resumed from a checkpoint (or from the start, where it has none yet), or finished already."""

    state: Literal["new", "resumed", "finished"]
    from_step: int
    checkpoint: Path | None


class RunFolder:
    """One run's folder; constructing it touches nothing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metrics = MetricLog(self.path / "metrics.jsonl")
        self._status = StatusFile(self.path / "status.json")
        self._claim: Claim | None = None

    @classmethod
    def create(cls, path: str | Path) -> RunFolder:
        """The run folder at `path`, made if it is not there."""
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{path}: the run folder cannot be made: {error.strerror}; choose another run.root or run.name") from None
        return cls(path)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run folder, for reading."""
        folder = cls(path)
        if not folder.holds_run():
            raise InputError(f"{path}: this is not a run folder (it has no recipe.yaml); expected the folder of a run, such as runs/<name>")
        return folder

    @property
    def where(self) -> str:
        """What it is called in messages."""
        return str(self.path)

    def holds_run(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / "recipe.yaml").is_file()

    # --- the claim and how a run begins

    def claim(self, watch_s: float = WATCH_S) -> Claim:
        """The right to write here, refused while another process has it; held until released or the process ends."""
        self._claim = Claim(self.path, watch_s)
        return self._claim

    def open_for(
        self,
        recipe: Mapping[str, Any],
        resume: Literal["auto", "never", "overwrite"],
        completed: Callable[[dict[str, Any]], Mapping[str, Any]] = lambda plain: plain,
    ) -> Opening:
        """Decide how a run of this (plain) recipe begins here, and make the folder ready for it: leftovers swept, old files deleted if
        told, metrics of steps that will run again removed, the recipe written. The caller holds the claim.

        `completed` gives a stored recipe the defaults of keys that are younger than it."""
        if self._claim is None or not self._claim.held:
            raise RuntimeError("claim the run folder before opening it for a run")
        self.sweep()
        if not self.holds_run():
            self._check_empty()
            opening = Opening("new", 0, None)
        elif resume == "overwrite":
            self._delete_run()
            opening = Opening("new", 0, None)
        elif resume == "never":
            raise InputError(f"{self.path}: a run is here already; choose another run.name, or say run.resume=auto or run.resume=overwrite")
        else:
            check_same_recipe(self.path, completed(self.recipe()), recipe)
            opening = self._reopen()
        if opening.state != "finished":
            self.write_recipe(to_yaml(recipe))
        return opening

    def _reopen(self) -> Opening:
        checkpoints = self.checkpoints()
        last = checkpoints[-1] if checkpoints else None
        status = self.status
        if status is not None and status.state == "finished":
            return Opening("finished", last.step if last else status.step, last.path if last else None)
        self.metrics.truncate_after(last.step if last else -1)
        return Opening("resumed", last.step if last else 0, last.path if last else None)

    def _check_empty(self) -> None:
        others = sorted(one.name for one in self.path.iterdir() if one.name != ".lock" and parse_temporary(one.name) is None)
        if others:
            shown = ", ".join(others[:5]) + (", …" if len(others) > 5 else "")
            raise InputError(
                f"{self.path}: this folder is not empty and holds no run (there are {shown}); choose another run.name or run.root"
            )

    def _delete_run(self) -> None:
        """Delete what a run writes, but for the recipe, and nothing else. The status goes first, the checkpoints before the metrics:
        killed in between, it is still a run that was never finished, and whichever checkpoints are left agree with its metrics."""
        if not (self.path / "recipe.yaml").read_bytes().startswith(_HEADER.encode()):
            raise InputError(f"{self.path}: recipe.yaml there was not written by a run, so nothing is deleted; choose another run.name")
        (self.path / "status.json").unlink(missing_ok=True)
        for path in self.path.glob("checkpoint-*"):
            if _CHECKPOINT.fullmatch(path.name):
                remove_folder(path)
        for name in _OWN_FOLDERS:
            if (self.path / name).exists():
                remove_folder(self.path / name)
        for folder in (self.path, *(one for one in self.path.iterdir() if one.is_dir() and not one.is_symlink())):
            results = [path for pattern in _RESULTS for path in folder.glob(pattern)]
            for path in results:
                path.unlink()
            if folder != self.path and results and not any(folder.iterdir()):
                folder.rmdir()
        for path in (*(self.path / name for name in _OWN_FILES), *self.path.glob(STALLED)):
            path.unlink(missing_ok=True)
        left = sorted(one.name for one in self.path.iterdir() if one.name not in (".lock", "recipe.yaml"))
        if left:
            _LOG.warning("%s: left alone, because no run wrote it: %s", self.path, ", ".join(left))

    def sweep(self) -> None:
        """Delete what dead writers left half done, here and in the folders of question sets."""
        for folder in (self.path, *(one for one in self.path.iterdir() if one.is_dir() and _SET_NAME.fullmatch(one.name))):
            if folder.name not in _OWN_FOLDERS and not _CHECKPOINT.fullmatch(folder.name):
                for line in sweep(folder):
                    _LOG.info("%s: %s", folder, line)

    # --- recipe, environment, status

    def write_recipe(self, text: str) -> None:
        """Write the resolved recipe; with it the folder becomes a run folder."""
        write_atomically(self.path / "recipe.yaml", text if text.startswith(_HEADER) else _HEADER + text)

    def recipe(self) -> dict[str, Any]:
        """The resolved recipe as plain values."""
        return read_recipe(self.path / "recipe.yaml")

    def write_environment(self, environment: Mapping[str, Any] | None = None, from_step: int = 0) -> None:
        """Write what the run runs on. At a resume the former environments stay below `earlier`, and a change of software is told."""
        path = self.path / "environment.json"
        now = dict(describe_environment() if environment is None else environment)
        now["from_step"] = from_step
        if path.exists():
            before = read_json(path)
            earlier = before.pop("earlier", [])
            if from_step > 0:
                now["earlier"] = [*earlier, before]
                if not same_software(before, now):
                    _LOG.warning("%s: versions or source differ from those of the run's beginning; see environment.json", self.path)
        write_json(path, now)

    @property
    def status(self) -> Status | None:
        """What status.json says now, or None."""
        return read_status(self.path / "status.json")

    def set_status(self, state: State, step: int | None = None, of: int | None = None, message: str = "") -> None:
        """Write a state at once; `step` and `of` keep their last values where they are not given."""
        self._status.set(state, step, of, message)

    def heartbeat(self, step: int | None = None, state: State | None = None) -> None:
        """Say that the run lives; cheap enough for every step."""
        self._status.heartbeat(step, state)

    @property
    def reading(self) -> Reading | None:
        """What reading.json says now, or None."""
        return read_reading(self.path / READING)

    def reading_file(self, told: Callable[[Reading], None] = lambda one: None) -> ReadingFile:
        """The writer of reading.json, for who asks the questions of an evaluation."""
        return ReadingFile(self.path / READING, told)

    # --- checkpoints and results

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.path / f"checkpoint-{step}"

    def checkpoints(self) -> list[Checkpoint]:
        """The complete checkpoints by ascending step; a damaged one is told and left out."""
        found = []
        for path in self.path.glob("checkpoint-*"):
            name = _CHECKPOINT.fullmatch(path.name)
            if name and is_complete(path):
                found.append(Checkpoint(int(name[1]), path))
            elif name:
                _LOG.warning("%s: this checkpoint is not complete (no marker, or a file is missing or cut); it is not used", path)
        return sorted(found, key=lambda one: one.step)

    # --- for folders whose truth lies elsewhere

    def bring(self, name: str) -> bool:
        """Have a file or a checkpoint of the run in this folder, if it is anywhere; false where it is not."""
        return (self.path / name).exists()

    def catch_up(self) -> None:
        """Have what a worker needs that does not write the folder; nothing to do where all have one folder."""

    def share(self) -> None:
        """Have the others see what was written by now, or raise; nothing to do where all have one folder."""

    def offer(self, name: str) -> None:
        """Have people see a file that was written just now; nothing to do where all have one folder."""

    @contextmanager
    def results(self, step: int) -> Iterator[Path]:
        """A folder to write the rows and summaries of a step's evaluation to; they are this run's when the block ends."""
        yield self.path

    @contextmanager
    def new_checkpoint(self, step: int) -> Iterator[Path]:
        """A folder to write a checkpoint to; committed when the block ends, together with all metrics up to it."""
        with new_folder(self.checkpoint_path(step)) as temporary:
            yield temporary
            self.metrics.sync()

    def prune(self, keep: int, protect: Collection[int] = ()) -> list[int]:
        """Delete all but the `keep` newest checkpoints and the steps in `protect`; returns the steps deleted."""
        gone = [one for one in self.checkpoints()[:-keep] if one.step not in protect]
        for one in gone:
            remove_folder(one.path)
        return [one.step for one in gone]


def step_of_checkpoint(name: str) -> int | None:
    """The step of a checkpoint by its folder's name; None for any other name."""
    found = _CHECKPOINT.fullmatch(name)
    return int(found[1]) if found else None


def result_paths(folder: Path, step: int, name: str | None = None) -> tuple[Path, Path]:
    """Rows and summary of an evaluation in a run folder; `name` for every question set but the primary one, which has a folder of its own.

    The summary is written after the rows, so it stands for a complete evaluation."""
    if name is not None:
        check_set_name(name)
    place = folder if name is None else folder / name
    return place / f"eval_step{step}.jsonl", place / f"eval_step{step}.summary.json"


def check_set_name(name: str) -> None:
    """Refuse the name of a question set that could not be a folder of results beside everything else in a run folder."""
    if not _SET_NAME.fullmatch(name) or name in _OWN_FOLDERS or _CHECKPOINT.fullmatch(name):
        raise DataError(
            f"question set '{name}': its results need a plain folder name (letters, digits, '.', '_', '+', '-') other than "
            f"{', '.join(_OWN_FOLDERS)} and checkpoint-*; give the set such a name in evaluation.sets"
        )

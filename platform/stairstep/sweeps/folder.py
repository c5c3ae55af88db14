"""The folder of a sweep: its plan, a record a trial, and the trials' ordinary run folders below it.

    <root>/<name>/sweep.json            what was asked for: recipe, space, seeds; written once
                  recipes/<trial>.yaml  a trial's resolved recipe, which python -m jobs.train runs alone as well
                  trials/<trial>.json   what became of a trial; written whole each time, by the sweep and then by the trial's own process
                  stop/<trial>          a trial is asked to stop, and why; stop/ALL asks all of them
                  runs/<trial>/         its run folder

In an object store there is also driver.json, by which others see whether somebody works on the sweep (sweeps/mirrored.py).

What a trial scored is read from its run folder and from nowhere else, so a board, a resumed sweep and a person see the same. Nothing
here needs Ray.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from stairstep.records import Claim, RunFolder, read_json, write_atomically, write_json
from stairstep.settings import DataError, InputError

TrialState = Literal["waiting", "running", "finished", "stopped", "failed"]
DONE: tuple[TrialState, ...] = ("finished", "stopped")
"""States of a trial that is not run again."""
ALL = "ALL"
PARTS = ("recipes", "trials", "stop", "runs")
_OWN = {*PARTS, "recipe.yaml", "sweep.json", "driver.json", "report.html", ".lock", ".ray"}
Value = str | int | float | bool | None


@dataclass(frozen=True)
class TrialRecord:
    """One point of a space with one seed. `stopped` means stopped early and for good, with the reason; a trial that a person or a limit
    interrupted is `waiting`, and goes on when the sweep does."""

    number: int
    name: str
    point: Mapping[str, Value]  # parameter as the space names it: its value; of a staircase {"step": its name}
    overrides: tuple[str, ...]  # what makes the recipe this trial's, the seed included
    seed: int
    state: TrialState = "waiting"
    reason: str = ""  # why it was stopped early, or the error that it failed with
    stopped_at: int | None = None
    seconds: float = 0.0  # for which its workers were held, over all attempts
    workers: int = 1
    judged: int = 0  # the last step whose score the scheduler has judged


@dataclass(frozen=True)
class StepOfStairs:
    """One step of a staircase, for the board: its name and what it adds to the one below."""

    name: str
    adds: str


@dataclass(frozen=True)
class SweepPlan:
    """sweep.json: all that a sweep is, besides what became of its trials."""

    name: str
    recipe_file: str
    space_file: str
    overrides: tuple[str, ...]  # from the command line, for every trial
    recipe: Mapping[str, Any]  # the resolved recipe without the space's changes, plain
    space: Mapping[str, Any]  # the space, plain
    seeds: tuple[int, ...]
    metrics: tuple[str, ...]  # what is optimised, the first is what the scheduler looks at; of the selection split, or validation/loss
    modes: tuple[Literal["max", "min"], ...]
    steps: tuple[StepOfStairs, ...] = ()  # of a staircase, lowest first; empty for any other space
    skipped: tuple[Mapping[str, Any], ...] = ()  # {"point": {...}, "reason": "..."} for combinations that a condition took out
    command: str = ""
    began: float = 0.0


class SweepFolder:
    """One sweep's folder; constructing it touches nothing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.runs = self.path / "runs"

    @classmethod
    def is_one(cls, path: str | Path) -> bool:
        """Whether a sweep lies there."""
        return (Path(path) / "sweep.json").is_file()

    @classmethod
    def open(cls, path: str | Path) -> SweepFolder:
        """An existing sweep, for reading."""
        if not cls.is_one(path):
            raise InputError(
                f"{path}: this is not a sweep (it has no sweep.json); expected the folder that jobs.sweep made, such as runs/<name>"
            )
        return cls(path)

    @property
    def plan(self) -> SweepPlan:
        """What was asked for."""
        path = self.path / "sweep.json"
        plain = _known(SweepPlan, read_json(path), path)
        plain |= {name: tuple(value) for name, value in plain.items() if isinstance(value, list)}
        plain["steps"] = tuple(StepOfStairs(**one) for one in plain.get("steps", ()))
        return SweepPlan(**plain)

    # --- where it lies, and whose it is

    @property
    def where(self) -> str:
        """What it is called in messages."""
        return str(self.path)

    @property
    def run_root(self) -> str:
        """The `run.root` of its trials."""
        return os.path.abspath(self.runs)

    @property
    def lost(self) -> str:
        """Why the sweep cannot be kept any longer; empty while it can."""
        return ""

    @contextmanager
    def beginning(self) -> Iterator[None]:
        """For the length of the block the new sweep is written."""
        self.make()
        yield

    @contextmanager
    def claim(self) -> Iterator[None]:
        """The right to work on it, refused while another process does."""
        try:
            claim = Claim(self.path)
        except InputError as error:
            raise self._refusal(error) from None
        with claim:
            yield

    def published(self, name: str) -> str:
        """Where a file lies for everybody that was written here when the sweep had ended."""
        return str(self.path / name)

    def _refusal(self, error: InputError) -> InputError:
        """A claim's refusal in words for a sweep; any other error as it is."""
        who, at_work, _ = str(error).partition(" is at work on this ")
        if not at_work:
            return error
        who = who.replace(str(self.path.resolve()), self.where)
        return InputError(f"{who} is at work on this sweep; wait for it, or stop it with Ctrl-C first")

    def check_free(self, there: Collection[str]) -> None:
        """Refuse to begin a sweep where something else lies; `there`: the names in its folder."""
        if not set(there) <= _OWN:
            raise InputError(f"{self.where}: something that is no sweep is here; choose another --name")

    def make(self) -> None:
        """Make the folder, or take one whose sweep never began a trial; anything else there is left as it is, and refused."""
        self.check_free([one.name for one in self.path.iterdir()] if self.path.is_dir() else [])
        if self.runs.is_dir() and any(self.runs.iterdir()):
            raise InputError(f"{self.where}: a sweep is here already; go on with it by --resume {self.where}, or choose another --name")
        (self.path / "sweep.json").unlink(missing_ok=True)
        for part in PARTS:
            (self.path / part).mkdir(parents=True, exist_ok=True)
            for left in (self.path / part).iterdir():
                left.unlink()

    def write_plan(self, plan: SweepPlan) -> None:
        """Write the plan, last of all that a sweep begins with."""
        write_json(self.path / "sweep.json", asdict(plan))

    def trials(self) -> list[TrialRecord]:
        """All trials that were planned or suggested, by number."""
        found = [self._record(path) for path in sorted((self.path / "trials").glob("*.json"))]
        return sorted(found, key=lambda one: one.number)

    def trial(self, name: str) -> TrialRecord:
        """One trial as it stands."""
        return self._record(self.path / "trials" / f"{name}.json")

    def write_trial(self, record: TrialRecord) -> None:
        """Write a trial's record whole."""
        write_json(self.path / "trials" / f"{record.name}.json", asdict(record))

    def run_path(self, name: str) -> Path:
        """Where a trial's run folder lies, begun or not."""
        return self.runs / name

    def recipe_path(self, name: str) -> Path:
        """Where a trial's resolved recipe lies."""
        return self.path / "recipes" / f"{name}.yaml"

    def run(self, name: str) -> RunFolder:
        """A trial's run folder."""
        return RunFolder(self.run_path(name))

    # --- asking trials to stop

    def ask_to_stop(self, name: str, reason: str) -> None:
        """Ask one trial, or ALL, to stop with a checkpoint; the first reason stands."""
        if not self.asked_to_stop(name):
            write_atomically(self.path / "stop" / name, reason)

    def asked_to_stop(self, name: str) -> str:
        """Why this trial alone was asked to stop; empty where it was not."""
        path = self.path / "stop" / name
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def let_go_on(self) -> None:
        """Forget that ALL were asked to stop; what one trial was asked stays."""
        (self.path / "stop" / ALL).unlink(missing_ok=True)

    def _record(self, path: Path) -> TrialRecord:
        plain = _known(TrialRecord, read_json(path), path)
        if plain["name"] != path.stem:  # it names files and folders, and may come from a store
            raise DataError(
                f"{path}: it is called {plain['name']!r} inside; expected {path.stem!r}. Put back what was there, or delete this one file"
            )
        return TrialRecord(**{**plain, "overrides": tuple(plain["overrides"])})


def _known(cls: type[SweepPlan] | type[TrialRecord], plain: Any, path: Path) -> dict[str, Any]:
    """The keys of a stored record that this version knows; those it must have are there."""
    names = {one.name for one in fields(cls)}
    needed = {one.name for one in fields(cls) if one.default is MISSING and one.default_factory is MISSING}
    if not isinstance(plain, dict) or needed - set(plain):
        raise DataError(
            f"{path}: this is no {cls.__name__} of a sweep; it was written by something else or by hand. Put back what was there, "
            "or delete this one file: run folders stay"
        )
    return {name: value for name, value in plain.items() if name in names}


def shown_point(point: Mapping[str, Value]) -> str:
    """A point as a person reads it: the last word of each parameter's key and its value."""
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in point.items())

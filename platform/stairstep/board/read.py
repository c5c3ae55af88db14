"""What runs and sweeps say of themselves: read from their folders, never computed again, and never changed.

A board is over a list of runs; a sweep adds its plan and what became of its trials. A file that cannot be read costs its own run what
it would have said, and is named: one damaged run hides no other. Rows are read when they are asked for, once a state of their file.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from stairstep.evaluation.evaluated import Evaluated, steps_evaluated
from stairstep.evaluation.peaks import score_of
from stairstep.evaluation.retrieval import ARTICLE_METRICS
from stairstep.evaluation.settings import EvaluationSettings
from stairstep.evaluation.statistics import Interval
from stairstep.records import MetricLog, RunFolder, Status, read_json, read_json_lines, result_paths, series
from stairstep.settings import DataError, InputError, StairstepError
from stairstep.sweeps import SweepFolder, SweepPlan, TrialRecord
from stairstep.sweeps.scores import LOSS

from .checks import Row, check_log, check_plan, check_recipe, check_rows, check_status, check_summary, check_trial

# What the board's comparisons need of a row: the rest (paths, further ranks) is many times that, and stays on the disk.
_KEPT = ("id", "problem", "answer", "golden_ids", *ARTICLE_METRICS.values(), "split", "state", "correct")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a run: its summary, and where its rows lie."""

    step: int
    set: str
    primary: bool
    summary: Mapping[str, Any]
    rows_path: Path

    def score(self, metric: str, part: str = "all") -> Interval | None:
        """A score with its interval over all questions or a part of them; None where there is none, as of QA below its coverage floor."""
        return score_of(self.summary, metric, part)

    @property
    def asked(self) -> bool:
        """Whether a reader was asked."""
        return "qa" in self.summary

    @property
    def coverage(self) -> float | None:
        """The share of questions that have a grade; None where no reader was asked."""
        return self.summary["qa"]["all"]["coverage"] if self.asked else None

    @property
    def floor(self) -> float:
        """Below this coverage there is no QA score."""
        return self.summary.get("qa", {}).get("all", {}).get("floor", EvaluationSettings().coverage_floor)

    @property
    def below_floor(self) -> bool:
        """Whether a reader was asked and too few questions have a grade for a score."""
        return self.asked and self.summary["qa"]["all"]["score"] is None


@dataclass(frozen=True)
class Run:
    """One run as its folder has it; `trial` where it is a sweep's, begun or not."""

    name: str
    path: Path
    status: Status | None
    recipe: Mapping[str, Any]
    log: Sequence[Row]
    evaluations: Sequence[Evaluation]  # of the primary question set, by ascending step
    others: Sequence[Evaluation]  # of further sets and of held-out pairs
    problems: Sequence[str]
    trial: TrialRecord | None = None

    @property
    def state(self) -> str:
        """What became of it: the trial's word where it is one, else the run's own; "lost" where that is "running" and nobody runs it."""
        lost = self.status is not None and self.status.lost()
        if self.trial is not None:
            return "lost" if lost and self.trial.state == "running" else self.trial.state
        if self.status is None:
            return "not begun"
        return "lost" if lost else self.status.state

    @property
    def reason(self) -> str:
        """Why it stopped early or failed; empty otherwise."""
        if self.trial is not None:
            return self.trial.reason
        return self.status.message if self.status is not None and self.state in ("failed", "stopped", "lost") else ""

    @property
    def seed(self) -> int | None:
        """The seed that it was trained with."""
        return self.trial.seed if self.trial is not None else self.said("run.seed")

    def said(self, key: str) -> Any:
        """A setting of its recipe, such as `optim.batch`; None where it is not there."""
        section, _, name = key.partition(".")
        return self.recipe.get(section, {}).get(name)

    @property
    def step(self) -> int:
        """The last step that it reached."""
        return max([self.status.step if self.status else 0, *(row["step"] for row in self.log[-1:])])

    @property
    def last(self) -> Evaluation | None:
        """The evaluation of the last step that has one."""
        return self.evaluations[-1] if self.evaluations else None

    def series(self, name: str) -> list[tuple[int, float]]:
        """A metric of the log as (step, value) pairs by ascending step."""
        return self._series.get(name, [])

    @cached_property
    def _series(self) -> dict[str, list[tuple[int, float]]]:
        names = Counter(name for row in self.log for name in row)
        numbers = [{name: value for name, value in row.items() if isinstance(value, int | float)} for row in self.log]
        return {name: series(numbers, name) for name in names if name not in ("step", "time")}


@dataclass(frozen=True)
class Board:
    """All that a board shows; `plan` where it is a sweep's. What the sweep's own files say too little of stands in `problems`."""

    title: str
    runs: Sequence[Run]
    plan: SweepPlan | None = None
    problems: Sequence[str] = ()

    @property
    def is_sweep(self) -> bool:
        """Whether it is over a sweep."""
        return self.plan is not None

    @property
    def metric(self) -> str:
        """The score of questions that is shown first: the space's first, else what the recipe picks its step by, else R@1."""
        wanted = [*(self.plan.metrics if self.plan else ()), *(run.said("evaluation.selection_metric") for run in self.runs)]
        return next((one for one in wanted if one in (*ARTICLE_METRICS, "qa")), "hit@1")

    @property
    def ranked_by(self) -> tuple[str, Literal["max", "min"]]:
        """What steps and runs are picked by: of a sweep its own first metric, maybe the validation loss, and whether more is better."""
        if self.plan is not None and self.plan.metrics[0] in (LOSS, self.metric):
            return self.plan.metrics[0], self.plan.modes[0]
        return self.metric, "max"


class Folders:
    """Reads folders into boards; what has not changed since it was last read is not read again."""

    def __init__(self, paths: Sequence[Path]) -> None:
        if not paths:
            raise InputError("a board needs a run folder or a sweep's folder, such as runs/<name>")
        self.paths = [Path(path) for path in paths]
        self.sweep = SweepFolder.open(self.paths[0]) if SweepFolder.is_one(self.paths[0]) else None
        if len(self.paths) > 1 and any(map(SweepFolder.is_one, self.paths)):
            raise InputError("a board is over one sweep or over runs; give the sweep alone, or its runs as runs/<sweep>/runs/<trial>")
        if self.sweep is None:
            for path in self.paths:
                _check_run(path)
        twice = [str(path) for path, count in Counter(path.resolve() for path in self.paths).items() if count > 1]
        if twice:
            raise InputError(f"{twice[0]}: named twice; name every run once")
        self._kept: dict[tuple[Path, str], tuple[tuple[int, int], Any]] = {}

    @property
    def target(self) -> Path:
        """Where the board goes unless it is told: into the one folder, or beside several runs, into the first one's parent."""
        return (self.paths[0] if len(self.paths) == 1 else self.paths[0].resolve().parent) / "report.html"

    def read(self) -> Board:
        """The board as the folders are now."""
        if (sweep := self.sweep) is not None:
            problems: list[str] = []
            plan = _tried(partial(_plan_of, sweep), problems) or _bare_plan(sweep)
            files = sorted((sweep.path / "trials").glob("*.json"))
            trials = [one for path in files if (one := _tried(partial(_trial_of, sweep, path), problems)) is not None]
            runs = [self._run(sweep.run_path(one.name), one.name, one) for one in sorted(trials, key=lambda one: one.number)]
            return Board(plan.name, runs, plan, problems)
        names = _names(self.paths)
        return Board(
            " · ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else ""), list(map(self._run, self.paths, names))
        )

    def rows(self, evaluation: Evaluation) -> list[Row]:
        """The rows of an evaluation, whole; not kept."""
        path = evaluation.rows_path
        try:
            return check_rows(read_json_lines(path), path)
        except OSError as error:
            raise DataError(f"{path}: this cannot be read: {error.strerror}; evaluate that step again") from None

    def of_rows(self, evaluation: Evaluation, what: str, made: Callable[[Sequence[Row]], Made]) -> Made:
        """What is made of an evaluation's rows, kept under a name until they change."""
        found: Made = self._once(evaluation.rows_path, lambda _: made(self.rows(evaluation)), what)
        return found

    def evaluated(self, evaluation: Evaluation) -> Evaluated:
        """An evaluation as comparisons take it: with what they need of its rows."""
        shown = evaluation.summary.get("top_k_read")
        rows = self.of_rows(evaluation, "lean", lambda rows: [_lean(row, shown or 0) for row in rows])
        return Evaluated(rows, evaluation.step, shown, evaluation.floor)

    def stamp(self) -> str:
        """Changes when a board read now would show something else."""
        roots = list(self.paths) if self.sweep is None else [self.sweep.path, *sorted(self.sweep.runs.glob("*"))]
        patterns = ("sweep.json", "trials/*.json", "metrics.jsonl", "eval_step*.summary.json", "*/eval_step*.summary.json")
        files = [path for root in roots for pattern in patterns for path in sorted(root.glob(pattern))]
        states = [self._quiet(root / "status.json") for root in roots]
        return str(hash((tuple((str(path), *_state(path)) for path in files), tuple(states))))

    def _quiet(self, path: Path) -> Any:
        """A run's state without its heartbeat, which changes every few seconds and says nothing but that the run is not lost."""
        status = _tried(lambda: check_status(RunFolder(path.parent).status, path), [])
        return (status.state, status.message, status.lost()) if status is not None else None

    def _run(self, path: Path, name: str, trial: TrialRecord | None = None) -> Run:
        folder, problems = RunFolder(path), list[str]()

        def tried(read: Callable[[], Made]) -> Made | None:
            return _tried(read, problems)

        status = tried(lambda: check_status(folder.status, path / "status.json"))
        recipe = (
            tried(lambda: self._once(path / "recipe.yaml", lambda file: check_recipe(folder.recipe(), file))) if folder.holds_run() else {}
        )
        log = tried(lambda: self._once(path / "metrics.jsonl", _log_of))
        mine = [one for step in steps_evaluated(path) if (one := tried(partial(self._evaluation, path, step, None)))]
        places = sorted({one.parent.name for one in path.glob("*/eval_step*.summary.json")}) if path.is_dir() else []
        others = [
            one for place in places for step in steps_evaluated(path, place) if (one := tried(partial(self._evaluation, path, step, place)))
        ]
        return Run(name, path, status, recipe or {}, log or [], mine, others, problems, trial)

    def _evaluation(self, path: Path, step: int, name: str | None) -> Evaluation:
        rows, summary_path = result_paths(path, step, name)
        summary = self._once(summary_path, lambda file: check_summary(read_json(file), file))
        return Evaluation(step, summary.get("name") or name or "questions", name is None, summary, rows)

    def _once(self, path: Path, read: Callable[[Path], Any], what: str = "") -> Any:
        if not path.exists():
            return read(path)
        state = _state(path)
        kept = self._kept.get((path, what))
        if kept is None or kept[0] != state:
            kept = self._kept[path, what] = (state, read(path))
        return kept[1]


def check_place(option: str, path: Path) -> None:
    """Refuse a place where no file could be written, before anything is made for it."""
    if os.path.isdir(path):
        raise InputError(f"{option}: {path} is a folder; expected a file, such as {path / 'report.html'}")
    if not os.path.isdir(path.parent):
        raise InputError(f"{option}: there is no folder {path.parent}; make it, or choose another place")


def _check_run(path: Path) -> None:
    if path.is_dir() and not RunFolder(path).holds_run():
        inside = " or a sweep's folder (with sweep.json)"
        raise InputError(f"{path}: this is neither a run folder (with recipe.yaml){inside}; expected such as runs/<name>")
    if not path.is_dir():
        raise InputError(f"{path}: there is no such folder; expected a run folder or a sweep's folder, such as runs/<name>")


def _names(paths: Sequence[Path]) -> list[str]:
    """Folder names, with as much of what is above as tells them apart."""
    resolved = [path.resolve() for path in paths]
    depth = 1
    while len({one.parts[-depth:] for one in resolved}) < len(resolved):
        depth += 1
    return ["/".join(one.parts[-depth:]) for one in resolved]


def _state(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return (0, 0)
    return (found.st_mtime_ns, found.st_size)


def _log_of(path: Path) -> Sequence[Row]:
    try:
        rows = MetricLog(path).rows()
    except (TypeError, AttributeError, ValueError):  # a line that is no object, or names its non-finite numbers otherwise
        raise DataError(f"{path}: a line that is no event; this is no log of a run's metrics") from None
    return check_log(rows, path)


def _tried(read: Callable[[], Made], problems: list[str]) -> Made | None:
    """What is read; None where it cannot be, and then why."""
    try:
        return read()
    except StairstepError as error:
        problems.append(str(error))
    except OSError as error:
        problems.append(f"{error.filename}: this cannot be read: {error.strerror}")
    return None


def _plan_of(sweep: SweepFolder) -> SweepPlan:
    path = sweep.path / "sweep.json"
    try:
        return check_plan(sweep.plan, path)
    except (TypeError, AttributeError):
        raise DataError(f"{path}: this is not the plan of a sweep; put back what the sweep wrote there") from None


def _bare_plan(sweep: SweepFolder) -> SweepPlan:
    """A plan in place of one that cannot be read: it has no steps and skipped nothing."""
    return SweepPlan(sweep.path.resolve().name, "", "", (), {}, {}, (), ("hit@1",), ("max",))


def _trial_of(sweep: SweepFolder, path: Path) -> TrialRecord:
    try:
        return check_trial(sweep.trial(path.stem), path)
    except (TypeError, AttributeError):
        raise DataError(f"{path}: this is not the record of a trial; put back what the sweep wrote there") from None


def _lean(row: Row, shown: int) -> Row:
    kept = {key: row[key] for key in _KEPT if key in row}
    kept["retrieved"] = [{"article": one["article"]} for one in row["retrieved"][:shown]]
    return kept

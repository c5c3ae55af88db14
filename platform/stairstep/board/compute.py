"""What follows from what runs say: the staircase, paired comparisons, calls made and saved, hours, where the time went.

Everything that is compared goes through `evaluation.comparison`, over the same questions and corrected as one family; nothing here has
a verdict of its own. A trial that was stopped, failed or is still running stands on no step of the staircase, and a note says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from stairstep.evaluation.comparison import Compared, Comparison, check_same_questions, compare_family, own_score
from stairstep.evaluation.evaluated import Evaluated, Side
from stairstep.evaluation.retrieval import ARTICLE_METRICS
from stairstep.evaluation.statistics import Interval
from stairstep.settings import DataError, InputError
from stairstep.sweeps import shown_point
from stairstep.sweeps.scores import LOSS

from .checks import is_number
from .read import Board, Evaluation, Folders, Run

BASE = "base"
_MOST_PAIRS = 8  # of runs that are compared unasked; any two may be compared on the page
_COLUMN = {"qa": "correct"}


@dataclass(frozen=True)
class Stair:
    """One step: its score over its finished seeds with the interval, each seed's own score, and the comparison with the step below."""

    name: str
    adds: str
    score: Interval | None
    seeds: Sequence[tuple[int | None, float]]
    compared: Comparison | None = None


@dataclass(frozen=True)
class Staircase:
    """The steps by one metric, lowest first; `whole` compares the last with the first. What is not shown stands in `notes`."""

    metric: str
    stairs: Sequence[Stair]
    whole: Comparison | None
    notes: Sequence[str]

    @property
    def seeds(self) -> int:
        """The fewest seeds behind a step that was trained."""
        return min((len(one.seeds) for one in self.stairs if one.name != BASE), default=0)


@dataclass(frozen=True)
class Findings:
    """All that was compared in one go, and the staircases that it makes, one a metric."""

    compared: Sequence[Compared] = ()
    staircases: Sequence[Staircase] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Picked:
    """A run's best step by what its board ranks by, and the value there: on the selection split, or of the validation loss. `evaluation`
    is that step's; None where the loss was measured and nothing evaluated."""

    step: int
    value: float
    evaluation: Evaluation | None

    def score(self, metric: str, part: str) -> Interval | None:
        """A score of the picked step; None where it was not evaluated."""
        return self.evaluation.score(metric, part) if self.evaluation is not None else None


@dataclass(frozen=True)
class Calls:
    """Calls of one kind over all runs and evaluations: asked of the model, and found in the ledger instead (`waited`: among these, for
    somebody who was just asking the same)."""

    kind: str
    models: Sequence[str]
    asked: int = 0
    saved: int = 0
    waited: int = 0
    cost: float | None = None
    unpriced: int = 0  # evaluations whose cost is not known

    @property
    def share(self) -> float:
        """The share of calls that were saved."""
        return self.saved / (self.asked + self.saved) if self.asked + self.saved else 0.0


@dataclass
class _Counted:
    models: set[str] = field(default_factory=set)
    asked: int = 0
    saved: int = 0
    waited: int = 0
    cost: float | None = None
    unpriced: int = 0


def find(board: Board, folders: Folders) -> Findings:
    """The comparisons that a board makes unasked: up a staircase; else of several runs with the first, or of a run's end with its start."""
    if board.plan is not None and board.plan.steps:
        return _climb(board, folders)
    sides, notes = _sides(board, folders)
    pairs = [(sides[0], one) for one in sides[1:]]
    found, told = _compared(pairs, board.metric)
    return Findings(found, (), (*notes, *told))


def picked(board: Board, run: Run) -> Picked | None:
    """The run's best step after step 0, the earliest of equals, by what the board ranks by: as the sweep itself ranks its trials."""
    metric, mode = board.ranked_by
    evaluated = {one.step: one for one in run.evaluations}
    if metric == LOSS:
        values = {step: value for step, value in run.series(LOSS) if step and is_number(value)}
    else:
        values = {step: found.value for step, one in evaluated.items() if step and (found := one.score(metric, "selection")) is not None}
    if not values:
        return None
    step = (max if mode == "max" else min)(sorted(values), key=lambda one: values[one])
    return Picked(step, values[step], evaluated.get(step))


def parameters(board: Board) -> dict[str, str]:
    """The parameters of a sweep's trials, each with the end of its key that tells it from the others."""
    keys = list(dict.fromkeys(key for run in board.runs if run.trial for key in run.trial.point))
    ends = {key: [".".join(key.split(".")[-depth:]) for depth in range(1, key.count(".") + 2)] for key in keys}
    taken = Counter(["seed", *(end for several in ends.values() for end in several)])  # the seed has its own place beside them
    return {key: next((end for end in several if taken[end] == 1), key) for key, several in ends.items()}


def calls(board: Board) -> list[Calls]:
    """Calls made and saved, by kind; an evaluation that several runs share, by a link, counts once."""
    seen: set[Any] = set()
    counted: dict[str, _Counted] = {}
    for run in board.runs:
        for one in (*run.evaluations, *run.others):
            place = one.rows_path.resolve()
            if place in seen:
                continue
            seen.add(place)
            for kind, made in one.summary.get("calls", {}).items():
                into = counted.setdefault(kind, _Counted())
                into.models.add(str(made.get("model", "")))
                into.asked += made.get("asked", 0)
                into.saved += made.get("hits", 0)
                into.waited += made.get("waited", 0)
                if made.get("cost") is not None:
                    into.cost = (into.cost or 0.0) + made["cost"]
                elif made.get("asked") and "unpriced" in made:
                    into.unpriced += 1
    return [
        Calls(kind, sorted(one.models - {""}), one.asked, one.saved, one.waited, one.cost, one.unpriced)
        for kind, one in counted.items()
        if one.asked + one.saved
    ]


def cost(run: Run) -> float | None:
    """What a run's answers and grades cost; None where no price was known."""
    known = [
        made["cost"]
        for one in (*run.evaluations, *run.others)
        for made in one.summary.get("calls", {}).values()
        if made.get("cost") is not None
    ]
    return sum(known) if known else None


def hours(run: Run) -> float:
    """Hours of devices: of a trial as long as its workers were held, of any other run as long as its steps and evaluations took."""
    if run.trial is not None:
        return run.trial.seconds * run.trial.workers / 3600
    return sum(where_time_went(run).values()) * max(1, run.said("cluster.workers") or 1) / 3600


def where_time_went(run: Run) -> dict[str, float]:
    """Seconds by part, as far as they were measured; checkpoints, validation and starting are not."""
    waits = sum(value for _, value in run.series("time/wait_seconds"))
    spent = {"training steps": sum(value for _, value in run.series("time/step_seconds")) - waits, "waiting for tiles": waits}
    parts = {
        "embedding": ("embed_s",),
        "search and statistics": ("search_s", "statistics_s"),
        "answers": ("read_s", "answer_s"),
        "grades": ("grade_s",),
    }
    for name, keys in parts.items():
        spent[name] = sum(one.summary.get("timings", {}).get(key, 0.0) for one in (*run.evaluations, *run.others) for key in keys)
    return {name: seconds for name, seconds in spent.items() if seconds > 0}


def group(run: Run) -> str:
    """What a run's seeds have in common: a trial's point, of a staircase its step; else the run's own name."""
    if run.trial is None:
        return run.name
    point = run.trial.point
    return str(point["step"]) if list(point) == ["step"] else shown_point(point)


def label(run: Run) -> str:
    """A run as figures and lists name it: a trial by its point and seed."""
    return run.name if run.trial is None else f"{group(run)}, seed {run.trial.seed}"


def _climb(board: Board, folders: Folders) -> Findings:
    """Every step of the stairs with the one right below it, the first with the base before any training, and the last with the first.
    Above a step without a finished seed there is nothing to compare with: a change over two steps is not the upper one's."""
    assert board.plan is not None
    metric = board.metric if board.metric in ARTICLE_METRICS else "hit@1"
    adds = {step.name: step.adds for step in board.plan.steps}
    taken: dict[str, list[tuple[int | None, Evaluation]]] = {}
    sides: dict[str, Side] = {}
    notes: list[str] = []
    stairs = list(adds)
    for name in stairs:
        trials = [run for run in board.runs if run.trial is not None and run.trial.point.get("step") == name]
        stands, untold = _readable([run for run in trials if run.state == "finished" and run.last is not None and run.last.step], folders)
        notes += untold
        if len(stands) < len(trials):
            others = ", ".join(
                f"seed {run.seed} {'without an evaluation' if run.state == 'finished' else run.state}"
                for run in trials
                if run not in stands
            )
            notes.append(f"{name}: {len(stands)} of {len(trials)} seeds are finished ({others}); only these stand on the step")
        if not stands:
            continue
        if not taken and (first := stands[0].evaluations[0]).step == 0:
            below = BASE if BASE not in adds else "step 0"
            adds[below] = "before any training"
            taken[below], sides[below] = [(None, first)], Side(below, [folders.evaluated(first)])
        taken[name] = [(run.seed, run.last) for run in stands if run.last is not None]
        sides[name] = Side(name, [folders.evaluated(one) for _, one in taken[name]])
    if any(len(several) == 1 and several[0][1].step for several in taken.values()):
        notes.append("1 seed on a step: what it shows holds for that run, not for its recipe")
    if board.ranked_by[0] == LOSS:
        notes.append(
            f"this sweep is after the validation loss ({board.ranked_by[1]}), which has no questions to pair; steps are compared by R@1"
        )
    names = list(sides)
    chain = [*(name for name in names if name not in stairs), *stairs]
    neighbours = [pair for pair in pairwise(chain) if set(pair) <= set(names)]
    notes += [
        f"{upper}: not compared with a step below, because {lower} has no finished seed"
        for lower, upper in pairwise(chain)
        if upper in names[1:] and lower not in names
    ]
    whole = [(names[0], names[-1])] if len(names) > 1 and (names[0], names[-1]) not in neighbours else []
    compared, told = _compared([(sides[first], sides[second]) for first, second in (*neighbours, *whole)], metric)
    metrics = [metric, *(["qa"] if any(one.asked for several in taken.values() for _, one in several) else [])]
    wanted = sorted(metrics, key=lambda name: name != board.metric)  # what the sweep is after stands first
    found = [_staircase(name, taken, adds, sides, {(one.first, one.second): one for one in compared}, neighbours) for name in wanted]
    return Findings(compared, found, [*notes, *told])


def _readable(runs: Sequence[Run], folders: Folders) -> tuple[list[Run], list[str]]:
    """The runs whose rows can be read, and what is the matter with the others."""
    found, notes = [], []
    for run in runs:
        try:
            for one in {run.evaluations[0].step: run.evaluations[0], run.evaluations[-1].step: run.evaluations[-1]}.values():
                folders.evaluated(one)
            found.append(run)
        except (DataError, InputError) as error:
            notes.append(str(error))
    return found, notes


def _staircase(
    metric: str,
    taken: dict[str, list[tuple[int | None, Evaluation]]],
    adds: dict[str, str],
    sides: dict[str, Side],
    compared: Mapping[tuple[str, str], Compared],
    neighbours: Sequence[tuple[str, str]],
) -> Staircase:
    names = list(sides)
    below = {upper: compared.get((lower, upper)) for lower, upper in neighbours}
    stairs, notes = [], []
    for name, several in taken.items():
        scored = [place for place, (_, one) in enumerate(several) if one.score(metric) is not None]
        if len(scored) < len(several):
            notes.append(f"{name}: {len(several) - len(scored)} of {len(several)} runs have no {'QA score' if metric == 'qa' else metric}")
        values = _values([sides[name].runs[place] for place in scored], metric)
        if scored and not values[0]:
            notes.append(f"{name}: no question has a grade from every seed, so there is no score of the step")
        points = [(several[place][0], sum(row) / len(row)) for place, row in zip(scored, values, strict=True) if row]
        score = own_score(values) if len(points) == len(several) and points else None
        stairs.append(Stair(name, adds.get(name, ""), score, points, _of_metric(below.get(name), metric)))
    return Staircase(metric, stairs, _of_metric(compared.get((names[0], names[-1])), metric) if names else None, notes)


def _values(runs: Sequence[Evaluated], metric: str) -> list[list[float]]:
    """A step's values, a row a seed, over the same questions for all of them: those for which every seed has one."""
    key = _COLUMN.get(metric) or ARTICLE_METRICS[metric]
    found = [{str(row["id"]): float(row[key]) for row in run.rows if key in row} for run in runs]
    shared = sorted(set.intersection(*map(set, found))) if found else []
    return [[one[name] for name in shared] for one in found]


def _of_metric(compared: Compared | None, metric: str) -> Comparison | None:
    return next((one for one in compared.comparisons if one.metric == metric), None) if compared else None


def _sides(board: Board, folders: Folders) -> tuple[list[Side], list[str]]:
    """What is compared without a staircase: each run's last evaluation; of one run, its first and its last. Nothing of a sweep: which of
    many points is better is a choice, and what was chosen is reported on the other questions, in the table of trials."""
    if board.is_sweep:
        return [], []
    runs, notes = _readable([run for run in board.runs if run.last is not None], folders)
    if len(board.runs) == 1 and runs:
        first, *_, last = [runs[0].evaluations[0], *runs[0].evaluations]
        ends = {one.step: one for one in (first, last)}
        return [Side(f"step {step}", [folders.evaluated(one)]) for step, one in ends.items()], notes
    if len(runs) > _MOST_PAIRS + 1:
        notes.append(f"{_MOST_PAIRS} of {len(runs) - 1} runs are compared with the first; any two may be compared on the page")
    return [Side(run.name, [folders.evaluated(run.last)]) for run in runs[: _MOST_PAIRS + 1] if run.last is not None], notes


def _compared(pairs: Sequence[tuple[Side, Side]], metric: str) -> tuple[list[Compared], list[str]]:
    """All pairs as one family; a pair over other questions is left out and told."""
    wanted = [metric] if metric in ARTICLE_METRICS else ["hit@1"]
    fit, notes = [], []
    for pair in pairs:
        try:
            check_same_questions([*pair[0].runs, *pair[1].runs])
            fit.append(pair)
        except (InputError, DataError) as error:
            notes.append(f"{pair[0].name} and {pair[1].name}: not compared: {error}")
    return compare_family(fit, wanted) if fit else [], notes

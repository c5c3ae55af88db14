"""Two sides over the same questions, compared question by question: the only comparison that a board may show.

A side is one evaluation, or one a seed. Of rights and wrongs (R@k, QA) of one run on either side the p-value is exact McNemar's over the
questions that both have graded; of MRR, and wherever a side has several seeds, it is the paired bootstrap's. The interval is always the
paired bootstrap's. The verdict goes by the p-value alone, which is corrected (Holm) for everything that was compared in one go; so an
interval, which is corrected for nothing, may leave zero out where the verdict is "no difference shown", and then the verdict holds.
One trained run on a side says nothing of other seeds, and the verdict says that.

The QA score is compared only where every run's coverage reaches its floor, and is left out with a reason otherwise. It is compared over
all questions, and then over two parts that tell reader and retriever apart: the questions for which every run of both sides was shown a
golden tile, and the others. Both sides have the same questions in either part, so the two differences, each by its share of the
questions, add up to the whole. In the first part retrieval did its work on both sides: a difference is in the reading of what was shown.
In the others some run lacked the golden tile: a difference is what retrieval won or lost (questions that nobody found are there too;
they thin it out and push it nowhere). Parts by each run's own retrieval would be other questions on each side: a better retriever
brings its reader harder ones, and the reader would look worse for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from stairstep.settings import InputError

from .evaluated import Evaluated, Row, Side
from .question_set import golden_shown
from .questions_answered import GRADED
from .retrieval import ARTICLE_METRICS
from .statistics import Difference, Interval, bootstrap, holm, paired_difference, wilson
from .table import metric_label, short

METRICS = ("hit@1", "hit@3", "mrr")
LEVEL = 0.05
_CONTENT = ("problem", "answer", "golden_ids")
_QA_PARTS = {"qa": "QA", "qa_shown": "  golden tile shown to both", "qa_others": "  the other questions"}
_ONE_SEED = "1 seed a side: the verdicts hold for these two runs, not for their recipes"


@dataclass(frozen=True)
class Comparison:
    """One metric on both sides, and their paired difference; `p_value` is corrected for the family it was compared in."""

    metric: str
    first: Interval
    second: Interval
    difference: Difference
    p_value: float

    @property
    def verdict(self) -> str:
        """What may be said of the difference at 95 %."""
        if self.p_value >= LEVEL:
            return "no difference shown"
        return "better" if self.difference.value > 0 else "worse"


@dataclass(frozen=True)
class Compared:
    """Two sides compared: metric by metric, what was left out and why, and what a verdict here does not say."""

    first: str
    second: str
    comparisons: tuple[Comparison, ...]
    left_out: tuple[str, ...]
    caveat: str
    family: int  # comparisons that the p-values are corrected for


def compare(first: Side, second: Side, metrics: Sequence[str] = METRICS) -> Compared:
    """Compare two sides; their questions must be the same, whatever their order."""
    return compare_family([(first, second)], metrics)[0]


def compare_family(pairs: Sequence[tuple[Side, Side]], metrics: Sequence[str] = METRICS) -> list[Compared]:
    """Compare pairs of sides that are looked at together, with p-values corrected for all metrics of all of them."""
    found = [_compare(first, second, metrics) for first, second in pairs]
    p_values = holm([one.difference.p_value for pair in found for one in pair.comparisons])
    corrected = iter(p_values)
    return [
        replace(
            pair,
            comparisons=tuple(replace(one, p_value=next(corrected)) for one in pair.comparisons),
            family=len(p_values),
        )
        for pair in found
    ]


def check_same_questions(runs: Iterable[Evaluated]) -> None:
    """Refuse evaluations that are not over the same questions, by their ids, texts and golden answers."""
    expected, *others = [{str(row["id"]): [row.get(key) for key in _CONTENT] for row in run.rows} for run in runs]
    for asked in others:
        if asked != expected:
            unlike = next(name for name in (*expected, *asked) if expected.get(name) != asked.get(name))
            raise InputError(
                f"the evaluations are not over the same questions ({len(expected)} and {len(asked)} of them; they differ in question "
                f"'{unlike}'); compare evaluations of one question set"
            )


class _Both:
    """The rows of two sides, brought into one order."""

    def __init__(self, first: Side, second: Side) -> None:
        check_same_questions([*first.runs, *second.runs])
        self.sides = (first, second)
        self.ids = [str(row["id"]) for row in first.runs[0].rows]
        self.ordered = [[self._in_order(run) for run in side.runs] for side in self.sides]

    def _in_order(self, run: Evaluated) -> list[Row]:
        by_id = {str(row["id"]): row for row in run.rows}
        return [by_id[name] for name in self.ids]

    def runs(self) -> Iterable[tuple[str, Evaluated, list[Row]]]:
        """Every run of both sides: its side's name, itself, its rows in order."""
        for side, ordered in zip(self.sides, self.ordered, strict=True):
            for run, rows in zip(side.runs, ordered, strict=True):
                yield side.name, run, rows

    def where(self, holds: Callable[[Evaluated, Row], bool]) -> list[int]:
        """The questions for which something holds in every run."""
        return [place for place in range(len(self.ids)) if all(holds(run, rows[place]) for _, run, rows in self.runs())]

    def comparison(self, metric: str, key: str, places: Sequence[int]) -> Comparison:
        """One metric over some of the questions, its p-value not corrected yet."""
        first, second = ([[float(rows[place][key]) for place in places] for rows in side] for side in self.ordered)
        difference = paired_difference(first, second)
        return Comparison(metric, own_score(first), own_score(second), difference, difference.p_value)


def _compare(first: Side, second: Side, metrics: Sequence[str]) -> Compared:
    both = _Both(first, second)
    everywhere = range(len(both.ids))
    found = [both.comparison(name, ARTICLE_METRICS[name], everywhere) for name in metrics]
    scored, left_out = _answers(both)
    single = [side.name for side in both.sides if len(side.runs) == 1 and side.runs[0].step > 0]
    caveat = ""
    if len(first.runs) == len(second.runs) == 1:
        caveat = _ONE_SEED
    elif single:
        caveat = f"1 seed of {single[0]}: the verdicts hold for that run of it, not for its recipe"
    return Compared(first.name, second.name, (*found, *scored), left_out, caveat, 0)


def _answers(both: _Both) -> tuple[list[Comparison], tuple[str, ...]]:
    """The QA score over all questions and over its two parts; and what of that cannot be compared, and why."""
    asked = [run.top_k_read is not None for _, run, _ in both.runs()]
    if not any(asked):
        return [], ()  # there is nothing to miss
    if not all(asked):
        unread = next(name for name, run, _ in both.runs() if run.top_k_read is None)
        return [], (f"QA: not compared: {unread} asked no reader",)
    everywhere = set(range(len(both.ids)))
    shown = set(both.where(lambda run, row: golden_shown(row, run.top_k_read or 0)))
    graded = set(both.where(lambda _, row: row.get("state") in GRADED))
    found: list[Comparison] = []
    left_out: list[str] = []
    for metric, places in {"qa": everywhere, "qa_shown": shown, "qa_others": everywhere - shown}.items():
        reason = _not_comparable(both, places, graded & places)
        if reason is None:
            found.append(both.comparison(metric, "correct", sorted(graded & places)))
        else:
            left_out.append(f"{comparison_label(metric).strip()}: not compared: {reason}")
        if not found:
            break  # where the whole is no score, its parts are none
    return found, tuple(left_out)


def _not_comparable(both: _Both, places: Collection[int], graded: Collection[int]) -> str | None:
    """Why the answers to some of the questions cannot be compared; None where they can."""
    if not places:
        return "there is no such question"
    for name, run, rows in both.runs():
        coverage = sum(rows[place].get("state") in GRADED for place in places) / len(places)
        if coverage < run.coverage_floor:
            return f"coverage of {name} is {coverage:.1%} of {len(places)} questions, below the floor of {run.coverage_floor:.1%}"
    return None if graded else f"none of {len(places)} questions has a grade from every run"


def own_score(runs: Sequence[Sequence[float]]) -> Interval:
    """A side's own score: Wilson's interval for one run of rights and wrongs, else the bootstrap over questions and seeds."""
    if len(runs) == 1 and set(runs[0]) <= {0.0, 1.0}:
        return wilson(int(sum(runs[0])), len(runs[0]))
    found = bootstrap(runs)
    return replace(found, low=max(0.0, found.low), high=min(1.0, found.high))  # the spread of few seeds may reach past what a score can be


def comparison_label(metric: str) -> str:
    """A compared metric as a table names it."""
    return _QA_PARTS.get(metric) or metric_label(metric)


def comparison_table(compared: Compared) -> str:
    """Aligned lines: both sides with intervals, the paired difference, the questions that rose and fell, their number, the seeds on
    either side, the corrected p-value and the verdict; below them what was left out, what few seeds allow to say, and the correction."""
    cells = [("", compared.first, compared.second, "difference", "up", "down", "n", "seeds", "p", "")]
    for one in compared.comparisons:
        seen = one.difference
        counts = (f"+{seen.rose}", f"-{seen.fell}", str(seen.n), f"{seen.seeds[0]}, {seen.seeds[1]}")
        p_value = "<.001" if one.p_value < 0.001 else short(one.p_value)
        cells.append((comparison_label(one.metric), _side(one.first), _side(one.second), _side(seen), *counts, p_value, one.verdict))
    widths = [max(len(cell[column]) for cell in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(cell, widths, strict=True)).rstrip() for cell in cells]
    return "\n".join(
        [
            *lines,
            *compared.left_out,
            *([compared.caveat] if compared.caveat else []),
            f"the verdict goes by p, corrected for {compared.family} comparisons (Holm); intervals are not corrected",
        ]
    )


def _side(one: Interval | Difference) -> str:
    return f"{short(one.value)} [{short(one.low)} {short(one.high)}]"

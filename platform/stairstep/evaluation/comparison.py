"""Two evaluations over the same questions, compared question by question: the only comparison that a board may show.

A difference inside its interval is called so in words; nobody has to know what to make of a p-value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stairstep.settings import InputError

from .questions_answered import GRADED
from .retrieval import ARTICLE_METRICS, scores_of
from .statistics import Difference, Interval, bootstraps, holm, paired_bootstrap, wilson
from .table import metric_label, short

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """One metric on both sides, and their paired difference; `p_value` is corrected for the number of metrics compared."""

    metric: str
    first: Interval
    second: Interval
    difference: Difference
    p_value: float

    @property
    def verdict(self) -> str:
        """What may be said of the difference at 95 %."""
        if self.p_value >= 0.05:
            return "no difference shown"
        return "better" if self.difference.value > 0 else "worse"


def compare_rows(first: Sequence[Row], second: Sequence[Row], metrics: Sequence[str] = ("hit@1", "hit@3", "mrr")) -> list[Comparison]:
    """Compare two evaluations; their questions must be the same, whatever their order. Where both were answered, the QA score is among
    the metrics, over the questions that both have a grade for: a failure of the reader is no wrong answer here either."""
    other = {row["id"]: row for row in second}
    if len(other) != len(first) or any(row["id"] not in other for row in first):
        raise InputError(
            f"the two evaluations are not over the same questions ({len(first)} and {len(second)} rows); compare evaluations of one set"
        )
    ordered = [other[row["id"]] for row in first]
    keys = {name: ARTICLE_METRICS[name] for name in metrics}
    before, after = scores_of(first, keys), scores_of(ordered, keys)
    found = {name: paired_bootstrap([float(row[key]) for row in first], [float(row[key]) for row in ordered]) for name, key in keys.items()}
    graded = [
        (bool(row["correct"]), bool(new["correct"])) for row, new in zip(first, ordered, strict=True) if _graded(row) and _graded(new)
    ]
    if graded:
        earlier, later = zip(*graded, strict=True)
        before["qa"], after["qa"] = wilson(sum(earlier), len(graded)), wilson(sum(later), len(graded))
        found["qa"] = paired_bootstrap(earlier, later)
    corrected = holm([one.p_value for one in found.values()])
    return [Comparison(name, before[name], after[name], found[name], p) for name, p in zip(found, corrected, strict=True)]


def _graded(row: Row) -> bool:
    return row.get("state") in GRADED


def compare_seeds(first: Sequence[Sequence[Row]], second: Sequence[Sequence[Row]], metrics: Sequence[str] = ("hit@1",)) -> list[Comparison]:
    """Compare two recipes, each by its runs with other seeds over the same questions: intervals over seeds and questions together."""
    runs = [_by_question(one) for one in (*first, *second)]
    ids = list(runs[0])
    if any(set(one) != set(ids) for one in runs):
        raise InputError("the runs are not over the same questions; compare evaluations of one set")
    sides = ([[run[name] for name in ids] for run in runs[: len(first)]], [[run[name] for name in ids] for run in runs[len(first) :]])
    columns = {name: [_matrix(side, ARTICLE_METRICS[name], range(len(ids))) for side in sides] for name in metrics}
    graded = [place for place in range(len(ids)) if all(_graded(run[place]) for side in sides for run in side)]
    if graded:
        columns["qa"] = [_matrix(side, "correct", graded) for side in sides]
    differences = {name: paired_bootstrap(a, b) for name, (a, b) in columns.items()}
    corrected = holm([one.p_value for one in differences.values()])
    intervals = {name: bootstraps(pair) for name, pair in columns.items()}
    return [
        Comparison(name, intervals[name][0], intervals[name][1], differences[name], p) for name, p in zip(columns, corrected, strict=True)
    ]


def _by_question(rows: Sequence[Row]) -> dict[str, Row]:
    return {str(row["id"]): row for row in rows}


def _matrix(runs: Sequence[Sequence[Row]], key: str, places: Sequence[int]) -> list[list[float]]:
    return [[float(run[place][key]) for place in places] for run in runs]


def comparison_table(comparisons: Sequence[Comparison], first: str, second: str) -> str:
    """Aligned lines: both sides with intervals, the paired difference with its interval, and the verdict."""
    header = ("", first, second, "difference", "")
    cells = [header] + [
        (metric_label(one.metric), _side(one.first), _side(one.second), _side(one.difference), one.verdict) for one in comparisons
    ]
    widths = [max(len(cell[column]) for cell in cells) for column in range(len(header))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(cell, widths, strict=True)).rstrip() for cell in cells)


def _side(one: Interval | Difference) -> str:
    return f"{short(one.value)} [{short(one.low)} {short(one.high)}]"

"""Two evaluations over the same questions, compared question by question: the only comparison that a board may show.

A difference inside its interval is called so in words; nobody has to know what to make of a p-value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stairstep.settings import InputError

from .retrieval import ARTICLE_METRICS, scores_of
from .statistics import Difference, Interval, holm, paired_bootstrap
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
    """Compare two evaluations; their questions must be the same, whatever their order."""
    other = {row["id"]: row for row in second}
    if len(other) != len(first) or any(row["id"] not in other for row in first):
        raise InputError(
            f"the two evaluations are not over the same questions ({len(first)} and {len(second)} rows); compare evaluations of one set"
        )
    ordered = [other[row["id"]] for row in first]
    keys = {name: ARTICLE_METRICS[name] for name in metrics}
    before, after = scores_of(first, keys), scores_of(ordered, keys)
    found = {name: paired_bootstrap([float(row[key]) for row in first], [float(row[key]) for row in ordered]) for name, key in keys.items()}
    corrected = holm([one.p_value for one in found.values()])
    return [Comparison(name, before[name], after[name], found[name], p) for name, p in zip(found, corrected, strict=True)]


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

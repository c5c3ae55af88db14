"""Which step of a run was best: picked on the selection split and reported on the other questions, with the plain peak beside it.

The plain peak is the highest of several noisy numbers and therefore too high; a step that was picked on other questions is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stairstep.records import read_json, result_paths

from .evaluated import steps_evaluated
from .statistics import Interval
from .table import metric_label, short


@dataclass(frozen=True)
class Peak:
    """The step picked on the selection split with its score on the rest; and the step whose score over all questions is highest."""

    metric: str
    step: int
    reported: Interval
    plain_step: int
    plain: Interval
    steps: int

    @property
    def line(self) -> str:
        """The peak in one line for a person."""
        one, name = self.reported, metric_label(self.metric)
        looked = "one step" if self.steps == 1 else f"{self.steps} steps"
        return (
            f"{name} peak: step {self.step}, picked on the selection split: {short(one.value)} [{short(one.low)} {short(one.high)}]"
            f" on the other {one.n} questions; plain peak of {looked}: {short(self.plain.value)} at step {self.plain_step}"
        )


def peak(summaries: Mapping[int, Mapping[str, Any]], metric: str) -> Peak | None:
    """The peak of a run's summaries by step; None where no step has a score on both splits."""
    scored = {step: found for step, summary in summaries.items() if all(found := [score_of(summary, metric, part) for part in _PARTS])}
    if not scored:
        return None
    sides: dict[int, Sequence[Interval]] = {step: [one for one in found if one is not None] for step, found in scored.items()}
    picked = max(sorted(sides), key=lambda step: sides[step][1].value)
    plain = max(sorted(sides), key=lambda step: sides[step][0].value)
    return Peak(metric, picked, sides[picked][2], plain, sides[plain][0], len(sides))


_PARTS = ("all", "selection", "report")


def score_of(summary: Mapping[str, Any], metric: str, part: str = "all") -> Interval | None:
    """A summary's score (`qa`, or a metric's name) over all questions or over one of its splits; None where there is none."""
    if metric == "qa":
        found = summary.get("qa", {}).get(part)
        known = found is not None and found["score"] is not None
        return Interval(found["score"], found["low"], found["high"], found["graded"]) if known else None
    found = summary.get("metrics" if part == "all" else part, {}).get(metric)
    return Interval(found["value"], found["low"], found["high"], found["n"]) if found and found["n"] else None


def peaks_of_run(folder: Path) -> list[Peak]:
    """R@1's and the QA score's peaks of a run folder's primary question set, over the steps after 0."""
    found = [peak_of_run(folder, metric) for metric in ("hit@1", "qa")]
    return [one for one in found if one is not None]


def peak_of_run(folder: Path, metric: str) -> Peak | None:
    """A run folder's peak over the steps after 0, on its primary question set."""
    return peak({step: read_json(result_paths(folder, step)[1]) for step in steps_evaluated(folder) if step}, metric)

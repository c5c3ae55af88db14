"""The QA score: what a reader answers from what was retrieved, graded, and told truthfully.

A question ends in one of five states. A failure of the reader or of the grader is a state of its own and never a wrong answer: the score is
correct / graded, it carries its coverage and the bounds that the missing ones could make of it, and below the coverage floor it is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .grading import Grade
from .statistics import Interval, wilson

State = Literal["correct", "incorrect", "not_attempted", "unanswered", "ungraded"]
GRADED: tuple[State, ...] = ("correct", "incorrect", "not_attempted")
STATES: tuple[State, ...] = (*GRADED, "unanswered", "ungraded")

Row = dict[str, Any]
_ADDED = {"predicted", "state", "reason", "grade", "correct"}


@dataclass(frozen=True)
class Failure:
    """Why there is no answer or no grade."""

    reason: str


@dataclass(frozen=True)
class QAScore:
    """The score of a question set, or of a part of it."""

    states: Mapping[State, int]
    coverage: float
    bounds: tuple[float, float]
    interval: Interval | None  # None below the coverage floor: then it is not a score
    floor: float  # of coverage, as the recipe had it

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        known = self.interval
        return {
            "score": None if known is None else known.value,
            "low": None if known is None else known.low,
            "high": None if known is None else known.high,
            "graded": sum(self.states[state] for state in GRADED),
            "coverage": self.coverage,
            "floor": self.floor,
            "bounds": list(self.bounds),
            "states": dict(self.states),
        }


def with_answer(row: Row, answer: str | Failure) -> Row:
    """A row with what the reader said, waiting for its grade; or with the reader's failure."""
    bare = {key: value for key, value in row.items() if key not in _ADDED}
    if isinstance(answer, Failure):
        return {**bare, "predicted": None, "state": "unanswered", "reason": answer.reason}
    return {**bare, "predicted": answer, "state": "ungraded", "reason": "not graded yet"}


def with_grade(row: Row, grade: Grade | Failure) -> Row:
    """An answered row with its grade, and with `correct`, which only graded rows have; or with the grader's failure."""
    bare = {key: value for key, value in row.items() if key not in _ADDED} | {"predicted": row["predicted"]}
    if isinstance(grade, Failure):
        return {**bare, "state": "ungraded", "reason": grade.reason}
    return {**bare, "state": grade, "grade": grade.upper(), "correct": grade == "correct"}


def qa_score(rows: Sequence[Mapping[str, Any]], coverage_floor: float) -> QAScore:
    """The score of answered rows; every state is counted, also those that have none."""
    states = {state: sum(row["state"] == state for row in rows) for state in STATES}
    graded = sum(states[state] for state in GRADED)
    missing = len(rows) - graded
    coverage = graded / len(rows) if rows else 0.0
    bounds = (states["correct"] / len(rows), (states["correct"] + missing) / len(rows)) if rows else (0.0, 1.0)
    known = graded > 0 and coverage >= coverage_floor
    return QAScore(states, coverage, bounds, wilson(states["correct"], graded) if known else None, coverage_floor)


def qa_line(score: QAScore) -> str:
    """The score as one line for a person."""
    counts = ", ".join(f"{count} {state.replace('_', ' ')}" for state, count in score.states.items() if count)
    if score.interval is None:
        low, high = score.bounds
        return f"QA    no score: coverage {score.coverage:.1%} is below the floor; it lies in [{low:.3f} {high:.3f}]  ({counts})"
    one = score.interval
    return f"QA    {one.value:.3f}  [{one.low:.3f} {one.high:.3f}]  n={one.n}  coverage {score.coverage:.1%}  ({counts})"

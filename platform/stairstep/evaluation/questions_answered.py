"""The QA score: what a reader answers from what was retrieved, graded, and told truthfully.

A question ends in one of five states. A failure of the reader or of the grader is a state of its own and never a wrong answer: the score is
correct / graded, it carries its coverage and the bounds that the missing ones could make of it, and below the coverage floor it is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .grading import Grade
from .statistics import Interval, wilson

State = Literal["correct", "incorrect", "not_attempted", "unanswered", "ungraded"]
GRADED: tuple[State, ...] = ("correct", "incorrect", "not_attempted")
STATES: tuple[State, ...] = (*GRADED, "unanswered", "ungraded")

Row = dict[str, Any]
Answers = Callable[[Sequence[tuple[str, Sequence[Path]]]], Sequence["str | Failure"]]
Grades = Callable[[str, str, str], "Grade | Failure"]  # question, answer, gold


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

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        known = self.interval
        return {
            "score": None if known is None else known.value,
            "low": None if known is None else known.low,
            "high": None if known is None else known.high,
            "graded": sum(self.states[state] for state in GRADED),
            "coverage": self.coverage,
            "bounds": list(self.bounds),
            "states": dict(self.states),
        }


def answer_questions(rows: Sequence[Row], tiles_dir: Path, top: int, answers: Answers, grades: Grades) -> list[Row]:
    """The rows with `predicted`, `state`, `grade` and `correct` (where graded) of a reader that sees each row's first `top` tiles."""
    asked = [(row["problem"], [tiles_dir / one["path"] for one in row["retrieved"][:top]]) for row in rows]
    return [_answered(row, answer, grades) for row, answer in zip(rows, answers(asked), strict=True)]


def _answered(row: Row, answer: str | Failure, grades: Grades) -> Row:
    if isinstance(answer, Failure):
        return {**row, "predicted": None, "state": "unanswered", "reason": answer.reason}
    grade = grades(row["problem"], answer, row["answer"])
    if isinstance(grade, Failure):
        return {**row, "predicted": answer, "state": "ungraded", "reason": grade.reason}
    return {**row, "predicted": answer, "state": grade, "grade": grade.upper(), "correct": grade == "correct"}


def qa_score(rows: Sequence[Mapping[str, Any]], coverage_floor: float) -> QAScore:
    """The score of answered rows; every state is counted, also those that have none."""
    states = {state: sum(row["state"] == state for row in rows) for state in STATES}
    graded = sum(states[state] for state in GRADED)
    missing = len(rows) - graded
    coverage = graded / len(rows) if rows else 0.0
    bounds = (states["correct"] / len(rows), (states["correct"] + missing) / len(rows)) if rows else (0.0, 1.0)
    known = graded > 0 and coverage >= coverage_floor
    return QAScore(states, coverage, bounds, wilson(states["correct"], graded) if known else None)


def qa_line(score: QAScore) -> str:
    """The score as one line for a person."""
    counts = ", ".join(f"{count} {state.replace('_', ' ')}" for state, count in score.states.items() if count)
    if score.interval is None:
        low, high = score.bounds
        return f"QA    no score: coverage {score.coverage:.1%} is below the floor; it lies in [{low:.3f} {high:.3f}]  ({counts})"
    one = score.interval
    return f"QA    {one.value:.3f}  [{one.low:.3f} {one.high:.3f}]  n={one.n}  coverage {score.coverage:.1%}  ({counts})"

"""How fast a run trains, from the steps that it has logged: what a progress line and a status say of its throughput.

A step's seconds are those of its update alone, waiting for data among them; evaluations and checkpoints lie between steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

SECONDS, WAITED = "time/step_seconds", "time/wait_seconds"
WINDOW = 20  # steps that a throughput is taken over


@dataclass(frozen=True)
class Pace:
    """So many steps, how long they took, and how much of that was waiting for data."""

    steps: int
    seconds: float
    waited: float

    @property
    def steps_s(self) -> float:
        """Steps a second."""
        return self.steps / self.seconds

    @property
    def wait_share(self) -> float:
        """The share of the time that was waiting for data."""
        return self.waited / self.seconds


def pace_of(rows: Iterable[Mapping[str, Any]]) -> Pace | None:
    """The pace of the steps among some rows of metrics; None where none of them took any time."""
    steps = [row for row in rows if row.get(SECONDS) is not None]
    seconds = sum(float(row[SECONDS]) for row in steps)
    return Pace(len(steps), seconds, sum(float(row.get(WAITED) or 0.0) for row in steps)) if seconds > 0 else None

"""reading.json: how far the questions of an evaluation are answered, and how long the reader takes for an answer.

It is written by whoever asks, be that the run itself or an evaluator beside it; where two evaluate at once, the last word stands. It stays
when the evaluation has ended. What is in it depends on the moment: scores and calls stand in the summaries.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stairstep.settings import DataError

from .files import read_json, write_json

READING = "reading.json"
WRITE_S = 5.0


@dataclass(frozen=True)
class Reading:
    """The questions of one set at one step; times are seconds since 1970."""

    step: int
    name: str  # of the question set
    done: int  # questions that have an answer, or have failed to get one
    of: int
    asked: int  # of these, those that the reader was asked and answered; the ledger knew the rest
    seconds: float  # that the reader took for these, one after the other
    time: float

    @property
    def seconds_each(self) -> float | None:
        """Mean seconds an answer; None where nothing was asked."""
        return self.seconds / self.asked if self.asked else None


def read_reading(path: Path) -> Reading | None:
    """The reading in a file, or None where there is no file."""
    if not path.exists():
        return None
    names = {one.name for one in dataclasses.fields(Reading)}
    try:
        return Reading(**{name: value for name, value in read_json(path).items() if name in names})
    except (TypeError, AttributeError):
        raise DataError(f"{path}: this is not how far a reading is (keys {', '.join(sorted(names))}); delete the file") from None


def shown_reading(one: Reading | None) -> str:
    """How long an answer takes, in words; empty where none was asked for."""
    each = None if one is None else one.seconds_each
    return "" if each is None else f"reader {each:.2g} s an answer"


class ReadingFile:
    """Counts what was answered, from any number of threads, and writes it: at the beginning, at the end, every five seconds between.

    `told` is given what is written."""

    def __init__(self, path: Path, told: Callable[[Reading], None] = lambda one: None, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self._told, self._clock = told, clock
        self._lock = threading.Lock()
        self._written = float("-inf")
        self._now = Reading(0, "", 0, 0, 0, 0.0, 0.0)

    def begin(self, step: int, name: str, of: int) -> None:
        """So many questions of a set are to be answered."""
        with self._lock:
            self._now = Reading(step, name, 0, of, 0, 0.0, 0.0)
            self._write()

    def answered(self, seconds: float | None) -> None:
        """One more question is done; `seconds` is what the reader took, None where it gave no answer or was not asked."""
        with self._lock:
            before = self._now
            asked = before if seconds is None else dataclasses.replace(before, asked=before.asked + 1, seconds=before.seconds + seconds)
            self._now = dataclasses.replace(asked, done=before.done + 1)
            if self._now.done >= self._now.of or self._clock() - self._written >= WRITE_S:
                self._write()

    def _write(self) -> None:
        self._now = dataclasses.replace(self._now, time=time.time())
        write_json(self.path, dataclasses.asdict(self._now), durable=False)
        self._written = self._clock()
        self._told(self._now)

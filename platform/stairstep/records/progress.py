"""What a person sees of a run: one bar on a terminal, a plain line now and then elsewhere, nothing from any worker but the first."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from tqdm import tqdm

from .pace import SECONDS, WAITED, Pace, pace_of

_SHOWN: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("loss", "loss", lambda value: f"{value:.4f}"),
    ("accuracy", "acc", lambda value: f"{value:.3f}"),
    ("lr", "lr", lambda value: f"{value:.2e}"),
    ("temperature", "temp", lambda value: f"{value:.4g}"),
    ("step_seconds", "step", lambda value: f"{value:.2f}s"),
    ("wait_seconds", "wait", lambda value: f"{value:.2f}s"),
)
"""Last word of a metric's name, what is shown for it, and how; a plain line has the pace since the line before in place of the last two."""
_OF_ONE_STEP = ("step", "wait")


class Progress:
    """The progress of a loop of known length.

    `update` takes a step's metrics as they are logged and shows those that it knows: loss, accuracy, lr, temperature, step_seconds,
    wait_seconds (waiting for data), whatever stands before the last slash of their names. A plain line comes about once a minute: step,
    metrics, phase, throughput, the share of it that was waiting for data, what `besides` has to say then, and the time left. `tick` has it
    come also where no step ends for as long.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        what: str = "training",
        enabled: bool = True,
        stream: TextIO | None = None,
        every_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        besides: Callable[[], str] = str,
    ) -> None:
        self.total = total
        self._what = what
        self._enabled = enabled
        self._stream = stream if stream is not None else sys.stderr
        self._every_s = every_s
        self._clock, self._besides = clock, besides
        self._start, self._began = start, clock()
        self._step, self._shown_at, self._fields, self._phase = start, float("-inf"), "", ""
        self._since: list[dict[str, float]] = []  # the steps since the last line
        self._shown_step: int | None = None
        self._bar: tqdm[Any] | None = None
        if enabled and self._stream.isatty():
            self._bar = tqdm(total=total, initial=start, desc=what, file=self._stream, dynamic_ncols=True, mininterval=0.2)

    def update(self, step: int, values: Mapping[str, Any], phase: str = "") -> None:
        """Show that a step is done, of a phase where the loop has some."""
        if not self._enabled:
            return
        fields = _fields(values)
        self._fields = " ".join(f"{label} {text}" for label, text in fields if label not in _OF_ONE_STEP)
        self._phase = phase
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(f"{label}={text}" for label, text in fields), refresh=False)
            self._bar.update(step - self._step)
        self._step = step
        if self._bar is None:
            self._since.append(_seconds(values))
        if self._bar is None and (step >= self.total or self._clock() - self._shown_at >= self._every_s):
            self._line()

    def tick(self, doing: str) -> None:
        """Say what the loop does between two steps, where a plain line is due; a bar stays as it is."""
        if self._enabled and self._bar is None and self._clock() - max(self._shown_at, self._began) >= self._every_s:
            self._line(doing)

    def note(self, text: str) -> None:
        """Write a line of its own, without breaking the bar."""
        if self._enabled:
            tqdm.write(text, file=self._stream)

    def close(self) -> None:
        """End the bar, or show the last step if it has not been shown."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self._enabled and self._step > self._start and self._shown_step != self._step:
            self._line()
        self._enabled = False

    def _line(self, doing: str = "") -> None:
        done = self._step - self._start
        left = (self._clock() - self._began) / done * (self.total - self._step) if done > 0 else None
        eta = f"eta {tqdm.format_interval(left)}" if left else ""
        what = f"{self._what} {self._step}/{self.total} {self._fields}".rstrip()
        phase = f"phase {self._phase}" if self._phase else ""
        said = (what, phase, doing, shown_pace(pace_of(self._since)), self._besides(), eta)
        print(", ".join(one for one in said if one), file=self._stream, flush=True)
        self._shown_at, self._shown_step, self._since = self._clock(), self._step, []


def shown_pace(pace: Pace | None) -> str:
    """A throughput in words; empty where there is none."""
    return "" if pace is None else f"{pace.steps_s:.3g} steps/s, {pace.wait_share:.0%} waiting for data"


def _seconds(values: Mapping[str, Any]) -> dict[str, float]:
    """A step's seconds by the names that they are logged by, whatever stands before the last slash of theirs."""
    last = {name.rpartition("/")[2]: value for name, value in values.items()}
    found = {name: last.get(name.rpartition("/")[2]) for name in (SECONDS, WAITED)}
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


def _fields(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    last = {name.rpartition("/")[2]: value for name, value in values.items()}
    shown = []
    for name, label, form in _SHOWN:
        value = last.get(name)
        if value is not None:
            shown.append((label, form(float(value))))
    return shown

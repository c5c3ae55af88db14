"""status.json: what a run is doing now, with a heartbeat by which a report tells a slow run from a dead one.

The file is replaced in one instant, so a reader never meets half of it. A heartbeat is throttled: calling it at every step costs nothing.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from stairstep.settings import DataError

from .files import host_name, process_is_alive, read_json, write_json
from .gpu import GpuUse, gpu_use

State = Literal["preparing", "running", "evaluating", "stopping", "finished", "failed", "stopped"]
ACTIVE: frozenset[State] = frozenset({"preparing", "running", "evaluating", "stopping"})
HEARTBEAT_S = 5.0
LOST_S = 120.0


@dataclass(frozen=True)
class Status:
    """One state of a run; times are seconds since 1970."""

    state: State
    step: int
    of: int
    heartbeat: float
    pid: int
    host: str
    message: str = ""
    gpu: GpuUse | None = None  # of the process that writes; None where it uses none

    def active(self) -> bool:
        """Whether the run says that it is at work."""
        return self.state in ACTIVE

    def lost(self, now: float | None = None) -> bool:
        """Whether the run says that it is at work but its process is gone or has been silent for two minutes."""
        if not self.active():
            return False
        if self.host == host_name() and not process_is_alive(self.pid):
            return True
        return (time.time() if now is None else now) - self.heartbeat > LOST_S


def read_status(path: Path) -> Status | None:
    """The status in a file, or None where there is no file."""
    if not path.exists():
        return None
    plain = read_json(path)
    names = {one.name for one in dataclasses.fields(Status)}
    try:
        status = Status(**{name: value for name, value in plain.items() if name in names})
    except (TypeError, AttributeError):
        status = None
    if status is None or status.state not in get_args(State):
        raise DataError(f"{path}: this is not a run's status (keys {', '.join(sorted(names))}); delete the file to go on without it")
    return status


class StatusFile:
    """The writer of one run's status.json."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = path
        self._clock = clock
        self._written = float("-inf")
        self._now = Status("preparing", 0, 0, 0.0, os.getpid(), host_name())

    def set(self, state: State, step: int | None = None, of: int | None = None, message: str = "") -> None:
        """Write a state at once; `step` and `of` keep their last values where they are not given."""
        self._remember(state, step, of, message)
        self._write(durable=True)

    def heartbeat(self, step: int | None = None, state: State | None = None) -> None:
        """Say that the run lives; writes at most every five seconds."""
        self._remember(state or self._now.state, step, None, self._now.message)
        if self._clock() - self._written >= HEARTBEAT_S:
            self._write(durable=False)

    def _remember(self, state: State, step: int | None, of: int | None, message: str) -> None:
        self._now = dataclasses.replace(
            self._now,
            state=state,
            step=self._now.step if step is None else step,
            of=self._now.of if of is None else of,
            message=message,
        )

    def _write(self, durable: bool) -> None:
        self._now = dataclasses.replace(self._now, heartbeat=time.time(), pid=os.getpid(), host=host_name(), gpu=gpu_use())
        write_json(self.path, dataclasses.asdict(self._now), durable)
        self._written = self._clock()

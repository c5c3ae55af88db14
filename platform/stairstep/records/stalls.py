"""A process that has stopped getting on says where it stands: the stacks of all its threads, in its run folder, for whoever comes to look.

It is told from inside, because only the process itself knows its stacks; it goes on waiting afterwards, nothing is ended. A stall that
holds Python's global lock keeps this thread from running too; then the silent heartbeat of status.json is all that is seen.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from .files import temporary_name

_LOG = logging.getLogger(__name__)
STALLED = "stalled*.txt"
_OF_EVALUATION = "stalled-evaluation-"


def stall_path(folder: Path, rank: int = 0) -> Path:
    """Where a worker of a run leaves its stacks."""
    return folder / (f"stalled-{rank}.txt" if rank else "stalled.txt")


def evaluation_stall_path(folder: Path, step: int) -> Path:
    """Where an evaluator beside training leaves its stacks; the run itself may well get on meanwhile."""
    return folder / f"{_OF_EVALUATION}{step}.txt"


def of_evaluation(stacks: Path) -> bool:
    """Whether stacks are those of an evaluator beside training."""
    return stacks.name.startswith(_OF_EVALUATION)


class StallWatch:
    """Watches for `beat` inside of a `with` block: after `limit_s` without one, stacks are written once, and again only after the next.

    `limit_s` None watches nothing. Only with `tell` is it told in the log: of several workers that wait for one another, one does. `left`
    is called with the file's name when it was written."""

    def __init__(self, path: Path, limit_s: float | None, tell: bool = True, left: Callable[[str], None] = lambda name: None) -> None:
        self.path, self.limit_s, self._tell, self._left = path, limit_s, tell, left
        self._beaten = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stall watch", daemon=True)

    def beat(self) -> None:
        """Say that the process gets on."""
        self._beaten = time.monotonic()

    def __enter__(self) -> StallWatch:
        self.beat()
        if self.limit_s is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        assert self.limit_s is not None
        told: float | None = None  # the beat whose silence has been written down
        left = self.limit_s
        while not self._done.wait(max(left, 0.0)):
            beaten = self._beaten
            left = beaten + self.limit_s - time.monotonic()
            if left <= 0:
                if told != beaten:
                    self._write()
                    told = beaten
                left = self.limit_s

    def _write(self) -> None:
        temporary = temporary_name(self.path)
        try:
            with open(temporary, "x", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} process {os.getpid()}: nothing was done for {self.limit_s:g} s\n")
                file.write(_stacks())
            os.replace(temporary, self.path)
        except OSError as error:
            _LOG.warning("%s: the stacks of a run that seems to have stalled cannot be written: %s", self.path, error.strerror)
            return
        if self._tell:
            _LOG.warning("no step, checkpoint or evaluation has ended for %g s; where each thread stands is in %s", self.limit_s, self.path)
        self._left(self.path.name)


def _stacks() -> str:
    """The stacks of all threads, the main one first. (faulthandler writes a hundred at most, and that one last.)"""
    names = {one.ident: one.name for one in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda one: one[0] != main)
    return "".join(f"\nthread {names.get(one, one)}\n{''.join(traceback.format_stack(frame))}" for one, frame in frames)

"""Stopping a run when asked: SIGTERM and Ctrl-C raise a flag that the step loop reads at the end of a step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopFlag:
    """A flag that signals raise while it is used as a context manager; off the main thread only `set` raises it.

    The first Ctrl-C asks the loop to stop after its step, a second one raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        # Plain attributes: a signal handler may interrupt a thread that holds any lock, that of threading.Event included.
        self._raised = False
        self._reason = ""
        self._interrupted = False
        self._former: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return self._raised

    @property
    def reason(self) -> str:
        """Who asked for the stop, for the status."""
        return self._reason

    def set(self, reason: str) -> None:
        """Ask for a stop."""
        if not self._raised:
            self._reason = reason
        self._raised = True

    def __enter__(self) -> StopFlag:
        if threading.current_thread() is threading.main_thread():
            for one in _SIGNALS:
                self._former[one] = signal.signal(one, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for one, handler in self._former.items():
            # A handler that was not installed from Python reads as None and cannot be put back; the default is the nearest.
            signal.signal(one, handler if handler is not None else signal.SIG_DFL)
        self._former.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
            os.write(2, b"\nStopping at the end of this step, with a checkpoint; Ctrl-C once more stops at once.\n")
        self.set(name)

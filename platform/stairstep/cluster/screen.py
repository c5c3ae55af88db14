"""The terminal of a run whose first worker is another process: what it writes to standard error appears where the job was started.

The worker writes as to the terminal that the driver has, progress bar included, and what it writes is told to the driver piece by piece
(words.py). So a run under Ray looks like one in process, without Ray's prefixes and from one worker alone.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TextIO

from .words import Words

_LOG = logging.getLogger(__name__)


class _Screen(io.TextIOBase):
    """A stream that tells the driver each line; of itself it says that it is a terminal, where the driver's standard error is one."""

    def __init__(self, words: Words, terminal: bool) -> None:
        super().__init__()
        self._words, self._terminal = words, terminal
        self._held: list[str] = []
        self._lock = threading.RLock()  # a signal, or what is collected as garbage, may write in the midst of a write
        words.show(b"")

    def write(self, text: str) -> int:
        with self._lock:
            self._held.append(text)
        if "\n" in text:
            self.flush()
        return len(text)

    def flush(self) -> None:
        with self._lock:
            text, self._held = "".join(self._held), []
        if text:
            self._words.show(text.encode("utf-8", "replace"))

    def isatty(self) -> bool:
        return self._terminal


def terminal_size(stream: TextIO | None = None) -> tuple[int, int] | None:
    """Columns and lines of the terminal that a stream is, or None for any other stream."""
    stream = stream or sys.stderr
    return tuple(shutil.get_terminal_size()) if stream.isatty() else None  # type: ignore[return-value]


@contextmanager
def on_screen(words: Words, size: tuple[int, int] | None) -> Iterator[None]:
    """Standard error of this process, as Python sees it, is told to the driver."""
    if size is not None:  # a progress bar asks here, because such a stream has no size
        os.environ["COLUMNS"], os.environ["LINES"] = (str(one) for one in size)
    screen = _Screen(words, size is not None)
    with redirect_stderr(screen):  # type: ignore[type-var]
        try:
            yield
        finally:
            screen.flush()


class _WithoutRay(io.TextIOBase):
    """A stream that passes everything on but what Ray's own processes tell every driver, and Tune of a trial that had no score to tell;
    that goes to the log's debug lines."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._dropped = False

    def write(self, text: str) -> int:
        if "(raylet" in text or text.startswith("Trial run_trial_"):
            _LOG.debug("%s", text)
            self._dropped = True
        elif not (self._dropped and text == "\n"):
            self._dropped = False
            self._stream.write(text)
        else:
            self._dropped = False
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()


@contextmanager
def without_ray() -> Iterator[None]:
    """Keep a paragraph of Ray's off standard output for each worker that dies; the driver says it in a line of its own."""
    with redirect_stdout(_WithoutRay(sys.stdout)):
        yield


class Relay:
    """Copies what a group's first worker has shown to standard error."""

    def __init__(self, words: Words, stream: TextIO | None = None) -> None:
        self._words, self._stream = words, stream
        self._last = "\n"
        self.begun = False
        """Whether the worker has begun to write."""

    def poll(self) -> None:
        """Copy what was shown since."""
        while (piece := self._words.seen()) is not None:
            self.begun = True
            self._put(piece.decode("utf-8", "replace"))

    def close(self) -> None:
        """Copy the rest, and end a line that a worker left unfinished."""
        self.poll()
        if not self._last.endswith("\n"):
            self._put("\n")

    def _put(self, text: str) -> None:
        if text:
            stream = self._stream or sys.stderr
            stream.write(text)
            stream.flush()
            self._last = text

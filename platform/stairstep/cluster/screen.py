"""The terminal of a run whose first worker is another process: what it writes to standard error appears where the job was started.

The worker writes to a file beside the run, as to the terminal that the driver has, progress bar included; the driver copies what is
new. So a run under Ray looks like one in process, without Ray's prefixes and from one worker alone.
"""

from __future__ import annotations

import codecs
import io
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO

_LOG = logging.getLogger(__name__)


class _Screen(io.TextIOWrapper):
    """A file that says of itself that it is a terminal, where the driver's standard error is one."""

    def __init__(self, path: Path, terminal: bool) -> None:
        super().__init__(path.open("ab"), encoding="utf-8", errors="replace", line_buffering=True, write_through=True)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def terminal_size(stream: TextIO | None = None) -> tuple[int, int] | None:
    """Columns and lines of the terminal that a stream is, or None for any other stream."""
    stream = stream or sys.stderr
    return tuple(shutil.get_terminal_size()) if stream.isatty() else None  # type: ignore[return-value]


@contextmanager
def on_screen(path: Path, size: tuple[int, int] | None) -> Iterator[None]:
    """Standard error of this process, as Python sees it, goes to the file."""
    if size is not None:  # a progress bar asks here, because a file has no size
        os.environ["COLUMNS"], os.environ["LINES"] = (str(one) for one in size)
    with _Screen(path, size is not None) as screen, redirect_stderr(screen):
        yield


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
    """Copies what is new in a worker's screen file to standard error."""

    def __init__(self, path: Path, stream: TextIO | None = None) -> None:
        self.path, self._stream = path, stream
        self._file: io.BufferedReader | None = None
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._last = "\n"
        self._closed = False

    @property
    def begun(self) -> bool:
        """Whether the worker has opened its screen."""
        return self.path.exists()

    def poll(self) -> None:
        """Copy what has been written since."""
        if self._closed or not self.begun:
            return
        if self._file is None:
            self._file = self.path.open("rb")
        self._put(self._decode(self._file.read()))

    def close(self) -> None:
        """Copy the rest, and end a line that a worker left unfinished."""
        self.poll()
        self._closed = True
        if self._file is not None:
            self._file.close()
            self._file = None
        if not self._last.endswith("\n"):
            self._put("\n")

    def _put(self, text: str) -> None:
        if text:
            stream = self._stream or sys.stderr
            stream.write(text)
            stream.flush()
            self._last = text

"""One place where a job's log lines get their shape: time, logger, message, on standard error, and never through a progress bar."""

from __future__ import annotations

import logging
import sys

from tqdm import tqdm


class _BesideBars(logging.Handler):
    """Writes above a progress bar if there is one, plainly if there is none."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except (OSError, ValueError):  # the terminal is gone, or the stream is closed at exit
            self.handleError(record)


class _Line(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        message = f"{self.formatTime(record, '%H:%M:%S')} {record.name}: {level}{record.getMessage()}".replace("\n", " ")
        return message + (f"\n{self.formatException(record.exc_info)}" if record.exc_info else "")


def logging_setup(level: str = "INFO", rank: int = 0) -> None:
    """Send the log of `stairstep` to standard error, one line an event; workers other than the first show warnings only."""
    logger = logging.getLogger("stairstep")
    for handler in [one for one in logger.handlers if isinstance(one, _BesideBars)]:
        logger.removeHandler(handler)
    handler = _BesideBars()
    handler.setFormatter(_Line())
    logger.addHandler(handler)
    logger.setLevel(level if rank == 0 else max(logging.WARNING, logging.getLevelName(level)))
    logger.propagate = False

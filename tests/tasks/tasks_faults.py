"""Signals at chosen instants of a training; `strike` is called in the process that trains, before it does."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import stairstep.evaluation.question_set as question_set
import stairstep.records.folders as folders
import stairstep.tasks.run as run
from stairstep.models.encoder import Encoder
from stairstep.records import MetricLog
from stairstep.tasks.retrieval import RetrievalTask

_POINTS: dict[str, tuple[Any, str, str]] = {
    # where: owner, what is called there, and whether the signal comes before or after it
    "loading": (run, "load_encoder", "before"),
    "restoring": (RetrievalTask, "load", "before"),
    "step": (RetrievalTask, "step", "before"),
    "updated": (RetrievalTask, "after_update", "after"),
    "validation": (RetrievalTask, "validation", "before"),
    "evaluation": (RetrievalTask, "evaluate", "before"),
    "evaluated": (RetrievalTask, "evaluate", "after"),
    "weights written": (Encoder, "save", "after"),
    "rows written": (question_set, "write_rows", "after"),
    "deleting": (folders, "_delete", "before"),
}


def strike(where: str, call: int, number: int) -> None:
    """Send signal `number` to this process at the `call`-th call (from 1) of the point `where`; `half a line` cuts that metric line."""
    if where == "half a line":
        _cut_line(call, number)
        return
    owner, name, moment = _POINTS[where]
    plain: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def struck(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and moment == "before":
            os.kill(os.getpid(), number)
        result = plain(*arguments, **options)
        if calls == call and moment == "after":
            os.kill(os.getpid(), number)
        return result

    setattr(owner, name, struck)


def _cut_line(call: int, number: int) -> None:
    append = MetricLog.append
    calls = 0

    def struck(log: MetricLog, step: int, values: Any) -> None:
        nonlocal calls
        calls += 1
        append(log, step, values)
        if calls == call:
            os.truncate(log.path, log.path.stat().st_size - 40)
            os.kill(os.getpid(), number)

    MetricLog.append = struck  # type: ignore[method-assign]

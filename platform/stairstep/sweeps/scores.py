"""What a trial has scored so far, read from its run folder: a value a step, on the selection split of the primary question set.

A score belongs to its step whenever it was measured: evaluated beside training or after it, it is found here all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from stairstep.evaluation.evaluated import steps_evaluated
from stairstep.records import MetricLog, read_json, result_paths, series

LOSS = "validation/loss"


def scores(run: Path, metric: str) -> dict[int, float]:
    """The metric by step, ascending, without the untrained step 0; a step without a score (coverage below the floor) is absent."""
    if metric == LOSS:
        log = MetricLog(run / "metrics.jsonl")
        return {step: value for step, value in sorted(series(log.rows(), LOSS)) if step} if log.path.exists() else {}
    found = {}
    for step in steps_evaluated(run):
        value = _selected(run, step, metric)
        if step and value is not None:
            found[step] = value
    return found


def best_score(run: Path, metric: str, mode: Literal["max", "min"]) -> tuple[int, float] | None:
    """The step with the best score, the earliest of equals, and that score."""
    found = scores(run, metric)
    if not found:
        return None
    sign = 1 if mode == "max" else -1
    step = max(sorted(found), key=lambda one: sign * found[one])
    return step, found[step]


@lru_cache(maxsize=4096)
def _summary(path: Path, changed: int, size: int) -> Mapping[str, Any]:
    """A summary as it was when it was last changed: who watches a sweep asks for it every other second."""
    return dict(read_json(path))


def _selected(run: Path, step: int, metric: str) -> float | None:
    path = result_paths(run, step)[1]
    seen = path.stat()
    summary = _summary(path, seen.st_mtime_ns, seen.st_size)
    if metric == "qa":
        answered = summary.get("qa", {}).get("selection")
        return None if answered is None else answered["score"]
    one = summary.get("selection", {}).get(metric)
    return one["value"] if one and one["n"] else None

"""metrics.jsonl: one line per event, `{"step": …, "time": …, "train/loss": …}`, appended by any process of the run.

JSON has no NaN and no infinities: such a value stands as null, and the line's `nonfinite` says which it was ("nan", "inf", "-inf");
`rows` puts the numbers back. Floats are written so that they read back to the same bits. After a resume the log is what an
undisturbed run would have written, apart from the fields whose last word is in VOLATILE.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .files import append_line, append_to, locked, mend_tail, read_json_lines, read_raw_lines, sync_file, write_atomically

VOLATILE = frozenset({"time", "seconds", "wait", "waits", "throughput", "per_second"})
"""What may differ between a run and its resumed twin: a field whose last path part is one of these or ends in `_` and one of these."""

_RESERVED = frozenset({"step", "time", "nonfinite"})


class MetricLog:
    """The metric log of one run; constructing it touches no file."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def append(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one event. Values are numbers (also one-element tensors), text, truth values or None."""
        append_line(self.path, _line(step, values))

    def append_once(self, step: int, values: Mapping[str, Any]) -> bool:
        """Append an event unless one of the same step with the same fields is there; for events that may be delivered twice."""
        line = _line(step, values)
        wanted = _identity(json.loads(line))
        with locked(self.path) as descriptor:
            mend_tail(descriptor)
            if any(_identity(row) == wanted for row in read_json_lines(self.path)):
                return False
            append_to(descriptor, line)
        return True

    def rows(self) -> list[dict[str, Any]]:
        """All events in the order of their lines, non-finite numbers restored; none where there is no log yet."""
        if not self.path.exists():
            return []
        return [_restored(row) for row in read_json_lines(self.path)]

    def has(self, step: int, name: str) -> bool:
        """Whether an event of that step has that field."""
        return any(row["step"] == step and name in row for row in self.rows())

    def truncate_after(self, step: int) -> int:
        """Remove every event of a later step, in one instant, before a resume runs those steps again; returns how many went."""
        if not self.path.exists():
            return 0
        with locked(self.path, create=False) as descriptor:
            mend_tail(descriptor)
            lines = read_raw_lines(self.path)
            kept = [line for line, row in lines if row["step"] <= step]
            if len(kept) < len(lines):
                write_atomically(self.path, b"".join(line + b"\n" for line in kept))
        return len(lines) - len(kept)

    def sync(self) -> None:
        """Make what is written survive a power cut; a checkpoint calls it first, so that no metric before it can be lost."""
        if self.path.exists():
            sync_file(self.path)


def _line(step: int, values: Mapping[str, Any]) -> str:
    row: dict[str, Any] = {"step": int(step), "time": round(time.time(), 3)}
    nonfinite = {}
    for name, value in values.items():
        if name in _RESERVED:
            raise ValueError(f"a metric cannot be called '{name}'")
        plain = value.item() if hasattr(value, "item") else value
        if not (plain is None or isinstance(plain, bool | int | float | str)):
            raise TypeError(f"metric '{name}': expected a number, text, a truth value or None, found {type(value).__name__}")
        if isinstance(plain, float) and not math.isfinite(plain):
            nonfinite[name] = str(plain)
            plain = None
        row[name] = plain
    if nonfinite:
        row["nonfinite"] = nonfinite
    return json.dumps(row, ensure_ascii=False, allow_nan=False)


def _restored(row: dict[str, Any]) -> dict[str, Any]:
    for name, text in row.pop("nonfinite", {}).items():
        row[name] = float(text)
    return row


def _identity(row: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    return row["step"], tuple(sorted(name for name in row if name not in _RESERVED))


def is_volatile(name: str) -> bool:
    """Whether a field may differ between a run and its resumed twin."""
    last = name.rpartition("/")[2]
    return any(last == word or last.endswith("_" + word) for word in VOLATILE)


def comparable(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows without their volatile fields, by step and then by name of fields: equal for a run and its resumed twin.

    A row that says nothing but how long something took is left out, for it depends on the way things were done. Non-finite numbers become
    text, because NaN is not equal to itself.
    """
    stripped = [{name: _equal_to_itself(value) for name, value in row.items() if not is_volatile(name)} for row in rows]
    return sorted((row for row in stripped if row.keys() != {"step"}), key=lambda row: (row["step"], sorted(row)))


def _equal_to_itself(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def series(rows: Iterable[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """The (step, value) pairs of one metric, in the order of steps."""
    return sorted((row["step"], row[name]) for row in rows if row.get(name) is not None)

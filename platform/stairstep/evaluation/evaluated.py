"""An evaluation as it lies in a folder, read back to be compared with another: its rows, and what its summary says of them.

Nothing is taken from a recipe, so a run folder and a folder that jobs.evaluate wrote are read alike.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stairstep.records import read_json, read_json_lines, result_paths
from stairstep.settings import InputError

from .settings import EvaluationSettings

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Evaluated:
    """The rows of one evaluation; `top_k_read` is None where no reader was asked."""

    rows: Sequence[Row]
    step: int
    top_k_read: int | None = None
    coverage_floor: float = EvaluationSettings().coverage_floor

    def among(self, ids: Collection[str]) -> Evaluated:
        """The same evaluation over some of its questions."""
        return replace(self, rows=[row for row in self.rows if row["id"] in ids])


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a name, and an evaluation a seed."""

    name: str
    runs: Sequence[Evaluated]


def read_evaluated(folder: Path, step: int, name: str | None = None) -> Evaluated:
    """A folder's evaluation at a step, of its primary question set or of the set of this name."""
    name = None if name == primary_set(folder) else name
    rows_path, summary_path = result_paths(folder, step, name)
    if not summary_path.exists():  # it is written last: without it the rows may still be coming
        raise InputError(f"{folder}: no evaluation{_of(name)} at step {step}; {_what_is_there(folder, name)}")
    rows, summary = read_json_lines(rows_path), read_json(summary_path)
    if any("id" not in row for row in rows):
        raise InputError(f"{rows_path}: these rows are no questions; comparisons are of question sets")
    answered = summary.get("qa", {}).get("all", {})
    floor = answered.get("floor", EvaluationSettings().coverage_floor)  # summaries of before this key
    return Evaluated(rows, step, summary.get("top_k_read"), floor)


def steps_evaluated(folder: Path, name: str | None = None) -> list[int]:
    """The steps whose evaluation is complete, ascending."""
    place = folder if name is None else folder / name
    steps = (path.name.removeprefix("eval_step").removesuffix(".summary.json") for path in place.glob("eval_step*.summary.json"))
    return sorted(int(step) for step in steps if step.isdecimal())


def primary_set(folder: Path) -> str | None:
    """The name of the question set whose results lie in the folder itself."""
    steps = steps_evaluated(folder)
    return read_json(result_paths(folder, steps[-1])[1]).get("name") if steps else None


def _of(name: str | None) -> str:
    return "" if name is None else f" of the question set '{name}'"


def _what_is_there(folder: Path, name: str | None) -> str:
    steps = steps_evaluated(folder, name)
    if steps:
        return f"there are steps {', '.join(map(str, steps))}"
    sets = {path.parent.name for path in folder.glob("*/eval_step*.summary.json")} | {primary_set(folder)}
    known = sorted(one for one in sets if one is not None)
    if known:
        return f"there are evaluations of {', '.join(known)}"
    return "there is no evaluation at all; expected eval_step<step>.summary.json, as a run folder has them"

"""What tests of whole runs compare: the measured curves, and the same run in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stairstep.records import MetricLog, is_volatile, series
from stairstep.tasks.opening import Finished
from stairstep.tasks.run import train


def numbers(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves of a run, without what is measured in time."""
    rows = MetricLog(folder / "metrics.jsonl").rows()
    names = {name for row in rows for name in row if name not in ("step", "time") and not is_volatile(name)}
    return {name: series(rows, name) for name in sorted(names)}


def same_curve(one: Path, other: Path, steps: int) -> None:
    """Every measured value of every step, once, and the same to rounding."""
    found, expected = numbers(one), numbers(other)
    assert found.keys() == expected.keys()
    assert len(expected["train/loss"]) == steps
    for name, points in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in points], rel=1e-4, abs=1e-6), name


def alone(recipe: Any) -> Finished:
    """The run in this process."""
    before = torch.get_num_threads()
    try:
        return train(recipe, console=False)
    finally:
        torch.set_num_threads(before)

"""Throughput from logged steps."""

import pytest

from stairstep.records.pace import pace_of


def test_steps_their_seconds_and_what_was_waited_for():
    rows = [
        {"step": 1, "train/loss": 1.0, "time/step_seconds": 2.0, "time/wait_seconds": 0.5},
        {"step": 1, "validation/loss": 1.0},
        {"step": 2, "train/loss": 1.0, "time/step_seconds": 6.0, "time/wait_seconds": None},
    ]
    pace = pace_of(rows)
    assert pace is not None
    assert (pace.steps, pace.steps_s, pace.wait_share) == (2, pytest.approx(0.25), pytest.approx(0.0625))


def test_no_steps_no_pace():
    assert pace_of([]) is None
    assert pace_of([{"step": 1, "validation/loss": 1.0}, {"step": 1, "time/step_seconds": 0.0}]) is None

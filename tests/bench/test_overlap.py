"""What a run's metric log tells of its waits: right for a log whose seconds are known, refused where a wait is missing."""

from __future__ import annotations

import pytest
from overlap import WAIT, Facts, facts_of, scores_of

from stairstep.training import EVALUATION_WAIT


def log(waits: dict[int, float], step_s: float = 2.0, steps: int = 4) -> list[dict[str, float]]:
    """A run from time 100 on: an evaluation before the first step, and after every step that `waits` names."""
    now, rows = 100.0, []
    for step in range(steps + 1):
        if step:
            now += step_s
            rows.append({"step": step, "time": now, "train/loss": 1.0, "time/step_seconds": step_s})
        if step in waits:
            now += waits[step]
            rows += [{"step": step, "time": now, "tinywiki/hit@1": 0.1 * step}, {"step": step, "time": now, WAIT: waits[step]}]
    return rows


def test_the_name_is_the_one_that_training_logs():
    assert WAIT == EVALUATION_WAIT


def test_waits_before_the_last_step_are_trainings_and_the_last_is_after_it():
    facts = facts_of(log({0: 1.0, 2: 3.0, 4: 5.0}))
    assert facts == Facts(training=12.0, held=4.0, after=5.0, evaluations=3)
    assert facts.share == pytest.approx(1 / 3)
    assert facts.wall == 17.0


def test_a_run_that_waited_for_nothing():
    assert facts_of(log({0: 0.0, 2: 0.0, 4: 0.0})).share == 0.0


@pytest.mark.parametrize("waits", [{2: 1.0, 4: 1.0}, {0: 1.0, 2: 1.0}])
def test_a_missing_wait_is_told(waits: dict[int, float]):
    with pytest.raises(SystemExit, match="expected one at step 0 and one at the last step"):
        facts_of(log(waits))


def test_scores_are_compared_wherever_they_stand_and_times_are_not():
    beside = log({0: 1.0, 2: 1.0, 4: 1.0})
    beside = [beside[0], *beside[2:], beside[1]]  # a score that came in late
    assert scores_of(log({0: 9.0, 2: 9.0, 4: 9.0})) == scores_of(beside) != []
    assert scores_of(log({0: 1.0, 4: 1.0})) != scores_of(beside)

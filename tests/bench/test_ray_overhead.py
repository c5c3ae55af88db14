"""The ratio of two sides' step times: right where it is known, as wide as the noise, and of whole steps alone."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from ray_overhead import DROPPED, Side, intervals, ratio_of


def test_a_ratio_that_is_the_same_throughout_is_told_as_a_point():
    assert ratio_of([np.full(40, np.log(1.02))] * 3) == pytest.approx((1.02, 1.02, 1.02))


def test_a_single_step_that_was_disturbed_moves_little():
    logs = np.full(41, np.log(1.01))
    logs[0] = np.log(600)
    assert ratio_of([logs])[0] == pytest.approx(1.01)


@pytest.mark.parametrize("truth", [1.0, 1.05])
def test_the_interval_holds_the_truth_and_is_no_wider_than_the_noise_makes_it(truth: float):
    chance = np.random.default_rng(3)
    ratio, low, high = ratio_of([np.log(truth) + chance.normal(0, 0.07, size=40) for _ in range(6)])
    assert low < truth < high
    assert low < ratio < high
    assert high - low < 0.06


def test_rounds_that_disagree_make_a_wide_interval():
    _, low, high = ratio_of([np.full(50, np.log(one)) for one in (0.9, 1.1, 0.9, 1.1)])
    assert low < 0.95 and high > 1.05


def test_a_step_counts_where_both_its_ends_lie_in_one_turn():
    rows = [{"step": one + 1, "time": 10.0 + one} for one in range(DROPPED + 6)]
    turns = [(9.0, 10.5 + DROPPED + 1), (10.5 + DROPPED + 2, 99.0)]
    first = DROPPED + 1
    assert intervals(rows, turns) == {first + 1: 1.0, first + 4: 1.0, first + 5: 1.0}, "two steps were taken across the halt"


def test_a_side_that_is_halted_takes_no_step(tmp_path: Path):
    side = Side(tmp_path, "one", "bare", 400)
    try:
        assert side.begun()
        side.halt()
        cores = sorted(os.sched_getaffinity(0))
        spent = {one.id: one.user_time for one in psutil.Process(side.job.pid).threads()}
        trains = max(spent, key=spent.__getitem__)
        for thread in spent:
            assert os.sched_getaffinity(thread) == set(cores[:1] if thread == trains else cores[1:] or cores)
        logged = len(side.rows())
        time.sleep(2.0)
        assert len(side.rows()) == logged
        side.turn()
        assert len(side.rows()) > logged
        [(start, end)] = side.turns
        assert intervals(side.rows(), side.turns).keys() <= {row["step"] for row in side.rows() if start <= row["time"] <= end}
    finally:
        for one in [psutil.Process(side.job.pid), *psutil.Process(side.job.pid).children(recursive=True)]:
            one.kill()
        side.job.wait()

"""The ratio of two sides' step times: right where it is known, and as wide as the noise."""

from __future__ import annotations

import numpy as np
import pytest
from ray_overhead import DROPPED, intervals, ratio_of


def test_what_both_sides_have_in_common_cancels():
    """Steps of unequal work, blocks on a machine that slows down: Ray takes 2 % more throughout, and the interval is a point."""
    bare = np.outer([1.0, 1.5, 3.0], [0.1, 0.2, 0.4, 0.15])
    assert ratio_of(bare, bare * 1.02) == pytest.approx((1.02, 1.02, 1.02))


def test_a_single_step_that_was_disturbed_moves_little():
    bare = np.full((5, 41), 0.1)
    ray = bare * 1.01
    ray[0, 0] = 60.0
    assert ratio_of(bare, ray)[0] == pytest.approx(1.01)


@pytest.mark.parametrize("truth", [1.0, 1.05])
def test_the_interval_holds_the_truth_and_is_no_wider_than_the_noise_makes_it(truth: float):
    chance = np.random.default_rng(3)
    bare, ray = (0.1 * np.exp(chance.normal(0, 0.05, size=(6, 40))) for _ in range(2))
    ratio, low, high = ratio_of(bare, ray * truth)
    assert low < truth < high
    assert low < ratio < high
    assert high - low < 0.06


def test_blocks_that_disagree_make_a_wide_interval():
    bare = np.full((4, 50), 0.1)
    ray = bare * np.array([[0.9], [1.1], [0.9], [1.1]])
    _, low, high = ratio_of(bare, ray)
    assert low < 0.95 and high > 1.05


def test_intervals_are_from_end_to_end_without_the_first():
    rows = [{"time": 10.0 + 0.5 * one**2} for one in range(DROPPED + 3)]
    assert intervals(rows) == pytest.approx([0.5 * (2 * one + 1) for one in range(DROPPED, DROPPED + 2)])

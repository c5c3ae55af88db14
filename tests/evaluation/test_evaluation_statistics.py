"""Intervals and tests against printed values, exact enumeration and, where it is installed, scipy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from stairstep.evaluation.statistics import (
    Interval,
    bootstrap,
    bootstraps,
    holm,
    mcnemar,
    paired_bootstrap,
    paired_difference,
    wilson,
)


def test_wilson_known_values() -> None:
    # Newcombe (1998), Statistics in Medicine 17, table I: 81/263, 15/148, 0/20, 1/29 by the score method without correction.
    for successes, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)):
        one = wilson(successes, n)
        assert (round(one.low, 4), round(one.high, 4)) == (low, high)
        assert one.value == successes / n
    assert wilson(20, 20).high == 1.0
    assert wilson(0, 7).low == 0.0


def test_wilson_solves_its_own_equation_and_knows_nothing_of_nothing() -> None:
    one = wilson(37, 91, confidence=0.9)
    for bound in (one.low, one.high):
        assert abs(37 / 91 - bound) / math.sqrt(bound * (1 - bound) / 91) == pytest.approx(1.6448536269514722)
    nothing = wilson(0, 0)
    assert (nothing.low, nothing.high, nothing.n) == (0.0, 1.0, 0)
    assert math.isnan(nothing.value)
    with pytest.raises(ValueError, match="successes"):
        wilson(3, 2)


def test_bootstrap_percentiles_are_those_of_all_resamples() -> None:
    values = [0.0, 1.0, 3.0, 10.0]
    means = [np.mean(draw) for draw in itertools.product(values, repeat=4)]
    one = bootstrap(values, confidence=0.8, resamples=40_000)
    assert one.value == 3.5
    assert one.low == pytest.approx(np.quantile(means, 0.1), abs=0.26)  # neighbouring means lie a quarter apart
    assert one.high == pytest.approx(np.quantile(means, 0.9), abs=0.26)


def test_bootstrap_is_seeded_and_agrees_with_the_normal_approximation() -> None:
    values = np.random.default_rng(3).normal(2, 5, 500)
    one = bootstrap(values)
    assert one == bootstrap(values) == bootstraps([values, values + 1])[0]
    assert one != bootstrap(values, seed=1)
    error = values.std() / math.sqrt(500)
    assert one.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert one.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
    assert bootstrap([0.25] * 9) == Interval(0.25, 0.25, 0.25, 9)


def test_bootstrap_covers_in_nineteen_of_twenty() -> None:
    rng = np.random.default_rng(0)
    covered = sum(one.low <= 0 <= one.high for one in (bootstrap(rng.normal(size=60), resamples=400, seed=s) for s in range(400)))
    assert 0.90 <= covered / 400 <= 0.98


def test_blocks_of_resamples_stand_for_all_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(5).random(300)
    whole = bootstrap(values)
    monkeypatch.setattr("stairstep.evaluation.statistics._CELLS", 7_000)
    parts = bootstrap(values)
    assert whole.low == pytest.approx(parts.low, abs=1e-12)  # the same draws, whatever the block
    assert whole.high == pytest.approx(parts.high, abs=1e-12)


def test_several_seeds_widen_the_interval_by_what_seeds_differ() -> None:
    rng = np.random.default_rng(1)
    questions = rng.random(200)
    runs = questions[None] + np.array([[-0.2], [0.0], [0.2]])
    one = bootstrap(runs)
    assert one.n == 200
    assert one.value == pytest.approx(questions.mean())
    seeds, noise = np.var([-0.2, 0, 0.2], ddof=1) / 3, questions.var() / 200
    assert (one.high - one.low) / 2 == pytest.approx(1.96 * math.sqrt(seeds + noise), rel=0.15)
    assert one.high - one.low > 2 * (bootstrap(questions).high - bootstrap(questions).low)


def test_paired_bootstrap_uses_the_pairs() -> None:
    rng = np.random.default_rng(2)
    first = rng.random(150)
    second = first + rng.normal(0.02, 0.03, 150)
    found = paired_bootstrap(first, second)
    error = (second - first).std() / math.sqrt(150)
    assert found.value == pytest.approx((second - first).mean())
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.15 * error)
    assert (found.n, found.seeds) == (150, (1, 1))
    assert found.p_value == pytest.approx(2 / 10_001)
    shuffled = paired_bootstrap(first, rng.permutation(second))
    assert shuffled.high - shuffled.low > 5 * (found.high - found.low)


def test_paired_bootstrap_of_equal_runs_finds_nothing() -> None:
    values = np.random.default_rng(2).random(50)
    same = paired_bootstrap(values, values)
    assert (same.value, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)
    assert 0.1 + 0.2 != 0.3
    assert paired_bootstrap([0.3] * 20, [0.1 + 0.2] * 20).p_value == 1.0  # equal but for rounding
    mirrored = paired_bootstrap(values, values[::-1])
    assert mirrored.value == pytest.approx(0, abs=1e-12)
    assert mirrored.p_value > 0.9
    with pytest.raises(ValueError, match="same questions"):
        paired_bootstrap(values, values[:-1])


def test_paired_bootstrap_over_seeds_does_not_believe_one_lucky_seed() -> None:
    rng = np.random.default_rng(4)
    questions = rng.random(400)
    base = np.stack([questions, questions, questions])
    lucky = np.stack([questions, questions, questions + 0.3])
    steady = np.stack([questions + 0.1] * 3)
    assert paired_bootstrap(base, lucky).p_value > 0.05
    assert paired_bootstrap(base, steady).p_value < 0.001
    assert paired_bootstrap(base, steady[:2]).seeds == (3, 2)


def test_two_seeds_widen_the_interval_by_what_two_seeds_say_of_all() -> None:
    """Drawn as (a, a), (a, b), (b, a) or (b, b), two seeds have half the variance that they show of their mean: (a - b)² / 4."""
    one = bootstrap([[0.4] * 50, [0.6] * 50])
    assert (one.low, one.high) == pytest.approx((0.5 - 0.1 * math.sqrt(2), 0.5 + 0.1 * math.sqrt(2)))
    variance = sum(place * (value - 0.5) ** 2 for place, value in ((0.25, one.low), (0.5, one.value), (0.25, one.high)))
    assert variance == pytest.approx((0.4 - 0.6) ** 2 / 4)
    assert bootstrap([[0.5] * 50, [0.5] * 50]) == Interval(0.5, 0.5, 0.5, 50)


def test_the_exact_test_is_used_for_rights_and_wrongs_of_one_run_each() -> None:
    def flipped(up: int, down: int, n: int = 400) -> tuple[list[bool], list[bool]]:
        return [False] * up + [True] * (n - up), [True] * (n - down) + [False] * down

    for up, down in ((0, 0), (4, 0), (5, 0), (6, 0), (3, 9), (0, 7), (60, 31)):
        found = paired_difference(*flipped(up, down))
        n = up + down
        exact = min(1.0, sum(2 * math.comb(n, k) for k in range(min(up, down) + 1)) / 2**n)
        assert (found.rose, found.fell, found.n) == (up, down, 400)
        assert found.p_value == pytest.approx(exact, rel=1e-12)
        assert found.value == pytest.approx((up - down) / 400)
        assert found.low <= found.value <= found.high
    # Six of six: not certain, as its interval of one point would have it.
    assert paired_difference([False] * 6, [True] * 6).p_value == 1 / 32
    halves = paired_difference([0.5] * 10, [0.5] * 9 + [1.0])
    assert (halves.rose, halves.fell, halves.p_value) == (1, 0, 1.0)
    several = paired_difference(*([side] * 2 for side in flipped(60, 31)))
    assert several == paired_bootstrap(*([side] * 2 for side in flipped(60, 31)))
    assert several.p_value != paired_difference(*flipped(60, 31)).p_value


def test_a_few_questions_are_never_more_than_as_many_coins() -> None:
    for differing in range(1, 9):
        first, second = [0.2] * 500, [0.2] * (500 - differing) + [0.9] * differing
        signs = [sum(one) for one in itertools.product((-1, 1), repeat=differing)]
        exact = sum(abs(one) >= differing for one in signs) / len(signs)
        found = paired_bootstrap(first, second)
        assert found.p_value >= exact
        assert paired_bootstrap([first, first], [second, second]).p_value >= exact
    assert paired_bootstrap([0.2] * 500, [0.2] * 100 + [0.9] * 400).p_value == pytest.approx(2 / 10_001)


def test_mcnemar_equals_the_enumerated_coin() -> None:
    for only_first, only_second in ((0, 0), (1, 0), (3, 9), (9, 3), (5, 5), (0, 8)):
        first = [True] * only_first + [False] * only_second + [True, False, True]
        second = [False] * only_first + [True] * only_second + [True, False, True]
        n, smaller = only_first + only_second, min(only_first, only_second)
        throws = [sum(one) for one in itertools.product((0, 1), repeat=n)]
        expected = min(1.0, 2 * sum(heads <= smaller for heads in throws) / len(throws))
        found = mcnemar(first, second)
        assert (found.only_first, found.only_second) == (only_first, only_second)
        assert found.p_value == pytest.approx(expected, rel=1e-12)
    assert 0 < mcnemar([True] * 1000 + [False] * 250, [False] * 1000 + [True] * 250).p_value < 1e-100


def test_holm_known_example_and_order() -> None:
    # Holm's procedure by hand: 4*.01, 3*.02 -> .06, 2*.03 -> .06, 1*.04 -> at least .06
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    with pytest.raises(ValueError, match="p-values"):
        holm([1.2])


def test_agrees_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    interval = stats.binomtest(312, 1000).proportion_ci(method="wilson")
    one = wilson(312, 1000)
    assert (one.low, one.high) == pytest.approx((interval.low, interval.high), rel=1e-12)
    first, second = [True] * 40 + [False] * 25, [False] * 40 + [True] * 25
    assert mcnemar(first, second).p_value == pytest.approx(stats.binomtest(25, 65).pvalue, rel=1e-12)

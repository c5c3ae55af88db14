"""The learning rate is a function of the update alone, and reaches what it promises."""

import itertools
import math

import pytest

from stairstep.training import ScheduleSettings, rate_factor


def curve(schedule: ScheduleSettings, steps: int, text_warmup: int = 0) -> list[float]:
    return [rate_factor(schedule, update, steps, text_warmup) for update in range(1, steps + 1)]


def test_warmup_rises_linearly_to_the_full_rate_and_never_starts_at_zero() -> None:
    rates = curve(ScheduleSettings("constant", warmup_steps=4), 8)
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0])


def test_cosine_falls_from_one_towards_its_floor() -> None:
    rates = curve(ScheduleSettings("cosine", warmup_steps=2, minimum=0.1), 102)
    assert rates[1] == rates[2] == 1.0
    assert rates[52] == pytest.approx(0.1 + 0.9 * 0.5, abs=1e-12)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[2:]))
    assert rates[-1] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.99)))


def test_restarts_return_to_the_full_rate() -> None:
    rates = curve(ScheduleSettings("cosine_restarts", cycles=3), 30)
    assert [index for index, rate in enumerate(rates) if rate == 1.0] == [0, 10, 20]


def test_fresh_schedule_after_text_warmup_warms_up_again_once() -> None:
    fresh = curve(ScheduleSettings("cosine", warmup_steps=2, fresh_after_text_warmup=True), 20, text_warmup=5)
    assert fresh[:5] == curve(ScheduleSettings("cosine", warmup_steps=2), 5)
    assert fresh[5:] == curve(ScheduleSettings("cosine", warmup_steps=2), 15)
    assert fresh[5] == 0.5, "the first step after the switch must not run at the full rate"
    assert curve(ScheduleSettings("cosine", warmup_steps=2), 20, text_warmup=5) != fresh

"""Shares of text steps are exact, and no batch of either kind is skipped or repeated."""

import pytest

from stairstep.settings import RecipeError, build, from_plain
from stairstep.training import PhasePlan, PhaseSettings


def kinds(settings: PhaseSettings, steps: int) -> str:
    plan = PhasePlan(settings, steps)
    return "".join("T" if plan.kind(step) == "text" else "." for step in range(1, steps + 1))


def test_warmup_is_a_hard_switch() -> None:
    assert kinds(PhaseSettings(text_warmup_steps=5), 12) == "TTTTT......."


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("warmup", [0, 7])
def test_the_share_is_exact_with_and_without_warmup(share: float, warmup: int) -> None:
    text = kinds(PhaseSettings(text_warmup_steps=warmup, text_mix=share), 107 if warmup else 100)
    assert text[:warmup] == "T" * warmup
    assert text[warmup : warmup + 100].count("T") == round(100 * share)


def test_a_curriculum_has_its_share_in_every_part() -> None:
    text = kinds(PhaseSettings(text_curriculum=(0.5, 0.33, 0.2, 0.0)), 400)
    assert [text[start : start + 100].count("T") for start in (0, 100, 200, 300)] == [50, 33, 20, 0]


@pytest.mark.parametrize(
    "settings",
    [PhaseSettings(5, 0.3), PhaseSettings(0, 0.7), PhaseSettings(4, 0.0, (0.5, 0.33, 0.2, 0.0)), PhaseSettings(), PhaseSettings(200)],
)
def test_every_batch_of_each_kind_is_used_once_and_in_order(settings: PhaseSettings) -> None:
    plan = PhasePlan(settings, 97)
    numbers: dict[str, list[int]] = {"text": [], "tile": []}
    for step in range(1, 98):
        numbers[plan.kind(step)].append(plan.ordinal(step))
    for seen in numbers.values():
        assert seen == list(range(len(seen)))
    assert len(numbers["text"]) + len(numbers["tile"]) == 97


def test_mix_and_curriculum_exclude_each_other() -> None:
    with pytest.raises(RecipeError, match="either text_mix or text_curriculum"):
        build(PhaseSettings, from_plain({"text_mix": 0.2, "text_curriculum": [0.5]}, "test"))

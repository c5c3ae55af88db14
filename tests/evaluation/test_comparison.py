"""Two evaluations compared question by question: against differences known by construction, in words that say no more than was shown."""

from __future__ import annotations

from typing import Any

import pytest

from stairstep.evaluation.comparison import compare_rows, compare_seeds, comparison_table
from stairstep.evaluation.statistics import paired_bootstrap
from stairstep.settings import InputError

KEYS = ("hit@1", "hit@3", "reciprocal_rank")


def rows(ranks: list[int]) -> list[dict[str, Any]]:
    return [{"id": f"q{index}", "hit@1": rank <= 1, "hit@3": rank <= 3, "reciprocal_rank": 1 / rank} for index, rank in enumerate(ranks)]


WEAK, STRONG = rows([9, 8, 2, 9, 7] * 12), rows([1, 8, 1, 2, 1] * 12)


def test_a_large_difference_is_told_in_its_direction() -> None:
    for first, second, verdict in ((WEAK, STRONG, "better"), (STRONG, WEAK, "worse")):
        found = compare_rows(first, second)
        assert [(one.metric, one.verdict) for one in found] == [("hit@1", verdict), ("hit@3", verdict), ("mrr", verdict)]
    hit = compare_rows(WEAK, STRONG)[0]
    assert (hit.first.value, hit.second.value) == (0.0, 0.6)
    assert hit.difference.value == pytest.approx(0.6)
    assert hit.difference.low > 0.4 and hit.difference.high < 0.8


def test_one_question_of_sixty_is_no_difference_shown() -> None:
    nearly = [{**row, "hit@1": True, "hit@3": True, "reciprocal_rank": 1.0} if row["id"] == "q0" else row for row in WEAK]
    assert compare_rows(WEAK, nearly)[0].difference.value > 0
    assert {one.verdict for one in compare_rows(WEAK, nearly)} == {"no difference shown"}
    assert {one.p_value for one in compare_rows(WEAK, WEAK)} == {1.0}


def test_the_order_of_the_rows_does_not_matter() -> None:
    assert compare_rows(WEAK, STRONG[::-1]) == compare_rows(WEAK, STRONG)


def test_p_values_are_corrected_for_the_number_of_metrics() -> None:
    middling = rows([1, 8, 2, 9, 7] * 2 + [9, 8, 2, 9, 7] * 10)
    raw = [paired_bootstrap([float(row[key]) for row in WEAK], [float(row[key]) for row in middling]).p_value for key in KEYS]
    corrected = [one.p_value for one in compare_rows(WEAK, middling)]
    assert min(raw) < 1
    assert min(corrected) == pytest.approx(min(1.0, 3 * min(raw)))
    assert all(one >= other for one, other in zip(corrected, raw, strict=True))
    alone = compare_rows(WEAK, middling, ["hit@1"])
    assert [one.p_value for one in alone] == raw[:1]


def test_answers_are_compared_over_the_questions_that_both_have_a_grade_for() -> None:
    def answered(side: list[dict[str, Any]], states: list[str]) -> list[dict[str, Any]]:
        graded = [{"state": state, **({"correct": state == "correct"} if state != "unanswered" else {})} for state in states]
        return [{**row, **one} for row, one in zip(side, graded, strict=True)]

    first = answered(WEAK, ["incorrect", "not_attempted", "correct", "unanswered", "incorrect"] * 12)
    second = answered(STRONG, ["correct", "correct", "correct", "correct", "unanswered"] * 12)
    found = {one.metric: one for one in compare_rows(first, second)}
    qa = found["qa"]
    assert (qa.first.n, qa.first.value, qa.second.value) == (36, pytest.approx(1 / 3), 1.0)
    assert qa.difference.value == pytest.approx(2 / 3)
    assert qa.verdict == "better"
    assert "qa" not in {one.metric for one in compare_rows(first, STRONG)}
    assert "QA" in comparison_table(list(found.values()), "a", "b")


@pytest.mark.parametrize("other", [STRONG[:-1], [*STRONG, {**STRONG[0], "id": "new"}], [*STRONG[:-1], {**STRONG[0], "id": "new"}]])
def test_other_questions_are_refused(other: list[dict[str, Any]]) -> None:
    with pytest.raises(InputError, match="not over the same questions"):
        compare_rows(WEAK, other)


def test_the_table_has_both_sides_and_the_verdict() -> None:
    header, hit, *_, mrr = comparison_table(compare_rows(WEAK, STRONG), "base", "step 60").splitlines()
    assert header.split() == ["base", "step", "60", "difference"]
    assert hit.startswith("R@1  .000 [.000 ") and "  .600 [" in hit and hit.endswith("  better")
    assert mrr.startswith("MRR  ")


def test_seeds_and_questions_are_counted_together() -> None:
    weak, strong = [rows([9, 8, 2, 9, 7] * 12)] * 2, [rows([1, 8, 1, 2, 1] * 12), rows([1, 1, 1, 2, 1] * 12)[::-1]]
    (hit,) = compare_seeds(weak, strong)
    assert hit.difference.seeds == (2, 2)
    assert (hit.first.value, hit.second.value, hit.difference.value) == (0.0, pytest.approx(0.7), pytest.approx(0.7))
    assert hit.verdict == "better"
    lucky = [rows([9, 8, 2, 9, 7] * 12)] * 3
    unlike = [rows([9, 8, 2, 9, 7] * 12), rows([9, 8, 2, 9, 7] * 12), rows([1, 1, 1, 1, 1] * 12)]
    assert compare_seeds(lucky, unlike)[0].verdict == "no difference shown", "one lucky seed of three shows nothing"
    with pytest.raises(InputError, match="not over the same questions"):
        compare_seeds(weak, [STRONG[:-1]])

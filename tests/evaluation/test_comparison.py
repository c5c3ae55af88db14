"""Two evaluations compared question by question: against differences known by construction, in words that say no more than was shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

from stairstep.evaluation.comparison import Compared, Comparison, compare, compare_family, comparison_table
from stairstep.evaluation.evaluated import Evaluated, Side
from stairstep.evaluation.statistics import paired_bootstrap
from stairstep.settings import InputError

Rows = list[dict[str, Any]]


def rows(ranks: Sequence[int]) -> Rows:
    return [
        {
            "id": f"q{index}",
            "problem": f"question {index}",
            "golden_ids": ["right"],
            "hit@1": rank <= 1,
            "hit@3": rank <= 3,
            "reciprocal_rank": 1 / rank,
            "retrieved": [{"article": "right" if place == rank else "wrong"} for place in range(1, 11)],
        }
        for index, rank in enumerate(ranks)
    ]


def answered(side: Rows, states: Sequence[str]) -> Rows:
    """Rows with a state each; only graded ones say whether they are right."""
    graded = ("correct", "incorrect", "not_attempted")
    return [
        {**row, "state": state, **({"correct": state == "correct"} if state in graded else {})}
        for row, state in zip(side, states, strict=True)
    ]


def side(*runs: Rows, name: str = "", step: int = 50, top_k_read: int | None = None, floor: float = 0.95) -> Side:
    return Side(name, [Evaluated(one, step, top_k_read, floor) for one in runs])


def by_metric(compared: Compared) -> dict[str, Comparison]:
    return {one.metric: one for one in compared.comparisons}


def exact(up: int, down: int) -> float:
    """The two-sided sign test by its sum."""
    n = up + down
    return min(1.0, sum(2 * math.comb(n, k) for k in range(min(up, down) + 1)) / 2**n)


def by_hand(p_values: Sequence[float]) -> list[float]:
    """Holm's procedure, a value at a time: the largest of all (m - rank) * p up to this one's rank."""
    ordered = sorted(p_values)
    return [min(1.0, max((len(ordered) - at) * ordered[at] for at in range(ordered.index(p) + 1))) for p in p_values]


WEAK, STRONG = rows([9, 8, 2, 9, 7] * 12), rows([1, 8, 1, 2, 1] * 12)


def test_a_large_difference_is_told_in_its_direction() -> None:
    for first, second, verdict in ((WEAK, STRONG, "better"), (STRONG, WEAK, "worse")):
        found = compare(side(first), side(second)).comparisons
        assert [(one.metric, one.verdict) for one in found] == [("hit@1", verdict), ("hit@3", verdict), ("mrr", verdict)]
    hit = compare(side(WEAK), side(STRONG)).comparisons[0]
    assert (hit.first.value, hit.second.value) == (0.0, 0.6)
    assert hit.difference.value == pytest.approx(0.6)
    assert hit.difference.low > 0.4 and hit.difference.high < 0.8
    assert (hit.difference.rose, hit.difference.fell, hit.difference.n) == (36, 0, 60)


def test_one_question_of_sixty_is_no_difference_shown() -> None:
    nearly = rows([1, 8, 2, 9, 7, *[9, 8, 2, 9, 7] * 11])
    assert compare(side(WEAK), side(nearly)).comparisons[0].difference.value > 0
    assert {one.verdict for one in compare(side(WEAK), side(nearly)).comparisons} == {"no difference shown"}
    assert {one.p_value for one in compare(side(WEAK), side(WEAK)).comparisons} == {1.0}


def test_a_few_flips_are_judged_by_the_exact_test_and_not_by_their_interval() -> None:
    """Four of 400 questions, all turned right: the bootstrap's interval leaves zero out, and four coins fall alike one time in eight."""
    before, after = rows([2] * 400), rows([1] * 4 + [2] * 396)
    (hit,) = compare(side(before), side(after), ["hit@1"]).comparisons
    assert hit.p_value == exact(4, 0) == 0.125
    assert paired_bootstrap([0] * 400, [1] * 4 + [0] * 396).low > 0, "the case is not here"
    assert hit.difference.low > 0 and hit.verdict == "no difference shown"
    for up, down, verdict in (
        (5, 0, "no difference shown"),
        (6, 0, "better"),
        (0, 6, "worse"),
        (12, 3, "better"),
        (11, 4, "no difference shown"),
    ):
        one, other = rows([2] * up + [1] * down + [2] * 300), rows([1] * up + [2] * down + [2] * 300)
        (hit,) = compare(side(one), side(other), ["hit@1"]).comparisons
        assert hit.p_value == pytest.approx(exact(up, down), rel=1e-12)
        assert (hit.difference.rose, hit.difference.fell, hit.verdict) == (up, down, verdict)


def test_the_order_of_the_rows_does_not_matter() -> None:
    assert compare(side(WEAK), side(STRONG[::-1])) == compare(side(WEAK), side(STRONG))


def test_p_values_are_corrected_for_all_metrics_of_all_that_was_compared() -> None:
    sides = [side(rows([1] * hits + [2] * 9 + [9] * (400 - 9 - hits)), name=f"{hits}") for hits in (100, 106, 115, 130)]
    pairs = [*pairwise(sides), (sides[0], sides[-1])]
    family = compare_family(pairs)
    raw = [one.difference.p_value for pair in family for one in pair.comparisons]
    corrected = [one.p_value for pair in family for one in pair.comparisons]
    assert len(raw) == 12 and {pair.family for pair in family} == {12}
    assert corrected == pytest.approx(by_hand(raw))
    hits = [by_metric(pair)["hit@1"] for pair in family]
    assert [one.difference.p_value for one in hits] == pytest.approx([exact(up, 0) for up in (6, 9, 15, 30)])
    # Alone the first step is a difference; among twelve that were looked at it is none, and the others stay.
    assert by_metric(compare(*pairs[0], ["hit@1"]))["hit@1"].verdict == "better"
    assert [one.verdict for one in hits] == ["no difference shown", "better", "better", "better"]
    assert [(pair.first, pair.second) for pair in family] == [("100", "106"), ("106", "115"), ("115", "130"), ("100", "130")]


def test_answers_are_compared_over_the_questions_that_both_have_a_grade_for() -> None:
    first = answered(WEAK, ["incorrect", "not_attempted", "correct", "unanswered", "incorrect"] * 12)
    second = answered(STRONG, ["correct", "correct", "correct", "correct", "ungraded"] * 12)
    found = by_metric(compare(side(first, top_k_read=3, floor=0.8), side(second, top_k_read=3, floor=0.8)))
    qa = found["qa"]
    assert (qa.first.n, qa.first.value, qa.second.value) == (36, pytest.approx(1 / 3), 1.0)
    assert qa.difference.value == pytest.approx(2 / 3)
    assert (qa.difference.rose, qa.difference.fell, qa.difference.n) == (24, 0, 36)
    assert qa.difference.p_value == pytest.approx(exact(24, 0))
    assert qa.verdict == "better"


def test_without_a_reader_on_both_sides_there_is_no_qa_and_one_side_is_named() -> None:
    first = answered(WEAK, ["incorrect"] * 60)
    nobody = compare(side(WEAK), side(STRONG))
    assert (set(by_metric(nobody)), nobody.left_out) == ({"hit@1", "hit@3", "mrr"}, ())
    one = compare(side(first, name="a", top_k_read=3), side(STRONG, name="b"))
    assert "qa" not in by_metric(one)
    assert one.left_out == ("QA: not compared: b asked no reader",)


def test_below_the_floor_there_is_no_score_to_compare() -> None:
    """400 questions of which one side has six grades: all right against all wrong, and still no score."""
    ranks = [1] * 400
    whole = answered(rows(ranks), ["correct"] * 400)
    few = answered(rows(ranks), ["incorrect"] * 6 + ["unanswered"] * 394)
    for first, second in ((whole, few), (few, whole)):
        names = ("few", "whole") if first is few else ("whole", "few")
        found = compare(side(first, name=names[0], top_k_read=3), side(second, name=names[1], top_k_read=3))
        assert set(by_metric(found)) == {"hit@1", "hit@3", "mrr"}
        assert found.left_out == ("QA: not compared: coverage of few is 1.5% of 400 questions, below the floor of 95.0%",)
        assert found.left_out[0] in comparison_table(found)
        assert found.family == 3
    at_the_floor = answered(rows(ranks), ["incorrect"] * 380 + ["unanswered"] * 20)
    below = answered(rows(ranks), ["incorrect"] * 379 + ["unanswered"] * 21)
    assert "qa" in by_metric(compare(side(whole, top_k_read=3), side(at_the_floor, top_k_read=3)))
    assert "qa" not in by_metric(compare(side(whole, top_k_read=3), side(below, top_k_read=3)))
    seeds = side(whole, below, whole, top_k_read=3)
    assert "qa" not in by_metric(compare(seeds, side(whole, top_k_read=3))), "every seed's coverage counts"


def test_reader_and_retriever_are_told_apart() -> None:
    """Twice the same rise of the QA score: once by finding what was missed, once by reading better what both had found."""
    found, missed = 3, 4  # ranks, of which a reader of three tiles is shown the first
    before = answered(rows([found] * 50 + [missed] * 50), ["correct"] * 20 + ["incorrect"] * 80)
    finds = answered(rows([found] * 80 + [missed] * 20), ["correct"] * 20 + ["incorrect"] * 30 + ["correct"] * 30 + ["incorrect"] * 20)
    reads = answered(rows([found] * 50 + [missed] * 50), ["correct"] * 50 + ["incorrect"] * 50)
    for after, shown, others in ((finds, (50, 0.0, 0), (50, 0.6, 30)), (reads, (50, 0.6, 30), (50, 0.0, 0))):
        compared = by_metric(compare(side(before, top_k_read=3), side(after, top_k_read=3)))
        assert compared["qa"].difference.value == pytest.approx(0.3)
        for metric, (n, difference, rose) in (("qa_shown", shown), ("qa_others", others)):
            one = compared[metric].difference
            assert (one.n, one.value, one.rose, one.fell) == (n, pytest.approx(difference), rose, 0)
            assert compared[metric].verdict == ("better" if rose else "no difference shown")
        parts = [compared[name].difference for name in ("qa_shown", "qa_others")]
        assert sum(one.n / 100 * one.value for one in parts) == pytest.approx(compared["qa"].difference.value)
    # What a reader was shown is its own top_k_read: of two tiles rank 3 is none.
    narrow = compare(side(before, top_k_read=2), side(reads, top_k_read=3))
    assert set(by_metric(narrow)) == {"hit@1", "hit@3", "mrr", "qa", "qa_others"}
    assert narrow.left_out == ("golden tile shown to both: not compared: there is no such question",)
    # A reader that failed on what was found alone: the whole has its coverage, the part has not.
    states = ["unanswered"] * 4 + ["incorrect"] * 96
    lost = compare(side(answered(rows([found] * 10 + [missed] * 90), states), name="a", top_k_read=3), side(reads, name="b", top_k_read=3))
    assert set(by_metric(lost)) == {"hit@1", "hit@3", "mrr", "qa", "qa_others"}
    assert "coverage of a is 60.0% of 10 questions" in lost.left_out[0]


@pytest.mark.parametrize(
    "other",
    [
        STRONG[:-1],
        [*STRONG, {**STRONG[0], "id": "new"}],
        [*STRONG[:-1], {**STRONG[0], "id": "new"}],
        [*STRONG[:-1], {**STRONG[-1], "problem": "another question with this id"}],
        [*STRONG[:-1], {**STRONG[-1], "golden_ids": ["another article"]}],
    ],
)
def test_other_questions_are_refused(other: Rows) -> None:
    with pytest.raises(InputError, match="not over the same questions"):
        compare(side(WEAK), side(other))
    with pytest.raises(InputError, match="not over the same questions"):
        compare(side(WEAK, WEAK), side(STRONG, other))


def test_every_line_of_the_table_has_its_questions_its_seeds_and_what_it_does_not_say() -> None:
    table = comparison_table(compare(side(WEAK, name="base", step=0), side(STRONG, name="step 60", step=60)))
    header, *lines, caveat, family = table.splitlines()
    assert header.split() == ["base", "step", "60", "difference", "up", "down", "n", "seeds", "p"]
    assert lines[0].startswith("R@1  .000 [.000 ") and "  .600 [" in lines[0]
    assert lines[-1].startswith("MRR  ")
    assert len(lines) == 3
    for line in lines:
        assert " 60  1, 1   <.001  better" in line
    assert "  +36  -0 " in lines[0].replace("   ", "  ")
    assert caveat == "1 seed a side: the verdicts hold for these two runs, not for their recipes"
    assert "3 comparisons" in family


def test_seeds_are_said_and_one_trained_run_against_several_is_named() -> None:
    three = side(*[STRONG] * 3, name="b")
    lines = comparison_table(compare(side(*[WEAK] * 2, name="a"), three)).splitlines()[1:-1]
    assert all("  2, 3  " in line and line.endswith("  better") for line in lines) and lines
    assert compare(side(WEAK, name="base", step=0), three).caveat == "", "the base has no seeds"
    assert compare(side(WEAK, name="a"), three).caveat == "1 seed of a: the verdicts hold for that run of it, not for its recipe"
    table = comparison_table(compare(side(WEAK, name="a"), three))
    assert "\n1 seed of a: the verdicts hold for that run of it, not for its recipe\n" in table


def test_seeds_and_questions_are_counted_together() -> None:
    weak, strong = [WEAK] * 2, [rows([1, 8, 1, 2, 1] * 12), rows([1, 1, 1, 2, 1] * 12)[::-1]]
    hit, *_ = compare(side(*weak), side(*strong)).comparisons
    assert hit.difference.seeds == (2, 2)
    assert (hit.first.value, hit.second.value, hit.difference.value) == (0.0, pytest.approx(0.7), pytest.approx(0.7))
    assert (hit.difference.rose, hit.difference.fell) == (48, 0)
    assert hit.verdict == "better"
    unlike = [WEAK, WEAK, rows([1, 1, 1, 1, 1] * 12)]
    one = compare(side(*[WEAK] * 3), side(*unlike)).comparisons[0]
    assert one.verdict == "no difference shown", "one lucky seed of three shows nothing"
    # Over seeds a question counts for QA where every run has a grade for it, and as shown where every run was shown the tile.
    first = answered(WEAK, ["incorrect"] * 58 + ["unanswered"] * 2)
    second = answered(STRONG, ["unanswered", *["correct"] * 59])
    found = by_metric(compare(side(answered(WEAK, ["incorrect"] * 60), first, top_k_read=3), side(second, second, top_k_read=3)))
    assert found["qa"].difference.n == 57
    shown = [place for place in range(1, 58) if place % 5 == 2]  # of five ranks on either side, the one that is at most 3 on both
    assert (found["qa_shown"].difference.n, found["qa_others"].difference.n) == (len(shown), 57 - len(shown))

"""The terminal's table of scores."""

from __future__ import annotations

import math

from stairstep.evaluation.statistics import Interval
from stairstep.evaluation.table import score_table, short


def test_lines_are_aligned_and_say_everything() -> None:
    scores = {
        "hit@1": Interval(0.312, 0.284, 0.341, 1000),
        "hit@10": Interval(1.0, 0.996, 1.0, 1000),
        "ndcg@5": Interval(0.0204, 0.0, 0.05, 1000),
    }
    assert score_table(scores, "tinywiki").splitlines() == [
        "tinywiki",
        "R@1      .312  [.284 .341]   n=1000",
        "R@10    1.000  [.996 1.000]  n=1000",
        "NDCG@5   .020  [.000 .050]   n=1000",
    ]
    assert score_table({"hit@1": Interval(0.312, 0.284, 0.341, 1000)}) == "R@1  .312  [.284 .341]  n=1000"


def test_numbers_keep_their_sign_and_nothing_is_a_dash() -> None:
    assert [short(value) for value in (-0.0204, -0.0001, 10.5, math.nan)] == ["-.020", ".000", "10.500", "-"]

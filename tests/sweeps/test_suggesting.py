"""Suggestions of Optuna's: a function of seed, number and known scores; within their ranges; drawn towards what scored well."""

from __future__ import annotations

import math
from typing import Any

import pytest

from stairstep.settings import InputError, build, from_plain
from stairstep.sweeps.space import Space
from stairstep.sweeps.suggesting import Scored, suggest

PARAMETERS = {
    "rate": {"kind": "loguniform", "low": 1e-5, "high": 1e-1},
    "rank": {"kind": "choice", "values": [4, 8.0, True, "1", 1]},
    "steps": {"kind": "randint", "low": 1, "high": 3},
}


def space(**more: Any) -> Space:
    return build(Space, from_plain({"parameters": PARAMETERS, "search": {"kind": "optuna", "samples": 40, "startup": 5}, **more}, "test"))


def test_the_same_question_has_the_same_answer():
    known = [Scored(suggest(space(), number, []), [float(number)]) for number in range(1, 9)]
    again = [suggest(space(), number, known) for number in (9, 9, 10)]
    assert again[0] == again[1] != again[2]
    assert suggest(space(), 9, known) != suggest(space(search={"kind": "optuna", "samples": 40, "startup": 5, "seed": 1}), 9, known)


def test_suggestions_stay_in_range_and_keep_their_types():
    found = [suggest(space(), number, []) for number in range(1, 60)]
    assert all(1e-5 <= one["rate"] <= 1e-1 for one in found)
    assert {one["steps"] for one in found} == {1, 2, 3}
    assert {(type(one["rank"]), one["rank"]) for one in found} == {(int, 4), (float, 8.0), (bool, True), (str, "1"), (int, 1)}


@pytest.mark.parametrize("mode", ["max", "min"])
def test_later_suggestions_lie_nearer_to_what_scored_well(mode: str):
    """A peak at 1e-3: what is suggested from scores is closer to it than what is suggested from none."""
    sign = 1 if mode == "max" else -1
    known: list[Scored] = []
    for number in range(1, 41):
        point = suggest(space(mode=mode), number, known)
        known.append(Scored(point, [-sign * (math.log10(point["rate"]) + 3) ** 2]))
    learned = [abs(math.log10(one.point["rate"]) + 3) for one in known[20:]]
    blind = [abs(math.log10(suggest(space(), number, [])["rate"]) + 3) for number in range(21, 41)]
    assert sum(learned) < 0.8 * sum(blind)


def test_several_objectives_and_conditions():
    both = space(also=[{"metric": "mrr", "mode": "min"}], skip=[{"when": {"steps": 2}, "reason": "x"}])
    known: list[Scored] = []
    for number in range(1, 20):
        point = suggest(both, number, known)
        known.append(Scored(point, [point["rate"], float(point["steps"])]))
    assert {one.point["steps"] for one in known} == {1, 3}
    nothing = space(skip=[{"when": {"steps": value}, "reason": "x"} for value in (1, 2, 3)])
    with pytest.raises(InputError, match="leaves out"):
        suggest(nothing, 1, [])

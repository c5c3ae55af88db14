"""Calls of an evaluation that a resumed run makes again: what was paid for before still counts, once."""

from __future__ import annotations

import json
from pathlib import Path

from stairstep.tasks.answering import with_earlier_calls


def test_what_was_asked_before_counts_with_what_is_asked_now(tmp_path: Path) -> None:
    summary = tmp_path / "eval_step4.summary.json"
    first = {"answer": {"model": "m", "hits": 10, "asked": 30, "waited": 2, "requests": 31, "prompt_tokens": 5, "cost": 0.5}}
    assert with_earlier_calls({"calls": first, "x": 1}, summary) == {"calls": first, "x": 1}
    summary.write_text(json.dumps({"calls": first}))
    # The same forty questions: thirty were asked then, of which nothing is saved now; one had failed in passing and is asked again.
    again = {"answer": {"model": "m", "hits": 39, "asked": 1, "waited": 0, "requests": 1, "prompt_tokens": 1, "cost": 0.1}}
    found = with_earlier_calls({"calls": again}, summary)["calls"]["answer"]
    assert found == {"model": "m", "hits": 9, "asked": 31, "waited": 2, "requests": 32, "prompt_tokens": 6, "cost": 0.6}
    assert again["answer"]["asked"] == 1  # what was given stays as it was


def test_an_evaluation_without_calls_stays_as_it_is(tmp_path: Path) -> None:
    assert with_earlier_calls({"x": 1}, tmp_path / "none.json") == {"x": 1}

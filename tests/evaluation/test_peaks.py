"""A peak picked on the selection split and told on the rest; the plain one beside it; steps without a score are left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stairstep.evaluation.peaks import peak, peaks_of_run


def summary(everything: float, selection: float, report: float, qa: float | None = None) -> dict[str, Any]:
    def side(value: float) -> dict[str, Any]:
        return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 50}

    parts = {"all": qa, "selection": qa, "report": qa}
    answered = {"qa": {name: {"score": value, "low": 0.0, "high": 1.0, "graded": 9} for name, value in parts.items()}}
    return {
        "metrics": {"hit@1": side(everything)},
        "selection": {"hit@1": side(selection)},
        "report": {"hit@1": side(report)},
        **(answered if qa is not None else {}),
    }


def test_the_step_is_picked_where_it_is_not_reported() -> None:
    found = peak({50: summary(0.70, 0.6, 0.5), 100: summary(0.68, 0.8, 0.4), 150: summary(0.69, 0.8, 0.9)}, "hit@1")
    assert found is not None
    assert (found.step, found.reported.value) == (100, 0.4), "the first of two equal ones; its score on the rest, whatever that is"
    assert (found.plain_step, found.plain.value, found.steps) == (50, 0.70, 3)
    assert "step 100" in found.line and ".400" in found.line and ".700 at step 50" in found.line


def test_what_has_no_score_has_no_peak() -> None:
    below_the_floor = summary(0.5, 0.5, 0.5, 0.0)
    for part in below_the_floor["qa"].values():
        part["score"] = None
    assert peak({50: below_the_floor}, "qa") is None
    assert peak({}, "hit@1") is None


def test_a_runs_peaks_leave_out_the_base(tmp_path: Path) -> None:
    for step, one in ((0, summary(0.9, 0.9, 0.9, 0.9)), (50, summary(0.2, 0.2, 0.2, 0.3))):
        (tmp_path / f"eval_step{step}.summary.json").write_text(json.dumps(one))
    assert [(one.metric, one.step, one.plain.value) for one in peaks_of_run(tmp_path)] == [("hit@1", 50, 0.2), ("qa", 50, 0.3)]

"""`jobs.evaluate --reread` and `--regrade` as a person runs them: only what is missing is asked, and the rest of a row stays as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Job = Callable[..., Any]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_only_what_is_missing_is_filled_in(job: Job, small: Any) -> None:
    assert job("train", small.recipe).code == 0
    run = small.runs / "small"
    rows, summary = run / "eval_step1.jsonl", run / "eval_step1.summary.json"
    whole, told = rows_of(rows), json.loads(summary.read_text())
    assert [row["state"] for row in whole if "correct" in row] == [row["state"] for row in whole], "all are graded"
    lacking = [dict(row) for row in whole]
    for row in lacking[:2]:
        row.pop("correct")
        row.pop("grade")
    lacking[0] |= {"predicted": None, "state": "unanswered", "reason": "the port was dead"}
    lacking[1] |= {"state": "ungraded", "reason": "the key had expired"}
    rows.write_text("".join(json.dumps(row) + "\n" for row in lacking))

    regraded = job("evaluate", "--regrade", run)
    assert regraded.code == 0, regraded.err
    assert "1 of 1 filled in" in regraded.out
    assert [row["state"] for row in rows_of(rows)] == ["unanswered", *(row["state"] for row in whole[1:])]
    assert json.loads(summary.read_text())["qa"]["all"]["states"]["unanswered"] == 1

    reread = job("evaluate", "--reread", run)
    assert reread.code == 0, reread.err
    assert rows_of(rows) == whole
    mended = json.loads(summary.read_text())
    assert mended["qa"] == told["qa"]
    assert mended["calls_to_mend"][-1]["answer"]["asked"] == 0, "the ledger knew the answer"
    assert "nothing is missing" in job("evaluate", f"--reread={run}").out


def test_a_folder_without_a_run_is_told(job: Job, tmp_path: Path) -> None:
    told = job("evaluate", "--regrade", tmp_path)
    assert told.code == 2
    assert "recipe.yaml" in told.err

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


def test_a_summary_that_is_behind_its_rows_is_brought_up_to_date(job: Job, small: Any) -> None:
    """As after a mending that was killed between its two writes."""
    assert job("train", small.recipe).code == 0
    run = small.runs / "small"
    summary, log = run / "eval_step1.summary.json", run / "metrics.jsonl"
    whole, logged = json.loads(summary.read_text()), log.read_bytes()
    behind = json.loads(summary.read_text())
    behind["qa"]["all"] |= {"score": None, "coverage": 0.0}
    behind["missing"] = [{"reason": "the port was dead", "questions": 4}]
    summary.write_text(json.dumps(behind))
    rows = (run / "eval_step1.jsonl").read_bytes()

    told = job("evaluate", "--reread", run)
    assert told.code == 0, told.err
    assert "eval_step1.jsonl: nothing is missing; its summary was brought up to date" in told.out
    assert "eval_step0" not in told.out
    assert json.loads(summary.read_text()) == whole
    assert (run / "eval_step1.jsonl").read_bytes() == rows
    assert log.read_bytes() == logged
    assert "nothing is missing" in job("evaluate", "--regrade", run).out


def test_a_run_without_a_reader_can_be_read_later(job: Job, small: Any) -> None:
    reader = json.dumps({"kind": "local", "model": "tiny-reader"})
    assert job("train", small.recipe, "evaluation.reader=null", "evaluation.pairs=4").code == 0
    run = small.runs / "small"
    rows = run / "eval_step1.jsonl"
    assert not any("state" in row for row in rows_of(rows))
    assert (run / "held_out_pairs" / "eval_step1.jsonl").exists()

    told = job("evaluate", "--reread", run)
    assert told.code == 2 and "names no reader" in told.err
    told = job("evaluate", "--regrade", run, f"evaluation.reader={reader}")
    assert told.code == 2 and "never asked" in told.err and "--reread" in told.err

    told = job("evaluate", "--reread", run, f"evaluation.reader={reader}")
    assert told.code == 0, told.err
    assert "eval_step1.jsonl: 4 of 4 filled in" in told.out and "held_out_pairs" not in told.out
    assert all(row["state"] in ("correct", "incorrect", "not_attempted") for row in rows_of(rows))
    assert json.loads((run / "eval_step1.summary.json").read_text())["qa"]["all"]["coverage"] == 1.0


def test_a_flag_that_would_do_nothing_is_refused(job: Job, small: Any) -> None:
    for flag in ("--regrade", "--reread"):
        told = job("evaluate", flag, small.runs, "--fresh")
        assert told.code == 2 and "--fresh is of no use here" in told.err


def test_a_flag_is_written_out(job: Job, small: Any) -> None:
    """A shortened one was taken for an evaluation of the recipe beside it."""
    for short in ("--regr", "--rer", "--che"):
        told = job("evaluate", short, small.runs, small.recipe)
        assert told.code == 2 and f"unrecognized arguments: {short}" in told.err, told.err
    assert not small.runs.exists()

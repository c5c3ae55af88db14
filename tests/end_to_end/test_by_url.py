"""Jobs over runs and sweeps in an object store, as a person runs them; training itself by URL is in tests/tasks/test_run_on_objects.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from s3_server import S3Server

sys.path.insert(0, str(Path(__file__).parents[1] / "board"))

from board_world import write_staircase

Job = Callable[..., Any]
SPACE = "parameters:\n  optim.batch: {kind: grid, values: [2, 4]}\n"
ROOT = "stairs/runs"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has seen nothing of the store."""
    monkeypatch.setenv("STAIRSTEP_CACHE", str(tmp_path / "cache"))


def another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STAIRSTEP_CACHE", str(tmp_path / "another"))


@pytest.fixture
def staircase(s3: S3Server, tmp_path: Path) -> str:
    """The URL of a sweep of three steps whose trials have ended."""
    sweep = write_staircase(tmp_path / "stairs", n=30, seeds=(0,))
    (sweep.path / "recipe.yaml").write_text("optim: {steps: 20}\n")
    for path in sweep.path.rglob("*"):
        if path.is_file():
            s3.put(f"{ROOT}/stairs/{path.relative_to(sweep.path).as_posix()}", path.read_bytes())
    return s3.url(f"{ROOT}/stairs")


def test_a_sweep_is_reported_shown_and_its_trials_compared(job: Job, s3: S3Server, staircase: str):
    told = job("report", staircase)
    assert (told.code, told.out) == (0, f"s3://{ROOT}/stairs/report.html\n"), told.err
    assert s3.objects[f"{ROOT}/stairs/report.html"].startswith(b"<!doctype html>")
    told = job("report", staircase, "--text")
    assert (told.code, "R@1, step by step" in told.out) == (0, True), told.err
    shown, below = job("status", staircase), job("status", s3.url(ROOT))
    for one in (shown, below):
        assert (one.code, one.err) == (0, "")
        assert "a sweep of 3 trials (3 finished)" in one.out
        assert [line.split()[0] for line in one.out.splitlines()[1:]] == ["000-plain-seed0", "001-hard-seed0", "002-same-seed0"]
    first, second = (s3.url(f"{ROOT}/stairs/runs/{name}:20") for name in ("000-plain-seed0", "001-hard-seed0"))
    told = job("compare", first, second)
    assert told.code == 0, told.err
    assert "000-plain-seed0 step 20" in told.out


def test_what_a_sweep_would_do_and_what_is_not_there(job: Job, s3: S3Server, staircase: str, small: Any, tmp_path: Path):
    (tmp_path / "space.yaml").write_text(SPACE)
    told = job("sweep", small.recipe, tmp_path / "space.yaml", f"run.root={s3.url(ROOT)}", "--dry-run")
    assert told.code == 0, told.err
    assert "002-batch_4-seed0" in told.out
    before = dict(s3.objects)
    told = job("sweep", "--resume", "gone", "--root", s3.url(ROOT))
    assert told.code == 2
    assert "there is no sweep 'gone' below s3://stairs/runs?" in told.err and "there are stairs;" in told.err
    told = job("sweep", "--resume", f"{s3.url(ROOT)}&secret=abc")
    assert told.code == 2 and "this URL holds credentials" in told.err and "abc" not in told.err
    assert s3.objects == before


def test_a_climb_by_url_is_compared_again_on_another_machine(job: Job, s3: S3Server, small: Any, tmp_path: Path, monkeypatch: Any):
    own = ["stairstep", small.recipe, "--seeds", "0", "--out", tmp_path / "climb.json", "--set", f"run.root={s3.url(ROOT)}"]
    told = job(*own, "evaluation.reader=null")
    assert told.code == 0, told.err
    figures = json.loads((tmp_path / "climb.json").read_text())
    assert [(one["before"], one["after"]) for one in figures] == [("base", "small")]
    logged = s3.objects[f"{ROOT}/small-seed0/metrics.jsonl"]
    another_machine(monkeypatch, tmp_path)
    again = job(*own, "evaluation.reader=null")
    assert again.code == 0, again.err
    assert "small, seed 0: finished before; s3://stairs/runs/small-seed0?" in again.out
    assert json.loads((tmp_path / "climb.json").read_text()) == figures
    assert s3.objects[f"{ROOT}/small-seed0/metrics.jsonl"] == logged


def test_what_a_run_lacks_is_filled_in_by_url(job: Job, s3: S3Server, small: Any, tmp_path: Path, monkeypatch: Any):
    assert job("train", small.recipe, f"run.root={s3.url(ROOT)}").code == 0
    rows, summary = f"{ROOT}/small/eval_step1.jsonl", f"{ROOT}/small/eval_step1.summary.json"
    before = dict(s3.objects)
    lacking = [json.loads(line) for line in before[rows].splitlines()]
    for row in lacking[:2]:
        row.pop("correct")
        row.pop("grade")
    lacking[0] |= {"predicted": None, "state": "unanswered", "reason": "the port was dead"}
    lacking[1] |= {"state": "ungraded", "reason": "the key had expired"}
    s3.put(rows, "".join(json.dumps(row) + "\n" for row in lacking).encode())

    another_machine(monkeypatch, tmp_path)
    told = job("evaluate", "--reread", s3.url(f"{ROOT}/small"))
    assert told.code == 0, told.err
    assert "2 of 2 filled in" in told.out
    assert s3.objects[rows] == before[rows]
    mended = json.loads(s3.objects[summary])
    assert mended["qa"] == json.loads(before[summary])["qa"]
    assert mended["calls_to_mend"][-1]["answer"]["asked"] == 0, "the ledger in the store knew the answer"
    assert set(before) <= set(s3.objects), "its checkpoint, which was not brought, is there all the same"
    assert f"{ROOT}/small/.lock" not in s3.objects
    assert not list((tmp_path / "another").rglob("checkpoint-*"))
    told = job("evaluate", "--regrade", s3.url(f"{ROOT}/small"))
    assert (told.code, told.out) == (0, f"{s3.url(f'{ROOT}/small')}: nothing is missing\n")
    told = job("evaluate", "--reread", s3.url(f"{ROOT}/gone"))
    assert told.code == 2 and "no run and no sweep is here" in told.err

"""python -m jobs.status as a user runs it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_a_wrong_folder_is_one_line_and_exit_code_2(job: Callable[..., Any]):
    told = job("status", "nowhere")
    assert (told.code, told.out) == (2, "")
    assert told.err.startswith("error: nowhere: there is no such folder") and told.err.count("\n") == 1


def test_the_default_is_the_folder_of_runs_and_watching_repeats(tmp_path: Path, monkeypatch, capsys):
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("optim: {steps: 4}\n")
    (run / "status.json").write_text('{"state": "finished", "step": 4, "of": 4, "heartbeat": 0, "pid": 1, "host": "h"}')
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    job = importlib.import_module("jobs.status")
    assert job.main([]) == 0
    assert capsys.readouterr().out == "  mine  finished  4/4\n"

    class Enough(Exception):
        pass

    rested: list[float] = []

    def rest(seconds: float) -> None:
        rested.append(seconds)
        if len(rested) == 2:
            raise Enough

    monkeypatch.setattr(job, "time", SimpleNamespace(sleep=rest))  # threads of other tests sleep too
    with pytest.raises(Enough):
        job.main(["runs", "--watch"])
    assert capsys.readouterr().out == "  mine  finished  4/4\n" * 2

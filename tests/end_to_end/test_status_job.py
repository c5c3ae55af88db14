"""python -m jobs.status as a user runs it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def status(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'platform'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "jobs.status", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_a_wrong_folder_is_one_line_and_exit_code_2(tmp_path: Path):
    found = status("nowhere", cwd=tmp_path)
    assert found.returncode == 2
    assert found.stdout == ""
    assert found.stderr.startswith("error: nowhere: there is no such folder") and found.stderr.count("\n") == 1


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

    monkeypatch.setattr(job.time, "sleep", rest)
    with pytest.raises(Enough):
        job.main(["runs", "--watch"])
    assert capsys.readouterr().out == "  mine  finished  4/4\n" * 2

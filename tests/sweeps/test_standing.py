"""How runs and sweeps stand, from folders made by hand: every figure that is printed is one that was put there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stairstep.records import RunFolder
from stairstep.records.files import host_name
from stairstep.settings import InputError
from stairstep.sweeps import SweepFolder, SweepPlan, TrialRecord
from stairstep.sweeps.standing import standing_of
from stairstep.sweeps.standing_text import run_lines, span, status_lines

RECIPE = """
run: {name: r}
data: {train: [{path: t.jsonl}]}
optim: {steps: 100, batch: 8}
phases: {text_warmup_steps: 10}
evaluation: {every: 40, sets: [{path: q.json}]}
"""
NOW = 10_000.0


def make_run(path: Path, state: str = "running", step: int = 50, heartbeat: float = NOW - 4, **more: Any) -> Path:
    """A run of 100 steps, of two seconds each from time 5000 on, a tenth of which it waited for data."""
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(more.pop("recipe", RECIPE))
    status = {"state": state, "step": step, "of": 100, "heartbeat": heartbeat, "pid": os.getpid(), "host": host_name(), **more}
    (path / "status.json").write_text(json.dumps(status))
    rows = [
        {"step": one, "time": 5000.0 + 3 * one, "train/loss": 1 / one, "time/step_seconds": 2.0, "time/wait_seconds": 0.2}
        for one in range(1, step + 1)
    ]
    rows.insert(20, {"step": 20, "time": 5061.0, "validation/loss": 0.75})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 51, "ti')
    return path


def evaluated(path: Path, step: int, hit: float, qa: float | None = None) -> None:
    one = {"value": hit, "low": 0, "high": 1, "n": 9}
    summary = {"step": step, "name": "q", "metrics": {"hit@1": one}, "selection": {"hit@1": one}, "qa": {"all": {"score": qa}}}
    (path / f"eval_step{step}.summary.json").write_text(json.dumps(summary))


def test_a_run_at_work(tmp_path: Path):
    path = make_run(tmp_path / "r")
    evaluated(path, 0, 0.25, 0.125)
    evaluated(path, 40, 0.5)
    one = standing_of(path, NOW)
    assert (one.phase, one.left_s, one.evaluated, one.due, one.trouble) == ("main", 150.0, [0, 40], [80, 100], "")
    assert one.pace is not None and one.pace.steps == 20
    assert run_lines(one) == [
        f"{path}: running, step 50 of 100, phase main, 2 min left",
        "  0.5 steps/s, 4 rows/s, 10% waiting for data (last 20 steps)",
        "  loss 0.0200 at step 50, validation loss 0.7500 at step 20",
        "  evaluations: done at steps 0, 40, next at step 80",
        "  step 40: R@1 0.500",
        f"  last word 4 s ago, by process {os.getpid()} on {host_name()}",
    ]


def test_only_this_sessions_steps_make_the_time_left(tmp_path: Path):
    """A run that lay still for an hour between step 30 and its resume."""
    path = make_run(tmp_path / "r")
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()[:-1]]
    for row in rows:
        row["time"] += 3600.0 if row["step"] > 30 else 0.0
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert standing_of(path, NOW).left_s == pytest.approx((3600 + 3 * 49) / 49 * 50)
    (path / "environment.json").write_text('{"from_step": 30}')
    assert standing_of(path, NOW).left_s == pytest.approx(150)


def test_the_text_phase_the_first_step_and_a_run_without_question_sets(tmp_path: Path):
    path = make_run(tmp_path / "r", step=1, recipe=RECIPE.replace("sets: [{path: q.json}]", "sets: []"))
    one = standing_of(path, NOW)
    assert (one.phase, one.left_s, one.due) == ("text_warmup", None, [])
    assert "  evaluations: none" in run_lines(one)


def test_an_evaluation_that_goes_on_and_those_that_wait(tmp_path: Path):
    path = make_run(tmp_path / "r", "evaluating", step=80)
    evaluated(path, 0, 0.25)
    assert "  evaluations: done at step 0, step 80 being evaluated, waiting: step 40, next at step 100" in run_lines(standing_of(path, NOW))


def test_gpu_evaluations_beside_training_and_the_reader(tmp_path: Path):
    path = make_run(tmp_path / "r", step=90, gpu={"busy": 0.5, "reserved_gb": 31.4, "total_gb": 141.0})
    evaluated(path, 0, 0.25)
    (path / "beside").mkdir()
    for step in (0, 40, 80):
        (path / "beside" / f"wanted-{step}").touch()
    (path / "beside" / "found-0.json").write_text("{}")
    reading = {"step": 40, "name": "q", "done": 10, "of": 40, "asked": 4, "seconds": 3.0, "time": NOW}
    (path / "reading.json").write_text(json.dumps(reading))
    one = standing_of(path, NOW)
    assert one.open == [40, 80]
    assert run_lines(one)[3:6] == [
        "  GPU 50% busy, 31.4 of 141 GB, of the first worker",
        "  evaluations: done at step 0, open beside training: steps 40, 80, next at step 100",
        "  q at step 40: 10 of 40 questions done, reader 0.75 s an answer",
    ]
    row = "0.5 steps/s, 10% waiting, GPU 50% busy, 31.4 of 141 GB, 2 evaluations open, reader 0.75 s an answer, step 0: R@1 0.250"
    assert status_lines(tmp_path, NOW) == [f"  r  running  90/100, main, 30 s left, {row}"]
    (path / "reading.json").write_text(json.dumps({**reading, "done": 40}))
    assert "  reader 0.75 s an answer at step 40" in run_lines(standing_of(path, NOW))
    (path / "reading.json").write_text(json.dumps({**reading, "done": 40, "asked": 0, "seconds": 0.0}))
    assert not any("reader" in line for line in run_lines(standing_of(path, NOW)))


def test_a_finished_run_has_no_time_left_and_is_never_silent(tmp_path: Path):
    path = make_run(tmp_path / "r", "finished", step=100, heartbeat=0.0, message="converged")
    text = "\n".join(run_lines(standing_of(path, NOW)))
    assert text.startswith(f"{path}: finished, step 100 of 100 (converged)\n")
    assert not any(word in text for word in ("left", "last word", "SILENT", "DEAD", "STALLED"))


def test_a_dead_run_a_silent_one_a_slow_one_and_one_that_left_its_stacks(tmp_path: Path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    dead = standing_of(make_run(tmp_path / "dead", pid=child.pid), NOW)
    assert dead.trouble == "dead"
    assert "  DEAD: its process is gone; the same command goes on from its last checkpoint" in run_lines(dead)
    silent = standing_of(make_run(tmp_path / "silent", heartbeat=NOW - 300), NOW)
    assert silent.trouble == "silent"
    assert "  SILENT for 5 min" in run_lines(silent)
    slow = make_run(tmp_path / "slow", heartbeat=NOW - 300)
    (slow / "metrics.jsonl").write_text('{"step": 50, "time": 9000, "train/loss": 1, "time/step_seconds": 200, "time/wait_seconds": 0}\n')
    assert standing_of(slow, NOW).trouble == ""
    assert standing_of(slow, NOW + 400).trouble == "silent"

    stalled = make_run(tmp_path / "stalled", heartbeat=NOW - 300)
    stacks = stalled / "stalled.txt"
    stacks.write_text("Thread …")
    os.utime(stacks, (NOW - 400, NOW - 400))
    assert standing_of(stalled, NOW).trouble == "silent", "those stacks are of a stall that was over before the last heartbeat"
    os.utime(stacks, (NOW - 200, NOW - 200))
    assert f"  STALLED: its threads stand as {stacks} has them" in run_lines(standing_of(stalled, NOW))


def test_an_evaluator_that_hangs_stalls_only_the_run_that_waits_for_it(tmp_path: Path):
    for state, trouble in (("running", ""), ("evaluating", "stalled")):
        path = make_run(tmp_path / state, state, heartbeat=NOW - 30)  # type: ignore[arg-type]
        stacks = path / "stalled-evaluation-40.txt"
        stacks.write_text("Thread …")
        os.utime(stacks, (NOW - 10, NOW - 10))
        one = standing_of(path, NOW)
        assert one.trouble == trouble
        assert any(str(stacks) in line for line in run_lines(one)) == (trouble == "stalled")


def test_a_folder_of_runs_is_a_line_each_and_one_that_cannot_be_read_stops_no_other(tmp_path: Path):
    good = make_run(tmp_path / "good")
    evaluated(good, 40, 0.5, 0.25)
    make_run(tmp_path / "broken", recipe="optim: {stepz: 1}")
    failed = make_run(tmp_path / "failed", "failed", message="the loss is not finite")
    (tmp_path / "worlds").mkdir()
    for place, path in enumerate((failed, tmp_path / "broken", good)):
        os.utime(path / "status.json", (place, place))
    lines = status_lines(tmp_path, NOW)
    assert len(lines) == 3
    assert lines[0] == "  failed  failed   50/100, the loss is not finite"
    assert lines[1].startswith("  broken  ?        ") and "stepz" in lines[1]
    assert lines[2] == "  good    running  50/100, main, 2 min left, 0.5 steps/s, 10% waiting, step 40: R@1 0.500, QA 0.250"


def test_a_sweep_is_a_line_a_trial(tmp_path: Path):
    sweep = SweepFolder(tmp_path / "s")
    sweep.make()
    states = ("finished", "running", "stopped", "failed", "waiting")
    reasons = {"stopped": "asha: worse", "failed": "no such file"}
    for number, state in enumerate(states, start=1):
        point = {"optim.batch": 4 * number}
        sweep.write_trial(
            TrialRecord(number, f"t{number}", point, (), 0, state=state, reason=reasons.get(state, ""), seconds=720.0, workers=2)
        )  # type: ignore[arg-type]
    sweep.write_plan(SweepPlan("s", "r.yaml", "s.yaml", (), {}, {}, (0,), ("hit@1",), ("max",)))
    evaluated(make_run(sweep.run_path("t1"), "finished", step=100), 100, 0.75)
    make_run(sweep.run_path("t2"), heartbeat=NOW - 300)
    assert status_lines(sweep.path, NOW) == [
        f"{sweep.path}: a sweep of 5 trials (1 finished, 1 running, 1 stopped, 1 failed, 1 waiting); 2.00 device hours; by hit@1",
        "  t1  finished  hit@1 0.750 at step 100, batch 4, seed 0",
        "  t2  SILENT    50/100, main, 2 min left, 0.5 steps/s, 10% waiting, batch 8, seed 0",
        "  t3  stopped   asha: worse, batch 12, seed 0",
        "  t4  failed    no such file, batch 16, seed 0",
        "  t5  waiting   batch 20, seed 0",
    ]
    assert status_lines(tmp_path, NOW) == status_lines(sweep.path, NOW), "a folder with the sweep alone"


def test_what_is_no_run_is_told(tmp_path: Path):
    with pytest.raises(InputError, match="there is no such folder; expected a run, a sweep"):
        status_lines(tmp_path / "x")
    with pytest.raises(InputError, match="no run and no sweep is here"):
        status_lines(tmp_path)
    assert not RunFolder(tmp_path).holds_run()


def test_spans_of_time():
    assert [span(one) for one in (0.4, 119, 120, 7199, 7200, 90000)] == ["0 s", "119 s", "2 min", "119 min", "2 h 00 min", "25 h 00 min"]

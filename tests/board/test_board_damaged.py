"""One damaged file of one run or trial: it is named with what is wrong, costs what it alone would have said, and hides no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from board_world import ranks, write_grid, write_run, write_staircase

from stairstep.board import Board, Folders, as_csv, board_text, content, html_page
from stairstep.settings import to_yaml

Change = Callable[[Any], Any]


def changed(path: Path, change: Change) -> None:
    plain = json.loads(path.read_text())
    path.write_text(json.dumps(change(plain) or plain))


def all_views(*paths: Path) -> tuple[Board, str]:
    """A board, of which every view has been made, and its text."""
    folders = Folders(list(paths))
    board = folders.read()
    html_page(content(board, folders, 4))
    as_csv(board)
    return board, board_text(board, folders)


SUMMARIES: dict[str, Change] = {
    "metrics.hit@1.n: expected a whole number": lambda one: one["metrics"]["hit@1"].pop("n") and None,
    "metrics.hit@1.value: expected a number": lambda one: one["metrics"]["hit@1"].update(value="high"),
    "metrics: expected keys with values": lambda one: one.update(metrics=[1]),
    "selection: expected keys with values": lambda one: one.update(selection=None),
    "qa.all: expected keys with values": lambda one: one.update(qa={}),
    "qa: expected keys with values": lambda one: one.update(qa=None),
    "qa.all.coverage: expected a number": lambda one: one["qa"]["all"].update(coverage="most"),
    "qa.all.bounds: expected two numbers": lambda one: one["qa"]["all"].update(bounds=[1]),
    "calls.answer.asked: expected a number": lambda one: one["calls"]["answer"].update(asked="many"),
    "timings.embed_s: expected a number": lambda one: one["timings"].update(embed_s=None),
    "questions: expected a whole number": lambda one: one.update(questions="twenty"),
    "tiles_dir: expected text": lambda one: one.update(tiles_dir=7),
    "expected keys with values": lambda one: [1],
}


@pytest.mark.parametrize("words", SUMMARIES)
def test_a_summary(tmp_path, words):
    a, b = (write_run(tmp_path / name, {0: ranks(20, 0.2, 0), 20: ranks(20, 0.5, 1)}, states=["correct"] * 20) for name in "ab")
    changed(a.path / "eval_step20.summary.json", SUMMARIES[words])
    board, text = all_views(a.path, b.path)
    assert [len(run.evaluations) for run in board.runs] == [1, 2]
    [problem] = board.runs[0].problems
    assert "eval_step20.summary.json: " + words in problem
    assert problem in text


LOGS = {
    '{"step": 3, "validation/loss": "low"}': "validation/loss: expected a number, found",
    '{"step": 3, "time/step_seconds": [1]}': "time/step_seconds: expected a number, found",
    '{"step": "3", "train/loss": 1.0}': "a line without a step",
    "[3]": "a line that is no event",
    '{"step": 3, "nonfinite": {"train/loss": "often"}}': "a line that is no event",
}


@pytest.mark.parametrize("line", LOGS)
def test_a_log(tmp_path, line):
    a, b = (write_run(tmp_path / name, {20: ranks(20, 0.5, 0)}) for name in "ab")
    with open(a.path / "metrics.jsonl", "a") as log:
        log.write(line + "\n")
    board, text = all_views(a.path, b.path)
    assert LOGS[line] in text
    assert board.runs[0].log == []
    assert [len(run.evaluations) for run in board.runs] == [1, 1]
    assert board.runs[1].series("validation/loss")


def test_a_loss_that_was_not_finite_is_no_damage(tmp_path):
    run = write_run(tmp_path / "a", {20: ranks(20, 0.5, 0)})
    run.metrics.append(21, {"train/loss": float("nan"), "validation/loss": float("inf"), "note": "a text of another"})
    board, _ = all_views(run.path)
    assert board.runs[0].problems == []
    assert board.runs[0].step == 21


RECIPES: dict[str, dict[str, Any]] = {
    "evaluation: expected keys with values": {"evaluation": None},
    "run.seed: expected a whole number": {"run": {"seed": "first"}},
    "cluster.workers: expected a whole number": {"cluster": {"workers": "two"}},
    "data.roots: expected a list of folders": {"data": {"roots": [7]}},
}


@pytest.mark.parametrize("words", RECIPES)
def test_a_recipe(tmp_path, words):
    a, b = (write_run(tmp_path / name, {20: ranks(20, 0.5, 0)}) for name in "ab")
    (a.path / "recipe.yaml").write_text(to_yaml(RECIPES[words]))
    board, text = all_views(a.path, b.path)
    assert f"recipe.yaml: {words}" in text
    assert [len(run.evaluations) for run in board.runs] == [1, 1]


@pytest.mark.parametrize(("name", "value"), [("heartbeat", "now"), ("pid", "mine"), ("step", None), ("host", 1)])
def test_a_status(tmp_path, name, value):
    run = write_run(tmp_path / "a", {20: ranks(20, 0.5, 0)})
    run.set_status("running", 3, 20)
    changed(run.path / "status.json", lambda one: one.update({name: value}))
    board, text = all_views(run.path)
    assert f"status.json: {name}: expected" in text
    assert board.runs[0].last is not None
    assert Folders([run.path]).stamp()


ROWS: dict[str, Change] = {
    "a metric": lambda row: row.update({"hit@1": "yes"}),
    "tiles": lambda row: row.update(retrieved=[{"path": "x.png"}]),
    "a score of a tile": lambda row: row["retrieved"][0].update(score="high"),
    "a grade": lambda row: row.pop("correct") and None,
}


@pytest.mark.parametrize("what", ROWS)
def test_a_row(tmp_path, what):
    a, b = (write_run(tmp_path / name, {20: ranks(20, 0.5, 0)}, states=["correct"] * 20) for name in "ab")
    path = a.path / "eval_step20.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    ROWS[what](rows[1])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, text = all_views(a.path, b.path)
    assert "eval_step20.jsonl: row 2: these rows are not those of a question set" in text


TRIALS: dict[str, Change] = {
    "keys are missing": lambda one: {"number": 1},
    "a number is none": lambda one: one.update(number="second"),
    "a point is none": lambda one: one.update(point=["step"]),
    "overrides are none": lambda one: one.update(overrides=3),
    "a state is none": lambda one: one.update(state="asleep"),
    "it is of another trial": lambda one: one.update(name="../../elsewhere"),
}


@pytest.mark.parametrize("what", TRIALS)
def test_a_trial_of_a_sweep(tmp_path, what):
    sweep = write_grid(tmp_path / "grid")
    path = sweep.path / "trials" / "001-trial.json"
    changed(path, TRIALS[what])
    board, text = all_views(sweep.path)
    assert [run.name for run in board.runs] == ["000-trial", "002-trial", "003-trial", "004-trial"]
    assert str(path) in text


PLANS: dict[str, Change] = {
    "an unknown key of a step": lambda one: one["steps"][0].update(colour="blue"),
    "steps are none": lambda one: one.update(steps="plain"),
    "no metric": lambda one: one.update(metrics=[]),
    "a mode is none": lambda one: one.update(modes=["more"]),
    "keys are missing": lambda one: {"name": "small"},
}


@pytest.mark.parametrize("what", PLANS)
def test_the_plan_of_a_sweep(tmp_path, what):
    sweep = write_staircase(tmp_path / "stairs", n=20, seeds=(0,))
    changed(sweep.path / "sweep.json", PLANS[what])
    board, text = all_views(sweep.path)
    assert len(board.runs) == 3
    assert str(sweep.path / "sweep.json") in text
    assert "trials: 3 finished" in content(board, Folders([sweep.path])).main

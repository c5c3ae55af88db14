"""What runs say of themselves: states and scores as they lie there; a damaged file costs its own run and is named; bad folders are told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from board_world import ranks, write_evaluation, write_grid, write_run

from stairstep.board import Board, Folders, board_text, content, html_page
from stairstep.records import RunFolder, read_json, write_json
from stairstep.settings import InputError


def read(*paths: Path) -> Board:
    return Folders(list(paths)).read()


def test_a_run_is_read_as_it_lies(tmp_path):
    write_run(tmp_path / "a", {0: ranks(50, 0.2, 0), 20: ranks(50, 0.6, 1)}, seed=7)
    write_evaluation(tmp_path / "a", 20, ranks(10, 0.5, 2), name="other")
    [run] = read(tmp_path / "a").runs
    assert (run.name, run.state, run.step, run.seed, run.problems) == ("a", "finished", 20, 7, [])
    assert [one.step for one in run.evaluations] == [0, 20]
    assert [(one.set, one.step) for one in run.others] == [("other", 20)]
    right = sum(one == 1 for one in ranks(50, 0.6, 1))
    score = run.evaluations[1].score("hit@1")
    assert score is not None
    assert (score.value, score.n) == (right / 50, 50)
    assert run.series("validation/loss") == [(0, 1.5), (20, pytest.approx(0.57))]
    assert run.evaluations[1].score("qa") is None
    assert not run.evaluations[1].below_floor


def test_a_torn_last_line_is_passed_over_and_another_is_named(tmp_path):
    run = write_run(tmp_path / "a", {20: ranks(20, 0.5, 0)})
    log = run.path / "metrics.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole + b'{"step": 21, "train/lo')
    [read_run] = read(run.path).runs
    assert read_run.problems == []
    assert read_run.step == 20
    log.write_bytes(b"no json\n" + whole)
    [read_run] = read(run.path).runs
    assert len(read_run.problems) == 1
    assert "metrics.jsonl:1" in read_run.problems[0]
    assert [one.step for one in read_run.evaluations] == [20], "its evaluations are still there"


def test_a_run_that_has_only_begun_makes_a_page(tmp_path):
    RunFolder.create(tmp_path / "new").write_recipe("run: {seed: 0}\n")
    folders = Folders([tmp_path / "new"])
    [run] = folders.read().runs
    assert (run.state, run.step, run.last) == ("not begun", 0, None)
    made = content(folders.read(), folders)
    assert "No score yet" in made.main
    assert made.data["questions"]["asked"] == []
    assert "id='flips'" not in made.main
    assert html_page(made).startswith("<!doctype html>")


def test_a_damaged_summary_is_named_and_the_others_stand(tmp_path):
    run = write_run(tmp_path / "a", {0: ranks(20, 0.2, 0), 20: ranks(20, 0.5, 1)})
    (run.path / "eval_step0.summary.json").write_text("{")
    folders = Folders([run.path])
    board = folders.read()
    assert [one.step for one in board.runs[0].evaluations] == [20]
    assert "eval_step0.summary.json" in content(board, folders).main


@pytest.mark.parametrize("text", ['{"id": "q0"}\n', "[1]\n", "nothing\n{}\n"])
def test_rows_of_something_else_are_named_and_cost_only_the_questions(tmp_path, text):
    run = write_run(tmp_path / "a", {0: ranks(20, 0.2, 0), 20: ranks(20, 0.5, 1)})
    (run.path / "eval_step20.jsonl").write_text(text)
    folders = Folders([run.path])
    made = content(folders.read(), folders)
    assert "eval_step20.jsonl" in made.main
    assert [one["step"] for one in made.data["questions"]["asked"]] == [0]
    assert ".500" in made.main or "R@1" in made.main


def test_nothing_is_read_twice_until_it_changes(tmp_path):
    run = write_run(tmp_path / "a", {20: ranks(20, 0.5, 0)})
    folders = Folders([run.path])
    first, stamp = folders.read(), folders.stamp()
    assert folders.read().runs[0].log is first.runs[0].log
    assert folders.stamp() == stamp
    run.heartbeat()
    assert folders.stamp() == stamp, "a heartbeat says nothing new"
    run.metrics.append(21, {"train/loss": 0.1})
    assert folders.stamp() != stamp
    assert folders.read().runs[0].step == 21


def test_a_sweeps_trials_are_its_runs_begun_or_not(tmp_path):
    sweep = write_grid(tmp_path / "grid")
    board = read(sweep.path)
    assert board.title == "small"
    assert [run.state for run in board.runs] == ["finished", "finished", "stopped", "failed", "waiting"]
    assert board.runs[2].reason == "below the median at step 10"
    assert board.runs[4].last is None
    sweep.write_trial(replace(sweep.trial("004-trial"), state="running"))
    assert read(sweep.path).runs[4].state == "running"


def test_what_is_no_run_is_told(tmp_path):
    run, sweep = write_run(tmp_path / "a", {}), write_grid(tmp_path / "grid")
    (tmp_path / "empty").mkdir()
    for paths, words in {
        (tmp_path / "gone",): "no such folder",
        (tmp_path / "empty",): "neither a run folder",
        (run.path, sweep.path): "one sweep or over runs",
        (run.path, tmp_path / "empty" / ".." / "a"): "named twice",
    }.items():
        with pytest.raises(InputError, match=words):
            Folders(list(paths))


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = [write_run(tmp_path / place / "a", {}).path for place in ("x", "y")]
    assert [run.name for run in read(*paths).runs] == ["x/a", "y/a"]
    assert Folders(paths).target == (tmp_path / "x" / "report.html").resolve()
    assert Folders(paths[:1]).target == tmp_path / "x" / "a" / "report.html"


def test_a_trial_whose_process_died_is_lost_and_the_stamp_knows(tmp_path):
    sweep = write_grid(tmp_path / "grid")
    sweep.write_trial(replace(sweep.trial("000-trial"), state="running"))
    run = RunFolder(sweep.run_path("000-trial"))
    run.set_status("running", 5, 20)
    folders = Folders([sweep.path])
    assert folders.read().runs[0].state == "running"
    alive = folders.stamp()
    path = run.path / "status.json"
    write_json(path, read_json(path) | {"heartbeat": 0.0})
    board = folders.read()
    assert board.runs[0].state == "lost"
    assert folders.stamp() != alive
    told = board_text(board, folders)
    assert "its process is gone or silent" in told
    assert next(line for line in told.splitlines() if line.lstrip().startswith("0 ")).split()[4] == "lost"
    run.set_status("failed", 5, 20)
    assert folders.read().runs[0].state == "running", "the trial's word, where its run is not lost"

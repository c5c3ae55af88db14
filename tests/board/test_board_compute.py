"""Staircase, calls, hours and time: against the comparison's own functions and against counting by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from board_world import ranks, write_evaluation, write_grid, write_run, write_staircase

from stairstep.board import Folders
from stairstep.board.compute import calls, cost, find, hours, picked, where_time_went
from stairstep.board.tables import names_below_floor
from stairstep.board.words import headline, warnings
from stairstep.evaluation.comparison import compare_family
from stairstep.evaluation.evaluated import Side, read_evaluated
from stairstep.evaluation.statistics import wilson
from stairstep.sweeps.scores import best_score


def test_the_staircase_is_the_comparisons_of_its_runs(tmp_path):
    sweep = write_staircase(tmp_path / "stairs")
    folders = Folders([sweep.path])
    board = folders.read()
    [found] = find(board, folders).staircases
    sides = [Side("base", [read_evaluated(sweep.run_path("000-plain-seed0"), 0)])]
    for place, step in enumerate(("plain", "hard", "same")):
        sides.append(Side(step, [read_evaluated(sweep.run_path(f"{2 * place + seed:03d}-{step}-seed{seed}"), 20) for seed in (0, 1)]))
    pairs = [(sides[0], sides[1]), (sides[1], sides[2]), (sides[2], sides[3]), (sides[0], sides[3])]
    expected = compare_family(pairs, ("hit@1",))
    assert [stair.name for stair in found.stairs] == ["base", "plain", "hard", "same"]
    assert [stair.compared for stair in found.stairs[1:]] == [one.comparisons[0] for one in expected[:3]]
    assert found.whole == expected[3].comparisons[0]
    assert found.seeds == 2
    verdicts = [stair.compared.verdict for stair in found.stairs[1:] if stair.compared]
    assert verdicts[1:] == ["better", "no difference shown"], "the fixture has both"
    for stair, side in zip(found.stairs, sides, strict=True):
        means = [sum(row["hit@1"] for row in run.rows) / 80 for run in side.runs]
        assert stair.score is not None
        assert stair.score.value == pytest.approx(sum(means) / len(means))
        assert [value for _, value in stair.seeds] == pytest.approx(means)
    said, below = headline(board, find(board, folders))
    assert "over 3 steps, 2 seeds" in said
    assert below.startswith("Better: +")


def test_only_finished_seeds_stand_on_a_step_and_the_others_are_named(tmp_path):
    sweep = write_staircase(tmp_path / "stairs")
    sweep.write_trial(replace(sweep.trial("003-hard-seed1"), state="failed", reason="out of memory"))
    sweep.write_trial(replace(sweep.trial("004-same-seed0"), state="stopped", reason="worse than the median"))
    sweep.write_trial(replace(sweep.trial("005-same-seed1"), state="running"))
    folders = Folders([sweep.path])
    board = folders.read()
    findings = find(board, folders)
    assert [(stair.name, len(stair.seeds)) for stair in findings.staircases[0].stairs] == [("base", 1), ("plain", 2), ("hard", 1)]
    told = "\n".join(warnings(board, findings, ()))
    for words in ("hard: 1 of 2 seeds are finished (seed 1 failed)", "same: 0 of 2", "1 seed on a step", "worse than the median"):
        assert words in told, words


def test_a_step_called_base_is_not_the_base(tmp_path):
    sweep = write_staircase(tmp_path / "stairs")
    steps = tuple(replace(one, name={"plain": "base"}.get(one.name, one.name)) for one in sweep.plan.steps)
    sweep.write_plan(replace(sweep.plan, steps=steps))
    for name in ("000-plain-seed0", "001-plain-seed1"):
        sweep.write_trial(replace(sweep.trial(name), point={"step": "base"}))
    folders = Folders([sweep.path])
    assert [stair.name for stair in find(folders.read(), folders).staircases[0].stairs] == ["step 0", "base", "hard", "same"]


def test_a_run_below_its_coverage_floor_has_no_score_and_is_named(tmp_path):
    states = {0: ["correct"] * 40 + ["incorrect"] * 60, 20: ["correct"] * 60 + ["unanswered"] * 40}
    run = write_run(tmp_path / "a", {})
    for step, answers in states.items():
        write_evaluation(run.path, step, ranks(100, 0.5, step), answers)
    folders = Folders([run.path])
    board = folders.read()
    findings = find(board, folders)
    assert board.runs[0].evaluations[1].below_floor
    assert [one.metric for one in findings.compared[0].comparisons] == ["hit@1"]
    assert names_below_floor(board) == ["a (60.0% of 100 questions, floor 95.0%)"]
    told = "\n".join(warnings(board, findings, ()))
    assert "QA: not compared: coverage of step 20 is 60.0%" in told
    assert "no QA score: a (60.0%" in told


def test_several_runs_are_compared_with_the_first_over_the_same_questions_only(tmp_path):
    a = write_run(tmp_path / "a", {20: ranks(80, 0.3, 0)})
    b = write_run(tmp_path / "b", {20: ranks(80, 0.8, 1)})
    c = write_run(tmp_path / "c", {20: ranks(70, 0.8, 1)})
    folders = Folders([one.path for one in (a, b, c)])
    findings = find(folders.read(), folders)
    assert [(one.first, one.second) for one in findings.compared] == [("a", "b")]
    assert findings.compared[0].caveat.startswith("1 seed a side")
    assert any("a and c: not compared" in note and "not over the same questions" in note for note in findings.notes)


def test_a_grid_is_reported_where_nothing_was_picked(tmp_path):
    sweep = write_grid(tmp_path / "grid")
    folders = Folders([sweep.path])
    board = folders.read()
    assert list(find(board, folders).compared) == []
    best = picked(board, board.runs[1])
    assert best is not None
    rows = read_evaluated(sweep.run_path("001-trial"), best.step).rows
    reported = [row["hit@1"] for row in rows if row["split"] == "report"]
    assert best.score("hit@1", "report") == wilson(sum(reported), len(reported))
    assert (best.step, best.value) == best_score(sweep.run_path("001-trial"), "hit@1", "max"), "as the sweep itself ranks"
    said, below = headline(board, find(board, folders))
    assert "picked of 3 trials" in said
    assert f"rank 16, seed 0, step {best.step}: picked on the selection split" in below
    assert f"other {len(reported)} questions; 1 seed" in below


def test_calls_of_all_evaluations_are_counted_once_each(tmp_path):
    run = write_run(tmp_path / "a", {0: ranks(20, 0.3, 0), 20: ranks(20, 0.5, 1)}, states=["correct"] * 20)
    write_evaluation(run.path, 20, ranks(8, 0.5, 2), ["correct"] * 8, name="other")
    other = write_run(tmp_path / "b", {20: ranks(20, 0.5, 1)}, states=["correct"] * 20)
    (other.path / "eval_step20.jsonl").unlink()
    (other.path / "eval_step20.jsonl").symlink_to(run.path / "eval_step20.jsonl")
    board = Folders([run.path, other.path]).read()
    [made] = calls(board)
    assert (made.kind, made.models) == ("answer", ["reader"])
    assert (made.asked, made.saved, made.waited) == (17 + 17 + 5, 9, 3)
    assert made.cost == pytest.approx(1.5)
    assert cost(board.runs[0]) == pytest.approx(1.5)


def test_hours_and_where_the_time_went(tmp_path):
    run = write_run(tmp_path / "a", {20: ranks(20, 0.5, 1)}, states=["correct"] * 20)
    [read] = Folders([run.path]).read().runs
    spent = where_time_went(read)
    assert spent == {
        "training steps": 30.0,
        "waiting for tiles": 10.0,
        "embedding": 6.0,
        "search and statistics": 1.0,
        "answers": 12.0,
        "grades": 2.0,
    }
    assert hours(read) == pytest.approx(2 * 61.0 / 3600)
    [trial, *_] = Folders([write_staircase(tmp_path / "s", n=20).path]).read().runs
    assert hours(trial) == pytest.approx(1.0)


def test_a_run_without_reader_says_nothing_of_answers(tmp_path):
    run = write_run(tmp_path / "a", {0: ranks(20, 0.2, 0), 20: ranks(20, 0.6, 1)})
    folders = Folders([Path(run.path)])
    findings = find(folders.read(), folders)
    assert [one.metric for one in findings.compared[0].comparisons] == ["hit@1"]
    assert findings.compared[0].left_out == ()
    assert calls(folders.read()) == []


def test_answers_make_a_staircase_of_their_own(tmp_path):
    states = ["correct"] * 20 + ["incorrect"] * 59 + ["unanswered"]
    sweep = write_staircase(tmp_path / "stairs", seeds=(0,), states=states)
    sweep.write_plan(replace(sweep.plan, metrics=("qa",)))
    folders = Folders([sweep.path])
    findings = find(folders.read(), folders)
    assert [one.metric for one in findings.staircases] == ["qa", "hit@1"], "what the sweep is after stands first"
    for stair in findings.staircases[0].stairs:
        assert stair.score == wilson(20, 79)
        assert stair.compared is None or stair.compared.verdict == "no difference shown"
    said, below = headline(folders.read(), findings)
    assert said.startswith("QA\u00a0.253\u00a0→\u00a0.253 over 3 steps, 1 seed")
    assert below.startswith("No difference shown")

"""Staircase, calls, hours and time: against the comparison's own functions and against counting by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from board_world import ranks, write_evaluation, write_grid, write_run, write_staircase

from stairstep.board import Folders
from stairstep.board.compute import calls, cost, find, hours, parameters, picked, where_time_went
from stairstep.board.figures import parallel_figure, time_figure
from stairstep.board.tables import names_below_floor, runs_table
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


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_sweep_after_the_loss_is_ranked_by_the_loss(tmp_path, mode):
    sweep = write_grid(tmp_path / "grid")
    sweep.write_plan(replace(sweep.plan, metrics=("validation/loss",), modes=(mode,)))
    losses = {"000-trial": {10: 0.3, 20: 0.4}, "001-trial": {10: 0.6, 20: 0.5}, "002-trial": {5: 0.45, 10: float("nan")}}
    for name, of_trial in losses.items():
        log = sweep.run(name).metrics
        log.path.unlink()
        for step, value in {0: 0.1, **of_trial}.items():
            log.append(step, {"validation/loss": value})
    folders = Folders([sweep.path])
    board = folders.read()
    assert board.ranked_by == ("validation/loss", mode)
    best = [picked(board, run) for run in board.runs]
    for one, name in zip(best[:2], losses, strict=False):
        assert one is not None
        assert (one.step, one.value) == best_score(sweep.run_path(name), "validation/loss", mode), "as the sweep itself ranks"
        assert one.evaluation is not None
        assert one.evaluation.step == one.step
    assert best[2] is not None
    assert (best[2].step, best[2].value, best[2].evaluation) == (5, 0.45, None)
    assert best[3:] == [None, None]
    said, below = headline(board, find(board, folders))
    assert said == f"Validation loss {'0.300 is the lowest' if mode == 'min' else '0.600 is the highest'} of 3 trials"
    assert f"rank {8 if mode == 'min' else 16}, seed 0, step 10: R@1 ." in below
    assert f"sweep after the validation loss ({mode})" in below
    table = runs_table(board)
    column = list(table.columns).index("Validation loss, picked step")
    assert [row[column].text for row in table.rows] == [*(f"{one.value:.3f}" for one in best[:3] if one), "–", "–"]
    assert "R@1, report" in table.columns


def test_less_may_be_better_of_any_metric(tmp_path):
    sweep = write_grid(tmp_path / "grid")
    sweep.write_plan(replace(sweep.plan, modes=("min",)))
    folders = Folders([sweep.path])
    board = folders.read()
    for run in board.runs[:3]:
        best = picked(board, run)
        assert best is not None
        assert (best.step, best.value) == best_score(sweep.run_path(run.name), "hit@1", "min")
    assert "sweep after R@1 (min)" in headline(board, find(board, folders))[1]


def test_above_a_step_that_nobody_finished_nothing_is_compared(tmp_path):
    sweep = write_staircase(tmp_path / "stairs")
    for name in ("002-hard-seed0", "003-hard-seed1"):
        sweep.write_trial(replace(sweep.trial(name), state="failed", reason="out of memory"))
    folders = Folders([sweep.path])
    findings = find(folders.read(), folders)
    assert [(one.first, one.second) for one in findings.compared] == [("base", "plain"), ("base", "same")]
    [found] = findings.staircases
    assert [(stair.name, stair.compared is not None) for stair in found.stairs] == [("base", False), ("plain", True), ("same", False)]
    assert found.whole is not None
    assert "same: not compared with a step below, because hard has no finished seed" in findings.notes


def test_a_steps_answers_are_over_one_set_of_questions_for_line_and_points(tmp_path):
    sweep = write_staircase(tmp_path / "stairs", n=40)
    sweep.write_plan(replace(sweep.plan, metrics=("qa",)))
    for run in sorted(sweep.runs.iterdir()):
        states = ["correct"] * 10 + ["incorrect"] * 30
        states[0 if "seed0" in run.name else 39] = "unanswered"
        write_evaluation(run, 20, ranks(40, 0.5, 1), states)
    folders = Folders([sweep.path])
    for stair in find(folders.read(), folders).staircases[0].stairs[1:]:
        assert stair.score is not None
        assert (stair.score.n, [value for _, value in stair.seeds]) == (38, [9 / 38, 9 / 38]), "of 39 each they are 9/39 and 10/39"
        assert stair.score.value == pytest.approx(9 / 38)


def test_parameters_are_named_by_as_much_as_tells_them_apart(tmp_path):
    sweep = write_grid(tmp_path / "grid")
    for number, name in enumerate(["000-trial", "001-trial", "002-trial"]):
        point = {"model.adapter.rank": 8 * number, "model.vit.rank": 64 - number, "optim.seed": number, "a.batch": number}
        sweep.write_trial(replace(sweep.trial(name), point=point))
    for name in ("003-trial", "004-trial"):
        (sweep.path / "trials" / f"{name}.json").unlink()
    board = Folders([sweep.path]).read()
    assert list(parameters(board).values()) == ["adapter.rank", "vit.rank", "optim.seed", "batch"]
    assert set(parameters(board).values()) <= set(runs_table(board).columns)
    drawn = parallel_figure(board)
    assert drawn is not None
    assert [f"<b>{name}</b>" for name in parameters(board).values()] == drawn.spec["layout"]["xaxis"]["ticktext"][:4]


def test_runs_of_long_names_have_a_bar_each(tmp_path):
    runs = [write_run(tmp_path / f"{'a-very-long-name-that-goes-on-and-on'}-{place}", {20: ranks(10, 0.5, 0)}) for place in range(3)]
    drawn = time_figure(Folders([one.path for one in runs]).read())
    assert drawn is not None
    assert all(bar["y"] == [0, 1, 2] for bar in drawn.spec["data"])
    assert len(drawn.spec["layout"]["yaxis"]["ticktext"]) == 3
    assert [name[-2:] for name in drawn.spec["data"][0]["customdata"]] == ["-0", "-1", "-2"]

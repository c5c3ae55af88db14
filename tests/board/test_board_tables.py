"""Text and CSV: every number against the rows that it came from."""

from __future__ import annotations

import csv
import io
import unicodedata
from dataclasses import replace

import pytest
from board_world import EVIL, ranks, write_grid, write_run, write_staircase

from stairstep.board import Folders, as_csv, board_text
from stairstep.board.tables import Cell, Table
from stairstep.board.text import table_text
from stairstep.evaluation.statistics import wilson
from stairstep.records import read_json_lines


def test_csv_has_a_row_a_run_and_step_with_the_numbers_of_the_rows(tmp_path):
    states = ["correct"] * 10 + ["incorrect"] * 15 + ["not_attempted"] * 5
    run = write_run(tmp_path / "a", {0: ranks(30, 0.2, 0), 20: ranks(30, 0.6, 1)}, states=states, seed=3)
    found = list(csv.DictReader(io.StringIO(as_csv(Folders([run.path]).read()))))
    assert [(one["run"], one["seed"], one["step"]) for one in found] == [("a", "3", "0"), ("a", "3", "20")]
    for one in found:
        rows = read_json_lines(run.path / f"eval_step{one['step']}.jsonl")
        for part in ("all", "selection", "report"):
            some = [row for row in rows if part in ("all", row["split"])]
            expected = wilson(sum(row["hit@3"] for row in some), len(some))
            got = [float(one[f"hit@3/{part}{end}"]) for end in ("", "/low", "/high", "/n")]
            assert got == pytest.approx([expected.value, expected.low, expected.high, expected.n])
            assert float(one[f"mrr/{part}"]) == pytest.approx(sum(row["reciprocal_rank"] for row in some) / len(some))
        assert float(one["qa/all"]) == pytest.approx(1 / 3)
        assert [one[f"questions/{state}"] for state in ("correct", "incorrect", "not_attempted", "unanswered")] == ["10", "15", "5", "0"]
        assert (one["calls/answer/asked"], one["calls/answer/hits"]) == ("27", "3")
    assert [one["validation/loss"] for one in found] == ["1.5", "0.53"]


def test_csv_of_a_sweep_has_every_trial_also_those_that_never_began(tmp_path):
    found = list(csv.DictReader(io.StringIO(as_csv(Folders([write_grid(tmp_path / "g").path]).read()))))
    assert [(one["run"], one["step"]) for one in found][:3] == [("000-trial", "0"), ("000-trial", "10"), ("000-trial", "20")]
    assert len(found) == 3 * 3 + 2
    assert found[-2]["reason"] == f"out of memory {EVIL}"
    assert (found[0]["point/optim.rates.llm"], found[0]["point/model.adapter.rank"]) == ("0.001", "8")


def test_a_table_is_aligned_whatever_stands_in_it():
    table = Table("t", "Title", ("name", "n"), [[Cell("a"), Cell("10", 10, "number")], [Cell("longer"), Cell("9", 9, "number")]], "below")
    assert table_text(table) == "Title\nname     n\na       10\nlonger   9\nbelow"


def test_the_text_says_what_the_page_says(tmp_path):
    folders = Folders([write_staircase(tmp_path / "s").path])
    text = board_text(folders.read(), folders)
    for words in (
        "small",
        "over 3 steps, 2 seeds",
        "no difference shown",
        "Everything compared",
        "corrected for 4 comparisons (Holm)",
        "Trials",
    ):
        assert words in text, words
    grid = Folders([write_grid(tmp_path / "g").path])
    told = board_text(grid.read(), grid)
    for words in ("below the median at step 10", "out of memory", "too large for the rate", "What to know"):
        assert words in told, words


def test_a_text_that_a_spreadsheet_would_compute_is_made_one_that_it_shows(tmp_path):
    sweep = write_grid(tmp_path / "grid")
    sweep.write_trial(replace(sweep.trial("003-trial"), reason="=HYPERLINK(1)", point={"@a": "-b", "c": -0.5}))
    write_run(tmp_path / "+run", {20: ranks(10, 0.5, 0)})
    found = list(csv.DictReader(io.StringIO(as_csv(Folders([sweep.path]).read()))))
    [failed] = [one for one in found if one["run"] == "003-trial"]
    assert (failed["reason"], failed["point/@a"], failed["point/c"]) == ("'=HYPERLINK(1)", "'-b", "-0.5")
    [row] = csv.DictReader(io.StringIO(as_csv(Folders([tmp_path / "+run"]).read())))
    assert row["run"] == "'+run"


def test_a_terminal_gets_no_commands_from_texts(tmp_path):
    sweep = write_grid(tmp_path / "grid")
    sweep.write_plan(replace(sweep.plan, name="sma\x1b[2Jll"))
    sweep.write_trial(replace(sweep.trial("003-trial"), reason="out\nof \x1b]0;me\x07mory\x9b31m \u202e"))
    folders = Folders([sweep.path])
    text = board_text(folders.read(), folders)
    assert "out of ]0;memory31m" in text
    assert text.startswith("sma[2Jll\n")
    assert {one for one in text if unicodedata.category(one) in ("Cc", "Cf")} == {"\n"}

"""Seed 000's own peak extraction (its §7) runs as it stands where `OUTPUT_DIR` is a run folder, and reads a lower bound of the score.

seed000_peak_extraction.txt beside this file is its snippet with the line breaks that the document has lost.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stairstep.evaluation.grading import exact_grade
from stairstep.evaluation.question_set import RetrievalResult
from stairstep.evaluation.questions_answered import Failure, with_answer, with_grade
from stairstep.records import read_json_lines
from stairstep.tasks.run import train

ROOT = Path(__file__).resolve().parents[2]
SNIPPET = Path(__file__).with_name("seed000_peak_extraction.txt")
IN_THE_SEED = (
    'import json, glob peak = 0 for f in sorted(glob.glob("OUTPUT_DIR/eval_step*.jsonl")): rows = [json.loads(l) for l in open(f)] '
    'qa = sum(r.get("correct", False) for r in rows) / len(rows) step = int(f.split("eval_step")[1].split(".")[0]) '
    'peak = max(peak, qa); print(step, round(qa, 4)) print("peak", round(peak, 4))'
)
RIGHT = (2, 5, 4)  # how many of the twelve questions are answered rightly at steps 0, 3 and 6


class Answering:
    """Answers a number of questions rightly that depends on the look alone; the last one meets a reader that is down."""

    looks = 0

    def __init__(self, *arguments: Any, **more: Any) -> None:
        """Whatever the platform's own takes."""

    def answered(self, result: RetrievalResult, step: int) -> RetrievalResult:
        if result.name != "tinywiki":
            return result
        right = RIGHT[Answering.looks]
        Answering.looks += 1
        said = [row["answer"] if place < right else "something else" for place, row in enumerate(result.rows)]
        rows = [with_answer(row, answer) for row, answer in zip(result.rows, said, strict=True)]
        graded = [with_grade(row, exact_grade(row["predicted"], row["answer"])) for row in rows[:-1]]
        return dataclasses.replace(result, rows=(*graded, with_answer(rows[-1], Failure("the reader is down"))))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a short real training with two question sets."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "tasks"))
    from tasks_world import make_recipe, recipe_tree, write_base, write_world

    monkeypatch.setattr("stairstep.tasks.retrieval.Answering", Answering)
    monkeypatch.setattr(Answering, "looks", 0)
    micro = SimpleNamespace(world=write_world(tmp_path / "worlds"), base=write_base(tmp_path / "base"))
    tree = recipe_tree(tmp_path / "runs", micro.world, micro.base)
    [questions] = tree["evaluation"]["sets"]
    tree["evaluation"] |= {"loss_every": 0, "sets": [questions, {**questions, "name": "further", "limit": 3}]}
    threads = torch.get_num_threads()
    finished = train(make_recipe(tree), console=False)
    torch.set_num_threads(threads)
    assert finished.outcome.step == 6
    return finished.folder


def test_the_snippet_is_the_seeds() -> None:
    text = SNIPPET.read_text(encoding="utf-8")
    assert text.count("\n") == 8
    assert " ".join(text.split()) == IN_THE_SEED


def test_the_snippet_runs_where_output_dir_is_a_run_folder(folder: Path, tmp_path: Path) -> None:
    rows = read_json_lines(folder / "eval_step3.jsonl")
    assert len(rows) == 12
    assert [row["correct"] for row in rows[:-1]] == [True] * 5 + [False] * 6
    assert rows[-1]["state"] == "unanswered" and "correct" not in rows[-1]  # a lower bound is what the snippet makes of it
    assert (folder / "further" / "eval_step3.jsonl").is_file()

    place = tmp_path / "elsewhere"
    place.mkdir()
    (place / "OUTPUT_DIR").symlink_to(folder)
    done = subprocess.run([sys.executable, "-I", str(SNIPPET)], cwd=place, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0 0.1667\n3 0.4167\n6 0.3333\npeak 0.4167\n"


def test_a_set_of_results_in_the_name_would_break_it(tmp_path: Path) -> None:
    """What the original trainer really wrote; that is why further sets lie in folders of their own."""
    (tmp_path / "OUTPUT_DIR").mkdir()
    (tmp_path / "OUTPUT_DIR" / "eval_step150_miniv8.jsonl").write_text('{"correct": true}\n')
    done = subprocess.run([sys.executable, "-I", str(SNIPPET)], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert "ValueError" in done.stderr

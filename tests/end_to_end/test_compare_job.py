"""The comparison job as a person runs it: which step, which questions, which seeds, and what it says of a mistake."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from stairstep.data.questions import is_selection
from stairstep.evaluation.question_set import RetrievalResult, write_result
from stairstep.evaluation.retrieval import ARTICLE_METRICS, article_metrics, scores_of
from stairstep.evaluation.settings import EvaluationSettings
from stairstep.records import RunFolder
from stairstep.settings import to_plain, to_yaml
from stairstep.tasks import load_recipe

Job = Callable[..., Any]
N = 200


def write(
    folder: Path, step: int, ranks: Sequence[int], states: Sequence[str] | None = None, primary: bool = True, name: str = "wiki"
) -> None:
    """An evaluation as a run writes it, of questions whose golden article stands at these ranks."""
    rows = [row(place, rank) for place, rank in enumerate(ranks)]
    parts = {part: scores_of([one for one in rows if one["split"] == part], ARTICLE_METRICS) for part in ("selection", "report")}
    result = RetrievalResult(
        name, tuple(rows), scores_of(rows, ARTICLE_METRICS), parts["selection"], parts["report"], {"timings": {}, "questions": len(rows)}
    )
    if states is not None:
        done = [
            {**one, "state": state, "reason": "no reply", **({} if state == "unanswered" else {"correct": state == "correct"})}
            for one, state in zip(rows, states, strict=True)
        ]
        result = result.answered(done, EvaluationSettings(), {}, {})
    write_result(folder, step, result, primary)


def row(place: int, rank: int) -> dict[str, Any]:
    name, articles = f"q{place}", ["wrong"] * 10
    if rank <= 10:
        articles[rank - 1] = "right"
    return {
        "id": name,
        "problem": f"question {place}",
        "answer": "yes",
        "golden_ids": ["right"],
        **article_metrics(articles, ["right"], [rank]),
        "split": "selection" if is_selection(name, 0.5) else "report",
        "retrieved": [{"article": one} for one in articles],
    }


SELECTION = [is_selection(f"q{place}", 0.5) for place in range(N)]


def ranks(hits_in_selection: int, hits_in_rest: int) -> list[int]:
    """Ranks of which the first few of either split are hits."""
    left = {True: hits_in_selection, False: hits_in_rest}
    found = []
    for split in SELECTION:
        found.append(1 if left[split] > 0 else 9)
        left[split] -= 1
    return found


def begin(folder: Path, recipe: Path, *overrides: str) -> Path:
    """A run folder with its recipe."""
    folder.mkdir(parents=True)
    RunFolder(folder).write_recipe(to_yaml(to_plain(load_recipe(recipe, [f"run.name={folder.name}", *overrides]))))
    return folder


def cells(out: str, label: str) -> list[str]:
    """A line of the table by its label, split where two blanks are."""
    (line,) = [line for line in out.splitlines() if line.strip().startswith(f"{label}  ")]
    return [one.strip() for one in line.split("  ") if one.strip()]


def exact(up: int, down: int) -> float:
    """The two-sided sign test by its sum."""
    n = up + down
    return min(1.0, sum(2 * math.comb(n, k) for k in range(min(up, down) + 1)) / 2**n)


def test_two_steps_of_a_run_that_was_trained(job: Job, small: Any) -> None:
    trained = job("train", small.recipe, "optim.rates.llm=1e-2")
    assert trained.code == 0, trained.err
    run = small.runs / "small"
    told = job("compare", f"{run}:0", run)
    assert told.code == 0, told.err
    assert told.out.splitlines()[:2] == [f"small step 0: {run} step 0", f"small step 1: {run} step 1"], "of one step none was picked"
    rows = [[json.loads(line) for line in (run / f"eval_step{step}.jsonl").read_text().splitlines()] for step in (0, 1)]
    for label, key in (("R@1", "hit@1"), ("R@3", "hit@3"), ("MRR", "reciprocal_rank")):
        changes = [float(new[key]) - float(old[key]) for old, new in zip(*rows, strict=True)]
        up, down, n, seeds = cells(told.out, label)[4:8]
        assert (up, down) == (f"+{sum(one > 0 for one in changes)}", f"-{sum(one < 0 for one in changes)}")
        assert (n, seeds) == ("4", "1, 1")
        assert cells(told.out, label)[-1] == "no difference shown"


def test_the_verdict_is_the_exact_tests_and_says_its_questions(job: Job, tmp_path: Path) -> None:
    """An evaluation outside a run has no recipe, and its only step needs no name."""
    a, b = tmp_path / "a", tmp_path / "b"
    write(a, 0, [1] * 50 + [9] * 150, ["correct"] * 20 + ["incorrect"] * 180)
    write(b, 0, [9] * 5 + [1] * 60 + [9] * 135, ["correct"] * 35 + ["incorrect"] * 165)
    told = job("compare", a, b)
    assert told.code == 0, told.err
    assert cells(told.out, "R@1")[4:8] == ["+15", "-5", "200", "1, 1"]
    assert cells(told.out, "QA")[4:8] == ["+15", "-0", "200", "1, 1"]
    assert cells(told.out, "golden tile shown to both")[4:7] == ["+15", "-0", "45"]
    assert cells(told.out, "the other questions")[4:7] == ["+0", "-0", "155"]
    assert "corrected for 6 comparisons" in told.out
    # Holm by hand: QA and its first part have the two smallest p-values; R@1 and R@3 come next, with MRR before or after them.
    assert cells(told.out, "QA")[-2:] == ["<.001", "better"] and 6 * exact(15, 0) < 0.001
    assert exact(15, 5) < 0.05 < 3 * exact(15, 5)
    assert cells(told.out, "R@1")[-1].startswith("no difference shown")


def test_below_the_floor_qa_is_left_out_with_its_reason(job: Job, tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    write(a, 3, [1] * N, ["correct"] * N)
    write(b, 3, [1] * N, ["incorrect"] * 6 + ["unanswered"] * (N - 6))
    told = job("compare", a, b)
    assert told.code == 0, told.err
    assert "QA: not compared: coverage of b step 3 is 3.0% of 200 questions, below the floor of 95.0%" in told.out
    assert not any(line.startswith("QA  ") for line in told.out.splitlines())


def test_a_picked_step_is_compared_over_the_questions_it_was_not_picked_by(job: Job, small: Any) -> None:
    """Step 20 is best on the selection split by luck, and worse on the rest."""
    run, other = begin(small.runs / "run", small.recipe), small.runs / "other"
    for step, hits in ((0, (10, 10)), (10, (30, 40)), (20, (60, 20))):
        write(run, step, ranks(*hits))
    write(other, 0, ranks(20, 20))
    told = job("compare", other, run)
    rest = SELECTION.count(False)
    assert told.code == 0, told.err
    assert f"run step 20: {run} step 20 (best hit@1 on the selection split)" in told.out
    assert f"compared over the {rest} other questions" in told.out
    assert cells(told.out, "R@1")[4:7] == ["+0", "-0", str(rest)]
    named = job("compare", other, f"{run}:20")
    assert "was picked" not in named.out
    assert cells(named.out, "R@1")[4:7] == ["+40", "-0", str(N)]


def test_seeds_are_lists_of_one_recipes_runs(job: Job, small: Any, tmp_path: Path) -> None:
    a = [begin(tmp_path / f"a-seed{seed}", small.recipe, f"run.seed={seed}") for seed in (0, 1)]
    b = [begin(tmp_path / f"b-seed{seed}", small.recipe, f"run.seed={seed}", "optim.steps=7") for seed in (0, 1, 2)]
    for place, folder in enumerate((*a, *b)):
        write(folder, 5, [1] * (40 + place if folder in a else 120 + place) + [9] * (160 - place if folder in a else 80 - place))
    told = job("compare", ",".join(map(str, a)), ",".join(f"{one}:5" for one in b))
    assert told.code == 0, told.err
    assert told.out.startswith(f"a-seed0 step 5 and 1 more: {a[0]} step 5, {a[1]} step 5\n")
    assert cells(told.out, "R@1")[6:] == ["200", "2, 3", "<.001", "better"]
    assert cells(told.out, "R@1")[4:6] == ["+84", "-0"], "40 are hits in all runs of a, 124 in any run of b"

    refused = job("compare", f"{a[0]},{b[1]}", b[0])
    assert refused.code == 2
    assert "optim.steps: 1 and 7" in refused.err
    negatives = begin(tmp_path / "negatives", small.recipe, "run.seed=5", "data.hard_negatives=1")
    write(negatives, 5, [1] * N)
    refused = job("compare", f"{a[0]},{negatives}", b[0])
    assert (refused.code, "data.hard_negatives: 2 and 1" in refused.err) == (2, True)
    twice = job("compare", f"{a[0]},{a[0]}", b[0])
    assert (twice.code, "named twice" in twice.err) == (2, True)
    copy = tmp_path / "copy"
    shutil.copytree(a[0], copy)
    again = job("compare", f"{a[0]},{copy}", b[0])
    assert (again.code, "has the seed of" in again.err) == (2, True)


def test_another_question_set_is_compared_by_its_name(job: Job, tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for folder, hits in ((a, 10), (b, 90)):
        write(folder, 7, [1] * 50 + [9] * 150)
        write(folder, 7, [1] * hits + [9] * (100 - hits), primary=False, name="other")
    assert cells(job("compare", a, b, "--set", "other").out, "R@1")[4:7] == ["+80", "-0", "100"]
    for primary in ([], ["--set", "wiki"]):
        assert cells(job("compare", a, b, *primary).out, "R@1")[4:7] == ["+0", "-0", "200"]
    missing = job("compare", a, b, "--set", "nothing")
    assert missing.code == 2
    assert "no evaluation of the question set 'nothing' at step 7; there are evaluations of other, wiki" in missing.err


@pytest.mark.parametrize("outside", ["../b", "a/../../b", ""])
def test_a_set_is_a_name_and_no_path(job: Job, tmp_path: Path, outside: str) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, 0, [1] * N)
    told = job("compare", tmp_path / "a", tmp_path / "b", "--set", outside)
    assert told.code == 2
    assert "plain folder name" in told.err


def test_a_mistake_is_told_and_exits_with_two(job: Job, small: Any, tmp_path: Path) -> None:
    a, b, unmeasured = tmp_path / "a", tmp_path / "b", tmp_path / "unmeasured"
    write(a, 0, [1] * N)
    write(a, 50, [1] * N)
    write(b, 50, [1] * (N - 1))
    unmeasured.mkdir()
    run = begin(tmp_path / "run", small.recipe, "evaluation.selection_fraction=1")
    for step in (10, 20):
        write(run, step, ranks(3, 3))
        for summary in run.glob("*.summary.json"):
            summary.write_text(json.dumps({**json.loads(summary.read_text()), "report": {}}))
    (tmp_path / "torn").mkdir()
    shutil.copy(a / "eval_step50.jsonl", tmp_path / "torn")
    for arguments, expected in (
        ([a, b], "not over the same questions (200 and 199 of them; they differ in question 'q199')"),
        ([f"{a}:7", a], f"{a}: no evaluation at step 7; there are steps 0, 50"),
        ([a, tmp_path / "nowhere"], "there is no such folder"),
        ([a, unmeasured], "there is no evaluation here"),
        ([a, f"{unmeasured}:3"], "no evaluation at step 3; there is no evaluation at all"),
        ([a, tmp_path / "torn"], "there is no evaluation here"),
        ([a, run], "no step has hit@1 on the selection split and on the rest; name a step"),
        ([a, f"{a},"], "expected RUN or RUN:STEP"),
        ([a], "required"),
    ):
        told = job("compare", *arguments)
        assert told.code == 2, (arguments, told)
        assert expected in told.err, (arguments, told.err)
        assert "Traceback" not in told.err and "difference" not in told.out

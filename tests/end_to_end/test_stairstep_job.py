"""A climb of two recipes with two seeds, as a person runs it: every step compared over the same questions, finished runs kept."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Job = Callable[..., Any]


@pytest.fixture
def climb(small: Any, tmp_path: Path) -> list[str]:
    """Two recipes over the small world, the second with a higher rate."""
    second = tmp_path / "second.yaml"
    second.write_text("extends: small.yaml\noptim: {rates: {llm: 1e-2}}\n", encoding="utf-8")
    return [str(small.recipe), str(second), "--seeds", "0", "1", "--out", str(tmp_path / "climb.json")]


def test_every_step_is_compared_and_finished_runs_are_kept(job: Job, small: Any, climb: list[str], tmp_path: Path) -> None:
    told = job("stairstep", *climb)
    assert told.code == 0, told.err
    assert [line.split(":")[0] for line in told.out.splitlines() if ", seed" in line] == [
        f"{name}, seed {seed}" for name in ("small", "second") for seed in (0, 1)
    ]
    figures = json.loads((tmp_path / "climb.json").read_text())
    assert [(one["before"], one["after"]) for one in figures] == [("base", "small"), ("small", "second"), ("base", "second")]
    # One family: every metric of either step and of the whole climb, each of which is a line with its questions and seeds.
    made = [metric for one in figures for metric in one["metrics"]]
    assert len(made) >= 6 and {metric["metric"] for metric in made} >= {"hit@1", "qa"}
    assert {one["family"] for one in figures} == {len(made)}
    assert told.out.count(f"corrected for {len(made)} comparisons") == 3
    for one, seeds in zip(figures, ([1, 2], [2, 2], [1, 2]), strict=True):
        assert [metric["seeds"] for metric in one["metrics"]] == [seeds] * len(one["metrics"])
    told_lines = re.findall(r"\+\d+ +-\d+ +(\d+) +(\d, \d) +[<.\d]+ +(?:no difference shown|better|worse)", told.out)
    assert told_lines == [(str(metric["questions"]["n"]), ", ".join(map(str, metric["seeds"]))) for metric in made]
    for one in figures:
        (hit,) = [metric for metric in one["metrics"] if metric["metric"] == "hit@1"]
        assert hit["difference"][0] == pytest.approx(hit["after"][0] - hit["before"][0], abs=2e-4)
        assert hit["difference"][1] <= hit["difference"][0] <= hit["difference"][2]
    logs = sorted(small.runs.glob("*-seed*/metrics.jsonl"))
    assert [path.parent.name for path in logs] == ["second-seed0", "second-seed1", "small-seed0", "small-seed1"]
    before = [path.read_bytes() for path in logs]
    again = job("stairstep", *climb)
    assert again.code == 0
    assert [path.read_bytes() for path in logs] == before
    assert json.loads((tmp_path / "climb.json").read_text()) == figures


def test_a_mistake_is_told_with_its_recipe(job: Job, small: Any, climb: list[str]) -> None:
    told = job("stairstep", *climb, "--set", "optim.stepz=3")
    assert told.code == 2
    assert "optim.stepz" in told.err and "optim.steps" in told.err
    told = job("stairstep", str(small.recipe), "--seeds", "3", "3")
    assert told.code == 2
    assert "twice" in told.err
    told = job("stairstep", str(small.recipe), str(small.recipe))
    assert told.code == 2
    assert "one file name" in told.err


def test_each_run_is_checked_before_its_first_step(job: Job, small: Any, climb: list[str]) -> None:
    wrong = ("--set", "data.train=[{path: nowhere.jsonl}]", "model.adapter.target_regex=none_such")
    told = job("stairstep", *climb, *wrong)
    assert told.code == 2
    assert told.err.count("error: ") == 1 and "--no-preflight" in told.err
    assert "✗ pairs: " in told.err and "✗ adapter: " in told.err
    assert not small.runs.exists()
    blind = job("stairstep", *climb, *wrong, "--no-preflight")
    assert blind.code == 2
    assert "nowhere.jsonl" in blind.err and "none_such" not in blind.err
    assert (small.runs / "small-seed0").exists()  # training met it by itself

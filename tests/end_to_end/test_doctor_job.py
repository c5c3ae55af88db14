"""`python -m jobs.doctor` and the checks before `python -m jobs.train`, as a person runs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Job = Callable[..., Any]
ALONE = "evaluation.reader=null"


def test_a_sound_recipe_is_ready(job: Job, small: Any) -> None:
    told = job("doctor", small.recipe, ALONE)
    assert told.code == 0, told.out
    lines = told.out.splitlines()
    assert lines[0].startswith("✓ recipe ")
    assert lines[-1].startswith("ready")
    assert "✗" not in told.out.replace("✗ versions", "")
    assert "– ray            the recipe trains in one process" in told.out
    assert "train: 8 rows in train_hn.jsonl" in told.out


def test_mistakes_are_a_table_and_exit_code_1(job: Job, small: Any) -> None:
    small.files("test/tiles/*.png")[0].write_bytes(b"no image")
    told = job("doctor", small.recipe, ALONE, "data.train=[{path: nowhere.jsonl}]", "model.adapter.target_regex=none_such")
    assert told.code == 1
    assert "Traceback" not in told.err + told.out
    for name in ("pairs", "tiles", "adapter"):
        assert f"\n✗ {name} " in told.out, told.out
    assert told.out.splitlines()[-1].startswith("not ready: pairs, tiles, adapter")


def test_json_says_the_same(job: Job, small: Any) -> None:
    told = job("doctor", small.recipe, ALONE, "data.train=[{path: nowhere.jsonl}]", "--json")
    assert told.code == 1
    plain = json.loads(told.out)
    assert plain["ready"] is False
    found = {one["check"]: one for one in plain["findings"]}
    assert (found["pairs"]["state"], found["pairs"]["needed"]) == ("bad", True)
    assert "nowhere.jsonl" in found["pairs"]["said"]
    assert (found["model"]["state"], found["ray"]["state"]) == ("good", "open")


def test_a_recipe_that_cannot_be_read_is_one_message(job: Job, small: Any) -> None:
    told = job("doctor", small.recipe, "optim.batchs=4")
    assert told.code == 2
    assert told.out == ""
    assert told.err.count("error: ") == 1 and "did you mean 'optim.batch'?" in told.err


def test_training_refuses_all_at_once_unless_told_not_to_look(job: Job, small: Any) -> None:
    wrong = ("data.train=[{path: nowhere.jsonl}]", "model.adapter.target_regex=none_such")
    told = job("train", small.recipe, ALONE, *wrong)
    assert told.code == 2
    assert told.err.count("error: ") == 1 and "--no-preflight" in told.err
    assert "✗ pairs: " in told.err and "✗ adapter: " in told.err
    assert not (small.runs / "small").exists()
    blind = job("train", small.recipe, ALONE, *wrong, "--no-preflight")
    assert blind.code == 2
    assert blind.err.count("error: ") == 1 and "nowhere.jsonl" in blind.err and "none_such" not in blind.err
    assert (small.runs / "small").exists()  # training met it by itself

"""The preprocessing job as a person runs it: a summary, a store, and the same numbers from it as from the files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Job = Callable[..., Any]


def numbers(runs: Path, name: str) -> tuple[list[Any], list[Any]]:
    """What a run measured, times left out: the losses of its log and the rows of its evaluations."""
    log = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    rows = [path.read_text() for path in sorted((runs / name).glob("eval_step*.jsonl"))]
    return [{key: value for key, value in line.items() if not key.startswith(("time", "data"))} for line in log], rows


def test_a_file_that_changed_is_never_taken_from_the_store(job: Job, small: Any, in_process: None) -> None:
    plain = job("train", small.recipe, "run.name=plain", "evaluation.cache=false", "evaluation.reader=null")
    assert plain.code == 0, plain.err
    made = job("preprocess", small.recipe)
    assert made.code == 0, made.err
    stores = list((small.runs / "tiles").iterdir())
    assert len(stores) == 1
    for path in small.data.rglob("*.png"):
        path.write_bytes(b"")  # whatever reads a file now does not get its pixels …
    spoiled = job("train", small.recipe, "run.name=spoiled", "evaluation.cache=false", "evaluation.reader=null")
    assert spoiled.code == 2 and "empty" in spoiled.err, "… nor does it find the old pixels under the new content"


def test_training_reads_no_file_that_the_store_has(job: Job, small: Any, in_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from stairstep.tiles import TileReader

    options = ("evaluation.cache=false", "evaluation.reader=null")
    assert job("train", small.recipe, "run.name=plain", *options).code == 0
    assert job("preprocess", small.recipe).code == 0
    with monkeypatch.context() as patch:
        patch.setattr(TileReader, "_read", lambda self, path: pytest.fail(f"{path} was read"))
        stored = job("train", small.recipe, "run.name=stored", *options, "--no-preflight")
    assert stored.code == 0, stored.err
    assert "Tile store:" in stored.err + stored.out
    assert numbers(small.runs, "stored") == numbers(small.runs, "plain")
    assert len(numbers(small.runs, "plain")[1]) == 2


def test_the_summary_says_what_was_done(job: Job, small: Any, in_process: None) -> None:
    first = job("preprocess", small.recipe)
    assert first.code == 0, first.err
    assert "were made in" in first.out
    assert "of float32" in first.out
    again = job("preprocess", small.recipe)
    assert again.code == 0
    assert ", 0 were made" in again.out


def test_bad_tiles_are_listed_and_refused_unless_accepted(job: Job, small: Any, in_process: None) -> None:
    path = small.files("**/*.png")[0]
    path.write_bytes(path.read_bytes()[:100])
    refused = job("preprocess", small.recipe)
    assert refused.code == 2
    assert path.name in refused.out
    assert "data.max_quarantined=1" in refused.err
    assert "Traceback" not in refused.err
    accepted = job("preprocess", small.recipe, "data.max_quarantined=1")
    assert accepted.code == 0
    assert path.name in accepted.out


def test_a_store_elsewhere(job: Job, small: Any, in_process: None, tmp_path: Path) -> None:
    assert job("preprocess", small.recipe, f"tiles.store={tmp_path / 'elsewhere'}").code == 0
    assert list((tmp_path / "elsewhere").glob("*/manifest-*.json"))
    assert not (small.runs / "tiles").exists()


def test_a_missing_tile_is_told_before_anything_starts(job: Job, small: Any) -> None:
    path = next(one for one in small.files("**/*.png") if "test" not in one.parts)
    path.unlink()
    told = job("preprocess", small.recipe)
    assert told.code == 2
    assert "1 tiles are missing" in told.err
    assert path.name in told.err

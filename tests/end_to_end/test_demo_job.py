"""`python -m jobs.demo` before it starts anything: its help, and its refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Job = Callable[..., Any]


def test_help_and_unknown_flags(job: Job) -> None:
    told = job("demo", "--help")
    assert told.code == 0 and told.err == ""
    assert "python -m jobs.demo optim.steps=20" in told.out and "--no-preflight" in told.out
    told = job("demo", "--nonsense")
    assert told.code == 2 and "--nonsense" in told.err


def test_mistakes_are_told_before_anything_starts(job: Job, small: Any) -> None:
    import ray

    ran = ray.is_initialized()  # by tests/cluster, where both run in one process
    here = (f"run.root={small.runs}", "data.world=null", f"data.roots=[{small.data}]")
    told = job("demo", *here, "data.train=[{path: nowhere.jsonl}]", "model.adapter.target_regex=none_such")
    assert told.code == 2
    assert told.err.count("error: ") == 1 and "✗ pairs: " in told.err and "✗ adapter: " in told.err
    assert "answers at" not in told.out and ray.is_initialized() == ran
    assert not small.runs.exists()
    told = job("demo", *here, "optim.stepz=3")
    assert told.code == 2 and "did you mean 'optim.steps'?" in told.err

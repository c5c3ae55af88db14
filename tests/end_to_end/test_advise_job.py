"""`python -m jobs.advise`, as a person runs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from stairstep.settings import parse_yaml
from stairstep.tasks import load_recipe

Job = Callable[..., Any]


def test_a_table_its_fragment_and_a_file(job: Job, small: Any, tmp_path: Path) -> None:
    before = small.recipe.read_text()
    out = tmp_path / "advised.yaml"
    told = job("advise", small.recipe, "optim.steps=70", "--out", out)
    assert told.code == 0, told.err
    assert "8 rows of " in told.out and "a chunk of " in told.out
    assert "objective.gradcache.chunk_tokens" in told.out
    printed = told.out[told.out.index("\nextends: ") : told.out.index("\nwritten: ")]
    assert set(parse_yaml(printed, "printed").value) >= {"extends", "optim"}
    advised = load_recipe(out)
    assert (advised.optim.steps, advised.optim.schedule.warmup_steps) == (70, 4)
    assert advised.data == load_recipe(small.recipe).data
    assert small.recipe.read_text() == before
    again = job("advise", small.recipe, "--out", out)
    assert again.code == 2 and again.err.count("error: ") == 1 and "nothing is overwritten" in again.err


def test_a_device_that_is_not_here_is_only_estimated(job: Job, small: Any) -> None:
    told = job("advise", small.recipe, "--memory-gb", "8")
    assert told.code == 0, told.err
    assert "estimated alone" in told.out and "none: the device is not here" in told.out


def test_a_mistake_is_one_message(job: Job, small: Any) -> None:
    for wrong, said in (("model.base=no-such-base", "no-such-base"), ("optim.batchs=4", "did you mean 'optim.batch'?")):
        told = job("advise", small.recipe, wrong)
        assert (told.code, told.err.count("error: ")) == (2, 1) and said in told.err, told.err

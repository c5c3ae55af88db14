"""A run whose step does not come back leaves the stacks of its threads in its folder, and goes on when it does."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stairstep.records import RunFolder
from stairstep.tasks import Recipe
from stairstep.tasks.retrieval import RetrievalTask
from stairstep.tasks.run import train

MakeRecipe = Callable[..., Recipe]
SHORT = ("optim.steps=3", "phases.text_warmup_steps=3", "evaluation.sets=[]", "evaluation.loss_every=0", "checkpoints.every=3")


def test_a_step_that_blocks_is_written_down_and_the_run_ends_as_any_other(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    made = recipe(*SHORT, "run.stalled_after_s=0.3")
    written = Path(made.run.root) / "run" / "stalled.txt"
    plain = RetrievalTask.step
    texts: list[str] = []

    def a_collective_that_never_ends() -> str:
        end = time.monotonic() + 60
        while True:
            text = written.read_text() if written.exists() else ""
            if "a_collective_that_never_ends" in text:  # and not what a slow step has left before
                return text
            assert time.monotonic() < end, "no stacks were written"
            time.sleep(0.01)

    def step(task: RetrievalTask, number: int) -> Any:
        if number == 2:
            texts.append(a_collective_that_never_ends())
        return plain(task, number)

    monkeypatch.setattr(RetrievalTask, "step", step)
    with caplog.at_level("WARNING", "stairstep"):
        done = train(made, console=False)
    assert (done.outcome.reason, done.outcome.step) == ("finished", 3)
    assert "_update" in texts[0], "the loop's own frame is in it"
    assert f"where each thread stands is in {written}" in caplog.text


def test_the_limit_may_differ_at_a_resume_and_overwriting_deletes_the_stacks(recipe: MakeRecipe):
    path = train(recipe(*SHORT), stop=lambda: True, console=False).folder
    (path / "stalled.txt").write_text("of before")
    (path / "stalled-1.txt").write_text("of before")
    assert train(recipe(*SHORT, "run.stalled_after_s=5"), console=False).outcome.reason == "finished"
    assert (path / "stalled.txt").exists()
    train(recipe(*SHORT, "run.resume=overwrite"), console=False)
    assert list(path.glob("stalled*")) == []
    assert RunFolder(path).holds_run()

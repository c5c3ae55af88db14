"""A run that evaluates says so: its heartbeat moves, its stall watch is satisfied and a line comes while it embeds, answers or waits."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stairstep.objectives import Alone
from stairstep.records import Progress, RunFolder, read_json
from stairstep.records import status as status_of
from stairstep.records.reading import Reading
from stairstep.sweeps.standing import standing_of
from stairstep.tasks import Recipe
from stairstep.tasks.beside import Found
from stairstep.tasks.opening import open_run
from stairstep.tasks.run import Nobody, RunJournal, train
from stairstep.training import EvaluationReport

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def journal(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> RunJournal:
    """The journal of a run that evaluates step 50, with a line at every tick; whatever it is told is written down at once."""
    monkeypatch.setattr(status_of, "HEARTBEAT_S", 0.0)
    made = recipe("run.stalled_after_s=900")
    folder = RunFolder.create(Path(made.run.root) / "run")
    with folder.claim():
        open_run(folder, made)
    one = RunJournal(made, folder, None, Alone(), lambda: False, lambda step, values: None, Nobody())  # type: ignore[arg-type]
    one.progress = Progress(350, 50, stream=io.StringIO(), every_s=0.0)
    one.evaluating(50)
    return one


def silent(journal: RunJournal) -> None:
    """As if nothing had been heard of the run for an hour."""
    path = journal.folder.path / "status.json"
    before = read_json(path)
    path.write_text(path.read_text().replace(str(before["heartbeat"]), str(before["heartbeat"] - 3600)))
    journal.watch._beaten -= 3600
    assert standing_of(journal.folder.path).trouble == "silent"


def heard(journal: RunJournal) -> str:
    """The last line, of a run that is healthy."""
    found = standing_of(journal.folder.path)
    assert (found.trouble, found.status.state) == ("", "evaluating")
    assert found.silent_s < 600
    assert time.monotonic() - journal.watch._beaten < 600
    return journal.progress._stream.getvalue().splitlines()[-1]  # type: ignore[attr-defined]


def test_while_it_embeds(journal: RunJournal) -> None:
    silent(journal)
    journal.embedding("tiles embedded", 1200, 7426)
    assert heard(journal) == "training 50/350, evaluating step 50: 1200 of 7426 tiles embedded"


def test_while_it_answers(journal: RunJournal) -> None:
    silent(journal)
    journal.reading(Reading(50, "tinywiki", 12, 400, 12, 6.0, 0.0))
    assert heard(journal) == "training 50/350, tinywiki at step 50: 12 of 400 questions done"


def test_while_it_waits_for_an_evaluator(journal: RunJournal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_step", lambda: 60)
    silent(journal)
    looks = iter([None, Found({"tinywiki/mrr": 0.5}, 0.5, ())])
    monkeypatch.setattr(journal._beside, "found", lambda step: next(looks))
    assert journal.arrived(50, wait=True) == EvaluationReport({"tinywiki/mrr": 0.5}, 0.5)
    assert "training 50/350, waiting for the evaluation of step 50" in heard(journal)


def test_a_run_is_told_how_far_each_of_its_evaluations_is(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, str, int, int]] = []
    plain = RunJournal.embedding

    def embedding(journal: RunJournal, *one: Any) -> None:
        told.append((journal._at, *one))
        plain(journal, *one)

    monkeypatch.setattr(RunJournal, "embedding", embedding)
    made = recipe("optim.steps=2", "phases.text_warmup_steps=2", "evaluation.every=2", "evaluation.loss_every=0", "checkpoints.every=2")
    assert train(made, console=False).outcome.reason == "finished"
    assert {(step, what) for step, what, _, _ in told} >= {
        (step, what) for step in (0, 2) for what in ("tiles known by their content", "tiles embedded", "query texts embedded")
    }

"""The evaluator beside training, in this process: it does what is wanted and no more, holds one model, and says where it hangs."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stairstep.objectives import Alone
from stairstep.records import RunFolder
from stairstep.records.followed import ReadRunFolder
from stairstep.records.mirror import MirroredRunFolder
from stairstep.settings import to_plain
from stairstep.tasks import Recipe, besides, evaluator
from stairstep.tasks.beside import Beside
from stairstep.tasks.besides import beside_of
from stairstep.tasks.evaluator import Evaluator
from stairstep.tasks.placing import open_placed
from stairstep.tasks.retrieval import RetrievalTask
from stairstep.tasks.run import Nobody, RunJournal, train
from stairstep.training import EvaluationReport

MakeRecipe = Callable[..., Recipe]
ONE_STEP = ("optim.steps=1", "optim.schedule.warmup_steps=0", "phases.text_warmup_steps=1", "evaluation.loss_every=0")


@pytest.fixture
def trained(recipe: MakeRecipe) -> Callable[..., tuple[Recipe, Beside]]:
    """A run of one step, and its wish to have that step evaluated."""

    def make(*overrides: str) -> tuple[Recipe, Beside]:
        path = train(recipe(*ONE_STEP, "evaluation.sets=[]", *overrides), console=False).folder
        beside = Beside(RunFolder(path))
        assert beside.want(1)
        return recipe(*ONE_STEP, *overrides), beside

    return make


def written(beside: Beside) -> list[str]:
    """What evaluations have left in a run."""
    return sorted(str(one.relative_to(beside.folder.path)) for one in beside.folder.path.rglob("*") if "eval_step" in one.name) + [
        one.name for one in beside.folder.path.glob("beside/found-*")
    ]


def test_what_is_wanted_is_evaluated_once(trained: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made, beside = trained()
    one = Evaluator()
    one.evaluate(to_plain(made), 1)
    found = beside.found(1)
    assert found is not None and found.metrics and beside.wanted() == []
    assert written(beside) == ["eval_step1.jsonl", "eval_step1.summary.json", "found-1.json"]
    monkeypatch.setattr(RetrievalTask, "evaluate", lambda *_: pytest.fail("it is known"))
    one.evaluate(to_plain(made), 1)
    beside.want(1)
    one.evaluate(to_plain(made), 1)  # asked for twice, as after a call that was thought lost


def test_what_a_run_has_taken_back_is_neither_computed_nor_written(trained: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made, beside = trained()
    one, plain, whole = Evaluator(), to_plain(made), RetrievalTask.evaluate
    beside.withdraw()
    with monkeypatch.context() as patch:
        patch.setattr(RetrievalTask, "evaluate", lambda *_: pytest.fail("nobody wants it"))
        one.evaluate(plain, 1)  # before its turn
    assert written(beside) == []

    def while_embedding(task: RetrievalTask, step: int) -> EvaluationReport:
        report = whole(task, step)
        beside.withdraw()
        return report

    def while_asking(task: RetrievalTask, step: int) -> EvaluationReport:
        assert task.answering.reading is not None
        task.answering.reading.begin(step, "q", 3)  # it is wanted still
        beside.withdraw()
        task.answering.reading.begin(step, "q", 3)
        raise AssertionError("nobody wants the other questions")

    def before_embedding(task: RetrievalTask, step: int) -> EvaluationReport:
        beside.withdraw()
        whole(task, step)
        raise AssertionError("nobody wants what is embedded")

    monkeypatch.setattr(evaluator, "_LOOK_S", 0.0)
    for evaluate in (while_embedding, while_asking, before_embedding):
        beside.want(1)
        monkeypatch.setattr(RetrievalTask, "evaluate", evaluate)
        one.evaluate(plain, 1)
        assert written(beside) == []
    monkeypatch.setattr(RetrievalTask, "evaluate", whole)
    beside.want(1)
    one.evaluate(plain, 1)  # the run goes on and wants it again
    assert beside.found(1) is not None


def test_two_models_are_never_held_at_once(trained: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [trained(f"run.name=run-{rank}", f"model.adapter.rank={rank}") for rank in (2, 3)]
    load, models, closed = evaluator.load_encoder, [], []

    def loaded(*args: Any, **more: Any) -> Any:
        assert [one for one in models if one() is not None] == [], "the model of before is still there while the next one is loaded"
        assert len(closed) == len(models)
        encoder = load(*args, **more)
        models.append(weakref.ref(encoder.model))
        return encoder

    close = RetrievalTask.close
    monkeypatch.setattr(evaluator, "load_encoder", loaded)
    monkeypatch.setattr(RetrievalTask, "close", lambda task: (closed.append(1), close(task)))
    one = Evaluator()
    for made, beside in runs:
        one.evaluate(to_plain(made), 1)
        assert beside.found(1) is not None
    assert len(models) == 2
    assert models[-1]() is not None, "the last one is kept for the next step"


def test_one_model_serves_runs_that_differ_in_other_things(trained: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [trained(f"run.name=run-{seed}", f"run.seed={seed}") for seed in (0, 1)]
    load, loads = evaluator.load_encoder, []
    monkeypatch.setattr(evaluator, "load_encoder", lambda *args, **more: (loads.append(1), load(*args, **more))[1])
    one = Evaluator()
    for made, beside in runs:
        one.evaluate(to_plain(made), 1)
        assert beside.found(1) is not None
    assert len(loads) == 1


def test_an_evaluation_that_hangs_leaves_its_stacks(trained: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made, beside = trained("run.stalled_after_s=0.3")
    whole, seen = RetrievalTask.evaluate, []

    def a_reader_that_does_not_answer(task: RetrievalTask, step: int) -> EvaluationReport:
        end = time.monotonic() + 60
        while not (beside.hangs(step) and "a_reader_that_does_not_answer" in beside.stacks(step).read_text()):
            assert time.monotonic() < end, "no stacks were written"
            time.sleep(0.01)
        seen.append(beside.stacks(step).name)
        return whole(task, step)

    monkeypatch.setattr(RetrievalTask, "evaluate", a_reader_that_does_not_answer)
    Evaluator().evaluate(to_plain(made), 1)
    assert seen == ["stalled-evaluation-1.txt"]
    assert beside.found(1) is not None, "it was waited for"


def test_stacks_are_of_now_or_of_the_past(trained: Callable[..., Any]) -> None:
    _, beside = trained()
    path = beside.folder.path

    def at(second: float, what: Path) -> None:
        what.touch()
        os.utime(what, (second, second))

    assert not beside.hangs(1)
    at(100.0, path / "beside" / "wanted-1")
    at(200.0, beside.stacks(1))
    assert beside.hangs(1)
    at(150.0, path / "reading.json")
    assert beside.hangs(1)
    at(250.0, path / "reading.json")
    assert not beside.hangs(1), "questions were answered since"
    at(300.0, beside.stacks(1))
    assert beside.hangs(1)
    assert beside.alive(1)
    assert not beside.hangs(1), "it gets on, or another evaluator has taken it up"
    beside.withdraw()
    assert not beside.alive(1)
    assert beside.wanted() == [], "what was taken back is not wanted anew by who comes late"


@pytest.mark.parametrize("hangs", [False, True])
def test_a_run_that_waits_for_an_evaluation_lives_as_long_as_that_does(trained: Callable[..., Any], hangs: bool) -> None:
    made, beside = trained()
    looks: list[int] = []

    def stop() -> bool:
        looks.append(1)
        return len(looks) > 3

    journal = RunJournal(made, beside.folder, SimpleNamespace(), Alone(), stop, lambda step, values: None, Nobody())  # type: ignore[arg-type]
    journal.trainer = SimpleNamespace(progress=SimpleNamespace(step=7))  # type: ignore[assignment]
    beats: list[int] = []
    journal.watch = SimpleNamespace(beat=lambda: beats.append(1))  # type: ignore[assignment]
    if hangs:
        beside.stacks(1).write_text("stacks")
    assert journal.arrived(1, wait=True) is None
    status = beside.folder.status
    assert status is not None
    assert (len(beats), status.step) == ((0, 1) if hangs else (3, 7))


# --- of a run in an object store


@pytest.fixture
def stored(recipe: MakeRecipe, object_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A run of one step in a store, its driver's copy, and an evaluator; each on a machine of its own, and only the store has all."""
    monkeypatch.setattr(evaluator, "_LOOK_S", 0.0)
    monkeypatch.setattr(besides, "_LOOK_S", 0.0)
    monkeypatch.setenv("STAIRSTEP_CACHE", str(tmp_path / "run"))
    made = recipe(*ONE_STEP, f"run.root={object_root}")
    train(replace(made, evaluation=replace(made.evaluation, sets=())), console=False)
    folder = open_placed(made)
    assert isinstance(folder, MirroredRunFolder)
    driver = beside_of(ReadRunFolder(tmp_path / "driver", folder.remote))
    monkeypatch.setenv("STAIRSTEP_CACHE", str(tmp_path / "evaluator"))
    one, plain = Evaluator(), to_plain(made)
    with folder.claim():
        yield SimpleNamespace(
            folder=folder, ours=beside_of(folder), driver=driver, remote=folder.remote, evaluate=lambda: one.evaluate(plain, 1)
        )


def test_an_evaluator_without_a_folder_in_common_finds_the_same(
    stored: SimpleNamespace, trained: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, driver, remote = stored.ours, stored.driver, stored.remote
    stored.evaluate()
    assert ours.found(1) is None, "nobody wants it yet"
    assert ours.want(1)
    driver.renew()
    assert driver.open() == [1]
    stored.evaluate()
    found = ours.found(1)
    local, beside = trained()
    Evaluator().evaluate(to_plain(local), 1)
    assert found is not None
    assert found == beside.found(1)
    assert ours.open() == []
    assert remote.get("eval_step1.jsonl") == (beside.folder.path / "eval_step1.jsonl").read_bytes()
    assert remote.exists("eval_step1.summary.json")
    assert [name for name in remote.files() if name.startswith("beside/")] == ["beside/found-1.json"]
    monkeypatch.setattr(RetrievalTask, "evaluate", lambda *_: pytest.fail("it is known"))
    assert ours.want(1)
    stored.evaluate()
    assert remote.exists("beside/found-1.json"), "who goes on from the checkpoint before finds it again"


def test_a_wish_that_is_taken_back_does_not_come_back(stored: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does anything that an evaluator writes afterwards."""
    whole = RetrievalTask.evaluate

    def withdrawn_meanwhile(task: RetrievalTask, step: int) -> EvaluationReport:
        report = whole(task, step)
        stored.driver.withdraw()
        return report

    stored.ours.want(1)
    monkeypatch.setattr(RetrievalTask, "evaluate", withdrawn_meanwhile)
    stored.evaluate()
    assert not [name for name in stored.remote.files() if "eval_step" in name or name.startswith("beside/")]
    stored.evaluate()
    assert not [name for name in stored.remote.files() if "eval_step" in name or name.startswith("beside/")]


def test_a_wish_that_somebody_else_has_removed_is_put_again(stored: SimpleNamespace) -> None:
    """A second driver of the same run, which was refused in the end, has taken back what was not its own."""
    stored.ours.want(1)
    stored.driver.withdraw()
    assert stored.ours.found(1) is None
    stored.folder.share()
    stored.driver.renew()
    assert stored.driver.open() == [1]


def test_an_evaluator_that_died_between_finding_and_wish_leaves_no_work(stored: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    stored.ours.want(1)
    stored.evaluate()
    stored.remote.put("beside/wanted-1", b"")
    stored.driver.renew()
    assert stored.driver.wanted() == [1]
    assert stored.driver.open() == [], "the pool deals only what is open"
    (stored.folder.path / "beside" / "wanted-1").touch()  # as a run has it that was pulled from such a store
    assert stored.ours.found(1) is not None
    assert stored.ours.want(1)
    stored.folder.share()
    assert not stored.remote.exists("beside/wanted-1")


def test_a_checkpoint_that_went_with_its_wish_is_no_error(stored: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    load = evaluator.load_encoder

    def late(*arguments: Any, **more: Any) -> Any:
        stored.remote.remove(["checkpoint-1/COMPLETE"])
        stored.driver.withdraw()
        return load(*arguments, **more)

    monkeypatch.setattr(evaluator, "load_encoder", late)
    stored.ours.want(1)
    stored.evaluate()
    assert not [name for name in stored.remote.files() if "eval_step" in name]


def test_a_hanging_evaluator_is_known_by_the_store(stored: SimpleNamespace) -> None:
    stored.ours.want(1)
    assert stored.ours.found(1) is None
    assert not stored.ours.hangs(1)
    time.sleep(1.1)  # a store's times are whole seconds
    stored.remote.put("stalled-evaluation-1.txt", "stacks")
    assert stored.ours.found(1) is None
    assert stored.ours.hangs(1)
    time.sleep(1.1)
    stored.remote.put("beside/alive-1", b"")
    assert stored.ours.found(1) is None
    assert not stored.ours.hangs(1)


def test_evaluators_of_other_nodes_keep_their_folders(stored: SimpleNamespace, tmp_path: Path) -> None:
    stored.ours.want(1)
    stored.evaluate()
    (ours,) = (tmp_path / "evaluator").glob("runs/*/.evaluators/*")
    name, _, process = ours.name.rpartition("-")
    assert process == str(os.getpid())
    elsewhere, gone = ours.with_name(f"{name.replace('@', '@not-')}-999999999"), ours.with_name(f"{name}-999999999")
    for one in (elsewhere, gone):
        one.mkdir()
    stored.remote.remove(["beside/found-1.json"])
    stored.remote.put("beside/wanted-1", b"")
    stored.evaluate()
    assert elsewhere.exists(), "whether that process lives is not known here"
    assert not gone.exists()

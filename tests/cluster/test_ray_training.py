"""Training under Ray Train with two workers: the numbers of one process, the same bits after a worker was killed, one message for an error.

Under `make test` only what is refused before a worker comes: a worker computes for ten seconds until it is there, so one run has to show
that workers grow, are killed and take the steps of one process (test_elastic.py), and one that an error is told (test_sweep_on_ray.py).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stairstep.cluster.train import train_on_ray
from stairstep.cluster.words import Words
from stairstep.objectives import ProcessGroup
from stairstep.records import MetricLog, RunFolder, comparable, is_volatile, read_json, series
from stairstep.settings import InputError, TrainingError, UnreachableError
from stairstep.tasks import Recipe
from stairstep.tasks.opening import Finished
from stairstep.tasks.run import train

pytestmark = pytest.mark.timeout(1200)

STEPS = 8
MakeRecipe = Callable[..., Any]
Background = Callable[..., Future[Finished]]


def rows(finished: Finished) -> list[dict[str, Any]]:
    return MetricLog(finished.folder / "metrics.jsonl").rows()


def values(finished: Finished, name: str) -> list[float]:
    return [value for _, value in series(rows(finished), name)]


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint-{step}" / "adapter_model.safetensors")


def bits(folder: Path) -> dict[str, bytes]:
    """What a checkpoint of the last step holds, file by file."""
    place = folder / f"checkpoint-{STEPS}"
    return {
        path.name: path.read_bytes() for path in sorted(place.iterdir()) if path.suffix == ".safetensors" or path.name == "trainer.json"
    }


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The relative distance of two sets of weights, all tensors taken together."""
    assert one.keys() == other.keys()
    distance = sum(float((one[name].double() - other[name].double()).square().sum()) for name in one)
    return (distance / sum(float(value.double().square().sum()) for value in one.values())) ** 0.5


def in_this_process(recipe: Recipe) -> Finished:
    before = torch.get_num_threads()
    try:
        return train(recipe, console=False)
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alone(recipe: MakeRecipe) -> Finished:
    """The same run in this process."""
    return in_this_process(recipe("alone", "cluster.workers=0"))


def test_dropout_is_on(recipe: MakeRecipe) -> None:
    """The comparisons of workers with one process would be easier without dropout; here is what they would have been."""
    short = ("evaluation.sets=[]", "evaluation.loss_every=0", "optim.schedule.warmup_steps=0", "phases.text_warmup_steps=0")
    kept = ("cluster.workers=0", "optim.steps=1", *short)
    one = in_this_process(recipe("with-dropout", *kept))
    other = in_this_process(recipe("without-dropout", *kept, "model.adapter.dropout=0"))
    assert values(one, "train/gradient_norm")[0] != pytest.approx(values(other, "train/gradient_norm")[0], rel=1e-4)


def test_a_second_driver_is_refused(ray_here: None, recipe: MakeRecipe) -> None:
    from stairstep.cluster.seen import SeenRun
    from stairstep.cluster.train import _one_driver

    other = recipe("refused")
    path = Path(other.run.root) / "refused"
    with _one_driver(SeenRun(other)), pytest.raises(InputError, match="at work on this run") as refused:
        train_on_ray(other)
    assert str(path) in str(refused.value)
    assert ".ray" not in str(refused.value)
    assert not (path / "recipe.yaml").exists()


def test_more_workers_than_this_machine_can_have(ray_here: None, recipe: MakeRecipe) -> None:
    with pytest.raises(InputError, match=r"cluster.workers: 64 workers with CPU 1 each .* CPU 4; lower cluster.workers"):
        train_on_ray(recipe("crowd", "cluster.workers=64"))
    with pytest.raises(InputError, match=r"GPU 0.*cluster.device=cpu"):
        train_on_ray(recipe("crowd", "cluster.device=cuda"))
    status = RunFolder.open(Path(recipe("crowd").run.root) / "crowd").status
    assert status is not None
    assert status.state == "failed"
    assert "GPU" in status.message


def test_a_stop_ends_the_wait_for_nodes_and_leaves_no_wish_behind(
    ray_here: None, recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a Ray that goes on afterwards, as in a sweep's trial; the wait itself would outlast this test's own limit."""
    from ray.util import placement_group_table

    from stairstep.cluster import session

    def wished() -> list[Any]:
        return [one for one in placement_group_table().values() if one["state"] == "PENDING"]

    monkeypatch.setattr(session, "_started_here", lambda: False)
    assert not wished()
    other = recipe("never", "cluster.workers=64", "cluster.start_timeout_s=3600")
    finished = train_on_ray(other, lambda: "the sweep is stopped" if wished() else "")
    assert (finished.outcome.reason, finished.outcome.step) == ("stopped", 0)
    assert not wished()
    status = RunFolder.open(finished.folder).status
    assert status is not None
    assert status.state == "stopped"


# --- soak


@pytest.fixture(scope="module")
def undisturbed(ray_here: None, recipe: MakeRecipe) -> Finished:
    """Two workers, eight steps."""
    return train_on_ray(recipe("undisturbed"))


@pytest.mark.soak
def test_two_workers_take_the_steps_of_one(undisturbed: Finished, alone: Finished) -> None:
    assert undisturbed.outcome.reason == "finished"
    assert undisturbed.outcome.step == STEPS
    together, single = rows(undisturbed), rows(alone)
    assert [sorted(row) for row in together] == [sorted(row) for row in single]
    losses, expected = values(undisturbed, "train/loss"), values(alone, "train/loss")
    assert len(losses) == STEPS
    assert losses[0] == pytest.approx(expected[0], abs=1e-6)
    assert losses == pytest.approx(expected, abs=1e-3)
    assert max(losses) - min(losses) > 0.05  # it does train
    norms, single_norms = values(undisturbed, "train/gradient_norm"), values(alone, "train/gradient_norm")
    assert norms[0] > 0
    assert norms[0] == pytest.approx(single_norms[0], rel=1e-5)
    assert norms == pytest.approx(single_norms, rel=1e-3)
    for name in ("validation/loss", "tinywiki/mrr", "tinywiki/ndcg@10", "rate/llm", "train/temperature"):
        assert values(undisturbed, name), name
        assert values(undisturbed, name) == pytest.approx(values(alone, name), abs=1e-3), name
    for step, most in ((3, 1e-5), (STEPS, 1e-3)):
        first = weights(alone.folder, step)
        assert apart(first, weights(undisturbed.folder, step)) < most
    assert all(value.abs().max() > 0 for value in first.values())  # also the LoRA B, which begins at zero
    assert apart(first, weights(alone.folder, 3)) > 0.01
    assert {path.name for path in alone.folder.iterdir()} == {path.name for path in undisturbed.folder.iterdir()}


@pytest.mark.soak
def test_a_run_leaves_nothing_but_its_folder(undisturbed: Finished) -> None:
    environment = read_json(undisturbed.folder / "environment.json")
    assert environment["torch"]["threads"] == 1  # run.threads, in the worker that wrote it
    assert not (undisturbed.folder.parent / ".ray").exists()
    assert not (undisturbed.folder / "stop").exists()
    status = RunFolder.open(undisturbed.folder).status
    assert status is not None
    assert (status.state, status.step) == ("finished", STEPS)
    assert status.pid != os.getpid()
    assert [name for name in os.environ if name.startswith("RAY_TRAIN") and name != "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == []


def killed_at(
    folder: Path, step: int, which: int, running: Future[Finished], tools: SimpleNamespace, pause_s: float = 0.0
) -> tuple[Finished, int]:
    """SIGKILL one of the two workers once the run has logged a step; returns how the run ended, and the step at the kill."""
    tools.wait(lambda: running.done() or tools.last_step(folder) >= step, f"step {step}")
    time.sleep(pause_s)
    found = tools.workers()
    assert len(found) == 2
    first = read_json(folder / "status.json")["pid"]
    assert first in [one.pid for one in found]
    victim = next(one for one in found if (one.pid == first) == (which == 0))
    tools.kill(victim)
    at = tools.last_step(folder)
    return running.result(timeout=900), at


def same_as_undisturbed(finished: Finished, undisturbed: Finished) -> None:
    assert finished.outcome == undisturbed.outcome
    assert bits(finished.folder) == bits(undisturbed.folder)
    assert len(bits(finished.folder)) >= 3
    assert comparable(rows(finished)) == comparable(rows(undisturbed))
    assert any(is_volatile(name) for row in rows(finished) for name in row)


@pytest.mark.soak
def test_a_killed_worker_changes_no_bit(undisturbed: Finished, recipe: MakeRecipe, background: Background, tools: SimpleNamespace) -> None:
    other = recipe("killed")
    folder = Path(other.run.root) / "killed"
    running = background(train_on_ray, other)
    finished, at = killed_at(folder, 4, which=1, running=running, tools=tools)
    assert 4 <= at < STEPS
    same_as_undisturbed(finished, undisturbed)
    assert finished.folder != undisturbed.folder


def refusal(recipe: Recipe, kind: type[Exception]) -> Any:
    """The error that a run ends with, within minutes and with nothing behind it that would be printed too."""
    started = time.monotonic()
    with pytest.raises(kind) as told:
        train_on_ray(recipe)
    assert time.monotonic() - started < 400
    assert told.value.__cause__ is None
    assert told.value.__suppress_context__ or told.value.__context__ is None
    return told.value


def spoil_a_tile(micro: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy of the world in which one positive tile is no image."""
    world = tmp_path / "world"
    shutil.copytree(micro.world, world)
    row = json.loads((world / "train_hn.jsonl").read_text().splitlines()[0])
    (world / row["chunk_path"]).write_bytes(b"no image")
    return world


@pytest.mark.soak
@pytest.mark.parametrize("everywhere", [False, True], ids=["on one worker", "on all workers"])
def test_bad_input_is_told_once(
    ray_here: None, recipe: MakeRecipe, micro: SimpleNamespace, tmp_path: Path, everywhere: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """A tile that cannot be decoded: all workers meet it before the first step, or one alone while the others wait for its rows."""
    world = spoil_a_tile(micro, tmp_path)
    name = f"spoiled-{everywhere}".lower()
    unseen = ("data.check_tiles=false", "phases.text_warmup_steps=0", "evaluation.loss_every=0", "evaluation.sets=[]")
    told = refusal(recipe(name, f"data.roots=[{world}]", *(() if everywhere else unseen)), InputError)
    assert "this is not an image" in str(told)
    assert told.exit_code == 2
    assert "Traceback" not in str(told)
    printed = "".join(capfd.readouterr())
    assert "Traceback" not in printed
    assert "(raylet" not in printed
    status = RunFolder.open(Path(recipe(name).run.root) / name).status
    assert status is not None
    assert (status.state, status.message) == ("failed", str(told))


def with_train(body: Callable[[ProcessGroup], Any]) -> Callable[[dict[str, Any]], Any]:
    """The workers' function with another training in it; Ray carries it to the workers by value."""

    def work(config: dict[str, Any]) -> Any:
        from stairstep.cluster.work import work as real
        from stairstep.tasks import run

        run.train = lambda recipe, workers, **_: body(workers)  # type: ignore[assignment]
        return real(config)

    return work


@pytest.mark.soak
def test_a_defect_shows_its_traceback_and_is_not_tried_again(ray_here: None, recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    class Peculiar(Exception):
        """One that does not survive the way between processes."""

        def __init__(self, one: int, *, other: int) -> None:
            super().__init__(f"{one} and {other}")

    def body(workers: ProcessGroup) -> None:
        if workers.rank == 1:
            raise Peculiar(1, other=2)
        workers.barrier()

    groups = monkeypatch_groups(monkeypatch)
    monkeypatch.setattr("stairstep.cluster.train.work", with_train(body))
    told = refusal(recipe("defect"), RuntimeError)
    assert str(told).count("Traceback") == 1
    assert "Peculiar: 1 and 2" in str(told)
    assert "in body" in str(told)
    assert len(groups) == 1


@pytest.mark.soak
def test_what_fails_twice_alike_is_given_up(ray_here: None, recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def body(workers: ProcessGroup) -> None:
        raise RuntimeError("the device is gone")

    groups = monkeypatch_groups(monkeypatch)
    monkeypatch.setattr("stairstep.cluster.train.work", with_train(body))
    told = refusal(recipe("twice", "cluster.max_failures=9"), RuntimeError)
    assert "failed (RuntimeError: the device is gone), 2 times" in str(told)
    assert str(told).count("Traceback") == 1
    assert len(groups) == 2


def monkeypatch_groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the groups of workers that a driver sets up."""
    from stairstep.cluster.train import _Driver

    started: list[int] = []
    group = _Driver._group

    def counted(self: _Driver, words: Words, size: int) -> Any:
        started.append(size)
        return group(self, words, size)

    monkeypatch.setattr(_Driver, "_group", counted)
    return started


@pytest.mark.soak
def test_a_loss_that_is_not_finite(ray_here: None, recipe: MakeRecipe) -> None:
    told = refusal(recipe("not-finite", "optim.rates.llm=1e30", "optim.schedule.warmup_steps=0"), TrainingError)
    assert "is not finite" in str(told)
    assert told.exit_code == 1
    folder = Path(recipe("not-finite").run.root) / "not-finite"
    assert json.loads((folder / "not_finite.json").read_text())["rows"]


KILLS = 5  # of either run


def lose_a_worker(
    folder: Path, running: Future[Finished], which: int, step: int, former: frozenset[int], tools: SimpleNamespace
) -> frozenset[int]:
    """SIGKILL one worker of a group that is not a former one, once the run has logged a step; returns all workers known by then."""

    def at_work() -> list[Any]:
        """Both workers of the group, once the first of them has the run."""
        found = [one for one in tools.workers() if one.pid not in former] if tools.last_step(folder) >= step else []
        return found if len(found) == 2 and read_json(folder / "status.json")["pid"] in [one.pid for one in found] else []

    found = tools.wait(lambda: running.done() or at_work(), f"step {step}", patience_s=1200)
    assert found is not True, running.exception()
    first = read_json(folder / "status.json")["pid"]
    tools.kill(next(one for one in found if (one.pid == first) == (which == 0)))
    print(f"{folder.name}: killed worker {which} at step {tools.last_step(folder)}", flush=True)
    return former | {one.pid for one in found}


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_random_kills_change_no_bit(undisturbed: Finished, recipe: MakeRecipe, background: Background, tools: SimpleNamespace) -> None:
    """Two runs, each of which loses a worker five times, at a random step of whatever group is at work then."""
    chance = random.Random(0)
    for number in range(2):
        name, former = f"random-{number}", frozenset[int]()
        other = recipe(name, f"cluster.max_failures={KILLS}", "cluster.start_timeout_s=900")
        running = background(train_on_ray, other)
        for kill in range(KILLS):
            step = chance.randrange(1, STEPS - 1)
            former = lose_a_worker(Path(other.run.root) / name, running, (number + kill) % 2, step, former, tools)
        same_as_undisturbed(running.result(timeout=1200), undisturbed)


@pytest.mark.soak
def test_lost_workers_are_not_replaced_for_ever(ray_here: None, recipe: MakeRecipe, background: Background, tools: SimpleNamespace) -> None:
    other = recipe("hopeless", "cluster.max_failures=1")
    running = background(train_on_ray, other)
    seen: set[int] = set()
    for _ in range(2):
        known = frozenset(seen)
        found = tools.wait(lambda known=known: running.done() or {one.pid for one in tools.workers()} - known, "a new worker")
        assert found is not True, running
        seen |= found
        tools.kill(next(one for one in tools.workers() if one.pid in found))  # as soon as it is there
    with pytest.raises(TrainingError, match=r"lost .*no restart is left"):
        running.result(timeout=900)


@pytest.mark.soak
def test_resources_that_never_come(ray_here: None, recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a cluster that might grow, the wait is bounded and the message says what was asked for and what there is."""
    from stairstep.cluster import session

    monkeypatch.setattr(session, "_started_here", lambda: False)
    started = time.monotonic()
    with pytest.raises(UnreachableError, match=r"did not come within 5 s .*64 workers with CPU 1 each.*CPU 4, of which 4 free"):
        train_on_ray(recipe("waiting", "cluster.workers=64", "cluster.start_timeout_s=5"))
    assert time.monotonic() - started < 120

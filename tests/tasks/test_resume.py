"""A run that is killed or stopped at any instant goes on to the very bits of an undisturbed one: weights, optimizer, metrics, rows.

Trainings run in processes of their own, forked from one that has imported everything; one test goes the way of a user instead.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kill_resume import differences, disturb, launch, wait, warm_up
from safetensors.torch import load_file
from tasks_faults import strike
from tasks_world import make_recipe, recipe_tree

from stairstep.records import RunFolder, comparable, read_json
from stairstep.settings import to_yaml
from stairstep.tasks import Recipe

ROOT = Path(__file__).parents[2]
STEPS = 6
# Warmup on text, then every other step text, averaged weights, dropout, decoding ahead; looks and checkpoints at steps of their own.
EVERYTHING = (
    f"optim.steps={STEPS}",
    "optim.batch=5",
    "model.query_instruction=q",
    "model.document_instruction=d",
    "optim.ema_decay=0.8",
    "phases.text_warmup_steps=2",
    "phases.text_mix=0.5",
    "evaluation.every=3",
    "evaluation.loss_every=2",
    "checkpoints.every=2",
    "checkpoints.keep=1",
    "objective.gradcache.chunk_items=5",
)


@pytest.fixture(scope="module")
def made(micro: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    """The recipe with everything on; each call gives one with a root of its own, so that no run finds another's embeddings."""
    warm_up()

    def make(*overrides: str) -> Recipe:
        return make_recipe(recipe_tree(tmp_path_factory.mktemp("root"), micro.world, micro.base), *EVERYTHING, *overrides)

    return make


@pytest.fixture(scope="module")
def whole(made: Callable[..., Recipe]) -> SimpleNamespace:
    """The undisturbed run, and how long it took."""
    started = time.perf_counter()
    recipe = made()
    assert trained(recipe) == 0, log_of(recipe).read_text()
    folder = RunFolder.open(folder_of(recipe))
    events = [(row["step"], "train/loss" in row, row.get("train/text")) for row in folder.metrics.rows()]
    assert [step for step, train, _ in events if train] == list(range(1, STEPS + 1))
    assert [text for _, train, text in events if train] == [1, 1, 0, 1, 0, 1]
    assert [step for step, train, _ in events if not train] == [0, 0, 0, 2, 3, 3, 4, 6, 6, 6]
    state = load_file(folder.checkpoints()[-1].path / "trainer.safetensors")
    assert any(name.startswith("average.") for name in state) and any(name.startswith("adamw.exp_avg.") for name in state)
    return SimpleNamespace(recipe=recipe, folder=folder, took_s=time.perf_counter() - started)


def folder_of(recipe: Recipe) -> Path:
    return Path(recipe.run.root) / str(recipe.run.name)


def log_of(recipe: Recipe) -> Path:
    return Path(recipe.run.root) / "log.txt"


def trained(recipe: Recipe, *fault: Any) -> int:
    """The exit code of a training in a process of its own, struck by a fault where one is given."""
    return wait(launch(recipe, log_of(recipe), strike if fault else None, *fault))


def assert_same(whole: SimpleNamespace, recipe: Recipe) -> None:
    assert differences(whole.folder.path, folder_of(recipe)) == []


def test_kills_at_random_instants_change_no_bit(whole: SimpleNamespace, made: Callable[..., Recipe]) -> None:
    deaths, found = disturb(made(), whole.folder, 3, random.Random(time.time_ns()), whole.took_s)
    assert found == [], deaths
    assert len(deaths) == 3


# --- every story is two processes, one that is struck and one that goes on; two stories are under way at a time

KILLS = {
    # where, at which call: the step that the run goes on from
    ("evaluation", 1): 0,  # of step 0
    ("half a line", 5): 4,  # of step 5
    ("weights written", 2): 2,  # of the checkpoint of step 3: no marker yet
    ("evaluated", 2): 3,  # measured, but neither logged nor written
    ("rows written", 2): 3,  # rows, but no summary
    ("deleting", 1): 3,  # the checkpoint of step 2 has another name, and lies there
    ("updated", 6): 4,  # the last update, not yet logged
}
STOPS = {
    # where, at which call: the step whose checkpoint the stop leaves
    ("loading", 1): 1,
    ("evaluation", 1): 1,  # of step 0
    ("step", 1): 1,  # text warmup
    ("step", 2): 2,  # the last of the warmup
    ("step", 5): 5,  # main
    ("validation", 2): 3,  # of step 2
    ("weights written", 1): 3,  # the stop comes while the checkpoint of step 2 is written
    ("evaluation", 2): 4,  # of step 3
    ("step", 6): 6,  # the last step, whose validation and evaluation are still to come
    ("evaluation", 3): 6,  # the last evaluation: nothing is left to stop
}
# What `make soak` adds: each is much like one of the others.
SOAK_KILLS = {("evaluated", 2), ("updated", 6)}
SOAK_STOPS = {("evaluation", 1), ("step", 1), ("step", 5)}


def instants(points: Iterable[tuple[str, int]], soak: set[tuple[str, int]]) -> list[Any]:
    """The parameters of a test, those of `make soak` marked."""
    assert soak < set(points)
    return [pytest.param(*one, marks=pytest.mark.soak if one in soak else ()) for one in points]


@dataclass
class Story:
    """A run after the blow, and after it has gone on."""

    recipe: Recipe
    code: int
    said: str
    checkpoints: list[int]
    logged: int
    state: str
    phase: str | None
    codes_after: list[int]
    said_after: str


def tell(recipe: Recipe, strikes: Sequence[tuple[str, int, int]]) -> Story:
    """Train with a blow in each of the first processes, then to the end."""
    return _go_on(recipe, *[trained(recipe, *one) for one in strikes])


def _go_on(recipe: Recipe, *codes: int, said: str | None = None) -> Story:
    folder = RunFolder.open(folder_of(recipe))
    checkpoints = folder.checkpoints()
    said = log_of(recipe).read_text() if said is None else said
    logged = max((row["step"] for row in folder.metrics.rows()), default=0)
    state = folder.status.state if folder.status is not None else "nothing"
    phase = read_json(checkpoints[-1].path / "trainer.json")["phase"] if checkpoints else None
    after = [*codes[1:]] if state == "finished" else [*codes[1:], trained(recipe)]
    steps = [0, *(one.step for one in checkpoints)]
    return Story(recipe, codes[0], said, steps, logged, state, phase, after, log_of(recipe).read_text())


def tell_of_a_user(recipe: Recipe) -> Story:
    """The command line, SIGTERM once it trains."""
    file = Path(recipe.run.root) / "mine.yaml"
    file.write_text(to_yaml(recipe))
    command = [sys.executable, "-m", "jobs.train", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = RunFolder(folder_of(recipe)).metrics
    try:
        while process.poll() is None and not any("train/loss" in row for row in log.rows()):
            time.sleep(0.01)
        process.terminate()
        said, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    return _go_on(recipe, process.returncode, said=said)


@pytest.fixture(scope="module")
def stories(made: Callable[..., Recipe], request: pytest.FixtureRequest) -> Iterator[dict[Any, Future[Story]]]:
    """The stories of the tests that were chosen, as they come to their ends."""
    chosen = {one.name for one in request.session.items if one.path == request.path}
    with ThreadPoolExecutor(2) as pool:
        told: dict[Any, Future[Story]] = {"a user": pool.submit(tell_of_a_user, made())}
        twice = [("step", 4, signal.SIGKILL), ("restoring", 1, signal.SIGKILL)]
        told["twice"] = pool.submit(tell, made(), twice)
        tests = ((signal.SIGKILL, KILLS, "test_a_kill_at_a_bad_instant"), (signal.SIGTERM, STOPS, "test_a_stop_in_any_phase"))
        for number, points, test in tests:
            for where, call in points:
                if any(one.startswith(test) and one.endswith(f"[{where}-{call}]") for one in chosen):
                    told[number, where, call] = pool.submit(tell, made(), [(where, call, number)])
        yield told
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(("where", "call"), instants(KILLS, SOAK_KILLS))
def test_a_kill_at_a_bad_instant_changes_no_bit(where: str, call: int, whole: SimpleNamespace, stories: Any) -> None:
    story = stories[signal.SIGKILL, where, call].result()
    assert story.code == -signal.SIGKILL
    assert story.checkpoints[-1] == KILLS[where, call]
    assert story.codes_after == [0], story.said_after
    assert_same(whole, story.recipe)


def test_a_kill_while_going_on_changes_no_bit(whole: SimpleNamespace, stories: Any) -> None:
    story = stories["twice"].result()
    assert [story.code, *story.codes_after] == [-signal.SIGKILL, -signal.SIGKILL, 0], story.said_after
    assert_same(whole, story.recipe)


@pytest.mark.parametrize(("where", "call"), instants(STOPS, SOAK_STOPS))
def test_a_stop_in_any_phase_leaves_a_checkpoint_within_one_step_and_goes_on(
    where: str, call: int, whole: SimpleNamespace, stories: Any
) -> None:
    story, step = stories[signal.SIGTERM, where, call].result(), STOPS[where, call]
    assert story.code == 0, story.said
    assert "Traceback" not in story.said
    assert story.checkpoints[-1] == story.logged == step
    assert story.phase == ("text_warmup" if step <= 2 else "main")
    stopped = (where, call) != ("evaluation", 3)
    assert story.state == ("stopped" if stopped else "finished")
    assert story.said.splitlines()[-1].startswith(f"{story.state} at step {step}")
    if stopped:
        assert story.codes_after == [0], story.said_after
        assert story.said_after.splitlines()[-1].startswith(f"finished at step {STEPS}")
    assert_same(whole, story.recipe)


def test_a_user_stops_a_run_and_it_goes_on(whole: SimpleNamespace, stories: Any) -> None:
    """Through the command line: exit code 0, one line that says where it stands, the same bits in the end."""
    story = stories["a user"].result()
    assert story.code == 0, story.said
    assert story.state == "stopped"
    assert 1 <= story.checkpoints[-1] < STEPS
    assert story.said.splitlines()[-1].startswith(f"stopped at step {story.checkpoints[-1]}")
    assert story.codes_after == [0], story.said_after
    assert_same(whole, story.recipe)


def test_evaluations_after_training_find_what_evaluations_in_between_find(whole: SimpleNamespace, made: Callable[..., Recipe]) -> None:
    """Also when the process is killed between two of them: the checkpoints that wait are still there."""
    recipe = made("evaluation.mode=after")
    assert trained(recipe, "evaluated", 2, signal.SIGKILL) == -signal.SIGKILL
    assert [one.step for one in RunFolder.open(folder_of(recipe)).checkpoints()] == [0, 3, STEPS]
    assert trained(recipe) == 0, log_of(recipe).read_text()
    # The best step is known only at the end, so no checkpoint's record has it; the run's last line does.
    expected = {f"checkpoint-{STEPS}/{name}" for name in ("trainer.json", "COMPLETE")} | {"recipe.yaml"}
    found = differences(whole.folder.path, folder_of(recipe))
    assert {line for line in found if not line.startswith("metrics.jsonl")} <= expected
    logs = [comparable(RunFolder.open(path).metrics.rows()) for path in (whole.folder.path, folder_of(recipe))]
    assert logs[0] == logs[1], "the same events, the evaluations' only later"
    assert log_of(recipe).read_text().splitlines()[-1].split(";")[1] == log_of(whole.recipe).read_text().splitlines()[-1].split(";")[1]


def test_the_comparison_sees_differences(whole: SimpleNamespace, made: Callable[..., Recipe]) -> None:
    """Guards all of the above: a run of another seed differs everywhere."""
    other = made("run.seed=1")
    assert trained(other) == 0
    found = differences(whole.folder.path, folder_of(other))
    assert {f"checkpoint-{STEPS}/{name}" for name in ("adapter_model.safetensors", "objective.safetensors", "trainer.safetensors")} <= {
        *found
    }
    assert any(line.startswith("metrics.jsonl") for line in found)
    assert f"eval_step{STEPS}.jsonl" in found

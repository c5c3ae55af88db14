"""Evaluation beside training on a real Ray: the figures of inline evaluation, training goes on meanwhile, a dead evaluator is replaced."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray
import torch
from ray_processes import titled
from safetensors.torch import load_file

from stairstep.cluster.beside import EvaluatorPool, RemoteEvaluator
from stairstep.cluster.train import train_on_ray
from stairstep.cluster.work import failure_of
from stairstep.records import MetricLog, RunFolder, read_json, read_json_lines
from stairstep.settings import InputError, TrainingError, UnreachableError, to_plain
from stairstep.tasks.beside import Beside
from stairstep.tasks.opening import Finished
from stairstep.tasks.run import train

pytestmark = pytest.mark.usefixtures("ray_here")
NAME = "stairstep-evaluator-0"
STEPS = (0, 4, 8)
TIMES = {"timings", "calls", "embeddings"}


def figures(folder: Path) -> list[Any]:
    """Everything that evaluations say, but for seconds and what was found instead of computed."""
    found: list[Any] = []
    for step in STEPS:
        found.append(read_json_lines(folder / f"eval_step{step}.jsonl"))
        found.append({key: value for key, value in read_json(folder / f"eval_step{step}.summary.json").items() if key not in TIMES})
    return found


def measured(folder: Path) -> dict[tuple[int, str], float]:
    """What the metric log says of evaluations, by step and name, wherever it stands."""
    rows = MetricLog(folder / "metrics.jsonl").rows()
    return {(row["step"], name): value for row in rows for name, value in row.items() if name.startswith("tinywiki/")}


def evaluators() -> list[psutil.Process]:
    """The living evaluators of the Ray that this process started."""
    return titled("ray::RemoteEvaluator")


def at_work(one: psutil.Process) -> bool:
    """Whether an evaluator is evaluating: Ray puts it into its title."""
    try:
        return one.cmdline()[:1] == ["ray::RemoteEvaluator.evaluate"]
    except psutil.Error:
        return False


@pytest.fixture(scope="module")
def inline(recipe: Callable[..., Any]) -> Finished:
    """In this process, evaluations while training waits."""
    before = torch.get_num_threads()
    try:
        return train(recipe("inline", "cluster.workers=0", "evaluation.mode=inline", "evaluation.cache=false"), console=False)
    finally:
        torch.set_num_threads(before)


def test_beside_finds_what_inline_finds_though_its_evaluator_was_killed(
    inline: Finished, recipe: Callable[..., Any], background: Callable[..., Future[Any]], tools: SimpleNamespace
) -> None:
    running = background(train_on_ray, recipe("beside", "cluster.workers=1", "evaluation.mode=beside", "evaluation.cache=false"))
    (victim,) = tools.wait(evaluators, "an evaluator")
    folder = inline.folder.parent / "beside"
    tools.wait(lambda: list((folder / "beside").glob("wanted-*")) or running.done(), "a wish")
    tools.kill(victim)
    finished = running.result(timeout=400)
    assert finished.outcome == inline.outcome
    assert finished.outcome.reason == "finished"
    assert evaluators()[0].pid != victim.pid
    assert figures(finished.folder) == figures(inline.folder)
    assert measured(finished.folder) == measured(inline.folder) != {}
    weights = [load_file(one.folder / "checkpoint-8" / "adapter_model.safetensors") for one in (inline, finished)]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    assert not list((finished.folder / "beside").glob("wanted-*"))
    assert read_json(finished.folder / "status.json")["state"] == "finished"


@pytest.mark.soak
def test_evaluators_that_die_too_often_end_the_run(
    recipe: Callable[..., Any], background: Callable[..., Future[Any]], tools: SimpleNamespace
) -> None:
    own = ("cluster.workers=1", "evaluation.mode=beside", "evaluation.cache=false", "cluster.max_failures=0", "optim.steps=2000")
    running = background(train_on_ray, recipe("deaths", *own))
    stop = Path(recipe("deaths", *own).run.root) / "deaths" / "stop"
    try:
        victim = tools.wait(lambda: next((one for one in evaluators() if at_work(one)), None) or running.done(), "an evaluation")
        tools.kill(victim)
        with pytest.raises(TrainingError, match=r"evaluators died 1 times, the last one at step \d+ \(cluster.max_failures: 0\)"):
            running.result(timeout=400)
    finally:
        if not running.done():
            stop.touch()


def test_an_evaluator_for_which_there_is_no_place_ends_the_run(recipe: Callable[..., Any]) -> None:
    with suppress(ValueError):  # one of the tests before may still be there
        ray.kill(ray.get_actor(NAME))
    own = ("evaluation.mode=beside", "cluster.workers=1", "cluster.evaluator_resources.nowhere=1", "cluster.start_timeout_s=3")
    made = recipe("nowhere", *own)
    folder = RunFolder.create(Path(made.run.root) / "nowhere")
    folder.checkpoint_path(4).mkdir()
    assert Beside(folder).want(4)
    pool = EvaluatorPool(made, folder)
    began = time.monotonic()
    try:
        with pytest.raises(
            UnreachableError, match=r"no evaluator was there for 3 s .* step 4 .*CPU 1, nowhere 1 each.* nowhere 0, of which 0 free"
        ):
            while time.monotonic() < began + 200:
                pool.look()
                time.sleep(0.1)
        assert time.monotonic() >= began + 3
        assert not pool.short
    finally:
        pool.close()
        ray.kill(ray.get_actor(NAME))
    assert Beside(folder).wanted() == []


def test_an_error_of_an_evaluation_keeps_its_kind_and_its_words_on_the_way(recipe: Callable[..., Any], tmp_path: Path) -> None:
    broken = replace(recipe("gone"), data=replace(recipe("gone").data, world=None, roots=(str(tmp_path),)))
    record = RemoteEvaluator().evaluate(to_plain(broken), 0)
    assert record is not None
    with pytest.raises(InputError, match=r"test/tinywiki\.json"):
        raise failure_of(json.loads(json.dumps(record)))

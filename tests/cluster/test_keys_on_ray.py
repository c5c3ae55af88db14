"""`jobs.train` under Ray, stopped by SIGTERM and gone on with; and the key that its node's environment holds, used and left nowhere.

One run for both, because a worker takes long to come; tests/end_to_end/test_train_job.py (make soak) has it in a process of its own.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))  # evaluation_server.py

if TYPE_CHECKING:
    from evaluation_server import Fault, Request

pytestmark = pytest.mark.timeout(1200)

STEPS = 60
LARGEST = 50_000_000  # bytes; Ray's object store is larger
NAMESPACES = (None, b"fun", b"job", b"session", b"cluster", b"dashboard", b"serve", b"healthcheck")


def tables() -> Iterator[bytes]:
    """What Ray's control store holds: jobs with their runtime environments, actors, workers, functions and everything else by key."""
    import ray
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_list

    store = ray._private.state.state._connect_and_get_accessor()
    yield from store.get_job_table()
    yield from store.get_actor_table(None, None)
    yield from store.get_worker_table()
    for space in NAMESPACES:
        for key in _internal_kv_list(b"", namespace=space):
            yield key
            yield _internal_kv_get(key, namespace=space) or b""


@pytest.fixture
def told(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Run `python -m jobs.train …` in this process: its exit code, and what came on standard output and standard error."""
    from jobs.train import main

    logger, threads = logging.getLogger("stairstep"), torch.get_num_threads()
    former = (logger.level, logger.propagate, logger.handlers[:])

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(one) for one in arguments])
        return code, *capfd.readouterr()

    yield run
    logger.setLevel(former[0])
    logger.propagate, logger.handlers = former[1], former[2]
    torch.set_num_threads(threads)


def trained(folder: Path) -> list[int]:
    from stairstep.records import MetricLog, series

    return [step for step, _ in series(MetricLog(folder / "metrics.jsonl").rows(), "train/loss")]


def stopped_and_gone_on_with(file: Path, folder: Path, told: Callable[..., Any], background: Callable[..., Any], tools: Any) -> str:
    """SIGTERM once the run trains: exit code 0, a checkpoint, one line; the rest in this process, by the same recipe. What was printed."""
    from stairstep.records import RunFolder

    ended = threading.Event()

    def strike() -> None:
        tools.wait(lambda: ended.is_set() or tools.last_step(folder) >= 3, "three steps")
        if not ended.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    striking = background(strike)
    try:
        code, out, err = told(file, "--no-preflight")
    finally:
        ended.set()
    striking.result()
    stopped = RunFolder.open(folder).checkpoints()[-1].step
    assert (code, out) == (0, f"stopped at step {stopped}; the same command goes on from there; {folder}\n"), err
    assert 3 <= stopped < STEPS
    assert trained(folder) == list(range(1, stopped + 1))
    status = RunFolder.open(folder).status
    assert status is not None and (status.state, status.step) == ("stopped", stopped)
    assert "starting 1 Ray Train workers with CPU 1 each" in err and f"training {stopped}/{STEPS} loss" in err
    for noise in ("Traceback", "(raylet", "(TrainController", "(RayTrainWorker", "ray.io", "Reporting training"):
        assert noise not in err, err
    assert not (folder / "stop").exists() and not (folder.parent / ".ray").exists()
    tools.wait(lambda: not tools.workers(), "the worker's end")

    # Where a run computes is no part of what it computes.
    code, out_after, err_after = told(file, "cluster.workers=0", "--no-preflight")
    assert code == 0, err_after
    assert f"going on from {folder / f'checkpoint-{stopped}'}" in err_after
    assert trained(folder) == list(range(1, STEPS + 1))
    assert RunFolder.open(folder).checkpoints()[-1].step == STEPS
    return out + err + out_after + err_after


def test_a_run_that_is_stopped_goes_on_and_a_key_of_the_node_is_used_and_left_nowhere(
    ray_here: None, node_key: str, recipe: Any, told: Any, background: Any, tools: Any, tmp_path: Path
) -> None:
    import ray
    from evaluation_server import EvaluationServer

    from stairstep.records import read_json_lines
    from stairstep.settings import to_yaml

    key = os.environ[node_key]

    def quoting(handler: Any) -> None:
        told = {"error": {"message": f"{handler.headers['Authorization']} was not understood"}}
        handler.send(500, json.dumps(told).encode(), {"X-Authorization": handler.headers["Authorization"]})

    def misbehave(request: Request) -> Fault | None:
        return quoting if request.body["model"] == "a-judge" else None

    with EvaluationServer() as server:
        at = f"base_url: '{server.url}', key_env: {node_key}, backoff_s: 0.01"
        server.next(quoting, quoting)
        server.chance = misbehave
        asking = recipe(
            "keys",
            "cluster.workers=1",
            f"optim.steps={STEPS}",
            f"evaluation.every={STEPS}",
            "evaluation.loss_every=0",
            f"checkpoints.every={STEPS}",
            f"evaluation.reader={{kind: endpoint, model: a-reader, {at}}}",
            f"evaluation.grader={{kind: openai, model: a-judge, {at}, attempts: 2}}",
            "trackers.tensorboard=true",
        )
        folder = Path(asking.run.root) / "keys"
        (tmp_path / "keys.yaml").write_text(to_yaml(asking))
        printed = stopped_and_gone_on_with(tmp_path / "keys.yaml", folder, told, background, tools)
    assert {one.body["model"] for one in server.received} == {"a-reader", "a-judge"}
    assert {one.headers["authorization"] for one in server.received} == {f"Bearer {key}"}, "the worker must have had the key"

    piece = key[:12].encode()
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    files = [path for place in (folder.parent, session) for path in place.rglob("*") if path.is_file()]
    read = [path for path in files if path.stat().st_size < LARGEST]
    assert sum(path.is_relative_to(session) for path in read) > 20
    assert {"recipe.yaml", "eval_step0.jsonl", f"eval_step{STEPS}.jsonl", "status.json"} <= {path.name for path in read}
    assert [str(path) for path in read if piece in path.read_bytes()] == []
    held = list(tables())
    assert any(b"RayTrainWorker" in one for one in held), "Ray's tables tell of the run"
    assert [one[:200] for one in held if piece in one] == []
    assert piece.decode() not in printed
    assert piece.decode() not in str(ray.get_runtime_context().runtime_env)
    for step in (0, STEPS):
        rows = read_json_lines(folder / f"eval_step{step}.jsonl")
        assert all(row["state"] == "ungraded" and "*** was not understood" in row["reason"] for row in rows), "there was a key to take out"

"""A key that a node's environment holds is used by a run under Ray, and stands in no file, no line and no table of Ray's."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))  # evaluation_server.py

if TYPE_CHECKING:
    from evaluation_server import Fault, Request

pytestmark = pytest.mark.timeout(1200)

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


def test_a_key_of_the_node_is_used_and_left_nowhere(
    ray_here: None, node_key: str, recipe: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    import ray
    from evaluation_server import EvaluationServer

    from stairstep.cluster.train import train_on_ray
    from stairstep.records import read_json_lines

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
            "optim.steps=1",
            "optim.schedule.warmup_steps=0",
            "phases.text_warmup_steps=0",
            f"evaluation.reader={{kind: endpoint, model: a-reader, {at}}}",
            f"evaluation.grader={{kind: openai, model: a-judge, {at}, attempts: 2}}",
            "trackers.tensorboard=true",
        )
        finished = train_on_ray(asking)
    assert finished.outcome.reason == "finished"
    assert {one.body["model"] for one in server.received} == {"a-reader", "a-judge"}
    assert {one.headers["authorization"] for one in server.received} == {f"Bearer {key}"}, "the worker must have had the key"

    piece = key[:12].encode()
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    files = [path for place in (finished.folder.parent, session) for path in place.rglob("*") if path.is_file()]
    read = [path for path in files if path.stat().st_size < LARGEST]
    assert sum(path.is_relative_to(session) for path in read) > 20
    assert {"recipe.yaml", "eval_step1.jsonl", "status.json"} <= {path.name for path in read}
    assert [str(path) for path in read if piece in path.read_bytes()] == []
    held = list(tables())
    assert any(b"RayTrainWorker" in one for one in held), "Ray's tables tell of the run"
    assert [one[:200] for one in held if piece in one] == []
    assert piece.decode() not in "".join(capfd.readouterr())
    assert piece.decode() not in str(ray.get_runtime_context().runtime_env)
    rows = read_json_lines(finished.folder / "eval_step1.jsonl")
    assert all(row["state"] == "ungraded" and "*** was not understood" in row["reason"] for row in rows), "there was a key to take out"

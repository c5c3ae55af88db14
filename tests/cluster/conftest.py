"""One Ray for all tests of this folder, and small runs under it."""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / "tasks"), str(Path(__file__).parent)]  # tasks_world.py, own_ray.py, ray_processes.py

NODE_KEY = "NODE_TEST_KEY"
STORE_KEYS = {"AWS_ACCESS_KEY_ID": "test-key-id", "AWS_SECRET_ACCESS_KEY": "test-secret", "AWS_EC2_METADATA_DISABLED": "true"}
"""What tests/conftest.py gives a test that uses its store."""
PATIENCE_S = 400.0  # for a machine that has other work


@pytest.fixture(scope="session")
def ray_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A private Ray with four CPUs to give away, under a token of its own that is written nowhere."""
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_AUTH_MODE", "")  # Ray sets it, and only where it is not set; what it was is put back in the end
        patch.delenv("RAY_AUTH_MODE")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv(NODE_KEY, secrets.token_hex(32))  # as on a node whose environment holds a key: Ray's processes inherit it
        for name, value in STORE_KEYS.items():
            patch.setenv(name, value)
        patch.setenv("STAIRSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        for left in (2, 1, 0):
            try:
                ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
                break
            except Exception as error:
                if not left or "timed out during startup" not in str(error):
                    raise
                ray.shutdown()  # where the machine has much other work, Ray gives itself up after 30 s
        yield
        ray.shutdown()
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="session")
def node_key() -> str:
    """The name of a variable that holds a key in every process of the Ray of these tests."""
    return NODE_KEY


@pytest.fixture(scope="session")
def micro(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny world and a micro encoder."""
    from tasks_world import write_base, write_world

    folder = tmp_path_factory.mktemp("micro")
    return SimpleNamespace(world=write_world(folder), base=write_base(folder / "base"), runs=folder / "runs")


@pytest.fixture(scope="session")
def recipe(micro: SimpleNamespace) -> Callable[..., Any]:
    """The resolved recipe with `key.path=value` overrides: eight steps by two workers, several chunks a step, dropout on."""
    from tasks_world import make_recipe, recipe_tree

    tree = recipe_tree(micro.runs, micro.world, micro.base)
    tree["optim"] |= {"steps": 8}
    tree["evaluation"] |= {"every": 4, "loss_every": 4}
    tree["checkpoints"] = {"every": 3, "keep": 9}
    tree["objective"] = {"gradcache": {"chunk_items": 3, "chunk_tokens": None}}
    tree["cluster"] = {"workers": 2, "device": "cpu"}
    return lambda name, *overrides: make_recipe(tree, f"run.name={name}", *overrides)


@pytest.fixture
def background() -> Iterator[Callable[..., Future[Any]]]:
    """Call something in another thread; the test may disturb it. It ends before another test begins, unless time runs out for it."""
    with ThreadPoolExecutor(4) as pool:
        yield pool.submit


def train_workers(starter: int | None = None) -> list[psutil.Process]:
    """The living Ray Train workers of the Ray that a process started; by default of this one's."""
    from ray_processes import titled

    return titled("ray::RayTrainWorker", starter)


def last_step(folder: Path) -> int:
    """The last trained step in a run's metric log, a torn line left out; −1 where there is none."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return -1
    steps = [-1]
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if "train/loss" in row:
            steps.append(row["step"])
    return steps[-1]


def wait_until(condition: Callable[[], Any], what: str, patience_s: float = PATIENCE_S, every_s: float = 0.005) -> Any:
    """Look every few milliseconds until something is true."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(every_s)
    raise AssertionError(f"{what}: not within {patience_s:.0f} s")


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    """The functions of this file, for tests that may not import it."""
    return SimpleNamespace(workers=train_workers, last_step=last_step, wait=wait_until, kill=lambda one: os.kill(one.pid, signal.SIGKILL))

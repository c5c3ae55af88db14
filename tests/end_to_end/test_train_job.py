"""`python -m jobs.train … cluster.workers=2` as a person runs it: stopped by SIGTERM, by Ctrl-C, by SIGKILL, and gone on with.

Each command starts a private Ray of its own, under a token that is written nowhere: minutes on two cores. `make test` has the same stop by
SIGTERM in tests/cluster/test_keys_on_ray.py, a killed worker in test_elastic.py, bad input in test_bad_input.py, kills and stops without
Ray in tests/tasks/test_resume.py.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from stairstep.records import MetricLog, RunFolder, comparable, series

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 400.0
STEPS = 90

pytestmark = pytest.mark.timeout(1500)


class Job:
    """A started command in a process group of its own, as a shell starts it."""

    def __init__(self, recipe: Path, *overrides: str) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"RAY_AUTH_TOKEN": secrets.token_hex(32), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jobs.train", str(recipe), *overrides],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.seen: dict[int, psutil.Process] = {}

    def look(self) -> None:
        """Remember the processes that belong to the command."""
        try:
            for one in psutil.Process(self.process.pid).children(recursive=True):
                self.seen.setdefault(one.pid, one)
        except psutil.Error:
            return

    def until(self, condition: Callable[[], Any], what: str) -> None:
        """Wait while the command runs."""
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None, "".join(self.process.communicate())
            assert time.monotonic() < end, what
            time.sleep(0.01)
        self.look()

    def end(self) -> tuple[int, str, str]:
        """Exit code, standard output and standard error."""
        out, err = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, out, err

    def left(self, patience_s: float = 60.0) -> list[str]:
        """Commands of its processes that outlive it."""
        end = time.monotonic() + patience_s
        while time.monotonic() < end and any(map(alive, self.seen.values())):
            time.sleep(0.1)
        return [" ".join(one.cmdline()) for one in self.seen.values() if alive(one)]

    def kill(self) -> None:
        """End the command and everything that belongs to it."""
        self.look()
        self.process.kill()
        self.process.wait()
        for one in self.seen.values():
            if alive(one):
                one.kill()


def alive(one: psutil.Process) -> bool:
    try:
        return one.is_running() and one.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def start() -> Iterator[Callable[..., Job]]:
    """Start jobs that are ended with the test."""
    started: list[Job] = []

    def job(*arguments: Any) -> Job:
        started.append(Job(*arguments))
        return started[-1]

    yield job
    for one in started:
        one.kill()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro encoder of the tests of tasks."""
    sys.path.insert(0, str(ROOT / "tests" / "tasks"))
    from tasks_world import write_base

    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def recipe(base: Path, small_world: Path, tmp_path: Path) -> Path:
    """Many short steps by two workers; `train` is called by its name."""
    from tasks_world import recipe_tree

    tree = recipe_tree(tmp_path / "runs", small_world, base)
    tree["run"]["name"] = "train"
    tree["optim"] |= {"batch": 2, "steps": STEPS}
    tree["evaluation"] |= {"every": STEPS, "loss_every": 0}
    tree["checkpoints"] = {"every": STEPS, "keep": 3}
    tree["cluster"]["workers"] = 2
    path = tmp_path / "train.yaml"
    path.write_text(json.dumps(tree))
    return path


def trained(folder: Path) -> list[int]:
    path = folder / "metrics.jsonl"
    return [step for step, _ in series(MetricLog(path).rows(), "train/loss")] if path.exists() else []


def checkpoints(folder: Path) -> list[int]:
    return [one.step for one in RunFolder.open(folder).checkpoints()]


def tidy(err: str) -> None:
    """Our lines alone, each once."""
    for noise in ("Traceback", "(raylet", "(TrainController", "(RayTrainWorker", "Token authentication", "ray.io", "Reporting training"):
        assert noise not in err, err
    assert err.count("Loaded test") == 1, err


@pytest.mark.soak
def test_sigterm_leaves_a_checkpoint_and_the_same_command_goes_on(
    start: Callable[..., Job], job: Callable[..., Any], recipe: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "runs" / "train"
    first = start(recipe)
    first.until(lambda: len(trained(folder)) >= 3, "three steps")
    assert any("ray::RayTrainWorker" in " ".join(one.cmdline()) for one in first.seen.values() if alive(one))
    at = trained(folder)[-1]
    first.process.send_signal(signal.SIGTERM)
    code, out, err = first.end()
    assert code == 0, err
    stopped = checkpoints(folder)[-1]
    assert out == f"stopped at step {stopped}; the same command goes on from there; {folder}\n"
    assert at <= stopped < STEPS  # the driver looks five times a second
    assert trained(folder) == list(range(1, stopped + 1))
    status = RunFolder.open(folder).status
    assert status is not None
    assert (status.state, status.step) == ("stopped", stopped)
    tidy(err)
    assert re.search(r"starting 2 Ray Train workers with CPU 1 each", err)
    assert f"training {stopped}/{STEPS} loss" in err
    assert not (folder / "stop").exists()
    assert not (tmp_path / "runs" / ".ray").exists()
    assert first.left() == []

    # Where a run computes is no part of what it computes: the rest is done in this process.
    told = job("train", recipe, "cluster.workers=0")
    assert told.code == 0, told.err
    assert f"going on from {folder / f'checkpoint-{stopped}'}" in told.err
    assert trained(folder) == list(range(1, STEPS + 1))
    assert checkpoints(folder)[-1] == STEPS


@pytest.mark.soak
def test_ctrl_c_reaches_every_process_of_the_terminal(start: Callable[..., Job], recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "train"
    job = start(recipe)
    job.until(lambda: len(trained(folder)) >= 3, "three steps")
    os.killpg(job.process.pid, signal.SIGINT)
    code, out, err = job.end()
    assert code == 0, err
    stopped = checkpoints(folder)[-1]
    assert out == f"stopped at step {stopped}; the same command goes on from there; {folder}\n"
    assert "Stopping at the end of this step, with a checkpoint; Ctrl-C once more stops at once." in err
    tidy(err)
    assert job.left() == []


@pytest.mark.soak
def test_a_second_ctrl_c_stops_at_once(start: Callable[..., Job], recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "train"
    job = start(recipe, "evaluation.every=1")
    job.until(lambda: len(trained(folder)) >= 2, "two steps")
    os.killpg(job.process.pid, signal.SIGINT)
    time.sleep(0.05)
    os.killpg(job.process.pid, signal.SIGINT)
    code, _, err = job.end()
    assert code in (130, 0), err  # 0: it had stopped already
    assert "Traceback" not in err
    assert job.left() == []


@pytest.mark.soak
def test_sigterm_before_any_worker_has_come(start: Callable[..., Job], recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "train"
    job = start(recipe)
    job.until(lambda: (folder / "status.json").exists(), "the run folder")
    job.until(lambda: any("ray::TrainController" in " ".join(one.cmdline()) for one in children(job)), "the controller")
    started = time.monotonic()
    job.process.send_signal(signal.SIGTERM)
    code, out, err = job.end()
    assert code == 0, err
    assert time.monotonic() - started < 60
    assert (
        out == f"stopped at step {checkpoints(folder)[-1] if checkpoints(folder) else 0}; the same command goes on from there; {folder}\n"
    )
    assert "Traceback" not in err
    assert job.left() == []


def children(job: Job) -> list[psutil.Process]:
    job.look()
    return [one for one in job.seen.values() if alive(one)]


@pytest.mark.soak
def test_a_killed_driver_takes_its_workers_along_and_changes_no_bit(start: Callable[..., Job], recipe: Path, tmp_path: Path) -> None:
    shorter = ("optim.steps=60", "checkpoints.every=15", "evaluation.every=60")
    whole = start(recipe, *shorter, "run.name=whole")
    code, out, err = whole.end()
    assert code == 0, err
    folder = tmp_path / "runs" / "train"
    for at in (5, 22):
        job = start(recipe, *shorter)
        job.until(lambda at=at: len(trained(folder)) >= at, f"step {at}")
        assert trained(folder)[-1] < 60
        job.process.kill()
        job.process.wait()
    last = start(recipe, *shorter)  # at once, while workers of the last one may still live
    code, out, err = last.end()
    assert code == 0, err
    assert job.left() == []
    assert "finished at step 60" in out
    assert not (tmp_path / "runs" / ".ray").exists()
    other = tmp_path / "runs" / "whole"
    for name in ("adapter_model.safetensors", "trainer.safetensors", "trainer.json", "objective.safetensors"):
        assert (folder / "checkpoint-60" / name).read_bytes() == (other / "checkpoint-60" / name).read_bytes(), name
    assert comparable(MetricLog(folder / "metrics.jsonl").rows()) == comparable(MetricLog(other / "metrics.jsonl").rows())


@pytest.mark.soak
def test_bad_input_under_ray_is_one_message(start: Callable[..., Job], recipe: Path, tmp_path: Path) -> None:
    job = start(recipe, "data.train=[{path: nowhere.jsonl}]", "--no-preflight")
    code, out, err = job.end()
    assert (code, out) == (2, ""), err
    assert err.count("error: ") == 1
    assert "nowhere.jsonl: there is no such data file" in err
    assert "Traceback" not in err
    assert err.count("starting 2 Ray Train workers") == 1

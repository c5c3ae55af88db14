"""Runs of two workers and an evaluator whose folder lies in an object store: they end as the same run in one folder does.

In `make soak` as a person starts it, each command with a Ray of its own: a worker is killed, then the whole job, which goes on with an
empty cache, as on another machine.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from curves import alone, same_curve
from lone_worker import waiting_alone
from safetensors.torch import load_file

from stairstep.cluster import elastic
from stairstep.cluster.elastic import Room
from stairstep.cluster.train import train_on_ray
from stairstep.records import RunFolder, followed, read_json_lines
from stairstep.records.copies import copy_to_read
from stairstep.records.followed import checkpoint_steps
from stairstep.records.places import ObjectFolder, place
from stairstep.settings import InputError, to_yaml
from stairstep.tasks.placing import checkpoint_here

pytestmark = pytest.mark.timeout(1500)
ROOT = Path(__file__).resolve().parents[2]
STEPS = 14
OVERRIDES = (f"optim.steps={STEPS}", "checkpoints.every=2", "evaluation.every=7", "cluster.cpus_per_worker=0.5")
Start = Callable[[Path, Path], subprocess.Popen[bytes]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start `jobs.train` on a recipe with a cache of its own; all its processes are ended with the test."""
    started: list[tuple[subprocess.Popen[bytes], Path]] = []

    def job(recipe: Path, cache: Path) -> subprocess.Popen[bytes]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"RAY_AUTH_TOKEN": secrets.token_hex(32), "OMP_NUM_THREADS": "1", "STAIRSTEP_CACHE": str(cache)}
        environment["PYTHONPATH"] = str(ROOT / "platform")
        with cache.with_suffix(".txt").open("wb") as said:
            command = [sys.executable, "-m", "jobs.train", str(recipe)]
            made = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT)
        started.append((made, cache))
        return made

    yield job
    for made, _ in started:
        kill_all(made)


def kill_all(job: subprocess.Popen[bytes]) -> None:
    """As if the machine went."""
    if job.poll() is None:
        for one in [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]:
            try:
                one.kill()
            except psutil.NoSuchProcess:
                continue
        job.wait()


def last_checkpoint(run: ObjectFolder) -> int:
    return max(checkpoint_steps(run.files()), default=0)


def of_one_folder(run: ObjectFolder, whole: Path, steps: int, evaluated: tuple[int, ...], beside: tuple[int, ...] | None = None) -> None:
    """What the store has of a run that has ended is what the same run has in one folder; all was evaluated beside, where not told."""
    copy = RunFolder.open(copy_to_read(run))
    status = copy.status
    assert status is not None
    assert (status.state, status.step) == ("finished", steps)
    names = list(run.files())
    assert not [name for name in names if name.startswith("beside/wanted-") or name in ("stop", ".lock")]
    assert sorted(name for name in names if name.startswith("beside/")) == sorted(
        f"beside/found-{step}.json" for step in (evaluated if beside is None else beside)
    )
    same_curve(copy.path, whole, steps=steps)
    for step in evaluated:
        rows = [read_json_lines(folder / f"eval_step{step}.jsonl") for folder in (copy.path, whole)]
        assert [row["id"] for row in rows[0]] == [row["id"] for row in rows[1]] != []
        assert [row["retrieved"][0]["tile"] for row in rows[0]] == [row["retrieved"][0]["tile"] for row in rows[1]]
    checkpoint = checkpoint_here(str(run / f"checkpoint-{steps}"))
    found, expected = (load_file(one / "adapter_model.safetensors") for one in (checkpoint, whole / f"checkpoint-{steps}"))
    assert found.keys() == expected.keys()
    assert all((found[name] - expected[name]).norm() <= 1e-3 * expected[name].norm() for name in expected)


def test_two_workers_and_an_evaluator_in_an_object_store(
    ray_here: None, recipe: Callable[..., Any], object_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(followed, "REFRESH_S", 0.5)
    short = ("optim.steps=3", "evaluation.every=3", "evaluation.loss_every=3")
    made = recipe("stored", *short, f"run.root={object_root}", "evaluation.mode=beside", "evaluation.cache=false")
    run = place(object_root)
    assert isinstance(run, ObjectFolder)
    run = run / "stored"
    finished = train_on_ray(made, view=tmp_path / "view")
    assert (finished.outcome.reason, finished.outcome.step) == ("finished", 3)
    assert (finished.place, finished.folder) == (run, tmp_path / "view")
    assert (tmp_path / "view" / "eval_step3.jsonl").read_bytes() == run.get("eval_step3.jsonl")
    assert not list((tmp_path / "view").glob("checkpoint-*")), "what is read needs no weights"
    of_one_folder(run, alone(recipe("stored-alone", *short, "cluster.workers=0")).folder, 3, (0, 3))
    with pytest.raises(InputError, match=r"^s3://stairs/base/stored\?.*this run is finished"):
        train_on_ray(made)


@pytest.mark.soak
def test_a_run_in_an_object_store_is_stopped_by_its_driver_and_gone_on_with(
    ray_here: None, recipe: Callable[..., Any], object_root: str, tmp_path: Path
) -> None:
    """As a sweep or a signal stops it."""
    made = recipe("halted", f"run.root={object_root}", "evaluation.mode=beside", "evaluation.cache=false")
    run = place(object_root)
    assert isinstance(run, ObjectFolder)
    run = run / "halted"
    halted = train_on_ray(made, lambda: "enough" if 3 in checkpoint_steps(run.files()) else "", view=tmp_path / "view")
    assert halted.outcome.reason == "stopped"
    assert 3 <= halted.outcome.step < 8
    assert halted.outcome.step in checkpoint_steps(run.files())
    status = RunFolder(copy_to_read(run)).status
    assert status is not None
    assert (status.state, status.step) == ("stopped", halted.outcome.step)
    finished = train_on_ray(made, view=tmp_path / "view")
    assert (finished.outcome.reason, finished.outcome.step) == ("finished", 8)
    of_one_folder(run, alone(recipe("halted-alone", "cluster.workers=0")).folder, 8, (0, 4, 8))


@pytest.mark.soak
def test_an_elastic_run_in_an_object_store_grows_and_evaluates_in_the_end(
    ray_here: None,
    recipe: Callable[..., Any],
    object_root: str,
    background: Callable[..., Any],
    tools: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The two workers of the second group go on from what the one of the first has put; both look back at all its checkpoints."""
    monkeypatch.setattr(elastic, "SETTLE_S", 1.0)
    monkeypatch.setattr("stairstep.cluster.train.work", waiting_alone(4))
    caplog.set_level(logging.INFO, "stairstep")
    after = ("evaluation.mode=after", "evaluation.cache=false")
    made = recipe("grown-stored", *after, "cluster.min_workers=1", "cluster.grow_after_s=0", f"run.root={object_root}")
    root = place(object_root)
    assert isinstance(root, ObjectFolder)
    run = root / "grown-stored"
    taken = Room({"CPU": 1.0})
    taken.ask(3)
    try:
        tools.wait(lambda: taken.there() == 3, "three of four CPUs")
        running = background(train_on_ray, made, view=tmp_path / "view")
        tools.wait(lambda: running.done() or 3 in checkpoint_steps(run.files()), "a checkpoint of the first worker", every_s=0.2)
    finally:
        taken.close()
    finished = running.result(timeout=600)
    assert (finished.outcome.reason, finished.outcome.step) == ("finished", 8)
    started = [text.split(" with ")[0] for text in caplog.messages if "Ray Train workers" in text]
    assert started == ["starting 1 of 2 Ray Train workers", "starting 2 Ray Train workers"]
    of_one_folder(run, alone(recipe("grown-alone", *after, "cluster.workers=0")).folder, 8, (0, 4, 8), beside=())


@pytest.mark.soak
def test_a_killed_worker_and_a_killed_job_change_no_run_in_an_object_store(
    recipe: Callable[..., Any], object_root: str, start: Start, tools: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe("kept", *OVERRIDES, f"run.root={object_root}", "evaluation.mode=beside", "evaluation.cache=false")
    (tmp_path / "kept.yaml").write_text(to_yaml(made))
    root = place(object_root)
    assert isinstance(root, ObjectFolder)
    run = root / "kept"

    one = start(tmp_path / "kept.yaml", tmp_path / "one")
    said = (tmp_path / "one.txt").read_text
    tools.wait(lambda: one.poll() is not None or last_checkpoint(run) >= 4, "a checkpoint in the store", every_s=0.2)
    assert one.poll() is None, said()
    first, _ = tools.workers(one.pid)
    tools.kill(first)
    tools.wait(lambda: one.poll() is not None or "restarts)" in said(), "the loss", every_s=0.2)
    tools.wait(lambda: one.poll() is not None or last_checkpoint(run) >= 8, "a checkpoint of the next group", every_s=0.2)
    assert one.poll() is None, said()
    assert last_checkpoint(run) < STEPS
    kill_all(one)

    other = start(tmp_path / "kept.yaml", tmp_path / "two")
    assert other.wait(timeout=600) == 0, (tmp_path / "two.txt").read_text()
    lines = (tmp_path / "two.txt").read_text()
    assert re.search(r"going on from .*checkpoint-(8|10|12)", lines), lines
    assert lines.rstrip().splitlines()[-1].endswith(str(run)), lines
    monkeypatch.setenv("STAIRSTEP_CACHE", str(tmp_path / "three"))
    of_one_folder(run, alone(recipe("kept-alone", "cluster.workers=0", *OVERRIDES)).folder, STEPS, (0, 7, STEPS))

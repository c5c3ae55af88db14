"""Elastic runs on a real Ray: the same curve as by itself, whatever nodes come and go.

One run, which grows and loses a worker, is in `make test`; a node that is killed, one that returns and one that is taken back with notice
are in `make soak`, on a Ray of several nodes that are processes here. The rules by which groups are sized are in test_elastic_rules.py.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from curves import alone, same_curve
from lone_worker import waiting_alone
from own_ray import BIN, end, free_ports, own_environment, started
from safetensors.torch import load_file

from stairstep.cluster import elastic
from stairstep.cluster.elastic import Room
from stairstep.cluster.train import train_on_ray
from stairstep.records import RunFolder, read_json
from stairstep.settings import TrainingError, to_plain
from stairstep.tasks.opening import Finished

pytestmark = pytest.mark.timeout(1200)

ROOT = Path(__file__).resolve().parents[2]
MakeRecipe = Callable[..., Any]
Background = Callable[..., Future[Finished]]


def test_room_is_what_is_free_and_stays_ours(ray_here: None, tools: SimpleNamespace) -> None:
    """Four CPUs, of which another holds two: totals would say four."""
    taken, room, rival = Room({"CPU": 1.0}), Room({"CPU": 1.0}), Room({"CPU": 1.0})
    try:
        taken.ask(2)
        tools.wait(lambda: taken.there() == 2, "two places")
        room.ask(4)
        tools.wait(lambda: room.there() == 2, "what is free")
        time.sleep(1)
        assert room.there() == 2
        taken.close()
        tools.wait(lambda: room.there() == 4, "what has become free")
        rival.ask(1)
        time.sleep(1)
        assert rival.there() == 0
        room.ask(3)  # one place back
        tools.wait(lambda: rival.there() == 1, "the place that was given back")
        assert room.there() == 3
    finally:
        for one in (taken, room, rival):
            one.close()


ELASTIC = ("cluster.min_workers=1", "cluster.grow_after_s=0", "evaluation.mode=inline")


def same_weights(one: Path, other: Path) -> None:
    """The same to rounding in the last checkpoint, all tensors taken together; all were trained."""
    found, expected = (load_file(folder / "checkpoint-8" / "adapter_model.safetensors") for folder in (one, other))
    assert found.keys() == expected.keys()
    assert all(value.abs().max() > 0 for value in found.values()), "also the LoRA B, which begins at zero"
    vectors = [torch.cat([values[name].double().flatten() for name in sorted(values)]) for values in (found, expected)]
    assert (vectors[0] - vectors[1]).norm() < 1e-3 * vectors[1].norm()


def test_a_run_begins_with_what_is_free_grows_and_loses_a_worker(
    ray_here: None,
    recipe: MakeRecipe,
    background: Background,
    tools: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One CPU of four is free, until the run has taken three steps with one worker; of the two that go on one is killed."""
    monkeypatch.setattr(elastic, "SETTLE_S", 1.0)
    monkeypatch.setattr(elastic, "_LOOK_S", 0.2)
    monkeypatch.setattr("stairstep.cluster.train.work", waiting_alone(4))
    caplog.set_level(logging.INFO, "stairstep")
    other = recipe("grown", "cluster.max_failures=1", *ELASTIC)
    folder = Path(other.run.root) / "grown"
    taken = Room({"CPU": 1.0})
    taken.ask(3)
    try:
        tools.wait(lambda: taken.there() == 3, "three of four CPUs")
        running = background(train_on_ray, other)
        tools.wait(lambda: running.done() or tools.last_step(folder) >= 3, "three steps")
        (first,) = tools.workers()
    finally:
        taken.close()

    def grown() -> list[psutil.Process] | None:
        found = [one for one in tools.workers() if one.pid != first.pid]
        return found if len(found) == 2 else None

    pair = tools.wait(lambda: running.done() or grown(), "two workers", every_s=0.2)
    tools.wait(lambda: running.done() or tools.last_step(folder) >= 5, "a step of two workers")
    assert not running.done(), running
    tools.kill(pair[-1])
    assert 5 <= tools.last_step(folder) < 8
    finished = running.result(timeout=600)
    assert (finished.outcome.reason, finished.outcome.step) == ("finished", 8)
    said = [text for text in caplog.messages if "Ray Train workers" in text or "missing workers" in text]
    assert [text.split(" with ")[0] for text in said[:3]] == [
        "starting 1 of 2 Ray Train workers",
        "there is room for 1 more of 1 missing workers; the workers stop at a checkpoint, and others go on from it",
        "starting 2 Ray Train workers",
    ]
    (lost,) = [text for text in caplog.messages if "restarts)" in text]
    assert re.match(r"worker [01] was lost .*; going on from step [4-7] \(1 of at most 1 restarts\)", lost)
    assert said[3].startswith("starting ")
    assert (folder / "checkpoint-4").is_dir()  # where the first group stopped
    by_itself = alone(recipe("grown-alone", "cluster.workers=0", "evaluation.mode=inline"))
    same_curve(folder, by_itself.folder, by_itself.outcome.step)
    same_weights(folder, by_itself.folder)
    leaves_nothing_but_its_folder(folder, by_itself.folder)


def leaves_nothing_but_its_folder(folder: Path, by_itself: Path) -> None:
    """The files that a run in one process leaves too, and nothing beside them or in the environment."""
    assert {one.name for one in folder.iterdir()} == {one.name for one in by_itself.iterdir()}
    assert not pause_left(folder)
    assert read_json(folder / "environment.json")["torch"]["threads"] == 1  # run.threads, in the worker that wrote it
    status = RunFolder.open(folder).status
    assert status is not None
    assert (status.state, status.step) == ("finished", 8) and status.pid != os.getpid()
    assert [name for name in os.environ if name.startswith("RAY_TRAIN") and name != "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == []


def pause_left(folder: Path) -> bool:
    return (folder.parent / ".ray" / folder.name).exists()


@pytest.mark.soak
def test_an_elastic_run_is_not_replaced_for_ever(
    ray_here: None, recipe: MakeRecipe, background: Background, tools: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elastic, "SETTLE_S", 1.0)
    running = background(train_on_ray, recipe("hopeless-elastic", "cluster.max_failures=1", *ELASTIC))
    seen: set[int] = set()
    for _ in range(2):
        known = frozenset(seen)
        found = tools.wait(lambda known=known: running.done() or {one.pid for one in tools.workers()} - known, "a new worker")
        assert found is not True, running
        seen |= found
        tools.kill(next(one for one in tools.workers() if one.pid in found))
    with pytest.raises(TrainingError, match=r"lost .*no restart is left"):
        running.result(timeout=900)


# --- with nodes that come and go

DRIVER = """
import json, sys, time
from pathlib import Path

from stairstep.cluster import elastic, train
from stairstep.cluster.words import Words
from stairstep.cluster.work import work as real
from stairstep.records import logging_setup
from stairstep.settings import build, from_plain
from stairstep.tasks import Recipe

GATES = Path(sys.argv[2])

def work(config):
    from stairstep.training import Trainer
    update, words = Trainer._update, Words(config["group"])
    tell = Words.tell_node

    def told(self, node):
        (GATES / f"{self.group}.on").mkdir(exist_ok=True)
        (GATES / f"{self.group}.on" / node).touch()
        tell(self, node)

    Words.tell_node = told

    def patient(self, at):
        limit = time.monotonic() + 300
        while (GATES / str(at)).exists() and not words.asked_to_stop():
            if time.monotonic() > limit:
                raise RuntimeError(f"the gate before step {at} was not opened")
            time.sleep(0.02)
        update(self, at)

    Trainer._update = patient
    return real(config)

train.work = work
elastic.SETTLE_S = 3.0
logging_setup()
recipe = build(Recipe, from_plain(json.loads(Path(sys.argv[1]).read_text()), "test"))
print(train.train_on_ray(recipe).outcome.reason)
"""


class Nodes:
    """A Ray whose head gives nothing away, and nodes of one CPU each."""

    def __init__(self, address: str, environment: dict[str, str], folder: Path) -> None:
        self.address, self.environment, self.folder = address, environment, folder
        self.running: list[subprocess.Popen[bytes]] = []

    def add(self) -> subprocess.Popen[bytes]:
        """Start one more node."""
        command = [
            BIN / "ray", "start", "--block", f"--address={self.address}", "--num-cpus=1", "--disable-usage-stats",
            f"--dashboard-agent-listen-port={free_ports(1)[0]}",
        ]  # fmt: skip
        place = self.folder / f"node-{len(self.running)}"
        for _ in range(3):  # where the machine has much other work, Ray gives itself up after 30 s
            with place.open("wb") as said:
                node = subprocess.Popen(list(map(str, command)), env=self.environment, stdout=said, stderr=subprocess.STDOUT)
            self.running.append(node)
            while node.poll() is None and "Ray runtime started" not in place.read_text():
                time.sleep(0.1)
            if node.poll() is None:
                return node
        raise AssertionError(place.read_text())

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """As if the power went."""
        for one in [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]:
            one.kill()
        node.wait()

    def drain(self, node: str) -> None:
        """As a cloud does before it takes a machine back."""
        command = [
            BIN / "ray", "drain-node", f"--address={self.address}", f"--node-id={node}", "--reason=DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message=taken back", "--deadline-remaining-seconds=600",
        ]  # fmt: skip
        subprocess.run(list(map(str, command)), env=self.environment, check=True, timeout=120, capture_output=True)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    """A Ray of its own with two nodes."""
    from ray.util import get_node_ip_address

    port, dashboard, agent, client = free_ports(4)
    address = f"{get_node_ip_address()}:{port}"
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as name:  # sockets have short names
        folder = Path(name)
        environment = own_environment(folder) | {"PYTHONPATH": str(ROOT / "platform"), "PYTHONUNBUFFERED": "1"}
        command = [
            BIN / "ray", "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
            f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}", "--num-cpus=0", "--disable-usage-stats",
        ]  # fmt: skip
        with started(command, environment, folder):
            made = Nodes(address, environment, folder)
            try:
                made.add()
                made.add()
                yield made
            finally:
                for one in made.running:
                    if one.poll() is None:
                        end(one)


@pytest.mark.soak
def test_nodes_that_are_lost_return_and_are_taken_back_change_no_curve(
    nodes: Nodes, recipe: MakeRecipe, tools: SimpleNamespace, tmp_path: Path
) -> None:
    """Two workers; a node is killed: one; a node comes: two; a node is to be taken back: one. One loss is allowed, and one happens."""
    long = ("optim.steps=14", "checkpoints.every=2", "checkpoints.keep=20", "evaluation.every=7", "evaluation.mode=inline")
    other = recipe("nodes", *long, "cluster.max_failures=1", *ELASTIC, f"cluster.address={nodes.address}")
    folder, gates = Path(other.run.root) / "nodes", tmp_path / "gates"
    gates.mkdir()
    for step in (6, 9, 12):
        (gates / str(step)).touch()
    (tmp_path / "recipe.json").write_text(json.dumps(to_plain(other)))
    (tmp_path / "driver.py").write_text(DRIVER)
    with (tmp_path / "said").open("wb") as said:
        command = [sys.executable, tmp_path / "driver.py", tmp_path / "recipe.json", gates]
        driver = subprocess.Popen(list(map(str, command)), env=nodes.environment, cwd=tmp_path, stdout=said, stderr=subprocess.STDOUT)
    text = (tmp_path / "said").read_text
    try:

        def arrives(step: int) -> None:
            tools.wait(lambda: driver.poll() is not None or tools.last_step(folder) >= step, f"step {step}")
            assert driver.poll() is None, text()

        arrives(5)
        nodes.kill(nodes.running[-1])
        (gates / "6").unlink()
        arrives(8)  # with one worker, which now waits before step 9
        nodes.add()
        arrives(11)  # it was asked to stop, for two to go on
        place = max(gates.glob("*.on"), key=lambda one: one.stat().st_mtime)
        on = {one.name for one in place.iterdir()}
        assert len(on) == 2
        nodes.drain(min(on))
        assert driver.wait(timeout=600) == 0, text()
    finally:
        if driver.poll() is None:
            end(driver)
    lines = text()
    sizes = re.findall(r"starting (\d)(?: of \d)? Ray Train workers", lines)
    assert sizes == ["2", "1", "2", "1"], lines
    assert len(re.findall(r"\(1 of at most 1 restarts\)", lines)) == 1, lines
    assert "there is room for 1 more of 1 missing workers" in lines
    assert f"a node of the workers is about to go ({min(on)[:12]})" in lines
    assert lines.rstrip().endswith("finished")
    assert {4, 9, 12} <= {one.step for one in RunFolder.open(folder).checkpoints()}  # 9 was not due: it stopped there
    same_curve(folder, alone(recipe("nodes-alone", "cluster.workers=0", *long)).folder, steps=14)

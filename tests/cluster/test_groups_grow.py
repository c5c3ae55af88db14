"""The groups of cluster.yaml under Ray's own autoscaler, with nodes that are processes here: each grows for the jobs that are meant for it,
and no other with it; a node that is killed in their midst changes no result; all end at zero. This shows who is asked for, not that a cloud
answers."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from curves import alone, numbers, same_curve
from own_ray import BIN, end, free_ports, own_environment, started
from PIL import Image
from safetensors.torch import load_file

from stairstep.data import DataSettings, PairSource
from stairstep.evaluation.readers import READER_KEY
from stairstep.records import RunSettings, read_json_lines
from stairstep.settings import to_plain
from stairstep.sweeps import SweepFolder
from stairstep.sweeps.scores import scores
from stairstep.tasks import Recipe
from stairstep.tasks.loading import tile_reader
from stairstep.tasks.preprocessing import SHARD_TILES
from stairstep.tiles import TileReader, TileSettings, TileStore, tile_id

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 1500.0
HEAD = "f" * 51 + "00000"
GROUPS = ("preprocess", "train", "evaluate", "reader")
WORK = {
    "preprocess": "ray::Map",
    "train": "ray::RayTrainWorker",
    "evaluate": "ray::RemoteEvaluator.evaluate",  # while it evaluates
    "reader": "ray::ServeReplica:reader:Reader",
}
"""What a process calls itself that is at work for a group."""
pytestmark = [pytest.mark.soak, pytest.mark.timeout(5400)]


def faked(gcs: str) -> dict[str, Any]:
    """cluster.yaml with nodes that are processes on this machine, of one CPU each and at most two a group."""
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    types = {name: one | {"node_config": {}} for name, one in config["available_node_types"].items()}
    types["ray.head.default"] = types.pop(config["head_node_type"])  # what Ray's provider of such nodes calls it
    for one in types.values():
        one["resources"] = {key: min(value, 1) for key, value in one["resources"].items()}
        one["max_workers"] = min(one["max_workers"], 2)
    nothing = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "groups",
        "max_workers": config["max_workers"],
        "upscaling_speed": config["upscaling_speed"],
        "idle_timeout_minutes": 0.4,
        "available_node_types": types,
        "head_node_type": "ray.head.default",
        "provider": {
            "type": "external",
            "module": "light_nodes.LightNodes",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": HEAD,
            "gcs_address": gcs,
        },
        **{f"{one}_commands": [] for one in nothing},
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
    }


class Groups:
    """A Ray with a head that gives nothing away and groups that begin with no node; and its nodes, seen from outside."""

    def __init__(self, address: str, environment: dict[str, str], head: psutil.Process) -> None:
        self.address, self.environment, self._head = address, environment, head
        self._group: dict[int, str] = {}  # by the process of a node; what is no node: ""
        self.seen: dict[str, set[str]] = {}  # where each kind of work was seen: the groups
        self.most: dict[str, int] = {}  # nodes of each group, at once

    def nodes(self) -> list[tuple[str, psutil.Process]]:
        """Each living node: its group and its raylet."""
        found = []
        for one in self._head.children(recursive=True):
            with suppress(psutil.Error):
                if one.pid not in self._group:
                    self._group[one.pid] = one.environ().get("RAY_NODE_TYPE_NAME", "") if one.name() == "raylet" else ""
                if self._group[one.pid] in GROUPS and one.status() != psutil.STATUS_ZOMBIE:
                    found.append((self._group[one.pid], one))
        return found

    def look(self) -> dict[str, list[tuple[psutil.Process, psutil.Process]]]:
        """By the kind of work, the node and the process of each that is at it now."""
        nodes, found = self.nodes(), {kind: [] for kind in WORK}
        for group in GROUPS:
            self.most[group] = max(self.most.get(group, 0), sum(one == group for one, _ in nodes))
        for group, node in nodes:
            with suppress(psutil.Error):
                for one in node.children():
                    with suppress(psutil.Error):
                        title = (one.cmdline() or [""])[0]
                        for kind in (kind for kind, start in WORK.items() if title.startswith(start)):
                            found[kind].append((node, one))
                            self.seen.setdefault(kind, set()).add(group)
        return found

    def kill(self, node: psutil.Process) -> None:
        """As if the power went."""
        for one in [node, *node.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                one.kill()

    def run(self, folder: Path, *command: object) -> subprocess.Popen[bytes]:
        """`python -m jobs.…` on this Ray; what it says goes to the file `said` of a folder."""
        folder.mkdir(exist_ok=True)
        with (folder / "said").open("wb") as said:
            words = [sys.executable, "-m", *map(str, command)]
            return subprocess.Popen(words, env=self.environment, cwd=folder, stdout=said, stderr=subprocess.STDOUT)

    def until_nothing(self, tools: SimpleNamespace) -> None:
        """Wait for all groups to be at zero."""
        tools.wait(lambda: not self.nodes(), "back to nothing", patience_s=PATIENCE_S, every_s=0.5)


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    """The groups of cluster.yaml, all at zero."""
    from ray.util import get_node_ip_address

    port, dashboard, agent, client = free_ports(4)
    gcs = f"{get_node_ip_address()}:{port}"
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as name:  # sockets have short names
        folder = Path(name)
        environment = own_environment(folder) | {
            "PYTHONPATH": f"{ROOT / 'platform'}{os.pathsep}{ROOT}",
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            READER_KEY: secrets.token_hex(32),  # of every node, as docs/cluster.md has it
        }
        (folder / "cluster.json").write_text(json.dumps(faked(gcs)))
        scaled = environment | {
            "PYTHONPATH": f"{environment['PYTHONPATH']}{os.pathsep}{Path(__file__).parent}",  # for light_nodes.py
            "RAY_agent_register_timeout_ms": "300000",
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
        }
        command = [
            BIN / "ray", "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
            f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}", "--num-cpus=0", "--disable-usage-stats",
            f"--autoscaling-config={folder / 'cluster.json'}",
        ]  # fmt: skip
        try:
            with started(command, scaled, folder) as head:
                yield Groups(gcs, environment | {"RAY_ADDRESS": gcs}, psutil.Process(head.pid))
        finally:  # a node that was just being started is nobody's child
            for one in psutil.process_iter(["cmdline"]):
                if any(str(folder) in word for word in one.info["cmdline"] or ()):
                    with suppress(psutil.NoSuchProcess):
                        one.kill()


def ended(job: subprocess.Popen[bytes], groups: Groups, folder: Path, tools: SimpleNamespace, disturb: Callable[[Any], None]) -> str:
    """Let a job run to its end, and what must not change it happen meanwhile; returns what it said."""

    def over() -> bool:
        disturb(groups.look())
        return job.poll() is not None

    try:
        tools.wait(over, "the end of the job", patience_s=PATIENCE_S, every_s=0.05)
    finally:
        said = (folder / "said").read_text()
        if job.poll() is None:
            end(job)
    assert job.returncode == 0, said
    return said


def write_recipe(recipe: Any, path: Path) -> Path:
    """A recipe as a file, its run to be named by whoever takes it."""
    plain = to_plain(recipe)
    plain["run"]["name"] = None
    path.write_text(yaml.safe_dump(plain))
    return path


def test_preprocessing_goes_on_when_its_node_dies(groups: Groups, tools: SimpleNamespace, tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    pages.mkdir()
    rng = np.random.default_rng(0)
    names = [f"t{index:04d}.png" for index in range(2 * SHARD_TILES)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (200, 160, 3), dtype=np.uint8)).save(pages / name, compress_level=0)
    (pages / "train.jsonl").write_text("".join(json.dumps({"query": name, "chunk_path": name}) + "\n" for name in names))
    data = DataSettings(roots=(str(pages),), train=(PairSource("train.jsonl"),), hard_negatives=0)
    recipe = Recipe(run=RunSettings(root=str(tmp_path / "runs")), data=data, tiles=TileSettings(max_visual_tokens=64))
    killed: list[int] = []

    def disturb(at: Any) -> None:
        if at["preprocess"] and not killed:
            node, worker = at["preprocess"][0]
            groups.kill(node)
            killed.append(worker.pid)

    written = write_recipe(recipe, tmp_path / "pages.yaml")
    job = groups.run(tmp_path, "jobs.preprocess", written, "cluster.preprocess_group=preprocess")
    said = ended(job, groups, tmp_path, tools, disturb)
    assert killed and groups.seen["preprocess"] == {"preprocess"}, said
    assert {group for group, most in groups.most.items() if most} == {"preprocess"}, "no other group was started for it"
    store, direct = TileStore(tmp_path / "runs" / "tiles", tile_reader(recipe, stored=False).key), TileReader(recipe.tiles)
    assert len(store) == len(names)
    for name in names[::8]:
        path = pages / name
        assert torch.equal(store.pixels(tile_id(path.read_bytes())), direct.load(path).pixels), name
    groups.until_nothing(tools)


def test_training_takes_two_nodes_from_zero_and_goes_on_when_one_dies(
    groups: Groups, recipe: Callable[..., Any], tools: SimpleNamespace, tmp_path: Path
) -> None:
    own = ("cluster.resources.train=1", "cluster.start_timeout_s=900", "evaluation.mode=inline")
    runs = tmp_path / "runs"
    written = write_recipe(recipe("groups", *own, f"run.root={runs}"), tmp_path / "trained.yaml")
    groups.most, killed = {}, []

    def disturb(at: Any) -> None:
        if not killed and len(at["train"]) == 2 and tools.last_step(runs / "trained") >= 4:
            groups.kill(at["train"][1][0])
            killed.append(tools.last_step(runs / "trained"))

    said = ended(groups.run(tmp_path, "jobs.train", written), groups, tmp_path, tools, disturb)
    assert groups.most == {"preprocess": 0, "train": 2, "evaluate": 0, "reader": 0}
    assert killed and killed[0] < 8 and re.search(r"going on from step \d \(1 of at most 2 restarts\)", said), said
    groups.until_nothing(tools)
    expected = alone(recipe("groups-alone", "cluster.workers=0", "evaluation.mode=inline"))
    same_curve(runs / "trained", expected.folder, steps=8)
    for path in sorted(expected.folder.glob("eval_step*.jsonl")):
        places = [
            [(one["id"], one["top3_paths"]) for one in read_json_lines(folder / path.name)]
            for folder in (expected.folder, runs / "trained")
        ]
        assert places[0] == places[1] != []


SWEPT = ("train", "evaluate", "reader")
SPACE = "parameters:\n  optim.rates.llm: {kind: grid, values: [1.0e-3, 1.0e-2]}\n"


def table(sweep: SweepFolder) -> dict[str, Any]:
    """All that a final table and its trials say, but for times; the weights and the losses bit for bit."""
    found: dict[str, Any] = {}
    for one in sweep.trials():
        run = sweep.run_path(one.name)
        rows = {path.name: read_json_lines(path) for path in sorted(run.glob("eval_step*.jsonl"))}
        [weights] = run.glob("checkpoint-6/adapter_model.safetensors")
        bits = {name: value.numpy().tobytes() for name, value in load_file(weights).items()}
        found[one.name] = (one.state, one.point, scores(run, "hit@1"), scores(run, "qa"), rows, numbers(run), bits)
    return found


def test_a_sweep_has_trainers_evaluators_and_reader_on_their_groups_and_bears_the_loss_of_each(
    groups: Groups, recipe: Callable[..., Any], tools: SimpleNamespace, tmp_path: Path
) -> None:
    own = (
        "cluster.workers=1", "cluster.resources.train=1", "cluster.evaluator_resources.evaluate=1", "cluster.reader_resources.reader=1",
        "cluster.start_timeout_s=900", "evaluation.mode=beside", "evaluation.every=3", "evaluation.top_k_read=1",
        "evaluation.reader={kind: local, model: tiny-reader}", "optim.steps=6", "checkpoints.every=2",
    )  # fmt: skip
    written = write_recipe(recipe("swept", *own), tmp_path / "swept.yaml")
    (tmp_path / "space.yaml").write_text(SPACE)

    def sweep(name: str, disturb: Callable[[Any], None]) -> SweepFolder:
        folder = tmp_path / name
        groups.most, groups.seen = {}, {}
        command = ("jobs.sweep", written, tmp_path / "space.yaml", f"run.root={folder}", "--name", "s", "--concurrency", "2")
        said = ended(groups.run(folder, *command), groups, folder, tools, disturb)
        made = SweepFolder(folder / "s")
        assert [one.state for one in made.trials()] == ["finished"] * 2, said
        assert {kind: groups.seen[kind] for kind in SWEPT} == {kind: {kind} for kind in SWEPT}, "each on its own group"
        assert groups.most["preprocess"] == 0
        groups.until_nothing(tools)
        return made

    calm = table(sweep("calm", lambda at: None))
    assert groups.most == {"preprocess": 0, "train": 2, "evaluate": 1, "reader": 1}
    assert all(len(one[4]) == 3 and one[3].keys() == {3, 6} for one in calm.values()), "each was answered at three steps"
    in_all, killed = len(list((tmp_path / "calm" / "ledger" / "answer").rglob("*.json"))), {}

    def disturb(at: Any) -> None:
        answers = len(list((tmp_path / "storm" / "ledger" / "answer").rglob("*.json")))
        steps = [tools.last_step(one.parent) for one in (tmp_path / "storm" / "s" / "runs").glob("*/metrics.jsonl")]
        for group, due in (("train", max(steps, default=0) >= 3), ("evaluate", True), ("reader", 2 <= answers < in_all)):
            if due and at[group] and group not in killed:
                groups.kill(at[group][0][0])
                killed[group] = (max(steps, default=0), answers)

    storm = table(sweep("storm", disturb))
    assert killed.keys() == set(SWEPT), killed
    print(f"killed, at which step and after how many of {in_all} answers: {killed}")
    assert storm == calm

"""The groups of cluster.yaml under Ray's own autoscaler, with nodes that are processes here: each grows for what is meant for it, and no
other with it; all end at zero. This shows who is asked for, not that a cloud answers."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from own_ray import BIN, free_ports, own_environment, started

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 540.0
HEAD = "f" * 51 + "00000"
GROUPS = ("preprocess", "train", "evaluate", "reader")
pytestmark = pytest.mark.soak

GROW = """
import json, sys, time
import ray
from stairstep.cluster.preprocess import spread
from stairstep.cluster.session import ray_session

GROUPS = ("preprocess", "train", "evaluate", "reader")

def nodes():
    found = {}
    for one in ray.nodes():
        for group in GROUPS:
            if one["Alive"] and one["Resources"].get(group):
                found[group] = found.get(group, 0) + 1
    return found

def here(_):
    time.sleep(1)
    return ray.get_runtime_context().get_node_id()

def until(wanted, what):
    limit = time.monotonic() + 200
    while not wanted(nodes()):
        assert time.monotonic() < limit, (what, nodes())
        time.sleep(0.5)

with ray_session(None):
    assert nodes() == {}
    used = set(spread(here, range(12), "preprocess"))
    there = {one["NodeID"]: one["Labels"].get("ray-subcluster") for one in ray.nodes()}
    print("USED", json.dumps([len(used), sorted({str(there[one]) for one in used}), nodes()]), flush=True)
    until(lambda now: not now, "back to nothing")
    work = ray.remote(lambda: time.sleep(3)).options(num_cpus=1, num_gpus=1, resources={"train": 1})
    waiting = [work.remote() for _ in range(2)]
    until(lambda now: now.get("train") == 2, "two of train")
    print("TRAIN", json.dumps(nodes()), flush=True)
    ray.get(waiting)
    until(lambda now: not now, "back to nothing")
    print("NOTHING", flush=True)
"""


def faked(gcs: str) -> dict[str, Any]:
    """cluster.yaml with nodes that are processes on this machine, two CPUs each."""
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    types = {name: one | {"node_config": {}} for name, one in config["available_node_types"].items()}
    types["ray.head.default"] = types.pop(config["head_node_type"])  # what Ray's provider of such nodes calls it
    for one in types.values():
        one["resources"] = {key: min(value, 2) for key, value in one["resources"].items()}
    nothing = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "groups",
        "max_workers": config["max_workers"],
        "upscaling_speed": config["upscaling_speed"],
        "idle_timeout_minutes": 0.15,
        "available_node_types": types,
        "head_node_type": "ray.head.default",
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
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


@pytest.fixture
def address() -> Iterator[tuple[str, dict[str, str]]]:
    """The address of a head alone, and the environment that reaches it."""
    from ray.util import get_node_ip_address

    port, dashboard, agent, client = free_ports(4)
    gcs = f"{get_node_ip_address()}:{port}"
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as name:  # sockets have short names
        folder = Path(name)
        environment = own_environment(folder)
        (folder / "cluster.json").write_text(json.dumps(faked(gcs)))
        scaled = environment | {
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
            "PYTHONPATH": str(ROOT / "platform"),
        }
        command = [
            BIN / "ray", "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
            f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}", "--num-cpus=0", "--disable-usage-stats",
            f"--autoscaling-config={folder / 'cluster.json'}",
        ]  # fmt: skip
        with started(command, scaled, folder):
            yield gcs, environment | {"RAY_ADDRESS": gcs, "PYTHONPATH": str(ROOT / "platform")}


def test_a_group_grows_for_its_own_and_all_go_back_to_nothing(address: tuple[str, dict[str, str]], tmp_path: Path):
    _, environment = address
    script = tmp_path / "grow.py"
    script.write_text(GROW)
    done = subprocess.run([sys.executable, script], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    said = dict(line.partition(" ")[::2] for line in done.stdout.splitlines())
    used, labels, nodes = json.loads(said["USED"])
    assert used >= 1 and labels == ["preprocess"]
    assert set(nodes) == {"preprocess"}, "no other group was started for it"
    assert json.loads(said["TRAIN"]) == {"train": 2}
    assert "NOTHING" in said

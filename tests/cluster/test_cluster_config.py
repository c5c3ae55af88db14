"""cluster.yaml and its kin without a cluster: valid by Ray's own check and by what that misses, closed to the outside, locked; what a job
takes along."""

from __future__ import annotations

import copy
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.command_runner import _with_interactive
from ray.autoscaler._private.util import prepare_config, validate_config, with_envs

from stairstep.cluster.beside import mode_of
from stairstep.cluster.session import Session
from stairstep.tasks import load_recipe

ROOT = Path(__file__).resolve().parents[2]
CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
KUBERAY: dict[str, Any] = yaml.safe_load((ROOT / "docs" / "cluster" / "kuberay.yaml").read_text(encoding="utf-8"))
RAYJOB: dict[str, Any] = yaml.safe_load((ROOT / "docs" / "cluster" / "rayjob.yaml").read_text(encoding="utf-8"))
DOCUMENT = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
GROUPS = {"preprocess": (16, 0), "train": (8, 1), "evaluate": (4, 1), "reader": (2, 1)}  # most nodes, GPUs of a node


def problems(config: dict[str, Any]) -> list[str]:
    """What Ray's own check does not see: nodes that can never come, and keys that it drops without a word."""
    types, most = config["available_node_types"], config["max_workers"]
    workers = {name: one for name, one in types.items() if name != config["head_node_type"]}
    found = [f"{name}: no max_workers" for name, one in workers.items() if "max_workers" not in one]
    if sum(one.get("max_workers", 0) for one in workers.values()) > most:
        found.append("the groups' max_workers add up to more than the cluster's")
    found += [f"{name}: min_workers above max_workers" for name, one in workers.items() if one.get("min_workers", 0) > one["max_workers"]]
    legacy = {"min_workers", "initial_workers", "autoscaling_mode", "target_utilization_fraction", "head_node", "worker_nodes"}
    return found + [f"{key}: of an older Ray" for key in sorted(legacy & set(config))]


def checked(config: dict[str, Any]) -> list[str]:
    """Both checks; the first one raises."""
    validate_config(prepare_config(copy.deepcopy(config)))
    return problems(config)


def changed(path: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    *way, last = path.split("/")
    place = config
    for one in way:
        place = place[one]
    place[last] = value
    return config


def test_cluster_yaml_is_valid():
    assert checked(CONFIG) == []


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("max_workers", 29, "add up to more"),
        ("available_node_types/train/max_workers", 99, "add up to more"),
        ("min_workers", 0, "min_workers: of an older Ray"),
    ],
)
def test_what_ray_lets_pass_is_seen_here(path: str, value: Any, said: str):
    assert any(said in one for one in checked(changed(path, value)))


@pytest.mark.parametrize(
    ("path", "value"), [("node_groups", {}), ("head_node_type", "haed"), ("available_node_types/train/resources", {"GPU": "one"})]
)
def test_what_ray_sees(path: str, value: Any):
    with pytest.raises((ValueError, jsonschema.ValidationError)):
        checked(changed(path, value))


def test_a_head_without_gpu_and_groups_that_start_at_zero():
    head = CONFIG["available_node_types"]["head"]
    assert head["resources"] == {"CPU": 0}
    assert set(CONFIG["available_node_types"]) == {"head", *GROUPS}
    for name, (most, gpus) in GROUPS.items():
        group = CONFIG["available_node_types"][name]
        assert (group["min_workers"], group["max_workers"]) == (0, most)
        assert group["resources"].get("GPU", 0) == gpus
        assert {key for key in group["resources"] if key not in ("CPU", "GPU")} == {name}, "its own custom resource and no other"
    labelled = {name: one["labels"] for name, one in CONFIG["available_node_types"].items() if "labels" in one}
    assert labelled == {"preprocess": {"ray-subcluster": "preprocess"}}


def commands() -> list[str]:
    return [one for key, value in CONFIG.items() if key.endswith("_commands") for one in value]


def test_commands_are_bash():
    assert len(commands()) > 8
    for one in commands():
        done = subprocess.run(["bash", "-n", "-c", one], capture_output=True, text=True)
        assert done.returncode == 0, (one, done.stderr)


def test_ray_starts_with_a_token_or_not_at_all_and_listens_to_nobody_outside():
    starts = [one for one in commands() if "ray start" in one]
    assert len(starts) == 2
    for one in starts:
        assert "RAY_AUTH_MODE=token" in one.split("ray start")[0]
    [head] = [one for one in starts if "--head" in one]
    assert "--dashboard-host=127.0.0.1" in head
    text = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
    assert "IpPermissions" not in text, "the rules that Ray makes: ssh, and the cluster itself"
    assert "0.0.0.0" not in text
    assert not re.search(r"RAY_AUTH_TOKEN\b|API_KEY|AKIA|PRIVATE KEY|KeyName|hf_|sk-", text)
    mounts = dict(CONFIG["file_mounts"])
    assert set(mounts) == {"~/.ray/auth_token", "~/stairstep/secrets.env", "~/stairstep/requirements", "~/stairstep/notice.py"}
    assert all((ROOT / one).exists() for one in mounts.values() if not one.startswith("~"))


NOTICE = """
import os, sys
print(os.getpid(), os.environ["RAY_AUTH_MODE"], *sys.argv[1:], flush=True)
sys.stdin.read() == "" or sys.exit("a terminal is left")
import time; time.sleep(300)
"""


def test_every_worker_watches_for_a_notice_that_outlives_the_shell_of_its_start(tmp_path: Path):
    """The command as Ray's updater gives it to ssh, with a file that only says how it was called."""
    *before, command = CONFIG["worker_start_ray_commands"]
    assert "ray start" in before[-1] and not any("notice.py" in one for one in (*before, *CONFIG["head_start_ray_commands"]))
    home = tmp_path / "stairstep"
    (home / ".venv" / "bin").mkdir(parents=True)
    (home / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (home / "notice.py").write_text(NOTICE)
    [given] = with_envs([command], {"RAY_HEAD_IP": "10.1.2.3"})
    line = " ".join(_with_interactive(given))
    done = subprocess.run(line, shell=True, env=os.environ | {"HOME": str(tmp_path)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    limit = time.monotonic() + 60
    while not (said := (home / "notice.log").read_text() if (home / "notice.log").exists() else "").endswith("\n"):
        assert time.monotonic() < limit, "it has not begun"
        time.sleep(0.05)
    pid, mode, *words = said.split()
    try:
        assert os.getsid(int(pid)) not in (os.getsid(0), os.getpgid(0)), "a session of its own, with no terminal that could end it"
        assert (mode, words) == ("token", ["--address=10.1.2.3:6379", f"--pid-file={home / 'notice.pid'}"])
    finally:
        os.kill(int(pid), signal.SIGKILL)


def test_spot_instances_are_a_line_of_a_node_config():
    """The one that docs/cluster.md names."""
    [line] = re.findall(r"`(InstanceMarketOptions[^`]*)`", DOCUMENT)
    asked = yaml.safe_load(line)
    config = changed("available_node_types/train/node_config", CONFIG["available_node_types"]["train"]["node_config"] | asked)
    assert checked(config) == []
    assert asked == {"InstanceMarketOptions": {"MarketType": "spot"}}


def pins(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==([^ ;\\]+)", (ROOT / "requirements" / name).read_text(encoding="utf-8"), re.MULTILINE))


def test_nodes_install_the_locked_environment():
    text = "\n".join(commands())
    version = re.search(r"^UV_VERSION := (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert version and f"uv=={version[1]}" in text
    named = re.findall(r"~/stairstep/requirements/(\S+)", text)
    assert named == ["vllm.txt", "aws.txt"]
    assert "://" not in (ROOT / "cluster.yaml").read_text(encoding="utf-8"), "no address, and none of a package registry"
    base, whole, aws = pins("base.txt"), pins("vllm.txt"), pins("aws.txt")
    assert len(base) > 50 and base.items() <= whole.items()
    assert "boto3" in aws
    # botocore wants an older one than the rest is locked to, which any of them takes
    assert {name for name in aws if name in whole and aws[name] != whole[name]} <= {"python-dateutil"}


def test_kuberay_has_the_same_groups_a_token_and_the_locked_ray():
    spec = KUBERAY["spec"]
    assert KUBERAY["kind"] == "RayCluster"
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["rayVersion"] == pins("vllm.txt")["ray"]
    assert spec["enableInTreeAutoscaling"] is True and spec["autoscalerOptions"]["version"] == "v2"
    assert spec["headGroupSpec"]["resources"]["CPU"] == "0"
    assert {one["groupName"] for one in spec["workerGroupSpecs"]} == set(GROUPS)
    for one in spec["workerGroupSpecs"]:
        name = one["groupName"]
        most, gpus = GROUPS[name]
        assert (one["replicas"], one["minReplicas"], one["maxReplicas"]) == (0, 0, most)
        assert one["resources"][name] == "1"
        assert one.get("labels", {}) == CONFIG["available_node_types"][name].get("labels", {})
        [container] = one["template"]["spec"]["containers"]
        assert int(container["resources"]["limits"].get("nvidia.com/gpu", 0)) == gpus
        # Ray drains its node by itself when its pod is told to end, and Kubernetes has to wait for longer than that.
        drain = {one["name"]: one["value"] for one in container["env"]}["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]
        assert 60 < float(drain) < one["template"]["spec"]["terminationGracePeriodSeconds"]


def seed_000s_command() -> list[str]:
    """The words of the printed training of seed 000's run on AWS."""
    aws = DOCUMENT.split("\n## AWS\n")[1].split("\n## ")[0]
    [line] = [one for one in aws.splitlines() if "python -m jobs.train " in one]
    return shlex.split(line.split(" -- ")[1])


def test_a_rayjob_is_one_command_on_that_very_cluster_and_leaves_none_behind():
    spec = RAYJOB["spec"]
    assert RAYJOB["kind"] == "RayJob" and RAYJOB["apiVersion"] == KUBERAY["apiVersion"]
    assert spec["rayClusterSpec"] == KUBERAY["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] == 0, "a second cluster for a run that has failed would fail as well"
    words = [one.replace("/shared/stairstep/", "").replace("READER", "HEAD") for one in shlex.split(spec["entrypoint"])]
    assert words == seed_000s_command()
    carried, sent = (
        yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"],
        yaml.safe_load((ROOT / "runtime_env.yaml").read_text(encoding="utf-8")),
    )
    assert carried.pop("PYTHONPATH").split(":") == [f"/shared/stairstep/{one}".rstrip("/") for one in ("platform", "")]
    assert carried == sent["env_vars"]


def test_the_printed_run_of_seed_000_asks_for_its_groups_and_is_beside_where_none_of_them_has_a_node(monkeypatch: pytest.MonkeyPatch):
    _, _, _, recipe, *overrides = seed_000s_command()
    made = load_recipe(ROOT / recipe, overrides)
    asked = {
        "train": (made.cluster.resources, made.cluster.workers),
        "evaluate": (made.cluster.evaluator_resources, made.cluster.evaluators),
    }
    for group, (resources, count) in asked.items():
        assert resources == {group: 1.0}
        assert 1 <= count <= GROUPS[group][0]
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 0.0})
    assert mode_of(made, Session(private=False, ours=True)) == "beside"
    assert made.cluster.device == "cuda", "what a GPU group of no node does not show"
    assert made.cluster.start_timeout_s >= 1800


# --- what a job takes along


def packed(folder: Path, target: Path, excludes: Iterable[str]) -> dict[str, int]:
    """The files that Ray would send, with their sizes."""
    create_package(str(folder), target, include_parent_dir=False, include_gitignore=True, excludes=list(excludes))
    with zipfile.ZipFile(target) as file:
        return {one.filename: one.file_size for one in file.infolist() if not one.is_dir()}


def test_a_job_takes_the_code_along_and_neither_runs_nor_data(tmp_path: Path):
    environment = yaml.safe_load((ROOT / "runtime_env.yaml").read_text(encoding="utf-8"))
    assert environment["py_modules"] == ["platform/stairstep"]
    here = tmp_path / "here"
    here.mkdir()
    for name in ("jobs", "serve", "tune_spaces", "recipes", ".gitignore", ".rayignore"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, here / name)
    left = ["runs/a/metrics.jsonl", "data/page.png", "shards/0.tar", ".git/HEAD", ".venv/lib/x.py", "wandb/x", "secrets.env", "key.pem"]
    for name in (*left, "platform/stairstep/data/rows.py"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("x")
    names = packed(here, tmp_path / "work.zip", environment["excludes"])
    assert {
        "jobs/train.py",
        "jobs/common.py",
        "serve/reader.py",
        "serve/reader.yaml",
        "tune_spaces/stairstep.yaml",
        "recipes/v8r.yaml",
    } <= set(names)
    assert {one.split("/")[0] for one in names} == {"jobs", "serve", "tune_spaces", "recipes", ".gitignore", ".rayignore"}
    assert not [one for one in names if one.endswith(".pyc")]


def test_the_library_travels_whole(tmp_path: Path):
    environment = yaml.safe_load((ROOT / "runtime_env.yaml").read_text(encoding="utf-8"))
    package = ROOT / "platform" / "stairstep"
    names = packed(package, tmp_path / "library.zip", environment["excludes"])
    there = {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert set(names) == there
    assert sum(names.values()) < 50e6

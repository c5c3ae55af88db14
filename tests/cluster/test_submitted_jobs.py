"""Jobs submitted to a real Ray with tokens, as docs/cluster.md prints them: from a copy of the code, with no path to another."""

from __future__ import annotations

import json
import secrets
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from own_ray import BIN, free_ports, own_environment, started

from stairstep.records import RunFolder, read_json

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
PATIENCE_S = 1500.0
pytestmark = pytest.mark.timeout(2400)
SMALL = (
    "data.world.articles=8 data.world.questions=8 data.world.pairs=40 data.world.text_pairs=8 optim.batch=4 optim.steps=2 "
    "optim.schedule.warmup_steps=0 phases.text_warmup_steps=0 evaluation.every=2 evaluation.loss_every=0 cluster.start_timeout_s=400"
)
UNREAD = f"{SMALL} evaluation.reader=null"
WHERE = """
import importlib, json
import ray
from stairstep.cluster.session import ray_session

def told():
    return {name: list(importlib.import_module(name).__path__)[0] for name in ("jobs", "serve", "stairstep", "tune_spaces")}

with ray_session(None) as session:
    there = ray.get(ray.remote(told).options(num_cpus=1, resources={"train": 1}).remote())
    print("TOLD", json.dumps([session.private, told(), there]))
"""


def printed(start: str) -> list[str]:
    """The commands of docs/cluster.md that begin so."""
    found = [line for line in DOCUMENT.splitlines() if line.startswith(start)]
    assert found, start
    return found


@dataclass(frozen=True)
class Cluster:
    """A Ray started by this test, a copy of the code to submit from, and where runs go."""

    environment: dict[str, str]
    checkout: Path
    runs: Path

    def call(self, *command: object, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command beside the copy, as a person would who has the token."""
        return subprocess.run(
            [str(one) for one in command],
            cwd=self.checkout, env=self.environment | more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE_S,
        )  # fmt: skip

    def submit(self, line: str, *more: str) -> subprocess.CompletedProcess[str]:
        """A printed line with the runs' folder put in its place, and further overrides."""
        words = shlex.split(line.replace("/shared/runs", str(self.runs)))
        assert words[:3] == ["ray", "job", "submit"]
        return self.call(BIN / "ray", *words[1:], *more)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code as it would be cloned, and one job more that says where everything was imported from."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("jobs", "serve", "tune_spaces", "recipes", "platform/stairstep"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("runtime_env.yaml", ".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "jobs" / "where.py").write_text(WHERE)
    space = folder / "tune_spaces" / "vit_rank.yaml"  # two of its three ranks, which is what runs at once
    whole = space.read_text(encoding="utf-8")
    assert "[4, 16, 64]" in whole
    space.write_text(whole.replace("[4, 16, 64]", "[4, 16]"), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def cluster(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The Ray of `Machines of your own`, at ports and under a token of its own."""
    runs = tmp_path_factory.mktemp("runs")
    [head] = printed("ray start --head")
    port, dashboard, agent, client = free_ports(4)
    # Two workers at once want two of the group's resource; a person would have two machines.
    words = shlex.split(head.replace("--port=6379", f"--port={port}").replace('"train": 1', '"train": 4'))
    assert words[0] == "ray" and f"--port={port}" in words
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as name:  # sockets have short names
        folder = Path(name)
        environment = own_environment(folder)
        more = [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
        with started([BIN / words[0], *words[1:], *more, "--block", "--num-cpus=4"], environment, folder):
            reached = environment | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
            yield Cluster(reached, checkout, runs)


def test_a_submitted_job_imports_what_was_submitted_in_driver_and_worker(cluster: Cluster):
    line = f"{printed('ray job submit')[0].split(' -- ')[0]} -- python -m jobs.where"
    done = cluster.submit(line)
    assert done.returncode == 0, done.stdout
    [told] = [line for line in done.stdout.splitlines() if line.startswith("TOLD ")]
    private, driver, worker = json.loads(told.removeprefix("TOLD "))
    assert private is False
    for places in (driver, worker):
        assert set(places) == {"jobs", "serve", "stairstep", "tune_spaces"}
        assert all("runtime_resources" in one and cluster.environment["RAY_TMPDIR"] in one for one in places.values()), places


def test_without_the_right_token_nobody_comes_in_and_nothing_starts(cluster: Cluster, tmp_path: Path):
    wrong = tmp_path / "token"
    wrong.write_text(secrets.token_hex(32))
    refused = cluster.call(BIN / "ray", "job", "list", RAY_AUTH_TOKEN_PATH=str(wrong))
    assert refused.returncode != 0 and "uthenticat" in refused.stdout, refused.stdout
    nobody = {key: value for key, value in cluster.environment.items() if key != "RAY_AUTH_TOKEN_PATH"} | {"HOME": str(tmp_path)}
    command = [BIN / "ray", "start", "--head", "--port=0", "--include-dashboard=false"]
    started = subprocess.run(command, env=nobody, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S)
    assert started.returncode != 0
    assert "no authentication token was found" in started.stdout + started.stderr


def job_lines() -> list[str]:
    """The submissions that need no GPU and no cloud: those of the demo and of tinywiki."""
    return [line for line in printed("ray job submit") if "jobs.demo" in line or "tinywiki" in line]


def line_of(verb: str) -> str:
    [line] = [one for one in job_lines() if f"python -m jobs.{verb} " in one]
    return line


@pytest.mark.soak
@pytest.mark.parametrize("verb", ["preprocess", "train", "sweep"])
def test_a_relative_root_is_refused(cluster: Cluster, verb: str):
    done = cluster.call(BIN / "ray", *shlex.split(line_of(verb).replace("/shared/runs", "runs"))[1:], *shlex.split(UNREAD))
    assert done.returncode == 1
    assert "error: run.root: 'runs' is relative" in done.stdout
    assert "Traceback" not in done.stdout


def test_preprocess_as_printed(cluster: Cluster):
    done = cluster.submit(line_of("preprocess"), *shlex.split(UNREAD))
    assert done.returncode == 0, done.stdout
    assert list((cluster.runs / "tiles").rglob("shard-*.arrow"))


@pytest.mark.soak
def test_train_as_printed_and_its_log(cluster: Cluster):
    done = cluster.submit(line_of("train"), *shlex.split(UNREAD), "cluster.resources.train=1")
    assert done.returncode == 0, done.stdout
    folder = RunFolder(cluster.runs / "tinywiki")
    assert [one.step for one in folder.checkpoints()][-1] == 2
    assert read_json(folder.path / "status.json")["state"] == "finished"
    for said in ("starting 2 Ray Train workers with CPU 1, train 1 each", "2/2", "finished"):
        assert said in done.stdout, done.stdout


@pytest.mark.soak
def test_a_sweep_as_printed(cluster: Cluster):
    done = cluster.submit(line_of("sweep"), *shlex.split(UNREAD), "--seeds", "0")
    assert done.returncode == 0, done.stdout
    assert "trials done)" in done.stdout
    [sweep] = cluster.runs.glob("*/sweep.json")
    assert {read_json(one)["state"] for one in (sweep.parent / "trials").glob("*.json")} == {"finished"}


@pytest.mark.soak
def test_report_as_printed(cluster: Cluster):
    """Over the sweep of the test before."""
    assert list(cluster.runs.glob("*/sweep.json")), "the sweep has to run first"
    for page in cluster.runs.glob("*/report.html"):
        page.unlink()
    done = cluster.submit(line_of("report"))
    assert done.returncode == 0, done.stdout
    [page] = cluster.runs.glob("*/report.html")
    assert str(page) in done.stdout and "vit_rank" in done.stdout, done.stdout
    assert "<html" in page.read_text(encoding="utf-8")[:200]


@pytest.mark.soak
def test_the_demo_as_printed(cluster: Cluster):
    done = cluster.submit(line_of("demo"), *shlex.split(SMALL))
    assert done.returncode == 0, done.stdout
    assert "tiny-reader answers at http://127.0.0.1:" in done.stdout
    assert "R@1" in done.stdout and "everything lies in" in done.stdout, "the final table is in the job's log"


def log_of_stopped(cluster: Cluster, name: str, line: str, *more: str, when: Callable[[], object]) -> str:
    """Submit a job, stop it when something is true, and give its log."""
    words = shlex.split(line.replace("/shared/runs", str(cluster.runs)))
    done = cluster.call(BIN / "ray", *words[1:3], "--no-wait", f"--submission-id={name}", *words[3:], *more)
    assert done.returncode == 0, done.stdout
    limit = time.monotonic() + PATIENCE_S
    while not when():
        assert time.monotonic() < limit, cluster.call(BIN / "ray", "job", "logs", name).stdout
        time.sleep(0.2)
    done = cluster.call(BIN / "ray", "job", "stop", name)
    assert done.returncode == 0, done.stdout
    status = cluster.call(BIN / "ray", "job", "status", name).stdout
    assert "stopped" in status.lower(), status
    return cluster.call(BIN / "ray", "job", "logs", name).stdout


@pytest.mark.soak
def test_a_stopped_training_ends_with_a_checkpoint_and_goes_on(cluster: Cluster, tools: SimpleNamespace):
    small = [*shlex.split(UNREAD), "run.name=stopped", "evaluation.every=100000", "checkpoints.every=100000"]
    folder = RunFolder(cluster.runs / "stopped")
    line = line_of("train")
    log = log_of_stopped(cluster, "to-be-stopped", line, *small, "optim.steps=100000", when=lambda: tools.last_step(folder.path) >= 3)
    status = read_json(folder.path / "status.json")
    assert status["state"] == "stopped", log
    [checkpoint] = folder.checkpoints()
    assert checkpoint.step == tools.last_step(folder.path) == status["step"]
    assert f"stopped at step {checkpoint.step}" in log, log

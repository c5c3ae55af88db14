"""A Ray that somebody else runs on this machine: left alone unless it is named; where it is named, config and commands of Serve work."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
from own_ray import end

pytestmark = pytest.mark.soak  # two Rays at once: minutes on two cores
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PATIENCE_S = 300.0

JOIN = """
import os, sys
from ray._private.services import canonicalize_bootstrap_address
import ray
from stairstep.cluster.session import ray_session

there = sys.argv[1]

def told(address):
    with ray_session(address) as session:
        print(session.private, ray.get_runtime_context().gcs_address == there)

assert canonicalize_bootstrap_address(None) == there, "Ray itself would join it"
told(None)
told(there)
os.environ["RAY_ADDRESS"] = there
told(None)
"""


@dataclass(frozen=True)
class Cluster:
    """A Ray started by `ray start`."""

    environment: dict[str, str]
    address: str
    dashboard: str

    def run(self, *command: object, **more: str) -> str:
        """What a command printed, run where this Ray can be found."""
        done = subprocess.run(
            [str(one) for one in command], cwd=ROOT, env=self.environment | more, capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def serve(self, verb: str, *arguments: object) -> str:
        """`serve deploy` and its like."""
        return self.run(BIN / "serve", verb, "-a", self.dashboard, *arguments)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def another(tools) -> Iterator[Cluster]:
    """A Ray of somebody else: where Ray itself would find and join it, open, with this repository on its path."""
    port, dashboard = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:  # sockets have short names
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
            "RAY_TMPDIR": folder,
            "RAY_AUTH_MODE": "disabled",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
            "PYTHONPATH": f"{ROOT / 'platform'}{os.pathsep}{ROOT}",
        }
        here = "127.0.0.1"
        command = [
            BIN / "ray", "start", "--head", "--block", f"--node-ip-address={here}", f"--port={port}", f"--dashboard-host={here}",
            f"--dashboard-port={dashboard}", f"--ray-client-server-port={free_port()}", "--num-cpus=2", "--disable-usage-stats",
        ]  # fmt: skip
        current = Path(folder) / "ray" / "ray_current_cluster"
        for _ in range(3):  # where the machine has much other work, Ray gives itself up after 30 s
            with (Path(folder) / "said").open("wb") as said:
                process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
            tools.wait(lambda one=process: one.poll() is not None or current.exists(), "the other Ray")
            if process.poll() is None:
                break
        try:
            assert process.poll() is None, (Path(folder) / "said").read_text()
            yield Cluster(environment, current.read_text(), f"http://{here}:{dashboard}")
        finally:
            end(process)


def test_it_is_joined_only_where_it_is_named(another: Cluster) -> None:
    told = another.run(sys.executable, "-c", JOIN, another.address)
    nothing, argument, variable = told.splitlines()
    assert nothing == "True False"
    assert argument == variable == "False True"


@pytest.fixture(scope="module")
def deployed(another: Cluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of Serve there, after `serve deploy` of the shipped config at a free port."""
    port = free_port()
    text = (ROOT / "serve" / "reader.yaml").read_text(encoding="utf-8")
    assert text.count("port: 8200") == 1
    config = tmp_path_factory.mktemp("serve") / "reader.yaml"
    config.write_text(text.replace("port: 8200", f"port: {port}"), encoding="utf-8")
    another.serve("deploy", config)
    return f"http://127.0.0.1:{port}"


def until(look: Callable[[], str | None], what: str) -> str:
    """What `look` finds, asked now and then."""
    limit = time.monotonic() + PATIENCE_S
    while time.monotonic() < limit:
        if found := look():
            return found
        time.sleep(1.0)
    raise AssertionError(f"{what}: not within {PATIENCE_S:.0f} s")


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed")
def test_the_config_without_vllm_says_what_to_install(another: Cluster, deployed: str) -> None:
    def failed() -> str | None:
        status = another.serve("status")
        return status if "DEPLOY_FAILED" in status else None

    said = until(failed, "a failed deployment")
    assert "the engine vllm was asked for, but the package vllm is not installed" in said
    assert "requirements/vllm.txt" in said
    assert "Traceback" not in said


def test_serve_run_of_the_tiny_reader(another: Cluster, deployed: str) -> None:
    command = [BIN / "serve", "run", "--address", another.address, "serve.reader:build", "engine.model=tiny-reader"]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, env=another.environment, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        try:

            def models() -> str | None:
                assert process.poll() is None, said.seek(0) or said.read().decode()
                try:
                    response = httpx.get(f"{deployed}/v1/models", timeout=10, trust_env=False)
                except httpx.TransportError:
                    return None
                return response.json()["data"][0]["id"] if response.status_code == 200 else None

            assert until(models, "an answer") == "tiny-reader"
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=120)

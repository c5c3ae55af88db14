"""docs/cluster/slurm.sh with a Slurm of one node that only passes commands on: a Ray comes up, the command runs on it, nothing is left."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import pytest
from own_ray import own_environment

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "docs" / "cluster" / "slurm.sh"
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
COMMAND = """
import ray
from stairstep.cluster.session import ray_session
with ray_session(None) as session:
    print("TOLD", session.private, ray.cluster_resources()["train"])
raise SystemExit(3)
"""


def test_it_is_bash():
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0
    assert SCRIPT.read_text(encoding="utf-8").startswith("#!/bin/bash\n")


@pytest.mark.soak
def test_a_command_runs_on_a_ray_of_its_own_and_its_exit_code_is_the_jobs():
    from ray.util import get_node_ip_address

    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as name:  # sockets have short names
        home = Path(name)
        environment = own_environment(home) | {"HOME": name, "SLURM_JOB_ID": "4242", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "here"}
        del environment["RAY_AUTH_TOKEN_PATH"]
        for tool, text in (("srun", SRUN), ("scontrol", f"#!/bin/bash\necho {get_node_ip_address()}\n")):
            (home / tool).write_text(text)
            (home / tool).chmod(0o700)
        environment["PATH"] = f"{name}:{environment['PATH']}"
        done = subprocess.run(
            ["bash", str(SCRIPT), "python", "-c", COMMAND], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 3, done.stdout + done.stderr
        assert "TOLD False 1.0" in done.stdout
        assert not list((home / ".ray").glob("slurm-*")), "the token is gone"
        left = [one for one in Path("/proc").glob("[0-9]*/cmdline") if name.encode() in _read(one)]
        assert left == []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""

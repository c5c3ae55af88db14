"""A Ray of a test's own by `ray start`: in its own folder, at its own ports, under its own token; ended by process id."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
PATIENCE_S = 400.0


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens at, all different."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(one.getsockname()[1]) for one in probes]
    for one in probes:
        one.close()
    return ports


def own_environment(folder: Path) -> dict[str, str]:
    """What a process needs to start or reach the Ray of a folder: no setting of anybody else's, and a new token."""
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    return {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHONPATH"))} | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }


@contextmanager
def started(command: Sequence[object], environment: dict[str, str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run `ray start --head --block …` until the end of the block."""
    current = folder / "ray" / "ray_current_cluster"
    for _ in range(3):  # where the machine has much other work, Ray gives itself up after 30 s
        with (folder / "said").open("wb") as said:
            process = subprocess.Popen([str(one) for one in command], env=environment, cwd=folder, stdout=said, stderr=subprocess.STDOUT)
        limit = time.monotonic() + PATIENCE_S
        while process.poll() is None and not current.exists() and time.monotonic() < limit:
            time.sleep(0.05)
        if process.poll() is None:
            break
    try:
        assert process.poll() is None and current.exists(), (folder / "said").read_text()
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process with all that it started, and nothing else."""
    below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
    for one in below:
        if one.is_running():
            one.kill()

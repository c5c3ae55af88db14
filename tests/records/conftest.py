"""Helpers of the records tests: killing a function at each of its steps on the disk, and running a script to be killed."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

_STEPS = ("rename", "replace", "fsync", "unlink", "rmdir", "write", "mkdir", "ftruncate")


@pytest.fixture
def die_at_every_step():
    """Runs `action` in forked children; the n-th child dies, without any clean-up, just before its n-th call that changes the disk.

    Yields n for each death, so that the caller can look at what was left; ends when a child lived to the end of `action`.
    """

    def deaths(prepare, action):
        for n in range(1, 200):
            prepare()
            child = os.fork()
            if child == 0:
                left = [n]
                for name in _STEPS:
                    setattr(os, name, _counted(getattr(os, name), left))
                code = 1
                try:
                    action()
                    code = 0
                finally:
                    os._exit(code)
            _, status = os.waitpid(child, 0)
            code = os.waitstatus_to_exitcode(status)
            if code == 0:
                return
            assert code == 77, f"the child failed by itself at {n}"
            yield n
        raise AssertionError("the action never ended")

    return deaths


def _counted(function, left):
    def counted(*arguments, **named):
        left[0] -= 1
        if left[0] == 0:
            os._exit(77)
        return function(*arguments, **named)

    return counted


class Script:
    """A running Python script of a test, which can be killed."""

    def __init__(self, text: str, *arguments: object) -> None:
        command = [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)]
        source = str(Path(__file__).resolve().parents[2] / "platform")
        environment = {**os.environ, "PYTHONPATH": source}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    def line(self) -> str:
        """The next line that the script prints."""
        return self.process.stdout.readline().strip()

    def kill(self, after_s: float = 0.0) -> None:
        """SIGKILL, after a while."""
        time.sleep(after_s)
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()

    def wait(self) -> int:
        """The exit code of a script that ends by itself."""
        code = self.process.wait()
        self.process.stdout.close()
        return code


@pytest.fixture
def script():
    """Starts scripts; those that still run at the end of the test are killed."""
    started = []

    def start(text, *arguments):
        started.append(Script(text, *arguments))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.kill()

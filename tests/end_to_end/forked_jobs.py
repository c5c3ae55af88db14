"""`python -m jobs.<verb>` in a process of its own, forked from one that has imported the libraries once: a new one takes ten seconds to.

Everything else is as a person has it: the arguments, the whole environment, the working folder, what is printed, exit codes, signals.
What huggingface_hub reads from the environment when it is imported, the child reads again.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_CONTEXT = multiprocessing.get_context("forkserver")
# What bench/kill_resume.py has its processes forked from too: there is one such server in a process.
_IMPORTED = ["stairstep.tasks.run", "torch.fx.experimental.symbolic_shapes", "huggingface_hub"]


@functools.cache
def warm_up() -> None:
    """Start the process that all are forked from, and wait until it has imported what each of them needs."""
    _CONTEXT.set_forkserver_preload(_IMPORTED)
    first = _CONTEXT.Process(target=int)
    first.start()
    first.join()


class Forked:
    """A running job, with what tests use of subprocess.Popen; its output lies in two files."""

    def __init__(self, folder: Path, environment: Mapping[str, str], *arguments: str, script: str | None = None) -> None:
        warm_up()
        self._out, self._err = folder / "out.txt", folder / "err.txt"
        for path in (self._out, self._err):
            path.touch()
        told = (str(self._out), str(self._err), dict(environment), arguments, script)
        self._process = _CONTEXT.Process(target=_work, args=told, daemon=True)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """As `kill -<number>` does."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """SIGKILL, where it still runs."""
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"it did not end within {timeout} s"
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it printed until its end."""
        self.wait(timeout)
        return self._out.read_text(), self._err.read_text()


def _work(out: str, err: str, environment: Mapping[str, str], arguments: tuple[str, ...], script: str | None) -> None:
    for path, descriptor in ((out, 1), (err, 2)):
        opened = os.open(path, os.O_WRONLY | os.O_TRUNC)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    importlib.reload(importlib.import_module("huggingface_hub.constants"))
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    if script is None:
        sys.argv = list(arguments)
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = ["-c", *arguments]
        exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})

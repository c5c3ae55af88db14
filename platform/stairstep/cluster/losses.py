"""What Ray says when a group of workers ends before its time, and what that means for the run."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ray.exceptions import RayActorError
from ray.train import ControllerError, TrainingFailedError, WorkerGroupError

from stairstep.settings import TrainingError

from .work import WorkerDefect, WorkerFailed

# What gloo and NCCL say where the other side of a connection has died, sometimes before Ray has seen it die.
_PEER_GONE = re.compile(r"(?i)(closed|reset) by peer|connection (refused|reset|closed)|pair closure|remote process exited|broken pipe")
_DETAIL = re.compile(r"Worker exit detail: (.+?\.)(?:\s|$)")


@dataclass(frozen=True)
class Loss:
    """A group that ended early: what happened in one line; cause and traceback, where a worker's code raised and nobody had died."""

    what: str
    cause: str = ""
    traceback: str = ""
    preempted: bool = False

    def final(self, tries: int) -> Exception:
        """The error of a run that is given up."""
        if self.traceback:
            return WorkerDefect(f"{self.what}, {tries} times; the last traceback:\n{self.traceback}")
        return TrainingError(
            f"{self.what}, and no restart is left (cluster.max_failures); the last checkpoint stands, and the same command goes on from "
            "it. Memory is the usual cause: see the system's log, and objective.gradcache"
        )


def loss_of(error: TrainingFailedError | RayActorError) -> Loss:
    """The meaning of an error that `fit()` raised."""
    failures = dict(sorted(error.worker_failures.items())) if isinstance(error, WorkerGroupError) else {}
    causes = [getattr(one, "health_check_failure", one) for one in failures.values()]
    preempted = type(error).__name__ == "PreemptionError" or any(isinstance(one, RayActorError) and one.preempted for one in causes)
    died = [rank for rank, one in failures.items() if not isinstance(one, WorkerFailed)]
    if died:
        return Loss(f"worker {died[0]} was lost ({_reason(failures[died[0]])})", preempted=preempted)
    if failures:
        rank, cause = next(iter(failures.items()))
        if _PEER_GONE.search(_last_line(cause)):  # a death as the survivor saw it: it may well be told twice in the same words
            return Loss(f"worker {rank} lost another worker ({_last_line(cause)})", preempted=preempted)
        return Loss(f"worker {rank} failed ({_last_line(cause)})", _last_line(cause), str(cause), preempted)
    return Loss(f"the workers were lost ({_reason(error)})", preempted=preempted)


def timed_out(error: Exception) -> bool:
    """Whether the workers' resources did not come in time."""
    return isinstance(error, ControllerError) and type(error.controller_failure).__name__ == "WorkerGroupStartupTimeoutError"


def _reason(error: BaseException) -> str:
    found = _DETAIL.search(str(error))
    return found[1] if found else _last_line(error)


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__

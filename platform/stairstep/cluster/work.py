"""What each Ray Train worker runs: the very loop of `tasks.run`, over the process group that Ray has set up.

An error that another try would meet again is written into the run folder, where the driver finds it; what is raised for Ray's sake, to
tear the group down, is always the same plain exception, because an arbitrary one need not survive the way between processes.
"""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.train import report as ray_report

from stairstep.objectives import ProcessGroup
from stairstep.records import Claim, RunFolder, logging_setup, read_json, write_json
from stairstep.settings import InputError, StairstepError, TrainingError, build, from_plain
from stairstep.settings import errors as project_errors
from stairstep.tasks import Recipe
from stairstep.tasks.resolve import run_folder_path

from .elastic import pause_file, tell_node
from .metrics import RunMetrics
from .screen import on_screen

_LOG = logging.getLogger(__name__)
_FAILURE = "failure.json"
PATIENCE_S = 180.0
"""How long a claim is waited for whose holder may be dying. An NFSv4 server keeps the locks of a lost node until its lease is over, by
default 90 seconds, and may look for leases that are over only once in as long."""
_FOLDER_S = 30.0
_LOOK_S = 0.5


class WorkerFailed(Exception):
    """A worker's exception as text: the traceback, whose last lines say what happened."""


class WorkerDefect(RuntimeError):
    """An exception in a worker that no one foresaw; the message is its traceback."""


def work(config: Mapping[str, Any]) -> dict[str, Any]:
    """Train as one of several workers; returns the outcome."""
    from stairstep.tasks.run import train  # here: Ray's controller loads this module too, and needs no model library

    recipe = build(Recipe, from_plain(config["recipe"], "recipe"))
    path = run_folder_path(recipe)
    workers = ProcessGroup()
    with ExitStack() as stack:
        if workers.rank == 0:
            stack.enter_context(on_screen(Path(config["screen"]), config["terminal"]))
        logging_setup(rank=workers.rank)
        logging.getLogger().setLevel(logging.WARNING)  # Ray Train tells every report through the root logger
        try:
            wait_for_folder(path)
            if workers.rank == 0:
                wait_for_claim(RunFolder(path), PATIENCE_S).release()
            place = Path(config["place"])
            tell_node(place, ray.get_runtime_context().get_node_id())
            finished = train(
                recipe,
                workers,
                stop=lambda: workers.rank == 0 and pause_file(place).exists(),
                reported=lambda step, values: _report(path, step, values),
                listener=RunMetrics(path, recipe.optim.steps) if workers.rank == 0 else None,
            )
            return asdict(finished.outcome)
        except (RuntimeError, OSError):  # a lost peer, device or file system looks like this: the driver may try again
            raise WorkerFailed(traceback.format_exc()) from None
        except Exception as error:  # noqa: BLE001 - the driver raises it again
            write_failure(path, config["attempt"], error)
            raise WorkerFailed(traceback.format_exc()) from None


def _report(path: Path, step: int, values: Mapping[str, float]) -> None:
    ray_report({"step": step, "run_folder": str(path), "time": time.time(), **values})


def wait_for_folder(path: Path, patience_s: float = _FOLDER_S) -> None:
    """The driver has opened the run; a shared file system may show it a little later, one that is not shared never will."""
    end = time.monotonic() + patience_s
    while not RunFolder(path).holds_run():
        if time.monotonic() > end:
            raise InputError(
                f"run.root: the run folder {path}, made where the job was started, is not there on the node {os.uname().nodename} of a "
                "worker; give a folder of a file system that all nodes mount"
            )
        time.sleep(_LOOK_S)


def wait_for_claim(folder: RunFolder, patience_s: float) -> Claim:
    """The claim on a run folder, when those who are about to die there have died; refused once the patience is at its end."""
    end = time.monotonic() + patience_s
    told = False
    while True:
        try:
            return folder.claim()
        except InputError as error:
            if time.monotonic() > end:
                raise
            if not told:
                _LOG.warning("%s. Waiting up to %.0f s for it to end", str(error).split(";")[0], patience_s)
                told = True
        time.sleep(_LOOK_S)


def failure_record(error: Exception) -> dict[str, Any]:
    """An error as plain values, for another process; the traceback too, unless it is one of ours, whose message says all."""
    ours = isinstance(error, StairstepError)
    return {
        "kind": type(error).__name__,
        "exit_code": error.exit_code if isinstance(error, StairstepError) else 1,
        "message": str(error) if ours else "".join(traceback.format_exception(error)),
        "ours": ours,
    }


def failure_of(record: Mapping[str, Any]) -> Exception:
    """The error that a record stands for."""
    if not record["ours"]:
        return WorkerDefect(record["message"])
    general: type[StairstepError] = InputError if record["exit_code"] == InputError.exit_code else TrainingError
    return getattr(project_errors, record["kind"], general)(record["message"])


def write_failure(path: Path, attempt: str, error: Exception) -> None:
    """Leave an error for the driver."""
    write_json(path / _FAILURE, {"attempt": attempt, **failure_record(error)})


def read_failure(path: Path, attempt: str) -> Exception | None:
    """The error that ended this attempt at the run, if a worker left one."""
    if not (path / _FAILURE).exists():
        return None
    plain = read_json(path / _FAILURE)
    return failure_of(plain) if plain["attempt"] == attempt else None

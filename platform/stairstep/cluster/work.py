"""What each Ray Train worker runs: the very loop of `tasks.run`, over the process group that Ray has set up where they are several.

An error that another try would meet again is told to the driver (words.py); what is raised for Ray's sake, to
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
from ray.train import get_context
from ray.train import report as ray_report

from stairstep.objectives import Alone, Collective, ProcessGroup
from stairstep.records import Claim, RunFolder, logging_setup
from stairstep.settings import InputError, StairstepError, TrainingError, build, from_plain
from stairstep.settings import errors as project_errors
from stairstep.tasks import Recipe
from stairstep.tasks.placing import run_place, working_copy
from stairstep.tasks.resolve import have_world

from .metrics import RunMetrics
from .screen import on_screen
from .words import Words

_LOG = logging.getLogger(__name__)
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
    run, words = run_place(recipe), Words(config["group"])
    workers: Collective = ProcessGroup() if get_context().get_world_size() > 1 else Alone()
    with ExitStack() as stack:
        if workers.rank == 0:
            stack.enter_context(on_screen(words, config["terminal"]))
        logging_setup(rank=workers.rank)
        logging.getLogger().setLevel(logging.WARNING)  # Ray Train tells every report through the root logger
        try:
            if isinstance(run, Path):
                wait_for_folder(run)
            if workers.rank == 0:  # of this machine; a store's own lock is waited for by the driver
                wait_for_claim(RunFolder.create(working_copy(recipe)), PATIENCE_S).release()
            have_world(recipe)
            words.tell_node(ray.get_runtime_context().get_node_id())
            finished = train(
                recipe,
                workers,
                stop=lambda: workers.rank == 0 and words.asked_to_stop(),
                reported=lambda step, values: ray_report({"step": step, "run": str(run), "time": time.time(), **values}),
                listener=RunMetrics(run, recipe.optim.steps) if workers.rank == 0 else None,
            )
            return asdict(finished.outcome)
        except (RuntimeError, OSError):  # a lost peer, device or file system looks like this: the driver may try again
            raise WorkerFailed(traceback.format_exc()) from None
        except Exception as error:  # noqa: BLE001 - the driver raises it again
            words.tell_failure(failure_record(error))
            raise WorkerFailed(traceback.format_exc()) from None


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

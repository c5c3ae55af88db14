"""Evaluators as Ray actors: they evaluate checkpoints on devices of their own while training goes on.

The run folder says what is wanted and what was found (tasks/beside.py); here it is only dealt out. Evaluators have names within a job, so
the trials of a sweep find the same ones. One that died comes back and its step is evaluated again; an error of ours ends the run.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import Any, Literal

import ray
from ray.exceptions import RayActorError

from stairstep.records import RunFolder
from stairstep.settings import TrainingError, to_plain
from stairstep.tasks import ClusterSettings, Recipe
from stairstep.tasks.beside import Beside

from .metrics import RunMetrics
from .session import Session, worker_resources
from .work import failure_of, failure_record

_LOG = logging.getLogger(__name__)
_REST_S = 1.0  # before a dead evaluator is asked again
_BACK_S = 10.0  # between two of its failures, for them to be two deaths


class RemoteEvaluator:
    """An evaluator in a process of its own; an error comes back as plain values, for not every exception survives the way."""

    def __init__(self) -> None:
        self._evaluator: Any = None

    def evaluate(self, plain: Mapping[str, Any], step: int) -> dict[str, Any] | None:
        """Evaluate a step of a run; returns the error, if there is one."""
        from stairstep.tasks.evaluator import Evaluator  # here: who only deals out steps needs no model library

        self._evaluator = self._evaluator or Evaluator(RunMetrics)
        try:
            self._evaluator.evaluate(plain, step)
        except Exception as error:  # noqa: BLE001 - the driver raises it again
            return failure_record(error)
        return None


def evaluator_resources(cluster: ClusterSettings) -> dict[str, float]:
    """What Ray reserves for an evaluator: a GPU where the workers have one."""
    gpu = {"GPU": 1.0} if "GPU" in worker_resources(cluster) else {}
    return {"CPU": cluster.evaluator_cpus, **gpu, **cluster.evaluator_resources}


def mode_of(recipe: Recipe, session: Session) -> Literal["inline", "after", "beside"]:
    """The recipe's evaluation mode; auto: beside where evaluators have room besides the workers, or a group that may grow.

    A node group is named by `cluster.evaluator_resources`; it may well have no node yet, nor the workers' own, so none is looked for."""
    if recipe.evaluation.mode != "auto":
        return recipe.evaluation.mode
    cluster, there = recipe.cluster, ray.cluster_resources()
    if cluster.evaluator_resources and not session.private:
        return "beside"
    needed: dict[str, float] = {}
    for each, count in ((worker_resources(cluster), cluster.workers), (evaluator_resources(cluster), cluster.evaluators)):
        for name, amount in each.items():
            needed[name] = needed.get(name, 0.0) + amount * count
    device = "GPU" if "GPU" in needed else "CPU"
    room = all(amount <= there.get(name, 0.0) for name, amount in needed.items() if session.private or name == device)
    return "beside" if room and evaluator_resources(cluster)[device] else "inline"


def evaluators(cluster: ClusterSettings) -> list[Any]:
    """The evaluators of this job; those that are not there yet are started."""
    each = dict(evaluator_resources(cluster))
    options = {"num_cpus": each.pop("CPU"), "num_gpus": each.pop("GPU", 0), "resources": each}
    actor = ray.remote(RemoteEvaluator)
    names = (f"stairstep-evaluator-{index}" for index in range(cluster.evaluators))
    # Ray starts a dead one again under its handle; how often that is borne is decided by each run (EvaluatorPool).
    return [actor.options(name=name, get_if_exists=True, max_restarts=-1, **options).remote() for name in names]


class EvaluatorPool:
    """Deals the wanted steps of one run to evaluators; `look` is called again and again while the run trains."""

    def __init__(self, recipe: Recipe, folder: RunFolder) -> None:
        self._recipe, self._beside = recipe, Beside(folder)
        self._plain = to_plain(recipe)
        self._actors = evaluators(recipe.cluster)
        self._open: dict[Any, tuple[int, int]] = {}  # by reference of the call: the step, and who has it
        self._metrics = RunMetrics(folder.path)
        self._deaths = 0
        self._down = [-math.inf] * len(self._actors)  # when each was last found dead

    def look(self) -> None:
        """Deal out what is newly wanted; raises what an evaluation failed with."""
        done, _ = ray.wait(list(self._open), num_returns=len(self._open), timeout=0) if self._open else ([], [])
        for call in done:
            step, place = self._open.pop(call)
            try:
                record = ray.get(call)
            except RayActorError:
                self._died(place, step)
                continue
            if record is not None:
                raise failure_of(record)
        wanted = self._beside.wanted()
        self._metrics.set("open_evaluations", len(wanted))
        dealt = {step for step, _ in self._open.values()}
        up = [place for place, since in enumerate(self._down) if time.monotonic() - since > _REST_S]
        for step in wanted:
            if step not in dealt and up:
                place = min(up, key=lambda one: sum(who == one for _, who in self._open.values()))
                self._open[self._actors[place].evaluate.remote(self._plain, step)] = (step, place)

    @property
    def short(self) -> bool:
        """Whether an evaluator was dead a moment ago: it may still wait for a place to come back to."""
        return any(time.monotonic() - since < 3 * _REST_S for since in self._down)

    def _died(self, place: int, step: int) -> None:
        now = time.monotonic()
        again = now - self._down[place] < _BACK_S  # it has not come back yet: the same death
        self._down[place] = now
        if again:
            return
        self._deaths += 1
        limit = self._recipe.cluster.max_failures
        if self._deaths > limit:
            raise TrainingError(f"evaluators died {self._deaths} times, the last one at step {step} (cluster.max_failures: {limit})")
        _LOG.warning("an evaluator died; step %d is evaluated again (%d of at most %d)", step, self._deaths, limit)

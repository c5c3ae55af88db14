"""Evaluators as Ray actors: they evaluate checkpoints on devices of their own while training goes on.

The run folder says what is wanted and what was found (tasks/beside.py); here it is only dealt out. Evaluators have names within a job, so
the trials of a sweep find the same ones. One that died comes back and its step is evaluated again; an error of ours ends the run.

Each evaluator has at most one call of a run, so that runs which share it take turns. What cannot go well ends the run in a bounded time:
evaluators that die again and again, and evaluators for which there is no place. One that hangs is named, and waited for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import ray
from ray._private.state import state as ray_state  # no public function tells how often an actor was restarted, nor what is being drained
from ray.exceptions import RayActorError, RayError, RayTaskError

from stairstep.records import RunFolder
from stairstep.settings import TrainingError, UnreachableError, to_plain
from stairstep.tasks import ClusterSettings, Recipe
from stairstep.tasks.besides import beside_of
from stairstep.tasks.placing import run_place

from .metrics import RunMetrics
from .session import Session, shown, worker_resources
from .work import failure_of, failure_record

_LOG = logging.getLogger(__name__)
_LOOK_S = 1.0  # between two looks at the run folder, which many nodes share, and at the evaluators
_SAME_S = 60.0  # Ray may take half a minute to see that a node is gone: so long, all failures of one life of an evaluator are one death
_QUIET_S = 60.0  # when evaluators that have not come are worth a line


class RemoteEvaluator:
    """An evaluator in a process of its own; an error comes back as plain values, for not every exception survives the way."""

    def __init__(self) -> None:
        self._evaluator: Any = None

    def evaluate(self, plain: Mapping[str, Any], step: int) -> dict[str, Any] | None:
        """Evaluate a step of a run; returns the error, if there is one."""
        from stairstep.tasks.evaluator import Evaluator  # here: who only deals out steps needs no model library

        self._evaluator = self._evaluator or Evaluator(lambda recipe: RunMetrics(run_place(recipe)))
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


@dataclass(frozen=True)
class Life:
    """An evaluator as Ray has it at a moment."""

    state: str  # Ray's word for it
    number: int = 0  # how often it was restarted by now
    node: str = ""

    @property
    def up(self) -> bool:
        """Whether it can be asked."""
        return self.state == "ALIVE"


class Evaluators(Protocol):
    """The evaluators of a job, each known by its place among them."""

    def lives(self) -> list[Life]:
        """How each of them is."""

    def leaving(self) -> Collection[str]:
        """The nodes that are about to go."""

    def begin(self, place: int, plain: Mapping[str, Any], step: int) -> Any:
        """Ask one for a step of a run; returns the call."""

    def ended(self, calls: Sequence[Any]) -> list[Any]:
        """Those of the calls that have come back."""

    def outcome(self, call: Any) -> dict[str, Any] | None:
        """What a call that has come back says: nothing, or its error; raises Ray's own where it was lost."""


class RayEvaluators:
    """Evaluators that are Ray actors."""

    def __init__(self, cluster: ClusterSettings) -> None:
        self._actors = evaluators(cluster)

    def lives(self) -> list[Life]:
        """How each of them is."""
        return [_life(ray_state.actor_table(one._actor_id.hex())) for one in self._actors]

    def leaving(self) -> Collection[str]:
        """The nodes that are about to go."""
        return set(ray_state.get_draining_nodes())

    def begin(self, place: int, plain: Mapping[str, Any], step: int) -> Any:
        """Ask one for a step of a run; returns the call."""
        return self._actors[place].evaluate.remote(plain, step)

    def ended(self, calls: Sequence[Any]) -> list[Any]:
        """Those of the calls that have come back."""
        return list(ray.wait(list(calls), num_returns=len(calls), timeout=0)[0]) if calls else []

    def outcome(self, call: Any) -> dict[str, Any] | None:
        """What a call that has come back says."""
        record: dict[str, Any] | None = ray.get(call)
        return record


def _life(table: Mapping[str, Any]) -> Life:
    """What Ray's table of actors says; it may be a moment late in knowing one at all."""
    return Life(table["State"], table["NumRestarts"], table["Address"]["NodeID"]) if table else Life("DEPENDENCIES_UNREADY")


@dataclass(frozen=True)
class _Call:
    """A step that an evaluator was asked for, in which of its lives."""

    step: int
    place: int
    life: int


class EvaluatorPool:
    """Deals the wanted steps of one run to evaluators; `look` is called again and again while the run trains, `close` once it has ended."""

    def __init__(
        self, recipe: Recipe, folder: RunFolder, those: Evaluators | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._recipe, self._cluster, self._beside, self._clock = recipe, recipe.cluster, beside_of(folder), clock
        self._plain = to_plain(recipe)
        self._those = those or RayEvaluators(recipe.cluster)
        self._lives = self._those.lives()
        self._metrics = RunMetrics(run_place(recipe))
        self._open: dict[Any, _Call] = {}
        self._look_at = float("-inf")
        self._deaths = 0
        self._failed: dict[tuple[int, int], float] = {}  # by place and life: when its death was told first
        self._rests: dict[int, float] = {}  # by place: until when one that failed is not asked
        self._preempted: set[tuple[int, int]] = set()  # places and lives on nodes that are about to go: their death is no failure
        self._without: float | None = None  # since when something is wanted and no evaluator is there
        self._told: set[Any] = set()

    def look(self) -> None:
        """Deal out what is newly wanted; raises what an evaluation failed with, or that no evaluator can be had."""
        back = self._those.ended(list(self._open))
        now = self._clock()
        if now < self._look_at and not back:
            return
        self._look_at = now + _LOOK_S
        for call in back:
            self._take_back(call, now)
        if back:
            self._beside.renew()
        self._lives = self._those.lives()
        leaving = self._those.leaving()
        self._preempted |= {(place, one.number) for place, one in enumerate(self._lives) if one.node in leaving}
        wanted = self._beside.open()
        self._metrics.set("open_evaluations", len(wanted))
        self._bound_waiting(wanted, now)
        self._name_hanging()
        self._deal(wanted, now)

    @property
    def short(self) -> bool:
        """Whether an evaluator has died and waits for a place to come back to."""
        return any(one.state == "RESTARTING" for one in self._lives)

    def close(self) -> None:
        """The run has ended: what it still wants is wanted no more. Evaluators turn to other runs, and write nothing into this one."""
        self._beside.withdraw()
        self._open.clear()
        self._metrics.set("open_evaluations", 0)

    def _deal(self, wanted: Sequence[int], now: float) -> None:
        """Each evaluator that is there and has nothing of this run takes the next step."""
        busy = {one.place for one in self._open.values()}
        dealt = {one.step for one in self._open.values()}
        free = [place for place, one in enumerate(self._lives) if one.up and place not in busy and now >= self._rests.get(place, now)]
        for place, step in zip(free, [one for one in wanted if one not in dealt], strict=False):
            self._open[self._those.begin(place, self._plain, step)] = _Call(step, place, self._lives[place].number)

    def _take_back(self, call: Any, now: float) -> None:
        asked = self._open.pop(call)
        self._told.discard(call)
        try:
            record = self._those.outcome(call)
        except RayTaskError:
            raise  # not lost: our own code has failed outside of what it tells itself
        except RayError as error:  # its process or node has died, was out of memory, cannot be reached
            self._died(asked, error, now)
            return
        if record is not None:
            raise failure_of(record)

    def _died(self, asked: _Call, error: RayError, now: float) -> None:
        self._rests[asked.place] = now + _LOOK_S
        life = asked.place, asked.life
        if life in self._failed and now - self._failed[life] < _SAME_S:
            return
        self._failed[life] = now
        why = _last_line(error)
        if life in self._preempted or (isinstance(error, RayActorError) and error.preempted):
            _LOG.warning("the node of an evaluator was taken back; step %d is evaluated again", asked.step)
            return
        self._deaths += 1
        limit = self._cluster.max_failures
        if self._deaths > limit:
            raise TrainingError(
                f"evaluators died {self._deaths} times, the last one at step {asked.step} (cluster.max_failures: {limit}): {why}. The last "
                "checkpoint stands, and the same command goes on from it. Memory is the usual cause: see the system's log, and "
                "evaluation.batch_tokens"
            )
        _LOG.warning("an evaluator died (%s); step %d is evaluated again (%d of at most %d)", why, asked.step, self._deaths, limit)

    def _bound_waiting(self, wanted: Sequence[int], now: float) -> None:
        if not wanted or any(one.up for one in self._lives):
            self._without = None
            return
        self._without = now if self._without is None else self._without
        waited, limit = now - self._without, self._cluster.start_timeout_s
        if waited >= limit:
            raise UnreachableError(
                f"no evaluator was there for {limit:g} s (cluster.start_timeout_s) while step {wanted[0]} waited to be evaluated: "
                f"{self._asked_for()}. Enlarge the cluster, lower cluster.workers, or say evaluation.mode=inline"
            )
        if waited >= _QUIET_S and "none" not in self._told:
            self._told.add("none")
            _LOG.info("step %d waits to be evaluated, and no evaluator is there yet: %s", wanted[0], self._asked_for())

    def _asked_for(self) -> str:
        each = evaluator_resources(self._cluster)
        there, free = ray.cluster_resources(), ray.available_resources()
        have = "; ".join(f"{name} {there.get(name, 0):g}, of which {free.get(name, 0):g} free" for name in each)
        return f"{self._cluster.evaluators} with {shown(each)} each were asked for; the cluster has {have}"

    def _name_hanging(self) -> None:
        """Say once of each call that its evaluator has left its stacks: in its own process nobody would read it."""
        for call, asked in self._open.items():
            if call not in self._told and self._beside.hangs(asked.step):
                self._told.add(call)
                _LOG.warning(
                    "the evaluation of step %d has not got on for %g s (run.stalled_after_s); where its evaluator stands is in %s",
                    asked.step,
                    self._recipe.run.stalled_after_s,
                    self._beside.stacks(asked.step),
                )


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else type(error).__name__

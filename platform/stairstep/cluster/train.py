"""Training under Ray Train: N workers take the steps of `tasks.run`, and a group that lost one is set up anew from the last checkpoint.

Ray places workers and is told metrics; checkpoints belong to the run folder, and how often a group is replaced is decided here, because
only here is known whether another try can help. `fit()` runs off the main thread, so that Ctrl-C and SIGTERM reach our stop flag: the
group is asked to stop (words.py), which the first worker hears at the end of a step, of short ones half a second later, and all workers
agree on. A group whose node is about to go, or that is smaller than it could be, is asked to stop in the same way (elastic.py), and another
goes on from its checkpoint.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from stairstep.records import Claim, StopFlag
from stairstep.records.copies import told_as
from stairstep.records.places import is_url
from stairstep.settings import UnreachableError, to_plain
from stairstep.tasks import ClusterSettings, Recipe
from stairstep.tasks.opening import Finished
from stairstep.training import Outcome

from .beside import EvaluatorPool, evaluator_resources, mode_of
from .elastic import GroupWatch, Room, Sizing
from .losses import Loss, loss_of, timed_out
from .screen import Relay, terminal_size, without_ray
from .seen import SeenRun
from .session import Session, check_resources, check_root, ray_session, resources_line, shown, worker_resources
from .waiting import end_waiting
from .words import Keys, RayKeys, Words
from .work import PATIENCE_S, failure_of, work

_LOG = logging.getLogger(__name__)
_COLLECTIVE_TIMEOUT_S = 2 * 3600  # the others wait while the first worker evaluates
_POLL_S = 0.2
_SHORTLY_S = 5.0  # processes that were killed need a moment to die
_QUIET_S = 60.0  # when workers that have not come are worth a line
_END_S = 2.0  # between two looks for a wish for room that has to be taken back
_TAKEN_S = 60.0  # for workers whose room was there a moment ago


class _StoppedEarly(Exception):
    """A stop was asked for before any worker had begun."""


def train_on_ray(recipe: Recipe, attend: Callable[[], str] = lambda: "", view: Path | None = None, patient: bool = False) -> Finished:
    """Train under Ray Train; returns when the run has finished or was stopped with a checkpoint.

    `attend` is called several times a second while workers train, in the calling thread; what it says, if anything, is why to stop.
    `view`: where the copy to read of a run in an object store is kept, made anew every few seconds; by default in this machine's cache.
    `patient`: also when it begins, wait for a store that is away, and for workers of an earlier driver that may be dying elsewhere."""
    check_root(recipe.run.root, recipe.cluster.address)
    check_root(recipe.tiles.store, recipe.cluster.address, "tiles.store")
    if not is_url(recipe.run.root):
        recipe = replace(recipe, run=replace(recipe.run, root=os.path.abspath(recipe.run.root)))
    seen = SeenRun(recipe, view)
    with _one_driver(seen) as (storage, unclean):
        seen.open(recipe, PATIENCE_S if unclean or patient else _SHORTLY_S, anew=True, patient=patient)
        recipe = replace(recipe, run=replace(recipe.run, resume="auto"))
        # Ray takes SIGTERM for itself when it starts, so the flag is raised after that.
        with ray_session(recipe.cluster.address) as session, StopFlag() as flag:
            recipe = replace(recipe, evaluation=replace(recipe.evaluation, mode=mode_of(recipe, session)))
            driver = _Driver(recipe, seen, storage, session, flag, attend)
            try:
                return Finished(driver.run(), seen.view.path, seen.place)
            except Exception as error:
                seen.failed(error)
                raise
            finally:
                seen.forget_stop()
                seen.look(at_once=True)


class _Driver:
    """One run from the driver's side: groups of workers, one after the other, until one of them ends it."""

    def __init__(
        self,
        recipe: Recipe,
        seen: SeenRun,
        storage: Path,
        session: Session,
        flag: StopFlag,
        attend: Callable[[], str],
        keys: Keys | None = None,
    ) -> None:
        self.recipe, self.seen, self.storage, self.session, self.flag, self.attend = recipe, seen, storage, session, flag, attend
        self.keys = keys or RayKeys()
        self.cluster = recipe.cluster
        self.each = worker_resources(self.cluster)
        self.attempt = uuid.uuid4().hex[:12]
        self.pool: EvaluatorPool | None = None
        self.evaluation_error: Exception | None = None
        self.room = Room(self.each)
        self.watch: GroupWatch | None = None
        self.begun = False  # of the last group: whether a worker has begun
        self.paused = False  # of the last group: whether it was asked to stop for another to go on

    def run(self) -> Outcome:
        """Set up groups of workers until the run ends; a lost worker costs one of `cluster.max_failures`, a preempted one none."""
        with closing(self.room):
            try:
                return self._run()
            finally:
                if self.pool is not None:
                    self.pool.close()

    def _run(self) -> Outcome:
        beside = self.recipe.evaluation.mode == "beside"
        if self.session.private:
            check_resources(self.cluster, self.each, evaluator_resources(self.cluster) if beside else None)
        if beside:
            self.pool = EvaluatorPool(self.recipe, self.seen.view)
        lost, before = 0, (-1, "")
        for number in itertools.count(1):
            words, loss = Words(f"{self.recipe.run.name}-{self.attempt}-{number}", self.keys), None
            self.begun = self.paused = False
            try:
                outcome = self._group(words, self._size(hasty=number > 1 or self.session.private))
                if outcome.reason != "stopped" or not self.paused:
                    return outcome
            except _StoppedEarly:
                if self.evaluation_error is not None:
                    raise self.evaluation_error from None
                return self._stopped()
            except (TrainingFailedError, RayActorError) as error:
                if self.flag and not self.begun:
                    return self._stopped()  # their room was given up
                loss = self._loss(error, words.failure())
            finally:
                words.forget()
            if self.flag or self.seen.stop_asked():  # which has also looked how far the run has come
                return self._stopped()
            if loss is not None:
                lost += not loss.preempted
                step = self.seen.last_step()
                if lost > self.cluster.max_failures or (loss.cause and before == (step, loss.cause)):
                    raise loss.final(lost)  # the second time the same without a step between is not chance
                before = (step, loss.cause)
                _LOG.warning("%s; going on from step %d (%d of at most %d restarts)", loss.what, step, lost, self.cluster.max_failures)
            self.seen.open(self.recipe, PATIENCE_S)
        raise AssertionError("unreachable")

    def _size(self, hasty: bool) -> int:
        """How many workers the next group has; waits for their room where the run is elastic, else Ray Train does."""
        if not self.cluster.elastic:
            return self.cluster.workers
        began = time.monotonic()
        sizing = Sizing(self.cluster.least, self.cluster.workers, self.cluster.start_timeout_s, hasty, began)
        quiet_until = began + _QUIET_S
        while True:
            self.room.ask(self.cluster.workers)
            try:
                size = sizing.decide(self.room.there(), time.monotonic())
            except TimeoutError:
                raise self._unreachable() from None
            if size is not None:
                self.room.close()
                return size
            self._look_after()
            if self.evaluation_error is not None:
                raise self.evaluation_error
            if self.flag:
                raise _StoppedEarly
            if time.monotonic() > quiet_until:
                quiet_until = float("inf")
                _LOG.info("waiting for room: %s", resources_line(self.cluster, self.each))
            time.sleep(_POLL_S)

    def _group(self, words: Words, size: int) -> Outcome:
        """One group of workers; the main thread stays free for signals and for what the first worker writes."""
        relay = Relay(words)
        trainer = self._trainer(words.group, size)
        self.watch = None
        ended: dict[str, Any] = {}

        def fit() -> None:
            try:
                ended["value"] = trainer.fit().return_value
            except BaseException as error:  # noqa: BLE001 - carried to the main thread, which raises it
                ended["error"] = error

        of = f" of {self.cluster.workers}" if size < self.cluster.workers else ""
        _LOG.info("starting %d%s Ray Train workers with %s each", size, of, shown(self.each))
        thread = threading.Thread(target=fit, name="ray-train-fit", daemon=True)
        with _environment(self.cluster, self.session), without_ray(), closing(relay):
            thread.start()
            self._attend(thread, relay, words, size)
        if self.evaluation_error is not None:
            raise self.evaluation_error
        if "error" in ended:
            raise ended["error"]
        return Outcome(**ended["value"])

    def _attend(self, thread: threading.Thread, relay: Relay, words: Words, size: int) -> None:
        quiet_until, end_at, asked = time.monotonic() + _QUIET_S, 0.0, False
        while thread.is_alive():
            thread.join(_POLL_S)
            relay.poll()
            self.begun = relay.begun
            self._look_after()
            if self.flag and thread.is_alive():
                if self.session.ours and not relay.begun:
                    raise _StoppedEarly  # closing the session ends what Ray has begun
                if not asked:
                    words.ask_to_stop(self.flag.reason)
                    asked = True
                if not relay.begun and time.monotonic() > end_at:
                    end_waiting()
                    end_at = time.monotonic() + _END_S
            if not relay.begun and time.monotonic() > quiet_until:
                quiet_until = float("inf")
                _LOG.info("no worker has begun yet: %s", resources_line(self.cluster, self.each))
            if relay.begun:
                self.watch = self.watch or GroupWatch(self.cluster, size, self.room, words.nodes)
                if (why := self.watch.why(self._grows, self.paused)) and not self.paused:
                    _LOG.info("%s; the workers stop at a checkpoint, and others go on from it", why)
                    words.ask_to_stop(why)
                    self.paused = True

    def _look_after(self) -> None:
        """What goes on beside the workers: the caller's own affairs and evaluations, either of which may ask for a stop."""
        self.seen.look()
        if why := self.attend() or self._deal_out():
            self.flag.set(why)

    def _grows(self) -> bool:
        """Whether more workers would help: there are steps left, and no evaluator waits for a place of its own."""
        return self.seen.last_step() < self.recipe.optim.steps and not (self.pool is not None and self.pool.short)

    def _deal_out(self) -> str:
        """Give evaluators what the run wants evaluated; says why to stop where an evaluation failed."""
        if self.pool is not None and self.evaluation_error is None:
            try:
                self.pool.look()
            except Exception as error:  # noqa: BLE001 - raised once the workers have stopped
                self.evaluation_error = error
                return "an evaluation failed"
        return ""

    def _trainer(self, group: str, size: int) -> TorchTrainer:
        gpu = "GPU" in self.each
        config = {"recipe": to_plain(self.recipe), "group": group, "terminal": terminal_size()}
        return TorchTrainer(
            work,
            train_loop_config=config,
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=_COLLECTIVE_TIMEOUT_S),
            scaling_config=ScalingConfig(num_workers=size, use_gpu=gpu, resources_per_worker=self.each),
            run_config=RunConfig(
                name=group,
                storage_path=str(self.storage),
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
                logging_config=LoggingConfig(log_level="WARNING"),
            ),
        )

    def _loss(self, error: TrainingFailedError | RayActorError, failure: Mapping[str, Any] | None) -> Loss:
        """What Ray's error means for the run; raises what another try cannot mend, which a worker has told as its failure."""
        if failure is not None:
            raise failure_of(failure) from None
        if timed_out(error):
            if self.cluster.elastic:
                return Loss("somebody else has taken the workers' room")
            raise self._unreachable() from None
        loss = loss_of(error)
        return replace(loss, cause="", preempted=True) if self.watch is not None and self.watch.leaving else loss

    def _unreachable(self) -> UnreachableError:
        lower = "cluster.min_workers" if self.cluster.elastic else "cluster.workers"
        return UnreachableError(
            f"the workers' resources did not come within {self.cluster.start_timeout_s:g} s (cluster.start_timeout_s): "
            f"{resources_line(self.cluster, self.each)}. Lower {lower}, or enlarge the cluster"
        )

    def _stopped(self) -> Outcome:
        return Outcome("stopped", self.seen.stopped(), None, None)


@contextmanager
def _one_driver(seen: SeenRun) -> Iterator[tuple[Path, bool]]:
    """Ray's storage for this run, claimed by one driver at a time; and whether the last one left without cleaning up.

    Workers claim the run folder itself. This claim is beside it and holds over all groups of workers, the time between them included.
    """
    path = seen.folder.path
    storage = path.parent / ".ray" / path.name
    unclean = storage.exists()
    storage.mkdir(parents=True, exist_ok=True)
    with told_as(storage.resolve(), seen.folder.where):
        claim = Claim(storage)
    with claim:
        for left in storage.iterdir():
            if left.name != ".lock":
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield storage, unclean
        finally:
            shutil.rmtree(storage, ignore_errors=True)
            with suppress(OSError):  # another run's storage is there
                storage.parent.rmdir()


@contextmanager
def _environment(cluster: ClusterSettings, session: Session) -> Iterator[None]:
    """How Ray Train's controller and workers behave is read from the driver's environment; what a person has set there stays."""
    wanted = {
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(
            min(cluster.start_timeout_s, _TAKEN_S) if cluster.elastic else cluster.start_timeout_s
        ),
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": os.environ.get("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5"),  # a report waits for it
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it would write every progress line twice
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in a recipe mean the same everywhere
    }
    if session.private:
        wanted["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

"""A sweep on Ray Tune: its trials beside one another, as many as the cluster has room for.

Nothing of it lives in Ray alone. A sweep that goes on begins a new Tune experiment over the same folder: the scheduler is told what the
trials scored that are done, the others go on from their checkpoints. So no state of Tune's has to be trusted, or to fit tomorrow's code.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from stairstep.evaluation.settings import LocalReaderSettings
from stairstep.models.sources import locate
from stairstep.records import StopFlag
from stairstep.records.places import is_url
from stairstep.settings import InputError, StairstepError, TrainingError, build, from_plain, to_yaml
from stairstep.sweeps.beginning import maker_of
from stairstep.sweeps.folder import ALL, DONE, SweepFolder, TrialRecord
from stairstep.sweeps.plan import TrialMaker, write_trial
from stairstep.sweeps.scores import best_score, scores
from stairstep.sweeps.serving import ServedReader
from stairstep.sweeps.space import OptunaSearchSettings, Space, space_of
from stairstep.sweeps.spent import Limits, spent
from stairstep.sweeps.suggesting import Scored, suggest
from stairstep.tasks import Recipe, load_recipe

from .beside import evaluator_resources, evaluators, mode_of
from .screen import without_ray
from .session import HEAD, Session, check_resources, check_root, ray_session, reader_host, worker_resources
from .stopping import TRIAL, remember, scheduler_of
from .trial import run_trial

_LOG = logging.getLogger(__name__)
_LOOK_S = 2.0
_DRIVER = {HEAD: 0.001}  # Tune must reserve something for a trial's own process; on the head it keeps no node and is lost with none
_DEATHS = 3  # of a trial's process, before the trial counts as failed


def room_for(recipes: Iterable[Recipe], session: Session, wanted: int | None, beside: bool = False) -> int:
    """How many trials may run at once: `wanted`, or as many of the largest as the cluster has workers' resources for now,
    less what evaluators take beside them."""
    if wanted is not None and wanted < 1:
        raise InputError(f"--concurrency: expected at least 1, found {wanted}")
    there, room, counted = dict(ray.cluster_resources()), math.inf, False
    for one in {to_yaml(recipe.cluster): recipe.cluster for recipe in recipes}.values():
        cluster = replace(one, workers=max(1, one.workers))
        each = worker_resources(cluster)
        if session.private:
            check_resources(cluster, each, evaluator_resources(cluster) if beside else None)
        if beside and not counted:
            for name, amount in evaluator_resources(cluster).items():
                there[name] = there.get(name, 0.0) - amount * cluster.evaluators
            counted = True  # trials share the evaluators
        room = min(room, *(there.get(name, 0.0) // (amount * cluster.workers) for name, amount in each.items() if amount))
    room = int(room)
    if wanted is not None and session.private and wanted > room:
        raise InputError(f"--concurrency: {wanted} trials were asked for, but this machine has room for {room} at once")
    return max(1, room) if wanted is None else wanted


def run_sweep(
    sweep: SweepFolder,
    serve: Callable[[str, dict[str, float], str], AbstractContextManager[str]],
    concurrency: int | None,
    limits: Limits,
    told: Callable[[str], None],
) -> str:
    """Run what is left of a sweep; returns why it ended before its last trial did, or nothing.

    `serve` runs a reader by its model's name with custom resources at a host, on the Ray that is there then, and gives its address."""
    with ExitStack() as stack:
        stack.enter_context(sweep.claim())
        sweep.let_go_on()  # who asks for a stop from now on is heard, also while Ray starts
        plan = sweep.plan
        space, recipe = space_of(plan.space), build(Recipe, from_plain(plan.recipe, "sweep.json: recipe"))
        check_root(recipe.run.root, recipe.cluster.address)
        if limits.cost is not None and not recipe.evaluation.prices:
            raise InputError("--max-cost: the recipe names no evaluation.prices, so no call has a cost that could be counted")
        session = stack.enter_context(ray_session(recipe.cluster.address))
        if is_url(sweep.run_root):
            _check_on_head(sweep)
        left = [path for one in sweep.trials() if one.state not in DONE and (path := sweep.recipe_path(one.name)).exists()]
        recipes = [load_recipe(path) for path in left]
        mode = mode_of(replace(recipe, cluster=replace(recipe.cluster, workers=max(1, recipe.cluster.workers))), session)
        at_once = room_for(recipes or [recipe], session, concurrency, mode == "beside")
        reader, served = recipe.evaluation.reader, None
        # On a cluster only where it has a place: elsewhere it would take the cores of any node, and each trial can read by itself.
        if isinstance(reader, LocalReaderSettings) and (session.private or recipe.cluster.reader_resources):
            host = reader_host(recipe.cluster, session)
            url = stack.enter_context(serve(reader.model, recipe.cluster.reader_resources, host))
            served = ServedReader(reader.model, url, _weights(reader))
        shared = evaluators(recipe.cluster) if mode == "beside" else []  # trials find them by their names
        alongside = f", {len(shared)} evaluators beside them" if shared else ""
        told(f"{plan.name}: {at_once} trials at once{alongside}; {sweep.where}")
        shared_by_all = {"reader": served and asdict(served), "mode": mode}
        return sweep_on_ray(sweep, space, maker_of(sweep, space), at_once, limits, shared_by_all, told)


def sweep_on_ray(
    sweep: SweepFolder,
    space: Space,
    maker: TrialMaker,
    at_once: int,
    limits: Limits,
    shared: Mapping[str, Any],
    told: Callable[[str], None],
) -> str:
    """Run what is left of a sweep; returns why it ended before its last trial did, or nothing."""
    with StopFlag() as flag, _quiet_tune():
        storage = sweep.path / ".ray"
        shutil.rmtree(storage, ignore_errors=True)
        _again(sweep)
        if not _left(sweep, space):
            return ""
        tuner = _tuner(sweep, space, maker, at_once, shared, storage)
        ended: dict[str, Any] = {}

        def fit() -> None:
            try:
                ended["results"] = tuner.fit()
            except BaseException as error:  # noqa: BLE001 - carried to the main thread, which raises it
                ended["error"] = error

        thread = threading.Thread(target=fit, name="ray-tune-fit", daemon=True)
        with without_ray():
            thread.start()
            screen = _Screen(sweep, space, told)
            while thread.is_alive():
                thread.join(_LOOK_S)
                screen.look()
                if why := (f"stopped by {flag.reason}" if flag else "") or sweep.lost or spent(sweep).over(limits):
                    sweep.ask_to_stop(ALL, why)
        if "error" in ended:
            raise TrainingError(f"Ray Tune ended the sweep: {ended['error']}") from ended["error"]
        for one in ended["results"]:
            if one.error is not None:
                _process_died(sweep, one.config[TRIAL])
        screen.look()
        shutil.rmtree(storage, ignore_errors=True)
        return sweep.asked_to_stop(ALL) if _left(sweep, space) else ""


def _tuner(sweep: SweepFolder, space: Space, maker: TrialMaker, at_once: int, shared: Mapping[str, Any], storage: Path) -> tune.Tuner:
    fixed = {"sweep": str(sweep.path.resolve()), "runs": sweep.run_root, **shared}
    scheduler = scheduler_of(sweep, space)
    done = [one for one in sweep.trials() if one.state in DONE]
    for one in done:
        remember(scheduler, one.name, scores(sweep.run_path(one.name), space.metric))
    in_all = space.search.samples if isinstance(space.search, OptunaSearchSettings) else len(sweep.trials())
    return tune.Tuner(
        tune.with_resources(run_trial, _DRIVER),
        param_space=fixed,
        tune_config=tune.TuneConfig(
            scheduler=scheduler,
            search_alg=_Next(sweep, space, maker, fixed),
            num_samples=max(1, in_all - len(done)),
            max_concurrent_trials=at_once,
        ),
        run_config=tune.RunConfig(
            name="tune", storage_path=str(storage.resolve()), verbose=0, failure_config=tune.FailureConfig(max_failures=_DEATHS)
        ),
    )


class _Next(Searcher):
    """Names the next trial to Tune: one that the sweep has and that is not done, or one that Optuna suggests from the scores by now."""

    def __init__(self, sweep: SweepFolder, space: Space, maker: TrialMaker, fixed: dict[str, Any]) -> None:
        super().__init__()
        self._sweep, self._space, self._maker, self._fixed = sweep, space, maker, fixed
        self._number = 0

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next trial's config, or that there is none."""
        if self._sweep.asked_to_stop(ALL):
            return Searcher.FINISHED
        there = {one.number: one for one in self._sweep.trials()}
        search = self._space.search
        last = search.samples if isinstance(search, OptunaSearchSettings) else max(there)
        while self._number < last:
            self._number += 1
            record = there[self._number] if self._number in there else self._suggested(there.values())
            if record is not None and record.state not in DONE:
                return self._config(record)
        return Searcher.FINISHED

    def _config(self, record: TrialRecord) -> dict[str, Any]:
        return {**self._fixed, TRIAL: record.name}

    def _suggested(self, trials: Iterable[TrialRecord]) -> TrialRecord | None:
        """The suggested trial; None where its recipe is refused, which is a row of the table like any other failure."""
        point, seed = suggest(self._space, self._number, self._known(trials)), self._space.seeds[0]
        try:
            planned = self._maker.planned(self._number, point, seed)
        except StairstepError as error:
            refused = self._maker.refused(self._number, point, seed)
            self._sweep.write_trial(replace(refused, state="failed", reason=str(error)))
            return None
        write_trial(self._sweep, planned)
        return planned.record

    def _known(self, trials: Iterable[TrialRecord]) -> list[Scored]:
        wanted = [(self._space.metric, self._space.mode), *((other.metric, other.mode) for other in self._space.also)]
        found = []
        for one in trials:
            bests = [best_score(self._sweep.run_path(one.name), metric, mode) for metric, mode in wanted]
            if one.state in DONE and all(bests):
                found.append(Scored(one.point, [best[1] for best in bests if best is not None]))
        return found

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Scores are read from the run folders."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing is kept here: what was suggested stands in the sweep's folder."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing was kept."""


class _Screen:
    """What a person sees of a sweep while it runs: a line when a trial begins, scores or ends."""

    def __init__(self, sweep: SweepFolder, space: Space, told: Callable[[str], None]) -> None:
        self._sweep, self._space, self._told = sweep, space, told
        self._seen: dict[str, tuple[str, int]] = {one.name: (one.state, len(self._scores(one))) for one in sweep.trials()}

    def look(self) -> None:
        """Tell what is new."""
        trials = self._sweep.trials()
        for one in trials:
            state, count = self._seen.get(one.name, ("waiting", 0))
            found = self._scores(one)
            for step in sorted(found)[count:]:
                self._told(f"{one.name}: step {step}, {self._space.metric} {found[step]:.3f} on the selection split")
            if one.state != state:
                done = sum(other.state in (*DONE, "failed") for other in trials)
                self._told(f"{one.name}: {_state_line(one)} ({done} of {len(trials)} trials done)")
            self._seen[one.name] = (one.state, len(found))

    def _scores(self, trial: TrialRecord) -> dict[int, float]:
        return scores(self._sweep.run_path(trial.name), self._space.metric)


def _check_on_head(sweep: SweepFolder) -> None:
    """The trials' own processes run on the head, and share the copy that this one works on."""
    here = ray.get_runtime_context().get_node_id()
    if not any(one["NodeID"] == here and HEAD in one["Resources"] for one in ray.nodes()):
        raise InputError(
            f"{sweep.where}: a sweep in an object store is worked on in a copy on its driver's machine, which has to be the head of the "
            "cluster; submit the job without --entrypoint-num-cpus, --entrypoint-num-gpus and --entrypoint-resources"
        )


def _weights(reader: LocalReaderSettings) -> str:
    """Which weights a local reader has, in sixteen letters."""
    from stairstep.models.digest import folder_identity, of_json

    return of_json(folder_identity(locate(reader.model, None, "evaluation.reader.model").folder))[:16]


def _state_line(trial: TrialRecord) -> str:
    reason = f": {trial.reason}" if trial.reason else ""
    at = f" at step {trial.stopped_at}" if trial.stopped_at is not None else ""
    return f"{'stopped early' if trial.state == 'stopped' else trial.state}{at}{reason}"


def _again(sweep: SweepFolder) -> None:
    """Trials whose process died with the sweep, or that failed, are to be tried (again)."""
    for one in sweep.trials():
        if one.state in ("running", "failed") and sweep.recipe_path(one.name).exists():  # a suggestion that was refused has none
            sweep.write_trial(replace(one, state="waiting", reason=""))


def _process_died(sweep: SweepFolder, name: str) -> None:
    record = sweep.trial(name)
    if record.state in ("running", "waiting"):
        sweep.write_trial(replace(record, state="failed", reason=f"its process died {_DEATHS + 1} times; Ray's own logs may say why"))


def _left(sweep: SweepFolder, space: Space) -> bool:
    """Whether a trial waits, or is still to be suggested."""
    trials = sweep.trials()
    missing = isinstance(space.search, OptunaSearchSettings) and len(trials) < space.search.samples
    return missing or any(one.state not in (*DONE, "failed") for one in trials)


@contextmanager
def _quiet_tune() -> Iterator[None]:
    """Tune writes no files of its own beside the sweep's and no table on the screen; what a person has set in the environment stays."""
    wanted = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "RAY_AIR_NEW_OUTPUT": "0",  # the newer output frames every experiment, asked or not
        "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths in a recipe mean the same everywhere
    }
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    level = logging.getLogger("ray.tune").level
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger("ray.tune").setLevel(level)
        for name in added:
            del os.environ[name]

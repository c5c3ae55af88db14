"""Training under Ray Train: the very loop of `tasks.run`, on N workers whose process group Ray has set up.

Ray places and restarts workers and is told metrics; checkpoints belong to the run folder, from which a restarted group goes on. `fit()`
runs off the main thread, so that Ctrl-C and SIGTERM reach our stop flag: it becomes a file in the run folder, which the first worker reads
at the end of a step and all workers agree on. An error that a retry cannot mend is written down: a restarted group returns it at once.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train import report as ray_report
from ray.train.torch import TorchConfig, TorchTrainer

from stairstep.objectives import ProcessGroup
from stairstep.records import RunFolder, StopFlag, logging_setup, read_json, write_json
from stairstep.settings import StairstepError, TrainingError, UnreachableError, build, from_plain, to_plain
from stairstep.settings import errors as project_errors
from stairstep.tasks import Recipe
from stairstep.tasks.resolve import run_folder_path
from stairstep.tasks.run import Finished, open_run, train
from stairstep.training import Outcome

_LOG = logging.getLogger(__name__)
_COLLECTIVE_TIMEOUT_S = 2 * 3600  # the others wait while the first worker evaluates
_POLL_S = 0.2


def train_recipe(recipe: Recipe) -> Finished:
    """Train a resolved recipe: in this process with `cluster.workers: 0`, else under Ray Train."""
    if recipe.cluster.workers == 0:
        with StopFlag() as flag:
            return train(recipe, stop=lambda: bool(flag))
    return train_on_ray(recipe)


def start_ray(recipe: Recipe) -> None:
    """Connect to the recipe's cluster, or to the one that this runs on; without either, start one here."""
    if ray.is_initialized():
        return
    try:
        ray.init(address=recipe.cluster.address, log_to_driver=True, logging_level=logging.WARNING)
    except ConnectionError as error:
        raise UnreachableError(f"cluster.address: no Ray cluster answers ({error}); start one, or leave cluster.address out") from None


def train_on_ray(recipe: Recipe) -> Finished:
    """Train under Ray Train; returns when the run has finished or was stopped with a checkpoint."""
    root = Path(os.path.abspath(recipe.run.root))
    recipe = replace(recipe, run=replace(recipe.run, root=str(root)))
    path = run_folder_path(recipe)
    folder = RunFolder.create(path)
    with folder.claim():
        open_run(folder, recipe)
    recipe = replace(recipe, run=replace(recipe.run, resume="auto"))
    start_ray(recipe)
    attempt = uuid.uuid4().hex[:12]
    storage = root / ".ray"
    trainer = _trainer(recipe, f"{recipe.run.name}-{attempt}", storage, attempt)
    try:
        with StopFlag() as flag:
            value = _fit(trainer, flag, path / "stop")
    except StairstepError:
        _raise_failure(path, attempt)
        raise
    finally:
        shutil.rmtree(storage / f"{recipe.run.name}-{attempt}", ignore_errors=True)
        (path / "stop").unlink(missing_ok=True)
    _raise_failure(path, attempt)
    return Finished(Outcome(**value), path)


def _trainer(recipe: Recipe, name: str, storage: Path, attempt: str) -> TorchTrainer:
    cluster = recipe.cluster
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # it would show every progress line twice
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(cluster.start_timeout_s))
    gpu = cluster.device == "cuda" or (cluster.device == "auto" and ray.cluster_resources().get("GPU", 0) >= 1)
    resources = {"CPU": cluster.cpus_per_worker, **({"GPU": 1.0} if gpu else {}), **cluster.resources}
    return TorchTrainer(
        work,
        train_loop_config={"recipe": to_plain(recipe), "attempt": attempt},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=_COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(num_workers=cluster.workers, use_gpu=gpu, resources_per_worker=resources),
        run_config=RunConfig(
            name=name,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=cluster.max_failures, controller_failure_limit=1),
        ),
    )


def _fit(trainer: TorchTrainer, flag: StopFlag, stop_file: Path) -> dict[str, Any]:
    """Run `fit()` beside the main thread, which passes a stop request on."""
    ended: dict[str, Any] = {}

    def fit() -> None:
        try:
            ended["value"] = trainer.fit().return_value
        except BaseException as error:  # noqa: BLE001 - carried to the main thread, which raises it
            ended["error"] = error

    thread = threading.Thread(target=fit, name="ray-train-fit", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_S)
        if flag and not stop_file.exists() and thread.is_alive():
            stop_file.write_text(flag.reason, encoding="utf-8")
    if "error" in ended:
        raise _told(ended["error"])
    return ended["value"]


def _told(error: BaseException) -> BaseException:
    """Ray's error as one message of ours, where it is a failure of the run and not of this code."""
    if isinstance(error, ray.train.WorkerGroupError):
        rank, cause = next(iter(sorted(error.worker_failures.items())))
        return TrainingError(f"worker {rank} failed and its restarts are used up (cluster.max_failures): {_last_line(cause)}")
    if isinstance(error, ray.train.ControllerError):
        return UnreachableError(f"Ray could not start the workers: {_last_line(error)}; compare cluster.workers with `ray status`")
    return error


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def work(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What each worker runs: the loop of `tasks.run` over Ray's process group."""
    recipe = build(Recipe, from_plain(config["recipe"], "recipe"))
    path = run_folder_path(recipe)
    if _failure(path, config["attempt"]) is not None:
        return None
    workers = ProcessGroup()
    logging_setup(rank=workers.rank)
    logging.getLogger("ray.train").setLevel(logging.WARNING)

    def reported(step: int, values: Mapping[str, float]) -> None:
        ray_report({"step": step, "run_folder": str(path), "time": time.time(), **values})

    try:
        return asdict(train(recipe, workers, reported=reported).outcome)
    except StairstepError as error:
        write_json(path / "failure.json", {"attempt": config["attempt"], "kind": type(error).__name__, "message": str(error)})
        raise


def _failure(path: Path, attempt: str) -> StairstepError | None:
    """The error that ended this attempt, if one did that a restart cannot mend."""
    file = path / "failure.json"
    if not file.exists():
        return None
    plain = read_json(file)
    if plain["attempt"] != attempt:
        return None
    kind = getattr(project_errors, plain["kind"], TrainingError)
    return kind(plain["message"])


def _raise_failure(path: Path, attempt: str) -> None:
    error = _failure(path, attempt)
    if error is not None:
        raise error

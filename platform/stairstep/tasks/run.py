"""A run from its recipe to its folder: opening or resuming it, the journal that the step loop writes to, and how it ends.

The same function trains in one process and as one of several workers: the first worker owns the run folder, all read it. Checkpoints
are complete or absent; the metric log is cut back to the last of them at a resume.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file

from stairstep.evaluation.question_set import open_store
from stairstep.models.computing import compute_with
from stairstep.models.load import load_encoder
from stairstep.objectives import Alone, Collective
from stairstep.records import NoTracker, Progress, RunFolder, Tracker, is_volatile, open_trackers, write_json
from stairstep.records.gpu import gpu_use, shown_gpu
from stairstep.records.places import PATIENCE_S
from stairstep.records.reading import Reading, shown_reading
from stairstep.records.stalls import StallWatch, stall_path
from stairstep.settings import InputError, RecipeError, to_plain
from stairstep.training import Cadence, EvaluationReport, NonFiniteError, Outcome, Task, Trainer

from .besides import beside_of
from .loading import load_rows, tile_reader
from .opening import Finished, open_run
from .packed import open_archives
from .placing import open_placed, run_place
from .recipe import Recipe, RetrievalTaskSettings
from .retrieval import RetrievalTask
from .tile_check import QUARANTINE, check_tiles

_LOG = logging.getLogger(__name__)
_LOOK_S = 0.2
TRAINER_TENSORS = "trainer.safetensors"
TRAINER_RECORD = "trainer.json"


class RunTask(Task, Protocol):
    """A task as a run needs it: one that can be kept, taken back and put away."""

    def write_results(self, folder: Path, step: int) -> list[str]:
        """Write the rows of the last evaluation; returns what a person should read of it."""

    def save(self, folder: Path) -> None:
        """Everything that is trained."""

    def load(self, folder: Path) -> None:
        """Take back what `save` wrote."""

    def close(self) -> None:
        """Stop what works in the background."""


class Listener(Protocol):
    """Who is told in the first worker, or in the evaluator, what a run does at the moment that it does it."""

    def logged(self, step: int, values: Mapping[str, float]) -> None:
        """An event of the metric log."""

    def reading(self, one: Reading) -> None:
        """How far the questions of an evaluation are answered."""


class Nobody:
    """Listens to nothing."""

    def logged(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def reading(self, one: Reading) -> None:
        """Nothing."""


class RunJournal:
    """The step loop's journal: the first worker writes, the others keep step with it."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        task: RunTask,
        collective: Collective,
        stop: Callable[[], bool],
        reported: Callable[[int, Mapping[str, float]], None],
        listener: Listener,
    ) -> None:
        self.recipe, self.folder, self.task, self.collective = recipe, folder, task, collective
        self.first = collective.rank == 0
        self.trainer: Trainer | None = None
        self.tracker: Tracker = NoTracker()
        self.progress = Progress(recipe.optim.steps, enabled=False)
        self.watch = StallWatch(stall_path(folder.path, collective.rank), recipe.run.stalled_after_s, self.first, folder.offer)
        self._stop, self._reported, self._listener = stop, reported, listener
        self._looks: dict[str, float] = {}
        self._notes: list[str] = []
        self._beside = beside_of(folder)
        self._at = 0  # the step that is being evaluated

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append an event; what is measured and not trained may come twice after a resume, and is kept once."""
        self.watch.beat()
        trained = "train/loss" in values
        if not trained:
            self._looks |= {name: value for name, value in values.items() if not is_volatile(name)}
        if not self.first:
            return
        self._listener.logged(step, values)
        if trained:
            self.folder.metrics.append(step, values)
            self.tracker.log(step, values)
            self.folder.heartbeat(step, "running")
            phase = "" if self.trainer is None else self.trainer.phases.name(step)
            self.progress.update(step, {**values, "lr": values.get("rate/llm", 0.0)}, phase)
        elif self.folder.metrics.append_once(step, values):
            self.tracker.log(step, values)
            if any(name.startswith("validation/") for name in values):
                self.progress.note(_line(step, values))

    def checkpoint(self, step: int) -> None:
        """Write weights (averaged ones where there are), trainer state and, last of all, the marker."""
        assert self.trainer is not None
        if self.first:
            tensors, record = self.trainer.state()
            with self.folder.new_checkpoint(step) as place:
                with self.trainer.averaged.in_place():
                    self.task.save(place)
                save_file({name: one.detach().cpu().contiguous() for name, one in tensors.items()}, place / TRAINER_TENSORS)
                write_json(place / TRAINER_RECORD, record)
            self.tracker.commit(step)
            self._prune(step)
        self.collective.barrier()
        self.watch.beat()
        self._reported(step, {"checkpoint": float(step)})

    def recall(self, step: int) -> bool:
        """The weights of a step, as its checkpoint has them."""
        place = self.folder.checkpoint_path(step)
        if self.first and self.collective.size > 1:
            self.folder.share()
        self.collective.barrier()
        if not self.folder.bring(place.name):
            _LOG.warning("step %d: it was evaluated before or its checkpoint was deleted; it is not evaluated again", step)
            return False
        self.task.load(place)
        return True

    def evaluating(self, step: int) -> None:
        """Say so in the status."""
        self._at = step
        if self.first:
            self.folder.set_status("evaluating", step, self.recipe.optim.steps)

    def reading(self, one: Reading) -> None:
        """Answers come in: the run lives."""
        self.watch.beat()
        self.folder.heartbeat(one.step, "evaluating")
        self.progress.tick(f"{one.name} at step {one.step}: {one.done} of {one.of} questions done")
        self._listener.reading(one)

    def embedding(self, what: str, done: int, of: int) -> None:
        """An evaluation embeds: the run lives."""
        self.watch.beat()
        self.folder.heartbeat(self._at, "evaluating")
        self.progress.tick(f"evaluating step {self._at}: {done} of {of} {what}")

    def hand_over(self, steps: Sequence[int]) -> list[int]:
        """Ask for the evaluation of checkpoints; a step that was evaluated is not asked for, one whose checkpoint is gone is dropped."""
        kept = torch.zeros(len(steps), dtype=torch.float64)
        if self.first:
            for place, step in enumerate(steps):
                kept[place] = float(self._beside.want(step))
        self.collective.sum_([kept])
        return [step for step, one in zip(steps, kept.tolist(), strict=True) if one]

    def arrived(self, step: int, wait: bool) -> EvaluationReport | None:
        """What an evaluator has found of a step; waits for it, if told to, until a stop is asked for."""
        found = None
        while self.first and (found := self._beside.found(step)) is None and wait and not self.stop_requested():
            self.progress.tick(f"waiting for the evaluation of step {step}")
            if not self._beside.hangs(step):  # else the run's own silence says so
                self.folder.heartbeat(self._step(), "evaluating")
                self.watch.beat()
            time.sleep(_LOOK_S)
        selection = found.selection if found is not None else None
        told = torch.tensor([float(found is not None), selection or 0.0, float(selection is not None)], dtype=torch.float64)
        self.collective.sum_([told])
        there, score, known = told.tolist()
        if found is not None:
            self._notes = list(found.notes)
        return EvaluationReport(found.metrics if found is not None else {}, score if known else None) if there else None

    def evaluated(self, step: int, best_step: int | None) -> None:
        """Write rows and summaries, unless an evaluator has; checkpoints beyond the newest and the best go."""
        self.watch.beat()
        if self.first:
            apart = self.recipe.evaluation.mode == "beside"
            for text in self._notes if apart else self.task.write_results(self.folder.path, step):
                self.progress.note(text)
            self._prune(step)
            self.folder.set_status("running", self._step(), self.recipe.optim.steps)
        self._reported(step, dict(self._looks))
        self._looks = {}

    def stop_requested(self) -> bool:
        """Asked by a signal, or by a file `stop` in the run folder that reaches workers on other machines."""
        return self._stop() or (self.first and (self.folder.path / "stop").exists())

    def besides(self) -> str:
        """What a progress line says besides training's own figures: the GPU, evaluations beside training, the reader."""
        steps = self._beside.open()
        evaluations = f"evaluations open: {', '.join(map(str, steps))}" if steps else ""
        return ", ".join(one for one in (shown_gpu(gpu_use()), evaluations, shown_reading(self.folder.reading)) if one)

    def _step(self) -> int:
        assert self.trainer is not None
        return self.trainer.progress.step

    def _prune(self, step: int) -> None:
        assert self.trainer is not None
        keep, best_step = self.recipe.checkpoints, self.trainer.progress.best_step  # the trainer's own, which a resume restores
        best = {best_step} if keep.keep_best and best_step is not None else set()
        self.folder.prune(keep.keep, {step, *best, *self.trainer.waiting})


def train(
    recipe: Recipe,
    collective: Collective | None = None,
    stop: Callable[[], bool] = lambda: False,
    reported: Callable[[int, Mapping[str, float]], None] = lambda step, values: None,
    console: bool = True,
    listener: Listener | None = None,
) -> Finished:
    """Train a resolved recipe, or go on with its run; every worker calls this."""
    listener = listener or Nobody()
    workers = collective or Alone()
    compute_with(recipe.run.threads)
    first = workers.rank == 0
    folder = open_placed(recipe, workers.rank, PATIENCE_S if collective is not None else 0.0)  # a person who is there is told at once
    claim = folder.claim() if first else None
    try:
        if first:
            folder.write_environment(from_step=open_run(folder, recipe, asked_anew=collective is None))
        workers.barrier()
        if not first:
            folder.catch_up()
        with _failure_in_status(folder if first else None):
            task = build_task(recipe, workers, folder)
            journal = RunJournal(recipe, folder, task, workers, stop, reported, listener)
            if isinstance(task, RetrievalTask):
                task.answering.reading, task.embedding = folder.reading_file(journal.reading), journal.embedding
            evaluation = recipe.evaluation
            beside = evaluation.max_pending if evaluation.mode == "beside" else 0
            cadence = Cadence(evaluation.loss_every, evaluation.every, recipe.checkpoints.every, evaluation.mode == "after", beside)
            journal.trainer = trainer = Trainer(task, recipe.optim, recipe.phases, cadence, journal, workers)
            checkpoints = folder.checkpoints()
            if checkpoints:
                _restore(trainer, task, checkpoints[-1].path)
                _LOG.info("going on from %s", checkpoints[-1].path)
            outcome = _run(recipe, folder, journal, trainer, task, console and first)
        return Finished(outcome, folder.path, run_place(recipe))
    finally:
        if claim is not None:
            claim.release()


@contextmanager
def _failure_in_status(folder: RunFolder | None) -> Iterator[None]:
    """Leave why a run failed where `status.json` is read; None: another worker does."""
    try:
        yield
    except BaseException as error:
        if folder is not None:
            folder.set_status("failed", message=str(error) or type(error).__name__)
        raise


def _run(recipe: Recipe, folder: RunFolder, journal: RunJournal, trainer: Trainer, task: RunTask, console: bool) -> Outcome:
    outcome: Outcome | None = None
    try:
        if journal.first:
            journal.tracker = open_trackers(recipe.trackers, folder, to_plain(recipe))
            journal.progress = Progress(recipe.optim.steps, trainer.progress.step, enabled=console, besides=journal.besides)
        with journal.watch:
            outcome = trainer.run()
        if journal.first:
            journal.tracker.commit(outcome.step)
            folder.set_status("stopped" if outcome.reason == "stopped" else "finished", outcome.step, message=outcome.reason)
        return outcome
    except NonFiniteError as error:
        if journal.first:
            write_json(folder.path / "not_finite.json", {"step": error.step, "rows": list(error.rows)})
        raise
    finally:
        task.close()
        journal.progress.close()
        journal.tracker.close(failed=outcome is None)


def _restore(trainer: Trainer, task: RunTask, checkpoint: Path) -> None:
    task.load(checkpoint)
    record = json.loads((checkpoint / TRAINER_RECORD).read_text(encoding="utf-8"))
    trainer.load(load_file(checkpoint / TRAINER_TENSORS), record)


def device_of(recipe: Recipe) -> torch.device:
    """Where this process computes."""
    if recipe.cluster.device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "cluster.device: cuda was asked for, but torch sees no GPU here; start it where there is one, or, for a model as small as the"
            " tiny ones, say cluster.device=auto, which takes the CPU"
        )
    if recipe.cluster.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def build_task(recipe: Recipe, collective: Collective, folder: RunFolder) -> RunTask:
    """The recipe's task, whatever its kind."""
    if isinstance(recipe.task, RetrievalTaskSettings):
        return _retrieval_task(recipe, collective, folder)
    from .pretraining.build import pretraining_task

    return pretraining_task(recipe, device_of(recipe))


def _retrieval_task(recipe: Recipe, collective: Collective, folder: RunFolder) -> RetrievalTask:
    """The task with its rows, encoder and checked tiles; logs the counts by which a person checks the setup."""
    if recipe.model.adapter is None and recipe.optim.steps:
        raise RecipeError(
            "model.adapter: it is null, so there is nothing to train; leave the key out, or measure the bare base with "
            "python -m jobs.evaluate RECIPE --base"
        )
    archives = open_archives(recipe, folder.heartbeat) if collective.rank == 0 else None
    collective.barrier()  # the first worker indexes what is new, the others find it
    if archives is None:
        archives = open_archives(recipe)
    rows, reader = load_rows(recipe, archives), tile_reader(recipe, archives)
    encoder = load_encoder(recipe.model, device_of(recipe), trainable=True, seed=recipe.run.seed)
    begun = bool(folder.checkpoints())
    shared: Callable[[], object] = partial(folder.bring, QUARANTINE) if collective.rank else folder.share
    rows = check_tiles(rows, recipe, reader, folder.path / QUARANTINE, collective, begun, folder.heartbeat, shared)
    store = open_store(recipe.evaluation, recipe.run.root) if collective.rank == 0 else None
    return RetrievalTask(recipe, encoder, rows, reader, collective, store)


def _line(step: int, values: Mapping[str, Any]) -> str:
    return f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items())

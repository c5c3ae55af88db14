"""Who evaluates beside training: a process that keeps the base model and takes one run's weights after the other's.

It computes what the run itself would have computed while training waited: the same rows, the same code, the weights of the checkpoint.
A run may take its wish back at any time: then nothing more is asked for it, and nothing is written.
"""

from __future__ import annotations

import gc
import glob
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stairstep.evaluation.question_set import open_store
from stairstep.models.computing import compute_with
from stairstep.models.encoder import Encoder
from stairstep.models.load import load_encoder
from stairstep.models.settings import ModelSettings
from stairstep.objectives import Alone
from stairstep.records import RunFolder
from stairstep.records.files import host_name, process_is_alive
from stairstep.records.followed import FollowedRunFolder
from stairstep.records.places import ObjectFolder
from stairstep.records.reading import READING, Reading
from stairstep.records.stalls import StallWatch
from stairstep.settings import InputError, build, from_plain

from .beside import Beside, Found
from .besides import beside_of
from .loading import load_measured_rows, tile_reader
from .packed import open_archives
from .placing import local_root, run_place
from .recipe import Recipe
from .resolve import have_world
from .retrieval import RetrievalTask
from .run import Listener, Nobody, device_of
from .tile_check import QUARANTINE, read_quarantine, without

_LOG = logging.getLogger(__name__)
_LOOK_S = 5.0  # between two looks whether what is embedded for is still wanted


class _Withdrawn(Exception):
    """The run has taken its wish back meanwhile."""


class Evaluator:
    """Evaluates checkpoints of any run; what two of them share is loaded once."""

    def __init__(self, listener: Callable[[Recipe], Listener] = lambda recipe: Nobody()) -> None:
        self._listener = listener  # of a recipe's run
        self._model: tuple[ModelSettings, Encoder] | None = None
        self._run: tuple[Recipe, RetrievalTask] | None = None

    def evaluate(self, plain: Mapping[str, Any], step: int) -> None:
        """Evaluate a step of the run of a (plain, resolved) recipe, and tell the run; nothing is done where that is not wanted any more."""
        recipe = build(Recipe, from_plain(plain, "recipe"))
        compute_with(recipe.run.threads)
        folder = self._placed(recipe)
        beside = beside_of(folder)
        if folder.holds_run() and not beside.wants(step):  # a folder that is not seen here at all is an error, which what follows tells
            return
        beside.alive(step)
        stacks = beside.stacks(step)
        with StallWatch(stacks, recipe.run.stalled_after_s, tell=False, left=folder.offer) as watch:  # the run's driver tells it
            try:
                self._evaluate(recipe, folder, beside, step, watch)
            except _Withdrawn:
                _LOG.info("%s: step %d is not wanted any more; its evaluation ends here", folder.where, step)

    def _evaluate(self, recipe: Recipe, folder: RunFolder, beside: Beside, step: int, watch: StallWatch) -> None:
        listener, looked = self._listener(recipe), time.monotonic()

        def lives() -> None:
            nonlocal looked
            looked = time.monotonic()
            if not beside.alive(step):
                raise _Withdrawn

        def embedding(what: str, done: int, of: int) -> None:
            watch.beat()
            if time.monotonic() - looked >= _LOOK_S:  # of a file that is shared, and it is told of every tile
                lives()

        def reading(one: Reading) -> None:
            watch.beat()
            lives()
            folder.offer(READING)
            listener.reading(one)

        task = self._task(recipe, folder)
        checkpoint = folder.checkpoint_path(step)
        if not folder.bring(checkpoint.name):
            if not beside.wants(step):
                raise _Withdrawn  # while the model was loaded
            raise InputError(f"{folder.where}: the checkpoint of step {step}, which is to be evaluated, is not there")
        task.load(checkpoint)
        watch.beat()
        task.answering.reading, task.embedding = folder.reading_file(reading), embedding
        report = task.evaluate(step)
        if not beside.wants(step):
            raise _Withdrawn
        with folder.results(step) as place:
            notes = task.write_results(place, step)
        if not beside.wants(step):  # a store may have kept the rows waiting
            raise _Withdrawn
        beside.write(step, Found(report.metrics, report.selection, tuple(notes)))

    def _task(self, recipe: Recipe, folder: RunFolder) -> RetrievalTask:
        if self._run is None or self._run[0] != recipe:
            self._drop_task()
            have_world(recipe)
            archives = open_archives(recipe)
            rows, reader = load_measured_rows(recipe, archives), tile_reader(recipe, archives)
            folder.bring(QUARANTINE)
            rows = without({Path(one.tile) for one in read_quarantine(folder.path / QUARANTINE)}, rows)  # as the run found them
            store = open_store(recipe.evaluation, recipe.run.root)
            self._run = recipe, RetrievalTask(recipe, self._encoder(recipe), rows, reader, Alone(), store)
        return self._run[1]

    def _placed(self, recipe: Recipe) -> RunFolder:
        """The run's folder, or one of this process for what it needs of a run in an object store, empty."""
        remote = run_place(recipe)
        if not isinstance(remote, ObjectFolder):
            return RunFolder(remote)
        parent = local_root(recipe) / ".evaluators"
        ours = f"{remote.name}@{host_name()}-"  # a cache may be of several nodes
        for left in parent.glob(f"{glob.escape(ours)}*"):  # of evaluators that were killed
            if not process_is_alive(int(left.name.removeprefix(ours))):
                shutil.rmtree(left, ignore_errors=True)
        folder = FollowedRunFolder(parent / f"{ours}{os.getpid()}", remote)
        folder.empty()
        return folder

    def _drop_task(self) -> None:
        if self._run is not None:
            self._run[1].close()
        self._run = None

    def _encoder(self, recipe: Recipe) -> Encoder:
        if self._model is None or self._model[0] != recipe.model:
            self._model = None
            gc.collect()  # two models need not fit, and what belongs to one refers to itself in circles
            self._model = recipe.model, load_encoder(recipe.model, device_of(recipe), trainable=True, seed=recipe.run.seed)
        return self._model[1]

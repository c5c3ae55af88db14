"""Who evaluates beside training: a process that keeps the base model and takes one run's weights after the other's.

It computes what the run itself would have computed while training waited: the same rows, the same code, the weights of the checkpoint.
"""

from __future__ import annotations

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
from stairstep.settings import build, from_plain

from .beside import Beside, Found
from .loading import load_measured_rows, tile_reader
from .packed import open_archives
from .recipe import Recipe
from .resolve import run_folder_path
from .retrieval import RetrievalTask
from .run import Listener, Nobody, device_of
from .tile_check import QUARANTINE, read_quarantine, without


class Evaluator:
    """Evaluates checkpoints of any run; what two of them share is loaded once."""

    def __init__(self, listener: Callable[[Path], Listener] = lambda run: Nobody()) -> None:
        self._listener = listener  # of a run, by its folder
        self._model: tuple[ModelSettings, Encoder] | None = None
        self._run: tuple[Recipe, RetrievalTask] | None = None

    def evaluate(self, plain: Mapping[str, Any], step: int) -> None:
        """Evaluate a step of the run of a (plain, resolved) recipe, and tell the run."""
        recipe = build(Recipe, from_plain(plain, "recipe"))
        compute_with(recipe.run.threads)
        folder = RunFolder(run_folder_path(recipe))
        task = self._task(recipe, folder)
        task.load(folder.checkpoint_path(step))
        task.answering.reading = folder.reading_file(self._listener(folder.path).reading)
        report = task.evaluate(step)
        notes = task.write_results(folder.path, step)
        Beside(folder).write(step, Found(report.metrics, report.selection, tuple(notes)))

    def _task(self, recipe: Recipe, folder: RunFolder) -> RetrievalTask:
        if self._run is None or self._run[0] != recipe:
            archives = open_archives(recipe)
            rows, reader = load_measured_rows(recipe, archives), tile_reader(recipe, archives)
            rows = without({Path(one.tile) for one in read_quarantine(folder.path / QUARANTINE)}, rows)  # as the run found them
            store = open_store(recipe.evaluation, recipe.run.root)
            self._run = recipe, RetrievalTask(recipe, self._encoder(recipe), rows, reader, Alone(), store)
        return self._run[1]

    def _encoder(self, recipe: Recipe) -> Encoder:
        if self._model is None or self._model[0] != recipe.model:
            self._model = None  # two models need not fit
            self._model = recipe.model, load_encoder(recipe.model, device_of(recipe), trainable=True, seed=recipe.run.seed)
        return self._model[1]

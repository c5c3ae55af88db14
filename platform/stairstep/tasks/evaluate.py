"""Measuring an encoder state by itself, outside any training: the base, an adapter, or a run's checkpoint."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from stairstep.evaluation.question_set import RetrievalResult, open_store, write_result
from stairstep.models.computing import compute_with
from stairstep.models.load import load_encoder
from stairstep.objectives import Alone
from stairstep.records.followed import put_results
from stairstep.records.places import ObjectFolder, place
from stairstep.settings import InputError, RecipeError

from .loading import load_measured_rows, tile_reader
from .packed import open_archives
from .placing import local_root
from .recipe import Recipe
from .retrieval import RetrievalTask
from .run import device_of
from .tile_check import QUARANTINE, check_tiles

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_LONGEST_NAME = 80


@dataclass(frozen=True)
class Measured:
    """What was measured, its results and where they lie."""

    what: str
    results: list[RetrievalResult]
    folder: Path | ObjectFolder


def evaluate(recipe: Recipe, base: bool = False, checkpoint: Path | None = None, fresh: bool = False) -> Measured:
    """Evaluate a resolved recipe's base, a checkpoint folder, or (neither given) the adapter that the recipe starts from; `fresh` asks
    reader and grader whatever the ledger holds."""
    compute_with(recipe.run.threads)
    what, start, step = _subject(recipe, base, checkpoint)
    if not recipe.evaluation.sets and not recipe.evaluation.pairs:
        raise RecipeError("the recipe names nothing to evaluate on; add evaluation.sets or evaluation.pairs")
    archives = open_archives(recipe)
    rows, reader = load_measured_rows(recipe, archives), tile_reader(recipe, archives)
    encoder = load_encoder(replace(recipe.model, start=start), device_of(recipe), trainable=False)
    folder = _results_folder(recipe, what)
    rows = check_tiles(rows, recipe, reader, folder / QUARANTINE, Alone())
    task = RetrievalTask(recipe, encoder, rows, reader, Alone(), open_store(recipe.evaluation, recipe.run.root), fresh)
    results = task.evaluate_sets()
    for number, result in enumerate(results):
        write_result(folder, step, result, primary=number == 0 and bool(rows.question_sets))
    root = place(recipe.run.root)
    if not isinstance(root, ObjectFolder):
        return Measured(what, results, folder)
    put_results(folder, root / folder.parent.name / folder.name)
    return Measured(what, results, root / folder.parent.name / folder.name)


def _results_folder(recipe: Recipe, what: str) -> Path:
    """Where results go, made before anything is computed for them."""
    folder = local_root(recipe) / "evaluations" / f"{recipe.run.name}-{what}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        raise InputError(f"{folder}: this folder for the results cannot be made: {error.strerror}; choose another run.root") from None
    if not writable:
        raise InputError(f"{folder}: results cannot be written to this folder; choose another run.root, or change its permissions")
    return folder


def _subject(recipe: Recipe, base: bool, checkpoint: Path | None) -> tuple[str, str | None, int]:
    """The name of what is measured, its adapter folder and its step; what differs has different names, for results lie under them."""
    if checkpoint is None and (base or recipe.model.start is None):
        return "base", None, 0
    if checkpoint is None:
        assert recipe.model.start is not None
        return re.sub(r"[^\w.-]+", "-", recipe.model.start).strip("-")[-_LONGEST_NAME:], recipe.model.start, 0
    if not checkpoint.is_dir():
        raise InputError(f"{checkpoint}: there is no such checkpoint folder; expected one like runs/<name>/checkpoint-50")
    there = checkpoint.resolve()
    named = _CHECKPOINT.fullmatch(there.name)
    of_this_run = there.parent == (local_root(recipe) / str(recipe.run.name)).resolve()
    return there.name if of_this_run else f"{there.parent.name}-{there.name}", str(checkpoint), int(named[1]) if named else 0

"""A climb from recipe to recipe: each trained with several seeds, each compared with the one before over the same questions.

Whoever calls says how a recipe is trained, with Ray or without; finished runs are kept, so a climb that is asked for again only compares.
All steps and the whole climb are one family: their p-values are corrected together. The last step of a run is compared, never a picked
one, so all questions count. A climb asks R@1 and, where a reader answered, QA; each further metric would raise the bar for these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from stairstep.evaluation.comparison import Compared, Comparison, compare_family
from stairstep.evaluation.evaluated import Side, read_evaluated
from stairstep.records import RunFolder
from stairstep.records.copies import copy_to_read
from stairstep.records.places import ObjectFolder
from stairstep.records.resume import check_same_recipe
from stairstep.settings import InputError, to_plain

from .opening import Finished, outcome_line, with_world_here
from .placing import run_place
from .recipe import Recipe, load_recipe
from .resolve import resolve

METRICS = ("hit@1",)


def climb(
    paths: Sequence[Path],
    seeds: Sequence[int],
    overrides: Sequence[str],
    train: Callable[[Recipe], Finished],
    told: Callable[[str], None],
) -> list[Compared] | None:
    """Train what is not trained yet, then compare every step and, last, the whole climb; None if a run was asked to stop."""
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        raise InputError(f"two recipes have one file name ({', '.join(names)}); a run is named by its recipe's file")
    if len(set(seeds)) < len(seeds):
        raise InputError(f"seeds {', '.join(map(str, seeds))}: a seed stands there twice; the same run twice is no second seed")
    sides: list[Side] = []
    for path in paths:
        runs = []
        for seed in seeds:
            found = _trained(path, seed, overrides, train, told)
            if found is None:
                return None
            runs.append(found)
        sides = sides or [Side("base", [read_evaluated(runs[0][0].path, 0)])]
        sides.append(Side(path.stem, [read_evaluated(folder.path, step) for folder, step in runs]))
    pairs = list(pairwise(sides))
    if len(names) > 1:
        pairs.append((sides[0], sides[-1]))
    return compare_family(pairs, METRICS)


def plain(compared: Compared) -> dict[str, Any]:
    """Two compared recipes as JSON."""
    return {
        "before": compared.first,
        "after": compared.second,
        "metrics": [_plain(one) for one in compared.comparisons],
        "left_out": list(compared.left_out),
        "caveat": compared.caveat,
        "family": compared.family,
    }


def _trained(
    path: Path, seed: int, overrides: Sequence[str], train: Callable[[Recipe], Finished], told: Callable[[str], None]
) -> tuple[RunFolder, int] | None:
    """A recipe's run with one seed and its last step; None if it was asked to stop before that."""
    recipe = resolve(load_recipe(path, [f"run.name={path.stem}-seed{seed}", f"run.seed={seed}", *overrides]))
    if not recipe.evaluation.sets:
        raise InputError(f"{path}: evaluation.sets is empty; a climb compares answers to questions, name a question set")
    where = run_place(recipe)
    folder = _to_read(where)
    status = folder.status if folder is not None else None
    if folder is not None and status is not None and status.state == "finished":
        check_same_recipe(folder.path, with_world_here(folder.recipe(), recipe), to_plain(recipe))
        told(f"{path.stem}, seed {seed}: finished before; {where}")
        return folder, status.step
    finished = train(recipe)
    told(f"{path.stem}, seed {seed}: {outcome_line(finished)}")
    folder = _to_read(where)
    assert folder is not None, "it was trained"
    return None if finished.outcome.reason == "stopped" else (folder, finished.outcome.step)


def _to_read(where: Path | ObjectFolder) -> RunFolder | None:
    """The run at a place, maybe a copy of it; None where none has begun."""
    if isinstance(where, ObjectFolder):
        return RunFolder(copy_to_read(where)) if where.exists("recipe.yaml") else None
    return RunFolder(where) if RunFolder(where).holds_run() else None


def _plain(comparison: Comparison) -> dict[str, Any]:
    def side(one: Any) -> list[float]:
        return [round(value, 4) for value in (one.value, one.low, one.high)]

    return {
        "metric": comparison.metric,
        "before": side(comparison.first),
        "after": side(comparison.second),
        "difference": side(comparison.difference),
        "questions": {"n": comparison.difference.n, "rose": comparison.difference.rose, "fell": comparison.difference.fell},
        "seeds": list(comparison.difference.seeds),
        "p_value": comparison.p_value,
        "verdict": comparison.verdict,
    }

"""Climb from recipe to recipe: train each with several seeds, and compare each with the one before over the same questions.

python -m jobs.stairstep recipes/stairstep/*.yaml                                   three seeds each
python -m jobs.stairstep recipes/stairstep/*.yaml --seeds 0 --set optim.steps=20    one seed, with overrides for every recipe

Recipes are climbed in the order given. Started again, finished runs are kept and unfinished ones go on; so several machines may each train
some of the seeds under one run.root, and a last call compares them all. A difference counts its seeds and its questions; one inside its
interval is called so.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from jobs.common import run
from jobs.train import train_recipe
from stairstep.evaluation.comparison import Comparison, compare_seeds, comparison_table
from stairstep.records import RunFolder, logging_setup, read_json_lines, write_json
from stairstep.records.resume import check_same_recipe, read_recipe
from stairstep.settings import InputError, to_plain
from stairstep.tasks import load_recipe
from stairstep.tasks.resolve import resolve, run_folder_path
from stairstep.tasks.run import outcome_line

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """One recipe trained with one seed; `last` is None if it was asked to stop before its end."""

    folder: RunFolder
    last: int | None


def trained(path: Path, seed: int, overrides: Sequence[str]) -> Run:
    """Train one recipe with one seed, or find it trained."""
    recipe = resolve(load_recipe(path, [f"run.name={path.stem}-seed{seed}", f"run.seed={seed}", *overrides]))
    if not recipe.evaluation.sets:
        raise InputError(f"{path}: evaluation.sets is empty; a climb compares answers to questions, name a question set")
    folder = RunFolder(run_folder_path(recipe))
    status = folder.status
    if status is not None and status.state == "finished":
        check_same_recipe(folder.path, read_recipe(folder.path / "recipe.yaml"), to_plain(recipe))
        print(f"{path.stem}, seed {seed}: finished before; {folder.path}", flush=True)
        return Run(folder, status.step)
    finished = train_recipe(recipe)
    print(f"{path.stem}, seed {seed}: {outcome_line(finished)}", flush=True)
    return Run(folder, None if finished.outcome.reason == "stopped" else finished.outcome.step)


def rows_of(folder: RunFolder, step: int) -> Rows:
    """The rows of a run's primary question set at a step."""
    return read_json_lines(folder.path / f"eval_step{step}.jsonl")


def _plain(comparison: Comparison) -> dict[str, Any]:
    def side(one: Any) -> list[float]:
        return [round(value, 4) for value in (one.value, one.low, one.high)]

    return {
        "metric": comparison.metric,
        "before": side(comparison.first),
        "after": side(comparison.second),
        "difference": side(comparison.difference),
        "p_value": comparison.p_value,
        "verdict": comparison.verdict,
    }


def main(arguments: list[str]) -> int:
    """Train what is not trained yet, then print every step of the climb and the whole of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path, help="recipes in the order of the climb")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="key.path=value", help="overrides for every recipe")
    parser.add_argument("--out", type=Path, default=Path("runs/stairstep.json"), help="where the figures go as JSON")
    options = parser.parse_args(arguments)
    names = [path.stem for path in options.recipes]
    if len(set(names)) < len(names):
        raise InputError(f"two recipes have one file name ({', '.join(names)}); a run is named by its recipe's file")
    logging_setup()
    climb: list[tuple[str, list[Rows]]] = []
    for path in options.recipes:
        rows: list[Rows] = []
        for seed in options.seeds:
            one = trained(path, seed, options.overrides)
            if one.last is None:
                print("stopped; the same command goes on from here")
                return 1
            climb = climb or [("base", [rows_of(one.folder, 0)])]
            rows.append(rows_of(one.folder, one.last))
        climb.append((path.stem, rows))
    steps = list(pairwise(climb))
    if len(names) > 1:
        steps.append((climb[0], climb[-1]))
    figures = []
    for (before, first), (after, second) in steps:
        compared = compare_seeds(first, second)
        print(f"\n{comparison_table(compared, before, after)}")
        figures.append({"before": before, "after": after, "seeds": options.seeds, "metrics": [_plain(one) for one in compared]})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, figures)
    print(f"\n{json.dumps([path.name for path in options.recipes])}: figures in {options.out}")
    return 0


if __name__ == "__main__":
    run(main)

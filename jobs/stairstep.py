"""Climb from recipe to recipe: train each with several seeds, and compare each with the one before over the same questions.

python -m jobs.stairstep recipes/stairstep/*.yaml                                   three seeds each
python -m jobs.stairstep recipes/stairstep/*.yaml --seeds 0 --set optim.steps=20    one seed, with overrides for every recipe
python -m jobs.stairstep a.yaml b.yaml --parallel 2                                 two runs at a time

Recipes are climbed in the order given. Started again, finished runs are kept and unfinished ones go on. A difference counts its seeds and
its questions; one inside its interval is called so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jobs.common import run
from stairstep.evaluation.comparison import Comparison, compare_seeds, comparison_table
from stairstep.records import read_json_lines, write_json
from stairstep.settings import InputError, StairstepError
from stairstep.tasks import Recipe, load_recipe
from stairstep.tasks.resolve import resolve, run_folder_path

Rows = list[dict[str, Any]]


class RunFailed(StairstepError):
    """A training of the climb ended with an error of its own."""


def trained(path: Path, seed: int, overrides: Sequence[str]) -> tuple[Recipe, Path]:
    """Train one recipe with one seed in a process of its own; its resolved recipe and its run folder."""
    own = [f"run.name={path.stem}-seed{seed}", f"run.seed={seed}", *overrides]
    recipe = resolve(load_recipe(path, own))
    if not recipe.evaluation.sets:
        raise InputError(f"{path}: evaluation.sets is empty; a climb compares answers to questions, name a question set")
    ended = subprocess.run([sys.executable, "-m", "jobs.train", str(path), *own], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if ended.returncode:
        raise RunFailed(f"{path}, seed {seed}: jobs.train left with exit code {ended.returncode}:\n{ended.stderr.strip()[-2000:]}")
    print(f"{path.stem}, seed {seed}: {ended.stdout.strip().splitlines()[-1]}", flush=True)
    return recipe, run_folder_path(recipe)


def rows_of(folder: Path, step: int) -> Rows:
    """The rows of a run's primary question set at a step."""
    path = folder / f"eval_step{step}.jsonl"
    if not path.is_file():
        raise InputError(f"{path} is missing; the run stopped before its last step. The same command goes on with it")
    return read_json_lines(path)


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
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="key.path=value", help="overrides for every recipe")
    parser.add_argument("--out", type=Path, default=Path("runs/stairstep.json"), help="where the figures go as JSON")
    options = parser.parse_args(arguments)
    names = [path.stem for path in options.recipes]
    if len(set(names)) < len(names):
        raise InputError(f"two recipes have one file name ({', '.join(names)}); a run is named by its recipe's file")
    todo = [(path, seed) for path in options.recipes for seed in options.seeds]
    with ThreadPoolExecutor(max(1, options.parallel)) as pool:
        ended = list(pool.map(lambda one: trained(*one, options.overrides), todo))
    climb: list[tuple[str, list[Rows]]] = [("base", [rows_of(ended[0][1], 0)])]
    for name in names:
        mine = [result for (path, _), result in zip(todo, ended, strict=True) if path.stem == name]
        climb.append((name, [rows_of(folder, recipe.optim.steps) for recipe, folder in mine]))
    steps = list(zip(climb, climb[1:], strict=False))
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

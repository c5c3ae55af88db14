"""Climb from recipe to recipe: train each with several seeds, and compare each with the one before over the same questions.

python -m jobs.stairstep recipes/stairstep/*.yaml                                   three seeds each
python -m jobs.stairstep recipes/stairstep/*.yaml --seeds 0 --set optim.steps=20    one seed, with overrides for every recipe

Recipes are climbed in the order given. Started again, finished runs are kept and unfinished ones go on; so several machines may each train
some of the seeds under one run.root, and a last call compares them all. A difference counts its seeds and its questions, and its p-value is
corrected for all steps and metrics of the climb.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from jobs.common import run
from jobs.train import train_recipe
from stairstep.evaluation.comparison import comparison_table
from stairstep.records import logging_setup, write_json
from stairstep.tasks.climb import climb, plain


def main(arguments: list[str]) -> int:
    """Train what is not trained yet, then print every step of the climb and the whole of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path, help="recipes in the order of the climb")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", dest="overrides", nargs="+", default=[], metavar="key.path=value", help="overrides for every recipe")
    parser.add_argument("--out", type=Path, default=Path("runs/stairstep.json"), help="where the figures go as JSON")
    parser.add_argument("--no-preflight", action="store_true", help="start without the quick checks of jobs.doctor")
    options = parser.parse_args(arguments)
    logging_setup()
    train = partial(train_recipe, preflight=not options.no_preflight)
    steps = climb(options.recipes, options.seeds, options.overrides, train, lambda line: print(line, flush=True))
    if steps is None:
        print("stopped; the same command goes on from here")
        return 1
    for step in steps:
        print(f"\n{comparison_table(step)}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, [{**plain(step), "seeds": options.seeds} for step in steps])
    print(f"\nfigures in {options.out}")
    return 0


if __name__ == "__main__":
    run(main)

"""Train a recipe, or go on with its run.

python -m jobs.train recipes/tinywiki.yaml                       train, or resume
python -m jobs.train recipes/tinywiki.yaml optim.steps=20        with overrides
python -m jobs.train recipes/v8r.yaml --show                     print the resolved recipe
python -m jobs.train recipes/v8r.yaml --no-preflight             without the quick checks (python -m jobs.doctor makes all of them)
python -m jobs.train recipes/v8r.yaml --dry-run                  build the model without weights or network, print what is trained
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.common import parse, parser, run
from stairstep.records import StopFlag, logging_setup
from stairstep.settings import to_yaml
from stairstep.tasks import Recipe

if TYPE_CHECKING:
    from stairstep.tasks.opening import Finished


def dry_run(recipe: Recipe) -> int:
    """Build the model on the meta device and say what would be trained."""
    from stairstep.models.load import build_on_meta, trainable_line

    model, placement = build_on_meta(recipe.model)
    print(placement.describe())
    print(trainable_line(model))
    return 0


def train_recipe(recipe: Recipe, preflight: bool = True) -> Finished:
    """Train a resolved recipe: in this process with `cluster.workers: 0`, where Ray need not even be installed, else under Ray Train.

    `preflight`: refuse what the quick checks of jobs.doctor find wrong."""
    if preflight:
        from stairstep.tasks import doctor

        doctor.preflight(recipe)
    if recipe.cluster.workers:
        from stairstep.cluster.train import train_on_ray

        return train_on_ray(recipe)
    from stairstep.tasks.run import train

    with StopFlag() as flag:
        return train(recipe, stop=lambda: bool(flag))


def main(arguments: list[str]) -> int:
    """Train, or only show."""
    made = parser(__doc__ or "")
    made.add_argument("--show", action="store_true", help="print the recipe with everything that it extends, and stop")
    made.add_argument("--dry-run", action="store_true", help="print the trained parameters, and stop")
    made.add_argument("--no-preflight", action="store_true", help="start without the quick checks of jobs.doctor")
    options, recipe = parse(made, arguments)
    if options.show:
        print(to_yaml(recipe), end="")
        return 0
    if options.dry_run:
        return dry_run(recipe)
    from stairstep.tasks.opening import outcome_line
    from stairstep.tasks.resolve import resolve

    logging_setup()
    print(outcome_line(train_recipe(resolve(recipe), preflight=not options.no_preflight)))
    return 0


if __name__ == "__main__":
    run(main)

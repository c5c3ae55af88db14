"""Look at everything that a recipe needs, before hours of a GPU are spent on it.

python -m jobs.doctor recipes/tinywiki.yaml
python -m jobs.doctor recipes/v8r.yaml run.root=/data/runs       with overrides
python -m jobs.doctor recipes/tinywiki.yaml --json               the same as JSON

✓ it is well, ✗ it is not, – not looked at; each line as its check ends. The exit code is 1 where something is wrong that the recipe needs.
"""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING

from jobs.common import parse, parser, run
from stairstep.records import logging_setup

if TYPE_CHECKING:
    from stairstep.tasks.doctor import Answer, Patient


def ray(patient: Patient) -> Answer:
    """Ray's resources against what the recipe asks of them."""
    from stairstep.tasks.doctor import NotLooked, good

    recipe = patient.recipe
    if not recipe.cluster.workers:
        raise NotLooked("the recipe trains in one process (cluster.workers: 0)")
    from stairstep.cluster.beside import evaluator_resources
    from stairstep.cluster.session import check_resources, check_root, ray_session, resources_line, worker_resources

    check_root(recipe.run.root, recipe.cluster.address)
    check_root(recipe.tiles.store, recipe.cluster.address, "tiles.store")
    with ray_session(recipe.cluster.address) as session:
        each = worker_resources(recipe.cluster)
        if session.private:
            beside = recipe.evaluation.mode == "beside"
            check_resources(recipe.cluster, each, evaluator_resources(recipe.cluster) if beside else None)
        return good(resources_line(recipe.cluster, each))


def main(arguments: list[str]) -> int:
    """Examine and print."""
    made = parser(__doc__ or "")
    made.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options, recipe = parse(made, arguments)
    from stairstep.tasks.doctor import Check, examine, verdict

    logging_setup()
    checks = (Check("ray", ray),)
    findings = examine(recipe, checks) if options.json else examine(recipe, checks, partial(print, flush=True))
    ready = not any(one.stops for one in findings)
    if options.json:
        print(json.dumps({"recipe": options.recipe, "ready": ready, "findings": [one.plain() for one in findings]}, ensure_ascii=False))
    else:
        print(f"\n{verdict(findings)}")
    return 0 if ready else 1


if __name__ == "__main__":
    run(main)

"""The whole loop on tiny models, in a few minutes on two cores: a world of small pages, a reader, training under Ray Train, a table.

    python -m jobs.demo                          recipes/demo.yaml
    python -m jobs.demo optim.steps=20           with overrides

It starts anew each time (run.resume=overwrite).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jobs.common import run
from jobs.train import train_recipe
from serve.running import serving_beside
from stairstep.cluster.session import ray_session, reader_host
from stairstep.evaluation.comparison import compare, comparison_table
from stairstep.evaluation.evaluated import Side, read_evaluated
from stairstep.evaluation.peaks import peaks_of_run
from stairstep.records import MetricLog, logging_setup, read_json, series
from stairstep.tasks import load_recipe
from stairstep.tasks.doctor import preflight
from stairstep.tasks.opening import outcome_line
from stairstep.tasks.resolve import resolve

RECIPE = Path(__file__).parent.parent / "recipes" / "demo.yaml"


def story(folder: Path, last: int) -> str:
    """What the run did, in numbers that carry their intervals."""
    before, after = Side("base", [read_evaluated(folder, 0)]), Side(f"step {last}", [read_evaluated(folder, last)])
    losses = [value for _, value in series(MetricLog(folder / "metrics.jsonl").rows(), "validation/loss")]
    lines = [
        *([f"validation loss: {losses[0]:.3f} before training, {losses[-1]:.3f} after {last} steps"] if losses else []),
        "",
        comparison_table(compare(before, after)),
        "",
        *(one.line for one in peaks_of_run(folder)),
        _calls(folder),
    ]
    return "\n".join(lines)


def _calls(folder: Path) -> str:
    """What all evaluations asked of the reader, and what the ledger saved them."""
    calls = [read_json(path)["calls"]["answer"] for path in sorted(folder.glob("eval_step*.summary.json"))]
    return f"answers: {sum(one['asked'] for one in calls)} asked of the reader, {sum(one['hits'] for one in calls)} found in the ledger"


def main(arguments: list[str]) -> int:
    """Start the reader app, train the demo's recipe and compare its last step with its first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides of recipes/demo.yaml")
    parser.add_argument("--no-preflight", action="store_true", help="start without the quick checks of jobs.doctor")
    options = parser.parse_intermixed_args(arguments)
    overrides = ["run.resume=overwrite", *options.overrides]
    recipe = load_recipe(RECIPE, overrides)  # a mistake is told before anything starts
    logging_setup()
    if not options.no_preflight:
        preflight(resolve(recipe))
    model = recipe.evaluation.reader.model if recipe.evaluation.reader else "tiny-reader"
    waiting = max(1, recipe.cluster.workers)  # cores that are idle while answers are asked
    with (
        ray_session(recipe.cluster.address) as session,
        serving_beside(model, recipe.cluster.reader_resources, reader_host(recipe.cluster, session), waiting) as base_url,
    ):
        print(f"{model} answers at {base_url}")
        recipe = load_recipe(RECIPE, [f"evaluation.reader.base_url={base_url}", *overrides])
        finished = train_recipe(resolve(recipe), preflight=False)
    print(outcome_line(finished))
    if finished.outcome.reason == "stopped":
        return 1
    print(f"\n{story(finished.folder, finished.outcome.step)}")
    told = read_json(finished.folder / f"eval_step{finished.outcome.step}.summary.json")
    print(f"\n{told['questions']} questions over {told['tiles']} tiles; everything lies in {finished.folder}")
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    run(main)

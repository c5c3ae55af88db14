"""Measure an encoder on the recipe's question sets, without training; or fill in what a run's evaluations lack.

python -m jobs.evaluate recipes/tinywiki.yaml --base
python -m jobs.evaluate recipes/tinywiki.yaml --checkpoint runs/tinywiki/checkpoint-50
python -m jobs.evaluate recipes/tinywiki.yaml                    the adapter that model.start names, or the base
python -m jobs.evaluate --regrade runs/tinywiki                  only the grades that are missing in a run folder, by its own recipe
python -m jobs.evaluate --reread runs/tinywiki                   only the answers that are missing, and their grades
python -m jobs.evaluate --reread s3://bucket/runs/tinywiki       the same of a run in an object store

A thought that was cut off and a judge's replies that were no grade are kept in the ledger: --reread, --regrade, --fresh or a higher limit
ask for them again. What is filled in changes rows and summaries, and not the log of metrics.
"""

from __future__ import annotations

from jobs.common import parse, parser, readable, run
from stairstep.evaluation.table import result_table
from stairstep.records import logging_setup
from stairstep.settings import InputError
from stairstep.tasks import load_recipe
from stairstep.tasks.evaluate import evaluate
from stairstep.tasks.mend import mend
from stairstep.tasks.placing import checkpoint_here, folder_to_mend
from stairstep.tasks.resolve import resolve


def fill_in(text: str, overrides: list[str], regrade: bool) -> int:
    """Ask again for what is missing in a run folder; exit code 1 if something still is."""
    known = readable(text) / "recipe.yaml"
    if not known.is_file():
        raise InputError(f"{text}: there is no recipe.yaml; expected a run folder, such as runs/tinywiki")
    recipe = resolve(load_recipe(known, overrides))
    logging_setup()
    folder = folder_to_mend(text)
    mended = mend(folder, recipe, ("grades",) if regrade else ("answers", "grades"))
    for one in mended:
        print(one.lines)
    if not mended:
        print(f"{folder.where}: nothing is missing")
    return 1 if any(one.still for one in mended) else 0


def main(arguments: list[str]) -> int:
    """Evaluate and print a table a set; exit code 1 if questions were asked and there is no score of them."""
    made = parser(__doc__ or "")
    which = made.add_mutually_exclusive_group()
    which.add_argument("--base", action="store_true", help="the bare base, without any adapter")
    which.add_argument("--checkpoint", metavar="DIR", help="a checkpoint or adapter folder, or a checkpoint's URL")
    which.add_argument("--regrade", metavar="RUN", help="fill in the grades that are missing in a run")
    which.add_argument("--reread", metavar="RUN", help="fill in the answers that are missing in a run")
    made.add_argument("--fresh", action="store_true", help="ask reader and grader anew, whatever the ledger holds")
    if any(one.partition("=")[0] in ("--regrade", "--reread") for one in arguments):
        # A run folder brings its own recipe: then every plain argument is an override.
        made._remove_action(next(action for action in made._actions if action.dest == "recipe"))
        options = made.parse_intermixed_args(arguments)
        if options.fresh:
            made.error("--fresh is of no use here: --regrade and --reread ask for what is missing, and for nothing else")
        return fill_in(options.regrade or options.reread, options.overrides, options.regrade is not None)
    options, recipe = parse(made, arguments)
    logging_setup()
    measured = evaluate(resolve(recipe), options.base, options.checkpoint and checkpoint_here(options.checkpoint), options.fresh)
    for result in measured.results:
        timings = result.facts["timings"]
        print(f"\n{result_table(result, f'{result.name}: {measured.what}')}")
        computed = {side: counts["computed"] for side, counts in result.facts["embeddings"].items()}
        print(f"embedded {computed['queries']} queries and {computed['tiles']} tiles; the rest was known")
        spent = ((part, timings.get(f"{part}_s")) for part in ("wait", "copy", "forward", "search", "read", "grade"))
        print(f"seconds: {', '.join(f'{part} {seconds:.1f}' for part, seconds in spent if seconds is not None)}")
    print(f"\nrows and summaries: {measured.folder}")
    unscored = [result.name for result in measured.results if result.qa and result.qa["all"].interval is None]
    if unscored:
        print(f"no QA score of {', '.join(unscored)}: the same command asks again for what failed in passing, and for nothing else")
    return 1 if unscored else 0


if __name__ == "__main__":
    run(main)

"""Measure an encoder on the recipe's question sets, without training.

python -m jobs.evaluate recipes/tinywiki.yaml --base
python -m jobs.evaluate recipes/tinywiki.yaml --checkpoint runs/tinywiki/checkpoint-50
python -m jobs.evaluate recipes/tinywiki.yaml                    the adapter that model.start names, or the base
"""

from __future__ import annotations

from pathlib import Path

from jobs.common import parse, parser, run
from stairstep.evaluation.table import result_table
from stairstep.records import logging_setup
from stairstep.tasks.evaluate import evaluate
from stairstep.tasks.resolve import resolve


def main(arguments: list[str]) -> int:
    """Evaluate and print a table a set."""
    made = parser(__doc__ or "")
    which = made.add_mutually_exclusive_group()
    which.add_argument("--base", action="store_true", help="the bare base, without any adapter")
    which.add_argument("--checkpoint", type=Path, metavar="DIR", help="a checkpoint or adapter folder")
    options, recipe = parse(made, arguments)
    logging_setup()
    measured = evaluate(resolve(recipe), options.base, options.checkpoint)
    for result in measured.results:
        timings = result.facts["timings"]
        print(f"\n{result_table(result, f'{result.name}: {measured.what}')}")
        computed = {side: counts["computed"] for side, counts in result.facts["embeddings"].items()}
        print(f"embedded {computed['queries']} queries and {computed['tiles']} tiles in {timings['embed_s']} s; the rest was known")
    print(f"\nrows and summaries: {measured.folder}")
    return 0


if __name__ == "__main__":
    run(main)

"""Fetch from the hub what a recipe names under data.fetch, and its base model; verify it, count it, and say what differs.

python -m jobs.fetch recipes/v8r.yaml                            fetch, or go on after a kill: what is whole is not fetched again
python -m jobs.fetch recipes/v8r.yaml --verify                   hash again what is there, and fetch what differs

At the end it looks for the tiles of the question sets as a training does; archives (data.archives) are indexed for that under run.root,
each read once, which the training is then spared. HF_TOKEN is read from the environment, where a repository needs one; HF_ENDPOINT names
another hub. The exit code is 1 where something could not be fetched whole, a count is not the expected one or a question set has no tiles;
the files stay.
"""

from __future__ import annotations

from jobs.common import parse, parser, run
from stairstep.records import logging_setup


def main(arguments: list[str]) -> int:
    """Fetch, and print what there is."""
    made = parser(__doc__ or "")
    made.add_argument("--verify", action="store_true", help="hash every file again, also those that were verified and have not changed")
    options, recipe = parse(made, arguments)
    from stairstep.data.fetch_report import summary
    from stairstep.tasks.fetching import fetch_recipe, find_sets

    logging_setup()
    results = fetch_recipe(recipe, options.verify)
    print(summary(results), flush=True)
    sets = find_sets(recipe)
    for one in sets:
        print(one.line())
    return 0 if all(one.whole for one in results) and all(one.right for one in sets) else 1


if __name__ == "__main__":
    run(main)

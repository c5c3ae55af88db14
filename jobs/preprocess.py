"""Decode and resize every tile of a recipe once, into the tile store that training and evaluation then read.

python -m jobs.preprocess recipes/tinywiki.yaml                  into tiles/ under the run root, or where tiles.store says
python -m jobs.preprocess recipes/v8r.yaml tiles.store=/fast/tiles

Runs on the CPUs of the Ray cluster that it is started on, or of this machine. Started again, it goes on where it was; Ctrl-C is safe. Tiles
that cannot be decoded are listed in the store's quarantine.jsonl; more of them than data.max_quarantined are an error at the end.
"""

from __future__ import annotations

from jobs.common import parse, parser, run
from stairstep.records import StopFlag, logging_setup


def main(arguments: list[str]) -> int:
    """Fill the store, and say what is in it."""
    _, recipe = parse(parser(__doc__ or ""), arguments)
    from stairstep.cluster.preprocess import preprocess_on_ray
    from stairstep.tasks.preprocessing import judge
    from stairstep.tasks.resolve import resolve

    logging_setup()
    recipe = resolve(recipe)
    with StopFlag() as flag:
        summary = preprocess_on_ray(recipe, lambda: bool(flag))
    print("\n".join(summary.lines()), flush=True)
    if summary.stopped:
        return 1
    judge(summary, recipe)
    return 0


if __name__ == "__main__":
    run(main)

"""Hyperparameters for a recipe, each with the rule behind it, and a fragment ready to extend.

python -m jobs.advise recipes/tinywiki.yaml
python -m jobs.advise recipes/v8r.yaml --memory-gb 80            for a GPU that is not here: estimated alone
python -m jobs.advise recipes/tinywiki.yaml --out advised.yaml   writes a recipe that extends it; the recipe itself is never changed

Where the device is here a trial step is taken on it, and its memory stands next to the estimate.
"""

from __future__ import annotations

from pathlib import Path

from jobs.common import parse, parser, run
from stairstep.records import logging_setup


def main(arguments: list[str]) -> int:
    """Propose, print, and write where asked."""
    made = parser(__doc__ or "")
    made.add_argument("--memory-gb", type=float, metavar="N", help="plan for a device with N GiB that is not here")
    made.add_argument("--out", type=Path, metavar="FILE", help="write a recipe that extends this one with what is proposed")
    options, recipe = parse(made, arguments)
    from stairstep.tasks.advise import advise, check_new, fragment, memory_of, show, write_fragment

    logging_setup()
    if options.out is not None:
        check_new(options.out)
    advice = advise(recipe, memory_of(recipe, options.memory_gb))
    text = fragment(advice, options.overrides)
    print(show(advice))
    print(f"\nextends: {options.recipe}\n{text}" if text else "\nnothing to change: the recipe has every proposed value")
    if options.out is not None:
        write_fragment(advice, Path(options.recipe), options.out, options.overrides)
        print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    run(main)

"""Compare two runs, or two steps of a run, over the same questions.

python -m jobs.compare runs/a runs/b                                      each at its best step on the selection split
python -m jobs.compare runs/a:0 runs/a:80                                 two steps of a run
python -m jobs.compare runs/a-seed0,runs/a-seed1 runs/b-seed0,runs/b-seed1
python -m jobs.compare runs/a:80 runs/b:80 --set other                    over another question set than the primary one

Up and down are the questions that turned right or wrong (of MRR, or with several seeds: whose mean rose or fell). Where a step was
picked on the selection split, the comparison is over the other questions. Folders that jobs.evaluate wrote are compared too.
"""

from __future__ import annotations

import argparse

from jobs.common import run
from stairstep.evaluation.comparison import comparison_table
from stairstep.tasks.comparing import compare_named, named


def main(arguments: list[str]) -> int:
    """Print what is compared, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("first", metavar="RUN[:STEP]", help="a run folder, or several seeds' with commas between")
    parser.add_argument("second", metavar="RUN[:STEP]", help="what it is compared with")
    parser.add_argument("--set", metavar="NAME", help="the question set; default: the primary one")
    options = parser.parse_args(arguments)
    sides = (named(options.first), named(options.second))
    compared, held_out = compare_named(*sides, options.set)
    for name, side in zip((compared.first, compared.second), sides, strict=True):
        print(f"{name}: {', '.join(one.line for one in side)}")
    if held_out is not None:
        print(f"a step was picked on the selection split: compared over the {held_out} other questions")
    print(f"\n{comparison_table(compared)}")
    return 0


if __name__ == "__main__":
    run(main)

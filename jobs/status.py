"""How runs stand: phase, step, time left, throughput, waiting for data, scores, evaluations; who has stalled, and where its stacks lie.

python -m jobs.status                              all runs and sweeps below runs/
python -m jobs.status runs/tinywiki                one run
python -m jobs.status runs/tinywiki-stairstep      a sweep: a line a trial
python -m jobs.status runs --watch                 again and again, until Ctrl-C
python -m jobs.status s3://bucket/runs             a run, a sweep, or all of them, in an object store

Run folders alone are read, so it works beside a run on any machine that sees them; Ray is not needed.
"""

from __future__ import annotations

import argparse
import sys
import time

from jobs.common import readable, run
from stairstep.records.places import ObjectFolder, place
from stairstep.sweeps.standing_text import status_lines

EVERY_S = 5.0
_CLEAR = "\033[2J\033[H"


def main(arguments: list[str]) -> int:
    """Print once, or until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("path", nargs="?", default="runs", help="a run, a sweep, or a folder of them; default: runs")
    parser.add_argument("--watch", action="store_true", help=f"again every {EVERY_S:g} seconds, until Ctrl-C")
    options = parser.parse_args(arguments)
    there = place(options.path)
    where = there.where() if isinstance(there, ObjectFolder) else ""
    while True:
        text = "\n".join(status_lines(readable(options.path), where=where))
        print(f"{_CLEAR if options.watch and sys.stdout.isatty() else ''}{text}", flush=True)
        if not options.watch:
            return 0
        time.sleep(EVERY_S)


if __name__ == "__main__":
    run(main)

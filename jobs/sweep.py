"""Run an ablation: every trial of a space over a recipe, beside one another on Ray, and its board.

python -m jobs.sweep recipes/tinywiki.yaml tune_spaces/stairstep.yaml                        all steps of the staircase, two seeds each
python -m jobs.sweep recipes/tinywiki.yaml tune_spaces/lr_warmup_lora.yaml evaluation.every=20    with overrides for every trial
python -m jobs.sweep recipes/v8r.yaml tune_spaces/stairstep.yaml --dry-run                   what would run, and what it would take
python -m jobs.sweep --resume tinywiki-stairstep                                             go on after Ctrl-C, a limit or a crash
python -m jobs.sweep --resume "s3://bucket/runs/tinywiki-stairstep"                          the same, in an object store

A sweep lies in run.root/NAME; with a URL (s3://…) as its root it goes on from any machine. Its trials share one reader, which is served for
the length of the sweep where the recipe has one of its own, and with all other runs of that root the answers, grades, embeddings and tiles
that are known already. At a limit, as at Ctrl-C, trials stop with a checkpoint, and --resume goes on; it tries failed trials again.
"""

from __future__ import annotations

import argparse
import shlex
from functools import partial
from pathlib import Path

from jobs.common import run
from stairstep.board import Folders, board_text, content, html_page
from stairstep.records import logging_setup, write_atomically
from stairstep.settings import InputError
from stairstep.sweeps import SweepFolder
from stairstep.sweeps.beginning import Asked, begin, find, planned
from stairstep.sweeps.dry_run import dry_run_lines
from stairstep.sweeps.spent import Limits
from stairstep.tasks.doctor import preflight


def go_on(sweep: SweepFolder, concurrency: int | None, limits: Limits) -> int:
    """Run what is left of a sweep; exit code 1 if a trial failed or something is still left."""
    from serve.running import serving_beside
    from stairstep.cluster.sweep import run_sweep

    left = run_sweep(sweep, serving_beside, concurrency, limits, partial(print, flush=True))
    folders = Folders([sweep.path])
    board = folders.read()
    write_atomically(folders.target, html_page(content(board, folders, 0)))
    print(f"\n{board_text(board, folders)}")
    failed = any(one.state == "failed" for one in sweep.trials())
    if left:
        print(f"\n{left}; jobs.sweep --resume {shlex.quote(sweep.where)} goes on from here")
    print(f"\nits board: {sweep.published(folders.target.name)}")
    return 1 if failed or left else 0


def main(arguments: list[str]) -> int:
    """Plan, check, run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("recipe", nargs="?", type=Path, help="recipe file, for example recipes/tinywiki.yaml")
    parser.add_argument("space", nargs="?", type=Path, help="space file, for example tune_spaces/stairstep.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="overrides for every trial")
    parser.add_argument("--name", help="the sweep's folder below run.root; default: the recipe's and the space's names")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds instead of the space's")
    parser.add_argument("--resume", metavar="NAME", help="go on with a sweep: its folder or URL, or its name below --root")
    parser.add_argument("--root", help="where --resume looks for a name, a folder or a URL; default: runs")
    parser.add_argument("--dry-run", action="store_true", help="list the trials with what they would take, and stop")
    parser.add_argument("--concurrency", type=int, help="trials at once; default: as many as the cluster has room for")
    parser.add_argument("--max-hours", type=float, help="stop once so many device hours are spent (hours of each worker, added up)")
    parser.add_argument("--max-cost", type=float, help="stop once reader and grader have cost so much (evaluation.prices)")
    parser.add_argument("--no-preflight", action="store_true", help="start without the quick checks of jobs.doctor")
    options = parser.parse_intermixed_args(arguments)
    logging_setup()
    limits = Limits(options.max_hours, options.max_cost)
    if options.resume:
        if options.recipe or options.dry_run or options.name or options.seeds:
            raise InputError(
                "--resume goes on with a sweep as it was begun; of the other options only --concurrency and --max-… go with it"
            )
        return go_on(find(options.resume, options.root or "runs"), options.concurrency, limits)
    if options.root is not None:
        raise InputError("--root is for --resume; a new sweep lies in run.root, which is an override: run.root=...")
    if options.space is None:
        raise InputError("expected a recipe and a space, for example recipes/tinywiki.yaml tune_spaces/stairstep.yaml")
    asked = Asked(options.recipe, options.space, options.overrides, options.seeds, options.name)
    space, made = planned(asked)
    if options.dry_run:
        print("\n".join(dry_run_lines(space, made, limits)))
        return 0
    from stairstep.cluster.session import check_root

    check_root(made.base.run.root, made.base.cluster.address)
    if not options.no_preflight:
        preflight(made.trials[0].recipe if made.trials else made.base)
    sweep = begin(asked, space, made, shlex.join(["python", "-m", "jobs.sweep", *arguments]))
    return go_on(sweep, options.concurrency, limits)


if __name__ == "__main__":
    run(main)

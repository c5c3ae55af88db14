"""What a board says in words above its figures: the headline with its numbers, the facts beside it, and what a reader must know.

A word such as "better" is a comparison's own verdict; where there is no comparison there is no such word.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from stairstep.evaluation.comparison import Comparison, comparison_label
from stairstep.evaluation.table import metric_label, short
from stairstep.sweeps.scores import LOSS

from .compute import Calls, Findings, hours, label, picked
from .read import Board
from .tables import best_word, cut, names_below_floor

_MOST_NAMED = 5
_WHY = {"lost": "it says that it is at work, and its process is gone or silent"}


def headline(board: Board, findings: Findings) -> tuple[str, str]:
    """The one sentence of a board, and the one below it."""
    if findings.staircases and (whole := findings.staircases[0].whole) is not None:
        stairs = findings.staircases[0]
        trained = len(stairs.stairs) - 1
        climbed = f"{comparison_label(stairs.metric)}\u00a0{_from_to(whole)} over {_count(trained, 'step')}, {_seeds(stairs.seeds)}"
        return climbed, f"{_difference(whole).capitalize()}, from {stairs.stairs[0].name} to {stairs.stairs[-1].name}"
    if board.is_sweep:
        return _best(board)
    if len(board.runs) == 1:
        return _one_run(board, findings)
    scored = [one.value for run in board.runs if run.last and (one := run.last.score(board.metric)) is not None]
    if not scored:
        return f"{_count(len(board.runs), 'run')}, no score yet", ""
    spread = f"{metric_label(board.metric)} from {short(min(scored))} to {short(max(scored))} at the last evaluated step"
    against = "; ".join(f"{one.second} {_difference(found)}" for one in findings.compared for found in one.comparisons[:1])
    return f"{_count(len(board.runs), 'run')}: {spread}", against and f"Against {findings.compared[0].first}: {against}"


def facts(board: Board, made: Sequence[Calls]) -> list[tuple[str, str]]:
    """Short facts, each a number or a word and what it is of."""
    states = Counter(run.state for run in board.runs)
    found = []
    if board.is_sweep:
        found.append((str(len(board.runs)), "trials: " + ", ".join(f"{count} {state}" for state, count in states.most_common())))
        seeds = {run.seed for run in board.runs}
        found.append((str(len(seeds)), "seed" if len(seeds) == 1 else "seeds"))
    elif len(board.runs) == 1:
        run = board.runs[0]
        of = f" of {run.status.of}" if run.status and run.status.of else ""
        found.append((run.state, f"step {run.step}{of}, seed {run.seed}"))
    else:
        found.append((str(len(board.runs)), "runs: " + ", ".join(f"{count} {state}" for state, count in states.most_common())))
    lasts = [run.last.summary for run in board.runs if run.last is not None]
    if lasts:
        found.append((f"{lasts[0].get('questions', 0):,}", f"questions over {lasts[0].get('tiles', 0):,} tiles"))
    spent = sum(map(hours, board.runs))
    if spent:
        found.append((f"{spent:.2f}" if spent < 10 else f"{spent:,.1f}", "device hours"))
    if made:
        asked, saved = sum(one.asked for one in made), sum(one.saved for one in made)
        found.append((f"{asked:,}", f"calls made, {saved:,} saved by the ledger"))
    return found


def warnings(board: Board, findings: Findings, more: Sequence[str]) -> list[str]:
    """All that limits what the board says: few seeds, what was left out, coverage, failures, files that cannot be read."""
    caveats = dict.fromkeys(one.caveat for one in findings.compared if one.caveat)
    left_out = dict.fromkeys(f"{one.first} and {one.second}: {text}" for one in findings.compared for text in one.left_out)
    below = names_below_floor(board)
    ended = {state: [run for run in board.runs if run.state == state] for state in ("failed", "stopped", "lost")}
    told = [
        f"{state}: "
        + "; ".join(f"{label(run)} ({cut(run.reason) or _WHY.get(state, 'no reason given')})" for run in runs[:_MOST_NAMED])
        + (f"; and {len(runs) - _MOST_NAMED} more, in the table" if len(runs) > _MOST_NAMED else "")
        for state, runs in ended.items()
        if runs
    ]
    return [
        *board.problems,
        *([] if findings.staircases else caveats),
        *findings.notes,
        *(note for one in findings.staircases for note in one.notes),
        *left_out,
        *([f"QA coverage below the floor, so no QA score: {'; '.join(below)}"] if below else []),
        *told,
        *(problem for run in board.runs for problem in run.problems),
        *more,
    ]


def when() -> str:
    """Now, for the foot of a page."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())


def _best(board: Board) -> tuple[str, str]:
    """The trial and step that are picked by what the sweep is after, with what may be said of them."""
    metric, mode = board.ranked_by
    found = [(run, best) for run in board.runs if (best := picked(board, run)) is not None]
    of, name = _count(len(found), "trial"), metric_label(board.metric)
    after = f"sweep after {'the validation loss' if metric == LOSS else metric_label(metric)} ({mode})"
    if not found:
        return f"{_count(len(board.runs), 'trial')}, none with a score yet", f"A {after}"
    run, best = (max if mode == "max" else min)(found, key=lambda one: one[1].value)
    reported = best.score(board.metric, "report")
    there = f"{name} {short(reported.value)} [{short(reported.low)} {short(reported.high)}]" if reported is not None else ""
    who = f"{label(run)}, step {best.step}"
    if metric == LOSS:
        said = f"Validation loss {best.value:.3f} is the {best_word(board)} of {of}"
        measured = f"{there} on {reported.n:,} questions" if reported is not None else f"{name} was not measured there"
        return said, f"{who}: {measured}; {_seeds(1)} of it; {after}, and a loss that was picked is better than it would be again"
    if reported is None:
        return f"{name} {short(best.value)} on the selection split is the {best_word(board)} of {of}", f"{who}; {_seeds(1)} of it; {after}"
    below = f"{who}: picked on the selection split, measured on the other {reported.n:,} questions; {_seeds(1)} of it; {after}"
    return f"{there} is what the picked of {of} reaches", below


def _one_run(board: Board, findings: Findings) -> tuple[str, str]:
    run = board.runs[0]
    found = [one for pair in findings.compared for one in pair.comparisons if not comparison_label(one.metric).startswith(" ")]
    if found:
        first, last = run.evaluations[0].step, run.evaluations[-1].step
        said = ", ".join(f"{comparison_label(one.metric)}\u00a0{_from_to(one)}" for one in found)
        below = "; ".join(f"{comparison_label(one.metric)} {_difference(one)}" for one in found)
        return f"{said} from step {first} to {last}, 1 seed", below
    if run.last is not None and (one := run.last.score(board.metric)) is not None:
        return f"{metric_label(board.metric)} {short(one.value)} [{short(one.low)} {short(one.high)}] at step {run.last.step}", ""
    return f"No score yet, step {run.step}", ""


def _from_to(one: Comparison) -> str:
    return f"{short(one.first.value)}\u00a0→\u00a0{short(one.second.value)}"


def _difference(one: Comparison) -> str:
    found = one.difference
    sign = "+" if found.value > 0 else ""
    return f"{one.verdict}: {sign}{short(found.value)} [{short(found.low)} {short(found.high)}] over {found.n:,} questions"


def _seeds(count: int) -> str:
    return _count(count, "seed")


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")

"""The board's tables as plain data: what page and terminal show alike, and the CSV of all numbers.

A cell has its text and the value that it sorts by. Intervals stand beside every score; a word such as "better" is the comparison's own.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from stairstep.evaluation.comparison import Comparison, comparison_label
from stairstep.evaluation.peaks import peak
from stairstep.evaluation.questions_answered import STATES
from stairstep.evaluation.retrieval import ARTICLE_METRICS
from stairstep.evaluation.statistics import Difference, Interval
from stairstep.evaluation.table import metric_label, short
from stairstep.sweeps import shown_point
from stairstep.sweeps.scores import LOSS

from .compute import Calls, Findings, Staircase, cost, hours, label, parameters, picked
from .read import Board, Evaluation, Run

DASH = "–"
_LONGEST_REASON = 300


@dataclass(frozen=True)
class Cell:
    """One cell: its text, what it sorts by (by default its text), and what marks it (`number`, `muted`, a state or a verdict)."""

    text: str
    sort: float | str | None = None
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """A table with its heading, a line below it, and the marks of whole rows (`grey`)."""

    id: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    row_marks: Sequence[str] = ()


def shown(one: Interval | Difference | None) -> Cell:
    """A score or a difference with its interval."""
    if one is None:
        return Cell(DASH, -math.inf, "number")
    return Cell(f"{short(one.value)} [{short(one.low)} {short(one.high)}]", one.value, "number")


def number(value: float | None, text: str = "{:,g}") -> Cell:
    """A number, or a dash."""
    return Cell(DASH, -math.inf, "number") if value is None else Cell(text.format(value), value, "number")


def p_value(one: float) -> str:
    """A p-value as a comparison's table writes it."""
    return "<.001" if one < 0.001 else short(one)


def verdict(one: Comparison | None) -> Cell:
    """The comparison's own word."""
    return Cell(DASH, "", "muted") if one is None else Cell(one.verdict, one.verdict, one.verdict.replace(" ", "-"))


def stairs_table(staircase: Staircase) -> Table:
    """Each step with its seeds and its paired difference from the step below."""
    name = comparison_label(staircase.metric)
    rows = []
    for stair in staircase.stairs:
        found = stair.compared
        change = (
            [Cell(DASH, -math.inf, "number")] * 3
            if found is None
            else [
                shown(found.difference),
                Cell(f"+{found.difference.rose} −{found.difference.fell}", found.difference.rose - found.difference.fell, "number"),
                Cell(p_value(found.p_value), found.p_value, "number"),
            ]
        )
        seeds = ", ".join(short(value) for _, value in stair.seeds)
        rows.append(
            [
                Cell(stair.name),
                Cell(stair.adds, None, "muted"),
                shown(stair.score),
                Cell(seeds, len(stair.seeds), "number"),
                *change,
                verdict(found),
            ]
        )
    columns = ("Step", "Adds", name, "Each seed", "Against the step below", "Up, down", "p", "Verdict")
    note = "Up, down: questions that turned right and wrong, by their mean over the seeds; p is corrected for all that was compared (Holm)."
    return Table(f"stairs-{_plain(staircase.metric)}", f"{name}, step by step", columns, rows, note)


def comparisons_table(findings: Findings) -> Table:
    """All comparisons of the family, each with both sides."""
    rows = [
        [
            Cell(one.first),
            Cell(one.second),
            Cell(comparison_label(found.metric).strip()),
            shown(found.first),
            shown(found.second),
            shown(found.difference),
            Cell(f"+{found.difference.rose} −{found.difference.fell}", found.difference.rose, "number"),
            number(found.difference.n),
            Cell(f"{found.difference.seeds[0]}, {found.difference.seeds[1]}", None, "number"),
            Cell(p_value(found.p_value), found.p_value, "number"),
            verdict(found),
        ]
        for one in findings.compared
        for found in one.comparisons
    ]
    family = findings.compared[0].family if findings.compared else 0
    note = f"The verdict goes by p, corrected for {family} comparisons (Holm); intervals are not corrected."
    columns = (
        "First",
        "Second",
        "Metric",
        "Before",
        "After",
        "Difference",
        "Up, down",
        "n",
        "Seeds",
        "p",
        "Verdict",
    )
    return Table("comparisons", "Everything compared", columns, rows, note if rows else "")


def runs_table(board: Board) -> Table:
    """One row a run or trial: where it stands, its picked step with both splits' scores, QA, hours, cost, and why it ended."""
    metric, several, by_loss = board.metric, board.is_sweep, board.ranked_by[0] == LOSS
    name, keys = metric_label(metric), parameters(board)
    rows, marks = [], []
    for run in board.runs:
        best, last = picked(board, run), run.last
        point = run.trial.point if run.trial else {}
        named = [_value(point.get(key)) for key in keys] if several else [Cell(run.name)]
        below = last is not None and last.below_floor
        rows.append(
            [
                *([Cell(str(run.trial.number), run.trial.number, "number")] if run.trial else []),
                *named,
                number(run.seed),
                Cell(run.state, run.state, f"state {run.state}"),
                number(run.step),
                number(best.step if best else None),
                *([number(best.value if best else None, "{:.3f}")] if by_loss else []),
                shown(best.score(metric, "selection") if best else None),
                shown(best.score(metric, "report") if best else None),
                shown(last.score(metric) if last else None),
                _qa(last),
                _loss(run),
                number(hours(run), "{:.3f}"),
                number(cost(run), "{:.4f}"),
                Cell(cut(run.reason), run.reason, "reason"),
            ]
        )
        marks.append("grey" if below or run.state == "failed" else "")
    columns = (
        *(["#"] if several else []),
        *(keys.values() if several else ["Run"]),
        "Seed",
        "State",
        "Step",
        "Picked step",
        *(["Validation loss, picked step"] if by_loss else []),
        f"{name}, selection",
        f"{name}, report",
        f"{name}, last step",
        "QA, last step",
        "Validation loss, last" if by_loss else "Validation loss",
        "Device hours",
        "Cost",
        "Reason",
    )
    best_is = f"that of the {best_word(board)} validation loss" if by_loss else f"the {best_word(board)} {name} on the selection split"
    note = (
        f"The picked step is {best_is}; “report” is its score on the questions outside of that split, by which nothing was "
        "picked. Grey: failed, or QA coverage below the floor."
    )
    return _without_empty(Table("runs", "Trials" if several else "Runs", columns, rows, note, marks))


def steps_table(run: Run) -> Table:
    """One row an evaluated step of a run, on its primary question set and then on others."""
    rows, marks = [], []
    for one in (*run.evaluations, *run.others):
        rows.append(
            [
                number(one.step),
                Cell(one.set),
                *(shown(one.score(name)) for name in ("hit@1", "hit@3", "hit@10", "mrr")),
                _qa(one),
                number(one.coverage, "{:.1%}"),
                number(one.summary.get("questions", one.summary.get("pairs"))),
            ]
        )
        marks.append("grey" if one.below_floor else "")
    columns = ("Step", "Question set", "R@1", "R@3", "R@10", "MRR", "QA", "QA coverage", "n")
    peaks = [peak({one.step: one.summary for one in run.evaluations if one.step}, metric) for metric in ("hit@1", "qa")]
    note = " ".join(f"{one.line}." for one in peaks if one is not None)
    return _without_empty(Table("steps", "Evaluated steps", columns, rows, note, marks))


def calls_table(made: Sequence[Calls]) -> Table:
    """Calls made and saved."""
    rows = [
        [
            Cell(f"{one.kind}s"),
            Cell(", ".join(one.models)),
            number(one.asked),
            number(one.saved),
            number(one.waited),
            number(one.share, "{:.1%}"),
            number(one.cost, "{:.4f}"),
        ]
        for one in made
    ]
    unpriced = sum(one.unpriced for one in made)
    note = f"The cost of {unpriced} evaluations is not known: their model has no price in the recipe." if unpriced else ""
    columns = ("Calls", "Model", "Made", "Saved by the ledger", "of these waited for", "Share saved", "Cost")
    return _without_empty(Table("calls", "Calls made and saved", columns, rows, note))


def skipped_table(board: Board) -> Table:
    """Combinations that a condition of the space took out."""
    skipped = board.plan.skipped if board.plan else ()
    rows = [[Cell(shown_point(one.get("point", {}))), Cell(str(one.get("reason", "")))] for one in skipped]
    return Table("skipped", "Skipped combinations", ("Point", "Reason"), rows)


def as_csv(board: Board) -> str:
    """One row a run, question set and evaluated step, with all of its numbers."""
    rows: list[dict[str, Any]] = []
    for run in board.runs:
        point = run.trial.point if run.trial else {}
        whole = {
            "run": run.name,
            **{f"point/{key}": point.get(key) for key in parameters(board)},
            "seed": run.seed,
            "state": run.state,
            "reason": run.reason,
            "device_hours": round(hours(run), 6),
        }
        rows += [{**whole, **_numbers(run, one)} for one in (*run.evaluations, *run.others)] or [{**whole, "step": run.step}]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _no_formula(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _no_formula(value: Any) -> Any:
    """A cell of the CSV; a text that a spreadsheet would take for a formula begins with an apostrophe."""
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{value}"
    return "" if value is None else value


def best_word(board: Board) -> str:
    """What the value that a board ranks by is at its best."""
    metric, mode = board.ranked_by
    return "lowest" if mode == "min" else "highest" if metric == LOSS else "best"


def _numbers(run: Run, one: Evaluation) -> dict[str, Any]:
    found: dict[str, Any] = {"set": one.set, "step": one.step, "questions": one.summary.get("questions", one.summary.get("pairs"))}
    for part in ("all", "selection", "report"):
        for metric in (*ARTICLE_METRICS, "qa"):
            score = one.score(metric, part)
            if score is not None:
                found |= {f"{metric}/{part}{end}": getattr(score, key) for end, key in _ENDS.items()}
    if one.asked:
        whole = one.summary["qa"]["all"]
        found |= {
            "qa/coverage": whole["coverage"],
            "qa/floor": one.floor,
            "qa/bound_low": whole["bounds"][0],
            "qa/bound_high": whole["bounds"][1],
        }
        found |= {f"questions/{state}": whole["states"].get(state, 0) for state in STATES}
    for name in ("validation/loss", "train/loss", "train/temperature"):
        found[name] = dict(run.series(name)).get(one.step)
    found |= {f"timings/{name}": value for name, value in one.summary.get("timings", {}).items()}
    for kind, made in one.summary.get("calls", {}).items():
        found |= {
            f"calls/{kind}/{name}": made.get(name) for name in ("asked", "hits", "waited", "prompt_tokens", "completion_tokens", "cost")
        }
    return found


_ENDS = {"": "value", "/low": "low", "/high": "high", "/n": "n"}


def _qa(one: Evaluation | None) -> Cell:
    if one is not None and one.below_floor:
        return Cell(f"no score: coverage {one.coverage:.1%}, floor {one.floor:.1%}", -1.0, "muted")
    return shown(one.score("qa") if one else None)


def _loss(run: Run) -> Cell:
    losses = run.series("validation/loss")
    return number(losses[-1][1] if losses else None, "{:.3f}")


def _value(value: Any) -> Cell:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return Cell(DASH if value is None else str(value))
    return Cell(f"{value:g}", value, "number")


def cut(text: str) -> str:
    """A reason on one line, and no longer than a table can show."""
    flat = " ".join(text.split())
    return flat if len(flat) <= _LONGEST_REASON else flat[: _LONGEST_REASON - 1] + "…"


def _without_empty(table: Table) -> Table:
    """The same less the columns that say nothing in any row."""
    kept = [place for place in range(len(table.columns)) if any(row[place].text not in ("", DASH) for row in table.rows)]
    rows = [[row[place] for place in kept] for row in table.rows]
    return replace(table, columns=[table.columns[place] for place in kept], rows=rows)


def _plain(metric: str) -> str:
    return "".join(one if one.isalnum() else "-" for one in metric)


def names_below_floor(board: Board) -> list[str]:
    """The runs whose last evaluation asked a reader and has too few grades for a score, each with its coverage."""
    return [
        f"{label(run)} ({one.coverage:.1%} of {one.summary.get('questions')} questions, floor {one.floor:.1%})"
        for run in board.runs
        if (one := run.last) is not None and one.below_floor
    ]

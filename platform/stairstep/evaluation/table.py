"""Scores as plain text for the terminal: one line a metric, its interval beside it, the number of questions at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .question_set import RetrievalResult
from .questions_answered import qa_line
from .statistics import Interval


def result_table(result: RetrievalResult, title: str) -> str:
    """A result's scores below a title, with the QA score where questions were answered."""
    lines = [score_table(result.scores, title)]
    return "\n".join([*lines, *qa_lines(result)] if result.qa else lines)


def qa_lines(result: RetrievalResult) -> list[str]:
    """The QA score, its two parts by retrieval outcome, why answers are missing, and what was asked and found."""
    whole = [qa_line(result.qa["all"])]
    seen, missed = result.qa["retrieved"], result.qa["missed"]
    if seen.interval is not None and missed.interval is not None:
        shown = f"{short(seen.interval.value)} of {seen.interval.n} with a golden tile in the top {result.facts['top_k_read']}"
        whole.append(f"      {shown}, {short(missed.interval.value)} of the {missed.interval.n} others")
    whole += missing_lines(result.facts["missing"])
    for kind, calls in result.facts["calls"].items():
        if calls["asked"] or calls["hits"]:
            whole.append(_calls_line(kind, calls))
    return whole


def _calls_line(kind: str, calls: Mapping[str, Any]) -> str:
    """What was asked, in how many requests if not in this process, what was found, and what it cost."""
    requests = f" in {calls['requests']} requests" if "requests" in calls else ""
    cost = f", cost {calls['cost']:.4f}" if calls.get("cost") is not None else ""
    unknown = f", cost unknown: {calls['unpriced']}" if "unpriced" in calls else ""
    return f"      {kind}s by {calls['model']}: {calls['asked']} asked{requests}, {calls['hits']} found in the ledger{cost}{unknown}"


def missing_lines(missing: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why answers or grades are missing: a line a reason."""
    return [f"      {one['questions']} × {one['reason']}" for one in missing]


def score_table(scores: Mapping[str, Interval], title: str = "") -> str:
    """Aligned lines such as `R@1  .312  [.284 .341]  n=1000`, below an optional title."""
    cells = [(metric_label(name), short(one.value), f"[{short(one.low)} {short(one.high)}]", f"n={one.n}") for name, one in scores.items()]
    widths = [max((len(cell[column]) for cell in cells), default=0) for column in range(4)]
    lines = [title] if title else []
    for label, value, interval, n in cells:
        lines.append(f"{label:<{widths[0]}}  {value:>{widths[1]}}  {interval:<{widths[2]}}  {n}")
    return "\n".join(lines)


def short(value: float) -> str:
    """Three decimals without a leading zero: .312, 1.000, -.020; a dash where there is no value."""
    if math.isnan(value):
        return "-"
    text = f"{value:.3f}"
    if float(text) == 0:
        return ".000"
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def metric_label(name: str) -> str:
    """A metric as a table names it: R@1, MRR, NDCG@5."""
    return name.replace("hit@", "R@") if name.startswith("hit@") else name.upper()

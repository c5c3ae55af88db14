"""Advice as a person reads it: the facts, then a row a key with its rule below it."""

from __future__ import annotations

import textwrap

from .advice import Advice
from .rules import Value

WIDTH = 140


def show(advice: Advice) -> str:
    """The facts, and key, the recipe's value now, the proposed one, what it rests on, and the rule."""
    lines = []
    for heading, said in advice.facts:
        lines += textwrap.wrap(said, WIDTH, initial_indent=f"{heading:<8}", subsequent_indent=" " * 8)
    rows = [("key", "now", "proposed", "")]
    rows += [(one.key, plain(advice.now(one.key)), plain(one.value), one.basis) for one in advice.proposals]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines += ["", _row(rows[0], widths)]
    for one, row in zip(advice.proposals, rows[1:], strict=True):
        lines.append(_row(row, widths))
        lines += textwrap.wrap(one.rule, WIDTH, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def plain(value: Value) -> str:
    """A value as YAML has it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _row(cells: tuple[str, str, str, str], widths: list[int]) -> str:
    return "  ".join([*(f"{cell:<{width}}" for cell, width in zip(cells[:3], widths, strict=True)), cells[3]]).rstrip()

"""The board for a terminal: what is said above it, and its tables in aligned columns."""

from __future__ import annotations

from . import words
from .compute import find
from .page import tables_of
from .read import Board, Folders
from .tables import Table


def board_text(board: Board, folders: Folders) -> str:
    """Headline, tables and what to know, as the page has them."""
    findings = find(board, folders)
    said, below = words.headline(board, findings)
    tables = [table_text(one) for several in tables_of(board, findings).values() for one in several]
    told = [f"- {one}" for one in words.warnings(board, findings, ())]
    return "\n\n".join(
        ["\n".join(filter(None, (board.title, said, below))), *tables, *(["\n".join(["What to know", *told])] if told else [])]
    )


def table_text(table: Table) -> str:
    """A table in aligned columns below its title; numbers to the right."""
    columns = [[head, *(row[place].text for row in table.rows)] for place, head in enumerate(table.columns)]
    widths = [max(map(len, column)) for column in columns]
    right = [bool(table.rows) and all("number" in row[place].mark for row in table.rows) for place in range(len(table.columns))]
    lines = [
        "  ".join(
            text.rjust(width) if flush else text.ljust(width) for text, width, flush in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in zip(*columns, strict=True)
    ]
    return "\n".join([table.title, *lines, *([table.note] if table.note else [])])

"""The board for a terminal: what is said above it, and its tables in aligned columns.

Names and reasons are other people's text: what a terminal would take for a command of its own is dropped from every line.
"""

from __future__ import annotations

import unicodedata

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
    told = [f"- {printed(one)}" for one in words.warnings(board, findings, ())]
    return "\n\n".join(
        [
            "\n".join(map(printed, filter(None, (board.title, said, below)))),
            *tables,
            *(["\n".join(["What to know", *told])] if told else []),
        ]
    )


def table_text(table: Table) -> str:
    """A table in aligned columns below its title; numbers to the right."""
    columns = [[printed(head), *(printed(row[place].text) for row in table.rows)] for place, head in enumerate(table.columns)]
    widths = [max(map(len, column)) for column in columns]
    right = [bool(table.rows) and all("number" in row[place].mark for row in table.rows) for place in range(len(table.columns))]
    lines = [
        "  ".join(
            text.rjust(width) if flush else text.ljust(width) for text, width, flush in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in zip(*columns, strict=True)
    ]
    return "\n".join([printed(table.title), *lines, *([printed(table.note)] if table.note else [])])


def printed(text: str) -> str:
    """A text as one line without control characters, marks of direction and halves of letters."""
    flat = text.replace("\n", " ").replace("\t", " ")
    return "".join(one for one in flat if unicodedata.category(one) not in ("Cc", "Cf", "Cs"))

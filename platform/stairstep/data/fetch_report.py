"""What a fetch found, counted without unpacking anything, and the table that a person reads.

Rows and questions are counted as the readers will meet them, from the files alone, a JSONL in blocks. How many files a tar holds is asked
of whoever reads tars (`CountTar`): what came from outside is counted under the very bounds and refusals that hold when it is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from stairstep.settings import DataError

from .settings import FetchSource

if TYPE_CHECKING:
    from .fetch import Fetched

UNITS = {".jsonl": "rows", ".json": "questions", ".tar": "files"}
CountTar = Callable[[Path], int]
"""How many files a tar holds, or a DataError where it cannot be read."""
_BLOCK = 1 << 20
_LARGEST_JSON = 1 << 29


@dataclass(frozen=True)
class Count:
    """How many there are of what was expected; `problem` says why they could not be counted."""

    name: str
    unit: str
    expected: int
    found: int
    problem: str = ""

    @property
    def right(self) -> bool:
        """Whether there are as many as expected."""
        return not self.problem and self.found == self.expected

    def line(self) -> str:
        """One line for a person."""
        if self.problem:
            return f"✗ {self.name}: expected {self.expected:,} {self.unit}; {self.problem}"
        if self.right:
            return f"✓ {self.name}: {self.found:,} {self.unit}"
        many = f"{abs(self.found - self.expected):,} too {'many' if self.found > self.expected else 'few'}"
        return f"✗ {self.name}: expected {self.expected:,} {self.unit}, found {self.found:,} ({many})"


def count_expected(source: FetchSource, folder: Path, paths: Sequence[str], count_tar: CountTar) -> tuple[Count, ...]:
    """What a source expects against what lies in its folder; `paths` are its files."""
    return tuple(_count(name, expected, folder, paths, count_tar) for name, expected in source.expect.items())


def _count(name: str, expected: int, folder: Path, paths: Sequence[str], count_tar: CountTar) -> Count:
    unit = UNITS[Path(name).suffix]
    files = [name] if name in paths else [one for one in paths if fnmatchcase(one, name)]
    if not files:
        return Count(name, unit, expected, 0, "the repository has no such file, or `include` leaves it out")
    found = 0
    for file in files:
        try:
            found += count_in(folder / file, count_tar)
        except DataError as error:
            return Count(name, unit, expected, found, str(error))
    return Count(name, unit, expected, found)


def count_in(path: Path, count_tar: CountTar) -> int:
    """Rows of a .jsonl, questions of a .json, files in a .tar."""
    counts: dict[str, Callable[[Path], int]] = {".jsonl": _rows, ".json": _questions, ".tar": count_tar}
    try:
        return counts[path.suffix](path)
    except FileNotFoundError:
        raise DataError(f"{path} is not there") from None


def _rows(path: Path) -> int:
    """Lines that are not blank; a line may be longer than memory."""
    count, filled = 0, False
    with open(path, "rb") as file:
        while piece := file.readline(_BLOCK):
            filled = filled or bool(piece.strip())
            if piece.endswith(b"\n"):
                count, filled = count + filled, False
    return count + filled


def _questions(path: Path) -> int:
    if path.stat().st_size > _LARGEST_JSON:
        raise DataError(f"{path} is too large for a question set")
    try:
        tree = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    questions = tree.get("questions") if isinstance(tree, dict) else None
    if not isinstance(questions, list):
        raise DataError(f"{path} holds no list of questions")
    return len(questions)


def summary(results: Sequence[Fetched]) -> str:
    """A table of the sources, what is wrong with them, and the counts."""
    head = ("repository", "commit", "files", "bytes", "there", "fetched", "seconds", "folder")
    rows = [head] + [
        (
            one.source.repo,
            one.commit[:12],
            f"{one.files:,}",
            bytes_text(one.size),
            f"{one.files - one.fetched - len(one.wrong):,}",
            f"{one.fetched:,} ({bytes_text(one.fetched_size)})",
            f"{one.seconds:.1f}",
            str(one.folder),
        )
        for one in results
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    left = (0, 1, len(head) - 1)
    lines = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines += [f"✗ {told}" for one in results for told in one.wrong]
    lines += [f"{count.line()} ({one.source.repo})" for one in results for count in one.counts]
    lines += [
        f"{one.source.repo}: to take this very state again, say revision: {one.commit}"
        for one in results
        if one.source.revision != one.commit
    ]
    return "\n".join(line.rstrip() for line in lines)


def bytes_text(size: float) -> str:
    """A number of bytes for a person, in powers of 1000 as disks have it."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def seconds_text(seconds: float) -> str:
    """A duration for a person."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

"""What the figures share: which runs belong together and their colours, and the axes of parallel coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .compute import group
from .read import Board, Run

# Told apart by people who see few colours (after Okabe and Ito).
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c8c8c")
_LOG_SPAN = 50.0


class Groups:
    """Which runs belong together (seeds of one point), and the colour that they share."""

    def __init__(self, board: Board) -> None:
        self._first = {group(run): run for run in reversed(board.runs)}
        self._places = {name: place for place, name in enumerate(dict.fromkeys(map(group, board.runs)))}

    def __len__(self) -> int:
        return len(self._places)

    def colour(self, run: Run) -> str:
        """The colour of its group."""
        return PALETTE[self._places[group(run)] % len(PALETTE)]

    def is_first(self, run: Run) -> bool:
        """Whether it stands for its group in a legend."""
        return self._first[group(run)] is run


class Axis:
    """One axis of the parallel coordinates: values to heights from 0 to 1; words each have their place, numbers their scale."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.values = values
        known = [one for one in values if one is not None]
        self.numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in known)
        self.words = [] if self.numbers else sorted({str(one) for one in known}, key=[str(one) for one in known].index)
        if self.numbers:
            self.low, self.high = min(known), max(known)
            self.log = self.low > 0 and self.high / self.low >= _LOG_SPAN

    def at(self, place: int) -> float | None:
        """The height of one value; None where it is not known."""
        value = self.values[place]
        if value is None:
            return None
        if not self.numbers:
            return self._word(str(value))
        scale = math.log if self.log else float
        return rounded((scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low)))

    def said(self, place: int) -> str:
        """One value in words."""
        value = self.values[place]
        return f"{value:.4g}" if self.numbers and value is not None else str(value)

    def ticks(self) -> list[tuple[float, str]]:
        """Heights with what stands beside them."""
        if not self.numbers:
            return [(self._word(word), word if len(word) < 22 else word[:21] + "…") for word in self.words]
        return [(0.0, f"{self.low:.3g}"), (1.0, f"{self.high:.3g}")]

    def _word(self, word: str) -> float:
        return self.words.index(word) / max(1, len(self.words) - 1)


def rounded(value: float) -> float:
    """Five digits: as many as a figure can show."""
    return float(f"{value:.5g}")

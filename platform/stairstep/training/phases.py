"""Which kind of batch a step trains on, and which number that batch has among its kind: pure functions of the step.

A share of text steps is exact: after n steps of a part, floor(n · share) of them were text. Batches are numbered within their kind, so
a text step takes nothing away from the tiles' order of batches.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from .settings import PhaseSettings

Kind = Literal["text", "tile"]


@dataclass(frozen=True)
class _Part:
    first: int  # number of steps before this part
    length: int
    share: Fraction
    texts_before: int


class PhasePlan:
    """The phases of a run of `steps` steps; steps are counted from 1."""

    def __init__(self, settings: PhaseSettings, steps: int) -> None:
        warmup = min(settings.text_warmup_steps, steps)
        shares = settings.text_curriculum or (settings.text_mix,)
        rest = steps - warmup
        edges = [warmup + rest * index // len(shares) for index in range(len(shares) + 1)]
        spans = [(0, warmup, 1.0), *((edges[i], edges[i + 1] - edges[i], share) for i, share in enumerate(shares))]
        self.warmup_steps = warmup
        self._parts: list[_Part] = []
        texts = 0
        for first, length, share in spans:
            exact = Fraction(str(share))
            self._parts.append(_Part(first, length, exact, texts))
            texts += int(length * exact)

    def texts_until(self, step: int) -> int:
        """How many of the steps 1 … step are text steps."""
        part = self._parts[max(0, bisect_right([one.first for one in self._parts], step) - 1)]
        return part.texts_before + int((step - part.first) * part.share)

    def kind(self, step: int) -> Kind:
        """Whether `step` trains on text pairs or on query–tile pairs."""
        return "text" if self.texts_until(step) > self.texts_until(step - 1) else "tile"

    def ordinal(self, step: int) -> int:
        """The number, from 0, of this step's batch among the batches of its kind."""
        texts = self.texts_until(step)
        return texts - 1 if self.kind(step) == "text" else step - texts - 1

    def name(self, step: int) -> str:
        """The phase as logs and checkpoints name it."""
        return "text_warmup" if step <= self.warmup_steps else "main"

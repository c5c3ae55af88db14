"""The glyph stage: which characters lie under each merged token of the vision tower, told by a throwaway linear head.

Without it the language side learns the habits of the text while the vision tower gets no signal, for thousands of steps.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from stairstep.models.tower import tower_features
from stairstep.tiny.articles import Library
from stairstep.tiny.render import HEIGHT, WIDTH, Drawing, TilePage
from stairstep.training import EvaluationReport, StepReport

from .ahead import Batch
from .base import Pretraining, report_of
from .pages import as_tensor, generic_page, manner_of
from .settings import GlyphsTaskSettings, Look

if TYPE_CHECKING:
    from ..recipe import Recipe

FIRST, LAST = 33, 126  # printable ASCII
CELL = 32
_SHARE = 0.25  # of a character's box that must lie in a cell to count there


def labels(characters: Sequence[tuple[str, int, int, int, int]]) -> np.ndarray:
    """Which characters lie in each 32×32 cell of a page: uint8 [cells, characters]."""
    rows, columns = HEIGHT // CELL, WIDTH // CELL
    found = np.zeros((rows, columns, LAST - FIRST + 1), dtype=np.uint8)
    for character, left, top, right, bottom in characters:
        code = ord(character) - FIRST
        if not 0 <= code <= LAST - FIRST:
            continue
        area = (right - left) * (bottom - top)
        for row in range(top // CELL, min(rows - 1, (bottom - 1) // CELL) + 1):
            for column in range(left // CELL, min(columns - 1, (right - 1) // CELL) + 1):
                wide = min(right, (column + 1) * CELL) - max(left, column * CELL)
                high = min(bottom, (row + 1) * CELL) - max(top, row * CELL)
                if wide * high >= _SHARE * area:
                    found[row, column, code] = 1
    return found.reshape(rows * columns, -1)


def glyph_pages(rng: random.Random, count: int, look: Look) -> list[TilePage]:
    """Pages of one step: half generic, half of articles."""
    pages = [generic_page(rng, look) for _ in range(count // 2)]
    library = Library(rng, 0.0, 0.5, manner_of(look))
    while len(pages) < count:
        pages += library.family(1)[0].pages
    return pages[:count]


def drawn(rng: random.Random, pages: Sequence[TilePage], inverted: float) -> tuple[Tensor, list[Drawing]]:
    """Pages as pixels [n, 3, h, w], a share of them with inverted colours."""
    drawings = [page.drawing() for page in pages]
    return as_tensor([255 - one.pixels if rng.random() < inverted else one.pixels for one in drawings]), drawings


class GlyphsTask(Pretraining):
    """Trains the vision tower and its merger; the language model stays as it was drawn."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        assert isinstance(recipe.task, GlyphsTaskSettings)
        self.settings = recipe.task
        super().__init__(recipe, device, recipe.task.fresh, recipe.task.workers)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.model.init_seed)
            self.head = nn.Linear(self.model.config.vision_config.out_hidden_size, LAST - FIRST + 1)
        self.head.to(device)

    def groups(self) -> dict[str, list[tuple[str, Parameter]]]:
        """The tower, its merger and the head; deepstack mergers see no gradient here."""
        every = super().groups()
        merger = [(name, one) for name, one in every["merger"] if "deepstack" not in name]
        return {"vit": every["vit"], "merger": merger, "llm": [(f"head.{name}", one) for name, one in self.head.named_parameters()]}

    def own_tensors(self) -> dict[str, Tensor]:
        """The head."""
        return {name: one.data for name, one in self.head.named_parameters()}

    def make_batch(self, step: int) -> Batch:
        """Pages and the characters under their tokens."""
        return self._pages(random.Random(f"glyphs/{self.seed}/{step}"), self.batch)

    def _pages(self, rng: random.Random, count: int) -> Batch:
        pixels, drawings = drawn(rng, glyph_pages(rng, count, self.settings.look), self.settings.inverted)
        return {"pixels": pixels, "labels": torch.from_numpy(np.stack([labels(one.characters) for one in drawings]))}

    def step(self, step: int) -> StepReport:
        """One batch of pages."""
        batch, waited = self.take(step)
        with self.computing():
            logits = self._logits(batch["pixels"])
            loss = nn.functional.binary_cross_entropy_with_logits(logits, batch["labels"].float())
            loss.backward()
        return StepReport(float(loss.detach()), {"f1": f1(logits.detach(), batch["labels"])}, waited_s=waited)

    def _logits(self, pixels: Tensor) -> Tensor:
        merged: Tensor = self.head(tower_features(self.model.model.visual, pixels, self.device).merged)
        return merged

    def evaluate(self, step: int) -> EvaluationReport:
        """F1 on pages that no step has."""
        batch = self._pages(random.Random(f"glyphs/{self.seed}/held out"), self.settings.held_out)
        with self.looking():
            logits = self._logits(batch["pixels"])
        return report_of({"f1": f1(logits, batch["labels"].to(self.device))})


def f1(logits: Tensor, truth: Tensor) -> float:
    """Micro-averaged F1 of "this character lies under this token"."""
    said, true = logits > 0, truth.bool()
    both = float((said & true).sum())
    either = float(said.sum() + true.sum())
    return 2 * both / either if either else 0.0

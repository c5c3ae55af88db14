"""The glyph stage: which characters lie under each merged token of the vision tower, told by a throwaway linear head.

Without it the language side learns the habits of the text while the vision tower gets no signal, for thousands of steps. The head tells the
character at each of eight places across a token and not only the set of them: that is learned several times
faster, and in the order in which it will be read. The run begins on one font and layout, which is faster again.
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
from stairstep.tiny.render import HEIGHT, WIDTH, TilePage
from stairstep.training import EvaluationReport, StepReport

from .ahead import Batch
from .base import Pretraining, report_of
from .pages import as_tensor, generic_page, manner_of
from .settings import GlyphsTaskSettings, Look

if TYPE_CHECKING:
    from ..recipe import Recipe

FIRST, LAST = 33, 126  # printable ASCII
CLASSES = LAST - FIRST + 2  # and nothing at all, which is class 0
CELL = 32
_WIDE, _HIGH = 4, 32  # of a place, in pixels: narrower than the narrowest letter, and as high as a line
PLACES = (CELL // _WIDE) * (CELL // _HIGH)


def labels(characters: Sequence[tuple[str, int, int, int, int]]) -> np.ndarray:
    """The character at each place under each 32×32 cell of a page, or 0: uint8 [cells, places]."""
    rows, columns = HEIGHT // _HIGH, WIDTH // _WIDE
    found = np.zeros((rows, columns), dtype=np.uint8)
    narrow = []
    for character, left, top, right, bottom in characters:
        code = ord(character) - FIRST + 1
        if not 1 <= code < CLASSES:
            continue
        row = min(rows - 1, (top + bottom) // 2 // _HIGH)
        under = [place for place in range(left // _WIDE, min(columns - 1, (right - 1) // _WIDE) + 1) if left <= _centre(place) < right]
        found[row, under] = code
        if not under:
            narrow.append((row, min(columns - 1, (left + right) // 2 // _WIDE), code))
    for row, place, code in narrow:
        if not found[row, place]:
            found[row, place] = code
    cells = found.reshape(HEIGHT // CELL, CELL // _HIGH, WIDTH // CELL, CELL // _WIDE)
    return cells.transpose(0, 2, 1, 3).reshape(-1, PLACES)


def _centre(place: int) -> int:
    return place * _WIDE + _WIDE // 2


def glyph_pages(rng: random.Random, count: int, look: Look) -> list[TilePage]:
    """Pages of one step: half generic, half of articles."""
    pages = [generic_page(rng, look) for _ in range(count // 2)]
    library = Library(rng, 0.0, 0.5, manner_of(look))
    while len(pages) < count:
        pages += library.family(1)[0].pages
    return pages[:count]


class GlyphsTask(Pretraining):
    """Trains the vision tower and its merger; the language model stays as it was drawn."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        assert isinstance(recipe.task, GlyphsTaskSettings)
        self.settings = recipe.task
        super().__init__(recipe, device, recipe.task.fresh, recipe.task.workers)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.model.init_seed)
            self.head = nn.Linear(self.model.config.vision_config.out_hidden_size, PLACES * CLASSES)
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
        look: Look = "one" if step <= self.settings.one_look * self.steps else self.settings.look
        return self._pages(random.Random(f"glyphs/{self.seed}/{step}"), self.batch, look)

    def _pages(self, rng: random.Random, count: int, look: Look) -> Batch:
        drawings = [page.drawing() for page in glyph_pages(rng, count, look)]
        told = np.stack([labels(one.characters) for one in drawings])
        return {"pixels": as_tensor([one.pixels for one in drawings]), "labels": torch.from_numpy(told)}

    def step(self, step: int) -> StepReport:
        """One batch of pages."""
        batch, waited = self.take(step)
        with self.computing():
            logits = self._logits(batch["pixels"])
            loss = nn.functional.cross_entropy(logits, batch["labels"].flatten().long())
            loss.backward()
        return StepReport(float(loss.detach()), {"accuracy": accuracy(logits.detach(), batch["labels"])}, waited_s=waited)

    def _logits(self, pixels: Tensor) -> Tensor:
        said: Tensor = self.head(tower_features(self.model.model.visual, pixels, self.device).merged)
        return said.view(-1, CLASSES)

    def evaluate(self, step: int) -> EvaluationReport:
        """Characters told on pages that no step has."""
        batch = self._pages(random.Random(f"glyphs/{self.seed}/held out"), self.settings.held_out, self.settings.look)
        with self.looking():
            logits = self._logits(batch["pixels"])
        return report_of({"accuracy": accuracy(logits, batch["labels"].to(self.device))})


def accuracy(logits: Tensor, truth: Tensor) -> float:
    """The share of places with a character whose character was told."""
    there = truth.flatten() > 0
    return float((logits.argmax(-1)[there] == truth.flatten()[there]).float().mean())

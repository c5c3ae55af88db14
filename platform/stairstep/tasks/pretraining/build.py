"""From a recipe to the pretraining task that it names."""

from __future__ import annotations

import torch

from ..recipe import Recipe
from .glyphs import GlyphsTask
from .matching import MatchingTask
from .reading import ReadingTask

_TASKS: dict[str, type[GlyphsTask] | type[ReadingTask] | type[MatchingTask]] = {
    "glyphs": GlyphsTask,
    "reading": ReadingTask,
    "matching": MatchingTask,
}


def pretraining_task(recipe: Recipe, device: torch.device) -> GlyphsTask | ReadingTask | MatchingTask:
    """The task of one stage of a tiny model's pretraining."""
    return _TASKS[recipe.task.kind](recipe, device)

"""What a reader has to compare before it answers: is the tile about the thing that the question names, and where is the value asked for?

Learned from answers alone it did not come: a model that takes the right kind of value from any page is right as long as most pages are.
So the language model is told directly, through heads that are thrown away: which qualifier the question names, two layers before the end
and at that word's last letter; then, one layer later, where the kind of value asked for stands on the page, and, at the token that the
answer begins from, both qualifiers, the question's and the page's. To tell whether they are the same is left to the last layer and the
answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from stairstep.models.prompts import Prompts
from stairstep.tiny.articles import Fact, Title
from stairstep.tiny.kinds import KINDS
from stairstep.tiny.render import HEIGHT, WIDTH, Drawing

from .ahead import Batch
from .glyphs import CELL
from .samples import BLANK, Drill

QUALIFIERS = {word: index for index, word in enumerate(dict.fromkeys(word for kind in KINDS for word, _ in kind.qualifiers))}
NONE = len(QUALIFIERS)  # of a blank tile
_COLUMNS = WIDTH // CELL
_CELLS = HEIGHT // CELL * _COLUMNS
_OTHER_WEIGHT = 0.2  # most tokens hold no value of the kind asked for


class Comparing(nn.Module):
    """The heads and their loss."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.named = _head(width, len(QUALIFIERS))
        self.asked = _head(width, len(QUALIFIERS))
        self.shown = _head(width, len(QUALIFIERS) + 1)
        self.cells = _head(width, 2)

    def forward(self, states: Sequence[Tensor], visual: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The losses by name; `states` is what the last two layers were given, `visual` marks the tiles' tokens."""
        before, last = (one.float() for one in states)
        ends = last.flatten(0, 1)[batch["ends"]]
        weights = torch.tensor([_OTHER_WEIGHT, 1.0], device=last.device)
        loss = nn.functional.cross_entropy
        return {
            "named": loss(self.named(before.flatten(0, 1)[batch["named"]]), batch["qualifiers"]),
            "asked": loss(self.asked(ends), batch["qualifiers"]),
            "shown": loss(self.shown(ends), batch["shown"]),
            "cells": loss(self.cells(last[visual]), batch["cells"].flatten().long(), weights),
        }


def _head(width: int, labels: int) -> nn.Module:
    return nn.Sequential(nn.RMSNorm(width), nn.Linear(width, labels))


def comparison_labels(prompts: Prompts, practice: Drill, drawings: Sequence[Drawing], rows: Sequence[Sequence[int]], width: int) -> Batch:
    """What the heads are to tell of a drill whose samples are questions about one tile, asked by prompts of these tokens.

    `named` is where the qualifiers' last letters stand and `ends` where the answers begin from, both flat over rows of `width` tokens."""
    named, ends, qualifiers, shown, cells = [], [], [], [], []
    for index, (sample, row) in enumerate(zip(practice.samples, rows, strict=True)):
        assert sample.about is not None
        (tile,), (article, fact) = sample.tiles, sample.about
        place, qualifier = named_qualifier(sample.question, article.title)
        text = prompts.text(sample.question, 1)
        before = len(prompts.tokenizer(text[: text.index(sample.question)], add_special_tokens=False)["input_ids"])
        named.append(index * width + before + place)  # a token is a letter
        ends.append(index * width + len(row) - 1)
        qualifiers.append(qualifier)
        other = practice.articles[tile] if tile != BLANK else None
        shown.append(NONE if other is None else QUALIFIERS[other.title.word])
        cells.append(asked_cells(drawings[tile], practice.facts[tile], fact) if tile != BLANK else np.zeros(_CELLS, dtype=np.uint8))
    return {
        "named": torch.tensor(named),
        "ends": torch.tensor(ends),
        "qualifiers": torch.tensor(qualifiers),
        "shown": torch.tensor(shown),
        "cells": torch.from_numpy(np.stack(cells)),
    }


def asked_cells(drawing: Drawing, facts: Sequence[Fact], asked: Fact) -> np.ndarray:
    """1 for each 32×32 cell of a page under which a value of the kind asked for lies, whosever it is: uint8 [cells]."""
    found = np.zeros(_CELLS, dtype=np.uint8)
    text = "".join(character for character, *_ in drawing.characters)
    for fact in (one for one in facts if one.kind == asked.kind):
        start = text.rindex(fact.value)
        for _, left, top, right, bottom in drawing.characters[start : start + len(fact.value)]:
            found[(top + bottom) // 2 // CELL * _COLUMNS + (left + right) // 2 // CELL] = 1
    return found


def named_qualifier(question: str, asked: Title) -> tuple[int, int]:
    """Where in a question the qualifier of the title ends, as the place of its last letter, and the qualifier's number."""
    words = (asked.word, asked.word.lower(), asked.synonym)
    for start in ("the ", ""):  # a template may have the word too, as in high water
        for word in words:
            found = re.search(rf"\b{start}{re.escape(word)}\b", question)
            if found:
                return found.end() - 1, QUALIFIERS[asked.word]
    raise AssertionError(f"'{question}' names neither '{asked.word}' nor '{asked.synonym}'")


@contextmanager
def states_on_the_way(model: nn.Module) -> Iterator[list[Tensor]]:
    """What the language model's last two layers are given, [B, L, d] each, once a forward pass was made under this."""
    layers = model.get_submodule("model.language_model.layers")
    assert isinstance(layers, nn.ModuleList)
    states: list[Tensor] = []
    handles = [layer.register_forward_pre_hook(lambda _, given: states.append(given[0])) for layer in list(layers)[-2:]]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()

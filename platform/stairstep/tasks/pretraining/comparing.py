"""What a reader has to compare before it answers: is the tile about the thing that the question names, and where is the value asked for?

Learned from answers alone this comes last or never: a model that takes the right kind of value from any page is right most of the time.
So the language model is told directly, at each visual token, through a head that is thrown away. It reads the states before the last
layer, since the last one is where the answer looks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from torch import Tensor, nn

from stairstep.tiny.articles import Article, Fact, Title
from stairstep.tiny.render import HEIGHT, WIDTH, Drawing

from .glyphs import CELL

OTHER, NAMED, UNNAMED, ASKED = range(
    4
)  # nothing of these, the title as the question has it, a title that differs, the kind of value asked for
LABELS = 4
OTHER_WEIGHT = 0.2  # most tokens are of this label
_COLUMNS = WIDTH // CELL
CELLS = HEIGHT // CELL * _COLUMNS


def comparison(drawing: Drawing, shown: Article, asked: Article, fact: Fact) -> np.ndarray:
    """The label of each 32×32 cell of a page of the article `shown` under a question about a fact of `asked`: uint8 [cells]."""
    found = np.full(CELLS, OTHER, dtype=np.uint8)
    characters = iter(drawing.characters)
    for differs, (_, *box) in zip(_differing(shown.title, asked.title), characters, strict=False):
        cell = _cell(*box)
        found[cell] = UNNAMED if differs or found[cell] == UNNAMED else NAMED
    text = "".join(character for character, *_ in drawing.characters)
    for other in shown.facts:
        start = text.rfind(other.value) if other.kind == fact.kind else -1
        for _, *box in drawing.characters[start : start + len(other.value)] if start >= 0 else ():
            found[_cell(*box)] = ASKED
    return found


def _cell(left: int, top: int, right: int, bottom: int) -> int:
    return (top + bottom) // 2 // CELL * _COLUMNS + (left + right) // 2 // CELL


def _differing(shown: Title, asked: Title) -> Iterator[bool]:
    """For each drawn character of a title (spaces are not drawn) whether another one stands there in the title asked for."""
    names = iter(asked.name.split())
    for word in shown.text.split():
        if word.strip("()") == shown.word:
            yield from [shown.word != asked.word] * len(word)
            continue
        wanted = next(names, "")
        for place, character in enumerate(word):
            last = place + 1 == len(word)
            yield not wanted.startswith(character, place) or (last and len(wanted) > len(word))


@contextmanager
def states_before_the_last_layer(model: nn.Module) -> Iterator[list[Tensor]]:
    """What the language model's last layer is given, [B, L, d], once a forward pass made under this."""
    layers = model.get_submodule("model.language_model.layers")
    assert isinstance(layers, nn.ModuleList)
    states: list[Tensor] = []
    handle = layers[-1].register_forward_pre_hook(lambda _, given: states.append(given[0]))
    try:
        yield states
    finally:
        handle.remove()

"""What a reader has to compare before it answers: is the tile about the thing that the question names, and where is the value asked for?

Learned from answers alone this comes last or never: a model that takes the right kind of value from any page is right most of the time.
So the language model is told directly, through heads that are thrown away: which qualifier the question names, at its last letter and two
layers before the end; and at each visual token, one layer later, whether the title there is the one that is named and the value the one
that is asked for. The last layer is where the answer looks. Two words are compared once both are known as such.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from torch import Tensor, nn

from stairstep.tiny.articles import Article, Fact, Title
from stairstep.tiny.kinds import KINDS
from stairstep.tiny.render import HEIGHT, WIDTH, Drawing

from .glyphs import CELL

OTHER, NAMED, UNNAMED, ASKED = range(
    4
)  # nothing of these, the title as the question has it, a title that differs, the kind of value asked for
LABELS = 4
WEIGHTS = (0.2, 1.0, 2.0, 1.0)  # most tokens are nothing of these, and of titles more agree than differ
QUALIFIERS = {word: index for index, word in enumerate(dict.fromkeys(word for kind in KINDS for word, _ in kind.qualifiers))}
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


def named_qualifier(question: str, asked: Title) -> tuple[int, int]:
    """Where in a question the qualifier of the title ends, as the place of its last letter, and the qualifier's number."""
    for word in (asked.word, asked.word.lower(), asked.synonym):
        found = re.search(rf"\b{re.escape(word)}\b", question)
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

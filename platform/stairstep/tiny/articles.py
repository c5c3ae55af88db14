"""Articles of tinywiki: families of near-equal titles, their facts, and the pages that show each fact once.

A family's members carry the same name under another qualifier (a painter and a pilot) or the same qualifier under a respelled name (River
Torv, River Torva), the same kinds of fact and other values. Within a family no value occurs twice and none is part of a title, so a fact
can be read from one tile only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .fonts import WORLD_FONTS
from .kinds import FILLERS, KINDS, FactKind, Kind
from .layouts import SHIFTED_LAYOUTS, WORLD_LAYOUTS
from .render import Line, TilePage, fits, wrap
from .words import respelled, world_name, year

TILES = 3
_SIZES = (20, 18, 16)
_PATTERNS = (("facts", "facts", "text"), ("facts", "text", "text"))
_MOST = {"facts": 3, "text": 2}


@dataclass(frozen=True)
class Fact:
    """A fact of an article, its value, and the tile that shows it."""

    kind: FactKind
    value: str
    chunk: int


@dataclass(frozen=True)
class Title:
    """What an article is called: its name, its qualifier with a synonym, and the family of names that it belongs to."""

    kind: Kind
    name: str
    word: str
    synonym: str

    @property
    def text(self) -> str:
        """The title as the page shows it."""
        return self.kind.title.format(name=self.name, word=self.word)


@dataclass(frozen=True)
class Article:
    """An article: its id (also the beginning of its tiles' file names), title, facts and pages."""

    id: str
    family: str
    title: Title
    facts: tuple[Fact, ...]
    pages: tuple[TilePage, ...]

    def passage(self, chunk: int) -> str:
        """The text of one tile with its lines joined: title, then one line for each fact, or the sentences."""
        rows = self.pages[chunk].rows
        title = " ".join(row.text for row in rows if row.role == "title")
        facts = [row.plain for row in rows if row.role == "fact"]
        sentences = " ".join(row.text for row in rows if row.role == "text")
        return "\n".join([title, *facts, *([sentences] if sentences else [])])

    def tile_name(self, chunk: int, distractor: bool = False) -> str:
        """The file name of one of the article's tiles."""
        return f"{'dist_' if distractor else ''}{self.id}_chunk_{chunk}.png"


def article_id(title: str) -> str:
    """A title as the beginning of a file name: lower case, words joined by underscores."""
    return "_".join(word.strip("()").lower() for word in title.split())


@dataclass(frozen=True)
class Manner:
    """What articles are written and set with: names, fonts, layouts, and the layouts of the shifted ones."""

    name: Callable[[random.Random, int], str]
    fonts: tuple[str, ...]
    layouts: tuple[str, ...]
    shifted: tuple[str, ...]


WORLD = Manner(world_name, WORLD_FONTS, WORLD_LAYOUTS, SHIFTED_LAYOUTS)


class Library:
    """Makes families of articles without end, none with a title that another one has or that is in `taken`, to which it adds its own."""

    def __init__(
        self,
        rng: random.Random,
        near_duplicates: float,
        layout_shift: float,
        manner: Manner = WORLD,
        taken: set[str] | None = None,
    ) -> None:
        self._rng = rng
        self._manner = manner
        self._near_duplicates = near_duplicates
        self._layout_shift = layout_shift
        self._taken = set() if taken is None else taken

    def family(self, most: int) -> list[Article]:
        """The next family: one article, or up to `most` (three at the most) with near-equal titles."""
        rng = self._rng
        size = rng.choice((2, 2, 3)) if rng.random() < self._near_duplicates else 1
        titles = self._titles(min(size, most))
        values = _Values(rng, self._manner.name, {word.strip("()") for title in titles for word in title.text.split()})
        kinds = rng.sample(titles[0].kind.facts, len(titles[0].kind.facts))
        return [self._article(title, article_id(titles[0].text), kinds, values) for title in titles]

    def _titles(self, size: int) -> list[Title]:
        rng = self._rng
        while True:
            kind = rng.choice(KINDS)
            words = rng.sample(kind.qualifiers, size)
            name = f"{self._name(5)} {self._name(6)}" if kind.two_names else self._name(7)
            titles = [Title(kind, name, *words[0])]
            for pair in words[1:]:
                titles.append(Title(kind, respelled(rng, name), *words[0]) if rng.random() < 0.3 else Title(kind, name, *pair))
            texts = {title.text for title in titles}
            if len(texts) == size and not texts & self._taken:
                self._taken |= texts
                return titles

    def _name(self, longest: int) -> str:
        return self._manner.name(self._rng, longest)

    def _article(self, title: Title, family: str, kinds: Iterable[FactKind], values: _Values) -> Article:
        rng = self._rng
        font = rng.choice(self._manner.fonts)
        layout = rng.choice(self._manner.shifted if rng.random() < self._layout_shift else self._manner.layouts)
        first = rng.choice((0, 0, 1))
        waiting = [(kind, values.next(kind.value)) for kind in kinds]
        rng.shuffle(waiting)
        for size in _SIZES[first:]:
            setter = _Setter(random.Random(rng.getrandbits(64)), title.text, layout, font, size)
            pages, facts = setter.pages(waiting)
            if pages:
                return Article(article_id(title.text), family, title, facts, pages)
        raise AssertionError(f"the title '{title.text}' and a fact fit no page in layout {layout}, {font}")


class _Values:
    """Years and names for the facts of one family, none of them twice and none a word of its titles."""

    def __init__(self, rng: random.Random, name: Callable[[random.Random, int], str], taken: set[str]) -> None:
        self._rng, self._name, self._taken = rng, name, taken

    def next(self, kind: str) -> str:
        while True:
            value = year(self._rng) if kind == "year" else self._name(self._rng, 7)
            if value not in self._taken:
                self._taken.add(value)
                return value


class _Setter:
    """Sets one article's facts on its pages, in one layout, font and size."""

    def __init__(self, rng: random.Random, title: str, layout: str, font: str, size: int) -> None:
        self.rng, self.layout, self.font, self.size = rng, layout, font, size
        self.title = [Line(text, role="title") for text in wrap(title, layout, font, size, bold=True)]

    def pages(self, waiting: list[tuple[FactKind, str]]) -> tuple[tuple[TilePage, ...], tuple[Fact, ...]]:
        """The pages and facts; nothing if some page could not take a single fact at this size."""
        styles = self.rng.sample(self.rng.choice(_PATTERNS), TILES)
        left, pages, facts = list(waiting), [], []
        for chunk, style in enumerate(styles):
            rows, used = self._rows(style, left[: _MOST[style]])
            if not used:
                return (), ()
            pages.append(TilePage(tuple(rows), self.layout, self.font, self.size))
            facts += [Fact(kind, value, chunk) for kind, value in left[:used]]
            left = left[used:]
        return tuple(pages), tuple(facts)

    def _rows(self, style: str, facts: list[tuple[FactKind, str]]) -> tuple[list[Line], int]:
        """The most of the facts that fit on one page, and how many they are."""
        filler = self.rng.choice(FILLERS) if self.rng.random() < 0.25 else None
        for used in range(len(facts), 0, -1):
            for last in (filler, None):
                rows = [*self.title, *self._content(style, facts[:used], last)]
                if fits(rows, self.layout, self.font, self.size):
                    return rows, used
        return [], 0

    def _content(self, style: str, facts: list[tuple[FactKind, str]], filler: str | None) -> list[Line]:
        last = [filler] if filler else []
        if style == "facts":
            return [*(Line(kind.label, value, "fact") for kind, value in facts), *(Line(text) for text in last)]
        sentences = [kind.sentence.format(value) for kind, value in facts]
        return [Line(text) for text in wrap(" ".join([*sentences, *last]), self.layout, self.font, self.size)]

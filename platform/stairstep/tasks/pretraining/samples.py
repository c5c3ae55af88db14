"""What the reader practises on at one step: pages of a few families of articles, and questions with the tiles that they are asked with.

Families bring their own hard cases: near-equal titles with the same kinds of fact and other values, and other tiles of the right article.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from stairstep.tiny.articles import Article, Fact, Library
from stairstep.tiny.asking import ask
from stairstep.tiny.phrases import TRANSCRIBE, UNKNOWN
from stairstep.tiny.render import TilePage

from .pages import MOST_LINES, generic_page, manner_of, share_at
from .settings import Look, ReadingTaskSettings

BLANK = -1
_QUESTIONS_PER_FAMILY = 12
_SHORT = 2  # lines up to which a transcription counts as one question and not as two
_NEAR_DUPLICATES, _SHIFT, _PARAPHRASES = 0.6, 0.4, 0.5
_BLANKS = 0.04


@dataclass(frozen=True)
class Sample:
    """A question, the tiles that it is asked with (indices of pages, or BLANK), the right answer, and the fact asked for, if one is."""

    question: str
    tiles: tuple[int, ...]
    answer: str
    about: tuple[Article, Fact] | None = None


@dataclass(frozen=True)
class Drill:
    """The pages of one step with the article of each (none for a page without meaning) and the facts that it shows, and its samples, all of
    as many tiles."""

    pages: tuple[TilePage, ...]
    articles: tuple[Article | None, ...]
    facts: tuple[tuple[Fact, ...], ...]
    samples: tuple[Sample, ...]


class Shelf:
    """Articles with their pages in one row, and the tiles that are near each of them."""

    def __init__(self, articles: Sequence[Article]) -> None:
        self.articles = tuple(articles)
        self.pages: list[TilePage] = []
        self.owners: list[Article] = []  # of each page
        self.facts: list[tuple[Fact, ...]] = []  # of each page
        self._first: dict[str, int] = {}
        self._families: dict[str, list[Article]] = {}
        for article in articles:
            self._first[article.id] = len(self.pages)
            self.pages += article.pages
            self.owners += [article] * len(article.pages)
            self.facts += [tuple(fact for fact in article.facts if fact.chunk == chunk) for chunk in range(len(article.pages))]
            self._families.setdefault(article.family, []).append(article)

    def tile(self, article: Article, chunk: int) -> int:
        """The index of one of an article's tiles."""
        return self._first[article.id] + chunk

    def wrong(
        self, rng: random.Random, article: Article, fact: Fact, count: int, blanks: float = _BLANKS, same_fact: float = 0.0
    ) -> list[int]:
        """Tiles that do not hold the fact: other tiles of its article, tiles of near-equal titles, tiles of anything; with a chance of
        `same_fact` each is drawn from those that show the same kind of fact, whosever it is."""
        right = self.tile(article, fact.chunk)
        own = [tile for tile in range(self._first[article.id], self._first[article.id] + len(article.pages)) if tile != right]
        siblings = [one for one in self._families[article.family] if one.id != article.id]
        near = [self.tile(one, chunk) for one in siblings for chunk in range(len(one.pages))]
        same = [self.tile(one, other.chunk) for one in siblings for other in one.facts if other.kind == fact.kind]
        alike = self._showing(fact) if same_fact else []
        chosen: list[int] = []
        while len(chosen) < count:
            if alike and rng.random() < same_fact:
                pool: Sequence[int] = alike
            else:
                chance = rng.random()
                pool = same if chance < 0.2 else near if chance < 0.4 else own if chance < 0.65 else range(len(self.pages))
            tile = rng.choice(pool) if pool else rng.randrange(len(self.pages))
            if tile != right and tile not in chosen:
                chosen.append(BLANK if rng.random() < blanks else tile)
        return chosen

    def _showing(self, fact: Fact) -> list[int]:
        return [tile for tile, facts in enumerate(self.facts) if any(one.kind == fact.kind for one in facts)]


def drill(settings: ReadingTaskSettings, seed: int, step: int, steps: int, batch: int) -> Drill:
    """What a step of a run practises."""
    rng = random.Random(f"reading/{seed}/{step}")
    look = settings.look
    if rng.random() < share_at(settings.transcription, step, steps):
        lines = int(share_at(settings.lines, step, steps))
        count = batch if lines <= _SHORT else max(1, batch // 2)
        return transcriptions(rng, count, look, settings.meaningless, lines)
    most = int(share_at(settings.tiles, step, steps))
    tiles = 1 if most == 1 else rng.choice((1, *range(1, most + 1), most))
    return questions(rng, look, batch, tiles, share_at(settings.unknown, step, steps), settings.same_fact)


def transcriptions(rng: random.Random, count: int, look: Look, meaningless: float = 0.5, lines: int = MOST_LINES) -> Drill:
    """Pages to be read out whole: words without meaning, of which none can be guessed, and articles."""
    pages = [generic_page(rng, look, lines) for _ in range(round(count * meaningless))]
    articles: list[Article | None] = [None] * len(pages)
    facts: list[tuple[Fact, ...]] = [()] * len(pages)
    library = Library(rng, 0.0, _SHIFT, manner_of(look))
    while len(pages) < count:
        shelf = Shelf(library.family(1))
        pages += shelf.pages
        articles += shelf.owners
        facts += shelf.facts
    samples = [Sample(TRANSCRIBE, (index,), "\n".join(page.lines)) for index, page in enumerate(pages[:count])]
    return Drill(tuple(pages[:count]), tuple(articles[:count]), tuple(facts[:count]), tuple(samples))


def questions(rng: random.Random, look: Look, count: int, tiles: int, unknown: float, same_fact: float = 0.0) -> Drill:
    """Questions about a few families, each with so many tiles."""
    library = Library(rng, _NEAR_DUPLICATES, _SHIFT, manner_of(look))
    families = max(3, count // _QUESTIONS_PER_FAMILY)
    shelf = Shelf([article for _ in range(families) for article in library.family(3)])
    samples = []
    for _ in range(count):
        article = rng.choice(shelf.articles)
        fact = rng.choice(article.facts)
        asked = ask(rng, article, fact, rng.random() < _PARAPHRASES)
        known = rng.random() >= unknown
        chosen = shelf.wrong(rng, article, fact, tiles - known, same_fact=same_fact)
        if known:
            chosen.append(shelf.tile(article, fact.chunk))
        rng.shuffle(chosen)
        samples.append(Sample(asked.text, tuple(chosen), fact.value if known else UNKNOWN, (article, fact)))
    return _pruned(shelf, samples)


def _pruned(shelf: Shelf, samples: Sequence[Sample]) -> Drill:
    """Without the pages that no sample shows."""
    shown = sorted({tile for one in samples for tile in one.tiles if tile != BLANK})
    place = {tile: index for index, tile in enumerate(shown)} | {BLANK: BLANK}
    told = tuple(replace(one, tiles=tuple(place[tile] for tile in one.tiles)) for one in samples)
    return Drill(
        tuple(shelf.pages[tile] for tile in shown),
        tuple(shelf.owners[tile] for tile in shown),
        tuple(shelf.facts[tile] for tile in shown),
        told,
    )

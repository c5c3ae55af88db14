"""Questions about facts, and the hard negatives of a fact: tiles that nearly answer it.

A plain question uses the words of the tile; a paraphrase asks with others and mostly names the article by the synonym of its qualifier.
Negatives come hardest first: the same fact of a near-equal title, other tiles of that title, then the same fact of other articles with
the same qualifier and of the same kind. None is of the article itself, so none holds the answer.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .articles import Article, Fact
from .kinds import FactKind

NEGATIVES = 4
_SCARCE = 0.05  # this share of rows lists fewer negatives than it could: rows of real data do


@dataclass(frozen=True)
class Asked:
    """A question about one fact of one article."""

    article: Article
    fact: Fact
    text: str

    @property
    def answer(self) -> str:
        """The value asked for."""
        return self.fact.value


def mention(rng: random.Random, article: Article, paraphrase: bool) -> str:
    """How a question names an article: by its title, or by its name and its qualifier or that one's synonym."""
    title = article.title
    chance = rng.random()
    if paraphrase and chance < 0.6:
        return f"the {title.synonym} {title.name}"
    return f"the {title.word.lower()} {title.name}" if chance < (0.85 if paraphrase else 0.4) else title.text


def ask(rng: random.Random, article: Article, fact: Fact, paraphrase: bool) -> Asked:
    """A question about a fact, in the words of the tile or in others."""
    template = rng.choice(fact.kind.paraphrases if paraphrase else fact.kind.plain)
    return Asked(article, fact, template.format(it=mention(rng, article, paraphrase)))


def ask_about(rng: random.Random, article: Article, count: int, paraphrases: float) -> list[Asked]:
    """Questions about `count` different facts of an article, from as many of its tiles as can be."""
    shuffled = rng.sample(article.facts, len(article.facts))
    seen: dict[int, int] = defaultdict(int)
    ranked = []
    for fact in shuffled:
        ranked.append((seen[fact.chunk], fact))
        seen[fact.chunk] += 1
    ranked.sort(key=lambda pair: pair[0])
    return [ask(rng, article, fact, rng.random() < paraphrases) for _, fact in ranked[:count]]


class Neighbours:
    """The hard negatives among a set of articles."""

    def __init__(self, articles: Sequence[Article]) -> None:
        self._family: dict[str, list[Article]] = defaultdict(list)
        self._near: dict[tuple[str, str, FactKind], list[tuple[Article, int]]] = defaultdict(list)
        self._far: dict[tuple[str, FactKind], list[tuple[Article, int]]] = defaultdict(list)
        for article in articles:
            self._family[article.family].append(article)
            kind = article.title.kind.name
            for fact in article.facts:
                self._near[kind, article.title.word, fact.kind].append((article, fact.chunk))
                self._far[kind, fact.kind].append((article, fact.chunk))

    def of(self, rng: random.Random, asked: Asked) -> list[tuple[Article, int]]:
        """Tiles (article, chunk) that nearly answer a question, hardest first, none twice."""
        count = rng.randrange(2) if rng.random() < _SCARCE else NEGATIVES
        chosen: dict[tuple[str, int], tuple[Article, int]] = {}
        for article, chunk in self._candidates(rng, asked):
            if len(chosen) == count:
                break
            if article.id != asked.article.id:
                chosen.setdefault((article.id, chunk), (article, chunk))
        return list(chosen.values())

    def _candidates(self, rng: random.Random, asked: Asked) -> Iterator[tuple[Article, int]]:
        title = asked.article.title
        siblings = self._family[asked.article.family]
        same = [(one, fact.chunk) for one in siblings for fact in one.facts if fact.kind == asked.fact.kind]
        other = [(one, chunk) for one in siblings for chunk in range(len(one.pages))]
        yield from rng.sample(same, len(same))
        yield from rng.sample([pair for pair in other if pair[0].id != asked.article.id], max(0, len(other) - len(asked.article.pages)))[:1]
        for pool in (self._near[title.kind.name, title.word, asked.fact.kind], self._far[title.kind.name, asked.fact.kind]):
            yield from rng.sample(pool, min(len(pool), NEGATIVES))

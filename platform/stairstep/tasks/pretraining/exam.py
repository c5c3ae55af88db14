"""Exams on tinywiki worlds: what a reader answers, and what an embedder finds, in worlds that no pretraining step shows anything of."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from stairstep.data.settings import WorldSettings
from stairstep.evaluation.statistics import Interval, wilson
from stairstep.models.reading import Reader
from stairstep.tiny.asking import Asked
from stairstep.tiny.layouts import SHIFTED_LAYOUTS
from stairstep.tiny.phrases import UNKNOWN
from stairstep.tiny.render import TilePage, fits
from stairstep.tiny.tinywiki import build_world

from .pages import as_tensor
from .samples import Shelf

Asking = tuple[str, list[Tensor]]


@dataclass(frozen=True, eq=False)
class Exam:
    """The questions of one world with their tiles."""

    seed: int
    asked: tuple[Asked, ...]
    shelf: Shelf

    @cached_property
    def pixels(self) -> Tensor:
        """All tiles, uint8 [n, 3, h, w]."""
        return as_tensor([page.render() for page in self.shelf.pages])

    def rng(self, part: str) -> random.Random:
        """Chance for one part of the exam."""
        return random.Random(f"exam/{self.seed}/{part}")

    def right_tile(self, asked: Asked) -> int:
        """The tile that holds a question's answer."""
        return self.shelf.tile(asked.article, asked.fact.chunk)


@lru_cache(maxsize=2)
def open_exam(seed: int, questions: int) -> Exam:
    """The exam of the world with this seed: three tiles an article, two articles for every three questions."""
    articles = max(4, 2 * ((questions + 1) // 2))
    world = build_world(WorldSettings(seed=seed, articles=articles, questions=questions, pairs=1, text_pairs=0))
    return Exam(seed, world.questions.asked, Shelf(world.questions.articles))


def reading_scores(reader: Reader, seed: int, questions: int) -> dict[str, Interval]:
    """Exact answers from the right tile alone, from three tiles, with one and with three wrong tiles, from blank tiles, swapped values."""
    exam = open_exam(seed, questions)
    return {name: _share(reader, *part(exam)) for name, part in PARTS.items()}


def _share(reader: Reader, asking: Sequence[Asking], expected: Sequence[str]) -> Interval:
    right = sum(said == wanted for said, wanted in zip(reader.answers(asking), expected, strict=True))
    return wilson(right, len(expected))


def single(exam: Exam) -> tuple[list[Asking], list[str]]:
    """Each question with its right tile alone."""
    return [(one.text, [exam.pixels[exam.right_tile(one)]]) for one in exam.asked], [one.answer for one in exam.asked]


def three(exam: Exam) -> tuple[list[Asking], list[str]]:
    """Each question with its right tile and two wrong ones, in any order."""
    rng = exam.rng("three")
    asking = []
    for one in exam.asked:
        tiles = [exam.right_tile(one), *exam.shelf.wrong(rng, one.article, one.fact, 2, blanks=0)]
        rng.shuffle(tiles)
        asking.append((one.text, [exam.pixels[tile] for tile in tiles]))
    return asking, [one.answer for one in exam.asked]


def _wrong(exam: Exam, part: str, tiles: int) -> tuple[list[Asking], list[str]]:
    rng = exam.rng(part)
    chosen = [exam.shelf.wrong(rng, one.article, one.fact, tiles, blanks=0) for one in exam.asked]
    asking = [(one.text, [exam.pixels[tile] for tile in wrong]) for one, wrong in zip(exam.asked, chosen, strict=True)]
    return asking, [UNKNOWN] * len(asking)


def wrong_tile(exam: Exam) -> tuple[list[Asking], list[str]]:
    """Each question with one wrong tile: another tile of its article, one of a near-equal title, any tile."""
    return _wrong(exam, "wrong tile", 1)


def wrong(exam: Exam) -> tuple[list[Asking], list[str]]:
    """Each question with three wrong tiles of these kinds."""
    return _wrong(exam, "wrong", 3)


def blank(exam: Exam) -> tuple[list[Asking], list[str]]:
    """Each question with an empty tile, counted right if the answer comes all the same: a reader that cheats."""
    empty = torch.full_like(exam.pixels[0], 255)
    return [(one.text, [empty]) for one in exam.asked], [one.answer for one in exam.asked]


def swapped(exam: Exam) -> tuple[list[Asking], list[str]]:
    """Each question with its right tile in which another value stands; the other value is then the answer."""
    rng = exam.rng("swapped")
    asking, expected = [], []
    for one in exam.asked:
        values = [other.answer for other in exam.asked if other.fact.kind.value == one.fact.kind.value and other.answer != one.answer]
        rng.shuffle(values)
        page = exam.shelf.pages[exam.right_tile(one)]
        for value in values[:20]:
            if value in " ".join(page.lines):
                continue
            changed = page.exchanged(one.answer, value)
            if fits(changed.rows, changed.layout, changed.font, changed.size):
                asking.append((one.text, [as_tensor([changed.render()])[0]]))
                expected.append(value)
                break
    return asking, expected


PARTS: dict[str, Callable[[Exam], tuple[list[Asking], list[str]]]] = {
    "single": single,
    "wrong_tile": wrong_tile,
    "three": three,
    "wrong_tiles": wrong,
    "blank": blank,
    "swapped": swapped,
}


def retrieval_scores(
    encode_texts: Callable[[Sequence[str]], Tensor], encode_tiles: Callable[[Tensor], Tensor], seed: int, questions: int, batch: int = 256
) -> dict[str, Interval]:
    """How many questions find a tile of their article first: all, and by whether the article has one of the world's unusual layouts."""
    exam = open_exam(seed, questions)
    texts = [one.text for one in exam.asked]
    queries = torch.cat([encode_texts(texts[start : start + batch]) for start in range(0, len(texts), batch)])
    tiles = torch.cat([encode_tiles(exam.pixels[start : start + batch]) for start in range(0, len(exam.pixels), batch)])
    owners = [article.id for article in exam.shelf.articles for _ in article.pages]
    best = (queries @ tiles.T).argmax(1).tolist()
    hits = [owners[tile] == one.article.id for tile, one in zip(best, exam.asked, strict=True)]
    shifted = [_is_shifted(one.article.pages[0]) for one in exam.asked]
    ordinary = [hit for hit, unusual in zip(hits, shifted, strict=True) if not unusual]
    unusual = [hit for hit, unusual in zip(hits, shifted, strict=True) if unusual]
    return {
        "hit@1": wilson(sum(hits), len(hits)),
        "hit@1_ordinary": wilson(sum(ordinary), len(ordinary)),
        "hit@1_shifted": wilson(sum(unusual), len(unusual)),
    }


def _is_shifted(page: TilePage) -> bool:
    return page.layout in SHIFTED_LAYOUTS

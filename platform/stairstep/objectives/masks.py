"""Which documents are candidates of which query: every document of the global batch, less the false negatives.

A document that is the positive of any row with the same query text is never a negative of that text: such a text shares its positives,
and in each of its rows the other rows' positives are left out of the comparison rather than pushed away. Other tiles of a positive's
article are left out too, even where a row names them as hard negatives, for evaluation counts them as hits. Ids are compared, not tensors:
a tile's id is its content's, so the same tile under two paths is one document.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .settings import MaskSettings

Id = TypeVar("Id", bound=Hashable)


@dataclass(frozen=True)
class Candidates:
    """The comparisons of one global batch of Q query rows and D distinct documents."""

    positive: Tensor  # long [Q]: the column of each row's own positive
    allowed: Tensor  # bool [Q, D]: the row's positive and its negatives
    masked_pairs: int  # pairs that are neither

    @property
    def negatives(self) -> Tensor:
        """bool [Q, D]: the allowed pairs, less each row's own positive."""
        return self.allowed.scatter(1, self.positive[:, None], False)

    @property
    def negative_pairs(self) -> int:
        """How many pairs are negatives, known without asking the device."""
        return self.allowed.numel() - self.masked_pairs - len(self.positive)

    def to(self, device: torch.device | str) -> Candidates:
        """The same on another device."""
        return Candidates(self.positive.to(device), self.allowed.to(device), self.masked_pairs)


def distinct(ids: Sequence[Id]) -> tuple[list[Id], list[int]]:
    """The distinct ids in order of first appearance, and for each given id its place among them."""
    place: dict[Id, int] = {}
    index = [place.setdefault(one, len(place)) for one in ids]
    return list(place), index


def candidates(
    queries: Sequence[Hashable],
    positives: Sequence[Hashable],
    documents: Sequence[Hashable],
    articles: Sequence[Hashable | None] | None,
    settings: MaskSettings,
) -> Candidates:
    """The candidates of each row: `queries` texts and `positives` document ids by row, `documents` distinct ids and their `articles`.

    An article of None is unknown and masks nothing. The result lies on the CPU.
    """
    if len(queries) != len(positives):
        raise ValueError(f"{len(queries)} queries but {len(positives)} positives: each row has one of each")
    if articles is not None and len(articles) != len(documents):
        raise ValueError(f"{len(documents)} documents but {len(articles)} articles: each document has one, or None")
    column = {one: place for place, one in enumerate(documents)}
    if len(column) != len(documents):
        raise ValueError(f"{len(documents)} documents of which {len(column)} are distinct: each document is given once")
    missing = [one for one in positives if one not in column]
    if missing:
        raise ValueError(f"the positive {missing[0]!r} is not among the batch's documents")

    texts, text_of = distinct(queries)
    positive = torch.tensor([column[one] for one in positives], dtype=torch.long)
    row_text = torch.tensor(text_of, dtype=torch.long)
    hits = torch.zeros(len(texts), len(documents), dtype=torch.bool)  # by text: what would be a right answer
    hits[row_text, positive] = True
    if settings.same_article and articles is not None:
        hits |= _same_article(hits, articles)
    allowed = ~hits[row_text]
    allowed.scatter_(1, positive[:, None], True)
    return Candidates(positive, allowed, allowed.numel() - int(allowed.sum()))


def _same_article(hits: Tensor, articles: Sequence[Hashable | None]) -> Tensor:
    """bool [T, D]: documents whose known article is that of one of the text's positives."""
    names, article = distinct(articles)
    known = torch.tensor([one is not None for one in articles], dtype=torch.bool)
    columns = torch.tensor(article, dtype=torch.long)
    texts, tiles = hits.nonzero(as_tuple=True)
    by_article = torch.zeros(hits.shape[0], len(names), dtype=torch.bool)
    by_article[texts, columns[tiles]] = True
    return by_article[:, columns] & known

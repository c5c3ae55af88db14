"""What a proposal needs to know of the data: rows by article, the largest tile of a sample, the longest text.

Data that is not on this machine stops nothing: it is told, and what depends on it falls back to what is published and to the largest
tile that the recipe allows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from stairstep.data import counts_of, read_pairs
from stairstep.settings import InputError

from ..batches import article_from
from ..doctor import Patient, inputs
from ..doctor.findings import NotLooked
from ..recipe import Recipe
from ..resolve import data_base, resolve


@dataclass(frozen=True)
class Facts:
    """Rows by source and by article (by tile where names say no article), a tile's resized size, texts; `said` in words."""

    said: str
    sizes: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    articles: bool = False
    tile: tuple[int, int] | None = None
    texts: tuple[str, ...] = ()

    def fits(self, recipe: Recipe) -> Callable[[int], bool]:
        """Whether the recipe's sources can fill a batch of some size without a row twice."""

        def filled(batch: int) -> bool:
            try:
                taken = counts_of(recipe.data.train, batch)
            except InputError:
                return False
            return all(count <= size for count, size in zip(taken, self.sizes, strict=True))

        return filled


def read_facts(recipe: Recipe) -> Facts:
    """Everything that the data says, or why it says nothing."""
    try:
        resolved = resolve(recipe)
        base, roots = data_base(resolved), resolved.data.roots
        sources = [read_pairs(one, roots, base, resolved.data.hard_negatives) for one in resolved.data.train]
        quick = Patient(resolved, deep=False, resolved=True)
        inputs.pairs(quick)
    except InputError as error:
        return Facts(f"not read, so that published values and the recipe's largest tile stand in for it: {error}")
    rows = [row for source in sources for row in source]
    articles = [article_from(row.positive) for row in rows]
    counts = Counter(article or str(row.positive) for article, row in zip(articles, rows, strict=True))
    known = bool(rows) and None not in articles
    tile, said = _largest_tile(quick)
    return Facts(
        f"{len(rows):,} rows of {len(counts):,} {'articles' if known else 'tiles'} to train on; {said}",
        tuple(map(len, sources)),
        tuple(counts.values()),
        known,
        tile,
        tuple(row.passage for row in quick.texts),
    )


def _largest_tile(patient: Patient) -> tuple[tuple[int, int] | None, str]:
    """The largest of the few tiles that the doctor's quick part decodes."""
    try:
        answer = inputs.tiles(patient)
    except (NotLooked, InputError) as error:
        return None, f"no tile was looked at ({error})"
    if patient.tile_size is None:
        return None, f"no tile could be decoded ({answer.said})"
    height, width = patient.tile_size
    tokens = patient.recipe.tiles.geometry().visual_tokens(height, width)
    return patient.tile_size, f"the largest tile of a small sample is {width}×{height} pixels after resizing, {tokens} visual tokens"

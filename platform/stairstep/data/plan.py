"""The plan of batches: which rows make up the global batch of a step, as a function of seed, epoch and step alone.

Nothing is remembered between steps, so a resumed run, a second worker or a test asks for any step and gets the same batch. Every
batch is full and holds exactly `counts[s]` rows of source s; each source runs through its own epochs, and each of its epochs visits each
row once. Where an epoch ends within a batch, the next one begins within it, arranged so that no row is twice in a batch; a batch that
takes more rows of a source than it has could not keep that and is an error.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np

from stairstep.settings import DataError, InputError

from .settings import Order, PairSource, TextSource

T = TypeVar("T")
Rows = np.ndarray[tuple[int], np.dtype[np.int64]]


class BatchPlan:
    """The batches of a run over sources with `sizes[s]` rows, of which each batch takes `counts[s]`; steps count from 0."""

    def __init__(
        self, sizes: Sequence[int], counts: Sequence[int], seed: int, order: Order = "shuffled", names: Sequence[str] = ()
    ) -> None:
        if not sizes or len(sizes) != len(counts) or min(counts) < 1:
            raise ValueError(f"expected one count of at least 1 for each source, found sizes {list(sizes)} and counts {list(counts)}")
        for source, (size, count) in enumerate(zip(sizes, counts, strict=True)):
            if count > size:
                name = names[source] if names else f"source {source}"
                raise DataError(
                    f"{name}: each batch takes {count} rows of it and it has only {size}, so that a row would be twice in a batch;"
                    f" lower the batch or this source's count to at most {size}, or give it more rows"
                )
        self.sizes, self.counts, self.seed, self.order = tuple(sizes), tuple(counts), seed, order

    def batch(self, step: int) -> list[tuple[int, int]]:
        """The (source, row) of each row of the global batch of a step, source by source."""
        if step < 0:
            raise ValueError(f"steps count from 0, found {step}")
        return [(source, row) for source in range(len(self.sizes)) for row in self._rows(source, step)]

    def epoch(self, step: int) -> int:
        """How many times all rows of all sources were visited before this step."""
        return min(step * count // size for size, count in zip(self.sizes, self.counts, strict=True))

    def _rows(self, source: int, step: int) -> list[int]:
        size, count = self.sizes[source], self.counts[source]
        epoch, start = divmod(step * count, size)
        rows: list[int] = []
        while len(rows) < count:
            stop = min(size, start + count - len(rows))
            if self.order == "shuffled":
                rows += _order(size, count, self.seed, source, epoch)[start:stop].tolist()
            elif self.order == "sequential":
                rows += range(start, stop)
            else:
                rows += range(size - 1 - start, size - 1 - stop, -1)
            epoch, start = epoch + 1, 0
        return rows


@lru_cache(maxsize=64)
def _order(size: int, count: int, seed: int, source: int, epoch: int) -> Rows:
    """The rows of one epoch of one source in the order of their visit.

    Its first rows may share a batch with the last rows of the epoch before and must then be others. They are exchanged for the next
    fitting ones; in a source of at least two batches this leaves the end of the epoch as it was, so that the epoch before need not be
    repaired itself to know its end. In a smaller source the repairs are followed from the last epoch that began with a batch.
    """
    begins_batch = count // math.gcd(size, count)
    first = epoch - epoch % begins_batch
    if size >= 2 * count:
        first = max(first, epoch - 1)
    rows = _shuffled(size, f"plan/{seed}/{source}/{first}")
    for one in range(first + 1, epoch + 1):
        shared = one * size % count
        rows = _apart(_shuffled(size, f"plan/{seed}/{source}/{one}"), rows[size - shared :], count - shared)
    rows.setflags(write=False)
    return rows


def _apart(rows: Rows, taken: Rows, head: int) -> Rows:
    """The rows with none of `taken` among the first `head`: each such one changes place with the next later one that is not taken."""
    bad = np.isin(rows, taken)
    wrong = np.flatnonzero(bad[:head])
    good = head + np.flatnonzero(~bad[head:])[: len(wrong)]
    rows[wrong], rows[good] = rows[good], rows[wrong]
    return rows


def _shuffled(size: int, key: str) -> Rows:
    """A permutation by a text key: random words sorted, for a bit generator's raw words are the same in every version of numpy."""
    digest = hashlib.sha256(key.encode()).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16], "big")).random_raw(size)
    return np.argsort(words, kind="stable")


def share(batch: Sequence[T], rank: int, world: int) -> Sequence[T]:
    """The contiguous slice of the batch for one of `world` workers; the slices in rank order are the batch."""
    if not 0 <= rank < world:
        raise ValueError(f"expected a rank from 0 to {world - 1}, found {rank}")
    return batch[rank * len(batch) // world : (rank + 1) * len(batch) // world]


def counts_of(sources: Sequence[PairSource] | Sequence[TextSource], batch: int) -> tuple[int, ...]:
    """How many rows of each batch come from each source: as its settings say; those that do not say share the rest evenly."""
    if not sources:
        raise InputError("no source of rows is given; name at least one file under data.train (or data.text)")
    given = sum(source.count or 0 for source in sources)
    silent = sum(source.count is None for source in sources)
    rest = batch - given
    said = ", ".join(f"{source.path}: {source.count if source.count is not None else 'the rest'}" for source in sources)
    if not silent and rest:
        raise InputError(
            f"the counts of the sources add up to {given} and the batch is {batch} ({said}); make them equal, or leave one count out"
        )
    if rest < silent:
        raise InputError(
            f"the counts of the sources leave {max(rest, 0)} of the batch of {batch} rows for {silent} further source(s) ({said});"
            " lower a count, raise the batch, or remove a source"
        )
    counts, place = [], 0
    for source in sources:
        if source.count is None:
            counts.append(rest // silent + (place < rest % silent))
            place += 1
        else:
            counts.append(source.count)
    return tuple(counts)


def fixed_sample(n_rows: int, count: int, seed: int) -> list[int]:
    """`count` distinct rows of a split, drawn over the whole of it, the same in every run with this seed; all of a smaller split."""
    if count < 1:
        raise ValueError(f"expected a sample of at least 1 row, found {count}")
    return [int(row) for row in _shuffled(n_rows, f"sample/{seed}")[:count]]

"""From rows to one global batch: distinct documents, their ids and sizes, and which tiles lie in this worker's memory already.

Every worker sees the whole batch (texts, ids, sizes), because chunks, masks and the loss are global; pixels it holds only for the tiles
that it was dealt. Tiles of the coming steps are decoded ahead, each worker its own slice, and ids are exchanged, not files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from stairstep.data import PairRow, TextRow, article_of, share
from stairstep.objectives import Collective
from stairstep.tiles import Tile, TileReader

_HASH_WORDS = 4  # a SHA-256 as int64 words, to travel between workers as a tensor


@dataclass(frozen=True)
class Document:
    """A distinct document of a batch: a text or a tile, with the id by which it is the same everywhere."""

    key: str
    text: str | None = None
    path: Path | None = None
    size: tuple[int, int] = (0, 0)  # resized height and width of a tile
    article: str | None = None


@dataclass
class Batch:
    """The global batch of one step."""

    queries: list[str]
    positives: list[str]  # key of each row's positive
    documents: list[Document]
    where: list[str]
    pixels: dict[str, Tensor] = field(default_factory=dict)  # by key: tiles that this worker has decoded
    waited_s: float = 0.0


def text_batch(rows: Sequence[TextRow]) -> Batch:
    """A batch of text pairs; equal passages are one document."""
    documents: dict[str, Document] = {}

    def add(text: str) -> str:
        key = hashlib.sha256(text.encode()).hexdigest()
        documents.setdefault(key, Document(key, text=text))
        return key

    positives = []
    for row in rows:
        positives.append(add(row.passage))
        for negative in row.negatives:
            add(negative)
    return Batch([row.query for row in rows], positives, list(documents.values()), [row.where for row in rows])


def tile_paths(rows: Sequence[PairRow]) -> list[Path]:
    """The distinct tile files of some rows, in order of appearance: positive, negatives, next row."""
    return list(dict.fromkeys(path for row in rows for path in (row.positive, *row.negatives)))


class TileAhead:
    """Decodes this worker's slice of the next batches' tiles while the current step computes."""

    def __init__(self, reader: TileReader, paths: Callable[[int], list[Path] | None], collective: Collective, depth: int = 1) -> None:
        self._reader, self._paths, self._collective, self._depth = reader, paths, collective, depth
        self._running: dict[int, Iterator[Tile]] = {}

    def take(self, number: int) -> tuple[list[Tile], float]:
        """The tiles of this worker's slice of batch `number`, and the seconds waited for them; starts on the batches after it."""
        stream = self._running.pop(number, None) or self._start(number)
        tiles = list(stream) if stream is not None else []
        waited = float(getattr(stream, "waited_s", 0.0))
        self._drop(lambda other: not number < other <= number + self._depth)
        for later in range(number + 1, number + 1 + self._depth):
            if later not in self._running:
                started = self._start(later)
                if started is not None:
                    self._running[later] = started
        return tiles, waited

    def close(self) -> None:
        """Stop decoding."""
        self._drop(lambda other: True)

    def _start(self, number: int) -> Iterator[Tile] | None:
        paths = self._paths(number)
        if paths is None:
            return None
        return self._reader.ahead(share(paths, self._collective.rank, self._collective.size))

    def _drop(self, unwanted: Callable[[int], bool]) -> None:
        for number in [one for one in self._running if unwanted(one)]:
            close = getattr(self._running.pop(number), "close", None)
            if close is not None:
                close()


def tile_batch(rows: Sequence[PairRow], mine: Sequence[Tile], waited_s: float, collective: Collective) -> Batch:
    """A batch of query–tile pairs from this worker's slice of its tiles; the others' ids and sizes come from them."""
    paths = tile_paths(rows)
    facts = _exchange(mine, len(paths), collective)
    documents: dict[str, Document] = {}
    key_of: dict[Path, str] = {}
    for path, (key, size) in zip(paths, facts, strict=True):
        key_of[path] = key
        if key not in documents:
            documents[key] = Document(key, path=path, size=size, article=article_from(path))
    return Batch(
        [row.query for row in rows],
        [key_of[row.positive] for row in rows],
        list(documents.values()),
        [row.where for row in rows],
        {tile.id: tile.pixels for tile in mine},
        waited_s,
    )


def article_from(path: Path) -> str | None:
    """The article of a training tile where its name says one."""
    return article_of(path.name) if "_chunk_" in path.name else None


def _exchange(mine: Sequence[Tile], total: int, collective: Collective) -> list[tuple[str, tuple[int, int]]]:
    """Id and size of every tile of the batch, in its order, from each worker's slice."""
    counts = [len(share(range(total), rank, collective.size)) for rank in range(collective.size)]
    if len(mine) != counts[collective.rank]:
        raise ValueError(f"this worker decoded {len(mine)} tiles of its slice of {counts[collective.rank]}")
    facts = [[*_words(tile.id), tile.pixels.shape[-2], tile.pixels.shape[-1]] for tile in mine]
    local = torch.tensor(facts, dtype=torch.long).reshape(len(mine), _HASH_WORDS + 2)
    rows = collective.gather_rows(local, counts).tolist()
    return [(_hexadecimal(row[:_HASH_WORDS]), (row[_HASH_WORDS], row[_HASH_WORDS + 1])) for row in rows]


def _words(key: str) -> list[int]:
    data = bytes.fromhex(key)
    return [int.from_bytes(data[start : start + 8], "big", signed=True) for start in range(0, 32, 8)]


def _hexadecimal(words: Sequence[int]) -> str:
    return b"".join(word.to_bytes(8, "big", signed=True) for word in words).hex()


def pixels_of(batch: Batch, documents: Sequence[Document], reader: TileReader) -> list[Tensor]:
    """The pixels of some of the batch's tiles, decoding those that another worker's slice held; they stay for the second pass."""
    missing = [document for document in documents if document.key not in batch.pixels]
    if missing:
        for document, tile in zip(missing, reader.ahead([_path(one) for one in missing]), strict=True):
            batch.pixels[document.key] = tile.pixels
    return [batch.pixels[document.key] for document in documents]


def _path(document: Document) -> Path:
    assert document.path is not None, "a tile has a path"
    return document.path

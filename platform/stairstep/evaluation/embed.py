"""Embedding many tiles or texts with one encoder state: each distinct input once, in batches of one length, and none that is kept.

Tiles of one size, and texts of one number of tokens, go through the encoder together: nothing is padded, so the fast attention path
serves and no result depends on its batch mates. Decoding runs ahead in the reader's workers while the device computes. Results
come back in the order of the input. The encoder is left in the very modes that it was found in.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from stairstep.settings import StairstepError

from .embeddings import EmbeddingStore, text_embedding_key, tile_embedding_key

_log = logging.getLogger(__name__)
_SHARD_ROWS = 2048  # new embeddings kept at once: what a killed evaluation can lose
_PENDING = 4  # batches' worth of tokens that may wait for tiles of their own size
_ID_WORKERS = 8  # threads that read files not yet known by id: waiting for a disk or a network, not for a core
_LOG_EVERY_S = 15.0  # seconds between lines of progress

Role = Literal["query", "document"]
Told = Callable[[str, int, int], None]
"""Hears how far an evaluation is, again and again while it embeds: of what, how many are done, of how many."""


def nobody(what: str, done: int, of: int) -> None:
    """Who need not be told."""


class TileLike(Protocol):
    """What a reader gives for one tile: its id and its resized pixels, uint8 [3, h, w]."""

    @property
    def id(self) -> str: ...
    @property
    def pixels(self) -> Tensor: ...


class ReaderLike(Protocol):
    """The part of `tiles.TileReader` that embedding needs; `key` names all that pixels depend on besides the file."""

    @property
    def key(self) -> str: ...
    def id(self, path: Path, /) -> str: ...
    def ahead(self, paths: Sequence[Path], /) -> Iterable[TileLike]: ...


class EncoderLike(Protocol):
    """The part of `models.Encoder` that embedding needs; it is a `torch.nn.Module` too."""

    @property
    def device(self) -> torch.device: ...
    @property
    def dimension(self) -> int: ...
    def encode_texts(self, texts: Sequence[str], role: Role, /) -> Tensor: ...
    def encode_tiles(self, pixels: Sequence[Tensor], /) -> Tensor: ...
    def text_tokens(self, text: str, role: Role, /) -> int: ...
    def tile_tokens(self, height: int, width: int, /) -> int: ...
    def state_digest(self) -> str: ...
    def modules(self) -> Iterator[nn.Module]: ...
    def eval(self) -> Any: ...


@dataclass
class EmbedReport:
    """What embedding cost: inputs computed and found, batches and their tokens, and where the seconds went."""

    computed: int = 0
    found: int = 0
    batches: int = 0
    tokens: int = 0
    wait_s: float = 0.0
    copy_s: float = 0.0
    forward_s: float = 0.0
    identify_s: float = 0.0
    store_s: float = 0.0


@dataclass(frozen=True)
class EmbeddedTexts:
    """Vectors float32 [n, d] on the CPU, in the order of the texts."""

    vectors: Tensor
    report: EmbedReport


@dataclass(frozen=True)
class EmbeddedTiles:
    """Vectors float32 [D, d] on the CPU of the distinct tiles, with the tile id of each path and its row in `vectors`."""

    vectors: Tensor
    ids: tuple[str, ...]
    rows: tuple[int, ...]
    report: EmbedReport


class Embedder:
    """One encoder state with, where embeddings are kept, their store; build a new one once weights changed."""

    def __init__(self, encoder: EncoderLike, batch_tokens: int, store: EmbeddingStore | None = None, told: Told = nobody) -> None:
        self.encoder = encoder
        self.batch_tokens = batch_tokens
        self.told = told
        self.store = store
        self.state = encoder.state_digest()

    def texts(self, texts: Sequence[str], role: Role) -> EmbeddedTexts:
        """Embeddings of texts; equal texts are embedded once."""
        distinct = list(dict.fromkeys(texts))
        row_of = {text: row for row, text in enumerate(distinct)}
        work = _Work(self, [text_embedding_key(text, role) for text in distinct])
        lengths = {row: self.encoder.text_tokens(distinct[row], role) for row in work.missing}
        ordered = sorted(work.missing, key=lengths.__getitem__)
        batches = _batches(((row, distinct[row], lengths[row], lengths[row]) for row in ordered), self.batch_tokens)
        with _evaluating(self.encoder):
            work.run(batches, lambda batch: self.encoder.encode_texts(batch, role), f"{role} texts")
        return EmbeddedTexts(work.vectors[[row_of[text] for text in texts]], work.report)

    def tiles(self, paths: Sequence[Path], reader: ReaderLike) -> EmbeddedTiles:
        """Embeddings of the tiles under these paths; tiles of the same bytes are embedded once."""
        started = time.perf_counter()
        with ThreadPoolExecutor(_ID_WORKERS, thread_name_prefix="tile-ids") as pool:
            found = []
            for one in pool.map(reader.id, paths):
                found.append(one)
                self.told("tiles known by their content", len(found), len(paths))
            ids = tuple(found)
        identify_s = time.perf_counter() - started
        path_of: dict[str, Path] = {}
        for one, path in zip(ids, paths, strict=True):
            path_of.setdefault(one, path)
        distinct = list(path_of)
        row_of = {one: row for row, one in enumerate(distinct)}
        work = _Work(self, [tile_embedding_key(one, reader.key) for one in distinct])
        work.report.identify_s = identify_s
        wanted = [(row, path_of[distinct[row]], distinct[row]) for row in work.missing]
        with _evaluating(self.encoder), contextlib.closing(_decoded(wanted, reader, self.encoder, work.report)) as stream:
            copies = _Copies(self.encoder.device)
            work.run(_batches(stream, self.batch_tokens), lambda batch: self.encoder.encode_tiles(copies.moved(batch)), "tiles")
        work.report.copy_s = copies.seconds()
        return EmbeddedTiles(work.vectors, ids, tuple(row_of[one] for one in ids), work.report)


class _Copies:
    """Moves pixels to the encoder's device and knows how long that took there; nothing on a CPU, where they are already."""

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device(device)
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def moved(self, tiles: Sequence[Tensor]) -> Sequence[Tensor]:
        """The tiles on the device; from pinned memory without waiting for what it still computes."""
        if self.device.type != "cuda":
            return tiles
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        found = [tile.to(self.device, non_blocking=True) for tile in tiles]
        end.record()
        self._events.append((start, end))
        return found

    def seconds(self) -> float:
        """What all copies took on the device."""
        if self._events:
            torch.cuda.synchronize(self.device)
        return sum(start.elapsed_time(end) for start, end in self._events) / 1000


_Input = tuple[int, Any, Hashable, int]  # row, what is encoded, its shape, its tokens
_Batch = tuple[list[int], list[Any], int]  # rows, what is encoded, tokens


def _decoded(
    wanted: Sequence[tuple[int, Path, str]], reader: ReaderLike, encoder: EncoderLike, report: EmbedReport
) -> Generator[_Input, None, None]:
    """The wanted tiles as the reader's workers have them; the time spent waiting for them is counted."""
    if not wanted:
        return
    stream = iter(reader.ahead([path for _, path, _ in wanted]))
    try:
        for row, path, known_id in wanted:
            started = time.perf_counter()
            tile = next(stream)
            report.wait_s += time.perf_counter() - started
            if tile.id != known_id:
                raise StairstepError(f"{path}: this tile changed while it was being evaluated; run the evaluation again")
            h, w = tile.pixels.shape[1:]
            yield row, tile.pixels, (h, w), encoder.tile_tokens(h, w)
    finally:
        close = getattr(stream, "close", None)
        if close is not None:
            close()  # ends the reader's workers when the evaluation ends early


class _Work:
    """Vectors of one list of keys: those that were found, and those that batches fill in and the store then keeps."""

    def __init__(self, owner: Embedder, keys: list[bytes]) -> None:
        self.owner = owner
        self.keys = keys
        self.report = EmbedReport()
        dimension = owner.encoder.dimension
        values, found = np.zeros((len(keys), dimension), dtype=np.float32), np.zeros(len(keys), dtype=np.bool_)
        if owner.store is not None:
            started = time.perf_counter()
            values, found = owner.store.find(owner.state, keys, dimension)
            self.report.store_s += time.perf_counter() - started
        self.report.found = int(found.sum())
        self.vectors = torch.from_numpy(values)
        self.missing: list[int] = np.flatnonzero(~found).tolist()
        self._unkept: list[int] = []

    def run(self, batches: Iterable[_Batch], encode: Callable[[list[Any]], Tensor], what: str) -> None:
        """Encode batch after batch, each read back once the next is under way on the device."""
        begun = told = time.perf_counter()
        under_way: tuple[list[int], Tensor] | None = None
        for rows, items, tokens in batches:
            started = time.perf_counter()
            result = encode(items)
            if under_way is not None:
                self._take(*under_way)
            under_way = rows, result
            self.report.batches += 1
            self.report.tokens += tokens
            self.report.forward_s += time.perf_counter() - started
            if len(self._unkept) >= _SHARD_ROWS:
                self._keep()
            self.owner.told(f"{what} embedded", self.report.computed, len(self.missing))
            if time.perf_counter() - told > _LOG_EVERY_S:
                told = time.perf_counter()
                _log.info("embedding %s: %d of %d after %.0f s", what, self.report.computed, len(self.missing), told - begun)
        if under_way is not None:
            started = time.perf_counter()
            self._take(*under_way)
            self.report.forward_s += time.perf_counter() - started
        self._keep()

    def _take(self, rows: list[int], result: Tensor) -> None:
        vectors = result.to("cpu", torch.float32)
        expected = (len(rows), self.vectors.shape[1])
        if vectors.shape != expected:
            raise ValueError(f"the encoder gave vectors {tuple(vectors.shape)}: expected {expected}")
        if not torch.isfinite(vectors).all():
            raise StairstepError(
                "the encoder gave an embedding that is not finite: its weights are damaged, or its dtype overflows on this device; "
                "check the checkpoint, or evaluate with model.dtype=float32"
            )
        self.vectors[rows] = vectors
        self._unkept.extend(rows)
        self.report.computed += len(rows)

    def _keep(self) -> None:
        if self.owner.store is not None and self._unkept:
            started = time.perf_counter()
            keys = [self.keys[row] for row in self._unkept]
            self.owner.store.add(self.owner.state, keys, self.vectors[self._unkept].numpy())
            self.report.store_s += time.perf_counter() - started
        self._unkept = []


def _batches(stream: Iterable[_Input], batch_tokens: int) -> Iterator[_Batch]:
    """Batches (rows, inputs, tokens) of equal shape, each of at most `batch_tokens` or of one input that is larger.

    A batch leaves when it is full. When too much waits for mates of its own shape, the largest unfinished batch leaves as it is.
    """
    waiting: dict[Hashable, list[tuple[int, Any, int]]] = {}
    held = 0
    for row, item, shape, tokens in stream:
        group = waiting.setdefault(shape, [])
        group.append((row, item, tokens))
        held += tokens
        full = (len(group) + 1) * tokens > batch_tokens
        if full or held > _PENDING * batch_tokens:
            leaving = shape if full else max(waiting, key=lambda one: sum(entry[2] for entry in waiting[one]))
            batch = _pack(waiting.pop(leaving))
            held -= batch[2]
            yield batch
    for group in waiting.values():
        yield _pack(group)


def _pack(group: list[tuple[int, Any, int]]) -> _Batch:
    return [row for row, _, _ in group], [item for _, item, _ in group], sum(tokens for _, _, tokens in group)


@contextlib.contextmanager
def _evaluating(encoder: EncoderLike) -> Iterator[None]:
    """Evaluation mode and no gradients; afterwards every module has its own mode back (a frozen part may have had another)."""
    modes = [(module, module.training) for module in encoder.modules()]
    try:
        encoder.eval()
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode

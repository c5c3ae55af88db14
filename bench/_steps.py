"""What the benches of a training step share: a batch, the platform's own step on it, and the clocks and counters beside it.

Nothing of a recipe, a file or a task is in it: an encoder, texts and tiles in memory, GradCache. Needs torch, transformers and peft alone.
"""

from __future__ import annotations

import random
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stairstep.models.encoder import Encoder
from stairstep.objectives import (
    Chunk,
    GradCacheSettings,
    LossOutput,
    MaskSettings,
    ObjectiveSettings,
    TemperatureSettings,
    build_objective,
    cached_step,
    candidates,
    cut_batch,
    distinct,
)

SCALE = 20.0
NEGATIVES = 2
_MIB = 2**20
Loss = Callable[[Tensor, Tensor], LossOutput]


@dataclass(frozen=True)
class Batch:
    """Rows of a query, a positive and hard negatives: texts, and tiles by number."""

    queries: list[str]
    columns: list[list[int]]  # positives, first negatives, second negatives: a tile number each
    pixels: list[Tensor]

    @property
    def rows(self) -> list[int]:
        """All tiles, row by row."""
        return [column[row] for row in range(len(self.queries)) for column in self.columns]


def make_batch(rows: int, size: tuple[int, int], duplicates: bool) -> Batch:
    """Random texts and tiles; with duplicates two negatives of three are another row's positive."""
    draw, chance = torch.Generator().manual_seed(1), random.Random(1)
    queries = [f"{number}: " + "what does the page say of it " * chance.randint(1, 3) for number in range(rows)]
    columns = [list(range(start * rows, (start + 1) * rows)) for start in range(1 + NEGATIVES)]
    if duplicates:
        for place, column in enumerate(columns[1:], 1):
            column[:] = [(row + place) % rows if (row + place) % 3 else column[row] for row in range(rows)]
    used = {tile for column in columns for tile in column}
    height, width = size
    blank = torch.zeros(3, height, width, dtype=torch.uint8)
    every = range((1 + NEGATIVES) * rows)
    pixels = [torch.randint(0, 256, (3, height, width), generator=draw, dtype=torch.uint8) if tile in used else blank for tile in every]
    return Batch(queries, columns, pixels)


def moved(encoder: Encoder) -> Encoder:
    """The encoder with what it trains moved a little: LoRA's B starts at zero, and A would have no gradient to compare."""
    with torch.no_grad():
        draw = torch.Generator().manual_seed(2)
        for one in encoder.parameters():
            if one.requires_grad:
                one.add_((0.02 * torch.randn(one.shape, generator=draw)).to(one))
    return encoder


@dataclass(frozen=True)
class Kept:
    """Chunks of a step, those whose graph was kept from the first pass, and how many of either are chunks of tiles."""

    chunks: int
    kept: int
    tile_chunks: int
    tile_kept: int


class Steps:
    """An encoder with the loss, and its step as the platform makes it; `kept`: of the last one."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        temperature = TemperatureSettings(initial=1 / SCALE, learnable=False)
        self.objective = build_objective(ObjectiveSettings(temperature=temperature)).to(encoder.device)
        self.parameters: list[nn.Parameter] = [one for members in encoder.groups().values() for _, one in members]
        self.step = 0
        self.kept: Kept | None = None

    def ours(self, batch: Batch, settings: GradCacheSettings) -> float:
        """A step of the platform, with everything that it does for a batch."""
        chunks, encode, loss = self.parts(batch, settings)
        options: dict[str, Any] = {"device": self.encoder.device, "seed": 0, "step": self.step}
        encoded: Counter[int] = Counter()

        def counted(chunk: Chunk) -> Tensor:
            encoded[chunk.index] += 1
            return encode(chunk)

        keep = settings.keep_graphs_mb
        found = cached_step(chunks, counted, loss, parameters=self.parameters, keep_graphs_mb=keep, **options)
        tiles = [chunk.index for chunk in chunks if chunk.side == "document"]
        once = sum(encoded[index] == 1 for index in tiles)  # a chunk without its graph is encoded again
        self.kept = Kept(found.own_chunks, found.own_kept_chunks, len(tiles), once)
        return found.loss

    def parts(self, batch: Batch, settings: GradCacheSettings) -> tuple[list[Chunk], Callable[[Chunk], Tensor], Loss]:
        """The batch cut into chunks, how a chunk is encoded, and the loss over all."""
        documents, _ = distinct(batch.rows)
        encoder, pixels = self.encoder, batch.pixels
        costs = [encoder.tile_tokens(*pixels[tile].shape[1:]) for tile in documents]
        texts = [encoder.text_tokens(text, "query") for text in batch.queries]
        chunks = cut_batch(texts, costs, settings, document_shapes=[tuple(pixels[tile].shape[1:]) for tile in documents])
        compared = candidates(batch.queries, batch.columns[0], documents, None, MaskSettings()).to(encoder.device)

        def encode(chunk: Chunk) -> Tensor:
            if chunk.side == "query":
                return encoder.encode_texts([batch.queries[place] for place in chunk.positions], "query")
            return encoder.encode_tiles([pixels[documents[place]] for place in chunk.positions])

        return chunks, encode, lambda queries, tiles: self.objective(queries, tiles, compared)

    def clear(self) -> None:
        """Drop gradients, as the optimizer does."""
        for one in self.parameters:
            one.grad = None

    def gradient(self) -> Tensor:
        """All gradients in one float64 vector; empty before any backward."""
        found = [one.grad.flatten().double() for one in self.parameters if one.grad is not None]
        return torch.cat(found) if found else torch.empty(0, dtype=torch.float64)


# --- clocks and counters


class LiveBytes(TorchDispatchMode):
    """The peak of bytes in the storages that operations made within, on a device without counters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count the storages that are new."""
        result = func(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, Tensor):
                self._count(one.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key, size).atexit = False

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def peak_mb(step: Callable[[], float], device: torch.device) -> tuple[float, float]:
    """The loss of a step, and the most MiB that it needed at once."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss = step()
        torch.cuda.synchronize()
        return loss, (torch.cuda.max_memory_allocated() - before) / _MIB
    with LiveBytes() as meter:
        loss = step()
    return loss, meter.peak / _MIB


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()

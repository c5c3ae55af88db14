"""A trial step: one chunk of synthetic tiles forward and backward through the recipe's encoder, and the memory that it took.

The estimate of a chunk is held against what the chunk alone took: the weights and one gradient of each are in memory before it is
measured, by a smaller chunk that also loads the libraries. On a GPU it is the allocator's own peak. On a CPU it is the growth of the
resident set up to its high-water mark, which Linux lets a process set back, after the C library has given back what it holds unused. Growth
of less than `LEAST_GROWTH` drowns in what else a process does and counts as not measured, as does any other system or C library.
"""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stairstep.models.encoder import Encoder
from stairstep.objectives.chunks import cut

from ..recipe import Recipe

LEAST_GROWTH = 64 * 2**20
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Trial:
    """Bytes that a chunk of so many tiles took beyond weights and gradients (None: not measurable, `how` says why), and its seconds."""

    items: int
    measured: int | None
    seconds: float
    how: str


def trial_step(recipe: Recipe, encoder: Encoder, tile: tuple[int, int], items: int) -> Trial:
    """Measure a chunk of at most `items` tiles; where the device has no room for as many, of half as many, and so on down to one."""
    encoder.train()
    generator = torch.Generator().manual_seed(recipe.run.seed)
    try:
        _forward_and_backward(encoder, _tiles(1, tile, generator))
        while True:
            try:
                return _measured(encoder, _tiles(items, tile, generator), items)
            except torch.cuda.OutOfMemoryError:
                if items == 1:
                    raise
            torch.cuda.empty_cache()
            items //= 2
    finally:
        encoder.eval()
        encoder.zero_grad(set_to_none=True)


def items_of(recipe: Recipe, encoder: Encoder, tile: tuple[int, int], documents: int) -> int:
    """How many such tiles the recipe's chunk holds, by their true cost."""
    return len(cut([encoder.tile_tokens(*tile)] * documents, recipe.objective.gradcache)[0])


def _tiles(count: int, tile: tuple[int, int], generator: torch.Generator) -> list[Tensor]:
    return [torch.randint(0, 256, (3, *tile), dtype=torch.uint8, generator=generator) for _ in range(count)]


def _forward_and_backward(encoder: Encoder, tiles: list[Tensor]) -> None:
    vectors = encoder.encode_tiles(tiles)
    slope = torch.ones_like(vectors) / vectors.numel()
    with torch.autocast(encoder.device.type, enabled=False):
        vectors.backward(slope)


def _measured(encoder: Encoder, tiles: list[Tensor], items: int) -> Trial:
    peak, how = (_on_gpu(encoder.device) if encoder.device.type == "cuda" else _in_resident_set()), ""
    started = time.perf_counter()
    _forward_and_backward(encoder, tiles)
    if encoder.device.type == "cuda":
        torch.cuda.synchronize(encoder.device)
    seconds = time.perf_counter() - started
    if peak is None:
        return Trial(items, None, seconds, "this system does not let a process measure the peak of its memory")
    taken = peak()
    if encoder.device.type == "cuda":
        return Trial(items, taken, seconds, "the peak of torch's allocator")
    if taken < LEAST_GROWTH:
        how = f"it took less than {LEAST_GROWTH >> 20} MiB, which a CPU's resident set cannot show"
        return Trial(items, None, seconds, how)
    return Trial(items, taken, seconds, "the growth of the resident set")


def _on_gpu(device: torch.device) -> Callable[[], int]:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return lambda: torch.cuda.max_memory_allocated(device) - before


def _in_resident_set() -> Callable[[], int] | None:
    """What the resident set grows by from here on, at its highest; None where that cannot be known."""
    gc.collect()
    try:
        # Memory that was freed and is still held would be used again unseen.
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))
    except (OSError, AttributeError):
        return None
    before = _resident("VmRSS")
    try:
        _RESET.write_text("5")  # sets the high-water mark back to what is resident now
    except OSError:
        return None
    mark = _resident("VmHWM")
    if before is None or mark is None or mark > before + LEAST_GROWTH:
        return None
    start = before
    return lambda: (_resident("VmHWM") or start) - start


def _resident(field: str) -> int | None:
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None

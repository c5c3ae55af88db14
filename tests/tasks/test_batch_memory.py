"""What of a batch is in memory at once: one chunk's wide tensors where the encoder computes, and bytes within a bound ahead of use."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from stairstep.models import tower
from stairstep.models.load import load_encoder
from stairstep.objectives import Alone
from stairstep.tasks.batches import TileAhead
from stairstep.tasks.loading import load_rows, tile_reader
from stairstep.tasks.retrieval import RetrievalTask
from stairstep.tiles import Tile, TileReader, TileSettings

SIDE = 512
TILE_BYTES = 3 * SIDE * SIDE
EACH = 6  # tiles of a batch


def test_only_one_chunk_of_a_batch_is_wide_at_a_time(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder's input of every earlier chunk is gone when the next one is made, in both passes; what stays is uint8 on the host."""
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    patches = tower.patches

    def watched(*arguments: Any) -> Any:
        gc.collect()
        alive.append(sum(one() is not None for one in made))
        values, grid = patches(*arguments)
        made.append(weakref.ref(values))
        return values, grid

    monkeypatch.setattr(tower, "patches", watched)
    one = recipe("phases.text_warmup_steps=0", "objective.gradcache={chunk_items: 3, chunk_tokens: null, keep_graphs_mb: 0}")
    encoder = load_encoder(one.model, trainable=True)
    task = RetrievalTask(one, encoder, load_rows(one), tile_reader(one), Alone())
    batches = []
    tile_batch = task._tile_batch
    monkeypatch.setattr(task, "_tile_batch", lambda number: batches.append(tile_batch(number)) or batches[-1])
    task.step(1)
    task.close()
    [batch] = batches
    chunks = -(-len(batch.documents) // 3)
    assert chunks > 3
    assert len(alive) >= 2 * chunks, "both passes, and equal sizes alone go together"
    assert set(alive) == {0}
    assert {(pixels.dtype, pixels.device.type) for pixels in batch.pixels.values()} == {(torch.uint8, "cpu")}


@pytest.fixture
def pages(tmp_path: Path) -> list[Path]:
    files = [tmp_path / f"{number}.png" for number in range(3 * EACH)]
    for number, file in enumerate(files):
        Image.new("RGB", (SIDE, SIDE), (number, 0, 255)).save(file)
    return files


@pytest.mark.parametrize(("megabytes", "expected"), [(1, 1), (2, 2), (5, EACH), (500, EACH)])
def test_tiles_of_the_next_batch_wait_within_their_bytes(pages: list[Path], megabytes: int, expected: int) -> None:
    """While a batch is in use, as many of the next one's are decoded as their bytes allow, and none of the batch after it."""
    settings = TileSettings(max_visual_tokens=(SIDE // 32) ** 2, decode_workers=4, prefetch_mb=megabytes)
    reader = Counting(settings)
    ahead = TileAhead(reader, lambda number: pages[number * EACH : (number + 1) * EACH] or None, Alone())
    try:
        taken, _ = ahead.take(0)
        assert [tile.pixels.nbytes for tile in taken] == [TILE_BYTES] * EACH
        assert until(lambda: len(reader.loaded) == EACH + expected), "the room is used"
        time.sleep(0.1)
        waiting = reader.loaded[EACH:]
        assert len(waiting) == expected and len(waiting) * TILE_BYTES <= megabytes * 1_000_000
        assert set(waiting) <= set(pages[EACH : 2 * EACH])
        assert [tile.path for tile in ahead.take(1)[0]] == pages[EACH : 2 * EACH]
    finally:
        ahead.close()


class Counting(TileReader):
    """A reader that remembers what it loaded."""

    def __init__(self, settings: TileSettings) -> None:
        super().__init__(settings)
        self.loaded: list[Path] = []

    def load(self, path: Path | str) -> Tile:
        tile = super().load(path)
        self.loaded.append(Path(path))
        return tile


def until(true: Callable[[], bool]) -> bool:
    """Waits for it, half a minute at most."""
    end = time.monotonic() + 30
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()

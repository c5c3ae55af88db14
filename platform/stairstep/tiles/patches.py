"""Resized uint8 pixels → the vision tower's input, made on the device.

Equal in every bit to the torchvision processor's `pixel_values` on this machine's CPU, on any device: normalisation is a table of 256
float32 values made on the CPU, because a GPU divides by a constant differently. One byte a pixel crosses to the device; the temporal
copy and the wide dtype come last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import torch

from .geometry import FACTOR, MERGE, PATCH, TEMPORAL

PATCH_VALUES = 3 * TEMPORAL * PATCH * PATCH


def patches(
    pixels: Sequence[torch.Tensor], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles, each uint8 [3, h, w] → (patches [P, 1536] in `dtype`, grid_thw int64 [n, 3]), both on `device`, in the tiles' order."""
    for tile in pixels:
        _check(tile)
    grid = [[1, tile.shape[1] // PATCH, tile.shape[2] // PATCH] for tile in pixels]
    result = torch.empty((sum(rows * columns for _, rows, columns in grid), PATCH_VALUES), device=device, dtype=dtype)
    table = _table(result.device, dtype)
    start = 0
    for run in _runs(pixels):
        codes = _in_patch_order(_stack(run, result.device))
        end = start + codes.shape[0]
        values = table.index_select(0, codes.view(-1).int()).view(-1, 3, 1, PATCH * PATCH)
        result[start:end].view(-1, 3, TEMPORAL, PATCH * PATCH).copy_(values)
        start = end
    return result, torch.tensor(grid, dtype=torch.int64).view(-1, 3).to(result.device)


def _check(tile: torch.Tensor) -> None:
    shape = tuple(tile.shape)
    if tile.dtype != torch.uint8 or len(shape) != 3 or shape[0] != 3 or shape[1] % FACTOR or shape[2] % FACTOR or 0 in shape:
        raise ValueError(f"expected resized tiles, uint8 [3, h, w] with sides that are multiples of {FACTOR}; found {tile.dtype} {shape}")


def _runs(pixels: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Neighbours of one size, together."""
    run: list[torch.Tensor] = []
    for tile in pixels:
        if run and run[-1].shape != tile.shape:
            yield run
            run = []
        run.append(tile)
    if run:
        yield run


def _stack(run: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """[n, 3, h, w] on the device. To a GPU by way of pinned memory: the copy then waits for nothing that the GPU still computes."""
    on_the_way = device.type == "cuda" and all(tile.device.type == "cpu" and not tile.is_pinned() for tile in run)
    stacked = torch.empty((len(run), *run[0].shape), dtype=torch.uint8, pin_memory=on_the_way, device="cpu" if on_the_way else device)
    for place, tile in zip(stacked, run, strict=True):
        place.copy_(tile, non_blocking=True)
    return stacked.to(device, non_blocking=True)


def _in_patch_order(stacked: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 3, h, w] → uint8 [n · patches, 3, 256]: patches of one merged 2×2 block are neighbours."""
    count, _, height, width = stacked.shape
    blocks = stacked.view(count, 3, height // FACTOR, MERGE, PATCH, width // FACTOR, MERGE, PATCH)
    return blocks.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, 3, PATCH * PATCH)


@cache
def _table(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    # Not an inference tensor, whoever happens to ask first: autograd may meet it later.
    with torch.inference_mode(False):
        codes = torch.arange(256, dtype=torch.float32, device="cpu")
        return ((codes - 127.5) / torch.tensor(127.5, device="cpu")).to(device=device, dtype=dtype)

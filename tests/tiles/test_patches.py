"""Patches against the definition written out pixel by pixel, and a GPU's against the CPU's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stairstep.tiles import patches

SIZES = [(64, 96), (64, 96), (32, 32), (96, 64), (64, 96), (32, 128), (32, 128), (32, 128)]


def _tiles(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tiles = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=generator) for h, w in SIZES]
    tiles[0].view(-1)[:256] = torch.arange(256)  # every value occurs
    tiles[4] = tiles[4].permute(1, 2, 0).contiguous().permute(2, 0, 1)  # channels last in memory
    return tiles


def _by_definition(tile: np.ndarray) -> np.ndarray:
    _, height, width = tile.shape
    rows = []
    for block_y in range(height // 32):
        for block_x in range(width // 32):
            for y in (0, 1):
                for x in (0, 1):
                    top, left = block_y * 32 + y * 16, block_x * 32 + x * 16
                    patch = tile[:, top : top + 16, left : left + 16].astype(np.float32)
                    normal = (patch - np.float32(127.5)) / np.float32(127.5)
                    rows.append(np.concatenate([np.concatenate([channel.ravel(), channel.ravel()]) for channel in normal]))
    return np.stack(rows)


def test_patches_are_the_definition() -> None:
    tiles = _tiles()
    values, grid = patches(tiles)
    assert values.dtype == torch.float32 and values.is_contiguous() and grid.dtype == torch.int64
    assert grid.tolist() == [[1, h // 16, w // 16] for h, w in SIZES]
    expected = np.concatenate([_by_definition(tile.numpy()) for tile in tiles])
    assert np.array_equal(values.numpy().view(np.int32), expected.view(np.int32))
    assert len(np.unique(values.numpy())) == 256


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_is_the_float32_values_rounded_once(dtype: torch.dtype) -> None:
    tiles = _tiles(1)
    values, _ = patches(tiles, dtype=dtype)
    assert values.dtype == dtype and torch.equal(values, patches(tiles)[0].to(dtype))


def test_no_tiles_are_no_patches() -> None:
    values, grid = patches([])
    assert values.shape == (0, 1536) and grid.shape == (0, 3) and grid.dtype == torch.int64


def test_patches_made_under_inference_mode_do_not_spoil_later_ones() -> None:
    with torch.inference_mode():
        patches(_tiles(), dtype=torch.float64)
    weight = torch.ones(1536, dtype=torch.float64, requires_grad=True)
    (patches(_tiles(), dtype=torch.float64)[0] @ weight).sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(3, 64, 64),
        torch.zeros(3, 40, 64, dtype=torch.uint8),
        torch.zeros(1, 64, 64, dtype=torch.uint8),
        torch.zeros(3, 0, 32).byte(),
    ],
)
def test_what_is_no_resized_tile_is_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="multiples of 32"):
        patches([wrong])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_makes_the_same_bits(dtype: torch.dtype) -> None:
    tiles = _tiles(2) + [torch.randint(0, 256, (3, 1024, 864), dtype=torch.uint8)] * 3
    here, grid = patches(tiles, dtype=dtype)
    there, grid_there = patches(tiles, "cuda", dtype)
    assert there.device.type == grid_there.device.type == "cuda"
    width = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(there.cpu().view(width), here.view(width)) and torch.equal(grid_there.cpu(), grid)
    again, _ = patches([tile.cuda() for tile in tiles], "cuda", dtype)
    assert torch.equal(again, there)
    back, _ = patches([tile.cuda() for tile in tiles], "cpu", dtype)
    assert torch.equal(back.view(width), here.view(width))

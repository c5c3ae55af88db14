"""The vision tower over tiles of one size at once, as one batch of images.

transformers packs all images into one long sequence and, without flash attention, attends to them one by one: hundreds of small kernels,
and before each layer the lengths are read back from the device. Tiles are mostly of one size, and then a batch dimension does it in one and
nothing is asked of the device. The modules are the tower's own, adapter layers included, so the result equals its forward up to rounding.
Patches are embedded by one matrix product: their convolution has steps as wide as its kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stairstep.tiles import patches

_TAPS_PER_AXIS = 2
_ROTARY_BASE = 10000.0
_SIZES = 64  # of tiles whose tables are kept on the device, a few MB each
_WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Features:
    """What the tower gives for tiles of one size: merged tokens [n, tokens, d], and as many for each deepstack layer."""

    merged: Tensor
    deepstack: tuple[Tensor, ...]

    def select(self, tiles: Tensor) -> Features:
        """The features of tiles by their index."""
        return Features(self.merged[tiles], tuple(one[tiles] for one in self.deepstack))


def tower_features(visual: nn.Module, pixels: Sequence[Tensor] | Tensor, device: torch.device) -> Features:
    """Features of tiles (uint8 [3, h, w], all of one size) from a Qwen3-VL vision model, differentiable."""
    tower = cast(Any, visual)
    height, width = (int(side) for side in pixels[0].shape[-2:])
    rows, columns = height // int(tower.patch_size), width // int(tower.patch_size)
    dtype = next(tower.patch_embed.parameters()).dtype
    hidden = _embed_patches(tower, patches(list(pixels), device, dtype)[0]).view(len(pixels), rows * columns, -1)
    merge = int(tower.spatial_merge_size)
    hidden = hidden + _position_embeddings(tower, rows, columns, merge, device).to(hidden.dtype)
    cos, sin = _rotary(rows, columns, merge, hidden.shape[-1] // int(tower.blocks[0].attn.num_heads), device)
    deepstack = []
    places = list(tower.deepstack_visual_indexes)
    for index, block in enumerate(tower.blocks):
        if block.gradient_checkpointing and block.training and torch.is_grad_enabled():
            hidden = cast(Tensor, checkpoint(_through, block, hidden, cos, sin, use_reentrant=False))
        else:
            hidden = _through(block, hidden, cos, sin)
        if index in places:
            deepstack.append(tower.deepstack_merger_list[places.index(index)](hidden.flatten(0, 1)).view(len(pixels), -1, _width(tower)))
    merged = tower.merger(hidden.flatten(0, 1)).view(len(pixels), -1, _width(tower))
    return Features(merged, tuple(deepstack))


def tile_features(visual: Any, tiles: Sequence[Tensor], device: torch.device) -> Features | None:
    """Features of tiles of any sizes in their order, as one row of tokens [1, all tokens, d]; None for no tiles."""
    if not tiles:
        return None
    by_size: dict[tuple[int, int], list[int]] = {}
    for place, tile in enumerate(tiles):
        by_size.setdefault((int(tile.shape[-2]), int(tile.shape[-1])), []).append(place)
    groups = [(places, tower_features(visual, [tiles[place] for place in places], device)) for places in by_size.values()]
    if len(groups) == 1:
        only = groups[0][1]
        return Features(only.merged.flatten(0, 1)[None], tuple(one.flatten(0, 1)[None] for one in only.deepstack))
    found = {place: (features, index) for places, features in groups for index, place in enumerate(places)}
    ordered = [found[place] for place in range(len(tiles))]
    merged = torch.cat([features.merged[index] for features, index in ordered])
    layers = range(len(ordered[0][0].deepstack))
    deepstack = [torch.cat([features.deepstack[layer][index] for features, index in ordered])[None] for layer in layers]
    return Features(merged[None], tuple(deepstack))


def _width(tower: Any) -> int:
    return int(tower.config.out_hidden_size)


def _embed_patches(tower: Any, values: Tensor) -> Tensor:
    """Patches [P, 1536] whose temporal copies are equal → [P, d]."""
    projection = tower.patch_embed.proj
    copies, side = int(tower.patch_embed.temporal_patch_size), int(tower.patch_size)
    if type(projection) is not nn.Conv3d:  # something is trained in it, and it is not that layer alone any more
        return cast(Tensor, projection(values.view(len(values), -1, copies, side, side)).flatten(1))
    weight = projection.weight  # [d, 3, temporal, 16, 16]
    if weight.dtype not in _WIDE or torch.is_autocast_enabled(values.device.type):
        return nn.functional.linear(values, weight.flatten(1), projection.bias)
    # Both copies at once, by the sum of their weights, which a narrow type would round.
    one_copy = values.view(len(values), weight.shape[1], copies, -1)[:, :, 0].flatten(1)
    return nn.functional.linear(one_copy, weight.sum(2).flatten(1), projection.bias)


def _through(block: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One block over [tiles, patches, d]."""
    hidden = hidden + _attend(block.attn, block.norm1(hidden), cos, sin)
    return cast(Tensor, hidden + block.mlp(block.norm2(hidden)))


def _attend(attention: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    count, length, width = hidden.shape
    queries, keys, values = attention.qkv(hidden).view(count, length, 3, int(attention.num_heads), -1).permute(2, 0, 3, 1, 4)
    queries, keys = _turned(queries, cos, sin), _turned(keys, cos, sin)
    if attention.config._attn_implementation == "eager":
        scores = (queries @ keys.transpose(-1, -2)) * queries.shape[-1] ** -0.5
        mixed = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype) @ values
    else:
        mixed = _mixed(queries, keys, values)
    return cast(Tensor, attention.proj(mixed.transpose(1, 2).reshape(count, length, width)))


def _mixed(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention; on a CPU in float32 also under autocast, because its backward pass in bfloat16 takes eight times as long there."""
    if queries.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return nn.functional.scaled_dot_product_attention(queries, keys, values)
    with torch.autocast("cpu", enabled=False):
        return nn.functional.scaled_dot_product_attention(queries.float(), keys.float(), values.float()).to(values.dtype)


def _turned(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = states.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(states.dtype)


def _places(rows: int, columns: int, merge: int) -> tuple[Tensor, Tensor]:
    """Row and column of every patch, patches of one merged block being neighbours."""

    def in_blocks(grid: Tensor) -> Tensor:
        return grid.view(rows // merge, merge, columns // merge, merge).permute(0, 2, 1, 3).flatten()

    down = torch.arange(rows)[:, None].expand(rows, columns).contiguous()
    across = torch.arange(columns)[None, :].expand(rows, columns).contiguous()
    return in_blocks(down), in_blocks(across)


@lru_cache(maxsize=_SIZES)
def _rotary(rows: int, columns: int, merge: int, head: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [patches, head] of the two-dimensional rotary embedding."""
    with torch.inference_mode(False):
        spatial = head // 2
        frequencies = 1.0 / _ROTARY_BASE ** (torch.arange(0, spatial, 2, dtype=torch.float32) / spatial)
        angles = torch.cat([place.float()[:, None] * frequencies for place in _places(rows, columns, merge)], dim=-1)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(device), angles.sin().to(device)


@lru_cache(maxsize=_SIZES)
def _taps(rows: int, columns: int, merge: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For every patch the four entries of the learned position table around it, and their bilinear weights."""

    def axis(count: int) -> tuple[Tensor, Tensor]:
        exact = torch.linspace(0, side - 1, count)
        low = exact.int().long()
        share = exact - low
        return torch.stack([low, (low + 1).clamp(max=side - 1)], dim=-1), torch.stack([1 - share, share], dim=-1)

    with torch.inference_mode(False):
        (down, down_share), (across, across_share) = axis(rows), axis(columns)
        row, column = _places(rows, columns, merge)
        entries = down[row][:, :, None] * side + across[column][:, None, :]
        weights = down_share[row][:, :, None] * across_share[column][:, None, :]
        taps = _TAPS_PER_AXIS**2
        return entries.view(-1, taps).to(device), weights.view(-1, taps).to(device)


def _position_embeddings(tower: Any, rows: int, columns: int, merge: int, device: torch.device) -> Tensor:
    entries, weights = _taps(rows, columns, merge, int(tower.num_grid_per_side), device)
    return cast(Tensor, (tower.pos_embed(entries) * weights[:, :, None]).sum(1))

"""The plain way with transformers and PEFT, to be measured beside: a stock PeftModel around a stock Qwen3VLModel.

Float32 pixel tensors as the Hugging Face processor gives them, padded token ids with an attention mask, positions found by the model,
items in chunks of a fixed number, and GradCache's two passes with the random state kept for each chunk. The weights are those of an
encoder of ours, so that both ways have one loss and one gradient.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from stairstep.models.adapter_files import canonical
from stairstep.models.encoder import Encoder
from stairstep.models.inputs import Role
from stairstep.tiles import TileSettings

CHUNK = 4


def processor(settings: TileSettings, pillow_too: bool = False) -> tuple[Any, str]:
    """The torchvision processor of transformers at these settings, or Pillow's where that will do and there is no torchvision; and which.

    Before version 5 the torchvision one was called …Fast, and the plain name was Pillow's."""
    geometry = settings.geometry()
    size = {"shortest_edge": geometry.min_pixels, "longest_edge": geometry.max_pixels}
    pillow = pillow_too and find_spec("torchvision") is None
    names = ("Qwen2VLImageProcessorFast", "Qwen2VLImageProcessor", "Qwen2VLImageProcessorPil")
    kind = getattr(transformers, names[(transformers.__version__ >= "5") + pillow])
    made = kind(size=size, patch_size=16, merge_size=2, temporal_patch_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    assert pillow or getattr(made, "backend", "torchvision") == "torchvision"
    return made, "Pillow" if pillow else "torchvision"


@dataclass(frozen=True)
class Pixels:
    """A tile as the processor gives it: float32 patches [P, 1536], and its grid [1, 3]."""

    values: Tensor
    grid: Tensor


@dataclass(frozen=True)
class _Items:
    """Some texts or some tiles, encoded together; `pixels` where they are tiles."""

    rows: list[list[int]]
    pixels: list[Pixels] | None = None


class Plain:
    """The plain way's model, and its step and evaluation."""

    def __init__(self, encoder: Encoder, scale: float) -> None:
        self.model: Any = copy.deepcopy(encoder.model)
        for layer in self.model.modules():
            if isinstance(layer, LoraLayer):
                layer.cast_input_dtype_enabled = True  # PEFT's own default
        self.core = self.model.get_base_model()
        self.inputs, self.scale, self.device = encoder.inputs, scale, encoder.device
        self.low = next(one.dtype for one in self.core.parameters() if not one.requires_grad) == torch.bfloat16
        own = {canonical(name): one for name, one in self.model.named_parameters() if one.requires_grad}
        self.parameters: list[nn.Parameter] = [own[name] for members in encoder.groups().values() for name, _ in members]
        self._told_kinds = "mm_token_type_ids" in inspect.signature(type(self.core).forward).parameters

    def texts(self, texts: Sequence[str], role: Role, at_once: int = CHUNK) -> list[_Items]:
        """Texts in chunks."""
        rows = self.inputs.text_ids(texts, role)
        return [_Items(rows[start : start + at_once]) for start in range(0, len(rows), at_once)]

    def tiles(self, tiles: Sequence[Pixels], at_once: int = CHUNK) -> list[_Items]:
        """Tiles in chunks."""
        rows = [self.inputs.tile_ids(16 * int(one.grid[0, 1]), 16 * int(one.grid[0, 2])) for one in tiles]
        return [_Items(rows[start : start + at_once], list(tiles[start : start + at_once])) for start in range(0, len(rows), at_once)]

    def encode(self, items: _Items) -> Tensor:
        """Unit vectors [n, d]: pad, let the model find its positions, take the last real token, normalise."""
        lengths = [len(row) for row in items.rows]
        ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(items.rows):
            ids[index, : len(row)], mask[index, : len(row)] = torch.tensor(row), 1
        extra: dict[str, Tensor] = {}
        if items.pixels is not None:
            extra["pixel_values"] = torch.cat([one.values for one in items.pixels]).to(self.device)
            extra["image_grid_thw"] = torch.cat([one.grid for one in items.pixels]).to(self.device)
            if self._told_kinds:
                extra["mm_token_type_ids"] = ((ids == self.inputs.image_token) & (mask == 1)).int().to(self.device)
        self.core.rope_deltas = None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.low):
            output = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device), use_cache=False, **extra)
        last = torch.tensor(lengths, device=self.device) - 1
        pooled = output.last_hidden_state[torch.arange(len(lengths), device=self.device), last]
        return nn.functional.normalize(pooled.float(), dim=-1)

    def step(self, queries: Sequence[str], tiles: Sequence[Pixels], positives: Sequence[int]) -> float:
        """The loss of the batch, each tile a candidate of each query; gradients are added to the parameters'."""
        chunks = [*self.texts(queries, "query"), *self.tiles(tiles)]
        states, found = [], []
        with torch.no_grad():
            for chunk in chunks:
                states.append(_random_state(self.device))
                found.append(self.encode(chunk))
        rows = torch.cat(found).requires_grad_()
        cosine = rows[: len(queries)] @ rows[len(queries) :].T
        loss = nn.functional.cross_entropy(self.scale * cosine, torch.tensor(list(positives), device=self.device))
        (slopes,) = torch.autograd.grad(loss, [rows])
        start = 0
        for chunk, state in zip(chunks, states, strict=True):
            _set_random_state(state, self.device)
            embeddings = self.encode(chunk)
            (embeddings * slopes[start : start + len(embeddings)]).sum().backward()
            start += len(embeddings)
        return loss.item()

    def clear(self) -> None:
        """Drop gradients, as the optimizer does."""
        for one in self.parameters:
            one.grad = None

    def gradient(self) -> Tensor:
        """All gradients in one float64 vector, in the order of ours."""
        return torch.cat([one.grad.flatten().double() for one in self.parameters if one.grad is not None])


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)

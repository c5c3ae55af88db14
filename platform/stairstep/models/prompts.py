"""What a reader is asked, as token ids and positions: the question first and then the tiles, through the model's own chat template.

The messages are those of an OpenAI-compatible request: a system message unless it is empty, then one user message whose parts are
the question and one image a tile. Everything depends on the question and on the tiles' sizes, never on their pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stairstep.settings import InputError

from .inputs import IMAGE_PLACEHOLDER, TokenBatch

Size = tuple[int, int]  # height and width of a resized tile, in pixels


class Prompts:
    """Makes prompts for one tokenizer and model config."""

    def __init__(self, tokenizer: Any, config: Any) -> None:
        self.tokenizer = tokenizer
        self.image_token = int(config.image_token_id)
        self.cell = int(config.vision_config.patch_size * config.vision_config.spatial_merge_size)
        known = tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
        if known != self.image_token:
            raise InputError(f"the tokenizer's id of {IMAGE_PLACEHOLDER} is {known} and the model's is {self.image_token}: not a pair")

    def messages(self, question: str, tiles: int, system: str = "") -> list[dict[str, Any]]:
        """The conversation, each tile an image part without its pixels."""
        images = [{"type": "image"} for _ in range(tiles)]
        user = {"role": "user", "content": [{"type": "text", "text": question}, *images]}
        return [{"role": "system", "content": [{"type": "text", "text": system}]}, user] if system else [user]

    def text(self, question: str, tiles: int, system: str = "") -> str:
        """The prompt as text, one placeholder a tile."""
        messages = self.messages(question, tiles, system)
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def grid(self, size: Size) -> tuple[int, int]:
        """Merged visual tokens down and across a tile."""
        height, width = size
        if height % self.cell or width % self.cell or not height or not width:
            raise ValueError(f"a tile of {height}×{width} pixels was not resized to multiples of {self.cell}")
        return height // self.cell, width // self.cell

    def ids(self, texts: Sequence[str], sizes: Sequence[Sequence[Size]]) -> list[list[int]]:
        """Token ids of prompts, each placeholder standing once for every merged token of its tile."""
        rows = self.tokenizer(list(texts), add_special_tokens=False, padding=False, truncation=False)["input_ids"]
        return [self._expanded(row, tiles) for row, tiles in zip(rows, sizes, strict=True)]

    def _expanded(self, row: list[int], sizes: Sequence[Size]) -> list[int]:
        if row.count(self.image_token) != len(sizes):
            raise InputError(
                f"a prompt has {row.count(self.image_token)} {IMAGE_PLACEHOLDER} tokens for {len(sizes)} tiles; "
                "a question must not contain that token"
            )
        expanded: list[int] = []
        tiles = iter(sizes)
        for token in row:
            if token == self.image_token:
                rows, columns = self.grid(next(tiles))
                expanded += [token] * (rows * columns)
            else:
                expanded.append(token)
        return expanded

    def positions(self, row: Sequence[int], sizes: Sequence[Size]) -> Tensor:
        """Positions [3, L] of expanded ids: text counts on in all three, a visual token stands at its row and column, and text goes on
        after the longer side of the grid."""
        parts, start, place = [], 0, 0
        tiles = iter(sizes)
        while place < len(row):
            end = place
            while end < len(row) and row[end] != self.image_token:
                end += 1
            if end > place:
                parts.append(torch.arange(start, start + end - place).expand(3, -1))
                start += end - place
            if end < len(row):
                rows, columns = self.grid(next(tiles))
                visual = torch.full((3, rows * columns), start)
                visual[1] += torch.arange(rows).repeat_interleave(columns)
                visual[2] += torch.arange(columns).repeat(rows)
                parts.append(visual)
                start += max(rows, columns)
                end += rows * columns
            place = end
        return torch.cat(parts, dim=1)

    def batch(self, rows: Sequence[Sequence[int]], sizes: Sequence[Sequence[Size]], multiple: int = 1) -> TokenBatch:
        """Right-padded ids and positions on the CPU; the length is rounded up to a multiple."""
        lengths = tuple(len(row) for row in rows)
        width = -(-max(lengths) // multiple) * multiple
        ids = torch.full((len(rows), width), 0 if self.image_token else 1, dtype=torch.long)
        places = torch.zeros(4, len(rows), width, dtype=torch.long)
        places[0] = torch.arange(width)
        for index, (row, tiles) in enumerate(zip(rows, sizes, strict=True)):
            ids[index, : len(row)] = torch.tensor(row, dtype=torch.long)
            places[1:, index, : len(row)] = self.positions(row, tiles)
        return TokenBatch(ids, places, lengths)

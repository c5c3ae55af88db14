"""Texts and tiles as token ids and rotary positions, without the Hugging Face processor (which needs torchvision).

The ids are what that processor gives: the chat template with the instruction as system message, the content as user message and the
generation prompt added; a tile's placeholder stands once for each merged visual token. Positions are computed here and passed to the
model, so the state that it keeps between calls (`rope_deltas`) is never used. Batches are padded on the right.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stairstep.settings import InputError

from .weights import read_json

Role = Literal["query", "document"]
IMAGE_PLACEHOLDER = "<|image_pad|>"
_MARK = "\u241e\u241e"


@dataclass(frozen=True)
class TokenBatch:
    """Right-padded token ids [B, L], positions [4, B, L] (plain, then temporal, height, width) and the real lengths of the rows."""

    ids: torch.Tensor
    positions: torch.Tensor
    lengths: tuple[int, ...]

    @property
    def uniform(self) -> bool:
        """Whether no row is padded."""
        return min(self.lengths) == max(self.lengths)


@dataclass(frozen=True)
class PlacedBatch(TokenBatch):
    """A batch with places among all its B·L tokens, row after row: `visual` [V] of the tiles' tokens, `last` [B] of each row's last one.

    They are known here; a device that is asked for them has to finish its work first."""

    visual: torch.Tensor
    last: torch.Tensor


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a local folder with its chat template; never runs code from it and never asks the network."""
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder}: there is no tokenizer.json in this folder; name a folder or a hub id that has one as model.tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{folder}: no fast tokenizer could be loaded from this folder ({reason})") from None
    if tokenizer.chat_template is None and (folder / "chat_template.json").is_file():
        tokenizer.chat_template = read_json(folder / "chat_template.json").get("chat_template")
    if not isinstance(tokenizer.chat_template, str):
        raise InputError(f"{folder}: the tokenizer has no chat template; expected chat_template.jinja or one in tokenizer_config.json")
    return cast(PreTrainedTokenizerFast, tokenizer)


class Inputs:
    """Turns texts and tile sizes into token batches for one model."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, config: Any, instructions: dict[Role, str], max_text_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.instructions = instructions
        self.max_text_tokens = max_text_tokens
        self.image_token: int = config.image_token_id
        self.cell: int = config.vision_config.patch_size * config.vision_config.spatial_merge_size
        known = tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
        if known != self.image_token:
            raise InputError(
                f"the tokenizer's id of {IMAGE_PLACEHOLDER} is {known} and the model's is {self.image_token}: they do not belong together;"
                " check model.tokenizer"
            )
        if len(tokenizer) > config.text_config.vocab_size:
            raise InputError(
                f"the tokenizer has {len(tokenizer)} tokens and the model {config.text_config.vocab_size}; check model.tokenizer"
            )
        self._tails: dict[Role, list[int]] = {}
        self._frame: tuple[list[int], list[int]] | None = None

    def text_ids(self, texts: Sequence[str], role: Role) -> list[list[int]]:
        """The token ids of each text as a query or a document; over `max_text_tokens` the text, not the template, is cut."""
        if not texts:
            return []
        ids = self._tokenize([self._prompt(role, {"type": "text", "text": text}) for text in texts])
        return [row if len(row) <= self.max_text_tokens else self._cut(row, role) for row in ids]

    def _cut(self, row: list[int], role: Role) -> list[int]:
        if role not in self._tails:
            tail = self._prompt(role, {"type": "text", "text": _MARK}).rpartition(_MARK)[2]
            self._tails[role] = self.tokenizer(tail, add_special_tokens=False)["input_ids"]
        tail_ids = self._tails[role]
        return row[: self.max_text_tokens - len(tail_ids)] + tail_ids

    def texts(self, texts: Sequence[str], role: Role, device: torch.device) -> PlacedBatch:
        """A batch of texts."""
        rows = self.text_ids(texts, role)
        return self._batch(rows, [_plain_positions(len(row)) for row in rows], [range(0)] * len(rows), device)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Merged visual tokens down and across a tile of this many pixels."""
        if height % self.cell or width % self.cell or not height or not width:
            raise ValueError(f"a tile of {height}×{width} pixels was not resized to multiples of {self.cell}")
        return height // self.cell, width // self.cell

    def tile_ids(self, height: int, width: int) -> list[int]:
        """The token ids of a tile of this many pixels."""
        before, after = self._tile_frame()
        rows, columns = self.grid(height, width)
        return [*before, *[self.image_token] * (rows * columns), *after]

    def tile_length(self, height: int, width: int) -> int:
        """How many tokens a tile of this many pixels is, template included."""
        before, after = self._tile_frame()
        rows, columns = self.grid(height, width)
        return len(before) + rows * columns + len(after)

    def tiles(self, sizes: Sequence[tuple[int, int]], device: torch.device) -> PlacedBatch:
        """A batch of tiles, given as (height, width) in pixels."""
        before, after = self._tile_frame()
        grids = [self.grid(*size) for size in sizes]
        positions = [_tile_positions(len(before), grid, len(after)) for grid in grids]
        visual = [range(len(before), len(before) + rows * columns) for rows, columns in grids]
        return self._batch([self.tile_ids(*size) for size in sizes], positions, visual, device)

    def _tile_frame(self) -> tuple[list[int], list[int]]:
        """The token ids before and after a tile's visual tokens."""
        if self._frame is None:
            (ids,) = self._tokenize([self._prompt("document", {"type": "image"})])
            if ids.count(self.image_token) != 1:
                raise InputError(
                    f"the chat template renders an image as {ids.count(self.image_token)} {IMAGE_PLACEHOLDER} tokens; expected one"
                )
            at = ids.index(self.image_token)
            self._frame = ids[:at], ids[at + 1 :]
        return self._frame

    def _prompt(self, role: Role, content: dict[str, str]) -> str:
        instruction = self.instructions[role]
        system = [{"role": "system", "content": [{"type": "text", "text": instruction}]}] if instruction else []
        messages: list[Any] = [*system, {"role": "user", "content": [content]}]
        rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return str(rendered)

    def _tokenize(self, prompts: list[str]) -> list[list[int]]:
        bos = self.tokenizer.bos_token
        special = not (bos is not None and prompts[0].startswith(bos))
        return list(self.tokenizer(prompts, add_special_tokens=special, padding=False, truncation=False)["input_ids"])

    def _batch(self, rows: list[list[int]], positions: list[torch.Tensor], visual: Sequence[range], device: torch.device) -> PlacedBatch:
        lengths = tuple(len(row) for row in rows)
        width = max(lengths)
        ids = torch.full((len(rows), width), 0 if self.image_token else 1, dtype=torch.long)
        places = torch.zeros(4, len(rows), width, dtype=torch.long)
        places[0] = torch.arange(width)
        for index, (row, place) in enumerate(zip(rows, positions, strict=True)):
            ids[index, : len(row)] = torch.tensor(row, dtype=torch.long)
            places[1:, index, : len(row)] = place
        spans = [torch.arange(span.start, span.stop) + index * width for index, span in enumerate(visual)]
        last = torch.tensor([index * width + length - 1 for index, length in enumerate(lengths)])
        return PlacedBatch(sent(ids, device), sent(places, device), lengths, sent(torch.cat(spans), device), sent(last, device))

    def digest(self) -> str:
        """SHA-256 of everything here that decides which ids a text or a tile becomes."""
        self._tokenize([""])  # a tokenizer file may carry padding or truncation, which the first call turns off
        parts = [
            self.tokenizer.backend_tokenizer.to_str(),
            str(self.tokenizer.chat_template),
            *(f"{role}={text}" for role, text in sorted(self.instructions.items())),
            str(self.max_text_tokens),
        ]
        return hashlib.sha256("\0".join(hashlib.sha256(part.encode()).hexdigest() for part in parts).encode()).hexdigest()


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device. To a GPU by way of pinned memory: a copy from any other waits for all that the GPU still computes."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _plain_positions(length: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + length).expand(3, length)


def _tile_positions(before: int, grid: tuple[int, int], after: int) -> torch.Tensor:
    """Positions [3, L] of a tile: text counts on in all three; a visual token stands at its row and column; text goes on after the
    longer side of the grid."""
    rows, columns = grid
    visual = torch.full((3, rows * columns), before, dtype=torch.long)
    visual[1] += torch.arange(rows).repeat_interleave(columns)
    visual[2] += torch.arange(columns).repeat(rows)
    return torch.cat([_plain_positions(before), visual, _plain_positions(after, before + max(rows, columns))], dim=1)

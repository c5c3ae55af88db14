"""A reader in this process: questions and tiles in, greedy answers out, with no server and no processor.

It computes what transformers' `generate` computes, several questions at a time. An answer does not depend on its batch mates but for
rounding: rows are padded on the right, where no real token looks, and every new token is told which keys of its row are real.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, Qwen3VLForConditionalGeneration

from stairstep.tiles import TileReader, TileSettings

from .inputs import TokenBatch, load_tokenizer
from .prompts import Prompts, Size
from .sources import locate
from .tower import Features, tile_features
from .weights import DTYPES, weight_files

Evidence = Sequence[Tensor | Path | str]  # tiles: resized uint8 [3, h, w], or files


@dataclass
class _Row:
    """One question while it is answered."""

    place: int
    text: str
    tiles: list[Tensor]

    @property
    def sizes(self) -> list[Size]:
        return [(int(tile.shape[-2]), int(tile.shape[-1])) for tile in self.tiles]


class Reader:
    """Answers questions from tiles, greedily; made by `load_reader`."""

    def __init__(
        self, model: Any, tokenizer: Any, system: str = "", max_new_tokens: int = 48, batch: int = 32, tiles: TileReader | None = None
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.prompts = Prompts(tokenizer, model.config)
        self.system = system
        self.max_new_tokens = max_new_tokens
        self.batch = batch
        self._tiles = tiles or TileReader(TileSettings())
        ends = model.generation_config.eos_token_id
        ends = tokenizer.eos_token_id if ends is None else ends
        self._ends = torch.tensor([ends] if isinstance(ends, int) else list(ends), device=model.device)

    def answer(self, question: str, tiles: Evidence) -> str:
        """The answer to one question from its tiles, best first."""
        return self.answers([(question, tiles)])[0]

    def answers(self, asked: Sequence[tuple[str, Evidence]]) -> list[str]:
        """The answers to questions, each with its own tiles, in the order asked."""
        rows = [
            _Row(place, self.prompts.text(question, len(tiles), self.system), [self._pixels(tile) for tile in tiles])
            for place, (question, tiles) in enumerate(asked)
        ]
        rows.sort(key=lambda row: (row.sizes, len(row.text), row.place))  # little padding, and tiles of one size together
        found = [""] * len(rows)
        for start in range(0, len(rows), self.batch):
            part = rows[start : start + self.batch]
            for row, answer in zip(part, self._answer_batch(part), strict=True):
                found[row.place] = answer
        return found

    def _pixels(self, tile: Tensor | Path | str) -> Tensor:
        return tile if isinstance(tile, Tensor) else self._tiles.load(tile).pixels

    @torch.inference_mode()
    def _answer_batch(self, rows: Sequence[_Row]) -> list[str]:
        sizes = [row.sizes for row in rows]
        batch = self.prompts.batch(self.prompts.ids([row.text for row in rows], sizes), sizes)
        tokens = self._generate(batch, [tile for row in rows for tile in row.tiles])
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in tokens]

    def _generate(self, batch: TokenBatch, tiles: list[Tensor]) -> list[list[int]]:
        core, device = self.model.model, self.model.device
        lengths = torch.tensor(batch.lengths, device=device)
        ids, positions = batch.ids.to(device), batch.positions.to(device)
        hidden, cache = language_states(core, ids, positions, tile_features(core.visual, tiles, device), use_cache=True)
        last = hidden[torch.arange(len(lengths), device=device), lengths - 1]
        following = positions[1:].amax(dim=(0, 2)) + 1
        width = ids.shape[1]
        prompt = torch.arange(width, device=device)[None] < lengths[:, None]
        written: list[Tensor] = []
        open_rows = torch.ones(len(lengths), dtype=torch.bool, device=device)
        for count in range(self.max_new_tokens):
            token = self.model.lm_head(last).argmax(-1)
            written.append(torch.where(open_rows, token, self._ends[0]))
            open_rows = open_rows & ~torch.isin(token, self._ends)
            if count + 1 == self.max_new_tokens or not bool(open_rows.any()):
                break
            real = torch.cat([prompt, prompt.new_ones(len(lengths), count + 1)], dim=1)
            mask = torch.zeros(real.shape, dtype=last.dtype, device=device).masked_fill(~real, torch.finfo(last.dtype).min)
            places = torch.cat([torch.full_like(following, width + count)[None], following.expand(3, -1)])[:, :, None]
            output = core.language_model(
                input_ids=token[:, None],
                position_ids=places,
                attention_mask=mask[:, None, None],
                past_key_values=cache,
                use_cache=True,
            )
            last, cache, following = output.last_hidden_state[:, -1], output.past_key_values, following + 1
        return [self._until_end(row) for row in torch.stack(written, dim=1).tolist()]

    def _until_end(self, tokens: list[int]) -> list[int]:
        ends = set(self._ends.tolist())
        return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]


def language_states(core: Any, ids: Tensor, positions: Tensor, features: Features | None, use_cache: bool = False) -> tuple[Tensor, Any]:
    """The language model's last hidden states [B, L, d] over right-padded ids with the tiles' features in their places, row after row,
    and its cache."""
    embedded = core.language_model.embed_tokens(ids)
    visual: dict[str, Any] = {}
    if features is not None:
        places = ids == core.config.image_token_id
        embedded = embedded.masked_scatter(places[..., None], features.merged.to(embedded.dtype))
        visual = {"visual_pos_masks": places, "deepstack_visual_embeds": [layer.flatten(0, 1) for layer in features.deepstack]}
    output = core.language_model(inputs_embeds=embedded, position_ids=positions, attention_mask=None, use_cache=use_cache, **visual)
    return cast(Tensor, output.last_hidden_state), output.past_key_values


def load_reader(
    base: str | Path = "tiny-reader",
    device: torch.device | str = "cpu",
    dtype: str = "float32",
    system: str = "",
    max_new_tokens: int = 48,
    batch: int = 32,
) -> Reader:
    """The reader in a local folder, on the hub or shipped in the package."""
    folder = locate(str(base), None, "evaluation.reader.model").folder
    weight_files(folder)  # a folder without safetensors is told before anything is loaded; pickled weights are never read
    model: Any = Qwen3VLForConditionalGeneration.from_pretrained(
        str(folder), dtype=DTYPES[dtype], attn_implementation="sdpa", use_safetensors=True
    )
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    return Reader(model.to(device), load_tokenizer(folder), system, max_new_tokens, batch)

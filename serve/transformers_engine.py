"""The `transformers` engine: this project's own reader, which answers one request at a time.

A batch of one: an answer depends on nothing but its request, so it is the same from every replica and before and after a restart. Messages
of any order and number are rendered by the model's own chat template. An answer that nobody waits for any more stops at its next token.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from jinja2 import TemplateError

from stairstep.models.computing import compute_with
from stairstep.models.reading import Reader, load_reader
from stairstep.settings import InputError, TileError
from stairstep.tiles import TileSettings, decode_image, resize

from .protocol import ChatRequest, Completion, RequestError
from .settings import TransformersSettings


class Abandoned(Exception):
    """Nobody waits for this answer any more."""


def _wanted() -> bool:
    return False


class TransformersEngine:
    """Answers requests in the thread that calls it; one call at a time."""

    def __init__(self, settings: TransformersSettings, max_image_pixels: int) -> None:
        compute_with(settings.threads)
        self.settings = settings
        self.max_image_pixels = max_image_pixels
        self.geometry = TileSettings(settings.max_visual_tokens, settings.min_visual_tokens).geometry()
        self.reader: Reader = load_reader(settings.model, dtype=settings.dtype, batch=1)
        made_for = int(self.reader.model.config.text_config.max_position_embeddings)
        if settings.max_model_len is not None and settings.max_model_len > made_for:
            raise InputError(
                f"engine.max_model_len: {settings.max_model_len} is more than the {made_for} tokens that the model is made for"
            )
        self.max_model_len = settings.max_model_len or made_for
        self._unwanted: Callable[[], bool] = _wanted
        # The language head is called once a token, and no other place is between two tokens.
        self.reader.model.lm_head.register_forward_pre_hook(self._stop_if_unwanted)
        self._busy = threading.Lock()
        self.busy_since: float | None = None

    def complete(self, request: ChatRequest, unwanted: Callable[[], bool] = _wanted) -> Completion:
        """The greedy answer; raises RequestError for a request that cannot have one, Abandoned once `unwanted` says so."""
        with self._busy:
            self._unwanted, self.busy_since = unwanted, time.monotonic()
            try:
                return self._complete(request)
            finally:
                self._unwanted, self.busy_since = _wanted, None

    def _stop_if_unwanted(self, *_: Any) -> None:
        if self._unwanted():
            raise Abandoned

    def _complete(self, request: ChatRequest) -> Completion:
        if self._unwanted():
            raise Abandoned
        tiles = [self._pixels(data, f"image {index + 1}") for index, data in enumerate(request.conversation.images)]
        sizes = [(int(tile.shape[-2]), int(tile.shape[-1])) for tile in tiles]
        text = self._rendered(request)
        try:
            [ids] = self.reader.prompts.ids([text], [sizes])
        except InputError as error:
            raise RequestError(400, str(error), param="messages") from None
        most = request.max_tokens or min(self.settings.max_new_tokens, max(1, self.max_model_len - len(ids)))
        if len(ids) + most > self.max_model_len:
            raise RequestError(
                400,
                f"the prompt has {len(ids)} tokens and {most} were asked for, together more than the {self.max_model_len} that this reader "
                "takes; send fewer or smaller images, or ask for a shorter answer",
                param="messages",
                code="context_length_exceeded",
            )
        tokens = self._generated(ids, sizes, tiles, most)
        ended = len(tokens) < most
        answer = self.reader.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        return Completion(answer, "stop" if ended else "length", len(ids), len(tokens) + ended)

    @torch.inference_mode()
    def _generated(self, ids: list[int], sizes: list[tuple[int, int]], tiles: list[torch.Tensor], most: int) -> list[int]:
        self.reader.max_new_tokens = most
        [tokens] = self.reader._generate(self.reader.prompts.batch([ids], [sizes]), tiles)
        return tokens

    def _pixels(self, data: bytes, where: str) -> torch.Tensor:
        try:
            return resize(decode_image(data, where, self.max_image_pixels), self.geometry, where)
        except TileError as error:
            message = str(error).replace("tiles.max_image_pixels", "limits.max_image_pixels")
            raise RequestError(400, message, param="messages", code="invalid_image") from None

    def _rendered(self, request: ChatRequest) -> str:
        try:
            messages = list(request.conversation.messages)
            return str(self.reader.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except TemplateError as error:
            raise RequestError(400, f"the model's chat template refuses these messages: {error}", param="messages") from None

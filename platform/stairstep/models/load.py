"""From a recipe's `model` section to an encoder, or to its shape alone on torch's meta device (no weights, no network)."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch import nn
from transformers import Qwen3VLConfig

from stairstep.settings import InputError

from . import digest, weights
from .adapter_files import check_same_shape, locate_adapter, read_adapter
from .encoder import Encoder
from .inputs import IMAGE_PLACEHOLDER, Inputs, load_tokenizer
from .placement import Placement, place, trainable_line
from .settings import ModelSettings
from .sources import Source, locate, locate_config

__all__ = ["build_on_meta", "load_encoder", "trainable_line"]

_LOG = logging.getLogger(__name__)
_SPECIALS = {
    "image_token_id": IMAGE_PLACEHOLDER,
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


def load_encoder(settings: ModelSettings, device: torch.device | str = "cpu", *, trainable: bool = False, seed: int = 0) -> Encoder:
    """The encoder of a recipe, in eval mode.

    Trainable: with the recipe's adapter, drawn from `seed` or taken from `settings.start`, which must then fit it. Otherwise frozen: the
    bare base, or the base with the adapter folder `settings.start`, whose own config rules."""
    device = torch.device(device)
    attention = resolve_attention(settings, device)
    source = locate(settings.base, settings.revision, "model.base")
    config = weights.read_config(source.folder)
    tokenizer_folder = source.folder
    if settings.tokenizer is not None:
        tokenizer_folder = locate(settings.tokenizer, None, "model.tokenizer", ("*.json", "*.jinja", "*.txt")).folder
    tokenizer = load_tokenizer(tokenizer_folder)
    if source.shipped and not source.has_weights and settings.tokenizer is not None:
        _adopt_specials(config, tokenizer)
    inputs = Inputs(
        tokenizer, config, {"query": settings.query_instruction, "document": settings.document_instruction}, settings.max_text_tokens
    )
    model, identity = _base(settings, source, config, attention, device)
    placed, placement = place(model, settings.adapter if trainable else None, seed)
    encoder = Encoder(placed, inputs, settings, attention, identity, placement)
    if settings.start is not None:
        folder = locate_adapter(settings.start)
        if trainable:
            if settings.adapter is None:
                raise InputError("model.start: the recipe trains no adapter (model.adapter is null), so none can be started from")
            check_same_shape(encoder.model, read_adapter(folder), recipe=True)  # type: ignore[arg-type]
        encoder.load_trained(folder)
    _LOG.info("%s; %s", placement.describe(), trainable_line(encoder.model))
    return encoder.eval()


def _base(
    settings: ModelSettings, source: Source, config: Qwen3VLConfig, attention: str, device: torch.device
) -> tuple[nn.Module, dict[str, Any]]:
    dtype = weights.DTYPES[settings.dtype]
    if source.shipped and not source.has_weights:
        model: nn.Module = weights.from_seed(config, settings.init_seed, dtype, attention)
        return model.to(device), digest.seeded_identity(config, settings.init_seed)
    return weights.from_folder(source.folder, config, dtype, attention, device), digest.folder_identity(source.folder)


def resolve_attention(settings: ModelSettings, device: torch.device) -> str:
    """The attention implementation that `settings.attention` means on this device."""
    flash = importlib.util.find_spec("flash_attn") is not None
    possible = device.type == "cuda" and settings.dtype == "bfloat16"
    if settings.attention == "auto":
        return "flash_attention_2" if flash and possible else "sdpa"
    if settings.attention == "flash_attention_2" and not (flash and possible):
        reason = "the package flash_attn is not installed" if possible else "it needs a CUDA device and dtype bfloat16"
        raise InputError(f"model.attention: flash_attention_2 cannot be used: {reason}; set it to auto or sdpa")
    return settings.attention


def _adopt_specials(config: Qwen3VLConfig, tokenizer: Any) -> None:
    """Random weights know no tokens yet: they take the ids of their special tokens from the tokenizer that the recipe names."""
    for key, token in _SPECIALS.items():
        known = tokenizer.convert_tokens_to_ids(token)
        if known is None or known == tokenizer.unk_token_id:
            raise InputError(f"model.tokenizer: the tokenizer has no token {token}, which Qwen3-VL needs")
        setattr(config, key, known)


def build_on_meta(settings: ModelSettings) -> tuple[nn.Module, Placement]:
    """The model of a recipe with its adapter, names and shapes only; a known base needs neither weights nor network."""
    config = weights.read_config(locate_config(settings.base, settings.revision, "model.base").folder)
    with torch.device("meta"):
        return place(weights.on_meta(config), settings.adapter)

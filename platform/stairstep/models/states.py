"""The language model over tokens and tile features, with nothing asked of the device.

transformers' own forward looks into masks and finds the visual tokens on the device; each such question waits for all work before it, and a
step asks hundreds. Here the caller says where the visual tokens are. The layers are the model's own, adapter layers and checkpointing
included. Causal rows of one length, or padded on the right, need no mask: no real token sees what stands behind it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from .inputs import PlacedBatch, sent
from .tower import Features


def hidden_states(core: Any, batch: PlacedBatch, features: Features | None, mask: Tensor | None) -> Tensor:
    """The last hidden states [B, L, d] of a batch whose visual tokens are `features`, in their order."""
    model = core.language_model
    hidden = model.embed_tokens(batch.ids)
    shape = hidden.shape
    if features is not None:
        hidden = hidden.flatten(0, 1).index_copy(0, batch.visual, features.merged[0].to(hidden.dtype)).view(shape)
    rotary = model.rotary_emb(hidden, batch.positions[1:])
    deepstack = () if features is None else features.deepstack
    for number, layer in enumerate(model.layers):
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        if number < len(deepstack):
            hidden = hidden.flatten(0, 1).index_add(0, batch.visual, deepstack[number][0].to(hidden.dtype)).view(shape)
    return cast(Tensor, model.norm(hidden))


def attention_mask(batch: PlacedBatch, attention: str, bidirectional: bool, dtype: torch.dtype) -> Tensor | None:
    """What the attention kernel has to be told: nothing where its own causality, or none, is right.

    `eager` has no flag for causality. Bidirectional rows need a mask where they are padded."""
    device, width = batch.ids.device, batch.ids.shape[1]
    if not bidirectional:
        if attention != "eager":
            return None
        later = torch.ones(width, width, dtype=torch.bool, device=device).triu(1)
        return torch.zeros(later.shape, dtype=dtype, device=device).masked_fill(later, torch.finfo(dtype).min)[None, None]
    if batch.uniform:
        return None
    real = torch.arange(width, device=device) < sent(torch.tensor(batch.lengths), device)[:, None]
    if attention == "flash_attention_2":
        return real.long()
    mask = torch.zeros(real.shape, dtype=dtype, device=device)
    return mask.masked_fill(~real, torch.finfo(dtype).min)[:, None, None, :].expand(-1, 1, width, -1)

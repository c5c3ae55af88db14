"""What makes pretraining quick on a CPU that multiplies bfloat16: around the multiplications, not they, goes most of a step's time.

Attention stays in float32 (its backward pass in bfloat16 takes eight times as long on a CPU), and the layers are compiled into few loops
over memory. Both only under `model.dtype: bfloat16` on a CPU; one without such units takes float32, and a GPU needs nothing of this.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

WIDE = "sdpa_float32"
_SHAPES = 64  # widths of a batch times its sizes; past this torch would go on uncompiled


def cpu_dtype() -> str:
    """The quicker numbers of this CPU: bfloat16 where it has matrix units for it, else float32."""
    ask = getattr(torch.cpu, "get_capabilities", None)  # torch 2.11 cannot say
    return "bfloat16" if ask is not None and ask().get("amx_bf16") else "float32"


def _wide_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, Tensor | None]:
    with torch.autocast(query.device.type, enabled=False):
        mixed, weights = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **more)
    return mixed.to(value.dtype), weights


AttentionInterface.register(WIDE, _wide_attention)


def compile_layers(model: Any) -> bool:
    """Compile the layers of a generating model in place, where there is a C++ compiler to do it with; whether it was done."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return False
    config = torch._dynamo.config
    config.cache_size_limit = max(config.cache_size_limit, _SHAPES)
    for layer in model.model.language_model.layers:
        # Few shapes, and loops of a known length are half as long again in time where they are not known. The forward pass and not the
        # call, so that hooks stay outside.
        layer.forward = torch.compile(layer.forward, dynamic=False)
    for block in model.model.visual.blocks:
        block.mlp.compile(dynamic=True)  # any number of pages
    return True


@contextmanager
def uncompiled() -> Iterator[None]:
    """For looking: an exam has shapes of all kinds, each once."""
    with torch.compiler.set_stance("force_eager"):
        yield

"""Floating-point operations of a Qwen3-VL encoder, from its shapes: what a token, a patch and a pair of tokens in attention cost.

A multiplication with its addition counts as two. Counted are the linear layers (LoRA's among them), the patch embedding and attention;
norms, activations and everything else are not, and stand in the share of the matrix rate that a whole step is taken to reach.
A backward pass sends the gradient through every layer that something trained lies in or below, once as much as forward (attention twice),
and adds as much again for each layer whose own weights are trained.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

from peft import PeftModel
from torch import nn

from stairstep.tiles import PATCH_VALUES

from .placement import VISION_TOWER

PATCHES_PER_TOKEN = 4
_LLM, _BLOCKS = "language_model.layers.", f"{VISION_TOWER}.blocks."


@dataclass(frozen=True)
class Work:
    """Operations by token of the language model, by patch of the vision tower, and by pair of tokens or patches of one item."""

    token: float = 0.0
    patch: float = 0.0
    token_pair: float = 0.0
    patch_pair: float = 0.0

    def __add__(self, other: Work) -> Work:
        """One after the other."""
        return Work(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))

    def of(self, tokens: float, visual: float = 0.0) -> float:
        """One item of so many tokens, of which so many are visual."""
        patches = visual * PATCHES_PER_TOKEN
        return self.token * tokens + self.token_pair * tokens**2 + self.patch * patches + self.patch_pair * patches**2


def core_of(model: nn.Module) -> Any:
    """The Qwen3-VL model under an adapter, or itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def forward_and_backward(model: nn.Module) -> tuple[Work, Work]:
    """The work of a forward pass and of a backward pass."""
    core = core_of(model)
    text, vision = core.config.text_config, core.config.vision_config
    through = {"token": 0.0, "patch": 2.0 * PATCH_VALUES * vision.hidden_size}
    own = {"token": 0.0, "patch": 0.0}
    trained = {"token": False, "patch": False}
    for name, module in core.named_modules():
        side = "patch" if name.startswith(f"{VISION_TOWER}.") else "token"
        trained[side] |= any(one.requires_grad for one in module.parameters(recurse=False))
        if not isinstance(module, nn.Linear) or not (side == "patch" or name.startswith(_LLM)):
            continue
        # A merger works once for each visual token.
        count = 1.0 if side == "token" or name.startswith(_BLOCKS) else 1 / PATCHES_PER_TOKEN
        cost = 2.0 * count * module.in_features * module.out_features
        through[side] += cost
        own[side] += cost * module.weight.requires_grad
    pairs = 4.0 * text.num_hidden_layers * text.num_attention_heads * text.head_dim, 4.0 * vision.depth * vision.hidden_size
    down = trained["token"] or trained["patch"], trained["patch"]
    forward = Work(through["token"], through["patch"], *pairs)
    backward = Work(
        (through["token"] + own["token"]) * down[0],
        (through["patch"] + own["patch"]) * down[1],
        2 * pairs[0] * down[0],
        2 * pairs[1] * down[1],
    )
    return forward, backward

"""The bi-encoder: texts and tiles to unit vectors, with whatever adapter sits on the base.

A vector does not depend on padding or on what else is in the call: causal rows are padded on the right, where no real token looks;
bidirectional rows of different lengths are masked; every tile has its own attention in the vision tower. Positions are passed explicitly,
and nothing on the way to a vector waits for the device.
Under bfloat16 the frozen weights are bfloat16, what is trained is float32, and the computation runs under autocast; vectors are float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from peft import PeftModel
from torch import nn
from transformers import Qwen3VLModel

from stairstep.settings import InputError, StairstepError

from . import digest
from .adapter_files import ADAPTER, canonical, check_same_shape, lora_layers, read_adapter, trained_tensors, write_adapter
from .inputs import Inputs, PlacedBatch, Role
from .placement import VISION_TOWER, Placement, attach
from .settings import ModelSettings
from .states import attention_mask, hidden_states
from .tower import tile_features
from .weights import DTYPES

GROUPS = ("llm", "vit", "merger")
_ARITHMETIC = 2  # to be raised where the order of operations changes: vectors of before may then differ in their last bits


class Encoder(nn.Module):
    """A Qwen3-VL bi-encoder; made by `load_encoder`."""

    def __init__(
        self, model: nn.Module, inputs: Inputs, settings: ModelSettings, attention: str, identity: dict[str, Any], placement: Placement
    ) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.settings = settings
        self.attention = attention
        self.placement = placement
        self._identity = identity
        self._fresh: dict[str, torch.Tensor] = {}
        self._dtype = DTYPES[settings.dtype]
        self._prepare()

    def _prepare(self) -> None:
        """What has to follow whenever the modules of the model were replaced."""
        if isinstance(self.model, PeftModel):
            self._fresh = digest.fresh_magnitudes(self.model)
            if self._dtype == torch.bfloat16:
                for layer in lora_layers(self.model).values():
                    # Autocast runs LoRA in bfloat16 as well; DoRA's weight norms need the float32 that PEFT casts to.
                    layer.cast_input_dtype_enabled = ADAPTER in layer.lora_magnitude_vector
        if self.settings.bidirectional:
            for block in self.core.language_model.layers:
                block.self_attn.is_causal = False
        if self.settings.gradient_checkpointing:
            self.core.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    @property
    def core(self) -> Qwen3VLModel:
        """The Qwen3-VL model itself, adapter layers included."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        """Where the encoder computes."""
        return next(self.model.parameters()).device

    @property
    def dimension(self) -> int:
        """The length of a vector."""
        return int(cast(Any, self.core.config).text_config.hidden_size)

    def text_tokens(self, text: str, role: Role) -> int:
        """How many tokens a text is as a query or document, template included: its cost."""
        return len(self.inputs.text_ids([text], role)[0])

    def tile_tokens(self, height: int, width: int) -> int:
        """How many tokens a resized tile of this many pixels is, template included: its cost."""
        return self.inputs.tile_length(height, width)

    def encode_texts(self, texts: Sequence[str], role: Role) -> torch.Tensor:
        """Unit vectors [n, d] of texts as queries or documents, differentiable."""
        if not texts:
            return self._nothing()
        return self._embed(self.inputs.texts(texts, role, self.device))

    def encode_tiles(self, pixels: Sequence[torch.Tensor]) -> torch.Tensor:
        """Unit vectors [n, d] of resized tiles (uint8 [3, h, w], any sizes together) as documents, differentiable."""
        if not pixels:
            return self._nothing()
        batch = self.inputs.tiles([(int(tile.shape[-2]), int(tile.shape[-1])) for tile in pixels], self.device)
        return self._embed(batch, pixels)

    def _nothing(self) -> torch.Tensor:
        return torch.zeros(0, self.dimension, dtype=self._vector_dtype, device=self.device)

    @property
    def _vector_dtype(self) -> torch.dtype:
        return torch.float64 if self._dtype == torch.float64 else torch.float32

    def _embed(self, batch: PlacedBatch, pixels: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        mask = attention_mask(batch, self.attention, self.settings.bidirectional, self._dtype)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            hidden = hidden_states(self.core, batch, tile_features(self.core.visual, pixels, self.device), mask)
        return nn.functional.normalize(hidden.flatten(0, 1).index_select(0, batch.last).to(self._vector_dtype), dim=-1)

    def groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """What is trained, with canonical names, by part of the model: llm, vit, merger."""
        found: dict[str, list[tuple[str, nn.Parameter]]] = {group: [] for group in GROUPS}
        for key, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                name = canonical(key)
                found[_group(name)].append((name, parameter))
        return found

    def save(self, folder: Path) -> None:
        """Writes a standard PEFT adapter folder with everything that is trained."""
        if not isinstance(self.model, PeftModel):
            raise StairstepError(f"{folder}: there is no adapter to save (model.adapter is null): the base is as it was loaded")
        write_adapter(Path(folder), self.model, self.settings.base)

    def load_trained(self, folder: Path) -> None:
        """Takes everything trained from an adapter folder, bit for bit; a bare frozen base takes on the folder's own adapter first."""
        files = read_adapter(Path(folder))
        if not isinstance(self.model, PeftModel):
            if any(parameter.requires_grad for parameter in self.model.parameters()):
                raise StairstepError("an encoder that trains its base whole takes no adapter")
            try:
                self.model = attach(self.model, files.config, seed=0)
            except ValueError as error:
                raise InputError(f"{folder}: this adapter does not fit the base: {error}") from None
            self.model.requires_grad_(False)
            self._prepare()
            self.model.train(self.training)
        check_same_shape(self.model, files, recipe=False)
        with torch.no_grad():
            for name, tensor in trained_tensors(self.model).items():
                tensor.copy_(files.tensors[name])

    @contextlib.contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """The plain base inside the block, modules trained whole included; trainability is as before after it."""
        if not isinstance(self.model, PeftModel):
            yield
            return
        trainable = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        try:
            with self.model.disable_adapter():
                yield
        finally:
            for parameter, wanted in trainable:
                parameter.requires_grad_(wanted)

    def state_digest(self, adapter: bool = True) -> str:
        """SHA-256 of everything that decides a vector; an adapter that changes nothing leaves the digest of the plain base.

        Without `adapter`: the digest of the plain base, for vectors that are made with the adapter off."""
        trained = digest.trained_identity(self.model, self._fresh) if adapter and isinstance(self.model, PeftModel) else {}
        return digest.of_json(
            {
                "base": self._identity,
                "arithmetic": _ARITHMETIC,
                "trained": trained,
                "inputs": self.inputs.digest(),
                "dtype": self.settings.dtype,
                "attention": self.attention,
                "bidirectional": self.settings.bidirectional,
                "device": self.device.type,
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            }
        )


def _group(name: str) -> str:
    if not name.startswith(f"{VISION_TOWER}."):
        return "llm"
    return "merger" if name.startswith((f"{VISION_TOWER}.merger.", f"{VISION_TOWER}.deepstack_merger_list.")) else "vit"

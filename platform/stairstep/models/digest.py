"""The content of an encoder as one SHA-256, so that embeddings computed once are found again.

An adapter that changes nothing yet (its B matrices zero, its magnitudes and whole modules as they were) leaves the digest of the plain
base, so that step 0 of every trial shares the base's embeddings.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import Qwen3VLConfig

from .adapter_files import ADAPTER, canonical, lora_layers
from .placement import VISION_TOWER
from .weights import weight_files

_FILES: dict[tuple[str, int, int], str] = {}


def file_digest(path: Path) -> str:
    """SHA-256 of a file, computed once per path, size and time of change in this process."""
    status = path.stat()
    key = (str(path.resolve()), status.st_size, status.st_mtime_ns)
    if key not in _FILES:
        with path.open("rb") as stream:
            _FILES[key] = hashlib.file_digest(stream, "sha256").hexdigest()
    return _FILES[key]


def folder_identity(folder: Path) -> dict[str, Any]:
    """The identity of a base with weights: the content of its config and of its safetensors."""
    files = [folder / "config.json", *weight_files(folder)]
    return {"files": {path.name: file_digest(path) for path in files}}


def seeded_identity(config: Qwen3VLConfig, seed: int) -> dict[str, Any]:
    """The identity of random weights: the config they were drawn for, and the seed."""
    plain = config.to_dict()
    for unrelated in ("_name_or_path", "transformers_version", "architectures"):
        plain.pop(unrelated, None)
    return {"config": json.loads(json.dumps(plain, sort_keys=True, default=str)), "init_seed": seed}


def of_json(content: Any) -> str:
    """SHA-256 of plain content, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def of_tensor(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's type, shape and bytes."""
    plain = tensor.detach().cpu().contiguous()
    head = f"{plain.dtype}{list(plain.shape)}".encode()
    return hashlib.sha256(head + plain.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def fresh_magnitudes(model: PeftModel) -> dict[str, torch.Tensor]:
    """Copies of the DoRA magnitudes of an adapter that was just placed: what they are while they change nothing."""
    return {name: found.detach().clone() for name, found in _magnitudes(model).items()}


def _magnitudes(model: PeftModel) -> dict[str, torch.Tensor]:
    return {
        name: cast(torch.Tensor, layer.lora_magnitude_vector[ADAPTER].weight)
        for name, layer in lora_layers(model).items()
        if ADAPTER in layer.lora_magnitude_vector
    }


def _same_in_float32(name: str) -> bool:
    """Whether a weight held in float32 computes under bfloat16 autocast what it did in bfloat16.

    The vision tower's linear layers, patch embedding, layer norms and position table do; the LLM's norms and embeddings widen the residual
    stream."""
    return name.startswith(f"{VISION_TOWER}.")


def trained_identity(model: PeftModel, fresh: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Every trained tensor that makes the model differ from its base, with what scales it; empty for an adapter without effect."""
    identity: dict[str, Any] = {}
    magnitudes = _magnitudes(model)
    for name, layer in lora_layers(model).items():
        parts = {canonical(key): tensor for key, tensor in cast(nn.Module, layer).named_parameters() if "lora_" in key}
        ups = [tensor for key, tensor in parts.items() if key.startswith(("lora_B", "lora_embedding_B"))]
        same_magnitude = name not in magnitudes or torch.equal(magnitudes[name], fresh[name])
        if same_magnitude and not any(bool(tensor.any()) for tensor in ups):
            continue
        identity[name] = {key: of_tensor(tensor) for key, tensor in parts.items()} | {"scaling": layer.scaling[ADAPTER]}
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            originals = dict(module.original_module.named_parameters())
            for key, tensor in module.modules_to_save[ADAPTER].named_parameters():
                changed = not torch.equal(tensor, originals[key].to(tensor.dtype))
                if changed or (tensor.dtype != originals[key].dtype and not _same_in_float32(canonical(f"{name}.{key}"))):
                    identity[canonical(f"{name}.{key}")] = of_tensor(tensor)
    return identity

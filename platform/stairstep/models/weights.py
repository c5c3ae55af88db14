"""A base's config and weights as a `Qwen3VLModel`: from safetensors, from a seed, or with no numbers at all on torch's meta device.

Loading is strict: after it no weight is missing and none was left over, whatever prefix the checkpoint's keys carry. Only parameters are
cast to the recipe's dtype; the rotary tables stay float32, which a plain `.to(bfloat16)` of the module would round.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import Qwen3VLConfig, Qwen3VLModel

from stairstep.settings import InputError

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a model folder as a mapping."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent}: there is no {path.name} in this folder; expected a Hugging Face model folder") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: this file cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object")
    return content


def read_config(folder: Path) -> Qwen3VLConfig:
    """The Qwen3-VL config of a folder."""
    content = read_json(folder / "config.json")
    if content.get("model_type") != "qwen3_vl":
        raise InputError(f"{folder / 'config.json'}: expected model_type qwen3_vl, found {content.get('model_type')}")
    try:
        return Qwen3VLConfig.from_dict(content)
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"{folder / 'config.json'}: this is not a usable Qwen3-VL config: {error}") from None


def _build(config: Qwen3VLConfig, attention: str) -> Qwen3VLModel:
    """A model of the config in float32, whatever dtype the config asks for; `config` itself is left as it is."""
    return Qwen3VLModel._from_config(copy.deepcopy(config), dtype=torch.float32, attn_implementation=attention)


def on_meta(config: Qwen3VLConfig) -> Qwen3VLModel:
    """The model with no numbers in it: names and shapes only."""
    with torch.device("meta"):
        return _build(config, "sdpa")


def from_seed(config: Qwen3VLConfig, seed: int, dtype: torch.dtype, attention: str) -> Qwen3VLModel:
    """Random weights on the CPU, the same for the same config, seed and library versions; torch's own random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(config, attention)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def from_folder(folder: Path, config: Qwen3VLConfig, dtype: torch.dtype, attention: str, device: torch.device) -> Qwen3VLModel:
    """The folder's safetensors in the model, every key accounted for."""
    with init_empty_weights(include_buffers=False):
        model = _build(config, attention)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    found: dict[str, torch.Tensor] = {}
    unexpected, wrong = [], []
    for key, tensor in _tensors(folder, device):
        name = _bare(key, wanted)
        if name is None:
            continue
        if name not in wanted or name in found:
            unexpected.append(key)
        elif wanted[name] != tensor.shape:
            wrong.append(f"{key} is {list(tensor.shape)} instead of {list(wanted[name])}")
        else:
            found[name] = tensor.to(dtype)
    missing = [name for name in wanted if name not in found]
    complaints = [
        f"{len(names)} {what}: {', '.join(names[:4])}{', …' if len(names) > 4 else ''}"
        for what, names in (("of another shape", wrong), ("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if complaints:
        raise InputError(f"{folder}: the weights do not fit config.json: {'; '.join(complaints)}. Check that the download is complete")
    model.load_state_dict(found, strict=True, assign=True)
    return cast(Qwen3VLModel, nn.Module.to(model, device))


def _bare(key: str, wanted: Iterable[str]) -> str | None:
    """A checkpoint's key as the bare model names it; None for the language head, which an encoder has no use for."""
    if key.removeprefix("model.").startswith("lm_head."):
        return None
    if key in wanted:
        return key
    return key.removeprefix("model.")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a folder that make up the model: the shards that the index names, else model.safetensors."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) and Path(name).name == name for name in shards.values()):
            raise InputError(f"{index}: expected a weight_map from keys to file names in the same folder")
        files = [folder / name for name in sorted(set(shards.values()))]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            pickled = " (pickled weights are never read)" if any(folder.glob("*.bin")) else ""
            raise InputError(f"{folder}: there is no {file.name} in this folder{pickled}; expected safetensors, whole or in shards")
    return files


def _tensors(folder: Path, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt", device=str(device)) as shard:
                for key in shard.keys():  # noqa: SIM118 (no dictionary: it cannot be iterated)
                    yield key, shard.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: these weights cannot be read: {error}; fetch the file again") from None

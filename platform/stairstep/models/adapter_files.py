"""Adapter folders: finding one (local or on the hub), reading it, writing it, and telling how it differs from what a recipe asks for.

The format is PEFT's own: adapter_config.json and adapter_model.safetensors, keys below `base_model.model.`. Inside Stairstep a trained
tensor has one canonical name, the same with or without an adapter name in the file's keys, and the same for a checkpoint trained on
`Qwen3VLModel` and one trained on the generating model around it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from stairstep.settings import InputError

from .placement import VISION_TOWER, row_of
from .sources import fetch
from .weights import read_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ADAPTER = "default"
_PREFIX = "base_model.model."
_PLAIN_INITS = (True, False, "gaussian")
_NOT_PLAIN = ("layer_replication", "megatron_config")  # other layers than the base has; code that the file names


@dataclass(frozen=True)
class AdapterFolder:
    """What an adapter folder holds: its PEFT config, and its tensors under their canonical names."""

    folder: Path
    config: LoraConfig
    tensors: dict[str, torch.Tensor]


def canonical(key: str) -> str:
    """The name of a trained tensor, from a key of an adapter file or the name of a parameter of a PEFT model."""
    key = key.removeprefix(_PREFIX).removeprefix("model.")
    key = key.replace(f".modules_to_save.{ADAPTER}.", ".").replace(".modules_to_save.", ".")
    key = re.sub(rf"\.{ADAPTER}(?=\.|$)", "", key)
    return key.removesuffix(".weight") if key.endswith("lora_magnitude_vector.weight") else key


def locate_adapter(start: str, key: str = "model.start") -> Path:
    """The local folder of an adapter given as a folder or as `repo[@revision][:subfolder]` on the hub."""
    folder = Path(start).expanduser()
    if folder.is_dir():
        return folder
    match = re.fullmatch(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[^:]+))?(?::(?P<sub>.+))?", start)
    if match is None or folder.exists():
        raise InputError(
            f"{key}: there is no adapter folder {start}; expected a folder with {CONFIG} and {WEIGHTS}, or repo[@revision][:subfolder]"
        )
    sub = (match["sub"] or "").strip("/")
    if ".." in sub.split("/"):
        raise InputError(f"{key}: the subfolder '{sub}' must lie inside the repository")
    files = [f"{sub}/{name}" if sub else name for name in (CONFIG, WEIGHTS)]
    found = fetch(match["repo"], match["revision"], files, key) / sub
    if not (found / CONFIG).is_file():
        raise InputError(f"{key}: '{match['repo']}' has no {CONFIG} under '{sub or '.'}'; check the subfolder")
    return found


def read_adapter(folder: Path) -> AdapterFolder:
    """The config and tensors of an adapter folder; safetensors only."""
    config = _read_config(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = " (a pickled adapter is never read)" if (folder / "adapter_model.bin").exists() else ""
        raise InputError(f"{folder}: there is no {WEIGHTS} in this folder{pickled}")
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: this adapter cannot be read: {error}; it may be incomplete") from None
    tensors = {canonical(key): tensor for key, tensor in stored.items()}
    if len(tensors) != len(stored):
        raise InputError(f"{path}: two of its keys name the same weight; expected one adapter in the file")
    return AdapterFolder(folder, config, tensors)


def _read_config(folder: Path) -> LoraConfig:
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder}: there is no {CONFIG} in this folder; expected an adapter folder, for example a run's checkpoint")
    content = read_json(folder / CONFIG)
    kind = str(content.get("peft_type"))
    if kind != "LORA":
        raise InputError(f"{folder / CONFIG}: expected an adapter of peft_type LORA, found {kind}")
    if content.get("init_lora_weights", True) not in _PLAIN_INITS:
        raise InputError(
            f"{folder / CONFIG}: init_lora_weights '{content['init_lora_weights']}' changes the base itself;"
            " convert the adapter to plain LoRA first (PEFT's path_initial_model_for_weight_conversion)"
        )
    for key in _NOT_PLAIN:
        if content.get(key):
            raise InputError(f"{folder / CONFIG}: {key} is not supported; expected plain LoRA on the base's own layers")
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"{folder / CONFIG}: this is not a usable LoRA config: {error}") from None
    config.base_model_name_or_path = None
    return cast(LoraConfig, config)


def write_adapter(folder: Path, model: PeftModel, base: str) -> None:
    """A standard PEFT adapter folder with everything that the model trains."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {_PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in trained_tensors(model).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = model.peft_config[ADAPTER]
    kept = config.inference_mode, config.base_model_name_or_path
    config.inference_mode, config.base_model_name_or_path = True, base
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode, config.base_model_name_or_path = kept


def trained_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """Everything that the adapter trains, by canonical name; the tensors are the model's own, not copies."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {canonical(key): tensor for key, tensor in state.items()}


def scalings(config: LoraConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """The factor on the update of every LoRA module in the tensors, as the config gives it."""
    found = {}
    for name, tensor in tensors.items():
        module, dot, _ = name.partition(".lora_A")
        if dot:
            rank = tensor.shape[0]
            alpha = (config.alpha_pattern or {}).get(get_pattern_key(list(config.alpha_pattern or {}), module), config.lora_alpha)
            found[module] = alpha / (math.sqrt(rank) if config.use_rslora else rank)
    return found


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """The LoRA layers of a model, by the name that the layer under each has in the bare base."""
    return {
        name.removeprefix(_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and ADAPTER in module.scaling
    }


def check_same_shape(model: PeftModel, files: AdapterFolder, recipe: bool) -> None:
    """That the folder holds exactly what the model trains, with the same scaling; the error names the differences.

    `recipe` says that the model was made from the recipe's adapter settings, so that the message can name their keys."""
    own = trained_tensors(model)
    complaints = [_describe("the folder has", files.tensors.keys() - own.keys(), recipe, files.tensors)]
    complaints.append(_describe("the folder lacks", own.keys() - files.tensors.keys(), recipe, own))
    shared = sorted(own.keys() & files.tensors.keys())
    shaped = [name for name in shared if own[name].shape != files.tensors[name].shape]
    if shaped:
        complaints.append(_shape_complaint(shaped[0], len(shaped), own, files.tensors, recipe))
    elif shared:
        theirs = scalings(files.config, files.tensors)
        for module, layer in lora_layers(model).items():
            if module in theirs and not math.isclose(theirs[module], layer.scaling[ADAPTER], rel_tol=1e-9):
                key = " (model.adapter.alpha, rslora or vit_alpha)" if recipe else ""
                complaints.append(f"the update of {module} is scaled by {theirs[module]:g} there and {layer.scaling[ADAPTER]:g} here{key}")
                break
    said = "; ".join(complaint for complaint in complaints if complaint)
    if said:
        remedy = (
            "change the recipe's adapter to match, or train from the base" if recipe else "it belongs to another base or another recipe"
        )
        raise InputError(f"{files.folder}: this adapter does not fit: {said}. {remedy[0].upper()}{remedy[1:]}")


def _shape_complaint(name: str, count: int, own: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], recipe: bool) -> str:
    there, here = theirs[name].shape, own[name].shape
    if ".lora_" in name and len(there) == 2:
        axis = 0 if ".lora_A" in name else 1
        key = "vit_rank" if name.startswith(f"{VISION_TOWER}.") else "rank"
        said = f"LoRA rank {there[axis]} there and {here[axis]} here" + (f" (model.adapter.{key})" if recipe else "")
        if there[1 - axis] == here[1 - axis]:
            return f"{said}, in {count} tensors"
    return f"{name} is {list(there)} there and {list(here)} here ({count} tensors differ)"


def _describe(what: str, names: Any, recipe: bool, tensors: Mapping[str, torch.Tensor]) -> str:
    """Tensors that only one side has, summed up by row of the placement table."""
    if not names:
        return ""
    rows: dict[str, int] = {}
    for name in names:
        if "lora_magnitude_vector" in name:
            row = "DoRA magnitudes" + (" (model.adapter.dora)" if recipe else "")
        elif ".lora_" in name:
            found = row_of(name.partition(".lora_")[0])
            row = f"LoRA on {found}" + (f" (model.adapter.targets.{found})" if recipe and "." not in found else "")
        elif recipe and name.startswith(f"{VISION_TOWER}."):
            row = "whole modules of the vision tower (model.adapter.vit_unfrozen or modules_to_save)"
        else:
            row = "whole modules" + (" (model.adapter.modules_to_save)" if recipe else f" ({name}, …)")
        rows[row] = rows.get(row, 0) + 1
    listed = sorted(rows.items())
    more = f" and {len(listed) - 4} more kinds" if len(listed) > 4 else ""
    return f"{what} " + ", ".join(f"{row}: {count} tensors" for row, count in listed[:4]) + more

"""Where the adapter goes: a small table of rows, each a family of linear layers, and what the recipe turns on in it.

Every pattern of a recipe matches something or is an error that names its key; what it matched is counted for the log. The result is a plain
PEFT LoRA config, so the checkpoint is one that PEFT alone can load. Names are those of the bare `Qwen3VLModel`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from stairstep.settings import InputError

from .settings import PROJECTIONS, VISUAL_ROWS, AdapterSettings

PARENTS: dict[str, str] = {
    "llm_attention": r"language_model\.layers\.\d+\.self_attn",
    "llm_mlp": r"language_model\.layers\.\d+\.mlp",
    "vit_attention": r"visual\.blocks\.\d+\.attn",
    "vit_mlp": r"visual\.blocks\.\d+\.mlp",
    "merger": r"visual\.(?:merger|deepstack_merger_list\.\d+)",
}
VISION_TOWER = "visual"
_KEY = "model.adapter"
_CARRIERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Placement:
    """What the adapter settings matched: modules by row of the table, and the parameters that follow from it."""

    rows: dict[str, int] = field(default_factory=dict)
    trainable: int = 0
    total: int = 0

    def describe(self) -> str:
        """One line for the log: how many modules each row matched."""
        return "adapter on " + (", ".join(f"{row}: {count} modules" for row, count in self.rows.items()) or "nothing (the bare base)")


def row_of(module: str) -> str:
    """The row of the table that a module belongs to, or the module's own name where none does."""
    for row, parent in PARENTS.items():
        if re.fullmatch(rf"{parent}\.({'|'.join(PROJECTIONS[row])})", module):
            return row
    return module


def plan(model: nn.Module, adapter: AdapterSettings) -> tuple[LoraConfig, dict[str, int]]:
    """The PEFT config for these settings on this model, and how many modules each of their patterns matches."""
    carriers = [name for name, module in model.named_modules() if isinstance(module, _CARRIERS)]
    rows: dict[str, int] = {}
    patterns: list[str] = []
    for row, parent in PARENTS.items():
        for projection in adapter.targets.projections(row):
            pattern = rf"{parent}\.{projection}"
            rows[row] = rows.get(row, 0) + _count(pattern, carriers, f"targets.{row}")
        if row in rows:
            patterns.append(rf"{parent}\.(?:{'|'.join(adapter.targets.projections(row))})")
    if adapter.target_regex is not None:
        rows["target_regex"] = _count(adapter.target_regex, carriers, "target_regex")
        patterns.append(f"(?:{adapter.target_regex})")
    lora = [name for name in carriers if any(re.fullmatch(pattern, name) for pattern in patterns)]
    whole = list(adapter.modules_to_save) + ([VISION_TOWER] if adapter.vit_unfrozen else [])
    _whole_modules(model, adapter, lora, rows)
    rank_pattern, alpha_pattern = _vision(adapter, lora)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=_plain(adapter.alpha),  # type: ignore[arg-type]
        lora_dropout=adapter.dropout,
        target_modules=rf"(?:.*\.)?(?:{'|'.join(patterns)})" if patterns else DUMMY_TARGET_MODULES,
        modules_to_save=whole or None,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        use_dora=adapter.dora,
        use_rslora=adapter.rslora,
        bias="none",
    )
    return config, rows


def _count(pattern: str, names: Iterable[str], key: str) -> int:
    count = sum(re.fullmatch(pattern, name) is not None for name in names)
    if not count:
        raise InputError(f"{_KEY}.{key}: the pattern '{pattern}' matches no layer of this base that LoRA can sit on")
    return count


def _whole_modules(model: nn.Module, adapter: AdapterSettings, lora: list[str], rows: dict[str, int]) -> None:
    """Counts the modules trained whole, with PEFT's own rule for their names, and refuses what would be trained twice."""
    matched: list[tuple[str, str]] = []
    for ending in adapter.modules_to_save:
        found = [name for name, module in model.named_modules() if name.endswith(ending) and any(True for _ in module.parameters())]
        if not found:
            raise InputError(f"{_KEY}.modules_to_save: no module with weights has a name that ends in '{ending}'")
        rows[f"modules_to_save {ending}"] = len(found)
        matched += [(name, "modules_to_save") for name in found]
    if adapter.vit_unfrozen:
        rows["vit_unfrozen"] = 1
        matched.append((VISION_TOWER, "vit_unfrozen"))
    for index, (name, key) in enumerate(matched):
        others = [other for other, _ in matched[:index] + matched[index + 1 :]] + lora
        clash = next((other for other in others if other == name or other.startswith(f"{name}.")), None)
        if clash is not None:
            raise InputError(f"{_KEY}.{key}: {name} is trained whole, and {clash} inside it would be trained a second time; keep one")


def _vision(adapter: AdapterSettings, lora: list[str]) -> tuple[dict[str, int], dict[str, float]]:
    """The rank and alpha of everything in the vision tower, where they are not those of the LLM."""
    if adapter.vit_rank is None and adapter.vit_alpha is None:
        return {}, {}
    if not any(name.startswith(f"{VISION_TOWER}.") for name in lora):
        key = "vit_rank" if adapter.vit_rank is not None else "vit_alpha"
        raise InputError(f"{_KEY}.{key}: no LoRA is placed in the vision tower; turn on one of targets.{', targets.'.join(VISUAL_ROWS)}")
    pattern = rf"{VISION_TOWER}\..*"
    rank = adapter.vit_rank if adapter.vit_rank is not None else adapter.rank
    alpha = adapter.vit_alpha
    if alpha is None:
        alpha = adapter.alpha if adapter.vit_rank is None else float(rank)
    return {pattern: rank}, {pattern: _plain(alpha)}


def _plain(alpha: float) -> float:
    """PEFT's configs hold alpha as a whole number where it is one."""
    return int(alpha) if alpha == int(alpha) else alpha


def attach(model: nn.Module, config: LoraConfig, seed: int) -> PeftModel:
    """The model with the adapter in it, its random half drawn on the CPU from `seed`; what is trained is at least float32."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(rank_pattern|alpha_pattern) keys did not match.*")
        torch.manual_seed(seed)
        peft = get_peft_model(model, config)  # type: ignore[arg-type]
    for name, parameter in peft.named_parameters():
        if ".modules_to_save." in name and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    _exact_magnitudes(peft)
    return peft


def _exact_magnitudes(model: nn.Module) -> None:
    """DoRA's magnitudes as the float32 norms that its forward pass computes: PEFT rounds them to the base's dtype, and a fresh DoRA
    adapter on a bfloat16 base would already differ from that base."""
    for module in model.modules():
        magnitudes: Any = module.lora_magnitude_vector if isinstance(module, LoraLayer) else {}
        for magnitude in magnitudes.values():
            weight = cast(Any, module).get_base_layer().weight
            if weight.dtype in (torch.bfloat16, torch.float16) and weight.ndim == 2:
                nothing = torch.zeros_like(weight, dtype=torch.float32)
                with torch.no_grad():
                    magnitude.weight.copy_(magnitude.get_weight_norm(weight.float(), nothing, 1.0))


def place(model: nn.Module, adapter: AdapterSettings | None, seed: int = 0) -> tuple[nn.Module, Placement]:
    """The model with the recipe's adapter in it, and what its patterns matched; without an adapter the whole base is frozen."""
    if adapter is None:
        model.requires_grad_(False)
        return model, Placement({}, 0, _total(model))
    config, rows = plan(model, adapter)
    peft = attach(model, config, seed)
    trainable = sum(parameter.numel() for parameter in peft.parameters() if parameter.requires_grad)
    return peft, Placement(rows, trainable, _total(peft))


def _total(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def trainable_line(model: nn.Module) -> str:
    """The line that PEFT prints about a model: trainable and all parameters, adapters counted in both."""
    total = _total(model)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"

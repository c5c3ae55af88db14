"""What a recipe says about its encoder: which base, in which numbers, and what of it is trained.

The projections that a placement row may name are fixed by the architecture, so a wrong name is found while the recipe is read; whether a
free pattern (`target_regex`, `modules_to_save`) matches anything is known when the model is built (placement.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Literal

from stairstep.settings import SettingError, setting

PROJECTIONS: dict[str, tuple[str, ...]] = {
    "llm_attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "llm_mlp": ("gate_proj", "up_proj", "down_proj"),
    "vit_attention": ("qkv", "proj"),
    "vit_mlp": ("linear_fc1", "linear_fc2"),
    "merger": ("linear_fc1", "linear_fc2"),
}
VISUAL_ROWS = ("vit_attention", "vit_mlp", "merger")


@dataclass(frozen=True)
class TargetSettings:
    """Which linear layers carry LoRA: a whole row with true, some of its projections with a list of their names."""

    llm_attention: bool | tuple[str, ...] = setting(True, doc="LLM attention: q_proj, k_proj, v_proj, o_proj of every layer.")
    llm_mlp: bool | tuple[str, ...] = setting(False, doc="LLM MLP: gate_proj, up_proj, down_proj of every layer.")
    vit_attention: bool | tuple[str, ...] = setting(False, doc="ViT attention: qkv, proj of every block.")
    vit_mlp: bool | tuple[str, ...] = setting(False, doc="ViT MLP: linear_fc1, linear_fc2 of every block.")
    merger: bool | tuple[str, ...] = setting(False, doc="The merger and the deepstack mergers between ViT and LLM: linear_fc1, linear_fc2.")

    def check(self) -> None:
        """A list names projections of its own row, and at least one."""
        for row, known in PROJECTIONS.items():
            value = getattr(self, row)
            if isinstance(value, bool):
                continue
            wrong = [name for name in value if name not in known]
            if wrong or not value:
                found = f"'{wrong[0]}'" if wrong else "an empty list"
                raise SettingError(row, f"expected true, false or a list of {', '.join(known)}; found {found}")

    def projections(self, row: str) -> tuple[str, ...]:
        """The projections of a row that carry LoRA; none when the row is off."""
        value = getattr(self, row)
        if isinstance(value, bool):
            return PROJECTIONS[row] if value else ()
        return tuple(name for name in PROJECTIONS[row] if name in value)


@dataclass(frozen=True)
class AdapterSettings:
    """What is trained on top of the frozen base, and all of it lies in the checkpoint: LoRA, whole modules, the whole ViT."""

    rank: int = setting(32, doc="LoRA rank.", minimum=1)
    alpha: float = setting(32.0, doc="LoRA alpha; the update is scaled by alpha / rank (alpha / sqrt(rank) with rslora).", above=0)
    dropout: float = setting(0.05, doc="Dropout on the input of every LoRA layer, while training.", minimum=0, below=1)
    vit_rank: int | None = setting(None, doc="LoRA rank of everything in the vision tower, mergers included; null: as `rank`.", minimum=1)
    vit_alpha: float | None = setting(
        None, doc="LoRA alpha in the vision tower; null: equal to vit_rank where that is given, else as `alpha`.", above=0
    )
    dora: bool = setting(False, doc="DoRA: train the magnitude of every weight column beside its direction.")
    rslora: bool = setting(False, doc="rsLoRA: scale by alpha / sqrt(rank).")
    targets: TargetSettings = setting(TargetSettings(), doc="Which linear layers carry LoRA, row by row.")
    target_regex: str | None = setting(
        None,
        doc="A regular expression for the full names of further modules that carry LoRA, e.g. 'language_model\\.layers\\.0\\..*_proj'.",
    )
    modules_to_save: tuple[str, ...] = setting(
        (), doc="Endings of the names of modules that are trained whole, e.g. 'visual.merger'; each must match."
    )
    vit_unfrozen: bool = setting(False, doc="Train the whole vision tower, mergers included, instead of LoRA in it.")

    def check(self) -> None:
        """No setting may be without effect, and nothing is trained twice."""
        visual = [row for row in VISUAL_ROWS if self.targets.projections(row)]
        if self.vit_unfrozen and visual:
            raise SettingError("vit_unfrozen", f"the ViT is trained whole or through LoRA, not both; set targets.{visual[0]} to false")
        for key in ("vit_rank", "vit_alpha"):
            if getattr(self, key) is not None and not visual and self.target_regex is None:
                raise SettingError(key, "no LoRA is placed in the vision tower; set targets.vit_attention, vit_mlp or merger as well")
        if self.target_regex is not None:
            try:
                re.compile(self.target_regex)
            except re.error as error:
                raise SettingError("target_regex", f"this is not a regular expression: {error}") from None
        if any(not name for name in self.modules_to_save):
            raise SettingError("modules_to_save", "an empty name would match every module; name the modules to train")
        rows = any(self.targets.projections(one.name) for one in fields(self.targets))
        if not (rows or self.target_regex or self.modules_to_save or self.vit_unfrozen):
            raise SettingError("targets", "this adapter trains nothing; turn a row on, or set model.adapter to null for the bare base")


@dataclass(frozen=True)
class ModelSettings:
    """The bi-encoder: a Qwen3-VL base, how it is computed, its instructions and its adapter."""

    base: str = setting(
        "Qwen/Qwen3-VL-Embedding-2B",
        doc="A local folder, a hub id, or the name of a base shipped in the package (random weights from init_seed if none are shipped).",
    )
    revision: str | None = setting(None, doc="The commit, tag or branch of a hub base.")
    init_seed: int = setting(0, doc="Seed of a shipped base's random weights.", minimum=0)
    tokenizer: str | None = setting(None, doc="Folder, hub id or shipped base that the tokenizer is taken from; null: the base itself.")
    dtype: Literal["bfloat16", "float32", "float64"] = setting(
        "bfloat16", doc="Numbers of the frozen weights and of the computation; what is trained stays float32 under bfloat16."
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = setting(
        "auto", doc="Attention kernels; auto: flash_attention_2 where it is installed (CUDA, bfloat16), else sdpa."
    )
    bidirectional: bool = setting(False, doc="Let every token of the LLM see every other one, for texts and tiles, in training and after.")
    gradient_checkpointing: bool = setting(False, doc="Recompute activations in the backward pass: less memory, more time.")
    max_text_tokens: int = setting(
        8192, doc="Tokens of one text with instruction and template; a longer text loses its end, never the template.", minimum=64
    )
    query_instruction: str = setting("Retrieve images or text relevant to the user's query.", doc="System message of queries; empty: none.")
    document_instruction: str = setting("Represent the user's input.", doc="System message of texts and tiles searched; empty: none.")
    start: str | None = setting(
        None, doc="An adapter to start from or to evaluate: a local folder, or repo[@revision][:subfolder] on the hub."
    )
    adapter: AdapterSettings | None = setting(AdapterSettings(), doc="What is trained; null: nothing, the bare base.")

    def check(self) -> None:
        """A base has a name."""
        if not self.base:
            raise SettingError("base", "expected a folder, a hub id or the name of a shipped base")

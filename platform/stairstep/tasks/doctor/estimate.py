"""What a run will need of memory and disk, from shapes alone.

The memory of one worker's device is the sum of

- the base: every frozen parameter in `model.dtype`;
- what is trained: its parameters, their gradients and AdamW's two moments, and one more copy for the optimizer's own work and one for
  averaged weights (`optim.ema_decay`), all in float32 (float64 where the model is);
- one chunk: what its forward pass keeps for the backward pass. That is counted by layer: for each token of the language model and each
  patch of the vision tower, the float32 input of every norm, query, key, value and result of attention, the three wide tensors of a gated
  MLP (one of a plain one), the inputs of the mergers, and, for each linear layer that carries LoRA, its input once more with its dropout
  mask; a layer trained whole keeps its input; DoRA besides keeps its weights anew. Where nothing in or below a tower is trained it keeps
  nothing. One more layer stands for what the backward pass makes while it runs. Under gradient checkpointing each layer keeps its input
  alone, and one layer is whole;
- or, where that is more, one forward pass of an evaluation (`evaluation.batch_tokens`), which keeps one layer;
- kept graphs (`objective.gradcache.keep_graphs_mb`, nothing with auto, which takes only what is free);
- embeddings and similarities of the whole batch; and a fixed part for the device's context, its libraries and the allocator's gaps.

A chunk is as large as the recipe cuts it, of the largest tiles of a sample. It is an estimate: kernels differ in what they keep.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from stairstep.models.flops import PATCHES_PER_TOKEN, core_of
from stairstep.models.placement import VISION_TOWER
from stairstep.models.weights import DTYPES
from stairstep.objectives.chunks import cut
from stairstep.tiles import PATCH_VALUES

from ..recipe import Recipe

FIXED = {"cuda": 3 * 2**29, "cpu": 2**30}
TEMPLATE_TOKENS = 32  # instruction and chat template around a tile
CHARACTERS_PER_TOKEN = 3
ROW_BYTES = 2048  # a question's row without the tiles that it lists
LISTED_BYTES = 256  # a listed tile: path, article, id, score


@dataclass(frozen=True)
class Graph:
    """Bytes that a forward pass keeps for its backward pass: by token of the language model, by patch of the vision tower, in any case."""

    token: float
    patch: float
    always: float
    token_layer: float  # what one layer keeps while it is whole
    patch_layer: float
    whole_layers: int  # how many more of them are in memory at the peak of the backward pass

    def of(self, tokens: int, patches: int) -> float:
        """What a chunk keeps."""
        return self.always + tokens * self.token + patches * self.patch

    def peak(self, tokens: int, patches: int) -> float:
        """What a chunk needs at the peak of its backward pass."""
        return self.of(tokens, patches) + self.whole_layers * max(tokens * self.token_layer, patches * self.patch_layer)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by part, and what the chunk is of."""

    parts: Mapping[str, int]
    chunk: str

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())


def trained_count(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(one.numel() for one in model.parameters() if one.requires_grad)


def trained_width(recipe: Recipe) -> int:
    """Bytes of a trained number."""
    return 8 if recipe.model.dtype == "float64" else 4


def memory_estimate(
    recipe: Recipe, model: nn.Module, tile: tuple[int, int] | None, texts: Sequence[str], device: str, ratio: float = 1.0
) -> MemoryEstimate:
    """What one worker's device needs; `tile`: height and width of the largest resized tile, None: as large as the recipe lets one be.

    `ratio`: how much of its estimate a chunk really takes, where that was measured."""
    width, trained = DTYPES[recipe.model.dtype].itemsize, trained_count(model)
    frozen = sum(one.numel() for one in model.parameters()) - trained
    copies = 5 + (recipe.optim.ema_decay is not None)
    estimated, said = chunk_bytes(recipe, model, tile, texts, device)
    chunk, looking = estimated * ratio, _forward(recipe, model, width)
    keep = recipe.objective.gradcache.keep_graphs_mb
    documents = recipe.optim.batch * (1 + recipe.data.hard_negatives)
    dimension = core_of(model).config.text_config.hidden_size
    parts = {
        "base": frozen * width,
        "trained": trained * trained_width(recipe) * copies,
        "one chunk": int(max(chunk, looking)),
        "kept graphs": 0 if keep == "auto" else keep * 2**20,
        "batch": 4 * (4 * (documents + recipe.optim.batch) * dimension + 6 * documents * recipe.optim.batch),
        "fixed": FIXED[device],
    }
    said = said if chunk >= looking else "a forward pass of evaluation, which takes more"
    return MemoryEstimate({name: size for name, size in parts.items() if size}, said)


def chunk_bytes(recipe: Recipe, model: nn.Module, tile: tuple[int, int] | None, texts: Sequence[str], device: str) -> tuple[float, str]:
    """What the heaviest chunk of documents takes at the peak of its backward pass, in bytes and in words."""
    graph = graph_bytes(recipe, model, device)
    found: list[tuple[float, str]] = []
    documents = recipe.optim.batch * (1 + recipe.data.hard_negatives)
    if recipe.data.train:
        geometry = recipe.tiles.geometry()
        visual = geometry.visual_tokens(*tile) if tile is not None else recipe.tiles.max_visual_tokens
        size = _items(recipe, visual + TEMPLATE_TOKENS, documents)
        patches = size * visual * PATCHES_PER_TOKEN
        needed = graph.peak(size * (visual + TEMPLATE_TOKENS), patches) + patches * PATCH_VALUES * (4 + DTYPES[recipe.model.dtype].itemsize)
        unsure = "" if tile is not None else " (the most that the recipe lets one have)"
        found.append((needed, f"{size} tiles of {visual} visual tokens{unsure}"))
    if recipe.phases.any_text and texts:
        tokens = min(max(map(len, texts)) // CHARACTERS_PER_TOKEN + TEMPLATE_TOKENS, recipe.model.max_text_tokens)
        size = _items(recipe, tokens, documents)
        found.append((graph.peak(size * tokens, 0), f"{size} texts of about {tokens} tokens"))
    return max(found, default=(0.0, "nothing"))


def _items(recipe: Recipe, tokens: int, documents: int) -> int:
    return len(cut([tokens] * documents, recipe.objective.gradcache)[0])


def graph_bytes(recipe: Recipe, model: nn.Module, device: str) -> Graph:
    """What each token and each patch keeps for the backward pass."""
    core = core_of(model)
    text, vision = core.config.text_config, core.config.vision_config
    width = DTYPES[recipe.model.dtype].itemsize
    query, key = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    token = 4 * (2 * text.hidden_size + query + key) + width * 4 * query + 3 * width * text.intermediate_size
    patch = 4 * 2 * vision.hidden_size + width * (4 * vision.hidden_size + vision.intermediate_size)
    inputs = {"llm": 0.0, "vit": 0.0}
    trained = {"llm": False, "vit": False}
    always = 0.0
    for name, module in core.named_modules():
        tower = _tower(name)
        if tower is None:
            continue
        trained[tower] |= any(one.requires_grad for one in module.parameters(recurse=False))
        if isinstance(module, LoraLayer):
            each, weights = _lora_bytes(module, width, recipe, device)
            inputs[tower] += each
            always += weights
        elif isinstance(module, nn.Linear) and module.weight.requires_grad and ".lora_" not in name:
            inputs[tower] += module.in_features * width
    below = any(one.requires_grad for name, one in core.named_parameters() if name.startswith(f"{VISION_TOWER}."))
    token_layer = token * (trained["llm"] or below) + inputs["llm"] / text.num_hidden_layers
    patch_layer = patch * trained["vit"] + inputs["vit"] / vision.depth
    mergers = (1 + len(vision.deepstack_visual_indexes)) * vision.hidden_size * (4 + width) * trained["vit"]
    if not recipe.model.gradient_checkpointing:
        layers = text.num_hidden_layers * token_layer, vision.depth * patch_layer
        return Graph(layers[0], layers[1] + mergers, always, token_layer, patch_layer, 1)
    entries = text.num_hidden_layers * text.hidden_size * width, vision.depth * vision.hidden_size * width
    return Graph(entries[0] * (token_layer > 0), entries[1] * (patch_layer > 0) + mergers, always, token_layer, patch_layer, 2)


def _tower(name: str) -> str | None:
    """Which stack of layers a module is in; neither for what lies around them."""
    if re.match(r"language_model\.layers\.\d", name):
        return "llm"
    return "vit" if re.match(rf"{VISION_TOWER}\.blocks\.\d", name) else None


def _lora_bytes(module: Any, width: int, recipe: Recipe, device: str) -> tuple[float, float]:
    """What a LoRA layer keeps for each token (its input after dropout, and the mask), and once (DoRA's weights)."""
    adapter = recipe.model.adapter
    assert adapter is not None, "a model with LoRA layers has adapter settings"
    mask = (1 if device == "cuda" else width) if adapter.dropout else 0
    each, once = module.in_features * (width + mask), 0
    if adapter.dora:
        each += module.in_features * 4 + module.out_features * 2 * width
        once = module.in_features * module.out_features * 4
    return float(each), float(once)


def _forward(recipe: Recipe, model: nn.Module, width: int) -> float:
    """The peak of one forward pass without a graph, over the tokens that evaluation takes at once."""
    text, vision = core_of(model).config.text_config, core_of(model).config.vision_config
    tokens = recipe.evaluation.batch_tokens
    llm = tokens * width * (3 * text.intermediate_size + 6 * text.hidden_size)
    patches = tokens * PATCHES_PER_TOKEN
    vit = patches * (width * (2 * vision.intermediate_size + 6 * vision.hidden_size) + PATCH_VALUES * (4 + width))
    return float(max(llm, vit))


def disk_estimate(recipe: Recipe, model: nn.Module, questions: int, tiles: int) -> dict[str, int]:
    """Bytes that a run writes below its root: checkpoints that stay (and one being written), embeddings, rows of evaluations."""
    looks = recipe.optim.steps // recipe.evaluation.every + 2
    each = trained_count(model) * trained_width(recipe) * (3 + (recipe.optim.ema_decay is not None))
    kept = min(recipe.checkpoints.keep + recipe.checkpoints.keep_best + 1, recipe.optim.steps // recipe.checkpoints.every + 2)
    states = min(recipe.evaluation.cache_states, looks) if recipe.evaluation.cache else 0
    dimension = core_of(model).config.text_config.hidden_size
    return {
        "checkpoints": kept * each,
        "embeddings": states * (questions + tiles) * dimension * 4,
        "evaluations": looks * questions * (ROW_BYTES + recipe.evaluation.top_k * LISTED_BYTES),
    }

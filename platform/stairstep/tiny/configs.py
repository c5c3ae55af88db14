"""The shapes of the two tiny models, as plain Qwen3-VL configs, and checkpoints of them with random weights.

Config files are written as the published checkpoints have them, so that every transformers since 4.57 reads them. Both kinds are stored as
`Qwen3VLForConditionalGeneration` with tied embeddings, the embedder too: its published model is stored so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from safetensors.torch import save

from .tokenizer import TOKEN_IDS, VOCABULARY, copy_processor

if TYPE_CHECKING:
    from transformers import Qwen3VLConfig

TinyKind = Literal["embedder", "reader"]

_DEEPSTACK = {"embedder": [2], "reader": [0, 1, 2]}
_HIDDEN, _LAYERS, _HEADS, _KEY_HEADS = 128, 4, 4, 2


def config_tree(kind: TinyKind, dtype: str = "bfloat16") -> dict[str, Any]:
    """The content of a tiny model's config.json."""
    if kind not in get_args(TinyKind):
        raise ValueError(f"there is no tiny model '{kind}'; known: {', '.join(get_args(TinyKind))}")
    head = _HIDDEN // _HEADS
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "dtype": dtype,
        "image_token_id": TOKEN_IDS["<|image_pad|>"],
        "video_token_id": TOKEN_IDS["<|video_pad|>"],
        "vision_start_token_id": TOKEN_IDS["<|vision_start|>"],
        "vision_end_token_id": TOKEN_IDS["<|vision_end|>"],
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "dtype": dtype,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": TOKEN_IDS["<|endoftext|>"],
            "eos_token_id": TOKEN_IDS["<|im_end|>"],
            "head_dim": head,
            "hidden_act": "silu",
            "hidden_size": _HIDDEN,
            "initializer_range": 0.02,
            "intermediate_size": 3 * _HIDDEN,
            "max_position_embeddings": 4096,
            "num_attention_heads": _HEADS,
            "num_hidden_layers": _LAYERS,
            "num_key_value_heads": _KEY_HEADS,
            "rms_norm_eps": 1e-6,
            "rope_scaling": {
                "mrope_interleaved": True,
                "mrope_section": [head // 2 - 2 * (head // 6), head // 6, head // 6],
                "rope_type": "default",
            },
            "rope_theta": 10000,
            "tie_word_embeddings": True,
            "use_cache": True,
            "vocab_size": VOCABULARY,
        },
        "vision_config": {
            "model_type": "qwen3_vl",
            "dtype": dtype,
            "deepstack_visual_indexes": _DEEPSTACK[kind],
            "depth": _LAYERS,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": _HIDDEN,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": 4 * _HIDDEN,
            "num_heads": _HEADS,
            "num_position_embeddings": 256,
            "out_hidden_size": _HIDDEN,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }


def tiny_config(kind: TinyKind) -> Qwen3VLConfig:
    """A tiny model's config, ready for `Qwen3VLModel` or `Qwen3VLForConditionalGeneration`."""
    from transformers import Qwen3VLConfig

    return Qwen3VLConfig.from_dict(config_tree(kind))


def write_random_checkpoint(folder: Path, kind: TinyKind, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Writes a whole Hugging Face checkpoint of a tiny model with random weights, and returns its folder."""
    from transformers import Qwen3VLForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(tiny_config(kind)).float()
    return write_checkpoint(folder, kind, model.state_dict(), dtype)


def write_checkpoint(folder: Path, kind: TinyKind, weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.bfloat16) -> Path:
    """Writes a whole Hugging Face checkpoint from the weights of a tiny `Qwen3VLForConditionalGeneration`."""
    folder.mkdir(parents=True, exist_ok=True)
    name = str(dtype).removeprefix("torch.")
    stored = {key: value.detach().to("cpu", dtype).contiguous() for key, value in weights.items() if key != "lm_head.weight"}
    (folder / "model.safetensors").write_bytes(save(stored, metadata={"format": "pt"}))
    generation = {
        "bos_token_id": TOKEN_IDS["<|endoftext|>"],
        "do_sample": False,
        "eos_token_id": [TOKEN_IDS["<|im_end|>"], TOKEN_IDS["<|endoftext|>"]],
        "pad_token_id": TOKEN_IDS["<|endoftext|>"],
    }
    for file, tree in {"config.json": config_tree(kind, name), "generation_config.json": generation}.items():
        (folder / file).write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    copy_processor(folder)
    return folder

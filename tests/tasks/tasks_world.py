"""What the tests of whole trainings share: a tiny world on disk, a micro Qwen3-VL checkpoint, and recipes over both.

Also imported by the processes that these tests start, and by bench/kill_resume.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Qwen3VLConfig, Qwen3VLModel

from stairstep.data import WorldSettings
from stairstep.settings import apply_overrides, build, from_plain
from stairstep.tasks import Recipe
from stairstep.tasks.resolve import resolve
from stairstep.tiny.tinywiki import QUESTION_SET, ensure_world
from stairstep.tiny.tokenizer import TOKEN_IDS, VOCABULARY, copy_processor

WIDTH = 32


def write_world(folder: Path) -> Path:
    """Twelve articles, forty pairs, a dozen questions."""
    return ensure_world(WorldSettings(articles=12, questions=12, pairs=40, text_pairs=24, seed=3), folder)


def write_base(folder: Path) -> Path:
    """Two layers of width 32 in either tower; weights wide enough that its embeddings differ from one another."""
    folder.mkdir(parents=True, exist_ok=True)
    config = Qwen3VLConfig.from_dict(
        {
            "model_type": "qwen3_vl",
            "image_token_id": TOKEN_IDS["<|image_pad|>"],
            "video_token_id": TOKEN_IDS["<|video_pad|>"],
            "vision_start_token_id": TOKEN_IDS["<|vision_start|>"],
            "vision_end_token_id": TOKEN_IDS["<|vision_end|>"],
            "tie_word_embeddings": True,
            "text_config": {
                "model_type": "qwen3_vl_text",
                "head_dim": 16,
                "hidden_size": WIDTH,
                "initializer_range": 0.15,
                "intermediate_size": 48,
                "max_position_embeddings": 2048,
                "num_attention_heads": 2,
                "num_hidden_layers": 2,
                "num_key_value_heads": 1,
                "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [4, 2, 2]},
                "rope_theta": 10000,
                "vocab_size": VOCABULARY,
            },
            "vision_config": {
                "model_type": "qwen3_vl",
                "deepstack_visual_indexes": [0],
                "depth": 2,
                "hidden_size": WIDTH,
                "initializer_range": 0.15,
                "intermediate_size": 48,
                "num_heads": 2,
                "num_position_embeddings": 64,
                "out_hidden_size": WIDTH,
                "patch_size": 16,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
        }
    )
    (folder / "config.json").write_text(config.to_json_string(use_diff=False))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = Qwen3VLModel(config).float()
    save_file({f"model.{name}": one.contiguous() for name, one in model.state_dict().items()}, folder / "model.safetensors")
    copy_processor(folder)
    return folder


def recipe_tree(root: Path, world: Path, base: Path) -> dict[str, Any]:
    """Six steps of eight rows with everything on that a short run can hold; a test overrides what it looks at."""
    return {
        "run": {"root": str(root), "name": "run", "seed": 0, "threads": 1},
        "data": {
            "roots": [str(world)],
            "train": [{"path": "train_hn.jsonl"}],
            "validation": [{"path": "eval_hn.jsonl"}],
            "text": [{"path": "text"}],
            "hard_negatives": 1,
        },
        "tiles": {"max_visual_tokens": 6},
        "model": {
            "base": str(base),
            "dtype": "float32",
            "adapter": {"rank": 2, "alpha": 4, "dropout": 0.1, "targets": {"llm_attention": True, "vit_attention": True}},
        },
        "optim": {"batch": 8, "steps": 6, "rates": {"llm": 0.01}, "schedule": {"shape": "cosine", "warmup_steps": 2}},
        "phases": {"text_warmup_steps": 2},
        "evaluation": {"every": 3, "loss_every": 2, "loss_batches": 1, "sets": [{"path": QUESTION_SET}]},
        "checkpoints": {"every": 2, "keep": 2},
        "cluster": {"workers": 0, "device": "cpu"},
    }


def make_recipe(tree: Mapping[str, Any], *overrides: str) -> Recipe:
    """The resolved recipe of a tree with `key.path=value` overrides."""
    return resolve(build(Recipe, apply_overrides(from_plain(tree, "test"), overrides)))

"""Tiny checkpoints: the sizes promised, the published key names, and plain transformers that load and run them."""

import inspect
import random

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, Qwen3VLForConditionalGeneration, Qwen3VLModel

from stairstep.tiny.articles import Library
from stairstep.tiny.configs import config_tree, tiny_config, write_random_checkpoint
from stairstep.tiny.tokenizer import TOKEN_IDS


@pytest.fixture(scope="module", params=["embedder", "reader"])
def checkpoint(request, tmp_path_factory):
    return request.param, write_random_checkpoint(tmp_path_factory.mktemp("tiny") / request.param, request.param, seed=1)


def loaded(folder):
    return Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)


def test_plain_transformers_loads_it_whole(checkpoint):
    kind, folder = checkpoint
    model, info = loaded(folder)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    size = sum(parameter.numel() for parameter in model.parameters())
    assert size == {"embedder": 2_502_144, "reader": 3_160_832}[kind]
    stored = load_file(folder / "model.safetensors")
    assert {key.split(".")[1] for key in stored} == {"visual", "language_model"}
    assert all(key.startswith("model.") for key in stored)
    assert all(value.dtype == torch.bfloat16 for value in stored.values())
    assert sum(path.stat().st_size for path in folder.iterdir()) < 7_000_000
    config = AutoConfig.from_pretrained(folder)
    assert config.vision_config.deepstack_visual_indexes == tiny_config(kind).vision_config.deepstack_visual_indexes
    assert config.image_token_id == TOKEN_IDS["<|image_pad|>"]


def test_it_sees_a_tile_and_generates(checkpoint):
    model, _ = loaded(checkpoint[1])
    page = Library(random.Random(0), 0.0, 0.0).family(1)[0].pages[0]
    pixels = torch.tensor(page.render()).permute(2, 0, 1).float() / 127.5 - 1
    patches = pixels.reshape(3, 4, 2, 16, 6, 2, 16).permute(1, 4, 2, 5, 0, 3, 6)[..., None, :, :]
    patches = patches.expand(*patches.shape[:5], 2, 16, 16).reshape(96, 1536)
    pad = TOKEN_IDS["<|image_pad|>"]
    ids = torch.tensor([[TOKEN_IDS["<|im_start|>"], 5, TOKEN_IDS["<|vision_start|>"], *[pad] * 24, TOKEN_IDS["<|vision_end|>"], 7, 9]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image_grid_thw": torch.tensor([[1, 8, 12]])}
    inputs["mm_token_type_ids"] = (ids == pad).long()
    if "mm_token_type_ids" not in inspect.signature(Qwen3VLModel.forward).parameters:
        del inputs["mm_token_type_ids"]
    with torch.no_grad():
        seen = model(**inputs, pixel_values=patches).logits[0, -1]
        blank = model(**inputs, pixel_values=torch.ones_like(patches)).logits[0, -1]
        answer = model.generate(**inputs, pixel_values=patches, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert seen.isfinite().all()
    assert (seen - blank).abs().max() > 1e-5, "the pixels reach the answer"
    assert answer.shape == (1, ids.shape[1] + 3)


def test_the_processor_loads_and_makes_24_tokens_of_a_tile(checkpoint):
    pytest.importorskip("torchvision")
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint[1])
    page = Library(random.Random(0), 0.0, 0.0).family(1)[0].pages[0]
    content = [{"type": "image", "image": Image.fromarray(page.render())}, {"type": "text", "text": "When?"}]
    messages = [{"role": "user", "content": content}]
    made = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    assert (made["input_ids"] == TOKEN_IDS["<|image_pad|>"]).sum() == 24
    assert made["pixel_values"].shape == (96, 1536)


def test_weights_follow_the_seed_and_leave_the_random_state_alone(tmp_path):
    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    folders = [write_random_checkpoint(tmp_path / str(index), "embedder", seed) for index, seed in enumerate((4, 4, 5))]
    assert torch.rand(1) == expected
    first, same, other = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert first == same != other


def test_shapes_agree_with_each_other():
    for kind in ("embedder", "reader"):
        tree = config_tree(kind)
        text, vision = tree["text_config"], tree["vision_config"]
        assert sum(text["rope_scaling"]["mrope_section"]) == text["head_dim"] // 2
        assert vision["out_hidden_size"] == text["hidden_size"]
        assert max(vision["deepstack_visual_indexes"]) < vision["depth"]
        assert len(vision["deepstack_visual_indexes"]) <= text["num_hidden_layers"]
        assert max(TOKEN_IDS.values()) < text["vocab_size"]
    with pytest.raises(ValueError, match="no tiny model 'grader'"):
        config_tree("grader")

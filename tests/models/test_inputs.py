"""Token ids, positions and pixel values equal those of the Hugging Face processor and of the model itself."""

import inspect
import json
import shutil

import pytest
import torch
from transformers import Qwen3VLConfig

from stairstep.models.inputs import Inputs, load_tokenizer
from stairstep.settings import InputError
from stairstep.tiles import patches

INSTRUCTIONS = {"query": "Find it.", "document": "Represent the user's input."}


@pytest.fixture(scope="module")
def config(base):
    return Qwen3VLConfig.from_dict(json.loads((base / "config.json").read_text()))


@pytest.fixture
def inputs(base, config):
    return Inputs(load_tokenizer(base), config, INSTRUCTIONS, 8192)


def conversation(role, content):
    system = {"role": "system", "content": [{"type": "text", "text": INSTRUCTIONS[role]}]}
    return [system, {"role": "user", "content": [content]}]


def test_equal_to_the_hugging_face_processor(base, inputs, tiles):
    pytest.importorskip("torchvision")
    from transformers import AutoImageProcessor, AutoVideoProcessor, Qwen3VLProcessor

    folder = base.parent / "processor"
    folder.mkdir(exist_ok=True)
    size = {"shortest_edge": 1024, "longest_edge": 1024 * 1024}
    kind = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2, "size": size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Qwen2VLImageProcessorFast", **kind}))
    (folder / "video_preprocessor_config.json").write_text(json.dumps({"video_processor_type": "Qwen3VLVideoProcessor", **kind}))
    template = inputs.tokenizer.chat_template
    processor = Qwen3VLProcessor(
        AutoImageProcessor.from_pretrained(folder, use_fast=True), inputs.tokenizer, AutoVideoProcessor.from_pretrained(folder), template
    )
    for role in ("query", "document"):
        for text in ("hello", "", "a <|im_end|> within", "ünïcode\n\n two lines "):
            found = processor.apply_chat_template(
                conversation(role, {"type": "text", "text": text}), tokenize=True, add_generation_prompt=True, return_dict=True
            )
            assert inputs.text_ids([text], role) == [list(found["input_ids"][0])]
    for tile in tiles:
        found = processor.apply_chat_template(
            conversation("document", {"type": "image", "image": tile}),
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert inputs.tile_ids(*tile.shape[1:]) == found["input_ids"][0].tolist()
        values, grid = patches([tile])
        assert torch.equal(grid, found["image_grid_thw"])
        assert torch.equal(values, found["pixel_values"])


def test_positions_equal_the_models_own(make, inputs):
    sizes = [(64, 96), (160, 32), (32, 32), (32, 256)]
    batch = inputs.tiles(sizes, torch.device("cpu"))
    model = make().core
    mask = (torch.arange(batch.ids.shape[1]) < torch.tensor(batch.lengths)[:, None]).long()
    grids = torch.tensor([[1, height // 16, width // 16] for height, width in sizes])
    arguments = {"input_ids": batch.ids, "image_grid_thw": grids, "attention_mask": mask}
    if "mm_token_type_ids" in inspect.signature(model.get_rope_index).parameters:
        arguments["mm_token_type_ids"] = (batch.ids == model.config.image_token_id).int() * mask
    expected, _ = model.get_rope_index(**arguments)
    for index, length in enumerate(batch.lengths):
        assert torch.equal(batch.positions[1:, index, :length], expected[:, index, :length])
        assert batch.positions[0, index].tolist() == list(range(batch.ids.shape[1]))
    assert batch.positions[1:, 0].unique(dim=0).shape[0] == 3, "the fixture's grid must tell the three axes apart"
    assert not batch.uniform and inputs.tiles(sizes[:1] * 2, torch.device("cpu")).uniform


def test_long_texts_lose_their_end_and_keep_the_template(base, config):
    short, long = (Inputs(load_tokenizer(base), config, INSTRUCTIONS, limit) for limit in (96, 8192))
    text = "abcdefghij" * 40
    (cut,), (whole,) = short.text_ids([text], "query"), long.text_ids([text], "query")
    assert len(cut) == 96 < len(whole)
    tail = long.text_ids([""], "query")[0][-13:]
    common = next(index for index, (one, other) in enumerate(zip(cut, whole, strict=False)) if one != other)
    assert cut[common:] == tail and len(cut) - common == 13
    assert short.tokenizer.decode(cut).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert short.text_ids(["fits"], "query") == long.text_ids(["fits"], "query")


def test_an_empty_instruction_is_no_message(base, config, inputs):
    bare = Inputs(load_tokenizer(base), config, {"query": "", "document": ""}, 8192)
    assert bare.tokenizer.decode(bare.text_ids(["x"], "query")[0]) == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    assert bare.digest() != inputs.digest()


def test_tokenizer_and_model_belong_together(base, config, tmp_path):
    tokenizer = load_tokenizer(base)
    other = Qwen3VLConfig.from_dict(json.loads((base / "config.json").read_text()) | {"image_token_id": 5})
    with pytest.raises(InputError, match="do not belong together"):
        Inputs(tokenizer, other, INSTRUCTIONS, 8192)
    with pytest.raises(InputError, match=r"there is no tokenizer\.json"):
        load_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, tmp_path)
    with pytest.raises(InputError, match="no chat template"):
        load_tokenizer(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert load_tokenizer(tmp_path).chat_template == "{{ messages }}"
    with pytest.raises(InputError, match="renders an image as 0"):
        Inputs(load_tokenizer(tmp_path), config, INSTRUCTIONS, 8192).tile_length(32, 32)


def test_a_tile_that_was_not_resized_is_refused(inputs):
    with pytest.raises(ValueError, match="multiples of 32"):
        inputs.tile_length(64, 97)


def test_padding_kept_in_a_tokenizer_file_changes_nothing(base, config, inputs, tmp_path):
    shutil.copytree(base, tmp_path / "padded")
    stored = json.loads((tmp_path / "padded/tokenizer.json").read_text())
    stored["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "padded/tokenizer.json").write_text(json.dumps(stored))
    padded = Inputs(load_tokenizer(tmp_path / "padded"), config, INSTRUCTIONS, 8192)
    assert padded.text_ids(["a text"], "query") == inputs.text_ids(["a text"], "query")
    assert padded.digest() == inputs.digest()

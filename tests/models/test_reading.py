"""The reader in process: what transformers' generate answers, whatever the batch, and prompts as the chat template renders them."""

import json
import shutil

import pytest
import torch
from PIL import Image
from transformers import Qwen3VLForConditionalGeneration

from stairstep.models.prompts import Prompts
from stairstep.models.reading import load_reader
from stairstep.settings import InputError
from stairstep.tiles import patches

TOKENS = 12


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """The tiny base with an end of answer that its random weights do reach."""
    folder = tmp_path_factory.mktemp("reader") / "base"
    shutil.copytree(base, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 256], "pad_token_id": 256}))
    return folder


@pytest.fixture(scope="module")
def reader(folder):
    return load_reader(folder, max_new_tokens=TOKENS, batch=3)


@pytest.fixture(scope="module")
def asked(tiles):
    return [
        ("Who?", [tiles[0]]),
        ("When was it built?", [tiles[0], tiles[3]]),
        ("What is the name of the town?", [tiles[1], tiles[2]]),
        ("Where?", [tiles[3]]),
        ("No tiles at all?", []),
        ("When?", [tiles[2], tiles[0], tiles[1]]),
    ]


def generated(folder, reader, question, tiles, tokens=TOKENS):
    """The answer of plain transformers, without our positions, masks, tower or cache."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    text = reader.prompts.text(question, len(tiles))
    for tile in tiles:
        count = (tile.shape[1] // 32) * (tile.shape[2] // 32)
        text = text.replace("<|image_pad|>", "<|mark|>" * count, 1)
    ids = torch.tensor([reader.tokenizer(text.replace("<|mark|>", "<|image_pad|>"), add_special_tokens=False)["input_ids"]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if tiles:
        values, grid = patches(tiles)
        inputs |= {"pixel_values": values, "image_grid_thw": grid}
    import inspect

    from transformers import Qwen3VLModel

    if "mm_token_type_ids" in inspect.signature(Qwen3VLModel.forward).parameters:
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return reader.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_answers_are_those_of_generate(folder, reader, asked):
    answers = reader.answers(asked)
    assert answers == [generated(folder, reader, *one) for one in asked]
    assert len(set(answers)) > 3, "answers must differ, or their order would not be seen"


def test_an_answer_does_not_depend_on_its_batch(reader, asked):
    assert [reader.answer(*one) for one in asked] == reader.answers(asked)


def test_an_answer_stops_at_the_models_end(folder, reader, asked):
    """With the first token of an answer as the end, nothing is left of that answer, and a batch mate is none the worse."""
    inputs = reader.prompts.ids([reader.prompts.text("Who?", 1)], [[(64, 96)]])
    with torch.inference_mode():
        tokens = reader._generate(reader.prompts.batch(inputs, [[(64, 96)]]), asked[0][1])[0]
    ending = load_reader(folder, max_new_tokens=TOKENS)
    ending._ends = torch.tensor([tokens[0]])
    answers = ending.answers(asked)
    assert answers[0] == ""
    assert any(answers[1:])


def test_pixels_decide_the_answer(reader, tiles):
    blank = torch.full_like(tiles[0], 255)
    assert reader.answer("Who?", [blank]) != reader.answer("Who?", [tiles[0]])


def test_tiles_may_be_files(reader, tiles, tmp_path):
    path = tmp_path / "tile.png"
    Image.fromarray(tiles[0].permute(1, 2, 0).numpy()).save(path)
    assert reader.answer("Who?", [path]) == reader.answer("Who?", [tiles[0]])


def test_prompts_are_the_question_then_the_tiles(reader):
    text = reader.prompts.text("Who?", 2, "Be brief.")
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert text == f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho?{image}{image}<|im_end|>\n<|im_start|>assistant\n"
    assert reader.prompts.text("Who?", 1).startswith("<|im_start|>user\n"), "an empty system message is left out"


def test_positions_are_those_of_transformers(folder, reader, tiles):
    sizes = [[(64, 96), (128, 64)]]
    (row,) = reader.prompts.ids([reader.prompts.text("Who?", 2)], sizes)
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).model
    ids = torch.tensor([row])
    grid = torch.tensor([[1, height // 16, width // 16] for height, width in sizes[0]])
    import inspect

    more = {}
    if "mm_token_type_ids" in inspect.signature(model.get_rope_index).parameters:
        more["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    expected, _ = model.get_rope_index(ids, image_grid_thw=grid, attention_mask=torch.ones_like(ids), **more)
    assert torch.equal(reader.prompts.positions(row, sizes[0]), expected[:, 0])


def test_a_question_cannot_smuggle_in_a_tile(reader, tiles):
    with pytest.raises(InputError, match="must not contain that token"):
        reader.answer("Who? <|image_pad|>", [tiles[0]])


def test_tokenizer_and_model_must_belong_together(reader):
    config = type(reader.model.config).from_dict({**reader.model.config.to_dict(), "image_token_id": 3})
    with pytest.raises(InputError, match="not a pair"):
        Prompts(reader.tokenizer, config)

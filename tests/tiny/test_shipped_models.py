"""The shipped models, loaded by plain transformers: the platform's embeddings and answers, and a reader that reads pixels."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

from stairstep.models.load import load_encoder
from stairstep.models.reading import load_reader
from stairstep.models.settings import ModelSettings
from stairstep.models.sources import shipped_bases
from stairstep.tasks.pretraining.exam import PARTS, open_exam, retrieval_scores
from stairstep.tiny.configs import config_tree
from stairstep.tiny.phrases import UNKNOWN
from stairstep.tiny.tokenizer import FILES

SEED, QUESTIONS = 910_101, 60  # a world that nothing was trained, tuned or reported on
KINDS = ("embedder", "reader")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def folder(kind):
    return shipped_bases()[f"tiny-{kind}"]


def plain(kind):
    return Qwen3VLForConditionalGeneration.from_pretrained(folder(kind), dtype=torch.float32, output_loading_info=True)


@pytest.fixture(scope="module")
def exam():
    return open_exam(SEED, QUESTIONS)


@pytest.fixture(scope="module")
def reader():
    return load_reader("tiny-reader")


@pytest.fixture(scope="module")
def processor():
    pytest.importorskip("torchvision")
    from transformers import AutoProcessor

    return {kind: AutoProcessor.from_pretrained(folder(kind)) for kind in KINDS}


def score(reader, exam, part):
    asking, expected = PARTS[part](exam)
    said = reader.answers(asking)
    assert len(said) > 0.8 * QUESTIONS
    return sum(one == wanted for one, wanted in zip(said, expected, strict=True)) / len(expected), said


# --- what lies in the package


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_whole_small_and_in_bfloat16(kind):
    model, info = plain(kind)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    stored = load_file(folder(kind) / "model.safetensors")
    assert all(tensor.dtype == torch.bfloat16 for tensor in stored.values())
    assert json.loads((folder(kind) / "config.json").read_text()) == config_tree(kind)
    for path in FILES.iterdir():
        assert (folder(kind) / path.name).read_bytes() == path.read_bytes(), f"{path.name} is not the tiny models' own"
    weights = model.model.visual.blocks[0].attn.qkv.weight
    assert weights.std() > 0.025, "the weights are trained, not drawn with the config's 0.02"


def test_both_together_are_under_twelve_megabytes():
    assert sum(path.stat().st_size for kind in KINDS for path in folder(kind).iterdir()) < 12_000_000


@pytest.mark.parametrize("kind", KINDS)
def test_peft_trains_them(kind, exam):
    model = get_peft_model(plain(kind)[0], LoraConfig(r=4, target_modules=["q_proj", "qkv"]))
    ids = AutoTokenizer.from_pretrained(folder(kind))("Who?", return_tensors="pt")["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    moved = [name for name, one in model.named_parameters() if one.grad is not None and one.grad.abs().sum() > 0]
    assert moved
    assert all("lora_" in name for name in moved)


# --- plain transformers and the platform agree


def test_embeddings_are_those_of_plain_transformers(exam, processor):
    encoder = load_encoder(
        ModelSettings(base="tiny-embedder", dtype="float32", query_instruction="", document_instruction="", adapter=None)
    )
    model = plain("embedder")[0].model
    texts = [one.text for one in exam.asked[:4]]
    pixels = exam.pixels[:4]
    with torch.inference_mode():
        ours = torch.cat([encoder.encode_texts(texts, "query"), encoder.encode_tiles(list(pixels))])
        theirs = [_embedding(model, processor["embedder"], [{"type": "text", "text": text}], None) for text in texts]
        theirs += [_embedding(model, processor["embedder"], [{"type": "image"}], tile) for tile in pixels]
    assert torch.allclose(ours, torch.stack(theirs), atol=2e-5)
    assert torch.pdist(ours).min() > 0.01, "different inputs have different embeddings"


def _embedding(model, processor, content, tile):
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    images = {} if tile is None else {"images": [tile.permute(1, 2, 0).numpy()]}
    inputs = processor(text=[prompt], return_tensors="pt", **images)
    return torch.nn.functional.normalize(model(**inputs).last_hidden_state[0, -1], dim=-1)


def test_answers_are_those_of_plain_transformers(reader, exam, processor):
    model = plain("reader")[0]
    asked = [*PARTS["single"](exam)[0][:6], *PARTS["three"](exam)[0][6:10]]
    theirs = []
    for question, tiles in asked:
        content = [{"type": "text", "text": question}, *({"type": "image"} for _ in tiles)]
        prompt = processor["reader"].apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
        images = [tile.permute(1, 2, 0).numpy() for tile in tiles]
        inputs = processor["reader"](text=[prompt], images=images, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=48)  # greedy, as the shipped generation_config says
        theirs.append(processor["reader"].tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert reader.answers(asked) == theirs
    assert len(set(theirs)) > 5


# --- the reader reads, and only what is there


def test_it_answers_from_the_right_tile(reader, exam):
    assert score(reader, exam, "single")[0] >= 0.85


def test_a_wrong_tile_is_told_and_a_right_one_is_not_doubted(reader, exam):
    told = score(reader, exam, "wrong_tile")[0]
    doubted = sum(said == UNKNOWN for said in score(reader, exam, "single")[1]) / QUESTIONS
    assert told >= 0.8
    assert doubted <= 0.1


def test_blank_tiles_give_no_answer(reader, exam):
    assert score(reader, exam, "blank")[0] <= 0.05


def test_swapped_values_give_the_swapped_answers(reader, exam):
    assert score(reader, exam, "swapped")[0] >= 0.85


# --- the embedder has learned something, and has something left to learn


def test_the_embedder_is_far_above_chance_and_below_its_ceiling(exam):
    encoder = load_encoder(
        ModelSettings(base="tiny-embedder", dtype="float32", query_instruction="", document_instruction="", adapter=None)
    )
    with torch.inference_mode():
        scores = retrieval_scores(
            lambda texts: encoder.encode_texts(texts, "query"), lambda pixels: encoder.encode_tiles(list(pixels)), SEED, QUESTIONS
        )
    assert len(exam.shelf.articles) == 60
    assert scores["hit@1"].value > 0.15
    assert scores["hit@1"].value < 0.8

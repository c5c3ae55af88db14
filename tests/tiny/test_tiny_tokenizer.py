"""The tiny tokenizer: one token a character, Qwen's special tokens and chat form, loaded by plain transformers from the shipped files."""

import json
import string

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from stairstep.tiny.tokenizer import FILES, SPECIAL_TOKENS, TOKEN_IDS, VOCABULARY, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FILES, local_files_only=True)


def test_a_character_is_a_token_and_comes_back(tokenizer):
    ids = tokenizer(string.printable[:95] + "\n")["input_ids"]
    assert len(ids) == len(set(ids)) == 96
    assert max(ids) < 256
    for text in ("Mara Velin (painter)\nBorn 1931", "  two  spaces ", "été – 漢字 😀", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_are_one_token_each_and_vanish_on_request(tokenizer):
    for token in SPECIAL_TOKENS:
        assert tokenizer(token)["input_ids"] == [TOKEN_IDS[token]]
        assert tokenizer.convert_tokens_to_ids(token) == TOKEN_IDS[token]
    assert tokenizer.decode(tokenizer("<|im_start|>1931<|im_end|>")["input_ids"], skip_special_tokens=True) == "1931"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert len(tokenizer) == 263 <= VOCABULARY


@pytest.mark.parametrize("part", [{"type": "image"}, {"type": "image_url", "image_url": {"url": "x"}}], ids=["image", "url"])
def test_chat_template_is_qwens(tokenizer, part):
    messages = [
        {"role": "system", "content": "Answer."},
        {"role": "user", "content": [part, {"type": "text", "text": "When?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "1931"}]},
    ]
    start = "<|im_start|>system\nAnswer.<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>When?<|im_end|>\n"
    assert tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True) == start + "<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == start + "<|im_start|>assistant\n1931<|im_end|>\n"


def test_the_shipped_files_are_the_built_ones(tmp_path):
    build_tokenizer(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in FILES.iterdir()}
    for path in tmp_path.iterdir():
        if path.name != "tokenizer.json":
            assert path.read_text() == (FILES / path.name).read_text()
    built, shipped = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (tmp_path, FILES))
    assert built.get_vocab() == shipped.get_vocab()
    text = "Born <|im_end|>\n in 1931."
    assert built.encode(text).ids == shipped.encode(text).ids == AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
    assert json.loads((FILES / "preprocessor_config.json").read_text())["patch_size"] == 16

"""The content of an encoder: the same while the vectors are the same, another as soon as anything changes them."""

import json
import shutil

import pytest
import torch

from stairstep.models import digest
from stairstep.models.settings import TargetSettings

EVERY = TargetSettings(True, True, True, True, True)
TEXTS = ["first", "a second, longer text"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options", [{"targets": EVERY}, {"dora": True, "targets": EVERY}, {"vit_unfrozen": True}, {"modules_to_save": ("language_model.norm",)}]
)
def test_a_fresh_adapter_is_the_plain_base_in_digest_and_in_bits(make, tiles, dtype, options):
    plain, fresh = make(dtype=dtype), make(trainable=True, dtype=dtype, **options)
    with torch.no_grad():
        same_texts = torch.equal(plain.encode_texts(TEXTS, "query"), fresh.encode_texts(TEXTS, "query"))
        same = same_texts and torch.equal(plain.encode_tiles(tiles), fresh.encode_tiles(tiles))
    assert (plain.state_digest() == fresh.state_digest()) == same
    if dtype == "float32" or ("modules_to_save" not in options and "vit_unfrozen" not in options):
        assert same


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"vit_unfrozen": True}, {"modules_to_save": ("visual.merger",)}])
def test_every_trained_tensor_counts(make, options):
    encoder = make(trainable=True, **options)
    seen = {encoder.state_digest()}
    parameters = [
        (name, parameter)
        for members in encoder.groups().values()
        for name, parameter in members
        if "layers.2." in name or "lora" not in name
    ]
    with torch.no_grad():
        for name, parameter in sorted(parameters, key=lambda item: "lora_A" in item[0]):
            parameter.view(-1)[0] += 0.5
            now = encoder.state_digest()
            assert now not in seen, name
            seen.add(now)
    assert len(seen) > 8


def test_random_a_matrices_alone_do_not_count(make):
    assert make(trainable=True, seed=1).state_digest() == make(trainable=True, seed=2).state_digest() == make().state_digest()


def test_what_decides_a_vector_is_in_it_and_what_does_not_is_not(make, base, tmp_path):
    plain = make().state_digest()
    for options in (
        {"query_instruction": "Other."},
        {"document_instruction": "Other."},
        {"dtype": "bfloat16"},
        {"attention": "eager"},
        {"bidirectional": True},
        {"max_text_tokens": 64},
    ):
        assert make(**options).state_digest() != plain, options
    assert make(gradient_checkpointing=True).state_digest() == plain
    shutil.copytree(base, tmp_path / "moved")
    assert make(base=str(tmp_path / "moved")).state_digest() == plain
    path = tmp_path / "moved/config.json"
    content = json.loads(path.read_text())
    content["text_config"]["rms_norm_eps"] = 1e-5
    path.write_text(json.dumps(content))
    assert make(base=str(tmp_path / "moved")).state_digest() != plain


def test_the_scaling_of_an_update_counts(make, trained, tmp_path):
    encoder = make(trainable=True)
    trained(encoder)
    encoder.save(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 16}))
    assert make(start=str(tmp_path)).state_digest() != encoder.state_digest()


def test_a_file_is_read_once(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    path.write_bytes(b"abc")
    first = digest.file_digest(path)
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("read again"))
    assert digest.file_digest(path) == first == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    monkeypatch.undo()
    path.write_bytes(b"abcd")
    assert digest.file_digest(path) != first

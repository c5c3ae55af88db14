"""Bases from folders, shards, seeds and a hub that is not there: strict keys, safetensors only, one clear message."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from stairstep.models import sources
from stairstep.models.load import build_on_meta, load_encoder, resolve_attention
from stairstep.models.settings import ModelSettings
from stairstep.settings import InputError, UnreachableError


def copy_of(base, folder, change):
    """A copy of the base whose tensors went through `change`."""
    shutil.copytree(base, folder)
    state = change(load_file(base / "model.safetensors"))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def same_weights(one, other):
    pairs = list(zip(one.core.state_dict().items(), other.core.state_dict().items(), strict=True))
    return len(pairs) > 50 and all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_prefixed_bare_and_sharded_checkpoints_are_the_same_model(make, base, tmp_path):
    prefixed = make()
    stored = load_file(base / "model.safetensors")
    assert all(key.startswith(("model.", "lm_head.")) for key in stored), "the fixture must look like a published checkpoint"
    assert torch.equal(prefixed.core.visual.pos_embed.weight, stored["model.visual.pos_embed.weight"])
    bare = copy_of(base, tmp_path / "bare", lambda s: {k.removeprefix("model."): v for k, v in s.items() if k != "lm_head.weight"})
    assert same_weights(make(base=bare), prefixed)
    shards = tmp_path / "shards"
    shutil.copytree(base, shards)
    (shards / "model.safetensors").unlink()
    halves = {"model-1.safetensors": list(stored)[::2], "model-2.safetensors": list(stored)[1::2]}
    for name, keys in halves.items():
        save_file({key: stored[key] for key in keys}, shards / name)
    index = {"weight_map": {key: name for name, keys in halves.items() for key in keys}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same_weights(make(base=str(shards)), prefixed)
    (shards / "model-2.safetensors").unlink()
    with pytest.raises(InputError, match=r"no model-2.safetensors"):
        make(base=str(shards))


def test_loading_needs_every_key_and_no_other(make, base, tmp_path):
    q_proj = "model.language_model.layers.0.self_attn.q_proj.weight"
    cases = {
        "missing": (lambda s: {k: v for k, v in s.items() if k != q_proj}, "1 missing: language_model.layers.0.self_attn.q_proj"),
        "unexpected": (lambda s: s | {"model.visual.extra": torch.zeros(2)}, "1 unexpected: model.visual.extra"),
        "shape": (lambda s: s | {q_proj: torch.zeros(3, 3)}, r"1 of another shape: .*q_proj.weight is \[3, 3\] instead of \[64, 64\]"),
        "twice": (lambda s: s | {q_proj.removeprefix("model."): s[q_proj].clone()}, "1 unexpected"),
    }
    for name, (change, message) in cases.items():
        with pytest.raises(InputError, match=message):
            make(base=copy_of(base, tmp_path / name, change))


def test_folders_that_are_no_base(make, base, tmp_path):
    pickled = tmp_path / "pickled"
    shutil.copytree(base, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    torn = tmp_path / "torn"
    shutil.copytree(base, torn)
    (torn / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:5000])
    other = tmp_path / "other"
    shutil.copytree(base, other)
    (other / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "empty").mkdir()
    cases = {
        pickled: "pickled weights are never read",
        torn: "these weights cannot be read",
        other: "expected model_type qwen3_vl, found bert",
        tmp_path / "empty": "there is no config.json",
        tmp_path / "nowhere": "model.base: there is no folder .*nowhere; expected a local folder, a hub id .*qwen3_vl_embedding_2b",
        base / "config.json": "is a file; expected the folder",
    }
    for folder, message in cases.items():
        with pytest.raises(InputError, match=message):
            make(base=str(folder))
    with pytest.raises(InputError, match=r"model\.revision: 'main' means nothing for"):
        make(base=str(base), revision="main")


def test_a_hub_that_cannot_be_reached_is_one_message(make, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UnreachableError, match=r"model.base: 'Qwen/Qwen3-VL-Embedding-2B' is no local folder, and the hub could not"
    ) as caught:
        make(base="Qwen/Qwen3-VL-Embedding-2B")
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
    with pytest.raises(UnreachableError, match=r"model.tokenizer"):
        make(base="qwen3_vl_embedding_2b", tokenizer="someone/else")
    build_on_meta(ModelSettings(base="Qwen/Qwen3-VL-Embedding-2B", revision="abc"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("RepositoryNotFoundError", "neither a local folder nor a hub repository"),
        ("RevisionNotFoundError", "has no revision 'abc'|has no revision abc"),
    ],
)
def test_what_the_hub_refuses_is_the_users_to_mend(make, monkeypatch, error, message):
    kind = getattr(__import__("huggingface_hub.errors", fromlist=[error]), error)

    def refuse(*_, **__):
        raise kind.__new__(kind)

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(InputError, match=message):
        make(base="someone/nothing", revision="abc")


@pytest.fixture
def shipped(base, tmp_path, monkeypatch):
    """A shipped base without weights and without a tokenizer, as the 2B one is."""
    folder = tmp_path / "tiny_shape"
    folder.mkdir()
    content = json.loads((base / "config.json").read_text()) | {"image_token_id": 3, "dtype": "bfloat16"}
    content["text_config"] |= {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(content))
    monkeypatch.setattr(sources, "shipped_bases", lambda: {"tiny_shape": folder})
    return "tiny_shape"


def test_a_shipped_base_has_random_weights_from_its_seed(make, base, shipped, tiles):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, same, other = (make(base=shipped, tokenizer=str(base), init_seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert same_weights(first, same)
    assert not same_weights(first, other)
    assert {parameter.dtype for parameter in first.parameters()} == {torch.float32}, "the recipe's dtype rules, not the config's"
    assert first.state_digest() == same.state_digest() != other.state_digest()
    assert first.encode_tiles(tiles).shape == (4, 64), "special tokens come from the tokenizer that the recipe names"


def test_a_shipped_base_without_a_tokenizer_says_so(make, shipped):
    with pytest.raises(InputError, match=r"has one as model\.tokenizer"):
        make(base=shipped)


def test_shipped_bases_include_the_2b_config():
    assert (sources.shipped_bases()["qwen3_vl_embedding_2b"] / "config.json").is_file()


def test_attention_is_resolved_for_the_device(monkeypatch):
    def resolved(attention, dtype, device, flash):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if flash else None)
        return resolve_attention(ModelSettings(attention=attention, dtype=dtype), torch.device(device))

    assert resolved("auto", "bfloat16", "cuda", True) == "flash_attention_2"
    assert resolved("auto", "float32", "cuda", True) == resolved("auto", "bfloat16", "cpu", True) == "sdpa"
    assert resolved("auto", "bfloat16", "cuda", False) == "sdpa"
    assert resolved("eager", "bfloat16", "cuda", True) == "eager"
    for case in (("bfloat16", "cuda", False), ("float32", "cuda", True), ("bfloat16", "cpu", True)):
        with pytest.raises(InputError, match=r"model.attention: flash_attention_2 cannot be used"):
            resolved("flash_attention_2", *case)


def test_frozen_by_default_and_in_eval_mode(base):
    encoder = load_encoder(ModelSettings(base=str(base), dtype="float32"))
    assert not encoder.training and not any(parameter.requires_grad for parameter in encoder.parameters())

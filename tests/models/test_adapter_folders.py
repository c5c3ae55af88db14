"""Adapter folders: what is trained survives to the bit, plain PEFT gives the same vectors, a folder that does not fit says how."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from stairstep.models.adapter_files import locate_adapter
from stairstep.models.settings import TargetSettings
from stairstep.settings import InputError, StairstepError, UnreachableError

TEXTS = ["first", "a second, longer text"]
EVERY = TargetSettings(True, True, True, True, True)
ADAPTERS = {
    "lora": {},
    "everywhere": {"targets": EVERY, "vit_rank": 2, "vit_alpha": 6.0},
    "dora": {"dora": True, "targets": EVERY},
    "rslora": {"rslora": True},
    "vit_unfrozen": {"vit_unfrozen": True},
    "modules_to_save": {"modules_to_save": ("visual.merger", "language_model.norm")},
    "whole_modules_only": {"targets": TargetSettings(llm_attention=False), "modules_to_save": ("visual.merger",)},
    "regex": {"targets": TargetSettings(llm_attention=False), "target_regex": r"language_model\.layers\.1\.mlp\.up_proj"},
}


def vectors(encoder, tiles):
    with torch.no_grad():
        return torch.cat([encoder.encode_texts(TEXTS, "query"), encoder.encode_tiles(tiles)])


@pytest.mark.parametrize("name", ADAPTERS)
def test_save_and_load(make, trained, tiles, plain_model, tmp_path, name):
    encoder = make(trainable=True, **ADAPTERS[name])
    fresh = vectors(encoder, tiles)
    trained(encoder)
    expected = vectors(encoder, tiles)
    assert (expected - fresh)[len(TEXTS) :].norm(dim=-1).min() > 1e-4, "training must have moved the vectors"
    encoder.save(tmp_path)

    resumed = make(trainable=True, seed=9, **ADAPTERS[name])
    resumed.load_trained(tmp_path)
    for group, members in encoder.groups().items():
        for (key, one), (other_key, other) in zip(members, resumed.groups()[group], strict=True):
            assert key == other_key and one.dtype == other.dtype and torch.equal(one, other)
    assert torch.equal(vectors(resumed, tiles), expected)

    frozen = make(start=str(tmp_path))
    assert torch.equal(vectors(frozen, tiles), expected)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    late = make()
    late.load_trained(tmp_path)
    assert torch.equal(vectors(late, tiles), expected)
    assert encoder.state_digest() == resumed.state_digest() == frozen.state_digest() == late.state_digest()

    plain = make()
    plain.model = peft.PeftModel.from_pretrained(plain_model(), tmp_path).eval()
    torch.testing.assert_close(vectors(plain, tiles), expected, atol=1e-6, rtol=0)


def test_what_is_trained_in_bfloat16_survives_to_the_bit(make, trained, tmp_path):
    encoder = make(trainable=True, dtype="bfloat16", vit_unfrozen=True)
    trained(encoder, 1e-4)
    encoder.save(tmp_path)
    resumed = make(trainable=True, dtype="bfloat16", vit_unfrozen=True)
    resumed.load_trained(tmp_path)
    pairs = [
        (one, other)
        for group, members in encoder.groups().items()
        for (_, one), (_, other) in zip(members, resumed.groups()[group], strict=True)
    ]
    assert len(pairs) > 40 and all(torch.equal(one, other) for one, other in pairs)


def test_keys_with_an_adapter_name_and_from_the_generating_model(make, trained, tiles, tmp_path):
    encoder = make(trainable=True, targets=EVERY)
    trained(encoder)
    encoder.save(tmp_path / "plain")
    stored = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.") and "default" not in key for key in stored)
    renames = {
        "named": lambda key: key.replace(".weight", ".default.weight"),
        "generating": lambda key: key.replace("base_model.model.", "base_model.model.model."),
    }
    for folder, rename in renames.items():
        shutil.copytree(tmp_path / "plain", tmp_path / folder)
        save_file({rename(key): tensor for key, tensor in stored.items()}, tmp_path / folder / "adapter_model.safetensors")
        assert torch.equal(vectors(make(start=str(tmp_path / folder)), tiles), vectors(encoder, tiles))


def test_a_run_can_start_from_a_folder_that_fits(make, trained, tiles, tmp_path):
    encoder = make(trainable=True)
    trained(encoder)
    encoder.save(tmp_path)
    started = make(trainable=True, start=str(tmp_path), dropout=0.1)
    assert torch.equal(vectors(started, tiles), vectors(encoder, tiles))
    assert all(parameter.requires_grad for _, parameter in started.groups()["llm"]) and len(started.groups()["llm"]) == 32


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"rank": 8}, r"LoRA rank 4 there and 8 here \(model.adapter.rank\)"),
        ({"alpha": 4.0}, r"scaled by 2 there and 1 here \(model.adapter.alpha"),
        ({"targets": TargetSettings(True, True)}, r"the folder lacks LoRA on llm_mlp \(model.adapter.targets.llm_mlp\): 24 tensors"),
        ({"targets": TargetSettings(("q_proj",))}, r"the folder has LoRA on llm_attention .*: 24 tensors"),
        ({"dora": True}, r"the folder lacks DoRA magnitudes \(model.adapter.dora\)"),
        ({"vit_unfrozen": True}, "the folder lacks whole modules of the vision tower"),
        ({"adapter": None}, "model.adapter is null"),
    ],
)
def test_a_run_does_not_start_from_a_folder_that_differs(make, tmp_path, recipe, message):
    make(trainable=True).save(tmp_path)
    with pytest.raises(InputError, match=message):
        make(trainable=True, start=str(tmp_path), **recipe)


def test_another_structure_is_not_resumed_from(make, tmp_path):
    make(trainable=True).save(tmp_path)
    with pytest.raises(InputError, match=r"does not fit: .*rank 4 there and 2 here"):
        make(trainable=True, rank=2).load_trained(tmp_path)


def test_broken_folders(make, tmp_path):
    make(trainable=True).save(tmp_path / "good")

    def broken(name):
        shutil.copytree(tmp_path / "good", tmp_path / name)
        return tmp_path / name

    (broken("torn") / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    (broken("empty") / "adapter_model.safetensors").unlink()
    pickled = broken("pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    unsafe = {"layers": {"layer_replication": [[0, 4], [0, 4]]}, "code": {"megatron_config": {"x": 1}, "megatron_core": "antigravity"}}
    for name, change in {"kind": {"peft_type": "IA3"}, "init": {"init_lora_weights": "pissa"}, **unsafe}.items():
        path = broken(name) / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (broken("words") / "adapter_config.json").write_text("{")
    (broken("nameless") / "adapter_config.json").unlink()
    expectations = {
        "torn": "cannot be read",
        "empty": "there is no adapter_model.safetensors",
        "pickled": "pickled adapter is never read",
        "kind": "peft_type LORA, found IA3",
        "init": "changes the base itself",
        "layers": "layer_replication is not supported",
        "code": "megatron_config is not supported",
        "words": "cannot be read as JSON",
        "nameless": "there is no adapter_config.json in this folder; expected an adapter folder",
        "missing": "there is no adapter folder",
    }
    for name, message in expectations.items():
        with pytest.raises(InputError, match=message):
            make(start=str(tmp_path / name))


def test_hub_adapters_without_a_hub(make, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UnreachableError, match=r"model.start: 'someone/adapters' is no local folder"):
        make(start="someone/adapters:lora_vit/ckpt200")


def test_hub_names_are_split_into_repository_revision_and_folder(monkeypatch, tmp_path):
    asked = {}

    def snapshot(repository, revision, allow_patterns):
        asked.update(repository=repository, revision=revision, files=allow_patterns)
        (tmp_path / "lora_vit/ckpt200").mkdir(parents=True, exist_ok=True)
        (tmp_path / "lora_vit/ckpt200/adapter_config.json").write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert locate_adapter("someone/adapters@abc:lora_vit/ckpt200") == tmp_path / "lora_vit/ckpt200"
    files = ["lora_vit/ckpt200/adapter_config.json", "lora_vit/ckpt200/adapter_model.safetensors"]
    assert asked == {"repository": "someone/adapters", "revision": "abc", "files": files}
    with pytest.raises(InputError, match=r"inside the repository"):
        locate_adapter("someone/adapters:../elsewhere")
    with pytest.raises(InputError, match=r"no adapter_config.json under 'other'"):
        locate_adapter("someone/adapters:other")


def test_nothing_trained_is_nothing_to_save(make, tmp_path):
    with pytest.raises(StairstepError, match=r"no adapter to save"):
        make().save(tmp_path)


@pytest.mark.parametrize("options", [{"targets": EVERY}, {"vit_unfrozen": True}, {"dora": True}])
def test_adapter_disabled_is_the_base(make, trained, tiles, options):
    encoder = make(trainable=True, **options)
    plain = vectors(encoder, tiles)
    trained(encoder)
    moved = vectors(encoder, tiles)
    names = [name for members in encoder.groups().values() for name, _ in members]
    with encoder.adapter_disabled():
        assert torch.equal(vectors(encoder, tiles), plain)
    assert torch.equal(vectors(encoder, tiles), moved) and not torch.equal(moved, plain)
    assert [name for members in encoder.groups().values() for name, _ in members] == names
    frozen = make()
    with frozen.adapter_disabled():
        assert torch.equal(vectors(frozen, tiles), plain)

"""Where the adapter goes: exact counts on the 2B base, every row, every error that names its key."""

import time

import pytest
import torch

from stairstep.models.load import build_on_meta, trainable_line
from stairstep.models.placement import row_of
from stairstep.models.settings import AdapterSettings, ModelSettings, TargetSettings
from stairstep.settings import InputError, RecipeError, build, from_plain

SEED_TARGETS = TargetSettings(llm_attention=True, vit_attention=True, vit_mlp=True)


def meta(base="Qwen/Qwen3-VL-Embedding-2B", **adapter):
    return build_on_meta(ModelSettings(base=base, adapter=AdapterSettings(**adapter)))


def refuse(message, **adapter):
    with pytest.raises(RecipeError, match=message):
        build(AdapterSettings, from_plain(adapter, "test"))


@pytest.mark.parametrize("base", ["Qwen/Qwen3-VL-Embedding-2B", "qwen3_vl_embedding_2b"])
def test_the_seed_recipe_gives_the_seed_counts(base):
    started = time.monotonic()
    model, placement = meta(base, targets=SEED_TARGETS)
    assert trainable_line(model) == "trainable params: 25,427,968 || all params: 2,152,960,000 || trainable%: 1.1811"
    assert placement.rows == {"llm_attention": 28 * 4, "vit_attention": 24 * 2, "vit_mlp": 24 * 2}
    assert (placement.trainable, placement.total) == (25_427_968, 2_152_960_000)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert time.monotonic() - started < 20


def test_llm_attention_alone():
    _, placement = meta()
    assert placement.trainable == 12_845_056 == 28 * 32 * (2 * (2048 + 2048) + 2 * (2048 + 1024))


def test_rows_and_single_projections_count_what_they_say():
    _, placement = meta(targets=TargetSettings(llm_attention=("q_proj", "v_proj"), llm_mlp=True, merger=("linear_fc2",)), rank=8)
    assert placement.rows == {"llm_attention": 56, "llm_mlp": 84, "merger": 4}
    assert placement.trainable == 8 * (28 * (2048 + 2048 + 2048 + 1024) + 84 * (2048 + 6144) + 4 * (4096 + 2048))


def test_the_vision_tower_has_its_own_rank_and_alpha():
    model, placement = meta(targets=SEED_TARGETS, vit_rank=4)
    vit = 24 * 4 * (1024 + 3072 + 1024 + 1024 + 2 * (1024 + 4096))
    assert placement.trainable == 12_845_056 + vit
    layers = dict(model.named_modules())
    block = layers["base_model.model.visual.blocks.3.attn.qkv"]
    assert (block.r["default"], block.scaling["default"]) == (4, 1.0), "alpha is that rank where it is not given"
    assert layers["base_model.model.language_model.layers.3.self_attn.q_proj"].r["default"] == 32
    model, _ = meta(targets=SEED_TARGETS, vit_alpha=64.0)
    assert dict(model.named_modules())["base_model.model.visual.blocks.3.attn.qkv"].scaling["default"] == 2.0
    model, _ = meta(targets=SEED_TARGETS, rank=16, alpha=8.0, rslora=True)
    assert dict(model.named_modules())["base_model.model.visual.blocks.3.attn.qkv"].scaling["default"] == 2.0


def test_dora_trains_magnitudes_too():
    _, placement = meta(dora=True)
    assert placement.trainable == 12_845_056 + 28 * (2048 + 1024 + 1024 + 2048)


def test_the_vit_unfrozen_whole():
    _, placement = meta(vit_unfrozen=True)
    base, _ = build_on_meta(ModelSettings(adapter=None))
    vision = sum(parameter.numel() for name, parameter in base.named_parameters() if name.startswith("visual."))
    assert placement.rows == {"llm_attention": 112, "vit_unfrozen": 1}
    assert placement.trainable == 12_845_056 + vision


def test_regex_and_whole_modules():
    off = TargetSettings(llm_attention=False)
    _, placement = meta(targets=off, target_regex=r"language_model\.layers\.(0|1)\.mlp\.down_proj", modules_to_save=("visual.merger",))
    assert placement.rows == {"target_regex": 2, "modules_to_save visual.merger": 1}
    assert placement.describe() == "adapter on target_regex: 2 modules, modules_to_save visual.merger: 1 modules"
    _, placement = meta(targets=off, modules_to_save=("visual.merger",))
    assert placement.trainable == 2 * 1024 + (4096 * 4096 + 4096) + (4096 * 2048 + 2048)


def test_no_adapter_freezes_everything():
    model, placement = build_on_meta(ModelSettings(adapter=None))
    assert trainable_line(model).startswith("trainable params: 0 || all params: 2,127,532,032")
    assert placement.rows == {} and "bare base" in placement.describe()


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"target_regex": "language_model.layers.99.*"}, "model.adapter.target_regex: the pattern .* matches no layer"),
        ({"target_regex": ".*norm1"}, "model.adapter.target_regex"),
        ({"modules_to_save": ("no_such_module",)}, "model.adapter.modules_to_save: no module .*no_such_module"),
        ({"modules_to_save": ("self_attn",)}, "modules_to_save: .*self_attn is trained whole, and .*q_proj inside it"),
        ({"vit_unfrozen": True, "modules_to_save": ("visual.merger",)}, "vit_unfrozen: visual is trained whole, and visual.merger"),
        ({"vit_rank": 8, "target_regex": r".*self_attn\.q_proj"}, "model.adapter.vit_rank: no LoRA is placed in the vision tower"),
    ],
)
def test_a_pattern_without_a_match_is_an_error_that_names_its_key(adapter, message):
    with pytest.raises(InputError, match=message):
        meta(**adapter)


def test_settings_refuse_what_would_have_no_effect():
    refuse("targets.llm_attention: expected true, false or a list of q_proj.*found 'qkv'", targets={"llm_attention": ["qkv"]})
    refuse("targets.vit_mlp: .*an empty list", targets={"vit_mlp": []})
    refuse("vit_rank: no LoRA is placed in the vision tower", vit_rank=4)
    refuse("vit_unfrozen: .*not both", vit_unfrozen=True, targets={"vit_mlp": True})
    refuse("target_regex: this is not a regular expression", target_regex="(")
    refuse("targets: this adapter trains nothing", targets={"llm_attention": False})
    refuse("modules_to_save: an empty name", modules_to_save=[""])
    assert build(ModelSettings, from_plain({"adapter": None}, "test")).adapter is None
    assert build(AdapterSettings, from_plain({"targets": {"llm_attention": ["v_proj"]}}, "test")).targets.llm_attention == ("v_proj",)


def test_rows_of_modules():
    assert row_of("language_model.layers.12.self_attn.q_proj") == "llm_attention"
    assert row_of("visual.deepstack_merger_list.0.linear_fc1") == "merger"
    assert row_of("visual.pos_embed") == "visual.pos_embed"


def test_the_adapter_is_drawn_from_its_seed_and_leaves_torch_alone(make):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, same, other = (dict(make(trainable=True, seed=seed).groups()["llm"]) for seed in (5, 5, 6))
    assert torch.equal(before, torch.get_rng_state())
    key = "language_model.layers.0.self_attn.q_proj.lora_A.weight"
    assert torch.equal(first[key], same[key]) and not torch.equal(first[key], other[key])


def test_groups_follow_the_parts_of_the_model(make):
    groups = make(trainable=True, targets=TargetSettings(True, False, True, False, True)).groups()
    assert {name: len(members) for name, members in groups.items()} == {"llm": 32, "vit": 12, "merger": 12}
    whole = make(trainable=True, vit_unfrozen=True).groups()
    assert any(name == "visual.pos_embed.weight" for name, _ in whole["vit"])
    assert any(name == "visual.merger.norm.weight" for name, _ in whole["merger"])
    assert {name.split(".")[0] for name, _ in whole["llm"]} == {"language_model"}
    assert make().groups() == {"llm": [], "vit": [], "merger": []}

"""The recipe: one builder behind files, command lines and trials; what no room can see alone; a digest of what it says."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from stairstep.records import RunFolder
from stairstep.settings import RecipeError, build, from_plain, to_plain, to_yaml
from stairstep.tasks import Recipe, load_recipe, recipe_digest
from stairstep.tasks.opening import open_run

ROOT = Path(__file__).resolve().parents[2]
TOP_KEYS = ["run", "task", "data", "tiles", "model", "objective", "optim", "phases", "evaluation", "checkpoints", "trackers", "cluster"]


def written(folder: Path, text: str, name: str = "r.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def leaves(plain: Any, key: str = "") -> list[tuple[str, Any]]:
    if isinstance(plain, dict) and plain:
        return [one for name, child in plain.items() for one in leaves(child, f"{key}.{name}" if key else name)]
    return [(key, plain)]


def test_the_top_keys_are_those_of_every_recipe():
    assert [one.name for one in fields(Recipe)] == TOP_KEYS


def test_an_empty_recipe_is_all_defaults_but_its_name(tmp_path: Path):
    recipe = load_recipe(written(tmp_path, ""))
    assert replace(recipe, run=replace(recipe.run, name=None)) == Recipe() == build(Recipe, from_plain({}, "trial"))
    assert recipe.run.name == "r"


@pytest.mark.parametrize(
    ("file", "name"),
    [("v8r.yaml", "v8r"), ("v8.r+a_1.yaml", "v8.r+a_1"), ("my recipe (2).yaml", "my-recipe--2-"), ("-x.yml", "x"), ("ü.yaml", "run")],
)
def test_a_run_is_called_as_its_file_unless_it_says_otherwise(tmp_path: Path, file: str, name: str):
    recipe = load_recipe(written(tmp_path, "", file))
    assert recipe.run.name == name
    assert load_recipe(written(tmp_path, to_yaml(recipe), "shown.yaml")) == recipe, "a name that the recipe itself may not have"
    assert load_recipe(tmp_path / file, ["run.name=other"]).run.name == "other"


def test_a_key_means_the_same_in_a_file_an_override_and_a_trial(tmp_path: Path):
    """Every leaf with a value other than its default, given three ways."""
    given = {"run.seed": 3, "optim.rates.llm": 1e-4, "objective.loss.hardness": 0.5, "model.adapter.dora": True, "data.order": "reversed"}
    given |= {"phases.text_curriculum": [0.5, 0.25], "evaluation.sets": [{"path": "a.json", "limit": 4}], "model.adapter.vit_rank": 4}
    given |= {
        "model.adapter.targets.vit_mlp": True,
        "optim.ema_decay": 0.9,
        "trackers.wandb": "offline",
        "cluster.resources": {"gpu_a": 1.5},
    }
    tree: dict[str, Any] = {}
    for key, value in given.items():
        *above, last = key.split(".")
        place = tree
        for part in above:
            place = place.setdefault(part, {})
        place[last] = value
    by_file = load_recipe(written(tmp_path, to_yaml(tree)))
    by_override = load_recipe(written(tmp_path, ""), [f"{key}={json.dumps(value)}" for key, value in given.items()])
    by_trial = build(Recipe, from_plain({**tree, "run": {**tree["run"], "name": "r"}}, "trial"))
    assert by_file == by_override == by_trial
    assert by_file != load_recipe(written(tmp_path, ""))
    assert recipe_digest(by_file) == recipe_digest(by_override) == recipe_digest(by_trial)


def test_overrides_lie_over_a_file_that_lies_over_what_it_extends(tmp_path: Path):
    written(tmp_path, "optim: {batch: 1, steps: 10, weight_decay: 0.3}\ndata: {text: [{path: a}, {path: b}]}\n", "low.yaml")
    written(tmp_path, "optim: {batch: 2, steps: 20}\n", "middle.yaml")
    top = written(tmp_path, "extends: [low.yaml, middle.yaml]\noptim: {batch: 3}\ndata: {text: [{path: c}]}\n")
    recipe = load_recipe(top, ["optim.batch=4"])
    assert (recipe.optim.batch, recipe.optim.steps, recipe.optim.weight_decay) == (4, 20, 0.3)
    assert [one.path for one in recipe.data.text] == ["c"], "lists are replaced"
    assert load_recipe(top).optim.batch == 3


def test_what_no_room_can_see_alone_is_told_at_its_line(tmp_path: Path):
    path = written(tmp_path, "optim:\n  steps: 10\nphases:\n  text_warmup_steps: 11\n")
    with pytest.raises(RecipeError, match=r"r\.yaml:4: phases\.text_warmup_steps: 11 is more than optim\.steps \(10\)"):
        load_recipe(path)
    assert load_recipe(path, ["optim.steps=11"]).phases.text_warmup_steps == 11
    path = written(tmp_path, "optim: {stop_after: 2}\nevaluation:\n  mode: after\n")
    with pytest.raises(RecipeError, match=r"r\.yaml:1: optim\.stop_after: there is no score to stop by before"):
        load_recipe(path)
    assert load_recipe(path, ["evaluation.mode=inline"]).optim.stop_after == 2
    path = written(tmp_path, "evaluation: {pairs: 5}\n")
    with pytest.raises(RecipeError, match=r"r\.yaml:1: evaluation\.pairs: .*data\.validation"):
        load_recipe(path)
    assert load_recipe(path, ["data.validation=[{path: eval.jsonl}]"]).evaluation.pairs == 5


def test_the_digest_is_of_everything_that_a_recipe_says(tmp_path: Path):
    path = written(tmp_path, "")
    digest = recipe_digest(load_recipe(path))
    assert digest == recipe_digest(load_recipe(written(tmp_path, to_yaml(load_recipe(path)))))
    changed = ["run.seed=1", "optim.batch=65", "model.bidirectional=true", "objective.masks.same_article=false", "cluster.workers=1"]
    digests = {recipe_digest(load_recipe(written(tmp_path, ""), [one])) for one in changed}
    assert len(digests | {digest}) == len(changed) + 1


def test_shipped_recipes_say_only_what_differs_and_v8r_is_seed_000():
    """Figures of the seed's own command, §6; they are also in docs/seed000.md."""
    recipe = load_recipe(ROOT / "recipes" / "v8r.yaml")
    plain = dict(leaves(to_plain(recipe)))
    expected = {
        "optim.steps": 350,
        "optim.batch": 64,
        "objective.gradcache.chunk_items": 4,
        "objective.gradcache.chunk_tokens": None,
        "data.hard_negatives": 2,
        "optim.rates.llm": 7e-6,
        "optim.schedule.warmup_steps": 20,
        "optim.schedule.shape": "cosine",
        "optim.weight_decay": 0.01,
        "optim.clip_norm": 1.0,
        "evaluation.loss_every": 25,
        "evaluation.every": 50,
        "checkpoints.every": 50,
        "tiles.max_visual_tokens": 4096,
        "phases.text_warmup_steps": 50,
        "model.adapter.rank": 32,
        "model.adapter.alpha": 32.0,
        "model.adapter.dropout": 0.05,
        "model.adapter.targets.llm_attention": True,
        "model.adapter.targets.vit_attention": True,
        "model.adapter.targets.vit_mlp": True,
        "model.dtype": "bfloat16",
        "objective.temperature.initial": 0.07,
        "objective.temperature.learnable": True,
        "objective.temperature.max_scale": 100.0,
    }
    assert {key: plain[key] for key in expected} == expected
    assert recipe.evaluation.sets[0].limit == 1000


def test_a_run_of_an_older_version_takes_the_defaults_of_younger_keys(tmp_path: Path) -> None:
    recipe = build(Recipe, from_plain({"run": {"root": str(tmp_path), "name": "old"}}, "test"))
    plain = to_plain(recipe)
    del plain["evaluation"]["top_k_read"]
    folder = RunFolder.create(tmp_path / "old")
    with folder.claim():
        folder.open_for(plain, "auto")
        folder.metrics.append(1, {"train/loss": 1.0})
    with folder.claim():
        assert open_run(folder, recipe) == 0
    assert folder.recipe()["evaluation"]["top_k_read"] == 3

"""recipes/schema.json is what `make schema` would write, accepts every recipe in the repository, and each of those can be built."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from stairstep.settings import to_plain
from stairstep.settings.yaml_text import parse_yaml
from stairstep.tasks import Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
SCHEMA = ROOT / "recipes" / "schema.json"


def plain(node: Any) -> Any:
    if isinstance(node.value, dict):
        return {name: plain(child) for name, child in node.value.items()}
    return [plain(child) for child in node.value] if isinstance(node.value, list) else node.value


def test_there_are_recipes():
    assert {"v8r", "tinywiki", "demo"} <= {path.stem for path in RECIPES}


def test_the_schema_is_current(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT))
    schema = importlib.import_module("jobs.schema")
    assert schema.PLACE == SCHEMA
    assert SCHEMA.read_text(encoding="utf-8") == schema.schema_text(), "recipes/schema.json is out of date; run `make schema`"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_the_repository_loads_and_satisfies_the_schema(path: Path):
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    recipe = load_recipe(path)
    assert isinstance(recipe, Recipe)
    for tree in (plain(parse_yaml(path.read_text(encoding="utf-8"), str(path))), to_plain(recipe)):
        assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(json.loads(json.dumps(tree)))] == []


def test_the_schema_refuses_what_the_builder_refuses():
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    for wrong in ({"optim": {"batchs": 4}}, {"optim": {"batch": 0}}, {"optim": {"batch": "4"}}, {"task": {"kind": "x"}}, {"optims": {}}):
        assert not validator.is_valid(wrong), wrong
    assert validator.is_valid({"optim": {"batch": 4}, "extends": ["other.yaml"]})

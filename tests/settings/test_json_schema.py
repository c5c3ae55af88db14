"""The JSON schema for editors: valid itself, accepts whatever the builder accepts, refuses what a person most often gets wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest

from stairstep.settings import InputError, build, from_plain, json_schema, setting

jsonschema = pytest.importorskip("jsonschema")


@dataclass(frozen=True)
class Left:
    kind: Literal["left"] = setting("left", doc="Left.")
    amount: float = setting(0.5, doc="Amount.", minimum=0, below=1)


@dataclass(frozen=True)
class Right:
    kind: Literal["right"] = setting("right", doc="Right.")
    names: tuple[str, ...] = setting((), doc="Names.")


@dataclass(frozen=True)
class Item:
    path: str = setting(doc="A file.")
    limit: int | None = setting(None, doc="Limit.", minimum=1)


@dataclass(frozen=True)
class Sample:
    name: str = setting(doc="Name.")
    steps: int = setting(5, doc="Steps.", minimum=1, maximum=10)
    rate: float = setting(0.1, doc="Rate.", above=0)
    flag: bool = setting(False, doc="Flag.")
    mode: Literal["auto", "off"] = setting("auto", doc="Mode.")
    keep: int | Literal["auto"] = setting(0, doc="Keep.", minimum=0)
    pair: tuple[int, int] = setting((1, 2), doc="Pair.")
    table: dict[str, float] = setting(doc="Table.", factory=dict, minimum=0)
    items: tuple[Item, ...] = setting((), doc="Items.")
    side: Left | Right | None = setting(Left(), doc="Side.")


SCHEMA = json_schema(Sample, "Sample")

ACCEPTED = [
    {"name": "n"},
    {"name": "n", "steps": 1, "rate": 1, "flag": True, "mode": "off", "keep": "auto"},
    {"name": "n", "steps": 10, "rate": 7e-6, "keep": 4, "pair": [3, 4], "table": {"any": 0, "key": 1.5}},
    {"name": "n", "items": [{"path": "p"}, {"path": "q", "limit": None}, {"path": "q", "limit": 1}]},
    {"name": "n", "side": None},
    {"name": "n", "side": {}},
    {"name": "n", "side": {"amount": 0}},
    {"name": "n", "side": {"kind": "right", "names": ["a", "b"]}},
]
REFUSED = [
    {"name": "n", "stepz": 1},
    {"name": "n", "items": [{"path": "p", "limits": 1}]},
    {"name": "n", "side": {"kind": "right", "amount": 0}},
    {"name": "n", "side": {"kind": "up"}},
    {"name": "n", "side": {"kind": "left", "amount": 1}},
    {"name": 5},
    {"name": None},
    {"name": "n", "steps": 0},
    {"name": "n", "steps": 11},
    {"name": "n", "steps": 1.5},
    {"name": "n", "steps": "5"},
    {"name": "n", "steps": True},
    {"name": "n", "rate": 0},
    {"name": "n", "flag": "off"},
    {"name": "n", "mode": "on"},
    {"name": "n", "keep": -1},
    {"name": "n", "keep": "often"},
    {"name": "n", "pair": [1]},
    {"name": "n", "pair": [1, 2, 3]},
    {"name": "n", "table": {"key": -1}},
    {"name": "n", "table": {"key": "x"}},
    {"name": "n", "items": {"path": "p"}},
    {"name": "n", "items": "p"},
]


def valid(value):
    return jsonschema.Draft202012Validator(SCHEMA).is_valid(value)


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["title"] == "Sample"


@pytest.mark.parametrize("value", ACCEPTED)
def test_what_the_builder_accepts_is_valid(value):
    assert build(Sample, from_plain(value, "here"))
    assert valid(value)


@pytest.mark.parametrize("value", REFUSED)
def test_what_the_builder_refuses_is_not(value):
    with pytest.raises(InputError):
        build(Sample, from_plain(value, "here"))
    assert not valid(value)


def test_a_recipe_may_leave_required_keys_to_those_it_extends():
    assert valid({"extends": "base.yaml"})
    assert valid({"extends": ["a.yaml", "b.yaml"], "steps": 3})
    assert not valid({"extends": 5})


def test_an_editor_is_told_what_a_key_means_and_what_it_is_by_default():
    properties = SCHEMA["properties"]
    assert properties["steps"] == {"description": "Steps.", "type": "integer", "minimum": 1, "maximum": 10, "default": 5}
    assert properties["pair"]["default"] == [1, 2]
    assert properties["table"]["default"] == {}
    assert properties["side"]["default"] == {"kind": "left", "amount": 0.5}
    assert "default" not in properties["name"]


def test_every_default_is_valid_itself():
    for name, entry in SCHEMA["properties"].items():
        if "default" in entry:
            assert jsonschema.Draft202012Validator(entry).is_valid(entry["default"]), name

"""Trees from plain Python values, and values as error messages show them."""

from __future__ import annotations

import enum
from pathlib import Path

import numpy
import pytest

from stairstep.settings import InputError, from_plain
from stairstep.settings.nodes import Origin, describe


class Colour(enum.StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (numpy.int64(3), 3),
        (numpy.float32(0.5), 0.5),
        (numpy.float64(7e-6), 7e-6),
        (numpy.bool_(True), True),
        (numpy.str_("x"), "x"),
        (Colour.RED, "red"),
        (Path("a") / "b", "a/b"),
        (None, None),
        (True, True),
    ],
)
def test_scalars_of_other_libraries_become_plain(value, expected):
    """The builder compares types exactly, and a sweep's samplers hand out numpy's."""
    found = from_plain({"key": value}, "trial 3").value["key"]
    assert type(found.value) is type(expected)
    assert found.value == expected
    assert str(found.origin) == "trial 3"


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", lambda: None, {"deep": [object()]}])
def test_what_no_recipe_can_hold_is_told(value):
    with pytest.raises(InputError, match=r"trial 3: expected mappings, lists, text, numbers.*of type"):
        from_plain({"key": value}, "trial 3")


def test_keys_are_text():
    with pytest.raises(InputError, match="every key has to be text, found the number 1"):
        from_plain({"a": {1: "x"}}, "trial 3")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "nothing (null)"),
        (True, "the truth value true"),
        (3, "the number 3"),
        (7e-6, "the number 7e-06"),
        (float("inf"), "the number inf"),
        ("off", "the text 'off'"),
        ("two\nlines", "the text 'two\\nlines'"),
        ({}, "a mapping"),
        ([], "a list"),
        ((), "a list"),
        (b"", "a value of type bytes"),
    ],
)
def test_values_in_words(value, words):
    assert describe(value) == words


def test_long_values_are_cut():
    assert len(describe("x" * 1000)) < 80
    assert describe("x" * 1000).endswith("…'")
    assert len(describe(10**500)) < 80


def test_an_origin_is_a_file_and_line_or_a_source():
    assert str(Origin("r.yaml", 3)) == "r.yaml:3"
    assert str(Origin("override a=1")) == "override a=1"

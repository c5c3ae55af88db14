"""YAML text to nodes and back: scalars as the YAML 1.2 core schema reads them, lines kept, everything unusual refused by name."""

from __future__ import annotations

import math
import random
import time

import pytest
import yaml

from stairstep.settings import InputError, RecipeError, from_plain, parse_yaml
from stairstep.settings.yaml_text import MAX_CHARACTERS, MAX_DEPTH, MAX_VALUES, dump_yaml


def plain(node):
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


def read(text):
    return plain(parse_yaml(text, "r.yaml"))


def refusal(text):
    with pytest.raises(InputError) as caught:
        parse_yaml(text, "r.yaml")
    message = str(caught.value)
    assert "\n" not in message
    return message


# The tables of YAML 1.2.2, sections 10.2.1 and 10.3.2, and what YAML 1.1 reads otherwise.
SCALARS = [
    ("7e-6", 7e-6),
    ("7E+3", 7000.0),
    ("1e5", 1e5),
    ("-.5", -0.5),
    ("1.", 1.0),
    ("+12.50", 12.5),
    ("0", 0),
    ("-0", 0),
    ("+12", 12),
    ("010", 10),
    ("08", 8),
    ("0o17", 15),
    ("0xfF", 255),
    ("true", True),
    ("TRUE", True),
    ("False", False),
    ("null", None),
    ("Null", None),
    ("~", None),
    ("", None),
    ("off", "off"),
    ("on", "on"),
    ("yes", "yes"),
    ("No", "No"),
    ("y", "y"),
    ("tRue", "tRue"),
    ("1_000", "1_000"),
    ("0b11", "0b11"),
    ("1:30", "1:30"),
    ("2026-07-01", "2026-07-01"),
    ("1.2.3", "1.2.3"),
    ("e5", "e5"),
    (".", "."),
    ("=", "="),
    ("'7e-6'", "7e-6"),
    ('"true"', "true"),
    ("!!str 12", "12"),
    ("!!float 3", 3.0),
]


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_scalars_are_those_of_yaml_1_2(text, value):
    found = read(f"key: {text}")["key"]
    assert type(found) is type(value)
    assert found == value


def test_scalars_that_are_not_finite():
    found = read("[.inf, -.INF, +.inf, .nan]")
    assert found[:3] == [math.inf, -math.inf, math.inf]
    assert math.isnan(found[3])


def test_yaml_1_1_reads_the_table_otherwise():
    """The table has cases in which the library's own reading would be wrong; else the test above shows nothing."""
    differs = [text for text, value in SCALARS if _safe_load(text) != value]
    assert {"7e-6", "off", "1_000", "010", "1:30", "2026-07-01"} <= set(differs)


def _safe_load(text):
    try:
        return yaml.safe_load(f"key: {text}")["key"]
    except (yaml.YAMLError, ValueError) as error:
        return error


def test_every_value_remembers_its_line():
    tree = parse_yaml("# a comment\na: 1\nb:\n  c:\n    2\n  d:\n    - 3\n    - e: 4\n", "r.yaml")
    assert str(tree.value["a"].origin) == "r.yaml:2"
    assert str(tree.value["b"].origin) == "r.yaml:3"
    assert str(tree.value["b"].value["c"].origin) == "r.yaml:4"  # the key's line, not that of the value below it
    items = tree.value["b"].value["d"].value
    assert [str(item.origin) for item in items] == ["r.yaml:7", "r.yaml:8"]
    assert str(items[1].value["e"].origin) == "r.yaml:8"


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n"])
def test_an_empty_document_holds_nothing(text):
    assert read(text) in ({}, None)


def test_a_byte_order_mark_is_no_part_of_the_first_key():
    assert read("\ufeffa: 1") == {"a": 1}


@pytest.mark.parametrize(
    ("text", "line", "parts"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, ["'a' is given twice", "r.yaml:1"]),
        ("a: 1\n'a': 3\n", 2, ["'a' is given twice"]),
        ("b:\n  {c: 1, c: 2}\n", 2, ["'c' is given twice"]),
        ("a: 1\n5: x\n", 2, ["a key has to be text", "the number 5", "quotes"]),
        ("true: x\n", 1, ["a key has to be text", "truth value true"]),
        ("~: x\n", 1, ["a key has to be text", "nothing"]),
        ("? [a, b]\n: x\n", 1, ["a key has to be text", "a list"]),
        ("base: &b {x: 1}\nc:\n  <<: *b\n", 3, ["merge keys (<<)", "extends"]),
        ("a:\n\tb: 1\n", 2, ["not valid YAML", "spaces instead of tabs"]),
        ("a: [1, 2\nb: 3\n", 2, ["not valid YAML", "flow sequence", "begun in line 1"]),
        ("a: 'open\nb: 3\n", 3, ["not valid YAML", "quoted scalar", "begun in line 1"]),
        ("a: b: c\n", 1, ["not valid YAML", "': '", "quotes"]),
        ("a: 1\nb: @x\n", 2, ["not valid YAML", "quotes"]),
        ("a: *missing\n", 1, ["undefined alias 'missing'", "quotes"]),
        ("a: 1\n---\nb: 2\n", 2, ["not valid YAML", "single document", "one recipe a file"]),
        ("a: 1\n\nb: 'x\x00y'\n", 3, ["not valid YAML", "U+0000"]),
        ("a: 1\nb: !!python/object:os.system x\n", 2, ["tag", "python/object", "remove"]),
        ("a: !local x\n", 1, ["tag !local", "remove"]),
        ("a: !!set {x, y}\n", 1, ["tag !!set"]),
        ("a: !!timestamp x\n", 1, ["tag !!timestamp"]),
        ("a: !!int many\n", 1, ["the text 'many'", "!!int"]),
        ("a: !!bool maybe\n", 1, ["the text 'maybe'", "!!bool"]),
        ("a: !!float x\n", 1, ["the text 'x'", "!!float"]),
        ("a: !!omap [x: 1]\n", 1, ["tag !!omap"]),
        pytest.param("a: " + "9" * 5000, 1, ["999", "!!int"], id="long number"),
        pytest.param("a: 0x" + "f" * 5000, 1, ["!!int"], id="long hexadecimal number"),
    ],
)
def test_what_is_refused_says_where_and_what_to_do(text, line, parts):
    message = refusal(text)
    assert message.startswith(f"r.yaml:{line}: ")
    for part in parts:
        assert part in message


def test_anchors_are_read():
    assert read("a: &x {b: [1, 2]}\nc: *x\n") == {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}}


def test_an_anchor_that_grows_without_bound_is_refused_at_once():
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
    started = time.perf_counter()
    assert "more than a recipe can" in refusal(bomb)
    assert time.perf_counter() - started < 10


def test_an_anchor_that_holds_itself_is_refused():
    assert "holds itself" in refusal("a: &x [1, *x]\n")
    assert "holds itself" in refusal("a: &x {b: *x}\n")


@pytest.mark.parametrize("text", ["[" * 100_000, "{a: " * 100_000, "- " * 100_000, "a: " + "[" * MAX_DEPTH + "]" * MAX_DEPTH], ids=len)
def test_depth_is_bounded(text):
    assert f"more than {MAX_DEPTH} deep" in refusal(text)


def test_depth_within_the_bound_is_read():
    deep = MAX_DEPTH - 2
    assert read("a: " + "[" * deep + "]" * deep)["a"] is not None


def test_a_data_file_is_not_read_as_a_recipe():
    assert "is it a data file?" in refusal("x" * (MAX_CHARACTERS + 1))
    assert "is it a data file" in refusal("[" + "1," * MAX_VALUES + "1]")


def test_no_text_makes_the_reader_fail_in_another_way():
    """Whatever a file holds, it is read or refused as a recipe error; anything else would reach the user as a traceback."""
    chance = random.Random(0)
    pieces = [*"a: \n-[]{}'\"#!|>%@?\t1e.\\~,é\ufeff\x07\u2028", "&x", "*x", "!!int", "<<", "0x", "---", "...", "null", "true"]
    read_well = refused = 0
    for _ in range(4000):
        text = "".join(chance.choices(pieces, k=chance.randint(1, 14)))
        try:
            parse_yaml(text, "r.yaml")
            read_well += 1
        except RecipeError as error:
            assert str(error).startswith("r.yaml:"), text
            refused += 1
    assert read_well > 300
    assert refused > 300


AWKWARD = [
    "", " ", "  two", "end ", "off", "on", "yes", "No", "true", "null", "~", "7e-6", "1e5", "1_000", "010", "0x1F",
    "1:30", ".5", "-", "- a", "a: b", "a #b", "#", "*a", "&a", "!a", "%", "@", "`", "?", ": ", "<<", "=", "2026-07-01",
    "'", '"', "\\", "{", "[a", "a,b", "é ü 漢字 🙂", "\ta", "a\tb", "a\n", "a\nb", "\n", "\na", " a\nb", "a\n\n\nb\n\n",
    "a \nb", "a\n b\n  c", "---\n", "...\n", "# words\nreally", "\r", "a\r\nb", "\x85", "\u2028", "\ufeff", "\x00",
    "\x7f", "\x1b[0m", "\ud800", "\U0010ffff", "x" * 500, "word " * 100, "line one\nline two: with a colon\n\t- tab\n",
    "system: answer from the evidence, concisely\n\nquestion: {question}\n",
]  # fmt: skip


@pytest.mark.parametrize("text", AWKWARD)
def test_text_survives_writing_and_reading(text):
    assert read(dump_yaml({"key": text, "list": [text], "map": {"deep": [{"deeper": text}]}})) == {
        "key": text,
        "list": [text],
        "map": {"deep": [{"deeper": text}]},
    }


def test_random_text_survives_writing_and_reading():
    chance = random.Random(1)
    letters = "ab \n:#-'\"\\é🙂\t{}[]|>&*!%@`?,~\x85\u2028\r0e."
    for _ in range(1500):
        value = {"key": "".join(chance.choices(letters, k=chance.randint(0, 30)))}
        assert read(dump_yaml(value)) == value


@pytest.mark.parametrize("number", [7e-6, 1e-8, 1e300, 5e-324, 0.1, 1.0, -0.0, 1e16, 123456789.125, 0, -3, 10**40, math.inf, -math.inf])
def test_numbers_survive_writing_and_reading_with_their_type(number):
    found = read(dump_yaml([number]))[0]
    assert type(found) is type(number)
    assert str(found) == str(number)


def test_keys_that_look_like_something_else_survive():
    value = {"<<": 1, "null": 2, "5": 3, "true": 4, "off": 5, "": 6, "a: b": 7}
    assert read(dump_yaml(value)) == value


def test_what_is_written_is_plain_to_read():
    text = dump_yaml({"lr": 7e-6, "name": "off", "prompt": "one\ntwo\n", "empty": [], "again": [1, 2]})
    assert text == "lr: 7e-06\nname: 'off'\nprompt: |\n  one\n  two\nempty: []\nagain:\n- 1\n- 2\n"


def test_an_older_reader_finds_the_same_text():
    """Text is quoted also where only YAML 1.1 would misread it: other tools open the resolved recipe too."""
    for text in ("off", "yes", "1:30", "2026-07-01", "1_000", "="):
        assert yaml.safe_load(dump_yaml({"key": text})) == {"key": text}


def test_shared_values_are_written_out():
    shared = [1, 2]
    assert "&" not in dump_yaml({"a": shared, "b": shared})


def test_from_plain_and_the_reader_agree():
    value = {"a": 1, "b": [True, None, "x", {"c": 2.5}]}
    assert plain(from_plain(value, "here")) == value == read(dump_yaml(value))

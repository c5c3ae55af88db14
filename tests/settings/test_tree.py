"""Recipe files to one tree: extends, deep merge, overrides; every error names the file and line, or the override, that caused it."""

from __future__ import annotations

import json
import os

import pytest

from stairstep.settings import InputError, RecipeError, apply_overrides, from_plain, load_tree, merge, parse_yaml


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, text, folder="."):
    path = os.path.join(folder, name)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w", encoding="utf-8") as handle:
        handle.write(text)
    return path


def plain(node):
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


def refusal(path):
    with pytest.raises(RecipeError) as caught:
        load_tree(path)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_child_lies_over_its_parent():
    write("base.yaml", "a: 1\nb: {x: 1, y: {p: 1, q: 2}}\nlist: [1, 2, 3]\nkept: yes it is\n")
    write("child.yaml", "extends: base.yaml\nb: {x: 2, y: {q: 3, r: 4}}\nlist: [9]\nnew: null\n")
    tree = load_tree("child.yaml")
    assert plain(tree) == {"a": 1, "b": {"x": 2, "y": {"p": 1, "q": 3, "r": 4}}, "list": [9], "kept": "yes it is", "new": None}
    assert str(tree.value["a"].origin) == "base.yaml:1"
    assert str(tree.value["b"].value["y"].value["p"].origin) == "base.yaml:2"
    assert str(tree.value["b"].value["y"].value["q"].origin) == "child.yaml:2"
    assert str(tree.value["list"].value[0].origin) == "child.yaml:3"


def test_null_replaces_a_mapping_and_a_mapping_replaces_null():
    write("base.yaml", "a: {x: 1}\nb: null\nc: 5\n")
    write("child.yaml", "extends: base.yaml\na: null\nb: {y: 2}\nc: {z: 3}\n")
    assert plain(load_tree("child.yaml")) == {"a": None, "b": {"y": 2}, "c": {"z": 3}}


def test_of_several_parents_the_later_wins_and_the_file_itself_last():
    write("one.yaml", "a: 1\nb: 1\nc: 1\n")
    write("two.yaml", "b: 2\nc: 2\n")
    write("child.yaml", "c: 3\nextends: [one.yaml, two.yaml]\n")
    assert plain(load_tree("child.yaml")) == {"a": 1, "b": 2, "c": 3}
    write("child.yaml", "c: 3\nextends: [two.yaml, one.yaml]\n")
    assert plain(load_tree("child.yaml")) == {"a": 1, "b": 1, "c": 3}


def test_parents_lie_relative_to_the_file_that_names_them(tmp_path, monkeypatch):
    write("recipes/shared/low.yaml", "a: 1\nb: 1\n")
    write("recipes/shared/mid.yaml", "extends: low.yaml\nb: 2\n")
    path = write("recipes/top.yaml", "extends: shared/mid.yaml\n")
    assert plain(load_tree(path)) == {"a": 1, "b": 2}
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert plain(load_tree(tmp_path / path)) == {"a": 1, "b": 2}
    write("absolute.yaml", f"extends: {tmp_path / 'recipes' / 'top.yaml'}\nb: 3\n")
    assert plain(load_tree("absolute.yaml")) == {"a": 1, "b": 3}


def test_two_parents_may_share_theirs():
    write("low.yaml", "a: 1\nb: 1\n")
    write("left.yaml", "extends: low.yaml\na: 2\n")
    write("right.yaml", "extends: low.yaml\nb: 2\n")
    write("top.yaml", "extends: [left.yaml, right.yaml]\n")
    # right brings low's own a along, as it would alone: later wins
    assert plain(load_tree("top.yaml")) == {"a": 1, "b": 2}


def test_a_file_is_read_once_however_many_extend_it():
    write("f0.yaml", "a: 1\n")
    for level in range(1, 18):
        write(f"f{level}.yaml", f"extends: [{', '.join([f'f{level - 1}.yaml'] * 8)}]\n")
    assert plain(load_tree("f17.yaml")) == {"a": 1}  # 8^17 readings otherwise


def test_a_mapping_of_another_kind_replaces_whole():
    write("base.yaml", "loss: {kind: infonce, smoothing: 0.1}\n")
    write("other.yaml", "extends: base.yaml\nloss: {kind: siglip}\n")
    write("same.yaml", "extends: base.yaml\nloss: {kind: infonce, hardness: 2}\n")
    write("silent.yaml", "extends: base.yaml\nloss: {hardness: 2}\n")
    assert plain(load_tree("other.yaml")) == {"loss": {"kind": "siglip"}}
    assert plain(load_tree("same.yaml")) == {"loss": {"kind": "infonce", "smoothing": 0.1, "hardness": 2}}
    assert plain(load_tree("silent.yaml")) == {"loss": {"kind": "infonce", "smoothing": 0.1, "hardness": 2}}


def test_merge_changes_neither_of_its_trees():
    below, above = parse_yaml("a: {x: 1}\n", "b"), parse_yaml("a: {y: 2}\n", "a")
    assert plain(merge(below, above)) == {"a": {"x": 1, "y": 2}}
    assert (plain(below), plain(above)) == ({"a": {"x": 1}}, {"a": {"y": 2}})


def test_a_circle_is_named():
    write("a.yaml", "extends: b.yaml\n")
    write("b.yaml", "x: 1\nextends: [c.yaml]\n")
    write("c.yaml", "\nextends: a.yaml\n")
    message = refusal("a.yaml")
    assert message.startswith("c.yaml:2: extends: ")
    order = [message.index(f"{name}.yaml", message.index("circle")) for name in "abc"]
    assert order == sorted(order)
    assert message.count("a.yaml") == 2
    assert "remove one" in message
    write("self.yaml", "extends: ./self.yaml\n")
    assert "circle" in refusal("self.yaml")


def test_a_circle_through_a_symbolic_link_is_found():
    write("a.yaml", "extends: link.yaml\n")
    os.symlink("a.yaml", "link.yaml")
    assert "circle" in refusal("a.yaml")
    os.symlink("loop.yaml", "loop.yaml")
    assert "loop.yaml" in refusal("loop.yaml")


def test_a_long_chain_is_refused():
    write("f0.yaml", "a: 1\n")
    for level in range(1, 200):
        write(f"f{level}.yaml", f"extends: f{level - 1}.yaml\n")
    assert "levels" in refusal("f199.yaml")


def test_a_missing_parent_names_who_extends_it():
    write("recipes/base.yaml", "a: 1\n")
    write("recipes/child.yaml", "a: 2\nextends:\n  - base.yaml\n  - bass.yaml\n")
    message = refusal("recipes/child.yaml")
    assert message.startswith("recipes/child.yaml:4: extends: recipes/bass.yaml: there is no such recipe")
    assert "did you mean recipes/base.yaml?" in message


def test_a_missing_recipe_names_the_nearest():
    write("recipes/tinywiki.yaml", "a: 1\n")
    assert refusal("recipes/tinywki.yaml") == "recipes/tinywki.yaml: there is no such recipe; did you mean recipes/tinywiki.yaml?"
    assert refusal("recipe/tinywiki.yaml") == "recipe/tinywiki.yaml: there is no such recipe, nor a folder recipe"
    assert "did you mean" not in refusal("recipes/completely-different.yaml")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("extends: 5\n", "the number 5"),
        ("extends:\n", "nothing"),
        ("extends: {a: b}\n", "a mapping"),
        ("extends: [a.yaml, 5]\n", "the number 5"),
        ("extends: ''\n", "the text ''"),
    ],
)
def test_extends_takes_a_file_or_a_list_of_files(text, found):
    write("a.yaml", "x: 1\n")
    write("r.yaml", "x: 1\n" + text)
    message = refusal("r.yaml")
    assert message.startswith("r.yaml:2: extends: expected a file or a list of files")
    assert found in message


def test_an_empty_list_of_parents_is_no_parent():
    write("r.yaml", "extends: []\nx: 1\n")
    assert plain(load_tree("r.yaml")) == {"x": 1}


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "---\n", "{}"])
def test_an_empty_recipe_says_nothing(text):
    write("r.yaml", text)
    assert plain(load_tree("r.yaml")) == {}


@pytest.mark.parametrize(("text", "found"), [("- a\n", "a list"), ("just words\n", "the text 'just words'"), ("7\n", "the number 7")])
def test_a_recipe_is_a_mapping(text, found):
    write("base.yaml", "\n" + text)
    write("r.yaml", "extends: base.yaml\n")
    assert refusal("r.yaml") == f"base.yaml:2: a recipe is a mapping of keys, found {found}"


def test_broken_yaml_in_a_parent_names_that_file():
    write("base.yaml", "a: 1\nb: [1\n")
    write("r.yaml", "extends: base.yaml\n")
    assert refusal("r.yaml").startswith("base.yaml:3: this is not valid YAML")


def test_what_is_not_a_text_file_is_told():
    os.mkdir("folder.yaml")
    assert refusal("folder.yaml") == "folder.yaml: this is a folder; name a recipe file in it"
    with open("latin.yaml", "wb") as handle:
        handle.write("a: 1\nname: café\n".encode("latin-1"))
    assert refusal("latin.yaml").startswith("latin.yaml:2: this is not text in UTF-8")
    with open("wide.yaml", "wb") as handle:
        handle.write("a: 1\n".encode("utf-16"))
    assert "UTF-8" in refusal("wide.yaml")
    with open("data.bin", "wb") as handle:
        handle.write(b"a" * 5_000_000)
    assert "is it a data file?" in refusal("data.bin")
    write("under.yaml/nested.yaml", "a: 1\n")
    write("file.yaml", "a: 1\n")
    assert "file.yaml/x.yaml" in refusal("file.yaml/x.yaml")
    assert "cannot be read" in refusal("x" * 5000)
    write("null.yaml", 'extends: "a\\0b"\n')
    assert refusal("null.yaml").startswith("null.yaml:1: extends: ")


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs a file without an end")
def test_a_file_without_an_end_is_left():
    assert "data file" in refusal("/dev/zero")


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="the superuser may read everything")
def test_a_file_that_may_not_be_read():
    write("secret.yaml", "a: 1\n")
    os.chmod("secret.yaml", 0)
    assert refusal("secret.yaml") == "secret.yaml: this recipe cannot be read: Permission denied"


def test_windows_line_ends_and_a_byte_order_mark_are_read():
    with open("dos.yaml", "wb") as handle:
        handle.write(b"\xef\xbb\xbfa: 1\r\nb:\r\n  c: x\r\n")
    tree = load_tree("dos.yaml")
    assert plain(tree) == {"a": 1, "b": {"c": "x"}}
    assert str(tree.value["b"].value["c"].origin) == "dos.yaml:3"


# --- overrides


def override(*overrides, text="a: 1\nb: {x: 1, y: 2}\nlist: [1, 2]\n"):
    return apply_overrides(parse_yaml(text, "r.yaml"), overrides)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a=2", {"a": 2}),
        ("a=7e-6", {"a": 7e-6}),
        ("a=off", {"a": "off"}),
        ("a=true", {"a": True}),
        ("a='true'", {"a": "true"}),
        ('a="2024"', {"a": "2024"}),
        ("a=null", {"a": None}),
        ("a=~", {"a": None}),
        ("a=", {"a": None}),
        ("a=  ", {"a": None}),
        ("a=# nothing", {"a": None}),
        ("a=''", {"a": ""}),
        ("a=x=y", {"a": "x=y"}),
        ("a=[1, two, {c: 3}]", {"a": [1, "two", {"c": 3}]}),
        ("list=[]", {"list": []}),
        ("list=[5]", {"list": [5]}),
        ("b={x: 5, z: 6}", {"b": {"x": 5, "y": 2, "z": 6}}),
        ("b.x=5", {"b": {"x": 5, "y": 2}}),
        ("b=null", {"b": None}),
        (" b.x = 5", {"b": {"x": 5, "y": 2}}),
        ("new.deep.key=[a]", {"new": {"deep": {"key": ["a"]}}}),
        ("b.with-dash_9=1", {"b": {"x": 1, "y": 2, "with-dash_9": 1}}),
        ("a=some words, no quotes", {"a": "some words, no quotes"}),
        ("a=C:/x", {"a": "C:/x"}),
    ],
)
def test_an_override_is_laid_over_the_tree(given, expected):
    assert plain(override(given)) == {"a": 1, "b": {"x": 1, "y": 2}, "list": [1, 2]} | expected


def test_later_overrides_win():
    assert plain(override("a=2", "b.x=3", "a=4", "b.x=5"))["a"] == 4
    assert plain(override("a=2", "b.x=3", "a=4", "b.x=5"))["b"] == {"x": 5, "y": 2}
    assert plain(override()) == plain(override("a=1"))


def test_an_overridden_value_comes_from_its_override_and_the_rest_from_the_file():
    tree = override("b.x=[1, 2]")
    assert str(tree.value["b"].value["x"].origin) == "override b.x=[1, 2]"
    assert str(tree.value["b"].value["x"].value[1].origin) == "override b.x=[1, 2]"
    assert str(tree.value["b"].value["y"].origin) == "r.yaml:2"
    assert str(tree.value["b"].origin) == "r.yaml:2"
    assert str(tree.origin) == "r.yaml:1"


def test_an_option_given_before_its_kind_is_not_lost():
    text = "loss: {kind: infonce, smoothing: 0.1}\n"
    one = override("loss.bias=-5", "loss.kind=siglip", text=text)
    other = override("loss.kind=siglip", "loss.bias=-5", text=text)
    assert plain(one) == plain(other) == {"loss": {"kind": "siglip", "bias": -5}}


@pytest.mark.parametrize("given", ["a", "=5", "a..b=1", ".a=1", "a.=1", "--a=1", "a b=1", "+a=1", "a:1", ""])
def test_what_is_no_override_is_told(given):
    with pytest.raises(InputError) as caught:
        override(given)
    assert str(caught.value).startswith(f"'{given}': expected an override of the form key.path=value")


@pytest.mark.parametrize("given", ["list[0]=5", "list.0=5", "list.0.x=5"])
def test_an_item_of_a_list_cannot_be_overridden_alone(given):
    with pytest.raises(InputError, match="a list is given whole"):
        override(given)


@pytest.mark.parametrize("given", ["a=[1", "a=b: c: d", "a='open", "a=@x", "a=*x", "a={x: 1, x: 2}", "a=!x y", "a=<<: b", "a=\x00"])
def test_a_value_that_is_not_yaml_names_the_override(given):
    with pytest.raises(InputError) as caught:
        override(given)
    assert str(caught.value).startswith(f"override {given}: ")


def test_extends_is_not_overridden():
    with pytest.raises(InputError, match="`extends` belongs in a recipe file"):
        override("extends=other.yaml")


@pytest.mark.parametrize(
    "value", [1, 7e-6, 1e-08, True, None, "off", "1e5", "null", "a: b", "é🙂", "two\nlines", [1, "x", None], {"k": ["off"]}]
)
def test_a_command_line_a_file_and_a_program_say_the_same(value):
    """A sweep hands values over from a program, a person types them: both go through the same tree."""
    typed = override("b.x=" + json.dumps(value, ensure_ascii=False), text="a: 1\n")
    handed = merge(parse_yaml("a: 1\n", "r.yaml"), from_plain({"b": {"x": value}}, "trial 3"))
    write("file.yaml", "a: 1\nb:\n  x: " + json.dumps(value, ensure_ascii=False) + "\n")
    assert plain(typed) == plain(handed) == plain(load_tree("file.yaml")) == {"a": 1, "b": {"x": value}}


def test_an_override_is_repeated_without_the_secrets_in_it():
    tree = apply_overrides(from_plain({}, "r.yaml"), ["a=s3://ID:hunter2@b/c?session_token=hunter2&region=x", "b=http://h:1/v1?k=2"])
    told = " ".join(str(node.origin) for node in tree.value.values())
    assert "hunter2" not in told
    assert "override a=s3://…@b/c?session_token=…&region=x" in told
    assert "override b=http://h:1/v1?k=2" in told

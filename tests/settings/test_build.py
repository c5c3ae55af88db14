"""The strict builder: what it accepts, and that each refusal names the key, the place and what was expected.

The exact texts are asserted: they are what a person reads at the terminal.
"""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass
from typing import Literal

import pytest

from stairstep.settings import (
    InputError,
    RecipeError,
    SettingError,
    apply_overrides,
    build,
    from_plain,
    load_tree,
    parse_yaml,
    setting,
    to_plain,
    to_yaml,
)


@dataclass(frozen=True)
class Infonce:
    kind: Literal["infonce"] = setting("infonce", doc="Softmax.")
    smoothing: float = setting(0.0, doc="Smoothing.", minimum=0, below=1)


@dataclass(frozen=True)
class Siglip:
    kind: Literal["siglip"] = setting("siglip", doc="Sigmoid.")
    bias: float = setting(-10.0, doc="Bias.")


@dataclass(frozen=True)
class Schedule:
    warmup: int = setting(0, doc="Warmup.", minimum=0)
    floor: float = setting(0.0, doc="Floor.", minimum=0, maximum=1)

    def check(self):
        if self.floor == 0.5:
            raise SettingError("floor", "a half is refused")


@dataclass(frozen=True)
class Source:
    path: str = setting(doc="A file.")
    limit: int | None = setting(None, doc="Limit.", minimum=1)

    def check(self):
        if self.path == "bad":
            raise SettingError("path", "this path is bad")


@dataclass(frozen=True)
class Everything:
    name: str = setting(doc="Name of the run.")
    steps: int = setting(350, doc="Steps.", minimum=1)
    rate: float = setting(7e-6, doc="Rate.", above=0)
    momentum: float = setting(0.9, doc="Momentum.", minimum=0, below=1)
    share: float | None = setting(None, doc="Share.", above=0, maximum=1)
    flag: bool = setting(False, doc="Flag.")
    mode: Literal["auto", "off", 3] = setting("auto", doc="Mode.")
    keep: int | Literal["auto"] = setting(0, doc="MiB.", minimum=0)
    either: int | str = setting(0, doc="Either.", minimum=0)
    rows: bool | tuple[str, ...] = setting(False, doc="Rows.")
    shares: tuple[float, ...] = setting((), doc="Shares.", minimum=0, maximum=1)
    betas: tuple[float, float] = setting((0.9, 0.999), doc="Betas.")
    grid: tuple[tuple[int, ...], ...] = setting((), doc="Grid.", minimum=0)
    resources: dict[str, float] = setting(doc="Resources.", factory=dict, minimum=0)
    named: dict[str, Source] = setting(doc="Sources by name.", factory=dict)
    schedule: Schedule = setting(doc="Schedule.", factory=Schedule)
    sources: tuple[Source, ...] = setting((), doc="Sources.")
    loss: Infonce | Siglip = setting(doc="Loss.", factory=Infonce)
    second: Siglip | Infonce = setting(doc="Another loss.", factory=Infonce)
    reader: Infonce | Siglip | None = setting(None, doc="Reader.")
    only: Siglip | None = setting(None, doc="One kind.")
    losses: tuple[Infonce | Siglip, ...] = setting((), doc="Losses.")

    def check(self):
        if self.schedule.warmup > self.steps:
            raise SettingError("schedule.warmup", f"{self.schedule.warmup} is more than steps ({self.steps})")
        if self.sources and self.sources[-1].limit == 13:
            raise SettingError(f"sources[{len(self.sources) - 1}].limit", "no such luck")
        if self.name == "nothing":
            raise SettingError("", "this recipe does nothing")


@dataclass(frozen=True)
class Inner:
    steps: int = setting(10, doc="Steps.")
    warmup: int = setting(20, doc="Warmup.")

    def check(self):
        if self.warmup > self.steps:
            raise SettingError("warmup", "too long")


@dataclass(frozen=True)
class Outer:
    inner: Inner = setting(doc="Inner.", factory=Inner)


def make(text="", *overrides):
    return build(Everything, apply_overrides(parse_yaml("name: n\n" + text, "r.yaml"), overrides))


def refusal(text="", *overrides):
    with pytest.raises(RecipeError) as caught:
        make(text, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_left_out_is_the_default():
    assert make() == Everything(name="n")


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("steps: 1", "steps", 1),
        ("rate: 7e-6", "rate", 7e-6),
        ("rate: 1", "rate", 1.0),
        ("momentum: 0", "momentum", 0.0),
        ("share: 1", "share", 1.0),
        ("share: null", "share", None),
        ("share:", "share", None),
        ("flag: true", "flag", True),
        ("mode: off", "mode", "off"),
        ("mode: 3", "mode", 3),
        ("keep: auto", "keep", "auto"),
        ("keep: 7", "keep", 7),
        ("either: 7", "either", 7),
        ("either: seven", "either", "seven"),
        ("rows: true", "rows", True),
        ("rows: [a, b]", "rows", ("a", "b")),
        ("rows: []", "rows", ()),
        ("shares: [1, 0.5, 0]", "shares", (1.0, 0.5, 0.0)),
        ("betas: [0, 1]", "betas", (0.0, 1.0)),
        ("grid: [[1, 2], []]", "grid", ((1, 2), ())),
        ("resources: {gpu: 1, big.one: 0.5}", "resources", {"gpu": 1.0, "big.one": 0.5}),
        ("named: {a: {path: p}}", "named", {"a": Source("p")}),
        ("schedule: {}", "schedule", Schedule()),
        ("schedule: {warmup: 5}", "schedule", Schedule(warmup=5)),
        ("sources: [{path: p}, {path: q, limit: 3}]", "sources", (Source("p"), Source("q", 3))),
        ("loss: {kind: siglip, bias: -5}", "loss", Siglip(bias=-5.0)),
        ("loss: {kind: infonce}", "loss", Infonce()),
        ("loss: {smoothing: 0.1}", "loss", Infonce(smoothing=0.1)),
        ("second: {smoothing: 0.1}", "second", Infonce(smoothing=0.1)),  # the default's kind, not the first one listed
        ("reader: {kind: siglip}", "reader", Siglip()),
        ("reader: null", "reader", None),
        ("only: {bias: 1}", "only", Siglip(bias=1.0)),
        ("losses: [{kind: siglip}, {kind: infonce, smoothing: 0.5}]", "losses", (Siglip(), Infonce(smoothing=0.5))),
    ],
)
def test_what_is_accepted(text, field, value):
    found = getattr(make(text), field)
    assert found == value
    assert repr(found) == repr(value)  # 1 is not 1.0, nor True


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # ranges, said as such
        ("steps: 0", "steps: expected a whole number at least 1, found the number 0"),
        ("rate: 0", "rate: expected a number above 0, found the number 0"),
        ("rate: -1e-6", "rate: expected a number above 0, found the number -1e-06"),
        ("momentum: 1", "momentum: expected a number at least 0 and below 1, found the number 1"),
        ("share: 0", "share: expected a number above 0 and at most 1 or null, found the number 0"),
        ("share: 1.01", "share: expected a number above 0 and at most 1 or null, found the number 1.01"),
        ("keep: -1", "keep: expected a whole number at least 0 or 'auto', found the number -1"),
        ("shares: [0.5, 2]", "shares[1]: expected a number at least 0 and at most 1, found the number 2"),
        ("grid: [[1], [2, -3]]", "grid[1][1]: expected a whole number at least 0, found the number -3"),
        ("resources: {gpu: -1}", "resources.gpu: expected a number at least 0, found the number -1"),
        ("schedule: {floor: 2}", "schedule.floor: expected a number at least 0 and at most 1, found the number 2"),
        ("sources: [{path: p, limit: 0}]", "sources[0].limit: expected a whole number at least 1 or null, found the number 0"),
        ("losses: [{kind: infonce, smoothing: 1}]", "losses[0].smoothing: expected a number at least 0 and below 1, found the number 1"),
        # types
        ("steps: 1.0", "steps: expected a whole number at least 1, found the number 1.0"),
        ("steps: 1e3", "steps: expected a whole number at least 1, found the number 1000.0"),
        ("steps: true", "steps: expected a whole number at least 1, found the truth value true"),
        ("steps: '5'", "steps: expected a whole number at least 1, found the text '5'"),
        ("steps: 1_000", "steps: expected a whole number at least 1, found the text '1_000'"),
        ("steps: null", "steps: expected a whole number at least 1, found nothing (null)"),
        ("steps: [5]", "steps: expected a whole number at least 1, found a list"),
        ("steps: {a: 5}", "steps: expected a whole number at least 1, found a mapping"),
        ("rate: true", "rate: expected a number above 0, found the truth value true"),
        ("rate: .inf", "rate: expected a number above 0, found the number inf"),
        ("rate: .nan", "rate: expected a number above 0, found the number nan"),
        ("rate: 1e999", "rate: expected a number above 0, found the number inf"),
        ("rate: 7e-6x", "rate: expected a number above 0, found the text '7e-6x'"),
        ("flag: 1", "flag: expected true or false, found the number 1"),
        ("flag: off", "flag: expected true or false, found the text 'off'"),
        ("flag: null", "flag: expected true or false, found nothing (null)"),
        ("mode: on", "mode: expected 'auto' or 'off' or 3, found the text 'on'"),
        ("mode: 3.0", "mode: expected 'auto' or 'off' or 3, found the number 3.0"),
        ("mode: false", "mode: expected 'auto' or 'off' or 3, found the truth value false"),
        ("keep: often", "keep: expected a whole number at least 0 or 'auto', found the text 'often'"),
        ("rows: a", "rows: expected true or false or a list (each item: text), found the text 'a'"),
        ("rows: [a, 5]", "rows[1]: expected text, found the number 5; put it in quotes to make it text"),
        ("shares: 0.5", "shares: expected a list (each item: a number at least 0 and at most 1), found the number 0.5"),
        ("betas: [0.9]", "betas: expected a list of 2 (each item: a number), found a list"),
        ("grid: [1]", "grid[0]: expected a list (each item: a whole number at least 0), found the number 1"),
        ("resources: [gpu]", "resources: expected a mapping (each value: a number at least 0), found a list"),
        ("resources: {gpu: many}", "resources.gpu: expected a number at least 0, found the text 'many'"),
        ("schedule: 5", "schedule: expected a mapping, found the number 5"),
        ("schedule:", "schedule: expected a mapping, found nothing (null)"),
        ("sources: {path: p}", "sources: expected a list (each item: a mapping), found a mapping"),
        ("sources: [p]", "sources[0]: expected a mapping, found the text 'p'"),
        ("loss: siglip", "loss: expected a mapping with kind infonce or a mapping with kind siglip, found the text 'siglip'"),
        ("reader: 5", "reader: expected a mapping with kind infonce or a mapping with kind siglip or null, found the number 5"),
        # kinds
        ("reader: {smoothing: 0.1}", "reader.kind: this key is required ('infonce' or 'siglip')"),
        ("losses: [{smoothing: 0.1}]", "losses[0].kind: this key is required ('infonce' or 'siglip')"),
        ("only: {kind: infonce}", "only.kind: expected 'siglip', found the text 'infonce'"),
        # required keys
        ("sources: [{limit: 5}]", "sources[0].path: this key is required (A file.)"),
        ("named: {x: {}}", "named.x.path: this key is required (A file.)"),
    ],
)
def test_what_is_refused(text, message):
    assert refusal(text) == f"r.yaml:2: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 5", "unknown key 'stepz'; did you mean 'steps'?"),
        ("schedule: {warm_up: 5}", "unknown key 'schedule.warm_up'; did you mean 'schedule.warmup'?"),
        ("sources: [{path: p}, {path: q, limits: 3}]", "unknown key 'sources[1].limits'; did you mean 'sources[1].limit'?"),
        ("named: {a: {paht: p}}", "unknown key 'named.a.paht'; did you mean 'named.a.path'?"),
        ("loss: {kind: infonce, smothing: 1}", "unknown key 'loss.smothing' where kind is infonce; did you mean 'loss.smoothing'?"),
        ("loss: {smothing: 1}", "unknown key 'loss.smothing'; did you mean 'loss.smoothing'?"),
        ("loss: {kind: siglip, smoothing: 0}", "unknown key 'loss.smoothing' where kind is siglip; known here: bias, kind"),
        ("losses: [{kind: siglip, bais: 0}]", "unknown key 'losses[0].bais' where kind is siglip; did you mean 'losses[0].bias'?"),
        ("warmup: 5", "unknown key 'warmup'; did you mean 'schedule.warmup'?"),  # the same name one level down
        ("smoothing: 5", "unknown key 'smoothing'; did you mean 'loss.smoothing'?"),
        ("schedule: {q: 5}", "unknown key 'schedule.q'; known here: floor, warmup"),
        ("schedule: {extends: base.yaml}", "unknown key 'schedule.extends'; known here: floor, warmup"),
    ],
)
def test_an_unknown_key_names_the_nearest(text, message):
    assert refusal(text) == f"r.yaml:2: {message}"


def test_an_unknown_kind_lists_the_known_ones():
    assert refusal("loss:\n  kind: siglib\n") == (
        "r.yaml:3: loss.kind: expected 'infonce' or 'siglip', found the text 'siglib'; did you mean 'siglip'?"
    )
    assert refusal("losses:\n  - {kind: 7}\n") == "r.yaml:3: losses[0].kind: expected 'infonce' or 'siglip', found the number 7"
    assert refusal("reader: {kind: [siglip]}") == "r.yaml:2: reader.kind: expected 'infonce' or 'siglip', found a list"
    assert refusal("reader: {kind: null}") == "r.yaml:2: reader.kind: expected 'infonce' or 'siglip', found nothing (null)"


def test_a_key_that_is_required_points_at_the_mapping_that_lacks_it():
    with pytest.raises(RecipeError) as caught:
        build(Everything, parse_yaml("\nsteps: 5\n", "r.yaml"))
    assert str(caught.value) == "r.yaml:2: name: this key is required (Name of the run.)"
    with pytest.raises(RecipeError) as caught:
        build(Everything, apply_overrides(parse_yaml("\nsteps: 5\n", "r.yaml"), ["steps=6"]))
    assert str(caught.value) == "r.yaml:2: name: this key is required (Name of the run.)"
    with pytest.raises(RecipeError, match="name: this key is required"):
        build(Everything, parse_yaml("", "r.yaml"))


def test_text_that_yaml_reads_as_a_number_says_how_to_write_it():
    with pytest.raises(RecipeError) as caught:
        build(Everything, parse_yaml("name: 2024\n", "r.yaml"))
    assert str(caught.value) == "r.yaml:1: name: expected text, found the number 2024; put it in quotes to make it text"
    assert build(Everything, parse_yaml("name: '2024'\n", "r.yaml")).name == "2024"


def test_numbers_too_large_for_a_float_are_refused():
    assert "rate: expected a number above 0, found the number 1000" in refusal("rate: 1" + "0" * 400)


def test_large_limits_are_said_in_full():
    @dataclass(frozen=True)
    class Large:
        pixels: int = setting(1, doc="Pixels.", minimum=1, maximum=123456789)

    with pytest.raises(RecipeError, match="a whole number at least 1 and at most 123456789, found the number 0"):
        build(Large, from_plain({"pixels": 0}, "here"))


# --- where errors point


def test_an_error_names_the_line_of_the_key():
    text = "steps: 5\nschedule:\n  # a comment\n  warmup: 1\n\n  floor:\n    7\nsources:\n  - path: p\n  - path: q\n    limit: 0\n"
    assert refusal(text).startswith("r.yaml:7: schedule.floor: ")
    assert refusal(text.replace("    7", "    1")).startswith("r.yaml:12: sources[1].limit: ")


def test_a_check_points_at_its_key():
    assert refusal("schedule:\n  warmup: 3\n  floor: 0.5\n") == "r.yaml:4: schedule.floor: a half is refused"
    assert refusal("sources:\n  - path: p\n  - path: bad\n") == "r.yaml:4: sources[1].path: this path is bad"
    assert refusal("named:\n  a:\n    path: bad\n") == "r.yaml:4: named.a.path: this path is bad"
    assert refusal("sources:\n  - path: p\n    limit: 13\n") == "r.yaml:4: sources[0].limit: no such luck"


def test_a_check_of_a_key_that_nobody_wrote_points_at_the_mapping():
    assert refusal("steps: 5\nschedule:\n  warmup: 6\n") == "r.yaml:4: schedule.warmup: 6 is more than steps (5)"
    with pytest.raises(RecipeError) as caught:
        build(Everything, parse_yaml("\nname: nothing\n", "r.yaml"))
    assert str(caught.value) == "r.yaml:2: recipe: this recipe does nothing"


def test_a_check_names_the_override_that_broke_the_other_key():
    assert refusal("schedule:\n  warmup: 6\n", "steps=5") == ("r.yaml:3: schedule.warmup: 6 is more than steps (5) (with override steps=5)")
    assert refusal("steps: 5\n", "schedule.warmup=6") == "override schedule.warmup=6: schedule.warmup: 6 is more than steps (5)"


def test_a_default_is_as_bad_as_a_written_value_for_a_check():
    with pytest.raises(RecipeError, match=r"^here: inner\.warmup: too long$"):
        build(Outer, from_plain({"inner": {}}, "here"))


def test_an_error_in_an_extended_file_names_that_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text("name: n\n\nsteps: 0\nschedule:\n  warmup: 1\n  flor: 2\n")
    (tmp_path / "child.yaml").write_text("extends: base.yaml\nschedule:\n  warmup: 2\n")
    (tmp_path / "mended.yaml").write_text("extends: child.yaml\nsteps: 5\n")

    def message(path, *overrides):
        with pytest.raises(InputError) as caught:
            build(Everything, apply_overrides(load_tree(path), overrides))
        return str(caught.value)

    assert message("child.yaml").startswith("base.yaml:3: steps: ")
    assert message("mended.yaml") == "base.yaml:6: unknown key 'schedule.flor'; did you mean 'schedule.floor'?"
    assert message("mended.yaml", "steps=0") == "override steps=0: steps: expected a whole number at least 1, found the number 0"
    assert message("mended.yaml", "stepz=1") == "override stepz=1: unknown key 'stepz'; did you mean 'steps'?"
    (tmp_path / "good.yaml").write_text("name: n\nschedule:\n  floor: 1\n")
    assert message("good.yaml", "schedule.floor.x=1").startswith("override schedule.floor.x=1: schedule.floor: expected a number")
    assert message("good.yaml", "loss={kind: siglib}").startswith("override loss={kind: siglib}: loss.kind: ")


def test_a_kind_that_is_overridden_takes_its_own_options_only():
    text = "loss: {kind: infonce, smoothing: 0.1}\n"
    assert make(text, "loss.kind=siglip").loss == Siglip()
    assert make(text, "loss.bias=-3", "loss.kind=siglip").loss == Siglip(bias=-3.0)
    assert "where kind is infonce" in refusal(text, "loss.bias=-3")


# --- purity, classes that are wrong themselves


def test_settings_are_frozen_and_building_changes_nothing():
    tree = parse_yaml("name: n\nshares: [0.5]\nresources: {gpu: 1}\n", "r.yaml")
    before = repr(tree)
    first = build(Everything, tree)
    with pytest.raises(FrozenInstanceError):
        first.steps = 5  # type: ignore[misc]
    first.resources["gpu"] = 99
    assert repr(tree) == before
    assert build(Everything, tree).resources == {"gpu": 1.0}
    assert make().resources is not make().resources


def test_a_default_outside_of_its_range_cannot_be_declared():
    for default in (0, (1.0, 0.0)):
        with pytest.raises(TypeError, match="outside of its own range"):
            setting(default, doc="x", above=0)
    setting(False, doc="a truth value has no range", minimum=1)
    setting(None, doc="nothing neither", minimum=1)


@pytest.mark.parametrize(
    "hint", [list[int], tuple[int, str], dict[int, str], complex, set[str], Infonce | Schedule, Infonce | type("Infonce2", (Infonce,), {})]
)
def test_a_class_with_a_type_that_nobody_understands_is_a_defect(hint):
    cls = dataclass(frozen=True)(type("Odd", (), {"__annotations__": {"key": hint}, "key": setting(None, doc="x")}))
    for value in ("text", ["a"], {"a": "b"}):
        with pytest.raises(TypeError):
            build(cls, from_plain({"key": value}, "here"))
            pytest.fail(f"{value} was accepted for {hint}")


# --- round trip


FULL = """
name: 'off'
steps: 7
rate: 7e-6
momentum: 1e-08
share: 0.1
flag: true
mode: off
keep: auto
either: '1e5'
rows: ['null', 'true', '7e-6', "é 漢字 🙂", "two\\nlines\\n", '']
shares: [0, 1e-5, 0.30000000000000004, 1]
betas: [0, 1]
grid: [[1, 2], []]
resources: {'1': 2, 'null': 0.5, 'a.b': 1e-12}
named: {'off': {path: '- x: y'}}
schedule: {warmup: 3, floor: 1}
sources: [{path: '~', limit: 3}, {path: '2026-07-01'}]
loss: {kind: siglip, bias: -1.5e+300}
reader: {kind: infonce}
losses: [{kind: siglip}, {kind: infonce, smoothing: 0.5}]
"""


def test_settings_survive_yaml():
    first = build(Everything, parse_yaml(FULL, "r.yaml"))
    assert first.rows[0] == "null"  # the sample holds the awkward cases
    text = to_yaml(first)
    second = build(Everything, parse_yaml(text, "again.yaml"))
    assert second == first
    assert repr(second) == repr(first)
    assert to_yaml(second) == text
    assert build(Everything, parse_yaml(to_yaml(make()), "again.yaml")) == make()


def test_settings_survive_plain_values():
    first = build(Everything, parse_yaml(FULL, "r.yaml"))
    assert build(Everything, from_plain(to_plain(first), "here")) == first


def test_every_key_is_written_in_the_order_of_its_declaration():
    assert list(to_plain(make()))[:3] == ["name", "steps", "rate"]
    assert list(to_plain(make())) == list(Everything.__dataclass_fields__)
    assert to_yaml(make()).startswith("name: n\nsteps: 350\nrate: 7e-06\n")

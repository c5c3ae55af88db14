"""Trees to settings and back: the one strict builder behind files, command lines and sweep trials.

Building is pure: it reads nothing but the tree, and what it returns is valid. Every error names the key, the file and the line, and says
what was expected; an unknown key names the nearest one that exists.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from .errors import RecipeError
from .fields import SettingError, inside
from .hints import classes_of, expected, items_of, keys_below, kinds_of, options_of, values_of
from .nodes import Node, describe
from .yaml_text import dump_yaml

T = TypeVar("T")


def build(cls: type[T], tree: Node, key: str = "") -> T:
    """An instance of the settings class `cls` from a tree; `key` is the dotted place of the tree in the recipe."""
    if not isinstance(tree.value, Mapping):
        raise RecipeError(f"{tree.origin}: {key or 'recipe'}: expected a mapping of keys, found {describe(tree.value)}")
    hints = get_type_hints(cls)
    fields = {one.name: one for one in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name, child in tree.value.items():
        if name not in fields:
            raise RecipeError(f"{child.origin}: unknown key '{_join(key, name)}'{_nearest(name, cls, key, tree)}")
    values: dict[str, Any] = {}
    for name, one in fields.items():
        if name in tree.value:
            values[name] = _value(hints[name], tree.value[name], _join(key, name), one.metadata.get("bounds", {}), _default(one))
        elif one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
            raise RecipeError(f"{tree.origin}: {_join(key, name)}: this key is required ({one.metadata.get('doc', '')})")
    instance = cls(**values)
    if callable(getattr(cls, "check", None)):
        try:
            instance.check()  # type: ignore[attr-defined]
        except SettingError as error:
            raise RecipeError(_checked(error, tree, key)) from None
    return instance


def _default(one: dataclasses.Field[Any]) -> Any:
    return one.default_factory() if one.default_factory is not dataclasses.MISSING else one.default


def _join(key: str, name: str) -> str:
    return ".".join(part for part in (key, name) if part)


def _nearest(name: str, cls: Any, key: str, tree: Node) -> str:
    """What a person may have meant by an unknown key: the same name further down, a like name here, or else one of these."""
    known = [one.name for one in dataclasses.fields(cls)]
    kind = tree.value["kind"].value if "kind" in known and "kind" in tree.value else None
    where = f" where kind is {kind}" if isinstance(kind, str) else ""
    below = [dotted for dotted in keys_below(cls) if dotted.endswith(f".{name}")]
    close = below[:1] or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"{where}; did you mean '{_join(key, close[0])}'?"
    return f"{where}; known here: " + (", ".join(sorted(known)) or "no key at all")


def _checked(error: SettingError, tree: Node, key: str) -> str:
    """The message of a class's own check, at the line of the key that it names or else of the innermost mapping around it.

    What a check refuses is often two keys together, and an override of the other one may be to blame: overrides are named as well.
    """
    node = tree
    for name, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", error.key):
        if isinstance(node.value, Mapping) and name in node.value:
            node = node.value[name]
        elif isinstance(node.value, list) and index and int(index) < len(node.value):
            node = node.value[int(index)]
        else:
            break
    others = [source for source in _without_line(tree) if source != node.origin.source]
    beside = f" (with {'; '.join(dict.fromkeys(others))})" if others else ""
    return f"{node.origin}: {_join(key, error.key) or 'recipe'}: {error.message}{beside}"


def _without_line(node: Node) -> Iterator[str]:
    """Where the values below a node come from that no file holds; a list is one value, as it is replaced whole."""
    if isinstance(node.value, Mapping):
        for child in node.value.values():
            yield from _without_line(child)
    elif node.origin.line is None:
        yield node.origin.source


def _value(hint: Any, node: Node, key: str, bounds: Mapping[str, float], default: Any = None) -> Any:
    """The value of one key; `default` is its field's default, which says the kind of a mapping that says none."""
    classes = classes_of(hint)
    if classes and isinstance(node.value, Mapping):
        return build(_class_for(classes, node, key, default), node, key)
    for option in options_of(hint):
        matched, value = _match(option, node, key, bounds)
        if matched:
            return value
    quotes = "; put it in quotes to make it text" if str in options_of(hint) and isinstance(node.value, int | float) else ""
    raise RecipeError(f"{node.origin}: {key}: expected {expected(hint, bounds)}, found {describe(node.value)}{quotes}")


def _class_for(classes: Sequence[Any], node: Node, key: str, default: Any) -> Any:
    """Which of the settings classes a mapping is for: the only one, the one of its `kind`, or without a `kind` the default's."""
    if len(classes) == 1:
        return classes[0]
    by_kind = {kind: one for one in classes for kind in kinds_of(one)}
    known = " or ".join(f"'{kind}'" for kind in by_kind)
    if "kind" not in node.value:
        if type(default) in classes:
            return type(default)
        raise RecipeError(f"{node.origin}: {_join(key, 'kind')}: this key is required ({known})")
    named = node.value["kind"]
    if not isinstance(named.value, str) or named.value not in by_kind:
        close = difflib.get_close_matches(named.value, by_kind, n=1, cutoff=0.5) if isinstance(named.value, str) else []
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise RecipeError(f"{named.origin}: {_join(key, 'kind')}: expected {known}, found {describe(named.value)}{hint}")
    return by_kind[named.value]


def _match(option: Any, node: Node, key: str, bounds: Mapping[str, float]) -> tuple[bool, Any]:
    value = node.value
    if option is type(None):
        return value is None, None
    if get_origin(option) is Literal:
        return any(value == one and type(value) is type(one) for one in get_args(option)), value
    if get_origin(option) is tuple:
        item, count = items_of(option)
        if not isinstance(value, list) or count not in (None, len(value)):
            return False, None
        return True, tuple(_value(item, child, f"{key}[{index}]", bounds) for index, child in enumerate(value))
    if get_origin(option) is dict:
        if not isinstance(value, Mapping):
            return False, None
        item = values_of(option)
        return True, {name: _value(item, child, _join(key, name), bounds) for name, child in value.items()}
    if option is float and type(value) is int:
        value = _as_float(value)
    if type(value) is not option or (option is float and not math.isfinite(value)):
        return False, None
    return option not in (int, float) or inside(value, bounds), value


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def to_plain(settings: Any) -> Any:
    """Settings as plain mappings, lists and scalars, ready for YAML or JSON."""
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        return {one.name: to_plain(getattr(settings, one.name)) for one in dataclasses.fields(settings)}
    if isinstance(settings, tuple | list):
        return [to_plain(item) for item in settings]
    if isinstance(settings, Mapping):
        return {key: to_plain(value) for key, value in settings.items()}
    return settings


def to_yaml(settings: Any) -> str:
    """Settings as YAML that builds the same settings again."""
    return dump_yaml(to_plain(settings))

"""Trees to settings and back: the one strict builder behind files, command lines and sweep trials.

Building is pure: it reads nothing but the tree, and a settings object that exists is valid. Every error names the key, the file and
the line, and says what was expected; an unknown key names the nearest one that exists.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from .errors import RecipeError
from .fields import SettingError
from .tree import Node, Origin, describe

T = TypeVar("T")

_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def build(cls: type[T], tree: Node, key: str = "") -> T:
    """An instance of the settings class `cls` from a tree; `key` is the dotted place of the tree in the recipe."""
    if not isinstance(tree.value, Mapping):
        raise RecipeError(f"{tree.origin}: {key or 'recipe'}: expected a mapping of keys, found {describe(tree.value)}")
    hints = get_type_hints(cls)
    fields = {one.name: one for one in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name, child in tree.value.items():
        if name not in fields:
            raise RecipeError(f"{child.origin}: unknown key '{_join(key, name)}'{_nearest(name, fields, key)}")
    values: dict[str, Any] = {}
    for name, one in fields.items():
        if name in tree.value:
            values[name] = _value(hints[name], tree.value[name], _join(key, name), one.metadata.get("bounds", {}))
        elif one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
            raise RecipeError(f"{tree.origin}: {_join(key, name)}: this key is required ({one.metadata.get('doc', '')})")
    instance = cls(**values)
    if hasattr(instance, "check"):
        try:
            instance.check()
        except SettingError as error:
            origin = _origin_below(tree, error.key)
            raise RecipeError(f"{origin}: {_join(key, error.key)}: {error.message}") from None
    return instance


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _nearest(name: str, known: Mapping[str, Any], key: str) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{_join(key, close[0])}'?"
    return "; known here: " + ", ".join(sorted(known))


def _origin_below(tree: Node, dotted: str) -> Origin:
    node = tree
    for part in dotted.split("."):
        if not isinstance(node.value, Mapping) or part not in node.value:
            break
        node = node.value[part]
    return node.origin


def _value(hint: Any, node: Node, key: str, bounds: Mapping[str, float]) -> Any:
    options = _options(hint)
    for option in options:
        matched, value = _match(option, node, key, bounds)
        if matched:
            return value
    raise RecipeError(f"{node.origin}: {key}: expected {expected(hint, bounds)}, found {describe(node.value)}")


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _match(option: Any, node: Node, key: str, bounds: Mapping[str, float]) -> tuple[bool, Any]:
    value = node.value
    if option is type(None):
        return value is None, None
    if get_origin(option) is Literal:
        return any(value == one and type(value) is type(one) for one in get_args(option)), value
    if get_origin(option) is tuple:
        return _match_list(option, node, key, bounds)
    if get_origin(option) is dict:
        if not isinstance(value, Mapping):
            return False, None
        return True, {name: _value(get_args(option)[1], child, _join(key, name), bounds) for name, child in value.items()}
    if dataclasses.is_dataclass(option):
        return _match_class(option, node, key)
    if option is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not option or (option is float and not math.isfinite(value)):
        return False, None
    return _inside(value, bounds), value


def _match_list(option: Any, node: Node, key: str, bounds: Mapping[str, float]) -> tuple[bool, Any]:
    if not isinstance(node.value, list):
        return False, None
    item = get_args(option)[0]
    return True, tuple(_value(item, child, f"{key}[{index}]", bounds) for index, child in enumerate(node.value))


def _match_class(option: Any, node: Node, key: str) -> tuple[bool, Any]:
    """A settings class matches a mapping; one with a `kind` only a mapping that names it (or names none, where it is the default)."""
    if not isinstance(node.value, Mapping):
        return False, None
    kind = kind_of(option)
    if kind is not None:
        named = node.value.get("kind")
        if named is not None and named.value != kind:
            return False, None
    return True, build(option, node, key)


def kind_of(cls: Any) -> str | None:
    """The value of a settings class's `kind: Literal["..."]`, or None."""
    hint = get_type_hints(cls).get("kind")
    return get_args(hint)[0] if hint is not None and get_origin(hint) is Literal else None


def _inside(value: Any, bounds: Mapping[str, float]) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return True
    return (
        value >= bounds.get("minimum", -math.inf)
        and value <= bounds.get("maximum", math.inf)
        and value > bounds.get("above", -math.inf)
        and value < bounds.get("below", math.inf)
    ) or not bounds


def expected(hint: Any, bounds: Mapping[str, float]) -> str:
    """What a key takes, in words."""
    return " or ".join(_expected_one(option, bounds) for option in _options(hint))


def _expected_one(option: Any, bounds: Mapping[str, float]) -> str:
    if option is type(None):
        return "nothing (null)"
    if get_origin(option) is Literal:
        return " or ".join(f"'{one}'" if isinstance(one, str) else str(one).lower() for one in get_args(option))
    if get_origin(option) is tuple:
        return f"a list (each item {expected(get_args(option)[0], bounds)})"
    if dataclasses.is_dataclass(option):
        kind = kind_of(option)
        return f"a mapping with kind: {kind}" if kind else "a mapping"
    if get_origin(option) is dict:
        return "a mapping"
    words = {"minimum": "at least", "above": "above", "maximum": "at most", "below": "below"}
    limits = " and ".join(f"{words[name]} {limit:g}" for name, limit in bounds.items()) if option in (int, float) else ""
    return _NAMES.get(option, str(option)) + (f" {limits}" if limits else "")


def to_plain(settings: Any) -> Any:
    """Settings as plain mappings, lists and scalars, ready for YAML or JSON."""
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        return {one.name: to_plain(getattr(settings, one.name)) for one in dataclasses.fields(settings)}
    if isinstance(settings, tuple | list):
        return [to_plain(item) for item in settings]
    if isinstance(settings, Mapping):
        return {key: to_plain(value) for key, value in settings.items()}
    return settings


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, with text quoted wherever our loader could read it as something else."""


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:float", repr(value))


_Dumper.add_representer(float, _represent_float)


def to_yaml(settings: Any) -> str:
    """Settings as YAML that builds the same settings again."""
    return yaml.dump(to_plain(settings), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)

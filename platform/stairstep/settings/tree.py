"""YAML as a tree of values that remember their file and line: reading, `extends`, deep merge and dotted overrides.

Errors about a recipe must name the line that a person wrote, also when it came in through `extends`, so values keep their origin
until the settings are built. YAML is read as version 1.2 reads scalars: `off` is a word, `7e-6` is a number; a key given twice is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .errors import RecipeError


@dataclass(frozen=True)
class Origin:
    """Where a value was written: a file and line, or a dotted override."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line is not None else self.source


@dataclass(frozen=True)
class Node:
    """A value (scalar, list of nodes or mapping of nodes) with its origin."""

    value: Any
    origin: Origin


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float", ":int", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, source: str) -> Node:
    """The tree of one YAML document; an empty document is an empty mapping."""
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return Node({}, Origin(source, 1))
        return _convert(loader, root, source)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = Origin(source, mark.line + 1 if mark else None)
        raise RecipeError(f"{where}: this is not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: this is not valid YAML: {error}") from None
    finally:
        loader.dispose()


def _convert(loader: _Loader, node: yaml.Node, source: str) -> Node:
    origin = Origin(source, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        children: dict[str, Node] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            if key in children:
                raise RecipeError(f"{Origin(source, key_node.start_mark.line + 1)}: the key '{key}' is given twice; keep one")
            child = _convert(loader, value_node, source)
            children[key] = Node(child.value, Origin(source, key_node.start_mark.line + 1))
        return Node(children, origin)
    if isinstance(node, yaml.SequenceNode):
        return Node([_convert(loader, item, source) for item in node.value], origin)
    return Node(loader.construct_object(node, deep=True), origin)


def merge(below: Node, above: Node) -> Node:
    """`above` over `below`: mappings deeply, everything else replaced; mappings of another `kind` are replaced whole."""
    if not (isinstance(below.value, Mapping) and isinstance(above.value, Mapping)):
        return above
    kinds = [node.value["kind"].value for node in (below, above) if "kind" in node.value]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        return above
    merged = dict(below.value)
    for key, child in above.value.items():
        merged[key] = merge(merged[key], child) if key in merged else child
    return Node(merged, above.origin)


def load_tree(path: str | Path) -> Node:
    """The tree of a recipe file with everything that it extends merged below it."""
    return _load(Path(path), ())


def _load(path: Path, trail: Sequence[Path]) -> Node:
    resolved = path.resolve()
    if resolved in trail:
        cycle = [*trail[trail.index(resolved) :], resolved]
        raise RecipeError("recipes extend each other in a circle: " + " → ".join(str(one) for one in cycle) + "; remove one `extends`")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: there is no such recipe" + _extended_by(trail)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: this recipe cannot be read: {error}") from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree.value, Mapping):
        raise RecipeError(f"{tree.origin}: a recipe is a mapping of keys, found {describe(tree.value)}")
    own = dict(tree.value)
    extends = own.pop("extends", None)
    result: Node | None = None
    for parent in _parents(extends):
        loaded = _load(path.parent / parent, (*trail, resolved))
        result = loaded if result is None else merge(result, loaded)
    above = Node(own, tree.origin)
    return above if result is None else merge(result, above)


def _extended_by(trail: Sequence[Path]) -> str:
    return f" (extended by {trail[-1]})" if trail else ""


def _parents(extends: Node | None) -> list[str]:
    if extends is None:
        return []
    items = extends.value if isinstance(extends.value, list) else [extends]
    for item in items:
        if not isinstance(item.value, str):
            raise RecipeError(f"{extends.origin}: extends: expected a file or a list of files, found {describe(item.value)}")
    return [item.value for item in items]


def apply_overrides(tree: Node, overrides: Iterable[str]) -> Node:
    """The tree with `key.path=value` overrides laid over it in order; values are read as YAML."""
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(re.fullmatch(r"[A-Za-z_][\w-]*", part) for part in parts):
            raise RecipeError(f"'{override}': expected an override of the form key.path=value, for example optim.lr=7e-6")
        origin = Origin(f"override {override}")
        node = Node(parse_yaml(text, str(origin)).value if text.strip() else None, origin)
        node = _relocate(node, origin)
        for part in reversed(parts):
            node = Node({part: node}, origin)
        tree = merge(tree, node)
    return tree


def from_plain(value: Any, source: str) -> Node:
    """A tree made from plain Python values, for recipes that come from a program and not from a file."""
    origin = Origin(source)
    if isinstance(value, Mapping):
        return Node({str(key): from_plain(child, source) for key, child in value.items()}, origin)
    if isinstance(value, list | tuple):
        return Node([from_plain(child, source) for child in value], origin)
    return Node(value, origin)


def _relocate(node: Node, origin: Origin) -> Node:
    if isinstance(node.value, Mapping):
        return Node({key: _relocate(child, origin) for key, child in node.value.items()}, origin)
    if isinstance(node.value, list):
        return Node([_relocate(child, origin) for child in node.value], origin)
    return Node(node.value, origin)


def describe(value: Any) -> str:
    """A value as an error message shows it: short, and with its kind."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()}"
    if isinstance(value, str):
        return f"the text '{value[:60]}'"
    return f"the number {value}"

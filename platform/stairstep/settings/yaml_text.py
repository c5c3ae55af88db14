"""YAML in and out: text to nodes with their lines, plain values to text that reads back as the same values.

Scalars are read as YAML 1.2 reads them: `off` and `1_000` are words, `7e-6` is a number, `010` is ten. A key given twice, a key that
is not text, a tag and a merge key (`<<`) are errors. Anchors are allowed; what they expand to is bounded, as are depth and length, because
a recipe is read on every worker and a wrong file named on the command line must be told at once.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from .errors import RecipeError
from .nodes import Node, Origin, describe

MAX_CHARACTERS = 1_000_000
MAX_VALUES = 50_000
MAX_DEPTH = 50
_MAX_DIGITS = 1000

_TAG = "tag:yaml.org,2002:"
_CORE_SCALARS: tuple[tuple[str, str, list[str]], ...] = (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    (
        "float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+0123456789."),
    ),
    ("merge", r"^<<$", ["<"]),
)
_HINTS = (
    ("'\\t'", "indent with spaces instead of tabs"),
    ("mapping values are not allowed", "put text that contains ': ' in quotes"),
    ("cannot start any token", "put text that begins with it in quotes"),
    ("found undefined alias", "put text that begins with * in quotes"),
    ("single document", "write one recipe a file, without '---' between"),
)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2 and a bound on depth."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own name for it; filled below
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"it is nested more than {MAX_DEPTH} deep", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper, with text quoted wherever our loader, or a loader of YAML 1.1, would read it as something else."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in _CORE_SCALARS:
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(_pattern), _first)
    _Dumper.add_implicit_resolver(_TAG + _name, re.compile(_pattern), _first)
for _character, _resolvers in yaml.SafeDumper.yaml_implicit_resolvers.items():
    _Dumper.yaml_implicit_resolvers.setdefault(_character, []).extend(_resolvers)


def parse_yaml(text: str, source: str) -> Node:
    """The tree of one YAML document; an empty document is an empty mapping."""
    start = Origin(source, 1)
    return read_document(text, start) or Node({}, start)


def read_document(text: str, start: Origin) -> Node | None:
    """The tree of one YAML document that begins at `start` (if that has no line, it is every value's origin); None if there is none."""
    if len(text) > MAX_CHARACTERS:
        raise RecipeError(f"{start.source}: this is longer than a recipe can be ({MAX_CHARACTERS:,} characters); is it a data file?")
    reading = _Reading(start)
    try:
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            return None if root is None else reading.convert(root, 0)
        finally:
            loader.dispose()
    except yaml.reader.ReaderError as error:
        where = reading.at(text.count("\n", 0, error.position))
        raise RecipeError(f"{where}: this is not valid YAML: the character U+{error.character:04X} is not allowed") from None
    except yaml.MarkedYAMLError as error:
        raise RecipeError(reading.complaint(error)) from None


class _Reading:
    """One pass over a composed document: PyYAML's nodes to ours."""

    def __init__(self, start: Origin) -> None:
        self.start = start
        self.values = 0

    def at(self, line: int) -> Origin:
        """The origin of a line counted from 0."""
        return self.start if self.start.line is None else Origin(self.start.source, self.start.line + line)

    def complaint(self, error: yaml.MarkedYAMLError) -> str:
        """PyYAML's objection on one line, with what to do about the usual ones."""
        mark = error.problem_mark or error.context_mark
        where = self.start if mark is None else self.at(mark.line)
        context = error.context or ""
        if error.context and mark is not None and error.context_mark is not None and error.context_mark.line != mark.line:
            context += f" (begun in line {error.context_mark.line + 1})"
        problem = ", ".join(part for part in (context, error.problem) if part)
        hint = next((f"; {advice}" for sign, advice in _HINTS if sign in problem), "")
        return f"{where}: this is not valid YAML: {problem}{hint}"

    def convert(self, node: yaml.Node, depth: int) -> Node:
        """Our tree of one composed node; every alias is expanded, so depth and number of values are counted here again."""
        origin = self.at(node.start_mark.line)
        self.values += 1
        if self.values > MAX_VALUES or depth > MAX_DEPTH:
            raise RecipeError(
                f"{origin}: this holds more than a recipe can ({MAX_VALUES:,} values, {MAX_DEPTH} levels), anchors expanded; "
                "is it a data file, or an anchor that holds itself?"
            )
        if isinstance(node, yaml.MappingNode):
            self._refuse_tag(node, "map", origin)
            return Node(self._children(node, depth), origin)
        if isinstance(node, yaml.SequenceNode):
            self._refuse_tag(node, "seq", origin)
            return Node([self.convert(item, depth + 1) for item in node.value], origin)
        assert isinstance(node, yaml.ScalarNode)
        return Node(_scalar(node, origin), origin)

    def _refuse_tag(self, node: yaml.Node, expected: str, origin: Origin) -> None:
        if node.tag != _TAG + expected:
            raise RecipeError(f"{origin}: the tag {_written(node.tag)} has no meaning in a recipe; remove it")

    def _children(self, node: yaml.MappingNode, depth: int) -> dict[str, Node]:
        children: dict[str, Node] = {}
        for key_node, value_node in node.value:
            origin = self.at(key_node.start_mark.line)
            key = self.convert(key_node, depth + 1).value
            if not isinstance(key, str):
                raise RecipeError(f"{origin}: a key has to be text, found {describe(key)}; put it in quotes")
            if key in children:
                raise RecipeError(f"{origin}: the key '{key}' is given twice (first at {children[key].origin}); keep one")
            # A value is found where its key stands, also when it begins some lines further down.
            children[key] = Node(self.convert(value_node, depth + 1).value, origin)
        return children


def _scalar(node: yaml.ScalarNode, origin: Origin) -> Any:
    kind, text = node.tag.removeprefix(_TAG), node.value
    if kind == "merge":
        raise RecipeError(f"{origin}: merge keys (<<) are not part of YAML 1.2; lay recipes over each other with `extends`")
    if kind == "str":
        return text
    if kind not in ("null", "bool", "int", "float"):
        raise RecipeError(f"{origin}: the tag {_written(node.tag)} has no meaning in a recipe; remove it")
    try:
        return _converted(kind, text)
    except ValueError:
        raise RecipeError(f"{origin}: {describe(text)} cannot be read as {_written(node.tag)}") from None


def _converted(kind: str, text: str) -> Any:
    if kind == "null":
        return None
    if kind == "bool":
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    if len(text) > _MAX_DIGITS:
        raise ValueError(text)
    if kind == "int":
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    return float(re.sub(r"^([-+]?)\.(?=[in])", r"\1", text.lower()))


def _written(tag: str) -> str:
    return "!!" + tag.removeprefix(_TAG) if tag.startswith(_TAG) else tag


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    style = None
    if not value.replace("\n", "").isprintable():
        style = '"'  # PyYAML takes some of these for line breaks, and drops others
    elif "\n" in value:
        style = "|"
    return dumper.represent_scalar(_TAG + "str", value, style=style)


def _represent_float(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    text = {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(repr(value), repr(value))
    return dumper.represent_scalar(_TAG + "float", text)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(float, _represent_float)


def dump_yaml(plain: Any) -> str:
    """Plain mappings, lists and scalars as YAML, keys in their own order, texts of several lines as blocks."""
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)

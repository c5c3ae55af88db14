"""Values that remember where they were written, so that an error about a recipe can name the line that a person has to mend."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import RecipeError

_SHOWN = 60  # characters of a value that an error message repeats


@dataclass(frozen=True)
class Origin:
    """Where a value was written: a file and line, or a dotted override or a program (no line)."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line is not None else self.source


@dataclass(frozen=True)
class Node:
    """A value (scalar, list of nodes or mapping of nodes) with its origin."""

    value: Any
    origin: Origin


def from_plain(value: Any, source: str) -> Node:
    """A tree made from plain Python values, for recipes that come from a program and not from a file."""
    origin = Origin(source)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise RecipeError(f"{source}: every key has to be text, found {describe(key)}")
        return Node({str.__str__(key): from_plain(child, source) for key, child in value.items()}, origin)
    if isinstance(value, list | tuple):
        return Node([from_plain(child, source) for child in value], origin)
    return Node(_plain_scalar(value, source), origin)


def _plain_scalar(value: Any, source: str) -> Any:
    """The value as exactly bool, int, float, str or None: the builder compares types exactly, and samplers hand out numpy's."""
    if value is None or isinstance(value, bool):
        return value
    if not isinstance(value, int | float | str) and callable(getattr(value, "item", None)):
        return _plain_scalar(value.item(), source)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, str):
        return str.__str__(value)
    raise RecipeError(f"{source}: expected mappings, lists, text, numbers, true, false or null, found {describe(value)}")


def describe(value: Any) -> str:
    """A value as an error message shows it: short, on one line, and with its kind."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()}"
    if isinstance(value, str):
        return f"the text '{_short(value)}'"
    if isinstance(value, int | float):
        return f"the number {_short(str(value))}"
    return f"a value of type {type(value).__name__}"


def _short(text: str) -> str:
    line = text.replace("\n", "\\n")
    return line if len(line) <= _SHOWN else line[: _SHOWN - 1] + "…"

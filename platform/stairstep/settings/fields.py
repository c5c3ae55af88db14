"""Declaring settings: frozen dataclasses whose every field says what it means and which values it takes.

A room declares its own settings beside the code that they configure and composes nothing; `tasks/recipe.py` composes them all.
Types understood by the builder: bool, int, float, str, Literal, X | None, unions of those, tuple[X, ...], tuple[X, X], dict[str, X],
other settings classes, and unions of settings classes that are told apart by a field `kind: Literal["..."]`. `kind` is for that alone: a
mapping of another kind replaces the one that it is laid over whole (tree.py). A class may define `check(self)`, which raises
`SettingError(key, message)` for what one field alone cannot show; the key is relative to the class and may be dotted, or empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, field
from typing import Any


class SettingError(ValueError):
    """Raised by a settings class's own `check`: the key within that class, and what is wrong with it."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}" if key else message)
        self.key = key
        self.message = message


def setting(
    default: Any = MISSING,
    *,
    doc: str,
    factory: Callable[[], Any] | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
) -> Any:
    """A documented field of a settings class, with the range of its numbers (`minimum`/`maximum` inclusive, `above`/`below` not)."""
    bounds = {"minimum": minimum, "above": above, "maximum": maximum, "below": below}
    given = {name: value for name, value in bounds.items() if value is not None}
    for value in default if isinstance(default, tuple) else (default,):
        if isinstance(value, int | float) and not isinstance(value, bool) and not inside(value, given):
            raise TypeError(f"the default {default} lies outside of its own range {given}")
    metadata = {"doc": doc, "bounds": given}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def inside(value: float, bounds: Mapping[str, float]) -> bool:
    """Whether a number lies in the range that a field declares."""
    return (
        bounds.get("minimum", -math.inf) <= value <= bounds.get("maximum", math.inf)
        and value > bounds.get("above", -math.inf)
        and value < bounds.get("below", math.inf)
    )

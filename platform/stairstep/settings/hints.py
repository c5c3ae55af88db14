"""The types that a setting may have, taken apart once for the builder and for the JSON schema, and said in words for errors.

They are listed in fields.py; anything else is a defect of the class that declares it, and a TypeError.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
LIMITS = {"minimum": "at least", "above": "above", "maximum": "at most", "below": "below"}


def options_of(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union; a type that is none is its own only one."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def classes_of(hint: Any) -> tuple[Any, ...]:
    """The settings classes among the alternatives; several must be told apart by their kinds."""
    classes = tuple(option for option in options_of(hint) if dataclasses.is_dataclass(option))
    kinds = [kind for option in classes for kind in kinds_of(option) or ("",)]
    if len(classes) > 1 and ("" in kinds or len(set(kinds)) < len(kinds)):
        raise TypeError(f"{hint}: settings classes in a union need a field kind: Literal['...'] each, all of them different")
    return classes


def kinds_of(cls: Any) -> tuple[str, ...]:
    """The values of a settings class's `kind: Literal["..."]`; empty for a class without one."""
    hint = get_type_hints(cls).get("kind")
    return get_args(hint) if get_origin(hint) is Literal else ()


def keys_below(cls: Any) -> Iterator[str]:
    """The dotted keys of a settings class and of the classes in it, nearest first; items of lists are no keys."""
    deeper = []
    for name, hint in get_type_hints(cls).items():
        yield name
        deeper += [(name, option) for option in classes_of(hint)]
    for name, option in deeper:
        yield from (f"{name}.{key}" for key in keys_below(option))


def items_of(option: Any) -> tuple[Any, int | None]:
    """The type of a list's items and, for `tuple[X, X]`, how many there are; None for `tuple[X, ...]`."""
    args = get_args(option)
    if len(args) == 2 and args[1] is Ellipsis:
        return args[0], None
    if not args or any(one != args[0] for one in args):
        raise TypeError(f"{option}: a list's items all have one type")
    return args[0], len(args)


def values_of(option: Any) -> Any:
    """The type of the values of a `dict[str, X]`."""
    args = get_args(option)
    if len(args) != 2 or args[0] is not str:
        raise TypeError(f"{option}: a mapping's keys are text: dict[str, ...]")
    return args[1]


def expected(hint: Any, bounds: Mapping[str, float]) -> str:
    """What a key takes, in words."""
    return " or ".join(_expected_one(option, bounds) for option in options_of(hint))


def _expected_one(option: Any, bounds: Mapping[str, float]) -> str:
    if option is type(None):
        return "null"
    if get_origin(option) is Literal:
        return " or ".join(f"'{one}'" if isinstance(one, str) else str(one).lower() for one in get_args(option))
    if get_origin(option) is tuple:
        item, count = items_of(option)
        return f"a list{'' if count is None else f' of {count}'} (each item: {expected(item, bounds)})"
    if dataclasses.is_dataclass(option):
        kinds = kinds_of(option)
        return f"a mapping with kind {' or '.join(kinds)}" if kinds else "a mapping"
    if get_origin(option) is dict:
        return f"a mapping (each value: {expected(values_of(option), bounds)})"
    if option not in SCALARS:
        raise TypeError(f"{option}: this type is not one that a setting can have")
    limits = " and ".join(f"{LIMITS[name]} {limit}" for name, limit in bounds.items()) if option in (int, float) else ""
    return SCALARS[option] + (f" {limits}" if limits else "")

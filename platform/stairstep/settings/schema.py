"""Settings classes as a JSON schema, so that an editor completes, documents and checks a recipe while it is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .build import to_plain
from .hints import classes_of, items_of, options_of, values_of

_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}
_BOUNDS = {"minimum": "minimum", "maximum": "maximum", "above": "exclusiveMinimum", "below": "exclusiveMaximum"}


def json_schema(cls: Any, title: str) -> dict[str, Any]:
    """The JSON schema of a recipe of settings class `cls`, with `extends` beside its own keys.

    No key is required in it: a recipe may leave everything to the files that it extends.
    """
    schema = _of_class(cls)
    files = {"type": "string"}
    schema["properties"]["extends"] = {
        "description": "One recipe, or a list of them, laid below this one; relative to this file.",
        "anyOf": [files, {"type": "array", "items": files}],
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, **schema}


def _of_class(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    properties = {}
    for one in dataclasses.fields(cls):
        entry = _of_hint(hints[one.name], one.metadata.get("bounds", {}))
        if one.metadata.get("doc"):
            entry = {"description": one.metadata["doc"], **entry}
        if one.default is not dataclasses.MISSING:
            entry["default"] = to_plain(one.default)
        elif one.default_factory is not dataclasses.MISSING:
            entry["default"] = to_plain(one.default_factory())
        properties[one.name] = entry
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _of_hint(hint: Any, bounds: Mapping[str, float]) -> dict[str, Any]:
    classes_of(hint)
    options = [_of_option(option, bounds) for option in options_of(hint)]
    return options[0] if len(options) == 1 else {"anyOf": options}


def _of_option(option: Any, bounds: Mapping[str, float]) -> dict[str, Any]:
    if option is type(None):
        return {"type": "null"}
    if get_origin(option) is Literal:
        return {"enum": list(get_args(option))}
    if get_origin(option) is tuple:
        item, count = items_of(option)
        length = {} if count is None else {"minItems": count, "maxItems": count}
        return {"type": "array", "items": _of_hint(item, bounds), **length}
    if get_origin(option) is dict:
        return {"type": "object", "additionalProperties": _of_hint(values_of(option), bounds)}
    if dataclasses.is_dataclass(option):
        return _of_class(option)
    if option not in _TYPES:
        raise TypeError(f"{option}: this type is not one that a setting can have")
    limits = {_BOUNDS[name]: limit for name, limit in bounds.items()} if option in (int, float) else {}
    return {"type": _TYPES[option], **limits}

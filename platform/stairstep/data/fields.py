"""Text fields of rows and questions: present, text, not empty, and writable again as UTF-8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stairstep.settings import DataError
from stairstep.settings.tree import describe


def required(entry: Mapping[str, Any], field: str, where: str) -> str:
    """The text of a key that must be there."""
    if field not in entry:
        raise DataError(f"{where}: {field}: this key is missing; found here: {', '.join(sorted(entry)) or 'nothing'}")
    return filled(entry[field], field, where)


def filled(value: Any, field: str, where: str, expected: str = "text") -> str:
    """The value itself, if it is text with something in it."""
    if not isinstance(value, str):
        raise DataError(f"{where}: {field}: expected {expected}, found {describe(value)}")
    if not value or value.isspace():
        raise DataError(f"{where}: {field}: expected {expected} that is not empty, found {value!r}")
    if not encodable(value):
        raise DataError(f"{where}: {field}: this text holds half a surrogate pair, which no encoding can write; give the whole character")
    return value


def encodable(text: str) -> bool:
    """Whether UTF-8 can write the text (JSON escapes and file names can hold what it cannot)."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)

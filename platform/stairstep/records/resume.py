"""Which run a recipe belongs to, and whether a run that was begun with one recipe may go on with another.

A run may go on only as what it was: everything but where it runs, who is told and how long it may take has to be the same, else its
curve would be a curve of two recipes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stairstep.settings import DataError, InputError, Node, RecipeError, parse_yaml, to_yaml

FREE = (
    *("cluster", "trackers", "limits", "run.resume", "run.root", "run.name", "run.stalled_after_s"),
    *("data.fetch", "data.archives", "tiles.store"),
    *("evaluation.mode", "evaluation.max_pending", "evaluation.reader.base_url"),
)
"""Keys that may differ at a resume. `run.root` and `run.name` say only where the folder lies, and it has been found; data.fetch to
tiles.store how tiles came to where the other keys name them, which of them are read without being unpacked, and where their pixels are
kept; the last three when questions are asked, and where the same reader listens."""

_SHOWN = 8
_LONGEST = 200  # characters of a value that are shown; a prompt or a judge's template may have thousands


class Absent:
    """Stands for a key that one of two recipes does not have."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = Absent()


def differences(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """Where two plain trees differ: (dotted key, old, new) for each; a key that is missing on one side is ABSENT there."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = [*old, *(name for name in new if name not in old)]
        found = []
        for name in names:
            found += differences(old.get(name, ABSENT), new.get(name, ABSENT), f"{key}.{name}" if key else str(name))
        return found
    if isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        return [one for index, pair in enumerate(zip(old, new, strict=True)) for one in differences(*pair, f"{key}[{index}]")]
    same = old is new or (old == new and isinstance(old, bool) == isinstance(new, bool))
    return [] if same else [(key, old, new)]


def binding(found: list[tuple[str, Any, Any]]) -> list[tuple[str, Any, Any]]:
    """The differences that forbid a resume."""
    return [one for one in found if not any(one[0] == free or one[0].startswith((f"{free}.", f"{free}[")) for free in FREE)]


def check_same_recipe(folder: Path, old: Any, new: Any) -> None:
    """Refuse to resume the run of recipe `old` with recipe `new` if they differ in anything that matters."""
    found = binding(differences(old, normal(new)))
    if not found:
        return
    shown = "; ".join(f"{key}: {_short(before)} there, {_short(after)} now" for key, before, after in found[:_SHOWN])
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    raise InputError(
        f"{folder}: the run here was begun with another recipe ({shown}{more}). A run goes on only with its own recipe: take those "
        "values back, choose another run.name, or say run.resume=overwrite to delete this run and start anew"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def read_recipe(path: Path) -> dict[str, Any]:
    """The resolved recipe of a run as plain values."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; a run folder has its resolved recipe there") from None
    plain = _plain(parse_yaml(text, str(path)))
    if not isinstance(plain, dict):
        raise RecipeError(f"{path}: expected a mapping of keys")
    return plain


def normal(plain: Any) -> Any:
    """Plain settings as they come back from the file that they are written to."""
    return _plain(parse_yaml(to_yaml(plain), "recipe"))


def _plain(node: Node) -> Any:
    if isinstance(node.value, Mapping):
        return {name: _plain(child) for name, child in node.value.items()}
    if isinstance(node.value, list):
        return [_plain(child) for child in node.value]
    return node.value

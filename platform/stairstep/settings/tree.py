"""Recipe files to one tree: `extends`, deep merge and dotted overrides, every value with the file and line that it was written in.

`kind` is the one key that the merge knows: it says which settings a mapping holds, so a mapping of another kind replaces the one below
it whole, and what was said for the other kind does not leak into it.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .errors import RecipeError
from .nodes import Node, Origin, describe, from_plain
from .yaml_text import MAX_CHARACTERS, parse_yaml, read_document

__all__ = ["Node", "Origin", "apply_overrides", "describe", "from_plain", "load_tree", "merge", "parse_yaml"]

MAX_LEVELS = 20  # of `extends`

_CREDENTIALS = re.compile(r"([?&][^=&\s]*(?:key|secret|token|password|credential|signature)[^=&\s]*=)[^&\s]*|://[^/@\s]*@", re.IGNORECASE)


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
    # A mapping stands where a person wrote it: in the uppermost file, rather than in an override that reaches through it.
    return Node(merged, below.origin if above.origin.line is None else above.origin)


def load_tree(path: str | Path) -> Node:
    """The tree of a recipe file with everything that it extends merged below it."""
    return _Files().load(Path(path), (), None)


@dataclass(frozen=True)
class _Files:
    """The files of one recipe; each is read once, however many of the others extend it."""

    loaded: dict[Path, Node] = field(default_factory=dict)

    def load(self, path: Path, trail: Sequence[Path], by: Origin | None) -> Node:
        """The tree of one file, which `by` extends (None: a person named it), over those that it extends itself."""
        resolved = Path(os.path.realpath(path)) if "\0" not in str(path) else path
        prefix = f"{by}: extends: " if by else ""
        if resolved in trail:
            cycle = " → ".join(str(one) for one in [*trail[trail.index(resolved) :], resolved])
            raise RecipeError(f"{prefix}recipes extend each other in a circle: {cycle}; remove one `extends`")
        if len(trail) >= MAX_LEVELS:
            raise RecipeError(f"{prefix}recipes extend each other over more than {MAX_LEVELS} levels; join some of them")
        if resolved not in self.loaded:
            self.loaded[resolved] = self._over_parents(path, parse_yaml(_read(path, prefix), str(path)), (*trail, resolved))
        return self.loaded[resolved]

    def _over_parents(self, path: Path, tree: Node, trail: Sequence[Path]) -> Node:
        if tree.value is not None and not isinstance(tree.value, Mapping):
            raise RecipeError(f"{tree.origin}: a recipe is a mapping of keys, found {describe(tree.value)}")
        own = dict(tree.value or {})
        extends = own.pop("extends", None)
        result: Node | None = None
        for parent in _parents(extends):
            loaded = self.load(path.parent / parent.value, trail, parent.origin)
            result = loaded if result is None else merge(result, loaded)
        above = Node(own, tree.origin)
        return above if result is None else merge(result, above)


def _parents(extends: Node | None) -> list[Node]:
    if extends is None:
        return []
    items = extends.value if isinstance(extends.value, list) else [extends]
    for item in items:
        if not isinstance(item.value, str) or not item.value:
            raise RecipeError(f"{item.origin}: extends: expected a file or a list of files, found {describe(item.value)}")
    return items


def _read(path: Path, prefix: str) -> str:
    try:
        with path.open("rb") as handle:
            data = handle.read(4 * MAX_CHARACTERS + 1)
    except FileNotFoundError:
        raise RecipeError(f"{prefix}{path}: there is no such recipe{_nearest_file(path)}") from None
    except IsADirectoryError:
        raise RecipeError(f"{prefix}{path}: this is a folder; name a recipe file in it") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{prefix}{path}: this recipe cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}:{line}: this is not text in UTF-8; is it a recipe? If it is, save it as UTF-8") from None


def _nearest_file(path: Path) -> str:
    try:
        known = [one.name for one in path.parent.iterdir() if one.suffix in (".yaml", ".yml")]
    except OSError:
        return f", nor a folder {path.parent}"
    close = difflib.get_close_matches(path.name, known, n=1, cutoff=0.6)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def apply_overrides(tree: Node, overrides: Iterable[str]) -> Node:
    """The tree with `key.path=value` overrides laid over it, later ones over earlier; values are read as YAML."""
    laid: Node | None = None
    for override in overrides:
        node = _of_override(override)
        laid = node if laid is None else merge(laid, node)
    # Laid over the tree together: an option given before the `kind` that it belongs to is not lost when that kind replaces another.
    return tree if laid is None else merge(tree, laid)


def _without_secrets(override: str) -> str:
    """An override as messages may repeat it: the credentials that somebody put into a URL are left out."""
    return _CREDENTIALS.sub(lambda found: f"{found[1] or '://'}…{'' if found[1] else '@'}", override)


def _of_override(override: str) -> Node:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(re.fullmatch(r"[A-Za-z_][\w-]*", part) for part in parts):
        lists = " (a list is given whole: key=[a, b])" if re.search(r"\[|\.\d", key) else ""
        raise RecipeError(
            f"'{_without_secrets(override)}': expected an override of the form key.path=value, for example optim.batch=32{lists}"
        )
    origin = Origin(f"override {_without_secrets(override)}")
    if parts == ["extends"]:
        raise RecipeError(f"{origin}: `extends` belongs in a recipe file; write one that extends both")
    node = read_document(text, origin) or Node(None, origin)
    for part in reversed(parts):
        node = Node({part: node}, origin)
    return node

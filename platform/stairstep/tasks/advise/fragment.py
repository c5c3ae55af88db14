"""The fragment: a recipe file that extends the one advised about and holds what is proposed, and what the command line said besides.

It is written where there is no file yet, whole or not at all; the recipe that it extends is only read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stairstep.records.files import temporary_name
from stairstep.settings import InputError, Node, apply_overrides, from_plain, merge
from stairstep.settings.yaml_text import dump_yaml

from .advice import Advice, tree_of


def fragment(advice: Advice, overrides: Sequence[str] = ()) -> str:
    """The proposals that change something as YAML, over the overrides that the advice was asked for with; empty where there are none."""
    tree = apply_overrides(from_plain({}, "jobs.advise"), overrides)
    plain = _plain(merge(tree, from_plain(tree_of(advice.changes), "jobs.advise")))
    return dump_yaml(plain) if plain else ""


def check_new(out: Path) -> None:
    """Refuse a file that is there, or a folder that is not."""
    if os.path.lexists(out):
        raise InputError(f"{out}: this file exists, and nothing is overwritten; choose another name for --out")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent}: there is no such folder; make it, or choose another --out")


def write_fragment(advice: Advice, recipe: Path, out: Path, overrides: Sequence[str] = ()) -> None:
    """Write a recipe that extends `recipe` and holds the proposals; a file that is there already is never overwritten."""
    check_new(out)
    # Real folders: the kernel follows a link before it goes up by '..'.
    extends = os.path.relpath(os.path.realpath(recipe), os.path.realpath(out.parent))
    text = f"# What python -m jobs.advise proposed.\n{dump_yaml({'extends': extends})}{fragment(advice, overrides)}"
    temporary = temporary_name(out)
    try:
        temporary.write_text(text, encoding="utf-8")
        os.link(temporary, out)  # unlike a rename it fails where somebody else was first
    except FileExistsError:
        check_new(out)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _plain(node: Node) -> Any:
    if isinstance(node.value, Mapping):
        return {key: _plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [_plain(child) for child in node.value]
    return node.value

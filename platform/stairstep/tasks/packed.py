"""The recipe's archives: which files its patterns name, that all of it lies inside the roots, and their indices, each built once.

A pattern that matches nothing is no error here: its tiles may have been unpacked and the archive deleted. It is remembered, and named when
a tile is missing.
"""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from stairstep.data import Roots, resolve_inside, roots_of
from stairstep.records.files import locked
from stairstep.settings import DataError
from stairstep.tiles import Archives, index_archives, kept_index

from .placing import local_root
from .recipe import Recipe
from .resolve import data_base

INDICES = "archives"  # where indices are kept, below the run root
_LOG = logging.getLogger(__name__)


def open_archives(recipe: Recipe, alive: Callable[[], None] = lambda: None) -> Archives:
    """The resolved recipe's archives, ready to be read. What is not indexed yet is now, under the run root; `alive` is called meanwhile."""
    if not recipe.data.archives:
        return Archives()
    packed, unmatched = _packed(recipe)
    for pattern in unmatched:
        _LOG.info("data.archives: no file matches '%s'; its tiles are taken to be unpacked", pattern)
    distinct = list(dict.fromkeys(archive for archive, _ in packed))
    folder = index_folder(recipe)
    with _one_at_a_time(folder) if not_indexed(recipe) else nullcontext():  # of a machine's processes one indexes, the others find it
        indices = dict(zip(distinct, index_archives(distinct, folder, alive), strict=True))
    archives = Archives([(indices[archive], folder) for archive, folder in packed], unmatched)
    _LOG.info("%d archives hold %d files", len(distinct), len(archives))
    return archives


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock")):
        yield


def index_folder(recipe: Recipe) -> Path:
    """Where the recipe's indices of archives are kept."""
    return local_root(recipe) / INDICES


def not_indexed(recipe: Recipe) -> list[Path]:
    """The resolved recipe's archives that have no index yet."""
    folder = index_folder(recipe)
    return [archive for archive in dict.fromkeys(archive for archive, _ in _packed(recipe)[0]) if kept_index(archive, folder) is None]


def _packed(recipe: Recipe) -> tuple[list[tuple[Path, Path]], list[str]]:
    """Each archive with the folder that it would be unpacked in, and the patterns that match nothing."""
    base = data_base(recipe)
    roots = roots_of(recipe.data.roots, base, base) if recipe.data.roots else None
    packed: dict[tuple[Path, Path], None] = {}
    unmatched = []
    for number, source in enumerate(recipe.data.archives):
        found = _matching(base, source.path)
        if not found:
            unmatched.append(source.path)
        for archive in found:
            folder = archive.parent if source.unpacked_at is None else base / source.unpacked_at
            packed[
                _inside(archive, roots, f"data.archives[{number}].path"), _inside(folder, roots, f"data.archives[{number}].unpacked_at")
            ] = None
    return list(packed), unmatched


def _matching(base: Path, pattern: str) -> list[Path]:
    """The files of a pattern, in order; a file of that very name is itself."""
    named = base / pattern
    if os.path.lexists(named):
        return [named]
    return [base / one for one in sorted(glob.glob(pattern, root_dir=base, recursive=True))]


def _inside(path: Path, roots: Roots | None, key: str) -> Path:
    try:
        return resolve_inside(path, roots) if roots is not None else Path(os.path.realpath(path))
    except DataError as error:
        raise DataError(f"{key}: {error}") from None

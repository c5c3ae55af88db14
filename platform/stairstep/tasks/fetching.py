"""What a recipe needs from the hub, and whether training would then find the tiles of its question sets.

That is not guessed: the recipe's archives are opened and its question sets read by what a training opens and reads them by.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from stairstep.data.fetch import Fetched, fetch
from stairstep.data.questions import read_question_set
from stairstep.data.settings import FetchSource, QuestionSetSource
from stairstep.models.sources import SAFE_FILES, locate_here
from stairstep.settings import DataError, InputError
from stairstep.tiles import Archives
from stairstep.tiles.tar_members import count_members

from .packed import open_archives
from .recipe import Recipe
from .resolve import data_base, resolve


@dataclass(frozen=True)
class SetFound:
    """Whether training would find the tiles of a question set, and where, in a line for a person."""

    right: bool
    text: str

    def line(self) -> str:
        """One line for a person."""
        return f"{'✓' if self.right else '✗'} {self.text}"


def sources_of(recipe: Recipe) -> tuple[FetchSource, ...]:
    """The recipe's own sources, and its base where that is a hub id, into the hub's own cache."""
    base = recipe.model.base
    named = any(one.repo == base and one.repo_type == "model" and one.place is None for one in recipe.data.fetch)
    if named or locate_here(base, recipe.model.revision, "model.base") is not None:
        return recipe.data.fetch
    return (*recipe.data.fetch, FetchSource(repo=base, repo_type="model", revision=recipe.model.revision, include=SAFE_FILES))


def fetch_recipe(recipe: Recipe, verify: bool = False) -> list[Fetched]:
    """Fetch what the recipe names, and count it."""
    sources = sources_of(recipe)
    if not sources:
        raise InputError(
            f"there is nothing to fetch: data.fetch is empty, and model.base ({recipe.model.base}) is on this machine;"
            " name repositories under data.fetch"
        )
    recipe = resolve(recipe)
    return fetch(sources, data_base(recipe), count_members, recipe.data.roots, verify)


def find_sets(recipe: Recipe) -> list[SetFound]:
    """For each question set, where training would find its tiles. Archives that are not indexed yet are now, as training would do first."""
    if not recipe.evaluation.sets:
        return []
    recipe = resolve(recipe)
    try:
        archives = open_archives(recipe)
    except DataError as error:
        return [SetFound(False, f"question sets: their tiles cannot be looked for: {error}")]
    return [_find_set(one, recipe.data.roots, data_base(recipe), archives) for one in recipe.evaluation.sets]


def _find_set(source: QuestionSetSource, roots: tuple[str, ...], base: Path, archives: Archives) -> SetFound:
    name = f"question set {source.name or Path(source.path).stem}"
    try:
        found = read_question_set(source, roots, base, archives)
    except DataError as error:
        return SetFound(False, f"{name}: {error}")
    packed = sum(not os.path.exists(tile.path) for tile in found.tiles)  # a file that is there is taken in place of a packed one
    said = f", {packed:,} of them packed in data.archives" if packed else ""
    return SetFound(True, f"{name}: {len(found.tiles):,} tiles in {found.note}{said}")

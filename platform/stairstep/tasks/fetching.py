"""What a recipe needs from the hub, and what `jobs.fetch` says of it afterwards."""

from __future__ import annotations

from pathlib import Path

from stairstep.data.fetch import Fetched, fetch
from stairstep.data.fetch_report import count_in
from stairstep.data.questions import read_question_set
from stairstep.data.settings import FetchSource, QuestionSetSource
from stairstep.models.sources import SAFE_FILES, locate_here
from stairstep.settings import DataError, InputError

from .recipe import Recipe
from .resolve import data_base, resolve


def sources_of(recipe: Recipe) -> tuple[FetchSource, ...]:
    """The recipe's own sources, and its base where that is a hub id, into the hub's own cache."""
    base = recipe.model.base
    named = any(one.repo == base and one.repo_type == "model" and one.place is None for one in recipe.data.fetch)
    if named or locate_here(base, recipe.model.revision, "model.base") is not None:
        return recipe.data.fetch
    return (*recipe.data.fetch, FetchSource(repo=base, repo_type="model", revision=recipe.model.revision, include=SAFE_FILES))


def fetch_recipe(recipe: Recipe, verify: bool = False) -> tuple[list[Fetched], list[str]]:
    """Fetch what the recipe names; what there is then, and a line for each question set that says where its tiles lie."""
    sources = sources_of(recipe)
    if not sources:
        raise InputError(
            f"there is nothing to fetch: data.fetch is empty, and model.base ({recipe.model.base}) is on this machine;"
            " name repositories under data.fetch"
        )
    recipe = resolve(recipe)
    base = data_base(recipe)
    results = fetch(sources, base, recipe.data.roots, verify)
    return results, [tiles_line(one, recipe.data.roots, base) for one in recipe.evaluation.sets]


def tiles_line(source: QuestionSetSource, roots: tuple[str, ...], base: Path) -> str:
    """Where the tiles of a question set lie: in a folder, in a tar beside its file, or nowhere yet."""
    path = Path(base, source.path)
    name = source.name or path.stem
    try:
        found = read_question_set(source, roots, base)
    except DataError as error:
        packed = path.with_name("tiles.tar")
        if not path.is_file() or not packed.is_file():
            return f"✗ question set {name}: {error}"
        return _packed_line(name, packed)
    return f"✓ question set {name}: {len(found.tiles):,} tiles in {found.note}"


def _packed_line(name: str, packed: Path) -> str:
    try:
        return f"✓ question set {name}: its tiles lie packed in {packed} ({count_in(packed):,} files)"
    except DataError as error:
        return f"✗ question set {name}: {error}"

"""What a retrieval run reads before its first step: rows, question sets, and the check that no tile is missing.

Tiles may be files or members of the recipe's archives; whoever needs several of these functions opens the archives once and hands them on.
Log lines carry the exact counts, so that a person sees within seconds whether the data is what the recipe means.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from stairstep.data import (
    PairRow,
    QuestionSet,
    Roots,
    TextRow,
    missing_tiles,
    or_unmatched,
    read_pairs,
    read_question_set,
    read_texts,
)
from stairstep.evaluation.question_set import PAIRS_NAME
from stairstep.records import check_set_name
from stairstep.records.places import ObjectFolder, below, place
from stairstep.settings import DataError, RecipeError
from stairstep.tiles import Archives, TileIds, TileReader, tile_key
from stairstep.tiles.shelf import open_store_at

from .packed import open_archives
from .placing import local_root
from .recipe import Recipe
from .resolve import data_base

_LOG = logging.getLogger(__name__)
_SHOWN = 5


@dataclass(frozen=True)
class RetrievalRows:
    """Rows by source, in the recipe's order of sources."""

    train: tuple[list[PairRow], ...] = ()
    validation: tuple[list[PairRow], ...] = ()
    text: tuple[list[TextRow], ...] = ()
    question_sets: tuple[QuestionSet, ...] = ()


def load_question_sets(recipe: Recipe, archives: Archives | None = None) -> tuple[QuestionSet, ...]:
    """The recipe's question sets; two of one name, or a name that cannot be a folder of results, are an error."""
    base, roots = data_base(recipe), recipe.data.roots
    packed = open_archives(recipe) if archives is None else archives
    sets = tuple(read_question_set(one, roots, base, packed) for one in recipe.evaluation.sets)
    names = [one.name for one in sets] + [PAIRS_NAME] * bool(recipe.evaluation.pairs)
    for one in sets:
        check_set_name(one.name)
        if names.count(one.name) > 1:
            raise RecipeError(f"evaluation.sets: two sets of results are called '{one.name}'; give one of them another name")
        _LOG.info("Loaded test '%s': %d questions, %d tiles from %s", one.name, len(one.questions), len(one.tiles), one.note)
        if one.unreachable:
            _LOG.warning("%s: %d golden articles have no tile; their questions cannot be hit", one.name, len(one.unreachable))
    return sets


def load_validation(recipe: Recipe) -> tuple[list[PairRow], ...]:
    """The held-out pairs alone, for an evaluation without training."""
    base = data_base(recipe)
    return tuple(read_pairs(one, recipe.data.roots, base, recipe.data.hard_negatives) for one in recipe.data.validation)


def load_measured_rows(recipe: Recipe, archives: Archives | None = None) -> RetrievalRows:
    """What an evaluation without training reads: question sets and, where the recipe measures on them, held-out pairs."""
    validation = load_validation(recipe) if recipe.evaluation.pairs else ()
    packed = open_archives(recipe) if archives is None else archives
    check_present([row for source in validation for row in source], recipe, packed)
    return RetrievalRows(validation=validation, question_sets=load_question_sets(recipe, packed))


def load_rows(recipe: Recipe, archives: Archives | None = None) -> RetrievalRows:
    """Every row that training needs; an error names what the recipe lacks or which tile is missing."""
    base, roots, negatives = data_base(recipe), recipe.data.roots, recipe.data.hard_negatives
    train = tuple(read_pairs(one, roots, base, negatives) for one in recipe.data.train)
    validation = load_validation(recipe)
    text = tuple(read_texts(one, roots, base, negatives) for one in recipe.data.text) if recipe.phases.any_text else ()
    for source, pairs in zip((*recipe.data.train, *recipe.data.validation), (*train, *validation), strict=True):
        _LOG.info("Loaded %d valid pairs from %s", len(pairs), source.path)
    for text_source, texts in zip(recipe.data.text, text, strict=False):
        _LOG.info("Loaded %d text pairs from %s", len(texts), text_source.path)
    if recipe.phases.any_text and not text:
        raise RecipeError("phases asks for text steps, but the recipe names no text pairs; add data.text")
    if not train and recipe.phases.text_warmup_steps < recipe.optim.steps:
        raise RecipeError("the recipe has tile steps but no query–tile pairs; add data.train")
    packed = open_archives(recipe) if archives is None else archives
    check_present([row for rows in (*train, *validation) for row in rows], recipe, packed)
    return RetrievalRows(train, validation, text, load_question_sets(recipe, packed))


def load_tiles(recipe: Recipe, archives: Archives) -> dict[Path, str]:
    """Every distinct tile of the recipe's rows and question sets, with the row or set that names it first; none is missing."""
    base, roots, negatives = data_base(recipe), recipe.data.roots, recipe.data.hard_negatives
    train = tuple(read_pairs(one, roots, base, negatives) for one in recipe.data.train)
    validation = load_validation(recipe)
    check_present([row for rows in (*train, *validation) for row in rows], recipe, archives)
    return tiles_of(RetrievalRows(train=train, validation=validation, question_sets=load_question_sets(recipe, archives)))


def tiles_of(rows: RetrievalRows) -> dict[Path, str]:
    """Every distinct tile of the rows and question sets, with the row or set that names it first."""
    first: dict[Path, str] = {}
    for source in (*rows.train, *rows.validation):
        for row in source:
            first.setdefault(row.positive, row.where)
            for path in row.negatives:
                first.setdefault(path, row.where)
    for one in rows.question_sets:
        for tile in one.tiles:
            first.setdefault(tile.path, one.where)
    return first


def store_folder(recipe: Recipe) -> Path | ObjectFolder:
    """Where the recipe's tile store lies."""
    return place(recipe.tiles.store) if recipe.tiles.store is not None else below(recipe.run.root, "tiles")


def tile_reader(recipe: Recipe, archives: Archives | None = None, stored: bool = True) -> TileReader:
    """The reader of the recipe's tiles, bound to its roots; ids of files are remembered under the run root. With the tile store where
    there is one, unless not `stored`."""
    allowed = Allowed(tuple(recipe.data.roots)) if recipe.data.roots else None
    packed = open_archives(recipe) if archives is None else archives
    store = open_store_at(store_folder(recipe), tile_key(recipe.tiles.geometry())) if stored else None
    if store is not None:
        _LOG.info("Tile store: %d tiles in %s", len(store), store.folder / store.key)
    pinned = recipe.cluster.device != "cpu" and torch.cuda.is_available()
    return TileReader(recipe.tiles, allowed, TileIds(local_root(recipe) / "tile-ids.jsonl"), packed, store, pinned)


@dataclass(frozen=True)
class Allowed:
    """Whether a tile's file lies in the roots, links resolved; a plain value, so that a reader can be sent to another process."""

    folders: tuple[str, ...]

    def __call__(self, path: Path) -> bool:
        """Whether this path may be read."""
        return self._roots.contains(os.path.realpath(path))

    @cached_property
    def _roots(self) -> Roots:
        return Roots(self.folders)


def check_present(rows: Sequence[PairRow], recipe: Recipe, archives: Archives) -> None:
    """A DataError that names the tiles of the rows which are neither files nor in an archive."""
    missing = missing_tiles(rows, recipe.data.roots, data_base(recipe), packed=archives)
    if missing:
        shown = "\n".join(f"  {where}: {path}" for where, path in missing[:_SHOWN])
        more = f"\n  and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        ours = or_unmatched(archives)
        raise DataError(f"{len(missing)} tiles are missing; fetch or unpack them, or correct these rows{ours}:\n{shown}{more}")

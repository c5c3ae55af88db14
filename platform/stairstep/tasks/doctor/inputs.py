"""The recipe's data: rows, question sets and tiles.

The quick part reads the first rows of each file and decodes a few tiles; the whole one reads everything and decodes every tile that is
not known to be good, and remembers those as training does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from stairstep.data import PairRow, PairSource, TextSource, read_pairs, read_question_set, read_texts
from stairstep.evaluation.question_set import PAIRS_NAME
from stairstep.records import check_set_name
from stairstep.settings import DataError, MissingDataError, RecipeError, TileError
from stairstep.tiles import Tile, TileIds, TileReader

from ..loading import RetrievalRows, check_present, tile_reader
from ..recipe import Recipe
from ..resolve import data_base
from ..tile_check import find_bad_tiles, good_tiles, tiles_of
from .findings import Answer, NotLooked, bad, good, left
from .patient import Patient

QUICK_ROWS = 64
QUICK_TILES = 8
_SHOWN = 5
_TILES_LOOKED_FOR = "what the rows name is then looked for as files"

Row = TypeVar("Row")
Source = TypeVar("Source", PairSource, TextSource)


def recipe_resolves(patient: Patient) -> Answer:
    """Variables, world and folders."""
    recipe = patient.resolved
    world = f", world {recipe.data.world.kind} generated" if recipe.data.world is not None else ""
    return good(f"task {recipe.task.kind}, {recipe.optim.steps} steps of {recipe.optim.batch}{world}")


def archives(patient: Patient) -> Answer:
    """Archives and their indices, which are built where they are new."""
    recipe = patient.resolved
    _reads_rows(patient)
    if not recipe.data.archives:
        raise NotLooked("the recipe names none (data.archives): tiles are files")
    found = patient.archives
    if found.unmatched and not len(found):
        raise NotLooked(f"no file matches {', '.join(found.unmatched)}: not fetched yet, or unpacked; {_TILES_LOOKED_FOR}")
    unmatched = f"; no file matches {', '.join(found.unmatched)}: those tiles must be unpacked" if found.unmatched else ""
    return good(f"{len(found):,} files in them{unmatched}")


def pairs(patient: Patient) -> Answer:
    """Query–tile pairs and text pairs: their files, their rows, and that every tile they name is there."""
    recipe = patient.resolved
    _reads_rows(patient)
    base, roots, negatives = data_base(recipe), recipe.data.roots, recipe.data.hard_negatives
    said: list[str] = []
    problems: list[DataError | RecipeError] = []

    def read(kind: str, sources: Sequence[Source], reading: Callable[[Source], list[Row]]) -> list[Row]:
        found: list[Row] = []
        for source in sources:
            limited = source if patient.deep else replace(source, limit=min(source.limit or QUICK_ROWS, QUICK_ROWS))
            try:
                rows = reading(limited)
            except DataError as error:
                problems.append(error)
                continue
            more = "at least " if not patient.deep and len(rows) == QUICK_ROWS else ""
            said.append(f"{kind}: {more}{len(rows):,} rows in {source.path}")
            found += rows
        return found

    tile_rows: list[PairRow] = []
    for kind, sources in (("train", recipe.data.train), ("validation", recipe.data.validation)):
        tile_rows += read(kind, sources, lambda source: read_pairs(source, roots, base, negatives))
    patient.pairs += tile_rows
    if recipe.phases.any_text:
        patient.texts += read("text", recipe.data.text, lambda source: read_texts(source, roots, base, negatives))
        if not recipe.data.text:
            problems.append(RecipeError("phases asks for text steps, but the recipe names no text pairs; add data.text"))
    if not recipe.data.train and recipe.phases.text_warmup_steps < recipe.optim.steps:
        problems.append(RecipeError("the recipe has tile steps but no query–tile pairs; add data.train"))
    if patient.deep:
        try:
            check_present(tile_rows, recipe, patient.archives)
        except DataError as error:
            problems.append(error)
    if problems:
        return _wrong(problems, recipe)
    return good("\n".join(said)) if said else left("the recipe names none")


def _wrong(problems: Sequence[DataError | RecipeError], recipe: Recipe) -> Answer:
    """All problems in one answer, and how to come by what is not there."""
    error = problems[0] if len(problems) == 1 else DataError("\n".join(map(str, problems)))
    fetched = recipe.data.fetch and any(isinstance(one, MissingDataError) for one in problems)
    do = f"python -m jobs.fetch with this recipe brings {', '.join(one.repo for one in recipe.data.fetch)}" if fetched else ""
    return replace(bad(str(error), do), error=error)


def _reads_rows(patient: Patient) -> None:
    if not patient.retrieval:
        raise NotLooked(f"task {patient.recipe.task.kind} draws its own pages")


def question_sets(patient: Patient) -> Answer:
    """Each set's questions and golden articles, and which folder its tiles were taken from."""
    recipe = patient.resolved
    _reads_rows(patient)
    said: list[str] = []
    problems: list[DataError | RecipeError] = []
    for source in recipe.evaluation.sets:
        try:
            one = read_question_set(source, recipe.data.roots, data_base(recipe), patient.archives)
            check_set_name(one.name)
        except (DataError, RecipeError) as error:
            problems.append(error)
            continue
        patient.question_sets.append(one)
        lost = one.unreachable_questions()
        unreachable = f"; {len(lost)} questions cannot be hit: no tile of their golden articles is there" if lost else ""
        said.append(f"{one.name}: {len(one.questions):,} questions, {len(one.tiles):,} tiles from {one.note}{unreachable}")
    names = [one.name for one in patient.question_sets] + [PAIRS_NAME] * bool(recipe.evaluation.pairs)
    for name in {name for name in names if names.count(name) > 1}:
        problems.append(RecipeError(f"evaluation.sets: two sets of results are called '{name}'; give one of them another name"))
    if problems:
        return _wrong(problems, recipe)
    return good("\n".join(said)) if said else left("the recipe names none: only losses are measured")


def tiles(patient: Patient) -> Answer:
    """Tiles decoded: a few in the quick part, else all that are not known to be good."""
    recipe = patient.resolved
    _reads_rows(patient)
    rows = RetrievalRows(train=(patient.pairs,), question_sets=tuple(patient.question_sets))
    named = tiles_of(rows)
    if not named:
        raise NotLooked("no row and no question set names a tile")
    reader = tile_reader(recipe, patient.archives)
    whole = patient.deep and recipe.data.check_tiles
    if not whole:
        reader.ids = TileIds()  # nothing is written for a glance
    sample, problems = sample_tiles(list(named), reader)
    patient.tile_size = max((_size(one) for one in sample), key=lambda size: size[0] * size[1], default=None)
    if not whole:
        if problems:
            judged = "the run itself decodes every tile before its first step, and judges" if recipe.data.check_tiles else ""
            said = "\n".join([f"{len(problems)} of {len(problems) + len(sample)} tiles looked at cannot be used:", *problems])
            return bad(said, judged or "mend these files", needed=not recipe.data.check_tiles)
        return good(f"{len(sample)} of {len(named):,} decoded{_size_said(patient)}")
    wrong = find_bad_tiles(named, reader, good_tiles(recipe))
    accepted = recipe.data.max_quarantined
    listed = [f"  {one.reason} (named by {one.where})" for one in wrong[:_SHOWN]]
    if len(wrong) > accepted:
        head = f"{len(wrong)} of {len(named):,} tiles cannot be used, data.max_quarantined accepts {accepted or 'none'}:"
        return bad("\n".join([head, *listed]), f"mend or remove them, or go without them by data.max_quarantined={len(wrong)}")
    quarantined = f", {len(wrong)} bad ones accepted" if wrong else ""
    return good(f"all {len(named):,} decoded, now or before{quarantined}{_size_said(patient)}")


def sample_tiles(paths: Sequence[Path], reader: TileReader) -> tuple[list[Tile], list[str]]:
    """A few tiles from all over the list, and what is wrong with those that cannot be had."""
    step = max(1, len(paths) // QUICK_TILES)
    decoded: list[Tile] = []
    problems: list[str] = []
    for path in paths[::step][:QUICK_TILES]:
        try:
            decoded.append(reader.load(path))
        except TileError as error:
            problems.append(f"  {error}")
    return decoded, problems


def _size(tile: Tile) -> tuple[int, int]:
    return int(tile.pixels.shape[-2]), int(tile.pixels.shape[-1])


def _size_said(patient: Patient) -> str:
    if patient.tile_size is None:
        return ""
    height, width = patient.tile_size
    tokens = patient.recipe.tiles.geometry().visual_tokens(height, width)
    return f"; the largest of a sample is {width}×{height} pixels after resizing, {tokens} visual tokens"

"""Question sets in: questions with their golden articles, and the folder of candidate tiles.

A set is whole or an error: each question has an id of its own, a text, an answer and at least one golden article. Golden articles of
which the folder holds no tile make a hit impossible; they are counted in `unreachable` and left for the evaluation to show.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stairstep.settings import DataError, MissingDataError
from stairstep.settings.tree import describe

from .fields import encodable, filled, required
from .packed import PackedFiles, or_unmatched
from .roots import AnyPath, Roots, resolve_inside, roots_of
from .settings import QuestionSetSource

TILE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its answer and the articles that hold it."""

    id: str
    problem: str
    answer: str
    golden: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TileFile:
    """A candidate tile and the article that it shows a part of."""

    path: Path
    article: str


@dataclass(frozen=True)
class QuestionSet:
    """Questions and candidate tiles; `note` says how the tile folder was found, `unreachable` which golden articles have no tile."""

    name: str
    description: str
    questions: tuple[Question, ...]
    tiles: tuple[TileFile, ...]
    tiles_dir: Path
    where: str
    note: str
    unreachable: tuple[str, ...]

    def unreachable_questions(self) -> tuple[str, ...]:
        """The ids of the questions that no ranking can hit, because none of their golden articles has a tile."""
        lost = set(self.unreachable)
        return tuple(question.id for question in self.questions if lost.issuperset(question.golden))


def read_question_set(source: QuestionSetSource, roots: Sequence[AnyPath], base: AnyPath, packed: PackedFiles | None = None) -> QuestionSet:
    """The question set of a JSON file; relative paths of the recipe are taken from `base`. Tiles may be files or packed."""
    path = Path(base, source.path)
    where = str(path)
    if roots:
        resolve_inside(path, roots_of(roots, base, path.parent))
    tree = _read_json(path)
    questions = _questions(tree, where)[: source.limit]
    tiles_dir, note, allowed = _tiles_dir(tree, source, roots, base, path, packed)
    tiles = list_tiles(tiles_dir, allowed, packed)
    if not tiles:
        raise DataError(
            f"{where}: there is no tile ({', '.join(TILE_ENDINGS)}) in {note}; unpack the tiles there, or correct tiles_dir"
            + or_unmatched(packed)
        )
    have = {tile.article for tile in tiles}
    golden = dict.fromkeys(article for question in questions for article in question.golden)
    return QuestionSet(
        name=source.name or path.stem,
        description=_optional_text(tree, "description", where),
        questions=questions,
        tiles=tiles,
        tiles_dir=tiles_dir,
        where=where,
        note=note,
        unreachable=tuple(article for article in golden if article not in have),
    )


def article_of(filename: str) -> str:
    """The article of a tile: its file name less a leading `dist_`, up to `_chunk_`; without `_chunk_`, up to the ending."""
    stem = os.path.splitext(os.path.basename(filename))[0]
    return stem.removeprefix("dist_").split("_chunk_", 1)[0] or stem


def list_tiles(folder: AnyPath, roots: Roots | Sequence[AnyPath], packed: PackedFiles | None = None) -> tuple[TileFile, ...]:
    """All images below a folder, files and packed ones, sorted by path; hidden ones are left out, and a link that leaves the roots or leads
    nowhere is an error.

    A link inside the roots is followed, but no folder is listed twice. A tile's path keeps the link's own name, which names its article.
    """
    allowed = roots if isinstance(roots, Roots) else Roots(roots)
    start = resolve_inside(folder, allowed)
    found = _packed_tiles(str(start), packed)
    waiting, seen = ([str(start)], {str(start)}) if not found or start.is_dir() else ([], set())
    while waiting:
        for entry in _entries(waiting.pop()):
            if entry.name.startswith("."):
                continue
            real = entry.path
            if entry.is_symlink():
                real = str(resolve_inside(entry.path, allowed))
                if not os.path.exists(real):
                    raise DataError(f"{entry.path}: this link leads nowhere ({real}); remove it, or bring back what it names")
            if entry.is_dir():
                if real not in seen:
                    seen.add(real)
                    waiting.append(real)
            elif entry.name.lower().endswith(TILE_ENDINGS) and entry.is_file():
                if not encodable(entry.path):
                    raise DataError(f"{os.fsencode(entry.path)!r}: this tile's name is not UTF-8; rename it")
                found.add(entry.path)
    return tuple(TileFile(Path(path), article_of(path)) for path in sorted(found))


def is_selection(question_id: str, fraction: float) -> bool:
    """Whether a question belongs to the part on which checkpoints are selected: by its id alone, so the same in all runs."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"expected a fraction from 0 to 1, found {fraction}")
    digest = hashlib.sha256(f"selection/{question_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _packed_tiles(folder: str, packed: PackedFiles | None) -> set[str]:
    """The packed images below a folder, under the rules that hold for files."""
    paths = packed.below(folder) if packed is not None else []
    inside = len(folder.rstrip("/"))
    return {path for path in paths if path.lower().endswith(TILE_ENDINGS) and "/." not in path[inside:]}


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: this tile folder cannot be listed: {error.strerror}") from None


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingDataError(f"{path}: there is no such question set; correct the path in the recipe, or fetch the data first") from None
    except OSError as error:
        raise DataError(f"{path}: this question set cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start + 1} of this file is not UTF-8; save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: this is not valid JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: this is not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise DataError(f"{path}: expected a JSON object with questions and golden_mapping, found {describe(tree)}")
    return tree


def _questions(tree: Mapping[str, Any], where: str) -> tuple[Question, ...]:
    entries, mapping = tree.get("questions"), tree.get("golden_mapping")
    if not isinstance(entries, list):
        raise DataError(f"{where}: questions: expected a list of questions, found {describe(entries)}")
    if not entries:
        raise DataError(f"{where}: questions: there are no questions; nothing could be evaluated")
    if not isinstance(mapping, dict):
        raise DataError(f"{where}: golden_mapping: expected question ids with their articles, found {describe(mapping)}")
    questions: dict[str, Question] = {}
    for index, entry in enumerate(entries):
        place = f"{where}: questions[{index}]"
        if not isinstance(entry, dict):
            raise DataError(f"{place}: expected an object with id, problem and answer, found {describe(entry)}")
        name = _name(entry.get("id"), f"questions[{index}].id", where)
        if name in questions:
            raise DataError(f"{place}.id: the id '{name}' is given twice; each question needs its own")
        problem, answer = (required(entry, field, f"{place} (id '{name}')") for field in ("problem", "answer"))
        questions[name] = Question(name, problem, answer, _golden(mapping, name, where))
    return tuple(questions.values())


def _golden(mapping: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    if name not in mapping:
        raise DataError(f"{where}: golden_mapping: the question '{name}' is missing; name the articles that answer it")
    articles = mapping[name]
    if not isinstance(articles, list) or not articles:
        found = "an empty list" if articles == [] else describe(articles)
        raise DataError(f"{where}: golden_mapping['{name}']: expected a list of at least one article, found {found}")
    names = [_name(article, f"golden_mapping['{name}'][{index}]", where) for index, article in enumerate(articles)]
    return tuple(dict.fromkeys(names))


def _name(value: Any, field: str, where: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return filled(value, field, where, expected="text or a whole number")


def _optional_text(tree: Mapping[str, Any], field: str, where: str) -> str:
    value = tree.get(field, "")
    if not isinstance(value, str):
        raise DataError(f"{where}: {field}: expected text, found {describe(value)}")
    return value


def _tiles_dir(
    tree: Mapping[str, Any],
    source: QuestionSetSource,
    roots: Sequence[AnyPath],
    base: AnyPath,
    path: Path,
    packed: PackedFiles | None,
) -> tuple[Path, str, Roots]:
    """The tile folder, how it was found, and the roots that hold for it.

    The recipe's own tiles_dir is taken as it is, and without roots is its own root. The file's is relative to nothing in particular: the
    first folder of that name beside the file, above it or at the working directory is taken, be it there or only in an archive; without
    roots, that place is the root.
    """
    if source.tiles_dir is not None:
        folder = Path(base, source.tiles_dir)
        if not _is_folder(folder, packed):
            raise DataError(f"{path}: the recipe's tiles_dir '{folder}' is not a folder; correct it, or leave it out{or_unmatched(packed)}")
        allowed = roots_of(roots, base, folder)
        real = resolve_inside(folder, allowed)
        return real, f"{real} (the recipe's tiles_dir)", allowed
    name = required(tree, "tiles_dir", str(path))
    beside = Path(os.path.abspath(path.parent))
    places = {"beside the file": beside, "above the file": beside.parent, "at the working directory": Path.cwd()}
    for place, parent in places.items():
        if _is_folder(parent / name, packed):
            allowed = roots_of(roots, base, parent)
            real = resolve_inside(parent / name, allowed)
            found = "an absolute path" if os.path.isabs(name) else f"found {place}"
            return real, f"{real} (the file's tiles_dir '{name}', {found})", allowed
    looked = ", ".join(dict.fromkeys(str(parent / name) for parent in places.values()))
    raise DataError(
        f"{path}: tiles_dir: there is no folder '{name}' (looked for {looked}); unpack the tiles, name their"
        " archive in data.archives, or set tiles_dir in the recipe" + or_unmatched(packed)
    )


def _is_folder(folder: Path, packed: PackedFiles | None) -> bool:
    if folder.is_dir():
        return True
    return packed is not None and "\0" not in str(folder) and bool(packed.below(os.path.realpath(folder)))

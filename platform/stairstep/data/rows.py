"""Rows in: query–tile pairs and text pairs from JSONL, every fault told with file, line and field.

A row has the negatives that its file gives, at most as many as asked: a missing one is never made up, and a negative that is the
positive is an error. Tile paths are resolved and lie inside the roots (see `roots.py`); whether the files exist is not asked here, because
that costs a system call per tile: `missing_tiles` does it for all rows at once, before training.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stairstep.settings import DataError, MissingDataError
from stairstep.settings.tree import describe

from .fields import filled, required
from .packed import PackedFiles
from .roots import AnyPath, Roots, resolve_inside, roots_of
from .settings import PairSource, TextSource

TEXT_CHUNKS = "chunk_*/filtered_hn.jsonl"
_PATHS_PER_TASK = 256


@dataclass(frozen=True, slots=True)
class PairRow:
    """A query with its tile and its hard negatives; `source` is the data file, `where` is "file:line"."""

    query: str
    positive: Path
    negatives: tuple[Path, ...]
    source: str
    where: str


@dataclass(frozen=True, slots=True)
class TextRow:
    """A query with its passage and its hard negatives; `source` is the data file, `where` is "file:line"."""

    query: str
    passage: str
    negatives: tuple[str, ...]
    source: str
    where: str


def read_pairs(source: PairSource, roots: Sequence[AnyPath], base: AnyPath, negatives: int | None = None) -> list[PairRow]:
    """The rows of a query–tile file, each with its first `negatives` hard negatives (None: all that it has)."""
    path = Path(base, source.path)
    allowed = roots_of(roots, base, path.parent)
    _check_file(path, allowed if roots else None)
    folder, name = os.path.abspath(path.parent), str(path)
    known: dict[str, Path] = {}

    def placed(text: str, field: str, where: str) -> str:
        try:
            return allowed.place(text, folder)
        except ValueError as error:
            raise DataError(f"{where}: {field}: {error}") from None

    def tile(place: str) -> Path:
        path = known.get(place)
        if path is None:
            path = known[place] = Path(place)
        return path

    def pair(where: str, row: Mapping[str, Any]) -> PairRow:
        query = required(row, "query", where)
        positive = placed(required(row, "chunk_path", where), "chunk_path", where)
        others = [placed(text, f"neg_chunk_paths[{index}]", where) for index, text in enumerate(_texts(row, "neg_chunk_paths", where))]
        if positive in others:
            _negative_is_positive(where, f"neg_chunk_paths[{others.index(positive)}]", "chunk_path", positive)
        return PairRow(query, tile(positive), tuple(map(tile, others[:negatives])), name, where)

    with _collector_paused():
        return [pair(where, row) for where, row in _lines(path, source.limit)]


def read_texts(source: TextSource, roots: Sequence[AnyPath], base: AnyPath, negatives: int | None = None) -> list[TextRow]:
    """The rows of a text-pair file, or of all chunk_*/filtered_hn.jsonl of a folder in sorted order, as `read_pairs`."""
    rows: list[TextRow] = []
    for path in _text_files(Path(base, source.path), roots, base):
        name = str(path)
        for where, row in _lines(path, None if source.limit is None else source.limit - len(rows)):
            query, passage = required(row, "query", where), required(row, "passage", where)
            others = tuple(_texts(row, "neg_passages", where))
            if passage in others:
                _negative_is_positive(where, f"neg_passages[{others.index(passage)}]", "passage", passage[:60])
            rows.append(TextRow(query, passage, others[:negatives], name, where))
        if source.limit is not None and len(rows) >= source.limit:
            break
    return rows


def missing_tiles(
    rows: Iterable[PairRow], roots: Sequence[AnyPath] = (), base: AnyPath = ".", workers: int = 16, packed: PackedFiles | None = None
) -> list[tuple[str, Path]]:
    """Every distinct tile of the rows that is neither a file nor packed in an archive, with the first row that names it.

    A tile that is a link out of the roots is an error at once; give the same `roots` and `base` as to `read_pairs`. Runs in threads,
    because a file server answers many questions at once.
    """
    first: dict[Path, PairRow] = {}
    for row in rows:
        first.setdefault(row.positive, row)
        for path in row.negatives:
            first.setdefault(path, row)
    allowed = {source: roots_of(roots, base, Path(source).parent) for source in {row.source for row in first.values()}}
    items = list(first.items())

    def missing(start: int) -> list[tuple[str, Path]]:
        part = items[start : start + _PATHS_PER_TASK]
        return [(row.where, path) for path, row in part if not _is_tile(path, row, allowed[row.source], packed)]

    with ThreadPoolExecutor(max_workers=workers) as pool:
        return [one for found in pool.map(missing, range(0, len(items), _PATHS_PER_TASK)) for one in found]


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """No garbage collection while many small things are made of which none is garbage: it would take a third of the time."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def _is_tile(path: Path, row: PairRow, roots: Roots, packed: PackedFiles | None) -> bool:
    try:
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            resolve_inside(path, roots)
            mode = os.stat(path).st_mode
    except DataError as error:
        raise DataError(f"{row.where}: {error}") from None
    except (FileNotFoundError, NotADirectoryError):
        return packed is not None and packed.find(path) is not None
    except OSError:
        return False
    return stat.S_ISREG(mode)


def _check_file(path: Path, roots: Roots | None) -> None:
    if roots is not None:
        resolve_inside(path, roots)
    if path.is_dir():
        raise DataError(f"{path}: expected a JSONL file, found a folder; name the file in it")
    if not path.is_file():
        raise MissingDataError(f"{path}: there is no such data file; correct the path in the recipe, or fetch the data first")


def _text_files(path: Path, roots: Sequence[AnyPath], base: AnyPath) -> list[Path]:
    if not path.is_dir():
        _check_file(path, roots_of(roots, base, path.parent) if roots else None)
        return [path]
    files = sorted(path.glob(TEXT_CHUNKS))
    if not files:
        raise DataError(f"{path}: this folder holds no {TEXT_CHUNKS}; name a folder that does, or one JSONL file")
    allowed = roots_of(roots, base, path)
    for file in files:
        _check_file(file, allowed)
    return files


def _lines(path: Path, limit: int | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each line's place and object, at most `limit` of them; blank lines may end the file but not interrupt it."""
    count, blank = 0, ""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if count == limit:
                    break
                where = f"{path}:{number}"
                if not line.strip():
                    blank = blank or where
                    continue
                if blank:
                    raise DataError(f"{blank}: expected a JSON object, found an empty line; remove it")
                yield where, _object(line, where)
                count += 1
    except OSError as error:
        raise DataError(f"{path}: this data file cannot be read: {error.strerror}") from None
    if not count and limit != 0:
        raise DataError(f"{path}: this data file holds no rows; expected one JSON object per line")


def _object(line: bytes, where: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start + 1} of this line is not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: this is not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, found {describe(row)}")
    return row


def _texts(row: Mapping[str, Any], field: str, where: str) -> list[str]:
    values = row.get(field, [])
    if not isinstance(values, list):
        raise DataError(f"{where}: {field}: expected a list of texts, found {describe(values)}")
    return [filled(value, f"{field}[{index}]", where) for index, value in enumerate(values)]


def _negative_is_positive(where: str, field: str, of: str, value: str) -> None:
    raise DataError(f"{where}: {field}: this negative is the row's own {of} ('{value}'); remove it, a row may have fewer negatives")

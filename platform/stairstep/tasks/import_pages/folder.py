"""The folder that an import writes: tiles, the record of pages, and the skeletons of pairs and of a question set.

Invariants: a page counts when its line stands in pages.jsonl, which is written after its tiles and its rows, so a kill loses at most the
page under way and the next import makes that page again, under the same names. Nothing that a person may have filled in is ever
changed: rows are only appended to pairs.jsonl, for tiles that it does not name, and questions.json is written once.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stairstep.data import article_of
from stairstep.records import Claim, append_line, read_json, read_json_lines, write_atomically, write_json
from stairstep.records.folders import sweep
from stairstep.settings import DataError, InputError

from .cutting import Piece, TileSize
from .names import tile_name, tile_number
from .sources import Failure, Source

MARKER = "import.json"
PAGES = "pages.jsonl"
PAIRS = "pairs.jsonl"
QUESTIONS = "questions.json"
FAILED = "failed.jsonl"
TILES = "tiles"
_UNFILLED = '{"query": "", '


@dataclass(frozen=True)
class Page:
    """A page cut into tiles: its place in its source (PDFs alone have pages), the digest of the source's bytes (an address has
    none), its size before it was shrunk, and what there is to say of it."""

    source: Source
    number: int | None
    id: str | None
    width: int
    height: int
    pieces: tuple[Piece, ...]
    note: str | None = None


class ImportFolder:
    """What an import has made so far; one import at a time (`open_folder`)."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tiles = folder, folder / TILES
        self.tiles.mkdir(exist_ok=True)
        for place in (folder, self.tiles):
            sweep(place)
        self._pages: dict[tuple[str, int | None], dict[str, Any]] = {}
        self._next: dict[str, int] = defaultdict(int)
        path = folder / PAGES
        for number, line in enumerate(read_json_lines(path) if path.exists() else (), 1):
            if not _is_record(line):
                raise DataError(f"{path}:{number}: this is no line that an import writes; remove it, and its page is made again")
            self._note(line)
        recorded = {name for line in self._pages.values() for name in _names(line)}
        self._loose: dict[str, list[Path]] = defaultdict(list)
        for tile in self.tiles.glob("*.png"):
            if tile.name not in recorded:
                self._loose[article_of(tile.name)].append(tile)
        self._named = _tiles_in_pairs(folder / PAIRS)

    def articles(self) -> dict[str, str]:
        """The article of every source that has a page here."""
        return {source: line["article"] for (source, _), line in self._pages.items()}

    def ids(self) -> dict[str, str | None]:
        """The digest of every source that has a page here."""
        return {source: line["id"] for (source, _), line in self._pages.items()}

    def is_whole(self, source: Source, number: int | None) -> bool:
        """Whether a page is recorded and all of its tiles are there at their size."""
        line = self._pages.get((source.name, number))
        return line is not None and all(_size(self.tiles / tile["file"]) == tile["bytes"] for tile in line["tiles"])

    def add(self, page: Page) -> None:
        """Write a page: its tiles, then their rows, then its line in the record."""
        article, before = page.source.article, self._pages.get((page.source.name, page.number))
        for path in self._loose.pop(article, ()):  # left by a killed import: this page's, which may have fewer tiles by now
            path.unlink(missing_ok=True)
        first = tile_number(_names(before)[0]) if before else self._next[article]
        tiles = []
        for number, piece in enumerate(page.pieces, first):
            name = tile_name(article, number)
            write_atomically(self.tiles / name, piece.data, durable=False)
            tiles.append({"file": name, "width": piece.width, "height": piece.height, "bytes": len(piece.data)})
        for tile in tiles:
            place = f"{TILES}/{tile['file']}"
            if place not in self._named:
                append_line(self.folder / PAIRS, {"query": "", "chunk_path": place, "neg_chunk_paths": []})
                self._named.add(place)
        line: dict[str, Any] = {"source": page.source.name, "page": page.number, "article": article, "id": page.id}
        line |= {"width": page.width, "height": page.height, "tiles": tiles}
        if page.note:
            line["note"] = page.note
        append_line(self.folder / PAGES, line)
        self._note(line)
        for name in set(_names(before)) - set(_names(line)):
            (self.tiles / name).unlink(missing_ok=True)

    def finish(self, failures: Sequence[Failure]) -> None:
        """Write what could not be imported, and the skeleton of a question set where there is none yet."""
        failed, questions = self.folder / FAILED, self.folder / QUESTIONS
        if failures:
            write_atomically(failed, "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in failures))
        else:
            failed.unlink(missing_ok=True)
        if not questions.exists():
            example = {"id": "q1", "problem": "", "answer": ""}
            write_json(questions, {"description": "", "tiles_dir": TILES, "questions": [example], "golden_mapping": {"q1": [""]}})

    def counts(self) -> tuple[int, int]:
        """How many pages and tiles the folder holds."""
        return len(self._pages), sum(len(line["tiles"]) for line in self._pages.values())

    def _note(self, line: dict[str, Any]) -> None:
        """Know a line of the record; of several lines of one page the last counts."""
        self._pages[line["source"], line["page"]] = line
        self._next[line["article"]] = max(self._next[line["article"]], *(tile_number(name) + 1 for name in _names(line)))


@contextmanager
def open_folder(folder: Path, size: TileSize) -> Iterator[ImportFolder]:
    """A new folder, or one that an import with the same tile size has begun, held against every other import."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder}: this is a file; name a folder")
    marker = folder / MARKER
    if not marker.exists() and folder.exists() and any(not one.name.startswith(".") for one in folder.iterdir()):
        raise InputError(f"--out {folder}: this folder is not empty and no import has begun it ({MARKER}); name a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"--out {folder}: a file or a broken link lies on this path; name a folder that can be made") from None
    try:
        claim = Claim(folder)
    except InputError:
        raise InputError(f"--out {folder}: another import is at work there; wait for it or stop it, or name another folder") from None
    with claim:
        if marker.exists():
            begun = read_json(marker)
            if begun != {"tile_size": asdict(size)}:
                raise InputError(
                    f"--out {folder}: this import was begun with other tiles ({marker}: {json.dumps(begun)}); "
                    f"go on with the same --width and --height, or name a new folder"
                )
        else:
            write_json(marker, {"tile_size": asdict(size)})
        yield ImportFolder(folder)


def _is_record(line: Any) -> bool:
    """Whether a line of pages.jsonl has what is read from it, and names tiles of its own article alone, which are no paths."""
    try:
        tiles, article = line["tiles"], line["article"]
        plain = all(isinstance(one, str) for one in (line["source"], article)) and isinstance(line["page"], int | None)
        named = all(tile["file"] == tile_name(article, tile_number(tile["file"])) and tile["bytes"] >= 0 for tile in tiles)
        return plain and named and bool(tiles) and "id" in line and "/" not in article
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def _names(line: dict[str, Any] | None) -> list[str]:
    return [tile["file"] for tile in line["tiles"]] if line else []


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _tiles_in_pairs(path: Path) -> set[str]:
    """The tiles that pairs.jsonl names. A line that is no JSON is a person's, unless it is the end of a row of ours that a kill cut off."""
    if not path.exists():
        return set()
    named = set()
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        torn = number == len(lines) and (line.startswith(_UNFILLED) or _UNFILLED.startswith(line))
        if torn or not line.strip():
            continue
        try:
            named.add(json.loads(line)["chunk_path"])
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{path}:{number}: expected a JSON object with a chunk_path; mend or remove this line") from None
    return named

"""From sources to a folder of tiles: each page is made, written and recorded by itself, so that what is wrong with one ends no other.

Pictures are decoded, cut and encoded by several threads ahead of the writing; PDFs and web pages come one after another.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from stairstep.records import Progress
from stairstep.settings import InputError, TileError
from stairstep.tiles import Ahead, TileSettings, decode_image

from .cutting import TileSize, cut
from .folder import FAILED, PAGES, PAIRS, QUESTIONS, ImportFolder, Page, open_folder
from .pdf import check_pdf, draw_page, open_pdf
from .sources import Failure, Found, Source, find_sources, named
from .web import TIMEOUT_S, Browser, find_browser

MAX_PIXELS = TileSettings().max_image_pixels
# A file may be no larger than uncompressed 16-bit RGBA pixels of the largest image and room for metadata.
_MAX_BYTES = MAX_PIXELS * 8 + (1 << 24)
_AHEAD_BYTES = 1 << 28
_RESERVED_BYTES = 1 << 24


@dataclass(frozen=True)
class Whole:
    """A page that an earlier import has made."""

    source: Source
    number: int | None = None


Outcome = Page | Failure | Whole


@dataclass(frozen=True)
class Imported:
    """What one import did, and what its folder holds by now."""

    pages: int
    tiles: int
    there_before: int
    notes: tuple[str, ...]
    failures: tuple[Failure, ...]
    other_files: int
    all_pages: int
    all_tiles: int


def import_pages(
    paths: Sequence[Path],
    urls: Path | None,
    out: Path,
    size: TileSize = TileSize(),  # noqa: B008 - frozen
    browser: Path | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Imported:
    """Import files, folders and addresses into `out`, or go on with it; a page that fails is told and ends nothing."""
    size.check()
    if not paths and urls is None:
        raise InputError("nothing to import: name folders or files, or a list of addresses by --urls FILE")
    found = find_sources(paths, urls, out)
    kinds = {one.kind for one in found.sources}
    if not found.sources and not found.refused:
        raise InputError("there is no page in the sources; expected pictures, PDFs or web pages")
    if "pdf" in kinds:
        check_pdf()
    program = find_browser(browser) if "web" in kinds else ""
    with open_folder(out, size) as folder:
        return _import(found, folder, size, program, timeout_s)


def _import(found: Found, folder: ImportFolder, size: TileSize, program: str, timeout_s: float) -> Imported:
    failures, notes = list(found.refused), []
    pages = tiles = before = 0
    seen: set[str] = set()
    progress = Progress(len(found.sources), what="importing")
    with closing(_outcomes(named(found.sources, folder.articles()), folder, size, program, timeout_s)) as outcomes:
        for one in outcomes:
            if isinstance(one, Failure):
                failures.append(one)
            elif isinstance(one, Whole):
                before += 1
            else:
                folder.add(one)
                pages, tiles = pages + 1, tiles + len(one.pieces)
                notes += [f"{one.source.name}: {one.note}"] if one.note else []
            seen.add(one.source if isinstance(one, Failure) else one.source.name)
            progress.update(len(seen), {})
    progress.close()
    folder.finish(failures)
    return Imported(pages, tiles, before, tuple(notes), tuple(failures), found.other_files, *folder.counts())


def _outcomes(
    sources: Sequence[Source], folder: ImportFolder, size: TileSize, program: str, timeout_s: float
) -> Generator[Outcome, None, None]:
    pictures = [one for one in sources if one.kind == "picture"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    known = folder.ids()
    with Ahead(
        lambda one: _picture(one, folder, size, known),
        pictures,
        workers=cores,
        most_bytes=_AHEAD_BYTES,
        reserve=_RESERVED_BYTES,
        cost=lambda made: sum(len(piece.data) for piece in made.pieces) if isinstance(made, Page) else 0,
    ) as made:
        yield from made
    for one in sources:
        if one.kind == "pdf":
            yield from _pdf(one, folder, size, known)
    with ExitStack() as stack:
        browser: Browser | None = None
        for one in sources:
            if one.kind == "web" and folder.is_whole(one, None):
                yield _as_it_was(one, known)
            elif one.kind == "web":
                browser = browser or stack.enter_context(Browser(program, size, MAX_PIXELS, timeout_s))
                yield _web(one, browser, size, known)


def _picture(source: Source, folder: ImportFolder, size: TileSize, known: dict[str, str | None]) -> Outcome:
    try:
        data = _read(source.name)
        id = hashlib.sha256(data).hexdigest()
        _unchanged(source, id, known)
        if folder.is_whole(source, None):
            return Whole(source)
        pixels = decode_image(data, source.name, MAX_PIXELS)
        return Page(source, None, id, pixels.shape[2], pixels.shape[1], cut(pixels, size, source.name))
    except TileError as error:
        return Failure(source.name, None, str(error))


def _pdf(source: Source, folder: ImportFolder, size: TileSize, known: dict[str, str | None]) -> Iterator[Outcome]:
    path = Path(source.name)
    try:
        id = _digest(source.name)
        _unchanged(source, id, known)
        with open_pdf(path) as document:
            if not len(document):
                raise TileError(f"{path}: this PDF has no page")
            for index in range(len(document)):
                yield _pdf_page(source, document, index, id, folder, size)
    except TileError as error:
        yield Failure(source.name, None, str(error))


def _pdf_page(source: Source, document: object, index: int, id: str, folder: ImportFolder, size: TileSize) -> Outcome:
    number, where = index + 1, f"{source.name}, page {index + 1}"
    if folder.is_whole(source, number):
        return Whole(source, number)
    try:
        pixels = draw_page(document, index, size.width, MAX_PIXELS, where)
        return Page(source, number, id, pixels.shape[2], pixels.shape[1], cut(pixels, size, where))
    except TileError as error:
        return Failure(source.name, number, str(error))


def _web(source: Source, browser: Browser, size: TileSize, known: dict[str, str | None]) -> Outcome:
    try:
        id = None
        if source.folder is not None:
            id = _digest(source.name)
            _unchanged(source, id, known)
        address = Path(source.name).as_uri() if source.folder is not None else source.name
        pixels, note = browser.picture(address, source.folder)
        return Page(source, None, id, pixels.shape[2], pixels.shape[1], cut(pixels, size, source.name), note)
    except TileError as error:
        return Failure(source.name, None, str(error))


def _as_it_was(source: Source, known: dict[str, str | None]) -> Outcome:
    """A page that is there, if it was saved to a file that is still the same."""
    try:
        if source.folder is not None:
            _unchanged(source, _digest(source.name), known)
        return Whole(source)
    except TileError as error:
        return Failure(source.name, None, str(error))


def _unchanged(source: Source, id: str, known: dict[str, str | None]) -> None:
    """The tiles of one article are of one state of its file: rows that were written for them say what they show."""
    if known.get(source.name, id) != id:
        raise TileError(f"{source.name}: this file is not the one that was imported here before; import it into a new folder")


def _read(path: str) -> bytes:
    """A file's bytes, if it is one that an image of `MAX_PIXELS` can need."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise TileError(f"{path}: expected a file, found a pipe or a device")
            if status.st_size > _MAX_BYTES:
                raise TileError(f"{path}: the file has {status.st_size} bytes, more than an image of {MAX_PIXELS} pixels can need")
            return file.read(_MAX_BYTES)
    except OSError as error:
        raise TileError(f"{path}: this file cannot be read: {error.strerror or error}") from None


def _digest(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise TileError(f"{path}: this file cannot be read: {error.strerror or error}") from None


def summary(done: Imported, out: Path) -> str:
    """What a person is told at the end: what was done, what failed, what to do next."""
    lines = [f"imported {_many(done.pages, 'page')} as {_many(done.tiles, 'tile')}; {_many(done.there_before, 'page')} were there before"]
    lines += [f"{out} holds {_many(done.all_pages, 'page')} as {_many(done.all_tiles, 'tile')}"]
    lines += [f"  {note}" for note in done.notes]
    if done.other_files:
        lines.append(f"{_many(done.other_files, 'file')} of other kinds left alone")
    if done.failures:
        lines.append(f"{len(done.failures)} could not be imported (all in {out / FAILED}; the same command tries them again):")
        lines += [f"  {one.reason if one.source in one.reason else f'{one.source}: {one.reason}'}" for one in done.failures[:20]]
        lines += [f"  and {len(done.failures) - 20} more"] if len(done.failures) > 20 else []
    if done.all_pages:
        lines += [
            "",
            "next:",
            f"  {out / PAIRS}: for training, give each row a query that its tile answers; take out the rows that get none",
            f"  {out / QUESTIONS}: for evaluation, questions, answers and the articles that hold them ({PAGES} has their names)",
            "  Both are refused for as long as a text in them is empty (docs/data.md).",
        ]
    return "\n".join(lines)


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"

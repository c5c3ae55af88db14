"""What is to be imported: pictures, PDFs and saved web pages below folders, single files, and addresses from a list.

Invariants: nothing hidden is taken; nothing is read that lies outside a folder that was given, links resolved; an address is http or https
and holds no password; every source is taken once, in an order that depends on its folder alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from stairstep.data import Roots
from stairstep.data.fields import encodable
from stairstep.settings import InputError

from .names import name_articles

Kind = Literal["picture", "pdf", "web"]

KINDS: dict[str, Kind] = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp"), "picture"),
    ".pdf": "pdf",
    **dict.fromkeys((".html", ".htm"), "web"),
}
_MAX_LIST_BYTES = 1 << 28


@dataclass(frozen=True)
class Source:
    """One file or address: `name` is the absolute path or the address, `folder` (of files alone) is the one that it was found in."""

    kind: Kind
    name: str
    article: str
    folder: Path | None = None


@dataclass(frozen=True)
class Failure:
    """A line of failed.jsonl: a source, or one page of it, that could not be imported, and why."""

    source: str
    page: int | None
    reason: str


@dataclass(frozen=True)
class Found:
    """Everything that was found: what to import (see `named`), what was refused, and how many files are of kinds that are no pages."""

    sources: tuple[Source, ...]
    refused: tuple[Failure, ...]
    other_files: int


def find_sources(paths: Sequence[Path], urls: Path | None, out: Path) -> Found:
    """All sources of a command line, their articles not yet made names of; `out` may not lie among them."""
    refused: list[Failure] = []
    sources: dict[str, Source] = {}
    others = 0
    for given in paths:
        _apart(given, out)
        for path, relative, folder in _below(given, refused):
            stem, ending = os.path.splitext(relative)
            kind = KINDS.get(ending.lower())
            if kind is None:
                if given.is_file():
                    raise InputError(f"{given}: no page can be made of this kind of file; expected {', '.join(KINDS)}")
                others += 1
            elif not encodable(path):
                refused.append(Failure(shown(path), None, "this file's name is not UTF-8; rename it"))
            else:
                sources.setdefault(path, Source(kind, path, stem.replace("/", "-"), folder))
    for address in read_addresses(urls) if urls is not None else ():
        sources[address] = Source("web", address, re.sub("[/?&=#:]+", "-", address.partition("://")[2]))
    return Found(tuple(sources.values()), tuple(refused), others)


def named(sources: Sequence[Source], known: Mapping[str, str]) -> tuple[Source, ...]:
    """The sources with the names of their articles; `known` are those of sources that were imported before."""
    articles = name_articles(((one.name, one.article) for one in sources), known)
    return tuple(replace(one, article=articles[one.name]) for one in sources)


def shown(path: str) -> str:
    """A path as it can be written, whatever bytes its name has."""
    return path if encodable(path) else repr(os.fsencode(path))


def read_addresses(path: Path) -> tuple[str, ...]:
    """The addresses of a file, one a line, each once; empty lines and those that begin with # are passed over."""
    try:
        if path.stat().st_size > _MAX_LIST_BYTES:
            raise InputError(f"{path}: this list has more than {_MAX_LIST_BYTES} bytes; cut it into several imports")
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path}: this list of addresses cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start + 1} of this file is not UTF-8; expected one address a line") from None
    found = {line.strip(): f"{path}:{number}" for number, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")}
    for address, where in found.items():
        _check_address(address, where)
    return tuple(found)


def _check_address(address: str, where: str) -> None:
    try:
        parts = urlsplit(address)
        host, secret = parts.hostname, parts.username is not None or parts.password is not None
    except ValueError as error:
        raise InputError(f"{where}: this is no address of a web page: {error}") from None
    if secret:
        raise InputError(f"{where}: this address holds a user name or a password, which would be written into the records; leave it out")
    if parts.scheme not in ("http", "https") or not host or re.search(r"[\s\x00-\x1f]", address):
        raise InputError(f"{where}: expected an address that begins with http:// or https://, found {address[:200]!r}")


def _apart(given: Path, out: Path) -> None:
    """A source and the folder that is written may not lie in each other: the next import would take its own tiles for pages."""
    source, target = os.path.realpath(given), os.path.realpath(out)
    if Roots([source]).contains(target) or Roots([target]).contains(source):
        raise InputError(f"--out {out}: this folder and the source {given} lie in each other; choose a folder outside of the sources")


def _below(given: Path, refused: list[Failure]) -> Iterator[tuple[str, str, Path]]:
    """The file itself, or all files below a folder in order: each with its path from the folder, and the folder."""
    path = os.path.abspath(given)
    if os.path.isfile(path):
        yield path, os.path.basename(path), Path(path).parent
    elif os.path.isdir(path):
        for file in _walk(path, refused):
            yield file, os.path.relpath(file, path), Path(path)
    else:
        raise InputError(f"{given}: there is no such file or folder; correct the path")


def _walk(start: str, refused: list[Failure]) -> Iterator[str]:
    inside = Roots([start])
    waiting, seen = [start], {os.path.realpath(start)}
    while waiting:
        entries = _entries(waiting.pop(), refused)
        names = {entry.name for entry in entries}
        folders = []
        for entry in entries:
            if entry.name.startswith("."):
                continue
            real = os.path.realpath(entry.path)
            if not inside.contains(real):
                reason = (
                    f"this link leaves the folder {start} (it leads to {shown(real)}); copy what it names into the folder if it is meant"
                )
                refused.append(Failure(shown(entry.path), None, reason))
            elif os.path.isdir(real):
                if real not in seen and not _belongs_to_a_page(entry.name, names):
                    seen.add(real)
                    folders.append(entry.path)
            elif os.path.isfile(real):
                yield entry.path
        waiting += reversed(folders)


def _entries(folder: str, refused: list[Failure]) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        refused.append(Failure(shown(folder), None, f"this folder cannot be listed: {error.strerror}"))
        return []


def _belongs_to_a_page(folder: str, beside: Iterable[str]) -> bool:
    """Whether a browser made the folder for the pictures of a page that it saved beside it."""
    stem = folder.removesuffix("_files")
    return stem != folder and not {f"{stem}.html", f"{stem}.htm"}.isdisjoint(beside)

"""Filling the tile store: which tiles a recipe reads, which of them the store lacks, and the work on one block of them.

Two passes. The first finds the id of every tile (files not seen before are read and hashed); the second decodes, resizes and writes those
that the store lacks, a block of them a shard. Either pass is plain functions over lists, which this process runs by itself or Ray Data
spreads over a cluster (`cluster/preprocess.py`). A tile that cannot be decoded is a result and no failure: it is listed in the store's
quarantine.jsonl. Killed at any instruction, the job finds every finished block again; two jobs at once make the same shards.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from stairstep.records.places import ObjectFolder
from stairstep.settings import DataError, RecipeError, StairstepError, TileError
from stairstep.tiles import TEMPORAL, TileReader, index_archive
from stairstep.tiles.identity import Stamp
from stairstep.tiles.shelf import Shelf, shelf_at
from stairstep.tiles.store import Shard

from .loading import load_tiles, store_folder, tile_reader
from .packed import index_folder, not_indexed, open_archives
from .recipe import Recipe
from .tile_check import QUARANTINE, BadTile, quarantine_lines, quarantined

S = TypeVar("S")
T = TypeVar("T")
Spread = Callable[[Callable[[S], T], Sequence[S]], Iterable[T]]  # a function over items, results in any order

SHARD_TILES = 256
_HASHED_TOGETHER = 256
_ASKING = 16  # threads that ask for the state of files
_LOG_EVERY_S = 10.0
_SHOWN = 5
_FLOAT32_BYTES_PER_PIXEL = 3 * TEMPORAL * 4  # what the processor's `pixel_values` take for a pixel of a resized tile
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """A tile to be made: its id, its file, and the row or set that names it first."""

    id: str
    path: str
    where: str


@dataclass(frozen=True)
class Identified:
    """The id and stamp of a file's content, or what is wrong with it."""

    path: str
    id: str | None
    stamp: Stamp | None
    problem: str = ""


@dataclass(frozen=True)
class Filled:
    """What became of a block: its tiles, those made now and their bytes, the bad ones, files with another id than was known, and pixels."""

    asked: int
    made: int
    bytes: int
    bad: tuple[BadTile, ...]
    fresh: tuple[Identified, ...]
    pixels: int


@dataclass(frozen=True)
class Summary:
    """A finished job: tiles of the recipe, how many were there before, what was made, and how fast."""

    folder: Path | ObjectFolder
    files: int
    tiles: int
    there_before: int
    made: int
    stored_bytes: int
    float32_bytes: int
    bad: tuple[BadTile, ...]
    seconds: float
    stopped: bool

    def lines(self) -> list[str]:
        """The summary as a person reads it."""
        doubles = f" ({self.files - self.tiles:,} are copies of others)" if self.files != self.tiles else ""
        rate = f", {self.made / self.seconds:,.1f} tiles/s" if self.made else ""
        small = f"; {self.stored_bytes / 1e6:,.1f} MB, 1/{self.float32_bytes / self.stored_bytes:,.0f} of float32" if self.made else ""
        said = [
            f"{self.files:,} tile files{doubles}: {self.there_before:,} of {self.tiles:,} tiles were there, {self.made:,} were made "
            f"in {self.seconds:,.1f} s{rate}{small}",
            f"store: {self.folder}",
        ]
        if self.bad:
            said += [f"{len(self.bad):,} tiles cannot be used, all listed in {self.folder / QUARANTINE}:"]
            said += [f"  {one.reason} (named by {one.where})" for one in self.bad[:_SHOWN]]
        return [*said, "stopped; the same command goes on"] if self.stopped else said


def preprocess(recipe: Recipe, spread: Spread | None = None, stop: Callable[[], bool] = lambda: False) -> Summary:
    """Fill the store with every tile of a resolved recipe; `spread` runs the work, by default one block after the other in this process."""
    run: Spread = spread or map
    started = time.perf_counter()
    _index_archives(recipe, run, stop)
    archives = open_archives(recipe)
    named = load_tiles(recipe, archives)
    if not named:
        raise RecipeError("no row and no question set of this recipe names a tile; add data.train or evaluation.sets")
    reader = tile_reader(recipe, archives, stored=False)
    shelf = shelf_at(store_folder(recipe), reader.key)
    shelf.prepare()
    ids, bad, stopped = identify(list(named), reader, run, stop)
    problems = [BadTile(one.path, None, named[Path(one.path)], one.problem) for one in bad]
    distinct: dict[str, Path] = {}
    for path in named:
        if path in ids:
            distinct.setdefault(ids[path], path)
    shards = shelf.whole()
    there = shelf.ids(shards) & distinct.keys()
    before = len(there)
    wanted = [Wanted(one, str(path), named[path]) for one, path in distinct.items()]
    blocks = [block for block in _blocks(wanted, there) if block]
    _LOG.info("%d tile files, %d distinct tiles, %d are in the store; %d blocks to fill", len(named), len(distinct), before, len(blocks))
    done = made = pixels = size = 0
    progress = _Progress("preprocessed", sum(map(len, blocks)))
    if not stopped:
        for one in run(Filling(reader, shelf, shards), blocks):
            done, made, pixels, size = done + one.asked, made + one.made, pixels + one.pixels, size + one.bytes
            problems += one.bad
            reader.ids.put_all((Path(fresh.path), fresh.stamp, fresh.id) for fresh in one.fresh if fresh.stamp and fresh.id)
            progress.tell(done, len(problems))
            stopped = stop()
            if stopped:
                break
    shards = shelf.whole()  # with those of other jobs
    shelf.commit(shards)
    _write_quarantine(shelf, problems, set() if stopped else set(map(str, named)))
    if not stopped:
        _check_complete(shelf, shards, distinct.keys() - {one.id for one in problems})
    took = time.perf_counter() - started
    return Summary(
        shelf.where, len(named), len(distinct), before, made, size, pixels * _FLOAT32_BYTES_PER_PIXEL, tuple(problems), took, stopped
    )


def _write_quarantine(shelf: Shelf, problems: Sequence[BadTile], looked_at: set[str]) -> None:
    """List bad tiles, beside those that other jobs over the same store have listed and this one has not looked at."""
    mine = {one.tile for one in problems}
    listed = quarantined(shelf.get(QUARANTINE) or b"", str(shelf.where / QUARANTINE))
    others = [one for one in listed if one.tile not in looked_at and one.tile not in mine]
    shelf.put(QUARANTINE, quarantine_lines([*others, *problems]))


def _index_archives(recipe: Recipe, run: Spread, stop: Callable[[], bool]) -> None:
    """Index the archives that have no index yet, each on any machine: all of their bytes are read once."""
    missing = not_indexed(recipe)
    if missing:
        _LOG.info("%d archives are indexed", len(missing))
    for done, (path, problem) in enumerate(run(Indexing(index_folder(recipe)), [str(one) for one in missing]), start=1):
        if problem:
            raise DataError(problem)
        _LOG.info("indexed %s, %d of %d", path, done, len(missing))
        if stop():
            raise StairstepError("stopped while archives were indexed; the same command goes on")


def judge(summary: Summary, recipe: Recipe) -> None:
    """A DataError if more tiles are bad than the recipe accepts; the store holds all others nevertheless."""
    accepted = recipe.data.max_quarantined
    if len(summary.bad) > accepted:
        raise DataError(
            f"{len(summary.bad):,} tiles cannot be used, and data.max_quarantined accepts {accepted or 'none'}; the store holds the rest. "
            f"Mend these files and run this again, or go without them by data.max_quarantined={len(summary.bad)}; they are listed in "
            f"{summary.folder / QUARANTINE}"
        )


def identify(
    paths: Sequence[Path], reader: TileReader, run: Spread, stop: Callable[[], bool]
) -> tuple[dict[Path, str], list[Identified], bool]:
    """The id of every file, the files that cannot be read, and whether it was stopped; what was found is remembered by `reader.ids`."""
    found: dict[Path, str] = {}
    bad: list[Identified] = []
    unknown: list[str] = []

    def known(path: Path) -> str | TileError | None:
        try:
            return reader.known_id(path)
        except TileError as error:
            return error

    with ThreadPoolExecutor(_ASKING) as pool:  # a file server answers many questions at once
        for path, told in zip(paths, pool.map(known, paths), strict=True):
            if isinstance(told, TileError):
                bad.append(Identified(str(path), None, None, str(told)))
            elif told is None:
                unknown.append(str(path))
            else:
                found[path] = told
    groups = [unknown[start : start + _HASHED_TOGETHER] for start in range(0, len(unknown), _HASHED_TOGETHER)]
    progress, done = _Progress("hashed", len(unknown)), 0
    for results in run(Hashing(reader), groups):
        bad += [one for one in results if one.id is None]
        found.update((Path(one.path), one.id) for one in results if one.id is not None)
        reader.ids.put_all((Path(one.path), one.stamp, one.id) for one in results if one.id is not None and one.stamp is not None)
        done += len(results)
        progress.tell(done, len(bad))
        if stop():
            return found, bad, True
    return found, bad, False


class Indexing:
    """Indexes an archive, and keeps its index where every machine finds it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, archive: str) -> tuple[str, str]:
        """The archive, and what is wrong with it."""
        try:
            index_archive(archive, self.folder)
        except DataError as error:
            return archive, str(error)
        return archive, ""


class Hashing:
    """Reads files and hashes them: the first pass, on any machine that sees them."""

    def __init__(self, reader: TileReader) -> None:
        self.reader = reader.without_index()

    def __call__(self, paths: Sequence[str]) -> list[Identified]:
        """Each file's id, or what is wrong with it."""
        return [self.one(path) for path in paths]

    def one(self, path: str) -> Identified:
        """A file's id, or what is wrong with it."""
        try:
            return Identified(path, *self.reader.read_id(Path(path)))
        except TileError as error:
            return Identified(path, None, None, str(error))


class Filling:
    """Makes the shard of a block: the second pass, on any machine that sees the files and the store. `known`: the shards of the plan."""

    def __init__(self, reader: TileReader, shelf: Shelf, known: Iterable[Shard] = ()) -> None:
        self.reader, self.shelf = reader.without_index(), shelf
        self._known = {one.file for one in known}
        self._others: set[str] = set()  # what other jobs have made since the plan

    def __call__(self, block: Sequence[Wanted]) -> Filled:
        """Decode, resize and write what no other job has made meanwhile."""
        self._look()
        work = _Work(self.reader, [one for one in block if one.id not in self._others])
        shard = self.shelf.write(work.tiles())
        made = 0 if shard is None else shard.tiles
        return Filled(len(block), made, 0 if shard is None else shard.bytes, tuple(work.bad), tuple(work.fresh), work.pixels)

    def _look(self) -> None:
        """Take in the shards that have come since the plan, this job's own among them."""
        for name in self.shelf.names():
            if name not in self._known:
                self._known.add(name)
                try:
                    self._others |= self.shelf.ids([Shard(name, 0, 0)])
                except DataError as error:
                    _LOG.warning("%s; its tiles are made again", error)


class _Work:
    """One block on its way into a shard: what was bad, what had another id than expected, and how many pixels were made."""

    def __init__(self, reader: TileReader, block: Sequence[Wanted]) -> None:
        self.reader, self.block = reader, block
        self.bad: list[BadTile] = []
        self.fresh: list[Identified] = []
        self.pixels = 0

    def tiles(self) -> Iterator[tuple[str, Tensor]]:
        """The good tiles of the block."""
        for one in self.block:
            try:
                tile = self.reader.load(one.path)
            except TileError as error:
                self.bad.append(BadTile(one.path, one.id, one.where, str(error)))
                continue
            except (OSError, MemoryError):
                raise
            except Exception as error:  # noqa: BLE001 - one odd tile does not end the work on all the others; it is named
                said = f"{one.path}: this tile cannot be decoded ({type(error).__name__}: {error})"
                self.bad.append(BadTile(one.path, one.id, one.where, said))
                continue
            if tile.id != one.id:
                self.bad.append(BadTile(one.path, one.id, one.where, f"{one.path}: this file was changed; run this again"))
                self.fresh.append(Hashing(self.reader).one(one.path))
                continue
            self.pixels += tile.pixels.shape[1] * tile.pixels.shape[2]
            yield tile.id, tile.pixels


def _blocks(wanted: Sequence[Wanted], there: set[str]) -> Iterator[list[Wanted]]:
    """The blocks, the same for every job over the same recipe whatever the store holds, each less the tiles that are there.

    A job begins at a place of its own, so that of two jobs at once one finds the other's work done.
    """
    count = -(-len(wanted) // SHARD_TILES)
    first = secrets.randbelow(count) if count else 0
    for number in (*range(first, count), *range(first)):
        yield [one for one in wanted[number * SHARD_TILES : (number + 1) * SHARD_TILES] if one.id not in there]


def _check_complete(shelf: Shelf, shards: Sequence[Shard], expected: set[str]) -> None:
    lost = expected - shelf.ids(shards)
    if lost:
        raise StairstepError(
            f"{shelf.where}: {len(lost):,} of {len(expected):,} tiles are neither in the store nor in its quarantine, "
            f"for example {min(lost)}. "
            "Is this folder (tiles.store) the same on all nodes, and may all of its files be read? Then run this again"
        )


class _Progress:
    """A line of the log now and then: how much is done, how fast, and how long it will take."""

    def __init__(self, verb: str, total: int) -> None:
        self.verb, self.total = verb, total
        self.told = time.monotonic()
        self.first: tuple[float, int] | None = None  # the clock runs from the first result, not through the start of processes

    def tell(self, done: int, bad: int) -> None:
        """Tell, if the last line was long ago."""
        now = time.monotonic()
        if self.first is None:
            self.first = now, done
        if now - self.told < _LOG_EVERY_S or done == self.first[1]:
            return
        self.told = now
        rate = (done - self.first[1]) / (now - self.first[0])
        left = int((self.total - done) / rate)
        _LOG.info(
            "%s %d of %d tiles, %.1f tiles/s, %d bad; about %d:%02d to go", self.verb, done, self.total, rate, bad, left // 60, left % 60
        )

"""The check before the first step: every tile that a run will read is decoded once, so that a bad one is told now and not at step 217.

Tiles found good are remembered by (path, size, modification time) under the run root: the next run asks only for each file's status. Bad
ones are listed in quarantine.jsonl. More of them than `data.max_quarantined` are a refusal; fewer are taken out of rows and question sets,
the same on every worker. A run that goes on keeps the quarantine that it began with, for with other rows it would be another run.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from stairstep.data import PairRow, QuestionSet
from stairstep.objectives import Collective
from stairstep.records.files import raw_lines_in, read_json_lines, write_atomically
from stairstep.settings import DataError, TileError
from stairstep.tiles import TileIds, TileReader
from stairstep.tiles.identity import Stamp

from .loading import RetrievalRows, tiles_of
from .placing import local_root
from .recipe import Recipe

QUARANTINE = "quarantine.jsonl"

_LOG = logging.getLogger(__name__)
_LOG_EVERY_S = 10.0
_SHOWN = 5
_PATHS_PER_TASK = 256
_STAT_WORKERS = 16


@dataclass(frozen=True)
class BadTile:
    """A line of quarantine.jsonl: the tile's file, its id where its bytes can be read, who names it first, and what is wrong."""

    tile: str
    id: str | None
    where: str
    reason: str


def check_tiles(
    rows: RetrievalRows,
    recipe: Recipe,
    reader: TileReader,
    quarantine: Path,
    workers: Collective,
    begun: bool = False,
    alive: Callable[[], None] = lambda: None,
    shared: Callable[[], object] = lambda: None,
) -> RetrievalRows:
    """The rows without bad tiles, or a DataError that names them; every worker calls this, the first one looks.

    `quarantine`: the file to list them in; `begun`: the run has a checkpoint, its rows may not change; `alive` is called now and then;
    `shared` has the first one's file seen, and then the others see it.
    """
    if not recipe.data.check_tiles:
        return rows
    if workers.rank == 0:
        bad = find_bad_tiles(tiles_of(rows), reader, good_tiles(recipe), alive)
        if begun:
            bad = _as_begun(bad, read_quarantine(quarantine))
        _write(quarantine, bad)
        _judge(bad, recipe.data.max_quarantined, quarantine)
        if workers.size > 1:
            shared()
    workers.barrier()
    if workers.rank != 0:
        shared()
    return without({Path(one.tile) for one in read_quarantine(quarantine)}, rows)


def good_tiles(recipe: Recipe) -> TileIds:
    """The tiles that were found good under the run root, under the limit on an image's pixels that they were found good under."""
    return TileIds(local_root(recipe) / f"tiles-good-{recipe.tiles.max_image_pixels}.jsonl")


def find_bad_tiles(tiles: Mapping[Path, str], reader: TileReader, good: TileIds, alive: Callable[[], None] = lambda: None) -> list[BadTile]:
    """The tiles that cannot be had, in their order; those in `good` or the store are not opened, those found good are added to `good`."""
    stamps = {path: stamp for path, stamp in _not_known(list(tiles), reader, good).items() if not reader.has_stored(path)}
    bad: list[BadTile] = []
    started = told = time.monotonic()
    with reader.ahead(stamps) as decoded:
        for done, (path, stamp) in enumerate(stamps.items()):
            alive()
            if time.monotonic() - told >= _LOG_EVERY_S:
                told = time.monotonic()
                left = (told - started) / done * (len(stamps) - done) if done else 0.0
                _LOG.info("checked %d of %d tiles, %d bad; about %.0f s to go", done, len(stamps), len(bad), left)
            try:
                tile = next(decoded)
            except TileError as error:
                bad.append(BadTile(str(path), _id(path, reader), tiles[path], str(error)))
            else:
                if stamp is not None:
                    good.put(path, stamp, tile.id)
    took = time.monotonic() - started
    _LOG.info("Checked %d tiles in %.1f s, %d bad; %d more were known to be good", len(stamps), took, len(bad), len(tiles) - len(stamps))
    return bad


def quarantine_lines(bad: Iterable[BadTile]) -> str:
    """The text of a quarantine.jsonl."""
    return "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in bad)


def read_quarantine(path: Path) -> list[BadTile]:
    """The bad tiles that a quarantine.jsonl lists; no file is an empty list."""
    return [BadTile(**line) for line in read_json_lines(path)] if path.exists() else []


def quarantined(text: bytes, where: str) -> list[BadTile]:
    """The bad tiles that the lines of a quarantine list; `where` is what it is called in messages."""
    return [BadTile(**line) for _, line in raw_lines_in(text, where)]


def without(bad: Collection[Path], rows: RetrievalRows) -> RetrievalRows:
    """The rows without some tiles: a row goes with its positive, a negative and a candidate alone; counted in the log."""
    if not bad:
        return rows
    pairs = [*rows.train, *rows.validation]
    lost_rows = sum(row.positive in bad for source in pairs for row in source)
    lost_negatives = sum(path in bad for source in pairs for row in source if row.positive not in bad for path in row.negatives)
    lost_candidates = sum(tile.path in bad for one in rows.question_sets for tile in one.tiles)
    _LOG.warning(
        "%d bad tiles are left out: %d rows whose positive is one, %d hard negatives, %d candidates of question sets",
        len(bad),
        lost_rows,
        lost_negatives,
        lost_candidates,
    )
    return replace(
        rows,
        train=tuple(_pairs_without(bad, source) for source in rows.train),
        validation=tuple(_pairs_without(bad, source) for source in rows.validation),
        question_sets=tuple(_set_without(bad, one) for one in rows.question_sets),
    )


def _not_known(paths: Sequence[Path], reader: TileReader, good: TileIds) -> dict[Path, Stamp | None]:
    """The paths that are not known to be good, with their stamps; in threads, because a file server answers many questions at once."""

    def ask(start: int) -> list[tuple[Path, Stamp | None]]:
        asked = [(path, _stamp(path, reader)) for path in paths[start : start + _PATHS_PER_TASK]]
        return [(path, stamp) for path, stamp in asked if stamp is None or good.get(path, stamp) is None]

    with ThreadPoolExecutor(_STAT_WORKERS) as pool:
        return dict(one for part in pool.map(ask, range(0, len(paths), _PATHS_PER_TASK)) for one in part)


def _stamp(path: Path, reader: TileReader) -> Stamp | None:
    try:
        return reader.stamp(path)
    except TileError:
        return None


def _id(path: Path, reader: TileReader) -> str | None:
    try:
        return reader.id(path)
    except TileError:
        return None


def _as_begun(bad: list[BadTile], before: list[BadTile]) -> list[BadTile]:
    """The quarantine that the run began with; a tile that has gone bad since then is an error."""
    known = {one.tile for one in before}
    fresh = [one for one in bad if one.tile not in known]
    if fresh:
        raise DataError(
            f"{_count(len(fresh))} could be used when this run began and cannot now, so it cannot go on as the run that it was; "
            f"bring the files back, or begin a new run:\n{_listed(fresh)}"
        )
    mended = len(before) - len(bad)
    if mended:
        _LOG.warning("%s of the quarantine are good by now; this run goes on without them, as it began", _count(mended))
    return before


def _write(path: Path, bad: Iterable[BadTile]) -> None:
    text = quarantine_lines(bad)
    if text:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    else:
        path.unlink(missing_ok=True)


def _judge(bad: Sequence[BadTile], accepted: int, quarantine: Path) -> None:
    if len(bad) > accepted:
        raise DataError(
            f"{_count(len(bad))} cannot be used, and data.max_quarantined accepts {accepted or 'none'}; mend or remove them "
            f"(all are listed in {quarantine}), or go without them by data.max_quarantined={len(bad)}:\n{_listed(bad)}"
        )


def _count(number: int) -> str:
    return f"{number} tile{'' if number == 1 else 's'}"


def _listed(bad: Sequence[BadTile]) -> str:
    shown = "\n".join(f"  {one.reason} (named by {one.where})" for one in bad[:_SHOWN])
    return shown + (f"\n  and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else "")


def _pairs_without(bad: Collection[Path], source: Sequence[PairRow]) -> list[PairRow]:
    kept = []
    for row in source:
        if row.positive in bad:
            continue
        negatives = tuple(path for path in row.negatives if path not in bad)
        kept.append(row if len(negatives) == len(row.negatives) else replace(row, negatives=negatives))
    return kept


def _set_without(bad: Collection[Path], one: QuestionSet) -> QuestionSet:
    tiles = tuple(tile for tile in one.tiles if tile.path not in bad)
    if not tiles:
        raise DataError(f"{one.where}: none of its {len(one.tiles)} candidate tiles can be used; render or fetch them again")
    have = {tile.article for tile in tiles}
    golden = dict.fromkeys(article for question in one.questions for article in question.golden)
    return replace(one, tiles=tiles, unreachable=tuple(article for article in golden if article not in have))

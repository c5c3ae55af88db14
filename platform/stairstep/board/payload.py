"""What the page knows of questions: their texts once, and per evaluation one letter a question, so that any two can be compared in it.

The letter says where the golden tile stood and what became of the answer. Answers and retrieved tiles are shipped for runs that were
named themselves, not for a sweep's trials. What would make the page too large is left out, the middle evaluations first, and told.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stairstep.evaluation.questions_answered import STATES
from stairstep.records import digest_of_json
from stairstep.settings import DataError, InputError

from .compute import label
from .read import Board, Evaluation, Folders, Row

TILES_SHOWN = 3
_PLACES = 3  # not among the first three, among them, first
_KEYS = ("id", "problem", "answer", "golden_ids")


@dataclass(frozen=True)
class Asked:
    """One evaluation's outcome of every question of its set, and its details: by question [answer, reason, golden rank, tiles]."""

    run: str
    label: str
    step: int
    set: int
    letters: str
    coverage: float | None
    floor: float
    details: Sequence[Any] | None
    evaluation: Evaluation


@dataclass(frozen=True)
class Questions:
    """Question sets, each a list of [id, question, answer, golden articles], and the evaluations over them."""

    sets: Sequence[Sequence[Any]]
    asked: Sequence[Asked]
    notes: Sequence[str] = ()

    def plain(self, pictures: Mapping[str, str] | None = None) -> dict[str, Any]:
        """As the page reads it; a tile is named by the place of its picture, for ids are long and do not compress."""
        places = {tile: place for place, tile in enumerate(pictures or {})}
        keys = ("run", "label", "step", "set", "letters", "coverage", "floor")
        asked = [{**{key: getattr(one, key) for key in keys}, "details": _placed(one.details, places)} for one in self.asked]
        return {"sets": self.sets, "asked": asked, "states": ["", *STATES]}


def _placed(details: Sequence[Any] | None, places: Mapping[str, int]) -> Sequence[Any] | None:
    """Details with the place of each tile's picture, or -1, instead of its id."""
    if details is None:
        return None
    return [[*said, [[*tile[:3], places.get(tile[3], -1)] for tile in tiles]] for *said, tiles in details]


def letter(row: Row) -> str:
    """A question's outcome as one letter: A + state (none, then STATES) + 6 × place of the golden tile (nowhere, first three, first)."""
    place = 2 if row["hit@1"] else 1 if row["hit@3"] else 0
    state = STATES.index(row["state"]) + 1 if row.get("state") in STATES else 0
    return chr(ord("A") + place * (len(STATES) + 1) + state)


def questions(board: Board, folders: Folders) -> Questions:
    """Every evaluation of the primary question sets; rows that cannot be read are told instead."""
    sets: dict[str, _Set] = {}
    asked, notes = [], []
    for run in board.runs:
        for one in run.evaluations:
            try:
                found = folders.of_rows(one, "outcomes", lambda rows: _outcomes(rows, details=not board.is_sweep))
            except (DataError, InputError) as error:
                notes.append(str(error))
                continue
            if found.key not in sets:
                texts = [[row.get(key) for key in _KEYS] for row in folders.rows(one)]
                sets[found.key] = _Set(len(sets), texts, _order([str(text[0]) for text in texts]))
            into = sets[found.key]
            letters = "".join(found.letters[place] for place in into.order)
            details = None if found.details is None else [found.details[place] for place in into.order]
            asked.append(Asked(run.name, label(run), one.step, into.number, letters, one.coverage, one.floor, details, one))
    return Questions([one.texts for one in sets.values()], asked, notes)


@dataclass(frozen=True)
class _Set:
    """A question set as the page has it; `order`: of each question in the page's order, its place among the sorted ids."""

    number: int
    texts: Sequence[Any]
    order: Sequence[int]


@dataclass(frozen=True)
class _Outcomes:
    """What is kept of an evaluation's rows, by sorted ids: a letter a question, so that hundreds of evaluations fit into memory."""

    key: str
    letters: str
    details: Sequence[Any] | None


def _outcomes(rows: Sequence[Row], details: bool) -> _Outcomes:
    ordered = sorted(rows, key=lambda row: str(row["id"]))
    key = digest_of_json([[row.get(key) for key in _KEYS] for row in ordered])
    return _Outcomes(key, "".join(map(letter, ordered)), [_detail(row) for row in ordered] if details else None)


def _order(ids: Sequence[str]) -> list[int]:
    places = {name: place for place, name in enumerate(sorted(ids))}
    return [places[name] for name in ids]


def _detail(row: Row) -> list[Any]:
    ranks = [rank for rank in row.get("golden_ranks", ()) if rank is not None]
    tiles = [
        [one["article"], one.get("path", ""), round(one.get("score", 0.0), 3), one.get("tile", "")]
        for one in row["retrieved"][:TILES_SHOWN]
    ]
    return [row.get("predicted"), row.get("reason"), min(ranks, default=None), tiles]


def packed(value: Any) -> str:
    """JSON, compressed, as text that can stand in a page whatever it holds."""
    return squeezed(json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode())


def squeezed(data: bytes) -> str:
    """Compressed bytes as base64; equal bytes give equal text."""
    return base64.b64encode(gzip.compress(data, 9, mtime=0)).decode("ascii")


def smaller(found: Questions) -> Iterator[tuple[Questions, str]]:
    """The same with less and less, each with what was left out."""
    yield found, ""
    ends = {
        one.run: (min(two.step for two in found.asked if two.run == one.run), max(two.step for two in found.asked if two.run == one.run))
        for one in found.asked
    }
    middle = [replace(one, details=one.details if one.step in ends[one.run] else None) for one in found.asked]
    yield (
        replace(found, asked=middle),
        "answers and tiles are of each run's first and last evaluation only: with all, the page would be too large; --csv has every number",
    )
    last = [replace(one, details=one.details if one.step == ends[one.run][1] else None) for one in found.asked]
    yield (
        replace(found, asked=last),
        "answers and tiles are of each run's last evaluation only: with all, the page would be too large; --csv has every number",
    )
    bare = replace(found, asked=[replace(one, details=None) for one in found.asked])
    yield bare, "answers and tiles are left out: with them, the page would be too large; --csv has every number"
    short = [[[text[0], _start(text[1], 60), _start(text[2], 20), []] for text in texts] for texts in bare.sets]
    yield (
        replace(bare, sets=short),
        "answers, tiles and the ends of long questions are left out: with them, the page would be too large; --csv has every number",
    )
    yield Questions([], []), "questions are left out: with them, the page would be too large; jobs.compare compares any two runs"


def _start(text: Any, length: int) -> Any:
    return text if not isinstance(text, str) or len(text) <= length else text[: length - 1] + "…"


def wanted_tiles(found: Questions, count: int) -> Iterator[tuple[Asked, Mapping[str, str]]]:
    """The evaluations whose tiles are shown, each with tile ids and their paths: the first questions' of each run's last evaluation."""
    ends = {one.run: one for one in found.asked if one.details is not None}
    for one in ends.values():
        tiles: dict[str, str] = {}
        for _, _, _, listed in one.details or ():
            for _, path, _, tile in listed:
                if tile and path and len(tiles) < -(-count // len(ends)):
                    tiles[tile] = path
        yield one, tiles

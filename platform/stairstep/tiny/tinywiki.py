"""Tinywiki: a small world of screenshot-like pages with pairs, text pairs and a question set, in the formats and file layout of seed 000.

A world is a function of its settings and of `GENERATOR`, on every machine and Python: each part draws from a `random.Random` seeded by
name. It is complete or absent: written under another name and renamed, so concurrent callers are safe. Its splits share no article, and its
pairs ask plainly while its text pairs and its question set also paraphrase: what the world wants to be learned from text.

    <folder>/tinywiki-<seed>-<digest>/
      train_hn.jsonl  eval_hn.jsonl  test_hn.jsonl  images/shard_000/<article>_chunk_<n>.png
      text/chunk_000/filtered_hn.jsonl
      test/tinywiki.json  test/tiles/<article>_chunk_<n>.png  test/tiles/dist_<article>_chunk_<n>.png
      world.json                                        the settings and the generator's version: the mark of a whole world
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stairstep.data.settings import WorldSettings
from stairstep.settings import DataError, to_plain

from .articles import Article, Library
from .asking import Asked, Neighbours, ask_about
from .render import write_png

GENERATOR = 2
MARKER = "world.json"
QUESTION_SET = "test/tinywiki.json"
_PER_ARTICLE = 3
_PER_SHARD = 300
_PER_TEXT_CHUNK = 1000


@dataclass(frozen=True)
class Split:
    """Articles and the questions asked about them; distractors are articles that nothing is asked about."""

    articles: tuple[Article, ...]
    asked: tuple[Asked, ...]
    distractors: frozenset[str] = frozenset()

    @cached_property
    def neighbours(self) -> Neighbours:
        """The hard negatives among the split's articles."""
        return Neighbours(self.articles)


@dataclass(frozen=True)
class World:
    """A world in memory, its pages not yet drawn."""

    settings: WorldSettings
    pairs: dict[str, Split]
    text: Split
    questions: Split


def build_world(settings: WorldSettings) -> World:
    """The world of some settings."""
    held_out = max(1, settings.pairs // 10)
    taken: set[str] = set()
    questions = _questions(settings, taken)  # first, so that it stays the same under other numbers of pairs
    sizes = {"eval": held_out, "test": held_out, "train": settings.pairs}
    pairs = {name: _pairs(settings, name, rows, 0.0, taken) for name, rows in sizes.items()}
    text = _pairs(settings, "text", settings.text_pairs, settings.paraphrases, taken)
    return World(settings, pairs, text, questions)


def _rng(settings: WorldSettings, part: str) -> random.Random:
    return random.Random(f"tinywiki/{GENERATOR}/{settings.seed}/{part}")


def _library(settings: WorldSettings, part: str, taken: set[str]) -> Library:
    rng = _rng(settings, f"{part}/articles")
    return Library(rng, settings.near_duplicates, settings.layout_shift, taken=taken)


def _pairs(settings: WorldSettings, name: str, rows: int, paraphrases: float, taken: set[str]) -> Split:
    rng = _rng(settings, name)
    library = _library(settings, name, taken)
    articles: list[Article] = []
    asked: list[Asked] = []
    while len(asked) < rows:
        family = library.family(3)
        articles += family
        for article in family:
            asked += ask_about(rng, article, _PER_ARTICLE, paraphrases)
    del asked[rows:]
    rng.shuffle(asked)
    return Split(tuple(articles), tuple(asked))


def _questions(settings: WorldSettings, taken: set[str]) -> Split:
    """The question set: the first article of each family is asked about, its siblings and some others are distractors."""
    rng = _rng(settings, "questions")
    library = _library(settings, "questions", taken)
    subjects: list[Article] = []
    distractors: list[Article] = []
    want = settings.articles - settings.articles // 2
    while len(subjects) < want:
        subject, *siblings = library.family(1 + min(2, settings.articles - want - len(distractors)))
        subjects.append(subject)
        distractors += siblings
    while len(subjects) + len(distractors) < settings.articles:
        distractors += library.family(settings.articles - len(subjects) - len(distractors))
    each, more = divmod(settings.questions, want)
    asked: list[Asked] = []
    for index, subject in enumerate(subjects):
        asked += ask_about(rng, subject, each + (index < more), settings.paraphrases)
    rng.shuffle(asked)
    return Split((*subjects, *distractors), tuple(asked), frozenset(article.id for article in distractors))


def world_digest(settings: WorldSettings) -> str:
    """What a world's content depends on, in one short word."""
    return hashlib.sha256(json.dumps(_identity(settings), sort_keys=True).encode()).hexdigest()[:10]


def _identity(settings: WorldSettings) -> dict[str, Any]:
    plain = {key: value for key, value in to_plain(settings).items() if key != "folder"}
    return {"generator": GENERATOR, "settings": plain}


def world_name(settings: WorldSettings) -> str:
    """The name of the world's folder, which says all that it depends on."""
    return f"tinywiki-{settings.seed}-{world_digest(settings)}"


def ensure_world(settings: WorldSettings, folder: Path) -> Path:
    """The folder of the world inside `folder`, where worlds are kept; generated when it is not there."""
    final = Path(folder) / world_name(settings)
    if not final.exists():
        try:
            _generate(settings, final)
        except OSError as error:
            if not final.exists():  # otherwise another process was faster, with the same content
                raise DataError(
                    f"{final}: this tinywiki world cannot be written: {error}; set data.world.folder to another place"
                ) from None
    return _checked(final, settings)


def _generate(settings: WorldSettings, final: Path) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        write_world(build_world(settings), draft)
        draft.chmod(0o755)
        draft.rename(final)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _checked(final: Path, settings: WorldSettings) -> Path:
    try:
        found = json.loads((final / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{final}: this tinywiki world has no readable {MARKER} ({error}); delete the folder and start again") from None
    if found != _identity(settings):
        raise DataError(f"{final / MARKER}: this is the mark of another world than the recipe's; delete the folder and start again")
    return final


def write_world(world: World, folder: Path) -> None:
    """All files of a world, its mark last."""
    shard = 0
    for name, split in world.pairs.items():
        shard = _write_pairs(split, _rng(world.settings, f"{name}/negatives"), folder, f"{name}_hn.jsonl", shard)
    _write_text(world.text, _rng(world.settings, "text/negatives"), folder / "text")
    _write_questions(world, folder)
    _write_json(folder / MARKER, _identity(world.settings))


def _write_pairs(split: Split, rng: random.Random, folder: Path, name: str, shard: int) -> int:
    """One split's rows and the tiles that they name; returns the number of the next free shard."""
    shards = {article.id: shard + index // _PER_SHARD for index, article in enumerate(split.articles)}
    tiles: dict[str, tuple[Article, int]] = {}

    def path(article: Article, chunk: int) -> str:
        where = f"images/shard_{shards[article.id]:03d}/{article.tile_name(chunk)}"
        tiles[where] = (article, chunk)
        return where

    rows = [
        {
            "query": asked.text,
            "chunk_path": path(asked.article, asked.fact.chunk),
            "neg_chunk_paths": [path(article, chunk) for article, chunk in split.neighbours.of(rng, asked)],
        }
        for asked in split.asked
    ]
    _write_rows(folder / name, rows)
    _write_tiles(folder, tiles)
    return shard + (len(split.articles) + _PER_SHARD - 1) // _PER_SHARD


def _write_text(split: Split, rng: random.Random, folder: Path) -> None:
    rows = [
        {
            "query": asked.text,
            "passage": asked.article.passage(asked.fact.chunk),
            "neg_passages": [article.passage(chunk) for article, chunk in split.neighbours.of(rng, asked)],
        }
        for asked in split.asked
    ]
    for index in range(0, len(rows), _PER_TEXT_CHUNK):
        chunk = folder / f"chunk_{index // _PER_TEXT_CHUNK:03d}"
        chunk.mkdir(parents=True)
        _write_rows(chunk / "filtered_hn.jsonl", rows[index : index + _PER_TEXT_CHUNK])


def _write_questions(world: World, folder: Path) -> None:
    split = world.questions
    tiles = {
        f"test/tiles/{article.tile_name(chunk, article.id in split.distractors)}": (article, chunk)
        for article in split.articles
        for chunk in range(len(article.pages))
    }
    _write_tiles(folder, tiles)
    ids = [f"tw{world.settings.seed}-{index:04d}" for index in range(len(split.asked))]
    tree = {
        "description": f"Tinywiki, world {world.settings.seed}: {len(ids)} questions, {len(tiles)} tiles, {len(split.articles)} articles",
        "tiles_dir": "test/tiles",
        "questions": [{"id": name, "problem": asked.text, "answer": asked.answer} for name, asked in zip(ids, split.asked, strict=True)],
        "golden_mapping": {name: [asked.article.id] for name, asked in zip(ids, split.asked, strict=True)},
    }
    _write_json(folder / QUESTION_SET, tree)


def _write_tiles(folder: Path, tiles: dict[str, tuple[Article, int]]) -> None:
    for parent in sorted({os.path.dirname(name) for name in tiles}):
        (folder / parent).mkdir(parents=True, exist_ok=True)
    for name, (article, chunk) in tiles.items():
        write_png(folder / name, article.pages[chunk].render())


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

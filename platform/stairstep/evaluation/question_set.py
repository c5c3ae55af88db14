"""One evaluation of one encoder state: on a question set, or on a held-out sample of query–tile pairs.

Both give rows, one a question or pair in the order of the input, and a summary: scores with intervals, counts, and where the time
went. Rows hold nothing that depends on the machine or the moment (tile paths are relative to the set's tile folder, which the
summary names), so two evaluations of one state write the same bytes. A row has neither answer nor grade: readers and graders add theirs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stairstep.data.questions import Question, QuestionSet, is_selection
from stairstep.data.rows import PairRow
from stairstep.records import result_paths
from stairstep.records.files import write_atomically, write_json
from stairstep.records.places import below
from stairstep.settings import DataError

from .embed import EmbeddedTexts, EmbeddedTiles, Embedder, EmbedReport, EncoderLike, ReaderLike, Told, nobody
from .embeddings import EmbeddingStore
from .on_objects import open_embeddings
from .questions_answered import QAScore, qa_score
from .ranking import Candidates, ranks
from .retrieval import ARTICLE_METRICS, HITS, PAIR_METRICS, Retrieved, article_metrics, pair_metrics, retrieve, scores_of
from .settings import EvaluationSettings
from .statistics import Interval

READER_TILES = 3  # tiles that a row names as top3_*, which is what a reader is shown
PAIRS_NAME = "held_out_pairs"
_REASONS = 5

Row = dict[str, Any]


@dataclass(frozen=True)
class RetrievalResult:
    """Rows and scores of one evaluation; `selection` and `report` are the scores of the two parts of a question set."""

    name: str
    rows: tuple[Row, ...]
    scores: Mapping[str, Interval]
    selection: Mapping[str, Interval]
    report: Mapping[str, Interval]
    facts: Mapping[str, Any]
    qa: Mapping[str, QAScore] = dataclasses.field(default_factory=dict)  # of all questions, of `selection` and of `report`

    def answered(
        self, rows: Sequence[Row], settings: EvaluationSettings, seconds: Mapping[str, float], calls: Mapping[str, Any]
    ) -> RetrievalResult:
        """The same result with its rows answered and graded, and what that took."""
        timings = {**self.facts["timings"], **{part: round(value, 3) for part, value in seconds.items()}}
        facts = {**self.facts, **answer_facts(rows, settings.top_k_read), "calls": dict(calls), "timings": timings}
        return dataclasses.replace(self, rows=tuple(rows), qa=qa_scores(rows, settings), facts=facts)

    def summary(self) -> dict[str, Any]:
        """What `write_summary` writes: JSON values alone."""
        parts = {"metrics": self.scores, "selection": self.selection, "report": self.report}
        return {
            "name": self.name,
            **{part: {name: _plain(one) for name, one in scores.items()} for part, scores in parts.items()},
            **({"qa": {name: one.plain() for name, one in self.qa.items()}} if self.qa else {}),
            **self.facts,
        }

    def metrics(self) -> dict[str, float]:
        """The scores alone as `<name>/<metric>`, for the metric log."""
        found = {f"{self.name}/{metric}": one.value for metric, one in self.scores.items()}
        known = self.qa["all"].interval if self.qa else None
        return found | ({f"{self.name}/qa_score": known.value} if known is not None else {})


def qa_scores(rows: Sequence[Row], settings: EvaluationSettings) -> dict[str, QAScore]:
    """The QA score of all questions, of the selection split and of the rest, and by whether the reader was shown a golden article's tile:
    the first part of these two is about the reader, and their ratio about the retriever."""
    parts = {
        "all": lambda row: True,
        "selection": lambda row: row["split"] == "selection",
        "report": lambda row: row["split"] == "report",
        "retrieved": lambda row: golden_shown(row, settings.top_k_read),
        "missed": lambda row: not golden_shown(row, settings.top_k_read),
    }
    return {name: qa_score([row for row in rows if belongs(row)], settings.coverage_floor) for name, belongs in parts.items()}


def answer_facts(rows: Sequence[Row], top_k_read: int) -> dict[str, Any]:
    """What a summary says of answered rows besides scores: how much the reader was shown, and why answers or grades are missing."""
    reasons = Counter(row["reason"] for row in rows if row["state"] in ("unanswered", "ungraded"))
    return {
        "top_k_read": top_k_read,
        "missing": [{"reason": reason, "questions": count} for reason, count in reasons.most_common(_REASONS)],
    }


def golden_shown(row: Mapping[str, Any], top_k_read: int) -> bool:
    """Whether a tile of a golden article is among the first that the reader was shown."""
    return any(one["article"] in row["golden_ids"] for one in row["retrieved"][:top_k_read])


def open_store(settings: EvaluationSettings, root: str | Path) -> EmbeddingStore | None:
    """The store of embeddings that the settings ask for; its folder lies under `root` unless they name another."""
    if not settings.cache:
        return None
    return open_embeddings(below(root, settings.cache_folder or "embeddings"), settings.cache_states)


def evaluate_question_set(
    encoder: EncoderLike,
    reader: ReaderLike,
    question_set: QuestionSet,
    settings: EvaluationSettings,
    store: EmbeddingStore | None,
    tile_encoder: EncoderLike | None = None,
    told: Told = nobody,
) -> RetrievalResult:
    """Rank all tiles of the set for each of its questions; `told` hears how far the embedding is.

    `tile_encoder` embeds the tiles in place of `encoder` where the two sides differ (query-side tuning).
    """
    if not question_set.questions or not question_set.tiles:
        raise DataError(f"{question_set.where}: a question set needs at least one question and one tile")
    clock = _Clock()
    queries, tiles = _embed(
        encoder,
        tile_encoder,
        reader,
        [one.problem for one in question_set.questions],
        [one.path for one in question_set.tiles],
        settings,
        store,
        told,
    )
    clock.lap("embed_s")

    articles = [one.article for one in question_set.tiles]
    paths = [_relative(one.path, question_set.tiles_dir) for one in question_set.tiles]
    device = _search_device(encoder)
    candidates = Candidates.of(tiles.vectors.to(device), list(zip(tiles.ids, paths, strict=True)), tiles.rows)
    golden = [one.golden for one in question_set.questions]
    found = retrieve(queries.vectors.to(device), candidates, articles, golden, max(settings.top_k, *HITS))
    clock.lap("search_s")

    rows = []
    for question, one in zip(question_set.questions, found, strict=True):
        listed = [
            {"path": paths[index], "article": articles[index], "tile": tiles.ids[index], "score": score}
            for index, score in zip(one.top, one.scores, strict=True)
        ]
        rows.append(_question_row(question, one, listed, settings))
    parts = {part: scores_of([row for row in rows if row["split"] == part], ARTICLE_METRICS) for part in ("selection", "report")}
    scores = scores_of(rows, ARTICLE_METRICS)
    clock.lap("statistics_s")
    facts = {
        "questions": len(rows),
        "tiles": len(articles),
        "distinct_tiles": len(tiles.vectors),
        "articles": len(set(articles)),
        "unreachable_questions": len(question_set.unreachable_questions()),
        "selection_fraction": settings.selection_fraction,
        "question_set": question_set.where,
        "tiles_dir": str(question_set.tiles_dir),
        **_cost(queries.report, tiles.report, clock),
    }
    return RetrievalResult(question_set.name, tuple(rows), scores, parts["selection"], parts["report"], facts)


def evaluate_pairs(
    encoder: EncoderLike,
    reader: ReaderLike,
    pairs: Sequence[PairRow],
    settings: EvaluationSettings,
    store: EmbeddingStore | None,
    tile_encoder: EncoderLike | None = None,
    told: Told = nobody,
) -> RetrievalResult:
    """Find each pair's positive tile among all tiles of these pairs, their negatives included; ties go by tile id."""
    if not pairs:
        raise DataError("a held-out split needs at least one query–tile pair")
    clock = _Clock()
    files = list(dict.fromkeys(path for one in pairs for path in (one.positive, *one.negatives)))
    queries, tiles = _embed(encoder, tile_encoder, reader, [one.query for one in pairs], files, settings, store, told)
    clock.lap("embed_s")

    # Here a tile is its content: the same picture under two names is one candidate, never its own competitor.
    device = _search_device(encoder)
    ids = dict(zip(tiles.rows, tiles.ids, strict=True))
    candidates = Candidates.of(tiles.vectors.to(device), [ids[row] for row in range(len(tiles.vectors))])
    row_of = dict(zip(files, tiles.rows, strict=True))
    targets = torch.tensor([row_of[one.positive] for one in pairs])
    places = ranks(queries.vectors.to(device), candidates, targets).tolist()
    clock.lap("search_s")

    rows = tuple(
        {
            "query": one.query,
            "where": f"{Path(one.source).name}:{one.where.rsplit(':', 1)[-1]}",
            "tile": ids[row_of[one.positive]],
            "rank": rank,
            **pair_metrics(rank),
        }
        for one, rank in zip(pairs, places, strict=True)
    )
    scores = scores_of(rows, PAIR_METRICS)
    clock.lap("statistics_s")
    facts = {"pairs": len(rows), "tiles": len(files), "distinct_tiles": len(tiles.vectors), **_cost(queries.report, tiles.report, clock)}
    return RetrievalResult(PAIRS_NAME, rows, scores, {}, {}, facts)


def write_result(folder: Path, step: int, result: RetrievalResult, primary: bool) -> tuple[Path, Path]:
    """Write rows, then the summary: where a summary stands, the rows are complete."""
    rows, summary = result_paths(folder, step, None if primary else result.name)
    rows.parent.mkdir(parents=True, exist_ok=True)
    write_rows(rows, result.rows)
    write_summary(summary, {"step": step, **result.summary()})
    return rows, summary


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Rows as JSON lines, all or none."""
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """A summary as JSON, all or none."""
    write_json(path, dict(summary))


def _question_row(question: Question, found: Retrieved, listed: list[Row], settings: EvaluationSettings) -> Row:
    """One question's row; what each metric says of it stands under the metric's own key."""
    top_articles = [one["article"] for one in listed]
    return {
        "id": question.id,
        "problem": question.problem,
        "answer": question.answer,
        "top3_paths": [one["path"] for one in listed[:READER_TILES]],
        "top3_article_ids": top_articles[:READER_TILES],
        "golden_ids": list(question.golden),
        **article_metrics(top_articles, question.golden, found.golden_ranks),
        "golden_ranks": list(found.golden_ranks),
        "split": "selection" if is_selection(question.id, settings.selection_fraction) else "report",
        "retrieved": listed[: settings.top_k],
    }


def _embed(
    encoder: EncoderLike,
    tile_encoder: EncoderLike | None,
    reader: ReaderLike,
    texts: Sequence[str],
    paths: Sequence[Path],
    settings: EvaluationSettings,
    store: EmbeddingStore | None,
    told: Told,
) -> tuple[EmbeddedTexts, EmbeddedTiles]:
    query_side = Embedder(encoder, settings.batch_tokens, store, told)
    tile_side = query_side if tile_encoder is None else Embedder(tile_encoder, settings.batch_tokens, store, told)
    return query_side.texts(texts, "query"), tile_side.tiles(paths, reader)


class _Clock:
    """Seconds by part, and in all."""

    def __init__(self) -> None:
        self.started = self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self.last
        self.seconds["total_s"] = now - self.started
        self.last = now


def _cost(texts: EmbedReport, tiles: EmbedReport, clock: _Clock) -> dict[str, Any]:
    sides = {"queries": texts, "tiles": tiles}
    counts = ("computed", "found", "batches", "tokens")
    seconds = ("identify_s", "wait_s", "copy_s", "forward_s", "store_s")
    return {
        "embeddings": {name: {key: getattr(side, key) for key in counts} for name, side in sides.items()},
        "timings": {
            **{key: round(sum(getattr(side, key) for side in sides.values()), 3) for key in seconds},
            **{key: round(value, 3) for key, value in clock.seconds.items()},
        },
    }


def _search_device(encoder: EncoderLike) -> torch.device:
    """Where scores are computed: beside the encoder, unless that device has no float64."""
    device = torch.device(encoder.device)
    return torch.device("cpu") if device.type == "mps" else device


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()


def _plain(one: Interval) -> dict[str, float | int | None]:
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in dataclasses.asdict(one).items()}

"""Whole evaluations with stand-ins: rows, summaries, and what is written, against rankings worked out by hand."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stairstep.data.questions import Question, QuestionSet, TileFile, article_of, is_selection
from stairstep.data.rows import PairRow
from stairstep.evaluation.question_set import evaluate_pairs, evaluate_question_set, open_store, write_result
from stairstep.evaluation.retrieval import ARTICLE_METRICS
from stairstep.evaluation.settings import EvaluationSettings
from stairstep.records.files import read_json_lines
from stairstep.settings import DataError, RecipeError, build, from_plain

SETTINGS = EvaluationSettings(top_k=4, batch_tokens=20)


@pytest.fixture
def question_set(tiles, tmp_path: Path) -> QuestionSet:
    contents = {f"art{one % 9}_chunk_{one}": f"32x{32 + 32 * (one % 3)}:{one}" for one in range(30)}
    contents["dist_art0_chunk_99"] = contents["art3_chunk_3"]  # the same picture in another article
    paths = tiles(**contents)
    return QuestionSet(
        name="mini",
        description="",
        questions=tuple(
            Question(f"q{one}", f"what is {'very ' * (one % 4)}number {one}?", f"answer {one}", (f"art{one % 9}", f"art{one % 11}"))
            for one in range(24)
        ),
        tiles=tuple(TileFile(path, article_of(path.name)) for path in paths),
        tiles_dir=tmp_path / "tiles",
        where="mini.json",
        note="",
        unreachable=("art9", "art10"),
    )


def naive_ranking(fakes, question: Question, question_set: QuestionSet) -> list[TileFile]:
    reader = fakes.Reader()
    query = fakes.vector_of(f"query:{question.problem}".encode(), 12, 0.0).double()
    scored = []
    for file in question_set.tiles:
        (tile,) = reader.ahead([file.path])
        score = float(query @ fakes.vector_of(tile.pixels.numpy().tobytes(), 12, 0.0).double())
        scored.append((-torch.tensor(score).float().item(), tile.id, file.path.name, file))
    return [one[-1] for one in sorted(scored, key=lambda one: one[:3])]


def test_rows_are_what_the_ranking_says(fakes, question_set: QuestionSet) -> None:
    result = evaluate_question_set(fakes.Encoder(), fakes.Reader(), question_set, SETTINGS, None)
    assert [row["id"] for row in result.rows] == [one.id for one in question_set.questions]
    for row, question in zip(result.rows, question_set.questions, strict=True):
        order = naive_ranking(fakes, question, question_set)
        assert row["problem"] == question.problem
        assert row["answer"] == question.answer
        assert row["golden_ids"] == list(question.golden)
        assert row["top3_paths"] == [one.path.name for one in order[:3]]
        assert row["top3_article_ids"] == [one.article for one in order[:3]]
        assert [one["path"] for one in row["retrieved"]] == [one.path.name for one in order[:4]]
        assert [one["score"] for one in row["retrieved"]] == sorted((one["score"] for one in row["retrieved"]), reverse=True)
        for k in (1, 3, 5, 10):
            assert row[f"hit@{k}"] is any(one.article in question.golden for one in order[:k])
        articles = list(dict.fromkeys(one.article for one in order))
        best = min((articles.index(one) + 1 for one in question.golden if one in articles), default=None)
        assert row["reciprocal_rank"] == (1 / best if best else 0.0)
        assert row["split"] == ("selection" if is_selection(question.id, 0.5) else "report")
        assert not {"predicted", "grade", "correct"} & row.keys(), "nothing was read or graded"


def test_summary_holds_scores_parts_and_counts(fakes, question_set: QuestionSet) -> None:
    result = evaluate_question_set(fakes.Encoder(), fakes.Reader(), question_set, SETTINGS, None)
    summary = json.loads(json.dumps(result.summary(), allow_nan=False))
    for metric, key in ARTICLE_METRICS.items():
        one = summary["metrics"][metric]
        assert one["value"] == pytest.approx(sum(row[key] for row in result.rows) / 24)
        assert one["low"] <= one["value"] <= one["high"]
        assert result.metrics()[f"mini/{metric}"] == one["value"]
        parts = [summary[part][metric] for part in ("selection", "report")]
        assert sum(part["n"] for part in parts) == 24
        assert all(part["n"] for part in parts)
        assert sum(part["n"] * part["value"] for part in parts) == pytest.approx(24 * one["value"])
    assert 0 < summary["metrics"]["hit@1"]["value"] < 1
    assert (summary["questions"], summary["tiles"], summary["distinct_tiles"], summary["articles"]) == (24, 31, 30, 9)
    assert summary["unreachable_questions"] == len(question_set.unreachable_questions())
    assert summary["embeddings"]["tiles"]["computed"] == 30
    assert set(summary["timings"]) >= {"wait_s", "copy_s", "forward_s", "search_s", "total_s"}


def test_a_second_evaluation_computes_nothing_and_writes_the_same_rows(fakes, question_set: QuestionSet, tmp_path: Path) -> None:
    store = open_store(SETTINGS, tmp_path)
    first = evaluate_question_set(fakes.Encoder(), fakes.Reader(), question_set, SETTINGS, store)
    encoder = fakes.Encoder()
    second = evaluate_question_set(encoder, fakes.Reader(), question_set, SETTINGS, open_store(SETTINGS, tmp_path))
    assert encoder.tile_batches == encoder.text_batches == []
    facts = second.summary()["embeddings"]
    assert (facts["tiles"]["computed"], facts["tiles"]["found"], facts["queries"]["found"]) == (0, 30, 24)
    one, _ = write_result(tmp_path / "one", 50, first, primary=True)
    two, _ = write_result(tmp_path / "two", 50, second, primary=True)
    assert one.read_bytes() == two.read_bytes()
    changed = evaluate_question_set(fakes.Encoder(weight=0.3), fakes.Reader(), question_set, SETTINGS, store)
    assert changed.summary()["embeddings"]["tiles"]["computed"] == 30
    assert changed.rows != first.rows


def test_tiles_may_have_an_encoder_of_their_own(fakes, question_set: QuestionSet, tmp_path: Path) -> None:
    store = open_store(SETTINGS, tmp_path)
    evaluate_question_set(fakes.Encoder(), fakes.Reader(), question_set, SETTINGS, store)
    trained = fakes.Encoder(weight=0.3)
    result = evaluate_question_set(trained, fakes.Reader(), question_set, SETTINGS, store, tile_encoder=fakes.Encoder())
    assert trained.tile_batches == []
    assert result.summary()["embeddings"]["tiles"]["computed"] == 0, "an index built before stays valid"
    assert result.summary()["embeddings"]["queries"]["computed"] == 24


def test_files_of_a_run_folder(fakes, question_set: QuestionSet, tmp_path: Path) -> None:
    result = evaluate_question_set(fakes.Encoder(), fakes.Reader(), question_set, SETTINGS, None)
    rows, summary = write_result(tmp_path, 150, result, primary=True)
    assert (rows.name, summary.name) == ("eval_step150.jsonl", "eval_step150.summary.json")
    assert rows.parent == summary.parent == tmp_path
    assert read_json_lines(rows) == json.loads(json.dumps(result.rows))
    assert json.loads(summary.read_text())["step"] == 150
    # seed 000's own reading of a step from a file name, and its score without any grade
    assert int(str(rows).split("eval_step")[1].split(".")[0]) == 150
    assert sum(json.loads(line).get("correct", False) for line in rows.open()) == 0
    rows, _ = write_result(tmp_path, 0, result, primary=False)
    assert rows == tmp_path / "mini" / "eval_step0.jsonl"
    assert str(tmp_path) not in rows.read_text(), "rows name no place of this machine"


def test_fewer_tiles_than_k_and_one_question(fakes, question_set: QuestionSet) -> None:
    tiny = replace(question_set, tiles=question_set.tiles[:2], questions=question_set.questions[:1])
    result = evaluate_question_set(fakes.Encoder(), fakes.Reader(), tiny, SETTINGS, None)
    assert len(result.rows[0]["top3_paths"]) == len(result.rows[0]["retrieved"]) == 2
    json.dumps(result.summary(), allow_nan=False)  # one of the two parts has no question at all
    for empty in (replace(question_set, tiles=()), replace(question_set, questions=())):
        with pytest.raises(DataError, match=r"mini\.json"):
            evaluate_question_set(fakes.Encoder(), fakes.Reader(), empty, SETTINGS, None)


def test_pairs_find_their_positive_among_all_tiles(fakes, tiles) -> None:
    paths = tiles(**{f"t{one}": f"32x32:{one}" for one in range(20)}, twin="32x32:4")
    pairs = [
        PairRow(f"query {one}", paths[one], (paths[(one * 3 + 1) % 20], paths[20]), "data/eval_hn.jsonl", f"/x/eval_hn.jsonl:{one + 1}")
        for one in range(10)
    ]
    result = evaluate_pairs(fakes.Encoder(), fakes.Reader(), pairs, SETTINGS, None)
    reader = fakes.Reader()
    used = {path for pair in pairs for path in (pair.positive, *pair.negatives)}
    pictures = {tile.id: tile.pixels for tile in reader.ahead(sorted(used))}
    for pair, row in zip(pairs, result.rows, strict=True):
        query = fakes.vector_of(f"query:{pair.query}".encode(), 12, 0.0)
        scores = {one: float(query @ fakes.vector_of(pixels.numpy().tobytes(), 12, 0.0)) for one, pixels in pictures.items()}
        own = reader.id(pair.positive)
        assert row["rank"] == 1 + sum(score > scores[own] for score in scores.values())
        assert row["tile"] == own
        assert row["reciprocal_rank"] == 1 / row["rank"]
    assert len({row["rank"] for row in result.rows}) > 3
    assert [row["where"] for row in result.rows[:2]] == ["eval_hn.jsonl:1", "eval_hn.jsonl:2"]
    summary = result.summary()
    assert (summary["pairs"], summary["tiles"], summary["distinct_tiles"]) == (10, len(used), len(used) - 1)
    assert summary["metrics"]["hit@10"]["value"] == sum(row["rank"] <= 10 for row in result.rows) / 10
    with pytest.raises(DataError, match="at least one"):
        evaluate_pairs(fakes.Encoder(), fakes.Reader(), [], SETTINGS, None)


def test_the_store_follows_the_settings(tmp_path: Path) -> None:
    store = open_store(EvaluationSettings(), tmp_path)
    assert store is not None
    assert (store.folder, store.keep_states) == (tmp_path / "embeddings", 32)
    store = open_store(EvaluationSettings(cache_folder=str(tmp_path / "elsewhere"), cache_states=3), tmp_path / "runs")
    assert store is not None
    assert (store.folder, store.keep_states) == (tmp_path / "elsewhere", 3)
    assert open_store(EvaluationSettings(cache=False), tmp_path) is None


def test_settings_are_built_and_checked() -> None:
    tree = {"every": 5, "sets": [{"path": "a.json", "limit": 3}], "top_k": 3}
    built = build(EvaluationSettings, from_plain(tree, "recipe"))
    assert built.sets[0].path == "a.json"
    assert built.selection_fraction == 0.5
    for key, value in (("every", 0), ("top_k", 2), ("selection_fraction", 1.5), ("batch_tokens", 0), ("cache_states", 0), ("pairs", -1)):
        with pytest.raises(RecipeError, match=re.escape(key)):
            build(EvaluationSettings, from_plain({key: value}, "recipe"))

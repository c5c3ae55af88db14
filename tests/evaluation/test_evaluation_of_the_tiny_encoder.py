"""The real rooms together: a tinywiki world, the real reader, a tiny random encoder; and what evaluation must not leave behind."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from stairstep.data import PairSource, QuestionSetSource, WorldSettings, read_pairs, read_question_set
from stairstep.evaluation.question_set import evaluate_pairs, evaluate_question_set, open_store
from stairstep.evaluation.settings import EvaluationSettings
from stairstep.models import AdapterSettings, ModelSettings
from stairstep.models.load import load_encoder
from stairstep.tiles import TileReader, TileSettings
from stairstep.tiny.configs import write_random_checkpoint
from stairstep.tiny.tinywiki import QUESTION_SET, ensure_world

SETTINGS = EvaluationSettings(batch_tokens=512)


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("tiny")
    world = ensure_world(WorldSettings(articles=8, questions=6, pairs=8, text_pairs=2), folder)
    base = write_random_checkpoint(folder / "base", "embedder")
    model = ModelSettings(base=str(base), dtype="float32", adapter=AdapterSettings(rank=2, alpha=2))
    encoder = load_encoder(model, trainable=True)
    question_set = read_question_set(QuestionSetSource(str(world / QUESTION_SET)), (str(world),), world)
    pairs = read_pairs(PairSource(str(world / "train_hn.jsonl"), limit=6), (str(world),), world)
    return SimpleNamespace(encoder=encoder, questions=question_set, pairs=pairs, reader=TileReader(TileSettings(max_visual_tokens=12)))


def test_a_world_is_evaluated_and_the_second_time_computes_nothing(rooms: SimpleNamespace, tmp_path: Path) -> None:
    store = open_store(SETTINGS, tmp_path)
    cold = evaluate_question_set(rooms.encoder, rooms.reader, rooms.questions, SETTINGS, store)
    assert len(cold.rows) == 6
    assert cold.summary()["embeddings"]["tiles"]["computed"] == len({rooms.reader.id(one.path) for one in rooms.questions.tiles})
    assert cold.scores["hit@1"].value < 1, "a random encoder knows the answers"
    warm = evaluate_question_set(rooms.encoder, rooms.reader, rooms.questions, SETTINGS, store)
    assert {side["computed"] for side in warm.summary()["embeddings"].values()} == {0}
    assert warm.rows == cold.rows
    alone = evaluate_question_set(rooms.encoder, rooms.reader, rooms.questions, EvaluationSettings(batch_tokens=1), None)
    assert alone.summary()["embeddings"]["tiles"]["batches"] > cold.summary()["embeddings"]["tiles"]["batches"]
    for one, other in zip(alone.rows, cold.rows, strict=True):
        scores = [[entry["score"] for entry in row["retrieved"]] for row in (one, other)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_training_goes_on_after_an_evaluation_and_changes_the_state(rooms: SimpleNamespace, tmp_path: Path) -> None:
    store = open_store(SETTINGS, tmp_path)
    encoder = rooms.encoder.train()
    before = evaluate_pairs(encoder, rooms.reader, rooms.pairs, SETTINGS, store)
    assert encoder.training
    assert before.summary()["metrics"]["hit@10"]["n"] == len(rooms.pairs) == 6
    tiles = encoder.encode_tiles([rooms.reader.load(one.positive).pixels for one in rooms.pairs[:2]])
    loss = -(encoder.encode_texts([one.query for one in rooms.pairs[:2]], "query") * tiles).sum()
    loss.backward()
    trained = [parameter for group in encoder.groups().values() for _, parameter in group]
    torch.optim.SGD(trained, 10.0).step()
    after = evaluate_pairs(encoder, rooms.reader, rooms.pairs, SETTINGS, store)
    assert after.summary()["embeddings"]["tiles"]["found"] == 0
    assert after.summary()["embeddings"]["tiles"]["computed"] == before.summary()["embeddings"]["tiles"]["computed"]
    assert after.rows != before.rows

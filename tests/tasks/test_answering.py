"""Retrieved rows are answered by the recipe's reader, from the tiles as they lie on the disk; its absence is told before any step."""

from pathlib import Path

import pytest
import torch

from stairstep.evaluation.question_set import RetrievalResult
from stairstep.evaluation.settings import EvaluationSettings, LocalReaderSettings
from stairstep.settings import InputError
from stairstep.tasks.answering import Answering
from stairstep.tiles import TileReader, TileSettings
from stairstep.tiny.configs import write_random_checkpoint
from stairstep.tiny.render import write_png


def _tile(path: str) -> dict[str, str]:
    return {"path": path, "article": path[0], "tile": path}


def answering(settings: EvaluationSettings, root: Path, fresh: bool = False) -> Answering:
    return Answering(settings, TileReader(TileSettings()), TileSettings(), torch.device("cpu"), root, fresh)


@pytest.fixture
def result(tmp_path: Path) -> RetrievalResult:
    for name in ("a.png", "b.png"):
        write_png(tmp_path / name, torch.full((128, 192, 3), 200, dtype=torch.uint8).numpy())
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows = tuple(
        {
            "id": str(place),
            "problem": "When?",
            "answer": "1931",
            "split": "report",
            "golden_ids": ["a"],
            "retrieved": [_tile(path), _tile("b.png")],
        }
        for place, path in enumerate(("a.png", "broken.png"))
    )
    return RetrievalResult("toy", rows, {}, {}, {}, {"tiles_dir": str(tmp_path), "timings": {}})


def test_every_row_is_answered_and_a_bad_tile_fails_its_own_question(result: RetrievalResult, tmp_path: Path) -> None:
    model = write_random_checkpoint(tmp_path / "reader", "reader")
    reader = LocalReaderSettings(model=str(model), max_new_tokens=3)
    settings = EvaluationSettings(reader=reader, top_k_read=2, coverage_floor=0.5)
    done = answering(settings, tmp_path).answered(result)
    assert [row["state"] for row in done.rows] == ["incorrect", "unanswered"] or done.rows[0]["state"] == "not_attempted"
    assert "broken.png" in done.rows[1]["reason"]
    assert "correct" not in done.rows[1] and done.rows[0]["correct"] is False
    assert done.qa["all"].states["unanswered"] == 1
    assert done.metrics() == {"toy/qa_score": 0.0}
    assert done.summary()["qa"]["report"]["coverage"] == 0.5
    assert done.facts["timings"]["read_s"] > 0 and done.facts["timings"]["grade_s"] >= 0


def test_without_a_reader_nothing_is_asked(result: RetrievalResult, tmp_path: Path) -> None:
    assert answering(EvaluationSettings(), tmp_path).answered(result) is result


def test_a_reader_without_weights_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    settings = EvaluationSettings(reader=LocalReaderSettings(model=str(tmp_path)))
    with pytest.raises(InputError, match="pickled weights are never read"):
        answering(settings, tmp_path)

"""Retrieved rows are answered by the recipe's reader, from the tiles as they lie on the disk; its absence is told before any step."""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stairstep.evaluation.graders import ChatGraderSettings
from stairstep.evaluation.question_set import RetrievalResult
from stairstep.evaluation.readers import RemoteReaderSettings
from stairstep.evaluation.settings import EvaluationSettings, LocalReaderSettings, PriceSettings
from stairstep.evaluation.table import qa_lines
from stairstep.records import RunFolder
from stairstep.records.reading import Reading
from stairstep.settings import InputError, RecipeError, build, from_plain
from stairstep.tasks.answering import Answering
from stairstep.tiles import TileReader, TileSettings
from stairstep.tiny.configs import write_random_checkpoint
from stairstep.tiny.render import write_png

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
from evaluation_server import EvaluationServer, Request, body, cut, status, text


def _tile(path: str) -> dict[str, str]:
    return {"path": path, "article": path[0], "tile": path}


def answering(settings: EvaluationSettings, root: Path, fresh: bool = False, again: bool = False) -> Answering:
    return Answering(settings, TileReader(TileSettings()), TileSettings(), torch.device("cpu"), root, fresh, again)


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


def test_it_is_told_how_far_the_reading_is_and_what_an_answer_takes(result: RetrievalResult, tmp_path: Path) -> None:
    settings = EvaluationSettings(reader=LocalReaderSettings(model=str(write_random_checkpoint(tmp_path / "reader", "reader"))))
    ask = answering(replace(settings, top_k_read=2), tmp_path)
    told: list[Reading] = []
    ask.reading = RunFolder(tmp_path).reading_file(told.append)
    ask.answered(result, 40)
    first, last = told[0], told[-1]
    assert (first.step, first.name, first.done, first.of) == (40, "toy", 0, 2)
    assert (last.done, last.asked) == (2, 1), "the broken tile's question is done, and nobody was asked"
    assert last.seconds > 0
    ask.answered(result, 80)
    assert (told[-1].step, told[-1].done, told[-1].asked, told[-1].seconds_each) == (80, 2, 0, None), "the ledger knew"


def test_a_remote_reader_is_timed_from_question_to_answer(one: RetrievalResult, tmp_path: Path) -> None:
    def slowly(request: Request) -> str:
        time.sleep(0.2 if request.body["model"] == READER else 0.0)
        return honest(request)

    with EvaluationServer(slowly) as server:
        ask = answering(asking(server), tmp_path)
        ask.reading = RunFolder(tmp_path).reading_file()
        ask.answered(replace(one, rows=one.rows * 3), 8)
    told = RunFolder(tmp_path).reading
    assert told is not None
    assert (told.done, told.of, told.asked) == (3, 3, 1), "the same question three times is asked once"
    assert told.seconds_each is not None and told.seconds_each >= 0.2


def test_without_a_reader_nothing_is_asked(result: RetrievalResult, tmp_path: Path) -> None:
    assert answering(EvaluationSettings(), tmp_path).answered(result) is result


def test_a_reader_without_weights_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    settings = EvaluationSettings(reader=LocalReaderSettings(model=str(tmp_path)))
    with pytest.raises(InputError, match="pickled weights are never read"):
        answering(settings, tmp_path)


# --- what is kept, and what it cost


READER, JUDGE = "a-reader", "a-judge"
THOUGHT = text("<think>let me see", finish="length")
ESSAY = text("It is right in part, and wrong in part.")


def asking(server: EvaluationServer, **settings: Any) -> EvaluationSettings:
    """A reader and a judge at one server, one question after the other."""
    quick: dict[str, Any] = {"base_url": server.url, "attempts": 2, "backoff_s": 0.01, "concurrency": 1}
    reader, judge = RemoteReaderSettings(model=READER, **quick), ChatGraderSettings(model=JUDGE, **quick)
    prices = (PriceSettings(READER, 1.0, 10.0), PriceSettings(JUDGE, 100.0, 1000.0))
    return replace(EvaluationSettings(reader=reader, grader=judge, top_k_read=2, coverage_floor=0.5, prices=prices), **settings)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "a-key-of-nothing")


def honest(request: Request) -> str:
    return "A" if request.body["model"] == JUDGE else "1931"


@pytest.fixture
def one(result: RetrievalResult) -> RetrievalResult:
    """The question whose tiles are well."""
    return replace(result, rows=result.rows[:1])


def state_of(result: RetrievalResult) -> tuple[str, str]:
    """The one question's state and reason."""
    (row,) = result.rows
    return row["state"], row.get("reason", "")


def counted(result: RetrievalResult, kind: str) -> tuple[int, int, int, int, int]:
    calls = result.facts["calls"][kind]
    return tuple(calls[name] for name in ("asked", "hits", "requests", "prompt_tokens", "completion_tokens"))


def test_a_thought_that_was_cut_off_is_paid_once_and_kept_as_that(one: RetrievalResult, tmp_path: Path) -> None:
    with EvaluationServer(honest) as server:
        settings = asking(server)
        server.chance = lambda request: THOUGHT
        first = answering(settings, tmp_path).answered(one)
        assert state_of(first)[0] == "unanswered" and "thinking was cut off" in state_of(first)[1]
        assert counted(first, "answer") == (1, 0, 1, 11, 3)
        assert first.facts["calls"]["answer"]["cost"] == pytest.approx((11 * 1 + 3 * 10) / 1e6), "it was no answer, and was paid for"
        assert not {"correct", "grade"} & first.rows[0].keys()

        second = answering(settings, tmp_path).answered(one)
        assert second.rows == first.rows
        assert counted(second, "answer") == (0, 1, 0, 0, 0) and len(server.received) == 1

        # Asked for again, it is: by whoever mends, and by another limit, which is part of the key.
        answering(settings, tmp_path, again=True).answered(one)
        assert len(server.received) == 2
        server.chance = lambda request: None
        longer = replace(settings, reader=replace(settings.reader, max_new_tokens=1000))
        assert state_of(answering(longer, tmp_path).answered(one)) == ("correct", "")
        assert state_of(answering(settings, tmp_path).answered(one))[0] == "unanswered", "of the old limit it is known still"
        assert state_of(answering(settings, tmp_path, again=True).answered(one)) == ("correct", "")
        count = len(server.received)
        assert state_of(answering(settings, tmp_path, again=True).answered(one)) == ("correct", "")
        assert len(server.received) == count, "what is no failure is not asked again"


def test_a_judge_that_says_no_grade_is_paid_once_and_kept_as_that(one: RetrievalResult, tmp_path: Path) -> None:
    with EvaluationServer(honest) as server:
        settings = asking(server)
        server.chance = lambda request: ESSAY if request.body["model"] == JUDGE else None
        first = answering(settings, tmp_path).answered(one)
        assert state_of(first)[0] == "ungraded" and "was asked 3 times and gave no grade" in state_of(first)[1]
        assert counted(first, "grade") == (1, 0, 3, 33, 9)
        assert first.facts["calls"]["grade"]["cost"] == pytest.approx((33 * 100 + 9 * 1000) / 1e6)
        assert any("grades by a-judge: 1 asked in 3 requests, 0 found in the ledger, cost 0.0123" in line for line in qa_lines_of(first))

        second = answering(settings, tmp_path).answered(one)
        assert second.rows == first.rows and len(server.received) == 4
        assert counted(second, "grade") == (0, 1, 0, 0, 0)

        # Whoever gives it less will not get more out of it; whoever gives it more may.
        for limits, requests in (({"asks": 1}, 0), ({"max_new_tokens": 16}, 0), ({"asks": 4}, 4), ({"max_new_tokens": 65}, 3)):
            before = len(server.received)
            state = state_of(answering(replace(settings, grader=replace(settings.grader, **limits)), tmp_path).answered(one))[0]
            assert (state, len(server.received) - before) == ("ungraded", requests), limits
        server.chance = lambda request: None
        assert state_of(answering(settings, tmp_path, again=True).answered(one)) == ("correct", "")
        assert state_of(answering(settings, tmp_path).answered(one)) == ("correct", "")


@pytest.mark.parametrize("who", [READER, JUDGE])
def test_what_may_pass_is_never_kept(one: RetrievalResult, tmp_path: Path, who: str) -> None:
    faults = (status(500), status(429), cut(), body(b"<html>"), status(400, "too long"), text(None, finish="content_filter"))
    with EvaluationServer(honest) as server:
        for fault in faults:
            server.chance = lambda request, fault=fault: fault if request.body["model"] == who else None
            done = answering(asking(server), tmp_path).answered(one)
            assert state_of(done)[0] == ("unanswered" if who == READER else "ungraded")
            assert counted(done, "answer" if who == READER else "grade")[2] >= 1, "each evaluation asks anew"
        assert all('"failure"' not in path.read_text() for path in (tmp_path / "ledger").rglob("*.json"))
        server.chance = lambda request: None
        assert state_of(answering(asking(server), tmp_path).answered(one)) == ("correct", "")


def test_every_request_is_counted(one: RetrievalResult, tmp_path: Path) -> None:
    with EvaluationServer(honest) as server:
        server.next(status(500), text("1931"), status(500), text("A"))
        done = answering(asking(server), tmp_path).answered(one)
        assert counted(done, "answer") == counted(done, "grade") == (1, 0, 2, 11, 3)
        assert len(server.received) == 4


def test_a_tile_that_cannot_be_sent_sends_no_request(result: RetrievalResult, tmp_path: Path) -> None:
    with EvaluationServer(honest) as server:
        done = answering(asking(server), tmp_path).answered(result)
        assert [row["state"] for row in done.rows] == ["correct", "unanswered"]
        assert counted(done, "answer")[2] == 1 and len(server.received) == 2


def test_an_empty_answer_asks_no_judge(one: RetrievalResult, tmp_path: Path) -> None:
    with EvaluationServer(lambda request: "") as server:
        done = answering(asking(server), tmp_path).answered(one)
        assert state_of(done) == ("not_attempted", "") and len(server.received) == 1
        assert counted(done, "grade") == (0, 0, 0, 0, 0)


def test_a_missing_price_is_told_where_something_was_paid(one: RetrievalResult, tmp_path: Path) -> None:
    with EvaluationServer(honest) as server:
        one_price = asking(server, prices=(PriceSettings(READER, 1.0),))
        first = answering(one_price, tmp_path).answered(one)
        assert first.facts["calls"]["grade"]["cost"] is None
        assert sum("cost unknown: evaluation.prices has no a-judge" in line for line in qa_lines_of(first)) == 1
        assert "unknown" not in str(qa_lines_of(answering(one_price, tmp_path).answered(one))), "nothing was asked"
        none = answering(asking(server, prices=()), tmp_path / "other").answered(one)
        assert len(server.received) == 4 and "cost" not in str(qa_lines_of(none)), "nobody asked what it costs"


def test_a_model_with_two_prices_is_refused() -> None:
    priced = {"prices": [{"model": READER, "prompt": 1}, {"model": JUDGE}, {"model": READER, "prompt": 2}]}
    with pytest.raises(RecipeError, match="prices: a-reader has more than one price"):
        build(EvaluationSettings, from_plain(priced, "test"))


def qa_lines_of(result: RetrievalResult) -> list[str]:
    return qa_lines(replace(result, facts={**result.facts, "top_k_read": 2}))

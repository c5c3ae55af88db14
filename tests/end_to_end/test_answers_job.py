"""Answers and grades from endpoints, in jobs as a person runs them: a dead reader, what the ledger saves, where no key may stand."""

from __future__ import annotations

import json
import logging
import secrets
import socket
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))  # evaluation_server.py

if TYPE_CHECKING:
    from evaluation_server import EvaluationServer, Fault, Request

Job = Callable[..., Any]

READER, JUDGE = "a-reader", "a-judge"
QUICKLY = "backoff_s: 0.01, attempts: 2"
QUESTIONS = 4


def reader_at(url: str, more: str = "") -> str:
    """The override that names a reader behind an endpoint."""
    return f"evaluation.reader={{kind: endpoint, model: {READER}, base_url: '{url}', {QUICKLY}{more}}}"


def judge_at(url: str) -> str:
    """The override that names a judge behind an endpoint; its key is OpenAI's."""
    return f"evaluation.grader={{kind: openai, model: {JUDGE}, base_url: '{url}', {QUICKLY}}}"


def free_port() -> int:
    """A port of this machine where nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rows_of(folder: Path, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"eval_step{step}.jsonl").read_text().splitlines()]


def summary_of(folder: Path, step: int) -> dict[str, Any]:
    return dict(json.loads((folder / f"eval_step{step}.summary.json").read_text()))


def unanswered(folder: Path, step: int) -> str:
    """Checks that an evaluation has its retrieval metrics, no QA score, and not one grade; returns the one reason that it tells."""
    summary, rows = summary_of(folder, step), rows_of(folder, step)
    assert summary["metrics"]["hit@10"]["value"] > 0
    for part in ("all", "selection", "report"):
        assert (summary["qa"][part]["score"], summary["qa"][part]["graded"]) == (None, 0)
    assert summary["qa"]["all"]["bounds"] == [0.0, 1.0]
    assert [row["state"] for row in rows] == ["unanswered"] * QUESTIONS
    assert not any({"correct", "grade"} & row.keys() for row in rows), "a failure is not a wrong answer"
    (missing,) = summary["missing"]
    assert missing["questions"] == QUESTIONS
    assert {row["reason"] for row in rows} == {missing["reason"]}
    return str(missing["reason"])


def test_with_a_dead_reader_retrieval_is_measured_and_the_outage_told_once(job: Job, small: Any) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    told = job("evaluate", small.recipe, "--base", reader_at(url, ", breaker: 1, patience_s: 0"))
    assert told.code == 1
    assert "R@1 " in told.out
    assert "QA    no score" in told.out
    assert "no QA score of tinywiki" in told.out
    reason = unanswered(small.runs / "evaluations" / "small-base", 0)
    assert f"no connection to the reader at {url}" in reason
    assert "evaluation.reader.base_url" in reason
    assert told.out.count(reason) == 1
    assert told.err.count("no connection to the reader") == 1, told.err
    assert "Traceback" not in told.err


def test_training_goes_on_with_a_dead_reader_and_its_answers_can_be_had_later(job: Job, small: Any) -> None:
    from evaluation_server import EvaluationServer

    port = free_port()
    reader = reader_at(f"http://127.0.0.1:{port}/v1")  # too few failures for an outage: each evaluation tells of its own
    trained = job("train", small.recipe, reader, "evaluation.selection_metric=qa", "optim.rates.llm=1e-2")
    assert trained.code == 0, trained.err
    assert "finished at step 1" in trained.out
    run = small.runs / "small"
    assert (run / "checkpoint-1" / "COMPLETE").exists()
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum("train/loss" in one for one in logged) == 1
    assert [one["step"] for one in logged if "tinywiki/hit@1" in one] == [0, 1]
    assert not any("qa" in name for one in logged for name in one), "what is not known is not logged"
    for step in (0, 1):
        reason = unanswered(run, step)
        assert "no connection to the reader" in reason
    assert trained.err.count("no connection to the reader") == 2, trained.err

    again = job("evaluate", "--reread", run)
    assert again.code == 1
    assert "0 of 4 filled in" in again.out
    assert again.out.count("4 × no connection to the reader") == 2
    with EvaluationServer(lambda request: "an answer", port=port) as server:
        mended = job("evaluate", "--reread", run)
    assert mended.code == 0, mended.err
    assert len(server.received) == len(asked(server)) > QUESTIONS
    for step in (0, 1):
        assert all(row["predicted"] == "an answer" and "correct" in row for row in rows_of(run, step))
        assert summary_of(run, step)["qa"]["all"]["coverage"] == 1.0


def key_of(request: Request) -> str:
    """What a request asks of whom: the model and the whole conversation, tiles included."""
    return json.dumps([request.body["model"], request.body["messages"]])


def asked(server: EvaluationServer) -> Counter[str]:
    """How often the server was asked each thing."""
    return Counter(key_of(one) for one in server.received)


def asked_of(requests: list[Request], model: str) -> int:
    return sum(one.body["model"] == model for one in requests)


def honest(request: Request) -> str:
    """The judge says yes; the reader's answer depends on all that it was asked with."""
    return "A" if request.body["model"] == JUDGE else f"answer {hash(key_of(request))}"


def test_what_was_asked_is_never_asked_again(job: Job, small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from evaluation_server import EvaluationServer

    monkeypatch.setenv("OPENAI_API_KEY", "a-key-of-nothing")
    with EvaluationServer(honest) as server:
        recipe = [small.recipe, reader_at(server.url), judge_at(server.url), "evaluation.top_k_read=2"]

        def requests(*arguments: object) -> list[Request]:
            before = len(server.received)
            told = job(*arguments)
            assert told.code == 0, told.err
            return server.received[before:]

        requests("train", *recipe, "optim.rates.llm=1e-2")
        run, measured = small.runs / "small", small.runs / "evaluations"
        assert summary_of(run, 0)["qa"]["all"]["score"] == 1.0
        assert asked_of(server.received, READER) == asked_of(server.received, JUDGE) >= QUESTIONS

        # An unchanged checkpoint, also as an evaluation of its own: not one call, and the same rows.
        unchanged = ("evaluate", *recipe, "--checkpoint", run / "checkpoint-1")
        assert requests(*unchanged) == []
        assert rows_of(measured / "small-checkpoint-1", 1) == rows_of(run, 1)
        calls = summary_of(measured / "small-checkpoint-1", 1)["calls"]
        assert [(calls[kind]["asked"], calls[kind]["hits"]) for kind in ("answer", "grade")] == [(0, QUESTIONS)] * 2

        # A changed one finds other tiles for some questions and the same for others: it pays for the first alone.
        known = set(asked(server))
        new = requests("train", *recipe, "run.name=other", "run.seed=1", "optim.rates.llm=3e-2")
        assert new, "the other weights found the same tiles for every question: this test shows nothing"
        assert not known & {key_of(one) for one in new}
        calls = summary_of(small.runs / "other", 1)["calls"]["answer"]
        assert calls["hits"] > 0, "the other weights found other tiles for every question: this test shows nothing"
        assert set(asked(server).values()) == {1}

        # Unless it is told to: then everything is asked once more, and known from there on.
        fresh = requests(*unchanged, "--fresh")
        assert len(fresh) == 2 * QUESTIONS
        assert {key_of(one) for one in fresh} <= known
        assert requests(*unchanged) == []


def test_failures_that_would_repeat_are_paid_for_once_until_somebody_asks_again(
    job: Job, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader whose thought is cut off, or a judge that writes essays, and a template that is gone when the grades are asked for again."""
    from evaluation_server import EvaluationServer, text

    monkeypatch.setenv("OPENAI_API_KEY", "a-key-of-nothing")
    thought, essay = text("<think>well, let me", finish="length"), text("Right in part, and wrong in part.")
    problems = [one["problem"] for one in json.loads(small.files("test/*.json")[0].read_text())["questions"]]
    (tmp_path / "rubric.txt").write_text("MY RUBRIC {question} {target} {predicted_answer}")

    def misbehave(request: Request) -> Fault | None:
        thinks = any(problem in request.prompt for problem in problems[:2])
        return (thought if thinks else None) if request.body["model"] == READER else essay

    with EvaluationServer(honest) as server:
        server.chance = misbehave
        recipe = [small.recipe, reader_at(server.url), judge_at(server.url), "evaluation.grader.template_file=rubric.txt"]

        def asked_by(*arguments: object) -> tuple[int, int, int]:
            """The job's exit code, and what it asked of the reader and of the judge."""
            before = len(server.received)
            told = job(*arguments)
            assert "Traceback" not in told.err, told.err
            new = server.received[before:]
            return told.code, asked_of(new, READER), asked_of(new, JUDGE)

        assert asked_by("evaluate", *recipe, "--base") == (1, 4, 2 * 3)
        measured = small.runs / "evaluations" / "small-base"
        rows, calls = rows_of(measured, 0), summary_of(measured, 0)["calls"]
        assert sorted(row["state"] for row in rows) == ["unanswered"] * 2 + ["ungraded"] * 2
        assert not any({"correct", "grade"} & row.keys() for row in rows)
        assert [calls[kind]["requests"] for kind in ("answer", "grade")] == [4, 6]
        assert asked_by("evaluate", *recipe, "--base") == (1, 0, 0), "an unchanged base asks nothing"
        assert rows_of(measured, 0) == rows

        assert asked_by("train", *recipe, "optim.rates.llm=0")[0] == 0
        run = small.runs / "small"
        (tmp_path / "rubric.txt").unlink()
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        code, of_reader, of_judge = asked_by("evaluate", "--regrade", run)
        assert (code, of_reader) == (1, 0) and of_judge >= 6
        assert all("MY RUBRIC" in one.prompt for one in server.received if one.body["model"] == JUDGE)
        server.chance = lambda request: None
        code, of_reader, of_judge = asked_by("evaluate", "--regrade", run)
        assert (code, of_reader) == (0, 0) and of_judge >= 2
        code, of_reader, of_judge = asked_by("evaluate", "--reread", run)
        assert code == 0 and of_reader >= 2 and of_judge >= 2
        assert {row["state"] for step in (0, 1) for row in rows_of(run, step)} == {"correct"}
        assert asked_by("evaluate", "--reread", run) == (0, 0, 0)


def quoting(code: int) -> Fault:
    """An error that repeats the key it was asked with, in its message, in a header, and in other words than an error's."""

    def act(handler: Any) -> None:
        header = handler.headers["Authorization"]
        told = {"error": {"message": f"{header} was not understood", "type": "x", "code": "x"}, "headers": {"authorization": header}}
        handler.send(code, json.dumps(told).encode(), {"X-Authorization": header})

    return act


def babbling(handler: Any) -> None:
    """A body that is no JSON and begins with the key."""
    handler.send(200, f"{handler.headers['Authorization']} is what came".encode())


def replying(handler: Any) -> None:
    """An error that is told as a reply."""
    from evaluation_server import text

    text(f"Refused: {handler.headers['Authorization']}")(handler)


def test_no_key_is_in_any_file_or_line(job: Job, small: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from evaluation_server import EvaluationServer

    keys = {model: f"{model}{secrets.token_hex(60)}" for model in (READER, JUDGE)}
    monkeypatch.setenv("READER_API_KEY", keys[READER])
    monkeypatch.setenv("OPENAI_API_KEY", keys[JUDGE])
    caplog.set_level(logging.DEBUG)
    problems = [one["problem"] for one in json.loads(small.files("test/*.json")[0].read_text())["questions"]]
    assert len(problems) == QUESTIONS

    def misbehave(request: Request) -> Fault | None:
        """For ever: a refusal and a body of its own to two questions of the reader, and to the others' answers one of the judge."""
        place = next(place for place, problem in enumerate(problems) if problem in request.prompt)
        faults = {READER: [quoting(400), babbling, replying, None], JUDGE: [None, None, replying, quoting(400)]}
        return faults[request.body["model"]][place]

    with EvaluationServer(honest) as server:
        server.chance = misbehave
        server.next(quoting(500), quoting(500))
        trackers = "trackers={wandb: offline, tensorboard: true}"
        recipe = [small.recipe, reader_at(server.url), judge_at(server.url), trackers]
        told = [job("train", *recipe), job("evaluate", *recipe, "--base")]
    assert [one.code for one in told] == [0, 1], told
    for model, key in keys.items():
        sent = {one.headers["authorization"] for one in server.received if one.body["model"] == model}
        assert sent == {f"Bearer {key}"}, "the key must have been used"
    states = Counter(row["state"] for row in rows_of(small.runs / "small", 1))
    assert states == {"unanswered": 2, "ungraded": 2}

    files = [path for path in small.runs.rglob("*") if path.is_file()]
    assert {"recipe.yaml", "metrics.jsonl", "eval_step0.jsonl", "trackers.jsonl"} <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    assert any("tfevents" in path.name for path in files)
    for model, key in keys.items():
        piece = key[: len(model) + 12]  # none may be cut off and then shown either
        assert [str(path) for path in files if piece.encode() in path.read_bytes()] == []
        for one in told:
            assert piece not in one.out + one.err
        assert piece not in caplog.text
    assert all("***" in row["reason"] for row in rows_of(small.runs / "small", 1)), "the key was there to be taken out"
    assert all("stairstep" in one.err for one in told), "nothing was logged at all"

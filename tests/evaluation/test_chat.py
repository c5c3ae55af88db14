"""A client against a real server that misbehaves on command: every question ends in a reply or in a named failure."""

from __future__ import annotations

import contextlib
import email.utils
import json
import logging
import pickle
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stairstep.evaluation.chat import AskFailed, ChatClient, retry_after
from stairstep.evaluation.endpoints import EndpointSettings

sys.path.insert(0, str(Path(__file__).parent))
from evaluation_server import EvaluationServer, body, completion, cut, drip, drip_header, hang, lost, region, reset, status, text

KEY = "sk-test-canary-0123456789"
LOG = "stairstep.evaluation.chat"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_API_KEY_FILE", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture
def server() -> Iterator[EvaluationServer]:
    with EvaluationServer() as one:
        yield one


class Clock:
    """The client's clock, which stands still until it is set; pauses still take their real time."""

    time = staticmethod(time.time)

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    one = Clock()
    monkeypatch.setattr("stairstep.evaluation.chat.time", one)
    return one


def client(server: EvaluationServer | str, who: str = "grader", **settings) -> ChatClient:
    url = server if isinstance(server, str) else server.url
    quick = {"backoff_s": 0.01, "timeout_s": 30.0, "patience_s": 0.0, "breaker": 1000, "probe_s": 60.0}
    return ChatClient(EndpointSettings("some-model", url, **{**quick, **settings}), who)


def ask(one: ChatClient, question: str = "what?", **more):
    return one.ask([{"role": "user", "content": question}], 20, **more)


def failure(one: ChatClient, question: str = "what?") -> AskFailed:
    with pytest.raises(AskFailed) as caught:
        ask(one, question)
    assert KEY not in str(caught.value) and caught.value.__cause__ is None
    return caught.value


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


# --- what is asked, and what comes back


def test_a_question_and_its_reply(server):
    one = client(server)
    reply = ask(one, "where?", seed=5)
    assert (reply.text, reply.finish_reason, reply.prompt_tokens, reply.completion_tokens) == ("an answer", "stop", 11, 3)
    (request,) = server.received
    assert request.path == "/v1/chat/completions"
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.body == {
        "model": "some-model",
        "messages": [{"role": "user", "content": "where?"}],
        "temperature": 0.0,
        "max_tokens": 20,
        "seed": 5,
    }
    assert one.calls == 1 and one.outage is None
    assert KEY not in repr(one) + repr(vars(one).get("endpoint"))


def test_a_proxy_is_not_asked_for_this_machine(server, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert ask(client(server, attempts=1)).text == "an answer"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (text([{"type": "text", "text": "two "}, {"type": "text", "text": "parts"}]), "two parts"),
        (text(""), ""),
        (text(None, refusal="I cannot help with that."), "I cannot help with that."),
        (text(None, finish="length", reasoning_content="well, let me"), ""),
        (body(json.dumps({"choices": [{"message": {"content": "no usage"}}]}).encode()), "no usage"),
    ],
)
def test_forms_of_a_reply(server, fault, said):
    server.next(fault)
    assert ask(client(server, attempts=1)).text == said


def test_newer_models_have_another_name_for_the_limit(server):
    said = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    server.chance = lambda request: status(400, said, "unsupported_parameter") if "max_tokens" in request.body else None
    one = client(server, concurrency=4)
    with ThreadPoolExecutor(4) as pool:
        assert [reply.text for reply in pool.map(lambda _: ask(one), range(8))] == ["an answer"] * 8
    assert server.received[-1].body["max_completion_tokens"] == 20
    count = len(server.received)
    ask(one)
    assert len(server.received) == count + 1, "it is remembered"


# --- failures that pass


PASSING = {
    "429": status(429, "slow down", "rate_limit_exceeded"),
    "429 with Retry-After": status(429, "slow down", "rate_limit_exceeded", retry_after="0.05"),
    "408": status(408, "too slow"),
    "500": status(500, "oops"),
    "502 in HTML": body(b"<html><h1>Bad Gateway</h1></html>", 502, "text/html"),
    "503": status(503, "no replica"),
    "a hang": hang(30.0),
    "drops of white space": drip(30.0),
    "drops of a header": drip_header(30.0),
    "no word": lost(),
    "a reset": reset(),
    "half a reply": cut(),
    "HTML": body(b"<html>hello</html>"),
    "half a JSON": body(b'{"choices": [{"message": {"content": "CORR'),
    "no bytes": body(b""),
    "no UTF-8": body(b"\xff\xfe\x00"),
    "a list": body(b"[]"),
    "null": body(b"null"),
    "no choices": body(b'{"choices": []}'),
    "choices of another type": body(b'{"choices": "CORRECT"}'),
    "no message": body(b'{"choices": [{"finish_reason": "stop"}]}'),
    "a message of another type": body(b'{"choices": [{"message": "CORRECT"}]}'),
    "null content": text(None),
    "a number for content": text(1),
    "an error with status 200": body(b'{"error": {"message": "overloaded"}}'),
    "a 401 among replies": status(401, "try again"),
}


SHORT = {
    "a hang": 1.0,
    "drops of white space": 1.0,
    "drops of a header": 1.0,
}  # seconds after which a reply is given up; a busy machine needs more for the others


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_asked_again(server, name):
    one = client(server, attempts=3, timeout_s=SHORT.get(name, 30.0))
    failures = 1 if name in SHORT else 2
    server.next(*[PASSING[name]] * failures)
    assert ask(one).text == "an answer"
    assert one.calls == len(server.received) == failures + 1
    assert one.outage is None


@pytest.mark.parametrize("name", PASSING)
def test_what_does_not_pass_is_given_up_after_bounded_attempts(server, name):
    one = client(server, attempts=2, timeout_s=SHORT.get(name, 30.0))
    server.chance = lambda request: PASSING[name]
    error = failure(one)
    assert one.calls == len(server.received) == 2
    assert "grader" in error.reason and "given up after 2 attempts" in error.reason
    expected = {
        "429": "limited",
        "429 with Retry-After": "limited",
        "408": "server",
        "a hang": "timeout",
        "drops of white space": "timeout",
        "drops of a header": "timeout",
        "no word": "lost",
        "a reset": "lost",
        "half a reply": "lost",
        "an error with status 200": "server",
        "a 401 among replies": "refused",
    }.get(name, "server" if name.startswith("50") else "malformed")
    assert error.kind == expected


def test_the_clock_holds_for_a_connection_that_is_used_again(server):
    """And it starts anew with every request, in any thread."""
    one = client(server, attempts=1, timeout_s=2.0, concurrency=1)
    ask(one)
    with ThreadPoolExecutor(1) as other:
        assert other.submit(ask, one).result().text == "an answer"
        server.next(drip_header(30.0))
        assert other.submit(failure, one).result().kind == "timeout"
    assert ask(one).text == "an answer"


def test_a_server_that_takes_a_question_in_sips_is_given_up():
    """It takes each of them in time, and would reply in the end."""
    size, taken_in = 20_000_000, 0
    closing = threading.Event()

    def sip(listener: socket.socket) -> None:
        nonlocal taken_in
        taken, _ = listener.accept()
        with taken, contextlib.suppress(OSError):
            while taken_in < size and not closing.wait(0.05):
                sipped = len(taken.recv(65_536))
                if not sipped:
                    return
                taken_in += sipped
            data = json.dumps(completion("too late")).encode()
            taken.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data) + data)

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = threading.Thread(target=sip, args=(listener,), daemon=True)
        server.start()
        one = client(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", attempts=1, timeout_s=2.0)
        assert failure(one, "x" * size).kind == "timeout"
        closing.set()
        server.join()
    assert 0 < taken_in < size // 2, "the rest was not sent"


def test_what_is_paid_for_is_counted_whatever_becomes_of_it(server):
    one = client(server, attempts=4)
    server.next(status(500, "down"), text(None), body(b"<html>"))
    ask(one)
    assert one.spent() == {"requests": 4, "prompt_tokens": 22, "completion_tokens": 6}, "null content had its usage too"
    server.next(text(None, finish="content_filter"))
    failure(one)
    assert one.spent() == {"requests": 5, "prompt_tokens": 33, "completion_tokens": 9}


def test_retry_after_is_honoured(server):
    one = client(server)
    server.next(status(429, "slow down", retry_after="0.4"), status(503, "starting", retry_after_ms="300"))
    ask(one)
    first, second, third = (request.at for request in server.received)
    assert 0.4 <= second - first < 20
    assert 0.3 <= third - second < 20


def test_a_wait_longer_than_a_request_may_take_is_not_waited(server):
    started = time.monotonic()
    server.next(status(429, "come tomorrow", retry_after="86400"))
    error = failure(client(server))
    assert error.kind == "limited" and "asks to wait 86400 s" in error.reason
    assert time.monotonic() - started < 20 and len(server.received) == 1


def test_ways_to_say_retry_after():
    assert retry_after({"retry-after": "7"}) == 7
    assert retry_after({"retry-after-ms": "250", "retry-after": "7"}) == 0.25
    assert retry_after({"retry-after": "-3"}) == 0
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 25 < retry_after({"retry-after": date}) <= 30
    for none in ({}, {"retry-after": "soon"}, {"retry-after": "nan"}, {"retry-after": "inf"}):
        assert retry_after(none) is None


def test_pauses_grow_and_differ(server, monkeypatch):
    one = client(server, attempts=9, backoff_s=1.0)
    waits = []
    monkeypatch.setattr(one._breaker, "pause", waits.append)
    server.chance = lambda request: status(500)
    failure(one)
    assert len(waits) == 8
    for wait, most in zip(waits, (1, 2, 4, 8, 16, 16, 16, 16), strict=True):
        assert most / 2 <= wait <= most
    assert len(set(waits[4:])) > 1, "jitter"


# --- failures that do not


@pytest.mark.parametrize(
    ("fault", "kind", "told"),
    [
        (status(400, "context too long", "context_length_exceeded"), "rejected", "said 400: context too long"),
        (status(422, "no such image"), "rejected", "said 422"),
        (status(413, "too large"), "rejected", "said 413"),
        (text(None, finish="content_filter"), "rejected", "content filter"),
    ],
)
def test_a_question_that_is_rejected_is_not_asked_again(server, fault, kind, told, caplog):
    one = client(server, breaker=1)
    server.chance = lambda request: fault
    for _ in range(5):
        error = failure(one)
        assert error.kind == kind and told in error.reason
    assert one.calls == 5 and one.outage is None, "the endpoint itself is well"


def test_a_question_that_cannot_be_sent_is_told(server):
    error = failure(client(server), "half a pair: \ud800")
    assert error.kind == "rejected" and "cannot be sent" in error.reason
    assert not server.received


def test_a_region_is_told_with_the_host_to_set(server, caplog):
    server.chance = lambda request: region()
    with caplog.at_level(logging.ERROR, logger=LOG):
        error = failure(client(server))
    assert "401" in error.reason and "incorrect regional hostname" in error.reason
    assert "set OPENAI_BASE_URL=https://us.api.openai.com/v1" in error.reason
    assert "evaluation.grader.base_url=https://us.api.openai.com/v1" in error.reason, "the recipe names an address, which comes first"
    assert len(caplog.records) == 1 and "OPENAI_BASE_URL=https://us.api.openai.com/v1" in caplog.text


def test_a_region_where_the_variable_gave_the_address(server, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    server.chance = lambda request: region()
    one = ChatClient(EndpointSettings("some-model", backoff_s=0.01), "grader")
    assert failure(one).reason.endswith("set OPENAI_BASE_URL=https://us.api.openai.com/v1")


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (status(401, f"Incorrect API key provided: {KEY}.", "invalid_api_key"), "check the variable OPENAI_API_KEY"),
        (status(401, "Incorrect API key provided: sk-test-********6789.", "invalid_api_key"), "provided: ***. The key was not"),
        (status(403, "Country not supported"), "Country not supported"),
        (status(404, "The model `some-model` does not exist", "model_not_found"), "Is some-model served there"),
        (status(429, "You exceeded your current quota", "insufficient_quota"), "no quota left"),
    ],
)
def test_a_refusal_is_told_once_and_at_once(server, caplog, fault, told):
    server.chance = lambda request: fault
    one = client(server, patience_s=1000.0)
    with caplog.at_level(logging.ERROR, logger=LOG):
        errors = [failure(one) for _ in range(20)]
    assert len(server.received) == 3, "a gateway may refuse one request for nothing, and not three in a row"
    assert all(error.kind == "outage" and told in error.reason for error in errors)
    assert len(caplog.records) == 1 and told in caplog.text and KEY not in caplog.text
    assert told in one.outage


# --- outages


def test_a_dead_server_is_told_once_for_400_questions(caplog):
    port = free_port()
    one = client(f"http://127.0.0.1:{port}/v1", who="reader", breaker=20, patience_s=0.2, concurrency=8)

    def question(_: int) -> AskFailed:
        return failure(one)

    started = time.monotonic()
    with caplog.at_level(logging.DEBUG, logger=LOG), ThreadPoolExecutor(16) as pool:
        errors = list(pool.map(question, range(400)))
    assert time.monotonic() - started < 60
    told = [record for record in caplog.records if record.levelno >= logging.INFO]
    assert len(told) == 1
    message = told[0].getMessage()
    assert f"the reader at http://127.0.0.1:{port}/v1 is out" in message and "refused" in message
    assert "evaluation.reader.base_url" in message and "failures in a row" in message
    assert {error.kind for error in errors} == {"lost", "outage"} or {error.kind for error in errors} == {"outage"}
    assert sum(error.kind == "outage" and one.outage in error.reason for error in errors) > 350
    assert one.calls < 100, "most questions fail without a request"


def test_a_burst_of_failures_shorter_than_the_patience_is_no_outage(server, clock):
    one = client(server, breaker=3, patience_s=30.0, attempts=10)
    server.next(*[lost()] * 9)
    assert ask(one).text == "an answer"
    assert one.outage is None
    server.next(*[lost()] * 12)
    assert failure(one).kind == "lost" and one.outage is None
    clock.now += 31
    assert failure(one).kind == "outage" and "11 failures in a row over 31 s" in one.outage


def test_a_probe_ends_an_outage(server, clock, caplog):
    one = client(server, breaker=2, attempts=2, probe_s=60.0)
    server.chance = lambda request: status(500, "down")
    with caplog.at_level(logging.WARNING, logger=LOG):
        failure(one)
        assert one.outage is not None and len(server.received) == 2
        assert failure(one).kind == "outage" and len(server.received) == 2, "no request"
        clock.now += 61
        assert failure(one).kind == "outage" and len(server.received) == 3, "one request, and it is not repeated"
        assert failure(one).kind == "outage" and len(server.received) == 3
        server.chance = lambda request: None
        clock.now += 61
        assert ask(one).text == "an answer"
        assert one.outage is None
        assert ask(one).text == "an answer"
    assert [record.levelno for record in caplog.records] == [logging.ERROR, logging.WARNING]
    assert "answers again" in caplog.records[1].getMessage()


def test_one_probe_at_a_time(server, clock):
    one = client(server, breaker=1, attempts=1, probe_s=60.0, concurrency=8)
    server.next(status(500, "down"))
    failure(one)
    clock.now += 61
    server.next(hang(1.0))
    with ThreadPoolExecutor(8) as pool:
        kinds = [error.kind for error in pool.map(lambda _: failure(one), range(8))]
    assert kinds == ["outage"] * 8
    assert len(server.received) == 2


def test_questions_that_wait_for_another_attempt_learn_of_an_outage(server):
    """Not each of them sleeps to the end of its own pauses."""
    one = client(server, breaker=8, attempts=6, backoff_s=60.0, concurrency=8)
    server.chance = lambda request: status(500, "down")
    started = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        kinds = {error.kind for error in pool.map(lambda _: failure(one), range(8))}
    assert kinds == {"outage"} and time.monotonic() - started < 25


def test_storms_of_429_end_in_replies(server):
    """Each question is refused five times: that many 429s in a row over all threads, and no outage."""
    seen: dict[str, int] = {}

    def storm(request):
        seen[request.prompt] = seen.get(request.prompt, 0) + 1
        return status(429, "slow down", retry_after="0.02") if seen[request.prompt] <= 5 else None

    server.chance = storm
    one = client(server, breaker=5, concurrency=8)
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda number: ask(one, f"question {number}"), range(40)))
    assert len(replies) == 40 and one.outage is None
    assert one.calls == 40 * 6


def test_a_storm_that_never_ends_is_an_outage_in_the_end(server):
    one = client(server, breaker=3, attempts=2)
    server.chance = lambda request: status(429, "slow down")
    kinds = [failure(one).kind for _ in range(10)]
    assert kinds == ["limited"] * 2 + ["outage"] * 8
    assert "slow down" in one.outage


# --- threads


def test_no_more_requests_at_once_than_allowed(server):
    def slow(request):
        time.sleep(0.3)  # long enough for two others to come, on a machine that is busy too

    server.chance = slow
    one = client(server, concurrency=3)
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda _: ask(one), range(24)))
    assert server.most_at_once == 3


def test_slots_and_probes_are_given_back_whatever_happens(server, clock, monkeypatch):
    """Also by an exception that nobody foresaw."""
    one = client(server, concurrency=1, breaker=1, attempts=1, probe_s=60.0)
    server.next(status(500, "down"))
    failure(one)
    clock.now += 61

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(one, "_sent", stopped)
        with pytest.raises(KeyboardInterrupt):
            ask(one)
    done = threading.Thread(target=ask, args=(one,), daemon=True)
    done.start()
    done.join(30)
    assert not done.is_alive() and one.outage is None


def test_nothing_that_a_server_says_fills_a_log(server):
    server.chance = lambda request: status(400, "x" * 100_000 + f"\n{KEY}")
    error = failure(client(server))
    assert len(error.reason) < 500 and "\n" not in error.reason


def test_an_endless_reply_is_given_up(server, monkeypatch):
    monkeypatch.setattr("stairstep.evaluation.chat._MOST_BYTES", 1000)
    server.chance = lambda request: body(json.dumps(completion("x" * 5000)).encode())
    assert "longer than 1000 bytes" in failure(client(server, attempts=1)).reason


def test_a_key_is_in_no_log_and_no_message(server, caplog):
    """Whatever a server echoes, and however much the libraries below tell."""
    one = client(server, attempts=2, breaker=3)
    echoes = [status(code, f"Bearer {KEY} is not what I know", KEY, x_echo=KEY) for code in (500, 400, 401, 401, 401)]
    with caplog.at_level(logging.DEBUG):
        ask(one)
        server.next(*echoes, body(f"<html>{KEY}".encode()))
        told = [str(failure(one)) for _ in range(4)]
    assert server.received[0].headers["authorization"].endswith(KEY), "the canary was there to be seen"
    assert len(server.received) > 5 and any("***" in text for text in told)
    assert KEY not in caplog.text + "".join(told) + str(one.outage)
    assert all(KEY not in str(vars(record)) for record in caplog.records)


@pytest.mark.parametrize(
    ("key", "said"),
    [(KEY, "*** is refused"), ("hunter-2", "*** is refused"), ("k3y", "*** is refused")]
    + [(word, f"{word} is refused") for word in ("EMPTY", "none", "Dummy", "not-needed")],
)
def test_a_reply_is_kept_without_the_key_but_with_a_word_that_only_stands_for_one(server, monkeypatch, key, said):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    server.next(text(f"{key} is refused"))
    assert ask(client(server)).text == said


def test_a_short_key_is_told_for_it_changes_replies(server, monkeypatch, caplog):
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    client(server)
    assert not caplog.records
    monkeypatch.setenv("OPENAI_API_KEY", "k3y")
    client(server)
    assert "the key in OPENAI_API_KEY is short" in caplog.text and "k3y" not in caplog.text


def test_a_key_is_not_cut_off_and_then_shown(server, monkeypatch):
    key = "a-key-" + "0123456789" * 10
    monkeypatch.setenv("OPENAI_API_KEY", key)
    server.chance = lambda request: body(f"Bearer {key}".encode())
    assert "sent 'Bearer ***'" in failure(client(server, attempts=1)).reason


def test_a_failure_travels_between_processes():
    again = pickle.loads(pickle.dumps(AskFailed("no connection", "lost")))
    assert (again.reason, again.kind, str(again)) == ("no connection", "lost", "no connection")

"""The door of the reader: keys, places in the queue, bounded bodies, and settings that say what they mean."""

from __future__ import annotations

import asyncio

import pytest

from serve.front import Front, read_key
from serve.protocol import RequestError
from serve.settings import LimitSettings, ReaderAppSettings, app_settings, check_host, is_loopback
from stairstep.settings import InputError, RecipeError

KEY = "READER_TEST_KEY"
HERE = ("127.0.0.1", 5)
THERE = ("192.0.2.7", 5)


def scope(client=HERE, server=HERE, **headers: str) -> dict:
    given = [(name.encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "client": client, "server": server, "headers": given}


def door(key_env: str | None = None, **limits) -> Front:
    return Front(ReaderAppSettings(key_env=key_env, limits=LimitSettings(**limits)), {KEY: "right"})


def status(front: Front, one: dict) -> int:
    try:
        front.authorise(one)
    except RequestError as error:
        return error.status
    return 200


def test_a_key_is_asked_of_everybody():
    front = door(KEY)
    assert status(front, scope(authorization="Bearer right")) == 200
    assert status(front, scope(THERE, THERE, authorization="bearer  right")) == 200
    for wrong in ("Bearer wrong", "Bearer", "Bearer right x", "Basic right", "right", ""):
        assert status(front, scope(authorization=wrong)) == 401, wrong
    assert status(front, scope()) == 401
    twice = scope(authorization="Bearer right")
    twice["headers"] *= 2
    assert status(front, twice) == 401


def test_keys_are_compared_in_constant_time(monkeypatch):
    compared = []
    monkeypatch.setattr("serve.front.hmac.compare_digest", lambda *pair: compared.append(pair) or pair[0] == pair[1])
    front = door(KEY)
    status(front, scope(authorization="Bearer wrong, and of another length"))
    status(front, scope())
    assert [len(one) for pair in compared for one in pair] == [32] * 4


def test_without_a_key_this_machine_alone_is_served():
    front = door()
    assert status(front, scope()) == 200
    assert status(front, scope(("::1", 1), ("::1", 2))) == 200
    for client, server in ((THERE, HERE), (HERE, THERE), (None, HERE), (HERE, None)):
        assert status(front, scope(client, server)) == 403


def test_a_key_is_read_from_its_variable_or_its_file(tmp_path):
    path = tmp_path / "key"
    path.write_text(" secret\n")
    assert read_key(None, {}) is None
    assert read_key(KEY, {KEY: "plain", f"{KEY}_FILE": str(path)}) == "plain"
    assert read_key(KEY, {f"{KEY}_FILE": str(path)}) == "secret"
    with pytest.raises(InputError, match=f"neither {KEY} nor {KEY}_FILE"):
        read_key(KEY, {KEY: "  "})
    with pytest.raises(InputError, match=f"{KEY}_FILE: the file"):
        read_key(KEY, {f"{KEY}_FILE": str(tmp_path / "missing")})


def test_places_are_counted():
    front = door(queue=2)
    first, second = front.enter(), front.enter()
    front.seconds_an_answer = 3.2
    with pytest.raises(RequestError) as told:
        front.enter()
    assert (told.value.status, told.value.headers["Retry-After"]) == (429, "4")
    first.give_back()
    first.give_back()
    assert front.inside == 1, "a place is given back once"
    third = front.enter()
    second.give_back()
    third.give_back()
    assert front.inside == 0


def sent(*parts: bytes, announced: int | None = None):
    messages = [{"type": "http.request", "body": part, "more_body": index + 1 < len(parts)} for index, part in enumerate(parts)]
    taken = iter([*messages, {"type": "http.disconnect"}])

    async def receive() -> dict:
        return next(taken)

    return (scope(**({"content-length": str(announced)} if announced is not None else {})), receive)


def test_a_body_is_read_up_to_its_bound():
    front = door(max_body_mb=1e-5)
    assert asyncio.run(front.body(*sent(b"12345", b"67890"))) == b"1234567890"
    for body in (sent(b"12345", b"678901"), sent(b"", announced=11)):
        with pytest.raises(RequestError, match="max_body_mb") as told:
            asyncio.run(front.body(*body))
        assert told.value.status == 413


def test_a_body_that_breaks_off_is_no_body():
    receive_scope, receive = sent()
    with pytest.raises(RequestError, match="closed before"):
        asyncio.run(door().body(receive_scope, receive))


def test_who_listens_to_others_asks_for_a_key():
    check_host(ReaderAppSettings(), "127.0.0.1")
    check_host(ReaderAppSettings(key_env=KEY), "0.0.0.0")
    for host in ("0.0.0.0", "::", "192.0.2.1", "reader.example"):
        with pytest.raises(InputError, match="an API key is required"):
            check_host(ReaderAppSettings(), host)


def test_loopback():
    assert all(is_loopback(one) for one in ("127.0.0.1", "127.3.4.5", "::1", "[::1]", "localhost", "::ffff:127.0.0.1"))
    assert not any(is_loopback(one) for one in ("0.0.0.0", "::", "192.0.2.1", "::ffff:192.0.2.1", "127.0.0.1.example", "", None))


def test_arguments_of_a_serve_config():
    settings = app_settings({"engine": {"kind": "vllm"}, "limits.queue": "7", "limits": {"timeout_s": 5}, "replicas.max": 3})
    assert (settings.engine.kind, settings.limits.queue, settings.limits.timeout_s, settings.replicas.max) == ("vllm", 7, 5.0, 3)
    assert settings.model_name == "Qwen/Qwen3-VL-4B-Instruct"
    assert app_settings(None) == ReaderAppSettings()
    for wrong, words in (
        ({"limits": {"que": 1}}, "unknown key 'limits.que'; did you mean 'limits.queue'"),
        ({"engine": {"kind": "vlm"}}, "did you mean 'vllm'"),
        ({"engine": {"gpu_memory_utilization": 0.5}}, "unknown key"),
        ({"engine": {"kind": "vllm", "device": "cpu", "tensor_parallel": 2}}, "cpu has no accelerator"),
        ({"replicas": {"min": 2}}, "more than max"),
        ({"limits": {"queue": 0}}, "limits.queue"),
    ):
        with pytest.raises(RecipeError, match=words.replace(".", r"\.")):
            app_settings(wrong)


def test_a_key_in_place_of_its_variables_name_is_not_repeated():
    with pytest.raises(RecipeError) as told:
        app_settings({"key_env": "sk-test-123"})
    assert "sk-test" not in str(told.value)
    assert "never the key itself" in str(told.value)

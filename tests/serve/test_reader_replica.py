"""A replica without Ray, as an ASGI application: answers, refusals, time limits, a queue that empties, thread and event loop apart."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from serve_requests import ask, image_part, page
from starlette.requests import Request

from serve.replica import ReaderReplica
from stairstep.models.reading import load_reader
from stairstep.settings import InputError
from stairstep.tiles import TileSettings, decode_image, resize


def served(replica: ReaderReplica) -> httpx.AsyncClient:
    async def app(scope, receive, send):
        await (await replica(Request(scope, receive)))(scope, receive, send)

    async def here(scope, receive, send):
        await app({**scope, "server": ("127.0.0.1", 80)}, receive, send)

    return httpx.AsyncClient(transport=httpx.ASGITransport(here), base_url="http://127.0.0.1/v1")


def post(replica: ReaderReplica, *bodies: Any, path: str = "/chat/completions") -> list[httpx.Response]:
    async def all_of_them() -> list[httpx.Response]:
        async with served(replica) as client:
            return await asyncio.gather(*(client.post(path, json=body) for body in bodies))

    return asyncio.run(all_of_them())


@pytest.fixture(scope="module")
def replica(folder) -> ReaderReplica:
    limits = {"queue": 4, "timeout_s": 30, "max_image_pixels": 2_000_000}
    return ReaderReplica({"engine": {"model": str(folder)}, "name": "m", "limits": limits})


@pytest.fixture
def limited(replica, monkeypatch) -> Callable[..., None]:
    """Other limits for one test."""
    from dataclasses import replace

    def change(**limits) -> None:
        settings = replace(replica.settings, limits=replace(replica.settings.limits, **limits))
        monkeypatch.setattr(replica, "settings", settings)
        monkeypatch.setattr(replica.front, "limits", settings.limits)

    return change


@pytest.fixture
def held(replica, monkeypatch):
    """Hold the reader at its first token until let go."""

    @contextmanager
    def hold():
        let_go, there = threading.Event(), threading.Event()
        original = replica.engine._stop_if_unwanted

        def wait(*_):
            there.set()
            while not let_go.wait(0.01):
                original()
            original()

        handle = replica.engine.reader.model.lm_head.register_forward_pre_hook(wait)
        try:
            yield there, let_go
        finally:
            let_go.set()
            handle.remove()

    return hold


def empty(replica) -> bool:
    end = time.monotonic() + 10
    while replica.front.inside and time.monotonic() < end:
        time.sleep(0.01)
    return replica.front.inside == 0


def test_answers_are_those_of_the_reader(replica, folder):
    asked = [
        ("Who?", [page(1)], ""),
        ("Where was it?", [page(2), page(3, 100, 70)], "Be brief."),
        ("No tiles?", [], ""),
        ("Who?", [page(2)], ""),
    ]
    got = post(replica, *(ask("m", question, images, system) for question, images, system in asked))
    reader = load_reader(folder, max_new_tokens=12)
    for (question, images, system), response in zip(asked, got, strict=True):
        assert response.status_code == 200, response.text
        reader.system = system
        tiles = [resize(decode_image(one, "", 10**6), TileSettings().geometry()) for one in images]
        assert response.json()["choices"][0]["message"]["content"] == reader.answer(question, tiles)
    assert len({one.json()["choices"][0]["message"]["content"] for one in got}) == 4
    assert empty(replica)


def test_the_order_of_text_and_images_reaches_the_model(replica):
    text, image = {"type": "text", "text": "Who is it?"}, image_part(page(1))
    bodies = [{**ask("m", "", []), "messages": [{"role": "user", "content": parts}]} for parts in ([text, image], [image, text])]
    first, second = (one.json() for one in post(replica, *bodies))
    assert first["usage"]["prompt_tokens"] == second["usage"]["prompt_tokens"]
    assert first["choices"][0]["message"]["content"] != second["choices"][0]["message"]["content"]


def test_lengths_are_told(replica):
    [short] = post(replica, ask("m", "Who?", [page(1)], max_tokens=1))
    assert (short.json()["choices"][0]["finish_reason"], short.json()["usage"]["completion_tokens"]) == ("length", 1)
    [default] = post(replica, {key: value for key, value in ask("m", "Who?", [page(1)]).items() if key != "max_tokens"})
    assert default.json()["usage"]["completion_tokens"] == 48
    [long] = post(replica, ask("m", "Who?" * 900, [page(1)], max_tokens=1000))
    assert long.status_code == 400
    assert long.json()["error"]["code"] == "context_length_exceeded"


def test_an_answer_that_ends_is_called_so(replica, monkeypatch):
    """With the second token of an answer as the model's end."""
    [whole] = post(replica, ask("m", "Who?", [page(1)]))
    reader = replica.engine.reader
    [ids] = reader.prompts.ids([reader.prompts.text("Who?", 1)], [[(96, 64)]])
    tokens = replica.engine._generated(ids, [(96, 64)], [replica.engine._pixels(page(1), "page")], 2)
    assert tokens[0] != tokens[1]
    monkeypatch.setattr(reader, "_ends", reader._ends.new_tensor(tokens[1:]))
    [ended] = post(replica, ask("m", "Who?", [page(1)]))
    choice = ended.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert ended.json()["usage"]["completion_tokens"] == 2
    assert whole.json()["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"GIF89a but nothing more", "damaged"),
        (b"no image at all", "not an image"),
        (page(1)[:200], "damaged"),
        (page(1, 1500, 1500), "limits.max_image_pixels = 2000000"),
        (page(1, 4, 1600), "at most 200 times"),
    ],
)
def test_images_that_are_none(replica, data, words):
    [response] = post(replica, ask("m", "Who?", [page(1), data]))
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]
    assert "image 2" in response.json()["error"]["message"]
    assert empty(replica)


def test_a_question_cannot_smuggle_in_an_image(replica):
    [response] = post(replica, ask("m", "Who? <|image_pad|>", [page(1)]))
    assert response.status_code == 400
    assert "must not contain that token" in response.json()["error"]["message"]


def test_paths_and_methods(replica):
    async def ask_all() -> list[int]:
        async with served(replica) as client:
            calls = [("GET", "/models"), ("GET", "/models/m"), ("GET", "/models/x"), ("GET", "/chat/completions"), ("POST", "/completions")]
            return [(await client.request(*call)).status_code for call in calls]

    assert asyncio.run(ask_all()) == [200, 200, 404, 405, 404]


def test_past_the_queue_there_is_no_place_but_models_are_still_listed(replica, held):
    async def crowd() -> list[httpx.Response]:
        async with served(replica) as client:
            with held() as (there, let_go):
                waiting = [asyncio.create_task(client.post("/chat/completions", json=ask("m", f"Who {n}?", [page(n)]))) for n in range(4)]
                await asyncio.to_thread(there.wait, 10)
                while replica.front.inside < 4:
                    await asyncio.sleep(0.01)
                fifth = await client.post("/chat/completions", json=ask("m", "Who?", []))
                models = await client.get("/models")
                let_go.set()
                return [fifth, models, *await asyncio.gather(*waiting)]

    fifth, models, *others = asyncio.run(crowd())
    assert (fifth.status_code, fifth.json()["error"]["code"]) == (429, "queue_full")
    assert int(fifth.headers["Retry-After"]) >= 1
    assert models.status_code == 200
    assert [one.status_code for one in others] == [200] * 4
    assert empty(replica)


def test_a_request_out_of_time_is_given_up_and_its_thread_freed(replica, held, limited):
    limited(timeout_s=0.3)
    with held():
        first, second = post(replica, ask("m", "Who?", [page(1)]), ask("m", "Where?", [page(1)]))
        assert [one.status_code for one in (first, second)] == [504, 504]
        assert first.json()["error"]["code"] == "timeout"
        assert empty(replica), "an answer that nobody waits for stops at its next token"
    limited(timeout_s=30)
    [third] = post(replica, ask("m", "Who?", [page(1)]))
    assert third.status_code == 200


def test_who_hangs_up_makes_room(replica, held):
    async def hang_up() -> None:
        async with served(replica) as client:
            with held() as (there, _):
                task = asyncio.create_task(client.post("/chat/completions", json=ask("m", "Who?", [page(1)])))
                await asyncio.to_thread(there.wait, 10)
                assert replica.front.inside == 1
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                assert await asyncio.to_thread(empty, replica)

    asyncio.run(hang_up())


def test_a_stuck_reader_is_unhealthy(replica, monkeypatch):
    replica.check_health()
    monkeypatch.setattr(replica.engine, "busy_since", time.monotonic() - 1000)
    with pytest.raises(RuntimeError, match="at one answer"):
        replica.check_health()


def test_a_defect_of_ours_is_told_in_the_protocols_form(replica, monkeypatch):
    monkeypatch.setattr(replica.engine, "complete", lambda *_: 1 / 0)
    [response] = post(replica, ask("m", "Who?", []))
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "division" not in json.dumps(response.json())
    assert empty(replica)


def test_a_model_that_cannot_be_had(tmp_path):
    with pytest.raises(InputError, match="there is no folder"):
        ReaderReplica({"engine": {"model": str(tmp_path / "none")}})

"""The protocol of the reader: what is read from a request, what is refused and how it is said. No server, no model."""

from __future__ import annotations

import base64
import json

import pytest
from serve_requests import ask, image_part, page

from serve.front import refusal
from serve.protocol import Completion, RequestError, chat_request, check_model, completion_body, conversation, parse_json
from serve.settings import LimitSettings

LIMITS = LimitSettings(max_images=3, max_image_mb=0.1)


def refused(**changes) -> RequestError:
    body = {**ask("m", "Who?", [page(1)]), **changes}
    with pytest.raises(RequestError) as told:
        chat_request(json.loads(json.dumps(body)), LIMITS)
    assert told.value.status == 400
    assert set(told.value.body()["error"]) == {"message", "type", "param", "code"}
    return told.value


def user(*parts) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


def test_a_request_becomes_a_conversation_in_the_order_given():
    first, second = page(1), page(2)
    body = ask("m", "Who?", [first, second], system="Be brief.", max_tokens=7, seed=3, top_p=0.5, user="me", n=1, stream=False, stop=None)
    request = chat_request(json.loads(json.dumps(body)), LIMITS)
    assert request.max_tokens == 7
    assert request.conversation.images == (first, second)
    assert list(request.conversation.messages) == [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "Who?"}, {"type": "image"}, {"type": "image"}]},
    ]


def test_other_orders_stay_other_orders():
    mixed = user(image_part(page(1)), {"type": "text", "text": "This?"}, image_part(page(2)), {"type": "text", "text": "Or that?"})
    messages = [*user({"type": "text", "text": "Hello"}), {"role": "assistant", "content": "Yes?"}, *mixed]
    found = conversation({"messages": messages}, LIMITS)
    assert [one["role"] for one in found.messages] == ["user", "assistant", "user"]
    assert [part["type"] for part in found.messages[-1]["content"]] == ["image", "text", "image", "text"]
    assert found.images == (page(1), page(2))


def test_max_completion_tokens_is_the_newer_name():
    body = ask("m", "Who?", [])
    del body["max_tokens"]
    assert chat_request(body, LIMITS).max_tokens is None
    assert chat_request({**body, "max_completion_tokens": 5}, LIMITS).max_tokens == 5
    assert "contradict" in refused(max_completion_tokens=5, max_tokens=6).message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": 0.7}, "greedily"),
        ({"temperature": True}, "greedily"),
        ({"temperature": "0"}, "greedily"),
        ({"n": 2}, "n: "),
        ({"stream": True}, "stream: "),
        ({"logprobs": True}, "logprobs: "),
        ({"stop": ["x"]}, "stop: "),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"tools": [{"type": "function"}]}, "tools: "),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"guided_regex": "a*"}, "guided_regex: this reader knows no such option"),
        ({"max_tokens": 0}, "max_tokens: expected a whole number"),
        ({"max_tokens": 1.5}, "max_tokens: expected a whole number"),
        ({"max_tokens": True}, "max_tokens: expected a whole number"),
        ({"messages": []}, "at least one message"),
        ({"messages": "Who?"}, "found text"),
        ({"messages": ["Who?"]}, "messages[0]: expected an object"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "name"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "last message must be the user's"),
        ({"messages": user("x")}, "messages[0].content[0]"),
        ({"messages": user({"type": "text"})}, "expected text, found nothing"),
        ({"messages": user({"type": "text", "text": "\ud83d"})}, "surrogate"),
        ({"messages": user({"type": "input_audio"})}, '"input_audio"'),
        ({"messages": [{"role": "system", "content": [image_part(b"x")]}, *user({"type": "text", "text": "x"})]}, "images belong"),
    ],
)
def test_what_would_not_be_acted_upon_is_refused_by_name(changes, words):
    assert words in refused(**changes).message


@pytest.mark.parametrize(
    "changes",
    [
        {"\ud800": 1},
        {"model\udfff": "m"},
        {"messages": [{"role": "user", "content": "x", "\ud83d": 1}]},
        {"messages": user({"type": "\ud800"})},
    ],
)
def test_a_refusal_that_repeats_half_a_character_can_be_sent(changes):
    error = refused(**changes)
    assert "\\ud" in error.message
    sent = json.loads(refusal(error).body)
    assert sent == error.body()


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/page.png",
        "https://example.org/page.png",
        "file:///etc/hostname",
        "/etc/hostname",
        "data:text/plain;base64,eA==",
        "data:image/png,eA==",
        "",
    ],
)
def test_nothing_is_fetched(url):
    part = {"type": "image_url", "image_url": {"url": url}}
    assert "fetches nothing" in refused(messages=user(part)).message


def test_images_are_bounded_in_number_and_size_before_they_are_decoded():
    assert "limits.max_images = 3" in refused(messages=user(*[image_part(b"no image")] * 4)).message
    assert "limits.max_image_mb = 0.1" in refused(messages=user(image_part(bytes(100_100)))).message
    assert len(conversation({"messages": user(image_part(bytes(99_990)))}, LIMITS).images[0]) == 99_990


def test_base64_is_read_strictly():
    good = base64.b64encode(page(1)).decode()
    for bad in (good[:-1], good + "!", good[:10] + "\n" + good[10:]):
        part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{bad}"}}
        assert "not base64" in refused(messages=user(part)).message


def test_the_detail_of_an_image_is_the_servers():
    part = image_part(page(1))
    part["image_url"]["detail"] = "auto"
    assert conversation({"messages": user(part)}, LIMITS).images
    part["image_url"]["detail"] = "low"
    assert "detail" in refused(messages=user(part)).message


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[]", b'"x"', b"[" * 100_000, b"1" * 5000])
def test_bodies_that_are_no_object(body):
    with pytest.raises(RequestError, match="the body is"):
        parse_json(body)


def test_the_model_is_asked_by_its_name():
    check_model({"model": "m"}, "m")
    with pytest.raises(RequestError, match="does not exist") as told:
        check_model({"model": "other"}, "m")
    assert (told.value.status, told.value.code) == (404, "model_not_found")
    with pytest.raises(RequestError, match="expected the name"):
        check_model({}, "m")


def test_the_response_is_a_chat_completion_of_the_openai_package():
    openai_types = pytest.importorskip("openai.types.chat")
    body = completion_body("m", Completion("Anna", "stop", 30, 5))
    read = openai_types.ChatCompletion.model_validate(body)
    assert read.choices[0].message.content == "Anna"
    assert read.usage is not None
    assert read.usage.total_tokens == 35

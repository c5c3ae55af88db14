"""The OpenAI protocol as far as a reader speaks it: requests checked strictly, errors in OpenAI's form. Knows no server and no engine.

Nothing is fetched: an image is a `data:` URL or an error. Nothing is ignored: what an engine would not act upon is refused by name. All
bounds hold before a pixel is decoded.
"""

from __future__ import annotations

import base64
import binascii
import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .settings import LimitSettings

ROLES = ("system", "user", "assistant")
# Without influence on a greedy answer, or about bookkeeping.
HARMLESS = {"top_p", "top_k", "min_p", "seed", "user", "metadata", "store", "safety_identifier"}
# Taken with the one value that means "leave it alone".
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "temperature": (0,),
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "stream": (False,),
    "stream_options": (),
    "stop": ([],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
}
READ = {"model", "messages", "max_tokens", "max_completion_tokens"}


class RequestError(Exception):
    """A request that is not answered: its HTTP status and what OpenAI's clients expect to read."""

    def __init__(
        self, status: int, message: str, *, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
    ) -> None:
        message = _writable(message)
        super().__init__(message)
        self.status, self.message, self.kind, self.code = status, message, kind, code
        self.param = None if param is None else _writable(param)
        self.headers: dict[str, str] = {}

    def body(self) -> dict[str, Any]:
        """The body of the response."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them, each image a part without its pixels, and the images' files in the same order."""

    messages: tuple[dict[str, Any], ...]
    images: tuple[bytes, ...] = field(repr=False)


@dataclass(frozen=True)
class ChatRequest:
    """A request that can be answered greedily."""

    conversation: Conversation
    max_tokens: int | None


@dataclass(frozen=True)
class Completion:
    """An answer; `finish_reason` is `length` where it was cut off."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


def _writable(text: str) -> str:
    """A text that may repeat what the client sent, so that it can be written as UTF-8: JSON lets half characters through."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _refused(message: str, param: str | None, code: str | None = None) -> RequestError:
    return RequestError(400, message, param=param, code=code)


def parse_json(body: bytes) -> dict[str, Any]:
    """A request's body as a mapping."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _refused(f"the body is not JSON: {str(error)[:200]}", None) from None
    if not isinstance(found, dict):
        raise _refused(f'the body is JSON but not an object: expected {{"model": …, "messages": […]}}, found {_kind(found)}', None)
    return found


def check_model(payload: Mapping[str, Any], name: str) -> None:
    """The one model that is here must be the one that is asked."""
    asked = payload.get("model")
    if not isinstance(asked, str):
        raise _refused(f"model: expected the name of a model as text, found {_kind(asked)}; this server has {name!r}", "model")
    if asked != name:
        message = f"the model {asked[:200]!r} does not exist here; this server has {name!r}"
        raise RequestError(404, message, param="model", code="model_not_found")


def chat_request(payload: Mapping[str, Any], limits: LimitSettings) -> ChatRequest:
    """A request that asks for one greedy answer and nothing else."""
    for key, value in payload.items():
        if key in READ or key in HARMLESS or value is None:
            continue
        if key not in NEUTRAL:
            raise _refused(f"{key[:100]}: this reader knows no such option; leave it out", key[:100])
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in NEUTRAL[key]):
            raise _refused(_not_neutral(key, value), key)
    return ChatRequest(conversation(payload, limits), _max_tokens(payload))


def _not_neutral(key: str, value: Any) -> str:
    shown = json.dumps(value)[:100]
    if key == "temperature":
        return f"temperature: this reader answers greedily and only so; expected 0, found {shown}"
    allowed = " or ".join(json.dumps(one) for one in NEUTRAL[key])
    told = f"expected {allowed}, found {shown}" if allowed else "leave it out"
    return f"{key}: this reader gives one greedy answer in one piece; {told}"


def _max_tokens(payload: Mapping[str, Any]) -> int | None:
    given = {key: payload[key] for key in ("max_completion_tokens", "max_tokens") if payload.get(key) is not None}
    for key, value in given.items():
        if type(value) is not int or value < 1:
            raise _refused(f"{key}: expected a whole number of at least 1, found {json.dumps(value)[:100]}", key)
    if len(set(given.values())) > 1:
        raise _refused("max_tokens and max_completion_tokens contradict each other; give one of them", "max_tokens")
    return next(iter(given.values()), None)


def conversation(payload: Mapping[str, Any], limits: LimitSettings) -> Conversation:
    """The messages of a request with their images, within the limits; no image is decoded."""
    given = payload.get("messages")
    if not isinstance(given, list) or not given:
        raise _refused(f"messages: expected a list of at least one message, found {_kind(given)}", "messages")
    images: list[bytes] = []
    messages = tuple(_message(one, f"messages[{index}]", images, limits) for index, one in enumerate(given))
    if messages[-1]["role"] != "user":
        raise _refused(f"messages[{len(given) - 1}].role: the last message must be the user's", "messages")
    return Conversation(messages, tuple(images))


def _message(given: Any, where: str, images: list[bytes], limits: LimitSettings) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise _refused(f"{where}: expected an object with role and content, found {_kind(given)}", where)
    role, content = given.get("role"), given.get("content")
    if role not in ROLES:
        raise _refused(f"{where}.role: expected {', '.join(ROLES)}, found {json.dumps(role)[:100]}", f"{where}.role")
    unknown = [key for key, value in given.items() if key not in ("role", "content") and value is not None]
    if unknown:
        raise _refused(f"{where}.{unknown[0][:100]}: this reader knows only role and content", where)
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise _refused(f"{where}.content: expected text or a list of parts, found {_kind(content)}", f"{where}.content")
    parts = [_part(part, f"{where}.content[{index}]", images, limits) for index, part in enumerate(content)]
    if role != "user" and any(part["type"] == "image" for part in parts):
        raise _refused(f"{where}: images belong into a user's message", where)
    return {"role": role, "content": parts}


def _part(part: Any, where: str, images: list[bytes], limits: LimitSettings) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        text = part.get("text")
        if not isinstance(text, str):
            raise _refused(f"{where}.text: expected text, found {_kind(text)}", where)
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise _refused(f"{where}.text: half a character (a lone surrogate) is no text", where)
        return {"type": "text", "text": text}
    if kind == "image_url":
        if len(images) >= limits.max_images:
            raise _refused(f"{where}: more images than limits.max_images = {limits.max_images}", where)
        images.append(_image(part.get("image_url"), where, limits))
        return {"type": "image"}
    raise _refused(f'{where}: expected a part of type "text" or "image_url", found {json.dumps(kind)[:100]}', where)


def _image(given: Any, where: str, limits: LimitSettings) -> bytes:
    """The bytes of an image file given as a data URL."""
    url = given.get("url") if isinstance(given, dict) else given
    if not isinstance(url, str):
        raise _refused(f'{where}.image_url: expected {{"url": "data:image/png;base64,…"}}', where)
    if isinstance(given, dict) and given.get("detail") not in (None, "auto"):
        raise _refused(f"{where}.image_url.detail: the server decides at which size images are read; leave it out, or say auto", where)
    head, comma, data = url.partition(",")
    if not (comma and head.startswith("data:image/") and head.endswith(";base64")):
        raise _refused(f"{where}.image_url: expected a data:image/…;base64 URL; this server fetches nothing, found {url[:40]!r}", where)
    most = limits.max_image_mb * 1e6
    size = len(data) * 3 / 4
    if size > most + 3:
        raise _refused(f"{where}: the image has {size / 1e6:.1f} MB, more than limits.max_image_mb = {limits.max_image_mb:g}", where)
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _refused(f"{where}.image_url: what follows the comma is not base64 ({error})", where) from None


def _kind(value: Any) -> str:
    names = {type(None): "nothing", dict: "an object", list: "a list" if value else "an empty list", str: "text", bool: "true or false"}
    return names.get(type(value), "a number")


def completion_body(model: str, answer: Completion) -> dict[str, Any]:
    """The response to a chat completion."""
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": answer.text},
                "finish_reason": answer.finish_reason,
                "logprobs": None,
            }
        ],
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
            "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        },
    }


def model_body(model: str, created: int, max_model_len: int) -> dict[str, Any]:
    """One entry of the list of models."""
    return {"id": model, "object": "model", "created": created, "owned_by": "stairstep", "max_model_len": max_model_len}

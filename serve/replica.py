"""One replica of the `transformers` engine: takes HTTP requests, lets one thread compute, stays responsive meanwhile.

A plain class: `serve.reader` makes a deployment of it, a test calls it without Ray.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .front import Front, broken, refusal, timed_out
from .protocol import ChatRequest, Completion, RequestError, chat_request, check_model, completion_body, model_body, parse_json
from .settings import TransformersSettings, app_settings
from .transformers_engine import TransformersEngine

log = logging.getLogger(__name__)


class ReaderReplica:
    """Answers `/v1/models` and `/v1/chat/completions`."""

    def __init__(self, args: Mapping[str, Any]) -> None:
        self.settings = app_settings(args)
        engine = self.settings.engine
        if not isinstance(engine, TransformersSettings):
            raise TypeError(f"expected the transformers engine, found {type(engine).__name__}")
        self.front = Front(self.settings)
        self.engine = TransformersEngine(engine, self.settings.limits.max_image_pixels)
        self.created = int(time.time())
        self._thread = ThreadPoolExecutor(1, "reader")

    async def __call__(self, request: Request) -> Response:
        """One HTTP request."""
        try:
            return await self._routed(request)
        except RequestError as error:
            return refusal(error)
        except Exception:  # the last resort: the client gets an error in the protocol's form, the log the traceback
            log.exception("a request failed")
            return refusal(broken())

    def check_health(self) -> None:
        """Serve replaces a replica for which this raises: one whose thread has been at one answer for far too long."""
        since = self.engine.busy_since
        if since is not None and time.monotonic() - since > 3 * self.settings.limits.timeout_s:
            raise RuntimeError(f"the reader has been at one answer for {time.monotonic() - since:.0f} seconds")

    async def _routed(self, request: Request) -> Response:
        path = request.url.path.rstrip("/")
        if path in ("", "/health"):
            return JSONResponse({"status": "ok"})
        self.front.authorise(request.scope)
        name = self.settings.model_name
        if path.startswith("/v1/models") and request.method == "GET":
            model = model_body(name, self.created, self.engine.max_model_len)
            if path == "/v1/models":
                return JSONResponse({"object": "list", "data": [model]})
            check_model({"model": path.removeprefix("/v1/models/")}, name)
            return JSONResponse(model)
        if path != "/v1/chat/completions":
            raise RequestError(404, f"there is no {request.method} {path[:200]} here; this reader has /v1/models and /v1/chat/completions")
        if request.method != "POST":
            raise RequestError(405, f"{path} takes POST, not {request.method}")
        return JSONResponse(completion_body(name, await self._answer(request)))

    async def _answer(self, request: Request) -> Completion:
        """Wait for a place, the body, the thread and the answer, all within the time limit."""
        limit_s = self.settings.limits.timeout_s
        place = self.front.enter()
        given_up = threading.Event()
        future: Future[Completion] | None = None
        try:
            async with asyncio.timeout(limit_s):
                payload = parse_json(await self.front.body(request.scope, request.receive))
                check_model(payload, self.settings.model_name)
                future = self._thread.submit(self._compute, chat_request(payload, self.settings.limits), given_up)
                # The place is taken until the thread is free again, though nobody may wait for the answer by then.
                future.add_done_callback(lambda _: place.give_back())
                return await asyncio.wrap_future(future)
        except TimeoutError:
            raise timed_out(limit_s) from None
        finally:
            given_up.set()
            if future is None:
                place.give_back()

    def _compute(self, chat: ChatRequest, given_up: threading.Event) -> Completion:
        start = time.monotonic()
        answer = self.engine.complete(chat, given_up.is_set)
        self.front.seconds_an_answer = time.monotonic() - start
        return answer

"""Our door before an ingress that is not ours: ASGI middleware that checks the key, the bounds and the images before anything else does.

So that vLLM never meets an address to fetch, or an image that is not one. What it lets through goes on as it came.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from starlette.responses import JSONResponse

from stairstep.settings import TileError
from stairstep.tiles import decode_image

from .front import Front, Receive, Scope, broken, refusal, timed_out
from .protocol import RequestError, check_model, conversation, parse_json
from .settings import app_settings

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
log = logging.getLogger(__name__)


class Door:
    """ASGI middleware: refuses what may not or cannot be answered, and passes on the rest as it came."""

    def __init__(self, app: Any, args: dict[str, Any]) -> None:
        self.app = app
        self.settings = app_settings(args)
        self.front = Front(self.settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI event stream."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = False

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._admitted(scope, receive, sending)
        except RequestError as error:
            if begun:
                raise
            await refusal(error)(scope, receive, send)

    async def _admitted(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.front.authorise(scope)
        if scope["path"].rstrip("/") != "/v1/chat/completions":
            await self.app(scope, receive, send)
            return
        limit_s = self.settings.limits.timeout_s
        place = self.front.enter()
        try:
            async with asyncio.timeout(limit_s):
                body = await self.front.body(scope, receive)
                await asyncio.to_thread(self._check, body)
                await self.app(scope, _again(body, receive), send)
        except TimeoutError:
            raise timed_out(limit_s) from None
        finally:
            place.give_back()

    def _check(self, body: bytes) -> None:
        """The model, the bounds and the images; everything else is vLLM's to judge."""
        payload = parse_json(body)
        check_model(payload, self.settings.model_name)
        limits = self.settings.limits
        for index, data in enumerate(conversation(payload, limits).images):
            try:
                decode_image(data, f"image {index + 1}", limits.max_image_pixels)
            except TileError as error:
                message = str(error).replace("tiles.max_image_pixels", "limits.max_image_pixels")
                raise RequestError(400, message, param="messages", code="invalid_image") from None


def _again(body: bytes, receive: Receive) -> Receive:
    """A body that was read, once more; then what the client says after it."""
    given = False

    async def receiving() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receiving


async def _told(_: Request, error: Any) -> JSONResponse:
    """An error that knows its status and what to say."""
    status = int(error.status_code)
    kind = "invalid_request_error" if status < 500 else "server_error"
    return refusal(RequestError(status, str(getattr(error, "message", None) or error.detail), kind=kind))


def ingress_app(args: dict[str, Any], *errors: type[Exception]) -> FastAPI:
    """The FastAPI application that the ingress's routes are hung into: our door before it, errors in OpenAI's form (also `errors`, an
    engine's own, which have a status_code and a message)."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0] if error.errors() else {"msg": "invalid", "loc": ()}
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return refusal(RequestError(400, f"{where or 'body'}: {first['msg']}", param=where or None))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        log.error("a request failed", exc_info=error)
        return refusal(broken())

    known: tuple[type[Exception], ...] = (HTTPException, *errors)
    for kind in known:
        app.add_exception_handler(kind, _told)
    app.add_middleware(Door, args=args)
    return app

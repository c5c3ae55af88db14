"""The `vllm` engine: what `ray.serve.llm` makes of our settings, behind the same door as the other engine.

The ingress is `ray.serve.llm`'s own; our door stands before it as ASGI middleware and checks the key, the bounds and the images, so that
vLLM never meets an address to fetch or an image that is not one. vllm is imported here alone, and only when this engine is asked for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from ray import serve
from starlette.responses import JSONResponse

from stairstep.settings import InputError, TileError
from stairstep.tiles import decode_image

from .front import Front, Receive, Scope, broken, refusal, timed_out
from .protocol import RequestError, check_model, conversation, parse_json
from .settings import ReaderAppSettings, VllmSettings, app_settings, model_source

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


def ingress_app(args: dict[str, Any]) -> FastAPI:
    """The FastAPI application that the ingress's routes are hung into: our door before it, errors in OpenAI's form."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0] if error.errors() else {"msg": "invalid", "loc": ()}
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return refusal(RequestError(400, f"{where or 'body'}: {first['msg']}", param=where or None))

    @app.exception_handler(HTTPException)
    async def told(_: Request, error: HTTPException) -> JSONResponse:
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        return refusal(RequestError(error.status_code, str(getattr(error, "message", None) or error.detail), kind=kind))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        log.error("a request failed", exc_info=error)
        return refusal(broken())

    app.add_middleware(Door, args=args)
    return app


def llm_config(settings: ReaderAppSettings) -> Any:
    """The engine as `ray.serve.llm` describes it."""
    try:
        from ray.serve.llm import LLMConfig
    except ImportError as error:
        raise InputError(
            f"engine.kind: vllm is not installed here ({str(error)[:200]}); install requirements/vllm.txt, or say engine.kind=transformers"
        ) from None
    engine = settings.engine
    if not isinstance(engine, VllmSettings):
        raise TypeError(f"expected the vllm engine, found {type(engine).__name__}")
    return LLMConfig(
        model_loading_config={"model_id": settings.model_name, "model_source": model_source(engine.model)},
        accelerator_type=engine.accelerator,
        engine_kwargs=engine_arguments(engine, settings.limits.max_images),
        deployment_config=deployment_options(settings),
        **_placement(engine),
    )


def engine_arguments(engine: VllmSettings, max_images: int) -> dict[str, Any]:
    """vLLM's own arguments."""
    arguments: dict[str, Any] = {
        "dtype": engine.dtype,
        "max_model_len": engine.max_model_len,
        "limit_mm_per_prompt": {"image": max_images, "video": 0},
        "enable_prefix_caching": engine.prefix_caching,
        "enforce_eager": engine.enforce_eager,
        "trust_remote_code": False,
    }
    if engine.revision is not None:
        arguments["revision"] = engine.revision
    if engine.device == "cpu":
        return arguments | {"distributed_executor_backend": "uni"}
    return arguments | {"gpu_memory_utilization": engine.gpu_memory_utilization, "tensor_parallel_size": engine.tensor_parallel}


def deployment_options(settings: ReaderAppSettings) -> dict[str, Any]:
    """How Serve runs an engine, whichever it is: replicas and health checks."""
    replicas = settings.replicas
    shared: dict[str, Any] = {
        "max_ongoing_requests": 10_000,  # the bound is the door's, which answers with 429 and says when to come back
        "health_check_period_s": 10,
        "health_check_timeout_s": 30,
        "graceful_shutdown_wait_loop_s": 0.2,
        "graceful_shutdown_timeout_s": 10,
        "max_constructor_retry_count": 3,
    }
    if replicas.min == replicas.max:
        return shared | {"num_replicas": replicas.max}
    scale = {"min_replicas": replicas.min, "max_replicas": replicas.max, "target_ongoing_requests": replicas.target}
    return shared | {"autoscaling_config": scale}


def _placement(engine: VllmSettings) -> dict[str, Any]:
    if engine.device == "cuda":
        return {}
    space = {"VLLM_CPU_KVCACHE_SPACE": str(engine.cpu_cache_gb), "VLLM_TARGET_DEVICE": "cpu"}
    return {"placement_group_config": {"bundles": [{"CPU": 1}]}, "runtime_env": {"env_vars": space}}


def build_vllm(settings: ReaderAppSettings, args: dict[str, Any], actor_options: dict[str, Any]) -> serve.Application:
    """The application: `ray.serve.llm`'s ingress with our door, over its engine deployment."""
    config = llm_config(settings)
    from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
    from ray.serve.llm import build_llm_deployment
    from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress

    routes = {
        "models": lambda app: app.get("/v1/models"),
        "model_data": lambda app: app.get("/v1/models/{model:path}"),
        "chat": lambda app: app.post("/v1/chat/completions"),
    }
    ingress = make_fastapi_ingress(OpenAiIngress, endpoint_map=routes, app=ingress_app(args))
    options = {"max_ongoing_requests": 10_000, "num_replicas": 1, "ray_actor_options": {"num_cpus": 0, **actor_options}}
    return serve.deployment(ingress, name="Ingress", **options).bind(
        llm_deployments={config.model_id: build_llm_deployment(config)},
        model_cards={config.model_id: to_model_metadata(config.model_id, config)},
    )

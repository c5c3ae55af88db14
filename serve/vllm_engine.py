"""The `vllm` engine: what `ray.serve.llm` makes of our settings, behind the same door as the other engine.

The ingress is `ray.serve.llm`'s own, with our door before it (door.py); the engine is its LLMServer, untouched. vllm is imported here
alone, and only when this engine is asked for.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from ray import serve

from stairstep.settings import InputError

from .door import ingress_app
from .settings import ReaderAppSettings, VllmSettings, model_source


def llm_config(settings: ReaderAppSettings) -> Any:
    """The engine as `ray.serve.llm` describes it."""
    if find_spec("vllm") is None:
        raise InputError(
            "engine.kind: the engine vllm was asked for, but the package vllm is not installed where Ray runs; install "
            "requirements/vllm.txt there, or take the other engine, which needs nothing more: engine: {kind: transformers} in the config "
            "file (without the keys that only vllm has), engine.kind=transformers on a command line"
        )
    from ray.serve.llm import LLMConfig

    engine = settings.engine
    if not isinstance(engine, VllmSettings):
        raise TypeError(f"expected the vllm engine, found {type(engine).__name__}")
    return LLMConfig(
        model_loading_config={"model_id": settings.model_name, "model_source": model_source(engine.model)},
        accelerator_type=engine.accelerator,
        engine_kwargs=engine_arguments(engine, settings.limits.max_images),
        deployment_config=deployment_options(settings),
        **_placement(engine, settings.replicas.resources),
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


def _placement(engine: VllmSettings, resources: dict[str, float]) -> dict[str, Any]:
    """What a replica asks Ray for, where that is not what `ray.serve.llm` asks for by itself: a GPU for each part."""
    if engine.device == "cuda":
        return {"placement_group_config": {"bundle_per_worker": {"GPU": 1, **resources}}} if resources else {}
    space = {"VLLM_CPU_KVCACHE_SPACE": str(engine.cpu_cache_gb)}
    return {"placement_group_config": {"bundles": [{"CPU": 1, **resources}]}, "runtime_env": {"env_vars": space}}


def build_vllm(settings: ReaderAppSettings, args: dict[str, Any], actor_options: dict[str, Any]) -> serve.Application:
    """The application: `ray.serve.llm`'s ingress with our door, over its engine deployment."""
    config = llm_config(settings)
    from ray.llm._internal.serve.core.configs.openai_api_models import OpenAIHTTPException, to_model_metadata
    from ray.serve.llm import build_llm_deployment
    from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress

    routes = {
        "models": lambda app: app.get("/v1/models"),
        "model_data": lambda app: app.get("/v1/models/{model:path}"),
        "chat": lambda app: app.post("/v1/chat/completions"),
    }
    ingress = make_fastapi_ingress(OpenAiIngress, endpoint_map=routes, app=ingress_app(args, OpenAIHTTPException))
    options = {"max_ongoing_requests": 10_000, "num_replicas": 1, "ray_actor_options": {"num_cpus": 0, **actor_options}}
    return serve.deployment(ingress, name="Ingress", **options).bind(
        llm_deployments={config.model_id: build_llm_deployment(config)},
        model_cards={config.model_id: to_model_metadata(config.model_id, config)},
    )

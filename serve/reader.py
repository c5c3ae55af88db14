"""The reader as a Ray Serve application: OpenAI-compatible, one of two engines behind one config (serve/settings.py).

    python -m jobs.serve_reader                                   on this machine, until Ctrl-C
    serve run serve.reader:build engine.model=tiny-reader         the same by Serve's own command, at Serve's own port, 8000
    serve run serve/reader.yaml                                   from the config file
    serve deploy serve/reader.yaml                                onto a Ray that runs (started with PYTHONPATH naming this repository)

Each replica holds its requests in a queue of its own and answers 429 past its bound. `serving` is for jobs and tests.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve.exceptions import RayServeException

from stairstep.settings import StairstepError, to_plain

from .replica import ReaderReplica
from .running import serving
from .settings import ReaderAppSettings, TransformersSettings, app_settings
from .vllm_engine import build_vllm, deployment_options

__all__ = ["application", "build", "serving"]


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application for `args` of a Serve config; what is wrong with them is raised as Serve's own kind of error, the only one of which
    `serve status` shows the message alone, and not a traceback."""
    try:
        return application(args)
    except StairstepError as error:
        raise RayServeException(str(error)) from None


def application(args: Mapping[str, Any] | ReaderAppSettings) -> serve.Application:
    """The application for settings; an unknown key is an error that names the nearest one."""
    settings = app_settings(args)
    plain = to_plain(settings)
    secret = _key_file(settings)
    if not isinstance(settings.engine, TransformersSettings):
        return build_vllm(settings, plain, secret)
    actor = {"num_cpus": settings.engine.cpus, "resources": settings.replicas.resources, **secret}
    return serve.deployment(ReaderReplica, name="Reader", ray_actor_options=actor, **deployment_options(settings)).bind(plain)


def _key_file(settings: ReaderAppSettings) -> dict[str, Any]:
    """The path of the file with the key, where there is one, for replicas of a Ray that was started without it; never the key."""
    variable = f"{settings.key_env}_FILE"
    path = os.environ.get(variable) if settings.key_env else None
    return {"runtime_env": {"env_vars": {variable: path}}} if path else {}

"""Running the reader app for the length of a job or a test: on the Ray that this process is connected to, taken down afterwards.

What others deployed there stays as it is: a reader that is there already is never replaced, and only what was started here is taken down.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

import ray
from ray import serve
from ray.exceptions import GetTimeoutError, RayActorError
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatusOverview, LoggingConfig

from stairstep.evaluation.readers import READER_KEY
from stairstep.settings import InputError, UnreachableError

from .front import read_key
from .settings import ReaderAppSettings, ReplicaSettings, TransformersSettings, check_host, is_loopback

APP = "reader"
SHUTDOWN_S = 30.0


@contextmanager
def serving(settings: ReaderAppSettings | None = None, port: int = 0, host: str = "127.0.0.1") -> Iterator[str]:
    """Run the reader and give its base URL (`http://127.0.0.1:PORT/v1`); `port` 0 is a free one. Needs `ray.init` before."""
    from .reader import application

    settings = settings or ReaderAppSettings()
    check_host(settings, host)
    if not ray.is_initialized():
        raise InputError("the reader needs a Ray: connect first, for example `with stairstep.cluster.ray_session(None):`")
    read_key(settings.key_env)  # here as well: a missing key is told before anything starts
    port = port or _free_port(host)
    app = application(settings)  # here: settings that cannot be served are told before anything starts
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    began = _start(host, port, settings.limits.timeout_s)
    deployed = None
    try:
        try:
            serve.run(app, name=APP, route_prefix="/", logging_config=_quiet())
        except (RuntimeError, RayServeException) as error:
            raise UnreachableError(f"the reader did not start: {_reason(str(error))}") from None
        deployed = _applications()[APP].last_deployed_time_s
        yield f"http://{_reachable(host)}:{port}/v1"
    finally:
        with suppress(RayActorError, GetTimeoutError):
            _leave(began, deployed)


def serving_beside(model: str, resources: dict[str, float], host: str, replicas: int = 1) -> AbstractContextManager[str]:
    """A small reader for those who wait for its answers: it reserves no CPU, because it computes on theirs unless `resources` place it.

    At a `host` that other machines reach it wants the key that those who ask have by themselves."""
    copies = ReplicaSettings(min=replicas, max=replicas, resources=resources)
    key = None if is_loopback(host) else READER_KEY
    if key is not None and not any(os.environ.get(name) for name in (key, f"{key}_FILE")):
        raise InputError(
            f"cluster.reader_resources: the reader listens at {host} for all nodes, so a key is required: put one of your own making into "
            f"{key} (or the path of a file with it into {key}_FILE) in the environment of every node, or leave cluster.reader_resources out"
        )
    engine = TransformersSettings(model=model, cpus=0)
    return serving(ReaderAppSettings(engine=engine, replicas=copies, key_env=key), host=host)


def _quiet() -> LoggingConfig:
    return LoggingConfig(enable_access_log=False)


def _start(host: str, port: int, timeout_s: float) -> bool:
    """Whether Serve was started here; one that runs already is used if it listens where it should and has no reader."""
    running = _get_global_client(raise_if_no_controller_running=False)
    if running is not None:
        there = running.http_config
        listens = f"Serve runs on this Ray cluster already, listens at {there.host}:{there.port}"
        if APP in _applications():
            raise InputError(
                f"{listens} and has an application '{APP}', which is not replaced; use that one, or take it down first (`serve shutdown` "
                "ends all of Serve). Without RAY_ADDRESS, a reader of its own starts on this machine"
            )
        if (there.host, there.port) != (host, port):
            raise InputError(
                f"{listens} and nowhere else; jobs.serve_reader joins it with host={there.host} port={there.port}. Without RAY_ADDRESS, a "
                "reader of its own starts on this machine"
            )
        return False
    _check_free(host, port)
    options = HTTPOptions(host=host, port=port, request_timeout_s=timeout_s + 10)
    serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=options, logging_config=_quiet())
    return True


def _applications() -> dict[str, ApplicationStatusOverview]:
    return serve.status().applications


def _leave(began: bool, deployed: float | None) -> None:
    """Take down the reader deployed at `deployed` (None: it failed to start), and Serve if it began here and has no app of anybody else."""
    if _get_global_client(raise_if_no_controller_running=False) is None:
        return
    there = _applications()
    ours = APP in there and deployed in (None, there[APP].last_deployed_time_s)  # else somebody has deployed another over it
    if began and len(there) == ours:
        _end()
    elif ours:
        serve.delete(APP)


def _end() -> None:
    """Take down Serve. Its own shutdown asks the controller with retries, and Ray then complains in the terminal that it is gone."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is not None:
        with suppress(RayActorError, GetTimeoutError):
            ray.get(client._controller.graceful_shutdown.options(max_task_retries=0).remote(), timeout=SHUTDOWN_S)
    serve.shutdown()


def _free_port(host: str) -> int:
    try:
        with socket.create_server((host, 0), family=_family(host)) as probe:
            return int(probe.getsockname()[1])
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise InputError(
                f"host: {host} is no address of this machine, where the job was started; start it on the head of the cluster, as "
                "`ray job submit` does"
            ) from None
        raise


def _check_free(host: str, port: int) -> None:
    """Refuse a port that something listens at: two Serves would share it, and either would get a request meant for the other."""
    try:
        socket.create_server((host, port), family=_family(host)).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"port: something listens at {host}:{port} on this machine already; say another, or port=0 for a free one"
            ) from None


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _reachable(host: str) -> str:
    """The address by which this machine reaches a server that listens at `host`."""
    found = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"[{found}]" if ":" in found else found


def _reason(message: str) -> str:
    """Why a replica could not be made: the last line of its traceback, which Serve keeps in the deployment's status."""
    app = serve.status().applications.get(APP)
    told = [one.message for one in app.deployments.values() if one.message] if app else []
    raised = [line for text in told for line in text.splitlines() if re.match(r"[\w.]+(Error|Exception)\b.*: ", line)]
    return re.sub(r"^[\w.]*\.", "", raised[-1]) if raised else message.strip().splitlines()[-1]

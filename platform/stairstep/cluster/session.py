"""Ray for the length of a job: the cluster that the recipe or RAY_ADDRESS names, or a private one on this machine that ends with it.

Ray's own log lines stay in Ray's log files: what a person has to know reaches the terminal as our lines and our errors. A private
cluster is reached with the token that Ray keeps in the user's home; where there is none yet, it is made for the user's eyes alone.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray

from stairstep.records.places import is_url
from stairstep.settings import InputError, RecipeError, UnreachableError
from stairstep.tasks import ClusterSettings, ray_address

HEAD = "node:__internal_head__"
"""The custom resource that every head has, and no other node."""
LOOPBACK = "127.0.0.1"
_TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")


@dataclass(frozen=True)
class Session:
    """A connection to Ray. `private`: a cluster of this process alone, which cannot grow; `ours`: it is closed when the job ends."""

    private: bool
    ours: bool


def on_a_cluster(address: str | None) -> bool:
    """Whether a recipe's address, or the environment of a Ray job, names a cluster that was there before."""
    return ray_address(address) != "local"


@contextmanager
def ray_session(address: str | None) -> Iterator[Session]:
    """Connect to the cluster that `address` or RAY_ADDRESS names, or start one here; an existing connection is used as it is."""
    if ray.is_initialized():
        yield Session(_started_here(), ours=False)
        return
    if not on_a_cluster(address):
        _private_token()
    try:
        with _handlers_kept():
            ray.init(address=ray_address(address), log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        raise UnreachableError(_unreachable(address, str(error).strip().split("\n")[0] or type(error).__name__)) from error
    try:
        yield Session(_started_here(), ours=True)
    finally:
        ray.shutdown()


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself when it starts; who wanted to be told of it before is told again. `ray job stop` sends it."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _unreachable(address: str | None, why: str) -> str:
    if not on_a_cluster(address):
        return f"Ray could not be started on this machine: {why}. Where the machine is busy, try again"
    return (
        f"cluster.address: no Ray cluster answers at {ray_address(address)} ({why}); start one, or leave "
        "cluster.address out to run on this machine. Where the cluster asks for a token, set RAY_AUTH_MODE=token"
    )


def check_root(root: str | None, address: str | None, key: str = "run.root") -> None:
    """A cluster needs absolute folders, or URLs: the working folder of a job is a copy that is thrown away."""
    if root is not None and on_a_cluster(address) and not (os.path.isabs(root) or is_url(root)):
        raise RecipeError(
            f"{key}: '{root}' is relative, but the run is placed on a cluster, where a job's working folder is thrown away; give the "
            "absolute path of a folder that every node sees, or a URL"
        )


def worker_resources(cluster: ClusterSettings) -> dict[str, float]:
    """What Ray reserves for each worker; a GPU where the recipe asks for one, or leaves it open and the cluster has one."""
    gpu = cluster.device == "cuda" or (cluster.device == "auto" and ray.cluster_resources().get("GPU", 0) >= 1)
    return {"CPU": cluster.cpus_per_worker, **({"GPU": 1.0} if gpu else {}), **cluster.resources}


def check_resources(cluster: ClusterSettings, each: Mapping[str, float], evaluator: Mapping[str, float] | None = None) -> None:
    """Refuse at once what a cluster that cannot grow will never have; `evaluator`: what each has, where evaluation is beside training."""
    there, evaluator = ray.cluster_resources(), evaluator or {}
    for name in dict.fromkeys((*each, *evaluator)):
        if each.get(name, 0) * cluster.least + evaluator.get(name, 0) * cluster.evaluators > there.get(name, 0):
            key = "cluster.min_workers" if cluster.elastic else "cluster.workers"
            beside = f", and {_evaluators(cluster)} with {shown(evaluator)} each beside them," if evaluator else ""
            others = " or cluster.evaluators" if evaluator and cluster.evaluators > 1 else ""
            raise InputError(
                f"{key}: {_wanted(cluster)} with {shown(each)} each{beside} were asked for, but this machine has "
                f"{name} {there.get(name, 0):g}; lower {key}{others}{_remedy(name)}{', or say evaluation.mode=inline' if evaluator else ''}"
            )


def reader_host(cluster: ClusterSettings, session: Session) -> str:
    """Where a reader that a job brings along listens: at this machine's loopback, or, placed on a node group of a cluster, at the head's
    address for all nodes."""
    placed = cluster.reader_resources
    if session.private:
        there = ray.cluster_resources()
        for name, amount in placed.items():
            if amount > there.get(name, 0):
                raise InputError(
                    f"cluster.reader_resources.{name}: the reader is to have {name} {amount:g}, but this machine has "
                    f"{there.get(name, 0):g}; leave cluster.reader_resources out, or name a cluster whose nodes have it"
                )
    if session.private or not placed:
        return LOOPBACK
    [head] = [one for one in ray.nodes() if one["Alive"] and HEAD in one["Resources"]]
    return str(head["NodeManagerAddress"])


def resources_line(cluster: ClusterSettings, each: Mapping[str, float]) -> str:
    """What was asked for and what there is."""
    there, free = ray.cluster_resources(), ray.available_resources()
    have = "; ".join(f"{name} {there.get(name, 0):g}, of which {free.get(name, 0):g} free" for name in each)
    return f"{_wanted(cluster)} with {shown(each)} each were asked for; the cluster has {have}"


def _wanted(cluster: ClusterSettings) -> str:
    count = f"{cluster.least} to {cluster.workers}" if cluster.elastic else str(cluster.workers)
    return f"{count} worker{'' if count == '1' else 's'}"


def _evaluators(cluster: ClusterSettings) -> str:
    return f"{cluster.evaluators} evaluator{'' if cluster.evaluators == 1 else 's'}"


def shown(each: Mapping[str, float]) -> str:
    """Resources as a person reads them."""
    return ", ".join(f"{name} {amount:g}" for name, amount in each.items())


def _remedy(name: str) -> str:
    return {"CPU": " or cluster.cpus_per_worker", "GPU": ", or say cluster.device=cpu"}.get(name, " or cluster.resources")


def _started_here() -> bool:
    """Whether this very process started the cluster: its session is named after the process that did."""
    return ray.get_runtime_context().get_session_name().endswith(f"_{os.getpid()}")


def _private_token() -> None:
    """Make the token that Ray would make, but readable by its owner alone."""
    path = Path.home() / ".ray" / "auth_token"
    if path.exists() or any(os.environ.get(name) for name in _TOKEN_VARIABLES):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with open(descriptor, "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32))

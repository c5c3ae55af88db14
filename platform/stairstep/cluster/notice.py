"""Turns AWS's notice that a spot instance is taken back into Ray's, so that a run writes a checkpoint and goes on elsewhere (elastic.py).

One such process beside the raylet of each worker node asks the instance metadata service (IMDSv2) every five seconds, as AWS recommends; a
notice comes some two minutes ahead, and names the time. A recommendation to rebalance is no notice: such an instance often stays, and a
drained node is lost to Ray. On an instance that nobody takes back the process ends at once.

cluster.yaml copies this one file to nodes that have the locked environment and not this library: it imports nothing of stairstep, and Ray
only when there is a notice, for that costs seconds and a hundred megabytes. Where Ray runs in the foreground (`ray start --block`, as
KubeRay starts it) and is told by SIGTERM, none of this is needed: Ray drains its node itself.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import IO, TypeVar

SERVICE = "169.254.169.254"
EVERY_S = 5.0
PATIENCE_S = 30.0  # for a service that has never answered: it is there as soon as an instance is
DONE, UNDRAINED, NOT_THERE = 0, 1, 2
"""What the process ends with: nothing is left to do; a notice that Ray did not take; nobody to ask."""

_ANSWER_S = 2.0
_MOST = 65536  # bytes of an answer; a notice has a hundred
_RAY_S = 20.0
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_log = logging.getLogger("notice")
_T = TypeVar("_T")


class ServiceError(Exception):
    """The metadata service did not answer, or not as documented."""


class DrainError(Exception):
    """Ray did not drain the node."""


@dataclass(frozen=True)
class Notice:
    """What is done to this instance (`terminate`, `stop`, `hibernate`), and when, in seconds since 1970."""

    action: str
    at: float


class Metadata:
    """The instance metadata service at `HOST` or `HOST:PORT`."""

    def __init__(self, service: str = SERVICE) -> None:
        self.service = service

    def life_cycle(self) -> str | None:
        """How this instance was bought (`spot`, `on-demand`, …); None where the service does not say."""
        return self._get("instance-life-cycle")

    def notice(self) -> Notice | None:
        """The notice that stands, if there is one."""
        text = self._get("spot/instance-action")
        if text is None:
            return None
        try:
            said = json.loads(text)
            return Notice(str(said["action"]), datetime.strptime(said["time"], _TIME).replace(tzinfo=UTC).timestamp())
        except (ValueError, TypeError, KeyError) as error:
            raise ServiceError(
                f"spot/instance-action of {self.service} is {text[:200]!r}, and should be of the form "
                '{"action": "terminate", "time": "2026-01-31T08:22:00Z"}'
            ) from error

    def _get(self, name: str) -> str | None:
        """The text of an item; None where there is none. A token for each: two small requests, and none that can be out of date."""
        status, token = self._ask("PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
        if status == 200:
            status, text = self._ask("GET", f"/latest/meta-data/{name}", {"X-aws-ec2-metadata-token": token})
            if status == 200:
                return text
            if status == 404:
                return None
            raise ServiceError(f"{name} of the metadata service at {self.service} was answered with HTTP {status}")
        raise ServiceError(f"the metadata service at {self.service} gave no token, but HTTP {status}")

    def _ask(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        connection = HTTPConnection(self.service, timeout=_ANSWER_S)  # a proxy of the environment would be asked about another machine
        try:
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read(_MOST).decode("utf-8", "replace").strip()
        except (OSError, HTTPException, ValueError) as error:  # ValueError: what was given as a token can be no header
            raise ServiceError(f"the metadata service at {self.service} does not answer ({error or type(error).__name__})") from error
        finally:
            connection.close()


def drain_in_ray(address: str, name: str | None, notice: Notice) -> None:
    """Have Ray drain this machine's node: what is named so, or has this machine's address for its name as `ray start` gives it."""
    # No public function drains a node; `ray drain-node` does it so, and `ray start` names nodes so.
    import ray
    from ray._private.services import get_node_ip_address
    from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION
    from ray.core.generated.gcs_pb2 import GcsNodeInfo

    name = name or get_node_ip_address(address)
    client = ray._raylet.GcsClient(address=address)
    there = [one for one in client.get_all_node_info(timeout=_RAY_S).values() if one.state == GcsNodeInfo.ALIVE]
    here = [one.node_id.hex() for one in there if one.node_name == name]
    if not here:
        raise DrainError(f"no node {name} at {address}, but {', '.join(sorted(one.node_name for one in there)) or 'none at all'}")
    why = f"AWS: {notice.action} at {_clock(notice.at)}"
    for node in here:
        taken, refusal = client.drain_node(node, DRAIN_NODE_REASON_PREEMPTION, why, int(notice.at * 1000), timeout=_RAY_S)
        if not taken:
            raise DrainError(refusal)


def watch(service: Metadata, drain: Callable[[Notice], None], every_s: float = EVERY_S, patience_s: float = PATIENCE_S) -> int:
    """Ask until there is a notice, then drain; returns what the process ends with."""
    try:
        bought = _answer(service.life_cycle, every_s, patience_s)
    except ServiceError as error:
        _log.error("%s. This is no instance of AWS, or its metadata service is off: nobody watches for a notice here", error)
        return NOT_THERE
    if bought == "on-demand":
        _log.info("an on-demand instance, which nobody takes back: nothing to watch for")
        return DONE
    _log.info("watching for a notice (bought as: %s)", bought or "not said")
    while (notice := _answer(service.notice, every_s)) is None:
        time.sleep(every_s)
    _log.warning("notice: %s at %s, in %.0f s", notice.action, _clock(notice.at), notice.at - time.time())
    return DONE if _drained(notice, drain, every_s) else UNDRAINED


def _answer(ask: Callable[[], _T], every_s: float, patience_s: float = math.inf) -> _T:
    """What the service answers, asked again while it fails, which is told once; after `patience_s` its last error."""
    began, failing = time.monotonic(), False
    while True:
        try:
            found = ask()
        except ServiceError as error:
            if time.monotonic() - began >= patience_s:
                raise
            if not failing:
                _log.warning("%s; asking again every %g s", error, every_s)
            failing = True
            time.sleep(every_s)
        else:
            if failing:
                _log.info("the metadata service answers again, after %.0f s", time.monotonic() - began)
            return found


def _drained(notice: Notice, drain: Callable[[Notice], None], every_s: float) -> bool:
    """Whether Ray has taken the notice before its time was over."""
    while True:
        try:
            drain(notice)
        except Exception as error:  # noqa: BLE001 - whatever Ray raises, another try is all there is to do
            _log.error("Ray does not drain this node (%s: %s)", type(error).__name__, error)
        else:
            _log.info("Ray drains this node: what trains on it stops at a checkpoint")
            return True
        if time.time() + every_s >= notice.at:
            _log.error("the time of the notice is over: to Ray this node is lost without one")
            return False
        time.sleep(every_s)


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime(_TIME)


def take_over(path: Path) -> IO[str]:
    """Be the only one that holds this file, which names its holder: one of an earlier start is ended. Held for as long as it is open."""
    file = path.open("a+", encoding="utf-8")
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:  # so its holder lives, and no other process can have its number
            file.seek(0)
            if holder := file.read():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(holder), signal.SIGTERM)
            time.sleep(0.1)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: `python notice.py --address=HEAD:6379`, with RAY_AUTH_MODE and the token as `ray start` has them."""
    parser = argparse.ArgumentParser(description="Drains this node in Ray when AWS gives notice that the instance is taken back.")
    parser.add_argument("--address", required=True, help="HOST:PORT of Ray's head, as `ray start` was told")
    parser.add_argument("--node-name", help="what `ray start --node-name` was told, if anything")
    parser.add_argument("--service", default=SERVICE, help="HOST:PORT of the instance metadata service, where it is another (%(default)s)")
    parser.add_argument("--pid-file", type=Path, help="a file of which there is one holder: a later start ends an earlier one")
    given = parser.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    with take_over(given.pid_file) if given.pid_file else contextlib.nullcontext():
        return watch(Metadata(given.service), partial(drain_in_ray, given.address, given.node_name))


if __name__ == "__main__":
    sys.exit(main())

"""For all tests: an object store on loopback; what was imported while they were collected is not gone through by every collection of
garbage afterwards; of several processes one does everything that wants a Ray, which so is started once, while the others do the rest."""

from __future__ import annotations

import gc
import os
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

sys.path.append(str(Path(__file__).parent / "servers"))  # s3_server.py; of tests/ itself `vllm` would pass for the library

if TYPE_CHECKING:
    from s3_server import S3Server

_KEYS = {"AWS_ACCESS_KEY_ID": "test-key-id", "AWS_SECRET_ACCESS_KEY": "test-secret", "AWS_EC2_METADATA_DISABLED": "true"}
_ELSEWHERE = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")
_ON_RAY = "tests/cluster/"


def pytest_collection_finish() -> None:
    """Half a million objects of torch and transformers live as long as the process; looking at them again costs a tenth of its time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a store of another hand only the tests that ask for whatever store there is: the others would be the same once more."""
    if os.environ.get("S3_TEST_SERVER") == "moto":
        chosen = [one for one in items if "object_root" in getattr(one, "fixturenames", ())]
        config.hook.pytest_deselected(items=[one for one in items if one not in set(chosen)])
        items[:] = chosen


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile` with the whole of tests/cluster as if it were one file; None: what else was asked for is done as always."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class OneForRay(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _ON_RAY if nodeid.startswith(_ON_RAY) else super()._split_scope(nodeid)

    return OneForRay(config, log)


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> None:
    """The credentials of a test's server, and no others."""
    for name in _ELSEWHERE:
        monkeypatch.delenv(name, raising=False)
    for name, value in _KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")


@pytest.fixture
def s3(aws: None) -> Iterator[S3Server]:
    """The tests' own server, which can be told to fail and looked into; its bucket is `stairs`."""
    from s3_server import S3Server

    with S3Server() as server:
        yield server


@pytest.fixture
def object_root(request: pytest.FixtureRequest, aws: None) -> Iterator[str]:
    """The URL of an empty prefix in a store: on the tests' own server, or under `make test-s3` on moto's."""
    if os.environ.get("S3_TEST_SERVER") != "moto":
        yield request.getfixturevalue("s3").url("stairs/base")
        return
    import boto3
    from moto.server import ThreadedMotoServer

    server: Any = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    try:
        address = "http://{}:{}".format(*server.get_host_and_port())
        urllib.request.urlopen(f"{address}/moto-api/reset", data=b"").close()  # what it keeps is the process's, and not the server's
        boto3.client("s3", endpoint_url=address, region_name="us-east-1").create_bucket(Bucket="stairs")
        yield f"s3://stairs/base?endpoint_override={address}&region=us-east-1"
    finally:
        server.stop()

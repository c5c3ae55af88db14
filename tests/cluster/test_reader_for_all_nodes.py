"""The reader that a job brings along to a cluster: reached at the address that other nodes see, by those who have the key alone."""

from __future__ import annotations

import secrets
from pathlib import Path

import httpx
import pytest
import ray

from serve.running import serving_beside
from serve.settings import is_loopback
from stairstep.cluster.session import Session, reader_host
from stairstep.evaluation.readers import READER_KEY
from stairstep.tasks import ClusterSettings

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]


def test_a_placed_reader_answers_at_the_heads_address_to_who_has_the_key(
    ray_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = secrets.token_hex(16)
    (tmp_path / "key").write_text(f"{key}\n")
    monkeypatch.setenv(f"{READER_KEY}_FILE", str(tmp_path / "key"))  # a file, for this Ray was started without the variable
    host = reader_host(ClusterSettings(reader_resources={"reader": 1.0}), Session(private=False, ours=False))
    assert host == ray.nodes()[0]["NodeManagerAddress"]
    if is_loopback(host):
        pytest.skip("this machine has no address but loopback")
    with serving_beside("tiny-reader", {}, host) as url, httpx.Client(timeout=300, trust_env=False) as client:
        assert url.startswith(f"http://{host}:")
        assert client.get(f"{url}/models").status_code == 401
        told = client.get(f"{url}/models", headers={"Authorization": f"Bearer {key}"})
        assert [one["id"] for one in told.json()["data"]] == ["tiny-reader"]

"""A sweep by URL where no Ray is needed to see it: where its driver may be, and a trial that begins while the store is away."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from s3_server import S3Server, status

from stairstep.cluster import sweep as sweeping
from stairstep.cluster import trial as trials
from stairstep.cluster.session import HEAD
from stairstep.records.places import ObjectFolder, place
from stairstep.settings import InputError, UnreachableError
from stairstep.sweeps import ALL, SweepFolder, TrialRecord
from stairstep.sweeps.space import Space


@pytest.fixture
def watched(tmp_path: Path) -> Any:
    """A trial that is about to begin."""
    sweep = SweepFolder(tmp_path / "s")
    sweep.make()
    sweep.write_trial(TrialRecord(1, "a", {}, (), 0))
    return trials._Watched(sweep, "a", Space())


def own_time(sleep: Callable[[float], Any]) -> SimpleNamespace:
    """The module's time alone: threads of a Ray that other tests have here sleep as well."""
    return SimpleNamespace(monotonic=time.monotonic, sleep=sleep)


@pytest.fixture
def run(s3: S3Server) -> ObjectFolder:
    found = place(s3.url("stairs/runs/s/runs/a"))
    assert isinstance(found, ObjectFolder)
    s3.put("stairs/runs/s/runs/a/status.json", b"{}")
    return found


def test_a_trial_waits_for_a_store_that_is_away_and_then_has_what_is_there(watched, run, s3, monkeypatch, caplog):
    waits: list[float] = []
    monkeypatch.setattr(trials, "time", own_time(waits.append))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3.misbehave("GET", "stairs", status(500, "InternalError"), times=6)  # a listing names the bucket alone
    with caplog.at_level(logging.WARNING):
        assert watched.bring(run)
    assert waits and set(waits) == {trials._AGAIN_S}
    assert caplog.text.count("trial a waits for the store") == 1
    assert (watched.sweep.run_path("a") / "status.json").read_bytes() == b"{}"


def test_a_trial_that_waits_for_the_store_ends_with_the_sweep(watched, run, monkeypatch):
    def away(*_: object) -> None:
        raise UnreachableError("the store is away")

    monkeypatch.setattr(trials, "follow", away)
    monkeypatch.setattr(trials, "time", own_time(lambda _: watched.sweep.ask_to_stop(ALL, "Ctrl-C")))
    assert not watched.bring(run)


def test_a_store_that_refuses_is_not_waited_for(watched, run, s3):
    s3.misbehave("GET", "stairs", status(403, "AccessDenied"), times=None)
    with pytest.raises(InputError, match="refuses access"):
        watched.bring(run)


def test_the_driver_of_a_sweep_by_url_is_on_the_head(watched, monkeypatch):
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "here"))
    head, other = {HEAD: 1.0, "CPU": 1.0}, {"CPU": 1.0}
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": "here", "Resources": head}, {"NodeID": "there", "Resources": other}])
    sweeping._check_on_head(watched.sweep)
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": "here", "Resources": other}, {"NodeID": "there", "Resources": head}])
    with pytest.raises(InputError, match="has to be the head of the cluster; submit the job without --entrypoint-num-cpus"):
        sweeping._check_on_head(watched.sweep)

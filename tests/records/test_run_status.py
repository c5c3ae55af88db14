"""status.json: states, the throttled heartbeat and how a dead run is told from a slow one."""

import dataclasses
import os
import subprocess
import sys
import time

import pytest

from stairstep.records.files import host_name
from stairstep.records.status import Status, StatusFile, read_status
from stairstep.settings import DataError


def test_states_and_their_fields(tmp_path):
    path = tmp_path / "status.json"
    assert read_status(path) is None
    status = StatusFile(path)
    status.set("preparing", of=350)
    status.set("running", step=7)
    now = read_status(path)
    assert (now.state, now.step, now.of, now.pid, now.host) == ("running", 7, 350, os.getpid(), host_name())
    assert abs(now.heartbeat - time.time()) < 5
    status.set("failed", message="the loss is not finite")
    now = read_status(path)
    assert (now.state, now.step, now.message) == ("failed", 7, "the loss is not finite")
    assert not now.active()


def test_a_heartbeat_is_written_at_most_every_five_seconds(tmp_path):
    clock = [100.0]
    path = tmp_path / "status.json"
    status = StatusFile(path, clock=lambda: clock[0])
    status.set("running", step=0, of=9)
    writes = set()
    for step in range(1, 101):
        clock[0] += 0.1
        status.heartbeat(step)
        writes.add(read_status(path).step)
    assert 1 <= len(writes - {0}) <= 2
    clock[0] += 5.0
    status.heartbeat(state="evaluating")
    assert (read_status(path).state, read_status(path).step) == ("evaluating", 100)


def test_a_run_is_lost_when_its_process_is_gone_or_silent():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    mine = Status("running", 1, 2, 1000.0, os.getpid(), host_name())
    assert not mine.lost(now=1060.0)
    assert mine.lost(now=1000.0 + 121)
    gone = dataclasses.replace(mine, pid=child.pid)
    assert gone.lost(now=1000.0)
    assert not dataclasses.replace(gone, host="another").lost(now=1060.0)
    assert not dataclasses.replace(gone, state="finished").lost(now=9000.0)


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"state": "running"}', '{"state": "x", "step": 1, "of": 1, "heartbeat": 1, "pid": 1, "host": "h"}', "{"]
)
def test_a_strange_file_is_told(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    with pytest.raises(DataError, match=r"status\.json"):
        read_status(tmp_path / "status.json")


def test_keys_of_later_versions_are_passed_over(tmp_path):
    path = tmp_path / "status.json"
    StatusFile(path).set("running", 1, 2)
    path.write_text(path.read_text().replace("{", '{"later": 1,', 1))
    assert read_status(path).step == 1

"""A run folder in an object store: what is put in which order, what a kill between any two requests leaves, and whose the run is."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from s3_server import S3Server, status

from stairstep.records import RunFolder, read_json
from stairstep.records import mirror as mirrors
from stairstep.records.copies import copy_to_read
from stairstep.records.mirror import MirroredRunFolder, TakenOverError
from stairstep.records.places import ObjectFolder, place
from stairstep.settings import InputError, StairstepError, UnreachableError

RECIPE = {"optim": {"steps": 3}, "run": {"name": "a"}}
REFUSED = status(403, "AccessDenied")  # what Arrow does not ask again for
RUN = "stairs/runs/a"


@pytest.fixture
def remote(s3: S3Server) -> ObjectFolder:
    found = place(s3.url(RUN))
    assert isinstance(found, ObjectFolder)
    return found


@pytest.fixture
def machine(tmp_path: Path, remote: ObjectFolder):
    """A folder of a machine of its own: copies of nothing."""
    made: list[Path] = []

    def make() -> MirroredRunFolder:
        made.append(tmp_path / f"machine-{len(made)}")
        made[-1].mkdir()
        return MirroredRunFolder(made[-1], remote)

    return make


def evaluate(folder: RunFolder, step: int) -> None:
    (folder.path / f"eval_step{step}.jsonl").write_text("{}\n")
    (folder.path / f"eval_step{step}.summary.json").write_text("{}")


def go_on(folder: MirroredRunFolder, steps: int = 3, recipe: dict[str, Any] = RECIPE, resume: Any = "auto") -> None:
    """A run that logs, evaluates and checkpoints every step, and keeps the newest checkpoint."""
    claim = folder.claim()
    try:
        first = folder.open_for(recipe, resume).from_step
        if first:
            evaluate(folder, first)  # as a trainer does, which does not know whether it came to it
            folder.prune(1)
        for step in range(first + 1, steps + 1):
            folder.metrics.append(step, {"train/loss": 1.0 / step})
            with folder.new_checkpoint(step) as place:
                (place / "weights").write_text(f"{recipe} weights of step {step}")
                (place / "deep").mkdir()
                (place / "deep" / "state").write_text("x" * step)
            folder.prune(1)
            evaluate(folder, step)
            folder.set_status("running", step, steps)
        folder.set_status("finished", steps)
    finally:
        claim.release()


def contents(folder: Path) -> dict[str, bytes]:
    """What is in a run folder but for what depends on the moment."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found["metrics.jsonl"] = json.dumps([row["step"] for row in RunFolder(folder).metrics.rows()]).encode()
    return {name: data for name, data in found.items() if name not in (".lock", "status.json")}


def test_the_store_has_what_the_folder_has(s3, machine):
    folder = machine()
    go_on(folder)
    there = {name.removeprefix(f"{RUN}/"): s3.objects[name] for name in s3.names(RUN)}
    here = {path.relative_to(folder.path).as_posix(): path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    here.pop(".lock")
    assert there == here
    assert [name for name in there if name.startswith("checkpoint")] == [
        f"checkpoint-3/{name}" for name in ("COMPLETE", "deep/state", "weights")
    ]


def test_each_thing_is_put_after_what_it_relies_upon(s3, machine):
    go_on(machine(), steps=1)
    put = [one.object.removeprefix(f"{RUN}/") for one in s3.received if one.method == "PUT"]
    order = {name: put.index(name) for name in reversed(put)}
    last = {name: place for place, name in enumerate(put)}
    assert order[".lock"] < order["recipe.yaml"] < order["metrics.jsonl"] < order["checkpoint-1/weights"] < order["checkpoint-1/COMPLETE"]
    assert order["checkpoint-1/deep/state"] < order["checkpoint-1/COMPLETE"] < last["status.json"]
    assert order["eval_step1.jsonl"] < order["eval_step1.summary.json"]
    assert put.count("checkpoint-1/weights") == 1, "what the store has is not put again"


def test_a_run_killed_between_any_two_requests_goes_on_on_another_machine(s3, machine, tmp_path):
    whole = machine()
    go_on(whole)
    expected = contents(whole.path)
    changes = sum(one.method in ("PUT", "DELETE", "POST") for one in s3.received)
    assert changes > 30
    for kept in range(0, changes, 5):
        s3.objects.clear()
        with pytest.raises(StairstepError) as died:
            s3.die_after(kept)
            go_on(machine())
        s3.behave()
        assert "AccessDenied" in str(died.value.__cause__ or died.value) or "refuses access" in str(died.value)
        s3.objects.pop(f"{RUN}/.lock", None)  # of a process that is gone
        again = machine()
        go_on(again)
        assert contents(again.path) == expected, kept
        assert {name for name in s3.names(RUN) if "checkpoint" in name} == {
            f"{RUN}/checkpoint-3/{one}" for one in ("COMPLETE", "deep/state", "weights")
        }


def test_a_torn_checkpoint_is_passed_over_and_removed(s3, machine, caplog):
    go_on(machine(), steps=2)
    del s3.objects[f"{RUN}/checkpoint-2/weights"]
    s3.put(f"{RUN}/checkpoint-1/weights", b"without a marker")
    with caplog.at_level(logging.WARNING):
        reader = machine()
        with reader.claim():
            assert reader.checkpoints() == []
    assert "checkpoint-2: this checkpoint is not complete" in caplog.text
    status_name = f"{RUN}/status.json"
    s3.put(status_name, s3.objects[status_name].replace(b"finished", b"stopped"))
    go_on(machine(), steps=3)
    assert not [name for name in s3.names(RUN) if "checkpoint-1" in name or "checkpoint-2" in name]


def test_overwriting_leaves_nothing_of_the_other_run(s3, machine):
    go_on(machine())
    other = {"optim": {"steps": 1}, "run": {"name": "a"}}
    with pytest.raises(InputError, match=r"^s3://stairs/runs/a\?.*begun with another recipe"):
        go_on(machine(), 1, other)
    s3.received.clear()
    go_on(machine(), 1, other, "overwrite")
    assert not [name for name in s3.names(RUN) if "checkpoint-3" in name or "step3" in name]
    deeds = [(one.method, one.object.removeprefix(f"{RUN}/")) for one in s3.received if one.method in ("PUT", "DELETE")]
    assert deeds.index(("DELETE", "checkpoint-3/COMPLETE")) < deeds.index(("PUT", "recipe.yaml")), (
        "never the old one's under the new recipe"
    )


def test_a_store_that_is_away_for_a_while_stops_no_run(s3, machine, caplog):
    folder = machine()
    claim = folder.claim()
    folder.open_for(RECIPE, "auto")
    s3.misbehave("PUT", "weights", REFUSED, times=2)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            with folder.new_checkpoint(step) as place:
                (place / "weights").write_text(f"{step}")
    assert caplog.text.count("the run goes on") == 1
    assert f"{RUN}/checkpoint-3/COMPLETE" in s3.names()
    assert f"{RUN}/checkpoint-1/COMPLETE" in s3.names(), "made up for"
    s3.misbehave("PUT", "status.json", REFUSED, times=None)
    folder.set_status("finished", 3)
    with pytest.raises(InputError, match="The store lacks what the run has left"):
        claim.release()
    assert not claim.held


def test_only_one_works_on_a_run(s3, machine, monkeypatch, caplog):
    monkeypatch.setattr(mirrors, "SIGN_S", 0.1)
    first, second = machine(), machine()
    claim = first.claim()
    first.open_for(RECIPE, "auto")
    first.set_status("running", 1, 3)
    with pytest.raises(InputError, match=r"s3://stairs/runs/a\?.*: process \d+ on \w+ is at work on this run"):
        second.claim(5.0)  # it says nothing of itself for minutes, and lives
    first.mirror.let_go()  # as a machine that hangs
    with caplog.at_level(logging.WARNING):
        taken = machine().claim(0.05)
    assert "has gone silent; taking over" in caplog.text
    with pytest.raises(TakenOverError, match="works on it now"):
        first.set_status("running", 2, 3)
    with pytest.raises(TakenOverError):
        claim.release()
    assert f"{RUN}/.lock" in s3.names(), "it is the other one's"
    taken.release()
    assert f"{RUN}/.lock" not in s3.names()


def test_a_machine_of_the_same_name_is_another_one(s3, machine):
    """Containers and clouds give the same names again; there is no process of that number here, and there one lives."""
    folder = machine()
    with folder.claim():
        folder.open_for(RECIPE, "auto")
        holder = json.loads(s3.objects[f"{RUN}/.lock"])
    elsewhere = {**holder, "machine": "vm another boot", "pid": 999_999_999, "time": time.time()}
    s3.put(f"{RUN}/.lock", json.dumps(elsewhere).encode())

    def signs() -> None:
        time.sleep(0.1)
        s3.put(f"{RUN}/.lock", json.dumps({**elsewhere, "time": time.time()}).encode())

    other = threading.Thread(target=signs)
    other.start()
    with pytest.raises(InputError, match="is at work on this run"):
        machine().claim(5.0)
    other.join()


def test_a_run_does_not_take_a_sweep(s3, machine):
    s3.put(f"{RUN}/sweep.json", b"{}")
    before = dict(s3.objects)
    with pytest.raises(InputError, match="a sweep is here and no run; its runs lie below runs/"):
        machine().claim(0.05)
    assert s3.objects == before


def test_a_process_of_this_machine_that_is_gone_is_not_waited_for(s3, machine):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
    folder = machine()
    with folder.claim():
        folder.open_for(RECIPE, "auto")
        folder.set_status("running", 1, 3)
        holder = {**json.loads(s3.objects[f"{RUN}/.lock"]), "pid": int(gone.stdout)}
        lock = json.dumps(holder)
    s3.put(f"{RUN}/.lock", lock.encode())
    started = time.monotonic()
    with machine().claim(30.0):
        assert time.monotonic() - started < 30


def test_a_stop_that_is_put_in_the_store_reaches_the_run(s3, machine, monkeypatch):
    folder = machine()
    with folder.claim():
        folder.open_for(RECIPE, "auto")
        folder.set_status("running", 1, 3)
        s3.put(f"{RUN}/stop", b"")
        folder.set_status("running", 2, 3)
        assert (folder.path / "stop").exists()
        (folder.path / "stop").unlink()
        folder.set_status("running", 3, 3)
        assert f"{RUN}/stop" not in s3.names()


def test_a_heartbeat_puts_status_and_metrics_now_and_then(s3, machine, monkeypatch):
    folder = machine()
    with folder.claim():
        folder.open_for(RECIPE, "auto")
        folder.set_status("running", 1, 3)
        folder.metrics.append(1, {"train/loss": 1.0})
        monkeypatch.setattr(mirrors, "PUSH_S", 0.0)
        folder.heartbeat(2)
        assert b"train/loss" in s3.objects[f"{RUN}/metrics.jsonl"]
        monkeypatch.setattr(mirrors, "PUSH_S", 1000.0)
        asked = len(s3.received)
        for _ in range(50):
            folder.heartbeat(2)
        assert len(s3.received) == asked
        (folder.path / "tensorboard").mkdir()
        (folder.path / "tensorboard" / "events").write_text("for people")
        folder.set_status("finished", 3)
        assert f"{RUN}/tensorboard/events" not in s3.names()
    assert s3.objects[f"{RUN}/tensorboard/events"] == b"for people"


def test_a_copy_to_read_has_no_checkpoints_and_follows_the_store(s3, machine, remote, tmp_path, monkeypatch):
    monkeypatch.setenv("STAIRSTEP_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match="no run and no sweep is here"):
        copy_to_read(remote)
    go_on(machine())
    copy = copy_to_read(remote)
    assert copy.name == "a"
    assert not list(copy.glob("checkpoint-*"))
    assert RunFolder.open(copy).status.state == "finished"
    assert copy_to_read(place(s3.url("stairs/runs"))).joinpath("a", "recipe.yaml").read_bytes() == (copy / "recipe.yaml").read_bytes()
    got = s3.asked("GET", ".jsonl")
    copy_to_read(remote)
    assert s3.asked("GET", ".jsonl") == got, "what has not changed is not fetched again"
    s3.put(f"{RUN}/eval_step9.summary.json", b'{"new": 1}')
    s3.objects.pop(f"{RUN}/eval_step1.jsonl")
    assert read_json(copy_to_read(remote) / "eval_step9.summary.json") == {"new": 1}
    assert not (copy / "eval_step1.jsonl").exists()


def test_a_store_that_is_not_there_is_told_before_anything(aws, tmp_path):
    folder = MirroredRunFolder(tmp_path, place("s3://stairs/a?endpoint_override=http://127.0.0.1:9&region=us-east-1"))
    with pytest.raises(UnreachableError):
        folder.claim()
    with RunFolder(tmp_path).claim():
        assert True, "the copy's own claim was let go"

"""A run in an object store, followed by those who do not write it: what they bring, what they put, and a store that is away for a while."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from s3_server import S3Server, status

from stairstep.records import RunFolder, followed
from stairstep.records.followed import FollowedRunFolder, ReadRunFolder, checkpoint_steps, patiently
from stairstep.records.mirror import MirroredRunFolder
from stairstep.records.places import ObjectFolder, place
from stairstep.settings import InputError, UnreachableError

BUSY = status(503)


@pytest.fixture
def remote(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> ObjectFolder:
    """Where the run lies; a store that is away is asked again soon."""
    monkeypatch.setattr(followed, "_AGAIN_S", 0.01)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    found = place(s3.url("stairs/runs/a"))
    assert isinstance(found, ObjectFolder)
    return found


@pytest.fixture
def first(remote: ObjectFolder, tmp_path: Path) -> MirroredRunFolder:
    """The first worker's folder, with two checkpoints."""
    folder = MirroredRunFolder(RunFolder.create(tmp_path / "first").path, remote)
    with folder.claim():
        folder.open_for({"run": {"name": "a"}}, "auto")
        for step in (2, 10):
            with folder.new_checkpoint(step) as place:
                (place / "weights").write_text(f"of step {step}")
        (folder.path / "quarantine.jsonl").write_text("{}\n")
        folder.share()
        assert remote.get("quarantine.jsonl") == b"{}\n"
    return folder


@pytest.fixture
def other(first: MirroredRunFolder, remote: ObjectFolder, tmp_path: Path) -> FollowedRunFolder:
    """Another worker's folder, on another machine, where an earlier run has left something."""
    left = tmp_path / "other" / "checkpoint-99"
    left.mkdir(parents=True)
    (left / "COMPLETE").write_text("{}")
    return FollowedRunFolder(tmp_path / "other", remote)


def test_a_worker_has_the_newest_checkpoint_and_nothing_else(other: FollowedRunFolder) -> None:
    other.catch_up()
    assert [one.step for one in other.checkpoints()] == [10]
    assert (other.checkpoint_path(10) / "weights").read_text() == "of step 10"
    assert [one.name for one in other.path.iterdir()] == ["checkpoint-10"]
    assert other.where.startswith("s3://stairs/runs/a?")
    assert other.holds_run()


def test_what_is_brought_is_what_is_there_now(other: FollowedRunFolder, remote: ObjectFolder) -> None:
    other.empty()
    assert other.bring("checkpoint-2")
    assert not other.bring("checkpoint-3")
    remote.put("checkpoint-4/weights", "half of one")
    assert not other.bring("checkpoint-4"), "its marker is not there"
    assert not other.checkpoint_path(4).exists()
    assert other.bring("quarantine.jsonl")
    remote.remove(["quarantine.jsonl"])
    assert not other.bring("quarantine.jsonl")
    assert not (other.path / "quarantine.jsonl").exists(), "an old one would be another run's"


def test_rows_are_put_before_their_summary_and_nothing_of_a_failed_evaluation(
    other: FollowedRunFolder, remote: ObjectFolder, s3: S3Server
) -> None:
    other.empty()
    with pytest.raises(ValueError, match="the reader"), other.results() as folder:
        (folder / "eval_step2.jsonl").write_text("half\n")
        raise ValueError("the reader")
    assert not [name for name in remote.files() if name.startswith("eval")]
    s3.misbehave("PUT", "eval_step2.jsonl", BUSY, times=2)
    before = len(s3.received)
    with other.results() as folder:
        assert not list(folder.iterdir()), "what a failed one left is no result"
        (folder / "eval_step2.summary.json").write_text("{}")
        (folder / "eval_step2.jsonl").write_text("{}\n")
        (folder / "dev").mkdir()
        (folder / "dev" / "eval_step2.jsonl").write_text("{}\n")
    put = [one.object.removeprefix("stairs/runs/a/") for one in s3.received[before:] if one.method == "PUT"]
    assert put[-1] == "eval_step2.summary.json"
    assert {"eval_step2.jsonl", "dev/eval_step2.jsonl", "eval_step2.summary.json"} == set(put)
    assert [name for name in remote.files() if "eval" in name] == ["dev/eval_step2.jsonl", "eval_step2.jsonl", "eval_step2.summary.json"]


def test_a_store_that_is_away_is_asked_for_a_while(s3: S3Server, remote: ObjectFolder, caplog: pytest.LogCaptureFixture) -> None:
    s3.misbehave("GET", "/recipe.yaml", BUSY, times=3)
    remote.put("recipe.yaml", "x")
    caplog.set_level(logging.WARNING)
    assert patiently(lambda: remote.get("recipe.yaml")) == b"x"
    assert len([text for text in caplog.messages if "it is asked again for up to 10 minutes" in text]) == 1
    s3.misbehave("GET", "/recipe.yaml", BUSY, times=None)
    with pytest.raises(UnreachableError, match="object store did not do it"):
        patiently(lambda: remote.get("recipe.yaml"), patience_s=0.05)
    s3.misbehave("PUT", "/other", status(403, "AccessDenied"), times=None)
    with pytest.raises(InputError, match="refuses access"):
        patiently(lambda: remote.put("other", "x"))


def test_stacks_reach_people_from_whoever_hangs(
    first: MirroredRunFolder, other: FollowedRunFolder, remote: ObjectFolder, s3: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    other.empty()
    for folder, name in ((first, "stalled.txt"), (other, "stalled-1.txt")):
        (folder.path / name).write_text("here")
        folder.offer(name)
        assert remote.get(name) == b"here"
    s3.misbehave("PUT", "stalled-2.txt", BUSY, times=None)
    (other.path / "stalled-2.txt").write_text("there")
    other.offer("stalled-2.txt")  # it is for people alone
    assert "could not be put into the store" in caplog.messages[-1]


def test_the_copy_to_read_has_all_but_weights_and_survives_a_store_that_is_away(
    first: MirroredRunFolder, remote: ObjectFolder, tmp_path: Path, s3: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    view = ReadRunFolder(tmp_path / "view", remote)
    view.refresh()
    assert view.recipe() == {"run": {"name": "a"}}
    assert not list(view.path.glob("checkpoint-*"))
    remote.put("status.json", json.dumps({"state": "running"}))
    view.refresh()
    assert not (view.path / "status.json").exists(), "not asked for again within seconds"
    s3.misbehave("GET", "", BUSY, times=1)
    view.refresh(at_once=True)
    assert "what was read of it before" in caplog.messages[-1]
    view.refresh(at_once=True)
    assert json.loads((view.path / "status.json").read_text()) == {"state": "running"}


def test_steps_are_those_with_a_marker() -> None:
    names = [
        "checkpoint-10/COMPLETE",
        "checkpoint-2/COMPLETE",
        "checkpoint-30/weights",
        "old/checkpoint-40/COMPLETE",
        "checkpoint-x/COMPLETE",
    ]
    assert checkpoint_steps([*names, "old/checkpoint-40/COMPLETE"]) == [2, 10]

"""A run in an object store, followed by those who do not write it: what they bring, what they put, and a store that is away for a while."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from s3_server import S3Server, status

from stairstep.records import RunFolder, places
from stairstep.records.followed import FollowedRunFolder, ReadRunFolder, checkpoint_steps
from stairstep.records.mirror import MirroredRunFolder, TakenOverError
from stairstep.records.places import ObjectFolder, patiently, place
from stairstep.settings import InputError, UnreachableError

BUSY = status(503)


@pytest.fixture
def remote(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> ObjectFolder:
    """Where the run lies; a store that is away is asked again soon."""
    monkeypatch.setattr(places, "_AGAIN_S", 0.01)
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


def test_one_checkpoint_is_here_at_a_time(other: FollowedRunFolder) -> None:
    other.catch_up()
    assert other.bring("checkpoint-2")
    assert [one.step for one in other.checkpoints()] == [2], "looking back at all of them takes the room of one"


def test_a_run_that_has_begun_waits_for_its_store(first: MirroredRunFolder, s3: S3Server, tmp_path: Path, remote: ObjectFolder) -> None:
    """Between two groups of workers, at the end, and where others need to see something; a person who begins a run is told at once."""
    s3.misbehave("GET", "/.lock", BUSY, times=1)
    with pytest.raises(UnreachableError):
        first.claim()
    assert not remote.exists(".lock"), "who could not begin leaves nothing to be watched"
    other = MirroredRunFolder(RunFolder.create(tmp_path / "again").path, remote, patience_s=60.0)
    s3.misbehave("GET", "/.lock", BUSY, times=2)
    claim = other.claim()
    other.open_for({"run": {"name": "a"}}, "auto")
    (other.path / "quarantine.jsonl").write_text("other\n")
    s3.misbehave("PUT", "quarantine.jsonl", BUSY, times=2)
    other.share()
    assert remote.get("quarantine.jsonl") == b"other\n"
    with other.new_checkpoint(11) as place:
        s3.misbehave("PUT", "weights", BUSY, times=3)
        (place / "weights").write_text("of step 11")
    assert checkpoint_steps(remote.files()) == [2, 10], "it goes on without the store"
    claim.release()
    assert checkpoint_steps(remote.files()) == [2, 10, 11]


def test_a_worker_that_was_taken_over_completes_no_checkpoint(first: MirroredRunFolder, remote: ObjectFolder, s3: S3Server) -> None:
    """Its upload was under way when another group took the run."""
    claim = first.claim()
    put = ObjectFolder.put_file

    def taken_over(folder: ObjectFolder, name: str, source: Path) -> int:
        remote.put(".lock", json.dumps({"host": "elsewhere", "pid": 1, "token": "another"}))
        return put(folder, name, source)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(TakenOverError), first.new_checkpoint(12) as place:
        (place / "weights").write_text("of step 12")
        patch.setattr(ObjectFolder, "put_file", taken_over)
    assert checkpoint_steps(remote.files()) == [2, 10]
    with pytest.raises(TakenOverError):
        claim.release()


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
    with pytest.raises(ValueError, match="the reader"), other.results(2) as folder:
        (folder / "eval_step2.jsonl").write_text("half\n")
        raise ValueError("the reader")
    assert not [name for name in remote.files() if name.startswith("eval")]
    s3.misbehave("PUT", "eval_step2.jsonl", BUSY, times=2)
    remote.put("eval_step12.summary.json", "another step's")
    remote.put("dev/eval_step2.summary.json", "an earlier one's")
    before = len(s3.received)
    with other.results(2) as folder:
        left = [one.relative_to(folder).as_posix() for one in folder.rglob("*") if one.is_file()]
        assert left == ["dev/eval_step2.summary.json"], "its calls count on; what a failed one left is no result"
        (folder / "eval_step2.summary.json").write_text("{}")
        (folder / "eval_step2.jsonl").write_text("{}\n")
        (folder / "dev" / "eval_step2.jsonl").write_text("{}\n")
    put = [one.object.removeprefix("stairs/runs/a/") for one in s3.received[before:] if one.method == "PUT"]
    rows, summaries = {"eval_step2.jsonl", "dev/eval_step2.jsonl"}, {"eval_step2.summary.json", "dev/eval_step2.summary.json"}
    assert set(put[-2:]) == summaries
    assert set(put) == rows | summaries
    assert remote.get("eval_step12.summary.json") == b"another step's"


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
    for trouble in (BUSY, status(403, "AccessDenied")):  # a refusal may be of a moment too: credentials are renewed
        s3.misbehave("GET", "", trouble, times=1)
        view.refresh(at_once=True)
        assert "what was read of it before" in caplog.messages[-1]
        assert view.recipe() == {"run": {"name": "a"}}
        caplog.clear()
        view._failing = False
    view.refresh(at_once=True)
    assert view.steps == [2, 10]
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

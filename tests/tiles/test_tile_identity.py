"""Ids are SHA-256 of the bytes; the index of known ids survives kills and concurrent writers, and only ever saves work."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import pickle
from pathlib import Path

import pytest

from stairstep.tiles import TileIds, tile_id
from stairstep.tiles.identity import Stamp

STAMP = Stamp(10, 1_700_000_000_123_456_789)
ID = "ab" * 32


def test_the_id_is_sha256() -> None:
    assert tile_id(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_an_id_is_known_for_one_state_of_one_file(tmp_path: Path) -> None:
    ids = TileIds()
    assert ids.get(tmp_path / "a", STAMP) is None
    ids.put(tmp_path / "a", STAMP, ID)
    assert ids.get(tmp_path / "a", STAMP) == ID
    assert ids.get(tmp_path / "b", STAMP) is None
    assert ids.get(tmp_path / "a", STAMP._replace(size=11)) is None
    assert ids.get(tmp_path / "a", STAMP._replace(mtime_ns=STAMP.mtime_ns + 1)) is None


def test_a_relative_path_is_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ids = TileIds()
    ids.put(Path("x/../a"), STAMP, ID)
    assert ids.get(tmp_path / "a", STAMP) == ID


def test_the_index_is_found_again_and_by_others_while_they_run(tmp_path: Path) -> None:
    index = tmp_path / "new" / "ids.jsonl"
    first, other = TileIds(index), TileIds(index)
    odd = os.fsdecode(b"not-utf8-\xff\n.png")
    first.put(tmp_path / "a", STAMP, ID)
    first.put(tmp_path / odd, STAMP, "cd" * 32)
    assert other.get(tmp_path / "a", STAMP) == ID, "another process's entry is seen without starting again"
    later = TileIds(index)
    assert len(later) == 2 and later.get(tmp_path / odd, STAMP) == "cd" * 32
    assert pickle.loads(pickle.dumps(first)).get(tmp_path / "a", STAMP) == ID
    newer = STAMP._replace(mtime_ns=STAMP.mtime_ns + 5)
    first.put(tmp_path / "a", newer, "ef" * 32)
    assert TileIds(index).get(tmp_path / "a", newer) == "ef" * 32, "the last line about a file counts"


def test_a_torn_last_line_and_damaged_lines_are_passed_over(tmp_path: Path) -> None:
    index = tmp_path / "ids.jsonl"
    TileIds(index).put(Path("/a"), STAMP, ID)
    whole = index.read_text()
    damaged = [
        "{",
        "7",
        "null",
        '"x"',
        '{"path": "/b"}',
        whole.strip().replace(ID, "zz" * 32).replace("/a", "/c"),
        whole.replace(str(STAMP.size), '"10"'),
    ]
    for cut in range(1, len(whole) - 1, 9):
        index.write_text("\n".join(damaged) + "\n" + whole + whole.replace("/a", "/torn")[:cut])
        ids = TileIds(index)
        assert len(ids) == 1 and ids.get(Path("/a"), STAMP) == ID
        ids.put(Path("/d"), STAMP, ID)
        again = TileIds(index)
        assert len(again) == 2 and again.get(Path("/d"), STAMP) == ID, "an entry written after a torn line is whole"


def test_an_index_that_was_emptied_is_read_from_its_start(tmp_path: Path) -> None:
    index = tmp_path / "ids.jsonl"
    ids = TileIds(index)
    for name in ("/a", "/b", "/c"):
        ids.put(Path(name), STAMP, ID)
    index.write_text("")
    ids.get(Path("/x"), STAMP)
    TileIds(index).put(Path("/d"), STAMP, ID)
    assert ids.get(Path("/d"), STAMP) == ID


def test_an_index_that_cannot_be_kept_is_told_once_and_does_no_harm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        ids = TileIds(tmp_path / "file" / "ids.jsonl")
        for name in ("a", "b"):
            ids.put(tmp_path / name, STAMP, ID)
            assert ids.get(tmp_path / name, STAMP) == ID
    assert len(caplog.records) == 1 and "file/ids.jsonl" in caplog.text


def _append(index: Path, worker: int) -> None:
    ids = TileIds(index)
    for number in range(50):
        ids.put(Path(f"/{worker}/{number}" + "x" * 300), STAMP, hashlib.sha256(f"{worker} {number}".encode()).hexdigest())


def test_several_processes_append_without_loss(tmp_path: Path) -> None:
    index = tmp_path / "ids.jsonl"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_append, args=(index, worker)) for worker in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    lines = [json.loads(line) for line in index.read_text().splitlines()]
    assert len(lines) == 200 and len(TileIds(index)) == 200
    assert [line["id"] for line in lines if line["path"].startswith("/3/")] == [tile_id(f"3 {number}".encode()) for number in range(50)]

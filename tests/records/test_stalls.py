"""A process that does not get on writes where it stands: once a silence, with all its threads, and not while it gets on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stairstep.records.stalls import StallWatch, stall_path


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, "this never came"
        time.sleep(0.01)


def where_the_test_blocks(path: Path) -> None:
    with StallWatch(path, 0.1):
        until(path.exists)


def test_a_silent_process_writes_the_stacks_of_all_its_threads(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    over = threading.Event()

    def a_thread_that_waits() -> None:
        over.wait()

    other = threading.Thread(target=a_thread_that_waits)
    other.start()
    path = stall_path(tmp_path)
    with caplog.at_level("WARNING", "stairstep"):
        where_the_test_blocks(path)
        until(lambda: bool(caplog.messages))
    over.set()
    other.join()
    text = path.read_text()
    assert "nothing was done for 0.1 s" in text
    assert "where_the_test_blocks" in text
    assert "a_thread_that_waits" in text
    assert caplog.messages == [f"no step, checkpoint or evaluation has ended for 0.1 s; where each thread stands is in {path}"]
    assert [one.name for one in tmp_path.iterdir()] == ["stalled.txt"]


def test_a_process_of_many_threads_says_first_where_its_main_one_stands(tmp_path: Path):
    over = threading.Event()
    others = [threading.Thread(target=over.wait, name=f"other-{number}") for number in range(150)]
    for one in others:
        one.start()
    try:
        where_the_test_blocks(tmp_path / "stalled.txt")
    finally:
        over.set()
        for one in others:
            one.join()
    text = (tmp_path / "stalled.txt").read_text()
    first, _, rest = text.partition("\nthread other-")
    assert "where_the_test_blocks" in first
    assert all(f"other-{number}\n" in f"other-{rest}" for number in range(150))


def test_it_is_written_once_a_silence_and_again_after_the_next_beat(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "stalled.txt"
    with caplog.at_level("WARNING", "stairstep"), StallWatch(path, 0.05) as watch:
        until(lambda: len(caplog.messages) == 1)
        time.sleep(0.3)
        assert len(caplog.messages) == 1
        watch.beat()
        until(lambda: len(caplog.messages) == 2)


def test_a_process_that_gets_on_or_is_not_watched_writes_nothing(tmp_path: Path):
    with StallWatch(tmp_path / "a.txt", 60.0) as watch, StallWatch(tmp_path / "b.txt", None) as unwatched:
        for _ in range(20):
            time.sleep(0.01)
            watch.beat()
            unwatched.beat()
    assert list(tmp_path.iterdir()) == []


def test_another_worker_writes_a_file_of_its_own_and_tells_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = stall_path(tmp_path, 3)
    with caplog.at_level("WARNING", "stairstep"), StallWatch(path, 0.05, tell=False):
        until(path.exists)
    assert path.name == "stalled-3.txt"
    assert caplog.messages == []


def test_a_folder_that_is_gone_is_told_and_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("WARNING", "stairstep"), StallWatch(tmp_path / "gone" / "stalled.txt", 0.05):
        until(lambda: bool(caplog.messages))
    assert "cannot be written: No such file or directory" in caplog.text

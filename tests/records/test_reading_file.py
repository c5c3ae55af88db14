"""reading.json: counted from many threads, written now and then and at the end, told as it is written."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stairstep.records import RunFolder
from stairstep.records.reading import Reading, ReadingFile, read_reading, shown_reading
from stairstep.settings import DataError


def test_every_answer_is_counted_once_from_any_thread(tmp_path: Path):
    told: list[Reading] = []
    folder = RunFolder(tmp_path)
    file = folder.reading_file(told.append)
    assert folder.reading is None
    file.begin(40, "wiki", 100)
    began = folder.reading
    assert began is not None
    assert (began.step, began.name, began.done, began.of, began.seconds_each) == (40, "wiki", 0, 100, None)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(file.answered, [0.5, None] * 50))
    end = folder.reading
    assert end is not None and end == told[-1]
    assert (end.done, end.of, end.asked, end.seconds, end.seconds_each) == (100, 100, 50, 25.0, 0.5)
    assert shown_reading(end) == "reader 0.5 s an answer"
    assert shown_reading(began) == shown_reading(None) == ""


def test_it_is_written_every_five_seconds_and_anew_for_every_set(tmp_path: Path):
    clock, told = [0.0], []
    file = ReadingFile(tmp_path / "reading.json", told.append, clock=lambda: clock[0])
    file.begin(4, "one", 30)
    for _ in range(20):
        clock[0] += 1.0
        file.answered(1.0)
    assert [one.done for one in told] == [0, 5, 10, 15, 20]
    file.begin(4, "two", 2)
    file.answered(None)
    file.answered(None)
    end = read_reading(tmp_path / "reading.json")
    assert end is not None
    assert (end.name, end.done, end.asked, end.seconds_each) == ("two", 2, 0, None)


def test_what_is_no_reading_is_told(tmp_path: Path):
    path = tmp_path / "reading.json"
    path.write_text('{"step": 4}')
    with pytest.raises(DataError, match="this is not how far a reading is"):
        read_reading(path)
    path.write_text("[]")
    with pytest.raises(DataError, match="delete the file"):
        read_reading(path)

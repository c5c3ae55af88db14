"""Atomic replacement and appending: whole or absent, no line lost, mixed or half read, whoever is killed when."""

import json
import os
import random
import stat

import pytest

from stairstep.records import append_line, digest_of_folder, digest_of_json, read_json_lines, write_atomically
from stairstep.records.files import parse_temporary, read_json, temporary_name, write_json
from stairstep.records.folders import sweep
from stairstep.settings import DataError


def test_replaces_the_whole_content(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(path, "one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a.txt"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_a_failure_leaves_the_old_content_and_no_temporary(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_atomically(path, "old")

    def fail(*arguments):
        raise OSError("no")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_death_at_any_step_leaves_old_or_new(tmp_path, die_at_every_step):
    path = tmp_path / "a.txt"
    seen = set()
    for _ in die_at_every_step(lambda: write_atomically(path, "old"), lambda: write_atomically(path, "new")):
        seen.add(path.read_text())
        sweep(tmp_path)
        assert os.listdir(tmp_path) == ["a.txt"]
    assert path.read_text() == "new"
    assert seen == {"old", "new"}


def test_killed_writers_leave_one_whole_content(tmp_path, script):
    path = tmp_path / "big"
    contents = {letter: letter * 300_000 for letter in "ab"}
    left = 0
    for _ in range(3):
        writer = script(
            """
            import sys
            from stairstep.records import write_atomically
            print("ready", flush=True)
            while True:
                for letter in "ab":
                    write_atomically(sys.argv[1], letter * 300_000, durable=False)
            """,
            path,
        )
        assert writer.line() == "ready"
        writer.kill(random.uniform(0.01, 0.1))
        assert path.read_text() in contents.values()
        left += len(os.listdir(tmp_path)) - 1
        sweep(tmp_path)
        assert os.listdir(tmp_path) == ["big"], left


def test_temporary_names_say_who_wrote_them(tmp_path):
    found = parse_temporary(temporary_name(tmp_path / "checkpoint-5", "old").name)
    assert (found.name, found.purpose, found.pid) == ("checkpoint-5", "old", os.getpid())
    assert parse_temporary("checkpoint-5") is None
    assert parse_temporary(".lock") is None


def test_json_refuses_what_json_does_not_have(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert os.listdir(tmp_path) == []
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(DataError, match=r"b\.json"):
        read_json(tmp_path / "b.json")
    with pytest.raises(DataError, match="no such file"):
        read_json(tmp_path / "c.json")


@pytest.mark.parametrize(
    ("tail", "kept"),
    [
        (b'{"n": 2', []),
        (b'{"n": 2}', [{"n": 2}]),
        (b'{"n": {"m": 2}', []),
        (b"12", []),
        (b"\0" * 5000, []),
        (b'{"n": "' + b"x" * 200_000, []),
        ('{"n": "é'.encode()[:-1], []),
    ],
    ids=["fragment", "only the line break missing", "nested", "number", "zeros", "longer than a block", "half a letter"],
)
def test_a_torn_last_line_is_passed_over_and_mended(tmp_path, tail, kept):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"n": 1}\n' + tail)
    assert read_json_lines(path) == [{"n": 1}, *kept]
    append_line(path, {"n": 3})
    assert read_json_lines(path) == [{"n": 1}, *kept, {"n": 3}]
    assert path.read_bytes().endswith(b'\n{"n": 3}\n')
    assert path.read_bytes().count(b"\n") == 2 + len(kept)


def test_a_file_of_only_a_fragment_is_empty(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"n"')
    assert read_json_lines(path) == []
    append_line(path, '{"n": 1}')
    assert path.read_bytes() == b'{"n": 1}\n'


def test_a_bad_line_elsewhere_is_an_error_with_its_number(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"n": 1}\n{"n": \n{"n": 3}\n')
    with pytest.raises(DataError, match=r"log\.jsonl:2: .*not valid JSON"):
        read_json_lines(path)
    path.write_text('{"n": 1}\n{"n": \n')
    with pytest.raises(DataError, match=r"log\.jsonl:2"):
        read_json_lines(path)
    with pytest.raises(DataError, match="no such file"):
        read_json_lines(tmp_path / "other")


def test_a_line_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="line break"):
        append_line(tmp_path / "log", "a\nb")
    append_line(tmp_path / "log", {"text": "a\nb é"})
    assert read_json_lines(tmp_path / "log") == [{"text": "a\nb é"}]


def test_a_short_write_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "log"
    append_line(path, {"n": 1})
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:4]))
    with pytest.raises(OSError, match="disk full"):
        append_line(path, {"n": 2})
    monkeypatch.undo()
    assert path.read_bytes() == b'{"n": 1}\n'


_APPENDER = """
import os, sys, time
from stairstep.records import append_line
path, name, count, size, gate = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
print("ready", flush=True)
while not os.path.exists(gate):
    time.sleep(0.0005)
for n in range(count):
    append_line(path, {"step": 1, "who": name, "n": n, "filler": name * size})
"""


def test_appenders_of_several_processes_lose_and_mix_nothing(tmp_path, script):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"torn": ')
    writers = [script(_APPENDER, path, name, 1000, 400, tmp_path / "gate") for name in "abc"]
    assert [one.line() for one in writers] == ["ready"] * 3
    (tmp_path / "gate").touch()
    assert [one.wait() for one in writers] == [0, 0, 0]
    rows = read_json_lines(path)
    assert len(rows) == 3000
    for name in "abc":
        assert [row["n"] for row in rows if row["who"] == name] == list(range(1000))
    names = [row["who"] for row in rows]
    assert names != sorted(names, key=names.index), "the writers never met, so this showed nothing"


def test_killed_appenders_leave_a_whole_beginning(tmp_path, script):
    path = tmp_path / "log.jsonl"
    total = 0
    for _ in range(3):
        writer = script(_APPENDER, path, "w", 10_000_000, 200_000, path.parent)
        assert writer.line() == "ready"
        writer.kill(random.uniform(0.02, 0.1))
        rows = read_json_lines(path)[total:]
        assert [row["n"] for row in rows] == list(range(len(rows)))
        append_line(path, {"step": 1, "who": "next"})
        total += len(rows) + 1
        assert len(read_json_lines(path)) == total
    assert total > 10


def test_folder_digest_is_of_names_and_contents(tmp_path):
    folder = tmp_path / "f"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.py").write_text("1")
    (folder / "sub" / "b.py").write_text("2")
    first = digest_of_folder(folder)
    for unseen in ("COMPLETE", ".hidden", "sub/.lock", "__pycache__/a.pyc"):
        (folder / unseen).parent.mkdir(exist_ok=True)
        (folder / unseen).write_text("x")
    assert digest_of_folder(folder) == first
    (folder / "c.bin").write_text("3")
    assert digest_of_folder(folder) != first
    assert digest_of_folder(folder, {".py"}) == first
    (folder / "sub" / "b.py").write_text("22")
    changed = digest_of_folder(folder, {".py"})
    (folder / "sub" / "b.py").rename(folder / "sub" / "d.py")
    assert len({first, changed, digest_of_folder(folder, {".py"})}) == 3
    with pytest.raises(DataError, match="no such folder"):
        digest_of_folder(tmp_path / "none")


def test_json_digest_does_not_see_the_order_of_keys():
    assert digest_of_json({"a": 1, "b": [1, 2]}) == digest_of_json(json.loads('{"b": [1, 2], "a": 1}'))
    assert digest_of_json({"a": 1}) != digest_of_json({"a": "1"})

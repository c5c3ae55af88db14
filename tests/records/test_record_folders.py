"""Folders are complete or absent: every crash point of a commit, kills in a loop, and what sweeping leaves alone."""

import os
import random
import shutil
import time

import pytest

from stairstep.records import commit_folder, is_complete, new_folder, remove_folder
from stairstep.records.files import COMPLETE, temporary_name
from stairstep.records.folders import sweep


def _fill(folder, text):
    (folder / "a").write_text(text)
    (folder / "sub").mkdir()
    (folder / "sub" / "b").write_text(text)


def _content(folder):
    return {(folder / "a").read_text(), (folder / "sub" / "b").read_text()}


def _commit(final, text):
    with new_folder(final) as folder:
        _fill(folder, text)


def test_a_block_that_ends_commits_and_one_that_raises_leaves_nothing(tmp_path):
    final = tmp_path / "checkpoint-1"
    with pytest.raises(KeyboardInterrupt), new_folder(final) as folder:
        _fill(folder, "one")
        assert not final.exists()
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
    _commit(final, "two")
    assert os.listdir(tmp_path) == ["checkpoint-1"]
    assert is_complete(final) and _content(final) == {"two"}


def test_the_marker_is_written_after_everything_else(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(os.readlink(f"/proc/self/fd/{descriptor}")), real(descriptor)))
    _commit(tmp_path / "f", "x")
    names = [os.path.basename(one) for one in synced]
    assert {"a", "b", "sub"} <= set(names)
    marker = next(index for index, name in enumerate(names) if COMPLETE in name)
    assert marker > max(names.index("a"), names.index("b"), names.index("sub"))
    assert names[-1] == tmp_path.name, "the rename itself is synced last"


def test_a_folder_is_complete_only_with_every_file_at_its_size(tmp_path):
    final = tmp_path / "f"
    assert not is_complete(final)
    for damage in (
        lambda: (final / COMPLETE).unlink(),
        lambda: (final / "a").unlink(),
        lambda: (final / "sub" / "b").write_text(""),
        lambda: (final / COMPLETE).write_text("{"),
        lambda: (final / COMPLETE).write_text("[1]"),
    ):
        _commit(final, "x")
        assert is_complete(final)
        damage()
        assert not is_complete(final)
    (final / COMPLETE).write_text("")
    assert is_complete(final), "an empty marker, as an object store may have it"


def test_death_at_any_step_leaves_absent_or_complete(tmp_path, die_at_every_step):
    final = tmp_path / "f"
    seen = set()

    def prepare():
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()

    for _ in die_at_every_step(prepare, lambda: _commit(final, "new")):
        sweep(tmp_path)
        seen.add(final.exists())
        assert os.listdir(tmp_path) == (["f"] if final.exists() else [])
        assert not final.exists() or (is_complete(final) and _content(final) == {"new"})
    assert seen == {True, False}


def test_death_at_any_step_of_a_replacement_leaves_old_or_new(tmp_path, die_at_every_step):
    final = tmp_path / "f"
    seen, put_back = set(), 0

    def prepare():
        shutil.rmtree(tmp_path)
        _commit(final, "old")

    for _ in die_at_every_step(prepare, lambda: _commit(final, "new")):
        put_back += not final.exists()
        sweep(tmp_path)
        assert os.listdir(tmp_path) == ["f"]
        assert is_complete(final)
        seen |= _content(final)
    assert seen == {"old", "new"}
    assert put_back >= 1, "no death fell between the two renames"
    assert _content(final) == {"new"}


def test_death_at_any_step_of_a_removal_never_leaves_half_a_folder(tmp_path, die_at_every_step):
    final = tmp_path / "f"
    seen = set()

    def prepare():
        shutil.rmtree(tmp_path)
        _commit(final, "old")

    for _ in die_at_every_step(prepare, lambda: remove_folder(final)):
        assert not final.exists() or (is_complete(final) and _content(final) == {"old"})
        sweep(tmp_path)
        seen.add(final.exists())
        assert os.listdir(tmp_path) == (["f"] if final.exists() else [])
    assert seen == {True, False}


def test_an_incomplete_folder_is_replaced(tmp_path):
    final = tmp_path / "f"
    final.mkdir()
    (final / "rest").write_text("x")
    _commit(final, "new")
    assert os.listdir(tmp_path) == ["f"]
    assert _content(final) == {"new"} and not (final / "rest").exists()


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failing_rename_keeps_the_old_folder(tmp_path, monkeypatch, failing):
    final = tmp_path / "f"
    _commit(final, "old")
    temporary = temporary_name(final)
    temporary.mkdir()
    _fill(temporary, "new")
    real, calls = os.rename, []

    def rename(source, target):
        calls.append(source)
        if len(calls) == failing:
            raise OSError("no")
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="no"):
        commit_folder(temporary, final)
    assert is_complete(final) and _content(final) == {"old"}


def test_kills_in_a_loop_of_commits(tmp_path, script):
    final = tmp_path / "f"
    last = 0
    for _ in range(4):
        writer = script(
            """
            import sys
            from pathlib import Path
            from stairstep.records import new_folder
            for n in range(int(sys.argv[2]), 1_000_000):
                with new_folder(Path(sys.argv[1])) as folder:
                    for name in "ab":
                        (folder / name).write_text(str(n) * 1000)
                print(n, flush=True)
            """,
            final,
            last + 1,
        )
        promised = int(writer.line())
        writer.kill(random.uniform(0.0, 0.06))
        sweep(tmp_path)
        assert os.listdir(tmp_path) == ["f"]
        assert is_complete(final)
        texts = {(final / name).read_text() for name in "ab"}
        assert len(texts) == 1
        now = _number(final / "a")
        assert now >= promised
        last = now
    assert last >= 4


def _number(path):
    text = path.read_text()
    return int(text[: len(text) // 1000])


def test_sweeping_leaves_living_writers_and_strange_names_alone(tmp_path):
    mine = temporary_name(tmp_path / "f")
    mine.mkdir()
    elsewhere = tmp_path / ".f.tmp-anotherhost-1-0123abcd"
    elsewhere.mkdir()
    (tmp_path / ".keep").write_text("x")
    (tmp_path / "f.tmp").write_text("x")
    assert sweep(tmp_path) == []
    assert len(os.listdir(tmp_path)) == 4
    old = time.time() - 2 * 3600
    os.utime(elsewhere, (old, old))
    os.utime(mine, (old, old))
    assert len(sweep(tmp_path)) == 1
    assert not elsewhere.exists() and mine.exists()


def test_a_folder_set_aside_by_another_host_comes_back(tmp_path, monkeypatch):
    _commit(tmp_path / "f", "old")
    aside = tmp_path / ".f.old-anotherhost-1-0123abcd"
    (tmp_path / "f").rename(aside)
    assert sweep(tmp_path) == [], "its writer may be between its two renames"
    later = time.time() + 60
    monkeypatch.setattr(time, "time", lambda: later)
    assert len(sweep(tmp_path)) == 1
    assert is_complete(tmp_path / "f") and _content(tmp_path / "f") == {"old"}


def test_what_is_committed_can_be_read_by_whom_the_folder_lets_in(tmp_path):
    with new_folder(tmp_path / "one") as place:
        (place / "secret.safetensors").write_bytes(b"x")
        (place / "secret.safetensors").chmod(0o600)
        place.chmod(0o755)
    assert (tmp_path / "one" / "secret.safetensors").stat().st_mode & 0o777 == 0o644

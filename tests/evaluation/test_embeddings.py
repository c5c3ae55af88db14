"""The store of embeddings: found by content, shared by processes, never wrong."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from stairstep.evaluation.embeddings import EmbeddingStore, text_embedding_key, tile_embedding_key

DIMENSION = 5


def key(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def vectors(*names: str) -> np.ndarray:
    """Vectors that follow from their names, so that a wrong one is known on sight."""
    return np.array([np.random.default_rng(list(name.encode())).random(DIMENSION) for name in names], dtype=np.float32)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def test_finds_what_was_added_in_any_order_and_only_that(tmp_path: Path) -> None:
    EmbeddingStore(tmp_path, 4).add("s", [key("a"), key("b"), key("c")], vectors("a", "b", "c"))
    EmbeddingStore(tmp_path, 4).add("s", [key("d"), key("b")], vectors("d", "b"))
    values, found = EmbeddingStore(tmp_path, 4).find("s", [key(one) for one in ("d", "x", "b", "a", "b")], DIMENSION)
    assert found.tolist() == [True, False, True, True, True]
    assert np.array_equal(values[found], vectors("d", "b", "a", "b"))
    assert not values[1].any()
    assert values.dtype == np.float32


def test_states_are_apart(tmp_path: Path) -> None:
    store = EmbeddingStore(tmp_path, 4)
    store.add("one", [key("a")], vectors("a"))
    assert not store.find("two", [key("a")], DIMENSION)[1].any()
    assert not EmbeddingStore(tmp_path / "none", 4).find("one", [key("a")], DIMENSION)[1].any()
    assert not (tmp_path / "none").exists()


def test_keys_tell_every_part_apart() -> None:
    made = [
        tile_embedding_key("ab", "c"),
        tile_embedding_key("a", "bc"),
        text_embedding_key("c", "ab"),
        text_embedding_key("ab", "c"),
        text_embedding_key("q", "query"),
        text_embedding_key("q", "document"),
    ]
    assert len(set(made)) == 6
    assert all(len(one) == 32 for one in made)


@pytest.mark.parametrize("damage", ["vector", "key", "cut", "empty", "text", "renamed", "other_state"])
def test_damage_is_told_and_never_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    store = EmbeddingStore(tmp_path, 4)
    store.add("s", [key("a"), key("b")], vectors("a", "b"))
    store.add("s", [key("c")], vectors("c"))
    target = next(path for path in shards(tmp_path) if path.stat().st_size == max(one.stat().st_size for one in shards(tmp_path)))
    data = bytearray(target.read_bytes())
    if damage == "vector":
        place = data.find(vectors("b").tobytes())
        assert place > 0
        data[place] ^= 1
    elif damage == "key":
        place = data.find(key("b"))
        assert place > 0
        data[place + 31] ^= 1
    elif damage == "cut":
        data = data[:-3]
    elif damage == "empty":
        data = bytearray()
    elif damage == "text":
        data = bytearray(b"not a shard at all, but long enough to have a header length")
    elif damage == "renamed":
        target.rename(target.with_name("0" * 64 + ".safetensors"))
        target = target.with_name("0" * 64 + ".safetensors")
    elif damage == "other_state":
        store.add("t", [key("z")], vectors("z"))
        foreign = next(path.parent for path in shards(tmp_path) if path.parent != target.parent)
        target = target.rename(foreign / target.name)
    target.write_bytes(data)

    state = "t" if damage == "other_state" else "s"
    with caplog.at_level(logging.WARNING):
        values, found = store.find(state, [key("a"), key("b"), key("c")], DIMENSION)
    assert found.tolist() == [False, False, damage != "other_state"]
    assert not values[:2].any()
    assert str(target) in caplog.text
    assert "computed again" in caplog.text
    assert not target.exists()

    caplog.clear()
    store.add(state, [key("a"), key("b")], vectors("a", "b"))
    values, found = store.find(state, [key("a"), key("b")], DIMENSION)
    assert found.all()
    assert np.array_equal(values, vectors("a", "b"))
    assert not caplog.text


def test_vectors_of_another_length_are_not_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = EmbeddingStore(tmp_path, 4)
    store.add("s", [key("a")], vectors("a"))
    assert not store.find("s", [key("a")], DIMENSION + 1)[1].any()
    assert "damaged" in caplog.text


def test_the_states_unused_for_longest_go_first(tmp_path: Path) -> None:
    store = EmbeddingStore(tmp_path, 2)
    store.add("base", [key("a")], vectors("a"))
    store.add("step50", [key("a")], vectors("a"))
    for age, mark in enumerate(sorted(tmp_path.glob("*/last_used"))):
        os.utime(mark, ns=(10**15 + age, 10**15 + age))
    assert store.find("base", [key("a")], DIMENSION)[1].all()  # used again: younger than step50 now
    store.add("step100", [key("a")], vectors("a"))
    assert [store.find(state, [key("a")], DIMENSION)[1].all() for state in ("base", "step50", "step100")] == [True, False, True]
    assert len(shards(tmp_path)) == 2


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    store = EmbeddingStore(tmp_path, 1)
    for state in ("one", "two"):
        store.add(state, [key("a")], vectors("a"))
    assert (tmp_path / "mine").is_dir()
    assert len(shards(tmp_path)) == 1


def test_a_full_disk_costs_time_and_no_result(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way of the folder")
    store = EmbeddingStore(blocked, 4)
    store.add("s", [key("a")], vectors("a"))
    assert "could not be kept" in caplog.text
    assert not store.find("s", [key("a")], DIMENSION)[1].any()


def test_refuses_what_is_no_embedding(tmp_path: Path) -> None:
    store = EmbeddingStore(tmp_path, 4)
    with pytest.raises(ValueError, match="one 32-byte key"):
        store.add("s", [key("a"), key("b")], vectors("a"))
    with pytest.raises(ValueError, match="one 32-byte key"):
        store.add("s", [b"short"], vectors("a"))
    with pytest.raises(ValueError, match="float32"):
        store.add("s", [key("a")], vectors("a").astype(np.float64))


def _write_for_ever(folder: Path, writer: int) -> None:
    store = EmbeddingStore(folder, 2)
    for turn in range(10_000):
        names = [f"n{(writer * 7 + turn * 3 + one) % 40}" for one in range(6)]
        store.add(f"state{turn % 3}", [key(name) for name in names], vectors(*names))


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_killed_writers_and_pruning_never_give_a_wrong_vector(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_for_ever, args=(tmp_path, one)) for one in range(3)]
    for writer in writers:
        writer.start()
    names = [f"n{one}" for one in range(40)]
    store, right, seen, end = EmbeddingStore(tmp_path, 2), vectors(*names), 0, time.monotonic() + 2.5
    try:
        while time.monotonic() < end:
            for state in ("state0", "state1", "state2"):
                values, found = store.find(state, [key(name) for name in names], DIMENSION)
                assert np.array_equal(values[found], right[found])
                seen += int(found.sum())
            if time.monotonic() > end - 1.2 and writers[0].is_alive():
                os.kill(writers[0].pid or 0, signal.SIGKILL)
                writers[0].join()
    finally:
        for writer in writers:
            writer.kill()
            writer.join()
    assert seen > 100, "nothing was ever found: the test shows nothing"
    assert "damaged" not in caplog.text

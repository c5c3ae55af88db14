"""The answer ledger and the kept embeddings in an object store: the same entries as in a folder, and what a store's failures cost."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from s3_server import status

from stairstep.evaluation.embeddings import EmbeddingStore, text_embedding_key
from stairstep.evaluation.ledger import Entry, Ledger
from stairstep.evaluation.on_objects import ObjectEmbeddings, ObjectLedger, open_embeddings, open_ledger
from stairstep.evaluation.settings import EvaluationSettings
from stairstep.records.places import place
from stairstep.settings import InputError, build, from_plain

KEY = {"model": "m", "question": "who?", "tiles": ["a", "b"]}
KEYS = [text_embedding_key(one, "query") for one in "abcd"]
VECTORS = np.arange(12, dtype=np.float32).reshape(4, 3)


def never() -> dict[str, Any]:
    raise AssertionError("asked again")


def test_a_place_chooses_who_keeps(tmp_path, object_root):
    assert type(open_ledger(tmp_path)) is Ledger
    assert type(open_embeddings(tmp_path, 1)) is EmbeddingStore
    assert type(open_ledger(place(object_root))) is ObjectLedger
    assert type(open_embeddings(place(object_root), 1)) is ObjectEmbeddings


def test_an_answer_is_kept_once_and_as_in_a_folder(tmp_path, object_root):
    store = place(object_root)
    assert open_ledger(store).once("answer", KEY, lambda: {"text": "she"}) == Entry({"text": "she"}, hit=False)
    again = open_ledger(store)
    assert again.once("answer", dict(reversed(KEY.items())), never) == Entry({"text": "she"}, hit=True)
    assert again.find("answer", KEY) == {"text": "she"}
    assert again.find("grade", KEY) is None
    assert again.counts("answer") == {"hits": 1, "asked": 0, "waited": 0}
    Ledger(tmp_path).once("answer", KEY, lambda: {"text": "she"})
    path = next(one for one in tmp_path.rglob("*.json"))
    (name,) = store.files()
    assert (name, store.get(name)) == (path.relative_to(tmp_path).as_posix(), path.read_bytes()), "a folder can be copied to a store"


def test_threads_ask_once(object_root):
    ledger, asked, go = open_ledger(place(object_root)), [], threading.Event()

    def ask() -> dict[str, Any]:
        asked.append(1)
        go.wait(5)
        return {"text": "one"}

    with ThreadPoolExecutor(6) as pool:
        found = [pool.submit(ledger.once, "answer", KEY, ask) for _ in range(6)]
        go.set()
        assert {one.result().value["text"] for one in found} == {"one"}
    assert len(asked) == 1
    assert ledger.counts("answer")["hits"] == 5


def test_two_processes_that_ask_at_once_keep_the_first_value(object_root):
    one, other = open_ledger(place(object_root)), open_ledger(place(object_root))

    def while_the_other_asks() -> dict[str, Any]:
        assert other.once("answer", KEY, lambda: {"text": "first"}).hit is False
        return {"text": "second"}

    assert one.once("answer", KEY, while_the_other_asks) == Entry({"text": "first"}, hit=False)
    assert open_ledger(place(object_root)).find("answer", KEY) == {"text": "first"}


def test_fresh_and_stale_are_asked_once_more(object_root):
    store = place(object_root)
    open_ledger(store).once("answer", KEY, lambda: {"text": "old"})
    fresh = open_ledger(store, fresh=True)
    assert fresh.once("answer", KEY, lambda: {"text": "old"}) == Entry({"text": "old"}, hit=False), "the same words again"
    assert fresh.once("answer", KEY, never).hit
    failed = open_ledger(store)
    failed.once("grade", KEY, lambda: {"failure": "cut off"})
    late = open_ledger(store)
    assert late.once("grade", KEY, lambda: {"grade": "correct"}, lambda kept: "failure" in kept) == Entry({"grade": "correct"}, hit=False)
    assert open_ledger(store).find("grade", KEY) == {"grade": "correct"}


def test_a_damaged_entry_counts_as_absent(s3, caplog):
    store = place(s3.url("stairs/ledger"))
    open_ledger(store).once("answer", KEY, lambda: {"text": "right"})
    (name,) = s3.names()
    s3.put(name, s3.objects[name].replace(b"right", b"wrong"))
    with caplog.at_level(logging.WARNING):
        assert open_ledger(store).once("answer", KEY, lambda: {"text": "right"}) == Entry({"text": "right"}, hit=False)
    assert f"s3://{name}: this entry counts as absent" in caplog.text
    assert open_ledger(store).find("answer", KEY) == {"text": "right"}


def test_a_store_that_fails_costs_no_answer(s3, caplog):
    store = place(s3.url("stairs/ledger"))
    ledger = open_ledger(store)
    s3.misbehave("PUT", ".json", status(503), times=None)
    with caplog.at_level(logging.WARNING):
        assert ledger.once("answer", KEY, lambda: {"text": "paid for"}) == Entry({"text": "paid for"}, hit=False)
    assert "entries cannot be kept" in caplog.text
    s3.behave()
    with pytest.raises(InputError, match="no bucket s3://nobody"):
        open_ledger(place(s3.url("nobody/ledger")))
    with pytest.raises(InputError, match="no bucket s3://nobody"):
        open_embeddings(place(s3.url("nobody/embeddings")), 2)


def test_embeddings_are_found_again(object_root):
    store = place(object_root)
    open_embeddings(store, 2).add("state", KEYS[:3], VECTORS[:3])
    open_embeddings(store, 2).add("state", KEYS[3:], VECTORS[3:])
    vectors, found = open_embeddings(store, 2).find("state", [KEYS[3], text_embedding_key("x", "query"), KEYS[1], KEYS[1]], 3)
    assert found.tolist() == [True, False, True, True]
    assert vectors.tobytes() == np.stack([VECTORS[3], np.zeros(3, np.float32), VECTORS[1], VECTORS[1]]).tobytes()
    assert not open_embeddings(store, 2).find("other", KEYS, 3)[1].any()


def test_the_states_unused_for_longest_go(s3):
    store = open_embeddings(place(s3.url("stairs/kept")), 2)
    for state in ("one", "two"):
        store.add(state, KEYS, VECTORS)
    s3.dated("kept", "2026-01-01T00:00:00.000Z")
    assert store.find("one", KEYS, 3)[1].all(), "and so it was used last"
    store.add("three", KEYS, VECTORS)
    assert [store.find(state, KEYS, 3)[1].all() for state in ("one", "two", "three")] == [True, False, True]


def test_a_damaged_shard_gives_no_vector_and_goes(s3, caplog):
    store = open_embeddings(place(s3.url("stairs/kept")), 2)
    store.add("state", KEYS, VECTORS)
    name = next(one for one in s3.names() if one.endswith(".safetensors"))
    data = s3.objects[name]
    s3.put(name, data[:-1] + bytes([data[-1] ^ 1]))
    with caplog.at_level(logging.WARNING):
        assert not store.find("state", KEYS, 3)[1].any()
    assert "damaged" in caplog.text
    assert name not in s3.names()
    store.add("state", KEYS, VECTORS)
    s3.misbehave("HEAD", ".safetensors", status(503), times=None)
    assert not store.find("state", KEYS, 3)[1].any(), "a store that fails costs time"
    s3.behave()
    assert store.find("state", KEYS, 3)[1].all()


def test_a_recipe_may_name_urls_without_secrets():
    made = build(EvaluationSettings, from_plain({"ledger_folder": "s3://b/ledger", "cache_folder": "gs://b/kept"}, "r.yaml"))
    assert made.ledger_folder == "s3://b/ledger"
    with pytest.raises(InputError, match="ledger_folder") as caught:
        build(EvaluationSettings, from_plain({"ledger_folder": "s3://ID:hunter2@b/ledger"}, "r.yaml"))
    assert "hunter2" not in str(caught.value)

"""Places: what a URL may say, and that objects are whole or absent, on a real server over a socket."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from s3_server import changed, cut, status

from stairstep.records.places import ObjectFolder, below, is_url, place
from stairstep.settings import InputError, UnreachableError

BIG = os.urandom(11 << 20)  # more than one part


def test_a_path_stays_a_path(tmp_path):
    assert place("runs") == Path("runs")
    assert place(tmp_path) == tmp_path
    assert place("file:///data/my%20runs") == Path("/data/my runs")
    assert below("runs", "ledger") == Path("runs/ledger")
    assert below("runs", str(tmp_path)) == tmp_path
    assert not is_url("runs/a:b")


def test_a_url_is_a_folder_in_a_store():
    root = place("s3://bucket/a//b/?region=us-east-1&endpoint_override=http://127.0.0.1:9000")
    assert isinstance(root, ObjectFolder)
    assert str(root) == "s3://bucket/a/b?endpoint_override=http://127.0.0.1:9000&region=us-east-1"
    assert place(str(root)) == root, "what is logged can be given again"
    assert str(root / "c/d").startswith("s3://bucket/a/b/c/d?endpoint_override=")
    assert (root / "c/d").name == "d"
    assert below(str(root), "ledger") == root / "ledger"
    assert below(str(root), "s3://other/x") == place("s3://other/x")
    assert below("runs", "gcs://other/x") == place("gs://other/x")
    assert pickle.loads(pickle.dumps(root)) == root
    with pytest.raises(InputError, match="leads out of it"):
        root / "../../other"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("s4://bucket/x", "did you mean s3"),
        ("https://bucket/x", "known: s3://, gs://, file://"),
        ("s3://", "found no bucket"),
        ("s3://bucket/../x", "mean nothing in an object store"),
        ("s3://bucket/x?regoin=a", "did you mean region"),
        ("s3://bucket/x?background_writes=true", "is not known"),
        ("file://host/x", "expected file:///"),
    ],
)
def test_a_wrong_url_is_told(url, told):
    with pytest.raises(InputError, match=told):
        place(url)


@pytest.mark.parametrize(
    "url",
    [
        "s3://ID:hunter2@bucket/x",
        "s3://bucket/x?access_key=ID&secret_key=hunter2",
        "s3://bucket/x?session_token=hunter2",
        "s3://bucket/x?endpoint_override=http://ID:hunter2@127.0.0.1:9000",
        "gs://hunter2@bucket/x",
        "file://ID:hunter2@host/x",
    ],
)
def test_a_url_with_credentials_is_refused_and_not_repeated(url):
    with pytest.raises(InputError, match="holds credentials") as caught:
        place(url)
    assert "hunter2" not in str(caught.value)
    assert "environment" in str(caught.value)


def test_objects_are_put_got_listed_and_removed(object_root, tmp_path):
    root = place(object_root)
    assert root.files() == {}
    assert root.get("a") is None
    root.put("a", "text")
    root.put("a", "newer")
    root.put("empty", b"")
    root.put("deep/er/b c+d&é.bin", BIG)
    assert root.get("a") == b"newer"
    assert root.get("empty") == b""
    assert root.get("deep/er/b c+d&é.bin") == BIG
    assert {name: one.size for name, one in root.files().items()} == {"a": 5, "deep/er/b c+d&é.bin": len(BIG), "empty": 0}
    assert list(root.files(deep=False)) == ["a", "empty"]
    assert root.folders() == ["deep"]
    assert (root / "deep").folders() == ["er"]
    assert root.exists("a")
    assert not root.exists("deep"), "a folder is no object"
    assert not root.put_new("a", "other")
    assert root.put_new("c", "first")
    assert root.get("a") == b"newer"

    (tmp_path / "up").write_bytes(BIG)
    assert root.put_file("up", tmp_path / "up") == len(BIG)
    root.get_file("up", tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == BIG
    root.get_file("empty", tmp_path / "empty")
    assert (tmp_path / "empty").read_bytes() == b""
    root.remove(["up", "never there", "deep/er/b c+d&é.bin"])
    assert list(root.files()) == ["a", "c", "empty"]


def test_threads_share_a_store(object_root):
    root = place(object_root)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda one: root.put(f"{one}", f"{one}"), range(40)))
        assert list(pool.map(lambda one: root.get(f"{one}"), range(40))) == [f"{one}".encode() for one in range(40)]


def test_a_listing_has_more_than_a_page(s3):
    for one in range(1203):
        s3.put(f"stairs/root/{one:04d}", b"x")
    assert len(place(s3.url("stairs/root")).files()) == 1203


def test_a_large_file_goes_up_in_pieces(s3, tmp_path, monkeypatch):
    monkeypatch.setattr("stairstep.records.places._PIECE", 3 << 20)
    (tmp_path / "up").write_bytes(BIG)
    root = place(s3.url("stairs"))
    root.put_file("x", tmp_path / "up")
    assert s3.objects["stairs/x"] == BIG
    root.get_file("x", tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == BIG
    assert s3.asked("GET", "/x") == 4


def test_a_busy_store_is_asked_again(s3):
    root = place(s3.url("stairs"))
    s3.misbehave("PUT", "x", status(503), times=1)
    root.put("x", b"data")
    s3.misbehave("GET", "x", cut(2), times=1)
    assert root.get("x") == b"data"
    assert s3.asked("PUT", "x") == 2
    assert s3.asked("GET", "x") == 2


def test_a_store_that_stays_busy_is_told_and_leaves_no_object(s3, tmp_path):
    root = place(s3.url("stairs"))
    s3.misbehave("PUT", "x", status(503), times=None)
    with pytest.raises(UnreachableError, match="s3://stairs/x: the object store did not do it"):
        root.put("x", b"data")
    assert s3.asked("PUT", "x") == 3
    assert s3.names() == []
    s3.put("stairs/y", b"0123456789")
    s3.misbehave("GET", "y", cut(4), times=None)
    with pytest.raises(UnreachableError, match="stairs/y"):
        root.get_file("y", tmp_path / "y")
    assert list(tmp_path.iterdir()) == []
    s3.behave()
    s3.misbehave("GET", "y", changed(0))
    assert root.get("y") == b"1123456789", "what arrives changed is for whoever knows a digest"


def test_who_may_not_is_told_where_credentials_come_from(s3, monkeypatch):
    root = place(s3.url("stairs/root"))
    with pytest.raises(InputError, match="there is no bucket s3://nobody; make it"):
        place(s3.url("nobody/x")).put("a", b"")
    with pytest.raises(InputError, match="there is no bucket s3://nobody"):
        place(s3.url("nobody/x")).files()
    s3.misbehave("PUT", "a", status(403, "AccessDenied"))
    with pytest.raises(InputError, match=r"the store refuses access.*the right to list, read, write and delete") as caught:
        root.put("a", b"")
    assert "the environment has none" not in str(caught.value)


def test_without_credentials_it_is_said_that_there_are_none(s3):
    code = "import sys; from stairstep.records.places import place; place(sys.argv[1]).put('a', b'')"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": os.devnull}
    done = subprocess.run([sys.executable, "-c", code, s3.url("stairs")], env=environment, capture_output=True, text=True, check=False)
    assert "the environment has none of the first two" in done.stderr
    assert s3.names() == []


def test_a_store_that_is_not_there_is_told(aws):
    with pytest.raises(UnreachableError, match="see whether it can be reached"):
        place("s3://stairs/x?endpoint_override=http://127.0.0.1:9&region=us-east-1").get("a")


def test_a_file_of_this_machine_that_is_not_there_is_no_fault_of_the_store(s3, tmp_path):
    with pytest.raises(FileNotFoundError):
        place(s3.url("stairs")).put_file("x", tmp_path / "none")
    s3.put("stairs/y", b"data")
    with pytest.raises(FileNotFoundError):
        place(s3.url("stairs")).get_file("y", tmp_path / "no folder" / "y")
    assert s3.names() == ["stairs/y"]

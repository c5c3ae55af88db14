"""The server of a watched board: for this machine alone, news only when there are some, a clean end."""

from __future__ import annotations

import http.client
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from board_world import ranks, write_evaluation, write_run

from stairstep.board import BoardServer, Content, Folders, Live, content
from stairstep.records import RunFolder
from stairstep.settings import InputError

Ask = Callable[..., tuple[int, dict[str, str], str]]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return write_run(tmp_path / "a", {0: ranks(20, 0.2, 0), 10: ranks(20, 0.5, 1)})


@pytest.fixture
def ask(run: RunFolder) -> Iterator[Ask]:
    """ask(path, header=…): status, headers and text of an answer."""
    folders = Folders([run.path])
    server = BoardServer(Live(folders, lambda: content(folders.read(), folders), rest=0))
    thread = threading.Thread(target=server.serve)
    thread.start()
    host, port = server.address.removeprefix("http://").rstrip("/").split(":")
    assert host == "127.0.0.1"

    def call(path: str, **headers: str) -> tuple[int, dict[str, str], str]:
        connection = http.client.HTTPConnection(host, int(port), timeout=60)
        connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        found = answer.status, dict(answer.getheaders()), answer.read().decode()
        connection.close()
        return found

    yield call
    server.stop()
    thread.join(10)
    assert not thread.is_alive()


def test_news_come_when_there_are_some(run: RunFolder, ask: Ask):
    code, headers, page = ask("/")
    assert code == 200
    assert "connect-src &#x27;self&#x27;" in page or "connect-src 'self'" in page
    version = headers["ETag"]
    assert ask("/board.json", If_None_Match=version)[0] == 304
    run.heartbeat()
    assert ask("/board.json", If_None_Match=version)[0] == 304
    write_evaluation(run.path, 20, ranks(20, 0.9, 2))
    code, headers, text = ask("/board.json", If_None_Match=version)
    news: dict[str, Any] = json.loads(text)
    assert code == 200
    assert headers["ETag"] != version
    assert [one["step"] for one in news["data"]["questions"]["asked"]] == [0, 10, 20]
    assert "from step 0 to 20" in news["main"]


def test_only_this_machine_is_answered_and_only_two_addresses(ask: Ask):
    assert ask("/", Host="elsewhere.example:80")[0] == 403
    assert ask("/", Host="localhost:80")[0] == 200
    assert ask("/../recipe.yaml")[0] == 404
    assert ask("/recipe.yaml")[0] == 404


def test_a_folder_that_cannot_be_read_is_told_and_read_again_later(tmp_path: Path):
    run = write_run(tmp_path / "a", {20: ranks(20, 0.5, 0)})

    def fails() -> Any:
        raise InputError("nothing there")

    server = BoardServer(Live(Folders([run.path]), fails))
    thread = threading.Thread(target=server.serve)
    thread.start()
    connection = http.client.HTTPConnection("127.0.0.1", int(server.address.rstrip("/").rpartition(":")[2]), timeout=60)
    connection.request("GET", "/board.json")
    answer = connection.getresponse()
    assert (answer.status, answer.read().decode()) == (503, "nothing there")
    connection.close()
    server.stop()
    thread.join(10)


def test_a_port_that_is_taken_is_told(tmp_path: Path):
    run = write_run(tmp_path / "a", {})
    live = Live(Folders([run.path]), lambda: pytest.fail("nobody asked"))
    server = BoardServer(live)
    with pytest.raises(InputError, match="--port"):
        BoardServer(live, int(server.address.rstrip("/").rpartition(":")[2]))
    server.close()


def served(run: RunFolder, made: Callable[[], Any]) -> tuple[BoardServer, threading.Thread, int]:
    server = BoardServer(Live(Folders([run.path]), made))
    thread = threading.Thread(target=server.serve)
    thread.start()
    return server, thread, int(server.address.rstrip("/").rpartition(":")[2])


def test_a_tab_that_closes_is_no_news(run: RunFolder, capfd: pytest.CaptureFixture[str]):
    asked, gone = threading.Event(), threading.Event()

    def slowly() -> Content:
        asked.set()
        gone.wait(60)
        return Content("large", "x" * 50_000_000, {})

    server, thread, port = served(run, slowly)
    other = socket.create_connection(("127.0.0.1", port))
    other.sendall(b"GET /board.json HTTP/1.0\r\nHost: localhost:1\r\n\r\n")
    assert asked.wait(60)
    other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closed with a reset, as a browser's tab is
    other.close()
    first = [one for one in threading.enumerate() if "process_request_thread" in one.name]
    assert len(first) == 1
    gone.set()
    first[0].join(60)
    assert not first[0].is_alive()
    server.stop()
    thread.join(10)
    assert capfd.readouterr().err == ""


def test_a_defect_is_answered_and_told_where_it_is_served(run: RunFolder, capfd: pytest.CaptureFixture[str]):
    def fails() -> Any:
        raise KeyError("a defect of ours")

    server, thread, port = served(run, fails)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/")
    answer = connection.getresponse()
    assert (answer.status, answer.read()) == (500, b"the board could not be made; the terminal that serves it says why\n")
    connection.close()
    server.stop()
    thread.join(10)
    assert "KeyError: 'a defect of ours'" in capfd.readouterr().err


@pytest.mark.parametrize("port", [-1, 65536, 99999])
def test_a_port_that_is_none_is_told(run: RunFolder, port: int):
    with pytest.raises(InputError, match=f"--port {port}: expected a port from 1 to 65535"):
        BoardServer(Live(Folders([run.path]), lambda: pytest.fail("nobody asked")), port)

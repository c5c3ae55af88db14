"""The notice of a cloud on its way to Ray: a metadata service of the tests' own that asks for tokens as AWS's does, what is done about its
answers, and the node that a real Ray then drains."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from own_ray import BIN, end, free_ports, own_environment, started

from stairstep.cluster import notice
from stairstep.cluster.notice import DONE, NOT_THERE, UNDRAINED, DrainError, Metadata, Notice, watch

ACTION, LIFE_CYCLE = "spot/instance-action", "instance-life-cycle"
NONE = (404, "")


def in_seconds(seconds: float) -> tuple[int, str]:
    """The answer of a service whose instance goes then."""
    at = datetime.fromtimestamp(int(time.time() + seconds), UTC)
    return 200, json.dumps({"action": "terminate", "time": at.strftime("%Y-%m-%dT%H:%M:%SZ")})


def time_of(answer: tuple[int, str]) -> float:
    return datetime.fromisoformat(json.loads(answer[1])["time"]).timestamp()


class Service:
    """IMDSv2 of a spot instance: an item is given to who brings a token, and its answers come in turn, the last one for ever."""

    def __init__(self) -> None:
        self.items: dict[str, list[tuple[int, str]]] = {LIFE_CYCLE: [(200, "spot")], ACTION: [NONE]}
        self.token_status = [200]
        self.pages = 0  # so many tokens are the page of somebody else
        self.asked: list[str] = []
        service, tokens = self, set[str]()

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                good = self.path == "/latest/api/token" and 1 <= int(self.headers["X-aws-ec2-metadata-token-ttl-seconds"]) <= 21600
                status = service.next(service.token_status) if good else 400
                token = f"token-{len(tokens)}"
                if status == 200:
                    tokens.add(token)
                if status == 200 and service.pages:
                    service.pages -= 1
                    token = "<html>\nLog in, please\n</html>"
                self.answer(status, token if status == 200 else "")

            def do_GET(self) -> None:
                if self.headers["X-aws-ec2-metadata-token"] not in tokens:
                    return self.answer(401, "")
                name = self.path.removeprefix("/latest/meta-data/")
                service.asked.append(name)
                return self.answer(*(service.next(service.items[name]) if name in service.items else NONE))

            def answer(self, status: int, text: str) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._http.server_port}"
        Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    @staticmethod
    def next(answers: list[Any]) -> Any:
        return answers.pop(0) if len(answers) > 1 else answers[0]

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def service(caplog: pytest.LogCaptureFixture) -> Iterator[Service]:
    caplog.set_level(logging.INFO, "notice")
    made = Service()
    yield made
    made.close()


def watched(service: Service, refusals: int = 0) -> tuple[int, list[Notice]]:
    """What the watch ends with, and the notices that Ray was told; the first ones are refused."""
    told: list[Notice] = []

    def drain(one: Notice) -> None:
        told.append(one)
        if len(told) <= refusals:
            raise DrainError("not now")

    return watch(Metadata(service.address), drain, every_s=0.01, patience_s=0.2), told


def status_without_token(service: Service) -> int:
    connection = HTTPConnection(service.address)
    connection.request("GET", f"/latest/meta-data/{ACTION}")
    return connection.getresponse().status


# --- what is asked, and what is done about the answer


def test_a_notice_is_told_to_ray_with_its_time(service: Service):
    answer = in_seconds(120)
    service.items[ACTION] = [NONE, NONE, answer]
    assert status_without_token(service) == 401
    assert watched(service) == (DONE, [Notice("terminate", time_of(answer))])
    assert service.asked == [LIFE_CYCLE, *[ACTION] * 3]


def test_an_instance_that_nobody_takes_back_is_not_watched(service: Service, caplog: pytest.LogCaptureFixture):
    service.items = {LIFE_CYCLE: [(200, "on-demand")], ACTION: [in_seconds(120)]}
    assert watched(service) == (DONE, [])
    assert service.asked == [LIFE_CYCLE]
    assert "on-demand" in caplog.text


def test_one_that_does_not_say_how_it_was_bought_is_watched(service: Service):
    service.items = {ACTION: [NONE, in_seconds(120)]}
    code, told = watched(service)
    assert (code, len(told)) == (DONE, 1)


@pytest.mark.parametrize("broken", [(500, ""), (200, "soon"), (200, "[]"), (200, '{"action": "stop", "time": "2026-01-31 08:22"}')])
def test_a_service_that_fails_for_a_while_is_told_once_and_asked_again(
    service: Service, caplog: pytest.LogCaptureFixture, broken: tuple[int, str]
):
    service.items[ACTION] = [NONE, broken, broken, broken, in_seconds(120)]
    code, told = watched(service)
    assert (code, len(told)) == (DONE, 1)
    assert caplog.text.count("asking again") == 1 and caplog.text.count("answers again") == 1
    assert (broken[1] or "HTTP 500") in caplog.text


def test_tokens_may_fail_too(service: Service, caplog: pytest.LogCaptureFixture):
    service.token_status = [503, 503, 200, 200, 503, 200]
    service.items[ACTION] = [NONE, in_seconds(120)]
    code, told = watched(service)
    assert (code, len(told)) == (DONE, 1)
    assert caplog.text.count("gave no token, but HTTP 503") == 2, "once at the start, once later"


def test_a_page_in_place_of_a_token_is_a_failure_that_passes(service: Service, caplog: pytest.LogCaptureFixture):
    service.pages = 2
    service.items[ACTION] = [NONE, in_seconds(120)]
    code, told = watched(service)
    assert (code, len(told)) == (DONE, 1)
    assert "Invalid header value" in caplog.text


@pytest.mark.parametrize("status", [403, None])
def test_where_there_is_no_service_that_is_said_and_the_end(service: Service, caplog: pytest.LogCaptureFixture, status: int | None):
    if status is None:
        service.close()
    else:
        service.token_status = [status]
    assert watched(service) == (NOT_THERE, [])
    assert caplog.text.count("nobody watches for a notice here") == 1
    assert service.address in caplog.text


def test_ray_is_asked_again_until_it_takes_the_notice(service: Service, caplog: pytest.LogCaptureFixture):
    service.items[ACTION] = [in_seconds(120)]
    code, told = watched(service, refusals=2)
    assert (code, len(told)) == (DONE, 3)
    assert caplog.text.count("Ray does not drain this node (DrainError: not now)") == 2


def test_and_not_longer_than_there_is_a_node(service: Service, caplog: pytest.LogCaptureFixture):
    service.items[ACTION] = [in_seconds(1)]
    code, told = watched(service, refusals=10**9)
    assert code == UNDRAINED and told
    assert "lost without one" in caplog.text


def test_a_notice_that_comes_too_late_is_told_all_the_same(service: Service):
    service.items[ACTION] = [in_seconds(-5)]
    code, told = watched(service)
    assert (code, len(told)) == (DONE, 1)


# --- as a file of its own, as on a node


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """The file alone, as cluster.yaml copies it."""
    return Path(shutil.copy(notice.__file__, tmp_path / "notice.py"))


def test_until_there_is_a_notice_it_needs_neither_ray_nor_this_library(service: Service, script: Path):
    service.items[LIFE_CYCLE] = [(200, "on-demand")]
    bare = [sys.executable, "-I", "-S"]  # -S: without any package
    assert subprocess.run([*bare, "-c", "import ray"], capture_output=True).returncode == 1
    assert subprocess.run([*bare, "-c", "import stairstep"], capture_output=True).returncode == 1
    done = subprocess.run([*bare, script, f"--service={service.address}", "--address=nowhere:1"], capture_output=True, text=True)
    assert (done.returncode, "nothing to watch for" in done.stderr) == (DONE, True), done.stderr


def test_a_later_start_takes_over_from_an_earlier_one(service: Service, script: Path, tmp_path: Path):
    command = [sys.executable, "-I", "-S", script, f"--service={service.address}", "--address=nowhere:1", f"--pid-file={tmp_path / 'pid'}"]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for count in (1, 2, 3):
            running.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
            limit = time.monotonic() + 60
            while service.asked.count(LIFE_CYCLE) < count and time.monotonic() < limit:
                time.sleep(0.02)
        assert [one.wait(timeout=60) for one in running[:-1]] == [-signal.SIGTERM] * 2
        assert running[-1].poll() is None and (tmp_path / "pid").read_text() == str(running[-1].pid)
    finally:
        for one in running:
            one.kill()
            one.wait()


# --- and a real Ray

HOLDER = """
import json, sys
import ray
from ray._private.state import state

ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")

@ray.remote(num_cpus=1)
class Worker:
    def node(self):
        return ray.get_runtime_context().get_node_id()

workers = {name: Worker.options(resources={name: 1}).remote() for name in sys.argv[2:]}
print(json.dumps({name: ray.get(one.node.remote()) for name, one in workers.items()}), flush=True)
for line in sys.stdin:
    print(json.dumps(state.get_draining_nodes()), flush=True)
"""


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_ray_drains_the_node_that_has_a_notice_and_one_that_is_told_to_end(script: Path):
    """Two nodes with a worker each, under a token: AWS's notice reaches one; the other's `ray start` has SIGTERM, as an evicted pod."""
    from ray.util import get_node_ip_address

    named = {"one": ["--node-name=one"], "two": []}  # the second has its address for a name, as every node of cluster.yaml
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as name, ExitStack() as stack:  # sockets have short names
        folder = Path(name)
        services = {one: service_in(stack) for one in named}
        port, dashboard, agent, client = free_ports(4)
        address = f"{get_node_ip_address()}:{port}"
        environment = own_environment(folder) | {"PYTHONUNBUFFERED": "1"}
        command = [
            BIN / "ray", "start", "--head", "--block", f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
            f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}", "--num-cpus=0", "--disable-usage-stats",
            "--node-name=head",
        ]  # fmt: skip
        stack.enter_context(started(command, environment, folder))
        graceful = environment | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "300"}
        nodes = {one: joined(stack, one, [*named[one], f"--address={address}"], graceful, folder) for one in services}
        watches = {}
        for one, service in services.items():
            words = [sys.executable, script, f"--address={address}", *named[one], f"--service={service.address}"]
            with (folder / f"watch-{one}").open("wb") as said:
                watches[one] = subprocess.Popen(words, env=environment, cwd=folder, stdout=said, stderr=subprocess.STDOUT)
            stack.callback(watches[one].wait)
            stack.callback(watches[one].kill)
        (folder / "holder.py").write_text(HOLDER)
        holder = subprocess.Popen(
            [sys.executable, folder / "holder.py", address, *services], env=environment, cwd=folder, stdin=-1, stdout=-1, text=True
        )
        stack.callback(holder.wait)
        stack.callback(holder.kill)
        assert holder.stdin and holder.stdout
        ids = json.loads(holder.stdout.readline())
        assert len(set(ids.values())) == 2

        def draining() -> dict[str, int]:
            assert holder.stdin and holder.stdout
            holder.stdin.write("?\n")
            holder.stdin.flush()
            return json.loads(holder.stdout.readline())

        stranger = service_in(stack)
        stranger.items[ACTION] = [in_seconds(1)]
        (folder / "false").write_text("ab" * 32)
        done = subprocess.run(
            [sys.executable, script, f"--address={address}", *named["one"], f"--service={stranger.address}"],
            env=environment | {"RAY_AUTH_TOKEN_PATH": str(folder / "false")},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, "AuthenticationError" in done.stderr) == (UNDRAINED, True), done.stderr
        assert draining() == {}

        answer = in_seconds(600)
        services["two"].items[ACTION] = [answer]
        code = watches["two"].wait(timeout=200)
        said = (folder / "watch-two").read_text()
        assert code == DONE, said
        assert draining() == {ids["two"]: int(time_of(answer) * 1000)}, said
        assert watches["one"].poll() is None and services["one"].asked.count(ACTION) > 1

        before = time.time()
        os.kill(nodes["one"].pid, signal.SIGTERM)
        limit = time.monotonic() + 100
        while len(now := draining()) < 2 and time.monotonic() < limit:
            time.sleep(0.2)
        assert set(now) == set(ids.values())
        assert 290 < now[ids["one"]] / 1000 - before < 400, "as long as its environment gives it"
        assert nodes["one"].poll() is None, "it waits for its worker"
        holder.kill()
        nodes["one"].wait(timeout=200)  # and for nothing else


def service_in(stack: ExitStack) -> Service:
    """A metadata service that ends with the stack."""
    made = Service()
    stack.callback(made.close)
    return made


def joined(stack: ExitStack, name: str, words: list[str], environment: dict[str, str], folder: Path) -> subprocess.Popen[bytes]:
    """A node that has joined, with one CPU and a resource of its name; it ends with the stack."""
    place = folder / f"node-{name}"
    for _ in range(3):  # where the machine has much other work, Ray gives itself up after 30 s
        command = [
            BIN / "ray", "start", "--block", *words, "--num-cpus=1", "--disable-usage-stats",
            f"--resources={json.dumps({name: 1})}", f"--dashboard-agent-listen-port={free_ports(1)[0]}",
        ]  # fmt: skip
        with place.open("wb") as said:
            node = subprocess.Popen(list(map(str, command)), env=environment, cwd=folder, stdout=said, stderr=subprocess.STDOUT)
        while node.poll() is None and "Ray runtime started" not in place.read_text():
            time.sleep(0.1)
        if node.poll() is None:
            stack.callback(end, node)
            return node
    raise AssertionError(place.read_text())

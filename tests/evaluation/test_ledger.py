"""The answer ledger: one asking for one question among threads, processes and deaths; entries whole and right, or absent."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stairstep.evaluation.leases import FolderClock, Leases
from stairstep.evaluation.ledger import Entry, Ledger
from stairstep.records.files import host_name
from stairstep.settings import InputError

FORK = multiprocessing.get_context("fork")
KEY = {"model": "m", "question": "who?", "tiles": ["a", "b"], "temperature": 0.0}
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def never() -> dict[str, Any]:
    raise AssertionError("asked again")


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.json") if not path.name.startswith("."))


def in_flight(folder: Path) -> list[str]:
    return sorted(os.listdir(folder / ".in_flight"))


def lease_path(ledger: Ledger, kind: str, key: dict[str, Any]) -> Path:
    """Where the first lease of a key lies, from the layout that the module states."""
    canonical = json.dumps({"kind": kind, "key": key}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return ledger.folder / ".in_flight" / f"{hashlib.sha256(canonical.encode()).hexdigest()}.lease"


def wait_for(condition: Callable[[], object], what: str, limit_s: float = 20.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"waited in vain: {what}"
        time.sleep(0.005)


@pytest.fixture
def start() -> Iterator[Callable[..., BaseProcess]]:
    """Starts processes; those that still run at the end of the test are killed."""
    started = []

    def run(target: Callable[..., None], *arguments: Any) -> BaseProcess:
        started.append(FORK.Process(target=target, args=arguments))
        started[-1].start()
        return started[-1]

    yield run
    for one in started:
        one.kill()
        one.join()


# --- what is kept


def test_a_question_is_asked_once_and_found_by_any_ledger_of_the_folder(tmp_path):
    asked = []
    ledger = Ledger(tmp_path / "deep" / "ledger")
    assert ledger.find("answer", KEY) is None
    first = ledger.once("answer", KEY, lambda: asked.append(1) or {"text": "Ada\nLovelace 🙂", "tokens": 3})
    assert first == Entry({"text": "Ada\nLovelace 🙂", "tokens": 3}, hit=False)
    shuffled = dict(reversed(KEY.items()))
    assert Ledger(ledger.folder).once("answer", shuffled, never) == Entry(first.value, hit=True)
    assert ledger.find("answer", KEY) == first.value
    assert asked == [1]
    assert ledger.counts("answer") == {"hits": 0, "asked": 1, "waited": 0}
    assert in_flight(ledger.folder) == []


def test_kinds_and_keys_are_apart(tmp_path):
    ledger = Ledger(tmp_path)
    keys = [KEY, {**KEY, "temperature": 0.5}, {**KEY, "tiles": ["b", "a"]}, {**KEY, "tiles": "ab"}, {**KEY, "more": None}, {}]
    for kind in ("answer", "grade"):
        for number, key in enumerate(keys):
            assert not ledger.once(kind, key, lambda kind=kind, number=number: {"is": f"{kind}{number}"}).hit
    for kind in ("answer", "grade"):
        assert [ledger.once(kind, key, never).value["is"] for key in keys] == [f"{kind}{number}" for number in range(len(keys))]
    assert ledger.hits == ledger.asked == {"answer": 6, "grade": 6}


def test_an_entry_lies_where_the_digest_says_and_can_be_read_by_a_person(tmp_path):
    key = {"question": "wer wär's?", "tiles": ["é"]}
    Ledger(tmp_path).once("grade", key, lambda: {"grade": "correct"})
    canonical = json.dumps({"kind": "grade", "key": key}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    path = tmp_path / "grade" / digest[:2] / f"{digest}.json"
    read = json.loads(path.read_text(encoding="utf-8"))
    assert (read["kind"], read["key"], read["value"]) == ("grade", key, {"grade": "correct"})
    assert "wer wär's?" in path.read_text(encoding="utf-8")


def test_a_miss_returns_what_a_hit_will(tmp_path):
    mine = {"b": (1, 2), "a": {"x": [0.1, 1e300, -5, True, None]}, "lone": "\ud800 surrogate"}
    first = Ledger(tmp_path).once("answer", {"lone": "\udc00"}, lambda: mine)
    second = Ledger(tmp_path).once("answer", {"lone": "\udc00"}, never)
    assert first.value == second.value == {"b": [1, 2], "a": {"x": [0.1, 1e300, -5, True, None]}, "lone": "\ud800 surrogate"}
    assert list(second.value) == ["b", "a", "lone"]
    first.value["a"]["x"].clear()
    assert mine["a"]["x"], "the caller's own value was handed back"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"a": {"b": [1.0, float("nan")]}}, r"a, b\[1\]: nan is not a number"),
        ({"a": float("-inf")}, "a: -inf is not a number"),
        ({"a": {1: 2}}, "a: the name 1 is no text"),
        ({"a": {3, 4}}, "a: expected plain JSON, found set"),
        ({"a": b"x"}, "a: expected plain JSON, found bytes"),
        ({"a": Path("x")}, "a: expected plain JSON, found PosixPath"),
    ],
)
def test_what_is_not_json_is_refused_by_its_place(tmp_path, bad, message):
    ledger = Ledger(tmp_path)
    with pytest.raises(ValueError, match="key of kind .answer., " + message):
        ledger.once("answer", bad, never)
    with pytest.raises(ValueError, match=message):
        ledger.once("answer", KEY, lambda: bad)
    assert entries(tmp_path) == []
    assert in_flight(tmp_path) == []
    assert ledger.once("answer", KEY, lambda: {"now": "good"}).value == {"now": "good"}


@pytest.mark.parametrize("bad", [None, "text", [1], 0.5])
def test_an_answer_that_is_no_object_is_refused(tmp_path, bad):
    ledger = Ledger(tmp_path)
    with pytest.raises(ValueError, match=f"expected an object, found {type(bad).__name__}"):
        ledger.once("answer", KEY, lambda: bad)
    assert entries(tmp_path) == []
    assert in_flight(tmp_path) == []


@pytest.mark.parametrize("kind", ["", "Answer", "../answer", ".in_flight", "a/b", "answer\n"])
def test_a_kind_is_a_plain_name(tmp_path, kind):
    with pytest.raises(ValueError, match="kind"):
        Ledger(tmp_path).once(kind, KEY, never)


# --- damage


@pytest.mark.parametrize("damage", ["torn", "empty", "value edited", "key edited", "of another key", "a list", "no json"])
def test_damage_is_told_once_and_replaced(tmp_path, caplog, damage):
    Ledger(tmp_path).once("answer", {"q": "other"}, lambda: {"text": "of the other"})
    (other,) = entries(tmp_path)
    Ledger(tmp_path).once("answer", KEY, lambda: {"text": "right"})
    (path,) = (one for one in entries(tmp_path) if one != other)
    data = path.read_bytes()
    changed = {
        "torn": data[: len(data) // 2],
        "empty": b"",
        "value edited": data.replace(b"right", b"wrong"),
        "key edited": data.replace(b"who?", b"why?"),
        "of another key": other.read_bytes(),
        "a list": b"[1]\n",
        "no json": b"\xff" * len(data),
    }[damage]
    assert changed != data
    path.write_bytes(changed)

    ledger = Ledger(tmp_path)
    assert ledger.find("answer", KEY) is None
    assert ledger.find("answer", KEY) is None
    told = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 1 and str(path) in told[0].getMessage()
    assert ledger.once("answer", KEY, lambda: {"text": "right again"}) == Entry({"text": "right again"}, hit=False)
    assert Ledger(tmp_path).once("answer", KEY, never).value == {"text": "right again"}
    assert Ledger(tmp_path).once("answer", {"q": "other"}, never).value == {"text": "of the other"}
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


def test_a_torn_temporary_and_an_old_lease_do_no_harm_and_go(tmp_path):
    gone = FORK.Process(target=int)
    gone.start()
    gone.join()
    ledger = Ledger(tmp_path)
    lease = lease_path(ledger, "answer", KEY)
    torn = lease.with_name(f".{lease.stem}.json.tmp-{host_name()}-{gone.pid}-0123abcd")
    torn.write_bytes(b'{\n"kind": "ans')
    foreign = lease.with_name(f"{'0' * 64}.lease")
    foreign.write_text("elsewhere 1 - abc 30.0\n")
    os.utime(foreign, (1e9, 1e9))
    orphan = lease.with_name(f"{'2' * 64}.abc.lease")
    orphan.write_text("elsewhere 1 - abd 30.0\n")
    os.utime(orphan, (1e9, 1e9))
    young = lease.with_name(f"{'1' * 64}.lease")
    young.write_text("elsewhere 1 - abc 30.0\n")
    assert ledger.once("answer", KEY, lambda: {"text": "x"}).value == {"text": "x"}
    assert torn.exists()
    Ledger(tmp_path)
    assert in_flight(tmp_path) == [young.name]


# --- fresh


def test_fresh_asks_again_once_a_key_and_replaces(tmp_path):
    Ledger(tmp_path).once("answer", KEY, lambda: {"text": "old"})
    fresh = Ledger(tmp_path, fresh=True)
    assert fresh.find("answer", KEY) is None
    assert fresh.once("answer", KEY, lambda: {"text": "new"}) == Entry({"text": "new"}, hit=False)
    assert fresh.once("answer", KEY, never) == Entry({"text": "new"}, hit=True)
    assert fresh.find("answer", KEY) == {"text": "new"}
    assert Ledger(tmp_path).once("answer", KEY, never).value == {"text": "new"}
    assert len(entries(tmp_path)) == 1
    again = Ledger(tmp_path, fresh=True)
    assert again.once("answer", KEY, lambda: {"text": "new"}) == Entry({"text": "new"}, hit=False)
    assert not again.once("answer", {"q": "unseen"}, lambda: {"text": "first"}).hit
    assert again.once("answer", {"q": "unseen"}, never).hit


def test_a_failing_fresh_ask_leaves_the_old_entry(tmp_path):
    Ledger(tmp_path).once("answer", KEY, lambda: {"text": "old"})
    fresh = Ledger(tmp_path, fresh=True)
    with pytest.raises(ConnectionError):
        fresh.once("answer", KEY, fail)
    assert Ledger(tmp_path).once("answer", KEY, never).value == {"text": "old"}
    assert fresh.once("answer", KEY, lambda: {"text": "new"}).value == {"text": "new"}


def test_fresh_ledgers_that_want_the_same_at_once_ask_once(tmp_path):
    Ledger(tmp_path).once("answer", KEY, lambda: {"text": "old"})
    ledgers = [Ledger(tmp_path, fresh=True) for _ in range(4)]
    ready, asked = threading.Barrier(4), []

    def run(ledger: Ledger) -> Entry:
        assert ledger.find("answer", KEY) is None
        ready.wait()
        return ledger.once("answer", KEY, lambda: (asked.append(1), time.sleep(0.2), {"text": "new"})[-1])

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, ledgers))
    assert [one.value["text"] for one in found] == ["new"] * 4
    assert len(asked) == 1


# --- stale


def failed(value: Mapping[str, Any]) -> bool:
    return "failure" in value


def test_a_stale_value_is_asked_for_again_once_a_key_and_replaced(tmp_path):
    Ledger(tmp_path).once("answer", KEY, lambda: {"failure": "cut off"})
    assert Ledger(tmp_path).once("answer", KEY, never) == Entry({"failure": "cut off"}, hit=True)
    one = Ledger(tmp_path)
    assert one.once("answer", KEY, lambda: {"failure": "cut off again"}, failed) == Entry({"failure": "cut off again"}, hit=False)
    assert one.once("answer", KEY, never, failed) == Entry({"failure": "cut off again"}, hit=True)
    assert Ledger(tmp_path).once("answer", KEY, lambda: {"text": "new"}, failed) == Entry({"text": "new"}, hit=False)
    assert Ledger(tmp_path).once("answer", KEY, never, failed) == Entry({"text": "new"}, hit=True)
    assert len(entries(tmp_path)) == 1


def test_a_stale_value_that_was_kept_meanwhile_does_not_displace_a_good_one(tmp_path):
    late = Ledger(tmp_path)

    def ask() -> dict[str, Any]:
        request, _ = request_of(tmp_path, KEY, "")
        Ledger(tmp_path)._commit(request, request.text({"failure": "cut off"}))
        return {"text": "good"}

    assert late.once("answer", KEY, ask, failed).value == {"text": "good"}
    assert Ledger(tmp_path).once("answer", KEY, never).value == {"text": "good"}


def test_a_failing_second_ask_leaves_the_stale_value(tmp_path):
    Ledger(tmp_path).once("answer", KEY, lambda: {"failure": "cut off"})
    with pytest.raises(ConnectionError):
        Ledger(tmp_path).once("answer", KEY, fail, failed)
    assert Ledger(tmp_path).once("answer", KEY, never).value == {"failure": "cut off"}


# --- many at once


def fail() -> dict[str, Any]:
    raise ConnectionError("the reader is down")


def test_an_exception_passes_through_and_the_next_one_asks(tmp_path):
    ledger = Ledger(tmp_path)
    with pytest.raises(ConnectionError, match="down"):
        ledger.once("answer", KEY, fail)
    assert entries(tmp_path) == []
    assert in_flight(tmp_path) == []
    assert not Ledger(tmp_path).once("answer", KEY, lambda: {"text": "up"}).hit
    assert ledger.counts("answer") == {"hits": 0, "asked": 1, "waited": 0}


@pytest.mark.parametrize("shared", [True, False], ids=["one ledger", "a ledger each"])
def test_threads_ask_once_and_go_on_after_a_failure(tmp_path, shared):
    ledgers = [Ledger(tmp_path)] * 8 if shared else [Ledger(tmp_path) for _ in range(8)]
    asked, failed, together = [], [], threading.Barrier(8)

    def ask() -> dict[str, Any]:
        asked.append(threading.get_ident())
        time.sleep(0.05)
        if len(asked) <= 2:
            raise ConnectionError("not yet")
        return {"by": len(asked)}

    def run(ledger: Ledger) -> Entry | None:
        together.wait()
        try:
            return ledger.once("answer", KEY, ask)
        except ConnectionError:
            failed.append(threading.get_ident())
            return None

    with ThreadPoolExecutor(8) as pool:
        found = [one for one in pool.map(run, ledgers) if one is not None]
    assert len(asked) == 3
    assert sorted(failed) == sorted(asked[:2])
    assert [one.value for one in found] == [{"by": 3}] * 6
    assert sum(not one.hit for one in found) == 1
    totals = {name: sum(one.counts("answer")[name] for one in set(ledgers)) for name in ("hits", "asked", "waited")}
    assert totals["hits"] == 5 and totals["asked"] == 3 and 5 <= totals["waited"] <= 7
    assert in_flight(tmp_path) == []


def test_other_keys_do_not_wait(tmp_path):
    ledger, go = Ledger(tmp_path), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(ledger.once, "answer", KEY, lambda: {"went": go.wait(20)})
        wait_for(lambda: in_flight(tmp_path), "the lease of the slow one")
        assert ledger.once("answer", {"q": "quick"}, lambda: {"text": "x"}).value == {"text": "x"}
        assert not slow.done()
        go.set()
        assert slow.result().value == {"went": True}


def test_asking_the_same_from_within_is_an_error_and_no_deadlock(tmp_path):
    ledger = Ledger(tmp_path)
    with pytest.raises(RuntimeError, match="the very same"):
        ledger.once("answer", KEY, lambda: ledger.once("answer", KEY, never).value)
    assert ledger.once("answer", KEY, lambda: ledger.once("answer", {"q": "inner"}, lambda: {"n": 1}).value).value == {"n": 1}


def test_a_forked_process_has_to_make_its_own(tmp_path, start):
    ledger = Ledger(tmp_path)

    def child() -> None:
        with pytest.raises(RuntimeError, match="belongs to the process"):
            ledger.once("answer", KEY, never)
        os._exit(7)

    process = start(child)
    process.join(20)
    assert process.exitcode == 7


# --- leases


def _hold(folder: Path, log: Path, lease_s: float, hold_s: float, key: dict[str, Any] = KEY) -> None:
    """Ask slowly, saying so in a log."""

    def ask() -> dict[str, Any]:
        note(log, f"asking {os.getpid()}")
        time.sleep(hold_s)
        return {"by": os.getpid()}

    entry = Ledger(folder, lease_s=lease_s).once("answer", key, ask)
    note(log, f"got {entry.value['by']} {entry.hit}")


def note(log: Path, line: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{line}\n".encode())
    os.close(descriptor)


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def test_a_long_ask_keeps_its_lease_by_renewing_it(tmp_path, start):
    log = tmp_path / "log"
    holder = start(_hold, tmp_path / "ledger", log, 0.4, 2.0)
    wait_for(lambda: lines(log), "the holder's asking")
    entry = Ledger(tmp_path / "ledger", lease_s=0.4).once("answer", KEY, never)
    assert entry == Entry({"by": holder.pid}, hit=True)
    holder.join(20)
    assert lines(log) == [f"asking {holder.pid}", f"got {holder.pid} False"]


def test_a_killed_holder_of_this_machine_is_followed_at_once_by_exactly_one(tmp_path, start):
    log, folder = tmp_path / "log", tmp_path / "ledger"
    holder = start(_hold, folder, log, 600.0, 600.0)
    wait_for(lambda: lines(log), "the holder's asking")
    waiting = [start(_hold, folder, log, 600.0, 0.3) for _ in range(5)]
    time.sleep(0.3)
    assert len(lines(log)) == 1
    os.kill(holder.pid or 0, signal.SIGKILL)
    holder.join()
    for one in waiting:
        one.join(20)
    assert [one.exitcode for one in waiting] == [0] * 5
    asking = [line for line in lines(log) if line.startswith("asking")]
    assert len(asking) == 2
    follower = asking[1].split()[1]
    assert sorted(line for line in lines(log) if line.startswith("got")) == sorted([f"got {follower} False"] + [f"got {follower} True"] * 4)
    assert in_flight(folder) == []


def test_a_stopped_holder_loses_its_lease_and_the_first_committed_answer_is_everybodys(tmp_path, start):
    log, folder = tmp_path / "log", tmp_path / "ledger"
    holder = start(_hold, folder, log, 0.5, 0.8)
    wait_for(lambda: lines(log), "the holder's asking")
    os.kill(holder.pid or 0, signal.SIGSTOP)
    waiting = [start(_hold, folder, log, 0.5, 0.2) for _ in range(4)]
    for one in waiting:
        one.join(20)
    assert len([line for line in lines(log) if line.startswith("asking")]) == 2
    follower = lines(log)[1].split()[1]
    assert follower != str(holder.pid)
    os.kill(holder.pid or 0, signal.SIGCONT)
    holder.join(20)
    assert lines(log)[-1] == f"got {follower} False"
    assert Ledger(folder).find("answer", KEY) == {"by": int(follower)}
    assert in_flight(folder) == []


def _foreign(path: Path, age_s: float, text: str = "elsewhere 1 - 0123abcd 30.0\n") -> None:
    """A lease of another machine, renewed so long ago by the file system's clock."""
    path.write_text(text)
    now = path.stat().st_mtime_ns
    os.utime(path, ns=(now, now - int(age_s * 1e9)))


@pytest.mark.parametrize(("age_s", "least_s", "most_s"), [(31.0, 0.0, 0.5), (29.5, 0.3, 5.0)], ids=["dead for long", "dies now"])
@pytest.mark.parametrize("own_s", [30.0, 600.0])
def test_a_lease_from_elsewhere_ends_when_it_says_by_the_clock_of_the_file_system(tmp_path, monkeypatch, age_s, least_s, most_s, own_s):
    monkeypatch.setattr(time, "time", lambda: 0.0)  # a machine whose own clock is wrong
    ledger = Ledger(tmp_path, lease_s=own_s)
    _foreign(lease_path(ledger, "answer", KEY), age_s)
    started = time.monotonic()
    assert not ledger.once("answer", KEY, lambda: {"text": "x"}).hit
    assert least_s <= time.monotonic() - started < most_s
    assert in_flight(tmp_path) == []


@pytest.mark.parametrize(("age_s", "text"), [(-1e6, "elsewhere 1 - 0123abcd 0.4\n"), (1e6, ""), (1e6, "elsewhere 1 -")])
def test_a_lease_from_the_future_or_without_a_holder_is_watched(tmp_path, age_s, text):
    ledger = Ledger(tmp_path, lease_s=0.4)
    _foreign(lease_path(ledger, "answer", KEY), age_s, text)
    started = time.monotonic()
    assert not ledger.once("answer", KEY, lambda: {"text": "x"}).hit
    assert 0.4 <= time.monotonic() - started < 5
    assert in_flight(tmp_path) == []


def test_a_lease_from_elsewhere_that_is_renewed_is_waited_for(tmp_path):
    ledger = Ledger(tmp_path, lease_s=0.3)
    path = lease_path(ledger, "answer", KEY)
    _foreign(path, 0.0, "elsewhere 1 - 0123abcd 0.3\n")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ledger.once, "answer", KEY, lambda: {"text": "x"})
        for _ in range(15):
            time.sleep(0.08)
            os.utime(path)
        assert not waiting.done()
        path.unlink()
        assert not waiting.result().hit
    assert ledger.counts("answer") == {"hits": 0, "asked": 1, "waited": 1}


def test_the_clock_is_the_file_systems(tmp_path):
    clock = FolderClock(tmp_path)
    (tmp_path / "touched").touch()
    assert abs(clock.now_ns() - (tmp_path / "touched").stat().st_mtime_ns) < 0.5e9
    assert os.listdir(tmp_path) == ["touched"]


def test_a_slow_follower_finds_no_place_in_a_chain_that_was_given_up(tmp_path, monkeypatch):
    """It judged a lease dead, slept while another took it over and gave it up, and a third holds a new one: it must not get one too."""
    leases = Leases(tmp_path, 30.0)
    _foreign(tmp_path / "x.lease", 60.0)
    slow, create = leases.attempt("x"), leases.create
    third = []

    def late(path: Path) -> str | None:  # called when the slow one has judged the first lease
        if path.name != "x.lease" and not third:
            third.append(None)  # once, and not for the others below
            with leases.attempt("x").take() or pytest.fail("the second did not take over"):
                assert sorted(os.listdir(tmp_path)) == ["x.0123abcd.lease", "x.lease"]
            assert os.listdir(tmp_path) == []
            third[0] = leases.attempt("x").take()
        return create(path)

    monkeypatch.setattr(leases, "create", late)
    assert slow.take() is None
    assert third[0] is not None
    assert os.listdir(tmp_path) == ["x.lease"]
    with third[0]:
        assert slow.take() is None
    assert slow.take() is not None


def test_a_chain_of_dead_holders_is_followed_to_its_end(tmp_path):
    leases = Leases(tmp_path, 30.0)
    _foreign(tmp_path / "x.lease", 60.0, "a 1 - t0 30.0\n")
    _foreign(tmp_path / "x.t0.lease", 50.0, "b 1 - t1 30.0\n")
    _foreign(tmp_path / "x.t1.lease", 1.0, "c 1 - t2 30.0\n")
    assert leases.attempt("x").take() is None
    _foreign(tmp_path / "x.t1.lease", 40.0, "c 1 - t2 30.0\n")
    with leases.attempt("x").take() or pytest.fail("not taken over") as lease:
        assert lease.path.name == "x.t2.lease"
        assert leases.attempt("x").take() is None
    assert os.listdir(tmp_path) == []


def test_who_lost_a_lease_leaves_its_successors_alone(tmp_path):
    leases = Leases(tmp_path, 0.2)
    lease = leases.attempt("x").take()
    assert lease is not None
    leases.forget(lease)  # as if the process had stood still
    time.sleep(0.3)
    other = Leases(tmp_path, 600.0).attempt("x").take()
    assert other is not None
    before = sorted(os.listdir(tmp_path))
    lease.renew()
    with lease:
        pass
    assert sorted(os.listdir(tmp_path)) == before and len(before) == 2
    with other:
        pass
    assert os.listdir(tmp_path) == []


# --- disks


def test_a_file_in_the_way_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"file.*stands where.*choose another folder"):
            Ledger(path)


def test_a_folder_without_permission_is_told(tmp_path):
    script = """
import os, sys
from pathlib import Path
from stairstep.evaluation.ledger import Ledger
from stairstep.settings import InputError
if os.geteuid() == 0:
    os.setuid(65534)
try:
    Ledger(Path(sys.argv[1]) / "ledger")
except InputError as error:
    print(error)
"""
    closed = tmp_path / "closed"
    closed.mkdir()
    tmp_path.chmod(0o755)
    closed.chmod(0o555)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "platform"), "PYTHONDONTWRITEBYTECODE": "1"}
    text = subprocess.run([sys.executable, "-c", script, str(closed)], env=environment, capture_output=True, text=True, check=False)
    assert "Permission denied" in text.stdout and "choose another folder" in text.stdout, text.stderr


def test_a_file_system_without_hard_links_will_do(tmp_path, monkeypatch):
    def link(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", link)
    Ledger(tmp_path).once("answer", KEY, lambda: {"text": "x"})
    assert Ledger(tmp_path).once("answer", KEY, never).value == {"text": "x"}
    late = Ledger(tmp_path)

    def ask() -> dict[str, Any]:
        Ledger(tmp_path, fresh=True)._commit(*request_of(tmp_path, {"q": 2}, "first"))
        return {"text": "second"}

    assert late.once("answer", {"q": 2}, ask).value == {"text": "first"}


def request_of(folder: Path, key: dict[str, Any], text: str) -> tuple[Any, bytes]:
    from stairstep.evaluation.ledger import Request

    request = Request(folder, "answer", key)
    return request, request.text({"text": text})


def test_an_answer_that_cannot_be_kept_is_still_an_answer(tmp_path, monkeypatch, caplog):
    ledger = Ledger(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    for number in range(3):
        assert ledger.once("answer", {"q": number}, lambda: {"text": "x"}) == Entry({"text": "x"}, hit=False)
    assert caplog.text.count("cannot be kept") == 1
    monkeypatch.undo()
    assert entries(tmp_path) == []
    assert in_flight(tmp_path) == []


def test_a_folder_that_is_cleared_away_in_mid_run_is_made_again(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    ledger.once("answer", KEY, lambda: {"text": "x"})
    (tmp_path / "ledger").rename(tmp_path / "moved")
    assert not ledger.once("answer", KEY, lambda: {"text": "y"}).hit
    assert ledger.once("answer", KEY, never).value == {"text": "y"}


# --- deaths

_STEPS = ("open", "write", "link", "unlink", "replace", "mkdir", "utime", "close")


def _die_before(step: int) -> None:
    left = [step]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os._exit(77)
            return function(*arguments, **named)

        return call

    for name in _STEPS:
        setattr(os, name, counted(getattr(os, name)))


@pytest.mark.parametrize("before", ["absent", "damaged", "fresh"])
def test_a_death_at_any_step_leaves_nothing_that_is_in_the_way(tmp_path, start, before):
    def child(folder: Path, step: int) -> None:
        _die_before(step)
        Ledger(folder, fresh=before == "fresh", lease_s=600.0).once("answer", KEY, lambda: {"text": "of the child"})
        os._exit(0)

    deaths, texts = 0, set()
    for step in range(1, 100):
        folder = tmp_path / str(step)
        if before != "absent":
            Ledger(folder).once("answer", KEY, lambda: {"text": "old"})
        if before == "damaged":
            entries(folder)[0].write_bytes(b"{")
        process = start(child, folder, step)
        process.join(20)
        assert process.exitcode in (0, 77)
        began = time.monotonic()
        ledger = Ledger(folder, lease_s=600.0)
        texts.add(ledger.once("answer", KEY, lambda: {"text": "of the parent"}).value["text"])
        assert time.monotonic() - began < 5
        assert Ledger(folder).once("answer", KEY, never).value == ledger.find("answer", KEY)
        assert in_flight(folder) == []
        if process.exitcode == 0:
            break
        deaths += 1
    assert process.exitcode == 0, "the child never came to its end"
    assert deaths >= 10
    assert texts == {"of the child", "old" if before == "fresh" else "of the parent"}


def _value(number: int, by: str) -> dict[str, Any]:
    """What follows from the number, so that a wrong one is known on sight, and who was asked."""
    return {"number": number, "by": by, "text": hashlib.sha256(str(number).encode()).hexdigest() * (1 + number % 60)}


def _work(folder: Path, logs: Path, worker: int, numbers: int, ask_s: float) -> None:
    """Want half of the keys in an own order; note whom one asks before, and what one got after."""
    chance = random.Random(f"{worker} {os.getpid()}")
    by = f"{worker}-{os.getpid()}"
    ledger = Ledger(folder, lease_s=60.0)
    wanted = [number for number in range(numbers) if (number + worker) % 2]
    chance.shuffle(wanted)
    # The first tenth is everybody's at the same moment.
    wanted = [*range(numbers // 10), *wanted]
    asking = os.open(logs / f"{by}.asked", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    getting = os.open(logs / f"{by}.got", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in wanted:

        def ask(number: int = number) -> dict[str, Any]:
            os.write(asking, f"{number}\n".encode())
            time.sleep(chance.random() * 2 * ask_s)
            return _value(number, by)

        value = ledger.once("answer", {"number": number, "prompt": "x" * (number % 50)}, ask).value
        os.write(getting, f"{number} {value['by']} {value == _value(number, value['by'])}\n".encode())
    os._exit(0)


def _kill_and_compare(folder: Path, workers: int, numbers: int, kills: int, pause_s: float, ask_s: float) -> SimpleNamespace:
    """Kill workers, each after its first asking and before its end; who ends earlier wants more, until all kills are done."""
    logs = folder / "logs"
    logs.mkdir()
    ledger_folder = folder / "ledger"
    chance = random.Random(5)

    def begin(worker: int) -> BaseProcess:
        process = FORK.Process(target=_work, args=(ledger_folder, logs, worker, numbers, ask_s))
        process.start()
        return process

    def has_asked(worker: int) -> bool:
        log = logs / f"{worker}-{running[worker].pid}.asked"
        return log.exists() and log.stat().st_size > 0

    running = {worker: begin(worker) for worker in range(workers)}
    killed: set[str] = set()
    end = time.monotonic() + 550
    try:
        while len(killed) < kills:
            assert time.monotonic() < end, f"{len(killed)} of {kills} workers could be killed"
            time.sleep(pause_s * chance.uniform(0.2, 1.8))
            for worker, process in running.items():
                if process.exitcode is not None:
                    assert process.exitcode == 0
                    numbers += 20
                    running[worker] = begin(worker)
            if at_work := [worker for worker in running if has_asked(worker)]:
                worker = chance.choice(at_work)
                victim = running[worker]
                victim.kill()  # by its object: one that ended meanwhile has no process any more
                victim.join()
                if victim.exitcode != 0:
                    killed.add(f"{worker}-{victim.pid}")
                    running[worker] = begin(worker)
        for started_earlier in (True, False):  # those that began with fewer numbers end first; then everything is wanted once more
            for worker, process in running.items():
                process.join(max(0.0, end - time.monotonic()))
                assert process.exitcode == 0, f"{worker} hangs"
                if started_earlier:
                    running[worker] = begin(worker)
    finally:
        for process in running.values():
            process.kill()
            process.join()

    final = {}
    reader = Ledger(ledger_folder)
    for number in range(numbers):
        value = reader.find("answer", {"number": number, "prompt": "x" * (number % 50)})
        assert value is not None, f"{number} was lost"
        assert value == _value(number, value["by"]), f"{number} is wrong"
        final[number] = value["by"]
    got = 0
    for path in logs.glob("*.got"):
        for line in path.read_text().splitlines():
            number, by, right = line.split()
            assert right == "True"
            assert by == final[int(number)], f"{number}: {path.stem} was told {by}, and {final[int(number)]} is kept"
            got += 1
    asked: dict[int, list[str]] = defaultdict(list)
    for path in logs.glob("*.asked"):
        for line in path.read_text().splitlines():
            asked[int(line)].append(path.stem)
    for number, askers in asked.items():
        assert final[number] in askers
        assert {one for one in askers if one != final[number]} <= killed, f"{number} was asked by {askers} though nobody of them had died"
        assert askers.count(final[number]) == 1
    assert set(asked) == set(final)
    assert len(entries(ledger_folder)) == numbers
    return SimpleNamespace(kills=len(killed), got=got, again=sum(len(one) - 1 for one in asked.values()))


def test_killed_writers_lose_tear_and_double_nothing(tmp_path, caplog):
    told = _kill_and_compare(tmp_path, workers=6, numbers=400, kills=8, pause_s=0.08, ask_s=0.008)
    assert told.kills == 8
    assert told.got > 1000
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.soak
def test_sixteen_writers_of_ten_thousand_entries_some_killed(tmp_path, caplog):
    told = _kill_and_compare(tmp_path, workers=16, numbers=10_000, kills=30, pause_s=0.5, ask_s=0.002)
    print(f"{told.kills} kills, {told.got} calls answered, {told.again} asked again after a death")
    assert told.kills == 30
    assert told.got > 90_000
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

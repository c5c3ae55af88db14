"""The answer ledger against what one would use otherwise, a single SQLite file in WAL mode: entries a second by number of processes.

python bench/ledger.py                                    1, 4 and 16 processes in a temporary folder
python bench/ledger.py --folder /mnt/shared --processes 16 --entries 8000

`write`: each process keeps entries of its own. `hit`: all read what is there. `contended`: all want the same keys in the same order, and
an answer takes `--ask-ms`; what counts there is how often each key was asked, since an answer costs far more than either store. SQLite
gets the same keys and values; it has nothing that keeps two processes from asking the same, and its WAL does not work on a network file
system. Neither store waits for the disk at each entry. Writes bench/results/ledger.json; exit code 1 if a value is wrong or the ledger
asked anything twice.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from stairstep.evaluation.ledger import Ledger
from stairstep.records import describe_environment, write_json

RESULTS = Path(__file__).parent / "results" / "ledger.json"
_CONTEXT = multiprocessing.get_context("fork")
_PROMPT = "Answer the question from the pages shown, in a few words; say that it is not there where it is not. "


class Store(Protocol):
    """What the two have in common."""

    def get(self, key: dict[str, Any], ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The kept value, or that of `ask`."""


class OurLedger:
    """The ledger."""

    def __init__(self, folder: Path) -> None:
        self._ledger = Ledger(folder / "ledger")

    def get(self, key: dict[str, Any], ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The kept value, or that of `ask`."""
        return self._ledger.once("answer", key, ask).value


class OneSqliteFile:
    """A table of digests and values in one file, as it is usually written."""

    def __init__(self, folder: Path) -> None:
        self._connection = sqlite3.connect(folder / "answers.sqlite", timeout=60.0, isolation_level=None)
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=NORMAL")
        self._connection.execute("CREATE TABLE IF NOT EXISTS answers (digest TEXT PRIMARY KEY, key TEXT, value TEXT)")

    def get(self, key: dict[str, Any], ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The kept value, or that of `ask`; where somebody else was first, theirs."""
        text = json.dumps(key, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        found = self._find(digest)
        if found is None:
            value = json.dumps(ask())
            self._connection.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", (digest, text, value))
            found = self._find(digest)
        assert found is not None
        return found

    def _find(self, digest: str) -> dict[str, Any] | None:
        row = self._connection.execute("SELECT value FROM answers WHERE digest = ?", (digest,)).fetchone()
        return None if row is None else json.loads(row[0])


STORES: dict[str, Callable[[Path], Store]] = {"ledger": OurLedger, "sqlite": OneSqliteFile}


@dataclass(frozen=True)
class Measured:
    """One store under one load."""

    store: str
    load: str
    processes: int
    entries: int  # calls of `get`, over all processes
    seconds: float
    cpu_s: float  # of all processes together: what a busy machine does not change much
    asked: int
    wrong: int

    @property
    def rate(self) -> float:
        """Entries a second, all processes together."""
        return self.entries / self.seconds

    @property
    def cpu_us(self) -> float:
        """Microseconds of CPU an entry."""
        return 1e6 * self.cpu_s / self.entries


def key_of(number: int) -> dict[str, Any]:
    """A key of the size that a reader's has."""
    tiles = [hashlib.sha256(f"{number}.{place}".encode()).hexdigest() for place in range(3)]
    return {"model": "reader-4b", "prompt": _PROMPT + f"Question {number}?", "tiles": tiles, "max_tokens": 256, "temperature": 0.0}


def value_of(number: int) -> dict[str, Any]:
    """A value of the size that an answer has, which follows from the number."""
    return {"text": f"{number} " * 60, "finish_reason": "stop", "prompt_tokens": 3000 + number, "completion_tokens": 20}


def _work(store: str, folder: Path, numbers: range, ask_s: float, together: Any, told: Any) -> None:
    one = STORES[store](folder)
    asked = wrong = 0
    together.wait()
    started, cpu = time.monotonic(), time.process_time()
    for number in numbers:

        def ask(number: int = number) -> dict[str, Any]:
            nonlocal asked
            asked += 1
            if ask_s:
                time.sleep(ask_s)
            return value_of(number)

        wrong += one.get(key_of(number), ask) != value_of(number)
    told.put((started, time.monotonic(), time.process_time() - cpu, asked, wrong))


def measure(store: str, load: str, folder: Path, shares: list[range], ask_s: float = 0.0) -> Measured:
    """All processes at once, from the moment that all are ready to the end of the last."""
    STORES[store](folder)  # makes the folder or the file
    together, told = _CONTEXT.Barrier(len(shares)), _CONTEXT.SimpleQueue()
    workers = [_CONTEXT.Process(target=_work, args=(store, folder, one, ask_s, together, told)) for one in shares]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise SystemExit(f"{store}, {load}: a process failed")
    started, ended, cpu, asked, wrong = zip(*(told.get() for _ in workers), strict=True)
    return Measured(store, load, len(shares), sum(map(len, shares)), max(ended) - min(started), sum(cpu), sum(asked), sum(wrong))


def loads(store: str, folder: Path, processes: int, entries: int, ask_s: float) -> list[Measured]:
    """The three loads on one store in a new folder."""
    every = range(entries)
    contended = range(entries, entries + max(1, entries // 10))
    return [
        measure(store, "write", folder, [every[start::processes] for start in range(processes)]),
        measure(store, "hit", folder, [every[start::processes] for start in range(processes)]),
        measure(store, "contended", folder, [contended] * processes, ask_s),
    ]


def table(found: list[Measured]) -> list[str]:
    """Lines for a person, with the ratio of rates; `asked` is how often a key was asked on average."""
    lines = [f"{'':<10} {'':>9} {'entries a second':^25} {'CPU µs an entry':^17} {'asked':^15}"]
    lines.append(
        f"{'load':<10} {'processes':>9} {'ledger':>8} {'sqlite':>8} {'ratio':>7} {'ledger':>8} {'sqlite':>8} {'ledger':>7} {'sqlite':>7}"
    )
    peers = {(one.load, one.processes): one for one in found if one.store == "sqlite"}
    for one in found:
        if one.store == "ledger":
            peer = peers[one.load, one.processes]
            keys = one.entries / (one.processes if one.load == "contended" else 1)
            rates = f"{one.rate:>8.0f} {peer.rate:>8.0f} {one.rate / peer.rate:>7.2f} {one.cpu_us:>8.0f} {peer.cpu_us:>8.0f}"
            lines.append(f"{one.load:<10} {one.processes:>9} {rates} {one.asked / keys:>6.2f}× {peer.asked / keys:>6.2f}×")
    return lines


def failures(found: list[Measured]) -> list[str]:
    """What must not be."""
    lines = [f"{one.store}, {one.load}, {one.processes} processes: {one.wrong} wrong values" for one in found if one.wrong]
    for one in found:
        keys = {"write": one.entries, "hit": 0, "contended": one.entries // one.processes}[one.load]
        if one.store == "ledger" and one.asked != keys:
            lines.append(f"ledger, {one.load}, {one.processes} processes: asked {one.asked} times for {keys} keys")
    return lines


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a folder on the file system in question (default: the temporary folder's)")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--entries", type=int, default=1000, help="entries of the loads write and hit; contended has a tenth as many keys")
    parser.add_argument("--ask-ms", type=float, default=2.0, help="how long an answer takes under the load contended")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"{options.entries} entries, {os.cpu_count()} cores, load {load:.1f}")
    found: list[Measured] = []
    for processes in options.processes:
        for store in STORES:
            with tempfile.TemporaryDirectory(dir=options.folder, prefix="ledger-bench-") as folder:
                found += loads(store, Path(folder), processes, options.entries, options.ask_ms / 1000)
    print("\n".join(table(found)))
    wrong = failures(found)
    print("\n".join(wrong) if wrong else "every value right; the ledger asked each key once")
    arguments = {
        "processes": options.processes,
        "entries": options.entries,
        "ask_ms": options.ask_ms,
        "shared_folder": options.folder is not None,
    }
    rows = [{**asdict(one), "rate": round(one.rate, 1), "cpu_us": round(one.cpu_us, 1)} for one in found]
    report = {"arguments": arguments, "load_at_start": round(load, 2), "rows": rows, "failures": wrong}
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, {**report, "environment": describe_environment()})
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""Trackers: committed steps only, each once over any number of resumes, no key in the run folder, no failure that reaches the run."""

import importlib.util
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stairstep.records import NoTracker, RunFolder, TrackerSettings, check_trackers, open_trackers
from stairstep.records.files import read_json_lines
from stairstep.records.trackers import Ledger, Trackers, _Channel
from stairstep.settings import InputError

RECIPE = {"run": {"name": "x", "seed": 3}, "optim": {"lr": 7e-6, "groups": [1, None]}, "data": {"train": [{"path": "a"}]}}
NEEDS_WANDB = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
CANARY = "canary4815162342canary4815162342canary42"


class FakeSink:
    """A sink that remembers, on behalf of all its sessions, what it was sent."""

    name = "fake"
    failures = (OSError,)

    def __init__(self, permanent=True, memory=None):
        self.permanent = permanent
        self.memory = [] if memory is None else memory
        self.fail = False
        self.closed = None

    def send(self, step, moment, values):
        if self.fail:
            raise OSError("the server is gone")
        self.memory.append((step, moment, values))

    def flush(self):
        pass

    def close(self, failed):
        if self.fail:
            raise OSError("the server is gone")
        self.closed = failed

    def steps(self):
        return [event[0] for event in self.memory]


def _session(folder, sink):
    trackers = Trackers([_Channel(sink, Ledger(folder.path / "trackers.jsonl"))])
    trackers.replay(folder.metrics.rows())
    return trackers


def _log(folder, trackers, step, **values):
    values = {f"train/{name}": value for name, value in (values or {"loss": step / 7}).items()}
    folder.metrics.append(step, values)
    trackers.log(step, values)


def test_only_committed_steps_are_sent(tmp_path):
    folder, sink = RunFolder(tmp_path), FakeSink()
    trackers = _session(folder, sink)
    for step in (1, 2, 3):
        _log(folder, trackers, step)
    assert sink.memory == []
    trackers.commit(2)
    assert sink.steps() == [1, 2] and sink.memory[1][2] == {"train/loss": 2 / 7}
    trackers.commit(2)
    assert sink.steps() == [1, 2]
    trackers.close()
    assert sink.steps() == [1, 2] and sink.closed is False


@pytest.mark.parametrize("permanent", [True, False])
def test_a_resumed_run_sends_every_step_once(tmp_path, permanent):
    """Checkpoints at 2 and 4; killed at 3 with a late event of step 2 already in the log, and again right after the second commit."""
    folder = RunFolder(tmp_path)
    first = FakeSink(permanent)
    trackers = _session(folder, first)
    for step in (1, 2):
        _log(folder, trackers, step)
    trackers.commit(2)
    _log(folder, trackers, 3)
    _log(folder, trackers, 2, late=0.5)
    sent_first = list(first.memory)

    folder.metrics.truncate_after(2)
    second = FakeSink(permanent)
    trackers = _session(folder, second)
    for step in (3, 4):
        _log(folder, trackers, step)
    trackers.commit(4)
    folder.metrics.truncate_after(4)
    third = FakeSink(permanent)
    trackers = _session(folder, third)
    _log(folder, trackers, 5)
    trackers.commit(5)

    seen = sent_first + second.memory + third.memory if permanent else third.memory
    found = sorted((step, next(iter(values))) for step, _, values in seen)
    assert found == [(1, "train/loss"), (2, "train/late"), (2, "train/loss"), (3, "train/loss"), (4, "train/loss"), (5, "train/loss")]
    times = {(row["step"], len(row)): row["time"] for row in folder.metrics.rows()}
    assert all(abs(moment - times[step, 3]) < 60 for step, moment, _ in seen)


def test_a_run_that_falls_back_behind_what_was_sent_does_not_send_it_again(tmp_path):
    folder, sink = RunFolder(tmp_path), FakeSink()
    trackers = _session(folder, sink)
    for step in (1, 2, 3, 4):
        _log(folder, trackers, step)
    trackers.commit(4)
    folder.metrics.truncate_after(2)
    trackers = _session(folder, FakeSink(memory=sink.memory))
    for step in (3, 4, 5):
        _log(folder, trackers, step)
    trackers.commit(5)
    assert sink.steps() == [1, 2, 3, 4, 5]


def test_what_is_permanent_is_noted_before_it_is_sent(tmp_path):
    folder = RunFolder(tmp_path)
    noted = []

    class Looking(FakeSink):
        def send(self, step, moment, values):
            noted.append(step in {row[0] for row in read_json_lines(tmp_path / "trackers.jsonl")[-1]["sent"]})

    trackers = _session(folder, Looking())
    _log(folder, trackers, 1)
    trackers.commit(1)
    assert noted == [True]


def test_a_failure_is_one_warning_and_the_others_go_on(tmp_path, caplog):
    folder = RunFolder(tmp_path)
    bad, good = FakeSink(permanent=False), FakeSink(permanent=False)
    ledger = Ledger(tmp_path / "trackers.jsonl")
    trackers = Trackers([_Channel(bad, ledger), _Channel(good, ledger)])
    bad.fail = True
    for step in (1, 2, 3):
        _log(folder, trackers, step)
        trackers.commit(step)
    trackers.close(failed=True)
    assert good.steps() == [1, 2, 3] and good.closed is True and bad.memory == []
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "OSError: the server is gone" in caplog.text

    class Defective(FakeSink):
        def send(self, step, moment, values):
            raise KeyError("ours")

    trackers = Trackers([_Channel(Defective(permanent=False), ledger)])
    trackers.log(1, {"x": 1})
    with pytest.raises(KeyError):
        trackers.commit(1)


def test_a_failure_at_the_end_does_not_fail_the_run(tmp_path, caplog):
    sink = FakeSink()
    trackers = _session(RunFolder(tmp_path), sink)
    sink.fail = True
    trackers.close()
    assert "the server is gone" in caplog.text


def test_ids_are_kept(tmp_path):
    first = Ledger(tmp_path / "t.jsonl")
    made = first.id_of("a")
    assert first.id_of("a") == made != first.id_of("b")
    assert Ledger(tmp_path / "t.jsonl").id_of("a") == made


def test_no_trackers_leave_no_trace(tmp_path):
    tracker = open_trackers(TrackerSettings(), RunFolder(tmp_path), RECIPE)
    assert isinstance(tracker, NoTracker)
    tracker.log(1, {"x": 1})
    tracker.commit(1)
    tracker.close()
    assert os.listdir(tmp_path) == []


@NEEDS_WANDB
def test_online_without_a_key_is_refused_before_anything(tmp_path, monkeypatch):
    online = TrackerSettings(wandb="online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_API_KEY_FILE", raising=False)
    with pytest.raises(InputError, match="WANDB_API_KEY"):
        check_trackers(online)
    with pytest.raises(InputError, match="WANDB_API_KEY"):
        open_trackers(online, RunFolder(tmp_path), RECIPE)
    assert os.listdir(tmp_path) == []
    monkeypatch.setenv("WANDB_API_KEY_FILE", str(tmp_path / "key"))
    with pytest.raises(InputError, match="WANDB_API_KEY_FILE"):
        check_trackers(online)
    (tmp_path / "key").write_text(CANARY + "\n")
    check_trackers(online)
    check_trackers(TrackerSettings(wandb="offline"))


@pytest.mark.parametrize(("package", "settings"), [("wandb", {"wandb": "offline"}), ("tensorboard", {"tensorboard": True})])
def test_a_tracker_that_is_not_installed_is_refused(package, settings):
    code = f"import sys; sys.modules[{package!r}] = None\nfrom stairstep.records import *\n"
    code += f"try:\n  check_trackers(TrackerSettings(**{settings}))\nexcept Exception as e:\n  print(type(e).__name__, e)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert f"InputError trackers.{package}" in done.stdout and "not installed" in done.stdout, done.stderr


# --- TensorBoard


def _scalars(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(one.step, one.value, one.wall_time) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_every_step_once_after_resumes(tmp_path):
    pytest.importorskip("tensorboard")
    folder = RunFolder(tmp_path)
    settings = TrackerSettings(tensorboard=True)
    trackers = open_trackers(settings, folder, RECIPE)
    for step in (1, 2, 3):
        _log(folder, trackers, step)
    trackers.commit(3)
    folder.metrics.truncate_after(-1)
    for resumed_from in (0, 2):
        folder.metrics.truncate_after(resumed_from)
        trackers = open_trackers(settings, folder, RECIPE)
        for step in range(resumed_from + 1, resumed_from + 4):
            _log(folder, trackers, step)
            trackers.log(step, {"eval/x": math.nan, "eval/name": "text", "eval/none": None})
        trackers.commit(resumed_from + 3)
    trackers.close()
    found = _scalars(tmp_path)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 3
    assert [step for step, _, _ in found["train/loss"]] == [1, 2, 3, 4, 5]
    for (step, value, moment), row in zip(found["train/loss"], folder.metrics.rows(), strict=True):
        assert value == pytest.approx(step / 7, rel=1e-6)
        assert abs(moment - row["time"]) < 1.0
    assert set(found) == {"train/loss", "eval/x"}


# --- Weights & Biases, offline


def _history(wandb_file: Path):
    """The history rows and the config of a .wandb file: records in LevelDB's log format, blocks of 32 KiB after a 7-byte header."""
    from wandb.proto import wandb_internal_pb2

    data = wandb_file.read_bytes()
    rows, config, whole, at = [], {}, b"", 7
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if kind == 0:
            break
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            record = wandb_internal_pb2.Record.FromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
            if record.WhichOneof("record_type") == "run":
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    return rows, config


_OFFLINE = """
import json, math, sys
from stairstep.records import RunFolder, TrackerSettings, open_trackers
folder = RunFolder(sys.argv[1])
trackers = open_trackers(TrackerSettings(wandb="offline", project="p"), folder, json.loads(sys.argv[2]))
for step in range(int(sys.argv[3]), int(sys.argv[4])):
    values = {"train/loss": math.nan if step == 2 else step / 7, "train/none": None}
    folder.metrics.append(step, values)
    trackers.log(step, values)
trackers.commit(int(sys.argv[5]))
trackers.close()
"""


@NEEDS_WANDB
def test_wandb_offline_holds_the_run_and_no_key(tmp_path, script, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run = tmp_path / "run"
    folder = RunFolder.create(run)
    (tmp_path / "home").mkdir()
    assert script(_OFFLINE, run, json.dumps(RECIPE), 1, 5, 3).wait() == 0
    folder.metrics.truncate_after(3)
    assert script(_OFFLINE, run, json.dumps(RECIPE), 4, 7, 6).wait() == 0

    (session,) = (run / "wandb").glob("offline-run-*")
    (before,) = (run / "wandb" / "superseded").glob("offline-run-*")
    (file,) = session.glob("*.wandb")
    assert [one.name for one in before.glob("*.wandb")] == [file.name], "one id over all sessions"
    assert file.name == f"run-{Ledger(run / 'trackers.jsonl').id_of('wandb offline')}.wandb"

    rows, config = _history(file)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["train/loss"] for row in rows if row["step"] != 2] == [step / 7 for step in (1, 3, 4, 5, 6)]
    assert str(rows[1]["train/loss"]).lower() == "nan"
    assert {name: config[name] for name in RECIPE} == RECIPE
    assert [row["step"] for row in _history(next(before.glob("*.wandb")))[0]] == [1, 2, 3]

    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 4
    assert not [path for path in written if CANARY.encode() in path.read_bytes()]


@NEEDS_WANDB
def test_wandb_that_cannot_be_reached_or_refuses_the_key_is_told(tmp_path, script, monkeypatch):
    import http.server
    import threading

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(401)
            self.end_headers()
            self.wfile.write(b'{"errors": [{"message": "permission denied"}]}')

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = """
    import sys
    from stairstep.records import RunFolder, TrackerSettings, open_trackers
    from stairstep.settings import StairstepError
    try:
        open_trackers(TrackerSettings(wandb="online"), RunFolder.create(sys.argv[1]), {}, init_timeout_s=1.0)
    except StairstepError as error:
        print(type(error).__name__, str(error).replace(chr(10), " "))
    """
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    refused = script(code, tmp_path / "a")
    assert "InputError trackers.wandb: W&B refuses the key" in refused.line()
    refused.wait()
    server.shutdown()
    server.server_close()
    unreachable = script(code, tmp_path / "b")
    assert "UnreachableError trackers.wandb: W&B cannot be reached" in unreachable.line()
    unreachable.wait()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]

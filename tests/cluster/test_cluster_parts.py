"""The parts of the Ray adapter that need no Ray: what a worker writes on the driver's terminal, failures carried, claims waited for."""

from __future__ import annotations

import io
import os
import pickle
import signal
import stat
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import ray.exceptions
from memory_keys import MemoryKeys
from ray.train import ControllerError, WorkerGroupError
from tqdm import tqdm

from serve.running import serving_beside
from stairstep.cluster import session
from stairstep.cluster.losses import loss_of, timed_out
from stairstep.cluster.screen import Relay, on_screen, without_ray
from stairstep.cluster.session import Session, check_root, on_a_cluster, reader_host
from stairstep.cluster.words import Words
from stairstep.cluster.work import WorkerDefect, WorkerFailed, failure_of, failure_record, wait_for_claim, wait_for_folder
from stairstep.evaluation.readers import READER_KEY
from stairstep.records import Progress, RunFolder, StopFlag
from stairstep.settings import DataError, InputError, RecipeError, TileError, TrainingError, UnreachableError
from stairstep.tasks import ClusterSettings
from stairstep.training import NonFiniteError

DETAIL = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: RayTrainWorker\n\tpid: 1\nThe actor is dead because its worker "
    "process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a connection error code 2. End of "
    "file. Some common causes include: (1) the process was killed by the OOM killer"
)


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


# --- the screen


def test_what_a_worker_writes_appears_in_order_and_once() -> None:
    shown = io.StringIO()
    words = Words("run-1", MemoryKeys())
    relay = Relay(words, shown)
    relay.poll()
    assert not relay.begun
    with on_screen(words, None):
        relay.poll()
        assert relay.begun
        print("eins", file=sys.stderr)
        relay.poll()
        relay.poll()
        assert shown.getvalue() == "eins\n"
        assert not sys.stderr.isatty()
        sys.stderr.write("zwölf")
        sys.stderr.flush()
        relay.poll()
        print(" dreizehn", file=sys.stderr)
        sys.stderr.write("halb")
    relay.close()
    relay.close()
    assert shown.getvalue() == "eins\nzwölf dreizehn\nhalb\n"
    assert not words._keys.below("run-1/"), "what was seen is kept no longer"
    assert not type(sys.stderr).__module__.startswith("stairstep")


def test_what_is_said_while_something_is_shown_is_shown_too() -> None:
    """By a signal, by what is collected as garbage, by Ray itself: in the same thread, in the midst of the way to the driver."""
    shown = io.StringIO()

    class Talking(MemoryKeys):
        said = False

        def put(self, key: str, value: bytes) -> None:
            if value and not self.said:
                self.said = True
                print("Exception ignored in __del__", file=sys.stderr)
            super().put(key, value)

    words = Words("run-1", Talking())
    relay = Relay(words, shown)
    with on_screen(words, None):
        print("one", file=sys.stderr)
        print("two", file=sys.stderr)
    relay.close()
    assert sorted(shown.getvalue().splitlines()) == ["Exception ignored in __del__", "one", "two"]


def test_a_progress_bar_reaches_a_terminal_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("LINES", "20")
    shown = Terminal()
    words = Words("run-1", MemoryKeys())
    relay = Relay(words, shown)
    with on_screen(words, (100, 40)):
        progress = Progress(3)
        for step in range(1, 4):
            progress.update(step, {"train/loss": 0.5})
        progress.note("ein Satz")
        progress.close()
    relay.close()
    assert "\r" in shown.getvalue()
    assert "3/3" in shown.getvalue()
    assert "loss=0.5" in shown.getvalue()
    assert "ein Satz\n" in shown.getvalue()
    widest = max(len(part) for line in shown.getvalue().split("\n") for part in line.split("\r"))
    assert 60 < widest <= 100
    assert not list(tqdm._instances)


def test_ray_keeps_off_standard_output() -> None:
    out = io.StringIO()
    with redirect_stdout(out), without_ray():
        print("before")
        print("\033[33m(raylet)\033[0m A worker died or was killed.")
        print("after")
        print("\033[33m(raylet, ip=10.0.0.1)\033[0m Again.")
        print()
        print("end")
    assert out.getvalue() == "before\nafter\n\nend\n"


# --- failures


def carried(error: Exception) -> Exception:
    """What the driver makes of an error of a worker's."""
    keys = MemoryKeys()
    Words("run-1", keys).tell_failure(failure_record(error))
    assert Words("run-2", keys).failure() is None
    told = Words("run-1", keys).failure()
    assert told is not None
    return failure_of(told)


@pytest.mark.parametrize("error", [TileError("a"), DataError("b"), RecipeError("c"), TrainingError("d")])
def test_an_error_is_carried_as_it_is(error: Exception) -> None:
    told = carried(error)
    assert type(told) is type(error)
    assert str(told) == str(error)
    assert told.exit_code == error.exit_code  # type: ignore[attr-defined]


def test_errors_of_other_rooms_keep_message_and_exit_code() -> None:
    error = NonFiniteError("loss", 3, ("a:1", "b:2"))
    told = carried(error)
    assert type(told) is TrainingError
    assert str(told) == str(error)

    class OtherError(InputError):
        """Defined in some room."""

    told = carried(OtherError("wrong"))
    assert isinstance(told, InputError)
    assert told.exit_code == 2


def test_a_defect_is_carried_with_its_traceback() -> None:
    try:
        {}["missing"]
    except KeyError as error:
        told = carried(error)
    assert isinstance(told, WorkerDefect)
    assert "KeyError: 'missing'" in str(told)
    assert '{}["missing"]' in str(told)


def test_what_ray_says_of_lost_workers() -> None:
    dead, failed = (
        RuntimeError(DETAIL),
        WorkerFailed("Traceback (most recent call last):\n  ...\nRuntimeError: Connection closed by peer\n"),
    )
    both = loss_of(WorkerGroupError("text", {0: failed, 1: dead}))
    assert both.what == "worker 1 was lost (Worker unexpectedly exits with a connection error code 2.)"
    assert not both.traceback
    final = both.final(3)
    assert isinstance(final, TrainingError)
    assert "no restart is left (cluster.max_failures)" in str(final)
    survivor = loss_of(WorkerGroupError("text", {0: failed}))  # who died is not seen yet
    assert survivor.what == "worker 0 lost another worker (RuntimeError: Connection closed by peer)"
    assert not survivor.cause, "two kills in a row say this twice, and are no defect"
    assert isinstance(survivor.final(2), TrainingError)
    defect = WorkerFailed("Traceback (most recent call last):\n  ...\nRuntimeError: shapes do not match\n")
    alone = loss_of(WorkerGroupError("text", {0: defect}))
    assert alone.what == alone.cause.join(("worker 0 failed (", ")")) == "worker 0 failed (RuntimeError: shapes do not match)"
    assert isinstance(alone.final(2), WorkerDefect)
    assert str(defect) in str(alone.final(2))
    assert not alone.preempted


def test_a_preempted_worker_costs_no_restart() -> None:
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    for preempted in (False, True):
        error = ray.exceptions.RayActorError(error_msg="the node was reclaimed", preempted=preempted)
        assert loss_of(WorkerGroupError("text", {0: error})).preempted == preempted
        assert loss_of(WorkerGroupError("text", {0: WorkerHealthCheckFailedError("unhealthy", error)})).preempted == preempted


def test_a_start_that_took_too_long_is_known_by_its_name() -> None:
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    error = ControllerError(WorkerGroupStartupTimeoutError(2))
    assert timed_out(error)
    assert timed_out(pickle.loads(pickle.dumps(error)))
    assert not timed_out(ControllerError(ValueError("else")))
    assert loss_of(ControllerError(ValueError("else"))).what == "the workers were lost (else)"


# --- claims and folders


HOLD = """
import sys, time
from pathlib import Path
from stairstep.records import Claim
claim = Claim(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(1.5)
"""


def test_a_claim_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="at work on this run"):
            wait_for_claim(RunFolder(tmp_path), 0.0)
        caplog.clear()
        wait_for_claim(RunFolder(tmp_path), 60.0).release()
    assert len(caplog.messages) == 1
    assert "Waiting up to 60 s for it to end" in caplog.messages[0]


def test_a_folder_that_the_driver_made_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run\.root: the run folder .*a file system that all nodes mount"):
        wait_for_folder(tmp_path, patience_s=0.0)
    (tmp_path / "recipe.yaml").write_text("")
    wait_for_folder(tmp_path, patience_s=0.0)


# --- the session


def test_a_relative_root_is_refused_on_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    check_root("runs", None)
    check_root("runs", "local")
    with pytest.raises(RecipeError, match=r"run\.root: 'runs' is relative"):
        check_root("runs", "auto")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert on_a_cluster(None)
    with pytest.raises(RecipeError, match=r"run\.root: 'runs' is relative"):
        check_root("runs", None)
    check_root("/runs", None)
    check_root("runs", "local")
    check_root(None, None, "tiles.store")
    with pytest.raises(RecipeError, match=r"tiles\.store: 'tiles' is relative"):
        check_root("tiles", None, "tiles.store")


HERE, THERE = {"Alive": True, "NodeManagerAddress": "10.0.0.1"}, {"Alive": True, "NodeManagerAddress": "10.0.0.2"}


def test_a_reader_on_a_node_group_listens_for_all_nodes_and_wants_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.ray, "nodes", lambda: [THERE | {"Resources": {"reader": 1.0}}, HERE | {"Resources": {session.HEAD: 1.0}}])
    monkeypatch.setattr(session.ray, "cluster_resources", lambda: {"CPU": 4.0})
    placed, private, cluster = ClusterSettings(reader_resources={"reader": 1.0}), Session(True, ours=True), Session(False, ours=True)
    assert reader_host(placed, cluster) == "10.0.0.1"
    assert reader_host(ClusterSettings(), cluster) == reader_host(ClusterSettings(), private) == "127.0.0.1"
    with pytest.raises(InputError, match=r"cluster.reader_resources.reader: .* this machine has 0"):  # else it would be waited for for ever
        reader_host(placed, private)
    monkeypatch.delenv(READER_KEY, raising=False)
    monkeypatch.delenv(f"{READER_KEY}_FILE", raising=False)
    with pytest.raises(InputError, match=r"cluster.reader_resources: the reader listens at 10.0.0.1 .* READER_API_KEY"):
        serving_beside("tiny-reader", placed.reader_resources, reader_host(placed, cluster))


def test_who_wanted_to_be_told_of_sigterm_is_told_after_ray_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray job stop` sends it, and Ray takes it for itself when it starts."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **_: signal.signal(signal.SIGTERM, lambda *_: None))
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.setattr(session, "_started_here", lambda: False)
    with StopFlag() as flag, session.ray_session("there"):
        assert not flag
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag and flag.reason == "SIGTERM"


def test_an_address_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UnreachableError, match=r"cluster\.address: no Ray cluster answers at nonsense"), session.ray_session("nonsense"):
        pass


def test_the_token_is_made_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    session._private_token()
    path = tmp_path / ".ray" / "auth_token"
    made = path.read_text()
    assert len(made) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    session._private_token()
    assert path.read_text() == made
    path.unlink()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    session._private_token()
    assert not path.exists()


def test_a_ray_that_does_not_start_is_one_message_and_no_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise Exception("The current node timed out during startup.\nSee the logs")

    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(session.ray, "init", init)
    monkeypatch.setattr(session, "_private_token", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    said = r"not be started on this machine: The current node timed out .* busy, try again$"
    with pytest.raises(UnreachableError, match=said), session.ray_session(None):
        pass

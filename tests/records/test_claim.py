"""One process at a time on a run folder, whoever dies and however."""

import json
import os
import signal
import threading
import time

import pytest

from stairstep.records import Claim
from stairstep.records.files import host_name, write_json
from stairstep.settings import InputError

_HOLDER = """
import sys, time
from pathlib import Path
from stairstep.records import Claim
claim = Claim(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_process_is_refused_by_name_until_the_first_is_dead(tmp_path, script):
    holder = script(_HOLDER, tmp_path)
    assert holder.line() == "held"
    with pytest.raises(InputError, match=f"process {holder.process.pid} on {host_name()} is at work on this run.*run.name"):
        Claim(tmp_path)
    holder.kill()
    with Claim(tmp_path) as claim:
        assert claim.held
        assert json.loads((tmp_path / ".lock").read_text()) == {"host": host_name(), "pid": os.getpid()}
    assert not claim.held
    assert (tmp_path / ".lock").read_text() == ""
    claim.release()
    Claim(tmp_path).release()


def test_a_second_claim_of_the_same_process_is_refused_and_does_not_loosen_the_first(tmp_path, script):
    (tmp_path / "link").symlink_to(tmp_path)
    with Claim(tmp_path):
        for path in (tmp_path, tmp_path / "link"):
            with pytest.raises(InputError, match="this very process"):
                Claim(path)
        other = script("import sys; from pathlib import Path; from stairstep.records import Claim; Claim(Path(sys.argv[1]))", tmp_path)
        assert other.wait() != 0
    other = script("import sys; from pathlib import Path; from stairstep.records import Claim; Claim(Path(sys.argv[1]))", tmp_path)
    assert other.wait() == 0


def test_a_forked_worker_that_outlives_the_run_does_not_hold_it(tmp_path, script):
    holder = script(
        """
        import os, sys, time
        from pathlib import Path
        from stairstep.records import Claim
        claim = Claim(Path(sys.argv[1]))
        worker = os.fork()
        if worker == 0:
            time.sleep(60)
        print(worker, flush=True)
        time.sleep(60)
        """,
        tmp_path,
    )
    worker = int(holder.line())
    os.kill(holder.process.pid, signal.SIGKILL)
    holder.process.wait()
    try:
        os.kill(worker, 0)
        Claim(tmp_path).release()
    finally:
        os.kill(worker, signal.SIGKILL)


def _elsewhere(path, heartbeat, state="running", holder="another"):
    (path / ".lock").write_text(json.dumps({"host": holder, "pid": 77}) if holder else "")
    write_json(
        path / "status.json",
        {"state": state, "step": 5, "of": 9, "heartbeat": heartbeat, "pid": 77, "host": "another", "message": ""},
    )


def test_a_run_of_another_host_that_still_moves_is_refused(tmp_path):
    _elsewhere(tmp_path, time.time())
    mover = threading.Timer(0.2, _elsewhere, (tmp_path, time.time() + 5))
    mover.start()
    with pytest.raises(InputError, match="process 77 on another is at work"):
        Claim(tmp_path, watch_s=5.0)
    mover.join()
    _elsewhere(tmp_path, 0.0)
    Claim(tmp_path).release()


def test_a_run_of_another_host_that_stands_still_is_taken_over(tmp_path, caplog):
    _elsewhere(tmp_path, time.time())
    began = time.monotonic()
    Claim(tmp_path, watch_s=0.3).release()
    assert time.monotonic() - began >= 0.3
    assert "77 on another, has gone silent" in caplog.text


@pytest.mark.parametrize(
    ("age", "state", "holder"),
    [
        (0.0, "stopped", "another"),
        (0.0, "finished", "another"),
        (3600.0, "running", "another"),
        (0.0, "preparing", None),
        (0.0, "running", host_name()),
    ],
    ids=["stopped", "finished", "long silent", "released", "of this host, where the lock is enough"],
)
def test_nothing_is_waited_for_where_nobody_can_be_at_work(tmp_path, age, state, holder):
    _elsewhere(tmp_path, time.time() - age, state, holder)
    began = time.monotonic()
    Claim(tmp_path, watch_s=20.0).release()
    assert time.monotonic() - began < 2.0

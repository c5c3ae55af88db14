"""A sweep in an object store: what is put in which order, what a kill leaves, whose it is, and that it goes on and is read elsewhere."""

from __future__ import annotations

import json
import logging
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from s3_server import S3Server, status

from jobs import status as job
from stairstep.records import mirror as mirrors
from stairstep.records.copies import copy_to_read
from stairstep.records.mirror import TakenOverError
from stairstep.records.places import ObjectFolder, place
from stairstep.settings import InputError, StairstepError, UnreachableError
from stairstep.sweeps import ALL, SweepFolder, SweepPlan, TrialRecord
from stairstep.sweeps import mirrored as module
from stairstep.sweeps.beginning import Asked, begin, find, planned, sweep_at
from stairstep.sweeps.mirrored import MirroredSweep
from stairstep.sweeps.plan import Planned, in_sweep, write_trial
from stairstep.sweeps.scores import scores
from stairstep.sweeps.standing_text import status_lines
from stairstep.tasks import load_recipe

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "tinywiki.yaml"
PLAN = SweepPlan(
    name="s",
    recipe_file="recipes/tinywiki.yaml",
    space_file="tune_spaces/small.yaml",
    overrides=(),
    recipe={"optim": {"steps": 4}},
    space={},
    seeds=(0,),
    metrics=("hit@1",),
    modes=("max",),
)
ROOT = "stairs/runs"
SWEEP = f"{ROOT}/s"
REFUSED = status(403, "AccessDenied")  # what Arrow does not ask again for


@pytest.fixture
def machine(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], MirroredSweep]:
    """The sweep as a machine has it that has seen nothing of the store so far."""
    made: list[Path] = []

    def make() -> MirroredSweep:
        made.append(tmp_path / f"machine-{len(made)}")
        monkeypatch.setenv("STAIRSTEP_CACHE", str(made[-1]))
        sweep = sweep_at(place(s3.url(SWEEP)))
        assert isinstance(sweep, MirroredSweep)
        return sweep

    return make


def write(sweep: SweepFolder, seeds: int = 2) -> SweepFolder:
    """A sweep as it begins, with a trial a seed."""
    with sweep.beginning():
        (sweep.path / "recipe.yaml").write_text("optim: {steps: 4}\n")
        for number in range(seeds):
            name = f"a-seed{number}"
            sweep.recipe_path(name).write_text(f"run: {{seed: {number}}}\n")
            sweep.write_trial(TrialRecord(number + 1, name, {"step": "a"}, ("optim.batch=4",), number))
        sweep.write_plan(PLAN)
    return sweep


def put_run(s3: S3Server, name: str = "a-seed0", step: int = 4) -> None:
    """The run of a trial, as its worker put it."""
    one = {"value": 0.5, "low": 0, "high": 1, "n": 9}
    summary = {"step": step, "name": "q", "metrics": {"hit@1": one}, "selection": {"hit@1": one}}
    state = {"state": "finished", "step": step, "of": step, "heartbeat": 0.0, "pid": 1, "host": "elsewhere"}
    for file, text in {
        "recipe.yaml": "optim: {steps: 4}\ncluster: {workers: 1}\n",
        ".lock": "{}",
        f"eval_step{step}.jsonl": "{}\n",
        f"eval_step{step}.summary.json": json.dumps(summary),
        "metrics.jsonl": '{"step": 4, "time": 1.0, "train/loss": 1.0}\n',
        f"checkpoint-{step}/weights": "large",
        f"checkpoint-{step}/COMPLETE": "{}",
        "tensorboard/events": "for people",
        "status.json": json.dumps(state),
    }.items():
        s3.put(f"{SWEEP}/runs/{name}/{file}", text.encode())


def deeds(s3: S3Server, *methods: str) -> list[str]:
    """The objects of such requests, those left out that stand for a folder."""
    return [name for one in s3.received if one.method in methods and (name := one.object.removeprefix(f"{SWEEP}/"))]


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything new is put all the time."""
    monkeypatch.setattr(mirrors, "PUSH_S", 0.0)
    monkeypatch.setattr(module, "HEARTBEAT_S", 0.01)


def wait(condition: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


# --- how it begins


def test_a_trial_is_put_after_its_recipe_and_the_plan_after_all_of_them(s3, machine):
    sweep = write(machine())
    put = [name for name in deeds(s3, "PUT") if not name.startswith(("driver", ".lock"))]
    assert put == [
        "recipe.yaml",
        "recipes/a-seed0.yaml",
        "recipes/a-seed1.yaml",
        "trials/a-seed0.json",
        "trials/a-seed1.json",
        "sweep.json",
    ]
    there = {name.removeprefix(f"{SWEEP}/"): s3.objects[name] for name in s3.names(SWEEP)}
    here = {path.relative_to(sweep.path).as_posix(): path.read_bytes() for path in sweep.path.rglob("*") if path.is_file()}
    here.pop(".lock")
    assert there == here


def test_a_beginning_that_was_killed_between_any_two_requests_is_no_sweep_or_a_whole_one(s3, machine):
    write(machine(), 3)  # of an earlier command that never began a trial: its name may be taken
    before = dict(s3.objects)
    s3.received.clear()
    write(machine())
    whole = {name: s3.objects[name] for name in s3.names(SWEEP) if "driver" not in name}
    changes = len(deeds(s3, "PUT", "DELETE"))
    assert changes > 12
    for kept in range(0, changes, 3):
        s3.objects.clear()
        s3.objects |= before
        with pytest.raises(StairstepError):
            s3.die_after(kept)
            write(machine())
        s3.behave()
        found = set(s3.names(SWEEP))
        if f"{SWEEP}/sweep.json" in found:
            assert (found & set(whole) == set(whole)) or len([name for name in found if "trials/" in name]) == 3, kept
        s3.objects.pop(f"{SWEEP}/.lock", None)  # of a process that is gone
        write(machine())
        assert {name: s3.objects[name] for name in s3.names(SWEEP) if "driver" not in name} == whole, kept


def test_what_is_no_sweep_or_has_begun_is_left_alone(s3, machine):
    s3.put(f"{SWEEP}/recipe.yaml", b"of a run")
    s3.put(f"{SWEEP}/status.json", b"{}")
    s3.received.clear()
    with pytest.raises(InputError, match=r"^s3://stairs/runs/s\?.*: something that is no sweep is here; choose another --name"):
        write(machine())
    assert deeds(s3, "PUT", "DELETE") == []
    del s3.objects[f"{SWEEP}/status.json"]
    write(machine())
    put_run(s3)
    before = {name: data for name, data in s3.objects.items() if "driver" not in name}
    with pytest.raises(InputError, match=r"a sweep is here already; go on with it by --resume s3://stairs/runs/s\?"):
        write(machine())
    assert {name: data for name, data in s3.objects.items() if "driver" not in name} == before


def test_begun_by_the_job_and_found_by_url_and_by_name(s3, machine, tmp_path, monkeypatch):
    monkeypatch.setattr("stairstep.sweeps.plan.resolve", lambda recipe: recipe)
    machine()
    space = tmp_path / "space.yaml"
    space.write_text(yaml.safe_dump({"parameters": {"optim.batch": {"kind": "grid", "values": [4, 8]}}}))
    asked = Asked(RECIPE, space, [f"run.root={s3.url(ROOT)}"], name="s")
    begin(asked, *planned(asked), command="as it was typed")
    machine()
    for named, root in ((s3.url(SWEEP), "runs"), ("s", s3.url(ROOT))):
        sweep = find(named, root)
        with sweep.claim():
            assert sweep.plan.command == "as it was typed"
            assert [one.point for one in sweep.trials()] == [{"optim.batch": 4}, {"optim.batch": 8}]
            assert load_recipe(sweep.recipe_path(sweep.trials()[1].name)).optim.batch == 8
    with pytest.raises(InputError, match=r"there is no sweep 't' below s3://.*; there are s;"):
        find("t", s3.url(ROOT))


def test_a_trial_keeps_its_run_below_the_sweep_and_shares_what_lies_below_the_root(s3, machine):
    sweep, root = machine(), s3.url(ROOT)
    sweep.make()
    record = TrialRecord(1, "a-seed0", {}, (), 0)
    write_trial(sweep, Planned(record, load_recipe(RECIPE, [f"run.root={root}", "evaluation.cache_folder=kept"])))
    alone = load_recipe(sweep.recipe_path("a-seed0"))
    assert (alone.run.root, alone.run.name, alone.tiles.store) == (root, "s-a-seed0", None)
    trial = in_sweep(alone, sweep.run_root, "a-seed0")
    assert trial.run.root == s3.url(f"{SWEEP}/runs")
    assert trial.evaluation.ledger_folder == s3.url(f"{ROOT}/ledger")
    assert trial.evaluation.cache_folder == s3.url(f"{ROOT}/kept")
    assert trial.tiles.store == s3.url(f"{ROOT}/tiles")


# --- while it runs


def test_records_are_put_while_it_runs_and_another_machine_goes_on_from_them(s3, machine, monkeypatch):
    sweep = write(machine())
    put_run(s3)
    quick(monkeypatch)
    with sweep.claim():
        sweep.write_trial(replace(sweep.trial("a-seed0"), state="finished", seconds=7.0))
        wait(lambda: b'"finished"' in s3.objects[f"{SWEEP}/trials/a-seed0.json"], "the record is put")
        (sweep.path / ".ray" / "tune").mkdir(parents=True)
        (sweep.path / ".ray" / "tune" / "state").write_text("Tune's own")
        (sweep.runs / "a-seed1").mkdir()
        (sweep.runs / "a-seed1" / "metrics.jsonl").write_text("a copy to read")
        monkeypatch.setattr(module, "HEARTBEAT_S", 1000.0)
        sweep.write_trial(replace(sweep.trial("a-seed1"), state="waiting", seconds=3.0))
        sweep.ask_to_stop(ALL, "Ctrl-C")
    assert not [name for name in s3.names(SWEEP) if "/.ray/" in name or "a-seed1/metrics" in name or name.endswith("/.lock")][1:], (
        "the one lock is the run's"
    )
    assert s3.objects[f"{SWEEP}/stop/ALL"] == b"Ctrl-C"
    other = machine()
    with other.claim():
        assert [(one.name, one.state, one.seconds) for one in other.trials()] == [("a-seed0", "finished", 7.0), ("a-seed1", "waiting", 3.0)]
        assert other.plan == PLAN
        assert other.asked_to_stop(ALL) == "Ctrl-C"
        other.let_go_on()
        assert scores(other.run_path("a-seed0"), "hit@1") == {4: 0.5}
        assert other.run("a-seed0").status.state == "finished"
        assert not list(other.runs.rglob("*checkpoint*")) + list(other.runs.rglob("tensorboard")) + list(other.runs.rglob(".lock"))
        assert not other.run_path("a-seed1").exists()
    assert f"{SWEEP}/stop/ALL" not in s3.names()
    assert f"{SWEEP}/runs/a-seed0/checkpoint-4/COMPLETE" in s3.names()


def test_a_stop_that_a_person_puts_is_heard(s3, machine, monkeypatch):
    sweep = write(machine())
    quick(monkeypatch)
    with sweep.claim():
        assert sweep.asked_to_stop(ALL) == ""
        s3.put(f"{SWEEP}/stop/a-seed0", b"I have seen enough\n")
        s3.put(f"{SWEEP}/stop/ALL", b"")
        wait(lambda: sweep.asked_to_stop(ALL) and sweep.asked_to_stop("a-seed0"), "both stops")
        assert sweep.asked_to_stop(ALL) == "asked by s3://stairs/runs/s/stop/ALL"
        assert sweep.asked_to_stop("a-seed0") == "I have seen enough"


def test_a_store_that_is_away_stops_no_sweep_and_is_told_in_the_end(s3, machine, monkeypatch, caplog):
    sweep = write(machine())
    quick(monkeypatch)
    with caplog.at_level(logging.WARNING), sweep.claim():
        s3.misbehave("PUT", "trials/a-seed0.json", REFUSED, times=3)
        sweep.write_trial(replace(sweep.trial("a-seed0"), state="running"))
        wait(lambda: b'"running"' in s3.objects[f"{SWEEP}/trials/a-seed0.json"], "it is made up for")
        assert sweep.lost == ""
    assert caplog.text.count("the sweep goes on in") == 1
    with pytest.raises(InputError, match="The store lacks what the sweep has left since its last push"), sweep.claim():
        s3.misbehave("PUT", "trials/a-seed1.json", REFUSED, times=None)
        sweep.write_trial(replace(sweep.trial("a-seed1"), state="finished"))
    s3.behave()
    other = machine()
    with other.claim(0.05):
        assert [one.state for one in other.trials()] == ["running", "waiting"]


def test_a_store_that_is_not_there_is_told_before_anything(aws, tmp_path, monkeypatch):
    monkeypatch.setenv("STAIRSTEP_CACHE", str(tmp_path))
    sweep = sweep_at(place("s3://stairs/s?endpoint_override=http://127.0.0.1:9&region=us-east-1"))
    with pytest.raises(UnreachableError), sweep.claim():
        pass


# --- whose it is


def test_only_one_works_on_it(s3, machine, monkeypatch, caplog):
    first = write(machine())
    quick(monkeypatch)
    monkeypatch.setattr(mirrors, "SIGN_S", 0.1)
    with pytest.raises(TakenOverError, match="this sweep was taken over"), first.claim():
        second = machine()
        with (
            pytest.raises(InputError, match=r"^s3://stairs/runs/s\?.*: process \d+ on \w+ is at work on this sweep; wait"),
            second.claim(30.0),
        ):
            pass
        first.mirror.let_go()  # as a machine that hangs
        with caplog.at_level(logging.WARNING), machine().claim(0.5):
            assert "has gone silent; taking over" in caplog.text
            wait(lambda: first.lost, "the first one has noticed")
        assert "was taken over" in first.lost
        before = dict(s3.objects)
        first.write_trial(replace(first.trial("a-seed0"), state="finished"))
    assert s3.objects == before, "and puts nothing any more"


def test_a_driver_of_this_machine_that_was_killed_is_not_waited_for(s3, machine):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
    sweep = write(machine())
    with sweep.claim():
        wait(lambda: b"preparing" in s3.objects[f"{SWEEP}/driver.json"], "it says that it lives")
        holder = {**json.loads(s3.objects[f"{SWEEP}/.lock"]), "pid": int(gone.stdout)}
        alive = s3.objects[f"{SWEEP}/driver.json"]
    s3.put(f"{SWEEP}/.lock", json.dumps(holder).encode())
    s3.put(f"{SWEEP}/driver.json", alive)
    began = time.monotonic()
    with machine().claim(60.0):
        assert time.monotonic() - began < 60


def test_a_second_claim_on_one_machine_is_refused_by_the_copy(s3, machine):
    sweep = write(machine())
    again = pytest.raises(InputError, match=r"^s3://stairs/runs/s\?.*: this very process is at work on this sweep")
    with sweep.claim(), again, sweep.claim():
        pass
    with sweep.claim():
        assert sweep.lost == ""


def test_sent_to_another_process_it_is_its_copy(machine):
    sweep = write(machine())
    sent = pickle.loads(pickle.dumps(sweep))  # Ray Tune keeps its searcher as a file
    sent.ask_to_stop("a-seed0", "enough")
    assert sweep.asked_to_stop("a-seed0") == "enough"
    assert type(sent) is SweepFolder


# --- who reads it


def test_a_sweep_and_a_root_are_read_by_url(s3, machine):
    sweep = write(machine())
    put_run(s3)
    with sweep.claim():
        sweep.write_trial(replace(sweep.trial("a-seed0"), state="finished", seconds=3600.0))
    machine()
    lines = status_lines(copy_to_read(place(s3.url(SWEEP))))
    assert "a sweep of 2 trials (1 finished, 1 waiting); 1.00 device hours; by hit@1" in lines[0]
    assert [line.split()[:2] for line in lines[1:]] == [["a-seed0", "finished"], ["a-seed1", "waiting"]]
    assert "hit@1 0.500 at step 4" in lines[1]
    put_alone(s3)
    copy = copy_to_read(place(s3.url(ROOT)))
    lines = status_lines(copy)
    assert len(lines) == 4 and lines[3].split()[:2] == ["alone", "finished"]
    assert not list(copy.rglob("*checkpoint*"))
    got = s3.asked("GET", ".json")
    copy_to_read(place(s3.url(ROOT)))
    assert s3.asked("GET", ".json") == got, "what has not changed is not fetched again"
    for name in [one for one in s3.objects if f"{SWEEP}/runs/" in one]:
        del s3.objects[name]
    copy_to_read(place(s3.url(ROOT)))
    assert (copy / "s" / "sweep.json").exists() and not (copy / "s" / "runs").exists()
    remote = place(s3.url("stairs/nothing"))
    assert isinstance(remote, ObjectFolder)
    with pytest.raises(InputError, match="no run and no sweep is here"):
        copy_to_read(remote)


def put_alone(s3: S3Server) -> None:
    """The first trial's run once more, as one of no sweep."""
    for name, data in list(s3.objects.items()):
        if name.startswith(f"{SWEEP}/runs/a-seed0/"):
            s3.put(name.replace(f"{SWEEP}/runs/a-seed0", f"{ROOT}/alone"), data)


def test_what_lies_in_a_store_is_called_by_its_url(s3, machine, capsys):
    def first_word(place: str) -> str:
        assert job.main([s3.url(place)]) == 0
        return capsys.readouterr().out.split()[0]

    sweep = write(machine())
    put_run(s3)
    with sweep.claim():
        sweep.write_trial(replace(sweep.trial("a-seed0"), state="finished", seconds=3600.0))
    put_alone(s3)
    machine()
    assert first_word(SWEEP) == first_word(ROOT) == f"s3://{SWEEP}:"
    assert first_word(f"{ROOT}/alone") == f"s3://{ROOT}/alone:"
    del s3.objects[f"{ROOT}/alone/status.json"]
    with pytest.raises(StairstepError, match=rf"^s3://{ROOT}/alone: this run has no status\.json yet"):
        job.main([s3.url(f"{ROOT}/alone")])
    job.main([s3.url(ROOT)])
    assert capsys.readouterr().out.splitlines()[-1].split() == [
        *("alone", "?", "this", "run", "has", "no", "status.json", "yet;"),
        *("it", "is", "being", "opened,", "or", "was", "never", "started"),
    ]

"""jobs.sweep as a person runs it: what is wrong is told before anything starts; in `make soak` the whole of it, kills in its midst."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from s3_server import S3Server
from safetensors.torch import load_file

from stairstep.records import read_json_lines
from stairstep.sweeps import SweepFolder
from stairstep.sweeps.scores import scores

ROOT = Path(__file__).resolve().parents[2]
Job = Callable[..., Any]
GRID = "parameters:\n  optim.batch: {kind: grid, values: [2, 4]}\n"


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting a Ray would be a failure of the test."""

    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("a Ray was started")

    monkeypatch.setattr("ray.init", started)


@pytest.fixture
def space(tmp_path: Path) -> Path:
    """A space that fits."""
    path = tmp_path / "space.yaml"
    path.write_text(GRID)
    return path


def test_on_a_cluster_a_relative_root_is_refused_before_a_folder_is_made(
    job: Job, no_ray: None, small: Any, space: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    told = job("sweep", small.recipe, space, "run.root=here", "evaluation.reader=null")
    assert (told.code, told.out) == (2, "")
    assert "run.root: 'here' is relative" in told.err
    assert not list(tmp_path.rglob("sweep.json"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GRID.replace("optim.batch", "optim.bach"), "unknown key 'optim.bach'; did you mean 'optim.batch'?"),
        (GRID.replace("4]", "four]"), "optim.batch: expected a whole number at least 1, found the text 'four'"),
        (GRID.replace("[2, 4]", "[]"), "space.yaml:2: parameters.optim.batch.values: the list is empty; give at least one value"),
        (GRID + "metric: qa\n", "space.yaml: metric: qa never comes: nobody answers (evaluation.reader is null)"),
        (GRID + "search: {kind: optuna, samples: 3}\n", "a grid cannot be searched by optuna: say kind choice, or leave search out"),
        (GRID + "colour: blue\n", "space.yaml:3: unknown key 'colour'"),
        ("parameters: [1]\n", "parameters: expected a mapping"),
    ],
)
def test_a_bad_space_is_told_before_anything_starts(job: Job, no_ray: None, small: Any, space: Path, text: str, message: str):
    space.write_text(text)
    told = job("sweep", small.recipe, space, "evaluation.reader=null")
    assert told.code == 2
    assert message in told.err
    assert told.err.count("\n") == 1 and "Traceback" not in told.err
    assert not small.runs.exists()


def test_a_bad_command_is_told_before_anything_starts(job: Job, no_ray: None, small: Any, space: Path, tmp_path: Path):
    for arguments, message in (
        ((small.recipe, tmp_path / "spice.yaml"), "did you mean"),
        ((small.recipe,), "expected a recipe and a space"),
        ((small.recipe, space, "optim.batch=8"), "optim.batch is set by the space"),
        ((small.recipe, space, "--seeds", "1", "1"), "no second seed"),
        ((small.recipe, space, "--name", "a/b"), "expected a plain folder name"),
        ((small.recipe, space, "--resume", "x"), "goes on with a sweep as it was begun"),
        (("--resume", "x"), "there is no sweep 'x'"),
        ((small.recipe, space, "--root", "x"), "--root is for --resume"),
        ((small.recipe, space, "--max-hours", "0"), "--max-hours: expected a number above 0"),
    ):
        told = job("sweep", *arguments)
        assert (told.code, told.err.count("\n")) == (2, 1), told.err
        assert message in told.err
    assert not small.runs.exists()


def test_resources_that_this_machine_will_never_have_are_told_before_any_trial(
    job: Job, no_ray: None, small: Any, space: Path, monkeypatch: pytest.MonkeyPatch
):
    """By a private Ray, for only there it is known what will never come: here one of four CPUs that is only asked what it has, which takes
    no start. A corrected command may then take the name."""
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr("stairstep.cluster.session._started_here", lambda: True)
    space.write_text(GRID.replace("optim.batch", "cluster.workers").replace("[2, 4]", "[1, 4096]"))
    told = job("sweep", small.recipe, space, "evaluation.reader=null")
    assert told.code == 2
    assert "4096 workers with CPU 1" in told.err
    sweep = SweepFolder(small.runs / "small-space")
    assert [(one.state, one.seconds) for one in sweep.trials()] == [("waiting", 0.0)] * 2
    space.write_text(GRID)
    told = job("sweep", small.recipe, space, "evaluation.reader=null", "--concurrency", "4096")
    assert told.code == 2
    assert "--concurrency: 4096 trials were asked for" in told.err
    assert [one.point for one in sweep.trials()] == [{"optim.batch": 2}, {"optim.batch": 4}]


# --- the whole of it, with a served reader (make soak)

STAIRS = """\
steps:
  - {name: low, adds: a low rate, set: {optim.rates.llm: 1.0e-4}}
  - {name: high, adds: a high rate, set: {optim.rates.llm: 1.0e-2}}
seeds: [0, 1]
"""


def command(*arguments: object, cache: Path | None = None) -> subprocess.Popen[str]:
    """jobs.sweep in a process of its own; `cache`: where this machine keeps copies of what lies in object stores."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | ({"STAIRSTEP_CACHE": str(cache)} if cache else {})
    environment.pop("RAY_ADDRESS", None)
    words = [sys.executable, "-m", "jobs.sweep", *map(str, arguments)]
    return subprocess.Popen(words, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def table(sweep: SweepFolder) -> dict[str, Any]:
    """All that a final table and its trials say, but for times."""
    found: dict[str, Any] = {}
    for one in sweep.trials():
        run = sweep.run_path(one.name)
        rows = {path.name: read_json_lines(path) for path in sorted(run.glob("eval_step*.jsonl"))}
        weights = load_file(max(run.glob("checkpoint-*"), key=lambda path: int(path.name[11:])) / "adapter_model.safetensors")
        bits = {name: value.numpy().tobytes() for name, value in weights.items()}
        found[one.name] = (one.state, one.point, scores(run, "hit@1"), scores(run, "qa"), rows, bits)
    return found


def answers(sweep: SweepFolder) -> dict[str, int]:
    """Calls of the reader over all trials and steps: asked, and found."""
    counted = {"asked": 0, "found": 0}
    for path in sweep.runs.glob("*/eval_step*.summary.json"):
        calls = json.loads(path.read_text())["calls"]["answer"]
        counted["asked"] += calls["asked"]
        counted["found"] += calls["hits"]
    return counted


def child_of(process: subprocess.Popen[str], name: str) -> psutil.Process:
    """A process of the job's Ray, when it is there."""
    end = time.monotonic() + 400
    while time.monotonic() < end:
        for one in psutil.Process(process.pid).children(recursive=True):
            try:
                if (one.cmdline() or [""])[0].startswith(name):
                    return one
            except psutil.Error:
                continue
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError(f"no {name} within 400 s")


@pytest.mark.soak
@pytest.mark.timeout(2400)
def test_kills_of_worker_reader_and_driver_change_nothing_of_the_table(small: Any, tmp_path: Path):
    stairs = tmp_path / "stairs.yaml"
    stairs.write_text(STAIRS)
    own = ["optim.steps=12", "evaluation.every=4", "checkpoints.every=2", "--concurrency", "2"]
    calm = command(small.recipe, stairs, *own, f"run.root={tmp_path / 'calm'}", "--name", "s")
    printed = calm.communicate(timeout=900)[0]
    assert calm.returncode == 0, printed
    undisturbed = SweepFolder(tmp_path / "calm" / "s")
    expected = table(undisturbed)
    assert {name: one[0] for name, one in expected.items()} == dict.fromkeys(
        ("low-seed0", "low-seed1", "high-seed0", "high-seed1"), "finished"
    )
    assert expected["low-seed0"][5] != expected["high-seed0"][5]
    # Four trials look at 4 questions at 4 steps each; what is one key is one call, whoever asks.
    counted = answers(undisturbed)
    kept = list((tmp_path / "calm" / "ledger" / "answer").rglob("*.json"))
    assert counted["asked"] == len(kept) > 0
    assert sum(counted.values()) == 4 * 4 * 4

    storm = command(small.recipe, stairs, *own, f"run.root={tmp_path / 'storm'}", "--name", "s")
    child_of(storm, "ray::RayTrainWorker").kill()
    child_of(storm, "ray::ServeReplica").kill()
    sweep = SweepFolder(tmp_path / "storm" / "s")
    end = time.monotonic() + 400
    while time.monotonic() < end and not list(sweep.runs.glob("*/checkpoint-4/COMPLETE")):
        assert storm.poll() is None, storm.communicate()[0]
        time.sleep(0.05)
    storm.send_signal(signal.SIGKILL)
    storm.wait()
    assert any(one.state in ("running", "waiting") for one in sweep.trials())
    again = command("--resume", sweep.path)
    printed = again.communicate(timeout=900)[0]
    assert again.returncode == 0, printed
    assert table(sweep) == expected

    # A second sweep over the same root asks nobody: everything is known.
    other = command(small.recipe, stairs, *own, f"run.root={tmp_path / 'storm'}", "--name", "t")
    printed = other.communicate(timeout=900)[0]
    assert other.returncode == 0, printed
    assert answers(SweepFolder(tmp_path / "storm" / "t"))["asked"] == 0


def copied(s3: S3Server, prefix: str, folder: Path) -> SweepFolder:
    """What the store has below a prefix, as a folder."""
    for name in s3.names(f"{prefix}/"):
        path = folder / name.removeprefix(f"{prefix}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(s3.objects[name])
    return SweepFolder(folder)


@pytest.mark.soak
@pytest.mark.timeout(2400)
def test_a_driver_that_was_killed_goes_on_by_url_on_another_machine(small: Any, tmp_path: Path, s3: S3Server):
    stairs = tmp_path / "stairs.yaml"
    stairs.write_text(STAIRS)
    own = ["optim.steps=12", "evaluation.every=4", "checkpoints.every=2", "--concurrency", "2", "--seeds", "0", "--name", "s"]
    calm = command(small.recipe, stairs, *own, f"run.root={tmp_path / 'calm'}")
    printed = calm.communicate(timeout=900)[0]
    assert calm.returncode == 0, printed
    expected = table(SweepFolder(tmp_path / "calm" / "s"))
    assert [one[0] for one in expected.values()] == ["finished"] * 2

    storm = command(small.recipe, stairs, *own, f"run.root={s3.url('stairs/runs')}", cache=tmp_path / "one")
    end = time.monotonic() + 400
    while time.monotonic() < end and not any(name.endswith("checkpoint-4/COMPLETE") for name in s3.names("stairs/runs/s/")):
        assert storm.poll() is None, storm.communicate()[0]
        time.sleep(0.05)
    storm.send_signal(signal.SIGKILL)
    storm.wait()
    left = copied(s3, "stairs/runs/s", tmp_path / "left")
    assert any(one.state in ("running", "waiting") for one in left.trials())
    assert {one.name for one in left.trials()} == set(expected)
    again = command("--resume", s3.url("stairs/runs/s"), cache=tmp_path / "two")
    printed = again.communicate(timeout=900)[0]
    assert again.returncode == 0, printed
    assert "its board: s3://stairs/runs/s/report.html" in printed
    assert table(copied(s3, "stairs/runs/s", tmp_path / "whole")) == expected
    assert not [name for name in s3.names("stairs/runs/s/") if name.endswith((".lock", "stop"))]


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_ctrl_c_leaves_checkpoints_and_resume_goes_on(small: Any, tmp_path: Path):
    stairs = tmp_path / "stairs.yaml"
    stairs.write_text(STAIRS)
    own = ["optim.steps=40", "evaluation.every=20", "checkpoints.every=40", "evaluation.reader=null", f"run.root={tmp_path / 'runs'}"]
    first = command(small.recipe, stairs, *own, "--name", "s", "--seeds", "0")
    sweep = SweepFolder(tmp_path / "runs" / "s")
    end = time.monotonic() + 400
    while time.monotonic() < end and not any((sweep.run_path(name) / "metrics.jsonl").exists() for name in ("low-seed0", "high-seed0")):
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    printed = first.communicate(timeout=600)[0]
    assert first.returncode == 1, printed
    assert f"stopped by SIGINT; jobs.sweep --resume {sweep.path} goes on from here" in printed
    assert "Traceback" not in printed
    assert {one.state for one in sweep.trials()} <= {"waiting", "finished"}
    second = command("--resume", "s", "--root", tmp_path / "runs")
    printed = second.communicate(timeout=900)[0]
    assert second.returncode == 0, printed
    assert {one.state for one in sweep.trials()} == {"finished"}


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_embedded_staircase_with_two_seeds_and_its_board(tmp_path: Path):
    """The command of the README, whole."""
    sweeping = command(ROOT / "recipes" / "tinywiki.yaml", ROOT / "tune_spaces" / "stairstep.yaml", f"run.root={tmp_path}")
    printed = sweeping.communicate(timeout=3500)[0]
    assert sweeping.returncode == 0, printed
    sweep = SweepFolder(tmp_path / "tinywiki-stairstep")
    assert [one.state for one in sweep.trials()] == ["finished"] * 8
    assert "over 4 steps, 2 seeds" in printed
    assert (sweep.path / "report.html").stat().st_size < 3_000_000
    kept = list((tmp_path / "ledger" / "answer").rglob("*.json"))
    assert answers(sweep)["asked"] == len(kept) > 300  # each key asked once, over all trials and steps


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_the_grid_of_the_design_card_stops_bad_trials_early_and_says_why(tmp_path: Path):
    """Two rates, two warmups, two placements of LoRA: a tenth of the rate learns little in 64 steps."""
    sweeping = command(ROOT / "recipes" / "tinywiki.yaml", ROOT / "tune_spaces" / "lr_warmup_lora.yaml", f"run.root={tmp_path}")
    printed = sweeping.communicate(timeout=3500)[0]
    assert sweeping.returncode == 0, printed
    trials = SweepFolder(tmp_path / "tinywiki-lr_warmup_lora").trials()
    assert len(trials) == 8
    stopped = [one for one in trials if one.state == "stopped"]
    assert stopped and {one.state for one in trials} == {"stopped", "finished"}
    assert all(one.reason.startswith("asha: hit@1") and one.stopped_at is not None and one.stopped_at < 64 for one in stopped)
    assert all(one.reason in printed for one in stopped)

"""jobs.report as a person runs it: where the page goes, text and CSV, mistakes, and a served board that Ctrl-C ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "board"))

from board_world import ranks, write_run, write_staircase

Job = Callable[..., Any]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for name in "ab":
        write_run(tmp_path / "runs" / name, {0: ranks(30, 0.2, 0), 20: ranks(30, 0.6, ord(name))})
    return tmp_path / "runs"


def test_the_page_goes_into_the_folder_or_beside_several_or_where_told(job: Job, runs: Path):
    for arguments, out in {
        (runs / "a",): runs / "a" / "report.html",
        (runs / "a", runs / "b"): runs / "report.html",
        (runs / "a", "--out", runs / "x.html"): runs / "x.html",
    }.items():
        told = job("report", *arguments)
        assert (told.code, told.out, told.err) == (0, f"{out}\n", "")
        assert out.read_text().startswith("<!doctype html>")


def test_text_and_csv(job: Job, tmp_path: Path):
    sweep = write_staircase(tmp_path / "sweep", n=30, seeds=(0,))
    told = job("report", sweep.path, "--text", "--csv", tmp_path / "all.csv")
    assert told.code == 0
    assert "R@1, step by step" in told.out
    assert "1 seed on a step" in told.out
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 1 + 3 * 2
    assert not (sweep.path / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gone"], "there is no such folder"),
        (["."], "neither a run folder"),
        (["runs/a", "--thumbnails", "-1"], "--thumbnails -1: expected 0 or more"),
        (["runs/a", "--watch", "--text"], "leave out --out"),
        (["runs/a", "--port", "80"], "--port is for --watch"),
        (["runs/a", "--watch", "--port", "99999"], "--port 99999: expected a port from 1 to 65535"),
        (["runs/a", "--watch", "--port", "-1"], "--port -1: expected a port from 1 to 65535"),
        (["runs/a", "--out", "nodir/x.html"], "--out: there is no folder nodir"),
        (["runs/a", "--out", "runs"], "--out: runs is a folder; expected a file, such as runs/report.html"),
        (["runs/a", "--text", "--csv", "nodir/x.csv"], "--csv: there is no folder nodir"),
    ],
)
def test_mistakes_are_told(job: Job, runs: Path, arguments: list[str], words: str):
    told = job("report", *arguments)
    assert told.code == 2
    assert words in told.err
    assert "Traceback" not in told.err


def test_a_served_board_ends_with_ctrl_c(runs: Path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "platform"), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "jobs.report", str(runs / "a"), "--watch"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job, as a whole suite may be, ignores it
    )
    assert process.stdout is not None
    address = process.stdout.readline().split()[4]
    with urllib.request.urlopen(address, timeout=60) as answer:
        assert answer.status == 200
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "ended\n", "")

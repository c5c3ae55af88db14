"""How much of training's wall time waits for evaluation, beside training and inline: six evaluations, the same run both ways, in turns.

python bench/overlap.py                              3 rounds of two runs of 200 steps
python bench/overlap.py --rounds 1 --every 10        a look, some four minutes on a busy machine

Both sides are `python -m jobs.train recipes/tinywiki.yaml cluster.workers=1` with the same overrides but evaluation.mode; the sides take
turns in being first. The worker computes with one thread on one core, the evaluator with one thread on another (their affinity is set as
soon as they are seen), so two cores are needed. Evaluations stand at step 0 and at every `--every` steps, the last step among them; nothing
is found in a cache or a ledger, so both sides compute the same, and their scores are compared.

What training waited is what it says itself: `time/evaluation_wait_seconds` in metrics.jsonl, a row an evaluation. Training's wall time is
from the beginning of step 0's evaluation to the end of the last step; the share is that of the waits before the last step in it. The wait
at the last step is the rest of the run, in which nothing is left to train; it is shown beside it, and is in the run's wall time, whose
ratio is the geometric mean over rounds. The start of Ray and its processes is in neither, nor is the checkpoint of step 0, which beside
alone writes.

Needs ray. Writes bench/results/overlap.json; exit code 1 if the scores differ or the share beside training is not below the goal.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from stairstep.records import MetricLog, comparable, describe_environment, write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "overlap.json"
GOAL = 0.05
EVALUATIONS = 6
MODES = ("inline", "beside")
WAIT = "time/evaluation_wait_seconds"
TITLES = ("ray::RayTrainWorker", "ray::RemoteEvaluator")  # who computes, each on a core of its own
LOOK_S = 0.5
WHAT = (
    "data.world.articles=60",
    "data.world.questions=60",
    "data.world.pairs=600",
    "optim.batch=8",
    "optim.schedule.warmup_steps=0",
    "phases.text_warmup_steps=0",
    "evaluation.loss_every=0",
    "evaluation.cache=false",
    "evaluation.ledger=false",
    "checkpoints.every=100000",
    "run.threads=1",
    "cluster.workers=1",
)
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Facts:
    """Where one run's time went, in seconds."""

    training: float  # from the first evaluation's beginning to the end of the last step
    held: float  # of that, waiting for evaluations
    after: float  # waiting for evaluations when nothing was left to train
    evaluations: int

    @property
    def share(self) -> float:
        """The share of training's wall time that waited for evaluation."""
        return self.held / self.training

    @property
    def wall(self) -> float:
        """From the first evaluation's beginning to the end of the last one."""
        return self.training + self.after


def facts_of(rows: Sequence[Row]) -> Facts:
    """The facts that a run's metric log tells."""
    waits = {row["step"]: (row["time"], row[WAIT]) for row in rows if row.get(WAIT) is not None}
    trained = [row for row in rows if "train/loss" in row]
    last = trained[-1]["step"]
    if not {0, last} <= set(waits):
        raise SystemExit(f"{WAIT}: expected one at step 0 and one at the last step ({last}), found steps {sorted(waits)}")
    first_ended, first_wait = waits[0]
    held = sum(wait for step, (_, wait) in waits.items() if step < last)
    return Facts(trained[-1]["time"] - (first_ended - first_wait), held, waits[last][1], len(waits))


def scores_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What evaluations found, by step: rows of neither training nor time."""
    return [row for row in comparable(rows) if "train/loss" not in row]


def cores() -> tuple[int, int]:
    """A core for the worker and one for the evaluator."""
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < 2:
        raise SystemExit("two cores are needed, one to train on and one to evaluate on; this process may use one")
    return usable[0], usable[-1]


def pin(job: int, where: tuple[int, int]) -> None:
    """Give the processes that compute a core each: every thread that they have by now."""
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(job).children(recursive=True):
            with suppress(psutil.Error, ProcessLookupError):
                title = (process.cmdline() or [""])[0]
                for prefix, core in zip(TITLES, where, strict=True):
                    if title.startswith(prefix):
                        for thread in process.threads():
                            os.sched_setaffinity(thread.id, {core})


def train(root: Path, name: str, mode: str, every: int, where: tuple[int, int]) -> list[dict[str, Any]]:
    """One run in processes of its own; the rows of its metric log."""
    steps = every * (EVALUATIONS - 1)
    own = (f"run.root={root}", f"run.name={name}", f"optim.steps={steps}", f"evaluation.every={every}", f"evaluation.mode={mode}")
    command = [sys.executable, "-m", "jobs.train", "recipes/tinywiki.yaml", *WHAT, *own]
    path = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    with open(root / f"{name}.log", "w+", encoding="utf-8") as log:
        job = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, stdout=log, stderr=subprocess.STDOUT)
        try:
            while job.poll() is None:
                pin(job.pid, where)
                with suppress(subprocess.TimeoutExpired):
                    job.wait(LOOK_S)
        finally:
            job.terminate()
            job.wait()
        if job.returncode:
            log.seek(0)
            raise SystemExit(f"{name}: jobs.train failed\n{log.read()[-4000:]}")
    return MetricLog(root / name / "metrics.jsonl").rows()


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of either side")
    parser.add_argument("--every", type=int, default=40, help=f"steps between two of the {EVALUATIONS} evaluations")
    options = parser.parse_args()
    if options.rounds < 1 or options.every < 1:
        parser.error("expected one round at least, and a step between evaluations")
    where, load = cores(), os.getloadavg()[0]
    print(f"{options.rounds} rounds, evaluations every {options.every} steps, cores {where}, load {load:.1f}", flush=True)
    print(f"{'round':>5} {'mode':<7} {'training s':>11} {'waited s':>9} {'share':>6} {'after s':>8} {'wall s':>8}", flush=True)
    found: dict[str, list[Facts]] = {mode: [] for mode in MODES}
    scores = []
    with tempfile.TemporaryDirectory(prefix="overlap-") as folder:
        for place in range(options.rounds):
            for mode in MODES if place % 2 == 0 else MODES[::-1]:
                rows = train(Path(folder), f"{mode}-{place}", mode, options.every, where)
                one = facts_of(rows)
                found[mode].append(one)
                scores.append(scores_of(rows))
                figures = f"{one.training:>11.1f} {one.held:>9.2f} {one.share:>6.1%} {one.after:>8.2f} {one.wall:>8.1f}"
                print(f"{place + 1:>5} {mode:<7} {figures}", flush=True)
    shares = {mode: float(np.median([one.share for one in runs])) for mode, runs in found.items()}
    ratios = [beside.wall / inline.wall for inline, beside in zip(found["inline"], found["beside"], strict=True)]
    ratio = float(np.exp(np.mean(np.log(ratios))))
    alike = bool(scores[0]) and all(one == scores[0] for one in scores)
    print(f"share of training's wall time that waited, median: beside {shares['beside']:.1%} (goal: below {GOAL:.0%}), ", end="")
    print(f"inline {shares['inline']:.1%}")
    print(f"wall time, beside ÷ inline: {ratio:.3f} [{min(ratios):.3f} {max(ratios):.3f}]; scores {'equal' if alike else 'DIFFER'}")
    report = {
        "arguments": {"rounds": options.rounds, "every": options.every},
        "load_at_start": round(load, 2),
        "load_at_end": round(os.getloadavg()[0], 2),
        "share": shares,
        "wall_ratio": {"value": ratio, "rounds": ratios},
        "scores_equal": alike,
        "runs": {mode: [{**asdict(one), "share": one.share, "wall": one.wall} for one in runs] for mode, runs in found.items()},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, {**report, "environment": describe_environment()})
    return 0 if alike and shares["beside"] < GOAL else 1


if __name__ == "__main__":
    sys.exit(main())

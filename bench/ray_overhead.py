"""What Ray Train adds to a step: the same training in one process without Ray and as one worker of Ray Train, in alternating blocks.

python bench/ray_overhead.py                                 200 steps of either side in 5 blocks each, some ten minutes on a quiet machine
python bench/ray_overhead.py --steps 20 --blocks 2           a look

Both sides are `python -m jobs.train recipes/tinywiki.yaml` with the same overrides, one thread and one process that trains: cluster.workers
is 0 or 1. There are no evaluations and no checkpoints but the last. A block is one such run; the sides take turns in being first. What
counts is the wall time from the end of a step to the end of the next, as metrics.jsonl has it (in milliseconds), so the log, the heartbeat,
the agreement on stopping and whatever Ray does beside them are in it; the start of either is not, nor are a block's first steps. Step n
computes the same on both sides (the losses are compared), so steps are compared in pairs: the ratio is the geometric mean, over pairs of
blocks, of the median over steps; its interval is the bootstrap's, over pairs of blocks and over steps within them.

Needs ray. Writes bench/results/ray_overhead.json; exit code 1 if the losses differ or the ratio is above the goal.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from stairstep.records import MetricLog, describe_environment, write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "ray_overhead.json"
GOAL = 1.03
DROPPED = 5  # intervals at the beginning of a block
SIDES = {"bare": 0, "ray": 1}  # cluster.workers
DRAWS = 2000
WHAT = (
    "data.world.articles=60",
    "data.world.questions=30",
    "data.world.pairs=600",
    "optim.batch=8",
    "optim.schedule.warmup_steps=0",
    "phases.text_warmup_steps=0",
    "evaluation.sets=[]",
    "evaluation.reader=null",
    "evaluation.loss_every=0",
    "checkpoints.every=100000",
    "run.threads=1",
)


def train(root: Path, name: str, side: str, steps: int) -> list[dict[str, Any]]:
    """One run in a process of its own; the rows of its steps."""
    overrides = (*WHAT, f"run.root={root}", f"run.name={name}", f"optim.steps={steps}", f"cluster.workers={SIDES[side]}")
    command = [sys.executable, "-m", "jobs.train", "recipes/tinywiki.yaml", *overrides]
    path = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    ended = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=3600, check=False
    )
    if ended.returncode:
        raise SystemExit(f"{name}: jobs.train failed\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}")
    return [row for row in MetricLog(root / name / "metrics.jsonl").rows() if "train/loss" in row]


def intervals(rows: list[dict[str, Any]]) -> list[float]:
    """Seconds from the end of each step to the end of the next, without the first of them."""
    return np.diff([row["time"] for row in rows])[DROPPED:].tolist()


def ratio_of(bare: np.ndarray, ray: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Ray's time over the bare loop's, [blocks, steps] each, with its 95 % interval."""
    logs = np.log(ray / bare)
    chance = np.random.default_rng(seed)
    blocks, steps = logs.shape
    drawn = []
    for _ in range(DRAWS):
        chosen = logs[chance.integers(blocks, size=blocks)]
        places = chance.integers(steps, size=(blocks, steps))
        drawn.append(np.median(np.take_along_axis(chosen, places, axis=1), axis=1).mean())
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(np.exp(np.median(logs, axis=1).mean())), float(np.exp(low)), float(np.exp(high))


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="steps of either side that are compared, over all blocks")
    parser.add_argument("--blocks", type=int, default=5, help="runs of either side")
    options = parser.parse_args()
    if options.blocks < 2 or options.steps < options.blocks:
        parser.error("expected two blocks at least, and a step in each")
    each = -(-options.steps // options.blocks)
    load = os.getloadavg()[0]
    print(f"{options.blocks} blocks of {each} steps a side, {os.cpu_count()} cores, load {load:.1f}", flush=True)
    times: dict[str, list[list[float]]] = {side: [] for side in SIDES}
    losses: dict[str, list[list[float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(prefix="ray-overhead-") as folder:
        root = Path(folder)
        train(root, "first", "bare", 1)  # makes the world and looks at its tiles
        for block in range(options.blocks):
            for side in list(SIDES) if block % 2 == 0 else list(SIDES)[::-1]:
                rows = train(root, f"{side}-{block}", side, each + DROPPED + 1)
                times[side].append(intervals(rows))
                losses[side].append([row["train/loss"] for row in rows])
                print(f"block {block + 1}, {side}: {1000 * np.median(times[side][-1]):.1f} ms a step", flush=True)
    arrays = {side: np.array(one) for side, one in times.items()}
    ratio, low, high = ratio_of(arrays["bare"], arrays["ray"])
    alike = all(one == losses["bare"][0] for side in SIDES for one in losses[side])
    print(f"Ray Train ÷ bare loop: {ratio:.3f} [{low:.3f} {high:.3f}], at most {GOAL} wanted; losses {'equal' if alike else 'DIFFER'}")
    report = {
        "arguments": {"steps": options.steps, "blocks": options.blocks},
        "load_at_start": round(load, 2),
        "load_at_end": round(os.getloadavg()[0], 2),
        "steps_a_side": arrays["bare"].size,
        "median_ms": {side: round(float(1000 * np.median(one)), 2) for side, one in arrays.items()},
        "ratio": {"value": ratio, "low": low, "high": high},
        "block_ratios": np.exp(np.median(np.log(arrays["ray"] / arrays["bare"]), axis=1)).round(4).tolist(),
        "losses_equal": alike,
        "seconds": times,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, {**report, "environment": describe_environment()})
    return 0 if alike and ratio <= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())

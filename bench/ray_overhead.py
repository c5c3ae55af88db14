"""What Ray Train adds to a step: the same training in one process without Ray and as one worker of Ray Train, taking turns by the second.

python bench/ray_overhead.py                                 200 steps of each side in 4 rounds, some fifteen minutes on a quiet machine
python bench/ray_overhead.py --shared                        all threads of the process that trains on one core
python bench/ray_overhead.py --steps 40 --rounds 1           a look

All sides are `python -m jobs.train recipes/tinywiki.yaml` with the same overrides, one thread and one process that trains: cluster.workers
is 0 or 1. There are no evaluations and no checkpoints but the last. In a round all are started and then halted and let go in turns of a
few seconds, each with all its processes, Ray's included: the speed of a virtual machine changes within a minute by more than is to be
measured here, but all sides then meet the same.

The thread that trains has the first core, and whatever else belongs to a side the others, the other threads of its process too: so would a
node place them that has a core to spare. Where none is to spare (--shared), those threads, which Ray wakes some two hundred times a second,
interrupt the one that trains. Where "cores" are threads of one core, what Ray's own processes and our driver take is taken from the one
that trains: so a third side is the bare loop beside a process that does nothing for as much of a core, round by round what Ray's took in
the round before (in the first one: a tenth).

What counts is the wall time from the end of a step to the end of the next, as metrics.jsonl has it (in milliseconds), where both ends lie
in one turn; so the log, the heartbeat, the look for a stop and whatever Ray does beside them are in it. Step n computes the same on
both sides (the losses are compared) and is compared with itself: the ratio is the geometric mean, over rounds, of the median over steps;
its interval is the bootstrap's, over rounds and over runs of steps within them.

Needs ray. Writes bench/results/ray_overhead.json (ray_overhead_shared.json); exit code 1 if the losses differ or the ratio is above the
goal.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from stairstep.records import MetricLog, describe_environment, write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
GOAL = 1.03
DROPPED = 5  # steps at the beginning of a run
TURN_S = 4.0
TRAINER = "ray::RayTrainWorker"  # its title; without Ray the job itself trains
TOGETHER = 5  # steps that the bootstrap draws together: neighbours share the machine's mood
SIDES = {"bare": 0, "ray": 1, "loaded": 0}  # cluster.workers
FIRST_LOAD = 0.1
FIRST_LOOK_S = 1.0
IDLER = """
import sys, time
while True:
    end = time.perf_counter() + 0.02 * float(sys.argv[1])
    while time.perf_counter() < end:
        pass
    time.sleep(0.02 * (1 - float(sys.argv[1])))
"""
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
Turn = tuple[float, float]
Ratio = tuple[float, float, float]


class Side:
    """One run in processes of its own, which can be halted and let go, and the turns that it had."""

    def __init__(self, root: Path, name: str, side: str, steps: int, load: float = 0.0, shared: bool = False) -> None:
        """`load`: how much of a core a process beside it takes in its turns; `shared`: all threads of the process that trains have one."""
        self.load, self.shared = load, shared
        self.log, self.said = MetricLog(root / name / "metrics.jsonl"), root / f"{name}.txt"
        self.turns: list[Turn] = []
        self.others_s = 0.0  # CPU seconds that all of it but what trains took in its turns
        self._spent: dict[int, float] = {}  # CPU seconds of the threads of the process that trains, when it was looked last
        self._trains = 0  # the thread that trains
        overrides = (*WHAT, f"run.root={root}", f"run.name={name}", f"optim.steps={steps}", f"cluster.workers={SIDES[side]}")
        command = [sys.executable, "-m", "jobs.train", "recipes/tinywiki.yaml", *overrides]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT)])}
        with self.said.open("wb") as said:
            self.job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT)

    def rows(self) -> list[dict[str, Any]]:
        """What it has logged of its steps."""
        return [row for row in self.log.rows() if "train/loss" in row]

    def over(self) -> bool:
        """Whether it has ended; a failure is told."""
        code = self.job.poll()
        if code:
            raise SystemExit(f"{self.said.name}: jobs.train failed\n{self.said.read_text(encoding='utf-8')[-4000:]}")
        return code is not None

    def begun(self) -> bool:
        """Wait until it has taken its first steps, and give its processes their cores; false if it has ended by then."""
        while not self.over():
            if len(self.rows()) > DROPPED:
                self._spent = _threads(self._trainer())
                time.sleep(FIRST_LOOK_S)
                self._pin()
                return True
            time.sleep(0.1)
        return False

    def halt(self) -> None:
        """Stop all its processes where they are."""
        self._each("suspend")

    def turn(self) -> None:
        """Let it run alone for a while, to its end if that comes first."""
        self._pin()
        before = self._others()
        start = time.time()
        self._each("resume")
        with beside(self.load):
            while not self.over() and time.time() < start + TURN_S:
                time.sleep(0.05)
        self.turns.append((start, time.time()))
        self.halt()
        self.others_s += sum(took - before.get(one, 0.0) for one, took in self._others().items())

    def others(self) -> float:
        """How much of a core all of it but what trains took in its turns."""
        return self.others_s / sum(end - start for start, end in self.turns)

    def _processes(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            first = psutil.Process(self.job.pid)
            return [first, *first.children(recursive=True)]
        return []

    def _trainer(self) -> psutil.Process:
        """The process that trains."""
        found = self._processes()
        for one in found:
            with suppress(psutil.Error):
                if (one.cmdline() or [""])[0].startswith(TRAINER):
                    return one
        return found[0]

    def _pin(self) -> None:
        """Give what trains the first core and all else the others; what has begun since the last time is where its maker was."""
        cores, trainer = sorted(os.sched_getaffinity(0)), self._trainer()
        spent = _threads(trainer)
        self._trains = max(spent, key=lambda one: spent[one] - self._spent.get(one, 0.0))  # since the last look: imports took long too
        self._spent = spent
        for one in self._processes():
            with suppress(OSError):
                for thread in map(int, os.listdir(f"/proc/{one.pid}/task")):
                    first = one.pid == trainer.pid if self.shared else thread == self._trains
                    with suppress(ProcessLookupError):
                        os.sched_setaffinity(thread, cores[:1] if first else cores[1:] or cores)

    def _others(self) -> dict[int, float]:
        """CPU seconds by now of each process but the one that trains, and of what has not its core of the threads of that one."""
        found: dict[int, float] = {}
        processes = self._processes()
        trainer = self._trainer().pid if processes else 0
        for one in processes:
            with suppress(psutil.NoSuchProcess):
                if one.pid != trainer:
                    times = one.cpu_times()
                    found[one.pid] = times.user + times.system
                elif not self.shared:
                    found |= {thread: took for thread, took in _threads(one).items() if thread != self._trains}
        return found

    def _each(self, what: str) -> None:
        for one in self._processes():
            with suppress(psutil.NoSuchProcess):
                getattr(one, what)()

    def end(self) -> None:
        """Let it end by itself."""
        self._each("resume")
        while not self.over():
            time.sleep(0.2)


def _threads(process: psutil.Process) -> dict[int, float]:
    """CPU seconds by now of each of its threads."""
    return {one.id: one.user_time + one.system_time for one in process.threads()}


@contextmanager
def beside(load: float) -> Iterator[None]:
    """A process that does nothing for that share of a core; none where it is 0."""
    if not load:
        yield
        return
    cores = sorted(os.sched_getaffinity(0))
    with subprocess.Popen([sys.executable, "-c", IDLER, str(load)]) as idler:
        os.sched_setaffinity(idler.pid, cores[1:] or cores)
        try:
            yield
        finally:
            idler.kill()


def round_of(root: Path, number: int, steps: int, load: float, shared: bool) -> dict[str, Side]:
    """All sides to their ends, in turns."""
    order = list(SIDES) if number % 2 == 0 else list(SIDES)[::-1]
    sides: dict[str, Side] = {}
    try:
        for side in order:
            sides[side] = Side(root, f"{side}-{number}", side, steps, load if side == "loaded" else 0.0, shared)
            if sides[side].begun():
                sides[side].halt()
        while not any(one.over() for one in sides.values()):
            for one in sides.values():
                one.turn()
    finally:
        for one in sides.values():
            one.end()
    return sides


def intervals(rows: Sequence[Mapping[str, Any]], turns: Sequence[Turn]) -> dict[int, float]:
    """By step, the seconds from the end of the one before to its own, where both lie in one turn."""
    found = {}
    for before, row in zip(rows[DROPPED:], rows[DROPPED + 1 :], strict=False):
        if any(start <= before["time"] and row["time"] <= end for start, end in turns):
            found[int(row["step"])] = row["time"] - before["time"]
    return found


def ratio_of(rounds: Sequence[np.ndarray], seed: int = 0) -> Ratio:
    """A side's time over the bare loop's with its 95 % interval, from the logarithms of the steps' ratios in each round."""
    chance = np.random.default_rng(seed)
    drawn = []
    for _ in range(DRAWS):
        medians = []
        for which in chance.integers(len(rounds), size=len(rounds)):
            logs = rounds[which]
            starts = chance.integers(max(1, len(logs) - TOGETHER + 1), size=-(-len(logs) // TOGETHER))
            medians.append(np.median(np.concatenate([logs[start : start + TOGETHER] for start in starts])))
        drawn.append(np.mean(medians))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(np.exp(np.mean([np.median(one) for one in rounds]))), float(np.exp(low)), float(np.exp(high))


def shown(ratio: Ratio) -> str:
    """A ratio with its interval."""
    return "{:.3f} [{:.3f} {:.3f}]".format(*ratio)


class Measured:
    """What the rounds have found by now."""

    def __init__(self) -> None:
        self.seconds: list[dict[str, dict[int, float]]] = []  # a round, a side, a step
        self.logs: dict[str, list[np.ndarray]] = {side: [] for side in SIDES if side != "bare"}
        self.losses: list[list[float]] = []
        self.others: list[float] = []  # of a core, a round

    def take(self, sides: Mapping[str, Side]) -> str:
        """Take in a round; returns it in words."""
        found = {side: intervals(one.rows(), one.turns) for side, one in sides.items()}
        steps = sorted(set.intersection(*map(set, found.values())))
        if not steps:
            raise SystemExit("no step lies within one turn on all sides; a step takes too long here")
        self.seconds.append(found)
        self.others.append(sides["ray"].others())
        self.losses += [[row["train/loss"] for row in one.rows()] for one in sides.values()]
        ratios = []
        for side, logs in self.logs.items():
            logs.append(np.log([found[side][step] / found["bare"][step] for step in steps]))
            ratios.append(f"{side} {np.exp(np.median(logs[-1])):.3f}")
        medians = ", ".join(f"{side} {1000 * np.median([found[side][step] for step in steps]):.1f}" for side in SIDES)
        used = f"{self.others[-1]:.3f} of a core for Ray's own processes and the driver"
        return f"{len(steps)} steps: {medians} ms a step; ÷ bare: {', '.join(ratios)}; {used}"

    def report(self) -> dict[str, Any]:
        """Everything as JSON."""
        return {
            "steps_compared": sum(map(len, self.logs["ray"])),
            "ratios": {side: dict(zip(("value", "low", "high"), ratio_of(logs), strict=True)) for side, logs in self.logs.items()},
            "round_ratios": {side: [round(float(np.exp(np.median(one))), 4) for one in logs] for side, logs in self.logs.items()},
            "cores_of_other_processes": [round(one, 4) for one in self.others],
            "losses_equal": all(one == self.losses[0] for one in self.losses),
            "seconds": [{side: {str(step): one for step, one in steps.items()} for side, steps in one.items()} for one in self.seconds],
        }


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="steps of each side, over all rounds; those between two turns are left out")
    parser.add_argument("--rounds", type=int, default=4, help="runs of each side; two of the same differ by some parts in a hundred here")
    parser.add_argument("--shared", action="store_true", help="the process that trains has one core for all its threads")
    options = parser.parse_args()
    if options.rounds < 1 or options.steps < 20 * options.rounds:
        parser.error(f"{options.steps} steps in {options.rounds} rounds: expected one round at least, and twenty steps in each")
    each = -(-options.steps * 3 // 2 // options.rounds) + DROPPED + 1  # a third is cut by turns
    load = os.getloadavg()[0]
    print(f"{options.rounds} rounds of {each} steps a side, {os.cpu_count()} cores, load {load:.1f}", flush=True)
    measured = Measured()
    with tempfile.TemporaryDirectory(prefix="ray-overhead-") as folder:
        root = Path(folder)
        Side(root, "first", "bare", 1).end()  # makes the world and looks at its tiles
        for number in range(options.rounds):
            sides = round_of(root, number, each, measured.others[-1] if number else FIRST_LOAD, options.shared)
            print(f"round {number + 1}, {measured.take(sides)}", flush=True)
    ray, loaded = (ratio_of(measured.logs[side]) for side in ("ray", "loaded"))
    report = measured.report()
    alike = report["losses_equal"]
    print(f"Ray Train ÷ bare loop: {shown(ray)}, at most {GOAL} wanted; losses {'equal' if alike else 'DIFFER'}")
    print(f"bare loop beside as much load ÷ bare loop: {shown(loaded)}; that much is this machine's")
    report |= {"arguments": vars(options), "load_at_start": round(load, 2), "load_at_end": round(os.getloadavg()[0], 2)}
    RESULTS.mkdir(exist_ok=True)
    name = "ray_overhead_shared.json" if options.shared else "ray_overhead.json"
    write_json(RESULTS / name, {**report, "environment": describe_environment()})
    return 0 if alike and ray[0] <= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())

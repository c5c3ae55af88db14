"""What runs do, as Prometheus metrics: each process sets its own, and Ray's exporter on its node hands them out.

A run's figures carry its name and, of a trial, its sweep's. They are what metrics.jsonl, reading.json and beside/ say at the moment; nobody
reads them back. Ray puts `ray_` before every name, and adds labels of its own (process, node, session).

Ray collects every ten seconds what was set meanwhile, and hands out what it collected in the last twenty: a score that is measured once an
hour would be there for twenty seconds of it. So whatever a run has said is said again, for as long as its `RunMetrics` lives.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from weakref import WeakSet

from ray.util.metrics import Gauge

from stairstep.records.pace import WINDOW, pace_of
from stairstep.records.places import ObjectFolder
from stairstep.records.reading import Reading
from stairstep.settings import StairstepError
from stairstep.sweeps import SweepFolder
from stairstep.training import EVALUATION_WAIT

RUN_TAGS = ("run", "sweep")
FIGURES: dict[str, tuple[str, tuple[str, ...]]] = {
    "stairstep_step": ("Steps trained.", ()),
    "stairstep_steps": ("Steps that the run is to train.", ()),
    "stairstep_loss": ("Training loss of the last step.", ()),
    "stairstep_validation_loss": ("Loss over the validation sample.", ()),
    "stairstep_steps_per_second": (f"Steps a second over the last {WINDOW}, evaluations and checkpoints apart.", ()),
    "stairstep_data_wait_share": (f"Share of the last {WINDOW} steps' time that was waiting for data.", ()),
    "stairstep_score": ("Score of the last evaluation that is in, of a question set by a metric.", ("set", "metric")),
    "stairstep_score_step": ("Step of the last evaluation that is in.", ()),
    "stairstep_evaluation_wait_seconds": ("Seconds that the last evaluation held training up.", ()),
    "stairstep_open_evaluations": ("Evaluations beside training that are wanted and not found.", ()),
    "stairstep_questions_done": ("Questions of the evaluation at hand that have an answer, or failed to get one.", ()),
    "stairstep_questions": ("Questions of the evaluation at hand.", ()),
    "stairstep_reader_seconds": ("Mean seconds that the reader took for an answer in the evaluation at hand.", ()),
}
"""Every metric of ours: what it says, and its labels besides a run's."""
_OWN = ("train", "rate", "time", "validation")  # first words of metrics that are no scores
_AGAIN_S = 4.0  # well within the time after which Ray collects


@cache
def _gauge(name: str) -> Gauge:
    """One of the metrics; Ray wants it made once a process."""
    said, labels = FIGURES[name]
    return Gauge(name, said, (*RUN_TAGS, *labels))


_LIVING: WeakSet[RunMetrics] = WeakSet()
_LOCK = threading.Lock()  # nobody says an old value again where another has just said a new one


@cache
def _say_again() -> threading.Thread:
    """The thread, one a process, in which everything is said again and again."""

    def work() -> None:
        while True:
            time.sleep(_AGAIN_S)
            with _LOCK:
                said = [what for one in _LIVING for what in one.said()]
                for name, labels, value in said:
                    _gauge(name).set(value, labels)

    thread = threading.Thread(target=work, name="run-metrics", daemon=True)
    thread.start()
    return thread


class RunMetrics:
    """Sets the metrics of one run from what this process hears of it: a `Listener` of tasks.run."""

    def __init__(self, run: Path | ObjectFolder, steps: int | None = None) -> None:
        """`run`: where it lies; `steps`: how many it is to train, where this process knows."""
        self._tags = {"run": run.name, "sweep": _sweep_of(run)}
        self._window: deque[Mapping[str, float]] = deque(maxlen=WINDOW)
        self._said: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        with _LOCK:
            _LIVING.add(self)
        _say_again()
        if steps is not None:
            self.set("steps", steps)

    def set(self, name: str, value: float | None, **labels: str) -> None:
        """Set a metric, named without its prefix; a value that is none, or not finite, leaves it as it was."""
        if value is not None and math.isfinite(value):
            full, labels = f"stairstep_{name}", {**self._tags, **labels}
            with _LOCK:
                self._said[full, tuple(sorted(labels.items()))] = float(value)
                _gauge(full).set(float(value), labels)

    def said(self) -> list[tuple[str, dict[str, str], float]]:
        """Every metric that was set, with its labels and its last value."""
        return [(name, dict(labels), value) for (name, labels), value in self._said.items()]

    def logged(self, step: int, values: Mapping[str, float]) -> None:
        """An event of the metric log."""
        if "train/loss" in values:
            self._trained(step, values)
        self.set("validation_loss", values.get("validation/loss"))
        self.set("evaluation_wait_seconds", values.get(EVALUATION_WAIT))
        scores = {name: value for name, value in values.items() if name.partition("/")[0] not in _OWN}
        for name, value in scores.items():
            where, _, metric = name.rpartition("/")
            self.set("score", value, set=where, metric=metric)
        if scores:
            self.set("score_step", step)

    def _trained(self, step: int, values: Mapping[str, float]) -> None:
        self.set("step", step)
        self.set("loss", values["train/loss"])
        self._window.append(values)
        if (pace := pace_of(self._window)) is not None:
            self.set("steps_per_second", pace.steps_s)
            self.set("data_wait_share", pace.wait_share)

    def reading(self, one: Reading) -> None:
        """How far the questions of an evaluation are answered."""
        self.set("questions_done", one.done)
        self.set("questions", one.of)
        self.set("reader_seconds", one.seconds_each)


def _sweep_of(run: Path | ObjectFolder) -> str:
    """The name of the sweep that a run is a trial of; empty where it is none's."""
    if isinstance(run, Path):
        above = run.absolute().parent.parent
        return above.name if SweepFolder.is_one(above) else ""
    *over, runs, _ = run.path.split("/")
    if runs != "runs" or len(over) < 2:
        return ""
    folder = replace(run, path="/".join(over))
    try:
        return folder.name if folder.exists("sweep.json") else ""
    except StairstepError:  # a label is not worth a run
        return ""

"""The step loop: optimizer, schedule, averaging, evaluations and checkpoints in one fixed order, for any task.

It knows no Ray and no file format: a task computes, a journal keeps. Everything but the weights is a function of the step, so a run
that goes on from a checkpoint takes the very steps that it would have taken. At a step the order is: update, log, checkpoint,
validation, evaluation; a checkpoint therefore never holds an evaluation of its own step, and a resumed run evaluates that step again.
Where evaluations wait for the end, their steps are only saved, then taken back one after the other once the last update is done; a run
that goes on in the midst of that evaluates them all again. Where others evaluate beside training, a step is handed to them with its
checkpoint; what they found is taken in when a later step is evaluated, in the order of the steps, and the run ends when the last is in,
be it that the last step is trained or that early stopping ends it. Early stopping decides at each score, in the order of the steps: how
fast scores come may let a few more steps be trained, and changes neither the decision nor, of the same scores, the best.
An evaluation that stands between two steps says how long it held training up, whoever made it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from stairstep.settings import TrainingError

from .averaging import AveragedWeights
from .optimizer import NamedAdamW
from .phases import PhasePlan
from .schedule import rate_factor
from .settings import OptimSettings, PhaseSettings
from .task import EvaluationReport, Journal, StepReport, Task

EVALUATION_WAIT = "time/evaluation_wait_seconds"
"""How long an evaluation held training up; at the last step, how long the run went on for the evaluations that were left."""


class Agreement(Protocol):
    """How workers agree on a flag at the end of a step."""

    def any(self, flag: bool) -> bool:
        """True on every worker if it is true on one."""


class NonFiniteError(TrainingError):
    """A loss or gradient that is not finite; nothing was updated and nothing overwritten."""

    def __init__(self, what: str, step: int, rows: tuple[str, ...]) -> None:
        shown = ", ".join(rows[:4]) + (f" and {len(rows) - 4} more" if len(rows) > 4 else "")
        super().__init__(
            f"step {step}: the {what} is not finite; nothing was updated and the last checkpoint stands. Rows of this batch: {shown}. "
            "Lower optim.rates, lengthen optim.schedule.warmup_steps or look at these rows."
        )
        self.step = step
        self.rows = rows


@dataclass(frozen=True)
class Cadence:
    """After how many updates things happen; 0 means never."""

    validation: int = 0
    evaluation: int = 0
    checkpoint: int = 0
    evaluation_waits: bool = False  # until training has ended
    evaluation_beside: int = 0  # so many may be open while training goes on, evaluated by others; 0: nobody else evaluates


@dataclass
class Progress:
    """What the loop carries from step to step besides weights and optimizer state."""

    step: int = 0
    best_step: int | None = None
    best_score: float | None = None
    evaluations_since_best: int = 0


@dataclass(frozen=True)
class Outcome:
    """How a run of the loop ended."""

    reason: Literal["finished", "stopped", "converged"]
    step: int
    best_step: int | None
    best_score: float | None


class Trainer:
    """Runs a task's steps from wherever its state stands to the last one."""

    def __init__(
        self,
        task: Task,
        optim: OptimSettings,
        phases: PhaseSettings,
        cadence: Cadence,
        journal: Journal,
        agreement: Agreement,
    ) -> None:
        self.task = task
        self.optim = optim
        self.cadence = cadence
        self.journal = journal
        self.agreement = agreement
        self.phases = PhasePlan(phases, optim.steps)
        self.optimizer = NamedAdamW(task.groups(), optim)
        self.averaged = AveragedWeights(self.optimizer.named, optim.ema_decay)
        self.progress = Progress()
        self._waiting: list[int] = []
        self._converged = False

    @property
    def waiting(self) -> tuple[int, ...]:
        """The steps whose evaluation waits for the end of training: their checkpoints have to stay."""
        return tuple(self._waiting)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values from which `load` restores this trainer; the task's own weights are saved by the task."""
        return self.optimizer.state() | self.averaged.state(), {
            "phase": self.phases.name(self.progress.step),
            **asdict(self.progress),
        }

    def load(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Take back a `state`, after the task has taken back its own."""
        self.optimizer.load(tensors)
        self.averaged.load(tensors)
        self.progress = Progress(**{name: record[name] for name in asdict(Progress())})

    def run(self) -> Outcome:
        """Train to the last step, to convergence on the selection split, or to a stop request."""
        apart = self.cadence.evaluation_waits or self.cadence.evaluation_beside > 0
        if apart:
            self._waiting = [step for step in range(self.progress.step + 1) if self._due(self.cadence.evaluation, step)]
            if self.progress.step == 0 and self._waiting:
                self.journal.checkpoint(0)
            if self.cadence.evaluation_beside:
                self._waiting = self.journal.hand_over(self._waiting)
                self._judge_anew()
        if self._look(self.progress.step):
            return self._ended()
        while self.progress.step < self.optim.steps:
            self._update(self.progress.step + 1)
            step = self.progress.step
            stop = self.agreement.any(self.journal.stop_requested())
            if stop or self._checkpoint_due(step):
                self.journal.checkpoint(step)
            if stop and (step < self.optim.steps or self._look_due(step)):
                return self._outcome("stopped")
            if self._look(step):
                return self._ended()
        if self.cadence.evaluation_waits:
            return self._outcome("finished" if self._look_back() else "stopped")
        return self._ended()

    def _ended(self) -> Outcome:
        """No step is left to train; those who evaluate beside training are waited for."""
        if not self._take_in(0):
            return self._outcome("stopped")
        return self._outcome("converged" if self._converged else "finished")

    def _look_back(self) -> bool:
        """The evaluations that waited, each of its own weights; false if a stop was asked for before they were done."""
        if self._waiting:
            self._judge_anew()
        for step in self.waiting:
            if self.agreement.any(self.journal.stop_requested()):
                return False
            recalled = self.journal.recall(step)
            if recalled:
                self._evaluate(step)
            if step == self._waiting[-1]:
                self._waiting = []
            if recalled:
                self.journal.evaluated(step, self.progress.best_step)
        return True

    def _update(self, step: int) -> None:
        started = time.perf_counter()
        rates = self.optimizer.set_rate(rate_factor(self.optim.schedule, step, self.optim.steps, self.phases.warmup_steps))
        report = self.task.step(step)
        if not math.isfinite(report.loss):
            self._refuse("loss", step, report)
        norm = float(self.optimizer.clip(self.optim.clip_norm))
        if not math.isfinite(norm):
            self._refuse("gradient", step, report)
        self.optimizer.update()
        self.task.after_update()
        self.averaged.update()
        self.progress.step = step
        values = {"train/loss": report.loss, **{f"train/{name}": value for name, value in report.metrics.items()}}
        values |= {"train/gradient_norm": norm, **{f"rate/{group}": rate for group, rate in rates.items()}}
        values |= {"time/step_seconds": time.perf_counter() - started, "time/wait_seconds": report.waited_s}
        self.journal.log(step, values)

    def _refuse(self, what: str, step: int, report: StepReport) -> None:
        self.optimizer.drop_gradients()
        raise NonFiniteError(what, step, tuple(report.rows))

    def _due(self, every: int, step: int) -> bool:
        return every > 0 and (step % every == 0 or step == self.optim.steps)

    def _look_due(self, step: int) -> bool:
        return self._due(self.cadence.validation, step) or self._due(self.cadence.evaluation, step)

    def _checkpoint_due(self, step: int) -> bool:
        """Weights that are evaluated are always kept first, so that a score never outlives what it measured."""
        due = (self.cadence.checkpoint, self.cadence.evaluation)
        return step == self.optim.steps or any(self._due(every, step) for every in due)

    def _look(self, step: int) -> bool:
        """Validate and evaluate a step where that is due; true when early stopping ends the run."""
        if self._due(self.cadence.validation, step):
            self._validate()
        if not self._due(self.cadence.evaluation, step):
            return False
        if self.cadence.evaluation_waits:
            if step not in self._waiting:
                self._waiting.append(step)
            return False
        started, measured = time.perf_counter(), True
        if self.cadence.evaluation_beside:
            self._hand_over(step)
        else:
            with self.averaged.in_place():
                measured = self._evaluate(step)
            self.journal.evaluated(step, self.progress.best_step)
        if measured:
            self.journal.log(step, {EVALUATION_WAIT: time.perf_counter() - started})
        return self._converged

    def _hand_over(self, step: int) -> None:
        """Give a step to those who evaluate, and take in what is there; all of it where training has ended with this step."""
        if step not in self._waiting:
            self._waiting += self.journal.hand_over([step])
        taken = self._take_in(self.cadence.evaluation_beside)  # if a stop ended its waiting, the loop sees that after the next step
        if taken and (self._converged or step == self.optim.steps):
            self._take_in(0)

    def _judge_anew(self) -> None:
        """All evaluations of the run are about to be judged, in order: forget what some of them said before."""
        self.progress.best_step, self.progress.best_score, self.progress.evaluations_since_best = None, None, 0
        self._converged = False

    def _take_in(self, still_open: int) -> bool:
        """What others have found by now, step by step; waits while more than `still_open` are open. False if a stop came meanwhile."""
        while self._waiting:
            report = self.journal.arrived(self._waiting[0], wait=len(self._waiting) > still_open)
            if report is None and len(self._waiting) > still_open:
                return False
            if report is None:
                break
            step = self._waiting.pop(0)
            if report.metrics:
                self.journal.log(step, dict(report.metrics))
            self._judge(step, report)
            self.journal.evaluated(step, self.progress.best_step)
        return True

    def _validate(self) -> None:
        with self.averaged.in_place():
            values = self.task.validation()
        if values:
            self.journal.log(self.progress.step, {f"validation/{name}": value for name, value in values.items()})

    def _evaluate(self, step: int) -> bool:
        """Evaluate the weights as they are; false where there is nothing to measure, or another worker does."""
        self.journal.evaluating(step)
        report = self.task.evaluate(step)
        if report.metrics:
            self.journal.log(step, dict(report.metrics))
        self._judge(step, report)
        return bool(report.metrics)

    def _judge(self, step: int, report: EvaluationReport) -> None:
        """Keep-best and early stopping look at the selection split alone, and never at the untrained step 0."""
        if report.selection is None or step == 0:
            return
        if self.progress.best_score is None or report.selection > self.progress.best_score:
            self.progress.best_step, self.progress.best_score = step, report.selection
            self.progress.evaluations_since_best = 0
        else:
            self.progress.evaluations_since_best += 1
        if self.optim.stop_after is not None and self.progress.evaluations_since_best >= self.optim.stop_after:
            self._converged = True  # and stays so: a better score of a later step, trained before this was known, is the best all the same

    def _outcome(self, reason: Literal["finished", "stopped", "converged"]) -> Outcome:
        return Outcome(reason, self.progress.step, self.progress.best_step, self.progress.best_score)

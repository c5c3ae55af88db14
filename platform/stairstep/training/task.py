"""What the step loop knows of a task, and what a task tells it: nothing here assumes an objective, a kind of row or a kind of output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch.nn import Parameter

Groups = Mapping[str, Sequence[tuple[str, Parameter]]]


@dataclass(frozen=True)
class StepReport:
    """One step, forward and backward done: gradients lie in `.grad`, equal on all workers."""

    loss: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    rows: Sequence[str] = ()  # where the rows of the global batch were written, to name them when the step fails
    waited_s: float = 0.0  # seconds spent waiting for input


@dataclass(frozen=True)
class EvaluationReport:
    """One evaluation: its metrics, and the score on the selection split that alone may steer a run (higher is better)."""

    metrics: Mapping[str, float]
    selection: float | None = None


class Task(Protocol):
    """What a run does. A step's batch is a function of the seed and the step alone."""

    def groups(self) -> Groups:
        """Trained parameters with their names, by group of learning rate; `objective` holds the loss's own and is never decayed."""

    def step(self, step: int) -> StepReport:
        """Forward and backward of step 1, 2, …"""

    def after_update(self) -> None:
        """Whatever must hold after the optimizer moved, for example the temperature's limits."""

    def validation(self) -> Mapping[str, float]:
        """Loss (and accuracy) over a fixed sample of the validation split; empty where the task has none."""

    def evaluate(self, step: int) -> EvaluationReport:
        """The task's own evaluations of the weights as they are now."""


class Journal(Protocol):
    """Where a run leaves what happened: the loop's only way to the outside."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """One event of the metric log."""

    def checkpoint(self, step: int) -> None:
        """Save task and trainer as they are now."""

    def recall(self, step: int) -> bool:
        """Give the task the weights of a step's checkpoint; false where that is gone."""

    def evaluating(self, step: int) -> None:
        """An evaluation begins."""

    def hand_over(self, steps: Sequence[int]) -> list[int]:
        """Give the checkpoints of steps to those who evaluate beside training; returns the steps that are open."""

    def arrived(self, step: int, wait: bool) -> EvaluationReport | None:
        """What others have found of a step; None if it is not in yet, or if a stop was asked for while waiting."""

    def evaluated(self, step: int, best_step: int | None) -> None:
        """An evaluation is complete; `best_step` leads on the selection split."""

    def stop_requested(self) -> bool:
        """Whether this worker was asked to stop."""
